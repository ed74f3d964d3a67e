"""Making a delta: which stretches are the same, and for the others the shortest way to say how their numbers moved.

Files are read twice, in ranges: once to plan the records, once to encode them, two at a time. So memory does not grow with them.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import bsdiff4
import numpy as np
import numpy.typing as npt
from backports import zstd

from ota.delta import lowrank, numbers, streams
from ota.delta.blocks import WINDOWS, Blocks, densest
from ota.delta.format import (
    BESIDE,
    BSDIFF,
    KINDS,
    MAGIC,
    MAX_CHUNK,
    MAX_NUMBERS,
    MAX_RANGE,
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
    Product,
    Segment,
    pack_table,
)  # fmt: skip
from ota.delta.numbers import CONTEXTS, Kind, KindName
from ota.delta.numbers import KINDS as KIND_NAMES
from ota.errors import DeltaError
from ota.manifest import FileEntry, KiB, MiB

MAX_BSDIFF = 2 * MiB  # bytes of a plain file for which bsdiff4 is tried; it needs four seconds for each
WORKERS = 2  # records that are encoded at once, on any machine: memory is the bound
MANY = 32  # records from which on more than one is encoded at once
LEVEL = 9  # of zstd, for what is made without a base
LEVELS = (3, 9, 19)  # the same, beside a part of the base; the last takes twenty times as long as the one before
LIKE_NUMBERS = 0.2  # share of its bytes from which a small file may be numbers that nobody described
LEAST_KNOWN = 8  # bytes that zstd can refer to
HOPE = 2  # times that a record is halved without getting smaller
LEAST_PART = 2 * KiB  # bytes of a record below which it is not cut again
NOTHING = 0.002  # and from which on it is not cut again
NEXT_TO_NOTHING = 0.03  # share of its bytes from which on a record is packed as hard as can be
LEAST_PLAIN = 64 * KiB  # bytes without numbers that are looked for elsewhere in the old file
MAX_PLAIN = 4 * MiB  # and of them as many as go into a record
SAME_RUN = 64 * KiB  # bytes that are the same are worth a record of their own from here on
STREAM_COST = 80  # bytes that another stream costs before it holds anything
TOKEN_COST = 0.7  # bytes that a token adds to a Huffman table
NEAR = 0.6  # share of their bytes from which numbers are also tried without their predecessors
FAR = 0.6  # and from which a record is also tried as plain bytes
CLEARLY = 0.3  # bits of a number that need no closer look
LEAST_MOVED = 0.3  # share of numbers that have to move before a product is looked for
SEGMENT_COST = 5.0  # bytes that a segment's line in its record's table costs
SPARSE_LOSS, DENSE_LOSS = 0.03, 0.005  # by which streams are longer than their entropy
RECORD_COST = 400.0  # bytes that a record costs beside its numbers
SAMPLE = 1 << 14  # numbers that are looked at to choose a description
LOOKED = 128 * KiB  # bytes of a large tensor that say enough about its size
SCALE_COST = 0.65  # bytes that a row's or column's scale costs
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
        DeltaError: a file that is not weights is larger than `MAX_SMALL`, or a file has more tensors than a delta can tell, or
            `Elements` that overlap, end inside a number or go past the end.
    """
    plans: list[list[list[_Piece]]] = [_plan(pair) for pair in pairs]
    files = [
        DeltaFile(
            target=pair.entry,
            base=sha256_of(pair.old) if pair.old else None,
            base_size=pair.old.stat().st_size if pair.old else 0,
        )
        for pair in pairs
    ]
    header = Header(base=base, target=target, files=files).canonical()
    by_kind = dict.fromkeys(KINDS.values(), 0)
    with out.open("wb") as file:
        file.write(PREFIX.pack(MAGIC, VERSION, len(header)) + header)
        for pair, plan in zip(pairs, plans, strict=True):
            for count, (kind, length, check, base_offset, payload) in enumerate(_encode(pair, plan)):
                if count == MAX_RECORDS:
                    raise DeltaError(f"a file would take more than {MAX_RECORDS} records; publish it without a delta")
                file.write(RECORD.pack(kind, length, len(payload), base_offset, check) + payload)
                by_kind[KINDS[kind]] += len(payload)
        size = file.tell()
    return Built(size, by_kind)


