"""Sums over the gradients of a training, which tell how much the loss minds an error in each part of a matrix.

For a matrix W with gradients G_i, the means of G_i G_iᵀ and of G_iᵀ G_i are the two factors of a Kronecker approximation of its
Fisher information (Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"; for
weighting a low-rank approximation: Chekalina et al. 2025, arXiv 2505.17974). They are collected from the gradients that the
training computes anyway, over its last fifth. `model.update` uses them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.errors import CheckpointError
from model.network import Network
from model.storage import parts

STATISTICS = "statistics.safetensors"
SHARE = 0.2  # of a training's steps, at its end
LEAST_SIDE = 16  # rows and columns of what counts as a matrix; below, a product of thin matrices cannot pay


def is_matrix(tensor: Tensor) -> bool:
    """Check whether a parameter is a matrix, or a stack of matrices, whose update may be a product of thin matrices."""
    return tensor.dim() in (2, 3) and min(tensor.shape[-2:]) >= LEAST_SIDE


class Gradients:
    """Sums over the gradients of a network's matrices; every expert counts as a matrix of its own.

    A matrix [m, n] has `left` [m, m], the sum of G Gᵀ, and `right` [n, n], the sum of Gᵀ G. `count` is the number of steps.
    """

    def __init__(self, network: Network) -> None:
        self.sums: dict[str, Tensor] = {"count": torch.zeros(())}
        for name, weight in network.named_parameters():
            if not (weight.requires_grad and is_matrix(weight)):
                continue
            *stack, rows, columns = weight.shape
            self.sums[f"left.{name}"] = weight.new_zeros((*stack, rows, rows))
            self.sums[f"right.{name}"] = weight.new_zeros((*stack, columns, columns))

    @staticmethod
    def first_step(steps: int) -> int:
        """Return the first step (from 0) of the last fifth of a training."""
        return steps - max(1, round(SHARE * steps))

    @torch.no_grad()
    def add(self, network: Network) -> None:
        """Add the present gradients of a network, before anything scales them."""
        self.sums["count"] += 1
        for name, weight in network.named_parameters():
            gradient = weight.grad
            if gradient is None or not is_matrix(weight):
                continue
            of = gradient if gradient.dim() == 3 else gradient.unsqueeze(0)
            for side, left, right in (("left", of, of.mT), ("right", of.mT, of)):
                total = self.sums[f"{side}.{name}"]
                (total if total.dim() == 3 else total.unsqueeze(0)).baddbmm_(left, right)

    def means(self) -> dict[str, Tensor]:
        """Return the means over the steps, by the names of the tensors in the weight file."""
        count = self.sums["count"].clamp(min=1)
        made: dict[str, Tensor] = {}
        for key, total in self.sums.items():
            side, _, name = key.partition(".")
            if not name:
                continue
            for own, part in parts(name, total):
                made[f"{side}.{own}"] = part / count.to(part.device)
        return made


def load_statistics(folder: Path) -> dict[str, Tensor]:
    """Read the statistics in a checkpoint's folder; empty if it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / STATISTICS
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read; it is damaged, so train again") from error
