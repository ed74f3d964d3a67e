"""Plan the records of a delta: where a file's numbers lie, which old ones they follow, and which bytes are the same.

Files are read in ranges: here once to plan the records, and in `encode` once more to write them. So memory does not grow with the
files.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ota.delta import updates, vectors
from ota.delta.blocks import Blocks
from ota.delta.factors import Claim
from ota.delta.format import MAX_CHUNK, MAX_NUMBERS, MAX_SEGMENTS, VERSION
from ota.delta.header import BundleFile, PlainFile
from ota.delta.numbers import KINDS, Factors, Kind, KindName
from ota.errors import DeltaError, OperatorError
from ota.limits import OF_NUMBERS, KiB, MiB
from ota.output import shown

MAX_BSDIFF = 2 * MiB  # bytes of the largest plain file for which bsdiff4 is tried; it may take four seconds
SAME_RUN = 64 * KiB  # bytes of the shortest unchanged run that gets a record of its own
LEAST_PLAIN = 64 * KiB  # bytes of the shortest piece without numbers that is searched for elsewhere in the old file
MAX_PLAIN = 4 * MiB  # bytes of such a piece that go into one record
SLACK = 64  # bytes; factors that may take more than their tensor and this many are not used as they are
MAX_STEPS = 64 * KiB  # numbers; where more of a tensor make steps, scales of its rows and columns pay


@dataclass(frozen=True)
class Elements:
    """A stretch of a file that holds numbers of one kind."""

    offset: int
    length: int  # bytes
    kind: KindName
    row: int  # numbers in a row; 0: it has no rows
    old: int | None  # where its predecessor lies in the old file; None: it has none
    claim: Claim | None = None  # what the trainer says of its move


@dataclass(frozen=True)
class Pair:
    """One new file, the old one that it follows, and where its numbers lie."""

    entry: BundleFile | PlainFile
    new: Path
    old: Path | None
    elements: Sequence[Elements] = ()
    old_sha256: str = ""
    """Hash of `old`, if it is known already."""

    @property
    def whole(self) -> bool:
        """Whether the file is encoded as a whole: a bundle's file other than weights and overlays, or a small plain file without numbers."""
        if isinstance(self.entry, BundleFile):
            return self.entry.role not in OF_NUMBERS
        return not self.elements and max(self.entry.size, self.old.stat().st_size if self.old else 0) <= MAX_BSDIFF


@dataclass(frozen=True)
class Piece:
    """What one record, or one segment of a record, covers."""

    start: int
    length: int
    kind: Kind
    row: int
    old: int | None  # None: it has no predecessor
    same: bool
    changed: int = 0
    """How many bytes differ from the old file; 0 for a piece without a predecessor."""
    claim: Claim | None = None
    """What the trainer says of the tensor that it belongs to."""
    first: int = 0
    """How many numbers of that tensor lie before it."""
    exact: bool = False
    """Whether the claim makes all of its bytes; then it is a whole tensor."""


@dataclass(frozen=True)
class File:
    """A file that is read in ranges. It is not mapped into memory: what was read would stay there as long as there is room."""

    path: Path
    size: int

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The file's blocks, indexed by hash; they are read at the first access."""
        return Blocks((self[at : min(at + MAX_CHUNK, self.size)] for at in range(0, self.size, MAX_CHUNK)), self.size)

    def __getitem__(self, wanted: slice) -> npt.NDArray[np.uint8]:
        with self.path.open("rb", buffering=0) as file:
            file.seek(wanted.start or 0)
            data = file.read(wanted.stop - (wanted.start or 0))
        if len(data) < wanted.stop - (wanted.start or 0):
            raise OperatorError(f"{shown(self.path)} became shorter while it was read; repeat when nothing writes to it")
        return np.frombuffer(data, np.uint8)


def open_file(path: Path) -> File:
    """Return a file with its present size."""
    return File(path, path.stat().st_size)


