"""COMBO: CQL on the dataset and a model's rollouts, whose critics are lowered at both and raised at the dataset's pairs.

Yu, Kumar, Rafailov, Rajeswaran, Levine & Finn, "COMBO: Conservative Offline Model-Based Policy Optimization", NeurIPS 2021
(arXiv 2102.08363). Its authors released no code; the update is that of yihaosun1124/OfflineRL-Kit (`combo.py`), whose scores
are the ones to compare with. There is no penalty and no uncertainty: rows of the model (`augment=world_model`, half of
every batch, which conf/agent/combo.yaml chooses and sets) are known by their index -1. With `augment=none` this is CQL.

Deviations from OfflineRL-Kit: its log-sum-exp runs over 3 values (one action of each kind), since a reshape is lost there, and
is averaged over the draws; here it runs over all 3 n, unless `pooled` is false. The log-density is exact where it adds 1e-6
inside a logarithm. The policy's learning rate is constant unless `actor_decay` lets it fall at every update, where the kit's
takes the same cosine to 0 in stairs of 1,000. The multiplier of `lagrange` and `max_backup` are those of `cql.py`; no
published setting uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.cql import CQL, CQLConfig
from offrl.nets import Adam, Critics, TanhGaussianActor, make_target, per_lane, polyak


@dataclass
class COMBOConfig(CQLConfig):
    cql_alpha: float = 0.5  # weight of the conservative term
    lowered: Literal["mix", "model"] = (
        "mix"  # states whose actions are lowered: of all rows, or of synthetic ones (rho)
    )
    pooled: bool = (
        True  # one log-sum-exp over all sampled actions of a state; false: OfflineRL-Kit's, over one of each kind
    )
    actor_lr: float = 1e-4  # learning rate of the policy and of log alpha
    actor_decay: int = 0  # updates of the policy's cosine decay to a learning rate of zero (0 = constant)
    normalize_obs: bool = False  # standardise observations with the dataset's statistics


class COMBO(CQL):
    """min_Q w (E_{s of both} logsumexp_a Q(s, a) - E_{(s, a) of the data} Q(s, a)) + squared Bellman errors on both."""

    Config = COMBOConfig
    cfg: COMBOConfig
    augmentation = "WM"

    def build(self) -> None:
        super().build()  # settings are checked there
        spec, cfg = self.spec, self.cfg
        self.actor = TanhGaussianActor.of(spec, cfg.hidden, log_std=(-5.0, 2.0))
        self.critics = Critics.of(spec, cfg.hidden if cfg.critic_hidden is None else cfg.critic_hidden, members=2)
        self.critics_target = make_target(self.critics)
        self.log_alpha_prime = nn.Parameter(torch.zeros(spec.lanes))
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr, decay=cfg.actor_decay)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.alpha_prime_optimizer = Adam([self.log_alpha_prime], cfg.critic_lr)

    def soft_maximum(self, q_proposed: Tensor, log_density: Tensor) -> Tensor:
        """`[lanes, 2, batch]`: over all actions at once, or the mean over draws of that over one action of each kind."""
        if self.cfg.pooled:
            return super().soft_maximum(q_proposed, log_density)
        kinds = (q_proposed - log_density.unsqueeze(1)).unflatten(-1, (3, self.cfg.actions))
        soft = (kinds / per_lane(self.cfg.temperature, 4)).logsumexp(-2).mean(-1)
        return per_lane(self.cfg.temperature, 2) * soft

    def conservative_term(self, batch: Batch, q_data: Tensor, q_proposed: Tensor, log_density: Tensor) -> Tensor:
        """`[lanes, 2]`: mean of the soft maximum over lowered states less the mean of Q over the dataset's rows.

        Masks and not slices: shapes are fixed, and the order of a batch's rows is nobody's business here.
        """
        real = (batch.index >= 0).to(q_data.dtype).unsqueeze(1)
        lowered = torch.ones_like(real) if self.cfg.lowered == "mix" else 1 - real
        down = masked_mean(self.soft_maximum(q_proposed, log_density), lowered)
        return (down - masked_mean(q_data, real)).clamp(min=per_lane(self.cfg.diff_min))

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        """Policy, temperature and critics in turn, each after the steps before it, where CQL computes all losses first."""
        policy = self.actor(batch.obs)
        action, log_pi = policy.sample(self.random.normal("policy", batch.action))
        alpha = self.log_alpha.detach().exp()
        actor_loss, metrics = self.actor_loss(batch, policy, action, log_pi, alpha)
        self.actor_optimizer.step(actor_loss)
        self.alpha_optimizer.apply_gradients([self.alpha_gradient(log_pi)])

        with torch.no_grad():
            policy, next_policy = self.actor(batch.obs), self.actor(batch.next_obs)
        target = self.target_value(batch, next_policy, self.log_alpha.detach().exp())
        critic_loss, more = self.critic_loss(batch, policy, next_policy, target)
        self.critic_optimizer.step(critic_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return metrics | more


def masked_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over the last axis of the values whose weight is 1; 0 where there is none."""
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1)
