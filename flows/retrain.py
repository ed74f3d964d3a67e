"""The flow `retrain`: pull a data revision → train → export → evaluate → gate → register → promote.

Every step is a function that works without Prefect (`step.fn(...)`), and is keyed by the content of what it depends on: the
same data, code and settings mean no work, and a run that was killed goes on at the step that was cut.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from prefect import flow, task
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff

from flows import progress
from flows.promote import promote
from flows.workspace import Line, Workspace
from model import evaluate, export, features, session, train, versions
from model.config import ConfigurationName, VariantName, canonical_sha256
from model.data import Dataset, prepare
from model.errors import RevisionError
from model.evaluate import Drawn
from model.scorecard import Comparison, DataVersion, Frozen, Lineage, Quality, Scorecard
from registry.catalog import BUNDLE, CHECKPOINT, Subject, Version
from registry.selection import Decision, Limits, decide

RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(2),
    "retry_jitter_factor": 0.5,
}  # where I/O is
GRID_COLUMNS, GRID_ROWS = 8, 6


class Retrained(Frozen):
    """What the flow did for one subject."""

    subject: str
    data_rev: str
    version: int
    outcome: str
    reason: str
    n: int
    promoted: bool


def by_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Cache by the content that a step depends on, not by the names of files."""
    return f"{context.task.name}:{parameters['key']}"


@task(name="pull data", **RETRIES)
def pull_data(root: str, version: dict[str, Any]) -> str:
    """Deliver and verify a data revision; returns its folder."""
    workspace = Workspace(Path(root))
    return str(versions.pull(workspace.root, DataVersion(**version), workspace.work / "data"))


@task(name="train", cache_key_fn=by_key, persist_result=True, result_serializer="json")
def train_model(
    root: str, version: dict[str, Any], configuration: ConfigurationName, variant: VariantName, parent: str | None, key: str
) -> str:
    """Train, or go on training; returns the checkpoint's folder."""
    workspace = Workspace(Path(root))
    data = DataVersion(**version)
    line = workspace.line(data.line)
    settings = line.retraining if parent else line.training
    label = f"train {data.line}/{configuration}/{variant}"
    checkpoint = train.train(
        line.config(configuration),
        open_dataset(workspace, line, configuration, data),
        data,
        settings.options(),
        workspace.work / "runs" / key,
        variant=variant,
        parent=train.load_checkpoint(Path(parent)) if parent else None,
        on_step=lambda step, _: progress.advance(label, step, settings.steps),
    )
    return str(checkpoint.folder)


@task(name="export", cache_key_fn=by_key, persist_result=True, result_serializer="json")
def export_model(root: str, checkpoint: str, configuration: ConfigurationName, key: str) -> str:
    """Write and check the files that devices run; returns their folder."""
    workspace = Workspace(Path(root))
    opened = train.load_checkpoint(Path(checkpoint))
    line = workspace.line(opened.lineage.data.line)
    captions = sorted(set(open_dataset(workspace, line, configuration, opened.lineage.data).captions))
    out = workspace.work / "exports" / key
    precision = next(c.precision for c in line.classes.values() if c.configuration == configuration)
    export.export(opened, precision, line.sampler, captions, line.latency_ms(configuration), out)
    return str(out)


