"""The delta codec: every file comes back bit by bit, and whatever a delta has been turned into, it makes that file or none."""

from __future__ import annotations

import bz2
import hashlib
import io
import struct
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import bsdiff4
import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ota import delta
from ota.delta import BSDIFF, PLANES, SAME, ZSTD, DeltaFile, Elements, Header, Pair
from ota.errors import BaseError, DeltaError
from ota.manifest import MAX_WEIGHTS, FileEntry, KiB, MiB

BASE, TARGET = "a" * 64, "b" * 64
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}
FLOATS = {2: np.float16, 4: np.float32}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Case:
    """A new file, the one before, and where its numbers lie."""

    new: bytes
    old: bytes | None
    elements: Sequence[Elements] = ()
    role: Any = "weights"

    @property
    def entry(self) -> FileEntry:
        variant = None if self.role == "graph" else "full"
        return FileEntry(role=self.role, variant=variant, size=len(self.new), sha256=sha(self.new))


@dataclass
class Output:
    """Where a delta writes to; refuses to take more than was declared."""

    files: dict[str, bytes] = field(default_factory=dict)

    @contextmanager
    def open(self, entry: FileEntry):
        sink = io.BytesIO()
        try:
            yield sink
        finally:
            assert len(sink.getvalue()) <= entry.size, "more was written than declared"
            self.files[entry.sha256] = sink.getvalue()


def build(cases: Sequence[Case], folder: Path) -> bytes:
    pairs = []
    for i, case in enumerate(cases):
        new, old = folder / f"new-{i}", folder / f"old-{i}"
        new.write_bytes(case.new)
        if case.old is not None:
            old.write_bytes(case.old)
        pairs.append(Pair(case.entry, new, None if case.old is None else old, case.elements))
    delta.build(pairs, BASE, TARGET, folder / "patch")
    return (folder / "patch").read_bytes()


def apply(patch: bytes, cases: Sequence[Case], output: Output | None = None) -> list[bytes]:
    """What a delta makes of the old files; the header is checked first as the agent does."""
    stream, out = io.BytesIO(patch), output or Output()
    olds = {(case.entry.role, case.entry.variant): case.old for case in cases}

    def open_base(role: Any, variant: Any) -> BinaryIO:
        return io.BytesIO(olds[role, variant] or b"")

    header = delta.read_header(stream)
    if (header.base, header.target, [f.target for f in header.files]) != (BASE, TARGET, [case.entry for case in cases]):
        raise DeltaError("the delta is for other bundles")
    delta.apply(stream, header, open_base, out.open)
    return [out.files[case.entry.sha256] for case in cases]


def round_trip(cases: Sequence[Case], folder: Path) -> bytes:
    patch = build(cases, folder)
    assert apply(patch, cases) == [case.new for case in cases]
    return patch


# What goes in comes out


def special_codes(width: int) -> list[int]:
    """Bit patterns of ±0, ±1, ±inf, the largest, the denormals, and NaNs with payloads, both signs."""
    top, mantissa = 1 << (8 * width - 1), {1: 3, 2: 7, 4: 23}[width]
    infinity = (top - 1) >> mantissa << mantissa
    plain = [0, 1, (1 << mantissa) - 1, infinity - 1, infinity, infinity + 1, top - 1]
    return plain + [code | top for code in plain]


