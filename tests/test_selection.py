"""The gate decides by intervals, not by point values, and says how much data would settle a doubt."""

from __future__ import annotations

import pytest

from model.scorecard import Comparison, Cost, Quality, Sampler, Scorecard, Usage
from registry.selection import Decision, Limits, decide

CHAMPION, CHALLENGER = "a" * 64, "b" * 64
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


def judged(made: Scorecard, champion: str | None = CHAMPION, together: int = 1) -> Decision:
    return decide(made, LIMITS, 100, champion, together)


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
    decision = judged(card(new=(-0.01, 0.02)))
    assert decision.outcome == "more data"
    # 100 * (1.645 * 0.02 / 0.01)²; generating more alone would not do, so the groups are named too
    assert "is undecided at n = 100 and 10000 held-out groups, about 1083 and 108242 are needed" in decision.reason


def test_few_groups_of_held_out_images_ask_for_more_evidence():
    close = (-0.0185, 0.01)
    assert judged(card(new=close)).outcome == "promote"
    assert judged(card(new=close, groups=6)).outcome == "more data"  # Student's t with 5 degrees of freedom is 2.02


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
    assert judged(card(new=(-0.01, 0.02), old=(0.2, 0.01))).outcome == "refuse"


def test_many_variants_decided_together_need_more_evidence():
    close = card(new=(-0.0185, 0.01))
    assert judged(close, together=1).outcome == "promote"
    assert judged(close, together=3).outcome == "more data"


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
    assert decide(student(0.01, 0.01), lenient, 100, CHAMPION).outcome == "promote"


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
