"""MLflow's runs: one around each retraining, and in it one for each training, which is filled while the training goes on.

The run of a training becomes the run of its version. At the end it holds the checkpoint and the exported files byte for byte; see
`registry.registration`.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import Field

from model.scorecard import DataVersion, Frozen
from registry.catalog import Catalog, Subject, foreign_errors

# MLflow comes after registry.catalog, which sets what MLflow reads when it is imported.
# isort: split
from mlflow.entities import Metric, RunTag
from mlflow.tracking import MlflowClient

from registry.curve import Update
from registry.dataset import dataset_input
from registry.errors import StoreError
from registry.ledger import user
from registry.lineage import data_tags, shortened

CHECKPOINT, BUNDLE = "checkpoint", "bundle"
TRAINING, RETRAINING = (
    "training.key",
    "retraining.key",
)  # tags by which the run of a training, and the run around a retraining, are found again
WORKSPACE = "workspace"  # tag of every run: who writes into it
PARENT_RUN, NOTE, COMMIT = (
    "mlflow.parentRunId",
    "mlflow.note.content",
    "mlflow.source.git.commit",
)  # tags that MLflow's pages know
_opening = threading.Lock()  # variants that are trained in parallel must share one run around them


class Retraining(Frozen):
    """The MLflow run around everything that is made of one data revision with the same code and settings."""

    run_id: str
    data: DataVersion


class Retrained(Frozen):
    """Result of a retraining for one model."""

    subject: str
    data_rev: str
    version: int
    outcome: str
    reason: str
    n: int
    promoted: bool
    update: Update | None = Field(default=None, exclude_if=lambda value: value is None)
    """How its update was made, what it costs and what it keeps; None: there was none, or it was rounded."""


class Training:
    """A run that is filled while a network is trained; `registration.register` continues it. Each call may raise StoreError."""

    def __init__(self, client: MlflowClient, run_id: str, logged: set[int]) -> None:
        self.run_id = run_id
        self._client, self._logged = client, logged

    def figures(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log figures with their step; skip a step that an interrupted training logged before."""
        if step in self._logged:
            return
        now = int(time.time() * 1000)
        with foreign_errors():
            self._client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])
        self._logged.add(step)

    def sample(self, path: Path) -> None:
        """Upload a sample picture to the place where the checkpoint's own copy of it will be."""
        with foreign_errors():
            check_place(self._client, self.run_id)
            self._client.log_artifact(self.run_id, str(path), f"{CHECKPOINT}/{path.parent.name}")

    def finish(self, lineage_sha256: str) -> None:
        """Mark the run as finished: the weights are complete, and the run waits for their registration."""
        with foreign_errors():
            self._client.set_tag(self.run_id, "lineage.sha256", lineage_sha256)
            self._client.set_terminated(self.run_id)

    def fail(self) -> None:
        """Mark the run as failed, because the training was interrupted; `open_training` continues it."""
        with foreign_errors():
            self._client.set_terminated(self.run_id, "FAILED")