@st.composite
def weight_files(draw) -> Case:
    """Stretches of numbers with any bit patterns, gaps between them (some empty), and any kind of old file."""
    new, elements = bytearray(), []
    for _ in range(draw(st.integers(0, 3))):
        new += draw(st.binary(max_size=5))
        width = draw(st.sampled_from((1, 2, 4)))
        codes = draw(st.lists(st.integers(0, 2 ** (8 * width) - 1) | st.sampled_from(special_codes(width)), max_size=40))
        elements.append(Elements(len(new), width * len(codes), width))
        new += np.array(codes, DTYPES[width]).tobytes()
    new += draw(st.binary(min_size=0 if new else 1, max_size=7))
    old = bytearray(new)
    for _ in range(draw(st.integers(0, 4))):
        old[draw(st.integers(0, len(old) - 1))] = draw(st.integers(0, 255))
    kind = draw(st.sampled_from(("same length", "shorter", "longer", "empty", "none", "unrelated")))
    lengths = {"shorter": old[: draw(st.integers(0, len(old)))], "longer": old + draw(st.binary(max_size=9)), "empty": b""}
    before = lengths.get(kind, old if kind == "same length" else draw(st.binary(max_size=200)))
    return Case(bytes(new), None if kind == "none" else bytes(before), [e for e in elements if e.length or draw(st.booleans())])


