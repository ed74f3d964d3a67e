"""The delta codec: every file comes back bit by bit, and a damaged or hostile delta makes the right file or none."""

from __future__ import annotations

import base64
import bz2
import hashlib
import io
import json
import math
import struct
import threading
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import bsdiff4
import numpy as np
import pytest
import torch
from backports import zstd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ota import delta
from ota.delta import DeltaFile, Header, encode, lowrank, numbers, plan, streams
from ota.delta import format as container
from ota.delta.encode import Elements, Pair
from ota.delta.format import BSDIFF, NUMBERS, SAME, ZSTD, ZSTD_PREFIX, Product, Segment, pack_table
from ota.delta.header import BundleFile
from ota.delta.numbers import KINDS, KindName
from ota.errors import BaseError, DeltaError
from ota.manifest import MAX_WEIGHTS, KiB, MiB
from tests import golden_kit
from tests.conftest import few

BASE, TARGET = "a" * 64, "b" * 64
FLOATS: dict[KindName, Any] = {"float16": np.float16, "float32": np.float32}


def stretch(offset: int, length: int, kind: KindName, row: int = 0) -> Elements:
    """Describe numbers whose old values lie at the same place."""
    return Elements(offset, length, kind, row, offset)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Case:
    """A new file, the old file, and where the numbers of the new file lie."""

    new: bytes
    old: bytes | None
    elements: Sequence[Elements] = ()
    role: Any = "weights"

    @property
    def entry(self) -> BundleFile:
        variant = None if self.role == "graph" else "full"
        return BundleFile(role=self.role, variant=variant, size=len(self.new), sha256=sha(self.new))


@dataclass
class Output:
    """Where a delta writes its files; it refuses more bytes than were declared."""

    files: dict[str, bytes] = field(default_factory=dict)

    @contextmanager
    def open(self, entry: BundleFile):
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
    encode.build(pairs, BASE, TARGET, folder / "patch")
    return (folder / "patch").read_bytes()


def apply(patch: bytes, cases: Sequence[Case], output: Output | None = None) -> list[bytes]:
    """Apply a delta to the old files and return the new ones; the header is checked first, as the agent does."""
    stream, out = io.BytesIO(patch), output or Output()
    olds = {(case.entry.role, case.entry.variant): case.old for case in cases}

    def open_base(file: DeltaFile) -> BinaryIO:
        assert isinstance(file.target, BundleFile)
        return io.BytesIO(olds[file.target.role, file.target.variant] or b"")

    header = delta.read_header(stream)
    if (header.base, header.target, [f.target for f in header.files]) != (BASE, TARGET, [case.entry for case in cases]):
        raise DeltaError("the delta is for other bundles")
    delta.apply(stream, header, open_base, out.open)
    return [out.files[case.entry.sha256] for case in cases]


def round_trip(cases: Sequence[Case], folder: Path) -> bytes:
    patch = build(cases, folder)
    assert apply(patch, cases) == [case.new for case in cases]
    return patch


# Published deltas can be read for ever


@pytest.mark.parametrize("name", golden_kit.NAMES)
def test_published_delta_is_read(name):
    """Read published deltas, because fielded agents notice a changed format.

    A round trip does not notice it: encoder and decoder share their rules.
    """
    old, new = golden_kit.files(name)
    patch = base64.b64decode(json.loads(golden_kit.DELTAS.read_bytes())[name])
    assert apply(patch, [Case(new, old)]) == [new]
    assert golden_kit.ways(patch)[0] == {name.split()[1]}


@pytest.mark.parametrize("name", golden_kit.UPDATES)
def test_published_update_is_read(name):
    """Read updates of format version 2 that were published once."""
    old, new, _ = golden_kit.update(name)
    patch = base64.b64decode(json.loads(golden_kit.DELTAS.read_bytes())[name])
    assert apply(patch, [Case(new, old)]) == [new]
    assert golden_kit.ways(patch)[0] == {"same", "product"} | ({"steps"} if KINDS[name.split()[0]].mantissa else set())


@pytest.mark.parametrize("name", golden_kit.SEEDED)
def test_published_update_of_shared_numbers_is_read(name):
    """Read updates whose tensors share numbers; the files were made by Python's own integers."""
    old, new, _ = golden_kit.seeded(name)
    patch = base64.b64decode(json.loads(golden_kit.DELTAS.read_bytes())[name])
    assert apply(patch, [Case(new, old)]) == [new]
    assert golden_kit.ways(patch)[0] == {"same", "shared numbers"}


@pytest.mark.parametrize("name", golden_kit.NAMES)
def test_version_1_is_written_byte_for_byte_as_before(name):
    """Write, for fielded agents, the bytes that the factory wrote when there was no other version."""
    assert golden_kit.make(name) == base64.b64decode(json.loads(golden_kit.DELTAS.read_bytes())[name])


# Round trips


def special_codes(kind: KindName) -> list[int]:
    """Return bit patterns of zero, the smallest and largest denormal, the largest number, infinity and NaNs, of both signs."""
    width, mantissa = KINDS[kind].width, KINDS[kind].mantissa or 3
    top = 1 << (8 * width - 1)
    infinity = (top - 1) >> mantissa << mantissa
    plain = [0, 1, (1 << mantissa) - 1, infinity - 1, infinity, infinity + 1, top - 1]
    return plain + [code | top for code in plain]


@st.composite
def weight_files(draw) -> Case:
    """Generate stretches of numbers with any bit patterns, gaps between them (some empty), and any kind of old file."""
    new, elements = bytearray(), []
    for _ in range(draw(st.integers(0, 3))):
        new += draw(st.binary(max_size=5))
        kind = draw(st.sampled_from(list(KINDS)))
        width = KINDS[kind].width
        codes = draw(st.lists(st.integers(0, 2 ** (8 * width) - 1) | st.sampled_from(special_codes(kind)), max_size=40))
        row = draw(st.sampled_from((0, 1, 3, 8, len(codes))))
        at = draw(st.sampled_from((len(new), len(new), None, 0, 3)))
        elements.append(Elements(len(new), width * len(codes), kind, row, at))
        new += np.array(codes, KINDS[kind].dtype).tobytes()
    new += draw(st.binary(min_size=0 if new else 1, max_size=7))
    old = bytearray(new)
    for _ in range(draw(st.integers(0, 4))):
        old[draw(st.integers(0, len(old) - 1))] = draw(st.integers(0, 255))
    kind_of_old = draw(st.sampled_from(("same length", "shorter", "longer", "empty", "none", "unrelated")))
    lengths = {"shorter": old[: draw(st.integers(0, len(old)))], "longer": old + draw(st.binary(max_size=9)), "empty": b""}
    before = lengths.get(kind_of_old, old if kind_of_old == "same length" else draw(st.binary(max_size=200)))
    wanted = [e for e in elements if e.length or draw(st.booleans())]
    return Case(bytes(new), None if kind_of_old == "none" else bytes(before), wanted)


