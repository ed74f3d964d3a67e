"""Draw the golden images of an exported model, as a device does when it tries the model."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from model import session
from model.drawing import sampler_of
from model.errors import ExportError
from model.export import STATISTICS, image_statistics
from model.scorecard import Frozen


class GoldenImages(Frozen):
    """What was measured on the golden images of an exported model."""

    finite: bool
    statistics: tuple[tuple[str, float], ...]
    """Means over the images: (name, value)."""
    load: tuple[tuple[float, ...], ...]
    """Mean load of each expert of each block [M][E]."""


def measure(folder: Path) -> GoldenImages:
    """Draw the golden images of an exported model and measure them.

    Raises:
        ExportError: the files are not those of an exported model.
    """
    try:
        with np.load(folder / "golden.npz", allow_pickle=False) as file:
            ids, seeds = file["ids"], [int(seed) for seed in file["seeds"]]
        sampler = sampler_of(folder)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ExportError(
            f"{folder} does not hold the golden outputs of an exported model; export the checkpoint again"
        ) from error
    images, load = session.load(folder).generate(ids, seeds, sampler)
    drawn = images.numpy()
    means = image_statistics(np.nan_to_num(drawn).clip(-1, 1)).mean(axis=0)
    return GoldenImages(
        finite=bool(np.isfinite(drawn).all()),
        statistics=tuple((name, round(float(value), 6)) for name, value in zip(STATISTICS, means, strict=True)),
        load=tuple(tuple(float(mass) for mass in row) for row in load),
    )
