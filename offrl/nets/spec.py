"""Spec: the sizes, seeds and bounds that networks and agents are built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offrl.utils.errors import OffrlError

Bound = float | tuple[float, ...]  # of actions: one number for all dimensions, or one per dimension


@dataclass(frozen=True)
class Spec:
    """What an agent is built from.

    Attributes:
        obs_dim, action_dim: widths of observations and actions; `action_dim` is the number of actions when they are discrete.
        seeds: one seed per lane; it fixes the lane's initial weights and all of its random numbers.
        obs_mean, obs_std: `[O]` mean and population standard deviation of the dataset's observations.
        action_low, action_high: bounds of continuous actions, one number each, or one per dimension where these differ.
        discrete: whether actions are integers.
        device: device of the parameters.

    Raises:
        OffrlError: bounds that are no box of `action_dim` dimensions.
    """

    obs_dim: int
    action_dim: int
    seeds: tuple[int, ...] = (0,)
    obs_mean: Tensor | None = None
    obs_std: Tensor | None = None
    action_low: Bound = -1.0
    action_high: Bound = 1.0
    discrete: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for name in ("action_low", "action_high"):
            bound = getattr(self, name)
            if isinstance(bound, tuple) and len(set(bound)) == 1 and len(bound) == self.action_dim:
                object.__setattr__(self, name, bound[0])
        try:
            if not self.discrete:
                check_bounds(self.action_low, self.action_high, self.action_dim)
        except ValueError as error:
            raise OffrlError(f"The bounds of actions fit no box: {error}") from error

    @property
    def lanes(self) -> int:
        return len(self.seeds)


def check_bounds(low: Sequence[float] | float, high: Sequence[float] | float, action_dim: int) -> None:
    """Raise ValueError where bounds are no box of `action_dim` dimensions."""
    for name, bound in (("action_low", low), ("action_high", high)):
        if isinstance(bound, Sequence) and len(bound) != action_dim:
            raise ValueError(
                f"{name} has {len(bound)} numbers for {action_dim} dimensions; give one each, or one for all."
            )
    lows, highs = (b if isinstance(b, Sequence) else [b] * action_dim for b in (low, high))
    for dimension, (least, most) in enumerate(zip(lows, highs)):
        if not least < most:
            raise ValueError(f"action_low {least:g} is not below action_high {most:g} in dimension {dimension}.")
