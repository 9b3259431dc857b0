"""Gymnasium's v5 Hopper, Walker2d and HalfCheetah, many of them at a time.

Gymnasium's own `step` spends as long around MuJoCo as inside it: plain loops over `gymnasium.make(ID)` take two to three times
as long. Here one Gymnasium environment lends its model, its reset and its constants; each of the environments that step
together has an `MjData` of its own; observations, rewards and terminations are computed for all of them at once. The episodes
are, number by number, those of `gymnasium.make(ID)` from the same seed and actions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offrl.envs.noisy import NoiseModel, NoiseProcess, noise_generator
from offrl.envs.registered import make_gymnasium

ENVS = 32  # environments that step together: enough to share the policy's matrix products, few enough for the cache
TIME_LIMIT = 1000  # steps of an episode
ROBOT_IDS = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")


class Robots:
    """Copies of a Gymnasium v5 robot that step together.

    Args:
        env_id: `Hopper-v5`, `Walker2d-v5` or `HalfCheetah-v5`.
        envs: number of copies.
        noise: noise on actions and rewards, as in `offrl/NoisyHopper-v0`; None: none.

    Attributes:
        env: the Gymnasium environment that lends model, reset and constants.
        drawn: `[n, A + 2]` draws of the noise in the last step; None without noise.
    """

    def __init__(self, env_id: str, envs: int = ENVS, noise: NoiseModel | None = None) -> None:
        env: Any = make_gymnasium(env_id).unwrapped
        import mujoco

        self.env = env
        self.model, self.dt, self.frame_skip = env.model, env.dt, env.frame_skip
        self.action_dim, self.obs_dim = self.model.nu, env.observation_space.shape[0]
        self.envs, self.data = envs, [mujoco.MjData(self.model) for _ in range(envs)]
        self.noise = NoiseProcess(noise, envs, self.action_dim) if noise else None
        self.drawn: NDArray[np.float64] | None = None
        self._mj_step = mujoco.mj_step
        self._ctrl, self._qpos, self._qvel = ([getattr(d, k) for d in self.data] for k in ("ctrl", "qpos", "qvel"))
        self.qpos, self.qvel = np.zeros((envs, self.model.nq)), np.zeros((envs, self.model.nv))
        # Bounds of (qpos without x, qvel): outside the first the robot has fallen, the second clips the observation.
        nq, ranges = self.model.nq, [(-np.inf, np.inf)] * self.obs_dim
        if falls := hasattr(env, "_healthy_z_range"):
            ranges = [getattr(env, "_healthy_state_range", (-np.inf, np.inf))] * self.obs_dim
            ranges[:2] = env._healthy_z_range, env._healthy_angle_range
        self._healthy = np.array(ranges).T
        self._clip = np.array([np.inf] * (nq - 1) + [10.0 if falls else np.inf] * self.model.nv)
        self._healthy_reward = env._healthy_reward if falls else 0.0

    def reset(self, env: int, seed: int) -> NDArray[np.float64]:
        """Start an episode as `gymnasium.make(ID).reset(seed=seed)` does. Returns `[O]`."""
        self.env.data = self.data[env]
        obs, _ = self.env.reset(seed=seed)
        self.qpos[env] = self._qpos[env]
        if self.noise is not None:
            self.noise.start(env, noise_generator(self.env))
        return obs

    def step(
        self, envs: NDArray[np.int64], actions: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Step the `n` environments numbered `envs`.

        Args:
            actions: `[n, A]`.

        Returns:
            Observations `[n, O]`, rewards `[n]`, terminated `[n]`.
        """
        before = self.qpos[envs, 0]
        if self.noise is not None:
            actions, self.drawn = self.noise.disturb(envs.tolist(), actions)
        for i, ctrl in zip(envs.tolist(), actions.astype(np.float64)):  # one cast for all
            self._ctrl[i][:] = ctrl
            self._mj_step(self.model, self.data[i], self.frame_skip)
        np.concatenate(self._qpos, out=self.qpos.reshape(-1))
        np.concatenate(self._qvel, out=self.qvel.reshape(-1))
        velocity = (self.qpos[envs, 0] - before) / self.dt
        state = np.concatenate((self.qpos[envs, 1:], self.qvel[envs]), -1)
        healthy = ((self._healthy[0] < state) & (state < self._healthy[1])).all(-1)
        reward = self.env._forward_reward_weight * velocity + healthy * self._healthy_reward
        reward -= self.env._ctrl_cost_weight * np.square(actions).sum(-1)
        if self.drawn is not None:
            reward += self.drawn[:, -1]
        return np.clip(state, -self._clip, self._clip), reward, ~healthy
