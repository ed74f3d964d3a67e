"""What a training run tells whoever watches it: figures after every step, and samples of the moving average now and then.

The one seam between `train` and the outside. Watching changes no weight: the samples come from noise of their own.

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

from model.config import VARIANTS, VariantName
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
    """What one step of training came to.

    Attributes:
        loss: mean squared error of the velocity, over the batches of all processes.
        learning_rate: of this step.
        load: [M][E] mean gate mass of each block's experts; no experts, no columns.
    """

    loss: float
    learning_rate: float
    load: list[list[float]]

    def numbers(self) -> dict[str, float]:
        """The figures by name, the load as its largest share and, for each block, its entropy over log E.

        An entropy of 1 says that all experts are used alike, 0 that one does everything; see `Usage.entropy`.
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
"""(steps done, n captions, the moving average's images of them: uint8 [n, C, R, R])"""


@dataclass(frozen=True)
class Watcher:
    """Whoever watches; heard in the first of several processes. What it raises ends the run, which can be resumed.

    Attributes:
        step: called after every step with its number, from 1.
        samples: called after each quarter of the steps, at the end with the weights that are kept; None: nothing is drawn.
    """

    step: Callable[[int, Figures], None] = lambda _step, _figures: None
    samples: OnSamples | None = None


def recorded_after(step: int, steps: int) -> bool:
    """Whether the figures of step number `step`, from 1, are a point of the curve that a run of `steps` steps keeps."""
    return (step - 1) % CURVE_EVERY == 0 or step == steps


def sampled_after(steps: int) -> set[int]:
    """The numbers of steps after which a run of `steps` steps draws samples; always the last."""
    return {-(-steps * part // PARTS) for part in range(1, PARTS + 1)}


@torch.no_grad()
def draw(network: Network, dataset: Dataset, variant: VariantName) -> tuple[list[str], npt.NDArray[np.uint8]]:
    """A few images of the data's most frequent captions: n captions and uint8 [n, C, R, R].

    Always from the same noise, so that what changes from one call to the next is the network alone. A variant that is guided is
    drawn in few steps by ab2; a distilled one, which knows only its own steps, in those.
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
    taught = VARIANTS[variant]
    sampler = Sampler(steps=8) if taught.guided else Sampler(method="mean", steps=taught.steps, guidance=1)
    images = sample(guided(lambda *inputs: network(*inputs)[0], ids, sampler.guidance), noise, sampler)
    return captions, to_bytes(images.nan_to_num().cpu())
