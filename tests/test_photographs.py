"""The demo's data: real photographs cut into patches, the same for everyone, without leaks between training and evaluation."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.config import ModelConfig
from model.data import METADATA, is_held_out, prepare, scan
from model.photographs import DEFECTS, SECOND_SURFACES, STORED_SIDE, SURFACES, _draw, _patch, _photograph, digits, surfaces

TEXT_LENGTH = 20  # of the demo
EVERY_SURFACE = {**SURFACES, **SECOND_SURFACES}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create both deliveries of surfaces; do not write into the folder."""
    folder = tmp_path_factory.mktemp("surfaces") / "data"
    surfaces(folder, 1, patches=40)
    surfaces(folder, 2, patches=40)
    return folder


def test_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        surfaces(tmp_path / name, 1, patches=5, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert first.keys() == other.keys()
    assert sum(first[name] == other[name] for name in first) <= 1


def test_second_delivery_adds_to_first(tmp_path: Path) -> None:
    made = surfaces(tmp_path, 1, patches=5)
    first = contents(tmp_path)
    added = surfaces(tmp_path, 2, patches=5)
    assert (made, added) == (20, 25)
    both = contents(tmp_path)
    assert both[METADATA].startswith(first.pop(METADATA))
    assert {name: both[name] for name in first} == first
    assert len(both) == 20 + 25 + 1


@pytest.mark.parametrize("repeated", [1, 2])
def test_repeated_delivery_leaves_no_duplicates(tmp_path: Path, repeated: int) -> None:
    surfaces(tmp_path, 1, patches=4)
    surfaces(tmp_path, 2, patches=4)
    before = contents(tmp_path)
    surfaces(tmp_path, repeated, patches=4)
    names = [row["file_name"] for row in rows(tmp_path)]
    assert len(names) == len(set(names)) == 4 * (4 + 5)
    after = contents(tmp_path)
    assert sorted(before.pop(METADATA).splitlines()) == sorted(after.pop(METADATA).splitlines())
    assert before == after


def test_killed_delivery_is_completed(tmp_path: Path) -> None:
    """Complete a delivery that was killed after the images and before the lines."""
    surfaces(tmp_path / "whole", 1, patches=4)
    surfaces(tmp_path / "killed", 1, patches=4)
    (tmp_path / "killed" / METADATA).unlink()
    (tmp_path / "killed" / "brick" / "1-0003.png").write_bytes(b"half")
    surfaces(tmp_path / "killed", 1, patches=4)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_metadata_is_replaced_whole(tmp_path: Path) -> None:
    """Replace the list as a whole, so that a kill leaves either the first delivery's list or the second's."""
    surfaces(tmp_path / "data", 1, patches=2)
    before = (tmp_path / "data" / METADATA).read_bytes()
    (tmp_path / "old").hardlink_to(tmp_path / "data" / METADATA)
    surfaces(tmp_path / "data", 2, patches=2)
    assert (tmp_path / "old").read_bytes() == before
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_every_patch_is_usable(both: Path) -> None:
    seen = scan(both, TEXT_LENGTH)
    usable, held_out, bad = len(seen.names), int(seen.held_out.sum()), seen.quarantine
    assert (usable, bad) == (40 * (4 + 5), {})
    assert 0 < held_out < usable / 4
    for row in rows(both):
        with Image.open(both / row["file_name"]) as image:
            assert (image.size, image.mode) == ((STORED_SIDE, STORED_SIDE), "L")


def test_longest_caption_just_fits() -> None:
    captions = [f"dim {surface}, {defect}" for surface in SURFACES for defect in DEFECTS]
    captions += [f"{surface}, {defect}" for surface in SECOND_SURFACES for defect in DEFECTS]
    assert max(len(caption.encode()) for caption in captions) <= TEXT_LENGTH


def test_captions_say_what_was_delivered(both: Path) -> None:
    captions = defaultdict(set)
    for row in rows(both):
        captions[row["file_name"].split("/")[1][0]].add(row["text"])
    assert all(not caption.startswith(("dim", "page")) for caption in captions["1"])
    assert all(caption.startswith(("dim", "page")) for caption in captions["2"])
    for surface in SURFACES:
        assert {surface, f"{surface}, hole"} <= captions["1"]
        assert f"dim {surface}" in captions["2"]


def test_third_of_patches_is_defective(both: Path) -> None:
    defects = Counter(row["text"].partition(", ")[2] for row in rows(both))
    assert set(defects) == {"", *DEFECTS}
    share = 1 - defects[""] / sum(defects.values())
    assert 0.23 < share < 0.43
    assert min(defects[defect] for defect in DEFECTS) > 0.2 * sum(defects[defect] for defect in DEFECTS)


def test_second_delivery_is_darker(both: Path) -> None:
    means = defaultdict(list)
    for row in rows(both):
        with Image.open(both / row["file_name"]) as image:
            means[row["text"].partition(", ")[0]].append(np.asarray(image).mean())
    for surface in SURFACES:
        assert np.mean(means[f"dim {surface}"]) < 0.8 * np.mean(means[surface])


@pytest.mark.parametrize("surface", list(EVERY_SURFACE))
def test_patches_of_two_tiles_share_no_pixel(surface: str) -> None:
    """Cut a photograph whose every pixel tells its tile: no pixel is in two groups, and each patch is from one tile."""
    side, tile = EVERY_SURFACE[surface]
    height, width = _photograph(surface).shape
    tile_of_pixel = (np.arange(height)[:, None] // tile * (width // tile + 1) + np.arange(width)[None, :] // tile).astype(
        np.float32
    )
    rng = np.random.default_rng(0)
    groups: dict[str, set[float]] = defaultdict(set)
    for _ in range(300):
        patch, group = _patch(tile_of_pixel, side, tile, rng)
        assert patch.min() == patch.max()  # no pixel of a neighbouring tile
        groups[group].add(float(patch[0, 0]))
    assert all(len(places) == 1 for places in groups.values())
    assert len({next(iter(places)) for places in groups.values()}) == len(groups)
    assert len(groups) > 0.9 * (height // tile) * (width // tile)  # and hardly a tile is left out


def test_groups_never_straddle_the_split(both: Path, tmp_path: Path) -> None:
    """Hold out a tile that is cut in both deliveries in both of them, or in none."""
    deliveries = defaultdict(set)
    for row in rows(both):
        deliveries[row["group"]].add(row["file_name"].split("/")[1][0])
    assert any(len(which) == 2 for which in deliveries.values())
    dataset = prepare(both, ModelConfig(tier="test", text_length=TEXT_LENGTH), tmp_path / "cache")
    held_out = [row for row in sorted(rows(both), key=lambda row: row["file_name"]) if is_held_out(row["group"])]
    assert [dataset.captions[i] for i in dataset.reference()] == [row["text"] for row in held_out]
    learned = {row["group"] for row in rows(both)} - {row["group"] for row in held_out}
    assert len(held_out) > 20
    assert len(learned) > 20


@pytest.mark.parametrize("surface", list(EVERY_SURFACE))
def test_every_tile_name_belongs_to_its_surface(both: Path, surface: str) -> None:
    own = [row for row in rows(both) if row["file_name"].startswith(f"{surface}/")]
    assert own
    assert all(row["group"].startswith(f"{surface}/") for row in own)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("surface", list(EVERY_SURFACE))
def test_defect_changes_patch_visibly(surface: str, defect: str) -> None:
    """Look at the model's 16 pixels: some pixels change a lot, and most of the patch stays what it was."""
    side, tile = EVERY_SURFACE[surface]
    visible = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        patch, _ = _patch(_photograph(surface), side, tile, rng)
        before = patch.copy()
        drawn = _draw(patch, defect, rng)
        assert np.array_equal(patch, before)  # the clean patch is left alone
        assert drawn.shape == patch.shape
        assert drawn.min() >= 0
        assert drawn.max() <= 1
        change = np.abs(drawn - patch).reshape(16, 2, 16, 2).mean(axis=(1, 3))
        visible += change.max() > 0.1
        assert (change > 0.05).mean() < 0.5
    assert visible >= 17  # a hole in a dark coin's shadow hardly shows


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the first delivery of digits; do not write into the folder."""
    folder = tmp_path_factory.mktemp("digits") / "data"
    digits(folder, 1)
    return folder


def test_digits_come_in_two_halves(scans: Path, tmp_path: Path) -> None:
    second = digits(tmp_path, 2)
    first = rows(scans)
    assert {len(first), second} == {898, 899}  # of 1797
    assert not {row["file_name"] for row in first} & {row["file_name"] for row in rows(tmp_path)}
    seen = scan(scans, TEXT_LENGTH)
    usable, held_out, bad = len(seen.names), int(seen.held_out.sum()), seen.quarantine
    assert (usable, bad) == (len(first), {})
    assert 0 < held_out < usable / 4
    counts = Counter(row["text"] for row in first)
    assert len(counts) == 10
    assert min(counts.values()) > 60


def test_digit_pictures_show_their_name(scans: Path, tmp_path: Path) -> None:
    """Find the nearest mean picture of each scan: it is that of the scan's name far more often than by chance."""
    data = prepare(scans, ModelConfig(tier="test", image_size=8, text_length=8), tmp_path / "cache")
    flat = np.array(data.images, dtype=np.float64).reshape(len(data.images), -1)
    captions = np.array(data.captions)
    names = np.unique(captions)
    means = np.stack([flat[captions == name].mean(axis=0) for name in names])
    nearest = np.argmin(((flat[:, None] - means[None]) ** 2).sum(axis=2), axis=1)
    assert (names[nearest] == captions).mean() > 0.8
