"""Updates: the published weights are what devices compute from the old ones and the factors; what is left stays in the master."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model.config import PrecisionName
from model.data import Dataset
from model.errors import CheckpointError
from model.export import export, pack
from model.gradients import STATISTICS, Gradients
from model.graph import build, layout, scaled_axis
from model.network import Network
from model.polish import polish
from model.publish import Publication, publish, publish_first
from model.scorecard import Lineage
from model.shared_numbers import COUNT, places, seed_of, spread
from model.storage import dequantised, fielded, named, quantise
from model.train import MASTER, RESUME, WEIGHTS, Checkpoint, FlowMatching, TrainOptions, load_checkpoint, start_of, train
from model.update import (
    FACTORS,
    MAX_FACTOR,
    MAX_RANK,
    Approximation,
    MethodName,
    Product,
    Seeded,
    approximate,
    predicted,
    stepped,
)
from model.watch import Figures, Watcher
from ota.delta import files, numbers
from ota.delta.factors import read

from .conftest import CAPTIONS, CONFIG, SAMPLER, VERSION

OPTIONS = TrainOptions(steps=15, batch=8, warmup=2, learning_rate=4e-3, save_every=4, method="lowrank")
PRECISIONS: list[PrecisionName] = ["float32", "bfloat16", "float16", "int8"]


@pytest.fixture(scope="module")
def first(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Publish a first version, stored as bfloat16."""
    folder = tmp_path_factory.mktemp("first")
    options = OPTIONS.model_copy(update={"steps": 60})
    return publish_first(train(CONFIG, dataset, VERSION, options, folder / "master"), "bfloat16", folder / "published")


@pytest.fixture(scope="module")
def master(first: Checkpoint, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Retrain the first version."""
    return train(CONFIG, dataset, VERSION, OPTIONS, tmp_path_factory.mktemp("master"), parent=first)


def _bits(values: np.ndarray, stored: PrecisionName) -> np.ndarray:
    """Return the bit patterns in which devices store values."""
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
    made = torch.from_numpy(np.array(values)).to(kinds[stored]).contiguous().view(torch.uint8).numpy()
    return made.reshape(-1).view(numbers.KINDS[stored].dtype)


def _awkward(stored: PrecisionName, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw numbers that a precision can store: usual, tiny, denormal, zero, huge and infinite ones."""
    if stored == "int8":
        return rng.integers(-127, 128, count).astype(np.float32)
    kind = getattr(torch, stored)
    least, most = torch.finfo(kind).smallest_normal, torch.finfo(kind).max
    values = rng.normal(0, 0.1, count)
    special = [0.0, -0.0, least, -least, least / 2, most, -most, math.inf, -math.inf, least * 1.5, 1.0]
    at = rng.permutation(count)[: 4 * len(special)]
    values[at] = np.resize(special, len(at))
    return torch.from_numpy(values).to(kind).float().numpy()


@pytest.mark.parametrize("stored", PRECISIONS)
@pytest.mark.parametrize(
    ("rank", "exponent", "size"), [(1, -20, 2**20), (7, -9, 40), (32, -48, MAX_FACTOR), (32, -12, 3), (3, 90, 9)]
)
def test_model_predicts_what_the_codec_predicts_bit_by_bit(stored: PrecisionName, rank: int, exponent: int, size: int):
    rng = np.random.default_rng(rank)
    old = _awkward(stored, 40 * 24, rng)
    left, right = (rng.integers(-size, size + 1, shape, dtype=np.int32) for shape in ((40, rank), (rank, 24)))
    left[3], right[:, 5] = MAX_FACTOR, -MAX_FACTOR
    wanted = numbers.predicted(_bits(old, stored), left, right, exponent, numbers.KINDS[stored])
    ours = predicted(torch.from_numpy(old).view(40, 24), torch.from_numpy(left), torch.from_numpy(right), exponent, stored)
    assert np.array_equal(_bits(ours.numpy(), stored), wanted)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-3, 0.3, 1e-42, 3e38, 6e-6])
