"""The local endpoint: it draws whatever happens to the bundle, the worker or the caller, and refuses whom it must not serve."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ota.agent import child, serve, variants
from ota.agent.serve import Service
from ota.errors import OperatorError, StateError
from ota.release.bundle import Bundle
from tests.conftest import few
from tests.fleet_kit import Device, Field, publish

pytest_plugins = ["tests.fleet_kit"]
PNG = b"\x89PNG\r\n\x1a\n"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


Answer = tuple[int, dict[str, str], bytes]


class Client:
    """A client of an endpoint."""

    def __init__(self, connect: Callable[[], http.client.HTTPConnection], service: Service, server: Any = None) -> None:
        self._connect, self.service, self.server = connect, service, server

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = self._connect()
        try:
            with suppress(BrokenPipeError):  # refused before the body was sent; the answer can still be read
                connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def draw(self, headers: dict[str, str] | None = None, **request: Any) -> Answer:
        return self.ask("POST", "/generate", json.dumps(request).encode(), headers)

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.ask("GET", "/status")[2])
        return told

    def raw(self, data: bytes) -> bytes:
        """Send bytes that no HTTP library would send, and return what comes back."""
        connection = self._connect()
        connection.connect()
        assert connection.sock
        with connection.sock as link:
            with suppress(OSError):
                link.sendall(data)
            received = b""
            with suppress(OSError):
                while piece := link.recv(4096):
                    received += piece
            return received

    def serves(self, digest: str) -> bool:
        return self.status()["serving"] == digest


def until(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something has happened; fail after this many seconds."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not come to pass"
        threading.Event().wait(0.02)


@contextmanager
def serving(device: Device, folder: Path | None = None) -> Iterator[Client]:
    """Serve a device's endpoint, on a Unix socket in `folder` or else on a port."""
    service, stopped = Service(device.home), threading.Event()
    path = folder / "agent.sock" if folder else None
    listening = serve.listening_socket(path) if path else serve.listening_port(0)
    with listening as server:
        keeper = threading.Thread(target=serve.run, args=(service, server, stopped))
        keeper.start()
        try:
            yield Client(
                lambda: UnixConnection(path) if path else http.client.HTTPConnection("127.0.0.1", server.port, timeout=60),
                service,
                server,
            )
        finally:
            stopped.set()
            keeper.join()


@pytest.fixture(scope="module")
def device(fielded: Field, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """Provide a device that runs `first`; tests may only draw with it."""
    return fielded.copy(tmp_path_factory.mktemp("served") / "field").device


@pytest.fixture(scope="module")
def client(device: Device) -> Iterator[Client]:
    """Serve the endpoint of `device` on a port."""
    with serving(device) as made:
        yield made


def test_draws_what_is_asked_for(client, device):
    status, headers, body = client.draw(caption="disc", seed=3)
    assert status == 200
    assert body.startswith(PNG)
    assert headers["Content-Type"] == "image/png"
    assert headers["X-Ferry-Bundle"] == device.active
    assert headers["X-Ferry-Variant"] == "full"
    assert float(headers["X-Ferry-Milliseconds"]) > 0
    assert client.draw(caption="disc", seed=3)[2] == body
    assert client.draw(caption="disc", seed=4)[2] != body


def test_draws_what_the_command_draws(client, device, tmp_path):
    device.command("generate", "bar", "--seed", "7", "-o", str(tmp_path / "image.png"))
    assert client.draw(caption="bar", seed=7)[2] == (tmp_path / "image.png").read_bytes()


def test_says_how_it_goes(client, device):
    client.draw()
    told = client.status()
    assert told["serving"] == told["active"] == device.active
    assert told["variants"] == ["full"]
    assert told["milliseconds"]["full"]["images"] >= 1
    assert told["strayed"] is None


# Callers


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        pytest.param(b"", "not JSON", id="nothing"),
        pytest.param(b"{", "not JSON", id="half"),
        pytest.param(b"[" * 4000, "not JSON", id="nested"),
        pytest.param(b"[]", "not of the form", id="list"),
        pytest.param(b'{"caption": 3}', "not of the form", id="number for a caption"),
        pytest.param(b'{"seed": "3"}', "not of the form", id="text for a seed"),
        pytest.param(b'{"seed": true}', "not of the form", id="truth for a seed"),
        pytest.param(b'{"seed": 1.5}', "not of the form", id="half a seed"),
        pytest.param(b'{"slot": "/etc"}', "not of the form", id="field that does not exist"),
        pytest.param(b'{"seed": -1}', "out of range", id="negative seed"),
        pytest.param(b'{"seed": %d}' % 2**128, "out of range", id="huge seed"),
        pytest.param(b'{"caption": "%s"}' % (b"x" * 99), "shorten it", id="long caption"),
        pytest.param(b'{"caption": "\\ud800"}', "not valid UTF-8", id="half a character"),
        pytest.param(b'{"variant": "best"}', "no variant 'best'", id="unknown variant"),
        pytest.param(b'{"variant": "fast"}', "has no variant fast", id="variant of other bundles"),
    ],
)
def test_wrong_wish_is_refused_in_a_sentence(client, body, sentence):
    status, _, said = client.ask("POST", "/generate", body)
    assert status == 400
    assert sentence in json.loads(said)["error"]
    assert client.draw()[0] == 200


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1"}])
def test_web_page_refused(client, headers):
    for method, path in (("POST", "/generate"), ("GET", "/status")):
        assert client.ask(method, path, b"{}", headers)[0] == 403


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "127.0.0.1", "localhost", "127.0.0.1:1", "", "0.0.0.0"])
def test_rebound_name_refused(client, name):
    """Refuse DNS rebinding: a web page asks under its own name, which was made to point at this host."""
    assert client.draw({"Host": name})[0] == 421


