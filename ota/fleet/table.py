"""Devices as a table that spreadsheets read and write (CSV): the list of those to come, and that of those that are there."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

from ota import durations
from ota.errors import OperatorError, printable
from ota.fleet.query import state_of
from ota.fleet.register import Newcomer, check_device, check_key
from ota.fleet.store import LastState
from ota.manifest import MOST_TAGS

MOST_BYTES: Final = 16 * 1024 * 1024
NEEDED: Final = ("device", "public_key", "line", "class")
_TAG = re.compile(r"([a-z0-9][a-z0-9_-]{0,19})=([A-Za-z0-9][A-Za-z0-9._-]{0,39})")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet computes, which can run programs and send data away."""


def parse_tags(parts: Iterable[str]) -> dict[str, str]:
    """Return tags such as site=berlin by name.

    Raises:
        OperatorError: one is malformed, or there are more than `MOST_TAGS`.
    """
    found = {}
    for part in parts:
        match = _TAG.fullmatch(part)
        if not match:
            raise OperatorError(f"{part!r} is no tag; write it as site=berlin, with letters, digits, '.', '-' and '_'")
        found[match[1]] = match[2]
    if len(found) > MOST_TAGS:
        raise OperatorError(f"a device has at most {MOST_TAGS} tags, not {len(found)}; leave some out")
    return found


def newcomers(data: bytes, classes: Mapping[str, Collection[str]]) -> list[Newcomer]:
    """Read a list of devices: the first row names the columns `device,public_key,line,class` and, if wanted, `tags`.

    A byte-order mark, semicolons or tabs between the cells and empty rows, as spreadsheets make them, are taken as they come.

    Args:
        data: the file.
        classes: device classes of each line.

    Raises:
        OperatorError: a row is wrong, which is named; then none of them counts.
    """
    if len(data) > MOST_BYTES:
        raise OperatorError(f"the list has {len(data)} bytes, more than {MOST_BYTES}; split it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OperatorError("the list is not UTF-8; save it as 'CSV UTF-8'") from error
    head = text.partition("\n")[0]
    separator = next((sign for sign in ",;\t" if head.count(sign) >= len(NEEDED) - 1), ",")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise OperatorError(f"the list is no CSV: {error}; save it anew") from error
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if missing := [name for name in NEEDED if name not in names]:
        raise OperatorError(f"the list has no column {missing[0]}; its first row must be {','.join(NEEDED)} and, if wanted, tags")
    found: dict[str, Newcomer] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        try:
            made = _newcomer(dict(zip(names, (cell.strip() for cell in row), strict=False)), classes)
            if made.device in found:
                raise OperatorError(f"{made.device} is in the list twice")
        except OperatorError as error:
            raise OperatorError(f"row {number} of the list: {error}; no device was added") from error
        found[made.device] = made
    return list(found.values())


def _newcomer(cells: Mapping[str, str], classes: Mapping[str, Collection[str]]) -> Newcomer:
    for name in (*NEEDED, "tags"):
        if cells.get(name, "").startswith(_FORMULA):
            raise OperatorError(f"the cell {name} begins with {cells[name][0]!r}, as a formula does; write the value itself")
    if missing := [name for name in NEEDED if not cells.get(name)]:
        raise OperatorError(f"the cell {missing[0]} is empty")
    check_device(cells["device"])
    check_key(cells["public_key"])
    line, device_class = cells["line"], cells["class"]
    if device_class not in classes.get(line, ()):
        raise OperatorError(f"ferry.toml has no class {line}/{device_class}")
    return Newcomer(cells["device"], cells["public_key"], line, device_class, parse_tags(cells.get("tags", "").split()))


def export(states: Iterable[LastState], release_of: Mapping[str, int]) -> Iterator[str]:
    """Yield the lines of a table of devices; no cell of it is taken for a formula.

    Args:
        states: the devices.
        release_of: number of the release by the hash of its manifest.
    """
    yield _row([
        "device", "state", "line", "class", "tags", "heard", "heartbeat", "event", "release", "bundle", "agent", "clock_ahead_seconds",
        "conflicts", "refused", "reason",
    ])  # fmt: skip
    for state in states:
        yield _row([
            state.device, state_of(state), state.line or state.enrolled_line, state.device_class or state.enrolled_class,
            " ".join(f"{name}={value}" for name, value in sorted(state.tags.items())), _moment(state.heard_at),
            _moment(state.heartbeat_at), state.event, release_of.get(state.active or ""), state.active, state.agent, state.skew,
            state.conflicts, state.refused, state.reason,
        ])  # fmt: skip


def _moment(at: int | None) -> str:
    return "" if at is None else durations.utc(at)


def _row(cells: Iterable[str | int | None]) -> str:
    """Write a line; a text that a spreadsheet would compute gets an apostrophe in front."""
    made = io.StringIO()
    shown = ["" if cell is None else cell if isinstance(cell, int) else printable(cell) for cell in cells]
    csv.writer(made, lineterminator="\n").writerow(
        [f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(_FORMULA) else cell for cell in shown]
    )
    return made.getvalue()
