"""Forecast how large a delta would be without building it: small records are built, large ones are sampled.

A forecast has bounds, because a sample does not show everything: how much zstd's slowest level gains, how much tensors of one
shape differ. The bounds come from experience with public models and other files (tests/bench/results/delta.md); they are not
proved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import bsdiff4
import numpy as np
import numpy.typing as npt

from ota.delta import numbers, streams
from ota.delta.blocks import WINDOWS, densest
from ota.delta.describe import LEAST_MOVED, SCALE_COST, Description, alone, describe, sides
from ota.delta.encode import FAR, LIKE_NUMBERS, encode_group, encode_small, header_of
from ota.delta.format import MAX_CHUNK, RECORD
from ota.delta.numbers import KINDS
from ota.delta.plain import (
    FAST_LEVEL_BELOW,
    LEAST_KNOWN,
    LEAST_PART,
    LEVELS,
    UNCUT_BELOW,
    compress,
    elsewhere,
    parts_of,
    quick_size,
    size_of,
)
from ota.delta.plan import LEAST_PLAIN, File, Pair, Piece, is_plain, is_update, open_file, plan
from ota.limits import KiB

CLOSE = 1.3  # factor by which a forecast may be wrong and still be given as one number
EXACT = 256 * KiB  # bytes of a file's smallest records that are built
EXACT_PIECES = 96  # pieces of these records, at most: each takes time of its own
ONE_IN = 8  # of so many similar pieces, one is examined
LEAST_SEEN = 2  # similar pieces that are examined at least, if there are so many
LOOKED = 128 * KiB  # bytes of a large piece of numbers that are enough to estimate its size
LEAST_ROWS = 64  # rows that moved and are examined in such a piece
ALL = 0.97  # share of an earlier piece's blocks; a piece with so many found elsewhere is taken to cost the same for each byte
SEGMENT_COST = 5.0  # bytes that a segment's row in the record's table costs
RECORD_COST = 400.0  # bytes that a record costs besides its numbers
SPARSE_LOSS, DENSE_LOSS = 0.03, 0.005  # shares by which streams exceed their entropy, where few and where many numbers move
CROWDED = 8 * KiB  # mean bytes of a record's pieces; below this the record is examined as a whole
UNLIKE = 0.15  # share by which similar things differ, if too few were examined to measure it
ENOUGH = 4  # things that are enough to measure it
SPOT, SPOTS = 16 * KiB, 8  # bytes of a spot, and how many spots of a piece without numbers are examined
APART = 128 * KiB  # bytes from one spot to the next, if spots are to show what kind of numbers these are
REACH = 64 * KiB  # bytes of the old file around a spot that zstd may refer to

Bounds = npt.NDArray[np.float64]  # low, likely, high: bytes
Thing = TypeVar("Thing")
HASH = 32  # bytes


@dataclass(frozen=True)
class Forecast:
    """The estimated size of a delta, in bytes."""

    bytes: int
    low: int
    """The delta is unlikely to be smaller."""
    high: int
    """The delta is unlikely to be larger."""

    @property
    def close(self) -> bool:
        """Whether the bounds are so close that the estimate alone says enough."""
        return self.bytes <= CLOSE * self.low and self.high <= CLOSE * self.bytes


def forecast(pairs: Sequence[Pair]) -> Forecast:
    """Estimate how large `encode.build` would make a delta; see there for arguments and errors."""
    total, variance = _known(len(header_of(pairs, "0" * 64, "1" * 64))), 0.0
    total[0] -= HASH  # of two files that are equal, the header holds one hash
    for pair in pairs:
        new, old = open_file(pair.new), open_file(pair.old) if pair.old else None
        found = (_small(new, old), 0.0) if pair.whole else _records(plan(pair), new, old)
        total, variance = total + found[0], variance + found[1]
    low, likely, high = (
        max(0, int(value)) for value in np.round(total * (0.98, 1, 1.02) + 2 * variance**0.5 * np.array((-1, 0, 1)))
    )
    return Forecast(likely, low, high)


def _known(size: float) -> Bounds:
    found: Bounds = np.full(3, size, np.float64)
    return found


# A small file


def _small(new: File, old: File | None) -> Bounds:
    """Estimate a file that is encoded as a whole: try the ways that take little time, and bound what the others may save."""
    if max(new.size, old.size if old else 0) <= EXACT:
        return _known(size_of(encode_small(new, old)) if new.size else 0)
    made, known = new[: new.size].tobytes(), old[: old.size].tobytes() if old else b""
    if made == known:
        return _known(RECORD.size)
    beside = len(known) >= LEAST_KNOWN
    packed = len(streams.compress_with_prefix(made, known, LEVELS[1]) if beside else compress(made, LEVELS[1])) + RECORD.size
    ways = [_harder(made, old, packed)]
    if known:
        ways.append(_known(len(bsdiff4.diff(known, made)) + RECORD.size))
    best: Bounds = np.min(ways, axis=0)
    if old and len(made) >= LEAST_PLAIN and best[1] > LIKE_NUMBERS * len(made):
        best = np.minimum(best, _plain(Piece(0, len(made), KINDS["bytes"], 0, 0, False), new, old))
    return best


# A file of many records


def _records(groups: Sequence[list[Piece]], new: File, old: File | None) -> tuple[Bounds, float]:
    """Estimate what records take, and the variance that comes from examining only some of them."""
    total, variance = np.zeros(3), 0.0
    alike: dict[tuple[object, ...], list[tuple[Piece, float]]] = {}
    crowded: list[list[Piece]] = []
    spare, pieces_left = EXACT, EXACT_PIECES
    for group in sorted(groups, key=_length):
        first = group[0]
        if is_update(group):
            total += _made(group, new, old)
        elif len(group) == 1 and first.same and first.length <= MAX_CHUNK:
            total += RECORD.size
        elif _length(group) <= spare and len(group) <= pieces_left:
            total += _made(group, new, old)
            spare, pieces_left = spare - _length(group), pieces_left - len(group)
        elif len(group) == 1 and is_plain(first):
            total += _plain(first, new, old)
        elif _length(group) < CROWDED * len(group):
            crowded.append(group)
        else:
            total += RECORD.size + SEGMENT_COST * sum(piece.same for piece in group)
            own = RECORD_COST * sum(not piece.same for piece in group) ** -1
            for piece in group:
                if not piece.same:
                    alike.setdefault((piece.kind.name, piece.row, piece.length, piece.old is None), []).append((piece, own))
    for found in (
        *(_sampled([(row[0].changed or row[0].length, row) for row in rows], _Numbers(new, old)) for rows in alike.values()),
        _sampled([(_moved(group), group) for group in crowded], lambda group: (_made(group, new, old), True)),
    ):
        total, variance = total + found[0], variance + found[1]
    return total, variance


def _length(group: Sequence[Piece]) -> int:
    return sum(piece.length for piece in group)


def _moved(group: Sequence[Piece]) -> int:
    return sum(piece.length if piece.old is None else piece.changed for piece in group)


def _made(group: list[Piece], new: File, old: File | None) -> Bounds:
    return _known(size_of(encode_group(group, new, old)))


def _sampled(all_of: Sequence[tuple[int, Thing]], look: Callable[[Thing], tuple[Bounds, bool]]) -> tuple[Bounds, float]:
    """Estimate what things take together, and the variance of that, by examining one of several that weigh about the same.

    If the examined thing stands for no others, all of them are examined. Neighbours in weight show how much such things differ;
    where too few were examined, `UNLIKE` is assumed.
    """
    runs: list[list[tuple[int, Thing]]] = []
    most = min(ONE_IN, max(1, len(all_of) // LEAST_SEEN))
    for weight, thing in sorted(all_of, key=lambda row: -row[0]):
        if not runs or len(runs[-1]) == most or weight < runs[-1][0][0] / 2:
            runs.append([])
        runs[-1].append((weight, thing))
    total, looked = np.zeros(3), []
    for run in runs:
        weight, thing = run[len(run) // 2]
        found, typical = look(thing)
        if typical:
            stands_for = sum(w for w, _ in run)
            total += found * stands_for / weight
            looked.append((stands_for, found[1] / weight, 1 - 1 / len(run)))
        else:
            total += found + sum(look(other)[0] for _, other in run if other is not thing)
    if not looked:
        return total, 0.0
    weights, rates, missed = np.array(looked).T
    unlike = UNLIKE**2
    if len(rates) >= ENOUGH:
        steps = np.diff(rates) * weights[1:]
        unlike = float(np.clip((steps**2).sum() / 2 / ((rates * weights) ** 2).sum(), unlike / 4, 4 * unlike))
    return total, unlike * float(((rates * weights) ** 2 * missed).sum())


# Numbers


class _Numbers:
    """Estimates how many bytes pieces of numbers of one kind and shape take."""

    def __init__(self, new: File, old: File | None) -> None:
        self._new, self._old = new, old
        self._there: Bounds | None = None  # bytes of delta for each byte of a piece that came from elsewhere in the old file
        self._hits = 0  # blocks of that piece that were found there

    def __call__(self, row: tuple[Piece, float]) -> tuple[Bounds, bool]:
        """Estimate a piece and its share of a record; tell whether it stands for others: not if it comes from elsewhere."""
        piece, own = row
        found = self._moved(piece, own)
        if found[1] <= FAR * piece.length or not self._old:
            return found, True
        made = self._new[piece.start : piece.start + piece.length]
        windows, hits = min(WINDOWS, piece.length // (2 * self._old.blocks.block)), len(self._old.blocks.places(made))
        if not windows or hits <= windows // 2:
            return found, True
        if self._there is None or hits < ALL * self._hits:
            self._there = _elsewhere(made.tobytes(), self._old) / piece.length
            self._hits = hits
        likely = self._there * piece.length
        there = np.minimum(found, likely * (0.7, 1, 1.5) + (0, 0, 2 * RECORD.size))
        if windows < WINDOWS:  # a small piece shares its record with neighbours, which may not come from elsewhere
            there[2] = found[2]
        return there, False

    def _moved(self, piece: Piece, own: float) -> Bounds:
        """Estimate a piece by how its numbers moved; examine only some rows of a large piece, but more of them if few moved."""
        after, before = self._new[piece.start : piece.start + piece.length], np.zeros(piece.length, np.uint8)
        if self._old and piece.old is not None:
            before = self._old[piece.old : piece.old + piece.length]
        row = piece.row * piece.kind.width // (2 if piece.kind.packed else 1)  # bytes
        step = row if row >= 1024 else max(1, 1024 // max(row, 1)) * max(row, piece.kind.width)
        rows = slice(0, piece.length // step * step)
        moved = (after[rows] != before[rows]).reshape(-1, step).any(axis=1)
        apart = max(1, min(piece.length // LOOKED, int(np.count_nonzero(moved)) // LEAST_ROWS))
        if apart == 1 and piece.length >= LOOKED:
            return _made([piece], self._new, self._old) - RECORD.size
        if apart > 1:
            chosen = np.sort(np.argsort(moved, kind="stable")[apart // 2 :: apart])
            after, before = (side[rows].reshape(-1, step)[chosen].reshape(-1) for side in (after, before))
        said, cost = _described(replace(piece, length=len(after)), after.tobytes(), before.tobytes())
        once = SCALE_COST * len(said.segment.columns) if said.segment.columns is not None else 0.0
        once += sum(map(alone, sides(said.segment)[1:]))
        size = min(piece.length / len(after) * (cost - once) + once, piece.length) + SEGMENT_COST
        if size > FAR * piece.length:
            size = min(size, len(compress(after.tobytes(), LEVELS[1])) * piece.length / len(after))
        return size * np.array((0.95, 1, 1.06)) + (0, own, own)


def _described(piece: Piece, after: bytes, before: bytes) -> tuple[Description, float]:
    """Describe how numbers moved, and estimate how many bytes that takes."""
    said = describe(piece, numbers.codes(after, piece.kind), numbers.codes(before, piece.kind))
    few = np.count_nonzero(said.values) < LEAST_MOVED * len(said.values)
    cost = said.cost * (1 + (SPARSE_LOSS if few else DENSE_LOSS))
    if said.segment.old is None and piece.kind.mantissa:  # exponents show neither repetitions nor bytes that are not numbers
        cost = min(len(streams.encode(said.values)), len(streams.planes(said.values, piece.kind.width)))
    return said, cost


# Bytes


def _plain(piece: Piece, new: File, old: File | None) -> Bounds:
    made = new[piece.start : piece.start + piece.length].tobytes()
    if old is None:
        return _harder(made, None, len(compress(made, LEVELS[1])) + RECORD.size)
    found, at = np.zeros(3), 0
    parts, left = _parts(made, old)
    for part in parts:
        quick = quick_size([part], old)
        best = _elsewhere(part, old) * (left, 1, 1)
        if quick > FAST_LEVEL_BELOW * len(part) and piece.old is not None and piece.old + at + len(part) <= old.size:
            as_numbers = _looks(part, piece.old + at, old) * len(part) + RECORD.size + RECORD_COST
            bounds = as_numbers * np.array((0.85, 1, 1.2))
            if bounds[2] < 0.95 * quick:
                best = bounds
            elif bounds[0] < 0.95 * quick:
                likely = bounds if bounds[1] < 0.95 * quick else best
                best = np.array((min(best[0], bounds[0]), likely[1], max(best[2], bounds[2])))
        found += best
        at += len(part)
    return found


def _parts(made: bytes, old: File) -> tuple[list[bytes], float]:
    """Cut bytes as `parts_of` does, if one cut pays; else keep them whole.

    Returns:
        The parts, and the share of their size that may be left if more cuts pay although one does not.
    """
    whole, half = quick_size([made], old), len(made) // 2
    if half < LEAST_PART or whole < UNCUT_BELOW * len(made):
        return [made], 1.0
    if quick_size([made[:half], made[half:]], old) < 0.95 * whole:
        return parts_of(made, old), 1.0
    return [made], 0.5 if whole < FAST_LEVEL_BELOW * len(made) else 0.75 if whole < len(made) / 2 else 0.9


def _elsewhere(made: bytes, old: File) -> Bounds:
    """Estimate what `elsewhere` makes, without running zstd's slowest level on all of it."""
    size = size_of([elsewhere(made, old, LEVELS[:2])])
    return _known(size) if size < FAST_LEVEL_BELOW * len(made) else _harder(made, old, size)


