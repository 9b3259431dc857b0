"""Evaluation beside training: an `Evaluator` in a process of its own, which plays copies of an agent."""

from __future__ import annotations

import atexit
import contextlib
import copy
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from safetensors.torch import load, save

from offrl.agents.base import Agent
from offrl.envs.chosen import give
from offrl.evaluation.environments import start_method
from offrl.evaluation.evaluator import Episodes, Evaluator
from offrl.utils.errors import OffrlError, one_line


class EvaluationProcess:
    """Plays one evaluation at a time: `start` it, and fetch its `result` before the next one.

    The process ends with its owner, even a killed one.

    Args:
        evaluator: has not played yet; a copy of it plays in the process.
        agent: as those that are evaluated; its weights do not matter.

    Raises:
        OffrlError: the function that makes the environment can't be sent to the process.
    """

    def __init__(self, evaluator: Evaluator, agent: Agent) -> None:
        method = start_method()
        environments = evaluator.given_to(method)
        context: Any = multiprocessing.get_context(method)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.connection, evaluator, copy.deepcopy(agent), environments)
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()
        theirs.close()
        atexit.register(self.close)  # before Python waits for the process

    def start(self, agent: Agent, step: int, episodes: int, seed: int) -> None:
        """Play with a copy of the agent's weights.

        Args:
            step: number by which a policy that samples its actions draws them.
            episodes, seed: as `Evaluator.run` has them.
        """
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in agent.state_dict().items()}
        with contextlib.suppress(OSError):  # the process has ended: `result` says why
            self.connection.send((step, episodes, seed))
            self.connection.send_bytes(save(weights))

    def is_done(self) -> bool:
        """Whether `result` returns at once."""
        return self.connection.poll()

    def result(self) -> Episodes:
        """The episodes of the evaluation under way; waits for them.

        Raises:
            OffrlError: an environment failed, or the process was killed.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            answer = _failed("its process was killed")
        if isinstance(answer, str):
            raise OffrlError(answer)
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        atexit.unregister(self.close)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _failed(reason: str) -> str:
    return f"The evaluation beside training failed ({reason}); eval.asynchronous=false shows where."


def _serve(
    ours: Connection, theirs: Connection, evaluator: Evaluator, agent: Agent, environments: tuple[Any, Any]
) -> None:
    """Main function of the process: plays what is asked for, and answers with episodes or with a sentence of what failed."""
    theirs.close()
    # A signal to the whole group is for the training process, which decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # OpenMP's other threads did not survive the fork
    try:
        give(*environments)
        with evaluator:
            while True:
                step, episodes, seed = ours.recv()
                agent.load_state_dict(load(ours.recv_bytes()))
                agent.random.step.fill_(step)
                ours.send(evaluator.run(agent, episodes, seed))
    except EOFError:
        pass
    except Exception as error:
        sentence = (
            str(error) if isinstance(error, OffrlError) else _failed(f"{type(error).__name__}: {one_line(error)}")
        )
        with contextlib.suppress(OSError):
            ours.send(sentence)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
