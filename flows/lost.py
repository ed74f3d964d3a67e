"""Find retrainings that Prefect calls running although nothing runs them, because they were killed together with their worker.

Prefect learns of the end of a run from the run itself or from its worker. If both are killed, the run would stay "Running" for
ever, and hold the deployment's only place. A retraining holds the lock of its workspace as long as it lives, and the operating
system frees the lock of a killed process. So the lock says which run is alive, on whatever machine its worker is.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flows import alerts
from flows.errors import BusyError
from flows.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

HOLDER = "retraining.run"  # file beside the lock: which of Prefect's runs holds it
GRACE = {"RUNNING": timedelta(minutes=2), "PENDING": timedelta(minutes=10), "CANCELLING": timedelta(minutes=2)}
"""How long a run may be in a state without holding the lock: it starts, or ends."""
STARTS = 3  # how often a run may be started
PATIENCE = 10.0  # seconds that a run waits for the lock, which `holder` takes for a moment


@contextmanager
def held(workspace: Workspace, run: str) -> Iterator[None]:
    """Hold the lock of the retraining, and say which run holds it.

    Raises:
        BusyError: another process holds it.
    """
    with workspace.locked("retraining", PATIENCE):
        (workspace.work / HOLDER).write_text(run)
        yield


def holder(workspace: Workspace) -> str:
    """Return the id of the run that holds the lock of the retraining; empty: nobody holds it."""
    try:
        with workspace.locked("retraining", 0):
            return ""
    except BusyError:
        with suppress(OSError):
            return (workspace.work / HOLDER).read_text().strip()
        return "unknown"


def runs_of(client: SyncPrefectClient, names: list[str], *states: str) -> list[FlowRun]:
    """List the runs of deployments of these names that are in one of Prefect's states, such as SCHEDULED."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=names)),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType(state) for state in states]))),
        sort=FlowRunSort.ID_DESC, limit=200,  # the client's own defaults are null, which the server refuses
    )  # fmt: skip


def begun(client: SyncPrefectClient, names: list[str]) -> list[FlowRun]:
    """List the runs of deployments of these names that Prefect calls begun and not ended."""
    return runs_of(client, names, *GRACE)


def take_up_lost(workspace: Workspace, line: str, deployment: str, client: SyncPrefectClient) -> list[FlowRun]:
    """Let Prefect start those runs of a line again that nothing runs any more; after `STARTS` starts, a run has crashed.

    A run that a person cancels is cancelled then.

    Args:
        workspace: workspace of the line.
        line: whose runs.
        deployment: name of Prefect's deployment that retrains the line.
        client: of Prefect.

    Returns:
        the runs.
    """
    suspects = [run for run in begun(client, [deployment]) if _is_over_due(run)]
    if not suspects:
        return []
    alive = holder(workspace)
    found = [run for run in suspects if alive not in (str(run.id), "unknown")]
    for run in found:
        _settle(workspace, line, client, run)
    return found


def _is_over_due(run: FlowRun) -> bool:
    if run.state is None or run.state.type.value not in GRACE:
        return False
    return datetime.now(UTC) - run.state.timestamp > GRACE[run.state.type.value]


def _settle(workspace: Workspace, line: str, client: SyncPrefectClient, run: FlowRun) -> None:
    from prefect.states import Cancelled, Crashed, Scheduled

    if run.state and run.state.type.value == "CANCELLING":
        client.set_flow_run_state(run.id, Cancelled(message="its process was gone already"), force=True)
    elif run.run_count < STARTS:
        client.set_flow_run_state(run.id, Scheduled(message="begun again: it was killed together with its worker"), force=True)
    else:
        text = f"it was killed together with its worker, {run.run_count} times"
        client.set_flow_run_state(run.id, Crashed(message=text), force=True)
        alerts.tell(workspace, f"retraining {line}", "failed", f"the retraining {run.name} of {line} crashed: {text}")
