"""Masters and budgets in one workspace, with real trainings, MLflow and deltas: what is kept, what is lost, what is refused.

The tests of this file build on each other and run in order: each looks at what the one before it left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from flows.settings import Settings
from flows.setup import create
from flows.sizes import written
from flows.workspace import Workspace
from model import train, versions
from model.scorecard import Lineage
from ota.delta import files
from ota.release import bundle
from registry.catalog import Catalog, Subject
from registry.champions import champion_of, sealed, verdict
from registry.lineage import file_sha256
from registry.seal import MASTER, Seal
from tests.conftest import origin, write_images
from tests.test_flows import SETTINGS

SUBJECT = Subject(line="shapes", configuration="I", variant="full")
LOWRANK = SETTINGS.replace('tier = "test"', 'tier = "test"\nupdate_method = "lowrank"\nupdate_polish = 10').replace(
    "steps = 500", "steps = 120"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Create a workspace with a first version."""
    made = create(tmp_path_factory.mktemp("budget") / "ws", [], LOWRANK)
    write_images(made.root / "data/shapes", 120)
    versions.add(made.root, "data/shapes", "shapes", "first")
    (row,) = retrained(made)
    assert row["promoted"], row
    deliver(made, 1)
    yield made
    made.ledger.close()
    made.fleet.close()


def ferry(workspace: Workspace, *words: str) -> Result:
    return CliRunner().invoke(app, ["--quiet", "-w", str(workspace.root), *words])


def retrained(workspace: Workspace, *words: str) -> list[dict[str, Any]]:
    told = ferry(workspace, "retrain", "shapes", *words, "--json")
    assert told.exit_code in (0, 5), told.output
    rows: list[dict[str, Any]] = json.loads(told.stdout)["models"]
    return rows


def champion(workspace: Workspace) -> Seal:
    found = champion_of(workspace, SUBJECT)
    assert found
    return found


def lineage(workspace: Workspace, number: int) -> Lineage:
    return Lineage.model_validate_json(workspace.catalog.data(sealed(workspace, SUBJECT, number), "checkpoint/lineage.json"))


def stored_master(workspace: Workspace, number: int) -> Path:
    """Return the file of a version's master where MLflow keeps it, and forget what was fetched before."""
    shutil.rmtree(workspace.work / "champions", ignore_errors=True)
    run = workspace.catalog.version(SUBJECT, number).run_id
    (found,) = (workspace.root / "mlartifacts").rglob(f"{run}/artifacts/checkpoint/{MASTER}")
    return found


def deliver(workspace: Workspace, seed: int) -> str:
    write_images(workspace.root / "data/shapes", 60, seed=seed, dim=True)
    return versions.add(workspace.root, "data/shapes", "shapes", f"delivery {seed}").rev


def test_first_version_has_a_master_that_is_kept_beside_it(workspace: Workspace):
    seal, made = champion(workspace), lineage(workspace, 1)
    assert seal.master
    assert (made.master, made.parent) == (seal.master.digest, None)
    assert file_sha256(stored_master(workspace, 1)) == seal.master.digest != seal.checkpoint
    traced = json.loads(ferry(workspace, "trace", seal.master.digest[:12], "--json").stdout)
    assert traced["of"]["name"] == "shapes/I/full 1"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("64KB", "'KB' in 64KB is no unit; write bytes, such as 65536, or a number with one of the units B, kB, KiB, MB and MiB"),
        ("64 Ki", "'Ki' in 64 Ki is no unit"),
        ("much", "is no size"),
        ("-1", "is no size"),
        ("0", "an update of no bytes cannot be"),
        ("0KiB", "an update of no bytes cannot be"),
    ],
)
def test_budget_that_is_no_size_is_refused_by_name(workspace: Workspace, given: str, says: str):
    before = len(workspace.ledger.entries())
    told = ferry(workspace, "retrain", "shapes", "--update-budget", given)
    assert told.exit_code == 3
    assert "--update-budget" in told.output
    assert says in " ".join(told.output.split())
    assert len(workspace.ledger.entries()) == before


