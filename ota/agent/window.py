"""The maintenance window: hours of the day, in UTC or in a time zone of the IANA database, such as 22:00-05:00 Europe/Berlin.

The hours are those that a clock on the wall shows, so a window moves with summer time. A window that the clocks jump over does not open
on that day; one that they run through twice opens twice.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

HOURS = r"([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]"
ZONE = r"[A-Za-z][A-Za-z0-9_+-]{0,39}(/[A-Za-z][A-Za-z0-9_+-]{0,39}){0,2}"  # no dots: the name becomes a path
FORM = rf"^({HOURS}( {ZONE})?)?$"
WRITTEN = "give hours in UTC, such as 22:00-05:00, or with a time zone, such as '22:00-05:00 Europe/Berlin'"
SURELY = ("Europe/London", "America/New_York", "Asia/Tokyo")  # if a device knows none of these, it has no database


def split(window: str) -> tuple[str, str]:
    """Return the hours of a window, and its time zone; without one, UTC."""
    hours, _, zone = window.partition(" ")
    return hours, zone or "UTC"


def zone_of(window: str) -> tzinfo | None:
    """Return the time zone of a window; None if this device does not know it."""
    return _zone(split(window)[1])


def _zone(name: str) -> tzinfo | None:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # none of that name, a file that is no time zone, a folder such as Europe
        return None


def problem(window: str) -> str:
    """Say why a window cannot be used on this device; return an empty string if it can."""
    hours, name = split(window)
    if hours and hours[:5] == hours[6:]:
        return f"{hours} ends when it begins, so it never opens; give another end"
    if not hours or zone_of(window):
        return ""
    if any(map(_zone, SURELY)):
        return f"this device knows no time zone {name}; give a name of the IANA database, such as Europe/Berlin"
    return (
        f"this device has no database of time zones, so it does not know {name}; install the package tzdata, or give hours in UTC"
    )


def minute(window: str, now: int) -> int:
    """Return the minute of the day, 0 to 1439, in the zone of a window that this device knows."""
    there = datetime.fromtimestamp(now, zone_of(window) or UTC)
    return there.hour * 60 + there.minute


def shown(window: str, now: int) -> str:
    """Show a window with its zone and, if this is not UTC, the time there."""
    hours, zone = split(window)
    at = minute(window, now)
    return f"{hours} UTC" if zone == "UTC" else f"{hours} {zone}, where it is {at // 60:02d}:{at % 60:02d}"
