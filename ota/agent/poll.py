"""Looking for updates for as long as the device runs: not all devices at once, and not more often when something fails."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from ota.agent import reports, updater
from ota.agent.state import Home
from ota.agent.updater import Outcome
from ota.errors import BusyError, OtaError, TransferError, own_errors

SOONER = 60.0  # seconds after the first failure of the link; twice as long after each that follows
FIRST_WITHIN = 300.0  # seconds in which devices that got power together look for the first time

log = logging.getLogger(__name__)


def pause(every: float, failures: int, part: float) -> float:
    """Seconds until the next look.

    Args:
        every: seconds between two looks that succeed.
        failures: of the link in a row.
        part: drawn from [0, 1): devices that looked together will not do so again.
    """
    wanted = min(every, SOONER * 2.0 ** min(failures - 1, 20)) if failures else every
    return wanted * (0.75 + part / 2)


def run(
    home: Home,
    every: float,
    stopped: threading.Event,
    tell: Callable[[Outcome | OtaError], None],
    on_step: updater.OnStep | None = None,
    at_once: bool = False,
) -> None:
    """Update, wait, and again, until stopped; what goes wrong is told, and tried again at the next look.

    Args:
        home: the agent's directory; locked for each update only.
        every: seconds between two looks.
        stopped: set to end it. An update at work may also be killed: the next one goes on.
        tell: called with how each look ended.
        on_step: as for `updater.update`.
        at_once: do not wait before the first look.

    Raises:
        OwnerError: the directory is another user's; that does not heal by itself.
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
        except BusyError as error:  # somebody updates by hand
            tell(error)
        except OtaError as error:
            failures = 0
            tell(error)
        stopped.wait(pause(every, failures, random.random()))  # noqa: S311
