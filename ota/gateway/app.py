"""The gateway's application: what each address answers, to whom, and within which limits."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ota.errors import EnrolmentError, ManifestError, OtaError, TakenError, printable
from ota.fleet.register import Known, Redeemed
from ota.fleet.store import LastState, Verdict
from ota.gateway import files, intake, releases
from ota.gateway.intake import Batch, RefusedError
from ota.gateway.metrics import Metrics
from ota.gateway.openapi import Endpoint, document
from ota.gateway.quota import Quota
from ota.gateway.server import is_loopback
from ota.gateway.shared import BURST, HOURLY, Gateway, address_of
from ota.limits import KiB
from ota.manifest import NAME_PATTERN, parse
from ota.report import MAX_BATCH, Answer, Enrolment, Opened, Refusal

log = logging.getLogger("ota.gateway")

MOST_ENROLMENT = 4 * KiB  # bytes of an enrolment
MOST_DEVICES = 1_000  # of one answer
CLOCK_SECONDS = 3_600  # that a device's clock may differ from the factory's
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


async def take_reports(gateway: Gateway, request: Request) -> Response:
    """Take a batch of reports, and answer once they are kept durably."""
    role = await gateway.role(request)
    if role and role != "reporter":
        raise RefusedError(403, "role", "this token may not send reports; a device needs none")
    address, now = address_of(request), time.monotonic()
    body = await body_of(gateway, request)
    try:
        known = gateway.known  # another look replaces it, and may drop a device
        found, unknown = await intake.parsed(intake.lines_of(body, bool(role)), known, bool(role), gateway.metrics)
        waits = {device: gateway.quota.wait(device, len(reports), now) for device, reports in found.items()}
        late = max(waits.values(), default=0.0)
        if late and not role:
            raise RefusedError(429, "quota", f"a device may send {HOURLY} reports an hour, and {BURST} after a silence", late)
        forged = {
            device: wait for device, reports in found.items() if (wait := _forgery(gateway, address, known[device], reports, now))
        }
        if forged and not role:
            told = "too many wrong signatures in the name of this device came from this address; try again later"
            raise RefusedError(429, "quota", told, max(forged.values()))
        waits |= forged
        answers = await keep(gateway, address, known, {device: reports for device, reports in found.items() if not waits[device]})
    finally:
        gateway.room.give_back(len(body))
    if not role:
        return JSONResponse(next(iter(answers.values())).model_dump())
    return JSONResponse({
        "devices": {device: answer.model_dump() for device, answer in answers.items()},
        "unenrolled": unknown, "later": [device for device, wait in waits.items() if wait],
    })  # fmt: skip


def _forgery(gateway: Gateway, address: str, known: Known, reports: list[Opened], now: float) -> float:
    """Return how many seconds a batch has to wait because many forged ones came in the name of its device from its address; 0: none.

    The device itself may sit behind that address, so a batch whose first report verifies never waits.
    """
    wait = gateway.wrong.wait(f"{address} {known.device}", 1, now)
    if not wait:
        return 0.0
    gateway.metrics.verified.add()
    return 0.0 if reports[0].is_signed_by(known.public_key) else wait


async def keep(
    gateway: Gateway, address: str, known: Mapping[str, Known], found: Mapping[str, list[Opened]]
) -> dict[str, Answer]:
    """Verify the reports of known devices, and let the writer keep them; return the answer for each device."""
    batches: dict[str, Batch] = {}
    now = time.monotonic()
    for device, reports in found.items():
        batch = await intake.checked(known[device], reports, gateway.metrics)
        if batch.refused:
            await gateway.look_now()
            now_known = gateway.known.get(device)
            if now_known is None:  # it was removed a moment ago; none of its reports is refused, because it may be enrolled again
                batch.refused.clear()
            elif now_known != batch.known:  # such as after `ferry fleet rekey`, a moment ago
                batch = await intake.checked(now_known, reports, gateway.metrics)
        batches[device] = batch
        gateway.quota.take(device, len(batch.arrived), now)
        if wrong := sum(one.code == "signature" for one in batch.refused):
            gateway.wrong.take(f"{address} {device}", wrong, now)
            gateway.writer.note({device: wrong})
    arrived = [one for batch in batches.values() for one in batch.arrived]
    size = sum(batch.size for batch in batches.values())
    verdicts: list[Verdict] = []
    if arrived:
        try:
            verdicts = await gateway.written(lambda result: gateway.writer.keep(arrived, size, result))
        except RefusedError:
            for device, batch in batches.items():  # what was not taken does not count
                gateway.quota.take(device, -len(batch.arrived), now)
            raise
    moment, at = int(time.time()), 0
    answers = {}
    for device, batch in batches.items():
        own = verdicts[at : at + len(batch.arrived)]
        at += len(own)
        answers[device] = _answer(gateway.metrics, batch, own, moment)
    return answers


def _answer(metrics: Metrics, batch: Batch, verdicts: list[Verdict], moment: int) -> Answer:
    accepted = [verdict.number for verdict in verdicts if not verdict.code]
    metrics.reports.add("accepted", len(accepted))
    refused = list(batch.refused)
    for early in refused:
        metrics.reports.add(early.code)
    for verdict in verdicts:
        if verdict.code and verdict.code != "unenrolled":  # removed a moment ago; it may be enrolled again
            metrics.reports.add(verdict.code)
            refused.append(Refusal(number=verdict.number, code=verdict.code, reason=verdict.reason[:500]))
    highest = max((verdict.highest for verdict in verdicts), default=0)
    return Answer(accepted=accepted, refused=refused, highest=highest, time=moment)


async def body_of(gateway: Gateway, request: Request) -> bytes:
    """Read and unpack the body of a batch; the caller gives its length back to `gateway.room`.

    Raises:
        RefusedError: as `intake.unpacked`; 413 before anything is read, if the header says that it is too large.
    """
    length = request.headers.get("content-length")  # h11 lets only digits pass
    if length and int(length) > MAX_BATCH:
        raise RefusedError(413, "too_large", f"a batch may have at most {MAX_BATCH} bytes, as it is sent and unpacked")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if encoding not in ("gzip", "identity") or kind != "application/x-ndjson":
        raise RefusedError(400, "malformed", "reports are sent as application/x-ndjson, plain or with gzip")
    return await intake.unpacked(request.stream(), encoding, gateway.room)


async def take_enrolment(gateway: Gateway, request: Request) -> Response:
    """Enrol a device that shows a token; who guesses tokens is slowed down."""
    address = address_of(request)
    _check_enrolments(gateway.bad_enrolments, address)
    try:
        enrolment = await _enrolment_of(request)
        _check_enrolments(gateway.bad_enrolments, address)  # others of this address may have ended meanwhile
        _check_enrolments(gateway.enrolments, "")  # only now: what anybody can send must not use up what all devices share
        gateway.enrolments.take("", 1, time.monotonic())
        known: Redeemed = await gateway.written(
            lambda result: gateway.writer.call(lambda: gateway.fleet.redeem(enrolment), result)
        )
        await gateway.look_now()  # its next report must pass
    except (ClientDisconnect, _TooLargeError):  # who sends too slowly is cut off, which looks the same
        gateway.bad_enrolments.take(address, 1, time.monotonic())
        raise
    except ManifestError as error:
        gateway.bad_enrolments.take(address, 1, time.monotonic())
        raise RefusedError(400, "malformed", "the body is no enrolment of a device") from error
    except EnrolmentError as error:
        gateway.bad_enrolments.take(address, 1, time.monotonic())
        # A token that was tried too often is void for good, so nobody is told to wait with it.
        status, code = (409, "taken") if isinstance(error, TakenError) else (403, "token")
        raise RefusedError(status, code, str(error)) from error
    return JSONResponse({"device": known.device, "confirmed": known.confirmed, "highest": known.highest})


class _TooLargeError(RefusedError):
    """A body that is larger than an enrolment."""


def _check_enrolments(quota: Quota, name: str) -> None:
    if wait := quota.wait(name, 1, time.monotonic()):
        raise RefusedError(429, "quota", "too many enrolments were tried; try again later", wait)


async def _enrolment_of(request: Request) -> Enrolment:
    """Read an enrolment, and check that it is signed by the key that it names.

    Raises:
        RefusedError: 413, it is too large.
        ManifestError: it is malformed.
        EnrolmentError: it is not signed by that key.
        ClientDisconnect: the sender went away, or was cut off because it is too slow.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_ENROLMENT:
            raise _TooLargeError(413, "too_large", f"an enrolment may have at most {MOST_ENROLMENT} bytes")
    enrolment = parse(Enrolment, body, MOST_ENROLMENT)
    if not enrolment.is_signed:
        raise EnrolmentError("the enrolment is not signed by the key that it names")
    return enrolment


