"""Cron schedules: what is five fields of cron is taken and means the same to Prefect, anything else is refused by name."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from prefect.client.schemas.schedules import CronSchedule
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import WorkspaceError
from flows.schedules import check_cron, zone_of
from flows.setup import create

GOOD = [
    "0 3 * * 1", "*/5 * * * *", "0 22-4 * * *", "0 0 ? * *", "30 6 * JAN,jul mon-fri", "0 8 L * *", "0 8 * * MON#1", "0 0 * * 7", "5/20 * * * *",
    "0 3 1 * 1", "  0 3 * * 1 ", "0 3 * * FRI-MON",
]  # fmt: skip


@pytest.mark.parametrize("cron", GOOD)
def test_five_fields_are_taken_by_ferry_and_by_prefect(cron: str):
    check_cron(cron)
    CronSchedule(cron=cron, timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ("0 0 3 * * 1", "6 are given; cron has no seconds and no year"),
        ("0 3 * * 1 2027 *", "7 are given"),
        ("0 3 * *", "write five fields"),
        ("", "write five fields"),
        ("@daily", "write '0 0 \\* \\* \\*'"),
        ("@Weekly", "write '0 0 \\* \\* 0'"),
        ("@reboot", "write five fields"),
        ("60 3 * * 1", "'60' is no minute"),
        ("0 24 * * 1", "'24' is no hour"),
        ("0 3 0 * 1", "'0' is no day of the month"),
        ("0 3 * 13 1", "'13' is no month"),
        ("0 3 * * 8", "'8' is no day of the week"),
        ("0 3 * * MONDAY", "'MONDAY' is no day of the week"),
        ("R 3 * * *", "'R' is no minute"),
        ("H 3 * * *", "'H' is no minute"),
        ("0 3 * * 5L", "'5L' is no day of the week"),
        ("0 3 ? ? *", "'\\?' is no month"),
        ("*/0 * * * *", "'\\*/0' is no minute"),
        ("*/90 * * * *", "'\\*/90' is no minute"),
        ("0 3 30 2 *", "never due"),
        ("0 3 30-31 2 *", "never due"),
        ("0 3 ١ * *", "write five fields"),
        ("0 3\n* * 1", "write five fields"),
        ("0 3 *, * 1", "'' is no day of the month"),
    ],
)
def test_anything_else_is_refused_by_name(cron: str, said: str):
    with pytest.raises(WorkspaceError, match=said) as refused:
        check_cron(cron)
    assert str(refused.value).isprintable()


def test_schedule_is_due_at_the_wall_clock_of_its_zone():
    """Ask Prefect itself, across the change to summer time: 4 o'clock in Berlin is 3 and then 2 o'clock UTC."""
    import anyio
    from prefect.server.schemas.schedules import CronSchedule

    schedule = CronSchedule(cron="0 4 * * *", timezone="Europe/Berlin")
    due = anyio.run(schedule.get_dates, 3, datetime(2027, 3, 27, tzinfo=ZoneInfo("Europe/Berlin")))
    assert [when.astimezone(UTC).hour for when in due] == [3, 2, 2]


@pytest.mark.parametrize(
    ("zone", "said"),
    [
        ("Berlin", "Europe/Berlin"),
        ("europe/berlin", "Europe/Berlin"),
        ("Mars/Base", "UTC, or one such"),
        ("", "UTC"),
        ("../../etc/passwd", "UTC"),
    ],
)
def test_unknown_time_zone_is_refused_with_what_to_write(zone: str, said: str):
    with pytest.raises(WorkspaceError, match=f"write {said}"):
        check_cron("0 3 * * 1", zone)
    assert zone_of("Europe/Berlin") == ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize("words", [("--cron", "0 0 3 * * 1"), ("--timezone", "Berlin")])
def test_serve_refuses_them_before_it_starts_anything(words: tuple[str, ...], tmp_path: Path):
    workspace = create(tmp_path / "ws", ["shapes"])
    told = CliRunner().invoke(app, ["-w", str(workspace.root), "serve", *words])
    assert told.exit_code == 3, told.output
    assert "write" in told.output
    assert not (workspace.work / "serving.lock").exists()
