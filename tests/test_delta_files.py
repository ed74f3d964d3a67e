"""Deltas between any two files: where tensors are found, which old tensor each follows, and that every file comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch
from typer.testing import CliRunner

from flows.cli import app
from ota.delta import files
from ota.delta.forecast import Forecast
from ota.errors import BaseError, DeltaError, OperatorError
from ota.manifest import MiB
from ota.release.bundle import make_delta
from tests.conftest import few

ONNX = onnx.TensorProto
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(256, 96)).astype(np.float32)
STEP = RNG.normal(scale=1e-4, size=WEIGHTS.shape).astype(np.float32)


def model(tensors: dict[str, tuple[int, list[int], bytes]], external: str = "") -> bytes:
    """Build an ONNX file of nothing but weights, inside it or one after the other in another file."""
    initializers, offset = [], 0
    for name, (kind, dims, raw) in tensors.items():
        tensor = ONNX(name=name, data_type=kind, dims=dims)
        if external:
            tensor.data_location = ONNX.EXTERNAL
            for key, value in (("location", external), ("offset", str(offset)), ("length", str(len(raw)))):
                tensor.external_data.add(key=key, value=value)
            offset += len(raw)
        else:
            tensor.raw_data = raw
        initializers.append(tensor)
    node = onnx.helper.make_node("Identity", [next(iter(tensors), "x")], ["y"])
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], initializers))
    data: bytes = made.SerializeToString(deterministic=True)
    return data


def full(values: Any) -> tuple[int, list[int], bytes]:
    return ONNX.FLOAT, list(values.shape), values.astype(np.float32).tobytes()


def size_of_delta(tmp_path: Path, old: bytes, new: bytes, suffix: str = "onnx", **graphs: Any) -> int:
    """Build a delta, apply it, check that the file comes back, and return the size of the delta in bytes."""
    before, after, patch, again = (tmp_path / f"{name}.{suffix}" for name in ("old", "new", "patch", "again"))
    before.write_bytes(old)
    after.write_bytes(new)
    built = files.build(before, after, patch, **graphs)
    files.apply(before, patch, again)
    assert again.read_bytes() == new
    assert built.size == patch.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return built.size


def test_tensors_are_found_in_onnx(tmp_path):
    path = tmp_path / "m.onnx"
    tensors = {
        "f": full(np.ones((2, 3))), "h": (ONNX.FLOAT16, [4], bytes(8)), "b": (ONNX.BFLOAT16, [2, 2], bytes(range(8))),
        "q": (ONNX.INT8, [3, 1], b"abc"), "n": (ONNX.INT4, [5], b"xyz"), "i": (ONNX.INT64, [1], bytes(8)), "s": (ONNX.FLOAT, [], bytes(4)),
    }  # fmt: skip
    path.write_bytes(model(tensors))
    found = {t.name: t for t in files.tensors(path)}
    assert {name: (t.kind, t.shape, t.row) for name, t in found.items()} == {
        "f": ("float32", (2, 3), 3), "h": ("float16", (4,), 0), "b": ("bfloat16", (2, 2), 2), "q": ("int8", (3, 1), 1),
        "n": ("int4", (5,), 0), "s": ("float32", (), 0),
    }  # fmt: skip
    for name, tensor in found.items():
        assert path.read_bytes()[tensor.offset : tensor.offset + tensor.length] == tensors[name][2]


def test_values_that_onnx_packs_otherwise_are_found_too(tmp_path):
    path = tmp_path / "m.onnx"
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.helper.make_tensor("f", ONNX.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])])
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (tensor,) = files.tensors(path)
    assert path.read_bytes()[tensor.offset :][: tensor.length] == np.array([1, 2, 3, 4], np.float32).tobytes()


def test_tensors_are_found_in_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(
        save_torch({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(2, dtype=torch.int64)})
    )
    found = {t.name: t for t in files.tensors(path)}
    assert {name: (t.kind, t.shape, t.length) for name, t in found.items()} == {
        "a": ("float32", (2, 3), 24),
        "b": ("bfloat16", (4,), 8),
    }
    assert path.read_bytes()[found["a"].offset :][:24] == np.ones(6, np.float32).tobytes()


def test_retrained_model_costs_a_fraction(tmp_path):
    old, new = (model({"w": full(w)}) for w in (WEIGHTS, WEIGHTS + STEP))
    assert size_of_delta(tmp_path, old, new) < 0.65 * len(new)
    old, new = (save({"w": w.astype(np.float16)}) for w in (WEIGHTS, WEIGHTS + STEP))
    assert size_of_delta(tmp_path, old, new, "safetensors") < 0.3 * len(new)


def test_renamed_and_permuted_tensors_cost_nothing(tmp_path):
    parts = {f"t{i}": full(RNG.normal(size=(64, 33 + i))) for i in range(6)}
    turned = dict(reversed(parts.items()))
    renamed = {f"other.{name}.longer": value for name, value in parts.items()}
    for new in (model(turned), model(renamed), model(dict(reversed(renamed.items())))):
        assert size_of_delta(tmp_path, model(parts), new) < 0.03 * len(new)


def test_added_tensor_costs_itself_and_removed_one_nothing(tmp_path):
    parts = {f"t{i}": full(RNG.normal(size=(64, 64))) for i in range(6)}
    more = {"new": full(np.linspace(0, 1, 4096).reshape(64, 64))} | parts
    assert size_of_delta(tmp_path, model(parts), model(more)) < 1.1 * 64 * 64 * 4 + 2000
    assert size_of_delta(tmp_path, model(more), model(parts)) < 2500


def test_external_data_is_found_through_its_graph(tmp_path):
    tensors = {"v": full(np.ones((3, 3))), "w": full(WEIGHTS)}
    turned = {"w": full(WEIGHTS + STEP), "v": full(np.ones((3, 3)))}
    (tmp_path / "g.onnx").write_bytes(model(turned, external="w.bin"))
    (tmp_path / "o.onnx").write_bytes(model(tensors, external="w.bin"))
    old, new = (b"".join(raw for _, _, raw in t.values()) for t in (tensors, turned))
    with_graphs = size_of_delta(tmp_path, old, new, graph=tmp_path / "g.onnx", old_graph=tmp_path / "o.onnx")
    assert with_graphs < 0.65 * len(new)
    assert with_graphs < 0.75 * size_of_delta(tmp_path, old, new)


def test_graph_of_other_data_refused(tmp_path):
    (tmp_path / "g.onnx").write_bytes(model({"w": full(WEIGHTS)}))
    with pytest.raises(OperatorError, match=r"describes no external data of .*name the ONNX file that it belongs to"):
        size_of_delta(tmp_path, b"old", b"new", graph=tmp_path / "g.onnx")


def test_tensors_follow_by_name_then_by_shape():
    def tensor(name: str, kind: Any = "float32", shape: tuple[int, ...] = (2, 2)) -> files.Tensor:
        return files.Tensor(name, kind, shape, 0, 16)

    old = [tensor("a"), tensor("b"), tensor("c", "float16"), tensor("d", shape=(4,))]
    new = [tensor("b"), tensor("x"), tensor("y"), tensor("c"), tensor("d", shape=(5,)), tensor("z", "float16")]
    # b follows by name. x is a renamed, z is c renamed. Nothing is left for y. c changed its kind and d its shape.
    assert {name: t.name for name, t in files.follow(new, old).items()} == {"b": "b", "x": "a", "z": "c"}


@pytest.mark.parametrize(("old", "new"), [(b"", b""), (b"", b"x"), (b"x", b""), (b"same", b"same"), (b"a" * 9, b"b" * 5000)])
@pytest.mark.parametrize("suffix", ["onnx", "safetensors", "bin"])
def test_any_small_file_comes_back(tmp_path, old, new, suffix):
    size_of_delta(tmp_path, old, new, suffix)


def test_moved_bytes_of_a_large_file_cost_next_to_nothing(tmp_path):
    """Find moved bytes, as bsdiff does, but with memory that does not grow with the file."""
    old = RNG.bytes(6 * MiB)
    new = old[4 * MiB :] + b"inserted" * 99 + old[: 4 * MiB - 5000] + old[4 * MiB - 4000 : 5 * MiB]
    assert size_of_delta(tmp_path, old, new, "bin") < 15_000
    assert files.estimate(tmp_path / "old.bin", tmp_path / "new.bin") < 20_000


@pytest.mark.parametrize("before", few([0, 1, 3], 1))
@pytest.mark.parametrize("size", [300_000, pytest.param(1_200_000, marks=pytest.mark.slow)])
def test_numbers_that_nobody_described_are_found(tmp_path, before, size):
    """Find the raw weights of an unknown format."""
    old = RNG.normal(size=size).astype(np.float32)
    new = old + RNG.normal(scale=1e-4, size=size).astype(np.float32)
    head = RNG.bytes(before)
    made = size_of_delta(tmp_path, head + old.tobytes(), head + new.tobytes(), "bin")
    assert made < 0.5 * new.nbytes
    assert files.estimate(tmp_path / "old.bin", tmp_path / "new.bin") == pytest.approx(made, rel=0.1)


def test_large_file_without_tensors_comes_back(tmp_path):
    old = RNG.bytes(5_000_000)
    new = old[:2_000_000] + b"something else" + old[2_000_014:] + b"more"
    assert size_of_delta(tmp_path, old, new, "bin") < 20_000


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_model_file_is_a_file_like_any_other(tmp_path_factory, data):
    whole = data.draw(
        st.sampled_from([model({"w": full(WEIGHTS[:4]), "v": full(WEIGHTS[:2])}), save({"w": WEIGHTS[:4], "v": WEIGHTS[:2]})])
    )
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(whole), 300) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    size_of_delta(tmp_path_factory.mktemp("case"), whole, data.draw(st.sampled_from([bytes(damaged), cut])))
    size_of_delta(tmp_path_factory.mktemp("case"), bytes(damaged), whole)


def lying_safetensors(**row: Any) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | row}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


@pytest.mark.parametrize(
    "row",
    [
        {"data_offsets": [-8, 8]}, {"data_offsets": [8, 4]}, {"data_offsets": [0, 2**63]}, {"data_offsets": [0, 15]}, {"shape": [-1]},
        {"shape": [2**70]}, {"shape": "abc"}, {"data_offsets": 5}, {"dtype": 7}, {"dtype": []},
    ],
    ids=str,
)  # fmt: skip
def test_lying_header_of_safetensors_is_harmless(tmp_path, row):
    size_of_delta(tmp_path, lying_safetensors(), lying_safetensors(**row), "safetensors")
    size_of_delta(tmp_path, lying_safetensors(**row), lying_safetensors(**row)[:-1] + b"x", "safetensors")


def test_same_files_same_patch(tmp_path):
    old, new = (model({"w": full(w)}) for w in (WEIGHTS, WEIGHTS + STEP))
    made = []
    for _ in range(2):
        size_of_delta(tmp_path, old, new)
        made.append((tmp_path / "patch.onnx").read_bytes())
    assert made[0] == made[1]


# Forecasts


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.3])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_estimate_is_near(tmp_path, scale, share):
    old = {f"t{i}": (RNG.normal(size=(512, 256)) * 10.0**-i).astype(np.float32) for i in range(3)}
    new = {
        k: (w + np.where(RNG.random(w.shape) < share, RNG.normal(size=w.shape) * w.std() * scale, 0)).astype(np.float32)
        for k, w in old.items()
    }
    size = size_of_delta(tmp_path, *(model({k: full(w) for k, w in side.items()}) for side in (old, new)))
    assert files.estimate(tmp_path / "old.onnx", tmp_path / "new.onnx") == pytest.approx(size, rel=0.1)


def tensors(count: int, shape: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {f"t{i}": draw.normal(size=shape).astype(np.float32) for i in range(count)}


def words(count: int, seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    known = [bytes(draw.integers(97, 123, draw.integers(2, 9)).astype(np.uint8)) for _ in range(3000)]
    return b" ".join(known[i] for i in np.minimum(draw.zipf(1.3, count), 3000) - 1)


def hard_pairs() -> dict[str, tuple[bytes, bytes]]:
    """Return pairs whose delta is hard to forecast from a few places, or by the first method that comes to mind."""
    noise, text = RNG.bytes(2_200_000), words(120_000, 0)
    wide, many = tensors(1, (2000, 384)), tensors(12, (256, 512))
    rows = {"t0": wide["t0"].copy()}
    rows["t0"][700:720] += 0.01
    layers = {f"t{i}": many[f"t{(i + 5) % 12}"] for i in range(12)}
    one = many | {"t7": many["t7"] + np.float32(1e-3) * tensors(1, (256, 512), 1)["t0"]}
    floats, large = RNG.normal(size=600_000).astype(np.float32), RNG.bytes(6_000_000)
    flips = 255 * (RNG.random(len(large)) < 1e-4).astype(np.uint8)
    one_of_all = {name: values.copy() for name, values in many.items()}
    for values in one_of_all.values():
        values[0, 0] += 1
    return {
        "all but the middle is new": (noise, RNG.bytes(700_000) + noise[700_000:1_500_000] + RNG.bytes(700_000)),
        "only the middle is new": (noise, noise[:700_000] + RNG.bytes(800_000) + noise[1_500_000:]),
        "a few rows moved": (save(wide), save(rows)),
        "tensors changed places": (save(many), save(layers)),
        "one tensor of many moved": (save(many), save(one)),
        "a tensor has more rows": (save(wide), save({"t0": np.concatenate([wide["t0"], wide["t0"][:50] * 2])})),
        "other precision": (save(many), save({name: values.astype(np.float16) for name, values in many.items()})),
        "noise": (noise, RNG.bytes(2_200_000)),
        "little noise": (noise[:300_000], RNG.bytes(300_000)),
        "numbers that are no numbers": (save({"t": np.frombuffer(noise, np.float32)}), save({"t": np.frombuffer(RNG.bytes(2_200_000), np.float32)})),
        "a byte before all": (noise, b"x" + noise),
        "the same": (noise, noise),
        "bytes here and there": (large, bytes(np.frombuffer(large, np.uint8) ^ flips)),
        "one tensor moved, of others a number": (save(many), save(one_of_all | {"t7": one["t7"]})),
        "text with other words": (text, text.replace(b" the ", b" a ").replace(text[:6], b"something")),
        "little text": (text[:300_000], text[100_000:350_000] + words(10_000, 1)),
        "text from nothing": (b"", text),
        "zeros": (bytes(3 * MiB), bytes(4 * MiB)),
        "nothing": (noise, b""),
        "raw numbers": (floats.tobytes(), (floats * np.float32(1.0001)).tobytes()),
        "hundreds of little tensors": (save(tensors(400, (4, 9))), save(dict.fromkeys(tensors(400, (4, 9)), wide["t0"][:4, :9].copy()))),
    }  # fmt: skip


def moved_slightly(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: values * np.float32(1.001) for name, values in tensors.items()}


HARD = hard_pairs()


@pytest.mark.parametrize("name", few(HARD, 2))
def test_forecast_holds_what_is_built(tmp_path, name):
    old, new = HARD[name]
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(new)
    said = files.forecast(tmp_path / "old", tmp_path / "new")
    made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p").size
    assert said.low <= made <= said.high
    assert said.low <= said.bytes <= said.high
    if said.close:
        assert made / 1.3 <= said.bytes <= 1.3 * made
    assert said.high <= max(1.35 * len(new), 2000)  # a wider range would say nothing
    assert files.estimate(tmp_path / "old", tmp_path / "new") == said.bytes


def test_what_is_small_is_known(tmp_path):
    """Build small deltas instead of estimating them."""
    tensors = {f"t{i}": RNG.normal(size=(20, 30 + i)).astype(np.float32) for i in range(9)}
    large = {"large": RNG.normal(size=(600, 500)).astype(np.float32)}
    for old, new in (
        (save(tensors), save(moved_slightly(tensors))),
        (save(tensors | large), save(moved_slightly(tensors) | large)),
        (save(tensors | large), save({f"other.{name}": values for name, values in (tensors | large).items()})),
        (b"some text, and more " * 99, b"some text, and less " * 98),
    ):
        (tmp_path / "old").write_bytes(old)
        (tmp_path / "new").write_bytes(new)
        made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p").size
        assert files.forecast(tmp_path / "old", tmp_path / "new").bytes == made


def test_most_forecasts_are_close(tmp_path):
    """Check that most forecasts are close; otherwise the bounds above would prove little."""
    close = {}
    for name in (
        "a few rows moved",
        "one tensor of many moved",
        "noise",
        "raw numbers",
        "zeros",
        "the same",
        "one tensor moved, of others a number",
        "hundreds of little tensors",
    ):
        for side, data in zip(("old", "new"), HARD[name], strict=True):
            (tmp_path / side).write_bytes(data)
        said = files.forecast(tmp_path / "old", tmp_path / "new")
        close[name] = said.close
    assert close == dict.fromkeys(close, True)


# The command


def ferry(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    (tmp_path / "old.onnx").write_bytes(model({"first": full(WEIGHTS), "second": full(WEIGHTS[:100])}))
    (tmp_path / "new.onnx").write_bytes(model({"first": full(WEIGHTS + STEP), "second": full(WEIGHTS[:100])}))
    return tmp_path


def test_command_builds_and_applies(pair):
    built = ferry("delta", "build", pair / "old.onnx", pair / "new.onnx", "-o", pair / "p", "--json")
    assert built.exit_code == 0, built.stderr
    told = json.loads(built.stdout)
    assert told["bytes"] == (pair / "p").stat().st_size
    assert told["of"] == (pair / "new.onnx").stat().st_size
    applied = ferry("delta", "apply", pair / "old.onnx", pair / "p", "-o", pair / "again")
    assert applied.exit_code == 0, applied.stderr
    assert (pair / "again").read_bytes() == (pair / "new.onnx").read_bytes()
    about = json.loads(ferry("delta", "estimate", pair / "old.onnx", pair / "new.onnx", "--json").stdout)
    assert about["bytes"] == pytest.approx(told["bytes"], rel=0.1)
    assert about["low"] <= told["bytes"] <= about["high"]
    shown = ferry("delta", "estimate", pair / "old.onnx", pair / "new.onnx").stdout
    assert shown.startswith(f"about {about['bytes']:,} bytes, ")
    assert shown.endswith(f" of {told['of']:,}; between {about['low']:,} and {about['high']:,}\n")


def test_command_says_a_range_where_it_knows_no_better(pair, monkeypatch):
    monkeypatch.setattr(files, "forecast", lambda *_: Forecast(1000, 500, 1100))
    (pair / "new.onnx").write_bytes(bytes(4000))
    said = ferry("delta", "estimate", pair / "old.onnx", pair / "new.onnx").stdout
    assert said == "between 500 and 1,100 bytes, 12.5% to 27.5% of 4,000\n"


def test_command_says_no_share_of_an_empty_file(pair):
    (pair / "new.onnx").write_bytes(b"")
    for command in (
        ["build", pair / "old.onnx", pair / "new.onnx", "-o", pair / "p"],
        ["estimate", pair / "old.onnx", pair / "new.onnx"],
    ):
        said = ferry("delta", *command).stdout
        assert "bytes" in said
        assert "%" not in said


def test_command_shows_what_a_delta_is_made_of(pair):
    files.build(pair / "old.onnx", pair / "new.onnx", pair / "p")
    told = json.loads(ferry("delta", "inspect", pair / "p", "--of", pair / "new.onnx", "--json").stdout)
    assert sum(part["length"] for part in told["parts"]) == (pair / "new.onnx").stat().st_size
    assert (pair / "p").stat().st_size - sum(part["size"] for part in told["parts"]) < 1000  # the header
    of_first = [part for part in told["parts"] if part["tensors"] == ["first"] or "first" in part["tensors"]]
    assert sum(sum(part["holds"].values()) for part in of_first) >= WEIGHTS.size
    shown = ferry("delta", "inspect", pair / "p", "--of", pair / "new.onnx").stdout
    assert "float32" in shown
    assert "first" in shown
    assert "first" not in ferry("delta", "inspect", pair / "p").stdout


def test_command_shows_what_each_tensor_costs(pair):
    files.build(pair / "old.onnx", pair / "new.onnx", pair / "p")
    arguments = ["delta", "inspect", pair / "p", "--of", pair / "new.onnx", "--from", pair / "old.onnx"]
    told = json.loads(ferry(*arguments, "--json", "--plot", pair / "p.svg").stdout)
    parts = json.loads(ferry("delta", "inspect", pair / "p", "--json").stdout)["parts"]
    assert sum(part["size"] for part in told["parts"]) == pytest.approx(sum(part["size"] for part in parts))
    assert sum(part["length"] for part in told["parts"]) == (pair / "new.onnx").stat().st_size
    dearest = max(told["parts"], key=lambda part: part["size"])
    assert dearest["tensors"] == ["first"]
    assert dearest["size"] > 0.9 * (pair / "p").stat().st_size - 1000
    assert "first" in (pair / "p.svg").read_text()
    other = ferry(*arguments[:-1], pair / "new.onnx")
    assert other.exit_code == 3
    assert "name the file that it was built from" in other.stderr


@pytest.mark.parametrize("name", ["p.nothing", "p", "p.svg.gz"])
def test_picture_that_cannot_be_written_is_named(pair, name):
    files.build(pair / "old.onnx", pair / "new.onnx", pair / "patch")
    result = ferry("delta", "inspect", pair / "patch", "--plot", pair / name)
    assert result.exit_code == 3, result.stderr
    assert "name a file that ends in .svg or .png" in result.stderr


def test_other_base_is_refused_and_nothing_written(pair):
    files.build(pair / "old.onnx", pair / "new.onnx", pair / "p")
    (pair / "kept").write_bytes(b"what was there before")
    result = ferry("delta", "apply", pair / "new.onnx", pair / "p", "-o", pair / "kept")
    assert result.exit_code == 3
    assert "name the file that it was built from" in result.stderr
    assert (pair / "kept").read_bytes() == b"what was there before"
    with pytest.raises(BaseError):
        files.apply(pair / "new.onnx", pair / "p", pair / "kept")


@pytest.mark.parametrize("command", ["build", "estimate", "apply", "inspect"])
def test_missing_file_is_named(pair, command):
    arguments = [pair / "nowhere"] if command == "inspect" else [pair / "nowhere", pair / "new.onnx"]
    output = ["-o", pair / "p"] if command in ("build", "apply") else []
    if command == "apply":
        files.build(pair / "old.onnx", pair / "new.onnx", pair / "new.onnx.patch")
        arguments = [pair / "nowhere", pair / "new.onnx.patch"]
    result = ferry("delta", command, *arguments, *output)
    assert result.exit_code == 3, result.stderr
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (pair / "p").exists()


def test_file_that_is_no_delta_is_refused(pair):
    for command in (["apply", pair / "old.onnx", pair / "new.onnx", "-o", pair / "p"], ["inspect", pair / "new.onnx"]):
        result = ferry("delta", *command)
        assert result.exit_code == 3
        assert "not a delta" in result.stderr


def test_delta_of_a_bundle_is_not_for_plain_files(bundles, tmp_path):
    made = make_delta(bundles["first"], bundles["second"], tmp_path / "deltas")
    assert made
    step = made.path
    (tmp_path / "old").write_bytes(b"x")
    with pytest.raises(DeltaError, match="for bundles and not for plain files"):
        files.apply(tmp_path / "old", step, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert {part.kind for part in files.inspect(step)[1]} >= {"numbers"}
