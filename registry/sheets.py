"""Answer sheets of blind ratings: which versions are compared, where the sheets are kept, and how answers come into the ledger.

The rules are in `registry.rating`. A sheet says which version drew which image; the page that raters see does not contain it.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from registry import rating
from registry.catalog import Subject
from registry.champions import Records, champion_of, judged, promotions, sealed
from registry.errors import CatalogError, RatingError
from registry.rating import MAX_ANSWERS, Answers, Rated, Sheet, Verdict
from registry.seal import Seal


def couple(records: Records, subject: Subject, version: int | None, against: int | None) -> tuple[Seal, Seal]:
    """Choose the two versions to compare: the one to rate, and the one before it.

    Args:
        records: the catalogue and the ledger.
        subject: whose versions.
        version: version to rate; None: the newest if it is newer than the champion, otherwise the champion.
        against: version to compare with; None: the champion, or for the champion itself the last one before it.

    Raises:
        CatalogError: there are no two versions to compare.
    """
    known = [v.number for v in records.catalog.versions(subject) if v.number in judged(records, subject)]
    if len(known) < 2:
        raise CatalogError(
            f"{subject} has {len(known) or 'no'} version{'s' * (len(known) != 1)}, but a comparison needs two; run `ferry "
            f"retrain {subject.line}`"
        )
    present = champion_of(records, subject)
    champion = present.version if present else None
    others = [number for number in known if number != champion]
    newest = others[-1] if champion is None or others[-1] > champion else champion
    challenger = sealed(records, subject, version or newest)
    if against:
        return challenger, sealed(records, subject, against)
    if present and champion != challenger.version:
        return challenger, present
    was = [e.facts["version"] for e in promotions(records, subject) if e.facts["version"] != challenger.version]
    if not was:
        raise CatalogError(f"{subject} version {challenger.version} has replaced no other version; name one with --against")
    return challenger, sealed(records, subject, was[-1])


def open_sheet(folder: Path, identity: str) -> Sheet:
    """Read an answer sheet of this workspace.

    Raises:
        RatingError: the workspace has no sheet of this name, or the file is damaged.
    """
    path = folder / f"{identity}.json"
    try:
        return Sheet.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RatingError(f"this workspace made no sheet {identity}; collect the answers in the workspace that made it") from None
    except ValidationError as error:
        raise RatingError(f"{path} is damaged; restore it from a backup, or ask the raters again") from error


def collect(records: Records, folder: Path, subject: str, files: list[Path]) -> list[Rated]:
    """Record the answers in files that raters sent back; answers that were recorded before change nothing.

    Args:
        records: the ledger.
        folder: of the answer sheets.
        subject: LINE/CONFIG/VARIANT.
        files: with answers.

    Raises:
        RatingError: a file holds no answers to a sheet of this workspace and subject, and nothing was recorded; also as `keep`.
        StoreError: as `keep`.
    """
    found = []
    for path in files:
        with path.open("rb") as file:
            answers = rating.read(file.read(MAX_ANSWERS + 1))
        sheet = open_sheet(folder, answers.sheet)
        if sheet.subject != subject:
            raise RatingError(
                f"{path} answers a sheet of {sheet.subject}; collect it with `ferry rate {sheet.subject} --answers`"
            )
        found.append((sheet, answers))
    return [keep(records, sheet, answers) for sheet, answers in found]


def keep(records: Records, sheet: Sheet, answers: Answers) -> Rated:
    """Record a finished sheet in the ledger; the same answers again change nothing.

    Raises:
        RatingError: the answers do not fit the sheet, or this rater gave other answers before.
        StoreError: the database failed; nothing was recorded.
    """
    rated = rating.decode(sheet, answers)
    with records.locked("records"):
        for known in _rated(records, sheet.subject):
            if (known.sheet, known.rater.casefold()) == (rated.sheet, rated.rater.casefold()):
                if known.choices != rated.choices:
                    raise RatingError(f"{rated.rater} has answered this sheet already; the first answers count")
                return known
        wins, losses = rated.choices.count("challenger"), rated.choices.count("before")
        records.ledger.append(
            "rating", sheet.subject,
            f"{rated.rater}, blind, preferred version {sheet.challenger} over {sheet.before} in {wins} of {wins + losses} pairs, "
            f"{len(rated.choices) - wins - losses} alike",
            rated.model_dump(mode="json"),
        )  # fmt: skip
    return rated


def verdicts(records: Records, subject: str) -> list[Verdict]:
    """Combine all finished sheets of a subject; return one result for each two versions that were compared."""
    return rating.judge(_rated(records, subject))


def _rated(records: Records, subject: str) -> list[Rated]:
    return [Rated.model_validate(e.facts) for e in records.ledger.entries(subject) if e.kind == "rating"]
