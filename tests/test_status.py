"""`ferry status`, `ferry fleet status`: what somebody asks first, on one screen, without anything heavy."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock
from typer.testing import CliRunner

from flows import progress, running, triggers
from flows.cli import app
from flows.workspace import Workspace
from ota.agent.rules import bucket
from ota.fleet.store import Fleet
from ota.policy import Policy
from ota.release import rollout
from ota.report import DeviceReport, SignedReport
from tests.bench.commands import roll_out
from tests.test_policies import HEAVY

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
WEIGHTS = hashlib.sha256(b"weights").hexdigest()  # of the made-up release
WIDTH, LINES = 80, 24


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """Provide a workspace with a release that is open to all devices."""
    roll_out(tmp_path / "ws")
    made = Workspace(tmp_path / "ws")
    yield made
    made.ledger.close()
    made.fleet.close()


def ferry(workspace: Workspace, *words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["-w", str(workspace.root), *words])
    assert result.exit_code == code, result.output
    return result.output


def status(workspace: Workspace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ferry(workspace, "status", "--json"))
    return found


def promote(workspace: Workspace, version: int, weights: str, who: str | None = None) -> None:
    facts = {
        "version": version, "from": None, "weights": weights, "overruled": False, "how": "command", "gate": "promote",
        "decision": "", "becomes_anchor": False,
    }  # fmt: skip
    workspace.ledger.append("promotion", "shapes/I/full", "a test", facts, who=who)


def judge(workspace: Workspace, version: int, outcome: str, champion: str = "") -> None:
    facts = {"version": version, "outcome": outcome, "decision": "d" * 64, "scorecard": "5" * 64, "champion": champion}
    workspace.ledger.append("gate", "shapes/I/full", "as it was measured", facts)


def enroll(workspace: Workspace, *names: str) -> None:
    for name in names:
        workspace.fleet.enroll(name, KEY.public_key().public_bytes_raw().hex())


def report(workspace: Workspace, device: str, active: str | None, number: int = 1, **fields: Any) -> None:
    """Leave a report in the inbox, as a device does."""
    made = DeviceReport.model_validate({
        "device": device, "boot": "b", "number": number, "time": 1, "line": "shapes", "device_class": "edge", "event": "installed",
        "manifest": active, "active": active, **fields,
    })  # fmt: skip
    signed = SignedReport(report=made, signature=KEY.sign(made.canonical()).hex())
    workspace.inbox.mkdir(exist_ok=True)
    (workspace.inbox / f"{device}-{number}.json").write_text(signed.model_dump_json())


def commands(workspace: Workspace) -> list[str]:
    return [row["command"] for row in status(workspace)["waits"]]


def test_names_each_next_command(workspace: Workspace):
    assert commands(workspace) == ["ferry data add shapes"]
    pointer = workspace.root / f"{workspace.line('shapes').data}.dvc"
    pointer.parent.mkdir(exist_ok=True)
    pointer.write_text("outs:\n- md5: 11111111111111111111111111111111.dir\n  path: shapes\n")
    assert commands(workspace) == ["ferry retrain shapes"]
    judge(workspace, 1, "promote if reasoned")
    assert "ferry promote shapes/I/full 1 --reason ..." in commands(workspace)
    workspace.ledger.append("pending", "shapes/I/full", "it passed", {"version": 2})
    assert "ferry approve shapes/I/full 2 --reason ..." in commands(workspace)
    promote(workspace, 2, "7" * 64)
    assert commands(workspace) == ["ferry retrain shapes", "ferry release shapes/edge"]
    promote(workspace, 3, WEIGHTS)
    assert commands(workspace) == ["ferry retrain shapes"]
    ferry(workspace, "rollout", "halt", "shapes")
    assert "ferry rollout status shapes/edge" in commands(workspace)
    triggers.leave(workspace, "shapes", "ticket 7", "dust on the lens")
    assert status(workspace)["waits"][-1] == {"what": "shapes is to be retrained: dust on the lens", "command": "ferry serve"}


def test_version_that_the_gate_refused_asks_nothing_of_a_person(workspace: Workspace):
    judge(workspace, 1, "refuse")
    found = status(workspace)
    assert commands(workspace) == ["ferry data add shapes"]
    assert (found["models"][0]["newest"], found["models"][0]["outcome"]) == (1, "refuse")


def test_one_screen_holds_the_worst(workspace: Workspace):
    """Fill everything to its limit, with hostile texts: it stays within 24 lines of 80 columns, and nothing controls the terminal."""
    settings = workspace.root / "ferry.toml"
    lines = "".join(f'[lines.a-line-with-a-name-of-forty-letters-{i}]\ndata = "data/{i}"\n' for i in range(9))
    settings.write_text(settings.read_text() + lines)
    full = Workspace(workspace.root)
    promote(full, 3, "7" * 64, who="\x1b[31mmallory\u202e" * 9)
    names = [f"device-with-a-name-of-some-length-{i:04d}" for i in range(30)]
    enroll(full, *names)
    for name in names[:15]:
        report(full, name, "3" * 64)
    for part in ("serving", "release"):
        FileLock(full.work / f"{part}.lock", is_singleton=True).acquire()
        running.place(full.work, part).write_text(json.dumps({"what": "x" * 200, "doing": "y" * 500}))
    with FileLock(full.work / "retraining.lock"), running.noted(full.work, "retraining", "shapes " * 40):
        progress.advance("train \x1b]0;title\x07" + "x" * 400, 1, 10)
        text = ferry(full, "status")
        progress.advance("train \x1b]0;title\x07" + "x" * 400, 10, 10)
    rows = text.splitlines()
    assert max(map(len, rows)) <= WIDTH
    assert len(rows) <= LINES
    for part in ("serving", "release"):
        FileLock(full.work / f"{part}.lock", is_singleton=True).release()
    assert "devices" in text
    assert not {"\x1b", "\u202e", "\x07"} & set(text)
    assert "30 enrolled, 15 heard" in text
    full.ledger.close()
    full.fleet.close()


def test_says_what_runs_and_how_far_it_is(workspace: Workspace):
    assert status(workspace)["runs"] == []
    running.place(workspace.work, "retraining").write_text('{"pid": 1, "doing": "left by a process that was killed"}')
    assert status(workspace)["runs"] == []
    with FileLock(workspace.work / "retraining.lock"), running.noted(workspace.work, "retraining", "shapes"):
        progress.advance("train shapes/I/full", 10, 10, "loss 0.31")
        (run,) = status(workspace)["runs"]
        assert (run["part"], run["pid"], run["what"]) == ("retraining", os.getpid(), "shapes")
        assert run["doing"] == "train shapes/I/full: 10 of 10, loss 0.31"
        assert "retraining of shapes" in ferry(workspace, "status")
    with FileLock(workspace.work / "serving.lock"):
        assert [run["part"] for run in status(workspace)["runs"]] == ["serving"]
    assert status(workspace)["runs"] == []


def test_looking_ends_no_command(workspace: Workspace):
    """Look at a lock without a pause while it is taken again and again: every command gets it, and is seen to hold it."""
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            running.is_held(workspace.work, "release")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(50):
            with workspace.locked("release"):
                assert running.is_held(workspace.work, "release")
    finally:
        done.set()
        looking.join()
    assert not running.is_held(workspace.work, "release")


def test_devices_are_heard_silent_or_behind(workspace: Workspace):
    policy = workspace.repository.policy("shapes", "edge")
    assert policy is not None
    enroll(workspace, "dev-1", "dev-2", "dev-3")
    report(workspace, "dev-1", policy.manifest)
    report(workspace, "dev-2", "0" * 64, event="refused", reason="it is too slow")
    text = ferry(workspace, "status")
    assert "3 enrolled, 2 heard" in text
    assert "silent: dev-3" in text
    assert "not running it: dev-2" in text
    one, two, three = status(workspace)["devices"]
    assert (one["release"], one["wave"], one["waves"], one["behind"]) == (1, 1, 1, False)
    assert (two["release"], two["behind"], two["reason"]) == (None, True, "it is too slow")
    assert three["heard"] is None


def test_many_new_reports_are_counted_and_left(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flows.status.UNREAD", 2)
    enroll(workspace, "dev-1")
    for number in (1, 2, 3):
        report(workspace, "dev-1", "1" * 64, number)
    text = ferry(workspace, "status")
    assert "1 enrolled, 0 heard, 1 silent; 3 unread: ferry fleet status" in text
    assert len(list(workspace.inbox.glob("*.json"))) == 3
    ferry(workspace, "fleet", "status")
    assert "1 heard" in ferry(workspace, "status")


def test_fleet_status_shows_time_release_wave_and_counts(workspace: Workspace):
    policy = workspace.repository.policy("shapes", "edge")
    assert policy is not None
    enroll(workspace, "dev-1", "dev-2", "dev-3")
    report(workspace, "dev-1", policy.manifest, event="confirmed")
    report(workspace, "dev-2", None, event="refused", reason="it is too slow")
    before = datetime.now(UTC).replace(second=0, microsecond=0)
    text = ferry(workspace, "fleet", "status")
    rows = {row.split()[0]: row.split() for row in text.splitlines()}
    heard = datetime.fromisoformat(" ".join(rows["dev-1"][1:3])).replace(tzinfo=UTC)
    assert before <= heard <= before + timedelta(minutes=10)
    assert rows["dev-1"][3:] == ["confirmed", "1", "1", "of", "1", "0.1.0", "or", "older"]  # its report does not name the agent
    assert rows["dev-2"][3:] == ["refused", "-", "1", "of", "1", "0.1.0", "or", "older", "it", "is", "too", "slow"]
    assert rows["dev-3"][1:] == ["never", "silent", "-", "-", "unknown"]
    assert "1 of 3 devices: shapes/edge, release 1" in text
    assert "1 of 3 devices: their wave is open, and they do not run the release" in text
    assert "1 of 3 devices: silent" in text
    told = json.loads(ferry(workspace, "fleet", "status", "--json"))["devices"]
    assert (told["dev-1"]["active"], told["dev-1"]["standing"]["release"], told["dev-3"]) == (policy.manifest, 1, None)


@pytest.mark.parametrize("device", [f"dev-{i}" for i in range(40)])
def test_factory_and_device_compute_the_same_wave(device: str):
    waves = [{"bps": bps, "not_before": 0} for bps in (100, 3000, 7000)]
    policy = Policy.model_validate({
        "line": "shapes", "device_class": "edge", "seq": 1, "manifest": "1" * 64, "salt": "1-1111", "waves": waves, "revert": False,
    })  # fmt: skip
    mine = bucket(device, policy.salt)
    expected = next((i for i, bps in enumerate((100, 3000, 7000)) if mine < bps), None)
    assert rollout.wave_of(policy, device) == expected


def test_last_report_is_the_one_with_the_highest_number(workspace: Workspace):
    enroll(workspace, "dev-1", "dev-2")
    for number in (2, 10, 9):
        report(workspace, "dev-1", f"{number:064x}", number)
    workspace.fleet.collect(workspace.inbox)
    heard = workspace.fleet.heard()
    assert heard["dev-2"] is None
    last = heard["dev-1"]
    assert last is not None
    assert last.report.number == 10
    assert abs(last.at - time.time()) < 3600
    assert {name: found.report if found else None for name, found in heard.items()} == workspace.fleet.devices()


def test_damaged_part_hides_no_other(workspace: Workspace):
    promote(workspace, 3, WEIGHTS)
    enroll(workspace, "dev-1")
    (workspace.root / "repository/metadata/timestamp.json").write_text("{")
    result = CliRunner().invoke(app, ["-w", str(workspace.root), "status"])
    assert result.exit_code != 0
    assert "3 since 20" in result.output
    assert "ferry:" in result.output
    assert "Traceback" not in result.output


def test_expiry_past_half_of_its_life_names_the_command(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    from ota.release import metadata

    monkeypatch.setitem(metadata.LIFETIMES, "timestamp", timedelta(days=365))  # so the two weeks that are left are less than half
    (timestamp,) = (row for row in status(workspace)["expires"] if row["role"] == "timestamp")
    assert (timestamp["alarm"], timestamp["command"]) == (True, "ferry trust refresh")
    assert "ferry trust refresh" in ferry(workspace, "status")


def test_nothing_heavy_is_loaded(workspace: Workspace):
    code = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app\n"
        f"done = CliRunner().invoke(app, ['-w', {str(workspace.root)!r}, 'status']); assert done.exit_code == 0, done.output\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_status_of_no_workspace_says_so(tmp_path: Path):
    result = CliRunner().invoke(app, ["-w", str(tmp_path), "status"])
    assert result.exit_code == 3
    assert "ferry init" in result.output


def test_heard_reads_one_report_of_each_device(tmp_path: Path):
    fleet = Fleet(f"sqlite:///{tmp_path / 'fleet.db'}")
    assert fleet.heard() == {}
    fleet.close()
