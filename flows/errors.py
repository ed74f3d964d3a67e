"""What can go wrong in `flows` itself; errors of `model`, `registry` and `ota` pass through as they are.

FlowError
├── WorkspaceError   not a workspace, or its ferry.toml does not say what it must
├── BusyError        another ferry is at work in it
├── VariantError     some variants could not be retrained; the others were
└── ServerError      Prefect's server does not start or answer
"""

from __future__ import annotations

from typing import Any


class FlowError(Exception):
    """Base of everything that `flows` raises on purpose."""


class WorkspaceError(FlowError):
    """The folder is not a workspace, or its settings are wrong."""


class BusyError(FlowError):
    """Another process holds the workspace."""


class VariantError(FlowError):
    """Some variants failed, for the reason that is its cause; `rows` says what came of each."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


class ServerError(FlowError):
    """Prefect's server cannot be used."""
