"""What a run shows on Prefect's page besides its log: progress of long steps, the gate's decision, samples.

What the page does not get changes nothing: all of it is in MLflow and the ledger too.
"""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)

from flows import progress as steps
from registry.catalog import Subject
from registry.selection import Decision

EVERY = 5.0  # percent between two updates of a bar


@contextmanager
def progress() -> Iterator[None]:
    """Show on Prefect's page, too, how far the steps in the block are."""
    bars: dict[str, tuple[UUID, float]] = {}
    lock = threading.Lock()

    def show(label: str, done: int, total: int) -> None:
        percent = 100.0 * done / max(total, 1)
        with lock, suppress(Exception):  # a page that cannot be written to stops no training
            if label not in bars:
                made: Any = create_progress_artifact(progress=percent, key=_key(label), description=label)
                bars[label] = made, percent
            elif percent >= 100 or percent - bars[label][1] >= EVERY:
                update_progress_artifact(artifact_id=bars[label][0], progress=percent)
                bars[label] = bars[label][0], percent

    with steps.listening(show):
        yield


def decision(subject: Subject, number: int, made: Decision, samples: Path) -> None:
    """Show what the gate said of a version, every check of it, and what the version draws."""
    checks = "\n".join(f"| {'yes' if c.passed else '**no**'} | {c.text} |" for c in made.checks)
    create_markdown_artifact(
        key=_key(f"decision {subject}"), description=f"{subject} version {number}: {made.outcome}",
        markdown=f"# {subject} version {number}: {made.outcome}\n\n{made.reason}\n\n| passed | check |\n|---|---|\n{checks}\n",
    )  # fmt: skip
    # Inside the page: a browser shows no file of another machine, and none of this one to a page from the network.
    picture = base64.b64encode(samples.read_bytes()).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{picture}", key=_key(f"samples {subject}"), description=f"{subject} version {number}"
    )


def _key(text: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