HUGE = Case(  # the sum of its distances overflows float32
    bytes(35) + b"s\xff\xff\x7f\x7f\0", b"", [Elements(0, 40, "float32", 8, 0), Elements(40, 1, "bytes", 0, 40)]
)


@settings(max_examples=150, deadline=None)
@given(weight_files())
@example(HUGE)
def test_any_weights_come_back(tmp_path_factory, case):
    round_trip([case], tmp_path_factory.mktemp("case"))


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.binary(max_size=300) | st.none(), st.sampled_from(("graph", "sampler", "golden")))
@example(b"x", b"", "graph")
@example(b"abc" * 50, b"abc" * 50, "sampler")
@example(bytes(300), bytes(299), "golden")
def test_any_plain_file_comes_back(tmp_path_factory, new, old, role):
    round_trip([Case(new, old, role=role)], tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("row", [0, 1, 7, 100])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunk_borders_come_back(tmp_path, monkeypatch, kind, row, extra):
    monkeypatch.setattr(plan, "MAX_CHUNK", 64 + 1)  # not a multiple of the widths
    count = 5 * 64 // KINDS[kind].width + extra
    new = np.arange(count, dtype=KINDS[kind].dtype)
    old = new.copy()
    old[::7] += 1
    patch = round_trip([Case(new.tobytes(), old.tobytes(), [stretch(0, new.nbytes, kind, row)])], tmp_path)
    assert len(kinds_of(patch)) > 4


@pytest.mark.parametrize(("kind", "share"), [("float32", 0.6), ("int4", 0.4)])
def test_file_over_one_chunk_comes_back(tmp_path, kind, share):
    rng = np.random.default_rng(0)
    old = rng.normal(size=(MiB // 2 + 77)).astype(np.float32)
    new = old * np.float32(1.0001)
    if kind == "int4":
        before, after = (rng.integers(-7, 8, 2 * MiB + 50, dtype=np.int8) & 15 for _ in range(2))
        after = np.where(rng.random(len(before)) < 0.1, after, before)
        old, new = (codes[0::2] | codes[1::2] << 4 for codes in (before.astype(np.uint8), after.astype(np.uint8)))
    patch = round_trip([Case(new.tobytes() + b"end", old.tobytes() + b"END", [stretch(0, new.nbytes, kind, 64)])], tmp_path)
    assert len(patch) < share * new.nbytes


@pytest.mark.parametrize("kind", list(FLOATS))
@given(data=st.data())
def test_order_of_floats_is_kept(kind, data):
    finite = st.floats(width=8 * KINDS[kind].width, allow_nan=False)
    values = np.array(sorted(data.draw(st.lists(finite, min_size=2, max_size=20))), FLOATS[kind])
    codes = numbers.ordered(values.view(KINDS[kind].dtype), KINDS[kind]).astype(np.int64)
    assert (codes[1:] > codes[:-1])[values[1:] > values[:-1]].all()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "bytes"])
def test_ordering_is_undone_everywhere(kind):
    codes = np.arange(2 ** (8 * KINDS[kind].width), dtype=np.uint32).astype(KINDS[kind].dtype)
    assert (numbers.bits(numbers.ordered(codes, KINDS[kind]), KINDS[kind]) == codes).all()
    assert len(np.unique(numbers.ordered(codes, KINDS[kind]))) == len(codes)


@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from(special_codes("float32")), min_size=1))
def test_ordering_of_words_is_undone(codes):
    array = np.array(codes, np.uint32)
    assert (numbers.bits(numbers.ordered(array, KINDS["float32"]), KINDS["float32"]) == array).all()


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_every_step_between_small_integers_is_undone(kind):
    size = 16 if kind == "int4" else 256
    old, new = (codes.ravel().astype(np.uint8) for codes in np.meshgrid(range(size), range(size)))
    by = numbers.difference(new, old, KINDS[kind])
    assert by.max() == size - 1
    assert (numbers.moved(old, by, KINDS[kind]) == new).all()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@given(data=st.data())
def test_any_steps_are_undone(kind, data):
    def any_codes(count: int) -> Any:
        codes = st.integers(0, 2 ** (8 * KINDS[kind].width) - 1) | st.sampled_from(special_codes(kind))
        return np.array(data.draw(st.lists(codes, min_size=count, max_size=count)), KINDS[kind].dtype)

    old, new = any_codes(9), any_codes(9)
    steps = np.array(data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=9, max_size=9)), np.int32)
    size = np.float32(data.draw(st.floats(width=32, min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)))
    assert (numbers.signed(numbers.zigzag(steps)) == steps).all()
    there = numbers.stepped(old, steps, size, KINDS[kind])
    assert (numbers.moved(there, numbers.difference(new, there, KINDS[kind]), KINDS[kind]) == new).all()
    special = numbers.values(old, KINDS[kind])
    assert (there == old)[~np.isfinite(special)].all()


def stored_by_torch(values: Any, kind: KindName) -> Any:
    """Return float32 values as bit patterns of a number format, rounded by torch."""
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    as_integers = {4: torch.int32, 2: torch.int16}[KINDS[kind].width]
    return torch.from_numpy(values).to(names[kind]).view(as_integers).numpy().view(KINDS[kind].dtype)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_numbers_are_rounded_as_torch_rounds_them(kind):
    every = np.arange(2**16, dtype=np.uint16)
    exact = numbers.values(every, KINDS[kind])
    words = exact[np.isfinite(exact)].view(np.uint32)
    half = np.uint32(1) << np.uint32(22 - KINDS[kind].mantissa)  # half a unit in the last place
    for by in (half - 1, half, half + 1, 3 * half - 1, 3 * half, 3 * half + 1):  # below, at and above a tie, of even and odd ones
        found = (words + np.uint32(by)).view(np.float32)
        plain = np.isfinite(found) & (np.abs(found) >= np.finfo(np.float16).smallest_normal) & (np.abs(found) < 65000)
        assert (numbers._rounded(found[plain], KINDS[kind]) == stored_by_torch(found[plain], kind)).all()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", ["steps", "product"])
