"""Measure the gateway: `make bench-gateway`, at most 20 minutes; SHORT=1 measures the memory for one minute in place of ten.

The gateway is a process of its own, with its database on this machine's disk; the clients are threads of this process, over the loopback.
Wall times depend on who else uses the machine, so the load is stated; processor times hardly do. Nothing is sent anywhere else.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from ota.fleet.register import Newcomer
from ota.fleet.store import open_fleet
from ota.report import Health
from tests.gateway_kit import CLASS, LINE, NOW, Device, Running, gateway, postgres

OUT = Path("build/bench/gateway.json")
TABLE = Path("tests/bench/results/gateway.md")
BATCH, PER_DEVICE = 20, 200
SECONDS = 15.0  # of a measurement of throughput
KILLS = 20
GROUPLESS = "from ota.gateway import writer\nwriter.MOST_TOGETHER = 1"
UNSYNCED = """
from sqlalchemy import event
from ota.fleet import schema
before = schema._own_transactions
def patched(engine):
    before(engine)
    event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA synchronous=OFF"))
schema._own_transactions = patched
"""
HEALTH = Health(
    since=NOW, share="all", images=4_000, p50_ms=80.0, p95_ms=95.0, free=2**33, load=[[900] * 8] * 8, captions=[60] * 64,
    statistics={"mean": [9] * 8}, tags=["site=berlin"],
)  # fmt: skip
_number = count()


class Link:
    """A connection that sends prepared requests and costs the client little."""

    def __init__(self, running: Running) -> None:
        self._socket, self._rest = running.raw(), b""

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request; return the status and the body of its answer.

        Raises:
            ConnectionError: the other side has ended.
        """
        self._socket.sendall(request)
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head, status = data[:end], int(data[9:12])
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        whole = end + 4 + (int(length[1]) if length and status != 304 else 0)
        while len(data) < whole:
            data += self._more()
        self._rest = data[whole:]
        return status, data[end + 4 : whole]

    def _more(self) -> bytes:
        if not (found := self._socket.recv(65_536)):
            raise ConnectionError
        return found

    def close(self) -> None:
        """Close it."""
        self._socket.close()


@dataclass
class Post:
    """A prepared request with reports of one device."""

    device: str
    numbers: list[int]
    request: bytes


def devices(database: str, many: int) -> list[Device]:
    """Enrol new devices."""
    made = [Device(f"press-{next(_number)}") for _ in range(many)]
    with open_fleet(database) as fleet:
        fleet.preauthorize([Newcomer(one.name, one.public_key, LINE, CLASS, {}) for one in made])
    return made


def posts(made: Sequence[Device], batch: int, packed: bool = True, each: int = PER_DEVICE) -> list[Post]:
    """Prepare requests: half of the reports are heartbeats with histograms. All first batches come first, so devices take turns."""
    rows = []
    for first in range(1, each + 1, batch):
        for one in made:
            numbers = list(range(first, first + batch))
            lines = [
                one.line(n, event="alive", health=HEALTH)
                if n % 2
                else one.line(n, reason=f"mark{one.name.replace('-', '')}x{n}x")
                for n in numbers
            ]
            body = gzip.compress(b"\n".join(lines), 6) if packed else b"\n".join(lines)
            encoding = b"Content-Encoding: gzip\r\n" if packed else b""
            head = b"POST /v1/reports HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-ndjson\r\n%sContent-Length: %d\r\n\r\n"
            rows.append(Post(one.name, numbers, head % (encoding, len(body)) + body))
    return rows


