"""Samplers: which rows of a Store make the next batch.

A sampler knows the Store's episodes and nothing of observations or agents. Draws come from `LaneRandom`, so they depend on
the lane's seed and the update's number alone: a sampler has no state to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from offrl.batch import Batch
from offrl.data.store import Store
from offrl.random import LaneRandom


class Sampler(Protocol):
    """Anything that draws rows."""

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        """`[updates, lanes, batch]` int64 rows for the updates numbered `steps` (`[updates]` int64).

        `stream` names the random numbers; samplers that draw for one batch must not share them.
        """


class Uniform:
    """Every transition equally likely, with replacement."""

    def __init__(self, store: Store) -> None:
        self.rows = len(store)

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        return random.integers(stream, self.rows, (batch,), steps)


class EpisodeWeighted:
    """Transitions weighted by a weight of their episode: P(row) is proportional to `weights[episode of row]`.

    Drawn in two stages, exactly: an episode with probability proportional to weight x length, then one of its rows
    uniformly. The table has one float64 entry per episode, so neither 2^24 categories nor float32 sums limit it.

    Args:
        store: the dataset.
        weights: `[episodes]`, or `[lanes, episodes]` when lanes differ; non-negative, any scale.
    """

    def __init__(self, store: Store, weights: Tensor) -> None:
        mass = weights.double().to(store.device).reshape(-1, store.episodes) * store.lengths
        if bool((~mass.isfinite()).any() or (mass < 0).any() or (mass.sum(-1) <= 0).any()):
            raise ValueError("episode weights must be finite and non-negative with a positive sum")
        self.table = (mass.cumsum(-1) / mass.sum(-1, keepdim=True)).contiguous()
        # Rounding may leave the last entry below 1; a zero-weight episode behind the last positive one must stay out.
        self.last = (mass > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
        self.first, self.lengths = store.offsets[:-1], store.lengths

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        u = random.uniform(stream, (2, batch), steps)  # [updates, lanes, 2, batch]
        lanes = u.shape[1]
        by_lane = u[:, :, 0].transpose(0, 1).reshape(lanes, -1).contiguous()
        episode = torch.searchsorted(self.table.expand(lanes, -1).contiguous(), by_lane, right=True)
        episode = torch.minimum(episode, self.last).view(lanes, -1, batch).transpose(0, 1)
        length = self.lengths[episode]
        return self.first[episode] + torch.minimum((u[:, :, 1] * length).to(torch.int64), length - 1)


class Replay:
    """Batches for the engine: one Store and sampler, or several mixed with fixed shares of each batch.

    This is the seam for augmentations: a source can be replaced by a fresh Store while training goes on.

    Args:
        sources: (store, sampler, share) triples; shares are rounded to whole rows, the first source takes the rest.
        batch: rows per lane and update.
        window: length of windows; None for transitions.
        extra: further fields of the batch.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Store, Sampler, float]],
        batch: int,
        window: int | None = None,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.sources, self.batch, self.window, self.extra = list(sources), batch, window, extra
        others = [round(share * batch) for _, _, share in self.sources[1:]]
        self.counts = [batch - sum(others), *others]
        if min(self.counts) < 0:
            raise ValueError("the shares of mixed stores add up to more than 1")

    def replace(self, source: int, store: Store, sampler: Sampler) -> None:
        """Swap a source for a refreshed one; its share stays."""
        self.sources[source] = (store, sampler, self.sources[source][2])

    def draw(self, random: LaneRandom, steps: Tensor) -> Batch:
        """`[updates, lanes, batch, ...]` for the updates numbered `steps`."""
        parts = [
            self._gather(store, sampler.draw(random, steps, count, f"sampler/{i}"))
            for i, ((store, sampler, _), count) in enumerate(zip(self.sources, self.counts))
            if count
        ]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _gather(self, store: Store, index: Tensor) -> Batch:
        if self.window is None:
            return store.transitions(index, self.extra)
        return store.windows(index, self.window, self.extra)


def _join(parts: list[Batch]) -> Batch:
    """Several batches as one along the batch axis (axis 2 behind updates and lanes)."""
    first: dict[str, Any] = vars(parts[0])
    joined: dict[str, Any] = {
        k: None if v is None else torch.cat([getattr(part, k) for part in parts], 2) for k, v in first.items()
    }
    return Batch(**joined)
