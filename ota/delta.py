"""Deltas: the difference between two bundles, lossless, in bounded memory.

Weights are compared tensor by tensor: floats are mapped to integers in their own order, so that a small change of a
value is a small difference of integers; the differences are zig-zag coded, split into byte planes and compressed with
zstd. The other files are small and go through bsdiff4 or zstd, whichever is smaller.

    >>> build(files, base_sha256, target_sha256, Path("patch"))
    >>> with Path("patch").open("rb") as patch:
    ...     apply(patch, read_header(patch), open_base, open_output)

A delta is read as a stream and its output written in order; memory is bounded by `MAX_CHUNK` for weights and
`MAX_SMALL` for other files, whatever their size. The format is described to the byte in README.md beside this file.
Every length is checked against a limit before anything is allocated for it.
"""

from __future__ import annotations

import bz2
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import bsdiff4
import numpy as np
import numpy.typing as npt
import zstandard
from pydantic import Field

from ota.errors import BaseError, DeltaError, ManifestError
from ota.manifest import MAX_WEIGHTS, Document, FileEntry, KiB, MiB, Role, Sha256, VariantName, parse

MAGIC = b"DFDELTA"
VERSION = 1
MAX_HEADER = 64 * KiB
MAX_CHUNK = 1 * MiB  # bytes of the new file that one record makes
MAX_SMALL = 8 * MiB  # bytes of a file that is handled whole (graph, tables, golden outputs)
MAX_BSDIFF_CONTROL = 1 * MiB  # bytes of bsdiff4's control block, unpacked
LEVEL = 19  # of zstd; building may be slow, applying is not affected

_PREFIX = struct.Struct("<7sBI")  # magic, version, header length
_RECORD = struct.Struct("<BBHIIQ16s")  # kind, width, reserved, new length, payload length, base offset, check
SAME, PLANES, ZSTD, BSDIFF = range(4)
KINDS = {SAME: "same", PLANES: "planes", ZSTD: "zstd", BSDIFF: "bsdiff"}
_UNSIGNED: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class DeltaFile(Document):
    """One file that a delta makes."""

    target: FileEntry
    base: Sha256 | None = Field(description="hash of the base's file of the same role and variant; None: made without one")
    base_size: int = Field(ge=0, le=MAX_WEIGHTS)
    records: int = Field(ge=1, le=1 << 20)


class Header(Document):
    """What a delta is for and what it makes, in the order in which it makes it."""

    base: Sha256 = Field(description="manifest of the bundle it starts from")
    target: Sha256 = Field(description="manifest of the bundle it makes")
    files: list[DeltaFile] = Field(min_length=1, max_length=13)


@dataclass(frozen=True)
class Elements:
    """A stretch of a file that holds numbers of one width, bytes each; 1 is plain bytes."""

    offset: int
    length: int
    width: Literal[1, 2, 4]


@dataclass(frozen=True)
class Pair:
    """One file of the new bundle, the old bundle's file of the same purpose, and where its numbers lie."""

    entry: FileEntry
    new: Path
    old: Path | None
    elements: Sequence[Elements] = ()


@dataclass(frozen=True)
class Built:
    """What building a delta gave."""

    size: int
    by_kind: dict[str, int]
    """Payload bytes by record kind."""


# Encoding


def build(pairs: Sequence[Pair], base: str, target: str, out: Path) -> Built:
    """Write the delta that turns the old files into the new ones.

    Args:
        pairs: the files of the new bundle, each with its predecessor.
        base: sha256 of the old bundle's manifest.
        target: sha256 of the new bundle's manifest.
        out: file to write.

    Raises:
        DeltaError: a file that is not weights is larger than `MAX_SMALL`.
    """
    encoded = [list(_encode(pair)) for pair in pairs]
    header = Header(
        base=base,
        target=target,
        files=[
            DeltaFile(
                target=pair.entry,
                base=_sha256(pair.old) if pair.old else None,
                base_size=pair.old.stat().st_size if pair.old else 0,
                records=len(records),
            )
            for pair, records in zip(pairs, encoded, strict=True)
        ],
    ).canonical()
    by_kind = dict.fromkeys(KINDS.values(), 0)
    with out.open("wb") as file:
        file.write(_PREFIX.pack(MAGIC, VERSION, len(header)) + header)
        for records in encoded:
            for kind, width, new, base_offset, payload in records:
                check = hashlib.blake2b(new, digest_size=16).digest()
                file.write(_RECORD.pack(kind, width, 0, len(new), len(payload), base_offset, check) + payload)
                by_kind[KINDS[kind]] += len(payload)
        size = file.tell()
    return Built(size, by_kind)


