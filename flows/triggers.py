"""Triggers of a retraining besides the schedule: a new data revision, or an event that somebody left. Each makes one run.

The idempotency key of a run is a hash of what it would be made from (data, code, settings) and of the event's name, if there is
an event. Prefect makes one run for a key, however often it is asked. So nothing changes if ferry looks again, is killed in
between, or looks from two machines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from flows import telling
from flows.errors import WorkspaceError
from flows.workspace import Workspace
from model import versions
from model.config import canonical_sha256
from model.errors import RevisionError
from model.scorecard import DataVersion, Frozen

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

EVENTS = "events"  # folder of a workspace in which events wait


class Event(Frozen):
    """A request for a retraining, made because of a drift in the field or by hand."""

    name: str = Field(min_length=1, max_length=200, description="the same name is the same event")
    line: str
    reason: str = Field(min_length=1, max_length=500)
    when: str


def leave(workspace: Workspace, line: str, name: str, reason: str) -> Path:
    """Leave an event for `ferry serve`, which may be down just now; the same name again changes nothing.

    Raises:
        WorkspaceError: there is no such line, or name or reason are empty or too long.
    """
    workspace.line(line)
    try:
        event = Event(name=name, line=line, reason=reason, when=datetime.now(UTC).isoformat(timespec="seconds"))
    except ValidationError as error:
        raise WorkspaceError("an event has a name of 1 to 200 characters and a reason of 1 to 500; write it again") from error
    path = workspace.root / EVENTS / f"{canonical_sha256([line, name])[:32]}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        fresh = path.with_suffix(f".{threading.get_ident()}.tmp")
        fresh.write_text(event.model_dump_json())
        fresh.replace(path)
    return path


def waiting(workspace: Workspace) -> Iterator[tuple[Path, Event]]:
    """Yield the events that wait; name a file that is not an event on stderr, and leave it where it is."""
    for path in sorted((workspace.root / EVENTS).glob("*.json")):
        try:
            yield path, Event.model_validate_json(path.read_bytes())
        except ValidationError:
            telling.tell(f"{path} is not an event; remove it")


def deployment_name(workspace: Workspace, line: str) -> str:
    """Return the name of Prefect's deployment that retrains a line of this workspace."""
    return f"{workspace.root.name}-{line}"


def key_of(workspace: Workspace, data: DataVersion, event: str = "") -> str:
    """Compute the idempotency key: a hash of the data, code and settings of a line, and of the event's name."""
    from model.train import code_sha256  # loads torch, which is not needed to leave an event

    return canonical_sha256([data.line, data.md5, code_sha256(), workspace.line(data.line).model_dump(mode="json"), event])


def fire(workspace: Workspace, data: DataVersion, why: str, event: str = "") -> FlowRun:
    """Ask Prefect for a retraining, and record the reason in the ledger; both happen once for each key.

    Raises:
        StoreError: the ledger cannot be written.
    """
    from prefect.client.orchestration import get_client

    key = key_of(workspace, data, event)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"retrain/{deployment_name(workspace, data.line)}")
        run = client.create_flow_run_from_deployment(
            deployment.id,
            name=f"retrain {data.line} on data {data.rev[:12]}",
            parameters={"rev": data.rev},
            idempotency_key=key,
            tags=[why[:100]],
        )
    with workspace.locked("records"):
        if not any(e.kind == "trigger" and e.facts.get("key") == key for e in workspace.ledger.entries(data.line)):
            workspace.ledger.append("trigger", data.line, why, {"key": key, "data": data.rev, "event": event, "run": str(run.id)})
    return run


def look(workspace: Workspace, lines: list[str], fired: set[str] | None = None) -> list[FlowRun]:
    """Ask for the retrainings of new data revisions and of events that wait; looking twice makes no second run.

    Args:
        workspace: workspace of the lines.
        lines: lines whose data and events are looked at.
        fired: keys of data for which this process asked before; they are left out, and new ones are added.

    Returns:
        the runs, including those that were made before.
    """
    runs = []
    known = set[str]() if fired is None else fired
    for line in lines:
        try:
            data = versions.resolve(workspace.root, workspace.line(line).data, line)
        except RevisionError:  # none was recorded yet
            continue
        if (key := key_of(workspace, data)) not in known:
            runs.append(fire(workspace, data, f"data revision {data.rev[:12]}"))
            known.add(key)
        for path, event in waiting(workspace):
            if event.line == line:
                runs.append(fire(workspace, data, event.reason, event.name))
                path.unlink(missing_ok=True)
    return runs


def keep_looking(workspace: Workspace, lines: list[str], every: float, stop: threading.Event) -> None:
    """Look every `every` seconds until `stop` is set; an error is printed once, and looking goes on."""
    said, fired = "", set[str]()
    while not stop.wait(every):
        try:
            look(workspace, lines, fired)
            said = ""
        except Exception as error:  # noqa: BLE001 - a store that is down comes back; the schedule goes on meanwhile
            if str(error) != said:
                telling.tell(f"cannot look for new data just now: {error}")
            said = str(error)


def take_up(workspace: Workspace, lines: list[str]) -> int:
    """Let Prefect start those runs again that an earlier `ferry serve`, which was killed, left unfinished; return their number.

    Call it only while no other process serves this workspace: then no process executes the runs that Prefect calls running.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import Scheduled

    names = [deployment_name(workspace, line) for line in lines]
    begun = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        left = client.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=names)),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))),
            sort=FlowRunSort.ID_DESC, limit=200,  # the client's own defaults are null, which the server refuses
        )  # fmt: skip
        for run in left:
            client.set_flow_run_state(run.id, Scheduled(message="begun again: its ferry serve was killed"), force=True)
    return len(left)
