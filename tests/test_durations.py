"""Durations and moments as people write and read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.cli import app
from ota import durations
from ota.agent.measured import percentile
from ota.policy import Policy, Wave
from ota.release import rollout
from tests.conftest import agent


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("86400", 86_400),
        ("45s", 45),
        ("30m", 1800),
        ("2h", 7200),
        ("3d", 259_200),
        ("1w", 604_800),
        ("1d12h", 129_600),
        (" 2H ", 7200),
    ],
)
def test_duration_is_read(text: str, seconds: int):
    assert durations.parse(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "h", "2 h", "2y", "-1", "1.5h", "1e9", "２h", "2h!", "9" * 31, "9" * 13 + "h", "2h3", "\x1b[2J"]
)
def test_what_is_no_duration_is_refused(text: str):
    with pytest.raises(ValueError, match="is no duration; write it as 90s, 30m, 2h, 3d or 1d12h"):
        durations.parse(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (-5, "0s"), (59, "59s"), (60, "1m"), (61, "1m1s"), (3599, "1h"), (3600, "1h"), (7199, "2h"), (5400, "1h30m"),
        (86_400, "1d"), (172_788, "2d"), (129_600, "1d12h"), (31_536_000, "365d"),
    ],
)  # fmt: skip
def test_duration_is_told_in_its_two_largest_units(seconds: int, text: str):
    assert durations.spoken(seconds) == text


@given(st.integers(0, 10**9))
def test_what_is_told_can_be_typed(seconds: int):
    assert abs(durations.parse(durations.spoken(seconds)) - seconds) <= max(0.05 * seconds, 0)


def test_moment_is_told_in_utc():
    assert durations.utc(0) == "1970-01-01 00:00 UTC"
    assert durations.until(1_767_225_600, 1_767_225_600 - 172_788) == "2026-01-01 00:00 UTC (in 2d)"
    assert durations.utc(2**53) == f"{2**53} seconds after 1970"


def test_rollout_tells_when_its_next_wave_opens():
    waves = [Wave(bps=100, not_before=0), Wave(bps=10_000, not_before=1_767_225_600)]
    policy = Policy(line="a", device_class="b", seq=1, manifest="1" * 64, salt="", waves=waves)
    said = rollout.describe(policy, 1_767_225_600 - 172_788)
    assert said == "release 1 is open to 1 % of the fleet, to 100 % of it at 2026-01-01 00:00 UTC (in 2d)"


@pytest.mark.parametrize("soak", ["1y", "366d", "-1", ""])
def test_soak_that_is_no_duration_is_wrong_usage(soak: str):
    result = CliRunner().invoke(app, ["rollout", "start", "shapes", "--soak", soak])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--soak" in result.stderr


def test_agent_takes_durations():
    told = agent("run", "--every", "5s")
    assert told.exit_code == 2
    assert "5s is not 10 or more, up to 2592000" in told.stderr
    assert "is no duration; write it as 90s, 30m, 2h" in agent("run", "--every", "often").stderr
    assert re.search(r"is not a workspace", CliRunner().invoke(app, ["-w", "/nowhere", "serve", "--look-every", "2m"]).stderr)


@pytest.mark.parametrize("count", range(1, 60))
def test_higher_percentile_is_never_lower(count: int):
    values = [float(i) for i in range(1, count + 1)]
    p50, p95 = percentile(values, 0.5), percentile(values, 0.95)
    assert values[0] <= p50 <= p95 <= values[-1]
    assert sum(v <= p95 for v in values) >= 0.95 * count
    assert sum(v <= p50 for v in values) >= 0.5 * count
