"""`make bench-fleet`: measure what a large fleet costs the factory: 10,000 devices with 100 reports each.

Processor time of the commands, user and system time together, each in a process of its own, beside `ferry --help`; and of keeping a report
in batches of 20, with the commits. It prints a table and writes build/bench/fleet.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from flows.workspace import Workspace
from ota.fleet.register import Newcomer
from ota.fleet.store import Arrived, Fleet, open_fleet
from ota.report import DeviceReport, Health, open_line, seal
from tests.bench.commands import roll_out, seconds_of

OUT = Path("build/bench/fleet.json")
TIMES, BATCH, KEPT = 5, 20, 4000
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw().hex()
CASES = {
    "--help": ("--help",),
    "fleet status": ("fleet", "status"),
    "fleet status --all": ("fleet", "status", "--all"),
    "fleet list --where": ("fleet", "list", "--where", "site=berlin silent>2d"),
    "status": ("status",),
}
LIMIT = 1.0  # seconds beyond --help of `fleet status`
KEEP_LIMIT = 60.0  # microseconds of a report, signature not included


def heartbeat(device: str, number: int, now: int, active: str) -> Arrived:
    """Sign a heartbeat; its signature is not verified, as whoever calls `keep` has done that."""
    health = Health(since=1, share="all", tags=["site=berlin"], images=55, load=[[5] * 16] * 8)
    made = DeviceReport(
        schema_version=3, device=device, boot="b", number=number, time=now, line="shapes", device_class="edge", event="alive",
        manifest=None, active=active, agent="0.3.0", health=health,
    )  # fmt: skip
    return Arrived(open_line(seal(made, KEY)), PUBLIC)


def fill(workspace: Workspace, devices: int, reports: int) -> None:
    """Enrol devices and give each its reports: one signed line for all but the last, which no command reads."""
    (release,) = workspace.repository.releases("shapes", "edge")
    names, now, fleet = [f"dev-{n:05}" for n in range(devices)], int(time.time()), workspace.fleet
    fleet.preauthorize([Newcomer(name, PUBLIC, "shapes", "edge", {}) for name in names])
    line = heartbeat(names[0], 1, now, release.manifest).opened.line.decode()
    with fleet.engine.begin() as connection:
        connection.execute(
            text(
                "with recursive n(number) as (select 1 union all select number + 1 from n where number < :most) "
                "insert into fleet_reports (device, number, received_at, event, envelope) "
                "select device, number, :now, 'alive', :line from fleet_devices cross join n"
            ),
            {"most": reports - 1, "now": now - 86_400, "line": line},
        )
    for first in range(0, devices, 500):
        silent = now - 3 * 86_400 if first == 0 else now
        fleet.keep([heartbeat(name, reports, silent, release.manifest) for name in names[first : first + 500]], now=silent)


def keep_cost(database: str) -> tuple[float, float]:
    """Return the microseconds of processor time of a report of one device, and of one of 20 devices, in batches of 20."""
    found = []
    now = int(time.time())
    with open_fleet(database) as fleet:
        fleet.preauthorize([Newcomer(f"dev-{n}", PUBLIC, "shapes", "edge", {}) for n in range(KEPT // BATCH)])
        for spread in (False, True):
            batches = [
                [heartbeat(f"dev-{n if spread else b}", (b + 1) * 1000 + n, now, "1" * 64) for n in range(BATCH)]
                for b in range(KEPT // BATCH)
            ]
            before = time.process_time()
            for batch in batches:
                assert not any(verdict.code for verdict in fleet.keep(batch, now=now))
            found.append(1e6 * (time.process_time() - before) / KEPT)
            with fleet.engine.begin() as connection:
                connection.execute(text("delete from fleet_reports"))
                connection.execute(text("update fleet_last set number = null"))
    return found[0], found[1]


def main() -> None:
    """Measure the commands and the store, print the table and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--reports", type=int, default=100)
    given = parser.parse_args()
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ws"
        roll_out(root)
        workspace = Workspace(root)
        fill(workspace, given.devices, given.reports)
        workspace.fleet.close()
        print(
            f"{given.devices:,} devices × {given.reports} reports; processor seconds, median of {TIMES}; load {os.getloadavg()[0]:.1f}\n"
        )
        for name, words in CASES.items():
            found = [seconds_of(words, root) for _ in range(TIMES)]
            assert all(code == 0 for _, code in found), name
            rows[name] = statistics.median(seconds for seconds, _ in found)
            print(f"{name:20} {rows[name]:6.2f}  {rows[name] - rows['--help']:+.2f}")
        one, many = keep_cost(f"sqlite:///{folder}/keep.db")
        with Fleet(workspace.database) as fleet:
            before = time.process_time()
            last = len(fleet.deciding())
            deciding = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"\nkeep, batches of {BATCH}: {one:.0f} µs of one device, {many:.0f} µs of {BATCH} devices; verify {last:,} last reports: {deciding:.2f} s"
    )
    beyond = rows["fleet status"] - rows["--help"]
    print(f"fleet status beyond --help: {beyond:.2f} s of {LIMIT}; largest command {peak:.0f} MiB")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({
        "devices": given.devices, "reports": given.reports, "load": os.getloadavg(), "python": sys.version, "seconds": rows,
        "beyond_help": beyond, "limit": LIMIT, "keep_us": {"one device": one, "many devices": many, "limit": KEEP_LIMIT},
        "deciding_seconds": deciding, "peak_mib": peak,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
