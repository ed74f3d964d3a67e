"""Who is champion, and how a version becomes champion: the ledger is written first, MLflow's alias second, and both must agree.

This order makes a kill harmless. Before the ledger's entry, nothing was decided. After it, `reconcile` or the same command again
moves the alias. The rules are in `registry.promotion`: which version may become champion, and what a moved alias means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from model.config import VARIANTS, VariantName
from model.scorecard import Frozen, Scorecard
from registry.catalog import ANCHOR, CHAMPION, Catalog, Subject
from registry.curve import Update
from registry.errors import CatalogError, PromotionError, StoreError
from registry.ledger import Entry, Ledger
from registry.promotion import (
    Alias,
    Answer,
    How,
    SubjectState,
    before,
    check,
    goes_on,
    of_one_full,
    reconcile_alias,
    subject_state,
    version_of,
)
from registry.seal import Seal
from registry.selection import Budgets, Decision, Limits, decide, reasoned, spent

REFUSED = "promotion.refused"  # tag of a version: why an alias that somebody set to it was put back
MOVES = 100  # most attempts to move an alias while others promote the same subject


class Records(Protocol):
    """The places where promotions are recorded: MLflow and the ledger, with a lock over both."""

    @property
    def catalog(self) -> Catalog:
        """MLflow."""

    @property
    def ledger(self) -> Ledger:
        """The record of decisions."""

    def locked(self, part: Literal["records"]) -> AbstractContextManager[None]:
        """Lock both against another process that would change them."""


def champions(records: Records, subjects: Iterable[Subject]) -> dict[VariantName, Seal]:
    """Find the seals of the champions that a device class runs, by variant; see `registry.promotion.of_one_full`.

    Raises:
        CatalogError: no variant has a champion, an older ferry kept no hashes of one, or MLflow's alias differs from the ledger.
    """
    asked = {subject.variant: subject for subject in subjects}
    states = {variant: _state(records, subject) for variant, subject in asked.items()}
    first = next(iter(asked.values()))
    full = _state(records, first.model_copy(update={"variant": "full"}))
    found: dict[VariantName, Seal] = {}
    for variant, subject in asked.items():
        now, alias = states[variant], records.catalog.champion(subject)
        if now.version is None and alias is None:
            continue
        if alias is None:
            check_champion_kept(records, subject)
        if now.version is None or alias is None or now.version != alias.number or now.weights != alias.tagged_weights:
            said = f"{alias.number} is champion" if alias else "has no champion"
            raise CatalogError(
                f"MLflow says {subject} {said}, but the ledger does not; run `ferry reconcile`, or run `ferry promote "
                f"{subject} VERSION --reason ...` with the version that you want"
            )
        found[variant] = now.seal(str(subject), now.version)
    held = of_one_full(full, states)
    if not held:
        raise CatalogError(f"{first} has no champion to release; run `ferry retrain {first.line}` or `ferry promote`")
    return {variant: seal for variant, seal in found.items() if variant in held}


def champion_of(records: Records, subject: Subject) -> Seal | None:
    """Return the seal of the champion according to the ledger; None: there is no champion.

    MLflow does not decide which version is champion, but it must still have that version.

    Raises:
        CatalogError: MLflow does not have it any more, or an older ferry kept no hashes of it.
    """
    now = _state(records, subject)
    if now.version is None:
        return None
    check_champion_kept(records, subject)
    return now.seal(str(subject), now.version)


def anchor_of(records: Records, subject: Subject) -> Seal | None:
    """Return the seal of the anchor, the best model so far according to the ledger; None: there is none.

    Raises:
        CatalogError: an older ferry kept no hashes of it.
    """
    now = _state(records, subject)
    return now.seal(str(subject), now.anchor) if now.anchor else None


def sealed(records: Records, subject: Subject, number: int) -> Seal:
    """Return the seal of a version that MLflow has.

    Raises:
        CatalogError: there is no such version, the gate never saw it, or an older ferry kept no hashes of it.
    """
    records.catalog.version(subject, number)
    return _state(records, subject).seal(str(subject), number)


def seals(records: Records, subject: Subject) -> list[Seal]:
    """Return the seals of all versions, oldest first; versions of an older ferry without a seal are left out."""
    return [seal for _, seal in sorted(_state(records, subject).seals.items())]


def judged(records: Records, subject: Subject) -> dict[int, Entry]:
    """Return the ledger entry with the gate's last decision on each version."""
    return _state(records, subject).judged


