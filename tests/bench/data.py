"""`make bench-data`: measure `ferry data add` and `ferry data status` on folders of many small images, each call in its own process.

The images are 32 x 32 pixels of smooth noise, a third of them JPEG, in folders of 1,000. For each size the bench records a
first delivery, asks for the status of the unchanged folder, adds one image in a hundred, asks again, and records that. It
prints a table, and writes build/bench/data.json and tests/bench/results/data.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flows.setup import create
from model.data import METADATA

OUT = Path("build/bench/data.json")
TABLE = Path("tests/bench/results/data.md")
SIZES = (5_000, 50_000)
LINE = "parts"
SIDE = 32
CAPTIONS = ("ring", "bolt", "plate", "gasket", "ring, scratched", "plate, dented")


def deliver(folder: Path, first: int, count: int) -> None:
    """Write `count` captioned images, numbered from `first`; six of one group show one part."""
    rng = np.random.default_rng(first)
    with (folder / METADATA).open("a") as metadata:
        for number in range(first, first + count):
            name = f"{number // 1000:03d}/{number:06d}.{'jpg' if number % 3 == 0 else 'png'}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name)
            row = {"file_name": name, "text": CAPTIONS[number // 6 % len(CAPTIONS)], "group": f"part {number // 6}"}
            metadata.write(json.dumps(row) + "\n")


def measured(root: Path, *words: str) -> dict[str, Any]:
    """Run `ferry data`; return its seconds of wall and processor time, its peak memory in MiB, and its exit code."""
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(root), "data", *words], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stderr
    told = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"ferry data {' '.join(words)}: {told.decode(errors='replace')}")
    return {
        "wall": round(time.perf_counter() - begun, 1), "cpu": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
    }  # fmt: skip


def rows(size: int) -> dict[str, dict[str, Any]]:
    """Measure all steps on a folder of `size` images."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "ws"
        create(root, [LINE])
        folder = root / "data" / LINE
        deliver(folder, 0, size)

        def step(name: str, *words: str) -> None:
            found[name] = measured(root, *words, LINE)
            print(
                f"{size:7,} | {name:38} | {found[name]['wall']:8} | {found[name]['cpu']:8} | {found[name]['peak_mib']:6}",
                flush=True,
            )

        step("add, first delivery", "add")
        step("status, nothing changed", "status")
        deliver(folder, size, size // 100)
        step("status, 1 % more images", "status")
        step("add, 1 % more images", "add")
        step("add, nothing changed", "add")
    return found


def main() -> None:
    """Measure the sizes that the command line names, or all; print the table and write the figures."""
    sizes = [int(word) for word in sys.argv[1:]] or [*SIZES]
    print("images | command | wall s | processor s | peak MiB")
    measured_rows = {str(size): rows(size) for size in sizes}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"load": os.getloadavg(), "python": sys.version, "rows": measured_rows}, indent=1))
    if sizes == [*SIZES]:
        TABLE.write_text(table(measured_rows))


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Format the figures as the page in tests/bench/results."""
    lines = [
        f"{int(size):,} | `ferry data {name.partition(',')[0]}`{name.partition(',')[1]}{name.partition(',')[2]} | "
        f"{row['wall']} | {row['cpu']} | {row['peak_mib']}"
        for size, steps in found.items()
        for name, row in steps.items()
    ]
    return "\n".join([
        "# `ferry data` on many small images", "",
        (
            f"`make bench-data`, on a shared machine, load {os.getloadavg()[0]:.1f}: images of {SIDE} x {SIDE} pixels, a third of them "
            "JPEG; the remote is a folder of the workspace; a process for each call, with one thread."
        ), "",
        "images | command | wall s | processor s | peak MiB", "---|---|---|---|---", *lines, "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