@dataclass
class Load:
    """Clients that send prepared requests over some connections, and what came of it."""

    running: Running
    waiting: Iterator[Post]
    pause: float = 0.0
    acknowledged: list[tuple[str, int]] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    unanswered: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ending: threading.Event = field(default_factory=threading.Event)

    def start(self, connections: int) -> list[threading.Thread]:
        """Start so many clients."""
        threads = [threading.Thread(target=self._run, daemon=True) for _ in range(connections)]
        for thread in threads:
            thread.start()
        return threads

    def stop(self, threads: Sequence[threading.Thread]) -> None:
        """Let each client end after its answer."""
        self._ending.set()
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        try:
            link = Link(self.running)
        except OSError:
            return
        while not self._ending.is_set():
            with self._lock:
                post = next(self.waiting, None)
            if post is None:
                break
            began = time.perf_counter()
            try:
                status, body = link.ask(post.request)
            except OSError:
                self.unanswered += 1
                break
            took = time.perf_counter() - began
            accepted = json.loads(body)["accepted"] if status == 200 else []
            with self._lock:
                self.took.append(took)
                self.statuses[status] = self.statuses.get(status, 0) + 1
                self.acknowledged += [(post.device, number) for number in accepted]
            if self.pause:
                self._ending.wait(self.pause)
        link.close()


def cpu(*running: Running) -> float:
    """Return the processor seconds of gateways so far."""
    return sum(sum(psutil.Process(one.process.pid).cpu_times()[:2]) for one in running)


