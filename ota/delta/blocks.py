"""Where the bytes of a new file lie in the old one, if they were moved: for what is no numbers, or numbers nobody can follow.

Like rsync (Tridgell 1999): the old file's blocks are known by their hashes; the new one is looked at in a few windows, at each byte of which a
block may begin. Blocks grow with the file, so that memory does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

LEAST_BLOCK = 32  # bytes
MOST_BLOCKS = 1 << 20  # of a file: 16 MiB of hashes and places
WINDOWS = 64  # that are looked at in a piece of the new file
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers have inverses modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


class Blocks:
    """The blocks of an old file by their hashes."""

    def __init__(self, pieces: Iterable[npt.NDArray[np.uint8]], size: int) -> None:
        """Hash a file of that size, which comes in pieces of whole blocks."""
        self.block = block_size(size)
        powers = _powers(_BASE, self.block)
        found = [
            (p[: len(p) // self.block * self.block].reshape(-1, self.block) * powers).sum(axis=1, dtype=np.uint64) for p in pieces
        ]
        hashes = np.concatenate(found) if found else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        alone = np.ones(
            len(hashes) + 1, np.bool_
        )  # what comes several times, such as padding, says nothing of where a piece is from
        alone[1:-1] = hashes[1:] != hashes[:-1]
        alone = alone[1:] & alone[:-1]
        self._hashes, self._places = hashes[alone], order[alone].astype(np.int64) * self.block

    def places(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Where blocks that lie in a piece of the new file lie in the old one, in order."""
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
    """Bytes of a block of a file of that size, a power of two."""
    block = LEAST_BLOCK
    while size > block * MOST_BLOCKS:
        block *= 2
    return block


def densest(places: npt.NDArray[np.int64], length: int) -> int:
    """Where a stretch of that length begins that holds the most of these places, which are in order and at least one."""
    held = np.searchsorted(places, places + length) - np.arange(len(places))
    return int(places[held.argmax()])


def _each(window: npt.NDArray[np.uint8], block: int) -> Hashes:
    """The hash of the block that begins at each byte of a window, but for the last ones."""
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(window * _powers(_BASE, len(window)), dtype=np.uint64)))
    starts = len(window) - block + 1
    return (sums[block:] - sums[:starts]) * _powers(_INVERSE, starts)


def _powers(base: np.uint64, count: int) -> Hashes:
    """1, base, base², … modulo 2^64."""
    found: Hashes = np.multiply.accumulate(np.concatenate((np.ones(1, np.uint64), np.full(count - 1, base, np.uint64))))
    return found
