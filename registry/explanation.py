"""What each routed expert does to an image, as figures with intervals and as one self-contained HTML page.

A statement about an expert needs an interval over several noises. An expert whose interval reaches down to the rounding of an image
is "not told apart", and the experts whose difference from the largest may be nothing are named beside it.

Changes of different noises differ by factors, not by amounts. So means and intervals are taken of their logarithms, after adding the
rounding, which keeps a change of 0 at 0.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field

from model.scorecard import Frozen, Sampler, Sha256
from registry.report import LEVEL, TEMPLATES
from registry.selection import quantile

ROUNDING = 0.5  # grey levels: an image is stored in whole ones, so a smaller change need not show in it
Stream = Literal["image", "text", "both"]


class Effect(Frozen):
    """What happens to the image if one routed expert is switched off."""

    block: int = Field(description="block instance, counted from 0")
    stream: Stream = Field(description="what the block works on: the image, the text, or both")
    expert: int = Field(description="routed expert of the block, counted from 0")
    change: float = Field(description="root mean square of the change in grey levels of 255, geometric mean over the noises")
    low: float = Field(description="lower end of the 95 % interval of change")
    high: float = Field(description="upper end of the 95 % interval of change")
    told_apart: bool = Field(description="whether the interval lies above the rounding of an image")
    by_noise: list[float] = Field(description="change for each noise")
    load: float = Field(description="mean load over the steps, with all experts")

    @property
    def name(self) -> str:
        """The expert's name in a sentence."""
        return f"expert {self.expert} of block {self.block}"


class Most(Frozen):
    """The expert with the largest estimate, and those that may change the image as much."""

    block: int
    expert: int
    not_told_from: list[str] = Field(
        description="experts whose change may be as large, over the same noises, at 95 % for all together"
    )


class DeviceTrace(Frozen):
    """Load that a device stored for one image."""

    bundle: Sha256
    load: list[list[list[float]]] = Field(description="[S][M][E]")


class Explanation(Frozen):
    """Which expert did what to the image of a caption."""

    subject: str
    version: int
    weights_sha256: Sha256
    caption: str
    seeds: list[int]
    sampler: Sampler
    evaluations: int
    rounding: float = Field(default=ROUNDING, description="grey levels below which a change is no change")
    effects: list[Effect] = Field(description="the largest change first")
    most: Most | None = Field(description="null: no expert is told apart from rounding")
    load: list[list[list[float]]] = Field(description="[S][M][E] load with all experts, mean over the noises")
    device: DeviceTrace | None = None

    @property
    def text(self) -> str:
        """The figures as a short table."""
        rows = [self.sentence, "", f"{'block':16}{'expert':>7}{'change':>9}{'95 % interval':>20}{'load':>8}"]
        for e in self.effects:
            where, interval = f"{e.block} ({e.stream})", f"{e.low:.2f} to {e.high:.2f}"
            note = "" if e.told_apart else "  not told apart from rounding"
            rows.append(f"{where:16}{e.expert:7d}{e.change:9.2f}{interval:>20}{e.load:8.3f}{note}")
        return "\n".join(rows)

    @property
    def sentence(self) -> str:
        """Which expert has the most effect, as far as the noises tell."""
        n = len(self.seeds)
        if self.most is None:
            return f"No expert is told apart from rounding with {n} noises; draw more of them with --images."
        top = next(e for e in self.effects if (e.block, e.expert) == (self.most.block, self.most.expert))
        said = (
            f"Without {top.name} the image changes by {top.change:.1f} grey levels ({top.low:.1f} to {top.high:.1f}, {n} noises), the largest "
            "estimate."
        )
        others = self.most.not_told_from
        if not others:
            return f"{said} Every other expert changes it less, at 95 % for all of them together."
        named = f"{', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
        return f"{said} Not told apart from it: {named}; draw more noises with --images."


def effects(
    changes: Sequence[Sequence[Sequence[float]]], load: Sequence[Sequence[Sequence[float]]], streams: Sequence[Stream]
) -> tuple[list[Effect], Most | None]:
    """Compute each expert's effect with its interval, the largest first, and which of them has the most.

    Args:
        changes: [M][E][n] change of the image in grey levels, for each of n noises.
        load: [S][M][E] load with all experts.
        streams: [M] what each block works on.
    """
    made = [
        _effect(m, streams[m], e, by_noise, math.fsum(step[m][e] for step in load) / len(load))
        for m, row in enumerate(changes)
        for e, by_noise in enumerate(row)
    ]
    found = sorted(made, key=lambda effect: (-effect.change, effect.block, effect.expert))
    top, others = found[0], found[1:]
    if not top.told_apart:
        return found, None
    alpha = (1 - LEVEL) / max(1, len(others))  # Bonferroni: the statement is about all others at once
    own = _logarithms(top.by_noise)
    near = [
        e.name for e in others if _interval([a - b for a, b in zip(own, _logarithms(e.by_noise), strict=True)], alpha)[1] <= 0
    ]
    return found, Most(block=top.block, expert=top.expert, not_told_from=near)


def _effect(block: int, stream: Stream, expert: int, by_noise: Sequence[float], load: float) -> Effect:
    change, low, high = (max(0.0, math.exp(v) - ROUNDING) for v in _interval(_logarithms(by_noise), 1 - LEVEL))
    return Effect(
        block=block, stream=stream, expert=expert, change=change, low=low, high=high, told_apart=low > ROUNDING, by_noise=[*by_noise],
        load=load,
    )  # fmt: skip


def _logarithms(changes: Sequence[float]) -> list[float]:
    return [math.log(change + ROUNDING) for change in changes]


def _interval(values: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """Return the mean and its two-sided interval by Student's t, which needs two values."""
    n = len(values)
    mean = math.fsum(values) / n
    half = quantile(n, alpha / 2) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Shown:
    """An expert's pictures."""

    without: bytes
    """PNG: the image with the expert switched off."""
    difference: bytes
    """PNG: that image minus the image as drawn."""
    scale: int
    """Grey levels that the strongest colours of `difference` stand for."""


@dataclass(frozen=True)
class Pictures:
    """All pictures of the page."""

    image: bytes
    """PNG: the image as drawn."""
    experts: dict[tuple[int, int], Shown]
    """By block and expert."""
    heat: list[bytes]
    """PNG of the load of each block: a row for each expert, a column for each step."""
    device: list[bytes]
    """The same for the device's trace; empty: there is none."""
    most: float
    """Load that has the last colour."""


def render(found: Explanation, pictures: Pictures, made: str, colours: Iterable[str]) -> str:
    """Render the page.

    Args:
        found: the figures.
        pictures: the pictures.
        made: when.
        colours: of the loads from none to the highest, for the legend.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["image"] = lambda data: base64.b64encode(data).decode()
    streams = {e.block: e.stream for e in found.effects}
    return environment.get_template("explain.html").render(x=found, p=pictures, made=made, streams=streams, colours=[*colours])
