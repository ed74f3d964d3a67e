"""A local HTTP endpoint that draws for other programs on the device, and for nobody else.

    POST /generate   {"caption": "bolt, rusty", "seed": 7, "variant": "fast"}, all optional; answers with a PNG
    GET  /status     what is served, how fast, and whether the expert routing has shifted, as JSON

The service keeps the running bundle loaded in a separate process, and goes on with it during an update. When the update has been
confirmed, the new bundle is loaded beside the old one and takes over; the old process ends after its last image, so no request is
dropped. A bundle on trial is not served; the previous bundle is. A worker that dies is replaced, and the next worker draws its
request again.

    >>> with listening_socket(Path("/run/deltaferry/agent.sock")) as server:
    ...     run(Service(home), server, stopped)
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import socket
import socketserver
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

from ota.agent import child, counts, measured, reports, rules, variants
from ota.agent.notify import Supervisor
from ota.agent.state import Home, Slot
from ota.agent.variants import Figures
from ota.errors import (
    BaseError,
    BusyError,
    DeviceError,
    ManifestError,
    OperatorError,
    OtaError,
    RoomError,
    SoftwareError,
    StateError,
    UnfinishedError,
    own_errors,
    printable,
)
from ota.manifest import Reference, VariantName

STORE_EVERY = 60.0  # seconds between two writings of the counts
LOOK_EVERY = 0.5  # seconds between two checks of what runs
READY_WAIT = 20.0  # seconds that a request waits for a bundle to be loaded
TRIES = 2  # workers that are given a request before it fails: the request itself may kill them
FAILURES = 3  # of one bundle, with no image in between, after which it pauses and the previous bundle draws
LONGEST_REST = 60.0  # seconds; the first pause is 2, each is twice as long as the one before
DEAR = 10  # a pause is at least so many times as long as the longest failure: a hanging bundle costs a tenth of the time
AVOIDED = 600.0  # seconds that a variant comes last after it was stopped for its time or memory
KEPT = 200  # image times that are kept for a variant, the newest
ENOUGH = 20  # image times after which they replace the figure of the benchmark
MAX_BODY = 4096  # bytes of a request
MAX_AT_ONCE = 16  # requests for an image that have arrived; one draws, the others wait
MAX_CALLERS = 64  # connections; beyond that, the oldest whose request has not arrived makes room for the next
READ_TIMEOUT = 10.0  # seconds for a request to arrive
LAST_WORDS = 1.0  # seconds for reading the rest of a request that is refused
LONGEST_SOCKET = 107  # bytes of a Unix socket's name (unix(7))
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}

log = logging.getLogger(__name__)


@dataclass
class Serving:
    """A bundle that is loaded, and what was observed of it."""

    digest: str
    worker: child.Worker
    default: VariantName
    references: dict[VariantName, Reference]
    figures: dict[VariantName, Figures]
    users: int = 0
    retired: bool = False
    took: dict[VariantName, deque[float]] = field(default_factory=dict)
    loads: dict[VariantName, list[list[list[float]]]] = field(default_factory=dict)
    strayed: str | None = None

    def chain(self, home: Home) -> list[VariantName]:
        """Order the variants by `variants.chain`; the times of recent images replace those of the benchmark."""
        figures = dict(self.figures)
        for variant, took in self.took.items():
            if len(took) >= ENOUGH:
                lately = sorted(took)[int(0.95 * (len(took) - 1))]
                figures[variant] = Figures(lately, figures.get(variant, variants.UNKNOWN).joules)
        return variants.chain(list(self.references), self.default, figures, home.config(), self.strayed is not None)

    def saw(self, variant: VariantName, milliseconds: float, load: list[list[float]]) -> bool:
        """Count an image; return True if it shows, for the first time, that the expert routing has shifted."""
        self.took.setdefault(variant, deque(maxlen=KEPT)).append(milliseconds)
        seen = self.loads.setdefault(variant, [])
        seen.append(load)
        if len(seen) < variants.ROUTE_IMAGES:
            return False
        before, problem = self.strayed, variants.routing_shift(seen, self.references[variant].load)
        seen.clear()
        if problem:
            self.strayed = f"{variant}: {problem}"
        return before is None and self.strayed is not None


class Service:
    """Draws images with the running bundle, whichever that is at the moment."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._changed = threading.Condition()
        self._serving: Serving | None = None
        self._failures: dict[str, int] = {}
        self._took: dict[str, float] = {}
        """Seconds that the longest failure of a bundle took."""
        self._avoided: dict[tuple[str, VariantName], float] = {}
        """Time until which a variant comes last, because it was stopped for its time or memory, or its worker died."""
        self._rests: dict[str, float] = {}
        """Time until which a bundle pauses, because it failed repeatedly."""
        self._problem: OtaError = StateError(f"no bundle is installed in {home.root}; run `ferry-agent update`")
        self._unsaid: list[tuple[str, str]] = []
        self.counting, self._stored = counts.Counting(home), time.monotonic()
        self.supervisor, self.listener = Supervisor(), cast("threading.Thread | None", None)

    # For requests, in any thread

    def draw(self, caption: str, seed: int, variant: VariantName | None = None) -> tuple[bytes, dict[str, Any]]:
        """Draw one image; return the PNG, and how it was drawn.

        Raises:
            OperatorError: the caption or seed cannot be drawn, or there is no such variant.
            DeviceError, ManifestError: no installed bundle draws this.
        """
        rules.check_request(caption, seed)
        problem: OtaError = self._problem
        for _ in range(TRIES):
            serving, began = self._take(), time.monotonic()
            try:
                return self._draw(serving, caption, seed, variant)
            except (DeviceError, ManifestError) as error:
                # If failures go on, the previous bundle draws. A dead worker is counted where it is replaced.
                took = time.monotonic() - began
                if not serving.worker.alive:
                    self._took[serving.digest] = max(took, self._took.get(serving.digest, 0.0))
                elif variant is None:
                    self._failed(serving.digest, took)
                if not isinstance(error, (UnfinishedError, BaseError, StateError)):
                    raise
                log.warning("%s", error)
                problem = error
            finally:
                self._give_back(serving)
        raise problem

    def _draw(self, serving: Serving, caption: str, seed: int, wanted: VariantName | None) -> tuple[bytes, dict[str, Any]]:
        if wanted and wanted not in serving.references:
            raise OperatorError(f"this bundle has no variant {wanted}; choose one of {', '.join(serving.references)}")
        problem: OtaError | None = None
        for variant in [wanted] if wanted else self._chain(serving):
            try:
                answer = serving.worker.draw(variant, caption, seed)
            except OperatorError:
                raise
            except UnfinishedError:
                self._avoid(serving, variant, wanted)
                raise
            except (DeviceError, ManifestError) as error:  # this variant's own fault: the next one is tried
                problem = error
                if not serving.worker.alive:
                    self._avoid(serving, variant, wanted)
                    raise UnfinishedError(str(error)) from error
                continue
            if not answer["good"]:
                self.counting.missed(serving.digest, "not_finite")
                problem = DeviceError(f"variant {variant} made an image that is constant or not finite")
                continue
            self.counting.drew(serving.digest, variant, caption, answer, serving.references)
            answer.pop("statistics", None)
            with self._changed:
                self._failures.pop(serving.digest, None)
                self._took.pop(serving.digest, None)
                self._avoided.pop((serving.digest, variant), None)
                if serving.saw(variant, answer["milliseconds"], answer.pop("load")):
                    self._unsaid.append((serving.digest, str(serving.strayed)))
            return base64.b64decode(answer.pop("png")), answer | {"bundle": serving.digest, "variant": variant}
        raise problem or DeviceError("no variant could be drawn; run `ferry-agent doctor`")

    def _chain(self, serving: Serving) -> list[VariantName]:
        """Order variants like `Serving.chain`, but put those that recently ended a worker last: others may be cheap enough."""
        now = time.monotonic()
        return sorted(serving.chain(self.home), key=lambda variant: self._avoided.get((serving.digest, variant), 0.0) > now)

    def _avoid(self, serving: Serving, variant: VariantName, wanted: VariantName | None = None) -> None:
        if wanted is None:  # what one caller chose must not change what the others get
            self._avoided[serving.digest, variant] = time.monotonic() + AVOIDED

    def _take(self) -> Serving:
        until = time.monotonic() + READY_WAIT
        with self._changed:
            self._changed.notify_all()  # wakes `keep`, which replaces a dead worker at once
            while self._serving is None or not self._serving.worker.alive:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise self._problem
            self._serving.users += 1
            return self._serving

    def _give_back(self, serving: Serving) -> None:
        with self._changed:
            serving.users -= 1
            if serving.retired and not serving.users:
                serving.worker.close()
            self._changed.notify_all()

    def missed(self, how: counts.Missed) -> None:
        """Count a request that gets no image."""
        serving = self._serving
        self.counting.missed(serving.digest if serving else None, how)

    def status(self) -> dict[str, Any]:
        """Report what is served, how fast, and whether the expert routing has shifted."""
        state = self.home.load()
        with self._changed:
            serving = self._serving
            took = {v: sorted(t) for v, t in serving.took.items()} if serving else {}
            return {
                "active": state.active, "release": state.seq, "on_trial": state.trial is not None,
                "serving": serving.digest if serving else None, "variants": serving.chain(self.home) if serving else [],
                "strayed": serving.strayed if serving else None,
                "milliseconds": {v: {"images": len(t), "p50": measured.percentile(t, 0.5), "p95": measured.percentile(t, 0.95)} for v, t in took.items()},
            }  # fmt: skip

    # For the thread that runs `keep`; workers live no longer than this thread

    def keep(self, stopped: threading.Event) -> None:
        """Keep the right bundle loaded, until stopped."""
        while not stopped.is_set():
            looked = True
            try:
                with own_errors():
                    self._look()
            except OtaError as error:
                self._problem, looked = error, False
            try:
                with own_errors():
                    self._say()
            except OtaError as error:
                log.warning("%s", error)
            self._beat()
            if time.monotonic() >= self._stored + STORE_EVERY:
                self.counting.store()
                self._stored = time.monotonic()
            with self._changed:
                dead = self._serving is not None and not self._serving.worker.alive
                if not dead or not looked:
                    self._changed.wait(LOOK_EVERY)
        with self._changed:
            if self._serving:
                self._serving.worker.close()
            self._serving = None
        self.counting.store()

    def _beat(self) -> None:
        """Tell systemd what draws, and that this loop and the listener are alive."""
        if self.listener is None or self.listener.is_alive():
            serving = self._serving
            self.supervisor.does(f"draws with bundle {serving.digest[:12]}" if serving else str(self._problem))
            self.supervisor.beat()

    def _look(self) -> None:
        state = self.home.load()
        running = self._serving
        if running and not running.worker.alive:
            self._failed(running.digest)
            self._replace(None)
            running = None
        # A bundle on trial is not loaded here: the update that tries it counts its loads.
        wanted = [digest for digest in (None if state.trial else state.active, state.previous) if digest]
        if not wanted:
            self._problem = StateError("no installed bundle may draw yet; run `ferry-agent update`")
        for digest in wanted:
            if time.monotonic() < self._rests.get(digest, 0.0):
                continue
            if running and running.digest == digest:
                return
            began = time.monotonic()
            try:
                self._replace(self._load(digest))
            except (DeviceError, ManifestError) as error:
                if isinstance(error, RoomError) and not isinstance(error, SoftwareError):
                    raise
                log.warning("bundle %s cannot be served: %s", digest[:12], error)
                self._failed(digest, time.monotonic() - began)
                self._problem = error
            else:
                return

    def _failed(self, digest: str, took: float = 0.0) -> None:
        """Count a failure of a bundle, which took `took` seconds; after `FAILURES` of them the bundle pauses.

        The pause grows with the number of failures and with the longest of them.
        """
        with self._changed:
            self._failures[digest] = failures = self._failures.get(digest, 0) + 1
            self._took[digest] = took = max(took, self._took.get(digest, 0.0))
            if failures >= FAILURES:
                rest = min(LONGEST_REST, 2.0 ** min(failures - FAILURES + 1, 20))
                self._rests[digest] = time.monotonic() + max(rest, DEAR * took)
            self._changed.notify_all()

    def _load(self, digest: str) -> Serving:
        """Load a bundle in a separate process, and draw once with it to warm it up."""
        slot = self.home.slot(digest)
        worker = child.Worker(str(slot.folder), digest)
        try:
            manifest = slot.manifest
            serving = Serving(digest, worker, manifest.default_variant, _references(slot), measured.read(self.home, digest))
            self._warm(serving)
        except BaseException:
            worker.close()
            raise
        return serving

    def _warm(self, serving: Serving) -> None:
        problem: OtaError = DeviceError("none of its variants draws")
        for variant in self._chain(serving):
            try:
                if serving.worker.draw(variant, "", 0)["good"]:
                    return
            except UnfinishedError:
                self._avoid(serving, variant)
                raise
            except (DeviceError, ManifestError) as error:
                problem = error
                if not serving.worker.alive:
                    self._avoid(serving, variant)
                    break
        raise problem

    def _replace(self, fresh: Serving | None) -> None:
        with self._changed:
            old, self._serving = self._serving, fresh
            if old:
                old.retired = True
                if not old.users:
                    old.worker.close()
            self._changed.notify_all()
        if fresh:
            log.info("bundle %s is served", fresh.digest[:12])

    def _say(self) -> None:
        """Report that the expert routing has shifted; postpone the report while an update is running."""
        with self._changed:
            unsaid, self._unsaid = self._unsaid, []
        for i, (digest, why) in enumerate(unsaid):
            log.warning("bundle %s: %s; the safe variant draws", digest[:12], why)
            try:
                with self.home.locked():
                    reports.queue(self.home, "strayed", digest, why)
            except BusyError:
                with self._changed:
                    self._unsaid += unsaid[i:]
                return
            except DeviceError as error:
                log.warning("%s", error)