def test_model_steps_as_the_codec_steps_bit_by_bit(stored: PrecisionName, size: float):
    rng = np.random.default_rng(5)
    old, step = _awkward(stored, 999, rng), np.float32(size)
    steps = rng.integers(-3, 4, 999, dtype=np.int32)
    wanted = numbers.stepped(_bits(old, stored), steps, step, numbers.KINDS[stored])
    ours = stepped(torch.from_numpy(old), torch.from_numpy(steps), float(step), stored)
    assert np.array_equal(_bits(ours.numpy(), stored), wanted)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, seed_of("d1ce0000ffff0001" + 48 * "0")])
def test_model_spreads_shared_numbers_as_the_codec_does(seed: int):
    for place, shape in ((0, (7, 3)), (2**40 - 70_000, (70_000,)), (12345, (2, 3, 4, 5))):
        chosen, sign = spread(seed, place, shape)
        wanted, negative = numbers.spread(seed, COUNT, place, math.prod(shape))
        assert chosen.shape == sign.shape == shape
        assert np.array_equal(chosen.reshape(-1).numpy(), wanted.astype(np.int64))
        assert np.array_equal(sign.reshape(-1).numpy(), np.where(negative, -1.0, 1.0))


def _stored_tensors(network: Network, stored: PrecisionName) -> dict[str, bytes]:
    """Cut the weight file of a network into the bytes of its tensors."""
    weights = pack(network, stored)
    return {t.name: weights[t.offset : t.offset + t.length] for t in layout(network.config, stored)[0]}


@pytest.mark.parametrize("stored", PRECISIONS)
@pytest.mark.parametrize("way", ["fine", "coarse", "polished"])
def test_published_file_is_what_a_device_computes_from_the_old_one_and_the_factors(
    first: Checkpoint, master: Checkpoint, dataset: Dataset, tmp_path: Path, stored: PrecisionName, way: str
):
    if way == "polished":
        made = Publication.of(master, first, stored).write_polished(0.03, tmp_path, dataset, OPTIONS, steps=3)
    else:
        made = publish(master, first, {"fine": 0.003, "coarse": 0.03}[way], stored, tmp_path)
    before, after = (_stored_tensors(of.network(), stored) for of in (first, made))
    factors = load_file(tmp_path / FACTORS)
    with safe_open(tmp_path / FACTORS, framework="pt") as file:
        said = json.loads(file.metadata()["deltaferry"])
    assert said["schema_version"] == 1
    assert len(said["products"]) > 5
    for tensor in layout(CONFIG, stored)[0]:
        kind, name = numbers.KINDS[tensor.stored], tensor.in_graph
        new = old = np.frombuffer(before[tensor.name], kind.dtype)
        if name in said["products"]:
            left, right = (factors[f"{name}.{side}"].numpy() for side in ("left", "right"))
            new = numbers.predicted(old, left, right, said["products"][name], kind)
        elif name in said["steps"]:
            new = numbers.stepped(old, factors[f"{name}.steps"].numpy(), np.float32(float.fromhex(said["steps"][name])), kind)
        assert new.tobytes() == after[tensor.name], name


