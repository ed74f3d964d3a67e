"""Which variant of a bundle draws, and when its routes have strayed: rules without I/O.

A bundle holds up to three variants of one network, from `full` (best, dearest) to `fast`. The device's owner says what matters:
quality as far as a budget of time or energy allows, or the least of either. What a variant costs here is measured here, by `ferry-agent bench`
and by every image that is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ota.agent.state import Config
from ota.manifest import VariantName

LADDER: tuple[VariantName, ...] = ("full", "dev", "fast")  # by quality and by cost, both falling
ROUTE_IMAGES = 32  # that the mean load is taken over before it is judged
ROUTE_LIMIT = 0.3  # share of a block's load that may lie with other experts than in the factory


@dataclass(frozen=True)
class Figures:
    """What an image of a variant costs on this device; None where nobody measured it."""

    milliseconds: float | None = None
    """That 95 of 100 images do not exceed."""
    joules: float | None = None


UNKNOWN = Figures()


def chain(
    variants: Sequence[VariantName],
    default: VariantName,
    figures: Mapping[VariantName, Figures],
    config: Config,
    strayed: bool = False,
) -> list[VariantName]:
    """The variants of a bundle in the order in which they are to be tried; each stands in for those before it.

    Args:
        variants: that the bundle holds.
        default: the factory's choice, which is taken where the owner asks for nothing and nothing has strayed.
        figures: what is known of their cost here.
        config: what the owner prefers, and the budgets.
        strayed: routes lie far from the factory's, so the safe variant comes first.
    """
    ladder = [v for v in LADDER if v in variants]
    first = _chosen(ladder, default, figures, config)
    if strayed:
        first = config.safe if config.safe in ladder else ladder[-1]
    below = ladder[ladder.index(first) + 1 :]  # cheaper ones first: what failed may have been too much for this device
    return [first, *below, *reversed(ladder[: ladder.index(first)])]


def _chosen(
    ladder: Sequence[VariantName], default: VariantName, figures: Mapping[VariantName, Figures], config: Config
) -> VariantName:
    def cost(variant: VariantName) -> Figures:
        return figures.get(variant, UNKNOWN)

    def fits(variant: VariantName) -> bool:
        """What was not measured fits no budget."""
        limits = ((cost(variant).milliseconds, config.latency_ms), (cost(variant).joules, config.joules))
        return all(limit is None or (value is not None and value <= limit) for value, limit in limits)

    if config.prefer == "default" and config.latency_ms is None and config.joules is None:
        return default
    fitting = [variant for variant in ladder if fits(variant)]
    if not fitting:
        return ladder[-1]
    if config.prefer == "latency":
        return min(fitting, key=lambda v: (_or_rank(cost(v).milliseconds, v), -LADDER.index(v)))
    if config.prefer == "energy":
        return min(fitting, key=lambda v: (_or_rank(cost(v).joules, v), -LADDER.index(v)))
    if config.prefer == "default" and default in fitting:
        return default
    return fitting[0]


def _or_rank(value: float | None, variant: VariantName) -> tuple[int, float]:
    """A cost to compare by; what was not measured comes after what was, by its place on the ladder."""
    return (0, value) if value is not None else (1, -LADDER.index(variant))


def routing_shift(loads: Sequence[Sequence[Sequence[float]]], reference: Sequence[Sequence[float]]) -> str | None:
    """Why the routes through the experts are not those of the factory, if so.

    Args:
        loads: gate mass of each expert of each block [M][E], of each of at least `ROUTE_IMAGES` images.
        reference: its mean in the factory.
    """
    experts = [len(row) for row in reference]
    if any([len(row) for row in load] != experts for load in loads):
        return "it has other experts than its own reference lists"
    worst, where = 0.0, 0
    for block, expected in enumerate(reference):
        row = [sum(load[block][expert] for load in loads) for expert in range(len(expected))]
        total, whole = sum(row), sum(expected)
        if total <= 0 or whole <= 0:
            continue
        moved = sum(abs(a / total - b / whole) for a, b in zip(row, expected, strict=True)) / 2
        if moved > worst:
            worst, where = moved, block
    if worst <= ROUTE_LIMIT:
        return None
    return (
        f"{100 * worst:.0f} % of block {where}'s load lies with other experts than in the factory, {100 * ROUTE_LIMIT:.0f} % may"
    )
