"""Batches: rows that samplers choose, gathered from one or several datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offrl.data.batch import Batch
from offrl.data.dataset import OfflineDataset
from offrl.sampling.base import Sampler
from offrl.sampling.mixture import shared_out
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class BatchLoader:
    """Batches for the engine: one dataset and sampler, or several mixed with fixed shares of each batch.

    Augmentations replace a source by a fresh dataset while training goes on. A batch's `index` is the row in the first source's
    dataset, and -1 in rows of the others.

    Args:
        sources: (store, sampler, share) triples; a store is an `OfflineDataset`, or anything else with `transitions` (such as a
            `Replay`) where there are no windows; shares are rounded to whole rows, the first source takes the rest.
        batch: rows per lane and update.
        window: length of windows; None for transitions.
        fields: further fields of the batch.
        before: how many timesteps of a window lie before the row that the sampler drew, at least and at most; as many as are
            drawn uniformly, or those that the episode has. (0, 0): windows begin with the drawn rows.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Any, Sampler, float]],
        batch: int,
        window: int | None = None,
        fields: tuple[str, ...] = (),
        before: tuple[int, int] = (0, 0),
    ) -> None:
        self.sources, self.batch, self.window, self.fields = list(sources), batch, window, fields
        self.before = before
        shares = [share for _, _, share in self.sources[1:]]
        self.counts = shared_out(shares, batch)
        if min(self.counts) < 0:
            raise ValueError("the shares of mixed stores add up to more than 1")
        if sum(shares) > 0 and self.counts[0] == batch:
            raise OffrlError(
                f"batch_size={batch} holds no row of the data whose share is {sum(shares):g}; raise one of the two."
            )

    def replace(self, source: int, store: OfflineDataset, sampler: Sampler) -> None:
        """Swap a source for a refreshed one; its share stays."""
        self.sources[source] = (store, sampler, self.sources[source][2])

    def draw(self, random: LaneRandom, steps: Tensor) -> Batch:
        """`[updates, lanes, batch, ...]` for the updates numbered `steps`."""
        parts = []
        for i, ((store, sampler, _), count) in enumerate(zip(self.sources, self.counts)):
            if count:
                index = sampler.draw(random, steps, count, f"sampler/{i}")
                if self.before == (0, 0):
                    parts.append(self._gather(store, index))
                else:
                    least, most = self.before
                    before = random.integers(f"before/{i}", most - least + 1, (count,), steps) + least
                    parts.append(self._around(store, index, before))
                if i:
                    parts[-1].index = torch.full_like(parts[-1].index, -1)
        return parts[0] if len(parts) == 1 else _join(parts)

    def _gather(self, store: Any, index: Tensor) -> Batch:
        if self.window is None:
            batch: Batch = store.transitions(index, self.fields)
        else:
            batch = store.windows(index, self.window, self.fields)
        return batch

    def _around(self, store: Any, index: Tensor, before: Tensor) -> Batch:
        """Windows that begin `before` timesteps before the rows `index`, or with their episodes."""
        wanted = index - before
        start = torch.maximum(wanted, store.offsets[store.episode_of_row[index]])
        batch = self._gather(store, start)
        batch.cut = start - wanted  # type: ignore[attr-defined]
        return batch


def _join(parts: list[Batch]) -> Batch:
    """Several batches as one along the batch axis (axis 2 behind updates and lanes)."""
    return parts[0].of({name: torch.cat([vars(part)[name] for part in parts], 2) for name in vars(parts[0])})