def plan(pair: Pair, version: int = VERSION) -> list[list[Piece]]:
    """Plan what each record covers, in the order of the file, in a version of the format.

    A file that is encoded as a whole gets one empty group, or none if it is empty.
    """
    if pair.whole:
        return [[]] if pair.entry.size else []
    new, old = open_file(pair.new), open_file(pair.old) if pair.old else None
    plain = MAX_CHUNK if isinstance(pair.entry, BundleFile) else MAX_PLAIN
    found = list(_join(_pieces(pair.elements, new, old, plain, version)))
    if _share_too_much(found):
        alone = [replace(e, claim=None) if e.claim and e.claim.shared else e for e in pair.elements]
        found = list(_join(_pieces(alone, new, old, plain, version)))
    groups: list[list[Piece]] = []
    for update, run in _runs(found):
        groups += _updates(run) if update else _of_numbers(run)
    return groups


def is_update(group: Sequence[Piece]) -> bool:
    """Check whether a record moves its tensors by the trainer's factors alone."""
    return any(piece.exact for piece in group)


def _share_too_much(found: Sequence[Piece]) -> bool:
    """Check whether shared numbers may take more bytes than all tensors that they move."""
    sharing = [piece for piece in found if piece.exact and piece.claim and piece.claim.shared]
    if not sharing:
        return False
    way = moved(sharing[0])
    held = way.shared.steps if way.shared else None
    return held is not None and _most_bytes([held]) > sum(piece.length for piece in sharing) + SLACK


def _runs(found: Sequence[Piece]) -> Iterator[tuple[bool, list[Piece]]]:
    """Cut pieces into runs: those that an update can make, which are exact or stay, with an exact one among them; and others."""
    marks: list[bool] = []
    for settled, run in itertools.groupby(found, key=lambda piece: piece.exact or (piece.same and piece.old is not None)):
        held = list(run)
        marks += [settled and is_update(held)] * len(held)
    for update, rows in itertools.groupby(zip(marks, found, strict=True), key=lambda row: row[0]):
        yield update, [piece for _, piece in rows]


def _updates(run: Sequence[Piece]) -> list[list[Piece]]:
    """Group pieces into updates: each as much as a record may hold."""
    groups: list[list[Piece]] = [[]]
    for piece in run:
        last = groups[-1]
        claims = [p.claim for p in (*last, piece) if p.exact and p.claim]
        values = sum(claim.values for claim in claims) + max((claim.shared for claim in claims), default=0)
        length = sum(p.length for p in last) + piece.length
        if last and (values > updates.MAX_VALUES or length > updates.MAX_BYTES or len(last) == updates.MAX_STRETCHES):
            groups.append([piece])
        else:
            last.append(piece)
    return groups


def _of_numbers(run: Sequence[Piece]) -> list[list[Piece]]:
    """Group pieces into records of numbers, and those that need a record of their own."""
    groups: list[list[Piece]] = []
    for piece in run:
        last = groups[-1] if groups else []
        full = sum(p.length for p in last) + piece.length > MAX_CHUNK or sum(map(_count, last)) + _count(piece) > MAX_NUMBERS
        if not last or any(map(_alone_in_record, (last[0], piece))) or full or len(last) == MAX_SEGMENTS:
            groups.append([piece])
        else:
            last.append(piece)
    return groups


def _alone_in_record(piece: Piece) -> bool:
    return piece.old is None or is_plain(piece) or (piece.same and piece.length >= SAME_RUN)


def is_plain(piece: Piece) -> bool:
    """Check whether a piece has no known kind of numbers and is long enough to be searched for elsewhere in the old file."""
    return piece.kind.name == "bytes" and piece.length >= LEAST_PLAIN


def _count(piece: Piece) -> int:
    return piece.length * 2 if piece.kind.packed else piece.length // piece.kind.width


