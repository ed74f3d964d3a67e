"""What `ferry-agent doctor` finds, and that it changes nothing; benchmarks; and polling for as long as the device runs."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ota.agent import bench, child, doctor, energy, measured, poll, reports, updater, variants
from ota.agent.state import Rest, State
from ota.errors import OperatorError, OtaError, StateError, TransferError
from ota.release.bundle import Bundle
from tests.conftest import agent
from tests.fleet_kit import Device, Field, closed_port, expire, metadata_file, publish, sign_in_place

pytest_plugins = ["tests.fleet_kit"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pause between retries."""
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)


def found(device: Device, about: str, level: str) -> list[str]:
    return [f.text for f in doctor.examine(device.home, draw=False) if (f.about, f.level) == (about, level)]


def test_sound_device_is_fit(updated: Field):
    before = updated.device.facts()
    told = json.loads(updated.device.command("doctor", "--json"))
    assert told["fit"]
    assert [f for f in told["findings"] if f["level"] != "ok"] == []
    about = {f["about"] for f in told["findings"]}
    assert about == {
        "directory",
        "trust anchor",
        "clock",
        "state",
        "bundles",
        "room",
        "signatures",
        "repository",
        "reports",
        "runtime",
        "energy",
        "drawing",
    }
    assert updated.device.facts() == before


def harm_active(field: Field) -> None:
    field.device.file("weights").write_bytes(b"x")


def harm_previous(field: Field) -> None:
    field.device.home.slot(str(field.device.state.previous)).path("weights", "full").write_bytes(b"x")


def harm_rights(field: Field) -> None:
    field.device.root.chmod(0o777)


def harm_anchor(field: Field) -> None:
    (field.device.root / "root.json").write_bytes(b"{}")


def harm_clock(field: Field) -> None:
    marks = field.device.home.high_water()
    field.device.home.raise_high_water(marks.model_copy(update={"signed": int(time.time()) + 90_000}))


def harm_copy(field: Field) -> None:
    (field.device.root / "state.prev.json").write_bytes(b"x")


def harm_states(field: Field) -> None:
    for name in ("state.json", "state.prev.json"):
        (field.device.root / name).write_bytes(b"x")


def harm_key(field: Field) -> None:
    (field.device.root / "device.key").unlink()


def harm_link(field: Field) -> None:
    field.device.configure(repository=closed_port())


def harm_signature(field: Field) -> None:
    sign_in_place(metadata_file(field.repository, "timestamp"), field.repository.keys, "timestamp", expire)
    shutil.copy(metadata_file(field.repository, "timestamp"), field.device.root / "metadata" / "timestamp.json")


def harm_outbox(field: Field) -> None:
    field.device.configure(reports="")


def harm_trial(field: Field) -> None:
    state = field.device.state
    field.device.home.save(type(state).model_validate(state.model_dump() | {"trial": {"left": 2, "loads": 2}}))


@pytest.mark.parametrize(
    ("harm", "about", "level", "sentence"),
    [
        (harm_active, "bundles", "fail", "active .* is damaged"), (harm_previous, "bundles", "warn", "previous .* is damaged"),
        (harm_rights, "directory", "fail", "chmod 700"), (harm_anchor, "trust anchor", "fail", "not the root given at init"),
        (harm_clock, "clock", "fail", "hours behind"), (harm_copy, "state", "warn", "state.prev.json is damaged"),
        (harm_states, "state", "fail", "both state files"), (harm_key, "reports", "fail", "enroll the device again"),
        (harm_link, "repository", "warn", "the running model is kept"), (harm_signature, "signatures", "fail", "timestamp ended"),
        (harm_outbox, "reports", "warn", "no folder for reports"), (harm_trial, "state", "warn", "2 good images to go"),
    ],
)  # fmt: skip
def test_harm_is_found(updated: Field, harm: Callable[[Field], None], about, level, sentence):
    assert not [text for text in found(updated.device, about, level) if re_search(sentence, text)]
    harm(updated)
    before = {p: p.read_bytes() for p in updated.device.root.rglob("*") if p.is_file()}
    assert [text for text in found(updated.device, about, level) if re_search(sentence, text)]
    told = updated.device.command("doctor", "--no-draw", code=3 if level == "fail" else 0)
    assert f"{level:5} {about}" in told
    assert {p: p.read_bytes() for p in updated.device.root.rglob("*") if p.is_file()} == before


def re_search(sentence: str, text: str) -> bool:
    head, _, tail = sentence.partition(" .* ")
    return head in text and tail in text


