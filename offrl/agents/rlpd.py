"""RLPD: soft actor-critic from scratch in an environment, with the dataset in half of every batch.

Ball, Smith, Kostrikov & Levine, "Efficient Online Reinforcement Learning with Offline Data", ICML 2023 (arXiv 2302.02948),
algorithm 1; the update is that of the authors' code, ikostrikov/rlpd. Ten critics with layer normalisation, which bounds what
they extrapolate; the target takes the minimum of a random subset of them, the actor their mean; twenty updates of the critics
follow every environment step, and one of the actor.

There is no offline phase: `updates=0 online.steps=N` (docs/online.md). conf/agent/rlpd.yaml sets symmetric sampling, 20 updates
a step and 5,000 random steps. Trained offline, it is soft actor-critic without any pessimism, and diverges on most datasets.

Deviations: initial weights are PyTorch's, those of the policy's last layer within 1e-3, where the authors have Xavier's and
zero biases; the policy's log std is at least -5, as in SAC-N, and not -20; the target evaluates all critics
and picks the subset's values, where the authors evaluate the subset; the numbers are the same. The critics learn from
batches of 256 drawn one after another, where the authors draw the 20 batches of a step at once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.sac_n import SACN
from offrl.nets import Adam, Critics, TanhGaussianActor, make_target, per_lane, polyak


@dataclass
class RLPDConfig:
    members: int = 10  # number of critics
    subset: int = 2  # number of critics, drawn at every update, whose minimum is the target's value
    critic_updates: int = 20  # updates of the critics per update of the actor and of the temperature
    backup_entropy: bool = True  # subtract alpha log pi(a'|s') from the target value
    target_entropy: float | None = None  # entropy of the policy, actions in [-1, 1]; None: minus half their dimension
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    alpha_lr: float = 3e-4  # learning rate of log alpha
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers (three of 256 on AntMaze and Adroit)
    critic_norm: bool = True  # layer normalisation before the critics' ReLUs
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"members": 3, "critic_updates": 2}  # settings of the contract tests


class RLPD(SACN):
    """max_pi E [mean_i Q_i(s, a) - alpha log pi(a|s)], Q_i backed up with the minimum of a random subset."""

    Config = RLPDConfig
    cfg: RLPDConfig  # type: ignore[assignment]

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        if not 1 <= cfg.subset <= cfg.members:
            raise ValueError(f"subset={cfg.subset} should be between 1 and members={cfg.members}.")
        if cfg.critic_updates < 1:
            raise ValueError(f"critic_updates={cfg.critic_updates} should be at least 1.")
        self.period = cfg.critic_updates
        self.actor = TanhGaussianActor.of(spec, cfg.hidden, log_std=(-5.0, 2.0), last=1e-3)
        self.critics = Critics.of(spec, cfg.hidden, members=cfg.members, norm=cfg.critic_norm, norm_first=True)
        self.critics_target = make_target(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(spec.lanes))
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], cfg.alpha_lr)
        self.target_entropy = -spec.action_dim / 2 if cfg.target_entropy is None else cfg.target_entropy

    @classmethod
    def check_online(cls, before: Any, after: Any, online: Any) -> None:
        """Warn where the actor learns less often than the environment is stepped."""
        if after.critic_updates > online.updates_per_step:
            warnings.warn(
                f"The actor makes one update in {after.critic_updates} of the critics, which get {online.updates_per_step} per "
                f"environment step; agent.critic_updates={online.updates_per_step} gives the actor one per step, as published.",
                stacklevel=2,
            )

    def subset_minimum(self, q: Tensor) -> Tensor:
        """`[lanes, batch]`: minimum over a random subset, the lane's own, of `[lanes, members, batch]`."""
        order = self.random.uniform("subset", (self.cfg.members,)).argsort(-1)[:, : self.cfg.subset]
        return q.gather(1, order.unsqueeze(-1).expand(-1, -1, q.shape[-1])).amin(1)

    @torch.no_grad()
    def target_value(self, batch: Batch, alpha: Tensor) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) (min over the subset of Q'_i(s', a') - alpha log pi(a'|s'))."""
        action, log_pi = self.actor(batch.next_obs).sample(self.random.normal("target", batch.action))
        next_value = self.subset_minimum(self.critics_target(batch.next_obs, action))
        if self.cfg.backup_entropy:
            next_value = next_value - per_lane(alpha) * log_pi
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_value

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: squared error, averaged over batch and critics."""
        q = self.critics(batch.obs, batch.action)
        loss = (q - target.unsqueeze(1)).square().mean((1, 2))
        return loss, {"critic_loss": loss, "q_data": q.mean((1, 2))}

    def actor_loss(
        self, batch: Batch, action: Tensor, log_pi: Tensor, alpha: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of alpha log pi(a|s) - mean_i Q_i(s, a) at the policy's sample."""
        q = self.critics(batch.obs, action, frozen=True)
        loss = (per_lane(alpha) * log_pi - q.mean(1)).mean(-1)
        return loss, {"actor_loss": loss, "q": q.mean((1, 2)), "q_std": q.std(1, correction=0).mean(-1)}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        alpha = self.log_alpha.detach().exp()
        critic_loss, metrics = self.critic_loss(batch, self.target_value(batch, alpha))
        self.critic_optimizer.step(critic_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        if phase != self.period - 1:
            return metrics
        action, log_pi = self.actor(batch.obs).sample(self.random.normal("policy", batch.action))
        actor_loss, more = self.actor_loss(batch, action, log_pi, alpha)
        self.actor_optimizer.step(actor_loss)
        # The authors differentiate alpha (entropy - target), by log alpha.
        self.alpha_optimizer.apply_gradients([alpha * self.alpha_gradient(log_pi)])
        return {**metrics, **more, "alpha": alpha, "entropy": -log_pi.detach().mean(-1)}
