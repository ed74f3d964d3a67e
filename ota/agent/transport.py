"""Fetching from where the repository is published: a folder, or a web server. Nothing that arrives is trusted here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import urllib3

from ota.agent.disk import Disk
from ota.errors import RepositoryError, TransferError

PIECE = 64 * 1024  # bytes read at once
GAP_TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5
BACKOFF = 0.5  # seconds before the second attempt, doubling, with jitter
SYNC_EVERY = 4 * 1024 * 1024  # bytes of a download between two syncs; what a power cut may cost
MINIMUM_RATE = 512  # bytes a second over the whole transfer, below which a server is stalling us
DEADLINE_FLOOR = 120.0  # seconds that any transfer gets

Answer = TypeVar("Answer")


PASSING = (408, 425, 429)  # of the statuses from 400 to 499 those that ask to be tried again


class NotFoundError(TransferError):
    """The repository does not have the file, or not for us: asking again would only be a load on it."""


class Transport(Protocol):
    """Where files come from."""

    received: int
    """Bytes received so far."""

    def read(self, name: str, offset: int = 0, deadline: float | None = None) -> Iterator[bytes]:
        """A file's bytes from `offset` on, in pieces.

        Args:
            name: of the file.
            offset: where to begin.
            deadline: moment of `time.monotonic` at which all must have arrived; in `DEADLINE_FLOOR` seconds by default.

        Raises:
            NotFoundError: there is no such file.
            TransferError: the source cannot be reached, broke off, or lets its bytes drip.
        """


def connect(repository: str) -> Transport:
    """The transport for an address: http(s)://…, file:///… or a folder.

    Raises:
        TransferError: it is of another kind.
    """
    try:
        parts = urlsplit(repository)
    except ValueError as error:
        raise TransferError(f"{repository!r} is not an address ({error}); give an http(s) address or a folder") from error
    if parts.scheme in ("http", "https"):
        return Web(repository)
    if parts.scheme in ("", "file"):
        return Folder(Path(parts.path))
    raise TransferError(f"cannot fetch from {repository!r}; give an http(s) address or a folder")


class Folder:
    """A published repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.received = folder, 0

    def read(self, name: str, offset: int = 0, deadline: float | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        deadline = deadline or time.monotonic() + DEADLINE_FLOOR
        if not self.folder.is_dir():
            raise TransferError(f"there is no repository in {self.folder}; check the address given at init")
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(offset)
                while piece := file.read(PIECE):
                    self.received += len(piece)
                    yield piece
                    _check_deadline(name, deadline)
        except FileNotFoundError as error:
            raise NotFoundError(f"the repository has no {name}") from error
        except OSError as error:
            raise TransferError(f"cannot read {self.folder / name}: {error.strerror}") from error


class Web:
    """A published repository on a web server."""

    def __init__(self, address: str) -> None:
        self.address, self.received = address.rstrip("/"), 0
        self._pool = urllib3.PoolManager(
            retries=False, timeout=urllib3.Timeout(connect=GAP_TIMEOUT, read=GAP_TIMEOUT), headers={"Accept-Encoding": "identity"}
        )

    def read(self, name: str, offset: int = 0, deadline: float | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        deadline = deadline or time.monotonic() + DEADLINE_FLOOR
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            response = self._pool.request(
                "GET", f"{self.address}/{name}", headers=headers, preload_content=False, decode_content=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(f"cannot reach {self.address}: {error}; it will be tried again") from error
        try:
            if 400 <= response.status < 500 and response.status not in PASSING:
                raise NotFoundError(f"the repository has no {name} for this device (status {response.status})")
            if response.status not in (200, 206):
                raise TransferError(f"the server answered {response.status} for {name}; it will be tried again")
            skip = offset if response.status == 200 else 0  # the server ignored the range and starts over
            while piece := response.read1(PIECE):  # what is there, so that no byte before a cut is fetched again
                self.received += len(piece)
                rest, skip = piece[skip:], max(0, skip - len(piece))
                if rest:
                    yield rest
                _check_deadline(name, deadline)
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(f"the transfer of {name} broke off: {error}; it will be resumed") from error
        finally:
            response.close()


def _check_deadline(name: str, deadline: float) -> None:
    """Called where every byte so far was handed on, so that a download keeps what it has."""
    if time.monotonic() > deadline:
        raise TransferError(f"{name} arrives too slowly; it will be tried again")


def read_small(transport: Transport, name: str, limit: int) -> bytes:
    """A small file, whole.

    Raises:
        RepositoryError: it is longer than it may be.
        TransferError: it cannot be fetched.
    """

    def once() -> bytes:
        data = bytearray()
        for piece in transport.read(name):
            data += piece
            if len(data) > limit:
                raise RepositoryError(f"{name} is longer than the {limit} bytes that are signed for it; nothing of it is used")
        return bytes(data)

    return _retrying(once)


def download(transport: Transport, name: str, size: int, disk: Disk, place: str) -> None:
    """Fetch a file of known size into `place`, continuing what an earlier call left there; the caller checks its hash.

    Raises:
        RepositoryError: what arrived is longer; the file is removed.
        TransferError: the link failed, or the deadline passed; what arrived is kept for the next call.
    """
    deadline = time.monotonic() + max(DEADLINE_FLOOR, size / MINIMUM_RATE)

    def once() -> None:
        path = disk.path(place)
        new = not path.is_file()
        have = 0 if new else path.stat().st_size
        if have > size:
            disk.remove(place)
            have, new = 0, True
        unsynced = 0
        if have == size:
            with disk.writing(place, append=True):
                return  # synced now: the earlier call may have been killed before it was
        pieces = transport.read(name, have, deadline)
        while have < size:
            with disk.writing(place, append=True) as file:  # synced at the end of each block
                for piece in pieces:
                    have += len(piece)
                    unsynced += len(piece)
                    if have > size:
                        raise RepositoryError(
                            f"{name} is longer than the {size} bytes that are signed for it; nothing of it is used"
                        )
                    file.write(piece)
                    if unsynced >= SYNC_EVERY:
                        unsynced = 0
                        break
                else:
                    if have < size:
                        raise TransferError(f"{name} ended after {have} of {size} bytes; it will be resumed")
            if new:
                disk.sync_folder(str(Path(place).parent))
                new = False

    try:
        _retrying(once)
    except RepositoryError:
        disk.remove(place)
        raise


def _retrying(once: Callable[[], Answer]) -> Answer:
    """Try again on a failing link, with growing, random pauses; never on a file that is not there."""
    for attempt in range(ATTEMPTS):
        try:
            return once()
        except NotFoundError:
            raise
        except TransferError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(BACKOFF * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311
    raise AssertionError("unreachable")
