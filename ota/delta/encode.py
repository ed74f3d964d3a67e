"""Making a delta: which stretches are the same, and for the others the shortest way to say how their numbers moved.

Files are read twice, in ranges: once to plan the records, once to encode them, two at a time. So memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import bsdiff4
import numpy as np
import numpy.typing as npt
import zstandard

from ota.delta import numbers, streams
from ota.delta.format import (
    BSDIFF,
    KINDS,
    MAGIC,
    MAX_CHUNK,
    MAX_NUMBERS,
    MAX_RECORDS,
    MAX_SEGMENTS,
    MAX_SMALL,
    NUMBERS,
    PREFIX,
    RECORD,
    SAME,
    VERSION,
    ZSTD,
    DeltaFile,
    Header,
    PlainFile,
    Segment,
    pack_table,
)  # fmt: skip
from ota.delta.numbers import CONTEXTS, Kind, KindName
from ota.delta.numbers import KINDS as KIND_NAMES
from ota.errors import DeltaError
from ota.manifest import FileEntry, KiB, MiB

MAX_BSDIFF = 2 * MiB  # bytes of a plain file for which bsdiff4 is tried; it needs four seconds for each
WORKERS = 2  # records that are encoded at once, on any machine: memory is the bound
LEVEL = 9  # of zstd, for what is made without a base
SAME_RUN = 64 * KiB  # bytes that are the same are worth a record of their own from here on
STREAM_COST = 48  # bytes that another stream costs before it holds anything
TOKEN_COST = 0.7  # bytes that a token adds to a Huffman table
FAR = 0.6  # share of its bytes from which numbers are also tried without their predecessors
SCALE_COST = 0.4  # bytes that a row's or column's scale costs
# Shares by which the size of steps is searched, down to a float32's last bit.
FINER = tuple(2.0**-bits for bits in (11, 14, 17, 20, 23, 24))
NEVER = -2000  # the scale of what does not move at all
MAX_STREAM_CONTEXTS = 24  # neighbouring contexts that may share a stream; bounds the search


@dataclass(frozen=True)
class Elements:
    """A stretch of a file that holds numbers of one kind."""

    offset: int
    length: int  # bytes
    kind: KindName
    row: int  # numbers in a row; 0: it has no rows
    old: int | None  # where its predecessor lies in the old file; None: it has none


@dataclass(frozen=True)
class Pair:
    """One new file, the old one that it follows, and where its numbers lie."""

    entry: FileEntry | PlainFile
    new: Path
    old: Path | None
    elements: Sequence[Elements] = ()

    @property
    def whole(self) -> bool:
        """It goes into one record: it has no numbers, and is small or has to be."""
        if isinstance(self.entry, FileEntry):
            return self.entry.role != "weights"
        return not self.elements and max(self.entry.size, self.old.stat().st_size if self.old else 0) <= MAX_BSDIFF


@dataclass(frozen=True)
class Built:
    """What building a delta gave."""

    size: int
    by_kind: dict[str, int]
    """Payload bytes by record kind."""


@dataclass(frozen=True)
class _Piece:
    """What one record, or a part of one, is about."""

    start: int
    length: int
    kind: Kind
    row: int
    old: int | None  # None: it has no predecessor
    same: bool


def build(pairs: Sequence[Pair], base: str, target: str, out: Path) -> Built:
    """Write the delta that turns the old files into the new ones.

    Args:
        pairs: the files of the new bundle, each with its predecessor.
        base: sha256 of the old bundle's manifest, or of the old plain file.
        target: sha256 of the new bundle's manifest, or of the new plain file.
        out: file to write.

    Raises:
        DeltaError: a file that is not weights is larger than `MAX_SMALL`, or weights have more tensors than a delta can tell, or
            `Elements` that overlap, end inside a number or go past the end.
    """
    plans: list[list[list[_Piece]]] = [_plan(pair) for pair in pairs]
    if any(len(plan) > MAX_RECORDS for plan in plans):
        raise DeltaError(f"a weights file would take more than {MAX_RECORDS} records; publish it without a delta")
    files = [
        DeltaFile(
            target=pair.entry,
            base=sha256_of(pair.old) if pair.old else None,
            base_size=pair.old.stat().st_size if pair.old else 0,
            records=len(plan),
        )
        for pair, plan in zip(pairs, plans, strict=True)
    ]
    header = Header(base=base, target=target, files=files).canonical()
    by_kind = dict.fromkeys(KINDS.values(), 0)
    with out.open("wb") as file:
        file.write(PREFIX.pack(MAGIC, VERSION, len(header)) + header)
        for pair, plan in zip(pairs, plans, strict=True):
            for kind, length, check, base_offset, payload in _encode(pair, plan):
                file.write(RECORD.pack(kind, length, len(payload), base_offset, check) + payload)
                by_kind[KINDS[kind]] += len(payload)
        size = file.tell()
    return Built(size, by_kind)


_Record = tuple[int, int, bytes, int, bytes]  # kind, length, check, base offset, payload


def _record(kind: int, new: bytes, base_offset: int, payload: bytes) -> _Record:
    return kind, len(new), hashlib.blake2b(new, digest_size=16).digest(), base_offset, payload


def _encode(pair: Pair, plan: list[list[_Piece]]) -> Iterator[_Record]:
    if pair.whole and plan:
        yield _encode_small(pair.new.read_bytes(), pair.old.read_bytes() if pair.old else b"")
        return
    new, old = _open(pair.new), _open(pair.old) if pair.old else None
    yield from _side_by_side([lambda group=group: _encode_group(group, new, old) for group in plan])  # type: ignore[misc]


def _side_by_side(calls: Sequence[Callable[[], _Record]]) -> Iterator[_Record]:
    """Results in order; a few at a time, so that memory holds no more than those."""
    workers = min(os.cpu_count() or 1, WORKERS)
    with ThreadPoolExecutor(workers) as pool:  # numpy and zstd work outside the interpreter's lock
        waiting: deque[Future[_Record]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode_small(new: bytes, old: bytes) -> _Record:
    if len(new) > MAX_SMALL or len(old) > MAX_SMALL:
        raise DeltaError(f"a file of {len(new)} bytes is too large for a delta of plain files; the limit is {MAX_SMALL}")
    if new == old:
        return _record(SAME, new, 0, b"")
    whole = _record(ZSTD, new, 0, _compress(new, 19))
    if not old:
        return whole
    return min(whole, _record(BSDIFF, new, 0, bsdiff4.diff(old, new)), key=lambda record: len(record[4]))


# Planning


@dataclass(frozen=True)
class _File:
    """A file that is read in ranges; mapped into memory, what was read once would stay there while there is room."""

    path: Path
    size: int

    def __getitem__(self, wanted: slice) -> npt.NDArray[np.uint8]:
        with self.path.open("rb", buffering=0) as file:
            file.seek(wanted.start)
            return np.frombuffer(file.read(wanted.stop - wanted.start), np.uint8)


def _open(path: Path) -> _File:
    return _File(path, path.stat().st_size)


def _plan(pair: Pair) -> list[list[_Piece]]:
    """What each record is about, in the order of the file; of a file that goes into one record, there is no more to say."""
    if pair.whole:
        return [[]] if pair.entry.size else []
    new, old = _open(pair.new), _open(pair.old) if pair.old else None
    groups: list[list[_Piece]] = []
    for piece in _join(_pieces(pair.elements, new, old)):
        last = groups[-1] if groups else []
        apart = piece.old is None or (piece.same and piece.length >= SAME_RUN)
        apart = apart or not last or last[0].old is None or (last[0].same and last[0].length >= SAME_RUN)
        full = sum(p.length for p in last) + piece.length > MAX_CHUNK or sum(map(_count, last)) + _count(piece) > MAX_NUMBERS
        if apart or full or len(last) == MAX_SEGMENTS:
            groups.append([piece])
        else:
            last.append(piece)
    return groups


def _count(piece: _Piece) -> int:
    return piece.length * 2 if piece.kind.packed else piece.length // piece.kind.width


def _pieces(elements: Sequence[Elements], new: _File, old: _File | None) -> Iterator[_Piece]:
    for stretch in _cover(elements, new.size, 0 if old is None else old.size):
        kind = KIND_NAMES[stretch.kind]
        row = stretch.row * kind.width // (2 if stretch.kind == "int4" else 1) or kind.width  # bytes
        limit = MAX_CHUNK // 4 if stretch.kind == "int4" else min(MAX_CHUNK, MAX_NUMBERS * kind.width)
        step = limit // row * row or limit // kind.width * kind.width
        for first in range(0, stretch.length, step):
            length = min(step, stretch.length - first)
            start, at = stretch.offset + first, None if stretch.old is None else stretch.old + first
            if old is None or at is None or at + length > old.size:
                yield _Piece(start, length, kind, stretch.row, None, False)
            else:
                same = bool(np.array_equal(new[start : start + length], old[at : at + length]))
                yield _Piece(start, length, kind, stretch.row, at, same)


def _join(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """Pieces, with those that are the same and follow each other in both files made one, as long as a record may be."""
    held: _Piece | None = None
    for piece in pieces:
        if (
            held and held.same and piece.same and held.old is not None and held.old + held.length == piece.old
            and held.start + held.length == piece.start and held.length + piece.length <= MAX_CHUNK
        ):  # fmt: skip
            held = _Piece(held.start, held.length + piece.length, KIND_NAMES["bytes"], 0, held.old, True)
        else:
            if held:
                yield held
            held = piece
    if held:
        yield held


def _cover(elements: Sequence[Elements], size: int, old_size: int) -> Iterator[Elements]:
    """The stretches of a file in order, with the gaps between them as plain bytes; bytes end where the old file does."""
    at = 0
    wanted = sorted((e for e in elements if e.length), key=lambda e: e.offset)
    for stretch in [*wanted, Elements(size, 0, "bytes", 0, None)]:
        end = stretch.offset + stretch.length
        if not at <= stretch.offset <= end <= size or stretch.length % KIND_NAMES[stretch.kind].width or (stretch.old or 0) < 0:
            where = f"byte {stretch.offset} of a file of {size}"
            raise DeltaError(f"the numbers at {where} overlap others, are cut short or go past its end; export it again")
        gap = Elements(at, stretch.offset - at, "bytes", 0, at)
        for part in (gap, stretch):
            room = old_size - part.old if part.old is not None else 0
            if part.kind == "bytes" and 0 < room < part.length:
                yield replace(part, length=room)
                part = replace(part, offset=part.offset + room, length=part.length - room, old=None)  # noqa: PLW2901
            if part.length:
                yield part
        at = end


# Encoding numbers


def _encode_group(group: list[_Piece], new: _File, old: _File | None) -> _Record:
    first = group[0]
    made = new[first.start : group[-1].start + group[-1].length].tobytes()
    if first.old is not None and len(group) == 1 and first.same:
        return _record(SAME, made, first.old, b"")
    ways = [(NUMBERS, _numbers(group, new, old))] if first.old is not None else []
    if not ways or len(ways[0][1]) > FAR * len(made):  # so far from the old ones that they say nothing
        ways += [(NUMBERS, _numbers(group, new, None)), (ZSTD, _compress(made, LEVEL))]
    kind, payload = min(ways, key=lambda way: len(way[1]))
    return _record(kind, made, 0, payload)


def _numbers(group: list[_Piece], new: _File, old: _File | None) -> bytes:
    """The payload of a record of numbers; without an old file they move from 0."""
    if old is None:
        group = [replace(piece, old=None) for piece in group]
    segments: list[Segment] = []
    values: list[streams.Numbers] = []
    found: list[npt.NDArray[np.uint8]] = []
    token: list[npt.NDArray[np.uint8]] = []
    missed: list[streams.Numbers] = []
    for piece in group:
        known = old[piece.old : piece.old + piece.length].tobytes() if old and piece.old is not None else bytes(piece.length)
        before = numbers.codes(known, piece.kind)
        after = numbers.codes(new[piece.start : piece.start + piece.length].tobytes(), piece.kind)
        said = _guess(piece, after, before)
        segments.append(said.segment)
        values.append(said.values)
        token.append(said.token)
        found.append(said.segment.contexts(before))
        missed += said.missed
    together, classes = np.concatenate(values), np.concatenate(found)
    stream_of = _share(_histogram(classes, np.concatenate(token)))[1]
    count = int(stream_of.max()) + 1
    rest = b"".join(map(streams.encode, missed))
    made: list[bytes] = []
    if count == 1 or old is None:  # in one stream, where zstd may find what contexts do not tell
        plain = pack_table([replace(segment, rows=None, columns=None) for segment in segments], None)
        width = max(piece.kind.width for piece in group)
        made += [plain + streams.encode(together) + rest, plain + streams.planes(together, width) + rest]
    if count > 1:
        ids = stream_of[classes]
        apart = together[np.argsort(ids, kind="stable")]
        ends = np.cumsum(np.bincount(ids, minlength=count))
        parts = [streams.encode(apart[start:stop]) for start, stop in pairwise([0, *ends.tolist()])]
        made.append(pack_table(segments, stream_of) + b"".join(parts) + rest)
    return min(made, key=len)


@dataclass(frozen=True)
class _Said:
    """How a piece is described: the segment, what its streams hold, what whole steps miss by, and about how many bytes that costs."""

    segment: Segment
    values: streams.Numbers
    token: npt.NDArray[np.uint8]  # of the values
    missed: list[streams.Numbers]
    cost: float


def _guess(piece: _Piece, after: numbers.Codes, before: numbers.Codes) -> _Said:
    """The cheaper of two descriptions of how the numbers of a piece moved: each for itself, or by steps of one size."""
    change = numbers.changes(after, before, piece.kind)
    said = _scaled(piece, change, before, numbers.difference(after, before, piece.kind), None)
    step = _step(change, after, before, piece.kind) if piece.kind.mantissa and piece.old is not None else None
    if step is None:
        return said
    with np.errstate(over="ignore"):
        steps = np.round(change / step).clip(-(2.0**30), 2.0**30).astype(np.int32)
    missed = numbers.difference(after, numbers.stepped(before, steps, step, piece.kind), piece.kind)
    stepped = _scaled(piece, change, before, numbers.zigzag(steps), step)
    apart = [missed[steps == 0], missed[steps != 0]]
    cost = stepped.cost + sum(map(_alone, apart))
    return replace(stepped, missed=apart, cost=cost) if cost < said.cost else said


def _scaled(
    piece: _Piece, change: npt.NDArray[np.float64], before: numbers.Codes, moved: streams.Numbers, step: np.float32 | None
) -> _Said:
    """How far the numbers are said to move: all alike, by row, by column or by both, whichever pays."""
    row = piece.row if 1 < piece.row < len(before) else 0
    distance = np.abs(change) / (1.0 if step is None else float(step))
    mean = distance.mean() if len(distance) else 0.0
    plain = Segment(piece.kind, piece.length, row or len(before) or 1, piece.old, NEVER, None, None, step)
    if not mean:
        return _Said(plain, moved, streams.tokens(moved)[0], [], 0.0)
    plain = replace(plain, scale=int(_half_octaves(mean)))
    ways = [plain]
    if row:
        table = np.pad(distance, (0, -len(distance) % row)).reshape(-1, row)
        rows, columns = (np.clip(_half_octaves(table.mean(axis=a)) - plain.scale, -20, 20).astype(np.int16) for a in (1, 0))
        ways += [replace(plain, rows=rows), replace(plain, columns=columns), replace(plain, rows=rows, columns=columns)]
    token, below = streams.tokens(moved)

    def cost(segment: Segment) -> float:
        sides = sum(len(side) for side in (segment.rows, segment.columns) if side is not None)
        return float(_entropy(_histogram(segment.contexts(before), token)).sum()) + SCALE_COST * sides

    costs = [cost(way) for way in ways]
    cheapest = min(costs)
    best = ways[costs.index(cheapest)]
    return _Said(best, moved, token, [], cheapest + int(below.sum(dtype=np.int64)) / 8)


def _alone(values: streams.Numbers) -> float:
    """Bytes that numbers cost in a stream of their own."""
    token, below = streams.tokens(values)
    return float(_entropy(np.bincount(token, minlength=1)[None]).sum()) + int(below.sum(dtype=np.int64)) / 8


def _step(change: npt.NDArray[np.float64], after: numbers.Codes, before: numbers.Codes, kind: Kind) -> np.float32 | None:
    """The size of the steps that all numbers moved by, if there is one.

    Seen where the kind's own rounding is small against the change: the smallest changes are one step, and all are near multiples of it.
    """
    if not 0.01 < np.count_nonzero(change) / max(len(change), 1) < 0.95:
        return None  # next to nothing moved, or nothing was rounded to no step at all
    with np.errstate(all="ignore"):
        fine = np.flatnonzero(np.abs(change) > 32 * 2.0**-kind.mantissa * np.abs(numbers.values(before, kind)))
        fine = fine[np.isfinite(change[fine])][:: max(1, len(fine) // 16384)]
    size = np.abs(change[fine])
    if len(size) < 64:
        return None
    first = float(np.quantile(size, 0.02))
    step = float(np.median(size[(size > 0.75 * first) & (size < 1.33 * first)]))
    for _ in range(4):
        count = np.round(size / step)
        step = float((size * count).sum() / (count * count).sum()) if count.any() else 0.0
        if not 1e-30 < step < 1e30:
            return None
    if float(np.abs(size / step - np.round(size / step)).mean()) > 0.05:  # 0.25 if there are no steps
        return None
    fine = fine[:: max(1, len(fine) // 2048)]
    steps = np.round(change[fine] / step).astype(np.int32)

    def hits(size: np.float32) -> int:
        return int(np.count_nonzero(numbers.stepped(before[fine], steps, size, kind) == after[fine]))

    found = []
    for finest in (FINER, FINER[-2:]):  # a kind's rounding may hide the last bits of the size, or not
        best = np.float32(step)
        for finer in finest:
            best = max((np.float32(float(best) * (1 + finer * i)) for i in (0, *range(-8, 0), *range(1, 9))), key=hits)
        found.append(best)
    return max(found, key=hits)


def _half_octaves(values: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.round(2 * np.log2(np.maximum(values, 1e-60)))
    return found


def _histogram(classes: npt.NDArray[np.uint8], token: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each token comes in each context, [64, tokens]."""
    joint = classes.astype(np.int32) * streams.TOKENS + token
    return np.bincount(joint, minlength=CONTEXTS * streams.TOKENS).reshape(CONTEXTS, streams.TOKENS)


