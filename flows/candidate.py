"""One challenger's way: export → evaluate → gate → register, and promotion where the gate lets it through."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flows import approval, pages
from flows.errors import WorkspaceError
from flows.settings import Line
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
    subject_of,
)
from flows.workspace import Workspace
from model import train
from model.config import ModelConfig, canonical_sha256
from model.scorecard import Frozen, Lineage, Scorecard
from ota.delta import files
from registry.catalog import Subject
from registry.champions import anchor_of, ask, champion_of, judged, promote, promotions, verdict
from registry.lineage import file_sha256
from registry.promotion import was_taken_back
from registry.seal import Seal
from registry.selection import Budgets, Decision, Limits, decide, spent


class Retrained(Frozen):
    """What the flow did for one subject."""

    subject: str
    data_rev: str
    version: int
    outcome: str
    reason: str
    n: int
    promoted: bool


@dataclass(frozen=True)
class Incumbent:
    """A subject's champion with its files."""

    seal: Seal
    files: ModelFiles


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
) -> Judged:
    """Export, evaluate, gate, register and perhaps promote a trained checkpoint.

    Args:
        workspace: where.
        checkpoint: folder.
        champion: the present one, if any.
        allowed: chance of a wrong promotion that all attempts on these held-out images may take together; None: `gate.alpha`.
        promote_winners: promote what the gate lets through.
        full: bundle of the `full` that a student is compared with at equal network evaluations.
    """
    opened = train.load_checkpoint(checkpoint)
    data, subject = opened.lineage.data, subject_of(opened.lineage)
    anchor = (anchor_of(workspace, subject) or champion.seal) if champion else None  # a workspace may have no anchor yet
    key = _key(workspace, opened)
    exported = renewed(export_model, workspace.work / "exports" / key / "reference.json")(workspace, checkpoint, key)
    model = ModelFiles(checkpoint=checkpoint, bundle=Path(exported))
    evaluation = _evaluated(workspace, data.line, model, key, champion, anchor, full)
    card = read_card(evaluation)
    decision = _decided(workspace, opened.lineage, card, model, champion, anchor, allowed)
    number = register_model(workspace, model, evaluation, decision)
    pages.decision(subject, number, decision, evaluation / SAMPLES)
    taken_back = was_taken_back(card.weights_sha256, [str(e.facts["weights"]) for e in promotions(workspace, subject)])
    promoted, reason, outcome = False, decision.reason, str(decision.outcome)
    if decision.outcome == "promote" and promote_winners:
        if taken_back:
            reason = f"{reason}; it was taken back, so promote it by hand if it is to come again"
        else:
            promoted, reason, outcome = _promoted(workspace, subject, number, decision)
    row = Retrained(
        subject=str(subject), data_rev=data.rev, version=number, outcome=outcome, reason=reason, n=decision.n, promoted=promoted,
    )  # fmt: skip
    return Judged(row, decision, model, decision.outcome == "promote" and not taken_back)


def _key(workspace: Workspace, opened: train.Checkpoint) -> str:
    """Hash everything that an export depends on."""
    line = workspace.line(opened.lineage.data.line)
    settings = canonical_sha256([
        line.sampler.model_dump(), line.gate.model_dump(), {k: c.model_dump() for k, c in line.classes.items()}, opened.lineage.data.md5,
    ])  # fmt: skip
    return canonical_sha256([opened.weights_sha256, settings, train.code_sha256()])[:32]


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
        file_sha256(full / "weights.bin") if full else None, spaces,
    ])[:32]  # fmt: skip
    rivals = Rivals(
        champion=champion.files if champion else None,
        anchor=workspace.catalog.files(scored, "bundle", workspace.work / "champions") if scored else None,
        full=full,
    )
    return Path(renewed(evaluate_model, workspace.work / "evaluations" / key / REAL)(workspace, model, rivals, key))


def _decided(
    workspace: Workspace,
    lineage: Lineage,
    card: Scorecard,
    model: ModelFiles,
    champion: Incumbent | None,
    anchor: Seal | None,
    allowed: float | None,
) -> Decision:
    """Ask the gate, at the level that earlier attempts on these held-out images have left."""
    line, subject, configuration = workspace.line(lineage.data.line), subject_of(lineage), lineage.config.configuration
    limits = Limits(**line.gate.model_dump(exclude={"images"}))
    budgets = Budgets(
        latency_ms=line.latency_ms(configuration, lineage.variant), memory_mib=line.memory_mib(configuration, lineage.variant)
    )
    earlier = [verdict(workspace, subject, number) for number in sorted(judged(workspace, subject))]
    before = [made for made in earlier if made]
    share = line.gate.alpha if allowed is None else allowed
    looks, next_looks = (spent(share, card.held_out, card.sha256, before, ahead) for ahead in (0, 1 if champion else 0))
    return decide(
        card, limits, budgets, champion.seal.weights if champion else None,
        anchor=anchor.weights if anchor else None, level=looks, again=next_looks,
        update_bytes=_update_bytes(champion.files.bundle, model.bundle) if champion else None,
    )  # fmt: skip


def _promoted(workspace: Workspace, subject: Subject, number: int, decision: Decision) -> tuple[bool, str, str]:
    """Promote what the gate let through, or let it wait for a person; return whether it is champion, reason and outcome."""
    current = champion_of(workspace, subject)
    if current is not None and current.version == number:
        return True, decision.reason, decision.outcome
    if workspace.needs_approval(subject.line):
        refused = ask(workspace, subject, number, decision.reason)
        approval.ask_in_prefect(workspace, subject, number)
        if refused:
            return False, f"{refused.who} refused it: {refused.why}", "refused"
        return False, f"{decision.reason}; `ferry approve {subject} {number}` promotes it", "pending"
    promote(workspace, subject, number, decision.reason)
    return True, decision.reason, decision.outcome


def _update_bytes(old: Path, new: Path) -> int:
    """Estimate how large a delta between the weights of two bundles would be."""
    return files.estimate(old / "weights.bin", new / "weights.bin", new / "graph.onnx", old / "graph.onnx")


def check_same_pictures(who: str, drawn: tuple[int, int], wanted: ModelConfig) -> None:
    """Refuse to compare pictures of different formats.

    Raises:
        WorkspaceError: ferry.toml asks for another size or other channels than this model draws.
    """
    if drawn != (wanted.image_size, wanted.channels):
        raise WorkspaceError(
            f"{who} draws {drawn[0]} pixels in {drawn[1]} channels, ferry.toml asks for "
            f"{wanted.image_size} in {wanted.channels}; pictures of another format are another product, give them a line of their own"
        )


def is_exported_so(workspace: Workspace, champion: Incumbent, line: Line) -> bool:
    """Check whether a champion was exported with the sampler, the precision and the latency budget of the settings."""
    card = workspace.catalog.card(champion.seal)
    wanted = (
        line.sampler_of(card.variant),
        line.precision(card.configuration),
        line.latency_ms(card.configuration, card.variant),
    )
    latency = json.loads((champion.files.bundle / "reference.json").read_bytes())["latency_ms"]
    return (card.sampler, card.precision, latency) == wanted
