"""Fetching from where the repository is published: a folder, or a web server. Nothing that arrives is trusted here.

A transfer has one deadline, whatever it is spent on: finding the address, connecting, TLS, headers, sizes of chunks, the
body, a mount that hangs. No timeout of a socket can promise that, because a byte in time begins it anew. So a thread
of its own reads, and the caller waits for it until the deadline and no longer. A download earns time with the bytes that arrive,
never with the size that somebody signed.
"""

from __future__ import annotations

import http.client
import os
import queue
import random
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import urllib3

from ota.agent.disk import Disk
from ota.errors import RepositoryError, TransferError

PIECE = 64 * 1024  # bytes read at once
GAP_TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5
BACKOFF = 0.5  # seconds before the second attempt, doubling, with jitter
SYNC_EVERY = 4 * 1024 * 1024  # bytes of a download between two syncs; what a power cut may cost
MINIMUM_RATE = 512  # bytes a second over all that a download has taken, below which a server is stalling us
DEADLINE_FLOOR = 120.0  # seconds that any transfer gets
WAITING = 4  # pieces that may have been read and not yet been asked for
HANDLE = 0.1  # seconds between two looks of the reading thread at whether anybody still wants what it has

Answer = TypeVar("Answer")

Deadline = Callable[[], float]
"""The moment of `time.monotonic` at which a transfer must have ended, as things stand now."""

_left_behind: dict[str, threading.Thread] = {}
"""Threads that wait for something that is mounted and does not answer, by its place; while one is there, no other is sent after it."""

PASSING = (408, 425, 429)  # of the statuses from 400 to 499 those that ask to be tried again


class NotFoundError(TransferError):
    """The repository does not have the file, or not for us: asking again would only be a load on it."""


class HungError(TransferError):
    """Something that is mounted does not answer."""


class Transport(Protocol):
    """Where files come from."""

    @property
    def received(self) -> int:
        """Bytes received so far."""

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """A file's bytes from `offset` on, in pieces.

        Args:
            name: of the file.
            offset: where to begin.
            deadline: when all must have arrived; in `DEADLINE_FLOOR` seconds by default.

        Raises:
            NotFoundError: there is no such file.
            TransferError: the source cannot be reached, broke off, or lets its bytes drip.
        """

    def close(self) -> None:
        """Give back what it holds; it may be read from again."""


def connect(repository: str) -> Transport:
    """The transport for an address: http(s)://…, file:///… or a folder.

    Raises:
        TransferError: it is of another kind.
    """
    wrong = "what was given as the repository is not an address to fetch from; give an http(s) address or a folder"
    try:
        parts = urlsplit(repository)
        if parts.scheme in ("http", "https"):
            url = urllib3.util.parse_url(repository)
            if (url.host or "").encode("idna") and url.port != 0 and url.query is None and url.fragment is None:
                return Web(repository)
    except ValueError as error:  # its text may quote a password
        raise TransferError(wrong) from error
    if parts.scheme in ("", "file") and parts.netloc in ("", "localhost") and parts.path:
        return Folder(Path(parts.path if parts.scheme else repository))
    raise TransferError(wrong)


def bare(address: str) -> str:
    """Leave out of an address what must not be shown: a name and a password."""
    return re.sub(r"(?<=//)[^/?#]*@", "", address)


