"""Measure how far a model's images lie from real ones, with errors: pure functions of features, captions and groups.

Held-out images come in groups, such as the patches of one photograph; only groups are independent of each other. A generated
image belongs to the group of the held-out image whose caption it was drawn for. Each figure is a signed sum of means over pairs
of images *from different groups* (U-statistics over groups; Hoeffding 1948). So real and generated pairs have the same mixture
of captions. A model as good as the data has distance 0 on average, however images and captions depend on each other. One
formula gives every error.

Two aspects of a model are measured. `images`: could the data contain this picture? The kernel compares features. `captions`:
does the picture show what its caption asks for? The kernel is the product of the image kernel and a caption kernel, so the
distance is between pairs of image and caption (the joint kernel distance; for product kernels see Gretton 2015). A model that
ignores its captions can be perfect in the first aspect, but is bad in the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.spatial.distance import cdist

WIDTHS = (0.25, 0.5, 1.0, 2.0)  # of the Gaussian kernels, in median distances; each is twice the one before
HALVINGS = 200  # random splits of the real images into two halves that are compared
BAND_GROUPS = 25  # groups in each of two sets of real images
BAND_SEED = 8

Aspect = Literal["images", "captions"]
ASPECTS: tuple[Aspect, ...] = ("images", "captions")
Features = npt.NDArray[np.float64]  # [n, d]
Matrix = npt.NDArray[np.float64]
Groups = npt.NDArray[np.intp]  # [n], numbered from 0


@dataclass(frozen=True)
class Sample:
    """Features [n, d] of n images, the captions that the images have or were drawn for, and their groups."""

    features: Features
    captions: Sequence[str]
    groups: Groups
    weights: npt.NDArray[np.float64] | None = None
    """Weight of each image; None: all are equal."""

    def __len__(self) -> int:
        return len(self.features)

    def only(self, chosen: npt.NDArray[np.bool_]) -> Sample:
        """Select the images for which `chosen` [n] is true; groups keep their numbers."""
        weights = None if self.weights is None else self.weights[chosen]
        return Sample(
            self.features[chosen],
            [c for c, take in zip(self.captions, chosen, strict=True) if take],
            self.groups[chosen],
            weights,
        )


@dataclass(frozen=True)
class Figure:
    """An estimate with its standard error, and the number of independent groups that it is based on."""

    value: float
    se: float
    groups: int


@dataclass(frozen=True)
class _Mean:
    """A mean over pairs of different groups: sums and counts by group [G, G], symmetric, zero within a group."""

    total: Matrix
    count: Matrix

    @property
    def value(self) -> float:
        return float(self.total.sum() / self.count.sum())


def kernel(x: Features, y: Features, scale: float) -> Matrix:
    """Average four Gaussian kernels around a scale, [n, m] (Gretton et al. 2012; widths as in Li et al. 2015).

    The kernel is bounded, unlike the cubic kernel of KID. New data may lie far outside the data on which the features were
    standardised, and a few such images would dominate an unbounded kernel.
    """
    power: Matrix = np.exp(cdist(x, y, "sqeuclidean") * (-0.5 / (max(WIDTHS) * scale) ** 2))
    result = power / len(WIDTHS)
    for _ in WIDTHS[1:]:  # half the width is the fourth power; squaring twice costs a tenth of an exponential
        np.square(np.square(power, out=power), out=power)
        result += power / len(WIDTHS)
    return result


def words(caption: str) -> frozenset[str]:
    """Split a caption into its words: "brick, scratch" has two."""
    return frozenset(caption.replace(",", " ").casefold().split())


def caption_kernel(a: Sequence[str], b: Sequence[str]) -> Matrix:
    """Compute the similarity of captions, from 0 to 1, [n, m]: one half for being equal, one half for shared words.

    The second half is the cosine of the two sets of words. So "brick, scratch" is nearer to "brick" than to "mesh", and a new
    caption is near to those that share its words. The mean of two positive definite kernels is positive definite.
    """
    rows, i = np.unique(np.asarray(a, dtype=np.str_), return_inverse=True)
    columns, j = np.unique(np.asarray(b, dtype=np.str_), return_inverse=True)
    left, right = [words(str(c)) for c in rows], [words(str(c)) for c in columns]
    names = {word: k for k, word in enumerate(sorted(frozenset().union(*left, *right)))}

    def units(sets: list[frozenset[str]]) -> sparse.csr_matrix:
        at = [(row, names[word], len(own) ** -0.5) for row, own in enumerate(sets) for word in own]
        ys, xs, values = zip(*at, strict=True) if at else ((), (), ())
        return sparse.csr_matrix((values, (ys, xs)), shape=(len(sets), max(1, len(names))))

    shared = (units(left) @ units(right).T).toarray()
    empty = np.equal.outer([not own for own in left], [True] * len(right)) & np.array([not own for own in right])
    same = np.equal.outer(rows, columns)
    small: Matrix = (same + np.where(empty, 1.0, shared)) / 2
    return small[np.ix_(i, j)]


def alike(a: Sample, b: Sample, scale: float, aspect: Aspect) -> Matrix:
    """Compute the kernel of an aspect between two samples, [n, m]."""
    images = kernel(a.features, b.features, scale)
    return images if aspect == "images" else images * caption_kernel(a.captions, b.captions)


def distance(real: Sample, drawn: Sample, scale: float, aspect: Aspect) -> Figure:
    """Estimate the squared kernel distance (maximum mean discrepancy) of a model's images from real ones.

    The estimate is unbiased: for a model as good as the data it is 0 on average.

    Args:
        real: held-out images.
        drawn: generated ones, with the groups of the held-out images whose captions they were drawn for.
        scale: scale of the kernel, about the median distance of two images.
        aspect: aspect that is compared.
    """
    real, drawn, count = _numbered(real, drawn)
    xx, yy, xy = alike(real, real, scale, aspect), alike(drawn, drawn, scale, aspect), alike(real, drawn, scale, aspect)
    return _sum(
        (1, _mean(xx, real, real, count)), (1, _mean(yy, drawn, drawn, count)), (-2, _mean(xy, real, drawn, count)), wide=True,
    )  # fmt: skip


def difference(real: Sample, challenger: Sample, champion: Sample, scale: float, aspect: Aspect) -> tuple[Figure, float]:
    """Estimate the challenger's squared kernel distance minus the champion's.

    This is the relative similarity test of Bounliphone et al. 2016 in its paired form: image i of both models starts from the
    same noise and caption, so what the models have in common cancels before the variance is computed.

    Args:
        real: held-out images.
        challenger: generated images.
        champion: generated images; row i has the seed, the caption and the group of the challenger's.
        scale: scale of the kernel.
        aspect: aspect that is compared.

    Returns:
        the difference, below 0 if the challenger is better, and the part of its standard error that comes from the generated
        images alone, which more images would reduce.
    """
    real, challenger, count = _numbered(real, challenger)
    champion = replace(champion, groups=challenger.groups)
    among = alike(challenger, challenger, scale, aspect) - alike(champion, champion, scale, aspect)
    across = alike(real, challenger, scale, aspect) - alike(real, champion, scale, aspect)
    yy, xy = _mean(among, challenger, challenger, count), _mean(across, real, challenger, count)
    other = challenger.groups[:, None] != challenger.groups[None]
    apart = real.groups[:, None] != challenger.groups[None]
    own = 2 * ((among * other).sum(axis=1) / yy.count.sum() - (across * apart).sum(axis=0) / xy.count.sum())
    return _sum((1, yy), (-2, xy)), _spread(own, challenger.captions)


def band(real: Sample, scale: float, aspect: Aspect) -> float:
    """Estimate how far apart two sets of 25 groups of real images lie: the root mean square of their distance.

    The distance of two such sets is unbiased, so it is 0 on average. Its spread is measured on random halves of the available
    groups. The spread is inversely proportional to the number of groups in a set (between equal distributions the distance is
    a degenerate U-statistic), so it can be converted to 25 groups. The result is a yardstick that does not shrink when more data
    come.

    Returns:
        the spread; infinity if there are too few groups for two halves.
    """
    real, _, count = _numbered(real, real)
    pairs = _mean(alike(real, real, scale, aspect), real, real, count)
    rng = np.random.Generator(np.random.Philox(key=BAND_SEED))
    squares = []
    for _ in range(HALVINGS):
        first = rng.permutation(count) < count // 2
        parts = [
            (1, np.logical_and.outer(first, first)),
            (1, np.logical_and.outer(~first, ~first)),
            (-2, np.not_equal.outer(first, first)),
        ]
        if all((pairs.count * part).sum() for _, part in parts):
            squares.append(sum(sign * (pairs.total * part).sum() / (pairs.count * part).sum() for sign, part in parts) ** 2)
    return float(np.sqrt(np.mean(squares)) * count / (2 * BAND_GROUPS)) if squares else float("inf")


def following(real: Sample, drawn: Sample | None, scale: float, least: float = 0.0) -> Figure:
    """Estimate how well images match their captions: the covariance, over pairs, of image similarity and caption similarity.

    Args:
        real: held-out images.
        drawn: generated images, compared with real ones; None: real images are compared with each other, which gives the value of
            a perfect model.
        scale: scale of the kernel.
        least: share of the real images' value that is subtracted; the result is then by how much a model exceeds that share.
            Ignored if `drawn` is None.
    """
    against = real if drawn is None else drawn
    real, against, count = _numbered(real, against)
    own = _mean(_together(real, real, scale), real, real, count)
    if drawn is None:
        return _sum((1, own))
    return _sum((1, _mean(_together(real, against, scale), real, against, count)), (-least, own))


def told_apart(asked: Sample, others: Sample, scales: Sequence[float]) -> Figure:
    """Estimate the squared kernel distance between real images of a caption and others; 0 if no feature space separates them.

    Args:
        asked: real images of the caption; their features are those of all spaces side by side.
        others: real images without the caption.
        scales: scale of the kernel in each space; the kernels are averaged.
    """
    asked, others, count = _numbered(asked, others)
    return _sum(
        (1, _mean(_averaged(asked, asked, scales), asked, asked, count)), (1, _mean(_averaged(others, others, scales), others, others, count)),
        (-2, _mean(_averaged(asked, others, scales), asked, others, count)),
    )  # fmt: skip


def drawn_share(asked: Sample, others: Sample, drawn: Sample, without: Sample, scales: Sequence[float]) -> Figure:
    """Estimate how far a model's images move towards real images of a caption when the caption is given.

    The move is projected on the line from the other real images to those of the caption, in kernel space: with m for the mean
    embedding, <m(drawn) - m(without), m(asked) - m(others)>. Divided by `told_apart`, it is 1 for a model as good as the data,
    and 0 for a model that draws the same with and without the caption, wherever on the line its images lie. (A model whose plain
    surfaces are blotchy must not seem to draw stains.)

    Args:
        asked: real images of a caption.
        others: real images without the caption.
        drawn: images that were generated for the caption, with the groups of the real ones.
        without: images that were generated for the others' captions; if there are none, the others themselves.
        scales: scale of the kernel in each space; the kernels are averaged.
    """
    samples = (asked, others, drawn, without)
    index = _joined(*samples)
    count = int(max(groups.max() for groups in index)) + 1
    asked, others, drawn, without = (replace(of, groups=groups) for of, groups in zip(samples, index, strict=True))
    near = _mean(_averaged(drawn, asked, scales), drawn, asked, count)
    far = _mean(_averaged(drawn, others, scales), drawn, others, count)
    among = _mean(_averaged(without, others, scales), without, others, count)
    between = _mean(_averaged(without, asked, scales), without, asked, count)
    return _sum((1, near), (-1, far), (1, among), (-1, between))


def _averaged(a: Sample, b: Sample, scales: Sequence[float]) -> Matrix:
    """Average the kernels of several spaces, whose features stand side by side."""
    parts = zip(np.split(a.features, len(scales), axis=1), np.split(b.features, len(scales), axis=1), scales, strict=True)
    return np.asarray(sum(kernel(x, y, scale) for x, y, scale in parts) / len(scales))


def _together(a: Sample, b: Sample, scale: float) -> Matrix:
    """Multiply the image kernel by the caption kernel, after centring both over the pairs of different groups.

    Without centring, images of a rare surface would seem to follow their caption because they differ from all that a model
    draws. (The Hilbert-Schmidt independence criterion centres in this way; Gretton et al. 2005.)
    """
    apart = a.groups[:, None] != b.groups[None]
    return _centred(kernel(a.features, b.features, scale), apart) * _centred(caption_kernel(a.captions, b.captions), apart)


def _centred(values: Matrix, apart: npt.NDArray[np.bool_]) -> Matrix:
    """Subtract the means of rows and columns, which are taken over the pairs in `apart`."""
    left = values - values[apart].mean()
    rows = (left * apart).sum(axis=1) / np.maximum(apart.sum(axis=1), 1)
    columns = (left * apart).sum(axis=0) / np.maximum(apart.sum(axis=0), 1)
    return np.asarray(left - rows[:, None] - columns[None])


def _joined(*samples: Sample) -> list[Groups]:
    """Renumber the groups of several samples from 0; a group has the same number in all of them."""
    index = np.unique(np.concatenate([of.groups for of in samples]), return_inverse=True)[1]
    return np.split(index, np.cumsum([len(of) for of in samples])[:-1])


def _numbered(real: Sample, drawn: Sample) -> tuple[Sample, Sample, int]:
    """Renumber the groups of both samples from 0, and return the samples with the number of groups.

    A single group gives no pair of different groups; then every image counts as a group of its own. A gate must not decide on
    such figures.
    """
    names, index = np.unique(np.concatenate((real.groups, drawn.groups)), return_inverse=True)
    if len(names) == 1:
        index = np.concatenate((np.arange(len(real)), np.arange(len(drawn))))
    return replace(real, groups=index[: len(real)]), replace(drawn, groups=index[len(real) :]), int(index.max()) + 1


def _mean(values: Matrix, rows: Sample, columns: Sample, count: int) -> _Mean:
    """Sum a matrix over the images of each pair of different groups, and count their pairs of images."""
    left, right = _members(rows, count), _members(columns, count)
    total = np.asarray(right.T @ (left.T @ values).T).T
    pairs = np.outer(np.asarray(left.sum(axis=0)).ravel(), np.asarray(right.sum(axis=0)).ravel())
    np.fill_diagonal(total, 0)
    np.fill_diagonal(pairs, 0)
    return _Mean((total + total.T) / 2, (pairs + pairs.T) / 2)


def _members(of: Sample, count: int) -> sparse.csr_matrix:
    weights = np.ones(len(of)) if of.weights is None else of.weights
    return sparse.csr_matrix((weights, (np.arange(len(of)), of.groups)), shape=(len(of), count))


def _sum(*terms: tuple[float, _Mean], wide: bool = False) -> Figure:
    """Add means over pairs, each times its factor, and estimate the standard error over groups.

    The variance is that of the groups' influences. The part that a pair of groups adds to the effects of the single groups is in
    the influence of both, so it is counted twice. It is subtracted once unless `wide` is set. A distance needs the wider error:
    near 0 its distribution is skewed, and so is its error.
    """
    count = len(terms[0][1].total)
    parts: Matrix = sum((sign * (m.total - m.value * m.count) / m.count.sum() for sign, m in terms), np.zeros((count, count)))
    influence = parts.sum(axis=1)
    variance = float(np.sum((2 * influence) ** 2) * count / max(1, count - 1))
    if count > 2 and not wide:
        alone = parts - (influence[:, None] + influence[None]) / (count - 2)
        np.fill_diagonal(alone, 0)
        variance = max(variance / 2, variance - 2 * float(np.sum(alone**2)))
    return Figure(float(sum(sign * m.value for sign, m in terms)), float(np.sqrt(variance)), count)


def _spread(influence: npt.NDArray[np.float64], captions: Sequence[str]) -> float:
    """Estimate the standard error that comes from drawing the images, given the influence of each on a figure.

    Images of one caption count as repeated draws.
    """
    index = np.unique(np.asarray(captions, dtype=np.str_), return_inverse=True)[1]
    size = np.bincount(index)
    rest = influence - (np.bincount(index, weights=influence) / size)[index]
    several = size[index] > 1
    if not several.any():
        return float(np.sqrt(np.sum((influence - influence.mean()) ** 2)))
    mean_square = np.sum(rest[several] ** 2) / (several.sum() - len(np.unique(index[several])))
    return float(np.sqrt(mean_square * len(influence)))
