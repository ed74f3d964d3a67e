"""What happened on this device: installed, refused and rolled-back releases, and updates that failed, the newest 100.

It is for people. No decision reads it, and an update goes on if it cannot be written, so `state.json` stays the only commit point. An
entry follows the commit that it tells of. If the power is cut between the two, the next update notes what it finds running.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ota.agent.state import MAX_STATE, Home, State
from ota.errors import DeviceError, OtaError, printable
from ota.manifest import MAX_COUNT, MAX_TOLD, Sha256, Told
from ota.report import MAX_NUMBER

FILE = "history.json"
KEPT = 100  # entries; the oldest are dropped first
FOUND = "running"  # the event that only `begin` notes
FAILED = "failed"
WAYS = {
    "delta": "by a delta",
    "chain": "by a chain of deltas",
    "full": "in full",
    "kept": "from the bundle that was kept",
}  # as `installed` has them
QUIET = ("starting", "alive")  # events that lead to another one at once, and the heartbeat

log = logging.getLogger(__name__)


class Entry(BaseModel):
    """One thing that happened; fields and events of newer agents are read past."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)

    time: int = Field(ge=0, le=MAX_COUNT, description="seconds since 1970 by the device's clock")
    event: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,30}$")] = Field(description="what happened")
    bundle: Sha256 | None = Field(default=None, description="bundle that it happened to")
    release: int | None = Field(default=None, ge=0, le=MAX_COUNT, description="its release number, if this device knows it")
    active: Sha256 | None = Field(default=None, description="bundle that ran afterwards")
    text: Told = Field(default="", description="why or how")
    received: int = Field(default=0, ge=0, le=MAX_COUNT, description="bytes fetched")
    milliseconds: int = Field(default=0, ge=0, le=MAX_COUNT, description="time of an image, where it was measured")
    times: int = Field(default=1, ge=1, le=MAX_NUMBER, description="how often in a row the same kind of failure happened")
    until: int = Field(default=0, ge=0, le=MAX_COUNT, description="time of the last of them; 0: it happened once")
    kind: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{0,40}$")] = Field(default="", description="kind of the failure")


class History(BaseModel):
    """All entries, the oldest first."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)

    schema_version: int = 1
    entries: list[Entry] = Field(default_factory=list)


def read(home: Home) -> list[Entry]:
    """Return the entries, the oldest first; a file that is lost or damaged has none.

    Raises:
        StateError: this user may not read the file.
    """
    data = home.disk.read(FILE)
    if data is None or len(data) > MAX_STATE:
        return []
    try:
        return History.model_validate_json(data).entries[-KEPT:]
    except (ValidationError, RecursionError):
        return []


def note(home: Home, event: str, bundle: str | None, text: str = "", received: int = 0, milliseconds: float = 0) -> None:
    """Note what just happened; durable on return. A disk that takes no entry is no reason to stop."""
    if event in QUIET:
        return
    try:
        entries, state = read(home), home.load()
        entry = Entry(
            time=_now(), event=event, bundle=bundle, release=_release(bundle, state, entries), active=state.active, text=_told(text),
            received=received, milliseconds=round(milliseconds),
        )  # fmt: skip
        _write(home, [*entries, entry])
    except (DeviceError, ValidationError) as error:
        log.warning("the history lacks an entry: %s", error)


def begin(home: Home) -> None:
    """Note what runs if the last entry does not say so: the device is older than its history, or the power was cut before the entry."""
    try:
        active, entries = home.load().active, read(home)
    except DeviceError as error:
        log.warning("the history lacks an entry: %s", error)
        return
    if active != (entries[-1].active if entries else None):
        note(home, FOUND, active, "the power was cut before this was noted" if entries else "the history begins here")


def failed(home: Home, error: OtaError) -> None:
    """Note an update that failed; failures of the same kind in a row share an entry, which keeps the newest reason."""
    try:
        entries, kind = read(home), type(error).__name__
        last = entries[-1] if entries else None
        if last is None or (last.event, last.kind) != (FAILED, kind):
            entry = Entry(time=_now(), event=FAILED, active=home.load().active, text=_told(str(error)), kind=kind)
            _write(home, [*entries, entry])
        else:
            again = last.model_copy(update={"times": min(last.times + 1, MAX_NUMBER), "until": _now(), "text": _told(str(error))})
            _write(home, [*entries[:-1], again])
    except (DeviceError, ValidationError) as problem:
        log.warning("the history lacks an entry: %s", problem)


def _write(home: Home, entries: list[Entry]) -> None:
    home.disk.replace(FILE, History(entries=entries[-KEPT:]).model_dump_json(exclude_defaults=True, indent=1).encode())


def _told(text: str) -> str:
    return printable(text)[:MAX_TOLD]


def _now() -> int:
    return min(max(0, int(time.time())), MAX_COUNT)


def _release(bundle: str | None, state: State, entries: list[Entry]) -> int | None:
    if bundle is None:
        return None
    known = {state.previous: state.previous_seq, state.active: state.seq}
    return known.get(bundle) or next(
        (entry.release for entry in reversed(entries) if entry.bundle == bundle and entry.release), None
    )


def line(entry: Entry) -> str:
    """Show an entry as one line for people."""
    when = f"{datetime.fromtimestamp(min(entry.time, 2**37), UTC):%Y-%m-%d %H:%M} UTC"
    what = " ".join(
        word
        for word in (
            f"release {entry.release}" if entry.release else "",
            f"({entry.bundle[:12]})" if entry.bundle else "",
            WAYS.get(entry.text, entry.text),
            f"{entry.received:,} bytes fetched" if entry.received else "",
        )
        if word
    )
    if entry.times > 1:
        what += f" ({entry.times} times until {datetime.fromtimestamp(min(entry.until, 2**37), UTC):%Y-%m-%d %H:%M} UTC)"
    return f"{when}  {entry.event.replace('_', ' '):12}  {what}".rstrip()
