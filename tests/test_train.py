"""Training: the same inputs give the same bits, killed or not; what is unfinished never looks finished."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.data import Dataset, prepare
from model.errors import CheckpointError, ConfigError, TrainingError
from model.network import Network
from model.train import (
    CURVE,
    LINEAGE,
    RESUME,
    WEIGHTS,
    Checkpoint,
    FlowMatching,
    Ranks,
    Rows,
    TrainOptions,
    diverged,
    learning_rate,
    load_checkpoint,
    load_weights,
    round_to_stored,
    round_update,
    train,
)
from model.watch import Figures, Watcher

from .conftest import CONFIG, VERSION

ROOT = Path(__file__).parents[1]
OPTIONS = TrainOptions(steps=16, batch=4, warmup=2, learning_rate=4e-3, save_every=5)
FRESH = TrainOptions(steps=1, batch=1, warmup=0, learning_rate=1e-12, weight_decay=0, ema=0)


class PowerCut(Exception):  # noqa: N818
    """Ends a run in the middle, as a power cut does."""


def cut_after(step: int) -> Watcher:
    def on_step(number: int, figures: Figures) -> None:
        if number == step:
            raise PowerCut

    return Watcher(on_step)


def forbidden(number: int, figures: Figures) -> None:
    raise AssertionError(f"step {number} was trained again")


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Train the run with which all others are compared."""
    return train(CONFIG, dataset, VERSION, OPTIONS, tmp_path_factory.mktemp("undisturbed"))


