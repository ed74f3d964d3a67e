"""Signed metadata: python-tuf's client for what it proves, and a durable memory for what it forgets.

The client keeps no promise about power cuts: it never syncs, and where its cache is torn it starts from the root again and
would accept an old repository. So the newest version of every role that was ever accepted is kept in `highwater.json`, and
an older one is refused even when the cache is gone. The trust anchor is handed to the client on every call for the
same reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import Metadata, TargetFile
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from ota.agent import rules
from ota.agent.state import HighWater, Home
from ota.agent.transport import NotFoundError, Transport, read_small
from ota.errors import ExpiredError, RepositoryError, StateError, TransferError, TrustError
from ota.manifest import KiB

# Limits on what an attacker could make long; far above what a repository of ours needs.
LIMITS = UpdaterConfig(
    max_root_rotations=256, max_delegations=8, root_max_length=64 * KiB, timestamp_max_length=16 * KiB,
    snapshot_max_length=64 * KiB, targets_max_length=1024 * KiB, app_user_agent="deltaferry-agent",
)  # fmt: skip
TOP_ROLES = ("root", "timestamp", "snapshot", "targets")  # a lost root would bring back keys that were taken out of it


@dataclass(frozen=True)
class Target:
    """A file that the metadata name, with what is signed about it."""

    name: str
    size: int
    sha256: str
    custom: dict[str, Any]

    @property
    def published_as(self) -> str:
        """Its name in the repository: consistent snapshots put the hash before the last part."""
        folder, _, last = self.name.rpartition("/")
        return f"targets/{folder}/{self.sha256}.{last}"


class Trust:
    """One look at the repository: everything that it returns is signed, fresh, and not older than what was seen before."""

    def __init__(self, home: Home, transport: Transport) -> None:
        """Fetch and check the metadata.

        Raises:
            TrustError: a signature, version, expiry or the clock does not hold.
            TransferError: the repository cannot be reached.
        """
        self._home, self._transport = home, transport
        now = int(time.time())
        rules.check_clock(now, home.high_water().time)
        folder = home.disk.path("metadata")
        home.disk.make_folder("metadata")
        with _foreign_errors():
            self._updater = Updater(
                str(folder), "metadata/", fetcher=_Fetcher(transport), config=LIMITS, bootstrap=home.root_bytes()
            )
            self._updater.refresh()
        self._remember(now, TOP_ROLES)

    def target(self, name: str) -> Target | None:
        """What is signed about a target; None if nothing is.

        Raises:
            ExpiredError: the role that could name it was not renewed.
            TrustError: it does not hold.
            TransferError: the repository cannot be reached.
        """
        with _foreign_errors():
            found: TargetFile | None = self._updater.get_targetinfo(name)
        self._remember(int(time.time()), (*TOP_ROLES, name.partition("/")[0]))
        if found is None:
            return None
        if "sha256" not in found.hashes:
            raise TrustError(f"{name} is signed without a sha256; nothing of it is used")
        return Target(name, found.length, found.hashes["sha256"], found.custom if isinstance(found.custom, dict) else {})

    def read(self, target: Target, limit: int) -> bytes:
        """A small target's bytes, checked against what is signed.

        Raises:
            RepositoryError: it is longer than `limit` or than signed, or has another hash.
            TransferError: it cannot be fetched.
        """
        if target.size > limit:
            raise RepositoryError(f"{target.name} is signed with {target.size} bytes, more than {limit}; nothing of it is used")
        data = read_small(self._transport, target.published_as, target.size)
        with _foreign_errors():
            TargetFile(target.size, {"sha256": target.sha256}, target.name).verify_length_and_hashes(data)
        return data

    def _remember(self, now: int, roles: tuple[str, ...]) -> None:
        """Compare the versions of roles that were just loaded with the marks, and raise the marks.

        Other roles' files in the cache may be of any age, or torn: the client looks at them only when it needs them.
        """
        marks = self._home.high_water()
        found: dict[str, int] = {}
        for role in roles:
            path = self._home.disk.path(f"metadata/{role}.json")
            if path.is_file():
                with _foreign_errors():
                    found[role] = Metadata[Any].from_file(str(path)).signed.version
        rules.check_versions(found, marks.versions)
        highest = {role: max(found.get(role, 0), marks.versions.get(role, 0)) for role in found.keys() | marks.versions.keys()}
        # The clock is remembered to the hour: it is a floor, and need not cost a write on every call.
        self._home.raise_high_water(HighWater(versions=highest, time=max(marks.time, now - now % 3600)))


class _Fetcher(FetcherInterface):
    """Lets python-tuf's client fetch through our transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _fetch(self, url: str) -> Iterator[bytes]:
        pieces = self._transport.read(url)
        try:
            first = next(pieces, b"")
        except NotFoundError as error:
            raise DownloadHTTPError(str(error), 404) from error
        return self._rest(first, pieces)

    @staticmethod
    def _rest(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
        yield first
        yield from pieces


class _foreign_errors:  # noqa: N801 - used as a statement
    """Translate python-tuf's exceptions."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ExpiredMetadataError):
            raise ExpiredError(
                f"the repository's signatures have expired ({error}); the running model is kept, the factory must sign anew"
            ) from error
        if isinstance(error, DownloadHTTPError):
            raise TransferError(f"the repository lacks a file it should have: {error}") from error
        if isinstance(error, DownloadError):
            cause = error.__cause__
            raise TransferError(str(cause) if isinstance(cause, TransferError) else f"cannot fetch metadata: {error}") from error
        if isinstance(error, (TufRepositoryError, DeserializationError)):
            raise TrustError(f"the repository's metadata do not hold: {error}; nothing is installed") from error
        if isinstance(error, OSError):
            raise StateError(f"the metadata cache cannot be written: {error.strerror}; check the disk") from error
