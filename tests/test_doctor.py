"""`ferry doctor` names what is wrong with a workspace, on any broken one, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import flows.doctor
import ota.release.repository
from flows.cli import app
from flows.setup import create
from flows.workspace import Workspace
from ota.release import store
from tests.conftest import write_images
from tests.test_clone import stored
from tests.test_flows import SETTINGS


def doctor(root: Path) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Return the exit code, and (level, text) of all findings by what they are about."""
    result = CliRunner().invoke(app, ["-w", str(root), "doctor", "--json"])
    assert result.exit_code in (0, 3), result.output
    told = json.loads(result.stdout)
    found: dict[str, list[tuple[str, str]]] = {}
    for row in told["findings"]:
        found.setdefault(row["about"], []).append((row["level"], row["text"]))
    assert told["fit"] == (result.exit_code == 0)
    return result.exit_code, found


def levels(found: list[tuple[str, str]]) -> set[str]:
    return {level for level, _ in found}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a sound workspace; do not write into it."""
    made = create(tmp_path_factory.mktemp("original") / "ws", [], SETTINGS)
    write_images(made.root / "data/shapes", 12)
    assert CliRunner().invoke(app, ["--quiet", "-w", str(made.root), "data", "add", "shapes"]).exit_code == 0
    run = made.catalog.client.create_run(made.catalog.experiment("shapes"))
    made.catalog.client.log_text(run.info.run_id, "weights", "bundle/weights.bin")
    made.ledger.append("trigger", "shapes", "noted", {})
    made.ledger.close()
    made.fleet.close()
    return made.root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """Provide a copy at another path."""
    shutil.copytree(original, tmp_path / "ws")
    Workspace(tmp_path / "ws").catalog.experiment("shapes")  # corrects MLflow's addresses
    return tmp_path / "ws"


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and ".git/" not in str(path)}


def test_sound_workspace_is_fit_and_stays_as_it_is(root: Path):
    before = contents(root)
    code, found = doctor(root)
    assert code == 0, found
    assert set(found) == {
        "settings", "folder", "git", "data", "remote", "keys", "signatures", "ledger", "mlflow", "published", "packages", "room",
    }  # fmt: skip
    assert contents(root) == before


def removed(name: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
        else:
            (root / name).unlink()

    return remove


def written(name: str, data: bytes) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).write_bytes(data)

    return write


def emptied(root: Path) -> None:
    removed("dvc-remote")(root)
    (root / "dvc-remote").mkdir()


def forged(root: Path) -> None:
    with sqlite3.connect(root / "ferry.db") as connection:
        connection.execute("UPDATE ledger_entries SET body = replace(body, 'noted', 'forged')")


def secret_in_git(root: Path) -> None:
    subprocess.run(["git", "-C", str(root), "add", "--force", "keys/online/models.pem"], check=True)


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no settings": (removed("ferry.toml"), "settings", "ferry.toml is missing"),
    "settings that are no TOML": (written("ferry.toml", b"schema = \n"), "settings", "not valid TOML"),
    "settings that are no text": (written("ferry.toml", b"\xff"), "settings", "not valid TOML"),
    "settings of a newer ferry": (written("ferry.toml", b"schema = 9"), "settings", "newer version"),
    "no Git repository": (removed(".git"), "git", "no Git repository"),
    "a key in Git": (secret_in_git, "git", "keys/online/models.pem"),
    "no data": (removed("data/shapes"), "data", "`ferry data pull shapes`"),
    "no remote": (removed("dvc-remote"), "remote", "dvc-remote, which holds the bytes of all revisions, is missing"),
    "an empty remote": (emptied, "remote", "lacks the data of shapes"),
    "no keys": (removed("keys"), "keys", "no key ring"),
    "a lost key": (removed("keys/online/models.pem"), "keys", "the private key of models"),
    "a lost key of the ledger": (removed("keys/online/ledger.pem"), "keys", "the ledger's key"),
    "a damaged key ring": (written("keys/keys.json", b"{"), "keys", "damaged"),
    "a readable key": (lambda root: (root / "keys/online/models.pem").chmod(0o644), "keys", "chmod 600"),
    "no repository": (removed("repository"), "keys", "there is no repository"),
    "damaged metadata": (written("repository/metadata/1.models.json", b"{"), "signatures", "damaged"),
    "odd metadata": (written("repository/metadata/timestamp.json", b"[]"), "signatures", ""),
    "no ledger": (removed("ferry.db"), "ledger", "ferry.db with the ledger and the fleet is missing"),
    "a damaged database": (written("ferry.db", b"SQLite format 3\0" + b"x" * 5000), "ledger", "damaged"),
    "a forged entry": (forged, "ledger", "changed after it was written"),
    "an empty file of versions": (lambda root: (root / "mlflow.db").write_bytes(b""), "mlflow", "knows none of the versions"),
    "no versions": (removed("mlflow.db"), "mlflow", "mlflow.db with MLflow's versions is missing"),
    "no files of versions": (removed("mlartifacts"), "mlflow", "restore them from a backup"),
    "an unreachable MLflow": (lambda root: stored(root, mlflow="http://127.0.0.1:1"), "mlflow", "127.0.0.1:1 does not answer"),
    "an unknown database": (lambda root: stored(root, database="nosuch://a:hunter2@b/c"), "ledger", "cannot be used"),
    "a remote of another kind": (lambda root: stored(root, data="ftp://host/x"), "remote", "neither a folder nor s3://"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_doctor_names_what_is_broken(what: str, root: Path):
    damage, about, said = BROKEN[what]
    damage(root)
    before = contents(root)
    code, found = doctor(root)
    assert code == 3
    assert any(level == "fail" and said in text for level, text in found[about]), found[about]
    assert {"packages", "room"} <= set(found)  # the other checks went on
    assert "hunter2" not in str(found)
    assert contents(root) == before


def test_doctor_without_any_workspace(tmp_path: Path):
    assert doctor(tmp_path / "nothing")[0] == 3
    code, found = doctor(tmp_path)
    assert (code, levels(found["settings"]), "room" in found) == (3, {"fail"}, True)


@pytest.mark.parametrize(("days", "level"), [(8, "warn"), (15, "fail")])
def test_signature_that_ends_or_ended_is_named(days: int, level: str, root: Path, monkeypatch: pytest.MonkeyPatch):
    later = datetime.now(UTC) + timedelta(days=days)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # noqa: ARG003 - as the original
            return later

    monkeypatch.setattr(ota.release.repository, "datetime", Later)
    monkeypatch.setattr(flows.doctor, "datetime", Later)
    code, found = doctor(root)
    assert (code, levels(found["signatures"])) == (3 if level == "fail" else 0, {level}), found["signatures"]
    assert all("`ferry trust refresh`" in text for _, text in found["signatures"])


def test_moved_workspace_and_clone_are_named(original: Path, tmp_path: Path):
    shutil.copytree(original, tmp_path / "moved")
    code, found = doctor(tmp_path / "moved")
    assert (code, levels(found["mlflow"])) == (0, {"warn"})
    assert str(original) in found["mlflow"][0][1]
    subprocess.run(["git", "clone", "--quiet", str(original), str(tmp_path / "clone")], check=True)
    code, found = doctor(tmp_path / "clone")
    assert (code, levels(found["keys"]), levels(found["data"])) == (3, {"warn"}, {"fail"})
    assert not (tmp_path / "clone" / "ferry.db").exists()


def test_older_copy_is_named(root: Path, tmp_path: Path):
    here = Workspace(root)
    store.publish(here.repository.files(), "published", root)
    here.repository.refresh()
    assert levels(doctor(root)[1]["published"]) == {"warn"}  # signed, and not published yet
    shutil.copytree(root, tmp_path / "older")
    here.repository.renew(["models"])
    store.publish(here.repository.files(), "published", root)
    assert levels(doctor(root)[1]["published"]) == {"ok"}
    shutil.rmtree(tmp_path / "older" / "published")
    shutil.copytree(root / "published", tmp_path / "older" / "published")
    code, found = doctor(tmp_path / "older")
    assert (code, levels(found["published"])) == (3, {"fail"})


def test_package_of_another_version_is_named(root: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "bsdiff4":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "sqlalchemy" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, found = doctor(root)
    told = " ".join(text for _, text in found["packages"])
    assert (code, "bsdiff4 is not installed" in told, "sqlalchemy 1.0 is installed" in told) == (3, True, True), told


def test_little_room_is_told(root: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    code, found = doctor(root)
    assert (code, levels(found["room"])) == (3, {"fail"})


def test_doctor_loads_neither_torch_nor_mlflow(root: Path):
    script = (
        "import sys; from flows.doctor import examine; from pathlib import Path; examine(Path(sys.argv[1])); "
        "print([name for name in ('torch', 'mlflow', 'prefect', 'dvc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "[]\n", done.stderr


def test_new_workspace_lacks_nothing(tmp_path: Path):
    made = create(tmp_path / "ws", [], SETTINGS)
    made.fleet.close()
    assert levels(doctor(made.root)[1]["mlflow"]) == {"ok"}
    assert not (made.root / "mlflow.db").exists()
