"""Measure what an image costs on this device: milliseconds, processor time, memory and energy.

Joules are given with their source, or not at all. The figures are stored, and the choice of a variant uses them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ota.agent import child, energy, measured, rules
from ota.agent.state import Config, Home
from ota.errors import OperatorError, StateError
from ota.manifest import VariantName

Energy = Callable[[Callable[[], Any], energy.Found], energy.Reading]


def run(
    home: Home, images: int, with_energy: bool, tell: Callable[[str], None], measure: Energy = energy.measure
) -> dict[str, Any]:
    """Measure each variant of the running bundle in a separate process, and store the figures.

    Args:
        home: the agent's directory; locked briefly at the end.
        images: number of images that each variant's times are taken from; one more is drawn first, which also loads the variant.
        with_energy: whether to measure joules too, which takes minutes.
        tell: called with one line of text before each variant.
        measure: the function that measures joules.

    Returns:
        The bundle's hash, and one row of figures for each variant.

    Raises:
        OperatorError: `images` is less than `rules.LEAST_IMAGES`, or the configured table of watts is incomplete.
        StateError: nothing is installed, or the bundle is still on trial, or the directory belongs to another user.
        DeviceError: a variant does not draw.
    """
    if images < rules.LEAST_IMAGES:
        raise OperatorError(f"{images} images are too few to measure; give at least {rules.LEAST_IMAGES}")
    home.check_owner()  # fail now, not after minutes of measuring
    state, config = home.load(), home.config()
    if state.active is None or state.trial:
        raise StateError("there is nothing to measure before a bundle is installed and confirmed; run `ferry-agent update`")
    slot, rows = home.slot(state.active), dict[VariantName, dict[str, Any]]()
    for variant in slot.manifest.variants:
        tell(f"{variant}: {images} images{', then joules' if with_energy else ''}")
        start = time.perf_counter()
        worker = child.Worker(str(slot.folder), slot.digest)
        try:
            worker.draw(variant, "", 0)
            rows[variant] = {"first_ms": 1000 * (time.perf_counter() - start)} | _times(worker, variant, images)
            rows[variant] |= _joules(worker, variant, config, measure) if with_energy else {"joules": None, "energy": None}
        finally:
            worker.close()
    with home.locked():
        measured.write(home, slot.digest, rows)
    return {"bundle": slot.digest, "variants": rows}


def _times(worker: child.Worker, variant: VariantName, images: int) -> dict[str, Any]:
    before = cpu_seconds(worker.pid)
    answers = [worker.draw(variant, "", 1 + i) for i in range(images)]
    spent = (cpu_seconds(worker.pid) - before) / images
    took = sorted(answer["milliseconds"] for answer in answers)
    return {
        "images": images, "p50_ms": measured.percentile(took, 0.5), "p95_ms": measured.percentile(took, 0.95), "cpu_seconds": spent,
        "peak_mib": answers[-1]["peak_mib"],
    }  # fmt: skip


def _joules(worker: child.Worker, variant: VariantName, config: Config, measure: Energy) -> dict[str, Any]:
    watts = (config.core_watts, config.idle_watts)
    table = {energy.BUSY: watts[0], energy.IDLE: watts[1]} if watts != (None, None) else None
    found = energy.probe(table=table, cpu=lambda: cpu_seconds(worker.pid))
    reading = measure(lambda: worker.draw(variant, "", 0), found)
    return {"joules": reading.joules, "energy": asdict(reading)}


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds that a process has used so far; 0 if it has ended (proc_pid_stat(5), fields 14 and 15)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def line(variant: str, row: dict[str, Any]) -> str:
    """Format the figures of one variant as a line of text."""
    text = (
        f"{variant:5} p50 {row['p50_ms']:.1f} ms, p95 {row['p95_ms']:.1f} ms, first {row['first_ms']:.0f} ms, "
        f"{row['cpu_seconds']:.3f} CPU s, {row['peak_mib']:.0f} MiB at its peak"
    )
    if row["energy"] is None:
        return text
    e = row["energy"]
    if e["joules"] is None:
        return f"{text}; no joules: {e['reason']}"
    return f"{text}; {e['joules']:.3g} J ({e['low']:.3g} to {e['high']:.3g}) beyond idle by {e['source']} ({e['quality']}). {e['reason']}".rstrip()
