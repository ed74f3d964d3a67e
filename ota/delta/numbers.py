"""The numbers in a file: their order, how far they move from old to new, and how far they are expected to move.

Floats are mapped to integers in the floats' own order, so a small change of a value is a small difference of integers (FM-Delta,
Ning et al. 2024). The factory and the device both estimate how large that difference is: a training step moves all weights of a
row or column about equally far, and the exponent of an old value shows how fine its own scale is. This estimate is the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[Any]  # uint8, uint16 or uint32, by the kind's width
Numbers = npt.NDArray[np.uint32]
Scales = npt.NDArray[np.int16]
Factors = npt.NDArray[np.int32]

LEAST_STEP = np.float32(2.0**-126)  # the smallest normal one; some processors take a denormal for 0
MAX_FACTOR = 2**24  # a sum of 32 products of two such factors is an integer of at most 2^53, so float64 holds it exactly

_HASHED = 1 << 16  # places that are hashed at once
_ONE_THREAD = 1 << 18  # multiplications; up to so many, OpenBLAS uses one thread

KindName = Literal["bytes", "float32", "float16", "bfloat16", "int8", "int4"]
CONTEXTS = 64
_ZERO_CONTEXT = 14  # context of numbers that are expected to move by one


_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_SIGNED: dict[int, type[np.signedinteger[Any]]] = {1: np.int8, 2: np.int16, 4: np.int32}


@dataclass(frozen=True)
class Kind:
    """A way to store numbers."""

    name: KindName
    code: int  # in the format
    width: int  # bytes; a packed pair of int4 is one byte
    mantissa: int = 0  # bits; 0: not a float
    bias: int = 0
    packed: bool = False  # two numbers in a byte, the lower half first

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The type of unsigned integers that hold a bit pattern."""
        return _UNSIGNED[self.width]


KINDS: dict[KindName, Kind] = {
    kind.name: kind
    for kind in (
        Kind("bytes", 0, 1),
        Kind("float32", 1, 4, 23, 127),
        Kind("float16", 2, 2, 10, 15),
        Kind("bfloat16", 3, 2, 7, 127),
        Kind("int8", 4, 1),
        Kind("int4", 5, 1, packed=True),
    )
}
KIND_OF_CODE = {kind.code: kind for kind in KINDS.values()}


@dataclass(frozen=True)
class Product:
    """Two thin matrices of integers whose product predicts how numbers moved; see `predicted`."""

    rank: int
    exponent: int  # of the power of two that scales the product
    left: Factors | None = None  # [rows, rank]; None: not read yet
    right: Factors | None = None  # [rank, columns]


@dataclass(frozen=True)
class Shared:
    """A few counts of steps that many numbers share: a seeded hash of its place says which of them a number makes; see `spread`."""

    seed: int  # below 2^64
    count: int  # 1 to 2^32
    steps: Factors | None = None  # [count]; None: not read yet

    def of(self, first: int, length: int) -> Factors:
        """Return how many steps each of `length` consecutive numbers makes, the first of which has the place `first`."""
        if self.steps is None:
            raise ValueError("the shared numbers are not read yet")
        made = np.empty(length, np.int32)
        for at in range(0, length, _HASHED):
            chosen, negative = spread(self.seed, self.count, first + at, min(_HASHED, length - at))
            found = self.steps[chosen]
            made[at : at + len(found)] = np.where(negative, -found, found)
        return made


def codes(data: bytes, kind: Kind) -> Codes:
    """Return the bit patterns of the numbers that bytes hold."""
    found = np.frombuffer(data, kind.dtype)
    return np.stack((found & 15, found >> 4), axis=1).ravel() if kind.packed else found


def data(found: Codes, kind: Kind) -> bytes:
    """Return the bytes of numbers by their bit patterns; the inverse of `codes`."""
    return (found[0::2] | found[1::2] << np.uint8(4)).tobytes() if kind.packed else found.tobytes()


def ordered(found: Codes, kind: Kind) -> Codes:
    """Map bit patterns of floats to unsigned integers in the floats' own order: -inf … -0, +0 … +inf; `bits` is the inverse.

    Negative floats get all bits flipped, others only the sign bit. Integers stay as they are.
    """
    if not kind.mantissa:
        return found
    negative = found.view(_SIGNED[kind.width]) >> (8 * kind.width - 1)  # all bits or none
    made: Codes = found ^ (negative.view(kind.dtype) | kind.dtype(1 << (8 * kind.width - 1)))
    return made


