"""What the factory accepts from its devices: only what an enrolled device signed, and each report once.

A device deletes its own copy of a report only after the delivered one is durable.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ota.agent import reports
from ota.agent.disk import Disk
from ota.agent.state import Config, Home, State
from ota.errors import ManifestError, OperatorError, StateError, TransferError
from ota.fleet.store import MAX_REPORT, Fleet
from ota.report import DeviceReport, SignedReport

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(b"k" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def report(number: int = 1, **fields: Any) -> DeviceReport:
    base = {
        "device": "dev-1", "boot": "b", "number": number, "time": 1, "line": "shapes", "device_class": "edge",
        "event": "installed", "manifest": "1" * 64, "active": "1" * 64,
    }  # fmt: skip
    return DeviceReport(**(base | fields))


def signed(made: DeviceReport, key: Ed25519PrivateKey = KEY) -> bytes:
    return SignedReport(report=made, signature=key.sign(made.canonical()).hex()).model_dump_json().encode()


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'fleet.db'}"


@pytest.fixture
def fleet(database: str) -> Iterator[Fleet]:
    """Provide a fleet with one enrolled device."""
    made = Fleet(database)
    made.enroll("dev-1", public(KEY))
    yield made
    made.close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Create a device's directory as `init` leaves it, as far as reports need it."""
    made = Home(tmp_path / "device")
    (tmp_path / "inbox").mkdir()
    made.disk.make_folder("slots")
    reports.make_key(made)
    config = Config(
        device="dev-1", line="shapes", device_class="edge", repository="/nowhere", root_sha256="0" * 64,
        reports=str(tmp_path / "inbox"),
    )  # fmt: skip
    made.disk.replace("config.json", config.canonical())
    return made


# Enrolment


def test_same_key_again_changes_nothing(fleet):
    fleet.receive(signed(report(1)))
    fleet.enroll("dev-1", public(KEY))
    assert fleet.devices() == {"dev-1": report(1)}


def test_second_key_is_refused(fleet):
    with pytest.raises(OperatorError, match="dev-1 is enrolled with another key"):
        fleet.enroll("dev-1", public(OTHER))
    with pytest.raises(ManifestError, match="not signed by dev-1's key"):
        fleet.receive(signed(report(), OTHER))
    assert fleet.receive(signed(report())) == report()


@pytest.mark.parametrize("device", ["", "../x", "Dev", "a" * 41, "dev 1", "dev-1\n"])
def test_malformed_device_not_enrolled(fleet, device):
    with pytest.raises(OperatorError, match="is not a device id"):
        fleet.enroll(device, public(KEY))
    assert list(fleet.devices()) == ["dev-1"]


@pytest.mark.parametrize("key", ["", "00", "zz" * 32, "0" * 62, "0" * 66])
def test_malformed_key_not_enrolled(fleet, key):
    with pytest.raises(OperatorError, match="must be 64 hex digits"):
        fleet.enroll("dev-2", key)
    assert list(fleet.devices()) == ["dev-1"]


# Reports


def refused(fleet: Fleet, data: bytes, sentence: str) -> None:
    before = fleet.reports()
    with pytest.raises(ManifestError, match=sentence):
        fleet.receive(data)
    assert fleet.reports() == before


def test_forged_report_refused(fleet):
    fleet.enroll("dev-2", public(OTHER))
    refused(fleet, signed(report(), OTHER), "not signed by dev-1's key")


ALTERED = {
    "event": "confirmed",
    "manifest": "2" * 64,
    "active": None,
    "number": 7,
    "time": 2,
    "milliseconds": 1,
    "device": "dev-2",
}


@pytest.mark.parametrize("field", ALTERED)
def test_altered_report_refused(fleet, field):
    fleet.enroll("dev-2", public(OTHER))
    envelope = json.loads(signed(report()))
    envelope["report"][field] = ALTERED[field]
    refused(fleet, json.dumps(envelope).encode(), "not signed by")


def test_replayed_report_counts_once(fleet):
    for _ in range(3):
        fleet.receive(signed(report(2)))
    fleet.receive(signed(report(1)))
    fleet.receive(signed(report(2)))
    assert [kept.number for kept in fleet.reports("dev-1")] == [1, 2]


def test_same_number_other_content_refused(fleet):
    fleet.receive(signed(report(1)))
    refused(fleet, signed(report(1, event="confirmed")), "already sent another report number 1")


def test_unknown_device_refused(fleet):
    refused(fleet, signed(report(device="dev-9")), "dev-9 is not enrolled")


