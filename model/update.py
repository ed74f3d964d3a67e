"""Approximate an update, master minus fielded weights, so that few bytes carry it; a device computes the result to the bit.

    >>> approximation = Approximation.of(master, fielded, statistics, "bfloat16")  # slow: once
    >>> update = approximation.at(0.03)  # fast: once for each noise level that is tried
    >>> write_factors(folder / FACTORS, update)

Every tensor of the weight file gets a *claim*: how its new numbers follow from the old ones. A matrix moves by the product of two
thin matrices of integers, any other tensor by whole steps of one size, or all tensors by few shared numbers of steps. `predicted` and
`stepped` are the rules by which devices compute this; they are those of `ota.delta.numbers`, from which `model` may not import (a test
compares them bit by bit). What a claim cannot carry stays in the master and is part of the next update (error feedback; Seide et al. 2014, "1-bit SGD").

The product is a singular value decomposition in the metric of the gradients (`model.gradients`). Both of its sides are rounded to
steps that are powers of two, so fine that every number adds the same noise to the loss, over all matrices: reverse water-filling
(Cover and Thomas, "Elements of Information Theory", 10.3.3). A component that is weaker than the noise rounds to nothing, so a
single level chooses the rank of every matrix. A component is left out, too, if its rounded sides are further from it than nothing is.

A new method is a row of `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, PrecisionName, canonical_json
from model.errors import CheckpointError
from model.gradients import is_matrix
from model.graph import layout, scaled_axis
from model.network import Network
from model.shared_numbers import places, shared, spread
from model.storage import KINDS, WHOLE_HIGH, WHOLE_LOW, dequantised, fielded, named, quantise

FACTORS = "update.safetensors"
MAX_FACTOR = 2**24  # limits of the delta format: of an integer in a product, of the rank, of the exponents
MAX_RANK = 32
MAX_EXPONENT = 50  # of a step; a product has the sum of two
RIDGE = 0.03  # added to the metric, whose mean is 1: few gradients leave many directions unseen
LEAST_SENSITIVITY = 1e-3  # of a tensor, relative to the mean over all matrices
SMALL_STEP = 1.5  # times the root mean square of the change: step of a small tensor beside products
FINER_BELOW = 0.02  # level of the products below which that step shrinks: an update with room for it keeps everything
COARSER_FROM = 0.16  # level of the products above which that step grows; below, finer steps cost more than they bring

MethodName = Literal["full", "grid", "lowrank", "small-tensors", "seeded"]


@dataclass(frozen=True)
class Product:
    """Claim: the numbers move by left times right times two to the power of the exponent; see `predicted`."""

    left: Tensor  # int32 [rows, rank]
    right: Tensor  # int32 [rank, columns]
    exponent: int
    left_step: Tensor  # [rank], exponents of the steps of both sides; those of the left side are folded into its integers
    right_step: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, left_step: Tensor, right_step: Tensor) -> Product | None:
        """Make a claim: fold both sides' steps into the left integers and one exponent; None: every component rounds to nothing.

        Args:
            a: whole numbers of the left side, [rows, rank].
            b: those of the right side, [rank, columns].
            left_step: exponents of the powers of two by which the columns of `a` count.
            right_step: the same for the rows of `b`.
        """
        live = a.any(dim=0) & b.any(dim=1)
        if not live.any():
            return None
        a, b, e, f = a[:, live], b[live], left_step[live], right_step[live]
        exponent = int((e + f).min())
        folded = (a * torch.exp2(e + f - exponent)).clamp(-MAX_FACTOR, MAX_FACTOR)
        return cls(folded.to(torch.int32), b.clamp(-MAX_FACTOR, MAX_FACTOR).to(torch.int32), exponent, e, f)


@dataclass(frozen=True)
class Steps:
    """Claim: the numbers move by whole steps of one size; see `stepped`."""

    steps: Tensor  # int32, in the tensor's shape
    size: float  # a float32


@dataclass(frozen=True)
class Seeded:
    """Claim: the numbers move by whole steps of one size; a hash of its place says which of few counts of steps each makes."""

    numbers: Tensor  # int32 [COUNT], the counts
    size: float  # a float32
    seed: int
    place: int  # of the tensor's first number

    def steps(self, shape: torch.Size) -> Tensor:
        """Return the steps of each number, int32 in the tensor's shape."""
        chosen, sign = spread(self.seed, self.place, shape)
        return self.numbers[chosen] * sign.to(torch.int32)


