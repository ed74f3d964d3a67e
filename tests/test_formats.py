"""Every picture format and caption that can be chosen: trained for two steps, exported, and drawn alike on the device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ConfigurationName, ModelConfig
from model.data import METADATA, caption_ids, prepare
from model.diffusion import guided, sample
from model.export import Export, export, pack, unpack
from model.graph import build
from model.network import Network
from model.scorecard import Sampler
from model.session import Session, load, noise
from model.train import Checkpoint, TrainOptions, train
from ota.agent import sampler as agent
from ota.manifest import SamplerTable
from tests.conftest import few

from .conftest import LATENCY_MS, VERSION, write_images

TEXT = 16
TOLERANCE, SHARE = 2e-3, 0.8  # share of the pixels; a near tie in the routing may go the other way and change the pixels around
TWO_STEPS = TrainOptions(steps=2, batch=2, learning_rate=0.02, warmup=0, decay_from=1, ema=0, caption_dropout=0.5)
DRAWING = Sampler(method="euler", steps=2, guidance=2.0)
LANGUAGES = {
    "Japanese": "傷のある布",
    "Arabic": "قماش",
    "Hindi": "कपड़ा",
    "emoji": "🧵🪡",
    "flag of two letters": "🇯🇵",
    "composed": "é",
    "decomposed": "e\u0301",
    "newline": "a\nb",
}


def config_of(configuration: ConfigurationName, size: int, channels: int) -> ModelConfig:
    return ModelConfig.model_validate(
        {"tier": "test", "configuration": configuration, "image_size": size, "channels": channels, "text_length": TEXT}
    )


def trained(config: ModelConfig, folder: Path) -> Checkpoint:
    return train(config, prepare(folder / "data", config, folder / "cache"), VERSION, TWO_STEPS, folder / "run")


def device(made: Export) -> agent.Model:
    """Open the export as a device does."""
    table = SamplerTable.model_validate_json((made.folder / "sampler.json").read_bytes())
    return agent.open_model((made.folder / "graph.onnx").read_bytes(), (made.folder / "weights.bin").read_bytes(), table)


def agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Check whether two pictures are nearly the same; the export itself checks that the graph computes the network."""
    return float((np.abs(one - other) <= TOLERANCE).mean()) >= SHARE


@pytest.mark.parametrize(
    ("configuration", "size", "channels"),
    few([("I", 16, 3), ("II", 16, 1), ("II", 24, 3), ("I", 32, 1), ("II", 32, 3), ("I", 64, 3)], 2),
)
def test_format_is_trained_exported_and_drawn(tmp_path: Path, configuration: ConfigurationName, size: int, channels: int) -> None:
    config = config_of(configuration, size, channels)
    write_images(tmp_path / "data")
    checkpoint = trained(config, tmp_path)
    made = export(checkpoint, "float32", DRAWING, ["bar"], LATENCY_MS, tmp_path / "export")  # checks its own parity
    session, network = load(made.folder, threads=1), checkpoint.network()
    ids, start = session.encode(["bar"]), torch.from_numpy(noise(5, (channels, size, size)))[None]
    image = session.generate(ids, [5], DRAWING)[0]
    with torch.inference_mode():
        expected = sample(guided(lambda *inputs: network(*inputs)[0], torch.from_numpy(ids), DRAWING), start, DRAWING)
    assert image.shape == (1, channels, size, size)
    assert not agree(image.numpy(), start.numpy())  # two steps of training draw something
    assert agree(image.numpy(), expected.numpy())
    assert agree(device(made).generate(ids, [5]), expected.numpy())


