"""The wait of step 10 for the factory: a device switches only after its report `starting` was kept, where the policy says so.

A device that the factory cannot hear must not switch, because nobody would learn how it fares. The wait has an end, so that the agent
stays usable by hand. The bundle passed its trial, so this is kept, and the next update goes on with the wait: it neither tries the bundle
again nor reports again that it starts. Nothing is counted against the bundle meanwhile. All that is kept may be lost; then the bundle
is tried again.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pydantic import Field

import ota
from ota.agent import reports
from ota.agent.plan import Plan
from ota.agent.state import MAX_STATE, Home, State
from ota.durations import spoken
from ota.errors import ManifestError, StateError
from ota.manifest import MAX_COUNT, Document, Sha256, Token, parse

WAIT = 15 * 60.0  # seconds that one update waits
LOOK = 60.0  # seconds after which step 9 is repeated, so that a halt reaches a device that waits
FILE = "passed.json"


@dataclass(frozen=True)
class Patience:
    """How an update waits."""

    clock: Callable[[], float] = time.monotonic
    """Seconds since any moment."""
    pause: Callable[[float], None] = time.sleep
    """Waits for so many seconds."""


class Passed(Document):
    """A bundle that passed its trial here, and under which circumstances: under others it is tried again."""

    bundle: Sha256
    active: Sha256 | None = Field(description="bundle that ran, with which the trial compared")
    agent: Token = Field(max_length=40)
    onnxruntime: Token = Field(max_length=80)
    milliseconds: int = Field(ge=0, le=MAX_COUNT, description="time of an image")


def passed(home: Home, plan: Plan, state: State) -> Passed | None:
    """Return the trial that a bundle passed before; None: there was none, or not under these circumstances."""
    with suppress(ManifestError, StateError):
        found = parse(Passed, home.disk.read(FILE) or b"", MAX_STATE)
        if found == _now(plan, state, found.milliseconds):
            return found
    return None


def keep(home: Home, plan: Plan, state: State, milliseconds: float) -> None:
    """Keep that a bundle passed its trial; durable on return."""
    home.disk.replace(FILE, _now(plan, state, round(milliseconds)).canonical())


def forget(home: Home) -> None:
    """Forget the trial before the switch: if the new bundle is rolled back, it has to be tried again."""
    home.disk.remove(FILE)


def _now(plan: Plan, state: State, milliseconds: int) -> Passed:
    try:
        runtime = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        runtime = ""
    return Passed(
        bundle=plan.manifest.digest, active=state.active, agent=ota.__version__, onnxruntime=runtime, milliseconds=milliseconds
    )


def wait(home: Home, plan: Plan, look: Callable[[], str | None], patience: Patience) -> str:
    """Wait until the factory has kept the report that a bundle starts, which is queued already; return why it has not, or "".

    Args:
        home: the agent's directory.
        plan: what is to be installed.
        look: repeats step 9; returns why the update has to stop, "" to go on, or None: no acknowledgement is needed any more.
        patience: how to wait.

    Raises:
        TrustError, TransferError, ManifestError: from `look`; nothing was changed.
    """
    reports.send(home)
    began = patience.clock()
    while (fate := reports.fate(home, plan.manifest.digest)) == "waiting" and patience.clock() - began < WAIT:
        patience.pause(LOOK)
        stopped = look()
        if stopped is None or stopped:
            return stopped or ""
        reports.send(home)
    if fate == "accepted":
        return ""
    kept = "what runs is kept, and the next update goes on"
    if fate == "refused":
        return (
            f"release {plan.seq} does not start, because the factory refused the report of it; enroll this device again; {kept}"
        )
    if fate == "none":
        return f"release {plan.seq} does not start yet, because this device lost its report of it; {kept} and reports it again"
    if fate == "delivered":
        return f"release {plan.seq} does not start yet, because its report left this device without TLS, where no answer can be trusted; {kept}"
    why = reports.problem(home) or "it does not answer"
    return f"release {plan.seq} waited {spoken(WAIT)} for the factory to acknowledge that it starts: {why}; {kept}"
