"""The rules of the gateway without its process: quotas, and the one writer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import text

from ota.errors import OperatorError, TransferError
from ota.fleet.register import Known
from ota.fleet.store import Arrived, Fleet, Verdict, open_fleet
from ota.gateway.intake import RefusedError
from ota.gateway.metrics import Metrics
from ota.gateway.quota import Quota
from ota.gateway.shared import Gateway, Options
from ota.gateway.writer import MOST_BYTES, MOST_TOGETHER, MOST_WAITING, Writer
from ota.report import open_line
from tests.gateway_kit import Device

CONSTRAINT = (
    "create trigger strict before insert on fleet_reports when new.device = 'press-2' begin select raise(abort, 'no'); end"
)


def test_a_quota_allows_a_burst_and_then_a_rate():
    quota = Quota(burst=10, per_second=0.5)
    assert quota.wait("a", 10, 100.0) == 0
    quota.take("a", 10, 100.0)
    assert quota.wait("a", 1, 100.0) == 2.0
    assert quota.wait("a", 1, 102.0) == 0
    assert quota.wait("b", 10, 100.0) == 0
    assert quota.wait("a", 1_000, 100.0) == 20.0  # what exceeds a full bucket waits for a full one
    quota.take("a", -4, 100.0)
    assert quota.wait("a", 4, 100.0) == 0


def test_a_quota_remembers_so_many_names_only():
    quota = Quota(burst=10, per_second=1, most=100)
    for number in range(10_000):
        quota.take(f"made-up-{number}", 10, 0.0)
    assert len(quota) == 100
    assert quota.wait("made-up-9999", 1, 0.0) > 0


class Stalled:
    """A store whose commit waits until the test lets it go, or fails."""

    def __init__(self) -> None:
        self.begun, self.go, self.commits, self.fails = threading.Event(), threading.Event(), cast("list[int]", []), False

    def probe(self) -> None:
        pass

    def keep(self, arrived: Sequence[Arrived], refused: Any = None) -> list[Verdict]:
        assert not refused
        self.begun.set()
        assert self.go.wait(60)
        if self.fails:
            raise TransferError("the disk is full")
        self.commits.append(len(arrived))
        return [Verdict(a.opened.report.device, a.opened.report.number, "", "", a.opened.report.number) for a in arrived]


def test_the_writer_commits_what_waits_together_and_takes_no_more_than_it_may():
    device, store, told = Device("press-1"), Stalled(), cast("list[tuple[int, Any]]", [])
    writer = Writer(cast("Fleet", store), Metrics())
    writer.start()
    reports = [Arrived(open_line(device.line(n)), device.public_key) for n in range(1, 21)]

    def put(number: int, size: int = 20_000) -> bool:
        return writer.keep(reports, size, lambda found, error: told.append((number, error or len(found))))

    assert put(0)
    assert store.begun.wait(60)
    taken = [number for number in range(1, 1_000) if put(number)]
    assert taken == list(range(1, MOST_WAITING // 20 + 1))  # the others are told to come back
    assert told == []  # nothing is answered before its commit
    store.go.set()
    writer.close()
    assert store.commits == [20] + [MOST_TOGETHER] * (MOST_WAITING // MOST_TOGETHER)
    assert told == [(number, 20) for number in [0, *taken]]
    assert not put(9_999)  # it has ended


def test_the_writer_bounds_bytes_too():
    device, store = Device("press-1"), Stalled()
    writer = Writer(cast("Fleet", store), Metrics())
    writer.start()
    one = [Arrived(open_line(device.line(1)), device.public_key)]
    assert writer.keep(one, MOST_BYTES, lambda *_: None)
    assert store.begun.wait(60)
    assert writer.keep(one, MOST_BYTES - 1, lambda *_: None)
    assert not writer.keep(one, 2, lambda *_: None)
    store.go.set()
    writer.close()


def test_after_a_failed_commit_nothing_is_acknowledged_and_the_writer_goes_on():
    device, store, told = Device("press-1"), Stalled(), cast("list[Any]", [])
    store.go.set()
    writer = Writer(cast("Fleet", store), Metrics())
    writer.start()
    one = [Arrived(open_line(device.line(1)), device.public_key)]
    for fails in (True, False):
        store.fails, done = fails, threading.Event()

        def result(found: Any, error: Exception | None, done: threading.Event = done) -> None:
            told.append(error or found)
            done.set()

        assert writer.keep(one, 100, result)
        assert done.wait(60)
        writer.call(lambda: None, lambda *_: None)
    writer.close()
    assert isinstance(told[0], TransferError)
    assert told[1][0].code == ""
    assert writer.is_healthy


@pytest.mark.parametrize("damage", ["update fleet_last set number = 'x' where device = 'press-2'", CONSTRAINT])
def test_a_damaged_row_of_one_device_holds_up_no_other(tmp_path: Path, damage: str):
    """Damage what is known of one device, or let its row be refused by a constraint, while reports of three wait for one commit."""
    devices, told, go = [Device(f"press-{n}") for n in (1, 2, 3)], cast("dict[str, Any]", {}), threading.Event()
    with open_fleet(f"sqlite:///{tmp_path / 'fleet.db'}") as fleet:
        for device in devices:
            fleet.enroll(device.name, device.public_key)
        with fleet.engine.begin() as connection:
            connection.execute(text(damage))
        writer, begun = Writer(fleet, Metrics()), threading.Event()
        writer.start()
        writer.call(lambda: (begun.set(), go.wait(60)), lambda *_: None)
        assert begun.wait(60)
        for device in devices:
            reports = [Arrived(open_line(device.line(n)), device.public_key) for n in (1, 2)]
            assert writer.keep(reports, 100, lambda found, error, name=device.name: told.update({name: error or found}))
        go.set()
        writer.close()
        assert isinstance(told["press-2"], OperatorError)
        assert [one.code for name in ("press-1", "press-3") for one in told[name]] == [""] * 4
        assert {one.device for one in fleet.reports()} == {"press-1", "press-3"}
        assert writer.is_healthy


class Register:
    """Stands for the register: a look takes until `goes_on`, and fails while `away`."""

    def __init__(self) -> None:
        self.looks, self.away, self.began, self.goes_on = 0, False, threading.Event(), threading.Event()

    def changes(self) -> int:
        self.looks += 1
        self.began.set()
        assert self.goes_on.wait(60)
        if self.away:
            raise TransferError("the database is away")
        return self.looks

    def known(self) -> dict[str, Known]:
        return {}


def test_many_refusals_share_a_look_that_began_after_them():
    register = Register()

    async def looks(count: int) -> list[object]:
        register.looks = 0
        register.began.clear()
        register.goes_on.clear()
        gateway = Gateway(cast("Fleet", register), Options())
        first = asyncio.create_task(gateway.look_now())
        assert await asyncio.to_thread(register.began.wait, 60)
        others = [asyncio.create_task(gateway.look_now()) for _ in range(count)]
        await asyncio.sleep(0)  # they wait for the first one, which may have read the register before they came
        register.goes_on.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    assert asyncio.run(looks(50)) == [None] * 51
    assert register.looks == 2
    register.away = True  # a look that failed serves nobody: no report is refused for what may be old
    assert {type(found) for found in asyncio.run(looks(5))} == {RefusedError}
