"""Encode bytes that are not numbers, or are numbers of an unknown kind.

zstd compresses them and may refer to the range of the old file they came from, or they are encoded as the numbers they look like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from backports import zstd

from ota.delta import numbers, streams
from ota.delta.blocks import densest
from ota.delta.describe import describe, payload_of
from ota.delta.format import MAX_NUMBERS, MAX_RANGE, NUMBERS, RECORD, ZSTD, ZSTD_PREFIX
from ota.delta.numbers import KINDS, Kind
from ota.delta.plan import LEAST_PLAIN, File, Piece
from ota.limits import KiB

LEVELS = (3, 9, 19)  # of zstd; the last takes twenty times as long as the one before
LEAST_KNOWN = 8  # bytes of the shortest range that zstd can refer to
HALVINGS_WITHOUT_GAIN = 2  # times that a record may be halved in a row without getting smaller
LEAST_PART = 2 * KiB  # bytes of the shortest part that a record is cut into
UNCUT_BELOW = 0.002  # share of its length; a record that is compressed to less is not cut
FAST_LEVEL_BELOW = 0.03  # share of its length; a record that is compressed to less is not tried at the slowest level
LOOKED = 64 * KiB  # bytes that are examined to find what kind of numbers they are

Record = tuple[int, int, bytes, int, bytes]  # kind, length, check, base offset, payload


def record(kind: int, new: bytes, base_offset: int, payload: bytes) -> Record:
    """Build a record that makes `new`."""
    return kind, len(new), hashlib.blake2b(new, digest_size=16).digest(), base_offset, payload


def size_of(records: Sequence[Record]) -> int:
    """Sum the bytes that records take in a delta."""
    return sum(RECORD.size + len(record[4]) for record in records)


def encode_plain(piece: Piece, made: bytes, old: File | None) -> list[Record]:
    """Compress bytes against the old range they came from, or as differences if they look like numbers at an unchanged offset.

    A part becomes differences if these take 5 % less than zstd's fastest level, and if that level does not compress it very well.
    """
    if old is None:
        return [elsewhere(made, None, LEVELS)]
    found: list[Record] = []
    at = 0
    for part in parts_of(made, old):
        quick = quick_size([part], old)
        as_numbers: list[Record] = []
        if quick > FAST_LEVEL_BELOW * len(part) and piece.old is not None and piece.old + at + len(part) <= old.size:
            for first in range(0, len(part), MAX_NUMBERS):
                chunk = part[first : first + MAX_NUMBERS]
                there = replace(piece, start=0, length=len(chunk), old=piece.old + at + first, same=False)
                as_numbers.append(record(NUMBERS, chunk, 0, payload_of(_guessed(there, chunk, old), chunk, old)))
        found += as_numbers if as_numbers and size_of(as_numbers) < 0.95 * quick else [elsewhere(part, old, LEVELS)]
        at += len(part)
    return found


def _guessed(piece: Piece, made: bytes, old: File) -> list[Piece]:
    """Cut a piece into the numbers that its bytes look most like, and the bytes before the first and after the last of them."""
    kind, phase, _ = looks(piece, made, old)
    if kind.name == "bytes":
        return [piece]
    ends = [0, phase, phase + (len(made) - phase) // kind.width * kind.width, len(made)]
    kinds = KINDS["bytes"], kind, KINDS["bytes"]
    return [
        replace(piece, start=start, length=stop - start, kind=kind, old=(piece.old or 0) + start)
        for kind, start, stop in zip(kinds, ends, ends[1:], strict=False)
        if stop > start
    ]


def looks(piece: Piece, made: bytes, old: File) -> tuple[Kind, int, float]:
    """Find the kind of numbers that bytes look most like, by a sample from the middle.

    Returns:
        The kind, the byte at which the first number begins, and the estimated cost of each byte in bytes.
    """
    best, middle = (KINDS["bytes"], 0, 1.0), len(made) // 2 // 8 * 8
    looked = min(LOOKED, len(made) - middle - 8)
    for kind in KINDS.values():
        for phase in range(kind.width if not kind.packed and looked >= LEAST_PLAIN // 4 else 0):
            first, length = middle + phase, looked // kind.width * kind.width
            after, before = (
                made[first : first + length],
                old[(piece.old or 0) + first : (piece.old or 0) + first + length].tobytes(),
            )
            said = describe(Piece(0, length, kind, 0, 0, False), numbers.codes(after, kind), numbers.codes(before, kind))
            if said.cost / length < (best[2] if kind.name == "bytes" else 0.95 * best[2]):
                best = kind, phase, said.cost / length
    return best


def parts_of(made: bytes, old: File, hope: int = HALVINGS_WITHOUT_GAIN) -> list[bytes]:
    """Cut bytes in halves as long as that pays in the end, which it does if they come from places that lie far apart."""
    whole, half = quick_size([made], old), len(made) // 2
    if half < LEAST_PART or whole < UNCUT_BELOW * len(made) or not hope:
        return [made]
    pays = quick_size([made[:half], made[half:]], old) < 0.95 * whole
    parts = [
        part for side in (made[:half], made[half:]) for part in parts_of(side, old, HALVINGS_WITHOUT_GAIN if pays else hope - 1)
    ]
    return parts if pays or quick_size(parts, old) < 0.95 * whole else [made]


def quick_size(parts: Sequence[bytes], old: File) -> int:
    """Estimate how many bytes parts take if made from elsewhere in the old file: their size at zstd's fastest level."""
    return size_of([elsewhere(part, old, LEVELS[:1]) for part in parts])


def elsewhere(made: bytes, old: File | None, levels: Sequence[int]) -> Record:
    """Compress bytes by zstd against the range of the old file where most of them came from; alone if they came from none."""
    places = old.blocks.places(np.frombuffer(made, np.uint8)) if old else np.zeros(0, np.int64)
    known, start = b"", 0
    if old and len(places) and old.size >= LEAST_KNOWN:
        start = max(0, densest(places, MAX_RANGE // 2) - MAX_RANGE // 4)
        known = old[start : min(start + MAX_RANGE, old.size)].tobytes()
    ways: list[bytes] = []
    for level in levels:
        ways.append(streams.compress_with_prefix(made, known, level) if known else compress(made, level))
        if level != levels[0] and len(min(ways, key=len)) < FAST_LEVEL_BELOW * len(made):
            break
    return record(ZSTD_PREFIX if known else ZSTD, made, start, min(ways, key=len))


def compress(data: bytes, level: int) -> bytes:
    """Compress bytes by zstd alone."""
    return zstd.compress(data, level)
