"""What becomes of a retraining that data or an event asked for: tried again, given up, found dead; Prefect is played by a dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from filelock import FileLock
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Completed, Crashed, Failed, Pending, Running, Scheduled

from flows import lost, overrides, triggers
from flows.errors import GivenUpError
from flows.overrides import Overrides
from flows.setup import create
from flows.workspace import Workspace
from model import git, versions
from tests.conftest import write_images


class Prefect:
    """Prefect's API, as far as triggers use it."""

    def __init__(self) -> None:
        self.runs: dict[str, FlowRun] = {}
        self.asked: dict[str, dict[str, Any]] = {}

    def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        assert name == "retrain/ws-shapes"
        return SimpleNamespace(id=uuid4())

    def create_flow_run_from_deployment(self, _: UUID, *, idempotency_key: str, state: State[Any], **given: Any) -> FlowRun:
        if idempotency_key not in self.runs:
            self.runs[idempotency_key] = FlowRun(flow_id=uuid4(), state=state)
            self.asked[idempotency_key] = given["parameters"] | {"due": state.state_details.scheduled_time}
        return self.runs[idempotency_key]

    def read_flow_runs(self, **_: Any) -> list[FlowRun]:
        begun = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
        return [run for run in self.runs.values() if run.state and run.state.type in begun]

    def set_flow_run_state(self, run: UUID, state: State[Any], force: bool) -> None:
        assert force
        self.end(next(key for key, made in self.runs.items() if made.id == run), state)

    def end(self, key: str, state: State[Any], starts: int = 1) -> None:
        self.runs[key] = self.runs[key].model_copy(update={"state": state, "run_count": max(starts, self.runs[key].run_count)})

    @property
    def last(self) -> str:
        return [*self.runs][-1]


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Prefect:
    from prefect.client import orchestration

    played = Prefect()

    @contextmanager
    def client(**_: Any) -> Iterator[Prefect]:
        yield played

    monkeypatch.setattr(orchestration, "get_client", client)
    return played


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = create(tmp_path / "ws", ["shapes"])
    write_images(made.root / "data/shapes", 4)
    versions.add(made.root, "data/shapes", "shapes", "first")
    yield made
    made.ledger.close()
    made.fleet.close()


def entries(workspace: Workspace) -> list[tuple[str, str]]:
    return [(e.kind, e.why) for e in workspace.ledger.entries("shapes")]


def deliver(workspace: Workspace, seed: int) -> str:
    write_images(workspace.root / "data/shapes", 3, seed=seed, dim=True)
    return versions.add(workspace.root, "data/shapes", "shapes", f"delivery {seed}").rev


def test_event_asks_for_another_seed_and_waits_until_its_run_is_done(workspace: Workspace, prefect: Prefect):
    triggers.look(workspace, ["shapes"])
    prefect.end(prefect.last, Completed())
    path = triggers.leave(workspace, "shapes", "ticket 4711", "dull parts in the field")
    for _ in range(2):
        triggers.look(workspace, ["shapes"])
    data, event = prefect.asked.values()
    assert "seed" not in data
    assert event["seed"] == overrides.seed_of("shapes", "ticket 4711")
    assert event["seed"] not in (0, overrides.seed_of("shapes", "ticket 4712"), overrides.seed_of("digits", "ticket 4711"))
    recorded = overrides.recorded(workspace.ledger.entries("shapes"))
    assert recorded == [Overrides(seed=event["seed"])]
    assert path.is_file()  # its run waits
    prefect.end(prefect.last, Completed())
    triggers.look(workspace, ["shapes"])
    assert not path.exists()
    triggers.leave(workspace, "shapes", "ticket 4711", "told again")
    deliver(workspace, 7)  # a new delivery does not make a second run of the event
    triggers.look(workspace, ["shapes"])
    assert not path.exists()
    assert len(prefect.runs) == 3


@pytest.mark.parametrize("end", [Failed(message="disk full"), Crashed(message="killed")])
def test_failed_run_of_an_event_is_tried_again_and_then_kept(workspace: Workspace, prefect: Prefect, end: State[Any]):
    triggers.look(workspace, ["shapes"])
    prefect.end(prefect.last, Completed())
    path = triggers.leave(workspace, "shapes", "ticket 4711", "dull parts")
    for attempt in range(1, triggers.ATTEMPTS + 1):
        triggers.look(workspace, ["shapes"])
        assert len(prefect.runs) == 1 + attempt
        assert path.is_file()
        prefect.end(prefect.last, end)
    with pytest.raises(GivenUpError, match=rf"the event 'ticket 4711' failed 4 times, the last time: {end.message}"):
        triggers.look(workspace, ["shapes"])
    assert triggers.look(workspace, ["shapes"])  # said once
    assert len(prefect.runs) == 5
    kept = path.parent / triggers.FAILED / path.name
    assert triggers.Event.model_validate_json(kept.read_bytes()).reason == "dull parts"
    assert [why for _, why in entries(workspace)[1:]] == [
        "dull parts", "attempt 2 of 4: dull parts", "attempt 3 of 4: dull parts", "attempt 4 of 4: dull parts",
        "given up after 4 attempts: dull parts",
    ]  # fmt: skip
    assert len({asked["seed"] for asked in [*prefect.asked.values()][1:]}) == 1
    dues = [asked["due"] for asked in [*prefect.asked.values()][1:]]
    assert dues == sorted(dues)
    assert dues[2] - dues[1] > timedelta(minutes=5)

    triggers.leave(workspace, "shapes", "ticket 4711", "the disk is larger")
    assert not kept.exists()
    triggers.look(workspace, ["shapes"])
    prefect.end(prefect.last, Completed())
    triggers.look(workspace, ["shapes"])
    assert len(prefect.runs) == 6
    assert not path.exists()


