"""`make bench-devices`: let 200 real agents update by delta through one gateway over TLS, and agents of the version before beside them.

A workspace of the version before (`tests/former`) is released by today's ferry. One device installs release 1; the others are copies of its
folder with an id and a key of their own. Then all update at the same time, at most 16 at once, each in a process of its own that starts its own
processes for the model. The gateway serves the repository and takes the reports. The bench ends with exit code 1 if a device does not converge, or
if the factory does not know it. The devices with today's agent switch only after the gateway has kept their report that they start. Figures go to build/bench/devices.json, the table to tests/bench/results/devices.md.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import ota
from ota.agent.state import Home
from tests.former import kit
from tests.former.kit import BARE, Programs, World, answer
from tests.network_kit import Authority

LINE, CLASS = "shapes", "edge"
DEVICES = int(os.environ.get("DEVICES", "200"))
FORMER = 8  # devices with the agent of the version before
AT_ONCE = 16
OUT, TABLE = Path("build/bench/devices.json"), Path("tests/bench/results/devices.md")


def ferry(world: World, *words: str) -> dict[str, Any]:
    """Run today's `ferry` in the workspace, and return its answer."""
    command = [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(world.factory), *words, "--json"]
    return answer(subprocess.run(command, capture_output=True, text=True))


def agent(folder: Path, *words: str) -> dict[str, Any]:
    """Run today's `ferry-agent` on a device's folder, and return its answer."""
    command = [sys.executable, "-m", "ota.agent.cli", "--quiet", *words, "--dir", str(folder), "--json"]
    return answer(subprocess.run(command, capture_output=True, text=True, env=BARE | {"HOME": str(folder.parent)}))


@contextmanager
def gateway(world: World, certificate: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run the gateway of the workspace over TLS; yield its address and its process."""
    command = [
        sys.executable, "-m", "flows.cli", "--quiet", "-w", str(world.factory), "gateway", "--port", "0", "--tls-cert", str(certificate),
        "--tls-key", str(certificate),
    ]  # fmt: skip
    log = world.factory.parent / "gateway.log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            until = time.monotonic() + 60
            while not (found := re.search(r"https://127\.0\.0\.1:(\d+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > until:
                    sys.exit(f"the gateway does not start: {log.read_text()}")
                time.sleep(0.1)
            yield found[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def set_up(world: World, folder: Path, name: str, address: str, authority: Path, *more: str) -> str:
    """Set a device up for the gateway, and return its public key."""
    anchor = world.factory / "root.json"
    return str(agent(
        folder, "init", "--device", name, "--line", LINE, "--class", CLASS, "--repository", address, "--reports", address, "--ca", str(authority),
        "--root", str(anchor), "--root-sha256", hashlib.sha256(anchor.read_bytes()).hexdigest(), "--tag", f"site=hall-{int(name[-1]) % 3}", *more,
    )["public_key"])  # fmt: skip


def fleet(world: World, address: str, authority: Path) -> dict[str, Path]:
    """Make all devices that run release 1, and let the factory know their keys."""
    place = world.factory.parent / "devices"
    first = place / "dev-000"
    keys = {first.name: set_up(world, first, first.name, address, authority)}
    agent(first, "update")
    for number in range(1, DEVICES):
        folder = place / f"dev-{number:03d}"
        shutil.copytree(first, folder)
        keys[folder.name] = set_up(world, folder, folder.name, address, authority, "--new-key")
    listed = world.factory.parent / "devices.csv"
    with listed.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["device", "public_key", "line", "class"])
        rows.writerows([name, key, LINE, CLASS] for name, key in keys.items())
    ferry(world, "fleet", "preauthorize", str(listed))
    return {name: place / name for name in keys}


def former_fleet(world: World, address: str, authority: Path) -> dict[str, Path]:
    """Make copies of the device that the version before left, which fetch from the gateway and report into the folder."""
    made = {}
    for number in range(FORMER):
        folder = world.factory.parent / "former" / f"former-{number}"
        shutil.copytree(world.device, folder)
        config = folder / "config.json"
        told = json.loads(config.read_bytes()) | {"repository": address, "authorities": authority.read_text(), "reports": ""}
        config.write_text(json.dumps(told))
        made[folder.name] = folder
    return made


def update_all(old: Programs, devices: dict[str, Path], former: dict[str, Path]) -> Counter[str]:
    """Update all devices, at most `AT_ONCE` at the same time; return how many came which way."""
    ways: Counter[str] = Counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        now = [pool.submit(agent, folder, "update") for folder in devices.values()]
        before = [pool.submit(lambda folder: answer(old.agent(folder, "update")), folder) for folder in former.values()]
        for job in now:
            ways[job.result()["way"]] += 1
        for job in before:
            ways[f"{job.result()['way']}, agent {kit.made()['version']}"] += 1
    return ways


def main() -> None:
    """Play it, check that all converge, and write the figures."""
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        old = Programs.install(place / "old-agent", kit.wheel("deltaferry_agent"))
        world, authority = World.unpack(place / "world"), Authority()
        (place / "ca.pem").write_bytes(authority.pem)
        with gateway(world, authority.certify(place, "127.0.0.1")) as (address, process):
            ferry(world, "rollout", "start", LINE, "--release", "1", "--waves", "100", "--unwatched", "100")
            devices = fleet(world, address, place / "ca.pem")
            former = former_fleet(world, address, place / "ca.pem")
            ferry(world, "release", LINE)
            ferry(world, "rollout", "start", LINE, "--waves", "100", "--unwatched", "100", "--acknowledge")
            before = time.monotonic()
            ways = update_all(old, devices, former)
            seconds = time.monotonic() - before
            served = process.cpu_times()
            figures = {
                "gateway_cpu_s": served.user + served.system, "gateway_rss_mib": process.memory_info().rss / 2**20, "seconds": seconds,
            }  # fmt: skip
        runs = Counter(Home(folder).load().active for folder in (*devices.values(), *former.values()))
        listed = ferry(world, "fleet", "status")["devices"]
        heard = Counter(row["standing"]["event"] for name, row in listed.items() if name in devices and row)
        (newest,) = {Home(folder).load().active for folder in devices.values()}
    converged = runs == {newest: DEVICES + FORMER} and heard == {"confirmed": DEVICES}
    figures |= {
        "devices": DEVICES, "former": FORMER, "ways": dict(ways), "heard": dict(heard), "converged": converged, "load_before": load,
        "load": os.getloadavg()[0], "cores": os.cpu_count(), "machine": platform.machine(), "agent": ota.__version__,
        "agents_cpu_s": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, "all_seconds": time.monotonic() - began,
    }  # fmt: skip
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(figures, indent=1))
    rows = "\n".join(
        f"| {name} | {value:,.1f} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in figures.items()
    )
    TABLE.write_text(
        f"# Real agents through one gateway over TLS\n\n`make bench-devices` wrote this.\n\n| figure | value |\n|---|---|\n{rows}\n"
    )
    print(TABLE.read_text())
    sys.exit(0 if converged else 1)


if __name__ == "__main__":
    main()
