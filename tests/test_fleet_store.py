"""The fleet's tables: what they keep of a report, who may be in them, and how a database of version 0.2 gets them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import create_engine, text

from ota.errors import AttemptsError, EnrolmentError, ManifestError, OperatorError, TakenError, TransferError
from ota.fleet import schema, store
from ota.fleet.register import MOST_ATTEMPTS, Newcomer
from ota.fleet.store import Arrived, Fleet, Verdict, open_fleet
from ota.report import CONTEXT, DeviceReport, Enrolment, Health, open_line, seal
from tests.former.kit import HERE

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(b"k" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)
NOW = 1_800_000_000
WEEK = 7 * 86_400


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def report(number: int = 1, **fields: Any) -> DeviceReport:
    base = {
        "schema_version": 3, "device": "dev-1", "boot": "b", "number": number, "time": NOW, "line": "shapes", "device_class": "edge",
        "event": "installed", "manifest": "1" * 64, "active": "1" * 64, "agent": "0.3.0",
    }  # fmt: skip
    return DeviceReport(**(base | fields))


def alive(number: int = 1, **fields: Any) -> DeviceReport:
    health = Health(since=1, share="all", tags=["site=berlin"])
    return report(number, event="alive", health=health, manifest=None, **fields)


def arrived(made: DeviceReport, key: Ed25519PrivateKey = KEY) -> Arrived:
    opened = open_line(seal(made, key))
    assert opened.is_signed_by(public(key))
    return Arrived(opened, public(key))


def kept(fleet: Fleet, *made: DeviceReport, now: int = NOW, key: Ed25519PrivateKey = KEY, **how: Any) -> list[str]:
    return [verdict.code for verdict in fleet.keep([arrived(one, key) for one in made], now=now, **how)]


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'fleet.db'}"


@pytest.fixture
def fleet(database: str) -> Iterator[Fleet]:
    """Provide a fleet with one device that counts."""
    made = open_fleet(database)
    made.preauthorize([Newcomer("dev-1", public(KEY), "shapes", "edge", {})])
    yield made
    made.close()


def state(fleet: Fleet, device: str = "dev-1") -> Any:
    return next(found for found in fleet.states() if found.device == device)


# A batch


def test_one_bad_report_does_not_spoil_the_batch(fleet):
    fleet.enroll("dev-2", public(OTHER))
    fleet.retire("dev-2")
    batch = [
        arrived(report(1)), arrived(report(2, line="gaskets")), arrived(report(1, device="dev-2"), OTHER), arrived(report(3), OTHER),
        arrived(report(1, device="dev-9")), arrived(report(1, event="refused")), arrived(report(4)),
    ]  # fmt: skip
    found = fleet.keep(batch, now=NOW)
    assert [(verdict.device, verdict.number, verdict.code) for verdict in found] == [
        ("dev-1", 1, ""), ("dev-1", 2, "line"), ("dev-2", 1, "retired"), ("dev-1", 3, "signature"), ("dev-9", 1, "unenrolled"),
        ("dev-1", 1, "conflict"), ("dev-1", 4, ""),
    ]  # fmt: skip
    assert [verdict.highest for verdict in found] == [4, 4, 0, 4, 0, 4, 4]
    assert all(verdict.reason for verdict in found if verdict.code)
    assert fleet.reports() == [report(1), report(4)]


@pytest.mark.parametrize("fields", [{"line": "gaskets"}, {"device_class": "station"}])
def test_report_of_an_unknown_class_or_line_is_refused(fleet, fields):
    assert kept(fleet, report(1, **fields)) == ["line"]
    assert fleet.reports() == []
    assert (state(fleet).refused, state(fleet).refused_why, state(fleet).heard_at) == (1, "line", None)


def test_replayed_batch_counts_once_and_says_that_it_is_kept(fleet):
    first = kept(fleet, report(1), alive(2))
    assert kept(fleet, report(1), alive(2), alive(2), now=NOW + 60) == ["", "", ""]
    assert first == ["", ""]
    assert fleet.reports() == [report(1), alive(2)]
    assert (state(fleet).heard_at, state(fleet).received_at, state(fleet).conflicts) == (NOW + 60, NOW, 0)


def test_two_copies_of_a_device_are_counted_and_told_the_highest_number(fleet):
    kept(fleet, report(1), report(7))
    (verdict,) = fleet.keep([arrived(report(1, boot="another"))], now=NOW + 5)
    assert verdict == Verdict("dev-1", 1, "conflict", "dev-1 has already sent another report number 1", 7)
    assert (state(fleet).conflicts, state(fleet).conflict_at) == (1, NOW + 5)
    assert kept(fleet, report(8, boot="another")) == [""]  # the fresh number that the agent takes


def test_device_retired_while_it_sends_is_refused(fleet, database):
    waiting = arrived(report(1))  # verified, and not yet kept
    with Fleet(database) as operator:
        operator.retire("dev-1")
    (verdict,) = fleet.keep([waiting])
    assert verdict.code == "retired"
    assert fleet.reports() == []
    assert fleet.devices() == {}


def test_rekey_keeps_the_history_and_refuses_the_old_key_from_then_on(fleet, database):
    kept(fleet, report(1), now=int(time.time()))
    waiting = arrived(report(2))
    before = fleet.changes()
    with Fleet(database) as operator:
        operator.rekey("dev-1", public(OTHER))
    assert fleet.changes() > before
    assert [verdict.code for verdict in fleet.keep([waiting])] == ["signature"]
    assert kept(fleet, report(2), key=OTHER, now=int(time.time()) + 5) == [""]
    assert [(checked.report.number, checked.proof) for checked in fleet.verified()] == [(1, "verified"), (2, "verified")]
    with pytest.raises(OperatorError, match="had this key before"):
        fleet.rekey("dev-1", public(KEY))
    assert fleet.known()["dev-1"].public_key == public(OTHER)


def test_old_key_does_not_vouch_for_later_reports(fleet, database):
    now = int(time.time())
    fleet.rekey("dev-1", public(OTHER))
    line = seal(report(1), KEY).decode()  # whoever found the old device and can write to the database
    with create_engine(database).begin() as connection:
        connection.execute(
            text("insert into fleet_reports values ('dev-1', 1, :now, 'installed', :manifest, null, :line)"),
            {"now": now + 100, "manifest": "1" * 64, "line": line},
        )
    assert [checked.proof for checked in fleet.verified()] == ["forged"]


@pytest.mark.parametrize("change", ["number = 2", "event = 'confirmed'", "manifest = '2'", "device = 'dev-2'"])
def test_row_that_somebody_changed_is_called_forged(fleet, database, change):
    fleet.enroll("dev-2", public(KEY))
    kept(fleet, report(1))
    with create_engine(database).begin() as connection:
        connection.execute(text(f"update fleet_reports set {change}"))
    assert [checked.proof for checked in fleet.verified()] == ["forged"]


def test_last_state_that_somebody_changed_decides_nothing(fleet, database):
    now = int(time.time())
    kept(fleet, report(1, time=now), now=now)
    assert {name: one and one.proof for name, one in fleet.deciding().items()} == {"dev-1": "verified"}
    with create_engine(database).begin() as connection:
        changed = report(1, time=now, agent="9.0.0").model_dump_json()
        connection.execute(text("update fleet_last set report = :changed"), {"changed": changed})
    with pytest.raises(OperatorError, match="the last report of dev-1 was changed in the database"):
        fleet.deciding()


@pytest.mark.parametrize("change", [
    "delete from fleet_reports", "update fleet_reports set envelope = null, body = :changed",
    "update fleet_last set number = null", "update fleet_last set report = null",
])  # fmt: skip
def test_last_report_that_somebody_removed_decides_nothing(fleet, database, change):
    kept(fleet, report(1))
    with create_engine(database).begin() as connection:
        changed = report(1, agent="9.0.0").model_dump_json()
        connection.execute(text("update fleet_last set report = :changed"), {"changed": changed})
        connection.execute(text(change), {"changed": changed} if ":" in change else {})
    with pytest.raises(OperatorError, match="the last report of dev-1 was changed in the database"):
        fleet.deciding()


@pytest.mark.parametrize("meanwhile", ["a report", "a rekey"])
def test_decision_is_not_disturbed_by_what_comes_meanwhile(fleet, database, monkeypatch, meanwhile):
    """Let a report, or another key and its first report, be committed between any two transactions that the decision reads in."""
    fleet.preauthorize([Newcomer(f"dev-{n}", public(OTHER), "shapes", "edge", {}) for n in (2, 3, 4)])
    for name in ("dev-1", "dev-3", "dev-4"):
        now = int(time.time())
        kept(fleet, report(1, device=name, time=now), key=KEY if name == "dev-1" else OTHER, now=now)
    monkeypatch.setattr(store, "PAGE", 1)
    real, other = store.reading, Fleet(database)
    third = Ed25519PrivateKey.from_private_bytes(b"t" * 32)
    turns = itertools.count()

    @contextmanager
    def disturbed(engine):
        with real(engine) as connection:
            yield connection
        at, now = next(turns), int(time.time())
        if meanwhile == "a rekey" and at == 2:
            other.rekey("dev-4", public(third))
            kept(other, report(2, device="dev-4", time=now), key=third, now=now)
        elif meanwhile == "a report" and at < 8:
            for name, key in (("dev-1", KEY), ("dev-3", OTHER), ("dev-4", OTHER)):
                kept(other, report(2 + at, device=name, time=now), key=key, now=now)

    monkeypatch.setattr(store, "reading", disturbed)
    found = fleet.deciding()
    assert {name: one and one.proof for name, one in found.items()} == {
        "dev-1": "verified", "dev-2": None, "dev-3": "verified", "dev-4": "verified",
    }  # fmt: skip
    assert {one.proof for one in fleet.verified()} == {"verified"}
    other.close()


def test_envelope_is_kept_as_it_was_sent(fleet, database):
    line = seal(report(1), KEY)
    fleet.receive(line)
    with create_engine(database).connect() as connection:
        assert connection.execute(text("select envelope, body from fleet_reports")).one() == (line.decode(), None)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_report_in_another_encoding_is_refused(fleet, encoding):
    with pytest.raises(ManifestError, match="not valid"):
        fleet.receive(seal(report(1), KEY).decode().encode(encoding))


def test_truncated_line_is_refused_wherever_it_ends(fleet):
    line = seal(report(1), KEY)
    for end in range(0, len(line), 7):
        with pytest.raises(ManifestError):
            fleet.receive(line[:end])
    assert fleet.reports() == []


def test_signature_of_another_purpose_is_no_report(fleet):
    body = report(1).canonical()
    for message in (body, CONTEXT.replace(b"3", b"2") + body):
        forged = json.dumps({"signed": body.decode(), "signature": KEY.sign(message).hex()}).encode()
        with pytest.raises(ManifestError, match="not signed by dev-1's key"):
            fleet.receive(forged)
    assert state(fleet).refused == 2


# Clocks


def test_clock_in_1970_or_2100_is_shown_and_decides_nothing(fleet):
    fleet.enroll("dev-2", public(KEY))
    kept(fleet, alive(1, time=12), alive(1, time=4_102_444_800, device="dev-2"))
    assert (state(fleet).skew, state(fleet).heard_at) == (12 - NOW, NOW)
    assert (state(fleet, "dev-2").skew, state(fleet, "dev-2").heard_at) == (4_102_444_800 - NOW, NOW)
    assert [heard.at for heard in fleet.heard().values() if heard] == [NOW, NOW]


def test_report_that_waited_says_nothing_of_the_clock(fleet):
    kept(fleet, report(1, time=NOW - WEEK), live=False)
    assert state(fleet).skew is None
    kept(fleet, report(2, time=NOW - WEEK), report(3, time=NOW - 2))  # the newest of a batch is fresh
    assert state(fleet).skew == -2


def test_heartbeat_does_not_hide_how_the_update_ended(fleet):
    kept(fleet, report(1, event="refused", reason="too slow"), alive(2), now=NOW)
    found = state(fleet)
    assert (found.event, found.reason, found.number, found.heartbeat_at, found.tags) == (
        "refused", "too slow", 2, NOW, {"site": "berlin"},
    )  # fmt: skip
    fleet.tag("dev-1", {"site": "lyon", "hall": "2"})
    assert state(fleet).tags == {"site": "lyon", "hall": "2"}


def test_report_that_comes_late_does_not_become_the_last(fleet):
    kept(fleet, report(5, active="5" * 64))
    kept(fleet, report(4, active="4" * 64, event="rolled_back"), now=NOW + 1)
    assert (state(fleet).active, state(fleet).event, state(fleet).heard_at) == ("5" * 64, "installed", NOW + 1)


# Enrolment


def enrolment(token: str, key: Ed25519PrivateKey = KEY, **fields: Any) -> Enrolment:
    given = {"device": "dev-2", "line": "shapes", "device_class": "edge"} | fields
    message = Enrolment.message(token, *given.values())
    return Enrolment(**given, public_key=public(key), token=token, signature=key.sign(message).hex())


def test_invited_device_reports_at_once_and_counts_once_it_is_confirmed(fleet):
    token = fleet.invite("dev-2", "shapes", "edge", WEEK)
    known = fleet.redeem(enrolment(token, OTHER))
    assert (known.public_key, known.line, known.device_class, known.confirmed) == (public(OTHER), "shapes", "edge", False)
    assert kept(fleet, report(1, device="dev-2"), key=OTHER) == [""]
    assert "dev-2" not in fleet.devices()
    fleet.confirm("dev-2")
    assert fleet.devices()["dev-2"] == report(1, device="dev-2")


def test_enrolment_is_answered_whatever_others_do_to_the_register_meanwhile(fleet, database, monkeypatch):
    """Fail whatever reads the register again after the enrolment's transaction: what it says is of another moment."""
    token = fleet.invite("dev-1", "", "", WEEK, replaces=True)
    kept(fleet, report(7))
    monkeypatch.setattr(Fleet, "known", lambda _: {})
    made = fleet.redeem(enrolment(token, OTHER, device="dev-1"))
    assert (made.device, made.public_key, made.confirmed, made.highest) == ("dev-1", public(OTHER), False, 7)


