"""Of two copies of a workspace that publish to one place, the older one is refused, in a folder and in a bucket."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.setup import create
from ota.errors import OperatorError
from ota.release import copies, store
from ota.release.keys import KeyRing
from ota.release.keys import create as make_keys
from ota.release.repository import Repository
from tests.test_flows import SETTINGS
from tests.test_release import bucket, credentials, s3_server

__all__ = ["bucket", "credentials", "s3_server"]


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, str | None]:
    """Provide a place to publish to, as `store.publish` takes it."""
    if request.param == "folder":
        return "published", tmp_path, None
    return f"s3://{request.getfixturevalue('bucket').name}/devices", tmp_path, request.getfixturevalue("s3_server")


def copied(repository: Repository, to: Path) -> Repository:
    shutil.copytree(repository.folder, to)
    return Repository(to, repository.keys)


def publish(repository: Repository, place: tuple[str, Path, str | None]) -> int:
    copies.check(repository, *place)
    return store.publish(repository.files(), *place)


def test_older_copy_is_refused_however_often_it_signs(repository: Repository, place, tmp_path: Path):
    publish(repository, place)
    copy = copied(repository, tmp_path / "copy")
    repository.renew(["models"])  # in the same second, both copies sign equal timestamps and snapshots
    publish(repository, place)
    there = store.read("metadata/timestamp.json", *place)
    for role in ("deltas", "models", "models"):  # behind, level, and ahead of what is published
        with pytest.raises(OperatorError, match="another copy of this workspace published there"):
            publish(copy, place)
        copy.renew([role])
    assert store.read("metadata/timestamp.json", *place) == there
    repository.refresh()
    publish(repository, place)


def test_copy_that_takes_over_may_publish(repository: Repository, place, tmp_path: Path):
    publish(repository, place)
    copy = copied(repository, tmp_path / "copy")
    copy.refresh()
    publish(copy, place)  # it is newer than what is published, which it knows
    with pytest.raises(OperatorError, match="another copy"):
        publish(repository, place)
    for name, _ in copy.files():  # what the documentation says: fetch what is published
        data = store.read(name, *place)
        assert data is not None
        (repository.folder / name).write_bytes(data)
    repository.refresh()
    publish(repository, place)


def test_interrupted_publication_is_repeated(repository: Repository, place):
    publish(repository, place)
    repository.refresh()
    store.publish((row for row in repository.files() if row[0] != "metadata/timestamp.json"), *place)
    repository.refresh()
    assert publish(repository, place)
    assert publish(repository, place) == 1  # the timestamp alone, which has the same name always


def test_another_workspace_is_refused(repository: Repository, place, tmp_path: Path):
    publish(repository, place)
    other = Repository.create(tmp_path / "other", make_keys(tmp_path / "other-keys"))
    for _ in range(3):
        with pytest.raises(OperatorError, match="another workspace, which has other keys"):
            publish(other, place)
        other.refresh()


def test_damaged_timestamp_is_repaired(repository: Repository, keys: KeyRing, tmp_path: Path):
    del keys
    place = ("published", tmp_path, None)
    publish(repository, place)
    there = tmp_path / "published" / "metadata" / "timestamp.json"
    whole = there.read_bytes()
    there.write_bytes(whole[:100])
    publish(repository, place)
    assert there.read_bytes() == whole


def test_command_of_the_older_copy_signs_nothing(tmp_path: Path):
    first = create(tmp_path / "ws", [], SETTINGS)
    first.ledger.close()
    first.fleet.close()
    settings = first.root / "ferry.toml"
    settings.write_text(
        settings.read_text().replace("[lines.shapes]", f'[stores]\npublish = "{tmp_path}/there"\n\n[lines.shapes]', 1)
    )

    def ferry(name: str, *words: str):
        return CliRunner().invoke(app, ["--quiet", "-w", str(tmp_path / name), *words])

    shutil.copytree(first.root, tmp_path / "copy")
    assert ferry("ws", "trust", "refresh").exit_code == 0
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "copy" / "repository").rglob("*.json"))
    for words in (["trust", "refresh"], ["trust", "renew"]):
        result = ferry("copy", *words)
        assert (result.exit_code, "another copy of this workspace published there" in result.stderr) == (3, True), result.output
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "copy" / "repository").rglob("*.json")) == before
    assert ferry("ws", "trust", "refresh").exit_code == 0


def test_rotation_after_a_theft_replaces_what_the_thief_published(tmp_path: Path):
    made = create(tmp_path / "ws", [], SETTINGS)
    made.ledger.close()
    made.fleet.close()

    def ferry(*words: str):
        return CliRunner().invoke(app, ["--quiet", "-w", str(made.root), *words])

    assert ferry("trust", "refresh").exit_code == 0
    shutil.copytree(made.root / "repository", tmp_path / "stolen")
    thief = Repository(tmp_path / "stolen", made.keys)
    for _ in range(3):
        thief.renew(["models"])
    store.publish(thief.files(), "published", made.root)
    assert ferry("trust", "refresh").exit_code == 3
    stolen = [word for role in ("timestamp", "snapshot") for word in ("--stolen", made.repository.roles()[role].keyids[0])]
    result = ferry("trust", "rotate", "timestamp", "snapshot", *stolen)
    assert result.exit_code == 0, result.output
    assert (made.root / "published/metadata/timestamp.json").read_bytes() == (
        made.repository.metadata / "timestamp.json"
    ).read_bytes()