def bits(found: Codes, kind: Kind) -> Codes:
    """Map integers in the floats' own order back to bit patterns; the inverse of `ordered`."""
    if not kind.mantissa:
        return found
    positive = found.view(_SIGNED[kind.width]) >> (8 * kind.width - 1)
    made: Codes = found ^ (~positive.view(kind.dtype) | kind.dtype(1 << (8 * kind.width - 1)))
    return made


def difference(new: Codes, old: Codes, kind: Kind) -> Codes:
    """Return how far each number moved in the order of its kind, modulo its range and zig-zag coded.

    Zig-zag codes 0, -1, 1, -2, 2 … as 0, 1, 2, 3, 4 ….
    """
    by = (ordered(new, kind) - ordered(old, kind)).view(_SIGNED[kind.width])
    if kind.packed:
        by = by << 4 >> 4  # sixteen values, from -8
    found: Codes = ((by << 1) ^ (by >> (8 * kind.width - 1))).view(kind.dtype)
    return found


def moved(old: Codes, by: Codes, kind: Kind) -> Codes:
    """Move each number by a zig-zag coded difference; the inverse of `difference`."""
    steps = by.astype(kind.dtype, copy=False)
    new = ordered(old, kind) + ((steps >> kind.dtype(1)) ^ (kind.dtype(0) - (steps & kind.dtype(1))))
    return new & np.uint8(15) if kind.packed else bits(new, kind)


def stepped(old: Codes, steps: npt.NDArray[np.int32], size: np.float32, kind: Kind) -> Codes:
    """Move floats by whole steps of one size, as a training does that rounds its update to a grid.

    The product and the sum are each rounded to float32, then the sum is rounded to the kind (to nearest, ties to even), so the
    result is the same on every machine, if the size is at least `LEAST_STEP`. A number that is denormal, zero, infinite or NaN
    before or after stays as it is, because machines treat these differently.
    """
    at = np.flatnonzero(steps)
    before, result = old[at], old.copy()
    with np.errstate(all="ignore"):
        made = _as_float32(before, kind) + steps[at].astype(np.float32) * size
        found = _rounded(made, kind)
    result[at] = _where_normal(found, before, kind)
    return result


def predicted(old: Codes, left: Factors, right: Factors, exponent: int, kind: Kind, first: int = 0) -> Codes:
    """Move numbers by the product of two thin matrices of integers, times a power of two.

    The product of such integers is exact in whatever order a library adds, so it is the same on every machine. Floats are then
    added in float32 and rounded to the kind as in `stepped`. For integers, the product is rounded to the nearest integer (ties to
    even), and the sum is clipped to what the kind has.

    Args:
        old: the numbers before, row by row; the last row may be shorter.
        left: integers within ±`MAX_FACTOR`, [rows, rank].
        right: the same, [rank, columns].
        exponent: of the power of two.
        kind: of the numbers.
        first: how many numbers of the first row are left out.
    """
    product = multiplied(left.astype(np.float64), right.astype(np.float64)).reshape(-1)[first : first + len(old)] * 2.0**exponent
    if not kind.mantissa:
        low, high = (-8, 7) if kind.packed else (-128, 127)
        return np.clip(np.rint(product) + values(old, kind), low, high).astype(np.int8).view(np.uint8) & (
            15 if kind.packed else 255
        )
    with np.errstate(all="ignore"):
        return _where_normal(_rounded(_as_float32(old, kind) + product.astype(np.float32), kind), old, kind)


