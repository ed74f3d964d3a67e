"""`make bench-variants`: what solvers and students draw at 56 to 1 evaluations, from one `full` that is committed (flows/bases).

Distances are root mean square differences of pixels, which span 2, from the converged images: those of `full` in 80 evaluations
from the same noise. Intervals are 95 % ones over the images and seeds. Students are trained from three seeds, each with
trajectories, batches and noise of its own. Beside them stand students that other losses make in as many training steps: MeanFlow,
shortcut and progressive distillation. Every part is kept in build/bench/variants, so a killed run resumes.

It prints a table, and writes build/bench/variants.json and tests/bench/results/variants.md.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from infra.base.train import OUT as BASES
from model import photographs
from model.config import ModelConfig
from model.data import Dataset, mix, prepare, to_bytes
from model.diffusion import guided, sample
from model.errors import TrainingError
from model.export import export, pack
from model.graph import build
from model.network import Network
from model.scorecard import DataVersion, Lineage, Sampler
from model.session import Session, noise
from model.students import Trajectories, converged, is_thin, solver
from model.train import LINEAGE, WEIGHTS, Checkpoint, Rows, TrainOptions, load_checkpoint, train, write_safely
from ota.manifest import Origin
from ota.release import bundle

OUT = Path("build/bench/variants.json")
PARTS = Path("build/bench/variants")
TABLE = Path("tests/bench/results/variants.md")
FULL = Sampler()
SEEDS = (0, 1, 2)
IMAGES = 32
SHIFTS = (1.0, 0.7, 0.5, 0.35)
STEPS = (28, 14, 7, 4, 2, 1)  # guided: 56 to 2 evaluations
LESSONS = TrainOptions(steps=160, batch=16, learning_rate=3e-3, warmup=10, decay_from=0.5, stored="bfloat16")
STUDENT_STEPS = (8, 4, 2, 1)
INTERVALS = ((0.0, 1.0), (0.1, 0.9), (0.2, 0.8), (0.3, 1.0), (0.0, 0.7), (0.0, 0.5))
DATA = DataVersion(line="surfaces", path="data", rev="0" * 40, md5="0" * 32 + ".dir", files=1, bytes=1)
TIMED = 9  # images whose median time is taken


@dataclass(frozen=True)
class Setting:
    """The teacher, its data, and the images that others are compared with."""

    full: Checkpoint
    network: Network
    dataset: Dataset
    ids: Tensor
    start: Tensor
    wanted: npt.NDArray[np.float64]

    @classmethod
    def here(cls, folder: Path) -> Setting:
        """Prepare the demo's first delivery, and draw the converged images of held-out captions."""
        full = base(folder / "base")
        photographs.surfaces(folder / "data", 1)
        dataset = prepare(folder / "data", full.lineage.config, folder / "cache", "demo")
        held_out = np.random.default_rng(1).permutation(dataset.reference())[:IMAGES]
        ids = torch.from_numpy(dataset.ids[held_out])
        shape = (1, full.lineage.config.image_size, full.lineage.config.image_size)
        start = torch.from_numpy(np.stack([noise(mix(77, i), shape) for i in range(IMAGES)]))
        made = cls(full, full.network(), dataset, ids, start, np.empty(0))
        return cls(full, made.network, dataset, ids, start, made.draw(made.network, converged(FULL)))

    @torch.inference_mode()
    def draw(self, network: Network, sampler: Sampler) -> npt.NDArray[np.float64]:
        """Draw the held-out captions from the fixed noises."""
        drawn = sample(guided(lambda *inputs: network(*inputs)[0], self.ids, sampler), self.start, sampler)
        return drawn.clamp(-1, 1).numpy().astype(np.float64)

    def distances(self, network: Network, sampler: Sampler) -> list[float]:
        """Return the distance of each image from the converged one."""
        rows: list[float] = np.sqrt(np.square(self.draw(network, sampler) - self.wanted).mean(axis=(1, 2, 3))).tolist()
        return rows


def base(folder: Path) -> Checkpoint:
    """Open the committed base as a checkpoint."""
    config = ModelConfig.model_validate(json.loads((BASES / "surfaces.json").read_bytes())["config"])
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(BASES / "surfaces.safetensors")
    write_safely(folder / WEIGHTS, {name: weight.float() for name, weight in weights.items()})
    lineage = Lineage(
        data=DATA, config=config, variant="full", training_sha256="0" * 64, code="0" * 64, seed=0, parent=None, steps=0, items=0,
        torch=torch.__version__,
    )  # fmt: skip
    (folder / LINEAGE).write_text(lineage.model_dump_json())
    return load_checkpoint(folder)


