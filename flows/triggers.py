"""What makes a retraining besides a schedule: a new data revision, or an event that somebody left. One event makes one run.

A run's idempotency key is what it would be made from (data, code, settings) and, for an event, its name. Prefect makes one run for a
key however often it is asked, so looking again, being killed in between, or two machines looking change nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

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
    """Something that asks for a retraining: a drift seen in the field, or a person's wish."""

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
    """Events that were left and not yet taken up; what is none is named on stderr and left where it is."""
    for path in sorted((workspace.root / EVENTS).glob("*.json")):
        try:
            yield path, Event.model_validate_json(path.read_bytes())
        except ValidationError:
            sys.stderr.write(f"ferry: {path} is not an event; remove it\n")


def deployment_name(workspace: Workspace, line: str) -> str:
    """What Prefect calls the retraining of a line of this workspace."""
    return f"{workspace.root.name}-{line}"


def key_of(workspace: Workspace, data: DataVersion, event: str = "") -> str:
    """The idempotency key: data, code and settings of a line, and the event's name."""
    from model.train import code_sha256  # loads torch, which leaving an event does without

    return canonical_sha256([data.line, data.md5, code_sha256(), workspace.line(data.line).model_dump(mode="json"), event])


def fire(workspace: Workspace, data: DataVersion, why: str, event: str = "") -> FlowRun:
    """Ask Prefect for the retraining that an event makes, and record why, both once.

    Raises:
        StoreError: the ledger cannot be written.
    """
    from prefect.client.orchestration import get_client

    key = key_of(workspace, data, event)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"retrain/{deployment_name(workspace, data.line)}")
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters={"rev": data.rev}, idempotency_key=key, tags=[why[:100]]
        )
    with workspace.locked("records"):
        if not any(e.kind == "trigger" and e.facts.get("key") == key for e in workspace.ledger.entries(data.line)):
            workspace.ledger.append("trigger", data.line, why, {"key": key, "data": data.rev, "event": event, "run": str(run.id)})
    return run


def look(workspace: Workspace, lines: list[str], fired: set[str] | None = None) -> list[FlowRun]:
    """Fire what has happened: new data revisions, and events that wait. Looking twice makes no second run.

    Args:
        workspace: whose.
        lines: whose data and events.
        fired: keys of data that this process fired before; they are left out, and new ones added.

    Returns:
        the runs, also those that were there already.
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
    """Look again and again; what fails is said once and tried again."""
    said, fired = "", set[str]()
    while not stop.wait(every):
        try:
            look(workspace, lines, fired)
            said = ""
        except Exception as error:  # noqa: BLE001 - a store that is down comes back; the schedule goes on meanwhile
            if str(error) != said:
                sys.stderr.write(f"ferry: cannot look for new data just now: {error}\n")
            said = str(error)


def take_up(workspace: Workspace, lines: list[str]) -> int:
    """Let Prefect begin again what ran when an earlier `ferry serve` was killed; returns how many runs.

    To be called while no other one serves this workspace: whatever is called running then has nobody who runs it.
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
