"""Golden outputs: which faults a bundle's sample of them shows a device, and what becomes of files that hold something else."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.export import GOLDEN_SHARE, GOLDEN_TOLERANCE, Export, export
from model.graph import WEIGHTS_FILE, layout
from model.session import Session, noise
from model.train import Checkpoint
from ota import golden
from ota.errors import ManifestError
from ota.release.bundle import Bundle, assemble, make_delta
from tests.conftest import CAPTIONS, CONFIG, LATENCY_MS, SAMPLER, origin

Edit = Callable[[npt.NDArray[np.float32], np.random.Generator], npt.NDArray[np.float32]]

WAYS = ("whole", "sample")


@pytest.fixture(scope="module")
def whole(exported: Export) -> bytes:
    """Provide the golden outputs of an export."""
    return (exported.folder / "golden.npz").read_bytes()


@pytest.fixture
def outputs(request: pytest.FixtureRequest, whole: bytes) -> golden.Outputs:
    """Provide golden outputs as an export or as a bundle of form 4 holds them."""
    return golden.read(whole if request.param == "whole" else golden.sampled(whole))


def run(folder: Path, outputs: golden.Outputs, weights: bytes | None = None, **inputs: Any) -> npt.NDArray[np.float32]:
    """Compute what a device computes in a trial, perhaps with other weights or other inputs."""
    session = Session((folder / "graph.onnx").read_bytes(), weights or (folder / WEIGHTS_FILE).read_bytes(), threads=1)
    x = np.stack([noise(int(seed), (1, 16, 16)) for seed in outputs.seeds])
    given = {"x": x, "t": outputs.t, "r": outputs.r, "ids": outputs.ids} | inputs
    velocity: npt.NDArray[Any] = session.run(given["x"], given["t"], given["r"], given["ids"])[0]
    return velocity.astype(np.float32)


def edited(folder: Path, change: Edit, names: Callable[[str], bool] = lambda _: True) -> bytes:
    """Change some tensors of an export's weights, which are stored as bfloat16."""
    data, rng = bytearray((folder / WEIGHTS_FILE).read_bytes()), np.random.default_rng(0)
    for tensor in layout(CONFIG, "bfloat16")[0]:
        part = slice(tensor.offset, tensor.offset + tensor.length)
        if tensor.stored == "bfloat16" and names(tensor.name):
            values = (np.frombuffer(data[part], np.uint16).astype(np.uint32) << 16).view(np.float32)
            data[part] = (change(values, rng).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return bytes(data)


def exchanged(folder: Path) -> bytes:
    """Give two experts of a block each other's weights."""
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    placed = {tensor.name: slice(tensor.offset, tensor.offset + tensor.length) for tensor in layout(CONFIG, "bfloat16")[0]}
    pairs = [(placed[n], placed[n.replace("expert0", "expert1")]) for n in placed if n.startswith("block0.expert0.")]
    assert pairs
    for one, other in pairs:
        data[one], data[other] = data[other], data[one]
    return bytes(data)


def coarser(values: npt.NDArray[np.float32], _: np.random.Generator) -> npt.NDArray[np.float32]:
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa * 64) / 64, exponent)


def nothing(values: npt.NDArray[np.float32], _: np.random.Generator) -> npt.NDArray[np.float32]:
    return np.zeros_like(values)


FAULTS: dict[str, Callable[[Path], bytes]] = {
    "every weight shuffled": lambda f: edited(f, lambda values, rng: rng.permutation(values)),
    "weights one hundredth away": lambda f: edited(
        f, lambda values, rng: values + 0.02 * np.abs(values).mean() * rng.standard_normal(values.shape)
    ),
    "weights stored with less precision": lambda f: edited(f, coarser),
    "two experts exchanged": exchanged,
    "one expert zero": lambda f: edited(f, nothing, lambda name: name.startswith("block0.expert1.")),
    "one layer zero": lambda f: edited(f, nothing, lambda name: name.startswith("block1.")),
    "one bias zero": lambda f: edited(f, nothing, lambda name: name == "head.bias"),
}


@pytest.mark.parametrize("outputs", WAYS, indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_weights_shows(exported: Export, outputs: golden.Outputs, fault: str) -> None:
    """Leave a wide margin: at most two thirds of the outputs are right, where 98 % must be."""
    made = run(exported.folder, outputs, FAULTS[fault](exported.folder))
    assert outputs.share(made, GOLDEN_TOLERANCE) < 0.66 < GOLDEN_SHARE


@pytest.mark.parametrize("outputs", WAYS, indirect=True)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda o: {"t": o.t * np.float32(0.98), "r": o.r * np.float32(0.98)},
        lambda o: {"ids": np.zeros_like(o.ids)},
        lambda o: {"x": np.stack([noise(int(seed) + 1, (1, 16, 16)) for seed in o.seeds])},
    ],
    ids=["time", "caption", "noise"],
)
def test_runtime_that_computes_for_other_inputs_shows(exported: Export, outputs: golden.Outputs, wrong: Any) -> None:
    assert outputs.share(run(exported.folder, outputs, **wrong(outputs)), GOLDEN_TOLERANCE) < 0.66


@pytest.mark.parametrize("outputs", WAYS, indirect=True)
def test_device_that_computes_the_same_passes(exported: Export, outputs: golden.Outputs) -> None:
    made = run(exported.folder, outputs)
    assert outputs.share(made, GOLDEN_TOLERANCE) == 1
    # The rest of the tolerance is the device's: three quarters of it, whichever outputs were rounded up or down.
    assert outputs.share(made + np.float32(0.7e-3), GOLDEN_TOLERANCE) == 1
    assert outputs.share(made + np.float32(1.3e-3), GOLDEN_TOLERANCE) == 0


