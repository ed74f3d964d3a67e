"""The container of a delta, and how a device applies it: read records in order, make each range of the new files, check it.

A record of numbers, such as weights, states how far each number moved in the order of its kind (`numbers`). It groups these moves
into streams of numbers that are expected to move equally far (`streams`). Other bytes are made by zstd, which may refer to a
range of the old file. A small file may be made as a whole by bsdiff4, where that is shorter.

A delta is read as a stream, and its output is written in order. Memory is bounded by `MAX_CHUNK` for weights and by `MAX_SMALL`
for other files, however large the files are. docs/delta-format.md describes the format to the byte. Every length is checked against a
limit before memory is allocated for it.
"""

from __future__ import annotations

import bz2
import hashlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

import bsdiff4
import numpy as np
import numpy.typing as npt
from backports import zstd

from ota.delta import numbers, streams, updates, vectors
from ota.delta.header import BundleFile, DeltaFile, Header, PlainFile, parse
from ota.delta.numbers import CONTEXTS, KIND_OF_CODE, LEAST_STEP, MAX_FACTOR, Kind, KindName, Product, Scales
from ota.errors import BaseError, DeltaError
from ota.limits import KiB, MiB

MAGIC = b"DFDELTA"
VERSION, VERSIONS = 2, (1, 2)  # the one that is written unless another is asked for; those that are read
MAX_HEADER = 64 * KiB
MAX_CHUNK = 1 * MiB  # bytes of the new file that one record makes
MAX_NUMBERS = 512 * KiB  # numbers in a record; decoding takes some 40 bytes of memory for each, at worst 130
MAX_RECORDS = 64 * KiB  # records of a file
MAX_SEGMENTS = 128  # segments of a record: each takes time of its own, however few numbers it has
UPDATE_WEIGHS = updates.MAX_STRETCHES // MAX_SEGMENTS  # records that an update counts as, because its stretches take as much time
MAX_TABLE = 1 * MiB  # bytes of a record's table of segments, unpacked
MAX_SCALE = 4000  # half octaves
MAX_RANK = 16  # rank of the product that a segment may be predicted by, if all factors share one stream
MAX_EXPONENT = updates.MAX_EXPONENT  # exponent of the power of two that scales that product, either way
MAX_RANGE = 8 * MiB  # bytes of the old file that a record of zstd may refer to
MAX_SMALL = 8 * MiB  # bytes of a file that is handled whole (graph, tables, golden outputs)
MAX_BSDIFF_CONTROL = 1 * MiB  # bytes of bsdiff4's control block, unpacked

# What headers look like, so that zstd need not say it (version 2).
_USUAL = (
    b'{"base":"0","files":[{"base":"2","base_size":,"target":{"role":"graph","sha256":"2","size":,"variant":null}},'
    b'{"base":"3","base_size":,"target":{"role":"reference","sha256":"4","size":"golden""sampler","overlay","turbo","fast","dev"}},'
    b'{"base":null,"base_size":0,"target":{"role":"weights","sha256":"1","size":,"variant":"full"}}],"target":"1"}'
    b'{"base":"0","files":[{"base":"0","base_size":0,"target":{"sha256":"1","size":0}}],"target":"1"}'
)
_HASH, _NUMBER = re.compile(rb"[0-9a-f]{64}"), re.compile(rb'"([0-9]{1,2})"')

PREFIX = struct.Struct("<7sBI")  # magic, version, header length
RECORD = struct.Struct("<IIIQ16s")  # kind, new length, payload length, base offset, check
_TABLE = struct.Struct("<HB")  # segments, streams
_SEGMENT = struct.Struct("<BBhIIQ")  # kind, flags, scale, bytes, numbers in a row, base offset
_ROWS, _COLUMNS, _STEPS, _NEW, _FACTORS, _VECTORS = 1, 2, 4, 8, 16, 32  # flags; the last since version 2
_STEP = struct.Struct("<f")
_PRODUCT = struct.Struct("<Bb")  # rank, exponent of two
SAME, NUMBERS, ZSTD, BSDIFF, ZSTD_PREFIX, UPDATE = range(6)
KINDS = {SAME: "same", NUMBERS: "numbers", ZSTD: "zstd", BSDIFF: "bsdiff", ZSTD_PREFIX: "beside", UPDATE: "update"}


