"""Watch a training: report its progress, and log figures and samples to MLflow while it runs.

If MLflow fails, nothing is lost: figures and pictures are also in the training's own folder, and the registration completes the
run from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from flows import progress, telling
from flows.workspace import Workspace
from model.config import canonical_sha256
from model.drawing import training_samples
from model.scorecard import DataVersion
from model.train import code_sha256, load_checkpoint
from model.watch import Figures, Watcher, recorded_after
from registry.catalog import Subject
from registry.runs import LiveTraining, Training, open_retraining, open_training


def retraining_key(workspace: Workspace, data: DataVersion) -> str:
    """Hash what MLflow's run around a retraining stands for: a data revision, with the present code and settings."""
    return canonical_sha256([data.line, data.md5, code_sha256(), workspace.line(data.line).model_dump(mode="json")])[:32]


@contextmanager
def watching(workspace: Workspace, subject: Subject, key: str, steps: int, data: DataVersion) -> Iterator[Watcher]:
    """Report a training to the listeners and log it to MLflow; a failure of MLflow neither ends nor changes the training.

    Args:
        workspace: where it is trained, in work/runs/`key`.
        subject: what is trained.
        key: hash of what the training depends on; a killed training finds its run again by this key.
        steps: number of steps in all.
        data: what is trained on.

    Yields:
        the watcher that the training calls after each step and with its samples.
    """
    folder, label = workspace.work / "runs" / key, f"train {subject}"

    def begin() -> Training:
        within = open_retraining(workspace.catalog, data, retraining_key(workspace, data))
        return open_training(workspace.catalog, subject, key, within)

    live = LiveTraining(begin, failed=_warn)

    def step(number: int, figures: Figures) -> None:
        progress.advance(label, number, steps, f"loss {figures.loss:.3g}")
        if recorded_after(number, steps):
            live.tell(lambda training: training.figures(number, figures.numbers()))

    def samples(number: int, captions: list[str], images: npt.NDArray[np.uint8]) -> None:
        path = training_samples(folder, number, captions, images)
        live.tell(lambda training: training.sample(path))

    try:
        yield Watcher(step, samples)
    except BaseException:
        live.tell(Training.fail)
        raise
    lineage = load_checkpoint(folder).lineage
    live.tell(lambda training: training.finish(lineage.sha256))


def _warn(error: Exception) -> None:
    telling.tell(f"MLflow does not show this training until it is registered: {error}")
