"""What restatements of authors' updates share: one seed's networks as ordinary layers, and one seed's batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from offrl.data.dataset import OfflineDataset
from offrl.sampling import Uniform
from offrl.utils.random import LaneRandom

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def sequential(mlp: nn.Module, lane: int, member: int | None = None) -> nn.Sequential:
    """One lane (and member) of a lane-batched MLP as ordinary layers."""
    layers: list[nn.Module] = []
    for w, b in zip(mlp.weights, mlp.biases):
        weight, bias = (w[lane], b[lane]) if member is None else (w[lane, member], b[lane, member])
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def difference(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))


def drawn(store: OfflineDataset, random: LaneRandom, updates: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """Number of each update of a run of one lane, and the dataset's rows that it learns from.

    `random`, a lane's numbers, is put to the update under way.
    """
    sampler = Uniform(store)
    for t in range(1, updates + 1):
        rows = sampler.draw(random, torch.tensor([t]), size, "sampler/0")[0, 0]
        random.step.fill_(t)
        yield t, rows


def batches(store: OfflineDataset, random: LaneRandom, updates: int, size: int) -> Iterator[tuple[int, Rows]]:
    """The same with (s, a, r, s', 1 - d) of these rows; states are standardised."""
    mean, std = store.observations.mean(0), store.observations.std(0, correction=0)
    for t, rows in drawn(store, random, updates, size):
        s, s2 = ((x[rows] - mean) / (std + 1e-3) for x in (store.observations, store.next_observations))
        yield t, (s, store.actions[rows], store.rewards[rows], s2, 1 - store.terminations[rows])
