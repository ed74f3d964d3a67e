"""Real images without a download: surfaces cut from the photographs that scikit-image ships, and scanned digits.

The module makes two lines of data for the demo, the tests and the benchmarks. Each comes in two deliveries, as in a factory:

- `surfaces`, first delivery: patches of brick, grass, gravel and coins; a third of them carry a drawn defect (scratch,
  stain or hole). Second delivery: the same surfaces under darker, slanting light, captioned "dim", and printed pages as a
  new surface.
- `digits`: scikit-learn's 8x8 scans; the second delivery holds the other half of the scans.

The seed determines everything. Patches are cut from tiles that do not overlap, and the tile is the `group`, so no part of a
held-out image is seen in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.metadata import METADATA

# Surface → (side of a patch in photograph pixels, side of a tile); the patch side is the scale at which the surface is
# recognisable in 16 pixels. Small tiles make many groups, and only those count as independent observations.
SURFACES = {"brick": (80, 96), "grass": (40, 48), "gravel": (56, 64), "coins": (64, 72)}
SECOND_SURFACES = {"page": (44, 48)}
DEFECTS = ("scratch", "stain", "hole")
DEFECT_SHARE = 1 / 3
STORED_SIDE = 32  # pixels of a patch as stored; models scale it to their own size
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Picture = npt.NDArray[np.float32]  # [rows, columns], 0 is black and 1 is white


def surfaces(folder: Path, delivery: int, patches: int = 320, seed: int = 0) -> int:
    """Write one delivery of surface patches into `folder` and add it to its metadata; return the number of images.

    Args:
        folder: created if missing; a second delivery is added to the first.
        delivery: 1 or 2.
        patches: images for each surface.
        seed: determines patches, defects and light.
    """
    rng = np.random.default_rng([seed, delivery])
    cut = SURFACES if delivery == 1 else {**SURFACES, **SECOND_SURFACES}
    rows = []
    for surface, (side, tile) in cut.items():
        photograph = _photograph(surface)
        for number in range(patches):
            patch, group = _patch(photograph, side, tile, rng)
            caption = surface
            if rng.random() < DEFECT_SHARE:
                defect = DEFECTS[rng.integers(len(DEFECTS))]
                patch, caption = _draw(patch, defect, rng), f"{surface}, {defect}"
            if delivery == 2 and surface in SURFACES:
                patch, caption = _slanting_light(patch, rng), f"dim {caption}"
            name = f"{surface}/{delivery}-{number:04d}.png"
            _save(folder / name, patch)
            rows.append({"file_name": name, "text": caption, "group": f"{surface}/{group}"})
    _append(folder, rows)
    return len(rows)


def digits(folder: Path, delivery: int) -> int:
    """Write one half of scikit-learn's scanned digits into `folder`; return the number of images."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    rows = []
    for number, (scan, target) in enumerate(zip(scans.images, scans.target, strict=True)):
        if number % 2 != delivery - 1:
            continue
        name = f"{delivery}/{number:04d}.png"
        _save(folder / name, np.asarray(scan / 16, dtype=np.float32))
        rows.append({"file_name": name, "text": DIGIT_NAMES[target]})
    _append(folder, rows)
    return len(rows)


def _photograph(surface: str) -> Picture:
    import skimage.data

    return np.asarray(getattr(skimage.data, surface)() / 255, dtype=np.float32)


def _patch(photograph: Picture, side: int, tile: int, rng: np.random.Generator) -> tuple[Picture, str]:
    """Cut a patch out of a random tile of the photograph, mirror it half of the time, and return it with the tile's name."""
    rows, columns = photograph.shape[0] // tile, photograph.shape[1] // tile
    row, column = int(rng.integers(rows)), int(rng.integers(columns))
    y, x = (int(k * tile + rng.integers(tile - side + 1)) for k in (row, column))
    patch = photograph[y : y + side, x : x + side]
    patch = patch[:, ::-1] if rng.random() < 0.5 else patch
    scaled = Image.fromarray(np.ascontiguousarray(patch)).resize((STORED_SIDE, STORED_SIDE), Image.Resampling.BOX)
    return np.asarray(scaled, dtype=np.float32), f"{row},{column}"


def _draw(patch: Picture, defect: str, rng: np.random.Generator) -> Picture:
    """Draw one defect: a light straight scratch, a soft dark stain, or a black round hole."""
    side = patch.shape[0]
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    cy, cx = rng.uniform(0.3 * side, 0.7 * side, size=2)
    if defect == "scratch":
        angle = rng.uniform(0, np.pi)
        across = np.abs((x - cx) * np.sin(angle) - (y - cy) * np.cos(angle))
        along = np.abs((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle))
        mask = np.clip(1.6 - across, 0, 1) * (along < 0.42 * side)
        target = 1.0
    elif defect == "stain":
        radius = rng.uniform(0.2, 0.3) * side
        mask = 0.8 * np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / radius**2) ** 2))
        target = 0.15
    else:
        radius = rng.uniform(0.1, 0.18) * side
        mask = np.clip(radius - np.hypot(x - cx, y - cy) + 0.5, 0, 1)
        target = 0.0
    drawn: Picture = (patch * (1 - mask) + target * mask).astype(np.float32)
    return drawn


def _slanting_light(patch: Picture, rng: np.random.Generator) -> Picture:
    """Darken a patch, by more than a third on average, with light that falls off from left to right as if a lamp was moved."""
    fall = np.linspace(rng.uniform(0.8, 0.95), rng.uniform(0.3, 0.45), patch.shape[1], dtype=np.float32)
    lit: Picture = patch * fall[None, :]
    return lit


def _save(path: Path, picture: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(path)


def _append(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Add lines to the metadata, and replace the ones that name the same files (a killed run may have left some)."""
    path = folder / METADATA
    new = {row["file_name"] for row in rows}
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    kept = [row for row in old if row["file_name"] not in new]
    fresh = path.with_name(f"{METADATA}.tmp")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
    fresh.replace(path)  # atomic
