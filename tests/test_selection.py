"""The gate decides by intervals, not by point values, and says how much data would settle a doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from model.scorecard import Comparison, Cost, Memorisation, Quality, Sampler, Scorecard, Usage
from registry.errors import PromotionError
from registry.selection import Budgets, Decision, Limits, choose, decide, level, reasoned

CHAMPION, CHALLENGER, ANCHOR = "a" * 64, "b" * 64, "9" * 64
LIMITS = Limits(minimum_images=50)


def card(
    new: tuple[float, float] = (-0.1, 0.01),
    old: tuple[float, float] = (0.0, 0.005),
    *,
    n: int = 100,
    reference: int = 100,
    groups: int = 10_000,
    coverage: float = 0.8,
    bad: float = 0.0,
    dead: int = 0,
    milliseconds: float = 10,
    against: str = CHAMPION,
) -> Scorecard:
    """A challenger with (difference, standard error) to the champion on new and old data; noise lies at 0.5."""
    quality = [
        Quality(
            space=space, space_sha256="f" * 64, split=split, n=n, reference=reference, groups=groups, fd=1, fd_se=0.1, kd=0.02,
            kd_se=0.01, noise_kd=0.5, precision=0.8, recall=0.7, density=0.9, coverage=coverage,
        )
        for split in ("new", "old")
        for space in ("trained", "random")
    ]  # fmt: skip
    comparisons = [
        Comparison(
            against="champion",
            against_sha256=against,
            space=space,
            split=split,
            n=n,
            groups=groups,
            delta=delta,
            se=se,
            champion_kd=0.1,
        )
        for split, (delta, se) in (("new", new), ("old", old))
        for space in ("trained", "random")
    ]
    return Scorecard(
        line="shapes", tier="test", configuration="I", variant="full", weights_sha256=CHALLENGER, lineage_sha256="c" * 64,
        sampler=Sampler(), precision="bfloat16", seed=0, quality=quality, comparisons=comparisons, memorisation=[],
        captions=[], bad_images=bad, usage=Usage(load=[[0.25] * 4], by_step=[[[0.25] * 4]], entropy=[1], dead=dead),
        cost=Cost(milliseconds=milliseconds, evaluations=28, peak_mib=60, bare_mib=40, machine="x"),
    )  # fmt: skip


BUDGETS = Budgets(latency_ms=100)


def judged(made: Scorecard, champion: str | None = CHAMPION, together: int = 1) -> Decision:
    return decide(made, LIMITS, BUDGETS, champion, level=level(LIMITS.alpha, together, None))


def test_better_on_new_and_not_worse_on_old_is_promoted():
    assert judged(card()).outcome == "promote"


def test_first_version_needs_only_the_floors():
    assert judged(card(new=(9, 1), old=(9, 1)), champion=None).outcome == "promote"


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (card(new=(0.1, 0.01)), "superiority on the new data"),
        (card(old=(0.2, 0.01)), "non-inferiority on the old data"),
        (card(coverage=0.1), "coverage is 0.10"),
        (card(bad=0.2), "20.0% of the images are constant or not finite"),
        (card(dead=3), "3 experts carry next to nothing"),
        (card(milliseconds=101), "the budget is 100 ms"),
        (card(against="d" * 64), "was not compared with the present champion"),
    ],
)
def test_refusal_names_what_failed(made: Scorecard, says: str):
    decision = judged(made)
    assert decision.outcome == "refuse"
    assert says in decision.reason


@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_floors_hold_with_and_without_a_champion(champion: str | None):
    assert judged(card(bad=0.5), champion).outcome == "refuse"


def test_better_point_value_with_wide_interval_is_not_promoted():
    decision = judged(card(new=(-0.01, 0.04)))
    assert decision.outcome == "more data"
    # 100 * (1.645 * 0.04 / 0.01)²; generating more alone would not do, so the groups are named too
    assert "is undecided at n = 100 and 10000 held-out groups, about 4330 and 432968 are needed" in decision.reason


def test_few_groups_of_held_out_images_ask_for_more_evidence():
    close = (-0.0185, 0.01)
    assert judged(card(new=close)).outcome == "promote"
    assert judged(card(new=close, groups=6)).outcome == "promote if reasoned"  # Student's t with 5 degrees of freedom is 2.02


def test_one_group_decides_nothing_against_a_champion():
    assert judged(card(groups=1)).outcome == "more data"


@pytest.mark.parametrize(
    ("n", "reference", "says"),
    [
        (20, 100, "20 generated images are too few to decide on, 50 are needed; raise gate.images"),
        (100, 20, "20 held-out images are too few to decide on, 50 are needed; 15 % are held out, so about 334 images in all"),
    ],
)
def test_too_few_images_decide_nothing(n: int, reference: int, says: str):
    decision = judged(card(n=n, reference=reference))
    assert decision.outcome == "more data"
    assert says in decision.reason


def test_hopeless_and_undecided_together_is_a_refusal():
    assert judged(card(new=(-0.01, 0.03), old=(0.2, 0.01))).outcome == "refuse"


def test_many_variants_decided_together_need_more_evidence():
    close = card(new=(-0.0185, 0.01))
    assert judged(close, together=1).outcome == "promote"
    assert judged(close, together=3).outcome == "promote if reasoned"


def student(delta: float, se: float) -> Scorecard:
    """A challenger that passes everything else, with this difference to `full` drawn at as many evaluations."""
    beside = [
        row.model_copy(update={"against": "solver", "against_sha256": "e" * 64, "delta": delta, "se": se})
        for row in card().comparisons
        if row.split == "new"
    ]
    fields = {"variant": "dev", "comparisons": [*card().comparisons, *beside], "solver": Sampler(steps=14)}
    return card().model_copy(update=fields)


def test_student_that_does_not_beat_the_solver_is_refused():
    assert judged(student(-0.1, 0.01)).outcome == "promote"
    decision = judged(student(0.01, 0.01))
    assert decision.outcome == "refuse"
    assert "superiority over full in 14 steps of a second-order solver, trained features: difference +0.0100" in decision.reason
    assert judged(student(-0.01, 0.02)).outcome == "more data"


def test_student_need_not_beat_the_solver_where_that_is_not_asked():
    lenient = LIMITS.model_copy(update={"beat_solver": False})
    assert decide(student(0.01, 0.01), lenient, BUDGETS, CHAMPION).outcome == "promote"


def test_student_that_was_not_compared_with_the_solver_is_refused():
    decision = judged(card().model_copy(update={"variant": "fast"}))
    assert decision.outcome == "refuse"
    assert decision.reason == "it was not compared with full, drawn by a solver (n = 100)"


def test_solver_is_not_taken_for_the_champion():
    only = [row for row in student(-0.1, 0.01).comparisons if row.against == "solver"]
    decision = judged(student(-0.1, 0.01).model_copy(update={"comparisons": only}), champion="e" * 64)
    assert decision.outcome == "refuse"
    assert "it was not compared with the present champion" in decision.reason


def test_margin_on_old_data_is_a_share_of_noise():
    assert judged(card(old=(0.04, 0.005))).outcome == "promote"  # upper bound 0.048 of 0.05
    assert judged(card(old=(0.045, 0.005))).outcome == "more data"


def test_decision_keeps_every_number_that_made_it():
    decision = judged(card())
    assert decision.scorecard == card().sha256
    assert (decision.champion, decision.challenger, decision.n, decision.limits) == (CHAMPION, CHALLENGER, 100, LIMITS)
    assert any("upper bound -0.0835 at n = 100 and 10000 held-out groups" in check.text for check in decision.checks)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def anchored(new: tuple[float, float], old: tuple[float, float], made: Scorecard | None = None) -> Decision:
    """A challenger that passes against the champion, with these differences to the best model ever."""
    made = made or card()
    beside = [
        row.model_copy(update={"against": "anchor", "against_sha256": ANCHOR, "delta": delta, "se": se})
        for split, (delta, se) in (("new", new), ("old", old))
        for row in made.comparisons
        if row.split == split
    ]
    made = made.model_copy(update={"comparisons": [*made.comparisons, *beside]})
    return decide(made, LIMITS, BUDGETS, CHAMPION, anchor=ANCHOR)


@pytest.mark.parametrize("worse", [{"new": (0.15, 0.005), "old": (0.0, 0.005)}, {"new": (0.0, 0.005), "old": (0.15, 0.005)}])
def test_decay_in_all_has_a_budget_that_single_steps_do_not_show(worse: dict[str, tuple[float, float]]):
    decision = anchored(**worse)  # the budget is 0.2 of noise's 0.5
    assert decision.outcome == "refuse"
    split = "new" if worse["new"][0] else "old"
    assert f"total decay against the anchor on the {split} data, trained features: difference +0.1500" in decision.reason
    assert "must be below 0.1000" in decision.reason
    assert anchored((0.09, 0.005), (0.09, 0.005)).outcome == "promote"


def test_undecided_decay_says_how_much_data_would_settle_it():
    decision = anchored((0.09, 0.01), (0.0, 0.005))
    assert decision.outcome == "more data"
    assert "total decay against the anchor on the new data is undecided at n = 100 and 10000 held-out groups" in decision.reason
    assert "about 271 and 27061 are needed" in decision.reason  # 100 * (1.645 * 0.01 / 0.01)²


def test_missing_comparison_with_the_anchor_is_a_refusal():
    decision = decide(card(), LIMITS, BUDGETS, CHAMPION, anchor=ANCHOR)
    assert decision.outcome == "refuse"
    assert "it was not compared with the anchor" in decision.reason


@pytest.mark.parametrize(
    ("new", "old", "moves"),
    [
        ((-0.1, 0.01), (-0.1, 0.01), True),
        ((-0.1, 0.01), (0.0, 0.005), False),  # better on the new data, only not worse on the old: the old must not slip away
        ((0.0, 0.005), (-0.1, 0.01), False),
        ((-0.01, 0.02), (-0.1, 0.01), False),  # perhaps better
    ],
)
def test_anchor_moves_only_to_what_is_better_everywhere(new: tuple[float, float], old: tuple[float, float], moves: bool):
    decision = anchored(new, old)
    assert (decision.outcome, decision.becomes_anchor, decision.anchor) == ("promote", moves, ANCHOR)


def test_refused_challenger_is_no_anchor_however_good():
    assert not anchored((-0.1, 0.01), (-0.1, 0.01), card(coverage=0.1)).becomes_anchor


def test_first_version_becomes_the_anchor():
    assert judged(card(), champion=None).becomes_anchor
    assert not judged(card(bad=0.5), champion=None).becomes_anchor


def test_champion_that_is_the_anchor_is_not_compared_twice():
    decision = decide(card(), LIMITS, BUDGETS, CHAMPION, anchor=CHAMPION)
    assert (decision.outcome, decision.becomes_anchor) == ("promote", False)
    assert decide(card(old=(-0.1, 0.01)), LIMITS, BUDGETS, CHAMPION, anchor=CHAMPION).becomes_anchor
    tight = LIMITS.model_copy(update={"decay": 0.05})  # tighter than the margin: then the champion's rows have to hold it
    assert decide(card(old=(0.04, 0.005)), tight, BUDGETS, CHAMPION, anchor=CHAMPION).outcome == "refuse"


def copying(probability: float, se: float, **of: Any) -> Scorecard:
    row = Memorisation(
        space="trained", n=100, reference=100, training=500, probability=probability, se=se, z=0, p=0.5, nearer_than_any=0
    )
    return card(**of).model_copy(update={"memorisation": [row]})


@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_model_that_copies_is_refused(champion: str | None):
    assert judged(copying(0.6, 0.05), champion).outcome == "promote"
    decision = judged(copying(0.95, 0.02), champion)
    assert decision.outcome == "refuse"
    assert "copying, trained features: a generated image is nearer to a training image than a held-out one" in decision.reason
    assert judged(copying(1.0, 0.0), champion).outcome == "refuse"


def test_copying_is_decided_by_its_bound():
    close = copying(0.7, 0.055)
    assert judged(close).outcome == "promote"  # 0.7 + 1.645 * 0.055 = 0.79
    decision = judged(close, together=3)  # 0.7 + 2.128 * 0.055 = 0.82
    assert decision.outcome == "more data"
    assert "copying is undecided in trained features, about 138 and 13703 are needed" in decision.reason
    assert judged(copying(0.7, 0.055, groups=6)).outcome == "more data"


def test_memory_beyond_the_budget_is_refused():
    for budget, outcome in ((None, "promote"), (20.0, "promote"), (19.0, "refuse")):  # peak 60, bare 40
        decision = decide(card(), LIMITS, Budgets(latency_ms=100, memory_mib=budget), CHAMPION)
        assert decision.outcome == outcome
    assert "the model takes 20 MiB of memory, the budget is 19 MiB" in decision.reason


def test_equal_model_is_promoted_for_another_reason_only():
    decision = judged(card(new=(0.0, 0.005)))
    assert decision.outcome == "promote if reasoned"
    assert "superiority on the new data" in decision.reason
    promoted = reasoned(decision, "the format of its weights is the one that devices will need")
    assert (promoted.outcome, promoted.other_reason) == ("promote", "the format of its weights is the one that devices will need")
    assert promoted.reason.startswith("not for its quality, but: the format of its weights")
    assert promoted.checks == decision.checks
    with pytest.raises(PromotionError, match="needs its reason"):
        reasoned(decision, " ")


@pytest.mark.parametrize(
    "made", [card(new=(0.1, 0.01)), card(new=(0.0, 0.005), old=(0.2, 0.01)), card(new=(0.0, 0.005), milliseconds=101)]
)
def test_no_reason_promotes_what_does_harm(made: Scorecard):
    decision = judged(made)
    assert decision.outcome == "refuse"
    with pytest.raises(PromotionError, match="only what is not worse anywhere"):
        reasoned(decision, "security")


def test_levels_are_handed_on_by_what_passes_only():
    passed, refused = judged(card()), judged(card(bad=0.5))
    assert level(0.06, 3, None) == pytest.approx(0.02)
    assert level(0.06, 3, passed.model_copy(update={"level": 0.02})) == pytest.approx(0.04)
    assert level(0.06, 3, refused.model_copy(update={"level": 0.02})) == pytest.approx(0.02)
    reason = judged(card(new=(0.0, 0.005)))  # its superiority was not shown, so it has used what it could take
    assert level(0.06, 3, reason.model_copy(update={"level": 0.02})) == pytest.approx(0.02)


def candidate(name: str, size: int | None, made: Scorecard | None = None) -> Decision:
    return judged(made or card()).model_copy(update={"challenger": name * 64, "update_bytes": size})


def between(delta: float, se: float) -> list[Comparison]:
    return [row.model_copy(update={"delta": delta, "se": se}) for row in card().comparisons if row.split == "new"]


def test_update_size_breaks_ties_only():
    small, large = candidate("1", 10), candidate("2", 1000)
    tie, better = {("2" * 64, "1" * 64): between(-0.01, 0.01)}, {("2" * 64, "1" * 64): between(-0.05, 0.01)}
    for offered in ([small, large], [large, small]):
        assert choose(offered, tie) == small
        assert choose(offered, better) == large
    reverse = {("1" * 64, "2" * 64): between(0.05, 0.01)}
    assert choose([small, large], reverse) == large


def test_smallest_update_does_not_win_unless_it_passed():
    refused, champion = candidate("1", 10, card(bad=0.5)), candidate("a", 0)
    large = candidate("2", 1000)
    assert champion.challenger == champion.champion  # unchanged
    tied = {(large.challenger, other.challenger): between(0.0, 0.01) for other in (refused, champion)}
    assert choose([refused, champion, large], tied) == large
    assert choose([refused, champion], {}) is None


def test_models_that_were_not_compared_are_not_tied():
    first, second = candidate("1", 1000), candidate("2", 10)
    assert choose([first, second], {}) == first  # no evidence that the second is as good
    assert choose([candidate("1", None), second], {("1" * 64, "2" * 64): between(0.0, 0.01)}) == second


# Places that differ: what the gate looks at is looked at in each of them

SPACES, SPLITS = ("trained", "random"), ("new", "old")
PLACES = [(space, split) for split in SPLITS for space in SPACES]


def only(rows: Sequence[Any], space: str, split: str | None, **fields: Any) -> list[Any]:
    """Rows of which one place's has other values."""
    return [
        row.model_copy(update=fields) if row.space == space and split in (None, getattr(row, "split", None)) else row
        for row in rows
    ]


