"""A gateway as a process of its own on a loopback port, devices that sign reports, and raw connections to it.

pytest could not rewrite the assertions of a module that others import first; the next word says so: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import gzip
import http.client
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ota.fleet.store import Fleet, open_fleet
from ota.report import DeviceReport, Health, seal

LINE, CLASS = "shapes", "edge"
NOW = 1_800_000_000
PACKED = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}


@dataclass
class Device:
    """A device's id and key."""

    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public_key(self) -> str:
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def report(self, number: int, **fields: Any) -> DeviceReport:
        made: dict[str, Any] = {
            "schema_version": 3, "device": self.name, "boot": "b" * 32, "number": number, "time": NOW, "line": LINE,
            "device_class": CLASS, "event": "confirmed", "manifest": "a" * 64, "active": "a" * 64, "agent": "0.3.0",
        }  # fmt: skip
        return DeviceReport(**made | fields)

    def line(self, number: int, **fields: Any) -> bytes:
        return seal(self.report(number, **fields), self.key)

    def alive(self, number: int, **fields: Any) -> bytes:
        return self.line(number, event="alive", health=Health(since=NOW, share="all", images=3, tags=["site=berlin"], **fields))


@dataclass
class Answered:
    """What the gateway answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """A gateway that runs, and how it is asked."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, database: str) -> None:
        self.process, self.port, self.log, self.database = process, port, log, database

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answered:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            link.request(method, path, body or None, headers or {})
            answer = link.getresponse()
            return Answered(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            link.close()

    def send(self, lines: Sequence[bytes], **headers: str) -> Answered:
        """Send reports as a device does."""
        return self.ask("POST", "/v1/reports", gzip.compress(b"\n".join(lines), 1), PACKED | headers)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def figure(self, name: str) -> float:
        """Return a figure of /metrics."""
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        raise KeyError(name)

    @contextmanager
    def fleet(self) -> Iterator[Fleet]:
        fleet = open_fleet(self.database)
        try:
            yield fleet
        finally:
            fleet.close()

    def kept(self) -> dict[str, list[int]]:
        """Return the numbers that are kept, by device, read from the tables with every signature verified again."""
        found: dict[str, list[int]] = {}
        with self.fleet() as fleet:
            for checked in fleet.verified():
                assert checked.proof == "verified"
                found.setdefault(checked.report.device, []).append(checked.report.number)
        return found

    def knows(self, *devices: Device) -> None:
        """Enrol devices beside the running gateway, and wait until it has noticed."""
        with self.fleet() as fleet:
            for device in devices:
                fleet.enroll(device.name, device.public_key)
            count = len(fleet.known())
        self.until(lambda: self.figure("ferry_gateway_devices") == count)

    def until(self, holds: Callable[[], bool]) -> None:
        """Ask again until something holds; the test's own time limit is the process's end."""
        for _ in range(2_000):
            if holds():
                return
            assert self.process.poll() is None, self.log.read_text()
            threading.Event().wait(0.02)
        raise AssertionError("it never became true")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def words(*more: str) -> list[str]:
    return [sys.executable, "-m", "ota.gateway", "--port", "0", *more]


@contextmanager
def gateway(
    folder: Path,
    *more: str,
    database: str = "",
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Run a gateway during the block; it is killed in the end if it still runs."""
    database = database or f"sqlite:///{folder / 'ferry.db'}"
    log = folder / "gateway.log"
    with log.open("ab") as out:
        begins = out.tell()
        process = subprocess.Popen(
            [*prefix, *words(*more)], stderr=out, stdout=out, stdin=subprocess.DEVNULL,
            env=os.environ | {"FERRY_STORES_DATABASE": database} | (environment or {}), **options,
        )  # fmt: skip
    running = Running(process, 0, log, database)
    try:
        running.until(lambda: b"listens at" in log.read_bytes()[begins:])
        running.port = int(re.findall(rb"listens at https?://\S+:(\d+)", log.read_bytes()[begins:])[-1])
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def enrolled(database: str, names: Sequence[str]) -> list[Device]:
    """Enrol devices into a database, and return them."""
    made = [Device(name) for name in names]
    fleet = open_fleet(database)
    try:
        for device in made:
            fleet.enroll(device.name, device.public_key)
    finally:
        fleet.close()
    return made


class Postgres:
    """A PostgreSQL server of the test's own, which can be stopped and started again."""

    def __init__(self, folder: Path, programs: Path, port: int) -> None:
        self._folder, self._programs, self.url = folder, programs, f"postgresql://ferry@127.0.0.1:{port}/postgres"
        self._user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._user:
            shutil.chown(folder, "postgres")
        self._options = f"-h 127.0.0.1 -p {port} -k {folder}"
        self.call("initdb", "--username", "ferry", "--auth", "trust", "--encoding", "UTF8", "--no-sync")

    def call(self, name: str, *words: str) -> None:
        place = ["--pgdata", str(self._folder / "db")]
        with (self._folder.parent / f"{name}.log").open("ab") as log:  # pg_ctl's child would keep a pipe open
            done = subprocess.run(
                [*self._user, str(self._programs / name), *words, *place], stdout=log, stderr=log, cwd=self._folder
            )
        assert done.returncode == 0, (self._folder.parent / f"{name}.log").read_text()

    def start(self, more: str = "") -> None:
        log = str(self._folder / "server.log")
        self.call("pg_ctl", "start", "--wait", "--timeout", "300", "--log", log, "-o", f"{self._options} {more}")

    def stop(self) -> None:
        self.call("pg_ctl", "stop", "--mode", "immediate")


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Provide a PostgreSQL server that runs during the block; skip the test if there is none on this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not found:
        pytest.skip("there is no PostgreSQL; `apt-get install postgresql` brings it")
    pytest.importorskip("psycopg2", reason="there is no driver for PostgreSQL; `pip install deltaferry[postgres]` brings it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = Path(tempfile.mkdtemp(prefix="ferry-postgres-"))
    (place / "server").mkdir()
    if os.geteuid() == 0:
        shutil.chown(place, "postgres")
    server = Postgres(place / "server", found[-1].parent, port)
    server.start()
    try:
        yield server
    finally:
        with suppress(AssertionError):  # a test may have stopped it
            server.stop()
        shutil.rmtree(place)
