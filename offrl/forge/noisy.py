"""Datasets of robots with unseen noise: `forge/noisy-hopper/medium-replay-s0.2-v0` and the like.

The part behind the level names the noise: `s0.2` ACT's noise with sigma 0.2, `iid0.2` a constant std, `sticky0.25` the
probability to repeat the previous action, `reward1` Normal noise on the reward (`offrl.envs.noisy`). The data hold the
commanded actions.

The behaviour of Hopper, HalfCheetah and Walker2d are the forge's own policies, which were trained without noise (ACT trained
new ones in the noisy task). The behaviour of Reacher is a controller: inverse kinematics and PD control of the joints, with
Normal noise of std 0.4 (`medium`) and 0.1 (`expert`) on its actions, the ends of the range of dichotomy of control's Reacher
data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offrl.data.minari_write import Episode
from offrl.envs import NOISY_IDS
from offrl.envs.noisy import NoiseModel
from offrl.envs.registered import make_gymnasium

ROBOTS = {robot.lower(): robot for robot in NOISY_IDS}
LEVELS = ("random", "medium", "expert", "medium-expert", "medium-replay")
REACHER_NOISE = {"random": None, "medium": 0.4, "expert": 0.1}  # std on the controller's actions
REACHER_LIMIT = 50
# Means over episode seeds 0 to 499, without noise: uniform actions, and the controller without noise of its own.
REACHER_REFERENCES = (-43.00, -3.68)
REACHER_REFERENCES_SOURCE = "ours: uniform actions and the controller, 500 episodes each, without any noise"
SIGMAS = ("0", "0.1", "0.2", "0.3")
KINDS = {"s": "sigma", "iid": "iid", "sticky": "sticky", "reward": "reward_sigma"}
UPPER_ARM, FOREARM = 0.1, 0.11  # of Reacher, in metres
STIFFNESS, DAMPING = 0.2, 0.04  # of its joints, in units of the largest torque


@dataclass(frozen=True)
class Recipe:
    """How a noisy dataset is made."""

    robot: str  # key of `ROBOTS`
    level: str  # of the behaviour: one of `LEVELS`, of Reacher a key of `REACHER_NOISE`
    noise: NoiseModel

    @property
    def env_id(self) -> str:
        return NOISY_IDS[ROBOTS[self.robot]]

    @property
    def strengths(self) -> dict[str, float]:
        """The fields of the noise model that are not zero."""
        return {name: value for name, value in vars(self.noise).items() if value}


def names() -> list[str]:
    """Subject and level of the listed datasets (others of the same form can be built too)."""
    levels = {robot: ("medium", "expert") if robot == "reacher" else ("medium", "medium-replay") for robot in ROBOTS}
    return [f"noisy-{robot}/{level}-s{sigma}" for robot in ROBOTS for level in levels[robot] for sigma in SIGMAS]


def recipe(name: str) -> Recipe | None:
    """The recipe of `subject/level`; None when the name is none of ours."""
    number = r"(0|[1-9]\d*|\d+\.\d*[1-9])"
    match = re.fullmatch(rf"noisy-({'|'.join(ROBOTS)})/([a-z-]+)-({'|'.join(KINDS)}){number}", name)
    if match is None or match[2] not in (REACHER_NOISE if match[1] == "reacher" else LEVELS):
        return None
    return Recipe(match[1], match[2], NoiseModel(**{KINDS[match[3]]: float(match[4])}))


# ---- Reacher -------------------------------------------------------------------------------------------------------


def reach(obs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Torques that bring the fingertip to the target: PD control to the nearer of the two postures that touch it."""
    joints, (x, y), speeds = np.arctan2(obs[2:4], obs[:2]), obs[4:6], obs[6:8]
    bend = np.arccos(np.clip((x * x + y * y - UPPER_ARM**2 - FOREARM**2) / (2 * UPPER_ARM * FOREARM), -1, 1))
    elbow = np.array([bend, -bend])
    shoulder = np.arctan2(y, x) - np.arctan2(FOREARM * np.sin(elbow), UPPER_ARM + FOREARM * np.cos(elbow))
    ways = (np.stack([shoulder, elbow], -1) - joints + np.pi) % (2 * np.pi) - np.pi
    way = ways[np.abs(ways).sum(-1).argmin()]
    return np.clip(STIFFNESS * way - DAMPING * speeds, -1, 1)


def drive(
    noise: NoiseModel,
    std: float | None,
    size: int,
    seeds: np.random.SeedSequence,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[Episode]:
    """Exactly `size` steps of Reacher in episodes of 50, the last one cut.

    Args:
        noise: noise of the environment.
        std: standard deviation of the noise on the controller's actions; None: uniform actions.
    """
    resets, rng = (np.random.default_rng(s) for s in seeds.spawn(2))
    env: Any = make_gymnasium(NOISY_IDS["Reacher"], **vars(noise))
    episodes = []
    for start in range(0, size, REACHER_LIMIT):
        steps, seed = min(REACHER_LIMIT, size - start), int(resets.integers(2**31))
        obs, info = env.reset(seed=seed)
        observations = np.empty((steps + 1, len(obs)), np.float32)
        actions, rewards = np.empty((steps, 2), np.float32), np.empty(steps, np.float32)
        drawn = np.empty((steps, len(info["noise"])), np.float32)
        observations[0] = obs
        for t in range(steps):
            if std is None:
                actions[t] = rng.uniform(-1, 1, 2)
            else:
                actions[t] = np.clip(reach(obs) + std * rng.standard_normal(2), -1, 1)
            obs, rewards[t], _, _, info = env.step(actions[t])
            observations[t + 1], drawn[t] = obs, info["noise"]
        episodes.append(Episode(observations, actions, rewards, False, seed, drawn))
        progress(start + steps)
    env.close()
    return episodes