def _harder(made: bytes, old: File | None, size: int) -> Bounds:
    """Estimate the size at zstd's slowest level from `size`, that of the level before it, by the gain on some spots."""
    before = after = 0
    for start in np.linspace(0, max(0, len(made) - SPOT), SPOTS).astype(int):
        spot = made[start : start + SPOT]
        places = old.blocks.places(np.frombuffer(spot, np.uint8)) if old else np.zeros(0, np.int64)
        known = b""
        if old and len(places):
            first = max(0, densest(places, 2 * SPOT) - REACH // 2)
            known = old[first : min(first + SPOT + REACH, old.size)].tobytes()
        before, after = (
            total + len(streams.compress_with_prefix(spot, known, level) if len(known) >= LEAST_KNOWN else compress(spot, level))
            for total, level in ((before, LEVELS[1]), (after, LEVELS[2]))
        )
    gain = min(1.0, after / before)
    return size * np.array((0.75 * gain if gain < 0.995 else 0.97, gain, 1))


def _looks(made: bytes, at: int, old: File) -> float:
    """Estimate the cost of each byte, in bytes, as the kind of numbers that spots of them look most like; see `plain.looks`."""
    count = max(SPOTS, len(made) // APART)
    length = min(SPOT // 2, len(made) // count // 2) // 8 * 8
    best = 1.0
    starts = [int(len(made) * (i + 0.5) / count) // 8 * 8 for i in range(count)]
    for kind in KINDS.values():
        for phase in range(kind.width if not kind.packed else 0):
            size = (length - 8) // kind.width * kind.width
            after = b"".join(made[s + phase : s + phase + size] for s in starts)
            before = b"".join(old[at + s + phase : at + s + phase + size].tobytes() for s in starts)
            piece = Piece(0, len(after), kind, 0, 0, False)
            cost = _described(piece, after, before)[1] / len(after)
            if cost < (best if kind.name == "bytes" else 0.95 * best):
                best = cost
    return best
