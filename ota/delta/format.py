"""The delta's container, and what a device does with it: read records in order, make each stretch of the new files, check it.

Weights are numbers, and a record of them says how far each moved in the order of its kind (`numbers`), in streams of numbers that
are expected to move equally far (`streams`). The other files are small and go through bsdiff4 or zstd, whichever is smaller.

A delta is read as a stream and its output written in order; memory is bounded by `MAX_CHUNK` for weights and
`MAX_SMALL` for other files, whatever their size. The format is described to the byte in ../README.md.
Every length is checked against a limit before anything is allocated for it.
"""

from __future__ import annotations

import bz2
import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import BinaryIO

import bsdiff4
import numpy as np
import numpy.typing as npt
from pydantic import Field

from ota.delta import numbers, streams
from ota.delta.numbers import CONTEXTS, KIND_OF_CODE, Kind, Scales
from ota.errors import BaseError, DeltaError, ManifestError
from ota.manifest import MAX_WEIGHTS, Document, FileEntry, KiB, MiB, Role, Sha256, VariantName, parse

MAGIC = b"DFDELTA"
VERSION = 1
MAX_HEADER = 64 * KiB
MAX_CHUNK = 1 * MiB  # bytes of the new file that one record makes
MAX_NUMBERS = 512 * KiB  # numbers in a record; decoding needs some forty bytes for each, at worst 130
MAX_RECORDS = 64 * KiB  # of a file
MAX_SEGMENTS = 128  # of a record: each costs time of its own, however few numbers it has
MAX_TABLE = 1 * MiB  # bytes of a record's table of segments, unpacked
MAX_SCALE = 4000  # half octaves
MAX_SMALL = 8 * MiB  # bytes of a file that is handled whole (graph, tables, golden outputs)
MAX_BSDIFF_CONTROL = 1 * MiB  # bytes of bsdiff4's control block, unpacked

PREFIX = struct.Struct("<7sBI")  # magic, version, header length
RECORD = struct.Struct("<IIIQ16s")  # kind, new length, payload length, base offset, check
_TABLE = struct.Struct("<HB")  # segments, streams
_SEGMENT = struct.Struct("<BBhIIQ")  # kind, flags, scale, bytes, numbers in a row, base offset
_ROWS, _COLUMNS, _STEPS, _NEW = 1, 2, 4, 8  # flags
_STEP = struct.Struct("<f")
SAME, NUMBERS, ZSTD, BSDIFF = range(4)
KINDS = {SAME: "same", NUMBERS: "numbers", ZSTD: "zstd", BSDIFF: "bsdiff"}


class PlainFile(Document):
    """A file that belongs to no bundle."""

    size: int = Field(ge=0, le=MAX_WEIGHTS, description="bytes")
    sha256: Sha256


class DeltaFile(Document):
    """One file that a delta makes."""

    target: FileEntry | PlainFile
    base: Sha256 | None = Field(description="hash of the base's file of the same role and variant; None: made without one")
    base_size: int = Field(ge=0, le=MAX_WEIGHTS)
    records: int = Field(ge=0, le=MAX_RECORDS)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.target.role} file" if isinstance(self.target, FileEntry) else "file"

    @property
    def remedy(self) -> str:
        """What to do when its base does not fit."""
        return "fetch the full bundle" if isinstance(self.target, FileEntry) else "name the file that it was built from"


class Header(Document):
    """What a delta is for and what it makes, in the order in which it makes it."""

    base: Sha256 = Field(description="manifest of the bundle it starts from, or the plain file")
    target: Sha256 = Field(description="manifest of the bundle it makes, or the plain file")
    files: list[DeltaFile] = Field(min_length=1, max_length=13)


@dataclass(frozen=True)
class Segment:
    """Numbers of one kind that follow each other, and how far they are said to move; see `numbers.contexts`."""

    kind: Kind
    length: int  # bytes
    row: int  # numbers
    old: int | None  # where their predecessors lie; None: they have none, and move from 0
    scale: int
    rows: Scales | None
    columns: Scales | None
    step: np.float32 | None = None  # floats that move by whole steps of this size; the streams then count steps

    def contexts(self, old: numbers.Codes) -> npt.NDArray[np.uint8]:
        """See `numbers.contexts`; how many steps a number moves has nothing to do with its own exponent."""
        kind = self.kind if self.step is None else numbers.KINDS["int8"]
        return numbers.contexts(old, kind, self.scale, self.rows, self.columns, self.row)

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.length * 2 if self.kind.packed else self.length // self.kind.width


