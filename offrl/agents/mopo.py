"""MOPO: soft actor-critic in an ensemble of one-step models, whose rewards are lowered by the models' uncertainty.

Yu, Thomas, Yu, Ermon, Zou, Levine, Finn & Ma, "MOPO: Model-based Offline Policy Optimization", NeurIPS 2020 (arXiv 2005.13239),
algorithm 2; the update is that of yihaosun1124/OfflineRL-Kit (`mopo.py`, `sac.py`), whose scores are the ones to compare with.

The model is the augmentation `world_model`, which conf/agent/mopo.yaml chooses and sets: rollouts of the policy from states of
the dataset, rewards r - c u(s, a), u the ensemble's uncertainty in raw units, in 95 % of every batch. With `augment=none` this
is soft actor-critic on the dataset alone, without any pessimism.

Deviations from OfflineRL-Kit: the log-density is exact where it adds 1e-6 inside a logarithm; the actor's learning rate is
constant unless `actor_decay` lets it fall at every update, where the kit's takes the same cosine to 0 in stairs of 1,000; the
first generation replays the dataset's actions, where its initial policy rolls out. What differs in the model: docs/mopo.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.sac_n import SACN
from offrl.nets import Adam, Critics, TanhGaussianActor, make_target, polyak


@dataclass
class MOPOConfig:
    members: int = 2  # number of critics (10 in Unifloral's MOPO)
    alpha: float | None = None  # fixed temperature; None: learnt, and at most 1
    target_entropy: float | None = None  # entropy of the policy, actions scaled to [-1, 1]; None: minus their dimension
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    actor_lr: float = 1e-4  # learning rate of the actor
    actor_decay: int = 0  # updates of the actor's cosine decay to a learning rate of zero (0 = constant)
    critic_lr: float = 3e-4  # learning rate of the critics
    alpha_lr: float = 1e-4  # learning rate of log alpha
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    least: ClassVar[dict[str, int]] = {"members": 1}


class MOPO(SACN):
    """max_pi E [min_i Q_i(s, a) - alpha log pi(a|s)] in the penalised model."""

    Config: ClassVar[type] = MOPOConfig
    augmentation = "WM"
    cfg: MOPOConfig  # type: ignore[assignment]

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor = TanhGaussianActor.of(spec, cfg.hidden, log_std=(-5.0, 2.0))
        self.critics = Critics.of(spec, cfg.hidden, members=cfg.members)
        self.critics_target = make_target(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(spec.lanes))
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr, decay=cfg.actor_decay)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], cfg.alpha_lr)
        self.target_entropy = -float(spec.action_dim) if cfg.target_entropy is None else cfg.target_entropy

    def temperature(self) -> Tensor:
        """alpha `[lanes]`: the fixed one, or the learnt one up to 1."""
        if self.cfg.alpha is None:
            return self.log_alpha.detach().exp().clamp(max=1.0)
        return torch.ones_like(self.log_alpha.detach()) * self.cfg.alpha

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        alpha = self.temperature()
        critic_loss, metrics = self.critic_loss(batch, self.target_value(batch, alpha))
        self.critic_optimizer.step(critic_loss)

        action, log_pi = self.actor(batch.obs).sample(self.random.normal("policy", batch.action))
        actor_loss, more = self.actor_loss(batch, action, log_pi, alpha)
        self.actor_optimizer.step(actor_loss)
        if self.cfg.alpha is None:
            self.alpha_optimizer.apply_gradients([self.alpha_gradient(log_pi)])
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return {**metrics, **more, "alpha": alpha, "entropy": -log_pi.mean(-1)}
