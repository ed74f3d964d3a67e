"""Files that a user names: written whole or not at all, never over what must not be lost, and no other file is touched."""

from __future__ import annotations

import os
import re
import resource
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.settings import NOT_DATA
from flows.workspace import Workspace
from ota import output
from ota.agent import cli as agent
from ota.errors import OperatorError

WAS, IS = b"what was there before", b"what is written"


def write(path: Path, data: bytes = IS) -> None:
    with output.fresh(path) as file:
        file.write(data)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode", "expected"), [(0o022, 0o666, 0o644), (0o077, 0o666, 0o600), (0o002, 0o640, 0o640)])
def test_new_file_has_its_content_and_the_bits_that_the_umask_leaves(tmp_path, umask, mask, mode, expected):
    umask(mask)
    with output.fresh(tmp_path / "out", mode) as file:
        file.write(IS)
        file.seek(0)
        assert file.read(4) == IS[:4]
    assert (tmp_path / "out").read_bytes() == IS
    assert bits(tmp_path / "out") == expected
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize(("before", "after"), [(0o600, 0o600), (0o664, 0o664), (0o4755, 0o755)])
def test_replaced_file_hands_on_its_bits_and_its_other_name_keeps_its_content(tmp_path, umask, before, after):
    (tmp_path / "out").write_bytes(WAS)
    (tmp_path / "out").chmod(before)
    (tmp_path / "other name").hardlink_to(tmp_path / "out")
    with output.fresh(tmp_path / "out") as file:
        (written,) = set(names_in(tmp_path)) - {"out", "other name"}
        assert not bits(tmp_path / written) & ~after  # nor may anybody else read it while it is written
        file.write(IS)
    assert (tmp_path / "out").read_bytes() == IS
    assert bits(tmp_path / "out") == after
    assert (tmp_path / "other name").read_bytes() == WAS


def test_owner_of_a_replaced_file_stays(tmp_path):
    if os.geteuid():
        pytest.skip("only root may give files away")
    (tmp_path / "out").write_bytes(WAS)
    os.chown(tmp_path / "out", 1234, 4321)
    write(tmp_path / "out")
    found = (tmp_path / "out").stat()
    assert (found.st_uid, found.st_gid) == (1234, 4321)


@pytest.mark.parametrize("was_there", [True, False])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_block_that_fails(tmp_path, error, was_there):
    """Pass on the block's own error unchanged: an OSError of the block is about what it read."""
    if was_there:
        (tmp_path / "out").write_bytes(WAS)

    def fail() -> None:
        with output.fresh(tmp_path / "out") as file:
            file.write(IS * 10_000)
            raise error("own")

    with pytest.raises(error, match="own"):
        fail()
    assert names_in(tmp_path) == ["out"] * was_there
    if was_there:
        assert (tmp_path / "out").read_bytes() == WAS


def test_no_name_that_can_be_guessed_is_touched(tmp_path):
    beside = {name: f"precious {name}".encode() for name in ("out.tmp", ".out.tmp", "out.part", ".out", "out~", ".tmp", "tmp")}
    for name, content in beside.items():
        (tmp_path / name).write_bytes(content)
    names = set()
    for _ in range(2):
        with output.fresh(tmp_path / "out") as file:
            (name,) = set(names_in(tmp_path)) - set(beside) - {"out"}
            names.add(name)
            file.write(IS)
    assert len(names) == 2
    assert all(re.fullmatch(r"\.[0-9a-f]{32}\.tmp", name) for name in names)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == beside | {"out": IS}


def special(folder: Path, kind: str) -> Path:
    """Make something in a folder that is no regular file, and return its path."""
    path = folder / "out"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        if os.geteuid():
            return Path("/dev/null")
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    else:
        (folder / "victim").write_bytes(WAS)
        path.symlink_to({"link to a file": "victim", "link to nothing": "nowhere", "link to a device": "/dev/null"}[kind])
    return path


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "link to a file", "link to nothing", "link to a device"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, kind):
    path = special(tmp_path, kind)
    before, names = os.lstat(path), names_in(tmp_path)
    for refusing in (output.check, write):
        with pytest.raises(
            OperatorError, match=f"is a {kind.split()[0]} and not a regular file, so it stays as it is; name another"
        ):
            refusing(path)
    assert names_in(tmp_path) == names
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_rdev, after.st_size) == (
        before.st_ino, before.st_mode, before.st_rdev, before.st_size,
    )  # fmt: skip
    assert "victim" not in names or (tmp_path / "victim").read_bytes() == WAS


@pytest.mark.parametrize("name", [".", "..", "/", "/dev/stdout", "/dev/fd/1"])
def test_names_of_no_file_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OperatorError, match="name another place"):
        output.check(Path(name))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["link to a file", "pipe", "folder"])
def test_what_comes_while_the_file_is_written_is_not_replaced(tmp_path, kind):
    with pytest.raises(OperatorError, match="not a regular file"), output.fresh(tmp_path / "out"):
        special(tmp_path, kind)
    assert names_in(tmp_path) == ["out", "victim"][: 1 + (kind == "link to a file")]
    assert not stat.S_ISREG(os.lstat(tmp_path / "out").st_mode)
    assert kind != "link to a file" or (tmp_path / "victim").read_bytes() == WAS


