"""The gate decides by intervals, not by point values, and says how much data would settle a doubt."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from model.scorecard import (
    FOLLOW,
    HASHES,
    CaptionCheck,
    Comparison,
    Converged,
    Cost,
    Following,
    Memorisation,
    Plausibility,
    Quality,
    Sampler,
    Scorecard,
    Usage,
)
from registry.errors import PromotionError
from registry.selection import Budgets, Decision, Limits, _overlap, decide, level, reasoned, spent

CHAMPION, CHALLENGER, ANCHOR = "a" * 64, "b" * 64, "9" * 64
LIMITS = Limits(minimum_images=50)
SPACES, SPLITS = ("trained", "random", "scattering"), ("new", "old")
ASPECTS: tuple[Literal["images", "captions"], ...] = ("images", "captions")


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
    """Make the scorecard of a challenger with (difference, standard error) to the champion on new and old data.

    The margin is half of the champion's 0.1.
    """
    quality = [
        Quality(
            space=space, space_sha256="f" * 64, split=split, n=n, reference=reference, groups=groups, fd=1, fd_se=0.1, kd=0.02,
            kd_se=0.01, noise_kd=0.5, precision=0.8, recall=0.7, density=0.9, coverage=coverage, band=0.02, captions_band=0.02,
        )
        for split in SPLITS
        for space in SPACES
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
            aspect=aspect,
        )
        for split, (delta, se) in (("new", new), ("old", old))
        for space in SPACES
        for aspect in ASPECTS
    ]
    return Scorecard(
        line="shapes", tier="test", configuration="I", variant="full", weights_sha256=CHALLENGER, lineage_sha256="c" * 64,
        sampler=Sampler(steps=14), precision="bfloat16", seed=0, quality=quality, comparisons=comparisons, memorisation=[],
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
        (card(dead=3), "3 experts carry almost no load"),
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
    # 100 * (2.394 * 0.04 / 0.01)²; more generated images alone would not suffice, so the groups are named too
    assert (
        "is undecided at n = 100 and 10000 held-out groups; about 9173 images in 917292 held-out groups are needed next time"
        in decision.reason
    )


def test_few_groups_of_held_out_images_ask_for_more_evidence():
    close = (-0.025, 0.01)  # six tests, each at a sixth of alpha: 2.39 standard errors
    assert judged(card(new=close)).outcome == "promote"
    assert judged(card(new=close, groups=6)).outcome == "promote if reasoned"  # Student's t with 5 degrees of freedom is 3.53


def test_one_group_decides_nothing_against_a_champion():
    assert judged(card(groups=1)).outcome == "more data"


@pytest.mark.parametrize(
    ("n", "reference", "says"),
    [
        (20, 100, "20 generated images are too few to decide on; 50 are needed, so raise gate.images"),
        (
            100,
            20,
            "20 held-out images are too few to decide on; 50 are needed, and 15 % of all images are held out, so add images until there are about 334 in all",
        ),
    ],
)
def test_too_few_images_decide_nothing(n: int, reference: int, says: str):
    decision = judged(card(n=n, reference=reference))
    assert decision.outcome == "more data"
    assert says in decision.reason


def test_images_that_are_missing_are_counted_by_the_share_that_is_held_out():
    row = Memorisation(space="trained", n=100, reference=84, training=616, probability=0.5, z=0, p=0.5, nearer_than_any=0)
    made = card(reference=84).model_copy(update={"memorisation": [row]})
    limits = LIMITS.model_copy(update={"minimum_images": 96})
    said = decide(made, limits, BUDGETS, CHAMPION).reason
    assert "84 held-out images are too few to decide on; 96 are needed, and 12 % of your 700 images are held out" in said
    assert "add images until there are about 800 in all" in said
    of_before = [q.model_copy(update={"reference": 60}) if q.split == "old" else q for q in made.quality]
    said = decide(made.model_copy(update={"quality": of_before}), limits, BUDGETS, CHAMPION).reason
    assert "60 held-out images are too few to decide on; 96 are needed, and 15 % of all images are held out" in said


def test_hopeless_and_undecided_together_is_a_refusal():
    assert judged(card(new=(-0.01, 0.03), old=(0.2, 0.01))).outcome == "refuse"


def test_many_variants_decided_together_need_more_evidence():
    close = card(new=(-0.025, 0.01))
    assert judged(close, together=1).outcome == "promote"
    assert judged(close, together=3).outcome == "promote if reasoned"


def student(delta: float, se: float, full: float = -0.01) -> Scorecard:
    """Make a student that passes everything else, so much nearer to the converged images than `full` in as many evaluations."""
    beside = [
        row.model_copy(update={"against": "full", "against_sha256": "e" * 64, "delta": full, "se": 0.005})
        for row in card().comparisons
        if row.split == "new"
    ]
    near = Converged(n=32, evaluations=80, distance=0.05, distance_se=0.005, solver=0.05 - delta, delta=delta, se=se)
    fields = {
        "variant": "turbo", "comparisons": [*card().comparisons, *beside], "converged": near,
        "sampler": Sampler(method="mean", steps=4, guidance=1.0),
    }  # fmt: skip
    return card().model_copy(update=fields)


def test_student_that_is_no_nearer_than_the_solver_is_refused():
    decision = judged(student(-0.07, 0.01))
    assert decision.outcome == "promote"
    assert decision.reason == "as good as full within the margin, in 4 evaluations of the network (n = 100)"
    decision = judged(student(0.01, 0.01))
    assert decision.outcome == "refuse"
    assert (
        "distance from the converged images: 0.050 in 4 evaluations, full in as many 0.040, difference +0.010" in decision.reason
    )
    assert judged(student(-0.01, 0.02)).outcome == "more data"


def test_student_need_not_be_nearer_than_the_solver_where_that_is_not_asked():
    lenient = LIMITS.model_copy(update={"beat_solver": False})
    assert decide(student(0.01, 0.01), lenient, BUDGETS, CHAMPION).outcome == "promote"


def test_student_that_was_not_compared_with_the_solver_is_refused():
    decision = judged(student(-0.07, 0.01).model_copy(update={"converged": None}))
    assert decision.outcome == "refuse"
    assert decision.reason == "this student was not compared with full in as many evaluations (n = 100)"


def table_variant(full: float = 0.0, new: tuple[float, float] = (0.0, 0.005)) -> Scorecard:
    """Make a variant with the weights of `full`, this much further from the data than `full`."""
    made = student(-0.07, 0.01, full)
    fields = {"variant": "fast", "sampler": Sampler(steps=7), "converged": None}
    rows = [*card(new=new).comparisons, *(row for row in made.comparisons if row.against == "full")]
    return made.model_copy(update=fields | {"comparisons": rows})


def test_variant_that_is_worse_than_its_full_is_refused():
    assert judged(table_variant()).outcome == "promote"
    decision = judged(table_variant(full=0.2))
    assert decision.outcome == "refuse"
    assert "non-inferiority to full, trained features, images alone: difference +0.2000" in decision.reason
    assert judged(table_variant(full=0.045)).outcome == "more data"


def test_variant_need_not_be_better_than_its_champion_but_not_worse():
    assert judged(table_variant(new=(0.0, 0.005))).outcome == "promote"  # its full was shown to be better
    assert judged(card(new=(0.0, 0.005))).outcome != "promote"  # full itself must be
    decision = judged(table_variant(new=(0.3, 0.01)))
    assert decision.outcome == "refuse"
    assert "non-inferiority on the new data" in decision.reason


def test_variant_that_was_not_compared_with_its_full_is_refused():
    decision = judged(card().model_copy(update={"variant": "fast"}))
    assert decision.outcome == "refuse"
    assert decision.reason == "this version was not compared with full (n = 100)"


def test_full_is_not_taken_for_the_champion():
    only = [row for row in student(-0.1, 0.01).comparisons if row.against == "full"]
    decision = judged(student(-0.1, 0.01).model_copy(update={"comparisons": only}), champion="e" * 64)
    assert decision.outcome == "refuse"
    assert "this version was not compared with the present champion" in decision.reason


def test_margin_is_a_share_of_the_champions_distance_or_of_what_real_images_lie_apart():
    assert judged(card(old=(0.04, 0.005))).outcome == "promote"  # upper bound 0.048 of 0.05
    assert judged(card(old=(0.045, 0.005))).outcome == "more data"
    made = card(old=(0.045, 0.005))
    apart = [row.model_copy(update={"band": 0.04, "captions_band": 0.04}) for row in made.quality]  # 1.5 times this is 0.06
    assert judged(made.model_copy(update={"quality": apart})).outcome == "promote"
    mixed = [row.model_copy(update={"band": 0.04}) for row in made.quality]  # for pairs with captions it is still 0.03
    assert judged(made.model_copy(update={"quality": mixed})).outcome == "more data"
    best = [row.model_copy(update={"champion_kd": -0.01}) for row in card(old=(0.02, 0.005)).comparisons]
    assert (
        judged(made.model_copy(update={"comparisons": best})).outcome == "promote"
    )  # a champion that cannot be told from real images


def test_decision_keeps_every_number_that_made_it():
    decision = judged(card())
    assert decision.scorecard == card().sha256
    assert (decision.champion, decision.challenger, decision.n, decision.limits) == (CHAMPION, CHALLENGER, 100, LIMITS)
    assert any("upper bound -0.0835 at n = 100 and 10000 held-out groups" in check.text for check in decision.checks)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def anchored(new: tuple[float, float], old: tuple[float, float], made: Scorecard | None = None) -> Decision:
    """Judge a challenger that passes against the champion, with these differences to the best model ever."""
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
    decision = anchored(**worse)  # the budget is two margins of 0.05
    assert decision.outcome == "refuse"
    split = "new" if worse["new"][0] else "old"
    assert (
        f"total loss against the anchor on the {split} data, trained features, images alone: difference +0.1500"
        in decision.reason
    )
    assert "must be below 0.1000" in decision.reason
    assert anchored((0.09, 0.005), (0.09, 0.005)).outcome == "promote"


def test_undecided_decay_says_how_much_data_would_settle_it():
    decision = anchored((0.09, 0.01), (0.0, 0.005))
    assert decision.outcome == "more data"
    assert "total loss against the anchor on the new data is undecided at n = 100 and 10000 held-out groups" in decision.reason
    assert "about 271 images in 27061 held-out groups are needed next time" in decision.reason  # 100 * (1.645 * 0.01 / 0.01)²


def test_missing_comparison_with_the_anchor_is_a_refusal():
    decision = decide(card(), LIMITS, BUDGETS, CHAMPION, anchor=ANCHOR)
    assert decision.outcome == "refuse"
    assert "this version was not compared with the anchor" in decision.reason


@pytest.mark.parametrize(
    ("new", "old", "moves"),
    [
        ((-0.1, 0.01), (-0.1, 0.01), True),
        ((-0.1, 0.01), (0.0, 0.005), False),  # better on the new data, but only not worse on the old, which must not decay
        ((0.0, 0.005), (-0.1, 0.01), False),
        ((-0.01, 0.02), (-0.1, 0.01), False),  # perhaps better
    ],
)
def test_anchor_moves_only_to_what_is_better_everywhere(new: tuple[float, float], old: tuple[float, float], moves: bool):
    decision = anchored(new, old)
    assert (decision.outcome, decision.becomes_anchor, decision.anchor) == ("promote", moves, ANCHOR)


def test_anchor_stays_where_one_place_is_only_not_worse():
    """Keep the anchor if the new model is better in all places but one.

    Otherwise the best model ever could lose in one feature space, step by step, what it gains in another.
    """
    made = card()
    for place in range(len(made.comparisons)):
        rows = [
            row.model_copy(update={"delta": 0.0 if i == place else -0.1, "se": 0.005}) for i, row in enumerate(made.comparisons)
        ]
        decision = decide(made.model_copy(update={"comparisons": rows}), LIMITS, BUDGETS, CHAMPION, anchor=CHAMPION)
        assert (decision.outcome, decision.becomes_anchor) == ("promote", False)


def test_refused_challenger_is_no_anchor_however_good():
    assert not anchored((-0.1, 0.01), (-0.1, 0.01), card(coverage=0.1)).becomes_anchor


def test_first_version_becomes_the_anchor():
    assert judged(card(), champion=None).becomes_anchor
    assert not judged(card(bad=0.5), champion=None).becomes_anchor


def test_champion_that_is_the_anchor_is_not_compared_twice():
    decision = decide(card(), LIMITS, BUDGETS, CHAMPION, anchor=CHAMPION)
    assert (decision.outcome, decision.becomes_anchor) == ("promote", False)
    assert decide(card(old=(-0.1, 0.01)), LIMITS, BUDGETS, CHAMPION, anchor=CHAMPION).becomes_anchor
    tight = LIMITS.model_copy(
        update={"total_tolerance": 0.5}
    )  # tighter than the margin: then the champion's rows have to meet it
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
    assert (
        "copying is undecided in trained features; about 138 images in 13703 held-out groups are needed next time"
        in decision.reason
    )
    assert judged(copying(0.7, 0.055, groups=6)).outcome == "more data"


def test_memory_beyond_the_budget_is_refused():
    for budget, outcome in ((None, "promote"), (20.0, "promote"), (19.0, "refuse")):  # peak 60, bare 40
        decision = decide(card(), LIMITS, Budgets(latency_ms=100, memory_mib=budget), CHAMPION)
        assert decision.outcome == outcome
    assert "the model takes 20 MiB of memory; the budget is 19 MiB" in decision.reason


def test_equal_model_is_promoted_for_another_reason_only():
    decision = judged(card(new=(0.0, 0.005)))
    assert decision.outcome == "promote if reasoned"
    assert "superiority on the new data" in decision.reason
    promoted = reasoned(decision, "the format of its weights is the one that devices will need")
    assert (promoted.outcome, promoted.other_reason) == ("promote", "the format of its weights is the one that devices will need")
    assert promoted.reason.startswith("promoted for a reason other than quality: the format of its weights")
    assert promoted.checks == decision.checks
    with pytest.raises(PromotionError, match="needs a reason"):
        reasoned(decision, " ")


@pytest.mark.parametrize(
    "made", [card(new=(0.1, 0.01)), card(new=(0.0, 0.005), old=(0.2, 0.01)), card(new=(0.0, 0.005), milliseconds=101)]
)
def test_no_reason_promotes_what_does_harm(made: Scorecard):
    decision = judged(made)
    assert decision.outcome == "refuse"
    with pytest.raises(PromotionError, match="only a version that is not worse anywhere"):
        reasoned(decision, "security")


def test_levels_are_handed_on_by_what_passes_only():
    passed, refused = judged(card()), judged(card(bad=0.5))
    assert level(0.06, 3, None) == pytest.approx(0.02)
    assert level(0.06, 3, passed.model_copy(update={"level": 0.02})) == pytest.approx(0.04)
    assert level(0.06, 3, refused.model_copy(update={"level": 0.02})) == pytest.approx(0.02)
    reason = judged(card(new=(0.0, 0.005)))  # its superiority was not shown, so it has used up its level
    assert level(0.06, 3, reason.model_copy(update={"level": 0.02})) == pytest.approx(0.02)


# One place (space, split, aspect) differs: the gate looks at each place by itself

PLACES = [(space, split, aspect) for split in SPLITS for space in SPACES for aspect in ASPECTS]


def only(rows: Sequence[Any], space: str, split: str | None, **fields: Any) -> list[Any]:
    """Change values in the rows of one place only."""
    return [
        row.model_copy(update=fields) if row.space == space and split in (None, getattr(row, "split", None)) else row
        for row in rows
    ]


@pytest.mark.parametrize(("space", "split", "aspect"), PLACES)
def test_worse_in_one_place_is_harm(space: str, split: str, aspect: str):
    made = card()
    rows = [
        row.model_copy(update={"delta": 0.2, "se": 0.005})
        if (row.space, row.split, row.aspect) == (space, split, aspect)
        else row
        for row in made.comparisons
    ]
    decision = judged(made.model_copy(update={"comparisons": rows}))
    assert decision.outcome == "refuse"
    assert decision.reason.count("features") == 1
    what = "images with their captions" if aspect == "captions" else "images alone"
    assert f"on the {split} data, {space} features, {what}: difference +0.2000" in decision.reason


@pytest.mark.parametrize(("space", "split", "aspect"), PLACES)
def test_band_of_real_images_is_that_of_the_same_place(space: str, split: str, aspect: str):
    """Allow a large loss only in the place where real images lie far apart."""
    made = card(new=(0.06, 0.005), old=(0.06, 0.005))
    wide = [
        row.model_copy(update={"captions_band" if aspect == "captions" else "band": 0.05})
        if (row.space, row.split) == (space, split)
        else row
        for row in made.quality
    ]
    checks = [c for c in judged(made.model_copy(update={"quality": wide})).checks if "non-inferiority" in c.name]
    assert [c.name for c in checks if c.passed] == [f"non-inferiority on the {split} data ({space}, {aspect})"]


@pytest.mark.parametrize(("space", "split", "aspect"), PLACES)
def test_margin_is_that_of_the_same_place(space: str, split: str, aspect: str):
    """Allow only a small loss where the champion is near to the data, and the usual loss elsewhere."""
    made = card(new=(0.03, 0.005), old=(0.03, 0.005))
    near = [
        row.model_copy(update={"champion_kd": 0.01}) if (row.space, row.split, row.aspect) == (space, split, aspect) else row
        for row in made.comparisons
    ]
    assert judged(made).outcome == "promote if reasoned"
    failed = [
        check.name for check in judged(made.model_copy(update={"comparisons": near})).checks
        if not check.passed and "non-inferiority" in check.name
    ]  # fmt: skip
    assert failed == [f"non-inferiority on the {split} data ({space}, {aspect})"]


@pytest.mark.parametrize("split", SPLITS)
def test_comparison_on_one_split_only_is_none(split: str):
    made = card()
    rows = [row for row in made.comparisons if row.split == split]
    decision = judged(made.model_copy(update={"comparisons": rows}))
    assert decision.outcome == "refuse"
    assert "this version was not compared with the present champion" in decision.reason


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


# Captions, copies, odd images: floors


def follows(share: float, se: float = 0.001, real: float = 0.03) -> Following:
    return Following(
        space="random",
        split="new",
        groups=30,
        real=real,
        real_se=0.003,
        share=share,
        excess=(share - FOLLOW) * real,
        excess_se=se,
    )


def asked(share: float | None, se: float = 0.01, **fields: Any) -> CaptionCheck:
    given: dict[str, Any] = {
        "caption": "brick, hole", "word": False, "n": 40, "reference": 12, "groups": 6, "apart": 0.2, "apart_se": 0.02, "share": share,
        "drawn": (share or 0) * 0.2, "drawn_se": se, "champion_share": 0.9,
    }  # fmt: skip
    return CaptionCheck(**given | fields)


@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_model_that_ignores_its_captions_is_not_promoted(champion: str | None):
    made = card().model_copy(update={"following": [follows(0.9)]})
    assert judged(made, champion).outcome == "promote"
    blind = judged(made.model_copy(update={"following": [follows(0.05)]}), champion)
    assert blind.outcome == ("refuse" if champion else "promote if reasoned")
    assert (
        "images match their captions on the new data, random features, 0.05 times as strongly as real images do" in blind.reason
    )
    unsure = judged(made.model_copy(update={"following": [follows(0.5, se=0.01)]}), CHAMPION)
    assert unsure.outcome == "more data"


def test_captions_are_not_asked_for_where_real_images_do_not_go_with_theirs():
    made = card().model_copy(update={"following": [follows(0.0, real=0.001)]})
    decision = judged(made)
    assert decision.outcome == "promote"
    assert any(
        "not tested, because real images cannot be shown to match their own captions" in check.text for check in decision.checks
    )


def test_captions_are_not_asked_for_where_the_settings_say_so():
    made = card().model_copy(update={"following": [follows(0.0)], "asked": [asked(0.0)]})
    assert decide(made, LIMITS.model_copy(update={"captions": False}), BUDGETS, CHAMPION).outcome == "promote"


def test_caption_that_is_dropped_is_refused():
    made = card().model_copy(update={"asked": [asked(0.9)]})
    assert judged(made).outcome == "promote"
    dropped = judged(made.model_copy(update={"asked": [asked(0.9), asked(0.1)]}))
    assert dropped.outcome == "refuse"
    assert (
        "caption 'brick, hole': the model draws 0.10 of what distinguishes its real images from others; this must exceed 0.33 and be "
        "shown to exceed 0 (12 "
        "held-out images in 6 groups)"
    ) in dropped.reason
    assert (
        judged(made.model_copy(update={"asked": [asked(0.3, champion_share=0.5)]})).outcome == "promote"
    )  # more than half of the champion's share
    assert judged(made.model_copy(update={"asked": [asked(0.3, champion_share=0.7)]})).outcome == "refuse"
    assert (
        judged(made.model_copy(update={"asked": [asked(0.35, champion_share=1.4)]})).outcome == "promote"
    )  # more than a third of what tells real images apart
    assert "word 'hole'" in judged(made.model_copy(update={"asked": [asked(0.1, word=True, caption="hole")]})).reason
    assert judged(made.model_copy(update={"asked": [asked(0.5, se=0.06)]})).outcome == "more data"


@pytest.mark.parametrize("few", [{"reference": 9}, {"groups": 3}, {"apart_se": 0.06}])
def test_rare_caption_that_seems_dropped_cannot_be_judged_and_needs_a_reason(few: dict[str, Any]):
    decision = judged(card().model_copy(update={"asked": [asked(0.1, **few)]}))
    assert decision.outcome == "promote if reasoned"
    assert "this cannot be judged" in decision.reason
    for share, se in ((0.9, 0.01), (0.5, 0.1)):
        assert judged(card().model_copy(update={"asked": [asked(share, se=se, **few)]})).outcome == "promote"


def test_rare_caption_without_a_champion_is_asked_about_where_it_is_shown_to_be_dropped():
    for share, se, outcome in ((0.9, 0.01, "promote"), (0.1, 0.1, "promote"), (0.1, 0.01, "promote if reasoned")):
        first = asked(share, se=se, reference=9, champion_share=None)
        assert judged(card().model_copy(update={"asked": [first]}), None).outcome == outcome


def test_rare_caption_that_cannot_be_told_apart_is_not_asked_about():
    vague = asked(0.1, reference=9, apart_se=0.11)  # of 0.2
    assert judged(card().model_copy(update={"asked": [vague]})).outcome == "promote"


@pytest.mark.parametrize("row", [asked(0.1, champion_share=0.15), asked(None)])
def test_caption_that_the_champion_does_not_draw_either_is_no_new_harm(row: CaptionCheck):
    assert judged(card().model_copy(update={"asked": [row]})).outcome == "promote"


def test_what_a_person_may_waive_does_not_turn_a_doubt_into_a_refusal():
    doubtful, rare = card(old=(0.03, 0.02)), asked(0.1, reference=9)
    assert judged(doubtful).outcome == "more data"
    assert judged(card().model_copy(update={"asked": [rare]})).outcome == "promote if reasoned"
    both = judged(doubtful.model_copy(update={"asked": [rare]}))
    assert both.outcome == "more data"
    assert "groups are needed" in both.reason or "are needed next time" in both.reason
    assert "this cannot be judged" in both.reason
    worse = judged(doubtful.model_copy(update={"asked": [asked(0.1)]}))  # a caption that can be judged, and is dropped
    assert worse.outcome == "refuse"
    assert "are needed next time" in worse.reason


def test_caption_that_is_not_told_apart_clearly_is_said_to_be_so():
    vague = asked(0.1, apart_se=0.06)
    assert (
        "which no feature space clearly distinguishes from others, this cannot be judged"
        in judged(card().model_copy(update={"asked": [vague]})).reason
    )


def test_first_version_that_drops_a_caption_needs_a_reason():
    first = asked(0.1, champion_share=None)
    decision = judged(card().model_copy(update={"asked": [first]}), None)
    assert decision.outcome == "promote if reasoned"
    assert "a first version may be promoted without this for a reason that is recorded" in decision.reason
    promoted = reasoned(decision, "a trial line")
    assert promoted.outcome == "promote"
    # There was no champion, so nothing is said of a margin; what was waived stands in the record.
    assert promoted.reason.startswith(
        "promoted for a reason other than quality: a trial line; first version; promoted although caption 'brick, hole': "
        "the model draws 0.10 of what distinguishes"
    )
    assert "margin" not in promoted.reason


def test_switched_off_floors_of_a_first_version_are_named():
    made = card().model_copy(update={"asked": [asked(1.0, champion_share=None)]})
    off = {"coverage": 0.0, "implausible": 1.0, "duplicates": 1.0, "copies": 1.0, "copying": 1.0, "captions": False}
    assert judged(made, None).reason == "first version, all floors are met (n = 100)"
    for name, value in off.items():
        found = decide(made, LIMITS.model_copy(update={name: value}), BUDGETS, None)
        assert found.reason == f"first version, all floors are met (switched off in ferry.toml: {name}) (n = 100)"


def test_captions_that_could_not_be_tested_are_said_to_be_so():
    plain = Plausibility(n=100, training=500, implausible=0, held_out=0.02, duplicates=0)
    made = card().model_copy(update={"plausibility": plain, "asked": []})
    says = "; whether it follows its captions could not be tested with these data"
    for champion in (None, CHAMPION):
        assert says in judged(made, champion).reason
        assert says not in judged(made.model_copy(update={"asked": [asked(1.0)]}), champion).reason
        few = asked(1.0, reference=9)
        assert says in judged(made.model_copy(update={"asked": [few]}), champion).reason
        follows = Following(
            space="trained", split="new", groups=100, real=0.1, real_se=0.01, share=0.9, excess=0.1, excess_se=0.01
        )
        assert says not in judged(made.model_copy(update={"following": [follows]}), champion).reason
        assert says not in decide(made, LIMITS.model_copy(update={"captions": False}), BUDGETS, champion).reason


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (
            {"implausible": 50},
            "50.0% of the images are unlike all real ones (upper bound 58.6% at n = 100); the upper bound must be below 30%",
        ),
        (
            {"implausible": 25},
            "25.0% of the images are unlike all real ones (upper bound 33.1% at n = 100); the upper bound must be below 30%",
        ),
        (
            {"duplicates": 40},
            "40.0% of the images are like another generated one (upper bound 48.7% at n = 100); the upper bound must be below 30%",
        ),
        ({"implausible": 100}, "100.0% of the images are unlike all real ones (upper bound 100.0% at n = 100)"),
    ],
)
def test_model_of_odd_images_is_refused(counts: dict[str, int], says: str):
    some = Plausibility(n=100, training=500, implausible=20, held_out=0.02, duplicates=10)
    made = card().model_copy(update={"plausibility": some})
    assert judged(made).outcome == "promote"
    odd = made.model_copy(update={"plausibility": some.model_copy(update=counts)})
    assert judged(odd).outcome == "refuse"
    assert says in judged(odd).reason
    assert judged(odd, None).outcome == "promote if reasoned"


@pytest.mark.parametrize(
    ("more", "se", "champion", "outcome"),
    [
        (0.0, 0.03, 0.1, "promote"),
        (0.04, 0.02, 0.1, "promote"),
        (0.04, 0.03, 0.1, "more data"),
        (0.085, 0.02, 0.1, "refuse"),
        (0.085, 0.02, 0.3, "promote"),  # the limit is half of the champion's share, if that is more
        (0.16, 0.02, 0.3, "refuse"),
        (-0.2, 0.02, 0.3, "promote"),
    ],
)
def test_images_unlike_all_real_ones_may_not_become_much_more_frequent(more: float, se: float, champion: float, outcome: str):
    some = Plausibility(
        n=100, training=500, implausible=5, held_out=0.02, duplicates=0, champion=champion, more=more, more_se=se, pairs=150
    )
    made = card().model_copy(update={"plausibility": some})
    decision = judged(made)
    assert decision.outcome == outcome
    if outcome == "more data":
        assert (
            f"about {math.ceil(100 * (stats.t.ppf(0.95, 149) * 0.03 / 0.04) ** 2)} images are needed (gate.images)"
            in decision.reason
        )
    for name in ("implausible", "implausible_more"):
        assert decide(made, LIMITS.model_copy(update={name: 1.0}), BUDGETS, CHAMPION).outcome == "promote"
    for pairs in (None, 0, 1):
        alone = made.model_copy(update={"plausibility": some.model_copy(update={"pairs": pairs})})
        assert judged(alone).outcome == "promote"
    assert judged(made, None).outcome == "promote"  # a first version is compared with nothing


def test_copies_are_counted_by_the_images_nearer_than_any_held_out_one():
    some = Plausibility(n=100, training=500, implausible=0, held_out=0.02, duplicates=0)
    made = copying(0.5, 0.01).model_copy(update={"plausibility": some})
    assert judged(made).outcome == "promote"
    rows = [row.model_copy(update={"nearer_than_any": 0.5}) for row in made.memorisation]
    decision = judged(made.model_copy(update={"memorisation": rows}))
    assert decision.outcome == "refuse"
    assert "50.0% of the images are nearer to training images than any held-out one, trained features," in decision.reason


# Worse, within the margin


def test_what_is_shown_to_be_worse_has_to_be_accepted_in_so_many_words():
    decision = judged(card(new=(0.03, 0.005)))
    assert decision.outcome == "promote if reasoned"
    assert decision.worse is not None
    assert decision.worse.startswith("worse on the new data in trained features, images alone, by at most 0.0382; worse on")
    assert decision.worse in decision.reason
    with pytest.raises(PromotionError, match=r"worse on the new data .* add --accept-worse"):
        reasoned(decision, "security")
    promoted = reasoned(decision, "security", accept_worse=True)
    assert promoted.reason.startswith(
        "promoted for a reason other than quality: security; accepted although it is worse on the new data"
    )
    assert judged(card(new=(0.005, 0.005))).worse is None  # its interval holds 0


# Repeated looks at one held-out set

GROUPS = [f"{i:016x}" for i in range(0, 4000, 100)]


def looked(scorecard: str, held_out: Sequence[str] = GROUPS, champion: str | None = CHAMPION) -> Decision:
    return judged(card()).model_copy(update={"scorecard": scorecard, "held_out": list(held_out), "champion": champion})


def test_attempts_on_one_set_never_take_more_than_alpha_together():
    before = [looked(f"{i}" * 64) for i in range(9)]
    shares = [spent(0.05, GROUPS, "f" * 64, before[:k]) for k in range(10)]
    assert shares == pytest.approx([0.05 * 6 / (np.pi * k) ** 2 for k in range(1, 11)])
    many = [before[0].model_copy(update={"scorecard": f"{i:064}"}) for i in range(200)]
    assert 0.049 < sum(spent(0.05, GROUPS, "f" * 64, many[:k]) for k in range(200)) < 0.05


def test_attempt_that_is_repeated_is_the_same_one():
    before = [looked("1" * 64), looked("2" * 64), looked("3" * 64)]
    assert spent(0.05, GROUPS, "2" * 64, before) == spent(0.05, GROUPS, "2" * 64, before[:1])
    assert spent(0.05, GROUPS, "f" * 64, [before[0], before[0]]) == spent(0.05, GROUPS, "f" * 64, before[:1])


def test_same_weights_measured_otherwise_are_another_attempt():
    before = [looked("1" * 64), looked("2" * 64)]
    assert before[0].challenger == before[1].challenger
    assert spent(0.05, GROUPS, "3" * 64, before) == pytest.approx(0.05 * 6 / (np.pi * 3) ** 2)


def test_set_that_shares_half_of_its_groups_inherits_attempts():
    fresh = [f"{i:016x}" for i in range(50, 4050, 100)]
    first = spent(0.05, GROUPS, "f" * 64, [])
    for shared, inherits in ((20, True), (19, False), (0, False)):
        mixed = sorted([*GROUPS[:shared], *fresh[: 40 - shared]])
        assert (spent(0.05, mixed, "f" * 64, [looked("1" * 64)]) < first) == inherits
    assert spent(0.05, [], "f" * 64, [looked("1" * 64, [])]) == first  # an older version kept no groups


def test_first_versions_take_no_chance():
    assert spent(0.05, GROUPS, "f" * 64, [looked("1" * 64, champion=None)]) == spent(0.05, GROUPS, "f" * 64, [])


def test_overlap_of_large_sets_is_told_from_their_smallest_hashes():
    rng = np.random.default_rng(3)
    names = [f"{value:016x}" for value in rng.integers(1 << 60, size=5000)]
    old, new = sorted(names[:3000])[:HASHES], sorted(names[1000:])[:HASHES]  # half of the new set's 4,000 groups are old
    found = [_overlap(sorted(names[start:])[:HASHES], old) for start in (1000, 2600)]
    assert found == pytest.approx([0.5, 400 / 2400], abs=0.08)
    assert _overlap(new, new) == 1


# Scorecards and decisions of an older version


def test_scorecard_of_an_older_ferry_keeps_its_hash():
    made = card(new=(-0.1, 0.01))
    rows = [row for row in made.comparisons if row.aspect == "images" and row.space != "scattering"]
    quality = [row.model_copy(update={"band": None, "captions_band": None}) for row in made.quality if row.space != "scattering"]
    old = made.model_copy(update={"comparisons": rows, "quality": quality})
    assert old.sha256 == "b61d94cbef111584eb357e7bfd20b5def7638f70cebf259a066a90bba1b45124"
    assert Scorecard.model_validate_json(old.model_dump_json()).sha256 == old.sha256


def test_decision_of_an_older_ferry_is_read():
    old = judged(card()).model_dump(mode="json")
    for name in ("worse", "held_out"):
        del old[name]
    old["limits"] = {
        "alpha": 0.05, "margin": 0.1, "decay": 0.2, "minimum_images": 96, "coverage": 0.3, "copying": 0.8, "bad_images": 0.01,
        "dead_experts": 2, "beat_solver": True,
    }  # fmt: skip
    assert Decision.model_validate(old).limits.margin == 0.1


def test_undecided_attempt_says_what_the_next_one_needs_which_may_take_less_of_alpha():
    made = card(new=(-0.01, 0.04))
    reasons = [decide(made, LIMITS, BUDGETS, CHAMPION, level=0.03, again=again).reason for again in (None, 0.03, 0.0075)]
    assert reasons[0] == reasons[1]
    needs = [int(re.findall(r"about (\d+) images", reason)[0]) for reason in reasons[1:]]
    tests = len([row for row in made.comparisons if row.split == "new"])
    for alpha, need in zip((0.03, 0.0075), needs, strict=True):  # n times the square of how much the interval must shrink
        assert need == pytest.approx(100 * (stats.t.ppf(1 - alpha / tests, 9999) * 0.04 / 0.01) ** 2, abs=1)


def test_next_attempt_counts_the_present_one():
    held_out = [f"{i:016x}" for i in range(40)]
    assert spent(0.05, held_out, "a" * 64, [], ahead=1) == pytest.approx(spent(0.05, held_out, "a" * 64, []) / 4)


def test_need_says_whether_drawing_more_would_do():
    made = card(new=(-0.01, 0.04))
    for drawn_se, says in (
        (0.035, "generated images are needed next time (gate.images)"),
        (0.01, "held-out groups are needed next time; more generated images alone would not be enough"),
    ):
        rows = [row.model_copy(update={"drawn_se": drawn_se}) for row in made.comparisons]
        assert says in judged(made.model_copy(update={"comparisons": rows})).reason
