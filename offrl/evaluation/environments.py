"""The environments of an evaluation: in this process or in others, stepped together; all share arrays with the evaluator."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offrl.envs.chosen import give
from offrl.envs.robots import Robots
from offrl.envs.tabular_env import features
from offrl.utils.errors import OffrlError

MakeEnv = Callable[[], Any]
Array = NDArray[Any]


class VectorEnvs:
    """All environments of a batch as one Gymnasium vector, stepped by a few array operations; the interface of `Envs`.

    Finished environments go on; their steps are ignored.

    Args:
        env: the vector of a tabular task.
    """

    def __init__(self, env: Any, arrays: dict[str, Array]) -> None:
        self.env, self.arrays, self.features = env, arrays, features(env.task)

    def reset(self, seeds: Sequence[int | None]) -> None:
        """Start all episodes; those with seed None are not used."""
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
        """Start an episode in each environment that has a seed; the others go on."""
        for env, row, seed in zip(self.envs, self.rows, seeds):
            if seed is not None:
                self.arrays["observation"][row] = env.reset(seed=seed)[0]
                self.arrays["done"][row] = self.arrays["success"][row] = False

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


class RobotEnvs:
    """The same of Gymnasium's v5 robots, which step together: half the time of `Envs`, the same numbers.

    Args:
        limit: steps of an episode.
    """

    def __init__(self, env_id: str, limit: int, rows: range, arrays: dict[str, Array]) -> None:
        self.robots, self.limit = Robots(env_id, len(rows)), limit
        self.rows, self.arrays = np.array(rows), arrays
        self.timestep = np.zeros(len(rows), np.int64)

    def reset(self, seeds: Sequence[int | None]) -> None:
        for robot, (row, seed) in enumerate(zip(self.rows, seeds)):
            if seed is not None:
                self.arrays["observation"][row] = self.robots.reset(robot, seed)
                self.arrays["done"][row] = False
                self.timestep[robot] = 0

    def step(self) -> None:
        arrays = self.arrays
        running = np.flatnonzero(~arrays["done"][self.rows])
        if not len(running):
            return
        rows, box = self.rows[running], self.robots.env.action_space
        action = np.clip(arrays["action"][rows], box.low, box.high)
        arrays["observation"][rows], arrays["reward"][rows], terminated = self.robots.step(running, action)
        self.timestep[running] += 1
        arrays["done"][rows] = terminated | (self.timestep[running] == self.limit)

    def close(self) -> None:
        self.robots.env.close()


AnyEnvs = Envs | RobotEnvs | VectorEnvs
MakeEnvs = Callable[[range, dict[str, Array]], AnyEnvs]


def _worker(
    ours: Connection,
    theirs: Connection,
    make: MakeEnvs,
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
    envs: AnyEnvs | None = None
    try:
        give(*environments)
        envs = make(rows, {name: as_array(*value) for name, value in shared.items()})
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


class EnvProcess:
    """`Envs` in another process; each call is split into request and wait.

    Args:
        environments: what `give` needs there.
    """

    def __init__(
        self, context: Any, make: MakeEnvs, rows: range, shared: dict[str, Any], environments: tuple[Any, Any]
    ) -> None:
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.connection, make, rows, shared, environments)
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


def start_method() -> str:
    """How to start a process: forking is instant, but with a GPU in use only a fresh interpreter is safe."""
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    return "fork" if can_fork else "spawn"


def as_array(buffer: Any, shape: tuple[int, ...], code: str) -> Array:
    count = int(np.prod(shape))
    return np.frombuffer(buffer, dtype=np.dtype(code), count=count).reshape(shape)
