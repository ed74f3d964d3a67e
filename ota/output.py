"""Files that a user names, outside the agent's directory: written completely or not at all, and never over an input or a link.

    >>> check(Path("patch"), inputs=[Path("old"), Path("new")])  # before the work; nothing is written yet
    >>> with fresh(Path("patch")) as file:
    ...     file.write(data)

Content is written to a new file with a random name. When the file is complete and synced, it takes its place. So nothing is
overwritten in part, no other file is touched, whatever its name, and if two processes write at once, one of them wins with a
complete file. A link is neither followed nor replaced, because both could destroy something that the user did not mean. A file
that a killed process left is used again only if the caller says so (`resume`), and only if it certainly belongs to this user.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ota.errors import OperatorError

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
DATABASE = ("", "-wal", "-shm", "-journal")  # endings of the files of an SQLite database
WORKSPACE = (
    "ferry.toml", *(name + end for name in ("ferry.db", "mlflow.db") for end in DATABASE), "root.json", "keys", "repository", "published", "dvc-remote", "mlartifacts", "mlruns", "features", "inbox", "reports-archive",
    "events", "ratings", "work", "data", ".git", ".gitignore", ".gitattributes", ".dvc", ".dvcignore",
)  # fmt: skip
AGENT = (
    "config.json", "root.json", "device.key", "number", "agent", "state.json", "state.prev.json", "resting.json", "measured.json",
    "highwater.json", "metadata", "slots", "incoming", "queue", "history.json", "undelivered.txt", "starting.json", "gateway.json",
    "dropped", "beat.json", "counts.json", "counting", "lock",
)  # fmt: skip
# A file that marks a folder → what such a folder is, and which names in it are its own.
_RECORDS = {"ferry.toml": ("a workspace", WORKSPACE), "device.key": ("an agent's directory", AGENT)}
_NEW = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def check(path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a place to which `fresh` cannot or must not write, before any work is done. Writes nothing.

    Args:
        path: where the file is to go.
        inputs: files from which it is made; None stands for an input that was not given.

    Raises:
        OperatorError: something other than a regular file is there, or one of the inputs, by this or another name; or permissions
            forbid writing to the file or its folder.
    """
    with _folder_of(path) as folder:
        there = _there(path, folder)
        _check_access(path.parent, folder, ".", os.W_OK | os.X_OK)
    for given in inputs:
        with suppress(OSError):  # the code that reads the input reports what is wrong with it
            if given and there and os.path.samestat(there, given.stat()):
                raise OperatorError(f"{shown(path)} is the same file as the input {shown(given)}; name another place")


def check_chosen(path: Path, instead: str | Path, inputs: Iterable[Path | None] = (), records: Iterable[Path] = ()) -> None:
    """Refuse a place that a person chose if it is one of the records of a workspace or an agent, or as `check` says. Writes nothing.

    Commands call this for each `--output`, before any work is done. A workspace or agent's directory is found by the folders above the
    place, so this also holds for a command that opens none.

    Args:
        path: where the file is to go.
        instead: a place that is free, for the error.
        inputs: as in `check`.
        records: more files and folders that stay as they are, such as those that the open workspace's settings name.

    Raises:
        OperatorError: the file is a record, lies in a folder of records, or is another name of a record; or as `check` says.
    """
    place = Path(os.path.realpath(path.parent), path.name)
    kept: list[tuple[Path, str]] = []
    for folder in place.parents:
        for mark, (owner, names) in _RECORDS.items():
            if os.path.lexists(folder / mark):
                kept += [(folder / name, f"kept by {owner}") for name in names]
        if os.path.lexists(f"{folder}.dvc"):
            kept.append((folder, "a folder of data that DVC keeps"))
    if place.suffix == ".dvc":
        kept.append((place, "kept by DVC"))
    kept += [(record, "a record that must stay") for record in records]
    for record, why in kept:
        if _leads_to(place, record):
            raise OperatorError(
                f"{shown(path)} is {why}, so it is not replaced; name another place, such as {shown(Path(instead))}"
            )
    check(path, inputs)


def _leads_to(place: Path, record: Path) -> bool:
    """Check whether a place is a record, lies in it, or is another name of the same file."""
    real = Path(os.path.realpath(record))
    if place.is_relative_to(record) or place.is_relative_to(real):
        return True
    try:
        found = place.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink == 1:
            return False
        if not real.is_dir():
            return os.path.samestat(found, real.stat())
        names = (Path(folder, name) for folder, _, files in os.walk(real) for name in files)
        return any(os.path.samestat(found, name.lstat()) for name in names)
    except OSError:  # nothing is there, or it goes away: there is no second name
        return False


