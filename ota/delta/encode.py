"""Build a delta: plan its records, then encode each in the shortest of the available ways, a few records at a time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import bsdiff4
import numpy as np

from ota.delta import streams, updates
from ota.delta.blocks import WINDOWS
from ota.delta.describe import payload_of
from ota.delta.format import (
    BSDIFF,
    KINDS,
    MAX_CHUNK,
    MAX_RECORDS,
    MAX_SMALL,
    NUMBERS,
    RECORD,
    SAME,
    UPDATE,
    UPDATE_WEIGHS,
    VERSION,
    ZSTD,
    ZSTD_PREFIX,
    pack_header,
)  # fmt: skip
from ota.delta.header import DeltaFile, Header
from ota.delta.numbers import KINDS as KIND_NAMES
from ota.delta.plain import (
    LEAST_KNOWN,
    LEVELS,
    Record,
    compress,
    elsewhere,
    encode_plain,
    parts_of,
    record,
    size_of,
)  # fmt: skip
from ota.delta.plan import LEAST_PLAIN, Elements, File, Pair, Piece, is_plain, is_update, moved, open_file, plan, sha256_of
from ota.errors import DeltaError
from ota.limits import KiB

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Built", "Elements", "Pair", "build", "write"]

WORKERS = 2  # records that are encoded at once, however many cores there are: each takes memory
MANY = 32  # records of a file; from so many on, several are encoded at once
LEVEL = 9  # of zstd, for numbers that are encoded without a base
FAR = 0.6  # share of its bytes; a record of numbers that takes more is also tried as plain bytes
LIKE_NUMBERS = 0.2  # share of its bytes; a small file that takes more is also tried as numbers of an unknown kind
SEGMENT_COST = 5.0  # bytes that a segment's row in the record's table costs
RECORD_COST = 400.0  # bytes that a record costs besides its numbers
SPARSE_LOSS, DENSE_LOSS = 0.03, 0.005  # shares by which streams exceed their entropy, where few and where many numbers move
LOOKED = 128 * KiB  # bytes of a large tensor that are enough to estimate its size

Made = TypeVar("Made")


@dataclass(frozen=True)
class Built:
    """The result of building a delta."""

    size: int
    by_kind: dict[str, int]
    """Payload bytes by record kind."""


def build(pairs: Sequence[Pair], base: str, target: str, out: Path, version: int = VERSION) -> Built:
    """Write the delta that turns the old files into the new ones.

    Args:
        pairs: the files of the new bundle, each with its predecessor.
        base: sha256 of the old bundle's manifest, or of the old plain file.
        target: sha256 of the new bundle's manifest, or of the new plain file.
        out: file to write.
        version: of the format; agents before 0.3.0 read version 1 alone.

    Raises:
        DeltaError: a bundle's file that is neither weights nor an overlay is larger than `MAX_SMALL`, or its predecessor is; a file takes more than
            `MAX_RECORDS` records; or its `Elements` overlap, end inside a number or go past its end.
        OperatorError: a file became shorter while it was read.
    """
    with out.open("wb") as file:
        return write(pairs, base, target, file, version)


def write(pairs: Sequence[Pair], base: str, target: str, file: BinaryIO, version: int = VERSION) -> Built:
    """Write the delta to an open file; arguments and errors are those of `build`."""
    plans: list[list[list[Piece]]] = [plan(pair, version) for pair in pairs]
    file.write(header_of(pairs, base, target, version))
    by_kind = dict.fromkeys(KINDS.values(), 0)
    for pair, groups in zip(pairs, plans, strict=True):
        count = 0
        for kind, length, check, base_offset, payload in _encode(pair, groups, version):
            count += UPDATE_WEIGHS if kind == UPDATE else 1
            if count > MAX_RECORDS:
                raise DeltaError(f"a file would take more than {MAX_RECORDS} records; publish it without a delta")
            file.write(RECORD.pack(kind, length, len(payload), base_offset, check) + payload)
            by_kind[KINDS[kind]] += len(payload)
    return Built(file.tell(), by_kind)


def header_of(pairs: Sequence[Pair], base: str, target: str, version: int = VERSION) -> bytes:
    """Make the bytes that a delta begins with: prefix and header."""
    files = [
        DeltaFile(
            target=pair.entry,
            base=(pair.old_sha256 or sha256_of(pair.old)) if pair.old else None,
            base_size=pair.old.stat().st_size if pair.old else 0,
        )
        for pair in pairs
    ]
    return pack_header(Header(base=base, target=target, files=files), version)


def _encode(pair: Pair, groups: list[list[Piece]], version: int) -> Iterator[Record]:
    new, old = open_file(pair.new), open_file(pair.old) if pair.old else None
    if pair.whole and groups:
        yield from encode_small(new, old)
        return
    for records in _side_by_side([partial(encode_group, group, new, old, version) for group in groups]):
        yield from records


def _side_by_side(calls: Sequence[Callable[[], Made]]) -> Iterator[Made]:
    """Yield the results of calls in order; only a few calls are under way at once, so memory stays bounded."""
    workers = min(os.cpu_count() or 1, WORKERS)
    if len(calls) < MANY:  # small tensors take mostly Python's own time, in which threads would only compete for its lock
        yield from (call() for call in calls)
        return
    from concurrent.futures import ThreadPoolExecutor  # imports logging, which small deltas do not need

    with ThreadPoolExecutor(workers) as pool:  # numpy and zstd release the interpreter's lock
        waiting: deque[Future[Made]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode_small(new_file: File, old_file: File | None) -> list[Record]:
    if max(new_file.size, old_file.size if old_file else 0) > MAX_SMALL:
        raise DeltaError(f"a file of {new_file.size} bytes is too large for a delta of plain files; the limit is {MAX_SMALL}")
    new, old = new_file[: new_file.size].tobytes(), old_file[: old_file.size].tobytes() if old_file else b""
    if new == old:
        return [record(SAME, new, 0, b"")]
    ways = [[record(ZSTD, new, 0, compress(new, LEVELS[-1]))]]
    if old:
        ways.append([record(BSDIFF, new, 0, bsdiff4.diff(old, new))])
    if len(old) >= LEAST_KNOWN:
        ways.append([record(ZSTD_PREFIX, new, 0, streams.compress_with_prefix(new, old, LEVELS[-1]))])
    if old_file and len(new) >= LEAST_PLAIN and size_of(min(ways, key=size_of)) > LIKE_NUMBERS * len(new):
        ways.append(encode_plain(Piece(0, len(new), KIND_NAMES["bytes"], 0, 0, False), new, old_file))
    return min(ways, key=size_of)


def encode_group(group: list[Piece], new: File, old: File | None, version: int = VERSION) -> list[Record]:
    if is_update(group):
        return [encode_update(group, new)]
    first = group[0]
    made = new[first.start : group[-1].start + group[-1].length].tobytes()
    if first.old is not None and len(group) == 1 and first.same and len(made) <= MAX_CHUNK:
        return [record(SAME, made, first.old, b"")]
    if len(group) == 1 and is_plain(first):
        return encode_plain(first, made, old)
    ways = [[record(NUMBERS, made, 0, payload_of(group, made, old, version))]]
    if size_of(ways[0]) > FAR * len(made):  # so far from the old numbers that these help little
        ways.append([record(ZSTD, made, 0, compress(made, LEVEL))])
        if old and len(old.blocks.places(np.frombuffer(made, np.uint8))) > WINDOWS // 2:
            ways.append([elsewhere(part, old, LEVELS) for part in parts_of(made, old)])
    return min(ways, key=size_of)


def encode_update(group: list[Piece], new: File) -> Record:
    """Encode pieces that stay, or that the trainer's factors make exactly, as one record."""
    stretches: list[updates.Stretch] = []
    for piece in group:
        found, last = moved(piece), stretches[-1] if stretches else None
        if last and last.way == found.way == updates.SAME and last.old + last.length == found.old:
            stretches[-1] = replace(last, length=last.length + found.length)
        else:
            stretches.append(found)
    start, checks = group[0].start, list[bytes]()
    for part in updates.pieces(stretches):
        checks.append(hashlib.blake2b(new[start : start + part.length].tobytes(), digest_size=updates.CHECK).digest())
        start += part.length
    return UPDATE, sum(piece.length for piece in group), checks[0], 0, updates.pack(stretches, checks)
