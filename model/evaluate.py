"""Evaluate an exported model: distances to held-out images in each feature space, with errors where a gate needs them.

Generated images start from fixed noise seeds and take their captions from the held-out items. So two models are compared
on the same noise and the same captions, and what they have in common cancels.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import stats
from scipy.spatial.distance import cdist

from model import distances, peak_memory
from model.config import MEMORY_IMAGES, ModelConfig, PrecisionName
from model.data import Dataset, decode, mix, to_bytes
from model.distances import ASPECTS, Groups, Sample
from model.errors import DataError, ExportError
from model.features import Features, FeatureSpaces, published_features
from model.graph import WEIGHTS_FILE
from model.scorecard import (
    FOLLOW,
    HASHES,
    CaptionCheck,
    CaptionRow,
    Comparison,
    Converged,
    Cost,
    Following,
    Lineage,
    Memorisation,
    Plausibility,
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
BLOCKS = 10  # blocks of the jackknife
YARDSTICK_SEED = 6
LATENCY_IMAGES = 5
EVALUATION_SEED = 1_000_000
MEMORY_SEED = 7
CAPTION_ROWS = 12
JUDGED_DRAWS = 32  # generated images wanted of each caption that is judged
JUDGED_CAPTIONS = 64  # judged at most, and as many words
IMPLAUSIBLE, DUPLICATE = 0.995, 0.01  # quantiles of a real image's distance to the nearest one of another group
PUBLISHED_BATCH = 256  # images of a folder that are decoded at a time
BLANK_DEVIATION = 2.0  # grey levels; an image with a smaller standard deviation counts as constant
GREY = 127.5  # grey levels of a change by 1 of a pixel, whose values span 2
DEAD_SHARE = 0.1  # of an even share; an expert with less is dead

Images = npt.NDArray[np.uint8]  # [n, C, R, R]
Distances = npt.NDArray[np.float64]
OnBatch = Callable[[int, int], None]
"""Callback with (images made so far, images in total)."""


@dataclass(frozen=True)
class Drawn:
    """Images that a model drew for an evaluation."""

    images: Images
    load: npt.NDArray[np.float32]  # [S, M, E], by sampling step
    bad: float  # share of images that are constant or not finite

    def first(self, n: int) -> Drawn:
        """Return the first n images; load and share of bad images stay those of all."""
        return Drawn(self.images[:n], self.load, self.bad)


def held_out_items(dataset: Dataset, n: int) -> npt.NDArray[np.intp]:
    """Choose the held-out items whose captions n images are drawn for; the order is the same for every model.

    If n is larger than the number of items, they repeat and are all used about equally often.

    Raises:
        DataError: n is below 2.
    """
    if n < 2:
        raise DataError(f"{n} images are too few for an evaluation; ask for at least 2")
    reference = dataset.reference()
    order = np.random.Generator(np.random.Philox(key=mix(n, 5))).permutation(len(reference))
    return np.asarray(reference[np.resize(order, n)])


def held_out_captions(dataset: Dataset, n: int) -> list[str]:
    """Return n captions in the proportions of the held-out items; the same for every model.

    Raises:
        DataError: n is below 2.
    """
    return [dataset.captions[i] for i in held_out_items(dataset, n)]


def further_items(dataset: Dataset, n: int) -> npt.NDArray[np.intp]:
    """Choose held-out items to draw again, so that each judged caption gets JUDGED_DRAWS images; n / 2 items at most.

    The caption with the fewest images comes next. So if not all can reach JUDGED_DRAWS, all get about equally many.
    """
    counts = Counter(dataset.captions[i] for i in held_out_items(dataset, n))
    own: dict[str, list[int]] = {caption: [] for caption in _judged(dataset)[0]}
    for i in dataset.reference():
        if dataset.captions[i] in own:
            own[dataset.captions[i]].append(int(i))
    more: list[int] = []
    waiting = [(counts[caption], caption) for caption in own]
    heapq.heapify(waiting)
    while waiting and len(more) < n // 2 and waiting[0][0] < JUDGED_DRAWS:
        count, caption = heapq.heappop(waiting)
        more.append(own[caption][count % len(own[caption])])
        heapq.heappush(waiting, (count + 1, caption))
    return np.array(more, dtype=np.intp)


def _judged(dataset: Dataset) -> tuple[list[str], list[str]]:
    """List the captions and the words of held-out items that are judged one by one, the most frequent ones first.

    A word is judged if several captions contain it and some do not. If there is only one caption, nothing is judged.
    """
    own = Counter(dataset.captions[i] for i in dataset.reference())
    of: dict[str, set[str]] = {}
    for caption in own:
        for word in distances.words(caption):
            of.setdefault(word, set()).add(caption)
    ranked = sorted(own, key=lambda caption: (-own[caption], caption))
    several = [word for word, captions in of.items() if 1 < len(captions) < len(own)]
    by_count = sorted(several, key=lambda word: (-sum(own[c] for c in of[word]), word))
    return ranked[:JUDGED_CAPTIONS] if len(own) > 1 else [], by_count[:JUDGED_CAPTIONS]


def draw(session: Session, captions: list[str], sampler: Sampler, on_batch: OnBatch | None = None) -> Drawn:
    """Generate the images of an evaluation, and find the bad ones."""
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


def frechet_distance(x: Features, y: Features) -> float:
    """Compute the Fréchet distance of two Gaussians with the means and covariances of x and y (Heusel et al. 2017)."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(np.complex128)).real
    shift = float(np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2))
    return float(shift + np.trace(a) + np.trace(b) - 2 * roots.sum())


