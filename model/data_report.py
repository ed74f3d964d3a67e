"""What arrived: copies, near copies and leaks, balance, and drift against the revision before. Rules alone, without torch.

`model.data.scan` looks at a folder once and hands over a `FolderSummary`: a few hundred bytes for each image, from which everything
here is computed, so that two revisions are compared without decoding either again.

    >>> after = scan(folder, text_length)
    >>> report = report_on(after, before=summary_of_the_last_revision, previous=last, md5=md5)
    >>> report.drift.verdict
    'no drift seen'

Drift is decided by permutation, so its false-alarm rate holds at any sample size and for any data, as long as groups are
independent of each other: whole groups change sides, never single images. The image test is the kernel two-sample test of
Gretton et al. (JMLR 13, 2012) with the random features of Rahimi and Recht (NIPS 2007), linear in the number of images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from model.scorecard import DataVersion, Frozen

Floats = npt.NDArray[np.float32]

SMALL = 32  # pixels; what of an image is looked at, its largest central square
THUMB = 16  # pixels
ALIKE = 0.995  # correlation of two thumbnails from which the images are near copies; see DECISIONS
FLAT = 1.0  # grey levels; a thumbnail that varies less has no shape to compare
LISTED = 100  # names written out in a report; beside them stands how many there are
THIN = 2  # held-out images of a caption, below which nothing can be said about that caption
STATISTICS = ("brightness", "contrast", "edges", "red", "blue")  # red and blue: against green
PROJECTIONS = 8
FREQUENCIES = 64  # random features come in pairs, sine and cosine
PERMUTATIONS = 999
ALPHA = 0.05  # chance that an arrival without drift is called drift, over both tests together
MIN_GROUPS = 10  # independent groups on either side, below which nothing is decided
COMMON = 5  # images of a caption, below which it is counted among the rare ones
SUMMARY_SCHEMA = 1


@dataclass(frozen=True)
class FolderSummary:
    """What one look at a folder keeps of it.

    Attributes:
        files: every file below the folder → md5 of its bytes.
        quarantine: file name → why it cannot be used.
        names: the n usable images, sorted.
        captions: of each.
        groups: of each; images of one group are not independent of each other.
        held_out: bool [n].
        pixels: of each, sha256 of the decoded picture; the same for a copy in another format.
        thumbs: float32 [n, THUMB²], grey, mean 0 and length 1; all 0 where an image has no shape.
        features: float32 [n, F], `STATISTICS` in 0…1 and random projections of a thumbnail.
    """

    files: dict[str, str]
    quarantine: dict[str, str]
    names: list[str]
    captions: list[str]
    groups: list[str]
    held_out: npt.NDArray[np.bool_]
    pixels: list[str]
    thumbs: Floats
    features: Floats

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = json.dumps([self.files, self.quarantine, self.names, self.captions, self.groups, self.pixels])
        fresh = path.with_suffix(".tmp.npz")
        np.savez(fresh, lists=np.array(lists), held_out=self.held_out, thumbs=self.thumbs, features=self.features)
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> FolderSummary:
        """Read what `save` wrote."""
        with np.load(path) as kept:
            files, quarantine, names, captions, groups, pixels = json.loads(str(kept["lists"]))
            return cls(files, quarantine, names, captions, groups, kept["held_out"], pixels, kept["thumbs"], kept["features"])


class Listed(Frozen):
    """How many there are, and the first of them by name."""

    n: int
    first: list[tuple[str, ...]] = Field(description=f"at most {LISTED}")


class Duplicates(Frozen):
    """Images that are there more than once. Near copies: recompressed, resized, brighter, noisier; cropped ones go unseen."""

    copies: Listed = Field(description="sets of images with the same pixels, whatever their format")
    contradictions: Listed = Field(description="those sets whose images have different captions")
    near: Listed = Field(description="pairs of images with other pixels that look the same; each image with the one most like it")
    leaks: Listed = Field(
        description="held-out images with a copy or near copy to train on, each with that one: they flatter the model"
    )


class Balance(Frozen):
    """How many images each caption has."""

    captions: int = Field(description="different ones")
    evenness: float = Field(description="entropy over its maximum: 1 where all captions have as many images")
    counts: dict[str, tuple[int, int]] = Field(description=f"training and held-out images of the {LISTED} most frequent captions")
    new: Listed = Field(description="captions that the revision before does not have")
    gone: Listed = Field(description="captions that only the revision before has")
    thin: Listed = Field(description=f"captions with fewer than {THIN} held-out images: nothing will be known about them")


class Drift(Frozen):
    """Whether the new images come from the same source as those of the revision before.

    Two permutation tests, each at `alpha`/2: an arrival without drift is called drift with probability `alpha` or less.
    """

    before: int = Field(description="images of the revision before that were compared")
    before_groups: int
    new: int = Field(description="images that it does not have")
    new_groups: int
    left_out: int = Field(description="new images of groups that it has already: no independent evidence")
    alpha: float = ALPHA
    p_images: float | None = Field(
        default=None, description="chance of such a difference of looks without drift; null: not decided"
    )
    p_captions: float | None = Field(
        default=None, description="the same for the mix of captions; null where captions hardly repeat"
    )
    distance: float | None = Field(
        default=None, description="squared kernel distance of the two samples; grows when there are few images"
    )
    mix: float | None = Field(default=None, description="share of new images that would need another caption to give the old mix")
    shifts: dict[str, float] = Field(default={}, description="new mean minus old, in standard deviations of the images before")
    verdict: Literal["drift", "no drift seen", "too few images", "nothing new", "not compared"]
    reason: str = Field(description="one sentence")


class Changes(Frozen):
    """What a folder has that another revision has not, by name."""

    added: list[str]
    changed: list[str] = Field(description="the same name with other bytes")
    removed: list[str]
    recaptioned: list[tuple[str, str, str]] = Field(description="name, caption before, caption now")


class DataReport(Frozen):
    """What was found in a data folder when it was recorded."""

    schema_version: Literal[1] = 1
    line: str
    md5: str = Field(description="DVC's hash of the folder; empty while it is not recorded")
    previous: DataVersion | None = Field(description="what it was compared with")
    training: int
    held_out: int
    quarantine: dict[str, str] = Field(description="what cannot be used, and why; recorded, never trained on")
    duplicates: Duplicates
    balance: Balance
    changes: dict[Literal["added", "changed", "removed", "recaptioned"], int]
    drift: Drift | None = Field(description="null for the first revision")


def summarise(small: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """What is kept of images.

    Args:
        small: uint8 [n, SMALL, SMALL, 3].

    Returns:
        `thumbs` and `features` of a `FolderSummary`.
    """
    n = len(small)
    colour = small.astype(np.float32)
    grey = colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    thumbs = _shrunk(grey, THUMB).reshape(n, THUMB * THUMB)
    thumbs = thumbs - thumbs.mean(axis=1, keepdims=True)
    length = np.linalg.norm(thumbs, axis=1, keepdims=True)
    thumbs = np.where(length >= FLAT * THUMB, thumbs / np.maximum(length, 1e-6), 0).astype(np.float32)
    edges = np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2)) + np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))
    means = colour.mean(axis=(1, 2))
    named = (grey.mean(axis=(1, 2)), grey.std(axis=(1, 2)), edges, means[:, 0] - means[:, 1], means[:, 2] - means[:, 1])
    directions = np.random.default_rng(0).standard_normal((64, PROJECTIONS)) / 8
    projected = _shrunk(grey, 8).reshape(n, 64) @ directions
    return thumbs, (np.column_stack([*named, projected]) / 255).astype(np.float32)


def _shrunk(grey: Floats, side: int) -> Floats:
    step = grey.shape[1] // side
    shrunk: Floats = grey.reshape(len(grey), side, step, side, step).mean(axis=(2, 4))
    return shrunk


def report_on(
    after: FolderSummary, before: FolderSummary | None, previous: DataVersion | None, line: str, why_not: str = ""
) -> DataReport:
    """Everything that is said about an arrival.

    Args:
        after: what is in the folder.
        before: what the revision before holds; None: there is none, or it cannot be had.
        previous: which revision that is; None: there is none.
        line: whose data they are.
        why_not: why `before` cannot be had.
    """
    held_out = int(after.held_out.sum())
    moved = changes(after, before) if before else file_changes(after.files, {})
    return DataReport(
        line=line, md5="", previous=previous, training=len(after.names) - held_out, held_out=held_out, quarantine=after.quarantine,
        duplicates=duplicates(after), balance=balance(after, before),
        changes={
            "added": len(moved.added), "changed": len(moved.changed), "removed": len(moved.removed),
            "recaptioned": len(moved.recaptioned),
        },
        drift=drift(after, before) if before else not_compared(why_not) if previous else None,
    )  # fmt: skip


def duplicates(after: FolderSummary) -> Duplicates:
    """Copies, near copies, and held-out images that can be trained on under another name.

    Images without any shape (one flat colour) are compared by their pixels only.
    """
    sets: dict[str, list[int]] = {}
    for i, pixels in enumerate(after.pixels):
        sets.setdefault(pixels, []).append(i)
    copies = [members for members in sets.values() if len(members) > 1]
    contradictions = [members for members in copies if len({after.captions[i] for i in members}) > 1]
    leaks: dict[int, int] = {}
    for members in copies:
        training = [i for i in members if not after.held_out[i]]
        leaks |= {i: training[0] for i in members if after.held_out[i] and training}
    one_each = np.array([members[0] for members in sets.values()], dtype=np.intp)
    most_alike, learnable = _near(after.thumbs[one_each], after.held_out[one_each])
    for row, column in learnable.items():
        leaks.setdefault(int(one_each[row]), int(one_each[column]))
    alike = {(int(one_each[i]), int(one_each[j])) for i, j in most_alike.items()}
    pairs = sorted({(min(pair), max(pair)) for pair in alike})

    def named(rows: list[list[int]]) -> Listed:
        return Listed(n=len(rows), first=[tuple(after.names[i] for i in row) for row in rows[:LISTED]])

    return Duplicates(
        copies=named(copies), contradictions=named(contradictions), near=named([list(pair) for pair in pairs]),
        leaks=named([list(pair) for pair in sorted(leaks.items())]),
    )  # fmt: skip


def _near(thumbs: Floats, held_out: npt.NDArray[np.bool_], rows: int = 512) -> tuple[dict[int, int], dict[int, int]]:
    """For each image that has near copies the one most like it; for held-out ones also the training image most like it."""
    most_alike: dict[int, int] = {}
    learnable: dict[int, int] = {}
    for start in range(0, len(thumbs), rows):
        alike = thumbs[start : start + rows] @ thumbs.T
        own = np.arange(len(alike))
        alike[own, start + own] = -1
        for found, only in ((most_alike, own), (learnable, own[held_out[start : start + rows]])):
            if found is learnable:
                alike[:, held_out] = -1
            best = alike[only].argmax(axis=1)
            for row, column in zip(only, best, strict=True):
                if alike[row, column] >= ALIKE:
                    found[start + int(row)] = int(column)
    return most_alike, learnable


def balance(after: FolderSummary, before: FolderSummary | None) -> Balance:
    """How the captions are spread, and which came or went."""
    total = Counter(after.captions)
    held_out = Counter(caption for caption, held in zip(after.captions, after.held_out, strict=True) if held)
    shares = np.array(list(total.values()), dtype=np.float64) / max(1, total.total())
    entropy = float(-(shares * np.log(shares)).sum())
    known = set(before.captions) if before else set(total)

    def listed(captions: list[str]) -> Listed:
        return Listed(n=len(captions), first=[(caption,) for caption in captions[:LISTED]])

    frequent = sorted(total, key=lambda caption: (-total[caption], caption))
    return Balance(
        captions=len(total),
        evenness=round(entropy / float(np.log(len(total))), 4) if len(total) > 1 else 1.0,
        counts={caption: (total[caption] - held_out[caption], held_out[caption]) for caption in frequent[:LISTED]},
        new=listed(sorted(set(total) - known)),
        gone=listed(sorted(known - set(total))),
        thin=listed([caption for caption in frequent if held_out[caption] < THIN]),
    )


def changes(after: FolderSummary, before: FolderSummary) -> Changes:
    """Files and captions of `after` against those of `before`."""
    old, new = (dict(zip(side.names, side.captions, strict=True)) for side in (before, after))
    recaptioned = [(name, old[name], new[name]) for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    return file_changes(after.files, before.files).model_copy(update={"recaptioned": recaptioned})


def file_changes(after: dict[str, str], before: dict[str, str]) -> Changes:
    """What differs between two lists of files (name → hash)."""
    return Changes(
        added=sorted(after.keys() - before.keys()),
        changed=sorted(name for name in after.keys() & before.keys() if after[name] != before[name]),
        removed=sorted(before.keys() - after.keys()),
        recaptioned=[],
    )


def drift(after: FolderSummary, before: FolderSummary) -> Drift:
    """Compare the images that only `after` has with those of `before`, in looks and in their mix of captions.

    A copy counts once. New images of a group that `before` has already are left out: they are not independent of it.
    """
    seen = set(before.pixels)
    old = _first_of_each(before.pixels)
    fresh = [i for i in _first_of_each(after.pixels) if after.pixels[i] not in seen]
    known_groups = set(before.groups)
    new = [i for i in fresh if after.groups[i] not in known_groups]
    names = [("old", before.groups[i]) for i in old] + [("new", after.groups[i]) for i in new]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    groups = np.array([numbers[name] for name in names], dtype=np.intp)
    new_groups = len({name for side, name in names if side == "new"})
    counted = {
        "before": len(old), "before_groups": len(numbers) - new_groups, "new": len(fresh), "new_groups": new_groups,
        "left_out": len(fresh) - len(new),
    }  # fmt: skip
    if not fresh:
        return Drift(**counted, verdict="nothing new", reason="no image is new, so there is nothing to compare")
    if min(new_groups, counted["before_groups"]) < MIN_GROUPS:
        reason = (
            f"{new_groups} independent new groups of images against {counted['before_groups']} are too few to decide, "
            f"{MIN_GROUPS} on either side are needed"
        )
        return Drift(**counted, verdict="too few images", reason=reason)
    features = np.concatenate([before.features[old], after.features[new]]).astype(np.float64)
    captions = [before.captions[i] for i in old] + [after.captions[i] for i in new]
    is_new = np.arange(len(names)) >= len(old)
    p_images, distance = _two_sample(_random_features(features), groups, new_groups, _squared_distance)
    common = [caption for caption, n in Counter(captions).items() if n >= COMMON]
    p_captions = mix = None
    if len(common) > 1 or 0 < sum(caption in common for caption in captions) < len(captions):
        column = {caption: i for i, caption in enumerate(common)}
        table = np.eye(len(common) + 1)[[column.get(caption, len(common)) for caption in captions]]
        p_captions, _ = _two_sample(table[:, table.any(axis=0)], groups, new_groups, _chi_squared)
        mix = round(float(np.abs(table[is_new].mean(axis=0) - table[~is_new].mean(axis=0)).sum() / 2), 4)
    sd = features[~is_new].std(axis=0)
    moved = (features[is_new].mean(axis=0) - features[~is_new].mean(axis=0)) / np.where(sd > 0, sd, np.inf)
    shifts = {name: round(float(moved[i]), 3) for i, name in enumerate(STATISTICS)}
    tests = {"looks": p_images} | ({"mix of captions": p_captions} if p_captions is not None else {})
    alarms = [f"{name} (p = {p:.3f})" for name, p in tests.items() if p <= ALPHA / len(tests)]
    largest = max(shifts, key=lambda name: abs(shifts[name]))
    told = ", ".join(f"{name} p = {p:.3f}" for name, p in tests.items())
    return Drift(
        **counted, p_images=p_images, p_captions=p_captions, distance=round(distance, 6), mix=mix, shifts=shifts,
        verdict="drift" if alarms else "no drift seen",
        reason=f"the new images differ from those before in {' and '.join(alarms)}; {largest} moved most, by {shifts[largest]:+.2f} sd"
        if alarms else f"no difference beyond chance at {ALPHA:.0%}: {told}",
    )  # fmt: skip


def _first_of_each(pixels: list[str]) -> list[int]:
    return sorted(np.unique(pixels, return_index=True)[1].tolist()) if pixels else []


def not_compared(why: str) -> Drift:
    """What is said of drift where the revision before cannot be had."""
    return Drift(before=0, before_groups=0, new=0, new_groups=0, left_out=0, verdict="not compared", reason=why)


def _random_features(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[n, F] → [n, 2·FREQUENCIES], whose inner product is a Gaussian kernel as wide as the median distance."""
    rng = np.random.default_rng(0)
    spread = features.std(axis=0)
    unit = (features - features.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    some = unit[rng.permutation(len(unit))[:500]]
    squares = (some**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * some @ some.T, 0))
    width = float(np.median(distances[np.triu_indices(len(some), 1)])) or 1.0
    angles = unit @ rng.standard_normal((unit.shape[1], FREQUENCIES)) / width
    waves: npt.NDArray[np.float64] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(FREQUENCIES)
    return waves