@settings(max_examples=150, deadline=None)
@given(weight_files())
def test_any_weights_come_back(tmp_path_factory, case):
    round_trip([case], tmp_path_factory.mktemp("case"))


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.binary(max_size=300) | st.none(), st.sampled_from(("graph", "sampler", "golden")))
@example(b"x", b"", "graph")
@example(b"abc" * 50, b"abc" * 50, "sampler")
@example(bytes(300), bytes(299), "golden")
def test_any_plain_file_comes_back(tmp_path_factory, new, old, role):
    round_trip([Case(new, old, role=role)], tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunk_borders_come_back(tmp_path, monkeypatch, width, extra):
    monkeypatch.setattr(delta, "MAX_CHUNK", 64 + 1)  # not a multiple of the widths
    count = 5 * 64 // width + extra
    new = np.arange(count, dtype=DTYPES[width])
    old = new.copy()
    old[::7] += 1
    patch = round_trip([Case(new.tobytes(), old.tobytes(), [Elements(0, new.nbytes, width)])], tmp_path)
    assert delta.read_header(io.BytesIO(patch)).files[0].records > 4


def test_file_over_one_chunk_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    old = rng.normal(size=(MiB // 2 + 77)).astype(np.float32)
    new = old * np.float32(1.0001)
    patch = round_trip([Case(new.tobytes() + b"end", old.tobytes() + b"END", [Elements(0, new.nbytes, 4)])], tmp_path)
    assert len(patch) < 0.6 * new.nbytes


@pytest.mark.parametrize("width", [2, 4])
@given(data=st.data())
def test_order_of_floats_is_kept(width, data):
    finite = st.floats(width=8 * width, allow_nan=False)
    values = np.array(sorted(data.draw(st.lists(finite, min_size=2, max_size=20))), FLOATS[width])
    codes = delta.ordered(values.view(DTYPES[width]), width).astype(np.int64)
    assert (codes[1:] > codes[:-1])[values[1:] > values[:-1]].all()


@pytest.mark.parametrize("width", [1, 2])
def test_ordering_is_undone_everywhere(width):
    codes = np.arange(2 ** (8 * width), dtype=np.uint32).astype(DTYPES[width])
    assert (delta.bits(delta.ordered(codes, width), width) == codes).all()
    assert len(np.unique(delta.ordered(codes, width))) == len(codes)


@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(special_codes(4)), min_size=1))
def test_ordering_of_words_is_undone(codes):
    array = np.array(codes, np.uint32)
    assert (delta.bits(delta.ordered(array, 4), 4) == array).all()


@pytest.mark.parametrize("role", ["weights", "graph", "golden"])
def test_same_file_costs_nothing(tmp_path, role):
    data = np.random.default_rng(0).bytes(5000)
    case = Case(data, data, [Elements(0, 4000, 4)] if role == "weights" else (), role)
    patch = round_trip([case], tmp_path)
    stream = io.BytesIO(patch)
    header = delta.read_header(stream)
    assert len(stream.read()) == header.files[0].records * delta._RECORD.size


def test_small_steps_cost_less_than_values(tmp_path):
    rng = np.random.default_rng(0)
    old = (rng.normal(size=20_000).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    new = (old + rng.integers(-1, 2, old.size)).astype(np.uint16)
    patch = round_trip([Case(new.tobytes(), old.tobytes(), [Elements(0, new.nbytes, 2)])], tmp_path)
    as_bytes = round_trip([Case(new.tobytes(), old.tobytes())], tmp_path)
    assert len(patch) < len(as_bytes) < new.nbytes
    assert len(patch) < len(bsdiff4.diff(old.tobytes(), new.tobytes()))


def test_same_input_same_bytes(tmp_path):
    cases = [small_weights(), small_table()]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert build(cases, tmp_path / "a") == build(cases, tmp_path / "b")


def test_large_plain_file_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "MAX_SMALL", 100)
    with pytest.raises(DeltaError, match="101 bytes is too large"):
        build([Case(b"x" * 101, b"", role="graph")], tmp_path)


# A damaged delta makes the right file or none


def small_weights() -> Case:
    """A little of every kind of record: same, planes and new bytes."""
    old = np.arange(96, dtype=np.uint16)
    new = old.copy()
    new[32:64] += 3
    new[64:] = 7
    return Case(new.tobytes() + b"tail", old.tobytes() + b"Tail", [Elements(64 * i, 64, 2) for i in range(3)])


def small_table() -> Case:
    rng = np.random.default_rng(1)
    old = rng.bytes(300)
    return Case(old[:100] + b"!" + old[101:] + b"more", old, role="sampler")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [small_weights(), small_table()]


@pytest.fixture(scope="module")
def patch(cases, tmp_path_factory) -> bytes:
    made = round_trip(cases, tmp_path_factory.mktemp("small"))
    assert kinds_of(made) == {SAME, PLANES, ZSTD, BSDIFF}
    return made


def kinds_of(patch: bytes) -> set[int]:
    stream = io.BytesIO(patch)
    found = set()
    for _ in range(sum(file.records for file in delta.read_header(stream).files)):
        kind, *_, payload, _, _ = delta._RECORD.unpack(stream.read(delta._RECORD.size))
        stream.read(payload)
        found.add(kind)
    return found


def test_cut_at_every_byte_refused(patch, cases):
    for length in range(len(patch)):
        with pytest.raises(DeltaError):
            apply(patch[:length], cases)


def test_every_flipped_bit_harmless(patch, cases):
    wanted = [case.new for case in cases]
    accepted = 0
    for bit in range(8 * len(patch)):
        damaged = bytearray(patch)
        damaged[bit // 8] ^= 1 << bit % 8
        with suppress(DeltaError, BaseError):
            assert apply(bytes(damaged), cases) == wanted, f"bit {bit} makes another file"
            accepted += 1
    assert accepted < 0.05 * 8 * len(patch)


def test_bytes_after_the_end_refused(patch, cases):
    with pytest.raises(DeltaError, match="goes on after its last record"):
        apply(patch + b"\0", cases)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_refused(data):
    for start in (b"", delta._PREFIX.pack(delta.MAGIC, delta.VERSION, len(data))):
        with pytest.raises(DeltaError):
            delta.read_header(io.BytesIO(start + data))


@pytest.mark.parametrize(("keep", "add"), [(slice(-1), b""), (slice(None), b"\0"), (slice(0), b""), (slice(None, None, -1), b"")])
def test_wrong_base_is_noticed(patch, cases, keep, add):
    others = [Case(case.new, case.old[keep] + add, case.elements, case.role) for case in cases]
    with pytest.raises(BaseError, match="fetch the full bundle"):
        apply(patch, others)


def test_newer_format_asks_for_newer_agent(patch, cases):
    newer = bytearray(patch)
    newer[len(delta.MAGIC)] += 1
    with pytest.raises(DeltaError, match="format version 2, this agent reads 1; update the agent"):
        apply(bytes(newer), cases)


class Unread(io.BytesIO):
    """A stream that remembers the most that was asked of it at once."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        self.most = max(self.most, 1 << 40 if size is None or size < 0 else size)
        return super().read(size)


def test_header_length_checked_before_reading(patch):
    stream = Unread(delta._PREFIX.pack(delta.MAGIC, delta.VERSION, 2**32 - 1) + patch)
    with pytest.raises(DeltaError, match="header claims 4294967295 bytes"):
        delta.read_header(stream)
    assert stream.most <= delta._PREFIX.size


# Patch bombs: well-formed, and made to hurt


@dataclass
class Record:
    """One record with lengths that may lie."""

    kind: int
    payload: bytes
    new: bytes
    width: int = 1
    new_length: int | None = None
    payload_length: int | None = None
    offset: int = 0
    reserved: int = 0

    def pack(self) -> bytes:
        lengths = (
            len(self.new) if self.new_length is None else self.new_length,
            len(self.payload) if self.payload_length is None else self.payload_length,
        )
        check = hashlib.blake2b(self.new, digest_size=16).digest()
        return delta._RECORD.pack(self.kind, self.width, self.reserved, *lengths, self.offset, check) + self.payload


def crafted(case: Case, *records: Record, **fields: Any) -> bytes:
    """A delta for one file with records of one's own."""
    file = DeltaFile(target=case.entry, base=sha(case.old or b""), base_size=len(case.old or b""), records=len(records))
    header = Header(base=BASE, target=TARGET, files=[file.model_copy(update=fields)]).canonical()
    return delta._PREFIX.pack(delta.MAGIC, delta.VERSION, len(header)) + header + b"".join(r.pack() for r in records)


def refuse(case: Case, *records: Record, sentence: str, **fields: Any) -> None:
    """A crafted delta must be refused with this sentence, and may have written no more than the file is long."""
    output = Output()
    with pytest.raises(DeltaError, match=sentence):
        apply(crafted(case, *records, **fields), [case], output)
    assert sum(map(len, output.files.values())) <= len(case.new)


NEW = bytes(range(200)) * 2
PLAIN = Case(NEW, NEW[::-1], role="golden")
WEIGHTS = Case(NEW, NEW[::-1], [Elements(0, 400, 4)])


def frame(data: bytes, *, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size).compress(data)


def lying_frame(data: bytes, claimed: int) -> bytes:
    """A frame whose header claims another unpacked length than it has; both are written in two bytes."""
    made = bytearray(frame(data))
    at = 5 if made[4] >> 5 & 1 else 6
    assert made[4] >> 6 == 1
    assert struct.unpack_from("<H", made, at) == (len(data) - 256,)
    struct.pack_into("<H", made, at, claimed - 256)
    return bytes(made)


def test_crafted_delta_can_be_right():
    good = Record(ZSTD, frame(NEW), NEW)
    assert apply(crafted(PLAIN, good), [PLAIN]) == [NEW]
    assert apply(crafted(PLAIN, Record(BSDIFF, bsdiff4.diff(PLAIN.old, NEW), NEW)), [PLAIN]) == [NEW]


@pytest.mark.parametrize("case", [PLAIN, WEIGHTS])
@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        pytest.param(frame(bytes(50_000_000)), "another length than it claims", id="claims and holds more"),
        pytest.param(frame(NEW[:-1]), "another length than it claims", id="claims and holds less"),
        pytest.param(frame(NEW, size=False), "another length than it claims", id="claims nothing"),
        pytest.param(lying_frame(bytes(60_000), 400), "cannot be unpacked", id="claims right and holds more"),
        pytest.param(lying_frame(NEW[:300], 400), "cannot be unpacked", id="claims right and holds less"),
        pytest.param(frame(NEW) + b"x", "cannot be unpacked", id="goes on after the frame"),
        pytest.param(frame(NEW) + frame(bytes(50_000)), "cannot be unpacked", id="second frame"),
        pytest.param(struct.pack("<II", 0x184D2A50, 400) + NEW, "cannot be unpacked", id="skippable frame"),
        pytest.param(b"", "cannot be unpacked", id="empty"),
    ],
)
@pytest.mark.parametrize("kind", [ZSTD, PLANES])
def test_zstd_bomb_refused(case, payload, sentence, kind):
    refuse(case, Record(kind, payload, NEW), sentence=sentence)


