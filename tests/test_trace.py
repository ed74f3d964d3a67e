"""Tracing over a given list of things: what a hash comes from, what came of it, and what cannot be told."""

from __future__ import annotations

import pytest

from registry.errors import CatalogError
from registry.trace import Thing, text_of, trace

DATA = Thing("data", "shapes 1", {"md5": "d1" * 16})
FIRST = Thing("version", "shapes/I/full 1", {"weights": "aa" * 32}, {"gate": "promote"}, ["d1" * 16])
SECOND = Thing("version", "shapes/I/full 2", {"weights": "ab" * 32}, {}, ["d1" * 16, "aa" * 32])
SAME_WEIGHTS = Thing("version", "shapes/I/full 3", {"weights": "ab" * 32}, {}, ["aa" * 32])
BUNDLE = Thing("bundle", "shapes/edge release 1", {"manifest": "b0" * 32}, {}, ["ab" * 32], ["f0" * 32])
DEVICE = Thing("device", "press-01", {}, {}, ["b0" * 32])
THINGS = [DATA, FIRST, SECOND, SAME_WEIGHTS, BUNDLE, DEVICE]


def test_each_thing_is_found_once_with_its_depth():
    found = trace(iter(THINGS), "press-01")
    assert [(row["name"], row["depth"]) for row in found["back"]] == [
        (BUNDLE.name, 1), (SECOND.name, 2), (DATA.name, 3), (FIRST.name, 3), (SAME_WEIGHTS.name, 2),
    ]  # fmt: skip
    assert found["forward"] == []
    assert [row["name"] for row in trace(THINGS, "D1d1d1")["forward"]] == [
        FIRST.name, SECOND.name, BUNDLE.name, DEVICE.name, SAME_WEIGHTS.name,
    ]  # fmt: skip


def test_thing_is_found_by_the_hash_of_its_file():
    assert trace(THINGS, "f0f0f0f0")["of"]["name"] == BUNDLE.name


@pytest.mark.parametrize("text", ["press-02", "aaaaa", "press", "cc" * 32])
def test_what_nothing_is_called_is_refused(text: str):
    with pytest.raises(CatalogError, match="nothing here is called"):
        trace(THINGS, text)


def test_beginning_of_two_hashes_is_refused_but_not_one_hash_of_two_things():
    assert trace(THINGS, "ababab")["of"]["name"] == SECOND.name
    other = Thing("decision", "7", {"entry": "ababab" + "0" * 58})
    with pytest.raises(CatalogError, match=r"'ababab' is the beginning of several hashes .*; give more of it"):
        trace([*THINGS, other], "ababab")


def test_text_shows_both_directions():
    rows = text_of(trace(THINGS, "aa" * 32)).splitlines()
    assert rows[:3] == [
        "version shapes/I/full 1 (weights aaaaaaaaaaaa): gate promote", "comes from", "  data shapes 1 (md5 d1d1d1d1d1d1)",
    ]  # fmt: skip
    assert rows[3] == "led to"
    assert text_of(trace(THINGS, "press-01")).endswith("led to nothing yet")
