"""MLflow's webhooks: what does not come from MLflow is refused and does nothing; if a webhook is lost, nothing is lost."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature as mlflow_signs

from flows.errors import ServerError, WorkspaceError
from flows.web import webhook
from flows.web.app import serving
from flows.web.webhook import MAX_AGE, MAX_BODY, Deliveries, RefusedError, address_of, secret_of
from flows.workspace import Workspace
from ota.release.keys import create
from registry import champions
from registry.catalog import Subject
from registry.champions import Reconciled
from tests.test_promotion import registered

SECRET = "a secret of enough characters"
NOW = 1_800_000_000


def signed(body: bytes = b"{}", delivery: str = "one", stamp: str = str(NOW), secret: str = SECRET) -> str:
    return mlflow_signs(secret, delivery, stamp, body.decode())


def test_what_mlflow_signs_is_accepted_once():
    deliveries = Deliveries(SECRET)
    deliveries.check("one", str(NOW), signed(), b"{}", NOW + MAX_AGE)
    with pytest.raises(RefusedError, match="this delivery was received before"):
        deliveries.check("one", str(NOW), signed(), b"{}", NOW + MAX_AGE)
    deliveries.check("two", str(NOW), signed(delivery="two"), b"{}", NOW)


def test_replay_is_refused_for_as_long_as_its_time_is_good():
    deliveries = Deliveries(SECRET)
    deliveries.check("one", str(NOW), signed(), b"{}", NOW - MAX_AGE)  # signed by a clock that is ahead
    for later in (0, MAX_AGE, MAX_AGE + 1):
        with pytest.raises(RefusedError):
            deliveries.check("one", str(NOW), signed(), b"{}", NOW + later)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"signatures": signed(secret="another secret of some length")}, "not signed"),
        ({"signatures": signed(b"{ }")}, "not signed"),
        ({"signatures": signed().replace("v1,", "v2,")}, "not signed"),
        ({"signatures": signed().removeprefix("v1,")}, "not signed"),
        ({"signatures": ""}, "not signed"),
        ({"signatures": "v1,"}, "not signed"),
        ({"signatures": "v1,\N{SNOWMAN}"}, "not signed"),
        ({"delivery": "other"}, "not signed"),
        ({"delivery": "", "signatures": signed(delivery="")}, "not signed"),
        ({"stamp": str(NOW + 1)}, "not signed"),
        ({"stamp": "soon", "signatures": signed(stamp="soon")}, "not signed"),
        ({"stamp": "", "signatures": signed(stamp="")}, "not signed"),
        ({"stamp": str(NOW - 301), "signatures": signed(stamp=str(NOW - 301))}, "too long ago"),
        ({"stamp": str(NOW + 301), "signatures": signed(stamp=str(NOW + 301))}, "the clocks of MLflow and ferry differ"),
    ],
)
def test_what_is_not_mlflows_is_refused(change: dict[str, str], says: str):
    deliveries = Deliveries(SECRET)
    given = {"delivery": "one", "stamp": str(NOW), "signatures": signed()} | change
    with pytest.raises(RefusedError, match=says):
        deliveries.check(**given, body=b"{}", now=NOW)
    deliveries.check("one", str(NOW), signed(), b"{}", NOW)  # a refused request does not use up the id


def post(address: tuple[str, int], path: str = "/mlflow", body: bytes = b"{}", method: str = "POST", **headers: str) -> int:
    """Send a request that MLflow could have sent, but for what is given, and return its status.

    `_` in a header's name is sent as `-`.
    """
    stamp = str(int(time.time()))
    delivery = headers.pop("delivery", "one")
    made = {
        "X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": mlflow_signs(SECRET, delivery, stamp, body.decode()),
    } | {name.replace("_", "-"): value for name, value in headers.items()}  # fmt: skip
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request(method, path, body, made)
    status = connection.getresponse().status
    connection.close()
    return status


def test_refused_requests_wake_nobody():
    wake = threading.Event()
    with serving(webhook.receiver(SECRET, wake), "127.0.0.1", 0) as address:
        forged = base64.b64encode(hmac.digest(b"guess", b"one", hashlib.sha256)).decode()
        assert post(address, X_MLflow_Signature=f"v1,{forged}") == 401
        assert post(address, X_MLflow_Timestamp="1") == 401
        assert post(address, path="/") == 404
        assert post(address, path="/mlflow/") == 404
        assert post(address, path="/mlflow/../mlflow") == 404
        assert post(address, method="PUT") == 405
        assert post(address, method="GET") == 405
        assert post(address, body=b"x" * 10, Content_Length=str(MAX_BODY + 1)) == 413
        assert post(address, body=b"", Transfer_Encoding="chunked") == 411
        for odd in ("9" * 5000, "-1", "1e3"):
            assert post(address, body=b"", Content_Length=odd) == 400
        with socket.create_connection(address) as hung_up:
            hung_up.sendall(b"POST /mlflow HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        assert not wake.is_set()
        assert post(address) == 202
        assert wake.is_set()
        wake.clear()
        assert post(address) == 409
        assert not wake.is_set()


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let MLflow set up a database once, because that takes it seconds."""
    root = tmp_path_factory.mktemp("migrated")
    a_workspace(root).catalog.versions(Subject.parse("shapes/I/full"))
    return root / "mlflow.db"


