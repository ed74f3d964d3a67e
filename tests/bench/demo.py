"""`make prove-demo`: run the demo, measure its time and memory, and check every figure of its summary against the stores.

The stores are read here by means that the demo does not use: git, SQLite and plain files.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from ota.chain import name_of

LIMIT_SECONDS, LIMIT_MIB = int(os.environ.get("DEMO_SECONDS", "300")), 3 * 1024
OUT = Path("build/bench/prove-demo.json")
COMMANDS_AFTER = (
    "init .", "data log surfaces", "data add digits", "retrain surfaces", "promote surfaces/I/full 2", "history", "release surfaces",
    "rollout status surfaces", "rollout start surfaces", "rollout halt surfaces", "fleet status", "trust status", "trust refresh",
    "report",
)  # fmt: skip


def play(folder: Path) -> tuple[dict[str, Any], float, float]:
    """Run the demo; return its JSON, wall seconds, and the peak memory of all its processes together in MiB."""
    command = [sys.executable, "-m", "flows.cli", "demo", "--dir", str(folder), "--json"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            total = 0
            try:
                members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for member in members:
                try:
                    total += member.memory_info().rss  # an upper bound: shared pages count once for each process
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"the demo ended with {process.returncode}")
    return json.loads(out), time.monotonic() - began, peak


def check(said: dict[str, Any], folder: Path) -> list[tuple[str, bool]]:
    """Check each claim of the summary against the store that holds the fact."""
    log = subprocess.run(
        ["git", "-C", str(folder), "log", "--format=%H", "--", "data/surfaces.dvc"], capture_output=True, text=True, check=True
    ).stdout.split()
    arrival = subprocess.run(
        ["git", "-C", str(folder), "show", f"{log[0]}:data/surfaces.arrival.json"], capture_output=True, text=True, check=True
    ).stdout
    mlflow = sqlite3.connect(folder / "mlflow.db")
    versions = [
        row[0] for row in mlflow.execute("SELECT version FROM model_versions WHERE name = 'surfaces-I-full' ORDER BY version")
    ]
    aliases = mlflow.execute("SELECT version FROM registered_model_aliases WHERE name = 'surfaces-I-full' AND alias = 'champion'")
    tags = dict(
        mlflow.execute(
            "SELECT version || '', value FROM model_version_tags WHERE name = 'surfaces-I-full' AND key = 'gate.outcome'"
        )
    )
    champion = aliases.fetchone()[0]
    mlflow.close()
    rows: list[tuple[str, bool]] = [
        ("two data revisions, those of git", said["data_versions"] == log[::-1] and len(log) == 2),
        (
            "the second delivery is drift, as in git",
            said["drift"] == json.loads(arrival)["drift"] and said["drift"]["verdict"] == "drift",
        ),
        ("versions 1, 2, 3 in MLflow", said["model_versions"] == versions == [1, 2, 3]),
        ("gate outcomes as tagged in MLflow", tags == {k: v["outcome"] for k, v in said["gate"].items()}),
        ("1 and 2 promoted, 3 refused", list(tags.values()) == ["promote", "promote", "refuse"]),
        ("champion is version 2 again", champion == said["champion"] == 2),
        ("the gate states its n", all(row["n"] >= 96 for row in said["gate"].values())),
        ("three devices", len(said["devices"]) == 3),
        ("each refused for a reason of its own", all(said["refused"].values())),
        ("the delta is smaller than the bundle", said["bytes"]["delta"] < said["bytes"]["full"]),
        ("the report is there", Path(said["report"]).is_file()),
        ("two pictures from each device", len(list((folder / "pictures").glob("*.png"))) == 6),
    ]
    for device, acts in said["devices"].items():
        state = json.loads((folder / "devices" / device / "state.json").read_bytes())["state"]
        slot = folder / "devices" / device / "slots" / state["active"]
        manifest = json.loads((slot / "manifest.json").read_bytes())
        whole = all(
            hashlib.sha256((slot / entry["sha256"]).read_bytes()).hexdigest() == entry["sha256"] for entry in manifest["files"]
        )
        digest = hashlib.sha256((slot / "manifest.json").read_bytes()).hexdigest()
        rows += [
            (
                f"{device} was heard over HTTP, and nothing waits",
                {"starting", "installed", "confirmed", "refused"} <= {*said["heard"][device]}
                and not any((folder / "devices" / device / "queue").glob("*.json"))
                and not any((folder / "inbox").glob("*.json")),
            ),
            (f"{device} runs version 2, whole", digest == acts["after_broken"] == acts["updated"] and whole),
            (f"{device} had another before", acts["installed"] != acts["updated"] and manifest["origin"]["version"] == 2),
        ]
    target, base = said["devices"]["press-01"]["updated"], said["devices"]["press-01"]["installed"]
    (delta,) = (folder / "published" / "targets" / "deltas" / "surfaces" / "edge").glob(f"*.{name_of(2, base, target)}")
    rows.append(("the delta's size is that of the published file", delta.stat().st_size == said["bytes"]["delta"]))
    return rows


def main() -> None:
    """Run and check the demo, print and write the figures, and fail if a check does."""
    with tempfile.TemporaryDirectory(prefix="ferry-demo-") as place:
        folder = Path(place) / "demo"
        said, seconds, peak = play(folder)
        rows = check(said, folder)
        for words in COMMANDS_AFTER:
            call = [
                sys.executable,
                "-m",
                "flows.cli",
                "--quiet",
                "-w",
                str(folder),
                *words.replace("init .", f"init {folder}").split(),
            ]
            rows.append((f"`ferry {words}` works in the workspace", subprocess.run(call, capture_output=True).returncode == 0))
    rows.append((f"at most {LIMIT_SECONDS} s", seconds <= LIMIT_SECONDS))
    rows.append((f"at most {LIMIT_MIB} MiB in all processes", peak <= LIMIT_MIB))
    for name, passed in rows:
        print(f"{'yes' if passed else 'NO '}  {name}")
    print(f"\n{seconds:.0f} s, {peak:.0f} MiB at the peak; by step: {said['seconds']}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "seconds": round(seconds, 1), "peak_mib": round(peak), "steps": said["seconds"], "bytes": said["bytes"], "gate": said["gate"],
        "checks": dict(rows), "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
    }  # fmt: skip
    OUT.write_text(json.dumps(figures, indent=1) + "\n")
    if not all(passed for _, passed in rows):
        sys.exit("the demo does not do what it says")


if __name__ == "__main__":
    main()
