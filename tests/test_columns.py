"""What the report says of champions and decisions, from given records: which pictures are shown, which entries, and why."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model import flop
from model.scorecard import Comparison, Sampler
from registry.catalog import Subject
from registry.columns import SAMPLE_COLUMNS, Champion, decisions, release_row, samples, variant_row
from registry.cost import GpuTime, Prices, Work, yearly
from registry.ledger import Entry
from registry.promotion import overruled_verdict, why_promoted
from registry.report import Energy, ReleaseRow, VariantRow
from registry.seal import Seal
from tests.conftest import CONFIG
from tests.test_selection import card

CELL, COLUMNS = 6, 8
SUBJECT = Subject(line="shapes", configuration="I", variant="full")
SEAL = Seal(
    subject=str(SUBJECT), version=1, weights="a" * 64, lineage="b" * 64, scorecard="c" * 64, data_rev="d" * 40, data_md5="e" * 32, code="f",
    parent=None, teacher=None, files={},
)  # fmt: skip


def grid(captions: list[str], level: int) -> bytes:
    """Make a picture with a row for each caption; each row has one brightness, which starts at `level`."""
    rows = [np.full((CELL, COLUMNS * CELL), level + 10 * y, dtype=np.uint8) for y in range(len(captions))]
    made = BytesIO()
    Image.fromarray(np.concatenate(rows)).save(made, "PNG")
    return made.getvalue()


def champion(captions: list[str], real: bool = True) -> Champion:
    return Champion(SUBJECT, SEAL, card(), 1.0, grid(captions, 0), grid(captions, 100) if real else None, captions, CONFIG)


def brightness(picture: bytes) -> list[int]:
    """Return the brightness of each row of images."""
    with Image.open(BytesIO(picture)) as opened:
        assert opened.width == SAMPLE_COLUMNS * CELL
        pixels = np.asarray(opened)
    assert all(len(set(row)) == 1 for row in pixels)
    return [int(row[0]) for row in pixels[::CELL]]


def test_champions_of_a_line_are_shown_with_the_same_captions():
    one, other = champion(["bar", "coin", "dot", "ring"]), champion(["coin", "ring", "star"], real=False)
    drawn, real, captions = samples(one, [one, other])
    assert captions == ["coin", "ring"]
    assert (brightness(drawn), real and brightness(real)) == ([10, 30], [110, 130])
    drawn, real, captions = samples(other, [one, other])
    assert (brightness(drawn), real, captions) == ([0, 10], None, ["coin", "ring"])


def test_champion_without_a_shared_caption_is_shown_with_its_own():
    one, other = champion(["bar", "coin", "dot", "ring"]), champion(["star"])
    drawn, _, captions = samples(one, [one, other])
    assert (brightness(drawn), captions) == ([0, 10, 20], ["bar", "coin", "dot"])


def entry(number: int, kind: str, why: str, overruled: bool = False) -> Entry:
    return Entry.model_validate({
        "number": number, "previous": "", "kind": kind, "subject": str(SUBJECT), "who": "me", "when": "2026-11-21T10:00:00+00:00", "why": why,
        "facts": {"version": number, "overruled": overruled},
    })  # fmt: skip


def test_one_remeasuring_is_one_decision():
    made = [
        entry(1, "measured", "blur"),
        entry(2, "measured", "blur"),
        entry(3, "measured", "captions"),
        entry(4, "promotion", "x"),
    ]
    assert [row.number for row in decisions(made)] == [4, 3, 2]
    assert [row.kind for row in decisions([entry(1, "promotion", "x", overruled=True)])] == ["overrule"]


def test_decisions_of_one_line_are_those_about_it():
    other = entry(2, "promotion", "x").model_copy(update={"subject": "tables/I/full"})
    longer = entry(3, "promotion", "x").model_copy(update={"subject": "shapes-2/I/full"})
    made = [entry(1, "promotion", "x"), other, longer]
    assert [row.number for row in decisions(made, "shapes")] == [1]
    assert [row.number for row in decisions(made)] == [3, 2, 1]


def test_update_costs_the_smallest_delta_or_the_whole_bundle():
    one = champion(["bar"])

    def row(deltas: list[int], on_devices: tuple[float, int] | None) -> ReleaseRow:
        return release_row(
            one, [one, one], device_class="edge", release=2, full_bytes=5_000_000, deltas=deltas, metadata_bytes=6_000, rollout="open",
            on_devices=on_devices, energy=Energy(2.0, None, None, "RAPL", "measured"), prices=Prices(),
        )  # fmt: skip

    by_delta, whole = row([900_000, 800_000], (210.0, 3)), row([], None)
    assert (by_delta.delta_bytes, by_delta.update_bytes, by_delta.milliseconds) == (800_000, 806_000, 210.0)
    assert (whole.delta_bytes, whole.update_bytes, whole.milliseconds) == (None, 5_006_000, one.card.cost.milliseconds)
    for made in (by_delta, whole):
        assert made.costs == yearly(Work(joules=2.0, update_bytes=made.update_bytes, training_seconds=2.0), Prices())


def test_page_says_why_a_version_was_promoted_and_what_the_gate_had_said():
    gate = entry(1, "gate", "worse on the new data")
    forced, again = entry(2, "promotion", "I like it", overruled=True), entry(3, "promotion", "back again")
    assert why_promoted([again]) == "back again"
    assert why_promoted([forced, again]) == "the gate was overruled: I like it; again: back again"
    assert overruled_verdict([forced], gate) == "worse on the new data"
    assert overruled_verdict([forced, again], gate) is None
    assert overruled_verdict([forced], None) is None


RECORDS: Any = SimpleNamespace(ledger=SimpleNamespace(entries=lambda _: []))


def of_variant(name: str, steps: int, compared_with: str = SEAL.weights) -> Champion:
    """Make the champion of a variant, which lies 0.001 ± 0.0005 further from real images than `full` in the first space."""
    made, subject = champion(["bar"]), Subject.parse(f"shapes/I/{name}")
    rows = [
        Comparison.model_validate({
            "against": "full", "against_sha256": compared_with, "space": q.space, "split": q.split, "n": 100, "groups": 10_000,
            "delta": 0.001 if (q.space, q.split) == (made.card.quality[0].space, "new") else 9.0, "se": 0.0005, "champion_kd": 0.1,
            "aspect": aspect,
        })
        for q in made.card.quality
        for aspect in ("images", "captions")
        if (aspect, q.split) != ("captions", "old")
    ]  # fmt: skip
    rows = sorted(rows, key=lambda row: row.aspect)  # those of captions come first, and count for nothing here
    own = {"sampler": Sampler(steps=steps), "variant": name, "comparisons": rows if name != "full" else []}
    return replace(made, subject=subject, card=made.card.model_copy(update=own))


def variants_row(one: Champion, *others: Champion, gpu: dict[Subject, GpuTime] | None = None) -> VariantRow:
    return variant_row(RECORDS, one, [one, *others], None, None, gpu or {}, Prices(cloud_gpu_hour=3600, cloud_gpu_teraflops=1))


def test_variant_is_set_beside_full():
    full, dev = of_variant("full", 28), of_variant("dev", 14)
    whole, half = variants_row(full, dev), variants_row(dev, full)
    assert (whole.steps, whole.evaluations, whole.lost, whole.saving) == (28, 56, None, None)
    assert whole.gpu.seconds == whole.price == pytest.approx(56 * 1000 * flop.evaluation(full.config) / 1e12)
    assert (half.family, half.steps, half.evaluations) == ("shapes/I", 14, 28)
    assert half.lost is not None
    assert (half.lost.value, half.lost.low, half.lost.high) == pytest.approx((0.001, 0.00002, 0.00198), abs=1e-5)
    assert (half.word, half.saving) == ("further than full", pytest.approx(0.5))
    assert (half.distance.value, half.distance.low) == (0.02, pytest.approx(0.0004, abs=1e-4))


def test_variant_that_was_compared_with_an_earlier_full_says_so():
    full, dev = of_variant("full", 28), of_variant("dev", 14, compared_with="9" * 64)
    row = variants_row(dev, full)
    assert (row.lost, row.word) == (None, "not compared with the present full")
    assert row.saving == pytest.approx(0.5)
    alone = variants_row(dev, replace(full, subject=Subject.parse("shapes/II/full")))
    assert (alone.lost, alone.saving) == (None, None)


def test_measured_time_of_an_accelerator_counts_instead_of_the_estimate():
    full, dev = of_variant("full", 28), of_variant("dev", 14)
    row = variants_row(dev, full, gpu={dev.subject: GpuTime(3.0, "NVIDIA L4"), full.subject: GpuTime(4.0, "NVIDIA L4")})
    assert (row.gpu.source, row.price, row.saving) == ("NVIDIA L4", pytest.approx(3.0), pytest.approx(0.25))
