"""Figures that decide: distances mean what they say, intervals cover as often as they promise, features stay the same."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from model.config import ModelConfig
from model.data import Dataset, prepare, to_bytes
from model.distances import Sample, distance
from model.errors import CheckpointError, DataError, ExportError
from model.evaluate import (
    EVALUATION_SEED,
    Drawn,
    by_caption,
    compare,
    copying,
    coverage,
    density,
    draw,
    frechet_distance,
    frechet_error,
    held_out_captions,
    measure_cost,
    measure_memory,
    memorisation,
    nearest_of_others,
    precision,
    published_fid,
    pure_noise,
    quality,
    real_images,
    scorecard,
    usage,
)
from model.export import Export, pack
from model.features import DIMENSIONS, SPACES, Features, FeatureSpaces, fit, published_features
from model.features import load as load_features
from model.graph import build, layout
from model.network import Network
from model.scorecard import Sampler, Usage
from model.session import Session, load, noise
from model.train import Checkpoint
from ota.agent import sampler as agent

from .conftest import CAPTIONS, CONFIG, SAMPLER, write_images

D = 6  # dimensions of the made-up features
SCALE = float(np.sqrt(2 * D))  # about the median distance of two standard normal points


def points(rng: np.random.Generator, n: int, shift: float = 0.0) -> Features:
    return rng.normal(size=(n, D)) + shift / np.sqrt(D)


def drawn(images: np.ndarray) -> Drawn:
    return Drawn(images, np.full((2, CONFIG.blocks, 4), 0.25, dtype=np.float32), 0.0)


@pytest.fixture(scope="module")
def whole_features(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit the feature spaces of the made-up line and return their file."""
    path = tmp_path_factory.mktemp("features") / "shapes.safetensors"
    fit(dataset, path)
    return path


@pytest.fixture(scope="module")
def spaces(whole_features: Path) -> FeatureSpaces:
    return load_features(whole_features)


@pytest.fixture(scope="module")
def session(exported: Export) -> Session:
    return load(exported.folder, threads=1)


def blank_session(value: float) -> Session:
    """Return a model whose velocity is this value everywhere, whatever it is asked."""
    network = Network(CONFIG).eval()  # a fresh head is zero
    weights = bytearray(pack(network, "float32"))
    bias = next(t for t in layout(CONFIG, "float32")[0] if t.name == "head.bias")
    weights[bias.offset : bias.offset + bias.length] = np.full(bias.length // 4, value, dtype=np.float32).tobytes()
    return Session(build(CONFIG, "float32").SerializeToString(deterministic=True), bytes(weights))


def test_frechet_distance_is_exact_for_gaussians() -> None:
    rng = np.random.default_rng(3)
    x = points(rng, 300)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * D)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * np.trace(np.cov(x, rowvar=False)) + 4 * (x.mean(axis=0) ** 2).sum())
    assert frechet_distance(x, 3 * x) == pytest.approx(frechet_distance(3 * x, x))


def test_frechet_distance_survives_few_images() -> None:
    """Compare fewer images than dimensions.

    The covariances are then singular, and the square root must not become imaginary.
    """
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(10, DIMENSIONS)), rng.normal(size=(12, DIMENSIONS))
    assert 0 < frechet_distance(x, y) < 4 * DIMENSIONS
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("dimensions", "n"), [(D, 60), (DIMENSIONS, 128)])
def test_frechet_error_is_spread_of_new_draws(dimensions: int, n: int) -> None:
    rng = np.random.default_rng(34)
    draws = [(rng.normal(size=(80, dimensions)), 1.2 * rng.normal(size=(n, dimensions)) + 0.2) for _ in range(60)]
    errors = [frechet_error(x, y) for x, y in draws[:15]]
    spread = np.std([frechet_distance(x, y) for x, y in draws])
    assert 0.7 < np.mean(np.array(errors, dtype=float)) / spread < 1.7


def test_frechet_error_leaves_out_whole_groups() -> None:
    rng = np.random.default_rng(35)
    x, y = np.repeat(points(rng, 12), 5, axis=0) + 0.1 * points(rng, 60), points(rng, 60)
    together, apart = frechet_error(x, y, np.repeat(np.arange(12), 5)), frechet_error(x, y)
    assert together is not None
    assert apart is not None
    assert together > 1.3 * apart


@pytest.mark.parametrize(("m", "n", "groups"), [(2, 40, None), (40, 2, None), (40, 40, [0] * 40), (3, 9, [0, 0, 1])])
def test_frechet_error_of_too_little_is_unknown(m: int, n: int, groups: list[int] | None) -> None:
    rng = np.random.default_rng(36)
    assert frechet_error(points(rng, m), points(rng, n), None if groups is None else np.array(groups)) is None


