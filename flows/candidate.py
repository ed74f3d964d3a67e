"""One challenger's way: export → evaluate → gate (`examine`), then register, and promotion where the gate lets it through (`settle`).

With a budget, several sizes of one update are examined, and one of them is settled: see `flows.fitting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows import approval, pages, progress
from flows.steps import (
    REAL,
    SAMPLES,
    ModelFiles,
    Rivals,
    evaluate_model,
    export_model,
    read_card,
    register_model,
    renewed,
    source_of,
    subject_of,
)
from flows.workspace import Workspace
from model import train
from model.config import canonical_sha256
from ota.release.bundle import update_bytes
from registry.budget import with_update
from registry.champions import anchor_of, gate, promote_or_ask, promotions
from registry.curve import Update
from registry.lineage import file_sha256
from registry.promotion import was_taken_back
from registry.runs import Retrained
from registry.seal import Seal
from registry.selection import Budgets, Decision, Limits


@dataclass(frozen=True)
class Incumbent:
    """A subject's champion with its files."""

    seal: Seal
    files: ModelFiles


@dataclass(frozen=True)
class Examined:
    """A challenger that the gate has seen, and nothing has recorded yet."""

    files: ModelFiles
    evaluation: Path
    decision: Decision


@dataclass(frozen=True)
class Judged:
    """Result for a checkpoint: the gate's decision, the files, and whether it may teach the next variant (`fit`)."""

    row: Retrained
    decision: Decision
    files: ModelFiles
    fit: bool


def judge(
    workspace: Workspace,
    checkpoint: Path,
    champion: Incumbent | None,
    allowed: float | None,
    promote_winners: bool,
    full: Path | None = None,
    update: Update | None = None,
) -> Judged:
    """Export, evaluate, gate, register and perhaps promote a trained checkpoint: `examine` and `settle`."""
    return settle(workspace, examine(workspace, checkpoint, champion, allowed, full, update), promote_winners)


def examine(
    workspace: Workspace,
    checkpoint: Path,
    champion: Incumbent | None,
    allowed: float | None,
    full: Path | None = None,
    update: Update | None = None,
) -> Examined:
    """Export, evaluate and gate a trained checkpoint; nothing is recorded.

    Args:
        workspace: where.
        checkpoint: folder.
        champion: the present one, if any.
        allowed: chance of a wrong promotion that all attempts on these held-out images may take together; None: `gate.alpha`.
        full: bundle of the `full` whose variant this is; None: it is `full`.
        update: how the update was made; None: by rounding, or there is no champion.
    """
    opened = train.load_checkpoint(checkpoint)
    data, subject = opened.lineage.data, subject_of(opened.lineage)
    line = workspace.line(data.line)
    anchor = (anchor_of(workspace, subject) or champion.seal) if champion else None  # a workspace may have no anchor yet
    key = _key(workspace, opened)
    exported = renewed(export_model, workspace.work / "exports" / key / "reference.json")(workspace, checkpoint, key)
    model = ModelFiles(checkpoint=checkpoint, bundle=Path(exported))
    evaluation = _evaluated(workspace, data.line, model, key, champion, anchor, full)
    card = read_card(evaluation)
    decision = gate(
        workspace, subject, card, Limits(**line.gate.model_dump(exclude={"images"})),
        Budgets(
            latency_ms=line.latency_ms(subject.configuration, subject.variant),
            memory_mib=line.memory_mib(subject.configuration, subject.variant),
        ),
        champion.seal if champion else None, anchor, line.gate.alpha if allowed is None else allowed,
        update_bytes(champion.files.bundle, model.bundle) if champion and update is None else None,
    )  # fmt: skip
    return Examined(model, evaluation, decision if update is None else with_update(decision, update))


def settle(workspace: Workspace, examined: Examined, promote_winners: bool) -> Judged:
    """Register a challenger that was examined, and promote it where the gate lets it through.

    Args:
        workspace: where.
        examined: the challenger.
        promote_winners: promote what the gate lets through.
    """
    model, evaluation, decision = examined.files, examined.evaluation, examined.decision
    card, lineage = read_card(evaluation), train.load_checkpoint(model.checkpoint).lineage
    subject, data = subject_of(lineage), lineage.data
    number = register_model(workspace, model, evaluation, decision)
    pages.decision(subject, number, decision, evaluation / SAMPLES)
    taken_back = was_taken_back(card.weights_sha256, [str(e.facts["weights"]) for e in promotions(workspace, subject)])
    promoted, reason, outcome = False, decision.reason, str(decision.outcome)
    if decision.outcome == "promote" and promote_winners:
        promoted, reason, outcome = promote_or_ask(
            workspace, subject, number, decision, taken_back, workspace.needs_approval(data.line),
            lambda: approval.ask_in_prefect(workspace, subject, number),
        )  # fmt: skip
    progress.say(f"{subject} version {number}: {outcome}{', it is champion now' if promoted else ''}")
    row = Retrained(
        subject=str(subject), data_rev=data.rev, version=number, outcome=outcome, reason=reason, n=decision.n, promoted=promoted,
        update=decision.update,
    )  # fmt: skip
    return Judged(row, decision, model, decision.outcome == "promote" and not taken_back)


def _key(workspace: Workspace, opened: train.Checkpoint) -> str:
    """Hash everything that an export depends on."""
    line = workspace.line(opened.lineage.data.line)
    settings = canonical_sha256([
        line.sampler.model_dump(), line.sampler_of(opened.lineage.variant, source_of(opened.lineage)).model_dump(), line.gate.model_dump(),
        {k: c.model_dump() for k, c in line.classes.items()}, opened.lineage.data.md5,
    ])  # fmt: skip
    return canonical_sha256([opened.weights_sha256, opened.lineage.sha256, settings, train.code_sha256()])[:32]


def _evaluated(
    workspace: Workspace,
    line: str,
    model: ModelFiles,
    key: str,
    champion: Incumbent | None,
    anchor: Seal | None,
    full: Path | None,
) -> Path:
    """Evaluate a model once beside these rivals, in the line's present feature spaces; return the evaluation's folder."""
    scored = anchor if anchor and champion and anchor.weights != champion.seal.weights else None
    frozen = workspace.feature_spaces(line)
    # `ferry remeasure` changes the spaces. A line's first evaluation makes them, and must have the same key when it is repeated.
    known = champion is not None or workspace.former_feature_spaces(line)
    spaces = file_sha256(frozen) if known and frozen.is_file() else None
    key = canonical_sha256([
        key, champion.seal.weights if champion else None, scored.weights if scored else None,
        file_sha256(full / "weights.bin") if full else None, file_sha256(full / "sampler.json") if full else None, spaces,
    ])[:32]  # fmt: skip
    rivals = Rivals(
        champion=champion.files if champion else None,
        anchor=workspace.catalog.files(scored, "bundle", workspace.work / "champions") if scored else None,
        full=full,
    )
    return Path(renewed(evaluate_model, workspace.work / "evaluations" / key / REAL)(workspace, model, rivals, key))
