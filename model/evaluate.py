"""How good an exported model is: distances to held-out images, in two feature spaces, with errors where a gate needs them.

Generated images start from fixed noise seeds and take their captions from the held-out items, so two models are compared
on the same noise and the same captions; what they share cancels.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import stats
from scipy.spatial.distance import cdist

from model import footprint
from model.config import ModelConfig, PrecisionName
from model.data import Dataset, decode, mix, to_bytes
from model.errors import DataError, ExportError
from model.features import SPACES, Features, FeatureSpaces, published_features
from model.graph import WEIGHTS_FILE
from model.scorecard import (
    CaptionRow,
    Comparison,
    Cost,
    Lineage,
    Memorisation,
    PublishedFid,
    Quality,
    Sampler,
    Scorecard,
    Sha256,
    Usage,
)
from model.session import SESSION_CONFIG, Session
from model.session import load as load_session

NEIGHBOURS = 5
BLOCKS = 10  # of the jackknife
WIDTHS = (0.25, 0.5, 1.0, 2.0)  # of the Gaussian kernels, in median distances; each twice the one before
YARDSTICK_SEED = 6
LATENCY_IMAGES = 5
EVALUATION_SEED = 1_000_000
MEMORY_SEED = 7
MEMORY_IMAGES = 2000  # training images that are searched for copies; the others go unseen
CAPTION_ROWS = 12
PUBLISHED_BATCH = 256  # decoded images of a folder that are held at a time
BLANK_DEVIATION = 2.0  # grey levels; an image with less is constant
DEAD_SHARE = 0.1  # of an even share

Images = npt.NDArray[np.uint8]  # [n, C, R, R]
Distances = npt.NDArray[np.float64]
Groups = npt.NDArray[np.intp]  # [m], numbered from 0
OnBatch = Callable[[int, int], None]
"""Called with (images made, images to make)."""


@dataclass(frozen=True)
class Drawn:
    """What a model drew for an evaluation."""

    images: Images
    load: npt.NDArray[np.float32]  # [S, M, E], by sampling step
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
    load = np.average(loads, axis=0, weights=[len(part) for part in images]).astype(np.float32)
    return Drawn(pixels, load, float((~finite.numpy() | blank).mean()))


def kernel(x: Features, y: Features, scale: float) -> npt.NDArray[np.float64]:
    """Mean of four Gaussian kernels around a scale, [n, m] (Gretton et al. 2012; widths as in Li et al. 2015).

    Bounded, unlike the cubic kernel that KID uses: new data may lie far outside what the features were standardised on, and
    a few such images would otherwise decide alone.
    """
    power: npt.NDArray[np.float64] = np.exp(cdist(x, y, "sqeuclidean") * (-0.5 / (max(WIDTHS) * scale) ** 2))
    result = power / len(WIDTHS)
    for _ in WIDTHS[1:]:  # half the width is the fourth power, and two squares cost a tenth of an exponential
        np.square(np.square(power, out=power), out=power)
        result += power / len(WIDTHS)
    return result


def kernel_distance(x: Features, y: Features, scale: float, groups: Groups | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased: 0 on average when both come from one distribution, below 2 always."""
    return kernel_interval(x, y, scale, groups)[0]


def kernel_interval(x: Features, y: Features, scale: float, groups: Groups | None = None) -> tuple[float, float]:
    """The kernel distance and its standard error, from the influence functions of its three means.

    A mean over pairs varies as the sum of the influences 2 h₁ of single images (Hoeffding 1948; for this distance Gretton et
    al. 2012, theorem 8). Estimated from the same pairs, their variance also holds what the pairs add at small n, so that the
    interval stays honest, a little wide, where the distance is near zero and h₁ vanishes.

    Args:
        x: [m, d] held-out images.
        y: [n, d] generated ones.
        scale: of the kernel.
        groups: [m] group of each held-out image, as in `relative_distance`. Pairs within a group tell nothing about
            pairs of independent images: they are left out, and influences are summed by group. None, or all in one group:
            every image is its own.
    """
    n, m = len(y), len(x)
    groups = np.arange(m) if groups is None or len(np.unique(groups)) == 1 else groups
    xx, yy, xy = kernel(x, x, scale), kernel(y, y, scale), kernel(x, y, scale)
    xx = np.where(groups[:, None] == groups[None], 0, xx)
    size = np.bincount(groups)  # [G]
    pairs = size * (m - size)  # [G] ordered pairs that start in a group
    u_xx, u_yy = xx.sum() / pairs.sum(), (yy.sum() - np.trace(yy)) / (n * (n - 1))
    psi_y = 2 * ((yy.sum(axis=1) - np.diag(yy)) / (n - 1) - xy.mean(axis=0))
    psi_x = 2 * (np.bincount(groups, weights=xx.sum(axis=1)) - u_xx * pairs) / pairs.sum()
    psi_x -= 2 * np.bincount(groups, weights=xy.mean(axis=1) - xy.mean()) / m
    held_out = np.sum(psi_x**2) * len(size) / (len(size) - 1)
    return float(u_xx + u_yy - 2 * xy.mean()), float(np.sqrt(np.var(psi_y, ddof=1) / n + held_out))


