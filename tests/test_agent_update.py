"""Updates on a device: every way to get a bundle, bad links and disks, cuts at every step, trials and rollbacks."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ota.agent import child, drawing, plan, rules, sampler, slots, trial, updater
from ota.agent.disk import Disk
from ota.agent.network import NotFoundError
from ota.agent.state import TRIAL_GOOD, TRIAL_LOADS, Home, State, Trial
from ota.durations import spoken
from ota.errors import (
    BaseError,
    BusyError,
    DeviceError,
    DiedError,
    GateError,
    LateError,
    OperatorError,
    OtaError,
    RoomError,
    SoftwareError,
    StateError,
    TransferError,
    UnfinishedError,
)
from ota.release.bundle import Bundle, assemble
from ota.release.rollout import halt, start
from tests.conftest import few, origin
from tests.fleet_kit import (
    CLASS,
    LINE,
    Cut,
    Device,
    Field,
    Request,
    WebServer,
    closed_port,
    everyone,
    name_delta,
    publish,
    untouched,
)
from tests.test_agent_attacks import with_header
from tests.test_slow import wait_for

pytest_plugins = ("tests.fleet_kit",)

ALL_STEPS = list(range(1, 13))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between retries."""
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)


def digest(bundle: Bundle) -> str:
    return bundle.manifest.digest


def steps_of(device: Device) -> tuple[updater.Outcome, list[int]]:
    seen: list[int] = []
    outcome = device.update(lambda number, _: seen.append(number))
    return outcome, seen


def files_of(bundle: Bundle) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.folder.iterdir()}


def slot_files(device: Device, bundle: Bundle) -> dict[str, bytes]:
    """Read the files in the slot of a bundle."""
    return {path.name: path.read_bytes() for path in (device.root / "slots" / digest(bundle)).iterdir()}


def stand_still(field: Field) -> None:
    """Check that the device is in order, has nothing left over, and has nothing more to do."""
    assert field.device.sound
    assert field.device.leftovers() == []
    before = field.device.facts()
    assert not field.device.update().changed
    assert field.device.facts() == before


# Every way to get a bundle


def test_fresh_device_installs_in_full(fielded, bundles):
    device = fielded.device
    assert device.state == State(active=digest(bundles["first"]), seq=1)
    assert slot_files(device, bundles["first"]) == files_of(bundles["first"])
    assert device.events() == ["starting", "installed", "confirmed"]
    assert [report.number for report in device.reports()] == [1, 2, 3]
    assert device.reports()[1].received > bundles["first"].manifest.size
    stand_still(fielded)


def test_update_by_delta(updated_once, bundles, step):
    device = updated_once.device
    assert device.state == State(active=digest(bundles["second"]), previous=digest(bundles["first"]), seq=2, previous_seq=1)
    assert updated_once.steps == ALL_STEPS
    assert slot_files(device, bundles["second"]) == files_of(bundles["second"])
    assert device.events()[3:] == ["starting", "installed", "confirmed"]
    starting, installed, confirmed = device.reports()[3:]
    assert (starting.active, starting.manifest) == (digest(bundles["first"]), digest(bundles["second"]))
    assert (installed.active, installed.reason) == (digest(bundles["second"]), "delta")
    assert step.stat().st_size < installed.received < step.stat().st_size + 10_000
    assert confirmed.milliseconds > 0
    stand_still(updated_once)


def test_check_changes_nothing(offered):
    before = offered.device.facts(marks=False)
    outcome = offered.device.update(check_only=True)
    assert (outcome.changed, outcome.reason) == (False, "release 2 is open to this device")
    assert offered.device.facts(marks=False) == before
    assert "release 2 is open" in offered.device.command("update", "--check")
    assert offered.device.facts(marks=False) == before


def test_nothing_rolled_out_yet(repository, bundles, tmp_path):
    device = Device.init(tmp_path / "device", repository)
    assert device.update().reason == "nothing is rolled out to shapes/edge yet"
    repository.publish_release(bundles["first"].manifest, bundles["first"].folder, "e" * 64, [])
    assert device.update().reason == "nothing is rolled out to shapes/edge yet"
    assert device.state == State()
    with pytest.raises(StateError, match="no bundle is installed"):
        drawing.generate(device.home, "", 0)
    assert "runs nothing yet" in device.command("status")


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"halt": True}, "release 2 is halted"),
        ({"waves": []}, "release 2 is not meant for this device yet"),
    ],
)
def test_closed_release_not_fetched(offered, policy, reason):
    offered.repository.set_policy(everyone(offered.release, **policy))
    outcome, seen = steps_of(offered.device)
    assert reason in outcome.reason
    assert seen == [1, 2]
    assert offered.device.state.seq == 1
    assert outcome.received < 10_000


def test_window_is_waited_for(offered):
    hour = np.datetime64("now").astype("datetime64[h]").astype(int) % 24
    closed = f"{(hour + 5) % 24:02d}:00-{(hour + 7) % 24:02d}:00"
    offered.device.configure(window=closed)
    assert "waits for the maintenance window" in offered.device.update().reason
    assert offered.device.state.seq == 1


# The full bundle repairs whatever is wrong with a delta or its base


def made_by(field: Field, bundle: Bundle) -> str:
    """Update up to a complete new slot, and return how its bundle came in the end: full, or delta."""
    before = field.device.state
    names = field.device.update_until(10)
    assert slot_files(field.device, bundle) == files_of(bundle)
    assert field.device.leftovers() == []
    assert field.device.state == before
    return [name.split()[2].rstrip(",") for name in names if name.startswith("download")][-1]


def delta_file(field: Field) -> Path:
    (found,) = (field.repository.target_files / "deltas" / LINE / CLASS).iterdir()
    return found


@pytest.mark.parametrize("damage", ["altered", "lengthened", "missing"])
def test_damaged_delta_falls_back(offered, bundles, damage):
    path = delta_file(offered)
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"altered": b"\0" + data[1:], "lengthened": data + b"\0"}[damage])
    assert made_by(offered, bundles["second"]) == "full"
    assert offered.device.events()[3:] == []


def test_unpublished_delta_falls_back(scene, bundles):
    publish(scene.repository, bundles["second"])
    assert made_by(scene, bundles["second"]) == "full"


def test_delta_that_is_not_what_is_signed_is_not_opened(offered, bundles, monkeypatch):
    path, asked, real = delta_file(offered), [], child.run

    def run(task: str, **request: Any) -> dict[str, Any]:
        asked.append(task)
        return real(task, **request)

    monkeypatch.setattr(child, "run", run)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert made_by(offered, bundles["second"]) == "full"
    assert "apply" not in asked


def test_delta_as_large_as_the_bundle_is_not_fetched(scene, bundles):
    size = publish(scene.repository, bundles["second"]).full_bytes
    name_delta(scene.repository, digest(bundles["first"]), digest(bundles["second"]), bytes(size))
    names = scene.device.update_until(10)
    first, second = bundles["first"].manifest.objects, bundles["second"].manifest.objects
    fetched = sum(entry.size for name, entry in second.items() if name not in first)
    assert [name for name in names if name.startswith("download")] == [f"download the full bundle, {fetched:,} bytes"]


def test_delta_that_names_another_bundle_is_not_applied(scene, bundles, step):
    # The delta makes the right files, but its header names another target than its path.
    publish(scene.repository, bundles["second"])
    other = with_header(step.read_bytes(), target="7" * 64)
    name_delta(scene.repository, digest(bundles["first"]), digest(bundles["second"]), other)
    assert made_by(scene, bundles["second"]) == "full"


def test_base_damaged_meanwhile_falls_back(offered, bundles):
    path = offered.device.file("weights")

    def damage(number: int, name: str) -> None:
        if number == 7 and "apply" in name:
            path.write_bytes(b"")
        if number == 10:
            raise Cut

    with pytest.raises(Cut):
        offered.device.update(damage)
    assert slot_files(offered.device, bundles["second"]) == files_of(bundles["second"])
    assert offered.device.events()[3:] == ["base_corrupt"]