@pytest.mark.parametrize("how", ["itself", "hard link", "link as input", "another way to its folder"])
def test_input_is_refused_as_output_whatever_its_name(tmp_path, how):
    given = tmp_path / "in"
    given.write_bytes(WAS)
    path = given
    if how == "hard link":
        path = tmp_path / "out"
        path.hardlink_to(given)
    elif how == "link as input":
        given = tmp_path / "leads to it"
        given.symlink_to(path)
    elif how == "another way to its folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        path = tmp_path / "folder" / "in"
    with pytest.raises(OperatorError, match=r"is the same file as the input .*; name another place"):
        output.check(path, [tmp_path / "nowhere", None, given])
    assert (tmp_path / "in").read_bytes() == WAS


def test_check_lets_pass_what_can_be_written_and_writes_nothing(tmp_path):
    (tmp_path / "out").write_bytes(WAS)
    (tmp_path / "in").write_bytes(WAS)
    for path in (tmp_path / "out", tmp_path / "new"):
        output.check(path, [tmp_path / "in", None, tmp_path / "nowhere"])
    assert names_in(tmp_path) == ["in", "out"]
    assert (tmp_path / "out").read_bytes() == WAS


@pytest.mark.parametrize("folder", ["nowhere", "file"])
def test_folder_that_is_none_is_named(tmp_path, folder):
    (tmp_path / "file").write_bytes(WAS)
    for refusing in (output.check, write):
        with pytest.raises(OperatorError, match=f"{folder} is not a folder; make it, or name another place"):
            refusing(tmp_path / folder / "out")
    assert (tmp_path / "file").read_bytes() == WAS


AS_NOBODY = """
import os, sys
from pathlib import Path
from ota import output
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for refusing in (output.check, lambda path: output.fresh(path).__enter__()):
    try:
        refusing(Path(sys.argv[1]))
    except output.OperatorError as error:
        print(error)
"""


def as_nobody(path: Path) -> str:
    """Return what a user without root's rights is told."""
    script = AS_NOBODY if not os.geteuid() else re.sub(r"(?m)^os\.set.*$", "", AS_NOBODY)
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert not done.stderr
    return done.stdout