@pytest.mark.parametrize("key", [b"\xff" * 32, None, b"", b"0", b"zz" * 32, b"0" * 62, b"\xed\xb2\x80"], ids=ascii)
def test_row_that_somebody_changed_ends_in_a_sentence(database, key):
    """Refuse a changed row with a sentence: others may write to the database, too."""
    tables = Fleet(database)
    with sqlite3.connect(database.removeprefix("sqlite:///")) as raw:
        raw.executescript(
            "drop table fleet_devices; create table fleet_devices (device, public_key, enrolled); drop table fleet_reports;"
            "create table fleet_reports (device, number, received_at, event, manifest, body)"
        )
        raw.execute("insert into fleet_devices values ('dev-1', cast(? as text), 1)", [key])
    with pytest.raises((OperatorError, ManifestError, TransferError)) as caught:
        tables.receive(signed(report()))
    assert str(caught.value)
    tables.close()


@pytest.mark.parametrize("body", [b"\xff", None, "", "[]", 3, '{"device": "dev-1"}', b"\xed\xb2\x80"], ids=ascii)
@pytest.mark.parametrize("name", ["dev-1", None, b"\xff", 7, "\x1b[2J", ""], ids=ascii)
def test_tables_that_somebody_filled_end_in_a_sentence(database, name, body):
    tables = Fleet(database)
    with sqlite3.connect(database.removeprefix("sqlite:///")) as raw:
        raw.executescript(
            "drop table fleet_devices; create table fleet_devices (device, public_key, enrolled); drop table fleet_reports;"
            "create table fleet_reports (device, number, received_at, event, manifest, body)"
        )
        raw.execute("insert into fleet_devices values (?, ?, 1)", [name, public(KEY)])
        raw.execute("insert into fleet_reports values ('dev-1', 1, 1, 'installed', null, ?)", [body])
    for read in (tables.devices, tables.reports):
        with pytest.raises((OperatorError, ManifestError, TransferError)) as caught:
            read()
        assert str(caught.value)
    tables.close()


def test_oversized_report_refused(fleet):
    data = signed(report())
    refused(fleet, data + b" " * (MAX_REPORT - len(data) + 1), "more than 16384")
    assert fleet.receive(data + b" " * (MAX_REPORT - len(data))) == report()


def test_longest_report_is_kept(fleet):
    longest = report(2**31 - 1, boot="b" * 64, reason="\U0001f600" * 500, received=2**53, milliseconds=2**53)
    fleet.receive(signed(longest))
    assert fleet.reports() == [longest]


@pytest.mark.parametrize("data", [b"", b"null", b"{}", b"\xff", b'{"report":1}'])
def test_malformed_report_refused(fleet, data):
    refused(fleet, data, "is not valid")


def test_reports_survive_reopening(fleet, database):
    fleet.receive(signed(report(1)))
    fleet.receive(signed(report(2, event="confirmed")))
    fleet.close()
    again = Fleet(database)
    assert again.reports("dev-1") == [report(1), report(2, event="confirmed")]
    assert again.devices() == {"dev-1": report(2, event="confirmed")}
    assert again.reports("dev-2") == []
    again.close()


@pytest.mark.parametrize("database", ["sqlite:////nowhere/at/all/fleet.db", "no address", "oracle9://x", ""])
def test_database_not_there(database):
    with pytest.raises(TransferError, match="the database cannot be used"):
        Fleet(database)


# An inbox of files


def test_collect_sorts_good_from_bad(fleet, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "a.json").write_bytes(signed(report(1)))
    (inbox / "b.json").write_bytes(signed(report(2), OTHER))
    (inbox / "c.json").write_bytes(b"x" * (MAX_REPORT + 1))
    (inbox / "d.json").write_bytes(signed(report(3)))
    (inbox / ".half.json.1.tmp").write_bytes(b"{")
    found = fleet.collect(inbox)
    assert [made.number for made in found.accepted] == [1, 3]
    assert {name: why.split(";")[0] for name, why in found.rejected.items()} == {
        "b.json": "the report is not signed by dev-1's key",
        "c.json": "is larger than 16384 bytes",
    }
    assert sorted(path.name for path in inbox.iterdir()) == [".half.json.1.tmp", "rejected"]
    assert sorted(path.name for path in (inbox / "rejected").iterdir()) == ["b.json", "c.json"]
    assert fleet.collect(inbox).accepted == []


def test_strange_inbox_entries_stop_nothing(fleet, tmp_path):
    inbox = tmp_path / "inbox"
    (inbox / "a.json").mkdir(parents=True)
    (inbox / "b.json").symlink_to("/nowhere")
    (inbox / "c.json").write_bytes(signed(report(1)))
    found = fleet.collect(inbox)
    assert [made.number for made in found.accepted] == [1]
    assert set(found.rejected) == {"a.json", "b.json"}


