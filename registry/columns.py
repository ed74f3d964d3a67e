"""The rows and columns of the report: what MLflow and the ledger hold of the champions, for `registry.report`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from model import flop
from model.config import ModelConfig
from model.scorecard import Scorecard
from registry.catalog import Subject
from registry.champions import Records, champion_of, judged, promotions, seals, verdict
from registry.cost import GpuTime, Prices, Work, estimated, yearly
from registry.figures import MeasuredRecords, figures
from registry.ledger import Entry
from registry.promotion import about, kind_of, overruled_verdict, why_promoted
from registry.report import DecisionRow, Energy, ModelColumn, ReleaseRow, UpdateRow, VariantRow, change, distance, estimate, worst
from registry.seal import Part, Seal
from registry.sheets import verdicts

SAMPLE_ROWS, SAMPLE_COLUMNS = 3, 5  # captions of a line, and images for each
CURVE, LINEAGE = (
    "curve.json",
    "lineage.json",
)  # file names in a checkpoint; not imported from `model.train`, because that needs torch
GRID, CAPTIONS, REAL = "pictures/samples.png", "pictures/samples.json", "pictures/real.png"


@dataclass(frozen=True)
class Champion:
    """A champion, with the figures and pictures that its run in MLflow holds."""

    subject: Subject
    version: Seal
    card: Scorecard
    train_seconds: float
    grid: bytes
    """PNG: what it draws, a row of square images for each caption."""
    real: bytes | None
    """PNG: real images of the same captions; None: an older ferry kept none."""
    captions: list[str]
    config: ModelConfig


def read(records: Records, subject: Subject, into: Path) -> Champion | None:
    """Read the champion of a subject from MLflow; None: there is no champion.

    Args:
        records: MLflow and the ledger.
        subject: whose champion.
        into: folder in which fetched files are kept.

    Raises:
        CatalogError: MLflow does not have it any more, or an older ferry kept no hashes of it.
        SealError: MLflow holds other files of it than the gate saw.
        StoreError: MLflow cannot be reached.
    """
    version, catalog = champion_of(records, subject), records.catalog
    if version is None:
        return None
    parts: tuple[Part, Part] = ("checkpoint", "bundle")
    checkpoint, _ = (catalog.files(version, part, into) for part in parts)  # the bundle only to check that it is whole
    curve = json.loads((checkpoint / CURVE).read_bytes())
    return Champion(
        subject=subject,
        version=version,
        card=catalog.card(version),
        train_seconds=curve[-1]["seconds"] if curve else 0.0,  # an adopted model was not trained here
        grid=catalog.data(version, GRID),
        real=catalog.data(version, REAL) if REAL in version.files else None,
        captions=json.loads(catalog.data(version, CAPTIONS)),
        config=ModelConfig.model_validate(json.loads((checkpoint / LINEAGE).read_bytes())["config"]),
    )


def column(
    records: MeasuredRecords,
    champion: Champion,
    champions: Iterable[Champion],
    data_message: str,
    on_devices: tuple[float, int] | None,
    energy: Energy | None,
) -> ModelColumn:
    """Make a champion's column.

    Args:
        records: MLflow, the ledger and the feature spaces.
        champion: whose column.
        champions: all that the page shows; those of the same line show the same captions, if they can.
        data_message: with which its data revision was recorded.
        on_devices: median milliseconds of one image, and the number of devices that reported a time; None: there is none.
        energy: of one image; None: not known.

    Raises:
        LedgerError: a newer ferry measured it.
    """
    card, subject, version = champion.card, champion.subject, champion.version
    new, anew = [q for q in card.quality if q.split == "new"], figures(records, subject, version.version)
    compared = [row for row in card.comparisons if row.split == "new" and row.against == "champion"]
    weights = {s.weights: s.version for s in seals(records, subject)}
    drawn, real, captions = samples(champion, [other for other in champions if other.subject.line == subject.line])
    made = [e for e in promotions(records, subject) if e.facts["version"] == version.version]
    return ModelColumn(
        subject=str(subject),
        variant=subject.variant,
        version=version.version,
        tier=card.tier,
        data_rev=version.data_rev,
        data_message=data_message,
        distance=distance(anew.quality if anew else new),
        change=None if anew else change(new, compared),  # the comparison was measured in the previous spaces
        replaced=weights.get(compared[0].against_sha256) if compared else None,
        reason=why_promoted(made),
        steps=card.sampler.steps,
        evaluations=card.sampler.evaluations,
        milliseconds=card.cost.milliseconds,
        on_devices=on_devices,
        peak_mib=card.cost.peak_mib,
        energy=energy,
        train_seconds=champion.train_seconds,
        samples=drawn,
        real=real,
        captions=captions,
        worst=worst(anew.asked if anew else card.asked),
        refused=overruled_verdict(made, judged(records, subject).get(version.version)),
        anew=anew.data_rev if anew else None,
        ratings=[v.text for v in verdicts(records, str(subject)) if v.challenger == version.version],
    )


def variant_row(
    records: MeasuredRecords,
    champion: Champion,
    champions: Iterable[Champion],
    on_devices: tuple[float, int] | None,
    energy: Energy | None,
    gpu: Mapping[Subject, GpuTime],
    prices: Prices,
) -> VariantRow:
    """Make the row that shows what a variant costs and brings beside `full`.

    Args:
        records: MLflow, the ledger and the feature spaces.
        champion: whose row.
        champions: all that the page shows; `full` of the same line and configuration is among them, if there is one.
        on_devices: as for `column`.
        energy: of one image; None: not known.
        gpu: measured time of 1,000 images on an accelerator; what is not in it is estimated.
        prices: that the cost is computed with.

    Raises:
        LedgerError: a newer ferry measured it.
    """
    card, subject = champion.card, champion.subject
    anew = figures(records, subject, champion.version.version)
    quality = (anew.quality if anew else [q for q in card.quality if q.split == "new"])[0]
    family = (subject.line, subject.configuration, "full")
    full = next((c for c in champions if (c.subject.line, c.subject.configuration, c.subject.variant) == family), None)
    lost = [
        estimate(row.delta, row.se, row.groups)
        for row in card.comparisons
        if (row.against, row.split, row.aspect, row.space) == ("full", "new", "images", quality.space)
        and full is not None
        and row.against_sha256 == full.version.weights
        and anew is None  # the comparison was measured in the previous spaces
    ]
    time = _gpu(champion, gpu, prices)
    price, whole = time.price(prices), _gpu(full, gpu, prices).price(prices) if full and full is not champion else 0.0
    return VariantRow(
        family=f"{subject.line}/{subject.configuration}", variant=subject.variant, version=champion.version.version,
        steps=card.sampler.steps, evaluations=card.sampler.evaluations, space=quality.space, n=quality.n,
        distance=estimate(quality.kd, quality.kd_se, quality.groups), lost=lost[0] if lost else None,
        milliseconds=card.cost.milliseconds, on_devices=on_devices, energy=energy, gpu=time, price=price,
        saving=1 - price / whole if whole else None,
    )  # fmt: skip


def update_row(records: Records, subject: Subject) -> UpdateRow | None:
    """Make the row of the newest version of a subject that the gate judged; None: its update was not made from a master."""
    newest = max(judged(records, subject), default=0)
    made = verdict(records, subject, newest) if newest else None
    return UpdateRow(str(subject), newest, made.outcome, made.update) if made and made.update else None


def _gpu(champion: Champion, gpu: Mapping[Subject, GpuTime], prices: Prices) -> GpuTime:
    operations = flop.evaluation(champion.config) * champion.card.sampler.evaluations
    return gpu.get(champion.subject) or estimated(operations, prices)


def samples(champion: Champion, same_line: Iterable[Champion]) -> tuple[bytes, bytes | None, list[str]]:
    """Choose a champion's images, and real ones, of captions that all champions of its line drew, or else of its own captions.

    Returns:
        PNG of its images, PNG of the real ones (None: an older ferry kept none), and the captions of their rows.
    """
    shared = reduce(
        lambda known, other: [caption for caption in known if caption in other.captions], same_line, champion.captions
    )
    rows = (shared or champion.captions)[:SAMPLE_ROWS]
    chosen, of = [champion.captions.index(caption) for caption in rows], len(champion.captions)
    return _rows(champion.grid, chosen, of), _rows(champion.real, chosen, of) if champion.real else None, rows


def _rows(picture: bytes, chosen: list[int], of: int) -> bytes:
    """Cut the chosen rows out of a grid of square images with `of` rows, and the first columns of each."""
    with Image.open(BytesIO(picture)) as grid:
        cell = grid.height // of
        sheet = Image.new(grid.mode, (SAMPLE_COLUMNS * cell, len(chosen) * cell))
        for y, row in enumerate(chosen):
            sheet.paste(grid.crop((0, row * cell, sheet.width, (row + 1) * cell)), (0, y * cell))
    made = BytesIO()
    sheet.save(made, "PNG", optimize=True)
    return made.getvalue()


def decisions(entries: Iterable[Entry], line: str | None = None) -> list[DecisionRow]:
    """Make a row for each entry of the ledger, the newest first.

    One `ferry remeasure` makes many entries with one reason; the last of them stands for all.

    Args:
        entries: of the ledger, in order.
        line: only entries about this line; None: all.
    """
    own = [e for e in entries if line is None or e.subject.split("/")[0] == line]
    rows = [e for e, after in zip_longest(own, own[1:]) if e.kind != "measured" or after is None or after.why != e.why]
    return [
        DecisionRow(number=e.number, when=e.when, who=e.who, kind=kind_of(e), subject=about(e), why=e.why) for e in reversed(rows)
    ]


def release_row(
    default: Champion,
    trained: Iterable[Champion],
    *,
    device_class: str,
    release: int,
    full_bytes: int,
    deltas: Sequence[int],
    metadata_bytes: int,
    rollout: str,
    on_devices: tuple[float, int] | None,
    energy: Energy | None,
    prices: Prices,
    behind: Mapping[int, int] | None = None,
) -> ReleaseRow:
    """Make the row of a release that devices run, with its cost in a year.

    Args:
        default: champion of the variant that devices draw with by default.
        trained: champions of all variants that the release holds; their training is paid for together.
        device_class: of the release.
        release: its number.
        full_bytes: size of the full bundle.
        deltas: sizes of the deltas to it; devices fetch the smallest, or the full bundle if there is none.
        metadata_bytes: of what a device fetches besides.
        rollout: state of its rollout, in words.
        on_devices: as for `column`; without a time, that of the scorecard counts.
        energy: of an image; None: not known.
        prices: that the costs are computed with.
        behind: bytes of deltas that a device fetches, by the number of releases that it is behind.
    """
    smallest = min(deltas, default=None)
    work = Work(
        joules=energy.joules if energy else None,
        update_bytes=(full_bytes if smallest is None else smallest) + metadata_bytes,
        training_seconds=sum(c.train_seconds for c in trained),
    )
    return ReleaseRow(
        line=default.subject.line,
        device_class=device_class,
        release=release,
        full_bytes=full_bytes,
        delta_bytes=smallest,
        metadata_bytes=metadata_bytes,
        rollout=rollout,
        milliseconds=on_devices[0] if on_devices else default.card.cost.milliseconds,
        costs=yearly(work, prices),
        behind=behind or {},
    )


def go_back(records: Records, subject: Subject, releases: Mapping[str, Mapping[int, int]]) -> list[str]:
    """List the commands that go back to the version before the champion, one for each device class that a release of it reached.

    If no release holds that version, the command makes it champion only. The version is the one that was promoted last through
    the gate, apart from the champion.

    Args:
        records: MLflow and the ledger.
        subject: whose champion.
        releases: for each device class that runs the configuration, the newest release of each version.

    Raises:
        CatalogError: MLflow does not have the champion any more, or an older ferry kept no hashes of it.
    """
    champion = champion_of(records, subject)
    was = [int(e.facts["version"]) for e in promotions(records, subject, overruled=False)]
    earlier = [version for version in was if champion and version != champion.version]
    if not earlier:
        return []
    commands = [
        f'ferry promote {subject} {earlier[-1]} --reason "going back" && ferry release {subject.line}/{device_class} && '
        f"ferry rollout start {subject.line}/{device_class} --release {known[earlier[-1]]} --revert --waves 100 --soak 0"
        for device_class, known in releases.items()
        if earlier[-1] in known
    ]
    return commands or [f'ferry rollback {subject} --to {earlier[-1]} --reason "going back"']  # no device ever had it
