"""Preconditioning, noise levels and the sampler, against closed forms for Gaussian data.

For data N(m, s^2) the exact denoiser is linear, and so is every step of a sampler. So a sample is a constant plus a fixed
combination of the normals that were drawn: giving each normal an axis of its own, the sampler itself tells mean and
variance of what it makes, to the last digit and without a random number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from offrl.augment import edm
from offrl.augment.edm import SamplerConfig
from offrl.augment.policy_guided import PerStep, PolicyGuidedConfig
from offrl.utils.errors import OffrlError


def gaussian_denoiser(m: float, s: float) -> Callable[[Tensor, float], Tensor]:
    """E[x | y] for x from N(m, s^2)."""
    return lambda y, sigma: (s**2 * y + sigma**2 * m) / (s**2 + sigma**2)


def axes(steps: int) -> Callable[[str], Tensor]:
    """Each normal that a sampler draws, as a unit vector of its own."""
    unit = torch.eye(steps + 1, dtype=torch.float64)
    return lambda name: unit[0 if name == "start" else 1 + int(name.split("/")[1])]


def moments(cfg: SamplerConfig, m: float = 0.0, s: float = 1.0, guide: edm.Guide | None = None) -> tuple[float, float]:
    """Exact mean and variance of the sampler's output."""
    denoise = gaussian_denoiser(m, s)
    mean = edm.sample(denoise, lambda _: torch.zeros(cfg.steps + 1, dtype=torch.float64), cfg, guide)
    parts = edm.sample(denoise, axes(cfg.steps), cfg, guide) - mean
    return float(mean[0]), float(parts.square().sum())


def recursion(cfg: SamplerConfig, m: float = 0.0, s: float = 1.0) -> tuple[float, float]:
    """Mean and variance after the steps of EDM's algorithm 2 (or the reference's), written out as multipliers."""
    levels = cfg.levels()
    mean, variance = 0.0, levels[0] ** 2
    for sigma, after in zip(levels[:-1], levels[1:]):
        raised = sigma * (1 + cfg.gamma(sigma))
        h, k, k2 = after - raised, raised / (s**2 + raised**2), after / (s**2 + after**2)
        fresh = (raised**2 - sigma**2) * cfg.churn_noise**2
        if after > 0 and cfg.order == 2:
            whole, noise = 1 + h * (k + k2) / 2 + h * h * k * k2 / 2, 1 + h * k / 2 + h * h * k * k2 / 2
        else:
            whole, noise = 1 + h * k, h * k
        variance = whole**2 * variance + (whole if cfg.sampler == "edm" else noise) ** 2 * fresh
        mean = m + whole * (mean - m)
    return mean, variance


# ---- preconditioning ---------------------------------------------------------------------------------------------------


def test_preconditioning_keeps_variances_at_one() -> None:
    sigma = torch.logspace(-4, 4, 50, dtype=torch.float64)
    skip, out, into, level = edm.scalings(sigma)
    torch.testing.assert_close(into**2 * (sigma**2 + 1), torch.ones_like(sigma), rtol=0, atol=1e-12)
    weight = (sigma**2 + 1) / sigma**2
    torch.testing.assert_close(weight * out**2, torch.ones_like(sigma), rtol=0, atol=1e-12)
    # F is to learn a target of variance 1: (x - c_skip y) / c_out for x from N(0, 1).
    target = ((1 - skip) ** 2 + skip**2 * sigma**2) / out**2
    torch.testing.assert_close(target, torch.ones_like(sigma), rtol=0, atol=1e-9)
    torch.testing.assert_close(level, sigma.log() / 4)


def test_preconditioning_at_the_ends() -> None:
    """Without noise D(y) = y whatever the network says; with nothing but noise D is the network's output."""
    y = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def wild(x: Tensor, _: Tensor) -> Tensor:
        return 100 * x.sin() + 7

    clean = edm.precondition(wild, y, torch.tensor([1e-9], dtype=torch.float64))
    torch.testing.assert_close(clean, y, rtol=0, atol=1e-6)
    noisy = edm.precondition(wild, y, torch.tensor([1e9], dtype=torch.float64))
    torch.testing.assert_close(noisy, wild(1e-9 * y, y), rtol=1e-6, atol=1e-6)


