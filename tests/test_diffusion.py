"""The path between image and noise, and the solvers that follow it back."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.diffusion import SAMPLERS, Velocity, add_noise, guided, logit_normal, sample
from model.errors import ConfigError
from model.scorecard import Sampler


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch, so that the random numbers are the same every time."""
    torch.manual_seed(0)


def swing(x: Tensor, t: float, _: float) -> Tensor:
    """Return the field x' = 3 cos(3t) x, whose solution is x(0) = x(1) exp(-sin 3)."""
    return 3 * math.cos(3 * t) * x


def even(times: list[float]) -> list[float]:
    return times


def bent(times: list[float]) -> list[float]:
    return [t**1.5 for t in times]


def alternating(times: list[float]) -> list[float]:
    """Move every other time, so that every other step is twice as long as the one before it."""
    return [t + (times[0] - times[1]) / 3 * (i % 2) for i, t in enumerate(times)]


def error_of(method: str, times: list[float]) -> float:
    end = SAMPLERS[method](swing, torch.ones((1, 1, 1, 1), dtype=torch.float64), times)
    return abs(float(end) - math.exp(-math.sin(3)))


def test_path_ends_in_image_and_noise() -> None:
    image, noise = torch.randn(2, 3, 1, 4, 4)
    start, v = add_noise(image, noise, torch.zeros(3))
    end, _ = add_noise(image, noise, torch.ones(3))
    assert torch.equal(start, image)
    assert torch.equal(end, noise)
    assert torch.equal(v, noise - image)


def test_velocity_is_slope_of_path() -> None:
    image, noise = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    (before, v), (after, _) = add_noise(image, noise, t), add_noise(image, noise, t + 0.1)
    torch.testing.assert_close((after - before) / 0.1, v)


def test_times_favour_the_middle() -> None:
    t = logit_normal(4000, torch.Generator().manual_seed(0))
    assert ((t > 0) & (t < 1)).all()
    assert float(((t > 0.25) & (t < 0.75)).float().mean()) > 0.65  # half, if the times were uniform
    assert abs(float(t.mean()) - 0.5) < 0.02


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 28, 56, 1000])
@pytest.mark.parametrize("shift", [0.1, 0.5, 1.0, 3.0])
def test_times_fall_to_zero(steps: int, shift: float) -> None:
    times = Sampler(steps=steps, shift=shift).times
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert all(a > b for a, b in pairwise(times))


def test_shift_below_1_shortens_the_steps_at_little_noise() -> None:
    even, shifted = (Sampler(steps=8, shift=shift).times for shift in (1.0, 0.5))
    assert even == [1 - i / 8 for i in range(9)]
    assert shifted[-2] < even[-2]
    assert all(a < b for a, b in zip(shifted[1:-1], even[1:-1], strict=True))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
@pytest.mark.parametrize("warp", [even, bent, alternating])
def test_solver_has_its_order(method: str, order: int, warp: Callable[[list[float]], list[float]]) -> None:
    """Check that half the step divides the error by 2 to the order, on even and on uneven times."""
    errors = [error_of(method, warp(Sampler(steps=steps).times)) for steps in (42, 84, 168)]
    for coarse, fine in pairwise(errors):
        assert 0.85 * 2**order < coarse / fine < 1.15 * 2**order


@pytest.mark.parametrize("method", list(SAMPLERS))
def test_straight_path_needs_one_step(method: str) -> None:
    image, noise = torch.randn(2, 2, 1, 4, 4)
    drawn = sample(lambda *_: noise - image, noise, Sampler(method=method, steps=1))
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-6)


