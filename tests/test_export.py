"""What is exported for the devices computes what was trained, and its bytes change only where weights change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from model import graph
from model.config import ModelConfig, PrecisionName, RouterName
from model.data import Dataset, to_unit
from model.drawing import sampler_of
from model.errors import DataError, ExportError
from model.export import Export, check_parity, export, image_statistics, pack, tensor_of, unpack
from model.graph import RECORD_ALIGNMENT, SCALE, TENSOR_ALIGNMENT, Tensor, build, layout, scaled_axis
from model.network import Network
from model.scorecard import Sampler
from model.session import Session, load, noise
from model.train import LINEAGE, Checkpoint, load_checkpoint
from ota.manifest import MAX_GOLDEN, MAX_TABLE, Reference, SamplerTable, parse
from tests.conftest import few

from .conftest import CAPTIONS, CONFIG, LATENCY_MS, SAMPLER

FILES = ("graph.onnx", "weights.bin", "sampler.json", "golden.npz", "reference.json")
PRECISIONS: tuple[PrecisionName, ...] = ("float32", "float16", "bfloat16", "int8")
LARGE = {
    "float32": float("inf"),
    "int8": float("inf"),
    "float16": 70_000.0,
    "bfloat16": 3.4e38,
}  # about the smallest number that each cannot hold


def config_of(configuration: str, channels: int = 1, tier: str = "test") -> ModelConfig:
    return ModelConfig.model_validate(
        {"tier": tier, "configuration": configuration, "image_size": 12, "channels": channels, "text_length": 6}
    )


def random_network(config: ModelConfig, seed: int = 0) -> Network:
    """Make a network in which every weight counts."""
    torch.manual_seed(seed)
    network = Network(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def student_of(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Copy a checkpoint, with the same weights, as a student of itself."""
    shutil.copytree(checkpoint.folder, folder)
    lineage = json.loads((folder / LINEAGE).read_text())
    (folder / LINEAGE).write_text(json.dumps({**lineage, "variant": "turbo", "teacher": checkpoint.weights_sha256}))
    return load_checkpoint(folder)


def export_of(checkpoint: Checkpoint, out: Path, precision: PrecisionName = "bfloat16", sampler: Sampler = SAMPLER) -> Export:
    return export(checkpoint, precision, sampler, list(CAPTIONS), LATENCY_MS, out)


def test_same_weights_give_same_bytes(exported: Export, checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = export_of(checkpoint, tmp_path)
    assert contents(again.folder) == contents(exported.folder)
    assert again.weights_sha256 == exported.weights_sha256
    assert hashlib.sha256((again.folder / "weights.bin").read_bytes()).hexdigest() == exported.weights_sha256


def test_other_weights_share_the_graph(exported: Export, changed: Callable[[str, float], Checkpoint], tmp_path: Path) -> None:
    other, first = contents(export_of(changed("export", 0.05), tmp_path).folder), contents(exported.folder)
    assert other["graph.onnx"] == first["graph.onnx"]
    assert len(other["weights.bin"]) == len(first["weights.bin"])
    assert other["weights.bin"] != first["weights.bin"]
    assert other["sampler.json"] == first["sampler.json"]


def test_one_changed_expert_moves_its_range(checkpoint: Checkpoint) -> None:
    network = checkpoint.network()
    before = np.frombuffer(pack(network, "bfloat16"), dtype=np.uint8)
    with torch.no_grad():
        network.blocks[1].experts.w13[2] += 1
        network.blocks[1].experts.w2[2] += 1
    moved = np.flatnonzero(before != np.frombuffer(pack(network, "bfloat16"), dtype=np.uint8))
    places = {t.name: t for t in layout(CONFIG, "bfloat16")[0]}
    first, last = places["block1.expert2.w13"], places["block1.expert2.w2"]
    assert first.offset <= moved.min()
    assert moved.max() < last.offset + last.length


@pytest.mark.parametrize("precision", few(PRECISIONS, 1))
@pytest.mark.parametrize("configuration", ["I", "II"])
@pytest.mark.parametrize(("channels", "router"), [(1, "expert-choice"), (3, "expert-choice"), (1, "token-choice")])
def test_every_graph_computes_the_network(
    tmp_path: Path, precision: PrecisionName, configuration: str, channels: int, router: RouterName
) -> None:
    network = random_network(config_of(configuration, channels).model_copy(update={"router": router}))
    weights = pack(network, precision)
    assert check_parity(network, precision, weights) < 1e-5
    (tmp_path / "graph.onnx").write_bytes(build(network.config, precision).SerializeToString(deterministic=True))
    (tmp_path / "weights.bin").write_bytes(weights)
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    load(tmp_path)


def test_larger_tier_computes_the_network() -> None:
    network = random_network(config_of("I", tier="small"))
    assert check_parity(network, "float16", pack(network, "float16")) < 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stored_network_is_rounded_once(precision: PrecisionName) -> None:
    network = random_network(CONFIG)
    weights = pack(network, precision)
    stored = unpack(CONFIG, precision, weights)
    assert pack(stored, precision) == weights
    digits = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0}[precision]
    for tensor in layout(CONFIG, precision)[0]:
        if tensor.name.endswith(SCALE):
            continue
        ours, theirs = tensor_of(stored, tensor.name), tensor_of(network, tensor.name)
        step = torch.zeros(())
        if tensor.stored == "int8":  # half a step; a step is at most the next power of two above largest / 127
            step = theirs.abs().amax(dim=1 - (scaled_axis(tensor.name) or 0), keepdim=True) / 127
        assert bool(((ours - theirs).abs() <= digits * theirs.abs() + step + 1e-7).all()), tensor.name