def test_base_that_cannot_be_repaired_falls_back(offered, bundles):
    path = offered.device.file("weights")
    path.unlink()
    (offered.repository.objects / path.name).unlink()
    assert made_by(offered, bundles["second"]) == "full"


@pytest.mark.parametrize(
    "damage", ["altered", "shortened", "missing", "manifest altered", "manifest that can still be read", "manifest missing"]
)
def test_damaged_base_is_repaired_first(offered, bundles, damage):
    path = offered.device.file("weights")
    if damage.startswith("manifest"):
        path = path.with_name("manifest.json")
    data = path.read_bytes()
    path.unlink()
    if damage.endswith("still be read"):
        other = data.replace(b'"tier":"test"', b'"tier":"best"')
        assert other != data
        path.write_bytes(other)
    elif not damage.endswith("missing"):
        path.write_bytes(data[:-1] if damage == "shortened" else b"\1" + data[1:])
    assert offered.device.sound is False
    assert "DAMAGED" in offered.device.command("status")
    assert made_by(offered, bundles["second"]) == "delta"
    assert slot_files(offered.device, bundles["first"]) == files_of(bundles["first"])
    assert offered.device.events()[3:] == ["base_corrupt"]
    assert offered.device.reports()[3].manifest == digest(bundles["first"])


def test_damaged_running_bundle_is_repaired(scene, bundles):
    path = scene.device.file("weights")
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    assert "DAMAGED, run `ferry-agent update`" in scene.device.command("status")
    before = scene.device.state
    assert scene.device.update(check_only=True).reason == "release 1 is damaged; release 1 is installed"
    assert not scene.device.sound
    outcome = scene.device.update()
    reason = "release 1 was damaged and is repaired; release 1 is installed"
    assert (outcome.changed, outcome.way, outcome.reason) == (True, "full", reason)
    assert scene.device.state == before
    assert scene.device.events()[3:] == ["base_corrupt"]
    stand_still(scene)


@pytest.mark.parametrize("policy", [{"waves": []}, {"halt": True}])
def test_repair_needs_no_offer(offered, policy):
    offered.repository.set_policy(everyone(offered.release, **policy))
    offered.device.file("weights").unlink()
    assert offered.device.update().reason.startswith("release 1 was damaged and is repaired; release 2 is ")
    stand_still(offered)


def test_cut_repair_takes_nothing_away(scene, bundles, monkeypatch):
    path = scene.device.file("golden")  # not needed to draw
    path.write_bytes(b"x")
    real = Disk.rename

    def cut(self: Disk, name: str, to: str) -> None:
        if to.startswith("slots/") and not to.startswith("slots/."):
            raise Cut
        real(self, name, to)

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rename", cut)
        with pytest.raises(Cut):
            scene.device.update()
    assert drawing.generate(scene.device.home, "", 0)[1]["good"]
    outcome = scene.device.update()
    assert outcome.received < bundles["first"].path("weights", "full").stat().st_size
    stand_still(scene)


def test_update_with_shared_file(scene, exported, tmp_path):
    # `dev` is `full` with another name in its table: weights, golden outputs and reference are the same files.
    dev = tmp_path / "dev"
    shutil.copytree(exported.folder, dev)
    table = json.loads((dev / "sampler.json").read_bytes())
    (dev / "sampler.json").write_text(json.dumps(table | {"variant": "dev"}))
    given = {"line": LINE, "device_class": CLASS, "tier": "test", "configuration": "I", "precision": "bfloat16"}
    both = assemble({"full": exported.folder, "dev": dev}, **given, origin=origin(5), out=tmp_path / "out")
    assert len(both.manifest.objects) == len(both.manifest.files) - 3
    publish(scene.repository, both)
    assert scene.device.update().way == "full"
    assert slot_files(scene.device, both) == files_of(both)
    stand_still(scene)


# Too little room or memory, and other reasons not to start


