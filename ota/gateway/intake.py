"""What happens to a batch of reports before the writer gets it: its size, its form, who sent it, its quota, its signatures.

Whatever costs more is checked later: the size before the form, the device before any signature. A signature costs 65 µs, which is
checked where the request is, because the library holds Python's lock meanwhile and a thread would only add the change of threads.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from ota.errors import ManifestError
from ota.fleet.register import Known
from ota.fleet.store import Arrived
from ota.gateway.metrics import Metrics
from ota.report import MAX_BATCH, MOST_REPORTS, Opened, Refusal, open_line

MOST_FORWARDED = 1_000  # reports of one request of a program that forwards them
_GZIP = 16 + zlib.MAX_WBITS
_REASONS = {
    "signature": "the report is not signed by the key that the factory has of this device",
    "line": "the device is enrolled for another line or class",
    "retired": "the device is retired",
}


class RefusedError(Exception):
    """A request that is answered with an error; nothing of it was acknowledged."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        """Take the HTTP status, a word for programs, a sentence for people, and when to come back, in seconds."""
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class Room:
    """Bytes of bodies that all requests together hold at this moment."""

    def __init__(self, most: int) -> None:
        """Set the limit in bytes."""
        self._most, self.held = most, 0

    def take(self, size: int) -> None:
        """Hold more bytes.

        Raises:
            RefusedError: 429, too many are held.
        """
        if self.held + size > self._most:
            raise RefusedError(429, "busy", "too many reports arrive at this moment; send them again later", 10)
        self.held += size

    def give_back(self, size: int) -> None:
        """Hold fewer bytes."""
        self.held -= size


@dataclass
class Batch:
    """The reports of one device in a request."""

    known: Known
    arrived: list[Arrived] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    size: int = 0
    """Bytes of the lines in `arrived`."""


async def unpacked(chunks: AsyncIterator[bytes], encoding: str, room: Room) -> bytes:
    """Read a body as it comes, and unpack it; what is too large is noticed at the first byte too many.

    Args:
        chunks: the body as it is sent.
        encoding: gzip or identity.
        room: where its bytes are held while it is read; the caller gives back the length of what is returned.

    Raises:
        RefusedError: 413, it is too large, as it is sent or unpacked; 400, it is not gzip, or was cut off; 429, there is no room.
    """
    unzip = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
    parts: list[bytes] = []
    sent = size = 0
    too_large = RefusedError(413, "too_large", f"a batch may have at most {MAX_BATCH} bytes, as it is sent and unpacked")
    try:
        async for chunk in chunks:
            sent += len(chunk)
            if sent > MAX_BATCH:
                raise too_large
            try:
                part = unzip.decompress(chunk, MAX_BATCH + 1 - size) if unzip else chunk
            except zlib.error as error:
                raise RefusedError(400, "malformed", "the body is not gzip, although its header says so") from error
            if size + len(part) > MAX_BATCH or (unzip and unzip.unconsumed_tail):
                raise too_large
            room.take(len(part))
            size += len(part)
            parts.append(part)
        if unzip and (not unzip.eof or unzip.unused_data):
            raise RefusedError(400, "malformed", "the gzip data were cut off, or something follows them")
    except BaseException:
        room.give_back(size)
        raise
    return b"".join(parts)


def lines_of(body: bytes, forwarded: bool) -> list[bytes]:
    """Split a body into lines.

    Raises:
        RefusedError: 400, it holds none; 413, it holds too many.
    """
    most = MOST_FORWARDED if forwarded else MOST_REPORTS
    lines = [line for line in body.split(b"\n", 4 * most) if line.strip()]
    if not lines:
        raise RefusedError(400, "malformed", "the body holds no report")
    if len(lines) > most:
        raise RefusedError(413, "too_large", f"a batch may hold at most {most} reports")
    return lines


async def parsed(
    lines: list[bytes], known: Mapping[str, Known], forwarded: bool, metrics: Metrics
) -> tuple[dict[str, list[Opened]], list[str]]:
    """Parse lines; return the reports of each known device, and the ids of unknown ones.

    Lines that are no reports are only counted, because nobody knows their numbers. The first report of an unknown device ends it all,
    so a flood of ids that somebody made up costs one parsed line for each request.

    Raises:
        RefusedError: 400, no line is a report, or a device sends reports of another one; 403, the device is not enrolled.
    """
    found: dict[str, list[Opened]] = {}
    for at, line in enumerate(lines):
        if at and at % MOST_REPORTS == 0:  # let others in between
            await asyncio.sleep(0)
        try:
            one = open_line(line.removesuffix(b"\r"))
        except ManifestError:
            metrics.reports.add("malformed")
            continue
        device = one.report.device
        if not forwarded and device not in known:
            metrics.unenrolled.add()
            raise RefusedError(
                403,
                "unenrolled",
                "this device is not enrolled; enrol it with `ferry-agent enroll`, its reports stay in its queue",
            )
        found.setdefault(device, []).append(one)
        if len(found) > 1 and not forwarded:
            raise RefusedError(400, "malformed", "only a token with the role reporter may send reports of several devices")
    if not found:
        raise RefusedError(400, "malformed", "no line of the body is a report")
    unknown = [device for device in found if device not in known]
    return {device: reports for device, reports in found.items() if device in known}, unknown


async def checked(known: Known, opened: list[Opened], metrics: Metrics) -> Batch:
    """Check the reports of a known device: its line and class, whether it is retired, and each signature."""
    batch = Batch(known)
    for at, one in enumerate(opened):
        code = ""
        if known.retired:
            code = "retired"
        elif known.line not in (None, one.report.line) or known.device_class not in (None, one.report.device_class):
            code = "line"
        else:
            if at and at % MOST_REPORTS == 0:
                await asyncio.sleep(0)
            metrics.verified.add()
            if not one.is_signed_by(known.public_key):
                code = "signature"
        if code:
            batch.refused.append(Refusal(number=one.report.number, code=code, reason=_REASONS[code]))
        else:
            batch.arrived.append(Arrived(one, known.public_key))
            batch.size += len(one.line)
    return batch
