"""Deltas from the trainer's own factors: they are used where they are right, and cost bytes where they are wrong, never more."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from typer.testing import CliRunner

from flows.cli import app
from ota.delta import files, numbers, plan, streams, updates, vectors
from ota.delta import format as container
from ota.delta.factors import read
from ota.delta.format import UPDATE
from ota.delta.numbers import KINDS, Product, Shared
from ota.errors import BaseError, DeltaError, OperatorError
from tests import golden_kit
from tests.conftest import few
from tests.former import kit
from tests.test_delta import Case, Output, Record, apply, crafted, refuse, round_trip, special_codes, stretch

RNG = np.random.default_rng(0)
ROWS, COLUMNS = 64, 96
FLOATS = ("float32", "float16", "bfloat16")


def drawn(rank: int, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> tuple[Any, Any]:
    """Draw integer factors whose components fall off in size as those of a training do."""
    rng = np.random.default_rng(seed)
    sizes = 40 / (1 + np.arange(rank))
    left, right = rng.normal(size=(rows, rank)) * sizes, rng.normal(size=(rank, columns)) * sizes[:, None]
    return np.rint(left).astype(np.int32), np.rint(right).astype(np.int32)


def factors(place: Path, products: dict[str, Any], steps: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a factors file: products as (left, right, exponent), steps as (steps, size)."""
    tensors: dict[str, Any] = {}
    for name, (left, right, _) in products.items():
        tensors |= {f"{name}.left": left, f"{name}.right": right}
    for name, (count, _) in (steps or {}).items():
        tensors[f"{name}.steps"] = count
    said = {
        "schema_version": 1, "products": {name: row[2] for name, row in products.items()},
        "steps": {name: float(np.float32(row[1])).hex() for name, row in (steps or {}).items()},
    } | changes  # fmt: skip
    place.write_bytes(save(tensors, {"deltaferry": json.dumps(said, sort_keys=True, separators=(",", ":"))}))
    return place


def seeded(place: Path, shared: Any, tensors: dict[str, Any], seed: int = 7, size: float = 0.003, **changes: Any) -> Path:
    """Write a factors file of shared numbers: of each tensor the place of its first number, and how many it has."""
    said = {"seed": seed, "size": float(np.float32(size)).hex(), "tensors": tensors} | changes
    told = {"schema_version": 1, "products": {}, "steps": {}, "seeded": said}
    place.write_bytes(save({"seeded.numbers": np.asarray(shared, np.int32)}, {"deltaferry": json.dumps(told)}))
    return place