def verdict(records: Records, subject: Subject, number: int) -> Decision | None:
    """Return the gate's decision on a version; None: there is none, or an older ferry kept only its hash."""
    found = _state(records, subject).verdict(number)
    return Decision.model_validate(found) if found else None


def updates(records: Records, subjects: Iterable[Subject]) -> list[Update]:
    """Return how the champions of subjects were updated, in the order in which they became champions; those that a rollback left are not among them."""
    found: list[tuple[int, Update]] = []
    for subject in subjects:
        since = {entry.facts["version"]: entry.number for entry in reversed(promotions(records, subject))}
        line = [(since.get(number, 0), verdict(records, subject, number)) for number in _state(records, subject).line]
        found += [(entry, made.update) for entry, made in line if made and made.update]
    return [update for _, update in sorted(found, key=lambda one: one[0])]


def gate(
    records: Records,
    subject: Subject,
    card: Scorecard,
    limits: Limits,
    budgets: Budgets,
    champion: Seal | None,
    anchor: Seal | None,
    allowed: float,
    update_bytes: int | None,
) -> Decision:
    """Ask the gate about a challenger, at the level that earlier attempts on these held-out images have left.

    Args:
        records: MLflow and the ledger, which has the earlier attempts.
        subject: whose challenger.
        card: the challenger's scorecard.
        limits: of the gate.
        budgets: of latency and memory.
        champion: the present one; None: there is none.
        anchor: the best model so far; None: there is none.
        allowed: chance of a wrong promotion that all attempts on these held-out images may take together.
        update_bytes: of a delta from the champion's weights to the challenger's; None: there is no champion.
    """
    earlier = [verdict(records, subject, number) for number in sorted(judged(records, subject))]
    attempts = [made for made in earlier if made]
    level, again = (spent(allowed, card.held_out, card.sha256, attempts, ahead) for ahead in (0, 1 if champion else 0))
    return decide(
        card, limits, budgets, champion.weights if champion else None,
        anchor=anchor.weights if anchor else None, level=level, again=again, update_bytes=update_bytes,
    )  # fmt: skip


def alpha_left(
    records: Records, subject: Subject, held_out: Sequence[str], allowed: float, same: Callable[[Decision], bool]
) -> float:
    """Return the chance of a wrong promotion that a new attempt on held-out images may take, before there is a scorecard of it.

    Args:
        records: MLflow and the ledger, which has the earlier attempts.
        subject: whose challenger.
        held_out: hashes of the held-out groups, as a scorecard has them.
        allowed: chance of a wrong promotion that all attempts on these held-out images may take together.
        same: tells whether an earlier decision belongs to this attempt, which is being repeated.
    """
    earlier = (verdict(records, subject, number) for number in sorted(judged(records, subject)))
    return spent(allowed, held_out, "", [made for made in earlier if made and not same(made)])


def promotions(records: Records, subject: Subject, overruled: bool = True) -> list[Entry]:
    """Return the promotions of a subject in order; with `overruled` false, without those that overruled the gate."""
    entries = (e for e in records.ledger.entries(str(subject)) if e.kind == "promotion")
    return [e for e in entries if overruled or not e.facts["overruled"]]


def check_champion_kept(records: Records, subject: Subject) -> None:
    """Refuse to go on if somebody deleted the champion from MLflow, as if there never had been one.

    Raises:
        CatalogError: MLflow does not have the version that the ledger says is champion.
    """
    made = promotions(records, subject)
    if made and made[-1].facts["version"] not in [v.number for v in records.catalog.versions(subject)]:
        raise CatalogError(_deleted(records, subject, made[-1].facts["version"]))


def _deleted(records: Records, subject: Subject, number: int) -> str:
    passed = _state(records, subject).passed
    left = ", ".join(str(v.number) for v in records.catalog.versions(subject) if v.number in passed)
    back = f"go back to another version with `ferry rollback {subject} --to VERSION --reason ...` (there is {left})"
    return (
        f"the ledger says {subject} {number} is champion, but it was deleted from MLflow; "
        f"{back if left else f'restore MLflow from a backup, or run `ferry promote {subject} VERSION --overrule --reason ...`'}"
    )


