"""Reports of a device to the factory: signed, numbered, and kept in a bounded queue until delivered. They hold no images.

A report's number is made durable before the report itself, so that no number is ever used for two contents. A power cut may
leave a gap in the numbers, which means nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

import ota
from ota import output
from ota.agent import history
from ota.agent.state import MAX_STATE, Home
from ota.agent.transport import HungError, within
from ota.errors import DeviceError, ManifestError, OperatorError, StateError, TransferError
from ota.manifest import Document, Sha256, parse
from ota.report import MAX_NUMBER, REPORT_FORM, DeviceReport, Event, seal

MOUNT_SECONDS = 30.0  # seconds to wait for the reports folder, which may be a mount that hangs
MAX_QUEUE = 200  # reports; the oldest are dropped first
EPOCH = 1_700_000_000  # seconds since 1970; if the last number is lost, numbers continue with the seconds since then
NO_FOLDER = "this device has no folder for reports; run `ferry-agent init` again, with --reports FOLDER"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


def make_key(home: Home) -> None:
    """Make the device's key if there is none; the numbers of its reports start at 1."""
    if not home.disk.path("device.key").is_file():
        home.disk.replace("number", b"0")
        home.disk.replace("device.key", Ed25519PrivateKey.generate().private_bytes_raw())


def _key(home: Home) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(home.disk.read("device.key") or b"")
    except ValueError as error:
        raise StateError(
            f"{home.root / 'device.key'} is lost; run `ferry-agent init` again, and enroll the device again"
        ) from error


def public_key(home: Home) -> str:
    """Return the device's public key, 64 hex digits, for `ferry fleet enroll`."""
    return _key(home).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def queue(home: Home, event: Event, manifest: str | None, reason: str = "", received: int = 0, milliseconds: float = 0) -> None:
    """Sign a report and put it into the queue, and note the event in the device's history; durable on return."""
    config = home.config()
    home.disk.make_folder("queue")
    number = _next_number(home)
    report = DeviceReport(
        device=config.device, boot=_boot(), number=number, time=int(time.time()), line=config.line,
        device_class=config.device_class, event=event, manifest=manifest, active=home.load().active, reason=reason[:500],
        received=received, milliseconds=round(milliseconds), schema_version=REPORT_FORM, agent=ota.__version__,
    )  # fmt: skip
    if event == "starting":
        _write_fate(home, Started(manifest=str(manifest), number=number, fate="waiting"))
    home.disk.replace(f"queue/{number:08d}.json", seal(report, _key(home)))
    for old in sorted(home.disk.path("queue").glob("*.json"))[:-MAX_QUEUE]:
        home.disk.remove(f"queue/{old.name}")
    history.note(home, event, manifest, reason, received, milliseconds)
    if _named_agent(home) != ota.__version__:
        with suppress(DeviceError):  # then the next update says it again
            home.disk.replace("agent", ota.__version__.encode(), durable=False)


def announce(home: Home) -> None:
    """Report that another version of the agent runs, once: the factory asks no device, and must know which bundles it can read.

    A device that has nothing installed waits for its first report, which names the agent, too. A disk that takes no report is no reason
    to stop.
    """
    try:
        active = home.load().active
        if active is None or _named_agent(home) == ota.__version__:
            return
        queue(home, "new_agent", active, f"ferry-agent {ota.__version__} runs")
        send(home)
    except (DeviceError, OperatorError) as error:
        log.warning("the factory does not know yet that ferry-agent %s runs: %s", ota.__version__, error)


def _named_agent(home: Home) -> str:
    """Return the version that the last report named; empty: the file is lost, or only older agents have reported."""
    return (home.disk.read("agent") or b"").decode(errors="replace")


def _next_number(home: Home) -> int:
    try:
        last = int(home.disk.read("number") or b"")
    except ValueError:
        last = -1
    if not 0 <= last < MAX_NUMBER:  # lost: skip all numbers that can have been used, at less than one report a second
        queued = [int(p.stem) for p in home.disk.path("queue").glob("*.json")]
        last = max(0, max(int(time.time()), home.high_water().signed) - EPOCH, *queued)
    home.disk.replace("number", str(last + 1).encode())
    return last + 1


class Started(Document):
    """What became of the newest report that a bundle starts."""

    manifest: Sha256
    number: int = Field(ge=1, le=MAX_NUMBER)
    fate: Literal["waiting", "accepted", "refused", "delivered"]


