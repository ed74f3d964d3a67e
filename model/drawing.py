"""What an exported model draws in an evaluation: drawn once, kept, and shown as a grid."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model import evaluate, session
from model.config import canonical_sha256
from model.evaluate import Drawn
from model.scorecard import Sampler

GRID_COLUMNS, GRID_ROWS = 8, 6
SAMPLES = "samples"  # folder of a training's pictures, inside the checkpoint's
OnImage = Callable[[str, int, int], None]
"""(beginning of the weights' hash, images drawn, images to draw)"""


@dataclass
class Drawer:
    """An exported model with a sampler; what it draws for given captions is kept, keyed by its weights."""

    folder: Path
    """Of the exported files."""
    kept: Path
    """Folder in which drawn images are kept."""
    sampler: Sampler
    on_image: OnImage | None = None

    def __post_init__(self) -> None:
        with (self.folder / "weights.bin").open("rb") as file:
            self.weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._session: session.Session | None = None

    def draw(self, captions: list[str]) -> Drawn:
        """Draw an image for each caption, or load what was drawn for them before, also if more were drawn then."""
        folder = self.kept / canonical_sha256([self.weights_sha256, self.sampler.model_dump(), evaluate.EVALUATION_SEED])[:32]
        for path in sorted(folder.glob("*.npz")):
            if drawn := _read(path, captions):
                return drawn
        self._session = self._session or session.load(self.folder)
        drawn = evaluate.draw(self._session, captions, self.sampler, self._progress)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{canonical_sha256(captions)[:32]}.npz"
        fresh = path.with_suffix(".tmp")
        with fresh.open("wb") as file:
            asked = np.frombuffer(json.dumps(captions).encode(), np.uint8)
            np.savez(file, captions=asked, images=drawn.images, by_step=drawn.load, bad=drawn.bad)
        fresh.replace(path)
        return drawn

    def by_caption(self, captions: list[str]) -> dict[str, list[Any]]:
        """Group the images that are drawn for captions by caption."""
        return grouped(captions, self.draw(captions).images)

    def _progress(self, done: int, total: int) -> None:
        if self.on_image:
            self.on_image(self.weights_sha256[:8], done, total)


def _read(path: Path, captions: list[str]) -> Drawn | None:
    """Read kept images that begin with those of the captions, each of which has a seed by its place; None: they do not."""
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            if json.loads(file["captions"].tobytes())[: len(captions)] != captions:
                return None
            return Drawn(file["images"], file["by_step"], float(file["bad"])).first(len(captions))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def sampler_of(bundle: Path) -> Sampler:
    """Read from its sampler table how a device draws with a bundle."""
    table = json.loads((bundle / "sampler.json").read_bytes())
    times, interval = table["times"], {k: table[k] for k in ("guidance_low", "guidance_high") if k in table}
    steps, shift = len(times) - 1, 1.0
    if steps > 1 and times[1] != 1 - 1 / steps:  # the table has the times themselves; the first of them tells the shift
        shift = round(times[1] / (steps - 1) / (1 - times[1]), 6)
    return Sampler(method=table["method"], steps=steps, guidance=table["guidance"], shift=shift, **interval)


def grouped(captions: list[str], images: npt.NDArray[np.uint8]) -> dict[str, list[Any]]:
    """Group n images [n, C, R, R] by their n captions."""
    groups: dict[str, list[Any]] = {}
    for caption, image in zip(captions, images, strict=True):
        groups.setdefault(caption, []).append(image)
    return groups


def training_samples(folder: Path, step: int, captions: list[str], images: npt.NDArray[np.uint8]) -> Path:
    """Write what a network draws during its training as a grid, and return the PNG file.

    Args:
        folder: of the training; the file goes into `SAMPLES` in it.
        step: after which the images were drawn.
        captions: n captions.
        images: of these captions, uint8 [n, C, R, R].
    """
    path = folder / SAMPLES / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture(grouped(captions, images), path)
    return path


def picture(groups: dict[str, list[Any]], path: Path, scale: int = 4) -> list[str]:
    """Write a grid of images, a row for each of the most frequent captions; return these, which also go into `<path>.json`.

    Args:
        groups: images [C, R, R] by caption.
        path: PNG file to write.
        scale: screen pixels for a pixel of an image.
    """
    rows = sorted(groups, key=lambda caption: (-len(groups[caption]), caption))[:GRID_ROWS]
    channels, size = groups[rows[0]][0].shape[:2]
    cell = size * scale + 2
    sheet = np.full((len(rows) * cell, GRID_COLUMNS * cell, channels), 255, dtype=np.uint8)
    for y, caption in enumerate(sorted(rows)):
        for x, image in enumerate(groups[caption][:GRID_COLUMNS]):
            large = image.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[y * cell + 1 : y * cell + 1 + len(large), x * cell + 1 : x * cell + 1 + len(large)] = large
    Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet).save(path)
    path.with_suffix(".json").write_text(json.dumps(sorted(rows)))
    return sorted(rows)
