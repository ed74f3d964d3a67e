"""Shell completion: commands from the program, lines, classes and models from ferry.toml."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.cli import completion
from flows.setup import create
from flows.workspace import Workspace

SETTINGS = """\
schema = 1
[lines.gaskets]
data = "data/gaskets"
[lines.gaskets.classes.edge]
variants = ["fast"]
[lines.gaskets.classes.bench]
configuration = "II"
[lines.seals]
data = "data/seals"
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return create(tmp_path_factory.mktemp("factory") / "ws", [], SETTINGS)


def complete(folder: Path, *words: str) -> list[str]:
    """Ask as bash does, in a folder; the last word is the one to complete."""
    asked = {"_FERRY_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["ferry", *words]), "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli"], cwd=folder, env={**os.environ, **asked, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("rol",), ["rollback", "rollout"]),
        (("retrain", ""), ["gaskets", "seals"]),
        (("data", "add", "g"), ["gaskets"]),
        (("rollout", "halt", "gaskets/"), ["gaskets/edge", "gaskets/bench"]),
        (("release", "s"), ["seals/edge"]),
        (("promote", "gaskets/II"), ["gaskets/II/full"]),
        (("serve", "gaskets", "s"), ["seals"]),
        (("retrain", "nosuch"), []),
    ],
)
def test_completes(workspace: Workspace, words: tuple[str, ...], expected: list[str]):
    assert complete(workspace.root, *words) == expected


def test_completes_for_the_workspace_that_is_named(workspace: Workspace, tmp_path: Path):
    assert complete(tmp_path, "-w", str(workspace.root), "retrain", "") == ["gaskets", "seals"]


@pytest.mark.parametrize(
    "text", [None, "not TOML", "lines = 3", 'lines = ["a"]', "[lines.a]\nclasses = 3", '[lines."a b\\u001b"]']
)
def test_file_that_cannot_be_read_completes_nothing(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "ferry.toml").write_text(text)
    assert complete(tmp_path, "release", "") == []


def test_completed_are_exactly_the_models_of_the_workspace(workspace: Workspace):
    settings = tomllib.loads((workspace.root / "ferry.toml").read_text())
    assert sorted(completion.subjects(settings)) == sorted(map(str, workspace.subjects()))
