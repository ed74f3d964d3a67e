"""`ferry release` in a real workspace: what devices would refuse is not signed, what is allowed is recorded, and nothing is said twice.

The tests of this file build on each other and run in order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from flows.setup import create
from flows.workspace import Workspace
from model import versions
from model.train import Checkpoint
from registry.champions import promote
from tests.conftest import write_images
from tests.test_fleet import KEY, public, signed
from tests.test_fleet import report as device_report
from tests.test_flows import SETTINGS, SUBJECT
from tests.test_foretell import negative

__all__ = ["negative"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    from flows.retrain import retrain

    made = create(tmp_path_factory.mktemp("foretold") / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes", 120)
    versions.add(made.root, "data/shapes", "shapes", "first")
    assert retrain(str(made.root), "shapes")[0]["promoted"]
    yield made
    made.ledger.close()
    made.fleet.close()


def ferry(workspace: Workspace, *words: str) -> Result:
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), *words])


def signed_state(workspace: Workspace) -> tuple[str, bytes]:
    return workspace.ledger.head(), (workspace.root / "repository/metadata/timestamp.json").read_bytes()


def entries(workspace: Workspace) -> list[Any]:
    return [entry for entry in workspace.ledger.entries("shapes/edge") if entry.kind == "release"]


def test_first_release_has_nobody_to_ask(workspace: Workspace):
    result = ferry(workspace, "release", "shapes")
    assert result.exit_code == 0, result.output
    assert "shapes/edge release 1" in result.stdout
    assert "anew" not in result.stdout


def test_unchanged_champion_says_that_no_device_installs_it_anew(workspace: Workspace):
    assert ferry(workspace, "rollout", "start", "shapes", "--waves", "100").exit_code == 0
    before = signed_state(workspace)
    result = ferry(workspace, "release", "shapes")
    assert result.exit_code == 0, result.output
    assert "the same champions as before, so a device that runs it does not install it anew" in result.stdout
    assert signed_state(workspace) == before


def test_change_that_devices_refuse_is_not_signed(workspace: Workspace, negative: Checkpoint):
    from flows.retrain import register_checkpoint

    first = workspace.repository.releases("shapes", "edge")[0]
    workspace.fleet.enroll("press-01", public(KEY))
    workspace.fleet.receive(
        signed(
            device_report(line="shapes", device_class="edge", manifest=first.manifest, active=first.manifest, device="press-01")
        )
    )
    place = workspace.work / "runs" / "negative"
    shutil.copytree(negative.folder, place)
    lineage = json.loads((place / "lineage.json").read_text())
    lineage["data"] = versions.resolve(workspace.root, "data/shapes", "shapes", "HEAD").model_dump()
    (place / "lineage.json").write_text(json.dumps(lineage))
    assert register_checkpoint(str(workspace.root), str(place))["version"] == 2
    promote(workspace, SUBJECT, 2, "the lamps are changed", overrule=True)
    before = signed_state(workspace)
    result = ferry(workspace, "release", "shapes")
    assert (result.exit_code, result.stdout) == (5, "")
    assert "devices that run release 1 (press-01) would refuse full: the images' mean brightness is" in result.stderr
    assert "`ferry release shapes/edge --allow-change --reason ...`" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert signed_state(workspace) == before


@pytest.mark.parametrize("words", [("--allow-change",), ("--reason", "why"), ("--allow-change", "--reason", " ")])
def test_allowance_needs_a_reason_and_a_reason_an_allowance(words: tuple[str, ...], workspace: Workspace):
    before = signed_state(workspace)
    result = ferry(workspace, "release", "shapes", *words)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "--allow-change and --reason together" in result.stderr
    assert signed_state(workspace) == before


def test_allowed_change_is_signed_recorded_and_told(workspace: Workspace):
    result = ferry(workspace, "release", "shapes", "--allow-change", "--reason", "the lamps\nare \x1b[31mchanged")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "full may differ from release 1: mean brightness" in result.stdout
    assert "devices with an older ferry-agent keep the bundle that they run" in result.stdout
    made = workspace.repository.releases("shapes", "edge")[-1]
    entry = entries(workspace)[-1]
    assert entry.facts["allowed"]["full"]["bases"] == [workspace.repository.releases("shapes", "edge")[0].manifest]
    assert "with a change that devices would refuse: the lamps" in entry.why
    manifest = workspace.repository.manifest(made)
    assert (manifest.schema_version, manifest.minimum_agent) == (
        2,
        "0.1.0",
    )  # press-01 does not name its agent, so it is an old one


def test_releasing_it_again_keeps_what_was_allowed(workspace: Workspace):
    before = signed_state(workspace)
    result = ferry(workspace, "release", "shapes")
    assert result.exit_code == 0, result.output
    assert "anew" in result.stdout
    assert "full may differ from release 1" in result.stdout
    assert signed_state(workspace) == before
    assert ferry(workspace, "rollout", "start", "shapes", "--waves", "100").exit_code == 0
    assert "full may differ from release 1" in ferry(workspace, "rollout", "status", "shapes").stdout


def test_going_back_is_recorded_and_signs_a_new_head(workspace: Workspace):
    promote(workspace, SUBJECT, 1, "the old lamps are back")
    head, count = workspace.ledger.head(), len(entries(workspace))
    result = ferry(workspace, "release", "shapes")
    assert result.exit_code == 0, result.output
    assert "shapes/edge release 1" in result.stdout
    assert "anew" not in result.stdout
    assert [e.why for e in entries(workspace)][count:] == ["version 1 published again"]
    assert workspace.repository.releases("shapes", "edge")[0].ledger == head
    assert ferry(workspace, "history", "--verify").exit_code == 0


def test_sealing_an_older_version_is_not_misled_by_an_allowance(workspace: Workspace):
    from flows.policies import released

    weights = {
        r.version: workspace.repository.manifest(r).entry("weights", "full").sha256
        for r in workspace.repository.releases("shapes", "edge")
    }
    assert "bundle/reference.json" in [row.file for row in released(workspace, SUBJECT, weights[1])]
    assert "bundle/reference.json" not in [row.file for row in released(workspace, SUBJECT, weights[2])]
