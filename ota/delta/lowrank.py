"""Find two thin matrices of integers whose product is most of a change; a device uses them in `numbers.predicted`.

A retraining of few steps moves a matrix by almost a product of two thin ones. So does a retraining of low-rank factors that are
merged into the weights (LoRA, Hu et al. 2022). Sending the thin matrices, and what their product misses, takes fewer bytes than
sending how far every number moved.

The method is subspace iteration from a fixed sketch (Halko, Martinsson, Tropp 2011), with one difference: matrices that are
multiplied hold only integers, so small that no sum is rounded, and everything else is done element by element. So it finds the
same integers on every machine, unlike a library's singular value decomposition.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ota.delta.format import MAX_EXPONENT
from ota.delta.numbers import MAX_FACTOR, Product, multiplied

Matrix = npt.NDArray[np.float64]

WIDTH = 12  # rows of the sketch, and so the largest rank that is found
RANKS = (1, 2, 3, 4, 6, 8, 12)
LEAST_SIDE = 16  # rows and columns; with fewer of either a product cannot pay
LEAST_SHARE = 0.25  # share of the change's energy that must be found; of noise, a sketch finds a tenth
_FINE = 21  # bits of a change's root mean square as an integer
_UNIT, _SHARP = 20, 28  # bits of a unit vector's length; the second where a product misses almost nothing
_ROUGH = 14  # bits to which vectors are rounded before products of them with each other
_EXACT = 1e-7  # share of a change's energy; a product that misses less counts as exact
_NOISE = 0.1  # share of the energy that a product misses, which rounding its factors may add


def find(change: Matrix, least: float) -> Product | None:
    """Find the product that promises to save most, or None if none promises to save anything.

    Args:
        change: by how much each number moved, [rows, columns]; it is overwritten.
        least: the distance between neighbouring numbers of the kind; smaller differences do not matter.
    """
    m, n = change.shape
    if min(m, n) < LEAST_SIDE:
        return None
    power = float(np.square(change).mean())
    if not 1e-60 < power < 1e60:
        return None
    unit = math.frexp(math.sqrt(power))[1] - _FINE
    whole = np.multiply(change, 2.0**-unit, out=change)
    np.rint(np.clip(whole, -(2.0**28), 2.0**28, out=whole), out=whole)
    energy = power * m * n * 4.0**-unit
    width = min(WIDTH, min(m, n) // 4)
    over = _orthonormal(multiplied(_sketch(width, m), whole), _UNIT)  # [width, n]
    left = _orthonormal(multiplied(over, whole.T), _UNIT)  # [width, m]
    right, missed = _fitted(left, whole, _UNIT, LEAST_SHARE * energy)
    if right is None:
        return None
    best = _planned(right, missed, m, least * 2.0**-unit)
    bits = _UNIT
    if missed < _EXACT * energy:  # the change is such a product, apart from rounding, so find it more precisely
        bits, sizes = _SHARP, np.square(right).sum(axis=1)
        left = _orthonormal(_times(_orthonormal(right[sizes > _EXACT * energy], bits), whole.T, bits), bits)
        right, missed = _fitted(left, whole, bits, 0.0)
        if right is None:
            return None
        best = _planned(right, missed, m, least * 2.0**-unit)
    if best.saved <= 0 or abs(best.exponent + unit) > MAX_EXPONENT:
        return None
    shifts = np.array(best.shifts, np.float64)[:, None]
    sides = left[best.order] * np.exp2(shifts - bits), right[best.order] * np.exp2(-shifts - best.exponent)
    less = [max(0, math.frexp(np.abs(side).max() / MAX_FACTOR)[1]) for side in sides]
    whole_sides = [np.rint(side * 2.0**-bits).astype(np.int32) for side, bits in zip(sides, less, strict=True)]
    return Product(len(shifts), best.exponent + unit + sum(less), np.ascontiguousarray(whole_sides[0].T), whole_sides[1])


def _fitted(left: Matrix, whole: Matrix, bits: int, least: float) -> tuple[Matrix | None, float]:
    """Fit the other side by least squares, [width, n]; return it and the energy that the product misses.

    The side is None if `left` is degenerate, or if the first fit has less energy than `least`.
    """
    right, rest, missed = np.zeros((len(left), whole.shape[1])), whole, math.inf
    factor = _cholesky(_gram(left, bits - _ROUGH))
    if factor is None:
        return None, missed
    for _ in range(4):  # the triangular factor is coarse, so what is left is fitted again
        found = _times(left, rest, bits) * 4.0 ** -(bits - _ROUGH)  # then solved twice by the triangular factor
        for i in range(len(left)):
            found[i] /= factor[i, i]
            found[i + 1 :] -= np.multiply.outer(factor[i, i + 1 :], found[i])
        for i in reversed(range(len(left))):
            found[i] /= factor[i, i]
            found[:i] -= np.multiply.outer(factor[:i, i], found[i])
        found = np.rint(found * 2.0**bits)  # in the unit of `whole`
        if float(np.square(found).sum()) < least:
            return None, missed
        least = 0.0
        right += found
        rest = whole - _times(np.ascontiguousarray(left.T), right, bits) * 2.0**-bits
        np.rint(rest * 16, out=rest)
        rest /= 16
        before, missed = missed, float(np.square(rest).sum())
        if missed > 1e-4 * np.square(right).sum() or missed > before / 4:
            break
    return right, missed


@dataclass(frozen=True)
class _Plan:
    saved: float  # bits
    exponent: int  # of the product, in the change's unit
    order: npt.NDArray[np.intp]  # of the rows that are taken
    shifts: list[int]  # for each of them, the power of two that its left side is multiplied by


def _planned(right: Matrix, missed: float, m: int, least: float) -> _Plan:
    """Choose how many rows to take and how finely to round them, by how much of the change each explains."""
    found = np.square(right).sum(axis=1)  # energy
    order = np.argsort(-found, kind="stable")
    ranked, n, floor = found[order].tolist(), right.shape[1], least * least / 12
    amplitudes = [math.sqrt(max(size, 1e-9) / (m * n)) for size in ranked]  # root mean square of each row's part of the product
    logs = [_log2(amplitude) for amplitude in amplitudes]
    best, whole = _Plan(0.0, 0, order[:0], []), (missed + sum(ranked)) / (m * n) + floor
    for rank in RANKS:
        if rank <= len(ranked):
            rest = (missed + sum(ranked[rank:])) / (m * n) + floor
            # Rounding both sides adds 2^exponent / 6 · sum(amplitudes) to the mean square, if their entries have similar sizes.
            exponent = math.floor(_log2(6 * _NOISE * rest / sum(amplitudes[:rank])))
            entries = [(log - exponent) / 2 for log in logs[:rank]]  # the entries' size, as a power of two
            saved = m * n * _log2(whole / rest) / 2 - (m + n) * sum(max(entry + 2.05, 1.0) for entry in entries)
            if saved > best.saved:
                best = _Plan(saved, exponent, order[:rank], [round(max(entry, -10) + math.log2(m) / 2) for entry in entries])
    return best


def _orthonormal(rows: Matrix, bits: int) -> Matrix:
    """Return rows that span almost the same space, of unit length and almost orthogonal; entries are integers, 2^bits being 1."""
    found = np.rint(rows * 2.0 ** (bits - math.frexp(np.abs(rows).max())[1]))
    factor = _cholesky(_gram(found, bits - _ROUGH))
    if factor is None:
        return np.zeros_like(found)
    found *= 2.0 ** -(bits - _ROUGH)
    for i in range(len(found)):
        found[i] /= factor[i, i]
        found[i + 1 :] -= np.multiply.outer(factor[i, i + 1 :], found[i])
    return np.rint(found * 2.0**bits)


def _times(left: Matrix, right: Matrix, bits: int) -> Matrix:
    """Multiply matrices of integers exactly; split those of `left` in two if their many bits would make sums be rounded."""
    if bits <= _UNIT:
        return multiplied(left, right)
    high = np.rint(left * 2.0**-_ROUGH)
    return multiplied(high, right) * 2.0**_ROUGH + multiplied(left - high * 2.0**_ROUGH, right)


def _gram(rows: Matrix, less: int) -> Matrix:
    """Return the products of rows with each other, after rounding `less` bits away."""
    rough = np.rint(rows * 2.0**-less)
    found: Matrix = rough @ rough.T
    return found


def _cholesky(gram: Matrix) -> Matrix | None:
    """Compute the upper triangular R with R'R = gram; None if `gram` is zero or not finite.

    A row that depends on those before it gets so large a diagonal entry that solving by R leaves nothing of it.
    """
    factor, rest = np.zeros_like(gram), gram.copy()
    first = float(np.abs(gram).max())
    if not 0 < first < np.inf:
        return None
    for i in range(len(gram)):
        pivot = float(rest[i, i])
        if pivot <= 1e-9 * first:
            factor[i, i] = 1e6 * math.sqrt(first)
            continue
        factor[i, i:] = rest[i, i:] / math.sqrt(pivot)
        rest[i + 1 :, i + 1 :] -= np.multiply.outer(factor[i, i + 1 :], factor[i, i + 1 :])
    return factor


def _log2(value: float) -> float:
    """Return the logarithm to base 2, rounded so that machines agree even if their last digits differ."""
    return round(math.log2(max(value, 1e-300)), 6)


@functools.lru_cache(maxsize=64)
def _sketch(width: int, n: int) -> Matrix:
    """Return the fixed pseudo-random signs of the sketch, [width, n]."""
    drawn = np.frombuffer(hashlib.shake_256(b"deltaferry").digest(-(-width * n // 8)), np.uint8)
    return np.unpackbits(drawn)[: width * n].reshape(width, n).astype(np.float64) * 2 - 1
