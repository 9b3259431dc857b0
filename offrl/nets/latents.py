"""Latents of a trajectory: a diagonal normal or a categorical distribution, from the outputs of a network.

Both give the same four things: the number of outputs they want, a sample that gradients pass, the divergence of two
distributions, and candidates to choose from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offrl.nets import choose, one_hot, per_lane
from offrl.utils.random import LaneRandom

Candidates = tuple[Tensor, Tensor]
LOG_STD = (-5.0, 2.0)  # bounds, so that neither density nor gradient runs away


class Gaussian:
    """z ~ N(mean, diag(std^2)) of `size` dimensions; outputs are means and logarithms of deviations."""

    def __init__(self, size: int) -> None:
        self.size, self.outputs = size, 2 * size

    @staticmethod
    def moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-deviation."""
        mean, log_std = outputs.chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    def sample(self, outputs: Tensor, random: LaneRandom, name: str) -> Tensor:
        """`[lanes, n, size]`, reparametrised."""
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
        """`count` draws `[lanes, n, count, size]`, all of them admitted `[lanes, n, count]`."""
        repeated = outputs.unsqueeze(2).expand(-1, -1, count, -1)
        z = self.sample(repeated, random, name)
        return z, torch.ones_like(z[..., 0], dtype=torch.bool)


class Categorical:
    """z one of `size` kinds, as a one-hot vector; outputs are logits."""

    def __init__(self, size: int) -> None:
        self.size, self.outputs = size, size

    def sample(self, outputs: Tensor, random: LaneRandom, name: str) -> Tensor:
        """`[lanes, n, size]`; the gradient is that of the probabilities (straight through)."""
        kind = choose(outputs.detach(), random.uniform(name, outputs.shape[1:-1]))
        probability = outputs.softmax(-1)
        return one_hot(kind, self.size, outputs.dtype) + (probability - probability.detach())

    def divergence(self, q: Tensor, p: Tensor) -> Tensor:
        """KL(q || p), `[lanes, n]`."""
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def candidates(
        self, outputs: Tensor, count: int, least: float | Tensor, random: LaneRandom, name: str
    ) -> Candidates:
        """Every kind `[lanes, n, size, size]`, and which ones have at least the probability `least` `[lanes, n, size]`."""
        probability = outputs.softmax(-1)
        floor = torch.minimum(probability.amax(-1, keepdim=True), torch.as_tensor(per_lane(least, 2)))
        kinds = torch.eye(self.size, dtype=outputs.dtype, device=outputs.device)
        return kinds.expand(*outputs.shape[:2], -1, -1), probability >= floor
