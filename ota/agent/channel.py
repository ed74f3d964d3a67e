"""The ways on which reports leave a device: a folder, or the factory's gateway over HTTPS.

A way takes a batch of signed lines and says what became of each report. It decides nothing about the queue.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import urllib3

from ota import output
from ota.agent import network
from ota.agent.line import FAULTS, Line, why
from ota.agent.network import LaterError, RefusedError
from ota.agent.transport import GAP_TIMEOUT, HungError, at_most, bare, timely, within
from ota.errors import OperatorError, TransferError
from ota.report import MAX_ANSWER, Answer, Refusal

MOUNT_SECONDS = 30.0  # seconds to wait for the reports folder, which may be a mount that hangs
POST_SECONDS = 60.0  # seconds for one request with its answer, whatever arrives
SHORTEST_WAIT = 60.0  # seconds, where a gateway that is too busy does not say how long to wait
BUSY = (429, 503)  # statuses of a gateway that took nothing and will take it later
PIECE = 16 * 1024  # bytes of an answer that are read at once
WHERE = "give --reports a folder, or an address that begins with https://; plain http serves only on this device itself"
ENROLL = "the factory does not know this device yet; run `ferry-agent enroll --token-file FILE` with a token of its operator"


@dataclass(frozen=True)
class Waiting:
    """A report in the queue."""

    number: int
    device: str
    line: bytes
    """The signed bytes that are sent."""


@dataclass(frozen=True)
class Receipt:
    """What became of a batch."""

    taken: frozenset[int]
    """Numbers that need not be sent again, because they are kept elsewhere, durably."""
    refused: tuple[Refusal, ...] = ()
    answer: Answer | None = None
    """What the gateway said; None: it is a folder, which says nothing."""
    proven: bool = False
    """Whether it is certain who said so: the answer came over TLS."""
    problem: str = ""
    """Why some reports of the batch are not taken."""


class Channel(Protocol):
    """A way on which reports leave the device. To add one, write this method, and choose it by its address in `channel_to`."""

    def deliver(self, batch: Sequence[Waiting]) -> Receipt:
        """Deliver reports of one device, durably, because their only other copies are removed next; twice is the same as once.

        Raises:
            HungError: nothing answers, so the next reports would wait as long.
            LaterError: the gateway asks to wait.
            TransferError: nothing was delivered.
        """

    def close(self) -> None:
        """Release open connections."""


def channel_to(address: str, authorities: str = "") -> Channel:
    """Return the channel that an address names.

    Args:
        address: a folder, or the base address of a gateway. A name, a password and a query in it are sent to that server only.
        authorities: PEM certificates of the authorities that are trusted; empty: those of the system.

    Raises:
        OperatorError: it is neither; reports sent to another kind of place would be lost silently.
    """
    place = place_of(address)
    return FolderChannel(place) if isinstance(place, Path) else Gateway(place, authorities)


def place_of(address: str) -> Path | network.Address:
    """Return the folder, or the gateway's address, that an address for reports names.

    Raises:
        OperatorError: it is neither, or it is plain http to another machine, where everybody on the way could forge answers.
    """
    try:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https"):
            url = urllib3.util.parse_url(address)
            if not (url.host or "").encode("idna") or url.port == 0 or url.fragment is not None:
                raise OperatorError(f"--reports is not a whole address; {WHERE}")
            if parts.scheme == "http" and not _is_here(url.host or ""):
                raise OperatorError(f"reports do not leave this device by plain http; {WHERE}")
            return network.Address.parse(address)
    except ValueError:
        raise OperatorError(f"--reports is not valid; {WHERE}") from None  # the foreign error may quote a password
    if parts.scheme not in ("", "file") or parts.netloc:
        raise OperatorError(f"reports cannot be left at such an address; {WHERE}")
    return Path(parts.path if parts.scheme else address)


def _is_here(host: str) -> bool:
    name = host.strip("[]").lower()
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


# A folder


class FolderChannel:
    """A folder, which may be a mount that hangs. A report becomes a file that is named by device and number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def deliver(self, batch: Sequence[Waiting]) -> Receipt:
        """Write each report into the folder; one that cannot be left there does not hold back the others."""
        taken, problem = set[int](), ""
        for report in batch:
            try:
                self._leave(f"{report.device}-{report.number:08d}.json", report.line)
            except HungError as error:  # the next ones would hang too, and the lock is held meanwhile
                if not taken:
                    raise
                problem = str(error)
                break
            except TransferError as error:  # something else may have taken this report's place, and not the next one's
                problem = problem or str(error)
            else:
                taken.add(report.number)
        return Receipt(frozenset(taken), problem=problem)

    def _leave(self, name: str, data: bytes) -> None:
        within(MOUNT_SECONDS, self._folder, lambda: _drop(data, self._folder, name))

    def close(self) -> None:
        """See `Channel.close`; a folder has no open connections."""


