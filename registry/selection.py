"""The gate: may this challenger replace the champion? Pure functions of scorecards; no number without its n and its error.

Promotion needs, in both feature spaces,

- *superiority* on the held-out items of the new data revision: the upper confidence bound of challenger minus champion
  lies below zero;
- *non-inferiority* on the champion's own held-out items: the upper bound lies below a margin, which is a share of the
  distance at which pure noise lies, a model that learned nothing;

and floors for coverage, bad images, unused experts and latency. A distilled variant must also be better than `full` drawn by a
second-order solver with as many network evaluations, which costs a device no second set of weights. Confidence is divided by the number of variants that are
decided together (Bonferroni). With too few images the answer is not "no" but "more data", and how much.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from scipy import stats

from model.config import HELD_OUT_PERMILLE, TEACHERS
from model.scorecard import Comparison, Frozen, Quality, Scorecard, Sha256

Outcome = Literal["promote", "refuse", "more data"]


class Limits(Frozen):
    """What the gate asks for."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="chance of one wrong promotion of a worse model")
    margin: float = Field(default=0.1, gt=0, le=1, description="tolerated on old data, as a share of pure noise's distance")
    minimum_images: int = Field(default=96, ge=8, description="generated and held-out images below which nothing is decided")
    coverage: float = Field(default=0.3, ge=0, le=1, description="least share of held-out images with a generated neighbour")
    bad_images: float = Field(default=0.01, ge=0, le=1, description="largest share of constant or non-finite images")
    dead_experts: int = Field(default=2, ge=0, description="most routed experts that may carry next to nothing")
    beat_solver: bool = Field(default=True, description="whether a student must be better than full at as many evaluations")


class Check(Frozen):
    """One thing that was looked at."""

    name: str
    passed: bool
    text: str


class Decision(Frozen):
    """What the gate said, and every number that made it."""

    outcome: Outcome
    reason: str
    checks: list[Check]
    n: int = Field(description="generated images")
    champion: Sha256 | None
    challenger: Sha256
    limits: Limits
    scorecard: Sha256


def decide(card: Scorecard, limits: Limits, latency_ms: float, champion: Sha256 | None, together: int = 1) -> Decision:
    """Decide on one challenger.

    Args:
        card: the challenger's scorecard; with a champion it holds comparisons against it on both splits.
        limits: what is asked for.
        latency_ms: the device class's budget for one image.
        champion: weights of the present champion; None when there is none, then only the floors count.
        together: variants decided in the same run.
    """
    n = min(q.n for q in card.quality)
    too_few = _too_few(card.quality, limits)
    checks = floors(card, limits, latency_ms)
    more: list[str] = []
    rows: list[Comparison] = []
    if champion is not None:
        rows = [c for c in card.comparisons if c.against == "champion" and c.against_sha256 == champion]
        if not {"new", "old"} <= {c.split for c in rows}:
            checks.append(Check(name="compared", passed=False, text="it was not compared with the present champion"))
    if limits.beat_solver and card.variant in TEACHERS:
        beside = [c for c in card.comparisons if c.against == "solver"]
        if not beside:
            checks.append(Check(name="compared", passed=False, text="it was not compared with full, drawn by a solver"))
        rows += beside
    for row in rows:
        check, needed = _compared(row, card, limits, limits.alpha / together)
        checks.append(check)
        if needed:
            more.append(needed)

    failed = [check.text for check in checks if not check.passed]
    outcome: Outcome
    if too_few:
        outcome, reason = "more data", too_few
    elif not failed:
        outcome = "promote"
        reason = "first version, all floors are met" if champion is None else "better on the new data, not worse on the old"
    elif more and len(more) == len(failed):
        outcome, reason = "more data", "; ".join(more)
    else:
        outcome, reason = "refuse", "; ".join(failed)
    return Decision(
        outcome=outcome, reason=f"{reason} (n = {n})", checks=checks, n=n, champion=champion, challenger=card.weights_sha256,
        limits=limits, scorecard=card.sha256,
    )  # fmt: skip


def _too_few(qualities: list[Quality], limits: Limits) -> str | None:
    generated, held_out = min(q.n for q in qualities), min(q.reference for q in qualities)
    needed = limits.minimum_images
    if generated < needed:
        return f"{generated} generated images are too few to decide on, {needed} are needed; raise gate.images in ferry.toml"
    if held_out < needed:
        return (
            f"{held_out} held-out images are too few to decide on, {needed} are needed; {HELD_OUT_PERMILLE / 10:.0f} % are held out, "
            f"so about {math.ceil(needed * 1000 / HELD_OUT_PERMILLE)} images in all"
        )
    return None


def floors(card: Scorecard, limits: Limits, latency_ms: float) -> list[Check]:
    """What every model must meet, with or without a champion."""
    coverage = min(q.coverage for q in card.quality if q.split == "new")
    return [
        Check(
            name="coverage", passed=coverage >= limits.coverage,
            text=f"coverage is {coverage:.2f}, the floor is {limits.coverage:.2f}",
        ),
        Check(
            name="bad images", passed=card.bad_images <= limits.bad_images,
            text=f"{card.bad_images:.1%} of the images are constant or not finite, {limits.bad_images:.1%} may be",
        ),
        Check(
            name="experts", passed=card.usage.dead <= limits.dead_experts,
            text=f"{card.usage.dead} experts carry next to nothing, {limits.dead_experts} may",
        ),
        Check(
            name="latency", passed=card.cost.milliseconds <= latency_ms,
            text=f"an image takes {card.cost.milliseconds:.0f} ms here, the budget is {latency_ms:.0f} ms",
        ),
    ]  # fmt: skip


def _compared(row: Comparison, card: Scorecard, limits: Limits, alpha: float) -> tuple[Check, str | None]:
    """Superiority (new data) or non-inferiority (old data) in one space, and how much more data would settle a doubt."""
    # Student's t, because groups may be few; with a single one nothing can be said.
    quantile = float(stats.t.ppf(1 - alpha, row.groups - 1)) if row.groups > 1 else math.inf
    upper = row.delta + quantile * row.se
    if row.against == "solver":
        bound, what = 0.0, f"superiority over full in {card.solver.steps if card.solver else '?'} steps of a second-order solver"
    elif row.split == "new":
        bound, what = 0.0, "superiority on the new data"
    else:
        noise = next(q.noise_kd for q in card.quality if (q.space, q.split) == (row.space, row.split))
        bound, what = limits.margin * noise, "non-inferiority on the old data"
    text = (
        f"{what}, {row.space} features: difference {row.delta:+.4f} (upper bound {upper:+.4f} at n = {row.n} and {row.groups} "
        f"held-out groups), must be below {bound:.4f}"
    )
    needed = None
    if upper >= bound > row.delta:  # the estimate would do, its error is too large
        times = (quantile * row.se / (bound - row.delta)) ** 2 if row.groups > 1 else 8.0
        needed = (
            f"{what} is undecided at n = {row.n} and {row.groups} held-out groups, about {math.ceil(row.n * times)} and "
            f"{math.ceil(row.groups * times)} are needed"
        )
    return Check(name=f"{what} ({row.space})", passed=upper < bound, text=text), needed