def test_token_used_twice_is_refused_and_shown(fleet):
    token = fleet.invite("dev-2", "shapes", "edge", WEEK)
    fleet.redeem(enrolment(token, OTHER))
    with pytest.raises(TakenError, match="used before"):
        fleet.redeem(enrolment(token, KEY))
    assert fleet.known()["dev-2"].public_key == public(OTHER)
    (shown,) = fleet.invites()
    assert (shown.attempts, shown.refused_why is not None and "used before" in shown.refused_why) == (1, True)


def test_answer_that_got_lost_is_given_again(fleet):
    asked = enrolment(fleet.invite("dev-2", "shapes", "edge", WEEK), OTHER)
    assert fleet.redeem(asked) == fleet.redeem(asked)
    before = fleet.changes()
    fleet.redeem(asked)
    assert fleet.changes() == before


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"device": "dev-3"}, "another device"), ({"line": "gaskets"}, "another device, line"), ({"device_class": "station"}, "or class"),
])  # fmt: skip
def test_token_is_bound(fleet, fields, sentence):
    token = fleet.invite("dev-2", "shapes", "edge", WEEK)
    with pytest.raises(EnrolmentError, match=sentence):
        fleet.redeem(enrolment(token, OTHER, **fields))
    assert fleet.known().keys() == {"dev-1"}
    fleet.redeem(enrolment(token, OTHER))  # the right device is not locked out


