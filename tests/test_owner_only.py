"""Who may use the factory's services: only their owner. The servers are real.

A request over HTTP says nothing about the user who makes it. The tests' requests without credentials are therefore what every
local user and every web page can send. What only a user id decides (files, /proc) is tried by a process of another local
user, `nobody`, if the tests run as root.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from flows import serve
from flows.errors import ServerError
from flows.workspace import Workspace, configure_environment
from registry.catalog import Subject
from tests.test_browser import FLAGS, browser, run  # noqa: F401 - a fixture
from tests.test_slow import FERRY, clean_environment, prepared, wait_for

SUBJECT = Subject(line="shapes", configuration="I", variant="full")
EVIL = "http://evil.example"
PULL = {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "touch /tmp/ferry-was-here"}}]}
ROOT = Path(__file__).parent.parent


# What a workspace gives to Prefect


def environment_after(root: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """Open a workspace in a process, and return as JSON the variables that decide who is let in."""
    code = (
        "import json, os, sys; from pathlib import Path; from flows.workspace import Workspace\n"
        "Workspace(Path(sys.argv[1])); print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('PREFECT_')}))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(root)], env=clean_environment() | given, capture_output=True, text=True
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ferry.toml").write_text('schema = 1\n[lines.shapes]\ndata = "data/shapes"\n')
    return tmp_path


SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"


def test_each_process_has_a_secret_of_its_own_for_server_and_clients(root: Path):
    found = [json.loads(environment_after(root, **given).stdout) for given in ({}, {}, {SERVER: "", CLIENT: ""})]
    secrets = [variables[SERVER] for variables in found]
    assert [variables[CLIENT] for variables in found] == secrets
    assert len(set(secrets)) == 3
    for secret in secrets:
        assert re.fullmatch(r"ferry:[A-Za-z0-9_-]{43}", secret)  # 256 bits
    assert {variables["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] for variables in found} == {"none"}
    kept = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert not [secret for secret in secrets if secret.encode() in kept]


def test_pair_of_the_users_own_is_kept(root: Path):
    given = {SERVER: "anna:her own words", CLIENT: "anna:her own words"}
    found = json.loads(environment_after(root, **given).stdout)
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    "given",
    [{SERVER: "anna:secret"}, {CLIENT: "anna:secret"}, {SERVER: "anna:secret", CLIENT: "ben:secret"}, {SERVER: "x", CLIENT: ""}],
)
def test_pair_that_does_not_fit_is_refused_in_one_sentence(given: dict[str, str], root: Path):
    told = subprocess.run([*FERRY, "-w", str(root), "history"], env=clean_environment() | given, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (3, "")
    assert told.stderr == (
        f"ferry: {SERVER} and {CLIENT} differ; unset both so that ferry makes a secret, or give both the same value\n"
    )


@pytest.mark.parametrize("given", [{}, {CLIENT: "anna:secret"}])
def test_nothing_is_imposed_on_a_server_of_the_users_own(given: dict[str, str], root: Path):
    found = json.loads(environment_after(root, PREFECT_API_URL="https://prefect.example/api", **given).stdout)
    assert {name: found[name] for name in (SERVER, CLIENT) if name in found} == given


def test_folder_of_pickles_and_logs_is_the_owners_alone(root: Path):
    home = root / "work" / "prefect"
    configure_environment(root)
    assert home.stat().st_mode & 0o777 == 0o700
    home.chmod(0o775)  # as an older version made it
    (home / "prefect.db").touch()
    configure_environment(root)
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "prefect.db").is_file()


def test_secret_is_written_into_a_new_file_only(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        serve.write_secret(tmp_path / "link", "secret")
    assert not (tmp_path / "elsewhere").exists()
    serve.write_secret(tmp_path / "new", "secret")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_nobody_can_take_the_port_of_a_server_that_starts(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Hold the port until the server has it.

    A server shows its clients nothing. So clients would believe whoever took the port, send him the secret, and do what he says.
    """
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    class TriedError(Exception):
        pass

    def popen(words: list[str], **more: Any) -> None:
        with socket.socket(fileno=os.dup(more["pass_fds"][0])) as handed_on:
            with pytest.raises(OSError, match="in use"):
                socket.create_server(handed_on.getsockname())
            assert str(handed_on.getsockname()[1]) not in words
        raise TriedError

    monkeypatch.setattr(serve.subprocess, "Popen", popen)
    with pytest.raises(TriedError), serve.server(Workspace(root)):
        pass


