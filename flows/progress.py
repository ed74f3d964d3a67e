"""Progress of long steps: a step reports it, and listeners show it (bars on stderr, Prefect's page)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Listener = Callable[[str, int, int], None]
"""Called with the step's label, how much is done, and how much there is to do in all."""

_listeners: list[Listener] = []


def advance(label: str, done: int, total: int) -> None:
    """Tell all listeners how far the step with this label is."""
    for listener in _listeners:
        listener(label, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call a listener with the progress that is reported within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def bars() -> Iterator[None]:
    """Show progress on stderr: moving bars on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with listening(_lines()):
            yield
        return
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        known: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
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
            print(f"  {label}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201
            spoken[label] = now
        if done >= total:
            spoken.pop(label, None)

    return show
