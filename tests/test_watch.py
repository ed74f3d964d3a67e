"""Watching a training: what is reported is true, and nothing of it reaches the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.data import Dataset
from model.errors import CheckpointError
from model.students import Trajectories
from model.train import CURVE, Checkpoint, FlowMatching, Ranks, TrainOptions, train
from model.watch import Figures, Watcher, draw, sampled_after

from .conftest import CAPTIONS, CONFIG, VERSION

OPTIONS = TrainOptions(steps=26, batch=4, warmup=2, learning_rate=4e-3, save_every=5)
ALBUM = list[tuple[int, list[str], Any]]


class PowerCut(Exception):  # noqa: N818
    """Ends a run in the middle, as a power cut does."""


@pytest.fixture(scope="module")
def unwatched(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return train(CONFIG, dataset, VERSION, OPTIONS, tmp_path_factory.mktemp("unwatched"))


@pytest.fixture(scope="module")
def watched(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, list[Figures], ALBUM]:
    heard: list[Figures] = []
    album: ALBUM = []
    watcher = Watcher(lambda _, figures: heard.append(figures), lambda *sample: album.append(sample))
    return train(CONFIG, dataset, VERSION, OPTIONS, tmp_path_factory.mktemp("watched"), watcher=watcher), heard, album


def test_watching_changes_no_weight(unwatched: Checkpoint, watched: tuple[Checkpoint, list[Figures], ALBUM]) -> None:
    assert watched[0].weights_sha256 == unwatched.weights_sha256
    assert watched[0].lineage == unwatched.lineage


def test_samples_come_after_each_quarter_and_the_last_are_of_what_is_kept(
    watched: tuple[Checkpoint, list[Figures], ALBUM], dataset: Dataset
) -> None:
    kept, _, album = watched
    assert [step for step, *_ in album] == [7, 13, 20, 26]
    for _, captions, images in album:
        assert set(captions) == set(CAPTIONS)
        assert images.shape == (len(captions), 1, 16, 16)
        assert images.dtype == np.uint8
    assert np.array_equal(album[-1][2], draw(kept.network(), dataset, FlowMatching.preview)[1])
    assert not np.array_equal(album[0][2], album[-1][2])  # another network, from the same noise


def test_student_is_drawn_in_its_own_steps(checkpoint: Checkpoint, dataset: Dataset) -> None:
    network, times = checkpoint.network(), []
    network.register_forward_hook(lambda _, inputs, __: times.append((float(inputs[1][0]), float(inputs[2][0]))))
    draw(network, dataset, Trajectories.preview)
    np.testing.assert_allclose(times, [(1 - i / 4, 1 - (i + 1) / 4) for i in range(4)], atol=1e-6)


def test_curve_holds_the_load_of_every_expert(watched: tuple[Checkpoint, list[Figures], ALBUM]) -> None:
    kept, heard, _ = watched
    assert len(heard) == OPTIONS.steps
    curve = json.loads((kept.folder / CURVE).read_bytes())
    assert [row["step"] for row in curve] == [1, 11, 21, 26]
    for row in curve:
        figures = heard[row["step"] - 1]
        assert {name: row[name] for name in figures.numbers()} == figures.numbers()
        assert np.array(row["load"]).shape == (CONFIG.blocks, CONFIG.shape.experts)
        np.testing.assert_allclose(row["load"], figures.load, atol=1e-5)
        assert all(0 < row[f"expert_entropy.{block:02d}"] <= 1 for block in range(CONFIG.blocks))


def test_entropy_tells_shared_work_from_one_busy_expert() -> None:
    numbers = Figures(1.0, 0.1, [[0.25] * 4, [0.9, 0, 0, 0], [0.1, 0.1, 0, 0]]).numbers()
    assert numbers["expert_entropy.00"] == pytest.approx(1)
    assert numbers["expert_entropy.01"] == pytest.approx(0)
    assert numbers["expert_entropy.02"] == pytest.approx(0.5)
    assert numbers["busiest_expert"] == 1
    assert Figures(1.0, 0.1, [[], []]).numbers() == {"loss": 1.0, "learning_rate": 0.1, "busiest_expert": 1.0}


def test_dense_network_has_figures_too(dataset: Dataset, tmp_path: Path) -> None:
    heard: list[Figures] = []
    dense = CONFIG.model_copy(update={"ablation": "dense"})
    options = OPTIONS.model_copy(update={"steps": 1})
    train(dense, dataset, VERSION, options, tmp_path, watcher=Watcher(lambda _, figures: heard.append(figures)))
    assert heard[0].load == [[]] * CONFIG.blocks


@pytest.mark.parametrize("where", [7, 20, 26])  # 20 is saved too; at 26 the weights are final, but not written
def test_run_cut_while_drawing_draws_again_and_ends_in_the_same_bits(
    unwatched: Checkpoint, watched: tuple[Checkpoint, list[Figures], ALBUM], dataset: Dataset, tmp_path: Path, where: int
) -> None:
    album: ALBUM = []

    def cut(step: int, *_: Any) -> None:
        if step == where:
            raise PowerCut

    with pytest.raises(PowerCut):
        train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=Watcher(samples=cut))
    resumed = train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=Watcher(samples=lambda *sample: album.append(sample)))
    assert resumed.weights_sha256 == unwatched.weights_sha256
    missing = [row for row in watched[2] if row[0] >= where]
    assert [step for step, *_ in album] == [step for step, *_ in missing]
    assert all(np.array_equal(again[2], first[2]) for again, first in zip(album, missing, strict=True))


def test_only_the_first_process_is_heard(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("the second process said something")

    monkeypatch.setattr(Ranks, "here", lambda *_: Ranks(1, 2))
    for name in ("average", "wait"):
        monkeypatch.setattr(Ranks, name, lambda *_: None)
    with pytest.raises(CheckpointError):  # the first one, which would write it, is not there
        train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=Watcher(forbidden, forbidden))


@pytest.mark.parametrize(("steps", "points"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (400, {100, 200, 300, 400})])
def test_short_runs_draw_less_often(steps: int, points: set[int]) -> None:
    assert sampled_after(steps) == points


def test_drawing_leaves_the_process_where_it_was(checkpoint: Checkpoint, dataset: Dataset) -> None:
    network = checkpoint.network()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    draw(network, dataset, FlowMatching.preview)
    assert torch.equal(torch.rand(4), wanted)
