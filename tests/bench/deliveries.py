"""Data and champions of `make bench-update`: products whose world drifts, and models that were trained on them until it paid no more.

`surfaces` is the demo's line: patches of photographs, then the same under slanting light, and printed pages. `fashion` is Debian's
package dataset-fashion-mnist (Xiao, Rasul, Vollgraf 2017): eight kinds of clothing, then the same under slanting light, and two new
kinds. Items of the second delivery have captions that the first one lacks, so a held-out item says whether it is new.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from infra.base.train import held_out_loss
from model import photographs
from model.config import ModelConfig, PrecisionName, TierName
from model.data import Dataset, prepare
from model.metadata import METADATA
from model.scorecard import DataVersion
from model.train import Checkpoint, TrainOptions, train
from tests.bench.variants import base

FASHION = Path("/usr/share/datasets/fashion-mnist")
KINDS = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker", "bag", "boot")
FIRST_KINDS = 8  # kinds in the first delivery
EACH = 320  # images of each kind in a delivery
DATA = DataVersion(line="surfaces", path="data", rev="0" * 40, md5="0" * 32 + ".dir", files=1, bytes=1)
STORED: PrecisionName = "bfloat16"
LAMPS = 12  # releases of the drifting world after the first delivery
LAMP_WINDOW = 3  # newest lamps whose patches a release is trained on, beside the first delivery


@dataclass(frozen=True)
class Product:
    """A line of data in two deliveries, and the champion that was trained on the first."""

    name: str
    champion: Checkpoint
    before: Dataset
    after: Dataset
    """Both deliveries."""

    def new_items(self) -> npt.NDArray[np.intp]:
        """Return the held-out items of the second delivery."""
        known = set(self.before.captions)
        return np.array([i for i in self.after.reference() if self.after.captions[i] not in known], np.intp)


def config_of(tier: TierName) -> ModelConfig:
    """Return the shape of the demo's network in another tier."""
    return ModelConfig(tier=tier, configuration="I", image_size=16, channels=1, text_length=20)


def product(name: str, tier: TierName, work: Path) -> Product:
    """Prepare a product in `work`, and train its champion unless that was done before.

    Raises:
        SystemExit: the Debian package with the images of `fashion` is not installed.
    """
    deliver: Callable[[Path, int], object] = photographs.surfaces if name == "surfaces" else fashion
    config, sets = config_of(tier), []
    for last in (1, 2):
        folder = work / f"{name}-{last}"
        if not (folder / "whole").is_file():
            for delivery in range(1, last + 1):
                deliver(folder / "data", delivery)
            (folder / "whole").touch()
        sets.append(prepare(folder / "data", config, work / "cache", f"{name}-{last}"))
    champion = (
        base(work / "base") if (name, tier) == ("surfaces", "nano") else _converged(config, sets[0], work / f"{name}-{tier}")
    )
    return Product(f"{name}, {tier}", champion, *sets)


CHAMPION = TrainOptions(
    steps=2400, batch=16, learning_rate=2e-3, warmup=100, decay_from=0.5, ema=0.998, stored=STORED, seed=19, save_every=100
)  # fmt: skip
SETTLED = 0.01  # share of the loss that a third of the training more may still win; above it, it is trained on
MOST_ROUNDS = 3


def _converged(config: ModelConfig, dataset: Dataset, folder: Path) -> Checkpoint:
    """Train in rounds until one wins less than SETTLED of the held-out loss."""
    champion, loss = None, float("inf")
    for number in range(MOST_ROUNDS):
        options = (
            CHAMPION
            if champion is None
            else CHAMPION.model_copy(update={"steps": 800, "learning_rate": 1e-3, "seed": 19 + number})
        )
        champion = train(config, dataset, DATA, options, folder / str(number), parent=champion)
        before, loss = loss, held_out_loss(champion.network(), dataset)
        if loss > (1 - SETTLED) * before:
            break
    assert champion is not None
    return champion


def fashion(folder: Path, delivery: int) -> None:
    """Write one delivery of clothing: eight kinds, or all ten of which the eight are under slanting light.

    Raises:
        SystemExit: the package is not installed.
    """
    if not FASHION.is_dir():
        raise SystemExit("install Debian's package dataset-fashion-mnist, or leave FULL=1 out")
    images = _idx(FASHION / "train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = _idx(FASHION / "train-labels-idx1-ubyte.gz", 8)
    rng, rows = np.random.default_rng([0, delivery]), []
    for kind, name in enumerate(KINDS[: FIRST_KINDS if delivery == 1 else None]):
        chosen = np.flatnonzero(labels == kind)[(delivery - 1) * EACH : delivery * EACH]
        for number, index in enumerate(chosen):
            picture, caption = images[index].astype(np.float32), name
            if delivery == 2 and kind < FIRST_KINDS:
                fall = np.linspace(rng.uniform(0.8, 0.95), rng.uniform(0.3, 0.45), 28, dtype=np.float32)
                picture, caption = picture * fall, f"dim {name}"
            path = folder / name / f"{delivery}-{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.round().astype(np.uint8)).save(path)
            rows.append({"file_name": path.relative_to(folder).as_posix(), "text": caption, "group": f"image {index}"})
    with (folder / METADATA).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _idx(path: Path, header: int) -> npt.NDArray[np.uint8]:
    """Read a file in the format of MNIST: a header of so many bytes, then one byte for each value."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def lamps(work: Path, release: int, patches: int = 160) -> Dataset:
    """Prepare the data of a release of a drifting world: the first delivery, and the newest lamps up to that of the release.

    Every release has a lamp of its own: the light falls off along another direction, and differently strongly.

    Args:
        work: folder for the data.
        release: from 1 to LAMPS.
        patches: of each surface and lamp.
    """
    config, folder = config_of("nano"), work / f"lamps-{release}"
    if not (folder / "whole").is_file():
        photographs.surfaces(folder / "data", 1, patches)
        plain = [json.loads(line) for line in (folder / "data" / METADATA).read_text().splitlines()]
        rows = []
        for lamp in range(max(1, release - LAMP_WINDOW + 1), release + 1):
            photographs.surfaces(folder / f"lamp-{lamp}", 1, patches, seed=100 + lamp)
            plain_lamp = [json.loads(line) for line in (folder / f"lamp-{lamp}" / METADATA).read_text().splitlines()]
            for row in plain_lamp:
                with Image.open(folder / f"lamp-{lamp}" / row["file_name"]) as picture:
                    lit = np.asarray(picture, dtype=np.float32) * shade(lamp, picture.width)
                name = f"{lamp}/{row['file_name']}"
                (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(lit.clip(0, 255).round().astype(np.uint8)).save(folder / "data" / name)
                rows.append({**row, "file_name": name, "text": f"{chr(96 + lamp)} {row['text']}"})
        (folder / "data" / METADATA).write_text("".join(json.dumps(row) + "\n" for row in [*plain, *rows]))
        (folder / "whole").touch()
    return prepare(folder / "data", config, work / "cache", f"lamps-{release}")


def shade(lamp: int, side: int) -> npt.NDArray[np.float32]:
    """Return the factor of each pixel under a lamp, [side, side], from 0.15 to 1.2."""
    angle, depth = 2.4 * lamp, 0.3 + 0.2 * (lamp % 3)  # the golden angle: no two lamps are alike
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    across = x * np.cos(angle) + y * np.sin(angle)
    made: npt.NDArray[np.float32] = (0.75 + 0.1 * (lamp % 4) - depth * (across + 1) / 2).clip(0.15, 1.2).astype(np.float32)
    return made
