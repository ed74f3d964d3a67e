"""The record of decisions: append-only, each entry naming the hash of the one before it, in the workspace's database.

MLflow's aliases say who is champion now and forget who was; the ledger says who was, since when, decided by whom and why.
Where the two disagree, the ledger is right. Its head is signed into every release, so that cutting entries off shows.
"""

from __future__ import annotations

import getpass
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, create_engine, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from model.scorecard import Frozen, Sha256
from registry.errors import LedgerError, StoreError

START: Sha256 = "0" * 64
Kind = Literal["gate", "promotion", "release", "rollout", "halt", "trigger"]

_metadata = MetaData()
_entries = Table(
    "ledger_entries", _metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("body", Text, nullable=False),
)  # fmt: skip


class Entry(Frozen):
    """One decision."""

    number: int
    previous: Sha256
    kind: Kind
    subject: str
    who: str
    when: str
    why: str
    facts: dict[str, Any] = Field(default_factory=dict)


class Ledger:
    """The entries behind a database URL."""

    def __init__(self, database: str) -> None:
        """Open the table, making it where it is missing.

        Raises:
            StoreError: the database cannot be opened.
        """
        with _foreign_errors():
            self._engine = create_engine(database)
            _metadata.create_all(self._engine)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def append(self, kind: Kind, subject: str, why: str, facts: dict[str, Any]) -> Entry:
        """Record a decision.

        Args:
            kind: of decision.
            subject: what it is about, such as surfaces/I/full.
            why: the reason given.
            facts: numbers and hashes; must be JSON.

        Raises:
            StoreError: the database refuses, or somebody else wrote at the same moment (nothing was recorded).
        """
        with _foreign_errors(), self._engine.begin() as connection:
            last = connection.execute(select(_entries).order_by(_entries.c.number.desc()).limit(1)).first()
            entry = Entry(
                number=last.number + 1 if last else 1, previous=last.sha256 if last else START, kind=kind, subject=subject,
                who=_user(), when=datetime.now(UTC).isoformat(timespec="seconds"), why=why, facts=facts,
            )  # fmt: skip
            body = json.dumps(entry.model_dump(mode="json"), sort_keys=True)
            try:
                connection.execute(insert(_entries).values(number=entry.number, sha256=_hash(body), body=body))
            except IntegrityError as error:
                raise StoreError("somebody else recorded a decision at the same moment; repeat yours") from error
        return entry

    def entries(self, subject: str | None = None) -> list[Entry]:
        """Entries in order, checked along the chain.

        Raises:
            LedgerError: an entry was changed or removed.
        """
        found, previous = [], START
        with _foreign_errors(), self._engine.connect() as connection:
            rows = connection.execute(select(_entries).order_by(_entries.c.number)).all()
        for expected, row in enumerate(rows, start=1):
            entry = Entry.model_validate_json(row.body) if row.sha256 == _hash(row.body) else None
            if entry is None or (row.number, entry.number, entry.previous) != (expected, expected, previous):
                raise LedgerError(f"entry {row.number} of the ledger was changed after it was written; restore the database")
            previous = row.sha256
            if subject is None or entry.subject == subject:
                found.append(entry)
        return found

    def head(self) -> Sha256:
        """Hash of the last entry."""
        with _foreign_errors(), self._engine.connect() as connection:
            found = connection.execute(select(_entries.c.sha256).order_by(_entries.c.number.desc()).limit(1)).scalar()
        return found or START

    def holds(self, digest: Sha256) -> bool:
        """Whether an entry with this hash is there; a head that was signed once and is not shows a truncated ledger."""
        with _foreign_errors(), self._engine.connect() as connection:
            known = connection.execute(select(_entries.c.number).where(_entries.c.sha256 == digest)).scalar()
        return digest == START or known is not None


def _hash(body: str) -> Sha256:
    return hashlib.sha256(body.encode()).hexdigest()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return "unknown"


@contextmanager
def _foreign_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise StoreError(f"the database's driver {error.name} is not installed; `pip install 'deltaferry[postgres]'`") from error
    except SQLAlchemyError as error:
        raise StoreError(f"the database cannot be used: {str(error).splitlines()[0]}; check its URL in ferry.toml") from error
