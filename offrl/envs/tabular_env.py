"""Finite tasks as Gymnasium environments: one episode at a time, and many at once in a few array operations.

Both draw one number a step from the episode's own generator. So an environment of the vector runs exactly the episode of the
single environment from the same seed and actions.

`info["noise"]` is the noise index of the step, `info["intended_action"]` the commanded action; both are -1 at a reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from offrl.envs.tabular_solver import Array, Tabular
from offrl.envs.tabular_tasks import make_task

BLOCK = 64  # number of uniform draws that a row makes at a time


def observation_space(task: Tabular) -> spaces.Space[Any]:
    """The states' numbers, or the box of their coordinates."""
    if task.coordinates is None:
        return spaces.Discrete(task.states)
    return spaces.Box(task.coordinates.min(0), task.coordinates.max(0))


def features(task: Tabular) -> Array:
    """`[S, O]`: observation of each state: its coordinates, or a one-hot vector."""
    return np.eye(task.states) if task.coordinates is None else task.coordinates.astype(np.float64)


class TabularEnv(gymnasium.Env):
    """A finite task; its time limit is Gymnasium's wrapper.

    Args:
        task: name in `offrl.envs.tabular_tasks.TASKS`.
        parameters: parameters of the task.
    """

    def __init__(self, task: str, **parameters: Any) -> None:
        self.task = make_task(task, **parameters)
        self.observation_space = observation_space(self.task)
        self.action_space = spaces.Discrete(self.task.actions)
        self.thresholds = self.task.noise.cumsum()[:-1]
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self._observation(), {"noise": -1, "intended_action": -1}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        task, chosen = self.task, int(action)
        assert 0 <= chosen < task.actions, f"action {action} of {task.actions}"
        noise = int(self.thresholds.searchsorted(self.np_random.random(), "right"))
        place = self.state, chosen, noise
        self.state = int(task.successor[place])
        info = {"noise": noise, "intended_action": chosen}
        return self._observation(), float(task.reward[place]), bool(task.terminal[place]), False, info

    def _observation(self) -> Any:
        return self.state if self.task.coordinates is None else self.task.coordinates[self.state].copy()


class TabularVectorEnv(VectorEnv):
    """`num_envs` episodes of a finite task; a finished row starts anew on the next step, as in Gymnasium's vectors.

    Args:
        max_episode_steps: time limit; default: the task's.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's convention

    def __init__(self, num_envs: int, task: str, max_episode_steps: int | None = None, **parameters: Any) -> None:
        self.task, self.num_envs = make_task(task, **parameters), num_envs
        self.limit = max_episode_steps or self.task.limit
        self.single_observation_space = observation_space(self.task)
        self.single_action_space = spaces.Discrete(self.task.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.thresholds = self.task.noise.cumsum()[:-1]
        self.rows = np.arange(num_envs)
        self.generators: list[np.random.Generator | None] = [None] * num_envs  # None: made at the row's first draw
        self.uniforms, self.used = np.empty((num_envs, BLOCK)), np.full(num_envs, BLOCK)
        self.state, self.time = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
        self.ended = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start every row. An integer `seed` gives row i the seed `seed + i`, a list one to each (None: continue its draws)."""
        if isinstance(seed, int):
            seed = range(seed, seed + self.num_envs)
        seeds = [None] * self.num_envs if seed is None else seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments; give one to each.")
        for row, own in enumerate(seeds):
            if own is not None:
                self.generators[row], _ = seeding.np_random(own)
                self.used[row] = BLOCK
        self.state[:], self.time[:], self.ended[:] = 0, 0, False
        nothing = np.full(self.num_envs, -1)
        return self._observation(), {"noise": nothing, "intended_action": nothing.copy()}

    def step(self, actions: Any) -> tuple[NDArray[Any], Array, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of every row; one that ended before starts anew instead, with reward 0 and noise -1."""
        task, fresh, chosen = self.task, self.ended, np.asarray(actions)
        noise = self.thresholds.searchsorted(self._next_uniforms(~fresh), "right")
        place = self.state, chosen, noise
        reward = np.where(fresh, 0.0, task.reward[place])
        terminated = task.terminal[place] & ~fresh
        self.state = np.where(fresh, 0, task.successor[place])
        self.time = np.where(fresh, 0, self.time + 1)
        truncated = (self.time >= self.limit) & ~fresh
        self.ended = terminated | truncated
        info = {"noise": np.where(fresh, -1, noise), "intended_action": np.where(fresh, -1, chosen)}
        return self._observation(), reward, terminated, truncated, info

    def _next_uniforms(self, wanted: NDArray[np.bool_]) -> Array:
        """`[num_envs]`: next uniform draw of each row; only rows that are `wanted` use it up."""
        for row in np.flatnonzero(self.used == BLOCK).tolist():
            generator = self.generators[row] or seeding.np_random()[0]
            self.generators[row], self.uniforms[row], self.used[row] = generator, generator.random(BLOCK), 0
        uniforms = self.uniforms[self.rows, self.used]
        self.used += wanted
        return uniforms

    def _observation(self) -> NDArray[Any]:
        return self.state.copy() if self.task.coordinates is None else self.task.coordinates[self.state]
