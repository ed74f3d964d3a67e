"""A whole retraining, then the same in a workspace that was moved, restored without its caches, and cloned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.setup import create
from tests.conftest import write_images
from tests.test_clone import secrets_in, tracked
from tests.test_flows import SETTINGS

pytestmark = pytest.mark.slow


def ferry(root: Path, *words: str, code: int = 0) -> Any:
    """Run the command in a process of its own; return its answer, or what it says if it refuses."""
    command = [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(root), *words, "--json"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")
    }  # of this process's workspace
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    judged = words[0] == "retrain" and done.returncode == 5  # the gate promoted nothing; the model is trained and registered
    assert done.returncode == code or judged, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def test_moved_restored_and_cloned_workspace_goes_on(tmp_path: Path):
    first = tmp_path / "first"
    made = create(first, [], SETTINGS.replace("steps = 500", "steps = 60"))
    made.ledger.close()
    made.fleet.close()
    write_images(first / "data/shapes", 120)
    ferry(first, "data", "add", "shapes")
    assert [row["promoted"] for row in ferry(first, "retrain", "shapes")["models"]] == [True]
    ferry(first, "release", "shapes")
    told = secrets_in(first)
    assert told
    for name, data in tracked(first).items():
        assert not [path for path, secret in told.items() if secret in data], name

    moved = tmp_path / "moved"
    first.rename(moved)
    figures = ferry(moved, "evaluate", "shapes/I/full")
    assert [row["outcome"] for row in ferry(moved, "retrain", "shapes")["models"]] == ["unchanged"]
    assert ferry(moved, "release", "shapes")["release"] == 1

    restored = tmp_path / "restored"
    shutil.copytree(moved, restored, ignore=shutil.ignore_patterns("work", "cache"))
    shutil.rmtree(moved / "mlartifacts")  # nothing may come from there any more
    assert ferry(restored, "evaluate", "shapes/I/full") == figures
    write_images(restored / "data/shapes", 60, seed=3, dim=True)
    ferry(restored, "data", "add", "shapes")
    assert [row["version"] for row in ferry(restored, "retrain", "shapes", "--no-promote")["models"]] == [2]
    assert ferry(restored, "doctor")["fit"]

    subprocess.run(["git", "clone", "--quiet", str(restored), str(tmp_path / "clone")], check=True)
    clone = tmp_path / "clone"
    ferry(clone, "data", "pull", "shapes")
    assert [row["version"] for row in ferry(clone, "retrain", "shapes")["models"]] == [1]
    assert ferry(clone, "evaluate", "shapes/I/full", "1")["version"] == 1
    said = ferry(clone, "release", "shapes", code=3)
    assert all(what in said for what in ("keys/", "repository/", "ferry.db", "mlflow.db"))
