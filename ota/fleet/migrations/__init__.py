"""Migrations of the fleet's tables, which Alembic runs one after the other."""