def test_failed_run_of_data_is_tried_again_and_given_up_once(workspace: Workspace, prefect: Prefect):
    for _ in range(triggers.ATTEMPTS):
        triggers.look(workspace, ["shapes"], {})
        prefect.end(prefect.last, Failed(message="caption too long"))
    with pytest.raises(GivenUpError, match=r"data revision .* failed 4 times.*caption too long.*`ferry retrain shapes`"):
        triggers.look(workspace, ["shapes"], {})
    triggers.look(workspace, ["shapes"], {})  # also a new process says it no more
    assert len(prefect.runs) == 4
    deliver(workspace, 8)
    triggers.look(workspace, ["shapes"], {})
    assert len(prefect.runs) == 5


def test_run_that_a_person_cancelled_is_not_tried_again(workspace: Workspace, prefect: Prefect):
    triggers.look(workspace, ["shapes"])
    prefect.end(prefect.last, State(type=StateType.CANCELLED))
    triggers.look(workspace, ["shapes"])
    assert len(prefect.runs) == 1


@pytest.mark.parametrize("how", ["revert", "reset"])
def test_reverted_delivery_makes_a_run(workspace: Workspace, prefect: Prefect, how: str):
    settled: dict[str, str] = {}

    def runs() -> int:
        triggers.look(workspace, ["shapes"], settled)
        prefect.end(prefect.last, Completed())
        triggers.look(workspace, ["shapes"], settled)
        triggers.look(workspace, ["shapes"], {})  # another process asks for nothing else
        return len(prefect.runs)

    assert runs() == 1
    later = deliver(workspace, 9)
    assert runs() == 2
    back = {
        "revert": ("-c", "user.name=x", "-c", "user.email=x@x", "revert", "--no-edit", later),
        "reset": ("reset", "--hard", f"{later}~1"),
    }
    git.run(workspace.root, *back[how])
    assert runs() == 3
    assert [*prefect.asked.values()][-1]["rev"] == versions.resolve(workspace.root, "data/shapes", "shapes").rev
    if how == "reset":
        git.run(workspace.root, "reset", "--hard", later)
        assert runs() == 4


def lately(state: State[Any], ago: timedelta) -> State[Any]:
    return state.model_copy(update={"timestamp": datetime.now(UTC) - ago})


@pytest.mark.parametrize("state", [Running(), Pending()])
def test_run_killed_with_its_worker_begins_again_and_then_crashes(workspace: Workspace, prefect: Prefect, state: State[Any]):
    triggers.look(workspace, ["shapes"])
    key = prefect.last
    prefect.end(key, lately(state, timedelta(seconds=30)))
    triggers.look(workspace, ["shapes"])
    assert prefect.runs[key].state.type == state.type  # it may just start
    prefect.end(key, lately(state, timedelta(hours=1)))
    triggers.look(workspace, ["shapes"])
    assert prefect.runs[key].state.type == StateType.SCHEDULED
    prefect.end(key, lately(state, timedelta(hours=1)), starts=lost.STARTS)
    with pytest.raises(GivenUpError, match="killed together with its worker, 3 times"):
        triggers.look(workspace, ["shapes"])
    assert prefect.runs[key].state.type == StateType.CRASHED
    assert [*prefect.runs] == [key]


def test_run_that_holds_the_lock_lives(workspace: Workspace, prefect: Prefect):
    triggers.look(workspace, ["shapes"])
    key = prefect.last
    prefect.end(key, lately(Running(), timedelta(days=3)))
    (workspace.work / lost.HOLDER).write_text(str(prefect.runs[key].id))
    with FileLock(workspace.work / "retraining.lock"):
        triggers.look(workspace, ["shapes"])
        assert prefect.runs[key].state.type == StateType.RUNNING
        (workspace.work / lost.HOLDER).write_text(str(uuid4()))  # another run works, so this one is dead
        triggers.look(workspace, ["shapes"])
    assert prefect.runs[key].state.type == StateType.SCHEDULED


def test_cancelled_run_whose_worker_is_gone_is_cancelled(workspace: Workspace, prefect: Prefect):
    triggers.look(workspace, ["shapes"])
    prefect.end(prefect.last, lately(State(type=StateType.CANCELLING), timedelta(hours=1)))
    triggers.look(workspace, ["shapes"])
    assert prefect.runs[prefect.last].state.type == StateType.CANCELLED


def test_event_that_an_older_ferry_recorded_makes_no_second_run(workspace: Workspace, prefect: Prefect):
    facts = {"key": "k", "data": "r", "event": "ticket 1", "run": "x"}
    workspace.ledger.append("trigger", "shapes", "dull", facts)
    prefect.runs["k"] = FlowRun(flow_id=uuid4(), state=Completed())
    path = triggers.leave(workspace, "shapes", "ticket 1", "dull")
    triggers.look(workspace, ["shapes"])
    assert not path.exists()
    assert len(prefect.runs) == 2  # this one, and that of the data


def test_scheduled_is_what_prefect_calls_waiting():
    assert triggers._outcome(FlowRun(flow_id=uuid4(), state=Scheduled())) == "waits"
