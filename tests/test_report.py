"""The page is one self-contained file with honest counts, and what strangers wrote in it stays text."""

from __future__ import annotations

import base64
import re
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from flows.settings import Settings
from flows.setup import template
from registry.cost import GpuTime, Prices, Work, energy, estimated, total, traffic, yearly
from registry.curve import Setting, Update
from registry.report import (
    Change,
    DecisionRow,
    DeviceRow,
    Distance,
    Energy,
    Estimate,
    ModelColumn,
    ReleaseRow,
    Report,
    UpdateRow,
    VariantRow,
    change,
    distance,
    estimate,
    grouped,
    human_money,
    human_seconds,
    human_size,
    human_small,
    render,
    worst,
)
from tests.test_selection import asked, card

PRICES = Prices(
    currency="EUR", megabyte=0.5, training_hour=0.1, fleet=1000, device=40, device_years=5, images_per_day=100,
    kilowatt_hour=0.3, operator_hour=60, operator_hours=2, updates_per_year=12, cloud_gpu_hour=1, cloud_gpu_seconds=0.1,
    cloud_gpu_teraflops=17, cloud_image_kilobytes=5,
)  # fmt: skip
WORK = Work(joules=3.6, update_bytes=906_000, training_seconds=360)


def samples(rows: int = 3, columns: int = 5, cell: int = 66) -> bytes:
    """Make a picture as large as those of the page."""
    rng = np.random.default_rng(0)
    file = BytesIO()
    pixels = rng.integers(0, 255, (rows * cell // 4, columns * cell // 4), dtype=np.uint8)
    Image.fromarray(pixels).resize((columns * cell, rows * cell), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def column(variant: str, version: int, share: float, steps: int, joules: Energy | None) -> ModelColumn:
    return ModelColumn(
        subject=f"shapes/I/{variant}", variant=variant, version=version, tier="nano", data_rev="0123456789",
        data_message="lamp moved, printed pages added",
        distance=Distance(share, share - 0.05, share + 0.06, {"trained": 0.02, "random": 0.03}, 128),
        change=Change(0.41, share, -0.031, -0.044, -0.018, 128), replaced=version - 1,
        reason="better on the new data, not worse on the old (n = 128)", steps=steps, evaluations=2 * steps, milliseconds=76,
        on_devices=(210, 3), peak_mib=61.2, energy=joules, train_seconds=32, samples=samples(), real=samples(),
        captions=["bricks, dim", "coins", "gravel"], ratings=["people prefer version 2: they preferred version 2 over 1"],
    )  # fmt: skip


def variant(
    name: str, steps: int, evaluations: int, lost: Estimate | None, joules: Energy | None, source: str = ""
) -> VariantRow:
    gpu = GpuTime(0.3, source) if source else estimated(2e8 * evaluations, PRICES)
    return VariantRow(
        family="shapes/I", variant=name, version=2, steps=steps, evaluations=evaluations, space="trained", n=128,
        distance=Estimate(0.0123, 0.0101, 0.0145), lost=lost, milliseconds=76, on_devices=(210, 3) if name == "full" else None,
        energy=joules, gpu=gpu, price=gpu.price(PRICES),
        saving=None if name == "full" else 1 - gpu.price(PRICES) / estimated(2e8 * 56, PRICES).price(PRICES),
    )  # fmt: skip


VARIANTS = [
    variant("full", 28, 56, None, Energy(2.1, 1.9, 2.3, "RAPL package-0", "measured")),
    variant("dev", 14, 28, Estimate(0.0004, -0.0011, 0.0019), None),
    variant("fast", 7, 14, Estimate(0.0024, 0.0011, 0.0037), None, "NVIDIA L4, batches of 256"),
    variant("turbo", 4, 4, Estimate(-0.0024, -0.0037, -0.0011), None),
]
REPORT = Report(
    title="What the models cost and bring",
    made=datetime(2026, 11, 21, tzinfo=UTC),
    models=[
        column("full", 2, 0.18, 56, Energy(2.1, 1.9, 2.3, "RAPL package-0", "measured")),
        column("dev", 2, 0.24, 28, Energy(1.2, None, None, "CPU seconds at 4 W per busy core, 1 W idle", "model")),
        column("fast", 2, 0.4, 14, None),
    ],
    variants=VARIANTS,
    releases=[
        ReleaseRow(
            line="shapes", device_class="edge", release=2, full_bytes=5_700_000, delta_bytes=900_000, metadata_bytes=6_000,
            rollout="open to 100 %", milliseconds=76, costs=yearly(WORK, PRICES),
        )
    ],
    devices=[
        DeviceRow(f"press-{i:02d}", "shapes release 2", "confirmed", "", datetime(2026, 11, 21, tzinfo=UTC)) for i in range(9)
    ]
    + [DeviceRow("press-77", "shapes release 1", "refused", "an image takes 900 ms", datetime(2026, 11, 21, tzinfo=UTC))],
    decisions=[DecisionRow(6 - i, "2026-11-21T10:00:00+00:00", "me", "promotion", "shapes/I/full", "better") for i in range(6)],
    prices=PRICES,
    go_back=[
        (
            'ferry promote shapes/I/full 1 --reason "going back" && ferry release shapes/edge && ferry rollout start shapes/edge '
            "--release 1 --revert --waves 100 --soak 0"
        )
    ],
)  # fmt: skip


def test_page_needs_nothing_from_elsewhere():
    page = render(REPORT)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page
    assert "<script" not in page


def test_page_begins_with_the_three_numbers_that_matter():
    page = " ".join(re.sub(r"<[^>]+>", "", render(REPORT)).split())
    assert (
        "shapes on edge: an update is 906 kB to fetch instead of 5.71 MB, an image takes 0.076 s, and 1,000 devices cost "
        "14,887 EUR a year where a cloud would cost 93,704 EUR."
    ) in page
    assert page.index("shapes on edge:") < page.index("side by side")


@pytest.mark.parametrize(
    "shown",
    [
        "0.21 s",
        "on 3 devices",
        "61 MiB",
        "closer to real",
        "measurably different from real images",
        "ferry promote shapes/I/full 1",
        "lamp moved",
    ],
)
def test_page_shows_figures_and_way_back(shown: str):
    assert shown in render(REPORT)


def test_real_images_stand_beside_what_is_drawn():
    drawn, real = samples(), samples(2)
    beside = replace(REPORT.models[0], samples=drawn, real=real)
    alone = replace(beside, real=None)  # like a version that an older ferry registered
    shown = [base64.b64encode(picture).decode() for picture in (drawn, real)]
    page = render(replace(REPORT, models=[beside]))
    assert [page.count(picture) for picture in shown] == [1, 1]
    assert (
        page.index(shown[0])
        < page.index("<figcaption>drawn<")
        < page.index(shown[1])
        < page.index("<figcaption>real, never seen")
    )
    page = render(replace(REPORT, models=[alone]))
    assert [page.count(picture) for picture in shown] == [1, 0]
    assert "<figcaption>real" not in page


def test_energy_says_where_it_is_from_or_that_there_is_none():
    page = render(REPORT)
    assert re.search(r"2\.1 J \(1\.9 to 2\.3\)\s*<span class=\"soft\">measured: RAPL package-0", page)
    assert "calculated, not measured: CPU seconds at 4 W per busy core, 1 W idle" in page
    assert "<td>not measured</td>" in page
    assert "ferry-agent bench" in page
    known = replace(REPORT, models=REPORT.models[:2])
    assert "ferry-agent bench" not in render(known)


def test_prices_that_nobody_entered_are_marked():
    assumed = replace(REPORT, prices=Prices(), releases=[replace(REPORT.releases[0], costs=yearly(WORK, Prices()))])
    assert (
        render(assumed).count("†") == 13
    )  # legend, sentence, heading, five kinds of cost, the electricity of two, the accelerator's hour (2), speed
    assert render(REPORT).count("†") == 1
    some = Prices(megabyte=0.5, fleet=1000, images_per_day=100, updates_per_year=12, cloud_image_kilobytes=5)
    assert [row.name for row in yearly(WORK, some) if not row.assumed] == ["Mobile data"]


def test_a_cloud_that_is_cheaper_is_called_so():
    prices = PRICES.model_copy(update={"images_per_day": 1.0})
    cheap = replace(REPORT, prices=prices, releases=[replace(REPORT.releases[0], costs=yearly(WORK, prices))])
    assert "only 2," in render(cheap)
    assert "only" not in render(REPORT).split("side by side")[0]


def test_what_devices_wrote_stays_text():
    attacked = replace(REPORT, devices=[replace(REPORT.devices[0], reason="<script>alert(1)</script>")])
    assert "<script>" not in render(attacked)


def test_devices_that_complain_come_first():
    first, second = grouped(REPORT.devices)
    assert (first.devices, first.event) == (["press-77"], "refused")
    assert len(second.devices) == 9


def test_page_says_what_devices_further_behind_pay():
    page = render(replace(REPORT, releases=[replace(REPORT.releases[0], behind={1: 900_000, 2: 1_750_000, 3: 2_600_000})]))
    assert "900 kB as a delta, 1.75 MB from 2 releases before, 2.60 MB from 3 releases before, " in page
    assert "releases before" not in render(REPORT)


def test_page_says_what_a_student_and_a_held_update_take():
    full = Update(
        method="lowrank", start="master", master="a" * 64, noise=0.041, bytes=70_000, fixed=10_000, held=60_500,
        setting=Setting(network="b" * 64, precision="bfloat16", form=2, level=0.03),
    )  # fmt: skip
    student = full.model_copy(update={"noise": 0.03, "beside": 40_000, "budget": 65_536, "held": None, "setting": None})
    rows = [UpdateRow("shapes/I/full", 3, "promote", full), UpdateRow("shapes/I/turbo", 2, "refuse", student)]
    page = " ".join(render(replace(REPORT, updates=rows)).split())
    assert "10,000 of them no weights; rounded at level 0.041 instead of 0.03, to hold its weights to 60,500 bytes" in page
    assert "70,000 bytes, 10,000 of them no weights, 40,000 weights of others, 20,000 of this student." in page
    assert "budget 65,536 bytes: 70,000 bytes" in page
    assert "judged, beyond the budget" in page


def test_first_version_has_nothing_before_it():
    models = [replace(REPORT.models[0], change=None, replaced=None)]
    page = render(replace(REPORT, models=models, releases=[replace(REPORT.releases[0], delta_bytes=None)]))
    assert "first version" in page
    assert "the first delivery is" in page


def test_empty_fleet_is_said_so():
    page = render(replace(REPORT, devices=[], go_back=[], releases=[]))
    assert "No device has reported yet." in page
    assert "No model has an earlier version that passed the gate." in page


def test_distance_is_the_worse_space_with_its_interval():
    quality = [q for q in card().quality if q.split == "new"]  # kd 0.02 ± 0.01, noise at 0.5
    worse = quality[1].model_copy(update={"kd": 0.045, "groups": 5})
    found = distance([quality[0], worse])
    assert found.share == pytest.approx(0.3)  # the root of 0.045 / 0.5
    assert found.high == pytest.approx(((0.045 + 2.776 * 0.01) / 0.5) ** 0.5, rel=1e-3)  # Student's t with 4 degrees
    assert found.real == pytest.approx(0.2)  # two sets of real images lie 0.02 apart
    assert found.word == "measurably different: 1.5 times as far from real images as two sets of real images are from each other"
    close = distance([quality[0].model_copy(update={"kd": 0.01, "kd_se": 0.001})])
    assert close.word.startswith("measurably different, but not by much: 0.7 times as far from real images as two sets")
    near = distance([quality[0].model_copy(update={"kd": 0.01})])
    assert near.low == 0
    assert near.word == "cannot be told from real images by this measure (n = 100)"
    assert distance([quality[0].model_copy(update={"band": None})]).word == "measurably different from real images"
    assert distance([quality[0].model_copy(update={"kd": -0.001})]).share == 0


def test_champion_that_the_gate_refused_is_shown_as_such():
    says = "The gate refused this model, and a person overruled it:"
    assert says not in render(REPORT)
    refused = replace(REPORT.models[0], refused="coverage is 0.06, the floor is 0.30")
    page = render(replace(REPORT, models=[refused, *REPORT.models[1:]]))
    assert f"{says}</b> coverage is 0.06, the floor is 0.30" in page


def test_figures_that_were_measured_anew_are_marked():
    assert "measured anew" not in render(REPORT)
    models = [replace(REPORT.models[0], anew="0123456789abcdef"), *REPORT.models[1:]]
    assert "measured anew on data revision 01234567" in render(replace(REPORT, models=models))


def test_older_decisions_are_counted():
    assert "older:" not in render(REPORT)
    assert "4 older: <code>ferry history</code>" in render(replace(REPORT, older=4))


def test_captions_that_are_drawn_worst_are_named():
    rows = [
        asked(share, caption=caption)
        for caption, share in (("brick", 0.9), ("hole", 0.12), ("stain", -0.2), ("mesh", 0.8), ("new", None))
    ]
    assert worst(rows) == ["stain: 0 %", "hole: 12 %", "mesh: 80 %"]
    assert worst([asked(0.1, apart_se=0.2)]) == []  # no feature space tells it apart, so how well it is drawn is not known
    page = render(replace(REPORT, models=[replace(REPORT.models[0], worst=worst(rows)), *REPORT.models[1:]]))
    assert "stain: 0 % · hole: 12 % · mesh: 80 %" in page
    assert "What it draws worst" not in render(REPORT)


def test_change_is_certain_only_where_its_interval_says_so():
    made = card(new=(-0.1, 0.01))
    quality, rows = (
        [q for q in made.quality if q.split == "new"],
        [c for c in made.comparisons if (c.split, c.aspect) == ("new", "images")],
    )
    found = change(quality, rows)
    assert found is not None
    assert (found.word, found.n) == ("closer to real on the new data", 100)
    assert (found.low, found.high) == (pytest.approx(-0.1196, abs=1e-4), pytest.approx(-0.0804, abs=1e-4))
    doubtful = change(quality, [rows[0], rows[1].model_copy(update={"se": 0.08})])
    assert doubtful is not None
    assert doubtful.word == "no certain difference on the new data"
    assert change(quality, []) is None


def test_year_is_counted_in_the_units_that_prices_are_in():
    rows = {row.name: row for row in yearly(WORK, PRICES)}
    assert rows["Hardware"].devices == pytest.approx(1000 * 40 / 5)
    assert rows["Hardware"].cloud == pytest.approx(36_500_000 * 0.1 / 3600 * 1)  # 1,000 devices, 100 images, 365 days
    assert rows["Electricity"].devices == pytest.approx(36_500_000 * 3.6 / 3.6e6 * 0.3)  # joules to kWh
    assert rows["Mobile data"].devices == pytest.approx(1000 * 12 * 0.906 * 0.5)
    assert rows["Mobile data"].cloud == pytest.approx(36_500_000 * 0.005 * 0.5)
    assert rows["Retraining"].devices == rows["Retraining"].cloud == pytest.approx(12 * 0.1 * 0.1)
    assert rows["People"].devices == rows["People"].cloud == pytest.approx(12 * 2 * 60)
    assert total(list(rows.values()), "devices") == pytest.approx(sum(row.devices or 0 for row in rows.values()))


def test_service_that_sells_images_is_counted_by_the_thousand():
    bought = yearly(WORK, PRICES.model_copy(update={"cloud_thousand_images": 3.0}))
    assert bought[0].cloud == pytest.approx(36_500 * 3)


def test_energy_that_was_not_measured_costs_nothing_that_is_made_up():
    rows = yearly(replace(WORK, joules=None), PRICES)
    assert rows[1].devices is None
    assert total(rows, "devices") == pytest.approx(sum(row.devices or 0 for row in yearly(WORK, PRICES)) - 10.95)
    assert energy(3.6e6, PRICES) == pytest.approx(0.3)
    page = render(replace(REPORT, releases=[replace(REPORT.releases[0], costs=rows)]))
    assert '<td class="n">not measured</td>' in page
    assert "electricity was not measured and is not in it" in page
    assert "is not in it" not in render(REPORT)


def test_traffic_is_priced_for_the_whole_fleet():
    assert traffic(2_000_000, PRICES) == pytest.approx(1000.0)


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (12_345, "12 kB"), (910_916, "911 kB"), (5_716_884, "5.72 MB")])
def test_sizes_in_units_people_use(size: int, text: str):
    assert human_size(size) == text


@pytest.mark.parametrize(
    ("shown", "text"),
    [(human_seconds(76), "0.076 s"), (human_seconds(4321), "4.3 s"), (human_money(12_345.6), "12,346"), (human_money(0.012), "0.01"),
     (human_money(0.00175), "less than 0.01"), (human_seconds(100), "0.10 s"), (human_money(0), "0"),
     (human_small(0.0000123), "0.000012"), (human_small(0.3), "0.30"), (human_small(4321.2), "4,321"), (human_small(0), "0")],
)  # fmt: skip
def test_figures_have_digits_that_mean_something(shown: str, text: str):
    assert shown == text


def test_settings_that_init_writes_show_every_price_and_take_them():
    text = template(["shapes"])
    assert Settings.model_validate(tomllib.loads(text)).prices.assumed("fleet")
    entered = re.sub(r"^# (?=[\w.-]+ = )", "", text, flags=re.MULTILINE)
    found = Settings.model_validate(tomllib.loads(entered))
    assert not found.prices.assumed(*Prices.model_fields)
    assert found.energy["shapes"]["edge"]["full"].joules == 2.1
    assert found.gpu["shapes"]["I"]["full"].seconds == 0.7


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shapes": {"edge": {"fast": {"joules": 1, "source": "x", "quality": "measured"}}}}, "names a line, class or variant"),
        ({"tables": {"edge": {"full": {"joules": 1, "source": "x", "quality": "measured"}}}}, "names a line, class or variant"),
        ({"shapes": {"edge": {"full": {"joules": 1, "source": "x", "quality": "guessed"}}}}, "'measured', 'partial' or 'model'"),
        ({"shapes": {"edge": {"full": {"joules": 1, "low": 2, "high": 3, "source": "x", "quality": "model"}}}}, "lies between"),
        ({"shapes": {"edge": {"full": {"joules": 1}}}}, "source"),
    ],
)
def test_energy_without_its_source_is_refused(given: dict[str, object], says: str):
    with pytest.raises(ValidationError, match=says):
        Settings.model_validate({"schema": 1, "lines": {"shapes": {"data": "data/shapes"}}, "energy": given})


