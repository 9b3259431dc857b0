"""Batches: sampled transitions and windows, the interface between data and agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor


@dataclass(eq=False, repr=False)
class Batch:
    """Sampled transitions. All tensors are `[lanes, batch, ...]`.

    Attributes:
        obs, next_obs: `[..., O]` float; action: `[..., A]` float (or `[...]` int64 when discrete).
        reward, mask: `[...]` float; `mask = 1 - termination` multiplies the bootstrap and is 1 at a truncation.
        index: `[lanes, batch]` int64 row of the dataset that a sample is; -1 for a synthetic one.

    The other fields exist only if the agent lists them in its `batch_fields`:
        next_action, has_next_action: a' of the same episode, and whether it exists (else `next_action` repeats a);
            `next_action` asks for both.
        return_to_go: undiscounted sum of the episode's rewards from this timestep on.
        timestep: int64 position in the episode.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    mask: Tensor
    index: Tensor
    next_action: Tensor = field(init=False)
    has_next_action: Tensor = field(init=False)
    return_to_go: Tensor = field(init=False)
    timestep: Tensor = field(init=False)

    @classmethod
    def of(cls, fields: Mapping[str, Tensor]) -> Self:
        """A batch with exactly these fields."""
        batch = cls.__new__(cls)
        vars(batch).update(fields)
        return batch

    def replace(self, **fields: Tensor) -> Self:
        """A batch with some fields replaced or added."""
        return self.of({**vars(self), **fields})

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A batch whose fields are `function` of these."""
        return self.of({name: function(tensor) for name, tensor in vars(self).items()})

    def __getitem__(self, item: Any) -> Self:
        return self.of({name: tensor[item] for name, tensor in vars(self).items()})


@dataclass(eq=False, repr=False)
class WindowBatch(Batch):
    """Sampled windows of consecutive timesteps of an episode. All tensors but `index` are `[lanes, batch, time, ...]`.

    Attributes:
        index: `[lanes, batch]` int64 row of the window's first timestep; -1 in a synthetic window.
        valid: float, 1 where a timestep exists and 0 in the padding after the episode's end.
        timestep: always there.
        cut: `[lanes, batch]` int64, timesteps that are missing before the window, since its episode begins with it: 0 but in
            windows around drawn rows (`BatchLoader`'s `before`).
    """

    valid: Tensor = field(init=False)
    cut: Tensor = field(init=False)
