"""What a device tells the factory: signed, numbered, kept in a bounded queue until delivered. Never an image.

A report's number is made durable before the report is, so that no number is ever used for two contents; a power cut may
leave a gap in the numbers, which means nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ota import output
from ota.agent.state import Home
from ota.agent.transport import HungError, within
from ota.errors import DeviceError, OperatorError, StateError, TransferError
from ota.manifest import MAX_NUMBER, DeviceReport, Event, SignedReport

MOUNT_SECONDS = 30.0  # that a report waits for the folder in which it is left
MAX_QUEUE = 200  # reports; the oldest go first
EPOCH = 1_700_000_000  # seconds since 1970; where numbers start that replace lost ones
NO_FOLDER = "this device has no folder for reports; run `ferry-agent init` again, with --reports FOLDER"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


def make_key(home: Home) -> None:
    """Make the device's key where there is none; its numbers start at 1."""
    if not home.disk.path("device.key").is_file():
        home.disk.replace("number", b"0")
        home.disk.replace("device.key", Ed25519PrivateKey.generate().private_bytes_raw())


def _key(home: Home) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(home.disk.read("device.key") or b"")
    except ValueError as error:
        raise StateError(f"{home.root / 'device.key'} is lost; run `ferry-agent init` again and enroll anew") from error


def public_key(home: Home) -> str:
    """The public half, 64 hex digits, for `ferry fleet enroll`."""
    return _key(home).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def queue(home: Home, event: Event, manifest: str | None, reason: str = "", received: int = 0, milliseconds: float = 0) -> None:
    """Sign a report and put it into the queue; durable on return."""
    config = home.config()
    home.disk.make_folder("queue")
    number = _next_number(home)
    report = DeviceReport(
        device=config.device, boot=_boot(), number=number, time=int(time.time()), line=config.line,
        device_class=config.device_class, event=event, manifest=manifest, active=home.load().active, reason=reason[:500],
        received=received, milliseconds=round(milliseconds),
    )  # fmt: skip
    signed = SignedReport(report=report, signature=_key(home).sign(report.canonical()).hex())
    home.disk.replace(f"queue/{number:08d}.json", json.dumps(signed.model_dump(mode="json")).encode())
    for old in sorted(home.disk.path("queue").glob("*.json"))[:-MAX_QUEUE]:
        home.disk.remove(f"queue/{old.name}")


def _next_number(home: Home) -> int:
    try:
        last = int(home.disk.read("number") or b"")
    except ValueError:
        last = -1
    if not 0 <= last < MAX_NUMBER:  # lost: go past all that can have been used, at less than a report a second
        queued = [int(p.stem) for p in home.disk.path("queue").glob("*.json")]
        last = max(0, max(int(time.time()), home.high_water().time) - EPOCH, *queued)
    home.disk.replace("number", str(last + 1).encode())
    return last + 1


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


def folder_of(address: str) -> Path:
    """The folder in which reports are left.

    Raises:
        OperatorError: it is not one; what was sent to another kind of place would be lost without a word.
    """
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise OperatorError("--reports is not valid; give a folder") from error  # the address may hold a password
    if parts.scheme not in ("", "file") or parts.netloc:
        raise OperatorError("reports cannot be left at an address; give --reports a folder")
    return Path(parts.path if parts.scheme else address)


def missing(folder: Path) -> str:
    """Say that a folder is not there. The agent does not make it: below the place of a mount nobody would find what it holds."""
    return f"there is no folder {folder}; mount it or make it"


def problem(home: Home) -> str:
    """Why reports wait: there is no folder for them, or the last try failed; empty: neither."""
    try:
        if not home.config().reports:
            return NO_FOLDER
        return (home.disk.read("undelivered.txt") or b"").decode(errors="replace")
    except StateError:
        return ""


def _note(home: Home, problem_now: str) -> None:
    """Keep it for `status`: who asks may be another user than who tried, and not shut in as a service is."""
    with suppress(DeviceError):  # a full disk must not end an update for this
        if problem_now.encode() == (home.disk.read("undelivered.txt") or b""):
            return
        if problem_now:
            home.disk.replace("undelivered.txt", problem_now.encode(), durable=False)
        else:
            home.disk.remove("undelivered.txt")


def send(home: Home) -> int:
    """Deliver what is queued; what cannot be delivered stays, and `problem` says why. Returns how many reports are left.

    A report is a file in a folder, named by device and number: dropping it twice is the same as once.
    """
    config = home.config()
    waiting = sorted(home.disk.path("queue").glob("*.json"))
    if not config.reports:
        _note(home, "")
        return len(waiting)
    left, why = _deliver(home, folder_of(config.reports), waiting)
    if why:
        log.warning("%s", why)
    _note(home, why)
    return left


def _deliver(home: Home, folder: Path, waiting: list[Path]) -> tuple[int, str]:
    """Leave reports in the folder; returns how many are left, and why."""
    left, why = 0, ""
    for done, path in enumerate(waiting):
        data, name = path.read_bytes(), f"{home.config().device}-{path.name}"
        try:
            within(MOUNT_SECONDS, folder, lambda data=data, name=name: _drop(data, folder, name))  # type: ignore[misc]
        except HungError as error:  # the next ones would, too, and a lock is held meanwhile
            return left + len(waiting) - done, f"{error}; reports are kept and tried again"
        except TransferError as error:  # somebody else may have put something in the place of this one, and not of the next
            left, why = left + 1, why or str(error)
        else:
            home.disk.remove(f"queue/{path.name}")
    return left, why


def _drop(data: bytes, folder: Path, name: str) -> None:
    """Leave a file in a folder where others may write, too; durable on return, because the only other copy is removed next."""
    try:
        if not folder.is_dir():
            raise TransferError(f"{missing(folder)}, reports are kept and tried again")
        with output.fresh(folder / name) as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the agent's umask: another user collects it
            file.write(data)
    except (OSError, OperatorError) as error:
        reason = str((error.strerror if isinstance(error, OSError) else "") or error)
        if isinstance(error.__cause__, FileNotFoundError):  # the folder is there, as in /proc
            reason = "no file can be made there, name another folder with `ferry-agent init`"
        if os.strerror(errno.EROFS) in reason:
            reason += " (systemd lets a service write what its unit names in ReadWritePaths)"
        raise TransferError(f"reports cannot be left in {folder}: {reason}; they are kept and tried again") from error