@dataclass(frozen=True)
class Whole:
    """No claim: a delta has to find out how the new numbers follow from the old ones."""

    numbers: Tensor | None = None  # whole numbers of int8; None: the master's weights, rounded to what is stored


Told = Product | Steps | Seeded  # claims that are written for the codec
Claim = Told | Whole


@dataclass(frozen=True)
class Change:
    """What is known of one tensor when its claim is made."""

    old: Tensor  # float32 numbers that devices have; whole numbers where they are stored as int8
    change: Tensor  # float64, master minus fielded weights
    rms: float  # root mean square of the change
    scale: Tensor | None  # of each whole number, broadcast to the tensor; None: the numbers are the weights
    left: Tensor | None  # statistics of the gradients, see `Gradients.means`
    right: Tensor | None
    typical: float  # mean squared gradient over all matrices
    size: float  # step with which the training rounded the change; 0: it did not
    seed: int = 0
    place: int | None = None  # of its first number among those that share numbers; None: it shares none
    shared: Tensor | None = None  # float64 [COUNT], if the change is that of shared numbers


class Planned(Protocol):
    """A tensor's claim at any level."""

    def __call__(self, level: float) -> Claim | None:
        """Make the claim; None: nothing moves."""
        ...


Plan = Callable[[Change], Planned]


def whole(change: Change) -> Planned:
    """Plan to send the master's numbers."""
    del change
    return lambda _level: Whole()


def unchanged(change: Change) -> Planned:
    """Plan to send nothing."""
    del change
    return lambda _level: None


def on_grid(change: Change) -> Planned:
    """Plan steps of `level` times the root mean square of the change, or those with which the training rounded."""
    return lambda level: _steps(change, change.size or level * change.rms)


def beside_products(change: Change) -> Planned:
    """Plan the steps of a small tensor beside products: the same at usual levels, finer below them, coarser above."""
    at = on_grid(change)
    return lambda level: at(SMALL_STEP * max(min(1.0, level / FINER_BELOW), level / COARSER_FROM))


def _steps(change: Change, size: float) -> Claim | None:
    """Round a change to whole steps; those of int8 are as many whole numbers as are nearest to the size, at least one.

    Whole numbers need no claim: how far each moves is what a delta codes in any case.
    """
    if change.scale is not None:
        every = torch.round(size / change.scale).clamp(min=1)
        moved = change.old + every * torch.round(change.change / (every * change.scale))
        return Whole(moved.clamp(WHOLE_LOW, WHOLE_HIGH).float())
    size = float(torch.tensor(size, dtype=torch.float32))
    if not 0 < size < math.inf:
        return None
    steps = torch.round(change.change / size).clamp(-MAX_FACTOR, MAX_FACTOR).to(torch.int32)
    return Steps(steps, size) if steps.any() else None


def by_seed(change: Change) -> Planned:
    """Plan steps of shared numbers; where a tensor shares none, steps of its own.

    Matrices of int8 share none: a step of one size is another number of whole numbers in each row or column, and how many is told by
    the scales, which are another tensor.
    """
    if change.scale is not None or change.shared is None:
        return on_grid(change)
    return lambda level: _seeded(change, level)


