"""What a search over settings maximises: a run's score, or an estimate of its policy's value from the dataset alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from offrl.evaluation.fqe import FQEConfig, fitted_q
from offrl.training.run_config import resolve_config
from offrl.training.runs import finished, load_agent, read_config, read_data
from offrl.utils.errors import OffrlError


def value_of_run(folder: Path, objective: str, fqe_updates: int) -> float | None:
    """The mean over a finished run's lanes; None where it has no finite value.

    Args:
        objective: `score`: normalised score of the last evaluation, or return where the dataset has no references; `fqe`:
            fitted Q evaluation of the policies at starts of episodes, in units of the recorded rewards.

    Raises:
        OffrlError: `score` of a run that was not evaluated, or a policy that fitted Q evaluation can't take.
    """
    if objective == "fqe":
        value = _fqe(folder, fqe_updates)
    else:
        result = finished(folder, 0)
        lanes = (result.scores if result.scores is not None else result.returns) if result else []
        if not lanes:
            raise OffrlError(
                f"{folder} was not evaluated, so there is no score to maximise; give eval.final_episodes=N, or "
                "hydra.sweeper.objective=fqe, which needs no environment."
            )
        value = float(np.mean(lanes))
    return value if math.isfinite(value) else None


COPIES = 400  # to the target, in few updates: with fewer than some 3 / (1 - gamma) values are of a shorter horizon


def _fqe(folder: Path, updates: int) -> float:
    agent = load_agent(folder)
    if agent.initial_state(1) is not None:
        raise OffrlError(
            f"{folder}: fitted Q evaluation can't take a policy that needs the history; use hydra.sweeper.objective=score."
        )
    store = read_data(resolve_config(read_config(folder), trusted=False).train, "cpu", folder)
    every = min(FQEConfig.target_every, max(1, updates // COPIES))
    return float(fitted_q(store, [agent], FQEConfig(updates=updates, target_every=every)).value.mean())
