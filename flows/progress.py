"""Progress of long steps: a step reports it, and listeners show it (bars on stderr, Prefect's page)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
