"""Register a finished model as a version in MLflow: fill its run, tag it, and check what is there before.

The run holds the checkpoint and the exported files byte for byte. It also holds MLflow's ONNX flavour, which is a view for people
and tools and is never signed. Tags hold the facts that lead back to data, code and parent.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from model.scorecard import Lineage, Scorecard, Sha256
from registry.catalog import CHALLENGER, CHAMPION, Catalog, Subject, Version, downloaded, foreign_errors, unreachable

# MLflow comes after registry.catalog, which sets what MLflow reads when it is imported.
# isort: split
import mlflow
import mlflow.onnx
import numpy as np
import onnx
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from registry.dataset import dataset_input
from registry.lineage import data_tags, environment, shortened, tags_on_version, version_tags
from registry.runs import BUNDLE, CHECKPOINT, COMMIT, NOTE, PARENT_RUN, Retraining, check_place, create_run, reopen
from registry.seal import SCORECARD, FileSeal, files_of, is_whole, sealed_bytes
from registry.selection import Decision

NOT_KEPT = {"statistics.safetensors", "resume.safetensors"}  # of a checkpoint: an update of these weights is made once
DESCRIPTION = 500  # characters of a gate's reason on a version's page; the page of its run has more of it


def register(
    catalog: Catalog,
    subject: Subject,
    lineage: Lineage,
    card: Scorecard,
    decision: Decision,
    checkpoint: Path,
    export: Path,
    pictures: Mapping[str, Path],
    curve: list[dict[str, float]],
    within: Retraining | None = None,
    known: Mapping[int, Sha256] | None = None,
) -> Version:
    """Record a model with everything about it; return the version that is there if it was recorded before.

    Anybody may put tags on any version, so tags alone do not show that a version is this model. It must be a version that the
    ledger has under this scorecard. Or it must be a version that the ledger does not have, because its registration was
    interrupted, and that holds the same files.

    The version is created last, in one call, so an interrupted registration leaves a run but never half a version.
    Everything is recorded in the run that the training opened, or that an interrupted registration left. Of the training
    curve, only what is missing is added. The newest version that the gate let through is `challenger` until it is champion.

    Args:
        catalog: where it is recorded.
        subject: line, configuration and variant of the version.
        lineage: of the checkpoint.
        card: of the exported model.
        decision: the gate's decision.
        checkpoint: folder of the checkpoint.
        export: folder of the exported files.
        pictures: files to show, by name.
        curve: of the training, one row for each recorded step.
        within: the retraining that made the model; None: it was trained outside a retraining.
        known: the versions that the ledger has, each with the hash of its scorecard.

    Raises:
        StoreError: MLflow cannot be reached or refuses; the run is then marked failed.
    """
    judged = known or {}
    files = {
        **files_of("bundle", export),
        **files_of("checkpoint", checkpoint),
        SCORECARD: sealed_bytes(card_text(card).encode()),
    }
    with foreign_errors():
        there = catalog.versions(subject)
        for version in there:
            cut_off = version.number not in judged and version.tags.get("scorecard.sha256") == card.sha256
            if judged.get(version.number) == card.sha256 or (cut_off and _holds(catalog.client, version.run_id, files)):
                return _challenging(catalog, _named(catalog, version))
        experiment = catalog.experiment(subject.line)
        tags = data_tags(lineage.data, catalog.repository)
        tags |= version_tags(lineage, card, decision, checkpoint, export, curve)
        tags |= _ancestors(catalog.client, lineage)
        run_id = _begun(catalog.client, experiment, card, lineage) or create_run(catalog, experiment, subject, {})
        try:
            commit = {COMMIT: tags["code.rev"]} if "code.rev" in tags else {}
            reopen(catalog, run_id, tags | commit | {NOTE: tags["gate.reason"]} | ({PARENT_RUN: within.run_id} if within else {}))
            contexts = ("evaluation",) if lineage.adopted else ("training", "evaluation")
            used = [dataset_input(lineage.data, catalog.repository, context) for context in contexts]
            catalog.client.log_inputs(run_id, used)
            _log(catalog.client, run_id, subject, lineage, card)
            _log_curve(catalog.client, run_id, curve)
            check_place(catalog.client, run_id)
            _log_checkpoint(catalog.client, run_id, checkpoint)
            catalog.client.log_artifacts(run_id, str(export), BUNDLE)
            for path in pictures.values():
                catalog.client.log_artifact(run_id, str(path), "pictures")
            catalog.client.log_text(run_id, card_text(card), SCORECARD)
            catalog.client.log_text(run_id, decision.model_dump_json(indent=1), "decision.json")
            catalog.client.log_text(run_id, environment(), "environment.txt")
            _forget_views(catalog.client, experiment, run_id)
            view = _log_view(run_id, export)
            catalog.client.set_terminated(run_id)
        except BaseException as error:
            if not unreachable(error):  # another call would only wait for it once more
                with suppress(MlflowException):
                    catalog.client.set_terminated(run_id, "FAILED")
            raise
        if not catalog.client.search_registered_models(f"name = '{subject.model}'"):
            catalog.client.create_registered_model(subject.model, description=model_text(subject))
        made = catalog.client.create_model_version(  # a server, unlike a database, needs the view's id besides its address
            subject.model,
            source=f"models:/{view}",
            run_id=run_id,
            tags=tags_on_version(tags),
            description=shortened(decision.reason, DESCRIPTION),
            model_id=view,
        )
        # If a server answers too late, the client asks twice, and two versions are made for this run: the first stays.
        before = {v.number for v in there}
        first, *twins = (
            v
            for v in catalog.versions(subject)
            if v.run_id == run_id and v.number <= int(made.version) and v.number not in before
        )
        for twin in twins:
            catalog.client.delete_model_version(subject.model, str(twin.number))
        return _challenging(catalog, _named(catalog, first))


def card_text(card: Scorecard) -> str:
    """Serialise a scorecard in the form that MLflow keeps and the seal covers."""
    return card.model_dump_json(indent=1)


def model_text(subject: Subject) -> str:
    """Describe a registered model for people who open its page in MLflow."""
    return (
        f"What devices of configuration {subject.configuration} run as the variant {subject.variant} of the line {subject.line}. "
        "`champion` is the version that is fielded next, `challenger` the newest that passed the gate, `anchor` the best so far. "
        f"Why each became champion: `ferry history {subject}`. Everything that a version was made of is in the tags of its run."
    )


def _named(catalog: Catalog, version: Version) -> Version:
    """Name the run of a version after it; return the version."""
    if version.run_id:
        name = f"{version.subject.configuration}/{version.subject.variant} version {version.number}"
        catalog.client.update_run(version.run_id, name=name)
    return version


def _holds(client: MlflowClient, run_id: str, files: Mapping[str, FileSeal]) -> bool:
    """Check whether a run holds files with these names, sizes and hashes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, fact in files.items():
            listed = client.list_artifacts(run_id, name.rpartition("/")[0] or None) if run_id else []
            if fact.size not in [row.file_size for row in listed if row.path == name]:
                return False
            if not is_whole(downloaded(client, run_id, name, Path(folder)), fact):
                return False
    return True


