"""Watch a training: report its progress, and log figures and samples to MLflow while it runs.

If MLflow fails, nothing is lost: figures and pictures are also in the training's own folder, and the registration completes the
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
from registry.catalog import Subject
from registry.errors import StoreError
from registry.lineage import shortened
from registry.runs import Retraining, Training, end_runs, open_retraining, open_training

SAMPLES = "samples"  # folder of the pictures, inside the checkpoint's
Picture = Callable[[dict[str, list[Any]], Path], object]
"""Called with images by caption, and the file to write."""


def retraining(workspace: Workspace, data: DataVersion) -> Retraining:
    """Open MLflow's run around all that is made of a data revision with the present code and settings; the first call creates it.

    Raises:
        StoreError: MLflow cannot be reached.
    """
    return open_retraining(workspace.catalog, data, _key(workspace, data))


def _key(workspace: Workspace, data: DataVersion) -> str:
    return canonical_sha256([data.line, data.md5, code_sha256(), workspace.line(data.line).model_dump(mode="json")])[:32]


@contextmanager
def ending(workspace: Workspace, data: DataVersion) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """End all MLflow runs of a line: first those of killed calls, after the block also those of this call, however it ends.

    Yields:
        a function that takes the results, each `Retrained` as plain data, for the page of the retraining's run.

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

    end_runs(workspace.catalog, data.line, key, None)
    try:
        yield tell
    except BaseException:
        with suppress(StoreError):  # the first error is reported; the next call ends the runs that are left
            end_runs(workspace.catalog, data.line, key, "FAILED")
        raise
    end_runs(workspace.catalog, data.line, key, "FINISHED", told)


@contextmanager
def watching(
    workspace: Workspace, subject: Subject, key: str, steps: int, picture: Picture, data: DataVersion
) -> Iterator[Watcher]:
    """Report a training to the listeners and log it to MLflow; a failure of MLflow neither ends nor changes the training.

    Args:
        workspace: where it is trained, in work/runs/`key`.
        subject: what is trained.
        key: hash of what the training depends on; a killed training finds its run again by this key.
        steps: number of steps in all.
        picture: writes a grid of samples.
        data: what is trained on.

    Yields:
        the watcher that the training calls after each step and with its samples.
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
    """MLflow's run of a training; after the first failure it is not used any more."""

    def __init__(self, workspace: Workspace, subject: Subject, key: str, data: DataVersion) -> None:
        self._training: Training | None = None
        with self._whatever_happens():
            self._training = open_training(workspace.catalog, subject, key, retraining(workspace, data))

    def tell(self, act: Callable[[Training], None]) -> None:
        """Call a function with MLflow's run, unless an earlier call failed."""
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
    """Select the figures of a recorded curve that are single numbers; the load by expert stays in the checkpoint's file."""
    return [{name: value for name, value in row.items() if not isinstance(value, list)} for row in curve]