def weights(count: int, kind: str = "float32", seed: int = 0) -> Any:
    """Return weights as bit patterns, among them some that no rule moves."""
    codes = np.random.default_rng(seed).normal(scale=0.1, size=count).astype(np.float32)
    found: Any = {"float32": codes.view(np.uint32), "float16": codes.astype(np.float16).view(np.uint16)}.get(
        kind, (codes.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    )
    if not KINDS[kind].mantissa:
        found = (codes * 300).astype(np.int64).clip(-128, 127).astype(np.int8).view(np.uint8) & (15 if kind == "int4" else 255)
    special = special_codes(kind)[:count] if KINDS[kind].mantissa else []
    found[: len(special)] = special
    return found


def moved_pair(folder: Path, rank: int = 6) -> Path:
    """Write an old and a new model whose matrix, bias and untouched tensor moved as `folder/factors` says."""
    old = {
        name: weights(ROWS * COLUMNS, seed=i).view(np.float32).reshape(ROWS, COLUMNS)
        for i, name in enumerate(("a", "b", "still"))
    }
    old["bias"] = weights(500, seed=9).view(np.float32)
    new, said = dict(old), {}
    for seed, name in enumerate(("a", "b")):
        left, right = drawn(rank, seed=seed)
        said[name] = left, right, -20 - seed
        codes = numbers.predicted(old[name].reshape(-1).view(np.uint32), left, right, -20 - seed, KINDS["float32"])
        new[name] = codes.view(np.float32).reshape(ROWS, COLUMNS)
    steps = np.rint(RNG.normal(size=500)).astype(np.int32)
    new["bias"] = numbers.stepped(old["bias"].view(np.uint32), steps, np.float32(0.003), KINDS["float32"]).view(np.float32)
    (folder / "old").write_bytes(save(old))
    (folder / "new").write_bytes(save(new))
    factors(folder / "factors", said, {"bias": (steps, 0.003)})
    return folder


def shared_pair(folder: Path, shared: int = 300, scale: float = 3.0) -> Path:
    """Write an old and a new model of which all but one tensor make steps of shared numbers as `folder/factors` says."""
    old = {
        name: weights(ROWS * COLUMNS, seed=i).view(np.float32).reshape(ROWS, COLUMNS)
        for i, name in enumerate(("a", "b", "still"))
    }
    old["bias"] = weights(500, seed=9).view(np.float32)
    steps = np.rint(np.random.default_rng(4).normal(size=shared) * scale).astype(np.int32)
    new, said, place = dict(old), dict[str, Any](), 0
    for name in ("a", "b", "bias"):
        by = Shared(7, shared, steps).of(place, old[name].size)
        codes = numbers.stepped(old[name].reshape(-1).view(np.uint32), by, np.float32(0.003), KINDS["float32"])
        new[name] = codes.view(np.float32).reshape(old[name].shape)
        said[name] = [place, old[name].size]
        place += old[name].size
    (folder / "old").write_bytes(save(old))
    (folder / "new").write_bytes(save(new))
    seeded(folder / "factors", steps, said)
    return folder


def ways(patch: Path) -> set[tuple[str, str]]:
    """Return the kinds of records of a delta, each with the ways in which its numbers move."""
    with patch.open("rb") as stream:
        file = container.read_header(stream).files[0]
        found = list(container.records(stream, file))
    return {(container.KINDS[record.kind], segment.way) for record in found for segment in record.segments}


# Factors that are right


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bytes"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_factors_come_back(tmp_path_factory, kind, data):
    """Make the same bytes on both sides for all kinds, ranks and sizes, wherever pieces are cut."""
    folder = tmp_path_factory.mktemp("factors")
    rank, rows, columns = data.draw(st.integers(1, 32)), data.draw(st.integers(1, 9)), 2 * data.draw(st.integers(1, 9))
    most = data.draw(st.sampled_from((1, 3, 1000, numbers.MAX_FACTOR)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    left, right = (rng.integers(-most, most, shape, np.int32, endpoint=True) for shape in ((rows, rank), (rank, columns)))
    exponent, seed = data.draw(st.integers(-100, 100)), data.draw(st.integers(0, 99))
    old = weights(rows * columns, kind, seed)
    if data.draw(st.booleans()):
        old = old[::-1].copy()  # infinities, NaNs and denormals in other rows
    new = numbers.data(numbers.predicted(old, left, right, exponent, KINDS[kind]), KINDS[kind])
    before = numbers.data(old, KINDS[kind])
    claim = read(factors(folder / "f", {"t": (left, right, exponent)}))["t"]
    assert claim.fits(kind, (rows, columns), len(new))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SLACK", 10**6)  # some are longer than what they make
        patch.setattr(updates, "PIECE", data.draw(st.sampled_from((8, 20, 2**20))))
        patch.setattr(updates, "PIECE_NUMBERS", data.draw(st.sampled_from((7, 2**19))))
        element = stretch(0, len(new), kind, columns)
        stream = io.BytesIO(round_trip([Case(new, before, [replace(element, claim=claim)])], folder))
        (record,) = container.records(stream, container.read_header(stream).files[0])
        assert new == before or (record.kind, [s.way for s in record.segments]) == (UPDATE, ["product"])


def test_factors_are_all_that_an_update_costs(tmp_path):
    """Check that a delta takes what the factors tell and little more, where guessing takes many times that."""
    moved_pair(tmp_path)
    guessed = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "guessed").size
    made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors").size
    tensors = [vector for claim in read(tmp_path / "factors").values() for vector in (
        [claim.steps()] if claim.step is not None else [*claim.product().left.T, *claim.product().right]  # type: ignore[union-attr]
    )]  # fmt: skip
    entropy = 0.0
    for vector in tensors:
        share = np.unique(vector, return_counts=True)[1] / len(vector)
        entropy -= len(vector) * float((share * np.log2(share)).sum()) / 8
    assert made < 1.1 * entropy + 700
    assert made < 0.5 * guessed
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    assert ways(tmp_path / "p") == {("update", "same"), ("update", "product"), ("update", "steps")}


def test_forecast_with_factors_is_exact(tmp_path):
    moved_pair(tmp_path)
    made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors").size
    assert files.estimate(tmp_path / "old", tmp_path / "new", factors=tmp_path / "factors") == made


def test_same_factors_same_bytes(tmp_path):
    """Make the same delta whatever the order of the components."""
    moved_pair(tmp_path)
    said = {name: claim for name, claim in read(tmp_path / "factors").items() if claim.step is None}
    first = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors").size
    turned = {name: (claim.product().left[:, ::-1], claim.product().right[::-1], claim.exponent) for name, claim in said.items()}  # type: ignore[union-attr, index]
    turned = {name: (np.ascontiguousarray(left), np.ascontiguousarray(right), e) for name, (left, right, e) in turned.items()}
    bias = read(tmp_path / "factors")["bias"]
    factors(tmp_path / "turned", turned, {"bias": (bias.steps(), bias.step)})
    assert abs(files.build(tmp_path / "old", tmp_path / "new", tmp_path / "q", factors=tmp_path / "turned").size - first) < 30


def test_common_powers_of_two_cost_nothing(tmp_path):
    """Set aside the power of two by which a trainer gives components steps of their own."""
    sizes = []
    for shift in (0, 9):
        left, right = drawn(4)
        old = weights(ROWS * COLUMNS)
        left[:, 2] <<= shift
        new = numbers.predicted(old, left, right, -30, KINDS["float32"]).tobytes()
        claim = read(factors(tmp_path / "f", {"t": (left, right, -30)}))["t"]
        case = Case(new, old.tobytes(), [replace(stretch(0, len(new), "float32", COLUMNS), claim=claim)])
        sizes.append(len(round_trip([case], tmp_path)))
    assert sizes[1] < sizes[0] + 30


@pytest.mark.parametrize(("size", "way"), [(1e-38, "each"), (2e-38, "steps")])
def test_steps_that_some_processors_take_for_0_are_not_used(tmp_path, size, way):
    old, steps = np.arange(1 << 23, (1 << 23) + 500, dtype=np.uint32), np.arange(500, dtype=np.int32) % 3
    new = numbers.stepped(old, steps, np.float32(size), KINDS["float32"])
    for name, codes in (("old", old), ("new", new)):
        (tmp_path / name).write_bytes(save({"bias": codes.view(np.float32)}))
    said = factors(tmp_path / "factors", {}, {"bias": (steps, size)})
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=said)
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    assert (("update", "steps") in ways(tmp_path / "p")) == (way == "steps")


def test_components_of_zeros_cost_nothing(tmp_path):
    old, (left, right), made = weights(ROWS * COLUMNS), drawn(4), []
    new = numbers.predicted(old, left, right, -20, KINDS["float32"]).tobytes()
    for more in (0, 5):
        sides = np.pad(left, ((0, 0), (0, more))), np.pad(right, ((0, more), (0, 0)), constant_values=7)
        claim = read(factors(tmp_path / "f", {"t": (*sides, -20)}))["t"]
        case = Case(new, old.tobytes(), [replace(stretch(0, len(new), "float32", COLUMNS), claim=claim)])
        made.append(round_trip([case], tmp_path))
    assert made[0] == made[1]


def test_applied_piece_by_piece_and_gone_on_with(tmp_path, monkeypatch):
    """Keep the pieces that a killed process has written, after checking them."""
    monkeypatch.setattr(updates, "PIECE", 4096)
    moved_pair(tmp_path)
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors")
    new, made = (tmp_path / "new").read_bytes(), []
    monkeypatch.setattr(updates.Piece, "make", lambda piece, known, make=updates.Piece.make: made.append(1) or make(piece, known))
    for there, decoded in ((b"", 19), (new[:9000], 17), (new[:9000][::-1], 19), (new, 0)):
        made.clear()
        output = io.BytesIO(there)
        with (tmp_path / "p").open("rb") as stream, (tmp_path / "old").open("rb") as base:
            header = container.read_header(stream)
            container.apply_plain(stream, header, base, output, kept=True)
        assert output.getvalue() == new
        assert len(made) == decoded


# Shared numbers


@pytest.mark.parametrize("seed", [0, 1, 0xD1CE_0000_FFFF_0001, 2**64 - 1])
@pytest.mark.parametrize("count", [1, 3, 4096, updates.MAX_SHARED])
def test_hash_is_the_one_that_the_format_describes(seed, count):
    """Compare with Python's own integers, also where places are hashed apart and where they are highest."""
    for first in (0, numbers._HASHED - 3, updates.MAX_PLACE - 5):
        wanted = [golden_kit.hashed(seed, first + i) for i in range(5)]
        chosen, negative = numbers.spread(seed, count, first, 5)
        assert chosen.tolist() == [(h >> 32) * count >> 32 for h in wanted]
        assert negative.tolist() == [bool(h & 1) for h in wanted]
    steps = np.arange(1, count + 1, dtype=np.int32)
    chosen, negative = numbers.spread(seed, count, 9, numbers._HASHED + 50)
    assert (
        Shared(seed, count, steps).of(9, numbers._HASHED + 50).tolist()
        == np.where(negative, -steps[chosen], steps[chosen]).tolist()
    )


def test_hash_is_split_mix_64():
    """Compare with the first numbers that the published generator makes from the seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [golden_kit.hashed(1234567, place) for place in range(5)] == known


@pytest.mark.parametrize("kind", FLOATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shared_numbers_come_back(tmp_path_factory, kind, data):
    """Make the same bytes on both sides for all seeds, places, counts and sizes, wherever pieces are cut."""
    folder = tmp_path_factory.mktemp("shared")
    count, shared = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 50))
    most = data.draw(st.sampled_from((1, 3, 1000, numbers.MAX_FACTOR)))
    steps = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(-most, most, shared, np.int32, endpoint=True)
    seed, place = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, updates.MAX_PLACE - count))
    size = data.draw(st.sampled_from((numbers.LEAST_STEP, np.float32(1e-9), np.float32(0.003), np.float32(1e30))))
    old = weights(count, kind, data.draw(st.integers(0, 99)))
    new = numbers.stepped(old, Shared(seed, shared, steps).of(place, count), size, KINDS[kind])
    claim = read(seeded(folder / "f", steps, {"t": [place, count]}, seed, float(size)))["t"]
    assert claim.fits(kind, (count,), new.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SLACK", 10**6)  # some are longer than what they make
        patch.setattr(numbers, "_HASHED", data.draw(st.sampled_from((3, 2**16))))
        patch.setattr(updates, "PIECE", data.draw(st.sampled_from((8, 20, 2**20))))
        patch.setattr(updates, "PIECE_NUMBERS", data.draw(st.sampled_from((7, 2**19))))
        element = replace(stretch(0, new.nbytes, kind), claim=claim)
        stream = io.BytesIO(round_trip([Case(new.tobytes(), old.tobytes(), [element])], folder))
        (record,) = container.records(stream, container.read_header(stream).files[0])
        same = new.tobytes() == old.tobytes()
        assert same or (record.kind, [s.way for s in record.segments]) == (UPDATE, ["shared numbers"])


@pytest.mark.parametrize("limit", [None, "MAX_STRETCHES", "MAX_BYTES"])
def test_shared_numbers_are_all_that_an_update_costs(tmp_path, monkeypatch, limit):
    """Send the shared numbers, and little more, where steps of each number take many times that; a second record sends them again."""
    shared_pair(tmp_path)
    steps = read(tmp_path / "factors")["a"].shared_numbers().steps
    share = np.unique(steps, return_counts=True)[1] / len(steps)
    entropy = -len(steps) * float((share * np.log2(share)).sum()) / 8
    plain = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "plain").size
    if limit:
        monkeypatch.setattr(updates, limit, 2 if limit == "MAX_STRETCHES" else 4 * ROWS * COLUMNS + 500)
    made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors").size
    assert files.estimate(tmp_path / "old", tmp_path / "new", factors=tmp_path / "factors") == made
    assert made < (3 if limit else 1) * (entropy + 200) + 250
    assert made < (0.2 if limit else 0.1) * plain
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    assert ways(tmp_path / "p") == {("update", "same"), ("update", "shared numbers")}
    parts = files.inspect(tmp_path / "p", tmp_path / "new", None, tmp_path / "old")[1]
    assert {kind for part in parts for kind in part.holds} >= {"float32 by shared numbers"}
    assert sum(part.size for part in parts) == pytest.approx(made, abs=200)


def test_shared_numbers_for_a_reader_of_version_1(tmp_path):
    """Write for older agents the steps of each number."""
    shared_pair(tmp_path)
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors", version=1)
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    assert ("numbers", "steps") in ways(tmp_path / "p")


def test_more_shared_numbers_than_what_they_move_are_not_used(tmp_path):
    """Check that the codec guesses where a few weights share numbers that are many more."""
    old, steps = weights(500), np.random.default_rng(0).integers(-1000, 1000, 30_000, np.int32)
    new = numbers.stepped(old, Shared(7, 30_000, steps).of(0, 500), np.float32(1e-5), KINDS["float32"])
    claim = read(seeded(tmp_path / "f", steps, {"t": [0, 500]}, size=1e-5))["t"]
    element = stretch(0, 2000, "float32")
    guessed = len(round_trip([Case(new.tobytes(), old.tobytes(), [element])], tmp_path))
    assert len(round_trip([Case(new.tobytes(), old.tobytes(), [replace(element, claim=claim)])], tmp_path)) <= guessed


@pytest.mark.parametrize(
    "name", ["seed", "size", "a place", "a shared number", "names exchanged", "names of another model", "another length", "nothing", "zeros"]
)  # fmt: skip
def test_wrong_shared_numbers_cost_bytes_and_nothing_else(tmp_path, name):
    shared_pair(tmp_path)
    steps = read(tmp_path / "factors")["a"].shared_numbers().steps.copy()
    one, changes = ROWS * COLUMNS, dict[str, Any]()
    tensors = {"a": [0, one], "b": [one, one], "bias": [2 * one, 500]}
    if name in ("seed", "size"):
        changes = {"seed": 8} if name == "seed" else {"size": 0.01}
    elif name == "a place":
        tensors["b"][0] += 1
    elif name == "a shared number":
        steps[5] += 1
    elif name == "names exchanged":
        tensors["a"], tensors["b"] = tensors["b"], tensors["a"]
    elif name == "names of another model":
        tensors = {f"other.{tensor}": row for tensor, row in tensors.items()}
    elif name == "another length":
        tensors["a"] = [0, one - 1]
    elif name == "nothing":
        tensors = {}
    else:
        steps[:] = 0
    seeded(tmp_path / "wrong", steps, tensors, **changes)
    guessed = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "guessed").size
    for version in container.VERSIONS:
        made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "wrong", version=version).size
        files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
        assert made < 1.05 * guessed + 500


def test_shared_numbers_of_integers_do_not_fit(tmp_path):
    claim = read(seeded(tmp_path / "f", [1, 2], {"t": [0, 100]}))["t"]
    assert claim.fits("float32", (10, 10), 400)
    assert not claim.fits("int8", (10, 10), 100)
    assert not claim.fits("int4", (10, 10), 50)


def test_shared_numbers_that_overflow(tmp_path):
    """Refuse, by name, shared numbers that float32 might round; both the factory and the device check."""
    shared_pair(tmp_path)
    steps = np.full(300, -(2**24) - 1, np.int32)
    seeded(tmp_path / "factors", steps, {"a": [0, ROWS * COLUMNS]})
    with pytest.raises(
        OperatorError, match=r"the factors of a in .*factors overflow: one is beyond 16777216, .*; make them smaller, or"
    ):
        files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors")
    assert not (tmp_path / "p").exists()
    old = weights(100).tobytes()
    data = updates.pack([sharing(shared=Shared(7, 300, steps))], [b""])
    refuse(Case(old, old), Record(UPDATE, data, old), sentence="a factor that is too large; fetch it again")


# Factors that are wrong


def wrong(name: str, place: Path) -> Path:
    """Write a factors file that does not belong to the pair."""
    said = read(place / "factors")
    products = {n: (c.product().left.copy(), c.product().right.copy(), c.exponent) for n, c in said.items() if c.step is None}  # type: ignore[union-attr]
    steps = {"bias": (said["bias"].steps().copy(), said["bias"].step)}
    if name == "one factor":
        products["a"][0][5, 0] += 1
    elif name == "another exponent":
        products["a"] = (*products["a"][:2], -7)
    elif name == "names exchanged":
        products["a"], products["b"] = products["b"], products["a"]
    elif name == "steps of another size":
        steps["bias"] = steps["bias"][0], 0.01
    elif name == "names of another model":
        products = {f"other.{n}": row for n, row in products.items()}
    elif name == "steps of another length":
        steps["bias"] = steps["bias"][0][:-1], steps["bias"][1]
    elif name == "another shape":
        products["a"] = products["a"][0][:-1], products["a"][1], -20
    elif name == "too large by far":
        products["a"] = np.full((ROWS, 1), 2**20, np.int32), np.full((1, COLUMNS), 2**20, np.int32), 100
    elif name == "nothing":
        products, steps = {}, {}
    elif name == "zeros":
        products["a"] = np.zeros((ROWS, 3), np.int32), np.zeros((3, COLUMNS), np.int32), 0
    elif name == "rank 0":
        products["a"] = np.zeros((ROWS, 0), np.int32), np.zeros((0, COLUMNS), np.int32), 0
    return factors(place / "wrong", products, steps)


@pytest.mark.parametrize(
    "name",
    ["one factor", "another exponent", "names exchanged", "steps of another size", "steps of another length", "names of another model", "another shape", "too large by far",
     "nothing", "zeros", "rank 0"],
)  # fmt: skip
def test_wrong_factors_cost_bytes_and_nothing_else(tmp_path, name):
    moved_pair(tmp_path)
    guessed = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "guessed").size
    for version in container.VERSIONS:
        made = files.build(
            tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=wrong(name, tmp_path), version=version
        ).size
        files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
        assert made < 1.05 * guessed + 500


def test_factors_that_are_right_but_longer_than_what_they_make(tmp_path):
    """Check that the codec guesses where a file tells in many bytes what takes few: steps far finer than the numbers can show."""
    old = weights(30_000, "float16")
    steps = np.random.default_rng(0).integers(-(2**23), 2**23, 30_000, np.int32)
    new = numbers.stepped(old, steps, np.float32(2.0**-38), KINDS["float16"])
    claim = read(factors(tmp_path / "f", {}, {"t": (steps, 2.0**-38)}))["t"]
    element = stretch(0, 60_000, "float16")
    guessed = len(round_trip([Case(new.tobytes(), old.tobytes(), [element])], tmp_path))
    made = round_trip([Case(new.tobytes(), old.tobytes(), [replace(element, claim=claim)])], tmp_path)
    assert (new != old).sum() > 1000
    assert len(made) < 1.05 * guessed < 30_000


def test_what_factors_miss_is_sent_too(tmp_path):
    """Send what a nearly right product misses, instead of guessing anew."""
    moved_pair(tmp_path)
    exact = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors").size
    guessed = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "q").size
    new = bytearray((tmp_path / "new").read_bytes())
    new[-40] ^= 1  # in the tensor `still` or `b`, which lie last
    for at in range(len(new) - 4 * ROWS * COLUMNS * 3 + 2, len(new), 997):
        new[at // 4 * 4] ^= 1
    (tmp_path / "new").write_bytes(new)
    made = files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors").size
    assert made < exact + 1500
    assert made < 0.7 * guessed
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == new


def test_stale_factors_cost_bytes_and_nothing_else(tmp_path):
    """Refuse to believe factors of an earlier base: the same training, but the device has another old file."""
    moved_pair(tmp_path)
    old = bytearray((tmp_path / "old").read_bytes())
    with np.errstate(all="ignore"):
        values = np.frombuffer(old[-4 * ROWS * COLUMNS * 3 :], np.float32) * np.float32(1.001)
    old[-len(values) * 4 :] = values.tobytes()
    (tmp_path / "old").write_bytes(old)
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors")
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()


@pytest.mark.parametrize("which", ["left", "right", "steps"])
def test_factors_that_overflow(tmp_path, which):
    """Refuse, by name, factors that machines might add differently; both the factory and the device check."""
    moved_pair(tmp_path)
    most = {name: 2**24 + (name == which) for name in ("left", "right", "steps")}
    left, right = np.full((ROWS, 32), -most["left"], np.int32), np.full((32, COLUMNS), most["right"], np.int32)
    steps = np.full(500, -most["steps"], np.int32)
    factors(tmp_path / "factors", {"a": (left, right, -60)}, {"bias": (steps, 1e-9)})
    sentence = rf"the factors of {'bias' if which == 'steps' else 'a'} in .*factors overflow: one is beyond 16777216, .*; make them smaller, or"
    with pytest.raises(OperatorError, match=sentence):
        files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors")
    assert not (tmp_path / "p").exists()
    segment = updates.Stretch(KINDS["float32"], 4 * ROWS * COLUMNS, 0, COLUMNS, Product(32, -60, left, right))
    if which == "steps":
        segment = updates.Stretch(KINDS["float32"], 2000, 0, step=np.float32(1e-9), steps=steps)
    old = weights(ROWS * COLUMNS).tobytes()[: segment.length]
    refuse(
        Case(old, old), Record(UPDATE, updates.pack([segment], [b""]), old), sentence="a factor that is too large; fetch it again"
    )


def test_largest_factors_are_added_exactly():
    """Check the largest sum that the limits allow against Python's own integers: none is rounded in whatever order."""
    most, rng = numbers.MAX_FACTOR, np.random.default_rng(0)
    left, right = most - rng.integers(0, 2, (50, 32)), most - rng.integers(0, 2, (32, 70))
    found = numbers.multiplied(left.astype(np.float64), right.astype(np.float64))
    assert found.astype(np.int64).tolist() == (left.astype(object) @ right.astype(object)).tolist()
    assert int((np.full((1, 32), most, object) @ np.full((32, 1), most, object))[0, 0]) == 2**53


# Files that are no factors


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack_from("<Q", data)[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes = b"") -> bytes:
    made = json.dumps(header).encode()
    return struct.pack("<Q", len(made)) + made + rest


def said(**changes: Any) -> dict[str, str]:
    told = {"schema_version": 1, "products": {}, "steps": {}} | changes
    return {"deltaferry": json.dumps(told)}


SIDES = {
    "t.left": {"dtype": "I32", "shape": [2, 1], "data_offsets": [0, 8]},
    "t.right": {"dtype": "I32", "shape": [1, 2], "data_offsets": [8, 16]},
}


WIDE = {
    f"t.{side}": {"dtype": "I32", "shape": shape, "data_offsets": [at, at + 264]}
    for side, shape, at in (("left", [2, 33], 0), ("right", [33, 2], 264))
}


def said_of_shared(count: Any = 2, header: Any = None, **changes: Any) -> bytes:
    """Write a factors file with one tensor that shares two numbers, perhaps with lies."""
    told = {"seed": 1, "size": "0x1p0", "tensors": {"t": [0, 100]}} | changes
    row = {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]} if header is None else header
    held = {"seeded.numbers": row} if row else {}
    return with_header({"__metadata__": said(seeded=told)} | held, bytes(4 * count))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(b"", "it is no safetensors file", id="empty"),
        pytest.param(b"\xff" * 100, "it is no safetensors file", id="header without end"),
        pytest.param(struct.pack("<Q", 4) + b"{}{}", "its header is damaged", id="no JSON"),
        pytest.param(struct.pack("<Q", 90_000) + b"[" * 90_000, "its header is damaged", id="nested without end"),
        pytest.param(with_header([]), "its header is damaged", id="list"),
        pytest.param(save({"w": np.zeros(3, np.float32)}), "its metadata has no entry `deltaferry`", id="weights"),
        pytest.param(with_header({"__metadata__": {"deltaferry": "{}"}}), "its header is damaged", id="nothing said"),
        pytest.param(with_header({"__metadata__": said(schema_version=2)}), "it has form 2, but this program reads 1", id="newer form"),
        pytest.param(with_header({"__metadata__": said(products={"t": 0})}), "it has no tensor t.left", id="factors missing"),
        pytest.param(with_header({"__metadata__": said(products={"\x1b[2J": 0})}), r"it has no tensor \\x1b\[2J.left", id="name that clears the screen"),
        pytest.param(with_header({"__metadata__": said(products={"t": 0}, steps={"t": "0x1p0"})}), "it moves a tensor twice", id="twice"),
        pytest.param(with_header({"__metadata__": said(products={"t": 0})} | SIDES, bytes(15)), "t.right goes past the end of the file", id="cut off"),
        pytest.param(with_header({"__metadata__": said(products={"t": 101})} | SIDES, bytes(16)), "the product of t is impossible", id="exponent"),
        pytest.param(with_header({"__metadata__": said(products={"t": 0})} | WIDE, bytes(528)), "the product of t is impossible", id="rank 33"),
        pytest.param(with_header({"__metadata__": said(products={"t": 0.5})} | SIDES, bytes(16)), "the product of t is impossible", id="half an exponent"),
        pytest.param(
            with_header({"__metadata__": said(products={"t": 0})} | SIDES | {"t.right": SIDES["t.right"] | {"shape": [2, 1]}}, bytes(16)),
            "the product of t is impossible", id="sides that do not meet",
        ),
        pytest.param(
            with_header({"__metadata__": said(products={"t": 0})} | SIDES | {"t.left": SIDES["t.left"] | {"dtype": "F32"}}, bytes(16)),
            "t.left is not of int32", id="floats",
        ),
        pytest.param(
            with_header({"__metadata__": said(products={"t": 0})} | SIDES | {"t.left": SIDES["t.left"] | {"shape": [2**40, 2**40]}}, bytes(16)),
            "has another length than its shape", id="lying shape",
        ),
        pytest.param(
            with_header({"__metadata__": said(products={"t": 0})} | SIDES | {"t.left": SIDES["t.left"] | {"data_offsets": [-8, 0]}}, bytes(16)),
            "t.left is not of int32", id="before the file",
        ),
        *(
            pytest.param(
                with_header({"__metadata__": said(steps={"t": text}), "t.steps": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
                sentence, id=f"steps of {text}",
            )
            for text, sentence in (
                ("0x0p0", "the steps of t are impossible"), ("-0x1p0", "the steps of t are impossible"), ("nan", "the steps of t are impossible"),
                ("0x1p5000", "its header is damaged"), ("wide", "is not a file of factors"),
            )
        ),
        pytest.param(said_of_shared(header={}), "it has no tensor seeded.numbers", id="shared numbers missing"),
        pytest.param(said_of_shared(0), "its shared numbers are impossible", id="no shared number"),
        pytest.param(said_of_shared(updates.MAX_SHARED + 1), "its shared numbers are impossible", id="shared numbers without end"),
        pytest.param(said_of_shared(header={"dtype": "I32", "shape": [2**40], "data_offsets": [0, 2**42]}), "goes past the end of the file", id="shared numbers past the end"),
        pytest.param(said_of_shared(header={"dtype": "I32", "shape": [2, 1], "data_offsets": [0, 8]}), "is not a file of factors", id="shared numbers in a matrix"),
        *(pytest.param(said_of_shared(seed=seed), "its shared numbers are impossible", id=f"seed {seed}") for seed in (-1, 2**64, 0.5, "1", None, True)),
        *(pytest.param(said_of_shared(size=size), "its shared numbers are impossible", id=f"size {size}") for size in ("0x0p0", "-0x1p0", "inf", "nan")),
        pytest.param(said_of_shared(size=1), "its header is damaged", id="size that is a number"),
        *(
            pytest.param(said_of_shared(tensors={"t": place}), "the place of t is impossible", id=f"place {place}")
            for place in ([-1, 100], [0, -1], [updates.MAX_PLACE, 1], [0.0, 100], [0, "1"], [0, True], [2**70, 1])
        ),
        pytest.param(said_of_shared(tensors={"t": [0]}), "is not a file of factors", id="place without numbers"),
        pytest.param(said_of_shared(tensors=[["t", 0]]), "header is damaged", id="list of tensors"),
        pytest.param(with_header({"__metadata__": said(seeded=7)}), "its header is damaged", id="shared numbers that are a number"),
        pytest.param(
            with_header({"__metadata__": said(steps={"t": "0x1p0"}, seeded={"seed": 1, "size": "0x1p0", "tensors": {"t": [0, 1]}})}),
            "it moves a tensor twice", id="steps and shared numbers",
        ),
    ],
)  # fmt: skip
def test_file_that_is_no_factors_is_refused(tmp_path, data, sentence):
    moved_pair(tmp_path)
    (tmp_path / "factors").write_bytes(data)
    with pytest.raises(OperatorError, match=sentence) as error:
        files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors")
    assert str(error.value).endswith("; write it again, or build without it")
    assert not (tmp_path / "p").exists()


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_damaged_factors_are_refused_or_harmless(tmp_path_factory, noise, at):
    folder = moved_pair(tmp_path_factory.mktemp("damaged"), rank=2)
    data = bytearray((folder / "factors").read_bytes())
    data[at : at + len(noise)] = noise
    (folder / "factors").write_bytes(data)
    try:
        files.build(folder / "old", folder / "new", folder / "p", factors=folder / "factors")
    except OperatorError:
        return
    files.apply(folder / "old", folder / "p", folder / "again")
    assert (folder / "again").read_bytes() == (folder / "new").read_bytes()


