"""What `doctor` sees below the agent: file systems, owners, temporary folders, and what answers in place of the repository."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ota.agent import doctor
from ota.errors import RoomError, StateError, TransferError
from tests.fleet_kit import Field, WebServer, untouched

pytest_plugins = ["tests.fleet_kit"]
PORTAL = "<!DOCTYPE html>\n<html><head><title>Welcome to the guest network</title></head><body>Sign in</body></html>"


def found(field: Field, about: str) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in doctor.examine(field.device.home, draw=False) if f.about == about]


# Inodes


def few_inodes(monkeypatch: pytest.MonkeyPatch, left: int, files_in_all: int = 1000) -> None:
    whole = os.statvfs

    def look(path: Any) -> Any:
        real = whole(path)
        return SimpleNamespace(f_bavail=real.f_bavail, f_frsize=real.f_frsize, f_files=files_in_all, f_favail=left)

    monkeypatch.setattr(os, "statvfs", look)


@pytest.mark.parametrize("left", [0, 63])
def test_lack_of_inodes_is_seen_and_stops_an_update_before_its_download(
    offered: Field, monkeypatch: pytest.MonkeyPatch, left: int
):
    few_inodes(monkeypatch, left)
    levels = found(offered, "room")
    ((level, text), *_) = levels
    assert (level, f"can hold {left} more files (inodes), and an update needs 64; remove files" in text) == ("fail", True)
    with untouched(offered.device, RoomError, "the update needs room for 64 files .inodes., but .* has it for", marks=False):
        offered.device.update()
    few_inodes(monkeypatch, 0, files_in_all=0)  # btrfs has no table of them
    assert {level for level, _ in found(offered, "room")} == {"ok"}
    assert offered.device.update().changed


def test_write_that_fails_for_lack_of_inodes_says_so(scene: Field, monkeypatch: pytest.MonkeyPatch):
    few_inodes(monkeypatch, 0)

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RoomError, match=r"can hold no more files \(inodes\)"):
        scene.device.home.disk.replace("x", b"")


# Owners and folders


def test_directory_of_another_owner_is_seen(scene: Field, monkeypatch: pytest.MonkeyPatch):
    """Look at the owner too: root may read and write everything, and the user of the service may not."""
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    levels = found(scene, "directory")
    assert [text for level, text in levels if level == "fail" and "belongs to" in text and "run the agent as" in text]
    assert "fail  directory" in scene.device.command("doctor", "--no-draw", code=3)


@pytest.mark.parametrize("name", ["", "slots", "metadata", "queue"])
def test_folder_that_cannot_be_written_is_named(scene: Field, monkeypatch: pytest.MonkeyPatch, name: str):
    (scene.device.root / "queue").mkdir(exist_ok=True)
    closed, whole = scene.device.root / name, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if Path(path) == closed and mode & os.W_OK else whole(path, mode))
    assert [text for level, text in found(scene, "directory") if level == "fail"] == [
        f"this user may not write {closed}; run the agent as its owner, on a disk that can be written"
    ]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_links_is_seen(scene: Field, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", refuse)
    ((_, _), (level, text)) = found(scene, "directory")
    assert level == "fail"
    assert f"the file system of {scene.device.root} takes no symbolic links" in text
    with untouched(scene.device, StateError, "the metadata cache cannot be written: .* run `ferry-agent doctor`"):
        scene.device.update()


def test_file_system_that_cannot_sync_folders_is_seen(scene: Field, monkeypatch: pytest.MonkeyPatch):
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    assert any(level == "fail" and "cannot sync a folder" in text for level, text in found(scene, "directory"))


def test_doctor_leaves_nothing_behind(scene: Field):
    before = sorted(scene.device.root.rglob("*"))
    assert {level for level, _ in found(scene, "directory")} == {"ok"}
    assert sorted(scene.device.root.rglob("*")) == before


# Temporary folders


def test_temporary_folder_that_cannot_be_written_is_seen(scene: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    ((_, _), (level, text)) = found(scene, "directory")
    assert level == "warn"
    assert f"no temporary file can be written ({tmp_path / 'gone'}, which TMPDIR names: No such file or directory)" in text
    assert scene.device.update().reason == "release 1 is installed"  # the agent itself needs none


def test_any_temporary_folder_is_enough(scene: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ota.agent.ground.TEMPORARY", (str(tmp_path / "gone"), str(tmp_path)))
    assert {level for level, _ in found(scene, "directory")} == {"ok"}
    monkeypatch.setattr("ota.agent.ground.TEMPORARY", (str(tmp_path / "gone"),))
    assert {level for level, _ in found(scene, "directory")} == {"ok", "warn"}


# What answers in place of the repository


@pytest.mark.parametrize(
    "page", [PORTAL, "\ufeff" + PORTAL, "\r\n \t" + PORTAL, PORTAL + " " * 200_000, "<?xml version='1.0'?><Error/>"], ids=range(5)
)
def test_web_page_in_place_of_metadata_is_seen(scene: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str):
    monkeypatch.setattr("ota.agent.transport.BACKOFF", 0)
    (tmp_path / "portal/metadata").mkdir(parents=True)
    for name in ("timestamp.json", "2.root.json"):
        (tmp_path / "portal/metadata" / name).write_text(page)
    with WebServer(tmp_path / "portal") as web:
        scene.device.configure(repository=web.address)
        ((level, text),) = found(scene, "repository")
        assert level == "fail"
        assert (
            "it answers with a web page in place of the repository's files, as the login page of a network or of a proxy does"
            in text
        )
        with untouched(scene.device, TransferError, "answers with a web page in place of the repository's files"):
            scene.device.update()


@pytest.mark.parametrize(
    "answer", ["", "OK", "[]", "{}", '{"signed": {}}', '{"signed": {"_type": "root", "version": 1}}', "[" * 100_000]
)
def test_another_server_in_place_of_the_repository_is_seen(scene: Field, tmp_path: Path, answer: str):
    (tmp_path / "other/metadata").mkdir(parents=True)
    (tmp_path / "other/metadata/timestamp.json").write_text(answer)
    scene.device.configure(repository=str(tmp_path / "other"))
    ((level, text),) = found(scene, "repository")
    assert (level, "it answers, but not with the metadata of a repository; check the address" in text) == ("fail", True)
