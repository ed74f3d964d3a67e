"""Overrides for one run: another seed, other steps, an estimate, and one retraining for each data revision; with real trainings.

The tests of this file build on each other and run in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from flows.setup import create
from flows.workspace import Workspace
from model import versions
from model.scorecard import Lineage
from registry.catalog import Subject
from registry.champions import sealed
from tests.conftest import write_images
from tests.test_flows import SETTINGS

SUBJECT = Subject(line="shapes", configuration="I", variant="full")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    made = create(tmp_path_factory.mktemp("overrides") / "ws", [], SETTINGS.replace("steps = 500", "steps = 50"))
    write_images(made.root / "data/shapes", 60)
    versions.add(made.root, "data/shapes", "shapes", "first")
    yield made
    made.ledger.close()
    made.fleet.close()


def ferry(workspace: Workspace, *words: str) -> Result:
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), "retrain", "shapes", *words, "--json"])


def retrained(workspace: Workspace, *words: str) -> list[dict[str, Any]]:
    told = ferry(workspace, *words)
    assert told.exit_code in (0, 5), told.output
    rows: list[dict[str, Any]] = json.loads(told.stdout)["models"]
    return rows


def lineage(workspace: Workspace, number: int) -> Lineage:
    seal = sealed(workspace, SUBJECT, number)
    return Lineage.model_validate_json(workspace.catalog.data(seal, "checkpoint/lineage.json"))


def test_estimate_trains_nothing(workspace: Workspace):
    made = json.loads(ferry(workspace, "--dry-run", "--steps", "30").stdout)
    (row,) = made["models"]
    assert (row["action"], row["steps"]) == ("trained from noise", 30)
    assert "measured on 3 steps" in row["basis"]
    assert made["seconds"] > 0
    assert made["data_bytes"] == versions.resolve(workspace.root, "data/shapes", "shapes").bytes
    assert made["disk_bytes"] > row["bundle_bytes"] > 100_000
    assert not (workspace.work / "runs").exists()
    assert workspace.catalog.versions(SUBJECT) == []
    assert workspace.ledger.entries() == []


def test_overridden_model_is_what_was_wanted_and_is_recorded(workspace: Workspace):
    (row,) = retrained(workspace, "--steps", "30")
    assert row["outcome"] in ("promote", "promote if reasoned")
    assert (lineage(workspace, 1).steps, lineage(workspace, 1).seed) == (30, 0)
    first = workspace.ledger.entries("shapes")[0]
    assert (first.kind, first.why, first.facts["steps"]) == ("trigger", "retrained by hand with steps 30", 30)
    if row["outcome"] != "promote":
        CliRunner().invoke(app, ["-w", str(workspace.root), "promote", str(SUBJECT), "1", "--reason", "for the test"])
    (again,) = retrained(workspace)  # as a schedule does: it does not train the wanted model again with the steps of ferry.toml
    assert (again["outcome"], again["version"]) == ("unchanged", 1)
    assert len(workspace.ledger.entries("shapes")) == 1


def test_another_seed_makes_another_model_of_the_same_data(workspace: Workspace):
    made = json.loads(ferry(workspace, "--dry-run", "--seed", "7").stdout)["models"]
    assert [(row["action"], row["steps"], row["basis"]) for row in made] == [
        ("trained from the champion", 50, "as its champion took")
    ]
    (row,) = retrained(workspace, "--seed", "7")
    assert row["version"] == 2
    assert (lineage(workspace, 2).seed, lineage(workspace, 2).steps) == (7, 50)
    assert lineage(workspace, 2).data == lineage(workspace, 1).data
    assert [row["outcome"] for row in retrained(workspace)] == ["unchanged"]
    assert json.loads(ferry(workspace, "--dry-run").stdout)["models"][0]["action"] == "unchanged, nothing to train"


def test_each_revision_is_retrained_in_order(workspace: Workspace):
    start = versions.resolve(workspace.root, "data/shapes", "shapes").rev
    made = []
    for seed in (5, 6):
        write_images(workspace.root / "data/shapes", 30 + seed, seed=seed, dim=True)
        made.append(versions.add(workspace.root, "data/shapes", "shapes", f"delivery {seed}").rev)
    planned = json.loads(ferry(workspace, "--dry-run", "--data", f"{start}..").stdout)["models"]
    assert [row["data_rev"] for row in planned] == made
    rows = retrained(workspace, "--data", f"{start}..{made[1]}")
    assert [row["data_rev"] for row in rows] == made
    assert [lineage(workspace, row["version"]).data.rev for row in rows] == made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "-1"], "--seed cannot be -1; write a number from 0"),
        (["--steps", "0"], "--steps cannot be 0; write a number from 1"),
        (["--data", "HEAD..HEAD"], "did not change between"),
        (["--data", "HEAD..HEAD~1"], "does not come after 'HEAD'; write the older one first"),
        (["--data", "..HEAD"], "write A..B"),
        (["--data", "HEAD~1...HEAD"], "write A..B"),
        (["--data", "HEAD~1..HEAD..HEAD"], "write A..B"),
        (["--data", "nosuch..HEAD"], "there is no data revision 'nosuch'"),
        (["--data", "HEAD~1..", "--dry-run", "--steps", "99999999"], "--steps cannot be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_happens(workspace: Workspace, words: list[str], said: str):
    before = len(workspace.ledger.entries())
    told = ferry(workspace, *words)
    assert told.exit_code == 3
    assert said in told.output
    assert len(workspace.ledger.entries()) == before


def test_failure_at_one_revision_says_how_to_go_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from flows import overrides
    from flows.errors import VariantError
    from flows.overrides import Overrides
    from model.errors import TrainingError

    def run(rev: str) -> list[dict[str, Any]]:
        if rev == "b" * 40:
            raise TrainingError("the run diverged")
        return [{"data_rev": rev}]

    with pytest.raises(
        VariantError, match=r"bbbbbbbbbbbb \(2 of 3\) failed: the run diverged; go on with --data aaaaaaaaaaaa\.\.c{12}"
    ) as raised:
        overrides.each(workspace, "shapes", ["a" * 40, "b" * 40, "c" * 40], Overrides(), run)
    assert raised.value.rows == [{"data_rev": "a" * 40}]
    assert isinstance(raised.value.__cause__, TrainingError)
