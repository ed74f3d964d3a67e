"""Cron schedules: exactly five fields, in a time zone. What is written otherwise means something else to some program, and is refused.

Prefect would take six or seven fields (with seconds at the end), words such as @daily, and random fields. None of them is cron.
"""

from __future__ import annotations

import re
from datetime import datetime
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from flows.errors import WorkspaceError
from model.folder import shown

NO_CRON = "{cron!r} is not a cron schedule; write five fields, such as '0 3 * * 1' for Mondays at 3"
WORDS = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0", "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip
FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")
RANGES = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]


def check_cron(cron: str, timezone: str = "UTC") -> None:
    """Refuse what is not five fields of cron, before Prefect is loaded, which takes seconds.

    Raises:
        WorkspaceError: it is no schedule, it is never due, or there is no such time zone.
    """
    zone = zone_of(timezone)
    words = cron.split()
    if cron.strip().lower() in WORDS:
        raise WorkspaceError(f"'{shown(cron)}' is not written as five fields; write '{WORDS[cron.strip().lower()]}'")
    if len(words) != len(FIELDS) or not cron.isascii() or not cron.isprintable():
        hint = f" ({len(words)} are given; cron has no seconds and no year)" if len(words) in (6, 7) else ""
        raise WorkspaceError(NO_CRON.format(cron=shown(cron)) + hint)
    plain = " ".join(map(_field, [cron] * len(FIELDS), words, range(len(FIELDS))))
    try:
        next(CronSim(plain, datetime.now(zone)))
    except (CronSimError, StopIteration) as error:
        raise WorkspaceError(
            f"'{shown(cron)}' is never due; write a day that exists, such as '0 3 * * 1' for Mondays at 3"
        ) from error


def zone_of(name: str) -> ZoneInfo:
    """Return an IANA time zone.

    Raises:
        WorkspaceError: there is none of this name.
    """
    known = available_timezones()
    if name in known:
        return ZoneInfo(name)
    same = next((zone for zone in sorted(known) if zone.casefold() == name.casefold()), None)
    ends = same or next((zone for zone in sorted(known) if name and zone.casefold().endswith("/" + name.casefold())), None)
    raise WorkspaceError(f"there is no time zone '{shown(name)}'; write {ends or 'UTC, or one such as Europe/Berlin'}")


def _field(cron: str, text: str, place: int) -> str:
    """Check one field, and return it in numbers; ranges that wrap, such as FRI-MON, become two."""
    return ",".join(_part(cron, part, place) for part in text.split(","))


def _part(cron: str, text: str, place: int) -> str:
    if (text == "?" and place in (2, 4)) or (text == "L" and place == 2):  # both are the same to every program that knows them
        return text.replace("?", "*")
    if place == 4 and (nth := re.fullmatch(r"(\w+)#([1-5])", text, re.ASCII)):
        return f"{_number(cron, nth[1], place)}#{nth[2]}"
    found = re.fullmatch(r"(\*|(\w+)(?:-(\w+))?)(?:/(\d{1,2}))?", text, re.ASCII)
    low, high = RANGES[place]
    if not found or (found[4] is not None and not 0 < int(found[4]) <= high):
        raise _refused(cron, text, place)
    step = f"/{found[4]}" if found[4] else ""
    if found[1] == "*":
        return f"*{step}"
    first = _number(cron, found[2], place)
    if found[3] is None:
        if step:  # to cron 5/10 is 5-59/10; some programs read it otherwise
            return f"{first}-{6 if place == 4 and first < 7 else high}{step}"
        return str(first)
    last = _number(cron, found[3], place)
    if first <= last:
        return f"{first}-{last}{step}"
    if step:
        raise _refused(cron, text, place)
    return f"{first}-{6 if place == 4 else high},{low}-{last}"


def _number(cron: str, text: str, place: int) -> int:
    names = {3: MONTHS, 4: DAYS}.get(place, [])
    low, high = RANGES[place]
    if text.upper() in names:
        return names.index(text.upper()) + low
    if text.isdigit() and len(text) <= 2 and low <= int(text) <= high:
        return int(text)
    raise _refused(cron, text, place)


def _refused(cron: str, text: str, place: int) -> WorkspaceError:
    low, high = RANGES[place]
    names = {3: " or JAN to DEC", 4: " or SUN to SAT"}.get(place, "")
    return WorkspaceError(
        f"'{shown(text)}' is no {FIELDS[place]} in the cron schedule '{shown(cron)}'; write *, a number from {low} to {high}{names}, "
        "a range such as 1-5, or several with commas; '0 3 * * 1' is Mondays at 3"
    )
