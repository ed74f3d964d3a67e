"""The ledger: an append-only record of decisions in the workspace's database.

Each entry is signed and names the hash of the entry before it. MLflow's aliases say which version is champion now, but not
which one was. The ledger says which one was, since when, who decided it and why. Where the two disagree, the ledger is right.

Other people may write to the database, too. So an entry counts only if a key of the workspace has signed its hash, and thereby
all entries before it: nobody who can merely write to the database can change or add an entry. Two things show that the last
entries are missing: a small file of the workspace notes the newest entry that it has seen, and releases contain the signed hash
of the last entry. Entries that an older ferry wrote without signatures are covered by the first signed entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError
from sqlalchemy import Column, Integer, MetaData, String, Table, Text, create_engine, func, insert, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from model.scorecard import Frozen, Sha256
from registry.errors import LedgerError, StoreError

START: Sha256 = "0" * 64
Kind = Literal["gate", "seal", "promotion", "pending", "refusal", "rating", "release", "rollout", "halt", "trigger", "measured"]
ATTEMPTS = 100  # to record an entry; each that fails means that another process was faster
LINES = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")

_metadata = MetaData()
_entries = Table(
    "ledger_entries", _metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("body", Text, nullable=False),
)  # fmt: skip
_signatures = Table(  # a separate table: the one above must stay as older ferries made it
    "ledger_signatures", _metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("keyid", String(64), nullable=False),
    Column("signature", Text, nullable=False),
)  # fmt: skip


class Signing(Protocol):
    """The keys of a workspace that sign ledger entries."""

    @property
    def since(self) -> int:
        """Number of the first entry that must be signed; an older ferry wrote those before it without signatures."""

    def sign(self, data: bytes) -> tuple[str, str]:
        """Sign with the present key; return the key's id and the signature in hex."""

    def holds(self, number: int, keyid: str, signature: str, data: bytes) -> bool:
        """Check whether the signature of the data is valid and by the key that was in use at this entry."""


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
    """The ledger in the database of a URL."""

    def __init__(self, database: str, signing: Signing, seen: Path) -> None:
        """Open the tables, and create those that are missing.

        Args:
            database: its URL.
            signing: keys of the workspace.
            seen: file that notes the newest entry that this workspace has seen. It is outside the database, whose owner could
                change it.

        Raises:
            StoreError: the database cannot be opened.
        """
        self._signing, self._seen = signing, seen
        self._checked = (0, START)  # number and hash of the newest entry whose signature was checked
        with _foreign_errors():
            self._engine = create_engine(database)
            _metadata.create_all(self._engine)

    @staticmethod
    def length(database: str) -> int:
        """Count the entries, whoever wrote them; a workspace that begins to sign starts after them.

        Raises:
            StoreError: the database cannot be opened.
        """
        with _foreign_errors():
            engine = create_engine(database)
            try:
                _metadata.create_all(engine)
                with engine.connect() as connection:
                    return int(connection.execute(select(func.count()).select_from(_entries)).scalar_one())
            finally:
                engine.dispose()

    def close(self) -> None:
        """Close the database connections."""
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

        The number is the table's primary key, and each entry names the hash of the one before it. If two processes record at
        the same moment, on one host or on several, the database accepts one of them. The other reads the new entries and tries
        again.

        Args:
            kind: of decision.
            subject: what it is about, such as surfaces/I/full.
            why: the reason given.
            facts: numbers and hashes; must be JSON.
            guard: is called with the subject's entries before the new one is written, and raises an error to forbid it. None:
                no check.
            who: who decided; None: the user of this process.

        Raises:
            LedgerError: an entry was changed, added outside ferry, or removed.
            StoreError: the database refuses, or other processes were faster at every attempt (nothing was recorded); or the
                newest entry cannot be noted in the workspace.
            Exception: what `Signing.sign` raises if the key cannot be used here (nothing was recorded).
        """
        why = LINES.sub(" ", why)  # a list of entries shows each on one line; a reason must not look like another entry
        tried = 0
        for _ in range(ATTEMPTS):
            with _foreign_errors():
                with self._engine.connect() as connection:
                    chain, last = self._read(connection)
                if guard:
                    guard([entry for entry in chain if entry.subject == subject])
                entry = Entry(
                    number=len(chain) + 1, previous=last, kind=kind, subject=subject, who=who or user(),
                    when=datetime.now(UTC).isoformat(timespec="seconds"), why=why, facts=facts,
                )  # fmt: skip
                body = json.dumps(entry.model_dump(mode="json"), sort_keys=True)
                digest = _hash(body)
                keyid, signature = self._signing.sign(_signed(digest))
                try:
                    with self._engine.begin() as connection:
                        connection.execute(insert(_entries).values(number=entry.number, sha256=digest, body=body))
                        connection.execute(insert(_signatures).values(number=entry.number, keyid=keyid, signature=signature))
                except IntegrityError as error:
                    if entry.number == tried:  # no other process recorded in between, so none is the reason
                        raise StoreError(
                            f"the database refuses entry {entry.number} of the ledger: {(str(error.orig).splitlines() or ['no reason given'])[0]}; look for a trigger, "
                            "or a row of another table that is in the way"
                        ) from error
                    tried = entry.number
                    continue
            self._note(entry.number, digest)
            return entry
        raise StoreError("other processes kept recording decisions at the same time; repeat your command")

    def check_ready(self) -> None:
        """Check that a decision could be recorded, before it takes effect.

        Raises:
            LedgerError: an entry was changed, added outside ferry, or removed.
            Exception: what `Signing.sign` raises if the key cannot be used here.
        """
        self.head()
        self._signing.sign(b"DeltaFerry ledger, a trial")

    def entries(self, subject: str | None = None) -> list[Entry]:
        """Return the entries of a subject, or of all, in order, after a check of the whole chain.

        Raises:
            LedgerError: an entry was changed, added outside ferry, or removed.
        """
        with _foreign_errors(), self._engine.connect() as connection:
            found, _ = self._read(connection)
        return [entry for entry in found if subject is None or entry.subject == subject]

    def hashes(self) -> list[Sha256]:
        """Return the hash of each entry in order, after a check of the chain.

        Raises:
            LedgerError: an entry was changed, added outside ferry, or removed.
        """
        with _foreign_errors(), self._engine.connect() as connection:
            found, last = self._read(connection)
        return [*(entry.previous for entry in found[1:]), last] if found else []

    def head(self) -> Sha256:
        """Return the hash of the last entry, after a check of the chain.

        Raises:
            LedgerError: an entry was changed, added outside ferry, or removed.
        """
        with _foreign_errors(), self._engine.connect() as connection:
            return self._read(connection)[1]

    @property
    def unsigned(self) -> int:
        """Number of entries at the beginning that have no signature of their own."""
        return self._signing.since - 1

    def _read(self, connection: Connection) -> tuple[list[Entry], Sha256]:
        """Read and check all entries; return them and the hash of the last one.

        Checks the chain, the signatures that were not checked before, and that the newest entry seen by this workspace is there.
        """
        joined = _entries.outerjoin(_signatures, _entries.c.number == _signatures.c.number)
        noted = self._noted()  # before the query: another process may add and note an entry in between
        query = select(_entries, _signatures.c.keyid, _signatures.c.signature).select_from(joined).order_by(_entries.c.number)
        try:
            rows = connection.execute(query).all()
        except OperationalError as error:
            if "decode" not in str(error):  # SQLite's message for text that is no longer UTF-8
                raise
            raise LedgerError("an entry of the ledger was changed after it was written; restore the database") from error
        found, previous = [], START
        hashes = [START]
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
            hashes.append(previous)
            found.append(entry)
        checked, known = self._checked
        first = max(self._signing.since, checked + 1 if hashes[checked : checked + 1] == [known] else 1)
        for row in rows[first - 1 :]:
            if not self._signing.holds(row.number, str(row.keyid), str(row.signature), _signed(row.sha256)):
                raise LedgerError(
                    f"entry {row.number} of the ledger is not signed by a key of this workspace: another program, a host "
                    "with other keys or an older version of ferry wrote it; restore the database, and give all hosts the "
                    "same keys/"
                )
        self._checked = (len(found), previous)
        self._check_seen(hashes, *noted)
        self._note(len(found), previous)
        return found, previous

    def _check_seen(self, hashes: list[Sha256], number: int, digest: Sha256) -> None:
        """Refuse a ledger in which the newest entry that this workspace has seen is missing or was replaced."""
        if number >= len(hashes):
            raise LedgerError(
                f"the ledger ends with entry {len(hashes) - 1}, but this workspace has seen entry {number}, so entries were "
                f"removed; restore the database, or remove {self._seen} if they are lost for good"
            )
        if hashes[number] != digest:
            raise LedgerError(
                f"entry {number} of the ledger differs from the one that this workspace has seen; restore the database"
            )

    def _noted(self) -> tuple[int, Sha256]:
        try:
            number, _, digest = self._seen.read_text().strip().partition(" ")
            return int(number), digest
        except FileNotFoundError:
            return 0, START
        except (OSError, ValueError) as error:
            raise LedgerError(
                f"{self._seen} records what this workspace has seen of the ledger, and cannot be read; restore it from a backup"
            ) from error

    def _note(self, number: int, digest: Sha256) -> None:
        """Note the newest entry that this workspace has seen, durably.

        After a kill the note may name an earlier entry. Then fewer missing entries are noticed, but no complete ledger is
        refused.
        """
        if number <= self._noted()[0]:
            return
        fresh = self._seen.with_name(f".{self._seen.name}.{secrets.token_hex(8)}.tmp")
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
                file.write(f"{number} {digest}\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._seen)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StoreError(f"{self._seen} cannot be written: {error.strerror}; make room, or run ferry as its owner") from error


def _signed(digest: Sha256) -> bytes:
    """Return the bytes to sign for an entry.

    They begin with words, so that the signature is not valid for anything else that a key of the workspace signs.
    """
    return f"DeltaFerry ledger entry {digest}".encode()


def _hash(body: str) -> Sha256:
    return hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()


def user() -> str:
    """Return the user who runs this process according to the operating system; anybody could set an environment variable."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # the user id has no name, as in many containers
        return f"user {os.getuid()}"


@contextmanager
def _foreign_errors() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise StoreError(f"the database's driver {error.name} is not installed; `pip install 'deltaferry[postgres]'`") from error
    except SQLAlchemyError as error:
        raise StoreError(f"the database cannot be used: {str(error).splitlines()[0]}; check its URL in ferry.toml") from error