def test_coverage_falls_when_mode_drops() -> None:
    rng = np.random.default_rng(9)

    def modes(which: tuple[int, ...]) -> Features:
        return np.concatenate([points(rng, 60) + 10 * m for m in which])

    reference = modes((0, 1, 2, 3))
    full, dropped, collapsed = (coverage(reference, modes(which)) for which in ((0, 1, 2, 3), (0, 1, 2, 2), (1, 1, 1, 1)))
    assert full > 0.9
    assert dropped == pytest.approx(0.75, abs=0.05)
    assert collapsed == pytest.approx(0.25, abs=0.05)
    assert coverage(reference, modes((7,))) == 0


def test_precision_recall_density_see_different_failures() -> None:
    """Check that lost modes cost recall and invented ones precision, and that density rewards crowding in dense places."""
    rng = np.random.default_rng(11)

    def modes(which: tuple[int, ...]) -> Features:
        return np.concatenate([points(rng, 60) + 10 * m for m in which])

    reference, same = modes((0, 1, 2, 3)), modes((0, 1, 2, 3))
    dropped, invented = modes((0, 0, 0, 0)), modes((0, 1, 7, 8))
    assert min(precision(reference, same), precision(same, reference)) > 0.85
    assert density(reference, same) == pytest.approx(1, abs=0.15)
    assert precision(reference, dropped) > 0.85
    assert precision(dropped, reference) == pytest.approx(0.25, abs=0.05)
    assert precision(reference, invented) == pytest.approx(0.5, abs=0.08)
    assert precision(invented, reference) == pytest.approx(0.5, abs=0.08)
    assert density(reference, invented) == pytest.approx(0.5, abs=0.1)
    assert density(reference, 0.3 * points(rng, 100)) > 2  # all near the middle of one mode
    assert density(reference, modes((7,))) == precision(reference, modes((7,))) == 0


def test_precision_and_density_by_hand() -> None:
    """Compare with results by hand: six items on a line at 0..5; the radii of five neighbours are 5, 4, 3, 3, 4, 5."""
    reference = np.arange(6.0)[:, None]
    generated = np.array([[-1.0], [20.0], [10.0]])  # in three balls (of 0, 2 and 1: radius 5, 4, 3), in none, in one (of 5)
    assert precision(reference, generated) == pytest.approx(2 / 3)
    assert density(reference, generated) == pytest.approx((3 + 0 + 1) / (5 * 3))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_coverage_of_few_reference_images(count: int) -> None:
    """Count all reference images as neighbours if there are fewer of them than neighbours."""
    reference = points(np.random.default_rng(10), count)
    assert coverage(reference, reference) == 1
    assert coverage(reference, reference + 100) == 0


@pytest.mark.parametrize(("value", "bad"), [(float("nan"), 1.0), (float("inf"), 1.0), (0.0, 0.0)])
def test_images_not_finite_are_bad(value: float, bad: float) -> None:
    """Count images that are not finite as bad; a velocity of zero leaves the noise, which is neither blank nor broken."""
    result = draw(blank_session(value), list(CAPTIONS), Sampler(method="euler", steps=2, guidance=1.0))
    assert result.bad == bad
    assert result.images.shape == (2, 1, 16, 16)


def test_blank_images_are_bad() -> None:
    """Draw with a constant velocity so large that all pixels are clipped to white."""
    result = draw(blank_session(-50.0), list(CAPTIONS), Sampler(method="euler", steps=2, guidance=1.0))
    assert result.images.min() == 255
    assert result.bad == 1


def test_good_model_draws_no_bad_images(session: Session) -> None:
    asked: list[tuple[int, int]] = []
    result = draw(session, [CAPTIONS[i % 2] for i in range(40)], SAMPLER, lambda made, of: asked.append((made, of)))
    assert result.bad == 0
    assert len(result.images) == 40
    assert asked == [(32, 40), (40, 40)]


def test_load_weighs_images_alike(session: Session) -> None:
    """Draw thirty-three images in two batches: the one in the second counts as much as any other."""
    captions = [CAPTIONS[i % 2] for i in range(33)]
    alone = [session.generate(session.encode([c]), [EVALUATION_SEED + i], SAMPLER)[1] for i, c in enumerate(captions)]
    made = draw(session, captions, SAMPLER).load
    assert made.shape == (SAMPLER.steps, CONFIG.blocks, CONFIG.shape.experts)
    np.testing.assert_allclose(made.mean(axis=0), np.mean(alone, axis=0), atol=2e-4)


