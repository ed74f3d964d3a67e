"""The loop on real servers, which the tests start on free ports of the loopback: `make test-servers`.

The same story runs with nothing but files, with Prefect's and MLflow's servers, and with PostgreSQL and S3 behind them.
Then MLflow is taken away in the middle of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow.entities import Run
from moto.server import ThreadedMotoServer

from flows import serve
from flows.setup import create
from flows.workspace import Workspace
from ota.release.keys import create as create_keys
from registry.catalog import Subject
from registry.champions import champion_of
from registry.ledger import Ledger
from registry.lineage import file_sha256
from registry.runs import RETRAINING
from tests import test_promotion
from tests.conftest import write_images
from tests.test_flows import SETTINGS

pytestmark = pytest.mark.servers

SUBJECT = Subject(line="shapes", configuration="I", variant="full")
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
BUCKET = "ferry"


@dataclass(frozen=True)
class Engines:
    """Where a workspace's stores are, as in ferry.toml, and what the command needs in its environment."""

    stores: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@contextmanager
def running(words: list[str], address: str, log: Path, **environment: str) -> Iterator[str]:
    """Run a server of ours, which is up when the block begins and gone when it ends."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    with log.open("ab") as out:
        started = subprocess.Popen(
            [sys.executable, "-m", *words], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=inherited | environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        serve._wait_until_healthy(address, started, log)
        yield address
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def mlflow_server(backend: str, artifacts: str, folder: Path, **environment: str) -> Iterator[str]:
    """Run MLflow with its files proxied, so that clients need no access to where they are."""
    port = free_port()
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", backend]
    words += ["--serve-artifacts", "--artifacts-destination", artifacts]
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # it would start eight more processes, to judge chats
    with running(words, f"http://127.0.0.1:{port}", folder / "mlflow.log", **environment) as address:
        yield address


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Provide the address of the API of a Prefect server."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    words = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with running(words, f"http://127.0.0.1:{port}/api", folder / "server.log", **quiet) as address:
        yield address


@pytest.fixture(scope="session")
def mlflow_on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow-sqlite")
    with mlflow_server(f"sqlite:///{folder}/mlflow.db", str(folder / "artifacts"), folder) as address:
        yield address


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Provide the address of an S3 server with one empty bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    bucket(address).create()
    yield address
    server.stop()


def bucket(address: str) -> Any:
    session = boto3.Session(
        CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"], region_name=CREDENTIALS["AWS_DEFAULT_REGION"]
    )
    return session.resource("s3", endpoint_url=address).Bucket(BUCKET)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Provide the URL of a PostgreSQL server, to which the name of a database is added.

    Debian's PostgreSQL refuses to run as root, so `postgres` runs it then.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not found:
        pytest.skip("there is no PostgreSQL; `apt-get install postgresql` brings it")
    pytest.importorskip("psycopg2", reason="there is no driver for PostgreSQL; `pip install deltaferry[postgres]` brings it")
    folder, port = Path(tempfile.mkdtemp(prefix="ferry-postgres-")), free_port()
    user = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]

    def call(name: str, *words: str) -> None:
        log = (folder / f"{name}.log").open("ab")  # pg_ctl's child would keep a pipe open
        with log:
            done = subprocess.run([*user, str(found[-1].with_name(name)), *words], stdout=log, stderr=log, cwd=folder)
        assert done.returncode == 0, (folder / f"{name}.log").read_text()

    place = ["--pgdata", str(folder / "db")]
    call("initdb", *place, "--username", "ferry", "--auth", "trust", "--encoding", "UTF8", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    call("pg_ctl", "start", *place, "--wait", "--timeout", "300", "--log", str(folder / "server.log"), "-o", options)
    try:
        for database in ("mlflow", "ferry", "promotions"):  # several, as only one workspace signs a ledger
            call("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "ferry", database)
        yield f"postgresql://ferry@127.0.0.1:{port}"
    finally:
        call("pg_ctl", "stop", *place, "--mode", "immediate")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def mlflow_on_postgres(postgres: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow-postgres")
    environment = CREDENTIALS | {"MLFLOW_S3_ENDPOINT_URL": s3}
    with mlflow_server(f"{postgres}/mlflow", f"s3://{BUCKET}/mlflow", folder, **environment) as address:
        yield address


@pytest.fixture(params=["embedded", "servers", "servers on PostgreSQL and S3"])
def engines(request: pytest.FixtureRequest) -> Engines:
    ask = request.getfixturevalue
    if request.param == "embedded":
        return Engines()
    if request.param == "servers":
        return Engines({"mlflow": ask("mlflow_on_sqlite")}, {"PREFECT_API_URL": ask("prefect")})
    stores = {
        "data": f"s3://{BUCKET}/data", "database": f"{ask('postgres')}/ferry", "mlflow": ask("mlflow_on_postgres"),
        "publish": f"s3://{BUCKET}/published", "s3_endpoint": ask("s3"),
    }  # fmt: skip
    return Engines(stores, CREDENTIALS | {"PREFECT_API_URL": ask("prefect")})


@contextmanager
def opened(root: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch, line: str = "shapes") -> Iterator[Workspace]:
    """Create a new workspace with images that are not yet a revision."""
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in engines.environment.items():
        monkeypatch.setenv(name, value)
    stores = "".join(f"{name} = {json.dumps(value)}\n" for name, value in engines.stores.items())
    settings = SETTINGS.replace("schema = 1\n", f"schema = 1\n\n[stores]\n{stores}").replace("shapes", line)
    workspace = create(root, [], settings)
    write_images(root / "data" / line, 120)
    yield workspace
    workspace.ledger.close()
    workspace.fleet.close()


def words(workspace: Workspace, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(workspace.root), *arguments]


def ferry(workspace: Workspace, *arguments: str) -> dict[str, Any]:
    """Run the command in a process of its own, because Prefect reads its address at import; return its answer."""
    done = subprocess.run(words(workspace, *arguments, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def runs(workspace: Workspace, line: str) -> list[Run]:
    client = workspace.catalog.client
    return list(client.search_runs([client.get_experiment_by_name(line).experiment_id]))


def assert_nested_and_finished(found: list[Run]) -> None:
    """Check for one run of the retraining and, nested in it, one of its only variant, both finished."""
    assert [run.info.status for run in found] == ["FINISHED"] * 2
    (parent,) = (run for run in found if RETRAINING in run.data.tags)
    (child,) = (run for run in found if RETRAINING not in run.data.tags)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_same_story_on_all_engines(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with opened(tmp_path / "ws", engines, monkeypatch) as workspace:
        ferry(workspace, "data", "add", "shapes")
        (row,) = ferry(workspace, "retrain", "shapes", "--no-promote")["models"]
        assert (row["outcome"], row["version"], row["promoted"]) == ("promote", 1, False)
        (version,) = workspace.catalog.versions(SUBJECT)
        assert version.aliases == ["challenger"]

        ferry(workspace, "promote", "shapes/I/full", "1", "--reason", "it is the first")
        champion = workspace.catalog.champion(SUBJECT)
        assert champion is not None
        assert (champion.number, champion.aliases) == (1, ["anchor", "champion"])
        assert [e["kind"] for e in ferry(workspace, "history")["entries"]] == ["gate", "promotion"]

        made = ferry(workspace, "release", "shapes")
        assert (made["release"], made["versions"]) == (1, {"full": 1})
        if workspace.settings.stores.s3_endpoint:
            published = {entry.key for entry in bucket(workspace.settings.stores.s3_endpoint).objects.all()}
            assert {"published/metadata/timestamp.json", "published/metadata/1.root.json"} <= published
            assert any(key.startswith("mlflow/") for key in published)
            assert any(key.startswith("data/") for key in published)
        else:
            assert (workspace.root / "published/metadata/timestamp.json").is_file()

        found = runs(workspace, "shapes")
        assert_nested_and_finished(found)
        (run,) = (run for run in found if run.info.run_id == champion.run_id)
        assert {i.dataset.digest for i in run.inputs.dataset_inputs} == {champion.tags["data.md5"]}
        seal = champion_of(workspace, SUBJECT)
        assert seal is not None
        bundle = workspace.catalog.files(seal, "bundle", tmp_path / "fetched")
        assert file_sha256(bundle / "weights.bin") == seal.weights == champion.tagged_weights
        assert file_sha256(bundle / "graph.onnx") == run.data.tags["onnx.sha256"]

        (again,) = ferry(workspace, "retrain", "shapes")["models"]
        assert again["outcome"] == "unchanged"
        assert len(runs(workspace, "shapes")) == 2
        if address := engines.environment.get("PREFECT_API_URL"):
            of_us = [run for run in flow_runs(address) if run["parameters"].get("root") == str(workspace.root)]
            assert [run["state_type"] for run in of_us] == ["COMPLETED"] * 3  # retrained twice, released once


def flow_runs(address: str) -> list[dict[str, Any]]:
    """Return all flow runs that Prefect's server knows."""
    request = urllib.request.Request(f"{address}/flow_runs/filter", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: list[dict[str, Any]] = json.load(answer)
        return found


class Between:
    """A proxy between a client and its server: it sees what is asked, and can be down, silent, or lose an answer."""

    def __init__(self, server: str) -> None:
        self._server = ("127.0.0.1", int(server.rsplit(":", 1)[1]))
        self.down = self.silent = False
        self.when: tuple[bytes, Callable[[], None]] | None = None  # text of a request, what happens before it is passed on
        self.unanswered: bytes | None = None  # text of a request, passed on, whose answer is lost, once
        self._lost: set[int] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Serve one connection; an answer is passed on as a whole before the next request is read."""
        with client, socket.create_connection(self._server) as server, suppress(OSError):
            threading.Thread(target=self._back, args=(client, server), daemon=True).start()
            try:
                while asked := client.recv(1 << 16):
                    if self.when and self.when[0] in asked:
                        happens, self.when = self.when[1], None
                        happens()
                    if self.down:
                        return
                    if self.unanswered and self.unanswered in asked:
                        self.unanswered = None
                        self._lost.add(client.fileno())
                    if not self.silent:
                        server.sendall(asked)
            finally:
                self._lost.discard(client.fileno())
                server.shutdown(socket.SHUT_RDWR)

    def _back(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while answered := server.recv(1 << 16):
                if client.fileno() not in self._lost:
                    client.sendall(answered)


@pytest.fixture
def between(mlflow_on_sqlite: str) -> Iterator[Between]:
    made = Between(mlflow_on_sqlite)
    yield made
    made.close()


@pytest.mark.parametrize("lost", ["server", "process"])
def test_registration_that_was_cut_is_done_once_when_repeated(
    lost: str, between: Between, prefect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line = f"cut-{lost}"
    subject = SUBJECT.model_copy(update={"line": line})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    engines = Engines({"mlflow": f"http://{between.host}"}, {"PREFECT_API_URL": prefect})
    with opened(tmp_path / "ws", engines, monkeypatch, line) as workspace:
        ferry(workspace, "data", "add", line)
        begun = subprocess.Popen(words(workspace, "retrain", line), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def cut() -> None:
            if lost == "process":
                begun.send_signal(signal.SIGKILL)
            between.down = True

        between.when = (b"/bundle/weights.bin", cut)  # in the middle of a version's files
        out, said = begun.communicate()
        if lost == "server":
            assert (begun.returncode, out) == (4, "")
            assert said.splitlines()[-1] == (
                f"ferry: MLflow at {between.host} cannot be reached after several attempts; start it, or correct its address in ferry.toml, "
                "then repeat the command"
            )
            assert "Traceback" not in said
        between.down = False
        assert workspace.catalog.versions(subject) == []
        assert "RUNNING" in {run.info.status for run in runs(workspace, line)}  # nobody could record that it ended

        between.unanswered = b"model-versions/create"  # now it is slow: it is asked again for what it has done
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        (row,) = ferry(workspace, "retrain", line)["models"]
        assert (row["outcome"], row["version"], row["promoted"]) == ("promote", 1, True)
        assert between.unanswered is None
        assert [(v.number, v.aliases) for v in workspace.catalog.versions(subject)] == [(1, ["anchor", "champion"])]
        assert_nested_and_finished(runs(workspace, line))


def test_server_that_hangs_ends_the_command_with_one_sentence(between: Between, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    between.silent = True
    with opened(tmp_path / "ws", Engines({"mlflow": f"http://{between.host}"}), monkeypatch, "hangs") as workspace:
        done = subprocess.run(words(workspace, "promote", "hangs/I/full", "1"), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr == (
            f"ferry: MLflow at {between.host} does not answer in time after several attempts; start it, or correct its address in ferry.toml, "
            "then repeat the command\n"
        )
        assert workspace.ledger.entries() == []


def test_of_two_promotions_at_the_same_moment_one_wins_on_postgres(postgres: str, tmp_path: Path):
    """Promote from two hosts that share MLflow and the database, but no file lock."""
    root = tmp_path / "factory"
    root.mkdir()
    (root / "ferry.toml").write_text(test_promotion.SETTINGS)
    create_keys(root / "keys")
    workspace = Workspace(root)
    subject = test_promotion.registered(workspace, "line0")
    ledger = Ledger(f"{postgres}/promotions", workspace.keys, tmp_path / "seen")
    test_promotion.another_first(workspace, subject, ledger)
    roots = test_promotion.two_hosts(workspace, subject, tmp_path, f"{postgres}/promotions")
    test_promotion.held_against(workspace, subject, ledger, test_promotion.same_moment(roots, subject))
    ledger.close()