def bsdiff(control: bytes, diff: bytes, extra: bytes, new_size: int = len(NEW), claims: tuple[int, int] | None = None) -> bytes:
    """A bsdiff4 file from its three packed streams."""
    lengths = claims or (len(control), len(diff))
    return struct.pack("<8sqqq", b"BSDIFF40", *lengths, new_size) + control + diff + extra


def control(*triples: tuple[int, int, int]) -> bytes:
    """A packed control stream; its numbers have a sign bit of their own."""
    return bz2.compress(b"".join(struct.pack("<Q", abs(n) | (1 << 63 if n < 0 else 0)) for triple in triples for n in triple))


EXTRA_ONLY = control((0, 400, 0))
NOTHING, ALL_NEW = bz2.compress(b""), bz2.compress(NEW)
BOMB = bz2.compress(bytes(50_000_000))


def test_crafted_bsdiff_can_be_right():
    record = Record(BSDIFF, bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW), NEW)
    assert apply(crafted(PLAIN, record), [PLAIN]) == [NEW]


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        pytest.param(bsdiff(BOMB, NOTHING, ALL_NEW), "unpacks to more than it may", id="bomb in control"),
        pytest.param(bsdiff(EXTRA_ONLY, BOMB, ALL_NEW), "unpacks to more than it may", id="bomb in diff"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, BOMB), "unpacks to more than it may", id="bomb in extra"),
        pytest.param(bsdiff(EXTRA_ONLY + BOMB, NOTHING, ALL_NEW), "goes on after its end", id="second stream in control"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING + BOMB, ALL_NEW), "goes on after its end", id="second stream in diff"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW + BOMB), "goes on after its end", id="second stream in extra"),
        pytest.param(bsdiff(EXTRA_ONLY[:-3], NOTHING, ALL_NEW), "ends too early", id="control cut"),
        pytest.param(bsdiff(b"", NOTHING, ALL_NEW), "ends too early", id="no control"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, b""), "ends too early", id="no extra"),
        pytest.param(bsdiff(b"junk", NOTHING, ALL_NEW), "is damaged", id="control not bz2"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW, 2**62), "claims sizes", id="huge new size"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW, -1), "claims sizes", id="negative new size"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW, claims=(-1, 9)), "claims sizes", id="negative control size"),
        pytest.param(bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW, claims=(2**62, 2**62)), "claims sizes", id="huge stream sizes"),
        pytest.param(bsdiff(bz2.compress(b"x" * 23), NOTHING, ALL_NEW), "is damaged", id="control of odd length"),
        pytest.param(bsdiff(control((400, 0, 0)), NOTHING, ALL_NEW), "is damaged", id="diff runs out"),
        pytest.param(bsdiff(control((0, 401, 0)), NOTHING, ALL_NEW), "is damaged", id="writes past the end"),
        pytest.param(bsdiff(control((-8, 408, 0)), NOTHING, ALL_NEW), "is damaged", id="negative diff length"),
        pytest.param(bsdiff(control((0, -8, 0), (0, 408, 0)), NOTHING, ALL_NEW), "is damaged", id="negative extra length"),
        pytest.param(bsdiff(control((0, 0, 2**63 - 1), (0, 0, 2**63 - 1)), NOTHING, ALL_NEW), "is damaged", id="seeks far"),
        pytest.param(bsdiff(control((0, 100, 0)), NOTHING, ALL_NEW), "is damaged", id="makes too little"),
        pytest.param(b"BSDIFF41" + bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW)[8:], "claims sizes", id="other magic"),
        pytest.param(b"BSDIFF40", "ends too early", id="only magic"),
    ],
)
def test_bsdiff_bomb_refused(payload, sentence):
    refuse(PLAIN, Record(BSDIFF, payload, NEW), sentence=sentence)


