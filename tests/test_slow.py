"""Real schedules, real kill signals, and the whole demo at a small size: `make test-slow`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.setup import create
from flows.workspace import Workspace
from model import photographs, versions
from model.data import prepare
from model.train import WEIGHTS, TrainOptions, train
from registry.catalog import Subject
from registry.champions import champion_of
from tests.conftest import CONFIG, VERSION, write_images
from tests.test_flows import SETTINGS

pytestmark = pytest.mark.slow

FERRY = [sys.executable, "-m", "flows.cli"]
SUBJECT = Subject(line="shapes", configuration="I", variant="full")
PATIENCE = 300.0  # seconds


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}


def prepared(root: Path, settings: str = SETTINGS) -> Workspace:
    workspace = create(root, [], settings)
    write_images(root / "data/shapes", 120)
    versions.add(root, "data/shapes", "shapes", "first")
    return workspace


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Poll until something happened; fail if the process ends first, or after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None:
            pytest.fail(f"the process ended with {process.returncode}: {process.stderr.read() if process.stderr else ''}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("it did not happen in time")
        time.sleep(0.2)  # waiting for another process, not guessing how long it takes


def test_schedule_fires_and_ends_with_its_server(tmp_path: Path):
    workspace = prepared(tmp_path / "ws")
    command = [*FERRY, "-w", str(workspace.root), "serve", "--cron", "* * * * *"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment())
    try:
        wait_for(lambda: workspace.catalog.champion(SUBJECT) is not None, process)  # the last step of a promotion
        started = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    champion = workspace.catalog.champion(SUBJECT)
    assert champion is not None
    assert champion.number == 1
    assert [e.facts["version"] for e in workspace.ledger.entries() if e.kind == "promotion"] == [1]
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def test_killed_retraining_goes_on_and_ends_in_the_same_weights(tmp_path: Path):
    settings = SETTINGS.replace("steps = 60", "steps = 300")
    killed, undisturbed = prepared(tmp_path / "killed", settings), prepared(tmp_path / "undisturbed", settings)
    command = [*FERRY, "--quiet", "-w", str(killed.root), "retrain", "shapes", "--json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment())
    wait_for(lambda: any(killed.work.glob("runs/*/resume.safetensors")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in children:  # its Prefect server, which the killed process could not end
        child.kill()
    process.communicate()
    assert killed.catalog.versions(SUBJECT) == []

    for workspace in (killed, undisturbed):
        again = [*FERRY, "--quiet", "-w", str(workspace.root), "retrain", "shapes", "--json"]
        done = subprocess.run(again, capture_output=True, text=True, env=clean_environment())
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["models"][0]["outcome"] == "promote"
    first, second = champion_of(killed, SUBJECT), champion_of(undisturbed, SUBJECT)
    assert first is not None
    assert second is not None
    assert first.version == second.version == 1
    assert first.weights == second.weights


def test_small_demo_killed_twice_still_tells_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from flows import demo

    small = demo.SETTINGS.replace('tier = "nano"', 'tier = "test"')
    for old, new in (("steps = 420", "steps = 250"), ("steps = 650\nbatch = 8\nlearning_rate = 1.5e-3", "steps = 700\nbatch = 32\nlearning_rate = 4e-3"),
                     ("learning_rate = 1.5e-3", "learning_rate = 8e-3"),
                     ("latency_ms = 3000", "latency_ms = 3000\nvariants = ['full', 'dev']"), ("steps = 300", "steps = 200"), ("batch = 8", "batch = 32"),
                     ("implausible = 0.7 ", "# implausible = 0.7 "), ("coverage = 0.1", "coverage = 0.1\ncaptions = false\nimplausible = 1.0\nduplicates = 1.0")):  # fmt: skip
        assert old in small
        small = small.replace(old, new)
    monkeypatch.setattr(demo, "SETTINGS", small)
    photographs.surfaces(tmp_path / "patches", 1)
    config = CONFIG.model_copy(update={"text_length": 20})
    learnt = TrainOptions(steps=250, batch=32, learning_rate=8e-3, stored="bfloat16")
    base = train(config, prepare(tmp_path / "patches", config, tmp_path / "cache"), VERSION, learnt, tmp_path / "base")
    monkeypatch.setattr(demo, "BASE", base.folder / WEIGHTS)
    said: list[str] = []

    class PulledPlugError(Exception):
        pass

    def until(text: str) -> Callable[[str], None]:
        def say(line: str) -> None:
            said.append(line)
            if text in line:
                raise PulledPlugError

        return say

    for where in ("three devices enroll", "the devices update by delta"):
        with pytest.raises(PulledPlugError):
            demo.Demo(tmp_path / "demo", until(where)).play()
    story = demo.Demo(tmp_path / "demo", said.append)
    story.play()
    summary = story.summary()

    assert said.count("first delivery: patches cut from photographs, and scanned digits → DVC") == 1  # done once only
    assert len(summary["data_versions"]) == 2
    assert summary["model_versions"] == [1, 2, 3]
    assert [row["outcome"] for row in summary["gate"].values()] == ["promote", "promote", "refuse"]
    assert summary["champion"] == 2
    for acts in summary["devices"].values():
        assert acts["installed"] != acts["updated"] == acts["after_broken"]
    assert all({"starting", "installed", "confirmed", "refused"} <= {*events} for events in summary["heard"].values())
    assert not any((tmp_path / "demo" / "inbox").glob("*.json"))  # all came through the gateway
    assert summary["bytes"]["delta"] < summary["bytes"]["full"]
    assert all("the running model's range is" in reason for reason in summary["refused"].values())
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")
    assert demo.text(summary)

    again = demo.Demo(tmp_path / "demo", lambda line: pytest.fail(f"a finished demo did something: {line}"))
    again.play()
    assert again.summary() == summary
