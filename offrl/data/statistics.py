"""Statistics of a dataset's returns."""

from __future__ import annotations

import torch
from torch import Tensor

from offrl.data.dataset import OfflineDataset


def positive_sided_variance(returns: Tensor) -> float:
    """Upper semivariance about the mean, mean(max(G - mean(G), 0)^2)."""
    returns = returns.double()
    return float((returns - returns.mean()).clamp(min=0).square().mean())


def return_spread(store: OfflineDataset) -> float:
    """Positive-sided variance of the normalised returns (score / 100; of [0, 1] without references)."""
    return positive_sided_variance(_normalised(store))


def _normalised(store: OfflineDataset) -> Tensor:
    scores, returns = store.info.normalized(store.returns), store.returns
    if scores is not None:
        return scores / 100
    low, high = returns.min(), returns.max()
    return (returns - low) / (high - low) if high > low else torch.zeros_like(returns)