def test_many_claims_take_no_memory_before_they_are_used(tmp_path):
    """Skip a product with more factors than a record may hold, before it is read."""
    left = {"dtype": "I32", "shape": [1 << 20, 1], "data_offsets": [0, 4 << 20]}
    right = {"dtype": "I32", "shape": [1, 1], "data_offsets": [4 << 20, (4 << 20) + 4]}
    (tmp_path / "f").write_bytes(
        with_header({"__metadata__": said(products={"t": 0}), "t.left": left, "t.right": right}, bytes((4 << 20) + 4))
    )
    for name, value in (("old", 0), ("new", 1)):
        (tmp_path / name).write_bytes(save({"t": np.full((1 << 20, 1), value, np.int8)}))
    claim = read(tmp_path / "f")["t"]
    assert claim.values > updates.MAX_VALUES
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "f")
    files.apply(tmp_path / "old", tmp_path / "p", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()


# Records that lie

OLD = weights(100, seed=3).tobytes()
LEFT, RIGHT = drawn(2, 10, 10)
NEW = numbers.predicted(np.frombuffer(OLD, np.uint32), LEFT, RIGHT, -20, KINDS["float32"]).tobytes()
PAIR = Case(NEW, OLD)
WHOLE = updates.Stretch(KINDS["float32"], 400, 0, 10, Product(2, -20, LEFT, RIGHT))


def payload(*stretches: updates.Stretch, **changes: Any) -> bytes:
    """Build the payload of an update, perhaps with a table that the encoder would not write."""
    packed = updates.pack(stretches or [WHOLE], [b""])
    reader = streams.Reader(packed)
    table = bytearray(reader.frame(None, 1 << 20).tobytes())
    for at, value in changes.get("bytes", {}).items():
        table[at] = value
    return streams.frame(bytes(table) + changes.get("more", b"")) + reader.rest()


def changed(**fields: Any) -> updates.Stretch:
    return updates.Stretch(**({"kind": KINDS["float32"], "length": 400, "old": 0, "row": 10, "product": WHOLE.product} | fields))


def test_crafted_update_can_be_right():
    assert apply(crafted(PAIR, Record(UPDATE, payload(), NEW)), [PAIR]) == [NEW]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(b"", "ends too early", id="empty"),
        pytest.param(streams.frame(b"\0\0"), "more segments than it may", id="no stretch"),
        pytest.param(streams.frame(b"\1\0"), "ends too early", id="table of one byte"),
        pytest.param(streams.frame(b"\xff\xff" + bytes(200_000)), "more segments than it may", id="stretches without end"),
        pytest.param(streams.frame(bytes(300_000)), "another length than it claims", id="table bomb"),
        pytest.param(payload(bytes={2: 0x41}), "in an unknown way", id="unknown way"),
        pytest.param(payload(bytes={2: 0x16}), "in an unknown way", id="unknown numbers"),
        pytest.param(payload(bytes={3: 0x68}), "claims other numbers", id="makes too little"),
        pytest.param(payload(bytes={3: 0xB8}), "claims other numbers", id="makes too much"),
        pytest.param(payload(bytes={3: 0x91}), "in an unknown way", id="half a number"),
        pytest.param(payload(bytes={14: 0xFF}), "in an unknown way", id="before the base"),
        pytest.param(payload(bytes={8: 1}), "bytes that its base does not have", id="past the base"),
        pytest.param(payload(more=b"x"), "goes on after its end", id="table goes on"),
        pytest.param(payload() + b"x", "goes on after its end", id="goes on"),
        pytest.param(payload()[:-1], "ends too early", id="cut off"),
        pytest.param(payload(bytes={15: 7}), "an impossible product", id="rows that are not whole"),
        pytest.param(payload(bytes={15: 0}), "an impossible product", id="empty rows"),
        pytest.param(payload(bytes={18: 0xFF}), "an impossible product", id="row of gigabytes"),
        pytest.param(payload(bytes={19: 0}), "an impossible product", id="product of nothing"),
        pytest.param(payload(bytes={19: 33}), "an impossible product", id="product too wide"),
        pytest.param(payload(bytes={20: 101}), "an impossible product", id="product too large"),
        pytest.param(payload(changed(kind=KINDS["bytes"], length=400, row=10)), "an impossible product", id="product of bytes"),
        pytest.param(payload(changed(product=None, step=np.float32(-1), steps=np.ones(100, np.int32))), "impossible steps", id="steps backwards"),
        pytest.param(payload(changed(product=None, step=np.float32(1e-38), steps=np.ones(100, np.int32))), "impossible steps", id="steps that some processors take for 0"),
        pytest.param(payload(changed(product=None, step=np.float32("inf"), steps=np.ones(100, np.int32))), "impossible steps", id="steps without end"),
        pytest.param(payload(changed(kind=KINDS["int8"], product=None, step=np.float32(1), steps=np.ones(400, np.int32))), "impossible steps", id="steps of integers"),
    ],
)  # fmt: skip
def test_lying_update_refused(data, sentence):
    refuse(PAIR, Record(UPDATE, data, NEW), sentence=sentence)


