"""Check for updates for as long as the device runs: devices spread their checks, and retry with growing pauses."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from ota.agent import beat, reports, updater
from ota.agent.network import LaterError, RefusedError
from ota.agent.notify import Supervisor
from ota.agent.plan import OnStep
from ota.agent.state import Home
from ota.agent.updater import Outcome
from ota.errors import BusyError, OtaError, TransferError, own_errors

SOONER = 60.0  # seconds until the retry after the first failure of the link; doubles with each further one
LONGEST_LOOK = 3 * 3600.0  # seconds; all deadlines of an update end before that, so one that takes longer hangs
FIRST_WITHIN = 300.0  # seconds within which devices that were switched on together make their first check
LONGEST_SILENCE = 4_500.0  # seconds between two looks whether a heartbeat is due, where the next check is further away
LONGEST_WAIT = 86_400.0  # seconds until the next check, however long the server asks to wait

log = logging.getLogger(__name__)


def pause(every: float, failures: int, part: float, asked: float = 0.0) -> float:
    """Compute the seconds until the next check.

    Args:
        every: seconds between two checks if the link works.
        failures: number of link failures in a row.
        part: random number from [0, 1), so that devices that checked at the same moment do not do so again.
        asked: seconds that the server asked to wait.
    """
    wanted = min(every, SOONER * 2.0 ** min(failures - 1, 20)) if failures else every
    return max(wanted * (0.75 + part / 2), min(asked, LONGEST_WAIT) * (1 + part / 4))


def until_reports(asked: float, part: float) -> float:
    """Compute the seconds until reports are sent again between two checks.

    Args:
        asked: seconds that are left of the wait that the gateway asked for; 0: it asked for none.
        part: random number from [0, 1), so that devices which were told to wait at the same moment do not come back at the same one.
    """
    return min(LONGEST_SILENCE, max(asked, SOONER) * (1 + part / 4)) if asked else LONGEST_SILENCE


def run(
    home: Home,
    every: float,
    stopped: threading.Event,
    tell: Callable[[Outcome | OtaError], None],
    on_step: OnStep | None = None,
    at_once: bool = False,
    supervisor: Supervisor | None = None,
) -> None:
    """Update and wait, again and again, until stopped; an error is passed to `tell`, and the next check tries again.

    Args:
        home: the agent's directory; locked during each update only.
        every: seconds between two checks.
        stopped: set this event to end the loop. A running update may also be killed: the next one resumes.
        tell: called with the outcome or the error of each check.
        on_step: see `updater.update`.
        at_once: do not wait before the first check.
        supervisor: told that the loop runs, and that it is alive; None: nobody.

    Raises:
        OwnerError: the directory belongs to another user, which no retry can mend.
    """
    home.check_owner()
    failures, supervisor = 0, supervisor or Supervisor({})
    supervisor.ready("waits for its first check")
    if not at_once and _wait(stopped, min(every, FIRST_WITHIN) * random.random(), supervisor):  # noqa: S311
        return
    while not stopped.is_set():
        asked = 0.0
        try:
            with supervisor.working(LONGEST_LOOK), own_errors(), home.locked():
                outcome = updater.update(home, on_step)
            failures = 0
            tell(outcome)
        except TransferError as error:
            # A refusal is no failure of the link: to ask sooner changes nothing, and may lock a proxy's account.
            failures = 0 if isinstance(error, RefusedError) else failures + 1
            asked = error.seconds if isinstance(error, LaterError) else 0.0
            tell(error)
        except BusyError as error:  # somebody is updating by hand
            tell(error)
        except OtaError as error:
            failures = 0
            tell(error)
        left = pause(every, failures, random.random(), asked)  # noqa: S311
        while left > 0 and not stopped.is_set():
            _report(home, supervisor)
            silence = min(left, until_reports(reports.asked_to_wait(home), random.random()))  # noqa: S311
            _wait(stopped, silence, supervisor)
            left -= silence


def _report(home: Home, supervisor: Supervisor) -> None:
    """Send what waits, and a heartbeat if one is due; a repository that cannot be reached is no reason to be silent."""
    try:
        with supervisor.working(LONGEST_LOOK), own_errors(), home.locked():
            beat.queue_if_due(home)
            reports.send(home)
    except BusyError:
        pass  # who is updating by hand sends them
    except OtaError as error:
        log.warning("%s", error)


def _wait(stopped: threading.Event, seconds: float, supervisor: Supervisor) -> bool:
    """Wait, and give signs of life meanwhile; return whether the loop is to end."""
    until = time.monotonic() + seconds
    while supervisor.pause is not None and supervisor.pause < (left := until - time.monotonic()):
        supervisor.beat()
        if stopped.wait(min(left, supervisor.pause)):
            return True
    supervisor.beat()
    return stopped.wait(max(0.0, until - time.monotonic()) if supervisor.pause else seconds)
