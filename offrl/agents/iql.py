"""IQL: Q-learning on the dataset's actions alone, by expectile regression, and advantage-weighted cloning.

Kostrikov, Nair & Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR 2022 (arXiv 2110.06169). V(s) is an
upper expectile of Q(s, a) over the dataset's actions, and Q regresses to r + gamma V(s'): this approximates a maximum over the
actions that the dataset contains without asking for any other. The policy clones the data with weights exp(beta (Q - V)).

The update is that of corl-team/CORL `iql.py`, the source of most tables' numbers, and not that of the authors'
ikostrikov/implicit_q_learning. The two differ in four things. Order: here V(s') and the policy's weights come from V before its
step, there from V after it. Critic loss: here the mean over the two critics, there the sum. Initial weights: the authors' are
orthogonal. Normalisation: here of states, there of rewards (conf/agent/iql.yaml has the datasets whose rewards are, too).

`value_fit` switches to two relatives: Xu, Jiang, Li, Yang, Wang, Chan & Zhan, "Offline RL with No OOD Actions: In-Sample
Learning via Implicit Value Regularization", ICLR 2023 (arXiv 2303.15810), authors' code ryanxhr/IVR. SQL (`sparse`) and EQL
(`exponential`) have other losses of V and other weights of the policy; V, critics and policy keep IQL's order and networks.

Integer actions, which neither code has, change only two networks: Q has an output for each action, and the policy is a
softmax of logits, from which evaluation takes the most likely action. `deterministic` means nothing then.

Deviations from CORL, none of which changes the mathematics: the twin critics are one batched ensemble; dropout uses the lane's
random numbers, at rates that are multiples of 2^-16; checkpoints hold the target critics; the actor's learning rate is a
function of the step number, not of the previous rate.

In an environment the Gaussian is sampled, and the deterministic policy gets noise of 0.03, clipped at 0.5 (CORL's
`finetune/iql.py`). With integer actions `online.noise`, the share of uniform actions, needs `deterministic=true` beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
    categorical_log_prob,
    check_dropout,
    choose,
    dropout,
    make_target,
    normal_log_prob,
    per_lane,
    polyak,
)
from offrl.utils.errors import OffrlError


@dataclass
class IQLConfig:
    expectile: float = 0.7  # expectile of Q that V regresses to (0.5 = mean, towards 1 = maximum)
    beta: float = 3.0  # inverse temperature of the policy's weights (0 = cloning)
    max_weight: float = 100.0  # upper bound of the policy's weights
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    value_fit: Literal["expectile", "sparse", "exponential"] = "expectile"  # V's loss: IQL's, SQL's, EQL's
    regularization: float = 1.0  # alpha of SQL and EQL, weight of the distance from the data
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
    takes_discrete = True

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        check_dropout(cfg.dropout)
        self.actor: DeterministicActor | GaussianActor | MLP
        if spec.discrete:
            self.actor = MLP(spec.seeds, [spec.obs_dim, *cfg.hidden, spec.action_dim], name="actor")
        else:
            self.actor = (DeterministicActor if cfg.deterministic else GaussianActor).of(spec, cfg.hidden)
            self.explore_noise = 0.03  # of the deterministic actor, as in CORL's fine-tuning
        self.critics = Critics.of(spec, cfg.hidden, members=2)
        self.critics_target = make_target(self.critics)
        self.value = MLP(spec.seeds, [spec.obs_dim, *cfg.hidden, 1], name="value")
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr, decay=cfg.actor_decay)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.value_optimizer = Adam(self.value.parameters(), cfg.value_lr)

    def act(self, obs: Tensor) -> Tensor:
        if self.spec.discrete:
            return choose(self.actor(obs))
        return self.actor(obs) if self.cfg.deterministic else self.actor(obs)[0]

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.cfg.deterministic or self.spec.discrete else self.actor(obs)

    @classmethod
    def explores_by_noise(cls, config: IQLConfig) -> bool:
        return config.deterministic

    @classmethod
    def check_online(cls, before: IQLConfig, after: IQLConfig, online: Any) -> None:
        if (factor := online.anneal.get("dropout", 0.0)) <= 1:
            return  # a rate that falls; those of the settings are checked where the agent is made
        try:
            check_dropout(torch.as_tensor(after.dropout) * factor)
        except ValueError as error:
            raise OffrlError(f"online.anneal.dropout={factor:g}: at the end of the online phase {error}") from error

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        return categorical_log_prob(self.actor(obs), action) if self.spec.discrete else super().log_prob(obs, action)

    def value_loss(self, advantage: Tensor, value: Tensor) -> Tensor:
        """`[lanes]`: expectile regression of V `[lanes, batch]` by u = Q - V `[lanes, batch]`, or SQL's or EQL's loss."""
        if self.cfg.value_fit == "expectile":
            return expectile_loss(advantage, self.cfg.expectile)
        fit = sparse_loss if self.cfg.value_fit == "sparse" else exponential_loss
        return fit(advantage, value, self.cfg.regularization)

    def critic_loss(self, batch: Batch, next_value: Tensor) -> Tensor:
        """`[lanes]`: squared error to r + gamma (1 - d) V(s'), averaged over batch and critics (equation 6)."""
        target = batch.reward + batch.mask * per_lane(self.cfg.discount) * next_value
        return (self.critics(batch.obs, batch.action) - target.unsqueeze(1)).square().mean((-2, -1))

    def policy_weight(self, advantage: Tensor) -> Tensor:
        """`[lanes, batch]`: w = min(exp(beta (Q - V)), max_weight), without a gradient.

        SQL's weight is max(Q - V, 0) and EQL's exp(10 (Q - V) / regularization), with the same bound.
        """
        if self.cfg.value_fit == "sparse":
            weight = advantage.detach().relu()
        elif self.cfg.value_fit == "exponential":
            weight = (10 / per_lane(self.cfg.regularization) * advantage.detach()).exp()
        else:
            weight = (per_lane(self.cfg.beta) * advantage.detach()).exp()
        return weight.clamp(max=per_lane(self.cfg.max_weight))

    def policy_loss(self, batch: Batch, weight: Tensor) -> Tensor:
        """`[lanes]`: mean of -w log pi(a | s) (equation 7), or of w |pi(s) - a|^2 for a deterministic policy."""
        if self.spec.discrete:
            error = -categorical_log_prob(self.actor(batch.obs, drop=self.drop()), batch.action)
        elif self.cfg.deterministic:
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
        value_loss = self.value_loss(advantage, value)
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


def expectile_loss(advantage: Tensor, expectile: float | Tensor) -> Tensor:
    """`[lanes]`: mean of |t - 1[u < 0]| u^2 with u = Q - V (equation 5), smallest where V is the t-expectile of Q."""
    t = per_lane(expectile)
    return (torch.where(advantage < 0, 1 - t, t) * advantage.square()).mean(-1)


def sparse_loss(advantage: Tensor, value: Tensor, alpha: float | Tensor) -> Tensor:
    """`[lanes]`: SQL's mean of max(1 + u / (2 alpha), 0)^2 + V / alpha with u = Q - V.

    At its minimum E max(1 + u / (2 alpha), 0) = 1.
    """
    alpha = per_lane(alpha)
    return ((1 + advantage / (2 * alpha)).relu().square() + value / alpha).mean(-1)


def exponential_loss(advantage: Tensor, value: Tensor, alpha: float | Tensor) -> Tensor:
    """`[lanes]`: EQL's mean of exp(z) + V / alpha with z = min((Q - V) / alpha, 5), times exp(-m) of m = max(max z, -1).

    The factor, a constant, keeps the exponentials finite. Where no z is cut the minimum is V = alpha log E exp(Q / alpha).
    """
    alpha = per_lane(alpha)
    z = (advantage / alpha).clamp(max=5)
    largest = z.detach().amax(-1, keepdim=True).clamp(min=-1)
    return ((z - largest).exp() + (-largest).exp() * value / alpha).mean(-1)
