"""Images that an evaluation drew are kept: what was drawn before is not drawn again, and never for another model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model import evaluate
from model.drawing import Drawer
from model.export import Export
from model.scorecard import Sampler

SAMPLER = Sampler(steps=2)
CAPTIONS = ["bar", "disc", "bar", "disc", "bar"]


def drawer(exported: Export, kept: Path, sampler: Sampler = SAMPLER) -> Drawer:
    return Drawer(exported.folder, kept, sampler)


def forbid(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was drawn before")

    patch.setattr(evaluate, "draw", refuse)


def test_what_was_drawn_is_read(exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = drawer(exported, tmp_path).draw(CAPTIONS)
    forbid(monkeypatch)
    again = drawer(exported, tmp_path).draw(CAPTIONS)
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.load, again.load)
    shorter = drawer(exported, tmp_path).draw(CAPTIONS[:3])  # the first images of a longer list have the same seeds
    assert np.array_equal(shorter.images, first.images[:3])


@pytest.mark.parametrize("captions", [["disc", "bar"], [*CAPTIONS, "bar"]])
def test_other_captions_are_drawn(captions: list[str], exported: Export, tmp_path: Path):
    first = drawer(exported, tmp_path).draw(CAPTIONS)
    other = drawer(exported, tmp_path).draw(captions)
    assert len(other.images) == len(captions)
    assert not np.array_equal(other.images[0], first.images[0]) or captions[0] == CAPTIONS[0]


def test_other_sampler_draws_anew(exported: Export, tmp_path: Path):
    first = drawer(exported, tmp_path).draw(CAPTIONS)
    other = drawer(exported, tmp_path, SAMPLER.model_copy(update={"shift": 0.3})).draw(CAPTIONS)
    assert not np.array_equal(first.images, other.images)


def test_damaged_file_is_drawn_again(exported: Export, tmp_path: Path):
    first = drawer(exported, tmp_path).draw(CAPTIONS)
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(drawer(exported, tmp_path).draw(CAPTIONS).images, first.images)
