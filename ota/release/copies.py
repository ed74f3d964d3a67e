"""Compare what is published with a repository, so that of two copies of a workspace the older one overwrites nothing.

A copy of a workspace has the same keys, so signatures do not tell two copies apart. Their history does: every state that a repository
was in keeps its snapshot in the folder of the metadata, and what is published must be one of these states.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tuf.api.metadata import Metadata, Timestamp
from tuf.api.serialization import DeserializationError

from ota.errors import OperatorError, printable
from ota.release import store
from ota.release.metadata import load
from ota.release.repository import Repository

TIMESTAMP = "metadata/timestamp.json"


class Published(NamedTuple):
    """What is published, beside the repository of this workspace."""

    theirs: int
    """Version of the published timestamp; 0: nothing is published."""
    ours: int
    """Version of the repository's timestamp."""
    foreign: str
    """Who published it, if not a state of this repository; empty: it is one, or nothing is published."""


def compare(repository: Repository, url: str, base: Path, endpoint: str | None = None) -> Published:
    """Find out whether what is published is a state of this repository.

    Metadata that cannot be read count as not published, so that publishing again repairs them.

    Raises:
        OperatorError, TransferError: the place cannot be read, as `store.publish`.
    """
    ours = int(repository.in_force("timestamp").signed.version)
    place = (url, base, endpoint)
    there = store.read(TIMESTAMP, *place)
    try:
        found = Metadata[Timestamp].from_bytes(there).signed if there else None
    except DeserializationError:
        found = None
    if there is None or found is None:
        return Published(0, ours, "")
    root = store.read("metadata/1.root.json", *place)
    if root is not None and root != repository.root_bytes():
        return Published(found.version, ours, "another workspace, which has other keys, published there")
    known = (found.version < ours or there == (repository.folder / TIMESTAMP).read_bytes()) and _holds(
        repository, found.snapshot_meta.version, place
    )
    return Published(found.version, ours, "" if known else "another copy of this workspace published there")


def _holds(repository: Repository, snapshot: int, place: tuple[str, Path, str | None]) -> bool:
    """Check whether a published snapshot, and all metadata that it lists, are also in the repository, byte for byte.

    Two copies that sign different things in the same second make equal snapshots, which hold only numbers and times.
    """
    name = f"{snapshot}.snapshot.json"
    if not _same(repository, name, place):
        return False
    meta = load(repository.metadata / name).signed.meta
    return all(_same(repository, f"{file.version}.{role}", place) for role, file in meta.items())


def _same(repository: Repository, name: str, place: tuple[str, Path, str | None]) -> bool:
    here = repository.metadata / name
    return here.is_file() and store.read(f"metadata/{name}", *place) == here.read_bytes()


def check(repository: Repository, url: str, base: Path, endpoint: str | None = None) -> None:
    """Refuse to overwrite what is published, unless it is a state that this repository was in.

    Raises:
        OperatorError: another copy of the workspace, or another workspace, published it; or the place is none.
        TransferError: the place cannot be read.
    """
    theirs, ours, foreign = compare(repository, url, base, endpoint)
    if foreign:
        raise OperatorError(
            f"{foreign} (timestamp {theirs}, here {ours}), so publishing to {printable(url, 200)} would take devices back; go on in the "
            "copy that published last; to take over with this one, first copy what is published into repository/"
        )
