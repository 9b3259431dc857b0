"""TD3+BC: TD3 whose actor is also pulled to the dataset's action.

Fujimoto & Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021 (arXiv 2106.06860); authors' code
sfujim/TD3_BC, whose update this is step for step.

Deviations: the twin critics are one batched ensemble, and the actor's loss computes no gradient of the critics' weights
(the authors' does and discards it); neither changes a number. As in the authors' code, and unlike equation 4 of the
paper, lambda uses Q_1 at the policy's action rather than at the dataset's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from offrl.agents.base import Agent, Batch
from offrl.nets import Adam, Critics, DeterministicActor, make_target, per_lane, polyak


@dataclass
class TD3BCConfig:
    alpha: float = 2.5  # weight of Q against the pull to the data
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the targets, which move on actor updates
    policy_noise: float = 0.2  # deviation of the target action's noise, in units of half the box
    noise_clip: float = 0.5  # bound of that noise, same units
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)  # widths of all hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class TD3BC(Agent):
    """max_pi E [lambda Q(s, pi(s)) - (pi(s) - a)^2] with lambda = alpha / E|Q|."""

    Config: ClassVar[type] = TD3BCConfig
    period = 2  # the actor and all targets move on every second update

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor = DeterministicActor(
            spec.seeds, spec.obs_dim, spec.action_dim, cfg.hidden, spec.action_low, spec.action_high
        )
        self.critics = Critics(spec.seeds, spec.obs_dim, spec.action_dim, cfg.hidden, members=2)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs)

    def target_action(self, batch: Batch) -> Tensor:
        """Target policy smoothing: clip(pi'(s') + clip(noise)) (TD3, equation 14)."""
        cfg, half = self.cfg, (self.spec.action_high - self.spec.action_low) / 2  # the authors' largest action
        noise = self.random.normal("target_action", batch.action) * per_lane(cfg.policy_noise, 2)
        noise = clip(noise, per_lane(cfg.noise_clip, 2)) * half
        return (self.actor_target(batch.next_obs) + noise).clamp(self.spec.action_low, self.spec.action_high)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q'_i(s', a~)."""
        next_q = self.critics_target(batch.next_obs, self.target_action(batch)).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: sum over both critics of the mean squared error."""
        q = self.critics(batch.obs, batch.action)
        return (q - self.target_value(batch).unsqueeze(1)).square().mean(-1).sum(-1)

    def policy_regularizer(self, batch: Batch, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The regulariser `[lanes]` that ties the policy's action to the data, and its metrics; relatives replace it."""
        loss = (action - batch.action).square().mean((-2, -1))
        return loss, {"bc_loss": loss.detach()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        action = self.act(batch.obs)
        q = self.critics(batch.obs, action, member=0, frozen=True)
        lam = self.cfg.alpha / q.detach().abs().mean(-1)
        policy_regularizer, metrics = self.policy_regularizer(batch, action)
        return policy_regularizer - lam * q.mean(-1), {"q": q.detach().mean(-1), "lambda": lam, **metrics}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)
        metrics = {"critic_loss": critic_loss.detach()}
        if phase == self.period - 1:
            actor_loss, more = self.actor_loss(batch)
            self.actor_optimizer.step(actor_loss)
            polyak(self.critics_target, self.critics, self.cfg.tau)
            polyak(self.actor_target, self.actor, self.cfg.tau)
            metrics |= {"actor_loss": actor_loss.detach(), **more}
        return metrics


def clip(x: Tensor, bound: float | Tensor) -> Tensor:
    """clip(x, -bound, bound); the bound may differ between lanes."""
    return torch.minimum(torch.maximum(x, -bound), bound) if isinstance(bound, Tensor) else x.clamp(-bound, bound)