def test_other_runtime_is_found(updated: Field, monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda _: "99.0")
    assert "this device has 99.0" in found(updated.device, "runtime", "fail")[0]


def test_little_room_is_found(updated: Field, monkeypatch):
    monkeypatch.setattr(type(updated.device.home.disk), "free", lambda _: 1000)
    assert "a full update of this size needs" in found(updated.device, "room", "warn")[0]


def test_folder_of_no_agent_is_said(tmp_path):
    levels = {f.about: f.level for f in doctor.examine(updater.Home(tmp_path), draw=False)}
    assert levels["directory"] == "fail"


# What an image costs


def test_bench_keeps_what_it_measured(updated: Field):
    updated.device.configure(idle_watts=2.0, core_watts=3.0)
    worked: list[int] = []

    def measure(draw: Callable[[], Any], found: energy.Found) -> energy.Reading:
        assert found.sensor
        worked.append(draw()["good"])
        return energy.Reading("table", "model", "model", "", 0.5, 0.4, 0.6, 0.9, 2.0, 1, 50)

    told = bench.run(updated.device.home, 20, True, lambda _: None, measure)
    row = told["variants"]["full"]
    assert worked == [True]
    assert 0 < row["p50_ms"] <= row["p95_ms"] < row["first_ms"]
    assert row["cpu_seconds"] > 0
    assert row["peak_mib"] > 20
    assert measured.read(updated.device.home, str(updated.device.active)) == {"full": variants.Figures(row["p95_ms"], 0.5)}
    assert "0.5 J (0.4 to 0.6) beyond idle by table (model)" in bench.line("full", row)


def test_bench_without_a_sensor_tells_no_joules(updated: Field):
    """Report no number without its source, and no 0 for what nobody measured."""
    found = energy.Found(None, ("RAPL was skipped: there is none.",))
    told = bench.run(updated.device.home, 20, True, lambda _: None, lambda draw, _: energy.measure(draw, found))
    row = told["variants"]["full"]
    assert row["joules"] is None
    assert row["energy"]["quality"] == "none"
    assert "RAPL was skipped" in bench.line("full", row)
    assert measured.read(updated.device.home, str(updated.device.active))["full"].joules is None


def test_bench_of_few_images_or_on_trial_refused(updated: Field):
    before = updated.device.facts()
    with pytest.raises(OperatorError, match="give at least 20"):
        bench.run(updated.device.home, 19, False, lambda _: None)
    assert "19 is not 20 or more, up to 10000" in updated.device.command("bench", "--images", "19", "--no-joules", code=2)
    harm_trial(updated)
    assert "installed and confirmed" in updated.device.command("bench", "--no-joules", code=3)
    assert updated.device.state.trial
    assert updated.device.state.trial.loads == 2  # bench used none
    assert updated.device.facts()["active"] == before["active"]


def test_command_measures(updated: Field):
    told = json.loads(
        updated.device.command("bench", "--images", "20", "--no-joules", "--json").splitlines()[0]
    )  # progress follows on stderr
    assert told["bundle"] == updated.device.active
    assert told["variants"]["full"]["energy"] is None


def test_processor_time_of_a_process_that_is_gone_is_none():
    with subprocess.Popen(["true"]) as process:
        pass
    assert bench.cpu_seconds(process.pid) == 0.0
    assert bench.cpu_seconds(os.getpid()) > 0


# Looking for updates


