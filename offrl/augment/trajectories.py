"""Trajectories as matrices: windows of a dataset, and their encoding for a denoiser.

A trajectory is `[L, D]`, D = O + A + 2: row t holds the state s_t, the encoded action u_t, the reward r_t and the flag d_t (1
where the episode terminates with this step; never at a time limit). Next states are not modelled: they are the states of
the next row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from offrl.data.dataset import MADE_UP, OfflineDataset
from offrl.nets import ActionBox, Bound
from offrl.utils.errors import OffrlError

_LARGEST = 0.999  # share of the action box to which actions are clipped before atanh


@dataclass(frozen=True)
class Rows:
    """Decoded steps: `[..., O]`, `[..., A]`, `[...]` and bool `[...]`."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminations: Tensor


class Codec(nn.Module):
    """The encoding of a dataset's steps as rows of the denoiser, with mean zero and std one, and its inverse.

    Actions are encoded as u = atanh(a), so that generated ones lie inside the box; states, u and rewards are standardised.
    Flags are -1 and 1 (`terminals="zscore"` standardises them, as the authors do; a rare terminal is then some twenty standard
    deviations away from the rest).

    Args:
        low, high: bounds of the actions, one number or one per dimension.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, obs_dim: int, action_dim: int, low: Bound, high: Bound, terminals: Literal["sign", "zscore"] = "sign"
    ) -> None:
        super().__init__()
        self.obs_dim, self.action_dim, self.terminals = obs_dim, action_dim, terminals
        self.box = ActionBox(low, high)
        self.width = obs_dim + action_dim + 2
        self.obs, self.act = slice(0, obs_dim), slice(obs_dim, obs_dim + action_dim)
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))

    def raw(self, observations: Tensor, actions: Tensor, rewards: Tensor, terminations: Tensor) -> Tensor:
        """`[..., D]` before standardisation."""
        unit = self.box.to_unit(actions).clamp(-_LARGEST, _LARGEST)
        flag = terminations if self.terminals == "zscore" else 2 * terminations - 1
        return torch.cat([observations, unit.atanh(), rewards.unsqueeze(-1), flag.unsqueeze(-1)], -1)

    def fit(self, raw: Tensor, counts: Tensor) -> None:
        """Standardise by rows `[N, D]` of which the n-th occurs `counts[n]` times; constant columns are only centred."""
        share = counts.double() / counts.sum()
        mean, square = torch.zeros_like(raw[0]).double(), torch.zeros_like(raw[0]).double()
        for rows, part in zip(raw.split(65_536), share.split(65_536)):
            mean += part @ rows.double()
        for rows, part in zip(raw.split(65_536), share.split(65_536)):
            square += part @ (rows.double() - mean).square()
        std = square.sqrt()
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        if self.terminals == "sign":
            mean[-1], std[-1] = 0.0, 1.0
        self.mean.copy_(mean)
        self.std.copy_(std)

    def encode(self, observations: Tensor, actions: Tensor, rewards: Tensor, terminations: Tensor) -> Tensor:
        """`[..., D]`."""
        return (self.raw(observations, actions, rewards, terminations) - self.mean) / self.std

    def decode(self, x: Tensor) -> Rows:
        """Steps of encoded rows; actions are always inside their box and flags 0 or 1."""
        raw = x * self.std + self.mean
        flag = raw[..., -1] > (0.5 if self.terminals == "zscore" else 0.0)
        return Rows(raw[..., self.obs], self.box.from_unit(raw[..., self.act].tanh()), raw[..., -2], flag)

    def observations(self, x: Tensor) -> Tensor:
        """`[..., O]`: only the states."""
        return x[..., self.obs] * self.std[self.obs] + self.mean[self.obs]

    def unit_actions(self, x: Tensor) -> Tensor:
        """`[..., A]`: only the actions, in units of their box (-1 to 1)."""
        return (x[..., self.act] * self.std[self.act] + self.mean[self.act]).tanh()


class Windows:
    """Windows of L steps, none of which crosses an episode's end.

    As in the authors' code: every `stride`-th start, those at an episode's first step, and those that end exactly on a
    termination; none that ends on an episode's last step without a termination. Without `padding` a termination occurs in a
    window's last row only. With it windows extend past a termination, into rows with the final state, the middle action, reward
    0 and the flag set: the model learns what follows a termination, and short episodes are used.

    Args:
        store: the dataset.
        codec: encoding; `fit` standardises it by the rows of the windows, weighted by their frequency.
        episodes: `[n]` int64, the episodes to use.

    Attributes:
        starts: `[W]` int64, first rows of the windows in `raw`.
        raw: `[N', D]` rows of all episodes before standardisation.
        share_of_rows: share of these that lie in a window, once `fit` has run.

    Raises:
        OffrlError: no episode is long enough.
    """

    def __init__(
        self, store: OfflineDataset, codec: Codec, length: int, stride: int, padding: bool, episodes: Tensor
    ) -> None:
        chosen = store.select_episodes(episodes)
        ends = chosen.offsets[1:] - 1
        terminated = (chosen.terminations[ends] > 0) & ~chosen.has_tail
        raw = codec.raw(chosen.observations, chosen.actions, chosen.rewards, chosen.terminations)
        padded = terminated if padding else torch.zeros_like(terminated)
        raw, offsets = _with_absorbing_rows(raw, chosen, padded, codec)
        self.length = length
        self.last = offsets[1:] - 1  # last row of each episode: the absorbing one where there is one
        self.starts = self._starts(chosen.lengths, offsets[:-1], terminated, padding, stride)
        if not len(self.starts):
            raise OffrlError(
                f"{store.info.id}: no episode has a window of {length} steps, and one more where a time limit ends it; set a "
                "smaller augment.denoiser.window."
            )
        self.episode = torch.repeat_interleave(torch.arange(len(padded), device=raw.device), offsets.diff())
        self.raw, self.codec = raw, codec

    def _starts(self, lengths: Tensor, first: Tensor, terminated: Tensor, padding: bool, stride: int) -> Tensor:
        """Rows of the table at which a window starts, in order."""
        last = lengths - self.length  # the last start inside an episode
        # Without a termination no window ends on the last row.
        usable = torch.where(terminated, lengths - 1 if padding else last, last - 1).clamp(min=-1)
        counts = usable + 1
        episode = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), counts)
        place = torch.arange(len(episode), device=lengths.device) - (counts.cumsum(0) - counts)[episode]
        on_end = terminated[episode] & (place == last[episode])
        regular = torch.arange(len(episode), device=lengths.device) % stride == 0
        keep = regular | on_end | (place == 0)
        return (first[episode] + place)[keep]

    def fit(self) -> None:
        """Standardise the codec by these windows, and find the share of rows that lie in one."""
        rows = torch.cat([self._rows(starts).reshape(-1) for starts in self.starts.split(65_536)])
        counts = torch.bincount(rows, minlength=len(self.raw))
        self.codec.fit(self.raw, counts)
        self.share_of_rows = float((counts > 0).double().mean())

    def __len__(self) -> int:
        return len(self.starts)

    def _rows(self, starts: Tensor) -> Tensor:
        steps = starts.unsqueeze(-1) + torch.arange(self.length, device=starts.device)
        return torch.minimum(steps, self.last[self.episode[starts]].unsqueeze(-1))

    def gather(self, index: Tensor) -> Tensor:
        """`[n, L, D]`: the windows number `index`, encoded."""
        return (self.raw[self._rows(self.starts[index])] - self.codec.mean) / self.codec.std


def _with_absorbing_rows(raw: Tensor, store: OfflineDataset, padded: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """The rows with an absorbing one after each padded episode, and the new offsets of the episodes."""
    lengths = store.lengths + padded
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    table = raw.new_zeros(int(offsets[-1]), raw.shape[1])
    before = torch.cat([padded.new_zeros(1), padded[:-1]]).long().cumsum(0)
    table[torch.arange(len(store), device=raw.device) + before[store.episode_of_row]] = raw
    reached = store.next_observations[store.offsets[1:] - 1][padded]
    middle = codec.box.from_unit(raw.new_zeros(len(reached), store.actions.shape[1]))
    rewards = raw.new_zeros(len(reached))
    table[(offsets[1:] - 1)[padded]] = codec.raw(reached, middle, rewards, rewards + 1)
    return table, offsets


def split_episodes(store: OfflineDataset, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Episodes for training, and held-out ones (the share `holdout`, at least one if there are several)."""
    if store.episodes < 2 or holdout <= 0:
        everything = torch.arange(store.episodes)
        return everything, everything[:0]
    order = torch.randperm(store.episodes, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(holdout * store.episodes)), store.episodes - 1)
    return order[held:].sort().values, order[:held].sort().values


def synthetic_store(rows: Rows, like: OfflineDataset, label: str) -> OfflineDataset:
    """A dataset of generated trajectories `[n, T + 1]`: T transitions each, fewer where one terminates before.

    Only the state of the last row is used. Rows after a trajectory's first termination are left out.

    Raises:
        OffrlError: a generated number is not finite.
    """
    steps = rows.rewards.shape[1] - 1
    done = rows.terminations[:, :-1]
    before = done.long().cumsum(1) - done.long()  # terminations before a row
    kept = before == 0
    lengths = kept.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    fields = rows.observations[:, :-1], rows.actions[:, :-1], rows.rewards[:, :-1], rows.observations[:, 1:]
    tensors = [part[kept] for part in fields]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise OffrlError(
            f"{label}: generated trajectories of {steps} steps are not finite; guide less (augment.coefficient) or train "
            "longer (augment.denoiser.updates)."
        )
    facts = {key: value for key, value in like.info.provenance.items() if key != MADE_UP}  # here all have successors
    info = replace(like.info, id=f"{like.info.id} ({label})", provenance=facts)
    observations, actions, rewards, following = tensors
    return OfflineDataset(observations, actions, rewards, following, done[kept].to(rewards.dtype), offsets, info)
