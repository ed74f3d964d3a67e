"""Run the gateway's application in uvicorn: deadlines for slow senders and readers, limits of connections, TLS, an orderly end.

uvicorn bounds only the idle time between two requests, so a sender of one byte a minute would hold a connection for ever. Here
each request has a deadline from its first byte on, and a reader that takes nothing for a while is cut off. A long download that
makes progress has no deadline, because a bundle on a slow link takes hours.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from ota.errors import OperatorError
from ota.limits import KiB

log = logging.getLogger("ota.gateway")

REQUEST_SECONDS = 30  # from the first byte of a request to its last; 256 KiB on a link of 100 kbit/s take 21 s
STALLED_SECONDS = 60.0  # until a reader must have taken something of what waits to be sent
IDLE_SECONDS = 20  # between two requests of a connection
HANDSHAKE_SECONDS = 10.0  # of TLS
CONNECTIONS = 512  # at one time; requests on further ones are answered 429
OF_ONE_ADDRESS = CONNECTIONS // 8  # of them, unless the address is a trusted proxy
MOST_CONNECTIONS = 2 * CONNECTIONS  # further ones are closed
MOST_HEADER = 16 * KiB  # bytes of a request's header
ENDING_SECONDS = 20  # until requests that are in progress must have ended, when the process is to end


@dataclass(frozen=True)
class Place:
    """Where the gateway listens, and to whom it believes what they say about the sender."""

    host: str = "127.0.0.1"
    port: int = 8443
    certificate: Path | None = None
    key: Path | None = None
    insecure_bind: bool = False
    proxies: tuple[str, ...] = ()
    """Addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed."""
    seconds: int = REQUEST_SECONDS
    """From the first byte of a request to its last."""

    @property
    def scheme(self) -> str:
        """Return https or http."""
        return "https" if self.certificate else "http"


def check(place: Place) -> None:
    """Check that a place may be used.

    Raises:
        OperatorError: without TLS, it is more than the loopback; a half of the TLS files is missing; or a proxy is no address.
    """
    if (place.certificate is None) != (place.key is None):
        raise OperatorError("--tls-cert and --tls-key belong together; give both")
    if not place.certificate and not place.insecure_bind and not is_loopback(place.host):
        raise OperatorError(
            f"without TLS the gateway listens on the loopback only, and {place.host} is more; give --tls-cert and --tls-key, or "
            "--insecure-bind if a proxy that you run adds TLS"
        )
    if not 1 <= place.seconds <= 600:
        raise OperatorError("--request-seconds is between 1 and 600")
    for proxy in place.proxies:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError as error:
            raise OperatorError(
                f"--trusted-proxy {proxy} is no address and no network; write one such as 10.0.0.7 or 10.0.0.0/24"
            ) from error


def customer(host: str) -> str:
    """Return whom an address stands for: itself or, of IPv6, the network of one customer; "unknown": it is no address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def is_loopback(host: str) -> bool:
    """Check whether a host to listen at is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


def is_in(networks: Networks, host: str) -> bool:
    """Check whether a host is an address in one of the networks."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in networks)


