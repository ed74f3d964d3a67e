"""What can go wrong in `flows` itself; errors of `model`, `registry` and `ota` pass through as they are.

FlowError
├── WorkspaceError   not a workspace, or its ferry.toml does not say what it must
├── BusyError        another ferry is at work in it
└── ServerError      Prefect's server does not start or answer
"""


class FlowError(Exception):
    """Base of everything that `flows` raises on purpose."""


class WorkspaceError(FlowError):
    """The folder is not a workspace, or its settings are wrong."""


class BusyError(FlowError):
    """Another process holds the workspace."""


class ServerError(FlowError):
    """Prefect's server cannot be used."""