def test_only_normal_numbers_are_moved_by_rules(kind, way):
    """Move only normal numbers: machines treat denormals, infinities and NaNs differently."""
    mantissa, top = KINDS[kind].mantissa, 1 << (8 * KINDS[kind].width - 1)
    smallest, infinity = 1 << mantissa, (top - 1) >> mantissa << mantissa
    codes = [0, 1, smallest - 1, smallest, smallest + 1, infinity, infinity + 1, top, top | 1]
    old = np.array(codes, KINDS[kind].dtype)
    exponent = KINDS[kind].mantissa + KINDS[kind].bias - 1  # one step is the distance between the smallest normal numbers
    if way == "steps":
        found = numbers.stepped(old, np.full(9, -1, np.int32), np.float32(2.0**-exponent), KINDS[kind])
    else:  # the same step, in two factors
        left, right = np.full((3, 1), -(2**12), np.int32), np.full((1, 3), 2**12, np.int32)
        reach = min(exponent + 24, container.MAX_EXPONENT)
        found = numbers.predicted(old, left, right, -reach, KINDS[kind])
        if reach != exponent + 24:  # here no product is as small as the distance between the smallest normal numbers
            assert (found[:3] == old[:3]).all()
            assert (found[5:] == old[5:]).all()
            return
    wanted = old.copy()
    wanted[4] = smallest  # the only one that is normal before and after
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_processor_that_takes_denormals_for_0_moves_numbers_alike(kind):
    rng = np.random.default_rng(0)
    old = rng.integers(0, 1 << 32, 1 << 16).astype(KINDS[kind].dtype)  # any bit patterns
    small = rng.integers(0, 4 << KINDS[kind].mantissa, 1 << 16).astype(KINDS[kind].dtype)
    steps, sides = (
        rng.integers(-3, 4, 1 << 16, np.int32),
        [rng.integers(-1, 2, shape, np.int32) for shape in ((256, 1), (1, 256))],
    )

    def made() -> list[bytes]:
        moved = [numbers.stepped(codes, steps, numbers.LEAST_STEP, KINDS[kind]) for codes in (old, small)]
        moved += [numbers.predicted(codes, *sides, -container.MAX_EXPONENT, KINDS[kind]) for codes in (old, small)]
        return [codes.tobytes() for codes in moved]

    wanted = made()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always computes with denormals")
    try:
        assert made() == wanted
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("kind", "first"), [("float16", 42), ("bfloat16", 42), ("float32", 42)])
def test_denormals_share_the_scale_of_the_smallest_exponent(kind, first):
    """Check the classes, which are part of the format: half octaves; 14 is for numbers expected to move by one."""
    mantissa = KINDS[kind].mantissa
    old = np.array([0, 1, 1 << mantissa, 2 << mantissa, 3 << mantissa, 3 << mantissa | 1], KINDS[kind].dtype)
    scale = first + 2 - 14 - 2 * (KINDS[kind].bias + mantissa)
    found = numbers.contexts(old, KINDS[kind], scale, None, None, 3)
    assert found.tolist() == [first, first, first, first - 2, first - 4, first - 4]


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_update_on_a_grid_costs_what_its_steps_tell(tmp_path, kind):
    rng = np.random.default_rng(0)
    weights = rng.normal(scale=0.1, size=(256, 384)).astype(np.float32)
    steps = np.round(rng.normal(scale=0.5, size=weights.shape)).astype(np.float32)
    share = np.unique(steps, return_counts=True)[1] / steps.size
    entropy = -(share * np.log2(share)).sum() * steps.size / 8

    def stored(values: Any) -> bytes:
        if kind == "bfloat16":
            data: bytes = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
            return data
        return bytes(values.astype(FLOATS[kind]).tobytes())

    base = stored(weights)
    weights = numbers.values(np.frombuffer(base, KINDS[kind].dtype), KINDS[kind]).astype(np.float32).reshape(weights.shape)
    new = stored(weights + steps * np.float32(0.0123))  # computed from the stored weights
    patch = round_trip([Case(new, base, [stretch(0, len(base), kind, 384)])], tmp_path)
    assert len(patch) < 1.06 * entropy + 800


# Products of thin matrices


def factors(draw: Any, *shape: int) -> Any:
    most = numbers.MAX_FACTOR
    return np.array(
        draw(st.lists(st.integers(-most, most), min_size=math.prod(shape), max_size=math.prod(shape))), np.int32
    ).reshape(shape)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes"])
