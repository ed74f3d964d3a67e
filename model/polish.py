"""Train an update further while it is rounded: the factors learn to make up for what their own rounding loses.

The steps of the factors stay as they are, and so does the number of components. The forward pass sees the rounded factors, the
gradient passes through as if there were no rounding (straight-through; Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from model.data import Dataset
from model.network import Network
from model.shared_numbers import spread
from model.storage import parts
from model.train import FlowMatching, Objective, TrainOptions
from model.update import Approximation, Claim, Product, Seeded, Steps, Told, Update

STEPS = 40
RATE = 0.5  # of the training's learning rate
WARMUP = 5  # steps
AVERAGE = 0.9


@dataclass(frozen=True)
class _Side:
    """Numbers that are trained, and the step to which they are rounded."""

    values: Tensor
    step: Tensor
    chosen: Tensor | None = None  # which of the values each weight moves by; None: each by its own
    sign: Tensor | None = None

    def whole(self) -> Tensor:
        """Return the numbers as multiples of their step."""
        return torch.round(self.values / self.step)

    def rounded(self) -> Tensor:
        """Return the rounded numbers, with the gradient of the numbers."""
        return self.values + (self.whole() * self.step - self.values).detach()

    def moves(self) -> Tensor:
        """Return by how much each weight moves."""
        if self.chosen is None or self.sign is None:
            return self.rounded()
        return self.rounded().index_select(0, self.chosen.reshape(-1)).view(self.chosen.shape) * self.sign


def polish(
    approximation: Approximation,
    update: Update,
    dataset: Dataset,
    options: TrainOptions,
    *,
    steps: int = STEPS,
    objective: Objective | None = None,
) -> Update:
    """Train the claims of an update for some steps, on the CPU; return an update with the same steps and at most the same rank.

    Args:
        approximation: that the update was made from.
        update: one level of it.
        dataset: images and captions to learn from.
        options: those of the training; its batches come after those that the training saw.
        steps: number of steps.
        objective: that of the training; flow matching by default.
    """
    objective = objective or FlowMatching()
    sides = _all_sides(update)
    values = list({id(side.values): side.values.requires_grad_() for pair in sides.values() for side in pair}.values())
    averages = [value.detach().clone() for value in values]
    optimizer = torch.optim.AdamW(values, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    network = Network(update.config).train()
    for step in range(steps):
        rows = objective.rows(dataset, options, options.steps + step)
        v, _ = functional_call(network, _weights(network, approximation, update, sides), (rows.x, rows.t, rows.r, rows.ids))
        (v - rows.velocity).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(values, options.clip)
        for group in optimizer.param_groups:
            group["lr"] = RATE * options.learning_rate * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(AVERAGE, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [value.detach() for value in values], 1 - decay)
    for value, average in zip(values, averages, strict=True):
        value.detach().copy_(average)
    with torch.no_grad():
        made = {name: plan(update.level) for name, plan in approximation.planned.items()}  # what has no claim stays as it is
        made |= {name: _claim(update.claims[name], pair) for name, pair in sides.items()}
        return approximation.with_claims(made, update.level)


def _all_sides(update: Update) -> dict[str, tuple[_Side, ...]]:
    """Return what is trained of each claim; those of shared numbers have the same values."""
    made, shared = dict[str, tuple[_Side, ...]](), list[Tensor]()
    for name, claim in update.claims.items():
        if isinstance(claim, Seeded):
            size = torch.tensor(claim.size)
            shared = shared or [claim.numbers * size]
            made[name] = (_Side(shared[0], size, *spread(claim.seed, claim.place, update.weights[name].shape)),)
        else:
            made[name] = _sides(claim)
    return made


def _sides(claim: Product | Steps) -> tuple[_Side, ...]:
    """Return what is trained of a claim."""
    if isinstance(claim, Steps):
        size = torch.tensor(claim.size)
        return (_Side(claim.steps * size, size),)
    left, right = (torch.exp2(step).float() for step in (claim.left_step, claim.right_step))
    folded = torch.exp2(claim.exponent - claim.right_step).float()  # what an integer of the left side counts
    return _Side(claim.left * folded, left), _Side(claim.right * right[:, None], right[:, None])


def _claim(before: Told, sides: tuple[_Side, ...]) -> Claim | None:
    """Make the claim of trained numbers."""
    if isinstance(before, Steps):
        steps = sides[0].whole().to(torch.int32)
        return Steps(steps, before.size) if steps.any() else None
    if isinstance(before, Seeded):
        counts = sides[0].whole().to(torch.int32)
        return replace(before, numbers=counts) if counts.any() else None
    a, b = (side.whole().double() for side in sides)
    return Product.of(a, b, before.left_step, before.right_step)


def _weights(
    network: Network, approximation: Approximation, update: Update, sides: dict[str, tuple[_Side, ...]]
) -> dict[str, Tensor]:
    """Compute a network's parameters from the rounded claims; the rounding of the sums to the stored precision is left out."""

    def of(name: str) -> Tensor:
        if name not in sides:
            return update.weights[name]
        change = approximation.changes[name]
        by = sides[name][0].moves() if len(sides[name]) == 1 else sides[name][0].rounded() @ sides[name][1].rounded()
        return change.old + by if change.scale is None else (change.old + by) * change.scale.float()

    made = {}
    for name, weight in network.named_parameters():
        own = [of(part) for part, _ in parts(name, weight)]
        made[name] = own[0] if len(own) == 1 and own[0].shape == weight.shape else torch.stack(own)
    return made