def test_int8_is_a_quarter_of_float32() -> None:
    config = config_of("I", tier="small")
    assert layout(config, "int8")[1] < 0.27 * layout(config, "float32")[1]


def test_scales_survive_a_small_update() -> None:
    """Keep the stored scales when a retraining moves every weight by a thousandth, so that a delta stays small."""
    network = random_network(CONFIG)
    before = unpack_scales(pack(network, "int8"))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    after = unpack_scales(pack(network, "int8"))
    assert (before == after).mean() > 0.97
    assert not np.array_equal(pack(network, "int8"), pack(random_network(CONFIG), "int8"))


def unpack_scales(weights: bytes) -> npt.NDArray[np.float32]:
    rows = [t for t in layout(CONFIG, "int8")[0] if t.name.endswith(SCALE)]
    return np.concatenate([np.frombuffer(weights[t.offset : t.offset + t.length], np.float32) for t in rows])


def test_measured_network_is_not_exported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = checkpoint.lineage.config.model_copy(update={"ablation": "dense"})
    odd = dataclasses.replace(checkpoint, lineage=checkpoint.lineage.model_copy(update={"config": config}))
    with pytest.raises(ExportError, match="'dense' is for measurements only"):
        export_of(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_size_is_free(exported: Export) -> None:
    session = load(exported.folder)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 1, 16, 16)).astype(np.float32)
    t = rng.uniform(size=7).astype(np.float32)
    ids = session.encode([CAPTIONS[i % 2] for i in range(7)])
    v, load_ = session.run(x, t, t, ids)
    for i in range(7):
        alone = session.run(x[i : i + 1], t[i : i + 1], t[i : i + 1], ids[i : i + 1])
        # The routing is free here, and a near tie may go either way: a few elements may differ, but not many.
        assert (np.abs(v[i] - alone[0][0]) < 1e-3).mean() > 0.98
        np.testing.assert_allclose(load_[i], alone[1][0], atol=1e-3)


def by_block(config: ModelConfig, precision: PrecisionName) -> list[list[Tensor]]:
    placed = layout(config, precision)[0]
    return [[t for t in placed if t.name.startswith(f"block{b}.")] for b in range(config.blocks)]


LAYOUTS = [(p, c) for p in PRECISIONS for c in (config_of("I"), config_of("II", 3), config_of("I", tier="small"))]


@pytest.mark.parametrize(("precision", "config"), LAYOUTS)
def test_tensors_neither_overlap_nor_stray(precision: PrecisionName, config: ModelConfig) -> None:
    placed, size = layout(config, precision)
    for before, after in pairwise(placed):
        assert before.offset + before.length <= after.offset, (before.name, after.name)
    assert placed[-1].offset + placed[-1].length <= size
    assert all(t.offset % TENSOR_ALIGNMENT == 0 for t in placed)
    assert len({t.name for t in placed}) == len(placed)


