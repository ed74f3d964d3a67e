"""Make the update of a retraining as small as asked.

One training makes a master. What is fielded is made from it at a level of noise, which encoded bytes alone choose. With a budget,
several sizes are tried, from the largest to the smallest: first whether each keeps its share of the gain, on paired losses, and
then the gate, on drawn images. The rules, and why their error rates hold, are in `registry.curve`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from prefect import task

from flows import budget as money
from flows import progress
from flows.candidate import Examined, Incumbent, Judged, examine, settle
from flows.errors import BudgetError
from flows.settings import Line
from flows.sizes import written
from flows.steps import ModelFiles, by_key, open_dataset, renewed, subject_of
from flows.workspace import Workspace
from model import evaluate, export, graph, train
from model.config import VARIANTS, canonical_sha256
from model.data import Dataset
from model.kept import Losses, kept, losses
from model.polish import polish
from model.publish import Publication, write_published
from model.scorecard import Frozen, Kept
from model.update import FACTORS, METHODS, write_factors
from model.update import Update as NewWeights
from ota.delta import files
from ota.release import bundle
from registry.budget import passes
from registry.champions import alpha_left, champion_of, updates
from registry.curve import GATED, Point, Setting, Update, early, held_level, hold, in_order, level_for, rooms
from registry.errors import PromotionError
from registry.selection import Decision

FITTED = "fitted.json"
SPARE = 0.02  # share of the limit that is left free where the update is polished, which changes its bytes a little
LEVELS = {"lowrank": (0.004, 4.0), "small-tensors": (0.05, 8.0)}  # finest and coarsest level that is tried


class Candidate(Frozen):
    """A size of the update that the gate may judge."""

    checkpoint: Path
    update: Update


class Fitted(Frozen):
    """Sizes for the gate, the largest first; at least one."""

    candidates: list[Candidate]


def judge_update(
    workspace: Workspace, trained: Path, champion: Incumbent, allowed: float, promote_winners: bool, fixed: int
) -> Judged:  # fmt: skip
    """Make the update of a trained master, judge it, and register and promote the smallest size that passes.

    Args:
        workspace: where.
        trained: checkpoint of the master.
        champion: what devices have; the master was trained from it.
        allowed: chance of a wrong promotion that all attempts on these held-out images may take together.
        promote_winners: promote what the gate lets through.
        fixed: bytes that a device fetches besides the weights.

    Raises:
        PromotionError: another version has become champion since the training began.
        BudgetError: the budget is smaller than what an update costs without any weights.
    """
    opened = train.load_checkpoint(trained)
    line, subject = workspace.line(opened.lineage.data.line), subject_of(opened.lineage)
    now = champion_of(workspace, subject)
    if now is None or now.weights != champion.seal.weights:
        raise PromotionError(
            f"{subject} {now.version if now else 'without a champion'} has become champion since this training began, so its update fits no "
            f"device; run `ferry retrain {subject.line}` again, which starts from that version (nothing was changed)"
        )
    dataset = open_dataset(workspace, line, subject.configuration, opened.lineage.data)
    alpha = alpha_left(
        workspace, subject, evaluate.group_hashes(dataset), allowed,
        lambda made: made.update is not None and (made.update.master, made.update.method, made.update.budget, made.update.keep) == (
            opened.weights_sha256, line.update_method, line.update_budget, line.update_keep if line.update_budget else None,
        ),
    )  # fmt: skip
    setting = _setting(line, opened, usual_level(line))
    earlier = early(updates(workspace, [subject]), line.update_method or "", setting) if setting else []
    key = canonical_sha256([
        opened.weights_sha256, opened.lineage.sha256, champion.seal.weights, line.update_method, line.update_level, line.update_budget,
        line.update_keep, line.update_polish, line.delta_form(subject.configuration), line.precision(subject.configuration), fixed, earlier, alpha, train.code_sha256(),
    ])[:32]  # fmt: skip
    folder = Path(renewed(fit_update, workspace.work / "updates" / key / FITTED)(
        workspace, trained, champion.files, alpha, fixed, earlier, key
    ))  # fmt: skip
    fitted = Fitted.model_validate_json((folder / FITTED).read_bytes())
    return settle(workspace, _through_the_gate(workspace, fitted, champion, allowed), promote_winners)


def _setting(line: Line, trained: train.Checkpoint, level: float) -> Setting | None:
    """Return what an update has in common with those whose bytes it is compared with; None: it has a budget, or no size to choose."""
    config = trained.lineage.config
    if line.update_budget or line.update_method not in LEVELS:
        return None
    return Setting(
        network=config.sha256,
        precision=line.precision(config.configuration),
        form=line.delta_form(config.configuration),
        level=level,
    )


def usual_level(line: Line) -> float:
    """Return the level of a line's updates without a budget, as far as their bytes do not grow."""
    return METHODS[line.update_method or "lowrank"].level if line.update_level is None else line.update_level