async def list_devices(gateway: Gateway, request: Request) -> Response:
    """List devices by id, a page at a time."""
    after, limit = request.query_params.get("after", ""), request.query_params.get("limit", "100")
    if (after and not NAME_PATTERN.fullmatch(after)) or not re.fullmatch("[1-9][0-9]{0,3}", limit) or int(limit) > MOST_DEVICES:
        raise RefusedError(400, "malformed", f"`after` is a device's id, and `limit` a number up to {MOST_DEVICES}")
    states = await gateway.read(lambda: gateway.fleet.states(after=after, limit=int(limit)))
    rows = [shown(state) for state in states]
    return JSONResponse({"devices": rows, "next": rows[-1]["device"] if len(rows) == int(limit) else None})


async def show_device(gateway: Gateway, request: Request) -> Response:
    """Show one device."""
    name = request.path_params["device"]
    states = await gateway.read(lambda: gateway.fleet.states(device=name)) if NAME_PATTERN.fullmatch(name) else []
    if not states:
        raise RefusedError(404, "unknown", "there is no such device in the register")
    return JSONResponse(shown(states[0]))


def shown(state: LastState) -> dict[str, Any]:
    """Return what an operator sees of a device; texts that it sent are printable."""
    return {
        "device": state.device, "line": state.enrolled_line or state.line, "device_class": state.enrolled_class or state.device_class,
        "confirmed": state.confirmed is not None, "retired": state.retired is not None, "tags": state.tags,
        "heard_at": state.heard_at, "heartbeat_at": state.heartbeat_at, "number": state.number, "active": state.active,
        "agent": state.agent, "event": state.event, "reason": printable(state.reason or ""), "clock_ahead_s": state.skew,
        "clock_wrong": state.skew is not None and abs(state.skew) > CLOCK_SECONDS,
        "conflicts": state.conflicts, "refused": state.refused, "refused_why": state.refused_why,
    }  # fmt: skip