def _entropy(counts: npt.NDArray[np.number[Any]]) -> npt.NDArray[np.float64]:
    """Bytes for the tokens of each row of a histogram, each row with its own code."""
    total = counts.sum(axis=1, dtype=np.float64)
    found: npt.NDArray[np.float64] = total * np.log2(np.maximum(total, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(axis=1)
    return found / 8


def _share(counts: npt.NDArray[np.number[Any]]) -> tuple[float, npt.NDArray[np.uint8]]:
    """Which stream each context goes to, and the bytes that tokens then cost: neighbours share one where that costs least.

    Dynamic programming over where to cut the used contexts.
    """
    used = np.flatnonzero(counts.sum(axis=1))
    sums = np.concatenate((np.zeros((1, counts.shape[1])), np.cumsum(counts[used], axis=0, dtype=np.float64)))
    cost, cut = [0.0], [0]
    for stop in range(1, len(used) + 1):
        first = max(0, stop - MAX_STREAM_CONTEXTS)
        joined = sums[stop] - sums[first:stop]  # [starts, tokens]
        spent = _entropy(joined) + STREAM_COST + TOKEN_COST * np.count_nonzero(joined, axis=1) + np.array(cost[first:stop])
        best = int(spent.argmin())
        cost.append(float(spent[best]))
        cut.append(first + best)
    stream_of, stop, starts = np.zeros(CONTEXTS, np.uint8), len(used), []
    while stop:
        starts.append((cut[stop], stop))
        stop = cut[stop]
    for number, (start, stop) in enumerate(reversed(starts)):
        stream_of[used[start:stop]] = number
    return cost[-1], stream_of


# Forecasting


def estimate(pairs: Sequence[Pair]) -> int:
    """About how large `build` would make a delta, from an eighth of the rows.

    Files that have no numbers are compressed once beside the old ones, and not compared as bsdiff4 would.
    """
    total = 0.0
    for pair in pairs:
        total += 400  # its part of the header
        if pair.whole:
            total += _beside(pair.new.read_bytes(), pair.old.read_bytes() if pair.old else b"")
            continue
        new, old = _open(pair.new), _open(pair.old) if pair.old else None
        for group in _plan(pair):
            total += RECORD.size
            length = sum(piece.length for piece in group)
            if old is None or group[0].old is None:
                part = new[group[0].start : group[0].start + max(length // 8, min(length, 16 * KiB))].tobytes()
                total += len(_compress(part, 3)) * length / len(part)
            elif not (len(group) == 1 and group[0].same):
                total += min(_forecast(group, new, old), 1.01 * length)
    return int(total)


def _beside(new: bytes, old: bytes) -> int:
    if new == old:
        return 0
    known = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if old else None
    return len(zstandard.ZstdCompressor(level=9, dict_data=known).compress(new))


def _forecast(group: list[_Piece], new: _File, old: _File) -> float:
    """Bytes of a record of numbers, by the entropy of its tokens in a sample of each piece."""
    counts, other = np.zeros((CONTEXTS, streams.TOKENS)), 60.0
    for piece in group:
        row = piece.row * piece.kind.width // (2 if piece.kind.packed else 1)  # bytes
        step = row if row >= 1024 else max(1, 1024 // max(row, 1)) * max(row, piece.kind.width)
        starts = range(0, piece.length, 8 * step) if piece.length >= 64 * step else range(0, piece.length, step)
        after, before = (
            np.concatenate([whole[first : first + step] for first in starts])
            for whole in (new[piece.start : piece.start + piece.length], old[piece.old or 0 : (piece.old or 0) + piece.length])
        )
        weight = piece.length / len(after)
        codes = numbers.codes(after.tobytes(), piece.kind), numbers.codes(before.tobytes(), piece.kind)
        said = _guess(replace(piece, length=len(after)), *codes)
        token, below = streams.tokens(said.values)
        counts += weight * _histogram(said.segment.contexts(codes[1]), token)
        other += weight * (below.sum(dtype=np.int64) / 8 + sum(map(_alone, said.missed))) + 10
        sides = (said.segment.rows, weight), (said.segment.columns, 1.0)
        other += SCALE_COST * sum(len(s) * w for s, w in sides if s is not None)
    return 1.005 * _share(counts)[0] + other


def _compress(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False).compress(data)


def sha256_of(path: Path) -> str:
    """Of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
