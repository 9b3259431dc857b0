"""What a caller in Python may do while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from numpy.typing import NDArray

from offrl.agents.base import Agent
from offrl.utils.errors import OffrlError


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that has just been played.

    Attributes:
        step: updates made.
        returns: `[lanes, episodes]`; lengths: the same, steps.
        scores: `[lanes, episodes]` normalised; None without references.
        agent: the agent that played, to look at and not to change.
    """

    step: int
    returns: NDArray
    lengths: NDArray
    scores: NDArray | None
    agent: Agent


@dataclass(frozen=True)
class Hooks:
    """Functions that a run calls: after each evaluation, and after each checkpoint with the updates made and its file.

    Under `eval.asynchronous` an evaluation's episodes come while later updates are made; it names its own update and has a copy
    of the agent as it was then.

    What they raise ends the run; the same call goes on from the last checkpoint.
    """

    on_evaluation: Callable[[Evaluation], object] | None = None
    on_checkpoint: Callable[[int, Path], object] | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if (given := getattr(self, f.name)) is not None and not callable(given):
                raise OffrlError(f"{f.name} is of type {type(given).__name__}; give a function that the run can call.")

    def evaluated(self, evaluation: Evaluation) -> None:
        if self.on_evaluation:
            self.on_evaluation(evaluation)

    def saved(self, step: int, path: Path) -> None:
        if self.on_checkpoint:
            self.on_checkpoint(step, path)
