"""Progress of long steps: a step reports it, and listeners show it (bars on stderr, Prefect's page).

A step reports numbers with `advance`, and says in a sentence what it begins or has found with `say`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Listener = Callable[[str, int, int], None]
"""Called with the step's label, how much is done, and how much there is to do in all."""

_listeners: list[Listener] = []
_hearers: list[Callable[[str], None]] = []


@dataclass
class _Pace:
    """How far a step was when it was first heard of, and when; and what it told last."""

    begun: float
    first: int
    remark: str = ""


_paces: dict[str, _Pace] = {}  # of the steps that are not done


def advance(label: str, done: int, total: int, remark: str = "") -> None:
    """Tell all listeners how far the step with this label is.

    Args:
        label: of the step.
        done: how much is done.
        total: how much there is to do in all.
        remark: what the step tells besides, such as its loss.
    """
    pace = _paces.setdefault(label, _Pace(time.monotonic(), done))
    pace.remark = remark or pace.remark
    for listener in [*_listeners]:
        listener(label, done, total)
    if done >= total:
        _paces.pop(label, None)


def say(sentence: str) -> None:
    """Tell all hearers in a sentence what begins now, or what was found."""
    for hearer in [*_hearers]:
        hearer(sentence)


def remark_of(label: str) -> str:
    """Return what a step told last besides its numbers; empty: nothing."""
    pace = _paces.get(label)
    return pace.remark if pace else ""


def time_left(label: str, done: int, total: int, now: float | None = None) -> float | None:
    """Estimate the seconds that a step still needs from its pace in this process; None: it cannot be known yet."""
    pace = _paces.get(label)
    if pace is None or done <= pace.first or done >= total:
        return None
    return ((time.monotonic() if now is None else now) - pace.begun) / (done - pace.first) * (total - done)


def described(label: str, done: int, total: int) -> str:
    """Describe how far a step is: `train surfaces/I/full: 120 of 400, 1:20 left, loss 0.31`."""
    left = time_left(label, done, total)
    told = [f"{done} of {total}", f"{clock(left)} left" if left is not None else "", remark_of(label)]
    return f"{label}: {', '.join(part for part in told if part)}"


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, or as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call a listener with the progress that is reported within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def hearing(hearer: Callable[[str], None]) -> Iterator[None]:
    """Call a function with the sentences that are said within the block."""
    _hearers.append(hearer)
    try:
        yield
    finally:
        _hearers.remove(hearer)