@pytest.fixture(scope="module")
def sharing(first: Checkpoint, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Retrain the first version by shared numbers."""
    options = OPTIONS.model_copy(update={"method": "seeded", "weight_decay": 0.5})
    return train(CONFIG, dataset, VERSION, options, tmp_path_factory.mktemp("sharing"), parent=first)


@pytest.mark.parametrize("stored", PRECISIONS)
@pytest.mark.parametrize("way", ["rounded", "polished"])
def test_update_of_shared_numbers_is_what_a_device_computes_and_takes_no_more_bytes_than_they(
    first: Checkpoint, sharing: Checkpoint, dataset: Dataset, tmp_path: Path, stored: PrecisionName, way: str
):
    publication = Publication.of(sharing, first, stored, "seeded")
    if way == "polished":
        made = publication.write_polished(0.25, tmp_path / "made", dataset, OPTIONS, steps=3)
    else:
        made = publication.write(0.25, tmp_path / "made")
    for name, of in (("old", first), ("new", made)):
        (tmp_path / name).write_bytes(pack(of.network(), stored))
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(build(CONFIG, stored).SerializeToString(deterministic=True))
    old, new, patch = (tmp_path / name for name in ("old", "new", "patch"))
    size = files.build(old, new, patch, graph, factors=made.folder / FACTORS).size
    files.apply(old, patch, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == new.read_bytes()
    claims = read(made.folder / FACTORS)
    alike = [claim for claim in claims.values() if claim.shared]
    assert {(claim.seed, claim.places, claim.shared) for claim in alike} == {
        (seed_of(first.weights_sha256), alike[0].places, COUNT)
    }
    whole = {t.in_graph for t in layout(CONFIG, stored)[0] if t.stored == "int8"}
    assert alike
    assert whole.isdisjoint(claims)
    if whole:
        return
    bits = np.log2(np.abs(alike[0].shared_numbers().steps) + 1.1).sum() + 1.5 * COUNT
    assert size < bits / 8 + 700
    assert {t.in_graph for t in layout(CONFIG, stored)[0] if t.name in places(CONFIG)} == {claim.name for claim in alike}
    told = {part.kind for part in files.inspect(patch, new, graph, old)[1] if part.length > 1024}
    assert told <= {"update"}


def test_every_update_shares_numbers_anew(first: Checkpoint, sharing: Checkpoint, dataset: Dataset, tmp_path: Path):
    made = publish(sharing, first, 0.25, "bfloat16", tmp_path / "made", "seeded")
    assert seed_of(made.weights_sha256) != seed_of(first.weights_sha256)
    options = OPTIONS.model_copy(update={"method": "seeded", "steps": 3})
    again = train(CONFIG, dataset, VERSION, options, tmp_path / "again", parent=made)
    before, after = (load_file(path) for path in (made.folder / MASTER, again.folder / WEIGHTS))
    chosen, sign = spread(seed_of(made.weights_sha256), places(CONFIG)["text"], before["text"].shape)
    moved = (after["text"] - before["text"]) * sign
    for number in chosen.unique()[:20]:
        alike = moved[chosen == number]
        assert float(alike.max() - alike.min()) < 1e-6
    assert float(moved.abs().max()) > 1e-4


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_codec_finds_every_claim_of_an_export(first: Checkpoint, master: Checkpoint, tmp_path: Path, stored: PrecisionName):
    made = publish(master, first, 0.01, stored, tmp_path / "made")
    for name, of in (("old", first), ("new", made)):
        (tmp_path / name).write_bytes(pack(of.network(), stored))
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(build(CONFIG, stored).SerializeToString(deterministic=True))
    old, new, patch = (tmp_path / name for name in ("old", "new", "patch"))
    files.build(old, new, patch, graph, factors=made.folder / FACTORS)
    told = {part.kind for part in files.inspect(patch, new, graph, old)[1] if part.length > 1024}
    assert "update" in told
    assert not told & {"numbers", "beside", "zstd"}  # nothing of size was left to guessing


def test_int8_scales_stay_when_an_update_moves_the_largest_numbers(first: Checkpoint):
    master = first.network()
    with torch.no_grad():
        for weight in named(master).values():
            weight.mul_(1.4).add_(0.1 * weight.abs().max() * weight.sign())
    update = approximate(master, first.network(), {}, 1e-4, "int8")
    before, after = _stored_tensors(first.network(), "int8"), _stored_tensors(update.network(), "int8")
    assert all(after[name] == before[name] for name in before if name.endswith(".scale"))
    assert sum(after[name] != before[name] for name in before) > 5


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.009])
def test_weights_on_an_int8_grid_are_stored_again_in_the_same_bytes(first: Checkpoint, factor: float):
    network = first.network()
    with torch.no_grad():
        for name, weight in named(network).items():
            weight.copy_(fielded(name, weight, "int8"))
            whole = torch.round(weight * factor * 2**20) * 2.0**-20 if factor == 1.0 else weight
            weight.copy_(whole)
    once = pack(network, "int8")
    with torch.no_grad():
        for name, weight in named(network).items():
            weight.copy_(fielded(name, weight, "int8"))
    assert pack(network, "int8") == once


def test_larger_level_leaves_fewer_numbers_and_loses_more(first: Checkpoint, master: Checkpoint):
    approximation = Publication.of(master, first, "bfloat16").approximation
    numbers_sent, missed = [], []
    for level in (0.001, 0.01, 0.03, 0.1, 0.3, 3.0):
        update = approximation.at(level)
        sent = [t for c in update.claims.values() for t in ((c.left, c.right) if isinstance(c, Product) else (c.steps,))]
        numbers_sent.append(sum(int(t.count_nonzero()) for t in sent))
        weights = named(master.network())
        missed.append(sum(float((weights[name] - new).square().sum()) for name, new in update.weights.items()))
    assert numbers_sent == sorted(numbers_sent, reverse=True)
    assert numbers_sent[-1] == 0
    assert missed[0] < 0.2 * missed[-1]


@torch.inference_mode()
def _loss(network: Network, dataset: Dataset) -> float:
    """Compute the flow-matching loss of a network on batches that no training of these tests draws."""
    total = 0.0
    for step in range(8):
        rows = FlowMatching().rows(dataset, OPTIONS.model_copy(update={"batch": 32, "seed": 99}), step)
        total += float((network(rows.x, rows.t, rows.r, rows.ids)[0] - rows.velocity).square().mean())
    return total


def test_polished_update_is_better_and_takes_no_more_components(first: Checkpoint, master: Checkpoint, dataset: Dataset):
    approximation = Publication.of(master, first, "bfloat16").approximation
    rough = approximation.at(0.1)
    options = OPTIONS.model_copy(update={"batch": 16, "learning_rate": 2e-3})
    polished = polish(approximation, rough, dataset, options, steps=40)
    assert _loss(polished.network(), dataset) < _loss(rough.network(), dataset)
    assert polished.claims.keys() <= rough.claims.keys()
    for name, claim in polished.claims.items():
        before = rough.claims[name]
        if isinstance(claim, Product) and isinstance(before, Product):
            assert claim.left.shape[1] <= before.left.shape[1]
        else:
            assert claim.size == before.size
    once, again = (polish(approximation, rough, dataset, options, steps=2) for _ in range(2))
    assert all(torch.equal(weight, again.weights[name]) for name, weight in once.weights.items())


@pytest.mark.parametrize("spread", [1.0, 1e6, 1e20])
def test_factors_that_overflow_get_coarser_steps(spread: float):
    generator = torch.Generator().manual_seed(1)
    wide = CONFIG.model_copy(update={"tier": "nano"})  # matrices with more than 32 rows and columns
    old, new = Network(wide), Network(wide)
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        for weight in named(new).values():
            if weight.dim() == 2 and min(weight.shape) >= 16:
                sides = [torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 40), (40, weight.shape[1]))]
                weight.add_((sides[0] * torch.logspace(0, -math.log10(spread), 40)) @ sides[1])
    update = approximate(new, old, {}, 1e-9, "float32")
    products = [claim for claim in update.claims.values() if isinstance(claim, Product)]
    assert products
    for claim in products:
        assert claim.left.shape[1] == claim.right.shape[0] <= MAX_RANK
        assert max(int(side.abs().max()) for side in (claim.left, claim.right)) <= MAX_FACTOR
        assert abs(claim.exponent) <= 100
    name = "block0.qkv"
    change = named(new)[name] - named(old)[name]
    share = float((update.weights[name] - named(new)[name]).square().sum() / change.square().sum())
    assert share < (0.3 if spread == 1 else 1e-4)  # coarser, not wrong


def test_master_that_is_not_finite_is_refused(first: Checkpoint):
    bad = first.network()
    with torch.no_grad():
        bad.stem.weight[0] = math.inf
    with pytest.raises(CheckpointError, match=r"stem\.weight holds a weight that is not finite"):
        Approximation.of(bad, first.network(), {}, "float32")


def test_small_tensors_leaves_every_matrix_alone(first: Checkpoint, dataset: Dataset, tmp_path: Path):
    options = OPTIONS.model_copy(update={"method": "small-tensors", "weight_decay": 0.5})
    trained = train(CONFIG, dataset, VERSION, options, tmp_path / "master", parent=first)
    made = publish(trained, first, 0.7, "bfloat16", tmp_path / "made", "small-tensors")
    before, after = named(first.network()), named(made.network())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "stem.weight" in moved
    assert {"text", "block0.qkv", "block1.expert0.w13"}.isdisjoint(moved)


def test_statistics_are_the_means_of_gradient_products():
    network = Network(CONFIG)
    gradients, wanted = Gradients(network), {"left": 0.0, "right": 0.0}
    for step in range(3):
        for weight in network.parameters():
            weight.grad = (
                torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) if weight.requires_grad else None
            )
        gradients.add(network)
        expert = network.blocks[1].experts.w2.grad[2]
        wanted["left"] = wanted["left"] + expert @ expert.T / 3
        wanted["right"] = wanted["right"] + expert.T @ expert / 3
    means = gradients.means()
    torch.testing.assert_close(means["left.block1.expert2.w2"], wanted["left"])
    torch.testing.assert_close(means["right.block1.expert2.w2"], wanted["right"])
    assert not any(name.endswith((".dw", "gate_bias", "stem.weight")) for name in means)  # these are no matrices


GRID = OPTIONS.model_copy(update={"method": "grid", "update_grid": 3.0})


@pytest.fixture(scope="module")
def gridded(first: Checkpoint, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Retrain the first version for a grid."""
    return train(CONFIG, dataset, VERSION, GRID, tmp_path_factory.mktemp("gridded"), parent=first)


def test_grid_is_the_one_that_the_second_half_of_the_training_saw(first: Checkpoint, gridded: Checkpoint, master: Checkpoint):
    sizes = load_file(gridded.folder / STATISTICS)
    update = Publication.of(gridded, first, "bfloat16", "grid").approximation.at(99.0)  # the level was chosen before
    assert len(update.claims) > 20
    assert all(claim.size == float(sizes[f"size.{name}"]) for name, claim in update.claims.items())
    ours, plain = (named(of.network())["block0.qkv"] for of in (gridded, master))
    assert not torch.equal(ours, plain)  # the forward pass saw other weights
    change = (ours - named(first.network())["block0.qkv"]) / sizes["size.block0.qkv"]
    assert float((change - change.round()).abs().max()) > 0.2  # but the master itself is not rounded


@pytest.mark.parametrize("level", [0.1, 5.0])
def test_int8_under_a_grid_moves_by_steps_of_about_the_grid(first: Checkpoint, master: Checkpoint, level: float):
    """Move whole numbers by as many as a step of the grid holds, however fine the grid is; what has no step stays in the master."""
    update = Approximation.of(master.network(), first.network(), {}, "int8", "grid").at(level)
    coarse = 0
    for name, new in update.weights.items():
        old, axis = named(first.network())[name], scaled_axis(name)
        if axis is None:
            continue
        whole, scales = quantise(old, axis)
        scale = scales.unsqueeze(1 - axis)
        change = named(master.network())[name] - dequantised(whole, scales, axis)
        every = torch.round(level * change.square().mean().sqrt() / scale).clamp(min=1)
        moved = torch.round(new / scale) - whole
        kept = (moved + whole < 127) & (moved + whole > -128)
        assert bool((moved % every == 0)[kept].all())
        gap = (change / scale - moved).abs()
        assert bool((gap <= every / 2 + 1e-3)[kept].all())
        coarse += int((every > 1).any())
    assert (coarse > 5) == (level > 1)


@pytest.mark.parametrize("method", ["grid", "seeded"])
def test_polishing_leaves_alone_what_has_no_claim(first: Checkpoint, master: Checkpoint, dataset: Dataset, method: MethodName):
    approximation = Approximation.of(master.network(), first.network(), {}, "int8", method)
    rough = approximation.at(0.5)
    polished = polish(approximation, rough, dataset, OPTIONS, steps=1)
    assert torch.equal(polished.weights["block0.qkv"], rough.weights["block0.qkv"])
    assert "block0.qkv" not in rough.claims
    assert not torch.equal(
        rough.weights["block0.qkv"], approximation.at(1e9).weights["block0.qkv"]
    )  # there is something to leave alone


def test_weights_that_share_a_number_move_alike(first: Checkpoint, sharing: Checkpoint):
    before, after = (load_file(path) for path in (first.folder / MASTER, sharing.folder / WEIGHTS))
    moves = {name: after[name] - before[name] for name in ("text", "stem.weight", "ada.weight")}
    by_number: dict[int, list[float]] = {}
    for name, moved in moves.items():
        chosen, sign = spread(seed_of(first.weights_sha256), places(CONFIG)[name], moved.shape)
        for number, move in zip(chosen.flatten().tolist(), (moved * sign).flatten().tolist(), strict=True):
            by_number.setdefault(number, []).append(move)
    assert max(max(group) - min(group) for group in by_number.values()) < 1e-5
    assert max(abs(group[0]) for group in by_number.values()) > 1e-3
    update = Publication.of(sharing, first, "bfloat16", "seeded").approximation.at(0.25)
    wanted, seen = (named(of.network()) for of in (sharing, first))
    gap = torch.cat([(update.weights[name] - wanted[name]).flatten() for name in ("text", "stem.weight")])
    whole = torch.cat([(seen[name] - wanted[name]).flatten() for name in ("text", "stem.weight")])
    assert float(gap.square().sum()) < 0.1 * float(whole.square().sum())


def test_polished_shared_numbers_are_better(first: Checkpoint, sharing: Checkpoint, dataset: Dataset):
    approximation = Publication.of(sharing, first, "bfloat16", "seeded").approximation
    rough = approximation.at(2.0)
    options = OPTIONS.model_copy(update={"batch": 16, "learning_rate": 2e-3})
    polished = polish(approximation, rough, dataset, options, steps=40)
    assert _loss(polished.network(), dataset) < _loss(rough.network(), dataset)
    told = [claim for claim in polished.claims.values() if isinstance(claim, Seeded)]
    assert len(told) > 20
    assert all(torch.equal(claim.numbers, told[0].numbers) for claim in told)


@pytest.mark.parametrize(("cut", "which"), [(9, "master"), (13, "master"), (5, "gridded"), (13, "gridded")])
def test_killed_retraining_ends_in_the_same_master_and_statistics(
    first: Checkpoint, dataset: Dataset, tmp_path: Path, cut: int, which: str, request: pytest.FixtureRequest
):
    whole: Checkpoint = request.getfixturevalue(which)
    options = GRID if which == "gridded" else OPTIONS

    class PowerCutError(Exception):
        pass

    def on_step(number: int, _: Figures) -> None:
        if number == cut:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(CONFIG, dataset, VERSION, options, tmp_path, parent=first, watcher=Watcher(on_step))
    assert (tmp_path / RESUME).is_file()
    again = train(CONFIG, dataset, VERSION, options, tmp_path, parent=first)
    assert again.weights_sha256 == whole.weights_sha256
    assert (tmp_path / STATISTICS).read_bytes() == (whole.folder / STATISTICS).read_bytes()


def test_statistics_do_not_change_the_training(first: Checkpoint, master: Checkpoint, dataset: Dataset, tmp_path: Path):
    plain = OPTIONS.model_copy(update={"method": None})
    parent = tmp_path / "parent"
    shutil.copytree(first.folder, parent)
    shutil.copyfile(first.folder / MASTER, parent / WEIGHTS)  # as a training without a method starts from the weights
    again = train(CONFIG, dataset, VERSION, plain, tmp_path / "again", parent=load_checkpoint(parent))
    assert again.weights_sha256 == master.weights_sha256


def test_next_training_starts_from_the_master(first: Checkpoint, master: Checkpoint):
    assert first.lineage.master
    start = start_of(first, "shapes")
    assert (start.path, start.master) == (first.folder / MASTER, first.lineage.master)
    assert master.lineage.start_master == first.lineage.master
    assert master.lineage.start == "master"
    rounded = load_file(first.folder / WEIGHTS), load_file(first.folder / MASTER)
    assert any(not torch.equal(rounded[0][name], rounded[1][name]) for name in rounded[0])  # rounding is not lost


def _copy(of: Checkpoint, to: Path) -> Checkpoint:
    shutil.copytree(of.folder, to)
    return load_checkpoint(to)


def test_a_lost_master_is_replaced_by_the_fielded_weights_and_said(first: Checkpoint, dataset: Dataset, tmp_path: Path):
    parent = _copy(first, tmp_path / "parent")
    (parent.folder / MASTER).unlink()
    assert "starts from the fielded weights, because their master" in start_of(parent, "shapes").says
    assert start_of(parent, "shapes").says.endswith("is lost")
    made = train(CONFIG, dataset, VERSION, OPTIONS.model_copy(update={"steps": 2}), tmp_path / "made", parent=parent)
    assert (made.lineage.start, made.lineage.start_master) == ("fielded", None)


@pytest.mark.parametrize("damage", ["cut", "flipped", "of other weights"])
def test_a_damaged_master_is_replaced_by_the_fielded_weights_and_said(
    first: Checkpoint, master: Checkpoint, tmp_path: Path, damage: str
):
    parent = _copy(first, tmp_path / "parent")
    content = bytearray((parent.folder / MASTER).read_bytes())
    content[-3] ^= 1
    given = {"cut": content[:-1000], "flipped": content, "of other weights": (master.folder / WEIGHTS).read_bytes()}
    (parent.folder / MASTER).write_bytes(given[damage])
    start = start_of(parent, "shapes")
    assert (start.path, start.master) == (parent.folder / WEIGHTS, None)
    assert "is not their master" in start.says


def test_a_master_of_another_line_is_not_used(first: Checkpoint):
    start = start_of(first, "bottles")
    assert start.master is None
    assert start.says.endswith("their master is of another line, shapes")


def test_a_rollback_between_master_and_update_is_refused(first: Checkpoint, master: Checkpoint, tmp_path: Path):
    since = publish(master, first, 0.03, "bfloat16", tmp_path / "since")
    with pytest.raises(CheckpointError, match="rolled back since"):
        publish(master, since, 0.03, "bfloat16", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_what_an_update_cannot_carry_is_in_the_next_one(first: Checkpoint, master: Checkpoint, dataset: Dataset, tmp_path: Path):
    coarse = publish(master, first, 0.3, "bfloat16", tmp_path / "coarse")
    idle = OPTIONS.model_copy(update={"steps": 1, "learning_rate": 1e-9, "weight_decay": 0, "ema": 0})  # learns nothing new
    trained = train(CONFIG, dataset, VERSION, idle, tmp_path / "idle", parent=coarse)
    caught_up = publish(trained, coarse, 0.001, "bfloat16", tmp_path / "fine")

    def gap(ours: Checkpoint) -> float:
        theirs = named(master.network())
        return sum(float((weight - theirs[name]).square().sum()) for name, weight in named(ours.network()).items())

    assert gap(coarse) > 0.5 * gap(first)
    assert gap(caught_up) < 0.2 * gap(coarse)


def test_lineage_of_an_older_ferry_keeps_its_hash(master: Checkpoint):
    older = master.lineage.model_copy(update={"start_master": None})
    dumped = older.model_dump(mode="json")
    assert {"master", "start_master", "method", "level", "polished"}.isdisjoint(dumped)
    assert Lineage.model_validate(dumped) == older
    assert "method" not in TrainOptions().model_dump(mode="json")


def test_export_has_the_factors_beside_it_and_no_stale_ones(first: Checkpoint, master: Checkpoint, tmp_path: Path):
    made = publish(master, first, 0.03, "bfloat16", tmp_path / "made")
    out = tmp_path / "export"
    exported = export(made, "bfloat16", SAMPLER, list(CAPTIONS), 1000.0, out)
    assert (out / FACTORS).read_bytes() == (made.folder / FACTORS).read_bytes()
    assert exported.weights_sha256 == hashlib.sha256(pack(made.network(), "bfloat16")).hexdigest()
    (made.folder / FACTORS).unlink()
    export(made, "bfloat16", SAMPLER, list(CAPTIONS), 1000.0, out)
    assert not (out / FACTORS).exists()