def test_expired_unknown_and_unsigned_enrolments_are_refused(fleet):
    token = fleet.invite("dev-2", "shapes", "edge", WEEK)
    with pytest.raises(EnrolmentError, match="expired"):
        fleet.redeem(enrolment(token), now=int(time.time()) + WEEK + 1)
    with pytest.raises(EnrolmentError, match="unknown"):
        fleet.redeem(enrolment("x" * 43))
    with pytest.raises(EnrolmentError, match="not signed"):
        fleet.redeem(enrolment(token).model_copy(update={"public_key": public(OTHER)}))
    assert fleet.known().keys() == {"dev-1"}


def test_wrong_attempts_are_limited(fleet):
    token = fleet.invite("dev-2", "shapes", "edge", WEEK)
    for _ in range(MOST_ATTEMPTS):
        with pytest.raises(EnrolmentError, match="another device"):
            fleet.redeem(enrolment(token, device="dev-3"))
    with pytest.raises(AttemptsError, match="is void; ask for a new one"):
        fleet.redeem(enrolment(token))
    assert fleet.known().keys() == {"dev-1"}


def test_known_id_is_taken(fleet):
    token = fleet.invite("dev-2", "shapes", "edge", WEEK)
    fleet.enroll("dev-2", public(KEY))
    with pytest.raises(TakenError, match="this id"):
        fleet.redeem(enrolment(token, OTHER))
    with pytest.raises(OperatorError, match="enrolled already"):
        fleet.invite("dev-2", "shapes", "edge", WEEK)
    assert fleet.known()["dev-2"].public_key == public(KEY)


