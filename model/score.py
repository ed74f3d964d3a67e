"""Score a challenger: draw its images, and beside them those of the models that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from model import evaluate
from model.config import PrecisionName
from model.data import Dataset
from model.drawing import GRID_COLUMNS, Drawer, picture
from model.errors import DataError, TrainingError
from model.evaluate import Drawn
from model.features import FeatureSpaces
from model.scorecard import CaptionCheck, Comparison, Converged, Following, Lineage, Quality, Scorecard

CONVERGED_IMAGES = 32  # separate a distance of 0.043 from one of 0.117


@dataclass(frozen=True)
class Contest:
    """What a challenger is scored on and against."""

    spaces: FeatureSpaces
    datasets: dict[Literal["new", "old"], Dataset]
    """The challenger's own data revision and, where there is a champion, the champion's."""
    n: int
    """Images for the held-out items of a split."""
    challenger: Drawer
    champion: Drawer | None = None
    anchor: Drawer | None = None
    """The best model ever, where it is not the champion."""
    full: Drawer | None = None
    """The `full` whose variant the challenger is; None: the challenger is `full`."""
    converged: Drawer | None = None
    """That `full` in so many steps that more change nothing."""
    solver: Drawer | None = None
    """That `full` with as many evaluations as the challenger takes, where this is a student."""

    def asked(self, split: Literal["new", "old"]) -> list[str]:
        """List the captions that are drawn for a split: on the new one also those that are looked at one by one."""
        data = self.datasets[split]
        return _asked_on_new(data, self.n) if split == "new" else evaluate.held_out_captions(data, self.n)


def _asked_on_new(data: Dataset, n: int) -> list[str]:
    """List the captions of n images for the held-out items, and of the further images by which captions are judged one by one."""
    return evaluate.held_out_captions(data, n) + [data.captions[i] for i in evaluate.further_items(data, n)]


def score(contest: Contest, lineage: Lineage, precision: PrecisionName) -> Scorecard:
    """Draw and score.

    Args:
        contest: the models and the data.
        lineage: of the challenger.
        precision: of the challenger's exported weights.

    Raises:
        TrainingError: what the challenger draws is not finite.
    """
    challenger, spaces, n = contest.challenger, contest.spaces, contest.n
    data, asked = contest.datasets["new"], contest.asked("new")
    drawn = challenger.draw(asked)
    if not np.isfinite(drawn.load).all():  # no figure of such a model can be compared with another
        subject = f"{lineage.data.line}/{lineage.config.configuration}/{lineage.variant}"
        hint = "adopt weights that draw" if lineage.adopted else "lower its learning_rate in ferry.toml, and train again"
        raise TrainingError(f"{subject} draws images that are not finite; nothing is registered; {hint}")
    first = drawn.first(n)
    qualities, comparisons, follows = _by_split(contest)
    if contest.full:
        images = contest.full.draw(asked).first(n)  # as `full` was asked in its own evaluation, so they may be there already
        comparisons += evaluate.compare(spaces, data, first, images, "new", contest.full.weights_sha256, "full")
    beside = contest.champion.draw(asked) if contest.champion else None
    return evaluate.scorecard(
        lineage, lineage.config, challenger.weights_sha256, challenger.sampler, precision, first, qualities, comparisons,
        evaluate.memorisation(spaces, data, first), evaluate.by_caption(spaces, data, first, asked[:n]),
        evaluate.measure_cost(challenger.folder, data.captions[0], challenger.sampler),
        contest.solver.sampler if contest.solver else None, follows,
        evaluate.asked_for(spaces, data, drawn, beside, n), evaluate.plausibility(spaces, data, drawn, beside, n),
        evaluate.group_hashes(data), _converged(contest, asked, drawn),
    )  # fmt: skip


def _converged(contest: Contest, asked: list[str], drawn: Drawn) -> Converged | None:
    """Measure the distance from the converged images, over the first images; None: the challenger is `full`."""
    if contest.converged is None:
        return None
    n = min(CONVERGED_IMAGES, contest.n)
    reference = contest.converged.draw(asked[:n]).images
    solver = contest.solver.draw(asked[:n]).images if contest.solver else None
    return evaluate.converged(drawn.images[:n], reference, contest.converged.sampler.evaluations, solver)


def _by_split(contest: Contest) -> tuple[list[Quality], list[Comparison], list[Following]]:
    """Compute the figures that each split has of its own."""
    qualities: list[Quality] = []
    comparisons: list[Comparison] = []
    follows: list[Following] = []
    rivals: tuple[tuple[Literal["champion", "anchor"], Drawer | None], ...] = (
        ("champion", contest.champion), ("anchor", contest.anchor),
    )  # fmt: skip
    for split, data in contest.datasets.items():
        asked = contest.asked(split)
        drawn: Drawn = contest.challenger.draw(asked).first(contest.n)
        qualities += evaluate.quality(contest.spaces, data, drawn, split)
        follows += evaluate.following(contest.spaces, data, drawn, split)
        for against, rival in rivals:
            if rival:
                images = rival.draw(asked).first(contest.n)
                comparisons += evaluate.compare(contest.spaces, data, drawn, images, split, rival.weights_sha256, against)
    return qualities, comparisons, follows


def pictures(contest: Contest, folder: Path) -> None:
    """Write what the challenger draws (samples.png), and real images of the same captions (real.png)."""
    shown = picture(contest.challenger.by_caption(contest.asked("new")), folder / "samples.png")
    data = contest.datasets["new"]
    picture({caption: evaluate.real_images(data, caption, GRID_COLUMNS) for caption in shown}, folder / "real.png")


def anew(spaces: FeatureSpaces, data: Dataset, drawer: Drawer, n: int) -> tuple[list[Quality], list[CaptionCheck]]:
    """Measure a model in other feature spaces than its scorecard: its quality, and whether it draws each caption.

    Args:
        spaces: feature spaces.
        data: gives the held-out images.
        drawer: of the model.
        n: images for the held-out items.
    """
    drawn = drawer.draw(_asked_on_new(data, n))
    return evaluate.quality(spaces, data, drawn.first(n), "new"), evaluate.asked_for(spaces, data, drawn, None, n)


def check_sound(data: Dataset, folder: Path) -> None:
    """Refuse a data set as what images are compared with, if its folder holds files that cannot be used.

    Raises:
        DataError: it does.
    """
    unusable = {name: why for name, why in data.quarantine.items() if (folder / name).is_file()}
    if unusable:
        name, why = next(iter(unusable.items()))
        raise DataError(
            f"the version's data hold {len(unusable)} files that cannot be used (for example, {name} {why}); name a "
            "folder of sound images with --images"
        )
