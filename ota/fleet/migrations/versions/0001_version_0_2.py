"""The tables of version 0.2, where they are not there yet: that version made them without a version table."""

from __future__ import annotations

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, String, inspect

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the two tables of version 0.2."""
    there = inspect(op.get_bind()).get_table_names()
    if "fleet_devices" not in there:
        op.create_table(
            "fleet_devices",
            Column("device", String(40), primary_key=True),
            Column("public_key", String(64), nullable=False),
            Column("enrolled", BigInteger, nullable=False),
        )
    if "fleet_reports" not in there:
        op.create_table(
            "fleet_reports",
            Column("device", String(40), primary_key=True),
            Column("number", Integer, primary_key=True),
            Column("received_at", BigInteger, nullable=False),
            Column("event", String(20), nullable=False),
            Column("manifest", String(64)),
            Column("body", String(16384), nullable=False),
        )
