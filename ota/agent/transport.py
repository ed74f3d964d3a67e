"""Fetch from where the repository is published: a folder, or a web server. Nothing that arrives is trusted here.

One deadline covers a whole transfer: name lookup, connecting, TLS, headers, sizes of chunks, the body, and a mount that hangs.
A socket timeout cannot promise that, because each byte that arrives restarts it. So a separate thread reads, and the caller
waits for it until the deadline and no longer. A download earns more time with the bytes that arrive, never with the size that
somebody signed.
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
SYNC_EVERY = 4 * 1024 * 1024  # bytes of a download between two syncs; a power cut may lose as many
MINIMUM_RATE = 512  # bytes a second, averaged over a download; a slower server counts as stalling
DEADLINE_FLOOR = 120.0  # seconds that a transfer gets, whatever arrives
WAITING = 4  # pieces that may be read before the caller asks for them
HANDLE = 0.1  # seconds after which the reading thread checks again whether its piece is still wanted

Answer = TypeVar("Answer")

Deadline = Callable[[], float]
"""Returns the time of `time.monotonic` by which a transfer must end; it may change while the transfer runs."""

_left_behind: dict[str, threading.Thread] = {}
"""Threads that wait for a mount that does not answer, by path; while one waits, no other is started for the same path."""

PASSING = (408, 425, 429)  # those statuses from 400 to 499 that ask for a retry


class NotFoundError(TransferError):
    """The repository does not have the file, or not for this device; a retry would only add load."""


class HungError(TransferError):
    """A mount does not answer."""


class Transport(Protocol):
    """A source of files."""

    @property
    def received(self) -> int:
        """Bytes received so far."""

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """Read a file's bytes from `offset` on, in pieces.

        Args:
            name: name of the file in the repository.
            offset: first byte to read.
            deadline: by when all bytes must arrive; by default `DEADLINE_FLOOR` seconds from now.

        Raises:
            NotFoundError: there is no such file.
            TransferError: the source cannot be reached, breaks off, or is too slow.
        """

    def close(self) -> None:
        """Release open connections; the transport may be used again."""


def connect(repository: str) -> Transport:
    """Return the transport for an address: http(s)://…, file:///… or a folder.

    Raises:
        TransferError: the address is of another kind.
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
    """Remove the user name and password from an address, because they must not be shown."""
    return re.sub(r"(?<=//)[^/?#]*@", "", address)


class Folder:
    """A published repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.received = folder, 0

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        return _until(deadline or at_most(DEADLINE_FLOOR), name, self._pieces(name, offset), str(self.folder))

    def close(self) -> None:
        """See `Transport.close`; a folder has no open connections."""

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
        """Open a regular file; refuse a pipe, a device or a folder in its place without opening it or waiting for it."""
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
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # ValueError: an invalid address or header
            raise TransferError(f"cannot reach {bare(self.address)}: {_why(error)}; it will be tried again") from error
        try:
            if 400 <= response.status < 500 and response.status not in PASSING:
                raise NotFoundError(f"the repository has no {name} for this device (status {response.status})")
            if response.status not in (200, 206):
                raise TransferError(f"the server answered {response.status} for {name}; it will be tried again")
            skip = offset if response.status == 200 else 0  # the server ignored the range and starts over
            while piece := response.read1(PIECE):  # what has arrived, so that no byte before a cut is fetched again
                self.received += len(piece)
                rest, skip = piece[skip:], max(0, skip - len(piece))
                if rest:
                    yield rest
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise TransferError(f"the transfer of {name} broke off: {_why(error)}; it will be resumed") from error
        finally:
            response.close()


def _why(error: BaseException) -> str:
    """Say what went wrong on the connection; the texts of urllib3 name its internal objects."""
    found: BaseException | None = error
    while found:
        if isinstance(found, OSError) and found.strerror:
            return str(getattr(found, "verify_message", "") or found.strerror)
        if isinstance(found, TimeoutError):
            return "no answer in time"
        if isinstance(found, (ConnectionError, http.client.IncompleteRead)):
            return "the connection was closed"
        found = found.__cause__ or found.__context__
    return "the server there is not a web server"


class _Line:
    """One connection at a time, kept for the next request; another thread can cut it."""

    def __init__(self) -> None:
        line, self.was_cut = self, False
        self._socket: socket.socket | None = None

        class Plain(urllib3.connection.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                line._use(self.sock)

        class Secure(urllib3.connection.HTTPSConnection):
            def connect(self) -> None:
                super().connect()  # including TLS, which the timeout bounds as a whole
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
        if self.was_cut:  # the cut came before the connection was made
            self.cut()

    def cut(self) -> None:
        """End what a thread waits for, by shutting the connection down; it is never used again."""
        self.was_cut = True
        if self._socket:
            with suppress(OSError):
                # Not the method of SSLSocket: it would drop the TLS state that the waiting thread still uses.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; this object and its classes refer to each other, so it would otherwise stay open for a while."""
        for key in self.pool.pools.keys():  # noqa: SIM118 - it refuses to be iterated over itself
            with suppress(KeyError):
                self.pool.pools[key].close()
        self.pool.clear()


def at_most(seconds: float) -> Deadline:
    """Return a deadline that lies `seconds` from now."""
    moment = time.monotonic() + seconds
    return lambda: moment


def _until(
    deadline: Deadline, name: str, pieces: Iterator[bytes], mount: str = "", cut: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """Yield what a separate thread reads until the deadline; every byte that arrived before the deadline is yielded.

    Args:
        deadline: the deadline of the whole transfer.
        name: name of the file, for the error message.
        pieces: the iterator to read; it belongs to the thread from now on.
        mount: path of the mount that is read, if it may hang without end: then the thread is left behind.
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
                unwanted.set()  # yield what has arrived by now, and no more: it might never end
            try:
                item = handed.get(timeout=max(0.0, left))
            except queue.Empty:
                if not unwanted.is_set():
                    continue  # the deadline may have moved by now
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
    """Run `work` on a mount that may never answer, and wait at most `seconds`; exceptions of `work` are passed on.

    Raises:
        HungError: `work` has not ended, or that of an earlier call for the same place has not. Its thread is left behind.
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
    """Fetch a small file as a whole, retrying if the link fails.

    Raises:
        RepositoryError: the file is longer than `limit` bytes.
        TransferError: the file cannot be fetched.
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
    """Fetch a file of known size into `place`, resuming what an earlier call left there; the caller checks its hash.

    Args:
        transport: where to fetch from.
        name: name of the file in the repository.
        size: size of the whole file, in bytes.
        disk: the directory to write to.
        place: name of the file to write there.
        latest: the deadline that holds however much arrives.

    Raises:
        RepositoryError: more than `size` bytes arrived; the file is removed.
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
                return  # this syncs it: the earlier call may have been killed before it did
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
    """Retry if the link fails, after growing, random pauses; do not retry if the file does not exist."""
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
