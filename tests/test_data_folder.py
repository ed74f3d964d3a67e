"""Whatever lies in a data folder is recorded whole, or refused by name before anything is recorded; no file is lost silently."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows import cli
from model import revisions, versions
from model.data import METADATA, prepare, scan
from model.errors import DataError, RevisionError
from model.folder import hashes, shown
from tests.conftest import few

from .conftest import CONFIG, write_images

DATA, KEY = "data/shapes", "keys/online/models.pem"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace with one data revision; each test copies it."""
    root = tmp_path_factory.mktemp("folder") / "ws"
    assert CliRunner().invoke(cli.app, ["init", str(root), "--line", "shapes"]).exit_code == 0
    write_images(root / DATA, 12)
    assert ferry(root, "add", "shapes", "-m", "first")[0] == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the workspace, and add one image that the revision does not have."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    root = Path(shutil.copytree(made, tmp_path / "ws", symlinks=True))
    versions.init(root, str(root / "dvc-remote"))
    write_images(root / DATA, 1, seed=9, dim=True)
    return root


def ferry(root: Path, *words: str) -> tuple[int, str, str]:
    """Run a command of `ferry data`, and return its exit code, stdout and stderr."""
    told = CliRunner().invoke(cli.app, ["--quiet", "-w", str(root), "data", *words])
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    return told.exit_code, told.stdout, told.stderr


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def recorded(root: Path) -> dict[str, Any]:
    """Collect all that a revision may change: DVC's cache and remote, Git, the files beside the data folder, and the keys."""
    beside = [p for p in [*root.iterdir(), *(root / DATA).parent.iterdir()] if p.name.endswith((".dvc", ".json", "ignore"))]
    return {
        "cache": bytes_below(root / ".dvc/cache"),
        "remote": bytes_below(root / "dvc-remote"),
        "git": versions.git(root, "for-each-ref") + versions.git(root, "rev-parse", "HEAD"),
        "index": versions.git(root, "ls-files", "--stage"),
        "beside": {
            str(p): str(p.readlink()) if p.is_symlink() else p.stat().st_mode if not p.is_file() else p.read_bytes()
            for p in beside
        },
        "keys": bytes_below(root / "keys"),
    }


def assert_refused(root: Path, says: str, *commands: str) -> None:
    """Check that each command names what is wrong in one line, and that nothing is recorded."""
    before = recorded(root)
    for command in commands or ("add", "status"):
        code, out, err = ferry(root, command, "shapes")
        assert (code, out) == (3, "")
        assert says in err
        assert len(err.splitlines()) == 1
        assert err.rstrip("\n").isprintable()
    assert recorded(root) == before


def test_what_is_added_here_is_recorded(root: Path) -> None:
    """Record a good image everywhere, as the counterpart of all refusals below."""
    before = recorded(root)
    assert ferry(root, "add", "shapes")[0] == 0
    after = recorded(root)
    assert all(before[where] != after[where] for where in ("cache", "remote", "git", "index", "beside"))
    assert before["keys"] == after["keys"]


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def file(name: str, content: str = "x") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return make


def linked_folder(folder: Path) -> None:
    write_images(folder.parent.parent / "elsewhere", 60)
    (folder / "more").symlink_to("../../elsewhere")
    with (folder / METADATA).open("a") as metadata:
        metadata.writelines(json.dumps({"file_name": f"more/{i:03d}.png", "text": "bar"}) + "\n" for i in range(60))


def folder_elsewhere(folder: Path) -> None:
    folder.rename(folder.parent.parent / "real")
    folder.symlink_to("../real")


def parent_elsewhere(folder: Path) -> None:
    folder.parent.rename(folder.parent.parent / "real")
    folder.parent.symlink_to("real")


def hard_link(folder: Path) -> None:
    os.link(folder.parent.parent / KEY, folder / "leak.png")


def hard_link_of_linked_key(folder: Path) -> None:
    """Link a key into the data folder; the keys themselves lie elsewhere, behind a symbolic link."""
    keys = folder.parent.parent / "keys"
    keys.rename(keys.with_name("medium"))
    keys.mkdir()
    (keys / "all").symlink_to("../medium")
    (keys / "loop").symlink_to(".")
    os.link(keys.with_name("medium") / "online/models.pem", folder / "leak.png")


def unix_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        present = Path.cwd()
        os.chdir(folder)  # the address of a socket must be short
        server.bind("listening.png")
        os.chdir(present)


