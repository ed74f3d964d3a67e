"""Triggers of a retraining besides the schedule: a new data revision, or an event that somebody left. Each makes one run.

The idempotency key of a run is a hash of what it would be made from (data, code, settings) and of the event's name, if there is
an event. Prefect makes one run for a key, however often it is asked. So nothing changes if ferry looks again, is killed in
between, or looks from two machines.

An event asks for another model of perhaps the same data, so its run has a seed of its own. A run that failed is tried again,
with a key of its own for each attempt. An event waits until its run is done; if all attempts failed, it is kept in
`events/failed`, and the same `ferry trigger` asks anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from flows import alerts, lost, telling
from flows.errors import GivenUpError, WorkspaceError
from flows.overrides import seed_of
from flows.workspace import Workspace
from model import versions
from model.config import canonical_sha256
from model.errors import RevisionError
from model.scorecard import DataVersion, Frozen
from registry.promotion import subject_state

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

    from registry.ledger import Entry

EVENTS = "events"  # folder of a workspace in which events wait
FAILED = "failed"  # folder in it for events of which all attempts failed
ATTEMPTS = 4
PAUSES = (0.0, 60.0, 600.0, 7200.0)  # seconds before each attempt: a store restarts in moments, another retraining takes hours
Outcome = Literal["waits", "done", "failed"]


class Event(Frozen):
    """A request for a retraining, made because of a drift in the field or by hand."""

    name: str = Field(min_length=1, max_length=200, description="the same name is the same event")
    line: str
    reason: str = Field(min_length=1, max_length=500)
    when: str
    round: int = Field(default=0, ge=0, description="how often all attempts failed before somebody left it again")


@dataclass(frozen=True)
class Asked:
    """A request for a retraining: the key of its first attempt, the reason, what the ledger records, and the seed."""

    base: str
    why: str
    facts: dict[str, Any]
    seed: int | None = None

    def key(self, attempt: int) -> str:
        """Return the idempotency key of an attempt; the first is 1."""
        return self.base if attempt == 1 else canonical_sha256([self.base, "attempt", attempt])


def leave(workspace: Workspace, line: str, name: str, reason: str) -> Path:
    """Leave an event for `ferry serve`, which may be down just now; the same name again changes nothing.

    If all attempts of an event of this name failed, it asks for new ones.

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
        failed = path.parent / FAILED / path.name
        if failed.is_file():
            event = event.model_copy(update={"round": _round_of(failed) + 1})
        fresh = path.with_suffix(f".{threading.get_ident()}.tmp")
        fresh.write_text(event.model_dump_json(exclude_defaults=True))
        fresh.replace(path)
        failed.unlink(missing_ok=True)
    return path


def _round_of(path: Path) -> int:
    try:
        return Event.model_validate_json(path.read_bytes()).round
    except ValidationError:  # somebody changed it
        return 0


def keep(path: Path) -> None:
    """Keep an event of which all attempts failed, where nobody looks for events that wait."""
    place = path.parent / FAILED
    place.mkdir(exist_ok=True)
    path.replace(place / path.name)


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


def pursue(
    workspace: Workspace, data: DataVersion, asked: Asked, entries: list[Entry], client: SyncPrefectClient
) -> tuple[FlowRun, Outcome]:
    """Ask Prefect for a retraining, and ask again if it failed, at most `ATTEMPTS` times; record each attempt in the ledger.

    Args:
        workspace: workspace of the line.
        data: revision to retrain on.
        asked: what asks for it.
        entries: the ledger's entries on triggers of the line.
        client: of Prefect.

    Returns:
        the latest run, and what became of the request.

    Raises:
        StoreError: the ledger cannot be written.
    """
    name = f"retrain/{deployment_name(workspace, data.line)}"
    deployment = client.read_deployment_by_name(name)
    for attempt in range(1, ATTEMPTS + 1):
        run, known = _attempt(client, deployment.id, data, asked, attempt), {e.facts.get("key") for e in entries}
        if (key := asked.key(attempt)) not in known:
            again = f"attempt {attempt} of {ATTEMPTS}: " if attempt > 1 else ""
            _record(workspace, data, again + asked.why, asked.facts | {"key": key, "data": data.rev, "run": str(run.id)})
        found = _outcome(run)
        if found != "failed" or run.run_count >= lost.STARTS:  # a run that ended its process so often would do so again
            return run, found
    return run, "failed"


