"""Watch MLflow's aliases beside `ferry serve`: every `poll_seconds`, and at once when MLflow says that an alias was moved.

MLflow keeps undelivered webhooks in memory, so a webhook may be lost; it is only a hint. The aliases are read from MLflow
itself, and the body of a delivery is neither trusted nor parsed. The signature keeps strangers from making ferry look all the
time.

Set it up in MLflow (without MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY, its server forgets the secret when it restarts):

    >>> MlflowClient(uri).create_webhook(
    ...     "ferry", "https://factory.example/mlflow", ["model_version_alias.created", "model_version_alias.deleted"],
    ...     secret=secret,
    ... )
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flows import alerts, telling, watchers
from flows.errors import ServerError, WorkspaceError
from flows.serve import write_secret
from flows.web.app import application, body_of, serving
from flows.workspace import Workspace
from registry.champions import news_of_aliases

PATH = "/mlflow"
SECRET = "FERRY_WEBHOOK_SECRET"  # noqa: S105 - the variable's name
SHORTEST = 24  # characters of a secret
MAX_AGE = 300.0  # seconds between signing and arrival, in either direction, because clocks differ
MAX_BODY = 64 * 1024  # bytes; MLflow sends some hundred
MAX_SEEN = 10_000  # deliveries that are remembered; with so many, new ones are refused until old ones expire


class RefusedError(Exception):
    """The delivery is not from MLflow, or came before."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Deliveries:
    """Check that a delivery is from MLflow, and did not come before.

    The scheme is that of mlflow.webhooks.delivery, which follows Standard Webhooks: base64 of HMAC-SHA256 over
    `id.timestamp.body`.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._seen: dict[str, float] = {}  # id → Unix time after which the delivery is too old to be accepted

    def check(self, delivery: str, stamp: str, signatures: str, body: bytes, now: float) -> None:
        """Accept a delivery, but only once.

        Args:
            delivery: its id.
            stamp: when it was signed, in Unix seconds.
            signatures: a version and base64, as in v1,….
            body: its bytes.
            now: Unix time, in seconds.

        Raises:
            RefusedError: it is not signed with the secret, is too old, or was accepted before; or there are too many.
        """
        version, _, given = signatures.partition(",")
        signed = f"{delivery}.{stamp}.".encode() + body
        try:
            signature = base64.b64decode(given, validate=True)
        except (binascii.Error, ValueError):
            signature = b""
        good = hmac.compare_digest(hmac.digest(self._secret, signed, hashlib.sha256), signature)
        if not good or version != "v1" or not delivery or not (stamp.isascii() and stamp.isdigit() and len(stamp) < 15):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "this delivery is not signed with the secret that ferry and MLflow share")
        if abs(now - int(stamp)) > MAX_AGE:
            raise RefusedError(
                HTTPStatus.UNAUTHORIZED, "this delivery was signed too long ago, or the clocks of MLflow and ferry differ"
            )
        self._seen = {known: until for known, until in self._seen.items() if until >= now}
        if delivery in self._seen:
            raise RefusedError(HTTPStatus.CONFLICT, "this delivery was received before")
        if len(self._seen) >= MAX_SEEN:
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "too many deliveries arrived; send this one again later")
        self._seen[delivery] = int(stamp) + MAX_AGE


def receiver(secret: str, wake: threading.Event) -> ASGIApp:
    """Build the application that takes deliveries; a good one sets `wake`."""
    deliveries = Deliveries(secret)

    async def deliver(request: Request) -> Response:
        body = await body_of(request, MAX_BODY)
        delivery, stamp, signatures = (
            request.headers.get(f"X-MLflow-{name}", "") for name in ("Delivery-Id", "Timestamp", "Signature")
        )
        try:
            deliveries.check(delivery, stamp, signatures, body, time.time())
        except RefusedError as error:
            raise HTTPException(error.status, str(error)) from error
        wake.set()
        return PlainTextResponse("looking", HTTPStatus.ACCEPTED)

    return application([Route(PATH, deliver, methods=["POST"])], f"deliveries are sent to {PATH} by POST")


def secret_of(workspace: Workspace) -> tuple[str, str]:
    """Return the secret that ferry shares with MLflow, and where it is kept.

    It is kept in the environment variable FERRY_WEBHOOK_SECRET or else in keys/webhook.secret, which is made if it is missing.

    Raises:
        WorkspaceError: the secret is too short, or others may read the file.
        ServerError: others could read the new file.
    """
    given = os.environ.get(SECRET)
    if given is not None:
        where = SECRET
    else:
        path = workspace.root / "keys" / "webhook.secret"
        where = str(path)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileExistsError):
            write_secret(path, secrets.token_urlsafe(32))
        with path.open() as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise WorkspaceError(f"other users may read {path}; remove it, and `ferry serve --webhooks` writes a new secret")
            given = file.read().strip()
    if len(given) < SHORTEST:
        raise WorkspaceError(f"the secret in {where} has fewer than {SHORTEST} characters; `openssl rand -base64 32` makes one")
    return given, where


def address_of(text: str) -> tuple[str, int]:
    """Parse PORT or HOST:PORT; without a host, it is 127.0.0.1.

    Raises:
        WorkspaceError: it is neither.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65_536):
        raise WorkspaceError(f"{text!r} is not an address for webhooks; write a port, such as 8711, or host:port")
    return host.strip("[]") or "127.0.0.1", int(port)


@contextmanager
def watching(workspace: Workspace, webhooks: tuple[str, int] | None) -> Iterator[tuple[str, int] | None]:
    """Compare MLflow's aliases with the ledger during the block: at once, every `poll_seconds`, and after each webhook.

    Differences are settled as by `ferry reconcile`, and printed.

    Args:
        workspace: workspace whose aliases are looked at.
        webhooks: host and port at which deliveries are taken; None: there are no webhooks, only polling.

    Yields:
        host and port at which deliveries are taken; None: there are no webhooks.

    Raises:
        ServerError: the address cannot be used, or others could read a new file with the secret.
        WorkspaceError: the secret is too short, or others may read its file.
    """
    wake, ending = threading.Event(), threading.Event()
    with ExitStack() as life:
        address = None
        if webhooks:
            try:
                address = life.enter_context(serving(receiver(secret_of(workspace)[0], wake), *webhooks))
            except OSError as error:
                where = f"{webhooks[0]}:{webhooks[1]}"
                raise ServerError(
                    f"webhooks cannot be received at {where}: {error.strerror or error}; choose another port"
                ) from error
        with watchers.watching("MLflow's aliases", lambda: _look(workspace, wake, ending), ending, wake):
            yield address


def _look(workspace: Workspace, wake: threading.Event, ending: threading.Event) -> None:
    told = ""
    while not ending.is_set():
        wake.clear()  # before looking, so that an alias that is moved meanwhile is looked at next
        try:
            news = news_of_aliases(workspace, workspace.subjects(), workspace.needs_approval)
        except Exception as error:  # noqa: BLE001 - whatever somebody puts into MLflow, the watcher goes on
            news = f"MLflow's aliases cannot be looked at: {error}"
        alerts.survey(workspace)
        if news and news != told:  # the same news is printed once
            telling.tell(news)
        told = news
        wake.wait(workspace.settings.poll_seconds)
