"""Guided progressive distillation: a student learns to take one step where its teacher takes two (Salimans and Ho 2022).

`full` (56 guided steps) teaches `dev` (28), `dev` teaches `fast` (14). A student predicts the mean velocity from t to r, so one
step x_r = x_t + (r - t) v(x_t, t, r) is exact if the prediction is. The first stage also distils guidance (Meng et al. 2023);
after it, a step costs one network evaluation instead of two. Training is plain regression: no second network is trained.

    >>> teaching = Teaching(teacher.network(), steps=28, guidance=2.0)
    >>> student = train(config, dataset, data, options, out, variant="dev", parent=teacher, teacher=teacher, objective=teaching)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import TEACHERS, VARIANTS, VariantName
from model.diffusion import add_noise
from model.errors import ConfigError
from model.network import Network
from model.scorecard import Sampler


@dataclass(frozen=True)
class Teaching:
    """The objective of one stage; see `model.train.Objective`.

    Attributes:
        teacher: network of the teacher, in evaluation mode.
        steps: number of steps of the student from noise to image; the teacher takes twice as many.
        guidance: guidance scale of the teacher; None for a teacher that is itself a student.
    """

    teacher: Network
    steps: int
    guidance: float | None
    _copies: dict[torch.device, Network] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(
        self, images: Tensor, ids: Tensor, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute `times` and `aim` for a whole batch: x, t, r and the mean velocity."""
        t, r = self.times(len(images), generator)
        x, velocity = self.aim(images, ids, noise, t, r)
        return x, t, r, velocity

    def times(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the times t and r at which a student's steps begin and end, both [size]."""
        step = torch.randint(0, self.steps, (size,), generator=generator)
        return 1 - step / self.steps, 1 - (step + 1) / self.steps

    def aim(self, images: Tensor, ids: Tensor, noise: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the point x where a student's step from t to r begins, and the teacher's mean velocity over that step."""
        middle = (t + r) / 2
        x, _ = add_noise(images, noise, t)
        with torch.no_grad():
            after = self._teach(x, ids, t, middle)
            after = self._teach(after, ids, middle, r)
        return x, (after - x) / (r - t).view(-1, 1, 1, 1)

    def _teach(self, x: Tensor, ids: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Take one step of the teacher, and return where it ends: Euler's method with guidance, or its own mean velocity."""
        teacher = self._beside(x)
        v: Tensor
        if self.guidance is None:
            v, _ = teacher(x, t, r, ids)
        elif self.guidance == 1:
            v, _ = teacher(x, t, t, ids)
        else:
            both, _ = teacher(torch.cat((x, x)), torch.cat((t, t)), torch.cat((t, t)), torch.cat((ids, torch.zeros_like(ids))))
            with_caption, without = both.chunk(2)
            v = without + self.guidance * (with_caption - without)
        return x + (r - t).view(-1, 1, 1, 1) * v

    def _beside(self, x: Tensor) -> Network:
        """Return the teacher on the device of `x`: itself, or a copy that is made once; the caller's network is not moved."""
        if x.device == self.teacher.head_mod.device:
            return self.teacher
        if x.device not in self._copies:
            self._copies[x.device] = copy.deepcopy(self.teacher).to(x.device)
        return self._copies[x.device]


def solver(student: VariantName, guidance: float) -> Sampler:
    """Return the sampler that a student has to beat: `full` with a second-order solver at equal network evaluations.

    Args:
        student: a distilled variant.
        guidance: guidance scale of `full`; with guidance each step costs two evaluations.
    """
    return Sampler(method="ab2", steps=VARIANTS[student].steps // (1 if guidance == 1 else 2), guidance=guidance)


def stage(teacher: Network, taught_as: VariantName, student: VariantName, guidance: float) -> Teaching:
    """Build the objective that distils one variant into the next.

    Args:
        teacher: network of the teaching variant; it is set to evaluation mode.
        taught_as: the teaching variant.
        student: the variant to train.
        guidance: guidance scale of `full`; not used for a teacher that is itself a student.

    Raises:
        ConfigError: the student is not taught by that variant.
    """
    if TEACHERS.get(student) != taught_as:
        wanted = TEACHERS.get(student)
        how = f"is taught by {wanted}" if wanted else "is trained, not taught"
        raise ConfigError(f"{student} {how}, not by {taught_as}; distil full, then dev, then fast")
    return Teaching(teacher.eval(), VARIANTS[student].steps, guidance if VARIANTS[taught_as].guided else None)