Made = TypeVar("Made")
_Record = tuple[int, int, bytes, int, bytes]  # kind, length, check, base offset, payload


def _record(kind: int, new: bytes, base_offset: int, payload: bytes) -> _Record:
    return kind, len(new), hashlib.blake2b(new, digest_size=16).digest(), base_offset, payload


def _encode(pair: Pair, plan: list[list[_Piece]]) -> Iterator[_Record]:
    new, old = _open(pair.new), _open(pair.old) if pair.old else None
    if pair.whole and plan:
        yield from _encode_small(new, old)
        return
    for records in _side_by_side([lambda group=group: _encode_group(group, new, old) for group in plan]):  # type: ignore[misc]
        yield from records


def _side_by_side(calls: Sequence[Callable[[], Made]]) -> Iterator[Made]:
    """Results in order; a few at a time, so that memory holds no more than those."""
    workers = min(os.cpu_count() or 1, WORKERS)
    if len(calls) < MANY:  # of small tensors most time is Python's own, and its lock would only be fought over
        yield from (call() for call in calls)
        return
    with ThreadPoolExecutor(workers) as pool:  # numpy and zstd work outside the interpreter's lock
        waiting: deque[Future[Made]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode_small(new_file: _File, old_file: _File | None) -> list[_Record]:
    if max(new_file.size, old_file.size if old_file else 0) > MAX_SMALL:
        raise DeltaError(f"a file of {new_file.size} bytes is too large for a delta of plain files; the limit is {MAX_SMALL}")
    new, old = new_file[: new_file.size].tobytes(), old_file[: old_file.size].tobytes() if old_file else b""
    if new == old:
        return [_record(SAME, new, 0, b"")]
    ways = [[_record(ZSTD, new, 0, _compress(new, LEVELS[-1]))]]
    if old:
        ways.append([_record(BSDIFF, new, 0, bsdiff4.diff(old, new))])
    if len(old) >= LEAST_KNOWN:
        ways.append([_record(BESIDE, new, 0, streams.beside(new, old, LEVELS[-1]))])
    if old_file and len(new) >= LEAST_PLAIN and _size(min(ways, key=_size)) > LIKE_NUMBERS * len(new):
        ways.append(_encode_plain(_Piece(0, len(new), KIND_NAMES["bytes"], 0, 0, False), new, old_file))
    return min(ways, key=_size)


# Planning


@dataclass(frozen=True)
class _File:
    """A file that is read in ranges; mapped into memory, what was read once would stay there while there is room."""

    path: Path
    size: int

    @functools.cached_property
    def blocks(self) -> Blocks:
        """Its blocks by their hashes; read when first asked for."""
        return Blocks((self[at : min(at + MAX_CHUNK, self.size)] for at in range(0, self.size, MAX_CHUNK)), self.size)

    def __getitem__(self, wanted: slice) -> npt.NDArray[np.uint8]:
        with self.path.open("rb", buffering=0) as file:
            file.seek(wanted.start or 0)
            return np.frombuffer(file.read(wanted.stop - (wanted.start or 0)), np.uint8)


def _open(path: Path) -> _File:
    return _File(path, path.stat().st_size)


def _plan(pair: Pair) -> list[list[_Piece]]:
    """What each record is about, in the order of the file; of a file that goes into one record, there is no more to say."""
    if pair.whole:
        return [[]] if pair.entry.size else []
    new, old = _open(pair.new), _open(pair.old) if pair.old else None
    groups: list[list[_Piece]] = []
    plain = MAX_CHUNK if isinstance(pair.entry, FileEntry) else MAX_PLAIN
    for piece in _join(_pieces(pair.elements, new, old, plain)):
        last = groups[-1] if groups else []
        full = sum(p.length for p in last) + piece.length > MAX_CHUNK or sum(map(_count, last)) + _count(piece) > MAX_NUMBERS
        if not last or any(map(_alone_in_record, (last[0], piece))) or full or len(last) == MAX_SEGMENTS:
            groups.append([piece])
        else:
            last.append(piece)
    return groups


def _alone_in_record(piece: _Piece) -> bool:
    return piece.old is None or _plain(piece) or (piece.same and piece.length >= SAME_RUN)


def _plain(piece: _Piece) -> bool:
    """It is no numbers, or numbers that nobody described, and so many that they may be looked for elsewhere in the old file."""
    return piece.kind.name == "bytes" and piece.length >= LEAST_PLAIN


def _count(piece: _Piece) -> int:
    return piece.length * 2 if piece.kind.packed else piece.length // piece.kind.width


def _pieces(elements: Sequence[Elements], new: _File, old: _File | None, plain: int) -> Iterator[_Piece]:
    for stretch in _cover(elements, new.size, 0 if old is None else old.size):
        kind = KIND_NAMES[stretch.kind]
        row = stretch.row * kind.width // (2 if stretch.kind == "int4" else 1) or kind.width  # bytes
        limit = MAX_CHUNK // 4 if stretch.kind == "int4" else min(MAX_CHUNK, MAX_NUMBERS * kind.width)
        if stretch.kind == "bytes" and stretch.length > MAX_CHUNK:
            limit = plain
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


# Encoding


def _encode_group(group: list[_Piece], new: _File, old: _File | None) -> list[_Record]:
    first = group[0]
    made = new[first.start : group[-1].start + group[-1].length].tobytes()
    if first.old is not None and len(group) == 1 and first.same and len(made) <= MAX_CHUNK:
        return [_record(SAME, made, first.old, b"")]
    if len(group) == 1 and _plain(first):
        return _encode_plain(first, made, old)
    ways = [[_record(NUMBERS, made, 0, _numbers(group, made, old))]]
    if _size(ways[0]) > FAR * len(made):  # so far from the old ones that they say little
        ways.append([_record(ZSTD, made, 0, _compress(made, LEVEL))])
        if old and len(old.blocks.places(np.frombuffer(made, np.uint8))) > WINDOWS // 2:
            ways.append([_elsewhere(part, old, LEVELS) for part in _parts(made, old)])
    return min(ways, key=_size)


# Encoding what is no numbers, or numbers that nobody described


def _encode_plain(piece: _Piece, made: bytes, old: _File | None) -> list[_Record]:
    """By zstd, beside where it came from; or as what numbers moved by, if it looks like numbers that lie where they lay."""
    if old is None:
        return [_elsewhere(made, None, LEVELS)]
    found: list[_Record] = []
    at = 0
    for part in _parts(made, old):
        quick = _quick([part], old)
        as_numbers: list[_Record] = []
        if quick > NEXT_TO_NOTHING * len(part) and piece.old is not None and piece.old + at + len(part) <= old.size:
            for first in range(0, len(part), MAX_NUMBERS):
                chunk = part[first : first + MAX_NUMBERS]
                there = replace(piece, start=0, length=len(chunk), old=piece.old + at + first, same=False)
                as_numbers.append(_record(NUMBERS, chunk, 0, _numbers(_guessed(there, chunk, old), chunk, old)))
        found += as_numbers if as_numbers and _size(as_numbers) < 0.95 * quick else [_elsewhere(part, old, LEVELS)]
        at += len(part)
    return found


def _guessed(piece: _Piece, made: bytes, old: _File) -> list[_Piece]:
    """Cut by the kind of numbers that the bytes look most like, and by where the first of them begins."""
    kind, phase, _ = _looks(piece, made, old)
    if kind.name == "bytes":
        return [piece]
    ends = [0, phase, phase + (len(made) - phase) // kind.width * kind.width, len(made)]
    kinds = KIND_NAMES["bytes"], kind, KIND_NAMES["bytes"]
    return [
        replace(piece, start=start, length=stop - start, kind=kind, old=(piece.old or 0) + start)
        for kind, start, stop in zip(kinds, ends, ends[1:], strict=False)
        if stop > start
    ]


def _looks(piece: _Piece, made: bytes, old: _File) -> tuple[Kind, int, float]:
    """The kind of numbers that bytes look most like, from which byte on, and how many bytes each then costs; by some in the middle."""
    best, middle = (KIND_NAMES["bytes"], 0, 1.0), len(made) // 2 // 8 * 8
    looked = min(LOOKED // 2, len(made) - middle - 8)
    for kind in KIND_NAMES.values():
        for phase in range(kind.width if not kind.packed and looked >= LEAST_PLAIN // 4 else 0):
            first, length = middle + phase, looked // kind.width * kind.width
            after, before = (
                made[first : first + length],
                old[(piece.old or 0) + first : (piece.old or 0) + first + length].tobytes(),
            )
            said = _said(_Piece(0, length, kind, 0, 0, False), numbers.codes(after, kind), numbers.codes(before, kind))
            if said.cost / length < (best[2] if kind.name == "bytes" else 0.95 * best[2]):
                best = kind, phase, said.cost / length
    return best


def _parts(made: bytes, old: _File, hope: int = HOPE) -> list[bytes]:
    """Cut in halves as long as that pays, in the end: where they come from places that lie far apart."""
    whole, half = _quick([made], old), len(made) // 2
    if half < LEAST_PART or whole < NOTHING * len(made) or not hope:
        return [made]
    pays = _quick([made[:half], made[half:]], old) < 0.95 * whole
    parts = [part for side in (made[:half], made[half:]) for part in _parts(side, old, HOPE if pays else hope - 1)]
    return parts if pays or _quick(parts, old) < 0.95 * whole else [made]


def _quick(parts: Sequence[bytes], old: _File) -> int:
    """About how many bytes it takes to make them from elsewhere."""
    return _size([_elsewhere(part, old, LEVELS[:1]) for part in parts])


def _elsewhere(made: bytes, old: _File | None, levels: Sequence[int]) -> _Record:
    """By zstd, beside what lies in the old file where most of these bytes came from, if they came from there."""
    places = old.blocks.places(np.frombuffer(made, np.uint8)) if old else np.zeros(0, np.int64)
    known, start = b"", 0
    if old and len(places) and old.size >= LEAST_KNOWN:
        start = max(0, densest(places, MAX_RANGE // 2) - MAX_RANGE // 4)
        known = old[start : min(start + MAX_RANGE, old.size)].tobytes()
    ways: list[bytes] = []
    for level in levels:
        ways.append(streams.beside(made, known, level) if known else _compress(made, level))
        if level != levels[0] and len(min(ways, key=len)) < NEXT_TO_NOTHING * len(made):
            break
    return _record(BESIDE if known else ZSTD, made, start, min(ways, key=len))


def _size(records: Sequence[_Record]) -> int:
    return sum(RECORD.size + len(record[4]) for record in records)


# Describing numbers


def _numbers(group: list[_Piece], made: bytes, old: _File | None) -> bytes:
    """The payload of a record of numbers."""
    said: list[_Said] = []
    for piece in group:
        at = piece.start - group[0].start
        said.append(_said(piece, numbers.codes(made[at : at + piece.length], piece.kind), _before(piece, old)))
    segments = [one.segment for one in said]
    together, ids = np.concatenate([one.values for one in said]), np.concatenate([one.classes for one in said])
    rest = b"".join(streams.encode(part) for one in said for part in one.missed)
    sample = _sampled(ids)
    stream_of = _share(_joint(sample, streams.tokens(_sampled(together))[0]), len(ids) / len(sample))
    count = int(stream_of.max()) + 1
    ways: list[bytes] = []
    if count == 1 or all(s.old is None for s in segments):  # in one stream, where zstd may find what contexts do not tell
        plain = pack_table([replace(s, rows=None, columns=None) for s in segments], None)
        width = max(piece.kind.width for piece in group)
        ways += [plain + streams.encode(together) + rest, plain + streams.planes(together, width) + rest]
    if count > 1:
        ids = numbers.translated(ids, np.pad(stream_of, (0, 256 - CONTEXTS)))
        parts = [streams.encode(together[np.flatnonzero(ids == number)]) for number in range(count)]
        ways.append(pack_table(segments, stream_of) + b"".join(parts) + rest)
    return min(ways, key=len)


def _before(piece: _Piece, old: _File | None) -> numbers.Codes:
    known = old[piece.old : piece.old + piece.length].tobytes() if old and piece.old is not None else bytes(piece.length)
    return numbers.codes(known, piece.kind)


@dataclass(frozen=True)
class _Said:
    """How a piece is described: the segment, each number's context, what its streams hold, and what whole steps miss by."""

    segment: Segment
    classes: npt.NDArray[np.uint8]
    values: streams.Numbers
    missed: list[streams.Numbers] = field(default_factory=list)

    def _tokens(self, values: streams.Numbers) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """As `streams.tokens`, but of floats without predecessors their exponents, which are what can be coded."""
        kind = self.segment.kind
        if self.segment.old is not None or not kind.mantissa:
            return streams.tokens(values)
        exponents = (values >> np.uint32(kind.mantissa + 1)).astype(np.int32) - kind.bias + streams.TOKENS - 16
        return np.clip(exponents, 0, streams.TOKENS - 1).astype(np.uint8), np.full(len(values), kind.mantissa + 1, np.uint8)

    @functools.cached_property
    def cost(self) -> float:
        """About how many bytes it takes, each context with a code of its own."""
        symbols, below = self._tokens(_sampled(self.values))
        bits = _bits(_joint(_sampled(self.classes), symbols)) + int(below.sum(dtype=np.int64))
        apart = sum(map(_alone, (*self.missed, *_sides(self.segment))))
        return len(self.values) / max(len(symbols), 1) * bits / 8 + _scales(self.segment) + apart


def _scales(segment: Segment) -> float:
    """About how many bytes its scales take."""
    return SCALE_COST * sum(len(side) for side in (segment.rows, segment.columns) if side is not None)


def _bits(counts: npt.NDArray[np.int64]) -> float:
    """About how many bits tokens take, each context with a code of its own.

    What few numbers show of their entropy is too little, by half a nat for each cell of the histogram (Miller 1955).
    """
    return float(_entropy(counts).sum()) + np.count_nonzero(counts) / (2 * math.log(2))


def _said(piece: _Piece, after: numbers.Codes, before: numbers.Codes) -> _Said:
    """The cheapest description of how the numbers of a piece moved.

    Each for itself; by steps of one size; by a product of thin matrices; or from 0, if the old ones say little.
    """
    row = piece.row if 1 < piece.row < len(before) else 0
    plain = Segment(piece.kind, piece.length, row or len(before), piece.old, NEVER)
    if piece.same:
        return _Said(plain, np.zeros(len(before), np.uint8), np.zeros(len(before), np.uint32))
    change = numbers.changes(after, before, piece.kind)
    moved = numbers.difference(after, before, piece.kind).astype(np.uint32)
    if piece.old is None or piece.kind.name == "bytes":
        return _scaled(plain, change, before, moved, row)
    share = np.count_nonzero(moved) / len(before)
    step = _step(change, after, before, piece.kind) if piece.kind.mantissa and 0.01 < share < 0.95 else None
    product = _product(change, before, row, piece.kind) if row and share > LEAST_MOVED and step is None else None
    if product:
        segment = replace(plain, product=product)
        nearer = segment.before(before)
        moved_nearer = numbers.difference(after, nearer, piece.kind).astype(np.uint32)
        best = _scaled(segment, numbers.changes(after, nearer, piece.kind), nearer, moved_nearer, row)
        if _mean_bits(moved_nearer) > _mean_bits(moved) - CLEARLY:
            best = min(best, _scaled(plain, change, before, moved, row), key=lambda said: said.cost)
    else:
        best = _scaled(plain, change, before, moved, row)
    if step is not None:
        best = min(best, _stepped(plain, change, before, after, row, step), key=lambda said: said.cost)
    if _mean_bits(best.values) / 8 * len(before) > NEAR * piece.length and best.cost > NEAR * piece.length:
        zeros = np.zeros_like(before)
        by = numbers.difference(after, zeros, piece.kind).astype(np.uint32)
        alone = _scaled(replace(plain, old=None), numbers.changes(after, zeros, piece.kind), zeros, by, row)
        best = min(best, alone, key=lambda said: said.cost)
    return best


def _stepped(
    plain: Segment, change: npt.NDArray[np.float32], before: numbers.Codes, after: numbers.Codes, row: int, step: np.float32
) -> _Said:
    with np.errstate(over="ignore"):
        steps = np.round(change / step).clip(-(2.0**30), 2.0**30).astype(np.int32)
    missed = numbers.difference(after, numbers.stepped(before, steps, step, plain.kind), plain.kind).astype(np.uint32)
    said = _scaled(replace(plain, step=step), change / step, before, numbers.zigzag(steps), row)
    return replace(said, missed=[missed[steps == 0], missed[steps != 0]])


def _product(change: npt.NDArray[np.float32], before: numbers.Codes, row: int, kind: Kind) -> Product | None:
    rows = len(before) // row
    least = 1.0
    if kind.mantissa:
        size = float(np.median(np.abs(numbers.values(before[:: max(1, len(before) // 4096)], kind))))
        least = 2.0 ** (math.frexp(size)[1] - 2 - kind.mantissa) if math.isfinite(size) else 0.0
    if rows * row != len(before) or not least:
        return None
    product = lowrank.find(change.reshape(rows, row).astype(np.float64), least)
    return product if product and product.rank * (rows + row) <= len(before) else None


def _sides(segment: Segment) -> list[streams.Numbers]:
    """The factors of its product as they are stored."""
    p = segment.product
    return [numbers.zigzag(side.reshape(-1)) for side in (p.left, p.right) if side is not None] if p else []


def _scaled(plain: Segment, change: npt.NDArray[np.float32], before: numbers.Codes, values: streams.Numbers, row: int) -> _Said:
    """How far the numbers are said to move: all alike, and by row and column where that pays."""
    distance = np.abs(change)
    mean = float(distance.mean(dtype=np.float64)) if len(distance) else 0.0
    if not mean:
        return _Said(plain, plain.contexts(before), values)
    segment = replace(plain, scale=int(_half_octaves(np.array(mean))))
    if row:
        segment = _by_row_or_column(segment, distance, before, values, row)
    return _Said(segment, segment.contexts(before), values)


def _by_row_or_column(
    plain: Segment, distance: npt.NDArray[np.float32], before: numbers.Codes, values: streams.Numbers, row: int
) -> Segment:
    """With a scale for each row, for each column, for both or for neither, whichever is cheapest in a sample of the rows."""
    whole = len(distance) // row * row
    table = distance[:whole].reshape(-1, row)
    rows, columns = table.mean(axis=1, dtype=np.float64), table.mean(axis=0, dtype=np.float64)
    if whole < len(distance):
        rows = np.append(rows, distance[whole:].mean())
    rows, columns = _apart(rows, plain.scale), _apart(columns, plain.scale)
    step = -(-whole // SAMPLE)
    old = before[:whole].reshape(-1, row)[::step].reshape(-1)
    symbols = streams.tokens(values[:whole].reshape(-1, row)[::step].reshape(-1))[0]
    ways = [replace(plain, rows=r, columns=c) for r in (None, rows) for c in (None, columns)]

    def cost(way: Segment) -> float:
        part = replace(way, rows=None if way.rows is None else way.rows[: len(table) : step])
        return len(distance) / len(old) * _bits(_joint(part.contexts(old), symbols)) / 8 + _scales(way)

    return min(ways, key=cost)


def _apart(means: npt.NDArray[np.float64], scale: int) -> npt.NDArray[np.int16]:
    """How far rows or columns lie from what all of them have, in half octaves."""
    return np.clip(_half_octaves(means) - scale, -20, 20).astype(np.int16)


def _mean_bits(values: streams.Numbers) -> float:
    """About how many bits a number takes, by a sample of them."""
    return float(np.log2(values[:: max(1, len(values) // 4096)] + 1.0).mean()) + 1


def _alone(values: streams.Numbers) -> float:
    """Bytes that numbers cost in a stream of their own."""
    symbols, below = streams.tokens(values)
    return (float(_entropy(np.bincount(symbols, minlength=1)[None]).sum()) + int(below.sum(dtype=np.int64))) / 8


def _sampled(found: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A quarter of many numbers, in pieces of a thousand."""
    if len(found) < 1 << 15:
        return found
    return found[: len(found) // 4096 * 4096].reshape(-1, 4096)[:, :1024].reshape(-1)


def _step(change: npt.NDArray[np.float32], after: numbers.Codes, before: numbers.Codes, kind: Kind) -> np.float32 | None:
    """The size of the steps that all numbers moved by, if there is one.

    Seen where the kind's own rounding is small against the change: the smallest changes are one step, and all are near multiples of it.
    Then every number that moved says between which bounds the size must lie to have been rounded as it was.
    """
    at = np.flatnonzero(change)
    few = at[:: max(1, len(at) // 4096)]
    size, old = np.abs(change[few]).astype(np.float64), np.abs(numbers.values(before[few], kind)).astype(np.float64)
    size = size[np.isfinite(old) & (size > 32 * 2.0**-kind.mantissa * old)]
    if len(size) < 64:
        return None
    first = float(np.sort(size)[len(size) // 50])
    near = size[(size > 0.75 * first) & (size < 1.33 * first)]
    step = float(np.sort(near)[len(near) // 2])
    for _ in range(4):
        count = np.round(size / step)
        step = float((size * count).sum() / (count * count).sum()) if count.any() else 0.0
        if not 1e-30 < step < 1e30:
            return None
    if float(np.abs(size / step - np.round(size / step)).mean()) > 0.05:  # 0.25 if there are no steps
        return None
    at = at[:: max(1, len(at) // 32768)]
    size, new = np.abs(change[at]).astype(np.float64), numbers.values(after[at], kind).astype(np.float64)
    slack = np.ldexp(1.0, np.frexp(np.where(np.isfinite(new), new, 0.0))[1] - 2 - kind.mantissa) + size * 2.0**-23
    count = np.round(size / step)
    sure = (count > 0) & (slack < step / 4)
    at, size, slack, count = at[sure], size[sure], slack[sure], count[sure]
    if not len(at):
        return None
    low, high = (size - slack) / count, (size + slack) / count
    few_wrong = 0 if low.max() <= high.min() else len(at) // 200
    middle = np.float32((np.partition(low, -1 - few_wrong)[-1 - few_wrong] + np.partition(high, few_wrong)[few_wrong]) / 2)
    steps = np.round(change[at] / middle).astype(np.int32)

    def hits(size: np.float32) -> int:
        return int(np.count_nonzero(numbers.stepped(before[at], steps, size, kind) == after[at]))

    near_by = [middle]
    for direction in (np.float32(0), np.float32(np.inf)):
        found = middle
        for _ in range(4):
            found = np.nextafter(found, direction)
            near_by.append(found)
    return max(near_by, key=hits)


def _half_octaves(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    """2 · log2 of values to the nearest whole number, on every machine alike."""
    part, exponent = np.frexp(np.maximum(values, 1e-60))  # parts in [1/2, 1)
    found: npt.NDArray[np.int32] = 2 * exponent - (part < 2**-0.25) - (part < 2**-0.75)
    return found


def _joint(classes: npt.NDArray[np.uint8], symbols: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each token comes in each context, [64, tokens]."""
    both = classes.astype(np.intp)
    both *= streams.TOKENS
    both += symbols
    return np.bincount(both, minlength=CONTEXTS * streams.TOKENS).reshape(CONTEXTS, streams.TOKENS)


def _entropy(counts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Bits for the tokens of each row of a histogram, each row with its own code; rounded so far that machines agree."""
    total = counts.sum(axis=-1, dtype=np.float64)
    found: npt.NDArray[np.float64] = total * np.log2(np.maximum(total, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(
        axis=-1
    )
    return found.round(3)


def _share(counts: npt.NDArray[Any], each: float) -> npt.NDArray[np.uint8]:
    """Which stream each context goes to: neighbours share one where that costs least.

    Dynamic programming over where to cut the used contexts.

    Args:
        counts: of tokens in a sample, [64, tokens].
        each: for how many numbers one of them stands.
    """
    used = np.flatnonzero(counts.sum(axis=1))
    counts = counts[used][:, np.flatnonzero(counts.sum(axis=0))]
    sums = np.concatenate((np.zeros((1, counts.shape[1])), np.cumsum(counts, axis=0, dtype=np.float64)))
    cost, cut = [0.0], [0]
    for stop in range(1, len(used) + 1):
        first = max(0, stop - MAX_STREAM_CONTEXTS)
        joined = sums[stop] - sums[first:stop]  # [starts, tokens]
        spent = (
            each * _entropy(joined) / 8 + STREAM_COST + TOKEN_COST * np.count_nonzero(joined, axis=1) + np.array(cost[first:stop])
        )
        best = int(spent.argmin())
        cost.append(float(spent[best]))
        cut.append(first + best)
    stream_of, stop, starts = np.zeros(CONTEXTS, np.uint8), len(used), []
    while stop:
        starts.append((cut[stop], stop))
        stop = cut[stop]
    # What the sample missed goes with its neighbours.
    for number, (start, _) in enumerate(reversed(starts)):
        stream_of[used[start] if start else 0 :] = number
    return stream_of


# Forecasting


def estimate(pairs: Sequence[Pair]) -> int:
    """About how large `build` would make a delta: of tensors of one shape an eighth are looked at, and of large ones a part.

    Files that have no numbers are compressed once beside the old ones, and not compared as bsdiff4 would.
    """
    total = 0.0
    for pair in pairs:
        total += 400  # its part of the header
        new, old = _open(pair.new), _open(pair.old) if pair.old else None
        if pair.whole:
            total += _whole(new, old)
            continue
        kin: dict[tuple[KindName, int, int, bool, bool], list[_Piece]] = {}
        for group in _plan(pair):
            total += RECORD.size
            if len(group) > 1 or not group[0].same:
                total += RECORD_COST
                for piece in group:
                    kin.setdefault((piece.kind.name, piece.row, piece.length, piece.same, piece.old is None), []).append(piece)
        for pieces in kin.values():
            few = pieces if _plain(pieces[0]) and len(pieces) < 8 else pieces[len(pieces) % 8 // 2 :: 8]
            looked = [_forecast(piece, new, old) for piece in few]
            total += sum(looked) * len(pieces) / len(looked)
    return int(total)


def _whole(new_file: _File, old_file: _File | None) -> float:
    new, old = new_file[: new_file.size].tobytes(), old_file[: old_file.size].tobytes() if old_file else b""
    if new == old:
        return 0.0
    size = len(streams.beside(new, old, LEVEL)) if len(old) >= LEAST_KNOWN else len(_compress(new, LEVEL))
    if old_file and LEAST_PLAIN <= len(new) <= len(old) and size > LIKE_NUMBERS * len(new):
        return min(size, _looks(_Piece(0, len(new), KIND_NAMES["bytes"], 0, 0, False), new, old_file)[2] * len(new))
    return size


def _forecast(piece: _Piece, new: _File, old: _File | None) -> float:
    """Bytes that a piece takes, by every second, third … of its rows if it is large."""
    if piece.same:
        return SEGMENT_COST
    if _plain(piece):
        whole = new[piece.start : piece.start + piece.length].tobytes()
        if old is None:
            return len(_compress(whole, LEVELS[0]))
        quick = _quick(_parts(whole, old), old)
        if piece.old is None or quick < NEXT_TO_NOTHING * len(whole):
            return quick
        return min(quick, _looks(piece, whole, old)[2] * len(whole))
    row = piece.row * piece.kind.width // (2 if piece.kind.packed else 1)  # bytes
    step = row if row >= 1024 else max(1, 1024 // max(row, 1)) * max(row, piece.kind.width)
    apart = max(1, min(piece.length // LOOKED, piece.length // (64 * step)))
    starts = range(0, piece.length, apart * step)
    at = None if old is None else piece.old
    after = np.concatenate([new[piece.start + first : piece.start + min(first + step, piece.length)] for first in starts])
    known = bytes(len(after))
    if old is not None and at is not None:
        known = np.concatenate([old[at + first : at + min(first + step, piece.length)] for first in starts]).tobytes()
    part = replace(piece, length=len(after), old=at)
    said = _said(part, numbers.codes(after.tobytes(), piece.kind), numbers.codes(known, piece.kind))
    once = SCALE_COST * len(said.segment.columns) if said.segment.columns is not None else 0.0
    once += sum(map(_alone, _sides(said.segment)[1:]))
    weight = piece.length / len(after)
    few = np.count_nonzero(said.values) < LEAST_MOVED * len(said.values)
    cost = said.cost * (1 + (SPARSE_LOSS if few else DENSE_LOSS))
    return min(weight * (cost - once) + once, piece.length) + SEGMENT_COST


def _compress(data: bytes, level: int) -> bytes:
    return zstd.compress(data, level)


def sha256_of(path: Path) -> str:
    """Of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
