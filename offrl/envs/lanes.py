"""The environments that agents learn in: one for each lane, stepped together, whose state can be restored by replaying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from offrl.data.dataset import DatasetInfo
from offrl.envs.adapters import make_env
from offrl.utils.errors import OffrlError

Array = NDArray[Any]
SUCCESS = ("success", "is_success", "goal_achieved")  # what environments call it in `info`


class NonFiniteValue(OffrlError):
    """An environment gave a number that float32, in which replays are kept, does not hold."""


@dataclass(frozen=True)
class EndedEpisode:
    """An episode that has just ended; `success` is None where the environment does not tell."""

    lane: int
    number: int
    seed: int
    ret: float
    length: int
    success: bool | None


@dataclass(frozen=True)
class Step:
    """One step of every lane.

    Attributes:
        obs, next_obs: `[lanes, O]`; the successor is the last observation of an episode, not the first of the next one.
        reward: `[lanes]` float64, as the environment gives it. terminated: `[lanes]` bool, as the environment says; an
            episode that reaches its time limit is not terminated.
        timestep: `[lanes]` int64 position in the episode.
        ended: the episodes that end with this step, terminated or not.
    """

    obs: Array
    next_obs: Array
    reward: Array
    terminated: Array
    timestep: Array
    ended: list[EndedEpisode]


class LaneEnvs:
    """One environment for each lane.

    The seed of an episode is a function of the lane's seed and of the episode's number in its lane. So an environment's state
    is a function of this number and of the actions since, and `restore` needs nothing else.

    Args:
        info: the dataset's info, which names the environment.
        seeds: the lanes' seeds.

    Raises:
        OffrlError: the dataset has no environment, its simulator is not installed, or its spaces are others than the dataset's.

    `reset`, `restore` and `step` raise NonFiniteValue for an observation or a reward that is not finite.
    """

    def __init__(self, info: DatasetInfo, seeds: Sequence[int], obs_dim: int, action_dim: int) -> None:
        self.seeds, self.env_id = list(seeds), info.env_id
        self.envs: list[gymnasium.Env[Any, Any]] = [make_env(info) for _ in seeds]
        _check_spaces(self.envs[0], info, obs_dim, action_dim)
        lanes = len(self.envs)
        self.obs = np.zeros((lanes, obs_dim))
        self.episode, self.length = [0] * lanes, [0] * lanes
        self.ret: list[float] = [0.0] * lanes
        self.success: list[bool | None] = [None] * lanes

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def episode_seed(self, lane: int) -> int:
        """The environment's seed in the lane's current episode: 31 bits."""
        entropy = [self.seeds[lane] % 2**64, self.episode[lane]]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1

    def reset(self) -> None:
        """Start the first episode of every lane."""
        for lane in range(len(self.envs)):
            self._begin(lane, 0)

    def restore(self, episodes: Sequence[int], actions: Sequence[Array]) -> None:
        """Bring every lane into the state that it had after these actions of this episode.

        Args:
            episodes: the number of the current episode of each lane. actions: its actions so far, `[steps, A]` each.
        """
        for lane, (episode, taken) in enumerate(zip(episodes, actions)):
            self._begin(lane, episode)
            for action in taken:
                self._step(lane, action)

    def step(self, actions: Array) -> Step:
        """Step every lane, and begin a new episode where one has ended.

        Args:
            actions: `[lanes, A]`, or `[lanes]` int64.
        """
        before, timestep = self.obs.copy(), np.array(self.length)
        stepped = [self._step(lane, action) for lane, action in enumerate(actions)]
        reward, terminated, truncated = (np.array(part) for part in zip(*stepped))
        after = self.obs.copy()
        ended = [self._end(lane) for lane in np.flatnonzero(terminated | truncated).tolist()]
        return Step(before, after, reward, terminated, timestep, ended)

    def _begin(self, lane: int, episode: int) -> None:
        self.episode[lane], self.length[lane], self.ret[lane], self.success[lane] = episode, 0, 0.0, None
        self.obs[lane] = self.envs[lane].reset(seed=self.episode_seed(lane))[0]
        self._check_finite(lane, "an observation", self.obs[lane])

    def _step(self, lane: int, action: Array) -> tuple[float, bool, bool]:
        given = np.asarray(action, dtype=np.float64) if action.ndim else int(action)
        obs, reward, terminated, truncated, info = self.envs[lane].step(given)
        self.obs[lane] = obs
        self.length[lane] += 1
        self._check_finite(lane, "an observation", self.obs[lane])
        self._check_finite(lane, "a reward", np.array([reward], dtype=np.float64))
        self.ret[lane] += float(reward)
        for name in SUCCESS:
            if name in info:
                self.success[lane] = bool(self.success[lane]) or bool(info[name])
        return float(reward), bool(terminated), bool(truncated)

    def _check_finite(self, lane: int, what: str, values: Array) -> None:
        wrong = values[~(np.abs(values) <= np.finfo(np.float32).max)]
        if wrong.size:
            raise NonFiniteValue(
                f"{self.env_id} gave {what} of {wrong[0]:g} at timestep {self.length[lane]} of the episode with seed "
                f"{self.episode_seed(lane)}; repair the environment"
            )

    def _end(self, lane: int) -> EndedEpisode:
        number = self.episode[lane]
        ended = EndedEpisode(
            lane, number, self.episode_seed(lane), self.ret[lane], self.length[lane], self.success[lane]
        )
        self._begin(lane, number + 1)
        return ended


def _check_spaces(env: gymnasium.Env[Any, Any], info: DatasetInfo, obs_dim: int, action_dim: int) -> None:
    observation = env.observation_space.shape
    space = env.action_space
    width = int(space.n) if isinstance(space, gymnasium.spaces.Discrete) else int(np.prod(space.shape or (0,)))
    if observation != (obs_dim,) or width != action_dim:
        raise OffrlError(
            f"{info.env_id}: its observations {observation} and {width} actions are not the dataset's {obs_dim} and "
            f"{action_dim}; name the environment that {info.id} was recorded in."
        )
