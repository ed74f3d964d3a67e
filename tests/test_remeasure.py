"""`ferry remeasure`: new feature spaces for a line; its champion and best version are measured in them; nothing else changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from filelock import FileLock
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli import app
from flows.figures import remeasure
from flows.setup import create
from flows.workspace import Workspace
from model import features, versions
from model.data import prepare
from model.export import Export
from model.train import Checkpoint
from registry import columns
from registry.catalog import Subject
from registry.champions import promote, sealed
from registry.figures import figures
from registry.ledger import Ledger

from .conftest import CONFIG, few, write_images
from .test_measure import SETTINGS, register

SUBJECT = Subject(line="shapes", configuration="I", variant="full")
GATE = "\n[lines.shapes.gate]\nimages = 24\n"


@pytest.fixture
def workspace(checkpoint: Checkpoint, exported: Export, tmp_path: Path) -> Iterator[Workspace]:
    """Create a workspace as an older version left it: with a champion, and with only two feature spaces."""
    made = create(tmp_path / "ws", [], SETTINGS.replace("\n[lines.empty]", f"{GATE}\n[lines.empty]"))
    write_images(made.root / "data/shapes")
    versions.add(made.root, "data/shapes", "shapes", "first")
    register(made, checkpoint, exported, tmp_path / "first")
    promote(made, SUBJECT, 1, "first")
    whole = tmp_path / "whole.safetensors"
    features.fit(prepare(made.root / "data/shapes", CONFIG, tmp_path / "cache"), whole, seed=1)
    kept = {name: tensor for name, tensor in load_file(whole).items() if not name.startswith("scattering.")}
    made.feature_spaces("shapes").parent.mkdir(exist_ok=True)
    save_file(kept, made.feature_spaces("shapes"))
    yield made
    made.ledger.close()
    made.fleet.close()


def ferry(workspace: Workspace, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), "remeasure", *arguments])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measured(workspace: Workspace) -> list[dict[str, Any]]:
    return [entry.facts for entry in workspace.ledger.entries() if entry.kind == "measured"]


def test_line_of_an_older_ferry_gets_the_new_space_by_one_command(workspace: Workspace):
    before, card = digest(workspace.feature_spaces("shapes")), workspace.catalog.card(sealed(workspace, SUBJECT, 1))
    assert features.load(workspace.feature_spaces("shapes")).names == ("trained", "random")
    told = ferry(workspace, "shapes", "--reason", "the new ferry sees blur", "--json")
    assert told.exit_code == 0, told.output
    spaces = features.load(workspace.feature_spaces("shapes"))
    assert spaces.names == ("trained", "random", "scattering")
    made = json.loads(told.stdout)
    assert (made["spaces_sha256"], made["before"], made["versions"]) == (spaces.sha256, before, ["shapes/I/full 1"])
    assert digest(workspace.root / "features" / f"shapes.{before[:16]}.safetensors") == before  # past figures can be reproduced
    (facts,) = measured(workspace)
    assert (facts["version"], facts["spaces"], facts["before"]) == (1, spaces.sha256, before)
    assert [(q["space"], q["space_sha256"], q["n"]) for q in facts["quality"]] == [(s, spaces.sha256, 24) for s in spaces.names]
    assert workspace.catalog.card(sealed(workspace, SUBJECT, 1)) == card  # what the gate saw stays
    assert len(list((workspace.root / "features").iterdir())) == 2
    anew = figures(workspace, SUBJECT, 1)
    assert anew

    told = CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), "evaluate", "shapes/I/full"])
    rows = [line.split() for line in told.stdout.splitlines() if line.startswith("new")]
    assert [(row[1], row[3]) for row in rows] == [(q.space, f"{q.kd:.4f}") for q in anew.quality]
    assert "measured anew" in told.stdout
    config = workspace.line("shapes").config("I")
    champion = columns.Champion(SUBJECT, sealed(workspace, SUBJECT, 1), card, 1.0, b"", None, [], config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "samples", lambda *_: (b"", None, []))
        column = columns.column(workspace, champion, [champion], "first", None, None)
    assert column.distance.kd == {q.space: q.kd for q in anew.quality}

    entries = workspace.ledger.entries()
    told = ferry(workspace, "shapes", "--reason", "again")  # the spaces would be the same
    assert (told.exit_code, told.stdout) == (
        0,
        "shapes already measures in these trained, random, scattering features; nothing was changed\n",
    )
    assert digest(workspace.feature_spaces("shapes")) == spaces.sha256
    assert workspace.ledger.entries() == entries
    assert len(list((workspace.root / "features").iterdir())) == 2


@pytest.mark.parametrize("cut", few(["after the ledger", "before the ledger", "before the new spaces are in place"], 1))
def test_killed_call_is_rerun_and_records_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, cut: str):
    before, entries = digest(workspace.feature_spaces("shapes")), len(workspace.ledger.entries())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if cut == "before the ledger":
            patch.setattr(Ledger, "append", killed)
        elif cut == "after the ledger":
            patch.setattr(features, "put_in_place", killed)
        else:
            patch.setattr(
                Path, "replace", lambda path, to: killed() if to == workspace.feature_spaces("shapes") else path.rename(to)
            )
        with pytest.raises(KeyboardInterrupt):
            remeasure(workspace, "shapes", "for a test")
    assert digest(workspace.feature_spaces("shapes")) == before
    assert len(workspace.ledger.entries()) == entries + (cut != "before the ledger")
    assert figures(workspace, SUBJECT, 1) is None  # figures in spaces that are not in use are not shown
    made = remeasure(workspace, "shapes", "for a test")
    assert made.versions == ([] if cut != "before the ledger" else ["shapes/I/full 1"])
    assert digest(workspace.feature_spaces("shapes")) == made.spaces_sha256 != before
    assert made.text.startswith("shapes now measures in trained, random, scattering features")
    assert figures(workspace, SUBJECT, 1) is not None
    assert len(workspace.ledger.entries()) == entries + 1


def test_champion_that_was_never_measured_in_the_present_spaces_is_measured_by_the_same_command(
    workspace: Workspace, checkpoint: Checkpoint, exported: Export, tmp_path: Path
):
    remeasure(workspace, "shapes", "for a test")
    present, revision = digest(workspace.feature_spaces("shapes")), measured(workspace)[0]["data_rev"]
    write_images(workspace.root / "data/shapes", 90)
    versions.add(workspace.root, "data/shapes", "shapes", "second")
    register(workspace, checkpoint, exported, tmp_path / "second")
    promote(workspace, SUBJECT, 2, "second", overrule=True)
    made = remeasure(workspace, "shapes", "somebody went back to it", revision)
    assert made.versions == ["shapes/I/full 2"]  # the first is measured already
    assert [facts["version"] for facts in measured(workspace)] == [1, 2]
    assert digest(workspace.feature_spaces("shapes")) == present
    assert len(list((workspace.root / "features").iterdir())) == 2


def test_line_without_a_champion_gets_new_spaces_too(workspace: Workspace):
    before = digest(workspace.feature_spaces("shapes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("registry.figures.champion_of", lambda *_: None)
        made = remeasure(workspace, "shapes", "new captions")
    assert (made.versions, measured(workspace)) == ([], [])
    assert digest(workspace.feature_spaces("shapes")) == made.spaces_sha256 != before
    assert digest(workspace.former_feature_spaces("shapes")[0]) == before


def test_figures_from_former_spaces_are_marked(workspace: Workspace, checkpoint: Checkpoint, exported: Export, tmp_path: Path):
    def told(version: str) -> str:
        return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), "evaluate", "shapes/I/full", version]).stdout

    write_images(workspace.root / "data/shapes", 90)
    versions.add(workspace.root, "data/shapes", "shapes", "second")
    register(workspace, checkpoint, exported, tmp_path / "second")
    remeasure(workspace, "shapes", "for a test")  # measures champion and anchor
    assert "measured in feature spaces that the line had before" in told("2")
    assert "measured in feature spaces that the line had before" not in told("1")


REFUSED = (
    (("nothing", "--reason", "x"), "there is no line 'nothing'"),
    (("empty", "--reason", "x"), "empty has no feature spaces yet; run `ferry retrain empty`, which makes them"),
    (("shapes", "--reason", " "), "new feature spaces need a reason; give it with --reason"),
    (("shapes", "--reason", "x", "--data", "nowhere"), "nowhere"),
)


def test_what_does_not_fit_is_refused_and_changes_nothing(workspace: Workspace):
    before, entries = digest(workspace.feature_spaces("shapes")), workspace.ledger.entries()
    for arguments, says in REFUSED:
        told = ferry(workspace, *arguments)
        assert told.exit_code == 3, told.output
        assert says in told.stderr
        assert told.stderr.startswith("ferry: ")
    assert digest(workspace.feature_spaces("shapes")) == before
    assert workspace.ledger.entries() == entries
    settings = workspace.root / "ferry.toml"
    whole = settings.read_text()
    settings.write_text(whole.replace('tier = "test"', 'tier = "test"\nimage_size = 8'))
    assert (
        "shapes/I/full 1 draws 16 pixels in 1 channel, but ferry.toml asks for 8 in 1"
        in ferry(workspace, "shapes", "--reason", "x").stderr
    )
    settings.write_text(whole)
    write_images(workspace.root / "data/shapes", 9)  # not recorded
    assert "data/shapes" in ferry(workspace, "shapes", "--reason", "x").stderr
    assert digest(workspace.feature_spaces("shapes")) == before
    workspace.feature_spaces("shapes").write_bytes(b"torn")
    told = ferry(workspace, "shapes", "--reason", "x")
    assert told.exit_code == 3
    assert "restore it from a backup" in told.stderr
    assert workspace.feature_spaces("shapes").read_bytes() == b"torn"
    with FileLock(workspace.work / "retraining.lock"):
        told = ferry(workspace, "shapes", "--reason", "x")
    assert told.exit_code == 4
    assert "another ferry process holds the retraining" in told.stderr
    assert measured(workspace) == []
