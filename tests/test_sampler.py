"""The device's NumPy sampler against the factory's torch sampler: same noise, same session, same images, same figures."""

from __future__ import annotations

import io
import json
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model import diffusion, session
from model.config import PrecisionName
from model.export import Export, image_statistics
from model.scorecard import Sampler, SamplerName
from model.train import round_to_stored
from ota.agent import sampler
from ota.errors import DeviceError, ManifestError, OperatorError
from ota.manifest import MAX_TABLE, SamplerTable, parse

SEEDS = [3, 2**31, 2**63 - 1]
CAPTIONS = ["bar", "", "disc"]


@pytest.fixture(scope="module")
def factory(exported: Export) -> session.Session:
    """Open the exported model as the factory does, on one thread like the device."""
    return session.load(exported.folder, threads=1)


def table(exported: Export, **fields: Any) -> SamplerTable:
    rows = json.loads((exported.folder / "sampler.json").read_bytes())
    return SamplerTable.model_validate(rows | fields)


def device(exported: Export, **fields: Any) -> sampler.Model:
    graph, weights = (exported.folder / "graph.onnx").read_bytes(), (exported.folder / "weights.bin").read_bytes()
    return sampler.open_model(graph, weights, table(exported, **fields))


@pytest.mark.parametrize(
    "fields", [{"guidance": 1.0}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_low": 0.15, "guidance_high": 0.7}]
)
@pytest.mark.parametrize("method", list(sampler.SAMPLERS))
def test_device_draws_factory_images(exported, factory, method, fields):
    asked = Sampler(method=method, steps=5, shift=0.6, **fields)
    expected, load = factory.generate(factory.encode(CAPTIONS), SEEDS, asked)
    model = device(exported, method=method, times=asked.times, schema_version=2, **fields)
    ids = np.concatenate([model.encode(caption) for caption in CAPTIONS])
    images = model.generate(ids, SEEDS)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(model.load(), load, atol=1e-5)


@pytest.mark.parametrize("method", list(sampler.SAMPLERS))
def test_uneven_steps_agree(method):
    times = [1.0, 0.9, 0.4, 0.35, 0.0]
    start = np.random.default_rng(0).normal(size=(2, 1, 4, 4)).astype(np.float32)
    ours = sampler.SAMPLERS[method](lambda x, t, r: np.sin(3 * x) * np.float32(t + 2 * r), start, times)
    theirs = diffusion.SAMPLERS[method](lambda x, t, r: torch.sin(3 * x) * (t + 2 * r), torch.from_numpy(start), times)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_methods_are_told_apart(exported):
    images = [device(exported, method=method).generate(np.zeros((1, 8), np.int64), [0]) for method in sampler.SAMPLERS]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(images) for b in images[:i])


def test_guidance_counts_caption(exported):
    pictures = {}
    for guidance in (1.0, 3.0):
        model = device(exported, guidance=guidance)
        pictures[guidance] = [model.generate(model.encode(caption), [0]) for caption in ("bar", "disc", "")]
    bar, disc, nothing = pictures[3.0]
    assert np.abs(bar - disc).max() > np.abs(pictures[1.0][0] - pictures[1.0][1]).max() > 1e-3
    np.testing.assert_allclose(nothing, pictures[1.0][2], atol=1e-4)


@given(st.integers(0, 2**64 - 1), st.sampled_from([(1,), (3,), (1, 16, 16), (3, 5, 7)]))
def test_noise_is_the_same(seed, shape):
    ours = sampler.noise(seed, shape)
    assert ours.tobytes() == session.noise(seed, shape).tobytes()
    assert ours.shape == shape


# Philox4x64-10 with key 0 and counter 1, and Box-Muller, worked out from the paper without NumPy.
PINNED = [2.2844414847774095, -1.5494507935122228, 1.9245853823567463, -0.6637518111511655]


def test_noise_is_pinned_and_normal():
    assert sampler.noise(0, (4,)).tolist() == pytest.approx(PINNED, abs=1e-6)
    many = sampler.noise(1, (100_000,))
    assert (many.mean(), many.std(), (many**4).mean()) == pytest.approx((0, 1, 3), abs=0.05)


def test_statistics_are_the_factorys(exported, factory):
    images, _ = factory.generate(factory.encode(CAPTIONS), SEEDS, Sampler(method="euler", steps=3, guidance=1))
    clipped = images.clamp(-1, 1).numpy()
    assert (images.numpy() != clipped).any()
    names, values = zip(*sampler.statistics(images.numpy()), strict=True)
    assert names == ("mean", "deviation", "edges")
    assert values == pytest.approx(image_statistics(clipped).mean(axis=0), abs=1e-9)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(channels, mode):
    image = np.linspace(-1.3, 1.3, channels * 9 * 5, dtype=np.float32).reshape(channels, 9, 5)
    data = sampler.png(image)
    with Image.open(io.BytesIO(data)) as opened:
        opened.verify()
    with Image.open(io.BytesIO(data)) as opened:
        assert (opened.format, opened.mode, opened.size) == ("PNG", mode, (5, 9))
        pixels = np.asarray(opened).reshape(9, 5, channels)
    expected = np.round((np.clip(image, -1, 1) + 1) * 127.5).transpose(1, 2, 0)
    assert (pixels == expected).all()
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("caption", ["123456789", "ä" * 5, "\U0001f600" * 3])
def test_caption_too_long_refused(exported, caption):
    with pytest.raises(OperatorError, match=f"the caption has {len(caption.encode())} bytes, this model reads 8; shorten it"):
        device(exported).encode(caption)


