"""Maintenance windows in a time zone: summer time, devices without a database of time zones, and windows of before."""

from __future__ import annotations

import sys
import zoneinfo
from collections.abc import Iterator
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from ota.agent import doctor, rules, window
from ota.agent.state import Config
from tests.fleet_kit import Field
from tests.test_rollout import config, policy, want

pytest_plugins = ["tests.fleet_kit"]


def at(text: str, zone: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp())


@pytest.fixture
def no_zones(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the database of time zones away: the system's, and the package tzdata."""
    before = zoneinfo.TZPATH
    zoneinfo.reset_tzpath(())
    ZoneInfo.clear_cache()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tzdata"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tzdata", None)
    yield
    zoneinfo.reset_tzpath(before)
    ZoneInfo.clear_cache()


@pytest.mark.parametrize(
    ("times", "moment", "zone", "inside"),
    [
        ("22:00-04:00 Europe/Berlin", "2026-01-15T22:00", "Europe/Berlin", True),
        ("22:00-04:00 Europe/Berlin", "2026-01-15T22:30", "UTC", True),  # half past 11 there
        ("22:00-04:00 Europe/Berlin", "2026-07-15T20:00", "UTC", True),  # summer time: 22:00 there
        ("22:00-04:00 Europe/Berlin", "2026-01-15T20:00", "UTC", False),  # winter: 21:00 there
        ("22:00-04:00 Europe/Berlin", "2026-07-15T02:00", "UTC", False),  # 4:00 there
        ("02:15-02:45 Europe/Berlin", "2026-03-29T01:20", "UTC", False),  # the clocks jump from 2 to 3
        ("01:30-03:30 Europe/Berlin", "2026-03-29T01:20", "UTC", True),  # 3:20
        ("02:15-02:45 Europe/Berlin", "2026-10-25T00:20", "UTC", True),  # 2:20 for the first time
        ("02:15-02:45 Europe/Berlin", "2026-10-25T01:20", "UTC", True),  # and for the second
        ("09:00-10:00 Asia/Kathmandu", "2026-01-15T03:15", "UTC", True),  # a quarter of an hour off
        ("22:00-05:00 America/Argentina/Buenos_Aires", "2026-01-15T01:00", "UTC", True),
        ("22:00-05:00 Etc/GMT+5", "2026-01-15T03:00", "UTC", True),
        ("22:00-05:00 UTC", "2026-01-15T22:00", "UTC", True),
        ("22:00-05:00", "2026-01-15T21:59", "UTC", False),
    ],
)
def test_window_follows_the_clock_on_the_wall(times: str, moment: str, zone: str, inside: bool):
    now = at(moment, zone)
    assert rules.in_window(times, now) == inside
    found = want(policy((10_000, 0)), device=config(window=times), now=now)
    assert found.install == inside
    if not inside and "Berlin" in times:
        there = datetime.fromtimestamp(now, ZoneInfo("Europe/Berlin"))
        assert found.reason.endswith(f"the maintenance window {times}, where it is {there:%H:%M}")


@pytest.mark.parametrize(
    "times",
    [
        "22:00-05:00 ", "22:00-05:00  Europe/Berlin", "Europe/Berlin", "22:00-05:00 ../../etc/passwd", "22:00-05:00 /etc/localtime",
        "22:00-05:00 Europe/Berlin ", "22:00-05:00\tEurope/Berlin", "22:00-05:00 a/b/c/d", "22:00-05:00 Europe//Berlin", "22:00-05:00 +01:00",
        "22:00-05:00 " + "x" * 41, "22-4 Europe/Berlin",
    ],
)  # fmt: skip
def test_window_of_another_form_is_refused(times: str):
    with pytest.raises(ValueError, match="window"):
        config(window=times)


@pytest.mark.parametrize("zone", ["Europe/Berln", "Europe", "Mars/Olympus", "leapseconds", "CEST"])
def test_zone_that_nobody_knows_is_refused_at_init(scene: Field, zone: str):
    before = scene.device.facts()
    told = init(scene, f"22:00-05:00 {zone}", code=3)
    assert f"--window is not valid: this device knows no time zone {zone}; give a name of the IANA database" in told
    assert scene.device.facts() == before


def test_window_that_never_opens_is_refused_and_seen(offered: Field):
    assert "--window is not valid: 05:00-05:00 ends when it begins, so it never opens" in init(offered, "05:00-05:00", code=3)
    offered.device.configure(window="05:00-05:00")  # as an agent of before took it
    assert "waits for the maintenance window, but 05:00-05:00 ends when it begins" in offered.device.update().reason


def init(field: Field, times: str, code: int = 0) -> str:
    given: Config = field.device.home.config()
    return field.device.command(
        "init", "--device", given.device, "--line", given.line, "--class", given.device_class, "--repository", given.repository,
        "--root", str(field.device.root / "root.json"), "--root-sha256", given.root_sha256, "--window", times, code=code,
    )  # fmt: skip


def test_device_without_a_database_says_so_at_init_and_goes_on_with_utc(scene: Field, no_zones: None):
    assert "this device has no database of time zones, so it does not know Europe/Berlin; install the package tzdata" in init(
        scene, "22:00-05:00 Europe/Berlin", code=3
    )
    for times in ("22:00-05:00", "22:00-05:00 UTC"):
        init(scene, times)
        assert window.problem(scene.device.home.config().window) == ""


def test_database_that_is_lost_later_waits_and_is_seen(offered: Field, no_zones: None):
    offered.device.configure(window="00:00-23:59 Europe/Berlin")
    reason = offered.device.update().reason
    assert "waits for the maintenance window, but this device has no database of time zones" in reason
    found = [f.text for f in doctor.examine(offered.device.home, draw=False) if (f.about, f.level) == ("clock", "fail")]
    assert "the maintenance window never opens: this device has no database" in found[0]


def test_init_takes_a_zone_and_the_device_obeys_it(offered: Field):
    init(offered, "22:00-05:00 Asia/Tokyo")
    for hour, installs in (("12:00", False), ("23:00", True)):
        now = at(f"2026-11-30T{hour}", "Asia/Tokyo")
        given = config(window=offered.device.home.config().window)
        assert want(policy((10_000, 0)), device=given, now=now).install == installs
