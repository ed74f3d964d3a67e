"""Serve the published repository: whole files and single ranges, with an ETag.

The file is opened once. All that an answer says comes from that one open file, so an answer is consistent even if somebody
replaces the file meanwhile. Nothing is served but regular files below `FOLDERS`, and no link is followed below the repository.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from ota.limits import KiB

FOLDERS = ("metadata", "targets", "objects")
MUTABLE = "metadata/timestamp.json"
"""The only published name that may later hold other content."""
IMMUTABLE, CHECKED, NEVER = "public, max-age=31536000, immutable", "no-cache", "no-store"
PIECE = 256 * KiB  # bytes that are read at a time
_SEGMENT = re.compile(r"[A-Za-z0-9_@+=~-][A-Za-z0-9._@+=~-]{0,254}")
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class UnreadableError(Exception):
    """A published file that this process cannot read, such as one of another user."""


@dataclass(frozen=True)
class Part:
    """What of a file is sent."""

    status: int
    first: int
    length: int


def is_published(path: str) -> bool:
    """Check whether a path, without the leading slash, can be that of a published file."""
    parts = path.split("/")
    return len(parts) > 1 and parts[0] in FOLDERS and all(_SEGMENT.fullmatch(part) for part in parts)


def open_file(folder: str, path: str) -> int | None:
    """Open a published file; None: there is no such regular file.

    Args:
        folder: of the repository; it may be a link.
        path: that `is_published`.

    Raises:
        UnreadableError: it is there and cannot be read.
    """
    *above, name = path.split("/")
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in above:
            try:
                below = os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=at)
            finally:
                os.close(at)
            at = below
        try:
            file = os.open(name, _OPEN, dir_fd=at)
        finally:
            os.close(at)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):  # ENXIO: a socket
            return None
        raise UnreadableError(f"{path}: {error.strerror}") from error
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return None


def etag_of(found: os.stat_result) -> str:
    """Return the ETag of a file: its size, and when it was written; copies that keep the time have the same one."""
    return f'"{found.st_size:x}-{found.st_mtime_ns:x}"'


def is_known(etag: str, if_none_match: str | None) -> bool:
    """Check whether `If-None-Match` names an ETag; it is compared weakly, as RFC 9110 says."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or etag in {part.strip().removeprefix("W/") for part in if_none_match[:4096].split(",")}


def part_of(size: int, etag: str, asked: str | None, if_range: str | None) -> Part:
    """Decide what is sent of a file.

    Several ranges, other units and malformed ranges get the whole file, which RFC 9110 allows: nobody needs them, and many small
    ranges would cost more than the file.

    Args:
        size: bytes of the file.
        etag: its ETag.
        asked: the header Range.
        if_range: the header If-Range; a date never matches, because no dates are sent.
    """
    found = _RANGE.fullmatch(asked.replace(" ", "")) if asked else None
    if not found or (if_range is not None and if_range.strip() != etag):
        return Part(200, 0, size)
    first, last, suffix = found.groups()
    if suffix is not None:
        length = min(int(suffix), size)
        return Part(206, size - length, length) if length else Part(416, 0, 0)
    if int(first) >= size:
        return Part(416, 0, 0)
    if last and int(last) < int(first):
        return Part(200, 0, size)
    end = min(int(last) + 1, size) if last else size
    return Part(206, int(first), end - int(first))


class Repository:
    """ASGI application that serves the published folder."""

    def __init__(self, folder: str) -> None:
        """Name the folder; it is looked up anew for each request, so it may be replaced."""
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - a request's body is not read
        """Give one answer."""
        path = scope["path"][1:]
        if scope["method"] not in ("GET", "HEAD"):
            await _say(send, 405, "only GET and HEAD", [(b"allow", b"GET, HEAD")])
            return
        try:
            file = open_file(self._folder, path) if is_published(path) else None
        except UnreadableError as error:
            await _say(send, 503, f"the gateway cannot read {error}; check who may read it", [(b"retry-after", b"60")])
            return
        if file is None:
            await _say(send, 404, "there is no such file")
            return
        try:
            await _answer(scope, send, file, path)
        finally:
            os.close(file)


async def _answer(scope: Scope, send: Send, file: int, path: str) -> None:
    found = os.fstat(file)
    etag = etag_of(found)
    given: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        if name in (b"if-none-match", b"range", b"if-range"):
            given[name] = value.decode("latin-1")
    headers = [
        (b"etag", etag.encode()), (b"cache-control", (CHECKED if path == MUTABLE else IMMUTABLE).encode()),
        (b"x-content-type-options", b"nosniff"),
    ]  # fmt: skip
    if is_known(etag, given.get(b"if-none-match")):
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    part = part_of(found.st_size, etag, given.get(b"range"), given.get(b"if-range"))
    if part.status == 416:
        await _say(send, 416, "the file ends before", [(b"content-range", f"bytes */{found.st_size}".encode())])
        return
    headers += [
        (b"accept-ranges", b"bytes"), (b"content-length", str(part.length).encode()),
        (b"content-type", b"application/json" if path.endswith(".json") else b"application/octet-stream"),
    ]  # fmt: skip
    if part.status == 206:
        headers.append((b"content-range", f"bytes {part.first}-{part.first + part.length - 1}/{found.st_size}".encode()))
    await send({"type": "http.response.start", "status": part.status, "headers": headers})
    if scope["method"] == "HEAD" or not part.length:
        await send({"type": "http.response.body", "body": b""})
        return
    await _send_bytes(send, file, part)


async def _send_bytes(send: Send, file: int, part: Part) -> None:
    """Send a part of an open file; if somebody shortens the file in place, the connection breaks off, as the client must see."""
    at, end = part.first, part.first + part.length
    while at < end:
        count = min(PIECE, end - at)
        # A small piece is in the page cache or comes at once; a thread for it would cost more than the read.
        whole = count <= PIECE // 4
        piece = os.pread(file, count, at) if whole else await asyncio.to_thread(os.pread, file, count, at)
        if not piece:
            raise OSError(errno.EIO, "the file became shorter while it was served")
        at += len(piece)
        await send({"type": "http.response.body", "body": piece, "more_body": at < end})


async def _say(send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = f"{text}\n".encode()
    more = [
        (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()),
        (b"cache-control", NEVER.encode()), (b"x-content-type-options", b"nosniff"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), *more]})
    await send({"type": "http.response.body", "body": body})
