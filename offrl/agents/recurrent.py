"""The base of policies that carry a state through an episode, or that draw their actions at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from offrl.agents.base import Agent, ConfigT
from offrl.nets.actors import choose


@dataclass(kw_only=True)
class ActingState:
    """What a policy carries through a batch of episodes that run side by side.

    Attributes:
        timestep: number of timesteps behind.
        stream: name of the random numbers of these episodes; empty: sample nothing, take the most likely action.
    """

    timestep: int = 0
    stream: str = ""

    def without_samples(self) -> Self:
        """The state of a policy that samples nothing."""
        return replace(self, stream="")


class RecurrentAgent(Agent[ConfigT]):
    """Base of policies whose action depends on more than the observation: on the episode so far, or on random numbers.

    At every timestep `select_action(obs, state)` comes first and `update_state(state, action, reward)` second; `act` may
    write what it computed into the state. A subclass implements `act`, and has `sample_actions` in its `Config` if it
    supports discrete actions. One that carries more than an `ActingState` also implements `init` and `update_state`.

    Attributes:
        stream: prefix of the names of random numbers.
        uses_history: whether the action depends on the episode so far; if False, only sampling actions needs a state.
        samples_continuous: whether the setting `sample_actions` holds for continuous actions too.
        uses_reward: whether `update_state` of a policy with a history reads the reward.
        episode_batches: number of batches of episodes so far, which have different random numbers.
    """

    stream: ClassVar[str]
    uses_history: bool = True
    samples_continuous: ClassVar[bool] = False
    uses_reward: bool = True
    episode_batches: int = 0

    def act(self, obs: Tensor, state: Any = None) -> Tensor:
        """The action for normalised observations `[lanes, envs, O]`; without a state, that at the start of an episode."""
        raise NotImplementedError

    def init(self, envs: int) -> ActingState:
        """The state at the start of `envs` episodes."""
        return ActingState()

    def initial_state(self, envs: int) -> Any:
        if not self.uses_history and not self.samples_actions:
            return None
        self.episode_batches += 1
        return replace(self.init(envs), stream=f"{self.stream}/act/{self.episode_batches}")

    def update_state(self, state: Any, action: Tensor, reward: Tensor) -> Any:
        return state and replace(state, timestep=state.timestep + 1)

    def discrete_action(self, logits: Tensor, state: ActingState | None) -> Tensor:
        """An action of logits `[lanes, envs, actions]`: a sample if the settings say so, else the most likely one."""
        if not self.samples_actions or state is None or not state.stream:
            return choose(logits)
        return choose(logits, self.random.uniform(f"{state.stream}/{state.timestep}", logits.shape[1:2]))

    def acting_noise(self, obs: Tensor, state: ActingState | None, width: int) -> Tensor | None:
        """Standard normals `[lanes, envs, width]` of the timestep; None where the policy samples nothing.

        An episode's numbers depend on its lane, its place and its timestep, and not on how many others run beside it.
        """
        if not self.samples_actions or state is None or not state.stream:
            return None
        return self.random.normal_rows(f"{state.stream}/{state.timestep}", obs.shape[1], width).to(obs.dtype)

    def candidate_noise(self, obs: Tensor, state: ActingState | None, candidates: int, width: int) -> Tensor:
        """Standard normals `[lanes, envs, candidates, width]`: of the timestep, or without a state the same everywhere."""
        noise = self.acting_noise(obs, state, candidates * width)
        if noise is None:
            fixed = torch.zeros((), dtype=torch.int64, device=obs.device)  # no update's number
            noise = self.random.normal_rows(f"{self.stream}/act", 1, candidates * width, fixed).to(obs.dtype)
            noise = noise.expand(-1, obs.shape[1], -1)
        return noise.unflatten(-1, (candidates, width))

    @property
    def samples_actions(self) -> bool:
        """Whether actions are drawn at random when the agent is evaluated."""
        return (self.spec.discrete or self.samples_continuous) and getattr(self.cfg, "sample_actions", False)

    @torch.no_grad()
    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        """The action for raw observations; without a state, that at the start of an episode."""
        return self.within_bounds(self.act(self.normalize(self._checked(obs)), state))