@pytest.fixture
def workspace(tmp_path: Path, migrated: Path) -> Iterator[Workspace]:
    shutil.copy(migrated, tmp_path)
    made = a_workspace(tmp_path)
    yield made
    made.ledger.close()


def a_workspace(root: Path, mlflow: str = "sqlite:///mlflow.db") -> Workspace:
    (root / "ferry.toml").write_text(
        f'schema = 1\npoll_seconds = 86400\n[stores]\nmlflow = "{mlflow}"\n[lines.shapes]\ndata = "data/shapes"\n'
    )
    create(root / "keys")
    return Workspace(root)


def looks(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[list[str]]:
    """Collect the answers of each look at the aliases in a queue, as the look ends."""
    answers: queue.Queue[list[str]] = queue.Queue()

    reconcile = champions.reconcile

    def told(*asked: Any) -> list[Reconciled]:
        rows = reconcile(*asked)
        answers.put([row.answer for row in rows])
        return rows

    monkeypatch.setattr(champions, "reconcile", told)
    return answers


def test_delivery_makes_ferry_look_at_once_and_believes_nothing_in_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    subject = registered(workspace, "shapes")
    answers = looks(monkeypatch)
    monkeypatch.setenv(webhook.SECRET, SECRET)
    with webhook.watching(workspace, ("127.0.0.1", 0)) as address:
        assert address is not None
        assert answers.get(timeout=60) == ["agrees"]
        lie = b'{"data": {"name": "shapes-I-full", "alias": "champion", "version": "1"}}'
        assert post(address, body=lie, delivery="a lie") == 202
        assert answers.get(timeout=60) == ["agrees"]  # nobody moved the alias
        workspace.catalog.client.set_registered_model_alias(subject.model, "champion", "1")
        assert post(address, delivery="the truth") == 202
        assert answers.get(timeout=60) == ["recorded"]
    assert [e.kind for e in workspace.ledger.entries()][3:] == ["promotion"]


def test_lost_delivery_is_made_up_for_by_polling(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    subject = registered(workspace, "shapes")
    workspace.settings = workspace.settings.model_copy(update={"poll_seconds": 0.01})
    answers = looks(monkeypatch)
    with webhook.watching(workspace, None):
        assert answers.get(timeout=60) == ["agrees"]
        workspace.catalog.client.set_registered_model_alias(subject.model, "champion", "1")
        assert ["recorded"] in [answers.get(timeout=60) for _ in range(3)]
    assert [e.kind for e in workspace.ledger.entries()][3:] == ["promotion"]


def test_mlflow_that_is_down_is_said_once_and_looked_for_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    registered(workspace, "shapes")
    workspace.settings = workspace.settings.model_copy(update={"poll_seconds": 0.01})
    tries: queue.Queue[int] = queue.Queue()
    ask = workspace.catalog.client.get_model_version_by_alias

    def away(*words: str) -> object:
        tries.put(1)
        if tries.qsize() <= 3:
            raise OSError("connection refused")
        return ask(*words)

    monkeypatch.setattr(workspace.catalog.client, "get_model_version_by_alias", away)
    answers = looks(monkeypatch)
    with webhook.watching(workspace, None):
        assert answers.get(timeout=60) == ["agrees"]
    said = capfd.readouterr().err
    assert said.count("aliases cannot be looked at: MLflow cannot be reached: connection refused") == 1


def test_secret_is_made_for_us_alone_and_kept(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(webhook.SECRET, raising=False)
    secret, where = secret_of(workspace)
    assert len(secret) > 40
    assert Path(where).stat().st_mode & 0o777 == 0o600
    assert secret_of(workspace) == (secret, where)
    Path(where).chmod(0o640)
    with pytest.raises(WorkspaceError, match="other users may read"):
        secret_of(workspace)
    for short in ("", "short"):
        monkeypatch.setenv(webhook.SECRET, short)
        with pytest.raises(WorkspaceError, match="has fewer than 24 characters"):
            secret_of(workspace)


def test_address_is_the_loopback_unless_said(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(webhook.SECRET, SECRET)
    assert address_of("8711") == ("127.0.0.1", 8711)
    assert address_of("0.0.0.0:8711") == ("0.0.0.0", 8711)
    for wrong in ("x", "70000", "host:", "-1", "8711/mlflow"):
        with pytest.raises(WorkspaceError, match="is not an address for webhooks"):
            address_of(wrong)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(ServerError, match="choose another port"),
            webhook.watching(workspace, ("127.0.0.1", taken.getsockname()[1])),
        ):
            pass


# With a real MLflow server


@contextmanager
def mlflow_server(root: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    switches = {"MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https"}
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{root}/server.db", "--artifacts-destination", str(root / "artifacts"),
    ]  # fmt: skip
    with (root / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | switches, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((root / "server.log").read_text())
                time.sleep(0.3)  # waiting for another process, not guessing how long it takes
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=60)


@pytest.mark.slow
def test_alias_set_on_an_mlflow_server_comes_into_the_ledger_by_its_webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with mlflow_server(tmp_path) as uri:
        workspace = a_workspace(tmp_path, uri)
        subject = registered(workspace, "shapes")
        answers = looks(monkeypatch)
        with webhook.watching(workspace, ("127.0.0.1", 0)) as address:
            assert address is not None
            assert answers.get(timeout=60) == ["agrees"]  # the next look is a day away, unless the webhook comes
            person = MlflowClient(uri)
            url = f"http://127.0.0.1:{address[1]}/mlflow"
            events = ["model_version_alias.created", "model_version_alias.deleted"]
            person.create_webhook("forged", url, events, secret="not the secret that ferry knows")
            person.create_webhook("ferry", url, events, secret=secret_of(workspace)[0])
            person.set_registered_model_alias(subject.model, "champion", "1")
            assert answers.get(timeout=120) == ["recorded"]
            person.set_registered_model_alias(subject.model, "champion", "3")  # which the gate had refused
            while (answer := answers.get(timeout=120)) == ["agrees"]:  # webhooks for aliases that ferry itself set
                pass
            assert answer == ["refused"]
        seen = workspace.catalog.champion(Subject.parse("shapes/I/full"))
        assert seen is not None
        assert seen.number == 1
        made, refusal = workspace.ledger.entries()[3:]
        assert (made.kind, made.facts["how"], refusal.kind) == ("promotion", "alias", "refusal")
        workspace.ledger.close()