@pytest.mark.parametrize(("method", "guidance"), [("ab2", 2.0), ("heun", 1.0)])
def test_load_is_known_at_every_step(session: Session, method: Literal["ab2", "heun"], guidance: float) -> None:
    """Compare one step taken alone with the first of many; Heun's two evaluations belong to one step."""
    ids = session.encode(["bar"])
    images, load = session.trace(ids, [3], Sampler(method=method, steps=3, guidance=guidance))
    assert load.shape == (3, CONFIG.blocks, CONFIG.shape.experts)
    assert np.abs(load[0] - load[2]).max() > 1e-4  # experts do differ between noise and image
    again, mean = session.generate(ids, [3], Sampler(method=method, steps=3, guidance=guidance))
    assert torch.equal(images, again)
    np.testing.assert_allclose(mean, load.mean(axis=0), atol=1e-6)
    x = noise(3, (1, CONFIG.image_size, CONFIG.image_size))[None]
    half = [np.ones(1, np.float32), np.ones(1, np.float32)]
    if method == "ab2":
        first = [session.run(x, *half, text)[1][0] for text in (ids, np.zeros_like(ids))]
    else:
        v, start = session.run(x, *half, ids)
        second = np.full(1, 2 / 3, np.float32)
        first = [start[0], session.run(x - v / 3, second, second, ids)[1][0]]  # type: ignore[operator]
    np.testing.assert_allclose(load[0], np.mean(first, axis=0), atol=1e-4)


def test_drawn_images_start_from_their_seeds(session: Session) -> None:
    many = torch.cat([images for images, _ in session.generate_many(["bar"] * 5, 100, SAMPLER, batch=2)])
    alone = torch.cat([session.generate(session.encode(["bar"]), [100 + i], SAMPLER)[0] for i in range(5)])
    near = ((many - alone).abs() < 1e-2).float().mean()
    assert near > 0.98
    assert np.unique(to_bytes(many), axis=0).shape[0] == 5


def test_captions_steer_the_image(session: Session, dataset: Dataset) -> None:
    """Check that a model trained for seconds already draws what it is asked for more often than not."""
    means = {c: np.mean([i for i, k in zip(dataset.images, dataset.captions, strict=True) if k == c], axis=0) for c in CAPTIONS}
    axis = means["bar"] - means["disc"]
    made = {c: draw(session, [c] * 32, SAMPLER).images for c in CAPTIONS}
    assert (axis * (made["bar"].mean(axis=0) - made["disc"].mean(axis=0))).sum() > 0


