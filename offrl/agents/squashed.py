"""How agents act whose policy is a tanh-squashed Gaussian: SAC-N, CQL and what is built on them."""

from __future__ import annotations

import torch
from torch import Tensor

from offrl.agents.base import Agent, ConfigT
from offrl.nets import TanhGaussianActor
from offrl.utils.random import LaneRandom


class SquashedAgent(Agent[ConfigT]):
    """An agent whose policy is `self.actor`; it acts by the squashed Gaussian's median."""

    actor: TanhGaussianActor

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs).median()

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the squashed policy's actions: the nearest Gaussian, not the policy itself."""
        return self.actor(obs).moments()

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """A sample of the squashed policy."""
        return self.actor(obs).sample(noise)[0]

    @torch.no_grad()
    def explore(self, obs: Tensor, random: LaneRandom) -> Tensor:
        """A sample of the squashed policy."""
        policy = self.actor(self.normalize(obs))
        action, _ = policy.sample(random.normal("explore", policy.mean))
        return self.within_bounds(action)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.actor(obs).log_prob(action)
