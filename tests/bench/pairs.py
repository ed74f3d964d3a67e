"""Real pairs of models for `make bench-delta`: one network, retrained in seven ways, stored in four.

    python -m tests.bench.pairs      writes build/bench/delta/pairs/WAY.STORED/{old,new}.onnx

The ways: `full` and `gentle` retrain all weights at learning rates of 3e-4 and 2e-5; `experts` trains only the experts of two
blocks; `lowrank` trains rank-4 factors and merges them; `sparse` trains only the 5 % of each tensor's weights that moved most in
a trial of 40 steps; `grid` moves the stored weights by the change of `full` in whole steps, as the flow does (`update_grid` 2);
`scratch` trains another seed from fresh weights. Each model is one ONNX file with its weights inside. int8 and int4 use the
scales of the first model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model import photographs
from model.config import ModelConfig
from model.data import Dataset, prepare
from model.export import quantise, tensor_of
from model.graph import SCALE, layout, scaled_axis
from model.network import Network
from model.train import round_to_stored
from tests.bench.model import Trainer

BUILD = Path("build/bench/delta")
CONFIG = ModelConfig(tier="nano", configuration="I", image_size=16, channels=1, text_length=20)
WAYS = ("full", "gentle", "experts", "lowrank", "sparse", "grid", "scratch")
STORED = ("float32", "bfloat16", "int8", "int4")
FIRST_STEPS, STEPS = 400, 120
INT4_BLOCK = 32


class Factors(nn.Module):
    """A weight with a low-rank change, W + A B, of which only A and B are trained."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(*weight.shape[:-1], rank))
        self.b = nn.Parameter(torch.randn(*weight.shape[:-2], rank, weight.shape[-1]) * weight.shape[-1] ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the merged weight."""
        return weight + self.a @ self.b


def deliveries() -> tuple[Dataset, Dataset]:
    """Prepare the surfaces as they are before and after the light changes."""
    found = []
    for last in (1, 2):
        folder = BUILD / f"data-{last}"
        if not (folder / "metadata.jsonl").is_file():
            for delivery in range(1, last + 1):
                photographs.surfaces(folder, delivery, patches=200)
        found.append(prepare(folder, CONFIG, BUILD / "cache", f"pairs-{last}"))
    return found[0], found[1]


def trained(
    network: Network, data: Dataset, rate: float, steps: int, seed: int, mask: dict[str, Tensor] | None = None
) -> Network:
    """Train a network; return the average of its weights, which is what is published."""
    trainer = Trainer(network, "I", data, rate, seed)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(steps):
        trainer.step()
        if mask:
            with torch.no_grad():
                for name, p in network.named_parameters():
                    p.copy_(torch.where(mask[name], p, before[name]))
    made: Network = trainer.average  # type: ignore[assignment]
    if mask:
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(torch.where(mask[name], p, before[name]))
    return made


def moved_most(first: Network, data: Dataset, share: float) -> dict[str, Tensor]:
    """Find where each tensor's largest changes are after a short trial."""
    trial = trained(copy.deepcopy(first), data, 3e-4, 40, 1)
    found = {}
    for (name, before), after in zip(first.named_parameters(), trial.parameters(), strict=True):
        change = (after - before).abs()
        found[name] = change >= torch.quantile(change.flatten()[:1_000_000], 1 - share)
    return found


def retrained(way: str, first: Network, data: Dataset) -> Network:
    """Retrain the first model in one of the ways."""
    network = copy.deepcopy(first).train()
    if way == "scratch":
        torch.manual_seed(7)
        return trained(Network(CONFIG), data, 2e-3, FIRST_STEPS, 7)
    if way == "gentle":
        return trained(network, data, 2e-5, STEPS, 1)
    if way == "sparse":
        return trained(network, data, 3e-4, STEPS, 1, moved_most(first, data, 0.05))
    if way == "experts":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(("blocks.2.experts.w", "blocks.4.experts.w")))
    if way == "lowrank":
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for block in network.blocks:
            for holder, name in (
                (block, "qkv"),
                (block, "out"),
                (block.experts, "w13"),
                (block.experts, "w2"),
                (block.experts, "s13"),
                (block.experts, "s2"),
            ):
                parametrize.register_parametrization(holder, name, Factors(getattr(holder, name), 4))
    made = trained(network, data, 1e-3 if way == "lowrank" else 3e-4, STEPS, 1)
    if way == "lowrank":
        for block in made.blocks:
            for holder in (block, block.experts):
                for name in list(holder.parametrizations):
                    parametrize.remove_parametrizations(holder, name)
    return made


