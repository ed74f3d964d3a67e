"""Show the progress of long steps on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.progress import Listener, listening
from ota.errors import printable


@contextmanager
def bars() -> Iterator[None]:
    """Show the progress that is reported within the block: moving bars on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with listening(_lines()):
            yield
        return
    columns = (TextColumn("{task.description:<28}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        known: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
            label = printable(label)
            if label not in known:
                known[label] = progress.add_task(label, total=total)
            progress.update(known[label], completed=done, total=total)
            if done >= total:
                progress.remove_task(known.pop(label))

        with listening(show):
            yield


def _lines(every: float = 15.0) -> Listener:
    """Make a listener that prints a line when a step begins or ends, and about every `every` seconds in between."""
    spoken: dict[str, float] = {}

    def show(label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label not in spoken or done >= total or now - spoken[label] >= every:
            print(f"  {printable(label)}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201
            spoken[label] = now
        if done >= total:
            spoken.pop(label, None)

    return show