def _through_the_gate(workspace: Workspace, fitted: Fitted, champion: Incumbent, allowed: float) -> Examined:
    """Ask the gate about the sizes in their order, until one fails; return the last that passed, or else the one that failed."""
    answers: dict[int, str] = {}
    found: list[Examined] = []

    def promoted(candidate: Candidate) -> bool:
        made = examine(workspace, candidate.checkpoint, champion, allowed, update=candidate.update)
        answers[candidate.update.bytes] = made.decision.outcome
        found.append(made)
        return made.decision.outcome == "promote"

    passed = in_order(fitted.candidates[:GATED], promoted)
    chosen = found[max(0, len(passed) - 1)]
    return Examined(chosen.files, chosen.evaluation, _with_answers(chosen.decision, answers))


def _with_answers(decision: Decision, answers: dict[int, str]) -> Decision:
    """Note in a decision's curve what the gate said of each size that it saw."""
    if decision.update is None:
        return decision
    curve = [point.model_copy(update={"gate": answers.get(point.bytes)}) for point in decision.update.curve]
    return decision.model_copy(update={"update": decision.update.model_copy(update={"curve": curve})})


def _named(parameters: dict[str, Any]) -> str:
    return f"fit the update of {parameters['trained'].name}"


@task(
    name="fit the update", task_run_name=cast("Any", _named), cache_key_fn=by_key, persist_result=True, result_serializer="json"
)
def fit_update(
    workspace: Workspace, trained: Path, champion: ModelFiles, alpha: float, fixed: int, earlier: list[int], key: str
) -> str:
    """Make the sizes of an update that the gate may judge; return their folder, with `FITTED`.

    Args:
        workspace: where.
        trained: checkpoint of the master.
        champion: what devices have.
        alpha: level of the tests of the share that is kept.
        fixed: bytes that a device fetches besides the weights.
        earlier: bytes of the first updates without a budget at the usual level; empty: this one is the first of its setting.
        key: names the folder.
    """
    folder = workspace.work / "updates" / key
    folder.mkdir(parents=True, exist_ok=True)
    opened = train.load_checkpoint(trained)
    line, subject = workspace.line(opened.lineage.data.line), subject_of(opened.lineage)
    progress.say(f"make the update of {subject} by {line.update_method}")
    dataset = open_dataset(workspace, line, subject.configuration, opened.lineage.data)
    with _bench(line, opened, champion, dataset, alpha, fixed) as bench:
        candidates = bench.within_budget(folder) if line.update_budget else [bench.at_the_usual_level(folder, earlier)]
    fitted = Fitted(candidates=candidates)
    (folder / FITTED).write_text(fitted.model_dump_json(indent=1))
    return str(folder)


@contextmanager
def _bench(
    line: Line, trained: train.Checkpoint, champion: ModelFiles, dataset: Dataset, alpha: float, fixed: int
) -> Iterator[_Bench]:
    with tempfile.TemporaryDirectory() as folder:
        yield _Bench(line, trained, champion, dataset, alpha, fixed, Path(folder))


@dataclass(frozen=True)
class Finished:
    """An update as it is fielded."""

    update: NewWeights
    size: int
    """Encoded bytes."""
    losses: Losses
    polished: int | None
    """Training steps that followed on the rounded update."""