def frechet_distance(x: Features, y: Features) -> float:
    """Fréchet distance of the two Gaussians with these means and covariances (Heusel et al. 2017)."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(np.complex128)).real
    shift = float(np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2))
    return float(shift + np.trace(a) + np.trace(b) - 2 * roots.sum())


def frechet_error(x: Features, y: Features, groups: Groups | None = None) -> float | None:
    """Standard error of the Fréchet distance: a jackknife that leaves out a tenth of one side at a time (Shao and Wu 1989).

    How far the figure would move with other images of the same number. The distance is also too large, by an amount that
    depends on n alone; of that this error says nothing, so it must not be used to compare figures of unequal n.

    Args:
        x: [m, d] held-out images.
        y: [n, d] generated ones.
        groups: [m] group of each held-out image; a group is left out as a whole.

    Returns:
        None where fewer than two images of a side would be left. A fifth or so too large at a hundred images in 64 dimensions.
    """
    variance = 0.0
    groups = np.arange(len(x)) if groups is None else groups
    for side, other, block in ((x, y, _blocks(groups)), (y, x, _blocks(np.arange(len(y))))):
        count = int(block.max()) + 1
        rest = [side[block != b] for b in range(count)]
        if min(map(len, rest)) < 2:
            return None
        variance += (count - 1) * float(np.var([frechet_distance(part, other) for part in rest]))
    return float(np.sqrt(variance))


def _blocks(groups: Groups) -> Groups:
    """At most ten blocks of whole groups, by a fixed draw."""
    count = int(groups.max()) + 1
    order = np.random.Generator(np.random.Philox(key=YARDSTICK_SEED)).permutation(count)
    blocks: Groups = (order % min(BLOCKS, count))[groups]
    return blocks


def radii(x: Features) -> tuple[npt.NDArray[np.float64], int]:
    """Distance of each item to its k-th nearest other one, [n], and k: 5, or all the others where they are fewer."""
    k = min(NEIGHBOURS, len(x) - 1)
    return np.sort(cdist(x, x), axis=1)[:, k], k


def precision(reference: Features, generated: Features) -> float:
    """Share of generated items in the ball of some reference item's 5 nearest neighbours (Kynkäänniemi et al. 2019).

    Recall is this share with the two sides exchanged.
    """
    radius = radii(reference)[0]
    return float((cdist(reference, generated) <= radius[:, None]).any(axis=0).mean())


def density(reference: Features, generated: Features) -> float:
    """Reference balls around a generated item, in units of the 5 that are expected: about 1 is right (Naeem et al. 2020)."""
    radius, k = radii(reference)
    return float((cdist(reference, generated) <= radius[:, None]).sum(axis=0).mean() / k)


def coverage(reference: Features, generated: Features) -> float:
    """Share of reference items with a generated one inside the ball of their 5 nearest neighbours (Naeem et al. 2020)."""
    return float((cdist(reference, generated).min(axis=1) <= radii(reference)[0]).mean())


def relative_distance(
    reference: Features, challenger: Features, champion: Features, scale: float, groups: Groups | None = None
) -> tuple[float, float]:
    """MMD²(reference, challenger) - MMD²(reference, champion) and its standard error.

    The relative similarity test of Bounliphone et al. 2016 with the variance of the paired design: challenger i and
    champion i started from the same noise, so their influence functions are subtracted before their variance is taken.

    Args:
        reference: [m, d] held-out images.
        challenger: [n, d].
        champion: [n, d], row i from the same seed and caption as the challenger's.
        scale: of the kernel.
        groups: [m] group of each held-out image; images of one group (crops of one photograph) are not independent, so their
            influences are summed before the variance is taken (the cluster-robust estimator of Liang and Zeger 1986). None:
            every image is its own.
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
    groups = np.arange(m) if groups is None else groups
    clusters = np.bincount(groups, weights=psi_x - psi_x.mean())  # sums, [G]
    count = len(clusters)
    held_out = np.sum(clusters**2) / m**2 * count / max(1, count - 1)
    variance = np.var(psi_c - psi_h, ddof=1) / n + held_out
    # What pairs add beyond single images is in the influences of both of a pair, so it was counted twice.
    among, between = _centred(cc - hh), _centred(xc - xh)
    np.fill_diagonal(among, 0)
    by_group = between if count == m else np.array([between[groups == g].sum(axis=0) for g in range(count)])  # [G, n]
    twice = 2 * np.sum(among**2) / (n * (n - 1)) ** 2 + 4 * np.sum(by_group**2) / (m * n) ** 2
    return float(delta), float(np.sqrt(max(variance / 2, variance - twice)))