def _seeded(change: Change, level: float) -> Seeded | None:
    """Round shared numbers to whole steps."""
    size = float(torch.tensor(level * change.rms, dtype=torch.float32))
    if change.shared is None or change.place is None or not 0 < size < math.inf:
        return None
    counts = torch.round(change.shared / size).clamp(-MAX_FACTOR, MAX_FACTOR).to(torch.int32)
    return Seeded(counts, size, change.seed, change.place) if counts.any() else None


def low_rank(change: Change) -> Planned:
    """Plan a product: decompose the change in the metric of the gradients."""
    rows, columns = change.change.shape
    sensitivity = 1.0
    if change.left is not None:
        sensitivity = float(change.left.diagonal().sum()) / (rows * columns * change.typical) + LEAST_SENSITIVITY
    root = sensitivity**0.25
    (over, under), (behind, before) = _roots(change.left, rows), _roots(change.right, columns)
    u, strength, v = torch.linalg.svd((root * over) @ change.change @ (behind * root), full_matrices=False)
    u, strength, v = u[:, :MAX_RANK], strength[:MAX_RANK], v[:MAX_RANK]
    left, right = (under / root) @ (u * strength.sqrt()), (strength.sqrt()[:, None] * v) @ (before / root)
    by_row, by_column = over.square().sum(dim=1), behind.square().sum(dim=0)  # diagonals of the metrics
    if change.scale is not None:  # a product of whole numbers; one of the two sides has the scales
        across, down = change.scale[:1], change.scale[:, :1]
        if bool((change.scale == across).all()):
            right, by_column = right / across, by_column * across[0].square()
        else:
            left, by_row = left / down, by_row * down[:, 0].square()
    # A step d of one side adds the noise d² / 12 times this weight, squared, for each number.
    weights = tuple(root * (strength * metric.mean()).sqrt() for metric in (by_row, by_column))
    return lambda level: _product(left, right, *(level / weight.clamp(min=1e-30) for weight in weights))


def _roots(metric: Tensor | None, side: int) -> tuple[Tensor, Tensor]:
    """Return the square root of a metric, scaled to a mean of 1 and with a ridge, and its inverse."""
    identity = torch.eye(side, dtype=torch.float64)
    if metric is None:
        return identity, identity
    trace = metric.diagonal().sum().double().clamp(min=1e-30)
    values, vectors = torch.linalg.eigh(metric.double() * (side / trace) + RIDGE * identity)
    values = values.clamp(min=RIDGE / 2)  # rounding may have made it smaller
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _product(left: Tensor, right: Tensor, left_step: Tensor, right_step: Tensor) -> Product | None:
    """Round both sides to the nearest power-of-two steps below limits; fold the components' steps into the left side.

    Args:
        left: [rows, rank].
        right: [rank, columns].
        left_step: [rank], the step that is wished for.
        right_step: the same of the right side.
    """
    e, f = (torch.log2(step).round().clamp(-MAX_EXPONENT, MAX_EXPONENT) for step in (left_step, right_step))
    f = torch.maximum(f, _exponent(right.abs().amax(dim=1) / MAX_FACTOR))
    b = torch.round(right * torch.exp2(-f)[:, None])
    a = torch.round(left * torch.exp2(-e))
    live = a.any(dim=0) & b.any(dim=1) & _nearer(left * torch.exp2(-e), a, right.T * torch.exp2(-f), b.T)
    if not live.any():
        return None
    # Numbers of the left side span from its finest step to its largest value; where they span more than an integer may, the
    # finest components get coarser steps.
    top = float((_exponent(left.abs().amax(dim=0) / MAX_FACTOR) + f)[live].max())
    e = torch.maximum(e, top - f)
    a = torch.round(left * torch.exp2(-e))
    return Product.of(a * live, b, e, f)


def _nearer(left: Tensor, a: Tensor, right: Tensor, b: Tensor) -> Tensor:
    """Check for each component whether its rounded sides are nearer to it than nothing is, all [numbers, rank]."""
    error = (a.square().sum(dim=0) * b.square().sum(dim=0)) - 2 * (left * a).sum(dim=0) * (right * b).sum(dim=0)
    return error < 0