def _attempt(client: SyncPrefectClient, deployment: UUID, data: DataVersion, asked: Asked, attempt: int) -> FlowRun:
    from prefect.states import Scheduled

    due: State[Any] = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(seconds=PAUSES[attempt - 1]))
    parameters: dict[str, Any] = {"rev": data.rev} | ({} if asked.seed is None else {"seed": asked.seed})
    return client.create_flow_run_from_deployment(
        deployment, name=f"retrain {data.line} on data {data.rev[:12]}", parameters=parameters, idempotency_key=asked.key(attempt),
        tags=[asked.why[:100]], state=due,
    )  # fmt: skip


def _record(workspace: Workspace, data: DataVersion, why: str, facts: dict[str, Any]) -> None:
    """Record an attempt once, although two machines may ask at the same moment."""
    with workspace.locked("records"):
        if not any(e.kind == "trigger" and e.facts.get("key") == facts["key"] for e in workspace.ledger.entries(data.line)):
            workspace.ledger.append("trigger", data.line, why, facts)


def _outcome(run: FlowRun) -> Outcome:
    """Say what became of a run. If a person cancelled it, the request is done: nobody asks again."""
    kind = run.state.type.value if run.state else ""
    if kind in ("COMPLETED", "CANCELLED"):
        return "done"
    return "failed" if kind in ("FAILED", "CRASHED") else "waits"


def look(workspace: Workspace, lines: list[str], settled: dict[str, str] | None = None) -> list[FlowRun]:
    """Ask for the retrainings of new data revisions and of events that wait; looking twice makes no second run.

    Args:
        workspace: workspace of the lines.
        lines: lines whose data and events are looked at.
        settled: by line, the key of the data for which this process need not ask again; it is filled.

    Returns:
        the runs, including those that were made before.

    Raises:
        GivenUpError: a retraining failed for the last time; everything else was asked for. Looking again says it no more.
    """
    from prefect.client.orchestration import get_client

    runs: list[FlowRun] = []
    given_up: list[str] = []
    known = {} if settled is None else settled
    with get_client(sync_client=True) as client:
        for line in lines:
            lost.take_up_lost(workspace, line, deployment_name(workspace, line), client)
            try:
                data = versions.resolve(workspace.root, workspace.line(line).data, line)
            except RevisionError:  # none was recorded yet
                continue
            events = [(path, event) for path, event in waiting(workspace) if event.line == line]
            base = data_key(workspace, data)
            if known.get(line) == base and not events:
                continue
            entries = [e for e in workspace.ledger.entries(line) if e.kind == "trigger"]
            if known.get(line) != base:
                asked = Asked(_visit(base, entries), f"data revision {data.rev[:12]}", {"base": base, "event": ""})
                run, found = pursue(workspace, data, asked, entries, client)
                runs.append(run)
                if found == "failed" and not _is_given_up(entries, asked):
                    given_up.append(_give_up(workspace, data, asked, run))
                if found != "waits":
                    known[line] = base
            for path, event in events:
                asked = _asked_by(workspace, data, event, entries)
                run, found = pursue(workspace, data, asked, entries, client)
                runs.append(run)
                if found == "failed":
                    given_up.append(_give_up(workspace, data, asked, run))
                    keep(path)
                elif found == "done":
                    path.unlink(missing_ok=True)
    if given_up:
        raise GivenUpError("; ".join(given_up))
    return runs


