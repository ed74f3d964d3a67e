"""Overlays: the numbers in which the weights of one variant differ from those of another variant of the same bundle.

A thin student has most of its weights from `full`, bit by bit. Its bundle holds only the others: ranges of the weights file, one
after the other, as they are stored in it. The device puts them over the weights of the base when it loads the variant.

The ranges are not compressed, on purpose: the delta between two bundles (`ota.delta`) then sees numbers that moved a little, as it
does in weights, and copies those that stayed. docs/delta-format.md describes the format to the byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ota.errors import ManifestError

MAGIC = b"DFOVERL"
VERSION = 1
MAX_RANGES = 4096
PREFIX = struct.Struct("<7sBI")  # magic, version, ranges
RANGE = struct.Struct("<QQ")  # offset in the weights, bytes


@dataclass(frozen=True)
class Range:
    """A range of the weights file that an overlay replaces."""

    offset: int
    """Where it begins in the weights file, in bytes."""
    length: int
    at: int
    """Where its bytes begin in the overlay."""


def make(base: bytes, new: bytes, stretches: Iterable[tuple[int, int]]) -> bytes | None:
    """Make the overlay that turns the weights of the base into the new ones.

    Args:
        base: weights that the device starts from.
        new: weights to make, as long as those of the base.
        stretches: offset and length of each tensor; one that differs is replaced as a whole, so the same tensors make the same ranges.

    Returns:
        The overlay; None if no overlay of these stretches makes the new weights.
    """
    taken: list[tuple[int, int]] = []
    end = 0
    for offset, length in sorted(stretches):
        if offset >= end and base[offset : offset + length] != new[offset : offset + length]:
            taken.append((offset, length))
            end = offset + length
    if len(base) != len(new) or not 0 < len(taken) <= MAX_RANGES:
        return None
    table = b"".join(RANGE.pack(offset, length) for offset, length in taken)
    made = PREFIX.pack(MAGIC, VERSION, len(taken)) + table + b"".join(new[at : at + length] for at, length in taken)
    return made if compose(base, made) == new else None


def ranges(overlay: bytes) -> list[Range]:
    """Read the table of an overlay, and check it; memory is bounded by the overlay's own length.

    Raises:
        ManifestError: it is not an overlay, is of another version, or its table and its length do not fit together.
    """
    if len(overlay) < PREFIX.size:
        raise _faulty("ends inside its first bytes")
    magic, version, count = PREFIX.unpack_from(overlay)
    if magic != MAGIC:
        raise _faulty("does not begin as an overlay")
    if version != VERSION:
        raise _faulty(f"has format version {version}, but this agent reads {VERSION}")
    if not 0 < count <= MAX_RANGES:
        raise _faulty(f"lists {count} ranges, but must list 1 to {MAX_RANGES}")
    at = PREFIX.size + count * RANGE.size
    if len(overlay) < at:
        raise _faulty("ends inside its table")
    found: list[Range] = []
    end = 0
    for offset, length in RANGE.iter_unpack(overlay[PREFIX.size : at]):
        if not length or offset < end:
            raise _faulty("has ranges that are empty, overlap or are out of order")
        found.append(Range(offset, length, at))
        at, end = at + length, offset + length
    if at != len(overlay):
        raise _faulty(f"lists {at} bytes, but has {len(overlay)}")
    return found


def compose(base: bytes, overlay: bytes) -> bytes:
    """Put an overlay over the weights of its base; what comes out is as long as the base.

    Raises:
        ManifestError: it is not an overlay, or it does not fit these weights.
    """
    found = ranges(overlay)
    if found[-1].offset + found[-1].length > len(base):
        raise _faulty(f"replaces bytes beyond the {len(base)} of its base")
    return b"".join(_parts(memoryview(base), memoryview(overlay), found))


def _parts(base: memoryview, overlay: memoryview, found: Sequence[Range]) -> Iterable[memoryview]:
    end = 0
    for part in found:
        yield base[end : part.offset]
        yield overlay[part.at : part.at + part.length]
        end = part.offset + part.length
    yield base[end:]


def _faulty(what: str) -> ManifestError:
    return ManifestError(f"an overlay of the bundle {what}; publish a new release")
