"""Durations and moments as people write and read them: 2h, 3d, 2026-12-02 18:00 UTC. Without I/O."""

from __future__ import annotations

import re
from datetime import UTC, datetime

UNITS = {"w": 604_800, "d": 86_400, "h": 3600, "m": 60, "s": 1}
FORM = re.compile(r"(?:[0-9]{1,12}[wdhms])+|[0-9]{1,30}")
PART = re.compile(r"([0-9]+)([wdhms])")


def parse(text: str) -> int:
    """Return the seconds of a duration such as 90s, 30m, 2h, 3d, 1w or 1d12h; a bare number is seconds.

    Raises:
        ValueError: it is not written so.
    """
    written = text.strip().lower()
    if not FORM.fullmatch(written):
        raise ValueError(f"{text!r} is no duration; write it as 90s, 30m, 2h, 3d or 1d12h, or as a number of seconds")
    return int(written) if written.isdigit() else sum(int(n) * UNITS[unit] for n, unit in PART.findall(written))


def spoken(seconds: float) -> str:
    """Return a duration in its two largest units, such as 3d, 1d23h or 45s; `parse` reads it again."""
    left = max(0, round(seconds))
    names = ("d", "h", "m", "s")
    largest = next((i for i, unit in enumerate(names) if left >= UNITS[unit]), 3)
    smallest = UNITS["m"] if left >= 600 and largest == 2 else UNITS[names[min(largest + 1, 3)]]  # 59m59s is one hour to a person
    left = (left + smallest // 2) // smallest * smallest
    parts = []
    for unit in names:
        count, left = divmod(left, UNITS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def utc(moment: float) -> str:
    """Return a moment, in seconds since 1970, as date and time in UTC; a moment beyond what a calendar holds, as its seconds."""
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return f"{moment:.0f} seconds after 1970"


def until(moment: float, now: float) -> str:
    """Say when a moment to come is: its date in UTC, and how long it takes until then."""
    return f"{utc(moment)} (in {spoken(moment - now)})"
