"""Train few shared numbers instead of all weights: each weight moves by one of them, chosen by a seeded hash, times a seeded sign.

The gradient of every weight is replaced by the gradient of its shared number, with the weight's sign. So all weights that share a
number move alike, whatever the optimiser (compare Uni-LoRA, Li et al. 2025, arXiv 2506.00799, which does so within low-rank factors).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from model.network import Network
from model.storage import parts

COUNT = 4096


def spread(name: str, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return which shared number each weight of a tensor of the weight file moves by, and with which sign.

    Args:
        name: of the tensor in the weight file; it is the seed.
        shape: of the tensor.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(COUNT, tuple(shape), generator=generator)
    sign = torch.randint(2, tuple(shape), generator=generator) * 2 - 1
    return chosen, sign.float()


class SharedNumbers:
    """The choice of each weight of a network."""

    def __init__(self, network: Network) -> None:
        self.chosen: dict[str, Tensor] = {}
        self.sign: dict[str, Tensor] = {}
        for name, weight in network.named_parameters():
            if not weight.requires_grad:
                continue
            found = [spread(own, part.shape) for own, part in parts(name, weight)]
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


def shared(changes: dict[str, Tensor]) -> Tensor:
    """Return the shared numbers, [COUNT], that are nearest to the changes of some tensors, by their names in the weight file."""
    total, count = torch.zeros(COUNT, dtype=torch.float64), torch.zeros(COUNT)
    for name, change in changes.items():
        chosen, sign = (of.reshape(-1) for of in spread(name, change.shape))
        total.index_add_(0, chosen, change.double().reshape(-1) * sign)
        count += torch.bincount(chosen, minlength=COUNT)
    return total / count.clamp(min=1)
