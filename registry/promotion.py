"""Rules of promotion: who may become champion, and how an alias that somebody moved in MLflow is treated.

The rules are functions of ledger entries, without I/O. The ledger says who is champion, and MLflow's alias follows it. After each
move of the alias, the registered model's tag `ledger.champion` names the ledger entry that the alias follows. The tag tells apart
two cases that look alike:

- The tag does not name the present champion's entry: a promotion was interrupted after the ledger and before the alias. The alias
  is set to what the ledger says.
- The tag names the present champion's entry: a person moved the alias in MLflow. This is treated as a promotion request, which
  goes through the same gate as `ferry promote`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from model.config import VARIANTS, VariantName
from model.scorecard import Sha256
from registry.errors import CatalogError, PromotionError
from registry.ledger import Entry
from registry.seal import PARTS, Seal

How = Literal["command", "rollback", "approval", "alias"]


@dataclass(frozen=True)
class SubjectState:
    """The state of one subject according to the ledger."""

    champion: Entry | None = None
    line: tuple[int, ...] = ()  # champions that a rollback may return to, and the present one last
    passed: dict[int, Sha256] = field(default_factory=dict)  # champions that passed the gate: hash of the weights by version
    judged: dict[int, Entry] = field(default_factory=dict)  # the gate's last entry on each version
    waiting: dict[int, Entry] = field(default_factory=dict)  # versions that wait for approval
    refused: dict[int, Entry] = field(default_factory=dict)  # versions that a person refused
    seals: dict[int, Seal] = field(default_factory=dict)  # versions as the gate saw them
    verdicts: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # decisions that an older ferry left in MLflow only
    anchor: int | None = None  # the best model so far

    @property
    def version(self) -> int | None:
        """The champion's version; None: there is no champion."""
        return int(self.champion.facts["version"]) if self.champion else None

    @property
    def weights(self) -> Sha256:
        """Hash of the champion's weights; empty if there is no champion, as in a gate's entry."""
        return str(self.champion.facts["weights"]) if self.champion else ""

    @property
    def champions_seal(self) -> Seal | None:
        """The champion's seal; None: there is no champion, or an older ferry kept no seal of it."""
        return self.seals.get(self.version) if self.version is not None else None

    @property
    def number(self) -> int:
        """Number of the ledger entry that made the champion; 0: there is no champion."""
        return self.champion.number if self.champion else 0

    def seal(self, subject: str, version: int) -> Seal:
        """Return the seal of a version: the hashes of what the gate saw.

        Raises:
            CatalogError: the gate never saw the version, it judged another model under this number, or an older ferry
                kept no hashes of it.
        """
        if version in self.seals:
            seal, gate = self.seals[version], self.judged.get(version)
            if gate and gate.facts.get("scorecard", seal.scorecard) != seal.scorecard:
                raise CatalogError(
                    f"ledger entry {gate.number} judges another model than the one that was sealed as {subject} {version}, "
                    "because MLflow gave two models the same number; restore MLflow from a backup, or run `ferry retrain`"
                )
            return seal
        if version in self.judged or version in self.passed or version == self.version:
            raise CatalogError(
                f"an older version of ferry registered {subject} {version} without the hashes of its files; run `ferry "
                "seal`, which records them and says what it cannot vouch for"
            )
        raise CatalogError(
            f"the gate never judged {subject} {version}, so ferry does not use its files; run `ferry retrain` to train and "
            "judge a new version"
        )

    def was_taken_back(self, weights: Sha256) -> bool:
        """Check whether a person went back from these weights, perhaps under another version, and nobody made them champion since."""
        left = [version for version, passed in self.passed.items() if version not in self.line and passed == weights]
        return bool(left) and weights not in [self.passed.get(version) for version in self.line]

    def verdict(self, version: int) -> Mapping[str, Any] | None:
        """Return the gate's decision on a version as plain data; None: there is none, or an older ferry kept only its hash."""
        if version not in self.judged:
            return None
        verdict: Mapping[str, Any] | None = self.judged[version].facts.get("verdict") or self.verdicts.get(version)
        return verdict

    def weights_of(self, subject: str, version: int) -> Sha256:
        """Return the hash of a version's exported weights.

        Raises:
            CatalogError: as `seal`, except for a champion that an older ferry promoted: its promotion entry has the hash.
        """
        if version not in self.seals and version in self.passed:
            return self.passed[version]
        if version not in self.seals and version == self.version:
            return self.weights
        return self.seal(subject, version).weights


def of_one_full(full: SubjectState, variants: Mapping[VariantName, SubjectState]) -> dict[VariantName, SubjectState]:
    """Choose the variants that a release holds: those with a champion that comes from the champion of `full`.

    A variant that comes from another `full` may have the very fault for which somebody went back from that one. Champions of an
    older ferry, which kept no seal or taught `fast` by `dev`, are not left out for that.

    Args:
        full: state of the variant `full`.
        variants: states of the variants of a device class.
    """
    found: dict[VariantName, SubjectState] = {}
    origins = {_checkpoint(seal)} if (seal := full.champions_seal) else None
    for variant in (name for name in VARIANTS if name in variants):
        state = variants[variant]
        own = state.champions_seal
        if state.version is None:
            continue
        if variant == "full" or origins is None or own is None or own.origin in origins:
            found[variant] = state
            if own and origins is not None:
                origins.add(_checkpoint(own))
    return {variant: found[variant] for variant in variants if variant in found}


