"""Record data revisions of a line together with a data report, and compare them with each other.

The summary of each revision is kept in `work/sketches`, so that a revision is fetched and decoded once for all comparisons.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from model import data_report, folder, versions
from model.data_report import Balance, Changes, DataReport, Drift, FolderSummary
from model.errors import DataError, RevisionError
from model.pictures import READING
from model.scorecard import DataVersion, Frozen


@dataclass(frozen=True)
class LineData:
    """The data of one line, and what recording and comparing its revisions needs."""

    line: str
    root: Path
    """Workspace: the Git and DVC repository."""
    folder: str
    """Data folder, relative to the workspace."""
    text_length: int
    """Bytes of a caption that the line's network reads; longer captions cannot be used."""
    work: Path
    """Folder for summaries (`sketches`) and delivered revisions (`data`); everything in it can be made again."""
    keys: Path
    """Folder of the signing keys, which must never be recorded."""
    remote: str
    """Where DVC keeps the bytes: a URL, or a path; a relative one starts at the workspace."""
    s3_endpoint: str
    """Address of the S3 server of the remote; empty: Amazon's, or the remote is not on S3."""
    locked: Callable[[], AbstractContextManager[None]]
    """Locks the data against another process that records or delivers them."""
    progress: Callable[[str, int, int], None]
    """Called with the step's label, how much is done, and how much there is to do in all."""
    beside: tuple[str, ...] = ()
    """Files of the workspace that a Git clone needs, and that are committed with the data."""


class Status(Frozen):
    """State of a line's data folder, compared with its last revision."""

    revision: DataVersion | None = Field(description="the last recorded revision")
    dirty: bool = Field(description="whether the folder holds something that no revision has")
    changes: Changes = Field(description="the folder against the last revision")
    remote_lacks: list[str] | None = Field(description="files of the revision that the remote does not hold; null: not known")
    remote_error: str = Field(description="why it is not known what the remote lacks; empty: it is known")
    arrival: DataReport = Field(description="what is in the folder; as recorded where it is not dirty")


class Difference(Frozen):
    """Difference of one revision, `after`, from another, `before`."""

    before: DataVersion
    after: DataVersion
    changes: Changes
    balance: Balance
    captions: dict[str, tuple[int, int]] = Field(description="captions whose number of images changed: before and after")
    drift: Drift


def add(data: LineData, message: str) -> tuple[DataVersion, DataReport]:
    """Check a line's data folder, compare it with the last revision, and record and push it together with the data report.

    Raises:
        DataError: the folder holds something that cannot or must not be recorded, or no usable image; nothing is recorded.
        RevisionError: the folder changed in the meantime, or Git, DVC or the remote fails; no revision is made.
    """
    live = _checked(data)
    after = _kept(_place(data, versions.folder_md5(live))) or _scan(
        data, live, data.line
    )  # `versions.add` compares it with the folder
    folder.check_no_copy(after.files, data.keys)
    if not after.names:
        name, why = next(iter(after.quarantine.items()))
        raise DataError(f"no image in {data.folder} can be used; for example, {name} {why}")
    with data.locked():
        data.progress("record and push", 0, 1)
        # ferry.toml may name another remote by now.
        versions.init(data.root, data.remote, data.s3_endpoint)
        found = _reported(data, after)

        def report(md5: str) -> str:
            return found.model_copy(update={"md5": md5}).model_dump_json(indent=1) + "\n"

        version = versions.add(data.root, data.folder, data.line, message, report, after.files, data.beside)
        data.progress("record and push", 1, 1)
    after.save(_place(data, version.md5))
    kept = recorded(data.root, version)
    return version, kept if kept and kept.reading == READING else found.model_copy(update={"md5": version.md5})


def recorded(root: Path, version: DataVersion) -> DataReport | None:
    """Return the data report that was recorded with a revision; None: there is none, or another version of ferry wrote it."""
    text = versions.report_of(root, version)
    try:
        found = DataReport.model_validate_json(text) if text else None
    except ValidationError:
        return None
    return found if found and found.md5 == version.md5 else None


def status(data: LineData) -> Status:
    """Compare the data folder with its last revision, find what the remote lacks of that revision, and report on the content.

    Raises:
        DataError: the folder cannot be read, or holds something that cannot or must not be recorded.
        RevisionError: Git does not have the revision.
    """
    live = _checked(data)
    rows = versions.log(data.root, data.folder, data.line, newest=1)
    last = rows[0][0] if rows else None
    lacks: list[str] | None = None
    error = "" if last else "nothing is recorded yet"
    if last:
        try:
            lacks = versions.missing(data.root, last)
        except RevisionError as refusal:
            error = str(refusal)
    dirty = last is None or versions.is_dirty(data.root, data.folder)
    moved = data_report.file_changes({}, {})
    found = recorded(data.root, last) if last and not dirty else None
    if found is None or found.reading != READING:  # an older ferry read the same images by other rules
        after = _scan(data, live, data.line) if dirty or not last else _read_again(data, live, last)
        found = _reported(data, after)
        if dirty:
            before = _summary(data, last)[0] if last else None
            listed = versions.files(data.root, last) if last and before is None else {}
            moved = data_report.changes(after, before) if before else data_report.file_changes(after.files, listed)
    return Status(revision=last, dirty=dirty, changes=moved, remote_lacks=lacks, remote_error=error, arrival=found)


