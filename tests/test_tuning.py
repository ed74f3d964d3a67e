"""What `ferry tune` finds: grids by paired distance, intervals of guidance by the gate's margin; nothing is changed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from flows.settings import read
from flows.setup import template
from flows.tuning import GuidedRow, Tuned, _guided
from model import features
from model.data import Dataset
from model.drawing import Drawer
from model.evaluate import Drawn
from model.export import Export
from model.scorecard import Sampler
from model.tuning import INTERVALS, SHIFTS, Grid, best_grid, grids, intervals

FULL = Sampler(steps=6)


def images(level: float, n: int) -> npt.NDArray[np.uint8]:
    """Draw images around a level; equal calls draw equal images."""
    noise = np.random.default_rng(0).normal(0, 5, (n, 1, 16, 16))
    return np.clip(128 + level + noise, 0, 255).astype(np.uint8)


def drawn_by(levels: Any) -> Any:
    return lambda sampler, captions: Drawn(images(levels(sampler), len(captions)), np.zeros((1, 1, 1), np.float32), 0.0)


def test_grid_that_is_nearest_to_the_converged_images_is_chosen(dataset: Dataset):
    rows = grids(drawn_by(lambda s: 0 if s.steps == 40 else 20 * abs(s.shift - 0.5)), dataset, FULL)
    assert [row.sampler.shift for row in rows] == list(SHIFTS)
    assert rows[0].delta == 0
    assert best_grid(rows).sampler == FULL.model_copy(update={"shift": 0.5})


def test_even_grid_stays_where_no_other_is_shown_to_be_nearer():
    rows = [
        Grid(
            sampler=FULL.model_copy(update={"shift": shift}),
            distance=0.05 - 0.001 * i,
            distance_se=0.01,
            delta=-0.001 * i,
            se=0.002,
        )
        for i, shift in enumerate(SHIFTS)
    ]
    assert best_grid(rows).sampler.shift == 1.0


def test_real_model_has_a_distance_for_each_grid_and_interval(exported: Export, dataset: Dataset, tmp_path: Any):
    def draw(sampler: Sampler, captions: list[str]) -> Drawn:
        return Drawer(exported.folder, tmp_path / "draws", sampler).draw(captions)

    rows = grids(draw, dataset, Sampler(steps=4))
    assert all(0 < row.distance < 1 for row in rows)
    spaces = features.fit(dataset, tmp_path / "spaces.safetensors")
    found, beside = intervals(draw, dataset, spaces, Sampler(steps=4), 16)
    assert [(row.sampler.guidance_low, row.sampler.guidance_high) for row in found] == list(INTERVALS[1:])
    assert {row.space for row in found[0].comparisons} == {q.space for q in beside} == set(spaces.names)
    assert min(row.sampler.evaluations for row in found) < Sampler(steps=4).evaluations


def tuned(**fields: Any) -> Tuned:
    shifted = FULL.model_copy(update={"shift": 0.5})
    rows = [
        Grid(sampler=FULL, distance=0.03, distance_se=0.002, delta=0, se=0),
        Grid(sampler=shifted, distance=0.02, distance_se=0.002, delta=-0.01, se=0.001),
    ]
    given: dict[str, Any] = {
        "subject": "shapes/I/full", "version": 3, "grids": {"fast": rows}, "chosen": {"fast": shifted},
        "guidance": [GuidedRow(low=0.1, high=0.9, evaluations=10, used=0.4)], "interval": (0.1, 0.9),
    }  # fmt: skip
    return Tuned(**given | fields)


def test_answer_has_keys_for_the_sections_that_a_new_file_has(tmp_path: Any):
    """Do what the answer says in a file of `ferry init`: put what is below each header there."""
    text = tuned(chosen={"fast": _guided(FULL.model_copy(update={"shift": 0.5}), (0.1, 0.9))}).text
    assert "0.0200 ± 0.0039" in text
    assert "below the header that is there" in text
    assert not re.search(r"^\[", text, re.MULTILINE)
    file = template(["shapes"])
    for part in text.split("\nbelow ")[1:]:
        header, _, keys = part.partition(":\n")
        start = file.index("\n", file.index(f"\n{header} ") + 1)
        file = f"{file[:start]}\n{keys.strip()}{file[start:]}"
    (tmp_path / "ferry.toml").write_text(file)
    line = read(tmp_path / "ferry.toml").lines["shapes"]
    assert line.sampler_of("fast").shift == 0.5
    for sampler in (line.sampler, line.sampler_of("dev"), line.sampler_of("fast")):
        assert (sampler.guidance_low, sampler.guidance_high) == (0.1, 0.9)


def test_answer_says_so_where_nothing_is_better():
    text = tuned(chosen={"fast": FULL}, interval=None).text
    assert text.endswith("nothing was shown to be better than the present settings")
    assert "[lines" not in text