def rows_of(page: str) -> list[list[str]]:
    """Return the cells of each row of the table of variants, as text."""
    table = page[page.index('<table class="rows">') :].partition("</table>")[0]
    rows = re.findall(r"<tr>(<th scope=\"row.*?)</tr>", table, re.DOTALL)
    return [
        [" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in re.split(r"</t[hd]>", row) if cell.strip()] for row in rows
    ]


def test_each_variant_shows_steps_and_evaluations_beside_what_it_gives_up():
    full, dev, fast, turbo = rows_of(render(REPORT))
    assert [row[1] for row in (full, dev, fast, turbo)] == ["28 (56)", "14 (28)", "7 (14)", "4 (4)"]
    assert full[2] == "0.0123 (0.0101 to 0.0145, 128 images)"
    assert [row[3] for row in (full, dev)] == ["–", "+0.0004 (-0.0011 to +0.0019) not told apart from full"]
    assert fast[3].endswith("further than full")
    assert turbo[3].endswith("closer than full")
    assert (full[4], dev[4]) == ("0.21 s 3 devices", "0.076 s factory")
    assert (full[5], dev[5]) == ("2.1 J measured: RAPL package-0", "not measured")
    assert (full[8], dev[8]) == ("–", "50 %")


def test_time_on_an_accelerator_says_whether_it_was_measured():
    full, dev, fast, _ = rows_of(render(REPORT))
    assert (full[6], dev[6], fast[6]) == ("0.66 s estimated", "0.33 s estimated", "0.30 s NVIDIA L4, batches of 256")
    assert (full[7], dev[7], fast[7]) == ("≈ 0.00018", "≈ 0.000092", "0.000083")  # 0.66 s, 0.33 s and 0.3 s at 1 EUR an hour
    page = render(REPORT)
    assert "estimated from the number of operations at 17·10<sup>12</sup> a second where nobody entered a measured time" in page
    assert "17·10<sup>12</sup> a second † where" in render(replace(REPORT, prices=Prices()))
    assert "28 guided steps are 56 evaluations" in page
    measured = replace(REPORT, variants=[VARIANTS[2]])
    assert "estimated" not in render(measured)
    assert "What each variant costs" not in render(replace(REPORT, variants=[]))


def test_variants_of_several_lines_are_grouped():
    other = replace(VARIANTS[0], family="digits/II")
    rows = rows_of(render(replace(REPORT, variants=[*VARIANTS, other])))
    assert [row[0] for row in rows] == [
        "digits/II", "full version 2", "shapes/I", *(f"{name} version 2" for name in ("full", "dev", "fast", "turbo")),
    ]  # fmt: skip


def test_estimate_of_an_accelerators_time_follows_the_operations():
    prices = PRICES.model_copy(update={"cloud_gpu_teraflops": 10.0, "cloud_gpu_hour": 3.6})
    found = estimated(2e9, prices)
    assert (found.seconds, found.source) == (pytest.approx(0.2), "")
    assert found.price(prices) == pytest.approx(0.2 * 0.001)
    assert estimate(1.0, 0.5, 4) == Estimate(
        1.0, pytest.approx(1 - 3.182 * 0.5, rel=1e-3), pytest.approx(1 + 3.182 * 0.5, rel=1e-3)
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"shapes": {"I": {"turbo": {"seconds": 1, "source": "x"}}}}, "names a line, configuration or variant"),
        ({"shapes": {"II": {"full": {"seconds": 1, "source": "x"}}}}, "names a line, configuration or variant"),
        ({"tables": {"I": {"full": {"seconds": 1, "source": "x"}}}}, "names a line, configuration or variant"),
        ({"shapes": {"I": {"full": {"seconds": 0, "source": "x"}}}}, "greater than 0"),
        ({"shapes": {"I": {"full": {"seconds": 1}}}}, "source"),
    ],
)
def test_time_on_an_accelerator_without_its_source_or_variant_is_refused(given: dict[str, object], says: str):
    with pytest.raises(ValidationError, match=says):
        Settings.model_validate({"schema": 1, "lines": {"shapes": {"data": "data/shapes"}}, "gpu": given})
