"""Distributions of a latent z: a diagonal Gaussian or a categorical one, parametrised by the outputs of a network.

Both have the same interface: the number of network outputs, a differentiable sample, the KL divergence of two distributions,
and candidates among which acting chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offrl.nets.actors import choose, one_hot
from offrl.nets.lanes import per_lane
from offrl.utils.random import LaneRandom

Candidates = tuple[Tensor, Tensor]
LOG_STD = (-5.0, 2.0)  # bounds of log std, so that density and gradient stay finite


class Gaussian:
    """z ~ N(mean, diag(std^2)) with `size` dimensions; the outputs are mean and log std."""

    def __init__(self, size: int) -> None:
        self.size, self.outputs = size, 2 * size

    @staticmethod
    def moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std."""
        mean, log_std = outputs.chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    def sample(self, outputs: Tensor, random: LaneRandom, name: str) -> Tensor:
        """Reparametrised samples `[lanes, n, size]`; `name` names the random stream."""
        mean, log_std = self.moments(outputs)
        return mean + log_std.exp() * random.normal(name, mean)

    def divergence(self, q: Tensor, p: Tensor) -> Tensor:
        """KL(q || p), `[lanes, n]`."""
        (mean, log_std), (prior_mean, prior_log_std) = self.moments(q), self.moments(p)
        squares = ((2 * log_std).exp() + (mean - prior_mean).square()) * (-2 * prior_log_std).exp()
        return (prior_log_std - log_std + 0.5 * squares - 0.5).sum(-1)

    def candidates(
        self, outputs: Tensor, count: int, least: float | Tensor, random: LaneRandom, name: str
    ) -> Candidates:
        """`count` samples `[lanes, n, count, size]`, and True `[lanes, n, count]`: all of them are admitted.

        An episode's samples depend on its lane and its place, and not on how many others run beside it.
        """
        mean, log_std = (part.unsqueeze(2) for part in self.moments(outputs))
        noise = random.normal_rows(name, outputs.shape[1], count * self.size).to(outputs.dtype)
        z = mean + log_std.exp() * noise.unflatten(-1, (count, self.size))
        return z, torch.ones_like(z[..., 0], dtype=torch.bool)


class Categorical:
    """z is a one-hot vector of `size` categories; the outputs are logits."""

    def __init__(self, size: int) -> None:
        self.size, self.outputs = size, size

    def sample(self, outputs: Tensor, random: LaneRandom, name: str) -> Tensor:
        """One-hot samples `[lanes, n, size]`, whose gradient is that of the probabilities (straight-through estimator)."""
        category = choose(outputs.detach(), random.uniform(name, outputs.shape[1:-1]))
        probability = outputs.softmax(-1)
        return one_hot(category, self.size, outputs.dtype) + (probability - probability.detach())

    def divergence(self, q: Tensor, p: Tensor) -> Tensor:
        """KL(q || p), `[lanes, n]`."""
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def candidates(
        self, outputs: Tensor, count: int, least: float | Tensor, random: LaneRandom, name: str
    ) -> Candidates:
        """Every category `[lanes, n, size, size]`, and whether its probability is at least `least` `[lanes, n, size]`."""
        probability = outputs.softmax(-1)
        floor = torch.minimum(probability.amax(-1, keepdim=True), torch.as_tensor(per_lane(least, 2)))
        categories = torch.eye(self.size, dtype=outputs.dtype, device=outputs.device)
        return categories.expand(*outputs.shape[:2], -1, -1), probability >= floor