class _Bench:
    """A master and what devices have, of which updates of several levels are made, encoded and tested."""

    def __init__(
        self,
        line: Line,
        trained: train.Checkpoint,
        champion: ModelFiles,
        dataset: Dataset,
        alpha: float,
        fixed: int,
        scratch: Path,
    ) -> None:
        self.line, self.trained, self.champion, self.dataset = line, trained, champion, dataset
        self.alpha, self.fixed, self.scratch = alpha, fixed, scratch
        self.method = line.update_method or "lowrank"
        self.configuration = trained.lineage.config.configuration
        self.stored = line.precision(self.configuration)
        self.fielded = train.load_checkpoint(champion.checkpoint)
        self.publication = Publication.of(trained, self.fielded, self.stored, self.method)
        self.sizes: dict[float, int] = {}
        self.finished: dict[float, Finished] = {}
        self.graph = scratch / "graph.onnx"
        self.graph.write_bytes(graph.build(trained.lineage.config, self.stored).SerializeToString(deterministic=True))

    @cached_property
    def before(self) -> tuple[Losses, Losses]:
        """Losses of the fielded weights and of the master."""
        return losses(self.fielded.network(), self.dataset), losses(self.trained.network(), self.dataset)

    def size(self, level: float) -> int:
        """Encode the weights of a level as they are rounded, and return the bytes."""
        if level not in self.sizes:
            self.sizes[level] = self._encoded(self.publication.approximation.at(level))
            progress.say(f"an update at level {level:.3g} takes {self.sizes[level]:,} bytes, and {self.fixed:,} besides")
        return self.sizes[level]

    def _encoded(self, update: NewWeights) -> int:
        weights, factors, patch = (self.scratch / name for name in ("weights.bin", FACTORS, "delta"))
        weights.write_bytes(export.pack(update.network(), self.stored))
        write_factors(factors, update)
        old = self.champion.bundle
        return files.build(
            old / "weights.bin", weights, patch, self.graph, old / "graph.onnx", factors, self.line.delta_form(self.configuration)
        ).size

    def finish(self, level: float, limit: int | None = None) -> Finished:
        """Make the update of a level as it is fielded: polished where that helps, and keeps the limit.

        Half of the held-out images decide whether polishing helped. A lower loss of training images does not show it: with few images
        and a high learning rate, it is learnt by heart.
        """
        if level not in self.finished:
            rounded = self.publication.approximation.at(level)
            made = Finished(rounded, self.size(level), losses(rounded.network(), self.dataset), None)
            if self.line.update_polish and rounded.claims:
                progress.say(f"polish the update at level {level:.3g}: {self.line.update_polish} steps")
                options = self.line.options(self.line.retraining, self.stored)
                update = polish(self.publication.approximation, rounded, self.dataset, options, steps=self.line.update_polish)
                size = self._encoded(update)
                polished = Finished(update, size, losses(update.network(), self.dataset), self.line.update_polish)
                if (limit is None or size <= limit) and polished.losses.chooses < made.losses.chooses:
                    made = polished
            self.finished[level] = made
        return self.finished[level]

    def kept(self, of: Losses) -> Kept:
        """Test the share of the gain that an update keeps, on the half of the held-out images with which nothing was chosen."""
        before, master = self.before
        return kept(before.proving, master.proving, of.proving, self.alpha)

    def at_the_usual_level(self, folder: Path, earlier: list[int]) -> Candidate:
        """Make the update without a budget, at the usual level or at a coarser one that holds its bytes."""
        usual, (_, coarsest) = usual_level(self.line), LEVELS.get(self.method, (0.0, 0.0))
        level, held = hold(self.size, usual, coarsest, earlier, self.sizes, SPARE if self.line.update_polish else 0.0)
        self.finish(level, held)
        if level > usual:
            progress.say(f"it is made at level {level:.3g} instead of {usual:.3g}, to hold its weights to {held:,} bytes")
        return self.candidate(level, folder, [], held=held)

    def within_budget(self, folder: Path) -> list[Candidate]:
        """Try the sizes in order; return those within the budget that keep enough, or else the one at the budget."""
        limit = self.line.update_budget or 0
        room = money.room(limit, self.fixed)
        finest, coarsest = LEVELS[self.method]
        self.size(coarsest)  # the search needs both ends
        curve: list[Point] = []

        def keeps(size: int) -> bool:
            made = self._point(size)
            if made is None:
                return False
            found = self.kept(self.finish(made.noise).losses)
            passed = passes(found, self.line.update_keep)
            curve.append(made.model_copy(update={"kept": found, "outcome": "passed" if passed else "failed"}))
            progress.say(f"{made.bytes:,} bytes keep {_percent(found)} of the gain")
            if made.bytes > limit:
                del self.finished[made.noise]  # it is not fielded, and takes as much memory as the network
            return passed

        in_order(rooms(room, self.size(finest)), keeps)
        within = [made for made in curve if made.outcome == "passed" and made.bytes <= limit]
        return [
            self.candidate(made.noise, folder, curve, made.kept) for made in within[:GATED] or [self._at_the_budget(curve, room)]
        ]

    def _point(self, size: int) -> Point | None:
        """Find the finest update that takes at most `size` bytes; None: even the coarsest one takes more."""
        finest, coarsest = LEVELS[self.method]
        level = level_for(self.size, size - size // 50, finest, coarsest, self.sizes)  # polishing changes the bytes a little
        level = level_for(self.size, size, finest, coarsest, self.sizes) if level is None or size == self.size(finest) else level
        if level is None:
            return None
        return Point(limit=self.fixed + size, bytes=self.fixed + self.finish(level, size).size, noise=level)

    def _at_the_budget(self, curve: list[Point], room: int) -> Point:
        """Return the point at the budget, which is judged for the record although it does not keep enough."""
        made = self._point(room)
        if made is None:
            raise BudgetError(
                f"even the coarsest update takes more than the {room:,} bytes that the budget of {written(self.line.update_budget or 0)} leaves "
                "for weights; raise update_budget, or change update_method"
            )
        known = next((point for point in curve if point.noise == made.noise), None)
        if known is None:
            curve.append(made)
        return known or made

    def candidate(
        self, level: float, folder: Path, curve: Iterable[Point], found: Kept | None = None, held: int | None = None
    ) -> Candidate:
        """Write the checkpoint of a level, with what is known of it."""
        finished = self.finish(level)
        made = write_published(self.trained, finished.update, folder / f"level-{level:.6g}", finished.polished)
        budget, usual = self.line.update_budget, usual_level(self.line)
        update = Update(
            method=self.method, start="master" if self.trained.lineage.start == "master" else "fielded",
            why_fielded=_why_fielded(self.trained, self.fielded), master=self.trained.weights_sha256, noise=level, polished=finished.polished,
            bytes=self.fixed + finished.size, fixed=self.fixed, setting=_setting(self.line, self.trained, usual), held=held, usual=self.sizes[usual] if held and level > usual else None, budget=budget, keep=self.line.update_keep if budget else None,
            kept=found or self.kept(finished.losses), curve=list(curve),
            unlimited=self.fixed + self.sizes[LEVELS[self.method][0]] if budget else None,
        )  # fmt: skip
        return Candidate(checkpoint=made.folder, update=update)


def _why_fielded(trained: train.Checkpoint, fielded: train.Checkpoint) -> str | None:
    """Say why a training did not start from a master; None: it did."""
    if trained.lineage.start == "master":
        return None
    start = train.start_of(fielded, trained.lineage.data.line)
    return (
        start.says if start.master is None else "training started from the fielded weights, because their master was missing then"
    )


# Students


class Taught(Frozen):
    """The fielded weights of a student, and what they cost."""

    checkpoint: Path
    level: float
    size: int
    """Encoded bytes."""
    held: int | None = None
    """Bytes to which it was held without a budget; None: it is the first of its setting."""
    usual: int | None = None
    """Encoded bytes at the usual level, if it has a coarser one."""

    @classmethod
    def of(cls, checkpoint: Path, update: Update, held: bool) -> Taught:
        """Return a student that was judged, or is champion; it takes no bytes if devices have it already."""
        return cls(checkpoint=checkpoint, level=update.noise, size=0 if held else update.weights)


def student_update(
    workspace: Workspace,
    trained: train.Checkpoint,
    parent: train.Checkpoint,
    full: ModelFiles,
    champion: Incumbent | None,
    beside: int | None,
    known: Taught | None,
    fixed: int,
) -> tuple[Path, Update]:
    """Make the weights of a student that are fielded from its master; encoded bytes alone choose their level.

    A student is not shown to keep a share of a gain, because its teacher's images, not the held-out ones, are what it learns; the gate
    compares it with `full`. With a budget, it takes the room that the rest of the update leaves; if even its coarsest update takes
    more, that one is judged for the record, and refused.

    Args:
        workspace: where.
        trained: the student's master.
        parent: weights from which it was trained: the fielded student's, or those of `full`.
        full: the published `full` that taught it.
        champion: of the variant; None: there is none.
        beside: bytes of other weights in the same update; None: `full` is fetched as a whole, so the budget does not count.
        known: what another variant has of this master; then this one takes it, too, at whatever level. None: none has anything.
        fixed: bytes that a device fetches besides the weights.

    Returns:
        the checkpoint's folder, and how it was made.
    """
    lineage = trained.lineage
    line, subject = workspace.line(lineage.data.line), subject_of(lineage)
    usual = usual_level(line) if line.update_method == "lowrank" else METHODS["lowrank"].level
    # The first student takes more than later ones, and one that another variant has already takes nothing: neither is a measure.
    setting = _setting(line, trained, usual) if parent.lineage.teacher and known is None else None
    others = (subject.model_copy(update={"variant": variant}) for variant in VARIANTS if variant != "full")
    earlier = early(updates(workspace, others), "lowrank", setting) if setting else []
    budget = None if beside is None else line.update_budget
    beside = beside or 0
    limit = budget - fixed - beside if budget else None
    made = known or _fitted(workspace, trained, parent, full, champion, usual, limit, earlier)
    return made.checkpoint, Update(
        method="lowrank", start="master" if lineage.start == "master" else "fielded", of_full=parent.lineage.teacher is None, why_fielded=_why_fielded(trained, parent),
        master=trained.weights_sha256, noise=made.level, bytes=fixed + beside + made.size, fixed=fixed, beside=beside, setting=setting, held=made.held, usual=made.usual,
        budget=budget,
    )  # fmt: skip


def _fitted(
    workspace: Workspace,
    trained: train.Checkpoint,
    parent: train.Checkpoint,
    full: ModelFiles,
    champion: Incumbent | None,
    usual: float,
    limit: int | None,
    earlier: list[int],
) -> Taught:
    """Make the fielded weights of a student, unless that was done before."""
    lineage = trained.lineage
    line, subject = workspace.line(lineage.data.line), subject_of(lineage)
    fielded = champion.files.bundle / "weights.bin" if champion and champion.seal.teacher else None
    form = line.delta_form(subject.configuration)
    key = canonical_sha256([
        trained.weights_sha256, lineage.sha256, parent.weights_sha256, champion.seal.weights if champion and fielded else None, usual, limit, earlier, form,
        line.precision(subject.configuration), train.code_sha256(),
    ])[:32]  # fmt: skip
    folder = Path(renewed(fit_student, workspace.work / "updates" / key / FITTED)(
        workspace, trained.folder, parent.folder, full, fielded, usual, limit, earlier, key
    ))  # fmt: skip
    return Taught.model_validate_json((folder / FITTED).read_bytes())


def _named_student(parameters: dict[str, Any]) -> str:
    return f"fit the student {parameters['trained'].name}"


@task(
    name="fit the student",
    task_run_name=cast("Any", _named_student),
    cache_key_fn=by_key,
    persist_result=True,
    result_serializer="json",
)
def fit_student(
    workspace: Workspace, trained: Path, parent: Path, full: ModelFiles, fielded: Path | None, usual: float, limit: int | None,
    earlier: list[int], key: str,
) -> str:  # fmt: skip
    """Make the weights of a student at the usual level, or at a coarser one that keeps a limit; return their folder, with `FITTED`.

    Args:
        workspace: where.
        trained: checkpoint of the master.
        parent: checkpoint from which it was trained.
        full: the published `full`.
        fielded: exported weights of the student that devices have; None: they have none.
        usual: finest level.
        limit: most bytes of its weights; None: there is no budget.
        earlier: bytes of the first students without a budget at the usual level; empty: this one is the first of its setting.
        key: names the folder.
    """
    folder = workspace.work / "updates" / key
    folder.mkdir(parents=True, exist_ok=True)
    opened = train.load_checkpoint(trained)
    line, subject = workspace.line(opened.lineage.data.line), subject_of(opened.lineage)
    progress.say(f"make the update of {subject} by lowrank")
    stored, teacher = line.precision(subject.configuration), train.load_checkpoint(full.checkpoint)
    publication = Publication.of(opened, train.load_checkpoint(parent), stored, full=teacher)
    with tempfile.TemporaryDirectory() as scratch:
        weights, factors, drawn = (Path(scratch) / name for name in ("weights.bin", FACTORS, "graph.onnx"))
        drawn.write_bytes(graph.build(opened.lineage.config, stored).SerializeToString(deterministic=True))

        def size(level: float) -> int:
            update = publication.approximation.at(level)
            weights.write_bytes(export.pack(update.network(), stored))
            write_factors(factors, update)
            form = line.delta_form(subject.configuration)
            found = bundle.student_bytes(fielded, full.bundle / "weights.bin", weights, drawn, factors, form)
            progress.say(f"the student at level {level:.3g} takes {found:,} bytes")
            return found

        known = {usual: size(usual)}
        (_, coarsest), held = LEVELS["lowrank"], None
        if limit is None:
            level, held = hold(size, usual, coarsest, earlier, known)
        else:
            level = held_level(size, usual, coarsest, limit, known)
        made = Taught(
            checkpoint=publication.write(level, folder / "made").folder, level=level, size=known[level], held=held,
            usual=known[usual] if held and level > usual else None,
        )  # fmt: skip
    (folder / FITTED).write_text(made.model_dump_json(indent=1))
    return str(folder)


def _percent(found: Kept) -> str:
    return (
        f"{found.share:.1%} (at least {found.low:.1%})" if found.share is not None and found.low is not None else "no known share"
    )
