"""What the gateway counts, in the text format of Prometheus.

The format is a few lines of text, so no library is needed for it. No label holds what came from outside: the values of each label
are fixed here, so nobody can make the list grow.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

KINDS = ("accepted", "malformed", "signature", "line", "conflict", "retired", "other")
ENDS = ("200", "400", "401", "403", "409", "413", "429", "500", "503", "other")
COMMIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Counted:
    """A number for each value of a label."""

    def __init__(self, name: str, said: str, label: str = "", values: tuple[str, ...] = ("",)) -> None:
        """Name it, say what it counts, and list the values of its label; the last one stands for all others."""
        self._name, self._said, self._label = name, said, label
        self._counts = dict.fromkeys(values, 0)

    def add(self, value: str = "", count: int = 1) -> None:
        """Count something; a value that is not listed counts as the last one."""
        self._counts[value if value in self._counts else next(reversed(self._counts))] += count

    def __getitem__(self, value: str) -> int:
        """Return a count."""
        return self._counts[value]

    def lines(self) -> list[str]:
        """Write it in the format of Prometheus."""
        shown = [(f'{{{self._label}="{value}"}}' if self._label else "", count) for value, count in self._counts.items()]
        return [*_head(self._name, self._said, "counter"), *(f"{self._name}{label} {count}" for label, count in shown)]


class Metrics:
    """All that the gateway counts; the writer's figures change in another thread."""

    def __init__(self) -> None:
        """Start at zero."""
        self.reports = Counted("ferry_gateway_reports_total", "Reports by what became of them.", "outcome", KINDS)
        self.batches = Counted("ferry_gateway_report_requests_total", "Requests with reports, by status.", "status", ENDS)
        self.unenrolled = Counted("ferry_gateway_unenrolled_total", "Requests of devices that are not enrolled.")
        self.verified = Counted("ferry_gateway_signatures_checked_total", "Signatures of reports that were checked.")
        self.enrolments = Counted("ferry_gateway_enrolments_total", "Requests to be enrolled, by status.", "status", ENDS)
        self.files = Counted(
            "ferry_gateway_file_requests_total", "Requests for published files, by status.", "status",
            ("200", "206", "304", "404", "405", "416", "503", "other"),
        )  # fmt: skip
        self._lock = threading.Lock()
        self._commits = [0] * (len(COMMIT_SECONDS) + 1)
        self._commit_seconds, self._rows, self._failed = 0.0, 0, 0
        self._gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("process_resident_memory_bytes", "Resident memory.", _resident),
            ("process_cpu_seconds_total", "Processor time.", lambda: sum(os.times()[:2])),
        ]

    def gauge(self, name: str, said: str, value: Callable[[], float]) -> None:
        """Show a value that is asked for whenever somebody looks."""
        self._gauges.append((name, said, value))

    def committed(self, rows: int, seconds: float) -> None:
        """Count a commit."""
        with self._lock:
            self._commits[bisect_left(COMMIT_SECONDS, seconds)] += 1
            self._commit_seconds += seconds
            self._rows += rows

    def failed(self) -> None:
        """Count a commit that failed."""
        with self._lock:
            self._failed += 1

    def text(self) -> str:
        """Return all of it in the format of Prometheus."""
        lines = [
            line
            for counted in (self.reports, self.batches, self.unenrolled, self.verified, self.enrolments, self.files)
            for line in counted.lines()
        ]
        with self._lock:
            name, so_far = "ferry_gateway_commit_seconds", 0
            lines += _head(name, "Time of a commit of reports, until it is on the disk.", "histogram")
            for bound, count in zip((*map(str, COMMIT_SECONDS), "+Inf"), self._commits, strict=True):
                so_far += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
            lines += [f"{name}_sum {self._commit_seconds:.6f}", f"{name}_count {so_far}"]
            for name, said, count in (
                ("ferry_gateway_committed_reports_total", "Reports in these commits.", self._rows),
                ("ferry_gateway_failed_commits_total", "Commits that the database refused.", self._failed),
            ):
                lines += [*_head(name, said, "counter"), f"{name} {count}"]
        for name, said, value in self._gauges:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [*_head(name, said, kind), f"{name} {value():.6g}" if kind == "gauge" else f"{name} {value():.3f}"]
        return "\n".join(lines) + "\n"


def _head(name: str, said: str, kind: str) -> list[str]:
    return [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]


def _resident() -> float:
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0.0
