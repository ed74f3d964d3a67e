"""Alerts: once for each change of state, signed, bounded in time, and never the end of a run."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flows import alerts
from flows.cli import app
from flows.settings import SETTINGS, Alerts
from flows.setup import create
from flows.workspace import Workspace
from ota.release import repository as repositories
from registry.ledger import Entry
from registry.promotion import latest_refusal

KEY = "k" * 32
PROGRAM = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read() + '\\n')"


@dataclass
class Receiver:
    """A receiver of webhooks that answers as it is told."""

    url: str = ""
    status: int = 204
    bodies: list[dict[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    got = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            got.raw.append(raw)
            got.bodies.append(json.loads(raw))
            got.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(got.status)
            self.send_header("Location", f"{got.url}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    got.url = f"http://127.0.0.1:{server.server_port}/ferry?to=shift"
    yield got
    server.shutdown()
    server.server_close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[[str], Workspace]]:
    """Provide a function that makes a workspace with these alerts, or opens it again."""
    opened: list[Workspace] = []

    def make(keys: str) -> Workspace:
        root = tmp_path / "ws"
        path = root / SETTINGS
        if not path.is_file():
            create(root, ["shapes"])
        path.write_text(path.read_text().replace("[alerts]", f"[alerts]\n{keys}", 1) if keys else path.read_text())
        opened.append(Workspace(root))
        return opened[-1]

    yield make
    for workspace in opened:
        workspace.ledger.close()


def command(out: Path, program: str = PROGRAM) -> str:
    return f"command = {json.dumps([sys.executable, '-c', program, str(out)])}"


def told(out: Path) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    return [(row["what"], row["before"], row["state"]) for row in rows]


def test_each_change_is_told_once_also_by_another_process(made: Callable[[str], Workspace], tmp_path: Path):
    out = tmp_path / "told"
    workspace = made(command(out))
    alerts.tell(workspace, "retraining shapes", "well", "done", well=True)  # nothing was wrong before
    for opened in (workspace, workspace, Workspace(workspace.root)):
        alerts.tell(opened, "retraining shapes", "failed", "disk full")
    alerts.tell(workspace, "retraining digits", "failed", "disk full")
    alerts.tell(workspace, "retraining shapes", "well", "done", well=True)
    alerts.tell(workspace, "retraining shapes", "failed", "disk full")
    assert told(out) == [
        ("retraining shapes", "", "failed"), ("retraining digits", "", "failed"), ("retraining shapes", "failed", "well"),
        ("retraining shapes", "well", "failed"),
    ]  # fmt: skip


def test_webhook_is_signed_and_sent_again_with_the_same_id(
    made: Callable[[str], Workspace], receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(alerts.SECRET, KEY)
    workspace = made(f"webhook = '{receiver.url}'")
    receiver.status = 302  # a redirect is not followed
    alerts.tell(workspace, "retraining shapes", "failed", "disk full")
    assert len(receiver.bodies) == 1
    assert "answered 302" in capfd.readouterr().err
    receiver.status = 204
    alerts.survey(workspace)  # not due yet
    assert len(receiver.bodies) == 1
    now = alerts.time.time()
    monkeypatch.setattr(alerts.time, "time", lambda: now + 3600)
    alerts.survey(workspace)
    alerts.survey(workspace)
    first, second = receiver.bodies
    assert first == second
    assert (second["what"], second["state"], second["text"]) == ("retraining shapes", "failed", "disk full")
    head = receiver.headers[-1]
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + receiver.raw[-1]
    assert head["webhook-signature"] == "v1," + base64.b64encode(hmac.digest(KEY.encode(), signed, hashlib.sha256)).decode()
    assert head["webhook-id"] == second["id"]


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_webhook_without_a_secret_is_refused_when_ferry_starts_to_serve(
    made: Callable[[str], Workspace], receiver: Receiver, monkeypatch: pytest.MonkeyPatch, secret: str | None
):
    monkeypatch.delenv(alerts.SECRET, raising=False)
    if secret is not None:
        monkeypatch.setenv(alerts.SECRET, secret)
    workspace = made(f"webhook = '{receiver.url}'")
    said = CliRunner().invoke(app, ["-w", str(workspace.root), "serve"])
    assert said.exit_code == 3
    assert alerts.SECRET in said.output
    alerts.tell(workspace, "retraining shapes", "failed", "disk full")
    assert receiver.bodies == []  # nothing leaves unsigned


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit(3)", "ended with code 3"),
        ("import time; time.sleep(600)", "did not end within 1 s"),
        (None, "cannot be started"),
    ],
)
def test_failing_command_fails_nothing_and_ends_in_time(
    made: Callable[[str], Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program: str | None, said: str
):  # fmt: skip
    monkeypatch.setattr(alerts, "SECONDS", 1.0)
    keys = command(tmp_path / "told", program) if program else "command = ['/nonexistent/page']"
    workspace = made(keys)
    alerts.tell(workspace, "retraining shapes", "failed", "disk full")
    alerts.tell(workspace, "retraining digits", "failed", "disk full")
    assert said in capfd.readouterr().err


def test_receiver_that_answers_byte_by_byte_takes_limited_time(
    made: Callable[[str], Workspace], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Let a receiver send a header for ever: each read of it is quick, and only the whole takes too long."""
    import socket

    monkeypatch.setattr(alerts, "SECONDS", 1.0)
    monkeypatch.setenv(alerts.SECRET, KEY)
    ending = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            taken, _ = listening.accept()
            with taken:
                while not ending.wait(0.05):
                    try:
                        taken.sendall(b"H")
                    except OSError:
                        return

        dripping = threading.Thread(target=drip, daemon=True)
        dripping.start()
        workspace = made(f"webhook = 'http://127.0.0.1:{listening.getsockname()[1]}/'")
        alerts.tell(workspace, "retraining shapes", "failed", "disk full")
        assert "did not answer within 1 s" in capfd.readouterr().err
        ending.set()
        dripping.join()


