"""A Git clone of a workspace pulls the data, keeps records of its own, and says what it lacks; Git never holds a secret."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.errors import WorkspaceError
from flows.setup import create
from flows.web.webhook import secret_of
from flows.workspace import Workspace
from model import versions
from ota.errors import OperatorError
from tests.conftest import write_images
from tests.test_flows import SETTINGS


def ferry(root: Path, *words: str):
    return CliRunner().invoke(app, ["--quiet", "-w", str(root), *words])


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout


def stored(root: Path, **stores: str) -> None:
    """Write addresses into ferry.toml."""
    path = root / "ferry.toml"
    lines = "\n".join(f'{key} = "{value}"' for key, value in stores.items())
    path.write_text(path.read_text().replace("[lines.shapes]", f"[stores]\n{lines}\n\n[lines.shapes]", 1))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a workspace with one data revision, whose settings are in Git; do not write into it."""
    made = create(tmp_path_factory.mktemp("original") / "ws", [], SETTINGS)
    made.ledger.close()
    made.fleet.close()
    write_images(made.root / "data/shapes", 40)
    assert ferry(made.root, "data", "add", "shapes").exit_code == 0
    return made.root


@pytest.fixture
def clone(original: Path, tmp_path: Path) -> Path:
    git(tmp_path, "clone", "--quiet", str(original), "clone")
    return tmp_path / "clone"


def test_clone_pulls_the_data_from_the_remote_of_the_original(original: Path, clone: Path):
    result = ferry(clone, "retrain", "shapes")
    assert (result.exit_code, "`ferry data pull shapes`" in result.stderr) == (3, True), result.output
    for _ in range(2):  # the second finds nothing to do
        result = ferry(clone, "data", "pull", "shapes")
        assert result.exit_code == 0, result.output
    assert versions.folder_md5(clone / "data/shapes") == versions.folder_md5(original / "data/shapes")
    assert not versions.is_dirty(clone, "data/shapes")
    assert git(clone, "status", "--short") == ""