SHARING = Shared(7, 40, np.arange(-20, 20, dtype=np.int32))
SHARED_NEW = numbers.stepped(np.frombuffer(OLD, np.uint32), SHARING.of(5, 100), np.float32(0.003), KINDS["float32"]).tobytes()
SHARED_PAIR = Case(SHARED_NEW, OLD)


def sharing(**fields: Any) -> updates.Stretch:
    given_ = {
        "kind": KINDS["float32"],
        "length": 400,
        "old": 0,
        "step": np.float32(0.003),
        "shared": SHARING,
        "first": 5,
    } | fields
    return updates.Stretch(**given_)


def test_crafted_update_of_shared_numbers_can_be_right():
    assert apply(crafted(SHARED_PAIR, Record(UPDATE, payload(sharing()), SHARED_NEW)), [SHARED_PAIR]) == [SHARED_NEW]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(payload(sharing(kind=KINDS["int8"])), "impossible shared numbers", id="of integers"),
        pytest.param(payload(sharing(kind=KINDS["bytes"])), "impossible shared numbers", id="of bytes"),
        pytest.param(payload(sharing(first=-1)), "impossible shared numbers", id="place before the first"),
        pytest.param(payload(sharing(first=updates.MAX_PLACE - 99)), "impossible shared numbers", id="place past the last"),
        pytest.param(payload(sharing(first=2**63 - 1)), "impossible shared numbers", id="place that wraps round"),
        pytest.param(payload(sharing(shared=replace(SHARING, count=0))), "impossible shared numbers", id="none"),
        pytest.param(payload(sharing(shared=replace(SHARING, count=updates.MAX_SHARED + 1))), "impossible shared numbers", id="too many"),
        pytest.param(payload(sharing(shared=replace(SHARING, count=2**32 - 1))), "impossible shared numbers", id="without end"),
        pytest.param(payload(sharing(shared=replace(SHARING, count=41))), "another length than it claims", id="more than there are"),
        pytest.param(payload(sharing(shared=replace(SHARING, count=39))), "goes on after its end|damaged|another length", id="fewer than there are"),
        *(
            pytest.param(payload(sharing(step=np.float32(size))), "impossible shared numbers", id=f"steps of {size}")
            for size in ("-1", "0", "1e-38", "inf", "nan")
        ),
        pytest.param(streams.frame(streams.Reader(payload(sharing())).frame(None, 1 << 20).tobytes()[:-1]), "ends too early", id="cut off"),
    ],
)  # fmt: skip
def test_lying_update_of_shared_numbers_refused(data, sentence):
    refuse(SHARED_PAIR, Record(UPDATE, data, SHARED_NEW), sentence=sentence)