def gridded(first: Network, after: Network, as_type: str) -> Network:
    """Move the stored weights by the change of a full retraining in whole steps, as the flow does."""
    made = copy.deepcopy(first)
    round_to_stored(made, "bfloat16" if as_type == "bfloat16" else "float32")
    with torch.no_grad():
        for weight, before, moved in zip(made.parameters(), first.parameters(), after.parameters(), strict=True):
            change = moved - before
            step = 2 * change.square().mean().sqrt()
            if step > 0:
                weight.copy_(weight + (change / step).round() * step)
    return made


def once(name: str, make: Callable[[], Network]) -> Network:
    """Return a network; train it only once, and keep it."""
    path = BUILD / "models" / f"{name}.safetensors"
    network = Network(CONFIG)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in make().state_dict().items()}, path)
    network.load_state_dict(load_file(path))
    return network


def stored(network: Network, as_type: str, scales_of: Network) -> bytes:
    """Store the network's weights as initializers of an ONNX file; quantised ones get a node that converts them to float32."""
    initializers, nodes = [], []
    for tensor in layout(network.config, "float32")[0]:
        values, like = tensor_of(network, tensor.name).detach(), tensor_of(scales_of, tensor.name).detach()
        axis = scaled_axis(tensor.name)
        if as_type == "int8" and axis is not None:
            scale = quantise(like, axis)[1]
            shape = [1] * values.dim()
            shape[axis] = -1
            codes = (values / scale.reshape(shape)).round().clamp(-127, 127).to(torch.int8).numpy()
            initializers.append(helper.make_tensor(tensor.name, TensorProto.INT8, codes.shape, codes.tobytes(), raw=True))
        elif as_type == "int4" and axis is not None and values.shape[-1] % INT4_BLOCK == 0:
            blocks = like.reshape(-1, INT4_BLOCK)
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            codes = (values.reshape(-1, INT4_BLOCK) / scale).round().clamp(-7, 7).to(torch.int8).numpy().reshape(-1)
            packed = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8)
            initializers.append(helper.make_tensor(tensor.name, TensorProto.INT4, values.shape, packed.tobytes(), raw=True))
        elif as_type == "bfloat16":
            codes = values.to(torch.bfloat16).view(torch.int16).numpy()
            initializers.append(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, codes.shape, codes.tobytes(), raw=True))
            continue
        else:
            array = values.numpy()
            initializers.append(helper.make_tensor(tensor.name, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True))
            continue
        array = scale.reshape(-1).numpy().astype(np.float32)
        initializers.append(helper.make_tensor(tensor.name + SCALE, TensorProto.FLOAT, array.shape, array.tobytes(), raw=True))
        nodes.append(helper.make_node("DequantizeLinear", [tensor.name, tensor.name + SCALE], [tensor.name + ".back"]))
    graph = helper.make_graph(nodes, "weights", [], [], initializers)
    return helper.make_model(graph, producer_name="deltaferry", ir_version=10).SerializeToString(deterministic=True)


def main() -> None:
    """Train what is not there yet, and write every pair."""
    torch.set_num_threads(1)
    before, after = deliveries()
    torch.manual_seed(0)
    first = once("first", lambda: trained(Network(CONFIG), before, 2e-3, FIRST_STEPS, 0))
    for way in WAYS:
        trained_as = "full" if way == "grid" else way
        network = once(trained_as, lambda way=trained_as: retrained(way, first, after))  # type: ignore[misc]
        for as_type in STORED:
            published = gridded(first, network, as_type) if way == "grid" else network
            folder = BUILD / "pairs" / f"{way}.{as_type}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "old.onnx").write_bytes(stored(first, as_type, first))
            (folder / "new.onnx").write_bytes(stored(published, as_type, first))
        print(way, flush=True)


if __name__ == "__main__":
    main()
