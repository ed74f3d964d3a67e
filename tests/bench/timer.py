"""`make bench-timer`: find a timer by which devices look for updates although they are switched on only for hours or minutes.

The bench simulates systemd's timers as systemd.timer(5) defines them. OnBootSec counts from each start of the machine,
OnUnitActiveSec from the last look. RandomizedDelaySec is added each time (the same delay each time with FixedRandomDelay).
Persistent makes up for a missed OnCalendar at the next start, also after that delay. The bench prints a table and writes
build/bench/timer.json.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
DAYS, DEVICES = 14, 2000
OUT = Path("build/bench/timer.json")

Uptimes = list[tuple[float, float]]


@dataclass(frozen=True)
class Timer:
    """A rule by which a device decides when to look for updates."""

    name: str
    delay: float
    fixed: bool = False
    on_boot: float | None = None
    """Seconds after the start of the machine; None: OnCalendar, every `every` seconds, Persistent."""
    every: float = 6 * HOUR

    def looks(self, uptimes: Uptimes, draw: random.Random) -> Iterator[float]:
        """Yield the moments, in seconds, at which a device looks that is on from the start to the stop of each of `uptimes`."""
        own = draw.random() * self.delay

        def delayed() -> float:
            return own if self.fixed else draw.random() * self.delay

        stamp = 0.0
        """When the timer last elapsed, which Persistent keeps on the disk."""
        for start, stop in uptimes:
            now = start
            if self.on_boot is not None:
                at = start + self.on_boot + delayed()
            else:
                missed = now // self.every * self.every > stamp
                at = (now if missed else (now // self.every + 1) * self.every) + delayed()
            while at < stop:
                yield at
                stamp = now = at
                at = (now + self.every if self.on_boot is not None else (now // self.every + 1) * self.every) + delayed()


class Run(Timer):
    """`ferry-agent run` as a service: it looks within five minutes of its start, then every 45 to 75 minutes."""

    def looks(self, uptimes: Uptimes, draw: random.Random) -> Iterator[float]:
        """Yield the moments at which the service looks; see `Timer.looks`."""
        for start, stop in uptimes:
            at = start + 300 * draw.random()
            while at < stop:
                yield at
                at += HOUR * (0.75 + draw.random() / 2)


def daily(hours: float) -> Callable[[random.Random], Uptimes]:
    """Return a profile of devices that are on once a day for `hours`, each at its own time, an hour earlier or later."""

    def made(draw: random.Random) -> Uptimes:
        begin = draw.random() * (DAY - hours * HOUR - 2 * HOUR) + HOUR
        return [(day * DAY + (at := begin + draw.uniform(-HOUR, HOUR)), day * DAY + at + hours * HOUR) for day in range(DAYS)]

    return made


def shift(_: random.Random) -> Uptimes:
    """Return the uptimes of a shift: all devices are on from 6:00 to 14:00, five days a week."""
    return [(day * DAY + 6 * HOUR, day * DAY + 14 * HOUR) for day in range(DAYS) if day % 7 < 5]


def bursts(draw: random.Random) -> Uptimes:
    """Return uptimes of ten minutes, each one to five hours after the one before."""
    made, at = [], draw.random() * HOUR
    while at < DAYS * DAY:
        made.append((at, at + 10 * MINUTE))
        at += draw.uniform(1, 5) * HOUR
    return made


PROFILES: dict[str, Callable[[random.Random], Uptimes]] = {
    "one hour a day": daily(1), "ten minutes at a time": bursts, "a shift of eight hours": shift, "always on": lambda _: [(0, DAYS * DAY)],
}  # fmt: skip
TIMERS = (
    Timer("before: OnBootSec=5min, RandomizedDelaySec=6h, FixedRandomDelay", 6 * HOUR, fixed=True, on_boot=5 * MINUTE),
    Timer("OnCalendar=00/6:00, Persistent, RandomizedDelaySec=6h, FixedRandomDelay", 6 * HOUR, fixed=True),
    Timer("OnCalendar=00/6:00, Persistent, RandomizedDelaySec=15min", 15 * MINUTE),
    Timer("OnBootSec=2min, RandomizedDelaySec=15min", 15 * MINUTE, on_boot=2 * MINUTE),
    Timer("shipped: OnBootSec=1min, RandomizedDelaySec=5min", 5 * MINUTE, on_boot=MINUTE),
    Run("ferry-agent run as a service", 0),
)


def measure(timer: Timer, profile: Callable[[random.Random], Uptimes], seed: int) -> dict[str, float]:
    """Simulate a fleet of one kind of devices for two weeks; for each device a release is published in the first week."""
    draw = random.Random(seed)
    never, waits, looks, minutes = 0, [], 0, dict[int, int]()
    for _ in range(DEVICES):
        uptimes = profile(draw)
        moments = list(timer.looks(uptimes, draw))
        published = draw.random() * DAYS * DAY / 2
        later = [moment for moment in moments if moment >= published]
        never += not later
        waits.append((later[0] - published) / HOUR if later else DAYS * 24.0)
        looks += len(moments)
        for moment in moments:
            minutes[int(moment // MINUTE)] = minutes.get(int(moment // MINUTE), 0) + 1
    return {
        "never_looked": never / DEVICES, "median_wait_hours": statistics.median(waits),
        "p95_wait_hours": sorted(waits)[int(0.95 * (DEVICES - 1))], "looks_a_day": looks / DEVICES / DAYS,
        "most_in_a_minute": max(minutes.values(), default=0) / DEVICES,
    }  # fmt: skip


def main() -> None:
    """Simulate every timer under every profile, print the table and write the figures."""
    rows = []
    print(
        f"{DEVICES} devices, {DAYS} days, seed 1; a release is published in the first week. never: share that does not look in all that time"
    )
    for name, profile in PROFILES.items():
        print(f"\n{name:72} {'never':>7} {'median':>8} {'95 %':>8} {'a day':>6} {'in a minute':>12}")
        for timer in TIMERS:
            row = measure(timer, profile, seed=1)
            rows.append({"profile": name, "timer": timer.name, **row})
            print(
                f"{timer.name:72} {row['never_looked']:7.1%} {row['median_wait_hours']:6.1f} h {row['p95_wait_hours']:6.1f} h "
                f"{row['looks_a_day']:6.1f} {row['most_in_a_minute']:12.1%}"
            )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"devices": DEVICES, "days": DAYS, "seed": 1, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
