"""What is done for many images is not done again, not all at once, and finds the same as the plain way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model import data, data_report, revisions
from tests import test_data_folder
from tests.conftest import write_images
from tests.test_data_folder import ferry, recorded

made, root = test_data_folder.made, test_data_folder.root  # fixtures: a workspace with one revision, and one more image


def plainly(thumbs: np.ndarray, held_out: np.ndarray) -> tuple[dict[int, int], dict[int, int]]:
    """Compare each image with all others."""
    alike = thumbs @ thumbs.T
    np.fill_diagonal(alike, -1)
    near = {i: int(row.argmax()) for i, row in enumerate(alike) if row.max() >= data_report.ALIKE}
    alike[:, held_out] = -1
    return near, {i: int(alike[i].argmax()) for i in np.flatnonzero(held_out) if alike[i].max() >= data_report.ALIKE}


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.3, 3.0])
@pytest.mark.parametrize("rows", [7, 512])
def test_near_copies_are_those_of_the_plain_way(monkeypatch: pytest.MonkeyPatch, spread: float, rows: int) -> None:
    """Find the same pairs among images that are all alike, all different, or in clusters; some have no structure."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((9, 64))
    thumbs = (
        centres[rng.integers(9, size=300)] * 0.3 + spread * rng.standard_normal((300, 64)) + 1e-3 * rng.standard_normal((300, 64))
    )
    thumbs[::50] = 0
    thumbs = (thumbs / np.maximum(np.linalg.norm(thumbs, axis=1, keepdims=True), 1e-9)).astype(np.float32)
    held_out = rng.random(300) < 0.2
    found, expected = data_report._near(thumbs, held_out, rows), plainly(thumbs, held_out)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for i, j in mine.items():  # of several that are equally alike, either may be named
            assert thumbs[i] @ thumbs[j] == pytest.approx(thumbs[i] @ thumbs[theirs[i]], abs=1e-6)
    assert bool(found[0]) == (spread < 0.3)


def test_no_images_have_no_near_copies() -> None:
    assert data_report._near(np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.bool_)) == ({}, {})


def test_folder_is_summarised_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold few decoded images at a time, and summarise them as if they had come all at once."""
    folder = write_images(tmp_path / "many", 30)
    whole = data.scan(folder, 24)
    sizes: list[int] = []
    summarise = data.summarise
    monkeypatch.setattr(data, "summarise", lambda small: sizes.append(len(small)) or summarise(small))
    for part in (7, 30, 1):
        monkeypatch.setattr(data, "PART", part)
        now = data.scan(folder, 24)
        assert max(sizes) == part
        sizes.clear()
        assert np.allclose(now.thumbs, whole.thumbs, atol=1e-6)
        assert np.allclose(now.features, whole.features, atol=1e-6)
        assert (now.names, now.pixels, now.captions) == (whole.names, whole.pixels, whole.captions)


def test_nothing_changed_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read no image for `status` and `add` of an unchanged folder, as long as its summary is kept."""
    first = json.loads(ferry(root, "add", "shapes", "-m", "second", "--json")[1])
    before = recorded(root)

    def never(*_: object) -> None:
        raise AssertionError("the folder was scanned")

    monkeypatch.setattr(revisions, "_scan", never)
    again = json.loads(ferry(root, "add", "shapes", "--json")[1])
    assert (again["recorded"], again["arrival"], again["rev"]) == (False, first["arrival"], first["rev"])
    assert json.loads(ferry(root, "status", "shapes", "--json")[1])["arrival"] == first["arrival"]
    assert recorded(root) == before


def test_lost_summary_is_made_again(root: Path) -> None:
    first = json.loads(ferry(root, "add", "shapes", "-m", "second", "--json")[1])
    for path in (root / "work/sketches").iterdir():
        path.write_bytes(b"torn")
    assert json.loads(ferry(root, "add", "shapes", "--json")[1])["arrival"] == first["arrival"]