def _pieces(elements: Sequence[Elements], new: File, old: File | None, plain: int, version: int) -> Iterator[Piece]:
    for stretch in _cover(elements, new.size, 0 if old is None else old.size):
        kind = KINDS[stretch.kind]
        whole = _exact(stretch, new, old) if old and version > 1 else None
        if whole:
            yield whole
            continue
        row = stretch.row * kind.width // (2 if stretch.kind == "int4" else 1) or kind.width  # bytes
        limit = MAX_CHUNK // 4 if stretch.kind == "int4" else min(MAX_CHUNK, MAX_NUMBERS * kind.width)
        if stretch.kind == "bytes" and stretch.length > MAX_CHUNK:
            limit = plain
        step = limit // row * row or limit // kind.width * kind.width
        for first in range(0, stretch.length, step):
            length = min(step, stretch.length - first)
            start, at = stretch.offset + first, None if stretch.old is None else stretch.old + first
            if old is None or at is None or at + length > old.size:
                yield Piece(start, length, kind, stretch.row, None, False)
            else:
                changed = int(np.count_nonzero(new[start : start + length] != old[at : at + length]))
                before = first * 2 if kind.packed else first // kind.width
                yield Piece(start, length, kind, stretch.row, at, not changed, changed, stretch.claim, before)


def moved(piece: Piece) -> updates.Stretch:
    """Return how a piece whose claim is exact, or that stays, comes from the old file.

    Raises:
        OperatorError: as `Claim.product`, `Claim.steps` and `Claim.shared_numbers`.
    """
    stays = updates.Stretch(KINDS["bytes"], piece.length, piece.old or 0)
    if piece.same or not piece.claim:
        return stays
    if piece.claim.shared:
        shared = piece.claim.shared_numbers()
        return replace(stays, kind=piece.kind, step=piece.claim.step, shared=shared, first=piece.claim.first)
    if piece.claim.step is not None:
        return replace(stays, kind=piece.kind, step=piece.claim.step, steps=piece.claim.steps())
    product = piece.claim.product()
    return replace(stays, kind=piece.kind, row=piece.claim.columns, product=product) if product else stays


def _exact(stretch: Elements, new: File, old: File) -> Piece | None:
    """Return a whole tensor as one piece if the trainer's claim makes exactly its bytes; None if it moves otherwise."""
    claim, at = stretch.claim, stretch.old
    if claim is None or at is None or at + stretch.length > old.size or not (claim.values or claim.shared):
        return None
    if claim.values > (updates.MAX_VALUES if claim.step is None else MAX_STEPS) or stretch.length > updates.MAX_BYTES:
        return None
    piece = Piece(stretch.offset, stretch.length, KINDS[stretch.kind], stretch.row, at, False, 0, claim, exact=True)
    way, start, changed = moved(piece), stretch.offset, 0
    if way.way == updates.SAME or _most_bytes(way.vectors) > stretch.length + SLACK:
        return None
    for part in updates.pieces([way]):
        known, wanted = (
            old[at + start - stretch.offset : at + start - stretch.offset + part.length],
            new[start : start + part.length],
        )
        if part.make(lambda offset, length: old[offset : offset + length].tobytes()) != wanted.tobytes():
            return None
        changed += int(np.count_nonzero(known != wanted))
        start += part.length
    return replace(piece, changed=changed) if changed else None


def _most_bytes(found: Sequence[Factors]) -> float:
    """Return how many bytes vectors would take if all entries of a vector took as many bits as the largest."""
    sizes = ((len(v), int(np.abs(v).max()).bit_length() + 1 - vectors.shift(v)) for v in found)
    return sum(count * bits for count, bits in sizes) / 8


def _join(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Join unchanged pieces that follow each other in both files, up to the length of a record; pass the others on."""
    held: Piece | None = None
    for piece in pieces:
        if (
            held and held.same and piece.same and held.old is not None and held.old + held.length == piece.old
            and held.start + held.length == piece.start and held.length + piece.length <= MAX_CHUNK
        ):  # fmt: skip
            held = Piece(held.start, held.length + piece.length, KINDS["bytes"], 0, held.old, True)
        else:
            if held:
                yield held
            held = piece
    if held:
        yield held


def _cover(elements: Sequence[Elements], size: int, old_size: int) -> Iterator[Elements]:
    """Cover a file by its stretches in order and the gaps between them as bytes; bytes are cut where the old file ends."""
    at = 0
    wanted = sorted((e for e in elements if e.length), key=lambda e: e.offset)
    for stretch in [*wanted, Elements(size, 0, "bytes", 0, None)]:
        end = stretch.offset + stretch.length
        if not at <= stretch.offset <= end <= size or stretch.length % KINDS[stretch.kind].width or (stretch.old or 0) < 0:
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


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
