"""What is known about the numbers in a file: their order, how far one lies from another, and how far it may be expected to lie.

Floats are mapped to integers in the floats' own order, so that a small change of a value is a small difference of integers (FM-Delta,
Ning et al. 2024). How large that difference will be both sides can guess: a step of training moves all weights of a row or column
about as far, and an old value says by its exponent how fine its own scale is. That guess is the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[Any]  # uint8, uint16 or uint32, by the kind's width
Numbers = npt.NDArray[np.uint32]
Scales = npt.NDArray[np.int16]

KindName = Literal["bytes", "float32", "float16", "bfloat16", "int8", "int4"]
CONTEXTS = 64
_ZERO_CONTEXT = 14  # of numbers that are expected to move by one


@dataclass(frozen=True)
class Kind:
    """How the numbers of a stretch are stored."""

    name: KindName
    code: int  # in the format
    width: int  # bytes; a packed pair of int4 is one byte
    mantissa: int = 0  # bits; 0: not a float
    bias: int = 0
    packed: bool = False  # two numbers in a byte, the lower half first

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Unsigned integers that hold a bit pattern."""
        return {1: np.uint8, 2: np.uint16, 4: np.uint32}[self.width]  # type: ignore[return-value]


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


def codes(data: bytes, kind: Kind) -> Codes:
    """Bit patterns of the numbers in these bytes."""
    found = np.frombuffer(data, kind.dtype)
    return np.stack((found & 15, found >> 4), axis=1).ravel() if kind.packed else found


def data(found: Codes, kind: Kind) -> bytes:
    """The inverse of `codes`."""
    return (found[0::2] | found[1::2] << np.uint8(4)).tobytes() if kind.packed else found.tobytes()


def ordered(found: Codes, kind: Kind) -> Codes:
    """Float bit patterns as unsigned integers in the floats' own order: -inf … -0, +0 … +inf; its inverse is `bits`.

    Negative floats have all bits flipped, others only the sign bit. Integers stay as they are.
    """
    if not kind.mantissa:
        return found
    sign = kind.dtype(1 << (8 * kind.width - 1))
    return found ^ np.where(found & sign, ~kind.dtype(0), sign)


def bits(found: Codes, kind: Kind) -> Codes:
    """The inverse of `ordered`."""
    if not kind.mantissa:
        return found
    sign = kind.dtype(1 << (8 * kind.width - 1))
    return found ^ np.where(found & sign, sign, ~kind.dtype(0))


def difference(new: Codes, old: Codes, kind: Kind) -> Numbers:
    """How far each number moved in the order of its kind, modulo its range; 0, -1, 1, -2, 2 … are coded as 0, 1, 2, 3, 4 (zig-zag)."""
    moved = ordered(new, kind) - ordered(old, kind)
    if kind.packed:
        moved = (moved << np.uint8(4)).view(np.int8) >> np.int8(4)  # sixteen values, from -8
        moved = moved.view(np.uint8)
    top = moved >> kind.dtype(8 * kind.width - 1)  # 1 where negative as two's complement
    found: Numbers = ((moved << kind.dtype(1)) ^ (kind.dtype(0) - top)).astype(np.uint32)
    return found


def moved(old: Codes, by: Numbers, kind: Kind) -> Codes:
    """The inverse of `difference`."""
    steps = by.astype(kind.dtype)
    new = ordered(old, kind) + ((steps >> kind.dtype(1)) ^ (kind.dtype(0) - (steps & kind.dtype(1))))
    return new & np.uint8(15) if kind.packed else bits(new, kind)


def stepped(old: Codes, steps: npt.NDArray[np.int32], size: np.float32, kind: Kind) -> Codes:
    """What floats become that move by whole steps of one size, as a training does that rounds its update to a grid.

    In float32, product and sum each rounded, then rounded to the kind (to nearest, ties to even), so it is the same on every machine.
    Where that would touch denormals, infinities or NaNs, which machines treat in ways of their own, the number stays as it is.
    """
    at = np.flatnonzero(steps)
    before, result = old[at], old.copy()
    with np.errstate(all="ignore"):
        made = _as_float32(before, kind) + steps[at].astype(np.float32) * size
        if kind.mantissa == 10:
            found: Codes = made.astype(np.float16).view(np.uint16)
        elif kind.mantissa == 7:
            wide = made.view(np.uint32)
            found = ((wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
        else:
            found = made.view(np.uint32)
    top = kind.dtype((1 << (8 * kind.width - 1 - kind.mantissa)) - 1)
    exponents = [side >> kind.dtype(kind.mantissa) & top for side in (before, found)]
    plain = np.logical_and.reduce([(exponent != 0) & (exponent != top) for exponent in exponents])
    result[at] = np.where(plain, found, before)
    return result


def _as_float32(found: Codes, kind: Kind) -> npt.NDArray[np.float32]:
    if kind.mantissa == 7:
        return (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found.view(np.float16 if kind.mantissa == 10 else np.float32).astype(np.float32)


def signed(zigzag: Numbers) -> npt.NDArray[np.int32]:
    """What zig-zag coded numbers stand for."""
    return ((zigzag >> np.uint32(1)) ^ (np.uint32(0) - (zigzag & np.uint32(1)))).view(np.int32)


def zigzag(steps: npt.NDArray[np.int32]) -> Numbers:
    """The inverse of `signed`."""
    return ((steps << np.int32(1)) ^ (steps >> np.int32(31))).view(np.uint32)


def contexts(
    old: Codes, kind: Kind, scale: int, rows: Scales | None, columns: Scales | None, width: int
) -> npt.NDArray[np.uint8]:
    """Which of 64 classes of expected distance each number is in, half an octave each.

    Args:
        old: the numbers before, row by row.
        kind: of the numbers.
        scale: by how much they move, in half octaves of their value.
        rows: how much more or less each row moves, in half octaves; None: all alike.
        columns: the same for columns.
        width: numbers in a row; the last may be shorter.
    """
    found = np.full(len(old), scale + _ZERO_CONTEXT, np.int16)
    if kind.mantissa:
        exponent = (old >> kind.dtype(kind.mantissa)) & kind.dtype((1 << (8 * kind.width - 1 - kind.mantissa)) - 1)
        # Denormals share the scale of the smallest exponent.
        found += 2 * (kind.bias + kind.mantissa) - 2 * np.maximum(exponent, 1).astype(np.int16)
    if rows is not None:
        found += np.repeat(rows, width)[: len(old)]
    if columns is not None:
        whole = len(old) // width * width
        found[:whole].reshape(-1, width)[:] += columns
        found[whole:] += columns[: len(old) - whole]
    return np.clip(found, 0, CONTEXTS - 1).astype(np.uint8)


def changes(new: Codes, old: Codes, kind: Kind) -> npt.NDArray[np.float64]:
    """By how much each value moved, as a value; what is not finite counts as not moved."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = values(new, kind) - values(old, kind)
    return np.where(np.isfinite(found), found, 0.0)


def values(found: Codes, kind: Kind) -> npt.NDArray[np.float64]:
    """What bit patterns stand for."""
    if kind.mantissa:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return _as_float32(found, kind).astype(np.float64)
    if kind.packed:
        return ((found << np.uint8(4)).view(np.int8) >> np.int8(4)).astype(np.float64)
    return found.view(np.int8).astype(np.float64)
