"""The one-page report: what runs, how good it is, what it cost and brought, what changed, how to go back.

`render` is a pure function from figures to one self-contained HTML page; it prints on one A4 page and needs no network.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from datetime import datetime

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class ModelRow:
    """A champion, and what it replaced."""

    subject: str
    version: int
    tier: str
    data_rev: str
    kd: dict[str, float]
    """Kernel distance to held-out images by feature space; smaller is better."""
    kd_before: dict[str, float]
    """The same for the champion before, on the same images; empty for a first version."""
    n: int
    steps: int
    milliseconds: float
    train_seconds: float
    reason: str
    samples: bytes
    """PNG."""
    captions: list[str]


@dataclass(frozen=True)
class ReleaseRow:
    """What was published for a line and class."""

    line: str
    device_class: str
    release: int
    version: int
    full_bytes: int
    delta_bytes: int | None
    metadata_bytes: int
    rollout: str


@dataclass(frozen=True)
class DeviceRow:
    """A device, as it last reported."""

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
class Prices:
    """What things cost the user."""

    currency: str
    megabyte: float
    training_hour: float
    fleet: int


@dataclass(frozen=True)
class Report:
    """Everything on the page."""

    title: str
    made: datetime
    models: list[ModelRow]
    releases: list[ReleaseRow]
    devices: list[DeviceRow]
    decisions: list[DecisionRow]
    prices: Prices
    energy: str = "not measured: this machine has no sensor that DeltaFerry reads"
    go_back: list[str] = field(default_factory=list)


def traffic_cost(size: int, prices: Prices) -> float:
    """Price of sending `size` bytes to every device of the fleet."""
    return size / 1e6 * prices.megabyte * prices.fleet


def render(report: Report) -> str:
    """The page, as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = human_size
    environment.filters["image"] = lambda data: base64.b64encode(data).decode()
    environment.filters["money"] = lambda value: f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return environment.from_string(PAGE).render(r=report, traffic=lambda size: traffic_cost(size, report.prices))