def small_disk(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Give slots and downloads a disk of their own, of this size."""

    def free(disk: Disk) -> int:
        return size - sum(p.stat().st_size for f in ("incoming", "slots") for p in (disk.root / f).rglob("*") if p.is_file())

    monkeypatch.setattr(Disk, "free", free)


def test_memory_of_a_trial_is_its_own(scene):
    # The memory of the process that started the trial does not count: with torch and 1 GiB more, no bundle would pass here.
    ballast = np.ones(2**27)
    slot = scene.device.home.slot(scene.device.active)
    answer = child.run("try", slot=str(slot.folder), digest=slot.digest, variant="full")
    assert answer["peak_mib"] < 512 < ballast.nbytes / 2**20


def test_full_download_needs_room_once(scene, bundles, monkeypatch):
    # A file is moved into its slot, not copied. The part of it that is already here needs no more room.
    size = publish(scene.repository, bundles["second"]).full_bytes
    monkeypatch.setattr("ota.agent.transport.ATTEMPTS", 1)
    small_disk(monkeypatch, 2 * size + 8 * 1024 * 1024 + 10_000)
    with WebServer(scene.repository.folder) as server:
        scene.device.configure(repository=server.address)
        server.faults.cut_after = {weights_of(bundles["second"]): 100_000}
        with pytest.raises(TransferError):
            scene.device.update()
        assert scene.device.update().way == "full"


def test_room_is_made_before_it_is_asked_for(updated, bundles, monkeypatch):
    device = on_trial(updated, loads=0)
    with pytest.raises(StateError, match="rolled back"):
        device.update()
    (device.root / "slots" / ("7" * 64)).mkdir()
    size = publish(updated.repository, bundles["garbage"]).full_bytes
    small_disk(monkeypatch, 2 * size + 8 * 1024 * 1024 + 10_000)  # no room for the rolled-back bundle as well
    assert made_by(updated, bundles["garbage"]) == "full"
    assert {path.name for path in (device.root / "slots").iterdir()} == {digest(bundles["first"]), digest(bundles["garbage"])}


def test_no_room_changes_nothing(offered, bundles, monkeypatch):
    needed = offered.repository.deltas(LINE, CLASS)[0].size + offered.release.full_bytes + 8 * 1024 * 1024
    monkeypatch.setattr(Disk, "free", lambda _: 8 * 1024 * 1024)  # neither for the delta nor for the full bundle
    with untouched(offered.device, RoomError, "make room and try again", marks=False):
        offered.device.update()
    assert not list((offered.device.root / "slots" / f".{offered.release.manifest}").iterdir())
    monkeypatch.setattr(Disk, "free", lambda _: needed)
    assert made_by(offered, bundles["second"]) == "delta"


def test_second_agent_is_locked_out(offered):
    with offered.device.home.locked(), untouched(offered.device, BusyError, "another agent is at work"):
        offered.device.update()
    assert offered.device.update(check_only=True).reason == "release 2 is open to this device"


def test_folder_of_no_agent_refused(tmp_path):
    with pytest.raises(StateError, match="is not an agent's directory"):
        Device(tmp_path).update()
    assert list(tmp_path.iterdir()) == []


# The trial


def test_garbage_is_refused_and_remembered(updated, bundles):
    before = updated.device.state
    publish(updated.repository, bundles["garbage"])
    with pytest.raises(
        GateError, match=r"failed its trial and is refused: full: .*the running model's.*; the running bundle is kept"
    ):
        updated.device.update()
    state = updated.device.state
    assert state == before.model_copy(update={"refused": {digest(bundles["garbage"]): state.refused[digest(bundles["garbage"])]}})
    assert updated.device.events()[6:] == ["refused"]
    assert updated.device.reports()[-1].reason in state.refused[digest(bundles["garbage"])]
    assert not (updated.device.root / "slots" / digest(bundles["garbage"])).exists()
    outcome, seen = steps_of(updated.device)
    assert "was refused before: full: " in outcome.reason
    assert seen == [1, 2]
    assert f"refused {digest(bundles['garbage'])[:12]}" in updated.device.command("status")
    stand_still(updated)


def variation(bundle: Bundle, out: Path, role: str, data: bytes) -> Bundle:
    """Build a bundle with one file exchanged: its hashes are consistent, but it is not what the factory measured."""
    names = {
        "weights": "weights.bin",
        "golden": "golden.npz",
        "reference": "reference.json",
        "sampler": "sampler.json",
        "graph": "graph.onnx",
    }
    export = out / "export"
    export.mkdir(parents=True)
    for entry in bundle.manifest.files:
        (export / names[entry.role]).write_bytes(bundle.path(entry.role, entry.variant).read_bytes())
    (export / names[role]).write_bytes(data)
    given = {"line": LINE, "device_class": CLASS, "tier": "test", "configuration": "I", "precision": "bfloat16"}
    if role == "golden":  # taken as they are; a newer form samples them, and so would refuse what cannot be read
        given["oldest_agent"] = "0.2.0"
    return assemble({"full": export}, **given, origin=origin(9), out=out)


def changed_json(bundle: Bundle, role: Any, **fields: Any) -> bytes:
    return json.dumps(json.loads(bundle.path(role, "full").read_bytes()) | fields).encode()


def bad_golden(bundle: Bundle) -> bytes:
    data = bytearray(bundle.path("golden", "full").read_bytes())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


BAD: dict[str, tuple[str, Any, str]] = {
    "golden damaged": ("golden", bad_golden, "golden outputs cannot be read"),
    "golden of another model": ("golden", None, "of its golden outputs are right on this device"),
    "too slow": ("reference", lambda b: changed_json(b, "reference", latency_ms=0.001), "the budget is 0 ms"),
    "other experts": ("reference", lambda b: changed_json(b, "reference", load=[[1.0]]), "other experts"),
    "no weights": ("weights", lambda _: b"\0", "does not load the model"),
    "not finite": ("weights", lambda b: b"\xff\x7f" * (b.path("weights", "full").stat().st_size // 2), "not finite"),
    "no graph": ("graph", lambda _: b"\0", "is not an ONNX file"),
}


@pytest.mark.parametrize("name", BAD)
def test_unfit_bundle_refused_on_device(scene, bundles, tmp_path, name):
    role, make, sentence = BAD[name]
    data = make(bundles["first"]) if make else bundles["garbage"].path("golden", "full").read_bytes()
    bad = variation(bundles["first"], tmp_path / "bad", role, data)
    publish(scene.repository, bad)
    before = scene.device.state
    with pytest.raises(GateError, match=sentence):
        scene.device.update()
    refused = scene.device.state.refused
    assert scene.device.state == before.model_copy(update={"refused": refused})
    assert list(refused) == [digest(bad)]
    assert scene.device.events()[3:] == ["refused"]
    stand_still(scene)


def test_every_variant_is_tried(scene, exported, tmp_path):
    # `dev` is `full` with another name in its table, and with a latency budget that no device can keep.
    dev = shutil.copytree(exported.folder, tmp_path / "dev")
    for name, fields in (("sampler.json", {"variant": "dev"}), ("reference.json", {"latency_ms": 0.001})):
        (dev / name).write_text(json.dumps(json.loads((dev / name).read_bytes()) | fields))
    given = {"line": LINE, "device_class": CLASS, "tier": "test", "configuration": "I", "precision": "bfloat16"}
    both = assemble({"full": exported.folder, "dev": dev}, **given, origin=origin(5), out=tmp_path / "out")
    publish(scene.repository, both)
    with pytest.raises(GateError, match=r"failed its trial and is refused: dev: an image takes .* the budget is 0 ms"):
        scene.device.update()
    assert list(scene.device.state.refused) == [digest(both)]
    stand_still(scene)


def test_one_golden_output_that_is_not_finite_is_as_bad_as_all(scene, monkeypatch):
    slot, real, runs = scene.device.home.slot(scene.device.active), sampler.Model.run, []

    def run(self: sampler.Model, *given: Any) -> Any:
        velocity = real(self, *given)
        if not runs:  # the golden outputs come first
            velocity[0, 0, 0, 0] = np.nan
        runs.append(given)
        return velocity

    assert child.try_bundle(str(slot.folder), slot.digest, "full")["golden_share"] == 1.0
    monkeypatch.setattr(sampler.Model, "run", run)
    answer = child.try_bundle(str(slot.folder), slot.digest, "full")
    assert (answer["golden_share"], answer["finite"]) == (0.0, True)


def running_garbage(field: Field, bundles: dict[str, Bundle], seq: int) -> Device:
    """Let the device run a self-consistent bundle that draws noise, and open the next release to it."""
    garbage, device = bundles["garbage"], field.device
    shutil.copytree(garbage.folder, device.root / "slots" / digest(garbage))
    device.home.save(State(active=digest(garbage), seq=seq))
    publish(field.repository, bundles["second"])
    return device


def test_bundle_below_the_floor_has_no_say_in_what_comes_after_it(scene, bundles):
    device, second = running_garbage(scene, bundles, seq=1), digest(bundles["second"])
    with pytest.raises(GateError, match="the running model's"):
        device.update()
    device.command("forget", second)
    scene.repository.set_floor(LINE, CLASS, 2)
    assert device.update().changed
    assert device.active == second


def test_bundle_that_no_key_vouches_for_has_no_say_in_what_comes_after_it(scene, bundles):
    device = running_garbage(scene, bundles, seq=0)  # as after the keys of `models` were replaced
    assert device.update().changed
    assert device.active == digest(bundles["second"])


def failing(monkeypatch: pytest.MonkeyPatch, task: str, error: BaseException) -> pytest.MonkeyPatch:
    """Make one task of the child fail."""
    real = child.run

    def run(asked: str, **request: Any) -> dict[str, Any]:
        if asked == task:
            raise error
        return real(asked, **request)

    monkeypatch.setattr(child, "run", run)
    return monkeypatch


class Later:
    """Moves the agent's clock forward by `seconds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0
        for module in (plan, slots, trial):
            monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + self.seconds))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    return Later(monkeypatch)


NO_ANSWER = {
    "machine": Cut(),
    "killed": UnfinishedError("the try process was killed"),
    "died": DiedError("the try process died (signal 11)"),
}


@pytest.mark.parametrize("how", NO_ANSWER)
def test_bundle_whose_trying_gives_no_answer_rests_longer_each_time_and_is_not_condemned(offered, bundles, later, how):
    device, second = offered.device, digest(bundles["second"])
    before = device.state
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, "try", NO_ANSWER[how])
        for tries in range(1, rules.MAX_TRIES + 1):
            with pytest.raises(type(NO_ANSWER[how])):
                device.update()
            assert device.state == before.model_copy(update={"tries": {second: tries}})
        for tries, hours in ((3, 1), (4, 2), (5, 4)):
            events = len(device.events())
            assert f"(in {spoken(3600 * hours)}), its trial started {tries} times" in device.update().reason
            told = device.reports()[-1]
            assert (told.event, told.manifest) == ("refused", second)
            assert f"started {tries} times and never finished; it is tried again in {spoken(3600 * hours)}" in told.reason
            assert f"{second[:12]} is tried again after 20" in device.command("status")
            later.seconds += hours * 3600 - 60
            assert "waits until" in device.update().reason
            assert len(device.events()) == events + 1  # reported once
            later.seconds += 61
            with pytest.raises(type(NO_ANSWER[how])):
                device.update()
        assert (device.active, device.state.refused, device.state.tries) == (before.active, {}, {second: 6})
        assert "(in 8h)" in device.update().reason
    later.seconds += 8 * 3600 + 1  # the device was repaired in the meantime
    assert device.update().way == "kept"
    assert (device.active, device.state.refused, device.state.tries) == (second, {}, {})


def test_rests_end_within_a_week_whatever_the_clock_says(offered, bundles, later):
    assert [rules.rest(tries) for tries in (0, 2, 3, 4, 9, 10, 11, 2000)] == [
        0, 0, 3600, 7200, 230_400, 460_800, 604_800, 604_800,
    ]  # fmt: skip
    device, second = offered.device, digest(bundles["second"])
    device.home.save(device.state.model_copy(update={"tries": {second: 3}}))
    later.seconds = 40 * 86_400
    assert "(in 1h)" in device.update().reason
    later.seconds = 0  # the clock was ahead
    assert "(in 1h)" in device.update().reason
    later.seconds = 3601
    assert device.update().changed


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", None])
def test_lost_rest_begins_anew(offered, bundles, later, damage):
    device = offered.device
    device.home.save(device.state.model_copy(update={"tries": {digest(bundles["second"]): 4}}))
    device.update()
    later.seconds = 3600
    if damage is None:
        (device.root / "resting.json").unlink()
    else:
        (device.root / "resting.json").write_bytes(damage)
    assert "(in 2h)" in device.update().reason
    assert device.state.refused == {}