@pytest.mark.parametrize("call", ["open", "replace"])
def test_file_that_cannot_be_handled_stops_nothing(fleet, tmp_path, monkeypatch, call):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "a.json").write_bytes(signed(report(1)) if call == "open" else b"{")
    (inbox / "b.json").write_bytes(signed(report(2)))
    real = getattr(os, call)

    def refuse(path: Any, *rest: Any, **named: Any) -> Any:
        if Path(path).name == "a.json":
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **named)

    monkeypatch.setattr(os, call, refuse)
    found = fleet.collect(inbox)
    assert [made.number for made in found.accepted] == [2]
    assert list(found.rejected) == ["a.json"]
    assert [path.name for path in inbox.glob("*.json")] == ["a.json"]


def test_links_and_pipes_in_inbox_lead_nowhere(fleet, tmp_path):
    # Whoever may write into the inbox (such as a device's share) must not reach what the factory's user can read or write.
    inbox, elsewhere = tmp_path / "inbox", tmp_path / "elsewhere"
    inbox.mkdir()
    elsewhere.mkdir()
    (elsewhere / "report.json").write_bytes(signed(report(7)))
    (inbox / "link.json").symlink_to(elsewhere / "report.json")
    (inbox / "rejected").symlink_to(elsewhere)
    os.mkfifo(inbox / "pipe.json")
    (inbox / "wrong.json").write_bytes(b"{")
    found = fleet.collect(inbox)
    assert found.accepted == []
    assert found.rejected.keys() == {"link.json", "pipe.json", "wrong.json"}
    assert [path.name for path in elsewhere.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["a\nferry: all is well.json", "\x1b[2J.json", os.fsdecode(b"\xff.json"), "\u202egpj.json"])
def test_hostile_file_name_is_shown_harmless(fleet, tmp_path, name):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / name).write_bytes(b"{")
    (shown,) = fleet.collect(inbox).rejected
    assert shown.isprintable()


@pytest.mark.parametrize(
    "reason", ["\x1b]0;owned\x07", "fine\nforged: another line", "a\u202eb", "\x00", "x" * 490 + "\x1b" * 10]
)
def test_hostile_reason_is_kept_harmless(fleet, reason):
    # The signature covers the text as sent: an agent of the version before sends all lines of what a runtime said.
    device = json.loads(signed(report()))
    device["report"]["reason"] = reason
    sent = json.dumps(device["report"], sort_keys=True, separators=(",", ":")).encode()
    device["signature"] = KEY.sign(sent).hex()
    kept = fleet.receive(json.dumps(device).encode())
    assert kept.reason.isprintable()
    assert len(kept.reason) <= 500
    assert fleet.reports() == [kept]
    assert fleet.receive(json.dumps(device).encode()) == kept
    device["report"]["reason"] = "another"
    refused(fleet, json.dumps(device).encode(), "not signed by dev-1's key")


def test_empty_inbox_gives_nothing(fleet, tmp_path):
    assert fleet.collect(tmp_path / "missing").accepted == []


# The agent's own queue


def test_queue_is_sent_and_collected(fleet, home, tmp_path):
    fleet.enroll("dev-2", reports.public_key(home))
    home.disk.replace("config.json", home.config().model_copy(update={"device": "dev-2"}).canonical())
    reports.queue(home, "installed", "1" * 64, "delta", received=5, milliseconds=7.6)
    reports.queue(home, "confirmed", "1" * 64)
    assert reports.send(home) == 0
    assert not list((tmp_path / "device" / "queue").iterdir())
    accepted = fleet.collect(tmp_path / "inbox").accepted
    assert [(made.number, made.event, made.reason, made.received, made.milliseconds) for made in accepted] == [
        (1, "installed", "delta", 5, 8),
        (2, "confirmed", "", 0, 0),
    ]
    assert fleet.reports("dev-2") == accepted


def test_left_reports_can_be_collected_by_others(home, tmp_path):
    before = os.umask(0o077)  # as the agent sets it
    try:
        reports.queue(home, "installed", None)
        reports.send(home)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "inbox").iterdir()] == [0o644]


