"""The gate's decision on an update with a budget: does it fit, is its share of the gain shown, and which size would do?"""

from __future__ import annotations

from collections.abc import Sequence

from model.scorecard import Kept
from registry.curve import HELD, Point, Update
from registry.selection import Check, Decision


def with_update(decision: Decision, update: Update) -> Decision:
    """Add an update to the gate's decision on it; with a budget, it must hold, and for `full` the share kept.

    Args:
        decision: the gate's.
        update: how the update was made.

    Returns:
        the decision with these checks, too; it is "refuse" if one of them fails.
    """
    told = "".join(f"; {said}" for said in (update.why_fielded, holding(update)) if said)
    made = decision.model_copy(update={"update_bytes": update.bytes, "update": update, "reason": decision.reason + told})
    if update.budget is None:
        return made
    checks = [_fits(update, update.budget), *([] if update.keep is None else [_keeps(update, update.keep)])]
    failed = [check.text for check in checks if not check.passed]
    made = made.model_copy(update={"checks": [*checks, *decision.checks]})
    if not failed:
        said = f"{made.reason}; {' and '.join(check.text for check in checks)}" if decision.outcome == "promote" else made.reason
        return made.model_copy(update={"reason": said})
    return made.model_copy(update={"outcome": "refuse", "reason": f"{'; '.join(failed)}; {made.reason}", "becomes_anchor": False})


def _fits(update: Update, budget: int) -> Check:
    text = f"a device fetches {update.bytes:,} bytes of the {budget:,} in the budget"
    if update.beside is not None and update.bytes > budget:
        text = (
            f"a device fetches {update.bytes:,} bytes, and the budget has {budget:,}: {update.fixed:,} are no weights, {update.beside:,} are weights of "
            f"others, and this student takes {update.weights:,} at level {update.noise:.3g}, and no coarser one is tried; raise update_budget to {_whole(update.bytes)}"
        )
    return Check(name="update budget", passed=update.bytes <= budget, text=text)


def _keeps(update: Update, keep: float) -> Check:
    """Say whether the update passed in the sequence; if not, also which size did.

    One that was measured out of turn, after a larger size had failed, may not be taken: it would be a second chance of an error.
    """
    if any(point.noise == update.noise and point.outcome == "passed" for point in update.curve) and passes(update.kept, keep):
        return Check(name="share of the gain", passed=True, text=f"it keeps {shares(update.kept)} of the gain")
    text = f"no update within the budget of {update.budget or 0:,} bytes is shown to keep {keep:.0%} of the gain: this one keeps {shares(update.kept)}"
    return Check(name="share of the gain", passed=False, text=f"{text}; {would_pass(update.curve)}")


def passes(kept: Kept | None, keep: float) -> bool:
    """Check whether an update is shown to keep a share of the gain: its lower bound reaches it."""
    return kept is not None and kept.low is not None and kept.low >= keep


def shares(kept: Kept | None) -> str:
    """Write a share with its interval; say so if there is none."""
    if kept is None:
        return "a share that was not measured"
    if kept.share is None or kept.low is None or kept.high is None:
        return f"a share that cannot be measured: {kept.groups} independent groups of held-out images are too few, or the retraining shows no gain on them"
    return f"{kept.share:.1%} ({kept.low:.1%} to {kept.high:.1%}, {kept.items} held-out images)"


def in_short(update: Update) -> str:
    """Say in one line what an update costs and keeps, and how it was made."""
    limit = f" of {update.budget:,}" if update.budget else ""
    brings = f"keeps {shares(update.kept)} of the gain" if update.beside is None else f"{update.weights:,} of them this student's"
    text = f"its update: {update.bytes:,} bytes{limit}, {brings}; by {update.method}, trained from {began(update)}"
    held = holding(update)
    return f"{text}; {held}" if held else text


def began(update: Update) -> str:
    """Say from which weights training started."""
    if update.of_full:
        return "the master of full" if update.start == "master" else "the fielded weights of full"
    return "the champion's master" if update.start == "master" else "the fielded weights"


def holding(update: Update) -> str:
    """Say why an update without a budget is coarser than the settings ask for, or that it is larger than it should be; empty: neither."""
    if update.setting is None or update.held is None:
        return ""
    limit = f"{update.held:,} bytes, {HELD:g} times those of the first such update of usual size"
    if update.weights > update.held:
        return (
            f"its weights take {update.weights:,} bytes at level {update.noise:.3g}, the coarsest that is tried without a budget, so they cannot be held "
            f"to {limit}; another update_level begins anew"
        )
    return (
        f"rounded at level {update.noise:.3g} instead of {update.setting.level:.3g}, to hold its weights to {limit}"
        if update.is_coarser
        else ""
    )


def would_pass(curve: Sequence[Point]) -> str:
    """Say what the smallest size is that keeps enough, or what that is not known to be."""
    passed = [point for point in curve if point.outcome == "passed"]
    if passed:
        return f"the smallest size that does is {passed[-1].bytes:,} bytes, so raise update_budget to {_whole(passed[-1].bytes)}"
    if curve and curve[0].kept is not None and curve[0].kept.share is None:
        return "train longer or with more data"
    return (
        f"a size above {curve[0].bytes:,} bytes may, so raise update_budget, or lower update_keep"
        if curve
        else "raise update_budget"
    )


def _whole(size: int) -> str:
    return f"{-(-size // 1024)} KiB"
