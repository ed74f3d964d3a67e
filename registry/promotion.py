"""Who may become champion, and what an alias that somebody moved in MLflow means. Rules of ledger entries, without I/O.

The ledger says who is champion. MLflow's alias follows it, and after each move the registered model's tag `ledger.champion` names the
entry that it follows. So two cases that look alike are told apart: an alias that lags behind because a promotion was cut off between
ledger and alias (the tag names an earlier entry; the ledger is followed), and one that a person moved (the tag names the last entry; it
is a wish, and goes through the same gate as `ferry promote`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.scorecard import Sha256
from registry.errors import CatalogError, PromotionError
from registry.ledger import Entry
from registry.seal import Seal

How = Literal["command", "rollback", "approval", "alias"]


@dataclass(frozen=True)
class SubjectState:
    """What the ledger says of one subject."""

    champion: Entry | None = None
    line: tuple[int, ...] = ()  # champions that one may go back along, the present one last
    passed: dict[int, Sha256] = field(default_factory=dict)  # champions through the gate: weights by version
    judged: dict[int, Entry] = field(default_factory=dict)  # the last that the gate said of each version
    waiting: dict[int, Entry] = field(default_factory=dict)  # versions that wait for approval
    refused: dict[int, Entry] = field(default_factory=dict)  # versions that a person refused
    seals: dict[int, Seal] = field(default_factory=dict)  # versions as the gate saw them
    verdicts: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # that an older ferry had left in MLflow
    anchor: int | None = None  # the best model ever

    @property
    def version(self) -> int | None:
        """The champion's version."""
        return int(self.champion.facts["version"]) if self.champion else None

    @property
    def weights(self) -> Sha256:
        """The champion's weights; empty where there is none, as in a gate's decision."""
        return str(self.champion.facts["weights"]) if self.champion else ""

    @property
    def number(self) -> int:
        """Of the entry that made the champion; 0 where there is none."""
        return self.champion.number if self.champion else 0

    def seal(self, subject: str, version: int) -> Seal:
        """A version as the gate saw it.

        Raises:
            CatalogError: the gate never saw it, judged another model under its number, or an older ferry kept no hashes of it.
        """
        if version in self.seals:
            seal, gate = self.seals[version], self.judged.get(version)
            if gate and gate.facts.get("scorecard", seal.scorecard) != seal.scorecard:
                raise CatalogError(
                    f"ledger entry {gate.number} judges another model than was sealed as {subject} {version}: MLflow gave two the same "
                    "number; nothing of it is used, restore MLflow from a backup, or `ferry retrain`"
                )
            return seal
        if version in self.judged or version in self.passed or version == self.version:
            raise CatalogError(
                f"{subject} {version} was registered by a ferry that kept no hashes of its files; `ferry seal` records them, and says what "
                "it cannot vouch for"
            )
        raise CatalogError(
            f"the gate never saw {subject} {version}, so nothing of it is used; `ferry retrain` lets it judge what it makes"
        )

    def verdict(self, version: int) -> Mapping[str, Any] | None:
        """The gate's decision on a version, as plain data; None where an older ferry kept only its hash."""
        if version not in self.judged:
            return None
        verdict: Mapping[str, Any] | None = self.judged[version].facts.get("verdict") or self.verdicts.get(version)
        return verdict

    def weights_of(self, subject: str, version: int) -> Sha256:
        """Hash of a version's exported weights.

        Raises:
            CatalogError: as `seal`; a champion of an older ferry's time is known by its promotion.
        """
        if version not in self.seals and version in self.passed:
            return self.passed[version]
        if version not in self.seals and version == self.version:
            return self.weights
        return self.seal(subject, version).weights


def subject_state(entries: Iterable[Entry]) -> SubjectState:
    """Read one subject's entries, in order.

    A champion that was one before ends what came after it: from 1, 2, 3 back to 2, the one before is 1. Whoever waits for approval
    waits no more once it is champion or refused, or once a later one waits.
    """
    champion: Entry | None = None
    line: list[int] = []
    passed: dict[int, Sha256] = {}
    judged: dict[int, Entry] = {}
    waiting: dict[int, Entry] = {}
    refused: dict[int, Entry] = {}
    seals: dict[int, Seal] = {}
    verdicts: dict[int, Mapping[str, Any]] = {}
    anchor: int | None = None
    for entry in entries:
        version = int(entry.facts.get("version") or 0)
        if "seal" in entry.facts and version not in seals:  # what MLflow was given with the first stays there
            seals[version] = Seal(subject=entry.subject, version=version, **entry.facts["seal"])
        if entry.kind == "gate":
            judged[version] = entry
        elif entry.kind == "seal":
            verdicts[version] = entry.facts["verdict"]
        elif entry.kind == "pending":
            waiting = {version: entry}
            refused.pop(version, None)
        elif entry.kind == "refusal" and entry.facts["how"] == "approval":
            waiting.pop(version, None)
            refused[version] = entry
        elif entry.kind == "promotion":
            anchor = _anchor_after(anchor, entry.facts, passed)
            champion = entry
            line = [*line[: line.index(version)], version] if version in line else [*line, version]
            waiting.pop(version, None)
            refused.pop(version, None)
            if not entry.facts["overruled"]:
                passed[version] = entry.facts["weights"]
    return SubjectState(champion, tuple(line), passed, judged, waiting, refused, seals, verdicts, anchor)


