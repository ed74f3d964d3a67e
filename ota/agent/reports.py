"""Reports of a device to the factory: signed, numbered, and kept in a bounded queue until delivered. They hold no images.

A report's number is made durable before the report itself, so that no number is ever used for two contents. A power cut may
leave a gap in the numbers, which means nothing.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

import ota
from ota.agent import history
from ota.agent.channel import Channel, Receipt, Waiting, channel_to
from ota.agent.network import LaterError
from ota.agent.state import Home
from ota.agent.transport import HungError
from ota.errors import DeviceError, ManifestError, OperatorError, StateError, TransferError, printable
from ota.limits import KiB
from ota.manifest import MAX_COUNT, MAX_TOLD, Document, Sha256, Told, parse
from ota.report import MAX_BATCH, MAX_JUMP, MAX_NUMBER, MOST_REPORTS, REPORT_FORM, DeviceReport, Event, Health, open_line, seal

MAX_QUEUE = 200  # reports; the oldest are dropped first
MAX_DAMAGED = 20  # damaged files that are kept aside, for people
LONGEST_WAIT = 86_400.0  # seconds that a gateway may ask to wait
EPOCH = 1_700_000_000  # seconds since 1970; if the last number is lost, numbers continue with the seconds since then
NO_FOLDER = "this device has no folder for reports, and no gateway; run `ferry-agent init` again, with --reports"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Fate = Literal["waiting", "accepted", "refused", "delivered"]

log = logging.getLogger(__name__)


class Starting(Document):
    """What became of the newest report that a trial began; it outlives the report's copy in the queue."""

    number: int = Field(ge=1, le=MAX_NUMBER, description="number of the report")
    manifest: Sha256 = Field(description="bundle that it is about")
    fate: Fate = Field(description="accepted and refused only by an answer over TLS; delivered: it left in another way")


class Heard(Document):
    """What the factory's gateway said last."""

    time: int = Field(default=0, ge=0, le=MAX_COUNT, description="when it answered last, by its own clock; 0: never")
    later: int = Field(default=0, ge=0, le=MAX_COUNT, description="until when it asked not to be asked, by this device's clock")
    copies: int = Field(default=0, ge=0, le=MAX_COUNT, description="when a number of this device was found used; 0: never")
    refusal: Told = Field(default="", description="why it refused the last report that it refused")


def drop_key(home: Home) -> None:
    """Drop the device's key, its waiting reports and what the factory knows of them, because they may be another device's.

    A killed call may be repeated: the key goes last.
    """
    for path in _queued(home):
        home.disk.remove(f"queue/{path.name}")
    for name in ("starting.json", "gateway.json", "beat.json", "device.key"):
        home.disk.remove(name)


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


def signed(home: Home, message: bytes) -> str:
    """Sign a message by the device's key; return the signature as 128 hex digits."""
    return _key(home).sign(message).hex()


def queue(
    home: Home, event: Event, manifest: str | None, reason: str = "", received: int = 0, milliseconds: float = 0,
    health: Health | None = None,
) -> None:  # fmt: skip
    """Sign a report and put it into the queue, and note the event in the device's history; durable on return."""
    home.disk.make_folder("queue")
    number = _last(home) + 1
    begins = event == "starting" and manifest is not None
    home.disk.replace("number", str(number).encode(), durable=not begins)  # the note that follows syncs the same folder
    report = made(home, number, event, manifest, reason, received, milliseconds, health)
    if begins and manifest:  # before the report itself: an earlier one's fate must not pass for this one's
        _decide(home, Starting(number=number, manifest=manifest, fate="waiting"))
    home.disk.replace(_file(number), seal(report, _key(home)))
    _make_room(home, report)
    history.note(home, event, manifest, reason, received, milliseconds)
    if _named_agent(home) != ota.__version__:
        with suppress(DeviceError):  # then the next update says it again
            home.disk.replace("agent", ota.__version__.encode(), durable=False)


def made(
    home: Home, number: int, event: Event, manifest: str | None, reason: str = "", received: int = 0, milliseconds: float = 0,
    health: Health | None = None,
) -> DeviceReport:  # fmt: skip
    """Make a report of this moment; nothing is written."""
    config = home.config()
    return DeviceReport(
        device=config.device, boot=_boot(), number=number, time=int(time.time()), line=config.line,
        device_class=config.device_class, event=event, manifest=manifest, active=home.load().active, reason=reason[:500],
        received=received, milliseconds=round(milliseconds), schema_version=REPORT_FORM, agent=ota.__version__, health=health,
    )  # fmt: skip