def check(data: LineData) -> DataReport:
    """Check a line's data folder as `add` does, and report on it; nothing is recorded.

    Raises:
        DataError: the folder holds something that cannot or must not be recorded, or names no usable image.
        RevisionError: Git cannot read the repository.
    """
    after = _scan(data, _checked(data), data.line)
    folder.check_no_copy(after.files, data.keys)
    return _reported(data, after)


def check_folder(place: Path, text_length: int, progress: Callable[[str, int, int], None]) -> DataReport:
    """Check any folder as a line's data folder, and report on it.

    Args:
        place: the folder.
        text_length: bytes of a caption that the network reads.
        progress: called with the step's label, how much is done, and how much there is to do in all.

    Raises:
        DataError: the folder holds something that no revision can hold, or names no usable image.
    """
    from model.data import scan

    whole = place.resolve() if place.name in ("", "..") else place.parent.resolve() / place.name  # a link itself is refused
    live = folder.check(whole.parent, whole.name) if whole.name else whole
    after = scan(live, text_length, lambda done, total: progress(f"check {whole.name}", done, total))
    return data_report.report_on(after, None, None, line="")


def diff(data: LineData, rev1: str, rev2: str) -> Difference:
    """Compare two revisions: find what each has that the other has not.

    A revision whose summary is not kept yet is fetched and verified first.

    Raises:
        RevisionError: a revision does not exist, or cannot be fetched completely.
    """
    before, after = (versions.resolve(data.root, data.folder, data.line, rev) for rev in (rev1, rev2))
    old, new = (_fetched(data, version) for version in (before, after))
    balances = {caption: (old.captions.count(caption), new.captions.count(caption)) for caption in {*old.captions, *new.captions}}
    return Difference(
        before=before, after=after, changes=data_report.changes(new, old), balance=data_report.balance(new, old),
        captions={caption: counts for caption, counts in sorted(balances.items()) if counts[0] != counts[1]},
        drift=data_report.drift(new, old),
    )  # fmt: skip


def _reported(data: LineData, after: FolderSummary) -> DataReport:
    """Report on the folder against the last revision with other content, so that it is never compared with itself."""
    md5 = versions.list_md5(after.files)
    rows = versions.log(data.root, data.folder, data.line, newest=2)
    previous = next((version for version, _ in rows if version.md5 != md5), None)
    before, why_not = _summary(data, previous) if previous else (None, "")
    return data_report.report_on(after, before, previous, data.line, why_not)


def _summary(data: LineData, version: DataVersion) -> tuple[FolderSummary | None, str]:
    """Return a revision's summary, or the reason why there is none; new data are recorded without the comparison, too."""
    try:
        return _fetched(data, version), ""
    except DataError as error:
        return None, str(error)


def _fetched(data: LineData, version: DataVersion) -> FolderSummary:
    place = _place(data, version.md5)
    if kept := _kept(place):
        return kept
    pulled = versions.pull(data.root, version, data.work / "data")
    made = _scan(data, pulled, f"{data.line} {version.rev[:7]}")
    made.save(place)
    return made


def _read_again(data: LineData, live: Path, last: DataVersion) -> FolderSummary:
    """Return the summary of the unchanged data folder, and keep it for the next call."""
    place = _place(data, last.md5)
    if (kept := _kept(place)) is None:
        kept = _scan(data, live, data.line)
        kept.save(place)
    return kept


def _kept(place: Path) -> FolderSummary | None:
    try:
        return FolderSummary.load(place)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # missing or incomplete
        return None


def _place(data: LineData, md5: str) -> Path:
    key = json.dumps([data_report.SUMMARY_SCHEMA, READING, md5, data.text_length])
    return data.work / "sketches" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def _checked(data: LineData) -> Path:
    """Check that the data folder holds nothing that cannot or must not be recorded, and return its path."""
    live = folder.check(data.root, data.folder)
    folder.check_apart(live, data.keys)
    return live


def _scan(data: LineData, place: Path, label: str) -> FolderSummary:
    from model.data import scan  # imports torch, which is not needed to refuse a folder for its names

    return scan(place, data.text_length, lambda done, total: data.progress(f"check {label}", done, total))
