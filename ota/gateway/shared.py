"""What all requests of the gateway share: the devices that are known, the quotas, the roles of API tokens, and the way to the writer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request

from ota.errors import EnrolmentError, OtaError, TransferError
from ota.fleet.register import Known
from ota.fleet.store import Fleet
from ota.gateway import intake
from ota.gateway.intake import RefusedError
from ota.gateway.metrics import Metrics
from ota.gateway.quota import Quota
from ota.gateway.server import customer
from ota.gateway.writer import Writer
from ota.limits import MiB

log = logging.getLogger("ota.gateway")

BURST, HOURLY = 200, 120  # reports of one device: a full queue at once, then so many an hour
MOST_HELD = 16 * MiB  # bytes of bodies that are read at this moment
WRITING_SECONDS = 30.0  # until a request is told that the database is too slow
LOOK_SECONDS = 1.0  # between two looks whether the devices changed
MOST_TOKEN = 200  # characters of an API token
TOKEN_SECONDS = 30.0  # that the role of an API token is remembered


@dataclass(frozen=True)
class Options:
    """What the gateway is started with."""

    repository: str = ""
    """Folder of the published repository; empty: devices fetch it elsewhere."""
    access_log: bool = False
    proxies: tuple[str, ...] = ()


class Gateway:
    """What all requests share: the store, the writer, the quotas, and the devices that are known."""

    def __init__(self, fleet: Fleet, options: Options) -> None:
        """Take the store; `running` begins."""
        self.fleet, self.options, self.metrics = fleet, options, Metrics()
        self.writer = Writer(fleet, self.metrics)
        self.known: Mapping[str, Known] = {}
        self.room = intake.Room(MOST_HELD)
        self.quota = Quota(BURST, HOURLY / 3600)
        self.wrong = Quota(100, 0.1)  # signatures that do not verify, by address and device
        self.bad_tokens = Quota(10, 1 / 60)  # API tokens that are unknown, by address
        self.enrolments, self.bad_enrolments = Quota(200, 2.0), Quota(10, 1 / 60)
        self.reading = asyncio.Semaphore(2)
        self._guessing = asyncio.Lock()
        self._looking, self._changes, self._looked = asyncio.Lock(), -1, 0.0
        self._roles: dict[bytes, tuple[float, str]] = {}
        self.metrics.gauge("ferry_gateway_waiting_reports", "Reports that wait for a commit.", lambda: self.writer.waiting)
        self.metrics.gauge("ferry_gateway_held_bytes", "Bytes of bodies that are read.", lambda: self.room.held)
        self.metrics.gauge("ferry_gateway_devices", "Devices in the register.", lambda: len(self.known))
        self.metrics.gauge("ferry_gateway_healthy", "1: the last commit succeeded, not long ago.", lambda: self.writer.is_healthy)

    @contextlib.asynccontextmanager
    async def running(self, _: Starlette) -> AsyncIterator[None]:
        """Write and look for changes of the devices during the block; at its end, write what waits."""
        await self.look()
        self.writer.start()
        looking = asyncio.create_task(self._keep_looking())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.to_thread(self.writer.close)

    async def look(self) -> None:
        """Read the devices if they changed.

        Raises:
            TransferError: the database cannot be read.
        """
        asked = time.monotonic()
        async with self._looking:
            if self._looked >= asked:  # for another call, and it began after this one: forged reports cost one look at a time
                return
            began = time.monotonic()
            changes = await asyncio.to_thread(self.fleet.changes)
            if changes != self._changes:
                self.known = await asyncio.to_thread(self.fleet.known)
                self._changes = changes
                self._roles.clear()
            self._looked = began

    async def look_now(self) -> None:
        """Read the devices before something is refused for good: what is known may be a second old.

        Raises:
            RefusedError: 503, the database cannot be read.
        """
        try:
            await self.look()
        except TransferError as error:
            raise RefusedError(503, "unavailable", "the database cannot be read at this moment", 60) from error

    async def _keep_looking(self) -> None:
        """Look again and again; after a look that took long, less often, so that it costs at most a tenth of the time."""
        told = ""
        while True:
            began = time.monotonic()
            try:
                await self.look()
                told = ""
            except OtaError as error:
                if told != str(error):
                    log.error("the devices cannot be read: %s", error)  # noqa: TRY400 - one sentence, no traceback
                told = str(error)
            await asyncio.sleep(max(LOOK_SECONDS, 10 * (time.monotonic() - began)))

    async def written(self, start: Callable[[Callable[[Any, Exception | None], None]], bool]) -> Any:
        """Wait for the writer.

        Args:
            start: gives the writer a job with the function that takes its result; returns whether there is room.

        Raises:
            RefusedError: 429, too much waits; 503, the database does not take it or is too slow. Nothing is to be acknowledged.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if done.done():  # nobody waits any more
                return
            if error:
                done.set_exception(error)
            else:
                done.set_result(value)

        def result(value: Any, error: Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, value, error)

        if not start(result):
            raise RefusedError(429, "busy", "too many reports wait to be written; send them again later", random.randint(5, 60))  # noqa: S311
        try:
            async with asyncio.timeout(WRITING_SECONDS):
                return await done
        except TimeoutError:
            raise RefusedError(503, "unavailable", "the database is too slow; nothing was acknowledged", 60) from None
        except EnrolmentError:
            raise
        except Exception as error:
            if not isinstance(error, OtaError):
                log.exception("the writer failed")
            raise RefusedError(
                503, "unavailable", "the database takes nothing at this moment; nothing was acknowledged", 60
            ) from error

    async def role(self, request: Request) -> str:
        """Return the role of the request's API token; empty: it has none.

        A valid token passes whatever else came from its address, because a stranger may sit behind the same one. So each token is looked
        up; those of an address that guesses wait for one another, and not in the way of others.

        Raises:
            RefusedError: 401, the token is unknown or expired; 429, so are too many that came from this address.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":  # a name and password are meant for a proxy on the way
            return ""
        address, now = address_of(request), time.monotonic()
        digest = hashlib.sha256(token.encode()).digest()
        until, role = self._roles.get(digest, (0.0, ""))
        if now >= until:
            role = ""
            if len(token) <= MOST_TOKEN:
                async with self._guessing if self.bad_tokens.wait(address, 1, now) else contextlib.nullcontext():
                    role = await self.read(self.fleet.role_of, token) or ""
            if role:
                if len(self._roles) >= 256:
                    self._roles.clear()
                self._roles[digest] = now + TOKEN_SECONDS, role
        if not role:
            if wait := self.bad_tokens.wait(address, 1, now):
                raise RefusedError(429, "quota", "too many wrong tokens came from this address; try again later", wait)
            self.bad_tokens.take(address, 1, now)
            raise RefusedError(401, "token", "the token is unknown or has expired; an operator makes a new one")
        return role

    async def read(self, what: Callable[..., Any], *given: Any) -> Any:
        """Read from the database in a thread; a few at a time, so that readers do not take the processor from reports.

        Raises:
            RefusedError: 503, the database cannot be read.
        """
        try:
            async with self.reading:
                return await asyncio.to_thread(what, *given)
        except TransferError as error:
            raise RefusedError(503, "unavailable", "the database cannot be read at this moment", 60) from error


def address_of(request: Request) -> str:
    """Return the address of the sender, as far as it is known; of IPv6, the network of one customer."""
    return customer(request.client.host if request.client else "")
