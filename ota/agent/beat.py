"""The heartbeat: every few hours a healthy device says that it is there, and how it fares. It is a report like any other.

When the next one is due is in a small file, so that restarts send no more of them. A device whose file is lost takes its turn at a
moment that its id decides, so devices whose files were lost together do not speak at once.
"""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any, get_args

from pydantic import Field

from ota.agent import counts, history, measured, reports
from ota.agent.plan import heartbeat
from ota.agent.state import Config, Home
from ota.errors import ManifestError, StateError
from ota.limits import KiB
from ota.manifest import MAX_COUNT, Document, parse
from ota.report import Event, Health, Outcome

LEAST, MOST = 3600, 24 * 3600  # seconds that a policy may ask for; no two heartbeats are closer than `LEAST`
SPREAD = 0.25  # share by which the time between two of them varies
FILE = "beat.json"
OUTCOMES = 8  # of the history, which a heartbeat tells again
EVENTS: tuple[Event, ...] = get_args(Event)


class Beat(Document):
    """When the last heartbeat was, and when the next one is due, in seconds since 1970 by the device's clock."""

    last: int = Field(ge=0, le=MAX_COUNT, description="0: none that this file knows of")
    due: int = Field(ge=0, le=MAX_COUNT)


# Rules


def planned(found: Beat | None, now: int, every: int, device: str) -> Beat:
    """Return the plan that holds now: the one that was made or, if it is lost or the clock was set back, one by the device's id.

    Args:
        found: the plan in the file; None: it is lost.
        now: seconds since 1970.
        every: seconds between two heartbeats, from `LEAST` to `MOST`; where that changed, an earlier plan holds no longer than it.
        device: id of the device.
    """
    if found is None or found.last > now or found.due > now + LEAST + latest(MOST):
        earliest = now + LEAST  # the last one may have been just now
        turn = int.from_bytes(hashlib.sha256(device.encode()).digest()[:8], "big") % every
        return Beat(last=0, due=min(earliest + (turn - earliest) % every, MAX_COUNT))
    if found.last:
        return found.model_copy(update={"due": max(found.last + LEAST, min(found.due, found.last + latest(every)))})
    return found.model_copy(update={"due": min(found.due, now + LEAST + every)})


def latest(every: int) -> int:
    """Return the most seconds between two heartbeats."""
    return round((1 + SPREAD) * every)


def after(now: int, every: int, part: float) -> Beat:
    """Return the plan after a heartbeat.

    Args:
        now: seconds since 1970 of that heartbeat.
        every: seconds between two of them.
        part: random number from [0, 1).
    """
    return Beat(last=now, due=min(now + max(LEAST, round(every * (1 - SPREAD + 2 * SPREAD * part))), MAX_COUNT))


# The file


def _read(home: Home) -> Beat | None:
    try:
        return parse(Beat, home.disk.read(FILE) or b"", 4 * KiB)
    except (ManifestError, StateError):
        return None


def _now() -> int:
    return min(max(0, int(time.time())), MAX_COUNT)


def due(home: Home) -> int:
    """Return when the next heartbeat is due, in seconds since 1970; nothing is written."""
    return planned(_read(home), _now(), heartbeat(home), home.config().device).due


def queue_if_due(home: Home) -> bool:
    """Put a heartbeat into the queue if one is due, and return whether it was; the caller holds the lock.

    The plan of the next one is durable before, so that a device which restarts in between says nothing twice.

    Raises:
        StateError, RoomError: the disk takes nothing.
    """
    config, now, every = home.config(), _now(), heartbeat(home)
    if not config.reports:
        return False
    found = _read(home)
    plan = planned(found, now, every, config.device)
    if now < plan.due:
        if plan != found:
            home.disk.replace(FILE, plan.canonical())
        return False
    home.disk.replace(FILE, after(now, every, random.random()).canonical())  # noqa: S311
    reports.queue(home, "alive", home.load().active, health=health(home))
    return True


# What it says


def health(home: Home) -> Health:
    """Collect how this device fares."""
    config, active, now = home.config(), home.load().active, _now()
    counted = counts.read(home).get(active or "") or counts.Counts(since=now)
    took = sorted(counted.took)
    past = [entry for entry in history.read(home) if entry.event in EVENTS]
    joules, source = measured.energy(home, active or "", counted.variant)
    return Health(
        since=counted.since, share=config.share, tags=config.tags, variant=counted.variant, images=counted.images, refused=counted.refused,
        failed=counted.failed, not_finite=counted.not_finite, out_of_range=counted.out_of_range, late=counted.late,
        p50_ms=measured.percentile(took, 0.5) if took else None, p95_ms=measured.percentile(took, 0.95) if took else None,
        joules=joules, joules_source=source, free=min(home.disk.free(), MAX_COUNT), dropped=reports.dropped(home),
        outcomes=[Outcome(event=e.event, manifest=e.bundle, time=e.time) for e in past[-OUTCOMES:]],  # type: ignore[arg-type]
        totals={event: sum(e.event == event for e in past) for event in EVENTS if any(e.event == event for e in past)},
        **_seen(config, counted),
    )  # fmt: skip


def _seen(config: Config, counted: counts.Counts) -> dict[str, Any]:
    """Return what a heartbeat tells of the images' looks and subjects: nothing, if the owner shares the minimum."""
    if config.share == "minimal":
        return {}
    return {
        "load": counts.total(counted.load), "captions": counted.captions, "other_captions": counted.other_captions,
        "statistics": counted.statistics,
    }  # fmt: skip


def waiting(home: Home) -> list[bytes]:
    """Return the lines that would leave this device now: the reports that wait, and the heartbeat if one is due; nothing is written."""
    lines = [report.line for report in reports.waiting(home)]
    if home.config().reports and _now() >= due(home):
        lines.append(reports.foretold(home, health(home)))
    return lines
