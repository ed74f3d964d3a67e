"""`ferry delta` loses nothing: only its output changes, whole or not at all; input that cannot be read twice is refused.

After every refusal, the folder is compared with what was in it before: names, kinds, permission bits, content.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save
from typer.testing import CliRunner

from flows.cli import app
from ota import output
from ota.delta import encode, files
from ota.delta import format as container
from ota.errors import BaseError, DeltaError, OperatorError
from tests.conftest import few
from tests.test_delta_files import model

FERRY = Path(sys.executable).with_name("ferry")
RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(1500, 500)).astype(np.float32)  # makes three records
NEW = OLD + np.float32(1e-3) * RNG.normal(size=OLD.shape).astype(np.float32)
PRECIOUS = b"nobody has another copy of this"


def ferry(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def seen(folder: Path) -> dict[str, tuple[int, int, Any]]:
    """List what is in a folder: kind and permission bits, number of links, content."""

    def content(path: Path) -> Any:
        return path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {p.name: (p.lstat().st_mode, p.lstat().st_nlink, content(p)) for p in folder.iterdir()}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Write an old and a new file into an otherwise empty folder."""
    (tmp_path / "old").write_bytes(save({"w": OLD}))
    (tmp_path / "new").write_bytes(save({"w": NEW}))
    return tmp_path


@pytest.fixture
def patched(pair: Path) -> Path:
    files.build(pair / "old", pair / "new", pair / "patch")
    return pair


def special(folder: Path, kind: str) -> Path:
    path = folder / "special"
    if kind == "folder":
        path.mkdir()
        (path / "file").write_bytes(PRECIOUS)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif kind == "device":
        if os.geteuid():
            return Path("/dev/zero")
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "link":
        (folder / "precious").write_bytes(PRECIOUS)
        path.symlink_to("precious")
    return path


# Outputs

WRITING = {
    "build": ["build", "old", "new", "-o"],
    "apply": ["apply", "old", "patch", "-o"],
    "inspect": ["inspect", "patch", "--plot"],
}


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "link"])
@pytest.mark.parametrize("command", WRITING)
def test_output_that_is_no_regular_file_is_refused(patched, monkeypatch, command, kind):
    monkeypatch.chdir(patched)
    place = special(patched, kind)
    if command == "inspect":
        place = place.rename(place.with_suffix(".svg")) if place.parent == patched else place
    before = seen(patched)
    result = ferry("delta", *WRITING[command], place)
    assert result.exit_code == 3, result.output
    if place.parent == patched:
        assert f"is a {kind} and not a regular file, so it stays as it is; name another place" in result.stderr
    assert seen(patched) == before


INPUTS = [
    (["build", "old", "new", "-o"], ["old", "new"]),
    (["build", "old.bin", "new.bin", "--graph", "new.onnx", "--old-graph", "old.onnx", "-o"], ["old.bin", "new.bin", "new.onnx", "old.onnx"]),
    (["apply", "old", "patch", "-o"], ["old", "patch"]),
    (["inspect", "patch.svg", "--of", "new.svg", "--from", "old.svg", "--plot"], ["patch.svg", "new.svg", "old.svg"]),
]  # fmt: skip


@pytest.mark.parametrize("how", few(["itself", "hard link", "link", "through a folder's link"], 2))
@pytest.mark.parametrize(("arguments", "given"), INPUTS, ids=lambda value: value[0])
def test_input_is_no_output_whatever_its_name(patched, monkeypatch, arguments, given, how):
    monkeypatch.chdir(patched)
    for name in ("old", "new", "patch"):
        (patched / f"{name}.svg").write_bytes((patched / name).read_bytes())
    for name, values in (("old", OLD), ("new", NEW)):
        raw = 15, list(values.shape), values.tobytes()
        (patched / f"{name}.onnx").write_bytes(model({"w": (1, *raw[1:])}, external="w.bin"))
        (patched / f"{name}.bin").write_bytes(values.tobytes())
    (patched / "folder").symlink_to(".")
    for name in given:
        place = Path(name)
        if how in ("hard link", "link"):
            place = Path(f"other-{name}{'' if '.' in name else '.bin'}")
            place.hardlink_to(name) if how == "hard link" else place.symlink_to(name)
        elif how != "itself":
            place = Path("folder") / name
        before = seen(patched)
        result = ferry("delta", *arguments, place)
        assert result.exit_code == 3, result.output
        assert ("is a link and not a regular file" if how == "link" else "is the same file as the input") in result.stderr
        assert seen(patched) == before