def foretold(home: Home, health: Health) -> bytes:
    """Return the heartbeat as it would be signed now; nothing is written, and its number is not used up."""
    return seal(made(home, _last(home) + 1, "alive", home.load().active, health=health), _key(home))


def _file(number: int) -> str:
    return f"queue/{number:08d}.json"


def _queued(home: Home) -> list[Path]:
    """List the files of the queue, the oldest first."""
    found = [path for path in home.disk.path("queue").glob("*.json") if path.stem.isascii() and path.stem.isdigit()]
    return sorted(found, key=lambda path: int(path.stem))


def _make_room(home: Home, newest: DeviceReport) -> None:
    """Drop the oldest reports that the queue has no room for, and count them; the `starting` that a trial waits for stays.

    A heartbeat takes the place of an older one about the same bundle, because its counters hold what the older one said.
    """
    waiting = _queued(home)
    if newest.event == "alive":
        for path in waiting:
            old = _read(path)
            if old and old[1].number < newest.number and (old[1].event, old[1].active) == ("alive", newest.active):
                home.disk.remove(f"queue/{path.name}")
        waiting = _queued(home)
    if len(waiting) <= MAX_QUEUE:
        return
    begun = _starting(home)
    kept = begun.number if begun and begun.fate == "waiting" else 0
    old_ones = [path for path in waiting if int(path.stem) != kept][: len(waiting) - MAX_QUEUE]
    home.disk.replace("dropped", str(dropped(home) + len(old_ones)).encode())
    for path in old_ones:
        home.disk.remove(f"queue/{path.name}")


def dropped(home: Home) -> int:
    """Return how many reports the full queue dropped before they were delivered."""
    try:
        return min(max(0, int(home.disk.read("dropped") or b"0")), MAX_COUNT)
    except ValueError:
        return 0


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


def _last(home: Home) -> int:
    """Return the highest number that can have been used."""
    try:
        last = int(home.disk.read("number") or b"")
    except ValueError:
        last = -1
    if 0 <= last < MAX_NUMBER:
        return last
    # It is lost: skip all numbers that can have been used, at less than one report a second.
    return max(0, max(int(time.time()), home.high_water().signed) - EPOCH, *(int(path.stem) for path in _queued(home)))


def go_on_from(home: Home, highest: int) -> None:
    """Count this device's reports on from the highest number that the factory has of it, if that is above its own.

    A device that got a new disk begins at 1, and the factory has its former reports, perhaps with numbers from after a lost counter. No such
    number is above the seconds since `EPOCH` by more than `MAX_JUMP`, so nobody can use up the device's numbers with a higher one.
    """
    latest = max(int(time.time()), home.high_water().signed) - EPOCH + MAX_JUMP
    if not _last(home) < highest < MAX_NUMBER:
        return
    if highest > latest:
        log.warning(
            "the factory says that it has a report %d of this device, which cannot be; its number is not followed", highest
        )
        return
    home.disk.replace("number", str(highest).encode())


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"


# What became of a report


def fate(home: Home, manifest: str) -> Literal["none"] | Fate:
    """Say what became of the newest `starting` report about a bundle.

    Returns:
        waiting: it lies in the queue. accepted, refused: the gateway said so over TLS. delivered: it left by a folder, or by plain http
        on this device. none: there is no such report, or its copy in the queue was lost.
    """
    found = _starting(home)
    if found is None or found.manifest != manifest:
        return "none"
    return "none" if found.fate == "waiting" and not home.disk.path(_file(found.number)).is_file() else found.fate


def _starting(home: Home) -> Starting | None:
    try:
        return parse(Starting, home.disk.read("starting.json") or b"", 4 * KiB)
    except (ManifestError, StateError):
        return None


def _decide(home: Home, found: Starting) -> None:
    home.disk.replace("starting.json", found.canonical())


