"""Evaluation: rollouts of all lanes together in many environments; every episode counts exactly once.

Episodes are run in batches, one per environment, and a finished environment waits for the rest of its batch. So short episodes
are not favoured (a vector of environments with autoreset that stops after N finished episodes favours them). Episode k starts
from environment seed `seed + k` for every lane and every method: common random numbers, independent of those of training.

Actions are computed in float64 by default. An episode then does not depend on how many others run beside it (float32 matrix
products round differently for different batch sizes, and the simulators are chaotic).
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offrl.agents.base import Agent, Spec
from offrl.data.dataset import DatasetInfo
from offrl.data.lane_tasks import lane_infos
from offrl.envs import make_env as make_env_of
from offrl.envs import make_vector_env
from offrl.envs.chosen import give, given, warn_of_no_limit, warn_of_other_bounds
from offrl.envs.tabular_env import features
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError

MakeEnv = Callable[[], Any]
ARMS = ("cube", "scene", "puzzle")  # of OGBench: making one takes a second
Array = NDArray[Any]


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


class VectorEnvs:
    """All environments of a batch as one Gymnasium vector, stepped by a few array operations; the interface of `Envs`.

    Finished environments go on; their steps are ignored.

    Args:
        env: the vector of a tabular task.
    """

    def __init__(self, env: Any, arrays: dict[str, Array]) -> None:
        self.env, self.arrays, self.features = env, arrays, features(env.task)

    def reset(self, seeds: list[int | None]) -> None:
        self.env.reset(seed=seeds)
        self.arrays["done"][:] = [seed is None for seed in seeds]
        self.arrays["observation"][:] = self.features[self.env.state]

    def step(self) -> None:
        _, reward, terminated, truncated, _ = self.env.step(self.arrays["action"])
        running = ~self.arrays["done"]
        self.arrays["reward"][running] = reward[running]
        self.arrays["done"] |= terminated | truncated
        self.arrays["observation"][running] = self.features[self.env.state[running]]

    def close(self) -> None:
        self.env.close()


class Envs:
    """Some environments of a batch, stepped one after another.

    Args:
        makers: constructors of environments with flat observations, one for each row of the arrays.
        rows: rows of the arrays that belong to these environments.
        arrays: `observation`, `action`, `reward`, `done` and `success` of all environments; an object writes its own rows only.
    """

    def __init__(self, makers: Sequence[MakeEnv], rows: range, arrays: dict[str, Array]) -> None:
        self.envs = [makers[row]() for row in rows]
        self.rows, self.arrays = rows, arrays

    def reset(self, seeds: Sequence[int | None]) -> None:
        """Start an episode in each environment; one with seed None is not used in this batch."""
        for env, row, seed in zip(self.envs, self.rows, seeds):
            self.arrays["done"][row] = seed is None
            self.arrays["success"][row] = False
            if seed is not None:
                self.arrays["observation"][row] = env.reset(seed=seed)[0]

    def step(self) -> None:
        """Step every environment that is not done."""
        arrays = self.arrays
        for env, row in zip(self.envs, self.rows):
            if arrays["done"][row]:
                continue
            action = arrays["action"][row]
            observation, reward, terminated, truncated, info = env.step(action if action.ndim else int(action))
            arrays["observation"][row] = observation
            arrays["reward"][row] = reward
            arrays["done"][row] = terminated or truncated
            arrays["success"][row] = info.get("success", False)

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _worker(
    ours: Connection,
    theirs: Connection,
    makers: Sequence[MakeEnv],
    rows: range,
    shared: dict[str, Any],
    environments: tuple[Any, Any],
) -> None:
    """Main function of a process with some environments: runs (command, argument) messages, answers each with "" or an error.

    The process ends with its parent, even a killed one: it closes its own copy of the parent's end of the pipe, so that the
    pipe breaks.
    """
    theirs.close()
    # A signal to the whole group is for the training process, which stops after the evaluation.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    envs: Envs | None = None
    try:
        give(*environments)
        envs = Envs(makers, rows, {name: _as_array(*value) for name, value in shared.items()})
        while True:
            command, argument = ours.recv()
            if command == "close":
                break
            envs.step() if command == "step" else envs.reset(argument)
            ours.send("")
    except EOFError:
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            ours.send(f"{type(error).__name__}: {error}")
    finally:
        if envs:
            envs.close()


class _Process:
    """`Envs` in another process; each call is split into request and wait."""

    def __init__(self, context: Any, makers: Sequence[MakeEnv], rows: range, shared: dict[str, Any]) -> None:
        self.connection, theirs = context.Pipe()
        # A forked process has them already, and can have functions that can't be sent.
        environments = ([], {}) if context.get_start_method() == "fork" else given()
        arguments = (theirs, self.connection, makers, rows, shared, environments)
        self.process = context.Process(target=_worker, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.rows = rows

    def request(self, command: str, argument: Any = None) -> None:
        with contextlib.suppress(OSError):  # the process has ended: `wait` says why
            self.connection.send((command, argument))

    def wait(self) -> None:
        try:
            failure = self.connection.recv()
        except (EOFError, OSError):
            failure = "its process was killed"
        if failure:
            raise OffrlError(f"The evaluation environment failed ({failure}); eval.workers=1 shows where.")

    def close(self) -> None:
        self.process.join(timeout=5)
        self.process.kill()  # nothing happens to a process that has ended
        self.process.join()
        self.connection.close()


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
        probe = self.makers[0]()
        warn_of_no_limit(info, probe)
        warn_of_other_bounds(info, probe)
        self.obs_shape = tuple(probe.observation_space.shape or ())
        self.action_shape = tuple(probe.action_space.shape or ())
        self.actions = int(getattr(probe.action_space, "n", 0))  # number of discrete ones; 0: they are continuous
        probe.close()
        self.workers = workers or min(8, usable_cores())
        self.arrays: dict[str, Array] = {}
        self.processes: list[_Process] = []
        self.local: Envs | VectorEnvs | None = None

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

    def run(self, agent: Agent, episodes: int, seed: int = 1_000_000, dtype: torch.dtype = torch.float64) -> Episodes:
        """Run `episodes` episodes in every lane.

        Args:
            agent: has `lanes` lanes.
            seed: environment seed of the first episode; the k-th has `seed + k`.
            dtype: precision of the policy.
        """
        self.check(agent.spec)
        policy = copy.deepcopy(agent).to(dtype)
        parts: list[tuple[Array, Array, Array, Array | None]] = []
        try:
            self._open(min(self.width, episodes))
            for start in range(0, episodes, self.width):
                parts.append(self._rollout(policy, seed + start, min(self.width, episodes - start), dtype))
        except BaseException:
            self.close()  # the processes may be in the middle of a step: the next run needs new ones
            raise
        returns, lengths, successes, predicted = zip(*parts)
        total = np.concatenate(returns, 1)
        scores = 100.0 * np.concatenate(successes, 1) if self.info.scored_by_success else self.info.normalized(total)
        together = None if predicted[0] is None else np.concatenate(predicted, 1)
        seeds = [seed + k for k in range(episodes)]
        return Episodes(total, np.concatenate(lengths, 1), scores, seeds, together)

    # ---- one batch of episodes, one in each environment -------------------------------------------------------

    @torch.no_grad()
    def _rollout(
        self, policy: Agent, seed: int, count: int, dtype: torch.dtype
    ) -> tuple[Array, Array, Array, Array | None]:
        """Returns, lengths, successes and predicted returns `[lanes, count]` of a batch of episodes."""
        width = len(self.arrays["done"]) // self.lanes
        self._all("reset", [seed + k if k < count else None for k in range(width)] * self.lanes)
        observation, action, reward, done = (self.arrays[k] for k in ("observation", "action", "reward", "done"))
        returns, lengths = np.zeros(len(done)), np.zeros(len(done), dtype=np.int64)
        state = policy.initial_state(width)
        device, shape = policy.spec.device, (self.lanes, width)

        def by_lane(array: Array) -> Tensor:
            return torch.from_numpy(array).to(device, dtype).unflatten(0, shape)

        finite = np.isfinite(observation).all()
        prediction = policy.predicted_return(by_lane(observation), state)
        predicted = None if prediction is None else prediction.cpu().numpy()[:, :count]
        while not done.all():
            running = ~done
            chosen = policy.select_action(by_lane(observation), state)
            action[...] = chosen.flatten(0, 1).cpu().numpy()
            self._all("step")
            returns[running] += reward[running]
            lengths[running] += 1
            finite &= np.isfinite(observation).all()
            state = policy.update_state(state, chosen, by_lane(reward))
        if not (finite and np.isfinite(returns).all()):
            warnings.warn(
                f"{self.info.env_id or 'the environment'}: an observation or a reward of it is not finite, so that these "
                "scores mean nothing; look at its steps.",
                stacklevel=2,
            )
        success = self.arrays["success"].copy()  # the next batch of episodes writes over it
        totals, steps, successes = (array.reshape(shape)[:, :count] for array in (returns, lengths, success))
        return totals, steps, successes, predicted

    def _all(self, command: str, argument: list[int | None] | None = None) -> None:
        if self.local:
            self.local.step() if argument is None else self.local.reset(argument)
            return
        for process in self.processes:
            process.request(command, argument and [argument[row] for row in process.rows])
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
                self.local = Envs(makers, range(total), self.arrays)
            return
        # Forking is instant, and the children use neither torch nor CUDA; elsewhere a fresh interpreter is safe.
        can_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
        context = multiprocessing.get_context("fork" if can_fork else "spawn")
        shared = {
            k: (context.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(code).itemsize)), shape, code)
            for k, (shape, code) in shapes.items()
        }
        self.arrays = {k: _as_array(*value) for k, value in shared.items()}
        # Every process gets episodes of every lane, so that a lane of long episodes is shared.
        self.processes = [_Process(context, makers, range(first, total, workers), shared) for first in range(workers)]


def _words(obs_dim: int, action_dim: int, discrete: bool) -> str:
    return f"observations of {obs_dim} numbers and {action_dim} {'choices of action' if discrete else 'action numbers'}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_array(buffer: Any, shape: tuple[int, ...], code: str) -> Array:
    count = int(np.prod(shape))
    return np.frombuffer(buffer, dtype=np.dtype(code), count=count).reshape(shape)
