"""The steps of a retraining as Prefect tasks: pull, train, export, evaluate, register.

Every step is a function that works without Prefect (`step.fn(...)`). Its key is the content that it depends on, so the same data,
code and settings need no work, and a killed run resumes at the step that was interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff

from flows import progress, training_log
from flows.settings import Line, Training
from flows.workspace import Workspace
from model import export, features, students, train, versions
from model.config import ConfigurationName, SourceName, VariantName, canonical_sha256
from model.data import Dataset, prepare
from model.drawing import Drawer, sampler_of
from model.errors import CheckpointError
from model.hardware import Hardware
from model.score import Contest, pictures, score
from model.scorecard import DataVersion, Frozen, Lineage, Sampler, Scorecard
from registry.catalog import Subject
from registry.champions import judged
from registry.errors import SealError
from registry.registration import card_text, register
from registry.runs import open_retraining, points
from registry.seal import SCORECARD, Part, Seal, files_of, sealed_bytes
from registry.selection import Decision

RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
}  # of steps that do I/O
CARD, SAMPLES, REAL = "scorecard.json", "samples.png", "real.png"


class ModelFiles(Frozen):
    """Paths of a model's files on this machine."""

    checkpoint: Path
    bundle: Path
    """Folder of what was exported from the checkpoint."""


class Lesson(Frozen):
    """What is trained, on which data, and from which weights."""

    data: DataVersion
    configuration: ConfigurationName
    variant: VariantName
    parent: Path | None
    """Checkpoint that training starts from; None: from noise."""
    teacher: Path | None = None
    """Checkpoint of `full` that teaches a student; None: it is no student."""

    @property
    def subject(self) -> Subject:
        """Subject of which the checkpoint will be a version."""
        return Subject(line=self.data.line, configuration=self.configuration, variant=self.variant)

    def settings(self, line: Line) -> Training:
        """Choose the settings of the training: from noise, from a parent, or of a student."""
        if self.teacher:
            return line.distillation
        return line.retraining if self.parent else line.training


class Rivals(Frozen):
    """Models that a challenger is compared with; None: there is no such model."""

    champion: ModelFiles | None
    anchor: Path | None
    """Bundle of the best model ever, where it is not the champion."""
    full: Path | None
    """Bundle of the `full` that a variant is compared with."""


def by_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Cache by the content that a step depends on, not by the names of files."""
    return f"{context.task.name}:{parameters['workspace'].root}:{parameters['key']}"  # results are paths below the root


def renewed(step: Any, result: Path) -> Any:
    """Run a step again, although Prefect remembers its result, when the files of that result are gone."""
    return step if result.is_file() else step.with_options(refresh_cache=True)


def _subject_at(checkpoint: Path) -> Subject:
    return subject_of(Lineage.model_validate_json((checkpoint / train.LINEAGE).read_bytes()))


def _exporting(parameters: dict[str, Any]) -> str:
    return f"export {_subject_at(parameters['checkpoint'])}"


def _evaluating(parameters: dict[str, Any]) -> str:
    return f"evaluate {_subject_at(parameters['model'].checkpoint)}"


def _registering(parameters: dict[str, Any]) -> str:
    return f"register {_subject_at(parameters['model'].checkpoint)}"


@task(name="pull data", task_run_name="pull data {data.rev:.12} of {data.line}", cache_policy=NO_CACHE, **RETRIES)
def pull_data(workspace: Workspace, data: DataVersion) -> str:
    """Deliver and verify a data revision, and return its folder."""
    progress.say(f"pull data revision {data.rev[:12]} of {data.line}: {data.files} files")
    with workspace.locked("data"):
        return str(versions.pull(workspace.root, data, workspace.work / "data"))


@task(name="train", task_run_name="train {lesson.subject}", cache_key_fn=by_key, persist_result=True, result_serializer="json")
def train_model(workspace: Workspace, lesson: Lesson, key: str) -> str:
    """Train a network or a student, or resume an interrupted training; return the checkpoint's folder."""
    line = workspace.line(lesson.data.line)
    settings = lesson.settings(line)
    teacher = train.load_checkpoint(lesson.teacher) if lesson.teacher else None
    dataset = open_dataset(workspace, line, lesson.configuration, lesson.data)
    objective = _trajectories(workspace, lesson, teacher, dataset) if teacher else None
    begin = "the weights of full" if teacher and lesson.parent == lesson.teacher else "its parent" if lesson.parent else "noise"
    progress.say(f"train {lesson.subject}: {settings.steps} steps from {begin}")
    with training_log.watching(workspace, lesson.subject, key, settings.steps, lesson.data) as watcher:
        checkpoint = train.train(
            line.config(lesson.configuration),
            dataset,
            lesson.data,
            line.options(settings, line.precision(lesson.configuration)),
            workspace.work / "runs" / key,
            variant=lesson.variant,
            parent=train.load_checkpoint(lesson.parent) if lesson.parent else None,
            teacher=teacher,
            objective=objective,
            watcher=watcher,
        )
    return str(checkpoint.folder)


