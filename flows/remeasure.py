"""Give a line new feature spaces, and measure its champions and best versions ever in them.

Figures in different spaces are never compared. So a line keeps its spaces until somebody asks for new ones: because a newer ferry measures
in more of them, or because captions have come that the old ones never saw. From then on all that the gate compares is measured in the new
ones. Scorecards stay as they are; the ledger holds the new figures of the versions that go on to be compared with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from flows.promote import anchor_of, champion_of
from flows.workspace import Workspace
from model.scorecard import CaptionCheck, Frozen, Quality, Sha256
from registry.catalog import Subject
from registry.errors import CatalogError
from registry.seal import Seal


class Figures(Frozen):
    """What the ledger holds of a version that was measured anew."""

    version: int
    weights: Sha256
    spaces: Sha256 = Field(description="hash of the feature spaces")
    before: Sha256 = Field(description="of those that the line had until then")
    quality: list[Quality]
    asked: list[CaptionCheck]


class Remeasured(Frozen):
    """What came of it."""

    line: str
    spaces: list[str]
    spaces_sha256: Sha256
    before: Sha256
    data_rev: str
    versions: list[str] = Field(description="measured anew; empty: the spaces stay as they are")


def figures(workspace: Workspace, subject: Subject, version: int) -> Figures | None:
    """The last figures of a version that was measured anew; None where its scorecard holds the only ones."""
    found = [e for e in workspace.ledger.entries(str(subject)) if e.kind == "measured" and e.facts["version"] == version]
    return Figures.model_validate(found[-1].facts) if found else None


def remeasure(workspace: Workspace, line: str, why: str, rev: str = "HEAD") -> Remeasured:
    """Fit new feature spaces on a data revision, measure in them, then let the line use them. Rerun a killed call; it resumes.

    Args:
        workspace: where.
        line: whose spaces.
        why: the reason given.
        rev: Git revision of the data.

    Raises:
        WorkspaceError: there is no such line.
        CatalogError: no model of the line is champion yet, so that it has no figures.
        RevisionError: there is no such revision.
        CheckpointError: the present spaces are missing or damaged.
        BusyError: a retraining runs.
    """
    from flows.retrain import Contender, champion_files, drawn_as, open_dataset, pull_data
    from model import evaluate, features, versions

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
        data = versions.resolve(workspace.root, settings.data, line, rev)
        pull_data.fn(str(workspace.root), data.model_dump())
        dataset = open_dataset(workspace, settings, found[0][0].configuration, data)
        coming = present.with_name(f".{line}.{data.md5[:16]}.safetensors")
        spaces = features.fit(dataset, coming)
        made = Remeasured(
            line=line,
            spaces=list(spaces.names),
            spaces_sha256=spaces.sha256,
            before=before.sha256,
            data_rev=data.rev,
            versions=[],
        )
        if spaces.sha256 == before.sha256:
            coming.unlink()
            return made
        n, names = settings.gate.images, []
        asked = [dataset.captions[i] for i in (*evaluate.held_out_items(dataset, n), *evaluate.further_items(dataset, n))]
        for subject, champion in found:
            best = anchor_of(workspace, subject)
            for version in {seal.version: seal for seal in (champion, best) if seal}.values():
                bundle = Path(champion_files(workspace, version)["bundle"])
                drawn = Contender(bundle, workspace.work / "draws", line, drawn_as(bundle)).draw(asked)
                new = Figures(
                    version=version.version, weights=version.weights, spaces=spaces.sha256, before=before.sha256,
                    quality=evaluate.quality(spaces, dataset, drawn.first(n), "new"),
                    asked=evaluate.asked_for(spaces, dataset, drawn, None, n),
                )  # fmt: skip
                _record(workspace, version, new, why)
                names.append(version.name)
        kept = present.with_name(f"{line}.{before.sha256[:16]}.safetensors")
        if not kept.exists():
            os.link(present, kept)  # past scorecards name its hash
        coming.replace(present)
        return made.model_copy(update={"versions": names})


def _record(workspace: Workspace, version: Seal, new: Figures, why: str) -> None:
    facts: dict[str, Any] = new.model_dump(mode="json")
    with workspace.locked("records"):
        known = figures(workspace, Subject.parse(version.subject), version.version)
        if known is None or known.spaces != new.spaces:  # else a call that was killed had recorded it
            workspace.ledger.append("measured", version.subject, why, facts)


def text_of(made: Remeasured) -> str:
    """What came of it, for people."""
    if not made.versions:
        return f"{made.line} already measures in these feature spaces ({', '.join(made.spaces)}); nothing was changed"
    return (
        f"{made.line} now measures in {', '.join(made.spaces)} features of data revision {made.data_rev[:12]}; measured anew: "
        f"{', '.join(made.versions)}. Figures from before stay in their scorecards and are not compared with new ones."
    )
