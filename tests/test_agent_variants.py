"""Which variant draws: the owner's budgets, which variant replaces which, and routing that has shifted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota.agent import measured
from ota.agent.poll import SOONER, pause
from ota.agent.state import Config
from ota.agent.variants import LADDER, ROUTE_LIMIT, Figures, chain, routing_shift
from tests.fleet_kit import Field

ALL = ("full", "dev", "fast")
COSTS: dict[Any, Figures] = {"full": Figures(400, 8.0), "dev": Figures(100, 2.0), "fast": Figures(50, 1.0)}
pytest_plugins = ["tests.fleet_kit"]


def config(**fields: Any) -> Config:
    return Config(device="d", line="l", device_class="c", repository="/r", root_sha256="0" * 64, **fields)


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        pytest.param({}, "dev", id="the factory's choice"),
        pytest.param({"prefer": "quality"}, "full", id="best"),
        pytest.param({"prefer": "quality", "latency_ms": 150}, "dev", id="best in time"),
        pytest.param({"prefer": "quality", "joules": 1.5}, "fast", id="best for its energy"),
        pytest.param({"prefer": "quality", "latency_ms": 150, "joules": 1.5}, "fast", id="best within both"),
        pytest.param({"prefer": "latency"}, "fast", id="fastest"),
        pytest.param({"prefer": "energy"}, "fast", id="thriftiest"),
        pytest.param({"latency_ms": 150}, "dev", id="the factory's choice fits"),
        pytest.param({"latency_ms": 60}, "fast", id="the factory's choice does not fit"),
        pytest.param({"prefer": "quality", "latency_ms": 10}, "fast", id="nothing fits"),
    ],
)
def test_owner_chooses(fields, chosen):
    assert chain(ALL, "dev", COSTS, config(**fields))[0] == chosen


def test_what_was_not_measured_fits_no_budget():
    assert chain(ALL, "full", {"dev": Figures(100, None)}, config(prefer="quality", latency_ms=150))[0] == "dev"
    assert chain(ALL, "full", {"dev": Figures(100, None)}, config(prefer="quality", joules=5))[0] == "fast"
    assert chain(ALL, "full", {}, config(prefer="latency"))[0] == "fast"


def test_strayed_routes_ask_for_the_safe_variant():
    assert chain(ALL, "full", COSTS, config(prefer="quality"), strayed=True)[0] == "fast"
    assert chain(ALL, "full", COSTS, config(prefer="quality", safe="dev"), strayed=True)[0] == "dev"
    assert chain(("full", "dev"), "full", COSTS, config(safe="fast"), strayed=True)[0] == "dev"  # the bundle has no `fast`


@given(
    st.sampled_from([c for n in (1, 2, 3) for c in itertools.combinations(ALL, n)]),
    st.dictionaries(st.sampled_from(ALL), st.builds(Figures, st.none() | st.floats(1, 1e3), st.none() | st.floats(0.1, 99))),
    st.sampled_from(["default", "quality", "latency", "energy"]), st.none() | st.floats(1, 1e3), st.none() | st.floats(0.1, 99),
    st.none() | st.sampled_from(ALL), st.booleans(), st.data(),
)  # fmt: skip
def test_every_variant_stands_in_once_cheaper_ones_first(variants, figures, prefer, latency, joules, safe, strayed, data):
    default = data.draw(st.sampled_from(variants))
    found = chain(variants, default, figures, config(prefer=prefer, latency_ms=latency, joules=joules, safe=safe), strayed)
    assert sorted(found) == sorted(variants)
    places = [LADDER.index(v) for v in found]
    below = [p for p in places[1:] if p > places[0]]
    assert below == sorted(below)
    assert places[1 : 1 + len(below)] == below


def test_routes_like_the_factorys_do_not_stray():
    reference = [[1.0, 1.0, 2.0], [0.5, 0.5, 0.0]]
    assert routing_shift([[[10.0, 11.0, 19.0], [5.0, 5.1, 0.2]]], reference) is None
    assert routing_shift([], reference) is None
    assert routing_shift([[[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]], reference) is None
    assert (
        routing_shift([[[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], [[2.0, 1.0, 2.0], [0.0, 1.0, 0.0]]], reference) is None
    )  # on the average


def test_routes_through_other_experts_stray():
    problem = routing_shift([[[1.0, 1.0, 2.0], [0.1, 0.1, 0.8]]], [[1.0, 1.0, 2.0], [0.5, 0.5, 0.0]])
    assert problem
    assert "block 1 sends 80 % of its load to other experts than at the factory (limit" in problem
    share = ROUTE_LIMIT + 0.01
    assert routing_shift([[[1 - share, share]]], [[1.0, 0.0]])
    assert not routing_shift([[[1 - share + 0.02, share - 0.02]]], [[1.0, 0.0]])


@pytest.mark.parametrize("load", [[], [[0.5, 0.5]], [[1.0, 1.0, 2.0], [1.0]], [[1.0, 1.0, 2.0]] * 3])
def test_other_experts_than_the_factorys_stray(load):
    reference = [[1.0, 1.0, 2.0], [0.5, 0.5, 0.0]]
    assert "other experts" in str(routing_shift([reference, load], reference))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"x": 3}', b'{"x": {"full": []}}', b'{"x": {"full": {"p95_ms": "a", "joules": -1}}}']
)
def test_damaged_measurements_are_none(scene: Field, data):
    scene.device.home.disk.replace(measured.NAME, data)
    assert measured.read(scene.device.home, "x") in ({}, {"full": Figures()})


def test_measurements_are_of_one_bundle(scene: Field):
    home = scene.device.home
    measured.write(home, "a", {"full": {"p95_ms": 9, "joules": None}})
    assert measured.read(home, "a") == {"full": Figures(9.0, None)}
    measured.write(home, "b", {"dev": {"p95_ms": 3, "joules": 1.5}})
    assert measured.read(home, "a") == {}
    assert measured.read(home, "b") == {"dev": Figures(3.0, 1.5)}


@given(st.floats(10, 1e6), st.integers(0, 50), st.floats(0, 1, exclude_max=True))
def test_pauses_vary_and_grow_with_failures(every, failures, part):
    waited = pause(every, failures, part)
    assert 0.75 * min(every, SOONER) <= waited <= 1.25 * every
    assert pause(every, failures, 0.0) < pause(every, failures, 0.9)
    if failures:
        assert pause(every, failures + 1, part) >= waited
