"""Which size of an update is taken: the fixed sequence, the search for a level, the share of the gain, and the sentences."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import canonical_sha256
from model.data import Dataset
from model.kept import LEAST_GROUPS, Losses, kept, losses
from model.network import Network
from model.scorecard import Kept
from model.train import Checkpoint
from registry.budget import in_short, passes, with_update
from registry.curve import (
    COARSER,
    HELD,
    LEAST,
    NEAR,
    SMALL,
    TRIES,
    Point,
    Setting,
    Update,
    early,
    held_to,
    hold,
    in_order,
    level_for,
    rooms,
    smallest_budget,
)
from registry.selection import Decision
from tests.test_selection import card, judged

KEEP = 0.98


# The sequence


@given(st.lists(st.booleans(), max_size=12))
def test_no_size_is_taken_or_looked_at_after_a_failure(outcomes: list[bool]):
    asked: list[int] = []

    def passing(size: int) -> bool:
        asked.append(size)
        return outcomes[size]

    passed = in_order(range(len(outcomes)), passing)
    assert passed == [*range(len(passed))]
    assert all(outcomes[size] for size in passed)
    assert asked == [*range(min(len(passed) + 1, len(outcomes)))]


@given(st.integers(LEAST, 1 << 24), st.integers(LEAST, 1 << 24))
def test_sizes_fall_from_the_finest_update_and_one_is_the_budget(room: int, finest: int):
    sizes = rooms(room, finest)
    assert all(a > b for a, b in pairwise(sizes))
    assert sizes[0] == finest
    assert (room in sizes) == (room <= finest)
    assert sizes[-1] >= LEAST
    assert sizes[-1] < 1.5 * LEAST or len(sizes) == 1
    assert all(a < 2.01 * b for a, b in pairwise(sizes) if b >= room)


@given(st.integers(0, 1 << 20))
def test_smallest_budget_leaves_room_for_weights(fixed: int):
    smallest = smallest_budget(fixed)
    assert smallest % 1024 == 0
    assert LEAST <= smallest - fixed < LEAST + 1024


def proving(values: np.ndarray, groups: np.ndarray) -> Losses:
    return Losses(values, groups, np.zeros(len(values), dtype=np.bool_))


def wrong(taken: np.ndarray, bad: int) -> float:
    """Return how often a size from `bad` on was taken; -1 means that none was."""
    return float(np.mean(taken >= bad))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [6, 25])
def test_size_that_keeps_too_little_is_taken_no_more_often_than_promised(groups: int):
    """Simulate whole sequences: paired losses of sizes, the second half of which keep exactly the limit, which is too little."""
    rng, alpha, runs, bad = np.random.default_rng(3), 0.1, 1500, 3
    truth = [0.999, 0.995, 0.99, KEEP, KEEP, KEEP]
    taken, greedy = np.full(runs, -1), np.full(runs, -1)
    for run in range(runs):
        numbers = np.arange(groups).repeat(4)
        gain = rng.gamma(2.0, 0.02, len(numbers))
        noise = rng.normal(0, 0.002, (len(truth), len(numbers)))
        found = [
            kept(*(proving(1 - g, numbers) for g in (0 * gain, gain, share * gain + own)), alpha)
            for share, own in zip(truth, noise, strict=True)
        ]
        passed = in_order(range(len(truth)), lambda i, found=found: passes(found[i], KEEP))
        taken[run] = passed[-1] if passed else -1
        greedy[run] = max((i for i in range(len(truth)) if passes(found[i], KEEP)), default=-1)
    allowed = alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert wrong(taken, bad) <= allowed
    assert wrong(greedy, bad) > allowed  # so the simulation can fail: to take the smallest of all that pass is wrong more often
    assert wrong(taken, 1) > 0.3  # and sizes that may be taken are


# The level of a size


@given(
    st.floats(0.4, 2.5), st.floats(1e3, 1e6), st.lists(st.floats(0.05, 20.0), min_size=1, max_size=4), st.integers(0, 5),
)  # fmt: skip
def test_level_makes_the_largest_update_within_the_limit(power: float, scale: float, shares: list[float], seed: int):
    known: dict[float, int] = {}
    asked: list[float] = []

    def size(level: float) -> int:
        asked.append(level)
        return int(scale * (level / 0.05) ** -power) + 200 + seed

    low, high = 0.001, 2.0
    for share in sorted(shares, reverse=True):
        limit, before = int(scale * share), len(asked)
        level = level_for(size, limit, low, high, known)
        assert len(asked) - before <= TRIES + 2
        if level is None:
            assert size(high) > limit
            asked.pop()
            continue
        assert known[level] <= limit
        if level > low * 1.02 and limit > 2000:
            assert known[level] >= (1 - NEAR) * limit or size(level / 1.02) > limit
    assert len(asked) >= len(known)


def test_update_of_a_known_level_is_not_encoded_again():
    known = {0.001: 10**6, 0.1: 960, 2.0: 10}
    assert level_for(lambda level: pytest.fail(f"encoded again at {level}"), 1000, 0.001, 2.0, known) == 0.1


# The level without a budget


@given(st.floats(0.4, 2.5), st.floats(1e3, 1e6), st.integers(300, 10**6), st.floats(0.002, 0.5), st.sampled_from([0.0, 0.02]))
def test_update_without_a_budget_is_held_to_the_bytes_of_the_first_and_is_never_finer_than_usual(
    power: float, scale: float, first: int, usual: float, spare: float
):
    def size(level: float) -> int:
        return int(scale * (level / 0.05) ** -power) + 200

    coarsest, known = 1.0, dict[float, int]()
    level, limit = hold(size, usual, coarsest, [first], known, spare)
    high = min(coarsest, COARSER * usual)
    assert limit == max(LEAST, int(HELD * (first if SMALL * first >= size(usual) else size(usual))))
    assert usual <= level <= high
    assert set(known) <= {usual} or len(known) <= TRIES + 3
    if size(usual) <= limit:
        assert level == usual
    elif size(high) > (1 - spare) * limit:
        assert level == high
    else:
        assert size(level) <= (1 - spare) * limit
        assert size(level) >= (1 - spare) * (1 - NEAR) * limit - 1 or size(level / 1.02) > (1 - spare) * limit
    assert hold(lambda level: pytest.fail(f"encoded at {level}"), usual, coarsest, [], {}) == (usual, None)  # the first one


def size_at(level: float) -> int:
    return int(30_000 * (0.03 / level) ** 0.7) + 200


@pytest.mark.parametrize("spare", [0.0, 0.02])
def test_update_that_fits_at_the_usual_level_has_it_although_it_leaves_nothing_spare(spare: float):
    first = math.ceil(size_at(0.03) / HELD)
    assert hold(size_at, 0.03, 4.0, [first], {}, spare)[0] == 0.03
    assert hold(size_at, 0.03, 4.0, [first - 1], {}, spare)[0] > 0.03


def test_bytes_do_not_creep_up_over_twelve_releases():
    """Let each release need a tenth more bytes at the same level than the one before it, as error feedback makes them."""
    sizes, usual = list[int](), list[int]()
    for release in range(12):

        def size(level: float, release: int = release) -> int:
            return int(30_000 * 1.1**release * (0.03 / level))

        level, _ = hold(size, 0.03, 4.0, usual, {})
        usual.append(size(0.03))
        sizes.append(size(level))
    assert usual[-1] > 2 * sizes[0]  # so they would creep up
    assert max(sizes[-3:]) <= 1.2 * sizes[0]
    assert min(sizes) >= sizes[0]


@pytest.mark.parametrize("tiny", [0, 1, 2])
def test_tiny_delivery_among_the_first_does_not_hold_a_line_for_good(tiny: int):
    usual = list[int]()
    for release in range(8):
        of = 0.03 if release == tiny else 1.0
        level, _ = hold(lambda level, of=of: int(of * size_at(level)), 0.03, 4.0, usual, {})
        usual.append(int(of * size_at(0.03)))
        assert level == 0.03


def test_level_rises_to_a_few_times_the_usual_one_at_most():
    """Let the first three deliveries be tiny: the bytes of the next ones cannot be held."""
    level, limit = hold(size_at, 0.03, 4.0, [200, 220, 250], {})
    assert (level, limit) == (COARSER * 0.03, LEAST)
    assert size_at(level) > 10 * LEAST


def made(size: int, noise: float = 0.03, method: str = "lowrank", **changed: Any) -> Update:
    setting = Setting(**{"network": "a" * 64, "precision": "bfloat16", "form": 2, "level": 0.03} | changed)
    return update(size, None, budget=None).model_copy(update={"method": method, "noise": noise, "setting": setting})


def test_first_updates_of_the_same_settings_are_the_measure_at_the_usual_level():
    of = made(1).setting
    assert of
    with_budget = update(50_000, None)
    others = [
        made(1, method="grid"),
        made(2, 0.03, level=0.02),
        made(3, precision="int8"),
        made(4, form=1),
        made(5, network="b" * 64),
    ]
    held = made(70_000, 0.04).model_copy(update={"usual": 60_000})
    assert early([with_budget, *others, made(60_000), held, made(62_000), made(80_000)], "lowrank", of) == [
        44_000,
        60_000,
        46_000,
    ]
    assert early([with_budget, *others], "lowrank", of) == []
    assert held_to([], 50_000) is None


def test_update_that_is_held_says_so_in_its_line_and_in_the_decision():
    held = made(60_000, 0.041).model_copy(update={"held": 51_750})
    said = "; rounded at level 0.041 instead of 0.03, to hold its weights to 51,750 bytes, 1.15 times those of the first such update of usual size"
    assert in_short(held).endswith(said)
    assert with_update(decision(), held).reason == decision().reason + said
    assert "rounded at" not in in_short(made(60_000))
    assert "rounded at" not in in_short(made(60_000).model_copy(update={"held": 51_750}))


@pytest.mark.parametrize("level", [0.03, 0.12])
def test_update_that_cannot_be_held_says_so(level: float):
    large = made(60_000, 0.12, level=level).model_copy(update={"held": 1024})
    said = "; its weights take 44,000 bytes at level 0.12, the coarsest that is tried without a budget, so they cannot be held to 1,024 bytes"
    assert said in in_short(large)
    assert said in with_update(decision(), large).reason


def test_update_of_before_keeps_its_hash():
    """Compare with what the code before the settings made, which versions of then have signed."""
    old = update(60_000, share(0.981))
    assert canonical_sha256(old.model_dump(mode="json")) == "ca9d07fce4f18900ecd197f8f0cdb263b0bab35f10defb9e2fbaa9e2cc26917c"


# The decision


def share(low: float | None, value: float | None = 0.99) -> Kept:
    high = None if low is None else 2 * (value or 0.0) - low
    return Kept(share=None if low is None else value, low=low, high=high, gain=0.05, items=250, groups=20, alpha=0.05)


def update(size: int, found: Kept | None, *points: tuple[int, Kept | None, str], budget: int | None = 65536) -> Update:
    points = points or ((size, found, "passed"),)
    curve = [Point(limit=n, bytes=n, noise=0.04 if n == size else 0.1, kept=k, outcome=o) for n, k, o in points]  # type: ignore[arg-type]
    return Update(
        method="lowrank", start="master", master="f" * 64, noise=0.04, bytes=size, fixed=16000, budget=budget,
        keep=KEEP if budget else None, kept=found, curve=curve,
    )  # fmt: skip


def decision() -> Decision:
    return judged(card())


def test_update_within_the_budget_that_keeps_enough_is_promoted():
    made = with_update(decision(), update(60000, share(0.981)))
    assert made.outcome == "promote"
    assert made.update_bytes == 60000
    assert "keeps 99.0% (98.1% to 99.9%, 250 held-out images) of the gain" in made.reason
    assert "60,000 bytes of the 65,536 in the budget" in made.reason


@pytest.mark.parametrize("low", [0.9799, None])
def test_budget_that_nothing_fits_is_refused_and_the_smallest_size_that_would_is_named(low: float | None):
    found = share(low, 0.985)
    points = [
        (240000, share(0.99), "passed"),
        (120000, share(0.985), "passed"),
        (60000, found, "failed"),
        (30000, None, "not tested"),
    ]
    made = with_update(decision(), update(60000, found, *points))
    assert (made.outcome, made.becomes_anchor) == ("refuse", False)
    assert "no update within the budget of 65,536 bytes is shown to keep 98% of the gain" in made.reason
    assert "the smallest size that does is 120,000 bytes, so raise update_budget to 118 KiB" in made.reason


def test_size_that_is_measured_out_of_turn_is_not_taken_however_much_it_keeps():
    made = with_update(decision(), update(60000, share(0.99), (240000, share(0.97), "failed"), (60000, None, "not tested")))
    assert (made.outcome, made.becomes_anchor) == ("refuse", False)


def test_where_no_size_of_the_curve_keeps_enough_a_larger_one_is_asked_for():
    found = share(0.9)
    made = with_update(decision(), update(60000, found, (240000, found, "failed"), (60000, None, "not tested")))
    assert "a size above 240,000 bytes may, so raise update_budget, or lower update_keep" in made.reason


def test_update_is_told_in_one_line():
    assert in_short(update(60000, share(0.981))) == (
        "its update: 60,000 bytes of 65,536, keeps 99.0% (98.1% to 99.9%, 250 held-out images) of the gain; by lowrank, trained from the "
        "champion's master"
    )


def test_update_larger_than_its_budget_is_refused_however_good():
    assert with_update(decision(), update(65537, share(0.999))).outcome == "refuse"


def student(size: int) -> Update:
    return update(size, None).model_copy(update={"keep": None, "curve": [], "beside": 30_000})


def test_student_within_the_budget_needs_no_share_of_a_gain():
    held = student(60_000)
    made = with_update(decision(), held)
    assert made.outcome == "promote"
    assert made.reason.endswith("; a device fetches 60,000 bytes of the 65,536 in the budget")
    assert in_short(held) == (
        "its update: 60,000 bytes of 65,536, 14,000 of them this student's; by lowrank, trained from the champion's master"
    )


@pytest.mark.parametrize(("start", "said"), [("master", "the master of full"), ("fielded", "the fielded weights of full")])
def test_first_student_says_that_it_was_trained_from_full(start: str, said: str):
    first = student(60_000).model_copy(update={"start": start, "of_full": True})
    assert in_short(first).endswith(f"; by lowrank, trained from {said}")


def test_student_that_does_not_fit_is_refused_with_its_parts_and_the_budget_that_would_do():
    made = with_update(decision(), student(70_000))
    assert made.outcome == "refuse"
    assert made.reason.startswith(
        "a device fetches 70,000 bytes, and the budget has 65,536: 16,000 are no weights, 30,000 are weights of others, and this student takes "
        "24,000 at level 0.04, and no coarser one is tried; raise update_budget to 69 KiB; "
    )


def test_budget_does_not_overrule_the_gate():
    bad = judged(card(bad=0.5))
    assert with_update(bad, update(60000, share(0.999))).outcome == "refuse"
    assert with_update(bad, update(60000, share(0.999))).reason == bad.reason


def test_without_a_budget_the_gate_alone_decides():
    made = with_update(decision(), update(60000, share(0.5, 0.6), budget=None))
    assert (made.outcome, made.reason, made.checks) == (decision().outcome, decision().reason, decision().checks)
    assert made.update is not None
    assert made.update.kept == share(0.5, 0.6)


# The share of the gain


def grouped(values: np.ndarray, groups: int = 10) -> Losses:
    return proving(values, np.arange(len(values)) % groups)


def test_share_of_what_keeps_everything_is_one_and_of_half_is_half():
    rng = np.random.default_rng(1)
    before = rng.gamma(4.0, 0.1, 200)
    gain = rng.gamma(2.0, 0.02, 200)
    full, half = grouped(before - gain), grouped(before - 0.5 * gain + rng.normal(0, 0.002, 200))
    same, less = kept(grouped(before), full, full, 0.05), kept(grouped(before), full, half, 0.05)
    assert (same.share, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))
    assert less.low is not None
    assert less.high is not None
    assert less.low < 0.5 < less.high
    assert less.high - less.low < 0.05
    assert (less.items, less.groups) == (200, 10)


def test_no_share_is_given_where_the_retraining_shows_no_gain():
    rng = np.random.default_rng(2)
    before = rng.gamma(4.0, 0.1, 200)
    found = kept(grouped(before), grouped(before + rng.normal(0.01, 0.1, 200)), grouped(before), 0.05)
    assert (found.share, found.low, found.high) == (None, None, None)
    assert not passes(found, 0.01)


def test_few_groups_show_nothing():
    before, gain = np.full(60, 1.0), np.random.default_rng(3).gamma(2.0, 0.02, 60)
    few = [proving(v, np.arange(60) % (LEAST_GROUPS - 1)) for v in (before, before - gain, before - gain)]
    assert kept(*few, 0.05).share is None
    nothing = proving(np.empty(0), np.empty(0, np.intp))  # all groups were used to choose
    assert kept(nothing, nothing, nothing, 0.05).share is None


def test_models_are_compared_on_the_same_noises_and_times(
    checkpoint: Checkpoint, changed: Callable[[str, float], Checkpoint], dataset: Dataset
):
    torch.manual_seed(0)
    untrained, near = Network(checkpoint.lineage.config).eval(), changed("near", 0.02).network()
    first, again, other = (
        (losses(checkpoint.network(), dataset) for _ in range(2)),
        losses(near, dataset),
        losses(untrained, dataset),
    )
    once, twice = first
    assert np.array_equal(once.values, twice.values)
    assert np.array_equal(once.groups, other.groups)
    assert len(once.values) == len(dataset.reference())
    assert once.values.mean() < 0.7 * other.values.mean()
    apart, together = once.values.std(), (once.values - again.values).std()
    assert together < 0.3 * apart  # what the images have in common cancels
    half = once.proving
    assert 0 < len(half.values) < len(once.values)
    assert not {*half.groups} & {*once.groups[once.choosing]}  # what is chosen with is not what is proved with
    assert once.chooses == pytest.approx(once.values[once.choosing].mean())
