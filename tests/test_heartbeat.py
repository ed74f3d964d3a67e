"""The heartbeat of a device: when it is due, what it counts, and what it never tells."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota import fitness
from ota.agent import beat, counts, drawing, measured, poll, reports
from ota.agent.beat import LEAST, MOST, Beat
from ota.agent.disk import Disk
from ota.agent.state import State
from ota.errors import DeviceError, OtaError
from ota.manifest import Range, Reference
from ota.policy import HEARTBEAT
from ota.report import BINS, MAX_REPORT, DeviceReport, Health, open_line
from tests.conftest import agent
from tests.fleet_kit import Field
from tests.network_kit import Inbox
from tests.test_agent_serve import serving
from tests.test_reports_http import BUNDLE, OTHER, configure, home, inbox, queued

pytest_plugins = ("tests.fleet_kit",)

__all__ = ["home", "inbox"]  # fixtures

CAPTION, SEED = "zq7 wx", 918_273_645
LISTED = ["bolt", "nut"]
REFERENCE = {
    "schema_version": 3, "golden": {"tolerance": 0.1, "share": 0.9}, "load": [[0.5, 0.5], [0.5, 0.5]],
    "statistics": {"mean": {"low": -0.3, "high": 0.3}, "edges": {"low": 0.1, "high": 0.1}}, "latency_ms": 50.0, "captions": LISTED,
}  # fmt: skip

moments = st.integers(0, 2**33)
everies = st.integers(LEAST, MOST)
names = st.from_regex(r"[a-z0-9]{1,40}", fullmatch=True)


def beats(home: Any) -> list[DeviceReport]:
    found = [open_line(data).report for _, data in sorted(queued(home).items())]
    return [report for report in found if report.event == "alive"]


# When it is due: rules


@given(moments, everies, st.floats(0, 1, exclude_max=True), names)
def test_next_heartbeat_is_a_quarter_around_and_never_within_the_hour(now, every, part, device):
    plan = beat.after(now, every, part)
    assert max(LEAST, 0.75 * every - 1) <= plan.due - now <= max(LEAST, 1.25 * every + 1)
    assert beat.planned(plan, now, every, device) == plan  # a restart changes nothing


@given(st.lists(st.tuples(st.integers(0, 3 * 86_400), st.booleans(), everies), max_size=60), names, st.integers(0, 2**32))
def test_restarts_and_lost_files_make_no_storm(restarts, device, start):
    """Look after each restart, with the file lost at some of them, and another policy each time: no two heartbeats are within an hour."""
    found, now, said = Beat(last=0, due=start), start, list[int]()
    for later, lost, every in restarts:
        now += later
        plan = beat.planned(None if lost else found, now, every, device)
        assert now < plan.due or not lost
        found = plan
        if now >= plan.due:
            said.append(now)
            found = beat.after(now, every, 0.0)
    assert all(b - a >= LEAST for a, b in pairwise(said))


@given(moments, everies, names)
def test_lost_file_is_made_up_for_within_one_period(now, every, device):
    plan = beat.planned(None, now, every, device)
    assert LEAST <= plan.due - now <= LEAST + every
    for later in range(now, plan.due, 3600):  # lost again at each restart, it still comes to its turn
        assert beat.planned(None, later, every, device).due <= later + LEAST + every


def test_devices_whose_files_were_lost_together_speak_apart():
    due = sorted(beat.planned(None, 1_800_000_000, HEARTBEAT, f"press-{number}").due for number in range(1000))
    busiest = max(sum(at <= other < at + 60 for other in due) for at in due)
    assert busiest <= 15  # of 1,000 in six hours


@given(moments, moments, everies, everies, names)
def test_clock_that_was_set_back_silences_no_device(now, last, before, every, device):
    plan = beat.planned(Beat(last=last, due=last + before), now, every, device)
    assert plan.due <= now + LEAST + max(every, beat.latest(every))


# When it is due: the device


def test_heartbeat_is_queued_once_and_not_again_after_a_restart(home, inbox, monkeypatch):
    assert not beat.queue_if_due(home)
    now = [float(beat.due(home))]
    monkeypatch.setattr(time, "time", lambda: now[0])
    assert beat.queue_if_due(home)
    for _ in range(5):
        assert not beat.queue_if_due(type(home)(home.root))
    (first,) = beats(home)
    now[0] += 1.25 * HEARTBEAT + 1
    assert beat.queue_if_due(home)
    (second,) = beats(home)  # it takes the place of the one before, about the same bundle
    assert second.number > first.number
    home.save(State(active=BUNDLE))
    now[0] += 1.25 * HEARTBEAT + 1
    assert beat.queue_if_due(home)
    assert [report.active for report in beats(home)] == [None, BUNDLE]
    assert reports.dropped(home) == 0
    assert inbox.posted == []


def test_device_without_a_place_for_reports_queues_no_heartbeat(home, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2e9)
    home.disk.replace(beat.FILE, Beat(last=0, due=0).canonical())
    assert not beat.queue_if_due(home)
    assert not home.disk.path("queue").exists()


def test_policy_changes_how_often(home, inbox, monkeypatch):
    now = [1_900_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    home.disk.replace(beat.FILE, Beat(last=0, due=0).canonical())
    home.disk.replace("heartbeat", b"86400")
    assert beat.queue_if_due(home)
    assert 0.75 * MOST <= beat.due(home) - now[0] <= 1.25 * MOST
    home.disk.replace("heartbeat", b"3600")
    assert beat.due(home) - now[0] <= 1.25 * LEAST
    now[0] += LEAST - 1
    assert not beat.queue_if_due(home)
    now[0] += 0.25 * LEAST + 1
    assert beat.queue_if_due(home)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"last": -1, "due": 5}', b'{"last": 0, "due": 99999999999999999999}'])
def test_damaged_plan_is_made_anew(home, inbox, damage):
    (home.root / beat.FILE).write_bytes(damage)
    assert not beat.queue_if_due(home)
    assert json.loads((home.root / beat.FILE).read_bytes())["last"] == 0


def test_run_sends_a_heartbeat_even_if_the_repository_is_gone(home, inbox):
    home.disk.replace(beat.FILE, Beat(last=0, due=0).canonical())
    told: list[Any] = []

    class Stopper(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            assert timeout <= poll.LONGEST_SILENCE
            if len(inbox.posted) or len(told) > 1:
                self.set()
            return self.is_set()

    poll.run(home, 86_400, Stopper(), told.append, at_once=True)
    assert isinstance(told[0], OtaError)  # the device knows no repository
    (posted,) = inbox.posted
    (line,) = posted.lines
    report = open_line(line).report
    assert (report.event, report.schema_version, report.active) == ("alive", 3, None)
    assert report.health
    assert report.health.free > 0


@pytest.mark.parametrize(("asked", "least", "most"), [(300, 300, 480), (1, 60, 75), (10**7, 4500, 4500)])
def test_run_sends_again_when_the_wait_that_the_gateway_asked_for_is_over(home, inbox, monkeypatch, asked, least, most):
    home.disk.replace(beat.FILE, Beat(last=0, due=0).canonical())
    accepts, waits, really = inbox.rule, list[float](), time.time
    inbox.rule = lambda _: (429, {"Retry-After": str(asked)}, b"")
    monkeypatch.setattr(reports, "time", SimpleNamespace(time=lambda: really() + sum(waits)))

    class Stopper(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            inbox.rule = accepts
            if len(waits) == 2:
                self.set()
            return self.is_set()

    poll.run(home, 86_400, Stopper(), lambda _: None, at_once=True)
    assert least <= waits[0] <= most
    assert len(inbox.posted) == (2 if asked < 4500 else 1)  # until then it does not even try
    assert len(queued(home)) == (0 if asked < 4500 else 1)


# What is counted: rules


def reference(**fields: Any) -> Reference:
    return Reference.model_validate(REFERENCE | fields)


def answer(
    mean: float = 0.0, edges: float = 0.1, milliseconds: float = 10.0, load: Any = ((1.0, 3.0), (2.0, 2.0))
) -> dict[str, Any]:
    return {"statistics": [("mean", mean), ("edges", edges)], "milliseconds": milliseconds, "load": [list(row) for row in load]}


def test_image_is_counted_by_the_bundles_own_reference():
    made = counts.Counts(since=1)
    made.drew("full", "bolt", answer(), reference(), LISTED)
    made.drew("fast", "a customer's words", answer(mean=5.0, milliseconds=60.0), reference(), LISTED)
    assert (made.images, made.late, made.out_of_range, made.variant) == (2, 1, 1, "fast")
    assert (made.captions, made.other_captions) == ([1, 0], 1)
    assert made.statistics["mean"] == [0, 0, 0, 0, 1, 0, 0, 1]
    assert counts.total(made.load) == [[500, 1500], [1000, 1000]]
    assert "customer" not in made.model_dump_json()


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0, 2))
def test_bins_are_ordered_and_cover_every_value(value, low, width):
    expected = Range(low=low, high=low + width)
    found = counts.bin_of(value, expected)
    assert 0 <= found < BINS
    assert counts.bin_of(value + 0.5, expected) >= found
    if low + 1e-9 < value < low + width - 1e-9:
        assert 0 < found < BINS - 1


def test_load_of_other_experts_counts_alone_and_a_large_one_not_at_all():
    made = counts.Counts(since=1)
    made.drew("full", "", answer(), reference())
    made.drew("full", "", answer(load=((1.0,), (1.0,))), reference())
    assert made.load == [[1.0], [1.0]]
    made.drew("full", "", answer(load=((1.0,) * 300,)), reference())
    assert made.load == []
    assert made.images == 3


@given(st.lists(st.integers(0, 3), max_size=12))
def test_counts_in_two_parts_are_the_counts_of_all(kinds):
    given_ = [answer(mean=kind / 3, milliseconds=20.0 * kind) for kind in kinds]
    parts = [counts.Counts(since=1), counts.Counts(since=1)]
    whole = counts.Counts(since=1)
    for number, one in enumerate(given_):
        whole.drew("full", "bolt" if number % 2 else "x", one, reference(), LISTED)
        parts[number * 2 // len(given_)].drew("full", "bolt" if number % 2 else "x", one, reference(), LISTED)
    parts[0].add(parts[1])
    assert parts[0] == whole


# What is counted: the file


def test_file_is_shared_and_keeps_the_newest_bundles(home):
    for digest in (BUNDLE, *(str(number) * 64 for number in range(3, 8)), BUNDLE):
        counts.store(home, {digest: counts.Counts(since=5, images=2)})
    found = counts.read(home)
    assert len(found) == counts.MOST_BUNDLES
    assert (list(found)[-1], found[BUNDLE].images) == (BUNDLE, 2)  # what was counted of it before is gone with its place
    counts.store(home, {BUNDLE: counts.Counts(since=9, images=1, took=[1.0] * counts.KEPT)})
    assert (counts.read(home)[BUNDLE].images, counts.read(home)[BUNDLE].since) == (3, 5)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"x": 1}', b"\xff", b"[" * 100_000])
def test_lost_or_damaged_file_loses_only_counts(home, damage):
    (home.root / counts.FILE).write_bytes(damage)
    assert counts.read(home) == {}
    counts.store(home, {BUNDLE: counts.Counts(since=1, images=1)})
    assert counts.read(home)[BUNDLE].images == 1


def test_counts_wait_for_a_file_that_is_in_use(home, monkeypatch):
    monkeypatch.setattr(counts, "LOCK_WAIT", 0.0)
    counting = counts.Counting(home)
    counting.missed(BUNDLE, "refused")
    with (home.root / counts.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        counting.store()
        assert counts.read(home) == {}
    counting.missed(BUNDLE, "failed")
    counting.missed(None, "failed")
    counting.store()
    found = counts.read(home)[BUNDLE]
    assert (found.refused, found.failed) == (1, 1)


def test_answer_that_cannot_be_counted_breaks_nothing(home):
    counting = counts.Counting(home)
    counting.drew(BUNDLE, "full", "bolt", {}, {"full": reference()})
    counting.store()


def test_generate_and_serve_count_and_nobody_s_words_are_in_the_file(scene: Field, tmp_path: Path):
    device = scene.device
    device.home.disk.remove(counts.FILE)  # other tests draw with the device that this one is a copy of
    picture = tmp_path / "picture.png"
    device.command("generate", CAPTION, "--seed", str(SEED), "-o", str(picture))
    device.command("generate", "x" * 10_000, "-o", str(picture), code=3)
    with serving(device) as client:
        assert client.draw(caption=CAPTION, seed=SEED)[0] == 200
        assert client.draw(caption=5)[0] == 400
    found = counts.read(device.home)[str(device.active)]
    assert (found.images, found.refused, found.failed, len(found.took)) == (2, 2, 0, 2)
    assert sum(found.statistics["mean"]) == 2
    written = (device.root / counts.FILE).read_bytes()
    for secret in (CAPTION.encode(), str(SEED).encode(), CAPTION.encode().hex().encode()):
        assert secret not in written
    assert len(written) < 3_000


def test_image_that_is_no_image_is_counted(scene: Field, monkeypatch):
    scene.device.home.disk.remove(counts.FILE)  # other tests draw with the device that this one is a copy of
    monkeypatch.setattr("ota.agent.child.run", lambda *_, **__: {"good": False})
    with pytest.raises(DeviceError):
        drawing.generate(scene.device.home, "", 0)
    found = counts.read(scene.device.home)[str(scene.device.active)]
    assert found.not_finite >= 1
    assert (found.failed, found.images) == (1, 0)


# What it says


def test_heartbeat_tells_counters_outcomes_and_energy(home, inbox):
    home.save(State(active=BUNDLE))
    configure(home, tags=["site=berlin"])
    for number in range(12):
        reports.queue(home, "refused" if number % 2 else "rolled_back", OTHER)
    made = counts.Counts(since=7)
    for milliseconds in range(1, 101):
        made.drew("full", "nut", answer(milliseconds=float(milliseconds)), reference(), LISTED)
    counts.store(home, {BUNDLE: made})
    row = {"p95_ms": 3.0, "joules": 1.5, "energy": {"source": "RAPL package-0\n", "quality": "measured"}}
    measured.write(home, BUNDLE, {"full": row})
    said = beat.health(home)
    assert (said.since, said.images, said.late, said.p50_ms, said.p95_ms) == (7, 100, 50, 50.0, 95.0)
    assert (said.joules, said.joules_source) == (1.5, "RAPL package-0 (measured)")
    assert (said.tags, said.share, said.captions) == (["site=berlin"], "all", [0, 100])
    assert [outcome.event for outcome in said.outcomes] == ["rolled_back", "refused"] * 4
    assert said.totals == {"rolled_back": 6, "refused": 6}
    assert fitness.STATISTIC_FLOOR > 0
    assert sum(said.statistics["edges"]) == 100


def test_minimal_share_tells_nothing_of_the_images(home, inbox):
    home.save(State(active=BUNDLE))
    made = counts.Counts(since=7)
    made.drew("full", "bolt", answer(), reference(), LISTED)
    counts.store(home, {BUNDLE: made})
    configure(home, share="minimal")
    said = beat.health(home)
    assert (said.images, said.load, said.captions, said.other_captions, said.statistics) == (1, [], [], 0, {})
    assert Health.model_validate(said.model_dump()) == said


def test_largest_heartbeat_fits_into_a_report(home, inbox):
    home.save(State(active=BUNDLE))
    configure(home, tags=[f"{'t' * 19}{number}={'v' * 40}" for number in range(8)])
    for number in range(100):
        reports.queue(home, "base_corrupt", f"{number:064d}", "x" * 500)
    most = 2**53
    large = counts.Counts(
        since=most, images=most, took=[1e8] * 200, load=[[1e11] * 16 for _ in range(16)], captions=[most] * 64, other_captions=most,
        statistics={name: [most] * BINS for name in ("mean", "deviation", "edges")},
    )  # fmt: skip
    counts.store(home, {BUNDLE: large})
    line = reports.foretold(home, beat.health(home))
    assert len(line) < MAX_REPORT
    assert open_line(line).is_signed_by(reports.public_key(home))


def test_show_prints_exactly_what_leaves_then(scene: Field, tmp_path: Path, monkeypatch):
    device = scene.device
    (tmp_path / "served").mkdir()
    with Inbox(tmp_path / "served") as server:
        device.configure(reports=server.address)
        reports.queue(device.home, "base_corrupt", device.active, "“why”")
        device.home.disk.replace(beat.FILE, Beat(last=0, due=0).canonical())
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now)
        monkeypatch.setattr(Disk, "free", lambda _: 123_456)
        before = device.facts()
        shown = device.command("report", "--show")
        assert device.facts() == before
        assert server.posted == []
        device.command("report", "--beat")
        (posted,) = server.posted
        assert b"\n".join(posted.lines).decode() + "\n" == shown
        assert [open_line(line).report.event for line in posted.lines][-2:] == ["base_corrupt", "alive"]
        assert device.command("report", "--show") == "nothing would leave this device now\n"
        device.command("report", "--beat")  # the timer runs again: no second one
        assert len(server.posted) == 1


def test_timer_that_meets_an_update_says_so_and_is_no_fault(home, inbox):
    with home.locked():
        result = agent("report", "--beat", "--dir", str(home.root))
        assert agent("report", "--dir", str(home.root)).exit_code == 3
    assert (result.exit_code, inbox.posted) == (0, [])
    assert "another agent is at work" in result.stdout
