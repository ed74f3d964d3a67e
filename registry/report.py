"""The one-page report: quality of the models, their cost compared with a cloud, what changed, and how to roll back.

`render` is a pure function: it turns figures into one self-contained HTML page. The page needs no network and no script, is
readable on a phone, and prints on one A4 page for up to two lines. Its readers decide about money, not about models, so each
figure says in plain words what it is.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from model.scorecard import CaptionCheck, Comparison, Quality
from registry.cost import Prices, Row, Side, energy, images, total
from registry.selection import quantile

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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "size": human_size, "seconds": human_seconds, "money": human_money, "bar": bar,
        "share": lambda value: f"{100 * value:.0f} %",
        "image": lambda data: base64.b64encode(data).decode(),
    }  # fmt: skip
    return environment.from_string(PAGE).render(
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


def bar(d: Distance) -> Markup:
    """Draw the distance on an SVG line from real (left) to noise (right); the thick part is its interval."""
    at, low, high = (100 * min(value, 1.0) for value in (d.share, d.low, d.high))
    says = f"distance {100 * d.share:.0f} %, 95 % interval {100 * d.low:.0f} to {100 * d.high:.0f} %, on a line from 0 % (none) to 100 % (noise)"
    if d.real is not None:
        says += f"; real images from each other {100 * d.real:.0f} %"
    return Markup(
        '<svg class="bar" viewBox="-2 0 104 12" preserveAspectRatio="none" role="img" aria-label="{}"><rect x="0" y="1" width="{}" height="10" fill="#d5dbe1"/>'
        '<line x1="0" x2="100" y1="6" y2="6" stroke="#8893a0"/>'
        '<rect x="{}" y="3" width="{}" height="6" fill="#7da7d9"/><rect x="{}" y="0" width="2" height="12" fill="#1b2430"/></svg>'
    ).format(says, f"{100 * min(d.real or 0.0, 1.0):.1f}", f"{low:.1f}", f"{max(high - low, 0.5):.1f}", f"{at - 1:.1f}")


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


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ r.title }}</title>
<style>
  @page { size: A4; margin: 10mm }
  :root { --ink: #1b2430; --soft: #4d5966; --line: #d3dae1; --good: #17663a; --bad: #a32020; --tint: #f3f6f9 }
  * { box-sizing: border-box }
  body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 68rem; margin: 0 auto; padding: 1.2rem }
  h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 1.5rem 0 .3rem } p { margin: .35rem 0 }
  .soft { color: var(--soft); font-size: .86rem } .good { color: var(--good) } .bad { color: var(--bad) }
  .lead { font-size: 1.08rem; background: var(--tint); border-left: 4px solid #7da7d9; padding: .6rem .9rem; margin: .8rem 0 }
  .lead b { font-size: 1.25rem; white-space: nowrap }
  .scroll { overflow-x: auto }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem }
  th { text-align: left; font-weight: 600; color: var(--soft) } thead th { color: var(--ink) }
  th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
  .side th[scope=row] { width: 11rem; min-width: 7.5rem } .side td { min-width: 10.5rem; width: {{ 80 // r.models | length }}% }
  .narrow { display: none } .last { min-width: 38rem } .last th:last-child { width: 55% }
  td.n, th.n { text-align: right } tfoot td, tfoot th { font-weight: 700; color: var(--ink) }
  .bar { display: block; width: 100%; max-width: 13rem; height: 12px; margin: .15rem 0 }
  .pair { display: flex; gap: .6rem } .pair figure { margin: 0; flex: 0 1 15rem } .pair figcaption { color: var(--soft); font-size: .86rem }
  .samples { image-rendering: pixelated; width: 100%; max-width: 15rem; display: block; border: 1px solid var(--line) }
  code { background: var(--tint); padding: .1rem .3rem; border-radius: .25rem; overflow-wrap: anywhere }
  @media screen and (max-width: 40rem) {
    body { padding: .8rem } .how { display: none } .narrow { display: block }
    .side th[scope=row] { width: 7.5rem; position: sticky; left: 0; background: #fff }
  }
  @media print {
    body { padding: 0; max-width: none; font-size: 9.1px; line-height: 1.25 } h1 { font-size: 14px } h2 { margin: 4px 0 0; font-size: 10.5px }
    p { margin: 2px 0 } .lead { font-size: 10px; padding: 2px 8px; margin: 3px 0 } .lead b { font-size: 11.5px } .soft { font-size: 8.1px }
    table { font-size: 8.8px } .last { min-width: 0 } .last tr:nth-child(n+6) { display: none } th, td { padding: 1px 6px 1px 0 } .scroll { overflow: visible } .bar { height: 7px; max-width: 40mm; margin: 1px 0 }
    .pair { gap: 2mm } .pair figcaption { font-size: 8.1px } .samples { max-width: 28mm } .side td { min-width: 0 } .side th[scope=row] { width: 31mm; min-width: 0 }
    * { print-color-adjust: exact; -webkit-print-color-adjust: exact } tr, .lead { break-inside: avoid }
  }
</style>
</head>
<body>
<h1>{{ r.title }}</h1>
<p class="soft">Made {{ r.made.strftime("%Y-%m-%d %H:%M") }} UTC from the registry, the signed repository and the devices' own reports.
† marks what counts with a price that nobody has entered yet: an assumption.</p>

{% for x in r.releases %}
{% set here = total(x, "devices") %}{% set cloud = total(x, "cloud") %}
<p class="lead">{{ x.line }} on {{ x.device_class }}:
{% if x.delta_bytes %}an update is <b>{{ x.update_bytes | size }}</b> to fetch instead of {{ (x.full_bytes + x.metadata_bytes) | size }},
{% else %}the first delivery is <b>{{ x.update_bytes | size }}</b> to fetch,
{% endif %}
an image takes <b>{{ x.milliseconds | seconds }}</b>,
and {{ "{:,}".format(r.prices.fleet) }} devices cost <b>{{ here | money }} {{ r.prices.currency }}</b> a year where a cloud would cost
{{ "only " if cloud < here else "" }}{{ cloud | money }} {{ r.prices.currency }}{{ " †" if x.costs | selectattr("assumed") | list else "" }}{{ " (the devices' electricity was not measured and is not in it)" if x.costs | selectattr("devices", "none") | list else "" }}.</p>
{% endfor %}

<h2>The present models, side by side</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Comparison of the models"><table class="side">
<thead><tr><th scope="col">Model</th>{% for m in r.models %}<th scope="col">{{ m.subject }}<br><span class="soft">version {{ m.version }}, size “{{ m.tier }}”</span></th>{% endfor %}</tr></thead>
<tbody>
<tr><th scope="row">Likeness to real images</th>{% for m in r.models %}<td>{% if m.refused %}<b class="bad">The gate refused this model, and a person overruled it:</b> {{ m.refused | truncate(300) }}<br>{% endif %}<b>{{ m.distance.word }}</b>{{ m.distance | bar }}
<span class="soft">distance {{ m.distance.share | share }} ({{ m.distance.low | share }} to {{ m.distance.high | share }}), {{ m.distance.n }} images{% if m.anew %}; measured anew on data revision {{ m.anew[:8] }}{% endif %}</span></td>{% endfor %}</tr>
<tr><th scope="row">What it draws</th>{% for m in r.models %}<td><div class="pair"><figure><img class="samples" alt="samples drawn by {{ m.subject }} for: {{ m.captions | join(', ') }}" src="data:image/png;base64,{{ m.samples | image }}"><figcaption>drawn</figcaption></figure>
{% if m.real %}<figure><img class="samples" alt="real images that the model never saw, of: {{ m.captions | join(', ') }}" src="data:image/png;base64,{{ m.real | image }}"><figcaption>real, never seen by the model</figcaption></figure>{% endif %}</div>
<span class="soft">{{ m.captions | join(" · ") }}</span></td>{% endfor %}</tr>
{% if r.models | selectattr("worst") | list %}<tr><th scope="row">What it draws worst</th>{% for m in r.models %}<td>{{ m.worst | join(" · ") or "not measured" }}</td>{% endfor %}</tr>
{% endif %}
<tr><th scope="row">Steps for an image</th>{% for m in r.models %}<td>{{ m.steps }} <span class="soft">({{ m.evaluations }} runs of the network)</span></td>{% endfor %}</tr>
<tr><th scope="row">Time for an image</th>{% for m in r.models %}<td>{{ m.milliseconds | seconds }} <span class="soft">in the factory, one core</span>
{% if m.on_devices %}<br>{{ m.on_devices[0] | seconds }} <span class="soft">on {{ m.on_devices[1] }} device{{ "s" if m.on_devices[1] > 1 else "" }} that reported it</span>{% endif %}</td>{% endfor %}</tr>
<tr><th scope="row">Memory, at its peak</th>{% for m in r.models %}<td>{{ "%.0f" | format(m.peak_mib) }} MiB</td>{% endfor %}</tr>
<tr><th scope="row">Energy for an image</th>{% for m in r.models %}<td>{% if m.energy %}{{ "%.3g" | format(m.energy.joules) }} J{% if m.energy.low is not none %} ({{ "%.3g" | format(m.energy.low) }} to {{ "%.3g" | format(m.energy.high) }}){% endif %} <span class="soft">{{ {"measured": "measured", "partial": "measured in part", "model": "calculated, not measured"}[m.energy.quality] }}: {{ m.energy.source }}; 1,000 images cost {{ electricity(m.energy.joules) | money }} {{ r.prices.currency }}{{ " †" if r.prices.assumed("kilowatt_hour") else "" }}</span>
{% else %}not measured{% endif %}</td>{% endfor %}</tr>
<tr><th scope="row">Training</th>{% for m in r.models %}<td>{{ "%.0f" | format(m.train_seconds) }} s</td>{% endfor %}</tr>
<tr><th scope="row">What changed</th>{% for m in r.models %}<td>{% if m.replaced %}{% if m.change %}<b class="{{ 'good' if m.change.high < 0 else 'bad' if m.change.low > 0 else '' }}">{{ m.change.word }}</b>, version {{ m.replaced }} → {{ m.version }}: {{ m.change.before | share }} → {{ m.change.after | share }}
 <span class="soft">(difference {{ "%+.4f" | format(m.change.delta) }}, {{ "%+.4f" | format(m.change.low) }} to {{ "%+.4f" | format(m.change.high) }}, {{ m.change.n }} images)</span>{% else %}replaced version {{ m.replaced }}{% endif %}{% else %}first version{% endif %}
<br><span class="soft">Data: {{ m.data_message | truncate(60) }} ({{ m.data_rev[:8] }}). Decided: {{ m.reason | truncate(150) }}</span></td>{% endfor %}</tr>
<tr><th scope="row">What people say</th>{% for m in r.models %}<td>{% for text in m.ratings %}{{ text }}{{ "<br>" | safe if not loop.last }}{% else %}<span class="soft">nobody has compared images blind (<code>ferry rate {{ m.subject }}</code>)</span>{% endfor %}</td>{% endfor %}</tr>
</tbody></table></div>
<p class="soft">Likeness: 100 % is pure noise. The true figure lies within the blue part of the bar with 95 % certainty; the grey part is how far two
sets of real images, of 25 photographs or parts each, lie from each other. It says how like the images are as a whole; whether one can be used, look at them and
let people compare them. (Root of a kernel distance, MMD, over that of noise, in the worst feature space; no FID, compare within this page only.)
{% if r.models | selectattr("worst") | list %}Drawn worst: 100 % is as real images of the caption, 0 % as if it had not been asked for. {% endif %}
{% if r.models | rejectattr("energy") | list %}Energy: measure it with <code>ferry-agent bench</code> on a device, and enter the figure with its source in ferry.toml under [energy.LINE.CLASS.VARIANT].{% endif %}</p>

{% if r.releases %}{% set alone = r.releases | length == 1 %}
<h2>What a year costs: {{ "{:,}".format(r.prices.fleet) }} devices, {{ "{:,.0f}".format(r.prices.images_per_day) }} images a day each{{ " †" if r.prices.assumed("fleet", "images_per_day") else "" }}</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Costs of a year"><table>
<thead><tr><th scope="col">{{ r.prices.currency }} a year</th>{% for x in r.releases %}<th scope="col" class="n">{{ x.line }} on {{ x.device_class }}</th><th scope="col" class="n">the same from a cloud</th>{% endfor %}{% if alone %}<th scope="col" class="how">How it is counted</th>{% endif %}</tr></thead>
<tbody>
{% for row in r.releases[0].costs %}{% set i = loop.index0 %}
<tr><th scope="row">{{ row.name }}{{ " †" if row.assumed else "" }}</th>{% for x in r.releases %}<td class="n">{% if x.costs[i].devices is none %}not measured{% else %}{{ x.costs[i].devices | money }}{% endif %}</td><td class="n">{% if x.costs[i].cloud is none %}–{% else %}{{ x.costs[i].cloud | money }}{% endif %}</td>{% endfor %}{% if alone %}<td class="soft how">{{ row.how }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
<tfoot><tr><th scope="row">Together</th>{% for x in r.releases %}<td class="n">{{ total(x, "devices") | money }}</td><td class="n">{{ total(x, "cloud") | money }}</td>{% endfor %}{% if alone %}<td class="how"></td>{% endif %}</tr>
<tr><th scope="row">For 1,000 images</th>{% for x in r.releases %}{% for side in ("devices", "cloud") %}<td class="n">{{ (total(x, side) / images * 1000) | money if images else "–" }}</td>{% endfor %}{% endfor %}{% if alone %}<td class="how"></td>{% endif %}</tr></tfoot>
</table></div>
<p class="soft{{ " narrow" if alone else "" }}">{% for row in r.releases[0].costs %}{{ row.name }}: {{ row.how }}. {% endfor %}</p>
<p class="soft">{% for x in r.releases %}{{ x.line }}/{{ x.device_class }} release {{ x.release }}: {{ x.full_bytes | size }} in full, {{ x.delta_bytes | size + " as a delta" if x.delta_bytes else "no delta yet" }}, {{ x.metadata_bytes | size }} of signatures; {{ x.rollout }}. {% endfor %}
Prices are yours to enter in ferry.toml under [prices].</p>
{% endif %}

<h2>Devices</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Devices"><table class="last">
<thead><tr><th scope="col" class="n">How many</th><th scope="col">Run</th><th scope="col">Last said</th><th scope="col">Why</th></tr></thead>
<tbody>
{% for g in devices[:5] %}
<tr><td class="n">{{ g.devices | length }}</td><td>{{ g.release }} <span class="soft">{{ g.devices[:3] | join(", ") }}{{ ", …" if g.devices | length > 3 else "" }}</span></td>
<td class="{{ 'bad' if g.event in bad_events else 'good' }}">{{ g.event | replace("_", " ") }}{% if g.when %} <span class="soft">{{ g.when.strftime("%Y-%m-%d %H:%M") }}</span>{% endif %}</td><td>{{ g.reason | truncate(90) }}</td></tr>
{% else %}<tr><td colspan="4">No device has reported yet.</td></tr>
{% endfor %}
</tbody></table></div>
{% if devices | length > 5 %}<p class="soft">{{ devices | length - 5 }} more groups: <code>ferry fleet status</code></p>{% endif %}

<h2>Who decided what, newest first</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Decisions"><table class="last">
<thead><tr><th scope="col" class="n">No.</th><th scope="col">When (UTC)</th><th scope="col">Who</th><th scope="col">What</th><th scope="col">Why</th></tr></thead>
<tbody>
{% for e in r.decisions %}
<tr><td class="n">{{ e.number }}</td><td>{{ e.when[:16] | replace("T", " ") }}</td><td>{{ e.who | truncate(16) }}</td><td>{{ e.kind }}, {{ e.subject | truncate(80) }}</td><td>{{ e.why | truncate(100) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if r.older %}<p class="soft">{{ r.older }} older: <code>ferry history</code></p>{% endif %}

<h2>How to go back</h2>
{% for command in r.go_back %}<p><code>{{ command }}</code></p>{% else %}<p>No model has an earlier version that passed the gate.</p>{% endfor %}
</body>
</html>
"""
