"""A learner's update on a tape: its batch, its random numbers, its metrics, and whether the tape tells the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from offrl.nets import kernels
from offrl.nets.tape import Tape
from offrl.utils.random import LaneRandom

Metrics = dict[str, Tensor]
Update = Callable[[Any], Metrics]


class Learner(Protocol):
    """What makes updates; `state_dict` holds all that they change, and `random` their normals."""

    random: LaneRandom

    def state_dict(self) -> Mapping[str, Tensor]: ...


class Numbers(Protocol):
    """What an update learns from: tensors as attributes."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self: ...


class Take:
    """One update of a learner, or of one of its phases: recorded from a first batch, compared with a second, then played.

    Attributes:
        batch: memory that the tape reads the batch from.
        metrics: memory that it writes the metrics to.
        faithful: whether playing gives the update's own numbers to the bit; None: not compared yet.
    """

    def __init__(self, learner: Learner, batch: Numbers) -> None:
        self.learner, self.batch, self.tape = learner, batch.map(Tensor.clone), Tape()
        self.metrics: Metrics = {}
        self.recorded = False
        self.faithful: bool | None = None

    def make(self, batch: Numbers, update: Update) -> Metrics:
        """The next update; the first one's batch is that of `__init__`."""
        if not self.recorded:
            return self.record(update)
        if self.faithful is None:
            return self.compare(batch, update)
        return self.play(batch) if self.faithful else update(batch)

    def record(self, update: Update) -> Metrics:
        """Make the update, and remember how."""
        random, self.recorded = self.learner.random, True
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

    def play(self, batch: Numbers) -> Metrics:
        """Make the update for another batch, from the tape."""
        for name, tensor in vars(self.batch).items():
            tensor.copy_(getattr(batch, name))
        for (name, _, _), numbers in self.tape.inputs.items():
            numbers.copy_(self.learner.random.draw_normal(name, numbers))
        self.tape.play()
        return self.metrics

    def compare(self, batch: Numbers, update: Update) -> Metrics:
        """Make the update as `update` does, after trying what the tape makes of it."""
        state = list(self.learner.state_dict().values())
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