def _references(slot: Slot) -> dict[VariantName, Reference]:
    """Read the references of a bundle's variants; a variant whose reference cannot be read is not served.

    Raises:
        BaseError, ManifestError: no reference can be read.
    """
    found: dict[VariantName, Reference] = {}
    problem: OtaError | None = None
    for variant in slot.manifest.variants:
        try:
            found[variant] = slot.reference(variant)
        except (BaseError, ManifestError) as error:
            problem = error
    if problem and not found:
        raise problem
    return found


# HTTP


class _Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """What the servers on both kinds of socket have in common."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MAX_CALLERS
    service: Service
    port = 0
    names: frozenset[str] | None
    """Host names that a request may use; None: any, because on a Unix socket the name does not matter."""
    places: threading.BoundedSemaphore
    """Free places of requests for an image. A caller takes one when its whole request is here, so slow callers take none."""
    callers: dict[Any, bool]
    """Open connections, the oldest first, and whether the caller is still to be waited for."""
    counting: threading.Lock

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._has_room():
            with suppress(OSError):
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.shutdown_request(request)
            return
        with self.counting:
            self.callers[request] = True
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.counting:
                self.callers.pop(request, None)

    def _has_room(self) -> bool:
        """Make room for one more caller, if necessary by hanging up on the one that has been waited for longest."""
        with self.counting:
            if len(self.callers) < MAX_CALLERS:
                return True
            slowest = next((caller for caller, waited_for in self.callers.items() if waited_for), None)
            if slowest is None:
                return False
            del self.callers[slowest]
            with suppress(OSError):
                slowest.shutdown(socket.SHUT_RDWR)  # its thread ends by itself
            return True

    @contextmanager
    def drawing(self, request: Any) -> Iterator[None]:
        """Take a place for a request that has arrived.

        Raises:
            _Refusal: all places are taken, or the caller had to make room for another one.
        """
        if not self.places.acquire(blocking=False):
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_AT_ONCE} requests wait already; try again in a moment")
        try:
            with self.counting:
                if request not in self.callers:
                    raise _Refusal(HTTPStatus.REQUEST_TIMEOUT, "the request arrived too slowly")
                self.callers[request] = False
            yield
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address
        log.debug("a request ended early: %s", sys.exc_info()[1])


class _UnixServer(_Server, socketserver.UnixStreamServer):
    pass


class _LoopbackServer(_Server, socketserver.TCPServer):
    allow_reuse_address = True


class _Refusal(Exception):  # noqa: N818 - an answer, not a fault
    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Timely(io.RawIOBase):
    """Reads from a caller until a fixed moment, however slowly the bytes arrive."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection, self._until = connection, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ferry-agent", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Timely(self.connection, time.monotonic() + READ_TIMEOUT))

    @property
    def _mine(self) -> _Server:
        return cast("_Server", self.server)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> None:
        if self.path != "/status":
            raise _Refusal(HTTPStatus.NOT_FOUND, "there is GET /status and POST /generate")
        self._send(HTTPStatus.OK, "application/json", json.dumps(self._mine.service.status()).encode())

    def _post(self) -> None:
        if self.path != "/generate":
            raise _Refusal(HTTPStatus.NOT_FOUND, "there is GET /status and POST /generate")
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        with self._counted():
            request = _request(self.rfile.read(self._length()))
            with self._mine.drawing(self.connection):
                png, how = self._mine.service.draw(**request)
                told = {f"X-Ferry-{name.title()}": str(how[name]) for name in ("bundle", "variant")}
                self._send(HTTPStatus.OK, "image/png", png, told | {"X-Ferry-Milliseconds": f"{how['milliseconds']:.1f}"})

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the request in the block if it gets no image."""
        try:
            yield
        except (_Refusal, OperatorError):
            self._mine.service.missed("refused")
            raise
        except OtaError:
            self._mine.service.missed("failed")
            raise

    def _length(self) -> int:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not length.isascii() or not length.isdigit():
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length, and the body in one piece")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is too large; send at most {MAX_BODY} bytes")
        return int(length)

    def _answer(self, work: Any) -> None:
        try:
            self._check_caller()
            work()
        except _Refusal as error:
            self._fail(error.status, str(error))
        except OperatorError as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except OtaError as error:
            self._fail(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception as error:
            log.exception("a request failed unexpectedly")
            what = printable(f"{type(error).__name__}: {error}")
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, f"the agent failed unexpectedly ({what}); report it")

    def _check_caller(self) -> None:
        """Refuse web pages in a browser on this device, also pages whose own name was made to point here (DNS rebinding)."""
        names = self._mine.names
        if "Origin" in self.headers:
            raise _Refusal(HTTPStatus.FORBIDDEN, "the agent refuses requests from web pages")
        if names is not None and self.headers.get_all("Host", [])[:2] not in [[name] for name in names]:
            raise _Refusal(HTTPStatus.MISDIRECTED_REQUEST, f"call this host {min(names)}")

    def _fail(self, status: HTTPStatus, sentence: str) -> None:
        retry = {"Retry-After": "5"} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        self._send(status, "application/json", json.dumps({"error": sentence}).encode(), retry)
        self._hear_out()  # the rest of the request may still be on its way

    def _hear_out(self) -> None:
        """Read what the caller still sends: if closed at once, the connection would break before the caller reads the answer."""
        until, left = time.monotonic() + LAST_WORDS, MAX_BODY
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (wait := until - time.monotonic()) > 0:
                self.connection.settimeout(wait)
                piece = self.connection.recv(left)
                if not piece:
                    return
                left -= len(piece)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.close_connection = True  # each connection serves only one request, so that none is kept for long
        self.connection.settimeout(READ_TIMEOUT)
        self.send_response(status)
        for name, value in {
            "Connection": "close",
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        log.debug(format, *args)


def _request(body: bytes) -> dict[str, Any]:
    """Parse the body of a request into the arguments of `Service.draw`.

    Raises:
        OperatorError: the body is not of the right form.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise OperatorError('the body is not JSON; send {"caption": "…"}') from error
    kinds = {"caption": str, "seed": int, "variant": str}
    if not isinstance(request, dict) or any(type(value) is not kinds.get(name) for name, value in request.items()):
        raise OperatorError('the body is not of the form {"caption": "…", "seed": 0, "variant": "full"}')
    if request.get("variant", "full") not in variants.LADDER:
        raise OperatorError(f"there is no variant {request['variant']!r}; choose full, dev, fast or turbo")
    return {"caption": request.get("caption", ""), "seed": request.get("seed", 0), "variant": request.get("variant")}