def test_same_inputs_give_same_bits(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    torch.rand(5)  # what the process drew before does not matter
    again = train(CONFIG, dataset, VERSION, OPTIONS, tmp_path)
    assert again.weights_sha256 == undisturbed.weights_sha256
    assert again.lineage == undisturbed.lineage


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch": 7}, {"learning_rate": 3e-3}, {"ema": 0.5}, {"caption_dropout": 0.9}])
def test_every_option_changes_weights(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path, other: dict[str, float]) -> None:
    changed = train(CONFIG, dataset, VERSION, OPTIONS.model_copy(update=other), tmp_path)
    assert changed.weights_sha256 != undisturbed.weights_sha256
    assert changed.lineage.training_sha256 != undisturbed.lineage.training_sha256


class Recording(FlowMatching):
    """The usual objective, which keeps the captions that it was given and the targets for the network."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.ids, self.targets = scale, list[torch.Tensor](), list[torch.Tensor]()

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        rows = super().rows(dataset, options, step)
        self.ids.append(rows.ids.clone())
        self.targets.append(self.scale * rows.velocity)
        return rows._replace(velocity=self.targets[-1])


@pytest.mark.parametrize(("dropout", "least", "most"), [(0.0, 0.0, 0.0), (0.1, 0.04, 0.18), (0.9, 0.82, 0.96), (1.0, 1.0, 1.0)])
def test_so_many_captions_are_hidden_as_asked_for(
    dataset: Dataset, tmp_path: Path, dropout: float, least: float, most: float
) -> None:
    seen = Recording()
    options = FRESH.model_copy(update={"steps": 4, "batch": 64, "caption_dropout": dropout})
    train(CONFIG, dataset, VERSION, options, tmp_path, objective=seen)
    hidden = torch.cat(seen.ids).eq(0).all(dim=1).float().mean().item()
    assert least <= hidden <= most


def test_loss_is_the_mean_square_of_what_is_missed(dataset: Dataset, tmp_path: Path) -> None:
    seen, losses = Recording(), list[float]()
    options = FRESH.model_copy(update={"batch": 16})
    train(
        CONFIG,
        dataset,
        VERSION,
        options,
        tmp_path,
        objective=seen,
        watcher=Watcher(lambda _, figures: losses.append(figures.loss)),
    )
    missed = torch.cat(seen.targets)  # a new network answers 0
    assert losses == [pytest.approx(float(missed.square().mean()), rel=1e-3)]


def test_gradient_of_a_bad_batch_is_clipped(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *given: object) -> object:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    options = FRESH.model_copy(update={"batch": 4, "clip": 0.5})
    train(CONFIG, dataset, VERSION, options, tmp_path, objective=Recording(1e4))
    assert norms == [pytest.approx(0.5, rel=1e-3)]


def test_weights_decay_and_gains_and_biases_do_not(dataset: Dataset, tmp_path: Path) -> None:
    """Train a network that answers 0 where 0 is asked for: without a gradient, only the decay moves it."""
    before, after = (
        train(CONFIG, dataset, VERSION, FRESH.model_copy(update=more), tmp_path / name, objective=Recording(0.0)).network()
        for name, more in (("before", {}), ("after", {"learning_rate": 0.1, "weight_decay": 1.0}))
    )
    shrunk = dict[str, bool]()
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        if float(old.norm()):
            shrunk[name] = float(new.norm()) < 0.999 * float(old.norm())
    assert {name for name, found in shrunk.items() if found and name.endswith(("bias", "gain", "mod"))} == set()
    assert sum(shrunk.values()) > len(shrunk) / 3


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_rows_of_a_batch(world: int) -> None:
    rows = torch.arange(10)
    found = torch.cat([Ranks(rank, world).share(rows) for rank in range(world)])
    assert sorted(found.tolist()) == rows.tolist()


@pytest.mark.parametrize(
    ("ema", "decays"), [(0.9999, (1 / 10, 2 / 11, 3 / 12)), (0.15, (1 / 10, 0.15, 0.15)), (0.0, (0.0, 0.0, 0.0))]
)
def test_average_follows_the_weights(dataset: Dataset, tmp_path: Path, ema: float, decays: tuple[float, ...]) -> None:
    """Forget the beginning quickly at first, so that a short run is not averaged with noise."""
    options, average = OPTIONS.model_copy(update={"ema": ema, "save_every": 1}), dict[str, torch.Tensor]()
    for step, decay in enumerate(decays, start=1):
        with pytest.raises(PowerCut):
            train(CONFIG, dataset, VERSION, options, tmp_path, watcher=cut_after(step))
        kept = load_file(tmp_path / RESUME)
        network = {name.removeprefix("network."): value for name, value in kept.items() if name.startswith("network.")}
        found = {name.removeprefix("average."): value for name, value in kept.items() if name.startswith("average.")}
        moved = 0
        for name, value in found.items():
            if not value.is_floating_point():
                continue
            if average:
                assert torch.allclose(value, average[name] * decay + network[name] * (1 - decay), rtol=1e-4, atol=1e-7), name
            moved += int(not torch.equal(value, network[name]))
        assert (moved > 0) == (decay > 0)
        average = found


@pytest.mark.parametrize("step", [1, 5, 7, 15])
def test_resumed_run_ends_in_same_bits(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path, step: int) -> None:
    with pytest.raises(PowerCut):
        train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=cut_after(step))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    steps: list[int] = []
    resumed = train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=Watcher(lambda number, _: steps.append(number)))
    assert resumed.weights_sha256 == undisturbed.weights_sha256
    assert steps == list(range(step // 5 * 5 + 1, 17))  # nothing before the saved state is done again
    assert not (tmp_path / RESUME).exists()


def test_run_survives_repeated_cuts(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    for step in (6, 11, 12, 16):
        with pytest.raises(PowerCut):
            train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=cut_after(step))
    assert train(CONFIG, dataset, VERSION, OPTIONS, tmp_path).weights_sha256 == undisturbed.weights_sha256
    points = [point["step"] for point in json.loads((tmp_path / CURVE).read_text())]
    assert points == [1, 11, 16]  # the recorded curve has no point twice


def test_token_choice_balances_and_resumes_in_same_bits(dataset: Dataset, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"router": "token-choice"})
    whole = train(config, dataset, VERSION, OPTIONS, tmp_path / "whole")
    bias = whole.network().blocks[0].experts.gate_bias
    assert bool((bias != 0).any())
    assert bool((bias.abs() < 1e-3 * OPTIONS.steps + 1e-6).all())
    with pytest.raises(PowerCut):
        train(config, dataset, VERSION, OPTIONS, tmp_path / "cut", watcher=cut_after(7))
    assert train(config, dataset, VERSION, OPTIONS, tmp_path / "cut").weights_sha256 == whole.weights_sha256


RANKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from model.data import prepare
from model.train import TrainOptions, train
from tests.conftest import CONFIG, VERSION
config = CONFIG.model_copy(update={"router": sys.argv[3]})
train(config, prepare(Path(sys.argv[1]), config, Path(sys.argv[2]) / "cache", "key"), VERSION,
      TrainOptions.model_validate_json(sys.argv[4]), Path(sys.argv[2]) / "run")
"""


@pytest.mark.slow
@pytest.mark.parametrize("router", ["expert-choice", "token-choice"])
def test_two_processes_follow_the_curve_of_one(images: Path, dataset: Dataset, tmp_path: Path, router: str) -> None:
    """Run torchrun with two real processes.

    At every recorded step, the learning rate is the same and the loss is the same within 1e-4 of its value.
    """
    alone = train(CONFIG.model_copy(update={"router": router}), dataset, VERSION, OPTIONS, tmp_path / "alone")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    prepare(images, CONFIG.model_copy(update={"router": router}), tmp_path / "cache", "key")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    arguments = [str(images), str(tmp_path), router, OPTIONS.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    together = load_checkpoint(tmp_path / "run")
    curves = [json.loads((c.folder / CURVE).read_bytes()) for c in (alone, together)]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for one, two in zip(*curves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["learning_rate"] == one["learning_rate"]
    assert together.lineage == alone.lineage


def test_batch_that_processes_cannot_share_is_refused(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="a batch of 4 cannot be shared by 3 processes; choose a multiple of 3"):
        train(CONFIG, dataset, VERSION, OPTIONS, tmp_path)


@pytest.mark.parametrize(
    ("losses", "answer"),
    [
        ([1.8] * 40, False),  # it never learned, but it did not run away
        ([1.8, 1.0, *[0.2] * 20, *[5.0] * 5], True),
        ([1.8, 1.0, *[0.2] * 20, 9.0, *[0.2] * 4], False),  # one bad batch
        ([0.2] * 5 + [5.0] * 4, False),  # too early to tell
    ],
)
def test_only_a_loss_that_left_for_good_is_divergence(losses: list[float], answer: bool) -> None:
    assert diverged(losses) is answer


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_torn_state_costs_only_time(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path, keep: float) -> None:
    with pytest.raises(PowerCut):
        train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, watcher=cut_after(12))
    state = (tmp_path / RESUME).read_bytes()
    (tmp_path / RESUME).write_bytes(state[: int(keep * len(state))])
    assert train(CONFIG, dataset, VERSION, OPTIONS, tmp_path).weights_sha256 == undisturbed.weights_sha256


@pytest.mark.parametrize("other", [{"options": OPTIONS.model_copy(update={"seed": 1})}, {"rev": "1" * 40}])
def test_foreign_state_is_not_resumed(dataset: Dataset, tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(PowerCut):
        train(CONFIG, dataset, VERSION, OPTIONS, tmp_path / "mixed", watcher=cut_after(12))

    def run(folder: Path, steps: list[int]) -> Checkpoint:
        return train(
            CONFIG,
            dataset,
            VERSION.model_copy(update={"rev": other.get("rev", VERSION.rev)}),
            other.get("options", OPTIONS),
            folder,
            watcher=Watcher(lambda number, _: steps.append(number)),
        )

    steps: list[int] = []
    mixed = run(tmp_path / "mixed", steps)
    assert steps == list(range(1, 17))
    assert mixed.weights_sha256 == run(tmp_path / "alone", []).weights_sha256


def test_finished_run_trains_nothing(undisturbed: Checkpoint, dataset: Dataset) -> None:
    again = train(CONFIG, dataset, VERSION, OPTIONS, undisturbed.folder, watcher=Watcher(forbidden))
    assert again == undisturbed


def test_finished_run_of_others_is_replaced(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    other = OPTIONS.model_copy(update={"seed": 1})
    replaced = train(CONFIG, dataset, VERSION, other, folder)
    assert replaced.lineage.seed == 1
    assert replaced.weights_sha256 != undisturbed.weights_sha256


def test_old_lineage_never_names_new_weights(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    """End the run between its weights and its lineage: the old checkpoint must not claim the new weights."""
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    (folder / CURVE).unlink()
    (folder / CURVE).mkdir()  # writing the curve fails
    other = OPTIONS.model_copy(update={"seed": 1})
    with pytest.raises(IsADirectoryError):
        train(CONFIG, dataset, VERSION, other, folder)
    (folder / CURVE).rmdir()
    assert train(CONFIG, dataset, VERSION, OPTIONS, folder).weights_sha256 == undisturbed.weights_sha256


def test_loss_falls_and_is_recorded(checkpoint: Checkpoint) -> None:
    curve = json.loads((checkpoint.folder / CURVE).read_text())
    assert [point["step"] for point in curve] == [*range(1, 120, 10), 120]
    losses = [point["loss"] for point in curve]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert all(0.25 <= point["busiest_expert"] <= 1 for point in curve)  # of four experts
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(curve))


def test_lineage_tells_origin(checkpoint: Checkpoint, dataset: Dataset) -> None:
    lineage = load_checkpoint(checkpoint.folder).lineage
    assert lineage.data == VERSION
    assert lineage.config == CONFIG
    assert lineage.parent is None
    assert lineage.items == len(dataset.training()) < len(dataset.images)
    assert lineage.torch == torch.__version__


def test_warm_start_begins_at_parent(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    child = train(CONFIG, dataset, VERSION, FRESH, tmp_path, parent=checkpoint)
    assert child.lineage.parent == checkpoint.weights_sha256
    theirs = checkpoint.network().state_dict()
    for name, weight in child.network().state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-9)


def test_parent_is_left_alone(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
    train(CONFIG, dataset, VERSION, OPTIONS, tmp_path, parent=checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()} == before


def test_parent_of_other_shape_is_refused(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    other = CONFIG.model_copy(update={"configuration": "II"})
    with pytest.raises(CheckpointError, match="another network than test/II"):
        train(other, dataset, VERSION, OPTIONS, tmp_path, parent=checkpoint, watcher=Watcher(forbidden))


# One learning rate is too high from the start. Of the other, only the weights of the last step show that it is too high.
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (OPTIONS.model_copy(update={"learning_rate": 1e30}), r"the loss of step \d+ is not finite.*below 1e\+30"),
        (FRESH.model_copy(update={"learning_rate": 1e39}), r"weights that are not finite.*below 1e\+39"),
    ],
)
def test_diverged_run_leaves_no_checkpoint(dataset: Dataset, tmp_path: Path, options: TrainOptions, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        train(CONFIG, dataset, VERSION, options, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_diverged_run_keeps_older_checkpoint(undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    with pytest.raises(TrainingError):
        train(CONFIG, dataset, VERSION, OPTIONS.model_copy(update={"learning_rate": 1e30}), folder)
    assert load_checkpoint(folder) == replace(undisturbed, folder=folder)


def test_broken_images_stop_training(dataset: Dataset, tmp_path: Path) -> None:
    """Stop the run at step 8, whose loss is not a number; the state of step 5 stays for whoever looks into it."""

    class Poisoned(Dataset):
        def batch(self, seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
            images, ids = super().batch(seed, step, size)
            return (images * math.nan if step == 7 else images), ids

    poisoned = Poisoned(**vars(dataset))
    with pytest.raises(TrainingError, match="the loss of step 8 is not finite"):
        train(CONFIG, poisoned, VERSION, OPTIONS, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RESUME]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / RESUME).values())


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def weights_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def weights_cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def weights_empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def weights_foreign(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04 a pickle in a zip" * 100)


def lineage_missing(folder: Path) -> None:
    (folder / LINEAGE).unlink()


def lineage_cut(folder: Path) -> None:
    (folder / LINEAGE).write_bytes((folder / LINEAGE).read_bytes()[:-20])


def lineage_foreign(folder: Path) -> None:
    (folder / LINEAGE).write_text('{"model": "another program\'s"}')


def lineage_newer(folder: Path) -> None:
    lineage = json.loads((folder / LINEAGE).read_text())
    (folder / LINEAGE).write_text(json.dumps({**lineage, "schema_version": 2}))


DAMAGES = [
    missing, weights_missing, weights_cut, weights_empty, weights_foreign,
    lineage_missing, lineage_cut, lineage_foreign, lineage_newer,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(checkpoint.folder, tmp_path / "run"))
    damage(folder)
    with pytest.raises(
        CheckpointError, match="is not a checkpoint of this version, or is damaged; name a folder that `train` wrote"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize("damage", [weights_cut, weights_missing, lineage_cut])
def test_damaged_checkpoint_is_trained_again(
    undisturbed: Checkpoint, dataset: Dataset, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path / "run"))
    damage(folder)
    assert train(CONFIG, dataset, VERSION, OPTIONS, folder).weights_sha256 == undisturbed.weights_sha256


@pytest.mark.parametrize(
    ("change", "name"),
    [({"configuration": "II"}, "test/II at 16 pixels"), ({"tier": "nano"}, "nano/I at 16"), ({"channels": 3}, "test/I at 16")],
)
def test_weights_of_other_network_are_refused(checkpoint: Checkpoint, change: dict[str, object], name: str) -> None:
    network = Network(CONFIG.model_copy(update=change))
    with pytest.raises(CheckpointError, match=f"another network than {name}"):
        load_weights(network, checkpoint.folder / WEIGHTS)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{}"])
def test_unreadable_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_weights(Network(CONFIG), tmp_path / WEIGHTS)


@pytest.fixture
def pair(checkpoint: Checkpoint, changed: Callable[[str, float], Checkpoint]) -> tuple[Network, Network]:
    """Provide a network a small step away from its parent, and the parent."""
    return changed("rounding", 0.05).network(), checkpoint.network()


@pytest.mark.parametrize("grid", [0.5, 2.0, 3.0])
@torch.no_grad()
def test_rounded_update_lies_on_grid(pair: tuple[Network, Network], grid: float) -> None:
    ours, parent = pair
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    round_update(ours, parent, grid)
    unchanged = total = 0
    for name, weight in ours.named_parameters():
        start = parent.get_parameter(name)
        step = grid * (before[name] - start).square().mean().sqrt()
        if step == 0:  # a tensor that training left alone
            assert torch.equal(weight, before[name])
            continue
        steps = (weight - start) / step
        assert float((steps - steps.round()).abs().max()) < 1e-3
        assert float((weight - before[name]).abs().max()) <= float(step) * 0.501  # each went to the nearest point
        small = (before[name] - start).abs() < 0.499 * step
        assert torch.equal(weight[small], start[small])  # equal to the bit, or the delta would grow
        unchanged, total = unchanged + int((weight == start).sum()), total + weight.numel()
    assert unchanged / total > {0.5: 0.15, 2.0: 0.6, 3.0: 0.8}[grid]


def test_coarser_grid_changes_fewer_weights(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path) -> None:
    parent = checkpoint.network().state_dict()
    shares = []
    for grid in (0.0, 1.0, 3.0):
        options = OPTIONS.model_copy(update={"update_grid": grid})
        child = train(CONFIG, dataset, VERSION, options, tmp_path / str(grid), parent=checkpoint).network().state_dict()
        same = sum(int((child[name] == weight).sum()) for name, weight in parent.items())
        shares.append(same / sum(weight.numel() for weight in parent.values()))
    off, fine, coarse = shares
    assert off < 0.15  # bytes that no caption holds, and the unused bias, never change
    assert 0.3 < fine < coarse < 1


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_update_of_what_devices_have_is_whole_steps(checkpoint: Checkpoint, dataset: Dataset, tmp_path: Path, kind: str) -> None:
    options = OPTIONS.model_copy(update={"stored": kind, "update_grid": 2.0})
    fielded = train(CONFIG, dataset, VERSION, options, tmp_path / "first")
    child = train(CONFIG, dataset, VERSION, options.model_copy(update={"seed": 1}), tmp_path / "second", parent=fielded)
    stored = getattr(torch, kind)
    moved = 0
    for name, old in fielded.network().state_dict().items():
        new = child.network().state_dict()[name]
        assert torch.equal(old, old.to(stored).float())  # the checkpoint is what devices have
        assert torch.equal(new, new.to(stored).float())
        change = (new - old)[new != old].abs()
        if change.numel() > 100:  # nothing moved by less than a step, but for rounding
            rounding = old.abs().amax() * torch.finfo(stored).eps
            assert float(change.min()) > 0.5 * float(change.median()) - float(rounding)
            moved += 1
    assert moved > 5


def test_precision_without_rounding_leaves_weights_alone(pair: tuple[Network, Network]) -> None:
    ours, _ = pair
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    for kind in ("float32", "int8"):
        round_to_stored(ours, kind)
        assert all(torch.equal(weight, before[name]) for name, weight in ours.named_parameters())


def test_grid_of_zero_is_off(pair: tuple[Network, Network]) -> None:
    ours, parent = pair
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    round_update(ours, parent, 0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in ours.named_parameters())


def test_rate_rises_stays_and_falls() -> None:
    options = TrainOptions(steps=100, warmup=10, learning_rate=1.0, decay_from=0.6)
    rates = [learning_rate(options, step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[:11] == sorted(set(rates[:11]))
    assert set(rates[10:61]) == {1.0}
    assert rates[60:] == sorted(set(rates[60:]), reverse=True)
    assert rates[80] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.03


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 5, "warmup": 50}, {"decay_from": 1.0}, {"decay_from": 0.0}])
def test_rate_never_leaves_its_range(options: dict[str, float]) -> None:
    made = TrainOptions(learning_rate=0.01, **options)
    assert all(0 < learning_rate(made, step) <= 0.01 for step in range(made.steps))