def check(subject: str, version: int, tagged: Sha256, now: SubjectState, reason: str = "") -> None:
    """Whether a version may become champion: it was one through the gate, or the gate let it through against the present one.

    What the gate found harmless and no better ("promote if reasoned") needs a person's reason other than quality.

    Args:
        subject: LINE/CONFIG/VARIANT.
        version: the number.
        tagged: hash of its exported weights, as MLflow's tag says, which its users can edit.
        now: what the ledger says.
        reason: given by a person; empty: none was.

    Raises:
        CatalogError: the gate never saw it, or an older ferry kept no hashes of it.
        PromotionError: it may not.
    """
    weights = now.weights_of(subject, version)
    if tagged != weights:
        raise PromotionError(
            f"MLflow's tag gives {subject} {version} other weights than the ledger has of it; restore MLflow, or `ferry retrain` and promote "
            "what comes of it"
        )
    if version in now.passed:
        return
    gate = now.judged.get(version)
    if gate is None:
        raise PromotionError(f"the ledger holds no decision of the gate on {subject} {version}; `ferry retrain` lets it judge")
    if gate.facts["outcome"] == "promote if reasoned" and not reason.strip():
        raise PromotionError(
            f"the gate found {subject} {version} harmless and no better ({gate.why}); a promotion that is not for quality needs its reason: "
            f"`ferry promote {subject} {version} --reason ...`"
        )
    if gate.facts["outcome"] not in ("promote", "promote if reasoned"):
        raise PromotionError(
            f"the gate answered {gate.facts['outcome']!r} for {subject} {version}: {gate.why}; to promote it all the same, add "
            "--overrule and a --reason that will be recorded"
        )
    if gate.facts.get("champion") != now.weights:
        raise PromotionError(
            f"{subject} {version} was judged against another champion than the present one; run `ferry retrain` again, or add "
            "--overrule and a --reason"
        )


def goes_on(facts: Mapping[str, Any], before: SubjectState) -> bool:
    """Whether a promotion is one by the gate's decision, and neither a way back nor against the gate: it may make the best model ever."""
    return _goes_on(facts, before.passed)


def _goes_on(facts: Mapping[str, Any], passed: Mapping[int, Sha256]) -> bool:
    version, left = facts["version"], facts["from"] or 0
    return not (facts["overruled"] or facts.get("how") == "rollback" or (version in passed and version < left))


def _anchor_after(anchor: int | None, facts: Mapping[str, Any], passed: Mapping[int, Sha256]) -> int | None:
    """The best model ever after a promotion.

    One that goes on makes its version the best where the gate said so, and else the champion before it where none was the best yet. Whoever goes back
    from the best says that it is not. A promotion against the gate changes nothing.

    Args:
        anchor: who it was until then.
        facts: of the promotion.
        passed: champions through the gate until then.
    """
    version, left = facts["version"], facts["from"]
    if _goes_on(facts, passed):
        return version if facts.get("becomes_anchor") else anchor or left
    return version if anchor == left and not facts["overruled"] else anchor


def before(subject: str, now: SubjectState) -> int:
    """The champion before the present one; those for whom the gate was overruled are passed over.

    Raises:
        PromotionError: there is none.
    """
    found = [version for version in now.line[:-1] if version in now.passed]
    if not found:
        raise PromotionError(
            f"{subject} has no champion before the present one that had passed the gate; there is nothing to go back to"
        )
    return found[-1]


@dataclass(frozen=True)
class Alias:
    """What MLflow says of a subject's champion."""

    version: int | None  # where the alias points; None: there is none
    weights: Sha256  # of that version; empty where there is none
    follows: int  # number of the ledger's entry that the alias was last pointed after


Answer = Literal["agrees", "put back", "recorded", "refused", "lost"]  # lost: the ledger's champion is not in MLflow any more


def reconcile_alias(subject: str, alias: Alias, now: SubjectState, approval: bool) -> tuple[Answer, str]:
    """What to do about an alias, and why.

    Args:
        subject: LINE/CONFIG/VARIANT.
        alias: what MLflow says.
        now: what the ledger says.
        approval: whether a promotion needs the approval of a named person.

    Returns:
        *agrees*: nothing; *put back*: point it at the ledger's champion (or at nothing, where there is none); *recorded*: append the
        promotion; *refused*: record the refusal and put it back.
    """
    if alias.version == now.version:
        if now.champion and alias.weights != now.weights:
            return (
                "refused",
                f"MLflow gives {subject} {alias.version} other weights than the ledger; restore MLflow from its backup",
            )
        return "agrees", f"{subject} {now.version or 'has no champion'}"
    if alias.follows != now.number:
        return (
            "put back",
            "a promotion was cut off before MLflow's alias moved, or MLflow was restored; the ledger holds what was decided",
        )
    if alias.version is None:
        return "put back", "the alias was deleted in MLflow, by whom is not known; to take a champion down use `ferry rollback`"
    if approval:
        return "refused", (
            f"the alias was set to version {alias.version} in MLflow, by whom is not known, and {subject} needs the approval of a named "
            f"person; use `ferry approve {subject} {alias.version}`"
        )
    try:
        check(subject, alias.version, alias.weights, now)
    except (CatalogError, PromotionError) as error:
        return "refused", f"the alias was set to version {alias.version} in MLflow, by whom is not known: {error}"
    return "recorded", f"by alias set in MLflow to version {alias.version}; by whom is not known"
