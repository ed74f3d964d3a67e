"""Students: networks that draw in a few evaluations what `full` draws in many, taught on whole trajectories of `full`.

Some hundred noises are drawn through `full` with guidance, and every point on the way is kept. A student learns the mean velocity
over jumps between these points, so a step x_r = x_t + (r - t) v(x_t, t, r) is exact if its prediction is. Jumps have 2 to 16
sixteenths of the way: one student serves 8, 4, 2 and 1 steps. Guidance is in the trajectories, so a step costs one evaluation.
(Progressive distillation (Salimans and Ho 2022) needs a student for each number of steps, and its teacher in each training step;
see docs/decisions/0113 for this and other losses.)

A *thin* student trains the layers that read the time, the first and last convolution and the depthwise convolutions; all other
weights are those of `full`, bit by bit.

    >>> lessons = Trajectories.of(teacher.network(), dataset, Sampler(guidance=2.0), seed=0)
    >>> student = train(config, dataset, data, options, out, variant="turbo", parent=teacher, teacher=teacher, objective=lessons)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.config import VariantName
from model.data import Dataset, mix
from model.diffusion import Velocity, guided, sample
from model.gradients import STATISTICS
from model.network import Network
from model.scorecard import Sampler
from model.train import CURVE, LINEAGE, MASTER, WEIGHTS, Checkpoint, Rows, TrainOptions, load_checkpoint, write_safely
from model.update import FACTORS

SUBSTEPS = 16  # points on a trajectory after the noise; an even grid, as students draw
JUMPS = (2, 4, 8, 16)  # substeps that a student's step may span
TRAJECTORIES = 384
BATCH = 32  # trajectories drawn at a time
CONVERGED_STEPS = 40  # of second order
OF_MASTER = ("start_master", "master", "method", "level", "polished")  # fields of a lineage; a table of full's weights has none
THIN_BEGIN = ("ada.", "time_in.", "time_out.", "head.", "stem.")
THIN_END = ("head_mod", ".mod", ".dw")


def is_thin(name: str) -> bool:
    """Check whether a thin student trains this parameter of the network."""
    return name.startswith(THIN_BEGIN) or name.endswith(THIN_END)


@dataclass(frozen=True)
class Trajectories:
    """The objective of a student; see `model.train.Objective`.

    Attributes:
        points: [SUBSTEPS + 1, N, C, R, R] on the way of `full` from noise to image.
        ids: captions [N, L].
        guidance: scale with which `full` drew them.
        thin: whether most weights stay those of `full`.
    """

    points: Tensor
    ids: Tensor
    guidance: float
    thin: bool = True
    preview: ClassVar[Sampler] = Sampler(method="mean", steps=4, guidance=1.0)

    @property
    def origin(self) -> dict[str, Any]:
        """See `Objective`."""
        return {"guidance": self.guidance, "trajectories": self.points.shape[1], "thin": self.thin}

    @classmethod
    def of(
        cls, teacher: Network, dataset: Dataset, sampler: Sampler, seed: int, *, count: int = TRAJECTORIES, thin: bool = True,
        kept: Path | None = None, identity: str = "", on_drawn: Callable[[int], None] | None = None,
    ) -> Trajectories:  # fmt: skip
        """Draw trajectories of a teacher, or read those that were drawn before.

        Args:
            teacher: network of `full`, in evaluation mode, on the device that shall draw.
            dataset: gives the captions, in the proportions of the training items.
            sampler: its guidance is what the student learns; the trajectories have their own steps.
            seed: of captions and noises.
            count: number of trajectories.
            thin: whether the student is thin.
            kept: file in which they are kept; None: nowhere.
            identity: of teacher and data; trajectories that were kept for others are drawn again.
            on_drawn: called with the number of trajectories drawn so far.
        """
        drawn = sampler.model_copy(update={"method": "ab2", "steps": SUBSTEPS, "shift": 1.0})
        asked = f"{identity} {drawn.sha256} {seed} {count}"
        tensors = _read(kept, asked) if kept else None
        if tensors is None:
            tensors = _draw(teacher, dataset, drawn, seed, count, on_drawn or (lambda _: None))
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_safely(kept, tensors, {"asked": asked})
        return cls(tensors["points"], tensors["ids"], drawn.guidance, thin)

    def trains(self, name: str) -> bool:
        """See `Objective`."""
        return not self.thin or is_thin(name)

    def rows(self, dataset: Dataset, options: TrainOptions, step: int) -> Rows:
        """Draw jumps: points x at times t, the mean velocities to the points at times r, and the captions."""
        del dataset
        generator = torch.Generator().manual_seed(mix(options.seed, step, 2))
        row = torch.randint(self.points.shape[1], (options.batch,), generator=generator)
        jump = torch.tensor(JUMPS)[torch.randint(len(JUMPS), (options.batch,), generator=generator)]
        begin = (torch.rand(options.batch, generator=generator) * (SUBSTEPS // jump)).long() * jump
        x, end = self.points[begin, row], self.points[begin + jump, row]
        t, r = 1 - begin / SUBSTEPS, 1 - (begin + jump) / SUBSTEPS
        return Rows(x, t, r, self.ids[row], (end - x) / (r - t).view(-1, 1, 1, 1))


def _draw(
    teacher: Network, dataset: Dataset, sampler: Sampler, seed: int, count: int, on_drawn: Callable[[int], None]
) -> dict[str, Tensor]:
    """Draw `count` trajectories: their points and their captions' ids."""
    training, config, device = dataset.training(), teacher.config, teacher.head_mod.device
    chosen = np.random.Generator(np.random.Philox(key=mix(seed, 3))).choice(training, count)
    ids = torch.from_numpy(dataset.ids[chosen])
    shape = (count, config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(mix(seed, 4)))
    parts = []
    for first in range(0, count, BATCH):
        rows = slice(first, first + BATCH)
        velocity = guided(lambda *inputs: teacher(*inputs)[0], ids[rows].to(device), sampler)
        parts.append(_points(velocity, noise[rows].to(device), sampler).cpu())
        on_drawn(min(first + BATCH, count))
    return {"points": torch.cat(parts, dim=1), "ids": ids}


