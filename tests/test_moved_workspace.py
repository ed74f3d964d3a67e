"""A workspace is a folder: moved, restored elsewhere or copied, it finds its data, its models and its records."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from flows.cli import app
from flows.setup import create
from flows.workspace import Workspace
from model import versions
from model.errors import OwnerError
from registry.catalog import Catalog, Subject
from registry.dataset import dataset_input
from registry.lineage import data_tags
from registry.runs import WORKSPACE, create_run
from tests.conftest import write_images
from tests.test_flows import SETTINGS

SUBJECT = Subject.parse("shapes/I/full")


def ferry(root: Path, *words: str):
    return CliRunner().invoke(app, ["--quiet", "-w", str(root), *words])


def recorded(root: Path) -> Workspace:
    """Make a workspace with a data revision, and with a version in MLflow that has a file."""
    made = create(root, [], SETTINGS)
    write_images(made.root / "data/shapes", 12)
    data = versions.add(made.root, "data/shapes", "shapes", "first")
    client, experiment = made.catalog.client, made.catalog.experiment("shapes")
    run = create_run(made.catalog, experiment, SUBJECT, data_tags(data, made.catalog.repository))
    client.log_text(run, "weights", "bundle/weights.bin")
    client.log_inputs(run, [dataset_input(data, made.catalog.repository, "training")])
    client.create_registered_model(SUBJECT.model)
    client.create_model_version(SUBJECT.model, source=f"{client.get_run(run).info.artifact_uri}/bundle", run_id=run)
    made.ledger.append("trigger", "shapes", "noted", {})
    close(made)
    return made


def close(workspace: Workspace) -> None:
    workspace.ledger.close()
    workspace.fleet.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a workspace with data and a version; tests copy it, and may move the copy."""
    return recorded(tmp_path_factory.mktemp("original") / "ws").root


def weights_of(workspace: Workspace, into: Path) -> str:
    """Read the version's file, as MLflow finds it."""
    run = workspace.catalog.version(SUBJECT, 1).run_id
    into.mkdir()
    return Path(workspace.catalog.client.download_artifacts(run, "bundle/weights.bin", str(into))).read_text()


@pytest.mark.parametrize("place", ["other", "a much longer path/with ünïcode and spaces/ws"])
def test_moved_workspace_finds_models_and_data(original: Path, place: str, tmp_path: Path):
    first = tmp_path / "first"
    shutil.copytree(original, first)
    here = Workspace(first)
    assert weights_of(here, tmp_path / "one") == "weights"
    close(here)
    moved = tmp_path / place
    moved.parent.mkdir(parents=True, exist_ok=True)
    first.rename(moved)
    workspace = Workspace(moved)
    assert weights_of(workspace, tmp_path / "two") == "weights"
    assert [entry.why for entry in workspace.ledger.entries()] == ["noted"]
    run = workspace.catalog.client.get_run(workspace.catalog.version(SUBJECT, 1).run_id)
    assert run.info.artifact_uri.startswith(moved.as_uri())
    assert run.data.tags[WORKSPACE] == workspace.catalog.owner  # or a killed run would stay "running" for ever
    source = json.loads(run.inputs.dataset_inputs[0].dataset.source)
    assert (source["repository"], source["url"].partition("@")[0]) == (str(moved), str(moved))
    created = workspace.catalog.client.create_run(workspace.catalog.experiment("shapes")).info
    assert created.artifact_uri.startswith(moved.as_uri())
    close(workspace)
    told = json.loads(ferry(moved, "data", "status", "shapes", "--json").stdout)
    assert told["remote_lacks"] == []


def test_restored_workspace_without_caches_gets_its_data_from_the_remote(original: Path, tmp_path: Path):
    moved = tmp_path / "restored"
    shutil.copytree(original, moved)
    shutil.rmtree(moved / ".dvc" / "cache")
    shutil.rmtree(moved / "work")
    hidden = original.rename(original.with_name("hidden"))  # nothing may come from where it was
    try:
        workspace = Workspace(moved)
        data = versions.resolve(moved, "data/shapes", "shapes")
        place = versions.pull(moved, data, workspace.work / "data")
    finally:
        hidden.rename(original)
    assert versions.folder_md5(place) == data.md5


def as_older_ferry_left_it(root: Path, at: Path) -> None:
    """Write the absolute address of the remote that an older ferry wrote when the workspace was at a path."""
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace("url = ../dvc-remote", f"url = {at}/dvc-remote"))
    assert str(at) in config.read_text()


