"""Build, inspect and apply deltas between any two files; find the tensors of model files and match them with the old ones.

    >>> built = build(Path("old.onnx"), Path("new.onnx"), Path("patch"))
    >>> apply(Path("old.onnx"), Path("patch"), Path("again.onnx"))

Tensors are found in ONNX files (inside the file, or in the external data that another ONNX file describes) and in safetensors
files. Everything else is treated as bytes. Finding tensors only makes the delta smaller: every file is restored bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from ota import output
from ota.delta import format as container
from ota.delta import streams
from ota.delta.header import Header, PlainFile
from ota.delta.numbers import KINDS, KindName
from ota.delta.plan import Elements, Pair, sha256_of
from ota.delta.wire import fields, varint
from ota.errors import OperatorError
from ota.limits import MAX_WEIGHTS, KiB, MiB
from ota.output import shown

if TYPE_CHECKING:
    from ota.delta.encode import Built
    from ota.delta.factors import Claim
    from ota.delta.forecast import Forecast

_ONNX_KINDS: dict[int, KindName] = {
    1: "float32", 2: "bytes", 3: "int8", 9: "bytes", 10: "float16", 16: "bfloat16", 21: "int4", 22: "int4",
}  # fmt: skip
_SAFETENSORS_KINDS: dict[str, KindName] = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "bytes", "BOOL": "bytes",
}  # fmt: skip
_MAX_SAFETENSORS_HEADER = 100 * MiB  # the limit of the format itself
_MAX_TENSORS = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's numbers lie in a file."""

    name: str
    """Name in the model file."""
    kind: KindName
    """Kind of its numbers."""
    shape: tuple[int, ...]
    """Length of each axis."""
    offset: int
    """Where it begins in the file, in bytes."""
    length: int
    """Bytes that it takes."""

    @property
    def row(self) -> int:
        """How many numbers each index of the first axis has; 0 if there are fewer than two axes."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else 0


def build(
    old: Path, new: Path, out: Path, graph: Path | None = None, old_graph: Path | None = None, factors: Path | None = None,
    version: int = container.VERSION,
) -> Built:  # fmt: skip
    """Write the delta that turns one file into another.

    Args:
        old: the file before.
        new: the file after.
        out: where the delta goes; see `ota.output`.
        graph: the ONNX file that says where the tensors of `new` lie, if `new` is its external data.
        old_graph: the same for `old`; None: the same as `graph`.
        factors: what the training says of its update, see `ota.delta.factors`; it makes the delta smaller where it is right.
        version: of the format; 1 for programs before 0.3.0.

    Raises:
        DeltaError: the delta would take too many records.
        OperatorError: a file is not a regular file, cannot be read, is too large, or changes while it is read; or `factors` is not
            a file of factors, or these overflow; or `out` cannot be written, or is one of the input files.
    """
    from ota.delta import encode  # applying does not need it

    _check_inputs(old, new, graph, old_graph, factors)
    output.check(out, [old, new, graph, old_graph, factors])
    streams.keep_memory()
    base, target = _sha256(old), _sha256(new)
    read = {factors: _sha256(factors)} if factors else {}
    with output.fresh(out) as file, _unchanged({old: base, new: target} | read):
        return encode.write([_pair(old, new, graph, old_graph, factors, base, target)], base, target, file, version)


def estimate(old: Path, new: Path, graph: Path | None = None, old_graph: Path | None = None, factors: Path | None = None) -> int:
    """Estimate how many bytes `build` would write; see `forecast`."""
    return forecast(old, new, graph, old_graph, factors).bytes


def forecast(
    old: Path, new: Path, graph: Path | None = None, old_graph: Path | None = None, factors: Path | None = None
) -> Forecast:
    """Estimate, with bounds, how many bytes `build` would write, in a fraction of its time; arguments and errors are the same."""
    from ota.delta.forecast import forecast

    _check_inputs(old, new, graph, old_graph, factors)
    streams.keep_memory()
    return forecast([_pair(old, new, graph, old_graph, factors, "0" * 64, "1" * 64)])


def _pair(
    old: Path, new: Path, graph: Path | None, old_graph: Path | None, factors: Path | None, old_digest: str, digest: str
) -> Pair:
    for path in (old, new):
        if path.stat().st_size > MAX_WEIGHTS:
            raise OperatorError(f"{shown(path)} is larger than {MAX_WEIGHTS // MiB} MiB, too large for a delta; split it")
    found = elements(old, new, graph, old_graph, claims(factors))
    return Pair(PlainFile(size=new.stat().st_size, sha256=digest), new, old, found, old_digest)


@dataclass(frozen=True)
class Part:
    """One record of a delta, or one segment of numbers if the base was given."""

    kind: str
    """Kind of the record, such as "numbers" or "same"."""
    offset: int
    """Where its bytes begin in the new file."""
    length: int
    """Bytes of the new file that it makes."""
    size: float
    """Bytes that it takes in the delta."""
    holds: dict[str, int]
    """In a record of numbers: how many there are by kind and by the way they move, such as "float32 by product"."""
    streams: int
    """Number of streams in which the numbers are coded."""
    tensors: list[str]
    """The tensors that have bytes in it, if the new file was given."""


def inspect(
    patch: Path, of: Path | None = None, graph: Path | None = None, base: Path | None = None
) -> tuple[Header, list[Part]]:
    """List what a delta consists of: its header and its parts.

    Args:
        patch: the delta.
        of: the file that the delta makes; it gives the names of the tensors.
        graph: as for `build`.
        base: the file that the delta starts from. It is needed to say what each tensor costs: tensors share streams, and only the
            base shows whose numbers are in which.

    Raises:
        DeltaError: the delta is damaged.
        BaseError: `base` is not the file that the delta starts from.
        OperatorError: a file is not a regular file, or cannot be read; or `base` is given and the delta makes several files.
    """
    _check_inputs(patch, of, base, graph)
    named = sorted(tensors(of, graph), key=lambda t: t.offset) if of else []
    parts: list[Part] = []

    def tell(kind: str, at: int, length: int, size: float, said: Sequence[container.SegmentInfo], count: int) -> None:
        holds: dict[str, int] = {}
        for s in said:
            what = s.kind if s.way == "each" else f"{s.way} {s.kind}" if s.way in ("new", "same") else f"{s.kind} by {s.way}"
            holds[what] = holds.get(what, 0) + s.count
        names = [t.name for t in named if t.offset < at + length and t.offset + t.length > at]
        parts.append(Part(kind, at, length, size, holds, count, names))

    try:
        with patch.open("rb") as stream, base.open("rb") if base else nullcontext() as old:
            header = container.read_header(stream)
            if base and len(header.files) > 1:
                raise OperatorError(f"{shown(patch)} is for bundles, which have several old files; inspect it without naming one")
            for file in header.files:
                at = 0
                for row in container.records(stream, file, old):
                    kind, start = container.KINDS[row.kind], at
                    for s in row.segments if old else ():
                        tell(kind, start, s.length, s.cost or 0.0, [s], row.streams)
                        start += s.length
                    if not (old and row.segments):
                        tell(kind, at, row.length, row.size, row.segments, row.streams)
                    at += row.length
    except OSError as error:
        raise OperatorError(f"{shown(patch)} or its base cannot be read: {error.strerror}; check the disk") from error
    return header, parts


def apply(old: Path, patch: Path, out: Path) -> None:
    """Make the new file; `out` appears only when it is complete and verified.

    After a kill, run it again: it resumes. What the killed run left beside `out`, from the same base to the same target, is
    verified record by record and used.

    Raises:
        DeltaError: the delta is damaged, or is not for a plain file.
        BaseError: `old` is not the file that the delta starts from.
        OperatorError: a file is not a regular file, or cannot be read; or `out` cannot be written, or is one of the input files.
    """
    _check_inputs(old, patch)
    output.check(out, [old, patch])
    streams.keep_memory()
    try:
        with patch.open("rb") as stream, old.open("rb") as base:
            header = container.read_header(stream)
            with output.fresh(out, resume=f"{header.base} {header.target}") as file:
                container.apply_plain(stream, header, base, file, kept=True)
                file.truncate()
    except OSError as error:  # from reading: `output` reports its own errors of writing
        raise OperatorError(f"{shown(old)} or {shown(patch)} cannot be read: {error.strerror}; check the disk") from error


# What is read


def _check_inputs(*paths: Path | None) -> None:
    """Refuse a file that cannot be read repeatedly, such as a pipe: reading would wait, or find nothing the second time."""
    for path in paths:
        if path is None:
            continue
        try:
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                path.open("rb").close()
        except OSError as error:
            raise OperatorError(f"{shown(path)} cannot be read: {error.strerror}; check its name and who may read it") from error
        if not stat.S_ISREG(found.st_mode):
            raise OperatorError(
                f"{shown(path)} is {output.kind_of(found)} and not a regular file; copy its content into a regular file, and "
                "name that file"
            )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest, read, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise OperatorError(f"{shown(path)} cannot be read: {error.strerror}; check the disk") from error
    if read != size:  # such as files in /proc, whose size is given as 0
        raise OperatorError(f"{shown(path)} gives {read} bytes but its size is given as {size}; copy it, and name the copy")
    return digest


@contextmanager
def _unchanged(files: dict[Path, str]) -> Iterator[None]:
    """Check after a block that its input files still have these hashes; if not, raise that in place of its result or error."""
    try:
        yield
    except Exception:
        _check_same(files)
        raise
    _check_same(files)


def _check_same(files: dict[Path, str]) -> None:
    for path, digest in files.items():
        try:
            same = sha256_of(path) == digest
        except OSError:
            same = False
        if not same:
            raise OperatorError(f"{shown(path)} changed while it was read; repeat when nothing writes to it")


# Which tensor follows which


def claims(path: Path | None) -> Mapping[str, Claim]:
    """Read a factors file; see `ota.delta.factors.read`. Without one there are no claims."""
    from ota.delta.factors import read

    return read(path) if path else {}


def elements(
    old: Path | None,
    new: Path,
    graph: Path | None = None,
    old_graph: Path | None = None,
    claimed: Mapping[str, Claim] | None = None,
) -> list[Elements]:
    """Find where the numbers of a file lie, and where in the old file the numbers lie that they follow.

    A tensor follows the old one of the same name, kind and shape. If there is none, it follows the next old one of the same kind
    and shape that no other tensor follows. Bytes between tensors follow the old bytes at the same distance from the last matched
    tensor. What is `claimed` of a tensor goes with it, if it fits its kind and shape.
    """
    return stretches(tensors(new, graph), tensors(old, old_graph or graph) if old else [], new.stat().st_size, claimed)


def stretches(
    after: Sequence[Tensor], before: Sequence[Tensor], size: int, claimed: Mapping[str, Claim] | None = None
) -> list[Elements]:
    """Find where the numbers of a file of `size` bytes lie, as `elements` does, from its tensors and those of the old file."""
    followed = follow(after, before)
    found: list[Elements] = []
    at, shift = 0, 0
    for tensor in sorted(after, key=lambda t: t.offset):
        if tensor.offset < at or tensor.length % KINDS[tensor.kind].width:  # two names for one place, or an impossible length
            continue
        if tensor.offset > at:
            found.append(Elements(at, tensor.offset - at, "bytes", 0, max(0, at - shift)))
        predecessor = followed.get(tensor.name)
        claim = (claimed or {}).get(tensor.name)
        claim = claim if claim and claim.fits(tensor.kind, tensor.shape, tensor.length) else None
        begins = predecessor.offset if predecessor else None
        found.append(Elements(tensor.offset, tensor.length, tensor.kind, tensor.row, begins, claim))
        at = tensor.offset + tensor.length
        shift = at - (predecessor.offset + predecessor.length) if predecessor else shift
    rest = size - at
    return [*found, Elements(at, rest, "bytes", 0, max(0, at - shift))] if found and rest else found


def follow(after: Sequence[Tensor], before: Sequence[Tensor]) -> dict[str, Tensor]:
    """Find the old tensor that each new one follows; return it by the new one's name."""
    named = {t.name: t for t in before}
    found = {t.name: named[t.name] for t in after if t.name in named and _kin(named[t.name]) == _kin(t)}
    taken = {t.name for t in found.values()}
    free: dict[tuple[KindName, tuple[int, ...]], list[Tensor]] = {}
    for tensor in before:
        if tensor.name not in taken:
            free.setdefault(_kin(tensor), []).append(tensor)
    for tensor in after:
        if tensor.name not in found and free.get(_kin(tensor)):
            found[tensor.name] = free[_kin(tensor)].pop(0)
    return found


