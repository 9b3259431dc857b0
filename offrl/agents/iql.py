"""IQL: Q-learning that never asks for an action outside the data, then cloning weighted by how good an action was.

Kostrikov, Nair & Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022 (arXiv 2110.06169). V(s)
is an upper expectile of Q(s, a) over the dataset's actions, and Q is fitted to r + gamma V(s'): a maximum over actions
that were taken, without a policy. The policy then clones the data with weights exp(beta (Q - V)).

The step is that of corl-team/CORL `iql.py`, whose numbers most tables quote, and not of the authors'
ikostrikov/implicit_q_learning. They differ in order (here V(s') and the policy's weights come from V before its step;
the authors step V first and use it afterwards), in the critics' loss (here a mean over the two, there a sum), in the
initial weights (theirs are orthogonal), and in what is normalised: states here, rewards there, apart from two datasets
(see conf/agent/iql.yaml).

Deviations from CORL, none of which changes the mathematics: the twin critics are one batched ensemble; dropout's coins
come from the lane's counter, at rates that are multiples of 2^-16; checkpoints hold the target critics. The rate of the
actor's schedule is reckoned from the number of the step and not from the rate before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offrl.agents.base import Agent, Batch
from offrl.nets import (
    MLP,
    Adam,
    Critics,
    DeterministicActor,
    Drop,
    GaussianActor,
    dropout,
    make_target,
    normal_log_prob,
    per_lane,
    polyak,
)


@dataclass
class IQLConfig:
    expectile: float = 0.7  # of Q over the data's actions that V is: 0.5 their mean, towards 1 their maximum
    beta: float = 3.0  # inverse temperature of the policy's weights: 0 is cloning
    max_weight: float = 100.0  # bound of these weights
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the target critics, which move on every update
    deterministic: bool = False  # a deterministic policy, by weighted squared error, instead of a Gaussian
    dropout: float = 0.0  # share of the actor's hidden units that training drops
    actor_lr: float = 3e-4  # at the first update
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    actor_decay: int = (
        1_000_000  # updates over which the actor's rate falls to zero, along half a cosine; 0: it does not
    )
    hidden: tuple[int, ...] = (256, 256)  # widths of all hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class IQL(Agent):
    """V <- expectile of Q, Q <- r + gamma V(s'), pi <- argmax E [exp(beta (Q - V)) log pi(a | s)]."""

    Config = IQLConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        sizes, box = (spec.obs_dim, spec.action_dim), (spec.action_low, spec.action_high)
        policy = DeterministicActor if cfg.deterministic else GaussianActor
        self.actor: DeterministicActor | GaussianActor = policy(spec.seeds, *sizes, cfg.hidden, *box)
        self.critics = Critics(spec.seeds, *sizes, cfg.hidden, members=2)
        self.critics_target = make_target(self.critics)
        self.value = MLP(spec.seeds, [spec.obs_dim, *cfg.hidden, 1], name="value")
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr, decay=cfg.actor_decay)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.value_optimizer = Adam(self.value.parameters(), cfg.value_lr)

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs) if self.cfg.deterministic else self.actor(obs)[0]

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.cfg.deterministic else self.actor(obs)

    def value_loss(self, advantage: Tensor) -> Tensor:
        """`[lanes]`: mean |t - 1[u < 0]| u^2 of u = Q - V (equation 5), least where V is the t-expectile of Q."""
        t = per_lane(self.cfg.expectile)
        return (torch.where(advantage < 0, 1 - t, t) * advantage.square()).mean(-1)

    def critic_loss(self, batch: Batch, next_value: Tensor) -> Tensor:
        """`[lanes]`: mean over both critics of the squared error to r + gamma (1 - d) V(s') (equation 6)."""
        target = batch.reward + batch.mask * per_lane(self.cfg.discount) * next_value
        return (self.critics(batch.obs, batch.action) - target.unsqueeze(1)).square().mean((-2, -1))

    def policy_loss(self, batch: Batch, weight: Tensor) -> Tensor:
        """`[lanes]`: -mean w log pi(a | s), or w times the squared error summed over dimensions (equation 7)."""
        if self.cfg.deterministic:
            error = (self.actor(batch.obs, self.drop()) - batch.action).square().sum(-1)
        else:
            mean, std = self.actor(batch.obs, self.drop())
            error = -normal_log_prob(mean, std, batch.action)
        return (weight * error).mean(-1)

    def drop(self) -> Drop | None:
        rate = self.cfg.dropout
        if isinstance(rate, float) and rate == 0:
            return None
        return lambda name, x: dropout(x, rate, self.random, name)

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        with torch.no_grad():
            next_value = self.value(batch.next_obs).squeeze(-1)
            q = self.critics_target(batch.obs, batch.action).amin(1)
        value = self.value(batch.obs).squeeze(-1)
        advantage = q - value
        value_loss = self.value_loss(advantage)
        self.value_optimizer.step(value_loss)

        critic_loss = self.critic_loss(batch, next_value)
        self.critic_optimizer.step(critic_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)

        weight = torch.clamp((per_lane(self.cfg.beta) * advantage.detach()).exp(), max=per_lane(self.cfg.max_weight))
        actor_loss = self.policy_loss(batch, weight)
        self.actor_optimizer.step(actor_loss)
        return {
            "critic_loss": critic_loss.detach(),
            "value_loss": value_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q": q.mean(-1),
            "value": value.detach().mean(-1),
            "weight": weight.mean(-1),
            "clipped": (weight >= per_lane(self.cfg.max_weight)).to(q.dtype).mean(-1),
        }
