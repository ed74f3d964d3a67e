"""How good an exported model is: distances to held-out images, in two feature spaces, with errors where a gate needs them.

Generated images start from fixed noise seeds and take their captions from the held-out items, so two models are compared
on the same noise and the same captions; what they share cancels.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.distance import cdist

from model.config import ModelConfig
from model.data import Dataset, mix, to_bytes
from model.errors import DataError
from model.features import SPACES, Features, FeatureSpaces
from model.scorecard import Comparison, Cost, Lineage, Quality, Sampler, Scorecard, Sha256, Usage
from model.session import Session

NEIGHBOURS = 5
WIDTHS = (0.25, 0.5, 1.0, 2.0)  # of the Gaussian kernels, in median distances
YARDSTICK_SEED = 6
LATENCY_IMAGES = 5
EVALUATION_SEED = 1_000_000
BLANK_DEVIATION = 2.0  # grey levels; an image with less is constant
DEAD_SHARE = 0.1  # of an even share

Images = npt.NDArray[np.uint8]  # [n, C, R, R]
OnBatch = Callable[[int, int], None]
"""Called with (images made, images to make)."""


@dataclass(frozen=True)
class Drawn:
    """What a model drew for an evaluation."""

    images: Images
    load: npt.NDArray[np.float32]  # [M, E]
    bad: float  # share of images that are constant or not finite


def held_out_captions(dataset: Dataset, n: int) -> list[str]:
    """N captions in the proportions of the held-out items; the same for every model.

    Raises:
        DataError: fewer than 2 are asked for.
    """
    if n < 2:
        raise DataError(f"an evaluation of {n} images says nothing; ask for at least 2")
    reference = dataset.reference()
    order = np.random.Generator(np.random.Philox(key=mix(n, 5))).permutation(len(reference))
    return [dataset.captions[reference[order[i % len(order)]]] for i in range(n)]


def draw(session: Session, captions: list[str], sampler: Sampler, on_batch: OnBatch | None = None) -> Drawn:
    """Generate the images of an evaluation."""
    images, loads = [], []
    for part, load in session.generate_many(captions, EVALUATION_SEED, sampler):
        images.append(part)
        loads.append(load)
        if on_batch:
            on_batch(sum(map(len, images)), len(captions))
    made = torch.cat(images)
    finite = made.isfinite().flatten(1).all(dim=1)
    pixels = to_bytes(torch.nan_to_num(made))
    blank = pixels.reshape(len(pixels), -1).std(axis=1) < BLANK_DEVIATION
    return Drawn(pixels, np.mean(loads, axis=0, dtype=np.float32), float((~finite.numpy() | blank).mean()))


def kernel(x: Features, y: Features, scale: float) -> npt.NDArray[np.float64]:
    """Mean of four Gaussian kernels around a scale, [n, m] (Gretton et al. 2012; widths as in Li et al. 2015).

    Bounded, unlike the cubic kernel that KID uses: new data may lie far outside what the features were standardised on, and
    a few such images would otherwise decide alone.
    """
    squared = cdist(x, y, "sqeuclidean") / scale**2
    result: npt.NDArray[np.float64] = np.mean([np.exp(-squared / (2 * width**2)) for width in WIDTHS], axis=0)
    return result


def kernel_distance(x: Features, y: Features, scale: float) -> float:
    """Squared maximum mean discrepancy, unbiased: 0 on average when both come from one distribution, below 2 always."""
    xx, yy = kernel(x, x, scale), kernel(y, y, scale)
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y, scale).mean())


def frechet_distance(x: Features, y: Features) -> float:
    """Fréchet distance of the two Gaussians with these means and covariances (Heusel et al. 2017)."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(np.complex128)).real
    shift = float(np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2))
    return float(shift + np.trace(a) + np.trace(b) - 2 * roots.sum())


def coverage(reference: Features, generated: Features) -> float:
    """Share of reference items with a generated one inside the ball of their 5 nearest neighbours (Naeem et al. 2020)."""
    k = min(NEIGHBOURS, len(reference) - 1)
    radius = np.sort(cdist(reference, reference), axis=1)[:, k]
    return float((cdist(reference, generated).min(axis=1) <= radius).mean())