def data_key(workspace: Workspace, data: DataVersion) -> str:
    """Compute what stands for a line's present data: the revision, its content, code and settings.

    If a champion was made from other data that are not in the history any more, they count, too: somebody went back in Git.
    """
    strays = sorted(
        seal.data_rev
        for subject in workspace.subjects([data.line])
        if (state := subject_state(workspace.ledger.entries(str(subject)))).version
        and (seal := state.seals.get(state.version))
        and seal.data_md5 != data.md5
        and not versions.is_in_history(workspace.root, seal.data_rev)
    )
    return canonical_sha256([key_of(workspace, data), data.rev, *dict.fromkeys(strays)])


def _visit(base: str, entries: list[Entry]) -> str:
    """Compute the key of a data run: if other data came in between, coming back to the same data is a new request."""
    visits, last = 0, ""
    for entry in entries:
        found = entry.facts.get("base")
        if found and not entry.facts.get("event"):
            visits += found == base and last != base
            last = found
    number = visits if last != base else visits - 1
    return canonical_sha256([base, number]) if number > 0 else base


def _asked_by(workspace: Workspace, data: DataVersion, event: Event, entries: list[Entry]) -> Asked:
    """Make the request of an event: its first attempt fixes the key, so that later data do not make a second run of it."""
    facts = {"event": event.name, "round": event.round}
    before = [e for e in entries if e.facts.get("event") == event.name and e.facts.get("round", 0) == event.round]
    again = canonical_sha256([event.name, event.round]) if event.round else event.name
    base = str(before[0].facts.get("base") or before[0].facts["key"]) if before else key_of(workspace, data, again)
    seed = seed_of(event.line, event.name, event.round)
    return Asked(base, event.reason, facts | {"base": base, "seed": seed}, seed)


def _is_given_up(entries: list[Entry], asked: Asked) -> bool:
    return any(e.facts.get("given_up") == asked.base for e in entries)


def _give_up(workspace: Workspace, data: DataVersion, asked: Asked, run: FlowRun) -> str:
    """Record that a retraining failed for the last time, and return a sentence about it."""
    said = run.state.message if run.state and run.state.message else "without a message"
    why = f"given up after {ATTEMPTS} attempts: {asked.why}"
    _record(workspace, data, why, {"key": f"given up {asked.base}", "given_up": asked.base, "event": asked.facts["event"]})
    what = f"the event {asked.facts['event']!r}" if asked.facts["event"] else asked.why
    text = (
        f"the retraining of {data.line} for {what} failed {ATTEMPTS} times, the last time: {said}; correct the cause, then run "
        f"`ferry {'trigger' if asked.facts['event'] else 'retrain'} {data.line}`"
    )
    alerts.tell(workspace, f"retraining {data.line}", "given up", text)
    return text


def keep_looking(workspace: Workspace, lines: list[str], every: float, stop: threading.Event) -> None:
    """Look every `every` seconds until `stop` is set; an error is printed once, and looking goes on."""
    said, settled = "", dict[str, str]()
    while not stop.wait(every):
        try:
            look(workspace, lines, settled)
            said = ""
        except GivenUpError as error:
            telling.tell(str(error))
        except Exception as error:  # noqa: BLE001 - a store that is down comes back; the schedule goes on meanwhile
            if str(error) != said:
                telling.tell(f"cannot look for new data just now: {error}")
            said = str(error)


def take_up(workspace: Workspace, lines: list[str]) -> int:
    """Let Prefect start those runs again that an earlier `ferry serve`, which was killed, left unfinished; return their number.

    Call it only while no other process serves this workspace: then no process executes the runs that Prefect calls running.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    with get_client(sync_client=True) as client:
        left = lost.begun(client, [deployment_name(workspace, line) for line in lines])
        for run in left:
            client.set_flow_run_state(run.id, Scheduled(message="begun again: its ferry serve was killed"), force=True)
    return len(left)
