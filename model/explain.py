"""What each routed expert does to an image: the same noise again, with one expert switched off at a time.

To switch an expert off, the stored weights of its last product are set to 0, so it adds nothing to its tokens: the same as if its
gate were 0 at every step. The routers choose as before, and the shared expert, the other experts and the attention stay. Later
blocks and later steps see the changed image, so a change shows all that follows from the missing expert, not only what the expert
itself would have drawn.

The exported model draws, in the session that devices use, so the model that is explained is the model that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.config import ModelConfig, PrecisionName
from model.errors import ConfigError, ExportError
from model.graph import layout
from model.scorecard import Sampler
from model.session import Floats, Session

BATCH = 32  # images that are drawn together
SCALES = (1, 2, 5, 10, 20, 50, 100, 255)  # grey levels that a picture of differences may show at its strongest colours
SAME, DARKER, BRIGHTER = np.array([245, 245, 245]), np.array([22, 82, 160]), np.array([196, 88, 0])
LOADS = np.array([[20, 24, 62], [38, 88, 168], [92, 178, 162], [250, 222, 92]])  # colours of a load, from none to the highest
OnImages = Callable[[int, int], None]
"""(images drawn, images to draw)"""
Pixels = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SwitchedOff:
    """Images of one caption with all experts, and with each routed expert switched off."""

    image: Pixels
    """[C, R, R], of the first noise with all experts, in grey levels from 0 to 255."""
    without: Pixels
    """[M, E, C, R, R], of the same noise with expert e of block m switched off."""
    changes: Pixels
    """[M, E, n], root mean square of the change over all pixels, in grey levels, for each of n noises."""
    load: Floats
    """[S, M, E], load of the experts at each step, with all experts, mean over the n images."""


def switch_off(
    config: ModelConfig,
    precision: PrecisionName,
    graph: bytes,
    weights: bytes,
    caption: str,
    seeds: list[int],
    sampler: Sampler,
    on_images: OnImages | None = None,
) -> SwitchedOff:
    """Draw one caption from several noises, with all experts and with each routed expert switched off.

    Args:
        config: of the model.
        precision: how its weights are stored.
        graph: the bytes of `graph.onnx`.
        weights: the bytes of `weights.bin`.
        caption: what to draw.
        seeds: of the noises.
        sampler: of the variant.
        on_images: is told how many images are drawn.

    Raises:
        ConfigError: the network has no routed experts.
        DataError: the caption does not fit into the network.
        ExportError: ONNX Runtime refuses the model, or the weights do not fit the configuration.
    """
    M, E, n = config.blocks, config.shape.experts, len(seeds)
    if not E:
        raise ConfigError("this network has no routed experts, so there is nothing to switch off; name a model with experts")
    done, total = 0, (1 + M * E) * n

    def draw(stored: bytes) -> tuple[Pixels, Floats]:
        nonlocal done
        session, images, loads = Session(graph, stored), [], []
        for first in range(0, n, BATCH):
            part = seeds[first : first + BATCH]
            made, load = session.trace(session.encode([caption] * len(part)), part, sampler)
            images.append(levels(made.numpy()))
            loads.append(load * len(part))
            done += len(part)
            if on_images:
                on_images(done, total)
        return np.concatenate(images), np.asarray(sum(loads) / n, dtype=np.float32)

    every, load = draw(weights)
    shape = every.shape[1:]
    without, changes = np.empty((M, E, *shape)), np.empty((M, E, n))
    for m in range(M):
        for e in range(E):
            images, _ = draw(silenced(config, precision, weights, m, e))
            without[m, e] = images[0]
            changes[m, e] = np.sqrt(np.square(images - every).mean(axis=(1, 2, 3)))
    return SwitchedOff(image=every[0], without=without, changes=changes, load=load)


def silenced(config: ModelConfig, precision: PrecisionName, weights: bytes, block: int, expert: int) -> bytes:
    """Return stored weights in which a routed expert adds nothing: its last product is 0, and no other byte is changed.

    Raises:
        ExportError: the weights do not fit the configuration.
    """
    placed, size = layout(config, precision)
    if len(weights) != size:
        raise ExportError(f"weights of {config.tier}/{config.configuration} take {size} bytes, not {len(weights)}")
    last = next(tensor for tensor in placed if tensor.name == f"block{block}.expert{expert}.w2")
    changed = bytearray(weights)
    changed[last.offset : last.offset + last.length] = bytes(last.length)  # zero bytes are 0 in every precision
    return bytes(changed)


def levels(images: Floats) -> Pixels:
    """Convert pixels of about [-1, 1] to grey levels from 0 to 255, not rounded."""
    return (np.nan_to_num(images).clip(-1, 1).astype(np.float64) + 1) * 127.5


def picture(image: Pixels) -> bytes:
    """Encode an image in grey levels [C, R, R] as PNG."""
    pixels = image.round().astype(np.uint8)
    return _png(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def difference(image: Pixels, other: Pixels) -> tuple[bytes, int]:
    """Show the second image minus the first, both [C, R, R]: orange where it is brighter, blue where it is darker.

    Returns:
        PNG of the mean over the channels, and the grey levels that the strongest colours stand for, one of `SCALES`.
    """
    change = (other - image).mean(axis=0)
    largest = float(np.abs(change).max())
    scale = next(step for step in SCALES if largest <= step)
    share = np.abs(change / scale)[..., None]
    colours = np.where(change[..., None] < 0, DARKER, BRIGHTER)
    return _png((SAME + share * (colours - SAME)).round().astype(np.uint8)), scale


def heat(load: Floats, most: float) -> bytes:
    """Show a load [S, E] as PNG with a row for each expert and a column for each step; `most` has the last of the `LOADS` colours."""
    at = np.clip(load.T / most if most else load.T, 0, 1) * (len(LOADS) - 1)
    below = np.minimum(np.floor(at).astype(int), len(LOADS) - 2)
    part = (at - below)[..., None]
    return _png((LOADS[below] * (1 - part) + LOADS[below + 1] * part).round().astype(np.uint8))


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