def test_invitation_for_another_key_waits_for_a_confirmation(fleet):
    token = fleet.invite("dev-1", "", "", WEEK, replaces=True)
    fleet.redeem(enrolment(token, OTHER, device="dev-1"))
    known = fleet.known()["dev-1"]
    assert (known.public_key, known.confirmed) == (public(OTHER), False)
    assert kept(fleet, report(1)) == ["signature"]


def test_invitation_for_another_key_refuses_one_that_the_device_had(fleet):
    token = fleet.invite("dev-1", "", "", WEEK, replaces=True)
    with pytest.raises(TakenError, match="used before; run `ferry-agent init --new-key`"):
        fleet.redeem(enrolment(token, KEY, device="dev-1"))
    assert fleet.known()["dev-1"].public_key == public(KEY)
    fleet.redeem(enrolment(token, OTHER, device="dev-1"))  # the token still serves
    assert fleet.known()["dev-1"].public_key == public(OTHER)


def test_token_is_nowhere_in_the_database(fleet, tmp_path):
    tokens = [fleet.invite("dev-2", "shapes", "edge", WEEK), fleet.add_token("forwarder", "reporter", WEEK)]
    fleet.redeem(enrolment(tokens[0], OTHER))
    held = b"".join(path.read_bytes() for path in tmp_path.glob("fleet.db*"))
    assert not any(token.encode() in held for token in tokens)
    assert public(OTHER).encode() in held