def pack_table(segments: Sequence[Segment], stream_of: npt.NDArray[np.uint8] | None) -> bytes:
    """What a record of numbers begins with.

    Args:
        segments: in the order of the file.
        stream_of: the stream of each of the contexts; None: there is one stream.
    """
    made = _TABLE.pack(len(segments), 1 if stream_of is None else int(stream_of.max()) + 1)
    made += b"" if stream_of is None else stream_of.tobytes()
    for s in segments:
        flags = (
            (_ROWS * (s.rows is not None))
            | (_COLUMNS * (s.columns is not None))
            | (_STEPS * (s.step is not None))
            | (_NEW * (s.old is None))
        )
        made += _SEGMENT.pack(s.kind.code, flags, s.scale, s.length, s.row, s.old or 0)
    for s in segments:
        made += b"".join(scales.astype(np.int8).tobytes() for scales in (s.rows, s.columns) if scales is not None)
        made += b"" if s.step is None else _STEP.pack(s.step)
    return streams.frame(made)


OpenBase = Callable[[Role, VariantName | None], BinaryIO]
OpenOutput = Callable[[FileEntry], AbstractContextManager[BinaryIO]]


def read_header(patch: BinaryIO) -> Header:
    """Read and check everything before the first record; the stream then stands at the first record.

    Raises:
        DeltaError: not a delta, of another version, or over a limit.
    """
    prefix = patch.read(PREFIX.size)
    if len(prefix) != PREFIX.size:
        raise DeltaError("the delta ends inside its first bytes; fetch it again")
    magic, version, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise DeltaError("the file is not a delta")
    if version != VERSION:
        raise DeltaError(f"the delta has format version {version}, this agent reads {VERSION}; update the agent")
    if length > MAX_HEADER:
        raise DeltaError(f"the delta's header claims {length} bytes, more than {MAX_HEADER}")
    data = _exactly(patch, length)
    try:
        header = parse(Header, data, MAX_HEADER)
    except ManifestError as error:
        raise DeltaError(f"the delta's header is damaged: {error}") from error
    if header.canonical() != data:  # two readers of other bytes might not agree, say on a key that comes twice
        raise DeltaError("the delta's header is damaged: it is not canonical JSON; fetch it again")
    return header


def apply(patch: BinaryIO, header: Header, open_base: OpenBase, open_output: OpenOutput) -> None:
    """Make the new files, in the header's order.

    Each record's result is checked before it is written, and each file's length and hash when it is complete.

    Args:
        patch: the delta, standing at its first record (after `read_header`).
        header: what `read_header` returned; compare its base and target with what is signed before calling this.
        open_base: opens a file of the old bundle for reading.
        open_output: opens a new file for writing; it is closed when complete.

    Raises:
        DeltaError: the delta is damaged or over a limit; the outputs are then to be thrown away.
        BaseError: a file of the old bundle is not what the delta starts from.
    """
    for file in header.files:
        if not isinstance(file.target, FileEntry):
            raise DeltaError("the delta is for plain files and not for bundles; apply it with `ferry delta apply`")
        with open_output(file.target) as output:
            _apply_file(patch, file, partial(open_base, file.target.role, file.target.variant), output)
    _end(patch)


def apply_plain(patch: BinaryIO, header: Header, base: BinaryIO, output: BinaryIO) -> None:
    """Make the one plain file that a delta holds; its base is closed afterwards.

    Raises:
        DeltaError: the delta is damaged, over a limit, or for a bundle; what was written is then to be thrown away.
        BaseError: `base` is not the file that the delta starts from.
    """
    (file, *others) = header.files
    if others or not isinstance(file.target, PlainFile):
        raise DeltaError("the delta is for bundles and not for plain files; devices apply it")
    _apply_file(patch, file, lambda: base, output)
    _end(patch)


@dataclass(frozen=True)
class RecordInfo:
    """What a record says of itself."""

    kind: int
    length: int  # bytes of the new file
    size: int  # bytes of the delta
    numbers: dict[str, int]  # by kind
    streams: int


def records(patch: BinaryIO, file: DeltaFile) -> Iterator[RecordInfo]:
    """What the records of one file say, without making anything; the stream must stand at the first of them.

    Raises:
        DeltaError: the delta is damaged.
    """
    for _ in range(file.records):
        kind, length, payload_length, _, _ = RECORD.unpack(_exactly(patch, RECORD.size))
        if kind not in KINDS or payload_length > MAX_SMALL + 64 * KiB:
            raise DeltaError("a record of the delta is of an unknown kind; fetch it again, or update ferry")
        payload, found, count = _exactly(patch, payload_length), Counter[str](), 0
        if kind == NUMBERS:
            segments, _, count = _read_table(streams.Reader(payload), length)
            for segment in segments:
                found[segment.kind.name] += segment.count
        yield RecordInfo(kind, length, RECORD.size + payload_length, dict(found), count)