def test_wait_without_an_answer_is_no_try(offered, bundles, later):
    device, before = offered.device, offered.device.state
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, "try", LateError("the try process did not end within 300 s and was stopped; try again"))
        for _ in range(rules.MAX_TRIES + 2):
            with pytest.raises(LateError):
                device.update()
            assert device.state == before
            assert "(in 1h), its trial did not finish in time" in device.update().reason
            later.seconds += 3601
    assert device.events()[3:] == []
    assert device.update().changed
    assert device.active == digest(bundles["second"])


def test_forgetting_ends_a_rest(offered, bundles, later):
    device, second = offered.device, digest(bundles["second"])
    device.home.save(device.state.model_copy(update={"tries": {second: 3}}))
    assert f"`ferry-agent forget {second[:12]}`" in device.update().reason
    assert f"{second[:12]} is not refused any more" in device.command("forget", second[:12])
    assert device.update().changed
    assert "no bundle that begins" in device.command("forget", second[:12], code=3)


def test_forgetting_lifts_a_refusal(offered, bundles):
    device, second = offered.device, digest(bundles["second"])
    device.home.save(device.state.model_copy(update={"refused": {second: "once", "ab" * 32: "other", "ac" * 32: "third"}}))
    assert "was refused before: once" in device.update().reason
    for wrong, sentence in (
        ("", "no bundle"),
        ("7" * 12, "no bundle"),
        ("a", "2 bundles that are refused begin with 'a'"),
        ("\x1b", "no bundle"),
    ):
        before = device.facts()
        assert sentence in device.command("forget", wrong, code=3)
        assert device.facts() == before
    device.command("forget", second.upper())
    assert list(device.state.refused) == ["ab" * 32, "ac" * 32]
    assert device.update().changed
    assert device.active == second


def test_refusals_outlast_the_next_install(offered, bundles):
    device, others = offered.device, {"ab" * 32: "other", "ac" * 32: "third"}
    device.home.save(device.state.model_copy(update={"refused": others}))
    assert device.update().changed
    assert (device.active, device.state.refused) == (digest(bundles["second"]), others)


def test_rollback_says_how_to_undo_itself(updated, bundles):
    device, second = updated.device, digest(bundles["second"])
    told = device.command("rollback")
    assert f"{second[:12]} is refused from now on" in told
    (undo,) = re.findall(r"`ferry-agent (forget [0-9a-f]+)`", told)
    assert "was refused before: rolled back by the operator" in device.update().reason
    device.command(*undo.split())
    assert device.update().changed
    assert device.active == second


def test_killed_try_is_no_refusal(offered, bundles, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "try", UnfinishedError("the try process was killed"))
        with pytest.raises(UnfinishedError):
            offered.device.update()
        assert "was killed" in offered.device.command("--quiet", "update", code=3)
    assert offered.device.state.refused == {}
    assert offered.device.state.tries == {digest(bundles["second"]): 2}
    assert offered.device.update().way == "kept"
    assert offered.device.state == State(
        active=digest(bundles["second"]), previous=digest(bundles["first"]), seq=2, previous_seq=1
    )


def test_try_without_process_is_not_counted(offered, monkeypatch):
    before = offered.device.state
    failing(monkeypatch, "try", RoomError("cannot start the try process"))
    for _ in range(rules.MAX_TRIES + 1):
        with pytest.raises(RoomError):
            offered.device.update()
    assert offered.device.state == before


def test_refusals_are_bounded():
    state = State()
    for i in range(67):
        state = state.model_copy(update={"refused": state.refusing(f"{i:064x}", "x" * 600)})
    state = state.model_copy(update={"refused": state.refusing(f"{5:064x}", "again")})
    assert len(state.refused) == 64
    assert next(iter(state.refused)) == f"{3:064x}"
    assert list(state.refused)[-1] == f"{5:064x}"
    assert max(map(len, state.refused.values())) == 500


def test_state_too_large_to_be_read_again_is_not_written(updated):
    before = updated.device.state
    large = before.model_copy(update={"refused": {f"{i:064x}": "x" * 20_000 for i in range(60)}})
    with pytest.raises(StateError, match="would have more than 1048576 bytes; report this; the running model is kept"):
        updated.device.home.save(large)
    assert updated.device.state == before


# Probation


def on_trial(field: Field, good: int = TRIAL_GOOD, loads: int = TRIAL_LOADS) -> Device:
    """Put the device's running bundle on trial, as it is between steps 11 and 12."""
    field.device.home.save(field.device.state.model_copy(update={"trial": Trial(left=good, loads=loads)}))
    return field.device


def test_images_count_towards_trial(updated):
    device = on_trial(updated)
    image = drawing.generate(device.home, "bar", 1)[0]
    assert device.state.trial == Trial(left=TRIAL_GOOD - 1, loads=TRIAL_LOADS - 1)
    assert "on trial: 2 good images to go" in device.command("status")
    assert device.update().changed is False  # finishes the trial by itself
    assert device.state.trial is None
    assert device.events()[6:] == ["confirmed"]
    assert drawing.generate(device.home, "bar", 1)[0] == image
    assert device.state.trial is None
    stand_still(updated)


def test_confirmed_after_good_images_only(updated):
    device = on_trial(updated)
    for left in range(TRIAL_GOOD, 0, -1):
        assert device.state.trial == Trial(left=left, loads=TRIAL_LOADS - TRIAL_GOOD + left)
        assert "confirmed" not in device.events()[6:]
        drawing.generate(device.home, "", left)
    assert device.events()[6:] == ["confirmed"]


def taken_back(field: Field, bundles: dict[str, Bundle], why: str) -> None:
    """Check that the bundle on trial is gone for good, and that the previous bundle runs and draws."""
    state = field.device.state
    assert (state.active, state.previous, state.seq, state.trial) == (digest(bundles["first"]), None, 1, None)
    assert list(state.refused) == [digest(bundles["second"])]
    assert why in state.refused[digest(bundles["second"])]
    assert field.device.events()[6:] == ["rolled_back"]
    assert field.device.reports()[-1].manifest == digest(bundles["second"])
    assert "was refused before: on trial" in field.device.update().reason
    assert drawing.generate(field.device.home, "", 0)[1]["good"]
    stand_still(field)


def rests_after_trial(field: Field, bundles: dict[str, Bundle]) -> None:
    """Check that the bundle on trial is gone for now but not refused, and that the previous bundle runs and draws."""
    device, second = field.device, digest(bundles["second"])
    state = device.state
    assert (state.active, state.previous, state.seq, state.trial) == (digest(bundles["first"]), None, 1, None)
    assert (state.refused, state.tries) == ({}, {second: rules.MAX_TRIES})
    assert device.events()[6:] == ["rolled_back"]
    assert "(in 1h), " in device.update().reason
    assert device.events()[7:] == ["refused"]
    assert drawing.generate(device.home, "", 0)[1]["good"]
    device.command("forget", second[:12])
    assert device.update().changed


@pytest.mark.parametrize("how", few(["generate", "update"], 1))
def test_bundle_damaged_on_trial_is_fetched_again(updated, bundles, how, caplog):
    # That is the device's fault, so the bundle is not condemned for it.
    device = on_trial(updated)
    device.file("weights").unlink()
    if how == "update":
        with pytest.raises(StateError, match=r"was rolled back and will be tried again: .*; the previous bundle runs again"):
            device.update()
    else:
        assert drawing.generate(device.home, "", 0)[1]["good"]  # by the bundle before
        assert "was rolled back and will be tried again" in caplog.text
    assert (device.active, device.state.refused) == (digest(bundles["first"]), {})
    assert drawing.generate(device.home, "", 0)[1]["good"]
    assert device.update().way == "delta"
    assert (device.active, device.state.trial, device.state.tries) == (digest(bundles["second"]), None, {})
    stand_still(updated)


