"""Figures of a registered version: those of its scorecard, those that `ferry remeasure` recorded since, and an FID on request.

Figures in different feature spaces are never compared. So a line keeps its spaces until somebody asks for new ones: because a
newer ferry measures in more of them, or because captions have come that the old spaces never saw. From then on the gate compares
only figures in the new spaces. Scorecards stay as they are. The ledger gets the new figures of those versions with which
challengers are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pydantic import Field, ValidationError

from model.folder import shown
from model.scorecard import CaptionCheck, Frozen, PublishedFid, Quality, Scorecard, Sha256
from registry.catalog import Subject
from registry.champions import Records, anchor_of, champion_of, judged, sealed
from registry.errors import CatalogError, LedgerError
from registry.lineage import file_sha256
from registry.seal import Seal


class MeasuredRecords(Records, Protocol):
    """The records of promotions, and the files of the feature spaces in which the figures are measured."""

    def feature_spaces(self, line: str) -> Path:
        """Name the file of a line's present feature spaces; it need not exist."""


class Figures(Frozen):
    """Figures of a version that was measured anew, as the ledger holds them."""

    version: int
    weights: Sha256
    spaces: Sha256 = Field(description="hash of the feature spaces")
    before: Sha256 = Field(description="of those that the line had until then")
    data_rev: str = Field(description="revision on which the spaces were fitted and whose held-out images were compared with")
    data_md5: str
    quality: list[Quality]
    asked: list[CaptionCheck]


class Measured(Frozen):
    """A version and its figures."""

    subject: str
    version: int
    champion: bool
    outcome: str
    reason: str
    scorecard: Scorecard
    current: bool = True
    """Whether its scorecard has figures in the line's present feature spaces."""
    anew: Figures | None = None
    """Figures from `ferry remeasure` in the line's present feature spaces; None: it did not measure this version in them."""
    fid: PublishedFid | None = None
    images: str | None = None
    """The folder that the FID compares with."""

    @property
    def text(self) -> str:
        """The figures as a short table."""
        card = self.scorecard
        cost, drawn, usage = card.cost, card.sampler, card.usage
        head = f"{self.subject} version {self.version}{' (champion)' if self.champion else ''}"
        rows = [
            shown(f"{head}: {self.outcome}, {self.reason}"),
            "",
            f"{'held-out':10}{'features':10}{'n':>6}{'kd':>10}{'± se':>9}{'fd':>9}{'coverage':>10}{'precision':>11}{'recall':>8}",
            *(
                f"{q.split:10}{q.space:10}{q.n:6d}{q.kd:10.4f}{q.kd_se:9.4f}{q.fd:9.2f}{q.coverage:10.2f}{q.precision:11.2f}{q.recall:8.2f}"
                for q in (self.anew.quality if self.anew else card.quality)
            ),
            *self._measured_in(),
            "",
            f"experts   {usage.dead} dead of {sum(map(len, usage.load))}",
            f"time      {cost.milliseconds:.1f} ms for an image, one thread, {cost.machine}",
            f"memory    {cost.peak_mib:.1f} MiB at its peak, {cost.bare_mib:.1f} MiB of it before a model is loaded",
            f"sampler   {drawn.method}, {drawn.steps} steps, guidance {drawn.guidance:g}: {drawn.evaluations} network evaluations",
        ]
        if fid := self.fid:
            rows.append(
                f"FID       {fid.fid:.2f}: {fid.n:,} images drawn, {fid.reference:,} of {self.images}, {fid.dimensions} dimensions of "
                f"the network {fid.features_sha256}"
            )
        return "\n".join(rows)

    def _measured_in(self) -> list[str]:
        """Say in which feature spaces the figures are, where these are not the scorecard's or not the line's present ones."""
        if self.anew:
            rev = self.anew.data_rev[:12]
            return [
                f"measured anew by `ferry remeasure` on data revision {rev}; the gate decided by the figures of the scorecard"
            ]
        if self.current:
            return []
        return [
            "measured in feature spaces that the line had before `ferry remeasure`; do not compare with figures in the present ones"
        ]


