"""A training, watched: progress for whoever listens, figures and samples into MLflow while it runs.

What MLflow misses changes nothing: figures and pictures also lie in the training's own folder, and registration completes the
run from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flows import progress
from flows.workspace import Workspace
from model.config import canonical_sha256
from model.scorecard import DataVersion
from model.train import code_sha256, load_checkpoint
from model.watch import Figures, Watcher, recorded_after
from registry.catalog import Retraining, Subject, Training
from registry.errors import StoreError
from registry.lineage import shortened

SAMPLES = "samples"  # folder of the pictures, inside the checkpoint's
Picture = Callable[[dict[str, list[Any]], Path], object]
"""(images by caption, the file to write)"""


def retraining(workspace: Workspace, data: DataVersion) -> Retraining:
    """MLflow's run around all that is made of a data revision with the present code and settings; opened when first asked for.

    Raises:
        StoreError: MLflow cannot be reached.
    """
    return workspace.catalog.open_retraining(data, _key(workspace, data))


def _key(workspace: Workspace, data: DataVersion) -> str:
    return canonical_sha256([data.line, data.md5, code_sha256(), workspace.line(data.line).model_dump(mode="json")])[:32]


@contextmanager
def ending(workspace: Workspace, data: DataVersion) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Leave no run of a line marked as running, neither of a killed call before nor of this one, however it ends.

    Yields:
        takes what came of the retraining, `Retrained` as plain data, for the page of its run.

    Raises:
        StoreError: MLflow cannot be reached.
    """
    key, told = _key(workspace, data), ""

    def tell(rows: list[dict[str, Any]]) -> None:
        nonlocal told
        lines = [
            f"| {r['subject']} | {r['version']} | {r['outcome']} | {'yes' if r['promoted'] else 'no'} | {shortened(r['reason'], 300)} |"
            for r in rows
        ]
        head = ["| model | version | outcome | promoted | reason |", "|---|---|---|---|---|"]
        told = "\n".join([f"What came of data revision {data.rev} of {data.line}:", "", *head, *lines])

    workspace.catalog.end_runs(data.line, key, None)
    try:
        yield tell
    except BaseException:
        with suppress(StoreError):  # what went wrong first is said; the next call ends what is left
            workspace.catalog.end_runs(data.line, key, "FAILED")
        raise
    workspace.catalog.end_runs(data.line, key, "FINISHED", told)


@contextmanager
def watching(
    workspace: Workspace, subject: Subject, key: str, steps: int, picture: Picture, data: DataVersion
) -> Iterator[Watcher]:
    """Show a training to whoever listens and log it to MLflow; no failure there ends or changes the training.

    Args:
        workspace: where it is trained, in work/runs/`key`.
        subject: what is trained.
        key: of its content; a killed training finds its run by it.
        steps: how many there will be.
        picture: writes a grid of samples.
        data: what is trained on.
    """
    folder, label = workspace.work / "runs" / key, f"train {subject}"
    live = _Live(workspace, subject, key, data)

    def step(number: int, figures: Figures) -> None:
        progress.advance(label, number, steps)
        if recorded_after(number, steps):
            live.tell(lambda training: training.figures(number, figures.numbers()))

    def samples(number: int, captions: list[str], images: npt.NDArray[np.uint8]) -> None:
        groups: dict[str, list[Any]] = {}
        for caption, image in zip(captions, images, strict=True):
            groups.setdefault(caption, []).append(image)
        path = folder / SAMPLES / f"step-{number:06d}.png"
        path.parent.mkdir(exist_ok=True)
        picture(groups, path)
        live.tell(lambda training: training.sample(path))

    try:
        yield Watcher(step, samples)
    except BaseException:
        live.tell(Training.fail)
        raise
    lineage = load_checkpoint(folder).lineage
    live.tell(lambda training: training.finish(lineage.sha256))


class _Live:
    """MLflow's side of a training, given up at its first failure."""

    def __init__(self, workspace: Workspace, subject: Subject, key: str, data: DataVersion) -> None:
        self._training: Training | None = None
        with self._whatever_happens():
            self._training = workspace.catalog.open_training(subject, key, retraining(workspace, data))

    def tell(self, act: Callable[[Training], None]) -> None:
        """Do something with MLflow's run, if it is still there."""
        if self._training:
            with self._whatever_happens():
                act(self._training)

    @contextmanager
    def _whatever_happens(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, hours of training are worth more
            self._training = None
            sys.stderr.write(f"ferry: MLflow does not show this training until it is registered: {error}\n")


def points(curve: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The figures of a recorded curve that are single numbers; the load by expert stays in the checkpoint's file."""
    return [{name: value for name, value in row.items() if not isinstance(value, list)} for row in curve]
