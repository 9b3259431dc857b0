"""An agent's update on a tape: its batch, its random numbers, its metrics, and whether the tape tells the truth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offrl.agents.base import Agent, Metrics
from offrl.data.batch import Batch
from offrl.nets import kernels
from offrl.nets.tape import Tape

Update = Callable[[Batch], Metrics]


class Take:
    """One phase's update of an agent, recorded from a first batch.

    Attributes:
        batch: memory that the tape reads the batch from.
        metrics: memory that it writes the metrics to.
        faithful: whether playing gives the update's own numbers to the bit; None: not compared yet.
    """

    def __init__(self, agent: Agent, batch: Batch) -> None:
        self.agent, self.batch, self.tape = agent, batch.map(Tensor.clone), Tape()
        self.metrics: Metrics = {}
        self.faithful: bool | None = None

    def record(self, update: Update) -> Metrics:
        """Make the update, and remember how."""
        random = self.agent.random
        random.place = self.tape.input
        try:
            with self.tape.recording():
                self.metrics = update(self.batch)
        finally:
            random.place = None
        if self.tape.problem:
            self.faithful, self.tape = False, Tape()  # its memory is free again
        kernels.join(self.tape)
        return self.metrics

    def play(self, batch: Batch) -> Metrics:
        """Make the update for another batch, from the tape."""
        for name, tensor in vars(self.batch).items():
            tensor.copy_(getattr(batch, name))
        for (name, _, _), numbers in self.tape.inputs.items():
            numbers.copy_(self.agent.random.draw_normal(name, numbers))
        self.tape.play()
        return self.metrics

    def compare(self, batch: Batch, update: Update) -> Metrics:
        """Make the update as `update` does, after trying what the tape makes of it."""
        state = list(self.agent.state_dict().values())
        before = [tensor.clone() for tensor in state]
        try:
            played = [tensor.clone() for tensor in [*self.play(batch).values(), *state]]
        except (RuntimeError, IndexError):
            played = []
        with torch.no_grad():
            for tensor, old in zip(state, before):
                tensor.copy_(old)
        metrics = update(batch)
        made = [*metrics.values(), *state]
        self.faithful = len(played) == len(made) and all(map(_same, played, made))
        if not self.faithful:
            self.tape = Tape()
        return metrics


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaNs too."""
    a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)
