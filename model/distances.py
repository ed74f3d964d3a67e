"""Measure how far a model's images lie from real ones, with errors: pure functions of features, captions and groups.

Held-out images come in groups, such as the patches of one photograph; only groups are independent of each other. A generated image
belongs to the group of the held-out image whose caption it was drawn for. Each figure is a signed sum of means over pairs of images
*from different groups* (U-statistics over groups; Hoeffding 1948). So real and generated pairs hold the same mixture of captions, a
model as good as the data has distance 0 on average however images and captions hang together, and one formula gives every error.

Two aspects of a model are measured. `images`: is this a picture that the data could hold? The kernel compares features. `captions`: is it
a picture of what was asked for? The kernel is a product with one of the captions, so that the distance is between pairs of image and
caption (the joint kernel distance; for product kernels see Gretton 2015). A model that ignores its captions is perfect in the first and
bad in the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.spatial.distance import cdist

WIDTHS = (0.25, 0.5, 1.0, 2.0)  # of the Gaussian kernels, in median distances; each twice the one before
HALVINGS = 200  # random halves of the real images that are held against each other
BAND_GROUPS = 25  # of each of two sets of real images
BAND_SEED = 8

Aspect = Literal["images", "captions"]
ASPECTS: tuple[Aspect, ...] = ("images", "captions")
Features = npt.NDArray[np.float64]  # [n, d]
Matrix = npt.NDArray[np.float64]
Groups = npt.NDArray[np.intp]  # [n], numbered from 0


@dataclass(frozen=True)
class Sample:
    """Images by their features [n, d], with the n captions that they have or were drawn for, and their n groups."""

    features: Features
    captions: Sequence[str]
    groups: Groups
    weights: npt.NDArray[np.float64] | None = None
    """Weigh each image; None: all alike."""

    def __len__(self) -> int:
        return len(self.features)

    def only(self, chosen: npt.NDArray[np.bool_]) -> Sample:
        """Take a part of them; groups keep their numbers."""
        weights = None if self.weights is None else self.weights[chosen]
        return Sample(
            self.features[chosen],
            [c for c, take in zip(self.captions, chosen, strict=True) if take],
            self.groups[chosen],
            weights,
        )


@dataclass(frozen=True)
class Figure:
    """Hold an estimate with its standard error, over so many independent groups."""

    value: float
    se: float
    groups: int


@dataclass(frozen=True)
class _Mean:
    """Hold a mean over pairs of different groups, by group: sums and counts [G, G], symmetric, zero within a group."""

    total: Matrix
    count: Matrix

    @property
    def value(self) -> float:
        return float(self.total.sum() / self.count.sum())


def kernel(x: Features, y: Features, scale: float) -> Matrix:
    """Mean of four Gaussian kernels around a scale, [n, m] (Gretton et al. 2012; widths as in Li et al. 2015).

    Bounded, unlike the cubic kernel that KID uses: new data may lie far outside what the features were standardised on, and
    a few such images would otherwise decide alone.
    """
    power: Matrix = np.exp(cdist(x, y, "sqeuclidean") * (-0.5 / (max(WIDTHS) * scale) ** 2))
    result = power / len(WIDTHS)
    for _ in WIDTHS[1:]:  # half the width is the fourth power, and two squares cost a tenth of an exponential
        np.square(np.square(power, out=power), out=power)
        result += power / len(WIDTHS)
    return result


def words(caption: str) -> frozenset[str]:
    """Split a caption into its words: "brick, scratch" has two."""
    return frozenset(caption.replace(",", " ").casefold().split())


def caption_kernel(a: Sequence[str], b: Sequence[str]) -> Matrix:
    """Compute how alike captions are, from 0 to 1, [n, m]: half for being the same, half for the words that they share.

    The second half is the cosine of the two sets of words, so "brick, scratch" is nearer to "brick" than to "mesh", and a caption
    that is new is near to those with its words. A mean of two kernels that are positive definite is one.
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
    """Estimate the squared kernel distance (maximum mean discrepancy) of a model's images to real ones; 0 on average for real images.

    Args:
        real: held-out images.
        drawn: generated ones, with the groups of the held-out images whose captions they were drawn for.
        scale: of the kernel, about the median distance of two images.
        aspect: what is compared.
    """
    real, drawn, count = _numbered(real, drawn)
    xx, yy, xy = alike(real, real, scale, aspect), alike(drawn, drawn, scale, aspect), alike(real, drawn, scale, aspect)
    return _sum(
        (1, _mean(xx, real, real, count)), (1, _mean(yy, drawn, drawn, count)), (-2, _mean(xy, real, drawn, count)), wide=True,
    )  # fmt: skip


