"""The fleet's tables, and how a database gets them: of none, of version 0.2, or of any version between.

The migrations in `migrations/versions` make the tables; the tables below are what the newest of them leaves, and a test compares the two.
Their version is in a table of its own, because the ledger and others may share the database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import DataError, IntegrityError, OperationalError, SQLAlchemyError

from ota.errors import OperatorError, TransferError

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext
    from alembic.script.base import Script

NEWEST: Final = "0002"
"""Version of the tables below."""
VERSION_TABLE: Final = "fleet_version"
WAIT = 60.0  # seconds that a process waits for another one that writes
LOCK = 0x64666C65  # of PostgreSQL, "dfle": held while the tables are migrated
NEWER = "a newer ferry made the fleet's tables (version {version}); install that ferry, or restore the database from before it"

metadata = MetaData()
devices = Table(
    "fleet_devices", metadata,
    Column("device", String(40), primary_key=True),
    Column("public_key", String(64), nullable=False),
    Column("enrolled", BigInteger, nullable=False),
    Column("line", String(40)),  # null: enrolled without one, so that any is accepted
    Column("device_class", String(40)),
    Column("confirmed", BigInteger),  # when an operator said that it counts; null: nobody did
    Column("retired", BigInteger),  # null: it is in use
    Column("tags", Text, nullable=False, server_default="{}"),  # JSON: those that an operator gave
)  # fmt: skip
keys = Table(
    "fleet_keys", metadata,
    Column("device", String(40), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("public_key", String(64), nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("until", BigInteger),  # null: the present one
)  # fmt: skip
reports = Table(
    "fleet_reports", metadata,
    Column("device", String(40), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("received_at", BigInteger, nullable=False),
    Column("event", String(20), nullable=False),
    Column("manifest", String(64)),
    Column("body", String(16384)),  # of a report that version 0.2 kept: without its signature, so nobody can verify it again
    Column("envelope", Text),  # the line as it was received, signature included
    Index("fleet_reports_received", "received_at"),
    Index("fleet_reports_manifest", "manifest"),
)  # fmt: skip
last = Table(
    "fleet_last", metadata,
    Column("device", String(40), primary_key=True),
    Column("number", Integer),  # highest of all that were ever kept; null: none
    Column("report", Text),  # the report with that number
    Column("received_at", BigInteger),  # when it came
    Column("heard_at", BigInteger),  # when anything came that is kept or was kept before
    Column("heartbeat_at", BigInteger),  # when the last heartbeat came
    Column("heartbeat", Integer),  # and its number
    Column("line", String(40)),
    Column("device_class", String(40)),
    Column("active", String(64)),
    Column("agent", String(40)),
    Column("event", String(20)),  # of the last report that is no heartbeat
    Column("event_number", Integer),
    Column("reason", Text),
    Column("tags", Text),  # JSON: those that the last heartbeat named
    Column("skew", BigInteger),  # seconds by which its clock is ahead
    Column("conflicts", BigInteger, nullable=False, server_default="0"),
    Column("conflict_at", BigInteger),
    Column("refused", BigInteger, nullable=False, server_default="0"),
    Column("refused_at", BigInteger),
    Column("refused_why", String(20)),
)  # fmt: skip
archived = Table(  # numbers of reports that are in the archive and no longer in the table
    "fleet_archived", metadata,
    Column("device", String(40), primary_key=True),
    Column("first", Integer, primary_key=True, autoincrement=False),
    Column("last", Integer, nullable=False),
)  # fmt: skip
invites = Table(
    "fleet_invites", metadata,
    Column("sha256", String(64), primary_key=True),
    Column("device", String(40), nullable=False),
    Column("line", String(40), nullable=False),
    Column("device_class", String(40), nullable=False),
    Column("replaces", Integer, nullable=False),  # 1: the device gets another key
    Column("made", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("used", BigInteger),
    Column("attempts", Integer, nullable=False, server_default="0"),  # wrong ones
    Column("refused_at", BigInteger),
    Column("refused_why", Text),
)  # fmt: skip
tokens = Table(
    "fleet_tokens", metadata,
    Column("name", String(40), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("role", String(20), nullable=False),
    Column("made", BigInteger, nullable=False),
    Column("expires", BigInteger, nullable=False),
)  # fmt: skip
changes = Table(  # one row, whose number rises with each change of the devices or tokens
    "fleet_changes", metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
)  # fmt: skip


def connect(database: str, writer: bool, many: bool) -> Engine:
    """Open a database, and bring the fleet's tables to this version.

    Args:
        database: SQLAlchemy's URL.
        writer: whether the caller writes; otherwise nothing is changed.
        many: whether many processes or a busy one write: SQLite then keeps a log beside the file, so that readers and the writer do
            not wait for each other.

    Raises:
        TransferError: the database cannot be opened or written.
        OperatorError: a newer ferry made the tables, or they must be migrated and the caller does not write.
    """
    with foreign_errors():
        engine = create_engine(database, **({"connect_args": {"timeout": WAIT}} if database.startswith("sqlite") else {}))
        if engine.dialect.name == "sqlite":
            _own_transactions(engine)
        try:
            _check(engine, writer)
            if writer and many:
                _make_durable(engine)
        except BaseException:
            engine.dispose()
            raise
    return engine


def _own_transactions(engine: Engine) -> None:
    """Let a transaction of SQLite begin where ours does, and hold the file from its beginning if it writes.

    Python's driver begins one at the first change, after the reads on which the change rests.
    """

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that writes; on SQLite no other one writes at the same time."""
    with foreign_errors(), engine.connect() as plain:
        connection = plain.execution_options(writes=True)
        with connection.begin():
            yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that reads."""
    with foreign_errors(), engine.connect() as connection, connection.begin():
        yield connection


def version(connection: Connection) -> str | None:
    """Return the version of the fleet's tables; None: there are none, or version 0.2 made them."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"select version_num from {VERSION_TABLE}")).scalar()  # noqa: S608
    return found