def test_loss_of_the_exact_denoiser() -> None:
    """For N(0, 1), F = 0 gives D = y / (1 + sigma^2), which is exact; the weighted error then has mean 1."""
    generator = torch.Generator().manual_seed(0)
    shape = (20_000, 2, 3)
    clean, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = (-1.2 + 1.2 * torch.randn(shape[0], generator=generator, dtype=torch.float64)).exp()
    value = edm.loss(lambda x, _: torch.zeros_like(x), clean, sigma, noise)
    # (x - y c_skip)^2 / c_out^2 is chi-square with one degree of freedom; 120,000 of them.
    assert float(value) == pytest.approx(1.0, abs=4 * math.sqrt(2 / math.prod(shape)))
    other = edm.loss(lambda x, _: 0.5 * x, clean, sigma, noise)
    assert float(other) == pytest.approx(1.25, abs=0.02)  # c_in y has variance 1 and is independent of the error


# ---- noise levels ------------------------------------------------------------------------------------------------------


def test_levels_fall_from_the_largest_to_nothing() -> None:
    cfg = SamplerConfig(steps=256, churn=80)
    levels = cfg.levels()
    assert len(levels) == 257
    assert levels[0] == pytest.approx(80, rel=1e-12)
    assert levels[255] == pytest.approx(0.002, rel=1e-9)
    assert levels[256] == 0
    assert all(a > b for a, b in zip(levels, levels[1:]))
    gammas = [cfg.gamma(sigma) for sigma in levels[:-1]]
    assert max(gammas) == 0.3125
    assert sum(gamma == 0.3125 for gamma in gammas) == 191
    assert set(gammas) == {0.0, 0.3125}
    assert SamplerConfig(steps=100, churn=80).gamma(1.0) == pytest.approx(math.sqrt(2) - 1)


@pytest.mark.parametrize("bad", [{"steps": 1}, {"sigma_min": 0.0}, {"sigma_max": 0.001}, {"churn": -1.0}, {"rho": 0.0}])
def test_settings_without_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(OffrlError, match=r"augment.sampling"):
        SamplerConfig(**bad)


# ---- the sampler -------------------------------------------------------------------------------------------------------

VARIANCES = {  # of samples for N(0, 1): edm with churn, the authors' variant with churn, edm without, Euler with, theirs
    256: (1.0126, 1.0609, 1.0002, 0.8654, 0.0035),
    128: (1.0231, 1.1252, 1.0013, 0.8193, 0.0125),
    64: (1.0430, 1.2842, 1.0059, 0.7841, 0.0427),
    32: (1.0969, 1.7891, 1.0256, 0.7190, 0.1488),
}


@pytest.mark.parametrize("steps", VARIANCES)
def test_variances_of_samples(steps: int) -> None:
    kinds: list[dict[str, Any]] = [
        {"churn": 80.0},
        {"churn": 80.0, "sampler": "reference"},
        {"churn": 0.0},
        {"churn": 80.0, "order": 1},
        {"churn": 80.0, "order": 1, "sampler": "reference"},
    ]
    for kind, expected in zip(kinds, VARIANCES[steps]):
        cfg = SamplerConfig(steps=steps, **kind)
        assert moments(cfg)[1] == pytest.approx(expected, abs=6e-5), kind
        assert moments(cfg)[1] == pytest.approx(recursion(cfg)[1], rel=1e-10), kind


@pytest.mark.parametrize("sampler", ["edm", "reference"])
@pytest.mark.parametrize(("m", "s"), [(0.7, 1.0), (-2.0, 0.3), (0.1, 2.5)])
def test_other_gaussians(m: float, s: float, sampler: Any) -> None:
    cfg = SamplerConfig(steps=64, churn=40.0, sampler=sampler)
    assert moments(cfg, m, s) == pytest.approx(recursion(cfg, m, s), rel=1e-10)