def version_of(full: Seal, state: SubjectState) -> int | None:
    """Find the version of a variant that comes from this `full` and was champion after it passed the gate; None: there is none."""
    wanted = _checkpoint(full)
    made = [n for n in state.passed if wanted and n in state.seals and state.seals[n].origin == wanted]
    return max(made, default=None)


def _checkpoint(seal: Seal) -> Sha256 | None:
    """Return the hash of a version's trained weights; None: its seal does not cover them."""
    return seal.checkpoint if f"checkpoint/{PARTS['checkpoint'][0]}" in seal.files else None


def subject_state(entries: Iterable[Entry]) -> SubjectState:
    """Compute the state of one subject from its ledger entries, which are given in order.

    If an earlier champion becomes champion again, those after it leave `line`: after 1, 2, 3 and back to 2, the champion before
    is 1. A version stops waiting for approval when it is promoted or refused, or when another version begins to wait.
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
        if "seal" in entry.facts and version not in seals:  # the first seal counts: MLflow keeps the files that came with it
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


def latest_refusal(entries: Iterable[Entry]) -> Entry | None:
    """Return the entry by which the gate or a person last refused a version; None: a later entry promoted one, or none was refused."""
    refused: Entry | None = None
    for entry in entries:
        if entry.kind == "refusal" or (entry.kind == "gate" and entry.facts["outcome"] == "refuse"):
            refused = entry
        elif entry.kind in ("promotion", "pending"):
            refused = None
    return refused


def check(subject: str, version: int, tagged: Sha256, now: SubjectState, reason: str = "") -> None:
    """Check that a version may become champion.

    It may if it was champion before and had passed the gate, or if the gate let it through against the present champion. If the
    gate found it harmless but no better ("promote if reasoned"), a person must give a reason other than quality.

    Args:
        subject: LINE/CONFIG/VARIANT.
        version: the number.
        tagged: hash of its exported weights according to MLflow's tag, which MLflow's users can edit.
        now: state according to the ledger.
        reason: reason that a person gave; empty: none.

    Raises:
        CatalogError: the gate never saw it, or an older ferry kept no hashes of it.
        PromotionError: it may not become champion, or the tag and the ledger have different hashes.
    """
    weights = now.weights_of(subject, version)
    if tagged != weights:
        raise PromotionError(
            f"MLflow's tag and the ledger name different weights for {subject} {version}; restore MLflow from a backup, or "
            "run `ferry retrain` and promote the new version"
        )
    if now.was_taken_back(weights) and not reason.strip():
        raise PromotionError(
            f"somebody went back from {subject} {version}, so it becomes champion again only for a reason; run `ferry promote {subject} "
            f"{version} --reason ...`"
        )
    if version in now.passed:
        return
    gate = now.judged.get(version)
    if gate is None:
        raise PromotionError(
            f"the ledger holds no decision of the gate on {subject} {version}; run `ferry retrain`, so that the gate judges it"
        )
    if gate.facts["outcome"] == "promote if reasoned" and not reason.strip():
        found = "harmless and no better" if gate.facts.get("champion") else "a first version that misses floors"
        worse = " --accept-worse" if (gate.facts.get("verdict") or {}).get("worse") else ""
        raise PromotionError(
            f"the gate found {subject} {version} {found} ({gate.why}); a promotion that is not for quality needs a reason; "
            f"run `ferry promote {subject} {version} --reason ...{worse}`"
        )
    if gate.facts["outcome"] not in ("promote", "promote if reasoned"):
        raise PromotionError(
            f"the gate answered {gate.facts['outcome']!r} for {subject} {version}: {gate.why}; to promote it anyway, add "
            "--overrule and a --reason, which is recorded"
        )
    if gate.facts.get("champion") != now.weights:
        raise PromotionError(
            f"the gate compared {subject} {version} with another champion than the present one; run `ferry retrain` again, "
            "or add "
            "--overrule and a --reason"
        )


def goes_on(facts: Mapping[str, Any], before: SubjectState) -> bool:
    """Check whether a promotion follows the gate's decision: it neither returns to an earlier champion nor overrules the gate.

    Such a promotion may make its version the anchor, the best model so far.
    """
    return _goes_on(facts, before.passed)


def _goes_on(facts: Mapping[str, Any], passed: Mapping[int, Sha256]) -> bool:
    version, left = facts["version"], facts["from"] or 0
    return not (facts["overruled"] or facts.get("how") == "rollback" or (version in passed and version < left))


def _anchor_after(anchor: int | None, facts: Mapping[str, Any], passed: Mapping[int, Sha256]) -> int | None:
    """Return the anchor, the best model so far, after a promotion.

    A promotion that follows the gate (`goes_on`) makes its version the anchor if the gate said so. Otherwise the anchor stays;
    if there is none yet, the previous champion becomes it. A rollback from the anchor says that it is not the best, so the
    version that it returns to becomes the anchor. A promotion that overrules the gate changes nothing.

    Args:
        anchor: the anchor before the promotion.
        facts: of the promotion's ledger entry.
        passed: champions that had passed the gate before the promotion.
    """
    version, left = facts["version"], facts["from"]
    if _goes_on(facts, passed):
        return version if facts.get("becomes_anchor") else anchor or left
    return version if anchor == left and not facts["overruled"] else anchor


def was_taken_back(weights: Sha256, promoted: Sequence[Sha256]) -> bool:
    """Check whether somebody went back from these weights, perhaps under another version; a schedule must not undo that.

    Args:
        weights: hash of a version that the gate let through.
        promoted: hashes of all that were made champion, in order.
    """
    return weights in promoted[:-1] and weights != promoted[-1]


def kind_of(entry: Entry) -> str:
    """Say in one word what a ledger entry is about: for a promotion also how it came about."""
    if entry.kind != "promotion":
        return entry.kind
    return "overrule" if entry.facts.get("overruled") else "rollback" if entry.facts.get("how") == "rollback" else entry.kind


def about(entry: Entry) -> str:
    """Name what a ledger entry is about: the subject, the version, and what the gate answered."""
    version, outcome = entry.facts.get("version"), entry.facts.get("outcome")
    named = f"{entry.subject} {version}" if isinstance(version, int) else entry.subject
    return f"{named}: {outcome}" if entry.kind == "gate" and outcome else named


def why_promoted(made: Sequence[Entry]) -> str:
    """Say why a version was promoted; if more than once, also why the last time.

    Args:
        made: its promotions in order, at least one.
    """
    first = f"the gate was overruled: {made[0].why}" if made[0].facts["overruled"] else made[0].why
    return first if len(made) == 1 else f"{first}; again: {made[-1].why}"


def overruled_verdict(made: Iterable[Entry], gate: Entry | None) -> str | None:
    """Return what the gate said of a version whose promotions all overruled the gate; None: at least one of them did not.

    Args:
        made: its promotions.
        gate: the gate's last decision on it; None: there is none.
    """
    return gate.why if gate and all(e.facts["overruled"] for e in made) else None


def before(subject: str, now: SubjectState) -> int:
    """Return the champion before the present one; skip champions for which the gate was overruled.

    Raises:
        PromotionError: there is none.
    """
    found = [version for version in now.line[:-1] if version in now.passed]
    if not found:
        raise PromotionError(
            f"{subject} has no earlier champion that passed the gate, so there is nothing to go back to; `ferry history` lists what was promoted"
        )
    return found[-1]


@dataclass(frozen=True)
class Alias:
    """The champion alias of a subject in MLflow."""

    version: int | None  # the version that the alias points at; None: there is no alias
    weights: Sha256  # hash of that version's weights; empty if there is none
    follows: int  # number of the ledger entry for which ferry last moved the alias


Answer = Literal["agrees", "put back", "recorded", "refused", "lost"]  # lost: MLflow no longer has the ledger's champion


def reconcile_alias(subject: str, alias: Alias, now: SubjectState, approval: bool) -> tuple[Answer, str]:
    """Decide what to do about a champion alias in MLflow, and why.

    Args:
        subject: LINE/CONFIG/VARIANT.
        alias: the alias in MLflow.
        now: state according to the ledger.
        approval: whether a promotion needs the approval of a named person.

    Returns:
        An answer and its reason. *agrees*: do nothing; *put back*: point the alias at the ledger's champion, or delete the alias
        if there is none; *recorded*: append the promotion to the ledger; *refused*: record the refusal and put the alias back.
    """
    if alias.version == now.version:
        if now.champion and alias.weights != now.weights:
            return (
                "refused",
                f"MLflow and the ledger name different weights for {subject} {alias.version}; restore MLflow from a backup",
            )
        return "agrees", f"{subject} {now.version or 'has no champion'}"
    if alias.follows != now.number:
        return (
            "put back",
            "a promotion was interrupted before MLflow's alias moved, or MLflow was restored; the ledger holds the decision",
        )
    if alias.version is None:
        return "put back", "somebody unknown deleted the alias in MLflow; to take a champion down, use `ferry rollback`"
    if approval:
        return "refused", (
            f"somebody unknown set the alias to version {alias.version} in MLflow, and {subject} needs the approval of a named "
            f"person; use `ferry approve {subject} {alias.version}`"
        )
    try:
        check(subject, alias.version, alias.weights, now)
    except (CatalogError, PromotionError) as error:
        return "refused", f"somebody unknown set the alias to version {alias.version} in MLflow: {error}"
    return "recorded", f"because somebody unknown set the alias to version {alias.version} in MLflow"
