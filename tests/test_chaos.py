"""`make chaos`: kill the real agent before every file call of a delta update, or fail the call, then let it continue.

First one update is watched under strace without any disturbance. Each of its calls that concerns the agent's directory then
becomes cases: SIGKILL before the call if it changes something, EIO from the call, and ENOSPC if the call may need room. The
agent itself and its children (`apply`, `try`) are disturbed in turn. After each case the device must have a sound bundle.
Two more updates must then end with the same bytes as the undisturbed one, with nothing refused and nothing left over.

CHAOS_SECONDS (600) limits the time: cases are taken evenly from all, and the output says how many were left out. CHAOS=all
takes all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ota.agent.slots import is_sound
from ota.errors import OtaError
from ota.report import DeviceReport
from tests.fleet_kit import Device, Field

pytest_plugins = ["tests.fleet_kit"]
pytestmark = pytest.mark.chaos

CHANGING = [
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "ftruncate",
]
READING = ["openat", "read", "pread64"]
ROOM = {"write", "pwrite64", "openat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "fsync", "fdatasync"}
AGENT = "import sys; sys.executable = sys.argv.pop(1); from ota.agent import cli; cli.main()"
LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)")
TIMES = int(os.environ.get("CHAOS_SECONDS", "600"))


@dataclass(frozen=True)
class Case:
    """One disturbance."""

    who: str
    """The disturbed process: agent, or the task of a child."""
    call: str
    nth: int
    """The number of the call among the calls of this name, from 1."""
    fault: str
    """SIGKILL, EIO or ENOSPC."""

    @property
    def inject(self) -> list[str]:
        what = f"signal={self.fault}" if self.fault == "SIGKILL" else f"error={self.fault}"
        return ["-e", f"trace={self.call}", "-e", f"inject={self.call}:{what}:when={self.nth}"]


class Bench:
    """Where devices are disturbed: each case runs on a copy of a device that is about to update."""

    def __init__(self, offered: Field, folder: Path) -> None:
        self.offered, self.folder = offered, folder
        self.old = str(offered.device.active)

    def device(self, name: str) -> Device:
        root = self.folder / name / "device"
        shutil.copytree(self.offered.device.root, root)
        (root.parent / "reports").mkdir()
        device = Device(root)
        device.configure(reports=str(root.parent / "reports"))
        return device

    def wrapper(self, device: Device, task: str, strace: list[str]) -> Path:
        """Write a wrapper for Python that starts the first child with this task under strace, and all other children as usual."""
        path, done = device.root.parent / "python", device.root.parent / "disturbed"
        words = " ".join(f"'{word}'" for word in strace)
        path.write_text(
            f'#!/bin/sh\nif [ "$4" = "{task}" ] && [ ! -e "{done}" ]; then : > "{done}"; exec strace -D {words} {sys.executable} "$@"; fi\n'
            f'exec {sys.executable} "$@"\n'
        )
        path.chmod(0o755)
        return path

    def run(self, device: Device, who: str, strace: list[str]) -> subprocess.CompletedProcess[str]:
        """Run an update with one of its processes under strace."""
        words = ["--quiet", "update", "--dir", str(device.root)]
        if who == "agent":
            command = ["strace", *strace, sys.executable, "-m", "ota.agent.cli", *words]
        else:
            command = [sys.executable, "-c", AGENT, str(self.wrapper(device, who, strace)), *words]
        return subprocess.run(command, capture_output=True, text=True)

    def watched(self, who: str) -> list[Case]:
        """List all cases of one process, from an update in which nothing is disturbed."""
        device = self.device(f"watched-{who}")
        log = device.root.parent / "calls"
        self.run(device, who, ["-y", "-o", str(log), "-e", f"trace={','.join(CHANGING + READING)}"])
        count, cases = Counter[str](), list[Case]()
        for line in log.read_text(errors="replace").splitlines():
            found = LINE.match(line)
            if not found:
                continue
            call, rest = found.groups()
            count[call] += 1
            if f"{device.root}/" not in rest and f'"{device.root}"' not in rest and f"<{device.root}" not in rest:
                continue
            changes = call in CHANGING or "O_CREAT" in rest
            faults = ["EIO", *(["SIGKILL"] if changes else []), *(["ENOSPC"] if changes and call in ROOM else [])]
            cases += [Case(who, call, count[call], fault) for fault in faults]
        assert cases, f"nothing was seen of {who}"
        return cases


def facts(device: Device) -> dict[str, Any]:
    """Collect what must be the same as if nothing had happened."""
    state = device.state
    slots = {
        str(path.relative_to(device.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((device.root / "slots").rglob("*")) if path.is_file()
    }  # fmt: skip
    return {
        "state": state.model_dump(),
        "slots": slots,
        "left": device.leftovers(),
        "marks": json.loads((device.root / "highwater.json").read_bytes())["versions"],
    }


def disturbed(bench: Bench, number: int, case: Case, wanted: dict[str, Any]) -> str | None:
    """Return what is wrong after a case, or None if nothing is."""
    device = bench.device(f"case-{number}")
    try:
        ended = bench.run(device, case.who, ["-o", "/dev/null", *case.inject])
        if case.fault != "SIGKILL" and ended.returncode not in (0, 3, 4):
            return f"exit {ended.returncode}: {ended.stderr.strip()[-300:]}"
        state = device.state
        if state.active is None or not is_sound(device.home, state.active):
            return "no sound bundle is left"
        device.update()
        device.update()  # the first one may only have cleaned up
        found = facts(device)
        seen: dict[int, DeviceReport] = {}
        for report in device.reports():  # a delivered report may still be queued, but must be the same
            if seen.setdefault(report.number, report) != report:
                return "a report number was used twice"
        return None if found == wanted else f"it ended otherwise: {difference(found, wanted)}"
    except (OtaError, OSError, ValueError, KeyError, AssertionError) as error:  # from the next update, or from this bench
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(device.root.parent)


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {found[key]} instead of {wanted[key]}" for key in wanted if found[key] != wanted[key])[:500]


def evenly(cases: list[Case]) -> Iterator[Case]:
    """Yield all cases in an order in which any beginning is spread over all: by the reversed binary digits of their places."""
    digits = max(1, (len(cases) - 1).bit_length())
    yield from (cases[i] for i in sorted(range(len(cases)), key=lambda i: f"{i:0{digits}b}"[::-1]))


def test_disturbed_update_converges(offered: Field, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    start = time.monotonic()
    bench = Bench(offered, tmp_path)
    undisturbed = bench.device("undisturbed")
    assert undisturbed.process("--quiet", "update").returncode == 0
    undisturbed.update()
    wanted = facts(undisturbed)
    assert wanted["state"]["active"] != bench.old
    cases = [case for who in ("agent", "apply", "try") for case in bench.watched(who)]
    wrong: list[str] = []
    done = Counter[str]()

    def one(numbered: tuple[int, Case]) -> None:
        number, case = numbered
        if os.environ.get("CHAOS") != "all" and time.monotonic() - start > TIMES:
            return
        problem = disturbed(bench, number, case, wanted)
        done[f"{case.who} {case.fault}"] += 1
        if problem:
            wrong.append(f"{case}: {problem}")

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(one, enumerate(evenly(cases))))
    total = Counter(f"{case.who} {case.fault}" for case in cases)
    with capsys.disabled():
        rows = [f"{kind:15} {done[kind]:5} of {count:5}" for kind, count in sorted(total.items())]
        sys.stdout.write(
            "\n".join(
                [
                    "",
                    *rows,
                    f"{sum(done.values())} of {len(cases)} cases in {time.monotonic() - start:.0f} s, {len(wrong)} wrong",
                    "",
                ]
            )
        )
    assert not wrong, "\n".join(wrong)
