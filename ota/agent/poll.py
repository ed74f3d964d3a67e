"""Check for updates for as long as the device runs: devices spread their checks, and retry with growing pauses."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from ota.agent import reports, updater
from ota.agent.plan import OnStep
from ota.agent.state import Home
from ota.agent.updater import Outcome
from ota.errors import BusyError, OtaError, TransferError, own_errors

SOONER = 60.0  # seconds until the retry after the first failure of the link; doubles with each further one
FIRST_WITHIN = 300.0  # seconds within which devices that were switched on together make their first check

log = logging.getLogger(__name__)


def pause(every: float, failures: int, part: float) -> float:
    """Compute the seconds until the next check.

    Args:
        every: seconds between two checks if the link works.
        failures: number of link failures in a row.
        part: random number from [0, 1), so that devices that checked at the same moment do not do so again.
    """
    wanted = min(every, SOONER * 2.0 ** min(failures - 1, 20)) if failures else every
    return wanted * (0.75 + part / 2)


def run(
    home: Home,
    every: float,
    stopped: threading.Event,
    tell: Callable[[Outcome | OtaError], None],
    on_step: OnStep | None = None,
    at_once: bool = False,
) -> None:
    """Update and wait, again and again, until stopped; an error is passed to `tell`, and the next check tries again.

    Args:
        home: the agent's directory; locked during each update only.
        every: seconds between two checks.
        stopped: set this event to end the loop. A running update may also be killed: the next one resumes.
        tell: called with the outcome or the error of each check.
        on_step: see `updater.update`.
        at_once: do not wait before the first check.

    Raises:
        OwnerError: the directory belongs to another user, which no retry can mend.
    """
    home.check_owner()
    failures = 0
    if not at_once and stopped.wait(min(every, FIRST_WITHIN) * random.random()):  # noqa: S311
        return
    while not stopped.is_set():
        try:
            with own_errors(), home.locked():
                outcome = updater.update(home, on_step)
                reports.send(home)
            failures = 0
            tell(outcome)
        except TransferError as error:
            failures += 1
            tell(error)
        except BusyError as error:  # somebody is updating by hand
            tell(error)
        except OtaError as error:
            failures = 0
            tell(error)
        stopped.wait(pause(every, failures, random.random()))  # noqa: S311
