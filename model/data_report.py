"""Report on a data folder: copies, near copies, leaks, balance, and drift from the previous revision. Needs no torch.

`model.data.scan` reads a folder once and returns a `FolderSummary` of one to two kilobytes for each image. Everything here is
computed from such summaries, so comparing two revisions decodes neither of them again.

    >>> after = scan(folder, text_length)
    >>> report = report_on(after, before=summary_of_the_last_revision, previous=last, line="surfaces")
    >>> report.drift.verdict
    'no drift seen'

Permutation tests decide about drift, so the false-alarm rate holds at any sample size and for any data, as long as the groups
are independent of each other: the tests permute whole groups, never single images. The image test is the kernel two-sample
test of Gretton et al. (JMLR 13, 2012) with the random features of Rahimi and Recht (NIPS 2007), linear in the number of images.
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

from model.pictures import DEEPEST, READING
from model.scorecard import DataVersion, Frozen

Floats = npt.NDArray[np.float32]

SMALL = 32  # pixels; side of an image's largest central square, scaled down for all comparisons
THUMB = 16  # pixels; side of a grey thumbnail
ALIKE = 0.995  # images are near copies if their thumbnails correlate at least so much; decision 0049
REACH = (2 - 2 * ALIKE) ** 0.5 + 1e-3  # vectors of norm 1 that correlate so lie no further apart, in any direction
FLAT = 1.0  # grey levels; a thumbnail with a smaller standard deviation has no structure to compare
LISTED = 100  # entries of each list in a report; the total is given with them
THIN = 2  # held-out images; a caption with fewer cannot be evaluated
STATISTICS = ("brightness", "contrast", "edges", "red", "blue")  # red and blue are relative to green
PROJECTIONS = 8
FREQUENCIES = 64  # random features come in pairs, sine and cosine
PERMUTATIONS = 999
ALPHA = 0.05  # probability that data without drift are reported as drift, over both tests together
MIN_GROUPS = 10  # independent groups that a decision needs on either side
DARK = 2  # bits; images with 16 bits that use so many fewer may come from a camera with fewer
COMMON = 5  # images; captions with fewer are counted together as rare
SUMMARY_SCHEMA = 2


@dataclass(frozen=True)
class FolderSummary:
    """Summary of a data folder after one scan.

    Attributes:
        files: every file below the folder → md5 of its bytes.
        quarantine: file name, or metadata line such as "metadata.jsonl:3" → why it cannot be used.
        names: the n usable images, sorted.
        captions: caption of each image.
        groups: group of each image; images of one group are not independent of each other.
        held_out: bool [n].
        pixels: sha256 of each decoded picture; equal for a lossless copy in another format.
        thumbs: float32 [n, THUMB²], grey thumbnails with mean 0 and norm 1; all 0 for an image without structure.
        deep: how many images have 16 bits and give no `white`, and the brightest value in them.
        features: float32 [n, F], `STATISTICS` and `PROJECTIONS` random projections of an 8x8 thumbnail, all divided by 255.
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
    deep: tuple[int, int] = (0, 0)

    def save(self, path: Path) -> None:
        """Write the summary to `path`, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lists = json.dumps([self.files, self.quarantine, self.names, self.captions, self.groups, self.pixels, self.deep])
        fresh = path.with_suffix(".tmp.npz")
        np.savez(fresh, lists=np.array(lists), held_out=self.held_out, thumbs=self.thumbs, features=self.features)
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> FolderSummary:
        """Read a summary that `save` wrote."""
        with np.load(path) as kept:
            files, quarantine, names, captions, groups, pixels, (deep, brightest) = json.loads(str(kept["lists"]))
            return cls(
                files, quarantine, names, captions, groups, kept["held_out"], pixels, kept["thumbs"], kept["features"],
                (deep, brightest),
            )  # fmt: skip


class Listed(Frozen):
    """A total, and the names of the first entries."""

    n: int
    first: list[tuple[str, ...]] = Field(description=f"at most {LISTED}")


class Duplicates(Frozen):
    """Images that occur more than once. Near copies are recompressed, resized, brighter or noisier; crops are not found."""

    copies: Listed = Field(description="sets of images with the same pixels, whatever their format")
    contradictions: Listed = Field(description="sets of images with the same pixels but different captions")
    near: Listed = Field(
        description="pairs of images with different pixels that look the same; each image with the one most like it"
    )
    leaks: Listed = Field(
        description="held-out images with a copy or near copy to train on, each with that one: they flatter the model"
    )


class Balance(Frozen):
    """Number of images of each caption."""

    captions: int = Field(description="number of different captions")
    evenness: float = Field(description="entropy over its maximum: 1 if all captions have the same number of images")
    counts: dict[str, tuple[int, int]] = Field(description=f"training and held-out images of the {LISTED} most frequent captions")
    new: Listed = Field(description="captions that the revision before does not have")
    gone: Listed = Field(description="captions that only the revision before has")
    thin: Listed = Field(description=f"captions with fewer than {THIN} held-out images: nothing will be known about them")


class Drift(Frozen):
    """Result of testing whether the new images come from the same source as those of the previous revision.

    Two permutation tests run at `alpha`/2 each, or one at `alpha` if the mix of captions cannot be tested. So data without
    drift are reported as drift with probability `alpha` or less.
    """

    before: int = Field(description="images of the revision before that were compared")
    before_groups: int
    new: int = Field(description="images that the revision before does not have")
    new_groups: int
    left_out: int = Field(description="new images of groups that the revision before has already: no independent evidence")
    alpha: float = ALPHA
    p_images: float | None = Field(
        default=None, description="chance of such a difference between the images if there is no drift; null: not decided"
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
    """Differences of a folder from another revision, by file name."""

    added: list[str]
    changed: list[str] = Field(description="files with the same name but other bytes")
    removed: list[str]
    recaptioned: list[tuple[str, str, str]] = Field(description="name, caption before, caption now")


class DataReport(Frozen):
    """Findings about a data folder at the time when it is recorded."""

    schema_version: Literal[1] = 1
    line: str
    md5: str = Field(description="DVC's hash of the folder; empty while it is not recorded")
    previous: DataVersion | None = Field(description="revision that this one was compared with")
    training: int
    held_out: int
    quarantine: dict[str, str] = Field(description="images that cannot be used, and why; they are recorded, but never trained on")
    duplicates: Duplicates
    balance: Balance
    changes: dict[Literal["added", "changed", "removed", "recaptioned"], int]
    drift: Drift | None = Field(description="null for the first revision")
    reading: int = Field(default=1, description="number of the rules by which images were read")
    dark: str = Field(default="", description="why images with 16 bits may be read as too dark; empty: they are not")


def summarise(small: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """Compute the thumbnails and features that a `FolderSummary` keeps of images.

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
    """Build the report on a data folder; its hash, `md5`, is left empty.

    Args:
        after: summary of the folder.
        before: summary of the previous revision; None: there is none, or it cannot be read.
        previous: the previous revision; None: there is none.
        line: line that the data belong to.
        why_not: why `before` cannot be read.
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
        drift=drift(after, before) if before else not_compared(why_not) if previous else None, reading=READING, dark=_dark(*after.deep),
    )  # fmt: skip


def _dark(images: int, brightest: int) -> str:
    """Say that images with 16 bits use so few of them that they are read as nearly black; empty: they do not."""
    if not images or brightest > (DEEPEST >> DARK):
        return ""
    bits = max(9, brightest.bit_length())
    return (
        f"{images} images with 16 bits have no value above {brightest:,} of {DEEPEST:,}, so they are read as nearly black; if the "
        f'camera writes {bits} bits, add "white": {(1 << bits) - 1} to their lines in metadata.jsonl'
    )


def duplicates(after: FolderSummary) -> Duplicates:
    """Find copies, near copies, and held-out images that are also training images under another name.

    Images without structure (one flat colour) are compared by their exact pixels only.
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
    """Find the nearest near copy of each image, and for held-out images also the nearest among training images.

    Args:
        thumbs: of a `FolderSummary`, [n, THUMB²].
        held_out: bool [n].
        rows: images that are compared with all others at a time; limits the memory.

    Returns:
        two mappings from an image's row to the row of its near copy; images without a near copy are left out.
    """
    most_alike: dict[int, int] = {}
    learnable: dict[int, int] = {}
    along = thumbs @ _widest(thumbs)
    order = np.argsort(along, kind="stable")
    sorted_along = along[order]
    for start in range(0, len(thumbs), rows):
        block = order[start : start + rows]
        first, last = np.searchsorted(sorted_along, (along[block[0]] - REACH, along[block[-1]] + REACH))
        near = np.sort(order[first:last])  # all others lie further away than near copies can
        alike = thumbs[block] @ thumbs[near].T
        own = np.arange(len(block))
        alike[own, np.searchsorted(near, block)] = -1
        for found, only in ((most_alike, own), (learnable, own[held_out[block]])):
            if found is learnable:
                alike[:, held_out[near]] = -1
            best = alike[only].argmax(axis=1)
            for row, column in zip(only, best, strict=True):
                if alike[row, column] >= ALIKE:
                    found[int(block[row])] = int(near[column])
    return most_alike, learnable