def relative_distance(reference: Features, challenger: Features, champion: Features, scale: float) -> tuple[float, float]:
    """MMD²(reference, challenger) - MMD²(reference, champion) and its standard error.

    The relative similarity test of Bounliphone et al. 2016 with the variance of the paired design: challenger i and
    champion i started from the same noise, so their influence functions are subtracted before their variance is taken.

    Args:
        reference: [m, d] held-out images.
        challenger: [n, d].
        champion: [n, d], row i from the same seed and caption as the challenger's.
        scale: of the kernel.
    """
    n, m = len(challenger), len(reference)
    cc, hh = kernel(challenger, challenger, scale), kernel(champion, champion, scale)
    xc, xh = kernel(reference, challenger, scale), kernel(reference, champion, scale)
    u_cc = (cc.sum() - np.trace(cc)) / (n * (n - 1))
    u_hh = (hh.sum() - np.trace(hh)) / (n * (n - 1))
    delta = u_cc - u_hh - 2 * (xc.mean() - xh.mean())
    psi_c = 2 * ((cc.sum(axis=1) - np.diag(cc)) / (n - 1) - xc.mean(axis=0))
    psi_h = 2 * ((hh.sum(axis=1) - np.diag(hh)) / (n - 1) - xh.mean(axis=0))
    psi_x = -2 * (xc.mean(axis=1) - xh.mean(axis=1))
    variance = np.var(psi_c - psi_h, ddof=1) / n + np.var(psi_x, ddof=1) / m
    return float(delta), float(np.sqrt(variance))


def pure_noise(like: Images) -> Images:
    """As many images of uniform noise: what a model draws that has learned nothing, a fixed yardstick of harm."""
    return np.random.Generator(np.random.Philox(key=YARDSTICK_SEED)).integers(0, 256, like.shape, dtype=np.uint8)


def quality(spaces: FeatureSpaces, reference: Images, drawn: Drawn, split: str) -> list[Quality]:
    """The distances of one model's images to one split, in both spaces."""
    rows = []
    noise = pure_noise(reference)
    for space in SPACES:
        x, y, scale = spaces(space, reference), spaces(space, drawn.images), spaces.scale(space)
        rows.append(
            Quality(
                space=space,
                space_sha256=spaces.sha256,
                split=split,
                n=len(y),
                reference=len(x),
                fd=frechet_distance(x, y),
                kd=kernel_distance(x, y, scale),
                noise_kd=kernel_distance(x, spaces(space, noise), scale),
                coverage=coverage(x, y),
            )
        )
    return rows


def compare(
    spaces: FeatureSpaces, reference: Images, challenger: Drawn, champion: Drawn, split: str, champion_sha256: Sha256
) -> list[Comparison]:
    """The challenger against the champion on one split, in both spaces."""
    rows = []
    for space in SPACES:
        x, h, scale = spaces(space, reference), spaces(space, champion.images), spaces.scale(space)
        delta, se = relative_distance(x, spaces(space, challenger.images), h, scale)
        rows.append(
            Comparison(
                against="champion",
                against_sha256=champion_sha256,
                space=space,
                split=split,
                n=len(h),
                delta=delta,
                se=se,
                champion_kd=kernel_distance(x, h, scale),
            )
        )
    return rows


def usage(load: npt.NDArray[np.float32]) -> Usage:
    """Expert usage from the mean load [M, E]."""
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1e-12)
    dead = int((share < DEAD_SHARE / load.shape[1]).sum())
    return Usage(load=[[round(float(v), 6) for v in row] for row in load], dead=dead)


def measure_cost(session: Session, caption: str, sampler: Sampler) -> Cost:
    """Median time of one image on this machine, batch of one; give a session with one thread."""
    ids = session.encode([caption])
    session.generate(ids, [0], sampler)
    times = []
    for i in range(LATENCY_IMAGES):
        start = time.perf_counter()
        session.generate(ids, [i], sampler)
        times.append(time.perf_counter() - start)
    return Cost(
        milliseconds=round(1000 * float(np.median(times)), 3),
        evaluations=sampler.evaluations,
        machine=f"{platform.machine()}, {platform.processor() or 'unknown processor'}",
    )


def scorecard(
    lineage: Lineage,
    config: ModelConfig,
    weights_sha256: Sha256,
    sampler: Sampler,
    drawn: Drawn,
    qualities: list[Quality],
    comparisons: list[Comparison],
    cost: Cost,
) -> Scorecard:
    """Put the figures of one model together."""
    return Scorecard(
        line=lineage.data.line, tier=config.tier, configuration=config.configuration, variant=lineage.variant,
        weights_sha256=weights_sha256, lineage_sha256=lineage.sha256, sampler=sampler, seed=EVALUATION_SEED,
        quality=qualities, comparisons=comparisons, bad_images=drawn.bad, usage=usage(drawn.load), cost=cost,
    )  # fmt: skip