def promote(
    records: Records, subject: Subject, number: int, reason: str, overrule: bool = False, accept_worse: bool = False
) -> Entry:
    """Make a version champion: record it with the reason, and point the alias `champion` at it.

    A version that was champion before and had passed the gate may always become champion again. Any other version must have
    passed the gate against the present champion, unless the gate is overruled, which is recorded. If two calls start from the
    same champion at the same moment, one succeeds and the other raises PromotionError.

    Raises:
        CatalogError: there is no such version, or it was not registered by ferry.
        PromotionError: the gate did not let it through, or judged it against another champion, or another call was faster.
        StoreError: MLflow or the database failed; if the ledger holds the decision, the message says so.
        BusyError: another process is recording something.
    """
    if overrule and not reason.strip():
        raise PromotionError(
            f"overruling the gate needs a reason; run `ferry promote {subject} {number} --overrule --reason ...`"
        )
    expected = _state(records, subject)  # before waiting for the lock: a call must not overwrite what it has not seen
    with records.locked("records"):
        return _promote(records, subject, number, reason, expected, "command", overrule, accept_worse=accept_worse)


def promote_or_ask(
    records: Records,
    subject: Subject,
    number: int,
    decision: Decision,
    taken_back: bool,
    approval: bool,
    asked: Callable[[], object],
) -> tuple[bool, str, str]:
    """Promote a version that the gate let through, or let it wait for a person.

    Args:
        records: MLflow, the ledger and the lock over both.
        subject: line, configuration and variant of the version.
        number: number of the version.
        decision: the gate's.
        taken_back: whether somebody went back from these weights; then nothing is done.
        approval: whether a person must approve promotions.
        asked: called once the ledger says that the version waits.

    Returns:
        whether it is champion, the reason, and the outcome: the gate's, "pending" if it waits, or "refused" by a person.

    Raises:
        CatalogError, PromotionError, StoreError, BusyError: as `promote`.
    """
    if taken_back:
        return (
            False,
            f"{decision.reason}; it was rolled back, so only `ferry promote` makes it champion again",
            decision.outcome,
        )
    now = champion_of(records, subject)
    if now is not None and now.version == number:
        return True, decision.reason, decision.outcome
    if approval:
        refused = ask(records, subject, number, decision.reason)
        asked()
        if refused:
            return False, f"{refused.who} refused it: {refused.why}", "refused"
        return False, f"{decision.reason}; `ferry approve {subject} {number}` promotes it", "pending"
    promote(records, subject, number, decision.reason)
    return True, decision.reason, decision.outcome


def rollback(records: Records, subject: Subject, reason: str, to: int | None = None) -> Entry:
    """Roll back to an earlier champion that passed the gate: to the one before the present one, or to version `to`.

    Raises:
        CatalogError, PromotionError, StoreError, BusyError: as `promote`; PromotionError also if there is nothing to go back to.
    """
    if not reason.strip():
        raise PromotionError(f"a rollback needs a reason; run `ferry rollback {subject} --reason ...`")
    expected = _state(records, subject)
    with records.locked("records"):
        last = expected.champion
        cut = last and last.facts.get("how") == "rollback" and records.catalog.follows(subject) != last.number
        if last and cut and to in (None, expected.version):  # the last rollback was cut off; a new one would go back twice
            _follow(records, subject)
            return last
        number = before(str(subject), expected) if to is None else to
        if number == expected.version:
            raise PromotionError(f"{subject} {number} is champion already; nothing was changed")
        if number not in expected.passed:
            records.catalog.version(subject, number)  # which says what versions there are
            raise PromotionError(
                f"{subject} {number} is no earlier champion that passed the gate; `ferry promote {subject} {number}` asks "
                "the gate"
            )
        return _promote(records, subject, number, reason, expected, "rollback")


def _state(records: Records, subject: Subject) -> SubjectState:
    return subject_state(records.ledger.entries(str(subject)))


