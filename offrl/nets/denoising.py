"""A denoising diffusion policy: DDPM over actions, with few steps.

Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239), with the variance-preserving
schedule that Wang, Hunt & Zhou (Diffusion-QL, ICLR 2023, arXiv 2208.06193) and IDQL use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from offrl.nets.mlp import MLP
from offrl.nets.spec import Spec
from offrl.utils.random import LaneRandom

Sampler = Literal["posterior", "direct"]


def schedule(steps: int) -> tuple[Tensor, Tensor]:
    """beta_t and abar_t = prod (1 - beta), `[steps]` in float64, t = 1 ... T first to last.

    1 - beta_t = exp(-b / T - (B - b) (2 t - 1) / (2 T^2)) with b = 0.1 and B = 10.
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu")  # also where only shapes are wanted
    alpha = torch.exp(-0.1 / steps - 0.5 * (10 - 0.1) * (2 * t - 1) / steps**2)
    return 1 - alpha, alpha.cumprod(0)


class DenoisingPolicy(nn.Module):
    """Actions a = x_0 of a chain x_T ~ N(0, I), ..., x_0, in units of half the box; the network predicts the noise in x_t.

    The timestep enters through its sine and cosine at `time_dim` / 2 frequencies and two layers. `options` are those of `MLP`.

    Args:
        steps: T.
        sampler: `posterior` (Diffusion-QL): clip the predicted action to [-1, 1], then draw from q(x_{t-1} | x_t, x_0);
            `direct` (IDQL): remove the predicted noise, add noise of variance beta_t, clip x_{t-1} at every step.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        steps: int,
        sampler: Sampler = "posterior",
        time_dim: int = 16,
        **options: Any,
    ) -> None:
        super().__init__()
        if not 1 <= steps <= 1000:
            raise ValueError(f"denoising_steps={steps} should be between 1 and 1000.")
        self.time = MLP(seeds, [time_dim, 2 * time_dim, time_dim], name="denoiser/time", **options)
        self.mlp = MLP(seeds, [action_dim + time_dim + obs_dim, *hidden, action_dim], name="denoiser", **options)
        self.steps, self.sampler, self.time_dim = steps, sampler, time_dim
        self.action_dim, self.noise_dim = action_dim, steps * action_dim
        beta, abar = schedule(steps)
        self.beta, self.abar = beta.tolist(), abar.tolist()
        self.register_buffer("roots", torch.stack([abar.sqrt(), (1 - abar).sqrt()]), persistent=False)
        exponent = torch.arange(time_dim // 2, dtype=torch.float64, device="cpu") / (time_dim // 2 - 1)
        frequency = torch.exp(-math.log(10_000) * exponent)
        self.register_buffer("frequency", frequency, persistent=False)

    roots: Tensor
    frequency: Tensor

    @classmethod
    def of(cls, spec: Spec, hidden: Sequence[int], steps: int, **options: Any) -> Self:
        """A denoising policy of a Spec's observations and actions."""
        return cls(spec.seeds, spec.obs_dim, spec.action_dim, hidden, steps, **options)

    def predict(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Noise in x_t `[lanes, n, A]`, with t `[lanes, n, 1]` = 0 ... T - 1 in the place of 1 ... T, as the authors count."""
        angle = t * self.frequency.to(x.dtype)
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        return self.mlp(torch.cat([x, time, obs], -1))

    def error(self, obs: Tensor, action: Tensor, random: LaneRandom) -> Tensor:
        """Squared error of the predicted noise `[lanes, n, A]` at x_t = sqrt(abar_t) a + sqrt(1 - abar_t) eps.

        Args:
            action: `[lanes, n, A]` in units of half the box.
            random: source of the draws "denoising/eps", normal, and "denoising/t", uniform on the timesteps.
        """
        eps = random.normal("denoising/eps", action)
        t = random.integers("denoising/t", self.steps, (action.shape[1], 1))
        kept, noise = self.roots.to(action.dtype)[:, t]
        return (self.predict(obs, kept * action + noise * eps, t.to(action.dtype)) - eps).square()

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions `[lanes, n, A]` of noise `[lanes, n, T A]`: x_T, then that of the steps T, ..., 2; the last step has none."""
        chain = noise.split(self.action_dim, -1)
        x = chain[0]
        for t in reversed(range(self.steps)):
            eps = self.predict(obs, x, torch.full_like(x[..., :1], t))
            x = self._posterior(x, eps, t) if self.sampler == "posterior" else self._direct(x, eps, t)
            if t > 0:
                x = x + self._std(t) * chain[self.steps - t]
            if t == 0 or self.sampler == "direct":
                x = x.clamp(-1, 1)
        return x

    def _std(self, t: int) -> float:
        if self.sampler == "direct":
            return math.sqrt(self.beta[t])
        return math.sqrt(self.beta[t] * (1 - self.abar[t - 1]) / (1 - self.abar[t]))

    def _posterior(self, x: Tensor, eps: Tensor, t: int) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) at the predicted and clipped x_0."""
        beta, abar, before = self.beta[t], self.abar[t], self.abar[t - 1] if t else 1.0
        x0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-1, 1)
        return beta * math.sqrt(before) / (1 - abar) * x0 + (1 - before) * math.sqrt(1 - beta) / (1 - abar) * x

    def _direct(self, x: Tensor, eps: Tensor, t: int) -> Tensor:
        """(x_t - beta_t eps / sqrt(1 - abar_t)) / sqrt(1 - beta_t)."""
        return (x - self.beta[t] / math.sqrt(1 - self.abar[t]) * eps) / math.sqrt(1 - self.beta[t])
