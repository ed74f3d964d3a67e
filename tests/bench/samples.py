"""Make the README's picture out of a demo's workspace: `python -m tests.bench.samples WORKSPACE OUT.png`.

The left half shows held-out photographs, the right half what the champion draws for the same captions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from flows.steps import champion_files, open_dataset
from flows.workspace import Workspace
from model import session
from model.data import to_bytes
from model.train import load_checkpoint
from registry.champions import champions

ROWS = {
    "surfaces": ("brick", "brick, stain", "coins", "grass", "gravel, hole", "dim brick", "dim coins", "page"),
    "digits": ("zero", "two", "three", "seven"),
}
COLUMNS, SCALE, LABEL, GAP = 7, 3, 92, 12


def enlarged(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Put images [n, C, R, R] into a row and enlarge each pixel to a square."""
    cells = [np.pad(i[0].repeat(SCALE, 0).repeat(SCALE, 1), 1, constant_values=255) for i in images]
    return np.concatenate(cells, axis=1)


def main() -> None:
    """Draw the picture and write it."""
    workspace, out = Workspace(Path(sys.argv[1])), Path(sys.argv[2])
    rows: list[tuple[str, npt.NDArray[np.uint8]]] = []
    for line, captions in ROWS.items():
        champion = champions(workspace, workspace.class_subjects(line, "edge"))["full"]
        files = champion_files(workspace, champion)
        data = load_checkpoint(files.checkpoint).lineage.data
        dataset = open_dataset(workspace, workspace.line(line), "I", data)
        model = session.load(files.bundle)
        for caption in captions:
            real = [i for i in range(len(dataset.captions)) if dataset.captions[i] == caption]
            held_out = [i for i in real if dataset.held_out[i]]
            if len(held_out) < COLUMNS:
                continue  # too few images that no model has seen to fill a row
            photographs = dataset.images[[held_out[i * len(held_out) // COLUMNS] for i in range(COLUMNS)]]
            drawn, _ = model.generate(model.encode([caption] * COLUMNS), list(range(COLUMNS)), workspace.line(line).sampler)
            gap = np.full((enlarged(photographs).shape[0], GAP), 255, np.uint8)
            rows.append((caption, np.concatenate((enlarged(photographs), gap, enlarged(to_bytes(drawn))), axis=1)))
    height, width = rows[0][1].shape
    sheet = Image.new("L", (LABEL + width, 18 + height * len(rows)), 255)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((LABEL + 2, 2), "held-out photographs and scans", 0, font)
    pen.text((LABEL + 2 + (width + GAP) // 2, 2), "drawn by the fielded model", 0, font)
    for number, (caption, row) in enumerate(rows):
        pen.text((2, 18 + number * height + height // 2 - 7), caption, 0, font)
        sheet.paste(Image.fromarray(row), (LABEL, 18 + number * height))
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main()
