"""The gate: may this challenger replace the champion? Pure functions of scorecards; no number without its n and its error.

Promotion needs, in both feature spaces,

- *superiority* on the held-out items of the new data revision: the upper confidence bound of challenger minus champion
  lies below zero;
- *non-inferiority* on the champion's own held-out items: the upper bound lies below a margin, which is a share of the
  distance at which pure noise lies, a model that learned nothing;
- *no slow decay*: many small steps, each within the margin, must not add up. The upper bound of challenger minus anchor, the best model
  ever, lies below a budget on both;

and floors for coverage, copying, bad images, unused experts, latency and memory. A distilled variant must also be better than `full`
drawn by a second-order solver with as many network evaluations, which costs a device no second set of weights. With too few images the
answer is not "no" but "more data", and how much.

A challenger that misses only superiority, and is not worse on the new data either, may be promoted for a recorded reason other than
quality ("promote if reasoned", then `reasoned`). All tests of one challenger must pass, so they need no correction for each other
(Berger 1982). Those of one run do, see `level`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from scipy import stats

from model.config import HELD_OUT_PERMILLE, TEACHERS
from model.scorecard import Comparison, Frozen, Memorisation, Quality, Scorecard, Sha256
from registry.errors import PromotionError

Outcome = Literal["promote", "promote if reasoned", "more data", "refuse"]


class Limits(Frozen):
    """What the gate asks for."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="chance of one wrong promotion of a worse model")
    margin: float = Field(default=0.1, gt=0, le=1, description="tolerated on old data, as a share of pure noise's distance")
    decay: float = Field(default=0.2, gt=0, le=1, description="tolerated in all against the anchor, as such a share")
    minimum_images: int = Field(default=96, ge=8, description="generated and held-out images below which nothing is decided")
    coverage: float = Field(default=0.3, ge=0, le=1, description="least share of held-out images with a generated neighbour")
    copying: float = Field(
        default=0.8,
        gt=0.5,
        le=1,
        description="chance below which a generated image must be nearer to training than a held-out one",
    )
    bad_images: float = Field(default=0.01, ge=0, le=1, description="largest share of constant or non-finite images")
    dead_experts: int = Field(default=2, ge=0, description="most routed experts that may carry next to nothing")
    beat_solver: bool = Field(default=True, description="whether a student must be better than full at as many evaluations")


class Budgets(Frozen):
    """What a device class can bear."""

    latency_ms: float = Field(description="for one image")
    memory_mib: float | None = Field(default=None, description="for the model, beyond a bare interpreter; None: not limited")


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
    level: float = Field(default=0.0, description="chance of a wrong promotion that this decision could take")
    anchor: Sha256 | None = Field(default=None, description="weights of the best model ever, where that was known")
    becomes_anchor: bool = Field(default=False, description="whether it is the best model ever, once promoted")
    other_reason: str | None = Field(default=None, description="why it is promoted, where that is not its quality")
    update_bytes: int | None = Field(default=None, description="expected size of the delta from the champion's weights")


def level(alpha: float, tests: float, before: Decision | None) -> float:
    """The chance of a wrong promotion that the next decision of a run may take, so that all take alpha together.

    The fallback procedure (Wiens 2003; Wiens and Dmitrienko 2005): each decision has its share, and one that promotes hands on all that it
    could take to the next. What wrong challengers could take up to the first wrong promotion never adds up to more than alpha. It needs the
    decisions one after another, as they come: a student is trained when its teacher was decided on. Holm's procedure needs all of them
    first; a fixed sequence without shares would leave a student nothing when its teacher's new version fails, although the
    champion teaches it then. Never less than Bonferroni's share, and alpha itself for the last of a run in which all pass.

    Args:
        alpha: for the whole run.
        tests: decisions that the run may come to: variants, times the attempts at each.
        before: the run's last decision, if any.
    """
    return alpha / tests + (before.level if before and before.outcome == "promote" else 0.0)


