"""What long commands say while they run: each phase, how far it is, what is left, the loss."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flows import progress
from flows.cli import progress as shown


@pytest.fixture(autouse=True)
def _no_paces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_paces", {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Provide a clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_follows_the_pace_of_this_process(clock: list[float]):
    progress.advance("train", 300, 400, "loss 0.9")  # resumed: the first 300 steps cost this process nothing
    assert progress.time_left("train", 300, 400) is None
    clock[0] = 50.0
    progress.advance("train", 350, 400, "loss 0.31")
    assert progress.time_left("train", 350, 400) == pytest.approx(50.0)
    assert progress.described("train", 350, 400) == "train: 350 of 400, 0:50 left, loss 0.31"
    progress.advance("train", 400, 400)
    assert progress.described("train", 400, 400) == "train: 400 of 400"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3600, "1:00:00"), (7384, "2:03:04")])
def test_time_is_written_as_a_clock_shows_it(seconds: float, text: str):
    assert progress.clock(seconds) == text


def test_lines_say_phases_pace_and_loss(clock: list[float], capfd: pytest.CaptureFixture[str]):
    with shown.bars():
        progress.say("train shapes/I/full: 100 steps from noise")
        for step in range(1, 101):
            clock[0] = 1.0 * step
            progress.advance("train shapes/I/full", step, 100, f"loss {1 / step:.3g}")
        progress.say("a caption with \x1b[31m colour")
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "  train shapes/I/full: 100 steps from noise"
    assert told[1] == "  train shapes/I/full: 1 of 100, loss 1"
    assert "  train shapes/I/full: 16 of 100, 1:24 left, loss 0.0625" in told
    assert told[-2] == "  train shapes/I/full: 100 of 100, loss 0.01"
    assert "\x1b" not in told[-1]
    assert len(told) < 12  # a line now and then, not one for each step


def test_bars_show_what_is_left_and_keep_sentences(clock: list[float], monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=20)
    monkeypatch.setattr(shown, "Console", lambda **_: console)
    with shown.bars():
        progress.say("export shapes/I/full as ONNX [bold]")
        progress.advance("train [x]", 1, 100, "loss 1")
        clock[0] = 10.0
        progress.advance("train [x]", 51, 100, "loss 0.5")
        console.file.flush()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "export shapes/I/full as ONNX [bold]" in text


def test_nothing_is_said_with_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from flows.cli import shared

    monkeypatch.setattr(shared.Options, "quiet", True)
    shared.phase("load")
    with shared.showing_progress():
        progress.say("train")
        progress.advance("train", 1, 2)
    assert capfd.readouterr().err == ""


def test_listener_that_ends_hears_nothing_more():
    heard: list[str] = []
    with progress.hearing(heard.append):
        progress.say("one")
    progress.say("two")
    assert heard == ["one"]
    assert sys.modules["flows.progress"]._hearers == []
