"""Policies: deterministic, Gaussian and tanh-Gaussian actors, and densities of their actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offrl.nets.mlp import MLP, Drop


class DeterministicActor(nn.Module):
    """pi(s) = centre + scale * tanh(MLP(s)); the box of actions is [low, high] in every dimension; `options` are `MLP`'s."""

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: float,
        high: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, action_dim], name="actor", **options)
        self.scale, self.centre = (high - low) / 2, (high + low) / 2

    def forward(self, obs: Tensor, drop: Drop | None = None) -> Tensor:
        """`[lanes, batch, obs]` to `[lanes, batch, action]`; `drop` as in `MLP`."""
        action = self.mlp(obs, drop=drop).tanh()
        return action if self.scale == 1 and self.centre == 0 else action * self.scale + self.centre


class GaussianActor(nn.Module):
    """pi(. | s) = N(mean(s), diag(sigma^2)) with deviations that no state changes.

    Args:
        squash: mean(s) = centre + scale * tanh(MLP(s)), inside the box of actions, which the deviation is measured in as
            well; otherwise the mean is the MLP's output.
        log_std: bounds of log sigma, which begins at 0.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: float,
        high: float,
        squash: bool = True,
        log_std: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, action_dim], name="actor")
        self.log_std = nn.Parameter(torch.zeros(len(seeds), action_dim))
        self.scale, self.centre = ((high - low) / 2, (high + low) / 2) if squash else (1.0, 0.0)
        self.squash, self.bounds = squash, log_std

    def forward(self, obs: Tensor, drop: Drop | None = None) -> tuple[Tensor, Tensor]:
        """Mean and deviation, `[lanes, batch, action]` each; `drop` as in `MLP`."""
        mean = self.mlp(obs, drop=drop)
        mean = mean.tanh() if self.squash else mean
        std = self.log_std.clamp(*self.bounds).exp().unsqueeze(1) * self.scale
        return mean * self.scale + self.centre, std.expand_as(mean)


def normal_log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """log N(x; mean, diag(std^2)), `[..., A]` to `[...]`."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def categorical_log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log softmax(logits)[index], `[..., kinds]` and `[...]` to `[...]`."""
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class TanhGaussian:
    """The distribution of a = centre + scale tanh(u), u ~ N(mean, exp(log_std)^2), for each dimension of an action.

    Attributes:
        mean, log_std: of u, `[..., A]`.
        low, high: the box of actions.
    """

    mean: Tensor
    log_std: Tensor
    low: float = -1.0
    high: float = 1.0

    def detach(self) -> TanhGaussian:
        return replace(self, mean=self.mean.detach(), log_std=self.log_std.detach())

    def repeated(self) -> TanhGaussian:
        """With an axis before the action's, along which many actions can be drawn or judged."""
        return replace(self, mean=self.mean.unsqueeze(-2), log_std=self.log_std.unsqueeze(-2))

    def median(self) -> Tensor:
        """The action of the mean u, `[..., A]`, which evaluation takes."""
        return self._to_box(self.mean.tanh())

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `[..., A]` from standard normals of that shape, and the log-density `[...]` of tanh(u).

        That density is of actions in units of half the box, so that entropies don't depend on the box.
        """
        u = self.mean + self.log_std.exp() * noise
        return self._to_box(u.tanh()), self._log_density(noise, u)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density `[...]` of actions `[..., A]`; those nearer than 1e-6 to the box's edge count as so near."""
        inside = (2 * action - (self.high + self.low)) / (self.high - self.low)
        u = inside.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        density = self._log_density((u - self.mean) * (-self.log_std).exp(), u)
        return density - action.shape[-1] * math.log((self.high - self.low) / 2)

    def _to_box(self, x: Tensor) -> Tensor:
        return x * ((self.high - self.low) / 2) + (self.high + self.low) / 2

    def _log_density(self, noise: Tensor, u: Tensor) -> Tensor:
        """log N(noise) - log std - log(1 - tanh^2 u), the last as 2 (log 2 - u - softplus(-2 u)), which can't overflow."""
        normal = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the actions, `[..., A]` each, by Gauss and Hermite's rule with 32 nodes."""
        nodes, weights = (torch.as_tensor(x).to(self.mean) for x in np.polynomial.hermite_e.hermegauss(32))
        weights = weights / weights.sum()
        values = (self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes).tanh()
        mean = (values * weights).sum(-1)
        variance = ((values - mean.unsqueeze(-1)).square() * weights).sum(-1)
        return self._to_box(mean), variance.sqrt() * ((self.high - self.low) / 2)


class TanhGaussianActor(nn.Module):
    """pi(.|s), a `TanhGaussian` whose mean and log deviation are the two halves of an MLP's output.

    Args:
        log_std: bounds of the log deviation.
        options: further arguments of `MLP`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: float,
        high: float,
        log_std: tuple[float, float] = (-20.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, 2 * action_dim], name="actor", **options)
        self.bounds, self.box = log_std, (low, high)

    def forward(self, obs: Tensor) -> TanhGaussian:
        """The distribution at `[lanes, batch, obs]`."""
        mean, log_std = self.mlp(obs).chunk(2, -1)
        return TanhGaussian(mean, self.rescale(log_std).clamp(*self.bounds), *self.box)

    def rescale(self, log_std: Tensor) -> Tensor:
        """What is done to the network's log deviation before it is clipped; relatives replace it."""
        return log_std


def one_hot(index: Tensor, kinds: int, dtype: torch.dtype) -> Tensor:
    """`[..., kinds]` of zeros and, at the index, one; without the look at the values that PyTorch's function takes."""
    return (index.unsqueeze(-1) == torch.arange(kinds, device=index.device)).to(dtype)


def choose(logits: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Index of the likeliest kind; with a coin, uniform on [0, 1), a draw from softmax(logits). `[..., kinds]` to `[...]`."""
    if uniform is None:
        return logits.argmax(-1)
    return (logits.double().softmax(-1).cumsum(-1)[..., :-1] <= uniform.unsqueeze(-1)).sum(-1)
