"""The ledger finds out when an entry was changed, removed or cut off."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from registry.errors import LedgerError, StoreError
from registry.ledger import START, Ledger


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


@pytest.mark.parametrize(
    "attack",
    [
        "UPDATE ledger_entries SET body = replace(body, 'reason 2', 'reason X') WHERE number = 2",
        "DELETE FROM ledger_entries WHERE number = 2",
        "DELETE FROM ledger_entries WHERE number = 1",
        "UPDATE ledger_entries SET number = 9 WHERE number = 3",
        "UPDATE ledger_entries SET sha256 = 'x' WHERE number = 3",
    ],
)
def test_edited_ledger_is_found_out(ledger: Ledger, database: Path, attack: str):
    three_entries(ledger)
    edit(database, attack)
    with pytest.raises(LedgerError, match="was changed after it was written"):
        ledger.entries()


def test_signed_head_shows_that_entries_were_cut_off(ledger: Ledger, database: Path):
    three_entries(ledger)
    head = ledger.head()
    edit(database, "DELETE FROM ledger_entries WHERE number = 3")
    assert len(ledger.entries()) == 2  # the chain alone does not show it
    assert not ledger.holds(head)


def test_unreachable_database_is_one_sentence():
    with pytest.raises(StoreError, match=r"check its URL in ferry\.toml"):
        Ledger("sqlite:////nowhere/at/all/ferry.db")
