"""How good an exported model is: distances to held-out images, in two feature spaces, with errors where a gate needs them.

Generated images start from fixed noise seeds and take their captions from the held-out items, so two models are compared
on the same noise and the same captions; what they share cancels.
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
from model.config import ModelConfig, PrecisionName
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
BLOCKS = 10  # of the jackknife
YARDSTICK_SEED = 6
LATENCY_IMAGES = 5
EVALUATION_SEED = 1_000_000
MEMORY_SEED = 7
MEMORY_IMAGES = 2000  # training images that are searched for copies; the others go unseen
CAPTION_ROWS = 12
JUDGED_DRAWS = 32  # generated images of a caption that is judged, at least
JUDGED_CAPTIONS = 64  # at most, and as many words
IMPLAUSIBLE, DUPLICATE = 0.995, 0.01  # quantiles of real images' distance to the nearest of other groups
PUBLISHED_BATCH = 256  # decoded images of a folder that are held at a time
BLANK_DEVIATION = 2.0  # grey levels; an image with less is constant
DEAD_SHARE = 0.1  # of an even share

Images = npt.NDArray[np.uint8]  # [n, C, R, R]
Distances = npt.NDArray[np.float64]
OnBatch = Callable[[int, int], None]
"""Called with (images made, images to make)."""


@dataclass(frozen=True)
class Drawn:
    """What a model drew for an evaluation."""

    images: Images
    load: npt.NDArray[np.float32]  # [S, M, E], by sampling step
    bad: float  # share of images that are constant or not finite

    def first(self, n: int) -> Drawn:
        """The first n of them; the load stays that of all."""
        return Drawn(self.images[:n], self.load, self.bad)


def held_out_items(dataset: Dataset, n: int) -> npt.NDArray[np.intp]:
    """The held-out items whose captions n images are drawn for: all alike, in an order that is the same for every model.

    Raises:
        DataError: fewer than 2 are asked for.
    """
    if n < 2:
        raise DataError(f"an evaluation of {n} images says nothing; ask for at least 2")
    reference = dataset.reference()
    order = np.random.Generator(np.random.Philox(key=mix(n, 5))).permutation(len(reference))
    return np.asarray(reference[np.resize(order, n)])


def held_out_captions(dataset: Dataset, n: int) -> list[str]:
    """N captions in the proportions of the held-out items; the same for every model.

    Raises:
        DataError: fewer than 2 are asked for.
    """
    return [dataset.captions[i] for i in held_out_items(dataset, n)]


def further_items(dataset: Dataset, n: int) -> npt.NDArray[np.intp]:
    """Held-out items that are drawn once more, so that each caption that is looked at gets JUDGED_DRAWS; n / 2 items at most.

    The caption with the fewest images is next, so that where not all can have as many, they have about equally many.
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
    """Captions and words of the held-out items that are looked at one by one, the most frequent ones first.

    A word is looked at where several captions have it, and some do not.
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


def pure_noise(like: Images) -> Images:
    """As many images of uniform noise: what a model draws that has learned nothing, a fixed yardstick of harm."""
    return np.random.Generator(np.random.Philox(key=YARDSTICK_SEED)).integers(0, 256, like.shape, dtype=np.uint8)


def sample(spaces: FeatureSpaces, space: str, dataset: Dataset, items: npt.NDArray[np.intp], images: Images) -> Sample:
    """Images by their features, with the captions and the groups of held-out items."""
    numbers = dict(zip(dataset.reference().tolist(), dataset.reference_groups().tolist(), strict=True))
    groups = np.array([numbers[int(i)] for i in items], dtype=np.intp)
    return Sample(spaces(space, images), [dataset.captions[i] for i in items], groups)


def quality(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, split: str) -> list[Quality]:
    """The distances of one model's images to one split's held-out images, in each space."""
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
    against: Literal["champion", "anchor", "solver"] = "champion",
) -> list[Comparison]:
    """The challenger against champion or anchor, or a student against its solver, on one split, in each space, alone and with captions."""
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


def following(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn, split: str) -> list[Following]:
    """How far a model's images go with their captions, in each space; nothing where the held-out images have one caption."""
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
    """Whether a model draws each caption, and each word of captions, over all spaces together.

    Args:
        spaces: whose kernels are averaged.
        dataset: gives the held-out images.
        drawn: images for `held_out_items` and then `further_items`.
        champion: the champion's for the same.
        n: how many of them are for `held_out_items`.
    """
    reference = dataset.reference()
    items = np.concatenate((held_out_items(dataset, n), further_items(dataset, n)))
    scales = [spaces.scale(space) for space in spaces.names]

    def side_by_side(of: npt.NDArray[np.intp], images: Images) -> Sample:
        parts = [sample(spaces, space, dataset, of, images) for space in spaces.names]
        return replace(parts[0], features=np.concatenate([part.features for part in parts], axis=1))

    real = side_by_side(reference, dataset.images[reference])
    # Rare captions were drawn more often than they are; weighed, the drawn images are as mixed as the real ones.
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
        if not len(ours):  # too rare among too few images
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
    """Take the images of a caption or word, and those that a model would draw in their place.

    The second are images of the same captions less the word, or less one word of the caption, weighted so that these captions are as
    frequent as on the first side; where there are none, all others.
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
    """Count images that are unlike all real ones, and those that are like each other; None where all real images are of one group.

    Args:
        spaces: an image is unlike all real ones where it is so in any of them.
        dataset: gives the real images.
        drawn: images of a model.
        champion: images of the champion for the same captions and seeds; the difference is taken over all pairs.
        n: how many of the model's first ones are counted; None: all.
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
    """Choose up to n held-out images of a caption [C, R, R], to be looked at beside generated ones: from as many groups as there are."""
    groups = dict(zip(dataset.reference().tolist(), dataset.reference_groups().tolist(), strict=True))
    own: Counter[int] = Counter()
    ranked = []
    for i in (i for i in groups if dataset.captions[i] == caption):
        ranked.append((own[groups[i]], i))  # the first of each group, then the second of each
        own[groups[i]] += 1
    return [dataset.images[i] for _, i in sorted(ranked)[:n]]