@dataclass(frozen=True)
class Segment:
    """Consecutive numbers of one kind, and how far they are expected to move; see `numbers.contexts`."""

    kind: Kind
    length: int  # bytes
    row: int  # numbers in a row
    old: int | None  # offset of the predecessors in the old file; None: there are none, and the numbers move from 0
    scale: int
    rows: Scales | None = None
    columns: Scales | None = None
    step: np.float32 | None = None  # floats move by whole steps of this size, and the streams count steps
    product: Product | None = None  # the numbers are moved by it before anything else

    def contexts(self, old: numbers.Codes) -> npt.NDArray[np.uint8]:
        """Return each number's context as `numbers.contexts` does.

        With steps, exponents are left out: how many steps a number moves does not depend on its own exponent.
        """
        kind = self.kind if self.step is None else numbers.KINDS["int8"]
        return numbers.contexts(old, kind, self.scale, self.rows, self.columns, self.row)

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return self.length * 2 if self.kind.packed else self.length // self.kind.width

    def before(self, old: numbers.Codes) -> numbers.Codes:
        """Return the numbers that the streams start from: the old ones, moved by the product if there is one."""
        if self.product is None or self.product.left is None or self.product.right is None:
            return old
        return numbers.predicted(old, self.product.left, self.product.right, self.product.exponent, self.kind)

    @property
    def way(self) -> str:
        """How its numbers move, in a word: new, product, each or steps."""
        if self.old is None:
            return "new"
        return "product" if self.product else "each" if self.step is None else "steps"

    @property
    def table_rows(self) -> int:
        """How many rows it has; the last may be shorter."""
        return -(-self.count // self.row)


def pack_table(segments: Sequence[Segment], stream_of: npt.NDArray[np.uint8] | None, version: int = 1) -> bytes:
    """Pack the start of a record of numbers: the table of its segments, then the factors of all their products.

    Args:
        segments: in the order of the file.
        stream_of: the stream of each context; None: there is one stream.
        version: of the format. In version 1, all factors share one stream.
    """
    made = _TABLE.pack(len(segments), 1 if stream_of is None else int(stream_of.max()) + 1)
    made += b"" if stream_of is None else stream_of.tobytes()
    for s in segments:
        said = (s.rows, s.columns, s.step, None if s.old is not None else True, s.product)
        kinds = (_ROWS, _COLUMNS, _STEPS, _NEW, _FACTORS if version == 1 else _VECTORS)
        flags = sum(flag for flag, value in zip(kinds, said, strict=True) if value is not None)
        made += _SEGMENT.pack(s.kind.code, flags, s.scale, s.length, s.row, s.old or 0)
    for s in segments:
        made += b"".join(scales.astype(np.int8).tobytes() for scales in (s.rows, s.columns) if scales is not None)
        made += b"" if s.step is None else _STEP.pack(s.step)
        made += b"" if s.product is None else _PRODUCT.pack(s.product.rank, s.product.exponent)
    held = [s.product for s in segments if s.product]
    if version > 1:
        apart = [vector for p in held if p.left is not None and p.right is not None for vector in (*p.left.T, *p.right)]
        return streams.frame(made) + (vectors.encode(apart) if apart else b"")
    sides = [side.reshape(-1) for p in held for side in (p.left, p.right) if side is not None]
    return streams.frame(made) + (streams.encode(numbers.zigzag(np.concatenate(sides))) if sides else b"")


def pack_header(header: Header, version: int) -> bytes:
    """Pack what a delta begins with: prefix and header.

    Since version 2, the hashes are apart: each one once, in 32 bytes, and the JSON holds its number in its place.
    """
    data = header.canonical()
    if version > 1:
        hashes, numbered = _numbered(data)
        options: dict[int, int] = {zstd.CompressionParameter.compression_level: 19}
        packed = zstd.compress(numbered, options=options, zstd_dict=zstd.ZstdDict(_USUAL, is_raw=True).as_prefix)
        data = bytes([len(hashes)]) + b"".join(bytes.fromhex(digest.decode()) for digest in hashes) + packed
    return PREFIX.pack(MAGIC, version, len(data)) + data


def _numbered(said: bytes) -> tuple[list[bytes], bytes]:
    """Take the hashes out of the JSON of a header: return them, and the JSON with numbers in their places."""
    hashes = list(dict.fromkeys(_HASH.findall(said)))
    return hashes, _HASH.sub(lambda found: b"%d" % hashes.index(found[0]), said)


def _unpacked_header(data: bytes) -> bytes:
    """Return the JSON of a header of version 2.

    Raises:
        DeltaError: the bytes are damaged.
    """
    count = data[0] if data else 0
    start = 1 + 32 * count
    hashes = [data[at : at + 32].hex().encode() for at in range(1, start, 32)]
    try:
        said = streams.unpack(data[start:], None, MAX_HEADER, known=_USUAL)
        made = _NUMBER.sub(lambda found: b'"%b"' % hashes[int(found[1])], said)
    except (DeltaError, IndexError) as error:
        raise DeltaError("the delta's header is damaged: it cannot be unpacked; fetch it again") from error
    if _numbered(made) != (hashes, said):  # a hash that is not used, or is there twice: two forms of one header
        raise DeltaError("the delta's header is damaged: its hashes are not those that it names; fetch it again")
    return made


OpenBase = Callable[[DeltaFile], BinaryIO]
OpenOutput = Callable[[BundleFile], AbstractContextManager[BinaryIO]]


def read_header(patch: BinaryIO) -> Header:
    """Read and check everything before the first record; the stream then stands at the first record.

    Raises:
        DeltaError: the bytes are not a delta, are damaged, are of another version, or exceed a limit.
    """
    prefix = patch.read(PREFIX.size)
    if len(prefix) != PREFIX.size:
        raise DeltaError("the delta ends inside its first bytes; fetch it again")
    magic, version, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise DeltaError("the file is not a delta")
    if version not in VERSIONS:
        read = " and ".join(map(str, VERSIONS))
        raise DeltaError(f"the delta has format version {version}, but this agent reads {read}; update the agent")
    if length > MAX_HEADER:
        raise DeltaError(f"the delta's header claims {length} bytes, more than {MAX_HEADER}")
    data = _exactly(patch, length)
    data = data if version == 1 else _unpacked_header(data)
    try:
        header = parse(data)
    except ValueError as error:
        raise DeltaError(f"the delta's header is damaged: {error}; fetch it again") from error
    if header.canonical() != data:  # two readers might read other forms differently, for example a key that occurs twice
        raise DeltaError("the delta's header is damaged: it is not canonical JSON; fetch it again")
    return header


def apply(patch: BinaryIO, header: Header, open_base: OpenBase, open_output: OpenOutput) -> None:
    """Make the new files, in the header's order.

    Each record's result is checked before it is written. Each file's length and hash are checked when it is complete.

    Args:
        patch: the delta, standing at its first record (after `read_header`).
        header: what `read_header` returned; compare its base and target with what is signed before calling this.
        open_base: opens the file that a file is made from: one of the old bundle, or one that the delta made before.
        open_output: opens a new file for writing; it is closed when complete.

    Raises:
        DeltaError: the delta is damaged, exceeds a limit, or is for plain files; discard the outputs.
        BaseError: a file that another is made from is not the one that the delta names.
    """
    for file in header.files:
        if not isinstance(file.target, BundleFile):
            raise DeltaError("the delta is for plain files and not for bundles; apply it with `ferry delta apply`")
        with open_output(file.target) as output:
            _apply_file(patch, file, partial(open_base, file), output)
    _end(patch)


def apply_plain(patch: BinaryIO, header: Header, base: BinaryIO, output: BinaryIO, kept: bool = False) -> None:
    """Make the one plain file of a delta, then close its base.

    Args:
        patch: the delta, standing at its first record (after `read_header`).
        header: what `read_header` returned.
        base: the file that the delta starts from.
        output: the file to make.
        kept: `output` can be read; results of records that it holds already, from its start, are verified and kept.

    Raises:
        DeltaError: the delta is damaged, exceeds a limit, or is for bundles; discard what was written.
        BaseError: `base` is not the file that the delta starts from.
    """
    (file, *others) = header.files
    if others or not isinstance(file.target, PlainFile):
        raise DeltaError("the delta is for bundles and not for plain files; devices apply it")
    _apply_file(patch, file, lambda: base, output, kept)
    _end(patch)


@dataclass(frozen=True)
class SegmentInfo:
    """What a record states about the numbers of one segment."""

    kind: KindName
    way: str  # how they move: each, steps, product, or new
    count: int
    length: int  # bytes of the new file
    cost: float | None
    """About how many bytes of the delta it takes; None: not known without the base, because segments share streams."""


@dataclass(frozen=True)
class RecordInfo:
    """What a record states about itself."""

    kind: int
    length: int  # bytes of the new file
    size: int  # bytes of the delta
    segments: list[SegmentInfo]
    streams: int


def records(patch: BinaryIO, file: DeltaFile, base: BinaryIO | None = None) -> Iterator[RecordInfo]:
    """Yield what each record of one file states, without making the file.

    Args:
        patch: the delta, standing at the first of these records.
        file: the header's entry of the file.
        base: the file that the delta starts from, to say what each segment costs.

    Raises:
        DeltaError: the delta is damaged.
        BaseError: `base` is not the file that the delta starts from.
    """
    made = 0
    if base:
        _check_base(base, file)
    while made < file.target.size:
        kind, length, payload_length, _, _ = RECORD.unpack(_exactly(patch, RECORD.size))
        if kind not in KINDS or payload_length > MAX_SMALL + 64 * KiB:
            raise DeltaError("a record of the delta is of an unknown kind; fetch it again, or update ferry")
        if not length:
            raise DeltaError("a record of the delta makes nothing; fetch it again")
        made += length
        payload, found, count = _exactly(patch, payload_length), list[SegmentInfo](), 0
        if kind == UPDATE:
            found = _told(payload, length)
        if kind == NUMBERS:
            reader = streams.Reader(payload)
            segments, stream_of, count = _read_table(reader, length)
            costs: list[float | None] = [None] * len(segments)
            if base:
                table = 4 + streams.Reader(payload).number()
                thin = np.array([s.product.rank * (s.table_rows + s.row) if s.product else 0.0 for s in segments])
                spent = (RECORD.size + table) / len(segments) + (reader.at - table) * thin / max(thin.sum(), 1)
                _moved(reader, segments, stream_of, count, base, file, spent)
                costs = [*spent.tolist()]
            found = [SegmentInfo(s.kind.name, s.way, s.count, s.length, cost) for s, cost in zip(segments, costs, strict=True)]
        yield RecordInfo(kind, length, RECORD.size + payload_length, found, count)


def _told(payload: bytes, length: int) -> list[SegmentInfo]:
    """Say what a record of an update states about each stretch; what each costs is known from the record alone."""
    stretches, checks = updates.read(payload, length)
    bits = np.array([sum(map(_bits, s.vectors)) for s in stretches], np.float64)
    sharing = np.array([s.count if s.shared else 0 for s in stretches], np.float64)
    for s in [s for s in stretches if s.shared][:1]:  # what all share is divided by how many numbers each has
        bits += sharing / sharing.sum() * (_bits(s.shared.steps) if s.shared and s.shared.steps is not None else 0.0)
    table = 4 + streams.Reader(payload).number() + RECORD.size + sum(map(len, checks))
    costs = table / len(stretches) + (len(payload) + RECORD.size - table) * bits / max(bits.sum(), 1.0)
    return [
        SegmentInfo(s.kind.name, updates.WAYS[s.way], s.count, s.length, cost)
        for s, cost in zip(stretches, costs.tolist(), strict=True)
    ]


def _bits(vector: numbers.Factors) -> float:
    return float(np.log2(np.abs(vector) + 1.1).sum())


def _end(patch: BinaryIO) -> None:
    if patch.read(1):
        raise DeltaError("the delta goes on after its last record; fetch it again")


def _apply_file(
    patch: BinaryIO, file: DeltaFile, open_base: Callable[[], BinaryIO], output: BinaryIO, kept: bool = False
) -> None:
    """Make one file of a delta from its records, then close its base; `kept` is as in `apply_plain`."""
    digest, written, count = hashlib.sha256(), 0, 0
    base = open_base() if file.base else None
    try:
        if base:
            _check_base(base, file)
        while written < file.target.size:
            count += 1
            record = _read_record(patch, file, written, count)
            count += UPDATE_WEIGHS - 1 if record.kind == UPDATE else 0
            for part in _parts(record, base, file):
                new = _held(part, output, written) if kept else None
                kept = new is not None
                if new is None:
                    new = part.make()
                    if hashlib.blake2b(new, digest_size=16).digest() != part.check:
                        raise DeltaError("a record of the delta does not make what it should; fetch it again")
                    output.write(new)
                digest.update(new)
                written += part.length
    finally:
        if base:
            base.close()
    if written != file.target.size or digest.hexdigest() != file.target.sha256:
        raise DeltaError(f"the delta does not make the {file.name} that it names; fetch it again")


@dataclass(frozen=True)
class _Record:
    """One record whose kind and lengths are known to be allowed."""

    kind: int
    length: int  # bytes of the new file
    base_offset: int
    check: bytes  # hash of what it makes
    payload: bytes


def _read_record(patch: BinaryIO, file: DeltaFile, written: int, count: int) -> _Record:
    """Read the record that goes on after `written` bytes of a file, its `count`-th; all of it is checked before the payload."""
    kind, new_length, payload_length, base_offset, check = RECORD.unpack(_exactly(patch, RECORD.size))
    if count > MAX_RECORDS:
        raise DeltaError(f"the delta builds the {file.name} from more than {MAX_RECORDS} records; publish it without a delta")
    if kind not in KINDS:
        raise DeltaError("a record of the delta is of an unknown kind; fetch it again, or update the agent")
    if not new_length:  # costs the sender a few bytes, and the device as much time as any other record
        raise DeltaError("a record of the delta makes nothing; fetch it again")
    limit = MAX_SMALL if file.small and kind not in (NUMBERS, UPDATE) else MAX_CHUNK if kind != UPDATE else updates.MAX_BYTES
    most = updates.MAX_PAYLOAD if kind == UPDATE else new_length + 64 * KiB
    if new_length > limit or written + new_length > file.target.size or payload_length > most:
        raise DeltaError("a record of the delta claims more bytes than it may")
    return _Record(kind, new_length, base_offset, check, _exactly(patch, payload_length))


@dataclass(frozen=True)
class _Part:
    """Bytes that are made, checked and written at once: all of a record, or one piece of an update."""

    length: int
    check: bytes
    make: Callable[[], bytes]


def _parts(record: _Record, base: BinaryIO | None, file: DeltaFile) -> Iterator[_Part]:
    """Yield the parts of a record, in the order of the file."""
    if record.kind != UPDATE:
        yield _Part(record.length, record.check, partial(_made, record, base, file))
        return
    stretches, checks = updates.read(record.payload, record.length)
    known = partial(_base_range, base, file)
    for piece, check in zip(updates.pieces(stretches), (record.check, *checks), strict=True):
        yield _Part(piece.length, check, partial(piece.make, known))


def _held(part: _Part, output: BinaryIO, written: int) -> bytes | None:
    """Return what a part makes if the output holds it already; otherwise cut the output off after `written` bytes."""
    there = output.read(part.length)
    if hashlib.blake2b(there, digest_size=16).digest() == part.check:
        return there
    output.seek(written)
    output.truncate()
    return None


def _made(record: _Record, base: BinaryIO | None, file: DeltaFile) -> bytes:
    """Make the bytes of the new file that a record stands for."""
    if record.kind == NUMBERS:
        return _numbers(record.payload, base, file, record.length)
    if record.kind == SAME:
        return _same(record, base, file)
    if record.kind == BSDIFF:
        return _whole(record, base, file)
    if record.kind == ZSTD_PREFIX:
        return _beside(record, base, file)
    return streams.unpack(record.payload, record.length)


def _same(record: _Record, base: BinaryIO | None, file: DeltaFile) -> bytes:
    """Copy a range of the base."""
    if record.payload:
        raise DeltaError("a record of the delta that copies carries bytes of its own")
    return _base_range(base, file, record.base_offset, record.length)


def _whole(record: _Record, base: BinaryIO | None, file: DeltaFile) -> bytes:
    """Make a small file as a whole by bsdiff4.

    Every such record reads the whole base, so a file may have only one, which makes all of it.
    """
    if not file.small or file.base_size > MAX_SMALL or record.length != file.target.size:
        raise DeltaError("the delta asks for bsdiff on a part of a file, or on one that is too large for it")
    return _bsdiff(record.payload, _base_range(base, file, 0, file.base_size), record.length)


def _beside(record: _Record, base: BinaryIO | None, file: DeltaFile) -> bytes:
    """Unpack with zstd what may refer to a range of the base."""
    reader = streams.Reader(record.payload)
    known = reader.number()
    if known > MAX_RANGE:
        raise DeltaError("a record of the delta refers to more of its base than it may")
    return streams.unpack(reader.rest(), record.length, known=_base_range(base, file, record.base_offset, known))


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
    """Decode a record of numbers to the bytes that it makes."""
    reader = streams.Reader(payload)
    segments, stream_of, count = _read_table(reader, length)
    before, parts = _moved(reader, segments, stream_of, count, base, file)
    made = (numbers.moved(old, part, s.kind) for old, part, s in zip(before, parts, segments, strict=True))
    return b"".join(numbers.data(new, s.kind) for new, s in zip(made, segments, strict=True))


def _moved(
    reader: streams.Reader,
    segments: Sequence[Segment],
    stream_of: npt.NDArray[np.uint8],
    count: int,
    base: BinaryIO | None,
    file: DeltaFile,
    spent: npt.NDArray[np.float64] | None = None,
) -> tuple[list[numbers.Codes], list[streams.Numbers]]:
    """Decode from where the numbers of each segment move, and how far; add the bytes that each segment takes to `spent`."""
    ranges = (bytes(s.length) if s.old is None else _base_range(base, file, s.old, s.length) for s in segments)
    before = [s.before(numbers.codes(data, s.kind)) for data, s in zip(ranges, segments, strict=True)]
    ends = np.cumsum([s.count for s in segments])
    if count == 1:
        ids = np.zeros(int(ends[-1]), np.uint8)
    else:
        classes = np.concatenate([s.contexts(old) for s, old in zip(segments, before, strict=True)])
        ids = numbers.translated(classes, np.pad(stream_of, (0, 256 - CONTEXTS)))
    by = np.zeros(int(ends[-1]), np.uint32)
    for number in range(count):
        start = reader.at
        where = np.flatnonzero(ids == number)
        at, found = streams.decode_apart(reader, len(where))
        by[where if at is None else where[at]] = found
        if spent is not None and len(where):
            owner = np.searchsorted(ends, where, side="right")
            weight = np.bincount(owner, np.log2(by[where] + 1.1), len(segments))
            spent += (reader.at - start) * weight / weight.sum()
    parts = np.split(by, ends[:-1])
    for i, segment in enumerate(segments):
        if segment.step is not None:  # the streams counted steps; what the steps miss follows
            walked, start = parts[i] != 0, reader.at
            before[i] = numbers.stepped(before[i], numbers.signed(parts[i]), segment.step, segment.kind)
            for missed in (~walked, walked):
                parts[i][missed] = streams.decode(reader, int(np.count_nonzero(missed)))
            if spent is not None:
                spent[i] += reader.at - start
    reader.end()
    return before, parts


def _read_table(reader: streams.Reader, length: int) -> tuple[list[Segment], npt.NDArray[np.uint8], int]:
    """Read the table of a record of numbers, which must make `length` bytes.

    Returns:
        The segments, the stream of each context, and how many streams there are.
    """
    table = streams.Reader(reader.frame(None, MAX_TABLE).tobytes())
    segments_count, count = _TABLE.unpack(table.take(_TABLE.size))
    if segments_count > MAX_SEGMENTS:
        raise DeltaError("a record of the delta has more segments than it may; fetch it again")
    stream_of = np.frombuffer(table.take(CONTEXTS if count > 1 else 0), np.uint8)
    if not 0 < count <= CONTEXTS or (stream_of >= count).any():
        raise DeltaError("a record of the delta names a stream that it does not have; fetch it again")
    rows = [_SEGMENT.unpack(table.take(_SEGMENT.size)) for _ in range(segments_count)]
    segments: list[Segment] = []
    known = _ROWS | _COLUMNS | _STEPS | _NEW | _FACTORS | _VECTORS
    for code, flags, scale, size, row, old in rows:
        kind = KIND_OF_CODE.get(code)
        both = flags & _FACTORS and flags & _VECTORS
        if kind is None or flags & ~known or both or abs(scale) > MAX_SCALE or size % kind.width:
            raise DeltaError("a record of the delta describes numbers in an unknown way; update the agent")
        segment = Segment(kind, size, row, None if flags & _NEW else old, scale)
        if not 0 < row <= segment.count:  # scales are allocated by whole rows, so the row's length must be limited
            raise DeltaError("a record of the delta has a row that is empty or longer than its numbers; fetch it again")
        segments.append(segment)
    if not segments or sum(s.length for s in segments) != length or sum(s.count for s in segments) > MAX_NUMBERS:
        raise DeltaError("a record of the delta claims other numbers than it may")
    for i, (segment, (_, flags, *_)) in enumerate(zip(segments, rows, strict=True)):
        sizes = segment.table_rows if flags & _ROWS else None, segment.row if flags & _COLUMNS else None
        scales = [None if n is None else np.frombuffer(table.take(n), np.int8).astype(np.int16) for n in sizes]
        step = np.float32(_STEP.unpack(table.take(_STEP.size))[0]) if flags & _STEPS else None
        if step is not None and not (segment.kind.mantissa and LEAST_STEP <= step < np.inf):
            raise DeltaError("a record of the delta describes impossible steps; fetch it again")
        product = Product(*_PRODUCT.unpack(table.take(_PRODUCT.size))) if flags & (_FACTORS | _VECTORS) else None
        most = updates.MAX_RANK if flags & _VECTORS else MAX_RANK
        # The product is computed in full, with the unused end of the last row, so it has to be thin.
        if product and not (
            0 < product.rank <= most and abs(product.exponent) <= MAX_EXPONENT and segment.kind.name != "bytes"
            and product.rank * (segment.table_rows + segment.row) <= segment.count
        ):  # fmt: skip
            raise DeltaError("a record of the delta describes an impossible product; fetch it again")
        segments[i] = replace(segment, rows=scales[0], columns=scales[1], step=step, product=product)
    table.end()
    _read_factors(reader, segments, [bool(flags & _FACTORS) for _, flags, *_ in rows])
    _read_vectors(reader, segments, [bool(flags & _VECTORS) for _, flags, *_ in rows])
    return segments, stream_of, count


def _read_factors(reader: streams.Reader, segments: list[Segment], chosen: Sequence[bool]) -> None:
    """Read the two sides of the products of the chosen segments, all in one stream, into the segments."""
    sizes = [
        (s.table_rows * s.product.rank, s.product.rank * s.row)
        for s, wanted in zip(segments, chosen, strict=True)
        if wanted and s.product
    ]
    if not sizes:
        return
    found = numbers.signed(streams.decode(reader, sum(map(sum, sizes))))
    if int(np.abs(found.astype(np.int64)).max()) > MAX_FACTOR:
        raise DeltaError("a record of the delta holds a factor that is too large; fetch it again")
    at = 0
    for i, segment in enumerate(segments):
        if segment.product and chosen[i]:
            rank, left, right = (
                segment.product.rank,
                segment.table_rows * segment.product.rank,
                segment.product.rank * segment.row,
            )
            sides = found[at : at + left], found[at + left : at + left + right]
            product = replace(segment.product, left=sides[0].reshape(-1, rank), right=sides[1].reshape(rank, -1))
            segments[i] = replace(segment, product=product)
            at += left + right


def _read_vectors(reader: streams.Reader, segments: list[Segment], chosen: Sequence[bool]) -> None:
    """Read the vectors of the products of the chosen segments into the segments."""
    thin = [(i, s, s.product) for i, s in enumerate(segments) if chosen[i] and s.product]
    sizes = [size for _, s, product in thin for size in (*[s.table_rows] * product.rank, *[s.row] * product.rank)]
    found = vectors.decode(reader, sizes) if sizes else []
    at = 0
    for i, segment, product in thin:
        middle, stop = at + product.rank, at + 2 * product.rank
        left, right = np.stack(found[at:middle], axis=1), np.stack(found[middle:stop])
        segments[i] = replace(segment, product=replace(product, left=left, right=right))
        at = stop


def _bsdiff(payload: bytes, old: bytes, length: int) -> bytes:
    """Apply a bsdiff4 patch after checking its header and the unpacked sizes of its three streams.

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
