"""Note what runs in a workspace, and how far it is; read it from another process.

A lock says whether something runs: the operating system releases it, however its process ends. A small file beside the lock says
what it does. So a note that a killed process left is never shown.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from flows import progress
from model.scorecard import Frozen

PARTS = {"retraining": "retraining", "release": "release", "serving": "ferry serve"}  # locks of a workspace, and their names
EVERY = 1.0  # seconds between two notes
MAX_NOTE = 8 * 1024  # bytes


class Running(Frozen):
    """Something that runs now."""

    part: str = Field(description="lock of the workspace that it holds: retraining, release or serving")
    pid: int = Field(default=0, description="number of its process; 0: not known")
    what: str = Field(default="", max_length=200, description="what it works on")
    began: datetime | None = None
    doing: str = Field(default="", max_length=500, description="the present step, and how far it is")


def place(work: Path, part: str) -> Path:
    """Name the file with the note about a part."""
    return work / f"{part}.running.json"


@contextmanager
def noted(work: Path, part: str, what: str) -> Iterator[None]:
    """Note in a file what runs in the block, and its progress; if the file cannot be written, nothing else changes."""
    path, began, last = place(work, part), datetime.now(UTC).replace(microsecond=0), 0.0

    def note(doing: str) -> None:
        body = Running(part=part, pid=os.getpid(), what=what[:200], began=began, doing=doing[:500])
        with suppress(OSError):
            fresh = path.with_suffix(".tmp")
            fresh.write_text(body.model_dump_json())
            fresh.replace(path)

    def show(label: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY or done >= total:
            last = time.monotonic()
            note(progress.described(label, done, total))

    note("")
    try:
        with progress.listening(show), progress.hearing(note):
            yield
    finally:
        with suppress(OSError):
            path.unlink()


def running(work: Path) -> list[Running]:
    """List what holds a lock of the workspace, with its note."""
    return [_note(work, part) for part in PARTS if is_held(work, part)]


def is_held(work: Path, part: str) -> bool:
    """Check whether a process holds a lock of the workspace.

    A shared lock is tried for an instant: it is refused if a process holds the lock. A command that begins at that instant waits
    for `flows.workspace.GLANCE`, so it does not take the look for another command.
    """
    with suppress(FileNotFoundError), (work / f"{part}.lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _note(work: Path, part: str) -> Running:
    with suppress(OSError, ValidationError, ValueError):
        with place(work, part).open("rb") as file:
            found: dict[str, Any] = json.loads(file.read(MAX_NOTE))
        return Running.model_validate(found | {"part": part})
    return Running(part=part)