def _trajectories(workspace: Workspace, lesson: Lesson, teacher: train.Checkpoint, dataset: Dataset) -> students.Trajectories:
    """Draw the trajectories that a student learns from, unless they are there from another attempt."""
    line = workspace.line(lesson.data.line)
    way, drawn = line.distillation, f"draw trajectories of full for {lesson.subject}"
    identity = canonical_sha256([
        teacher.weights_sha256, lesson.data.md5, line.sampler.model_dump(), way.seed, way.trajectories, train.code_sha256(),
    ])[:32]  # fmt: skip
    progress.say(f"{drawn}: {way.trajectories}")
    return students.Trajectories.of(
        teacher.network().to(Hardware.here().device), dataset, line.sampler, way.seed, count=way.trajectories, thin=way.thin,
        kept=workspace.work / "trajectories" / f"{identity}.safetensors", identity=identity,
        on_drawn=lambda done: progress.advance(drawn, done, way.trajectories),
    )  # fmt: skip


@task(name="export", task_run_name=cast("Any", _exporting), cache_key_fn=by_key, persist_result=True, result_serializer="json")
def export_model(workspace: Workspace, checkpoint: Path, key: str) -> str:
    """Write and check the files that devices run, and return their folder."""
    opened = train.load_checkpoint(checkpoint)
    data, configuration, variant = opened.lineage.data, opened.lineage.config.configuration, opened.lineage.variant
    line = workspace.line(data.line)
    sampler = line.sampler_of(variant, source_of(opened.lineage))
    captions = sorted(set(open_dataset(workspace, line, configuration, data).captions))
    out = workspace.work / "exports" / key
    progress.say(
        f"export {subject_of(opened.lineage)} as ONNX, stored as {line.precision(configuration)}, and compare it with torch"
    )
    export.export(opened, line.precision(configuration), sampler, captions, line.latency_ms(configuration, variant), out)
    return str(out)


@task(name="evaluate", task_run_name=cast("Any", _evaluating), cache_key_fn=by_key, persist_result=True, result_serializer="json")
def evaluate_model(workspace: Workspace, model: ModelFiles, rivals: Rivals, key: str) -> str:
    """Draw images and score them beside those of the rivals; return the folder with the scorecard and the pictures."""
    opened = train.load_checkpoint(model.checkpoint)
    lineage, configuration = opened.lineage, opened.lineage.config.configuration
    line = workspace.line(lineage.data.line)
    dataset = open_dataset(workspace, line, configuration, lineage.data)
    frozen = workspace.feature_spaces(lineage.data.line)
    if rivals.champion and not frozen.is_file():  # new spaces would differ, so past figures could not be compared
        raise CheckpointError(f"{frozen} is missing; restore it from a backup, because past figures depend on it")
    datasets: dict[Literal["new", "old"], Dataset] = {"new": dataset}
    if rivals.champion:
        old = train.load_checkpoint(rivals.champion.checkpoint).lineage.data
        folder = pull_data.fn(workspace, old)
        datasets["old"] = prepare(Path(folder), lineage.config, workspace.work / "cache", old.md5)
    champion, anchor = rivals.champion, rivals.anchor
    subject = subject_of(lineage)
    if not frozen.is_file():
        progress.say(f"fit the feature spaces of {lineage.data.line}, in which its images are compared from now on")
    beside = [
        name for name, there in (("the champion", champion), ("the best version so far", anchor), ("full", rivals.full)) if there
    ]
    progress.say(f"draw images of {subject} and judge them{', beside ' if beside else ''}{' and '.join(beside)}")
    own, full = line.sampler_of(lineage.variant, source_of(lineage)), rivals.full
    contest = Contest(
        spaces=features.fit(dataset, frozen),
        datasets=datasets,
        n=line.gate.images,
        challenger=drawer(workspace, f"{subject}, challenger", model.bundle, own),
        champion=drawer(workspace, f"{subject}, champion", champion.bundle) if champion else None,
        anchor=drawer(workspace, f"{subject}, best so far", anchor) if anchor else None,
        full=drawer(workspace, f"{subject}, full beside it", full) if full else None,
        converged=drawer(workspace, f"{subject}, full in many steps", full, students.converged(line.sampler)) if full else None,
        solver=drawer(workspace, f"{subject}, full in few steps", full, students.solver(own, line.sampler))
        if full and lineage.teacher
        else None,
    )
    card = score(contest, lineage, line.precision(configuration))
    out = workspace.work / "evaluations" / key
    out.mkdir(parents=True, exist_ok=True)
    (out / CARD).write_text(card.model_dump_json(indent=1))
    pictures(contest, out)
    return str(out)