def _promote(
    records: Records,
    subject: Subject,
    number: int,
    reason: str,
    expected: SubjectState,
    how: How,
    overrule: bool = False,
    who: str | None = None,
    accept_worse: bool = False,
) -> Entry:
    version = records.catalog.version(subject, number)
    weights = expected.weights_of(str(subject), number)

    def may_follow(entries: list[Entry]) -> None:
        now = subject_state(entries)
        _check_unmoved(subject, expected, now)
        if not overrule:
            check(str(subject), number, version.tagged_weights, now, "" if how == "alias" else reason)

    again = (expected.version, expected.weights) == (number, weights)
    if expected.champion and again:
        _check_unmoved(subject, expected, _state(records, subject))
        entry = expected.champion  # decided before, but perhaps the alias was not moved
    else:
        said = expected.judged.get(number)
        facts = {
            "version": number, "from": expected.version, "weights": weights, "overruled": overrule, "how": how,
            "gate": said.facts["outcome"] if said else "", "decision": said.facts["decision"] if said else "",
        }  # fmt: skip
        found = expected.verdict(number) if goes_on(facts, expected) else None
        decision = Decision.model_validate(found) if found else None
        if decision and decision.outcome == "promote if reasoned" and reason.strip():  # without a reason `check` says what to do
            reason = reasoned(decision, reason, accept_worse or overrule).reason
        facts["becomes_anchor"] = decision is not None and decision.becomes_anchor
        entry = records.ledger.append("promotion", str(subject), reason or "promoted by hand", facts, may_follow, who)
    try:
        _follow(records, subject)
    except StoreError as error:
        raise StoreError(
            f"the ledger holds it as entry {entry.number}, but MLflow's alias of {subject} did not move ({error}); `ferry reconcile` "
            "completes it"
        ) from error
    if subject.variant == "full":
        _take_along(records, subject, number, how, who)
    return entry


def _take_along(records: Records, subject: Subject, number: int, how: How, who: str | None) -> None:
    """Promote with a `full` the versions of the other variants that came from it and were champions then.

    Otherwise, after a rollback, a release would hold no other variant. A variant that has no such version keeps its champion, and a
    release leaves it out.
    """
    full = _state(records, subject).seals.get(number)
    for variant in VARIANTS:
        other = subject.model_copy(update={"variant": variant})
        state = _state(records, other)
        if variant == "full" or full is None or state.version is None:
            continue
        version = version_of(full, state)
        if version is not None and version != state.version:
            _promote(records, other, version, f"it comes from {subject} {number}, which is champion again", state, how, who=who)


def _check_unmoved(subject: Subject, expected: SubjectState, now: SubjectState) -> None:
    if now.champion and now.number != expected.number:
        raise PromotionError(
            f"{now.champion.who} made {subject} {now.version} champion at the same moment (ledger entry {now.number}: {now.champion.why}); "
            "read that entry, and repeat your command if you still want it"
        )


def _follow(records: Records, subject: Subject) -> None:
    """Make MLflow follow the ledger: first the anchor, then the champion, and last the number of the entry. May be repeated.

    Other hosts may promote at the same time, and MLflow has no compare-and-set. So the ledger is read again after an alias was
    moved.
    """
    catalog = records.catalog
    for _ in range(MOVES):
        now = _state(records, subject)
        _move_anchor(records, subject, now)
        if now.version is None:
            catalog.clear_alias(subject, CHAMPION)
        else:
            catalog.promote(subject, now.version)
        seen = catalog.champion(subject)
        if _state(records, subject).number == now.number and (seen.number if seen else None) == now.version:
            catalog.follow(subject, now.number)
            return
    raise StoreError(
        f"another program keeps moving MLflow's alias of {subject}; stop it, then run `ferry reconcile` (the "
        f"ledger says {now.version})"
    )


def _move_anchor(records: Records, subject: Subject, now: SubjectState) -> None:
    """Point `anchor` at the ledger's anchor, if MLflow still has it; the alias only informs people, and decides nothing."""
    present = records.catalog.aliased(subject, ANCHOR)
    if now.anchor is None or (present and present.number == now.anchor):
        return
    if now.anchor in [v.number for v in records.catalog.versions(subject)]:
        records.catalog.set_alias(subject, ANCHOR, now.anchor)


class Reconciled(Frozen):
    """What `reconcile` found for one subject, and did about it."""

    subject: str
    answer: Answer
    text: str


def reconcile(records: Records, subjects: Iterable[Subject], needs_approval: Callable[[str], bool]) -> list[Reconciled]:
    """Compare MLflow's champion aliases with the ledger, and settle the differences; see `registry.promotion`.

    Args:
        records: MLflow, the ledger and the lock over both.
        subjects: subjects whose aliases are compared.
        needs_approval: says for a line whether a person must approve promotions.

    Raises:
        LedgerError, StoreError, BusyError: it stopped at a subject, whose difference may not be settled yet; call it again.
    """
    with records.locked("records"):
        return [_reconcile(records, subject, needs_approval) for subject in subjects]


def news_of_aliases(records: Records, subjects: Iterable[Subject], needs_approval: Callable[[str], bool]) -> str:
    """Do what `reconcile` does, and return what differed in one line; empty: nothing did."""
    return "; ".join(row.text for row in reconcile(records, subjects, needs_approval) if row.answer != "agrees")


