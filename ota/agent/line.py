"""One connection at a time to a web server, directly or through a proxy; another thread can cut it at any moment."""

from __future__ import annotations

import http.client
import logging
import re
import socket
import threading
import weakref
from contextlib import suppress
from typing import Any

import urllib3

from ota.agent import network
from ota.agent.network import Proxy

FAULTS = (urllib3.exceptions.HTTPError, OSError, ValueError)
"""What a request raises if the link fails; ValueError: an address or header that is not valid."""

TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")  # how http.client says that a proxy refused
CLOCK = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
HOST = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


class _WithoutQuery(logging.Filter):
    """Removes queries from what urllib3 logs: a query may be a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = re.sub(r"\?\S*", "?…", record.getMessage()), (), None
        return True


for _name in ("connectionpool", "connection", "response"):
    logging.getLogger(f"urllib3.{_name}").addFilter(_WithoutQuery())


class Line:
    """Connections that are kept for the next request; another thread can cut them."""

    def __init__(self, timeout: float, authorities: str = "") -> None:
        """Make no connection yet.

        Args:
            timeout: seconds without a byte after which a connection counts as dead.
            authorities: PEM certificates of the authorities that are trusted; empty: those of the system.
        """
        self.was_cut = False
        self._lock, self._sockets = threading.Lock(), weakref.WeakSet[socket.socket]()
        self._timeout, self._authorities, self._asked = timeout, authorities, ""
        self._pools: dict[Proxy | None, urllib3.PoolManager] = {}

    def get(self, url: str, headers: dict[str, str], proxy: Proxy | None) -> urllib3.BaseHTTPResponse:
        """Send a request, and return the answer as soon as its headers are here.

        Raises:
            TransferError: the proxy does not connect to that server.
            FAULTS: the link failed.
        """
        return self._request("GET", url, headers, proxy, None)

    def post(self, url: str, headers: dict[str, str], proxy: Proxy | None, body: bytes) -> urllib3.BaseHTTPResponse:
        """Send a request with a body, once, and return the answer as soon as its headers are here; see `get`."""
        return self._request("POST", url, headers, proxy, body)

    def _request(
        self, method: str, url: str, headers: dict[str, str], proxy: Proxy | None, body: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        self._asked = url
        if proxy not in self._pools:
            self._pools[proxy] = self._manager(proxy)
        return self._pools[proxy].request(
            method, url, headers=headers, body=body, preload_content=False, decode_content=False, redirect=False
        )

    def _manager(self, proxy: Proxy | None) -> urllib3.PoolManager:
        line = self

        def tunnel(connection: Any, open_it: Any) -> None:
            line._use(connection.sock)  # the proxy may drip its answer
            try:
                open_it()
            except OSError as error:
                if proxy and (found := TUNNEL.match(str(error))):
                    raise network.no_tunnel(int(found[1]), line._asked, proxy) from error
                raise

        class Plain(urllib3.connection.HTTPConnection):
            def connect(self) -> None:
                super().connect()
                line._use(self.sock)

            def _tunnel(self) -> None:
                tunnel(self, super()._tunnel)

        class Secure(urllib3.connection.HTTPSConnection):
            def connect(self) -> None:
                super().connect()  # including TLS, which the timeout bounds as a whole
                line._use(self.sock)

            def _tunnel(self) -> None:
                tunnel(self, super()._tunnel)

        class PlainPool(urllib3.HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Secure

        given: dict[str, Any] = {
            "retries": False, "timeout": urllib3.Timeout(connect=self._timeout, read=self._timeout),
            "ca_cert_data": self._authorities or None,
        }  # fmt: skip
        made = (
            urllib3.ProxyManager(proxy.url, proxy_headers=_authorizing(proxy), **given) if proxy else urllib3.PoolManager(**given)
        )
        made.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
        return made

    def _use(self, made: Any) -> None:
        if not isinstance(made, socket.socket):
            return  # TLS within TLS; the socket below it is known from its tunnel
        with self._lock:
            self._sockets.add(made)
        if self.was_cut:  # the cut came before the connection was made
            self.cut()

    def cut(self) -> None:
        """End what a thread waits for, by shutting the connections down; they are never used again."""
        self.was_cut = True
        with self._lock:
            for made in self._sockets:
                with suppress(OSError):
                    # Not the method of SSLSocket: it would drop the TLS state that the waiting thread still uses.
                    socket.socket.shutdown(made, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections; the objects here refer to each other, so they would otherwise stay open for a while."""
        for manager in self._pools.values():
            for key in manager.pools.keys():  # noqa: SIM118 - it refuses to be iterated over itself
                with suppress(KeyError):
                    manager.pools[key].close()
            manager.clear()


def _authorizing(proxy: Proxy) -> dict[str, str]:
    return {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}


def why(error: BaseException) -> str:
    """Say what went wrong on the connection; the texts of urllib3 name its internal objects."""
    found: BaseException | None = error
    while found:
        # Known by its fields: a Python without OpenSSL fetches from folders and by http, whose files are signed, too.
        if (code := getattr(found, "verify_code", None)) is not None:
            return f"its certificate is not accepted ({str(getattr(found, 'verify_message', '')).rstrip('.')}); {_remedy(code)}"
        if isinstance(found, OSError) and found.strerror:
            return str(found.strerror)
        if isinstance(found, TimeoutError):
            return "no answer in time"
        if isinstance(found, (ConnectionError, http.client.IncompleteRead)):
            return "the connection was closed"
        found = found.__cause__ or found.__context__
    return "the server there is not a web server"


def _remedy(code: int) -> str:
    if code in CLOCK:
        return "check this device's clock, or let the server get a new certificate"
    if code in HOST:
        return "give the name that the certificate holds"
    return "if a private authority signs it, give that authority with `ferry-agent init --ca FILE`"
