"""Train weights that will be rounded to a grid around the fielded ones, so that they learn to live with the rounding.

In the second half of a training the forward pass sees every weight's change rounded to whole steps; the gradient passes through as
if there were no rounding (straight-through; Bengio et al. 2013, arXiv 1308.3432). The weights themselves are not rounded; that is
done when they are published, with the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.network import Network
from model.storage import parts


class Grid:
    """Steps of each parameter's change from the fielded weights; there are none before the second half of the training."""

    def __init__(self, network: Network, before: Network, level: float, steps: int) -> None:
        """Prepare the training of `network` for `steps` steps.

        Args:
            network: gives the device.
            before: weights that devices have.
            level: a parameter's step, as a multiple of the root mean square of its change.
            steps: number of training steps.
        """
        self.level, self.first_step = level, steps // 2
        device = next(network.parameters()).device
        self.before = {name: weight.detach().to(device) for name, weight in before.named_parameters()}
        self.sizes = {name: torch.zeros((), device=device) for name in self.before}

    @contextmanager
    def rounded(self, network: Network, average: Network, step: int) -> Iterator[None]:
        """Round the network's weights in place while the context lasts, if the step (from 0) is one of the second half.

        Args:
            network: its weights are put back at the end.
            average: moving average of the weights, which tells the size of each change when the second half begins.
            step: number of the training step.
        """
        if step < self.first_step:
            yield
            return
        with torch.no_grad():
            if step == self.first_step:
                for name, weight in average.named_parameters():
                    self.sizes[name] = self.level * (weight - self.before[name]).square().mean().sqrt()
            kept = {name: weight.clone() for name, weight in network.named_parameters()}
            for name, weight in network.named_parameters():
                if self.sizes[name] > 0:
                    by = torch.round((weight - self.before[name]) / self.sizes[name]) * self.sizes[name]
                    weight.copy_(self.before[name] + by)
        yield
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.copy_(kept[name])

    def by_tensor(self) -> dict[str, Tensor]:
        """Return the steps by the names of the tensors in the weight file."""
        made: dict[str, Tensor] = {}
        for name, weight in self.before.items():
            made |= {f"size.{own}": self.sizes[name].clone() for own, _ in parts(name, weight)}
        return made
