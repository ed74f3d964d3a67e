"""`python -m tests.bench.gate`: measure how often the gate is wrong at its default sample size; write results/gate.md.

The models are made up, and their images are points. In each of two feature spaces, held-out points are standard normal, and those
of a model are shifted. So every true difference is known in closed form. The code that decides is the real one:
`model.evaluate.compare` and `registry.selection.decide`. Challenger and champion share noise, as models that draw from the same
seeds do.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from scipy import optimize, stats

from model.data import Dataset
from model.distances import WIDTHS, Features, Sample, difference
from model.evaluate import Drawn, compare
from model.features import FeatureSpaces
from model.scorecard import Comparison
from registry.selection import Budgets, Decision, Limits, decide, level
from tests.test_selection import CHAMPION, card

SPACES = ("trained", "random")
D = 16  # dimensions of a space
N = 256  # gate.images
SCALE = math.sqrt(2 * D)  # about the median distance of two held-out points
LIMITS = Limits()
SHARED = 0.9  # correlation of what two models draw from one seed
FAR = 10.0  # shift of pure noise
CLOSE = 1.0  # shift of a champion
RUNS = 2000
RESULTS = Path("tests/bench/results")


# The made-up world


def distance(shift: float) -> float:
    """Compute the true squared kernel distance of a model from the data."""
    total = 0.0
    for width in (w * SCALE for w in WIDTHS):
        spread = width**2 + 2
        total += 2 * (width**2 / spread) ** (D / 2) * -math.expm1(-(shift**2) / (2 * spread))
    return total / len(WIDTHS)


NOISE = distance(FAR)
MARGIN = 0.1 * NOISE


def shift_of(wanted: float) -> float:
    """Find the shift of a model that lies at the distance `wanted`."""
    return float(optimize.brentq(lambda shift: distance(shift) - wanted, 0, FAR))


@dataclass(frozen=True)
class Held:
    """Held-out points of both spaces, with the parts of `Dataset` and `FeatureSpaces` that a comparison uses."""

    images: Features  # [N, 2 D]
    groups: Any  # [N]
    captions: tuple[str, ...] = ("",) * N
    names: tuple[str, ...] = SPACES
    sha256: str = "f" * 64

    def reference(self) -> Any:
        """Return the indices of all held-out points."""
        return np.arange(len(self.images))

    def reference_groups(self) -> Any:
        """Return the group of each held-out point."""
        return self.groups

    def __call__(self, space: str, images: Features) -> Features:
        """Return the half of the coordinates that belongs to a space."""
        return images[:, :D] if space == SPACES[0] else images[:, D:]

    def scale(self, space: str) -> float:  # noqa: ARG002 - both are alike
        """Return the scale of the kernels in a space."""
        return SCALE


@dataclass(frozen=True)
class Groups:
    """How held-out images are grouped."""

    name: str
    count: int
    alike: float  # share of variance that a group has in common


GROUPS = (
    Groups("each its own", N, 0.0),
    Groups("64 groups of 4, 30 % in common", 64, 0.3),
    Groups("20 photographs cut up, 80 % in common", 20, 0.8),
)


def hold_out(rng: np.random.Generator, groups: Groups) -> Held:
    """Draw a held-out set."""
    of = np.sort(np.arange(N) % groups.count)
    common, own = rng.normal(size=(groups.count, 2 * D))[of], rng.normal(size=(N, 2 * D))
    return Held(math.sqrt(groups.alike) * common + math.sqrt(1 - groups.alike) * own, of)


def draw(rng: np.random.Generator, seeds: Features, shift: tuple[float, float], shared: float = SHARED) -> Drawn:
    """Draw what a model makes from noise seeds, shifted in each space."""
    points = math.sqrt(shared) * seeds + math.sqrt(1 - shared) * rng.normal(size=seeds.shape)
    points[:, 0] += shift[0]
    points[:, D] += shift[1]
    return Drawn(points, np.zeros((1, 1, 1), np.float32), 0.0)  # type: ignore[arg-type]


def compared(
    held: Held, challenger: Drawn, other: Drawn, against: Literal["champion", "anchor"] = "champion", sha256: str = CHAMPION
) -> list[Comparison]:
    """Compare two models on both splits, which are the same here because the data did not change."""
    rows = compare(cast("FeatureSpaces", held), cast("Dataset", held), challenger, other, "old", sha256, against)
    return [row.model_copy(update={"split": split}) for row in rows for split in ("old", "new")]


def deciding(
    held: Held,
    challenger: Drawn,
    other: Drawn,
    against: Literal["champion", "anchor"] = "champion",
    sha256: str = CHAMPION,
    spaces: tuple[str, ...] = SPACES[:1],
) -> list[Comparison]:
    """Compare by images alone, in the named spaces; the other space sees no difference, so it decides nothing."""
    rows = []
    for space in SPACES:
        x, c, h = (held(space, cast("Features", images)) for images in (held.images, challenger.images, other.images))
        value, se, count = 0.0, 1e-9, len(np.unique(held.groups))
        if space in spaces:
            found, _ = difference(*(Sample(points, held.captions, held.groups) for points in (x, c, h)), SCALE, "images")
            value, se, count = found.value, found.se, found.groups
        row = Comparison(
            against=against,
            against_sha256=sha256,
            space=space,
            split="old",
            n=N,
            groups=count,
            delta=value,
            se=se,
            champion_kd=0.0,
        )
        rows += [row.model_copy(update={"split": split}) for split in ("old", "new")]
    return rows


def decided(rows: list[Comparison], allowed: float = LIMITS.alpha, anchor: str | None = None) -> Decision:
    """Ask the gate to decide on these comparisons, with all floors met."""
    alone = {"n": N, "reference": N, "noise_kd": NOISE, "band": None, "captions_band": None}
    quality = [q.model_copy(update=alone) for q in card().quality]
    # The loss that may be tolerated is fixed here, so that it is known which models are truly worse by a margin.
    fixed = [row.model_copy(update={"champion_kd": MARGIN / LIMITS.tolerance}) for row in rows]
    made = card().model_copy(update={"comparisons": fixed, "quality": quality})
    return decide(made, LIMITS, Budgets(latency_ms=1000), CHAMPION, anchor=anchor, level=allowed)


# What is simulated


@dataclass
class Single:
    """Counts over many runs of one challenger against one champion."""

    covered: int = 0
    intervals: int = 0
    promoted: int = 0
    harmless: int = 0
    """Promoted, or could be promoted for another reason than quality."""
    runs: int = 0


def single(
    rng: np.random.Generator, groups: Groups, worse: float, runs: int, shared: float = SHARED, both: bool = False
) -> Single:
    """Judge challengers worse by so many margins, by both spaces or the first alone; count 95 % intervals that hold the truth."""
    found, shift = Single(runs=runs), shift_of(distance(CLOSE) + worse * MARGIN)
    quantile = stats.t.ppf(0.975, groups.count - 1)
    for _ in range(runs):
        held, seeds = hold_out(rng, groups), rng.normal(size=(N, 2 * D))
        champion = draw(rng, seeds, (CLOSE, CLOSE), shared)
        rows = (compared if both else deciding)(held, draw(rng, seeds, (shift, shift), shared), champion)
        for row in [row for row in rows if (row.split, row.aspect) == ("old", "images")] if both else rows[:1]:
            found.covered += int(abs(row.delta - worse * MARGIN) <= quantile * row.se)
            found.intervals += 1
        outcome = decided(rows).outcome
        found.promoted += outcome == "promote"
        found.harmless += outcome in ("promote", "promote if reasoned")
    return found


def family(rng: np.random.Generator, better: tuple[bool, ...], runs: int, hand_on: bool = True) -> tuple[int, float]:
    """Count the retraining runs that promote a challenger wrongly, and measure the share of better challengers promoted.

    A challenger that is wrong to promote equals the champion in both spaces. That is the hardest case, because a gain in either
    space would make it better. A better one gains in the first space only. All challengers share held-out images and seeds. What
    is drawn for a student depends on whether its teacher passed.
    """
    wrong, right, base = 0, 0, distance(CLOSE)
    gain = shift_of(base - 0.06 * MARGIN)
    for _ in range(runs):
        held, seeds = hold_out(rng, GROUPS[1]), rng.normal(size=(N, 2 * D))
        last: Decision | None = None
        mistaken = False
        for good in better:
            champion = draw(rng, seeds, (CLOSE, CLOSE))
            attempts = [draw(rng, seeds, (gain if good else CLOSE, CLOSE)) for _ in range(2)]
            challenger = attempts[last is not None and last.outcome == "promote"]
            rows = deciding(held, challenger, champion, spaces=SPACES)
            last = decided(rows, level(LIMITS.alpha, len(better), last if hand_on else None))
            mistaken |= last.outcome == "promote" and not good
            right += last.outcome == "promote" and good
        wrong += mistaken
    return wrong, right / max(1, runs * sum(better))


def slide(rng: np.random.Generator, groups: Groups, step: float, steps: int, anchored: bool = True) -> float:
    """Measure how far, in budgets, the champion falls behind the best model ever if each challenger is worse by `step` margins.

    Each challenger starts from the champion. If one is refused, the next is equally bad. None is better, so each is promoted for
    another reason than quality. Held-out images and seeds stay the same, as they do in practice.
    """
    held, seeds = hold_out(rng, groups), rng.normal(size=(N, 2 * D))
    base = distance(CLOSE)
    best = champion = draw(rng, seeds, (CLOSE, CLOSE))
    behind = 0.0
    for _ in range(steps):
        after = behind + step * MARGIN
        shift = shift_of(min(base + after, 0.99 * NOISE))
        challenger = draw(rng, seeds, (shift, CLOSE))
        rows = deciding(held, challenger, champion)
        if anchored:
            rows += deciding(held, challenger, best, "anchor", "9" * 64)
        if decided(rows, anchor="9" * 64 if anchored else None).outcome in ("promote", "promote if reasoned"):
            champion, behind = challenger, after
    return behind / (LIMITS.total_tolerance * MARGIN)


def rate(hits: int, runs: int) -> str:
    """Format a share in percent with its exact 95 % bounds (Clopper and Pearson)."""
    found = stats.binomtest(hits, runs).proportion_ci(method="exact")
    return f"{100 * hits / runs:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


SINGLE = (  # groups, margins worse, correlation by shared seeds, in both spaces
    (GROUPS[0], 0.0, SHARED, True),
    (GROUPS[0], 1.0, SHARED, False),
    (GROUPS[1], 0.0, SHARED, False),
    (GROUPS[1], 1.0, SHARED, False),
    (GROUPS[2], 0.0, SHARED, False),
    (GROUPS[2], 1.0, SHARED, False),
    *((groups, 1.5, SHARED, False) for groups in GROUPS),
)
FAMILIES = (("======", True, 0.8), ("B==B==", True, 0.5), ("BBBBB=", True, 0.2), ("BBBBB=", False, 0.2))
SLIDES = (  # groups, margins a step, steps, with the anchor, share of the runs
    (GROUPS[0], 0.9, 20, False, 0.02),
    (GROUPS[0], 0.9, 20, True, 0.12),
    (GROUPS[0], 0.1, 40, True, 0.04),
)


def singles(runs: int) -> list[str]:
    """Simulate one challenger at a time and format the first table."""
    said = (
        f"{runs} runs a row, in one space but for the first row. Held: 95 % intervals that hold the truth. No harm: the gate would promote it, for its "
        "quality or for another reason; of an equal model this must be 90 % at least; of one worse by the margin the bounds must reach "
        f"{100 * LIMITS.alpha:.0f} % or less, and of one worse by 1.5 margins both must lie there."
    )
    lines = [said, "", "held-out images | worse by, in margins | seeds | held % | no harm %", "---|---|---|---|---"]
    rng = np.random.default_rng(2026)
    for groups, worse, shared, both in SINGLE:
        s = single(rng, groups, worse, runs, shared, both)
        cells = (
            groups.name, f"{worse:.1f}" + ", both spaces" * both, "shared" if shared else "not shared",
            rate(s.covered, s.intervals), rate(s.harmless, runs),
        )  # fmt: skip
        lines.append(" | ".join(cells))
        print(lines[-1], flush=True)
    return lines


def families(runs: int) -> list[str]:
    """Simulate runs of six models and format the second table."""
    said = (
        f"Wrong: runs in which a model is promoted that is not better; must be {100 * LIMITS.alpha:.0f} % at most. Right: share of better ones that is "
        "promoted. B is better by 0.06 margins, = is equal, in the order of two ladders full, dev, fast."
    )
    lines = [said, "", "models | procedure | runs | wrong % | right %", "---|---|---|---|---"]
    for pattern, hand_on, share in FAMILIES:
        some = math.ceil(runs * share)
        wrong, right = family(np.random.default_rng(7), tuple(c == "B" for c in pattern), some, hand_on)
        shown = f"{100 * right:.1f}" if "B" in pattern else "–"
        lines.append(f"{pattern} | {'shares handed on' if hand_on else 'Bonferroni'} | {some} | {rate(wrong, some)} | {shown}")
        print(lines[-1], flush=True)
    return lines


def slides(runs: int) -> list[str]:
    """Simulate series of small losses and format the third table."""
    said = (
        "Series of retrainings, worse in one of the two spaces. Beyond: series that end further behind the best model ever than the budget; must "
        "be 5 % at most."
    )
    lines = [said, "", "steps | gate | series | beyond % | mean end, in budgets | worst end", "---|---|---|---|---|---"]
    rng = np.random.default_rng(11)
    for groups, step, steps, anchored, share in SLIDES:
        ends = [slide(rng, groups, step, steps, anchored) for _ in range(math.ceil(runs * share))]
        gate, over = "with anchor" if anchored else "champion alone", sum(end > 1 + 1e-9 for end in ends)
        lines.append(
            f"{steps} of {step} margins | {gate} | {len(ends)} | {rate(over, len(ends))} | {np.mean(ends):.2f} | {max(ends):.2f}"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Simulate all three tables at once, and write them."""
    began, runs = time.monotonic(), int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    with ProcessPoolExecutor(3) as pool:
        one, many, down = (pool.submit(part, runs) for part in (singles, families, slides))
        parts = {
            "One challenger": one.result(),
            "Six models in one run": many.result(),
            "Many small steps downhill": down.result(),
        }
    said = (
        f"`python -m tests.bench.gate`, commit {commit or 'unknown'}, {time.monotonic() - began:.0f} s on a shared machine; seeded. Points in {D} "
        f"dimensions stand for features: n = {N} generated and as many held-out, alpha {LIMITS.alpha}, margin 0.1 of noise's distance, and "
        f"{LIMITS.total_tolerance} margins in all against the anchor. Noise lies at {NOISE:.3f}, the champion at {distance(CLOSE):.4f}, the margin is {MARGIN:.4f}. In "
        "brackets 95 % bounds for so many runs."
    )
    lines = ["# How often the gate is wrong", "", said, ""]
    for title, table in parts.items():
        lines += [f"## {title}", "", *table, ""]
    (RESULTS / "gate.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
