"""The flow `retrain`: pull a data revision → train → export → evaluate → gate → register → promote.

Every step is a function that works without Prefect (`step.fn(...)`), and is keyed by the content of what it depends on: the
same data, code and settings mean no work, and a run that was killed goes on at the step that was cut.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from PIL import Image
from prefect import Flow, State, flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.context import TaskRunContext
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff

from flows import approval, pages, progress, training_log, triggers
from flows.errors import VariantError, WorkspaceError
from flows.settings import Line, Training
from flows.workspace import Workspace
from model import distill, evaluate, export, features, session, train, versions
from model.config import TEACHERS, ConfigurationName, ModelConfig, PrecisionName, VariantName, canonical_sha256
from model.data import Dataset, prepare
from model.errors import CheckpointError
from model.evaluate import Drawn
from model.scorecard import Comparison, DataVersion, Following, Frozen, Lineage, Quality, Sampler, Scorecard
from ota.delta import files
from registry.catalog import Subject, card_text
from registry.champions import anchor_of, ask, champion_of, judged, promote, promotions, reconcile, verdict
from registry.errors import SealError
from registry.lineage import file_sha256
from registry.promotion import was_taken_back
from registry.seal import SCORECARD, Part, Seal, files_of, sealed_bytes
from registry.selection import Budgets, Decision, Limits, decide, level, spent

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
    return f"{context.task.name}:{parameters['root']}:{parameters['key']}"  # results are paths below the root


@task(name="pull data", **RETRIES)
def pull_data(root: str, version: dict[str, Any]) -> str:
    """Deliver and verify a data revision; returns its folder."""
    workspace = Workspace(Path(root))
    with workspace.locked("data"):
        return str(versions.pull(workspace.root, DataVersion(**version), workspace.work / "data"))


@task(name="train", cache_key_fn=by_key, persist_result=True, result_serializer="json")
def train_model(
    root: str,
    version: dict[str, Any],
    configuration: ConfigurationName,
    variant: VariantName,
    parent: str | None,
    teacher: str | None,
    key: str,
) -> str:
    """Train or distil, or go on with it; returns the checkpoint's folder."""
    workspace = Workspace(Path(root))
    data = DataVersion(**version)
    line = workspace.line(data.line)
    settings = _training(line, variant, parent, teacher)
    taught_by, objective = None, None
    if teacher:
        taught_by = train.load_checkpoint(Path(teacher))
        objective = distill.stage(taught_by.network(), taught_by.lineage.variant, variant, line.sampler.guidance)
    subject = Subject(line=data.line, configuration=configuration, variant=variant)
    with training_log.watching(workspace, subject, key, settings.steps, picture, data) as watcher:
        checkpoint = train.train(
            line.config(configuration),
            open_dataset(workspace, line, configuration, data),
            data,
            settings.options(line.precision(configuration)),
            workspace.work / "runs" / key,
            variant=variant,
            parent=train.load_checkpoint(Path(parent)) if parent else None,
            teacher=taught_by,
            objective=objective,
            watcher=watcher,
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
    sampler = line.sampler_of(opened.lineage.variant)
    export.export(
        opened, line.precision(configuration), sampler, captions, line.latency_ms(configuration, opened.lineage.variant), out
    )
    return str(out)


@task(name="evaluate", cache_key_fn=by_key, persist_result=True, result_serializer="json")
def evaluate_model(
    root: str, checkpoint: str, exported: str, champion: dict[str, str] | None, anchor: str | None, full: str | None, key: str
) -> dict[str, str]:
    """Draw images and score them; returns the paths of card and pictures.

    Beside them are scored the champion's and the anchor's, where there are such, and beside a student's those of `full`, drawn with as
    many network evaluations.
    """
    workspace = Workspace(Path(root))
    opened = train.load_checkpoint(Path(checkpoint))
    lineage = opened.lineage
    line = workspace.line(lineage.data.line)
    dataset = open_dataset(workspace, line, lineage.config.configuration, lineage.data)
    frozen = workspace.feature_spaces(lineage.data.line)
    if champion and not frozen.is_file():  # fitted anew, they would be other spaces, and past figures would mean nothing
        raise CheckpointError(f"{frozen} is missing; restore it from a backup, past figures depend on it")
    spaces = features.fit(dataset, frozen)
    sampler = line.sampler_of(lineage.variant)
    challenger = Contender(Path(exported), workspace.work / "draws", lineage.data.line, sampler)
    splits: dict[str, Dataset] = {"new": dataset}
    others: list[tuple[Literal["champion", "anchor"], Contender]] = []
    if champion:
        theirs = Path(champion["bundle"])
        others.append(("champion", Contender(theirs, workspace.work / "draws", lineage.data.line, drawn_as(theirs))))
        if anchor:
            best = Contender(Path(anchor), workspace.work / "draws", lineage.data.line, drawn_as(Path(anchor)))
            others.append(("anchor", best))
        old = train.load_checkpoint(Path(champion["checkpoint"])).lineage.data
        folder = pull_data.fn(root, old.model_dump())
        splits["old"] = prepare(Path(folder), lineage.config, workspace.work / "cache", old.md5)
    qualities: list[Quality] = []
    comparisons: list[Comparison] = []
    drawn: dict[str, Drawn] = {}
    follows: list[Following] = []
    n, captions = line.gate.images, evaluate.held_out_captions(dataset, line.gate.images)
    more = [dataset.captions[i] for i in evaluate.further_items(dataset, n)]  # of captions that are looked at one by one
    for split, data in splits.items():
        asked = [*captions, *more] if split == "new" else evaluate.held_out_captions(data, n)
        whole = challenger.draw(asked)
        drawn[split] = whole.first(n)
        qualities += evaluate.quality(spaces, data, drawn[split], split)
        follows += evaluate.following(spaces, data, drawn[split], split)
        for against, other in others:
            images = other.draw(asked)
            comparisons += evaluate.compare(spaces, data, drawn[split], images.first(n), split, other.weights_sha256, against)
    beside = others[0][1].draw([*captions, *more]) if champion else None
    one_by_one = evaluate.asked_for(spaces, dataset, challenger.draw([*captions, *more]), beside, n)
    solver = None
    if full:
        solver = distill.solver(lineage.variant, line.sampler.guidance)
        baseline = Contender(Path(full), workspace.work / "draws", lineage.data.line, solver)
        images = baseline.draw(captions)
        comparisons += evaluate.compare(spaces, dataset, drawn["new"], images, "new", baseline.weights_sha256, "solver")
    memories = evaluate.memorisation(spaces, dataset, drawn["new"])
    by_caption = evaluate.by_caption(spaces, dataset, drawn["new"], captions)
    cost = evaluate.measure_cost(Path(exported), dataset.captions[0], sampler)
    card = evaluate.scorecard(
        lineage, lineage.config, challenger.weights_sha256, sampler, line.precision(lineage.config.configuration), drawn["new"],
        qualities, comparisons, memories, by_caption, cost, solver, follows, one_by_one,
        evaluate.plausibility(spaces, dataset, challenger.draw([*captions, *more]), beside, n), evaluate.group_hashes(dataset),
    )  # fmt: skip
    out = workspace.work / "evaluations" / key
    out.mkdir(parents=True, exist_ok=True)
    (out / "scorecard.json").write_text(card.model_dump_json(indent=1))
    shown = picture(challenger.by_caption([*captions, *more]), out / "samples.png")
    picture({caption: evaluate.real_images(dataset, caption, GRID_COLUMNS) for caption in shown}, out / "real.png")
    return {"scorecard": str(out / "scorecard.json"), "samples": str(out / "samples.png")}


@task(name="register", **RETRIES)
def register_model(root: str, checkpoint: str, exported: str, evaluated: dict[str, str], decision: dict[str, Any]) -> int:
    """Record the model in MLflow, and the decision with what it is about in the ledger; returns the version's number.

    What the ledger holds are hashes of the files that were evaluated here, not of what MLflow made of them.
    """
    workspace = Workspace(Path(root))
    opened, card = (
        train.load_checkpoint(Path(checkpoint)),
        Scorecard.model_validate_json(Path(evaluated["scorecard"]).read_bytes()),
    )
    subject = subject_of(opened.lineage)
    made = Decision(**decision)
    samples = Path(evaluated["samples"])
    files = {
        **files_of("bundle", Path(exported)), **files_of("checkpoint", opened.folder), **files_of("pictures", samples.parent),
        SCORECARD: sealed_bytes(card_text(card).encode()),
    }  # fmt: skip
    version = workspace.catalog.register(
        subject, opened.lineage, card, made, opened.folder, Path(exported),
        {"samples": samples, "captions": samples.with_suffix(".json"), "real": samples.with_name("real.png")},
        training_log.points(json.loads((opened.folder / train.CURVE).read_bytes())),
        training_log.retraining(workspace, opened.lineage.data),
        {number: str(entry.facts["scorecard"]) for number, entry in judged(workspace, subject).items()},
    )  # fmt: skip
    seal = Seal.of(str(subject), version.number, opened.lineage, card, files)
    with workspace.locked("records"):
        entries = [e for e in workspace.ledger.entries(str(subject)) if e.facts.get("version") == version.number]
        before = [e for e in entries if "seal" in e.facts or e.kind == "gate"]
        others = {str(e.facts.get("seal", e.facts)["scorecard"]) for e in before} - {card.sha256}
        if others:
            raise SealError(
                f"MLflow gave {seal.name} to another model than the ledger has under that number: somebody deleted and made it again; "
                "restore MLflow from a backup"
            )
        if not any(e.facts.get("decision") == made.sha256 for e in entries):
            known = any("seal" in e.facts for e in entries)
            workspace.ledger.append(
                "gate", str(subject), made.reason,
                {
                    "version": version.number, "outcome": made.outcome, "decision": made.sha256, "scorecard": made.scorecard,
                    "champion": made.champion or "", "verdict": made.model_dump(mode="json"),
                } | ({} if known else {"seal": seal.facts}),
            )  # fmt: skip
    return version.number


def _tell(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - Prefect fixes the names
    """One line for whoever watches `ferry serve`; a run that was started by hand says it through the command."""
    if flow_run.deployment_id:
        sys.stderr.write(f"ferry: the scheduled retraining {flow_run.name} failed: {state.message}\n")


@flow(name="retrain", validate_parameters=True, persist_result=False, on_failure=[_tell], on_crashed=[_tell])
def retrain(root: str, line: str, rev: str = "HEAD", promote_winners: bool = True) -> list[dict[str, Any]]:
    """Retrain every model of a line on a data revision, and promote what the gate lets through.

    Args:
        root: the workspace.
        line: whose models.
        rev: Git revision of the data.
        promote_winners: False registers only; a person promotes with `ferry promote`.

    Returns:
        one `Retrained`, as plain data, for each configuration and variant; the outcome of a student whose teacher has no version
        that passed the gate is "no teacher", its version 0; of one that passed it and waits for a person "pending", and "refused" of
        one that a person refused.

    Raises:
        VariantError: some variants failed; the others are done and registered, and stay so when it is repeated.
    """
    workspace = Workspace(Path(root))
    settings = workspace.line(line)
    with workspace.locked("retraining"), pages.progress():
        reconcile(
            workspace, workspace.subjects([line]), workspace.needs_approval
        )  # what is trained from, and judged against, is the ledger's champion
        data = versions.resolve(workspace.root, settings.data, line, rev)
        pull_data(root, data.model_dump())
        with training_log.ending(workspace, data) as tell:
            climbed = _climb(workspace, data, promote_winners)
            rows = [row.model_dump() for done in climbed for row in done.rows]
            create_table_artifact(table=rows, key="scorecards", description=f"{line} at {data.rev[:12]}")
            _raise_failures(rows, [failure for done in climbed for failure in done.failures])
            tell(rows)
    return rows


@dataclass
class _Climbed:
    """What came of the variants of one configuration."""

    rows: list[Retrained]
    failures: list[Exception]


def _climb(workspace: Workspace, data: DataVersion, winners: bool) -> list[_Climbed]:
    """Retrain all configurations of a line, one after another or in threads."""
    line = workspace.line(data.line)
    given: dict[str, Any] = {
        "root": str(workspace.root), "version": data.model_dump(), "together": len(line.combinations()), "winners": winners,
    }  # fmt: skip
    jobs = [{**given, "configuration": configuration, "variants": variants} for configuration, variants in line.ladders().items()]
    if min(workspace.settings.parallel, len(jobs)) == 1:
        return [retrain_ladder.fn(**job) for job in jobs]
    runner: ThreadPoolTaskRunner[_Climbed] = ThreadPoolTaskRunner(max_workers=workspace.settings.parallel)
    with runner:
        futures = [runner.submit(retrain_ladder, job) for job in jobs]
        return [future.result() for future in futures]


def _raise_failures(rows: list[dict[str, Any]], failures: list[Exception]) -> None:
    if failures and len(rows) == 1:
        raise failures[0]
    if failures:
        failed = ", ".join(row["subject"] for row in rows if row["outcome"] == "failed")
        raise VariantError(f"{failed} failed, the others are done; the first error: {failures[0]}", rows) from failures[0]


@task(name="ladder", cache_policy=NO_CACHE, persist_result=False)
def retrain_ladder(
    root: str,
    version: dict[str, Any],
    configuration: ConfigurationName,
    variants: list[VariantName],
    together: int,
    winners: bool,
) -> _Climbed:
    """Retrain the variants of a configuration one after another, each after the one that teaches it; none loses the others."""
    workspace, data, run, done = Workspace(Path(root)), DataVersion(**version), _Run({}, together), _Climbed([], [])
    for variant in variants:
        try:
            done.rows.append(_retrain_one(workspace, data, configuration, variant, run, winners))
        except Exception as error:  # noqa: BLE001 - whatever befell one, the others are worth their hours
            subject = Subject(line=data.line, configuration=configuration, variant=variant)
            reason = str(error).strip() or type(error).__name__
            done.failures.append(error)
            done.rows.append(
                Retrained(
                    subject=str(subject), data_rev=data.rev, version=0, outcome="failed", reason=reason, n=0, promoted=False
                )
            )
    return done


@flow(name="look for data", persist_result=False)
def look_for_data(root: str, lines: list[str]) -> int:
    """Ask for the retrainings that new data revisions and events make; for a schedule where no `ferry serve` looks.

    Returns:
        how many runs there are for what is there now, old ones included.
    """
    return len(triggers.look(Workspace(Path(root)), lines))


@flow(name="register checkpoint", persist_result=False)
def register_checkpoint(root: str, checkpoint: str) -> dict[str, Any]:
    """Evaluate, gate and register a checkpoint that was trained elsewhere; it is not promoted.

    Returns:
        a `Retrained`, as plain data.
    """
    workspace = Workspace(Path(root))
    with workspace.locked("retraining"):
        lineage = train.load_checkpoint(Path(checkpoint)).lineage
        pull_data(root, lineage.data.model_dump())
        subject = subject_of(lineage)
        champion = champion_of(workspace, subject)
        theirs = champion_files(workspace, champion) if champion else None
        full = champion_of(workspace, subject.model_copy(update={"variant": "full"})) if lineage.variant in TEACHERS else None
        beside = champion_files(workspace, full)["bundle"] if full else None
        with training_log.ending(workspace, lineage.data) as tell:
            row = judge_and_register(workspace, checkpoint, theirs, champion, None, winners=False, full=beside).row.model_dump()
            tell([row])
        return row


@dataclass
class _Run:
    """What a run hands on from one model to the next.

    May teach the next variant of a configuration: the new version if the gate let it through, else the champion. A version that
    somebody took back teaches nobody, nor does one of another shape.
    """

    files: dict[tuple[ConfigurationName, VariantName], dict[str, str]]
    together: int
    """Models that it may decide on."""
    last: Decision | None = None
    """The gate's last one."""

    def of(self, configuration: ConfigurationName, variant: VariantName) -> dict[str, str] | None:
        """Checkpoint and bundle of the variant that teaches this one."""
        taught_by = TEACHERS.get(variant)
        return self.files.get((configuration, taught_by)) if taught_by else None


def _training(line: Line, variant: VariantName, parent: str | None, teacher: str | None) -> Training:
    """The settings of a training: from noise, from the champion, or of a student.

    A student that starts from its teacher's weights is not rounded to a grid around them: no device has them as its own.
    """
    if teacher is None:
        return line.retraining if parent else line.training
    if train.load_checkpoint(Path(cast("str", parent))).lineage.variant == variant:
        return line.distillation
    return line.distillation.model_copy(update={"update_grid": 0.0})


def _retrain_one(
    workspace: Workspace,
    data: DataVersion,
    configuration: ConfigurationName,
    variant: VariantName,
    run: _Run,
    winners: bool,
) -> Retrained:
    root, line = str(workspace.root), workspace.line(data.line)
    subject = Subject(line=data.line, configuration=configuration, variant=variant)
    champion = champion_of(workspace, subject)
    theirs = champion_files(workspace, champion) if champion else None
    teacher = run.of(configuration, variant)
    if variant in TEACHERS and teacher is None:
        return Retrained(
            subject=str(subject), data_rev=data.rev, version=0, outcome="no teacher",
            reason=f"it is taught by {TEACHERS[variant]}, of which no version has passed the gate", n=0, promoted=False,
        )  # fmt: skip
    taught_sha256 = train.load_checkpoint(Path(teacher["checkpoint"])).weights_sha256 if teacher else None
    full = run.files[configuration, "full"]["bundle"] if teacher else None
    config, starts = line.config(configuration), [teacher["checkpoint"] if teacher else None]
    if champion and theirs:
        before = train.load_checkpoint(Path(theirs["checkpoint"]))
        check_same_pictures("the champion", (before.lineage.config.image_size, before.lineage.config.channels), config)
        if before.lineage.config == config:
            run.files[configuration, variant] = theirs
        if _is_current(before.lineage, line, data, taught_sha256):
            if _is_exported_so(workspace, champion, Path(theirs["bundle"]), line):
                # A run that was cut off after this promotion takes for the rest what it would have taken.
                run.last = verdict(workspace, subject, champion.version)
                return Retrained(
                    subject=str(subject), data_rev=data.rev, version=champion.version, outcome="unchanged",
                    reason="the champion was trained on these data with these settings", n=0, promoted=False,
                )  # fmt: skip
            # Only how it is stored or drawn has changed: no training, but the gate has to see it.
            allowed = level(line.gate.alpha, run.together, run.last)
            judged = judge_and_register(workspace, theirs["checkpoint"], theirs, champion, allowed, winners, full)
            run.last = judged.decision
            if judged.fit:
                run.files[configuration, variant] = {"checkpoint": theirs["checkpoint"], "bundle": judged.bundle}
            return judged.row
        if before.lineage.config.tier == config.tier:  # weights of another tier have other shapes
            # A student goes on from the student before, so that the update is small; if that does not pass, from its teacher.
            starts = [theirs["checkpoint"], *(starts if teacher else ())]
    for parent in starts:
        way = _training(line, variant, parent, teacher["checkpoint"] if teacher else None)
        options = way.options(line.precision(configuration))
        parent_sha256 = train.load_checkpoint(Path(parent)).weights_sha256 if parent else None
        key = canonical_sha256(
            [
                data.line,
                data.md5,
                config.sha256,
                variant,
                options.sha256,
                train.code_sha256(),
                parent_sha256,
                taught_sha256,
                _guidance(line, variant),
            ]
        )[:32]
        checkpoint = _cached(train_model, workspace.work / "runs" / key / train.LINEAGE)(
            root, data.model_dump(), configuration, variant, parent, teacher["checkpoint"] if teacher else None, key
        )
        # Two attempts are two chances to be let through by luck.
        allowed = level(line.gate.alpha, run.together * len(starts), run.last)
        judged = judge_and_register(workspace, checkpoint, theirs, champion, allowed, winners, full)
        run.last = judged.decision
        if judged.fit:
            run.files[configuration, variant] = {"checkpoint": checkpoint, "bundle": judged.bundle}
        if judged.row.outcome in ("promote", "pending", "refused"):  # the gate let it through
            break
    return judged.row


def _guidance(line: Line, variant: VariantName) -> float | None:
    """What a student learns to do without: the guidance of `full`, where that teaches it."""
    return line.sampler.guidance if TEACHERS.get(variant) == "full" else None


def _is_current(lineage: Lineage, line: Line, data: DataVersion, teacher: str | None) -> bool:
    """Whether a champion was made from these data, by this code, with these settings: then there is nothing to do."""
    ways = (
        [line.distillation, line.distillation.model_copy(update={"update_grid": 0.0})]
        if teacher
        else [line.training, line.retraining]
    )
    options = {way.options(stored).sha256 for way in ways for stored in get_args(PrecisionName)}  # storing is not training
    return (
        lineage.data.md5 == data.md5
        and lineage.code == train.code_sha256()
        and lineage.config == line.config(lineage.config.configuration)
        and lineage.training_sha256 in options
        and lineage.teacher == teacher
        and lineage.guidance == _guidance(line, lineage.variant)
    )


def _is_exported_so(workspace: Workspace, champion: Seal, bundle: Path, line: Line) -> bool:
    """Whether a champion is stored and drawn as the settings say."""
    card = workspace.catalog.card(champion)
    latency = json.loads((bundle / "reference.json").read_bytes())["latency_ms"]
    wanted = (
        line.sampler_of(card.variant),
        line.precision(card.configuration),
        line.latency_ms(card.configuration, card.variant),
    )
    return (card.sampler, card.precision, latency) == wanted


def check_same_pictures(who: str, drawn: tuple[int, int], wanted: ModelConfig) -> None:
    """Refuse to judge pictures of one format by those of another.

    Raises:
        WorkspaceError: size or channels are not the champion's.
    """
    if drawn != (wanted.image_size, wanted.channels):
        raise WorkspaceError(
            f"{who} draws {drawn[0]} pixels in {drawn[1]} channels, ferry.toml asks for "
            f"{wanted.image_size} in {wanted.channels}; pictures of another format are another product, give them a line of their own"
        )


@dataclass(frozen=True)
class _Judged:
    """What came of a checkpoint, what the gate said, its exported files, and whether it may teach the next variant."""

    row: Retrained
    decision: Decision
    bundle: str
    fit: bool


def judge_and_register(
    workspace: Workspace,
    checkpoint: str,
    theirs: dict[str, str] | None,
    champion: Seal | None,
    allowed: float | None,
    winners: bool,
    full: str | None = None,
) -> _Judged:
    """Export, evaluate, gate, register and perhaps promote a trained checkpoint.

    Args:
        workspace: where.
        checkpoint: folder.
        theirs: the champion's files.
        champion: the present one, if any.
        allowed: chance of a wrong promotion, before what earlier attempts on these held-out images took of it; None: `gate.alpha`.
        winners: promote what the gate lets through.
        full: bundle of the `full` that a student is compared with at equal network evaluations.
    """
    root = str(workspace.root)
    opened = train.load_checkpoint(Path(checkpoint))
    data, configuration = opened.lineage.data, opened.lineage.config.configuration
    line, subject = workspace.line(data.line), subject_of(opened.lineage)
    settings = canonical_sha256(
        [line.sampler.model_dump(), line.gate.model_dump(), {k: c.model_dump() for k, c in line.classes.items()}, data.md5]
    )
    key = canonical_sha256([opened.weights_sha256, settings, train.code_sha256()])[:32]
    exported = _cached(export_model, workspace.work / "exports" / key / "reference.json")(root, checkpoint, configuration, key)
    beside = file_sha256(Path(full) / "weights.bin") if full else None
    # The best model ever; the champion where a workspace has none yet.
    anchor = (anchor_of(workspace, subject) or champion) if champion else None
    scored = anchor if anchor and champion and anchor.weights != champion.weights else None
    frozen = workspace.feature_spaces(data.line)
    # `ferry remeasure` changes the spaces. A line's first evaluation makes them, and must have the same key when it is repeated.
    known = champion is not None or workspace.former_feature_spaces(data.line)
    spaces = file_sha256(frozen) if known and frozen.is_file() else None
    key = canonical_sha256([key, champion.weights if champion else None, scored.weights if scored else None, beside, spaces])[:32]
    best = str(workspace.catalog.files(scored, "bundle", workspace.work / "champions")) if scored else None
    evaluated = _cached(evaluate_model, workspace.work / "evaluations" / key / "real.png")(
        root, checkpoint, exported, theirs, best, full, key
    )
    card = Scorecard.model_validate_json(Path(evaluated["scorecard"]).read_bytes())
    limits = Limits(**line.gate.model_dump(exclude={"images"}))
    budgets = Budgets(
        latency_ms=line.latency_ms(configuration, opened.lineage.variant),
        memory_mib=line.memory_mib(configuration, opened.lineage.variant),
    )
    earlier = [verdict(workspace, subject, number) for number in sorted(judged(workspace, subject))]
    share = line.gate.alpha if allowed is None else allowed
    before = [made for made in earlier if made]
    looks, next_looks = (spent(share, card.held_out, card.sha256, before, ahead) for ahead in (0, 1 if champion else 0))
    decision = decide(
        card, limits, budgets, champion.weights if champion else None,
        anchor=anchor.weights if anchor else None, level=looks, again=next_looks,
        update_bytes=_update_bytes(Path(theirs["bundle"]), Path(exported)) if theirs else None,
    )  # fmt: skip
    number = register_model(root, checkpoint, exported, evaluated, decision.model_dump(mode="json"))
    pages.decision(subject, number, decision, Path(evaluated["samples"]))
    promoted, reason, outcome = False, decision.reason, str(decision.outcome)
    taken_back = was_taken_back(card.weights_sha256, [str(e.facts["weights"]) for e in promotions(workspace, subject)])
    if decision.outcome == "promote" and winners:
        if taken_back:
            reason = f"{reason}; it was taken back, so promote it by hand if it is to come again"
        else:
            current = champion_of(workspace, subject)
            promoted = current is not None and current.version == number
            if not promoted and workspace.needs_approval(data.line):
                refused = ask(workspace, subject, number, decision.reason)
                outcome = "refused" if refused else "pending"
                approval.ask_in_prefect(workspace, subject, number)
                reason = (
                    f"{refused.who} refused it: {refused.why}"
                    if refused
                    else f"{reason}; `ferry approve {subject} {number}` promotes it"
                )
            elif not promoted:
                promote(workspace, subject, number, decision.reason)
                promoted = True
    row = Retrained(
        subject=str(subject), data_rev=data.rev, version=number, outcome=outcome, reason=reason, n=decision.n, promoted=promoted,
    )  # fmt: skip
    return _Judged(row, decision, exported, decision.outcome == "promote" and not taken_back)


def _update_bytes(old: Path, new: Path) -> int:
    """About how large a delta between the weights of two bundles would be."""
    return files.estimate(old / "weights.bin", new / "weights.bin", new / "graph.onnx", old / "graph.onnx")


def _cached(step: Any, result: Path) -> Any:
    """The step, run again although Prefect remembers its result when the files of that result are gone."""
    return step if result.is_file() else step.with_options(refresh_cache=True)


def champion_files(workspace: Workspace, champion: Seal) -> dict[str, str]:
    """The champion's checkpoint and exported files, fetched from MLflow and checked against what the gate saw."""
    into = workspace.work / "champions"
    parts: tuple[Part, ...] = ("checkpoint", "bundle")
    return {part: str(workspace.catalog.files(champion, part, into)) for part in parts}


def subject_of(lineage: Lineage) -> Subject:
    """What a checkpoint is a version of."""
    return Subject(line=lineage.data.line, configuration=lineage.config.configuration, variant=lineage.variant)


def open_dataset(workspace: Workspace, line: Line, configuration: ConfigurationName, data: DataVersion) -> Dataset:
    """A pulled revision, decoded once."""
    folder = workspace.work / "data" / data.md5.removesuffix(".dir")
    return prepare(folder, line.config(configuration), workspace.work / "cache", data.md5)


@dataclass
class Contender:
    """A model in an evaluation; what it draws for given captions is kept, keyed by its weights."""

    folder: Path
    kept: Path
    line: str
    sampler: Sampler

    def __post_init__(self) -> None:
        self.weights_sha256 = file_sha256(self.folder / "weights.bin")
        self._session: session.Session | None = None
        self._last: Drawn | None = None

    def draw(self, captions: list[str]) -> Drawn:
        """Images for captions, drawn once."""
        key = canonical_sha256([self.weights_sha256, captions, self.sampler.model_dump(), evaluate.EVALUATION_SEED])[:32]
        path = self.kept / f"{key}.npz"
        try:
            with np.load(path) as file:
                self._last = Drawn(file["images"], file["by_step"], float(file["bad"]))
        except (OSError, ValueError, KeyError):
            self._session = self._session or session.load(self.folder)
            label = f"draw {self.line} {self.weights_sha256[:8]}"
            self._last = evaluate.draw(
                self._session, captions, self.sampler, lambda done, total: progress.advance(label, done, total)
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".tmp.npz")
            np.savez(fresh, images=self._last.images, by_step=self._last.load, bad=self._last.bad)
            fresh.replace(path)
        return self._last

    def by_caption(self, captions: list[str]) -> dict[str, Any]:
        """The images drawn for captions, grouped."""
        drawn = self.draw(captions).images
        groups: dict[str, Any] = {}
        for caption, image in zip(captions, drawn, strict=True):
            groups.setdefault(caption, []).append(image)
        return groups


def drawn_as(bundle: Path) -> Sampler:
    """How a bundle says that it is drawn."""
    table = json.loads((bundle / "sampler.json").read_bytes())
    return Sampler(method=table["method"], steps=len(table["times"]) - 1, guidance=table["guidance"])


def picture(groups: dict[str, list[Any]], path: Path, scale: int = 4) -> list[str]:
    """Write a grid of images, a row for each of the most frequent captions; return these, which also go into `<path>.json`."""
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
    return sorted(rows)