def test_budget_smaller_than_the_fixed_cost_is_refused_before_training_with_the_smallest_that_can_be(workspace: Workspace):
    runs = sorted((workspace.work / "runs").iterdir())
    told = ferry(workspace, "retrain", "shapes", "--update-budget", "2KiB")
    assert told.exit_code == 3
    said = " ".join(told.output.split())
    assert "the budget of 2 KiB is too small: an update costs about" in said
    assert "(nothing was trained)" in said
    smallest = said.partition("give at least ")[2].partition(" KiB")[0]
    assert sorted((workspace.work / "runs").iterdir()) == runs
    assert champion(workspace).version == 1
    dry = ferry(workspace, "retrain", "shapes", "--update-budget", f"{int(smallest) - 1}KiB", "--dry-run")
    assert dry.exit_code == 3
    assert ferry(workspace, "retrain", "shapes", "--update-budget", f"{smallest}KiB", "--dry-run").exit_code == 0


def test_budget_that_nothing_fits_names_the_smallest_size_that_would_and_keeps_the_master(workspace: Workspace):
    told = ferry(workspace, "retrain", "shapes", "--update-budget", "24KiB", "--json")
    assert told.exit_code == 5
    (row,) = json.loads(told.stdout)["models"]
    assert (row["outcome"], row["promoted"]) == ("refuse", False)
    assert "no update within the budget of 24,576 bytes is shown to keep 98% of the gain" in row["reason"]
    assert row["update"]["bytes"] <= 24576
    passed = [point for point in row["update"]["curve"] if point["outcome"] == "passed"]
    assert passed
    assert f"the smallest size that does is {passed[-1]['bytes']:,} bytes" in row["reason"]
    assert champion(workspace).version == 1
    refused = sealed(workspace, SUBJECT, row["version"])
    assert refused.master
    assert refused.master.digest == row["update"]["master"] == file_sha256(stored_master(workspace, row["version"]))


@pytest.mark.slow
def test_larger_budget_uses_the_same_training_and_promotes_the_smallest_size_that_passes(workspace: Workspace):
    retrained(workspace, "--update-budget", "24KiB")  # as before: it is known, and nothing is trained or registered anew
    assert [v.number for v in workspace.catalog.versions(SUBJECT)] == [1, 2]
    before = {path: path.stat().st_mtime for path in (workspace.work / "runs").glob("*/lineage.json")}
    (row,) = retrained(workspace, "--update-budget", "128KiB")
    assert row["outcome"] in ("promote", "promote if reasoned"), row["reason"]
    update = row["update"]
    assert {path: path.stat().st_mtime for path in (workspace.work / "runs").glob("*/lineage.json")} == before
    assert update["bytes"] <= update["budget"] == 128 * 1024
    assert update["start"] == "master"
    assert lineage(workspace, row["version"]).start_master == lineage(workspace, 1).master
    outcomes = [point["outcome"] for point in update["curve"]]
    assert "passed" not in outcomes[outcomes.index("failed") :] if "failed" in outcomes else outcomes
    made = verdict(workspace, SUBJECT, row["version"])
    assert made
    assert made.update
    assert made.update.model_dump(mode="json") == update | {
        k: v for k, v in made.update.model_dump(mode="json").items() if k not in update
    }
    if row["outcome"] != "promote":
        ferry(workspace, "promote", str(SUBJECT), str(row["version"]), "--reason", "for the test", "--accept-worse")
    assert champion(workspace).version == row["version"]


