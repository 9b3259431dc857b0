"""Evaluation: rollouts of all lanes together in many environments; every episode counts exactly once.

Which episodes are played is fixed beforehand, so that short ones are not favoured (a vector of environments with autoreset
that stops after N finished episodes favours them). Episode k starts from environment seed `seed + k` for every lane and every
method: common random numbers, independent of those of training. With n environments a lane, episode k is played in number
k mod n as soon as episode k - n has ended there; policies that remember or sample play n episodes at a time instead.

Actions are computed in float64 by default. An episode then depends little on how many others run beside it (float32 matrix
products round differently for different batch sizes, and the simulators are chaotic), and not at all on what they do.
"""

from __future__ import annotations

import atexit
import copy
import math
import multiprocessing
import os
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.agents.base import Agent, Spec
from offrl.data.dataset import DatasetInfo
from offrl.data.lane_tasks import lane_infos
from offrl.envs import make_env as make_env_of
from offrl.envs import make_vector_env
from offrl.envs.adapters import plain_robot
from offrl.envs.chosen import check_interface, check_sendable, given_to, warn_of_no_limit, warn_of_other_bounds
from offrl.evaluation.environments import (
    AnyEnvs,
    Array,
    EnvProcess,
    Envs,
    MakeEnv,
    MakeEnvs,
    RobotEnvs,
    VectorEnvs,
    as_array,
    start_method,
)
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError

ARMS = ("cube", "scene", "puzzle")  # of OGBench: making one takes a second
MOST_WORKERS = 8  # processes that step environments, where nobody asks for more


@dataclass(frozen=True)
class Episodes:
    """Evaluation episodes, one column each.

    Attributes:
        returns: `[lanes, episodes]` undiscounted returns; lengths: `[lanes, episodes]` steps.
        normalized: `[lanes, episodes]` scores by the dataset's references, or 100 for a success and 0 else where the dataset
            is scored by success; None when it has neither.
        seeds: `[episodes]` environment seeds.
        predicted: `[lanes, episodes]` returns that the policy predicts at the episodes' starts; None: it predicts none.
    """

    returns: Array
    lengths: Array
    normalized: Array | None
    seeds: list[int]
    predicted: Array | None = None

    def lane_means(self) -> tuple[list[float], list[float] | None]:
        """Each lane's mean return and mean score."""
        return self.returns.mean(-1).tolist(), None if self.normalized is None else self.normalized.mean(-1).tolist()