class Stopper(threading.Event):
    """An event that is set after `count` waits. It records how long each wait would have been, and does not wait."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.waits: list[float] = []
        self.count = count

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        if len(self.waits) >= self.count:
            self.set()
        return self.is_set()


def looked(device: Device, count: int, every: float = 3600, **options: Any) -> tuple[list[Any], list[float]]:
    told: list[Any] = []
    stopped = Stopper(count)
    poll.run(device.home, every, stopped, told.append, **options)
    return told, stopped.waits


@pytest.mark.parametrize("failures", [0, 1, 10, 2000, 10**6])
def test_pause_is_bounded_however_long_the_link_is_gone(failures):
    assert 30 < poll.pause(3600.0, failures, 0.5) <= 3600 * 1.25


def test_looks_until_stopped(scene: Field, bundles: dict[str, Bundle], step):
    told, waits = looked(scene.device, 2)
    assert [how.reason for how in told] == ["release 1 is installed"]
    assert waits[0] <= poll.FIRST_WITHIN  # spread, because many devices may get power together
    publish(scene.repository, bundles["second"], step, bundles["first"])
    told, waits = looked(scene.device, 2, at_once=True)
    assert [how.changed for how in told] == [True, False]
    assert scene.device.active == bundles["second"].manifest.digest
    assert all(2700 <= wait <= 4500 for wait in waits)


def test_dead_link_is_tried_sooner_then_less_and_less(scene: Field, monkeypatch):
    def unreachable(*_: Any) -> None:
        raise TransferError("nobody there")

    monkeypatch.setattr(updater, "update", unreachable)
    told, waits = looked(scene.device, 8, at_once=True)
    assert len(told) == 8
    for failures, wait in enumerate(waits, start=1):
        assert 0.75 * min(3600, 60 * 2 ** (failures - 1)) <= wait <= 1.25 * min(3600, 60 * 2 ** (failures - 1))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "Connection refused"),
        (b"", "the connection was closed"),
        (b"nonsense\r\n\r\n", "the server there is not a web server"),
    ],
)
def test_fault_of_the_link_is_told_in_a_sentence_without_a_password(scene: Field, monkeypatch, answer, says):
    """Hide the password of an address; the `init` of an older agent accepted addresses with one."""
    monkeypatch.setattr("ota.agent.transport.ATTEMPTS", 1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{server.getsockname()[1]}"
        if answer is not None:
            server.listen()
        scene.device.configure(repository=f"http://user:secret@{place}")

        def serve() -> None:
            for _ in range(2):
                link = server.accept()[0]
                with link:
                    link.recv(4096)
                    link.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        if answer is not None:
            thread.start()
        told = scene.device.command("update", code=4)
        assert told.splitlines()[-1] == f"ferry-agent: cannot reach http://{place}: {says}; it will be tried again"
        told = scene.device.command("doctor", "--no-draw")
        assert (
            f"warn  repository    cannot reach http://{place}: {says}; it will be tried again; the running model is kept" in told
        )
        if answer is not None:
            thread.join()


def test_what_is_refused_is_told_and_asked_again_later(offered: Field, monkeypatch):
    sign_in_place(metadata_file(offered.repository, "timestamp"), offered.repository.keys, "timestamp", expire)
    told, waits = looked(offered.device, 2, at_once=True)
    assert all(isinstance(how, OtaError) for how in told)
    assert all(wait >= 2700 for wait in waits)
    assert offered.device.sound


def test_lock_is_free_between_two_looks(scene: Field):
    def tell(_: Any) -> None:
        with scene.device.home.locked():
            pass

    poll.run(scene.device.home, 3600, Stopper(1), tell, at_once=True)
    with scene.device.home.locked():
        told, _ = looked(scene.device, 1, at_once=True)
    assert "another agent is at work" in str(told[0])


def test_command_ends_when_told_to(scene: Field):
    with subprocess.Popen(scene.device.words("run", "--now"), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while "release 1 is installed" not in process.stderr.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    assert scene.device.sound


def test_reports_that_cannot_be_delivered_are_seen_everywhere(scene: Field):
    device = scene.device
    inbox = Path(device.home.config().reports)
    shutil.rmtree(inbox)
    device.configure(reports=str(inbox / "far/down"))
    why = f"there is no folder {inbox}/far/down; mount it or make it"
    assert f"fail  reports       {why}" in device.command("doctor", "--no-draw", code=3)  # even before a report waits
    reports.queue(device.home, "installed", None)
    device.home.save(device.state.model_copy(update={"refused": {"7" * 64: "full: it is bad"}}))
    assert f"1 report is waiting: {why}" in device.command("report", code=4)
    assert f'"waiting": 1, "problem": "{why}' in device.command("report", "--json", code=4)
    assert f"1 report waits to be delivered: {why}" in device.command("status")
    assert json.loads(device.command("status", "--json"))["reports_problem"].startswith(why)
    assert f"1 wait; when last tried: {why}" in device.command("doctor", "--no-draw", code=3)
    assert not device.update().changed  # updating works all the same
    assert not inbox.exists()  # a folder made there would be hidden by a later mount
    (inbox / "far/down").mkdir(parents=True)
    assert device.command("report") == "all reports are delivered\n"
    assert len(list((inbox / "far/down").iterdir())) == 1
    assert "wait" not in device.command("status")
    assert "fail" not in device.command("doctor", "--no-draw")


def test_reports_without_a_folder_are_told_when_asked(scene: Field):
    device = scene.device
    device.home.disk.replace("config.json", device.home.config().model_copy(update={"reports": ""}).canonical())
    assert device.command("report") == "all reports are delivered\n"
    reports.queue(device.home, "installed", None)
    assert f"1 report is waiting: {reports.NO_FOLDER}\n" in device.command("report", code=4)
    assert f"1 report waits to be delivered: {reports.NO_FOLDER}\n" in device.command("status")
    assert json.loads(device.command("status", "--json"))["reports_problem"] == reports.NO_FOLDER
    assert f"warn  reports       1 wait; {reports.NO_FOLDER}\n" in device.command("doctor", "--no-draw")


def test_folder_that_takes_no_files_is_not_called_missing(scene: Field):
    scene.device.configure(reports="/proc")
    reports.queue(scene.device.home, "installed", None)
    told = scene.device.command("report", code=4)
    assert "reports cannot be left in /proc: no file can be created there, so name another folder" in told


@pytest.mark.parametrize("how", ["refused", "rests"])
@pytest.mark.parametrize("installed", [True, False])
def test_what_is_not_installed_says_how_it_may_be(scene: Field, how, installed):
    device, digest = scene.device, "7" * 64
    state = device.state if installed else State()
    device.home.save(state.model_copy(update={"refused": {digest: "full: it is bad"} if how == "refused" else {}}))
    if how == "rests":
        rest = Rest(bundle=digest, tries=3, until=int(time.time()) + 3600)
        device.home.disk.replace("resting.json", rest.canonical())
    said = "was refused: full: it is bad; `ferry" if how == "refused" else "is tried again after"
    for told in (device.command("status"), device.command("doctor", "--no-draw", code=0 if installed else 3)):
        (line,) = [line for line in told.splitlines() if digest[:12] in line]
        assert said.replace("was refused: ", "") in line
        assert f"`ferry-agent forget {digest[:12]}`" in line
    device.command("forget", digest[:12])
    assert "fail" not in device.command("doctor", "--no-draw")


# Another user


def as_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the agent run as a user who owns none of the directories here."""
    monkeypatch.setattr(os, "geteuid", lambda: 4711)


