"""Sizes as people write them: a number of bytes, or one with a unit, such as 64KiB."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from model.folder import shown

UNITS = {"B": 1, "kB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2}
_WRITTEN = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")
HINT = "write bytes, such as 65536, or a number with one of the units B, kB, KiB, MB and MiB, such as 64KiB"


def _bytes(given: Any) -> int:
    """Convert a size to bytes.

    Raises:
        PydanticCustomError: it is no number, its unit is unknown, or it is zero.
    """
    text = str(given).strip() if isinstance(given, (int, str)) and not isinstance(given, bool) else ""
    found = _WRITTEN.fullmatch(text)
    if not found:
        raise PydanticCustomError("size", "{given} is no size; {hint}", {"given": shown(repr(given)), "hint": HINT})
    number, unit = found.groups()
    if unit and unit not in UNITS:
        raise PydanticCustomError("size", "'{unit}' in {given} is no unit; {hint}", {"unit": unit, "given": text, "hint": HINT})
    size = int(float(number) * UNITS[unit or "B"])
    if not size:
        raise PydanticCustomError("size", "an update of no bytes cannot be; {hint}", {"hint": HINT})
    return size


Size = Annotated[int, BeforeValidator(_bytes)]
"""Bytes, at least 1."""


def written(size: int) -> str:
    """Write a size for people: exact, and with a unit where it is a whole number of it."""
    for unit in ("MiB", "KiB"):
        if size and size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]} {unit}"
    return f"{size:,} bytes"
