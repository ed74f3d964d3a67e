"""All writes of the agent to its own directory, except python-tuf's cache and the lock file, which may be lost at any moment.

The promise of each method holds after a power cut at any later moment: a replaced file is complete, with its old or its new
content; a renamed folder exists, with all that was synced in it. Names are relative to the agent's directory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ota.errors import RoomError, StateError

FILES_NEEDED = 64  # files that the file system must be able to hold before an update: a bundle, metadata, reports and marks


class Disk:
    """Durable changes below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Return the path of a name, for reading."""
        return self.root / name

    def read(self, name: str) -> bytes | None:
        """Read a small file; return None if it does not exist.

        A file that the disk can no longer read (EIO) counts as empty, and so as damaged.

        Raises:
            StateError: this user may not read the file. It is not damaged, and nothing may be assumed in its place.
        """
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise StateError(
                f"cannot read {self.root / name}: {error.strerror}; run the agent as the directory's owner, who must own "
                "everything in it"
            ) from error

    def replace(self, name: str, data: bytes, durable: bool = True) -> None:
        """Replace a file's content atomically; it is durable on return or, without `durable`, once its folder is synced.

        Raises:
            RoomError: the disk is full.
            StateError: the file cannot be written.
        """
        fresh = f"{name}.tmp"
        with self.writing(fresh) as file:
            file.write(data)
        self.rename(fresh, name, durable)

    @contextmanager
    def writing(self, name: str, append: bool = False) -> Iterator[BinaryIO]:
        """Open a file for writing; it is synced if the block ends without an error. Its name is durable only after `rename`."""
        with self._errors(name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
            with os.fdopen(os.open(self.root / name, flags, 0o600), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())

    def rename(self, name: str, to: str, durable: bool = True) -> None:
        """Rename a file or folder within the directory; durable on return or, without `durable`, once its folder is synced."""
        with self._errors(to):
            (self.root / name).replace(self.root / to)
            if durable:
                self._sync_folder((self.root / to).parent)

    def make_folder(self, name: str, durable: bool = True) -> None:
        """Make a folder and its parents; durable on return or, without `durable`, once the folder above is synced."""
        with self._errors(name):
            missing = [p for p in ((self.root / name), *(self.root / name).parents) if not p.exists()]
            (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in reversed(missing) if durable else ():
                self._sync_folder(path.parent)

    def sync_folder(self, name: str) -> None:
        """Make the names in a folder durable."""
        with self._errors(name):
            self._sync_folder(self.root / name)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all it holds; do nothing if there is none."""
        with self._errors(name):
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def tidy(self, name: str) -> None:
        """Remove the unfinished files and slots that a killed process left in a folder."""
        folder = self.root / name
        with self._errors(name):
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in paths:
            if path.suffix == ".tmp" or (path.name.startswith(".") and name != "."):  # at the top a shell may keep hidden files
                self.remove(f"{name}/{path.name}")

    def free(self) -> int:
        """Return the number of bytes that can still be written."""
        with self._errors("."):
            found = os.statvfs(self.root)
            return found.f_bavail * found.f_frsize

    def files_free(self) -> int | None:
        """Return how many more files the file system can hold; None: it has no such limit."""
        with self._errors("."):
            found = os.statvfs(self.root)
            return found.f_favail if found.f_files else None

    @staticmethod
    def _sync_folder(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _full_of_files(self) -> bool:
        try:
            found = os.statvfs(self.root)
        except OSError:
            return False
        return bool(found.f_files) and found.f_favail == 0 and found.f_bavail > 0

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC and self._full_of_files():
                raise RoomError(
                    f"the file system of {self.root} can hold no more files (inodes); remove some, and the next update resumes"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RoomError(f"the disk of {self.root} is full; make room, and the next update resumes") from error
            raise StateError(
                f"cannot write {self.root / name}: {error.strerror}; check the directory's owner and the disk"
            ) from error


def read_uncached(path: Path) -> Iterator[bytes]:
    """Read a synced file in pieces, from the disk and not from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := file.read(1 << 20):
            yield piece
