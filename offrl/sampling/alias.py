"""Weights per transition, drawn in constant time from an alias table."""

from __future__ import annotations

import torch
from torch import Tensor

from offrl.sampling.base import Sampler
from offrl.utils.random import LaneRandom


class RowWeighted(Sampler):
    """Transitions with weights of their own, drawn in constant time from an alias table (Walker 1977).

    Args:
        weights: `[N]`, or `[lanes, N]` when lanes differ; non-negative, any scale.
    """

    def __init__(self, weights: Tensor) -> None:
        self.keep, self.alias = alias_table(weights)

    def change(self, weights: Tensor) -> None:
        """Set other weights of the same shape, in place."""
        keep, alias = alias_table(weights)
        self.keep.copy_(keep)
        self.alias.copy_(alias)

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        rows = self.keep.shape[-1]
        u = random.uniform(stream, (2, batch), steps)  # [updates, lanes, 2, batch]
        row = place = (u[:, :, 0] * rows).to(torch.int64)
        if self.keep.ndim == 2:
            place = row + rows * torch.arange(len(self.keep), device=row.device).unsqueeze(-1)
        return torch.where(u[:, :, 1] < self.keep.view(-1)[place], row, self.alias.view(-1)[place].to(torch.int64))


def alias_table(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(keep, alias), both shaped like `weights` (`[..., N]`): row i stays i with probability `keep[i]`, else is `alias[i]`.

    The usual construction walks once through the rows below the mean and once through those above, and tops up each of the
    former from the current one of the latter. The position of that walk follows from two running sums, so all rows are done
    at once.
    """
    if weights.ndim > 1:
        tables = [alias_table(lane) for lane in weights]
        return torch.stack([keep for keep, _ in tables]), torch.stack([alias for _, alias in tables])
    mass = weights.double()
    if bool((~mass.isfinite()).any() or (mass < 0).any() or mass.sum() <= 0):
        raise ValueError("weights of rows must be finite and non-negative with a positive sum")
    share = mass * (len(mass) / mass.sum())  # 1 on average
    below, above = (share < 1).nonzero().squeeze(-1), (share >= 1).nonzero().squeeze(-1)
    keep, alias = torch.ones_like(share), torch.arange(len(share), dtype=torch.int32, device=share.device)
    if not len(below) or not len(above):  # all alike, but for rounding
        return keep, alias
    missing, excess = (1 - share[below]).cumsum(0), (share[above] - 1).cumsum(0)
    before = missing - (1 - share[below])
    # A row below the mean is topped up by the first row above it whose excess is not used up by then ...
    donor = torch.searchsorted(excess, before, right=True).clamp(max=len(above) - 1)
    keep[below], alias[below] = share[below], above[donor].to(torch.int32)
    # ... and that row, once it has given too much, by the next one above.
    last = torch.searchsorted(missing, excess).clamp(max=len(below) - 1)
    keep[above] = (1 + excess - missing[last]).clamp(0, 1)
    keep[above[-1]] = 1.0
    alias[above[:-1]] = above[1:].to(torch.int32)
    return keep, alias