def test_doubled_host_refused(client):
    port = client._connect().port
    host = f"Host: 127.0.0.1:{port}\r\n"
    assert b" 200 " in client.raw(f"GET /status HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode()).splitlines()[0]
    assert (
        b" 421 " in client.raw(f"GET /status HTTP/1.1\r\n{host}Host: evil\r\nConnection: close\r\n\r\n".encode()).splitlines()[0]
    )
    assert b" 421 " in client.raw(b"GET /status HTTP/1.0\r\n\r\n").splitlines()[0]


def test_page_cannot_send_what_needs_no_permission(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert client.draw({"Content-Type": kind})[0] == 415


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Length: 4097", 413), ("Content-Length: 99999999999999999999", 413), ("Content-Length: -1", 411), ("Content-Length: 0x10", 411),
        ("Content-Length: ²", 411), ("", 411), ("Transfer-Encoding: chunked", 411), ("Content-Length: 2\r\nTransfer-Encoding: chunked", 411),
    ],
)  # fmt: skip
def test_body_without_bounds_refused_unread(client, headers, status):
    port = client._connect().port
    start = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n{headers}\r\n\r\n"
    said = client.raw(start.encode("utf-8") + b"{}")
    assert f" {status} ".encode() in said.splitlines()[0]
    assert b"Connection: close" in said


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/generate", 404), ("POST", "/status", 404), ("GET", "/../etc/passwd", 404),
                                                        ("PUT", "/generate", 501), ("DELETE", "/status", 501)])  # fmt: skip
def test_other_paths_and_methods_refused(client, method, path, status):
    assert client.ask(method, path, b"{}")[0] == status