@pytest.mark.parametrize(("precision", "config"), LAYOUTS)
def test_block_records_are_equal_pages(precision: PrecisionName, config: ModelConfig) -> None:
    records = by_block(config, precision)
    starts = [record[0].offset for record in records]
    size = layout(config, precision)[1]
    assert all(start % RECORD_ALIGNMENT == 0 for start in (*starts, size))
    assert len({b - a for a, b in zip(starts, [*starts[1:], size], strict=True)}) == 1
    inner = [[(t.name.split(".", 1)[1], t.shape, t.offset - start) for t in r] for start, r in zip(starts, records, strict=True)]
    assert all(record == inner[0] for record in inner)


@pytest.mark.parametrize(("precision", "config"), LAYOUTS)
def test_expert_is_one_contiguous_range(precision: PrecisionName, config: ModelConfig) -> None:
    for record in by_block(config, precision):
        owners = [t.name.split(".")[1] if ".expert" in t.name else "" for t in record]
        runs = [owner for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]
        assert runs == ["", *(f"expert{e}" for e in range(config.shape.experts))]


@pytest.mark.parametrize("config", [config_of("I"), config_of("II", 3)])
def test_every_weight_has_its_place(config: ModelConfig) -> None:
    """Check that no parameter is left out of the file, and that none is stored twice."""
    network = random_network(config)
    stored = sum(tensor_of(network, t.name).numel() for t in layout(config, "float32")[0])
    assert stored == sum(p.numel() for p in network.parameters())
    assert all(tuple(tensor_of(network, t.name).shape) == t.shape for t in layout(config, "float32")[0])


def test_gaps_of_the_file_are_zero() -> None:
    network = random_network(CONFIG)
    weights = np.frombuffer(pack(network, "float16"), dtype=np.uint8).copy()
    for tensor in layout(CONFIG, "float16")[0]:
        weights[tensor.offset : tensor.offset + tensor.length] = 0
    assert not weights.any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "large"])
@pytest.mark.parametrize("name", ["head.weight", "block2.expert3.w2"])
def test_unstorable_weight_is_refused(precision: PrecisionName, value: float | str, name: str) -> None:
    network = random_network(CONFIG)
    tensor_of(network, name).view(-1)[5] = LARGE[precision] if value == "large" else value
    with pytest.raises(ExportError, match=rf"{name} holds a value that {precision} cannot; train again or store float32"):
        pack(network, precision)


def test_large_weight_fits_wider_precision() -> None:
    network = random_network(CONFIG)
    tensor_of(network, "head.weight").view(-1)[5] = LARGE["float16"]
    assert unpack(CONFIG, "bfloat16", pack(network, "bfloat16")).head.weight.abs().max() > 60_000