def test_api_token_has_its_role_until_it_expires_or_is_removed(fleet):
    token = fleet.add_token("forwarder", "reporter", WEEK)
    assert fleet.role_of(token) == "reporter"
    assert fleet.role_of(token + "x") is None
    assert fleet.role_of(token, now=int(time.time()) + WEEK + 1) is None
    with pytest.raises(OperatorError, match="there is a token forwarder already"):
        fleet.add_token("forwarder", "viewer", WEEK)
    fleet.remove_token("forwarder")
    assert fleet.role_of(token) is None


def test_list_of_devices_is_taken_whole_or_not_at_all(fleet):
    before = fleet.known()
    rows = [Newcomer("dev-2", public(OTHER), "shapes", "edge", {}), Newcomer("dev-1", public(OTHER), "shapes", "edge", {})]
    with pytest.raises(OperatorError, match="dev-1 is enrolled with another key"):
        fleet.preauthorize(rows)
    assert fleet.known() == before
    assert fleet.preauthorize([rows[0], Newcomer("dev-1", public(KEY), "shapes", "edge", {})]) == 1


# The database


def former(place: Path) -> Path:
    """Unpack the database of a workspace of version 0.2, and give it a report."""
    with tarfile.open(HERE / "world.tar.xz") as archive:
        (member,) = [found for found in archive.getmembers() if found.name.endswith("/ferry.db")]
        archive.extract(member, place, filter="data")
    database = place / member.name
    with sqlite3.connect(database) as raw:
        raw.execute("delete from fleet_devices")
        raw.execute("delete from fleet_reports")
        raw.execute("insert into fleet_devices values ('dev-1', ?, 5), ('dev-2', ?, 6)", [public(KEY), public(OTHER)])
        old = [report(n, schema_version=2, agent="0.2.0", active=f"{n:064x}") for n in (1, 2, 3)]
        raw.executemany(
            "insert into fleet_reports values ('dev-1', ?, ?, 'installed', ?, ?)",
            [(one.number, 100 + one.number, one.manifest, one.canonical().decode()) for one in old],
        )
    return database