def _widest(thumbs: Floats) -> Floats:
    """Return the unit vector along which thumbnails differ most."""
    spread = thumbs - thumbs.mean(axis=0) if len(thumbs) else thumbs
    widest: Floats = np.linalg.eigh(spread.T @ spread)[1][:, -1]
    return widest


def balance(after: FolderSummary, before: FolderSummary | None) -> Balance:
    """Count the images of each caption, and list the captions that are new, gone or thin."""
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
    """Compare the files and captions of `after` with those of `before`."""
    old, new = (dict(zip(side.names, side.captions, strict=True)) for side in (before, after))
    recaptioned = [(name, old[name], new[name]) for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    return file_changes(after.files, before.files).model_copy(update={"recaptioned": recaptioned})


def file_changes(after: dict[str, str], before: dict[str, str]) -> Changes:
    """Compare two lists of files (name → hash); captions are not compared."""
    return Changes(
        added=sorted(after.keys() - before.keys()),
        changed=sorted(name for name in after.keys() & before.keys() if after[name] != before[name]),
        removed=sorted(before.keys() - after.keys()),
        recaptioned=[],
    )


def drift(after: FolderSummary, before: FolderSummary) -> Drift:
    """Test whether the images that only `after` has differ from those of `before`, in appearance or mix of captions.

    Copies count once. New images of a group that `before` also has are left out, because they are not independent of it.
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
            f"{new_groups} independent new groups of images against {counted['before_groups']} are too few to decide; "
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
        if alarms else f"no difference beyond chance (false alarms in {ALPHA:.0%} of such comparisons): {told}",
    )  # fmt: skip


def _first_of_each(pixels: list[str]) -> list[int]:
    return sorted(np.unique(pixels, return_index=True)[1].tolist()) if pixels else []


def not_compared(why: str) -> Drift:
    """Build the drift result for a previous revision that cannot be read."""
    return Drift(before=0, before_groups=0, new=0, new_groups=0, left_out=0, verdict="not compared", reason=why)


def _random_features(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Map features [n, F] to [n, 2·FREQUENCIES]; inner products approximate a Gaussian kernel of median-distance width."""
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
    """Run a permutation test on sums over groups; the last `new_groups` groups are the new ones.

    Args:
        rows: [n, K], one row for each image.
        groups: [n], numbered from 0.
        new_groups: how many of them are new.
        statistic: called with the sums of the new side [P, K], the sums of both sides [K], the number of images of the new
            side [P], and the number of all images; P permutations at a time.

    Returns:
        the p value and the observed statistic.
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
    for start in range(0, PERMUTATIONS, 111):  # in parts: 20,000 groups then need some megabytes
        sides = np.zeros((min(111, PERMUTATIONS - start), count))
        for side in sides:
            side[rng.permutation(count)[:new_groups]] = 1
        as_large += int((of(sides) >= observed * (1 - 1e-9)).sum())
    return (1 + as_large) / (1 + PERMUTATIONS), observed