@contextmanager
def listening_socket(path: Path, group: int | None = None) -> Iterator[_Server]:
    """Listen on a Unix socket that its owner and group may use; the socket is removed when the block ends.

    Raises:
        OperatorError: another service listens there already, or the socket cannot be made.
    """
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise OperatorError(
            f"cannot listen on {path}: its name is longer than {LONGEST_SOCKET} bytes; name another with --socket"
        )
    _remove_stale(path)
    before = os.umask(0o117)  # so that it never exists with other rights than 0660
    try:
        server = _UnixServer(str(path), _Handler)
    except OSError as error:
        remedy = "make its folder, or " if isinstance(error, FileNotFoundError) else ""
        raise OperatorError(f"cannot listen on {path}: {error.strerror or error}; {remedy}name another with --socket") from error
    finally:
        os.umask(before)
    try:
        if group is not None:
            os.chown(path, -1, group)
        yield _prepared(server, None)
    except PermissionError as error:
        raise OperatorError(
            f"{path} cannot be given to that group: {error.strerror}; run as root, or as one of its members"
        ) from error
    finally:
        server.server_close()
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed service left behind; refuse to remove anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OperatorError(f"{path} exists and is not a socket; name another with --socket")
    except FileNotFoundError:
        return
    except OSError as error:
        raise OperatorError(f"cannot look at {path}: {error.strerror}; name another with --socket") from error
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OperatorError(f"cannot tell who listens on {path}: {error.strerror}; name another with --socket") from error
        else:
            raise OperatorError(f"another service listens on {path}; stop it, or name another with --socket")


@contextmanager
def listening_port(port: int) -> Iterator[_Server]:
    """Listen on a port of the loopback interface; 0 means any free port.

    Raises:
        OperatorError: the port cannot be used.
    """
    try:
        server = _LoopbackServer(("127.0.0.1", port), _Handler)
    except OSError as error:
        raise OperatorError(f"cannot listen on port {port}: {error.strerror}; name another with --port") from error
    server.port = int(server.server_address[1])
    try:
        yield _prepared(server, frozenset(f"{name}:{server.port}" for name in LOCAL_NAMES))
    finally:
        server.server_close()


def _prepared(server: _Server, names: frozenset[str] | None) -> _Server:
    server.names, server.places = names, threading.BoundedSemaphore(MAX_AT_ONCE)
    server.callers, server.counting = {}, threading.Lock()
    return server


def run(service: Service, server: _Server, stopped: threading.Event) -> None:
    """Serve until stopped; call it in a thread that lives as long as the process, preferably the main thread."""
    server.service = service
    listener = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    listener.start()
    service.listener = listener
    service.supervisor.ready()
    try:
        service.keep(stopped)
    finally:
        service.supervisor.stopping()
        server.shutdown()
        listener.join()
