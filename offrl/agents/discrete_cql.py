"""Discrete CQL: double Q-learning for integer actions whose critics are lowered at all actions and raised at the dataset's.

Kumar, Zhou, Tucker & Levine, "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020 (arXiv 2006.04779):
CQL(H) of equation 4, whose sum over the actions is exact here. The policy is greedy, so there is no actor. With
`cql_alpha = 0` it is double DQN (van Hasselt, Guez & Silver, AAAI 2016).

Deviations from the paper's Atari experiments: twin critics, of which the smaller value counts, instead of a quantile network;
a moving average instead of hard copies for the target; no frames, since observations are vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import Agent, Batch
from offrl.nets import Adam, DiscreteCritics, make_target, per_lane, polyak


@dataclass
class DiscreteCQLConfig:
    cql_alpha: float = 1.0  # weight of the conservative term; 0: double DQN
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    critic_lr: float = 3e-4  # learning rate
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics
    toy: ClassVar[dict[str, Any]] = {"cql_alpha": 0.1}  # with these it learns the contract tests' toy task


class DiscreteCQL(Agent[DiscreteCQLConfig]):
    """min_Q alpha E_D [logsumexp_a Q(s, a) - Q(s, a_data)] + squared Bellman error; pi(s) = argmax_a min_i Q_i(s, a)."""

    Config = DiscreteCQLConfig
    takes_discrete = True
    takes_continuous = False

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.critics = DiscreteCritics.of(spec, cfg.hidden, members=2)
        self.critics_target = make_target(self.critics)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)

    def act(self, obs: Tensor) -> Tensor:
        """argmax_a min_i Q_i(s, a), `[lanes, n]` int64."""
        return self.critics.q_of_all(obs).amin(1).argmax(-1)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q'_i(s', a') with a' = pi(s'), the choice of the online critics."""
        next_q = self.critics_target(batch.next_obs, self.act(batch.next_obs)).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: half the squared Bellman error plus the weighted conservative difference, summed over the two critics."""
        q = self.critics.q_of_all(batch.obs)
        q_data = self.critics.at(q, batch.action)
        error = 0.5 * (q_data - self.target_value(batch).unsqueeze(1)).square().mean(-1).sum(-1)
        difference = (q.logsumexp(-1) - q_data).mean(-1).sum(-1)
        loss = error + self.cfg.cql_alpha * difference
        metrics = {"critic_loss": loss, "bellman_error": error, "cql_diff": difference}
        return loss, metrics | {"q_data": q_data.mean((1, 2)), "q_best": q.amin(1).amax(-1).mean(-1)}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(batch)
        self.critic_optimizer.step(loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return metrics