def test_what_is_protected_is_refused_before_the_work():
    """Refuse a protected file, even in a folder in which it could be replaced."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "out").write_bytes(WAS)
        (folder / "out").chmod(0o444)
        folder.chmod(0o777)
        said = "{} is protected against writing; name another place, or change its permissions\n"
        assert as_nobody(folder / "out") == 2 * said.format(folder / "out")
        folder.chmod(0o555)
        denied = f"{folder / 'new'} cannot be written: Permission denied; name another place\n"
        assert as_nobody(folder / "new") == said.format(folder) + denied
        assert (folder / "out").read_bytes() == WAS
        assert names_in(folder) == ["out"]


def test_file_that_grows_too_large_leaves_nothing(tmp_path):
    """Fail in the middle of a write, as on a full disk."""
    (tmp_path / "out").write_bytes(WAS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OperatorError, match=r"out cannot be written: File too large; name another place"):
            write(tmp_path / "out", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == WAS


def test_full_disk_is_named(tmp_path):
    done = subprocess.run(
        ["unshare", *(["--mount"] if not os.geteuid() else ["--user", "--map-root-user", "--mount"]), sys.executable, "-c", (
            "import os, subprocess, sys; from pathlib import Path; from ota import output\n"
            "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=100k', 'none', sys.argv[1]], check=True)\n"
            "Path(sys.argv[1], 'out').write_bytes(b'before')\n"
            "try:\n"
            "    with output.fresh(Path(sys.argv[1], 'out')) as file: file.write(bytes(1 << 20))\n"
            "except output.OperatorError as error: print(error, os.listdir(sys.argv[1]), Path(sys.argv[1], 'out').read_bytes())"
        ), tmp_path], capture_output=True, text=True,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs a mount namespace")
    said = f"the disk is full, so {tmp_path}/out is not written; make room, or name another place ['out'] b'before'\n"
    assert done.stdout == said, done.stderr


@pytest.mark.parametrize("name", [b"-o", b"two\nlines", b"\xff\xfe not UTF-8", b"x" * 255, b" ", b"\xc3\xa4", b"out.tmp"])
def test_any_name_will_do(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    write(path)
    assert {os.fsencode(p.name): p.read_bytes() for p in tmp_path.iterdir()} == {name: IS}
    assert output.shown(path).isprintable()


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    with output.fresh(tmp_path / "out") as first, output.fresh(tmp_path / "out") as second:
        first.write(b"first" * 10_000)
        second.write(b"second" * 10_000)
    assert (tmp_path / "out").read_bytes() == b"first" * 10_000
    assert names_in(tmp_path) == ["out"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    seen = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"file of {os.fstat(descriptor).st_size}")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *a, **k: seen.append("rename") or rename(*a, **k))
    write(tmp_path / "out", b"x" * 1000)
    assert seen == ["file of 1000", "rename", "folder"]


def test_folder_that_is_moved_away_keeps_the_file(tmp_path):
    (tmp_path / "here").mkdir()
    with output.fresh(tmp_path / "here" / "out") as file:
        (tmp_path / "here").rename(tmp_path / "there")
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "out").write_bytes(WAS)
        file.write(IS)
    assert (tmp_path / "there" / "out").read_bytes() == IS
    assert (tmp_path / "here" / "out").read_bytes() == WAS


def test_descriptors_are_closed(tmp_path):
    before = names_in(Path("/proc/self/fd"))
    write(tmp_path / "out")
    with pytest.raises(ValueError, match="own"), output.fresh(tmp_path / "out"):
        raise ValueError("own")
    with pytest.raises(OperatorError):
        output.check(tmp_path)
    assert names_in(Path("/proc/self/fd")) == before


# A place that a person chose


def plant(root: Path) -> dict[str, bytes]:
    """Make the records of a workspace and of an agent inside it; return the content of each."""
    (root / "data" / "shapes").mkdir(parents=True)
    for name in ("keys", "own", "published", "device/queue", ".git", "inbox"):
        (root / name).mkdir(parents=True)
    records = (
        "ferry.db", "ferry.db-wal", "mlflow.db", "root.json", "own/metadata.jsonl", "own.dvc", "data/shapes/a.png", "keys/keys.json",
        "published/1.root.json", ".git/HEAD", "inbox/report.json", "other.db", "device/device.key", "device/state.json",
        "device/queue/1.json",
    )  # fmt: skip
    for name in records:
        (root / name).write_bytes(WAS)
    text = 'schema = 2\n[stores]\ndatabase = "sqlite:///other.db"\n[lines.shapes]\ndata = "own"\n'
    (root / "ferry.toml").write_text(text)
    return {name: (root / name).read_bytes() for name in (*records, "ferry.toml")}


def test_chosen_output_never_replaces_a_record_of_a_workspace_or_an_agent(tmp_path):
    kept = plant(tmp_path / "w")
    (tmp_path / "link").symlink_to(tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    for name in kept:
        for root in (tmp_path / "w", tmp_path / "link", tmp_path / "w" / "keys" / ".."):
            with pytest.raises(
                OperatorError,
                match=r"is (kept|a folder of data|a record).* so it is not replaced; name another place, such as page",
            ):
                output.check_chosen(root / name, "page", records=workspace.records)
    with pytest.raises(OperatorError, match="not replaced"):
        output.check_chosen(tmp_path / "w" / "keys" / "new", "page")
    for name in ("report.html", "kit.zip", "device/image.png", "inbox.html"):
        output.check_chosen(tmp_path / "w" / name, "page", records=workspace.records)
    output.check_chosen(tmp_path / "ferry.db", "page", records=workspace.records)
    assert {name: (tmp_path / "w" / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("name", ["other.db", "keys/keys.json", "ferry.toml"])
def test_chosen_output_is_no_second_name_of_a_record(tmp_path, name):
    plant(tmp_path / "w")
    (tmp_path / "page.html").hardlink_to(tmp_path / "w" / name)
    with pytest.raises(OperatorError, match="not replaced"):
        output.check_chosen(tmp_path / "page.html", "page", records=Workspace(tmp_path / "w").records)


@pytest.mark.parametrize(
    "words",
    [
        ["report", "-o", "?"], ["explain", "shapes", "--caption", "bar", "-o", "?"], ["poc", "shapes", "-o", "?"],
        ["report", "--poc", "nowhere.json", "-o", "?"], ["delta", "build", "nowhere", "nowhere", "-o", "?"],
        ["delta", "apply", "nowhere", "nowhere", "-o", "?"], ["trust", "sign", "root", "--out", "?"],
        ["trust", "rotate", "root", "--out", "?"], ["trust", "delegate", "shapes", "--out", "?"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_command_of_ferry_writes_its_file_over_a_record(tmp_path, words):
    kept = plant(tmp_path)
    done = CliRunner().invoke(app, ["-w", str(tmp_path), *(str(tmp_path / "root.json") if w == "?" else w for w in words)])
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1)
    assert "root.json is kept by a workspace, so it is not replaced; name another place, such as" in done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("words", [["-o", "state.json"], ["-o", "image.png", "--trace", "queue/1.json"]], ids=" ".join)
def test_agent_writes_no_image_over_its_own_records(tmp_path, monkeypatch, capsys, words):
    kept = plant(tmp_path)
    monkeypatch.chdir(tmp_path / "device")
    assert agent.call(["generate", "bar", "--dir", ".", *words]) == 3
    assert "kept by an agent's directory, so it is not replaced" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_names_of_a_workspace_are_those_that_no_data_folder_may_have():
    assert NOT_DATA - {"report.html", "explain.html", "dvc"} <= {*output.WORKSPACE}
