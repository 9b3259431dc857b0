"""Drawing from a growing replay, alone or together with the dataset."""

from __future__ import annotations

import torch
from torch import Tensor

from offrl.data.batch import Batch
from offrl.data.dataset import OfflineDataset
from offrl.data.replay import Replay
from offrl.sampling.base import Sampler
from offrl.utils.random import LaneRandom


class ReplayUniform(Sampler):
    """Uniform draws from each lane's own rows, however many there are by now."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.first = torch.arange(replay.lanes, device=replay.count.device).unsqueeze(-1) * replay.capacity

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        u = random.uniform(stream, (batch,), steps)  # [updates, lanes, batch]
        last = (self.replay.count - 1).clamp(min=0)
        return self.first + torch.minimum((u * self.replay.count).to(torch.int64), last)


class UnionDraw(Sampler):
    """Draws from dataset and replay together: a row is online with probability k / (n + k), of n and k rows.

    Rows of the dataset are drawn by the run's own sampler. A drawn number below n is a row of the dataset, and n + i row i of
    the replay; `Union` gathers both.
    """

    def __init__(self, store: OfflineDataset, sampler: Sampler, replay: Replay) -> None:
        self.rows, self.offline, self.online = len(store), sampler, ReplayUniform(replay)

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        offline = self.offline.draw(random, steps, batch, stream)
        online = self.online.draw(random, steps, batch, f"{stream}/online")
        count = self.online.replay.count
        chosen = random.uniform(f"{stream}/union", (batch,), steps) * (self.rows + count) < count
        return torch.where(chosen, self.rows + online, offline)


class Union:
    """Dataset and replay as one source of transitions, for `UnionDraw`."""

    def __init__(self, store: OfflineDataset, replay: Replay) -> None:
        self.store, self.replay = store, replay

    def transitions(self, index: Tensor, fields: tuple[str, ...] = ()) -> Batch:
        """Gather rows of either; the batch's `index` is -1 in online rows."""
        is_online = index >= len(self.store)
        offline = vars(self.store.transitions(torch.where(is_online, 0, index), fields))
        online = vars(self.replay.transitions(torch.where(is_online, index - len(self.store), 0), fields))

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(is_online.view(*is_online.shape, *[1] * (mine.ndim - is_online.ndim)), theirs, mine)

        return Batch.of({name: pick(tensor, online[name]) for name, tensor in offline.items()})
