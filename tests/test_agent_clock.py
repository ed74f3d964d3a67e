"""Wrong clocks: none blocks a device once it is right again, and none lets expired or old metadata pass."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from tuf.ngclient._internal import trusted_metadata_set

import ota
from ota.agent import clock, doctor, drawing, ground, plan, reports, rules, slots, trial, trust
from ota.agent.state import HighWater
from ota.errors import ExpiredError, OtaError, TransferError, TrustError
from ota.release.bundle import Bundle
from tests.fleet_kit import Device, Field, WebServer, metadata_file, publish, sign_in_place, untouched
from tests.test_agent_machine import DAY, Clock

pytest_plugins = ["tests.fleet_kit"]


@pytest.fixture
def device_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Provide the clock of the device, which tests set; the factory's stays right."""
    made = Clock()
    monkeypatch.setattr(trusted_metadata_set, "datetime", made.datetimes())
    for module in (trust, plan, slots, trial, reports, ground, doctor):
        monkeypatch.setattr(module, "time", SimpleNamespace(**made.module().__dict__, perf_counter=time.perf_counter))
    return made


def to_1970(made: Clock) -> None:
    made.mistake = -int(time.time())


def found(device: Device, about: str = "clock") -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in doctor.examine(device.home, draw=False) if f.about == about]


def without_times(field: Field, days: int = 14) -> None:
    """Make the repository one of a factory that wrote no times and signed timestamps for so many days."""

    def change(signed: Any) -> None:
        signed.unrecognized_fields.pop("signed_at")
        signed.expires = (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)

    sign_in_place(metadata_file(field.repository, "timestamp"), field.repository.keys, "timestamp", change)


# Ahead


@pytest.mark.parametrize("days", [1, 12, 400, 20_000])
def test_one_look_with_a_clock_ahead_blocks_nothing(offered: Field, bundles: dict[str, Bundle], device_clock: Clock, days: int):
    device_clock.mistake = days * DAY
    looked: str | OtaError
    try:
        looked = offered.device.update(check_only=True).reason
    except OtaError as error:
        looked = error
    assert isinstance(looked, ExpiredError) == (days > 14)
    device_clock.mistake = 0
    assert offered.device.update().changed
    assert offered.device.active == bundles["second"].manifest.digest
    assert offered.device.home.high_water().signed <= time.time()


def test_floor_that_an_agent_of_before_took_from_its_clock_is_not_believed(offered: Field, bundles: dict[str, Bundle]):
    marks = json.loads((offered.device.root / "highwater.json").read_bytes())
    marks["time"] = int(time.time()) + 11 * DAY
    del marks["signed"]
    (offered.device.root / "highwater.json").write_text(json.dumps(marks))
    assert [level for level, _ in found(offered.device)] == ["ok"]
    assert offered.device.update().changed
    after = offered.device.home.high_water()
    assert after.time == 0
    assert after.keys.items() >= marks["keys"].items()
    assert after.versions["timestamp"] > marks["versions"]["timestamp"]
    assert time.time() - DAY < after.signed <= time.time()


@pytest.mark.parametrize(
    ("days", "level", "says"),
    [
        (12, "ok", "not behind"),
        (30, "warn", "30 days after the newest signed time"),
        (500, "fail", "the root that is known here ended on"),
    ],
)
def test_doctor_sees_a_clock_ahead(scene: Field, device_clock: Clock, days: int, level: str, says: str):
    device_clock.mistake = days * DAY
    ((how, text),) = found(scene.device)
    assert how == level
    assert says in text


# Behind


def test_clock_of_1970_is_refused_before_anything_is_fetched(offered: Field, device_clock: Clock):
    to_1970(device_clock)
    with WebServer(offered.repository.folder) as web:
        offered.device.configure(repository=web.address)
        with untouched(offered.device, TrustError, "the clock says 1970-01-01, but this agent was made on .*; set the clock"):
            offered.device.update()
        assert web.requests == []
    told = offered.device.command("doctor", "--no-draw", code=3)
    assert "fail  clock         the clock says 1970-01-01" in told
    assert drawing.generate(offered.device.home, "bar", 0)[1]["good"]


def fresh(field: Field, name: str) -> Device:
    return Device.init(field.folder / name, field.repository)


def test_new_device_holds_its_clock_against_the_root(scene: Field, device_clock: Clock):
    new = fresh(scene, "new")
    device_clock.mistake = -3 * DAY
    with pytest.raises(TrustError, match="hours behind the last time seen; set the clock"):
        new.update()
    assert new.active is None
    assert new.home.high_water().signed == 0
    ((level, text),) = found(new)
    assert level == "fail"
    assert "before the root was signed" in text
    device_clock.mistake = 0
    assert new.update().changed


