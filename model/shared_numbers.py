"""Train few shared numbers instead of all weights: each weight moves by one of them, chosen by a seeded hash, times a seeded sign.

The gradient of every weight is replaced by the gradient of its shared number, with the weight's sign. So all weights that share a
number move alike, whatever the optimiser (compare Uni-LoRA, Li et al. 2025, arXiv 2506.00799, which does so within low-rank factors).

The hash is that of the delta format, so a delta sends the shared numbers and the seed alone. `model` may not import it from
`ota.delta`; a test compares both. Every update has a seed of its own: so other weights share a number in the next one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.graph import layout
from model.network import Network
from model.storage import parts

COUNT = 4096
_COUNTED = "gate_bias"  # ends the names of tensors that move by what the experts get to do, not by gradients


def seed_of(weights_sha256: str) -> int:
    """Return the seed of the update of weights with this hash, below 2^64."""
    return int(weights_sha256[:16], 16)


def places(config: ModelConfig) -> dict[str, int]:
    """Return the place of the first number of each tensor that shares numbers, by its name in the weight file; they follow each other."""
    made, place = dict[str, int](), 0
    for tensor in layout(config, "float32")[0]:
        if not tensor.name.endswith(_COUNTED):
            made[tensor.name] = place
            place += int(np.prod(tensor.shape))
    return made


def spread(seed: int, place: int, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return which shared number each weight of a tensor moves by, int64, and with which sign, float32, as `ota.delta.numbers.spread` does.

    Args:
        seed: of the update.
        place: of the tensor's first number.
        shape: of the tensor.
    """
    found = np.arange(place + 1, place + 1 + int(np.prod(shape)), dtype=np.uint64)
    found *= np.uint64(0x9E3779B97F4A7C15)
    found += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(factor)
    found ^= found >> np.uint64(31)
    chosen = (found >> np.uint64(32)) * np.uint64(COUNT) >> np.uint64(32)
    sign = 1 - 2 * (found & np.uint64(1)).astype(np.float32)
    return torch.from_numpy(chosen.astype(np.int64)).view(shape), torch.from_numpy(sign).view(shape)


class SharedNumbers:
    """The choice of each weight of a network."""

    def __init__(self, network: Network, seed: int) -> None:
        """Choose for every parameter that is trained.

        Args:
            network: gives the shapes and the device.
            seed: of the update.
        """
        self.chosen: dict[str, Tensor] = {}
        self.sign: dict[str, Tensor] = {}
        place = places(network.config)
        for name, weight in network.named_parameters():
            if not weight.requires_grad:
                continue
            found = [spread(seed, place[own], part.shape) for own, part in parts(name, weight)]
            for at, kept in enumerate((self.chosen, self.sign)):
                kept[name] = torch.stack([pair[at] for pair in found]).view(weight.shape).to(weight.device)

    @torch.no_grad()
    def share(self, network: Network) -> None:
        """Replace the gradients of a network by those of its shared numbers, in place."""
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        total = next(iter(gradients.values())).new_zeros(COUNT)
        for name, gradient in gradients.items():
            total.index_add_(0, self.chosen[name].reshape(-1), (gradient * self.sign[name]).reshape(-1))
        for name, gradient in gradients.items():
            gradient.copy_(total[self.chosen[name]] * self.sign[name])


def shared(changes: dict[str, Tensor], seed: int, place: dict[str, int]) -> Tensor:
    """Return the shared numbers, float64 [COUNT], that are nearest to the changes of some tensors.

    Args:
        changes: by the names of the tensors.
        seed: of the update.
        place: of each tensor's first number.
    """
    total, count = torch.zeros(COUNT, dtype=torch.float64), torch.zeros(COUNT)
    for name, change in changes.items():
        chosen, sign = (of.reshape(-1) for of in spread(seed, place[name], change.shape))
        total.index_add_(0, chosen, change.double().reshape(-1) * sign)
        count += torch.bincount(chosen, minlength=COUNT)
    return total / count.clamp(min=1)
