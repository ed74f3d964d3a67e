"""The ledger finds out when an entry was changed, removed or cut off."""

from __future__ import annotations

import hashlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.errors import LedgerError, PromotionError, StoreError
from registry.ledger import START, Entry, Ledger


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "ferry.db"


@pytest.fixture
def ledger(database: Path):
    opened = Ledger(f"sqlite:///{database}")
    yield opened
    opened.close()


def three_entries(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        ledger.append("promotion", "shapes/I/full", f"reason {number}", {"version": number})


def edit(database: Path, statement: str) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(statement)
    connection.close()


def test_entries_name_the_hash_before_them(ledger: Ledger):
    three_entries(ledger)
    first, second, third = ledger.entries()
    assert first.previous == START
    assert second.previous != third.previous
    assert [e.why for e in ledger.entries()] == ["reason 1", "reason 2", "reason 3"]
    assert third.who
    assert third.facts == {"version": 3}


def test_entries_survive_reopening(ledger: Ledger, database: Path):
    three_entries(ledger)
    again = Ledger(f"sqlite:///{database}")
    assert again.entries() == ledger.entries()
    assert again.head() == ledger.head()
    again.close()


def test_only_the_asked_subject_is_shown(ledger: Ledger):
    three_entries(ledger)
    ledger.append("gate", "digits/I/full", "other", {})
    assert len(ledger.entries("shapes/I/full")) == 3
    assert len(ledger.entries()) == 4


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
    for statement in attack.split(";"):
        edit(database, statement)
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


def test_entry_that_was_rewritten_with_its_hash_breaks_the_chain_or_the_signed_head(ledger: Ledger, database: Path):
    three_entries(ledger)
    head = ledger.head()
    for number in (3, 2):
        connection = sqlite3.connect(database)
        (body,) = connection.execute("SELECT body FROM ledger_entries WHERE number = ?", (number,)).fetchone()
        body = body.replace(f"reason {number}", "another")
        with connection:
            digest = hashlib.sha256(body.encode()).hexdigest()
            connection.execute("UPDATE ledger_entries SET body = ?, sha256 = ? WHERE number = ?", (body, digest, number))
        connection.close()
        if number == 3:  # the last: the chain alone does not show it
            assert ledger.entries()[-1].why == "another"
            assert not ledger.holds(head)
    with pytest.raises(LedgerError, match="entry 3 of the ledger was changed"):
        ledger.entries()


def test_recording_beside_others_never_loses_an_entry_nor_breaks_the_chain(database: Path):
    def record(name: int) -> None:
        own = Ledger(f"sqlite:///{database}")  # as of another process, without a lock in common
        for _ in range(10):
            own.append("gate", f"line{name}/I/full", "r", {})
        own.close()

    Ledger(f"sqlite:///{database}").close()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(record, range(4)))
    ledger = Ledger(f"sqlite:///{database}")
    assert len(ledger.entries()) == 40
    assert [len(ledger.entries(f"line{name}/I/full")) for name in range(4)] == [10] * 4
    ledger.close()


def test_guard_sees_what_was_recorded_meanwhile_and_forbids(ledger: Ledger, database: Path):
    three_entries(ledger)
    seen: list[int] = []

    def guard(entries: list[Entry]) -> None:
        seen.append(len(entries))
        if len(seen) == 1:  # another host records between the look and the writing
            other = Ledger(f"sqlite:///{database}")
            other.append("gate", "shapes/I/full", "faster", {})
            other.close()
        else:
            raise PromotionError("no more")

    with pytest.raises(PromotionError):
        ledger.append("promotion", "shapes/I/full", "slower", {}, guard)
    assert seen == [3, 4]
    assert [e.why for e in ledger.entries()][3:] == ["faster"]


def test_signed_head_shows_that_entries_were_cut_off(ledger: Ledger, database: Path):
    three_entries(ledger)
    head = ledger.head()
    edit(database, "DELETE FROM ledger_entries WHERE number = 3")
    assert len(ledger.entries()) == 2  # the chain alone does not show it
    assert not ledger.holds(head)


def test_unreachable_database_is_one_sentence():
    with pytest.raises(StoreError, match=r"check its URL in ferry\.toml"):
        Ledger("sqlite:////nowhere/at/all/ferry.db")