class Refusing(BaseHTTPRequestHandler):
    """A server that wants other credentials."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_server_that_refuses_is_not_waited_for(refusing: str, tmp_path: Path):
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(ServerError, match="answers 401 when asked for its health"):
            serve._wait_until_healthy(refusing, process, tmp_path / "log")
        process.kill()


@pytest.mark.slow
def test_server_that_refuses_is_named(refusing: str, root: Path):
    command = [*FERRY, "-w", str(root), "serve"]
    told = subprocess.run(command, env=clean_environment() | {"PREFECT_API_URL": refusing}, capture_output=True, text=True)
    assert told.returncode == 4
    assert told.stderr.splitlines()[-1] == (
        f"ferry: Prefect's server at {refusing} refuses access; set PREFECT_API_AUTH_STRING (that of `ferry serve` is in "
        "work/prefect/credentials)"
    )
    assert "Traceback" not in told.stderr


# Requests to `ferry serve`


@dataclass(frozen=True)
class Served:
    """A running `ferry serve`."""

    workspace: Workspace
    process: subprocess.Popen[str]
    address: str
    file: Path
    deployment: str

    @property
    def secret(self) -> str:
        return self.file.read_text().strip()

    def ask(
        self, method: str, path: str, body: object = None, secret: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Send a request and return status, answer and headers; `_` in a header's name is sent as `-`."""
        given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        if secret is not None:
            given["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
        connection = HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        connection.request(method, path, None if body is None else json.dumps(body), given)
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        told = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, json.loads(data or b"null") if "json" in told.get("content-type", "") else data.decode(), told

    def state(self) -> dict[str, Any]:
        """Return all that could be changed about the deployments, and the runs that somebody asked for."""
        _, found, _ = self.ask("POST", "/api/deployments/filter", {}, self.secret)
        moving = {"last_polled", "status", "updated"}  # the runner changes these
        _, runs, _ = self.ask("POST", "/api/flow_runs/filter", {}, self.secret)
        return {
            "deployments": {d["name"]: {k: v for k, v in d.items() if k not in moving} for d in found},
            "runs": sorted(r["id"] for r in runs if not r["auto_scheduled"]),
            "blocks": self.ask("POST", "/api/block_documents/count", {}, self.secret)[1],
            "variables": self.ask("POST", "/api/variables/count", {}, self.secret)[1],
        }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run `ferry serve` in a folder that every local user can enter, as a home of 0755 is."""
    folder = Path(tempfile.mkdtemp(prefix="ferry-owner-"))
    folder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))  # for this process, which outlives the folder
        workspace = prepared(folder / "ws")
    command = [*FERRY, "-w", str(workspace.root), "serve", "--cron", "0 0 1 1 *", "--look-every", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert process.stderr is not None
    try:
        asked = process.stderr.readline().rsplit(" ", 1)[1].strip()
        address = process.stderr.readline().rsplit(" ", 1)[1].strip()
        made = Served(workspace, process, address, Path(asked), "")

        def deployments() -> list[dict[str, Any]]:
            found = made.ask("POST", "/api/deployments/filter", {}, made.secret)[1]
            return [d for d in found if d["name"] == "ws-shapes"]

        # The data are a first event. It starts the factory's own run: server, runner and a process for the flow.
        wait_for(lambda: workspace.catalog.champion(SUBJECT) is not None, process)
        wait_for(
            lambda: all(
                r["state_type"] == "COMPLETED"
                for r in made.ask("POST", "/api/flow_runs/filter", {}, made.secret)[1]
                if not r["auto_scheduled"]
            ),
            process,
        )
        yield Served(workspace, process, address, Path(asked), deployments()[0]["id"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        workspace.ledger.close()
        workspace.fleet.close()
        shutil.rmtree(folder)


REQUESTS = [
    ("GET", "/api/admin/settings", None), ("GET", "/api/admin/version", None), ("GET", "/api/version", None), ("GET", "/api/hello", None),
    ("GET", "/api/csrf-token?client=x", None), ("GET", "/api/openapi.json", None), ("HEAD", "/api/health", None),
    ("POST", "/api/health", {}), ("GET", "/api/health/", None), ("GET", "/api/variables/name/health", None),
    ("POST", "/api/deployments/filter", {}), ("GET", "/api/deployments/ID", None), ("PATCH", "/api/deployments/ID", PULL),
    ("POST", "/api/deployments/ID/create_flow_run", {}), ("POST", "/api/deployments/ID/pause_deployment", {}),
    ("DELETE", "/api/deployments/ID", None), ("POST", "/api/flow_runs/filter", {}), ("POST", "/api/logs/filter", {}),
    ("POST", "/api/block_documents/filter", {"include_secrets": True}), ("PUT", "/api/admin/storage", {}),
    ("POST", "/api/variables/", {"name": "x", "value": "y"}), ("POST", "/api/events", []), ("GET", "/api/ui/schemas", None),
]  # fmt: skip


@pytest.mark.slow
def test_stranger_can_neither_read_nor_change(served: Served):
    before = served.state()
    assert before["deployments"]["ws-shapes"]["pull_steps"] == []
    wrong = [
        {}, {"Authorization": ""}, {"Authorization": "Basic"}, {"Authorization": "Basic ="}, {"Authorization": "Basic Og=="},
        {"Authorization": f"Bearer {served.secret}"}, {"Authorization": served.secret},
        {"Authorization": f"Basic {base64.b64encode(served.secret[:-1].encode()).decode()}"},
        {"Authorization": f"Basic {base64.b64encode(b'ferry:').decode()}"},
        {"Authorization": f"Basic {base64.b64encode(served.secret.upper().encode()).decode()}"},
        {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-User": "root"},
    ]  # fmt: skip
    for method, path, body in REQUESTS:
        for headers in wrong:
            status, answer, _ = served.ask(method, path.replace("ID", served.deployment), body, None, **headers)
            assert status in (401, 403), (method, path, headers, answer)
    for path in ("/api/health", "/api/ready", "/ui-settings", "/", "/v2/"):  # open pages reveal nothing
        status, answer, _ = served.ask("GET", path)
        assert status == 200
        assert served.secret not in json.dumps(answer)
    assert served.state() == before


SOCKETS = ["/events/in", "/events/out", "/logs/out", "/task_runs/subscriptions/scheduled", "/work_pools/x/workers/connect"]


def is_let_in(address: str, path: str, token: str | None) -> bool:
    """Check whether a websocket answers to a token, or hangs up."""
    try:
        with connect(
            f"{address.replace('http:', 'ws:')}/api{path}", subprotocols=[Subprotocol("prefect")], proxy=None
        ) as channel:
            channel.send(json.dumps({"type": "auth", "token": token}))
            return bool(json.loads(channel.recv(timeout=60)) == {"type": "auth_success"})
    except WebSocketException:
        return False


def assert_needs_the_handshake(address: str, path: str) -> None:
    """Check that clients from before the handshake, which are let in by default, are refused."""
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"{address.replace('http:', 'ws:')}/api{path}", proxy=None)


@pytest.mark.slow
@pytest.mark.parametrize("path", SOCKETS)
def test_stranger_is_hung_up_on(path: str, served: Served):
    assert_needs_the_handshake(served.address, path)
    for token in (None, "", "wrong", served.secret[:-1]):
        assert not is_let_in(served.address, path, token)


@pytest.mark.slow
def test_owner_is_heard_on_a_websocket(served: Served):
    assert is_let_in(served.address, "/events/out", served.secret)


@pytest.mark.slow
@pytest.mark.parametrize("origin", [EVIL, "null", "https://127.0.0.1", "http://localhost:4200"])
def test_web_page_is_refused_and_may_read_nothing(origin: str, served: Served):
    before = served.state()
    deployment = f"/api/deployments/{served.deployment}"
    for method in ("PATCH", "POST", "DELETE"):
        status, _, headers = served.ask(
            "OPTIONS", deployment, None, None, Origin=origin, Access_Control_Request_Method=method,
            Access_Control_Request_Headers="content-type,authorization", Access_Control_Request_Private_Network="true",
        )  # fmt: skip
        assert status == 400
        assert "access-control-allow-origin" not in headers
        assert "access-control-allow-private-network" not in headers
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):  # the first two need no preflight
        for method, path, body in (("POST", f"{deployment}/create_flow_run", {}), ("PATCH", deployment, PULL)):
            status, _, headers = served.ask(method, path, body, None, Origin=origin, Content_Type=kind)
            assert status == 401
            assert "access-control-allow-origin" not in headers
            assert "www-authenticate" not in headers  # so no browser stores typed credentials and sends them for other pages
    for path in ("/", "/ui-settings", "/api/health"):
        assert "access-control-allow-origin" not in served.ask("GET", path, None, None, Origin=origin)[2]
    assert "access-control-allow-origin" not in served.ask("POST", "/api/flows/filter", {}, served.secret, Origin=origin)[2]
    assert served.state() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "[::1]", ""])
def test_other_name_of_this_host_is_not_answered(name: str, served: Served):
    """Refuse DNS rebinding: a page whose name its owner points at the loopback has the server's origin."""
    port = urlsplit(served.address).port
    for host in (name, f"{name}:{port}"):
        for path in ("/", "/ui-settings", "/api/health", "/api/admin/version"):
            assert served.ask("GET", path, None, served.secret, Host=host)[0] == 400


@pytest.mark.slow
def test_page_asks_this_server_and_cannot_be_framed(served: Served):
    """Let the page ask this server, not port 4200, where another user could wait for what is typed."""
    _, settings, headers = served.ask("GET", "/ui-settings")
    assert (settings["api_url"], settings["auth"]) == ("/api", "BASIC")
    assert headers["content-security-policy"] == "connect-src 'self'; frame-ancestors 'none'"


def as_another_user(code: str, *words: str) -> str:
    """Run a program as `nobody` and return what it prints."""
    python = shutil.which("python3", path=os.defpath)
    if os.geteuid() != 0 or python is None:
        pytest.skip("only root can start a program of another user, and it needs a Python that others may run")
    done = subprocess.run(
        [python, "-c", code, *words], user=65534, group=65534, extra_groups=[], env={}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRY = """
import os, sys
for path in sys.argv[1:]:
    for how in (lambda: os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(),
                lambda: open(os.path.join(path, "new") if os.path.isdir(path) else path, "ab")):
        try:
            how()
        except OSError as error:
            print(type(error).__name__)
        else:
            print("open", path)
"""


@pytest.mark.slow
def test_another_user_can_read_no_secret(served: Served):
    home = served.workspace.work / "prefect"
    ours = [served.process.pid, *(child.pid for child in psutil.Process(served.process.pid).children(recursive=True))]
    assert len(ours) > 1
    tried = [home, served.file, home / "prefect.db", home / "server.log", *(f"/proc/{pid}/environ" for pid in ours)]
    assert as_another_user(TRY, "/etc/passwd").split() == ["open", "/etc/passwd", "PermissionError"]  # so the test can tell
    assert set(as_another_user(TRY, *map(str, tried)).split()) == {"PermissionError"}


@pytest.mark.slow
def test_secret_is_in_one_file_and_in_no_arguments(served: Served):
    """Look for the secret after runs, whose parameters, states and logs Prefect keeps."""
    sought = [served.secret.encode(), served.secret.partition(":")[2].encode(), base64.b64encode(served.secret.encode())]
    assert served.file.stat().st_mode & 0o777 == 0o600
    assert served.workspace.ledger.entries()
    found = {
        path for path in served.workspace.root.rglob("*") if path.is_file() and any(text in path.read_bytes() for text in sought)
    }
    assert found == {served.file}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert not any(text.decode() in " ".join(process.cmdline()) for text in sought)


@pytest.mark.slow
def test_second_serve_leaves_the_first_ones_credentials(served: Served):
    before = served.secret
    command = [*FERRY, "-w", str(served.workspace.root), "serve"]
    told = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert told.returncode == 4
    assert told.stderr == f"ferry: another ferry process holds the serving of {served.workspace.root}; wait for it to finish\n"
    assert served.secret == before
    assert served.ask("GET", "/api/admin/version", None, before)[0] == 200


@pytest.mark.slow
def test_owners_event_makes_a_run(served: Served):
    before = len(served.state()["runs"])
    command = [*FERRY, "-w", str(served.workspace.root), "trigger", "shapes", "--reason", "the press was moved"]
    assert subprocess.run(command, env=clean_environment(), capture_output=True).returncode == 0
    wait_for(lambda: len(served.state()["runs"]) == before + 1, served.process)


def is_stopped(pid: int) -> bool:
    """Check whether every thread of a process is stopped; a signal reaches them one after another."""
    states = [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


@pytest.mark.slow
def test_server_that_dies_ends_ferry_serve_and_gives_its_port_to_nobody(tmp_path: Path):
    workspace = prepared(tmp_path / "ws")
    command = [*FERRY, "-w", str(workspace.root), "serve", "--cron", "0 0 1 1 *", "--look-every", "3600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())
    assert process.stderr is not None
    try:
        file = Path(process.stderr.readline().rsplit(" ", 1)[1].strip())
        address = process.stderr.readline().rsplit(" ", 1)[1].strip()
        (server,) = [child for child in psutil.Process(process.pid).children() if "flows.serve:app" in child.cmdline()]
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: is_stopped(process.pid), process)  # otherwise one of its threads may still see the server die
        server.kill()
        wait_for(lambda: server.status() == psutil.STATUS_ZOMBIE, process)  # its files are closed
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", urlsplit(address).port or 0))
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 4
    assert said.splitlines()[-1] == (
        f"ferry: Prefect's server ended with code -9; see {workspace.work / 'prefect' / 'server.log'}, then repeat the command to go on"
    )
    assert not file.exists()


@pytest.mark.slow
def test_server_that_cannot_start_is_told_in_one_sentence(root: Path):
    nowhere = {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/prefect.db"}
    command = [*FERRY, "-w", str(root), "serve"]
    told = subprocess.run(command, env=clean_environment() | nowhere, capture_output=True, text=True)
    assert told.returncode == 4
    assert told.stderr == f"ferry: Prefect's server ended with code 3; see {root / 'work' / 'prefect' / 'server.log'}\n"
    assert "unable to open database file" in (root / "work" / "prefect" / "server.log").read_text()


# The server of an ordinary command


@pytest.mark.slow
def test_in_process_server_of_a_command_is_closed_too(tmp_path: Path):
    workspace = prepared(tmp_path / "ws")
    command = [*FERRY, "--quiet", "-w", str(workspace.root), "retrain", "shapes", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment())
    wait_for(lambda: any(workspace.work.glob("runs/*/lineage.json")) or any((workspace.work / "data").glob("*")), process)
    process.send_signal(signal.SIGSTOP)  # its server still runs
    try:
        listening = [
            c.laddr
            for child in psutil.Process(process.pid).children()
            for c in child.net_connections("tcp")
            if c.status == "LISTEN"
        ]
        ((host, port),) = set(listening)
        assert host == "127.0.0.1"
        asked = Served(workspace, process, f"http://127.0.0.1:{port}", Path(), "")
        assert asked.ask("GET", "/api/health")[0] == 200
        for method, path, body in REQUESTS:
            status, _, headers = asked.ask(method, path, body, None, Origin=EVIL)
            assert status in (401, 403), path
            assert "access-control-allow-origin" not in headers
            assert asked.ask(method, path, body, None, Host="evil.example")[0] == 400
        for path in SOCKETS:
            assert_needs_the_handshake(asked.address, path)
            assert not is_let_in(asked.address, path, "wrong")
    finally:
        process.send_signal(signal.SIGCONT)
    out, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert json.loads(out)["models"][0]["outcome"] == "promote"
    assert not (workspace.work / "prefect" / "credentials").exists()


BY_HAND = """
import os, sys, urllib.request
from pathlib import Path
for step in sys.argv[2:]:
    if step == "prefect": import prefect
    if step == "workspace":
        from flows.workspace import Workspace
        Workspace(Path(sys.argv[1]))
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer
@flow
def nothing():
    return 7
assert nothing() == 7
request = urllib.request.Request(SubprocessASGIServer().api_url + "/flow_runs/filter", b"{}", {"Content-Type": "application/json"})
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [["workspace", "prefect"], ["prefect", "workspace"]])
def test_program_that_runs_flows_by_itself_has_a_closed_server(order: list[str], root: Path):
    done = subprocess.run(
        [sys.executable, "-c", BY_HAND, str(root), *order], env=clean_environment(), capture_output=True, text=True
    )
    assert done.stdout == "401\n", done.stderr


# In a real browser


ATTACK = """<pre id="told"></pre><script>
const told = [], target = "%s", patch = %s;
const attempt = async (what, promise) => {
  try { const r = await promise(); told.push(`${what}: ${r.type} ${r.status} ${(await r.text()).length}`); }
  catch (error) { told.push(`${what}: ${error.name}`); }
};
(async () => {
  await attempt("patch", () => fetch(target, {method: "PATCH", headers: {"Content-Type": "application/json"}, body: patch}));
  await attempt("patch with cookies", () => fetch(target, {method: "PATCH", credentials: "include", body: patch}));
  await attempt("plain post", () => fetch(target + "/create_flow_run", {method: "POST", mode: "no-cors", body: "{}"}));
  await attempt("read", () => fetch(target));
  await attempt("read settings", () => fetch(new URL("/api/admin/settings", target)));
  document.getElementById("told").textContent = told.join("\\n");
})();
</script>"""


@pytest.fixture
def evil_page(served: Served) -> Iterator[int]:
    """Provide the port of a web server whose one page attacks the deployment."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            at = served.address if self.headers["Host"] == "evil.example" else f"http://{self.headers['Host']}"
            body = (ATTACK % (f"{at}/api/deployments/{served.deployment}", json.dumps(json.dumps(PULL)))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.slow
def test_web_page_in_a_browser_changes_nothing(served: Served, evil_page: int, browser: str, tmp_path: Path):  # noqa: F811
    before = served.state()
    rules = f"--host-resolver-rules=MAP evil.example:80 127.0.0.1:{evil_page}"
    dom = run(browser, tmp_path, rules, "--virtual-time-budget=60000", "--dump-dom", f"{EVIL}/")
    told = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    assert told, dom
    assert told[1].splitlines() == [
        "patch: TypeError", "patch with cookies: TypeError", "plain post: opaque 0 0", "read: TypeError", "read settings: TypeError",
    ]  # fmt: skip
    assert served.state() == before


class Tab:
    """A page in a browser, driven over its DevTools protocol."""

    def __init__(self, browser: str, folder: Path) -> None:  # noqa: F811
        words = [browser, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
        self.process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
        port = folder / "DevToolsActivePort"
        self._wait(lambda: port.is_file() and len(port.read_text().split()) == 2)
        self._connection = HTTPConnection("127.0.0.1", int(port.read_text().split()[0]), timeout=60)
        self._connection.request("GET", "/json")
        page = next(row for row in json.load(self._connection.getresponse()) if row["type"] == "page")
        self._channel = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None)
        self._calls = 0
        self.asked: dict[str, str] = {}  # addresses of all requests
        self.blocked: set[str] = set()  # those that the page was not allowed to make
        self("Network.enable")

    def _wait(self, happened: Any) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < deadline, self.js("document.body.innerText") if self._calls else "it did not start"
            time.sleep(0.2)  # waiting for another process, not guessing how long it takes

    def __call__(self, method: str, **words: object) -> dict[str, Any]:
        self._calls += 1
        self._channel.send(json.dumps({"id": self._calls, "method": method, "params": words}))
        while True:
            said = json.loads(self._channel.recv(timeout=120))
            if said.get("method") == "Network.requestWillBeSent":
                self.asked[said["params"]["requestId"]] = said["params"]["request"]["url"]
            if said.get("method") == "Network.loadingFailed" and said["params"].get("blockedReason") == "csp":
                self.blocked.add(self.asked[said["params"]["requestId"]])
            if said.get("id") == self._calls:
                found: dict[str, Any] = said["result"]
                return found

    def js(self, text: str) -> Any:
        return self("Runtime.evaluate", expression=text, returnByValue=True)["result"].get("value")

    def open(self, address: str, until: str) -> None:
        self("Page.navigate", url=address)
        self._wait(lambda: self.js(until))

    def log_in(self, secret: str, until: str) -> None:
        self.js("document.querySelector('input').focus(); document.querySelector('input').select()")
        self("Input.insertText", text=secret)
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
        self._wait(lambda: self.js(until))

    def close(self) -> None:
        self._channel.close()
        self._connection.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_owner_uses_the_page_with_the_credentials(served: Served, browser: str, tmp_path: Path):  # noqa: F811
    tab = Tab(browser, tmp_path / "profile")
    try:
        login = "document.querySelector('input')?.placeholder === 'admin:pass'"
        tab.open(f"{served.address}/", login)
        assert "ws-shapes" not in tab.js("document.documentElement.outerHTML")
        tab.log_in("ferry:wrong", "document.body.innerText.includes('Invalid credentials')")
        tab.log_in(served.secret, "location.pathname.endsWith('/dashboard')")
        tab.open(f"{served.address}/v2/deployments", "document.body.innerText.includes('ws-shapes')")
        asked = {url for url in tab.asked.values() if url.startswith("http")}
        assert f"{served.address}/api/deployments/count" in asked
        assert {url for url in asked if not url.startswith(f"{served.address}/")} == tab.blocked  # none gets out
    finally:
        tab.close()
