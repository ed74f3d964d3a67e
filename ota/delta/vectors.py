"""Code vectors of integers, such as the columns and rows of factors, so that those of similar size share a stream.

The components of a product fall off in size: a stream of all of them would give coarse and fine ones the same code. So each
vector names its stream, as the difference from the stream of the vector before, because vectors that follow each other are alike.
The largest power of two that divides all entries of a vector is set aside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ota.delta import numbers, sharing, streams
from ota.delta.numbers import CONTEXTS, MAX_FACTOR, Factors
from ota.errors import DeltaError

MAX_SHIFT = 24  # of the common power of two
MAX_STREAMS = 64
_ZERO_CLASS = 16  # class of vectors whose mean size is 1
_STREAM_COSTS = (20.0, 40.0, 80.0, 1e9)  # bytes; the true cost of a stream depends on its numbers, so each of these is tried


def encode(vectors: Sequence[Factors]) -> bytes:
    """Encode vectors, each not empty, with entries of at most `MAX_FACTOR` either way.

    Fewer streams are cheaper where a vector is short, so several groupings are tried and the shortest result is taken.
    """
    lengths = [len(vector) for vector in vectors]
    shifts = np.array([shift(vector) for vector in vectors], np.int64)
    values = numbers.zigzag(np.concatenate([vector >> np.int32(s) for vector, s in zip(vectors, shifts, strict=True)]))
    classes = np.array([size_class(vector) for vector in vectors], np.uint8)
    counts = sharing.joint(np.repeat(classes, lengths), streams.tokens(values)[0])
    said = {sharing.share(counts, 1.0, cost).tobytes() for cost in _STREAM_COSTS}
    ways = [_grouped(values, lengths, np.frombuffer(way, np.uint8)[classes], shifts) for way in sorted(said)]
    return min(ways, key=len)


def decode(reader: streams.Reader, lengths: Sequence[int]) -> list[Factors]:
    """Decode vectors of these lengths; the inverse of `encode`.

    Raises:
        DeltaError: the bytes are damaged, or an entry is too large.
    """
    (count,) = reader.take(1)
    names = np.cumsum(numbers.signed(streams.decode(reader, len(lengths))), dtype=np.int64)
    shifts = streams.decode(reader, len(lengths)).astype(np.int64)
    if not 0 < count <= MAX_STREAMS or int(names.min()) < 0 or int(names.max()) >= count:
        raise DeltaError("a record of the delta names a stream that it does not have; fetch it again")
    if int(shifts.max()) > MAX_SHIFT:
        raise DeltaError("a record of the delta holds a factor that is too large; fetch it again")
    owners = np.repeat(names.astype(np.uint8), lengths)
    found = np.zeros(len(owners), np.int64)
    for number in range(count):
        where = np.flatnonzero(owners == number)
        found[where] = numbers.signed(streams.decode(reader, len(where)))
    found <<= np.repeat(shifts, lengths)
    if int(np.abs(found).max()) > MAX_FACTOR:
        raise DeltaError("a record of the delta holds a factor that is too large; fetch it again")
    return np.split(found.astype(np.int32), np.cumsum(lengths)[:-1])


def size_class(vector: Factors) -> int:
    """Return the class of a vector by its mean size without its common power of two, in half octaves.

    All machines agree, because the sum is exact.
    """
    mean = (int(np.abs(vector.astype(np.int64)).sum()) >> shift(vector)) / len(vector)
    return min(max(int(sharing.half_octaves(np.array(mean))) + _ZERO_CLASS, 0), CONTEXTS - 1)


def shift(vector: Factors) -> int:
    """Return the exponent of the largest power of two that divides all entries; 0 if all are 0."""
    together = int(np.bitwise_or.reduce(vector))
    return min((together & -together).bit_length() - 1, MAX_SHIFT) if together else 0


def _grouped(
    values: streams.Numbers, lengths: Sequence[int], names: npt.NDArray[np.uint8], shifts: npt.NDArray[np.int64]
) -> bytes:
    owners, count = np.repeat(names, lengths), int(names.max()) + 1
    sides = [numbers.zigzag(np.diff(names.astype(np.int64), prepend=0).astype(np.int32)), shifts.astype(np.uint32)]
    parts = [streams.encode(values[np.flatnonzero(owners == number)]) for number in range(count)]
    return bytes([count]) + b"".join([*map(streams.encode, sides), *parts])
