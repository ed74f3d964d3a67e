"""Export a checkpoint as the files that a device runs, and check them against the network they came from.

graph.onnx      graph of one model configuration and precision; the same bytes in every release
weights.bin     weights, at offsets that depend on the model configuration and the precision alone
sampler.json    solver, times, guidance and pinned runtime: what a device needs to draw an image
golden.npz      fixed inputs, and their outputs on the exporting machine
reference.json  expert load, image statistics and latency budget, with which a device compares its own

Beside them lies update.safetensors, if the weights were made from a master: for the codec, not for devices (`model.update`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from model.config import ModelConfig, PrecisionName, VariantName
from model.errors import ExportError
from model.graph import SCALE, WEIGHTS_FILE, build, layout, scaled_axis
from model.network import Network
from model.scorecard import Sampler, Sha256
from model.session import RUNTIME, Session, noise
from model.storage import quantise
from model.train import Checkpoint
from model.update import FACTORS

PARITY_TOLERANCE = 1e-4  # largest |difference| from torch with the same routing; float32 noise is a tenth of it
ROUTING_TOLERANCE = 0.01  # mean |difference| of the expert load when torch routes by itself; a flipped tie changes it far less
GOLDEN_TOLERANCE = 1e-3  # |difference| that a device may show; other CPUs add in another order
GOLDEN_SHARE = 0.98  # share of elements that must stay within it; a flipped tie in the routing changes a few by much more
GOLDEN_SEED = 20_000
GOLDEN_IMAGES = 8
TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
DIGITS = (
    4  # of a measurement; devices compare loads to a tenth and statistics to 0.02, and each digit takes 15 bytes of an update
)
STATISTICS = ("mean", "deviation", "edges")


@dataclass(frozen=True)
class Export:
    """Folder with one exported variant."""

    folder: Path
    weights_sha256: Sha256
    parity: float
    """Largest difference from the network in torch, with the same routing."""


def export(
    checkpoint: Checkpoint, precision: PrecisionName, sampler: Sampler, captions: list[str], latency_ms: float, out: Path
) -> Export:
    """Write the five files of one variant into `out` and check them.

    Args:
        checkpoint: what to export.
        precision: how weights are stored.
        sampler: sampler that devices use.
        captions: some captions of the line, for the golden outputs and the reference statistics.
        latency_ms: latency budget for one image on the device class, in milliseconds.
        out: created if missing.

    Raises:
        ExportError: the network is an ablation, its weights do not fit the precision, ONNX Runtime does not compute what torch
            computes, or the sampler does not fit the variant; the files in `out` must not be used.
    """
    config = checkpoint.lineage.config
    if config.ablation != "none":
        raise ExportError(f"a network with {config.ablation!r} is for measurements only; train one without an ablation to export")
    out.mkdir(parents=True, exist_ok=True)
    network = checkpoint.network()
    weights = pack(network, precision)
    parity = check_parity(network, precision, weights)
    graph = build(config, precision).SerializeToString(deterministic=True)
    (out / "graph.onnx").write_bytes(graph)
    (out / WEIGHTS_FILE).write_bytes(weights)
    (out / FACTORS).unlink(missing_ok=True)
    if (checkpoint.folder / FACTORS).is_file():
        shutil.copyfile(checkpoint.folder / FACTORS, out / FACTORS)
    try:
        onnx.checker.check_model(str(out / "graph.onnx"), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    if (sampler.method == "mean") != (checkpoint.lineage.teacher is not None):
        raise ExportError(
            f"these weights are {'not ' if sampler.method == 'mean' else ''}a student's, and cannot be drawn with the method "
            f"{sampler.method!r}: a student takes `mean`, and only a student does; change the sampler of {checkpoint.lineage.variant}"
        )
    describe(Session(graph, weights), sampler, checkpoint.lineage.variant, captions, latency_ms, out)
    return Export(out, hashlib.sha256(weights).hexdigest(), parity)


def tensor_of(network: Network, name: str) -> torch.Tensor:
    """Return the parameter behind a name of the weight file, as a tensor that shares the network's memory."""
    if not name.startswith("block"):
        return network.get_parameter(name).data
    block, rest = name.removeprefix("block").split(".", 1)
    if rest.startswith("expert"):
        expert, weight = rest.removeprefix("expert").split(".")
        return network.get_parameter(f"blocks.{block}.experts.{weight}").data[int(expert)]
    own = f"blocks.{block}.{rest}"
    parameters = dict(network.named_parameters())
    return (parameters[own] if own in parameters else parameters[f"blocks.{block}.experts.{rest}"]).data