@pytest.mark.parametrize("command", WRITING)
def test_folder_that_is_none_is_told_before_anything_is_read(pair, monkeypatch, command):
    """Name the missing folder first, even if an input is missing too."""
    monkeypatch.chdir(pair)
    (pair / "patch").write_bytes(b"no patch")
    before = seen(pair)
    result = ferry("delta", *WRITING[command], "nowhere/out.svg")
    assert result.exit_code == 3
    assert result.stderr == "ferry: nowhere is not a folder; make it, or name another place\n"
    assert seen(pair) == before


@pytest.mark.parametrize("command", ["build", "apply"])
def test_only_the_output_changes(patched, monkeypatch, command):
    """Change only the output, even beside files with names that others use for unfinished work."""
    monkeypatch.chdir(patched)
    for name in ("out.tmp", ".out.tmp", "out.part", ".out.part", "out~", "out.bak", "tmp"):
        (patched / name).write_bytes(PRECIOUS)
    (patched / "out.new").symlink_to("tmp")
    (patched / "out").write_bytes(b"the one before")
    (patched / "out").chmod(0o640)
    before = seen(patched)
    for _ in range(2):
        result = ferry("delta", *WRITING[command], "out")
        assert result.exit_code == 0, result.output
    after = seen(patched)
    made = after.pop("out")
    assert after == {name: row for name, row in before.items() if name != "out"}
    assert stat.S_IMODE(made[0]) == 0o640
    assert made[2] == (patched / ("patch" if command == "build" else "new")).read_bytes()


@pytest.mark.slow
def test_new_file_has_the_bits_that_the_umask_leaves(patched, monkeypatch):
    monkeypatch.chdir(patched)
    before = os.umask(0o027)
    try:
        for command, arguments in WRITING.items():
            assert ferry("delta", *arguments, f"{command}.svg").exit_code == 0
            assert stat.S_IMODE((patched / f"{command}.svg").stat().st_mode) == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize("was_there", [True, False])
