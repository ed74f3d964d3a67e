"""The flow `retrain`: pull a data revision, then train, export, evaluate, gate, register and promote each model of a line.

This module has the order of the steps. `flows.steps` has the steps themselves, and `flows.candidate` has a challenger's way from
checkpoint to champion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from prefect import Flow, State, flow, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import deployment
from prefect.task_runners import ThreadPoolTaskRunner

from flows import alerts, budget, lifeline, lost, overrides, pages, progress, running, telling, triggers
from flows.candidate import Incumbent, Judged, judge
from flows.clone import is_clone
from flows.errors import VariantError
from flows.fitting import Taught, judge_update, student_update
from flows.settings import TEACHING_MS, Line
from flows.steps import Lesson, ModelFiles, champion_files, fetch_master, pull_data, renewed, source_of, subject_of, train_model
from flows.training_log import retraining_key
from flows.workspace import Workspace
from model import students, train, versions
from model.config import ConfigurationName, ModelConfig, PrecisionName, VariantName, canonical_sha256, check_same_pictures
from model.publish import publish_first
from model.scorecard import DataVersion, Lineage, Sha256
from ota.release import fielded
from registry import runs
from registry.catalog import Subject
from registry.champions import champion_of, reconcile, seals, verdict
from registry.curve import Update
from registry.lineage import file_sha256, shortened
from registry.runs import Retrained
from registry.selection import Decision, level

ENDS = {"Running": "begins", "Completed": "is done"}


def stamp() -> str:
    """Return the present time, for a line of a log."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _tell(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - Prefect fixes the names
    """Write one line for whoever watches `ferry serve`; if a run was started by hand, its command reports how it ends."""
    if flow_run.deployment_id:
        how = ENDS.get(str(state.name)) or f"ends as {state.name}: {state.message}"
        telling.tell(f"{stamp()} {flow_run.name} {how}", limit=2000)


