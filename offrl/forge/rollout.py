"""Rolling out behaviour policies in Gymnasium's v5 Hopper, Walker2d and HalfCheetah, several episodes abreast.

Gymnasium's own `step` spends as long around MuJoCo as inside it. Here one environment lends its model, its reset
and its constants, every slot has its own `MjData`, and observation, reward and termination are computed for all
slots at once. Episodes are the same numbers as `gymnasium.make(ID)` gives from the same seed and actions.
"""

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
from offrl.envs.adapters import make_gymnasium
from offrl.envs.noisy import NoiseLaw, noise_generator
from offrl.utils.paths import PACKAGE

# Slots stepped abreast: enough to share the cost of the policy's matrix products, few enough for the cache.
SLOTS = 32
TIME_LIMIT = 1000
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
    """Training steps at which a behaviour policy of `robot` was kept, rising."""
    return sorted(int(file.stem) for file in _behavior(robot).glob("*.safetensors"))


def behavior_policy(robot: str, level: int) -> Policy:
    """The stochastic policy kept after `level` steps of training: a = tanh(mean + std * noise).

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


class Robots:
    """`slots` copies of a Gymnasium v5 robot that step together.

    Args:
        env_id: `Hopper-v5`, `Walker2d-v5` or `HalfCheetah-v5`.
        law: of noise on actions and rewards, as in `offrl/NoisyHopper-v0`; None: none.

    Attributes:
        drawn: `[n, A + 2]` what the law drew in the last step; None without one.
    """

    def __init__(self, env_id: str, slots: int = SLOTS, law: NoiseLaw | None = None) -> None:
        env: Any = make_gymnasium(env_id).unwrapped
        import mujoco

        self.env = env
        self.model, self.dt, self.frame_skip = env.model, env.dt, env.frame_skip
        self.action_dim, self.obs_dim = self.model.nu, env.observation_space.shape[0]
        self.slots, self.data = slots, [mujoco.MjData(self.model) for _ in range(slots)]
        self.law = law
        self.drawn: NDArray[np.float64] | None = None
        self._random: list[Any] = [None] * slots
        self._clock, self._before = np.zeros(slots, np.int64), np.zeros((slots, self.action_dim))
        self._mj_step = mujoco.mj_step
        self._ctrl, self._qpos, self._qvel = ([getattr(d, k) for d in self.data] for k in ("ctrl", "qpos", "qvel"))
        self.qpos, self.qvel = np.zeros((slots, self.model.nq)), np.zeros((slots, self.model.nv))
        # Bounds of (qpos without x, qvel): outside the first the robot has fallen, the second clips the observation.
        nq, ranges = self.model.nq, [(-np.inf, np.inf)] * self.obs_dim
        if falls := hasattr(env, "_healthy_z_range"):
            ranges = [getattr(env, "_healthy_state_range", (-np.inf, np.inf))] * self.obs_dim
            ranges[:2] = env._healthy_z_range, env._healthy_angle_range
        self._healthy = np.array(ranges).T
        self._clip = np.array([np.inf] * (nq - 1) + [10.0 if falls else np.inf] * self.model.nv)
        self._healthy_reward = env._healthy_reward if falls else 0.0

    def reset(self, slot: int, seed: int) -> NDArray[np.float64]:
        """Start an episode as `gymnasium.make(ID).reset(seed=seed)` does. Returns `[O]`."""
        self.env.data = self.data[slot]
        obs, _ = self.env.reset(seed=seed)
        self.qpos[slot] = self._qpos[slot]
        if self.law is not None:
            self._random[slot], self._clock[slot] = noise_generator(self.env), 0
        return obs

    def step(
        self, slots: NDArray[np.int64], actions: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """One step of `n` slots: actions `[n, A]` -> observations `[n, O]`, rewards `[n]`, terminated `[n]`."""
        before = self.qpos[slots, 0]
        if self.law is not None:
            actions = self._disturbed(slots, actions)
        for i, ctrl in zip(slots.tolist(), actions.astype(np.float64)):  # one cast for all slots
            self._ctrl[i][:] = ctrl
            self._mj_step(self.model, self.data[i], self.frame_skip)
        np.concatenate(self._qpos, out=self.qpos.reshape(-1))
        np.concatenate(self._qvel, out=self.qvel.reshape(-1))
        velocity = (self.qpos[slots, 0] - before) / self.dt
        state = np.concatenate((self.qpos[slots, 1:], self.qvel[slots]), -1)
        healthy = ((self._healthy[0] < state) & (state < self._healthy[1])).all(-1)
        reward = self.env._forward_reward_weight * velocity + healthy * self._healthy_reward
        reward -= self.env._ctrl_cost_weight * np.square(actions).sum(-1)
        if self.drawn is not None:
            reward += self.drawn[:, -1]
        return np.clip(state, -self._clip, self._clip), reward, ~healthy

    def _disturbed(self, slots: NDArray[np.int64], actions: NDArray[np.float32]) -> NDArray[Any]:
        """The executed actions `[n, A]`; what was drawn is kept in `drawn`."""
        assert self.law is not None
        size, times = self.action_dim, self._clock[slots].tolist()
        self.drawn = np.stack([self.law.draw(self._random[i], t, size) for i, t in zip(slots.tolist(), times)])
        self._clock[slots] += 1
        stuck = self.drawn[:, -2:-1] > 0
        self._before[slots] = np.where(stuck, self._before[slots], actions)
        return actions if self.law.silent else np.clip(self._before[slots] + self.drawn[:, :-2], -1, 1)


@dataclass(frozen=True)
class Part:
    """A share of a dataset: `size` steps of one policy; `seeds` give the resets and the policy's noise."""

    policy: Policy
    size: int
    seeds: np.random.SeedSequence