GOOD = frame(NEW)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        pytest.param(Record(ZSTD, GOOD, NEW, new_length=2**32 - 1), "claims more bytes", id="huge new length"),
        pytest.param(Record(ZSTD, GOOD, NEW, new_length=401), "claims more bytes", id="one byte too much"),
        pytest.param(Record(ZSTD, GOOD, NEW, payload_length=2**32 - 1), "claims more bytes", id="huge payload"),
        pytest.param(Record(ZSTD, GOOD, NEW, payload_length=400 + 64 * KiB), "ends too early", id="payload missing"),
        pytest.param(Record(9, GOOD, NEW), "unknown kind", id="unknown kind"),
        pytest.param(Record(ZSTD, GOOD, NEW, width=3), "unknown kind", id="unknown width"),
        pytest.param(Record(ZSTD, GOOD, NEW, reserved=1), "unknown kind", id="reserved bits"),
        pytest.param(Record(ZSTD, frame(NEW[:399]), NEW[:399], width=2), "unknown kind", id="half a number"),
        pytest.param(Record(ZSTD, frame(NEW[::-1]), NEW), "does not make what it should", id="other bytes"),
        pytest.param(Record(ZSTD, frame(NEW[::-1]), NEW[::-1]), "does not make the .* file", id="other bytes, other check"),
        pytest.param(Record(ZSTD, frame(NEW[:200]), NEW[:200]), "does not make the .* file", id="too little"),
        pytest.param(Record(SAME, b"x", NEW), "carries bytes of its own", id="copy with payload"),
        pytest.param(Record(SAME, b"", NEW, offset=1), "bytes that its base does not have", id="copy past the end"),
        pytest.param(Record(SAME, b"", NEW, offset=2**64 - 1), "bytes that its base does not have", id="copy far away"),
        pytest.param(Record(PLANES, GOOD, NEW, width=4, offset=4), "bytes that its base does not have", id="planes past the end"),
    ],
)
@pytest.mark.parametrize("case", [PLAIN, WEIGHTS])
def test_lying_record_refused(case, record, sentence):
    refuse(case, record, sentence=sentence)