def _tell_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Say that a run failed, on the terminal and to whoever gets alerts."""
    _tell(flow, flow_run, state)
    if flow_run.deployment_id:
        alerts.failed(flow_run.parameters, state.message or "without a message")


@flow(
    name="retrain", flow_run_name="retrain {line} on data {rev:.12}", validate_parameters=True, persist_result=False,
    description="Retrain the models of a line on a data revision, judge them, and promote those that pass the gate.",
    on_running=[_tell], on_completion=[_tell], on_failure=[_tell_failure], on_crashed=[_tell_failure], on_cancellation=[_tell],
)  # fmt: skip
def retrain(
    root: str,
    line: str,
    rev: str = "HEAD",
    promote_winners: bool = True,
    seed: int | None = None,
    steps: int | None = None,
    update_budget: int | str | None = None,
) -> list[dict[str, Any]]:
    """Retrain every model of a line on a data revision, and promote what the gate lets through.

    Args:
        root: the workspace.
        line: whose models.
        rev: Git revision of the data.
        promote_winners: False registers only; a person promotes with `ferry promote`.
        seed: of this run's trainings; None: as ferry.toml says.
        steps: of this run's trainings; None: as ferry.toml says.
        update_budget: most that a device may fetch for this update, in bytes or such as 64KiB; None: as ferry.toml says.

    Returns:
        one `Retrained`, as plain data, for each configuration and variant. Its outcome is the gate's, or one of these.
        "unchanged": the champion is up to date. "no source": a variant of a `full` that has no version that passed the gate; the
        version is 0. "pending": it passed the gate and waits for a person. "refused": it passed the gate, and a person refused it.

    Raises:
        VariantError: some variants failed; the others are done and registered, and stay so if the call is repeated. If the line
            has only one model, its own error is raised instead.
    """
    workspace = Workspace(Path(root))
    overrides.apply(workspace, line, overrides.parse(seed, steps, update_budget))
    settings = workspace.line(line)
    lifeline.end_with_ferry()
    with lost.held(workspace, str(runtime.flow_run.id)), pages.progress(), running.noted(workspace.work, "retraining", line):
        # Training starts from the ledger's champion, and challengers are judged against it.
        reconcile(workspace, workspace.subjects([line]), workspace.needs_approval)
        data = versions.resolve(workspace.root, settings.data, line, rev)
        pages.name_run(f"retrain {line} on data {data.rev[:12]}")
        for said in budget.check(workspace, line):
            progress.say(said)
        pull_data(workspace, data)
        with runs.ending(workspace.catalog, data, retraining_key(workspace, data)) as tell:
            ladders = _retrain_configurations(workspace, data, promote_winners)
            rows = [row.model_dump() for ladder in ladders for row in ladder.rows]
            create_table_artifact(
                table=rows,
                key=pages.key_of(f"results {line}"),
                description=f"What came of data revision {data.rev[:12]} of {line}",
            )
            _report(rows)
            _raise_failures(rows, [failure for ladder in ladders for failure in ladder.failures])
            tell(rows)
    alerts.tell(workspace, f"retraining {line}", "well", f"the retraining of {line} at {data.rev[:12]} is done", well=True)
    alerts.survey(workspace)
    return rows


def _report(rows: list[dict[str, Any]]) -> None:
    """Say what came of each model; whoever watches `ferry serve` sees it, too."""
    for row in rows:
        told = f"{row['subject']} version {row['version']}: {row['outcome']}, {shortened(row['reason'], 300)}"
        if row["outcome"] in ("unchanged", "no source", "failed"):  # the others were told when they were judged
            progress.say(told)
        if deployment.get_id():
            telling.tell(f"{stamp()} {told}", limit=2000)


@flow(
    name="look for data", flow_run_name="look for new data", persist_result=False,
    description="Ask for the retrainings that new data revisions and events make.",
)  # fmt: skip
def look_for_data(root: str, lines: list[str]) -> int:
    """Ask for the retrainings that new data revisions and events make; for a schedule where no `ferry serve` looks for them.

    Returns:
        number of runs for the data and events that are there now, including runs that were made before.
    """
    return len(triggers.look(Workspace(Path(root)), lines))


@flow(
    name="register checkpoint", flow_run_name="register a checkpoint", persist_result=False,
    description="Judge and register a checkpoint that was trained elsewhere; it is not promoted.",
)  # fmt: skip
def register_checkpoint(root: str, checkpoint: str) -> dict[str, Any]:
    """Evaluate, gate and register a checkpoint that was trained elsewhere; it is not promoted.

    Returns:
        a `Retrained`, as plain data.
    """
    workspace = Workspace(Path(root))
    with workspace.locked("retraining"):
        lineage = train.load_checkpoint(Path(checkpoint)).lineage
        pull_data(workspace, lineage.data)
        subject = subject_of(lineage)
        incumbent = incumbent_of(workspace, subject)
        whole = champion_of(workspace, subject.model_copy(update={"variant": "full"})) if lineage.variant != "full" else None
        full = champion_files(workspace, whole).bundle if whole else None
        with runs.ending(workspace.catalog, lineage.data, retraining_key(workspace, lineage.data)) as tell:
            judged = judge(workspace, Path(checkpoint), incumbent, None, promote_winners=False, full=full)
            row = judged.row.model_dump()
            tell([row])
        return row


Way = Literal["table", "carried over", "student"]


@dataclass(frozen=True)
class _Student:
    """A student that variants of this run may draw with."""

    files: ModelFiles
    update: Update


@dataclass
class _Ladder:
    """Results of the variants of one configuration, and what `full` passes on to the others."""

    candidates: int
    """Number of models that the whole run may decide on."""
    rows: list[Retrained] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    full: ModelFiles | None = None
    """The `full` that the other variants come from: the new version if the gate let it through, otherwise the champion.

    No variant comes from a version that somebody went back from, or from a champion of another network configuration.
    """
    weights: int | None = None
    """Bytes of the update that made the weights of that `full`; None: it is a first version, or an older ferry did not count them."""
    students: dict[Sha256, _Student] = field(default_factory=dict)
    """The students of that `full`, by the hash of their master; variants whose students have the same master share one."""
    last: Decision | None = None
    """The gate's last decision in this configuration; None: there is none yet."""
    fixed: int | None = None
    """Bytes that a device fetches besides weights; None: nothing has asked yet."""

    def besides(self, workspace: Workspace, subject: Subject) -> int:
        """Return the bytes that a device fetches besides weights, as they were before this run promoted anything.

        All variants go out in one update, so all count the same bytes, from the champions that devices have.
        """
        if self.fixed is None:
            self.fixed = budget.fixed_bytes(workspace, subject.line, subject.configuration)
        return self.fixed

    def allowed(self, line: Line, attempts: int) -> float:
        """Return the chance of a wrong promotion that one of a model's attempts may take; each attempt may pass by luck."""
        return level(line.gate.alpha, self.candidates * attempts, self.last)


