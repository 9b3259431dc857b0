"""AWAC: an actor-critic whose policy clones the dataset's actions with weights that grow with their advantage.

Nair, Gupta, Dalal & Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets", 2020 (arXiv
2006.09359). The critics evaluate the current policy; the policy maximises the log-likelihood of the dataset's actions
with weights exp((Q(s, a) - V(s)) / lambda), the closed-form solution of policy improvement under a KL constraint, projected
on the network. Only the critics' target evaluates actions that the dataset lacks.

The update is that of corl-team/CORL `awac.py`, which decides what the paper's algorithm leaves open: the minimum of twin
critics, V(s) from one sampled action of the policy, weights clipped at 100 and not normalised over the batch.

Deviations, none of which changes the mathematics: the twin critics are one batched ensemble; checkpoints hold the
target critics and the optimisers' moments. `select_action` clips the mean to the bounds of actions, which CORL leaves to
the environment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offrl.agents.base import Agent, Batch
from offrl.nets import Adam, Critics, GaussianActor, make_target, per_lane, polyak


@dataclass
class AWACConfig:
    temperature: float = 0.3333  # lambda, temperature of the policy's weights (towards infinity = cloning)
    max_weight: float = 100.0  # upper bound of the policy's weights
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class AWAC(Agent[AWACConfig]):
    """pi <- argmax E_D [exp((Q(s, a) - V(s)) / lambda) log pi(a | s)], Q that of pi."""

    Config = AWACConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor = GaussianActor.of(spec, cfg.hidden, squash=False)
        self.critics = Critics.of(spec, cfg.hidden, members=2)
        self.critics_target = make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs)[0]

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(obs)

    @torch.no_grad()
    def sample(self, obs: Tensor, stream: str) -> Tensor:
        """`[lanes, batch, A]`: a sampled action of the policy, clipped to the bounds; `stream` names its noise."""
        mean, std = self.actor(obs)
        return self.within_bounds(mean + std * self.random.normal(stream, mean))

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q'_i(s', a~), a~ sampled from the policy."""
        next_q = self.critics_target(batch.next_obs, self.sample(batch.next_obs, "next_action")).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean squared error to the target value, summed over the two critics."""
        q = self.critics(batch.obs, batch.action)
        return (q - self.target_value(batch).unsqueeze(1)).square().mean(-1).sum(-1)

    @torch.no_grad()
    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """w = min(exp((Q(s, a) - V(s)) / lambda), max_weight), and Q(s, a), `[lanes, batch]` each.

        V(s) is Q at one sampled action of the policy.
        """
        value = self.critics(batch.obs, self.sample(batch.obs, "action")).amin(1)
        q = self.critics(batch.obs, batch.action).amin(1)
        weight = ((q - value) / per_lane(self.cfg.temperature)).exp()
        return torch.clamp(weight, max=per_lane(self.cfg.max_weight)), q

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)

        weight, q = self.weights(batch)  # with the critics after their step
        log_prob = self.log_prob(batch.obs, batch.action)
        actor_loss = -(weight * log_prob).mean(-1)
        self.actor_optimizer.step(actor_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return {
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "q": q.mean(-1),
            "log_prob": log_prob.mean(-1),
            "weight": weight.mean(-1),
            "clipped": (weight >= per_lane(self.cfg.max_weight)).to(q.dtype).mean(-1),
        }
