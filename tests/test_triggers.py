"""Events that ask for a retraining: left once, read by `ferry serve`, and one run for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import triggers
from flows.errors import WorkspaceError
from flows.setup import create
from flows.workspace import Workspace
from model.scorecard import DataVersion

DATA = DataVersion(line="shapes", path="data/shapes", rev="0" * 40, md5="1" * 32 + ".dir", files=9, bytes=99)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = create(tmp_path / "ws", ["shapes", "digits"])
    yield made
    made.ledger.close()
    made.fleet.close()


def left(workspace: Workspace) -> list[tuple[str, str, str]]:
    return sorted((event.line, event.name, event.reason) for _, event in triggers.waiting(workspace))


def test_event_is_left_once_whatever_its_reason(workspace: Workspace):
    first = triggers.leave(workspace, "shapes", "delivery 7", "new lamp")
    before = first.read_bytes()
    assert triggers.leave(workspace, "shapes", "delivery 7", "new lamp, told again") == first
    assert first.read_bytes() == before
    triggers.leave(workspace, "digits", "delivery 7", "of another line")
    triggers.leave(workspace, "shapes", "delivery 8", "new lamp")
    assert left(workspace) == [
        ("digits", "delivery 7", "of another line"), ("shapes", "delivery 7", "new lamp"), ("shapes", "delivery 8", "new lamp"),
    ]  # fmt: skip


def test_event_of_no_line_is_not_left(workspace: Workspace):
    with pytest.raises(WorkspaceError, match="nosuch"):
        triggers.leave(workspace, "nosuch", "delivery 7", "new lamp")
    assert not list((workspace.root / triggers.EVENTS).glob("*"))


@pytest.mark.parametrize(
    ("name", "reason"), [("", "new lamp"), ("delivery 7", ""), ("x" * 201, "new lamp"), ("delivery 7", "x" * 501)]
)
def test_event_without_a_name_or_reason_is_not_left(workspace: Workspace, name: str, reason: str):
    with pytest.raises(WorkspaceError, match="an event has a name of 1 to 200 characters and a reason of 1 to 500"):
        triggers.leave(workspace, "shapes", name, reason)
    assert not list((workspace.root / triggers.EVENTS).glob("*"))


def test_file_that_is_no_event_stops_no_other(workspace: Workspace, capfd: pytest.CaptureFixture[str]):
    path = triggers.leave(workspace, "shapes", "delivery 7", "new lamp")
    for name, content in (("0" * 32, b"{}"), ("f" * 32, b"\xff not JSON")):
        path.with_name(f"{name}.json").write_bytes(content)
    assert left(workspace) == [("shapes", "delivery 7", "new lamp")]
    assert capfd.readouterr().err.count("is not an event; remove it") == 2


def test_run_is_asked_for_once_for_the_same_data_and_event(workspace: Workspace):
    """Compare the keys of runs, because Prefect makes one run for each key."""
    key = triggers.key_of(workspace, DATA)
    assert triggers.key_of(Workspace(workspace.root), DATA.model_copy(update={"rev": "2" * 40, "files": 10})) == key
    settings = workspace.root / "ferry.toml"
    others = [
        triggers.key_of(workspace, DATA.model_copy(update={"md5": "2" * 32 + ".dir"})),
        triggers.key_of(workspace, DATA.model_copy(update={"line": "digits"})),
        triggers.key_of(workspace, DATA, "delivery 7"),
        triggers.key_of(workspace, DATA, "delivery 8"),
    ]
    settings.write_text(settings.read_text().replace("[lines.shapes]", "[lines.shapes]\nrequire_approval = true", 1))
    others.append(triggers.key_of(Workspace(workspace.root), DATA))
    assert len({key, *others}) == 6