class Remeasured(Frozen):
    """Result of a call of `ferry remeasure`."""

    line: str
    spaces: list[str]
    spaces_sha256: Sha256
    before: Sha256
    data_rev: str
    versions: list[str] = Field(description="measured by this call; a killed one before it may have measured others")

    @property
    def text(self) -> str:
        """The result in a sentence or two."""
        spaces = f"{', '.join(self.spaces)} features"
        if not self.versions and self.spaces_sha256 == self.before:
            return f"{self.line} already measures in these {spaces}; nothing was changed"
        return (
            f"{self.line} now measures in {spaces} of data revision {self.data_rev[:12]}; this call measured "
            f"{', '.join(self.versions) or 'nothing that a call before it had not'}. Figures from before stay in their scorecards and are not "
            "compared with new ones."
        )


def find(records: Records, subject: Subject, number: int | None = None) -> Seal:
    """Find a version as the gate saw it; without a number, find the champion.

    Raises:
        CatalogError: there is no such version or champion, or the gate never saw it.
    """
    if number is not None:
        return sealed(records, subject, number)
    champion = champion_of(records, subject)
    if champion is None:
        known = ", ".join(str(version.number) for version in records.catalog.versions(subject))
        raise CatalogError(
            f"{subject} has no champion; "
            + (f"name one of its versions, {known}" if known else f"run `ferry retrain {subject.line}`")
        )
    return champion


def registered(records: MeasuredRecords, version: Seal) -> Measured:
    """Return the figures of a version that are on record: those of its scorecard, and those measured anew.

    Raises:
        CatalogError, SealError, StoreError: as `Catalog.card`.
        LedgerError: a newer ferry measured it.
    """
    card, subject = records.catalog.card(version), Subject.parse(version.subject)
    said, champion = judged(records, subject)[version.version], champion_of(records, subject)
    present = records.feature_spaces(subject.line)
    return Measured(
        subject=version.subject, version=version.version, champion=champion is not None and champion.version == version.version,
        outcome=said.facts["outcome"], reason=said.why, scorecard=card, anew=figures(records, subject, version.version),
        current=not present.is_file() or file_sha256(present) in {q.space_sha256 for q in card.quality},
    )  # fmt: skip


def figures(records: MeasuredRecords, subject: Subject, version: int, spaces: Sha256 | None = None) -> Figures | None:
    """Find a version's recorded figures in these feature spaces, by default the line's present ones; None: there are none.

    Only `ferry remeasure` records figures. Those of a version that it never measured are in the scorecard.

    Raises:
        LedgerError: a newer ferry measured it.
    """
    entries = [e for e in records.ledger.entries(str(subject)) if e.kind == "measured" and e.facts["version"] == version]
    if not entries:
        return None
    present = records.feature_spaces(subject.line)
    wanted = spaces or (file_sha256(present) if present.is_file() else None)
    try:
        found = [Figures.model_validate(e.facts) for e in entries if e.facts["spaces"] == wanted]
    except ValidationError as error:
        raise LedgerError(f"a newer version of ferry measured {subject} version {version}; update ferry") from error
    return found[-1] if found else None


def compared_with(records: Records, subjects: Iterable[Subject]) -> list[Seal]:
    """List the versions with which challengers are compared: the champion of each subject and, if it is another, the anchor.

    Raises:
        CatalogError: MLflow does not have a champion any more, or an older ferry kept no hashes of one.
    """
    pairs = [(champion, anchor_of(records, subject)) for subject in subjects if (champion := champion_of(records, subject))]
    return [version for pair in pairs for version in {seal.version: seal for seal in pair if seal}.values()]


def record(records: Records, made: Iterable[tuple[Seal, Figures]], why: str) -> None:
    """Record the figures of versions that were measured anew in the ledger.

    Args:
        records: whose ledger.
        made: versions and their figures.
        why: reason that a person gave.

    Raises:
        StoreError, LedgerError, BusyError: the ledger cannot be written.
    """
    with records.locked("records"):
        for version, measured in made:
            records.ledger.append("measured", version.subject, why, measured.model_dump(mode="json"))
