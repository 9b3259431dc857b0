"""SAC-N: soft actor-critic with the minimum of N critics as its value.

An, Moon, Kim & Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble", NeurIPS 2021 (arXiv
2110.01548), section 3; the update is that of corl-team/CORL `sac_n.py`, whose scores are the ones to compare with. Where
data are scarce the critics disagree, and the minimum of many is far below their mean: that is the method's pessimism.

Deviations from CORL: one sample of the policy serves the temperature's loss and the actor's (as in the authors' code,
snu-mllab/EDAC; CORL samples two); the log-density is exact where CORL adds 1e-6 inside a logarithm; mean and log std are the
two halves of one layer, with the same distribution of initial weights and the same gradients as two layers; the critics' first
layers are initialised as PyTorch's, where CORL uses the number of outputs for that of inputs.
Kept from CORL, unlike the authors' code: temperature, actor and critics step one after the other, each after the steps before
it; the authors compute all losses first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.squashed import SquashedAgent
from offrl.nets import Adam, Critics, TanhGaussianActor, make_target, per_lane, polyak


@dataclass
class SACNConfig:
    members: int = 10  # N, number of critics
    target_entropy: float | None = None  # entropy of the policy, actions scaled to [-1, 1]; None: minus their dimension
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    alpha_lr: float = 3e-4  # learning rate of log alpha
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"members": 3}  # settings of the contract tests


class SACN(SquashedAgent[SACNConfig]):
    """max_pi E [min_i Q_i(s, a) - alpha log pi(a|s)], a ~ pi(.|s)."""

    Config: ClassVar[type] = SACNConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor = TanhGaussianActor.of(spec, cfg.hidden, log_std=(-5.0, 2.0), bias=0.1, last=1e-3)
        self.critics = Critics.of(spec, cfg.hidden, members=cfg.members, bias=0.1, last=3e-3)
        self.critics_target = make_target(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(spec.lanes))
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], cfg.alpha_lr)
        self.target_entropy = -float(spec.action_dim) if cfg.target_entropy is None else cfg.target_entropy

    def alpha_gradient(self, log_pi: Tensor) -> Tensor:
        """`[lanes]`: gradient by log alpha of -log alpha (log pi(a|s) + target_entropy).

        alpha rises while the policy's entropy is below its target.
        """
        return -(log_pi.detach().mean(-1) + self.target_entropy)

    def actor_loss(
        self, batch: Batch, action: Tensor, log_pi: Tensor, alpha: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of alpha log pi(a|s) - min_i Q_i(s, a) at the policy's sample."""
        q = self.critics(batch.obs, action, frozen=True)
        min_q = q.amin(1)
        loss = (per_lane(alpha) * log_pi - min_q).mean(-1)
        q_std = q.std(1, correction=0).mean(-1)
        return loss, {"actor_loss": loss, "q": min_q.mean(-1), "q_std": q_std}

    @torch.no_grad()
    def target_value(self, batch: Batch, alpha: Tensor) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) (min_i Q'_i(s', a') - alpha log pi(a'|s'))."""
        action, log_pi = self.actor(batch.next_obs).sample(self.random.normal("target", batch.action))
        next_value = self.critics_target(batch.next_obs, action).amin(1) - per_lane(alpha) * log_pi
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_value

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean squared error, summed over the critics; EDAC adds a term."""
        q = self.critics(batch.obs, batch.action)
        loss = (q - target.unsqueeze(1)).square().mean(-1).sum(-1)
        return loss, {"critic_loss": loss, "q_data": q.mean((1, 2))}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        action, log_pi = self.actor(batch.obs).sample(self.random.normal("policy", batch.action))
        self.alpha_optimizer.apply_gradients([self.alpha_gradient(log_pi)])
        alpha = self.log_alpha.detach().exp()

        actor_loss, metrics = self.actor_loss(batch, action, log_pi, alpha)
        self.actor_optimizer.step(actor_loss)

        critic_loss, more = self.critic_loss(batch, self.target_value(batch, alpha))
        self.critic_optimizer.step(critic_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return {**metrics, **more, "alpha": alpha, "entropy": -log_pi.mean(-1)}
