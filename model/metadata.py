"""Read `metadata.jsonl`: which image has which caption. Every line that cannot be used is named, with the reason.

The file is UTF-8, or UTF-16 or UTF-32 that says so. Each line is a JSON object:

- `file_name`: the image, relative to the folder;
- `text`: its caption;
- `group`, optional: text or a number; images of one group always fall on the same side of the held-out split;
- `white`, optional: value of white in a grey image with more than 8 bits.

Other keys mean nothing here.
"""

from __future__ import annotations

import codecs
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import DataError
from model.folder import shown

METADATA = "metadata.jsonl"
ONE_LINE_EACH = 'write one line {"file_name": ..., "text": ...} for each image'
KEYS = ("file_name", "text", "group", "white")
WHITES = range(256, 65_536)  # an image with 8 bits needs no white; one with more than 16 cannot be read
NO_OBJECT = "is not a JSON object with a file_name"


@dataclass(frozen=True)
class Item:
    """One captioned image of a folder."""

    file: str
    text: str
    group: str
    white: int | None = None
    """Value of white in a grey image with more than 8 bits; None: the largest that the file allows."""


class _UnusableError(Exception):
    """A line cannot be used; the message says why."""


class _Row(dict[str, Any]):
    """A JSON object, and the keys that it has more than once."""

    repeated: tuple[str, ...] = ()


def items_of(folder: Path, names: Iterable[str], metadata: bytes) -> tuple[list[Item], dict[str, str]]:
    """Return the items that a metadata file lists, sorted by file, and the problem of each line and file that cannot be used.

    Args:
        folder: the data folder; only for messages.
        names: every file below it. An item's file may be missing.
        metadata: content of its metadata file.

    Raises:
        DataError: the encoding is not known, or no line is usable.
    """
    there = _Names(names)
    items: list[Item] = []
    bad: dict[str, str] = {}
    seen: set[str] = set()
    forms: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(_lines(folder, metadata), start=1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            name = there.found(Path(row["file_name"]).as_posix())  # "./a.png" is "a.png"
            if name in seen:
                raise _UnusableError(f"names {name} a second time")
        except _UnusableError as problem:
            bad[f"{METADATA}:{number}"] = str(problem)
            continue
        seen.add(name)
        try:
            items.append(_item(name, row, forms, number))
        except _UnusableError as problem:
            bad[name] = str(problem)
    bad |= {name: f"is not named in {METADATA}" for name in there.names if name not in seen and name != METADATA}
    if not items:
        first = f"; the first that cannot be used: {shown(' '.join(next(iter(bad.items()))))}" if bad else ""
        raise DataError(f"{shown(folder / METADATA)} names no usable image; {ONE_LINE_EACH}{first}")
    return sorted(items, key=lambda item: item.file), bad


def missing(items: Iterable[Item], names: Iterable[str]) -> dict[str, str]:
    """Say of each item without a file that it is missing, and which file is there that may be meant."""
    there = {*names}
    lacking = [item.file for item in items if item.file not in there]
    alike = {name.casefold(): name for name in sorted(there, reverse=True)} if lacking else {}
    meant = {file: alike.get(file.replace("\\", "/").casefold()) for file in lacking}
    return {
        file: f"is missing; if {near} is meant, write its name exactly so" if near else "is missing"
        for file, near in meant.items()
    }


class _Names:
    """The files of a folder, found by name in any Unicode form: some systems store `ä` as two characters."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._exact = {*self.names}
        composed = {name: unicodedata.normalize("NFC", name) for name in self.names if not name.isascii()}
        often = Counter(composed.values())
        self._composed = {form: name for name, form in composed.items() if often[form] == 1}

    def found(self, name: str) -> str:
        """Return the name of a file as it is stored; a name that no file has stays as it is."""
        if name in self._exact or name.isascii():
            return name
        return self._composed.get(unicodedata.normalize("NFC", name), name)


def _lines(folder: Path, metadata: bytes) -> list[bytes]:
    """Split a metadata file into lines of UTF-8.

    Raises:
        DataError: it seems to be UTF-16 or UTF-32, but is not.
    """
    encoding = json.detect_encoding(metadata)
    if not encoding.startswith("utf-8"):
        try:
            metadata = metadata.decode(encoding).encode()
        except UnicodeError:
            raise DataError(
                f"{shown(folder / METADATA)} is neither UTF-8 nor whole {encoding.upper()}; save it as UTF-8"
            ) from None
    return metadata.splitlines()


def _row(line: bytes) -> _Row:
    """Parse one line.

    Raises:
        _UnusableError: it is not a JSON object with a usable file_name.
    """
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_object)
        if not isinstance(row, _Row):
            raise TypeError(row)
        _check_keys(row, KEYS[:1])
        row["file_name"].encode()
    except UnicodeDecodeError:
        raise _UnusableError("is not UTF-8; save the file in that encoding") from None
    except UnicodeEncodeError:
        raise _UnusableError("has a file_name that is not valid Unicode text") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _UnusableError(NO_OBJECT) from None
    return row


def _object(pairs: list[tuple[str, Any]]) -> _Row:
    row = _Row(pairs)
    if len(row) < len(pairs):
        row.repeated = tuple(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
    return row


def _check_keys(row: _Row, keys: Container[str]) -> None:
    """Refuse a line of which a reader could not tell what these keys mean in it.

    Raises:
        _UnusableError: it has one of the keys twice, or written in another way.
    """
    for key in row.repeated:
        if key in keys:
            raise _UnusableError(f"has the key {key} more than once; keep one of them")
    for key in row:
        meant = key.strip().casefold()
        if meant in keys and key != meant:
            raise _UnusableError(f"has the key {key!r}; write it as {meant}")


def _item(name: str, row: _Row, forms: dict[str, tuple[str, int]], number: int) -> Item:
    """Build the item of one line.

    Args:
        name: its file.
        row: the line.
        forms: the groups of earlier lines, by their composed Unicode form, with the line of each.
        number: number of the line.

    Raises:
        _UnusableError: a value of the line cannot be used.
    """
    _check_keys(row, KEYS[1:])
    text, white = row.get("text"), row.get("white")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _UnusableError("lies outside the folder")
    if not isinstance(text, str):
        raise _UnusableError("has no caption (text)")
    if white is not None and (type(white) is not int or white not in WHITES):
        raise _UnusableError(f"has a white that is not a whole number from {WHITES[0]} to {WHITES[-1]}")
    group = _group(row.get("group"))
    if group is not None and not group.isascii():
        form, first = forms.setdefault(unicodedata.normalize("NFC", group), (group, number))
        if form != group:
            raise _UnusableError(f"has the group {group} in another Unicode form than line {first}; write both alike")
    return Item(name, text, name if group is None else group, white)


def _group(value: Any) -> str | None:
    """Return the name of a group; None: there is none.

    Raises:
        _UnusableError: the value is neither text nor a number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _UnusableError("has a group that is neither text nor a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise _UnusableError("has a group that is not a finite number; leave group out, or name it")
    if isinstance(value, str) and not value.strip():
        raise _UnusableError("has an empty group; leave group out, or name it")
    return str(value)