def test_clock_that_is_hours_behind_is_warned_of_and_works(offered: Field, device_clock: Clock):
    device_clock.mistake = -20 * 3600
    ((level, text),) = found(offered.device)
    assert (level, "the clock is 1" in text or "the clock is 2" in text) == ("warn", True)
    assert offered.device.update().changed


def test_clock_behind_explains_a_link_that_fails_for_it(scene: Field, device_clock: Clock, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise TransferError("certificate is not yet valid")

    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)
    monkeypatch.setattr("ota.agent.transport.Folder.read", refuse)
    with pytest.raises(TransferError, match="not yet valid"):
        scene.device.update()
    device_clock.mistake = -2 * DAY
    with pytest.raises(TrustError, match="hours behind the last time seen"):
        scene.device.update()


# Factories of before, thieves, and factories whose clock is wrong


def test_metadata_without_times_count_by_their_expiry(offered: Field, device_clock: Clock):
    without_times(offered)
    assert offered.device.update().changed
    assert abs(offered.device.home.high_water().signed - time.time()) < 600
    device_clock.mistake = -2 * DAY
    with untouched(offered.device, TrustError, "hours behind the last time seen"):
        offered.device.update()


@pytest.mark.parametrize("days", [30, 365])
def test_factory_that_signs_for_longer_blocks_nobody(offered: Field, days: int):
    without_times(offered, days)
    before = offered.device.home.high_water().signed
    assert offered.device.update().changed
    assert offered.device.home.high_water().signed == before


def say(when: str) -> Callable[[Any], None]:
    def change(signed: Any) -> None:
        signed.unrecognized_fields["signed_at"] = when
        signed.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=900)

    return change


def test_time_from_the_future_is_refused_and_not_kept(offered: Field, bundles: dict[str, Bundle]):
    later = f"{datetime.now(UTC) + timedelta(days=30):{clock.FORM}}"
    sign_in_place(metadata_file(offered.repository, "timestamp"), offered.repository.keys, "timestamp", say(later))
    marks = offered.device.home.high_water()
    with untouched(offered.device, TrustError, "hours behind the last time seen"):
        offered.device.update()
    assert offered.device.home.high_water() == marks
    offered.repository.refresh()
    assert offered.device.update().changed


@pytest.mark.parametrize(
    "said", ["", "yesterday", "9" * 400, "2026-13-01T00:00:00Z", "9999-12-31T23:59:59Z", None, 5, ["x"], {"a": 1}]
)
def test_nonsense_in_place_of_a_time_is_no_time(offered: Field, said: Any):
    sign_in_place(metadata_file(offered.repository, "timestamp"), offered.repository.keys, "timestamp", say(said))
    assert offered.device.update().changed


def test_time_under_keys_that_were_replaced_does_not_bind(offered: Field):
    marks = offered.device.home.high_water()
    ahead = marks.signed + 10 * DAY
    for keys, refused in ((marks.keys, True), (marks.keys | {"timestamp": ["0" * 64]}, False)):
        offered.device.home.raise_high_water(HighWater(versions=marks.versions, keys=keys, root=marks.root, signed=ahead))
        if refused:
            with untouched(offered.device, TrustError, "hours behind the last time seen"):
                offered.device.update()
    assert offered.device.update().changed
    assert offered.device.home.high_water().signed <= time.time()


def test_root_and_timestamp_say_when_they_were_signed(scene: Field):
    scene.repository.renew(["root"])
    for path in (scene.repository.newest_root(), metadata_file(scene.repository, "timestamp")):
        signed = json.loads(path.read_bytes())["signed"]
        assert abs(datetime.strptime(signed["signed_at"], clock.FORM).replace(tzinfo=UTC).timestamp() - time.time()) < 60
    assert scene.device.update().reason == "release 1 is installed"


# What the rules stand on


def test_days_are_those_of_the_factories_of_before():
    from ota.release.metadata import DATED, LIFETIMES

    assert set(DATED) == set(clock.DAYS)
    for role, days in clock.DAYS.items():
        assert LIFETIMES[role].days == days, "metadata without `signed_at` were signed for so many days; do not change them here"
    assert rules.check_clock(10**9, 10**9 + clock.SLACK) is None


def test_day_of_the_build_belongs_to_this_version():
    assert ota.__version__ == clock.VERSION, "raise the day in ota/agent/clock.py together with the version"
    assert clock.BUILT.timestamp() < time.time()


def test_republished_release_still_reaches_a_device_with_old_marks(scene: Field, bundles: dict[str, Bundle]):
    """Keep devices of before going, whose marks have no signed time."""
    marks = scene.device.home.high_water()
    scene.device.home.raise_high_water(marks.model_copy(update={"signed": 0, "time": int(time.time())}))
    publish(scene.repository, bundles["second"])
    assert scene.device.update().changed
