"""The one thread that writes into the fleet's tables: it collects what waits and commits it together.

A commit costs one wait for the disk, whether it holds one report or hundreds. So while one commit waits for the disk, the reports
of other requests gather, and the next commit takes all of them. Each request is answered only after its commit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ota.errors import OtaError, TransferError
from ota.fleet.store import Arrived, Fleet, Verdict
from ota.gateway.metrics import Metrics
from ota.limits import MiB

log = logging.getLogger("ota.gateway")

MOST_WAITING = 2_000  # reports that wait; with more, senders are told to come back
MOST_BYTES = 4 * MiB  # of their lines
MOST_TOGETHER = 400  # reports of one commit
PROBE_SECONDS = 30.0  # without a commit, until the writer tries one
HEALTHY_SECONDS = 90.0  # since the last commit, until the gateway is not healthy

Result = Callable[[Any, Exception | None], None]
"""Takes what came of a job, or why nothing did; it is called in the writer's thread."""


@dataclass(frozen=True)
class _Job:
    arrived: Sequence[Arrived]
    call: Callable[[], Any] | None
    result: Result
    size: int = field(default=0)


class Writer:
    """Keeps reports and enrolments, one transaction after the other."""

    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        """Take the store; `start` begins."""
        self._fleet, self._metrics = fleet, metrics
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._reports = self._bytes = 0
        self._refused: Counter[str] = Counter()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._good_at, self.fault, self._told = time.monotonic(), "", ""

    def start(self) -> None:
        """Start to write.

        Raises:
            TransferError: the database takes no commit.
        """
        self._fleet.probe()
        self._good_at = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """Write what waits, and end."""
        with self._ready:
            self._ending = True
            self._ready.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of reports that wait."""
        return self._reports

    @property
    def is_healthy(self) -> bool:
        """Whether the last commit succeeded, and was not long ago."""
        return not self.fault and time.monotonic() - self._good_at < HEALTHY_SECONDS

    def keep(self, arrived: Sequence[Arrived], size: int, result: Result) -> bool:
        """Let reports be kept; return whether there is room for them.

        Args:
            arrived: reports of known devices whose signatures were verified.
            size: bytes of their lines.
            result: gets the verdicts, in the same order, once they are durable.
        """
        with self._ready:
            full = self._jobs and (self._reports + len(arrived) > MOST_WAITING or self._bytes + size > MOST_BYTES)
            if full or self._ending:
                return False
            self._jobs.append(_Job(arrived, None, result, size))
            self._reports += len(arrived)
            self._bytes += size
            self._ready.notify()
        return True

    def note(self, refused: Mapping[str, int]) -> None:
        """Let the next commit count reports that were refused, by device; a refusal alone is worth no commit."""
        with self._ready:
            self._refused.update(refused)

    def call(self, what: Callable[[], Any], result: Result) -> bool:
        """Let something else be written in its turn, such as an enrolment; return whether there is room for it."""
        with self._ready:
            if len(self._jobs) > MOST_WAITING or self._ending:
                return False
            self._jobs.append(_Job((), what, result))
            self._ready.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._jobs and not self._ending:
                    if not self._ready.wait(PROBE_SECONDS):
                        break
                if not self._jobs and self._ending:
                    return
                jobs = self._next()
            if jobs and jobs[0].call:
                self._do(jobs[0])
            else:
                self._commit(jobs)

    def _next(self) -> list[_Job]:
        """Take the jobs of the next transaction: a call alone, or as many reports as go together."""
        taken: list[_Job] = []
        count = 0
        while self._jobs and (not taken or (not self._jobs[0].call and count + len(self._jobs[0].arrived) <= MOST_TOGETHER)):
            job = self._jobs.popleft()
            taken.append(job)
            count += len(job.arrived)
            self._reports -= len(job.arrived)
            self._bytes -= job.size
            if job.call:
                break
        return taken

    def _commit(self, jobs: list[_Job]) -> None:
        """Keep the reports of some requests in one transaction, and tell each request; without requests, try whether it can.

        Where the database can be used and something else fails, such as at a damaged row of one device, each request is tried alone.
        """
        together = [one for job in jobs for one in job.arrived]
        with self._ready:
            refused, self._refused = self._refused, Counter()
        verdicts: list[Verdict] = []
        began = time.monotonic()
        try:
            if jobs or refused:
                verdicts = self._fleet.keep(together, refused=refused)
            else:
                self._fleet.probe()
        except TransferError as error:
            self._failed(error)
            for job in jobs:
                job.result(None, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever fails, nothing is acknowledged, and the writer goes on
            if len(jobs) > 1 or refused:  # the counts of refused reports are given up, for they may be what fails
                for alone in [[job] for job in jobs] or [[]]:
                    self._commit(alone)
            elif jobs:
                self._spoilt(jobs[0], error)
            else:
                self._failed(error)
            return
        self._good(len(together), time.monotonic() - began)
        at = 0
        for job in jobs:
            job.result(verdicts[at : at + len(job.arrived)], None)
            at += len(job.arrived)

    def _do(self, job: _Job) -> None:
        began = time.monotonic()
        try:
            found = job.call() if job.call else None
        except TransferError as error:
            self._failed(error)
            job.result(None, error)
        except Exception as error:  # noqa: BLE001 - the request is told, and the writer goes on
            job.result(None, error)
        else:
            self._good(0, time.monotonic() - began)
            job.result(found, None)

    def _good(self, rows: int, seconds: float) -> None:
        if self.fault:
            log.warning("the database takes reports again")
        self.fault, self._good_at = "", time.monotonic()
        if rows:
            self._metrics.committed(rows, seconds)

    def _spoilt(self, job: _Job, error: Exception) -> None:
        """Tell a request that its reports cannot be kept, although the database takes others."""
        names = ", ".join(sorted({one.opened.report.device for one in job.arrived})[:5])
        said = f"{names}: {error if isinstance(error, OtaError) else type(error).__name__}"
        if said != self._told:  # the device comes back with the same reports
            log.error(
                "these reports cannot be kept, and are not acknowledged: %s", said, exc_info=not isinstance(error, OtaError)
            )
        self._told = said
        self._metrics.failed()
        job.result(None, error)

    def _failed(self, error: Exception) -> None:
        said = str(error) if isinstance(error, OtaError) else f"{type(error).__name__}"
        if said != self.fault:  # the same fault is written once, however many requests meet it
            log.error(
                "the database takes no reports, and nothing is acknowledged: %s", said, exc_info=not isinstance(error, OtaError)
            )
        self.fault = said
        self._metrics.failed()