def heard(home: Home) -> Heard:
    """Return what the gateway said last; a lost file says nothing."""
    try:
        return parse(Heard, home.disk.read("gateway.json") or b"", 64 * KiB)
    except (ManifestError, StateError):
        return Heard()


def two_copies(said: Heard) -> str:
    """Say that the factory knows another device of this name."""
    return (
        f"two copies of this device? On {datetime.fromtimestamp(min(said.copies, 2**37), UTC):%Y-%m-%d} the factory had a report of "
        "another one under this device's number; run `ferry-agent init` on one of them with another --device and with --new-key"
    )


def told(said: Mapping[str, Any]) -> list[str]:
    """Say what the gateway said last, in lines for people; `said` has the fields of `Heard`."""
    found = Heard(**said)
    lines = []
    if found.time:
        lines.append(
            f"last heard by the factory on {datetime.fromtimestamp(min(found.time, 2**37), UTC):%Y-%m-%d %H:%M:%S} UTC, by its clock"
        )
    if found.refusal:
        lines.append(f"the factory refused {found.refusal}")
    if found.copies:
        lines.append(two_copies(found))
    return lines


def asked_to_wait(home: Home) -> int:
    """Return the seconds that are left of the wait that the gateway asked for; 0: none are."""
    left = heard(home).later - int(time.time())
    return left if 0 < left <= 1.25 * LONGEST_WAIT else 0  # more than that: the clock was set back


def _hear(home: Home, **fields: Any) -> None:
    before = heard(home)
    now = before.model_copy(update=fields)
    if now != before:
        with suppress(DeviceError):  # a full disk must not end an update because of this note
            home.disk.replace("gateway.json", now.canonical(), durable=False)


def forget_gateway(home: Home) -> None:
    """Forget what the gateway said, because another one may be set up, or two copies of the device are one again."""
    home.disk.remove("gateway.json")


# Sending


def problem(home: Home) -> str:
    """Say why reports wait: no place is configured, or the last delivery failed; return an empty string if neither is so."""
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


def waiting(home: Home) -> list[Waiting]:
    """Return the reports of the queue, the oldest first; a damaged file is left out."""
    return [found[0] for path in _queued(home) if (found := _read(path))]


def _read(path: Path) -> tuple[Waiting, DeviceReport] | None:
    try:
        data = path.read_bytes()
        report = open_line(data).report
    except (OSError, ManifestError):
        return None
    if report.number != int(path.stem) or b"\n" in data:
        return None
    return Waiting(report.number, report.device, data), report


def _set_damaged_aside(home: Home) -> None:
    """Rename files of the queue that hold no report, so that they hold no other report back; the newest are kept for people."""
    for path in _queued(home):
        if _read(path) is None:
            log.warning("%s is damaged, so it is set aside and not sent", path)
            home.disk.rename(f"queue/{path.name}", f"queue/{path.name}.damaged", durable=False)
    for path in sorted(home.disk.path("queue").glob("*.damaged"))[:-MAX_DAMAGED]:
        home.disk.remove(f"queue/{path.name}")


def batches(reports: Sequence[Waiting]) -> Iterator[list[Waiting]]:
    """Split reports into batches: of one device, of at most `MOST_REPORTS` and `MAX_BATCH` bytes, in their order."""
    batch, size = list[Waiting](), 0
    for report in reports:
        length = len(report.line) + 1
        if batch and (len(batch) == MOST_REPORTS or size + length > MAX_BATCH or report.device != batch[0].device):
            yield batch
            batch, size = [], 0
        batch.append(report)
        size += length
    if batch:
        yield batch


def send(home: Home) -> int:
    """Deliver the queued reports and return how many could not be delivered; they stay, and `problem` says why."""
    config = home.config()
    if not config.reports:
        _note(home, "")
        return len(_queued(home))
    _set_damaged_aside(home)
    found, now = waiting(home), int(time.time())
    if not found:
        _note(home, "")
        return 0
    if later := asked_to_wait(home):
        moment = f"{datetime.fromtimestamp(now + later, UTC):%Y-%m-%d %H:%M:%S} UTC"
        _note(home, f"the gateway asked to wait until {moment}; the reports are kept and will be sent then")
        return len(found)
    with closing(channel_to(config.reports, config.authorities)) as channel:
        again, why = _deliver(home, channel, found)
        if again and not why:  # they have new numbers, once
            why = _deliver(home, channel, [report for report in waiting(home) if report.number in again])[1]
    left = len(_queued(home))
    if left and not why:
        why = f"the factory's answer does not name {left} of the reports; they are kept and will be sent again"
    if why:
        log.warning("%s", why)
    _note(home, why)
    return left