@torch.inference_mode()
def _points(velocity: Velocity, noise: Tensor, sampler: Sampler) -> Tensor:
    """Draw images, and return all points on their way: those at which the solver asks for a velocity, and the images."""
    points: list[Tensor] = []

    def noting(x: Tensor, t: float, r: float) -> Tensor:
        points.append(x)
        return velocity(x, t, r)

    image = sample(noting, noise, sampler)
    return torch.stack([*points, image])


def _read(path: Path, asked: str) -> dict[str, Tensor] | None:
    """Read trajectories that were kept; None: there are none, or others."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("asked") != asked:
                return None
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def converged(full: Sampler) -> Sampler:
    """Return a sampler of `full` that more steps hardly change: its images are what variants are measured against."""
    return full.model_copy(update={"method": "ab2", "steps": CONVERGED_STEPS, "shift": 1.0})


def solver(student: Sampler, full: Sampler) -> Sampler:
    """Return the sampler with which `full` takes as many evaluations as a student, or one guided step if that is more."""
    guided_cost = 1 if full.guidance == 1 else 2
    return full.model_copy(update={"method": "ab2", "steps": max(1, student.evaluations // guided_cost), "shift": 1.0})


def carried_over(student: Checkpoint, full: Checkpoint, out: Path) -> Checkpoint:
    """Put the layers of a fielded thin student over a new `full`, without training: devices have these layers already.

    Args:
        student: a thin student of an earlier `full`.
        full: the new one.
        out: folder of the checkpoint; created if missing.
    """
    weights, own = load_file(full.folder / WEIGHTS), load_file(student.folder / WEIGHTS)
    weights |= {name: weight for name, weight in own.items() if is_thin(name)}
    made = {"data": full.lineage.data, "parent": student.weights_sha256, "teacher": full.weights_sha256, "steps": 0}
    out.mkdir(parents=True, exist_ok=True)
    (out / LINEAGE).unlink(missing_ok=True)  # an old lineage must never stand beside new weights
    write_safely(out / WEIGHTS, weights)
    _keep_master(student, out)  # what devices lack of it is still to come
    (out / CURVE).write_text("[]")
    (out / LINEAGE).write_text(student.lineage.model_copy(update=made).model_dump_json(indent=1))
    return load_checkpoint(out)


def as_variant(source: Checkpoint, variant: VariantName, out: Path) -> Checkpoint:
    """Write a checkpoint with the same weights for another variant.

    The weights of `full` become the source of a variant that draws with another sampler table: nothing is trained, so `steps` is 0
    and `parent` names them. A student stays one, for whichever variant it draws.

    Args:
        source: a checkpoint of `full`, or of a student.
        variant: variant of the new checkpoint.
        out: its folder; created if missing.
    """
    made: dict[str, object] = {"variant": variant}
    if source.lineage.teacher is None:
        made |= {"parent": source.weights_sha256, "steps": 0} | dict.fromkeys(OF_MASTER)
    lineage = source.lineage.model_copy(update=made)
    out.mkdir(parents=True, exist_ok=True)
    (out / LINEAGE).unlink(missing_ok=True)  # an old lineage must never stand beside new weights
    shutil.copyfile(source.folder / WEIGHTS, out / WEIGHTS)
    if source.lineage.teacher:
        _keep_master(source, out, FACTORS)
    curve = (source.folder / CURVE).read_text() if source.lineage.teacher else "[]"
    (out / CURVE).write_text(curve)
    (out / LINEAGE).write_text(lineage.model_dump_json(indent=1))
    return load_checkpoint(out)


def _keep_master(source: Checkpoint, out: Path, *more: str) -> None:
    """Copy the master of a checkpoint with what belongs to it, as far as they are there."""
    for name in (MASTER, STATISTICS, *more):
        (out / name).unlink(missing_ok=True)
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, out / name)
