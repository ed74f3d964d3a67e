"""Joules per image, from the first sensor that this device has; without a sensor there is no figure, and a sentence says why.

Units are joules, watts and seconds. A sensor sees a whole package, board or battery, so an image's net energy is what was drawn
beyond the idle power. `parse_pmic`, `advance`, `accumulate`, `student` and `judge` do no I/O. The kernel's Documentation explains
the files: power/powercap, hwmon/sysfs-interface, hwmon/ina3221 and ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, Literal, NamedTuple

from ota.errors import OperatorError

Scope = Literal["package", "board", "rails", "battery", "model"]
Quality = Literal["measured", "partial", "model", "none"]

LEAST_REPEATS = 5  # needed for a confidence interval over the repeats
LEAST_SECONDS = 20.0  # of work
LEAST_SAMPLES = 50  # of a power sensor during the work
LEAST_IDLE = 10  # samples of each idle baseline
MAX_WATTS = 1000.0  # of a package; if a counter's wrap would mean more, it is not taken for a wrap
BUSY, IDLE = "watts_per_busy_core", "idle_watts"  # the keys of the user's table
WHOLE_BOARD = "VDD_IN"  # label of a Jetson module's input
GRAPHICS = {"amdgpu", "radeon", "nouveau", "i915", "xe"}  # chips that measure a graphics card, where no model runs
PERIODS = {"rapl": 0.5, "hwmon": 1.0, "pmic": 0.5, "battery": 5.0, "charge": 10.0, "model": 0.5}  # seconds between samples
PMIC_ADC = re.compile(r"^\s*(\w+)_([AV])(?:\s+\w+\(\d+\))?=(\d+(?:\.\d+)?)[AV]\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Reading:
    """Joules per image. Quality `none` means that there is no figure, `partial` that the sensor sees only part of the device."""

    source: str  # with the zone or rail; "none" if there is no sensor
    scope: Scope | None
    quality: Quality
    reason: str  # sentences: which sensors were skipped, what the figure leaves out, or why there is none
    joules: float | None = None  # net
    low: float | None = None  # lower end of the 95 % interval, from Student's t over the repeats and the baseline's error
    high: float | None = None
    gross_joules: float | None = None  # including what an idle device draws in the same time
    idle_watts: float | None = None
    images: int | None = None
    samples: int | None = None  # of the sensor during the work


@dataclass(frozen=True)
class Sensor:
    """A source of power or energy readings."""

    source: str
    scope: Scope
    quality: Quality
    period: float  # seconds after which there is a new reading
    read: Callable[[], tuple[float, ...]]  # returns joules of each counter, or watts; raises OSError or ValueError
    ranges: tuple[float | None, ...] = ()  # joules at which each counter wraps, None: never; empty if `read` gives watts
    note: str = ""


@dataclass(frozen=True)
class Found:
    """The first sensor that works, if any, and a sentence for each sensor that was skipped."""

    sensor: Sensor | None
    skipped: tuple[str, ...]


def probe(
    root: Path = Path("/"),
    table: object = None,
    vcgencmd: Callable[[], str] | None = None,
    cpu: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Find a sensor: RAPL, hwmon, a Raspberry Pi 5's PMIC, a discharging battery, or the user's table, in this order.

    Args:
        root: the folder that contains `sys`.
        table: `watts_per_busy_core` and `idle_watts` from the configuration; None if it has neither.
        vcgencmd: returns the list of a Raspberry Pi 5's rails, or raises OSError; by default runs the command of this name.
        cpu: returns the CPU seconds used so far; by default those of this process and of its children that ended.
        clock: returns seconds; the same clock as for `measure`.

    Raises:
        OperatorError: the table is malformed. A missing sensor is not an error.
    """
    model = _model(table, cpu or (lambda: sum(os.times()[:4])), clock)
    finders: dict[str, Callable[[], Sensor | str]] = {
        "RAPL": lambda: _rapl(root / "sys/class/powercap"),
        "hwmon": lambda: _hwmon(root / "sys/class/hwmon"),
        "The Raspberry Pi's PMIC": lambda: _pmic(vcgencmd or _run_vcgencmd),
        "The battery": lambda: _battery(root / "sys/class/power_supply"),
        "The table of watts": lambda: model,
    }
    skipped: list[str] = []
    for name, find in finders.items():
        try:
            found = find()
            # Virtual machines show counters that stay at 0, and some firmware reports 0 W.
            if isinstance(found, Sensor) and found is not model and not any(found.read()):
                found = f"{found.source} reads 0"
        except (OSError, ValueError) as error:
            found = _why(error)
        if isinstance(found, Sensor):
            return Found(found, tuple(skipped))
        skipped.append(f"{name} was skipped: {found}.")
    return Found(None, tuple(skipped))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _value(files: Sequence[Path], scale: float = 1e-6) -> float:
    """Multiply the numbers in some files and scale the product; the default scale is for µJ, µW, and mV times mA."""
    return math.prod(int(file.read_text()) for file in files) * scale