@pytest.mark.parametrize(
    "words",
    [
        ["update"], ["--quiet", "update", "--check"], ["rollback"], ["forget", "a b"], ["report"], ["run", "--now"], ["serve"],
        ["bench", "--no-joules"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("where", [["--dir", "device"], ["--dir=device"], []], ids=str)
def test_another_user_is_told_a_command_to_copy(
    scene: Field, monkeypatch: pytest.MonkeyPatch, words: list[str], where: list[str]
):
    owner = pwd.getpwuid(os.geteuid()).pw_name
    as_somebody_else(monkeypatch)
    monkeypatch.chdir(scene.folder)
    monkeypatch.setenv("FERRY_AGENT_DIR", "device")
    monkeypatch.setattr(sys, "argv", ["bin/ferry-agent"])
    monkeypatch.setattr(child, "Worker", None)  # it must refuse before it draws
    told = agent(*words, *where)
    assert told.exit_code == 3
    (command,) = re.findall("^ferry-agent: device belongs to .* with `([^`]*)`$", told.stderr, re.MULTILINE)
    at = 1 + next(i for i, word in enumerate(words) if not word.startswith("--"))
    assert shlex.split(command) == [
        "sudo", "-u", owner, f"{scene.folder}/bin/ferry-agent", *words[:at], "--dir", str(scene.device.root), *words[at:],
    ]  # fmt: skip


def test_who_may_not_read_is_told_whom_it_belongs_to(scene: Field, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise StateError("cannot read it: Permission denied")

    as_somebody_else(monkeypatch)
    monkeypatch.setattr(type(scene.device.home.disk), "read", refuse)
    assert f"-m ota.agent.cli status --dir {scene.device.root}`" in scene.device.command("status", code=3)


def test_files_of_others_are_named(scene: Field, monkeypatch: pytest.MonkeyPatch):
    look = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: SimpleNamespace(st_uid=4711) if path.name == "lock" else look(path))
    told = scene.device.command("doctor", "--no-draw", code=3)
    assert "1 files in" in told
    assert (
        f"such as lock, so the agent cannot use them; run `chown -R --reference={scene.device.root} {scene.device.root}`" in told
    )


def test_role_that_was_signed_again_and_not_needed_since_is_no_fault(updated: Field):
    path = updated.device.root / "metadata" / "deltas.json"
    cached = json.loads(path.read_bytes())
    cached["signed"]["expires"] = "2020-01-01T00:00:00Z"
    path.write_text(json.dumps(cached))
    assert any("deltas ended" in text for text in found(updated.device, "signatures", "fail"))
    updated.repository.renew(["deltas"])
    updated.device.update()
    assert json.loads(path.read_bytes())["signed"]["expires"] == "2020-01-01T00:00:00Z"  # nothing was to be installed
    assert found(updated.device, "signatures", "fail") == []