def _kin(tensor: Tensor) -> tuple[KindName, tuple[int, ...]]:
    return tensor.kind, tensor.shape


# Where tensors lie


def tensors(path: Path, graph: Path | None = None) -> list[Tensor]:
    """Find the tensors of a file whose kind of numbers the codec knows; none if it is not a model file.

    Raises:
        OperatorError: a file cannot be read, or `graph` describes no external data in `path`.
    """
    try:
        size = path.stat().st_size
        with (graph or path).open("rb", buffering=0) as file:
            data = _Bytes(file)
            if graph:
                found = [t for t in _onnx(data, external=True) if t.offset + t.length <= size]
                if not found and size:
                    raise OperatorError(
                        f"{shown(graph)} describes no external data of {shown(path)}; name the ONNX file that it belongs to"
                    )
                return found
            return [t for t in _safetensors(data) or _onnx(data, external=False) if t.offset + t.length <= size]
    except OSError as error:
        raise OperatorError(
            f"{shown(graph or path)} cannot be read: {error.strerror}; check its name and who may read it"
        ) from error


class _Bytes:
    """A file's bytes, read a few at a time. The file is not mapped into memory: the process would die if it became shorter."""

    def __init__(self, file: FileIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self._start, self._held = 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: int) -> int:
        """Return one byte; cache those after it, because they are asked for next."""
        if not 0 <= at - self._start < len(self._held):
            self._start, self._held = at, self.piece(at, at + 4 * KiB)
        return self._held[at - self._start]

    def piece(self, start: int, stop: int) -> bytes:
        """Read the bytes from `start` to `stop`, fewer if the file ends before."""
        return os.pread(self._file.fileno(), stop - start, start)


