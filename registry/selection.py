"""The gate: may this challenger replace the champion? Pure functions of scorecards; each number comes with its n and its error.

Promotion needs

- *superiority* on the held-out items of the new data revision, in one of the feature spaces, of images alone or of pairs of
  image and caption. A gain may show in only one of these tests, so each takes its part of the error probability;
- *non-inferiority* on the new data and on the champion's own data, in every feature space, of images and of pairs: the upper
  bound of challenger minus champion lies below a margin. The margin is a share of the champion's own distance from the data, or
  a multiple of the distance between two sets of 25 groups of real images, whichever is larger;
- *no slow decay*: many small losses, each within the margin, must not add up. The upper bound of challenger minus anchor (the
  best model so far) lies below a multiple of the margin;

and it needs floors, which hold without a champion, too: images go with their captions; each caption, and each word of captions,
is drawn; few images are unlike all real ones or like each other; and there are limits on coverage, copying, bad images, unused
experts, latency and memory. With too few images the answer is not "refuse" but "more data", and says how much.

Another variant than `full` is not tested for superiority, because its `full` was. Instead it is tested for non-inferiority to that
`full`. A student must also draw nearer to the converged images of `full` than `full` with as many evaluations, because that needs
no second set of weights on a device.

A challenger may be promoted for a recorded reason other than quality ("promote if reasoned", then `reasoned`) if it fails only
superiority, and is within the margin on the new data, too. If it is shown to be worse within the margin, a person must accept
this explicitly. All tests of one challenger must pass, so they need no correction for each other (Berger 1982). The decisions
of one run do (see `level`), and so do the attempts on one held-out set (see `spent`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field
from scipy import stats

from model.config import HELD_OUT_PERMILLE, MEMORY_IMAGES
from model.scorecard import (
    FOLLOW,
    HASHES,
    CaptionCheck,
    Comparison,
    Following,
    Frozen,
    Memorisation,
    Plausibility,
    Quality,
    Scorecard,
    Sha256,
)
from registry.curve import Update
from registry.errors import PromotionError

Outcome = Literal["promote", "promote if reasoned", "more data", "refuse"]
KEPT = 0.5  # least share of what the champion draws of a caption that a challenger must draw
JUDGED_IMAGES, JUDGED_GROUPS = 10, 4  # least held-out images and groups with which a caption can be judged
INHERITED = 0.5  # a held-out set that shares this part of its groups with another inherits that one's attempts


class Limits(Frozen):
    """The gate's limits."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="chance of promoting a worse model")
    tolerance: float = Field(
        default=0.5,
        gt=0,
        le=2,
        description="how much worse a challenger may be on old data, as a share of the champion's own distance from real images",
    )
    tolerance_bands: float = Field(
        default=1.5,
        ge=0,
        le=10,
        description="the same limit as a multiple of the distance between two sets of 25 groups of real images; the larger "
        "limit counts",
    )
    total_tolerance: float = Field(
        default=2.0, gt=0, le=10, description="how much worse a challenger may be than the anchor, in multiples of that limit"
    )
    margin: float | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="limit of an older version of ferry, as a share of the distance of noise",
    )
    decay: float | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="limit of an older version of ferry, as a share of the distance of noise",
    )
    minimum_images: int = Field(
        default=96, ge=8, description="smallest number of generated and of held-out images with which the gate decides"
    )
    coverage: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="smallest share of held-out images that have a generated image among their 5 nearest neighbours",
    )
    copying: float = Field(
        default=0.8,
        gt=0.5,
        le=1,
        description="limit of the chance that a generated image lies nearer to training images than a held-out image does",
    )
    copies: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="limit of the share of generated images that lie nearer to training images than every held-out image",
    )
    implausible: float = Field(
        default=0.3, gt=0, le=1, description="limit of the share of generated images that are unlike all real images"
    )
    implausible_more: float = Field(
        default=0.08,
        gt=0,
        le=1,
        description="limit of how far that share exceeds the champion's; `tolerance` times the champion's share counts if it "
        "is larger",
    )
    duplicates: float = Field(
        default=0.3, gt=0, le=1, description="limit of the share of generated images that are like another generated image"
    )
    captions: bool = Field(default=True, description="whether images must match their captions, and each caption must be drawn")
    bad_images: float = Field(default=0.01, ge=0, le=1, description="largest share of constant or non-finite images")
    dead_experts: int = Field(default=2, ge=0, description="largest number of routed experts that may carry almost no load")
    beat_solver: bool = Field(
        default=True,
        description="whether a student must draw nearer to the converged images of full than full itself with as many evaluations",
    )


