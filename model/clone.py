"""A workspace at another path, and a Git clone of one: where their data come from.

The Git repository holds the names and hashes of the data. The bytes are in the DVC remote, which is often a folder of the workspace,
so that a clone does not have it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from model import versions
from model.errors import OwnerError, RevisionError
from model.folder import hashes, inside, shown
from model.git import run as git
from model.scorecard import DataVersion

if TYPE_CHECKING:
    from model.revisions import LineData


def follow(root: Path, remote: str, s3_endpoint: str = "") -> None:
    """Let DVC's configuration name a remote in the workspace by a relative path, where an older ferry wrote an absolute one.

    Only an address that ferry itself wrote, here or before the workspace was moved, is replaced.
    """
    if "://" in remote or Path(remote).is_absolute():
        return
    try:
        text = (root / ".dvc" / "config").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # no clone of a workspace, or not ours
    found = re.search(r"^\s*url\s*=\s*[\"']?(/.*?)[\"']?\s*$", text, re.MULTILINE)
    if found and Path(found[1]).parts[-len(Path(remote).parts) :] == Path(remote).parts and os.access(root / ".dvc", os.W_OK):
        versions.init(root, remote, s3_endpoint)


def deliver(data: LineData, say: Callable[[str], None]) -> DataVersion:
    """Put the data of the current revision into their folder; a folder that holds unrecorded data is left alone.

    The caller locks the data.

    Args:
        data: of the line.
        say: called with a sentence about where the data come from, if it is not the remote.

    Returns:
        the revision.

    Raises:
        RevisionError: nothing is recorded, the folder holds data that no revision has, or the remote lacks objects.
        DataError: the folder contains something that no revision can hold.
    """
    root, path, line = data.root, data.folder, data.line
    version = versions.resolve(root, path, line)
    folder = inside(root, path)
    present = versions.list_md5(hashes(folder)) if folder.is_dir() and any(folder.iterdir()) else ""
    if present == version.md5:
        return version
    if present and present not in {known.md5 for known, _ in versions.log(root, path, line)}:
        raise RevisionError(
            f"{path} holds data that no revision has, and pulling would replace them; record them with `ferry data add {line}`, or move "
            "that folder away"
        )
    data.progress(f"fetch {line}", 0, 2)
    _fetch(data, version, say)
    data.progress(f"fetch {line}", 1, 2)
    place = versions.pull(root, version, data.work / "data")
    data.work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data.work, prefix="pulled-") as beside:
        shutil.copytree(place, Path(beside) / "new")
        if folder.exists():
            shutil.move(folder, Path(beside) / "old")  # work/ may be on another disk
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(beside) / "new", folder)
    data.progress(f"fetch {line}", 2, 2)
    return version


def _fetch(data: LineData, version: DataVersion, say: Callable[[str], None]) -> None:
    """Fill DVC's cache with the objects of the current revision, from the remote or from the repository that this one is a clone of.

    Raises:
        RevisionError: there is no remote here, or it lacks objects.
    """
    root, remote, source = data.root, data.remote, data.remote
    if "://" not in remote:
        source = str(root / remote)
        if not _holds(Path(source), version) and (original := origin(root)) and _holds(original / remote, version):
            source = str(original / remote)
            say(f"{remote} is not in this clone; the data come from {shown(source)}")
        if not _holds(Path(source), version) and not _holds(root / ".dvc" / "cache", version):
            raise RevisionError(
                f"the bytes of {version.line} are not here: the DVC remote {shown(source)} does not hold revision {version.rev[:12]}. A "
                "remote in a folder of the workspace is not part of a Git clone; copy that folder from the original, or name where it "
                f"is, as in `FERRY_STORES_DATA=/mnt/{shown(Path(remote).name)} ferry data pull {version.line}`"
            )
    settings = {"url": source, "verify": True} | (
        {"endpointurl": data.s3_endpoint} if data.s3_endpoint and "://" in source else {}
    )
    given = {**versions.OURS, "remote": {versions.STORAGE: settings}}
    given["core"] = {**versions.OURS["core"], "remote": versions.STORAGE}
    with versions.dvc_errors(root):
        from dvc.repo import Repo

        repo = Repo(str(root), config=given)
        try:
            repo.fetch(targets=[str(root / f"{version.path}.dvc")])
        finally:
            repo.close()


def _holds(remote: Path, version: DataVersion) -> bool:
    """Check whether a remote or cache in a folder has a revision's list of files."""
    return (remote / "files" / "md5" / version.md5[:2] / version.md5[2:]).is_file()


def origin(root: Path) -> Path | None:
    """Return the folder of the repository that a workspace was cloned from; None: it is not a clone, or not of a folder here."""
    try:
        told = git(root, "config", "--get", "remote.origin.url")
    except (OwnerError, RevisionError):
        return None
    parts = urlsplit(told)
    place = Path(unquote(parts.path)) if parts.scheme == "file" else Path(told)
    return place if place.is_absolute() and place.is_dir() else None