def _deliver(home: Home, channel: Channel, found: Sequence[Waiting]) -> tuple[set[int], str]:
    """Deliver reports; return the numbers of those that were signed once more, and why others could not be delivered."""
    again, why = set[int](), ""
    for batch in batches(found):
        try:
            receipt = channel.deliver(batch)
        except HungError as error:  # the next ones would hang too, and the lock is held meanwhile
            return again, why or f"{error}; the reports are kept and will be sent again"
        except LaterError as error:
            seconds = min(error.seconds, LONGEST_WAIT) * (1 + random.random() / 4)  # noqa: S311
            _hear(home, later=min(int(time.time() + seconds) + 1, MAX_COUNT))
            return again, why or str(error)
        except TransferError as error:
            return again, why or str(error)
        why = why or receipt.problem or _strangers(batch, receipt)
        again |= _settle(home, batch, receipt)
    return again, why


def _strangers(batch: Sequence[Waiting], receipt: Receipt) -> str:
    """Say which numbers an answer names that were not sent."""
    named = receipt.taken | {refusal.number for refusal in receipt.refused}
    others = sorted(named - {report.number for report in batch})
    if not others:
        return ""
    return (
        f"the factory's answer names reports that were not sent ({', '.join(map(str, others[:5]))}); nothing was removed for them"
    )


def _settle(home: Home, batch: Sequence[Waiting], receipt: Receipt) -> set[int]:
    """Remove from the queue what an answer names of a batch; return the numbers of those that were signed once more."""
    refused, again, refusal = {one.number: one for one in receipt.refused}, set[int](), ""
    copies = 0
    for report in batch:
        no = refused.get(report.number)
        if no is None and report.number not in receipt.taken:
            continue
        fresh = None
        if no and no.code == "conflict":
            copies = max(0, min(int(time.time()), MAX_COUNT))
            fresh = _sign_again(home, report, receipt.answer.highest if receipt.answer else 0)
        if fresh:
            again.add(fresh)
        else:
            if no:
                refusal = printable(f"report {no.number}: {no.code}: {no.reason}")[:MAX_TOLD]
                log.warning("the factory refuses %s", refusal)
            _came_to(home, report.number, ("refused" if no else "accepted") if receipt.proven else "delivered")
        home.disk.remove(_file(report.number))
    if receipt.answer:
        said = {"refusal": refusal} if refusal or receipt.taken else {}
        _hear(home, time=receipt.answer.time, later=0, **said, **({"copies": copies} if copies else {}))
    return again


def _came_to(home: Home, number: int, end: Fate) -> None:
    """Note what became of a report, if a trial may wait for it; durable before the report's copy goes."""
    begun = _starting(home)
    if begun and begun.number == number:
        _decide(home, begun.model_copy(update={"fate": end}))


def renumbered(number: int, last: int, highest: int) -> int | None:
    """Choose the number under which a report is signed once more, because the factory has its number with another content.

    Args:
        number: the report's number.
        last: highest number that this device has used.
        highest: highest number that the factory has of it.

    Returns:
        a number above both; None: it would lie more than `MAX_JUMP` above the report's own one.
    """
    fresh = max(last, highest) + 1
    return fresh if fresh <= min(number + MAX_JUMP, MAX_NUMBER) else None


def _sign_again(home: Home, report: Waiting, highest: int) -> int | None:
    """Put a report into the queue once more, under a fresh number, and return that; None: there is none."""
    fresh = renumbered(report.number, _last(home), highest)
    if fresh is None:
        return None
    log.warning("the factory has another report %d of this device: are there two copies of it?", report.number)
    home.disk.replace("number", str(fresh).encode())
    again = open_line(report.line).report.model_copy(update={"number": fresh})
    home.disk.replace(_file(fresh), seal(again, _key(home)))
    begun = _starting(home)
    if begun and begun.number == report.number:
        _decide(home, begun.model_copy(update={"number": fresh}))
    return fresh