class Counter:
    """A linear stand-in for a network that counts the images it is asked for."""

    def __init__(self) -> None:
        self.images = 0
        self.ids: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, ids: Tensor) -> Tensor:
        assert len(x) == len(t) == len(r) == len(ids)
        self.images += len(x)
        self.ids.append(ids)
        return x * t.view(-1, 1, 1, 1) + ids.sum(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("method", list(SAMPLERS))
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7), (0.0, 0.5)])
def test_evaluations_count_real_calls(method: str, guidance: float, interval: tuple[float, float]) -> None:
    network, ids = Counter(), torch.tensor([[1, 2], [3, 0]])
    sampler = Sampler(method=method, steps=5, guidance=guidance, guidance_low=interval[0], guidance_high=interval[1])
    sample(guided(network, ids, sampler), torch.randn(2, 1, 4, 4), sampler)
    assert network.images == 2 * sampler.evaluations


def test_unguided_network_sees_captions_only() -> None:
    network, ids = Counter(), torch.tensor([[1, 2], [3, 0]])
    x = torch.randn(2, 1, 4, 4)
    v = guided(network, ids, Sampler(guidance=1.0))(x, 0.5, 0.5)
    assert [torch.equal(seen, ids) for seen in network.ids] == [True]
    assert torch.equal(v, network(x, torch.full((2,), 0.5), torch.full((2,), 0.5), ids))


@pytest.mark.parametrize("guidance", [1.0, 2.0, 7.5])
def test_guidance_extrapolates_from_no_caption(guidance: float) -> None:
    network, ids = Counter(), torch.tensor([[1, 2], [3, 0]])
    x, t = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5)
    with_caption, without = network(x, t, t, ids), network(x, t, t, torch.zeros_like(ids))
    v = guided(network, ids, Sampler(guidance=guidance))(x, 0.5, 0.5)
    torch.testing.assert_close(v - without, guidance * (with_caption - without))


@pytest.mark.parametrize(("t", "led"), [(0.8, False), (0.7, True), (0.5, True), (0.2, False)])
def test_guidance_applies_only_in_its_interval(t: float, led: bool) -> None:
    network, ids = Counter(), torch.tensor([[1, 2], [3, 0]])
    x = torch.randn(2, 1, 4, 4)
    within = Sampler(guidance=3.0, guidance_low=0.3, guidance_high=0.7)
    v = guided(network, ids, within)(x, t, t)
    assert torch.equal(v, guided(network, ids, Sampler(guidance=3.0 if led else 1.0))(x, t, t))


def test_empty_interval_of_guidance_is_refused() -> None:
    with pytest.raises(ValidationError, match="guidance_low must lie below guidance_high"):
        Sampler(guidance_low=0.5, guidance_high=0.5)


def test_sampler_of_an_older_ferry_keeps_its_hash() -> None:
    assert Sampler(steps=14).model_dump() == {"method": "ab2", "steps": 14, "guidance": 2.0}


def test_solvers_leave_noise_alone() -> None:
    noise = torch.randn(2, 1, 4, 4)
    kept = noise.clone()
    for method in SAMPLERS:
        sample(swing, noise, Sampler(method=method, steps=3))
    assert torch.equal(noise, kept)


def test_unknown_solver_names_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no sampler 'rk4'; choose one of euler, heun, ab2"):
        sample(swing, torch.ones(1, 1, 1, 1), Sampler.model_construct(method="rk4", steps=2, guidance=1.0))


@pytest.mark.parametrize("field", [{"steps": 0}, {"guidance": 0.5}, {"method": "rk4"}, {"step": 3}])
def test_impossible_sampler_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Sampler.model_validate(field)


def test_velocity_is_asked_at_its_time() -> None:
    asked: list[tuple[float, float]] = []

    def field(x: Tensor, t: float, r: float) -> Tensor:
        asked.append((t, r))
        return x

    solver: Callable[[Velocity, Tensor, list[float]], Tensor] = SAMPLERS["heun"]
    solver(field, torch.ones(1, 1, 1, 1), [1.0, 0.4, 0.0])
    assert asked == [(1.0, 1.0), (0.4, 0.4), (0.4, 0.4), (0.0, 0.0)]