def missing(folder: Path) -> str:
    """Say that a folder does not exist. The agent does not make it: under an unmounted mount point nobody would find it."""
    return f"there is no folder {folder}; mount it or make it"


def _drop(data: bytes, folder: Path, name: str) -> None:
    """Write a report into a folder that others may write to; durable on return, because its only other copy is removed next."""
    try:
        if not folder.is_dir():
            raise TransferError(f"{missing(folder)}; the reports are kept and will be sent again")
        with output.fresh(folder / name) as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the agent's umask is: another user collects the file
            file.write(data)
    except (OSError, OperatorError) as error:
        reason = str((error.strerror if isinstance(error, OSError) else "") or error)
        if isinstance(error.__cause__, FileNotFoundError):  # the folder exists but takes no files, as in /proc
            reason = "no file can be created there, so name another folder with `ferry-agent init`"
        if os.strerror(errno.EROFS) in reason:
            reason += " (systemd lets a service write what its unit names in ReadWritePaths)"
        raise TransferError(f"reports cannot be left in {folder}: {reason}; they are kept and will be sent again") from error


# A gateway


@dataclass(frozen=True)
class Said:
    """An answer of a server."""

    status: int
    kind: str
    """Media type of the body, without parameters, in small letters."""
    body: bytes
    """At most `MAX_ANSWER` bytes, and one more if it is longer."""

    def fields(self) -> dict[str, Any]:
        """Return the body as a JSON object; empty if it is none."""
        if self.kind != "application/json" or len(self.body) > MAX_ANSWER:
            return {}
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class Gateway:
    """The factory's gateway. A request follows no redirect, is sent once, and ends by one deadline."""

    def __init__(self, address: network.Address, authorities: str = "") -> None:
        self._address, self._line = address, Line(GAP_TIMEOUT, authorities)
        self.is_proven = address.url.startswith("https:")
        """Whether it is certain who answers."""

    def deliver(self, batch: Sequence[Waiting]) -> Receipt:
        """Send the lines of a batch as they lie in the queue, and read which numbers the factory keeps or refuses."""
        import gzip  # imported only where something is sent

        body = gzip.compress(b"".join(report.line + b"\n" for report in batch), mtime=0)
        said = self.ask("v1/reports", body, {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"})
        if said.status != 200:
            raise self._refusal(said, len(body))
        try:
            answer = Answer.model_validate_json(json.dumps(said.fields()))
        except ValueError:
            raise TransferError(
                f"what answers at {self._shown} is no gateway of the factory, but perhaps a proxy's page; check the address given to --reports"
            ) from None
        return Receipt(frozenset(answer.accepted), tuple(answer.refused), answer, self.is_proven)

    def ask(self, name: str, body: bytes | None, headers: dict[str, str]) -> Said:
        """Send a request, and read its answer.

        Args:
            name: path below the gateway's address.
            body: what is posted; None: it is a GET.
            headers: those of the body.

        Raises:
            LaterError: the server asks to wait.
            RefusedError: a proxy or the network refuses to pass the request on, or the server redirects it.
            TransferError: the server is not reached, or does not answer in time.
        """
        url = self._address.of(name)
        proxy = network.proxy_for(url, os.environ)
        sent = {"Accept": "application/json", "Accept-Encoding": "identity"} | headers
        if self._address.authorization:
            sent["Authorization"] = self._address.authorization
        found: list[urllib3.BaseHTTPResponse] = []

        def pieces() -> Iterator[bytes]:
            try:
                if body is None:
                    found.append(self._line.get(url, sent, proxy))
                else:
                    found.append(self._line.post(url, sent, proxy, body))
                while piece := found[0].read1(PIECE):
                    yield piece
            except FAULTS as error:
                through = f" through the proxy {proxy.url}" if proxy else ""
                raise TransferError(
                    f"cannot reach {self._shown}{through}: {why(error)}; the reports are kept and will be sent again"
                ) from error
            finally:
                for response in found:
                    response.close()

        data = bytearray()
        with closing(timely(at_most(POST_SECONDS), f"the answer of {self._shown}", pieces(), cut=self._line.cut)) as arriving:
            for piece in arriving:
                data += piece
                if len(data) > MAX_ANSWER:
                    break
        response = found[0]
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            data.clear()  # it was asked not to pack it, so it is not the gateway
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        said = Said(response.status, kind, bytes(data[: MAX_ANSWER + 1]))
        self._check_passed(said, response.headers.get("Retry-After"), response.headers.get("Date"), url, proxy)
        return said

    def look(self) -> str:
        """Say why reports could not be delivered now; an empty string: the gateway is well.

        Raises:
            TransferError: it is not reached.
        """
        status = self.ask("healthz", None, {}).status
        return (
            ""
            if status == 200
            else f"{self._shown} does not answer as a gateway does (status {status}); check the address given to --reports"
        )

    def close(self) -> None:
        """See `Channel.close`."""
        self._line.close()

    @property
    def _shown(self) -> str:
        return urlsplit(bare(self._address.url)).netloc

    def _check_passed(self, said: Said, retry_after: str | None, date: str | None, url: str, proxy: network.Proxy | None) -> None:
        """Refuse an answer that somebody in between gives, or that asks to wait."""
        status = said.status
        if 300 <= status < 400:
            raise RefusedError(
                f"{self._shown} redirects what is sent to it (status {status}), and reports follow no redirect; give its last address with "
                "`ferry-agent init --reports`",
                status,
            )
        if status in BUSY:
            now = time.time()
            seconds = network.wait_asked(retry_after, date, now) or SHORTEST_WAIT
            raise LaterError(
                f"{self._shown} is too busy for reports (status {status}); they are kept and sent in {seconds:.0f} s", seconds
            )
        if status in (401, 407, network.LOGIN):
            problem = network.refusal(status, "reports", url, bool(self._address.authorization), proxy)
            told = str(problem).replace("--repository", "--reports")
            raise RefusedError(told, status)

    def _refusal(self, said: Said, size: int) -> TransferError:
        """Say what an answer to a batch means that acknowledges nothing."""
        status, code = said.status, said.fields().get("code")
        if status == 403 and code == "unenrolled":
            return RefusedError(ENROLL, status)
        told = {
            400: f"{self._shown} cannot read the reports (status 400); install the newest agent, or check the proxy in between",
            403: f"{self._shown} refuses reports of this device (status 403); ask who runs that server, or the firewall in between",
            404: f"{self._shown} takes no reports at this address (status 404); check the address given to --reports",
            405: f"{self._shown} takes no reports at this address (status 405); check the address given to --reports",
            413: f"{self._shown} takes no {size} bytes at once (status 413); let the server, or the proxy before it, take 256 KiB",
        }
        if status in told:
            return RefusedError(f"{told[status]}; the reports are kept", status)
        return TransferError(f"{self._shown} answered {status}; the reports are kept and will be sent again")
