"""Old reports leave the database for compressed files, and none is lost on the way.

A file holds a line of JSON for each report, with the line as the device signed it. It is complete, on the disk and read back before the
rows are deleted. A kill between the two leaves the reports in both places; the next call then finds the same rows, and the same file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, delete, insert, or_, select, tuple_

from ota import output
from ota.errors import OperatorError
from ota.fleet.schema import archived, last, reading, reports, writing
from ota.fleet.store import Fleet

IN_A_FILE: Final = 20_000  # reports
AT_ONCE: Final = 500  # rows that one statement deletes
ENDING: Final = ".jsonl.gz"


@dataclass
class Archived:
    """What was moved to files."""

    reports: int = 0
    files: list[Path] = field(default_factory=list)


def archive(fleet: Fleet, folder: Path, before: int) -> Archived:
    """Move the reports that came before a time to files in a folder; the last report, event and heartbeat of each device stay.

    Args:
        fleet: whose reports.
        folder: is made if it is missing.
        before: seconds since 1970 by the factory's clock.

    Raises:
        OperatorError: a file cannot be written or read back; then its reports stay in the database.
        TransferError: the database cannot be used.
    """
    done = Archived()
    while rows := _old(fleet, before):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OperatorError(f"{folder} cannot be made: {error.strerror}; make room or check the permissions") from error
        text = b"".join(json.dumps(row._asdict(), sort_keys=True).encode() + b"\n" for row in rows)
        # The name is that of the content: after a kill, the same reports go to the same file.
        path = folder / f"{rows[0].received_at}-{hashlib.sha256(text).hexdigest()[:16]}{ENDING}"
        with output.fresh(path, mode=0o600) as file:
            file.write(gzip.compress(text, mtime=0))
        if _lines(path) != text:
            raise OperatorError(f"{path} does not hold what was written to it; check the disk; the reports stay in the database")
        _remove(fleet, rows)
        done.reports += len(rows)
        done.files.append(path)
    return done


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the archived reports, file by file: device, number, received_at, event, manifest, and envelope, or body of version 0.2.

    Raises:
        OperatorError: a file is damaged.
    """
    for path in sorted(folder.glob(f"*{ENDING}")):
        for line in _lines(path).splitlines():
            yield json.loads(line)


def _lines(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise OperatorError(f"{path} cannot be read back: {error}; restore it from a backup") from error


def _old(fleet: Fleet, before: int) -> Sequence[Row[Any]]:
    """Read the next reports to archive, in the order of their arrival."""
    named = or_(last.c.number == reports.c.number, last.c.heartbeat == reports.c.number, last.c.event_number == reports.c.number)
    stays = select(last.c.device).where(last.c.device == reports.c.device, named).exists()
    query = select(reports).where(reports.c.received_at < before, ~stays)
    query = query.order_by(reports.c.received_at, reports.c.device, reports.c.number).limit(IN_A_FILE)
    with reading(fleet.engine) as connection:
        return connection.execute(query).all()


def _remove(fleet: Fleet, rows: Sequence[Row[Any]]) -> None:
    """Delete rows that are in a file, and note their numbers, so that a copy that comes late is known."""
    with writing(fleet.engine) as connection:
        for first in range(0, len(rows), AT_ONCE):
            names = [(row.device, row.number) for row in rows[first : first + AT_ONCE]]
            connection.execute(delete(reports).where(tuple_(reports.c.device, reports.c.number).in_(names)))
        numbers: dict[str, list[int]] = {}
        for row in rows:
            numbers.setdefault(row.device, []).append(row.number)
        for device, added in numbers.items():
            _note(connection, device, added)


def _note(connection: Connection, device: str, added: list[int]) -> None:
    """Note archived numbers of a device as ranges, of which few are needed: numbers rise by one."""
    mine = archived.c.device == device
    low, high = min(added) - 1, max(added) + 1
    touched = and_(mine, archived.c.last >= low, archived.c.first <= high)
    ranges = [(row.first, row.last) for row in connection.execute(select(archived).where(touched))]
    connection.execute(delete(archived).where(touched))
    made: list[tuple[int, int]] = []
    for first, end in sorted([*ranges, *((number, number) for number in added)]):
        if made and first <= made[-1][1] + 1:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((first, end))
    connection.execute(insert(archived), [{"device": device, "first": first, "last": end} for first, end in made])
