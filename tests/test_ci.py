"""The workflow runs what .ci/run runs: neither can forget a check, a variable or a tool of the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = (ROOT / ".ci" / "run").read_text()
TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
CALL = re.compile(r"((?:[A-Z_]+=\S+ )*make [a-z-]+)\s*$")


def jobs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = WORKFLOW["jobs"]["check"]["strategy"]["matrix"]["include"]
    return found


def calls_of(script: str) -> list[str]:
    """List what a script runs with make, with the variables before it."""
    lines = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
    return [match[1] for line in lines if (match := CALL.search(line))]


def packages_of(text: str) -> set[str]:
    """Return what a script installs with apt-get."""
    (found,) = re.findall(r"apt-get install ((?:-\S+ )*)([a-z0-9 ]+)", text)
    return set(found[1].split())


def test_every_step_is_a_job_on_the_oldest_python():
    steps = calls_of(SCRIPT)
    assert len(steps) == len(set(steps)) > 7
    assert sorted(steps) == sorted(job["run"] for job in jobs() if job["python"] == "3.11")


def test_quick_suite_runs_on_every_python_that_is_promised():
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert len(promised) >= 3
    runs = {(job["python"], job["run"]) for job in jobs()}
    for python in promised:
        assert {(python, "make test"), (python, "make test-offline")} & runs, python


def test_both_install_the_same_tools():
    assert packages_of(SCRIPT) == packages_of(TEXT) | {"chromium"}  # GitHub's machines have it


@pytest.mark.parametrize("call", [*calls_of(SCRIPT), *(job["run"] for job in jobs())])
def test_call_names_a_target_and_variables_that_something_reads(call):
    *variables, make, target = call.split()
    assert make == "make"
    assert re.search(rf"^\.PHONY: {target}$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    read = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    for variable in variables:
        assert f'"{variable.partition("=")[0]}"' in read, variable


def test_step_left_out_is_noticed():
    assert calls_of('step "a";   make lint\n# `make test` is like it\nstep "b"; CHAOS_SECONDS=9 make chaos\n') == [
        "make lint",
        "CHAOS_SECONDS=9 make chaos",
    ]


def test_workflow_may_only_read_and_ends_by_itself():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert list(WORKFLOW["jobs"]) == ["check"]
    check = WORKFLOW["jobs"]["check"]
    assert "permissions" not in check
    assert "needs" not in check
    assert check["timeout-minutes"] == "${{ matrix.minutes }}"
    assert all(10 <= job["minutes"] <= 60 for job in jobs())
    assert len({job["name"] for job in jobs()}) == len(jobs())
    (checkout,) = [step for step in check["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"] == {"persist-credentials": False}
    assert "secrets." not in TEXT


def test_actions_are_pinned_to_commits():
    used = re.findall(r"uses: (\S+)(.*)", TEXT)
    assert len(used) == 4
    for action, comment in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r"  # v\d+\.\d+\.\d+", comment)
