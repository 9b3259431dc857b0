"""A bisimulation loss on encodings, with the models of reward and next encoding that it needs.

Hong, Dragan & Levine, "Offline RL with Observation Histories", ICLR 2024 (arXiv 2310.20663), add such a loss to offline RL; its
exact form was not available to us. This one follows Zhang et al., "Learning Invariant Representations for Reinforcement
Learning without Reconstruction", ICLR 2021 (deep bisimulation for control), and is a re-design, not a reproduction:

    J = mean over pairs (i, j) of (|z_i - z_j| - |r_i - r_j| - gamma W_2(P(. | z_i, a_i), P(. | z_j, a_j)))^2

with P a diagonal Gaussian and no gradient into the last two terms. Rewards are the dataset's. After a terminal step P is a
point mass at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from offrl.nets.lanes import per_lane
from offrl.nets.mlp import MLP

Metric = Literal["vector", "elementwise"]
STD = (1e-4, 10.0)  # bounds of P's standard deviation


@dataclass(frozen=True)
class Step:
    """What the loss compares of a timestep; every field is `[lanes, n, ...]`.

    Attributes:
        z: `[..., Z]` encodings, with their gradient.
        reward: `[...]`. alive: `[...]` 1, or 0 where the step is terminal.
        mean, std: `[..., Z]` of the next encoding.
    """

    z: Tensor
    reward: Tensor
    alive: Tensor
    mean: Tensor
    std: Tensor

    def at(self, index: Tensor) -> Step:
        """The same of the rows `[lanes, n]`."""
        lane = torch.arange(len(index), device=index.device).unsqueeze(1)
        return Step(*(part[lane, index] for part in (self.z, self.reward, self.alive, self.mean, self.std)))


def distance_to_match(a: Step, b: Step, discount: float | Tensor, metric: Metric = "vector") -> Tensor:
    """|r - r'| + gamma W_2, `[lanes, n]`, or `[lanes, n, Z]` if elementwise; without a gradient."""
    with torch.no_grad():
        gap = (a.reward - b.reward).abs().unsqueeze(-1)
        means, stds = (
            x * a.alive.unsqueeze(-1) - y * b.alive.unsqueeze(-1) for x, y in ((a.mean, b.mean), (a.std, b.std))
        )
        apart = means.square() + stds.square()
        transport = apart.sqrt() if metric == "elementwise" else apart.sum(-1, keepdim=True).sqrt()
        target: Tensor = gap + per_lane(discount, 2) * transport
        return target if metric == "elementwise" else target.squeeze(-1)


def bisimulation_loss(
    step: Step,
    pair: Tensor,
    valid: Tensor,
    discount: float | Tensor,
    metric: Metric = "vector",
    slope: float | Tensor = 0.5,
) -> Tensor:
    """J `[lanes]`, the mean over valid pairs.

    Args:
        pair: `[lanes, n]` int64: row i is compared with row pair[i]. valid: `[lanes, n]` 1, or 0 for a pair to leave out.
        metric: `vector` compares norms of the difference, `elementwise` each coordinate by itself with a smooth L1 distance,
            as the code of deep bisimulation does.
        slope: weight of errors where z's distance is too small, 1 - slope where it is too large, times 2; 0.5: both alike.
    """
    other = step.at(pair)
    target = distance_to_match(step, other, discount, metric)
    if metric == "elementwise":
        distance = nn.functional.smooth_l1_loss(step.z, other.z, reduction="none")
    else:
        distance = torch.linalg.vector_norm(step.z - other.z, dim=-1)
    short = target - distance
    weight = per_lane(slope, short.ndim - 1)
    error = 2 * torch.where(short > 0, weight, 1 - weight) * short.square()
    error = error.mean(-1) if metric == "elementwise" else error
    return (error * valid).sum(-1) / valid.sum(-1).clamp(min=1)


def pairs(uniform: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A random cyclic pairing of rows, and which of its pairs count.

    Args:
        uniform: `[lanes, n]` draws on [0, 1). group: `[lanes, n]` integers; only rows of the same group are paired.

    Returns:
        `[lanes, n]` int64 partners, and `[lanes, n]` 1 or 0.
    """
    order = (uniform if group is None else uniform + group).argsort(-1)
    partner = torch.empty_like(order).scatter_(1, order, order.roll(-1, 1))
    if group is None:
        return partner, torch.ones_like(uniform)
    return partner, (group == group.gather(1, partner)).to(uniform.dtype)


def with_events(uniform: Tensor, event: Tensor, share: float | Tensor) -> Tensor:
    """Rows to pair, `[lanes, n]` int64, so that a random pair of them holds an event with probability `share` or more.

    The first ceil(n p) rows, p = 1 - sqrt(1 - share), give way to rows that are events, each as often as the others: two rows
    that were drawn at random are then both without one with probability (1 - p)^2 or less. Without an event nothing changes.

    Args:
        uniform: `[lanes, n]` draws on [0, 1). event: `[lanes, n]` bool. share: of pairs, one number or `[lanes]`.
    """
    n, count = event.shape[1], event.sum(-1, keepdim=True)
    place = torch.arange(n, device=event.device)
    events = (uniform + ~event).argsort(-1).gather(1, place % count.clamp(min=1))
    replaced = place < n * (1 - (1 - per_lane(share)) ** 0.5)
    return torch.where(replaced & (count > 0), events, place)


class EncodingModels(nn.Module):
    """P(z' | z, a), a diagonal Gaussian, and the reward r(z, a), each of one hidden layer."""

    def __init__(self, seeds: Sequence[int], latent: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.transition = MLP(seeds, [latent + action_dim, hidden, 2 * latent], name="history/transition", norm=True)
        self.reward = MLP(seeds, [latent + action_dim, hidden, 1], name="history/reward", norm=True)

    def next_encoding(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of z', `[lanes, n, Z]` each."""
        mean, raw = self.transition(torch.cat([z, action], -1)).chunk(2, -1)
        low, high = STD
        return mean, low + (high - low) * (raw - math.log(9)).sigmoid()  # about 1 at first

    def loss(self, z: Tensor, action: Tensor, reward: Tensor, next_z: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """`[lanes]` each: Gaussian negative log-likelihood of z' (per dimension, without the constant), and the reward's MSE.

        Args:
            z, next_z: without a gradient.
        """
        mean, std = self.next_encoding(z, action)
        nll = (0.5 * ((next_z - mean) / std).square() + std.log()).mean(-1)
        error = (self.reward(torch.cat([z, action], -1)).squeeze(-1) - reward).square()
        return {
            "transition_loss": (nll * alive).sum(-1) / alive.sum(-1).clamp(min=1),
            "reward_loss": error.mean(-1),
        }