def _retrain_configurations(workspace: Workspace, data: DataVersion, promote_winners: bool) -> list[_Ladder]:
    """Retrain all configurations of a line, one after another or in `parallel` threads."""
    line = workspace.line(data.line)
    jobs: list[dict[str, Any]] = [
        {
            "workspace": workspace, "data": data, "configuration": configuration, "variants": variants,
            "candidates": len(line.combinations()), "promote_winners": promote_winners,
        }
        for configuration, variants in line.ladders().items()
    ]  # fmt: skip
    if min(workspace.settings.parallel, len(jobs)) == 1:
        return [retrain_ladder.fn(**job) for job in jobs]
    runner: ThreadPoolTaskRunner[_Ladder] = ThreadPoolTaskRunner(max_workers=workspace.settings.parallel)
    with runner:
        futures = [runner.submit(retrain_ladder, job) for job in jobs]
        return [future.result() for future in futures]


def _raise_failures(rows: list[dict[str, Any]], failures: list[Exception]) -> None:
    if failures and len(rows) == 1:
        raise failures[0]
    if failures:
        failed = ", ".join(row["subject"] for row in rows if row["outcome"] == "failed")
        raise VariantError(f"{failed} failed, the others are done; the first error: {failures[0]}", rows) from failures[0]


@task(name="ladder", task_run_name="retrain {data.line}/{configuration}", cache_policy=NO_CACHE, persist_result=False)
def retrain_ladder(
    workspace: Workspace,
    data: DataVersion,
    configuration: ConfigurationName,
    variants: list[VariantName],
    candidates: int,
    promote_winners: bool,
    adopted: Path | None = None,
) -> _Ladder:
    """Make the variants of a configuration one after another, `full` first; an error in one does not stop the others.

    `adopted` is a checkpoint of weights that were trained elsewhere: it is judged instead of a training of `full`.
    """
    ladder = _Ladder(candidates)
    for variant in variants:
        subject = Subject(line=data.line, configuration=configuration, variant=variant)
        try:
            if variant == "full" and adopted:
                row = _adopt_full(workspace, data, subject, ladder, promote_winners, adopted)
            else:
                row = (_retrain_full if variant == "full" else _derive)(workspace, data, subject, ladder, promote_winners)
            ladder.rows.append(row)
        except Exception as error:  # noqa: BLE001 - whatever befell one, the others are worth their hours
            ladder.failures.append(error)
            ladder.rows.append(_row(subject, data, 0, "failed", str(error).strip() or type(error).__name__))
    return ladder