def spread(seed: int, count: int, first: int, length: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Return which of `count` shared numbers each of `length` consecutive numbers moves by, and whether with the opposite sign.

    The hash of a place is SplitMix64 (Steele, Lea, Flood 2014) of seed and place: integers modulo 2^64, the same on every machine. Its
    upper half chooses the shared number, its lowest bit the sign.
    """
    found = np.arange(first + 1, first + length + 1, dtype=np.uint64)
    found *= np.uint64(0x9E3779B97F4A7C15)
    found += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(factor)
    found ^= found >> np.uint64(31)
    return (found >> np.uint64(32)) * np.uint64(count) >> np.uint64(32), (found & np.uint64(1)).astype(np.bool_)


def multiplied(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Multiply two matrices in pieces so small that a BLAS starts no threads, which would spin for longer than this takes."""
    (m, k), n = left.shape, right.shape[1]
    made = np.empty((m, n))
    if m > n:
        step = max(1, _ONE_THREAD // max(k * n, 1))
        for at in range(0, m, step):
            np.matmul(left[at : at + step], right, out=made[at : at + step])
    else:
        step = max(1, _ONE_THREAD // max(k * m, 1))
        for at in range(0, n, step):
            made[:, at : at + step] = left @ right[:, at : at + step]
    return made


def _rounded(found: npt.NDArray[np.float32], kind: Kind) -> Codes:
    """Round float32 to the nearest number of a kind, ties to even; infinities and NaNs become infinities, NaNs or zeros."""
    if kind.mantissa == 10:
        return found.astype(np.float16).view(np.uint16)
    wide = found.view(np.uint32)
    if kind.mantissa == 7:
        return ((wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return wide


def _where_normal(found: Codes, before: Codes, kind: Kind) -> Codes:
    """Return each new number, but the old one if either is denormal, zero, infinite or NaN: machines treat these differently."""
    top = kind.dtype((1 << (8 * kind.width - 1 - kind.mantissa)) - 1)
    exponents = [side >> kind.dtype(kind.mantissa) & top for side in (before, found)]
    plain = np.logical_and.reduce([(exponent != 0) & (exponent != top) for exponent in exponents])
    return np.where(plain, found, before)


def _as_float32(found: Codes, kind: Kind) -> npt.NDArray[np.float32]:
    if kind.mantissa == 7:
        return (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found.view(np.float16 if kind.mantissa == 10 else np.float32).astype(np.float32)


def signed(zigzag: Numbers) -> npt.NDArray[np.int32]:
    """Decode zig-zag coded numbers to signed integers."""
    return ((zigzag >> np.uint32(1)) ^ (np.uint32(0) - (zigzag & np.uint32(1)))).view(np.int32)


def zigzag(steps: npt.NDArray[np.int32]) -> Numbers:
    """Encode signed integers by zig-zag coding; the inverse of `signed`."""
    return ((steps << np.int32(1)) ^ (steps >> np.int32(31))).view(np.uint32)


def contexts(
    old: Codes, kind: Kind, scale: int, rows: Scales | None, columns: Scales | None, width: int
) -> npt.NDArray[np.uint8]:
    """Return the context of each number: one of 64 classes of expected distance, each half an octave wide.

    Args:
        old: the numbers before, row by row.
        kind: of the numbers.
        scale: how far the values are expected to move, in half octaves.
        rows: how much more or less each row moves, in half octaves; None: all move alike.
        columns: the same for columns.
        width: numbers in a row; the last row may be shorter.
    """
    if kind.mantissa:
        exponent = (old >> kind.dtype(kind.mantissa) & kind.dtype(31 if kind.mantissa == 10 else 255)).astype(np.int16)
        np.maximum(exponent, 1, out=exponent)  # denormals share the scale of the smallest exponent
        found = (scale + _ZERO_CONTEXT + 2 * (kind.bias + kind.mantissa)) - 2 * exponent
    else:
        found = np.full(len(old), scale + _ZERO_CONTEXT, np.int16)
    whole = len(old) // width * width
    table = found[:whole].reshape(-1, width)
    if rows is not None:
        table += rows[: len(table), None]
        found[whole:] += rows[len(table) :][:1].repeat(len(old) - whole)
    if columns is not None:
        table += columns
        found[whole:] += columns[: len(old) - whole]
    classes: npt.NDArray[np.uint8] = found.clip(0, CONTEXTS - 1).astype(np.uint8)
    return classes


def translated(found: npt.NDArray[np.uint8], table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Map each byte by a table of 256 entries.

    This is two to four times as fast as NumPy's indexing, which widens every index to eight bytes.
    """
    return np.frombuffer(found.tobytes().translate(table.tobytes()), np.uint8)


def changes(new: Codes, old: Codes, kind: Kind) -> npt.NDArray[np.float32]:
    """Return by how much each value moved, as float32; a change that is not finite counts as 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = values(new, kind) - values(old, kind)
    if kind.mantissa and not np.isfinite(found).all():
        found[~np.isfinite(found)] = 0
    return found


def values(found: Codes, kind: Kind) -> npt.NDArray[np.float32]:
    """Return the values of bit patterns, as float32."""
    if kind.mantissa:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return _as_float32(found, kind)
    if kind.packed:
        return ((found << np.uint8(4)).view(np.int8) >> np.int8(4)).astype(np.float32)
    return found.view(np.int8).astype(np.float32)
