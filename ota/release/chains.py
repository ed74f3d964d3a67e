"""Which deltas a release gets, and what a device fetches that is several releases behind. Only values; no I/O.

Each release gets the single step from the release before it, and devices further behind chain these steps (`ota.chain`). Another
delta is published only for devices that cannot chain, or where it saves more than it costs: every device of the class fetches its
entry in the metadata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ota.chain import DIGITS, Link, size_of, way
from ota.release.compatibility import OLDEST_AGENT, is_older
from ota.report import DeviceReport

READ_SINCE: dict[int, str] = {1: "0.1.0", 2: "0.3.0"}
"""Format of a delta → oldest agent that reads it. Agents that read format 2 also chain deltas."""
FIRST, NEWEST = min(READ_SINCE), max(READ_SINCE)
PREVIOUS = 2  # releases before this one that get a delta for agents that cannot chain, even if no device reports them
ENTRY = 160  # bytes that a delta adds to the metadata of its class


@dataclass(frozen=True)
class Wanted:
    """A delta to build, from the bundle whose manifest has the hash `base`."""

    base: str
    form: int
    """Its format."""
    devices: int | None = None
    """Devices for which it is built beside the single steps; None: it is published whatever it saves."""


def wanted(
    order: Sequence[str], target: str, last: Iterable[DeviceReport], oldest_agent: str | None, present: Iterable[Link]
) -> list[Wanted]:
    """List the deltas to a release that are worth building.

    Args:
        order: hashes of the manifests of the published releases, oldest first, perhaps with the new one.
        target: hash of the manifest of the new release.
        last: last report of each device of the line and class.
        oldest_agent: oldest agent that ferry.toml names for the class; None: the reports tell.
        present: deltas that are published already.
    """
    before = order[: order.index(target)] if target in order else order
    after = [digest for digest in order[-1:] if target in order and digest != target]  # devices go back from it
    old: Counter[str] = Counter()
    new: Counter[str] = Counter()
    for report in last:
        if report.active and report.active in order and report.active != target:
            (old if is_older(report.agent or OLDEST_AGENT, READ_SINCE[NEWEST]) else new)[report.active] += 1
    steps = [digest for digest in (*before[-1:], *after) if not _published(present, digest, target)]
    beside = sorted(new.keys() - {*before[-1:], *after})
    first = {*old}
    if oldest_agent is not None and is_older(oldest_agent, READ_SINCE[NEWEST]):
        first.update(before[-PREVIOUS:], after, new)
    made = [Wanted(digest, NEWEST) for digest in steps] + [Wanted(digest, NEWEST, new[digest]) for digest in beside]
    return made + [Wanted(digest, FIRST) for digest in sorted(first)]


def forms(deltas: Iterable[Wanted], oldest_agent: str | None) -> list[int]:
    """Return the formats in which a release needs the delta that makes its overlays: those that devices of the class read."""
    old = oldest_agent is not None and is_older(oldest_agent, READ_SINCE[NEWEST])
    return sorted({NEWEST, *(want.form for want in deltas), *([FIRST] if old else [])})


def _published(present: Iterable[Link], base: str, target: str) -> bool:
    """Check whether a delta between two bundles is published in the newest format."""
    ends = base[:DIGITS], target[:DIGITS]
    return any((link.base, link.target) == ends and link.form == NEWEST for link in present)


def pays(link: Link, devices: int, fleet: int, others: Sequence[Link], full: int) -> bool:
    """Check whether a delta saves its devices more than its entry in the metadata costs all devices of the class.

    Args:
        link: the delta.
        devices: that would fetch it.
        fleet: devices of the class.
        others: the deltas that are published without it.
        full: bytes of the full bundle.
    """
    without = size_of(way(others, link.base, link.target, full)) or full
    return devices * (without - link.size) > fleet * ENTRY


def behind(order: Sequence[str], target: str, links: Sequence[Link], full: int) -> dict[int, int]:
    """Return what a device fetches in the place of the full bundle, by the number of releases that it is behind; in bytes.

    Args:
        order: hashes of the manifests of the published releases, oldest first.
        target: hash of the manifest of the release that it installs.
        links: the published deltas.
        full: bytes of the full bundle, which a device fetches that is further behind.
    """
    before = order[: order.index(target)]
    costs = {count: size_of(way(links, base, target, full)) for count, base in enumerate(reversed(before), start=1)}
    return {count: size for count, size in costs.items() if size}


def described(costs: Mapping[int, int]) -> str:
    """Say what devices fetch that are more than one release behind; empty if no chain leads to the release."""
    told = [f"{count} releases behind fetches {size:,} bytes" for count, size in sorted(costs.items()) if count > 1]
    return f"a device that is {', '.join(told)}; one further behind fetches the full bundle" if told else ""
