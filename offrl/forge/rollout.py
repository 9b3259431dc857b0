"""Rollouts of behaviour policies in Gymnasium's v5 Hopper, Walker2d and HalfCheetah, many episodes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offrl.data.minari_write import Episode
from offrl.envs.robots import TIME_LIMIT, Robots
from offrl.utils.paths import PACKAGE

Policy = Callable[[torch.Tensor, np.random.Generator], NDArray[np.float32]]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: small products lose by sharing, and the summation order must not follow the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uniform_policy(action_dim: int) -> Policy:
    """Uniform actions in [-1, 1]."""

    def act(obs: torch.Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
        return rng.uniform(-1.0, 1.0, (len(obs), action_dim)).astype(np.float32)

    return act


def behavior_levels(robot: str) -> list[int]:
    """Training steps of the behaviour policies of `robot`, ascending."""
    return sorted(int(file.stem) for file in _behavior(robot).glob("*.safetensors"))


def behavior_policy(robot: str, level: int) -> Policy:
    """The stochastic policy after `level` steps of training: a = tanh(mean + std * noise).

    A 256-256 ReLU network whose output is mean and log-std, the latter clamped to [-20, 2].
    """
    from safetensors.torch import load_file

    tensors = load_file(_behavior(robot) / f"{level:07d}.safetensors")
    (w0, b0), (w1, b1), (w2, b2) = (
        (tensors[f"net.{i}.weight"].float().t(), tensors[f"net.{i}.bias"].float()) for i in (0, 2, 4)
    )

    def act(obs: torch.Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
        hidden = torch.addmm(b1, torch.addmm(b0, obs, w0).relu_(), w1).relu_()
        mean, log_std = torch.addmm(b2, hidden, w2).chunk(2, -1)
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        return torch.addcmul(mean, log_std.clamp(-20, 2).exp_(), noise).tanh_().numpy()

    return act


def _behavior(robot: str) -> Path:
    return PACKAGE / "assets" / "behavior" / robot


@dataclass(frozen=True)
class Part:
    """A share of a dataset."""

    policy: Policy
    size: int  # number of steps
    seeds: np.random.SeedSequence  # of the resets and of the policy's noise


@torch.inference_mode()
def rollout(
    robots: Robots, parts: Sequence[Part], progress: Callable[[int], None] = lambda steps: None
) -> list[Episode]:
    """Exactly `size` steps of every part, in whole episodes of which the part's last one is cut.

    Episodes count in the order in which they *started*: to take them as they end would prefer short ones. While the last
    episodes of a part are under way, the next part starts in the environments that are free.

    Args:
        progress: called with the number of steps done so far.
    """
    buffers, rollouts = _Buffers(robots), [_PartRollout(part) for part in parts]
    free = list(range(robots.envs))
    while True:
        for each in rollouts:
            while free and each.expected_steps(buffers.length) < each.size:
                each.start(free.pop(), robots, buffers)
        active = [each for each in rollouts if len(each.envs)]
        if not active:
            return [episode for each in rollouts for episode in each.first_steps()]
        envs = np.concatenate([each.envs for each in active])
        actions = np.concatenate([each.policy(buffers.current[each.envs], each.noise) for each in active])
        observations, rewards, terminated = robots.step(envs, actions)
        buffers.record(envs, actions, rewards, observations, robots.drawn)
        bounds = np.cumsum([len(each.envs) for each in active])[:-1]
        for each, ended in zip(active, np.split(terminated, bounds)):
            free += each.close(ended, buffers)
        progress(sum(min(each.steps, each.size) for each in rollouts))


class _Buffers:
    """Steps of the episodes under way, by environment."""

    def __init__(self, robots: Robots) -> None:
        envs = robots.envs
        self.observations = np.empty((envs, TIME_LIMIT + 1, robots.obs_dim), np.float32)
        self.actions = np.empty((envs, TIME_LIMIT, robots.action_dim), np.float32)
        self.rewards = np.empty((envs, TIME_LIMIT), np.float32)
        self.noise: NDArray[np.float32] | None = None  # allocated at the first noisy step
        self.length = np.zeros(envs, np.int64)
        self.current = torch.zeros(envs, robots.obs_dim)  # observations that the policies act on

    def start(self, env: int, observation: NDArray[np.float64]) -> None:
        self.length[env] = 0
        self.observations[env, 0] = observation
        self.current[env] = torch.from_numpy(observation)

    def record(self, envs: NDArray[np.int64], actions: Any, rewards: Any, observations: Any, noise: Any) -> None:
        t, reached = self.length[envs], observations.astype(np.float32)
        if noise is not None:
            if self.noise is None:
                self.noise = np.empty((len(self.length), TIME_LIMIT, noise.shape[-1]), np.float32)
            self.noise[envs, t] = noise
        self.actions[envs, t], self.rewards[envs, t] = actions, rewards
        self.observations[envs, t + 1] = reached
        self.length[envs] = t + 1
        self.current[envs] = torch.from_numpy(reached)

    def episode(self, env: int, terminated: bool, seed: int) -> Episode:
        t = self.length[env]
        return Episode(
            observations=self.observations[env, : t + 1].copy(),
            actions=self.actions[env, :t].copy(),
            rewards=self.rewards[env, :t].copy(),
            terminated=terminated,
            seed=seed,
            noise=None if self.noise is None else self.noise[env, :t].copy(),
        )


class _PartRollout:
    """Progress of one part: its episodes in the order in which they started, and the environments that it uses."""

    def __init__(self, part: Part) -> None:
        self.policy, self.size = part.policy, part.size
        self.resets, self.noise = (np.random.default_rng(seeds) for seeds in part.seeds.spawn(2))
        self.envs = np.empty(0, np.int64)
        self.number: dict[int, int] = {}  # environment -> number of its episode
        self.episodes: list[Episode | None] = []  # None: under way
        self.seeds: list[int] = []
        self.steps = self.finished = self.finished_steps = 0

    def expected_steps(self, length: NDArray[np.int64]) -> float:
        """Steps of all episodes, if those under way become as long as the finished ones on average."""
        usual = self.finished_steps / self.finished if self.finished else TIME_LIMIT
        return self.finished_steps + float(np.maximum(length[self.envs], usual).sum())

    def start(self, env: int, robots: Robots, buffers: _Buffers) -> None:
        """Start the part's next episode in environment `env`."""
        seed = int(self.resets.integers(2**31))
        buffers.start(env, robots.reset(env, seed))
        self.number[env] = len(self.episodes)
        self.episodes.append(None)
        self.seeds.append(seed)
        self.envs = np.append(self.envs, env)

    def close(self, terminated: NDArray[np.bool_], buffers: _Buffers) -> list[int]:
        """After a step of all: close the episodes that have ended or are long enough. Returns the environments set free."""
        self.steps += len(self.envs)
        stopped = terminated | (buffers.length[self.envs] == TIME_LIMIT)
        if self.steps >= self.size:
            stopped |= self._enough(buffers.length)
        if not stopped.any():
            return []
        freed = self.envs[stopped].tolist()
        for env, ended in zip(freed, terminated[stopped]):
            number = self.number.pop(env)
            episode = self.episodes[number] = buffers.episode(env, bool(ended), self.seeds[number])
            self.finished += 1
            self.finished_steps += len(episode)
        self.envs = self.envs[~stopped]
        return freed

    def _enough(self, length: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the first `size` steps end with or before the last step of each environment's episode."""
        lengths = np.array([0 if episode is None else len(episode) for episode in self.episodes])
        numbers = [self.number[env] for env in self.envs.tolist()]
        lengths[numbers] = length[self.envs]
        return lengths.cumsum()[numbers] >= self.size

    def first_steps(self) -> Iterator[Episode]:
        """The first episodes, the last of them cut, so that they hold `size` steps together."""
        left = self.size
        for episode in self.episodes:
            if left <= 0:
                break
            assert episode is not None
            yield episode.cut(left)
            left -= min(left, len(episode))