def pack(network: Network, precision: PrecisionName) -> bytes:
    """Build the weight file: every tensor at its offset, rounded to the stored precision; the gaps are zero.

    int8 has one scale for each index of `scaled_axis`; see `model.storage.quantise`.

    Raises:
        ExportError: a weight is not finite, or too large for the precision.
    """
    placed, size = layout(network.config, precision)
    buffer = bytearray(size)
    scales: dict[str, torch.Tensor] = {}

    for tensor in placed:
        values = scales[tensor.name] if tensor.name in scales else tensor_of(network, tensor.name)
        if tensor.stored == "int8" and values.isfinite().all():
            values, scales[tensor.name + SCALE] = quantise(values, scaled_axis(tensor.name) or 0)
        if not values.isfinite().all() or not values.to(TORCH_TYPES[tensor.stored]).isfinite().all():
            raise ExportError(f"{tensor.name} holds a value that {precision} cannot; train again or store float32")
        values = values.to(TORCH_TYPES[tensor.stored])
        buffer[tensor.offset : tensor.offset + tensor.length] = values.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(buffer)


def unpack(config: ModelConfig, precision: PrecisionName, weights: bytes) -> Network:
    """Build the network whose weights are exactly the stored ones.

    Raises:
        ExportError: the size of the file does not match the configuration.
    """
    placed, size = layout(config, precision)
    if len(weights) != size:
        raise ExportError(f"weights of {config.tier}/{config.configuration} take {size} bytes, not {len(weights)}")
    network = Network(config)
    stored: dict[str, torch.Tensor] = {}
    for tensor in placed:
        part = bytearray(weights[tensor.offset : tensor.offset + tensor.length])
        stored[tensor.name] = torch.frombuffer(part, dtype=TORCH_TYPES[tensor.stored]).view(tensor.shape).float()
    for name, values in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        whole = values if scale is None else values * scale.unsqueeze(1 - (scaled_axis(name) or 0))
        tensor_of(network, name).copy_(whole)
    return network.eval()


def check_parity(network: Network, precision: PrecisionName, weights: bytes, seed: int = 0) -> float:
    """Run the exported model and the network on random inputs, and return the largest difference of their outputs.

    Torch uses the routing that ONNX Runtime chose. The two round the router's sums differently, so a near tie may be decided
    either way, which would hide the errors that are checked here. A comparison of expert loads, with torch routing by
    itself, checks that the graph routes by the same rule; a flipped tie hardly changes the load. Velocities are compared
    relative to the largest one, if that is above 1.

    Raises:
        ExportError: the difference is above `PARITY_TOLERANCE`, or the routing follows another rule.
    """
    config = network.config
    traced = Session(build(config, precision, routes=True).SerializeToString(deterministic=True), weights)
    stored = unpack(config, precision, weights)
    generator = torch.Generator().manual_seed(seed)
    worst = routing = 0.0
    for batch in (1, 3):
        x = torch.randn((batch, config.channels, config.image_size, config.image_size), generator=generator)
        t, r = torch.rand((2, batch), generator=generator)
        ids = torch.randint(0, 257, (batch, config.text_length), generator=generator)
        v, load, *routes = traced.run(x.numpy(), t.numpy(), r.numpy(), ids.numpy())
        with torch.inference_mode():
            expected, expected_load, _ = stored.traced(x, t, r, ids, [torch.from_numpy(c) for c in routes])
            own_load = stored(x, t, r, ids)[1]
        routing = max(routing, float(np.abs(load - own_load.numpy()).mean()))
        scale = max(1.0, float(expected.abs().max()))
        worst = max(worst, float(np.abs(v - expected.numpy()).max()) / scale)
        worst = max(worst, float(np.abs(load - expected_load.numpy()).max()))
    if not worst <= PARITY_TOLERANCE:  # also catches NaN
        raise ExportError(
            f"the exported model differs from the trained one by {worst:.2g}, more than {PARITY_TOLERANCE:g}; "
            "do not release it, and report the tier and configuration"
        )
    if not routing <= ROUTING_TOLERANCE:
        raise ExportError("the exported model chooses other experts than the trained one; do not release it, and report the tier")
    return worst