@task(name="register", task_run_name=cast("Any", _registering), cache_policy=NO_CACHE, **RETRIES)
def register_model(workspace: Workspace, model: ModelFiles, evaluation: Path, decision: Decision) -> int:
    """Record the model in MLflow, and the decision with the model's hashes in the ledger; return the version's number.

    The hashes are those of the files that were evaluated here, not of the copies in MLflow.

    Raises:
        SealError: the ledger has another model under this version's number.
    """
    opened, card = train.load_checkpoint(model.checkpoint), read_card(evaluation)
    subject, data = subject_of(opened.lineage), opened.lineage.data
    progress.say(f"register {subject} in MLflow and in the ledger")
    files = {
        **files_of("bundle", model.bundle), **files_of("checkpoint", opened.folder), **files_of("pictures", evaluation),
        SCORECARD: sealed_bytes(card_text(card).encode()),
    }  # fmt: skip
    version = register(
        workspace.catalog, subject, opened.lineage, card, decision, opened.folder, model.bundle,
        {"samples": evaluation / SAMPLES, "captions": (evaluation / SAMPLES).with_suffix(".json"), "real": evaluation / REAL},
        points(json.loads((opened.folder / train.CURVE).read_bytes())),
        open_retraining(workspace.catalog, data, training_log.retraining_key(workspace, data)),
        {number: str(entry.facts["scorecard"]) for number, entry in judged(workspace, subject).items()},
    )  # fmt: skip
    seal = Seal.of(str(subject), version.number, opened.lineage, card, files)
    with workspace.locked("records"):
        entries = [e for e in workspace.ledger.entries(str(subject)) if e.facts.get("version") == version.number]
        before = [e for e in entries if "seal" in e.facts or e.kind == "gate"]
        others = {str(e.facts.get("seal", e.facts)["scorecard"]) for e in before} - {card.sha256}
        if others:
            raise SealError(
                f"MLflow gave {seal.name} to another model than the ledger has under that number, because somebody deleted "
                "and recreated it; restore MLflow from a backup"
            )
        if not any(e.facts.get("decision") == decision.sha256 for e in entries):
            known = any("seal" in e.facts for e in entries)
            workspace.ledger.append(
                "gate", str(subject), decision.reason,
                {
                    "version": version.number, "outcome": decision.outcome, "decision": decision.sha256, "scorecard": decision.scorecard,
                    "champion": decision.champion or "", "verdict": decision.model_dump(mode="json"),
                } | ({} if known else {"seal": seal.facts}),
            )  # fmt: skip
    return version.number


def read_card(evaluation: Path) -> Scorecard:
    """Read the scorecard of an evaluation's folder."""
    return Scorecard.model_validate_json((evaluation / CARD).read_bytes())


def drawer(workspace: Workspace, who: str, bundle: Path, sampler: Sampler | None = None) -> Drawer:
    """Open exported files for drawing, with this sampler; None: with that of their own table.

    Args:
        workspace: where drawn images are kept.
        who: draws, in words for people.
        bundle: folder of the exported files.
        sampler: how it draws.
    """
    return Drawer(
        bundle, workspace.work / "draws", sampler or sampler_of(bundle),
        lambda _, done, total: progress.advance(f"draw {who}", done, total),
    )  # fmt: skip


def champion_files(workspace: Workspace, champion: Seal) -> ModelFiles:
    """Fetch the champion's checkpoint and exported files from MLflow, checked against what the gate saw."""
    into = workspace.work / "champions"
    parts: tuple[Part, Part] = ("checkpoint", "bundle")
    checkpoint, bundle = (workspace.catalog.files(champion, part, into) for part in parts)
    return ModelFiles(checkpoint=checkpoint, bundle=bundle)


def fetch_master(workspace: Workspace, champion: Seal, checkpoint: Path) -> None:
    """Put the champion's own master beside its weights, from which training then starts.

    A master that is lost or damaged, or in whose place another version's lies, is left out: training starts from the fielded weights.
    """
    if champion.master:
        try:
            workspace.catalog.master(champion, checkpoint)
        except SealError as error:
            progress.say(f"the master of {champion.name} is left out: {error}")


def subject_of(lineage: Lineage) -> Subject:
    """Return the subject of which a checkpoint is a version."""
    return Subject(line=lineage.data.line, configuration=lineage.config.configuration, variant=lineage.variant)


def source_of(lineage: Lineage) -> SourceName:
    """Say where a checkpoint's weights come from: their own training, `full` with another table, or a student's training."""
    return "training" if lineage.variant == "full" else "student" if lineage.teacher else "table"


def open_dataset(workspace: Workspace, line: Line, configuration: ConfigurationName, data: DataVersion) -> Dataset:
    """Open a revision that was pulled before; its images are decoded only the first time."""
    folder = workspace.work / "data" / data.md5.removesuffix(".dir")
    return prepare(folder, line.config(configuration), workspace.work / "cache", data.md5)
