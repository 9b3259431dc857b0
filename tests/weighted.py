"""Datasets of known returns, the probabilities of weighted samplers, and a chi-square of draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.sampling import (
    AdvantageWeighted,
    AdvantageWeightedConfig,
    EpisodeWeighted,
    ReturnWeighted,
    ReturnWeightedConfig,
)
from offrl.utils.random import LaneRandom

P_VALUE = 1e-4  # of chi-square; draws are fixed by seeds, so it is no rate of false alarms


def episodes(
    returns: list[float] | np.ndarray, lengths: list[int] | np.ndarray, starts: np.ndarray | None = None
) -> OfflineDataset:
    """Episodes of given returns (all of it in the first reward), lengths and initial observations."""
    lengths, n = np.asarray(lengths), int(np.sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rewards = np.zeros(n)
    rewards[offsets[:-1]] = returns
    starts = np.zeros((len(lengths), 1)) if starts is None else starts
    obs = np.zeros((n, starts.shape[1]))
    obs[offsets[:-1]] = starts
    terminations = np.zeros(n)
    terminations[offsets[1:] - 1] = 1
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (obs, np.zeros((n, 1)), rewards, obs, terminations)]
    return OfflineDataset(*tensors, torch.tensor(offsets))


def probabilities(sampler: EpisodeWeighted) -> Tensor:
    """`[lanes?, N]` probability of every transition."""
    rows = torch.repeat_interleave(sampler.weights, sampler.lengths, dim=-1)
    return rows / rows.sum(-1, keepdim=True)


def rw(store: OfflineDataset, **settings: Any) -> Tensor:
    """`[lanes?, N]` probability of every transition under RW."""
    return probabilities(ReturnWeighted(store, ReturnWeightedConfig(**settings)))


def aw(store: OfflineDataset, **settings: Any) -> Tensor:
    """`[lanes?, N]` probability of every transition under AW."""
    return probabilities(AdvantageWeighted(store, AdvantageWeightedConfig(**settings)))


def random_episodes(count: int = 60, starts: int = 3, seed: int = 0) -> OfflineDataset:
    """Episodes of random returns, lengths and initial observations."""
    rng = np.random.default_rng(seed)
    return episodes(rng.normal(size=count) * 20, rng.integers(1, 30, count), rng.normal(size=(count, starts)))


def draw(sampler: Any, count: int, seeds: tuple[int, ...] = (0,)) -> Tensor:
    """`[lanes, count]` rows of one update."""
    return sampler.draw(LaneRandom(seeds), torch.tensor([1]), count, "s")[0]


def fits(index: Tensor, probability: Tensor) -> float:
    """p-value of chi-square; cells in which fewer than five draws are expected are pooled."""
    seen = torch.bincount(index.flatten(), minlength=len(probability)).double().numpy()
    expected = (probability / probability.sum()).numpy() * seen.sum()
    few = expected < 5
    if few.any():
        seen = np.append(seen[~few], seen[few].sum())
        expected = np.append(expected[~few], expected[few].sum())
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    return float(stats.chisquare(seen, expected).pvalue)
