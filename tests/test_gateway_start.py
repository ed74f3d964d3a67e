"""`ferry gateway` and `ferry serve --gateway`: what the process is given, and that it ends with its ferry."""

from __future__ import annotations

import configparser
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from flows import gateway
from flows.setup import create
from flows.workspace import Workspace
from ota.errors import OperatorError
from ota.gateway.__main__ import parser
from ota.gateway.server import ENDING_SECONDS, IDLE_SECONDS, MOST_CONNECTIONS, OF_ONE_ADDRESS
from ota.report import MAX_BATCH
from tests.test_slow import clean_environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create(tmp_path_factory.mktemp("factory") / "ws", ["shapes"]).root


@pytest.fixture
def workspace(folder: Path) -> Workspace:
    return Workspace(folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def test_the_database_is_told_in_the_environment_and_nothing_else_of_ours(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "FERRY_ALERT_SECRET", "FERRY_WEBHOOK_SECRET"):
        monkeypatch.setenv(name, "S3cret")
    monkeypatch.setenv("FERRY_STORES_DATABASE", "postgresql://ferry:S3cret-db@db.example/ferry")
    workspace = Workspace(workspace.root)
    words, environment = gateway.command(workspace, gateway.place(workspace))
    assert "S3cret" not in " ".join(words)
    assert [name for name, value in environment.items() if "S3cret" in value] == ["FERRY_STORES_DATABASE"]
    assert str(workspace.root / "published") in words
    assert "keys" not in " ".join(words)


def test_options_win_over_ferry_toml(workspace: Workspace, tmp_path: Path):
    path = workspace.root / "ferry.toml"
    before = path.read_text()
    path.write_text(
        before.replace(
            "[gateway]",
            '[gateway]\nport = 9000\ntls_cert = "tls/cert.pem"\ntls_key = "tls/key.pem"\ntrusted_proxies = ["10.0.0.7"]',
        )
    )
    try:
        opened = Workspace(workspace.root)
        at = gateway.place(opened, host="0.0.0.0")
        assert (at.host, at.port, at.certificate, at.proxies) == ("0.0.0.0", 9000, workspace.root / "tls/cert.pem", ("10.0.0.7",))
        assert gateway.place(opened, port=9001).port == 9001
    finally:
        path.write_text(before)


def test_beyond_the_loopback_without_tls_is_refused_before_anything_starts(workspace: Workspace):
    with pytest.raises(OperatorError, match="listens on the loopback only"):
        gateway.place(workspace, host="0.0.0.0")
    with pytest.raises(OperatorError, match="no address and no network"):
        gateway.place(workspace, proxies=("proxy.example",))


def test_a_repository_on_s3_is_not_served(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FERRY_STORES_PUBLISH", "s3://bucket/prefix")
    assert gateway.published(Workspace(workspace.root)) is None


def test_ferry_gateway_becomes_the_gateway(folder: Path, tmp_path: Path):
    with (tmp_path / "log").open("wb") as log:
        ferry = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "-w", str(folder), "gateway", "--port", str(free_port())],
            stderr=log,
            env=clean_environment(),
        )
    try:
        until(lambda: b"the gateway listens at http://127.0.0.1:" in (tmp_path / "log").read_bytes())
        assert "ota.gateway" in psutil.Process(ferry.pid).cmdline()
        ferry.terminate()
        assert ferry.wait(60) == 0
    finally:
        ferry.kill()
        ferry.wait()


PROGRAM = """
import sys, threading
from pathlib import Path
from flows import gateway
from flows.workspace import Workspace
w = Workspace(Path(sys.argv[1]))
with gateway.beside(*gateway.command(w, gateway.place(w, port=int(sys.argv[2])))):
    print("up", flush=True)
    sys.stdin.read()
"""


def test_it_is_started_again_and_ends_with_its_ferry(folder: Path, tmp_path: Path):
    port = free_port()
    for number in (0, signal.SIGKILL):
        ferry = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=clean_environment(),
        )  # fmt: skip
        assert ferry.stdout
        assert ferry.stdin
        try:
            assert ferry.stdout.readline() == b"up\n"
            until(lambda: listens(port))
            (first,) = psutil.Process(ferry.pid).children()
            first.kill()  # as the kernel does when memory is short
            until(
                lambda ferry=ferry, first=first: [p.pid for p in psutil.Process(ferry.pid).children() if p.pid != first.pid] != []
            )
            until(lambda: listens(port))
            (second,) = psutil.Process(ferry.pid).children()
            if number:
                ferry.send_signal(number)
            else:
                ferry.communicate()  # its input ends, and so does its block
            until(lambda second=second: not second.is_running() or second.status() == psutil.STATUS_ZOMBIE)
            assert not listens(port)
        finally:
            ferry.kill()
            ferry.communicate()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


def until(holds) -> None:
    for _ in range(3_000):
        if holds():
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"it never became true; process {os.getpid()}")


def test_the_unit_calls_the_program_as_it_is(tmp_path: Path):
    text = (Path(__file__).parents[1] / "infra/factory/ferry-gateway.service").read_text().replace("\\\n", " ")
    made = configparser.ConfigParser(interpolation=None, strict=False)
    made.optionxform = str  # type: ignore[assignment,method-assign]
    made.read_string(text)
    service = made["Service"]
    _, *words = service["ExecStart"].split()
    assert words[:3] == ["-P", "-m", "ota.gateway"]
    given = parser().parse_args(words[3:])
    assert (given.host, given.tls_cert.name, given.tls_key.name) == ("0.0.0.0", "cert.pem", "key.pem")
    assert float(service["TimeoutStopSec"]) > ENDING_SECONDS  # it is not killed while it finishes
    assert int(service["LimitNOFILE"]) > 2 * MOST_CONNECTIONS
    assert "keys" in service["InaccessiblePaths"]


def test_the_proxies_know_the_gateways_limits():
    infra = Path(__file__).parents[1] / "infra/proxy"
    nginx, caddy = (infra / "nginx.conf").read_text(), (infra / "Caddyfile").read_text()
    assert f"client_max_body_size {MAX_BATCH // 1024}k;" in nginx
    assert f"max_size {MAX_BATCH // 1024}KiB" in caddy
    assert nginx.count("{") == nginx.count("}")
    assert caddy.count("{") == caddy.count("}")
    requests, burst = (int(re.findall(rf"{name}=(\d+)", nginx)[0]) for name in ("rate", "burst"))
    assert (
        burst / requests + 10_000 / requests < 60
    )  # a plant of ten thousand devices behind one address is heard within a minute
    assert re.search(
        r"error_page 429 = @later;.*location @later \{[^}]*add_header Retry-After 60 always;[^{]*return 429 ", nginx, re.DOTALL
    )
    assert int(re.findall(r"limit_conn ferry_connections (\d+);", nginx)[0]) <= OF_ONE_ADDRESS
    assert "$proxy_add_x_forwarded_for" not in nginx  # it would pass on what the sender wrote
    for text, name in ((nginx, r"keepalive_timeout (\d+)s"), (caddy, r"keepalive (\d+)s")):
        assert int(re.findall(name, text)[0]) < IDLE_SECONDS
