"""Give a line new feature spaces, and measure its champions and best versions ever in them.

Figures in different spaces are never compared. So a line keeps its spaces until somebody asks for new ones: because a newer ferry measures
in more of them, or because captions have come that the old ones never saw. From then on all that the gate compares is measured in the new
ones. Scorecards stay as they are; the ledger holds the new figures of the versions that go on to be compared with.
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
    """Hold what the ledger has of a version that was measured anew."""

    version: int
    weights: Sha256
    spaces: Sha256 = Field(description="hash of the feature spaces")
    before: Sha256 = Field(description="of those that the line had until then")
    data_rev: str = Field(description="revision on which the spaces were fitted and whose held-out images were compared with")
    data_md5: str
    quality: list[Quality]
    asked: list[CaptionCheck]


class Remeasured(Frozen):
    """Hold what came of a call."""

    line: str
    spaces: list[str]
    spaces_sha256: Sha256
    before: Sha256
    data_rev: str
    versions: list[str] = Field(description="measured by this call; a killed one before it may have measured others")


def figures(workspace: Workspace, subject: Subject, version: int, spaces: Sha256 | None = None) -> Figures | None:
    """Find the figures of a version in feature spaces, the line's present ones by default; None where only its scorecard has figures.

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

    Where the line has these spaces already, champions that were not measured in them are, such as one that somebody went back to.

    Args:
        workspace: where.
        line: whose spaces.
        why: the reason given.
        rev: Git revision of the data; the present one by default, whose folder must be as it was recorded.

    Raises:
        WorkspaceError: there is no such line, or its pictures have another format now than those of its champions.
        CatalogError: no model of the line is champion yet, so that it has no figures.
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
        if not found:
            raise CatalogError(
                f"{line} has no champion, so nothing was measured yet; run `ferry retrain {line}`, which makes its spaces"
            )
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
        config = settings.config(found[0][0].configuration)
        for _, version, bundle in measured:
            table = json.loads((bundle / "sampler.json").read_bytes())["image"]
            check_same_pictures(version.name, (table["size"], table["channels"]), config)
        pull_data.fn(workspace, data)
        dataset = open_dataset(workspace, settings, found[0][0].configuration, data)
        key = canonical_sha256([data.md5, config.sha256, code_sha256()])[:16]
        fresh = present.with_name(f".{line}.{key}.safetensors")  # kept by a killed call
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
    """Say whether a killed call left spaces that can be used."""
    from model import features
    from model.errors import CheckpointError

    try:
        features.load(path)
    except CheckpointError:
        return False
    return True


def _put_in_place(fresh: Path, present: Path, before: Sha256) -> None:
    """Make new spaces the present ones, and keep those from before, which past scorecards name."""
    if file_sha256(fresh) == before:
        fresh.unlink()
        return
    kept = present.with_name(f"{present.stem}.{before[:16]}.safetensors")
    if not kept.exists():
        copy = kept.with_name(f".{kept.name}.tmp")
        shutil.copyfile(present, copy)  # no link: not every file system has them
        copy.replace(kept)
    fresh.replace(present)


def text_of(made: Remeasured) -> str:
    """Say what came of it, for people."""
    spaces = f"{', '.join(made.spaces)} features"
    if not made.versions and made.spaces_sha256 == made.before:
        return f"{made.line} already measures in these {spaces}; nothing was changed"
    return (
        f"{made.line} now measures in {spaces} of data revision {made.data_rev[:12]}; this call measured "
        f"{', '.join(made.versions) or 'nothing that a call before it had not'}. Figures from before stay in their scorecards and are not "
        "compared with new ones."
    )
