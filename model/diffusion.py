"""The training objective and the samplers, as plain functions of a velocity field.

Rectified flow (Liu et al. 2022; Lipman et al. 2022): x_t = (1 - t) x_0 + t e, with t = 0 the image and t = 1 Gaussian
noise e; the network learns the velocity v = e - x_0. Times are drawn logit-normal (Esser et al. 2024).

A sampler integrates dx/dt = v from t = 1 to t = 0 over a table of times. All samplers have the same signature; `session`
runs them with ONNX Runtime, `watch` and the tests with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from model.errors import ConfigError
from model.scorecard import Sampler

Velocity = Callable[[Tensor, float, float], Tensor]
"""(x [B, C, R, R], t, r) → v [B, C, R, R]"""


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point on the straight path at time t [B], and the velocity there; both are [B, C, R, R]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x0 + t * noise, noise - x0


def logit_normal(size: int, generator: torch.Generator) -> Tensor:
    """Draw times in (0, 1), [size], denser in the middle, where the velocity is hardest to predict."""
    return torch.sigmoid(torch.randn(size, generator=generator))


def guided(network: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], ids: Tensor, sampler: Sampler) -> Velocity:
    """Return the velocity field for captions `ids` [B, L] with classifier-free guidance (Ho and Salimans 2022).

    A guided velocity extrapolates past the one with the caption and costs two evaluations. Outside the sampler's interval of
    times (Kynkäänniemi et al. 2024) there is no guidance.

    Args:
        network: (x, t [B], r [B], ids) → v.
        ids: captions; the unconditional velocity is computed for all zeros, "no caption".
        sampler: gives the scale of the guidance, and the times at which it applies.
    """
    guidance = sampler.guidance

    def velocity(x: Tensor, t: float, r: float) -> Tensor:
        B = x.shape[0]
        if not sampler.guides(t):
            return network(x, torch.full((B,), t, device=x.device), torch.full((B,), r, device=x.device), ids)
        begin, end = torch.full((2 * B,), t, device=x.device), torch.full((2 * B,), r, device=x.device)
        both = network(torch.cat((x, x)), begin, end, torch.cat((ids, torch.zeros_like(ids))))
        with_caption, without = both.chunk(2)
        return without + guidance * (with_caption - without)

    return velocity


def sample_euler(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """Integrate with Euler's method: one evaluation a step."""
    for t, s in pairwise(times):
        x = x + (s - t) * velocity(x, t, t)
    return x


def sample_heun(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """Integrate with Heun's second-order method, two evaluations a step (Karras et al. 2022, algorithm 1, without churn)."""
    for t, s in pairwise(times):
        v = velocity(x, t, t)
        guess = x + (s - t) * v
        x = x + (s - t) * (v + velocity(guess, s, s)) / 2
    return x


def sample_ab2(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """Integrate with the second-order Adams-Bashforth method: one evaluation a step.

    Each step extrapolates the last two velocities, weighted by the ratio of the steps where these are unequal. The first
    step is Euler's.
    """
    before: tuple[Tensor, float] | None = None
    for t, s in pairwise(times):
        h = s - t
        v = velocity(x, t, t)
        if before is None:
            x = x + h * v
        else:
            ratio = h / (2 * before[1])
            x = x + h * ((1 + ratio) * v - ratio * before[0])
        before = (v, h)
    return x


def sample_mean(velocity: Velocity, x: Tensor, times: list[float]) -> Tensor:
    """Integrate with the mean velocity over each step, which students predict: one evaluation a step."""
    for t, s in pairwise(times):
        x = x + (s - t) * velocity(x, t, s)
    return x


SAMPLERS: dict[str, Callable[[Velocity, Tensor, list[float]], Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "ab2": sample_ab2,
    "mean": sample_mean,
}


def sample(velocity: Velocity, noise: Tensor, sampler: Sampler) -> Tensor:
    """Draw images [B, C, R, R], approximately in [-1, 1], from noise of that shape.

    Raises:
        ConfigError: the sampler names a method that does not exist.
    """
    try:
        method = SAMPLERS[sampler.method]
    except KeyError:
        raise ConfigError(f"there is no sampler {sampler.method!r}; choose one of {', '.join(SAMPLERS)}") from None
    return method(velocity, noise, sampler.times)
