"""The one-page report: quality of the models, their cost compared with a cloud, what changed, and how to roll back.

`render` is a pure function: it turns figures into one self-contained HTML page. The page needs no network and no script, is
readable on a phone, and prints on one A4 page for up to two lines. Its readers decide about money, not about models, so each
figure says in plain words what it is.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from model.scorecard import CaptionCheck, Comparison, Quality
from registry.budget import began, holding
from registry.cost import GpuTime, Prices, Row, Side, energy, images, total
from registry.curve import Point, Update
from registry.selection import quantile

TEMPLATES = Path(__file__).parent / "templates"
LEVEL = 0.95
WORST_SHOWN = 3  # captions that a model draws worst
BAD_EVENTS = ("refused", "rolled_back", "failed", "base_corrupt", "strayed")


@dataclass(frozen=True)
class Distance:
    """Distance of generated images from real ones, on a scale from 0 (no distance) to 1 (as far as pure noise)."""

    share: float
    low: float
    high: float
    """Upper bound of the 95 % interval; `low` is its lower bound."""
    kd: dict[str, float]
    """Squared kernel distance by feature space."""
    n: int
    real: float | None = None
    """Distance between two sets of 25 groups of real images, on the same scale; None: an older ferry did not measure it."""

    @property
    def word(self) -> str:
        """The distance in plain words: what the interval shows, not what the single estimate suggests."""
        if self.low <= 0:
            return f"cannot be told from real images by this measure (n = {self.n})"
        if not self.real:
            return "measurably different from real images"
        times = f"{self.share / self.real:.1f} times as far from real images as two sets of real images are from each other"
        return f"measurably different{', but not by much' if self.share < self.real else ''}: {times}"


@dataclass(frozen=True)
class Change:
    """Effect of replacing the previous version, on the same captions and seeds."""

    before: float
    after: float
    """`Distance.share` of the new version; `before` is that of the previous one."""
    delta: float
    low: float
    high: float
    """`delta` is the difference of the squared kernel distances, `low` and `high` its 95 % interval; below 0 is better."""
    n: int

    @property
    def word(self) -> str:
        """The change in plain words."""
        said = "closer to real" if self.high < 0 else "further from real" if self.low > 0 else "no certain difference"
        return f"{said} on the new data"


@dataclass(frozen=True)
class Energy:
    """Energy of one image in joules, and the source of that figure."""

    joules: float
    low: float | None
    high: float | None
    source: str
    quality: str


@dataclass(frozen=True)
class ModelColumn:
    """A champion: one column of the comparison."""

    subject: str
    variant: str
    version: int
    tier: str
    data_rev: str
    data_message: str
    distance: Distance
    change: Change | None
    replaced: int | None
    """Number of the version that it replaced; None for a first version."""
    reason: str
    """Why it was promoted: the gate's words, or a person's."""
    steps: int
    evaluations: int
    milliseconds: float
    on_devices: tuple[float, int] | None
    """Median milliseconds of one image that devices reported, and the number of devices; None: no report has a time."""
    peak_mib: float
    energy: Energy | None
    train_seconds: float
    samples: bytes
    """PNG: a row for each caption."""
    real: bytes | None
    """PNG: held-out real images of the same captions; None: an older ferry kept none."""
    captions: list[str]
    ratings: list[str]
    """Results of blind comparisons by people, one text each."""
    worst: list[str] = field(default_factory=list)
    """Captions and words that it draws worst, each with the share that it draws in percent."""
    refused: str | None = None
    """What the gate said of a version that was promoted although the gate had refused it."""
    anew: str | None = None
    """Data revision on which likeness and worst captions were measured anew; None: they are those of the scorecard."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class VariantRow:
    """What a variant costs and brings, beside `full` of the same line and configuration."""

    family: str
    """LINE/CONFIGURATION."""
    variant: str
    version: int
    steps: int
    evaluations: int
    space: str
    """Feature space of `distance` and `lost`."""
    n: int
    """Images behind them."""
    distance: Estimate
    """Squared kernel distance from real images."""
    lost: Estimate | None
    """The same minus that of `full`, on the same captions and seeds; None: it is `full`, or was not compared with the present one."""
    milliseconds: float
    on_devices: tuple[float, int] | None
    energy: Energy | None
    gpu: GpuTime
    price: float
    """Of 1,000 images on a rented accelerator."""
    saving: float | None
    """Share of that of `full` that it saves; None: it is `full`, or there is none."""

    @property
    def word(self) -> str:
        """What the interval of `lost` shows."""
        if self.lost is None:
            return "" if self.variant == "full" else "not compared with the present full"
        return (
            "further than full" if self.lost.low > 0 else "closer than full" if self.lost.high < 0 else "not told apart from full"
        )