def _why(error: OSError | ValueError) -> str:
    return f"cannot read {error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _rapl(place: Path) -> Sensor | str:
    zones: dict[str, Path] = {}
    for zone in sorted(place.glob("*rapl*:*"), key=lambda zone: ("mmio" in zone.name, zone.name)):
        name = _text(zone / "name")
        # Take each top-level package once: the zone "psys" contains the packages, and intel-rapl-mmio repeats them.
        if zone.name.count(":") == 1 and name.startswith("package"):
            zones.setdefault(name, zone)
    if not zones:
        return f"there is no package zone in {place}"
    files = [zone / "energy_uj" for zone in zones.values()]
    limits = [_text(zone / "max_energy_range_uj") for zone in zones.values()]
    ranges = tuple((int(limit) + 1) / 1e6 if limit else None for limit in limits)
    try:
        _value(files)
    except PermissionError as error:
        return f"{error.filename} is for root only since CVE-2020-8694; run as root, or give a group access by a udev rule"
    return Sensor(
        f"RAPL {', '.join(zones)}", "package", "measured", PERIODS["rapl"], lambda: tuple(_value([f]) for f in files), ranges
    )  # fmt: skip


class _Rail(NamedTuple):
    chip: str
    counts: bool  # whether it gives joules, not watts
    label: str
    files: tuple[Path, ...]


def _rails(folder: Path, chip: str) -> Iterator[_Rail]:
    # An INA3221's in4 … in6 are shunt voltages. On other chips, the second channel may measure what the first one feeds.
    for n in (1, 2, 3) if chip == "ina3221" else (1,):
        for names in ((f"energy{n}_input",), (f"power{n}_input",), (f"in{n}_input", f"curr{n}_input")):
            label = _text(folder / names[0].replace("input", "label")) or _text(folder / "label") or f"{folder.name}/{names[0]}"
            rail = _Rail(chip, names[0].startswith("energy"), label, tuple(folder / name for name in names))
            try:
                _value(rail.files)
            except (OSError, ValueError):  # not there, or switched off by in*_enable
                continue
            yield rail
            break


def _hwmon(place: Path) -> Sensor | str:
    # The kernel lists batteries and chargers here too, and the power that charges a battery is not what the board draws.
    other = GRAPHICS | {path.name.replace("-", "_") for path in (place.parent / "power_supply").glob("*")}
    folders = [(folder, _text(folder / "name")) for folder in sorted(place.glob("hwmon*"))]
    rails = [rail for folder, chip in folders if chip not in other for rail in _rails(folder, chip)]
    if not rails:
        return f"no chip in {place} tells the power of this board"
    whole = [rail for rail in rails if rail.label == WHOLE_BOARD][:1]
    best = min(rails, key=lambda rail: not rail.chip.startswith("ina"))
    used = whole or [rail for rail in rails if rail[:2] == best[:2]]
    intervals = [_text(rail.files[0].with_name("update_interval")) for rail in used]  # ms
    period = max(0.05, *(int(interval) / 1000 if interval else PERIODS["hwmon"] for interval in intervals))
    counts = used[0].counts

    def read() -> tuple[float, ...]:
        values = tuple(_value(rail.files) for rail in used)
        return values if counts else (sum(values),)

    source, ranges = f"hwmon {used[0].chip}, ", (None,) * len(used) if counts else ()
    if whole:
        return Sensor(source + WHOLE_BOARD, "board", "measured", period, read, ranges)
    note = "The watched rails may leave out parts of the board, or feed one another."
    return Sensor(source + "sum of " + ", ".join(rail.label for rail in used), "rails", "partial", period, read, ranges, note)


