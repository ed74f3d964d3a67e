"""Fetch from where the repository is published: a folder, or a web server. Nothing that arrives is trusted here.

One deadline covers a whole transfer: name lookup, connecting, TLS, headers, sizes of chunks, the body, and a mount that hangs.
A socket timeout cannot promise that, because each byte that arrives restarts it. So a separate thread reads, and the caller
waits for it until the deadline and no longer. A download earns more time with the bytes that arrive, never with the size that
somebody signed.
"""

from __future__ import annotations

import os
import queue
import random
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar, cast
from urllib.parse import urlsplit

import urllib3

from ota.agent import network
from ota.agent.disk import Disk
from ota.agent.line import FAULTS, Line, why
from ota.agent.network import LaterError, NotFoundError, RefusedError, ShortError, UnavailableError
from ota.errors import RepositoryError, TransferError

bare = network.bare

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

LONGEST_PAUSE = 60.0  # seconds that a transfer waits because a server asks for it; if it asks for more, the next check waits


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
            UnavailableError: there is no such file, or the source does not give it.
            TransferError: the source cannot be reached, breaks off, or is too slow.
        """

    def close(self) -> None:
        """Release open connections; the transport may be used again."""


def connect(repository: str, authorities: str = "") -> Transport:
    """Return the transport for an address: http(s)://…, file:///… or a folder.

    Args:
        repository: the address. A name, a password and a query in it are sent to that server only.
        authorities: PEM certificates of the authorities that are trusted; empty: those of the system.

    Raises:
        TransferError: the address is of another kind.
    """
    wrong = "what was given as the repository is not an address to fetch from; give an http(s) address or a folder"
    try:
        parts = urlsplit(repository)
        if parts.scheme in ("http", "https"):
            url = urllib3.util.parse_url(repository)
            if (url.host or "").encode("idna") and url.port != 0 and url.fragment is None:
                return Web(repository, authorities)
    except ValueError:
        raise TransferError(wrong) from None  # the foreign error may quote a password
    if parts.scheme in ("", "file") and parts.netloc in ("", "localhost") and parts.path:
        return Folder(Path(parts.path if parts.scheme else repository))
    raise TransferError(wrong)


class Folder:
    """A published repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.received = folder, 0

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        return timely(deadline or at_most(DEADLINE_FLOOR), name, self._pieces(name, offset), str(self.folder))

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
            raise UnavailableError(f"cannot read {self.folder / name}: {reason}; check the repository's folder") from error

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
        raise UnavailableError(f"{path} is not a regular file; check the repository's folder")


class Web:
    """A published repository on a web server."""

    def __init__(self, address: str, authorities: str = "") -> None:
        self.received = 0
        self._address, self._authorities = network.Address.parse(address), authorities
        self._line = self._new_line()

    def read(self, name: str, offset: int = 0, deadline: Deadline | None = None) -> Iterator[bytes]:
        """See `Transport.read`."""
        if self._line.was_cut:
            self.close()
            self._line = self._new_line()
        line = self._line
        return timely(deadline or at_most(DEADLINE_FLOOR), name, self._pieces(name, offset, line), cut=line.cut)

    def close(self) -> None:
        """See `Transport.close`."""
        self._line.close()

    def _new_line(self) -> Line:
        return Line(GAP_TIMEOUT, self._authorities)

    def _pieces(self, name: str, offset: int, line: Line) -> Iterator[bytes]:
        response = self._answer(name, offset, line)
        try:
            if response.status not in (200, 206):
                raise TransferError(f"the server answered {response.status} for {name}; it will be tried again")
            skip = offset if response.status == 200 else 0  # the server ignored the range and starts over
            while piece := response.read1(PIECE):  # what has arrived, so that no byte before a cut is fetched again
                self.received += len(piece)
                rest, skip = piece[skip:], max(0, skip - len(piece))
                if rest:
                    yield rest
        except FAULTS as error:
            raise TransferError(f"the transfer of {name} broke off: {why(error)}; it will be resumed") from error
        finally:
            response.close()

    def _answer(self, name: str, offset: int, line: Line) -> urllib3.BaseHTTPResponse:
        """Ask for a file, following redirects; return an answer that is the file, or that a retry may change."""
        url = self._address.of(name)
        for _ in range(network.MAX_REDIRECTS + 1):
            headers, proxy = self._headers(name, offset, url), network.proxy_for(url, os.environ)
            try:
                response = line.get(url, headers, proxy)
            except FAULTS as error:
                where = bare(url).removesuffix(f"/{name}") + (f" through the proxy {proxy.url}" if proxy else "")
                raise TransferError(f"cannot reach {where}: {why(error)}; it will be tried again") from error
            if response.status not in network.REDIRECTS:
                break
            _leave(response)
            url = network.redirected(name, url, response.headers.get("Location"))
        else:
            raise RefusedError(
                f"the repository redirects {name} more than {network.MAX_REDIRECTS} times; give its last address at init"
            )
        problem: TransferError | None = network.refusal(response.status, name, url, "Authorization" in headers, proxy)
        asked = response.headers.get("Retry-After")
        if problem is None and response.status >= 400 and asked:
            now = time.time()
            if seconds := network.wait_asked(asked, response.headers.get("Date"), now):
                problem = network.later(response.status, name, url, seconds, now)
        if problem:
            response.close()
            raise problem
        return response

    def _headers(self, name: str, offset: int, url: str) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        if name.startswith("metadata/"):
            headers["Cache-Control"] = "no-cache"  # a proxy's old copy would keep a halt from this device
        if self._address.authorization and self._address.trusts(url):
            headers["Authorization"] = self._address.authorization
        return headers


def _leave(response: urllib3.BaseHTTPResponse) -> None:
    """Let an answer go; if its body is short, the connection can be kept."""
    try:
        response.read(PIECE)
    except FAULTS:
        pass  # nothing of the body is wanted
    finally:
        response.close()


def at_most(seconds: float) -> Deadline:
    """Return a deadline that lies `seconds` from now."""
    moment = time.monotonic() + seconds
    return lambda: moment


def timely(
    deadline: Deadline, name: str, pieces: Iterator[bytes], mount: str = "", cut: Callable[[], None] | None = None
) -> Generator[bytes, None, None]:
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

    return _retrying(once, deadline)


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
        UnavailableError: the source does not give the file, or only a part of it.
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
        pieces, begins = transport.read(name, have, deadline), have
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
                    if have < size and have == begins:  # the source has no more, so that to resume it brings nothing
                        raise ShortError(f"the repository's {name} has only {have} of {size} bytes; copy or publish it again")
                    if have < size:
                        raise TransferError(f"{name} ended after {have} of {size} bytes; it will be resumed")
            if new:
                disk.sync_folder(str(Path(place).parent))
                new = False

    try:
        _retrying(once, deadline)
    except RepositoryError:
        disk.remove(place)
        raise


def _retrying(once: Callable[[], Answer], deadline: Deadline) -> Answer:
    """Retry if the link fails, after growing, random pauses, or after the pause that the server asks for.

    Do not retry if the source does not give the file, or asks for more time than `LONGEST_PAUSE` or the deadline leaves.
    """
    for attempt in range(ATTEMPTS):
        pause = BACKOFF * 2**attempt * random.uniform(0.5, 1.5)  # noqa: S311
        try:
            return once()
        except (NotFoundError, RefusedError, ShortError):
            raise
        except LaterError as error:
            pause += error.seconds
            if attempt == ATTEMPTS - 1 or pause > LONGEST_PAUSE or time.monotonic() + pause >= deadline():
                raise
        except TransferError:
            if attempt == ATTEMPTS - 1:
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")
