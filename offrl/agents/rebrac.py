"""ReBRAC: TD3+BC with a second behaviour-cloning term in the critics' target, layer norm in the critics, deeper networks.

Tarasov, Kurenkov, Nikulin & Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning", NeurIPS
2023 (arXiv 2305.09836); authors' code tinkoff-ai/ReBRAC (also in corl-team/CORL), whose update this is step for step.
The actor is penalised for its distance from a, the target value for the distance of a~ from a', the dataset's next action;
each penalty has its own weight.

Differences from TD3+BC, as in the authors' code: distances are summed over the action's dimensions, not averaged; the actor
uses the minimum of the critics, and lambda has no alpha; of two updates the actor moves on the first; its target averages
the actor from before its step.

Settings that are off by default: an ensemble whose value is mean - `pessimism` std, in the target and for the actor, as in
ColinQiyangLi/qam (`members`, `pooling: lcb`); GELU networks with Glorot's initial weights, as seohongpark/fql has them on
OGBench (`activation: gelu`); and TD3-AWR (`awr`), after EmptyJackson/unifloral, which weighs the actor's distance by the
action's advantage over a V that regresses to an expectile of Q. There a step is one update of the actor, two of the critics and
one of V, with Adam's eps at 1e-5; here the order, the counts and Adam are ReBRAC's, and V steps last.

Deviations, none of which changes a number where the dataset has a': a row without a' (the last one before a cut) has no
penalty in its target, where the authors take the action that follows in the file. The critics are one batched ensemble, and
the actor's loss computes no gradient of their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.iql import expectile_loss
from offrl.agents.td3_bc import TD3BC
from offrl.nets import MLP, Adam, Critics, DeterministicActor, Pooling, make_target, per_lane, polyak, pool


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
    members: int = 2  # number of critics
    pooling: Pooling = "min"  # value of the critics in target and actor: min, mean, or lcb, mean - pessimism std
    pessimism: float = 0.5  # weight of the std in lcb
    activation: Literal["relu", "gelu"] = (
        "relu"  # gelu: tanh-GELU networks with Glorot's initial weights, as on OGBench
    )
    actor_norm: bool = False  # layer normalisation in the actor too (TD3-AWR)
    awr: bool = False  # weigh the actor's distance by min(exp(awr_beta (Q - V)), 100) (TD3-AWR)
    awr_beta: float = 3.0  # inverse temperature of these weights
    expectile: float = 0.7  # expectile of Q that their V regresses to


class ReBRAC(TD3BC):
    """max_pi E [lambda min_i Q_i(s, pi(s)) - beta_1 |pi(s) - a|^2], Q backed up with -beta_2 |a~ - a'|^2."""

    Config = ReBRACConfig
    cfg: ReBRACConfig  # type: ignore[assignment]  # TD3+BC's settings without alpha
    batch_fields = ("next_action",)
    actor_turn = 0
    explore_noise = 0.0  # the authors' fine-tuning acts without noise

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        smooth: dict[str, Any] = {"activation": "gelu", "glorot": True}
        small, large = ({"bias": 0.1, "last": last} if cfg.activation == "relu" else smooth for last in (1e-3, 3e-3))
        self.actor = DeterministicActor.of(spec, cfg.hidden, norm=cfg.actor_norm, **small)
        self.critics = Critics.of(spec, cfg.hidden, members=cfg.members, norm=cfg.critic_norm, **large)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        if cfg.awr:
            self.value = MLP(spec.seeds, [spec.obs_dim, *cfg.hidden, 1], name="value", norm=cfg.critic_norm, **large)
            self.value_optimizer = Adam(self.value.parameters(), cfg.critic_lr)

    def pool(self, q: Tensor) -> Tensor:
        """One value `[lanes, batch]` of the critics' `[lanes, members, batch]`."""
        return pool(q, self.cfg.pooling, self.cfg.pessimism)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) [min_i Q'_i(s', a~) - beta_2 |a~ - a'|^2]."""
        action = self.target_action(batch)
        distance = (action - batch.next_action).square().sum(-1) * batch.has_next_action
        next_q = self.pool(self.critics_target(batch.next_obs, action)) - per_lane(self.cfg.critic_bc) * distance
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of beta_1 |pi(s) - a|^2 - lambda min_i Q_i(s, pi(s)), lambda = 1 / mean |min_i Q_i|."""
        action = self.act(batch.obs)
        q = self.pool(self.critics(batch.obs, action, frozen=True))
        lam = 1 / q.detach().abs().mean(-1)
        squares = (action - batch.action).square().sum(-1)
        distance = (self.awr_weight(batch) * squares if self.cfg.awr else squares).mean(-1)
        loss = self.cfg.actor_bc * distance - lam * q.mean(-1)
        return loss, {"actor_loss": loss, "q": q.mean(-1), "lambda": lam, "bc_loss": distance}

    def advantage(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: min_i Q_i(s, a) - V(s), with a gradient of V alone."""
        return self.critics(batch.obs, batch.action).detach().amin(1) - self.value(batch.obs).squeeze(-1)

    def awr_weight(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: min(exp(awr_beta (Q - V)), 100), without a gradient."""
        return (per_lane(self.cfg.awr_beta) * self.advantage(batch).detach()).exp().clamp(max=100)

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
        if self.cfg.awr:
            value_loss = expectile_loss(self.advantage(batch), self.cfg.expectile)
            self.value_optimizer.step(value_loss)
            metrics["value_loss"] = value_loss
        return metrics