def _retrain_full(workspace: Workspace, data: DataVersion, subject: Subject, ladder: _Ladder, promote_winners: bool) -> Retrained:
    line, parent = workspace.line(data.line), None
    config = line.config(subject.configuration)
    champion, before = _present(workspace, subject, config)
    if champion and before:
        if before.lineage.config == config:
            ladder.full, ladder.weights = champion.files, _weights_of_update(workspace, subject, champion)
        if any(is_current(before.lineage, settings, data) for settings in overrides.current(workspace, data.line)):
            if _is_exported_so(workspace, champion, line):
                # If a run was interrupted after this promotion, the next run must leave the other models the same level.
                ladder.last = verdict(workspace, subject, champion.seal.version)
                why = "the champion was trained on these data with these settings"
                return _row(subject, data, champion.seal.version, "unchanged", why)
            # Only how it is stored or drawn has changed: no training, but the gate has to see it.
            return _noted(ladder, judge(workspace, champion.files.checkpoint, champion, ladder.allowed(line, 1), promote_winners))
        if before.lineage.config.tier == config.tier:  # weights of another tier have other shapes
            parent = champion.files.checkpoint
            if line.update_method:
                fetch_master(workspace, champion.seal, parent)
                progress.say(train.start_of(before, data.line).says)
    lesson = Lesson(data=data, configuration=subject.configuration, variant="full", parent=parent)
    checkpoint, allowed = _trained(workspace, lesson, line), ladder.allowed(line, 1)
    if line.update_method and champion and parent:
        return _noted(
            ladder, judge_update(workspace, checkpoint, champion, allowed, promote_winners, ladder.besides(workspace, subject))
        )
    if line.update_method:
        checkpoint = _first(workspace, checkpoint, line)
    return _noted(ladder, judge(workspace, checkpoint, champion, allowed, promote_winners))


def _first(workspace: Workspace, trained: Path, line: Line) -> Path:
    """Make the weights that are fielded from the master of a first version, of which devices have nothing."""
    opened = train.load_checkpoint(trained)
    stored = line.precision(opened.lineage.config.configuration)
    name = canonical_sha256([opened.weights_sha256, opened.lineage.sha256, stored])[:32]
    return publish_first(opened, stored, workspace.work / "runs" / name).folder


def _adopt_full(
    workspace: Workspace, data: DataVersion, subject: Subject, ladder: _Ladder, promote_winners: bool, adopted: Path
) -> Retrained:
    line = workspace.line(data.line)
    config = line.config(subject.configuration)
    champion, before = _present(workspace, subject, config)
    if champion and before:
        if before.lineage.config == config:
            ladder.full, ladder.weights = champion.files, _weights_of_update(workspace, subject, champion)
        if (before.weights_sha256, champion.seal.data_md5) == (train.load_checkpoint(adopted).weights_sha256, data.md5):
            ladder.last = verdict(workspace, subject, champion.seal.version)
            return _row(subject, data, champion.seal.version, "unchanged", "the champion has these weights")
    return _noted(ladder, judge(workspace, adopted, champion, ladder.allowed(line, 1), promote_winners))


def _derive(workspace: Workspace, data: DataVersion, subject: Subject, ladder: _Ladder, promote_winners: bool) -> Retrained:
    """Make a variant of the ladder's `full` from the cheapest source that the gate lets through."""
    line = workspace.line(data.line)
    if ladder.full is None:
        return _row(subject, data, 0, "no source", "its weights come from full, of which no version has passed the gate")
    champion, before = _present(workspace, subject, line.config(subject.configuration))
    full = train.load_checkpoint(ladder.full.checkpoint)
    if champion and before and comes_from(before, full, overrides.current(workspace, data.line)):
        if before.lineage.teacher and (made := _update_of(workspace, subject, champion)):
            ladder.students[made.master] = _Student(champion.files, made)
        if _is_exported_so(workspace, champion, line):
            ladder.last = verdict(workspace, subject, champion.seal.version)
            why = "the champion comes from the present full with these settings"
            return _row(subject, data, champion.seal.version, "unchanged", why)
        if before.lineage.teacher:  # only how it is stored or drawn has changed: no training, but the gate has to see it
            allowed, own = ladder.allowed(line, 1), champion.files.checkpoint
            return _passed(ladder, judge(workspace, own, champion, allowed, promote_winners, ladder.full.bundle))
    ways = _ways(line, subject.variant, full, before)
    if _students_have_masters(line):
        for incumbent in (champion, incumbent_of(workspace, subject.model_copy(update={"variant": "full"}))):
            if incumbent:
                fetch_master(workspace, incumbent.seal, incumbent.files.checkpoint)
    for way, parent in ways:
        checkpoint, update = _made(workspace, data, subject, ladder, way, parent, champion)
        allowed = ladder.allowed(line, len(ways))
        row = _passed(ladder, judge(workspace, checkpoint, champion, allowed, promote_winners, ladder.full.bundle, update))
        if row.outcome in ("promote", "pending", "refused"):  # the gate let it through
            break
    return row


