"""An endless source of made-up photographs of surfaces: every run of a simulation gets held-out images that no other run saw.

A photograph fixes pitch, light, contrast and slope. Patches of one photograph share them, so they are one group, as patches of
real photographs are. There are three surfaces, each clean or with one of three defects: twelve captions, of which those with
defects are rare. tests/test_asked.py uses this world to judge what a model draws for a caption.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from model.config import ModelConfig
from model.data import Dataset, caption_ids

SURFACES = ("brick", "mesh", "grain")
DEFECTS = ("scratch", "stain", "hole")
DEFECT_SHARE = 1 / 3
SIDE = 16
CONFIG = ModelConfig(tier="test", configuration="I", image_size=SIDE, channels=1, text_length=20)
CAPTIONS = tuple(f"{s}{d}" for s in SURFACES for d in ("", *(f", {d}" for d in DEFECTS)))

Plane = npt.NDArray[np.float64]  # [SIDE, SIDE], 0 is black and 1 is white
Images = npt.NDArray[np.uint8]  # [n, 1, SIDE, SIDE]


def patch(surface: str, shot: dict[str, float], rng: np.random.Generator) -> Plane:
    """Draw one patch of a photograph, without a defect."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] + rng.uniform(0, 40, size=(2, 1, 1))
    if surface == "brick":  # light mortar around dark bricks, each row moved by half a brick
        high, wide = 5.0 * shot["pitch"], 9.0 * shot["pitch"]
        row = np.floor(y / high)
        across = (x + 0.5 * wide * (row % 2)) % wide
        mortar = np.clip(1.3 - np.minimum(y % high, across), 0, 1)
        tone = 0.25 * np.sin(12.9898 * row + 78.233 * np.floor((x + 0.5 * wide * (row % 2)) / wide))
        plane = 0.25 + 0.15 * tone + 0.6 * mortar
    elif surface == "mesh":  # thin light wires across each other
        a, b = (x + y) / (4.5 * shot["pitch"]), (x - y) / (4.5 * shot["pitch"])
        wires = np.maximum(np.cos(np.pi * a) ** 8, np.cos(np.pi * b) ** 8)
        plane = 0.2 + 0.65 * wires
    else:  # soft blobs of many sizes
        spectrum = np.fft.fftfreq(SIDE)[:, None] ** 2 + np.fft.fftfreq(SIDE)[None] ** 2
        soft = np.exp(-spectrum / (2 * (0.13 / shot["pitch"]) ** 2))
        field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) * soft).real
        plane = 0.5 + 0.22 * field / field.std()
    slope = np.linspace(-1, 1, SIDE)[None] * shot["slope"]
    lit = shot["light"] + shot["contrast"] * (plane - 0.45) + slope
    return np.asarray(lit + 0.02 * rng.normal(size=lit.shape))


def shoot(rng: np.random.Generator, dim: float = 0.0) -> dict[str, float]:
    """Choose at random what the patches of one photograph share: pitch, light, contrast and slope."""
    return {
        "pitch": rng.normal(1, 0.07), "light": rng.normal(0.48, 0.05) * (1 - dim), "contrast": rng.normal(1, 0.1), "slope": rng.normal(0, 0.05),
    }  # fmt: skip


def drawn(rng: np.random.Generator, captions: list[str]) -> Images:
    """Draw as a perfect model does: for each caption, a patch of a photograph of its own."""
    made = []
    for caption in captions:
        surface, _, defect = caption.partition(", ")
        plane = patch(surface, shoot(rng), rng)
        made.append(pixels(blemish(plane, defect, rng) if defect else plane))
    return np.stack(made)


def pixels(plane: Plane) -> Images:
    """Convert a patch to the stored form, [1, SIDE, SIDE]."""
    stored: Images = (plane.clip(0, 1) * 255).round().astype(np.uint8)[None]
    return stored


def blemish(plane: Plane, defect: str, rng: np.random.Generator) -> Plane:
    """Add one defect to a patch."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    cy, cx = rng.uniform(0.3 * SIDE, 0.7 * SIDE, size=2)
    if defect == "scratch":
        angle = rng.uniform(0, np.pi)
        across = np.abs((x - cx) * np.sin(angle) - (y - cy) * np.cos(angle))
        along = np.abs((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle))
        mask, target = np.clip(1.4 - across, 0, 1) * (along < 0.45 * SIDE), 1.0
    elif defect == "stain":
        mask, target = 0.85 * np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / (0.26 * SIDE) ** 2) ** 2)), 0.12
    else:
        mask, target = np.clip(0.17 * SIDE - np.hypot(x - cx, y - cy) + 0.5, 0, 1), 0.0
    return plane * (1 - mask) + target * mask


def collect(rng: np.random.Generator, photographs: int, patches: int, dim: float = 0.0) -> tuple[Images, list[str], list[str]]:
    """Collect patches of new photographs: images, captions and the photograph of each.

    Args:
        rng: the source of all random choices.
        photographs: how many of each surface.
        patches: how many of each photograph.
        dim: how much darker the light is, 0 to 1; above 0 the world has drifted.
    """
    images, captions, groups = [], [], []
    for surface in SURFACES:
        for _ in range(photographs):
            shot = shoot(rng, dim)
            name = f"{surface}/{rng.integers(1 << 60)}"
            for _ in range(patches):
                made, caption = patch(surface, shot, rng), surface
                if rng.random() < DEFECT_SHARE:
                    defect = DEFECTS[rng.integers(len(DEFECTS))]
                    made, caption = blemish(made, defect, rng), f"{surface}, {defect}"
                images.append(pixels(made))
                captions.append(caption)
                groups.append(name)
    return np.stack(images), captions, groups


def dataset(images: Images, captions: list[str], groups: list[str], held_out: Any) -> Dataset:
    """Make a dataset as the flow opens one."""
    ids = np.array([caption_ids(caption, CONFIG.text_length) for caption in captions], dtype=np.int64)
    return Dataset(images, captions, ids, np.asarray(held_out, dtype=np.bool_), groups, {})