@pytest.mark.parametrize("data", [b"\r\n\r\n", b"GET", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n",
                                  b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"])  # fmt: skip
def test_what_is_no_request_is_harmless(client, data, monkeypatch):
    monkeypatch.setattr(serve, "READ_TIMEOUT", 0.2)
    client.raw(data)
    assert client.draw()[0] == 200


def test_more_images_at_once_than_allowed_are_sent_away(client, monkeypatch):
    entered, release = threading.Semaphore(0), threading.Event()
    draw = client.service.draw

    def waiting(*given: Any) -> Any:
        entered.release()
        release.wait(60)
        return draw(*given)

    monkeypatch.setattr(client.service, "draw", lambda **given: waiting(*given.values()))
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(client.draw()[0])) for _ in range(serve.MAX_AT_ONCE)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert entered.acquire(timeout=60)
    status, headers, body = client.draw()
    assert (status, headers["Retry-After"]) == (503, "5")
    assert b"requests wait already" in body
    assert client.ask("GET", "/status")[0] == 200
    release.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * serve.MAX_AT_ONCE


@pytest.mark.parametrize("callers", [serve.MAX_AT_ONCE, 3 * serve.MAX_CALLERS])
@pytest.mark.parametrize("sent", [b"", b"POST /generate HTTP/1.1\r\nContent-Length: 2\r\n"])
def test_slow_callers_starve_nobody(client, callers, sent, monkeypatch):
    """Draw at once while others hold connections; each of them could be followed by another one, so to wait is no way out."""
    monkeypatch.setattr(serve, "READ_TIMEOUT", 600.0)
    with ExitStack() as closing:
        for _ in range(callers):
            connection = client._connect()
            connection.connect()
            assert connection.sock
            closing.enter_context(connection.sock)
            with suppress(OSError):  # it may have made room for another one
                connection.sock.sendall(sent)
        assert client.draw()[0] == 200
        assert client.ask("GET", "/status")[0] == 200
        assert len(client.server.callers) <= serve.MAX_CALLERS


def test_silent_caller_is_given_up(client, monkeypatch):
    monkeypatch.setattr(serve, "READ_TIMEOUT", 0.1)
    port = client._connect().port
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"POST /generate HTTP/1.1\r\n")
        link.settimeout(30)
        assert link.recv(100) == b""


def test_dripping_callers_hold_no_place(device, monkeypatch):
    monkeypatch.setattr(serve, "READ_TIMEOUT", 0.5)
    stop = threading.Event()
    with serving(device) as client:
        links = []
        for _ in range(serve.MAX_AT_ONCE):
            connection = client._connect()
            connection.connect()
            assert connection.sock
            links.append(connection.sock)

        def drip() -> None:
            while not stop.wait(0.1):
                for link in links:
                    with suppress(OSError):
                        link.send(b"G")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            until(lambda: client.ask("GET", "/status")[0] == 200)
        finally:
            stop.set()
            dripping.join()
            for link in links:
                link.close()