def test_report_is_durable_before_its_copy_goes(home, tmp_path, monkeypatch):
    reports.queue(home, "installed", None)
    done: list[str] = []
    real_sync, real_remove = os.fsync, Disk.remove

    def fsync(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real_sync(descriptor)

    def remove(disk: Disk, name: str) -> None:
        done.append(name)
        real_remove(disk, name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Disk, "remove", remove)
    assert reports.send(home) == 0
    assert done[1:] == [str(tmp_path / "inbox"), "queue/00000001.json"]


def test_undeliverable_reports_are_kept(home, tmp_path):
    (tmp_path / "inbox").rmdir()
    (tmp_path / "inbox").write_text("a file, not a folder")
    reports.queue(home, "installed", None)
    reports.queue(home, "confirmed", None)
    assert reports.send(home) == 2
    (tmp_path / "inbox").unlink()
    assert reports.send(home) == 2
    (tmp_path / "inbox").mkdir()
    assert reports.send(home) == 0
    assert sorted(path.name for path in (tmp_path / "inbox").iterdir()) == ["dev-1-00000001.json", "dev-1-00000002.json"]


def test_nowhere_to_report_to(home):
    home.disk.replace("config.json", home.config().model_copy(update={"reports": ""}).canonical())
    reports.queue(home, "installed", None)
    assert reports.send(home) == 1


def test_queue_is_bounded(home, monkeypatch, tmp_path):
    monkeypatch.setattr(reports, "MAX_QUEUE", 5)
    for _ in range(8):
        reports.queue(home, "refused", None, "x" * 9000)
    kept = sorted((tmp_path / "device" / "queue").iterdir())
    assert [int(path.stem) for path in kept] == [4, 5, 6, 7, 8]
    assert all(path.stat().st_size <= MAX_REPORT for path in kept)


@pytest.mark.parametrize("damage", [None, b"", b"x", b"-5", b"9" * 20])
@pytest.mark.parametrize("delivered", [True, False])
def test_lost_number_is_never_reused(fleet, home, tmp_path, damage, delivered):
    fleet.enroll("dev-2", reports.public_key(home))
    home.disk.replace("config.json", home.config().model_copy(update={"device": "dev-2"}).canonical())
    for event in ("installed", "confirmed"):
        reports.queue(home, event, None)
    if delivered:
        reports.send(home)
    (home.root / "number").unlink()
    if damage is not None:
        (home.root / "number").write_bytes(damage)
    for event in ("starting", "installed"):
        reports.queue(home, event, None)
    reports.send(home)
    assert fleet.collect(tmp_path / "inbox").rejected == {}
    assert [made.event for made in fleet.reports("dev-2")] == ["installed", "confirmed", "starting", "installed"]


def test_key_is_private_and_kept(home):
    before = reports.public_key(home)
    reports.make_key(home)
    assert reports.public_key(home) == before
    assert (home.root / "device.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"x" * 31])
def test_damaged_key_signs_nothing(home, damage):
    (home.root / "device.key").write_bytes(damage)
    with pytest.raises(StateError, match="enroll the device again"):
        reports.queue(home, "installed", None)
    assert reports.send(home) == 0


@pytest.mark.parametrize("victim", ["config.json", "device.key", "state.json"])
@pytest.mark.parametrize("planted", ["temporary", "final", "folder of the report"])
def test_links_planted_where_reports_are_left_are_not_followed(home, tmp_path, victim, planted):
    # Others may write there. A link under a name that can be guessed must not lead a report into a file of the agent.
    inbox = tmp_path / "inbox"
    home.save(State(active="1" * 64))

    def files() -> dict[str, bytes]:
        return {
            p.name: p.read_bytes()
            for p in home.root.iterdir()
            if p.is_file() and p.name not in ("number", "agent", "undelivered.txt", "history.json")
        }

    before = files()
    for number in (1, 2):
        name = f"dev-1-{number:08d}.json"
        if planted == "folder of the report" and number == 1:
            (inbox / name).mkdir()
        elif planted != "folder of the report":
            place = inbox / (f".{name}.{os.getpid()}.tmp" if planted == "temporary" else name)
            if planted == "temporary" or number == 1:
                place.symlink_to(home.root / victim)
        reports.queue(home, "installed", None)
    left = reports.send(home)
    assert files() == before
    # A report that cannot be left there does not hold back others, and is not lost.
    assert left == (0 if planted == "temporary" else 1)
    assert len(list((home.root / "queue").iterdir())) == left
    assert reports.problem(home).startswith("reports cannot be left in" if left else "")
    assert bool(reports.problem(home)) == bool(left)
    assert (inbox / "dev-1-00000002.json").is_file()
    assert not (inbox / "dev-1-00000002.json").is_symlink()


def test_report_takes_the_place_of_no_hard_link(home, tmp_path):
    inbox = tmp_path / "inbox"
    (tmp_path / "precious").write_bytes(b"precious")
    os.link(tmp_path / "precious", inbox / "dev-1-00000001.json")
    reports.queue(home, "installed", None)
    reports.send(home)
    assert (tmp_path / "precious").read_bytes() == b"precious"