def test_shared_numbers_count_as_factors(monkeypatch):
    """Refuse more numbers than a record may hold before memory is allocated for them."""
    monkeypatch.setattr(updates, "MAX_VALUES", 39)
    refuse(SHARED_PAIR, Record(UPDATE, payload(sharing()), SHARED_NEW), sentence="more than it may")


def test_update_of_nothing_refused():
    """Refuse an update in which nothing moves; its stretches would cost time and no bytes."""
    table = struct.pack("<HB", 1, 0) + struct.pack("<I", 400) + bytes(8)
    refuse(Case(OLD, OLD), Record(UPDATE, streams.frame(table), OLD), sentence="holds no factors")


def test_update_with_more_factors_than_it_may_hold_refused(monkeypatch):
    """Refuse it before memory is allocated for the factors."""
    monkeypatch.setattr(updates, "MAX_VALUES", 39)
    refuse(PAIR, Record(UPDATE, payload(), NEW), sentence="more than it may")


@pytest.mark.parametrize(
    ("names", "shifts", "sentence"),
    [([1, 0, 0, 0], [0] * 4, "a stream that it does not have"), ([-1, 0, 0, 0], [0] * 4, "a stream that it does not have"),
     ([0] * 4, [25, 0, 0, 0], "a factor that is too large"), ([0] * 4, [2**32 - 1, 0, 0, 0], "a factor that is too large"),
     ([0] * 4, [24, 0, 0, 0], "a factor that is too large")],
)  # fmt: skip
def test_lying_vectors_refused(names, shifts, sentence):
    reader = streams.Reader(payload())
    table = streams.frame(reader.frame(None, 1 << 20))
    sides = [
        streams.encode(numbers.zigzag(np.diff(np.array(names), prepend=0).astype(np.int32))),
        streams.encode(np.array(shifts, np.uint32)),
    ]
    values = streams.encode(np.full(40, 5, np.uint32))
    refuse(PAIR, Record(UPDATE, table + b"\1" + b"".join(sides) + values, NEW), sentence=sentence)


