"""Measure the candidates of a PoC kit on this board, without a factory, a network or an agent's directory.

Each candidate draws in a process of its own, so that its peak memory is its own, and one that fails leaves the others alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ota
from ota.agent import board, child, energy, measured
from ota.agent.bench import Energy, cpu_seconds
from ota.agent.kit import OpenKit
from ota.errors import DeviceError, ManifestError, SoftwareError, UnfinishedError
from ota.kit import MAX_REASON, NOT_MEASURED, Board, Entry, Joules, Measured, Network, PocResult
from ota.manifest import MAX_TOLD

LEAST = 3  # images after the first, however long they take
IDLE = 10.0  # seconds of each baseline of energy; a bundle's takes longer, but a kit has many candidates
INTERRUPTED = "not measured: the measurement was ended before"


def run(
    folder: Path, images: int, seconds: float, watts: dict[str, float] | None, with_energy: bool, tell: Callable[[str], None],
    measure: Energy | None = None, describe: Callable[[], Board] = board.describe, root: Path = Path("/"),
) -> PocResult:  # fmt: skip
    """Measure every candidate of a kit.

    A candidate that cannot be measured is a row with the reason. If the user ends the measurement (KeyboardInterrupt), the
    candidates that are left are rows with that reason.

    Args:
        folder: of the kit.
        images: number of images that each candidate's times are taken from, fewer if they take longer than `seconds`.
        seconds: time after which no further image of a candidate is begun, once it has drawn a few.
        watts: the user's table of watts, for a board without a sensor; None: there is none.
        with_energy: whether to measure joules too, which takes most of a minute for each candidate.
        tell: called with one line of text before each candidate.
        measure: the function that measures joules.
        describe: the function that describes the board.
        root: the folder that contains `sys`, in which sensors are looked for.

    Raises:
        OperatorError: the folder holds no kit, or the table of watts is malformed.
        ManifestError: the kit is for a newer agent, or damaged.
        SoftwareError: ONNX Runtime cannot be loaded, or does not compute.
    """
    kit = OpenKit(folder)
    kit.check()
    child.run("check")
    started, rows, end = int(time.time()), list[Measured](), ""
    about = describe()
    entries = kit.kit.entries
    for number, entry in enumerate(entries, 1):
        if not end:
            try:
                tell(f"{number}/{len(entries)} {entry.key}: {entry.evaluations} evaluations an image")
                rows.append(_measured(kit, entry, images, seconds, watts, with_energy, measure or _briefly, root))
                continue
            except KeyboardInterrupt:
                end = INTERRUPTED
        rows.append(_row(entry, failed=end))
    warm = board.celsius(root)
    about = about.model_copy(update={"celsius": [*about.celsius, warm]}) if about.celsius and warm is not None else about
    return PocResult(
        kit=kit.digest, agent=ota.__version__, line=kit.kit.line, image=kit.kit.image, made=started, board=about, rows=rows
    )


def _briefly(draw: Callable[[], Any], found: energy.Found) -> energy.Reading:
    return energy.measure(draw, found, idle=IDLE)


def _row(entry: Entry, failed: str = "", **figures: Any) -> Measured:
    return Measured(**{name: getattr(entry, name) for name in Network.model_fields}, failed=failed[:MAX_REASON], **figures)


def _measured(
    kit: OpenKit, entry: Entry, images: int, seconds: float, watts: dict[str, float] | None, with_energy: bool, measure: Energy, root: Path
) -> Measured:  # fmt: skip
    start = time.perf_counter()
    try:
        worker = child.Worker(str(kit.folder), kit.digest, entry.key)
    except DeviceError as error:
        return _row(entry, failed=str(error))
    try:
        first = worker.draw(entry.variant, "", 0)
        drawn, before = time.perf_counter(), cpu_seconds(worker.pid)
        cold, until, took = drawn - start, drawn + seconds, list[float]()
        while len(took) < images and (len(took) < LEAST or time.perf_counter() < until):
            last = worker.draw(entry.variant, "", 1 + len(took))
            took.append(last["milliseconds"] / 1000)
        computed = (cpu_seconds(worker.pid) - before) / len(took)
        took.sort()
        return _row(
            entry, images=len(took), first_seconds=cold, p50_seconds=measured.percentile(took, 0.5),
            p95_seconds=measured.percentile(took, 0.95), cpu_seconds=computed, peak_mib=last["peak_mib"], bare_mib=first["bare_mib"],
            energy=_joules(worker, entry, watts, measure, root) if with_energy else None,
        )  # fmt: skip
    except SoftwareError:  # no candidate can draw
        raise
    except (DeviceError, ManifestError) as error:
        short = isinstance(error, UnfinishedError)
        return _row(
            entry, failed=f"{error}{' (or leave it out of the kit: it may be too large for this board)' if short else ''}"
        )
    finally:
        worker.close()


def _joules(worker: child.Worker, entry: Entry, watts: dict[str, float] | None, measure: Energy, root: Path) -> Joules:
    table = {energy.BUSY: watts["core_watts"], energy.IDLE: watts["idle_watts"]} if watts else None
    found = energy.probe(root, table=table, cpu=lambda: cpu_seconds(worker.pid))
    read = measure(lambda: worker.draw(entry.variant, "", 0), found)
    source = read.source if read.joules is not None else NOT_MEASURED
    return Joules(
        joules=read.joules, low=read.low, high=read.high, source=source[:MAX_TOLD], quality=read.quality, reason=read.reason[:MAX_REASON]
    )  # fmt: skip


def text(result: PocResult) -> str:
    """Format a result as a table for people."""
    about = result.board
    head = f"{about.model or 'a board of unknown model'}, {about.cpu}, {about.cores} cores, {about.memory_mib:,.0f} MiB"
    lines = [head, f"{'candidate':32} {'first':>8} {'p50':>8} {'p95':>8} {'peak':>9}  energy"]
    for row in result.rows:
        if row.failed:
            lines.append(f"{row.key:32} {row.failed}")
            continue
        times = " ".join(f"{value or 0:6.3g} s" for value in (row.first_seconds, row.p50_seconds, row.p95_seconds))
        lines.append(f"{row.key:32} {times} {row.peak_mib or 0:5.0f} MiB  {_energy(row.energy)}")
    why = next((row.energy.reason for row in result.rows if row.energy and row.energy.joules is None), "")
    return "\n".join([*lines, *([f"energy {NOT_MEASURED}: {why}"] if why else [])])


def _energy(found: Joules | None) -> str:
    if found is None or found.joules is None:
        return NOT_MEASURED
    return f"{found.joules:.3g} J ({found.source})"