@contextmanager
def fresh(path: Path, mode: int = 0o666, resume: str = "") -> Iterator[BinaryIO]:
    """Give the block a new file to write and read; it takes its place if the block succeeds, and is removed if it fails.

    On return its content and its name are on the disk. Only a kill or a power cut leaves it behind, as `.{32 hex digits}.tmp`, or
    `.part` if it can be resumed.

    Args:
        path: where the file goes; see `check`.
        mode: permission bits of a new file, less the umask. A file that replaces another gets that one's bits, and its owner if
            that is allowed.
        resume: text that identifies the inputs and the intended content, such as their hashes. The block may then get what a
            killed process left of the same file, and must verify it, because parts may be missing. "": always a new file.

    Raises:
        OperatorError: the file cannot be written there, or the disk is full; what was there before is still there. Other errors
            come from the block itself.
    """
    with _folder_of(path) as folder:
        there = _there(path, folder)
        bits = stat.S_IMODE(there.st_mode) & 0o777 if there else mode
        name, descriptor = f".{secrets.token_hex(16)}.tmp", -1
        try:
            if resume:
                left = f".{hashlib.sha256(f'{resume} {path.name!r}'.encode()).hexdigest()[:32]}.part"
                descriptor = _resumed(left, bits, folder)
                name = left if descriptor >= 0 else name
            if descriptor < 0:
                with _told(path):
                    descriptor = os.open(name, _NEW | os.O_EXCL, bits, dir_fd=folder)
            with io.BufferedRandom(_File(descriptor, path)) as file:
                yield file
                with _told(path):
                    file.flush()
                    there = _there(path, folder)
                    if there:
                        with suppress(PermissionError):
                            os.fchown(descriptor, there.st_uid, there.st_gid)
                        with suppress(PermissionError):
                            os.fchmod(descriptor, stat.S_IMODE(there.st_mode) & 0o777)
                    os.fsync(descriptor)
                    os.rename(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)  # while its lock is still held
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise
        with _told(path), suppress(PermissionError):  # a folder that may be written, but not read, cannot be synced
            synced = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
            try:
                os.fsync(synced)
            finally:
                os.close(synced)


def kind_of(found: os.stat_result) -> str:
    """Name what something is that is not a regular file, such as "a folder"."""
    return _KINDS.get(stat.S_IFMT(found.st_mode), "something else")


def shown(path: Path) -> str:
    """Format a path so that it can be printed in one line, whatever bytes it contains."""
    name = str(path)
    return name if name.isprintable() else repr(name)


class _File(io.FileIO):
    """A file that raises our own error if it cannot be written, so that it is not taken for an error of a file that is read."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "r+")
        self._path = path

    def write(self, data: Any) -> int:
        """Write data; a failure raises our own error."""
        with _told(self._path):
            return super().write(data)


def _resumed(name: str, bits: int, folder: int) -> int:
    """Open and lock a file of this name, which is new or was left by a killed process; -1: there can be none.

    No other process writes to the file, it belongs to this user, and it has no other name.
    """
    try:
        descriptor = os.open(name, _NEW, bits, dir_fd=folder)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found, named = os.fstat(descriptor), os.stat(name, dir_fd=folder, follow_symlinks=False)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if own and os.path.samestat(found, named):  # otherwise it was renamed or removed in the meantime
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return -1


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    """Open the folder that a file lies in; what is done with the descriptor is done there, even if the folder is moved."""
    with _told(path):
        descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _there(path: Path, folder: int) -> os.stat_result | None:
    """Look at the place of a file: return None if nothing is there, refuse all but a regular file that may be written."""
    with _told(path):
        try:
            found = os.stat(path.name or ".", dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
    if not stat.S_ISREG(found.st_mode):
        raise OperatorError(f"{shown(path)} is {kind_of(found)} and not a regular file, so it stays as it is; name another place")
    _check_access(path, folder, path.name, os.W_OK)
    return found


def _check_access(path: Path, folder: int, name: str, wanted: int) -> None:
    if not os.access(name, wanted, dir_fd=folder):
        raise OperatorError(f"{shown(path)} is protected against writing; name another place, or change its permissions")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OperatorError(f"the disk is full, so {shown(path)} is not written; make room, or name another place") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise OperatorError(f"{shown(path.parent)} is not a folder; make it, or name another place") from error
        raise OperatorError(f"{shown(path)} cannot be written: {error.strerror}; name another place") from error