@pytest.mark.parametrize("named", ["file", "environment"])
def test_clone_pulls_the_data_from_a_remote_that_is_named(named: str, original: Path, clone: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(original / "dvc-remote", tmp_path / "share")
    git(clone, "remote", "set-url", "origin", "ssh://factory.example/ws")  # the original cannot be reached
    result = ferry(clone, "data", "pull", "shapes")
    assert (result.exit_code, "FERRY_STORES_DATA=" in result.stderr) == (3, True), result.output
    if named == "file":
        stored(clone, data=str(tmp_path / "share"))
    else:
        monkeypatch.setenv("FERRY_STORES_DATA", str(tmp_path / "share"))
    assert ferry(clone, "data", "pull", "shapes").exit_code == 0
    assert versions.folder_md5(clone / "data/shapes") == versions.folder_md5(original / "data/shapes")


def test_pull_replaces_recorded_data_and_no_others(original: Path, clone: Path):
    assert ferry(clone, "data", "pull", "shapes").exit_code == 0
    (clone / "data/shapes/000.png").unlink()
    names = sorted(path.name for path in (clone / "data/shapes").iterdir())
    result = ferry(clone, "data", "pull", "shapes")
    assert (result.exit_code, "move that folder away" in result.stderr) == (3, True), result.output
    assert sorted(path.name for path in (clone / "data/shapes").iterdir()) == names
    assert ferry(clone, "data", "add", "shapes", "-m", "one less").exit_code == 0
    git(clone, "checkout", "--quiet", "HEAD~1", "--", "data/shapes.dvc", "data/shapes.arrival.json")
    git(clone, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "back")
    assert ferry(clone, "data", "pull", "shapes").exit_code == 0  # what is there is recorded
    assert (clone / "data/shapes/000.png").is_file()


def test_clone_keeps_a_ledger_of_its_own_and_says_what_a_release_lacks(clone: Path):
    result = ferry(clone, "release", "shapes")
    assert result.exit_code == 3
    for what in (
        "keys/",
        "models, deltas, snapshot, timestamp",
        "repository/",
        "ferry.db",
        "mlflow.db and mlartifacts/",
        "copy them",
    ):
        assert what in result.stderr, result.stderr
    workspace = Workspace(clone)
    workspace.ledger.append("trigger", "shapes", "tried", {})
    assert [entry.why for entry in Workspace(clone).ledger.entries()] == ["tried"]
    assert ferry(clone, "release", "shapes").exit_code == 3
    assert not (clone / "keys" / "keys.json").exists()
    result = ferry(clone, "init", str(clone))
    assert (result.exit_code, "clone with records of its own" in result.stderr) == (3, True), result.output
    assert ferry(clone, "history", "shapes/I/full").exit_code == 0
    result = ferry(clone, "trust", "status")
    assert (result.exit_code, "Git clone without keys/" in result.stderr) == (3, True), result.output


def test_clone_writes_nothing_into_a_shared_ledger(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FERRY_STORES_DATABASE", f"sqlite:///{tmp_path / 'shared.db'}")
    with pytest.raises(WorkspaceError, match=r"FERRY_STORES_DATABASE=sqlite:///ferry\.db"):
        Workspace(clone).ledger.head()
    assert not (tmp_path / "shared.db").exists()


def test_lost_keys_do_not_begin_a_second_ledger(original: Path, tmp_path: Path):
    root = tmp_path / "ws"
    shutil.copytree(original, root)
    Workspace(root).ledger.append("trigger", "shapes", "before", {})
    shutil.rmtree(root / "keys")
    with pytest.raises(OperatorError):  # the repository is there, so this is no clone
        Workspace(root).ledger.head()
    shutil.rmtree(root / "repository")
    with pytest.raises(WorkspaceError, match="restore keys/ from a backup"):
        Workspace(root).ledger.head()


@pytest.mark.parametrize(
    ("lost", "said"), [("online/models.pem", "the private key of models"), ("online/ledger.pem", "of the ledger")]
)
def test_release_names_the_one_key_that_is_missing(lost: str, said: str, original: Path, tmp_path: Path):
    root = tmp_path / "ws"
    shutil.copytree(original, root)
    (root / "keys" / lost).unlink()
    result = ferry(root, "release", "shapes")
    assert (result.exit_code, said in result.stderr, "repository/ (" in result.stderr) == (3, True, False), result.output


def test_clone_of_an_older_workspace_says_where_its_settings_are(original: Path, tmp_path: Path):
    git(tmp_path, "clone", "--quiet", str(original), "clone")
    (tmp_path / "clone" / "ferry.toml").unlink()
    result = ferry(tmp_path / "clone", "data", "log", "shapes")
    assert (result.exit_code, "`git add ferry.toml .gitignore`" in result.stderr) == (3, True), result.output


# What Git holds


def tracked(root: Path) -> dict[str, bytes]:
    """Read everything that Git holds, in all commits and in the index."""
    names = set(git(root, "rev-list", "--all", "--objects").splitlines()) | {
        f"{row.split()[1]} {row.split(maxsplit=3)[3]}" for row in git(root, "ls-files", "--stage").splitlines()
    }
    found = {}
    for row in names:
        oid, _, name = row.partition(" ")
        if git(root, "cat-file", "-t", oid).strip() == "blob":
            found[name] = subprocess.run(
                ["git", "-C", str(root), "cat-file", "blob", oid], capture_output=True, check=True
            ).stdout
    return found


def secrets_in(root: Path) -> dict[str, bytes]:
    """Collect what must not leave the workspace: the private keys and the files of secrets."""
    paths = [*root.rglob("*.pem"), *root.rglob("*.secret"), *root.rglob("credentials")]
    return {str(path): path.read_bytes().strip() for path in paths if path.is_file() and path.stat().st_size}


def test_git_holds_no_secret_whatever_a_person_adds(original: Path, tmp_path: Path):
    root = tmp_path / "ws"
    shutil.copytree(original, root)
    workspace = Workspace(root)
    secret_of(workspace)
    (root / "work" / "prefect" / "credentials").write_text("ferry:a-secret-of-prefect")
    assert (
        ferry(root, "trust", "rotate", "root", "--offline", str(root / "usb"), "--new", "3").exit_code == 0
    )  # a folder of one's own
    stored(root, database="postgresql://ferry:hunter2@127.0.0.1/ferry")
    write_images(root / "data/shapes", 20, dim=True)
    (root / "keys" / "online" / "models.pem").chmod(0o600)
    assert ferry(root, "data", "add", "shapes").exit_code == 0
    held = tracked(root)
    assert "data/shapes.dvc" in held
    told = secrets_in(root)
    assert len(told) > 8
    git(root, "add", "--all", "--", ":!ferry.toml")
    for name, data in tracked(root).items():
        assert not [path for path, secret in told.items() if secret in data], name
        assert b"PRIVATE KEY" not in data, name
        assert b"hunter2" not in data, name  # ferry.toml with a password is left out of the commit


def test_settings_without_a_password_are_recorded_with_the_data(original: Path):
    held = tracked(original)
    assert held["ferry.toml"] == (original / "ferry.toml").read_bytes()
    assert b"/keys\n" in held[".gitignore"]


# Passwords


def test_new_settings_are_for_their_owner_alone(tmp_path: Path):
    before = os.umask(0)
    try:
        assert ferry(tmp_path, "init", str(tmp_path / "ws")).exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ws" / "ferry.toml").stat().st_mode) == 0o600


def test_environment_replaces_addresses(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FERRY_STORES_DATABASE", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    monkeypatch.setenv("FERRY_STORES_PUBLISH", "other")
    monkeypatch.setenv("FERRY_STORES_MLFLOW", "")  # as if it were not set
    workspace = Workspace(original)
    assert workspace.database == f"sqlite:///{tmp_path / 'elsewhere.db'}"
    assert workspace.settings.stores.publish == "other"
    assert workspace.mlflow == f"sqlite:///{original / 'mlflow.db'}"
    monkeypatch.setenv("FERRY_STORES_S3_ENDPOINT", "http://me:hunter2@store.example")
    result = ferry(original, "data", "log", "shapes")
    assert result.exit_code == 3
    assert "FERRY_STORES_S3_ENDPOINT" in result.stderr
    assert "AWS_SECRET_ACCESS_KEY" in result.stderr
    assert "hunter2" not in result.output


PASSWORDS = ["hunter2", "hunt%40er2", "hun/ter2", "hun:ter2"]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("database", ["history", "shapes/I/full"]),
        ("database", ["fleet", "status"]),
        ("database", ["release", "shapes"]),
        ("mlflow", ["evaluate", "shapes/I/full", "1"]),
    ],
)
def test_password_in_an_address_is_never_printed(password: str, store: str, words: list[str], original: Path, tmp_path: Path):
    """Run the real command, so that tracebacks and logs of libraries count, too."""
    root = tmp_path / "ws"
    shutil.copytree(original, root, ignore=shutil.ignore_patterns("cache", "dvc-remote"))
    scheme = "nosuch+driver" if store == "database" else "nosuch"
    stored(root, **{store: f"{scheme}://ferry:{password}@127.0.0.1:1/x"})
    script = "import sys; from flows.cli import main; sys.argv[0] = 'ferry'; main()"
    done = subprocess.run([sys.executable, "-c", script, "-w", str(root), *words], capture_output=True, text=True)
    assert done.returncode != 0
    for form in (password, password.replace("%40", "@")):
        assert form not in done.stdout + done.stderr


@pytest.mark.parametrize("words", [["history", "shapes/I/full"], ["fleet", "status"], ["report"]])
def test_missing_driver_is_one_sentence(words: list[str], original: Path, tmp_path: Path):
    root = tmp_path / "ws"
    shutil.copytree(original, root, ignore=shutil.ignore_patterns("cache", "dvc-remote"))
    stored(root, database="mssql+pyodbc://ferry:hunter2@127.0.0.1:1/x")
    result = ferry(root, *words)
    assert (result.exit_code, "driver pyodbc is not installed" in result.stderr) == (4, True), result.output