@pytest.mark.parametrize("steps", [32, 64, 256])
def test_the_mean_is_recovered(steps: int) -> None:
    """But for the start at zero under sigma = 80, less than a part in a hundred."""
    for churn in (0.0, 80.0):
        assert moments(SamplerConfig(steps=steps, churn=churn), m=0.7)[0] == pytest.approx(0.7, abs=0.01)


def test_drawn_samples_have_these_moments() -> None:
    """The same with random numbers, which the other tests do without."""
    cfg, n = SamplerConfig(steps=32, churn=80.0), 50_000
    generator = torch.Generator().manual_seed(0)
    x = edm.sample(gaussian_denoiser(0.7, 0.5), lambda _: torch.randn(n, generator=generator, dtype=torch.float64), cfg)
    mean, variance = recursion(cfg, 0.7, 0.5)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize(("order", "expected"), [(1, 2.0), (2, 4.0)])
def test_order_of_convergence(order: Any, expected: float) -> None:
    """Without churn the sampler solves dx/dsigma = x sigma / (s^2 + sigma^2); halving the steps' length halves or quarters
    the error against x_0 s / sqrt(s^2 + sigma_0^2)."""
    s = 0.6
    exact = 80.0 * s / math.sqrt(s**2 + 80.0**2)
    errors = []
    for steps in (64, 128, 256, 512):
        cfg = SamplerConfig(steps=steps, order=order)
        end = edm.sample(gaussian_denoiser(0.0, s), lambda _: torch.ones(1, dtype=torch.float64), cfg)
        errors.append(abs(float(end) - exact))
    ratios = [a / b for a, b in zip(errors, errors[1:])]
    assert ratios[-1] == pytest.approx(expected, rel=0.15), ratios


def test_noise_is_drawn_only_where_it_is_used() -> None:
    """Names are asked for once each, and none but the start's without churn."""
    asked: list[str] = []

    def noise(name: str) -> Tensor:
        asked.append(name)
        return torch.zeros(1)

    edm.sample(gaussian_denoiser(0, 1), noise, SamplerConfig(steps=16))
    assert asked == ["start"]
    asked.clear()
    cfg = SamplerConfig(steps=256, churn=80)
    edm.sample(gaussian_denoiser(0, 1), noise, cfg)
    assert len(asked) == len(set(asked)) == 1 + 191


# ---- guidance in the sampler -------------------------------------------------------------------------------------------


class TowardsTwo(edm.Guide):
    """`per_step` without the actions' coding: the policy is N(2, 1)."""

    def __init__(self, cfg: PolicyGuidedConfig) -> None:
        self.strength = PerStep.strength.__get__(_Holder(cfg))

    def move(self, x: Tensor, step: int, sigma: float, denoise: edm.Denoise) -> Tensor:
        return x + self.strength(step) * (2 - x)


class _Holder:
    def __init__(self, cfg: PolicyGuidedConfig) -> None:
        self.cfg = cfg


def test_strengths_of_the_steps() -> None:
    strength = PerStep.strength.__get__(_Holder(PolicyGuidedConfig(coefficient=0.5, sampling=SamplerConfig(steps=256))))
    assert strength(0) == pytest.approx(0.5 * (1 + 0.3 * math.sin(math.pi / 256)))
    assert sum(strength(i) for i in range(255)) / 0.5 == pytest.approx(177.39, abs=0.01)


@pytest.mark.parametrize(("churn", "mean", "variance"), [(80.0, 0.443, 0.660), (0.0, 0.813, 0.0284)])
def test_guidance_at_every_step(churn: float, mean: float, variance: float) -> None:
    sampling = SamplerConfig(steps=256, churn=churn)
    guide = TowardsTwo(PolicyGuidedConfig(coefficient=0.01, sampling=sampling))
    got = moments(sampling, guide=guide)
    assert got[0] == pytest.approx(mean, abs=6e-4)
    assert got[1] == pytest.approx(variance, abs=6e-4)
