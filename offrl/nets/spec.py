"""Spec: the sizes, seeds and bounds that networks and agents are built from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """What an agent is built from.

    Attributes:
        obs_dim, action_dim: widths of observations and actions; `action_dim` is the number of actions when they are discrete.
        seeds: one seed per lane; it fixes the lane's initial weights and all of its random numbers.
        obs_mean, obs_std: `[O]` mean and population standard deviation of the dataset's observations.
        action_low, action_high: bounds of continuous actions.
        discrete: whether actions are integers.
        device: device of the parameters.
    """

    obs_dim: int
    action_dim: int
    seeds: tuple[int, ...] = (0,)
    obs_mean: Tensor | None = None
    obs_std: Tensor | None = None
    action_low: float = -1.0
    action_high: float = 1.0
    discrete: bool = False
    device: torch.device | str = "cpu"

    @property
    def lanes(self) -> int:
        return len(self.seeds)