def test_largest_format_is_trained_and_computed(tmp_path: Path) -> None:
    """Compute one evaluation at 4096 positions, because the golden images of an export would take minutes."""
    config = config_of("I", 128, 1)
    write_images(tmp_path / "data")
    network = trained(config, tmp_path).network()
    weights = pack(network, "bfloat16")
    session = Session(build(config, "bfloat16").SerializeToString(deterministic=True), weights, threads=1)
    x, t = noise(3, (1, 1, 128, 128)), np.array([0.7], dtype=np.float32)
    v, load_ = session.run(x, t, t, session.encode(["bar"]))
    with torch.inference_mode():
        expected, expected_load = unpack(config, "bfloat16", weights)(
            torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(t), torch.from_numpy(session.encode(["bar"]))
        )
    assert float(expected.abs().max()) > 0.05
    assert agree(np.asarray(v), expected.numpy())
    np.testing.assert_allclose(load_, expected_load.numpy(), atol=0.01)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Train and export a model of images without captions."""
    folder = tmp_path_factory.mktemp("unconditional")
    write_images(folder / "data")
    rows = [json.loads(line) | {"text": ""} for line in (folder / "data" / METADATA).read_text().splitlines()]
    (folder / "data" / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return export(trained(config_of("I", 16, 1), folder), "float32", DRAWING, [""], LATENCY_MS, folder / "export")


def test_images_without_captions_are_enough(unconditional: Export) -> None:
    session = load(unconditional.folder, threads=1)
    nothing = np.zeros((3, TEXT), dtype=np.int64)
    assert np.array_equal(session.encode(["", "", ""]), nothing)
    images = session.generate(nothing, [1, 2, 1], DRAWING)[0]
    assert images.isfinite().all()
    assert (images.flatten(1).std(dim=1) > 0.1).all()
    assert torch.equal(images[0], images[2])
    assert not agree(images[0].numpy(), images[1].numpy())  # only the noise differs
    model = device(unconditional)
    drawn = model.generate(np.concatenate([model.encode("")] * 2), [1, 2])
    assert agree(drawn, images[:2].numpy())


@pytest.mark.parametrize("guidance", [1.5, 7.0])
def test_guidance_towards_no_caption_changes_nothing(unconditional: Export, guidance: float) -> None:
    """Compare velocities with and without a caption: they are the same, in torch's sampler and in the device's."""
    session, model = load(unconditional.folder, threads=1), device(unconditional)
    x, ids = noise(8, (2, 1, 16, 16)), session.encode(["", ""])

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(session.run(*(i.numpy() for i in inputs))[0]))

    for t in (1.0, 0.3):
        plain = guided(network, torch.from_numpy(ids), Sampler(guidance=1.0))(torch.from_numpy(x), t, t)
        led = guided(network, torch.from_numpy(ids), Sampler(guidance=guidance))(torch.from_numpy(x), t, t)
        torch.testing.assert_close(led, plain, rtol=0, atol=1e-5)
        model.table = model.table.model_copy(update={"guidance": guidance})
        np.testing.assert_allclose(model.velocity(x, t, t, ids), plain.numpy(), rtol=0, atol=1e-5)
        given = guided(network, torch.from_numpy(session.encode(["bar", "bar"])), Sampler(guidance=guidance))(
            torch.from_numpy(x), t, t
        )
        assert float((given - plain).abs().max()) > 1e-3  # a caption would change it


@pytest.mark.parametrize("text", list(LANGUAGES.values()), ids=list(LANGUAGES))
def test_caption_in_any_language_round_trips(unconditional: Export, text: str) -> None:
    ids = caption_ids(text, TEXT)
    assert bytes(i - 1 for i in ids if i).decode() == text
    assert load(unconditional.folder, threads=1).encode([text]).tolist() == [ids]
    model = device(unconditional)
    assert model.encode(text).tolist() == [ids]
    assert np.isfinite(model.generate(model.encode(text), [0])).all()


@pytest.mark.parametrize("escaped", [True, False])
def test_captions_of_all_languages_reach_training(tmp_path: Path, escaped: bool) -> None:
    """Train on captions written as JSON escapes or as they are, without normalisation.

    Composed and decomposed letters therefore stay two captions.
    """
    folder, texts = write_images(tmp_path / "data"), list(LANGUAGES.values())
    rows = [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]
    rows = [row | {"text": texts[i % len(texts)]} for i, row in enumerate(rows)]
    (folder / METADATA).write_bytes("".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows).encode())
    config = config_of("I", 16, 1)
    dataset = prepare(folder, config, tmp_path / "cache")
    assert dataset.quarantine == {}
    assert dataset.captions == [texts[i % len(texts)] for i in range(80)]
    assert [bytes(i - 1 for i in row if i).decode() for row in dataset.ids.tolist()] == dataset.captions
    checkpoint = train(config, dataset, VERSION, TWO_STEPS, tmp_path / "run")
    assert all(weight.isfinite().all() for weight in checkpoint.network().state_dict().values())


def test_languages_are_told_apart() -> None:
    torch.manual_seed(3)
    network = Network(config_of("I", 16, 1)).eval()
    with torch.no_grad():
        network.head.weight.normal_()
    x, t = torch.from_numpy(noise(1, (1, 1, 16, 16))), torch.tensor([0.5])
    with torch.inference_mode():
        seen = [network(x, t, t, torch.tensor([caption_ids(text, TEXT)]))[0] for text in ["", *LANGUAGES.values()]]
    for i, one in enumerate(seen):
        assert all(float((one - other).abs().max()) > 1e-3 for other in seen[:i])
