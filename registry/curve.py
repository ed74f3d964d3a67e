"""Which size of an update is taken: rules without I/O.

A retraining makes one master. From it, updates of many sizes can be made: the noise level decides, and it is chosen by encoded
bytes alone, so no held-out image takes part in that choice. What is tested on held-out images is which of these sizes may be taken.

The sizes are fixed by the budget, and by the bytes of the finest update, before anything is measured on held-out images. They are
tested from the largest to the smallest, and the first that fails ends the sequence; the smallest that passed is taken. Such a fixed
sequence needs no share of alpha for each test (Maurer, Hothorn and Lehmacher 1995; Wiens 2003): for the sequence to reach a size
that must not be taken, the first such size has to pass its own test by luck, and that has the chance alpha.

A size passes if its update is superior on the new data, non-inferior on the old (the gate), and keeps a share of the gain. All
three must pass, each at the level alpha (an intersection-union test, Berger 1982). None of the three looks at what the others found,
so the order in which they are computed changes nothing: first the share kept, which is cheap, for all sizes in order; then the
gate, which draws images, for those that passed, in the same order, and for `GATED` sizes at most. That limit and the first size
that the gate sees depend on the budget alone.

Without a budget there is one size. The method's usual level is only the first choice for it: what an update leaves out is part of the
next one, so the bytes of updates at one level grow from release to release. `hold` keeps them near those of the first updates.

    >>> passed = in_order(rooms(65536 - 16048, finest=400_000), keeps_enough)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, takewhile
from typing import Literal, TypeVar

from pydantic import Field

from model.config import PrecisionName
from model.scorecard import Frozen, Kept, Sha256

LEAST = 1024  # bytes of weights below which no update is tried
GATED = 3  # sizes that the gate judges at most
TRIES = 12  # updates that are encoded at most to find the level of one size
HELD = 1.15  # times the bytes of an early update: most that a later one without a budget takes
EARLY = 3  # updates among which the one that measures later ones is looked for
SMALL = 4  # an early update of less than this part of the largest of them is no measure: its delivery was a small one
COARSER = 4.0  # times the usual level: coarsest that is tried without a budget
NEAR = 0.05  # share of a size that an update may be smaller than it
Start = Literal["master", "fielded"]
T = TypeVar("T")


class Point(Frozen):
    """One size of the curve."""

    limit: int = Field(description="most bytes that a device may fetch, everything included")
    bytes: int = Field(description="bytes that a device fetches")
    noise: float = Field(description="noise level of the update")
    kept: Kept | None = Field(
        default=None, description="share of the gain that it keeps; null: not tested, a larger one had failed"
    )
    outcome: Literal["passed", "failed", "not tested"] = Field(default="not tested", description="of the test of the share kept")
    gate: str | None = Field(
        default=None, exclude_if=lambda value: value is None, description="the gate's answer; null: not asked"
    )


class Setting(Frozen):
    """What updates without a budget have in common, besides the method, if their bytes can be compared."""

    network: Sha256 = Field(description="hash of the network's shape")
    precision: PrecisionName = Field(description="how devices store the weights")
    form: int = Field(description="version of the delta format in which the bytes were counted")
    level: float = Field(description="level that was asked for; the update has a coarser one where that held its bytes")


class Update(Frozen):
    """How an update was made, and what it costs and keeps."""

    method: str = Field(description="row of the table of methods")
    start: Start = Field(description="weights from which training started: a master, or what devices have")
    of_full: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="of a student: training started from full, because there was no student before, or the gate had refused what came from it",
    )
    why_fielded: str | None = Field(
        default=None, exclude_if=lambda value: value is None, description="why training did not start from a master; null: it did"
    )
    master: Sha256 = Field(description="hash of the weights that were trained, and are not fielded")
    noise: float = Field(description="noise level of the update")
    polished: int | None = Field(
        default=None, exclude_if=lambda value: value is None, description="training steps on the rounded update; null: none"
    )
    bytes: int = Field(description="bytes that a device fetches, everything included")
    fixed: int = Field(description="part of bytes that is not weights: signed metadata, golden outputs, tables")
    beside: int | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="of a student: part of bytes that is weights of others in the same update, of full and of other students; null: it is full",
    )
    unlimited: int | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="bytes of the finest update that the method makes; null: not encoded",
    )
    budget: int | None = Field(default=None, exclude_if=lambda value: value is None, description="most bytes; null: no budget")
    setting: Setting | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="what it has in common with updates whose bytes can be compared; null: it has a budget, or a method without sizes",
    )
    held: int | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="bytes of weights to which it was held because of the first updates of this setting; null: it is the first, or has a budget",
    )
    usual: int | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="of one that was made coarser: bytes that its weights would take at the level that was asked for",
    )
    keep: float | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="share of the gain that had to be kept; null: no budget, or a student, whose gain is not measured",
    )
    kept: Kept | None = Field(default=None, description="share of the gain that it keeps; null: it was not measured")
    curve: list[Point] = Field(
        default=[], exclude_if=lambda value: not value, description="the sizes, the largest first; empty: no budget"
    )

    @property
    def weights(self) -> int:
        """Bytes of its weights."""
        return self.bytes - self.fixed - (self.beside or 0)

    @property
    def at_the_usual_level(self) -> int:
        """Bytes that its weights take, or would take, at the level that was asked for."""
        return self.weights if self.usual is None else self.usual

    @property
    def is_coarser(self) -> bool:
        """Whether it has a coarser level than the one that was asked for, so that its bytes do not grow."""
        return self.setting is not None and self.noise > self.setting.level


def smallest_budget(fixed: int) -> int:
    """Return the smallest budget that an update can keep, in whole KiB."""
    return -(-(fixed + LEAST) // 1024) * 1024


def rooms(room: int, finest: int) -> list[int]:
    """List the sizes of weights that are tried, the largest first.

    The finest update comes first. Then come doublings of what the budget leaves, that itself, and below it steps of √2.

    Args:
        room: bytes that the budget leaves for weights.
        finest: bytes of the finest update that the method makes.
    """
    above = [room * 2**n for n in range(1, 64)]
    below = [int(room / 2 ** (n / 2)) for n in range(128)]
    return [finest, *(size for size in [*reversed(above), *below] if LEAST <= size < finest)]


def in_order(items: Iterable[T], passes: Callable[[T], bool]) -> list[T]:
    """Test items in their order, and stop at the first that fails; return those that passed."""
    return [*takewhile(passes, items)]


def level_for(size_of: Callable[[float], int], limit: int, low: float, high: float, known: dict[float, int]) -> float | None:
    """Find the smallest noise level whose update takes at most `limit` bytes.

    It bisects the logarithm of the level, and where both ends are known, interpolates the logarithm of the bytes. It stops when the
    update is at most `NEAR` smaller than the limit, or after `TRIES` updates.

    Args:
        size_of: encodes the update of a level, and returns its bytes; they fall as the level rises.
        limit: bytes.
        low: finest level.
        high: coarsest level.
        known: bytes of levels that were encoded before; what is encoded here is added.

    Returns:
        the level; None: the coarsest update is larger than the limit.
    """

    def size(level: float) -> int:
        if level not in known:
            known[level] = size_of(level)
        return known[level]

    fits = min((level for level, found in known.items() if found <= limit), default=high)
    if size(fits) > limit:
        return None
    large = max((level for level, found in known.items() if found > limit and level < fits), default=low)
    if size(large) <= limit:
        return large
    for tried in range(TRIES):
        if size(fits) >= (1 - NEAR) * limit or fits / large < 1.01:
            break
        level = math.sqrt(large * fits)
        if tried % 2 == 0 and size(fits) > 0:  # every second try bisects, so that a bent curve cannot keep the search at one end
            part = math.log(size(large) / ((1 - NEAR / 2) * limit)) / math.log(size(large) / size(fits))
            level = large * (fits / large) ** min(0.95, max(0.05, part))
        if size(level) <= limit:
            fits = level
        else:
            large = level
    return fits


def early(updates: Iterable[Update], method: str, setting: Setting) -> list[int]:
    """List the bytes of the first updates of a method and setting at the usual level; empty: the next one is the first.

    Args:
        updates: those of the champions so far, the oldest first.
        method: row of the table of methods.
        setting: without a budget.
    """
    same = (made.at_the_usual_level for made in updates if (made.method, made.setting) == (method, setting))
    return [*islice(same, EARLY)]


def held_to(earlier: Sequence[int], own: int) -> int | None:
    """Return the most bytes that the weights of an update without a budget may take; None: it is the first.

    The measure is the first update, unless that was a small one: one that takes less than a quarter of the largest of the first three
    is passed over. All are compared at the usual level, and this update is one of them. So a tiny delivery does not hold a line to its
    bytes for good.

    Args:
        earlier: bytes of earlier updates at the usual level, the oldest first.
        own: bytes of this one at the usual level.
    """
    if not earlier:
        return None
    first = [*earlier, own][:EARLY]
    return max(LEAST, int(HELD * next(size for size in first if SMALL * size >= max(first))))


def hold(
    size_of: Callable[[float], int], usual: float, coarsest: float, earlier: Sequence[int], known: dict[float, int], spare: float = 0.0
) -> tuple[float, int | None]:  # fmt: skip
    """Choose the level of an update without a budget, from encoded bytes alone.

    Args:
        size_of: encodes the update of a level, and returns its bytes; they fall as the level rises.
        usual: finest level.
        coarsest: level of the method.
        earlier: bytes of earlier updates at the usual level, the oldest first.
        known: bytes of levels that were encoded before; what is encoded here is added.
        spare: as for `held_level`.

    Returns:
        the level, and the bytes to which it is held; None: it is the first.
    """
    if not earlier:
        return usual, None
    if usual not in known:
        known[usual] = size_of(usual)
    limit = held_to(earlier, known[usual])
    return held_level(size_of, usual, min(coarsest, COARSER * usual), limit, known, spare), limit


def held_level(
    size_of: Callable[[float], int], usual: float, high: float, limit: int | None, known: dict[float, int], spare: float = 0.0
) -> float:  # fmt: skip
    """Choose the usual level, or a coarser one that holds an update to a limit.

    Args:
        size_of: encodes the update of a level, and returns its bytes; they fall as the level rises.
        usual: finest level.
        high: coarsest level that is tried.
        limit: bytes; None: there is none.
        known: bytes of levels that were encoded before; what is encoded here is added.
        spare: share of the limit that a coarser update leaves free, because polishing changes its bytes a little.

    Returns:
        the level; `high` where even that takes more.
    """
    if limit is None or usual >= high:
        return usual
    if usual not in known:
        known[usual] = size_of(usual)
    if known[usual] <= limit:
        return usual
    found = level_for(size_of, int((1 - spare) * limit), usual, high, known)
    return high if found is None else found
