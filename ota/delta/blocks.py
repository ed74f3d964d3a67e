"""Find where bytes of a new file lie in the old one, if they were moved.

This serves bytes that are not numbers, and numbers that do not resemble their predecessors. The method is that of rsync (Tridgell
1999). The old file is cut into blocks, which are indexed by hash. A piece of the new file is searched in a few windows; in these,
a block may begin at any byte. The block size grows with the file, so memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

LEAST_BLOCK = 32  # bytes
MOST_BLOCKS = 1 << 20  # blocks of a file; their hashes and offsets take 16 MiB
WINDOWS = 64  # windows that are searched in a piece of the new file
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers have inverses modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


class Blocks:
    """The blocks of an old file, indexed by hash."""

    def __init__(self, pieces: Iterable[npt.NDArray[np.uint8]], size: int) -> None:
        """Hash the blocks of a file.

        Args:
            pieces: the file's bytes in order; every piece but the last holds whole blocks.
            size: the file's length in bytes.
        """
        self.block = block_size(size)
        powers = _powers(_BASE, self.block)
        found = [
            (p[: len(p) // self.block * self.block].reshape(-1, self.block) * powers).sum(axis=1, dtype=np.uint64) for p in pieces
        ]
        hashes = np.concatenate(found) if found else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        # A block that occurs several times, such as padding, does not show where a piece comes from.
        alone = np.ones(len(hashes) + 1, np.bool_)
        alone[1:-1] = hashes[1:] != hashes[:-1]
        alone = alone[1:] & alone[:-1]
        self._hashes, self._places = hashes[alone], order[alone].astype(np.int64) * self.block

    def places(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Return the offsets in the old file of its blocks that occur in windows of a piece of the new file, ascending."""
        if not len(self._hashes) or len(piece) < 2 * self.block:
            return np.zeros(0, np.int64)
        apart = max(2 * self.block, len(piece) // WINDOWS)
        found = []
        for start in range(0, len(piece) - 2 * self.block + 1, apart):
            hashes = _each(piece[start : start + 2 * self.block], self.block)
            at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            found.append(self._places[at[self._hashes[at] == hashes]])
        return np.sort(np.concatenate(found))


def block_size(size: int) -> int:
    """Return the block size for a file of `size` bytes: a power of two, in bytes."""
    block = LEAST_BLOCK
    while size > block * MOST_BLOCKS:
        block *= 2
    return block


def densest(places: npt.NDArray[np.int64], length: int) -> int:
    """Return where a stretch of `length` bytes begins that holds the most of `places`, which are ascending and not empty."""
    held = np.searchsorted(places, places + length) - np.arange(len(places))
    return int(places[held.argmax()])


def _each(window: npt.NDArray[np.uint8], block: int) -> Hashes:
    """Return the hash of the block that begins at each byte of a window, as far as a whole block follows."""
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(window * _powers(_BASE, len(window)), dtype=np.uint64)))
    starts = len(window) - block + 1
    return (sums[block:] - sums[:starts]) * _powers(_INVERSE, starts)


def _powers(base: np.uint64, count: int) -> Hashes:
    """Return the first `count` powers of `base`, 1, base, base², …, modulo 2^64."""
    found: Hashes = np.multiply.accumulate(np.concatenate((np.ones(1, np.uint64), np.full(count - 1, base, np.uint64))))
    return found
