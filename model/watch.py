"""Callbacks of a training run: figures after every step, and sample images of the moving average from time to time.

`train` reports its progress only through these callbacks. Watching changes no weight: the samples have their own noise.

    >>> watcher = Watcher(step=lambda step, figures: print(step, figures.loss))
    >>> train(config, dataset, data, options, out, watcher=watcher)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.data import Dataset, to_bytes
from model.diffusion import guided, sample
from model.network import Network
from model.scorecard import Sampler

SAMPLE_SEED = 1
CAPTIONS, SAMPLES_EACH = 4, 4  # the most frequent captions of the training items, and images for each
PARTS = 4  # samples are drawn after each quarter of the steps
CURVE_EVERY = 10  # steps between two points of the recorded curve


@dataclass(frozen=True)
class Figures:
    """Figures of one training step.

    Attributes:
        loss: mean squared error of the velocity, over the batches of all processes.
        learning_rate: rate of this step.
        load: [M][E] mean gate mass of each expert in each block; without experts the rows are empty.
    """

    loss: float
    learning_rate: float
    load: list[list[float]]

    def numbers(self) -> dict[str, float]:
        """Return the figures by name; the load becomes its largest share and, for each block, its entropy over log E.

        An entropy of 1 means that all experts are used equally, 0 that one does everything; see `Usage.entropy`.
        """
        shares = [[mass / sum(masses) for mass in masses] for masses in self.load if masses]
        named = {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "busiest_expert": max((max(row) for row in shares), default=1.0),
        }
        for block, row in enumerate(shares):
            spread = -sum(share * math.log(share) for share in row if share > 0)
            named[f"expert_entropy.{block:02d}"] = spread / math.log(len(row)) if len(row) > 1 else 1.0
        return named


OnSamples = Callable[[int, list[str], npt.NDArray[np.uint8]], None]
"""Callback with (steps done, n captions, their images drawn with the moving average: uint8 [n, C, R, R])."""


@dataclass(frozen=True)
class Watcher:
    """Callbacks of a training run, called in the first process only. If one raises, the run ends and can be resumed.

    Attributes:
        step: called after every step with its number, from 1.
        samples: called after each quarter of the steps, the last time with the final weights; None: no samples are drawn.
    """

    step: Callable[[int, Figures], None] = lambda _step, _figures: None
    samples: OnSamples | None = None


def recorded_after(step: int, steps: int) -> bool:
    """Check whether a run of `steps` steps records the figures of step `step` (from 1) in its curve."""
    return (step - 1) % CURVE_EVERY == 0 or step == steps


def sampled_after(steps: int) -> set[int]:
    """Return the numbers of the steps after which a run of `steps` steps draws samples; the last step is one of them."""
    return {-(-steps * part // PARTS) for part in range(1, PARTS + 1)}


@torch.no_grad()
def draw(network: Network, dataset: Dataset, sampler: Sampler) -> tuple[list[str], npt.NDArray[np.uint8]]:
    """Draw a few images of the data's most frequent captions: n captions and uint8 [n, C, R, R].

    The noise is always the same, so only the network changes from one call to the next.
    """
    training = dataset.training()
    common = Counter(dataset.captions[i] for i in training)
    chosen = sorted(common, key=lambda caption: (-common[caption], caption))[:CAPTIONS]
    row = {dataset.captions[i]: i for i in training}
    captions = [caption for caption in chosen for _ in range(SAMPLES_EACH)]
    config, device = network.config, network.head_mod.device
    shape = (len(captions), config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SAMPLE_SEED)).to(device)
    ids = torch.from_numpy(dataset.ids[[row[caption] for caption in captions]]).to(device)
    images = sample(guided(lambda *inputs: network(*inputs)[0], ids, sampler), noise, sampler)
    return captions, to_bytes(images.nan_to_num().cpu())