_Record = tuple[int, int, bytes, int, bytes]  # kind, width, new bytes, base offset, payload


def _encode(pair: Pair) -> Iterator[_Record]:
    new, old = pair.new.read_bytes(), pair.old.read_bytes() if pair.old else b""
    if pair.entry.role != "weights":
        yield _encode_small(new, old)
        return
    for stretch in _cover(pair.elements, len(new)):
        step = MAX_CHUNK // stretch.width * stretch.width
        for start in range(stretch.offset, stretch.offset + stretch.length, step):
            stop = min(start + step, stretch.offset + stretch.length)
            yield _encode_chunk(new[start:stop], old[start:stop], start, stretch.width)


def _encode_small(new: bytes, old: bytes) -> _Record:
    if len(new) > MAX_SMALL or len(old) > MAX_SMALL:
        raise DeltaError(f"a file of {len(new)} bytes is too large for a delta of plain files; the limit is {MAX_SMALL}")
    if new == old:
        return (SAME, 1, new, 0, b"")
    whole = (ZSTD, 1, new, 0, _compress(new))
    if not old:
        return whole
    return min(whole, (BSDIFF, 1, new, 0, bsdiff4.diff(old, new)), key=lambda record: len(record[4]))


def _encode_chunk(new: bytes, old: bytes, offset: int, width: int) -> _Record:
    if new == old:
        return (SAME, width, new, offset, b"")
    candidates: list[_Record] = [(ZSTD, 1, new, 0, _compress(new))]
    if len(new) == len(old):
        candidates.append((PLANES, width, new, offset, _compress(_planes(new, old, width))))
    return min(candidates, key=lambda record: len(record[4]))


def _cover(elements: Sequence[Elements], size: int) -> Iterator[Elements]:
    """The stretches of a file in order, with the gaps between them as plain bytes."""
    at = 0
    for stretch in sorted(elements, key=lambda e: e.offset):
        if stretch.offset > at:
            yield Elements(at, stretch.offset - at, 1)
        yield stretch
        at = stretch.offset + stretch.length
    if size > at:
        yield Elements(at, size - at, 1)


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True, write_checksum=False).compress(data)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The transform, and its inverse


