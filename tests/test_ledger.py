"""The ledger detects entries that were changed, removed or cut off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ota.errors import OperatorError
from ota.release.keys import KeyRing, create
from registry.errors import LedgerError, PromotionError, StoreError
from registry.ledger import START, Entry, Ledger


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "ferry.db"


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """Create the keys of a workspace."""
    return create(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def opened(database: Path, ring: KeyRing):
    """Provide a function that opens the ledger, as one process of a workspace does after the other."""
    made: list[Ledger] = []

    def open_one(keys: KeyRing = ring, seen: str = "ledger.seen") -> Ledger:
        made.append(Ledger(f"sqlite:///{database}", keys, database.parent / seen))
        return made[-1]

    yield open_one
    for ledger in made:
        ledger.close()


@pytest.fixture
def ledger(opened: Callable[..., Ledger]) -> Ledger:
    return opened()


def three_entries(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        ledger.append("promotion", "shapes/I/full", f"reason {number}", {"version": number})


def edit(database: Path, statement: str) -> None:
    connection = sqlite3.connect(database)
    connection.executescript(statement)
    connection.close()


def test_entries_name_the_hash_before_them(ledger: Ledger):
    three_entries(ledger)
    first, second, third = ledger.entries()
    assert first.previous == START
    assert second.previous != third.previous
    assert [e.why for e in ledger.entries()] == ["reason 1", "reason 2", "reason 3"]
    assert third.who
    assert third.facts == {"version": 3}


def test_entries_survive_reopening(ledger: Ledger, opened: Callable[..., Ledger]):
    three_entries(ledger)
    again = opened()
    assert again.entries() == ledger.entries()
    assert again.head() == ledger.head()


def test_only_the_asked_subject_is_shown(ledger: Ledger):
    three_entries(ledger)
    ledger.append("gate", "digits/I/full", "other", {})
    for name in ("shapes/edge-2", "shapes/edge"):
        ledger.append("rollout", name, "other", {})
    assert len(ledger.entries("shapes/I/full")) == 3
    assert [e.subject for e in ledger.entries("shapes/edge")] == ["shapes/edge"]  # not those of a name that begins alike
    assert len(ledger.entries()) == 6


EDITS = {
    "number": ("number + 10", "-number"),
    "sha256": ("upper(sha256) || ''", "substr(sha256, 2)", "'x'", "''", f"'{START}'"),
    "body": (
        "body || ' '", "' ' || body", "substr(body, 2)", "replace(body, 'reason', 'Reason')", "replace(body, '\"promotion\"', '\"gate\"')",
        "replace(body, 'shapes', 'digits')", "CAST(body AS BLOB)", "''", "'{}'", "CAST(X'FF' || body AS TEXT)",
    ),
}  # fmt: skip
ATTACKS = [
    *(
        f"UPDATE ledger_entries SET {column} = {value} WHERE number = {row}"
        for column, values in EDITS.items()
        for value in values
        for row in (1, 2, 3)
    ),
    "DELETE FROM ledger_entries WHERE number = 2",
    "DELETE FROM ledger_entries WHERE number = 1",
    "DELETE FROM ledger_entries WHERE number < 3",
    "INSERT INTO ledger_entries SELECT 0, 'x', body FROM ledger_entries WHERE number = 1",
    "INSERT INTO ledger_entries SELECT 4, 'x', body FROM ledger_entries WHERE number = 3",
]
SWAP = """
CREATE TABLE kept AS SELECT * FROM ledger_entries;
DELETE FROM ledger_entries;
INSERT INTO ledger_entries SELECT CASE number WHEN 2 THEN 3 WHEN 3 THEN 2 ELSE number END, sha256, body FROM kept
"""


@pytest.mark.parametrize("attack", [*ATTACKS, SWAP])
def test_edited_ledger_is_found_out(ledger: Ledger, database: Path, attack: str):
    three_entries(ledger)
    edit(database, attack)
    for look in (ledger.entries, ledger.hashes, lambda: ledger.append("gate", "shapes/I/full", "goes on", {})):
        with pytest.raises(LedgerError, match="was changed after it was written"):
            look()


def test_any_changed_character_of_any_row_is_found_out(ledger: Ledger, database: Path):
    three_entries(ledger)
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA synchronous = OFF")
    rows = connection.execute("SELECT number, sha256, body FROM ledger_entries").fetchall()
    for number, *texts in rows:
        for column, text in zip(("sha256", "body"), texts, strict=True):
            for at in range(len(text)):
                changed = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
                with connection:
                    connection.execute(f"UPDATE ledger_entries SET {column} = ? WHERE number = ?", (changed, number))
                with pytest.raises(LedgerError, match=f"entry {number} of the ledger was changed after it was written"):
                    ledger.entries()
            with connection:
                connection.execute(f"UPDATE ledger_entries SET {column} = ? WHERE number = ?", (text, number))
    connection.close()
    assert len(ledger.entries()) == 3


def rewrite(database: Path, first: int, change: Callable[[dict[str, object]], None]) -> None:
    """Change an entry and make the chain fit from there on, as a writer of the database can."""
    connection = sqlite3.connect(database)
    rows = connection.execute("SELECT number, body FROM ledger_entries WHERE number >= ? ORDER BY number", (first,)).fetchall()
    previous = connection.execute("SELECT sha256 FROM ledger_entries WHERE number = ?", (first - 1,)).fetchone()
    previous = previous[0] if previous else START
    for number, text in rows:
        body = json.loads(text)
        if number == first:
            change(body)
        body["previous"] = previous
        changed = json.dumps(body, sort_keys=True)
        previous = hashlib.sha256(changed.encode()).hexdigest()
        with connection:
            connection.execute("UPDATE ledger_entries SET body = ?, sha256 = ? WHERE number = ?", (changed, previous, number))
    connection.close()


def insert(database: Path, kind: str, facts: dict[str, object], signature: tuple[str, str] | None = None) -> None:
    """Add an entry that fits the chain, as a writer of the database can."""
    connection = sqlite3.connect(database)
    number, previous = connection.execute("SELECT number, sha256 FROM ledger_entries ORDER BY number DESC LIMIT 1").fetchone()
    body = {"number": number + 1, "previous": previous, "kind": kind, "subject": "shapes/I/full", "who": "root",
            "when": "2026-11-28T10:00:00+00:00", "why": "better", "facts": facts}  # fmt: skip
    text = json.dumps(body, sort_keys=True)
    with connection:
        digest = hashlib.sha256(text.encode()).hexdigest()
        connection.execute("INSERT INTO ledger_entries VALUES (?, ?, ?)", (number + 1, digest, text))
        if signature:
            connection.execute("INSERT INTO ledger_signatures VALUES (?, ?, ?)", (number + 1, *signature))
    connection.close()


@pytest.mark.parametrize("first", [1, 2, 3])
def test_entry_that_was_rewritten_with_its_chain_is_found_out(ledger: Ledger, opened, database: Path, first: int):
    # No release has signed any of them.
    three_entries(ledger)
    rewrite(database, first, lambda body: body.update(why="another"))
    for look in (ledger, opened(), opened(seen="of another host")):
        with pytest.raises(LedgerError, match=f"entry {first} of the ledger is not signed by a key of this workspace"):
            look.entries()
        with pytest.raises(LedgerError):
            look.append("gate", "shapes/I/full", "goes on", {})


def test_inserted_decision_is_found_out(ledger: Ledger, opened, database: Path, tmp_path: Path, ring: KeyRing):
    three_entries(ledger)
    connection = sqlite3.connect(database)
    third = connection.execute("SELECT keyid, signature FROM ledger_signatures WHERE number = 3").fetchone()
    connection.close()
    stranger = create(tmp_path / "stranger")
    own = (stranger.ledger[0].key.keyid, "ab" * 64)
    for signature in (None, third, ("0" * 64, "not hex"), own, (ring.ledger[0].key.keyid, "00" * 64)):
        insert(database, "gate", {"version": 4, "outcome": "promote"}, signature)
        for look in (ledger, opened(), opened(seen="of another host")):
            with pytest.raises(LedgerError, match="entry 4 of the ledger is not signed by a key of this workspace"):
                look.entries()
        edit(database, "DELETE FROM ledger_entries WHERE number = 4")
        edit(database, "DELETE FROM ledger_signatures WHERE number = 4")
    assert len(ledger.entries()) == 3


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM ledger_signatures", "DROP TABLE ledger_signatures", "DELETE FROM ledger_signatures WHERE number = 2"],
)
def test_removed_signatures_are_found_out(ledger: Ledger, opened, database: Path, statement: str):
    # Without signatures, the ledger looks like that of an older version, which did not sign.
    three_entries(ledger)
    edit(database, statement)
    with pytest.raises(LedgerError, match="is not signed by a key of this workspace"):
        opened(seen="of another host").entries()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_entries_that_were_cut_off_are_found_out(ledger: Ledger, opened, database: Path, kept: int):
    three_entries(ledger)
    for table in ("ledger_entries", "ledger_signatures"):
        edit(database, f"DELETE FROM {table} WHERE number > {kept}")
    for look in (ledger, opened()):
        with pytest.raises(LedgerError, match=f"ends with entry {kept}, but this workspace has seen entry 3"):
            look.entries()
        with pytest.raises(LedgerError):
            look.append("gate", "shapes/I/full", "goes on", {})


def test_other_history_under_the_same_key_is_found_out(ledger: Ledger, opened, database: Path, tmp_path: Path):
    # A copy of the database continues elsewhere: every entry is signed, but they are not those that were seen here.
    three_entries(ledger)
    other = Ledger(f"sqlite:///{tmp_path / 'other.db'}", ledger._signing, tmp_path / "other.seen")
    for number in range(4):
        other.append("gate", "shapes/I/full", f"of another history {number}", {})
    other.close()
    (tmp_path / "other.db").replace(database)
    with pytest.raises(LedgerError, match="entry 3 of the ledger differs from the one that this workspace has seen"):
        opened().entries()


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("common", [0, 1])
def test_signed_entry_of_another_history_is_found_out(
    ledger: Ledger, opened, database: Path, tmp_path: Path, row: int, common: int
):
    # The entry is signed by the key of this workspace, under the same number, so only the chain shows the change. The third
    # entry, the newest that was seen here, stays.
    if common:
        ledger.append("promotion", "shapes/I/full", "reason 1", {"version": 1})
        source, target = sqlite3.connect(database), sqlite3.connect(tmp_path / "other.db")
        source.backup(target)
        source.close()
        target.close()
    other = Ledger(f"sqlite:///{tmp_path / 'other.db'}", ledger._signing, tmp_path / "other.seen")
    while len(ledger.entries()) < 3:
        ledger.append("promotion", "shapes/I/full", "here", {"version": 2})
        other.append("promotion", "shapes/I/full", "elsewhere", {"version": 3})
    other.close()
    edit(
        database,
        f"ATTACH '{tmp_path / 'other.db'}' AS other; "
        + "".join(
            f"DELETE FROM main.{table} WHERE number = {row}; INSERT INTO main.{table} SELECT * FROM other.{table} WHERE number = {row}; "
            for table in ("ledger_entries", "ledger_signatures")
        ),
    )
    changed = row > common  # the first is the same if both began with it
    for look in (ledger, opened(), opened(seen="of another host")):
        if changed:
            with pytest.raises(LedgerError, match=r"entry \d of the ledger was changed after it was written"):
                look.entries()
        else:
            assert len(look.entries()) == 3


def test_note_of_what_was_seen_is_needed_only_where_it_was_made(ledger: Ledger, opened, database: Path):
    three_entries(ledger)
    note = database.parent / "ledger.seen"
    assert note.stat().st_mode & 0o077 == 0
    note.unlink()  # as the error says to do if entries are lost for good
    edit(database, "DELETE FROM ledger_entries WHERE number = 3")
    edit(database, "DELETE FROM ledger_signatures WHERE number = 3")
    assert len(opened().entries()) == 2
    note.write_text("no number")
    with pytest.raises(LedgerError, match="restore it from a backup"):
        opened().entries()


def test_key_signs_its_own_entries_only(database: Path, tmp_path: Path):
    ring = create(tmp_path / "keys")
    ledger = Ledger(f"sqlite:///{database}", ring, tmp_path / "seen")
    three_entries(ledger)
    stolen = KeyRing(shutil.copytree(ring.folder, tmp_path / "stolen"))
    ring.begin_ledger(4)
    ledger.append("gate", "shapes/I/full", "a fourth", {})
    assert len({key.key.keyid for key in ring.ledger}) == 2
    again = Ledger(f"sqlite:///{database}", KeyRing(ring.folder), tmp_path / "seen")
    assert len(again.entries()) == 4
    # The thief of the old key records with it.
    thief = Ledger(f"sqlite:///{database}", stolen, tmp_path / "thief")
    with pytest.raises(LedgerError, match="entry 4 of the ledger is not signed"):
        thief.entries()
    stolen.ledger = [*ring.ledger, stolen.ledger[0]._replace(since=5)]
    thief.append("gate", "shapes/I/full", "a fifth", {})
    with pytest.raises(LedgerError, match="entry 5 of the ledger is not signed by a key of this workspace"):
        again.entries()
    for opened in (ledger, again, thief):
        opened.close()


def test_process_that_is_open_while_the_key_is_replaced_signs_with_the_new_one(database: Path, tmp_path: Path):
    """Sign by the new key: a training takes hours, and its entry must not make the ledger unreadable."""
    ring = create(tmp_path / "keys")
    url = f"sqlite:///{database}"
    long, other = Ledger(url, KeyRing(ring.folder), tmp_path / "seen"), Ledger(url, KeyRing(ring.folder), tmp_path / "seen")
    three_entries(long)
    ring.begin_ledger(4)
    long.append("gate", "shapes/I/full", "a fourth", {})
    fresh = Ledger(url, KeyRing(ring.folder), tmp_path / "seen")
    for opened in (fresh, other, long):
        assert len(opened.entries()) == 4
        opened.close()


def unsigned(database: Path, tmp_path: Path) -> None:
    """Create a ledger as an older version, which did not sign, left it."""
    ledger = Ledger(f"sqlite:///{database}", create(tmp_path / "old-keys"), tmp_path / "old-seen")
    three_entries(ledger)
    ledger.close()
    edit(database, "DROP TABLE ledger_signatures")


def test_ledger_of_a_ferry_that_did_not_sign_goes_on(database: Path, tmp_path: Path):
    unsigned(database, tmp_path)
    ring = create(tmp_path / "keys")
    ring.ledger = []
    ring._save()  # as that version made it
    assert ring.begin_ledger(Ledger.length(f"sqlite:///{database}") + 1).since == 4
    ledger = Ledger(f"sqlite:///{database}", KeyRing(ring.folder), tmp_path / "seen")
    assert (len(ledger.entries()), ledger.unsigned) == (3, 3)
    ledger.append("gate", "shapes/I/full", "a fourth", {})
    rewrite(database, 2, lambda body: body.update(why="another"))  # covered by the first signed entry
    with pytest.raises(LedgerError, match="entry 4 of the ledger is not signed"):
        Ledger(f"sqlite:///{database}", KeyRing(ring.folder), tmp_path / "of another host").entries()
    with pytest.raises(LedgerError):
        ledger.entries()
    ledger.close()


def test_two_processes_begin_to_sign_with_one_key(database: Path, tmp_path: Path):
    unsigned(database, tmp_path)
    rings = [create(tmp_path / "keys"), KeyRing(tmp_path / "keys")]
    for ring in rings:
        ring.ledger = []
    rings[0]._save()
    keys = {ring.begin_ledger(4).key.keyid for ring in rings}
    assert len(keys) == 1
    assert [key.key.keyid for key in KeyRing(tmp_path / "keys").ledger] == list(keys)


def test_unusable_key_records_nothing(ledger: Ledger, ring: KeyRing, tmp_path: Path, database: Path):
    three_entries(ledger)
    broken = KeyRing(ring.folder)
    broken.ledger = [broken.ledger[0]._replace(uri="file2:gone.pem")]
    reading = Ledger(f"sqlite:///{database}", broken, tmp_path / "seen")
    assert len(reading.entries()) == 3
    for record in (lambda: reading.append("gate", "shapes/I/full", "a fourth", {}), reading.check_ready):
        with pytest.raises(OperatorError, match=r"the ledger's key file2:gone\.pem cannot sign"):
            record()
    other = create(tmp_path / "other")  # like a KMS that has another key under that name
    broken.ledger = [broken.ledger[0]._replace(uri=f"file2:{other.folder / 'online' / 'ledger.pem'}")]
    with pytest.raises(OperatorError, match="cannot sign"):
        reading.append("gate", "shapes/I/full", "a fourth", {})
    assert len(reading.entries()) == 3
    reading.close()


def test_who_is_not_what_the_environment_says(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "the-owner")
    assert ledger.append("gate", "shapes/I/full", "r", {}).who != "the-owner"
    assert ledger.append("gate", "shapes/I/full", "r", {}).who == ("root" if os.getuid() == 0 else Path.home().owner())


def test_recording_beside_others_never_loses_an_entry_nor_breaks_the_chain(opened: Callable[..., Ledger]):
    def record(name: int) -> None:
        own = opened()  # like another process, without a common lock
        for _ in range(10):
            own.append("gate", f"line{name}/I/full", "r", {})

    opened()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(record, range(4)))
    ledger = opened()
    assert len(ledger.entries()) == 40
    assert [len(ledger.entries(f"line{name}/I/full")) for name in range(4)] == [10] * 4


def test_entry_that_another_process_adds_while_the_ledger_is_read_is_not_missed(
    ledger: Ledger, opened, database: Path, monkeypatch
):
    three_entries(ledger)
    parsed, other = Entry.model_validate_json, opened()

    def parse(text: str) -> Entry:
        monkeypatch.setattr(Entry, "model_validate_json", parsed)
        other.append("gate", "shapes/I/full", "a fourth", {})
        return parsed(text)

    monkeypatch.setattr(Entry, "model_validate_json", parse)
    assert len(ledger.entries()) == 3
    assert (database.parent / "ledger.seen").read_text().startswith("4 ")  # the slower process does not set the note back
    assert len(ledger.entries()) == 4


def test_guard_sees_what_was_recorded_meanwhile_and_forbids(ledger: Ledger, opened: Callable[..., Ledger]):
    three_entries(ledger)
    seen: list[int] = []

    def guard(entries: list[Entry]) -> None:
        seen.append(len(entries))
        if len(seen) == 1:  # another host records between reading and writing
            opened().append("gate", "shapes/I/full", "faster", {})
        else:
            raise PromotionError("no more")

    with pytest.raises(PromotionError):
        ledger.append("promotion", "shapes/I/full", "slower", {}, guard)
    assert seen == [3, 4]
    assert [e.why for e in ledger.entries()][3:] == ["faster"]


def test_guard_is_asked_about_its_own_subject_only(ledger: Ledger):
    three_entries(ledger)
    ledger.append("gate", "digits/I/full", "of another", {})
    seen: list[str] = []
    ledger.append("promotion", "shapes/I/full", "r", {}, lambda entries: seen.extend(e.subject for e in entries))
    assert seen == ["shapes/I/full"] * 3


def test_hashes_are_those_of_the_entries_that_are_there(ledger: Ledger, database: Path):
    assert ledger.hashes() == []
    three_entries(ledger)
    heads = ledger.hashes()
    assert [START, *heads[:-1]] == [entry.previous for entry in ledger.entries()]
    edit(database, "DELETE FROM ledger_entries WHERE number = 3")
    with pytest.raises(LedgerError):
        ledger.hashes()


def test_unreachable_database_is_one_sentence(ring: KeyRing, tmp_path: Path):
    with pytest.raises(StoreError, match=r"check its URL in ferry\.toml"):
        Ledger("sqlite:////nowhere/at/all/ferry.db", ring, tmp_path / "seen")


@pytest.mark.parametrize(("said", "shown"), [("not today", "not today"), ("", "no reason given")])
def test_database_that_refuses_an_entry_is_said_to(ledger: Ledger, database: Path, said: str, shown: str):
    three_entries(ledger)
    edit(database, f"create trigger no before insert on ledger_entries begin select raise(abort, '{said}'); end")
    with pytest.raises(StoreError, match=f"the database refuses entry 4 of the ledger: {shown}"):
        three_entries(ledger)
    assert len(ledger.entries()) == 3