def tables(database: Path) -> list[Any]:
    with sqlite3.connect(database) as raw:
        found = raw.execute("select name, sql from sqlite_master where name like 'fleet%' order by name").fetchall()
        return [
            found,
            *(raw.execute(f"select * from {name}").fetchall() for name, sql in found if (sql or "").startswith("CREATE TABLE")),
        ]


def test_database_of_version_0_2_goes_on(tmp_path):
    database = former(tmp_path)
    with sqlite3.connect(database) as raw:
        ledger = raw.execute("select * from ledger_entries").fetchall()
    with Fleet(f"sqlite:///{database}") as fleet:
        last = report(3, schema_version=2, agent="0.2.0", active=f"{3:064x}")
        assert fleet.devices() == {"dev-1": last, "dev-2": None}
        assert [heard.at for heard in fleet.heard().values() if heard] == [103]
        assert [(checked.report.number, checked.proof) for checked in fleet.verified()] == [
            (n, "unverifiable") for n in (1, 2, 3)
        ]
        assert fleet.keep([arrived(last)])[0].code == ""  # a device of version 0.2 that sends its report again
        assert fleet.keep([arrived(last.model_copy(update={"boot": "x"}))])[0].code == "conflict"
        assert kept(fleet, report(4)) == [""]
        assert [checked.proof for checked in fleet.verified()] == ["unverifiable"] * 3 + ["verified"]
        assert fleet.known()["dev-2"].confirmed
    with sqlite3.connect(database) as raw:
        assert ledger
        assert raw.execute("select * from ledger_entries").fetchall() == ledger


def test_device_that_a_ferry_of_0_2_enrolled_meanwhile_is_verified_confirmed_and_rekeyed(fleet, database):
    with create_engine(database).begin() as connection:
        connection.execute(
            text("insert into fleet_devices (device, public_key, enrolled) values ('dev-7', :key, 9)"), {"key": public(KEY)}
        )
    assert kept(fleet, report(1, device="dev-7"), now=int(time.time())) == [""]
    assert [checked.proof for checked in fleet.verified("dev-7")] == ["verified"]
    fleet.enroll("dev-7", public(KEY))
    assert fleet.devices()["dev-7"] == report(1, device="dev-7")
    fleet.rekey("dev-7", public(OTHER))
    assert [checked.proof for checked in fleet.verified("dev-7")] == ["verified"]
    assert kept(fleet, report(2, device="dev-7")) == ["signature"]


def test_report_that_a_ferry_of_0_2_kept_meanwhile_spoils_no_batch(fleet, database):
    kept(fleet, report(1))
    old = report(5, schema_version=2, agent="0.2.0")
    with create_engine(database).begin() as connection:  # that ferry knows no last states
        connection.execute(
            text("insert into fleet_reports values ('dev-1', 5, :now, 'installed', :manifest, :body, null)"),
            {"now": NOW, "manifest": old.manifest, "body": old.canonical().decode()},
        )
    found = fleet.keep([arrived(report(2)), arrived(old), arrived(report(6))], now=NOW)
    assert [(verdict.code, verdict.highest) for verdict in found] == [("", 6)] * 3
    assert [one.number for one in fleet.reports()] == [1, 2, 5, 6]


def test_migrations_lead_to_the_tables_that_the_code_uses(database):
    Fleet(database).close()
    engine = create_engine(database)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = [change for change in compare_metadata(context, schema.metadata) if schema.VERSION_TABLE not in str(change)]
    engine.dispose()
    assert found == []


def test_migration_that_is_killed_changes_nothing(tmp_path):
    database = former(tmp_path)
    before = tables(database)
    code = (
        "import os, signal, sys; from alembic import op; from ota.fleet.store import Fleet\n"
        "real, calls = op.create_table, []\n"
        "def create(*words, **named):\n"
        "    calls.append(words[0])\n"
        "    if words[0] == 'fleet_invites': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*words, **named)\n"
        "op.create_table = create\n"
        "Fleet(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"sqlite:///{database}"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert tables(database) == before
    with Fleet(f"sqlite:///{database}") as fleet:
        assert len(fleet.reports()) == 3


def _open(database: str, begin: Any, told: Any) -> None:
    begin.wait()
    try:
        with Fleet(database) as fleet:
            told.put(len(fleet.reports()))
    except Exception as error:  # noqa: BLE001 - the test shows it
        told.put(repr(error))


@pytest.mark.parametrize("fresh", [True, False])
def test_two_processes_that_migrate_at_once(tmp_path, fresh):
    database = f"sqlite:///{tmp_path / 'new.db' if fresh else former(tmp_path)}"
    spawn = multiprocessing.get_context("spawn")
    begin, told = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=_open, args=(database, begin, told)) for _ in range(2)]
    for one in both:
        one.start()
    assert [told.get(timeout=120) for _ in both] == ([0, 0] if fresh else [3, 3])
    for one in both:
        one.join()


