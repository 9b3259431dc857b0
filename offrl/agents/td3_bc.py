"""TD3+BC: TD3 with a behaviour-cloning term in the actor's loss.

Fujimoto & Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021 (arXiv 2106.06860); authors' code
sfujim/TD3_BC, whose update this is step for step.

Deviations, none of which changes a number: the twin critics are one batched ensemble, and the actor's loss computes no
gradient of the critics' weights (the authors compute and discard it). As in the authors' code, and unlike equation 4 of the
paper, lambda uses Q_1 at the policy's action, not at the dataset's.
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
    alpha: float = 2.5  # weight of Q against the behaviour-cloning term
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target networks
    policy_noise: float = 0.2  # std of the noise on target actions, in units of half the box
    noise_clip: float = 0.5  # bound of that noise, in the same units
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class TD3BC(Agent[TD3BCConfig]):
    """max_pi E [lambda Q(s, pi(s)) - (pi(s) - a)^2] with lambda = alpha / E|Q|."""

    Config: ClassVar[type] = TD3BCConfig
    period = 2  # updates of the critics per update of the actor and the targets
    actor_turn: ClassVar[int] = 1  # phase in which the actor and the targets are updated: the second of two

    def build(self) -> None:
        self.actor = DeterministicActor.of(self.spec, self.cfg.hidden)
        self.critics = Critics.of(self.spec, self.cfg.hidden, members=2)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), self.cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), self.cfg.critic_lr)

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs)

    def target_action(self, batch: Batch) -> Tensor:
        """a~ = pi'(s') + clip(noise), clipped to the bounds: target policy smoothing (TD3, equation 14)."""
        bound = per_lane(self.cfg.noise_clip, 2)
        noise = self.random.normal("target_action", batch.action) * per_lane(self.cfg.policy_noise, 2)
        noise = noise.clamp(-bound, bound) * self.box.half_width  # the authors' largest action
        return self.within_bounds(self.actor_target(batch.next_obs) + noise)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q'_i(s', a~)."""
        next_q = self.critics_target(batch.next_obs, self.target_action(batch)).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean squared error to the target value, summed over the two critics."""
        q = self.critics(batch.obs, batch.action)
        return (q - self.target_value(batch).unsqueeze(1)).square().mean(-1).sum(-1)

    def policy_regularizer(self, batch: Batch, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of (pi(s) - a)^2, and metrics. Subclasses replace it."""
        loss = (action - batch.action).square().mean((-2, -1))
        return loss, {"bc_loss": loss}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of (pi(s) - a)^2 - lambda Q_1(s, pi(s)), and metrics."""
        action = self.act(batch.obs)
        q = self.critics(batch.obs, action, member=0, frozen=True)
        lam = self.cfg.alpha / q.detach().abs().mean(-1)
        regularizer, metrics = self.policy_regularizer(batch, action)
        loss = regularizer - lam * q.mean(-1)
        return loss, {"actor_loss": loss, "q": q.mean(-1), "lambda": lam, **metrics}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)
        metrics = {"critic_loss": critic_loss}
        if phase == self.actor_turn:
            actor_loss, more = self.actor_loss(batch)
            self.actor_optimizer.step(actor_loss)
            polyak(self.critics_target, self.critics, self.cfg.tau)
            polyak(self.actor_target, self.actor, self.cfg.tau)
            metrics |= more
        return metrics
