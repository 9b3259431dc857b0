"""IQL: Q-learning on the dataset's actions alone, by expectile regression, and advantage-weighted cloning.

Kostrikov, Nair & Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022 (arXiv 2110.06169). V(s) is an
upper expectile of Q(s, a) over the dataset's actions, and Q regresses to r + gamma V(s'): this approximates a maximum over the
actions that the dataset contains without asking for any other. The policy clones the data with weights exp(beta (Q - V)).

The update is that of corl-team/CORL `iql.py`, the source of most tables' numbers, and not that of the authors'
ikostrikov/implicit_q_learning. The two differ in four things. Order: here V(s') and the policy's weights come from V before its
step, there from V after it. Critic loss: here the mean over the two critics, there the sum. Initial weights: the authors' are
orthogonal. Normalisation: here of states, there of rewards (conf/agent/iql.yaml has the datasets whose rewards are, too).

Deviations from CORL, none of which changes the mathematics: the twin critics are one batched ensemble; dropout uses the lane's
random numbers, at rates that are multiples of 2^-16; checkpoints hold the target critics; the actor's learning rate is a
function of the step number, not of the previous rate.
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
    expectile: float = 0.7  # expectile of Q that V regresses to (0.5 = mean, towards 1 = maximum)
    beta: float = 3.0  # inverse temperature of the policy's weights (0 = cloning)
    max_weight: float = 100.0  # upper bound of the policy's weights
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    deterministic: bool = False  # train a deterministic policy by weighted squared error instead of a Gaussian one
    dropout: float = 0.0  # dropout rate of the actor's hidden layers
    actor_lr: float = 3e-4  # initial learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    value_lr: float = 3e-4  # learning rate of V
    actor_decay: int = 1_000_000  # updates of the actor's cosine decay to a learning rate of zero (0 = constant)
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class IQL(Agent[IQLConfig]):
    """V <- expectile of Q, Q <- r + gamma V(s'), pi <- argmax E [exp(beta (Q - V)) log pi(a | s)]."""

    Config = IQLConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor: DeterministicActor | GaussianActor
        self.actor = (DeterministicActor if cfg.deterministic else GaussianActor).of(spec, cfg.hidden)
        self.critics = Critics.of(spec, cfg.hidden, members=2)
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
        """`[lanes]`: mean of |t - 1[u < 0]| u^2 with u = Q - V (equation 5), smallest where V is the t-expectile of Q."""
        t = per_lane(self.cfg.expectile)
        return (torch.where(advantage < 0, 1 - t, t) * advantage.square()).mean(-1)

    def critic_loss(self, batch: Batch, next_value: Tensor) -> Tensor:
        """`[lanes]`: squared error to r + gamma (1 - d) V(s'), averaged over batch and critics (equation 6)."""
        target = batch.reward + batch.mask * per_lane(self.cfg.discount) * next_value
        return (self.critics(batch.obs, batch.action) - target.unsqueeze(1)).square().mean((-2, -1))

    def policy_weight(self, advantage: Tensor) -> Tensor:
        """`[lanes, batch]`: w = min(exp(beta (Q - V)), max_weight), without a gradient."""
        weight = (per_lane(self.cfg.beta) * advantage.detach()).exp()
        return weight.clamp(max=per_lane(self.cfg.max_weight))

    def policy_loss(self, batch: Batch, weight: Tensor) -> Tensor:
        """`[lanes]`: mean of -w log pi(a | s) (equation 7), or of w |pi(s) - a|^2 for a deterministic policy."""
        if self.cfg.deterministic:
            error = (self.actor(batch.obs, self.drop()) - batch.action).square().sum(-1)
        else:
            mean, std = self.actor(batch.obs, self.drop())
            error = -normal_log_prob(mean, std, batch.action)
        return (weight * error).mean(-1)

    def drop(self) -> Drop | None:
        """Dropout for the actor's hidden layers; None if the rate is zero."""
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

        weight = self.policy_weight(advantage)
        actor_loss = self.policy_loss(batch, weight)
        self.actor_optimizer.step(actor_loss)
        return {
            "critic_loss": critic_loss,
            "value_loss": value_loss,
            "actor_loss": actor_loss,
            "q": q.mean(-1),
            "value": value.mean(-1),
            "weight": weight.mean(-1),
            "clipped": (weight >= per_lane(self.cfg.max_weight)).to(q.dtype).mean(-1),
        }
