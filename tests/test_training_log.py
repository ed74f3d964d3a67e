"""A training watched through MLflow: live, nothing twice, and never at the expense of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import progress
from flows.setup import create
from flows.training_log import watching
from flows.workspace import Workspace
from model.data import Dataset
from model.train import Checkpoint, TrainOptions, train
from registry.catalog import Subject
from registry.runs import open_training, points
from tests.conftest import CONFIG, VERSION
from tests.test_catalog import metrics
from tests.test_flows import SETTINGS

SUBJECT = Subject(line="shapes", configuration="I", variant="full")
OPTIONS = TrainOptions(steps=24, batch=4, warmup=2, learning_rate=4e-3, save_every=5)
KEY = "c" * 32


class PowerCut(Exception):  # noqa: N818
    """Ends a run in the middle, as a power cut does."""


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = create(tmp_path / "ws", [], SETTINGS)
    yield made
    made.ledger.close()
    made.fleet.close()


@pytest.fixture(scope="module")
def unwatched(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return train(CONFIG, dataset, VERSION, OPTIONS, tmp_path_factory.mktemp("unwatched"))


def run(workspace: Workspace, dataset: Dataset, on_step: Callable[[int], None] = lambda _: None) -> Checkpoint:
    folder = workspace.work / "runs" / KEY
    listening = progress.listening(lambda _, done, __: on_step(done))
    with listening, watching(workspace, SUBJECT, KEY, OPTIONS.steps, VERSION) as watcher:
        return train(CONFIG, dataset, VERSION, OPTIONS, folder, watcher=watcher)


@pytest.mark.slow
def test_killed_training_goes_on_in_its_run_and_logs_nothing_twice(
    workspace: Workspace, dataset: Dataset, unwatched: Checkpoint
) -> None:
    def cut(step: int) -> None:
        if step == 14:  # saved at 10, so that step 11 is done and logged a second time
            raise PowerCut

    with pytest.raises(PowerCut):
        run(workspace, dataset, cut)
    begun = open_training(workspace.catalog, SUBJECT, KEY).run_id
    assert [step for step, _ in metrics(workspace.catalog, begun, "loss")] == [1, 11]  # seen before the end
    assert run(workspace, dataset).weights_sha256 == unwatched.weights_sha256
    assert open_training(workspace.catalog, SUBJECT, KEY).run_id == begun
    assert [step for step, _ in metrics(workspace.catalog, begun, "loss")] == [1, 11, 21, 24]
    client = workspace.catalog.client
    names = [Path(info.path).name for info in client.list_artifacts(begun, "checkpoint/samples")]
    assert names == [f"step-{step:06d}.png" for step in (6, 12, 18, 24)]


def test_broken_store_ends_no_training_and_is_told_once(
    workspace: Workspace, dataset: Dataset, unwatched: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_store(step: int) -> None:
        if step == 5:
            workspace.catalog.client.delete_run(open_training(workspace.catalog, SUBJECT, KEY).run_id)  # as in MLflow's web page

    assert run(workspace, dataset, break_store).weights_sha256 == unwatched.weights_sha256
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("ferry: MLflow does not show this training until it is registered: MLflow refused")
    assert len(list((workspace.work / "runs" / KEY / "samples").glob("*.png"))) == 4  # registration takes them from here


def test_store_that_cannot_be_opened_ends_no_training(
    workspace: Workspace, dataset: Dataset, unwatched: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace.root / "mlflow.db").write_bytes(b"not a database" * 1000)
    assert run(workspace, dataset).weights_sha256 == unwatched.weights_sha256
    assert "ferry: MLflow does not show this training until it is registered" in capsys.readouterr().err


def test_only_single_numbers_become_metrics() -> None:
    assert points([{"step": 1, "loss": 0.5, "load": [[0.5, 0.5]]}]) == [{"step": 1, "loss": 0.5}]