def _exponent(sizes: Tensor) -> Tensor:
    """Return the least exponents of powers of two that are not below these sizes; very small for 0."""
    return torch.log2(sizes.clamp(min=2.0**-200)).ceil()


def by_shared_numbers(changes: dict[str, Change]) -> dict[str, Change]:
    """Add to changes the nearest shared numbers, whose root mean square is then that of each change."""
    sharing = {name: change for name, change in changes.items() if change.place is not None}
    place = {name: change.place or 0 for name, change in sharing.items()}
    seed = next((change.seed for change in sharing.values()), 0)
    numbers = shared({name: change.change for name, change in sharing.items()}, seed, place)
    rms = float(numbers.square().mean().sqrt())
    return changes | {name: replace(change, shared=numbers, rms=rms) for name, change in sharing.items()}


@dataclass(frozen=True)
class Method:
    """How an update is trained and approximated: a row of `METHODS`."""

    says: str  # what it does, for people
    level: float  # usual level
    matrix: Plan
    small: Plan  # of all other tensors
    trains: Callable[[Tensor], bool] = field(default=lambda _weight: True)  # whether a parameter is trained at all
    prepare: Callable[[dict[str, Change]], dict[str, Change]] = field(default=lambda changes: changes)  # all tensors at once
    shares_numbers: bool = False  # whether the training moves shared numbers only; see `model.shared_numbers`
    rounds_in_training: bool = False  # whether the second half of the training sees rounded weights; see `model.grid`


