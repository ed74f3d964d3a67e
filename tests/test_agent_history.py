"""The history of a device: what it notes, that it is bounded, and that nothing depends on it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from typing import Any

import pytest

from ota.agent import child, history, trial, updater
from ota.agent.state import State
from ota.errors import GateError, OtaError, TransferError, TrustError
from ota.release.bundle import Bundle
from tests.fleet_kit import Cut, Device, Field, expire, metadata_file, publish, sign_in_place

pytest_plugins = ["tests.fleet_kit", "tests.test_agent_machine"]


def events(device: Device) -> list[tuple[str, int | None]]:
    return [(entry.event, entry.release) for entry in history.read(device.home)]


@pytest.fixture
def quick(tries: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace child processes by answers that real ones gave."""
    from tests.test_agent_machine import Children

    monkeypatch.setattr(child, "run", Children(tries).run)


@pytest.mark.usefixtures("quick")
def test_history_tells_what_happened(offered: Field, bundles: dict[str, Bundle]):
    device = offered.device
    assert device.update().changed
    with device.home.locked():
        trial.rollback(device.home)
        trial.forget(device.home, bundles["second"].manifest.digest[:12])
    publish(offered.repository, bundles["garbage"])
    with pytest.raises(GateError):
        device.update()
    assert events(device) == [
        ("installed", 1), ("confirmed", 1), ("installed", 2), ("confirmed", 2), ("rolled_back", 2), ("forgotten", 2), ("refused", None),
    ]  # fmt: skip
    told = device.command("history").splitlines()
    assert len(told) == 7
    assert "installed     release 2 (" in told[2]
    assert ") by a delta " in told[2]
    assert told[2].endswith("bytes fetched")
    assert "rolled back   release 2 (" in told[4]
    assert "by the operator" in told[4]
    assert "refused" in told[6]
    value = json.loads(device.command("history", "--json", "-n", "2"))
    assert [entry["event"] for entry in value["entries"]] == ["forgotten", "refused"]
    assert value["entries"][1]["active"] == device.active


def test_look_that_changes_nothing_is_not_noted(scene: Field):
    before = (scene.device.root / "history.json").read_bytes()
    assert not scene.device.update().changed
    scene.device.update(check_only=True)
    assert (scene.device.root / "history.json").read_bytes() == before


def test_new_device_has_none(scene: Field):
    new = Device.init(scene.folder / "new", scene.repository)
    assert new.command("history") == "nothing has happened yet; run `ferry-agent update`\n"
    assert json.loads(new.command("history", "--json")) == {"entries": []}


def test_device_of_before_begins_with_what_runs(scene: Field):
    (scene.device.root / "history.json").unlink()
    scene.device.update()
    ((entry),) = history.read(scene.device.home)
    assert (entry.event, entry.release, entry.text) == ("running", 1, "the history begins here")


@pytest.mark.usefixtures("quick")
def test_power_cut_between_the_switch_and_its_entry_is_noted_later(offered: Field, monkeypatch: pytest.MonkeyPatch):
    def cut(*_: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(history, "_write", cut)
        with pytest.raises(Cut):
            offered.device.update()
    offered.device.update()
    assert events(offered.device)[2:] == [("running", 2), ("confirmed", 2)]
    assert "the power was cut before this was noted" in offered.device.command("history")


def test_failures_in_a_row_share_an_entry(scene: Field, monkeypatch: pytest.MonkeyPatch):
    def fail(kind: type[OtaError], why: str) -> None:
        def refuse(*_: Any) -> None:
            raise kind(why)

        with monkeypatch.context() as patch:
            patch.setattr(updater, "_update", refuse)
            with pytest.raises(kind):
                scene.device.update()

    for i in range(30):
        fail(TransferError, f"nobody there, {i}")
    fail(TrustError, "an old copy")
    fail(TransferError, "nobody there")
    last = history.read(scene.device.home)[-3:]
    assert [(entry.event, entry.kind, entry.times) for entry in last] == [
        ("failed", "TransferError", 30), ("failed", "TrustError", 1), ("failed", "TransferError", 1),
    ]  # fmt: skip
    assert last[0].text == "nobody there, 29"
    assert last[0].until >= last[0].time
    assert "(30 times until 2" in scene.device.command("history")


def test_only_the_newest_are_kept(scene: Field):
    for i in range(history.KEPT + 50):
        history.note(scene.device.home, "refused", None, f"{i} " + "\x1b[31m☃" * 400)
    entries = history.read(scene.device.home)
    assert len(entries) == history.KEPT
    assert entries[-1].text.startswith("149 ")
    told = scene.device.command("history")
    assert len(told.splitlines()) == history.KEPT
    assert "\x1b" not in told
    assert "\x1b" not in (scene.device.root / "history.json").read_text()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"[]", b"{}", b'{"entries": [{"time": -1, "event": "installed"}]}', b"[" * 9999, b"\xff" * 99]
)
def test_damaged_history_costs_nothing_else(scene: Field, content: bytes):
    (scene.device.root / "history.json").write_bytes(content)
    assert scene.device.command("history") == "nothing has happened yet; run `ferry-agent update`\n"
    before = scene.device.state
    assert scene.device.update().reason == "release 1 is installed"
    assert scene.device.state == before
    assert events(scene.device) == [("running", 1)]


def test_entries_of_a_newer_agent_are_read_past(scene: Field):
    (scene.device.root / "history.json").write_text(
        json.dumps(
            {"schema_version": 9, "who": 1, "entries": [{"time": 5, "event": "moved", "place": "hall 3", "text": "to hall 3"}]}
        )
    )
    assert scene.device.command("history") == "1970-01-01 00:00 UTC  moved         to hall 3\n"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_history_that_cannot_be_written_stops_nothing(
    offered: Field, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, number: int
):
    writes = type(offered.device.home.disk).replace

    def replace(disk: Any, name: str, data: bytes, durable: bool = True) -> None:
        if name == "history.json":
            with disk._errors(name):
                raise OSError(number, os.strerror(number))
        writes(disk, name, data, durable)

    monkeypatch.setattr(type(offered.device.home.disk), "replace", replace)
    assert offered.device.update().changed
    monkeypatch.undo()
    assert offered.device.state == State(
        active=bundles["second"].manifest.digest, previous=bundles["first"].manifest.digest, seq=2, previous_seq=1
    )
    assert events(offered.device) == [("installed", 1), ("confirmed", 1)]


def test_expired_signatures_are_noted_by_name(scene: Field):
    sign_in_place(metadata_file(scene.repository, "timestamp"), scene.repository.keys, "timestamp", expire)
    shutil.rmtree(scene.device.root / "metadata")
    scene.device.command("update", code=5)
    assert "failed        the repository's signatures have expired" in scene.device.command("history")