def _present(
    workspace: Workspace, subject: Subject, config: ModelConfig
) -> tuple[Incumbent, train.Checkpoint] | tuple[None, None]:
    """Return a subject's champion and its checkpoint, whose pictures have the format that is asked for; None: there is no champion."""
    champion = incumbent_of(workspace, subject)
    if champion is None:
        return None, None
    before = train.load_checkpoint(champion.files.checkpoint)
    check_same_pictures("the champion", (before.lineage.config.image_size, before.lineage.config.channels), config)
    return champion, before


def _ways(
    line: Line, variant: VariantName, full: train.Checkpoint, before: train.Checkpoint | None
) -> list[tuple[Way, train.Checkpoint]]:
    """List the ways to make a variant, and the weights from which each starts, in the order in which they are tried.

    The cheapest update comes first: the layers of the fielded student as they are, over the new `full`. Then a student is trained
    from the fielded one, and last from `full`.
    """
    ways: list[tuple[Way, train.Checkpoint]] = []
    for source in line.sources(variant):
        if source == "student" and before and before.lineage.teacher and before.lineage.config == full.lineage.config:
            taught = {name: getattr(before.lineage, name) for name in _taught(line)}
            if before.lineage.thin and taught == _taught(line):  # what was taught otherwise has to be taught anew
                ways.append(("carried over", before))
            ways.append(("student", before))
        ways.append(("student" if source == "student" else "table", full))
    return ways


def _made(
    workspace: Workspace,
    data: DataVersion,
    subject: Subject,
    ladder: _Ladder,
    way: Way,
    parent: train.Checkpoint,
    champion: Incumbent | None,
) -> tuple[Path, Update | None]:
    """Make a variant's checkpoint: the weights of `full` as they are, or those of a student, which serves several variants.

    Returns:
        its folder, and how the update of a student that was trained was made; None: nothing was trained, or it was rounded.
    """
    if ladder.full is None:
        raise VariantError(f"{subject} has no full to come from; run `ferry retrain {data.line}` again", [])
    line, update = workspace.line(data.line), None
    full = made = train.load_checkpoint(ladder.full.checkpoint)
    if way != "student" and full.lineage.data != data:
        pull_data(workspace, full.lineage.data)  # `full` was not replaced, so its variants are judged on its own revision
    if way == "carried over":
        name = canonical_sha256([parent.weights_sha256, parent.lineage.sha256, full.weights_sha256, way])[:32]
        made = students.carried_over(parent, full, workspace.work / "runs" / name)
        if made.lineage.variant == subject.variant:
            return made.folder, None
    elif way == "student":
        lesson = Lesson(
            data=data, configuration=subject.configuration, variant="turbo", parent=parent.folder, teacher=full.folder
        )
        made = train.load_checkpoint(_trained(workspace, lesson, line))
        if _students_have_masters(line):
            held = _held(workspace, subject)
            # A second update of this master would be fetched beside the first.
            student = ladder.students.get(made.weights_sha256)
            known = Taught.of(student.files.checkpoint, student.update, _is_in(held, student.files)) if student else None
            beside, fixed = _beside(ladder, held, made.weights_sha256), ladder.besides(workspace, subject)
            folder, update = student_update(workspace, made, parent, ladder.full, champion, beside, known, fixed)
            made = train.load_checkpoint(folder)
        if made.lineage.variant == subject.variant:
            return made.folder, update
    name = canonical_sha256([made.weights_sha256, made.lineage.sha256, subject.variant])[:32]
    return students.as_variant(made, subject.variant, workspace.work / "runs" / name).folder, update


def _students_have_masters(line: Line) -> bool:
    return line.options(line.distillation, "float32").method is not None