@given(data=st.data())
def test_any_product_is_undone(kind, data):
    size = 16 if kind == "int4" else 2 ** (8 * KINDS[kind].width)
    codes = st.integers(0, size - 1) | st.sampled_from([code % size for code in special_codes(kind)])
    old, new = (
        np.array(data.draw(st.lists(codes, min_size=8, max_size=8)), KINDS[kind].dtype) for _ in range(2)
    )  # 3 rows, the last short
    left, right = factors(data.draw, 3, 2), factors(data.draw, 2, 3)
    exponent = data.draw(st.integers(-container.MAX_EXPONENT, container.MAX_EXPONENT))
    there = numbers.predicted(old, left, right, exponent, KINDS[kind])
    assert (numbers.moved(there, numbers.difference(new, there, KINDS[kind]), KINDS[kind]) == new).all()
    special = numbers.values(old, KINDS[kind])
    assert (there == old)[~np.isfinite(special)].all()
    # The same in Python's own integers, for int4 and int8 including the last rounding.
    if not KINDS[kind].mantissa:
        low, high = (-8, 7) if kind == "int4" else (-128, 127)
        for i, code in enumerate(old.tolist()):
            value = (code ^ (size // 2)) - size // 2
            product = sum(int(left[i // 3, k]) * int(right[k, i % 3]) for k in range(2))
            wanted = min(max(value + round(Fraction(product) * Fraction(2) ** exponent), low), high)
            assert there[i] == wanted % size


def test_product_does_not_depend_on_who_multiplies():
    """Check that the order of sums (and so the library and the machine) does not matter, because none is rounded."""
    rng = np.random.default_rng(0)
    most = numbers.MAX_FACTOR
    left, right = rng.integers(-most, most + 1, (200, 16), np.int32), rng.integers(-most, most + 1, (16, 300), np.int32)
    old = rng.normal(size=60_000).astype(np.float32).view(np.uint32)
    once = numbers.predicted(old, left, right, -50, KINDS["float32"])
    order = rng.permutation(16)
    assert (numbers.predicted(old, left[:, order], right[order], -50, KINDS["float32"]) == once).all()
    exact = sum(int(a) * int(b) for a, b in zip(left[7], right[:, 11], strict=True))
    assert once.view(np.float32)[7 * 300 + 11] == old.view(np.float32)[7 * 300 + 11] + np.float32(exact * 2.0**-50)


def low_rank(rank: int, m: int = 128, n: int = 192, scale: float = 1e-3) -> tuple[Any, Any]:
    rng = np.random.default_rng(rank)
    old = rng.normal(scale=0.1, size=(m, n)).astype(np.float32)
    change = rng.normal(size=(m, rank)).astype(np.float32) @ rng.normal(size=(rank, n)).astype(np.float32)
    return old, old + np.float32(scale) * change


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_merged_low_rank_update_costs_its_factors(tmp_path, rank):
    old, new = low_rank(rank)
    patch = round_trip([Case(new.tobytes(), old.tobytes(), [stretch(0, new.nbytes, "float32", 192)])], tmp_path)
    plain = round_trip([Case(new.tobytes(), old.tobytes(), [stretch(0, new.nbytes, "float32")])], tmp_path)
    assert len(patch) < 3.2 * rank * sum(new.shape) + 0.13 * new.nbytes
    assert len(patch) < 0.5 * len(plain)


@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_same_factors_whatever_multiplies(scale):
    """Find the same factors for another memory layout: a library sums in another order, but the integers are the same."""
    old, new = low_rank(3, scale=scale)
    change = (new - old).astype(np.float64)
    found, again = lowrank.find(change.copy(), 2.0**-27), lowrank.find(np.asfortranarray(change), 2.0**-27)
    assert found
    assert again
    assert (found.rank, found.exponent) == (again.rank, again.exponent)
    assert (found.left == again.left).all()
    assert (found.right == again.right).all()


def test_no_product_in_noise():
    assert lowrank.find(np.random.default_rng(0).normal(size=(128, 192)), 1e-6) is None


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, 1e300, 5e-324])
def test_no_product_in_what_is_no_change(value):
    with np.errstate(all="ignore"):
        assert lowrank.find(np.full((64, 64), value), 1e-6) is None


# Streams of small numbers


def numbers_of(name: str, count: int) -> streams.Numbers:
    rng = np.random.default_rng(count)
    made = {
        "zeros": lambda: np.zeros(count),
        "one of them": lambda: np.arange(count) == count // 2,
        "rare": lambda: (rng.random(count) < 0.01) * rng.integers(1, 2**20, count),
        "half": lambda: rng.integers(0, 2, count),
        "small": lambda: rng.geometric(0.3, count) - 1,
        "bytes": lambda: rng.geometric(0.02, count),
        "wide": lambda: rng.normal(2**18, 2**15, count).clip(0),
        "heavy tail": lambda: np.exp(rng.normal(5, 5, count)).clip(0, 2**32 - 1),
        "any": lambda: rng.integers(0, 2**32, count),
        "largest": lambda: np.full(count, 2**32 - 1),
    }
    return made[name]().astype(np.uint32)


SHAPES = ["zeros", "one of them", "rare", "half", "small", "bytes", "wide", "heavy tail", "any", "largest"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 5, 63, 64, 1000, 100_001])
def test_numbers_come_back(name, count):
    values = numbers_of(name, count)
    for data in (streams.encode(values), streams.planes(values, 4))[: 1 + bool(count)]:
        reader = streams.Reader(data)
        assert (streams.decode(reader, count) == values).all()
        reader.end()


@settings(deadline=None)
@given(st.lists(st.integers(0, 3) | st.integers(0, 300) | st.integers(0, 2**32 - 1), max_size=300))
def test_any_numbers_come_back(values):
    array = np.array(values, np.uint32)
    assert (streams.decode(streams.Reader(streams.encode(array)), len(array)) == array).all()


@pytest.mark.parametrize("name", ["rare", "half", "small", "bytes", "wide"])
def test_numbers_cost_little_more_than_their_entropy(name):
    values = numbers_of(name, 200_000)
    token, below = streams.tokens(values)
    share = np.bincount(token)[np.bincount(token) > 0] / len(values)
    entropy = (-(share * np.log2(share)).sum() * len(values) + below.sum()) / 8
    assert len(streams.encode(values)) < 1.03 * entropy + 100


@pytest.mark.parametrize("role", ["weights", "graph", "golden"])
def test_same_file_costs_nothing(tmp_path, role):
    data = np.random.default_rng(0).bytes(5000)
    case = Case(data, data, [stretch(0, 4000, "float32")] if role == "weights" else (), role)
    patch = round_trip([case], tmp_path)
    stream = io.BytesIO(patch)
    delta.read_header(stream)
    assert len(stream.read()) == len(kinds_of(patch)) * container.RECORD.size


def test_small_steps_cost_less_than_values(tmp_path):
    rng = np.random.default_rng(0)
    old = (rng.normal(size=20_000).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    new = (old + rng.integers(-1, 2, old.size)).astype(np.uint16)
    patch = round_trip([Case(new.tobytes(), old.tobytes(), [stretch(0, new.nbytes, "bfloat16")])], tmp_path)
    as_bytes = round_trip([Case(new.tobytes(), old.tobytes())], tmp_path)
    assert len(patch) < len(as_bytes) < new.nbytes
    assert len(patch) < len(bsdiff4.diff(old.tobytes(), new.tobytes()))


def test_same_input_same_bytes(tmp_path):
    cases = [small_weights(), small_table()]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert build(cases, tmp_path / "a") == build(cases, tmp_path / "b")


def test_large_plain_file_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MAX_SMALL", 100)
    with pytest.raises(DeltaError, match="101 bytes is too large"):
        build([Case(b"x" * 101, b"", role="graph")], tmp_path)


@pytest.mark.parametrize(
    "elements",
    [
        pytest.param([stretch(0, 8, "float32"), stretch(4, 8, "float32")], id="overlap"),
        pytest.param([stretch(0, 8, "float32"), stretch(0, 8, "float32")], id="twice"),
        pytest.param([stretch(396, 8, "float32")], id="past the end"),
        pytest.param([stretch(400, 4, "float32")], id="after the end"),
        pytest.param([stretch(0, 7, "float32")], id="half a number"),
        pytest.param([stretch(-4, 8, "float32")], id="before the start"),
        pytest.param([stretch(8, -4, "float32")], id="negative length"),
        pytest.param([Elements(0, 8, "float32", 0, -4)], id="predecessor before the start"),
    ],
)
def test_elements_that_do_not_fit_not_built(tmp_path, elements):
    with pytest.raises(DeltaError, match="export it again"):
        build([Case(bytes(400), bytes(400), elements)], tmp_path)


def test_elements_in_any_order_come_back(tmp_path):
    case = small_weights()
    assert round_trip([Case(case.new, case.old, case.elements[::-1])], tmp_path) == round_trip([case], tmp_path)


@pytest.mark.slow
def test_very_many_small_tensors_come_back(tmp_path):
    old = np.arange(70_000, dtype=np.uint8)  # more than 16 bits can count
    new = old + np.uint8(1)
    rows = [stretch(i, 1, "int8") for i in range(len(new))]
    patch = round_trip([Case(new.tobytes(), old.tobytes(), rows)], tmp_path)
    assert len(kinds_of(patch)) == -(-len(new) // container.MAX_SEGMENTS)


def test_more_records_than_a_file_may_have_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "MAX_RECORDS", 1)
    with pytest.raises(DeltaError, match="publish it without a delta"):
        build([small_weights()], tmp_path)


def test_two_records_at_once_on_any_machine(monkeypatch):
    monkeypatch.setattr(encode.os, "cpu_count", lambda: 64)
    lock, now, most = threading.Lock(), [0], [0]

    def call() -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    list(encode._side_by_side([call] * encode.MANY))
    assert most[0] == 2


# A damaged delta makes the right file or none


def small_weights() -> Case:
    """Return weights that need a little of every kind of record: same, numbers in two streams, and new bytes."""
    rng = np.random.default_rng(2)
    run = plan.SAME_RUN
    old = np.concatenate((np.zeros(run // 2, np.uint16), rng.normal(size=300).astype(np.float16).view(np.uint16)))
    new = old.copy()
    new[run // 2 : run // 2 + 150] += 1
    new[run // 2 + 150 :] += rng.integers(0, 40, 150).astype(np.uint16)
    rows = [stretch(0, run, "float16"), stretch(run, 300, "float16", 50), stretch(run + 300, 300, "float16", 50)]
    return Case(new.tobytes() + b"tail", old.tobytes(), rows)


def small_table() -> Case:
    rng = np.random.default_rng(1)
    old = rng.bytes(300)
    return Case(old[:100] + b"!" + old[101:] + b"more", old, role="sampler")


def small_graph() -> Case:
    """Return a file whose bytes changed by a little here and there, for which bsdiff is best."""
    old = np.random.default_rng(3).integers(0, 256, 3000).astype(np.uint8)
    new = old.copy()
    new[::9] += 1
    return Case(new.tobytes(), old.tobytes(), role="graph")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [small_weights(), small_table(), small_graph()]


@pytest.fixture(scope="module")
def patch(cases, tmp_path_factory) -> bytes:
    made = round_trip(cases, tmp_path_factory.mktemp("small"))
    assert set(kinds_of(made)) == {SAME, NUMBERS, ZSTD, BSDIFF, ZSTD_PREFIX}
    return made


def kinds_of(patch: bytes) -> list[int]:
    """List the kind of every record."""
    stream = io.BytesIO(patch)
    return [record.kind for file in delta.read_header(stream).files for record in container.records(stream, file)]


def test_cut_at_every_byte_refused(patch, cases):
    for length in range(len(patch)):
        with pytest.raises(DeltaError):
            apply(patch[:length], cases)


@pytest.mark.parametrize("first", few(range(8), 1))
def test_every_flipped_bit_harmless(patch, cases, first):
    wanted = [case.new for case in cases]
    accepted = 0
    for bit in range(first, 8 * len(patch), 8):
        damaged = bytearray(patch)
        damaged[bit // 8] ^= 1 << bit % 8
        with suppress(DeltaError, BaseError):
            assert apply(bytes(damaged), cases) == wanted, f"bit {bit} makes another file"
            accepted += 1
    assert accepted < 0.05 * len(patch)


def test_every_flipped_bit_of_a_product_harmless():
    rng = np.random.default_rng(0)
    sides = rng.integers(-9, 10, (10, 2), np.int32), rng.integers(-9, 10, (2, 10), np.int32)
    segment = words(product=Product(2, -3, *sides))
    old = rng.normal(size=100).astype(np.float32)
    new = segment.before(old.view(np.uint32)).tobytes()
    case = Case(new, old.tobytes(), WEIGHTS.elements)
    patch = crafted(case, Record(NUMBERS, pack_table([segment], None) + ALL_ZERO, new))
    assert apply(patch, [case]) == [new]
    for bit in range(8 * (len(patch) - container.RECORD.size - 300), 8 * len(patch)):
        damaged = bytearray(patch)
        damaged[bit // 8] ^= 1 << bit % 8
        with suppress(DeltaError, BaseError):
            assert apply(bytes(damaged), [case]) == [new], f"bit {bit} makes another file"


def test_bytes_after_the_end_refused(patch, cases):
    with pytest.raises(DeltaError, match="goes on after its last record"):
        apply(patch + b"\0", cases)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_refused(data):
    for start in (b"", *(container.PREFIX.pack(container.MAGIC, version, len(data)) for version in container.VERSIONS)):
        with pytest.raises(DeltaError):
            delta.read_header(io.BytesIO(start + data))


def test_header_that_is_not_canonical_refused(patch):
    stream = io.BytesIO(patch)
    header, rest = delta.read_header(stream).canonical(), stream.read()
    for other in (header.replace(b",", b", ", 1), header[:-1] + b',"base":"' + b"c" * 64 + b'"}', header + b" "):
        start = container.PREFIX.pack(container.MAGIC, 1, len(other))
        with pytest.raises(DeltaError, match="header is damaged"):
            delta.read_header(io.BytesIO(start + other + rest))


@pytest.mark.parametrize(("keep", "add"), [(slice(-1), b""), (slice(None), b"\0"), (slice(0), b""), (slice(None, None, -1), b"")])
def test_wrong_base_is_noticed(patch, cases, keep, add):
    others = [Case(case.new, case.old[keep] + add, case.elements, case.role) for case in cases]
    with pytest.raises(BaseError, match="fetch the full bundle"):
        apply(patch, others)


@pytest.mark.parametrize("version", [0, 255])
def test_delta_of_another_format_is_not_read(patch, cases, version):
    other = bytearray(patch)
    other[len(container.MAGIC)] = version
    with pytest.raises(DeltaError, match=f"format version {version}, but this agent reads 1 and 2"):
        apply(bytes(other), cases)


def test_newer_format_asks_for_newer_agent(patch, cases):
    newer = bytearray(patch)
    newer[len(container.MAGIC)] += 1
    with pytest.raises(DeltaError, match="format version 3, but this agent reads 1 and 2; update the agent"):
        apply(bytes(newer), cases)


class Unread(io.BytesIO):
    """A stream that remembers the largest read."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        self.most = max(self.most, 1 << 40 if size is None or size < 0 else size)
        return super().read(size)


@pytest.mark.parametrize("length", [65_537, 2**32 - 1])
def test_header_length_checked_before_reading(patch, length):
    stream = Unread(container.PREFIX.pack(b"DFDELTA", 1, length) + patch)
    with pytest.raises(DeltaError, match=f"header claims {length} bytes, more than 65536"):
        delta.read_header(stream)
    assert stream.most <= container.PREFIX.size


# Patch bombs: well-formed and hostile


@dataclass
class Record:
    """One record, whose lengths may be false."""

    kind: int
    payload: bytes
    new: bytes
    new_length: int | None = None
    payload_length: int | None = None
    offset: int = 0

    def pack(self) -> bytes:
        lengths = (
            len(self.new) if self.new_length is None else self.new_length,
            len(self.payload) if self.payload_length is None else self.payload_length,
        )
        check = hashlib.blake2b(self.new, digest_size=16).digest()
        return container.RECORD.pack(self.kind, *lengths, self.offset, check) + self.payload


def crafted(case: Case, *records: Record, **fields: Any) -> bytes:
    """Build a delta for one file from any records."""
    file = DeltaFile(target=case.entry, base=sha(case.old or b""), base_size=len(case.old or b""))
    made = json.loads(Header(base=BASE, target=TARGET, files=[file]).canonical())
    made["files"][0].update(fields)  # also to values that a header may not have
    header = json.dumps(made, sort_keys=True, separators=(",", ":")).encode()
    return container.PREFIX.pack(container.MAGIC, 1, len(header)) + header + b"".join(r.pack() for r in records)


def refuse(case: Case, *records: Record, sentence: str, **fields: Any) -> None:
    """Check that a crafted delta is refused with this sentence, and writes no more than the file is long."""
    output = Output()
    with pytest.raises(DeltaError, match=sentence):
        apply(crafted(case, *records, **fields), [case], output)
    assert sum(map(len, output.files.values())) <= len(case.new)


NEW = bytes(range(200)) * 2
PLAIN = Case(NEW, NEW[::-1], role="golden")
WEIGHTS = Case(NEW, NEW[::-1], [stretch(0, 400, "float32")])


def frame(data: bytes, *, size: bool = True) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.content_size_flag: int(size)})


def lying_frame(data: bytes, claimed: int) -> bytes:
    """Build a frame whose header claims a false unpacked length; both lengths are written in two bytes."""
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
        pytest.param(struct.pack("<II", 0x184D2A50, 400) + NEW, "another length than it claims", id="skippable frame"),
        pytest.param(b"", "cannot be unpacked", id="empty"),
    ],
)
def test_zstd_bomb_refused(case, payload, sentence):
    refuse(case, Record(ZSTD, payload, NEW), sentence=sentence)


def with_prefix(known: int, packed: bytes) -> bytes:
    return struct.pack("<I", known) + packed


def test_crafted_bytes_beside_the_base_can_be_right():
    near = streams.compress_with_prefix(NEW, NEW[8:], 3)
    assert len(near) < len(frame(NEW))
    for case in (PLAIN, WEIGHTS):
        moved = Case(NEW, b"moved by" + NEW[8:], case.elements, case.role)
        assert apply(crafted(moved, Record(ZSTD_PREFIX, near, NEW, offset=8)), [moved]) == [NEW]


@pytest.mark.parametrize("case", [PLAIN, WEIGHTS])
@pytest.mark.parametrize(
    ("payload", "offset", "sentence"),
    [
        pytest.param(b"", 0, "ends too early", id="empty"),
        pytest.param(with_prefix(400, b""), 0, "cannot be unpacked", id="no frame"),
        pytest.param(with_prefix(401, frame(NEW)), 0, "bytes that its base does not have", id="past the end"),
        pytest.param(with_prefix(400, frame(NEW)), 2**64 - 1, "bytes that its base does not have", id="far past the end"),
        pytest.param(with_prefix(2**32 - 1, frame(NEW)), 0, "more of its base than it may", id="range without end"),
        pytest.param(with_prefix(7, frame(NEW)), 0, "cannot be unpacked", id="range too short"),
        pytest.param(with_prefix(400, frame(bytes(50_000_000))), 0, "another length than it claims", id="bomb"),
        pytest.param(with_prefix(400, frame(NEW) + frame(NEW)), 0, "cannot be unpacked", id="second frame"),
        pytest.param(streams.compress_with_prefix(NEW, NEW[::-1], 3), 1, "bytes that its base does not have", id="elsewhere"),
        pytest.param(
            streams.compress_with_prefix(NEW, NEW[200:], 3),
            0,
            "does not make what it should|cannot be unpacked",
            id="beside other bytes",
        ),
    ],
)
def test_lying_range_refused(case, payload, offset, sentence):
    refuse(case, Record(ZSTD_PREFIX, payload, NEW, offset=offset), sentence=sentence)


def bsdiff(control: bytes, diff: bytes, extra: bytes, new_size: int = len(NEW), claims: tuple[int, int] | None = None) -> bytes:
    """Build a bsdiff4 file from its three packed streams."""
    lengths = claims or (len(control), len(diff))
    return struct.pack("<8sqqq", b"BSDIFF40", *lengths, new_size) + control + diff + extra


def control(*triples: tuple[int, int, int]) -> bytes:
    """Pack a control stream; its numbers have a separate sign bit."""
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


# Malformed records of numbers


def words(**fields: Any) -> Segment:
    """Describe all of `WEIGHTS` as one segment."""
    return Segment(
        **({"kind": KINDS["float32"], "length": 400, "row": 10, "old": 0, "scale": 0, "rows": None, "columns": None} | fields)
    )


def table(*segments: Segment, **changes: Any) -> bytes:
    """Build the table of a record of numbers, perhaps with fields that the encoder would not write."""
    data = bytearray(streams.Reader(pack_table(segments, changes.get("stream_of"))).frame(None, MiB).tobytes())
    for at, value in changes.get("bytes", {}).items():
        data[at] = value
    packed = streams.Reader(pack_table(segments, changes.get("stream_of")))
    packed.frame(None, MiB)
    return streams.frame(bytes(data) + changes.get("more", b"")) + packed.rest()


ALL_ZERO = bytes([streams.ZERO, 0])  # a stream of zeros
STILL = table(words()) + streams.encode(np.zeros(100, np.uint32))  # nothing moved
FIRST = 3  # where the first segment begins in a table without contexts
TWO = np.repeat(np.array([0, 1], np.uint8), 32)


SIDES = np.zeros((10, 1), np.int32), np.zeros((1, 10), np.int32)


def test_crafted_numbers_can_be_right():
    for payload in (
        STILL,
        table(words(rows=np.ones(10, np.int16), columns=np.ones(10, np.int16))) + streams.encode(np.zeros(100, np.uint32)),
        table(words(scale=10), stream_of=TWO) + streams.encode(np.zeros(0, np.uint32)) + streams.encode(np.zeros(100, np.uint32)),
        table(words(step=1e-3)) + ALL_ZERO * 3,
        table(words(product=Product(1, -100, *SIDES))) + streams.encode(np.zeros(100, np.uint32)),
        table(*(words(length=4, old=4 * i, row=1) for i in range(100))) + streams.planes(np.zeros(100, np.uint32), 1),
    ):
        case = Case(WEIGHTS.new, WEIGHTS.new, WEIGHTS.elements)
        assert apply(crafted(case, Record(NUMBERS, payload, NEW)), [case]) == [NEW]


def stream(mode: int, aside: int = 0, *parts: bytes) -> bytes:
    return table(words()) + bytes([mode, aside]) + b"".join(parts)


def symbols(*values: int, count: int = 100) -> bytes:
    return streams.frame(bytes(values) + bytes(count - len(values)))


DEEP = b"".join(bytes([streams.PACK1, 0]) + streams.frame(b"\xff" * 100) for _ in range(9))
COUNT = struct.pack("<I", 1)
WIDE_ROW = table(words(row=2**32 - 1, rows=np.ones(1, np.int16)), stream_of=TWO) + bytes(4)  # one row's scale would take 8 GiB
EMPTY_AND_MORE = (
    struct.pack("<I", len(frame(b"")) + 9) + frame(b"") + b"unchecked"
)  # a reader that stops at the first frame would not see the rest


LARGE, WIDEST = (streams.encode(np.full(20, factor, np.uint32)) for factor in (2 * 2**24 + 2, 2**32 - 1))


def gap(zeros: int) -> bytes:
    return streams.encode(np.array([zeros], np.uint32))


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        pytest.param(b"", "ends too early", id="empty"),
        pytest.param(streams.frame(b""), "another length than it claims", id="empty table"),
        pytest.param(streams.frame(b"\1"), "ends too early", id="table of one byte"),
        pytest.param(streams.frame(bytes(2 * MiB)), "another length than it claims", id="table bomb"),
        pytest.param(lying_frame(bytes(60_000), 400), "ends too early", id="length before the table missing"),
        pytest.param(table(), "claims other numbers", id="no segments"),
        pytest.param(table(words(length=396)), "claims other numbers", id="makes too little"),
        pytest.param(table(words(), words(length=4, row=1)), "claims other numbers", id="makes too much"),
        pytest.param(table(words(length=401)), "in an unknown way", id="half a number"),
        pytest.param(table(words(), bytes={FIRST: 6}), "in an unknown way", id="unknown numbers"),
        pytest.param(table(words(), bytes={FIRST + 1: 64}), "in an unknown way", id="unknown flag"),
        pytest.param(table(words(), bytes={FIRST + 1: 48}), "in an unknown way", id="factors in two ways"),
        pytest.param(table(words(), bytes={FIRST + 1: 4}), "ends too early", id="step missing"),
        pytest.param(table(words(step=0.0)) + ALL_ZERO * 3, "impossible steps", id="steps of nothing"),
        pytest.param(table(words(step=1e-38)) + ALL_ZERO * 3, "impossible steps", id="steps that some processors take for 0"),
        pytest.param(table(words(step=-1.0)) + ALL_ZERO * 3, "impossible steps", id="steps backwards"),
        pytest.param(table(words(step=np.nan)) + ALL_ZERO * 3, "impossible steps", id="steps of no number"),
        pytest.param(table(words(step=np.inf)) + ALL_ZERO * 3, "impossible steps", id="steps without end"),
        pytest.param(table(words(step=1.0, kind=KINDS["int8"])) + ALL_ZERO * 3, "impossible steps", id="steps of integers"),
        pytest.param(table(words(step=1.0)) + ALL_ZERO, "ends too early", id="what steps miss is missing"),
        pytest.param(table(words(product=Product(0, 0))), "an impossible product", id="product of nothing"),
        pytest.param(table(words(product=Product(17, 0))), "an impossible product", id="product too wide"),
        pytest.param(table(words(product=Product(6, 0))), "an impossible product", id="factors longer than their product"),
        pytest.param(table(words(row=100, product=Product(1, 0))), "an impossible product", id="product of one row"),
        pytest.param(table(words(product=Product(1, 101))), "an impossible product", id="product too large"),
        pytest.param(table(words(product=Product(1, -101))), "an impossible product", id="product too small"),
        pytest.param(table(words(kind=KINDS["bytes"], product=Product(1, 0))), "an impossible product", id="product of bytes"),
        pytest.param(table(words(product=Product(1, 0))), "ends too early", id="factors missing"),
        pytest.param(table(words(product=Product(1, 0))) + LARGE + ALL_ZERO, "factor that is too large", id="factor too large"),
        pytest.param(
            table(words(product=Product(1, 0))) + WIDEST + ALL_ZERO, "factor that is too large", id="factor far too large"
        ),
        pytest.param(table(words(scale=4001)), "in an unknown way", id="scale too large"),
        pytest.param(table(words(scale=-32768)), "in an unknown way", id="scale too small"),
        pytest.param(table(words(row=0)), "empty or longer than its numbers", id="empty rows"),
        pytest.param(table(words(row=101)), "empty or longer than its numbers", id="row longer than its numbers"),
        pytest.param(WIDE_ROW, "empty or longer than its numbers", id="scale spread over gigabytes"),
        pytest.param(table(words(), words(length=0, row=1)), "empty or longer than its numbers", id="empty segment"),
        pytest.param(table(words(), *[words(length=0)] * 128), "more segments than it may", id="segments without end"),
        pytest.param(table(words(), bytes={FIRST + 1: 1}), "ends too early", id="rows missing"),
        pytest.param(table(words(row=100), bytes={FIRST + 1: 2}), "ends too early", id="columns missing"),
        pytest.param(table(words(), more=b"x"), "goes on after its end", id="table goes on"),
        pytest.param(table(words(), bytes={2: 0}), "a stream that it does not have", id="no stream"),
        pytest.param(table(words(), stream_of=TWO, bytes={10: 2}), "a stream that it does not have", id="third of two streams"),
        pytest.param(
            table(words(), stream_of=TWO, bytes={2: 65}), "a stream that it does not have", id="more streams than contexts"
        ),
        pytest.param(table(words(old=4)), "bytes that its base does not have", id="past the end"),
        pytest.param(table(words(old=2**64 - 1)), "bytes that its base does not have", id="far past the end"),
        pytest.param(table(words()), "ends too early", id="stream missing"),
        pytest.param(STILL + b"x", "goes on after its end", id="goes on"),
        pytest.param(stream(8), "packed in an unknown way", id="unknown mode"),
        pytest.param(stream(streams.PACK1, 32), "packed in an unknown way", id="too many low bits"),
        pytest.param(stream(streams.PLANES, 5), "packed in an unknown way", id="too many planes"),
        pytest.param(stream(streams.PLANES, 0, symbols()), "another length", id="no planes"),
        pytest.param(stream(streams.ZERO, 1), "packed in an unknown way", id="low bits of nothing"),
        pytest.param(stream(streams.TOKEN, 1, symbols()), "packed in an unknown way", id="low bits of tokens"),
        pytest.param(stream(streams.PACK1, 0, streams.frame(bytes(50_000_000))), "another length", id="symbol bomb"),
        pytest.param(stream(streams.PACK1, 0, struct.pack("<I", 2**32 - 1)), "ends too early", id="frame without end"),
        pytest.param(stream(streams.PACK1, 0, symbols(255)), "ends too early", id="rest missing"),
        pytest.param(table(words()) + DEEP, "packed in an unknown way", id="streams without end"),
        pytest.param(stream(streams.GAPS, 0, struct.pack("<I", 101), ALL_ZERO * 2), "does not have", id="too many gaps"),
        pytest.param(stream(streams.GAPS, 0, struct.pack("<I", 2**32 - 1), ALL_ZERO * 2), "does not have", id="gaps without end"),
        pytest.param(stream(streams.GAPS, 0, COUNT, gap(100), ALL_ZERO), "does not have", id="gap past the end"),
        pytest.param(stream(streams.GAPS, 0, COUNT, gap(2**32 - 1), ALL_ZERO), "does not have", id="gap far past the end"),
        pytest.param(stream(streams.TOKEN, 0, symbols(255)), "too large", id="token beyond 32 bits"),
        pytest.param(stream(streams.TOKEN, 0, symbols(16)), "ends too early", id="token without its bits"),
    ],
)
def test_lying_numbers_refused(payload, sentence):
    refuse(WEIGHTS, Record(NUMBERS, payload, NEW), sentence=sentence)


def deep(count: int, depth: int = 0) -> bytes:
    """Build streams nested as deep as they may be, each with as many numbers and low bits as there can be."""
    if depth == streams.MAX_DEPTH:
        planes = [streams.frame(bytes(-(-count // 8)))] * 29
        return bytes([streams.TOKEN, 0]) + streams.frame(b"\x7f" * count) + b"".join(planes)
    low = b"".join(streams.frame(bytes(-(-count * width // 8))) for width in (8, 8, 8, 4, 2, 1))
    gaps = struct.pack("<I", count) + bytes([streams.PACK1, 31]) + low + streams.frame(bytes(count))
    mode = [streams.GAPS, streams.PACK1][depth % 2]
    return bytes([mode, 31]) + low + (gaps if depth % 2 == 0 else streams.frame(b"\xff" * count)) + deep(count, depth + 1)


def test_deep_streams_bounded_in_memory():
    data = bytes(256 * KiB)
    case = Case(data, data, [stretch(0, len(data), "int4")])
    payload = table(words(kind=KINDS["int4"], length=len(data), row=512 * KiB, scale=50), stream_of=TWO)
    payload += streams.encode(np.zeros(0, np.uint32)) + deep(512 * KiB)
    patch = crafted(case, Record(NUMBERS, payload, b"\1" + data[1:]))
    tracemalloc.start()
    try:
        with pytest.raises(DeltaError, match="does not make what it should"):
            apply(patch, [case])
        assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()


def test_more_numbers_than_a_record_may_hold_refused():
    data = bytes(MiB)
    case = Case(data, data, [stretch(0, MiB, "int4")])
    payload = table(words(kind=KINDS["int4"], length=MiB)) + streams.encode(np.zeros(2 * MiB, np.uint32))
    refuse(case, Record(NUMBERS, payload, data), sentence="claims other numbers")


GOOD = frame(NEW)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        pytest.param(Record(ZSTD, GOOD, NEW, new_length=2**32 - 1), "claims more bytes", id="huge new length"),
        pytest.param(Record(ZSTD, GOOD, NEW, new_length=401), "claims more bytes", id="one byte too much"),
        pytest.param(Record(ZSTD, GOOD, NEW, payload_length=2**32 - 1), "claims more bytes", id="huge payload"),
        pytest.param(Record(ZSTD, GOOD, NEW, payload_length=400 + 64 * KiB), "ends too early", id="payload missing"),
        pytest.param(Record(9, GOOD, NEW), "unknown kind", id="unknown kind"),
        pytest.param(Record(2**32 - 1, GOOD, NEW), "unknown kind", id="largest kind"),
        pytest.param(Record(ZSTD, frame(NEW[::-1]), NEW), "does not make what it should", id="other bytes"),
        pytest.param(Record(ZSTD, frame(NEW[::-1]), NEW[::-1]), "does not make the .* file", id="other bytes, other check"),
        pytest.param(Record(ZSTD, frame(NEW[:200]), NEW[:200]), "ends too early", id="too little"),
        pytest.param(Record(SAME, b"x", NEW), "carries bytes of its own", id="copy with payload"),
        pytest.param(Record(SAME, b"", NEW, offset=1), "bytes that its base does not have", id="copy past the end"),
        pytest.param(Record(SAME, b"", NEW, offset=2**64 - 1), "bytes that its base does not have", id="copy far away"),
    ],
)
@pytest.mark.parametrize("case", [PLAIN, WEIGHTS])
def test_lying_record_refused(case, record, sentence):
    refuse(case, record, sentence=sentence)


def test_record_over_one_chunk_refused():
    data = bytes(MiB + 4)
    case = Case(data, data, [stretch(0, len(data), "float32")])
    refuse(case, Record(ZSTD, frame(data), data), sentence="claims more bytes")


@pytest.mark.parametrize("kind", [SAME, NUMBERS, BSDIFF])
def test_record_without_base_refused(kind):
    payload = {SAME: b"", NUMBERS: STILL, BSDIFF: GOOD}[kind]
    refuse(PLAIN, Record(kind, payload, NEW), base=None, base_size=400, sentence="its base does not have")


def test_bsdiff_on_large_base_refused():
    refuse(WEIGHTS, Record(BSDIFF, b"", NEW), base_size=9 * MiB, sentence="too large for it")


@pytest.mark.parametrize("case", [PLAIN, WEIGHTS])
def test_record_that_makes_nothing_refused(case):
    for kind, payload in ((SAME, b""), (NUMBERS, STILL), (ZSTD, frame(b"")), (BSDIFF, bsdiff(NOTHING, NOTHING, NOTHING, 0))):
        refuse(case, Record(kind, payload, b""), Record(ZSTD, GOOD, NEW), sentence="makes nothing")


def test_bsdiff_again_and_again_refused():
    half = bsdiff(control((0, 200, 0)), NOTHING, bz2.compress(NEW[:200]), 200)
    refuse(PLAIN, Record(BSDIFF, half, NEW[:200]), Record(BSDIFF, half, NEW[:200]), sentence="a part of a file")
    refuse(WEIGHTS, Record(BSDIFF, bsdiff(EXTRA_ONLY, NOTHING, ALL_NEW), NEW), sentence="a part of a file")


def test_more_records_than_a_file_may_have_refused(monkeypatch):
    monkeypatch.setattr(container, "MAX_RECORDS", 2)
    refuse(
        PLAIN,
        *(Record(ZSTD, frame(NEW[i : i + 100]), NEW[i : i + 100]) for i in range(0, 400, 100)),
        sentence="more than 2 records",
    )


@pytest.mark.parametrize(("size", "offset"), [(401, 1), (MAX_WEIGHTS, MAX_WEIGHTS - 400)])
def test_base_shorter_than_claimed_refused(size, offset):
    with pytest.raises(BaseError, match="shorter than it was"):
        apply(crafted(PLAIN, Record(SAME, b"", NEW, offset=offset), base_size=size), [PLAIN])


@pytest.mark.parametrize("size", [-1, MAX_WEIGHTS + 1, 2**80])
def test_impossible_base_size_refused(size):
    refuse(PLAIN, Record(SAME, b"", NEW, offset=2**64 - 400), base_size=size, sentence="header is damaged")


def test_more_records_than_the_file_is_long_refused():
    half = Record(ZSTD, frame(NEW[:200]), NEW[:200])
    rest = Record(ZSTD, frame(NEW[200:]), NEW[200:])
    assert apply(crafted(PLAIN, half, rest), [PLAIN]) == [NEW]
    refuse(PLAIN, half, Record(ZSTD, GOOD, NEW), sentence="claims more bytes")
    refuse(PLAIN, half, rest, rest, sentence="goes on after its last record")