def ordered(codes: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Float bit patterns as unsigned integers in the floats' own order: -inf … -0, +0 … +inf; its own inverse is `bits`.

    Negative floats have all bits flipped, others only the sign bit. Plain bytes (width 1) stay as they are.
    """
    if width == 1:
        return codes
    kind = _UNSIGNED[width]
    sign = kind(1 << (8 * width - 1))
    flip = np.where(codes & sign, kind(~kind(0)), sign)
    return codes ^ flip


def bits(codes: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """The inverse of `ordered`."""
    if width == 1:
        return codes
    kind = _UNSIGNED[width]
    sign = kind(1 << (8 * width - 1))
    flip = np.where(codes & sign, sign, kind(~kind(0)))
    return codes ^ flip


def _planes(new: bytes, old: bytes, width: int) -> bytes:
    """Zig-zag coded differences of ordered integers, most significant bytes of all elements first."""
    kind = _UNSIGNED[width]
    difference = ordered(np.frombuffer(new, kind), width) - ordered(np.frombuffer(old, kind), width)  # modulo 2^bits
    top = difference >> kind(8 * width - 1)  # 1 where negative as two's complement
    zigzag = (difference << kind(1)) ^ (kind(0) - top)
    return np.ascontiguousarray(zigzag.byteswap().view(np.uint8).reshape(-1, width).T).tobytes()


def _from_planes(planes: bytes, old: bytes, width: int) -> bytes:
    """The inverse of `_planes`."""
    kind = _UNSIGNED[width]
    zigzag = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(width, -1).T).view(kind).ravel().byteswap()
    difference = (zigzag >> kind(1)) ^ (kind(0) - (zigzag & kind(1)))
    new = ordered(np.frombuffer(old, kind), width) + difference
    return bits(new, width).astype(kind, copy=False).tobytes()


# Decoding

OpenBase = Callable[[Role, VariantName | None], BinaryIO]
OpenOutput = Callable[[FileEntry], AbstractContextManager[BinaryIO]]


def read_header(patch: BinaryIO) -> Header:
    """Read and check everything before the first record; the stream then stands at the first record.

    Raises:
        DeltaError: not a delta, of another version, or over a limit.
    """
    prefix = patch.read(_PREFIX.size)
    if len(prefix) != _PREFIX.size:
        raise DeltaError("the delta ends inside its first bytes; fetch it again")
    magic, version, length = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise DeltaError("the file is not a delta")
    if version != VERSION:
        raise DeltaError(f"the delta has format version {version}, this agent reads {VERSION}; update the agent")
    if length > MAX_HEADER:
        raise DeltaError(f"the delta's header claims {length} bytes, more than {MAX_HEADER}")
    data = _exactly(patch, length)
    try:
        return parse(Header, data, MAX_HEADER)
    except ManifestError as error:
        raise DeltaError(f"the delta's header is damaged: {error}") from error


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
        with open_output(file.target) as output:
            _apply_file(patch, file, open_base, output)
    if patch.read(1):
        raise DeltaError("the delta goes on after its last record; fetch it again")


def _apply_file(patch: BinaryIO, file: DeltaFile, open_base: OpenBase, output: BinaryIO) -> None:
    limit = MAX_CHUNK if file.target.role == "weights" else MAX_SMALL
    digest, written = hashlib.sha256(), 0
    base = open_base(file.target.role, file.target.variant) if file.base else None
    try:
        if base:
            _check_base(base, file)
        for _ in range(file.records):
            record = _exactly(patch, _RECORD.size)
            kind, width, reserved, new_length, payload_length, base_offset, check = _RECORD.unpack(record)
            if kind not in KINDS or width not in _UNSIGNED or reserved or new_length % width:
                raise DeltaError("a record of the delta is of an unknown kind; fetch it again, or update the agent")
            if new_length > limit or written + new_length > file.target.size or payload_length > new_length + 64 * KiB:
                raise DeltaError("a record of the delta claims more bytes than it may")
            payload = _exactly(patch, payload_length)
            old = b""
            if kind in (SAME, PLANES):
                old = _base_range(base, file, base_offset, new_length)
            elif kind == BSDIFF:
                if file.base_size > MAX_SMALL:
                    raise DeltaError("the delta asks for bsdiff on a file that is too large for it")
                old = _base_range(base, file, 0, file.base_size)
            new = _decode(kind, width, payload, old, new_length)
            if hashlib.blake2b(new, digest_size=16).digest() != check:
                raise DeltaError("a record of the delta does not make what it should; fetch it again")
            output.write(new)
            digest.update(new)
            written += new_length
    finally:
        if base:
            base.close()
    if written != file.target.size or digest.hexdigest() != file.target.sha256:
        raise DeltaError(f"the delta does not make the {file.target.role} file that it names; fetch it again")


def _check_base(base: BinaryIO, file: DeltaFile) -> None:
    digest = hashlib.sha256()
    while piece := base.read(MAX_CHUNK):
        digest.update(piece)
    if digest.hexdigest() != file.base:
        raise BaseError(f"the installed {file.target.role} file is not the one the delta starts from; fetch the full bundle")


def _base_range(base: BinaryIO | None, file: DeltaFile, offset: int, length: int) -> bytes:
    if base is None or offset + length > file.base_size:
        raise DeltaError("a record of the delta refers to bytes that its base does not have")
    base.seek(offset)
    data = base.read(length)
    if len(data) != length:
        raise BaseError(f"the installed {file.target.role} file is shorter than it was; fetch the full bundle")
    return data


def _decode(kind: int, width: int, payload: bytes, old: bytes, length: int) -> bytes:
    if kind == SAME:
        if payload:
            raise DeltaError("a record of the delta that copies carries bytes of its own")
        return old
    if kind == BSDIFF:
        return _bsdiff(payload, old, length)
    data = _decompress(payload, length)
    return data if kind == ZSTD else _from_planes(data, old, width)


def _decompress(payload: bytes, length: int) -> bytes:
    """zstd, only if the frame says beforehand that it unpacks to exactly `length` bytes."""
    try:
        if zstandard.get_frame_parameters(payload).content_size != length:
            raise DeltaError("a record of the delta unpacks to another length than it claims")
        # One frame and nothing after it: what follows would be carried but never checked.
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise DeltaError("a record of the delta cannot be unpacked; fetch it again") from error


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
