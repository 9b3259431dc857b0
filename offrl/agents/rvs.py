"""RvS-R: a feedforward policy conditioned on the return to come.

Emmons, Eysenbach, Kostrikov & Levine, "RvS: What is Essential for Offline RL via Supervised Learning?", ICLR 2022 (arXiv
2112.10751); authors' code scottemmons/rvs, configuration `gym_rvs_r`. Reward-conditioned RvS regresses actions on the state and
the average reward still to come, R_t / (H - t), with H the longest episode of the data. Acting asks for the same average at
every step. With `average: false` the policy sees the return to go itself, and what was earned is taken off, as in the decision
transformer.

Deviations: none for continuous actions, which the authors fit, as here, by maximum likelihood under a normal law with a mean
that nothing bounds and a learnt deviation of each dimension; acting takes the mean. Discrete actions are fitted by
cross-entropy. The return asked for defaults to the dataset's best (the authors sweep shares of the expert's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offrl.agents.base import Batch, RememberingAgent
from offrl.nets import MLP, Adam, GaussianActor, categorical_log_prob, normal_log_prob, per_lane

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class RvSConfig:
    target_return: float | None = None  # return to ask for when acting; None: the dataset's best
    average: bool = True  # condition on R_t / (H - t); false: on R_t, minus what was earned
    return_scale: float = 1.0  # multiplies what the policy is conditioned on
    lr: float = 1e-3
    hidden: tuple[int, ...] = (1024, 1024)  # widths of the policy's hidden layers
    sample_actions: bool = False  # discrete actions: draw from the policy instead of taking the likeliest
    normalize_obs: bool = False  # standardise observations with the dataset's statistics


@dataclass
class Memory:
    """The return still to be got, `[lanes, envs]`, steps behind us, and the name of the coins that actions toss."""

    return_to_go: Tensor
    time: int = 0
    name: str = ""


class RvS(RememberingAgent):
    """pi(a | s, R) <- argmax E_D log pi(a_t | s_t, R_t)."""

    Config = RvSConfig
    batch_fields = ("return_to_go", "timestep")
    takes_discrete = True
    stream = "rvs"
    target: Tensor
    horizon: Tensor

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        target = torch.zeros(spec.lanes, device=spec.device)
        self.register_buffer("target", target if cfg.target_return is None else target + cfg.target_return)
        self.register_buffer("horizon", torch.ones(()))
        sizes = spec.obs_dim + 1, spec.action_dim, cfg.hidden
        self.actor: MLP | GaussianActor = (
            MLP(spec.seeds, [sizes[0], *cfg.hidden, sizes[1]], name="actor")
            if spec.discrete
            else GaussianActor(spec.seeds, *sizes, spec.action_low, spec.action_high, squash=False)
        )
        self.optimizer = Adam(self.actor.parameters(), cfg.lr)

    def setup(self, store: OfflineDataset) -> None:
        """Learn the longest episode, and ask for the best return unless the configuration names one."""
        self.horizon.fill_(store.steps.max())
        if self.cfg.target_return is None:
            self.target.fill_(store.best_return)

    def goal(self, return_to_go: Tensor, timestep: Tensor | int) -> Tensor:
        """`[lanes, n, 1]`: what the policy is conditioned on."""
        if self.cfg.average:
            return_to_go = return_to_go / (self.horizon - timestep).clamp(min=1)
        return (return_to_go * per_lane(self.cfg.return_scale)).unsqueeze(-1)

    def action_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean -log pi(a | s, R)."""
        out = self.actor(torch.cat([batch.obs, self.label(batch)], -1))
        if self.spec.discrete:
            return -categorical_log_prob(out, batch.action).mean(-1)
        mean, std = out
        return -normal_log_prob(mean, std, batch.action).mean(-1)

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.action_loss(batch)
        self.optimizer.step(loss)
        return {"action_loss": loss.detach()}

    def label(self, batch: Batch) -> Tensor:
        """The return to go, as the policy is told it."""
        assert batch.return_to_go is not None
        assert batch.timestep is not None
        return self.goal(batch.return_to_go, batch.timestep)

    # ---- acting -----------------------------------------------------------------------------------------------

    def start(self, envs: int, name: str = "") -> Memory:
        return Memory(self.target.unsqueeze(1).expand(-1, envs), name=name)

    def promise(self, obs: Tensor, memory: Memory) -> Tensor:
        """The return that was asked for."""
        return memory.return_to_go

    def decide(self, obs: Tensor, memory: Memory) -> Tensor:
        """The action for normalised observations `[lanes, envs, O]`."""
        if self.cfg.average:  # the same average all the time, as the authors have it
            goal = self.goal(self.target.unsqueeze(1).expand(obs.shape[:2]), 0)
        else:
            goal = self.goal(memory.return_to_go, memory.time)
        out = self.actor(torch.cat([obs, goal], -1))
        if not self.spec.discrete:
            return out[0]
        return self.choose_action(out, memory)

    def observe(self, memory: Memory, action: Tensor, reward: Tensor) -> Memory:
        return Memory(memory.return_to_go - reward, memory.time + 1, memory.name)
