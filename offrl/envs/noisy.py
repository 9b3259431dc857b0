"""Gymnasium's robots with noise that the agent can neither see nor choose: `offrl/NoisyHopper-v0` and its kin.

The noise `sigma` is that of ACT (Gao et al., AAAI 2024; LAMDA-RL/ACT): at step t of an episode the executed action is

    clip(commanded + Normal(0, std_t) in each dimension, -1, 1),     std_t = |(1 - exp(-0.01 t)) sin(t) sigma|,

so the first step is free of noise and the strength swings with the sine of t in radians. The agent sees it as noise of the
transitions; it does not observe the step. Other kinds of noise, in any combination: `iid`, the same with a constant std;
`sticky`, the probability that the previous action is executed again (as in the Arcade Learning Environment);
`reward_sigma`, the std of Normal noise on the reward. Reward noise does not change the optimal policy: a method that does
worse under it chases luck.

`info["noise"]` is the draw of the step: the noise added to each action dimension, whether the previous action stuck (0 or 1),
the noise added to the reward. `info["intended_action"]` is the commanded action. The noise has a generator of its own,
seeded by the reset's seed: the robot starts as without noise, and with every strength at zero the environment is the robot
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from offrl.envs.registered import make_gymnasium
from offrl.utils.errors import OffrlError

ROBOTS = {"Hopper": "Hopper-v5", "HalfCheetah": "HalfCheetah-v5", "Walker2d": "Walker2d-v5", "Reacher": "Reacher-v5"}


@dataclass(frozen=True)
class NoiseModel:
    """Distribution of the noise of a step; see the module's docstring."""

    sigma: float = 0.0  # strength of ACT's noise, which varies with the step
    iid: float = 0.0  # std of Normal noise on each action dimension
    sticky: float = 0.0  # probability that the previous action is executed again
    reward_sigma: float = 0.0  # std of Normal noise on the reward

    def __post_init__(self) -> None:
        if min(self.sigma, self.iid, self.reward_sigma) < 0 or not 0 <= self.sticky < 1:
            raise OffrlError(f"{self}: standard deviations should be at least 0, the probability to stick in [0, 1).")

    @property
    def silent(self) -> bool:
        return self == NoiseModel()

    def std(self, t: int) -> float:
        """Std of ACT's noise at step t."""
        return abs((1 - math.exp(-0.01 * t)) * math.sin(t) * self.sigma)

    def draw(self, rng: np.random.Generator, t: int, actions: int) -> NDArray[np.float64]:
        """`[actions + 2]`: a draw for step t, laid out as `info["noise"]`."""
        noise = np.zeros(actions + 2)
        if self.sigma:
            noise[:-2] = self.std(t) * rng.standard_normal(actions)
        if self.iid:
            noise[:-2] += self.iid * rng.standard_normal(actions)
        if self.sticky and rng.random() < self.sticky and t > 0:
            noise[-2] = 1.0
        if self.reward_sigma:
            noise[-1] = self.reward_sigma * rng.standard_normal()
        return noise


class NoiseProcess:
    """The noise of several environments: the generator, the step and the previous action of each one's episode.

    Args:
        model: distribution of the noise.
        envs: number of environments.
        actions: number of action dimensions.
    """

    def __init__(self, model: NoiseModel, envs: int, actions: int) -> None:
        self.model = model
        self._generators: list[np.random.Generator | None] = [None] * envs
        self._steps, self._previous = np.zeros(envs, np.int64), np.zeros((envs, actions))

    def start(self, env: int, generator: np.random.Generator) -> None:
        """Begin an episode of environment `env`."""
        self._generators[env], self._steps[env] = generator, 0

    def disturb(self, envs: Sequence[int], actions: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """One step of the environments numbered `envs`: commanded actions `[n, A]` -> executed ones, draws `[n, A + 2]`."""
        draws = []
        for env in envs:
            generator = self._generators[env]
            assert generator is not None, "reset comes before step"
            draws.append(self.model.draw(generator, int(self._steps[env]), actions.shape[1]))
        noise = np.stack(draws)
        self._steps[envs] += 1
        self._previous[envs] = np.where(noise[:, -2:-1] > 0, self._previous[envs], actions)
        executed = actions if self.model.silent else np.clip(self._previous[envs] + noise[:, :-2], -1, 1)
        return executed, noise


class Noisy(gymnasium.Wrapper):
    """An environment with actions in [-1, 1], and with noise on its actions and rewards."""

    def __init__(self, env: gymnasium.Env, noise: NoiseModel) -> None:
        super().__init__(env)
        self.noise, self.actions = noise, (env.action_space.shape or (0,))[0]
        self._process = NoiseProcess(noise, 1, self.actions)
        self._generator: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        if seed is not None or self._generator is None:
            self._generator = noise_generator(self.env)
        self._process.start(0, self._generator)
        return obs, info | {"noise": np.zeros(self.actions + 2), "intended_action": np.zeros(self.actions, np.float32)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        (executed,), (noise,) = self._process.disturb([0], np.array([action]))
        obs, reward, terminated, truncated, info = self.env.step(executed)
        info |= {"noise": noise, "intended_action": np.array(action, np.float32)}
        return obs, float(reward) + float(noise[-1]), terminated, truncated, info


def noise_generator(env: gymnasium.Env) -> np.random.Generator:
    """A generator for the noise of an environment that was reset; it takes no draw from the environment's own."""
    return env.np_random.spawn(1)[0]


def make_noisy(robot: str, **options: Any) -> gymnasium.Env:
    """Entry point of `offrl/Noisy...-v0`.

    Args:
        robot: Gymnasium id.
        options: fields of `NoiseModel`; all others (`render_mode` and the like) go to the robot.
    """
    strengths = {key: options.pop(key) for key in NoiseModel.__dataclass_fields__ if key in options}
    return Noisy(make_gymnasium(robot, **options).unwrapped, NoiseModel(**strengths))