async def list_releases(gateway: Gateway, _: Request) -> Response:
    """List published releases, and how many devices run each."""
    if not gateway.options.repository:
        raise RefusedError(404, "elsewhere", "this gateway serves no repository; devices fetch it elsewhere")
    try:
        version, rows = await asyncio.to_thread(releases.read, gateway.options.repository)
    except releases.DamagedError as error:
        raise RefusedError(503, "unavailable", str(error), 60) from error
    running = await gateway.read(gateway.fleet.running)
    return JSONResponse({"timestamp": version, "releases": [{**row, "devices": running.get(row["manifest"], 0)} for row in rows]})


async def show_health(gateway: Gateway, _: Request) -> Response:
    """Say whether reports can be kept: the last commit succeeded, and was not long ago."""
    good = gateway.writer.is_healthy
    return JSONResponse({"healthy": good}, 200 if good else 503, {"Cache-Control": "no-store"})


async def show_metrics(gateway: Gateway, request: Request) -> Response:
    """Show figures to Prometheus on this machine, or to one with a token."""
    local = request.client is not None and is_loopback(request.client.host) and "x-forwarded-for" not in request.headers
    if not local and await gateway.role(request) not in ("viewer", "operator"):
        raise RefusedError(401, "token", "from another machine, the figures need a token with the role viewer")
    return PlainTextResponse(gateway.metrics.text(), media_type="text/plain; version=0.0.4")


async def show_document(_: Gateway, __: Request) -> Response:
    """Describe these addresses, as an OpenAPI document."""
    return JSONResponse(document(ENDPOINTS))