def _known(dataset: Dataset) -> npt.NDArray[np.intp]:
    """Training images that others are held against: a fixed choice of 2,000 at most."""
    order = np.random.Generator(np.random.Philox(key=MEMORY_SEED)).permutation(dataset.training())
    return np.sort(order[:MEMORY_IMAGES])


def group_hashes(dataset: Dataset) -> list[str]:
    """Hashes of the held-out groups, the smallest ones: two sets' overlap can be told from them (Broder 1997)."""
    names = {dataset.groups[i] for i in dataset.reference()}
    return sorted(hashlib.sha256(name.encode()).hexdigest()[:16] for name in names)[:HASHES]


def memorisation(spaces: FeatureSpaces, dataset: Dataset, drawn: Drawn) -> list[Memorisation]:
    """Whether generated images lie nearer to training images than held-out ones do, in each space."""
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
    """P(a generated image is nearer to its nearest training image than a held-out one is), its error, and z of this being 1/2.

    The Mann-Whitney test of Meehan et al. 2020 over the whole space (they also cut it into cells), with the sign turned: a
    large z says that images are copied. Ties count one half. In the variance the held-out images enter by group, by group,
    through their ranks among themselves; for images that are each their own it is the test's usual one. That
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
    """MiB of a fresh process before the model is loaded, and its peak after network evaluations (see `model.peak_memory`).

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
    follows: list[Following] | None = None,
    asked: list[CaptionCheck] | None = None,
    plausible: Plausibility | None = None,
    held_out: list[str] | None = None,
) -> Scorecard:
    """Put the figures of one model together; `solver` is how `full` was drawn beside a student."""
    beside = [row.delta for row in comparisons if row.against == "solver" and row.aspect == "images"]
    return Scorecard(
        line=lineage.data.line, tier=config.tier, configuration=config.configuration, variant=lineage.variant,
        weights_sha256=weights_sha256, lineage_sha256=lineage.sha256, sampler=sampler, precision=precision, seed=EVALUATION_SEED,
        quality=qualities, comparisons=comparisons, memorisation=memories, captions=captions, bad_images=drawn.bad,
        usage=usage(drawn.load), cost=cost, solver=solver if beside else None, beats_solver=max(beside) < 0 if beside else None,
        following=follows or [], asked=asked or [], plausibility=plausible, held_out=held_out or [],
    )  # fmt: skip