def _challenging(catalog: Catalog, version: Version) -> Version:
    """Make a version the challenger if the gate let it through, it is the newest and is not champion; return it."""
    newest = max(v.number for v in catalog.versions(version.subject))
    if (
        version.tags.get("gate.outcome") == "promote"
        and version.number == newest
        and not {CHAMPION, CHALLENGER} & set(version.aliases)
    ):
        catalog.client.set_registered_model_alias(version.subject.model, CHALLENGER, str(version.number))
        return version.model_copy(update={"aliases": sorted([*version.aliases, CHALLENGER])})
    return version


def _ancestors(client: MlflowClient, lineage: Lineage) -> dict[str, str]:
    """Return tags that name, as MODEL/NUMBER, the versions from which a training started and by which it was taught."""
    tags = {}
    for name, sha256 in (("parent", lineage.parent), ("teacher", lineage.teacher)):
        if sha256:
            found = client.search_model_versions(f"tags.`checkpoint.sha256` = '{sha256}'")
            if found:
                oldest = min(found, key=lambda v: int(v.version))
                tags[f"{name}.version"] = f"{oldest.name}/{oldest.version}"
    return tags


def _forget_views(client: MlflowClient, experiment: str, run_id: str) -> None:
    """Delete the views that an interrupted registration left in its run."""
    for view in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        client.delete_logged_model(view.model_id)


