"""Guided progressive distillation: a student that takes in one step what its teacher takes in two (Salimans and Ho 2022).

`full` (56 guided steps) teaches `dev` (28), `dev` teaches `fast` (14). A student's network is asked for the mean velocity from
t to r, so that one step x_r = x_t + (r - t) v(x_t, t, r) is exact where the network is; guidance is folded in at the first stage
(Meng et al. 2023), after which a step costs one network evaluation instead of two. Plain regression: no second network is trained.

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
        teacher: in evaluation mode.
        steps: that the student takes from noise to image; the teacher takes twice as many.
        guidance: scale that the teacher is run with; None for a teacher that is itself a student.
    """

    teacher: Network
    steps: int
    guidance: float | None
    _copies: dict[torch.device, Network] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(
        self, images: Tensor, ids: Tensor, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`times` and `aim` for a whole batch: x, t, r and the mean velocity."""
        t, r = self.times(len(images), generator)
        x, velocity = self.aim(images, ids, noise, t, r)
        return x, t, r, velocity

    def times(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where a student's steps begin and end, t and r, both [size]."""
        step = torch.randint(0, self.steps, (size,), generator=generator)
        return 1 - step / self.steps, 1 - (step + 1) / self.steps

    def aim(self, images: Tensor, ids: Tensor, noise: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The point x where a student's step from t to r begins, and the mean velocity that the teacher shows there."""
        middle = (t + r) / 2
        x, _ = add_noise(images, noise, t)
        with torch.no_grad():
            after = self._teach(x, ids, t, middle)
            after = self._teach(after, ids, middle, r)
        return x, (after - x) / (r - t).view(-1, 1, 1, 1)

    def _teach(self, x: Tensor, ids: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """One step of the teacher: Euler's with guidance, or its own mean velocity."""
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
        """The teacher on the device of `x`: itself, or a copy made once; the caller's stays where it is."""
        if x.device == self.teacher.head_mod.device:
            return self.teacher
        if x.device not in self._copies:
            self._copies[x.device] = copy.deepcopy(self.teacher).to(x.device)
        return self._copies[x.device]


def solver(student: VariantName, guidance: float) -> Sampler:
    """What a student has to beat: `full` under a second-order solver with as many network evaluations.

    Args:
        student: a distilled variant.
        guidance: of `full`; with it each step costs two evaluations.
    """
    return Sampler(method="ab2", steps=VARIANTS[student].steps // (1 if guidance == 1 else 2), guidance=guidance)


def stage(teacher: Network, taught_as: VariantName, student: VariantName, guidance: float) -> Teaching:
    """The objective that turns one variant into the next.

    Args:
        teacher: the network of the variant before.
        taught_as: which variant that is.
        student: which variant is wanted.
        guidance: of `full`; a student is run without.

    Raises:
        ConfigError: the student is not taught by that variant.
    """
    if TEACHERS.get(student) != taught_as:
        wanted = TEACHERS.get(student)
        how = f"is taught by {wanted}" if wanted else "is trained, not taught"
        raise ConfigError(f"{student} {how}, not by {taught_as}; distil full, then dev, then fast")
    return Teaching(teacher.eval(), VARIANTS[student].steps, guidance if VARIANTS[taught_as].guided else None)