def test_diverged_checkpoint_is_not_exported(changed: Callable[[str, float], Checkpoint], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds a value that float16 cannot"):
        export_of(changed("diverged", 1e9), tmp_path, "float16")
    assert list(tmp_path.iterdir()) == []


# Two tensors of one shape that a mistake in the graph might confuse. (To confuse q_gain with k_gain would change nothing,
# because only their product counts.)
SLIPS = [
    ("block0.expert0.w13", "block0.expert1.w13"),
    ("block2.expert2.w2", "block2.expert3.w2"),
    ("block0.mod", "block1.mod"),
    ("block1.dw", "block2.dw"),
    ("block0.s13", "block1.s13"),
    ("block1.gate", "block2.gate"),
    ("block0.qkv", "block2.qkv"),
    ("block0.out", "block1.out"),
    ("block0.q_gain", "block1.q_gain"),
    ("block2.s2", "block2.expert0.w2"),
    ("pool.weight", "time_out.weight"),
    ("time_in.bias", "time_out.bias"),
]


@pytest.mark.parametrize(("one", "other"), SLIPS)
def test_confused_tensors_fail_parity(monkeypatch: pytest.MonkeyPatch, one: str, other: str) -> None:
    """Let the graph read two tensors at each other's place, while torch reads the file as it was written."""
    network = random_network(CONFIG)
    weights = pack(network, "float32")
    assert check_parity(network, "float32", weights) < 1e-5
    original = graph.layout

    def slipped(config: ModelConfig, precision: PrecisionName) -> tuple[list[Tensor], int]:
        placed, size = original(config, precision)
        swap = {one: other, other: one}
        return [dataclasses.replace(t, name=swap.get(t.name, t.name)) for t in placed], size

    monkeypatch.setattr(graph, "layout", slipped)  # only `build` uses this one; `pack` and `unpack` have their own
    with pytest.raises(ExportError, match="the exported model differs from the trained one by"):
        check_parity(network, "float32", weights)


@pytest.mark.parametrize(
    ("op", "attribute", "value"),
    [("LayerNormalization", "epsilon", 0.1), ("DepthToSpace", "mode", b"DCR"), ("TopK", "largest", 0), ("Gemm", "alpha", 1.01)],
)
def test_altered_graph_fails_parity(monkeypatch: pytest.MonkeyPatch, op: str, attribute: str, value: Any) -> None:
    network = random_network(config_of("I", channels=3))
    original = graph._Body.add

    def altered(self: graph._Body, name: str, *args: Any, **attributes: Any) -> str:
        return original(self, name, *args, **(attributes | {attribute: value} if name == op else attributes))

    monkeypatch.setattr(graph._Body, "add", altered)
    with pytest.raises(ExportError, match=r"the exported model (differs|chooses other experts)"):
        check_parity(network, "float32", pack(network, "float32"))


@pytest.mark.parametrize("cut", [1, 4096])
def test_weights_of_wrong_size_are_refused(cut: int) -> None:
    weights = pack(random_network(CONFIG), "bfloat16")
    with pytest.raises(ExportError, match=r"weights of test/I take \d+ bytes, not \d+"):
        unpack(CONFIG, "bfloat16", weights[:-cut])


@pytest.mark.parametrize("damaged", [("graph.onnx",), ("weights.bin",), ("graph.onnx", "weights.bin")])
@pytest.mark.parametrize("keep", [0.5, 0.0, None])
def test_damaged_export_does_not_load(exported: Export, tmp_path: Path, damaged: tuple[str, ...], keep: float | None) -> None:
    shutil.copytree(exported.folder, tmp_path, dirs_exist_ok=True)
    for name in damaged:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        if keep is not None:
            (tmp_path / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ExportError):
        load(tmp_path)


def test_tables_are_what_devices_parse(exported: Export, checkpoint: Checkpoint) -> None:
    table = parse(SamplerTable, (exported.folder / "sampler.json").read_bytes(), MAX_TABLE)
    assert (table.variant, table.method, table.guidance) == ("full", SAMPLER.method, SAMPLER.guidance)
    assert len(table.times) == SAMPLER.steps + 1
    assert (table.image.channels, table.image.size, table.text_length) == (1, 16, CONFIG.text_length)
    reference = parse(Reference, (exported.folder / "reference.json").read_bytes(), MAX_TABLE)
    assert reference.latency_ms == LATENCY_MS
    assert np.shape(reference.load) == (CONFIG.blocks, CONFIG.shape.experts)
    assert all(r.low < r.high for r in reference.statistics.values())
    assert (exported.folder / "golden.npz").stat().st_size < MAX_GOLDEN


def test_golden_outputs_reproduce_in_fresh_session(exported: Export) -> None:
    session = load(exported.folder, threads=1)
    reference = json.loads((exported.folder / "reference.json").read_text())["golden"]
    with np.load(exported.folder / "golden.npz") as golden:
        x = np.stack([noise(int(seed), (1, 16, 16)) for seed in golden["seeds"]])
        v = session.run(x, golden["t"], golden["t"], golden["ids"])[0]
        share = (np.abs(v - golden["velocity"]) <= reference["tolerance"]).mean()
        assert share >= reference["share"]
        assert np.unique(golden["ids"], axis=0).shape[0] == len(CAPTIONS)  # every given caption is used


def test_golden_outputs_tell_models_apart(exported: Export, changed: Callable[[str, float], Checkpoint], tmp_path: Path) -> None:
    """Refuse a model a hundredth away: it must not pass another model's golden check."""
    other = export_of(changed("golden", 0.01), tmp_path)
    with np.load(exported.folder / "golden.npz") as ours, np.load(other.folder / "golden.npz") as theirs:
        assert (np.abs(ours["velocity"] - theirs["velocity"]) <= 1e-3).mean() < 0.9


def test_reference_statistics_match_the_data(exported: Export, dataset: Dataset) -> None:
    """Check that the trained model's images look like its training images, so its reference is one of a working model."""
    statistics = json.loads((exported.folder / "reference.json").read_text())["statistics"]
    real = image_statistics(to_unit(np.array(dataset.images)).numpy()).mean(axis=0)
    for value, name in zip(real, ("mean", "deviation", "edges"), strict=True):
        assert statistics[name]["low"] - 0.3 < value < statistics[name]["high"] + 0.3, name


def test_student_refuses_the_sampler_of_full_and_full_that_of_a_student(checkpoint: Checkpoint, tmp_path: Path) -> None:
    student = student_of(checkpoint, tmp_path / "student")
    with pytest.raises(ExportError, match="the student turbo has learnt guidance; give its sampler guidance = 1"):
        export_of(student, tmp_path / "guided", sampler=Sampler(method="mean", steps=3, guidance=2.0))
    assert not (tmp_path / "guided" / "sampler.json").exists()
    with pytest.raises(ExportError, match="these weights are a student's, and cannot be drawn with the method 'ab2'"):
        export_of(student, tmp_path / "solved", sampler=Sampler(method="ab2", steps=3, guidance=1.0))
    with pytest.raises(ExportError, match="these weights are not a student's, and cannot be drawn with the method 'mean'"):
        export_of(checkpoint, tmp_path / "full", sampler=Sampler(method="mean", steps=3, guidance=1.0))
    unguided = export_of(student, tmp_path / "unguided", sampler=Sampler(method="mean", steps=4, guidance=1.0))
    with np.load(unguided.folder / "golden.npz") as golden:  # the mean velocity over one of its own steps is compared
        assert (golden["t"] - golden["r"] == np.minimum(golden["t"], 0.25)).all()
    assert json.loads((unguided.folder / "sampler.json").read_text())["variant"] == "turbo"


def test_table_holds_the_times_and_the_interval_and_gives_the_sampler_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = Sampler(steps=4, shift=0.5)
    made = export_of(checkpoint, tmp_path / "plain", sampler=plain)
    table = json.loads((made.folder / "sampler.json").read_text())
    assert table["schema_version"] == 1
    assert "guidance_low" not in table  # agents before 0.2 read it
    assert table["times"] == plain.times
    assert sampler_of(made.folder) == plain
    limited = Sampler(steps=5, guidance_low=0.2, guidance_high=0.8)
    made = export_of(checkpoint, tmp_path / "limited", sampler=limited)
    table = json.loads((made.folder / "sampler.json").read_text())
    assert (table["schema_version"], table["guidance_low"], table["guidance_high"]) == (2, 0.2, 0.8)
    assert sampler_of(made.folder) == limited
    for steps in (1, 2, 7, 28):
        given = Sampler(steps=steps, shift=1.0)
        assert sampler_of(export_of(checkpoint, tmp_path / f"{steps}", sampler=given).folder) == given


def test_caption_too_long_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this model reads 8"):
        export(checkpoint, "bfloat16", SAMPLER, ["a caption of many bytes"], LATENCY_MS, tmp_path)


def test_graph_holds_no_weights(exported: Export) -> None:
    """Check that all weights lie outside, under one name without a path, each stored tensor in exactly its place."""
    model = onnx.load_model_from_string((exported.folder / "graph.onnx").read_bytes())
    outside = [i for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
    entries = [{e.key: e.value for e in i.external_data} for i in outside]
    assert {entry["location"] for entry in entries} == {"weights.bin"}
    places = {(t.offset, t.length) for t in layout(CONFIG, "bfloat16")[0] if not t.name.endswith("gate_bias")}
    assert {(int(e["offset"]), int(e["length"])) for e in entries} == places
    assert len((exported.folder / "graph.onnx").read_bytes()) < 64 * 1024


def test_session_takes_given_weights(exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the bytes that the session was given, not with a file of that name in the current folder."""
    data = contents(exported.folder)
    (tmp_path / "weights.bin").write_bytes(bytes(len(data["weights.bin"])))
    ids = np.ones((1, 8), dtype=np.int64)
    before = load(exported.folder).generate(ids, [1], SAMPLER)[0]
    monkeypatch.chdir(tmp_path)
    assert torch.equal(Session(data["graph.onnx"], data["weights.bin"]).generate(ids, [1], SAMPLER)[0], before)