def _reconcile(records: Records, subject: Subject, needs_approval: Callable[[str], bool]) -> Reconciled:
    entries = records.ledger.entries(str(subject))
    now = subject_state(entries)
    seen = records.catalog.champion(subject)
    follows = records.catalog.follows(subject)
    alias = Alias(seen.number if seen else None, seen.tagged_weights if seen else "", follows)
    answer, why = reconcile_alias(str(subject), alias, now, needs_approval(subject.line))
    if answer == "agrees":
        if follows != now.number:  # a promotion was cut off, or a person moved the alias to the right version
            _follow(records, subject)
        _move_anchor(records, subject, now)
        return Reconciled(subject=str(subject), answer=answer, text=why)
    if answer == "recorded" and seen:
        try:
            _promote(records, subject, seen.number, why, now, "alias", who="unknown")
        except PromotionError:  # another host was faster, so its promotion counts
            return _reconcile(records, subject, needs_approval)
        return Reconciled(subject=str(subject), answer=answer, text=f"{subject} {seen.number} is champion {why}")
    if answer == "refused" and alias.version is not None:
        facts = {"how": "alias", "version": alias.version, "champion": now.version}
        # If the alias was set to the same version as before, it is put back again, but the ledger gets no second entry.
        if not entries or (entries[-1].kind, entries[-1].facts, entries[-1].why) != ("refusal", facts, why):
            records.ledger.append("refusal", str(subject), why, facts, who="unknown")
        records.catalog.note(subject, alias.version, REFUSED, why)
    try:
        if now.version is not None:
            records.catalog.version(subject, now.version)
    except CatalogError:
        return Reconciled(subject=str(subject), answer="lost", text=_deleted(records, subject, now.version or 0))
    _follow(records, subject)
    back = f"version {now.version}" if now.version else "none"
    return Reconciled(subject=str(subject), answer=answer, text=f"MLflow's champion of {subject} is {back} again: {why}")


def ask(records: Records, subject: Subject, number: int, reason: str) -> Entry | None:
    """Let a version that passed the gate wait for approval; return the entry of its refusal, if a person refused it before.

    Raises:
        StoreError, LedgerError, BusyError: as `promote`.
    """
    with records.locked("records"):
        now = _state(records, subject)
        if number in now.refused:
            return now.refused[number]
        if number not in now.waiting:
            facts = {"version": number, "weights": now.seal(str(subject), number).weights}
            records.ledger.append("pending", str(subject), reason, facts)
    return None


def waiting(records: Records, subjects: Iterable[Subject]) -> list[Entry]:
    """Return the ledger entries that wait for approval, at most one for each subject."""
    return [entry for subject in subjects for entry in _state(records, subject).waiting.values()]


def approve(records: Records, subject: Subject, number: int, reason: str, refuse: bool = False, who: str | None = None) -> Entry:
    """Promote a version that waits for approval, or refuse it; nobody is asked about a refused version again.

    Args:
        records: MLflow, the ledger and the lock over both.
        subject: line, configuration and variant of the version.
        number: number of the version.
        reason: reason that the person gave.
        refuse: refuse the version instead of promoting it.
        who: who decided; None: the user of this process.

    Raises:
        PromotionError: the version does not wait, or was judged against another champion than the present one.
        CatalogError, StoreError, BusyError: as `promote`.
    """
    expected = _state(records, subject)
    if number not in expected.waiting:
        listed = ", ".join(str(version) for version in expected.waiting) or "none"
        raise PromotionError(f"{subject} {number} does not wait for approval; these versions of {subject} wait: {listed}")
    asked = expected.waiting[number]
    if not refuse and asked.facts["weights"] != expected.weights_of(str(subject), number):
        raise PromotionError(
            f"ledger entry {asked.number} asks about other weights of {subject} {number} than the gate saw; run `ferry "
            "retrain`, which asks again"
        )
    with records.locked("records"):
        if not refuse:
            return _promote(records, subject, number, reason, expected, "approval", who=who)

        def still_waits(entries: list[Entry]) -> None:
            now = subject_state(entries)
            _check_unmoved(subject, expected, now)
            if number not in now.waiting:
                raise PromotionError(f"somebody refused {subject} {number} at the same moment; nothing was changed")

        facts = {"how": "approval", "version": number}
        return records.ledger.append("refusal", str(subject), reason, facts, still_waits, who)
