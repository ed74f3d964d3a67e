"""`make bench-gate`, second part: let the gate judge models with one fault each, and good ones.

Each model is really trained (the `test` tier, a minute at most) on made-up photographs (tests/bench/world.py) and draws a pool of
images. A run takes held-out photographs that no other run saw, takes images for their captions from the pools, scores them as the
flow does, and asks the gate whether the challenger may replace the champion.

There is one model of each kind and about 13 minutes for all; with `FULL=1` there are three models and four hours. GATE_SECONDS
sets another time. A row has as many runs as fit into the time, at most 1,000, or 300 if its models are good. Models, pools and
runs stay in build/bench/gate/, so after a kill the next start resumes. The table goes to tests/bench/results/library.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from model import distances, evaluate, features
from model.data import caption_ids, to_bytes
from model.diffusion import guided, sample
from model.evaluate import Drawn, Images
from model.features import Features, FeatureSpaces
from model.scorecard import DataVersion, Sampler
from model.session import noise
from model.train import TrainOptions, train
from registry.selection import JUDGED_GROUPS, JUDGED_IMAGES, Budgets, Decision, Limits, _superior, decide
from tests.bench import world
from tests.bench.gate import rate
from tests.test_selection import CHAMPION, card

BUILD, RESULTS = Path("build/bench/gate"), Path("tests/bench/results/library.md")
FULL = bool(os.environ.get("FULL"))
SECONDS = float(os.environ.get("GATE_SECONDS", "14400" if FULL else "780"))
MODELS, RUNS = (3, 1000) if FULL else (1, 1000)
PHOTOGRAPHS, PATCHES = 9, 9  # photographs of each surface, patches of each: a run holds out 243 images in 27 groups
POOL = 1536
SAMPLER = Sampler(steps=10)
DIM = 0.25  # share by which dim photographs are darker; at 0.5, holes in bricks can no longer be seen
LIMITS = Limits()
VERSION = DataVersion(line="plates", path="data/plates", rev="0" * 40, md5="0" * 32 + ".dir", files=1, bytes=1)
WHOLE = 300  # runs of a bad model in which every test is made; in later ones only whether it can be promoted
NOT_BETTER = "not better"
BAD, GOOD, EQUAL = "must not be promoted", "should be promoted", "must pass as no worse"


@dataclass(frozen=True)
class Kind:
    """A way to make a model: how its data, its training or its images differ from the champion's."""

    name: str
    wanted: str
    steps: int = 400
    dropout: float = 0.1
    first: bool = False
    """Judged as a first version, without a champion."""
    model: str = ""
    """The kind whose trained models draw its images; "" for its own."""
    against: str = ""
    """The kind whose trained models are the champions, if not the champion's own."""
    light: str = ""
    """Prefix of the captions of new, dim data; "" if there are none. Without it no model could draw images in both lights."""
    photographs: int = PHOTOGRAPHS
    """Photographs of each surface that a run holds out."""

    @property
    def file(self) -> str:
        """The kind's name, for use in file names."""
        return "-".join(self.name.replace(",", "").replace(":", "").split())


KINDS = (
    Kind("equal", EQUAL, model="champion"),
    Kind("trained twice as long, 400 steps after 200", GOOD, model="champion", against="trained half as long"),
    Kind("trained twice as long, 800 steps after 400", GOOD, steps=800),
    Kind("dim, which the champion never saw", GOOD, steps=800, light="dim "),  # twice the data, as many steps for each image
    Kind("permuted captions", BAD),
    Kind("caption-blind", BAD, dropout=1.0),
    Kind("without holes", BAD),
    Kind("without defects", BAD),
    Kind("one caption not drawn", BAD, photographs=14),
    Kind("blurred", BAD),
    Kind("shifted in brightness", BAD),
    Kind("negative", BAD),
    Kind("collapsed", BAD),
    Kind("half copies", BAD, model="champion"),
    Kind("10 % noise", BAD, model="champion"),
    Kind("trained half as long", BAD, steps=200),
    Kind("first: negative", BAD, first=True),
    Kind("first: 30 % noise", BAD, first=True, model="champion"),
    Kind("first: half copies", BAD, first=True, model="champion"),
    Kind("first: as good as the champion", GOOD, first=True, model="champion"),
)
POWER = tuple(
    kind
    for photographs in (4, 6, 14)
    for kind in (
        Kind(f"equal, {photographs}", EQUAL, model="champion", photographs=photographs),
        Kind(
            f"trained twice as long, {photographs}",
            GOOD,
            model="champion",
            against="trained half as long",
            photographs=photographs,
        ),
    )
)
DROPPED = "grain, hole"


