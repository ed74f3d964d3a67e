"""The gate's error rates, simulated with the code that decides (see tests/bench/gate.py), or proved by counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from model.distances import Sample
from model.distances import distance as measured
from registry.selection import level
from tests.bench.gate import FAR, GROUPS, SCALE, D, distance, family, single, slide
from tests.test_selection import card, judged


def at_most(share: float, hits: int, runs: int) -> bool:
    """Check that so many hits are no evidence (at 1 in 1000) of more than this share."""
    return bool(stats.binomtest(hits, runs, share, alternative="greater").pvalue > 1e-3)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5, FAR])
def test_true_distances_of_the_simulation_are_true(shift: float):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(900, D)), rng.normal(size=(900, D))
    y[:, 0] += shift
    found = measured(*(Sample(points, [""] * 900, np.arange(900)) for points in (x, y)), SCALE, "images")
    assert found.value == pytest.approx(distance(shift), rel=0.03, abs=0.002)


@pytest.mark.parametrize("groups", GROUPS[1:])
def test_equal_model_does_no_harm_and_worse_one_does(groups):
    rng, runs = np.random.default_rng(2), 20
    equal, worse = single(rng, groups, 0.0, runs), single(rng, groups, 1.0, runs)
    assert equal.harmless >= 0.9 * runs
    assert at_most(0.05, worse.harmless, runs)
    for found in (equal, worse):
        assert at_most(0.05, found.intervals - found.covered, runs)


def test_shares_of_a_run_never_add_up_to_more_than_alpha():
    """Sum the levels of the wrong challengers up to the first that passes: at most alpha.

    That holds whichever of six challengers are wrong and whichever pass. It bounds the chance of any wrong promotion, because
    each wrong challenger passes with a chance of at most its level.
    """
    alpha, most = 0.05, 0.0
    outcome = {passes: judged(card() if passes else card(bad=0.5)) for passes in (True, False)}
    for passed in itertools.product((True, False), repeat=6):
        levels, last = [], None
        for passes in passed:
            levels.append(level(alpha, 6, last))
            last = outcome[passes].model_copy(update={"level": levels[-1]})
        assert min(levels) >= alpha / 6 - 1e-12  # never less than with Bonferroni
        for wrong in itertools.product((True, False), repeat=6):
            first = next((i for i in range(6) if wrong[i] and passed[i]), 5)
            most = max(most, sum(levels[i] for i in range(first + 1) if wrong[i]))
    assert most == pytest.approx(alpha)  # and nothing is left over


def test_anchor_ends_a_slide_that_the_champion_alone_does_not_see():
    rng = np.random.default_rng(3)
    assert slide(rng, GROUPS[0], 0.5, 6, anchored=False) > 1.2  # budgets
    assert 0.4 < slide(rng, GROUPS[0], 0.5, 6) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("worse", [0.0, 1.0])
def test_error_rates_of_one_decision(groups, worse: float):
    runs = 500
    found = single(np.random.default_rng(4), groups, worse, runs, both=True)
    bounds = stats.binomtest(found.covered, found.intervals).proportion_ci()
    assert bounds.low <= 0.97
    assert bounds.high >= 0.93
    assert 0.92 <= found.covered / found.intervals <= 0.98
    if worse:
        assert at_most(0.05, found.harmless, runs)
    else:
        assert found.harmless >= 0.9 * runs


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["======", "B==B==", "BBBBB="])
def test_error_rate_of_a_run_of_six(pattern: str):
    runs = 300
    wrong, _ = family(np.random.default_rng(5), tuple(c == "B" for c in pattern), runs)
    assert at_most(0.05, wrong, runs)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "steps"), [(0.9, 20), (0.1, 40)])
def test_small_steps_do_not_add_up_beyond_the_budget(step: float, steps: int):
    runs = 60
    ends = [slide(np.random.default_rng(seed), GROUPS[0], step, steps) for seed in range(runs)]
    assert sum(end > 1 + 1e-9 for end in ends) <= 0.05 * runs
