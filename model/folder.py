"""Rules for data folders: they may contain only regular files and folders, with names that every tool in the chain supports.

A link could bring a private key into the data, reading a pipe never ends, and a name that is not UTF-8 cannot stand in a list of
files. Such entries are refused by name before anything is read. They are never skipped, because a file that is not recorded would
be lost silently.
"""

from __future__ import annotations

import hashlib
import os
import stat
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath

from model.errors import DataError

DVCS_OWN = frozenset({".git", ".hg", ".dvc", ".dvcignore", "dvc.yaml"})  # names that DVC ignores, obeys, or takes for its own
KINDS = {stat.S_IFLNK: "link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


def shown(text: object) -> str:
    r"""Format text for a terminal: characters that are not printable become escapes, such as \x1b."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # Python reads a byte that is not UTF-8 as 0xDC00 + byte
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def entries(folder: Path) -> dict[str, os.stat_result]:
    """List every file below a folder by name, sorted, with its status.

    Raises:
        DataError: an entry is neither a regular file nor a folder, has a name that is not UTF-8, or cannot be read.
    """
    found: dict[str, os.stat_result] = {}
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        try:
            with os.scandir(folder / parent) as rows:
                for row in rows:
                    name, info = parent + row.name, row.stat(follow_symlinks=False)
                    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
                        raise _special(folder / name, info)
                    try:
                        name.encode()
                    except UnicodeEncodeError:
                        raise DataError(f"{shown(folder / name)} has a name that is not UTF-8; rename it") from None
                    if stat.S_ISDIR(info.st_mode):
                        waiting.append(f"{name}/")
                    else:
                        found[name] = info
        except OSError as error:
            raise unreadable(error, folder / parent) from error
    return dict(sorted(found.items()))


def _special(path: Path, info: os.stat_result) -> DataError:
    kind = KINDS.get(stat.S_IFMT(info.st_mode), "special file")
    remedy = "replace it by a copy of the file that it points to" if kind == "link" else "remove it"
    return DataError(f"{shown(path)} is a {kind}, but data must be regular files; {remedy}")


def unreadable(error: OSError, path: Path) -> DataError:
    """Build the error for a file or folder that the system does not let us read."""
    return DataError(
        f"{shown(error.filename or path)} cannot be read ({error.strerror or error}); check the path and who may read it"
    )


def inside(root: Path, path: str) -> Path:
    """Join a root folder and a relative path, and check that no part of the path is a link.

    Args:
        root: folder in which the path begins; it may itself be reached through links.
        path: relative path of a folder; the folder need not exist.

    Raises:
        DataError: the path leads outside or is not in its simplest form, or a part of it is a link or not a folder.
    """
    if PurePosixPath(path).as_posix() != path or PurePosixPath(path).is_absolute() or {".", ".."} & {*path.split("/")}:
        raise DataError(f"{shown(path)} is not written as a folder below {shown(root)}; write it as data/surfaces")
    place = root
    for part in Path(path).parts:
        place /= part
        try:
            info = place.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unreadable(error, place) from error
        if stat.S_ISLNK(info.st_mode):
            raise DataError(f"{shown(place)} is a link, but the data must be stored at that path; move the folder itself there")
        if not stat.S_ISDIR(info.st_mode):
            raise DataError(f"{shown(place)} is not a folder; move it away")
    return place


def opened(path: Path) -> BufferedReader:
    """Open a regular file for reading, without following a link or waiting for a pipe in its place.

    Raises:
        DataError: it is not a regular file.
        OSError: it is missing or cannot be read.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        if path.is_symlink():
            raise _special(path, path.lstat()) from None
        raise
    info = os.fstat(number)
    if not stat.S_ISREG(info.st_mode):
        os.close(number)
        raise _special(path, info)
    return os.fdopen(number, "rb")


def md5_of(file: BufferedReader | BytesIO) -> str:
    """Compute the md5 of the rest of an open file, in hexadecimal digits."""
    return hashlib.file_digest(file, "md5").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """List every file below a folder by name, sorted, with the md5 of its bytes.

    Raises:
        DataError: for the same reasons as in `entries`, or a file cannot be read.
    """
    found = {}
    for name in entries(folder):
        try:
            with opened(folder / name) as file:
                found[name] = md5_of(file)
        except OSError as error:
            raise unreadable(error, folder / name) from error
    return found


def check(root: Path, path: str) -> Path:
    """Refuse a data folder that a revision could not hold completely.

    Args:
        root: the workspace.
        path: the data folder, relative to it.

    Returns:
        the folder.

    Raises:
        DataError: the folder is missing, or something in it cannot be recorded; the message names it.
    """
    folder = inside(root, path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {shown(folder)}; put the images there, or name another one")
    for name in entries(folder):
        if name.endswith(".dvc") or DVCS_OWN & {*name.split("/")}:
            raise DataError(f"{shown(folder / name)} has a name that Git or DVC reserve; rename it, or remove it")
    return folder


def check_apart(folder: Path, keys: Path) -> None:
    """Refuse a data folder that contains a hard link to a file below the folder `keys`, under any name.

    Raises:
        DataError: it contains one.
    """
    linked = {(info.st_dev, info.st_ino): name for name, info in entries(folder).items() if info.st_nlink > 1}
    if both := linked.keys() & _identities(keys) if linked else ():
        name = min(linked[one] for one in both)
        raise DataError(f"{shown(folder / name)} is a hard link to a file in {shown(keys)}; take it away")


def check_no_copy(files: dict[str, str], keys: Path) -> None:
    """Refuse data that contain a copy of a private key, under any name.

    Args:
        files: name → md5.
        keys: folder below which the keys lie as .pem files.

    Raises:
        DataError: they contain one.
    """
    secret = set()
    for path in keys.rglob("*.pem"):
        try:
            with opened(path) as file:
                secret.add(md5_of(file))
        except (OSError, DataError):  # a key that this user cannot read was not copied by this user
            continue
    for name, md5 in files.items():
        if md5 in secret:
            raise DataError(f"{shown(name)} in the data is a copy of a private key in {shown(keys)}; take it away")


def _identities(folder: Path) -> set[tuple[int, int]]:
    """Collect device and inode of every file below a folder, following links."""
    found, seen = set[tuple[int, int]](), set[tuple[int, int]]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent).stat()
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        for name in names:
            try:
                info = Path(parent, name).stat()
            except OSError:  # a link to nowhere
                continue
            found.add((info.st_dev, info.st_ino))
    return found
