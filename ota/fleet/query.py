"""Which devices somebody means: `site=berlin silent>2d`. Without I/O.

A query is a list of conditions with blanks between them, and a device must meet all of them:

    NAME=VALUE     a tag, such as site=berlin; NAME!=VALUE: it has another value or none
    line=LINE, class=CLASS, event=EVENT, bundle=HASH (the beginning of it is enough), also with !=
    release=17     release that it runs; also !=, < and >, and release=none
    agent<0.3.0    version of its ferry-agent; also =, != and >
    silent>2d      time since anything was heard of it; also <, and silent=ever: it never reported
    state=counts   or unconfirmed, retired; also !=. Without this condition, retired devices are left out
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from ota import durations
from ota.errors import OperatorError
from ota.fleet.store import LastState
from ota.manifest import as_numbers

Meets = Callable[[LastState], bool]
MOST: Final = 20  # conditions of a query
_FORM = re.compile(r"([A-Za-z0-9_-]{1,40})(!=|=|<|>)(.{1,80})", re.DOTALL)
_TAG = re.compile(r"[a-z0-9][a-z0-9_-]{0,19}")
_AGENT = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6}){2}")
STATES: Final = ("counts", "unconfirmed", "retired")


def parse(text: str, now: int, release_of: Callable[[LastState], int | None]) -> Meets:
    """Return the check whether a device meets a query; an empty one is met by all that are not retired.

    Args:
        text: the query.
        now: seconds since 1970.
        release_of: finds the number of the release that a device runs; None: none that is listed.

    Raises:
        OperatorError: it is not written as above.
    """
    parts = text.split()
    if len(parts) > MOST:
        raise OperatorError(f"the query has {len(parts)} conditions, more than {MOST}; leave some out")
    meets = [_condition(part, now, release_of) for part in parts]
    if not any(part.startswith("state") for part in parts):
        meets.append(lambda state: state_of(state) != "retired")
    return lambda state: all(one(state) for one in meets)


def state_of(state: LastState) -> str:
    """Return one of `STATES`."""
    return "retired" if state.retired is not None else "unconfirmed" if state.confirmed is None else "counts"


def silence(state: LastState, now: int) -> int | None:
    """Return for how many seconds nothing was heard of a device; None: it never reported."""
    return None if state.heard_at is None else max(0, now - state.heard_at)


def _condition(part: str, now: int, release_of: Callable[[LastState], int | None]) -> Meets:
    found = _FORM.fullmatch(part)
    if not found:
        raise OperatorError(f"{part!r} is no condition; write it as site=berlin, silent>2d, agent<0.3.0 or class=edge")
    name, sign, value = found.groups()
    if name == "silent":
        return _silent(part, sign, value, now)
    if name == "agent":
        return _agent(part, sign, value)
    if name == "release":
        return _release(part, sign, value, release_of)
    if sign not in ("=", "!="):
        raise OperatorError(f"{part!r} compares what has no order; only silent, agent and release take < and >")
    if name == "state" and value not in STATES:
        raise OperatorError(f"there is no state {value!r}; give {', '.join(STATES)}")
    if name == "bundle":
        return lambda state: (state.active or "").startswith(value.lower()) == (sign == "=")
    fields: dict[str, Callable[[LastState], str | None]] = {
        "line": lambda state: state.line or state.enrolled_line,
        "class": lambda state: state.device_class or state.enrolled_class,
        "event": lambda state: state.event,
        "state": state_of,
    }
    if name in fields:
        field = fields[name]
        return lambda state: (field(state) == value) == (sign == "=")
    if not _TAG.fullmatch(name):
        raise OperatorError(f"{name!r} is no name of a tag; use lower-case letters, digits, '-' and '_', at most 20")
    return lambda state: (state.tags.get(name) == value) == (sign == "=")


def _silent(part: str, sign: str, value: str, now: int) -> Meets:
    if (sign, value) == ("=", "ever"):
        return lambda state: state.heard_at is None
    try:
        span = durations.parse(value)
    except ValueError as error:
        raise OperatorError(str(error)) from error
    if sign == ">":  # a device that never reported is silent for longer than any time
        return lambda state: (since := silence(state, now)) is None or since > span
    if sign == "<":
        return lambda state: (since := silence(state, now)) is not None and since < span
    raise OperatorError(f"{part!r} is no condition; write silent>2d, silent<1h or silent=ever")


def _agent(part: str, sign: str, value: str) -> Meets:
    if not _AGENT.fullmatch(value):
        raise OperatorError(f"{part!r} names no version; write it as agent<0.3.0")
    wanted = as_numbers(value)

    def meets(state: LastState) -> bool:
        if state.number is None:
            return False
        has = as_numbers(state.agent or "0.1.0")  # older agents do not name themselves
        return {"=": has == wanted, "!=": has != wanted, "<": has < wanted, ">": has > wanted}[sign]

    return meets


def _release(part: str, sign: str, value: str, release_of: Callable[[LastState], int | None]) -> Meets:
    if value == "none" and sign in ("=", "!="):
        return lambda state: (release_of(state) is None) == (sign == "=")
    if not (value.isascii() and value.isdigit()):
        raise OperatorError(f"{part!r} names no release; write it as release=17 or release=none")
    wanted = int(value)

    def meets(state: LastState) -> bool:
        has = release_of(state)
        if has is None:
            return sign == "!="
        return {"=": has == wanted, "!=": has != wanted, "<": has < wanted, ">": has > wanted}[sign]

    return meets