class Budgets(Frozen):
    """Latency and memory that a device class allows."""

    latency_ms: float = Field(description="time budget for one image, in milliseconds")
    memory_mib: float | None = Field(
        default=None, description="memory budget for the model, in MiB beyond a bare interpreter; None: no limit"
    )


class Check(Frozen):
    """The result of one check."""

    name: str = Field(description="name of the check")
    passed: bool = Field(description="whether it passed")
    text: str = Field(description="the numbers that led to it")


class Decision(Frozen):
    """The gate's decision, and every number that led to it."""

    outcome: Outcome = Field(description="the gate's answer")
    reason: str = Field(description="why, in one sentence")
    checks: list[Check] = Field(description="all checks, with their numbers")
    n: int = Field(description="generated images")
    champion: Sha256 | None = Field(description="hash of the champion's weights; null: there was none")
    challenger: Sha256 = Field(description="hash of the challenger's weights")
    limits: Limits = Field(description="limits of the gate")
    scorecard: Sha256 = Field(description="hash of the challenger's scorecard")
    level: float = Field(default=0.0, description="chance of a wrong promotion that was allowed to this decision")
    anchor: Sha256 | None = Field(default=None, description="hash of the weights of the best model ever; null: there was none")
    becomes_anchor: bool = Field(default=False, description="whether it is the best model ever, once promoted")
    other_reason: str | None = Field(
        default=None, description="reason for a promotion that is not for quality; null: there is none"
    )
    update_bytes: int | None = Field(default=None, description="size of the update from the champion in bytes")
    update: Update | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="how the update was made, and what it costs and keeps; null: nothing was made smaller, or an older ferry",
    )
    worse: str | None = Field(
        default=None, description="where the challenger is shown to be worse within the margin, and by how much at most"
    )
    held_out: list[str] = Field(default=[], description="hashes of the held-out groups that the challenger was judged on")


def level(alpha: float, tests: float, before: Decision | None) -> float:
    """Return the chance of a wrong promotion that the next decision of a run may take, so that all decisions share alpha.

    This is the fallback procedure (Wiens 2003; Wiens and Dmitrienko 2005): each decision has its share, and a decision that
    promotes passes its whole level on to the next one. The levels that wrong challengers use, up to the first wrong promotion,
    never add up to more than alpha. The procedure takes the decisions one after another, as they come: a student is trained
    after the decision on its teacher. Holm's procedure would need all decisions first. A fixed sequence without shares would
    leave a student nothing when its teacher's new version fails, although the champion teaches it then. The level is never less
    than Bonferroni's share. It is alpha for the last decision of a run in which all pass.

    Args:
        alpha: chance of a wrong promotion in the whole run.
        tests: number of decisions that the run may make: variants times the attempts at each.
        before: the run's last decision; None: this is the first.
    """
    return alpha / tests + (before.level if before and before.outcome == "promote" else 0.0)


