"""Signed reports verbatim, the last state of each device, keys with their time, invitations and tokens.

Devices and reports of version 0.2 stay: the devices count as confirmed, and their reports have no signature that could be verified again.
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ROWS = 1000  # of devices that are carried over at once


def upgrade() -> None:
    """Add the columns and tables, and fill the last state from the reports."""
    with op.batch_alter_table("fleet_devices") as table:
        table.add_column(sa.Column("line", sa.String(40)))
        table.add_column(sa.Column("device_class", sa.String(40)))
        table.add_column(sa.Column("confirmed", sa.BigInteger))
        table.add_column(sa.Column("retired", sa.BigInteger))
        table.add_column(sa.Column("tags", sa.Text, nullable=False, server_default="{}"))
    with op.batch_alter_table("fleet_reports") as table:
        table.alter_column("body", existing_type=sa.String(16384), nullable=True)
        table.add_column(sa.Column("envelope", sa.Text))
    op.create_index("fleet_reports_received", "fleet_reports", ["received_at"])
    op.create_index("fleet_reports_manifest", "fleet_reports", ["manifest"])
    _tables()
    op.execute("update fleet_devices set confirmed = enrolled")
    op.execute(
        "insert into fleet_keys (device, number, public_key, since) select device, 1, public_key, enrolled from fleet_devices"
    )
    op.execute("insert into fleet_changes (id, number) values (1, 1)")
    _last_states()


def _tables() -> None:
    op.create_table(
        "fleet_keys", sa.Column("device", sa.String(40), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("public_key", sa.String(64), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger),
    )  # fmt: skip
    op.create_table(
        "fleet_last", sa.Column("device", sa.String(40), primary_key=True),
        sa.Column("number", sa.Integer),
        sa.Column("report", sa.Text),
        sa.Column("received_at", sa.BigInteger),
        sa.Column("heard_at", sa.BigInteger),
        sa.Column("heartbeat_at", sa.BigInteger),
        sa.Column("heartbeat", sa.Integer),
        sa.Column("line", sa.String(40)),
        sa.Column("device_class", sa.String(40)),
        sa.Column("active", sa.String(64)),
        sa.Column("agent", sa.String(40)),
        sa.Column("event", sa.String(20)),
        sa.Column("event_number", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("tags", sa.Text),
        sa.Column("skew", sa.BigInteger),
        sa.Column("conflicts", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("conflict_at", sa.BigInteger),
        sa.Column("refused", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("refused_at", sa.BigInteger),
        sa.Column("refused_why", sa.String(20)),
    )  # fmt: skip
    op.create_table(
        "fleet_archived", sa.Column("device", sa.String(40), primary_key=True),
        sa.Column("first", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("last", sa.Integer, nullable=False),
    )  # fmt: skip
    op.create_table(
        "fleet_invites",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(40), nullable=False),
        sa.Column("line", sa.String(40), nullable=False),
        sa.Column("device_class", sa.String(40), nullable=False),
        sa.Column("replaces", sa.Integer, nullable=False),
        sa.Column("made", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
        sa.Column("used", sa.BigInteger),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("refused_at", sa.BigInteger),
        sa.Column("refused_why", sa.Text),
    )
    op.create_table(
        "fleet_tokens",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("made", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "fleet_changes",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, nullable=False),
    )


def _last_states() -> None:
    """Fill the last state of each device from its report with the highest number."""
    connection = op.get_bind()
    query = sa.text(
        "select d.device, r.number, r.received_at, r.body from fleet_devices d left join "
        "(select device, max(number) as number from fleet_reports group by device) m on m.device = d.device "
        "left join fleet_reports r on r.device = m.device and r.number = m.number order by d.device"
    )
    names = ("device", "number", "report", "received_at", "heard_at", "line", "device_class", "active", "agent", "event",
             "event_number", "reason")  # fmt: skip
    filled = sa.text(f"insert into fleet_last ({', '.join(names)}) values ({', '.join(f':{name}' for name in names)})")  # noqa: S608
    rows = connection.execute(query).all()
    for first in range(0, len(rows), ROWS):
        connection.execute(filled, [_state(*row) for row in rows[first : first + ROWS]])


def _state(device: str, number: int | None, at: int | None, body: str | None) -> dict[str, object]:
    try:
        told = json.loads(body) if body else {}
    except ValueError:
        told = None
    fields = told if isinstance(told, dict) else {}  # what somebody changed is shown as damaged by whoever reads it
    strings: dict[str, object] = {name: value if isinstance(value := fields.get(name), str) else None for name in
               ("line", "device_class", "active", "agent", "event", "reason")}  # fmt: skip
    return {
        "device": device,
        "number": number,
        "report": body,
        "received_at": at,
        "heard_at": at,
        "event_number": number,
    } | strings
