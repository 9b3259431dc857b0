"""ReBRAC: TD3+BC with its pull on the critic's target as well, layer normalisation in the critics, and deeper networks.

Tarasov, Kurenkov, Nikulin & Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning", NeurIPS
2023 (arXiv 2305.09836); authors' code tinkoff-ai/ReBRAC (also in corl-team/CORL), whose update this is step for step.
The actor is penalised for its distance from a, the target for the distance of a~ from the action a' that the data has
next; the two weights are separate.

Against TD3+BC, as in the authors' code: the distance is summed over the action's dimensions, not averaged; the actor
uses the minimum of the critics, and lambda has no alpha; the actor moves on the first update of two; its target
averages the actor from before its step.

Deviations, none of which changes a number where the data has a': a row whose a' the dataset lacks (its last before a
cut) has no penalty in its target; the authors take the action that follows in the file. Critics are one batched
ensemble, and the actor's loss computes no gradient of their weights.
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
    actor_bc: float = 0.01  # beta_1, weight of the actor's distance from the data
    critic_bc: float = 0.01  # beta_2, weight of the next action's distance from the data, in the target
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the targets, which move on actor updates
    policy_noise: float = 0.2  # deviation of the target action's noise, in units of half the box
    noise_clip: float = 0.5  # bound of that noise, same units
    actor_lr: float = 3e-4  # 1e-3 on locomotion, with batches of 1024
    critic_lr: float = 3e-4  # the same
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of all hidden layers
    critic_norm: bool = True  # layer normalisation behind the critics' ReLUs
    normalize_obs: bool = False  # standardise observations with the dataset's statistics


class ReBRAC(TD3BC):
    """max_pi E [lambda min_i Q_i(s, pi(s)) - beta_1 |pi(s) - a|^2], Q backed up with -beta_2 |a~ - a'|^2."""

    Config = ReBRACConfig
    batch_fields = ("next_action",)

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        sizes, box = (spec.obs_dim, spec.action_dim), (spec.action_low, spec.action_high)
        self.actor = DeterministicActor(spec.seeds, *sizes, cfg.hidden, *box, bias=0.1, last=1e-3)
        self.critics = Critics(spec.seeds, *sizes, cfg.hidden, norm=cfg.critic_norm, bias=0.1, last=3e-3)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) [min_i Q'_i(s', a~) - beta_2 |a~ - a'|^2]."""
        assert batch.next_action is not None
        assert batch.has_next_action is not None
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
        return loss, {"q": q.detach().mean(-1), "lambda": lam, "bc_loss": distance.detach()}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)
        metrics = {"critic_loss": critic_loss.detach()}
        if phase == 0:
            actor_loss, more = self.actor_loss(batch)
            polyak(self.actor_target, self.actor, self.cfg.tau)
            self.actor_optimizer.step(actor_loss)
            polyak(self.critics_target, self.critics, self.cfg.tau)
            metrics |= {"actor_loss": actor_loss.detach(), **more}
        return metrics