def _end(patch: BinaryIO) -> None:
    if patch.read(1):
        raise DeltaError("the delta goes on after its last record; fetch it again")


def _apply_file(patch: BinaryIO, file: DeltaFile, open_base: Callable[[], BinaryIO], output: BinaryIO) -> None:
    small = not isinstance(file.target, FileEntry) or file.target.role != "weights"
    digest, written = hashlib.sha256(), 0
    base = open_base() if file.base else None
    try:
        if base:
            _check_base(base, file)
        for _ in range(file.records):
            record = _exactly(patch, RECORD.size)
            kind, new_length, payload_length, base_offset, check = RECORD.unpack(record)
            if kind not in KINDS:
                raise DeltaError("a record of the delta is of an unknown kind; fetch it again, or update the agent")
            if not new_length:  # costs the patch next to nothing, and the device as much as any other
                raise DeltaError("a record of the delta makes nothing; fetch it again")
            limit = MAX_SMALL if small and kind != NUMBERS else MAX_CHUNK
            if new_length > limit or written + new_length > file.target.size or payload_length > new_length + 64 * KiB:
                raise DeltaError("a record of the delta claims more bytes than it may")
            payload = _exactly(patch, payload_length)
            old = b""
            if kind == SAME:
                old = _base_range(base, file, base_offset, new_length)
            elif kind == BSDIFF:
                # Each reads the whole base, so there is one at most.
                if not small or file.base_size > MAX_SMALL or new_length != file.target.size:
                    raise DeltaError("the delta asks for bsdiff on a part of a file, or on one that is too large for it")
                old = _base_range(base, file, 0, file.base_size)
            new = _numbers(payload, base, file, new_length) if kind == NUMBERS else _decode(kind, payload, old, new_length)
            if hashlib.blake2b(new, digest_size=16).digest() != check:
                raise DeltaError("a record of the delta does not make what it should; fetch it again")
            output.write(new)
            digest.update(new)
            written += new_length
    finally:
        if base:
            base.close()
    if written != file.target.size or digest.hexdigest() != file.target.sha256:
        raise DeltaError(f"the delta does not make the {file.name} that it names; fetch it again")


def _check_base(base: BinaryIO, file: DeltaFile) -> None:
    digest = hashlib.sha256()
    while piece := base.read(MAX_CHUNK):
        digest.update(piece)
    if digest.hexdigest() != file.base:
        raise BaseError(f"the old {file.name} is not the one that the delta starts from; {file.remedy}")


def _base_range(base: BinaryIO | None, file: DeltaFile, offset: int, length: int) -> bytes:
    if base is None or offset + length > file.base_size:
        raise DeltaError("a record of the delta refers to bytes that its base does not have")
    base.seek(offset)
    data = base.read(length)
    if len(data) != length:
        raise BaseError(f"the old {file.name} is shorter than it was; {file.remedy}")
    return data


def _numbers(payload: bytes, base: BinaryIO | None, file: DeltaFile, length: int) -> bytes:
    """What a record of numbers makes."""
    reader = streams.Reader(payload)
    segments, stream_of, count = _read_table(reader, length)
    ranges = [bytes(s.length) if s.old is None else _base_range(base, file, s.old, s.length) for s in segments]
    before = [numbers.codes(data, s.kind) for data, s in zip(ranges, segments, strict=True)]
    if count == 1:
        by = streams.decode(reader, sum(s.count for s in segments))
    else:
        ids = stream_of[np.concatenate([s.contexts(old) for old, s in zip(before, segments, strict=True)])]
        ends = np.cumsum(np.bincount(ids, minlength=count))
        apart = [streams.decode(reader, stop - start) for start, stop in pairwise([0, *ends.tolist()])]
        by = np.empty(len(ids), np.uint32)
        by[np.argsort(ids, kind="stable")] = np.concatenate(apart)
    parts = np.split(by, np.cumsum([s.count for s in segments])[:-1])
    for i, segment in enumerate(segments):
        if segment.step is not None:  # then the streams said how many steps, and what that misses by follows
            walked = parts[i] != 0
            before[i] = numbers.stepped(before[i], numbers.signed(parts[i]), segment.step, segment.kind)
            for where in (~walked, walked):
                parts[i][where] = streams.decode(reader, int(np.count_nonzero(where)))
    reader.end()
    made = (numbers.moved(old, part, s.kind) for old, part, s in zip(before, parts, segments, strict=True))
    return b"".join(numbers.data(new, s.kind) for new, s in zip(made, segments, strict=True))