Sums = npt.NDArray[np.float64]


def _squared_distance(new: Sums, total: Sums, n_new: Sums, n: float) -> Sums:
    gap = new / n_new[:, None] - (total - new) / (n - n_new)[:, None]
    squared: Sums = (gap**2).sum(axis=1)
    return squared


def _chi_squared(new: Sums, total: Sums, n_new: Sums, n: float) -> Sums:
    gap = new - n_new[:, None] * total / n
    statistic: Sums = (gap**2 / total).sum(axis=1) * n**2 / (n_new * (n - n_new))
    return statistic


def _two_sample(
    rows: Sums, groups: npt.NDArray[np.intp], new_groups: int, statistic: Callable[[Sums, Sums, Sums, float], Sums]
) -> tuple[float, float]:
    """Permutation test on sums over groups; the last `new_groups` groups are the new ones.

    Args:
        rows: [n, K], one row for each image.
        groups: [n], numbered from 0.
        new_groups: how many of them are new.
        statistic: from the new side's sums [P, K], all sums [K], the new side's images [P], and all images.

    Returns:
        p and the observed statistic.
    """
    count = int(groups.max()) + 1
    sums = np.zeros((count, rows.shape[1] + 1))
    np.add.at(sums, groups, np.column_stack([rows, np.ones(len(rows))]))
    total = sums.sum(axis=0)

    def of(sides: Sums) -> Sums:
        new = sides @ sums
        return statistic(new[:, :-1], total[:-1], new[:, -1], float(total[-1]))

    observed = float(of((np.arange(count) >= count - new_groups)[None].astype(np.float64))[0])
    rng = np.random.default_rng(0)
    as_large = 0
    for start in range(0, PERMUTATIONS, 111):  # in parts, so that 20,000 groups stay within some megabytes
        sides = np.zeros((min(111, PERMUTATIONS - start), count))
        for side in sides:
            side[rng.permutation(count)[:new_groups]] = 1
        as_large += int((of(sides) >= observed * (1 - 1e-9)).sum())
    return (1 + as_large) / (1 + PERMUTATIONS), observed