@pytest.mark.parametrize(("space", "split"), PLACES)
def test_worse_in_one_place_is_not_better(space: str, split: str):
    made = card()
    rows = only(made.comparisons, space, split, delta=0.2, se=0.005)
    decision = judged(made.model_copy(update={"comparisons": rows}))
    assert decision.outcome == "refuse"
    assert decision.reason.count("features") == 1
    assert f"on the {split} data, {space} features" in decision.reason


@pytest.mark.parametrize(("space", "split"), PLACES)
def test_noise_is_that_of_the_same_place(space: str, split: str):
    """The margin is a share of noise's distance: where that is small, little may be lost, and nowhere else."""
    made = card(new=(0.03, 0.005), old=(0.03, 0.005))
    near = made.model_copy(update={"quality": only(made.quality, space, split, noise_kd=0.1)})
    assert judged(made).outcome == "promote if reasoned"
    failed = [check.name for check in judged(near).checks if not check.passed and "non-inferiority" in check.name]
    assert failed == [f"non-inferiority on the {split} data ({space})"]


@pytest.mark.parametrize("split", SPLITS)
def test_comparison_on_one_split_only_is_none(split: str):
    made = card()
    rows = [row for row in made.comparisons if row.split == split]
    decision = judged(made.model_copy(update={"comparisons": rows}))
    assert decision.outcome == "refuse"
    assert "it was not compared with the present champion" in decision.reason


@pytest.mark.parametrize("space", SPACES)
def test_coverage_counts_where_it_is_least_on_the_new_data(space: str):
    made = card()
    low = made.model_copy(update={"quality": only(made.quality, space, "new", coverage=0.2)})
    assert "coverage is 0.20, the floor is 0.30" in judged(low).reason
    old = made.model_copy(update={"quality": only(made.quality, space, "old", coverage=0.2)})
    assert judged(old).outcome == "promote"


@pytest.mark.parametrize("space", SPACES)
def test_copying_in_one_space_is_refused(space: str):
    (row,) = copying(0.5, 0.01).memorisation
    rows = [row.model_copy(update={"space": each}) for each in SPACES]
    made = card().model_copy(update={"memorisation": rows})
    assert judged(made).outcome == "promote"
    copies = made.model_copy(update={"memorisation": only(rows, space, None, probability=0.95)})
    assert f"copying, {space} features" in judged(copies).reason
    assert judged(copies).outcome == "refuse"