UNREADABLE = [StateError("config.json is damaged"), BaseError("the weights file is lost")]


@pytest.mark.parametrize("error", UNREADABLE)
def test_failed_read_on_trial_takes_nothing_back(updated, bundles, monkeypatch, error, caplog):
    device = on_trial(updated)
    with monkeypatch.context() as patch:
        failing(patch, "generate", error)
        with pytest.raises(type(error), match=str(error)):
            device.update()
    assert device.state.trial == Trial(left=TRIAL_GOOD, loads=TRIAL_LOADS - 1)
    real, asked = child.run, []

    def once(task: str, **request: Any) -> dict[str, Any]:
        asked.append(task)
        if len(asked) == 1:
            raise error
        return real(task, **request)

    monkeypatch.setattr(child, "run", once)
    assert drawing.generate(device.home, "", 0)[1]["good"]  # by the bundle before
    assert "the bundle before draws" in caplog.text
    assert device.update().reason == "release 2 is installed"
    assert (device.active, device.state.trial, device.state.refused) == (digest(bundles["second"]), None, {})


@pytest.mark.parametrize("error", UNREADABLE)
def test_reads_that_fail_again_and_again_end_the_trial(updated, bundles, monkeypatch, error):
    """End the trial when reads keep failing, so that the device still hears of halts and newer releases."""
    device = on_trial(updated)
    failing(monkeypatch, "generate", error)
    for _ in range(TRIAL_LOADS - 1):
        with pytest.raises(type(error), match=str(error)):
            device.update()
        assert device.active == digest(bundles["second"])
    with pytest.raises(StateError, match=r"rolled back and will be tried again: .*; the previous bundle"):
        device.update()
    assert (device.active, device.state.trial, device.state.refused) == (digest(bundles["first"]), None, {})
    assert device.events()[-1] == "rolled_back"


def test_lost_notes_stop_nothing(offered, bundles):
    device = offered.device
    for name in ("measured.json", "resting.json", "undelivered.txt"):
        (device.root / name).mkdir()  # as unreadable as a file of another user
    assert drawing.generate(device.home, "", 0)[1]["good"]
    assert "runs release 1" in device.command("status")
    assert device.update().changed
    assert device.events()[3:] == ["starting", "installed", "confirmed"]


@pytest.mark.slow
def test_bundle_damaged_at_each_trial_rests_in_the_end(offered, bundles, monkeypatch):
    real = Home.save

    def save(self: Home, state: State) -> None:
        real(self, state)
        if state.trial:
            self.slot(str(state.active)).path("weights", "full").unlink(missing_ok=True)

    monkeypatch.setattr(Home, "save", save)
    for _ in range(rules.MAX_TRIES):
        with pytest.raises(StateError, match="rolled back"):
            offered.device.update()
        assert offered.device.active == digest(bundles["first"])
    assert "(in 1h), " in offered.device.update().reason
    assert offered.device.state.refused == {}


def test_images_of_nothing_on_trial_taken_back(updated, bundles):
    device, folder = updated.device, updated.folder / "bad"
    nothing = b"\xff\x7f" * (bundles["second"].path("weights", "full").stat().st_size // 2)
    bad = variation(bundles["second"], folder, "weights", nothing)
    shutil.copytree(bad.folder, device.root / "slots" / digest(bad))
    device.home.save(device.state.model_copy(update={"active": digest(bad)}))
    with pytest.raises(GateError, match="not finite"):
        drawing.generate(on_trial(updated).home, "", 0)
    assert (device.active, list(device.state.refused)) == (digest(bundles["first"]), [digest(bad)])
    assert device.events()[6:] == ["rolled_back"]


def test_bundle_that_kills_machine_taken_back(updated, bundles):
    # Each load was counted before it began, and none of them finished.
    device = on_trial(updated, loads=0)
    with pytest.raises(
        StateError, match=r"rolled back and will be tried again: it did not pass its trial; the previous bundle runs"
    ):
        device.update()
    rests_after_trial(updated, bundles)


def test_failed_child_is_counted_first(updated, monkeypatch):
    device = on_trial(updated)

    def power_cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "run", power_cut)
    for loads in range(TRIAL_LOADS - 1, -1, -1):
        with pytest.raises(KeyboardInterrupt):
            drawing.generate(device.home, "", 0)
        assert device.state.trial == Trial(left=TRIAL_GOOD, loads=loads)


@pytest.mark.parametrize(
    ("caption", "seed", "variant", "sentence"),
    [
        ("far too long a caption", 0, None, "shorten it"),
        ("", 0, "fast", "no variant fast"),
        ("", 2**128, None, "out of range; choose one from 0"),
        ("", -1, None, "out of range"),
        ("\udcff", 0, None, "not valid UTF-8"),
    ],
)
def test_users_mistake_costs_no_trial(updated, caption, seed, variant, sentence):
    device = on_trial(updated)
    for _ in range(2):
        with pytest.raises(OperatorError, match=sentence):
            drawing.generate(device.home, caption, seed, variant)
    assert device.state == on_trial(updated).state
    assert device.state.refused == {}


def test_largest_seed_draws(updated):
    assert drawing.generate(updated.device.home, "", 2**128 - 1)[1]["good"]


def test_check_leaves_trial_alone(updated):
    device = on_trial(updated)
    before = device.facts()
    assert device.update(check_only=True).reason == "release 2 is installed"
    assert device.facts() == before


def test_killed_load_on_trial_is_counted_not_condemned(updated, bundles, monkeypatch):
    device = on_trial(updated, loads=2)
    with monkeypatch.context() as patch:
        failing(patch, "generate", UnfinishedError("the generate process was killed"))
        for loads in (1, 0):
            with pytest.raises(UnfinishedError):
                device.update()
            assert device.state.trial == Trial(left=TRIAL_GOOD, loads=loads)
            assert device.state.refused == {}
        with pytest.raises(StateError, match="did not pass its trial"):
            device.update()
    rests_after_trial(updated, bundles)


# The device keeps drawing


@pytest.fixture
def first_image(fielded: Field) -> bytes:
    return drawing.generate(fielded.device.home, "disc", 3)[0]


@pytest.fixture
def second_image(updated_once: Field) -> bytes:
    return drawing.generate(updated_once.device.home, "disc", 3)[0]


def test_update_at_work_stops_no_image(updated, second_image):
    before = updated.device.facts()
    with updated.device.home.locked():
        assert drawing.generate(updated.device.home, "disc", 3)[0] == second_image
        updated.device.command("generate", "--output", str(updated.folder / "a.png"))
    assert updated.device.facts() == before


def test_update_at_work_on_trial_lets_bundle_before_draw(updated, first_image, second_image, monkeypatch, caplog):
    monkeypatch.setattr(drawing, "TRIAL_WAIT", 0.2)
    assert first_image != second_image
    device = on_trial(updated)
    before = device.facts()
    with device.home.locked():
        assert drawing.generate(device.home, "disc", 3)[0] == first_image
    assert "another agent is at work" in caplog.text
    assert "the bundle before draws" in caplog.text
    assert device.facts() == before


def test_short_lock_is_waited_for(updated, second_image):
    device = on_trial(updated)
    held = threading.Event()

    def hold() -> None:
        with device.home.locked():
            held.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    assert drawing.generate(device.home, "disc", 3)[0] == second_image
    other.join()
    assert device.state.trial == Trial(left=TRIAL_GOOD - 1, loads=TRIAL_LOADS - 1)


def test_first_bundle_on_trial_is_not_drawn_uncounted(scene, monkeypatch):
    monkeypatch.setattr(drawing, "TRIAL_WAIT", 0)
    device = on_trial(scene)
    with device.home.locked(), pytest.raises(BusyError, match="another agent is at work"):
        drawing.generate(device.home, "", 0)