def test_one_connection_is_for_one_request(client):
    said = client.raw(2 * b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert said.count(b"HTTP/1.1 ") == 1


def test_callers_that_wait_keep_nobody_busy(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "READY_WAIT", 1.0)
    looks: list[int] = []
    look = Service._look
    monkeypatch.setattr(Service, "_look", lambda self: looks.append(1) or look(self))
    with serving(Device.init(tmp_path / "device", repository)) as client:
        waiting = [threading.Thread(target=client.draw) for _ in range(4)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
    assert len(looks) < 100


def test_state_that_cannot_be_read_keeps_nobody_busy(scene: Field, monkeypatch):
    looks: list[int] = []

    def refused(_: Service) -> None:
        looks.append(1)
        raise StateError("it cannot be read")

    with serving(scene.device) as client:
        assert client.draw()[0] == 200
        assert client.service._serving
        monkeypatch.setattr(Service, "_look", refused)
        client.service._serving.worker.close()
        monkeypatch.setattr(serve, "READY_WAIT", 1.0)
        assert client.draw()[0] == 503
    assert len(looks) < 100


def test_many_callers_are_all_served(client):
    answers: list[int] = []
    threads = [threading.Thread(target=lambda i=i: answers.append(client.draw(seed=i)[0])) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 10


# The socket


def test_socket_is_for_owner_and_group(device, tmp_path):
    with serving(device, tmp_path) as client:
        assert client.draw(caption="bar")[0] == 200
        found = (tmp_path / "agent.sock").stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert client.draw({"Host": "anything"})[0] == 200
        assert client.draw({"Origin": "https://evil.example"})[0] == 403
    assert not (tmp_path / "agent.sock").exists()


def test_refusal_is_heard_by_a_caller_that_still_sends(device, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "LAST_WORDS", 60.0)
    with serving(device, tmp_path) as client:
        connection = client._connect()
        connection.connect()
        assert connection.sock
        with connection.sock as link:
            link.sendall(b"POST /generate HTTP/1.1\r\nOrigin: https://evil.example\r\nContent-Length: 2\r\n\r\n")
            link.recv(1, socket.MSG_PEEK)  # it has been refused by now
            link.sendall(b"{")
            link.sendall(b"}")  # breaks if the server has closed the connection
            assert link.recv(4096).startswith(b"HTTP/1.1 403 ")


def test_caller_that_is_refused_holds_no_place(client, monkeypatch):
    monkeypatch.setattr(serve, "LAST_WORDS", 0.01)
    links = []

    def drawn() -> bool:
        with suppress(ConnectionError):  # the server waits only briefly for a caller without a place
            return client.draw()[0] == 200
        return False

    with ExitStack() as closing:
        for _ in range(2 * serve.MAX_AT_ONCE):
            connection = client._connect()
            connection.connect()
            assert connection.sock
            links.append(closing.enter_context(connection.sock))
            links[-1].sendall(b"POST /generate HTTP/1.1\r\nHost: evil\r\nContent-Length: 2\r\n\r\n")
        assert {link.recv(12) for link in links} <= {b"HTTP/1.1 421", b"HTTP/1.1 503"}
        until(drawn)


def test_socket_of_killed_service_is_taken_over(device, tmp_path):
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving(device, tmp_path) as client:
        assert client.draw()[0] == 200


def test_socket_in_use_is_not_taken(device, tmp_path):
    with serving(device, tmp_path) as client:
        with pytest.raises(OperatorError, match="another service listens"), serve.listening_socket(tmp_path / "agent.sock"):
            pass
        assert client.draw()[0] == 200


def test_file_in_the_way_is_not_removed(tmp_path):
    path = tmp_path / "agent.sock"
    path.write_bytes(b"precious")
    with pytest.raises(OperatorError, match="is not a socket"), serve.listening_socket(path):
        pass
    assert path.read_bytes() == b"precious"
    with pytest.raises(OperatorError, match="make its folder"), serve.listening_socket(tmp_path / "no" / "agent.sock"):
        pass


@pytest.mark.parametrize("length", [108, 200])
def test_name_that_is_too_long_for_a_socket_is_said_to_be(length, tmp_path):
    path = tmp_path / ("a" * (length - len(str(tmp_path)) - 1))
    with (
        pytest.raises(OperatorError, match=r"is longer than 107 bytes; name another with --socket$"),
        serve.listening_socket(path),
    ):
        pass
    with serve.listening_socket(path.with_name(path.name[: 107 - length])):
        assert path.with_name(path.name[: 107 - length]).is_socket()


def test_port_is_on_the_loopback_only():
    with serve.listening_port(0) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(OperatorError, match="name another with --port"), serve.listening_port(server.port):
            pass


# What happens to bundles and workers


def test_update_drops_no_request(scene: Field, bundles: dict[str, Bundle], step: Path):
    """Draw without a pause while the device updates: the old bundle answers, then the new one, and no request fails."""
    old, new = (bundles[name].manifest.digest for name in ("first", "second"))
    publish(scene.repository, bundles["second"], step, bundles["first"])
    answers: list[Answer] = []
    done = threading.Event()

    def draw(client: Client) -> None:
        while not done.is_set():
            answers.append(client.draw(seed=len(answers)))

    with serving(scene.device) as client:
        until(lambda: client.serves(old))
        callers = [threading.Thread(target=draw, args=(client,)) for _ in range(3)]
        for caller in callers:
            caller.start()
        try:
            until(lambda: len(answers) > 3)
            scene.device.update()
            until(lambda: client.serves(new))
            seen = len(answers)
            until(lambda: len(answers) > seen + 6)
        finally:
            done.set()
            for caller in callers:
                caller.join()
    assert {status for status, _, _ in answers} == {200}
    by = [headers["X-Ferry-Bundle"] for _, headers, _ in answers]
    assert set(by) == {old, new}
    assert by[0] == old
    assert by[-1] == new


def test_killed_worker_is_replaced_and_its_request_drawn(scene: Field):
    with serving(scene.device) as client:
        until(lambda: client.serves(str(scene.device.active)))
        for _ in range(2):
            assert client.service._serving
            os.kill(client.service._serving.worker.pid, signal.SIGKILL)
            assert client.draw()[0] == 200


def test_request_whose_worker_dies_on_it_is_drawn_by_the_next(scene: Field, monkeypatch):
    draw, deaths = child.Worker.draw, []

    def dying(self: child.Worker, *request: Any) -> dict[str, Any]:
        if request[1] == "disc" and not deaths:
            deaths.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return draw(self, *request)

    monkeypatch.setattr(child.Worker, "draw", dying)
    with serving(scene.device) as client:
        status, _, body = client.draw(caption="disc")
    assert deaths
    assert status == 200
    assert body.startswith(PNG)


def test_bundle_on_trial_is_not_served(updated: Field, bundles: dict[str, Bundle]):
    """Serve the previous bundle during a trial, because the update that tries the new bundle counts its loads."""
    state = updated.device.state
    trial = {"left": 3, "loads": 5}
    updated.device.home.save(type(state).model_validate(state.model_dump() | {"trial": trial}))
    with serving(updated.device) as client:
        assert client.draw()[1]["X-Ferry-Bundle"] == bundles["first"].manifest.digest
        assert client.status()["on_trial"]
        updated.device.home.save(state)
        until(lambda: client.serves(bundles["second"].manifest.digest))
    assert updated.device.state == state


def test_rollback_is_followed(updated: Field, bundles: dict[str, Bundle]):
    with serving(updated.device) as client:
        assert client.draw()[1]["X-Ferry-Bundle"] == bundles["second"].manifest.digest
        updated.device.command("rollback")
        until(lambda: client.serves(bundles["first"].manifest.digest))
        assert client.draw()[0] == 200


@pytest.mark.parametrize("role", few(["weights", "graph", "sampler"], 1))
def test_damaged_bundle_lets_the_one_before_draw(updated: Field, bundles: dict[str, Bundle], role):
    updated.device.file(role).write_bytes(b"damaged")
    with serving(updated.device) as client:
        status, headers, _ = client.draw()
    assert status == 200
    assert headers["X-Ferry-Bundle"] == bundles["first"].manifest.digest


def test_bundle_that_cannot_be_served_rests(scene: Field, monkeypatch):
    """Check that a device with one damaged bundle does not start a process twice a second."""
    started: list[str] = []
    monkeypatch.setattr(serve, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(serve, "READY_WAIT", 1.0)
    worker = child.Worker
    monkeypatch.setattr(child, "Worker", lambda *a: started.append(a[1]) or worker(*a))
    scene.device.file("weights").write_bytes(b"damaged")
    with serving(scene.device) as client:
        for _ in range(30):  # on a busy machine its process may not have reported it yet
            status, headers, said = client.draw()
            assert status == 503
            assert headers["Retry-After"]
            if "damaged" in (error := json.loads(said)["error"]):
                break
        assert "damaged" in error
    assert len(started) <= serve.FAILURES + 1


def test_nothing_installed_is_said(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "READY_WAIT", 0.1)
    with serving(Device.init(tmp_path / "device", repository)) as client:
        status, _, said = client.draw()
    assert status == 503
    assert "run `ferry-agent update`" in json.loads(said)["error"]


def test_no_worker_outlives_the_service(scene: Field):
    with serving(scene.device) as client:
        client.draw()
        assert client.service._serving
        pid = client.service._serving.worker.pid
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_strayed_routes_are_reported_and_the_safe_variant_draws(scene: Field, monkeypatch):
    monkeypatch.setattr(variants, "ROUTE_IMAGES", 3)
    monkeypatch.setattr(variants, "ROUTE_LIMIT", -1.0)  # every load exceeds this
    before = scene.device.events()
    with serving(scene.device) as client:
        for seed in range(3):
            assert client.draw(seed=seed)[0] == 200
        assert "to other experts than at the factory" in client.status()["strayed"]
        until(lambda: "strayed" in scene.device.events())
        assert client.draw()[0] == 200
        for seed in range(6):
            client.draw(seed=seed)
    assert scene.device.events()[len(before) :] == ["strayed"]  # reported once


def test_command_serves_until_told_to_end(scene: Field, tmp_path):
    path = tmp_path / "agent.sock"
    with subprocess.Popen(scene.device.words("serve", "--socket", str(path)), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            assert process.stderr.readline() == f"listening on {path}\n"
            client = Client(lambda: UnixConnection(path), Service(scene.device.home))
            assert client.draw(caption="bar")[2].startswith(PNG)
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert not path.exists()