@task(name="evaluate", cache_key_fn=by_key, persist_result=True, result_serializer="json")
def evaluate_model(root: str, checkpoint: str, exported: str, champion: dict[str, str] | None, key: str) -> dict[str, str]:
    """Draw images and score them, beside the champion's where there is one; returns the paths of card and pictures."""
    workspace = Workspace(Path(root))
    opened = train.load_checkpoint(Path(checkpoint))
    lineage = opened.lineage
    line = workspace.line(lineage.data.line)
    dataset = open_dataset(workspace, line, lineage.config.configuration, lineage.data)
    spaces = features.fit(dataset, workspace.root / "features" / f"{lineage.data.line}.safetensors")
    challenger = _Contender(Path(exported), workspace.work / "draws", line)
    splits: dict[str, Dataset] = {"new": dataset}
    other = None
    if champion:
        other = _Contender(Path(champion["bundle"]), workspace.work / "draws", line)
        old = train.load_checkpoint(Path(champion["checkpoint"])).lineage.data
        folder = pull_data.fn(root, old.model_dump())
        splits["old"] = prepare(Path(folder), lineage.config, workspace.work / "cache", old.md5)
    qualities: list[Quality] = []
    comparisons: list[Comparison] = []
    drawn: dict[str, Drawn] = {}
    for split, data in splits.items():
        reference = data.images[data.reference()]
        captions = evaluate.held_out_captions(data, line.gate.images)
        drawn[split] = challenger.draw(captions)
        qualities += evaluate.quality(spaces, reference, drawn[split], split)
        if other:
            theirs = other.draw(captions)
            comparisons += evaluate.compare(spaces, reference, drawn[split], theirs, split, other.weights_sha256)
    cost = evaluate.measure_cost(session.load(Path(exported), threads=1), dataset.captions[0], line.sampler)
    card = evaluate.scorecard(
        lineage, lineage.config, challenger.weights_sha256, line.sampler, drawn["new"], qualities, comparisons, cost
    )
    out = workspace.work / "evaluations" / key
    out.mkdir(parents=True, exist_ok=True)
    (out / "scorecard.json").write_text(card.model_dump_json(indent=1))
    captions = evaluate.held_out_captions(dataset, line.gate.images)
    picture(challenger.by_caption(captions), out / "samples.png")
    return {"scorecard": str(out / "scorecard.json"), "samples": str(out / "samples.png")}


@task(name="register", **RETRIES)
def register_model(root: str, checkpoint: str, exported: str, evaluated: dict[str, str], decision: dict[str, Any]) -> int:
    """Record the model in MLflow and the decision in the ledger; returns the version's number."""
    workspace = Workspace(Path(root))
    opened = train.load_checkpoint(Path(checkpoint))
    subject = subject_of(opened.lineage)
    made = Decision(**decision)
    version = workspace.catalog.register(
        subject, opened.lineage, Scorecard.model_validate_json(Path(evaluated["scorecard"]).read_bytes()), made,
        opened.folder, Path(exported), {"samples": Path(evaluated["samples"]), "captions": Path(evaluated["samples"]).with_suffix(".json")},
        json.loads((opened.folder / train.CURVE).read_bytes()),
    )  # fmt: skip
    if not any(e.facts.get("decision") == made.sha256 for e in workspace.ledger.entries(str(subject))):
        workspace.ledger.append(
            "gate", str(subject), made.reason,
            {"version": version.number, "outcome": made.outcome, "decision": made.sha256, "scorecard": made.scorecard},
        )  # fmt: skip
    return version.number


@flow(name="retrain", validate_parameters=True, persist_result=False)
def retrain(root: str, line: str, rev: str = "HEAD", promote_winners: bool = True) -> list[dict[str, Any]]:
    """Retrain every model of a line on a data revision, and promote what the gate lets through.

    Args:
        root: the workspace.
        line: whose models.
        rev: Git revision of the data.
        promote_winners: False registers only; a person promotes with `ferry promote`.

    Returns:
        one `Retrained`, as plain data, for each configuration and variant.
    """
    workspace = Workspace(Path(root))
    settings = workspace.line(line)
    with workspace.locked():
        data = versions.resolve(workspace.root, settings.data, line, rev)
        pull_data(root, data.model_dump())
        combinations = settings.combinations()
        done = [_retrain_one(workspace, data, c, v, len(combinations), promote_winners) for c, v in combinations]
    rows = [row.model_dump() for row in done]
    create_table_artifact(table=rows, key="scorecards", description=f"{line} at {data.rev[:12]}")
    return rows