def _centred(pairs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Without what a row or a column has in common: what only the pair has."""
    centred: npt.NDArray[np.float64] = pairs - pairs.mean(axis=0) - pairs.mean(axis=1, keepdims=True) + pairs.mean()
    return centred


def pure_noise(like: Images) -> Images:
    """As many images of uniform noise: what a model draws that has learned nothing, a fixed yardstick of harm."""
    return np.random.Generator(np.random.Philox(key=YARDSTICK_SEED)).integers(0, 256, like.shape, dtype=np.uint8)


def quality(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, split: str) -> list[Quality]:
    """The distances of one model's images to one split's held-out images, in both spaces."""
    rows = []
    reference, groups = dataset.images[dataset.reference()], dataset.reference_groups()
    noise = pure_noise(reference)
    for space in SPACES:
        x, y, scale = spaces(space, reference), spaces(space, drawn.images), spaces.scale(space)
        kd, kd_se = kernel_interval(x, y, scale, groups)
        rows.append(
            Quality(
                space=space,
                space_sha256=spaces.sha256,
                split=split,
                n=len(y),
                reference=len(x),
                groups=int(groups.max()) + 1,
                fd=frechet_distance(x, y),
                fd_se=frechet_error(x, y, groups),
                kd=kd,
                kd_se=kd_se,
                noise_kd=kernel_distance(x, spaces(space, noise), scale, groups),
                precision=precision(x, y),
                recall=precision(y, x),
                density=density(x, y),
                coverage=coverage(x, y),
            )
        )
    return rows


def compare(
    spaces: FeatureSpaces,
    dataset: Dataset,
    challenger: Drawn,
    champion: Drawn,
    split: str,
    champion_sha256: Sha256,
    against: Literal["champion", "anchor", "solver"] = "champion",
) -> list[Comparison]:
    """The challenger against champion or anchor, or a student against its solver, on one split, in both spaces."""
    rows = []
    reference, groups = dataset.images[dataset.reference()], dataset.reference_groups()
    for space in SPACES:
        x, h, scale = spaces(space, reference), spaces(space, champion.images), spaces.scale(space)
        delta, se = relative_distance(x, spaces(space, challenger.images), h, scale, groups)
        rows.append(
            Comparison(
                against=against,
                against_sha256=champion_sha256,
                space=space,
                split=split,
                n=len(h),
                groups=int(groups.max()) + 1,
                delta=delta,
                se=se,
                champion_kd=kernel_distance(x, h, scale, groups),
            )
        )
    return rows


def memorisation(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn) -> list[Memorisation]:
    """Whether generated images lie nearer to training images than held-out ones do, in both spaces."""
    order = np.random.Generator(np.random.Philox(key=MEMORY_SEED)).permutation(dataset.training())
    training, reference = dataset.images[np.sort(order[:MEMORY_IMAGES])], dataset.images[dataset.reference()]
    rows = []
    for space in SPACES:
        known = spaces(space, training)
        generated = cdist(spaces(space, drawn.images), known).min(axis=1)
        held_out = cdist(spaces(space, reference), known).min(axis=1)
        probability, se, z = copying(generated, held_out, dataset.reference_groups())
        rows.append(
            Memorisation(
                space=space,
                n=len(generated),
                reference=len(held_out),
                training=len(known),
                probability=probability,
                se=se,
                z=z,
                p=float(stats.norm.sf(z)),
                nearer_than_any=float((generated < held_out.min()).mean()),
            )
        )
    return rows


def copying(generated: Distances, held_out: Distances, groups: Groups | None = None) -> tuple[float, float, float]:
    """P(a generated image is nearer to its nearest training image than a held-out one is), its error, and z of this being 1/2.

    The Mann-Whitney test of Meehan et al. 2020 over the whole space (they also cut it into cells), with the sign turned: a
    large z says that images are copied. Ties count one half. In the variance the held-out images enter by group, as in
    `relative_distance`, through their ranks among themselves; for images that are each their own it is the test's usual one. That
    holds at 1/2; the error of any other probability is DeLong's (1988), again by group.

    Args:
        generated: [n] distances to the nearest training image.
        held_out: [m] the same of held-out images.
        groups: [m] group of each held-out image; None: every image is its own.
    """
    n, m = len(generated), len(held_out)
    probability = 1 - float(stats.mannwhitneyu(generated, held_out).statistic) / (n * m)
    ranks = (stats.rankdata(held_out) - (m + 1) / 2) / m  # mean 0, variance about 1/12
    clusters = np.bincount(np.arange(m) if groups is None else groups, weights=ranks)
    correction = len(clusters) / max(1, len(clusters) - 1)
    variance = 1 / (12 * n) + np.sum(clusters**2) / m**2 * correction
    nearer = (generated[:, None] < held_out) + 0.5 * (generated[:, None] == held_out) - probability  # [n, m]
    by_group = np.bincount(np.arange(m) if groups is None else groups, weights=nearer.mean(axis=0))
    error = np.var(nearer.mean(axis=1), ddof=1) / n + np.sum(by_group**2) / m**2 * correction
    return probability, float(np.sqrt(error)), float((probability - 0.5) / np.sqrt(variance))


def by_caption(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, captions: list[str]) -> list[CaptionRow]:
    """How far the images of each of the most frequent captions lie from held-out images of that caption.

    Args:
        spaces: the `trained` one is used, which tells captions apart.
        dataset: gives the held-out images.
        drawn: images.
        captions: what image i was drawn for.
    """
    reference, groups = dataset.reference(), dataset.reference_groups()
    held_out, generated = spaces("trained", dataset.images[reference]), spaces("trained", drawn.images)
    own, asked = np.array([dataset.captions[i] for i in reference]), np.array(captions)
    frequent = sorted(Counter(own.tolist()).items(), key=lambda row: (-row[1], row[0]))[:CAPTION_ROWS]
    rows = []
    for caption, count in frequent:
        x, y = held_out[own == caption], generated[asked == caption]
        near, far = nearest_of_others(x, y, groups[own == caption])
        rows.append(
            CaptionRow(
                caption=caption, n=len(y), reference=count, generated=near, held_out=far,
                ratio=near / far if near is not None and far else None,
            )
        )  # fmt: skip
    return rows


def nearest_of_others(x: Features, y: Features, groups: Groups) -> tuple[float | None, float | None]:
    """Mean distance of y to the nearest of x, and of each of x to the nearest of the other groups of x.

    Each of x looks for a neighbour outside its own group. The distance from y is averaged over the same choices of what is
    left out, else y would have more to choose from and look too good where images are few.

    Args:
        x: [m, d].
        y: [n, d].
        groups: [m] group of each of x.

    Returns:
        None for a distance that has nothing to be measured on.
    """
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None, None
    within, across = cdist(x, x), cdist(y, x)
    within[index[:, None] == index[None]] = np.inf
    nearest = np.stack([across[:, index == g].min(axis=1) for g in range(len(names))], axis=1)  # [n, G]
    first, second = np.partition(nearest, 1, axis=1)[:, :2].T
    left_out = (np.bincount(index) / len(x))[nearest.argmin(axis=1)]  # how often the nearest group is the one left out
    near = float((left_out * second + (1 - left_out) * first).mean()) if len(y) else None
    return near, float(within.min(axis=1).mean())


def usage(load: npt.NDArray[np.float32]) -> Usage:
    """Expert usage from the mean load [S, M, E] of each sampling step."""
    mean = load.mean(axis=0)
    share = mean / np.maximum(mean.sum(axis=1, keepdims=True), 1e-12)
    experts = load.shape[2]
    entropy = -np.sum(share * np.log(np.maximum(share, 1e-12)), axis=1) / max(np.log(max(experts, 1)), 1e-12)
    return Usage(
        load=[[round(float(v), 6) for v in row] for row in mean],
        by_step=[[[round(float(v), 4) for v in row] for row in step] for step in load],
        entropy=[round(float(v), 4) if experts > 1 else 1.0 for v in entropy],
        dead=int((share < DEAD_SHARE / max(experts, 1)).sum()),
    )


def measure_cost(folder: Path, caption: str, sampler: Sampler) -> Cost:
    """Median time of one image on this machine, one thread, batch of one, and peak memory in a process of its own."""
    session = load_session(folder, threads=1)
    ids = session.encode([caption])
    session.generate(ids, [0], sampler)
    times = []
    for i in range(LATENCY_IMAGES):
        start = time.perf_counter()
        session.generate(ids, [i], sampler)
        times.append(time.perf_counter() - start)
    bare, peak = measure_memory(folder, 1 if sampler.guidance == 1 else 2)
    return Cost(
        milliseconds=round(1000 * float(np.median(times)), 3),
        evaluations=sampler.evaluations,
        peak_mib=round(peak, 1),
        bare_mib=round(bare, 1),
        machine=f"{platform.machine()}, {platform.processor() or 'unknown processor'}",
    )


def measure_memory(folder: Path, batch: int) -> tuple[float, float]:
    """MiB of a fresh process before the model is loaded, and its peak after network evaluations (see `model.footprint`).

    Raises:
        ExportError: the process fails.
    """
    command = [sys.executable, "-P", footprint.__file__, str(folder), WEIGHTS_FILE, str(batch), json.dumps(SESSION_CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own file
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the memory of {folder} cannot be measured: {reason}; export the checkpoint again")
    bare, peak = json.loads(done.stdout)
    return float(bare), float(peak)


def published_fid(folder: Path, generated: Images, file: Path) -> PublishedFid:
    """FID by the usual protocol between all images of a folder and generated ones.

    The folder's images are cut to their central square and brought to the generated ones' size and channels, as training
    images are; then both go through `model.features.published_features`. torchmetrics computes the same formula, in the same
    float64, from the same module, and would be one more dependency for it: ours is used.

    Args:
        folder: PNG, JPEG and other images, anywhere below it.
        generated: uint8 [n, C, R, R].
        file: TorchScript of the network.

    Raises:
        DataError: there is no such file or folder, an image cannot be decoded, or a side has fewer than two images.
        CheckpointError: the file is no TorchScript, or not of a network that gives features.
    """
    features, sha256 = published_features(file)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; put the images there, or name another one")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.registered_extensions())
    if min(len(paths), len(generated)) < 2:
        raise DataError(f"FID needs two images on each side, but {folder} has {len(paths)} and {len(generated)} were generated")
    parts = []
    for first in range(0, len(paths), PUBLISHED_BATCH):
        chunk = []
        for path in paths[first : first + PUBLISHED_BATCH]:
            try:
                chunk.append(decode(path, generated.shape[2], generated.shape[1]))
            except DataError as error:
                raise DataError(f"{path} {error}; take it out of the folder") from error
        parts.append(features(np.stack(chunk)))
    x, y = np.concatenate(parts), features(generated)
    return PublishedFid(fid=frechet_distance(x, y), n=len(y), reference=len(x), dimensions=x.shape[1], features_sha256=sha256)


def scorecard(
    lineage: Lineage,
    config: ModelConfig,
    weights_sha256: Sha256,
    sampler: Sampler,
    precision: PrecisionName,
    drawn: Drawn,
    qualities: list[Quality],
    comparisons: list[Comparison],
    memories: list[Memorisation],
    captions: list[CaptionRow],
    cost: Cost,
    solver: Sampler | None = None,
) -> Scorecard:
    """Put the figures of one model together; `solver` is how `full` was drawn beside a student."""
    beside = [row.delta for row in comparisons if row.against == "solver"]
    return Scorecard(
        line=lineage.data.line, tier=config.tier, configuration=config.configuration, variant=lineage.variant,
        weights_sha256=weights_sha256, lineage_sha256=lineage.sha256, sampler=sampler, precision=precision, seed=EVALUATION_SEED,
        quality=qualities, comparisons=comparisons, memorisation=memories, captions=captions, bad_images=drawn.bad,
        usage=usage(drawn.load), cost=cost, solver=solver if beside else None, beats_solver=max(beside) < 0 if beside else None,
    )  # fmt: skip