def test_sample_comes_from_every_input_and_all_columns(whole: bytes) -> None:
    found = golden.read(golden.sampled(whole))
    places = np.arange(golden.read(whole).expected.size)[:: found.every]
    inputs, columns = np.bincount(places // 256), np.bincount(places % 16)
    assert len(inputs) == 8
    assert inputs.min() >= 28
    assert len(columns) == 16
    assert columns.min() >= 10


def test_sample_is_a_tenth_of_the_outputs(exported: Export, changed: Callable[..., Checkpoint], tmp_path: Path) -> None:
    """Measure what an update takes: the golden outputs of the next release, made from those of the one before."""
    export(changed("second", 0.01), "bfloat16", SAMPLER, list(CAPTIONS), LATENCY_MS, tmp_path / "next")
    sizes = {}
    for agent in ("0.2.0", "0.3.0"):
        first, second = (_bundle(folder, tmp_path / agent, agent) for folder in (exported.folder, tmp_path / "next"))
        made = make_delta(first, second, tmp_path / agent)
        assert made
        sizes[agent] = made.size
    assert sizes["0.2.0"] - sizes["0.3.0"] > 6500  # of 7,700


def _bundle(folder: Path, out: Path, agent: str) -> Bundle:
    return assemble(
        {"full": folder}, line="shapes", device_class="edge", tier="test", configuration="I", precision="bfloat16",
        origin=origin(1), out=out, oldest_agent=agent,
    )  # fmt: skip


@pytest.mark.parametrize("agent", ["0.1.0", "0.2.0", "0.2.9"])
def test_bundle_for_an_older_agent_holds_all_outputs_as_they_were_exported(exported: Export, tmp_path: Path, agent: str) -> None:
    made = _bundle(exported.folder, tmp_path, agent)
    assert made.manifest.schema_version == 1
    assert made.path("golden", "full").read_bytes() == (exported.folder / "golden.npz").read_bytes()


def test_bundle_of_form_4_holds_a_sample_and_says_which_agent_it_needs(exported: Export, tmp_path: Path) -> None:
    made = _bundle(exported.folder, tmp_path, "0.3.0")
    assert (made.manifest.schema_version, made.manifest.minimum_agent) == (4, "0.3.0")
    data = made.path("golden", "full").read_bytes()
    assert data == golden.sampled((exported.folder / "golden.npz").read_bytes())
    assert golden.sampled(data) == data


def outputs_of(whole: bytes, **fields: Any) -> bytes:
    """Write golden outputs with other fields; None leaves one out."""
    with np.load(io.BytesIO(whole)) as file:
        arrays = {name: file[name] for name in file} | fields
    made = io.BytesIO()
    np.savez(made, **{name: array for name, array in arrays.items() if array is not None})
    return made.getvalue()


@pytest.mark.parametrize("value", [np.nan, np.inf, 17.0, -17.0])
def test_outputs_that_no_sample_can_hold_stay_as_they_are(whole: bytes, value: float) -> None:
    velocity = golden.read(whole).expected.reshape(8, 1, 16, 16).copy()
    velocity[0, 0, 0, 0] = value
    data = outputs_of(whole, velocity=velocity)
    assert golden.sampled(data) == data


@pytest.mark.parametrize(
    "fields",
    [
        {"every": np.array(0)},
        {"every": np.array(-1)},
        {"every": None},
        {"every": np.array([1, 2])},
        {"sample": np.zeros((2, 0), np.uint8)},
        {"sample": np.zeros((3, 9), np.uint8)},
        {"sample": np.zeros((2, 9), np.int16)},
        {"sample": np.zeros(9, np.uint8)},
        {"sample": np.array([{}])},
        {"ids": None},
    ],
)
def test_sample_that_is_none_is_refused(whole: bytes, fields: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="golden outputs cannot be read"):
        golden.read(outputs_of(golden.sampled(whole), **fields))


@pytest.mark.parametrize("length", [1, 227, 229, 100_000])
def test_sample_of_a_model_with_other_images_is_refused(exported: Export, whole: bytes, length: int) -> None:
    found = golden.read(outputs_of(golden.sampled(whole), sample=np.zeros((2, length), np.uint8)))
    with pytest.raises(ManifestError, match="for images of another shape"):
        found.share(run(exported.folder, found), GOLDEN_TOLERANCE)


@pytest.mark.parametrize("cut", [0, 1, 100, -30])
def test_damaged_outputs_make_no_bundle(exported: Export, whole: bytes, tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    for path in exported.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "golden.npz").write_bytes(whole[:cut])
    with pytest.raises(ManifestError, match=r"golden\.npz does not hold golden outputs; export the checkpoint again"):
        _bundle(folder, tmp_path / "out", "0.3.0")
    assert not (tmp_path / "out").exists()


def test_one_output_that_is_not_finite_is_as_bad_as_all_wherever_it_lies(exported: Export, whole: bytes) -> None:
    found = golden.read(golden.sampled(whole))
    made = run(exported.folder, found)
    made[0, 0, 0, 1] = np.nan  # not in the sample
    assert found.every > 1
    assert found.share(made, GOLDEN_TOLERANCE) == 0