def _held(workspace: Workspace, subject: Subject) -> set[Sha256]:
    """Return the hashes of the weights that devices have already: those in the release that they are meant to run, in every class with one."""
    if is_clone(workspace.root):
        return set()
    classes = [name for name, c in workspace.line(subject.line).classes.items() if c.configuration == subject.configuration]
    last = [release for name in classes if (release := fielded.meant_to_run(workspace, subject.line, name))]
    manifests = [workspace.repository.manifest(release) for release in last]
    held = [{made.weights_sha256(variant) for variant in made.variants} for made in manifests]
    return set.intersection(*held) if held else set()


def _is_in(held: set[Sha256], files: ModelFiles) -> bool:
    return file_sha256(files.bundle / "weights.bin") in held


def _beside(ladder: _Ladder, held: set[Sha256], master: Sha256) -> int | None:
    """Return the bytes of the other weights of an update that brings a student: of `full` and of other students.

    Args:
        ladder: with the present `full` and the students so far.
        held: hashes of the weights that devices have already.
        master: of the student.

    Returns:
        bytes; None: the release will bring `full` as a whole, because it is a first version, so that no budget counts.
    """
    known = ladder.full is not None and _is_in(held, ladder.full)
    if not known and ladder.weights is None:
        return None
    others = [s.update.weights for its, s in ladder.students.items() if its != master and not _is_in(held, s.files)]
    return (0 if known or ladder.weights is None else ladder.weights) + sum(others)


def _update_of(workspace: Workspace, subject: Subject, champion: Incumbent) -> Update | None:
    """Return how a champion's weights were updated, also where later versions only store or draw them otherwise; None: no method did."""
    same = (seal.version for seal in reversed(seals(workspace, subject)) if seal.checkpoint == champion.seal.checkpoint)
    return next((made.update for number in same if (made := verdict(workspace, subject, number)) and made.update), None)


def _weights_of_update(workspace: Workspace, subject: Subject, champion: Incumbent) -> int | None:
    """Return the bytes of the update that made a champion's weights; None: it is a first version, or its decision has no bytes."""
    update, made = _update_of(workspace, subject, champion), verdict(workspace, subject, champion.seal.version)
    return _more(update.weights if update else None, _weights_in(made) if made else None)


def _weights_in(decision: Decision) -> int | None:
    """Return the bytes of the weights of a judged update; those of weights that no method made, such as adopted ones, are estimated."""
    return decision.update.weights if decision.update else decision.update_bytes


def _more(one: int | None, other: int | None) -> int | None:
    return max((size for size in (one, other) if size is not None), default=None)


def _trained(workspace: Workspace, lesson: Lesson, line: Line) -> Path:
    """Train, unless that was done before; return the checkpoint's folder."""
    key = _training_key(lesson, line)
    return Path(renewed(train_model, workspace.work / "runs" / key / train.LINEAGE)(workspace, lesson, key))


def _noted(ladder: _Ladder, judged: Judged) -> Retrained:
    """Keep the gate's decision on `full`, and the model if the other variants may come from it; return the row."""
    ladder.last = judged.decision
    if judged.fit:
        # Where the champion was only exported anew, devices may miss its own update, too.
        earlier = ladder.weights if ladder.full and ladder.full.checkpoint == judged.files.checkpoint else None
        ladder.full, ladder.weights = judged.files, _more(_weights_in(judged.decision), earlier)
    return judged.row


def _passed(ladder: _Ladder, judged: Judged) -> Retrained:
    """Keep the gate's decision on a variant; return the row."""
    ladder.last = judged.decision
    if judged.fit and judged.decision.update:
        ladder.students[judged.decision.update.master] = _Student(judged.files, judged.decision.update)
    return judged.row


def _row(subject: Subject, data: DataVersion, version: int, outcome: str, reason: str) -> Retrained:
    """Make the row of a subject for which nothing was judged, with the reason."""
    return Retrained(
        subject=str(subject), data_rev=data.rev, version=version, outcome=outcome, reason=reason, n=0, promoted=False
    )


