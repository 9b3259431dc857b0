"""ReBRAC: TD3+BC with a second behaviour-cloning term in the critics' target, layer norm in the critics, deeper networks.

Tarasov, Kurenkov, Nikulin & Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning", NeurIPS
2023 (arXiv 2305.09836); authors' code tinkoff-ai/ReBRAC (also in corl-team/CORL), whose update this is step for step.
The actor is penalised for its distance from a, the target value for the distance of a~ from a', the dataset's next action;
each penalty has its own weight.

Differences from TD3+BC, as in the authors' code: distances are summed over the action's dimensions, not averaged; the actor
uses the minimum of the critics, and lambda has no alpha; of two updates the actor moves on the first; its target averages
the actor from before its step.

Deviations, none of which changes a number where the dataset has a': a row without a' (the last one before a cut) has no
penalty in its target, where the authors take the action that follows in the file. The critics are one batched ensemble, and
the actor's loss computes no gradient of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.td3_bc import TD3BC
from offrl.nets import Adam, Critics, DeterministicActor, make_target, per_lane, polyak


@dataclass
class ReBRACConfig:
    actor_bc: float = 0.01  # beta_1, weight of the actor's distance from the dataset's action
    critic_bc: float = 0.01  # beta_2, weight in the target value of the next action's distance from the dataset's
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target networks
    policy_noise: float = 0.2  # std of the noise on target actions, in units of half the box
    noise_clip: float = 0.5  # bound of that noise, in the same units
    actor_lr: float = 3e-4  # learning rate of the actor (1e-3 on locomotion, with batches of 1024)
    critic_lr: float = 3e-4  # learning rate of the critics (the same)
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers
    critic_norm: bool = True  # layer normalisation after the critics' ReLUs
    normalize_obs: bool = False  # standardise observations with the dataset's statistics


class ReBRAC(TD3BC):
    """max_pi E [lambda min_i Q_i(s, pi(s)) - beta_1 |pi(s) - a|^2], Q backed up with -beta_2 |a~ - a'|^2."""

    Config = ReBRACConfig
    cfg: ReBRACConfig  # type: ignore[assignment]  # TD3+BC's settings without alpha
    batch_fields = ("next_action",)
    actor_turn = 0
    explore_noise = 0.0  # the authors' fine-tuning acts without noise

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor = DeterministicActor.of(spec, cfg.hidden, bias=0.1, last=1e-3)
        self.critics = Critics.of(spec, cfg.hidden, members=2, norm=cfg.critic_norm, bias=0.1, last=3e-3)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) [min_i Q'_i(s', a~) - beta_2 |a~ - a'|^2]."""
        action = self.target_action(batch)
        distance = (action - batch.next_action).square().sum(-1) * batch.has_next_action
        next_q = self.critics_target(batch.next_obs, action).amin(1) - per_lane(self.cfg.critic_bc) * distance
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s)), lambda = 1 / mean |min_i Q_i|."""
        action = self.act(batch.obs)
        q = self.critics(batch.obs, action, frozen=True).amin(1)
        lam = 1 / q.detach().abs().mean(-1)
        distance = (action - batch.action).square().sum(-1).mean(-1)
        loss = self.cfg.actor_bc * distance - lam * q.mean(-1)
        return loss, {"actor_loss": loss, "q": q.mean(-1), "lambda": lam, "bc_loss": distance}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)
        metrics = {"critic_loss": critic_loss}
        if phase == self.actor_turn:
            actor_loss, more = self.actor_loss(batch)
            polyak(self.actor_target, self.actor, self.cfg.tau)
            self.actor_optimizer.step(actor_loss)
            polyak(self.critics_target, self.critics, self.cfg.tau)
            metrics |= more
        return metrics