@pytest.mark.slow
def test_what_is_fielded_is_what_devices_compute_and_takes_the_bytes_that_were_said(workspace: Workspace, tmp_path: Path):
    now = champion(workspace)
    made = verdict(workspace, SUBJECT, now.version)
    assert made
    assert made.update
    old, new = (workspace.catalog.files(sealed(workspace, SUBJECT, n), "bundle", tmp_path) for n in (1, now.version))
    factors = new / "update.safetensors"
    built = files.build(
        old / "weights.bin", new / "weights.bin", tmp_path / "delta", new / "graph.onnx", old / "graph.onnx", factors
    )
    assert built.size == made.update.weights
    given = {"line": "shapes", "device_class": "edge", "tier": "test", "configuration": "I", "precision": "bfloat16"}
    before, after = (bundle.assemble({"full": f}, **given, origin=origin(n), out=tmp_path) for n, f in enumerate((old, new), 1))  # type: ignore[arg-type]
    delta = bundle.make_delta(before, after, tmp_path, {"full": factors}, 2)
    assert delta
    fetched = delta.size + len(after.manifest.canonical()) + workspace.repository.metadata_bytes("shapes", "edge")
    assert fetched < made.update.bytes < fetched + 1500  # nothing was published, so a policy is assumed
    files.apply(old / "weights.bin", tmp_path / "delta", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (new / "weights.bin").read_bytes()


@pytest.mark.slow
def test_rollback_between_master_and_update_promotes_nothing_and_starts_from_that_champions_own_master(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    from flows import retrain as flow

    newest, entries = champion(workspace), len(workspace.ledger.entries())
    deliver(workspace, 2)
    real = flow._trained

    def then_rolled_back(*words: Any) -> Path:
        made = real(*words)
        assert ferry(workspace, "rollback", str(SUBJECT), "--reason", "streaks").exit_code == 0
        return made

    monkeypatch.setattr(flow, "_trained", then_rolled_back)
    told = ferry(workspace, "retrain", "shapes")
    assert told.exit_code == 5
    assert "shapes/I/full 1 has become champion since this training began, so its update fits no device" in " ".join(
        told.output.split()
    )
    assert champion(workspace).version == 1
    assert len(workspace.ledger.entries()) == entries + 1
    monkeypatch.setattr(flow, "_trained", real)
    (row,) = retrained(workspace)
    assert row["update"]["start"] == "master"
    assert (
        lineage(workspace, row["version"]).start_master
        == lineage(workspace, 1).master
        != lineage(workspace, newest.version).master
    )


def as_champion(workspace: Workspace, number: int) -> None:
    if champion(workspace).version != number:
        told = ferry(workspace, "promote", str(SUBJECT), str(number), "--overrule", "--reason", "for the test")
        assert told.exit_code == 0, told.output


def lost(workspace: Workspace, path: Path) -> None:
    path.unlink()


def damaged(workspace: Workspace, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def of_another_line(workspace: Workspace, path: Path) -> None:
    network = train.load_checkpoint(path.parent).network()
    train.write_safely(path, {name: weight + 0.01 for name, weight in network.state_dict().items()})


FAULTS = [lost, damaged, of_another_line]


@pytest.mark.parametrize("fault", FAULTS)
def test_master_that_is_lost_damaged_or_of_another_line_is_left_out(workspace: Workspace, fault: Any):
    from flows.steps import champion_files, fetch_master

    as_champion(workspace, 1)
    seal, path = sealed(workspace, SUBJECT, 1), stored_master(workspace, 1)
    whole = path.read_bytes()
    fault(workspace, path)
    try:
        checkpoint = champion_files(workspace, seal).checkpoint
        fetch_master(workspace, seal, checkpoint)
        doctor = " ".join(ferry(workspace, "doctor").output.split())
    finally:
        path.write_bytes(whole)
    assert "the master of shapes/I/full 1 is lost or damaged" in doctor
    assert "the master of" not in " ".join(ferry(workspace, "doctor").output.split())
    assert not (checkpoint / MASTER).exists()
    start = train.start_of(train.load_checkpoint(checkpoint), "shapes")
    assert start.master is None
    assert start.path.name == train.WEIGHTS
    assert "training starts from the fielded weights, because their master" in start.says
    fetch_master(workspace, seal, checkpoint)  # once it is restored it is used
    assert train.start_of(train.load_checkpoint(checkpoint), "shapes").master == seal.master.digest  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_training_starts_from_the_fielded_weights_and_says_so(workspace: Workspace, fault: Any):
    as_champion(workspace, 1)
    deliver(workspace, {lost: 3, damaged: 4, of_another_line: 5}[fault])
    path = stored_master(workspace, 1)
    whole = path.read_bytes()
    fault(workspace, path)
    try:
        (row,) = retrained(workspace, "--no-promote")
    finally:
        path.write_bytes(whole)
    made = lineage(workspace, row["version"])
    assert (made.start, made.start_master, row["update"]["start"]) == ("fielded", None, "fielded")
    assert made.parent == champion(workspace).checkpoint
    assert "training starts from the fielded weights, because their master" in row["reason"]
    assert "training starts from the fielded weights" in row["update"]["why_fielded"]


@pytest.mark.slow
def test_refused_challengers_master_does_not_leak_into_the_next_training(workspace: Workspace):
    as_champion(workspace, 1)
    others = {lineage(workspace, v.number).master for v in workspace.catalog.versions(SUBJECT)} - {lineage(workspace, 1).master}
    deliver(workspace, 6)
    (row,) = retrained(workspace, "--no-promote")
    assert lineage(workspace, row["version"]).start_master == lineage(workspace, 1).master
    assert lineage(workspace, row["version"]).start_master not in others


@pytest.mark.slow
def test_second_larger_update_without_a_budget_is_held_to_the_bytes_of_the_first(workspace: Workspace, tmp_path: Path):
    as_champion(workspace, 1)
    deliver(workspace, 7)
    (first,) = retrained(workspace, "--steps", "40", "--no-promote")
    assert "held" not in first["update"]
    assert first["update"]["noise"] == first["update"]["setting"]["level"]
    deliver(workspace, 8)
    (alone,) = retrained(workspace, "--no-promote")  # the first was not fielded, so it is no measure
    assert "held" not in alone["update"]
    as_champion(workspace, first["version"])
    deliver(workspace, 9)
    (second,) = retrained(workspace, "--no-promote")
    weights = [row["update"]["bytes"] - row["update"]["fixed"] for row in (first, alone, second)]
    assert weights[1] > 1.15 * weights[0]  # so it would have been larger
    assert weights[2] <= second["update"]["held"] == int(1.15 * weights[0])
    assert second["update"]["noise"] > second["update"]["setting"]["level"]
    told = ferry(workspace, "report", "--output", str(tmp_path / "report.html"))
    assert told.exit_code == 0, told.output
    assert f"to hold its weights to {second['update']['held']:,} bytes" in (tmp_path / "report.html").read_text()
    asked = (workspace.root / "ferry.toml").read_text()
    (workspace.root / "ferry.toml").write_text(asked.replace("update_polish = 10", "update_polish = 10\nupdate_level = 0.02"))
    try:
        (other,) = retrained(Workspace(workspace.root), "--no-promote")
    finally:
        (workspace.root / "ferry.toml").write_text(asked)
    assert (other["update"].get("held"), other["update"]["noise"]) == (None, 0.02)  # another level begins anew


def test_report_shows_the_curve_of_the_last_retraining(workspace: Workspace, tmp_path: Path):
    newest = max(v.number for v in workspace.catalog.versions(SUBJECT))
    made = verdict(workspace, SUBJECT, newest)
    assert made
    assert made.update
    told = ferry(workspace, "report", "--output", str(tmp_path / "report.html"))
    assert told.exit_code == 0, told.output
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert f"shapes/I/full version {newest} ({made.outcome}), by lowrank" in page
    assert f"<b>{made.update.bytes:,}</b>" in page
    for point in made.update.curve:
        assert f"{point.bytes:,}" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


@pytest.mark.parametrize("schema", [1, 2])
def test_workspace_of_before_keeps_rounding_until_it_asks(schema: int):
    line = {"data": "data/x", "retraining": {"update_grid": 3.0}}
    settings = Settings.model_validate({"schema": schema, "lines": {"x": line}}).lines["x"]
    options = settings.options(settings.retraining, "bfloat16")
    assert (settings.update_method, settings.update_budget, options.method, options.update_grid) == (None, None, None, 3.0)
    assert options.sha256 == settings.retraining.options("bfloat16").sha256
    asked = Settings.model_validate({"schema": schema, "lines": {"x": line | {"update_method": "lowrank"}}}).lines["x"]
    assert asked.options(asked.retraining, "bfloat16").method == "lowrank"
    assert asked.options(asked.distillation, "bfloat16").method == "lowrank"
    assert settings.options(settings.distillation, "bfloat16").sha256 == settings.distillation.options("bfloat16").sha256


def test_budget_without_a_method_of_chosen_size_is_refused():
    line = {"data": "data/x", "update_budget": "64KiB"}
    with pytest.raises(ValueError, match='write update_method = "lowrank", too, or remove the budget'):
        Settings.model_validate({"schema": 2, "lines": {"x": line}})
    given = Settings.model_validate({"schema": 2, "lines": {"x": line | {"update_method": "lowrank"}}})
    assert given.lines["x"].update_budget == 65536


@pytest.mark.parametrize(("size", "text"), [(65536, "64 KiB"), (3 << 20, "3 MiB"), (65537, "65,537 bytes"), (100, "100 bytes")])
def test_sizes_are_written_exactly(size: int, text: str):
    assert written(size) == text


def test_catalog_is_that_of_mlflow(workspace: Workspace):
    assert isinstance(workspace.catalog, Catalog)
    run = workspace.catalog.version(SUBJECT, 1).run_id
    names = {row.path for row in workspace.catalog.client.list_artifacts(run, "checkpoint")}
    assert f"checkpoint/{MASTER}" in names
    assert "checkpoint/statistics.safetensors" not in names
