"""Batch: sampled rows, the one thing that data and agents have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """Sampled rows. All tensors are `[lanes, batch, ...]`, windows `[lanes, batch, time, ...]`.

    Attributes:
        obs, next_obs: `[..., O]` float; action: `[..., A]` float (or `[...]` int64 when discrete).
        reward, mask: `[...]` float; `mask = 1 - termination` multiplies the bootstrap and is 1 at a truncation.
        index: `[lanes, batch]` int64 row of the dataset that a sample is (windows: its first row); -1 for a synthetic one.
        next_action, has_next_action: a' of the same episode, and whether it exists (else `next_action` repeats a).
        return_to_go: undiscounted sum of the episode's rewards from this step on.
        valid: windows only, 1 where a step exists and 0 in the padding behind the episode's end.
        timestep: int64 position in the episode.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    mask: Tensor
    index: Tensor
    next_action: Tensor | None = None
    has_next_action: Tensor | None = None
    return_to_go: Tensor | None = None
    valid: Tensor | None = None
    timestep: Tensor | None = None

    def map(self, function: Any) -> Batch:
        """Apply `function` to every tensor that is there."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {k: None if v is None else function(v) for k, v in values.items()}
        return Batch(**mapped)

    def __getitem__(self, item: Any) -> Batch:
        return self.map(lambda tensor: tensor[item])