def _run_vcgencmd() -> str:
    command = ["vcgencmd", "pmic_read_adc"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout  # noqa: S603
    except FileNotFoundError as error:
        raise OSError("there is no vcgencmd here") from error
    except subprocess.SubprocessError as error:
        raise OSError(f"{' '.join(command)} failed ({type(error).__name__})") from error


def parse_pmic(text: str) -> dict[str, float]:
    """Return the watts of each rail of a Raspberry Pi 5 that has a current and a voltage; EXT5V and BATT have no current.

    Raises:
        ValueError: there is no such rail.
    """
    found = {(rail, unit): float(value) for rail, unit, value in PMIC_ADC.findall(text)}
    rails = {rail: found[rail, "A"] * volts for (rail, unit), volts in found.items() if unit == "V" and (rail, "A") in found}
    if not rails:
        raise ValueError("vcgencmd pmic_read_adc lists no rail with a current and a voltage")
    return rails


def _pmic(vcgencmd: Callable[[], str]) -> Sensor:
    known = parse_pmic(vcgencmd()).keys()

    def read() -> tuple[float, ...]:
        rails = parse_pmic(vcgencmd())
        if rails.keys() != known:
            raise ValueError("vcgencmd pmic_read_adc lists other rails than before")
        return (sum(rails.values()),)

    note = "The rails do not include devices at 5 V (USB, HAT, NVMe) and the PMIC's own losses, so the figure is a lower bound."
    return Sensor(f"vcgencmd pmic_read_adc, {len(known)} rails", "rails", "partial", PERIODS["pmic"], read, note=note)


def _battery(place: Path) -> Sensor | str:
    used = [path for path in sorted(place.glob("BAT*")) if _text(path / "status") == "Discharging"]
    if not used:
        return f"no battery in {place} is discharging"
    known = (["power_now"], 1e-6), (["current_now", "voltage_now"], 1e-12), (["energy_now"], -3600e-6)
    there = (way for way in known if all((path / name).exists() for path in used for name in way[0]))
    names, scale = next(there, known[-1])
    counts = scale < 0  # a falling energy level in µWh counts as rising joules

    def read() -> tuple[float, ...]:
        if any(_text(path / "status") != "Discharging" for path in used):
            raise ValueError("the battery is no longer discharging; unplug the charger and measure again")
        values = tuple(_value([path / name for name in names], scale) for path in used)
        return values if counts else (sum(abs(value) for value in values),)  # some drivers report a discharge as negative

    source = f"{' x '.join(names)} of {', '.join(path.name for path in used)}"
    period, ranges = (PERIODS["charge"], (None,) * len(used)) if counts else (PERIODS["battery"], ())
    return Sensor(source, "battery", "measured", period, read, ranges)


def _model(table: object, cpu: Callable[[], float], clock: Callable[[], float]) -> Sensor | str:
    if table is None:
        return "the agent's configuration has none"
    watts: dict[str, Any] = table if isinstance(table, dict) and table.keys() == {BUSY, IDLE} else {BUSY: None, IDLE: None}
    busy, idle = watts[BUSY], watts[IDLE]
    if not all(type(number) in {int, float} and 0 <= number < math.inf for number in (busy, idle)) or not busy:
        raise OperatorError(f"the table of watts is {table!r}; give {BUSY} (above 0) and {IDLE} (0 or more), or leave it out")
    source = f"CPU seconds at {busy:g} W per busy core, {idle:g} W idle"
    note = "A model computes this figure; it is not measured."
    return Sensor(source, "model", "model", PERIODS["model"], lambda: (busy * cpu() + idle * clock(),), (None,), note)


def advance(before: float, after: float, limit: float | None, seconds: float) -> float:
    """Return the joules between two readings of a counter, `seconds` apart, allowing for a wrap at `limit`.

    Raises:
        ValueError: the counter went back, and no wrap explains that.
    """
    if after >= before:
        return after - before
    step = (after - before) % limit if limit else math.inf
    if step > MAX_WATTS * (seconds + 1):  # one second more, because counters move in steps
        raise ValueError("a counter went back, as after a reset or a sleep")
    return step


def accumulate(times: Sequence[float], rows: Sequence[tuple[float, ...]], ranges: Sequence[float | None]) -> list[float]:
    """Return the joules since the first sample, at each sample: from counters or, if `ranges` is empty, from watts.

    Watts are integrated by the trapezoid rule. It shifts a jump in power by half a period: with 50 samples, the error is 1 % of
    the jump.

    Raises:
        ValueError: a counter went back.
    """
    total = [0.0]
    for (start, before), (stop, after) in pairwise(zip(times, rows, strict=True)):
        if ranges:
            step = sum(advance(a, b, limit, stop - start) for a, b, limit in zip(before, after, ranges, strict=True))
        else:
            step = (before[0] + after[0]) / 2 * (stop - start)
        total.append(total[-1] + step)
    return total


def student(freedom: int) -> float:
    """Compute the 97.5 % quantile of Student's t: the normal quantile, corrected by Fisher's expansion.

    It is 0.3 % too low at 4 degrees of freedom, and less so above.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


def judge(
    sensor: Sensor, times: Sequence[float], rows: Sequence[tuple[float, ...]], marks: Sequence[int], images: Sequence[int]
) -> Reading:
    """Compute joules per image from the samples of a sensor, or say why they give no figure.

    Args:
        sensor: the sensor that the samples come from.
        times: time of each sample, in seconds.
        rows: the readings of each sample.
        marks: indices of the samples at which a section begins (idle, each repeat, idle), and of the last sample.
        images: number of images drawn in each repeat.
    """
    try:
        total = accumulate(times, rows, sensor.ranges)
    except ValueError as error:
        return refuse(sensor, f"There is no figure because {error}.")

    def spaced(first: int, last: int) -> list[int]:  # without samples that a mark put close to another one
        kept = [first]
        kept += (i for i in range(first + 1, last + 1) if times[i] - times[kept[-1]] >= sensor.period / 2)
        return kept

    def watts(first: int, last: int) -> float:
        return (total[last] - total[first]) / (times[last] - times[first])

    baselines, work = (marks[:2], marks[-2:]), (marks[1], marks[-2])
    seconds, samples = times[work[1]] - times[work[0]], len(spaced(*work)) - 1
    # Leave out each first sample: there, a power sensor still shows what was before.
    rates = [[watts(a, b) if sensor.ranges else rows[b][0] for a, b in pairwise(spaced(*span))] for span in baselines]
    if seconds < LEAST_SECONDS:
        return refuse(sensor, f"The work took {seconds:.1f} s and {LEAST_SECONDS:g} s are needed; draw for longer.")
    if not sensor.ranges and samples < LEAST_SAMPLES:
        return refuse(sensor, f"The sensor gave {samples} samples and {LEAST_SAMPLES} are needed; draw for longer.")
    if (fewest := min(map(len, rates))) < LEAST_IDLE:
        return refuse(sensor, f"The sensor gave {fewest} samples of the idle device and {LEAST_IDLE} are needed; wait longer.")
    before, after = map(fmean, rates)
    idle, noise = (before + after) / 2, stdev(rates[0] + rates[1])
    net = watts(*work) - idle
    if net <= 0 or net < 2 * noise:
        return refuse(
            sensor, f"The work adds {net:.3g} W and idle power varies by {noise:.3g} W; stop other programs and repeat."
        )
    repeats = [(watts(a, b), (times[b] - times[a]) / n) for (a, b), n in zip(pairwise(marks[1:-1]), images, strict=True)]
    nets = [(power - idle) * each for power, each in repeats]
    # The repeats share the baseline, so its error does not show in their differences.
    common = max(abs(before - after) / 2, 2 * noise / math.sqrt(len(rates[0] + rates[1]))) * seconds / sum(images)
    half = math.hypot(student(len(nets) - 1) * stdev(nets) / math.sqrt(len(nets)), common)
    joules, gross = fmean(nets), fmean(power * each for power, each in repeats)
    figures = joules, joules - half, joules + half, gross, idle, sum(images), samples
    return Reading(sensor.source, sensor.scope, sensor.quality, sensor.note, *figures)


def refuse(sensor: Sensor | None, reason: str) -> Reading:
    """Return a reading that has a reason and no figure."""
    return Reading(sensor.source, sensor.scope, "none", reason) if sensor else Reading("none", None, "none", reason)


@contextmanager
def in_thread(take: Callable[[], int], period: float) -> Iterator[None]:
    """Call `take` every `period` seconds in a thread until the block ends."""
    stopped = threading.Event()

    def loop() -> None:
        while not stopped.wait(period):
            take()

    thread = threading.Thread(target=loop, name="energy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def measure(
    draw: Callable[[], object],
    found: Found,
    repeats: int = LEAST_REPEATS,
    seconds: float = 25.0,
    idle: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
    watch: Callable[[Callable[[], int], float], AbstractContextManager[None]] = in_thread,
) -> Reading:
    """Measure the energy of an image: an idle baseline, repeats of images drawn back to back, and a second baseline.

    Args:
        draw: draws one image. Call it once beforehand, so that loading a model is not counted.
        found: the result of `probe`; without a sensor nothing is drawn.
        repeats: number of repeats, at least 5.
        seconds: length of all repeats together, more if the sensor is slow; work of less than 20 s gives no figure.
        idle: seconds of each baseline, more if the sensor is slow.
        clock: returns seconds.
        sleep: waits for a number of seconds.
        watch: takes samples while a block runs.

    Raises:
        OperatorError: there are fewer than 5 repeats. Exceptions of `draw` are passed on.
    """
    if repeats < LEAST_REPEATS:
        raise OperatorError(f"{repeats} repeats are too few for an interval; ask for {LEAST_REPEATS} or more")
    sensor = found.sensor
    if not sensor:
        return refuse(None, " ".join((*found.skipped, "There is no figure because this device has no sensor.")))
    times: list[float] = []
    rows: list[tuple[float, ...]] = []
    faults: list[str] = []
    images: list[int] = []
    lock = threading.Lock()

    def take() -> int:  # called from two threads; takes nothing more after a fault
        with lock:
            try:
                if not faults:
                    rows.append(sensor.read())
                    times.append(clock())
            except (OSError, ValueError) as error:
                faults.append(_why(error))
            return len(times) - 1

    share = max(seconds, 1.25 * LEAST_SAMPLES * sensor.period) / repeats  # a quarter more, because reading takes time too
    idle = max(idle, 1.25 * LEAST_IDLE * sensor.period)
    with watch(take, sensor.period):
        marks = [take()]
        sleep(idle)
        marks.append(take())
        for _ in range(repeats):
            until, drawn = clock() + share, 0
            while not faults and (not drawn or clock() < until):
                draw()
                drawn += 1
            images.append(drawn)
            marks.append(take())
        sleep(0 if faults else idle)
        marks.append(take())
    lost = f"The sensor was lost in the middle: {faults[0]}." if faults else ""
    reading = refuse(sensor, lost) if lost else judge(sensor, times, rows, marks, images)
    return replace(reading, reason=" ".join(filter(None, (*found.skipped, reading.reason))))