class LiveTraining:
    """A run that is filled while a network is trained, unless MLflow fails: then the training goes on without it."""

    def __init__(self, begin: Callable[[], Training], failed: Callable[[Exception], object]) -> None:
        """Open the run.

        Args:
            begin: opens the run.
            failed: called with the first failure of MLflow; after it the run is not used any more.
        """
        self._training: Training | None = None
        self._failed = failed
        with self._whatever_happens():
            self._training = begin()

    def tell(self, act: Callable[[Training], None]) -> None:
        """Call a function with the run, unless an earlier call failed."""
        if self._training:
            with self._whatever_happens():
                act(self._training)

    @contextmanager
    def _whatever_happens(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, hours of training are worth more
            self._training = None
            self._failed(error)


def points(curve: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Select the figures of a recorded curve that are single numbers; the load by expert stays in the checkpoint's file."""
    return [{name: value for name, value in row.items() if not isinstance(value, list)} for row in curve]


def open_retraining(catalog: Catalog, data: DataVersion, key: str) -> Retraining:
    """Open the run around a retraining; the same key continues the same run.

    Raises:
        StoreError: MLflow cannot be reached or refuses.
    """
    with foreign_errors(), _opening:
        experiment = catalog.experiment(data.line)
        found = catalog.client.search_runs([experiment], f"tags.`{RETRAINING}` = '{key}'", order_by=["attributes.start_time ASC"])
        if found:
            run_id = found[0].info.run_id
            if found[0].info.status != "RUNNING":
                reopen(catalog, run_id, {})
        else:
            tags = {RETRAINING: key, **data_tags(data, catalog.repository)}
            run_id = _new_run(catalog, experiment, f"{data.line} on data {data.rev[:12]}", tags)
            catalog.client.log_inputs(run_id, [dataset_input(data, catalog.repository, "retraining")])
    return Retraining(run_id=run_id, data=data)


@contextmanager
def ending(catalog: Catalog, data: DataVersion, key: str) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """End all runs of a line: first those of killed calls, after the block also those of this call, however it ends.

    Args:
        catalog: where the runs are.
        data: revision that is retrained on.
        key: of the run around the retraining.

    Yields:
        a function that takes the results, each `Retrained` as plain data, for the page of the retraining's run.

    Raises:
        StoreError: MLflow cannot be reached.
    """
    told = ""

    def tell(rows: list[dict[str, Any]]) -> None:
        nonlocal told
        lines = [
            f"| {r['subject']} | {r['version']} | {r['outcome']} | {'yes' if r['promoted'] else 'no'} | {shortened(r['reason'], 300)} |"
            for r in rows
        ]
        head = ["| model | version | outcome | promoted | reason |", "|---|---|---|---|---|"]
        told = "\n".join([f"What came of data revision {data.rev} of {data.line}:", "", *head, *lines])

    end_runs(catalog, data.line, key, None)
    try:
        yield tell
    except BaseException:
        with suppress(StoreError):  # the first error is reported; the next call ends the runs that are left
            end_runs(catalog, data.line, key, "FAILED")
        raise
    end_runs(catalog, data.line, key, "FINISHED", told)


def end_runs(catalog: Catalog, line: str, key: str, ended: Literal["FINISHED", "FAILED"] | None, note: str = "") -> None:
    """End the runs of a line that this workspace left running; no other command may be at work on the line.

    Args:
        catalog: where the runs are.
        line: line whose runs are ended.
        key: key of the present retraining.
        ended: how the present retraining ended; None: it begins, and its own run is left as it is.
        note: result of the retraining in Markdown, for its page in MLflow.

    Raises:
        StoreError: MLflow cannot be reached or refuses.
    """
    with foreign_errors():
        known = catalog.client.get_experiment_by_name(line)
        if not known:
            return
        for run in catalog.client.search_runs([known.experiment_id], "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            if tags.get(WORKSPACE) != catalog.owner or (ended is None and tags.get(RETRAINING) == key):
                continue
            ours = ended is not None and tags.get(RETRAINING) == key
            if ours and note:
                catalog.client.set_tag(run.info.run_id, NOTE, note)
            catalog.client.set_terminated(run.info.run_id, ended if ours and ended else "KILLED")


def open_training(catalog: Catalog, subject: Subject, key: str, within: Retraining | None = None) -> Training:
    """Open the run that is filled while a network is trained; the same key continues the same run.

    Args:
        catalog: where the run is.
        subject: what is trained.
        key: hash of everything that the training depends on.
        within: the retraining that the training is a part of; None: it is not part of one.

    Raises:
        StoreError: MLflow cannot be reached or refuses.
    """
    with foreign_errors():
        experiment = catalog.experiment(subject.line)
        found = catalog.client.search_runs([experiment], f"tags.`{TRAINING}` = '{key}'")
        # A run that became a version stays as it is, even if its training is repeated because its folder was lost.
        known = [run for run in found if "scorecard.sha256" not in run.data.tags]
        run_id = known[0].info.run_id if known else create_run(catalog, experiment, subject, {TRAINING: key})
        tags = {PARENT_RUN: within.run_id, **data_tags(within.data, catalog.repository)} if within else {}
        reopen(catalog, run_id, tags)
        if within:
            catalog.client.log_inputs(run_id, [dataset_input(within.data, catalog.repository, "training")])
        logged = {metric.step for metric in catalog.client.get_metric_history(run_id, "loss")}
    return Training(catalog.client, run_id, logged)


def create_run(catalog: Catalog, experiment: str, subject: Subject, tags: dict[str, str]) -> str:
    """Create a run for a model and return its id."""
    return _new_run(catalog, experiment, f"{subject.configuration}/{subject.variant}, in training", tags)


def _new_run(catalog: Catalog, experiment: str, name: str, tags: dict[str, str]) -> str:
    known = {WORKSPACE: catalog.owner, "mlflow.user": user(), "mlflow.source.name": "ferry", "mlflow.source.type": "LOCAL"}
    return str(catalog.client.create_run(experiment, run_name=name, tags=known | tags).info.run_id)


def reopen(catalog: Catalog, run_id: str, tags: dict[str, str]) -> None:
    """Mark a run as running, in this workspace, and set tags."""
    catalog.client.update_run(run_id, status="RUNNING")
    tags = {WORKSPACE: catalog.owner, **tags}
    catalog.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def check_place(client: MlflowClient, run_id: str) -> None:
    """Check that what is written into a run's folder stays there: others may have placed a link in it, such as one to a key.

    Raises:
        StoreError: there is a link, a file with a second name, or something that is neither file nor folder; or the folder is
            not the run's own.
    """
    told = client.get_run(run_id).info.artifact_uri
    try:
        address = urlsplit(told)
        if address.scheme not in ("", "file"):
            return  # a server or a bucket writes the files
        place = Path(url2pathname(address.path))
        own = (
            place.is_absolute()
            and place.parts[-2:] == (run_id, "artifacts")
            and "\0" not in str(place)
            and ".." not in place.parts
        )
    except ValueError:
        own = False
    if not own:
        raise StoreError(
            f"MLflow names {told!r} as the folder of run {run_id}, but that run has another folder; check who may write to "
            "MLflow's database"
        )
    line = place.parent.parent  # LINE/RUN/artifacts; MLflow's view goes below LINE/models
    for path in (line, line / "models", place.parent, place, *place.rglob("*")):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        plain = stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
        if not plain:
            raise StoreError(
                f"{path} is a link or not a regular file, where a version's file belongs; remove it, and check who may write "
                "there"
            )