def test_database_of_a_newer_version_is_left_alone(database):
    Fleet(database).close()
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("update fleet_version set version_num = '0999'"))
    engine.dispose()
    with pytest.raises(OperatorError, match=r"a newer ferry made the fleet's tables \(version 0999\); install that ferry"):
        Fleet(database)


def test_reader_of_an_older_database_is_told_what_to_do(tmp_path):
    database = former(tmp_path)
    before = tables(database)
    with pytest.raises(OperatorError, match="run `ferry fleet status` once"):
        Fleet(f"sqlite:///{database}", writer=False)
    assert tables(database) == before


def test_database_that_cannot_be_written_is_not_migrated(tmp_path):
    database = former(tmp_path)
    before = tables(database)
    with pytest.raises(TransferError, match=r"the database cannot be written: .*; run ferry as the user who owns it"):
        Fleet(f"sqlite:///file:{database}?mode=ro&uri=true")
    assert tables(database) == before


def test_read_only_database_is_read_and_not_written(tmp_path):
    with Fleet(f"sqlite:///{tmp_path / 'fleet.db'}") as fleet:
        fleet.enroll("dev-1", public(KEY))
        kept(fleet, report(1))
    url = f"sqlite:///file:{tmp_path / 'fleet.db'}?mode=ro&uri=true"
    with Fleet(url) as reader:
        assert reader.devices() == {"dev-1": report(1)}
        with pytest.raises(TransferError, match="the database cannot be written"):
            reader.keep([arrived(report(2))])
        assert reader.reports() == [report(1)]


def test_full_disk_keeps_nothing_and_says_so(fleet, database):
    kept(fleet, report(1))
    with fleet.engine.connect() as connection:  # the pool hands out this one connection
        pages = connection.execute(text("pragma page_count")).scalar_one()
        connection.execute(text(f"pragma max_page_count = {pages}"))
    with pytest.raises(TransferError, match="the database's disk is full"):
        fleet.keep([arrived(report(n, reason="x" * 500)) for n in range(2, 60)])
    assert fleet.reports() == [report(1)]
    assert state(fleet).number == 1


def test_database_that_another_process_holds_keeps_nothing_and_says_so(database, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "WAIT", 0.05)
    with Fleet(database) as fleet:
        fleet.enroll("dev-1", public(KEY))
        holder = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)
        holder.execute("begin immediate")
        with pytest.raises(TransferError, match=r"another process held the database for 0\.05 s; wait until it ends"):
            kept(fleet, report(1))
        assert fleet.reports() == []
        holder.execute("rollback")
        holder.close()
        assert kept(fleet, report(1)) == [""]


def test_gateway_syncs_and_leaves_readers_alone(database):
    with open_fleet(database) as fleet, fleet.engine.connect() as connection:
        assert connection.execute(text("pragma journal_mode")).scalar() == "wal"
        assert connection.execute(text("pragma synchronous")).scalar() == 2  # FULL


def test_huge_numbers_of_one_device_take_bounded_memory(fleet):
    """Hold nothing for the numbers between those that a device sends on its way to a million."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for first in range(1, 1_000_000, 25_000):
        assert kept(fleet, *(alive(first + n) for n in range(5))) == [""] * 5
    (verdict,) = fleet.keep([arrived(alive(2**31 - 1))], now=NOW)
    assert (verdict.code, verdict.highest) == ("", 2**31 - 1)
    assert kept(fleet, alive(3), alive(17)) == ["", ""]  # one that was sent before, one that comes late
    assert sum(1 for _ in fleet.verified()) == 202
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