def _check(engine: Engine, writer: bool) -> None:
    """Check the version of the tables, and migrate those that are older."""
    with reading(engine) as connection:
        found = version(connection)
    if found == NEWEST:
        return
    if found is not None and found not in _versions():
        raise OperatorError(NEWER.format(version=found))
    if not writer:
        raise OperatorError(
            "the fleet's tables are missing or of an older version; run `ferry fleet status` once as a user who may write to the database"
        )
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        found = version(connection)  # again, now that no other process migrates
        if found is not None and found not in _versions():
            raise OperatorError(NEWER.format(version=found))
        if found != NEWEST:
            _migrate(connection)


def _versions() -> list[str]:
    return sorted(path.name.partition("_")[0] for path in (_HERE / "versions").glob("[0-9]*.py"))


_HERE = Path(__file__).parent / "migrations"


def _migrate(connection: Connection) -> None:
    """Run the missing migrations in the connection's transaction: all of them or none."""
    from alembic.config import Config  # when it is needed: it takes a tenth of a second
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(_HERE))

    def steps(revision: str, _context: MigrationContext) -> list[Script]:
        return script._upgrade_revs(NEWEST, revision)  # type: ignore[return-value]  # noqa: SLF001 - as `alembic.command.upgrade` does

    with EnvironmentContext(Config(), script, fn=steps, destination_rev=NEWEST) as environment:
        environment.configure(connection=connection, version_table=VERSION_TABLE)
        environment.run_migrations()


def _make_durable(engine: Engine) -> None:
    """See to it that what is committed stays, and that readers do not hold up the writer.

    Raises:
        OperatorError: the server answers before a commit is on its disk.
    """
    with foreign_errors(), engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            with suppress(OperationalError):  # another process reads at this moment; the mode stays as it is
                raw = connection.connection.driver_connection
                if raw is not None:
                    raw.execute("PRAGMA journal_mode=WAL")
        elif engine.dialect.name == "postgresql" and connection.execute(text("show synchronous_commit")).scalar() == "off":
            raise OperatorError(
                "PostgreSQL has synchronous_commit = off, so a report could be lost after it was acknowledged; set it to on, such as with "
                "`alter database NAME set synchronous_commit = on`"
            )


@contextmanager
def foreign_errors() -> Iterator[None]:
    """Turn errors of the database and of what is in it into ours.

    Raises:
        TransferError: the database cannot be used, is full or cannot be written.
        OperatorError: it holds what ferry did not write.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise TransferError(
            f"the database's driver {error.name} is not installed; `pip install 'deltaferry[postgres]'`"
        ) from error
    except SQLAlchemyError as error:
        said = (str(error).splitlines() or ["no reason given"])[0]
        if isinstance(error, DataError | IntegrityError):  # of what is written, and not of the database: others may succeed
            raise OperatorError(
                f"the fleet's tables do not take this: {said}; repeat it, and if it stays so, check who else writes to the database"
            ) from error
        if "readonly database" in said or "read-only transaction" in said or "permission denied" in said:
            raise TransferError(
                f"the database cannot be written: {said}; run ferry as the user who owns it, or let this user write to it"
            ) from error
        if "database is locked" in said:
            raise TransferError(f"another process held the database for {WAIT:g} s; wait until it ends, then repeat") from error
        if "disk is full" in said or "No space left" in said or "could not extend" in said:
            raise TransferError(f"the database's disk is full: {said}; make room, then repeat") from error
        raise TransferError(f"the database cannot be used: {said}; check its URL in ferry.toml") from error
    except ValidationError as error:
        raise OperatorError("the fleet's tables hold a report of another version; migrate the database") from error
    except (ValueError, TypeError) as error:
        raise OperatorError(
            "the fleet's tables hold data that ferry did not write; check who may write to the database, and restore it"
        ) from error