METHODS: dict[MethodName, Method] = {
    "full": Method("every number of the master, rounded to the stored precision", 0.0, whole, whole),
    "grid": Method(
        "every change in steps of its root mean square times the level, to which the training rounds in its second half",
        5.0, on_grid, on_grid, rounds_in_training=True,
    ),
    "lowrank": Method("matrices by products of thin integer matrices, the rest by steps, at one level of noise", 0.03, low_rank, beside_products),
    "small-tensors": Method(
        "gains, biases, modulation, router, first, last and depthwise convolutions only, by steps",
        0.7, unchanged, on_grid, trains=lambda weight: not is_matrix(weight),
    ),
    "seeded": Method(
        "a few shared numbers, spread over all weights by a seeded hash; matrices in int8 are sent without this",
        0.5, by_seed, by_seed, prepare=by_shared_numbers, shares_numbers=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Update:
    """New weights as devices compute them, and the claims by which they do.

    Attributes:
        config: shape of the network.
        stored: precision for which they hold.
        method: how they were made.
        level: the method's level.
        weights: by their names in the weight file, as float32.
        claims: by the same names; a tensor without one is equal to the fielded one, or, if it is in `whole`, unknown.
    """

    config: ModelConfig
    stored: PrecisionName
    method: MethodName
    level: float
    weights: dict[str, Tensor]
    claims: dict[str, Told]

    def network(self) -> Network:
        """Make the network with these weights, in evaluation mode."""
        made = Network(self.config)
        for name, weight in named(made).items():
            weight.copy_(self.weights[name])
        return made.eval()


@dataclass(frozen=True)
class Approximation:
    """An update of which everything that does not depend on the level is computed; see `at`."""

    config: ModelConfig
    stored: PrecisionName
    method: MethodName
    changes: dict[str, Change]
    masters: dict[str, Tensor]  # the master's weights, by their names in the weight file
    planned: dict[str, Planned]

    @classmethod
    def of(
        cls,
        master: Network,
        before: Network,
        statistics: dict[str, Tensor],
        stored: PrecisionName,
        method: MethodName = "lowrank",
        *,
        seed: int = 0,
        only: Callable[[str], bool] = lambda _name: True,
    ) -> Approximation:
        """Prepare an update for every level.

        Args:
            master: weights that were trained.
            before: weights that devices have; they are rounded to the stored precision here.
            statistics: of the gradients, see `Gradients.means`; empty: all weights count alike.
            stored: precision of the devices' files.
            method: row of the table.
            seed: of the training, if it moved shared numbers.
            only: names in the weight file of the tensors that may change.

        Raises:
            CheckpointError: a weight is not finite.
        """
        row, typical = METHODS[method], _typical(statistics)
        masters, olds = named(master), named(before)
        place = places(master.config)
        changes = {name: _change(name, masters[name], olds[name], statistics, stored, typical) for name in masters if only(name)}
        changes = row.prepare({name: replace(change, seed=seed, place=place.get(name)) for name, change in changes.items()})
        planned = {
            name: (row.matrix if is_matrix(change.old) else row.small)(change) if change.change.any() else unchanged(change)
            for name, change in changes.items()
        }
        masters = {
            name: weight.cpu() if name in changes else fielded(name, olds[name], stored) for name, weight in masters.items()
        }
        return cls(master.config, stored, method, changes, masters, planned)

    def at(self, level: float) -> Update:
        """Round the update at a level: a higher one takes fewer bytes and carries less."""
        return self.with_claims({name: plan(level) for name, plan in self.planned.items()}, level)

    def with_claims(self, made: dict[str, Claim | None], level: float) -> Update:
        """Compute what devices have after some claims."""
        weights = dict(self.masters)
        for name, claim in made.items():
            weights[name] = _moved(self.changes[name], claim, self.masters[name], self.stored)
        claims = {name: claim for name, claim in made.items() if isinstance(claim, Told)}
        return Update(self.config, self.stored, self.method, level, weights, claims)


def approximate(
    master: Network, before: Network, statistics: dict[str, Tensor], level: float, stored: PrecisionName, method: MethodName = "lowrank"
) -> Update:  # fmt: skip
    """Make an update at one level; see `Approximation`."""
    return Approximation.of(master, before, statistics, stored, method).at(level)


def _typical(statistics: dict[str, Tensor]) -> float:
    """Return the mean squared gradient over all matrices of which it is known."""
    total = count = 0.0
    for name, left in statistics.items():
        if name.startswith("left."):
            total += float(left.diagonal().sum())
            count += len(left) * len(statistics["right." + name.removeprefix("left.")])
    return max(total / max(count, 1.0), 1e-30)


def _change(
    name: str, master: Tensor, before: Tensor, statistics: dict[str, Tensor], stored: PrecisionName, typical: float
) -> Change:
    """Collect what is known of one tensor."""
    old, scale, axis = before.cpu().float(), None, scaled_axis(name) if stored == "int8" else None
    if axis is None:
        old = weights = fielded(name, old, stored)
    else:
        old, scales = quantise(old, axis)
        weights = dequantised(old, scales, axis)
        scale = scales.unsqueeze(1 - axis).expand_as(old).double()
    change = master.cpu().double() - weights.double()
    if not change.isfinite().all():
        raise CheckpointError(f"{name} holds a weight that is not finite; train again with a lower learning rate")
    size = float(statistics.get(f"size.{name}", 0.0))
    rms = float(change.square().mean().sqrt())
    return Change(old, change, rms, scale, statistics.get(f"left.{name}"), statistics.get(f"right.{name}"), typical, size)


def _moved(change: Change, claim: Claim | None, master: Tensor, stored: PrecisionName) -> Tensor:
    """Compute the weights that devices have after a claim."""
    kind: PrecisionName = "float32" if stored == "int8" and change.scale is None else stored
    scale = change.scale
    if isinstance(claim, Product):
        new = predicted(change.old, claim.left, claim.right, claim.exponent, kind)
    elif isinstance(claim, Steps):
        new = stepped(change.old, claim.steps, claim.size, kind)
    elif isinstance(claim, Seeded):
        new = stepped(change.old, claim.steps(change.old.shape), claim.size, kind)
    elif isinstance(claim, Whole) and claim.numbers is not None:
        new = claim.numbers
    elif isinstance(claim, Whole) and scale is None:
        new = master.to(KINDS[kind]).float()
    elif isinstance(claim, Whole) and scale is not None:  # the scales stay, or every number of the row or column would change
        new = torch.round(master.double() / scale).clamp(WHOLE_LOW, WHOLE_HIGH).float()
    else:
        new = change.old
    return new if scale is None else (new.double() * scale).float()


def predicted(old: Tensor, left: Tensor, right: Tensor, exponent: int, stored: PrecisionName) -> Tensor:
    """Move numbers by a product of integers, as `ota.delta.numbers.predicted` does; all numbers are given as float32.

    The product of the integers is exact in float64, in whatever order it is summed.
    """
    product = (left.double() @ right.double()) * 2.0**exponent
    if stored == "int8":
        return (torch.round(product) + old).clamp(WHOLE_LOW, WHOLE_HIGH).float()
    return _where_normal(old + product.float(), old, stored)


def stepped(old: Tensor, steps: Tensor, size: float, stored: PrecisionName) -> Tensor:
    """Move numbers by whole steps, as `ota.delta.numbers.stepped` does; all numbers are given as float32."""
    by = steps.float() * torch.tensor(size, dtype=torch.float32)
    return torch.where(steps == 0, old, _where_normal(old + by, old, stored))


def _where_normal(new: Tensor, old: Tensor, stored: PrecisionName) -> Tensor:
    """Round new numbers to a precision; keep the old one if either is denormal, zero or not finite there."""
    kind = KINDS[stored]
    new, least = new.to(kind).float(), torch.finfo(kind).smallest_normal
    plain = [side.isfinite() & (side.abs() >= least) for side in (old, new)]
    return torch.where(plain[0] & plain[1], new, old)


def write_factors(path: Path, update: Update) -> None:
    """Write the claims for the codec, as safetensors; they hold for the fielded weights from which they were made alone.

    A product is `NAME.left` int32 [rows, rank] and `NAME.right` int32 [rank, columns], steps are `NAME.steps` int32 [count], where NAME
    is that of the stored numbers in the graph. Shared numbers are `seeded.numbers` int32 [count]. The metadata has the entry `deltaferry`: canonical JSON with `schema_version`, the exponents of the products, and the sizes of the
    steps as hexadecimal floats; and, if numbers are shared, `seeded`: their seed, the size of their steps, and of each tensor the place of
    its first number and how many numbers it has.
    """
    tensors: dict[str, Tensor] = {}
    products: dict[str, int] = {}
    sizes: dict[str, str] = {}
    seeded: dict[str, Any] = {}
    sharing: dict[str, list[int]] = {}
    in_graph = {tensor.name: tensor.in_graph for tensor in layout(update.config, update.stored)[0]}
    for own, claim in update.claims.items():
        name = in_graph[own]
        if isinstance(claim, Product):
            products[name] = claim.exponent
            tensors |= {f"{name}.left": claim.left.contiguous(), f"{name}.right": claim.right.contiguous()}
        elif isinstance(claim, Seeded):
            tensors["seeded.numbers"] = claim.numbers
            seeded |= {"seed": claim.seed, "size": claim.size.hex()}
            sharing[name] = [claim.place, update.weights[own].numel()]
        else:
            sizes[name] = claim.size.hex()
            tensors[f"{name}.steps"] = claim.steps.reshape(-1).contiguous()
    said = canonical_json({
        "schema_version": 1, "products": products, "steps": sizes, **({"seeded": seeded | {"tensors": sharing}} if sharing else {}),
    })  # fmt: skip
    fresh = path.with_name(path.name + ".tmp")
    save_file(tensors, fresh, {"deltaferry": said.decode()})
    fresh.replace(path)
