"""Errors of `flows` itself; errors of `model`, `registry` and `ota` pass through unchanged.

FlowError
├── WorkspaceError   the folder is not a workspace, or its ferry.toml or an argument is wrong
├── BusyError        another process holds a part of the workspace
├── BudgetError      no update can keep the budget that was asked for
├── VariantError     some variants could not be retrained; the others were
├── GivenUpError     a retraining that was asked for failed in all of its attempts
├── ServerError      Prefect's server does not start or answer
└── DemoError        a step of `ferry demo` failed (in `flows.demo`)
"""

from __future__ import annotations

from typing import Any


class FlowError(Exception):
    """Base of everything that `flows` raises on purpose."""


class WorkspaceError(FlowError):
    """The folder is not a workspace, or its settings or an argument are wrong."""


class BusyError(FlowError):
    """Another process holds a part of the workspace."""


class BudgetError(FlowError):
    """No update can keep the budget that was asked for."""


class VariantError(FlowError):
    """Some variants failed. `__cause__` is the first error; `rows` has the result of every variant."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


class GivenUpError(FlowError):
    """A retraining that data or an event asked for failed in all of its attempts."""


class ServerError(FlowError):
    """Prefect's server cannot be used."""