def image_statistics(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Compute mean, standard deviation and edge strength of each image, [B, 3].

    Edge strength is the mean absolute difference of vertical neighbours plus that of horizontal ones.
    """
    x = images.astype(np.float64)
    edges = np.abs(np.diff(x, axis=2)).mean(axis=(1, 2, 3)) + np.abs(np.diff(x, axis=3)).mean(axis=(1, 2, 3))
    return np.stack((x.mean(axis=(1, 2, 3)), x.std(axis=(1, 2, 3)), edges), axis=1)


def sampler_table(sampler: Sampler, variant: VariantName, channels: int, size: int, text_length: int) -> dict[str, Any]:
    """Return the content of `sampler.json`: how a device draws images of `channels` and `size` for captions of `text_length` bytes.

    Raises:
        ExportError: the sampler guides a student, whose images hold the guidance already.
    """
    if sampler.guidance != 1 and sampler.method == "mean":
        raise ExportError(f"the student {variant} has learnt guidance; give its sampler guidance = 1")
    interval = sampler.model_dump(include={"guidance_low", "guidance_high"})  # empty where every step is guided
    return {
        "schema_version": 2 if interval else 1,  # agents before 0.2 know no interval
        **interval,
        "variant": variant,
        "method": sampler.method,
        "times": sampler.times,
        "guidance": sampler.guidance,
        "image": {"channels": channels, "size": size},
        "text_length": text_length,
        "runtime": RUNTIME,
    }


def describe(session: Session, sampler: Sampler, variant: VariantName, captions: list[str], latency_ms: float, out: Path) -> None:
    """Write `sampler.json`, `golden.npz` and `reference.json` for a session.

    Raises:
        ExportError: the sampler guides a student, whose images hold the guidance already.
    """
    table = sampler_table(sampler, variant, session.channels, session.size, session.text_length)
    (out / "sampler.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")

    chosen = [captions[i % len(captions)] for i in range(GOLDEN_IMAGES)]
    seeds = [GOLDEN_SEED + i for i in range(GOLDEN_IMAGES)]
    ids = session.encode(chosen)
    x = np.stack([noise(seed, (session.channels, session.size, session.size)) for seed in seeds])
    t = np.linspace(1, 0.1, GOLDEN_IMAGES, dtype=np.float32)
    # A student only ever predicts the mean velocity over one of its steps.
    r = np.maximum(t - np.float32(1 / sampler.steps), 0) if sampler.method == "mean" else t
    velocity = session.run(x, t, r, ids)[0]
    images, load = session.generate(ids, seeds, sampler)
    np.savez(out / "golden.npz", ids=ids, seeds=np.array(seeds, dtype=np.int64), t=t, r=r, velocity=velocity)

    statistics = image_statistics(images.clamp(-1, 1).numpy())
    reference: dict[str, Any] = {
        "schema_version": 1,
        "golden": {"tolerance": GOLDEN_TOLERANCE, "share": GOLDEN_SHARE},
        "load": [[round(float(mass), DIGITS) for mass in row] for row in load],
        "statistics": {
            name: {"low": round(float(column.min()), DIGITS), "high": round(float(column.max()), DIGITS)}
            for name, column in zip(STATISTICS, statistics.T, strict=True)
        },
        "latency_ms": latency_ms,
    }
    (out / "reference.json").write_text(json.dumps(reference, indent=1, sort_keys=True) + "\n")