def frechet_error(x: Features, y: Features, groups: Groups | None = None) -> float | None:
    """Estimate the standard error of the Fréchet distance by a jackknife over tenths of each side (Shao and Wu 1989).

    The error says how far the distance would move with other images of the same number. The distance also has an upward bias
    that depends on n alone. The error does not cover this bias, so do not use it to compare distances of unequal n.

    Args:
        x: [m, d] held-out images.
        y: [n, d] generated ones.
        groups: [m] group of each held-out image; a group is left out as a whole.

    Returns:
        the error, about a fifth too large at a hundred images in 64 dimensions; None if fewer than two images of a side would
        be left.
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
    """Divide the groups into at most ten blocks by a fixed random order; return the block of each item."""
    count = int(groups.max()) + 1
    order = np.random.Generator(np.random.Philox(key=YARDSTICK_SEED)).permutation(count)
    blocks: Groups = (order % min(BLOCKS, count))[groups]
    return blocks


def radii(x: Features) -> tuple[npt.NDArray[np.float64], int]:
    """Compute the distance of each item to its k-th nearest other item, [n], and k: 5, or n - 1 if that is less."""
    k = min(NEIGHBOURS, len(x) - 1)
    return np.sort(cdist(x, x), axis=1)[:, k], k


def precision(reference: Features, generated: Features) -> float:
    """Compute the share of generated items in the 5-neighbour ball of some reference item (Kynkäänniemi et al. 2019).

    Recall is this share with the two sides exchanged.
    """
    radius = radii(reference)[0]
    return float((cdist(reference, generated) <= radius[:, None]).any(axis=0).mean())


def density(reference: Features, generated: Features) -> float:
    """Compute the mean number of reference balls around a generated item, over 5; about 1 is right (Naeem et al. 2020)."""
    radius, k = radii(reference)
    return float((cdist(reference, generated) <= radius[:, None]).sum(axis=0).mean() / k)


def coverage(reference: Features, generated: Features) -> float:
    """Compute the share of reference items with a generated item in their 5-neighbour ball (Naeem et al. 2020)."""
    return float((cdist(reference, generated).min(axis=1) <= radii(reference)[0]).mean())


def pure_noise(like: Images) -> Images:
    """Generate images of uniform noise in the shape of `like`: what an untrained model draws, a fixed yardstick of harm."""
    return np.random.Generator(np.random.Philox(key=YARDSTICK_SEED)).integers(0, 256, like.shape, dtype=np.uint8)


def sample(spaces: FeatureSpaces, space: str, dataset: Dataset, items: npt.NDArray[np.intp], images: Images) -> Sample:
    """Compute the features of images in one space, and join them with the captions and groups of their held-out items."""
    numbers = dict(zip(dataset.reference().tolist(), dataset.reference_groups().tolist(), strict=True))
    groups = np.array([numbers[int(i)] for i in items], dtype=np.intp)
    return Sample(spaces(space, images), [dataset.captions[i] for i in items], groups)


def quality(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, split: str) -> list[Quality]:
    """Measure the distances of one model's images to the held-out images of one split, in each space."""
    rows = []
    reference = dataset.reference()
    items, noise = held_out_items(dataset, len(drawn.images)), pure_noise(dataset.images[reference])
    for space in spaces.names:
        real = sample(spaces, space, dataset, reference, dataset.images[reference])
        made, scale = sample(spaces, space, dataset, items, drawn.images), spaces.scale(space)
        x, y = real.features, made.features
        alone, pairs = (distances.distance(real, made, scale, aspect) for aspect in ASPECTS)
        band, captions_band = (distances.band(real, scale, aspect) for aspect in ASPECTS)
        rows.append(
            Quality(
                space=space,
                space_sha256=spaces.sha256,
                split=split,
                n=len(y),
                reference=len(x),
                groups=int(real.groups.max()) + 1,
                fd=frechet_distance(x, y),
                fd_se=frechet_error(x, y, real.groups),
                kd=alone.value,
                kd_se=alone.se,
                noise_kd=distances.distance(real, replace(real, features=spaces(space, noise)), scale, "images").value,
                precision=precision(x, y),
                recall=precision(y, x),
                density=density(x, y),
                coverage=coverage(x, y),
                band=band if np.isfinite(band) else None,
                captions_kd=pairs.value,
                captions_se=pairs.se,
                captions_band=captions_band if np.isfinite(captions_band) else None,
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
    against: Literal["champion", "anchor", "full", "solver"] = "champion",
) -> list[Comparison]:
    """Compare the challenger with champion or anchor, or a variant with its `full`, on one split.

    There is one comparison for each space and aspect (images alone, pairs of image and caption).
    """
    rows = []
    reference, items = dataset.reference(), held_out_items(dataset, len(challenger.images))
    for space in spaces.names:
        real = sample(spaces, space, dataset, reference, dataset.images[reference])
        ours = sample(spaces, space, dataset, items, challenger.images)
        theirs, scale = sample(spaces, space, dataset, items, champion.images), spaces.scale(space)
        for aspect in ASPECTS:
            figure, drawn_se = distances.difference(real, ours, theirs, scale, aspect)
            rows.append(
                Comparison(
                    against=against,
                    against_sha256=champion_sha256,
                    space=space,
                    split=split,
                    n=len(ours),
                    groups=int(real.groups.max()) + 1,
                    delta=figure.value,
                    se=figure.se,
                    champion_kd=distances.distance(real, theirs, scale, aspect).value,
                    aspect=aspect,
                    drawn_se=drawn_se,
                )
            )
    return rows


def converged(own: Images, reference: Images, evaluations: int, solver: Images | None = None) -> Converged:
    """Measure how far a variant's images lie from the converged ones of `full`, which start from the same noise.

    Args:
        own: images of the variant, uint8 [n, C, R, R].
        reference: converged images.
        evaluations: with which these were drawn.
        solver: images of `full` with as many evaluations as the variant takes; None: the variant is no student.
    """

    def distance(images: Images) -> npt.NDArray[np.float64]:
        change = (images.astype(np.float64) - reference.astype(np.float64)) / GREY
        rows: npt.NDArray[np.float64] = np.sqrt(np.square(change).mean(axis=(1, 2, 3)))
        return rows

    mine, n = distance(own), len(own)
    difference = mine - distance(solver) if solver is not None else None
    return Converged(
        n=n, evaluations=evaluations, distance=float(mine.mean()), distance_se=float(mine.std(ddof=1) / np.sqrt(n)),
        solver=float((mine - difference).mean()) if difference is not None else None,
        delta=float(difference.mean()) if difference is not None else None,
        se=float(difference.std(ddof=1) / np.sqrt(n)) if difference is not None else None,
    )  # fmt: skip


def following(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, split: str) -> list[Following]:
    """Measure how well a model's images match their captions, in each space; empty if the held-out images have one caption."""
    reference, items, rows = dataset.reference(), held_out_items(dataset, len(drawn.images)), []
    if len({dataset.captions[i] for i in reference}) < 2:
        return []
    for space in spaces.names:
        real = sample(spaces, space, dataset, reference, dataset.images[reference])
        made, scale = sample(spaces, space, dataset, items, drawn.images), spaces.scale(space)
        best, all_of_it, excess = (
            distances.following(real, of, scale, least) for of, least in ((None, 0.0), (made, 0.0), (made, FOLLOW))
        )
        rows.append(
            Following(
                space=space, split=split, groups=int(real.groups.max()) + 1, real=best.value, real_se=best.se,
                share=all_of_it.value / best.value if best.value > 0 else 0.0, excess=excess.value, excess_se=excess.se,
            )
        )  # fmt: skip
    return rows


def asked_for(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, champion: Drawn | None, n: int) -> list[CaptionCheck]:
    """Check for each caption, and each word of captions, whether a model draws it, over all spaces together.

    Args:
        spaces: feature spaces, whose kernels are averaged.
        dataset: gives the held-out images.
        drawn: images for `held_out_items`, followed by those for `further_items`.
        champion: the champion's images for the same items.
        n: number of images for `held_out_items`.
    """
    reference = dataset.reference()
    items = np.concatenate((held_out_items(dataset, n), further_items(dataset, n)))
    scales = [spaces.scale(space) for space in spaces.names]

    def side_by_side(of: npt.NDArray[np.intp], images: Images) -> Sample:
        parts = [sample(spaces, space, dataset, of, images) for space in spaces.names]
        return replace(parts[0], features=np.concatenate([part.features for part in parts], axis=1))

    real = side_by_side(reference, dataset.images[reference])
    # Rare captions were drawn more often than they occur; the weights give the drawn images the mix of the real ones.
    real_counts, counts = Counter(real.captions), Counter(dataset.captions[i] for i in items)
    weights = np.array([real_counts[dataset.captions[i]] / counts[dataset.captions[i]] for i in items])
    made = replace(side_by_side(items, drawn.images), weights=weights)
    before = replace(side_by_side(items, champion.images), weights=weights) if champion else None
    captions, several = _judged(dataset)
    rows = []
    for name, word in [(caption, False) for caption in captions] + [(word, True) for word in several]:
        asked, others = _asked(real, name, word)
        if min(len(np.unique(of.groups)) for of in (asked, others)) < 2:
            continue
        (ours, without), theirs = _asked(made, name, word), _asked(before, name, word) if before else None
        if not len(ours):  # the caption is too rare: none of the few images was drawn for it
            continue
        apart = distances.told_apart(asked, others, scales)
        shown = distances.drawn_share(asked, others, ours, without if len(without) else others, scales)
        was = distances.drawn_share(asked, others, theirs[0], theirs[1] if len(theirs[1]) else others, scales) if theirs else None
        told = apart.value > 0
        rows.append(
            CaptionCheck(
                caption=name, word=word, n=len(ours), reference=len(asked), groups=len(np.unique(asked.groups)), apart=apart.value,
                apart_se=apart.se, share=shown.value / apart.value if told else None, drawn=shown.value, drawn_se=shown.se,
                champion_share=was.value / apart.value if was and told else None,
            )
        )  # fmt: skip
    return rows


def _has(caption: str, name: str, word: bool) -> bool:
    return name in distances.words(caption) if word else caption == name


def _asked(real: Sample, name: str, word: bool) -> tuple[Sample, Sample]:
    """Split a sample into the images of a caption or word, and the images that they are compared with.

    The second part holds images with the same captions without the word, or without one word of the caption. They are weighted so
    that these captions are as frequent as in the first part. If there are none, the second part holds all other images.
    """
    own = np.array([_has(caption, name, word) for caption in real.captions])
    sets = [distances.words(caption) for caption in real.captions]
    each = np.ones(len(real)) if real.weights is None else real.weights
    less: dict[frozenset[str], float] = {}
    there: dict[frozenset[str], float] = {}
    for words, mine, weight in zip(sets, own, each, strict=True):
        for left_out in ((name,) if word else words) if mine else ():
            less[words - {left_out}] = less.get(words - {left_out}, 0.0) + weight
    for words, mine, weight in zip(sets, own, each, strict=True):
        if not mine and words in less:
            there[words] = there.get(words, 0.0) + weight
    if not there:
        return real.only(own), real.only(~own)
    weights = np.array([less[words] / there[words] if words in there else 0.0 for words in sets]) * each
    return real.only(own), replace(real, weights=weights).only(~own & (weights > 0))


def plausibility(
    spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, champion: Drawn | None = None, n: int | None = None
) -> Plausibility | None:
    """Count generated images that are unlike all real ones, and those that are duplicates of each other.

    Args:
        spaces: feature spaces; an image is unlike all real ones if it is so in any of them.
        dataset: gives the real images.
        drawn: images of a model.
        champion: images of the champion for the same captions and seeds; the difference is taken over all pairs.
        n: count only the first n images of the model; None: all.

    Returns:
        the counts; None if all real images are of one group.
    """
    known = _known(dataset)
    names = np.unique([dataset.groups[i] for i in known], return_inverse=True)[1]
    reference = dataset.reference()
    if names.max() == 0:
        return None
    counted = drawn.first(n or len(drawn.images)).images
    theirs = champion.images if champion else drawn.images[:0]
    odd, odd_theirs = np.zeros(len(drawn.images), np.bool_), np.zeros(len(theirs), np.bool_)
    odd_real = np.zeros(len(reference), np.bool_)
    among, within = np.zeros((len(counted),) * 2), np.zeros((len(known),) * 2)
    for space in spaces.names:
        x, y, z = (spaces(space, images) for images in (dataset.images[known], drawn.images, dataset.images[reference]))
        own = cdist(x, x)
        within += (own / spaces.scale(space)) ** 2
        among += (cdist(y[: len(counted)], y[: len(counted)]) / spaces.scale(space)) ** 2
        own[names[:, None] == names[None]] = np.inf
        limit = np.quantile(own.min(axis=1), IMPLAUSIBLE)
        odd |= cdist(y, x).min(axis=1) > limit
        odd_real |= cdist(z, x).min(axis=1) > limit
        odd_theirs |= cdist(spaces(space, theirs), x).min(axis=1) > limit if len(theirs) else False
    within[names[:, None] == names[None]] = np.inf
    np.fill_diagonal(among, np.inf)
    same = among.min(axis=1) < np.quantile(within.min(axis=1), DUPLICATE)
    found = Plausibility(
        n=len(counted), training=len(known), implausible=int(odd[: len(counted)].sum()), held_out=float(odd_real.mean()),
        duplicates=int(same.sum()),
    )  # fmt: skip
    if len(theirs) < 2:
        return found
    more = odd.astype(float) - odd_theirs
    beside = {
        "champion": float(odd_theirs.mean()), "more": float(more.mean()), "more_se": float(more.std(ddof=1) / len(more) ** 0.5),
        "pairs": len(more),
    }  # fmt: skip
    return found.model_copy(update=beside)


def real_images(dataset: Dataset, caption: str, n: int) -> list[Images]:
    """Choose up to n held-out images [C, R, R] of a caption to show beside generated ones, from as many groups as possible."""
    groups = dict(zip(dataset.reference().tolist(), dataset.reference_groups().tolist(), strict=True))
    own: Counter[int] = Counter()
    ranked = []
    for i in (i for i in groups if dataset.captions[i] == caption):
        ranked.append((own[groups[i]], i))  # the first of each group, then the second of each
        own[groups[i]] += 1
    return [dataset.images[i] for _, i in sorted(ranked)[:n]]


def _known(dataset: Dataset) -> npt.NDArray[np.intp]:
    """Choose the training images that others are compared with: at most 2,000, always the same."""
    order = np.random.Generator(np.random.Philox(key=MEMORY_SEED)).permutation(dataset.training())
    return np.sort(order[:MEMORY_IMAGES])


def group_hashes(dataset: Dataset) -> list[str]:
    """Hash the held-out groups and return the smallest hashes, which tell whether two sets overlap (Broder 1997)."""
    names = {dataset.groups[i] for i in dataset.reference()}
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:16] for name in names)[:HASHES]