@pytest.mark.parametrize("caption", ["", "bar", "12345678", "ä\0b"])
def test_captions_read_alike(exported, factory, caption):
    assert (device(exported).encode(caption) == factory.encode([caption])).all()


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"junk"])
def test_damaged_graph_not_loaded(exported, damage):
    with pytest.raises(DeviceError, match=r"does not load the model|is not an ONNX file"):
        sampler.open_model(damage, (exported.folder / "weights.bin").read_bytes(), table(exported))


def test_graph_opens_no_other_file(exported, tmp_path, monkeypatch):
    # The same graph, but it names another file of the same length for its weights.
    monkeypatch.chdir(tmp_path)
    weights = (exported.folder / "weights.bin").read_bytes()
    graph = (exported.folder / "graph.onnx").read_bytes().replace(b"weights.bin", b"secrets.bin")
    (tmp_path / "secrets.bin").write_bytes(weights)
    with pytest.raises(DeviceError, match=r"names the file 'secrets\.bin'; a graph must not read other files than its weights"):
        sampler.open_model(graph, weights, table(exported))


def test_short_weights_not_loaded(exported):
    weights = (exported.folder / "weights.bin").read_bytes()
    graph = (exported.folder / "graph.onnx").read_bytes()
    with pytest.raises(DeviceError, match="does not load the model"):
        sampler.open_model(graph, weights[: len(weights) // 2], table(exported))


class Counted:
    """A velocity that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any, _t: float, _s: float) -> Any:
        self.calls += 1
        return 0 * x


@pytest.mark.parametrize("method", get_args(SamplerName))
def test_lists_of_samplers_agree_and_each_takes_the_evaluations_that_costs_are_counted_with(method):
    """Compare the lists: a sampler that is missing in one draws on no device, or its cost is wrong."""
    assert set(get_args(SamplerName)) == set(diffusion.SAMPLERS) == set(sampler.SAMPLERS)
    assert get_args(SamplerName) == get_args(SamplerTable.model_fields["method"].annotation)
    times = [1.0, 0.6, 0.3, 0.0]
    factory, device = Counted(), Counted()
    diffusion.SAMPLERS[method](factory, torch.zeros(1, 1, 2, 2), times)
    sampler.SAMPLERS[method](device, np.zeros((1, 1, 2, 2), np.float32), times)
    assert factory.calls == device.calls == Sampler(method=method, steps=3, guidance=1).evaluations


def test_lists_of_precisions_agree():
    """Compare the lists: a precision that is missing in one falls back to another, or its updates are large."""
    from model import graph
    from model.export import TORCH_TYPES
    from ota.delta.numbers import KINDS
    from ota.manifest import Precision

    assert get_args(PrecisionName) == get_args(Precision)
    assert set(get_args(PrecisionName)) == set(TORCH_TYPES) == set(graph.STORED)
    assert set(get_args(PrecisionName)) <= set(KINDS)
    for name in get_args(PrecisionName):
        assert KINDS[name].width == graph.STORED[name][1] == TORCH_TYPES[name].itemsize
        round_to_stored(torch.nn.Linear(2, 2), name)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([1.0, 0.5, 0.25], "the first time must be 1, which is noise, and the last one 0, which is the image"),
        ([0.9, 0.5, 0.0], "the first time must be 1, which is noise, and the last one 0, which is the image"),
        ([1.0, 0.5, 0.5, 0.0], "the times must fall from 1 to 0"),
    ],
)
def test_table_that_does_not_begin_at_noise_and_end_at_the_image_is_refused(exported, times, says):
    rows = json.loads((exported.folder / "sampler.json").read_bytes()) | {"times": times}
    with pytest.raises(ManifestError, match=says):
        parse(SamplerTable, json.dumps(rows).encode(), MAX_TABLE)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"schema_version": 1, "guidance_low": 0.2}, "only form 2 limits the guidance to an interval"),
        ({"schema_version": 2, "guidance_low": 0.8, "guidance_high": 0.2}, "guidance_low must lie below guidance_high"),
    ],
)
def test_table_with_an_interval_that_is_none_is_refused(exported, fields, says):
    rows = json.loads((exported.folder / "sampler.json").read_bytes()) | fields
    with pytest.raises(ManifestError, match=says):
        parse(SamplerTable, json.dumps(rows).encode(), MAX_TABLE)
