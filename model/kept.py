"""The share of a retraining's gain that a smaller update keeps, from paired losses on held-out images.

The loss is that of training: the squared error of the velocity, on the same images, noises and times for every model. So what the
images have in common cancels, and a share of 98 % can be proved with some hundred images, where a distance between sets of images
has an interval of several tens of percent.

    >>> before, after, small = (losses(network, dataset) for network in (fielded, master, update))
    >>> kept(before, after, small, alpha=0.05).low
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from model.data import Dataset, mix, to_unit
from model.diffusion import add_noise
from model.hardware import Hardware
from model.network import Network
from model.scorecard import Kept

SEED = 2_000_000  # of noises and times; no training and no evaluation uses it
DRAWS = 8  # pairs of noise and time for each image, at most
MOST = 4096  # evaluations of the network for one model, about
BATCH = 64
LEAST_GROUPS = 4  # with fewer independent groups nothing is shown


@dataclass(frozen=True)
class Losses:
    """Loss of each held-out image, averaged over its noises and times; models that are compared saw the same."""

    values: npt.NDArray[np.float64]  # [n]
    groups: npt.NDArray[np.intp]  # [n]
    choosing: npt.NDArray[np.bool_]  # [n], whether an image belongs to the half with which choices are made

    @property
    def chooses(self) -> float:
        """Mean over the half with which choices are made, infinite if it is empty; no figure that is proved uses these images."""
        return float(self.values[self.choosing].mean()) if self.choosing.any() else math.inf

    @property
    def proving(self) -> Losses:
        """The other half, with which a share is proved."""
        rest = ~self.choosing
        return Losses(self.values[rest], self.groups[rest], self.choosing[rest])


def losses(network: Network, dataset: Dataset) -> Losses:
    """Compute the flow-matching loss of each held-out image.

    Args:
        network: the model, in evaluation mode; it is moved to this process's hardware.
        dataset: its held-out images are used, `MOST` of them at most.
    """
    order = np.random.Generator(np.random.Philox(key=mix(SEED, 0))).permutation(len(dataset.reference()))[:MOST]
    chosen = dataset.reference()[order]
    choosing = np.array([_is_choosing(dataset.groups[i]) for i in chosen], dtype=np.bool_)
    return Losses(_losses(network, dataset, chosen), dataset.reference_groups()[order], choosing)


def _is_choosing(group: str) -> bool:
    """Check whether a held-out group belongs to the half with which choices are made; the hash of its name decides."""
    return bool(hashlib.sha256(b"choosing " + group.encode(errors="surrogatepass")).digest()[0] & 1)


@torch.inference_mode()
def _losses(network: Network, dataset: Dataset, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Compute the loss of each of these images, averaged over its noises and times: [n]."""
    device = Hardware.here().device
    network = network.to(device)
    draws = max(1, min(DRAWS, MOST // len(chosen)))
    total = np.zeros(len(chosen))
    for first in range(0, len(chosen), BATCH):
        rows = chosen[first : first + BATCH]
        images, ids = to_unit(dataset.images[rows]).to(device), torch.from_numpy(dataset.ids[rows]).to(device)
        for draw in range(draws):
            noise, t = (part.to(device) for part in _drawn(images.shape, first, draw, draws))
            x, velocity = add_noise(images, noise, t)
            error = (network(x, t, t, ids)[0] - velocity).square().flatten(1).mean(dim=1)
            total[first : first + BATCH] += error.double().cpu().numpy()
    return total / draws


def _drawn(shape: torch.Size, first: int, draw: int, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noises and times of one batch; the times of an image are stratified: one in each of `draws` equally likely parts."""
    generator = torch.Generator().manual_seed(mix(SEED, first, draw))
    noise = torch.randn(shape, generator=generator)
    part = (draw + torch.rand(shape[0], generator=generator, dtype=torch.float64)) / draws
    return noise, torch.sigmoid(torch.special.ndtri(part.clamp(1e-6, 1 - 1e-6))).float()


def kept(fielded: Losses, unlimited: Losses, update: Losses, alpha: float) -> Kept:
    """Estimate the share of the gain that an update keeps, with bounds.

    The share is a ratio of two means over groups. Its bounds are those shares that a t-test does not reject (Fieller 1954): a share
    s is rejected if the mean over groups of (gain of the update - s times the gain without a limit) is not zero. With few groups
    this holds its level, where a bootstrap over groups promises too much (docs/decisions/0154).

    Args:
        fielded: losses of the weights that devices have; these and the others on images with which nothing was chosen.
        unlimited: losses of the retraining without a limit, which is the master.
        update: losses of the weights that devices would compute.
        alpha: chance that the true share lies below the lower bound, and that it lies above the upper one.
    """
    if not len(fielded.values):  # so few groups that all of them were used to choose
        return Kept(share=None, low=None, high=None, gain=0.0, items=0, groups=0, alpha=alpha)
    count = int(fielded.groups.max()) + 1
    whole, own = (_sums(fielded.values - other.values, fielded.groups, count) for other in (unlimited, update))
    there = np.bincount(fielded.groups, minlength=count) > 0
    whole, own = whole[there], own[there]
    groups, items = len(whole), len(fielded.values)
    gain = float(whole.sum() / items)
    bounds = _fieller(own, whole, alpha) if groups >= LEAST_GROUPS else None
    share = None if bounds is None else float(own.sum() / whole.sum())
    low, high = bounds or (None, None)
    return Kept(share=share, low=low, high=high, gain=gain, items=items, groups=groups, alpha=alpha)


def _sums(values: npt.NDArray[np.float64], groups: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.float64]:
    """Add up values by group; return [count]."""
    return np.asarray(np.bincount(groups, values, minlength=count), dtype=np.float64)


def _fieller(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], alpha: float) -> tuple[float, float] | None:
    """Return the bounds of mean(a) / mean(b); None: b is not shown to be above zero, so any share is possible."""
    n = len(a)
    t2 = float(stats.t.ppf(1 - alpha, n - 1)) ** 2
    cov = np.cov(a, b) / n
    mean_a, mean_b = float(a.mean()), float(b.mean())
    square = mean_b**2 - t2 * cov[1, 1]
    if mean_b <= 0 or square <= 0:
        return None
    middle = (mean_a * mean_b - t2 * cov[0, 1]) / square
    reach = math.sqrt(max(0.0, middle**2 - (mean_a**2 - t2 * cov[0, 0]) / square))
    return float(middle - reach), float(middle + reach)
