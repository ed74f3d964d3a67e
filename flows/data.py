"""Record data revisions of a line together with a data report, and compare them with each other.

The summary of each revision is kept in `work/sketches`, so that a revision is fetched and decoded once for all comparisons.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from pydantic import Field, ValidationError

from flows import progress
from flows.settings import Line
from flows.workspace import Workspace
from model import data_report, folder, versions
from model.data_report import Balance, Changes, DataReport, Drift, FolderSummary
from model.errors import DataError, RevisionError
from model.scorecard import DataVersion, Frozen


class Status(Frozen):
    """State of a line's data folder, compared with its last revision."""

    revision: DataVersion | None = Field(description="the last one recorded")
    dirty: bool = Field(description="whether the folder holds something that no revision has")
    changes: Changes = Field(description="the folder against the last revision")
    remote_lacks: list[str] | None = Field(description="files of the revision that the remote does not hold; null: not known")
    remote_error: str = Field(description="why that is not known")
    arrival: DataReport = Field(description="what is in the folder; as recorded where it is not dirty")


class Difference(Frozen):
    """Difference of one revision, `after`, from another, `before`."""

    before: DataVersion
    after: DataVersion
    changes: Changes
    balance: Balance
    captions: dict[str, tuple[int, int]] = Field(description="captions whose number of images changed: before and after")
    drift: Drift


def add(workspace: Workspace, line: str, message: str) -> tuple[DataVersion, DataReport]:
    """Check a line's data folder, compare it with the last revision, and record and push it together with the data report.

    Raises:
        DataError: the folder holds something that cannot or must not be recorded, or no usable image; nothing is recorded.
        RevisionError: the folder changed in the meantime, or Git, DVC or the remote fails; no revision is made.
    """
    settings = workspace.line(line)
    after = _scan(_checked(workspace, settings), settings, line)
    folder.check_no_copy(after.files, workspace.root / "keys")
    if not after.names:
        name, why = next(iter(after.quarantine.items()))
        raise DataError(f"not one image in {settings.data} can be used, the first: {name} {why}")
    with workspace.locked("data"):
        progress.advance("record and push", 0, 1)
        # ferry.toml may name another remote by now.
        versions.init(workspace.root, workspace.data_remote, workspace.settings.stores.s3_endpoint)
        found = _reported(workspace, line, after)

        def report(md5: str) -> str:
            return found.model_copy(update={"md5": md5}).model_dump_json(indent=1) + "\n"

        version = versions.add(workspace.root, settings.data, line, message, report, after.files)
        progress.advance("record and push", 1, 1)
    after.save(_place(workspace, settings, version.md5))
    return version, recorded(workspace, version) or found.model_copy(update={"md5": version.md5})


def recorded(workspace: Workspace, version: DataVersion) -> DataReport | None:
    """Return the data report that was recorded with a revision; None: there is none, or another version of ferry wrote it."""
    text = versions.report_of(workspace.root, version)
    try:
        found = DataReport.model_validate_json(text) if text else None
    except ValidationError:
        return None
    return found if found and found.md5 == version.md5 else None


def status(workspace: Workspace, line: str) -> Status:
    """Compare the data folder with its last revision, find what the remote lacks of that revision, and report on the content.

    Raises:
        DataError: the folder cannot be read, or holds something that cannot or must not be recorded.
        RevisionError: Git does not have the revision.
    """
    settings = workspace.line(line)
    live = _checked(workspace, settings)
    rows = versions.log(workspace.root, settings.data, line, newest=1)
    last = rows[0][0] if rows else None
    lacks: list[str] | None = None
    error = "" if last else "nothing is recorded yet"
    if last:
        try:
            lacks = versions.missing(workspace.root, last)
        except RevisionError as refusal:
            error = str(refusal)
    dirty = last is None or versions.is_dirty(workspace.root, settings.data)
    moved = data_report.file_changes({}, {})
    found = recorded(workspace, last) if last and not dirty else None
    if found is None:
        after = _scan(live, settings, line)
        found = _reported(workspace, line, after)
        if dirty:
            before = _summary(workspace, line, last)[0] if last else None
            listed = versions.files(workspace.root, last) if last and before is None else {}
            moved = data_report.changes(after, before) if before else data_report.file_changes(after.files, listed)
    return Status(revision=last, dirty=dirty, changes=moved, remote_lacks=lacks, remote_error=error, arrival=found)


def diff(workspace: Workspace, line: str, rev1: str, rev2: str) -> Difference:
    """Compare two revisions: find what each has that the other has not.

    A revision whose summary is not kept yet is fetched and verified first.

    Raises:
        RevisionError: a revision does not exist, or cannot be fetched completely.
    """
    settings = workspace.line(line)
    before, after = (versions.resolve(workspace.root, settings.data, line, rev) for rev in (rev1, rev2))
    old, new = (_fetched(workspace, line, version) for version in (before, after))
    balances = {caption: (old.captions.count(caption), new.captions.count(caption)) for caption in {*old.captions, *new.captions}}
    return Difference(
        before=before, after=after, changes=data_report.changes(new, old), balance=data_report.balance(new, old),
        captions={caption: counts for caption, counts in sorted(balances.items()) if counts[0] != counts[1]},
        drift=data_report.drift(new, old),
    )  # fmt: skip


def _reported(workspace: Workspace, line: str, after: FolderSummary) -> DataReport:
    """Report on the folder against the last revision with other content, so that it is never compared with itself."""
    md5 = versions.list_md5(after.files)
    rows = versions.log(workspace.root, workspace.line(line).data, line, newest=2)
    previous = next((version for version, _ in rows if version.md5 != md5), None)
    before, why_not = _summary(workspace, line, previous) if previous else (None, "")
    return data_report.report_on(after, before, previous, line, why_not)


def _summary(workspace: Workspace, line: str, version: DataVersion) -> tuple[FolderSummary | None, str]:
    """Return a revision's summary, or the reason why there is none; new data are recorded without the comparison, too."""
    try:
        return _fetched(workspace, line, version), ""
    except DataError as error:
        return None, str(error)


def _fetched(workspace: Workspace, line: str, version: DataVersion) -> FolderSummary:
    settings = workspace.line(line)
    place = _place(workspace, settings, version.md5)
    try:
        return FolderSummary.load(place)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # missing or incomplete
        pulled = versions.pull(workspace.root, version, workspace.work / "data")
        made = _scan(pulled, settings, f"{line} {version.rev[:7]}")
        made.save(place)
        return made


def _place(workspace: Workspace, settings: Line, md5: str) -> Path:
    key = json.dumps([data_report.SUMMARY_SCHEMA, md5, settings.text_length])
    return workspace.work / "sketches" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def _checked(workspace: Workspace, settings: Line) -> Path:
    """Check that a line's data folder holds nothing that cannot or must not be recorded, and return its path."""
    live = folder.check(workspace.root, settings.data)
    folder.check_apart(live, workspace.root / "keys")
    return live


def _scan(place: Path, settings: Line, label: str) -> FolderSummary:
    from model import data  # imports torch, which is not needed to refuse a folder for its names

    return data.scan(place, settings.text_length, lambda done, total: progress.advance(f"check {label}", done, total))
