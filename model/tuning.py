"""Measure how a model is best drawn: the grid of the sampling times, and the interval of guidance. Nothing is changed.

A shifted grid spends more steps where the path bends. Guidance costs an evaluation wherever it applies, and outside an interval
of times it may not help (Kynkäänniemi et al. 2024). Which grid and interval are best depends on the data, so each line is measured.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from scipy import stats

from model.data import Dataset
from model.evaluate import Drawn, compare, converged, held_out_captions, quality
from model.features import FeatureSpaces
from model.scorecard import Comparison, Frozen, Quality, Sampler
from model.students import converged as many_steps

SHIFTS = (1.0, 0.85, 0.7, 0.5, 0.35)
INTERVALS = ((0.0, 1.0), (0.1, 0.9), (0.2, 0.8), (0.0, 0.7), (0.3, 1.0))
GRID_IMAGES = 32
ALPHA = 0.05

Draw = Callable[[Sampler, list[str]], Drawn]
"""(how, captions) → images; equal captions start from equal noise."""


class Grid(Frozen):
    """One grid of the times, beside the even one."""

    sampler: Sampler
    distance: float = Field(description="distance of the images from the converged ones; pixels span 2")
    distance_se: float = Field(description="standard error of distance")
    delta: float = Field(description="distance minus that of the even grid, over the same noises")
    se: float = Field(description="standard error of delta")


class Guided(Frozen):
    """One interval of guidance, beside guidance everywhere."""

    sampler: Sampler
    comparisons: list[Comparison] = Field(description="difference of the distances to held-out images, by space and aspect")


def grids(draw: Draw, dataset: Dataset, sampler: Sampler) -> list[Grid]:
    """Measure the grids for a sampler of `full`, the even one first."""
    captions = held_out_captions(dataset, GRID_IMAGES)
    reference = many_steps(sampler)
    wanted = draw(reference, captions).images
    even = draw(sampler.model_copy(update={"shift": 1.0}), captions).images
    rows = []
    for shift in SHIFTS:
        way = sampler.model_copy(update={"shift": shift})
        found = converged(draw(way, captions).images, wanted, reference.evaluations, even)
        rows.append(
            Grid(
                sampler=way, distance=found.distance, distance_se=found.distance_se, delta=found.delta or 0.0, se=found.se or 0.0
            )
        )
    return rows


def best_grid(rows: list[Grid]) -> Grid:
    """Choose the grid whose images are shown to be nearest to the converged ones; the even one if none is shown to be nearer.

    All grids are tested at once, so each test has its part of `ALPHA`.
    """
    reach = float(stats.t.ppf(1 - ALPHA / (len(rows) - 1), GRID_IMAGES - 1))
    nearer = [row for row in rows if row.delta + reach * row.se < 0]
    return min(nearer, key=lambda row: row.distance, default=rows[0])


def intervals(
    draw: Draw, dataset: Dataset, spaces: FeatureSpaces, sampler: Sampler, n: int
) -> tuple[list[Guided], list[Quality]]:
    """Compare intervals of guidance with guidance everywhere; also return the figures of the latter.

    Args:
        draw: draws with the model.
        dataset: gives the held-out images.
        spaces: feature spaces.
        sampler: guided.
        n: images for each interval.
    """
    captions = held_out_captions(dataset, n)
    ways = [sampler.model_copy(update={"guidance_low": low, "guidance_high": high}) for low, high in INTERVALS]
    everywhere = draw(ways[0], captions)
    rows = [
        Guided(sampler=way, comparisons=compare(spaces, dataset, draw(way, captions), everywhere, "new", "0" * 64, "full"))
        for way in ways[1:]
    ]
    return rows, quality(spaces, dataset, everywhere, "new")