def memorisation(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn) -> list[Memorisation]:
    """Measure whether generated images lie nearer to training images than held-out images do, in each space."""
    training, reference = dataset.images[_known(dataset)], dataset.images[dataset.reference()]
    rows = []
    for space in spaces.names:
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
    """Estimate the probability that a generated image is nearer to training images than a held-out image is.

    This is the Mann-Whitney test of Meehan et al. 2020 over the whole space (they also cut it into cells), with the opposite
    sign: a large z means that images are copied. Ties count one half. The variance behind z holds for a probability of 1/2. The
    held-out images enter it by group, through their ranks among themselves; if each image is its own group, it is the test's
    usual variance. The standard error holds for any probability; it is DeLong's (1988), again by group.

    Args:
        generated: [n] distances to the nearest training image.
        held_out: [m] the same distances of held-out images.
        groups: [m] group of each held-out image; None: every image is its own group.

    Returns:
        the probability, its standard error, and the z score of its difference from 1/2.
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
    """Measure how far the images of each of the most frequent captions lie from held-out images of that caption.

    Args:
        spaces: feature spaces; only `trained` is used, because it separates captions.
        dataset: gives the held-out images.
        drawn: images of a model.
        captions: captions[i] is the caption that image i was drawn for.
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
    """Compute the mean distance of y to the nearest x, and of each x to the nearest x of another group.

    Each x looks for a neighbour outside its own group. The distance from y is averaged over leaving out the same groups.
    Otherwise y would have more candidates, and would look too good where images are few.

    Args:
        x: [m, d].
        y: [n, d].
        groups: [m] group of each x.

    Returns:
        both distances; both None if x has one group, the first None if y is empty.
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
    """Summarise expert usage, given the mean load [S, M, E] of each sampling step."""
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
    """Measure the median time of one image here (one thread, batch of one), and the peak memory of a separate process."""
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
    """Measure the peak memory of a fresh process in MiB, before the model is loaded and after network evaluations.

    See `model.peak_memory`.

    Raises:
        ExportError: the process fails.
    """
    command = [sys.executable, "-P", peak_memory.__file__, str(folder), WEIGHTS_FILE, str(batch), json.dumps(SESSION_CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own file
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the memory of {folder} cannot be measured: {reason}; export the checkpoint again")
    bare, peak = json.loads(done.stdout)
    return float(bare), float(peak)


def published_fid(folder: Path, generated: Images, file: Path) -> PublishedFid:
    """Compute FID by the usual protocol between all images of a folder and generated ones.

    The folder's images are cut to their central square and converted to the size and channels of the generated images, like
    training images. Then both go through `model.features.published_features`. torchmetrics computes the same formula, in the same
    float64, from the same module; we use our own code to save that dependency.

    Args:
        folder: PNG, JPEG and other images, anywhere below it.
        generated: uint8 [n, C, R, R].
        file: TorchScript of the network.

    Raises:
        DataError: there is no such file or folder, an image cannot be decoded, or a side has fewer than two images.
        CheckpointError: the file is not TorchScript, or its network does not give features.
    """
    features, sha256 = published_features(file)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; put the images there, or name another one")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.registered_extensions())
    if min(len(paths), len(generated)) < 2:
        raise DataError(
            f"FID needs two images on each side, but {folder} has {len(paths)} and {len(generated)} were "
            "generated; add images, or raise --n"
        )
    parts = []
    for first in range(0, len(paths), PUBLISHED_BATCH):
        chunk = []
        for path in paths[first : first + PUBLISHED_BATCH]:
            try:
                chunk.append(decode(path, generated.shape[2], generated.shape[1]))
            except DataError as error:
                raise DataError(f"{path} {error}; remove it from the folder") from error
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
    follows: list[Following] | None = None,
    asked: list[CaptionCheck] | None = None,
    plausible: Plausibility | None = None,
    held_out: list[str] | None = None,
    near: Converged | None = None,
) -> Scorecard:
    """Combine the figures of one model into its scorecard; `solver` is the sampler of `full` that a student was compared with."""
    beats = near.delta < 0 if near and near.delta is not None else None
    return Scorecard(
        line=lineage.data.line, tier=config.tier, configuration=config.configuration, variant=lineage.variant,
        weights_sha256=weights_sha256, lineage_sha256=lineage.sha256, sampler=sampler, precision=precision, seed=EVALUATION_SEED,
        quality=qualities, comparisons=comparisons, memorisation=memories, captions=captions, bad_images=drawn.bad,
        usage=usage(drawn.load), cost=cost, solver=solver, beats_solver=beats, converged=near,
        following=follows or [], asked=asked or [], plausibility=plausible, held_out=held_out or [],
    )  # fmt: skip
