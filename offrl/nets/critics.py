"""Ensembles of Q functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from offrl.nets.lanes import per_lane
from offrl.nets.mlp import MLP
from offrl.nets.spec import Spec

Pooling = Literal["mean", "min", "lcb"]


def pool(q: Tensor, how: Pooling, pessimism: float | Tensor = 0.0) -> Tensor:
    """One value of an ensemble's, `[lanes, members, batch]` to `[lanes, batch]`.

    Args:
        how: the members' mean, their minimum, or the lower confidence bound mean - `pessimism` std.
        pessimism: weight of the members' (population) standard deviation.
    """
    if how == "min":
        return q.amin(1)
    if how == "mean":
        return q.mean(1)
    return q.mean(1) - per_lane(pessimism) * q.std(1, correction=0)


class Critics(nn.Module):
    """An ensemble Q_1 ... Q_n(s, a); `options` are those of `MLP`."""

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        members: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"members={members} should be at least 1.")
        inputs, outputs = self.widths(obs_dim, action_dim)
        self.mlp = MLP(seeds, [inputs, *hidden, outputs], members, name="critics", **options)

    @staticmethod
    def widths(obs_dim: int, action_dim: int) -> tuple[int, int]:
        """Numbers of inputs and outputs of a network."""
        return obs_dim + action_dim, 1

    @classmethod
    def of(cls, spec: Spec, hidden: Sequence[int], members: int = 2, **options: Any) -> Self:
        """Critics of a Spec's observations and actions: `DiscreteCritics` for integer actions."""
        if spec.discrete and cls is Critics:
            return DiscreteCritics.of(spec, hidden, members, **options)  # type: ignore[return-value]
        return cls(spec.seeds, spec.obs_dim, spec.action_dim, hidden, members, **options)

    def forward(self, obs: Tensor, action: Tensor, member: int | None = None, frozen: bool = False) -> Tensor:
        """`[lanes, members, batch]`, or `[lanes, batch]` of one member; `frozen` as in `MLP`."""
        return self.mlp(torch.cat([obs, action], -1), member, frozen).squeeze(-1)

    def q_of_actions(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Q of n actions `[lanes, batch, n, A]` in each state `[lanes, batch, O]`: `[lanes, members, batch, n]`."""
        lanes, batch, n, _ = actions.shape
        obs = obs.unsqueeze(2).expand(lanes, batch, n, -1)
        return self(obs.flatten(1, 2), actions.flatten(1, 2)).unflatten(-1, (batch, n))

    def q_and_grad(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Q `[lanes, members, batch]` and dQ_i/da `[lanes, members, batch, A]`, both differentiable by the weights."""
        q, slope = self.mlp.with_input_gradient(torch.cat([obs, action], -1), first=obs.shape[-1])
        return q.squeeze(-1), slope


class DiscreteCritics(Critics):
    """An ensemble Q_1 ... Q_n(s, .) with an output for each of `action_dim` integer actions; `options` are those of `MLP`."""

    @staticmethod
    def widths(obs_dim: int, action_dim: int) -> tuple[int, int]:
        return obs_dim, action_dim

    def forward(self, obs: Tensor, action: Tensor, member: int | None = None, frozen: bool = False) -> Tensor:
        """Q at actions `[lanes, batch]` int64: `[lanes, members, batch]`, or `[lanes, batch]` of one member."""
        return self.at(self.mlp(obs, member, frozen), action)

    def q_of_all(self, obs: Tensor) -> Tensor:
        """Q of every action, `[lanes, members, batch, A]`."""
        return self.mlp(obs)

    @staticmethod
    def at(q: Tensor, action: Tensor) -> Tensor:
        """Entries of Q `[lanes, (members,) batch, A]` at actions `[lanes, batch]`: `[lanes, (members,) batch]`."""
        index = action if q.ndim == 3 else action.unsqueeze(1).expand(q.shape[:-1])
        return q.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def q_of_actions(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Q of n actions `[lanes, batch, n]` int64 in each state: `[lanes, members, batch, n]`."""
        q = self.q_of_all(obs)
        return q.gather(-1, actions.unsqueeze(1).expand(-1, q.shape[1], -1, -1))

    def q_and_grad(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("integer actions have no gradient")
