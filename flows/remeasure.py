"""Give a line new feature spaces, and measure its champions and anchors in them.

Figures in different spaces are never compared. So a line keeps its spaces until somebody asks for new ones: because a newer
ferry measures in more of them, or because captions have come that the old spaces never saw. From then on the gate compares only
figures in the new spaces. Scorecards stay as they are. The ledger gets the new figures of those versions with which challengers
are compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pydantic import Field, ValidationError

from flows.workspace import Workspace
from model.config import canonical_sha256
from model.scorecard import CaptionCheck, Frozen, Quality, Sha256
from registry.catalog import Subject
from registry.champions import anchor_of, champion_of
from registry.errors import CatalogError, LedgerError
from registry.lineage import file_sha256
from registry.seal import Seal


class Figures(Frozen):
    """Figures of a version that was measured anew, as the ledger holds them."""

    version: int
    weights: Sha256
    spaces: Sha256 = Field(description="hash of the feature spaces")
    before: Sha256 = Field(description="of those that the line had until then")
    data_rev: str = Field(description="revision on which the spaces were fitted and whose held-out images were compared with")
    data_md5: str
    quality: list[Quality]
    asked: list[CaptionCheck]


class Remeasured(Frozen):
    """Result of a call of `remeasure`."""

    line: str
    spaces: list[str]
    spaces_sha256: Sha256
    before: Sha256
    data_rev: str
    versions: list[str] = Field(description="measured by this call; a killed one before it may have measured others")


def figures(workspace: Workspace, subject: Subject, version: int, spaces: Sha256 | None = None) -> Figures | None:
    """Find a version's recorded figures in these feature spaces, by default the line's present ones; None: there are none.

    Only `remeasure` records figures. Those of a version that it never measured are in the scorecard.

    Raises:
        LedgerError: a newer ferry measured it.
    """
    entries = [e for e in workspace.ledger.entries(str(subject)) if e.kind == "measured" and e.facts["version"] == version]
    if not entries:
        return None
    present = workspace.feature_spaces(subject.line)
    wanted = spaces or (file_sha256(present) if present.is_file() else None)
    try:
        found = [Figures.model_validate(e.facts) for e in entries if e.facts["spaces"] == wanted]
    except ValidationError as error:
        raise LedgerError(f"a newer ferry measured {subject} version {version}; update ferry") from error
    return found[-1] if found else None


def remeasure(workspace: Workspace, line: str, why: str, rev: str = "") -> Remeasured:
    """Fit new feature spaces on a data revision, measure in them, then let the line use them. Rerun a killed call; it resumes.

    If the line has these spaces already, only versions that were not measured in them are measured, such as a champion that
    somebody went back to.

    Args:
        workspace: where.
        line: whose spaces.
        why: reason, for the ledger.
        rev: Git revision of the data; "": the present one, and the data folder must not differ from it.

    Raises:
        WorkspaceError: there is no such line, or its pictures have another format now than those of its champions.
        CatalogError: the line has no feature spaces yet.
        RevisionError: there is no such revision, or the folder was changed since.
        CheckpointError: the present spaces are missing or damaged.
        BusyError: a retraining runs.
    """
    from flows.candidate import check_same_pictures
    from flows.steps import drawer, open_dataset, pull_data
    from model import evaluate, features, versions
    from model.train import code_sha256

    settings, present = workspace.line(line), workspace.feature_spaces(line)
    with workspace.locked("retraining"):
        found = [
            (subject, champion)
            for configuration, variant in settings.combinations()
            if (champion := champion_of(workspace, subject := Subject(line=line, configuration=configuration, variant=variant)))
        ]
        if not found and not present.is_file():
            raise CatalogError(f"{line} has no feature spaces yet; run `ferry retrain {line}`, which makes them")
        before = features.load(present)
        workspace.ledger.check_ready()
        if not rev:
            versions.check_clean(workspace.root, settings.data, line)
        data = versions.resolve(workspace.root, settings.data, line, rev or "HEAD")
        measured = [
            (subject, version, workspace.catalog.files(version, "bundle", workspace.work / "champions"))
            for subject, champion in found
            for version in {seal.version: seal for seal in (champion, anchor_of(workspace, subject)) if seal}.values()
        ]
        configuration = settings.combinations()[0][0]
        config = settings.config(configuration)
        for _, version, bundle in measured:
            table = json.loads((bundle / "sampler.json").read_bytes())["image"]
            check_same_pictures(version.name, (table["size"], table["channels"]), config)
        pull_data.fn(workspace, data)
        dataset = open_dataset(workspace, settings, configuration, data)
        key = canonical_sha256([data.md5, config.sha256, code_sha256()])[:16]
        fresh = present.with_name(f".{line}.{key}.safetensors")  # a killed call leaves it for the next one
        for other in present.parent.glob(f".{line}.{'[0-9a-f]' * 16}.safetensors"):
            if other != fresh or not _is_whole(other):
                other.unlink()
        spaces = features.fit(dataset, fresh)
        n, new = settings.gate.images, list[tuple[Seal, Figures]]()
        asked = [dataset.captions[i] for i in (*evaluate.held_out_items(dataset, n), *evaluate.further_items(dataset, n))]
        for subject, version, bundle in measured:
            own = {q.space_sha256 for q in workspace.catalog.card(version).quality}
            if spaces.sha256 in own or figures(workspace, subject, version.version, spaces.sha256):
                continue
            drawn = drawer(workspace, line, bundle).draw(asked)
            made = Figures(
                version=version.version, weights=version.weights, spaces=spaces.sha256, before=before.sha256, data_rev=data.rev, data_md5=data.md5,
                quality=evaluate.quality(spaces, dataset, drawn.first(n), "new"), asked=evaluate.asked_for(spaces, dataset, drawn, None, n),
            )  # fmt: skip
            new.append((version, made))
        with workspace.locked("records"):
            for version, made in new:
                workspace.ledger.append("measured", version.subject, why, made.model_dump(mode="json"))
        _put_in_place(fresh, present, before.sha256)
        return Remeasured(
            line=line, spaces=list(spaces.names), spaces_sha256=spaces.sha256, before=before.sha256, data_rev=data.rev,
            versions=[version.name for version, _ in new],
        )  # fmt: skip


def _is_whole(path: Path) -> bool:
    """Check whether a file holds complete feature spaces; a killed call may have left a part of them."""
    from model import features
    from model.errors import CheckpointError

    try:
        features.load(path)
    except CheckpointError:
        return False
    return True


def _put_in_place(fresh: Path, present: Path, before: Sha256) -> None:
    """Make the new spaces the line's present ones, and keep the previous ones, because past scorecards name them."""
    if file_sha256(fresh) == before:
        fresh.unlink()
        return
    kept = present.with_name(f"{present.stem}.{before[:16]}.safetensors")
    if not kept.exists():
        copy = kept.with_name(f".{kept.name}.tmp")
        shutil.copyfile(present, copy)  # no link, because not every file system has links
        copy.replace(kept)
    fresh.replace(present)


def text_of(made: Remeasured) -> str:
    """Format the result as text."""
    spaces = f"{', '.join(made.spaces)} features"
    if not made.versions and made.spaces_sha256 == made.before:
        return f"{made.line} already measures in these {spaces}; nothing was changed"
    return (
        f"{made.line} now measures in {spaces} of data revision {made.data_rev[:12]}; this call measured "
        f"{', '.join(made.versions) or 'nothing that a call before it had not'}. Figures from before stay in their scorecards and are not "
        "compared with new ones."
    )