def test_full_disk_on_trial_stops_no_image(updated, first_image, monkeypatch):
    device = on_trial(updated)
    before = device.facts()

    def full(*_: Any, **__: Any) -> None:
        raise RoomError("the disk is full")

    monkeypatch.setattr(Disk, "replace", full)
    for _ in range(2):
        assert drawing.generate(device.home, "disc", 3)[0] == first_image
    assert device.facts() == before


def test_killed_load_on_trial_stops_no_image(updated, first_image, monkeypatch):
    device, real = on_trial(updated), child.run

    def run(task: str, **request: Any) -> dict[str, Any]:
        if request["digest"] == device.active:
            raise UnfinishedError("the generate process was killed")
        return real(task, **request)

    monkeypatch.setattr(child, "run", run)
    assert drawing.generate(device.home, "disc", 3)[0] == first_image
    assert device.state.trial == Trial(left=TRIAL_GOOD, loads=TRIAL_LOADS - 1)


@pytest.mark.parametrize("grey", [0.5, float("nan")])
def test_image_of_nothing_is_not_handed_out(updated, first_image, monkeypatch, caplog, grey):
    device, real, drawn = updated.device, child.run, sampler.Model.generate

    def run(task: str, **request: Any) -> dict[str, Any]:
        if request["digest"] != device.active:
            return real(task, **request)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler.Model, "generate", lambda *given: np.full_like(drawn(*given), grey))
            return child.TASKS[task](**request)

    monkeypatch.setattr(child, "run", run)
    assert drawing.generate(device.home, "disc", 3)[0] == first_image
    assert "it made an image that is constant or not finite; the bundle before draws" in caplog.text


@pytest.mark.parametrize("role", few(["graph", "weights", "sampler", "manifest"], 2))
@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damaged_bundle_lets_bundle_before_draw(updated, first_image, role, damage, caplog):
    path = updated.device.file("weights").with_name("manifest.json") if role == "manifest" else updated.device.file(role)
    data = path.read_bytes()
    path.unlink()
    if damage == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert drawing.generate(updated.device.home, "disc", 3)[0] == first_image
    assert "run `ferry-agent update`; the bundle before draws" in caplog.text
    updated.device.update()
    stand_still(updated)


@pytest.mark.parametrize("role", ["graph", "weights", "sampler"])
def test_lost_file_is_said(scene, role):
    scene.device.file(role).unlink()
    with pytest.raises(BaseError, match=f"the {role} file of bundle .* is lost; run `ferry-agent update`"):
        drawing.generate(scene.device.home, "", 0)


def test_slot_taken_away_while_drawing(updated, bundles, second_image, monkeypatch):
    # After the state is read and before the slot is read, an update switches bundles and deletes the slot.
    device, after, real = updated.device, updated.device.state, child.run
    device.home.save(State(active=digest(bundles["first"]), seq=1))

    def run(task: str, **request: Any) -> dict[str, Any]:
        if device.state != after:
            device.home.save(after)
            shutil.rmtree(device.root / "slots" / digest(bundles["first"]))
        return real(task, **request)

    monkeypatch.setattr(child, "run", run)
    assert drawing.generate(device.home, "disc", 3)[0] == second_image


def test_first_bundle_taken_back_leaves_nothing(scene, bundles):
    device = on_trial(scene)
    device.file("weights").unlink()
    with pytest.raises(StateError, match="no bundle is left"):
        device.update()
    assert device.state.active is None
    assert device.sound is None
    assert device.update().way == "full"
    publish(scene.repository, bundles["second"])
    assert device.update(check_only=True).reason == "release 2 is open to this device"


def test_confirmation_collects_garbage(updated, bundles):
    device = on_trial(updated, good=1)
    for name in ("slots/" + "7" * 64, "slots/." + "8" * 64, "incoming"):
        (device.root / name).mkdir(exist_ok=True)
    (device.root / "incoming" / ("9" * 64)).write_bytes(b"half")
    drawing.generate(device.home, "", 0)
    assert {path.name for path in (device.root / "slots").iterdir()} == {digest(bundles["first"]), digest(bundles["second"])}
    assert device.leftovers() == []


def test_drawn_image_is_a_picture(updated, tmp_path):
    text = updated.device.command("generate", "disc", "--seed", "7", "--output", str(tmp_path / "a.png"), "--json")
    assert json.loads(text)["milliseconds"] > 0
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (16, 16)
    assert pixels.std() > 5
    updated.device.command("generate", "disc", "--output", str(tmp_path / "none" / "a.png"), code=3)


@pytest.mark.parametrize("victim", ["config.json", "device.key"])
def test_picture_is_not_drawn_through_a_link(updated, tmp_path, victim):
    # In a folder where others may write, somebody links the usual name to a file of the agent.
    before = updated.device.facts()
    (tmp_path / "image.png").symlink_to(updated.device.root / victim)
    assert "is a link" in updated.device.command("generate", "--output", str(tmp_path / "image.png"), code=3)
    assert updated.device.facts() == before


# Going back


def test_rollback_goes_one_back(updated, bundles):
    device = updated.device
    assert f"{digest(bundles['first'])[:12]} runs again" in device.command("rollback")
    assert device.state == State(
        active=digest(bundles["first"]), seq=1, refused={digest(bundles["second"]): "rolled back by the operator"}
    )
    assert device.events()[6:] == ["rolled_back"]
    assert "refused before: rolled back by the operator" in device.update().reason
    before = device.facts()
    assert "no earlier bundle is kept; `ferry-agent status` lists what was refused" in device.command("rollback", code=3)
    assert device.facts() == before
    stand_still(updated)


def test_rollback_needs_the_slot(updated, bundles):
    shutil.rmtree(updated.device.root / "slots" / digest(bundles["first"]))
    with untouched(updated.device, StateError, "is not in"):
        trial.rollback(updated.device.home)


@pytest.mark.parametrize("role", ["weights", "golden"])
def test_rollback_needs_a_sound_slot(updated, bundles, role):
    path = updated.device.root / "slots" / digest(bundles["first"]) / bundles["first"].path(role, "full").name
    path.write_bytes(path.read_bytes()[:1000])
    with untouched(updated.device, StateError, "the previous bundle, .*, is damaged, so the present one is kept"):
        trial.rollback(updated.device.home)


def test_authorised_revert_uses_kept_slot(updated, bundles):
    first = updated.repository.releases(LINE, CLASS)[0]
    updated.repository.set_policy(start(first, (100,), 0, now=0, revert=True))
    outcome, seen = steps_of(updated.device)
    assert (outcome.way, seen) == ("kept", [1, 2, 9, 10, 11, 12])
    assert updated.device.state.seq == 1
    assert updated.device.active == digest(bundles["first"])
    stand_still(updated)


@pytest.mark.parametrize("name", ["weights", "manifest"])
def test_damaged_kept_slot_is_fetched_anew(updated, bundles, name):
    entry = bundles["first"].manifest.entry("weights", "full").sha256
    path = updated.device.root / "slots" / digest(bundles["first"]) / (entry if name == "weights" else "manifest.json")
    path.write_bytes(b"{}")
    first = updated.repository.releases(LINE, CLASS)[0]
    updated.repository.set_policy(start(first, (100,), 0, now=0, revert=True))
    assert made_by(updated, bundles["first"]) == "full"


# The state file


