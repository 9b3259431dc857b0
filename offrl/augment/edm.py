"""Diffusion as Karras et al. frame it: preconditioning, noise levels, training loss and the stochastic sampler.

Karras, Aittala, Aila & Laine, "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), NeurIPS 2022 (arXiv
2206.00364). Clean data x, noise level sigma, noised y = x + sigma n. Data are standardised, so sigma_data is 1.

`sampler=reference` is the sampler of the authors of policy-guided diffusion (EmptyJackson/policy-guided-diffusion): Euler's
step starts from the point before noise was added, with the slope computed after. For data N(0, 1) and the exact denoiser it
leaves a variance of 1.06 with 256 steps and 1.79 with 32, EDM's 1.01 and 1.10. It exists for reproduction only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offrl.utils.errors import OffrlError

SIGMA_DATA = 1.0
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # noise levels of training (EDM, table 1)

Denoise = Callable[[Tensor, float], Tensor]


@dataclass
class SamplerConfig:
    steps: int = 32  # N, number of noise levels; a run costs 2 N - 1 calls of the network (the authors: 256)
    churn: float = 0.0  # S_churn, fresh noise per run; 0: the deterministic ODE (the authors: 80; only with many steps)
    sampler: Literal["edm", "reference"] = "edm"  # reference: the authors' variant, see the module
    order: Literal[1, 2] = 2  # 2: Heun; 1: Euler, half the calls and far less accurate
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0  # exponent that makes levels denser near sigma_min
    churn_min: float = 0.05  # S_tmin, smallest level that gets fresh noise
    churn_max: float = 50.0  # S_tmax, largest one
    churn_noise: float = 1.003  # S_noise, inflation of it

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise OffrlError(f"augment.sampling.steps={self.steps} should be at least 2.")
        if not 0 < self.sigma_min < self.sigma_max:
            raise OffrlError("augment.sampling: sigma_min should be above 0 and below sigma_max.")
        if self.churn < 0 or self.rho <= 0:
            raise OffrlError("augment.sampling: churn should be at least 0 and rho above 0.")

    def levels(self) -> list[float]:
        """sigma_0 ... sigma_{N-1} from sigma_max down to sigma_min, then 0 (EDM, equation 5)."""
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return [(high + i / (self.steps - 1) * (low - high)) ** self.rho for i in range(self.steps)] + [0.0]

    def gamma(self, sigma: float) -> float:
        """Relative increase of a level by fresh noise."""
        if not self.churn_min <= sigma <= self.churn_max:
            return 0.0
        return min(self.churn / self.steps, math.sqrt(2) - 1)


def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and c_noise (EDM, table 1)."""
    total = sigma.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def precondition(network: Callable[[Tensor, Tensor], Tensor], noised: Tensor, sigma: Tensor) -> Tensor:
    """D(y; sigma) = c_skip y + c_out F(c_in y, c_noise).

    Args:
        network: F; takes `[B, L, D]` and c_noise `[B]` (or `[1]`, when all share it).
        noised: `[B, L, D]`; sigma: `[B]` or `[1]`.
    """
    skip, out, into, level = scalings(sigma)
    skip, out, into = (c.view(-1, 1, 1).to(noised.dtype) for c in (skip, out, into))
    return skip * noised + out * network(into * noised, level.to(noised.dtype))


def loss(network: Callable[[Tensor, Tensor], Tensor], clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean of lambda(sigma) (D - x)^2, lambda = (sigma^2 + sd^2) / (sigma sd)^2; one sigma per trajectory.

    Args:
        clean, noise: `[B, L, D]`; sigma: `[B]`.
    """
    denoised = precondition(network, clean + sigma.view(-1, 1, 1) * noise, sigma)
    weight = (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()
    return (weight.view(-1, 1, 1) * (denoised - clean).square()).mean()


class Guide:
    """Guidance of a sampler; this one changes nothing."""

    def move(self, x: Tensor, step: int, sigma: float, denoise: Denoise) -> Tensor:
        """The sample with which a step starts."""
        return x

    def denoised(self, clean: Tensor, noised: Tensor, sigma: float) -> Tensor:
        """The replacement of a denoised sample, wherever a slope is computed."""
        return clean


@torch.no_grad()
def sample(denoise: Denoise, noise: Callable[[str], Tensor], cfg: SamplerConfig, guide: Guide | None = None) -> Tensor:
    """Draw samples: EDM's algorithm 2.

    Args:
        denoise: D(y, sigma).
        noise: function of a unique name that returns standard normals of the samples' shape.
        guide: guidance; None: none.
    """
    levels = cfg.levels()

    def slope(y: Tensor, sigma: float) -> Tensor:
        clean = denoise(y, sigma)
        clean = clean if guide is None else guide.denoised(clean, y, sigma)
        return (y - clean) / sigma

    x = levels[0] * noise("start")
    for i, (sigma, following) in enumerate(zip(levels[:-1], levels[1:])):
        if guide is not None:
            x = guide.move(x, i, sigma, denoise)
        raised, churned = sigma * (1 + cfg.gamma(sigma)), x
        if raised > sigma:
            churned = x + math.sqrt(raised**2 - sigma**2) * cfg.churn_noise * noise(f"churn/{i}")
        start = churned if cfg.sampler == "edm" else x
        first = slope(churned, raised)
        euler = start + (following - raised) * first
        if following > 0 and cfg.order == 2:
            second = slope(euler, following)
            x = churned + (following - raised) * (first + second) / 2
        else:
            x = euler
    return x
