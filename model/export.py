"""A checkpoint → the files that a device runs, checked against the network they came from before anything is handed on.

graph.onnx      the graph of (tier, configuration, precision); the same bytes for every release
weights.bin     the weights, at offsets that depend on the configuration alone
sampler.json    the solver's table and the pinned runtime: what a device needs to draw an image
golden.npz      fixed inputs and the outputs they gave here
reference.json  expert load, image statistics and latency budget that a device compares itself with
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from model.config import VARIANTS, ModelConfig, PrecisionName, VariantName
from model.diffusion import timetable
from model.errors import ExportError
from model.graph import SCALE, WEIGHTS_FILE, build, layout, scaled_axis
from model.network import Network
from model.scorecard import Sampler, Sha256
from model.session import RUNTIME, Session, noise
from model.train import Checkpoint

PARITY_TOLERANCE = 1e-4  # largest |difference| of a velocity with the routing forced; float32 noise is a tenth of it
ROUTING_TOLERANCE = 0.01  # mean |difference| of the expert load, torch routing by itself; a flipped tie moves it far less
GOLDEN_TOLERANCE = 1e-3  # |difference| that a device may show; other CPUs order their sums otherwise
GOLDEN_SHARE = 0.98  # of the elements that must stay within it: a flipped tie in the routing moves a few far
GOLDEN_SEED = 20_000
GOLDEN_IMAGES = 8
TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
STATISTICS = ("mean", "deviation", "edges")


@dataclass(frozen=True)
class Export:
    """A folder with one exported variant."""

    folder: Path
    weights_sha256: Sha256
    parity: float
    """Largest difference to the network in torch, routing forced."""


def export(
    checkpoint: Checkpoint, precision: PrecisionName, sampler: Sampler, captions: list[str], latency_ms: float, out: Path
) -> Export:
    """Write the five files of one variant into `out` and check them.

    Args:
        checkpoint: what to export.
        precision: how weights are stored.
        sampler: how devices are to draw.
        captions: some captions of the line; the golden images are made for them.
        latency_ms: the budget for one image on the device class.
        out: made when missing.

    Raises:
        ExportError: ONNX Runtime does not compute what torch computes; nothing usable was written.
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
    try:
        onnx.checker.check_model(str(out / "graph.onnx"), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
    describe(Session(graph, weights), sampler, checkpoint.lineage.variant, captions, latency_ms, out)
    return Export(out, hashlib.sha256(weights).hexdigest(), parity)


def tensor_of(network: Network, name: str) -> torch.Tensor:
    """The parameter behind a name of the weight file; what is returned shares the network's memory."""
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
    """The weight file: every tensor at its place, rounded to the stored precision; the gaps are zero.

    int8 is symmetric around zero with a scale for each output; see `quantise`.

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


def quantise(values: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as whole numbers in [-127, 127] (float) and the scale of each index of `axis`, by which they are multiplied.

    Scales are powers of two: stored weights are then exact in float32, storing them again changes nothing, and a retraining
    seldom moves a scale, which would change every number under it in a delta. The price is up to one bit.
    """
    mantissa, exponent = torch.frexp(values.abs().amax(dim=1 - axis) / 127)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-100)  # the next power of two above
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    return torch.round(values / scale.unsqueeze(1 - axis)).clamp(-127, 127), scale


def unpack(config: ModelConfig, precision: PrecisionName, weights: bytes) -> Network:
    """The network whose weights are exactly the stored ones.

    Raises:
        ExportError: the file has another size than this configuration's.
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
    """Run the exported model and the network on random inputs; returns the largest difference of their outputs.

    Torch is forced to the routing that ONNX Runtime chose: the router compares sums that the two round differently, so a
    near tie may fall either way and would hide what is being checked. That the graph chooses by the same rule is checked
    by the expert load, which a flipped tie hardly moves.

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
        raise ExportError("the exported model routes otherwise than the trained one; do not release it, and report the tier")
    return worst


def image_statistics(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Mean, standard deviation and mean absolute step between neighbouring pixels of each image: [B, 3]."""
    x = images.astype(np.float64)
    edges = np.abs(np.diff(x, axis=2)).mean(axis=(1, 2, 3)) + np.abs(np.diff(x, axis=3)).mean(axis=(1, 2, 3))
    return np.stack((x.mean(axis=(1, 2, 3)), x.std(axis=(1, 2, 3)), edges), axis=1)


def describe(session: Session, sampler: Sampler, variant: VariantName, captions: list[str], latency_ms: float, out: Path) -> None:
    """Write `sampler.json`, `golden.npz` and `reference.json` for a session."""
    if (sampler.method == "mean") == VARIANTS[variant].guided:
        raise ExportError(
            f"the variant {variant} is not drawn with the method {sampler.method!r}; only distilled ones take `mean`"
        )
    if sampler.guidance != 1 and not VARIANTS[variant].guided:
        raise ExportError(f"the variant {variant} is trained without guidance; give its sampler guidance 1")
    table: dict[str, Any] = {
        "schema_version": 1,
        "variant": variant,
        "method": sampler.method,
        "times": timetable(sampler.steps),
        "guidance": sampler.guidance,
        "image": {"channels": session.channels, "size": session.size},
        "text_length": session.text_length,
        "runtime": RUNTIME,
    }
    (out / "sampler.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")

    chosen = [captions[i % len(captions)] for i in range(GOLDEN_IMAGES)]
    seeds = [GOLDEN_SEED + i for i in range(GOLDEN_IMAGES)]
    ids = session.encode(chosen)
    x = np.stack([noise(seed, (session.channels, session.size, session.size)) for seed in seeds])
    t = np.linspace(1, 0.1, GOLDEN_IMAGES, dtype=np.float32)
    # A student is only ever asked for the mean velocity over one of its steps.
    r = np.maximum(t - np.float32(1 / sampler.steps), 0) if sampler.method == "mean" else t
    velocity = session.run(x, t, r, ids)[0]
    images, load = session.generate(ids, seeds, sampler)
    np.savez(out / "golden.npz", ids=ids, seeds=np.array(seeds, dtype=np.int64), t=t, r=r, velocity=velocity)

    statistics = image_statistics(images.clamp(-1, 1).numpy())
    reference: dict[str, Any] = {
        "schema_version": 1,
        "golden": {"tolerance": GOLDEN_TOLERANCE, "share": GOLDEN_SHARE},
        "load": [[round(float(mass), 6) for mass in row] for row in load],
        "statistics": {
            name: {"low": round(float(column.min()), 6), "high": round(float(column.max()), 6)}
            for name, column in zip(STATISTICS, statistics.T, strict=True)
        },
        "latency_ms": latency_ms,
    }
    (out / "reference.json").write_text(json.dumps(reference, indent=1, sort_keys=True) + "\n")