@pytest.mark.parametrize("damage", [b"", b'{"state": {}, "sha256": ""}', b"null"])
def test_damaged_state_falls_back(updated, bundles, damage):
    good = (updated.device.root / "state.json").read_bytes()
    (updated.device.root / "state.json").write_bytes(damage)
    assert updated.device.active == digest(bundles["second"])
    assert updated.device.sound
    assert updated.device.state.trial == Trial(left=1, loads=3)  # the state before the last one
    updated.device.update()
    assert (updated.device.root / "state.json").read_bytes() == good
    stand_still(updated)


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Make the system refuse to read a file."""
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


@pytest.mark.parametrize("name", ["state.json", "config.json", "highwater.json", "root.json", "device.key", "number"])
def test_unreadable_file_is_not_damaged(offered, bundles, monkeypatch, name):
    # Root ran the agent once; now its user may not read what root wrote.
    before = (offered.device.root / name).read_bytes()
    with monkeypatch.context() as patch:
        unreadable(patch, name, errno.EACCES)
        with pytest.raises(StateError, match=f"{name}: Permission denied; run the agent as the directory's owner"):
            offered.device.update()
    assert (offered.device.root / name).read_bytes() == before
    assert offered.device.active == digest(bundles["first"])


def test_state_on_bad_sector_falls_back(updated, bundles, monkeypatch):
    unreadable(monkeypatch, "state.json", errno.EIO)
    assert updated.device.state.trial == Trial(left=1, loads=3)


def test_foreign_error_is_one_sentence(updated, monkeypatch):
    def status(_: Home) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/x")

    monkeypatch.setattr(slots, "status", status)
    output = updated.device.command("status", code=3)
    assert output == (
        "ferry-agent: the system refused: [Errno 13] Permission denied: '/x'; check the directory's owner and the disk\n"
    )


def test_state_with_wrong_checksum_not_believed(updated, bundles):
    path = updated.device.root / "state.json"
    envelope = json.loads(path.read_bytes())
    envelope["state"]["active"] = digest(bundles["garbage"])
    path.write_text(json.dumps(envelope))
    assert updated.device.active == digest(bundles["second"])


@pytest.mark.parametrize("missing", [[], ["state.json"], ["state.prev.json"]])
def test_both_states_damaged_is_said(updated, missing):
    for name in ("state.json", "state.prev.json"):
        (updated.device.root / name).write_bytes(b"{")
    for name in missing:
        (updated.device.root / name).unlink()
    before = {path: path.read_bytes() for path in (updated.device.root / "slots").rglob("*") if path.is_file()}
    with pytest.raises(StateError, match=r"both state files in .* are damaged"):
        updated.device.update()
    updated.device.command("status", code=3)
    assert {path: path.read_bytes() for path in before} == before


def test_lost_state_copy_is_no_harm(updated, bundles):
    (updated.device.root / "state.prev.json").unlink()
    assert updated.device.active == digest(bundles["second"])
    stand_still(updated)


@pytest.mark.parametrize("role", ["graph", "weights", "sampler", "golden", "reference"])
def test_status_hashes_every_file(scene, role):
    assert json.loads(scene.device.command("status", "--json"))["sound"] is True
    path = scene.device.file(role)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert json.loads(scene.device.command("status", "--json"))["sound"] is False


# On bad links


@pytest.fixture
def web(offered: Field) -> Any:
    """Serve the repository of `offered` from a web server, and point the device at it."""
    with WebServer(offered.repository.folder) as server:
        offered.device.configure(repository=server.address)
        yield server


def weights_of(bundle: Bundle) -> str:
    return bundle.path("weights", "full").name


def without_delta(field: Field) -> None:
    field.repository.commit({"deltas": lambda signed: signed.targets.clear()})


def test_broken_download_is_resumed(offered, web, bundles):
    without_delta(offered)
    name, size = weights_of(bundles["second"]), bundles["second"].path("weights", "full").stat().st_size
    web.faults.cut_after = {name: 100_000}
    assert made_by(offered, bundles["second"]) == "full"
    assert web.asked(name) == [Request(f"objects/{name}", 0), Request(f"objects/{name}", 100_000)]
    assert web.bytes_sent(name) == size


def test_download_resumed_by_next_agent(offered, web, bundles, step, monkeypatch):
    monkeypatch.setattr("ota.agent.transport.ATTEMPTS", 1)
    web.faults.cut_after = {f".{digest(bundles['second'])}": 20_000}
    with untouched(offered.device, TransferError, "will be resumed", marks=False):
        offered.device.update()
    (part,) = (offered.device.root / "incoming").iterdir()
    assert part.stat().st_size == 20_000
    assert made_by(offered, bundles["second"]) == "delta"
    assert [request.first for request in web.asked(f".{digest(bundles['second'])}")] == [0, 20_000]
    assert web.bytes_sent(f".{digest(bundles['second'])}") == step.stat().st_size


def test_download_of_a_release_that_is_halted_is_removed(offered, web, bundles, monkeypatch):
    monkeypatch.setattr("ota.agent.transport.ATTEMPTS", 1)
    web.faults.cut_after = {f".{digest(bundles['second'])}": 20_000}
    with pytest.raises(TransferError, match="will be resumed"):
        offered.device.update()
    offered.repository.set_policy(everyone(offered.release, halt=True))
    assert offered.device.update(check_only=True).reason == "release 2 is halted"
    assert [path.stat().st_size for path in (offered.device.root / "incoming").iterdir()] == [20_000]
    assert offered.device.update().reason == "release 2 is halted"
    assert offered.device.leftovers() == []


def test_server_without_ranges_works(offered, web, bundles, step):
    web.faults.cut_after = {f".{digest(bundles['second'])}": 20_000}
    web.faults.ignore_range = True
    assert made_by(offered, bundles["second"]) == "delta"
    assert web.bytes_sent(f".{digest(bundles['second'])}") == 20_000 + step.stat().st_size


def test_body_of_unknown_length_works(offered, web, bundles):
    web.faults.chunked = True
    web.faults.cut_after = {f".{digest(bundles['second'])}": 20_000}
    assert made_by(offered, bundles["second"]) == "delta"
    assert [request.first for request in web.asked(f".{digest(bundles['second'])}")] == [0, 20_000]


def test_damaged_part_is_fetched_anew(offered, web, bundles, step):
    sha256 = (
        offered.repository._targets("deltas")
        .targets[f"deltas/{LINE}/{CLASS}/{digest(bundles['first'])}.{digest(bundles['second'])}"]
        .hashes["sha256"]
    )
    (offered.device.root / "incoming").mkdir(exist_ok=True)
    (offered.device.root / "incoming" / sha256).write_bytes(b"\0" * 1000)
    assert made_by(offered, bundles["second"]) == "full"


def test_missing_object_is_asked_for_once(offered, web, bundles):
    without_delta(offered)
    web.faults.missing = {weights_of(bundles["second"])}
    with untouched(offered.device, NotFoundError, r"has no objects/\w+ \(status 404\); publish it again", marks=False):
        offered.device.update()
    assert len(web.asked(weights_of(bundles["second"]))) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 451])
def test_refusing_server_is_asked_once(offered, web, bundles, status):
    """Ask a refusing server only once: a fleet that keeps asking for what it may not have takes its own server down."""
    name = f".{digest(bundles['second'])}"
    web.faults.failing, web.faults.status = {name: 100}, status
    assert made_by(offered, bundles["second"]) == "full"
    assert len(web.asked(name)) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 504])
def test_server_in_trouble_is_asked_again(offered, web, bundles, status):
    name = f".{digest(bundles['second'])}"
    web.faults.failing, web.faults.status = {name: 1}, status
    assert made_by(offered, bundles["second"]) == "delta"
    assert len(web.asked(name)) == 2


def test_busy_server_is_asked_again(offered, web, bundles):
    name = f".{digest(bundles['second'])}"
    web.faults.failing = {name: 4}
    assert made_by(offered, bundles["second"]) == "delta"
    assert len(web.asked(name)) == 5


def test_failing_server_is_given_up(offered, web, bundles):
    web.faults.failing = {f".{digest(bundles['second'])}": 100}
    with untouched(offered.device, TransferError, "answered 503", marks=False):
        offered.device.update()
    assert len(web.asked(f".{digest(bundles['second'])}")) == 5


@pytest.mark.parametrize("name", ["timestamp.json", ".snapshot.json", ".models.json", ".rollout.json"])
@pytest.mark.parametrize("fault", ["missing", "failing", "cut_after"])
def test_metadata_fault_is_transfer_error(offered, web, name, fault):
    setattr(web.faults, fault, {"missing": {name}, "failing": {name: 100}, "cut_after": {name: 50}}[fault])
    before = offered.device.facts(marks=False)
    with pytest.raises(TransferError):
        offered.device.update()
    assert offered.device.facts(marks=False) == before
    assert offered.device.sound


def test_vanished_repository_is_transfer_error(offered):
    shutil.rmtree(offered.repository.folder)
    with untouched(offered.device, TransferError, "there is no repository"):
        offered.device.update()
    offered.device.configure(repository=closed_port())
    with untouched(offered.device, TransferError, "cannot reach"):
        offered.device.update()
    offered.device.configure(repository="http://[::1")
    with untouched(offered.device, TransferError, "is not an address"):
        offered.device.update()
    offered.device.configure(repository="gopher://x")
    with untouched(offered.device, TransferError, "give an http"):
        offered.device.update()


# What a power cut does to python-tuf's cache


@pytest.mark.parametrize("damage", ["emptied", "removed", "older"])
@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", "models", "rollout", "deltas"])
def test_torn_metadata_cache_heals(updated, fielded, bundles, role, damage):
    device, cache = updated.device, updated.device.root / "metadata"
    publish(updated.repository, bundles["second"])
    updated.repository.set_policy(halt(everyone(updated.release)))
    path = cache / f"{role}.json"
    path.unlink(missing_ok=True)
    if damage == "emptied":
        path.write_bytes(b"")
    if damage == "older" and (fielded.device.root / "metadata" / path.name).exists():
        shutil.copy(fielded.device.root / "metadata" / path.name, path)
    assert device.update().reason == "release 2 is installed"
    marks = device.home.high_water().versions
    assert marks["rollout"] == updated.repository._versions()["rollout"]


# Halts and new releases during an update


def test_halt_between_download_and_switch(offered, bundles):
    def publish_halt(number: int, _: str) -> None:
        if number == 9:
            offered.repository.set_policy(halt(everyone(offered.release)))

    before = offered.device.facts(marks=False)
    outcome = offered.device.update(publish_halt)
    assert (outcome.changed, outcome.reason) == (False, "stopped before the switch: release 2 is halted")
    assert offered.device.facts(marks=False) == before

    offered.repository.set_policy(everyone(offered.release))
    outcome, seen = steps_of(offered.device)
    assert (outcome.way, seen) == ("kept", [1, 2, 9, 10, 11, 12])
    assert outcome.received < 10_000
    stand_still(offered)


def test_newer_release_between_stops_switch(offered, bundles):
    def publish_next(number: int, _: str) -> None:
        if number == 9 and len(offered.repository.releases(LINE, CLASS)) == 2:
            manifest = bundles["second"].manifest.model_copy(update={"origin": origin(7)})
            publish(offered.repository, replace(bundles["second"], manifest=manifest))

    before = offered.device.facts(marks=False)
    assert "stopped before the switch" in offered.device.update(publish_next).reason
    assert offered.device.facts(marks=False) == before
    assert offered.device.update(check_only=True).reason == "release 3 is open to this device"


# Children


def test_unknown_child_task_is_device_error():
    with pytest.raises(DeviceError, match=r"process died \(exit 1\)"):
        child.run("generate", nonsense=1)


def test_child_error_keeps_its_kind(scene, tmp_path):
    (scene.device.root / "patch").write_bytes(b"")
    with pytest.raises(StateError):
        child.run("generate", slot=str(tmp_path), digest="0" * 64, variant="full", caption="", seed=0)
    assert issubclass(BaseError, DeviceError)


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        (subprocess.TimeoutExpired("x", 1), LateError, "did not end within 300 s"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), RoomError, "cannot start the try process: Cannot allocate memory"),
        (subprocess.CompletedProcess("x", -9, b"", b""), UnfinishedError, "was killed"),
        (subprocess.CompletedProcess("x", -15, child.READY, b""), UnfinishedError, "was killed"),
        (subprocess.CompletedProcess("x", -11, child.READY, b"oh"), DiedError, r"died \(signal 11\): oh"),
        (subprocess.CompletedProcess("x", -11, b"", b"oh"), SoftwareError, r"is broken \(signal 11: oh\)"),
    ],
    ids=["timeout", "no memory to fork", "killed", "ended", "crashed", "crashed before it began"],
)
def test_end_of_child_is_told_apart(monkeypatch, fault, error, sentence):
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(fault, Exception):
            raise fault
        return fault

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(error, match=sentence) as caught:
        child.run("try")
    assert caught.type is error


def test_child_without_memory_is_unfinished():
    code = "import sys; from ota.agent import child; child.TASKS['try'] = lambda slot: bytearray(1 << 62); child.main()"
    done = subprocess.run([sys.executable, "-c", code, "try", str(os.getpid())], input=b'{"slot": "."}', capture_output=True)
    assert json.loads(done.stdout.removeprefix(child.READY))["kind"] == "UnfinishedError"
    assert issubclass(child.KNOWN["UnfinishedError"], OtaError)


# A process killed at each step


def kill_at(device: Device, number: int) -> None:
    """Start the real agent and kill it as it announces a step."""
    with subprocess.Popen(device.words("update"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        announced = any(line.startswith(f"{number:2d}/12 ") for line in process.stderr)
        process.kill()
    assert announced
    assert process.returncode == -signal.SIGKILL


FAST = {11}  # the one step that commits; the others are for `make test-slow`


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow, id=f"step {n}") for n in ALL_STEPS]
)
def test_killed_agent_converges(offered, bundles, number):
    device = offered.device
    kill_at(device, number)
    assert device.sound
    assert device.active == digest(bundles["second" if number == 12 else "first"]) or number == 11
    done = device.process("update")
    assert done.returncode == 0, done.stderr
    assert device.active == digest(bundles["second"])
    assert slot_files(device, bundles["second"]) == files_of(bundles["second"])
    assert device.state == State(active=digest(bundles["second"]), previous=digest(bundles["first"]), seq=2, previous_seq=1)
    numbers = [report.number for report in device.reports()]
    assert len(set(numbers)) == len(numbers)
    stand_still(offered)


def test_killed_agent_leaves_no_child(scene, bundles, tmp_path):
    # The trial of this bundle takes half a minute.
    times = [1 - i / 1000 for i in range(1000)] + [0.0]
    publish(
        scene.repository, variation(bundles["first"], tmp_path, "sampler", changed_json(bundles["first"], "sampler", times=times))
    )
    with subprocess.Popen(scene.device.words("update"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr
        assert any(line.startswith("10/12 ") for line in agent.stderr)
        children: list[str] = []
        while not children and agent.poll() is None:
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        (watched,) = [os.pidfd_open(int(pid)) for pid in children]
        agent.kill()
    ended = select.select([watched], [], [], 10)[0]
    if not ended:
        signal.pidfd_send_signal(watched, signal.SIGKILL)
    os.close(watched)
    assert ended


# Output that cannot be written


def told_to(device: Device, place: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run the real agent with its output redirected by the shell."""
    return subprocess.run(["bash", "-c", f'"$@" {place}', "bash", *device.words(*words)], capture_output=True)