def test_state_that_cannot_be_kept_fails_nothing(
    made: Callable[[str], Workspace], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    workspace = made(command(tmp_path / "told"))
    workspace.work.mkdir(exist_ok=True)
    (workspace.work / "alerts.json").write_text("{")  # damaged: it is told again
    alerts.tell(workspace, "retraining shapes", "failed", "disk full")
    assert told(tmp_path / "told") == [("retraining shapes", "", "failed")]
    (workspace.work / "alerts.json").unlink()
    (workspace.work / "alerts.json").mkdir()
    alerts.tell(workspace, "retraining shapes", "failed", "disk full")
    assert "alerts cannot be kept" in capfd.readouterr().err


def test_refused_promotions_and_expiring_signatures_are_told(
    made: Callable[[str], Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "told"
    workspace = made(command(out))
    alerts.survey(workspace)
    assert told(out) == []
    workspace.ledger.append(
        "refusal", "shapes/I/full", "the gate never judged it", {"how": "alias", "version": 7, "champion": None}
    )
    alerts.survey(workspace)
    alerts.survey(workspace)
    assert told(out) == [("promotion shapes/I/full", "", "refused 7")]

    class Later(datetime):
        days = 8

        @classmethod
        def now(cls, tz: object = None) -> datetime:  # noqa: ARG003 - as datetime has it
            return datetime.now(UTC) + timedelta(days=cls.days)

    monkeypatch.setattr(repositories, "datetime", Later)
    alerts.survey(workspace)
    assert told(out)[1:] == [("signature snapshot", "", "expires"), ("signature timestamp", "", "expires")]
    Later.days = 15
    monkeypatch.setattr(alerts, "datetime", Later)
    alerts.survey(workspace)
    assert told(out)[3:] == [("signature snapshot", "expires", "expired"), ("signature timestamp", "expires", "expired")]


def test_refusal_is_over_when_a_version_is_promoted():
    def entry(kind: str, **facts: object) -> Entry:
        return SimpleNamespace(kind=kind, facts=facts)  # type: ignore[return-value]

    gate = entry("gate", outcome="refuse", version=2)
    assert latest_refusal([gate]) is gate
    assert latest_refusal([gate, entry("gate", outcome="more data", version=3)]) is gate
    assert latest_refusal([gate, entry("promotion", version=3)]) is None
    assert latest_refusal([entry("gate", outcome="promote", version=1)]) is None


def test_scheduled_retraining_that_fails_is_told(made: Callable[[str], Workspace], tmp_path: Path):
    out = tmp_path / "told"
    workspace = made(command(out))
    alerts.failed({"root": str(workspace.root), "line": "shapes"}, "No space left on device")
    alerts.failed({"root": str(tmp_path / "gone"), "line": "shapes"}, "x")
    alerts.failed({}, "x")
    assert told(out) == [("retraining shapes", "", "failed")]


@pytest.mark.parametrize(
    "keys",
    [
        {"webhook": "ftp://x/y"}, {"webhook": "https://"}, {"webhook": "https://u:p@x/y"}, {"webhook": "https://x/a b"}, {"webhook": "http://[::1"},
        {"webhook": "https://x:99999/"}, {"command": [""]}, {"command": ["a\0b"]}, {"command": "page"}, {"other": 1},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(keys: dict[str, object]):
    with pytest.raises(ValueError, match="alidation error"):
        Alerts.model_validate(keys)