def spent(alpha: float, held_out: Sequence[str], scorecard: Sha256, before: Sequence[Decision], ahead: int = 0) -> float:
    """Return the chance of a wrong promotion that a decision may take on a held-out set that may have been used before.

    Attempt k gets alpha 6 / (pi k)², so that all attempts that will ever be made take at most alpha together. A set that shares
    half of its groups with an earlier one inherits that one's attempts. A repeated decision on the same scorecard is the same
    attempt. If the same weights are sampled otherwise, or measured in other feature spaces, this is another attempt. First
    versions use up no attempt.

    Args:
        alpha: chance of a wrong promotion in all attempts on this set.
        held_out: hashes of the set's groups, the smallest ones.
        scorecard: hash of the scorecard that is decided on.
        before: earlier decisions of the line, configuration and variant, the oldest first.
        ahead: 0 for this attempt, k for the k-th attempt after it.
    """
    seen: list[Sha256] = []
    for decision in before:
        if decision.scorecard == scorecard:
            break
        if decision.champion and decision.scorecard not in seen and _overlap(held_out, decision.held_out) >= INHERITED:
            seen.append(decision.scorecard)
    return alpha * 6 / (math.pi * (len(seen) + 1 + ahead)) ** 2


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Estimate the share of the first set that is in the second, from their smallest hashes (Broder 1997); 0: one is empty."""
    if not a or not b:
        return 0.0
    known = min(max(a), max(b)) if max(len(a), len(b)) >= HASHES else max(*a, *b)
    mine, theirs = ({h for h in of if h <= known} for of in (a, b))
    return len(mine & theirs) / len(mine) if mine else 0.0


def decide(
    card: Scorecard,
    limits: Limits,
    budgets: Budgets,
    champion: Sha256 | None,
    *,
    anchor: Sha256 | None = None,
    level: float | None = None,
    again: float | None = None,
    update_bytes: int | None = None,
) -> Decision:
    """Decide on one challenger.

    Args:
        card: the challenger's scorecard; with a champion it holds comparisons against it on both splits, and against the anchor
            where that is another model.
        limits: the gate's limits.
        budgets: of the device class.
        champion: hash of the present champion's weights; None: there is no champion, and only the floors count.
        anchor: hash of the weights of the best model so far; None: there is none.
        level: chance of a wrong promotion that this decision may take; None: `limits.alpha`, for a single decision.
        again: level of the next attempt, for which the decision says how many images are needed; None: the same level.
        update_bytes: size of the update from the champion in bytes; None: there is no champion.
    """
    n = min(q.n for q in card.quality)
    alpha = limits.alpha if level is None else level
    again = alpha if again is None else again
    found = [*floors(card, limits, budgets, alpha, again, champion is not None)]
    beside = _beside_champion(card, limits, champion, alpha, again) if champion is not None else _Beside()
    best = [c for c in card.comparisons if c.against in ("champion", "anchor") and c.against_sha256 == anchor]
    found += [*beside.found, *_beside_full(card, limits, alpha, again)]
    if anchor is not None and (anchor != champion or limits.total_tolerance < 1):
        found += _beside_anchor(card, limits, best, alpha, again)
    too_few = _too_few(card, limits)
    outcome, reason = ("more data", too_few) if too_few else _outcome(card, limits, champion, found, beside)
    first = champion is None and anchor is None
    everywhere = bool(best) and all(_below(row, 0.0, "", alpha, again).check.passed for row in best)
    return Decision(
        outcome=outcome, reason=f"{reason} (n = {n})", checks=[f.check for f in [*found, *beside.superior, *beside.harmless]], n=n,
        champion=champion, challenger=card.weights_sha256, limits=limits, scorecard=card.sha256, level=alpha, anchor=anchor,
        becomes_anchor=outcome in ("promote", "promote if reasoned") and (first or everywhere), update_bytes=update_bytes,
        worse="; ".join(beside.worse) if beside.worse and outcome == "promote if reasoned" else None, held_out=card.held_out,
    )  # fmt: skip


@dataclass(frozen=True)
class _Beside:
    """The findings of a comparison with the champion."""

    found: list[_Finding] = field(default_factory=list)
    superior: list[_Finding] = field(default_factory=list)
    harmless: list[_Finding] = field(default_factory=list)
    """What a promotion for a reason other than quality needs, too."""
    worse: list[str] = field(default_factory=list)
    """Where it is shown to be worse, in words."""


def _beside_champion(card: Scorecard, limits: Limits, champion: Sha256, alpha: float, again: float) -> _Beside:
    """Test superiority on the new data, and non-inferiority on both splits."""
    rows = [c for c in card.comparisons if c.against == "champion" and c.against_sha256 == champion]
    made = _Beside()
    if not {"new", "old"} <= {c.split for c in rows}:
        made.found.append(_missing("this version was not compared with the present champion"))
    if card.variant == "full" and any(row.split == "new" for row in rows):
        made.superior.append(_superior(rows, "new", alpha, again))
    for row in rows:
        finding = _below(row, margin(card.quality, row, limits), f"non-inferiority on the {row.split} data", alpha, again)
        (made.harmless if row.split == "new" else made.found).append(finding)
        if row.delta - quantile(row.groups, limits.alpha) * row.se > 0:
            made.worse.append(_worse(row, alpha))
    return made


def _beside_full(card: Scorecard, limits: Limits, alpha: float, again: float) -> list[_Finding]:
    """Test whether a variant is not worse than its `full`, and whether a student is worth its weights."""
    if card.variant == "full":
        return []
    rows = [c for c in card.comparisons if c.against == "full"]
    if not rows:
        return [_missing("this version was not compared with full")]
    found = [_below(row, margin(card.quality, row, limits), "non-inferiority to full", alpha, again) for row in rows]
    return [*found, *_beside_solver(card, limits, alpha)]


def _beside_solver(card: Scorecard, limits: Limits, alpha: float) -> list[_Finding]:
    """Test whether a student draws nearer to the converged images of `full` than `full` with as many evaluations."""
    if not limits.beat_solver or card.sampler.method != "mean":
        return []
    row = card.converged
    if row is None or row.delta is None or row.se is None or row.solver is None:
        return [_missing("this student was not compared with full in as many evaluations")]
    upper = row.delta + quantile(row.n, alpha) * row.se
    text = (
        f"distance from the converged images: {row.distance:.3f} in {card.sampler.evaluations} evaluations, full in as many {row.solver:.3f}, "
        f"difference {row.delta:+.3f} (upper bound {upper:+.3f} at n = {row.n}); the upper bound must be below 0"
    )
    needed = f"{text}: undecided" if upper >= 0 > row.delta else None
    return [_Finding(Check(name="nearer than full with as many evaluations", passed=upper < 0, text=text), needed)]


def _beside_anchor(card: Scorecard, limits: Limits, rows: Sequence[Comparison], alpha: float, again: float) -> list[_Finding]:
    """Test the total loss against the best model so far."""
    found = []
    if not {"new", "old"} <= {c.split for c in rows}:
        found.append(_missing("this version was not compared with the anchor, the best model ever"))
    for row in rows:
        what = f"total loss against the anchor on the {row.split} data"
        found.append(_below(row, limits.total_tolerance * margin(card.quality, row, limits), what, alpha, again))
    return found


def _outcome(
    card: Scorecard, limits: Limits, champion: Sha256 | None, found: Sequence[_Finding], beside: _Beside
) -> tuple[Outcome, str]:
    """Say what follows from all findings, and why."""
    failed = [f for f in [*found, *beside.superior, *beside.harmless] if not f.check.passed]
    reason = "; ".join(f.needed or f.check.text for f in failed)
    if not failed:
        reason = _first(limits) if champion is None else "better on the new data, not worse on the old"
        if card.variant != "full":
            first = "first version, " if champion is None else ""
            reason = f"{first}as good as full within the margin, in {card.sampler.evaluations} evaluations of the network"
        return "promote", reason + _untested(card, limits)
    if all(f.check.passed or f.waivable for f in [*beside.harmless, *found]):
        reason += f"; {'; '.join(beside.worse)}" if beside.worse else ""
        return "promote if reasoned", reason + (
            "; it is not worse anywhere by more than the margin, so it may be promoted for a reason other than quality"
            if champion
            else "; a first version may be promoted without this for a reason that is recorded"
        )
    return "more data" if all(f.needed or f.waivable for f in failed) else "refuse", reason


def _superior(rows: Sequence[Comparison], split: str, alpha: float, again: float) -> _Finding:
    """Test whether a challenger is better on a split in one of the spaces and aspects, each at its part of alpha (Bonferroni).

    Returns the first test that passes, or else the one that comes closest.
    """
    tested = [row for row in rows if row.split == split]
    what, tests = f"superiority on the {split} data", len(tested)
    each = [_below(row, 0.0, what, alpha / tests, again / tests) for row in tested]
    passed = [finding for finding in each if finding.check.passed]
    likely = min(
        range(len(tested)),
        key=lambda i: tested[i].delta / tested[i].se if tested[i].se else math.copysign(math.inf, tested[i].delta),
    )
    return passed[0] if passed else each[likely]


def _first(limits: Limits) -> str:
    """Say that a first version meets the floors, and which of them are switched off."""
    off = [
        name
        for name, is_off in (
            ("coverage", limits.coverage <= 0), ("implausible", limits.implausible >= 1), ("duplicates", limits.duplicates >= 1),
            ("copies", limits.copies >= 1), ("copying", limits.copying >= 1), ("captions", not limits.captions),
        )
        if is_off
    ]  # fmt: skip
    switched_off = f" (switched off in ferry.toml: {', '.join(off)})" if off else ""
    return f"first version, all floors are met{switched_off}"


def _untested(card: Scorecard, limits: Limits) -> str:
    """Say that no test of the captions could be made; empty where one was, or none was asked for."""
    if not limits.captions or card.plausibility is None:  # older scorecards have no such figures
        return ""
    shown = any(row.real - quantile(row.groups, limits.alpha) * row.real_se > 0 for row in card.following)
    judged = any(_is_judgeable(row, limits.alpha) for row in card.asked)
    return "" if shown or judged else "; whether it follows its captions could not be tested with these data"


def margin(qualities: Sequence[Quality], row: Comparison, limits: Limits) -> float:
    """Return how much worse a challenger may be, in one space and aspect.

    The margin is the larger of a share of the champion's distance from the data and a multiple of the distance between two sets
    of real images. It never depends on the distance of noise.

    Args:
        qualities: figures with these real images, in the row's space.
        row: comparison with the champion.
        limits: the gate's.
    """
    place = next(q for q in qualities if (q.space, q.split) == (row.space, row.split))
    band = place.band if row.aspect == "images" else place.captions_band
    return max(limits.tolerance * row.champion_kd, limits.tolerance_bands * (band or 0.0))


def _worse(row: Comparison, alpha: float) -> str:
    """Say in words that a challenger is shown to be worse, and by how much at most."""
    most = row.delta + quantile(row.groups, alpha) * row.se
    return f"worse on the {row.split} data in {row.space} features, {_of(row)}, by at most {most:.4f}"


def _of(row: Comparison) -> str:
    return "images with their captions" if row.aspect == "captions" else "images alone"


def reasoned(decision: Decision, reason: str, accept_worse: bool = False) -> Decision:
    """Turn a decision into a promotion for a reason other than quality, such as a corrected error, a format or a licence.

    Raises:
        PromotionError: the gate did not find the model harmless, the reason is empty, or it is shown to be worse and nobody
            accepts that.
    """
    if decision.outcome != "promote if reasoned":
        raise PromotionError(
            f"the gate answered {decision.outcome!r}: {decision.reason}; only a version that is not worse anywhere can be "
            "promoted for a reason other than quality"
        )
    if not reason.strip():
        raise PromotionError("a promotion that is not for quality needs a reason; give it with --reason")
    if decision.worse and not accept_worse:
        raise PromotionError(f"the gate found it {decision.worse}; add --accept-worse to promote it anyway")
    found = f"accepted although it is {decision.worse}" if decision.worse else "not worse anywhere by more than the margin"
    waived = [check.text for check in decision.checks if not check.passed and not _is_about_the_champion(check)]
    if decision.champion is None:
        found = "first version"
    if waived:
        found += f"; promoted although {'; although '.join(waived)}"
    text = f"promoted for a reason other than quality: {reason.strip()}; {found} (n = {decision.n})"
    return decision.model_copy(update={"outcome": "promote", "reason": text, "other_reason": reason.strip()})


def _is_about_the_champion(check: Check) -> bool:
    """Check whether a finding compares with the champion; what it says is in `Decision.worse` already."""
    return check.name.startswith(("superiority", "non-inferiority"))


@dataclass(frozen=True)
class _Finding:
    """The result of a check.

    `needed` says how much more data would decide it, where the estimate would pass but its error is too large.
    """

    check: Check
    needed: str | None = None
    waivable: bool = False
    """Whether a person may promote in spite of it, for a reason."""


def _missing(text: str) -> _Finding:
    return _Finding(Check(name="compared", passed=False, text=text))


def _too_few(card: Scorecard, limits: Limits) -> str | None:
    """Say that there are too few images to decide on, and how many there must be; None: there are enough.

    Groups are held out as a whole, so the share of a data set that is held out differs from the usual one.
    """
    generated, least = min(q.n for q in card.quality), min(card.quality, key=lambda q: q.reference)
    held_out = least.reference
    needed = limits.minimum_images
    if generated < needed:
        return f"{generated} generated images are too few to decide on; {needed} are needed, so raise gate.images in ferry.toml"
    if held_out < needed:
        share, whose = HELD_OUT_PERMILLE / 1000, "all images"
        training = max((row.training for row in card.memorisation), default=0)
        if least.split == "new" and 0 < training < MEMORY_IMAGES:  # all of them were searched, so they are counted
            total = held_out + training
            share, whose = held_out / total, f"your {total} images"
        return (
            f"{held_out} held-out images are too few to decide on; {needed} are needed, and {100 * share:.0f} % of {whose} "
            f"are held out, so add images until there are about {math.ceil(needed / share)} in all"
        )
    return None


def floors(card: Scorecard, limits: Limits, budgets: Budgets, alpha: float, again: float, champion: bool) -> list[_Finding]:
    """Check what every model must meet, with or without a champion.

    A person may waive some of the floors for a reason: those on images and captions of a first version, and on captions that
    cannot be judged.
    """
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
            text=f"{card.bad_images:.1%} of the images are constant or not finite; at most {limits.bad_images:.1%} may be",
        ),
        Check(
            name="experts", passed=card.usage.dead <= limits.dead_experts,
            text=f"{card.usage.dead} experts carry almost no load; at most {limits.dead_experts} may",
        ),
        Check(
            name="latency", passed=card.cost.milliseconds <= budgets.latency_ms,
            text=f"an image takes {card.cost.milliseconds:.0f} ms here; the budget is {budgets.latency_ms:.0f} ms",
        ),
    ]  # fmt: skip
    if budgets.memory_mib is not None:
        text = f"the model takes {memory:.0f} MiB of memory; the budget is {budgets.memory_mib:.0f} MiB"
        checks.append(Check(name="memory", passed=memory <= budgets.memory_mib, text=text))
    return [
        *map(_Finding, checks), *(_copies(row, limits.copying, groups, alpha, again) for row in card.memorisation),
        *_odd(card, limits, champion),
        *(_follows(row, limits.alpha, champion) for row in card.following if limits.captions),
        *(_draws(row, limits.alpha) for row in card.asked if limits.captions),
    ]  # fmt: skip


def _odd(card: Scorecard, limits: Limits, champion: bool) -> list[_Finding]:
    """Test whether few images are unlike all real ones, like each other, or copies; exact bounds (Clopper and Pearson 1934)."""
    rows = []
    if card.plausibility:
        n, odd, same = card.plausibility.n, card.plausibility.implausible, card.plausibility.duplicates
        rows += [("implausible images", "are unlike all real ones", odd, n, limits.implausible)]
        rows += [("duplicates", "are like another generated one", same, n, limits.duplicates)]
    if card.plausibility:  # older scorecards were judged without these floors
        for row in card.memorisation:
            near = round(row.nearer_than_any * row.n)
            rows.append(
                (
                    f"copies ({row.space})",
                    f"are nearer to training images than any held-out one, {row.space} features,",
                    near,
                    row.n,
                    limits.copies,
                )
            )
    found = []
    for name, what, count, n, limit in rows:
        upper = float(stats.beta.ppf(1 - limits.alpha, count + 1, n - count)) if count < n else 1.0
        bound = f"upper bound {upper:.1%} at n = {n}"
        text = f"{count / n:.1%} of the images {what} ({bound}); the upper bound must be below {limit:.0%}"
        found.append(_Finding(Check(name=name, passed=upper < limit or limit == 1, text=text), waivable=not champion))
    if champion and card.plausibility and card.plausibility.more is not None and (card.plausibility.pairs or 0) > 1:
        found.append(_odder(card.plausibility, limits))
    return found


def _odder(row: Plausibility, limits: Limits) -> _Finding:
    """Test whether images unlike all real ones are not much more frequent than the champion's.

    A distance does not notice this: a few images of noise among those of a biased model move their mean towards the data.
    """
    pairs, more, champion = row.pairs or 0, row.more or 0.0, row.champion or 0.0
    reach = quantile(pairs, limits.alpha) * (row.more_se or 0.0)
    bound = max(limits.implausible_more, limits.tolerance * champion)
    text = (
        f"the share of images unlike all real ones exceeds the champion's, {champion:.1%}, by {100 * more:+.1f} percentage points (upper bound "
        f"{100 * (more + reach):+.1f} at {pairs} pairs of images); the upper bound must be below {100 * bound:.1f}"
    )
    needed = f"{text}: undecided, {_images(row.n, reach, bound - more)}" if more < bound <= more + reach else None
    passed = more + reach < bound or 1 in (limits.implausible, limits.implausible_more)
    return _Finding(Check(name="implausible images beside the champion's", passed=passed, text=text), needed)


def _images(n: int, reach: float, room: float) -> str:
    """Say how many images would reduce `reach`, from estimate to upper bound, to `room`, from estimate to limit."""
    return f"about {math.ceil(n * (reach / room) ** 2)} images are needed (gate.images)"


def _follows(row: Following, alpha: float, champion: bool) -> _Finding:
    """Test whether images go with their captions, if real images can be shown to go with theirs."""
    times = quantile(row.groups, alpha)
    if row.real - times * row.real_se <= 0:
        text = f"captions, {row.space} features: not tested, because real images cannot be shown to match their own captions"
        return _Finding(Check(name=f"captions ({row.space}, {row.split})", passed=True, text=text))
    least = row.excess - times * row.excess_se
    text = (
        f"images match their captions on the {row.split} data, {row.space} features, {row.share:.2f} times as strongly as "
        f"real images do; this must be shown to exceed 0.33 (at {row.groups} held-out groups)"
    )
    needed = f"{text}: undecided" if least <= 0 < row.excess else None
    return _Finding(
        Check(name=f"captions ({row.space}, {row.split})", passed=least > 0, text=text), needed, waivable=not champion
    )


def _is_judgeable(row: CaptionCheck, alpha: float) -> bool:
    """Check whether there are enough real images of a caption, and whether they differ clearly enough from others.

    They must differ at twice the bound. Otherwise the error is so large that a share of 1 could not be told from 1/3.
    """
    times = quantile(row.groups, alpha)
    return row.reference >= JUDGED_IMAGES and row.groups >= JUDGED_GROUPS and row.apart > 2 * times * row.apart_se


def _draws(row: CaptionCheck, alpha: float) -> _Finding:
    """Test whether a caption is drawn, if that can be judged; a caption that the champion does not draw either is no new harm.

    A test must reject that the model draws nothing of it, so a model that drops the caption passes with a chance of at most
    alpha. How much of it is drawn is an estimate: it must be more than a third of what real images show, or more than half of
    what the champion draws if that is less.
    """
    name = f"{'word' if row.word else 'caption'} {row.caption!r}"
    times = quantile(row.groups, alpha)
    enough = _is_judgeable(row, alpha)
    if row.share is None or (row.champion_share is not None and row.champion_share <= FOLLOW / 2):
        text = f"{name}: " + (
            "no feature space distinguishes its images from others"
            if row.share is None
            else "the champion does not draw it either"
        )
        return _Finding(Check(name=name, passed=True, text=text))
    share = f"{row.share:.2f} of what distinguishes its real images from others"
    at = f"{row.reference} held-out images in {row.groups} groups"
    least = FOLLOW if row.champion_share is None else min(FOLLOW, KEPT * row.champion_share)
    if not enough:
        # Compared with the champion's share on the same real images, the estimate is reliable even then. Else a test decides.
        shown = row.drawn + times * row.drawn_se < least * row.apart
        seems = row.share <= least and row.apart > 2 * row.apart_se
        dropped = seems if row.champion_share is not None else shown
        few = row.reference < JUDGED_IMAGES or row.groups < JUDGED_GROUPS
        why = f"with {at}" if few else f"with {at}, which no feature space clearly distinguishes from others,"
        text = f"{name}: the model seems to draw {share}; {why} this cannot be judged"
        return _Finding(Check(name=name, passed=not dropped, text=text), waivable=True)
    shown = row.drawn - times * row.drawn_se > 0
    text = f"{name}: the model draws {share}; this must exceed {least:.2f} and be shown to exceed 0 ({at})"
    needed = f"{text}: undecided" if row.share > least and not shown else None
    return _Finding(Check(name=name, passed=row.share > least and shown, text=text), needed, waivable=row.champion_share is None)


def _copies(row: Memorisation, bound: float, groups: int, alpha: float, again: float) -> _Finding:
    """Test whether copying of training images can be ruled out, in one feature space."""
    times = quantile(groups, alpha)
    upper = row.probability + times * row.se if row.se else row.probability
    text = (
        f"copying, {row.space} features: a generated image is nearer to a training image than a held-out one with probability "
        f"{row.probability:.2f} (upper bound {upper:.2f} at n = {row.n} and {row.reference} held-out images); the upper "
        f"bound must be below {bound:.2f}"
    )
    needed = None
    if upper >= bound > row.probability:
        reach = quantile(groups, again) * row.se
        needed = f"copying is undecided in {row.space} features; {_more(row.n, groups, reach, bound - row.probability)}"
    return _Finding(Check(name=f"copying ({row.space})", passed=upper < bound, text=text), needed)


def quantile(groups: int, alpha: float) -> float:
    """Return the upper quantile of Student's t, because groups may be few; infinite for a single group, which shows nothing."""
    return float(stats.t.ppf(1 - alpha, groups - 1)) if groups > 1 else math.inf