def _safetensors(data: _Bytes) -> list[Tensor]:
    """Find tensors by the header of the safetensors format: its length in eight bytes, then JSON."""
    if len(data) < 8:
        return []
    length = int.from_bytes(data.piece(0, 8), "little")
    if not 2 <= length <= min(_MAX_SAFETENSORS_HEADER, len(data) - 8):
        return []
    try:
        header = json.loads(data.piece(8, 8 + length))
        found = []
        for name, row in header.items():
            if name != "__metadata__" and row["dtype"] in _SAFETENSORS_KINDS:
                start, stop = row["data_offsets"]
                shape = tuple(int(n) for n in row["shape"])
                found.append(
                    Tensor(name, _SAFETENSORS_KINDS[row["dtype"]], shape, 8 + length + int(start), int(stop) - int(start))
                )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return [t for t in found if t.offset >= 8 + length and t.length >= 0]


def _onnx(data: _Bytes, external: bool) -> list[Tensor]:
    """Find tensors by the wire format of protocol buffers: in the model's graph (field 7), the places of its initializers (5).

    The onnx package gives values but not their places in the file, and devices lack it.
    """
    found: list[Tensor] = []
    try:
        for number, start, stop in fields(data, 0, len(data)):
            if number == 7:
                for inner, first, last in fields(data, start, stop):
                    if inner == 5 and len(found) < _MAX_TENSORS:
                        tensor = _initializer(data, first, last, external)
                        found += [tensor] if tensor else []
    except (IndexError, ValueError):
        return []  # not an ONNX file
    return found


def _initializer(data: _Bytes, start: int, stop: int, external: bool) -> Tensor | None:
    shape: list[int] = []
    name, stored, place = "", 0, None
    entries: dict[str, str] = {}
    for number, first, last in fields(data, start, stop):
        if number == 1:  # dims, one by one or packed
            at = first
            while at < last:
                value, at = varint(data, at, last)
                shape.append(value)
        elif number == 2:
            stored = varint(data, first, last)[0]
        elif number == 8:
            name = data.piece(first, last).decode(errors="replace")
        elif number in (4, 9) and not external:  # packed float_data, or raw_data
            place = first, last - first
        elif number == 13 and external:
            parts = {n: data.piece(a, b).decode(errors="replace") for n, a, b in fields(data, first, last)}
            entries[parts.get(1, "")] = parts.get(2, "")
    if external and "length" in entries:
        place = int(entries.get("offset", "0")), int(entries["length"])
    if place is None or stored not in _ONNX_KINDS or place[0] < 0 or place[1] < 0:
        return None
    return Tensor(name, _ONNX_KINDS[stored], tuple(shape), *place)
