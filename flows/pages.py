"""Show a run on Prefect's page: its name, its log, the progress of long steps, the gate's decision, and samples.

Nothing depends on the page: MLflow and the ledger hold the figures, the decision and the samples, too.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows import progress as steps
from ota.errors import printable
from registry.catalog import Subject
from registry.selection import Decision

EVERY = 5.0  # percent between two updates of a bar, and two lines of the log


def keep_logs() -> None:
    """Let runs log to Prefect and not to the terminal, unless somebody asks for Prefect's own log there."""
    if os.environ.get("PREFECT_LOGGING_LEVEL") == "CRITICAL":  # as `flows.workspace` sets it
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).propagate = False


def log(sentence: str) -> None:
    """Write a sentence into the log of the present run, if there is one."""
    with suppress(Exception):  # outside a run, or Prefect is away; a log is not worth a training
        get_run_logger().info(printable(sentence, limit=2000))


def name_run(name: str) -> None:
    """Give the present flow run a name, if there is one."""
    with suppress(Exception):
        run_id = flow_run.get_id()
        if run_id:
            with get_client(sync_client=True) as client:
                client.update_flow_run(UUID(run_id), name=name)


@contextmanager
def progress() -> Iterator[None]:
    """Show the progress of the steps in the block on Prefect's page, too, and write it into the run's log."""
    keep_logs()
    bars: dict[str, tuple[UUID, float]] = {}
    lock = threading.Lock()

    def show(label: str, done: int, total: int) -> None:
        percent = 100.0 * done / max(total, 1)
        with lock, suppress(Exception):  # training goes on even if the page cannot be written
            if label not in bars:
                made: Any = create_progress_artifact(progress=percent, key=key_of(label), description=label)
                bars[label] = made, percent
                log(steps.described(label, done, total))
            elif percent >= 100 or percent - bars[label][1] >= EVERY:
                update_progress_artifact(artifact_id=bars[label][0], progress=percent)
                bars[label] = bars[label][0], percent
                log(steps.described(label, done, total))

    with steps.listening(show), steps.hearing(log):
        yield


def decision(subject: Subject, number: int, made: Decision, samples: Path) -> None:
    """Show the gate's decision on a version with all its checks, and the samples that the version draws."""
    checks = "\n".join(f"| {'yes' if c.passed else '**no**'} | {c.text} |" for c in made.checks)
    create_markdown_artifact(
        key=key_of(f"decision {subject}"), description=f"{subject} version {number}: {made.outcome}",
        markdown=f"# {subject} version {number}: {made.outcome}\n\n{made.reason}\n\n| passed | check |\n|---|---|\n{checks}\n",
    )  # fmt: skip
    # The picture is part of the page: for a page from the network, a browser loads no file from any disk, not even its own.
    picture = base64.b64encode(samples.read_bytes()).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{picture}",
        key=key_of(f"samples {subject}"),
        description=f"What {subject} version {number} draws",
    )


def key_of(text: str) -> str:
    """Turn a text into a key for Prefect, which takes only lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
