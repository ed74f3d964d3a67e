"""Distances that are 0 for real images, intervals that cover as often as they promise, and figures for captions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from model import distances
from model.distances import Aspect, Features, Figure, Groups, Sample, caption_kernel
from model.evaluate import frechet_distance

D = 6  # dimensions of the made-up features
SCALE = float(np.sqrt(2 * D))  # about the median distance of two standard normal points


def points(rng: np.random.Generator, n: int, shift: float = 0.0) -> Features:
    return rng.normal(size=(n, D)) + shift / np.sqrt(D)


def sample(features: Features, groups: Groups | None = None, captions: list[str] | None = None) -> Sample:
    """Make a sample whose groups repeat in turn; by default, each image is its own group and all have one caption."""
    n = len(features)
    numbered = np.arange(n) if groups is None else np.resize(groups, n)
    return Sample(features, captions or [""] * n, numbered)


def kernel_interval(x: Features, y: Features, scale: float, groups: Groups | None = None) -> tuple[float, float]:
    found = distances.distance(sample(x, groups), sample(y, groups), scale, "images")
    return found.value, found.se


def kernel_distance(x: Features, y: Features, scale: float) -> float:
    return kernel_interval(x, y, scale)[0]


def relative_distance(x: Features, c: Features, h: Features, scale: float, groups: Groups | None = None) -> tuple[float, float]:
    found, _ = distances.difference(sample(x, groups), sample(c, groups), sample(h, groups), scale, "images")
    return found.value, found.se


def test_kernel_distance_of_same_is_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [kernel_distance(points(rng, 40), points(rng, 60), SCALE) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0 < max(values)  # unbiased: sometimes below zero


def test_kernel_distance_grows_with_shift() -> None:
    rng = np.random.default_rng(1)
    x, y = points(rng, 200), points(rng, 200)
    values = [kernel_distance(x, y + shift / np.sqrt(D), SCALE) for shift in (0, 0.5, 1, 2, 4, 1000)]
    assert values == sorted(values)
    assert values[1] > 0.005
    assert values[-1] < 2  # bounded: a few far-off images cannot decide alone


def test_kernel_distance_sees_shape_too() -> None:
    """Tell apart two distributions of one mean and covariance, which a Fréchet distance cannot tell apart."""
    rng = np.random.default_rng(2)
    normal, other, corners = points(rng, 600), points(rng, 600), rng.choice([-1.0, 1.0], size=(600, D))
    assert kernel_distance(normal, corners, SCALE) > 0.003
    assert kernel_distance(normal, other, SCALE) < 0.001
    assert frechet_distance(normal, corners) < 0.1


def paired(rng: np.random.Generator, n: int) -> tuple[Features, Features]:
    """Draw for challenger and champion from shared noise: alike, but the challenger is nearer to the real distribution."""
    shared = points(rng, n)
    return shared + 0.3 * points(rng, n), 1.1 * shared + 0.3 * points(rng, n, shift=2.0) + 0.15


def test_relative_distance_has_sign_of_better() -> None:
    rng = np.random.default_rng(5)
    reference, (challenger, champion) = points(rng, 200), paired(rng, 200)
    delta, se = relative_distance(reference, challenger, champion, SCALE)
    assert delta < -2 * se < 0
    assert relative_distance(reference, champion, challenger, SCALE) == pytest.approx((-delta, se))
    assert relative_distance(reference, challenger, challenger, SCALE) == pytest.approx((0, 0), abs=1e-12)


def test_relative_distance_is_difference_of_distances() -> None:
    rng = np.random.default_rng(6)
    reference, (challenger, champion) = points(rng, 70), paired(rng, 50)
    delta, _ = relative_distance(reference, challenger, champion, SCALE)
    alone = [kernel_distance(reference, x, SCALE) for x in (challenger, champion)]
    assert delta == pytest.approx(alone[0] - alone[1])


def test_interval_covers_true_difference() -> None:
    """Check that in 200 evaluations of a known pair, the 95 % interval holds the truth in 90 to 99 %."""
    rng = np.random.default_rng(7)
    truths = [relative_distance(points(rng, 1200), *paired(rng, 1200), SCALE)[0] for _ in range(6)]
    truth, hits, errors = np.mean(truths), 0, []
    for _ in range(200):
        delta, se = relative_distance(points(rng, 80), *paired(rng, 60), SCALE)
        hits += abs(delta - truth) <= 1.96 * se
        errors.append(se)
    assert 180 <= hits <= 198
    assert np.std(truths) / np.sqrt(6) < 0.1 * np.mean(errors)  # the truth is known well enough to judge by


def test_interval_covers_true_difference_when_photographs_are_cut_up() -> None:
    """Cut held-out images into 12 groups that share most of what they are: only the error by groups is right."""
    rng = np.random.default_rng(17)

    def cut_up(groups: int, each: int) -> Features:
        return np.repeat(0.9 * points(rng, groups), each, axis=0) + 0.43 * points(rng, groups * each)

    truth = np.mean([relative_distance(cut_up(1200, 1), *paired(rng, 1200), SCALE)[0] for _ in range(4)])
    quantile, groups = stats.t.ppf(0.975, 11), np.repeat(np.arange(12), 10)
    hits = naive = 0
    for _ in range(200):
        reference, pair = cut_up(12, 10), paired(rng, 60)
        delta, se = relative_distance(reference, *pair, SCALE, groups)
        hits += abs(delta - truth) <= quantile * se
        naive += abs(delta - truth) <= quantile * relative_distance(reference, *pair, SCALE)[1]
    assert 178 <= hits <= 199
    assert naive < 170


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_interval_covers_true_distance(shift: float) -> None:
    """Check that the 95 % interval of one distance holds the truth in 93 to 97 % of 300 evaluations.

    The test allows 2.5 % more on both sides, because 300 evaluations are few.
    """
    rng = np.random.default_rng(30)
    truth = np.mean([kernel_distance(points(rng, 1200), points(rng, 1200, shift), SCALE) for _ in range(6)])
    intervals = [kernel_interval(points(rng, 80), points(rng, 60, shift), SCALE) for _ in range(300)]
    hits = sum(abs(kd - truth) <= 1.96 * se for kd, se in intervals)
    assert 0.93 - 0.025 < hits / 300 < 0.97 + 0.025
    assert np.std([kd for kd, _ in intervals]) == pytest.approx(np.mean([se for _, se in intervals]), rel=0.25)


def test_interval_of_no_distance_is_wide_enough() -> None:
    """Keep the interval wide enough at a distance of zero, where the influences vanish."""
    rng = np.random.default_rng(31)
    intervals = [kernel_interval(points(rng, 80), points(rng, 60), SCALE) for _ in range(300)]
    assert sum(abs(kd) <= 1.96 * se for kd, se in intervals) >= 280


def test_interval_covers_true_distance_when_photographs_are_cut_up() -> None:
    """Cut held-out images into 20 groups: by group, value and error are right; by image, they are not."""
    rng = np.random.default_rng(32)

    def cut_up(groups: int, each: int) -> Features:
        return np.repeat(0.9 * points(rng, groups), each, axis=0) + 0.43 * points(rng, groups * each)

    truth = np.mean([kernel_distance(cut_up(1200, 1), points(rng, 1200, 1.0), SCALE) for _ in range(6)])
    quantile, groups = stats.t.ppf(0.975, 19), np.repeat(np.arange(20), 6)
    made, naive = [], []
    for _ in range(300):
        reference, generated = cut_up(20, 6), points(rng, 60, 1.0)
        made.append(kernel_interval(reference, generated, SCALE, groups))
        naive.append(kernel_interval(reference, generated, SCALE))
    assert 272 <= sum(abs(kd - truth) <= quantile * se for kd, se in made) <= 298
    assert sum(abs(kd - truth) <= quantile * se for kd, se in naive) < 260
    assert abs(np.mean([kd for kd, _ in made]) - truth) < 0.003 < np.mean([kd for kd, _ in naive]) - truth  # and unbiased


def test_distance_with_a_single_group_is_still_a_number() -> None:
    rng = np.random.default_rng(33)
    x, y = points(rng, 20), points(rng, 20, 1.0)
    assert kernel_interval(x, y, SCALE, np.zeros(20, dtype=np.intp)) == kernel_interval(x, y, SCALE)


def test_pairing_makes_interval_narrower() -> None:
    rng = np.random.default_rng(8)
    reference, challenger = points(rng, 400), points(rng, 100, shift=0.5)
    champion = challenger + 0.1 * points(rng, 100, shift=2.0)  # nearly the same model
    together = relative_distance(reference, challenger, champion, SCALE)[1]
    apart = relative_distance(reference, challenger, rng.permutation(champion), SCALE)[1]
    assert together < 0.5 * apart


def test_interval_of_equal_models_is_not_too_wide() -> None:
    """Count only once what pairs add where first-order influences vanish; else equal models look undecided."""
    rng = np.random.default_rng(43)
    found = [relative_distance(points(rng, 80), points(rng, 60), points(rng, 60), SCALE) for _ in range(300)]
    assert np.mean([se for _, se in found]) == pytest.approx(np.std([delta for delta, _ in found]), rel=0.15)
    groups = np.repeat(np.arange(20), 4)
    made = [
        relative_distance(np.repeat(points(rng, 20), 4, axis=0), points(rng, 60), points(rng, 60), SCALE, groups)
        for _ in range(300)
    ]
    assert np.mean([se for _, se in made]) == pytest.approx(np.std([delta for delta, _ in made]), rel=0.15)


# Captions


def test_captions_are_alike_by_their_words() -> None:
    found = caption_kernel(["brick, scratch", "", "brick"], ["brick, scratch", "brick", "mesh", "Brick", ""])
    half = 0.5 / np.sqrt(2)
    assert found == pytest.approx(np.array([[1, half, 0, half, 0], [0, 0, 0, 0, 1], [half, 1, 0, 0.5, 0]]))


@pytest.mark.parametrize("captions", [["a"] * 7, [f"part {i}" for i in range(7)], ["a", "a b", "b", "", "a, b", "c d e", "a"]])
def test_caption_kernel_is_positive_definite(captions: list[str]) -> None:
    assert np.linalg.eigvalsh(caption_kernel(captions, captions)).min() > -1e-12


def surfaces(rng: np.random.Generator, groups: int, each: int, seen: float = 1.0) -> Sample:
    """Draw two surfaces, one in each group, with a defect on a quarter of the images.

    Features 0 and 1 show surface and defect, as strongly as `seen` says.
    """
    surface, of = (
        np.repeat(rng.permutation(groups) % 2 if groups < 8 else rng.integers(2, size=groups), each),
        np.repeat(np.arange(groups), each),
    )
    defect = rng.random(groups * each) < 0.25
    features = points(rng, groups * each)
    features[:, 0] += 3 * seen * surface
    features[:, 1] += 3 * seen * defect
    return Sample(features, [f"{'ab'[s]}{', hole' if d else ''}" for s, d in zip(surface, defect, strict=True)], of)


def drawn_for(rng: np.random.Generator, real: Sample, surface: float = 3.0, defect: float = 3.0) -> Sample:
    """Draw for the captions of real images, with a model that shows surfaces and defects this strongly."""
    features = points(rng, len(real))
    features[:, 0] += surface * np.array([caption.startswith("b") for caption in real.captions])
    features[:, 1] += defect * np.array(["hole" in caption for caption in real.captions])
    return Sample(features, real.captions, real.groups)


@pytest.mark.parametrize("aspect", distances.ASPECTS)
def test_distance_of_data_is_zero_however_captions_hang_together(aspect: Aspect) -> None:
    """Check that groups alone cause no distance: a group holds one surface only, so pairs within it are alike."""
    rng = np.random.default_rng(50)
    values = []
    for _ in range(150):
        real = surfaces(rng, 12, 5)
        values.append(distances.distance(real, drawn_for(rng, real), SCALE, aspect).value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(150)


def test_captions_that_are_permuted_show_in_pairs_and_not_in_images() -> None:
    rng = np.random.default_rng(51)
    real = surfaces(rng, 40, 6)
    good = drawn_for(rng, real)
    order = rng.permutation(len(real))
    permuted = Sample(good.features[order], good.captions, good.groups)
    alone, pairs = (distances.difference(real, permuted, good, SCALE, aspect)[0] for aspect in distances.ASPECTS)
    assert pairs.value > 4 * pairs.se
    assert abs(alone.value) < pairs.value / 2
    best = distances.following(real, None, SCALE)
    shares = [distances.following(real, of, SCALE).value / best.value for of in (good, permuted, drawn_for(rng, real, 0, 0))]
    assert shares[0] == pytest.approx(1, abs=0.15)
    assert shares[1:] == pytest.approx([0, 0], abs=0.1)


def test_excess_of_following_is_taken_off_a_share() -> None:
    rng = np.random.default_rng(52)
    real = surfaces(rng, 20, 6)
    made = drawn_for(rng, real, 1.5, 1.5)
    best, own, excess = (
        distances.following(real, None, SCALE),
        distances.following(real, made, SCALE),
        distances.following(real, made, SCALE, 0.4),
    )
    assert excess.value == pytest.approx(own.value - 0.4 * best.value)
    assert best.value - 2 * best.se > 0


def test_interval_of_following_covers_the_truth() -> None:
    """Take a model that ignores its captions for one that follows them in at most one of twenty evaluations."""
    rng = np.random.default_rng(53)
    hits = 0
    for _ in range(200):
        real = surfaces(rng, 16, 5)
        found = distances.following(real, drawn_for(rng, real, 0, 0), SCALE)
        hits += abs(found.value) <= stats.t.ppf(0.975, 15) * found.se
    assert hits >= 184


@pytest.mark.parametrize(("shown", "share"), [(3.0, 1.0), (0.0, 0.0)])
def test_share_of_a_caption_says_how_far_it_is_drawn(shown: float, share: float) -> None:
    rng = np.random.default_rng(54)
    found, covered = [], 0
    for _ in range(60):
        real = surfaces(rng, 24, 6)
        own = np.array(["hole" in caption for caption in real.captions])
        asked, others = real.only(own), real.only(~own)
        made, without = drawn_for(rng, asked, 3.0, shown), drawn_for(rng, others, 3.0, 0.0)
        apart = distances.told_apart(asked, others, [SCALE])
        figure = distances.drawn_share(asked, others, made, without, [SCALE])
        covered += abs(figure.value - share * apart.value) <= stats.t.ppf(0.975, 23) * figure.se
        found.append(figure.value / apart.value)
    assert np.mean(found) == pytest.approx(share, abs=0.06)
    assert covered >= 50


def test_share_is_what_asking_changes_not_where_the_images_lie() -> None:
    """Check that a model whose images all look half as if they had a hole does not draw the hole."""
    rng = np.random.default_rng(57)
    real = surfaces(rng, 60, 6)
    own = np.array(["hole" in caption for caption in real.captions])
    asked, others = real.only(own), real.only(~own)
    apart = distances.told_apart(asked, others, [SCALE]).value
    made, without = drawn_for(rng, asked, 3.0, 0.0), drawn_for(rng, others, 3.0, 0.0)
    made.features[:, 1] += 1.5
    without.features[:, 1] += 1.5
    by_place = distances.drawn_share(asked, others, made, others, [SCALE]).value / apart
    assert by_place > 0.4
    assert distances.drawn_share(asked, others, made, without, [SCALE]).value / apart == pytest.approx(0, abs=0.1)


def test_weights_make_others_as_mixed_as_the_caption() -> None:
    """Weigh the other images: if defects are on one surface only, the surface itself would pass for the defect."""
    rng = np.random.default_rng(55)
    real = surfaces(rng, 30, 6)
    holes = np.array([caption == "b, hole" for caption in real.captions])
    clean = np.array([caption in ("a", "b") for caption in real.captions])
    weights = np.array([float(caption == "b") for caption in real.captions])
    without = drawn_for(rng, real.only(holes), 3.0, 0.0)
    others = Sample(real.features, real.captions, real.groups, weights).only(clean)
    fair, unfair = (
        distances.drawn_share(real.only(holes), of, without, of, [SCALE]).value
        / distances.told_apart(real.only(holes), of, [SCALE]).value
        for of in (others, real.only(clean))
    )
    assert abs(fair) < 0.15
    assert unfair > fair + 0.1


def test_band_does_not_shrink_when_more_data_come() -> None:
    rng = np.random.default_rng(56)
    few, many = (np.mean([distances.band(surfaces(rng, groups, 4), SCALE, "images") for _ in range(12)]) for groups in (16, 64))
    assert few == pytest.approx(many, rel=0.3)


def test_band_is_how_far_two_sets_of_25_groups_lie_apart() -> None:
    rng = np.random.default_rng(60)
    found = []
    for _ in range(120):
        one, other = surfaces(rng, 25, 4), surfaces(rng, 25, 4)
        apart = Sample(other.features, other.captions, other.groups + 25)
        found.append(distances.distance(one, apart, SCALE, "images").value)
    told = np.mean([distances.band(surfaces(rng, 50, 4), SCALE, "images") for _ in range(12)])
    assert told == pytest.approx(np.sqrt(np.mean(np.square(found))), rel=0.3)


def test_band_of_too_few_groups_is_not_told() -> None:
    one = surfaces(np.random.default_rng(61), 3, 5)
    assert distances.band(one, SCALE, "images") == float("inf")


def test_part_of_the_error_that_drawing_removes_falls_with_drawing() -> None:
    rng = np.random.default_rng(57)
    real = surfaces(rng, 20, 5)

    def parts(times: int) -> tuple[Figure, float]:
        many = Sample(np.zeros((len(real) * times, D)), list(real.captions) * times, np.tile(real.groups, times))
        return distances.difference(real, drawn_for(rng, many), drawn_for(rng, many, 1.0, 3.0), SCALE, "images")

    (once, drawn_once), (often, drawn_often) = parts(1), parts(9)
    assert drawn_often == pytest.approx(drawn_once / 3, rel=0.25)
    assert drawn_once < once.se * 1.1
    assert often.se > 2 * drawn_often  # the rest comes from the held-out groups


def test_images_of_groups_count_whatever_their_numbers() -> None:
    rng = np.random.default_rng(58)
    real = surfaces(rng, 10, 4)
    made = drawn_for(rng, real)
    renamed = [Sample(of.features, of.captions, 7 + 3 * of.groups[::1]) for of in (real, made)]
    assert distances.distance(*renamed, SCALE, "captions") == distances.distance(real, made, SCALE, "captions")  # type: ignore[misc]


def test_alike_is_a_product_of_both_kernels() -> None:
    rng = np.random.default_rng(59)
    real = surfaces(rng, 4, 3)
    matrix: npt.NDArray[np.float64] = distances.alike(real, real, SCALE, "captions")
    assert matrix == pytest.approx(
        distances.kernel(real.features, real.features, SCALE) * caption_kernel(real.captions, real.captions)
    )
    assert np.diag(matrix) == pytest.approx(1)


def test_error_of_drawing_holds_where_each_caption_was_drawn_twice() -> None:
    influence = np.random.default_rng(58).normal(size=400) + np.repeat(np.random.default_rng(59).normal(size=200), 2)
    captions = [f"{i // 2}" for i in range(400)]
    assert distances._spread(influence, captions) == pytest.approx(
        400**0.5, rel=0.1
    )  # what images of one caption have in common is no error of drawing