def decide(
    card: Scorecard,
    limits: Limits,
    budgets: Budgets,
    champion: Sha256 | None,
    *,
    anchor: Sha256 | None = None,
    level: float | None = None,
    update_bytes: int | None = None,
) -> Decision:
    """Decide on one challenger.

    Args:
        card: the challenger's scorecard; with a champion it holds comparisons against it on both splits, and against the anchor
            where that is another model.
        limits: what is asked for.
        budgets: of the device class.
        champion: weights of the present champion; None when there is none, then only the floors count.
        anchor: weights of the best model ever.
        level: chance of a wrong promotion; None: `limits.alpha`, for a single decision.
        update_bytes: expected size of the delta from the champion's weights; `choose` looks at it.
    """
    n = min(q.n for q in card.quality)
    alpha = limits.alpha if level is None else level
    too_few = _too_few(card.quality, limits)
    found = [*floors(card, limits, budgets, alpha)]
    superior: list[_Finding] = []
    harmless: list[_Finding] = []  # enough where a reason other than quality is given
    if champion is not None:
        rows = [c for c in card.comparisons if c.against == "champion" and c.against_sha256 == champion]
        if not {"new", "old"} <= {c.split for c in rows}:
            found.append(_missing("it was not compared with the present champion"))
        for row in rows:
            within = limits.margin * _noise(card, row)
            if row.split == "new":
                superior.append(_below(row, 0.0, "superiority on the new data", alpha))
                harmless.append(_below(row, within, "non-inferiority on the new data", alpha))
            else:
                found.append(_below(row, within, "non-inferiority on the old data", alpha))
    if limits.beat_solver and card.variant in TEACHERS:
        beside = [c for c in card.comparisons if c.against == "solver"]
        if not beside:
            found.append(_missing("it was not compared with full, drawn by a solver"))
        what = f"superiority over full in {card.solver.steps if card.solver else '?'} steps of a second-order solver"
        found += [_below(row, 0.0, what, alpha) for row in beside]
    best = [c for c in card.comparisons if c.against in ("champion", "anchor") and c.against_sha256 == anchor]
    if anchor is not None and (anchor != champion or limits.decay < limits.margin):
        if not {"new", "old"} <= {c.split for c in best}:
            found.append(_missing("it was not compared with the anchor, the best model ever"))
        for row in best:
            what = f"total decay against the anchor on the {row.split} data"
            found.append(_below(row, limits.decay * _noise(card, row), what, alpha))

    failed = [f for f in [*found, *superior] if not f.check.passed]
    outcome: Outcome
    if too_few:
        outcome, reason = "more data", too_few
    elif not failed:
        outcome = "promote"
        reason = "first version, all floors are met" if champion is None else "better on the new data, not worse on the old"
    elif all(f.check.passed for f in [*harmless, *found]):
        outcome = "promote if reasoned"
        reason = "; ".join(f.needed or f.check.text for f in failed)
        reason += "; it is not worse anywhere by more than the margin, so it may be promoted for a reason other than quality"
    elif all(f.needed for f in failed):
        outcome, reason = "more data", "; ".join(f.needed for f in failed if f.needed)
    else:
        outcome, reason = "refuse", "; ".join(f.check.text for f in failed)
    first = champion is None and anchor is None
    everywhere = bool(best) and all(_below(row, 0.0, "", alpha).check.passed for row in best)
    return Decision(
        outcome=outcome, reason=f"{reason} (n = {n})", checks=[f.check for f in [*found, *superior, *harmless]], n=n,
        champion=champion, challenger=card.weights_sha256, limits=limits, scorecard=card.sha256, level=alpha, anchor=anchor,
        becomes_anchor=outcome in ("promote", "promote if reasoned") and (first or everywhere), update_bytes=update_bytes,
    )  # fmt: skip


def reasoned(decision: Decision, reason: str) -> Decision:
    """The decision to promote for a reason other than quality, such as a mended fault, a format or a licence.

    Raises:
        PromotionError: the gate did not find that it does no harm, or there is no reason.
    """
    if decision.outcome != "promote if reasoned":
        raise PromotionError(
            f"the gate answered {decision.outcome!r}: {decision.reason}; only what is not worse anywhere can be promoted for a "
            "reason other than quality"
        )
    if not reason.strip():
        raise PromotionError("a promotion that is not for quality needs its reason; give it with --reason")
    text = f"not for its quality, but: {reason.strip()}; not worse anywhere by more than the margin (n = {decision.n})"
    return decision.model_copy(update={"outcome": "promote", "reason": text, "other_reason": reason.strip()})


