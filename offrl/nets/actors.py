"""Policies: deterministic, Gaussian and tanh-Gaussian actors, and densities of their actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from offrl.nets.box import ActionBox
from offrl.nets.mlp import MLP, Drop
from offrl.nets.spec import Bound, Spec


class _Actor(nn.Module):
    """An actor that can be built from a Spec."""

    @classmethod
    def of(cls, spec: Spec, hidden: Sequence[int], extra_inputs: int = 0, **options: Any) -> Self:
        """An actor of a Spec's observations and actions.

        Args:
            hidden: widths of the hidden layers.
            extra_inputs: width of what the policy sees beside the observation, such as a return or a latent.
            options: further arguments of the class.
        """
        obs_dim = spec.obs_dim + extra_inputs
        return cls(spec.seeds, obs_dim, spec.action_dim, hidden, spec.action_low, spec.action_high, **options)


class DeterministicActor(_Actor):
    """pi(s) = centre + half_width * tanh(MLP(s)), actions between `low` and `high`; `options` are those of `MLP`."""

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: Bound,
        high: Bound,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, action_dim], name="actor", **options)
        self.box = ActionBox(low, high)

    def forward(self, obs: Tensor, drop: Drop | None = None) -> Tensor:
        """`[lanes, batch, O]` to `[lanes, batch, A]`; `drop` as in `MLP`."""
        return self.box.from_unit(self.mlp(obs, drop=drop).tanh())


class GaussianActor(_Actor):
    """pi(. | s) = N(mean(s), diag(std^2)) with a state-independent standard deviation, which is learnt.

    Args:
        squash: mean(s) = centre + half_width * tanh(MLP(s)), inside the bounds of actions, and std is multiplied by
            half_width; otherwise the mean is the MLP's output.
        log_std: bounds of log std, which starts at 0.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: Bound,
        high: Bound,
        squash: bool = True,
        log_std: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, action_dim], name="actor")
        self.log_std = nn.Parameter(torch.zeros(len(seeds), action_dim))
        self.box = ActionBox(low, high) if squash else None
        self.bounds = log_std

    def forward(self, obs: Tensor, drop: Drop | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, `[lanes, batch, A]` each; `drop` as in `MLP`."""
        mean = self.mlp(obs, drop=drop)
        std = self.log_std.clamp(*self.bounds).exp().unsqueeze(1)
        if self.box is not None:
            mean, std = self.box.from_unit(mean.tanh()), std * self.box.half_width
        return mean, std.expand_as(mean)


def normal_log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """log N(x; mean, diag(std^2)), `[..., A]` to `[...]`."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def categorical_log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log softmax(logits)[index], `[..., K]` and `[...]` to `[...]`."""
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class TanhGaussian:
    """The distribution of a = centre + half_width tanh(u), u ~ N(mean, exp(log_std)^2), for each dimension of an action.

    Attributes:
        mean, log_std: mean and log standard deviation of u, `[..., A]`.
        low, high: bounds of actions, numbers or `[A]`.
    """

    mean: Tensor
    log_std: Tensor
    low: float | Tensor = -1.0
    high: float | Tensor = 1.0

    def detach(self) -> TanhGaussian:
        return replace(self, mean=self.mean.detach(), log_std=self.log_std.detach())

    def repeated(self) -> TanhGaussian:
        """The same with an axis before the action's, along which many actions can be drawn or judged."""
        return replace(self, mean=self.mean.unsqueeze(-2), log_std=self.log_std.unsqueeze(-2))

    def median(self) -> Tensor:
        """The action of the mean u, `[..., A]`; evaluation takes it."""
        return self._to_box(self.mean.tanh())

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `[..., A]` from standard normals of that shape, and the log-density `[...]` of tanh(u).

        The density is that of actions in units of half the box, so that entropies don't depend on the box.
        """
        u = self.mean + self.log_std.exp() * noise
        return self._to_box(u.tanh()), self._log_density(noise, u)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density `[...]` of actions `[..., A]`, which are first clipped to a distance of 1e-6 from the bounds."""
        inside = (2 * action - (self.high + self.low)) / (self.high - self.low)
        u = inside.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        density = self._log_density((u - self.mean) * (-self.log_std).exp(), u)
        if isinstance(self._half_width, Tensor):
            return density - self._half_width.log().sum()
        return density - action.shape[-1] * math.log(self._half_width)

    @property
    def _half_width(self) -> float | Tensor:
        return (self.high - self.low) / 2

    def _to_box(self, x: Tensor) -> Tensor:
        return x * self._half_width + (self.high + self.low) / 2

    def _log_density(self, noise: Tensor, u: Tensor) -> Tensor:
        """log N(noise) - log std - log(1 - tanh^2 u), the last as 2 (log 2 - u - softplus(-2 u)), which can't overflow."""
        normal = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the actions, `[..., A]` each, by Gauss-Hermite quadrature with 32 nodes.

        The standard deviation is at least 1e-6 of half the box: where tanh is saturated rounding would leave 0.
        """
        nodes, weights = (torch.as_tensor(x).to(self.mean) for x in np.polynomial.hermite_e.hermegauss(32))
        weights = weights / weights.sum()
        values = (self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes).tanh()
        mean = (values * weights).sum(-1)
        variance = ((values - mean.unsqueeze(-1)).square() * weights).sum(-1)
        return self._to_box(mean), variance.clamp(min=1e-12).sqrt() * self._half_width


class TanhGaussianActor(_Actor):
    """pi(.|s), a `TanhGaussian` whose mean and log std are the two halves of an MLP's output.

    Args:
        log_std: bounds of log std.
        options: further arguments of `MLP`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: Bound,
        high: Bound,
        log_std: tuple[float, float] = (-20.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, 2 * action_dim], name="actor", **options)
        self.bounds, self.box = log_std, ActionBox(low, high)

    def forward(self, obs: Tensor) -> TanhGaussian:
        """The distribution at `[lanes, batch, O]`."""
        mean, log_std = self.mlp(obs).chunk(2, -1)
        return TanhGaussian(mean, self.rescale(log_std).clamp(*self.bounds), self.box.low, self.box.high)

    def rescale(self, log_std: Tensor) -> Tensor:
        """A transformation of the network's log std before it is clipped; the identity, which subclasses replace."""
        return log_std


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """One-hot vectors `[..., size]`; unlike PyTorch's function it does not read the values, so a graph can capture it."""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).to(dtype)


def choose(logits: Tensor, uniform: Tensor | None = None) -> Tensor:
    """The most likely category, or with uniform draws on [0, 1) a sample of softmax(logits): `[..., K]` to `[...]`."""
    if uniform is None:
        return logits.argmax(-1)
    return (logits.double().softmax(-1).cumsum(-1)[..., :-1] <= uniform.unsqueeze(-1)).sum(-1)