class _Peers:
    """ASGI application around all: it warns once if a proxy that nobody named says who sends."""

    def __init__(self, app: ASGIApp, proxies: Networks) -> None:
        self._app, self._proxies, self._told = app, proxies, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look who sends, before X-Forwarded-For changes that, and pass the request on."""
        if not self._told and scope["type"] == "http" and any(name == b"x-forwarded-for" for name, _ in scope["headers"]):
            peer = scope["client"][0] if scope.get("client") else ""
            if not is_in(self._proxies, peer):
                self._told = True
                log.warning(
                    "%s sends X-Forwarded-For and is no --trusted-proxy, so all who send through it share the limits of one address; "
                    "if it is a proxy that you run, name it with --trusted-proxy", peer,
                )  # fmt: skip
        await self._app(scope, receive, send)


class _Crowded:
    """ASGI application that refuses a request because there are too many connections; the body is not read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Give one answer."""
        body = b'{"error": "too many connections at this moment; try again later", "code": "busy"}'
        headers = [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"retry-after", b"30"),
            (b"cache-control", b"no-store"), (b"connection", b"close"),
        ]  # fmt: skip
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Connection(H11Protocol):
    """A connection that ends at its deadlines, however slowly the other side sends or reads."""

    proxies: Networks = ()
    """Set by `run`: their connections count for many senders."""
    seconds: float = REQUEST_SECONDS
    """Set by `run`: of a request."""
    senders: ClassVar[Counter[str]] = Counter()
    """Number of connections by address; an address without one is removed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection, and give it the deadline of its first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._sender = customer(self.client[0] if self.client else "")
        self.senders[self._sender] += 1
        many = self.senders[self._sender] > OF_ONE_ADDRESS and not self._is_proxy()
        if many or len(self.connections) > CONNECTIONS:
            self.app = _Crowded()
        if len(self.connections) > MOST_CONNECTIONS:
            self.transport.abort()
            return
        self._deadline = self.loop.call_later(self.seconds, self.transport.abort)

    def _is_proxy(self) -> bool:
        return is_in(self.proxies, self.client[0] if self.client else "")

    def data_received(self, data: bytes) -> None:
        """Parse what came, and start or end the deadline."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Start the next request, of which a part may be there already."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Keep a deadline exactly while a request is incomplete; it begins with the request's first byte."""
        theirs = self.conn.their_state
        incomplete = theirs is h11.SEND_BODY or (theirs is h11.IDLE and bool(self.conn.trailing_data[0]))
        if incomplete and self._deadline is None:
            self._deadline = self.loop.call_later(self.seconds, self.transport.abort)
        elif not incomplete and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def pause_writing(self) -> None:
        """Start the deadline of a reader whose buffer is full."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """End that deadline: the reader took something."""
        super().resume_writing()
        if self._stalled:
            self._stalled.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the deadlines and the count."""
        for timer in (self._deadline, self._stalled):
            if timer:
                timer.cancel()
        self.senders[self._sender] -= 1
        if self.senders[self._sender] <= 0:
            del self.senders[self._sender]
        super().connection_lost(exc)


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose TLS handshakes are short: uvicorn counts a connection only after its handshake."""

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """Listen, with a deadline for handshakes."""
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_SECONDS
        return await super().create_server(*args, **options)


def listen(place: Place) -> socket.socket:
    """Open the socket.

    Raises:
        OperatorError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        made = socket.create_server((place.host, place.port), family=family, backlog=CONNECTIONS)
        # asyncio sets this only on sockets that name their protocol. Without it, the body of an answer waits 40 ms for the other side's
        # acknowledgement of the header. Accepted connections inherit it.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise OperatorError(
            f"the gateway cannot listen at {place.host}:{place.port}: {why}; choose another --host or --port"
        ) from error
    return made


def run(app: ASGIApp, place: Place, listening: Sequence[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT; requests in progress get their answers before it returns.

    Raises:
        OperatorError: the TLS files cannot be used.
    """
    tls: dict[str, Any] = {}
    if place.certificate and place.key:
        tls = {"ssl_certfile": str(place.certificate), "ssl_keyfile": str(place.key)}
    proxies = tuple(ipaddress.ip_network(proxy, strict=False) for proxy in place.proxies)
    believing = cast("ASGIApp", ProxyHeadersMiddleware(cast("Any", app), list(place.proxies))) if proxies else app
    config = uvicorn.Config(
        _Peers(believing, proxies), http=Connection, ws="none", lifespan="on", loop="ota.gateway.server:Loop", log_config=None, access_log=False,
        proxy_headers=False, server_header=False,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=ENDING_SECONDS, h11_max_incomplete_event_size=MOST_HEADER, **tls,
    )  # fmt: skip
    try:
        config.load()
    except (OSError, ssl.SSLError, ValueError) as error:
        raise OperatorError(f"the certificate or its key cannot be used: {error}; check --tls-cert and --tls-key") from error
    if config.ssl:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    Connection.seconds = place.seconds
    Connection.proxies = proxies
    # uvicorn raises the signal again when it has ended; whoever sent it wanted an orderly end, and got it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    uvicorn.Server(config).run(sockets=list(listening))
