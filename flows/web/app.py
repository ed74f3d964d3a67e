"""Build and run the factory's web applications: limits on time, size and connections, and one plain sentence for each refusal.

uvicorn bounds only the idle time between two requests, so a sender of one byte a minute would hold a connection for ever. Here a
connection carries one request, and a deadline bounds the whole of it.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0  # until the whole request must be there
ANSWER_SECONDS = 120.0  # from then until the whole answer must be read; the records may be locked for `LOCK_SECONDS`
CONNECTIONS = 64  # at one time; further ones are closed
ENDING_SECONDS = 5.0


class _Connection(H11Protocol):
    """A connection that ends at its deadlines, however slowly the other side sends or reads."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the deadline of the request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._received = False
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        if len(self.connections) > CONNECTIONS:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Start the deadline of the answer once the request is complete."""
        super().data_received(data)
        if not self._received and self.conn.their_state is not h11.IDLE and self.conn.their_state is not h11.SEND_BODY:
            self._received = True
            self._deadline.cancel()
            self._deadline = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the deadline."""
        self._deadline.cancel()
        super().connection_lost(exc)


class _Guard:
    """ASGI application around another: gives every answer the same headers, and refuses other hosts than those that are allowed."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], hosts: Sequence[str]) -> None:
        self._app, self._headers, self._hosts = app, headers, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request, and pass it on."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({"Connection": "close", **self._headers})
            await send(message)

        answer = self._app
        if self._hosts:
            port = scope["server"][1]
            if Request(scope).headers.get("host") not in {f"{host}:{port}" for host in self._hosts}:
                answer = PlainTextResponse("this is not the host that was asked for", 421)
        await answer(scope, receive, with_headers)


def application(
    routes: Sequence[Route], nothing: str, headers: Mapping[str, str] | None = None, hosts: Sequence[str] = ()
) -> ASGIApp:
    """Build an application.

    Args:
        routes: paths and what answers them.
        nothing: what is said of any other path or method.
        headers: headers of every answer.
        hosts: host names that a request may name, with the port of this server; empty: any. A page that a browser shows must
            name them, because another site may point a name of its own at this machine (DNS rebinding).
    """

    async def refused(_: Request, error: Exception) -> Response:
        found = cast("HTTPException", error)
        return PlainTextResponse(nothing if found.status_code in (404, 405) else found.detail, found.status_code, found.headers)

    async def hung_up(_: Request, _error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def failed(_: Request, error: Exception) -> Response:
        sys.stderr.write(f"ferry: a request failed: {error!r}\n")
        return PlainTextResponse("ferry failed; its terminal says why", 500)

    made = Starlette(
        routes=routes,
        exception_handlers={HTTPException: refused, ClientDisconnect: hung_up, Exception: failed},
    )
    made.router.redirect_slashes = False  # a path is taken as it is, or not at all
    return _Guard(made, headers or {}, hosts)


async def body_of(request: Request, most: int) -> bytes:
    """Read a request's body.

    Args:
        request: request with a length.
        most: bytes.

    Raises:
        HTTPException: the request does not say how long it is (411), or is longer than `most` (413).
    """
    length = request.headers.get("content-length")  # h11 lets only digits pass
    if length is None:
        raise HTTPException(411, "a request needs a Content-Length")
    if int(length) > most:
        raise HTTPException(413, f"a request may have at most {most} bytes")
    return await request.body()


@contextmanager
def serving(app: ASGIApp, host: str, port: int) -> Iterator[tuple[str, int]]:
    """Serve an application in a thread during the block.

    Args:
        app: application.
        host: address to listen at.
        port: port; 0 chooses a free one.

    Yields:
        address and port.

    Raises:
        OSError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        config = uvicorn.Config(
            app, http=_Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, log_level="critical",
            access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="web", daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join(ENDING_SECONDS)