def kept(name: str, make: Callable[[], Any], parts: Path = PARTS) -> Any:
    """Read a part that was measured before, or measure it."""
    path = parts / f"{name}.json"
    if path.is_file():
        return json.loads(path.read_bytes())
    began = time.process_time()
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(made))
    fresh.replace(path)
    print(f"{name}: {time.process_time() - began:.0f} s of processor time", flush=True)
    return made


# Other losses, in the place of `Trajectories`


@dataclass(frozen=True)
class _Own:
    """What the objectives of the comparison share: a teacher, and data instead of trajectories."""

    teacher: Network
    network: list[Network]
    """The student, once its training has begun: the losses below look at it."""
    preview: ClassVar[Sampler] = Trajectories.preview

    @property
    def origin(self) -> dict[str, Any]:
        return {"guidance": FULL.guidance, "trajectories": 0, "thin": True}

    def trains(self, name: str) -> bool:
        return is_thin(name)

    def begin(self, dataset: Dataset, options: TrainOptions, step: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """Draw images, captions and noise of a step."""
        images, ids = dataset.batch(options.seed, step, options.batch)
        generator = torch.Generator().manual_seed(mix(options.seed, step, 2))
        return images, ids, torch.randn(images.shape, generator=generator), generator

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Compute the teacher's guided velocity."""
        both, _ = self.teacher(torch.cat((x, x)), torch.cat((t, t)), torch.cat((t, t)), torch.cat((ids, torch.zeros_like(ids))))
        with_caption, without = both.chunk(2)
        guided_one: Tensor = without + FULL.guidance * (with_caption - without)
        return guided_one


def _wide(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


class Progressive(_Own):
    """Two guided Euler steps of the teacher become one step of the student, at 4 steps (Salimans and Ho 2022; Meng et al. 2023)."""

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        images, ids, e, generator = self.begin(dataset, options, step)
        at = torch.randint(0, 4, (options.batch,), generator=generator)
        t, r = 1 - at / 4, 1 - (at + 1) / 4
        middle = (t + r) / 2
        x = (1 - _wide(t)) * images + _wide(t) * e
        y = x + _wide(middle - t) * self.velocity(x, t, ids)
        y = y + _wide(r - middle) * self.velocity(y, middle, ids)
        return Rows(x, t, r, ids, (y - x) / _wide(r - t))


class MeanFlow(_Own):
    """The mean velocity by its identity u = v - (t - r) du/dt, with the derivative by a difference (Geng et al. 2025, equation 6)."""

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        images, ids, e, generator = self.begin(dataset, options, step)
        pair = torch.rand((2, options.batch), generator=generator).sort(dim=0, descending=True).values
        t, r = pair[0], torch.where(torch.rand(options.batch, generator=generator) < 0.25, pair[0], pair[1])
        x = (1 - _wide(t)) * images + _wide(t) * e
        v = self.velocity(x, t, ids)
        small = 1e-2 * torch.ones_like(t)
        back = torch.minimum(small, t - r)
        with torch.no_grad():
            student = self.network[0]
            here, before = student(x, t, r, ids)[0], student(x - _wide(back) * v, t - back, r, ids)[0]
        slope = (here - before) / _wide(small)  # over shorter ways, rounding would be most of the difference
        return Rows(x, t, r, ids, v - _wide(t - r) * torch.where(_wide(back < small), 0.0, slope))


class Shortcut(_Own):
    """Jumps learnt from two half jumps of the student itself, a quarter of the batch from the teacher (Frans et al. 2024)."""

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        images, ids, e, generator = self.begin(dataset, options, step)
        jump = 2.0 ** -torch.randint(0, 4, (options.batch,), generator=generator)  # 1, 1/2, 1/4, 1/8
        t = 1 - (torch.rand(options.batch, generator=generator) / jump).floor().clamp(max=7) * jump
        t = t.clamp(min=0).maximum(jump)
        exact = torch.rand(options.batch, generator=generator) < 0.25
        r, middle = t - jump, t - jump / 2
        x = (1 - _wide(t)) * images + _wide(t) * e
        with torch.no_grad():
            student = self.network[0]
            first = student(x, t, middle, ids)[0]
            second = student(x - _wide(jump / 2) * first, middle, r, ids)[0]
        velocity = torch.where(_wide(exact), self.velocity(x, t, ids), (first + second) / 2)
        return Rows(x, t, torch.where(exact, t, r), ids, velocity)


LOSSES: dict[str, type[_Own]] = {"progressive": Progressive, "MeanFlow": MeanFlow, "shortcut": Shortcut}


def student(setting: Setting, objective: Any, seed: int, grid: float, rate: float, out: Path) -> Checkpoint:
    """Train a student from `full`."""
    options = LESSONS.model_copy(update={"seed": seed, "update_grid": grid, "learning_rate": rate})
    return train(
        setting.full.lineage.config, setting.dataset, DATA, options, out, variant="turbo", parent=setting.full, teacher=setting.full,
        objective=objective,
    )  # fmt: skip


def measured(setting: Setting, network: Network) -> dict[str, list[float]]:
    """Measure a student in 8, 4, 2 and 1 steps."""
    return {str(steps): setting.distances(network, Sampler(method="mean", steps=steps, guidance=1.0)) for steps in STUDENT_STEPS}


def trajectories(setting: Setting, seed: int, thin: bool) -> Trajectories:
    """Draw the trajectories of a seed, or read them."""
    kept_in = PARTS / f"trajectories-{seed}.safetensors"
    return Trajectories.of(setting.network, setting.dataset, FULL, seed, thin=thin, kept=kept_in, identity="bench")


def taught(setting: Setting, seed: int, thin: bool, grid: float, rate: float) -> dict[str, Any]:
    """Train a student on trajectories, and measure it."""
    began = time.process_time()
    lessons = trajectories(setting, seed, thin)
    drawn = time.process_time() - began
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        network = student(setting, lessons, seed, grid, rate, Path(folder)).network()
    return {"distances": measured(setting, network), "drawing": drawn, "training": time.process_time() - began}


def otherwise(setting: Setting, name: str, seed: int) -> dict[str, Any]:
    """Train a thin student by another loss in as many steps, and measure it."""
    began, seen = time.process_time(), list[Network]()
    objective = LOSSES[name](setting.network, seen)
    create = Network.train

    def noting(self: Network, mode: bool = True) -> Network:
        if mode and not seen:
            seen.append(self)
        return create(self, mode)

    Network.train = noting  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            network = student(setting, objective, seed, 0.0, LESSONS.learning_rate, Path(folder)).network()
    except TrainingError as error:
        return {"failed": str(error), "training": time.process_time() - began}
    finally:
        Network.train = create  # type: ignore[method-assign]
    return {"distances": measured(setting, network), "training": time.process_time() - began}


def seconds(setting: Setting) -> dict[str, float]:
    """Measure the median milliseconds of an image by ONNX Runtime, one thread, as bfloat16; calls of all variants alternate."""
    config = setting.full.lineage.config
    graph = build(config, "bfloat16").SerializeToString(deterministic=True)
    session = Session(graph, pack(setting.network, "bfloat16"), threads=1)
    ids = session.encode([setting.dataset.captions[0]])
    ways = {f"full, {steps} steps": FULL.model_copy(update={"steps": steps}) for steps in STEPS}
    ways |= {f"student, {steps} steps": Sampler(method="mean", steps=steps, guidance=1.0) for steps in STUDENT_STEPS}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(TIMED + 1):
        for name, way in ways.items():
            began = time.process_time()
            session.generate(ids, [i], way)
            took[name].append(1000 * (time.process_time() - began))
    return {name: float(np.median(rows[1:])) for name, rows in took.items()}


def led(setting: Setting, interval: tuple[float, float]) -> dict[str, Any]:
    """Draw images in 28 evaluations' steps with guidance in an interval, and compare them with real ones by kernel distance."""
    from model import evaluate, features
    from model.evaluate import Drawn

    spaces = features.fit(setting.dataset, PARTS / "spaces.safetensors")
    way = FULL.model_copy(update={"steps": 14, "guidance_low": interval[0], "guidance_high": interval[1]})
    n = 96
    captions = evaluate.held_out_captions(setting.dataset, n)
    row = {caption: i for i, caption in enumerate(setting.dataset.captions)}
    ids = torch.from_numpy(setting.dataset.ids[[row[caption] for caption in captions]])
    shape = setting.start.shape[1:]
    start = torch.from_numpy(np.stack([noise(mix(78, i), tuple(shape)) for i in range(n)]))
    with torch.inference_mode():
        drawn = [
            sample(guided(lambda *inputs: setting.network(*inputs)[0], ids[i : i + 32], way), start[i : i + 32], way)
            for i in range(0, n, 32)
        ]
    images = Drawn(to_bytes(torch.cat(drawn)), np.zeros((1, 1, 1), np.float32), 0.0)
    rows = evaluate.quality(spaces, setting.dataset, images, "new")
    return {"evaluations": way.evaluations, "kd": {q.space: [q.kd, q.kd_se, q.captions_kd, q.captions_se] for q in rows}}


def overlay_bytes(setting: Setting, seed: int, grid: float) -> dict[str, int]:
    """Measure a thin student beside `full` in a bundle: its file on the device, what a device without a base fetches, and `full` alone."""
    lessons = trajectories(setting, seed, True)
    captions = sorted(set(setting.dataset.captions))
    of = {"line": "surfaces", "device_class": "edge", "tier": "nano", "configuration": "I", "precision": "bfloat16"}
    origin = Origin(
        data_rev="0", data_md5="0", code="0" * 64, lineage="0" * 64, scorecard="0" * 64, decision="0" * 64, model="surfaces", version=1
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = student(setting, lessons, seed, grid, LESSONS.learning_rate, folder / "student")
        ways = {"full": (setting.full, FULL.model_copy(update={"steps": 2})), "turbo": (made, Trajectories.preview)}
        exports = {
            name: export(of_it, "bfloat16", way, captions, 5000, folder / name).folder for name, (of_it, way) in ways.items()
        }
        both = bundle.assemble(exports, origin=origin, out=folder / "both", **of)  # type: ignore[arg-type]
        alone = bundle.assemble({"full": exports["full"]}, origin=origin, out=folder / "alone", **of)  # type: ignore[arg-type,dict-item]
        fetched = bundle.make_overlay_delta(both, folder / "deltas")
        thin = both.manifest.overlay("turbo")
        assert thin is not None
        return {"device": thin.size, "fetched": fetched.size if fetched else thin.size, "full": alone.manifest.size}


def interval(rows: list[list[float]]) -> tuple[float, float]:
    """Return the mean over images and seeds, and the half width of its 95 % interval, from the means of images over the seeds."""
    by_image = np.asarray(rows).mean(axis=0)
    among_seeds = np.asarray(rows).mean(axis=1)
    error = by_image.std(ddof=1) / np.sqrt(len(by_image))
    if len(among_seeds) > 1:
        error = np.hypot(error, among_seeds.std(ddof=1) / np.sqrt(len(among_seeds)))
    return float(by_image.mean()), float(1.96 * error)


GRIDS = (0.0, 0.5, 1.0, 2.0)


def main() -> None:
    """Measure all parts, and write the tables."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    PARTS.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        setting = Setting.here(Path(place))
        found: dict[str, Any] = {"solver": {}, "student": {}, "loss": {}, "guidance": {}, "bytes": {}}
        for steps in STEPS:
            for shift in SHIFTS if steps > 1 else SHIFTS[:1]:
                way = FULL.model_copy(update={"steps": steps, "shift": shift})
                found["solver"][f"{steps} {shift:g}"] = kept(
                    f"solver-{steps}-{shift:g}", partial(setting.distances, setting.network, way)
                )
        for thin, rate in ((True, 3e-3), (False, 1e-3)):
            for seed in SEEDS:
                name = f"{'thin' if thin else 'all'}-{seed}"
                found["student"][name] = kept(name, partial(taught, setting, seed, thin, 0.0, rate))
        for grid in GRIDS[1:]:
            found["student"][f"thin-grid-{grid:g}-0"] = kept(
                f"thin-grid-{grid:g}-0", partial(taught, setting, 0, True, grid, LESSONS.learning_rate)
            )
            found["bytes"][f"{grid:g}"] = kept(f"bytes-{grid:g}", partial(overlay_bytes, setting, 0, grid))
        for loss in LOSSES:
            for seed in SEEDS:
                found["loss"][f"{loss}-{seed}"] = kept(f"loss-{loss}-{seed}", partial(otherwise, setting, loss, seed))
        for low, high in INTERVALS:
            found["guidance"][f"{low:g} {high:g}"] = kept(f"guidance-{low:g}-{high:g}", partial(led, setting, (low, high)))
        found["milliseconds"] = kept("milliseconds", partial(seconds, setting))
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one thread"
    found["cpu_seconds"] = round(time.process_time() - began)
    text = table(found)
    print(text)
    OUT.write_text(json.dumps(found, indent=1))
    TABLE.write_text(text)


def table(found: dict[str, Any]) -> str:
    """Write the tables in Markdown."""
    best: dict[int, tuple[float, float, str]] = {}
    lines = [
        "# Variants: solvers and students", "",
        (f"`make bench-variants`; {found['machine']}. The teacher is the committed base of the demo (nano, I, 16 pixels), guidance "
        f"{FULL.guidance:g}. Distances are root mean square differences from its images in {converged(FULL).evaluations} evaluations, over "
        f"{IMAGES} held-out captions, ± a 95 % interval; pixels span 2, so 0.0078 is a grey level of 255."), "",
        "## full with fewer steps (AB2), by the shift of its time grid", "",
        "| steps | evaluations | " + " | ".join(f"shift {s:g}" for s in SHIFTS) + " |", "|---|---|" + "---|" * len(SHIFTS),
    ]  # fmt: skip
    for steps in STEPS:
        cells = []
        for shift in SHIFTS:
            rows = found["solver"].get(f"{steps} {shift:g}")
            if rows is None:
                cells.append("")
                continue
            mean, reach = interval([rows])
            cells.append(f"{mean:.4f} ± {reach:.4f}")
            if steps not in best or mean < best[steps][0]:
                best[steps] = mean, reach, f"{shift:g}"
        lines.append(f"| {steps} | {2 * steps} | " + " | ".join(cells) + " |")
    lines += [
        "", "## Students beside full at equal evaluations", "",
        "| evaluations | full, best grid | thin student | student of all weights | paired: thin − full (even grid) |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for steps in STUDENT_STEPS:
        thin = [found["student"][f"thin-{seed}"]["distances"][str(steps)] for seed in SEEDS]
        whole = [found["student"][f"all-{seed}"]["distances"][str(steps)] for seed in SEEDS]
        own = solver(Sampler(method="mean", steps=steps, guidance=1.0), FULL).steps
        even = found["solver"][f"{own} 1"]
        pairs = interval([[a - b for a, b in zip(row, even, strict=True)] for row in thin])
        mean, reach, shift = best[own]
        full = f"{mean:.4f} ± {reach:.4f} (shift {shift}, {2 * own} evaluations)"
        cells = [f"{m:.4f} ± {r:.4f}" for m, r in (interval(thin), interval(whole))]
        lines.append(f"| {steps} | {full} | {cells[0]} | {cells[1]} | {pairs[0]:+.4f} ± {pairs[1]:.4f} |")
    lines += [
        "",
        "## Grid of the thin student (seed 0)",
        "",
        "| update_grid | 8 | 4 | 2 | 1 | bytes on the device / fetched at first (share of the bundle of full alone) |",
        "|---|---|---|---|---|---|",
    ]
    for grid in GRIDS:
        rows = found["student"]["thin-0" if grid == 0 else f"thin-grid-{grid:g}-0"]["distances"]
        size = found["bytes"].get(f"{grid:g}")
        told = f"{size['device']:,} / {size['fetched']:,} ({size['fetched'] / size['full']:.2%})" if size else "not measured"
        cells = [f"{interval([rows[str(s)]])[0]:.4f}" for s in STUDENT_STEPS]
        lines.append(f"| {grid:g} | {' | '.join(cells)} | {told} |")
    lines += [
        "",
        "## Other losses (thin, as many training steps, three seeds)",
        "",
        "| loss | 8 | 4 | 2 | 1 | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for loss in ("trajectories", *LOSSES):
        parts = [found["student"][f"thin-{s}"] if loss == "trajectories" else found["loss"][f"{loss}-{s}"] for s in SEEDS]
        if failed := [part["failed"] for part in parts if "failed" in part]:
            lines.append(f"| {loss} | {len(failed)} of {len(parts)} runs failed: {failed[0]} | | | | |")
            continue
        cells = [interval([part["distances"][str(s)] for part in parts]) for s in STUDENT_STEPS]
        cpu = float(np.mean([part["training"] + part.get("drawing", 0.0) for part in parts]))
        lines.append(f"| {loss} | " + " | ".join(f"{m:.4f} ± {r:.4f}" for m, r in cells) + f" | {cpu:.0f} |")
    lines += [
        "", "## Guidance in an interval of times (14 steps; kernel distance to held-out images, images alone / with captions, ± its error)", "",
        "| from | to | evaluations | " + " | ".join(next(iter(found["guidance"].values()))["kd"]) + " |",
        "|---|---|---|" + "---|" * len(next(iter(found["guidance"].values()))["kd"]),
    ]  # fmt: skip
    for name, row in found["guidance"].items():
        low, high = name.split()
        cells = [f"{kd:.4f} ± {se:.4f} / {pair:.4f} ± {pair_se:.4f}" for kd, se, pair, pair_se in row["kd"].values()]
        lines.append(f"| {low} | {high} | {row['evaluations']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Time of an image (ONNX Runtime, bfloat16, processor time of one thread)",
        "",
        "| | ms | full's / its |",
        "|---|---|---|",
    ]
    slowest = found["milliseconds"]["full, 28 steps"]
    lines += [f"| {name} | {ms:.1f} | {slowest / ms:.1f} |" for name, ms in found["milliseconds"].items()]
    lines += ["", f"{found['cpu_seconds']:,} s of processor time in this run; parts that were there already took none.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