def difference(real: Sample, challenger: Sample, champion: Sample, scale: float, aspect: Aspect) -> tuple[Figure, float]:
    """Estimate the challenger's squared kernel distance minus the champion's, and the part of its error that more drawing would remove.

    The relative similarity test of Bounliphone et al. 2016 in its paired form: image i of both models starts from the same noise and
    caption, so what they share cancels before the variance is taken.

    Args:
        real: held-out images.
        challenger: generated images.
        champion: generated images; row i has the seed, the caption and the group of the challenger's.
        scale: of the kernel.
        aspect: what is compared.

    Returns:
        the difference, below 0 where the challenger is better, and the standard error that comes of the generated images alone.
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

    Each such distance is unbiased, so 0 on average; this is its spread, by random halves of the groups that are there. The spread falls
    as one over the groups of a set (the distance is a degenerate U-statistic between equals), so that it can be told for 25 groups
    whatever their number: a yardstick that does not shrink when more data come.

    Returns:
        infinity where there are too few groups for two halves.
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
    """Estimate how far images go with their captions: the covariance, over pairs, of being alike in the image and in the caption.

    Args:
        real: held-out images.
        drawn: generated ones, each compared with real ones; None: real ones with each other, which is what a perfect model reaches.
        scale: of the kernel.
        least: share of what real images reach that is taken off; above 0 the figure says by how much a model exceeds that share.
    """
    against = real if drawn is None else drawn
    real, against, count = _numbered(real, against)
    own = _mean(_together(real, real, scale), real, real, count)
    if drawn is None:
        return _sum((1, own))
    return _sum((1, _mean(_together(real, against, scale), real, against, count)), (-least, own))


def told_apart(asked: Sample, others: Sample, scales: Sequence[float]) -> Figure:
    """Estimate the squared kernel distance between real images of a caption and others: 0 where no feature space tells them apart.

    Args:
        asked: real images of the caption; their features are those of all spaces side by side.
        others: real images without it.
        scales: of each space, whose kernels are averaged.
    """
    asked, others, count = _numbered(asked, others)
    return _sum(
        (1, _mean(_averaged(asked, asked, scales), asked, asked, count)), (1, _mean(_averaged(others, others, scales), others, others, count)),
        (-2, _mean(_averaged(asked, others, scales), asked, others, count)),
    )  # fmt: skip


def drawn_share(asked: Sample, others: Sample, drawn: Sample, without: Sample, scales: Sequence[float]) -> Figure:
    """Estimate how much of what tells a caption's real images from others a model draws, times their distance.

    How far the model's images move, when the caption is asked for, along the line from the others to real images of the caption in the
    space of the kernel: with m for the mean embedding, <m(drawn) - m(without), m(asked) - m(others)>. Divided by `told_apart` it is 1 for a
    model as good as the data, and 0 for one that draws the same whether it is asked or not, wherever on the line that lies: a model whose
    plain surfaces are blotchy must not seem to draw stains.

    Args:
        asked: real images of a caption.
        others: real images without it.
        drawn: images that were generated for the caption, with the groups of the real ones.
        without: images that were generated for the others' captions; the others themselves where there are none.
        scales: of each space, whose kernels are averaged.
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
    """The mean of the kernels of several spaces, whose features stand side by side."""
    parts = zip(np.split(a.features, len(scales), axis=1), np.split(b.features, len(scales), axis=1), scales, strict=True)
    return np.asarray(sum(kernel(x, y, scale) for x, y, scale in parts) / len(scales))


def _together(a: Sample, b: Sample, scale: float) -> Matrix:
    """The products of both kernels, each without what its rows and columns have in common over pairs of different groups.

    Else a surface that is rare, and unlike what a model draws, would count as following. (The Hilbert-Schmidt independence criterion
    centres in this way; Gretton et al. 2005.)
    """
    apart = a.groups[:, None] != b.groups[None]
    return _centred(kernel(a.features, b.features, scale), apart) * _centred(caption_kernel(a.captions, b.captions), apart)


def _centred(values: Matrix, apart: npt.NDArray[np.bool_]) -> Matrix:
    """Without the means of rows and columns, over the pairs that count."""
    left = values - values[apart].mean()
    rows = (left * apart).sum(axis=1) / np.maximum(apart.sum(axis=1), 1)
    columns = (left * apart).sum(axis=0) / np.maximum(apart.sum(axis=0), 1)
    return np.asarray(left - rows[:, None] - columns[None])


def _joined(*samples: Sample) -> list[Groups]:
    """The samples' groups, numbered anew."""
    index = np.unique(np.concatenate([of.groups for of in samples]), return_inverse=True)[1]
    return np.split(index, np.cumsum([len(of) for of in samples])[:-1])


def _numbered(real: Sample, drawn: Sample) -> tuple[Sample, Sample, int]:
    """Both samples with groups numbered anew, and their count.

    A single group gives no pair of different groups; then every image counts as its own. A gate must not decide on such figures.
    """
    names, index = np.unique(np.concatenate((real.groups, drawn.groups)), return_inverse=True)
    if len(names) == 1:
        index = np.concatenate((np.arange(len(real)), np.arange(len(drawn))))
    return replace(real, groups=index[: len(real)]), replace(drawn, groups=index[len(real) :]), int(index.max()) + 1


def _mean(values: Matrix, rows: Sample, columns: Sample, count: int) -> _Mean:
    """Sums of a matrix by pairs of groups."""
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
    """A signed sum of means over pairs, with the error that it has over groups.

    The variance is that of the groups' influences. What pairs add beyond single groups is in the influences of both of a pair, so it
    is counted twice, and taken off once unless `wide`: near 0 a distance is skewed, and so is its error, which needs that room.
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
    """The standard error that images bring of which each has such an influence, those of one caption being draws of one kind."""
    index = np.unique(np.asarray(captions, dtype=np.str_), return_inverse=True)[1]
    size = np.bincount(index)
    rest = influence - (np.bincount(index, weights=influence) / size)[index]
    several = size[index] > 1
    if not several.any():
        return float(np.sqrt(np.sum((influence - influence.mean()) ** 2)))
    mean_square = np.sum(rest[several] ** 2) / (several.sum() - len(np.unique(index[several])))
    return float(np.sqrt(mean_square * len(influence)))