@flow(name="register checkpoint", persist_result=False)
def register_checkpoint(root: str, checkpoint: str) -> dict[str, Any]:
    """Evaluate, gate and register a checkpoint that was trained elsewhere; it is not promoted.

    Returns:
        a `Retrained`, as plain data.
    """
    workspace = Workspace(Path(root))
    with workspace.locked():
        lineage = train.load_checkpoint(Path(checkpoint)).lineage
        pull_data(root, lineage.data.model_dump())
        champion = workspace.catalog.champion(subject_of(lineage))
        theirs = champion_files(workspace, champion) if champion else None
        return judge_and_register(workspace, checkpoint, theirs, champion, 1, winners=False).model_dump()


def _retrain_one(
    workspace: Workspace, data: DataVersion, configuration: ConfigurationName, variant: VariantName, together: int, winners: bool
) -> Retrained:
    root, line = str(workspace.root), workspace.line(data.line)
    subject = Subject(line=data.line, configuration=configuration, variant=variant)
    champion = workspace.catalog.champion(subject)
    theirs = champion_files(workspace, champion) if champion else None
    if champion and theirs and _is_current(train.load_checkpoint(Path(theirs["checkpoint"])).lineage, line, data):
        return Retrained(
            subject=str(subject), data_rev=data.rev, version=champion.number, outcome="unchanged",
            reason="the champion was trained on these data with these settings", n=0, promoted=False,
        )  # fmt: skip

    parent = theirs["checkpoint"] if theirs else None
    options = (line.retraining if parent else line.training).options()
    parent_sha256 = train.load_checkpoint(Path(parent)).weights_sha256 if parent else None
    key = canonical_sha256(
        [data.md5, line.config(configuration).sha256, variant, options.sha256, train.code_sha256(), parent_sha256]
    )[:32]
    checkpoint = _cached(train_model, workspace.work / "runs" / key / train.LINEAGE)(
        root, data.model_dump(), configuration, variant, parent, key
    )
    return judge_and_register(workspace, checkpoint, theirs, champion, together, winners)


def _is_current(lineage: Lineage, line: Line, data: DataVersion) -> bool:
    """Whether a champion was made from these data, by this code, with these settings: then there is nothing to do."""
    options = {line.training.options().sha256, line.retraining.options().sha256}
    return (
        lineage.data.md5 == data.md5
        and lineage.code == train.code_sha256()
        and lineage.config == line.config(lineage.config.configuration)
        and lineage.training_sha256 in options
    )


def judge_and_register(
    workspace: Workspace, checkpoint: str, theirs: dict[str, str] | None, champion: Version | None, together: int, winners: bool
) -> Retrained:
    """Export, evaluate, gate, register and perhaps promote a trained checkpoint."""
    root = str(workspace.root)
    opened = train.load_checkpoint(Path(checkpoint))
    data, configuration = opened.lineage.data, opened.lineage.config.configuration
    line, subject = workspace.line(data.line), subject_of(opened.lineage)
    settings = canonical_sha256(
        [line.sampler.model_dump(), line.gate.model_dump(), {k: c.model_dump() for k, c in line.classes.items()}, data.md5]
    )
    key = canonical_sha256([opened.weights_sha256, settings, train.code_sha256()])[:32]
    exported = _cached(export_model, workspace.work / "exports" / key / "reference.json")(root, checkpoint, configuration, key)
    key = canonical_sha256([key, champion.weights_sha256 if champion else None])[:32]
    evaluated = _cached(evaluate_model, workspace.work / "evaluations" / key / "samples.png")(
        root, checkpoint, exported, theirs, key
    )
    card = Scorecard.model_validate_json(Path(evaluated["scorecard"]).read_bytes())
    limits = Limits(**line.gate.model_dump(exclude={"images"}))
    decision = decide(card, limits, line.latency_ms(configuration), champion.weights_sha256 if champion else None, together)
    number = register_model(root, checkpoint, exported, evaluated, decision.model_dump(mode="json"))
    create_image_artifact(image_url=Path(evaluated["samples"]).as_uri(), key="samples", description=f"{subject} {number}")
    promoted = False
    if decision.outcome == "promote" and winners:
        current = workspace.catalog.champion(subject)
        if current is None or current.number != number:
            promote(workspace, subject, number, decision.reason)
        promoted = True
    return Retrained(
        subject=str(subject), data_rev=data.rev, version=number, outcome=decision.outcome, reason=decision.reason,
        n=decision.n, promoted=promoted,
    )  # fmt: skip


