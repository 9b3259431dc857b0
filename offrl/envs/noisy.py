"""Gymnasium's robots with noise that the agent can neither see nor choose: `offrl/NoisyHopper-v0` and its kin.

The law `sigma` is that of ACT (Gao et al., AAAI 2024; LAMDA-RL/ACT): at step t of an episode the executed action is

    clip(commanded + Normal(0, std_t) in each dimension, -1, 1),     std_t = |(1 - exp(-0.01 t)) sin(t) sigma|,

so the first step is free of noise and the strength swings with the sine of t in radians. To the agent it is noise of the
transitions, and the step is not observed. Offered besides, in any combination: `iid`, the same with a constant deviation;
`sticky`, a chance that the action before is executed again (as in the Arcade Learning Environment); `reward_sigma`, Normal
noise on the reward, which leaves the best policy what it is: whatever a method loses by it, it loses by chasing luck.

`info["noise"]` is the draw of the step: what was added to each action dimension, then whether the action stuck (0 or 1), then
what was added to the reward. `info["intended_action"]` is the commanded action. Noise has a generator of its own, made from the
seed of the reset: the robot starts as without noise, and with every strength at zero the environment is the robot itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from offrl.envs.adapters import make_gymnasium
from offrl.utils.errors import OffrlError

ROBOTS = {"Hopper": "Hopper-v5", "HalfCheetah": "HalfCheetah-v5", "Walker2d": "Walker2d-v5", "Reacher": "Reacher-v5"}


@dataclass(frozen=True)
class NoiseLaw:
    """What is drawn at each step; see the module's text."""

    sigma: float = 0.0
    iid: float = 0.0
    sticky: float = 0.0
    reward_sigma: float = 0.0

    def __post_init__(self) -> None:
        if min(self.sigma, self.iid, self.reward_sigma) < 0 or not 0 <= self.sticky < 1:
            raise OffrlError(f"{self}: deviations should be at least 0, the chance to stick in [0, 1).")

    @property
    def silent(self) -> bool:
        return self == NoiseLaw()

    def std(self, t: int) -> float:
        """Deviation of the law `sigma` at step t."""
        return abs((1 - math.exp(-0.01 * t)) * math.sin(t) * self.sigma)

    def draw(self, rng: np.random.Generator, t: int, actions: int) -> NDArray[np.float64]:
        """`[actions + 2]` draw of step t."""
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


class Noisy(gymnasium.Wrapper):
    """An environment with actions in [-1, 1] and a noise law on them and on its rewards."""

    def __init__(self, env: gymnasium.Env, law: NoiseLaw) -> None:
        super().__init__(env)
        self.law = law
        self.random: np.random.Generator | None = None
        self.time, self.before = 0, np.zeros(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        if seed is not None or self.random is None:
            self.random = noise_generator(self.env)
        self.time = 0
        size = (self.action_space.shape or (0,))[0]
        return obs, info | {"noise": np.zeros(size + 2), "intended_action": np.zeros(size, np.float32)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.random is not None, "reset comes before step"
        noise = self.law.draw(self.random, self.time, len(action))
        self.before = self.before if noise[-2] else np.array(action)
        executed = self.before if self.law.silent else np.clip(self.before + noise[:-2], -1, 1)
        obs, reward, terminated, truncated, info = self.env.step(executed)
        self.time += 1
        info |= {"noise": noise, "intended_action": np.array(action, np.float32)}
        return obs, float(reward) + float(noise[-1]), terminated, truncated, info


def noise_generator(env: gymnasium.Env) -> np.random.Generator:
    """A generator for the noise of an environment that was reset; the environment's own goes on as if nothing were."""
    return env.np_random.spawn(1)[0]


def make_noisy(robot: str, **law: Any) -> gymnasium.Env:
    """Entry point of `offrl/Noisy...-v0`.

    Args:
        robot: Gymnasium id. law: strengths of `NoiseLaw`; `render_mode` and the like go to the robot.
    """
    strengths = {key: law.pop(key) for key in NoiseLaw.__dataclass_fields__ if key in law}
    return Noisy(make_gymnasium(robot, **law).unwrapped, NoiseLaw(**strengths))
