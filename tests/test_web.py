"""The factory's web server: whoever sends slowly, reads slowly or opens many connections keeps nobody else waiting for long."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from flows.web import app
from flows.web.app import application, body_of, serving

BIG = 64 * 1024 * 1024


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    async def echo(request: Request) -> Response:
        return PlainTextResponse(await body_of(request, 100))

    async def big(_: Request) -> Response:
        return PlainTextResponse(b"x" * BIG)

    async def broken(_: Request) -> Response:
        raise ValueError("a secret of the server")

    routes = [Route("/echo", echo, methods=["POST"]), Route("/big", big), Route("/broken", broken)]
    with serving(application(routes, "nothing here", {"X-Ours": "yes"}), "127.0.0.1", 0) as found:
        yield found


def ask(address: tuple[str, int], method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, str | None]:
    with closing(HTTPConnection(*address, timeout=60)) as connection:
        connection.request(method, path, body)
        with connection.getresponse() as reply:
            return reply.status, reply.read(), reply.headers["X-Ours"]


def ended(connection: socket.socket, drip: bytes = b"") -> bool:
    """Send a byte again and again, and say whether the other side ends the connection within a minute."""
    connection.settimeout(0.02)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if drip:
                connection.sendall(drip)
            if connection.recv(1) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"", b""),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nX: ", b"y"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\n", b"A: b\r\n"),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n", b""),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
def test_sender_that_drips_is_left_at_the_deadline(
    address: tuple[str, int], first: bytes, drip: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(address) as slow:
        slow.sendall(first)
        assert ended(slow, drip)
    assert ask(address, "POST", "/echo", b"hello") == (200, b"hello", "yes")


def test_body_that_drips_is_left_at_the_deadline(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "REQUEST_SECONDS", 0.5)
    with socket.create_connection(address) as slow:
        slow.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        slow.settimeout(0.1)
        sent, until = 0, time.monotonic() + 60
        try:
            while sent < 99 and time.monotonic() < until:  # 99 bytes would take 10 s
                slow.sendall(b"x")
                sent += 1
                try:
                    assert slow.recv(1) == b""
                    break
                except TimeoutError:
                    pass
        except OSError:
            pass
        assert sent < 99


def test_reader_that_stops_reading_is_left_at_the_deadline(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "ANSWER_SECONDS", 0.3)
    with socket.create_connection(address) as slow:
        slow.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        # Its place is free again although it never reads and never closes.
        monkeypatch.setattr(app, "CONNECTIONS", 1)
        until = time.monotonic() + 60
        answer = None
        while answer is None and time.monotonic() < until:
            try:
                answer = ask(address, "POST", "/echo", b"next")
            except OSError:
                continue
        assert answer == (200, b"next", "yes")


def test_many_idle_connections_do_not_grow_without_bound(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "CONNECTIONS", 3)
    first = [socket.create_connection(address) for _ in range(3)]
    further = [socket.create_connection(address) for _ in range(5)]
    try:
        assert all(ended(connection) for connection in further)
    finally:
        for connection in (*first, *further):
            connection.close()


def test_what_is_not_there_is_said_in_a_sentence(address: tuple[str, int]):
    assert ask(address, "GET", "/") == (404, b"nothing here", "yes")
    assert ask(address, "POST", "/big", b"") == (405, b"nothing here", "yes")
    assert ask(address, "POST", "/echo", b"x" * 101) == (413, b"a request may have at most 100 bytes", "yes")


def test_error_of_the_server_tells_the_asker_nothing_of_it(address: tuple[str, int], capfd: pytest.CaptureFixture[str]):
    assert ask(address, "GET", "/broken") == (500, b"ferry failed; its terminal says why", "yes")
    assert "ferry: a request failed: ValueError('a secret of the server')" in capfd.readouterr().err
    assert ask(address, "POST", "/echo", b"on") == (200, b"on", "yes")