def incumbent_of(workspace: Workspace, subject: Subject) -> Incumbent | None:
    """Find a subject's champion, with its files."""
    champion = champion_of(workspace, subject)
    return Incumbent(champion, champion_files(workspace, champion)) if champion else None


def _weights_of(checkpoint: Path | None) -> Sha256 | None:
    return train.load_checkpoint(checkpoint).weights_sha256 if checkpoint else None


def _training_key(lesson: Lesson, line: Line) -> str:
    """Hash all that a training depends on."""
    options = line.options(lesson.settings(line), line.precision(lesson.configuration))
    return canonical_sha256([
        lesson.data.line, lesson.data.md5, _start(lesson) if options.method else None, line.config(lesson.configuration).sha256, lesson.variant, options.sha256, train.code_sha256(),
        _weights_of(lesson.parent), _weights_of(lesson.teacher), _taught(line) if lesson.teacher else None,
    ])[:32]  # fmt: skip


def _start(lesson: Lesson) -> Sha256 | None:
    """Return the hash of the master that a training starts from; None: there is none, or it cannot be used."""
    return train.start_of(train.load_checkpoint(lesson.parent), lesson.data.line).master if lesson.parent else None


def _taught(line: Line) -> dict[str, Any]:
    """Return what a student's lineage says of its lessons."""
    way = line.distillation
    return {"guidance": line.sampler.guidance, "trajectories": way.trajectories, "thin": way.thin}


def is_current(lineage: Lineage, line: Line, data: DataVersion) -> bool:
    """Check whether a `full` was trained on these data, by this code, with these settings: then there is nothing to do."""
    # A change of the stored precision alone needs no training.
    options = {line.options(way, stored).sha256 for way in (line.training, line.retraining) for stored in get_args(PrecisionName)}
    return (
        lineage.data.md5 == data.md5
        and lineage.code == train.code_sha256()
        and lineage.config == line.config(lineage.config.configuration)
        and lineage.training_sha256 in options
    )


def comes_from(variant: train.Checkpoint, full: train.Checkpoint, settings: list[Line]) -> bool:
    """Check whether a variant comes from this `full` in a way that the settings want: then there is nothing to make."""
    lineage, source = variant.lineage, source_of(variant.lineage)
    if source == "table":
        return variant.weights_sha256 == full.weights_sha256 and any(source in line.sources(lineage.variant) for line in settings)
    return lineage.teacher == full.weights_sha256 and any(
        source in line.sources(lineage.variant)
        and lineage.training_sha256 in _lessons(line)
        and {name: getattr(lineage, name) for name in _taught(line)} == _taught(line)
        for line in settings
    )


def _lessons(line: Line) -> set[Sha256]:
    """Return the hashes of the options of distillations; a student of an older ferry has no master, and need not be taught again."""
    stored = get_args(PrecisionName)
    return {options.sha256 for p in stored for options in (line.options(line.distillation, p), line.distillation.options(p))}


def _is_exported_so(workspace: Workspace, champion: Incumbent, line: Line) -> bool:
    """Check whether a champion was exported with the sampler, the precision and the latency budget of the settings.

    A variant that a class begins or ceases to run is the same model as before. Its champion, which was a teacher until then, only has
    to keep the budgets of the class; a release puts them into its reference.
    """
    card = workspace.catalog.card(champion.seal)
    source = source_of(train.load_checkpoint(champion.files.checkpoint).lineage)
    if (card.sampler, card.precision) != (line.sampler_of(card.variant, source), line.precision(card.configuration)):
        return False
    wanted, memory = (budget(card.configuration, card.variant) for budget in (line.latency_ms, line.memory_mib))
    latency = json.loads((champion.files.bundle / "reference.json").read_bytes())["latency_ms"]
    if latency == TEACHING_MS:
        spent = card.cost.peak_mib - card.cost.bare_mib
        return card.cost.milliseconds <= (wanted or TEACHING_MS) and (memory is None or spent <= memory)
    return wanted in (latency, TEACHING_MS)