ENDPOINTS = (
    Endpoint(
        "/v1/reports", "POST", take_reports, ("", "reporter"), (400, 401, 403, 413, 429, 503), Answer, "application/x-ndjson"
    ),
    Endpoint("/v1/enroll", "POST", take_enrolment, ("",), (400, 403, 409, 413, 429, 503), None, "application/json"),
    Endpoint("/v1/devices", "GET", list_devices, ("viewer", "operator"), (400, 401, 403, 429, 503)),
    Endpoint("/v1/devices/{device}", "GET", show_device, ("viewer", "operator"), (401, 403, 404, 429, 503)),
    Endpoint("/v1/releases", "GET", list_releases, ("viewer", "operator"), (401, 403, 404, 429, 503)),
    Endpoint("/v1/openapi.json", "GET", show_document, ("",), ()),
    Endpoint("/healthz", "GET", show_health, ("",), (503,)),
    Endpoint("/metrics", "GET", show_metrics, ("", "viewer", "operator"), (401, 429)),
)
"""All that is answered beside the files of the repository. The OpenAPI document is made of it."""


def _endpoint(gateway: Gateway, found: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Make what Starlette calls: check the role, and turn refusals into answers."""
    counted = {"/v1/reports": gateway.metrics.batches, "/v1/enroll": gateway.metrics.enrolments}.get(found.path)

    async def answer(request: Request) -> Response:
        try:
            if "" not in found.roles:
                role = await gateway.role(request)
                if not role:
                    raise RefusedError(401, "token", "this needs an API token; send it as Authorization: Bearer TOKEN")
                if role not in found.roles:
                    raise RefusedError(403, "role", f"this needs a token with the role {' or '.join(found.roles)}")
            response = await found.call(gateway, request)
        except RefusedError as error:
            headers = {"Retry-After": str(math.ceil(error.retry_after))} if error.retry_after else {}
            if error.status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            response = JSONResponse({"error": str(error), "code": error.code}, error.status, headers)
        except ClientDisconnect:
            response = Response(status_code=400)  # nobody reads it
        except OtaError as error:
            log.error("%s: %s", found.path, error)  # noqa: TRY400 - one sentence, no traceback
            response = JSONResponse({"error": "the gateway cannot answer; its log says why", "code": "failed"}, 500)
        except Exception:
            log.exception("a request of %s failed", found.path)
            response = JSONResponse({"error": "the gateway failed; its log says why", "code": "failed"}, 500)
        if counted:
            counted.add(str(response.status_code))
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    return answer


def application(gateway: Gateway) -> ASGIApp:
    """Build the application around the shared state."""

    async def nothing(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        body = {"error": "there is nothing here; /v1/openapi.json lists what there is", "code": "nothing"}
        return JSONResponse(body, status, {"Cache-Control": "no-store"})

    routes = [Route(one.path, _endpoint(gateway, one), methods=[one.method]) for one in ENDPOINTS]
    made = Starlette(routes=routes, exception_handlers={HTTPException: nothing}, lifespan=gateway.running)
    made.router.redirect_slashes = False  # a path is taken as it is, or not at all
    return _Front(made, gateway)


class _Front:
    """ASGI application around all: gives each answer an id, writes the access log, and serves the published files."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway
        self._files = files.Repository(gateway.options.repository) if gateway.options.repository else None
        self._proxied = bool(gateway.options.proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give one answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _, _, path = scope["path"].partition("/")  # `OPTIONS *` and `CONNECT host:1` have a path without a slash
        published = self._files is not None and path.partition("/")[0] in files.FOLDERS
        status, began, number = 0, time.monotonic(), self._id(scope)

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await (self._files if published and self._files else self._app)(scope, receive, answering)
        finally:
            if published:
                self._gateway.metrics.files.add(str(status))
            if self._gateway.options.access_log:
                who = scope["client"][0] if scope.get("client") else "-"
                took = 1000 * (time.monotonic() - began)
                log.info("%s %s %s %d %.0f ms %s", who, scope["method"], printable(scope["path"], 200), status, took, number)

    def _id(self, scope: Scope) -> str:
        """Return the id that a proxy of ours gave the request, or a new one."""
        if self._proxied:
            for name, value in scope["headers"]:
                if name == b"x-request-id" and (found := _REQUEST_ID.fullmatch(value.decode("latin-1"))):
                    return found[0]
        return os.urandom(8).hex()