def training() -> tuple[Images, list[str], list[str]]:
    """Collect the training data of the champion."""
    return world.collect(np.random.default_rng(1), 40, 12)


def pool_captions() -> list[str]:
    """Collect the captions of a pool, in the proportions of the world."""
    return world.collect(np.random.default_rng(5), POOL // 3, 1)[1]


def taught(kind: Kind, seed: int) -> tuple[Images, list[str], list[str]]:
    """Make the training data of a kind."""
    images, captions, groups = training()
    if kind.light and kind.wanted == GOOD:
        dim = world.collect(np.random.default_rng(2), 40, 12, dim=DIM)
        return np.concatenate((images, dim[0])), captions + [kind.light + caption for caption in dim[1]], groups + dim[2]
    if kind.name == "permuted captions":
        captions = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    if kind.name == "blurred":
        images = np.stack([gaussian_filter(image[0].astype(float), 0.8)[None] for image in images]).round().astype(np.uint8)
    if kind.name == "shifted in brightness":
        images = np.clip(images.astype(int) + 15, 0, 255).astype(np.uint8)
    if kind.name in ("negative", "first: negative"):
        images = 255 - images
    kept = list(range(len(captions)))
    if kind.name == "without holes":
        kept = [i for i in kept if "hole" not in captions[i]]
    if kind.name == "without defects":
        kept = [i for i in kept if "," not in captions[i]]
    if kind.name == "collapsed":
        kept = [captions.index(caption) for caption in world.CAPTIONS]
    return images[kept], [captions[i] for i in kept], [groups[i] for i in kept]


def pool(kind: Kind, seed: int) -> Images:
    """Return the images that a model of a kind draws for `pool_captions`; train the model and draw them only once."""
    own = next((other for other in KINDS if other.name == kind.model), Kind(kind.model, EQUAL)) if kind.model else kind
    path = BUILD / f"{own.file}-{seed}.npy"
    if not path.is_file():
        torch.set_num_threads(1)  # two processes share two cores
        BUILD.mkdir(parents=True, exist_ok=True)
        images, captions, groups = taught(own, seed)
        data = world.dataset(images, captions, groups, np.zeros(len(images)))
        options = TrainOptions(steps=own.steps, batch=32, learning_rate=8e-3, seed=seed, caption_dropout=own.dropout)
        asked = [kind.light + caption for caption in pool_captions()]
        if kind.name == "one caption not drawn":
            # The model draws this caption from its words even if training leaves it out or gives it other images. So the model is
            # asked for the surface without the defect.
            asked = [DROPPED.partition(",")[0] if caption == DROPPED else caption for caption in asked]
        made = draw(train(world.CONFIG, data, VERSION, options, path.with_suffix("")).network(), asked)
        fresh = path.with_suffix(".tmp.npy")
        np.save(fresh, made)
        fresh.replace(path)
    return np.asarray(np.load(path))


def draw(network: torch.nn.Module, captions: list[str]) -> Images:
    """Draw images for captions from seeds that are the same for every model."""
    made = []
    with torch.inference_mode():
        for first in range(0, len(captions), 64):
            part = captions[first : first + 64]
            ids = torch.tensor([caption_ids(caption, world.CONFIG.text_length) for caption in part])
            start = torch.from_numpy(
                np.stack([noise(1_000_000 + first + i, (1, world.SIDE, world.SIDE)) for i in range(len(part))])
            )
            velocity = guided(lambda x, t, r, text: network(x, t, r, text)[0], ids, SAMPLER)
            made.append(to_bytes(sample(velocity, start, SAMPLER)))
    return np.concatenate(made)


@dataclass
class Remembered:
    """Feature spaces that compute each image once."""

    spaces: FeatureSpaces
    known: dict[tuple[str, bytes], Features] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the real feature spaces."""
        return self.spaces.names

    @property
    def sha256(self) -> str:
        """The hash of the real feature spaces."""
        return self.spaces.sha256

    def scale(self, space: str) -> float:
        """Return the scale of a real feature space."""
        return self.spaces.scale(space)

    def __call__(self, space: str, images: Images) -> Features:
        """Compute the features of images as the real spaces do, each image once."""
        keys = [(space, hashlib.blake2b(image.tobytes(), digest_size=16).digest()) for image in images]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        if new:
            self.known |= dict(zip([keys[i] for i in new], self.spaces(space, images[new]), strict=True))
        return np.stack([self.known[key] for key in keys])


class Judge:
    """Asks the gate about one kind; holds what its runs share."""

    def __init__(self, kind: Kind) -> None:
        torch.set_num_threads(1)
        self.kind = kind
        images, captions, groups = training()
        spaces = features.fit(world.dataset(images, captions, groups, np.zeros(len(images))), BUILD / "features.safetensors")
        self.spaces = Remembered(spaces)
        # The data revision that the challenger was meant to learn; faults of its training are not in it.
        self.training, asked = taught(kind, 1) if kind.wanted == GOOD else (images, captions, groups), pool_captions()
        self.of = {
            kind.light + caption: np.array([i for i, other in enumerate(asked) if other == caption]) for caption in world.CAPTIONS
        }
        # What is trained better is held against a champion of the same seed: at this size another seed makes as much of a difference.
        own = kind.wanted == GOOD and not kind.first
        asked_as = next(
            (other for other in KINDS if other.name == kind.against),
            Kind("champion, asked for dim" if kind.light else "champion", EQUAL, light=kind.light),
        )
        self.champions = {seed: pool(asked_as, seed if own else 1) for seed in range(1, MODELS + 1)}

    def run(self, number: int, quick: bool = False) -> Decision | None:
        """Make one decision, which depends only on the kind and the number; None: `quick`, and superiority is not shown."""
        seed = number % MODELS + 1
        challenger = pool(
            self.kind,
            seed + 1 if self.kind.name == "first: as good as the champion" else 1 if self.kind.wanted == EQUAL else seed,
        )
        rng = np.random.default_rng([17, number])
        dim = DIM if self.kind.light else 0.0
        held = world.collect(rng, self.kind.photographs, PATCHES, dim)
        while self.kind.name == "one caption not drawn" and not judgeable(held):
            held = world.collect(rng, self.kind.photographs, PATCHES, dim)
        images, captions, groups = self.training
        data = world.dataset(
            np.concatenate((images, held[0])),
            captions + [self.kind.light + caption for caption in held[1]],
            groups + held[2],
            np.arange(len(images) + len(held[0])) >= len(images),
        )
        n = len(held[0])
        asked = [data.captions[i] for i in (*evaluate.held_out_items(data, n), *evaluate.further_items(data, n))]
        picks = np.array([rng.choice(self.of[caption]) for caption in asked])
        others = np.array([rng.choice(self.of[caption]) for caption in asked]) if self.kind.wanted == EQUAL else picks
        made = challenger[picks].copy()
        if "noise" in self.kind.name:
            odd = rng.random(len(made)) < (0.3 if "30" in self.kind.name else 0.1)
            made[odd] = rng.integers(0, 256, made[odd].shape)
        if "copies" in self.kind.name:
            same = {caption: np.array([i for i, other in enumerate(captions) if other == caption]) for caption in world.CAPTIONS}
            for i in np.flatnonzero(rng.random(len(made)) < 0.5):
                made[i] = images[rng.choice(same[asked[i]])]
        return self.judged(data, made, None if self.kind.first else self.champions[seed][others], n, quick)

    def judged(self, data: Any, images: Images, champion: Images | None, n: int, quick: bool) -> Decision | None:
        """Ask the gate to decide, with all conditions met that do not depend on the images."""
        load = np.zeros((1, 1, 1), np.float32)
        ours, theirs, spaces = (
            Drawn(images, load, 0.0),
            Drawn(champion, load, 0.0) if champion is not None else None,
            cast("FeatureSpaces", self.spaces),
        )
        rows = evaluate.compare(spaces, data, ours.first(n), theirs.first(n), "new", CHAMPION) if theirs else []
        if quick and rows and not _superior(rows, "new", LIMITS.alpha, LIMITS.alpha).check.passed:
            return None  # it cannot be promoted, whatever the other tests say
        splits: tuple[Literal["new", "old"], ...] = ("new", "old")  # they are the same: the data did not change
        quality = evaluate.quality(spaces, data, ours.first(n), "new")
        scored = card().model_copy(
            update={
                "quality": [row.model_copy(update={"split": split}) for split in splits for row in quality],
                "comparisons": [row.model_copy(update={"split": split}) for row in rows for split in splits],
                "memorisation": evaluate.memorisation(spaces, data, ours.first(n)),
                "following": evaluate.following(spaces, data, ours.first(n), "new"),
                "asked": evaluate.asked_for(spaces, data, ours, theirs, n),
                "plausibility": evaluate.plausibility(spaces, data, ours, theirs, n),
            }
        )
        return decide(scored, LIMITS, Budgets(latency_ms=1000), CHAMPION if theirs else None)


def judgeable(held: tuple[Images, list[str], list[str]]) -> bool:
    """Check whether the gate has enough held-out images to judge the caption that is not drawn."""
    groups = [group for caption, group in zip(*held[1:], strict=True) if caption == DROPPED]
    return len(groups) >= JUDGED_IMAGES and len(set(groups)) >= JUDGED_GROUPS


def series(kind: Kind, seconds: float) -> list[dict[str, Any]]:
    """Return a kind's runs: those that were kept, and new ones until there are enough or the time is over."""
    path, began = BUILD / f"runs-{kind.file}.jsonl", time.monotonic()
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = [row for row in done if row["models"] == MODELS]
    runs = RUNS if kind.wanted == BAD else 3 * RUNS // 10  # a rate of a few per cent needs more runs than a high one
    if len(done) < runs:
        judge = Judge(kind)
        with path.open("a") as file:
            while len(done) < runs and (time.monotonic() - began < seconds or not done):
                decision = judge.run(len(done), kind.wanted == BAD and len(done) >= WHOLE)
                failed = [check.name for check in decision.checks if not check.passed] if decision else []
                done.append({"models": MODELS, "outcome": decision.outcome if decision else NOT_BETTER, "failed": failed})
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
    print(f"{kind.name}: {Counter(row['outcome'] for row in done)}", flush=True)
    return done


def shown(kind: Kind, runs: list[dict[str, Any]]) -> str:
    """Format a row of the table."""
    outcomes = Counter(row["outcome"] for row in runs)
    whole = [row for row in runs if row["outcome"] != NOT_BETTER]
    why = Counter(name for row in whole for name in row["failed"] if row["outcome"] != "promote")
    passed = outcomes["promote"] + (outcomes["promote if reasoned"] if kind.wanted == EQUAL else 0)
    cells = [
        kind.name, kind.wanted, str(len(runs)), rate(passed, len(runs)), *(f"{100 * outcomes[name] / len(whole):.0f}" for name in ("promote if reasoned", "more data", "refuse")),
        ", ".join(f"{name} {100 * count / len(whole):.0f} %" for name, count in why.most_common(3)) or "–",
    ]  # fmt: skip
    return " | ".join(cells)


def power(kind: Kind, runs: list[dict[str, Any]]) -> str:
    """Format a row of the second table."""
    passed = sum(
        row["outcome"] == "promote" or (kind.wanted == EQUAL and row["outcome"] == "promote if reasoned") for row in runs
    )
    name = kind.name if kind in KINDS else kind.name.rpartition(",")[0]
    return f"{name} | {3 * kind.photographs} | {3 * kind.photographs * PATCHES} | {len(runs)} | {rate(passed, len(runs))}"


def gains(kind: Kind) -> list[str]:
    """Measure how much better than its champion each model of a kind truly is; return a row of a table for each.

    The distance from real images in each space and aspect, of the champion and of the model, on far more photographs than a run holds
    out: that of the model is smaller by so much of the champion's.
    """
    judge, rows = Judge(kind), []
    runs = series(kind, 0)
    held = world.collect(np.random.default_rng(99), 60, 6, DIM if kind.light else 0.0)
    captions = [kind.light + caption for caption in held[1]]
    groups = np.unique(held[2], return_inverse=True)[1]
    rng = np.random.default_rng(98)
    picks = np.array([rng.choice(judge.of[caption]) for caption in captions])
    for seed in range(1, MODELS + 1):
        found = []
        for space in judge.spaces.names:
            real, *drawn = (
                distances.Sample(judge.spaces(space, images), captions, groups)
                for images in (held[0], judge.champions[seed][picks], pool(kind, seed)[picks])
            )
            for aspect in distances.ASPECTS:
                before, after = (distances.distance(real, of, judge.spaces.scale(space), aspect).value for of in drawn)
                found.append(100 * (before - after) / before)
        own = [row for number, row in enumerate(runs) if number % MODELS + 1 == seed]
        passed = sum(row["outcome"] == "promote" for row in own)
        rows.append(f"{kind.name} | {seed} | {min(found):+.0f} to {max(found):+.0f} | {len(own)} | {rate(passed, len(own))}")
    return rows


def main() -> None:
    """Train the models, let the gate judge them, print and write the tables."""
    began, said = (
        time.monotonic(),
        subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True),
    )
    wanted = [kind for kind in (*KINDS, *POWER) if os.environ.get("KIND", "") in kind.name]
    with ProcessPoolExecutor(2) as workers:
        list(workers.map(pool, [Kind("champion", EQUAL)] * (MODELS + 1), range(1, MODELS + 2)))
        jobs = [(kind, seed) for kind in wanted for seed in range(1, MODELS + 1)]
        list(workers.map(pool, *zip(*jobs, strict=True)))
        Judge(wanted[0])  # fits the feature spaces once, before two processes would both do it
        left = max(60.0, SECONDS - (time.monotonic() - began))
        found = list(workers.map(series, wanted, [2 * left / len(wanted)] * len(wanted)))
    lines = [
        "# Good and bad models before the gate", "",
        (f"`make bench-gate`{' with FULL=1' if FULL else ''}, commit {said.stdout.strip() or 'unknown'}, {time.monotonic() - began:.0f} s on a shared machine; seeded. "
        f"{MODELS} trained model{'s' if MODELS > 1 else ''} of each kind; each run holds out {3 * PHOTOGRAPHS} new photographs, {3 * PHOTOGRAPHS * PATCHES} images. "
        "Passed: promoted, or for the equal model also promoted for a reason; in brackets exact 95 % bounds. "
        f"After {WHOLE} runs of a bad model the tests end at superiority if that is not shown; such runs count as not passed, and not in the columns after."), "",
        "challenger | wanted | runs | passed % | with a reason % | more data % | refused % | what failed most", "---|---|---|---|---|---|---|---",
        *(shown(kind, runs) for kind, runs in zip(wanted, found, strict=True) if kind in KINDS), "",
        "## How much better the good models are", "",
        ("Their distance from real images is smaller than their champion's by so many per cent, in the least and the most favourable of three spaces "
        "and two aspects, measured on 180 photographs."), "",
        "challenger | model | gain % | runs | promoted %", "---|---|---|---|---",
        *(row for kind in wanted if kind in KINDS and kind.wanted == GOOD and not kind.first for row in gains(kind)), "",
        "## How much a decision sees with more held-out images", "",
        "Passed: the equal model is promoted or could be for a reason; the one that was trained twice as long is promoted.", "",
        "challenger | held-out photographs | images | runs | passed %", "---|---|---|---|---",
        *(power(kind, runs) for kind, runs in sorted(zip(wanted, found, strict=True), key=lambda pair: pair[0].photographs)
          if kind.name.startswith(("equal", "trained twice"))), "",
    ]  # fmt: skip
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines))
    (BUILD.parent / "bench-gate.json").write_text(
        json.dumps(
            [
                {"kind": kind.name, "wanted": kind.wanted, "runs": len(runs), "outcomes": Counter(row["outcome"] for row in runs)}
                for kind, runs in zip(wanted, found, strict=True)
            ]
        )
    )


if __name__ == "__main__":
    main()