def choose(candidates: Sequence[Decision], between: Mapping[tuple[Sha256, Sha256], Sequence[Comparison]]) -> Decision | None:
    """Which of several challengers of one champion to promote: the best, or the smallest update among those as good.

    As good as the best is what cannot be told from it: in each feature space the paired interval of the difference covers zero. A champion
    offered as its own challenger has the smallest update of all, and is never chosen.

    Args:
        candidates: what the gate said of each.
        between: comparisons of a first challenger minus a second, by their weights, in either order.

    Returns:
        None where none may be promoted.
    """
    passed = [d for d in candidates if d.outcome == "promote" and d.challenger != d.champion]
    if not passed:
        return None

    def pairs(a: Decision, b: Decision) -> list[tuple[float, float, float]]:
        """Differences a minus b, their errors and the quantile."""
        sign, rows = 1.0, between.get((a.challenger, b.challenger), ())
        if not rows:
            sign, rows = -1.0, between.get((b.challenger, a.challenger), ())
        alpha = min(a.limits.alpha, b.limits.alpha)
        return [(sign * row.delta, row.se, quantile(row.groups, alpha / 2)) for row in rows]

    def beaten(d: Decision) -> int:
        """By how many others its estimates are worse in sum."""
        return sum(sum(delta for delta, _, _ in pairs(d, other)) > 0 for other in passed if other is not d)

    best = min(passed, key=lambda d: (beaten(d), d.challenger))
    alike = [
        d for d in passed
        if d is best or ((rows := pairs(d, best)) and all(abs(delta) <= quantile * se for delta, se, quantile in rows))
    ]  # fmt: skip
    return min(alike, key=lambda d: (math.inf if d.update_bytes is None else d.update_bytes, d is not best, d.challenger))


@dataclass(frozen=True)
class _Finding:
    """A check, and how much more data would settle it where its estimate would do but its error is too large."""

    check: Check
    needed: str | None = None


def _missing(text: str) -> _Finding:
    return _Finding(Check(name="compared", passed=False, text=text))


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


def floors(card: Scorecard, limits: Limits, budgets: Budgets, alpha: float) -> list[_Finding]:
    """What every model must meet, with or without a champion."""
    coverage = min(q.coverage for q in card.quality if q.split == "new")
    groups = min(q.groups for q in card.quality if q.split == "new")
    memory = card.cost.peak_mib - card.cost.bare_mib
    checks = [
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
            name="latency", passed=card.cost.milliseconds <= budgets.latency_ms,
            text=f"an image takes {card.cost.milliseconds:.0f} ms here, the budget is {budgets.latency_ms:.0f} ms",
        ),
    ]  # fmt: skip
    if budgets.memory_mib is not None:
        text = f"the model takes {memory:.0f} MiB of memory, the budget is {budgets.memory_mib:.0f} MiB"
        checks.append(Check(name="memory", passed=memory <= budgets.memory_mib, text=text))
    return [*map(_Finding, checks), *(_copies(row, limits.copying, groups, alpha) for row in card.memorisation)]


def _copies(row: Memorisation, bound: float, groups: int, alpha: float) -> _Finding:
    """Whether copying of training images can be ruled out, in one space."""
    times = quantile(groups, alpha)
    upper = row.probability + times * row.se if row.se else row.probability
    text = (
        f"copying, {row.space} features: a generated image is nearer to a training image than a held-out one with probability "
        f"{row.probability:.2f} (upper bound {upper:.2f} at n = {row.n} and {row.reference} held-out images), must be below {bound:.2f}"
    )
    needed = None
    if upper >= bound > row.probability:
        needed = f"copying is undecided in {row.space} features, {_more(row.n, groups, times * row.se, bound - row.probability)}"
    return _Finding(Check(name=f"copying ({row.space})", passed=upper < bound, text=text), needed)


def quantile(groups: int, alpha: float) -> float:
    """Student's t, because groups may be few; with a single one nothing can be said."""
    return float(stats.t.ppf(1 - alpha, groups - 1)) if groups > 1 else math.inf


def _noise(card: Scorecard, row: Comparison) -> float:
    """The distance of pure noise where a comparison was made."""
    return next(q.noise_kd for q in card.quality if (q.space, q.split) == (row.space, row.split))


def _below(row: Comparison, bound: float, what: str, alpha: float) -> _Finding:
    """Whether a difference is shown to lie below a bound, in one space."""
    reach = quantile(row.groups, alpha) * row.se
    upper = row.delta + reach
    text = (
        f"{what}, {row.space} features: difference {row.delta:+.4f} (upper bound {upper:+.4f} at n = {row.n} and {row.groups} "
        f"held-out groups), must be below {bound:.4f}"
    )
    needed = None
    if upper >= bound > row.delta:
        needed = f"{what} is undecided at n = {row.n} and {row.groups} held-out groups, {_more(row.n, row.groups, reach, bound - row.delta)}"
    return _Finding(Check(name=f"{what} ({row.space})", passed=upper < bound, text=text), needed)


def _more(n: int, groups: int, reach: float, room: float) -> str:
    """How many images and groups would bring an interval's reach down to the room that there is."""
    times = (reach / room) ** 2 if groups > 1 else 8.0
    return f"about {math.ceil(n * times)} and {math.ceil(groups * times)} are needed"