def test_wrong_piece_is_not_written():
    output = Output()
    with pytest.raises(DeltaError, match="does not make what it should"):
        apply(crafted(PAIR, Record(UPDATE, payload(), NEW[::-1])), [PAIR], output)
    assert not any(output.files.values())


def test_updates_count_as_many_records(monkeypatch):
    """Check the limit on the time that a device spends: an update may have 32 times as many segments as a record of numbers."""
    monkeypatch.setattr(container, "MAX_RECORDS", 40)
    steps = np.ones(1, np.int32)
    tiny = Record(UPDATE, payload(changed(length=4, row=0, product=None, step=np.float32(1e-3), steps=steps)), b"")
    made = numbers.stepped(np.frombuffer(OLD[:4], np.uint32), steps, np.float32(1e-3), KINDS["float32"]).tobytes()
    tiny.new = made
    refuse(Case(3 * made, OLD), tiny, tiny, tiny, sentence="from more than 40 records")


@pytest.mark.parametrize("first", few(range(8), 1))
@pytest.mark.parametrize("way", ["product", "shared numbers"])
def test_every_flipped_bit_of_an_update_harmless(first, way):
    pair, data = (PAIR, payload()) if way == "product" else (SHARED_PAIR, payload(sharing()))
    patch = crafted(pair, Record(UPDATE, data, pair.new))
    accepted = 0
    for bit in range(first, 8 * len(patch), 8):
        damaged = bytearray(patch)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert apply(bytes(damaged), [pair]) == [pair.new], f"bit {bit} makes another file"
            accepted += 1
        except (DeltaError, BaseError):
            pass
    assert accepted < 0.05 * len(patch)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=20), min_size=1, max_size=20))
