"""Show the progress of long steps on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.progress import Listener, clock, described, hearing, listening, remark_of, time_left
from ota.errors import printable


@contextmanager
def bars() -> Iterator[None]:
    """Show the progress that is reported within the block: moving bars on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with listening(_lines()), hearing(_sentence):
            yield
        return
    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[told]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        known: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in known:
                known[label] = progress.add_task(escape(printable(label)), total=total, told="")
            left = time_left(label, done, total)
            told = ", ".join(part for part in (f"{clock(left)} left" if left is not None else "", remark_of(label)) if part)
            progress.update(known[label], completed=done, total=total, told=escape(printable(told)))
            if done >= total:
                progress.remove_task(known.pop(label))

        def tell(sentence: str) -> None:
            progress.console.print(f"  {printable(sentence, limit=2000)}", markup=False, highlight=False)

        with listening(show), hearing(tell):
            yield


def _sentence(sentence: str) -> None:
    print(f"  {printable(sentence, limit=2000)}", file=sys.stderr, flush=True)  # noqa: T201


def _lines(every: float = 15.0) -> Listener:
    """Make a listener that prints a line when a step begins or ends, and about every `every` seconds in between."""
    spoken: dict[str, float] = {}

    def show(label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label not in spoken or done >= total or now - spoken[label] >= every:
            print(f"  {printable(described(label, done, total), limit=2000)}", file=sys.stderr, flush=True)  # noqa: T201
            spoken[label] = now
        if done >= total:
            spoken.pop(label, None)

    return show
