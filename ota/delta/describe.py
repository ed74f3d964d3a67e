"""Describe how the numbers of a piece moved, in as few bytes as possible.

Numbers move one by one, in steps of one size, by a product of thin matrices, or from 0. All choices compare integers, or floats
that are rounded so coarsely that all machines agree. So the same files give the same delta on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ota.delta import lowrank, numbers, streams, updates
from ota.delta.format import MAX_RANK, VERSION, Segment, pack_table
from ota.delta.numbers import CONTEXTS, Kind, Product
from ota.delta.plan import File, Piece
from ota.delta.sharing import entropy, half_octaves, joint, share

SCALE_COST = 0.65  # bytes that a row's or column's scale costs
NEVER = -2000  # the scale of numbers that do not move at all
NEAR = 0.6  # share of a piece's bytes; a description that takes more is also tried without predecessors
CLEARLY = 0.3  # bits a number; a product that saves more than this is not compared with the description without it
LEAST_MOVED = 0.3  # share of numbers that have to move before a product is looked for
SAMPLE = 1 << 14  # numbers that are sampled to choose row and column scales


def payload_of(group: Sequence[Piece], made: bytes, old: File | None, version: int = VERSION) -> bytes:
    """Encode the payload of a record of numbers, for a version of the format, in the shortest of the ways that are tried."""
    said: list[Description] = []
    for piece in group:
        at = piece.start - group[0].start
        said.append(describe(piece, numbers.codes(made[at : at + piece.length], piece.kind), _before(piece, old), version))
    segments = [one.segment for one in said]
    together, ids = np.concatenate([one.values for one in said]), np.concatenate([one.classes for one in said])
    rest = b"".join(streams.encode(part) for one in said for part in one.missed)
    sample = _sampled(ids)
    stream_of = share(joint(sample, streams.tokens(_sampled(together))[0]), len(ids) / len(sample))
    count = int(stream_of.max()) + 1
    ways: list[bytes] = []
    if count == 1 or all(s.old is None for s in segments):  # one stream: zstd may find repetitions that contexts do not show
        plain = pack_table([replace(s, rows=None, columns=None) for s in segments], None, version)
        width = max(piece.kind.width for piece in group)
        ways += [plain + streams.encode(together) + rest, plain + streams.planes(together, width) + rest]
    if count > 1:
        ids = numbers.translated(ids, np.pad(stream_of, (0, 256 - CONTEXTS)))
        parts = [streams.encode(together[np.flatnonzero(ids == number)]) for number in range(count)]
        ways.append(pack_table(segments, stream_of, version) + b"".join(parts) + rest)
    return min(ways, key=len)


def _before(piece: Piece, old: File | None) -> numbers.Codes:
    known = old[piece.old : piece.old + piece.length].tobytes() if old and piece.old is not None else bytes(piece.length)
    return numbers.codes(known, piece.kind)


@dataclass(frozen=True)
class Description:
    """How a piece is described: the segment, each number's context, the values of its streams, and the residuals of steps."""

    segment: Segment
    classes: npt.NDArray[np.uint8]
    values: streams.Numbers
    missed: list[streams.Numbers] = field(default_factory=list)

    def _tokens(self, values: streams.Numbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Return each value's token and the number of bits that the token leaves out, to estimate the cost.

        They are those of `streams.tokens`. But of a float without a predecessor only the exponent can be compressed: the exponent
        is its token, and all other bits count in full.
        """
        kind = self.segment.kind
        if self.segment.old is not None or not kind.mantissa:
            return streams.tokens(values)
        exponents = (values >> np.uint32(kind.mantissa + 1)).astype(np.int32) - kind.bias + streams.TOKENS - 16
        return np.clip(exponents, 0, streams.TOKENS - 1).astype(np.uint8), np.full(len(values), kind.mantissa + 1, np.uint8)

    @functools.cached_property
    def cost(self) -> float:
        """The estimated size in bytes, if each context had a code of its own."""
        symbols, below = self._tokens(_sampled(self.values))
        bits = _bits(joint(_sampled(self.classes), symbols)) + int(below.sum(dtype=np.int64))
        apart = sum(map(alone, (*self.missed, *sides(self.segment))))
        return len(self.values) / max(len(symbols), 1) * bits / 8 + _scales(self.segment) + apart


def _scales(segment: Segment) -> float:
    """Estimate how many bytes a segment's row and column scales take."""
    return SCALE_COST * sum(len(side) for side in (segment.rows, segment.columns) if side is not None)


def _bits(counts: npt.NDArray[np.int64]) -> float:
    """Estimate how many bits tokens take, if each context has a code of its own.

    The entropy of a sample is too low, by half a nat for each occupied cell of the histogram (Miller 1955). This is added.
    """
    return float(entropy(counts).sum()) + np.count_nonzero(counts) / (2 * math.log(2))


def describe(piece: Piece, after: numbers.Codes, before: numbers.Codes, version: int = VERSION) -> Description:
    """Choose the cheapest description of how the numbers of a piece moved.

    The choice is between moves one by one, steps of one size, a product of thin matrices, and moves from 0 if the old numbers
    help little. Steps are those that the trainer claims and those that a search finds; a product is searched for
    where none is claimed.
    """
    row = piece.row if 1 < piece.row < len(before) else 0
    plain = Segment(piece.kind, piece.length, row or len(before), piece.old, NEVER)
    if piece.same:
        return Description(plain, np.zeros(len(before), np.uint8), np.zeros(len(before), np.uint32))
    change = numbers.changes(after, before, piece.kind)
    moved = numbers.difference(after, before, piece.kind).astype(np.uint32)
    if piece.old is None or piece.kind.name == "bytes":
        return _scaled(plain, change, before, moved, row)
    share_moved = np.count_nonzero(moved) / len(before)
    steps = [piece.claim.step] if piece.claim and piece.claim.step is not None else []
    if piece.kind.mantissa and 0.01 < share_moved < 0.95:  # beside a claim, too, because its size may be wrong
        found = _step(change, after, before, piece.kind)
        steps += [found] if found is not None and found not in steps else []
    product = _claimed(piece, row, version) if row else None
    if product is None and row and share_moved > LEAST_MOVED and (not steps or version > 1):
        product = _product(change, before, row, piece.kind)
    if product:
        segment = replace(plain, product=product)
        nearer = segment.before(before)
        moved_nearer = numbers.difference(after, nearer, piece.kind).astype(np.uint32)
        best = _scaled(segment, numbers.changes(after, nearer, piece.kind), nearer, moved_nearer, row)
        if _mean_bits(moved_nearer) > _mean_bits(moved) - CLEARLY:
            best = min(best, _scaled(plain, change, before, moved, row), key=lambda said: said.cost)
    else:
        best = _scaled(plain, change, before, moved, row)
    for step in steps:
        best = min(best, _stepped(plain, change, before, after, row, step), key=lambda said: said.cost)
    if _mean_bits(best.values) / 8 * len(before) > NEAR * piece.length and best.cost > NEAR * piece.length:
        zeros = np.zeros_like(before)
        by = numbers.difference(after, zeros, piece.kind).astype(np.uint32)
        alone = _scaled(replace(plain, old=None), numbers.changes(after, zeros, piece.kind), zeros, by, row)
        best = min(best, alone, key=lambda said: said.cost)
    return best


def _claimed(piece: Piece, row: int, version: int) -> Product | None:
    """Return the rows of the trainer's product that move a piece; None if there is none, or it does not fit into a segment."""
    if piece.claim is None or piece.claim.exponent is None or piece.row != row:
        return None
    count = piece.length * 2 if piece.kind.packed else piece.length // piece.kind.width
    most = MAX_RANK if version == 1 else updates.MAX_RANK
    if piece.first % row or piece.claim.rank > most or piece.claim.rank * (-(-count // row) + row) > count:
        return None
    product = piece.claim.product()
    if product is None or product.left is None:
        return None
    return replace(product, left=product.left[piece.first // row :][: -(-count // row)])


def _stepped(
    plain: Segment, change: npt.NDArray[np.float32], before: numbers.Codes, after: numbers.Codes, row: int, step: np.float32
) -> Description:
    with np.errstate(over="ignore"):
        counted = (change / step).clip(-(2.0**30), 2.0**30)
    steps = np.round(counted).astype(np.int32)
    missed = numbers.difference(after, numbers.stepped(before, steps, step, plain.kind), plain.kind).astype(np.uint32)
    said = _scaled(replace(plain, step=step), counted, before, numbers.zigzag(steps), row)
    return replace(said, missed=[missed[steps == 0], missed[steps != 0]])


def _product(change: npt.NDArray[np.float32], before: numbers.Codes, row: int, kind: Kind) -> Product | None:
    rows = len(before) // row
    least = 1.0
    if kind.mantissa:
        size = float(np.median(np.abs(numbers.values(before[:: max(1, len(before) // 4096)], kind))))
        least = 2.0 ** (math.frexp(size)[1] - 2 - kind.mantissa) if math.isfinite(size) else 0.0
    if rows * row != len(before) or not least:
        return None
    product = lowrank.find(change.reshape(rows, row).astype(np.float64), least)
    return product if product and product.rank * (rows + row) <= len(before) else None


def sides(segment: Segment) -> list[streams.Numbers]:
    """Return the factors of a segment's product as they are stored, flat and zig-zag coded; none if it has no product."""
    p = segment.product
    return [numbers.zigzag(side.reshape(-1)) for side in (p.left, p.right) if side is not None] if p else []


def _scaled(
    plain: Segment, change: npt.NDArray[np.float32], before: numbers.Codes, values: streams.Numbers, row: int
) -> Description:
    """Describe how far numbers move by one scale for all, and by further scales for rows and columns where these pay."""
    distance = np.abs(change)
    mean = float(distance.mean(dtype=np.float64)) if len(distance) else 0.0
    if not mean:
        return Description(plain, plain.contexts(before), values)
    segment = replace(plain, scale=int(half_octaves(np.array(mean))))
    if row:
        segment = _by_row_or_column(segment, distance, before, values, row)
    return Description(segment, segment.contexts(before), values)


def _by_row_or_column(
    plain: Segment, distance: npt.NDArray[np.float32], before: numbers.Codes, values: streams.Numbers, row: int
) -> Segment:
    """Choose scales for each row, for each column, for both or for neither, whichever is cheapest in a sample of the rows."""
    whole = len(distance) // row * row
    table = distance[:whole].reshape(-1, row)
    rows, columns = table.mean(axis=1, dtype=np.float64), table.mean(axis=0, dtype=np.float64)
    if whole < len(distance):
        rows = np.append(rows, distance[whole:].mean(dtype=np.float64))
    rows, columns = _apart(rows, plain.scale), _apart(columns, plain.scale)
    step = -(-whole // SAMPLE)
    old = before[:whole].reshape(-1, row)[::step].reshape(-1)
    symbols = streams.tokens(values[:whole].reshape(-1, row)[::step].reshape(-1))[0]
    ways = [replace(plain, rows=r, columns=c) for r in (None, rows) for c in (None, columns)]

    def cost(way: Segment) -> float:
        part = replace(way, rows=None if way.rows is None else way.rows[: len(table) : step])
        return len(distance) / len(old) * _bits(joint(part.contexts(old), symbols)) / 8 + _scales(way)

    return min(ways, key=cost)


def _apart(means: npt.NDArray[np.float64], scale: int) -> npt.NDArray[np.int16]:
    """Return how far the mean of each row or column lies from the common scale, in half octaves, at most 20 either way."""
    return np.clip(half_octaves(means) - scale, -20, 20).astype(np.int16)


def _mean_bits(values: streams.Numbers) -> float:
    """Estimate how many bits a number takes, from a sample."""
    return float(np.log2(values[:: max(1, len(values) // 4096)] + 1.0).mean()) + 1


def alone(values: streams.Numbers) -> float:
    """Estimate how many bytes numbers cost in a stream of their own."""
    symbols, below = streams.tokens(values)
    return (float(entropy(np.bincount(symbols, minlength=1)[None]).sum()) + int(below.sum(dtype=np.int64))) / 8


def _sampled(found: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a quarter of the numbers, in runs of 1,024; all of them if they are fewer than 32,768."""
    if len(found) < 1 << 15:
        return found
    return found[: len(found) // 4096 * 4096].reshape(-1, 4096)[:, :1024].reshape(-1)


def _step(change: npt.NDArray[np.float32], after: numbers.Codes, before: numbers.Codes, kind: Kind) -> np.float32 | None:
    """Find the size of the steps that all numbers moved by, if there is one.

    Steps show where the kind's own rounding is small against the change: the smallest changes are one step, and all changes are
    near multiples of it. Then every number that moved gives bounds for the size: only a size between them rounds to the new
    number.
    """
    at = np.flatnonzero(change)
    few = at[:: max(1, len(at) // 4096)]
    size, old = np.abs(change[few]).astype(np.float64), np.abs(numbers.values(before[few], kind)).astype(np.float64)
    size = size[np.isfinite(old) & (size > 32 * 2.0**-kind.mantissa * old)]
    if len(size) < 64:
        return None
    first = float(np.sort(size)[len(size) // 50])
    near = size[(size > 0.75 * first) & (size < 1.33 * first)]
    step = float(np.sort(near)[len(near) // 2])
    for _ in range(4):
        count = np.round(size / step)
        step = float((size * count).sum() / (count * count).sum()) if count.any() else 0.0
        if not 1e-30 < step < 1e30:
            return None
    if float(np.abs(size / step - np.round(size / step)).mean()) > 0.05:  # the mean is 0.25 if there are no steps
        return None
    at = at[:: max(1, len(at) // 32768)]
    size, new = np.abs(change[at]).astype(np.float64), numbers.values(after[at], kind).astype(np.float64)
    slack = np.ldexp(1.0, np.frexp(np.where(np.isfinite(new), new, 0.0))[1] - 2 - kind.mantissa) + size * 2.0**-23
    count = np.round(size / step)
    sure = (count > 0) & (slack < step / 4)
    at, size, slack, count = at[sure], size[sure], slack[sure], count[sure]
    if not len(at):
        return None
    low, high = (size - slack) / count, (size + slack) / count
    few_wrong = 0 if low.max() <= high.min() else len(at) // 200
    middle = np.float32((np.partition(low, -1 - few_wrong)[-1 - few_wrong] + np.partition(high, few_wrong)[few_wrong]) / 2)
    steps = np.round(change[at] / middle).astype(np.int32)

    def hits(size: np.float32) -> int:
        return int(np.count_nonzero(numbers.stepped(before[at], steps, size, kind) == after[at]))

    near_by = [middle]
    for direction in (np.float32(0), np.float32(np.inf)):
        found = middle
        for _ in range(4):
            found = np.nextafter(found, direction)
            near_by.append(found)
    return max(near_by, key=hits)