@dataclass(frozen=True)
class UpdateRow:
    """How small the update of a subject's last retraining was made, and what it keeps."""

    subject: str
    version: int
    outcome: str
    """The gate's answer."""
    update: Update

    @property
    def points(self) -> list[Point]:
        """The sizes that were tried, the largest first; without a budget the one that was made."""
        own = self.update
        alone = Point(limit=own.bytes, bytes=own.bytes, noise=own.noise, kept=own.kept)
        return own.curve or [alone]

    @property
    def began(self) -> str:
        """Where its training started, in words."""
        return began(self.update)

    @property
    def held(self) -> str:
        """Why it is coarser than the settings ask for, in words; empty: it is not."""
        return holding(self.update)


@dataclass(frozen=True)
class ReleaseRow:
    """A published release of a line and class, and its cost in a year."""

    line: str
    device_class: str
    release: int
    full_bytes: int
    delta_bytes: int | None
    metadata_bytes: int
    rollout: str
    milliseconds: float
    """Time of one image in the class's default variant."""
    costs: list[Row]
    behind: Mapping[int, int] = field(default_factory=dict)
    """Releases that a device is behind → bytes of the deltas that it fetches; it needs no entry where it fetches the full bundle."""

    @property
    def update_bytes(self) -> int:
        """Bytes that a device fetches for an update: the delta, or the full bundle if there is none, and the metadata."""
        return (self.delta_bytes or self.full_bytes) + self.metadata_bytes


@dataclass(frozen=True)
class DeviceRow:
    """The last report of a device."""

    device: str
    release: str
    event: str
    reason: str
    when: datetime | None


@dataclass(frozen=True)
class DecisionRow:
    """An entry of the ledger."""

    number: int
    when: str
    who: str
    kind: str
    subject: str
    why: str


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    title: str
    made: datetime
    models: list[ModelColumn]
    releases: list[ReleaseRow]
    devices: list[DeviceRow]
    decisions: list[DecisionRow]
    prices: Prices
    go_back: list[str] = field(default_factory=list)
    variants: list[VariantRow] = field(default_factory=list)
    """By line and configuration, from the highest quality and cost to the lowest."""
    updates: list[UpdateRow] = field(default_factory=list)
    """Of the last retraining of each subject whose update was made smaller from a master."""
    older: int = 0
    """Decisions that are not on the page."""


@dataclass(frozen=True)
class _DeviceGroup:
    """Devices with the same release, event and reason."""

    devices: list[str]
    release: str
    event: str
    reason: str
    when: datetime | None


def distance(qualities: Iterable[Quality]) -> Distance:
    """Compute the distance from real images as a share of that of noise, in the feature space where this share is largest.

    The share is the square root of the kernel distance divided by that of noise. Its 95 % interval uses Student's t over the
    groups of held-out images.
    """
    found = list(qualities)
    worse = max(found, key=lambda q: q.kd / q.noise_kd)
    half = quantile(worse.groups, (1 - LEVEL) / 2) * worse.kd_se
    share, low, high = (_share(kd, worse.noise_kd) for kd in (worse.kd, worse.kd - half, worse.kd + half))
    real = _share(worse.band, worse.noise_kd) if worse.band is not None else None
    return Distance(share, low, high, {q.space: q.kd for q in found}, worse.n, real)


