"""Show a run on Prefect's page, beyond its log: the progress of long steps, the gate's decision, and samples.

Nothing depends on the page: MLflow and the ledger hold the figures, the decision and the samples, too.
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
    """Show the progress of the steps in the block on Prefect's page, too."""
    bars: dict[str, tuple[UUID, float]] = {}
    lock = threading.Lock()

    def show(label: str, done: int, total: int) -> None:
        percent = 100.0 * done / max(total, 1)
        with lock, suppress(Exception):  # training goes on even if the page cannot be written
            if label not in bars:
                made: Any = create_progress_artifact(progress=percent, key=_key(label), description=label)
                bars[label] = made, percent
            elif percent >= 100 or percent - bars[label][1] >= EVERY:
                update_progress_artifact(artifact_id=bars[label][0], progress=percent)
                bars[label] = bars[label][0], percent

    with steps.listening(show):
        yield


def decision(subject: Subject, number: int, made: Decision, samples: Path) -> None:
    """Show the gate's decision on a version with all its checks, and the samples that the version draws."""
    checks = "\n".join(f"| {'yes' if c.passed else '**no**'} | {c.text} |" for c in made.checks)
    create_markdown_artifact(
        key=_key(f"decision {subject}"), description=f"{subject} version {number}: {made.outcome}",
        markdown=f"# {subject} version {number}: {made.outcome}\n\n{made.reason}\n\n| passed | check |\n|---|---|\n{checks}\n",
    )  # fmt: skip
    # The picture is part of the page: for a page from the network, a browser loads no file from any disk, not even its own.
    picture = base64.b64encode(samples.read_bytes()).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{picture}", key=_key(f"samples {subject}"), description=f"{subject} version {number}"
    )


def _key(text: str) -> str:
    """Turn a text into a key for Prefect, which takes only lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
