"""What `doctor` looks at below the agent: the clock, the file system, temporary folders, and who owns what."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ota.agent import clock, rules, window
from ota.agent.disk import FILES_NEEDED
from ota.agent.state import Home, OwnerError
from ota.errors import TrustError

Level = Literal["ok", "warn", "fail"]
LATE = 3600  # seconds that a clock may be behind without a warning
WORKPLACES = ("slots", "incoming", "queue", "metadata")  # folders in which unfinished files are written
TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - they are only looked at
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Finding:
    """One result of a check."""

    about: str
    level: Level
    text: str


def directory(home: Home) -> Iterator[Finding]:
    """Check who owns the agent's directory, and that files can be made, linked and synced in it."""
    config, found = home.config(), home.root.stat()
    yield Finding("directory", "ok", f"{home.root}: {config.device}, {config.line}/{config.device_class}")
    try:
        home.check_owner()
    except OwnerError as error:
        yield Finding("directory", "fail", f"{error}; what this check says holds only for this user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding("directory", "fail", f"users other than its owner may write to {home.root}; run `chmod 700 {home.root}`")
    others = [path for path in sorted(home.root.rglob("*")) if path.lstat().st_uid != found.st_uid]
    if others:
        yield Finding(
            "directory", "fail",
            f"{len(others)} files in {home.root} are not its owner's, such as {others[0].relative_to(home.root)}, so the "
            f"agent cannot use them; run `chown -R --reference={home.root} {home.root}`",
        )  # fmt: skip
    closed = [path for path in (home.root, *map(home.disk.path, WORKPLACES)) if path.exists() and not _open(path)]
    if closed:
        yield Finding(
            "directory", "fail", f"this user may not write {closed[0]}; run the agent as its owner, on a disk that can be written"
        )
    else:
        yield from _links(home.root)
    yield from temporary()


def _open(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _links(folder: Path) -> Iterator[Finding]:
    """Make a symbolic link, as python-tuf does for the newest root, and sync the folder, as every change of the agent does."""
    probe = folder / f"doctor-{os.getpid()}.tmp"  # if the power is cut here, the next update removes it
    try:
        probe.symlink_to("nothing")
    except OSError as error:
        if error.errno in NO_LINKS:
            yield Finding(
                "directory", "fail",
                f"the file system of {folder} takes no symbolic links ({error.strerror}), which the metadata cache needs; move the folder to "
                "another one, such as ext4, and give it with --dir",
            )  # fmt: skip
        elif error.errno not in (errno.ENOSPC, errno.EDQUOT):  # `room` reports these
            yield Finding("directory", "fail", f"nothing can be made in {folder}: {error.strerror}; check the disk")
    finally:
        with suppress(OSError):
            probe.unlink()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        yield Finding(
            "directory", "fail",
            f"the file system of {folder} cannot sync a folder ({error.strerror}), so no update would survive a power cut; move the folder to "
            "another one, such as ext4, and give it with --dir",
        )  # fmt: skip
    finally:
        os.close(descriptor)


def temporary() -> Iterator[Finding]:
    """Check that a temporary file can be made where this process would make it. The agent makes none, so this is no failure."""
    named = [(name, os.environ[name]) for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)][:1]
    problems = []
    for name, folder in named or [("", folder) for folder in TEMPORARY]:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            problems.append(f"{folder}{f', which {name} names' if name else ''}: {error.strerror}")
        else:
            return
    yield Finding(
        "directory", "warn",
        f"no temporary file can be written ({'; '.join(problems)}); the agent itself needs none, but other programs do; "
        f"{'set another folder' if named else 'make room there, or mount a folder that can be written'}",
    )  # fmt: skip


def inodes(home: Home) -> Iterator[Finding]:
    """Check that the file system can hold the files that an update makes."""
    left = home.disk.files_free()
    if left is not None and left < FILES_NEEDED:
        yield Finding(
            "room", "fail",
            f"the file system of {home.root} can hold {left} more files (inodes), and an update needs {FILES_NEEDED}; remove files, even if "
            "there are free bytes",
        )  # fmt: skip


def time_of_day(home: Home) -> Iterator[Finding]:
    """Hold the clock against the day of the agent's build and against all signed times that are known here."""
    now, marks = int(time.time()), home.high_water()
    if problem := window.problem(home.config().window):
        yield Finding("clock", "fail", f"the maintenance window never opens: {problem}, with `ferry-agent init`")
    clock.check_built(now)
    root, timestamp = _newest_root(home), _signed(home, "metadata/timestamp.json", "timestamp")
    if root and now < root.at - clock.SLACK:
        yield Finding(
            "clock",
            "fail" if root.said else "warn",
            f"the clock says {_day(now)}, before the root was signed, {_day(root.at)}; set the clock",
        )
        return
    latest = max([marks.signed, *(found.at for found in (root, timestamp) if found and found.counts(now))])
    try:
        rules.check_clock(now, latest)
    except TrustError as error:
        yield Finding("clock", "fail", str(error))
        return
    if now < latest - LATE:
        hours = (latest - now) // 3600
        yield Finding(
            "clock",
            "warn",
            f"the clock is {hours} hours behind the last time seen; set it, because from 24 on nothing is installed",
        )
    elif root and now > root.until:
        yield Finding(
            "clock", "fail",
            f"the clock says {_day(now)}, {(now - latest) // 86_400} days after the newest signed time, and the root that is known here ended on "
            f"{_day(root.until)}; set the clock if it is ahead; otherwise the next update must find a newer root",
        )  # fmt: skip
    elif timestamp and now > timestamp.until:
        yield Finding(
            "clock", "warn",
            f"the clock says {_day(now)}, {(now - latest) // 86_400} days after the newest signed time, {_day(latest)}; set the clock if it is "
            "ahead; otherwise this device has not updated, or nobody has signed, since then",
        )  # fmt: skip
    else:
        here = datetime.fromtimestamp(now).astimezone().isoformat(timespec="minutes")
        yield Finding("clock", "ok", f"{here}, not behind what was seen before")


def _day(seconds: int) -> str:
    return f"{datetime.fromtimestamp(min(seconds, 2**37), UTC):%Y-%m-%d}"


def _newest_root(home: Home) -> clock.Signed | None:
    """Return the times of the newest root here; the cache may be lost, and then the anchor counts."""
    found = [times for name in ("root.json", "metadata/root.json") if (times := _signed(home, name, "root"))]
    return max(found, key=lambda times: times.at, default=None)


def _signed(home: Home, name: str, role: str) -> clock.Signed | None:
    """Read when a metadata file was signed; what is torn or missing says nothing."""
    try:
        fields: dict[str, Any] = json.loads(home.disk.read(name) or b"")["signed"]
        return clock.signed(
            role, datetime.strptime(fields["expires"], clock.FORM).replace(tzinfo=UTC), fields.get(clock.SIGNED_AT)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
