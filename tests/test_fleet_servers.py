"""The fleet's tables on PostgreSQL: `make test-servers`."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text

from ota.errors import OperatorError
from ota.fleet import schema
from ota.fleet.archive import archive
from ota.fleet.register import Newcomer
from ota.fleet.store import Fleet, open_fleet
from tests.test_fleet_store import KEY, OTHER, _open, alive, arrived, enrolment, kept, public, report
from tests.test_servers import postgres  # noqa: F401 - a fixture

pytestmark = pytest.mark.servers


@pytest.fixture
def database(postgres: str) -> Iterator[str]:  # noqa: F811
    """Provide the URL of a database with the tables of version 0.2, a device and three reports."""
    server = create_engine(f"{postgres}/postgres", isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("drop database if exists fleet with (force)"))
        connection.execute(text("create database fleet"))
    engine = create_engine(f"{postgres}/fleet")
    with engine.begin() as connection:
        connection.execute(
            text(
                "create table fleet_devices (device varchar(40) primary key, public_key varchar(64) not null, enrolled bigint not null)"
            )
        )
        connection.execute(text(
            "create table fleet_reports (device varchar(40), number integer, received_at bigint not null, event varchar(20) not null, "
            "manifest varchar(64), body varchar(8192) not null, primary key (device, number))"
        ))  # fmt: skip
        connection.execute(text("insert into fleet_devices values ('dev-1', :key, 5)"), {"key": public(KEY)})
        for number in (1, 2, 3):
            old = report(number, schema_version=2, agent="0.2.0")
            connection.execute(
                text("insert into fleet_reports values ('dev-1', :number, 100, 'installed', :manifest, :body)"),
                {"number": number, "manifest": old.manifest, "body": old.canonical().decode()},
            )
    engine.dispose()
    yield f"{postgres}/fleet"
    server.dispose()


def test_tables_of_version_0_2_go_on(database):
    with open_fleet(database) as fleet:
        assert kept(fleet, alive(4), report(5, line="gaskets")) == ["", ""]  # enrolled without a line, as 0.2 did
        assert [checked.proof for checked in fleet.verified()] == ["unverifiable"] * 3 + ["verified"] * 2
        with fleet.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            changes = [one for one in compare_metadata(context, schema.metadata) if schema.VERSION_TABLE not in str(one)]
    # The body's column keeps its length of version 0.2: nothing is written to it any more.
    assert [str(change[0][0]) for change in changes if isinstance(change, list)] in ([], ["modify_type"])
    assert all(isinstance(change, list) for change in changes)


def test_two_processes_migrate_at_once(database):
    spawn = multiprocessing.get_context("spawn")
    begin, told = spawn.Barrier(2), spawn.Queue()
    both = [spawn.Process(target=_open, args=(database, begin, told)) for _ in range(2)]
    for one in both:
        one.start()
    assert [told.get(timeout=120) for _ in both] == [3, 3]
    for one in both:
        one.join()


def test_device_retired_while_its_report_is_kept_waits_for_its_turn(database):
    """Hold the device's row as an operator does who retires it: the report is decided on after that."""
    with open_fleet(database) as fleet, Fleet(database) as operator:
        found: list[str] = []
        with operator.engine.begin() as connection:
            connection.execute(text("update fleet_devices set retired = 1 where device = 'dev-1'"))
            gateway = threading.Thread(target=lambda: found.extend(verdict.code for verdict in fleet.keep([arrived(report(9))])))
            gateway.start()
            with create_engine(database).connect() as watching:  # until the gateway waits for the row
                waits = text("select count(*) from pg_locks where not granted")
                while not watching.execute(waits).scalar():
                    watching.rollback()
        gateway.join()
        assert found == ["retired"]
        assert len(fleet.reports()) == 3


def test_two_gateways_keep_the_same_reports_once(database):
    with open_fleet(database) as first, open_fleet(database) as second:
        first.preauthorize([Newcomer("dev-2", public(OTHER), "shapes", "edge", {})])
        batches = [[arrived(alive(n)) for n in range(4, 60)], [arrived(alive(n, device="dev-2"), OTHER) for n in range(1, 60)]]
        codes: list[str] = []

        def send(fleet: Fleet, order: int) -> None:
            for batch in batches[::order]:
                codes.extend(verdict.code for verdict in fleet.keep([*batch, *batches[0][:3]]))

        both = [threading.Thread(target=send, args=one) for one in ((first, 1), (second, -1))]
        for one in both:
            one.start()
        for one in both:
            one.join()
        assert codes == [""] * len(codes)
        assert len(first.reports("dev-1")) == 59
        assert len(first.reports("dev-2")) == 59
        assert [state.conflicts for state in first.states()] == [0, 0]


def test_enrolment_archive_and_query_work(database, tmp_path):
    with open_fleet(database) as fleet:
        token = fleet.invite("dev-2", "shapes", "edge", 600)
        assert not fleet.redeem(enrolment(token, OTHER)).confirmed
        fleet.confirm("dev-2")
        assert archive(fleet, tmp_path, int(time.time())).reports == 2
        assert kept(fleet, report(2, schema_version=2, agent="0.2.0")) == ["conflict"]
        assert [one.number for one in fleet.reports()] == [3]


def test_server_that_does_not_sync_is_refused(database):
    with create_engine(database, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("alter database fleet set synchronous_commit = off"))
    Fleet(database).close()  # a command decides nothing for a gateway
    with pytest.raises(OperatorError, match="synchronous_commit = off"):
        open_fleet(database)
