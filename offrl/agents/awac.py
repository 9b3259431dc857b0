"""AWAC: an actor-critic whose policy clones the data with weights that grow with the advantage.

Nair, Gupta, Dalal & Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets", 2020 (arXiv
2006.09359). The critics evaluate the current policy; the policy maximises the log-likelihood of the dataset's actions
under weights exp((Q(s, a) - V(s)) / lambda), which is the closed-form solution of policy improvement under a KL
constraint, projected on the network. Nothing but the critics' target ever asks for the value of an action that the data
lacks.

The step is that of corl-team/CORL `awac.py`, which settles what the paper's algorithm leaves open: the minimum of twin
critics, V(s) by one action of the policy, weights clipped at 100 and not normalised over the batch.

Deviations, none of which changes the mathematics: the twin critics are one batched ensemble; checkpoints hold the
target critics and the optimisers' moments. `select_action` clips the mean to the box of actions, which CORL leaves to
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
    temperature: float = 0.3333  # lambda: weights are exp(advantage / lambda); towards infinity, cloning
    max_weight: float = 100.0  # bound of these weights
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the target critics, which move on every update
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of all hidden layers
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class AWAC(Agent):
    """pi <- argmax E_D [exp((Q(s, a) - V(s)) / lambda) log pi(a | s)], Q that of pi."""

    Config = AWACConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        sizes, box = (spec.obs_dim, spec.action_dim), (spec.action_low, spec.action_high)
        self.actor = GaussianActor(spec.seeds, *sizes, cfg.hidden, *box, squash=False)
        self.critics = Critics(spec.seeds, *sizes, cfg.hidden, members=2)
        self.critics_target = make_target(self.critics)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)

    def act(self, obs: Tensor) -> Tensor:
        return self.actor(obs)[0]

    def policy_gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(obs)

    @torch.no_grad()
    def sample(self, obs: Tensor, draw: str) -> Tensor:
        """`[lanes, batch, A]`: an action of the policy, clipped to the box; `draw` names its noise."""
        mean, std = self.actor(obs)
        action = mean + std * self.random.normal(draw, mean)
        return action.clamp(self.spec.action_low, self.spec.action_high)

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q'_i(s', a~), a~ an action of the policy."""
        next_q = self.critics_target(batch.next_obs, self.sample(batch.next_obs, "next_action")).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: sum over both critics of the mean squared error."""
        q = self.critics(batch.obs, batch.action)
        return (q - self.target_value(batch).unsqueeze(1)).square().mean(-1).sum(-1)

    @torch.no_grad()
    def weights(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """min(exp((Q(s, a) - V(s)) / lambda), 100), and Q(s, a), `[lanes, batch]` each; V(s) by one action of the policy."""
        value = self.critics(batch.obs, self.sample(batch.obs, "action")).amin(1)
        q = self.critics(batch.obs, batch.action).amin(1)
        weight = ((q - value) / per_lane(self.cfg.temperature)).exp()
        return torch.clamp(weight, max=per_lane(self.cfg.max_weight)), q

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)

        weight, q = self.weights(batch)  # by the critics after their step
        log_prob = self.log_prob(batch.obs, batch.action)
        actor_loss = -(weight * log_prob).mean(-1)
        self.actor_optimizer.step(actor_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q": q.mean(-1),
            "log_prob": log_prob.detach().mean(-1),
            "weight": weight.mean(-1),
            "clipped": (weight >= per_lane(self.cfg.max_weight)).to(q.dtype).mean(-1),
        }