def _below(row: Comparison, bound: float, what: str, alpha: float, again: float) -> _Finding:
    """Test whether a difference lies below a bound, in one space.

    If that is undecided, say how much data the next attempt, at level `again`, needs.
    """
    upper = row.delta + quantile(row.groups, alpha) * row.se
    text = (
        f"{what}, {row.space} features, {_of(row)}: difference {row.delta:+.4f} (upper bound {upper:+.4f} at n = {row.n} and {row.groups} "
        f"held-out groups); the upper bound must be below {bound:.4f}"
    )
    needed = None
    if upper >= bound > row.delta:
        needed = f"{what} is undecided at n = {row.n} and {row.groups} held-out groups; "
        needed += _more(row.n, row.groups, quantile(row.groups, again) * row.se, bound - row.delta, _by_drawing(row))
    return _Finding(Check(name=f"{what} ({row.space}, {row.aspect})", passed=upper < bound, text=text), needed)


def _more(n: int, groups: int, reach: float, room: float, by_drawing: bool | None = None) -> str:
    """Say how many images and groups would reduce `reach`, from estimate to upper bound, to `room`, from estimate to limit.

    Args:
        n: generated images now.
        groups: held-out groups now.
        reach: see above.
        room: see above.
        by_drawing: whether more generated images alone would do; None: that was not measured.
    """
    times = (reach / room) ** 2 if groups > 1 else 8.0
    images, needed = math.ceil(n * times), math.ceil(groups * times)
    if by_drawing:
        return f"about {images} generated images are needed next time (gate.images)"
    return f"about {images} images in {needed} held-out groups are needed next time" + (
        "; more generated images alone would not be enough" if by_drawing is False else ""
    )


def _by_drawing(row: Comparison) -> bool | None:
    """Check whether most of an interval's width comes of the drawing, not of the held-out groups; None: that was not measured."""
    if row.drawn_se is None or row.groups < 2:
        return None
    return row.drawn_se**2 > row.se**2 / 2
