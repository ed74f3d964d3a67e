"""The page is one self-contained file, and what strangers wrote in it stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from registry.report import DecisionRow, DeviceRow, ModelRow, Prices, ReleaseRow, Report, human_size, render, traffic_cost

PRICES = Prices(currency="EUR", megabyte=0.5, training_hour=0.1, fleet=1000)
REPORT = Report(
    title="What the models cost and bring",
    made=datetime(2026, 11, 21, tzinfo=UTC),
    models=[
        ModelRow(
            subject="shapes/I/full", version=2, tier="nano", data_rev="0123456789", kd={"trained": 0.02, "random": 0.03},
            kd_before={"trained": 0.1, "random": 0.09}, n=128, steps=10, milliseconds=76, train_seconds=32,
            reason="better", samples=b"\x89PNG", captions=["bar", "disc"],
        )
    ],
    releases=[
        ReleaseRow(
            line="shapes", device_class="edge", release=2, version=2, full_bytes=5_700_000, delta_bytes=900_000,
            metadata_bytes=6_000, rollout="open",
        )
    ],
    devices=[DeviceRow("press-01", "shapes release 2", "refused", "too slow", datetime(2026, 11, 21, tzinfo=UTC))],
    decisions=[DecisionRow(1, "2026-11-21T10:00:00+00:00", "me", "promotion", "shapes/I/full", "better")],
    prices=PRICES,
    go_back=["ferry promote shapes/I/full 1"],
)  # fmt: skip


def test_page_needs_nothing_from_elsewhere():
    page = render(REPORT)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert "<script" not in page


def test_page_shows_figures_and_way_back():
    page = render(REPORT)
    for shown in (
        "900 kB",
        "5.70 MB",
        "2,853 EUR",
        "453.00 EUR".replace(".00", ""),
        "76 ms",
        "0.02",
        "ferry promote shapes/I/full 1",
    ):
        assert shown in page


def test_what_devices_wrote_stays_text():
    attacked = replace(REPORT, devices=[replace(REPORT.devices[0], reason="<script>alert(1)</script>")])
    assert "<script>" not in render(attacked)


def test_first_version_has_nothing_before_it():
    first = replace(
        REPORT, models=[replace(REPORT.models[0], kd_before={})], releases=[replace(REPORT.releases[0], delta_bytes=None)]
    )
    assert "first version" in render(first)


def test_empty_fleet_is_said_so():
    assert "No device has reported yet." in render(replace(REPORT, devices=[], go_back=[]))


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (12_345, "12 kB"), (910_916, "911 kB"), (5_716_884, "5.72 MB")])
def test_sizes_in_units_people_use(size: int, text: str):
    assert human_size(size) == text


def test_traffic_is_priced_for_the_whole_fleet():
    assert traffic_cost(2_000_000, PRICES) == pytest.approx(1000.0)
