"""Which variant of a bundle draws, and when its expert routing has shifted: rules without I/O.

A bundle holds up to four variants of one network, from `full` (best quality, highest cost) to `turbo`. The device's owner chooses
the goal: the best quality within a budget of time or energy, or the lowest time or energy. The cost of a variant is measured on
this device, by `ferry-agent bench` and with every image that `ferry-agent serve` draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ota.agent.state import Config
from ota.manifest import VariantName

LADDER: tuple[VariantName, ...] = ("full", "dev", "fast", "turbo")  # from the highest to the lowest quality and cost
ROUTE_IMAGES = 32  # images over which the expert load is averaged before it is checked
ROUTE_LIMIT = 0.3  # share of a block's load that may go to other experts than at the factory


@dataclass(frozen=True)
class Figures:
    """What one image of a variant costs on this device; None if it was not measured."""

    milliseconds: float | None = None
    """95th percentile of the time of one image."""
    joules: float | None = None


UNKNOWN = Figures()


def chain(
    variants: Sequence[VariantName],
    default: VariantName,
    figures: Mapping[VariantName, Figures],
    config: Config,
    strayed: bool = False,
) -> list[VariantName]:
    """Return the variants of a bundle in the order in which to try them; each one replaces those before it if they fail.

    Args:
        variants: the variants that the bundle holds.
        default: the factory's choice; first if the owner prefers it, it fits the budgets and the routing has not shifted.
        figures: what is known of the variants' cost on this device.
        config: the owner's preference and budgets.
        strayed: the expert routing has shifted from the factory's, so the safe variant comes first.
    """
    ladder = [v for v in LADDER if v in variants]
    first = _chosen(ladder, default, figures, config)
    if strayed:
        first = config.safe if config.safe in ladder else ladder[-1]
    below = ladder[ladder.index(first) + 1 :]  # cheaper ones first: the first may fail because it is too much for this device
    return [first, *below, *reversed(ladder[: ladder.index(first)])]


def _chosen(
    ladder: Sequence[VariantName], default: VariantName, figures: Mapping[VariantName, Figures], config: Config
) -> VariantName:
    def cost(variant: VariantName) -> Figures:
        return figures.get(variant, UNKNOWN)

    def fits(variant: VariantName) -> bool:
        """Check whether a variant fits the budgets; a cost that was not measured fits none."""
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
    """Return a sort key for a cost: measured costs come first, then unmeasured ones, the cheapest on the ladder first."""
    return (0, value) if value is not None else (1, -LADDER.index(variant))


def routing_shift(loads: Sequence[Sequence[Sequence[float]]], reference: Sequence[Sequence[float]]) -> str | None:
    """Say how the expert routing has shifted from the factory's; return None if it is within `ROUTE_LIMIT`.

    Args:
        loads: gate mass of each expert of each block [M][E], for each of at least `ROUTE_IMAGES` images.
        reference: mean gate mass [M][E] at the factory.
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
    return f"block {where} sends {100 * worst:.0f} % of its load to other experts than at the factory (limit {100 * ROUTE_LIMIT:.0f} %)"