def throughput(running: Sequence[Running], ready: list[Post], connections: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Send for some seconds, and measure rate, delays, and processor time for each report."""
    load_before, waiting = os.getloadavg()[0], iter(ready)
    loads = [Load(one, waiting) for one in running]
    for one in loads[1:]:
        one._lock = loads[0]._lock
    used, began = cpu(*running), time.perf_counter()
    threads = [one.start(connections // len(loads)) for one in loads]
    deadline = threading.Event()
    while time.perf_counter() - began < seconds and any(thread.is_alive() for group in threads for thread in group):
        deadline.wait(0.05)
    for one, group in zip(loads, threads, strict=True):
        one.stop(group)
    wall = time.perf_counter() - began
    reports, took = sum(len(one.acknowledged) for one in loads), sorted(t for one in loads for t in one.took)
    statuses: dict[int, int] = {}
    for one in loads:
        for status, many in one.statuses.items():
            statuses[status] = statuses.get(status, 0) + many
    return {
        "connections": connections, "seconds": round(wall, 1), "reports": reports, "reports_per_s": round(reports / wall), "statuses": statuses,
        "p50_ms": round(1000 * statistics.median(took), 1), "p99_ms": round(1000 * took[int(0.99 * (len(took) - 1))], 1),
        "cpu_us_per_report": round(1e6 * (cpu(*running) - used) / max(1, reports)), "load_before": round(load_before, 2),
    }  # fmt: skip


def unchanged(running: Running, connections: int = 8, seconds: float = 8.0) -> dict[str, Any]:
    """Ask for a file that has not changed, as all devices do several times a day."""
    etag = running.ask("GET", "/metadata/timestamp.json").headers["etag"]
    request = f"GET /metadata/timestamp.json HTTP/1.1\r\nHost: gateway\r\nIf-None-Match: {etag}\r\n\r\n".encode()
    load_before, counts, ending = os.getloadavg()[0], [0] * connections, threading.Event()

    def client(place: int) -> None:
        link = Link(running)
        while not ending.is_set():
            assert link.ask(request)[0] == 304
            counts[place] += 1
        link.close()

    used, began = cpu(running), time.perf_counter()
    threads = [threading.Thread(target=client, args=(place,), daemon=True) for place in range(connections)]
    for thread in threads:
        thread.start()
    ending.wait(seconds)
    ending.set()
    for thread in threads:
        thread.join()
    wall, answers = time.perf_counter() - began, sum(counts)
    return {
        "connections": connections, "answers_per_s": round(answers / wall), "cpu_us_per_answer": round(1e6 * (cpu(running) - used) / answers),
        "at_full_processor_per_s": round(answers / (cpu(running) - used)), "load_before": round(load_before, 2),
    }  # fmt: skip


def memory(running: Running, ready: list[Post], seconds: float) -> dict[str, Any]:
    """Send steadily for some time, and watch the resident memory."""
    process, began = psutil.Process(running.process.pid), time.perf_counter()
    load = Load(running, iter(ready), pause=4 * seconds / len(ready))
    threads, seen = load.start(4), []
    while time.perf_counter() - began < seconds:
        threading.Event().wait(min(5.0, seconds / 12))
        seen.append(process.memory_info().rss / 2**20)
    load.stop(threads)
    half = len(seen) // 2
    return {
        "seconds": round(seconds), "reports": len(load.acknowledged), "statuses": load.statuses, "mib_first": round(seen[0], 1),
        "mib_middle": round(statistics.median(seen[half : half + 3]), 1), "mib_last": round(statistics.median(seen[-3:]), 1), "mib_most": round(max(seen), 1),
    }  # fmt: skip


def kills(folder: Path, change: str = "") -> dict[str, Any]:
    """Kill the gateway again and again while reports arrive, and look for acknowledged reports that are lost."""
    folder.mkdir()
    database, rng = f"sqlite:///{folder / 'ferry.db'}", random.Random(0)
    waiting = iter(posts(devices(database, 60), 5))
    acknowledged: list[tuple[str, int]] = []
    in_flight = 0
    for _ in range(KILLS):
        with gateway(folder, change=change) as running:
            load = Load(running, waiting)
            threads = load.start(8)
            threading.Event().wait(rng.uniform(0.1, 0.6))
            running.process.send_signal(signal.SIGKILL)
            running.process.wait()
            load.stop(threads)
            acknowledged += load.acknowledged
            in_flight += load.unanswered
    with open_fleet(database) as fleet:
        kept = {(one.report.device, one.report.number) for one in fleet.verified() if one.proof == "verified"}
    return {
        "kills": KILLS,
        "acknowledged": len(acknowledged),
        "unanswered_requests": in_flight,
        "lost": len(set(acknowledged) - kept),
    }


LINE_OF_TRACE = re.compile(r"(\d+) +(?:(\w+)\((.*)|<\.\.\. (\w+) resumed>(.*))$", re.DOTALL)


def trace(folder: Path, change: str = "") -> dict[str, Any]:
    """Trace the gateway's system calls: whether the log was synced between the insert of each report and the answer that accepts it.

    Each report carries a mark, so that the writing of exactly this report is found in the log, and the answer on exactly its connection.
    """
    folder.mkdir()
    database, out = f"sqlite:///{folder / 'ferry.db'}", folder / "trace"
    ready = posts(devices(database, 12), 2, packed=False, each=16)
    prefix = [
        "strace",
        "-f",
        "-y",
        "-s",
        "60000",
        "-o",
        str(out),
        "-e",
        "trace=fsync,fdatasync,write,pwrite64,pwritev,sendto,sendmsg,recvfrom,read",
    ]
    with gateway(folder, database=database, prefix=prefix, change=change) as running:
        load = Load(running, iter(ready))
        for thread in load.start(4):
            thread.join()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(running.process.pid).children():
                child.terminate()
        running.process.wait(60)
    return judge(out.read_text(errors="replace")) | {"acknowledged": len(load.acknowledged)}


def judge(text: str) -> dict[str, Any]:
    """Read a trace: count the answers that accept reports, and those that were sent before their reports were synced."""
    written: set[str] = set()
    durable: set[str] = set()
    syncing: dict[str, set[str]] = {}
    asked: dict[str, set[str]] = {}
    open_calls: dict[str, str] = {}
    answers = unsynced = syncs = 0
    for line in text.splitlines():
        if not (found := LINE_OF_TRACE.match(line)):
            continue
        thread, name, rest, resumed, after = found.groups()
        if resumed:
            name, rest, begins, ends = resumed, open_calls.pop(thread, "") + after, False, True
        else:
            begins, ends = True, "<unfinished ...>" not in rest
            if not ends:
                open_calls[thread] = rest
        descriptor = rest.partition(",")[0].partition(")")[0]
        marks = set(re.findall(r"mark\w+?x\d+x", rest))
        if name in ("recvfrom", "read") and ends and marks:
            asked.setdefault(descriptor, set()).update(marks)
        elif name in ("pwrite64", "write", "pwritev") and "-wal" in descriptor and ends:
            written |= marks
        elif name in ("fsync", "fdatasync") and "-wal" in descriptor:
            if begins:
                syncing[thread] = set(written)
            if ends:
                durable |= syncing.pop(thread, set())
                syncs += 1
        elif name in ("sendto", "sendmsg", "write") and begins and "HTTP/1.1 200" in rest and asked.get(descriptor):
            answers += 1
            unsynced += not asked.pop(descriptor) <= durable
    return {"answers": answers, "before_the_sync": unsynced, "syncs_of_the_log": syncs}


def measure(folder: Path, short: bool) -> dict[str, Any]:
    """Measure all of it."""
    figures: dict[str, Any] = {"load_at_start": os.getloadavg(), "processors": os.cpu_count(), "python": sys.version.split()[0]}
    (folder / "published/metadata").mkdir(parents=True)
    (folder / "published/metadata/timestamp.json").write_text(json.dumps({"signed": {"version": 1, "filler": "x" * 600}}))
    database = f"sqlite:///{folder / 'ferry.db'}"
    say("preparing reports")
    sets = [posts(devices(database, 250), BATCH) for _ in range(2)]
    steady = posts(devices(database, 60 if short else 600), BATCH)
    with gateway(folder, "--repository", str(folder / "published"), database=database) as running:
        for connections, ready in zip((8, 16), sets, strict=True):
            say(f"{connections} connections")
            figures[f"batches_{connections}"] = throughput([running], ready, connections)
        say("304")
        figures["unchanged"] = unchanged(running)
        say("memory")
        figures["memory"] = memory(running, steady, 60 if short else 600)
    losing = {
        "group commit, batches of 20": ("", BATCH), "no group commit, batches of 20": (GROUPLESS, BATCH),
        "group commit, one report a POST": ("", 1), "no group commit, one report a POST": (GROUPLESS, 1),
    }  # fmt: skip
    figures["designs"] = {}
    for number, (name, (change, batch)) in enumerate(losing.items()):
        say(name)
        (place := folder / f"design-{number}").mkdir()
        url = f"sqlite:///{place / 'ferry.db'}"
        ready = posts(devices(url, 150 if batch > 1 else 60), batch)
        with gateway(place, database=url, change=change) as running:
            figures["designs"][name] = throughput([running], ready, 16, 8.0)
    say(f"{KILLS} kills")
    figures["kills"] = kills(folder / "kills")
    figures["kills_unsynced"] = kills(folder / "kills-unsynced", UNSYNCED)
    say("system calls")
    if shutil.which("strace"):
        figures["trace"] = {"synchronous=FULL": trace(folder / "full"), "synchronous=OFF": trace(folder / "off", UNSYNCED)}
    figures["postgresql"] = on_postgres(folder)
    return figures | {"load_at_end": os.getloadavg()}


def on_postgres(folder: Path) -> dict[str, Any]:
    """Measure one and two processes that share PostgreSQL; nothing if it is not here."""
    found: dict[str, Any] = {}
    with ExitStack() as life:
        try:
            (place := folder / "postgresql").mkdir()
            server = life.enter_context(postgres(place))
        except pytest.skip.Exception as error:
            return {"skipped": str(error)}
        for many in (1, 2):
            say(f"PostgreSQL, {many} process{'es' if many > 1 else ''}")
            ready = posts(devices(server.url, 150), BATCH)
            with ExitStack() as group:
                running = []
                for number in range(many):
                    (own := place / f"{many}-{number}").mkdir()
                    running.append(group.enter_context(gateway(own, database=server.url)))
                found[f"{many}"] = throughput(running, ready, 16, 8.0)
    return found


def say(what: str) -> None:
    """Say what is measured now."""
    print(f"· {what}", flush=True)


def goals(figures: dict[str, Any]) -> dict[str, str]:
    """Compare the figures with what was promised; times on a busy machine say nothing."""
    quiet = all(figures[key]["load_before"] < 1 for key in ("batches_8", "batches_16"))
    both = [figures["batches_8"], figures["batches_16"]]
    checks = {
        "at most 400 µs of processor time a report": max(one["cpu_us_per_report"] for one in both) <= 400,
        "at least 1,500 reports/s": min(one["reports_per_s"] for one in both) >= 1500 if quiet else None,
        "p99 at most 250 ms": max(one["p99_ms"] for one in both) <= 250 if quiet else None,
        "at least 3,000 answers 304 a second": figures["unchanged"]["answers_per_s"] >= 3000 if quiet or figures["unchanged"]["answers_per_s"] >= 3000 else None,
        "memory at most 150 MiB": figures["memory"]["mib_most"] <= 150,
        "memory flat (less than 5 MiB more in the second half)": figures["memory"]["mib_last"] - figures["memory"]["mib_middle"] < 5,
        "no acknowledged report lost": figures["kills"]["lost"] == 0,
    }  # fmt: skip
    if "trace" in figures:
        full, off = figures["trace"]["synchronous=FULL"], figures["trace"]["synchronous=OFF"]
        checks["the log is synced before each answer"] = full["answers"] > 0 and full["before_the_sync"] == 0
        checks["the same check fails with synchronous=OFF"] = off["answers"] > 0 and off["before_the_sync"] == off["answers"]
    return {
        name: "not judged: the machine was busy" if good is None else "yes" if good else "NO" for name, good in checks.items()
    }


def table(figures: dict[str, Any]) -> str:
    """Return the table for people."""
    rows = [(f"{n} connections, batches of {BATCH}", figures[f"batches_{n}"]) for n in (8, 16)]
    rows += [(f"16 connections, {name}", one) for name, one in figures["designs"].items()]
    rows += [
        (f"PostgreSQL, {n} process{'es' if n != '1' else ''}, 16 connections", one)
        for n, one in figures["postgresql"].items()
        if n != "skipped"
    ]
    start, end = (", ".join(f"{value:.2f}" for value in figures[key]) for key in ("load_at_start", "load_at_end"))
    unchanged_, memory_, killed, unsynced = figures["unchanged"], figures["memory"], figures["kills"], figures["kills_unsynced"]
    lines = [
        "# The gateway", "",
        (f"`make bench-gateway`: one gateway process (on PostgreSQL one or two), clients on the same machine over the loopback, {figures['processors']} processors. "
        f"Load averages at the start {start}, at the end {end}. Half of the reports are heartbeats with histograms. Every report is verified and committed, "
        "synced, before its answer."), "",
        "what | reports/s | p50 ms | p99 ms | processor µs a report | load before", "---|---|---|---|---|---",
        *(f"{name} | {one['reports_per_s']:,} | {one['p50_ms']} | {one['p99_ms']} | {one['cpu_us_per_report']} | {one['load_before']}" for name, one in rows), "",
        f"- Answers 304: {unchanged_['answers_per_s']:,} a second over {unchanged_['connections']} connections, {unchanged_['cpu_us_per_answer']} µs of processor time each (load before {unchanged_['load_before']}).",
        f"- Memory over {memory_['seconds']} s and {memory_['reports']:,} reports: {memory_['mib_first']} MiB at first, {memory_['mib_middle']} in the middle, {memory_['mib_last']} at the end, at most {memory_['mib_most']}.",
        f"- {killed['kills']} SIGKILLs under load: {killed['acknowledged']:,} reports acknowledged, {killed['unanswered_requests']} requests without an answer, {killed['lost']} acknowledged reports lost. The same with synchronous=OFF: {unsynced['lost']} of {unsynced['acknowledged']:,} lost, so kills alone show little.",
    ]  # fmt: skip
    for name, one in figures.get("trace", {}).items():
        lines.append(
            f"- System calls with {name}: {one['answers']} answers that accept reports, {one['before_the_sync']} of them before the log was synced."
        )
    return "\n".join(
        [*lines, "", "goal | reached", "---|---", *(f"{name} | {said}" for name, said in figures["goals"].items()), ""]
    )


def main() -> None:
    """Measure, and write the figures and the table; exit code 1 if a goal is missed."""
    short = bool(os.environ.get("SHORT"))
    place = Path(tempfile.mkdtemp(prefix="ferry-bench-gateway-"))
    try:
        figures = measure(place, short)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    figures["goals"] = goals(figures)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))
    TABLE.write_text(table(figures))
    print(TABLE.read_text())
    sys.exit("NO" in figures["goals"].values())


if __name__ == "__main__":
    main()