class Evaluator:
    """Rollouts of every lane of an agent in a dataset's environment.

    The environments, and the processes that hold them, live until `close`; use it as a context manager.

    Args:
        info: the dataset's info, with environment and reference scores; under `data.tasks` each lane has an environment of
            its own.
        lanes: number of lanes of the agents.
        workers: number of processes that step environments; 1: this process. None: one per usable core.
        slots: number of environments, over all lanes; None: 100, or 1000 for vectorised tabular tasks, or 16 robot
            arms.
        make_env: constructor of one environment; the default follows `info`.

    Raises:
        OffrlError: the dataset has no environment, or its simulator is not installed.
    """

    def __init__(
        self,
        info: DatasetInfo,
        lanes: int,
        workers: int | None = None,
        slots: int | None = None,
        make_env: MakeEnv | None = None,
    ) -> None:
        self.info, self.lanes = info, lanes
        self.vector = make_env is None and make_vector_env(info, 1) is not None
        infos = lane_infos(info, lanes)
        usual = 1000 if self.vector else 16 if (infos[0].env_id or "").startswith(ARMS) else 100
        self.width = max(1, (slots or usual) // lanes)  # environments of each lane
        # One of each lane; picklable, for a fresh interpreter.
        self.makers: list[MakeEnv] = [make_env or partial(make_env_of, one) for one in infos]
        self.env_ids = {one.env_id for one in infos}
        self.robot = plain_robot(info) if make_env is None else None
        probe = self.makers[0]()
        if make_env is None:
            check_interface(info, probe)
        warn_of_no_limit(info, probe)
        warn_of_other_bounds(info, probe)
        self.obs_shape = tuple(probe.observation_space.shape or ())
        self.action_shape = tuple(probe.action_space.shape or ())
        self.actions = int(getattr(probe.action_space, "n", 0))  # number of discrete ones; 0: they are continuous
        probe.close()
        self.workers = workers or min(MOST_WORKERS, usable_cores())
        self.arrays: dict[str, Array] = {}
        self.processes: list[EnvProcess] = []
        self.local: AnyEnvs | None = None

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        atexit.unregister(self.close)
        for process in self.processes:
            process.request("close")
        for process in self.processes:
            process.close()
        if self.local:
            self.local.close()
        self.processes, self.local, self.arrays = [], None, {}

    def check(self, spec: Spec) -> None:
        """Raise OffrlError where the environment's observations or actions are not those of an agent of this spec."""
        theirs = _words(math.prod(self.obs_shape), self.actions or math.prod(self.action_shape), bool(self.actions))
        ours = _words(spec.obs_dim, spec.action_dim, spec.discrete)
        if theirs != ours:
            raise OffrlError(
                f"{self.info.env_id or 'the environment'} has {theirs}, and the agent learns from {ours}; name the "
                f"environment that the data was recorded in ({option('eval.env', 'ID')}), or train without evaluation "
                "(eval.every=0 eval.final_episodes=0)."
            )

    def given_to(self, method: str) -> tuple[Any, Any]:
        """What a process that starts by `method` has to be given to make the environments.

        Raises:
            OffrlError: a function of the user's can't be sent to a fresh interpreter.
        """
        if method != "fork":
            check_sendable(self.info.env_id or "make_env", self.makers[0])
        return given_to(method, self.env_ids)

    def run(self, agent: Agent, episodes: int, seed: int = 1_000_000, dtype: torch.dtype = torch.float64) -> Episodes:
        """Run `episodes` episodes in every lane.

        Args:
            agent: has `lanes` lanes.
            seed: environment seed of the first episode; the k-th has `seed + k`.
            dtype: precision of the policy.
        """
        self.check(agent.spec)
        policy = copy.deepcopy(agent).to(dtype)
        width = min(self.width, episodes)
        parts: list[tuple[Array, Array, Array, Array | None]] = []
        first = 0
        try:
            self._open(width)
            while first < episodes:
                parts.append(self._rollout(policy, seed + first, episodes - first, width, dtype))
                first += parts[-1][0].shape[1]
        except BaseException:
            self.close()  # the processes may be in the middle of a step: the next run needs new ones
            raise
        returns, lengths, successes, predicted = zip(*parts)
        total = np.concatenate(returns, 1)
        scores = 100.0 * np.concatenate(successes, 1) if self.info.scored_by_success else self.info.normalized(total)
        together = None if predicted[0] is None else np.concatenate(predicted, 1)
        seeds = [seed + k for k in range(episodes)]
        return Episodes(total, np.concatenate(lengths, 1), scores, seeds, together)

    # ---- episodes ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rollout(
        self, policy: Agent, seed: int, count: int, width: int, dtype: torch.dtype
    ) -> tuple[Array, Array, Array, Array | None]:
        """Returns, lengths, successes and predicted returns `[lanes, n]` of the first n of `count` episodes of every lane.

        n is `count`, or at most `width`, the number of environments that are used of every lane.
        """
        every = {name: array.reshape(self.lanes, -1, *array.shape[1:]) for name, array in self.arrays.items()}
        used = {name: array[:, :width] for name, array in every.items()}
        observation, action, reward, done = (used[name] for name in ("observation", "action", "reward", "done"))
        state, device = policy.initial_state(width), policy.spec.device

        def by_lane(array: Array) -> Tensor:
            return torch.from_numpy(array).to(device, dtype)

        every["done"][:] = True
        episode = np.tile(np.arange(width), (self.lanes, 1))  # the one that each environment plays
        self._start(episode < count, episode + seed)
        finite = np.isfinite(observation).all()
        prediction = policy.predicted_return(by_lane(observation), state)
        if state is not None or prediction is not None or self.vector:
            count = min(count, width)
        returns, lengths = np.zeros((self.lanes, count)), np.zeros((self.lanes, count), dtype=np.int64)
        successes = np.zeros((self.lanes, count), dtype=bool)
        while not done.all():
            running = ~done
            chosen = policy.select_action(by_lane(observation), state)
            action[...] = chosen.cpu().numpy()
            self._step()
            finite &= np.isfinite(observation).all()
            lane = np.nonzero(running)[0]
            returns[lane, episode[running]] += reward[running]
            lengths[lane, episode[running]] += 1
            state = policy.update_state(state, chosen, by_lane(reward))
            ended = running & done
            if ended.any():
                successes[np.nonzero(ended)[0], episode[ended]] = used["success"][ended]
                episode[ended] += width
                self._start(ended & (episode < count), episode + seed)
        if not (finite and np.isfinite(returns).all()):
            warnings.warn(
                f"{self.info.env_id or 'the environment'}: an observation or a reward of it is not finite, so that these "
                "scores mean nothing; look at its steps.",
                stacklevel=2,
            )
        predicted = None if prediction is None else prediction.cpu().numpy()[:, :count]
        return returns, lengths, successes, predicted

    def _start(self, which: Array, seeds: Array) -> None:
        """Start episodes in some environments; both `[lanes, width]`."""
        if not which.any():
            return
        given = np.full((self.lanes, len(self.arrays["done"]) // self.lanes), None, dtype=object)
        given[:, : which.shape[1]][which] = seeds[which].tolist()
        rows = given.reshape(-1).tolist()
        if self.local:
            self.local.reset(rows)
            return
        asked = [(process, [rows[row] for row in process.rows]) for process in self.processes]
        asked = [(process, own) for process, own in asked if any(seed is not None for seed in own)]
        for process, own in asked:
            process.request("reset", own)
        for process, _ in asked:
            process.wait()

    def _step(self) -> None:
        """Step all environments that are not done."""
        if self.local:
            self.local.step()
            return
        for process in self.processes:
            process.request("step")
        for process in self.processes:
            process.wait()

    # ---- environments -----------------------------------------------------------------------------------------

    def _open(self, width: int) -> None:
        """Make the environments, unless enough of them are there."""
        if self.arrays and len(self.arrays["done"]) >= width * self.lanes:
            return
        self.close()
        atexit.register(self.close)  # before Python waits for the processes
        total = width * self.lanes
        makers = [maker for maker in self.makers for _ in range(width)]
        make: MakeEnvs = partial(RobotEnvs, *self.robot) if self.robot else partial(Envs, makers)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "observation": ((total, *self.obs_shape), "d"),
            "action": ((total, *self.action_shape), "d" if self.action_shape else "q"),
            "reward": ((total,), "d"),
            "done": ((total,), "?"),
            "success": ((total,), "?"),
        }
        workers = min(self.workers, total)
        if workers == 1 or self.vector:
            self.arrays = {k: np.zeros(shape, dtype=np.dtype(code)) for k, (shape, code) in shapes.items()}
            if self.vector:
                self.local = VectorEnvs(make_vector_env(self.info, total), self.arrays)
            else:
                self.local = make(range(total), self.arrays)
            return
        method = start_method()
        environments = self.given_to(method)
        context: Any = multiprocessing.get_context(method)
        shared = {
            k: (context.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(code).itemsize)), shape, code)
            for k, (shape, code) in shapes.items()
        }
        self.arrays = {k: as_array(*value) for k, value in shared.items()}
        # Every process gets episodes of every lane, so that a lane of long episodes is shared.
        self.processes = [
            EnvProcess(context, make, range(first, total, workers), shared, environments) for first in range(workers)
        ]


def _words(obs_dim: int, action_dim: int, discrete: bool) -> str:
    return f"observations of {obs_dim} numbers and {action_dim} {'choices of action' if discrete else 'action numbers'}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