def estimate(value: float, se: float, groups: int) -> Estimate:
    """Make a figure's 95 % interval by Student's t over the groups of held-out images."""
    half = quantile(groups, (1 - LEVEL) / 2) * se
    return Estimate(value, value - half, value + half)


def worst(rows: Iterable[CaptionCheck]) -> list[str]:
    """List the captions and words that a model draws worst, as text; leave out those that no feature space tells apart."""
    known = sorted((row.share, row.caption) for row in rows if row.share is not None and row.apart > 2 * row.apart_se)
    return [f"{caption}: {100 * max(share, 0.0):.0f} %" for share, caption in known[:WORST_SHOWN]]


def change(qualities: Iterable[Quality], comparisons: Iterable[Comparison]) -> Change | None:
    """Return the change since the previous version, in the least favourable feature space; None: there is no comparison."""
    noise = {q.space: q for q in qualities}
    found = [c for c in comparisons if c.space in noise and c.aspect == "images"]
    if not found:
        return None

    def high(c: Comparison) -> float:
        return c.delta + quantile(c.groups, (1 - LEVEL) / 2) * c.se

    row = max(found, key=lambda c: high(c) / noise[c.space].noise_kd)
    own = noise[row.space]
    before, after = _share(row.champion_kd, own.noise_kd), _share(row.champion_kd + row.delta, own.noise_kd)
    return Change(before, after, row.delta, 2 * row.delta - high(row), high(row), row.n)


def _share(kd: float, noise: float) -> float:
    return math.sqrt(max(kd, 0.0) / noise)  # the unbiased estimate of a small distance may lie below zero


def render(report: Report) -> str:
    """Render the report as an HTML page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "size": human_size, "seconds": human_seconds, "money": human_money, "small": human_small,
        "hours": lambda seconds: f"{timedelta(seconds=round(seconds))} h",
        "share": lambda value: f"{100 * value:.0f} %",
        "image": lambda data: base64.b64encode(data).decode(),
    }  # fmt: skip
    return environment.get_template("report.html").render(
        r=report, devices=grouped(report.devices), bad_events=BAD_EVENTS, images=images(report.prices), total=_total,
        electricity=lambda joules: energy(joules, report.prices) * 1000,
    )  # fmt: skip


def _total(row: ReleaseRow, side: Side) -> float:
    return total(row.costs, side)


def grouped(devices: list[DeviceRow]) -> list[_DeviceGroup]:
    """Group devices with the same release, event and reason: groups with a failure first, then by size, the largest last."""
    found: dict[tuple[str, str, str], list[DeviceRow]] = {}
    for device in devices:
        found.setdefault((device.release, device.event, device.reason), []).append(device)
    groups = [
        _DeviceGroup(
            [d.device for d in rows], release, event, reason, max((d.when for d in rows if d.when), default=None)
        )
        for (release, event, reason), rows in found.items()
    ]  # fmt: skip
    return sorted(groups, key=lambda group: (group.event not in BAD_EVENTS, len(group.devices)))


def human_size(size: int) -> str:
    """Format a number of bytes in B, kB or MB."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1e6:.2f} MB"


def human_seconds(milliseconds: float) -> str:
    """Format milliseconds as seconds, with one decimal place from 1 s on and two significant digits below."""
    seconds = milliseconds / 1000
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:#.2g} s"


def human_money(value: float) -> str:
    """Format an amount: whole from 100 on, with two decimal places below, and as "less than 0.01" if it is tiny."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if value >= 0.01 else "less than 0.01"


def human_small(value: float) -> str:
    """Format a figure with two significant digits, without an exponent however small it is."""
    digits = max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"