def device(folder: Path) -> None:
    try:
        os.mknod(folder / "null.png", 0o20600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device needs root")


def not_utf8(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/b\xe4r.png")).write_bytes(b"x")


def not_utf8_folder(folder: Path) -> None:
    deep = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\x1b"))
    deep.mkdir()
    (deep / "a.png").write_bytes(b"x")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "link to a key": (link("leak.png", f"../../{KEY}"), f"{DATA}/leak.png is a link"),
    "absolute link": (link("leak.png", "/etc/hostname"), f"{DATA}/leak.png is a link"),
    "link that stays inside": (link("again.png", "000.png"), f"{DATA}/again.png is a link"),
    "link deep inside": (link("deep/again.png", "../000.png"), f"{DATA}/deep/again.png is a link"),
    "link to nowhere": (link("gone.png", "nowhere.png"), f"{DATA}/gone.png is a link"),
    "link to itself": (link("loop.png", "loop.png"), f"{DATA}/loop.png is a link"),
    "link to the folder around it": (link("deep/loop", ".."), f"{DATA}/deep/loop is a link"),
    "link with a name for terminals": (link("\x1b[31m\n\u202egnp.a", "000.png"), f"{DATA}/\\x1b[31m\\n\\u202egnp.a is a link"),
    "linked folder": (
        linked_folder,
        f"{DATA}/more is a link, but data must be regular files; replace it by a copy of the file that it points to",
    ),
    "linked captions": (link(METADATA, f"../../{KEY}"), f"{DATA}/{METADATA} is a link"),
    "folder that is a link": (folder_elsewhere, f"{DATA} is a link"),
    "parent that is a link": (parent_elsewhere, "ws/data is a link"),
    "hard link to a key": (hard_link, f"{DATA}/leak.png is a hard link to a file in"),
    "hard link to a key behind a link": (hard_link_of_linked_key, f"{DATA}/leak.png is a hard link to a file in"),
    "socket": (unix_socket, f"{DATA}/listening.png is a socket"),
    "device": (device, f"{DATA}/null.png is a device"),
    "name that is not UTF-8": (not_utf8, f"{DATA}/b\\xe4r.png has a name that is not UTF-8; rename it"),
    "folder's name that is not UTF-8": (not_utf8_folder, f"{DATA}/\\xff\\x1b has a name that is not UTF-8; rename it"),
    "repository inside": (file(".git/HEAD"), f"{DATA}/.git/HEAD has a name that Git or DVC reserve"),
    "repository deep inside": (file("deep/er/.git"), f"{DATA}/deep/er/.git has a name that Git or DVC reserve"),
    "Mercurial's": (file(".hg/store"), f"{DATA}/.hg/store has a name that Git or DVC reserve"),
    "DVC's settings": (file("deep/.dvc/config", ""), f"{DATA}/deep/.dvc/config has a name that Git or DVC reserve"),
    "what DVC leaves out": (file(".dvcignore", "*.png"), f"{DATA}/.dvcignore has a name that Git or DVC reserve"),
    "what DVC leaves out below": (file("deep/.dvcignore", ""), f"{DATA}/deep/.dvcignore has a name that Git or DVC reserve"),
    "DVC's pointer": (file("deep/a.dvc"), f"{DATA}/deep/a.dvc has a name that Git or DVC reserve"),
    "DVC's stages": (file("dvc.yaml"), f"{DATA}/dvc.yaml has a name that Git or DVC reserve"),
}  # fmt: skip


@pytest.mark.parametrize("what", few(HOSTILE, 20))
def test_what_no_revision_can_hold_is_refused_by_name(root: Path, what: str) -> None:
    make, says = HOSTILE[what]
    make(root / DATA)
    assert_refused(root, says)


@pytest.mark.parametrize("key", ["online/models.pem", "offline/root-1.pem", "online/ledger.pem"])
def test_copy_of_a_key_is_refused(root: Path, key: str) -> None:
    shutil.copyfile(root / "keys" / key, root / DATA / "leak.png")
    assert_refused(root, "leak.png in the data is a copy of a private key in", "add")


@pytest.mark.parametrize("name", ["pipe.png", "deep/pipe", METADATA])
def test_pipe_holds_nothing_up(root: Path, name: str) -> None:
    path = root / DATA / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    before = recorded(root)
    for words in (["data", "add", "shapes"], ["data", "status", "shapes"], ["retrain", "shapes"]):
        command = [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(root), *words]
        told = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (told.returncode, told.stdout) == (3, "")
        assert told.stderr == f"ferry: {root}/{DATA}/{name} is a pipe, but data must be regular files; remove it\n"
    assert recorded(root) == before


@pytest.mark.parametrize("name", ["shapes.dvc", "shapes.arrival.json", ".gitignore"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_files_beside_the_folder_are_not_written_through(root: Path, name: str, kind: str) -> None:
    path = root / "data" / name
    path.unlink()
    path.symlink_to(f"../{KEY}") if kind == "link" else os.mkfifo(path)
    assert_refused(root, f"data/{name} is a {kind}", "add")


@pytest.mark.parametrize(
    ("where", "content"), [(".dvcignore", "dim-*.png"), ("data/.dvcignore", "dim-*.png"), (".dvcignore", "data"), ("data/.dvcignore", "*")]
)  # fmt: skip
def test_file_that_dvc_would_leave_out_is_named(root: Path, where: str, content: str) -> None:
    (root / where).write_text(content)
    left_out = "dim-000.png" if content.startswith("dim") else "000.png"
    assert_refused(root, f"DVC would leave out {root}/{DATA}/{left_out}, because of a .dvcignore", "add")
    code, out, _ = ferry(root, "status", "shapes")
    assert (code, "added (1): dim-000.png" in out) == (0, True)
    (root / where).write_text("# nothing")
    assert ferry(root, "add", "shapes")[0] == 0


def test_folder_that_dvc_takes_for_a_repository_is_named(root: Path) -> None:
    """Name such a folder: even an empty `.dvc` makes DVC leave out all that lies beside it."""
    (root / DATA / "deep/.dvc").mkdir(parents=True)
    (root / DATA / "deep/a.png").write_bytes(b"x")
    assert_refused(root, f"DVC would leave out {root}/{DATA}/deep/a.png, because of a .dvcignore or a folder named .dvc", "add")


def without_rights() -> None:
    """Drop root's right to read and write everything, in a child process."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; it fails for an ordinary user, who needs no drop


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dim-000.png", METADATA, "deep", "."])
def test_what_cannot_be_read_is_named(root: Path, name: str) -> None:
    """Name what cannot be read, instead of skipping it or printing a traceback."""
    file("deep/er/a.png")(root / DATA)
    path, before = root / DATA / name, recorded(root)
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        for command in ("add", "status"):
            words = [sys.executable, "-m", "flows.cli", "--quiet", "-w", str(root), "data", command, "shapes"]
            told = subprocess.run(words, capture_output=True, text=True, preexec_fn=without_rights)
            assert (told.returncode, told.stdout) == (3, "")
            assert told.stderr == f"ferry: {path} cannot be read (Permission denied); check the path and who may read it\n"
    finally:
        path.chmod(mode)
    assert recorded(root) == before


NAMES = [
    "line\nfeed.png", "\x1b[31mred.png", "carriage\rreturn.png", "back\\slash.png", "-rf", "--all/-x.png", "x" * 255, "ä.png", "a\u0308.png",
    "A.png", "a.png", " ", "end ", "...", "~", "$HOME", "%41.png", "*", "[a].png", "a:b", "s3:/a.png", 'quote".png', "\u202egnp.a", ".gitignore",
    "deep/.gitignore", ".gitattributes", "dvc.lock", "CON", "日本/語.png", "\N{GRINNING FACE}.png",
]  # fmt: skip


def test_every_other_name_is_recorded_and_delivered(root: Path, tmp_path: Path) -> None:
    """Keep names apart that differ only in case or in Unicode normalisation."""
    for i, name in enumerate(NAMES):
        file(name, f"* {i}")(root / DATA)
    there = bytes_below(root / DATA)
    assert set(NAMES) < there.keys()
    code, out, err = ferry(root, "add", "shapes", "--json")
    assert code == 0
    assert json.loads(out)["files"] == len(there)
    assert all(line.isprintable() for line in err.splitlines())  # their names are printed, but without control characters
    assert "30 files: is not named in metadata.jsonl: \\x1b[31mred.png, " in err
    version = versions.resolve(root, DATA, "shapes")
    shutil.rmtree(root / ".dvc/cache")
    assert bytes_below(versions.pull(root, version, tmp_path / "out")) == there
    assert set(versions.files(root, version)) == set(there)
    assert versions.missing(root, version) == []
    code, out, _ = ferry(root, "status", "shapes")
    assert (code, "unchanged" in out.splitlines()[0]) == (0, True)
    assert all(line.isprintable() for line in out.splitlines())
    code, out, _ = ferry(root, "diff", "shapes", "HEAD~1")
    assert code == 0
    assert f"added ({len(NAMES) + 1}): " in out
    assert all(line.isprintable() for line in out.splitlines())


def test_captions_and_messages_move_no_cursor(root: Path) -> None:
    with (root / DATA / METADATA).open("a") as metadata:
        metadata.write(json.dumps({"file_name": "\x1b[2J.png", "text": "x"}) + "\n")
        metadata.write(json.dumps({"file_name": "new.png", "text": "\x1b[2Jbar"}) + "\n")
    shutil.copyfile(root / DATA / "000.png", root / DATA / "new.png")
    code, out, err = ferry(root, "add", "shapes", "-m", "\x1b[2J first line\nsecond")
    assert code == 0
    for text in (
        out,
        err,
        *(ferry(root, *words)[1] for words in (["log", "shapes"], ["status", "shapes"], ["diff", "shapes", "HEAD~1"])),
    ):
        assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b[2J.png is missing" in err
    assert "\\x1b[2J first line second" in ferry(root, "log", "shapes")[1]


@pytest.mark.parametrize("message", ["", "# not a comment", "\udcff", "x" * 200_000])
def test_any_message_will_do(root: Path, message: str) -> None:
    assert ferry(root, "add", "shapes", "-m", message)[0] == 0
    rows = json.loads(ferry(root, "log", "shapes", "--json")[1])["revisions"]
    assert [row["message"] for row in rows] == [message.encode(errors="replace").decode(), "first"]


@pytest.mark.parametrize("name", ["\ud800.png", "a\0b.png", "", ".", "deep", "x" * 300, "000.png/"])
def test_captions_of_impossible_files_are_listed(root: Path, name: str) -> None:
    file("deep/a.png")(root / DATA)
    with (root / DATA / METADATA).open("a") as metadata:
        metadata.write(json.dumps({"file_name": name, "text": "bar"}) + "\n")
    code, out, err = ferry(root, "add", "shapes", "--json")
    assert code == 0
    assert len(json.loads(out)["unusable"]) == 2  # deep/a.png has no caption
    assert all(line.isprintable() for line in err.splitlines())
    assert versions.is_dirty(root, DATA) is False


def swapped(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def leaked(path: Path) -> None:
    path.unlink()
    path.symlink_to(f"../../{KEY}")


def gone(path: Path) -> None:
    path.unlink()


def arrived(path: Path) -> None:
    shutil.copyfile(path, path.with_name("late.png"))


def captioned(path: Path) -> None:
    with path.with_name(METADATA).open("a") as metadata:
        metadata.write("\n")


CHANGES = [(swapped, "001.png"), (leaked, "001.png"), (gone, "001.png"), (arrived, "late.png"), (captioned, METADATA)]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_file_that_changes_after_it_was_checked_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str
) -> None:
    report = revisions._reported

    def meanwhile(*arguments: Any) -> Any:
        change(root / DATA / "001.png")
        return report(*arguments)

    monkeypatch.setattr(revisions, "_reported", meanwhile)
    assert_refused(root, f"{DATA}/{name} " + ("is a link" if change is leaked else "changed while it was checked"), "add")
    monkeypatch.setattr(revisions, "_reported", report)
    if change is leaked:
        (root / DATA / "001.png").unlink()
    assert ferry(root, "add", "shapes")[0] == 0
    assert versions.files(root, versions.resolve(root, DATA, "shapes")) == hashes(root / DATA)


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_file_that_changes_under_dvc_reaches_neither_remote_nor_git(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str
) -> None:
    added, seen = versions._added, []

    def meanwhile(repo: Any, folder: Path, no_commit: bool = False) -> dict[str, str]:
        found = added(repo, folder, no_commit)
        if no_commit and not seen:
            seen.append(change(folder / "001.png"))
        return found

    monkeypatch.setattr(versions, "_added", meanwhile)
    before = recorded(root)
    code, _, err = ferry(root, "add", "shapes")
    assert (code, f"{DATA}/{name} changed while it was checked; repeat" in err) == (3, True)
    after = recorded(root)
    assert all(before[where] == after[where] for where in ("remote", "git", "index", "beside", "keys"))


def test_bytes_that_change_while_dvc_copies_them_are_not_sent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send no changed bytes: the cache then holds other bytes than the name of the object says."""
    added = versions._added
    secret = (root / KEY).read_bytes()

    def meanwhile(repo: Any, folder: Path, no_commit: bool = False) -> dict[str, str]:
        found = added(repo, folder, no_commit)
        if not no_commit:
            path = Path(repo.cache.local.oid_to_path(found["dim-000.png"]))
            path.chmod(0o644)
            path.write_bytes(secret)
        return found

    monkeypatch.setattr(versions, "_added", meanwhile)
    before = recorded(root)
    code, _, err = ferry(root, "add", "shapes")
    assert (code, "did not have the recorded bytes of dim-000.png and is deleted; repeat" in err) == (3, True)
    after = recorded(root)
    assert all(before[where] == after[where] for where in ("remote", "git", "index", "beside", "keys"))
    assert secret not in after["cache"].values()


def test_what_dvc_remembers_does_not_hide_a_change(root: Path, tmp_path: Path) -> None:
    """Detect other bytes under the same name, size, times and inode."""
    path = root / DATA / "dim-000.png"
    assert ferry(root, "add", "shapes")[0] == 0
    first, times = versions.resolve(root, DATA, "shapes"), path.stat()
    content = path.read_bytes()[:-1] + b"?"
    with path.open("r+b") as opened:
        opened.write(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, out, _ = ferry(root, "status", "shapes")
    assert (code, "changed (1): dim-000.png" in out) == (0, True)
    assert ferry(root, "add", "shapes")[0] == 0
    second = versions.resolve(root, DATA, "shapes")
    assert first.md5 != second.md5
    assert (versions.pull(root, second, tmp_path / "out") / "dim-000.png").read_bytes() == content


def test_remote_that_cannot_be_written_leaves_no_trace(root: Path) -> None:
    shutil.rmtree(root / "dvc-remote")
    (root / "dvc-remote").write_text("a file where the folder was")
    before = recorded(root)
    assert ferry(root, "add", "shapes")[0] == 3
    after = recorded(root)
    assert all(before[where] == after[where] for where in ("remote", "git", "index", "beside"))
    (root / "dvc-remote").unlink()
    assert ferry(root, "add", "shapes")[0] == 0
    assert versions.missing(root, versions.resolve(root, DATA, "shapes")) == []


def test_data_are_never_replaced_by_links(root: Path) -> None:
    """Leave the user's files as they are, even if DVC is configured to link files to its cache."""
    config = root / ".dvc/config"
    config.write_text(config.read_text() + "[cache]\n    type = symlink,hardlink\n")
    before = {path: (path.stat().st_ino, path.stat().st_mode) for path in (root / DATA).iterdir()}
    assert ferry(root, "add", "shapes")[0] == 0
    assert {path: (path.lstat().st_ino, path.lstat().st_mode) for path in (root / DATA).iterdir()} == before
    assert ferry(root, "status", "shapes")[0] == 0
    pulled = versions.pull(root, versions.resolve(root, DATA, "shapes"), root / "work/data")
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in pulled.iterdir())


def test_library_refuses_links_too(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "x", 40)
    (folder / "again.png").symlink_to("000.png")
    for look in (
        lambda: scan(folder, 24),
        lambda: prepare(folder, CONFIG, tmp_path / "cache"),
        lambda: versions.folder_md5(folder),
    ):
        with pytest.raises(DataError, match=r"again\.png is a link"):
            look()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", ["../ws/data/shapes", "./data/shapes", "data/shapes/", "data//shapes", "data/./shapes", "", "."])
def test_way_that_is_not_plain_is_refused(root: Path, path: str) -> None:
    before = recorded(root)
    with pytest.raises(DataError, match="is not written as a folder below"):
        versions.add(root, path, "shapes", "elsewhere")
    assert recorded(root) == before


def test_copy_of_a_file_in_the_cache_is_no_key(root: Path) -> None:
    """Allow hard links that lead to no key, because a file system that saves space may make them."""
    os.link(root / DATA / "000.png", root / "elsewhere.png")
    assert ferry(root, "add", "shapes")[0] == 0


def test_message_shows_names_as_they_are_written() -> None:
    assert shown("Füße 日本 \N{GRINNING FACE}.png") == "Füße 日本 \N{GRINNING FACE}.png"
    assert shown("a\x1b\n\x85\u202e\udcff\ud800") == r"a\x1b\n\x85\u202e\xff\ud800"


def test_md5_is_that_of_the_bytes(root: Path) -> None:
    assert hashes(root / DATA) == {name: hashlib.md5(content).hexdigest() for name, content in bytes_below(root / DATA).items()}
    with pytest.raises(RevisionError, match="changed while it was checked"):
        versions.add(root, DATA, "shapes", "m", None, hashes(root / DATA) | {"000.png": "0" * 32})