def _read_table(reader: streams.Reader, length: int) -> tuple[list[Segment], npt.NDArray[np.uint8], int]:
    """The segments of a record of numbers, which must make `length` bytes, the stream of each context, and how many streams."""
    table = streams.Reader(reader.frame(None, MAX_TABLE).tobytes())
    segments_count, count = _TABLE.unpack(table.take(_TABLE.size))
    if segments_count > MAX_SEGMENTS:
        raise DeltaError("a record of the delta has more segments than it may; fetch it again")
    stream_of = np.frombuffer(table.take(CONTEXTS if count > 1 else 0), np.uint8)
    if not 0 < count <= CONTEXTS or (stream_of >= count).any():
        raise DeltaError("a record of the delta names a stream that it does not have; fetch it again")
    rows = [_SEGMENT.unpack(table.take(_SEGMENT.size)) for _ in range(segments_count)]
    segments: list[Segment] = []
    for code, flags, scale, size, row, old in rows:
        kind = KIND_OF_CODE.get(code)
        if kind is None or flags > (_ROWS | _COLUMNS | _STEPS | _NEW) or abs(scale) > MAX_SCALE or size % kind.width:
            raise DeltaError("a record of the delta describes numbers in an unknown way; update the agent")
        segment = Segment(kind, size, row, None if flags & _NEW else old, scale, None, None)
        if not 0 < row <= segment.count:  # scales are spread over whole rows, so a row is as good as an allocation
            raise DeltaError("a record of the delta has a row that is empty or longer than its numbers; fetch it again")
        segments.append(segment)
    if not segments or sum(s.length for s in segments) != length or sum(s.count for s in segments) > MAX_NUMBERS:
        raise DeltaError("a record of the delta claims other numbers than it may")
    for i, (segment, (_, flags, *_)) in enumerate(zip(segments, rows, strict=True)):
        sizes = (-(-segment.count // segment.row) if flags & _ROWS else None, segment.row if flags & _COLUMNS else None)
        scales = [None if n is None else np.frombuffer(table.take(n), np.int8).astype(np.int16) for n in sizes]
        step = np.float32(_STEP.unpack(table.take(_STEP.size))[0]) if flags & _STEPS else None
        if step is not None and not (segment.kind.mantissa and 0 < step < np.inf):
            raise DeltaError("a record of the delta describes steps that cannot be; fetch it again")
        segments[i] = replace(segment, rows=scales[0], columns=scales[1], step=step)
    table.end()
    return segments, stream_of, count


def _decode(kind: int, payload: bytes, old: bytes, length: int) -> bytes:
    if kind == SAME:
        if payload:
            raise DeltaError("a record of the delta that copies carries bytes of its own")
        return old
    if kind == BSDIFF:
        return _bsdiff(payload, old, length)
    return streams.unpack(payload, length)


def _bsdiff(payload: bytes, old: bytes, length: int) -> bytes:
    """bsdiff4, after its own header and the unpacked sizes of its three streams were checked.

    bsdiff4 itself trusts the lengths in its header and unpacks without a limit.
    """
    header = struct.Struct("<8sqqq")
    if len(payload) < header.size:
        raise DeltaError("a record of the delta ends too early; fetch it again")
    magic, control, diff, new_size = header.unpack_from(payload)
    if magic != b"BSDIFF40" or new_size != length or min(control, diff) < 0 or header.size + control + diff > len(payload):
        raise DeltaError("a bsdiff record of the delta claims sizes that it may not have")
    ends = (header.size, header.size + control, header.size + control + diff, len(payload))
    for start, stop, limit in zip(ends, ends[1:], (MAX_BSDIFF_CONTROL, length, length), strict=False):
        _check_bz2(payload[start:stop], limit)
    try:
        made: bytes = bsdiff4.patch(old, payload)
    except (ValueError, OSError, MemoryError) as error:
        raise DeltaError("a bsdiff record of the delta is damaged; fetch it again") from error
    return made


def _check_bz2(data: bytes, limit: int) -> None:
    unpacker = bz2.BZ2Decompressor()
    made, chunk = 0, data
    try:
        while not unpacker.eof:
            made += len(unpacker.decompress(chunk, max_length=64 * KiB))
            chunk = b""
            if made > limit:
                raise DeltaError("a bsdiff record of the delta unpacks to more than it may")
            if unpacker.needs_input and not unpacker.eof:
                raise DeltaError("a bsdiff record of the delta ends too early; fetch it again")
        if unpacker.unused_data:  # bz2.decompress, which bsdiff4 uses, would unpack a second stream unchecked
            raise DeltaError("a bsdiff record of the delta goes on after its end; fetch it again")
    except (OSError, EOFError, ValueError) as error:
        raise DeltaError("a bsdiff record of the delta is damaged; fetch it again") from error


def _exactly(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise DeltaError("the delta ends too early; fetch it again")
    return data