def test_remote_of_an_older_workspace_becomes_relative(original: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(original, moved)
    as_older_ferry_left_it(moved, Path("/srv/factory/ws"))
    assert json.loads(ferry(moved, "data", "status", "shapes", "--json").stdout)["remote_lacks"] == []
    assert "url = ../dvc-remote\n" in (moved / ".dvc" / "config").read_text()


def test_remote_that_somebody_chose_stays(original: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(original, moved)
    config = moved / ".dvc" / "config"
    config.write_text(config.read_text().replace("url = ../dvc-remote", "url = /mnt/share/objects"))
    before = config.read_bytes()
    Workspace(moved)
    assert config.read_bytes() == before


def test_copy_leaves_the_original_as_it_was(original: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    before = (original / "mlflow.db").read_bytes()
    workspace = Workspace(copy)
    assert workspace.catalog.client.get_experiment_by_name("shapes").artifact_location.startswith(copy.as_uri())
    close(workspace)
    assert (original / "mlflow.db").read_bytes() == before


def test_link_to_a_workspace_changes_no_address(original: Path, tmp_path: Path):
    before = (original / "mlflow.db").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(original)
    workspace = Workspace(link)
    assert weights_of(workspace, tmp_path / "one") == "weights"
    close(workspace)
    assert (original / "mlflow.db").read_bytes() == before


def shared(root: Path, database: Path) -> Workspace:
    """Open a workspace whose MLflow database is outside of it, as PostgreSQL would be."""
    path = root / "ferry.toml"
    path.write_text(path.read_text().replace("[lines.shapes]", f'[stores]\nmlflow = "sqlite:///{database}"\n\n[lines.shapes]', 1))
    return Workspace(root)


def test_addresses_in_a_shared_database_stay_while_the_other_workspace_is_there(original: Path, tmp_path: Path):
    mine = tmp_path / "mine"
    shutil.copytree(original, mine)
    database = tmp_path / "shared.db"
    shutil.copyfile(original / "mlflow.db", database)
    found = shared(mine, database).catalog.client.get_experiment_by_name("shapes")
    assert found.artifact_location.startswith(original.as_uri())
    hidden = original.rename(original.with_name("hidden"))  # now it was moved, and its files are here
    try:
        found = Workspace(mine).catalog.client.get_experiment_by_name("shapes")
    finally:
        hidden.rename(original)
    assert found.artifact_location.startswith(mine.as_uri())


def test_addresses_of_servers_buckets_and_foreign_folders_stay(original: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(original, moved)
    kept = {"bucket": "s3://bucket/mlartifacts/bucket", "server": "mlflow-artifacts:/1", "foreign": "file:///srv/else/foreign"}
    engine = create_engine(f"sqlite:///{moved / 'mlflow.db'}")
    with engine.begin() as connection:
        for number, (name, place) in enumerate(kept.items(), start=90):
            row = {"id": number, "name": name, "place": place}
            connection.execute(
                text(
                    "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage, workspace) "
                    "VALUES (:id, :name, :place, 'active', 'default')"
                ), row,
            )  # fmt: skip
    engine.dispose()
    client = Workspace(moved).catalog.client
    assert {name: client.get_experiment_by_name(name).artifact_location for name in kept} == kept


def test_repository_that_git_does_not_trust_says_what_to_do(original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Let Git believe that the folder belongs to somebody else, by GIT_TEST_ASSUME_DIFFERENT_OWNER."""
    root = tmp_path / "ws"
    shutil.copytree(original, root)
    real = subprocess.run

    def elsewhere(words: list[str], **given):
        return real(words, **{**given, "env": given["env"] | {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}})

    monkeypatch.setattr("model.git.subprocess.run", elsewhere)
    for words in (["data", "log", "shapes"], ["data", "status", "shapes"], ["retrain", "shapes"]):
        result = ferry(root, *words)
        assert result.exit_code == 3, result.output
        assert f"git config --global --add safe.directory {root}" in result.stderr, words
        assert "has no data yet" not in result.output
    from flows import triggers

    with pytest.raises(OwnerError, match="does not trust"):  # and `ferry serve` does not take it for a line without data
        triggers.look(Workspace(root), ["shapes"])


def test_catalog_of_an_address_that_is_no_database_is_left_to_mlflow(tmp_path: Path):
    from registry import addresses

    assert addresses.follow("http://127.0.0.1:1", tmp_path, own=False, host="here") == 0
    assert addresses.follow(f"sqlite:///{tmp_path}/missing/mlflow.db", tmp_path, own=True, host="here") == 0
    assert addresses.follow("mysql+nosuch://127.0.0.1:1/x", tmp_path, own=False, host="here") == 0
    assert addresses.follow("mssql+pyodbc://127.0.0.1:1/x", tmp_path, own=False, host="here") == 0  # no driver
    assert isinstance(Catalog(f"sqlite:///{tmp_path}/new.db", tmp_path / "mlartifacts"), Catalog)
