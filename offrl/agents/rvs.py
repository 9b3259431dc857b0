"""RvS-R: a feedforward policy conditioned on the return to go.

Emmons, Eysenbach, Kostrikov & Levine, "RvS: What is Essential for Offline RL via Supervised Learning?", ICLR 2022 (arXiv
2112.10751); authors' code scottemmons/rvs, configuration `gym_rvs_r`. Reward-conditioned RvS regresses actions on the state and
the average future reward R_t / (H - t), where H is the length of the dataset's longest episode. Acting conditions on the same
average at every timestep. With `average: false` the policy is conditioned on the return to go itself, and acting subtracts the
rewards so far, as the decision transformer does.

The loss is the authors': the likelihood under a Gaussian with an unbounded mean and a learnt standard deviation per dimension;
acting takes the mean.

Deviations. Initial weights are PyTorch's; the authors' are orthogonal, the last layer's times 0.01, with zero biases
(`orthogonal_init`). Batches are rows sampled uniformly; the authors take contiguous blocks of 16,384 rows, without shuffling.
Episodes that the file cuts off are used; the authors leave them out. Discrete actions are fitted by cross-entropy. The target
return defaults to the dataset's best return (the authors sweep fractions of the expert's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import MLP, Adam, GaussianActor, categorical_log_prob, normal_log_prob, orthogonal_, per_lane

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class RvSConfig:
    target_return: float | None = None  # return to condition on when acting; None: the dataset's best return
    average: bool = True  # condition on R_t / (H - t); false: on R_t, minus the rewards so far when acting
    return_scale: float = 1.0  # factor of the conditioning input
    lr: float = 1e-3  # learning rate
    hidden: tuple[int, ...] = (1024, 1024)  # widths of the hidden layers
    orthogonal_init: bool = False  # start from the authors' weights: orthogonal, those of the last layer small
    sample_actions: bool = False  # discrete actions: sample from the policy instead of taking the most likely one
    normalize_obs: bool = False  # standardise observations with the dataset's statistics


@dataclass(kw_only=True)
class RvSState(ActingState):
    """Acting state with `return_to_go` `[lanes, envs]`: the target return minus the rewards so far."""

    return_to_go: Tensor


class RvS(RecurrentAgent[RvSConfig]):
    """pi(a | s, R) <- argmax E_D log pi(a_t | s_t, R_t)."""

    Config = RvSConfig
    batch_fields = ("return_to_go", "timestep")
    takes_discrete = True
    stream = "rvs"
    target: Tensor
    horizon: Tensor

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.uses_reward = not cfg.average
        self.register_buffer("target", torch.zeros(spec.lanes, device=spec.device))
        if cfg.target_return is not None:
            self.target.copy_(torch.as_tensor(cfg.target_return))
        self.register_buffer("horizon", torch.ones(()))
        self.actor: MLP | GaussianActor
        if spec.discrete:
            self.actor = MLP(spec.seeds, [spec.obs_dim + 1, *cfg.hidden, spec.action_dim], name="actor")
        else:
            self.actor = GaussianActor.of(spec, cfg.hidden, extra_inputs=1, squash=False)
        if cfg.orthogonal_init:
            mlp = self.actor if isinstance(self.actor, MLP) else self.actor.mlp
            orthogonal_(mlp, spec.seeds, gain=math.sqrt(2), last=0.01)
        self.optimizer = Adam(self.actor.parameters(), cfg.lr)

    def setup(self, dataset: OfflineDataset) -> None:
        """Read the longest episode's length, and the best return if the settings name no target."""
        self.horizon.fill_(dataset.steps.max())
        if self.cfg.target_return is None:
            self.target.fill_(dataset.best_return)

    def goal(self, return_to_go: Tensor, timestep: Tensor | int) -> Tensor:
        """`[lanes, n, 1]`: the conditioning input."""
        if self.cfg.average:
            return_to_go = return_to_go / (self.horizon - timestep).clamp(min=1)
        return (return_to_go * per_lane(self.cfg.return_scale)).unsqueeze(-1)

    def label(self, batch: Batch) -> Tensor:
        """The conditioning input of each sample."""
        return self.goal(batch.return_to_go, batch.timestep)

    def action_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean of -log pi(a | s, R)."""
        out = self.actor(torch.cat([batch.obs, self.label(batch)], -1))
        if self.spec.discrete:
            return -categorical_log_prob(out, batch.action).mean(-1)
        mean, std = out
        return -normal_log_prob(mean, std, batch.action).mean(-1)

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.action_loss(batch)
        self.optimizer.step(loss)
        return {"action_loss": loss}

    # ---- acting -----------------------------------------------------------------------------------------------

    def init(self, envs: int) -> RvSState:
        return RvSState(return_to_go=self.target.unsqueeze(1).expand(-1, envs))

    def act(self, obs: Tensor, state: RvSState | None = None) -> Tensor:
        state = state or self.init(obs.shape[1])
        if self.cfg.average:  # the same average at every timestep, as in the authors' code
            goal = self.goal(self.target.unsqueeze(1).expand(obs.shape[:2]), 0)
        else:
            goal = self.goal(state.return_to_go, state.timestep)
        out = self.actor(torch.cat([obs, goal], -1))
        return self.discrete_action(out, state) if self.spec.discrete else out[0]

    def update_state(self, state: RvSState, action: Tensor, reward: Tensor) -> RvSState:
        return replace(state, timestep=state.timestep + 1, return_to_go=state.return_to_go - reward)

    def predicted_return(self, obs: Tensor, state: RvSState) -> Tensor:
        """The target return."""
        return state.return_to_go
