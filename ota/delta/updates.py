"""Records that move whole tensors of a file by factors alone: what the trainer publishes is what a device computes from them.

Such a record covers many tensors, so all their factors share streams. Most of it is a table of stretches: those that stay,
those that are moved by a product of thin matrices, those that make whole steps, and those that make steps of few shared numbers. A
device makes the new bytes piece by piece, so
memory does not grow with what the record covers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ota.delta import numbers, streams, vectors
from ota.delta.numbers import KIND_OF_CODE, LEAST_STEP, Kind, Product, Shared
from ota.errors import DeltaError
from ota.limits import KiB, MiB

MAX_STRETCHES = 4096  # of a record
MAX_VALUES = 512 * KiB  # factors and steps of a record; decoding takes some 40 bytes of memory for each
MAX_SHARED = 64 * KiB  # shared numbers of a record
MAX_PLACE = 2**40  # of a number among those that share; a file is shorter
MAX_BYTES = 1024 * MiB  # of the new file that a record makes
MAX_RANK = 32  # of a product: with more, `numbers.MAX_FACTOR` would not keep its sums exact
MAX_EXPONENT = 100  # of the power of two that scales a product, either way
MAX_PAYLOAD = 4 * MiB  # bytes
PIECE, PIECE_NUMBERS = 1 * MiB, 512 * KiB  # bytes that are made at once, and numbers that move among them
_MAX_TABLE = 256 * KiB  # bytes, unpacked
CHECK = 16  # bytes of a piece's hash

SAME, PRODUCT, STEPS, SHARED = range(4)
WAYS = {SAME: "same", PRODUCT: "product", STEPS: "steps", SHARED: "shared numbers"}
_COUNT = struct.Struct("<H")
_SHARED = struct.Struct("<QIf")  # seed, count, size of the steps

Known = Callable[[int, int], bytes]  # returns bytes of the old file: offset, length


@dataclass(frozen=True)
class Stretch:
    """Consecutive numbers of the new file, and how they come from the old ones; with neither product nor step they stay."""

    kind: Kind
    length: int  # bytes
    old: int  # offset of the predecessors in the old file
    row: int = 0  # numbers in a row, if a product moves them
    product: Product | None = None
    step: np.float32 | None = None
    steps: numbers.Factors | None = None  # how many steps each number makes; None: not read yet
    shared: Shared | None = None  # where a hash says how many; the same for all such stretches of a record
    first: int = 0  # place of its first number, for the hash

    @property
    def way(self) -> int:
        """How its numbers move."""
        if self.shared:
            return SHARED
        return PRODUCT if self.product else SAME if self.step is None else STEPS

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return self.length * 2 if self.kind.packed else self.length // self.kind.width

    @property
    def sizes(self) -> list[int]:
        """The lengths of its own vectors: the columns of the left side, then the rows of the right; or all its steps."""
        if self.product:
            return [self.count // self.row] * self.product.rank + [self.row] * self.product.rank
        return [self.count] if self.way == STEPS else []

    @property
    def vectors(self) -> list[numbers.Factors]:
        """The vectors, each of its length in `sizes`."""
        if self.product and self.product.left is not None and self.product.right is not None:
            return [*self.product.left.T, *self.product.right]
        return [] if self.steps is None else [self.steps]

    def filled(self, found: list[numbers.Factors], shared: Shared | None) -> Stretch:
        """Return the stretch with its vectors, or with the shared numbers of the record."""
        if self.shared:
            return replace(self, shared=shared)
        if self.step is not None:
            return replace(self, steps=found[0])
        if not self.product:
            return self
        rank = self.product.rank
        product = replace(self.product, left=np.stack(found[:rank], axis=1), right=np.stack(found[rank:]))
        return replace(self, product=product)

    def make(self, known: Known, start: int, length: int) -> bytes:
        """Make `length` bytes from its byte `start` on."""
        old = known(self.old + start, length)
        if self.way == SAME:
            return old
        before, at = numbers.codes(old, self.kind), start * 2 if self.kind.packed else start // self.kind.width
        if self.shared and self.step is not None:
            before = numbers.stepped(before, self.shared.of(self.first + at, len(before)), self.step, self.kind)
        elif self.steps is not None and self.step is not None:
            before = numbers.stepped(before, self.steps[at : at + len(before)], self.step, self.kind)
        elif self.product and self.product.left is not None and self.product.right is not None:
            first, last = at // self.row, -(-(at + len(before)) // self.row)
            left, right = self.product.left[first:last], self.product.right
            before = numbers.predicted(before, left, right, self.product.exponent, self.kind, at - first * self.row)
        return numbers.data(before, self.kind)


@dataclass(frozen=True)
class Piece:
    """Bytes that are made at once: parts of stretches, each with its first byte and its length."""

    parts: tuple[tuple[Stretch, int, int], ...]

    @property
    def length(self) -> int:
        """How many bytes it makes."""
        return sum(length for _, _, length in self.parts)

    def make(self, known: Known) -> bytes:
        """Make its bytes."""
        return b"".join(stretch.make(known, start, length) for stretch, start, length in self.parts)


def pieces(stretches: Sequence[Stretch]) -> Iterator[Piece]:
    """Cut stretches into pieces, each as long as `PIECE` and `PIECE_NUMBERS` allow; both sides cut alike."""
    parts: list[tuple[Stretch, int, int]] = []
    room, left = PIECE, PIECE_NUMBERS
    for stretch in stretches:
        start, each = 0, 0 if stretch.way == SAME else 2 if stretch.kind.packed else 1
        width = stretch.kind.width
        while start < stretch.length:
            length = min(room // width, stretch.length // width - start // width, left // each if each else room) * width
            if not length:
                yield Piece(tuple(parts))
                parts, room, left = [], PIECE, PIECE_NUMBERS
                continue
            parts.append((stretch, start, length))
            start, room, left = start + length, room - length, left - length // width * each
    if parts:
        yield Piece(tuple(parts))


def pack(stretches: Sequence[Stretch], checks: Sequence[bytes]) -> bytes:
    """Pack the payload of a record.

    Args:
        stretches: in the order of the file, at least one of them moved; all that share numbers share the same, in steps of one size.
        checks: the hash of each piece; the record's own head holds the first.
    """
    moved, sharing = [s for s in stretches if s.product], [s for s in stretches if s.shared]
    ends = [0, *(s.old + s.length for s in stretches)]
    columns = [
        np.array([s.way << 4 | s.kind.code for s in stretches], np.uint8),
        np.array([s.length for s in stretches], "<u4"),
        np.array([s.old - end for s, end in zip(stretches, ends, strict=False)], "<i8"),
        np.array([s.row for s in moved], "<u4"),
        np.array([s.product.rank for s in moved if s.product], np.uint8),
        np.array([s.product.exponent for s in moved if s.product], np.int8),
        np.array([s.step for s in stretches if s.way == STEPS], "<f4"),
        np.array([s.first - end for s, end in zip(sharing, [0, *(s.first + s.count for s in sharing)], strict=False)], "<i8"),
    ]
    table = _COUNT.pack(len(stretches)) + b"".join(_planes(column) for column in columns)
    own = [vector for s in stretches for vector in s.vectors]
    for s in sharing[:1]:
        if s.shared and s.shared.steps is not None and s.step is not None:
            table += _SHARED.pack(s.shared.seed, s.shared.count, s.step)
            own.insert(0, s.shared.steps)
    held = vectors.encode(own)
    return streams.frame(table, repeats=True) + b"".join(checks[1:]) + held


def read(payload: bytes, length: int) -> tuple[list[Stretch], list[bytes]]:
    """Read the payload of a record that makes `length` bytes; the inverse of `pack`, but without the first check.

    Raises:
        DeltaError: the bytes are damaged, or exceed a limit.
    """
    reader = streams.Reader(payload)
    stretches = _read_table(streams.Reader(reader.frame(None, _MAX_TABLE).tobytes()), length)
    checks = [bytes(reader.take(CHECK)) for _ in list(pieces(stretches))[1:]]
    shared = next((s.shared for s in stretches if s.shared), None)
    sizes = [*([shared.count] if shared else []), *(size for s in stretches for size in s.sizes)]
    if not sizes or sum(sizes) > MAX_VALUES:
        raise DeltaError("a record of the delta holds no factors, or more than it may; fetch it again")
    found = vectors.decode(reader, sizes)
    reader.end()
    shared = replace(shared, steps=found.pop(0)) if shared else None
    made, at = [], 0
    for stretch in stretches:
        stop = at + len(stretch.sizes)
        made.append(stretch.filled(found[at:stop], shared))
        at = stop
    return made, checks


def _read_table(table: streams.Reader, length: int) -> list[Stretch]:
    (count,) = _COUNT.unpack(table.take(_COUNT.size))
    if not 0 < count <= MAX_STRETCHES:
        raise DeltaError("a record of the delta has more segments than it may; fetch it again")
    ways, lengths, gaps = _column(table, "u1", count), _column(table, "<u4", count), _column(table, "<i8", count)
    made: list[Stretch] = []
    thin = int(np.count_nonzero(ways >> 4 == PRODUCT))
    rows, ranks, exponents = (iter(_column(table, kind, thin).tolist()) for kind in ("<u4", "u1", "i1"))
    sizes = iter(_column(table, "<f4", int(np.count_nonzero(ways >> 4 == STEPS))))
    gaps_of_places = iter(_column(table, "<i8", int(np.count_nonzero(ways >> 4 == SHARED))).tolist())
    shared, size_of_shared = _read_shared(table) if SHARED in ways >> 4 else (None, None)
    end = place = 0
    for way, size, gap in zip(ways.tolist(), lengths.tolist(), gaps.tolist(), strict=True):
        kind = KIND_OF_CODE.get(way & 15)
        if kind is None or way >> 4 not in WAYS or not size or size % kind.width or end + gap < 0:
            raise DeltaError("a record of the delta describes numbers in an unknown way; update the agent")
        stretch = Stretch(kind, size, end + gap)
        if way >> 4 == PRODUCT:
            stretch = replace(stretch, row=next(rows), product=Product(next(ranks), next(exponents)))
            _check_product(stretch)
        elif way >> 4 == STEPS:
            stretch = replace(stretch, step=next(sizes))
            if not (kind.mantissa and stretch.step is not None and LEAST_STEP <= stretch.step < np.inf):
                raise DeltaError("a record of the delta describes impossible steps; fetch it again")
        elif way >> 4 == SHARED:
            stretch = replace(stretch, step=size_of_shared, shared=shared, first=place + next(gaps_of_places))
            place = stretch.first + stretch.count
            if not kind.mantissa or stretch.first < 0 or place > MAX_PLACE:
                raise DeltaError("a record of the delta describes impossible shared numbers; fetch it again")
        made.append(stretch)
        end += gap + size
    if sum(s.length for s in made) != length:
        raise DeltaError("a record of the delta claims other numbers than it may")
    table.end()
    return made


def _read_shared(table: streams.Reader) -> tuple[Shared, np.float32]:
    """Read what all stretches with shared numbers have in common: seed and count, and the size of their steps."""
    seed, count, size = _SHARED.unpack(table.take(_SHARED.size))
    if not (0 < count <= MAX_SHARED and LEAST_STEP <= size < np.inf):
        raise DeltaError("a record of the delta describes impossible shared numbers; fetch it again")
    return Shared(seed, count), np.float32(size)


def _check_product(stretch: Stretch) -> None:
    product = stretch.product
    if not (
        product and 0 < product.rank <= MAX_RANK and abs(product.exponent) <= MAX_EXPONENT and stretch.kind.name != "bytes"
        and 0 < stretch.row <= stretch.count and not stretch.count % stretch.row
    ):  # fmt: skip
        raise DeltaError("a record of the delta describes an impossible product; fetch it again")


def _planes(column: npt.NDArray[Any]) -> bytes:
    """Return a column of the table byte by byte, the lowest of all rows first: that compresses better."""
    return column.view(np.uint8).reshape(len(column), column.itemsize).T.tobytes() if len(column) else b""


def _column(table: streams.Reader, kind: str, count: int) -> npt.NDArray[Any]:
    width = np.dtype(kind).itemsize
    planes = np.frombuffer(table.take(width * count), np.uint8).reshape(width, count)
    return np.ascontiguousarray(planes.T).view(kind).reshape(count)
