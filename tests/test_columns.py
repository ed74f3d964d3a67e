"""What the report says of champions and decisions, from given records: which pictures are shown, which entries, and why."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from registry.catalog import Subject
from registry.columns import SAMPLE_COLUMNS, Champion, decisions, release_row, samples
from registry.cost import Prices, Work, yearly
from registry.ledger import Entry
from registry.promotion import overruled_verdict, why_promoted
from registry.report import Energy, ReleaseRow
from registry.seal import Seal
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
    return Champion(SUBJECT, SEAL, card(), 1.0, grid(captions, 0), grid(captions, 100) if real else None, captions)


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