def _cached(step: Any, result: Path) -> Any:
    """The step, run again although Prefect remembers its result when the files of that result are gone."""
    return step if result.is_file() else step.with_options(refresh_cache=True)


def champion_files(workspace: Workspace, champion: Version) -> dict[str, str]:
    """The champion's checkpoint and exported files, fetched from MLflow."""
    into = workspace.work / "champions"
    parts = {"checkpoint": CHECKPOINT, "bundle": BUNDLE}
    return {name: str(workspace.catalog.files(champion, cast("Any", part), into)) for name, part in parts.items()}


def subject_of(lineage: Lineage) -> Subject:
    """What a checkpoint is a version of."""
    return Subject(line=lineage.data.line, configuration=lineage.config.configuration, variant=lineage.variant)


def open_dataset(workspace: Workspace, line: Line, configuration: ConfigurationName, data: DataVersion) -> Dataset:
    """A pulled revision, decoded once."""
    folder = workspace.work / "data" / data.md5.removesuffix(".dir")
    return prepare(folder, line.config(configuration), workspace.work / "cache", data.md5)


def check_clean(workspace: Workspace, line: str) -> None:
    """Refuse to train on HEAD while the data folder holds something else.

    Raises:
        RevisionError: it does.
    """
    path = workspace.line(line).data
    if versions.is_dirty(workspace.root, path):
        raise RevisionError(
            f"{path} holds changes that no revision has; record them with `ferry data add {line}`, or name a revision with --data"
        )


@dataclass
class _Contender:
    """A model in an evaluation; what it draws for given captions is kept, keyed by its weights."""

    folder: Path
    kept: Path
    line: Line

    def __post_init__(self) -> None:
        self.weights_sha256 = file_sha256(self.folder / "weights.bin")
        self._session: session.Session | None = None
        self._last: Drawn | None = None

    def draw(self, captions: list[str]) -> Drawn:
        """Images for captions, drawn once."""
        key = canonical_sha256([self.weights_sha256, captions, self.line.sampler.model_dump(), evaluate.EVALUATION_SEED])[:32]
        path = self.kept / f"{key}.npz"
        try:
            with np.load(path) as file:
                self._last = Drawn(file["images"], file["load"], float(file["bad"]))
        except (OSError, ValueError, KeyError):
            self._session = self._session or session.load(self.folder)
            label = f"draw {self.line.data.rpartition('/')[2]} {self.weights_sha256[:8]}"
            self._last = evaluate.draw(
                self._session, captions, self.line.sampler, lambda done, total: progress.advance(label, done, total)
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".tmp.npz")
            np.savez(fresh, images=self._last.images, load=self._last.load, bad=self._last.bad)
            fresh.replace(path)
        return self._last

    def by_caption(self, captions: list[str]) -> dict[str, Any]:
        """The images drawn for captions, grouped."""
        drawn = self.draw(captions).images
        groups: dict[str, Any] = {}
        for caption, image in zip(captions, drawn, strict=True):
            groups.setdefault(caption, []).append(image)
        return groups


def file_sha256(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def picture(groups: dict[str, list[Any]], path: Path, scale: int = 4) -> None:
    """A grid of samples, a row for each of the most frequent captions; captions in `<path>.json`."""
    rows = sorted(groups, key=lambda caption: (-len(groups[caption]), caption))[:GRID_ROWS]
    size, channels = groups[rows[0]][0].shape[1], groups[rows[0]][0].shape[0]
    cell = size * scale + 2
    sheet = np.full((len(rows) * cell, GRID_COLUMNS * cell, channels), 255, dtype=np.uint8)
    for y, caption in enumerate(sorted(rows)):
        for x, image in enumerate(groups[caption][:GRID_COLUMNS]):
            large = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[y * cell + 1 : y * cell + 1 + len(large), x * cell + 1 : x * cell + 1 + len(large)] = large
    Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet).save(path)
    path.with_suffix(".json").write_text(json.dumps(sorted(rows)))