def test_any_vectors_come_back(rows):
    given_ = [np.array(row, np.int32) for row in rows]
    reader = streams.Reader(vectors.encode(given_))
    found = vectors.decode(reader, [len(row) for row in rows])
    reader.end()
    assert [row.tolist() for row in found] == rows


# Versions


def test_an_agent_of_format_version_1_asks_for_a_newer_one(tmp_path):
    """Let the real agent of the version before read a delta of format version 2: it says what to do, and what is there stays."""
    moved_pair(tmp_path)
    old_agent = kit.Programs.install(tmp_path / "programs", kit.wheel("deltaferry_agent"))
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors")
    (tmp_path / "out").write_bytes(b"what runs")
    words = "-m", "ota.delta.cli", "apply", tmp_path / "old", tmp_path / "p", "-o", tmp_path / "out"
    done = old_agent.run(*words)
    assert done.returncode == 3, done.stderr
    assert "the delta has format version 2, but this agent reads 1; update the agent" in done.stderr
    assert (tmp_path / "out").read_bytes() == b"what runs"
    files.build(tmp_path / "old", tmp_path / "new", tmp_path / "p", factors=tmp_path / "factors", version=1)
    assert old_agent.run(*words).returncode == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "new").read_bytes()


# The command


def test_command_takes_factors(tmp_path, monkeypatch):
    monkeypatch.chdir(moved_pair(tmp_path))

    def ferry(*words: str) -> Any:
        result = CliRunner().invoke(app, ["delta", *words])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plain = ferry("build", "old", "new", "-o", "plain", "--json")
    made = ferry("build", "old", "new", "-o", "p", "--factors", "factors", "--json")
    assert made["bytes"] < 0.5 * plain["bytes"]
    assert made["by_kind"]["update"]
    assert ferry("estimate", "old", "new", "--factors", "factors", "--json")["bytes"] == made["bytes"]
    parts = ferry("inspect", "p", "--of", "new", "--from", "old", "--json")["parts"]
    assert {tuple(part["holds"]) for part in parts} >= {("float32 by product",), ("float32 by steps",)}
    assert sum(part["size"] for part in parts) == pytest.approx(made["bytes"], abs=200)
    result = CliRunner().invoke(app, ["delta", "build", "old", "new", "-o", "factors", "--factors", "factors"])
    assert result.exit_code == 3
    assert "is the same file as the input" in result.stderr