def test_record_over_one_chunk_refused():
    data = bytes(MiB + 4)
    case = Case(data, data, [Elements(0, len(data), 4)])
    refuse(case, Record(ZSTD, frame(data), data), sentence="claims more bytes")


@pytest.mark.parametrize("kind", [SAME, PLANES, BSDIFF])
def test_record_without_base_refused(kind):
    refuse(PLAIN, Record(kind, b"" if kind == SAME else GOOD, NEW), base=None, base_size=400, sentence="its base does not have")


def test_bsdiff_on_large_base_refused():
    refuse(WEIGHTS, Record(BSDIFF, b"", NEW), base_size=9 * MiB, sentence="too large for it")


@pytest.mark.parametrize(("size", "offset"), [(401, 1), (MAX_WEIGHTS, MAX_WEIGHTS - 400)])
def test_base_shorter_than_claimed_refused(size, offset):
    with pytest.raises(BaseError, match="shorter than it was"):
        apply(crafted(PLAIN, Record(SAME, b"", NEW, offset=offset), base_size=size), [PLAIN])


@pytest.mark.parametrize("size", [-1, MAX_WEIGHTS + 1, 2**80])
def test_impossible_base_size_refused(size):
    refuse(PLAIN, Record(SAME, b"", NEW, offset=2**64 - 400), base_size=size, sentence="header is damaged")


def test_more_records_than_announced_refused():
    half = Record(ZSTD, frame(NEW[:200]), NEW[:200])
    rest = Record(ZSTD, frame(NEW[200:]), NEW[200:])
    assert apply(crafted(PLAIN, half, rest), [PLAIN]) == [NEW]
    refuse(PLAIN, half, rest, rest, sentence="claims more bytes")
    refuse(PLAIN, half, rest, rest, records=2, sentence="goes on after its last record")