def _begun(client: MlflowClient, experiment: str, card: Scorecard, lineage: Lineage) -> str | None:
    """Find the run of an interrupted registration of this scorecard, or else that of the training; None: there is none."""
    for tag, value in (("scorecard.sha256", card.sha256), ("lineage.sha256", lineage.sha256)):
        for run in client.search_runs([experiment], f"tags.`{tag}` = '{value}'"):
            run_id = str(run.info.run_id)
            # Anybody can set tags. A run that has a version already holds sealed files, which must stay.
            if run.data.tags.get("scorecard.sha256", card.sha256) == card.sha256 and not client.search_model_versions(
                f"run_id = '{run_id}'"
            ):
                return run_id
    return None


def _log_checkpoint(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Upload a checkpoint, without what only its own training needs."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            client.log_artifacts(run_id, str(path), f"{CHECKPOINT}/{path.name}")
        elif path.name not in NOT_KEPT:
            client.log_artifact(run_id, str(path), CHECKPOINT)


def _log_curve(client: MlflowClient, run_id: str, curve: list[dict[str, float]]) -> None:
    """Log the values of the curve that the training has not logged itself, with their steps."""
    names = {name for row in curve for name in row if name != "step"}
    begun = client.get_run(run_id).info.start_time  # times count from here, so that MLflow can draw the curve over time
    logged = {(name, metric.step) for name in names for metric in client.get_metric_history(run_id, name)}
    metrics = [
        Metric(name, row[name], begun + int(1000 * row.get("seconds", 0)), int(row["step"]))
        for row in curve
        for name in row
        if name != "step" and (name, int(row["step"])) not in logged
    ]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])


def _log(client: MlflowClient, run_id: str, subject: Subject, lineage: Lineage, card: Scorecard) -> None:
    params = lineage.config.model_dump() | card.sampler.model_dump()
    params |= {"variant": subject.variant, "seed": lineage.seed, "training_steps": lineage.steps, "items": lineage.items}
    now = int(time.time() * 1000)
    numbers = {"milliseconds_per_image": card.cost.milliseconds, "peak_mib": card.cost.peak_mib}
    for q in card.quality:
        names = ("fd", "kd", "kd_se", "precision", "recall", "density", "coverage")
        numbers |= {f"{name}_{q.space}_{q.split}": getattr(q, name) for name in names}
    numbers |= {f"copying_{m.space}": m.probability for m in card.memorisation}
    metrics = [Metric(name, value, now, 0) for name, value in numbers.items()]
    client.log_batch(run_id, metrics=metrics, params=[Param(k, str(v)) for k, v in params.items()])


def _log_view(run_id: str, export: Path) -> str:
    """Log MLflow's ONNX flavour of an export, with the weights inside the file, and return its id.

    MLflow would give a separate file of weights a random name, and two logs of one model would differ.
    """
    model = onnx.load(str(export / "graph.onnx"))
    signature = ModelSignature(_schema(model.graph.input), _schema(model.graph.output))
    with redirect_stdout(StringIO()), mlflow.start_run(run_id=run_id):  # MLflow prints a greeting to stdout
        info = mlflow.onnx.log_model(
            model, name="onnx", save_as_external_data=False, onnx_execution_providers=["CPUExecutionProvider"],
            signature=signature, pip_requirements=["onnxruntime"],
        )  # fmt: skip
    return str(info.model_id)


def _schema(values: Any) -> Schema:
    types = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}
    return Schema(
        [
            TensorSpec(
                np.dtype(types[v.type.tensor_type.elem_type]), [d.dim_value or -1 for d in v.type.tensor_type.shape.dim], v.name
            )
            for v in values
        ]
    )