@torch.inference_mode()
def rollout(
    robots: Robots, parts: Sequence[Part], progress: Callable[[int], None] = lambda steps: None
) -> list[Episode]:
    """Exactly `size` steps of every part, in whole episodes of which the part's last one is cut.

    Episodes count in the order in which they *started*: taking them as they finish would prefer short ones. While
    the last episodes of a part are under way, the next part fills the slots that came free.

    Args:
        progress: called with the number of steps done so far.
    """
    buffers, playing = _Buffers(robots), [_Playing(part) for part in parts]
    free = list(range(robots.slots))
    while True:
        for play in playing:
            while free and play.expected_steps(buffers.clock) < play.size:
                play.start(free.pop(), robots, buffers)
        active = [play for play in playing if len(play.slots)]
        if not active:
            return [episode for play in playing for episode in play.first_steps()]
        slots = np.concatenate([play.slots for play in active])
        actions = np.concatenate([play.policy(buffers.current[play.slots], play.noise) for play in active])
        observations, rewards, terminated = robots.step(slots, actions)
        buffers.record(slots, actions, rewards, observations, robots.drawn)
        for play, fell in zip(active, np.split(terminated, np.cumsum([len(play.slots) for play in active])[:-1])):
            free += play.settle(fell, buffers)
        progress(sum(min(play.steps, play.size) for play in playing))


class _Buffers:
    """What the episodes in flight have seen and done, by slot."""

    def __init__(self, robots: Robots) -> None:
        slots = robots.slots
        self.observations = np.empty((slots, TIME_LIMIT + 1, robots.obs_dim), np.float32)
        self.actions = np.empty((slots, TIME_LIMIT, robots.action_dim), np.float32)
        self.rewards = np.empty((slots, TIME_LIMIT), np.float32)
        self.noise: NDArray[np.float32] | None = None  # made when there is some
        self.clock = np.zeros(slots, np.int64)
        self.current = torch.zeros(slots, robots.obs_dim)

    def start(self, slot: int, observation: NDArray[np.float64]) -> None:
        self.clock[slot] = 0
        self.observations[slot, 0] = observation
        self.current[slot] = torch.from_numpy(observation)

    def record(self, slots: NDArray[np.int64], actions: Any, rewards: Any, observations: Any, noise: Any) -> None:
        time, seen = self.clock[slots], observations.astype(np.float32)
        if noise is not None:
            if self.noise is None:
                self.noise = np.empty((len(self.clock), TIME_LIMIT, noise.shape[-1]), np.float32)
            self.noise[slots, time] = noise
        self.actions[slots, time], self.rewards[slots, time] = actions, rewards
        self.observations[slots, time + 1] = seen
        self.clock[slots] = time + 1
        self.current[slots] = torch.from_numpy(seen)

    def episode(self, slot: int, terminated: bool, seed: int) -> Episode:
        t = self.clock[slot]
        return Episode(
            observations=self.observations[slot, : t + 1].copy(),
            actions=self.actions[slot, :t].copy(),
            rewards=self.rewards[slot, :t].copy(),
            terminated=terminated,
            seed=seed,
            noise=None if self.noise is None else self.noise[slot, :t].copy(),
        )


class _Playing:
    """Book-keeping of one part: its episodes in the order in which they started, and the slots they are played in."""

    def __init__(self, part: Part) -> None:
        self.policy, self.size = part.policy, part.size
        self.resets, self.noise = (np.random.default_rng(seeds) for seeds in part.seeds.spawn(2))
        self.slots = np.empty(0, np.int64)
        self.number: dict[int, int] = {}  # which episode a slot plays
        self.episodes: list[Episode | None] = []
        self.seeds: list[int] = []
        self.steps = self.finished = self.finished_steps = 0

    def expected_steps(self, clock: NDArray[np.int64]) -> float:
        """Steps that all episodes will have when those under way become as long as the finished ones on average."""
        usual = self.finished_steps / self.finished if self.finished else TIME_LIMIT
        return self.finished_steps + float(np.maximum(clock[self.slots], usual).sum())

    def start(self, slot: int, robots: Robots, buffers: _Buffers) -> None:
        seed = int(self.resets.integers(2**31))
        buffers.start(slot, robots.reset(slot, seed))
        self.number[slot] = len(self.episodes)
        self.episodes.append(None)
        self.seeds.append(seed)
        self.slots = np.append(self.slots, slot)

    def settle(self, terminated: NDArray[np.bool_], buffers: _Buffers) -> list[int]:
        """Close the episodes that have ended or are long enough, after one step of all. Returns the slots set free."""
        self.steps += len(self.slots)
        stopped = terminated | (buffers.clock[self.slots] == TIME_LIMIT)
        if self.steps >= self.size:
            stopped |= self._enough(buffers.clock)
        if not stopped.any():
            return []
        freed = self.slots[stopped].tolist()
        for slot, fell in zip(freed, terminated[stopped]):
            number = self.number.pop(slot)
            episode = self.episodes[number] = buffers.episode(slot, bool(fell), self.seeds[number])
            self.finished += 1
            self.finished_steps += len(episode)
        self.slots = self.slots[~stopped]
        return freed

    def _enough(self, clock: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the first `size` steps are complete up to and with the episode in each slot."""
        lengths = np.array([0 if episode is None else len(episode) for episode in self.episodes])
        numbers = [self.number[slot] for slot in self.slots.tolist()]
        lengths[numbers] = clock[self.slots]
        return lengths.cumsum()[numbers] >= self.size

    def first_steps(self) -> Iterator[Episode]:
        """Episodes from the start, the last one cut so that they hold `size` steps together."""
        left = self.size
        for episode in self.episodes:
            if left <= 0:
                break
            assert episode is not None
            yield episode.cut(left)
            left -= min(left, len(episode))