def test_captions_follow_held_out_proportions(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "mixed", count=60)
    write_images(folder, count=60, seed=1, dim=True)
    data = prepare(folder, CONFIG, tmp_path / "cache")
    own = Counter(data.captions[i] for i in data.reference())
    n = len(data.reference())
    assert Counter(held_out_captions(data, 3 * n)) == {caption: 3 * count for caption, count in own.items()}
    few = Counter(held_out_captions(data, n))
    assert few == own
    # A smaller number is drawn from all of the data, not from the first files.
    in_order = replace(data, captions=sorted(data.captions))
    assert len(set(held_out_captions(in_order, n // 4))) > 1
    assert len({in_order.captions[i] for i in in_order.reference()[: n // 4]}) == 1


@pytest.mark.parametrize("n", [2, 7, 50])
def test_captions_are_same_for_every_model(dataset: Dataset, n: int) -> None:
    first = held_out_captions(dataset, n)
    torch.rand(3)
    np.random.default_rng().random(3)
    assert held_out_captions(dataset, n) == first
    assert len(first) == n


@pytest.mark.parametrize("n", [0, 1])
def test_evaluation_of_nothing_is_refused(dataset: Dataset, n: int) -> None:
    with pytest.raises(DataError, match=f"{n} images are too few for an evaluation; ask for at least 2"):
        held_out_captions(dataset, n)


def test_real_images_to_look_at_are_held_out_and_of_many_groups(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 1, 4, 4), np.uint8
    )  # the grey level of each image is its number
    captions = ["brick"] * 9 + ["mesh"] * 3
    groups = ["a", "a", "a", "b", "b", "c", "c", "d", "d", "e", "f", "f"]
    held_out = np.array([True] * 7 + [False] * 2 + [True] * 3)
    data = Dataset(pixels, captions, np.zeros((12, 4), np.int64), held_out, groups, {})

    def shown(caption: str, n: int) -> list[int]:
        return [int(image[0, 0, 0]) for image in real_images(data, caption, n)]

    assert shown("brick", 5) == [0, 3, 5, 1, 4]  # one image of each photograph, then the next of each; d is not held out
    assert shown("brick", 99) == [0, 3, 5, 1, 4, 6, 2]
    assert shown("mesh", 2) == [9, 10]
    assert shown("rope", 2) == []


def test_quality_ranks_data_model_noise(spaces: FeatureSpaces, dataset: Dataset, session: Session) -> None:
    reference = dataset.images[dataset.reference()]
    n = len(reference)
    real = quality(spaces, dataset, drawn(dataset.images[dataset.training()[:n]]), "new")
    made = quality(spaces, dataset, draw(session, held_out_captions(dataset, n), SAMPLER), "new")
    noisy = quality(spaces, dataset, drawn(pure_noise(reference)), "new")
    assert [row.space for row in made] == list(SPACES)
    for a, b, c in zip(real, made, noisy, strict=True):
        assert a.kd < b.kd < c.kd
        assert a.fd < b.fd < c.fd
        assert c.kd == pytest.approx(c.noise_kd, rel=0.01)  # the same images, against other held-out ones
        assert (b.n, b.reference, b.groups, b.space_sha256) == (n, n, n, spaces.sha256)
        assert a.kd - 2 * a.kd_se < 0 < c.kd - 2 * c.kd_se  # real images cannot be told apart, noise can
        assert a.fd_se is not None
        assert 0 < a.fd_se < a.fd
        assert min(a.precision, a.recall, a.density) > 0.7
        assert max(c.precision, c.recall, c.density) < 0.1


def test_quality_holds_each_share_in_its_place(spaces: FeatureSpaces, dataset: Dataset) -> None:
    """Draw only good bars: the four shares then differ, so that none can stand in another's field."""
    bars = drawn(np.array([x for x, c in zip(dataset.images, dataset.captions, strict=True) if c == "bar"]))
    for row in quality(spaces, dataset, bars, "new"):
        x, y = spaces(row.space, dataset.images[dataset.reference()]), spaces(row.space, bars.images)
        wanted = [precision(x, y), precision(y, x), density(x, y), coverage(x, y)]
        assert [row.precision, row.recall, row.density, row.coverage] == wanted
        assert row.precision > row.recall + 0.1
        assert row.density not in wanted[:2]


def test_comparison_agrees_with_quality(spaces: FeatureSpaces, dataset: Dataset) -> None:
    train = dataset.images[dataset.training()]
    ours, theirs = drawn(train[:20]), drawn(train[:20] // 2)  # the champion draws too dark
    rows = compare(spaces, dataset, ours, theirs, "new", "0" * 64)
    one, other = ({row.space: row for row in quality(spaces, dataset, of, "new")} for of in (ours, theirs))
    assert [(row.space, row.aspect) for row in rows] == [(space, aspect) for space in SPACES for aspect in ("images", "captions")]
    for row in rows:
        a, b = one[row.space], other[row.space]
        kd = (a.kd, b.kd) if row.aspect == "images" else (a.captions_kd, b.captions_kd)
        assert None not in kd
        assert row.delta == pytest.approx(kd[0] - kd[1])
        assert row.champion_kd == pytest.approx(kd[1])
        if row.aspect == "images":
            assert row.delta < -1.96 * row.se


def test_yardstick_of_noise_is_fixed() -> None:
    small, large = np.zeros((3, 1, 8, 8), np.uint8), np.zeros((5, 1, 8, 8), np.uint8)
    assert np.array_equal(pure_noise(small), pure_noise(small))
    assert np.array_equal(pure_noise(large)[:2], pure_noise(small)[:2])


@pytest.mark.parametrize(
    ("load", "dead"),
    [
        ([[0.2, 0.2, 0.2, 0.2]], 0),
        ([[0.25, 0.25, 0.25, 0.0]], 1),
        ([[0.7, 0.01, 0.01, 0.01], [0.1, 0.1, 0.1, 0.1]], 3),
        ([[0.0, 0.0]], 2),
    ],
)
def test_dead_experts_are_counted(load: list[list[float]], dead: int) -> None:
    made = usage(np.array([load, load], dtype=np.float32))
    assert made.dead == dead
    np.testing.assert_allclose(made.load, load, atol=1e-6)


def test_expert_that_wakes_late_is_not_dead() -> None:
    """Let an expert rest in half of the steps: the alarm looks at the whole drawing, the table shows when it rested."""
    made = usage(np.array([[[0.5, 0.0]], [[0.0, 0.5]]], dtype=np.float32))
    assert (made.dead, made.entropy) == (0, [1.0])
    assert made.by_step == [[[0.5, 0.0]], [[0.0, 0.5]]]


def test_entropy_says_how_evenly_experts_are_used() -> None:
    made = usage(np.array([[[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0] * 4]], dtype=np.float32))
    assert made.entropy == [1, 0, 0.5, 0]
    assert usage(np.zeros((3, 2, 0), np.float32)) == Usage(load=[[], []], by_step=[[[], []]] * 3, entropy=[1, 1], dead=0)  # dense


def test_scorecard_names_what_it_scored(
    checkpoint: Checkpoint, exported: Export, spaces: FeatureSpaces, dataset: Dataset, session: Session
) -> None:
    pictures = draw(session, held_out_captions(dataset, 4), SAMPLER)
    rows = quality(spaces, dataset, pictures, "new")
    memories = memorisation(spaces, dataset, pictures)
    captions = by_caption(spaces, dataset, pictures, held_out_captions(dataset, 4))
    cost = measure_cost(exported.folder, "bar", SAMPLER)
    card = scorecard(checkpoint.lineage, CONFIG, "a" * 64, SAMPLER, "bfloat16", pictures, rows, [], memories, captions, cost)
    assert card.lineage_sha256 == checkpoint.lineage.sha256
    assert (card.line, card.variant, card.configuration) == ("shapes", "full", "I")
    assert card.kd("random") == rows[1].kd
    assert card.cost.milliseconds > 0
    assert card.cost.evaluations == 8
    assert card.cost.peak_mib > card.cost.bare_mib > 10
    assert [(row.space, row.n) for row in card.memorisation] == [(space, 4) for space in SPACES]
    assert np.shape(card.usage.by_step) == (SAMPLER.steps, CONFIG.blocks, CONFIG.shape.experts)
    assert type(card).model_validate_json(card.model_dump_json()) == card
    with pytest.raises(KeyError):
        card.kd("random", "old")


def test_copying_generator_is_caught(spaces: FeatureSpaces, dataset: Dataset) -> None:
    """Detect training images with one grey level of noise as copies."""
    rng = np.random.default_rng(40)
    copies = dataset.images[dataset.training()[:40]]
    copies = np.clip(copies + rng.integers(-1, 2, copies.shape), 0, 255).astype(np.uint8)
    for row in memorisation(spaces, dataset, drawn(copies)):
        assert row.probability > 0.9
        assert row.nearer_than_any > 0.8
        assert row.p < 1e-4
        assert row.p == pytest.approx(stats.norm.sf(row.z))
        assert row.training == len(dataset.training())


def test_honest_generator_is_not_caught(spaces: FeatureSpaces, dataset: Dataset, tmp_path: Path) -> None:
    """Accept images of the same kind that the model never saw."""
    fresh = prepare(write_images(tmp_path / "fresh", seed=5), CONFIG, tmp_path / "cache")
    for row in memorisation(spaces, dataset, drawn(np.array(fresh.images))):
        assert 0.3 < row.probability < 0.7
        assert abs(row.z) < 2.5
        assert row.nearer_than_any < 0.2
        assert (row.n, row.reference) == (80, len(dataset.reference()))


def test_copying_follows_mann_whitney() -> None:
    rng = np.random.default_rng(41)
    generated, held_out = rng.exponential(size=40), rng.exponential(size=30) + 0.3
    probability, _, z = copying(generated, held_out)
    assert probability == pytest.approx(np.mean(generated[:, None] < held_out[None]))
    wanted = stats.mannwhitneyu(generated, held_out, alternative="less", method="asymptotic", use_continuity=False).pvalue
    assert stats.norm.sf(z) == pytest.approx(wanted, rel=0.2)
    assert copying(held_out, generated)[2] == pytest.approx(-z, rel=0.1)
    assert copying(np.ones(5), np.ones(7)) == (0.5, 0.0, 0.0)


def test_false_alarms_of_copying_are_as_rare_as_said() -> None:
    """Check the rate of false alarms, also if held-out images come in groups that share most of their distance.

    An error by images, not by groups, gets that case wrong.
    """
    rng = np.random.default_rng(42)
    groups, alarms, naive, grouped = np.repeat(np.arange(15), 6), 0, 0, 0
    for _ in range(600):
        generated, held_out = rng.normal(size=60), np.repeat(rng.normal(size=15), 6) * 0.9 + 0.43 * rng.normal(size=90)
        alarms += copying(generated, rng.normal(size=90))[2] > 1.645
        grouped += copying(generated, held_out, groups)[2] > 1.645
        naive += copying(generated, held_out)[2] > 1.645
    assert 12 <= alarms <= 50  # 30 expected
    assert 12 <= grouped <= 54
    assert naive > 70


def test_nearest_of_others_is_fair_to_few_images() -> None:
    """Check that images from the distribution of the held-out ones lie as far from them as these from each other."""
    rng = np.random.default_rng(43)
    for groups in (np.arange(5), np.repeat(np.arange(4), 2)):
        rows = [nearest_of_others(points(rng, len(groups)), points(rng, 30), groups) for _ in range(600)]
        near, far = np.mean(np.array(rows, dtype=float), axis=0)
        assert near == pytest.approx(far, rel=0.03)


def test_nearest_of_others_by_hand() -> None:
    """Skip crops of the same photograph: 0 and 1 are crops of one, 5 is another, so 1 is no neighbour of 0."""
    x, y = np.array([[0.0], [1.0], [5.0]]), np.array([[2.0]])
    near, far = nearest_of_others(x, y, np.array([4, 4, 9]))
    assert far == pytest.approx((5 + 4 + 4) / 3)
    assert near == pytest.approx((3 + 3 + 1) / 3)  # the photograph of 0 and 1 is left out twice, that of 5 once
    assert nearest_of_others(x, y, np.zeros(3, dtype=np.intp)) == (None, None)
    assert nearest_of_others(x, y[:0], np.arange(3))[0] is None


def test_caption_that_is_drawn_badly_stands_out(spaces: FeatureSpaces, dataset: Dataset) -> None:
    """Draw bars for everything: the row of the discs shows it, the row of the bars does not change."""
    captions = held_out_captions(dataset, 24)
    of = {c: [i for i in dataset.training() if dataset.captions[i] == c] for c in CAPTIONS}
    right = dataset.images[[of[c][i % len(of[c])] for i, c in enumerate(captions)]]
    bars = dataset.images[[of["bar"][i % len(of["bar"])] for i in range(24)]]
    good, bad = ({r.caption: r for r in by_caption(spaces, dataset, drawn(x), captions)} for x in (right, bars))
    assert {c: row.n for c, row in good.items()} == Counter(captions)
    assert {c: row.reference for c, row in good.items()} == Counter(dataset.captions[i] for i in dataset.reference())
    assert good["bar"] == bad["bar"]
    rows = good["disc"], bad["disc"]
    assert rows[0].ratio is not None
    assert rows[1].ratio is not None
    assert 0.7 < rows[0].ratio < 1.4
    assert rows[1].ratio > 2 * rows[0].ratio
    assert all(r.ratio == pytest.approx(r.generated / r.held_out) for r in rows if r.generated and r.held_out)


def test_only_frequent_captions_are_listed(spaces: FeatureSpaces, dataset: Dataset) -> None:
    """List the twelve most frequent captions, ties by name; a caption that was never drawn has no figure."""
    many = dataclasses.replace(dataset, captions=[f"c{i // 2:02d}" for i in range(len(dataset.captions))])
    rows = by_caption(spaces, many, drawn(np.array(dataset.images[:3])), ["nothing"] * 3)
    assert len({many.captions[i] for i in many.reference()}) > 12
    assert len(rows) == 12
    assert rows == sorted(rows, key=lambda row: (-row.reference, row.caption))
    assert {(row.n, row.generated, row.ratio) for row in rows} == {(0, None, None)}


def test_memory_grows_with_the_batch(exported: Export) -> None:
    """Measure in a process of its own, so that what this process holds (torch and all) does not count."""
    bare, small = measure_memory(exported.folder, 1)
    again, large = measure_memory(exported.folder, 256)
    assert bare == pytest.approx(again, rel=0.1)
    assert 15 < bare < small < large - 5
    assert small < 200 < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_memory_of_no_model_is_refused(exported: Export, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the memory of .* cannot be measured: .*export the checkpoint again"):
        measure_memory(tmp_path, 1)


class StandIn(nn.Module):
    """A stand-in for Inception: mean and deviation of each channel; or, by `kind`, what no such network returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, 299, 299):
            raise RuntimeError
        if self.kind == "map":
            return x
        if self.kind == "nan":
            return x.mean(dim=(2, 3)) / 0 * 0
        return torch.cat((x.mean(dim=(2, 3)), x.std(dim=(2, 3))), dim=1)


class WithOption(nn.Module):
    """A network like NVIDIA's file: it answers with classes unless it is asked for features."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.mean(dim=(2, 3)) if return_features else torch.zeros(x.shape[0], 1000)


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_published_fid_is_the_distance_of_raw_features(images: Path, dataset: Dataset, tmp_path: Path, channels: int) -> None:
    """Compare images of constant colour: their features are the level (0 to 255) in three channels, and no deviation."""
    rng = np.random.default_rng(50)
    ours, theirs = rng.integers(0, 256, (40, channels)), rng.integers(0, 100, (37, channels))
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for i, level in enumerate(ours.astype(np.uint8)):
        picture = np.broadcast_to(level, (24, 30, channels)).squeeze()
        Image.fromarray(picture).save(tmp_path / "folder" / ("below" if i % 2 else ".") / f"{i}.png")
    (tmp_path / "folder" / "metadata.jsonl").write_text("is no image")
    generated = np.broadcast_to(theirs.astype(np.uint8)[:, :, None, None], (37, channels, 16, 16))
    file = scripted(StandIn("plain"), tmp_path / "network.pt")
    made = published_fid(tmp_path / "folder", generated, file)
    x, y = (np.broadcast_to(levels, (len(levels), 3)).astype(float) for levels in (ours, theirs))
    assert made.fid == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert (made.n, made.reference, made.dimensions) == (37, 40, 6)
    assert made.features_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_published_fid_tells_real_from_noise(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    file = scripted(StandIn("plain"), tmp_path / "network.pt")
    real, noisy = (published_fid(images, made, file).fid for made in (dataset.images, pure_noise(dataset.images)))
    assert real == pytest.approx(0, abs=1e-3)  # the folder's own images, decoded alike
    assert noisy > 100


def test_network_with_option_is_asked_for_features(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    assert published_fid(images, dataset.images[:9], scripted(WithOption(), tmp_path / "n.pt")).dimensions == 3


def test_images_are_enlarged_smoothly(tmp_path: Path) -> None:
    """Enlarge a chessboard: it keeps its mean but not its contrast.

    Between two fields all greys occur, which repeated pixels would lack.
    """
    board = (255 * (np.indices((16, 16)).sum(axis=0) % 2)).astype(np.uint8)[None, None]
    features, _ = published_features(scripted(StandIn("plain"), tmp_path / "network.pt"))
    made = features(board)[0]
    assert made[:3] == pytest.approx(127.5, abs=1)
    assert made[3:].max() < 110


def test_missing_inception_is_refused(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*absent\.pt; name a TorchScript file of Inception weights"):
        published_fid(images, dataset.images, tmp_path / "absent.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half a zip"])
def test_foreign_inception_is_refused(images: Path, dataset: Dataset, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "network.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"network\.pt is not a TorchScript file"):
        published_fid(images, dataset.images, tmp_path / "network.pt")


def test_pickled_weights_are_no_inception(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    torch.save(StandIn("plain").state_dict(), tmp_path / "network.pt")
    with pytest.raises(CheckpointError, match="is not a TorchScript file"):
        published_fid(images, dataset.images, tmp_path / "network.pt")


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (StandIn("map"), r"does not give finite features \[B, d\] for B images"),
        (StandIn("nan"), "does not give finite features"),
        (nn.Linear(5, 2), r"does not take images \[B, 3, 299, 299\]"),
    ],
)
def test_network_without_features_is_refused(
    images: Path, dataset: Dataset, tmp_path: Path, network: nn.Module, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        published_fid(images, dataset.images, scripted(network, tmp_path / "network.pt"))


def test_published_fid_of_bad_folder_is_refused(images: Path, dataset: Dataset, tmp_path: Path) -> None:
    file = scripted(StandIn("plain"), tmp_path / "network.pt")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        published_fid(tmp_path / "nowhere", dataset.images, file)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"needs two images on each side, but .*folder has 0 and 80 were generated"):
        published_fid(tmp_path / "folder", dataset.images, file)
    with pytest.raises(DataError, match=r"has 80 and 1 were generated"):
        published_fid(images, dataset.images[:1], file)
    for name in ("a.png", "b.png"):
        (tmp_path / "folder" / name).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a\.png cannot be decoded; remove it from the folder"):
        published_fid(tmp_path / "folder", dataset.images, file)


def test_same_seed_fits_same_features(dataset: Dataset, spaces: FeatureSpaces, tmp_path: Path) -> None:
    torch.rand(5)
    assert fit(dataset, tmp_path / "again").sha256 == spaces.sha256
    assert hashlib.sha256((tmp_path / "again").read_bytes()).hexdigest() == spaces.sha256


def test_existing_features_are_kept(whole_features: Path, spaces: FeatureSpaces, tmp_path: Path) -> None:
    """Keep the space in which the first data revision was measured, whatever a second one contains."""
    path = tmp_path / "line.safetensors"
    path.write_bytes(whole_features.read_bytes())
    other = prepare(write_images(tmp_path / "dim", dim=True), CONFIG, tmp_path / "cache")
    assert fit(other, path, seed=2).sha256 == spaces.sha256
    assert path.read_bytes() == whole_features.read_bytes()


def test_other_data_make_other_features(images: Path, spaces: FeatureSpaces, tmp_path: Path) -> None:
    """Fit other data, also with three channels and at the smallest size."""
    config = ModelConfig.model_validate({**CONFIG.model_dump(), "image_size": 8, "channels": 3})
    data = prepare(images, config, tmp_path / "cache")
    made = fit(data, tmp_path / "features" / "line.safetensors")
    some = data.images[data.reference()]
    assert made("trained", some).shape == made("random", some).shape == (len(some), DIMENSIONS)
    assert made.sha256 != spaces.sha256


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_damaged_features_are_refused(dataset: Dataset, whole_features: Path, tmp_path: Path, keep: float) -> None:
    path = tmp_path / "line.safetensors"
    data = whole_features.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    for use in (lambda: fit(dataset, path), lambda: load_features(path)):
        with pytest.raises(CheckpointError, match="cannot be read; restore it from a backup, because past figures depend on it"):
            use()
    assert path.stat().st_size == int(keep * len(data))  # and it is never made anew automatically


def test_missing_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_features(tmp_path / "nothing")


@pytest.mark.parametrize("space", SPACES)
def test_features_are_standardised(spaces: FeatureSpaces, dataset: Dataset, space: str) -> None:
    features = spaces(space, dataset.images[dataset.training()])
    assert features.shape == (len(dataset.training()), DIMENSIONS)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    spread = features.std(axis=0, ddof=1)
    if space == "scattering":  # its main axes: the largest first, and all that varies is in them
        assert (np.diff(spread) < 1e-9).all()
        assert (spread**2).sum() == pytest.approx(int((spaces.tensors["scattering.deviation"] > 1e-6).sum()), rel=0.05)
    else:
        assert ((np.abs(spread - 1) < 1e-3) | (spread < 1e-3)).all()  # one, or a feature that is constant
    assert 0.3 * np.sqrt(2 * DIMENSIONS) < spaces.scale(space) < 2 * np.sqrt(2 * DIMENSIONS)


def test_spaces_separate_captions(spaces: FeatureSpaces, dataset: Dataset) -> None:
    """Check that bars and discs lie apart in both spaces: held-out images of two captions are further apart than of one."""
    held_out = dataset.reference()
    of = {c: dataset.images[[i for i in held_out if dataset.captions[i] == c]] for c in CAPTIONS}
    for space in SPACES:
        bars, discs = (spaces(space, of[c]) for c in CAPTIONS)
        half = len(bars) // 2
        apart, alike = (
            distance(*(Sample(of, [""] * len(of), np.arange(len(of))) for of in pair), spaces.scale(space), "images").value
            for pair in ((bars, discs), (bars[:half], bars[half:]))
        )
        assert apart > alike


# Devices that are already in the field draw from these numbers: they must never change.
KNOWN = [
    (0, [-2.7457597, -1.6854463, -0.3615508, -1.1762252, -0.0252018]),
    (7, [-0.4334718, 1.3549219, -0.4333872, 0.2930280, 0.7767051]),
    (1_000_000, [-0.0825895, 0.2346850, 0.3709277, 0.4959754, 0.1480011]),
]


@pytest.mark.parametrize(("seed", "values"), KNOWN)
def test_noise_never_changes(seed: int, values: list[float]) -> None:
    np.testing.assert_allclose(noise(seed, (5,)), values, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 15, 15), (1,), (3, 32, 32)])
@pytest.mark.parametrize("seed", [0, 1, EVALUATION_SEED, 2**63 - 1])
def test_noise_is_same_on_devices(shape: tuple[int, ...], seed: int) -> None:
    assert noise(seed, shape).tobytes() == agent.noise(seed, shape).tobytes()


def test_noise_is_standard_normal() -> None:
    values = noise(3, (100_000,)).astype(np.float64)
    assert values.dtype == np.float64
    assert abs(values.mean()) < 0.015
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.15
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.006
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(values[:50_000], values[50_000:])[0, 1]) < 0.02  # the two halves of Box and Muller


def test_seeds_give_unrelated_noise() -> None:
    many = np.stack([noise(seed, (256,)) for seed in range(200)])
    between = np.corrcoef(many)[~np.eye(200, dtype=bool)]
    assert np.abs(between).max() < 0.35
    assert abs(between.mean()) < 0.005


def test_error_of_copying_is_spread_of_new_draws() -> None:
    """Check the error far from 1/2, where the test's own variance does not hold, and with held-out images in groups."""
    rng = np.random.default_rng(44)
    groups, made = np.repeat(np.arange(15), 6), []
    for _ in range(400):
        held_out = np.repeat(rng.normal(size=15), 6) * 0.9 + 0.43 * rng.normal(size=90) + 1.2
        made.append(copying(rng.normal(size=60), held_out, groups))
    spread = np.std([probability for probability, _, _ in made])
    assert np.mean([probability for probability, _, _ in made]) > 0.75
    assert np.mean([se for _, se, _ in made]) == pytest.approx(spread, rel=0.15)