class Folder:
    """A published repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.received = folder, 0

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        return _until(deadline or at_most(DEADLINE_FLOOR), name, self._pieces(name, offset), str(self.folder))

    def close(self) -> None:
        """See `Transport.close`; it holds nothing."""

    def _pieces(self, name: str, offset: int) -> Iterator[bytes]:
        if not self.folder.is_dir():
            raise TransferError(f"there is no repository in {self.folder}; check the address given at init")
        try:
            with os.fdopen(self._open(name), "rb") as file:
                file.seek(offset)
                while piece := file.read(PIECE):
                    self.received += len(piece)
                    yield piece
        except FileNotFoundError as error:
            raise NotFoundError(f"the repository has no {name}") from error
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise TransferError(f"cannot read {self.folder / name}: {reason}; check the repository's folder") from error

    def _open(self, name: str) -> int:
        """Open a regular file; a pipe, a device or a folder in its place is not waited for, nor even opened."""
        path = self.folder / name
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                return descriptor
            os.close(descriptor)
        raise TransferError(f"{path} is not a regular file; check the repository's folder")


class Web:
    """A published repository on a web server."""

    def __init__(self, address: str) -> None:
        self.address, self.received = address.rstrip("/"), 0
        self._line = _Line()

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        if self._line.was_cut:
            self.close()
            self._line = _Line()
        line = self._line
        return _until(deadline or at_most(DEADLINE_FLOOR), name, self._pieces(name, offset, line), cut=line.cut)

    def close(self) -> None:
        """See `Transport.close`."""
        self._line.close()

    def _pieces(self, name: str, offset: int, line: _Line) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            response = line.pool.request(
                "GET", f"{self.address}/{name}", headers=headers, preload_content=False, decode_content=False
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # ValueError: no address, or not a header
            raise TransferError(f"cannot reach {bare(self.address)}: {_why(error)}; it will be tried again") from error
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
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise TransferError(f"the transfer of {name} broke off: {_why(error)}; it will be resumed") from error
        finally:
            response.close()


def _why(error: BaseException) -> str:
    """Say what went wrong on the line; the texts of urllib3 name its own objects."""
    found: BaseException | None = error
    while found:
        if isinstance(found, OSError) and found.strerror:
            return str(getattr(found, "verify_message", "") or found.strerror)
        if isinstance(found, TimeoutError):
            return "no answer in time"
        if isinstance(found, (ConnectionError, http.client.IncompleteRead)):
            return "the connection was closed"
        found = found.__cause__ or found.__context__
    return "what answers there is no web server"


class _Line:
    """Connections, one at a time and kept for the next request, that another thread can cut."""

    def __init__(self) -> None:
        line, self.was_cut = self, False
        self._socket: socket.socket | None = None

        class Plain(urllib3.connection.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                line._use(self.sock)

        class Secure(urllib3.connection.HTTPSConnection):
            def connect(self) -> None:
                super().connect()  # TLS included, which the timeout bounds as a whole
                line._use(self.sock)

        class PlainPool(urllib3.HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Secure

        timeout = urllib3.Timeout(connect=GAP_TIMEOUT, read=GAP_TIMEOUT)
        self.pool = urllib3.PoolManager(retries=False, timeout=timeout)
        self.pool.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def _use(self, made: Any) -> None:
        self._socket = made
        if self.was_cut:  # it was connected too late
            self.cut()

    def cut(self) -> None:
        """End what the connection waits for, and never use it again."""
        self.was_cut = True
        if self._socket:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # what TLS adds would send, and wait, first

    def close(self) -> None:
        """Give back the connection; this object and its classes refer to each other, so it would be kept for a while."""
        for key in self.pool.pools.keys():  # noqa: SIM118 - it refuses to be iterated over itself
            with suppress(KeyError):
                self.pool.pools[key].close()
        self.pool.clear()


def at_most(seconds: float) -> Deadline:
    """A deadline so many seconds from now."""
    moment = time.monotonic() + seconds
    return lambda: moment


def _until(
    deadline: Deadline, name: str, pieces: Iterator[bytes], mount: str = "", cut: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """Hand on what a thread of its own reads, until the deadline; every byte that arrived before it is handed on.

    Args:
        deadline: of the whole.
        name: of what is read.
        pieces: to be read; this iterator belongs to the thread from now on.
        mount: where it is read from, if that may hang without end: then the thread is left behind.
        cut: ends what the thread waits for.
    """
    _look_for_one_left_behind(mount)
    handed: queue.Queue[bytes | BaseException | None] = queue.Queue(WAITING)
    unwanted = threading.Event()

    def hand(item: bytes | BaseException | None) -> None:
        while not unwanted.is_set():
            with suppress(queue.Full):
                handed.put(item, timeout=HANDLE)
                return

    def read() -> None:
        try:
            for piece in pieces:
                hand(piece)
                if unwanted.is_set():
                    break
            hand(None)
        except BaseException as error:  # noqa: BLE001 - it is raised where the pieces are wanted
            hand(error)

    thread = threading.Thread(target=read, name="transfer", daemon=True)
    thread.start()
    ended = False
    try:
        while True:
            left = deadline() - time.monotonic()
            if left <= 0:
                unwanted.set()  # what has arrived by now is still handed on, and no more: it might never end
            try:
                item = handed.get(timeout=max(0.0, left))
            except queue.Empty:
                if not unwanted.is_set():
                    continue  # the deadline may be another by now
                if mount:
                    _left_behind[mount] = thread
                raise TransferError(f"{name} arrives too slowly; it will be tried again") from None
            ended = not isinstance(item, bytes)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        unwanted.set()
        if cut and not ended:
            cut()


def _look_for_one_left_behind(mount: str) -> None:
    waits = _left_behind.get(mount)
    if waits and waits.is_alive():
        raise HungError(f"{mount} still does not answer; check what is mounted there")
    _left_behind.pop(mount, None)


def within(seconds: float, where: object, work: Callable[[], Answer]) -> Answer:
    """Do something that a mount may never answer, and wait for it no longer than so many seconds; what it raises is raised here.

    Raises:
        HungError: it has not ended, or an earlier call for the same place has not. The thread that waits for it is left behind.
    """
    _look_for_one_left_behind(str(where))
    ended: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((work(), None))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is wanted
            ended.put((None, error))

    thread = threading.Thread(target=run, name="mount", daemon=True)
    thread.start()
    try:
        answer, problem = ended.get(timeout=seconds)
    except queue.Empty:
        _left_behind[str(where)] = thread
        raise HungError(f"{where} does not answer within {seconds:.0f} s; check what is mounted there") from None
    if problem:
        raise problem
    return cast("Answer", answer)


def read_small(transport: Transport, name: str, limit: int) -> bytes:
    """A small file, whole.

    Raises:
        RepositoryError: it is longer than it may be.
        TransferError: it cannot be fetched.
    """
    deadline = at_most(DEADLINE_FLOOR)

    def once() -> bytes:
        data = bytearray()
        for piece in transport.read(name, deadline=deadline):
            data += piece
            if len(data) > limit:
                raise RepositoryError(f"{name} is longer than the {limit} bytes that are signed for it; nothing of it is used")
        return bytes(data)

    return _retrying(once)


def download(transport: Transport, name: str, size: int, disk: Disk, place: str, latest: Deadline) -> None:
    """Fetch a file of known size into `place`, continuing what an earlier call left there; the caller checks its hash.

    Args:
        transport: to fetch by.
        name: of the file there.
        size: of the whole file, bytes.
        disk: to write to.
        place: where to write.
        latest: when it must end however much arrives.

    Raises:
        RepositoryError: what arrived is longer; the file is removed.
        TransferError: the link failed, or the deadline passed; what arrived is kept for the next call.
    """
    begun, before = time.monotonic(), transport.received

    def deadline() -> float:
        return min(latest(), begun + DEADLINE_FLOOR + (transport.received - before) / MINIMUM_RATE)

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
