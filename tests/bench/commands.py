"""`make bench-commands`: measure the processor time of the emergency stop and of refusals, each call in its own process.

All calls use one temporary workspace. The bench prints a table and writes build/bench/commands.json: the median of five calls,
user and system time together.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from flows.setup import create

OUT = Path("build/bench/commands.json")
TIMES = 5
CASES = {
    "halt": ("rollout", "halt", "shapes"),
    "status": ("status",),
    "config check": ("config", "check"),
    "wrong wave": ("rollout", "start", "shapes", "--waves", "ten"),
    "wrong line": ("release", "nosuch"),
    "wrong cron": ("serve", "--cron", "every monday"),
    "wrong release": ("rollout", "start", "shapes", "--release", "9"),
    "held lock": ("release", "shapes"),
}
LIMITS = {"halt": 1.5}  # seconds; 1 for all other cases


def seconds_of(words: tuple[str, ...], root: Path) -> tuple[float, int]:
    """Run a command in the workspace; return its processor seconds and its exit code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "-w", str(root), *words], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.returncode


def roll_out(root: Path) -> None:
    """Publish a release of made-up files and start its rollout to all devices."""
    import hashlib

    from ota.manifest import ROLES_OF_VARIANT, FileEntry, Manifest, Origin
    from ota.release import rollout

    workspace = create(root, ["shapes"])
    files, entries = root / "work/made", []
    files.mkdir(parents=True)
    for role in ("graph", *ROLES_OF_VARIANT):
        data = role.encode()
        digest = hashlib.sha256(data).hexdigest()
        (files / digest).write_bytes(data)
        entries.append(FileEntry(role=role, variant=None if role == "graph" else "full", size=len(data), sha256=digest))  # type: ignore[arg-type]
    origin = Origin(
        data_rev="", data_md5="", code="0" * 64, lineage="0" * 64, scorecard="0" * 64, decision="0" * 64, model="a", version=1
    )
    manifest = Manifest(
        line="shapes", device_class="edge", tier="test", configuration="I", precision="bfloat16", variants=["full"], default_variant="full",
        files=entries, origin=origin, minimum_agent="0.1.0",
    )  # fmt: skip
    release = workspace.repository.publish_release(manifest, files, workspace.ledger.head(), [])
    watched = rollout.watched(release, [100], None, None, rollout.Terms())
    workspace.repository.set_policy(rollout.start(release, [100], 0), watched)
    workspace.ledger.append("rollout", "shapes/edge", "all", {"release": 1})


def main() -> None:
    """Measure all commands, print the table and write the figures."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ws"
        roll_out(root)
        print(
            f"processor seconds, median of {TIMES}; load {os.getloadavg()[0]:.1f}\n\n{'command':14} {'seconds':>8} {'limit':>6} {'exit':>5}"
        )
        for name, words in CASES.items():
            lock = FileLock(root / "work/release.lock")
            if name == "held lock":
                lock.acquire()
            found = [seconds_of(words, root) for _ in range(TIMES)]
            lock.release(force=True)
            rows[name] = {"seconds": statistics.median(s for s, _ in found), "limit": LIMITS.get(name, 1.0), "exit": found[0][1]}
            print(f"{name:14} {rows[name]['seconds']:8.2f} {rows[name]['limit']:6.1f} {rows[name]['exit']:5}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"times": TIMES, "load": os.getloadavg(), "python": sys.version, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