def human_size(size: int) -> str:
    """Bytes in the unit a person would use."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.0f} kB" if size < 1_000_000 else f"{size / 1e6:.2f} MB"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ r.title }}</title>
<style>
  @page { size: A4; margin: 12mm }
  :root { --ink: #1b2430; --soft: #5c6875; --line: #d9dfe5; --good: #17663a; --bad: #a32020; --tint: #f4f7f9 }
  * { box-sizing: border-box }
  body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 0 auto; padding: 1.2rem }
  h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.02rem; margin: 1.3rem 0 .4rem }
  .soft { color: var(--soft); font-size: .85rem } .good { color: var(--good) } .bad { color: var(--bad) }
  .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: .9rem 0 }
  .tile { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
  .tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums }
  .scroll { overflow-x: auto }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem }
  th { text-align: left; font-weight: 600; color: var(--soft) } th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
  td.n, th.n { text-align: right }
  .samples { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 }
  .samples img { image-rendering: pixelated; width: 100%; border: 1px solid var(--line) }
  figcaption { font-size: .8rem; color: var(--soft) } figure { flex: 1 1 18rem; max-width: 27rem }
  code { background: var(--tint); padding: .1rem .3rem; border-radius: .25rem; overflow-wrap: anywhere }
  @media print { body { padding: 0; font-size: 10.5px } figure { max-width: 62mm } h2 { margin: .6rem 0 .2rem } .tile b { font-size: 1rem } }
</style>
</head>
<body>
<h1>{{ r.title }}</h1>
<p class="soft">Made {{ r.made.strftime("%Y-%m-%d %H:%M") }} UTC from the registry, the signed repository and the devices' own reports.</p>

<div class="tiles">
{% for x in r.releases %}
  <div class="tile"><span class="soft">{{ x.line }}/{{ x.device_class }}, an update</span>
    {% if x.delta_bytes %}<b>{{ x.delta_bytes | size }}</b>instead of {{ x.full_bytes | size }}
    {% else %}<b>{{ x.full_bytes | size }}</b>in full, no earlier version{% endif %}</div>
{% endfor %}
  <div class="tile"><span class="soft">devices heard of</span><b>{{ r.devices | length }}</b>{% set bad = r.devices | selectattr("event", "equalto", "refused") | list | length %}
    {% if bad %}{{ bad }} last refused a release{% else %}none has a complaint{% endif %}</div>
{% for m in r.models %}
  <div class="tile"><span class="soft">{{ m.subject }}, an image</span><b>{{ "%.0f" | format(m.milliseconds) }} ms</b>{{ m.steps }} steps, one core</div>
{% endfor %}
</div>

<h2>How good the models are</h2>
<div class="scroll"><table>
<tr><th>Model</th><th class="n">Version</th><th class="n">Distance to real images<br>trained / random features</th><th class="n">Before it, same images</th><th class="n">Images</th><th class="n">Training</th><th>Why it was promoted</th></tr>
{% for m in r.models %}
<tr><td>{{ m.subject }}<br><span class="soft">{{ m.tier }}, data {{ m.data_rev[:8] }}</span></td><td class="n">{{ m.version }}</td>
<td class="n">{% for v in m.kd.values() %}{{ "%.2f" | format(v) }}{{ " / " if not loop.last }}{% endfor %}</td>
<td class="n">{% if m.kd_before %}{% for v in m.kd_before.values() %}{{ "%.2f" | format(v) }}{{ " / " if not loop.last }}{% endfor %}{% else %}first version{% endif %}</td>
<td class="n">{{ m.n }}</td><td class="n">{{ "%.0f" | format(m.train_seconds) }} s</td><td>{{ m.reason }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">The distance is a kernel distance (MMD²) between generated and held-out images; 0 is perfect. It is not an FID and can
only be compared within this page.</p>

<h2>What they draw</h2>
<div class="samples">
{% for m in r.models %}
<figure><img alt="samples of {{ m.subject }}" src="data:image/png;base64,{{ m.samples | image }}">
<figcaption>{{ m.subject }} version {{ m.version }}. Rows: {{ m.captions | join(" · ") }}</figcaption></figure>
{% endfor %}
</div>

<h2>What an update costs a fleet of {{ "{:,}".format(r.prices.fleet) }} devices</h2>
<div class="scroll"><table>
<tr><th>Line and class</th><th class="n">In full</th><th class="n">As a delta</th><th class="n">Metadata</th><th class="n">Traffic in full</th><th class="n">Traffic as a delta</th><th>Rollout</th></tr>
{% for x in r.releases %}
<tr><td>{{ x.line }}/{{ x.device_class }} release {{ x.release }}</td><td class="n">{{ x.full_bytes | size }}</td><td class="n">{{ x.delta_bytes | size if x.delta_bytes else "–" }}</td><td class="n">{{ x.metadata_bytes | size }}</td>
<td class="n">{{ traffic(x.full_bytes + x.metadata_bytes) | money }} {{ r.prices.currency }}</td>
<td class="n good">{% if x.delta_bytes %}{{ traffic(x.delta_bytes + x.metadata_bytes) | money }} {{ r.prices.currency }}{% else %}–{% endif %}</td><td>{{ x.rollout }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">At {{ r.prices.megabyte }} {{ r.prices.currency }} a megabyte, from ferry.toml. Training the models above took
{{ "%.0f" | format(r.models | sum(attribute="train_seconds")) }} s, {{ (r.models | sum(attribute="train_seconds") / 3600 * r.prices.training_hour) | money }} {{ r.prices.currency }}. Energy: {{ r.energy }}.</p>

<h2>Devices</h2>
<div class="scroll"><table>
<tr><th>Device</th><th>Runs</th><th>Last report</th><th>Reason</th></tr>
{% for d in r.devices %}
<tr><td>{{ d.device }}</td><td>{{ d.release }}</td><td class="{{ 'bad' if d.event in ('refused', 'rolled_back', 'failed', 'base_corrupt') else 'good' }}">{{ d.event }}{% if d.when %} <span class="soft">{{ d.when.strftime("%Y-%m-%d %H:%M") }}</span>{% endif %}</td><td>{{ d.reason | truncate(140) }}</td></tr>
{% else %}<tr><td colspan="4">No device has reported yet.</td></tr>
{% endfor %}
</table></div>

<h2>What changed, and who decided it</h2>
<div class="scroll"><table>
<tr><th class="n">No.</th><th>When (UTC)</th><th>Who</th><th>What</th><th>Why</th></tr>
{% for e in r.decisions %}
<tr><td class="n">{{ e.number }}</td><td>{{ e.when[:16] | replace("T", " ") }}</td><td>{{ e.who }}</td><td>{{ e.kind }}, {{ e.subject }}</td><td>{{ e.why | truncate(140) }}</td></tr>
{% endfor %}
</table></div>

<h2>How to go back</h2>
{% for command in r.go_back %}<p><code>{{ command }}</code></p>{% else %}<p>There is nothing to go back to yet.</p>{% endfor %}
</body>
</html>
"""