def fate(home: Home, manifest: str) -> Literal["none", "waiting", "accepted", "refused", "delivered"]:
    """Say what became of the newest report that a bundle starts.

    Returns:
        none: there is none, or what is known of it is lost; accepted, refused: the factory's answer, which came over TLS; delivered: it left
        by a folder or over plain http, where no answer can be trusted.
    """
    found = _started(home)
    return found.fate if found and found.manifest == manifest else "none"


def _started(home: Home) -> Started | None:
    with suppress(ManifestError, StateError):
        return parse(Started, home.disk.read("starting.json") or b"", MAX_STATE)
    return None


def _write_fate(home: Home, started: Started) -> None:
    home.disk.replace("starting.json", started.canonical())


def _note_fate(home: Home, number: int, what: Literal["accepted", "refused", "delivered"]) -> None:
    """Keep what became of a report before it leaves the queue, if it is the newest one that a bundle starts."""
    if (found := _started(home)) and found.number == number and found.fate != what:
        _write_fate(home, found.model_copy(update={"fate": what}))


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


class Channel(Protocol):
    """A way on which reports leave the device. To add one, write this method, and choose it by its address in `channel_to`."""

    def deliver(self, name: str, data: bytes) -> None:
        """Deliver a report, durably, because its only other copy is removed next; delivering it twice is the same as once.

        Raises:
            HungError: nothing answers, so the next reports would wait as long.
            TransferError: this report cannot be delivered.
        """


class FolderChannel:
    """A folder, which may be a mount that hangs. A report becomes a file that is named by device and number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def deliver(self, name: str, data: bytes) -> None:
        """Write the report into the folder."""
        within(MOUNT_SECONDS, self._folder, lambda: _drop(data, self._folder, name))


def channel_to(address: str) -> Channel:
    """Return the channel that an address names.

    Raises:
        OperatorError: as `folder_of`, because a folder is the only kind of channel so far.
    """
    return FolderChannel(folder_of(address))


def folder_of(address: str) -> Path:
    """Return the folder for reports that an address names.

    Raises:
        OperatorError: the address is not a folder; reports sent to another kind of place would be lost silently.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise OperatorError("--reports is not valid; give a folder") from error  # the address may hold a password
    if parts.scheme not in ("", "file") or parts.netloc:
        raise OperatorError("reports cannot be left at an address; give --reports a folder")
    return Path(parts.path if parts.scheme else address)


def missing(folder: Path) -> str:
    """Say that a folder does not exist. The agent does not make it: under an unmounted mount point nobody would find it."""
    return f"there is no folder {folder}; mount it or make it"


def problem(home: Home) -> str:
    """Say why reports wait: no folder is configured, or the last delivery failed; return an empty string if neither is so."""
    try:
        if not home.config().reports:
            return NO_FOLDER
        return (home.disk.read("undelivered.txt") or b"").decode(errors="replace")
    except StateError:
        return ""


def _note(home: Home, problem_now: str) -> None:
    """Store the problem for `status`, which may run as another user and outside the sandbox of the service."""
    with suppress(DeviceError):  # a full disk must not end an update because of this note
        if problem_now.encode() == (home.disk.read("undelivered.txt") or b""):
            return
        if problem_now:
            home.disk.replace("undelivered.txt", problem_now.encode(), durable=False)
        else:
            home.disk.remove("undelivered.txt")


def send(home: Home) -> int:
    """Deliver the queued reports and return how many could not be delivered; they stay, and `problem` says why."""
    config = home.config()
    waiting = sorted(home.disk.path("queue").glob("*.json"))
    if not config.reports:
        _note(home, "")
        return len(waiting)
    left, why = _deliver(home, channel_to(config.reports), waiting)
    if why:
        log.warning("%s", why)
    _note(home, why)
    return left


def _deliver(home: Home, channel: Channel, waiting: list[Path]) -> tuple[int, str]:
    """Deliver reports; return how many could not be delivered, and why."""
    left, why = 0, ""
    for done, path in enumerate(waiting):
        try:
            channel.deliver(f"{home.config().device}-{path.name}", path.read_bytes())
        except HungError as error:  # the next ones would hang too, and the lock is held meanwhile
            return left + len(waiting) - done, f"{error}; the reports are kept and will be sent again"
        except TransferError as error:  # something else may have taken this report's place in the folder, and not the next one's
            left, why = left + 1, why or str(error)
        else:
            _note_fate(home, int(path.stem), "delivered")
            home.disk.remove(f"queue/{path.name}")
    return left, why


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
