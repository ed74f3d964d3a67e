"""The record of decisions: append-only, each entry naming the hash of the one before it, in the workspace's database.

MLflow's aliases say who is champion now and forget who was; the ledger says who was, since when, decided by whom and why.
Where the two disagree, the ledger is right. Its head is signed into every release, so that cutting entries off shows.
"""

from __future__ import annotations

import getpass
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, ValidationError
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, create_engine, insert, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from model.scorecard import Frozen, Sha256
from registry.errors import LedgerError, StoreError

START: Sha256 = "0" * 64
Kind = Literal["gate", "promotion", "pending", "refusal", "rating", "release", "rollout", "halt", "trigger"]
ATTEMPTS = 100  # of recording; each that fails was lost to somebody who recorded something

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

    def append(
        self,
        kind: Kind,
        subject: str,
        why: str,
        facts: dict[str, Any],
        guard: Callable[[list[Entry]], None] | None = None,
        who: str | None = None,
    ) -> Entry:
        """Record a decision.

        The number is the table's primary key and each entry names the one before it: of two processes that record at the same
        moment, on one host or on several, the database lets one through, and the other looks again at what is there by then.

        Args:
            kind: of decision.
            subject: what it is about, such as surfaces/I/full.
            why: the reason given.
            facts: numbers and hashes; must be JSON.
            guard: is given the subject's entries right before; raises what forbids the new one. None: nothing does.
            who: decided; None: the user of this process.

        Raises:
            LedgerError: an entry was changed or removed.
            StoreError: the database refuses, or others record without end (nothing was recorded).
        """
        for _ in range(ATTEMPTS):
            with _foreign_errors():
                with self._engine.connect() as connection:
                    chain, last = _read(connection)
                if guard:
                    guard([entry for entry in chain if entry.subject == subject])
                entry = Entry(
                    number=len(chain) + 1, previous=last, kind=kind, subject=subject, who=who or user(),
                    when=datetime.now(UTC).isoformat(timespec="seconds"), why=why, facts=facts,
                )  # fmt: skip
                body = json.dumps(entry.model_dump(mode="json"), sort_keys=True)
                try:
                    with self._engine.begin() as connection:
                        connection.execute(insert(_entries).values(number=entry.number, sha256=_hash(body), body=body))
                except IntegrityError:
                    continue
            return entry
        raise StoreError("others recorded decisions at the same moments, again and again; repeat yours")

    def entries(self, subject: str | None = None) -> list[Entry]:
        """Entries in order, checked along the chain.

        Raises:
            LedgerError: an entry was changed or removed.
        """
        with _foreign_errors(), self._engine.connect() as connection:
            found, _ = _read(connection)
        return [entry for entry in found if subject is None or entry.subject == subject]

    def hashes(self) -> list[Sha256]:
        """Hash of each entry in order, after a check of the chain.

        Raises:
            LedgerError: an entry was changed or removed.
        """
        with _foreign_errors(), self._engine.connect() as connection:
            found, last = _read(connection)
        return [*(entry.previous for entry in found[1:]), last] if found else []

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


def _read(connection: Connection) -> tuple[list[Entry], Sha256]:
    """Every entry, checked along the chain, and the hash of the last."""
    try:
        rows = connection.execute(select(_entries).order_by(_entries.c.number)).all()
    except OperationalError as error:
        if "decode" not in str(error):  # SQLite's word for text that is not UTF-8 any more
            raise
        raise LedgerError("an entry of the ledger was changed after it was written; restore the database") from error
    found, previous = [], START
    for expected, row in enumerate(rows, start=1):
        whole = isinstance(row.body, str) and row.sha256 == _hash(row.body)
        try:
            entry = Entry.model_validate_json(row.body) if whole else None
        except ValidationError as error:
            raise LedgerError(
                f"entry {row.number} of the ledger was changed after it was written, or a newer ferry wrote it; restore the database, "
                "or update ferry"
            ) from error
        if entry is None or (row.number, entry.number, entry.previous) != (expected, expected, previous):
            raise LedgerError(f"entry {row.number} of the ledger was changed after it was written; restore the database")
        previous = row.sha256
        found.append(entry)
    return found, previous


def _hash(body: str) -> Sha256:
    return hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()


def user() -> str:
    """Who runs this process."""
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
