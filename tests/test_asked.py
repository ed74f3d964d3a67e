"""What a model draws for its captions, and odd images: the figures of the evaluation, and what the gate decides from them.

The data are made up (tests/bench/world.py), so there is a perfect model, and there are models with one fault each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import evaluate, features
from model.data import Dataset
from model.evaluate import Drawn, Images
from model.features import FeatureSpaces
from model.scorecard import FOLLOW, CaptionCheck, Scorecard
from registry.selection import Budgets, Decision, Limits, decide
from tests.bench import world
from tests.test_selection import CHAMPION, card

N = 128
LIMITS = Limits(minimum_images=50)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Provide a data set in which nine of 36 photographs of each surface are held out."""
    images, captions, groups = world.collect(np.random.default_rng(1), 36, 8)
    order = [name for surface in world.SURFACES for name in dict.fromkeys(g for g in groups if g.startswith(surface))]
    kept = {name for i, name in enumerate(order) if i % 36 < 9}
    return world.dataset(images, captions, groups, [group in kept for group in groups])


@pytest.fixture(scope="module")
def spaces(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> FeatureSpaces:
    return features.fit(dataset, tmp_path_factory.mktemp("features") / "plates.safetensors")


def captions_of(dataset: Dataset) -> list[str]:
    """Return the captions that an evaluation asks its models to draw."""
    return [dataset.captions[i] for i in (*evaluate.held_out_items(dataset, N), *evaluate.further_items(dataset, N))]


def perfect(captions: list[str], seed: int = 1) -> Images:
    return world.drawn(np.random.default_rng([7, seed]), captions)


def without(*names: str) -> Callable[[list[str]], Images]:
    """Return a perfect model that never draws some defects."""
    return lambda captions: perfect([_less(caption, names) for caption in captions])


def _less(caption: str, names: tuple[str, ...]) -> str:
    surface, _, defect = caption.partition(", ")
    return surface if {defect, caption} & set(names) else caption


def permuted(captions: list[str]) -> Images:
    return perfect(captions)[np.random.default_rng(3).permutation(len(captions))]


def judged(dataset: Dataset, spaces: FeatureSpaces, images: Images, champion: Images | None = None) -> tuple[Scorecard, Decision]:
    """Return the scorecard of a challenger, and the decision of the gate when all other limits are met."""

    def made(of: Images) -> Drawn:
        return Drawn(of, np.zeros((1, 1, 1), np.float32), 0.0)

    whole, before = made(images), made(champion) if champion is not None else None
    fields: dict[str, Any] = {
        "following": evaluate.following(spaces, dataset, whole.first(N), "new"), "asked": evaluate.asked_for(spaces, dataset, whole, before, N),
        "plausibility": evaluate.plausibility(spaces, dataset, whole, before, N), "held_out": evaluate.group_hashes(dataset),
        "memorisation": evaluate.memorisation(spaces, dataset, whole.first(N)),
    }  # fmt: skip
    scored = card().model_copy(update=fields)
    return scored, decide(scored, LIMITS, Budgets(latency_ms=1000), CHAMPION if before else None)


def rows(scored: Scorecard) -> dict[str, CaptionCheck]:
    return {row.caption: row for row in scored.asked}


def test_perfect_model_is_promoted(dataset: Dataset, spaces: FeatureSpaces):
    captions = captions_of(dataset)
    scored, decision = judged(dataset, spaces, perfect(captions), perfect(captions, 2))
    assert decision.outcome == "promote", decision.reason
    assert [row.share for row in scored.following] == pytest.approx([1, 1, 1], abs=0.25)
    assert scored.plausibility is not None
    assert scored.plausibility.implausible < 0.2 * N
    found = rows(scored)
    assert {"hole", "scratch", "stain", "brick", "mesh", "grain", "brick, hole"} <= set(found)
    assert (found["hole"].word, found["brick, hole"].word) == (True, False)
    assert np.mean([row.share for row in scored.asked if row.share is not None]) == pytest.approx(1, abs=0.2)
    assert judged(dataset, spaces, perfect(captions))[1].outcome == "promote"


@pytest.mark.parametrize(
    "draw", [permuted, lambda captions: perfect(["brick"] * len(captions))], ids=["permuted", "one caption for all"]
)
def test_model_that_ignores_its_captions_is_refused(dataset: Dataset, spaces: FeatureSpaces, draw: Callable[[list[str]], Images]):
    captions = captions_of(dataset)
    scored, decision = judged(dataset, spaces, draw(captions), perfect(captions, 2))
    assert decision.outcome == "refuse"
    assert "images match their captions on the new data" in decision.reason
    assert max(row.share for row in scored.following) < FOLLOW


def test_defect_that_is_never_drawn_is_named(dataset: Dataset, spaces: FeatureSpaces):
    captions = captions_of(dataset)
    scored, decision = judged(dataset, spaces, without("hole")(captions), perfect(captions, 2))
    assert decision.outcome == "refuse"
    assert "word 'hole': " in decision.reason
    assert "word 'scratch'" not in decision.reason
    found = rows(scored)
    assert found["hole"].share == pytest.approx(0, abs=0.2)
    assert found["hole"].champion_share == pytest.approx(1, abs=0.2)


def test_caption_that_is_never_drawn_is_named_where_it_can_be_judged(dataset: Dataset, spaces: FeatureSpaces):
    captions = captions_of(dataset)
    counts = {row.caption: row for row in rows(judged(dataset, spaces, perfect(captions))[0]).values() if "," in row.caption}
    most = max(counts.values(), key=lambda row: (row.reference >= 10 and row.groups >= 4, row.reference))
    assert (most.reference >= 10, most.groups >= 4) == (True, True)
    decision = judged(dataset, spaces, without(most.caption)(captions), perfect(captions, 2))[1]
    assert decision.outcome == "refuse"
    assert f"caption '{most.caption}'" in decision.reason
    least = min(counts.values(), key=lambda row: row.reference)
    assert least.reference < 10
    decision = judged(dataset, spaces, without(least.caption)(captions), perfect(captions, 2))[1]
    assert decision.outcome == "promote if reasoned"
    assert f"caption '{least.caption}': the model seems" in decision.reason
    assert "this cannot be judged" in decision.reason


def test_rare_captions_are_drawn_more_often(dataset: Dataset):
    items = evaluate.further_items(dataset, N)
    assert set(items.tolist()) <= set(dataset.reference().tolist())
    asked = captions_of(dataset)
    own = {dataset.captions[i] for i in dataset.reference()}
    assert len(items) == N // 2
    before = [dataset.captions[i] for i in evaluate.held_out_items(dataset, N)]
    assert min(map(asked.count, own)) > 2 * min(map(before.count, own))
    assert max(map(asked.count, own)) == max(map(before.count, own))
    plenty = evaluate.further_items(dataset, 20 * N)
    assert len(plenty) == 0  # each caption already has enough


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_noise_among_the_images_is_counted(dataset: Dataset, spaces: FeatureSpaces, share: float):
    images = perfect(captions_of(dataset))
    some = int(share * N)
    images[:some] = np.random.default_rng(4).integers(0, 256, images[:some].shape)
    scored, decision = judged(dataset, spaces, images)
    assert scored.plausibility is not None
    assert scored.plausibility.implausible > 0.7 * some
    assert "of the images are unlike all real ones" in decision.reason
    assert decision.outcome == "promote if reasoned"


def test_some_noise_is_seen_beside_the_champion(dataset: Dataset, spaces: FeatureSpaces):
    champion = perfect(captions_of(dataset), 2)
    images = champion.copy()
    some = np.random.default_rng(4).random(len(images)) < 0.2
    images[some] = np.random.default_rng(5).integers(0, 256, images[some].shape)
    scored, decision = judged(dataset, spaces, images, champion)
    odd = scored.plausibility
    assert odd is not None
    assert odd.pairs == len(images) > N
    assert odd.n == N
    assert odd.champion is not None
    assert odd.more is not None
    assert 0.6 * some.mean() < odd.more < some.mean()
    assert odd.more_se == pytest.approx((odd.more * (1 - odd.more) / len(images)) ** 0.5, rel=0.05)
    assert decision.outcome == "refuse"
    assert "exceeds the champion's" in decision.reason
    assert "unlike all real ones exceeds" not in judged(dataset, spaces, perfect(captions_of(dataset), 3), champion)[1].reason


def test_images_that_repeat_are_counted(dataset: Dataset, spaces: FeatureSpaces):
    captions = captions_of(dataset)
    one = dict(zip(world.CAPTIONS, perfect(list(world.CAPTIONS)), strict=True))
    scored, decision = judged(dataset, spaces, np.stack([one[caption] for caption in captions]), perfect(captions, 2))
    assert scored.plausibility is not None
    assert scored.plausibility.duplicates > 0.95 * N
    assert decision.outcome == "refuse"
    assert "are like another generated one" in decision.reason


def test_training_images_among_the_generated_are_counted(dataset: Dataset, spaces: FeatureSpaces):
    captions = captions_of(dataset)
    images, training = perfect(captions), dataset.training()
    own = [dataset.images[next(i for i in training if dataset.captions[i] == caption)] for caption in captions]
    images[::4] = np.stack(own)[::4]
    decision = judged(dataset, spaces, images, perfect(captions, 2))[1]
    assert decision.outcome == "refuse"
    assert "are nearer to training images than any held-out one" in decision.reason


# Captions of other kinds: none, all unique, permuted


def relabelled(dataset: Dataset, captions: list[str]) -> Dataset:
    return Dataset(dataset.images, captions, dataset.ids, dataset.held_out, dataset.groups, {})


@pytest.mark.parametrize("text", ["", "plate"], ids=["no captions", "one caption"])
def test_line_without_captions_is_judged_by_its_images(dataset: Dataset, spaces: FeatureSpaces, text: str):
    plain = relabelled(dataset, [text] * len(dataset.captions))
    images = perfect(captions_of(dataset))[:N]
    assert len(evaluate.further_items(plain, N)) == 0
    scored, decision = judged(plain, spaces, images, perfect(captions_of(dataset), 2)[:N])
    assert (scored.following, scored.asked, decision.outcome) == ([], [], "promote")
    made = Drawn(images, np.zeros((1, 1, 1), np.float32), 0.0)
    for row in evaluate.compare(spaces, plain, made, Drawn(images[::-1].copy(), made.load, 0.0), "new", CHAMPION):
        assert np.isfinite([row.delta, row.se]).all()
    for row in evaluate.quality(spaces, plain, made, "new"):
        assert row.captions_kd == pytest.approx(row.kd)


def test_captions_that_are_all_unique_can_be_judged_by_their_words(dataset: Dataset, spaces: FeatureSpaces):
    unique = relabelled(dataset, [f"{caption} number {i}" for i, caption in enumerate(dataset.captions)])
    captions = [unique.captions[i] for i in (*evaluate.held_out_items(unique, N), *evaluate.further_items(unique, N))]
    asked = [caption.partition(" number")[0] for caption in captions]
    scored, decision = judged(unique, spaces, perfect(asked), perfect(asked, 2))
    assert decision.outcome == "promote", decision.reason
    assert {"hole", "scratch", "stain"} <= {row.caption for row in scored.asked if row.word}
    dropped = judged(unique, spaces, without("hole")(asked), perfect(asked, 2))[1]
    assert dropped.outcome == "refuse"
    assert "word 'hole'" in dropped.reason


def test_captions_that_training_never_had_are_asked_for_too(dataset: Dataset, spaces: FeatureSpaces):
    new = relabelled(
        dataset, [c.replace("hole", "pit") if held else c for c, held in zip(dataset.captions, dataset.held_out, strict=True)]
    )
    asked = [new.captions[i].replace("pit", "hole") for i in (*evaluate.held_out_items(new, N), *evaluate.further_items(new, N))]
    scored, _ = judged(new, spaces, perfect(asked), perfect(asked, 2))
    assert rows(scored)["pit"].share == pytest.approx(1, abs=0.25)


def test_one_group_decides_nothing(dataset: Dataset, spaces: FeatureSpaces):
    alone = Dataset(dataset.images, dataset.captions, dataset.ids, dataset.held_out, ["one"] * len(dataset.groups), {})
    captions = captions_of(alone)
    images, before = perfect(captions), perfect(captions, 2)
    made = [Drawn(of, np.zeros((1, 1, 1), np.float32), 0.0) for of in (images, before)]
    compared = evaluate.compare(spaces, alone, made[0].first(N), made[1].first(N), "new", CHAMPION)
    assert {row.groups for row in compared} == {1}
    both = [row.model_copy(update={"split": split}) for row in compared for split in ("new", "old")]
    scored, _ = judged(alone, spaces, images, before)
    assert (scored.plausibility, scored.asked) == (None, [])
    decision = decide(scored.model_copy(update={"comparisons": both}), LIMITS, Budgets(latency_ms=1000), CHAMPION)
    assert decision.outcome in ("more data", "refuse")


def test_spaces_of_an_older_ferry_still_judge(dataset: Dataset, spaces: FeatureSpaces, tmp_path: Path):
    older = {name: tensor for name, tensor in spaces.tensors.items() if not name.startswith("scattering")}
    path = tmp_path / "older.safetensors"
    features.write_safely(path, older)
    before = features.fit(dataset, path)
    assert before.names == ("trained", "random")
    captions = captions_of(dataset)
    made = Drawn(perfect(captions), np.zeros((1, 1, 1), np.float32), 0.0)
    assert [row.space for row in evaluate.quality(before, dataset, made.first(N), "new")] == ["trained", "random"]
    assert judged(dataset, before, permuted(captions), perfect(captions, 2))[1].outcome == "refuse"


# Uneven mixtures of captions


def holding(counts: dict[str, int], in_a_group: int = 3) -> Dataset:
    """Return the training images of a world, and this many held-out images of each caption."""
    rng = np.random.default_rng(7)
    images, captions, groups = world.collect(rng, 20, 6)
    training, shot, made = len(captions), world.shoot(rng), list[Images]()
    for caption, n in counts.items():
        surface, _, defect = caption.partition(", ")
        for i in range(n):
            shot = world.shoot(rng) if i % in_a_group == 0 else shot
            plane = world.patch(surface, shot, rng)
            made.append(world.pixels(world.blemish(plane, defect, rng) if defect else plane))
            captions.append(caption)
            groups.append(f"{caption}/{i // in_a_group}")
    return world.dataset(np.concatenate((images, np.stack(made))), captions, groups, np.arange(len(captions)) >= training)


def shares(dataset: Dataset, spaces: FeatureSpaces, n: int, champion: bool = False) -> dict[str, CaptionCheck]:
    """Return how a perfect model does on each caption and word."""
    items = (*evaluate.held_out_items(dataset, n), *evaluate.further_items(dataset, n))
    drawn = [Drawn(perfect([dataset.captions[i] for i in items], seed), np.zeros((1, 1, 1), np.float32), 0.0) for seed in (1, 2)]
    return {row.caption: row for row in evaluate.asked_for(spaces, dataset, drawn[0], drawn[1] if champion else None, n)}


def test_word_that_is_frequent_on_one_surface_only_is_judged_by_the_real_mixture(spaces: FeatureSpaces):
    even = dict.fromkeys(world.SURFACES, 60)
    found = shares(holding(even | {"brick, stain": 60, "mesh, stain": 6, "grain, stain": 6}), spaces, 150)
    assert found["stain"].share == pytest.approx(1, abs=0.15)  # 0.69 if rare captions count as often as they are drawn


def test_word_of_which_nothing_was_drawn_is_not_judged(spaces: FeatureSpaces):
    dataset = holding({"brick": 200, "mesh": 200, "brick, hole": 1, "mesh, hole": 1}, 1)
    items = (*evaluate.held_out_items(dataset, 8), *evaluate.further_items(dataset, 8))
    assert not any("hole" in dataset.captions[i] for i in items[:8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "JUDGED_DRAWS", 0)  # as for captions beyond the 64 most frequent ones
        found = shares(dataset, spaces, 8, champion=True)
    assert "hole" not in found
    assert {"brick", "mesh"} <= set(found)


def test_word_whose_others_are_all_of_one_group_is_not_judged(spaces: FeatureSpaces):
    found = shares(holding({"brick, stain": 18, "brick": 3, "mesh": 30}), spaces, 64)
    assert "stain" not in found
    assert all(np.isfinite([row.apart, row.apart_se, row.drawn, row.drawn_se]).all() for row in found.values())
    assert "mesh" in found