NOWHERE = {
    "full disk": "2> /dev/full", "closed pipe": "2> >(true)", "closed": "2>&-", "all closed": "<&- >&- 2>&-",
    "both full": "> /dev/full 2>&1",
}  # fmt: skip


@pytest.mark.parametrize("place", few(NOWHERE, 1))
def test_log_that_cannot_be_written_ends_no_update(offered, bundles, place):
    done = told_to(offered.device, NOWHERE[place], "update")
    assert done.returncode == (3 if place == "both full" else 0)  # the update was done, but could not be reported
    assert offered.device.active == digest(bundles["second"])
    assert offered.device.state.trial is None
    stand_still(offered)


@pytest.mark.parametrize(("name", "place"), few(NOWHERE.items(), 1))
def test_log_that_cannot_be_written_does_not_end_run(offered, name, place):
    words = offered.device.words("run", "--every", "10", "--now")
    with subprocess.Popen(["bash", "-c", f'exec "$@" {place}', "bash", *words], text=True) as process:
        wait_for(lambda: "confirmed" in offered.device.events()[3:], process)
        process.terminate()
        assert process.wait() == 0
    stand_still(offered)


def test_answer_that_cannot_be_written_is_an_error_of_its_own(updated):
    done = told_to(updated.device, "> /dev/full", "status")
    assert done.returncode == 3
    assert (
        done.stderr
        == b"ferry-agent: the command succeeded, but its answer cannot be written: No space left on device; see `ferry-agent "
        b"status`\n"
    )