@pytest.mark.parametrize("command", ["build", "apply"])
def test_full_disk_leaves_what_was_there(patched, monkeypatch, command, was_there):
    monkeypatch.chdir(patched)
    if was_there:
        (patched / "out").write_bytes(PRECIOUS)
    before, limit = seen(patched), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    try:
        result = ferry("delta", *WRITING[command], "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.exit_code == 3, result.output
    assert result.stderr == "ferry: out cannot be written: File too large; name another place\n"
    assert seen(patched) == before


@pytest.mark.parametrize("command", ["build", "apply", "inspect", "estimate"])
def test_interrupted_leaves_nothing_and_promises_nothing(patched, monkeypatch, command):
    monkeypatch.chdir(patched)
    (patched / "out.svg").write_bytes(PRECIOUS)
    calls = []

    def interrupted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if command not in ("build", "apply") or len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    where, what = {
        "build": (encode, "encode_group"), "apply": (container, "_numbers"), "inspect": (container, "read_header"),
        "estimate": (files, "elements"),
    }[command]  # fmt: skip
    real = getattr(where, what)
    monkeypatch.setattr(where, what, interrupted)
    before = seen(patched)
    result = ferry("delta", *(["estimate", "old", "new"] if command == "estimate" else [*WRITING[command], "out.svg"]))
    assert calls
    assert result.exit_code == 130
    assert result.stderr == "ferry: interrupted; nothing was written, repeat the command to begin again\n"
    assert seen(patched) == before


# Inputs

READING = [
    ["build", "?", "new", "-o", "out"], ["build", "old", "?", "-o", "out"], ["build", "old", "new", "--graph", "?", "-o", "out"],
    ["build", "old", "new", "--graph", "old", "--old-graph", "?", "-o", "out"], ["estimate", "?", "new"], ["estimate", "old", "?"],
    ["apply", "?", "patch", "-o", "out"], ["apply", "old", "?", "-o", "out"], ["inspect", "?"], ["inspect", "patch", "--of", "?"],
    ["inspect", "patch", "--from", "?"], ["inspect", "patch", "--of", "new", "--graph", "?"],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
@pytest.mark.parametrize("arguments", few(READING, 4), ids=" ".join)
def test_input_that_is_no_regular_file_is_refused(patched, monkeypatch, arguments, kind):
    """Refuse pipes and devices, which could be waited for without end; the alarm ends a test that waits."""
    monkeypatch.chdir(patched)
    place = special(patched, kind)
    before = seen(patched)

    def hang(*_: object) -> None:
        pytest.fail("it waits for what never comes")

    old_handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        result = ferry("delta", *(place if a == "?" else a for a in arguments))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
    assert result.exit_code == 3, result.output
    assert result.stderr == (
        f"ferry: {place} is a {kind} and not a regular file; copy its content into a regular file, and name that file\n"
    )
    assert seen(patched) == before


def test_standard_input_is_a_file_or_refused(pair, monkeypatch):
    """Refuse a pipe, which was once taken for an empty file: the patch then made nothing, with exit code 0."""
    monkeypatch.chdir(pair)
    before = seen(pair)
    words = [FERRY, "delta", "build", "old", "/dev/stdin", "-o", "out"]
    piped = subprocess.run(words, input=(pair / "new").read_bytes(), capture_output=True, check=False)
    assert piped.returncode == 3
    assert piped.stderr == (
        b"ferry: /dev/stdin is a pipe and not a regular file; copy its content into a regular file, and name that file\n"
    )
    assert seen(pair) == before
    with (pair / "new").open("rb") as file:
        subprocess.run(words, stdin=file, check=True, capture_output=True)
    files.apply(pair / "old", pair / "out", pair / "again")
    assert (pair / "again").read_bytes() == (pair / "new").read_bytes()


def test_file_whose_size_is_not_told_is_refused(pair, monkeypatch):
    """Refuse the kernel's own files: they have the size 0 and content, so a patch would make an empty file."""
    monkeypatch.chdir(pair)
    for arguments in (["build", "old", "/proc/version", "-o", "out"], ["build", "/proc/version", "new", "-o", "out"]):
        result = ferry("delta", *arguments)
        assert result.exit_code == 3, result.output
        assert "/proc/version gives" in result.stderr
        assert "copy it, and name the copy" in result.stderr
        assert not (pair / "out").exists()


def test_file_that_may_not_be_read_is_named(pair, monkeypatch):
    monkeypatch.chdir(pair)
    real = Path.open

    def denied(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "new":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", denied)  # root may read all there is
    result = ferry("delta", "build", "old", "new", "-o", "out")
    assert result.exit_code == 3
    assert result.stderr == "ferry: new cannot be read: Permission denied; check its name and who may read it\n"


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, 100_000)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"other")


CHANGES: dict[str, Callable[[Path], None]] = {
    "grows": grow, "shrinks": shrink, "is rewritten": rewrite, "vanishes": Path.unlink, "is emptied": lambda path: os.truncate(path, 0),
}  # fmt: skip


@pytest.mark.parametrize("moment", ["_safetensors", "follow", "plan", "encode_group"])
@pytest.mark.parametrize("change", few(CHANGES, 2))
@pytest.mark.parametrize("which", ["old", "new"])
def test_no_patch_of_a_file_that_changes_while_it_is_read(pair, monkeypatch, which, change, moment):
    monkeypatch.chdir(pair)
    (pair / "out").write_bytes(PRECIOUS)
    where = files if hasattr(files, moment) else encode
    real, done = getattr(where, moment), []

    def changed(*arguments: Any) -> Any:
        if not done:
            done.append(CHANGES[change](Path(which)))
        return real(*arguments)

    monkeypatch.setattr(where, moment, changed)
    result = ferry("delta", "build", "old", "new", "-o", "out")
    assert done
    assert result.exit_code == 3, (result.output, result.exception)
    assert result.stderr == f"ferry: {which} changed while it was read; repeat when nothing writes to it\n"
    assert sorted(p.name for p in pair.iterdir() if p.name != which) == sorted({"old", "new", "out"} - {which})
    assert (pair / "out").read_bytes() == PRECIOUS


def test_estimate_of_a_file_that_shrinks_is_refused(pair, monkeypatch):
    monkeypatch.chdir(pair)
    real = files.follow
    monkeypatch.setattr(files, "follow", lambda *a: shrink(pair / "new") or real(*a))
    result = ferry("delta", "estimate", "old", "new")
    assert result.exit_code == 3, (result.output, result.exception)


@pytest.mark.parametrize("change", ["shrinks", "is rewritten", "is emptied"])
def test_base_that_changes_makes_no_wrong_file(patched, monkeypatch, change):
    monkeypatch.chdir(patched)
    (patched / "out").write_bytes(PRECIOUS)
    real = container._check_base
    monkeypatch.setattr(container, "_check_base", lambda *a: (real(*a), CHANGES[change](patched / "old")))
    result = ferry("delta", "apply", "old", "patch", "-o", "out")
    assert result.exit_code == 3, (result.output, result.exception)
    assert (patched / "out").read_bytes() == PRECIOUS
    assert sorted(p.name for p in patched.iterdir()) == ["new", "old", "out", "patch"]


# Names


@pytest.mark.parametrize(
    "name", few([b"two\nlines", b"\xff\xfe", b"-o", b"-", b"--help", b" ", b"\xc3\xa4", b"\x1b[31m"], 4), ids=repr
)
def test_any_name_will_do(pair, monkeypatch, name):
    monkeypatch.chdir(pair)
    named = f"./{os.fsdecode(name)}"
    for side in ("old", "new"):
        (pair / side).rename(f"{named}.{side}")
    built = ferry("delta", "build", f"{named}.old", f"{named}.new", "-o", named)
    assert built.exit_code == 0, (built.output, built.exception)
    applied = ferry("delta", "apply", f"{named}.old", named, "-o", f"{named}.again")
    assert applied.exit_code == 0, (applied.output, applied.exception)
    for result in (built, applied, ferry("delta", "estimate", f"{named}.old", f"{named}.new")):
        assert result.stdout.count("\n") == 1
        assert result.stdout[:-1].isprintable()
    told = json.loads(ferry("delta", "build", f"{named}.old", f"{named}.new", "-o", named, "--json").stdout)
    assert os.fsencode(told["patch"]) == name
    assert Path(f"{named}.again").read_bytes() == Path(f"{named}.new").read_bytes()
    wrong = ferry("delta", "apply", f"{named}.new", named, "-o", named)
    assert wrong.exit_code == 3
    assert wrong.stderr.count("\n") == 1
    assert len(list(pair.iterdir())) == 4


@pytest.mark.parametrize("name", ["-", ""])
@pytest.mark.parametrize("arguments", few([*READING, *([*words, "?"] for words in WRITING.values())], 6), ids=" ".join)
def test_dash_is_no_file(patched, monkeypatch, arguments, name):
    """Refuse `-`, which elsewhere is standard input or output; a file of that name was once written or looked for."""
    monkeypatch.chdir(patched)
    before = seen(patched)
    result = ferry("delta", *(name if a == "?" else a for a in arguments))
    assert result.exit_code == 2
    assert "does not name a file; write ./- for a file that is called -" in " ".join(result.stderr.replace("│", " ").split())
    assert seen(patched) == before


# Resuming after a kill

KILLED = """
import os, signal, sys
from pathlib import Path
from ota.delta import files, format as container
real, calls = container._numbers, []
def numbers(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
container._numbers = numbers
files.apply(*map(Path, sys.argv[1:]))
"""


def killed(folder: Path, out: str = "out") -> Path:
    """Kill an apply in its third record and return the file that it leaves; its buffer holds two records at most."""
    done = subprocess.run([sys.executable, "-c", KILLED, "old", "patch", out], cwd=folder, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = [p for p in folder.iterdir() if p.name.startswith(".")]
    return left


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Provide a list that gets one entry for each record of numbers that is decoded."""
    calls: list[int] = []
    real = container._numbers
    monkeypatch.setattr(container, "_numbers", lambda *a: calls.append(1) or real(*a))
    return calls


def test_killed_apply_goes_on_and_leaves_nothing(patched, decoded):
    left = killed(patched)
    assert left.suffix == ".part"
    assert not (patched / "out").exists()
    assert stat.S_IMODE(left.stat().st_mode) == stat.S_IMODE((patched / "patch").stat().st_mode)
    files.apply(patched / "old", patched / "patch", patched / "out")
    assert len(decoded) == 1  # of three
    assert (patched / "out").read_bytes() == (patched / "new").read_bytes()
    assert sorted(p.name for p in patched.iterdir()) == ["new", "old", "out", "patch"]


@pytest.mark.parametrize(("damage", "decodes"), [("cut", 3), ("torn", 3), ("longer", 1), ("empty", 3), ("whole and more", 0)])
def test_what_is_left_is_verified(patched, decoded, damage, decodes):
    """Verify what is left, because a power cut may keep a file's length and lose its content."""
    left = killed(patched)
    content = left.read_bytes()
    half = len(content) // 2
    whole = (patched / "new").read_bytes() + b"more"
    left.write_bytes(
        {
            "cut": content[:half],
            "torn": content[:half] + bytes(len(content)),
            "longer": content * 9,
            "empty": b"",
            "whole and more": whole,
        }[damage]
    )
    files.apply(patched / "old", patched / "patch", patched / "out")
    assert len(decoded) == decodes
    assert (patched / "out").read_bytes() == (patched / "new").read_bytes()
    assert sorted(p.name for p in patched.iterdir()) == ["new", "old", "out", "patch"]


@pytest.mark.parametrize("other", ["output", "new", "old"])
def test_what_another_apply_left_is_not_touched(patched, decoded, other):
    left = killed(patched)
    out, expected = patched / "out", patched / "new"
    if other == "output":
        out = patched / "other"
    elif other == "new":
        (patched / "new").write_bytes(save({"w": NEW + 1}))
        files.build(patched / "old", patched / "new", patched / "patch")
    else:
        (patched / "old").write_bytes(save({"w": OLD + 1}))
        files.build(patched / "old", patched / "new", patched / "patch")
    decoded.clear()
    before = left.read_bytes()
    files.apply(patched / "old", patched / "patch", out)
    assert decoded
    assert out.read_bytes() == expected.read_bytes()
    assert left.read_bytes() == before


@pytest.mark.parametrize("kind", few(["link", "link to nothing", "hard link", "pipe", "folder", "socket", "another's"], 4))
def test_what_is_planted_in_its_place_is_neither_followed_nor_used(patched, monkeypatch, kind):
    monkeypatch.chdir(patched)
    left = killed(patched)
    content = left.read_bytes()
    left.unlink()
    if kind == "hard link":
        (patched / "precious").write_bytes(content)
        left.hardlink_to(patched / "precious")
    elif kind == "another's":
        if os.geteuid():
            pytest.skip("only root may give files away")
        left.write_bytes(content)
        os.chown(left, 1234, 1234)
    else:
        special(patched, kind).rename(left)
    before = seen(patched)
    files.apply(patched / "old", patched / "patch", patched / "out")
    after = seen(patched)
    assert after.pop("out")[2] == (patched / "new").read_bytes()
    assert after == before


def test_what_another_process_writes_to_is_left_to_it(patched):
    left = killed(patched)
    with left.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = left.read_bytes()
        files.apply(patched / "old", patched / "patch", patched / "out")
        assert left.read_bytes() == before
    assert (patched / "out").read_bytes() == (patched / "new").read_bytes()


@pytest.mark.parametrize("left_again", [False, True])
def test_result_that_took_its_place_is_not_written_to_again(patched, monkeypatch, left_again):
    """Leave a finished result alone.

    A second apply may have opened the unfinished file just before the first renamed it. A third may have left another one.
    """
    left = killed(patched)
    real, inner = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not inner:
            inner.append(1)
            files.apply(patched / "old", patched / "patch", patched / "out")
            inner.append((patched / "out").stat().st_ino)
            if left_again:
                left.write_bytes(b"")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with output.fresh(patched / "out", resume=resumed(patched)) as file:
        assert os.fstat(file.fileno()).st_ino != inner[1]
        assert file.read() == b""
        file.write((patched / "new").read_bytes())
    assert (patched / "out").read_bytes() == (patched / "new").read_bytes()


def resumed(folder: Path) -> str:
    with (folder / "patch").open("rb") as stream:
        header = container.read_header(stream)
    return f"{header.base} {header.target}"


@pytest.mark.parametrize("wrong", ["base", "patch", "no patch"])
def test_failed_apply_leaves_what_was_there(patched, wrong):
    (patched / "out").write_bytes(PRECIOUS)
    if wrong == "base":
        (patched / "old").write_bytes(b"another")
    elif wrong == "patch":
        data = bytearray((patched / "patch").read_bytes())
        data[len(data) // 2] ^= 1
        (patched / "patch").write_bytes(data)
    else:
        (patched / "patch").write_bytes(b"something else")
    before = seen(patched)
    with pytest.raises((DeltaError, BaseError)):
        files.apply(patched / "old", patched / "patch", patched / "out")
    assert seen(patched) == before


def test_killed_build_leaves_what_was_there_and_begins_again(pair):
    (pair / "out").write_bytes(PRECIOUS)
    script = KILLED.replace("format as container", "encode").replace("container._numbers", "encode.encode_group")
    script = script.replace("files.apply", "files.build")
    done = subprocess.run([sys.executable, "-c", script, "old", "new", "out"], cwd=pair, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (pair / "out").read_bytes() == PRECIOUS
    files.build(pair / "old", pair / "new", pair / "out")
    files.apply(pair / "old", pair / "out", pair / "again")
    assert (pair / "again").read_bytes() == (pair / "new").read_bytes()


def test_library_refuses_as_the_command_does(pair):
    with pytest.raises(OperatorError, match="is the same file as the input"):
        files.build(pair / "old", pair / "new", pair / "new")
    with pytest.raises(OperatorError, match="is a folder and not a regular file"):
        files.forecast(pair, pair / "new")
