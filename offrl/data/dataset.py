"""The dataset: a dataset as flat tensors on the training device, and gathers of transitions and windows.

Every row is a transition that may be sampled. Three things are told apart: where bootstrapping stops (`terminations`,
mask 0), where an episode ends (`offsets`; windows and returns stop there), and whether the file holds that end
(`complete`). A time limit is an end without a termination. A termination within an episode does not end it:
AntMaze's and OGBench's trajectories go on behind their goal. Nothing crosses an episode's end.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.data.batch import Batch, WindowBatch
from offrl.utils.errors import OffrlError

Bound = float | tuple[float, ...]
RECORDED_MAZE = "recorded_maze"  # of provenance: map of the maze of a dataset that is scored in one of its own
MADE_UP = "made_up_terminal_successors"  # of provenance: whether the source has no successors where episodes terminate
FIRST_ACTION = "first_action"  # of provenance: the environment's number of discrete action 0, where it was renumbered


def is_constant(rewards: Tensor) -> Tensor:
    """Whether rewards `[..., N]` are the same up to float32 rounding, `[...]` bool.

    A few roundings of a product or sum are some 1e-7 of the largest magnitude each, hence 1e-6 of it. The range is
    compared and not the standard deviation, which is tiny where few of many rewards differ, too.
    """
    low, high = (extreme.double() for extreme in torch.aminmax(rewards, dim=-1))
    return high - low <= 1e-6 * torch.maximum(low.abs(), high.abs())


def _bound(value: Any) -> Bound:
    """One number where all dimensions have the same, else a tuple."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return value
    numbers = tuple(float(number) for number in np.ravel(value))
    return numbers[0] if len(set(numbers)) == 1 else numbers


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset besides its numbers.

    Attributes:
        id: name by which the user asked for it, e.g. `hopper-medium-v2` or `forge/hopper/medium-v0`.
        source: where it was read from (a file, or the reader's name).
        env_id: Gymnasium id that evaluates a policy trained on it; None when there is none.
        env_kwargs: keyword arguments for that environment.
        family: `gym-mujoco`, `antmaze`, `maze2d`, `adroit`, `kitchen`, `forge`, ... ; chooses per-family settings.
        ref_min, ref_max: returns that score 0 and 100; None when the set has no reference.
        max_episode_steps: the time limit of the behaviour's environment; None when unknown.
        action_low, action_high: bounds of the actions: one number where all dimensions have the same, else one a
            dimension.
        discrete: number of discrete actions, those that never occur included; None for continuous ones.
        provenance: free text or numbers worth keeping (policies, seeds, versions).
    """

    id: str = "arrays"
    source: str = "arrays"
    env_id: str | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    family: str = "unknown"
    ref_min: float | None = None
    ref_max: float | None = None
    max_episode_steps: int | None = None
    action_low: Bound = -1.0
    action_high: Bound = 1.0
    discrete: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("action_low", "action_high"):  # lists come from JSON
            object.__setattr__(self, name, _bound(getattr(self, name)))

    @property
    def action_range(self) -> tuple[float, float]:
        """The least and the largest bound of any dimension."""
        return float(np.min(self.action_low)), float(np.max(self.action_high))

    @property
    def scored_by_success(self) -> bool:
        """Whether an episode's score is 100 if the environment tells of a success at its last step, else 0 (OGBench)."""
        return self.family == "ogbench"

    def normalized(self, returns: Any) -> Any:
        """100 (R - ref_min) / (ref_max - ref_min), the score of D4RL (Fu et al. 2020); None without references."""
        if self.ref_min is None or self.ref_max is None:
            return None
        return 100.0 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


class OfflineDataset:
    """A dataset of `N` transitions in `E` episodes.

    Args:
        observations, next_observations: `[N, O]` float32.
        actions: `[N, A]` float32, or `[N]` int64 when `info.discrete`.
        rewards: `[N]` float32.
        terminations: `[N]` bool or float32; 1 where nothing is bootstrapped, never at a time limit; it need not end an
            episode.
        offsets: `[E + 1]` int64, rows `offsets[e]:offsets[e + 1]` are episode e; every episode has a row.
        complete: `[E]` bool, False for an episode that the file cut off (neither terminal nor timeout).
        tail_rewards, tail_actions: `[E]`, `[E, A]`: reward and action of a last step that is no transition since its
            successor is unknown (D4RL files without `next_observations`); zeros where there is none.
        has_tail: `[E]` bool.
        info: what is known besides the numbers.

    Raises:
        OffrlError: the arrays do not fit together (lengths, offsets, types, an empty dataset).
    """

    ROW_FIELDS = ("observations", "actions", "rewards", "next_observations", "terminations")
    EPISODE_FIELDS = ("complete", "tail_rewards", "tail_actions", "has_tail")

    def __init__(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        next_observations: Tensor,
        terminations: Tensor,
        offsets: Tensor,
        info: DatasetInfo | None = None,
        complete: Tensor | None = None,
        tail_rewards: Tensor | None = None,
        tail_actions: Tensor | None = None,
        has_tail: Tensor | None = None,
    ) -> None:
        self.info = info or DatasetInfo()
        self.observations = observations.contiguous()
        self.actions = actions.contiguous()
        self.rewards = rewards.contiguous()
        self.next_observations = next_observations.contiguous()
        self.terminations = terminations.to(rewards.dtype).contiguous()
        self.offsets = offsets.to(torch.int64).contiguous()
        episodes, device = len(self.offsets) - 1, rewards.device
        self.complete = torch.ones(episodes, dtype=torch.bool, device=device) if complete is None else complete
        self.tail_rewards = rewards.new_zeros(episodes) if tail_rewards is None else tail_rewards
        self.tail_actions = actions.new_zeros(episodes, *actions.shape[1:]) if tail_actions is None else tail_actions
        self.has_tail = torch.zeros(episodes, dtype=torch.bool, device=device) if has_tail is None else has_tail
        self._check()

    def _check(self) -> None:
        n, where = len(self.rewards), f"dataset {self.info.id}"
        if n == 0 or len(self.offsets) < 2:
            raise OffrlError(f"{where}: it holds no transition; check that the file is the right one.")
        for name in self.ROW_FIELDS:
            if len(getattr(self, name)) != n:
                raise OffrlError(f"{where}: {name} has {len(getattr(self, name))} rows but rewards has {n}.")
        kinds = {
            "observations": (2, True),
            "actions": (1, False) if self.info.discrete else (2, True),
            "rewards": (1, True),
        }
        for name, (dims, floats) in kinds.items():
            tensor = getattr(self, name)
            if (tensor.ndim, tensor.is_floating_point()) != (dims, floats):
                wanted = f"[{', '.join(['rows', 'width'][:dims])}] {'floats' if floats else 'integers'}"
                shape = f"shape {tuple(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}"
                raise OffrlError(f"{where}: {name} has {shape}, where {wanted} belong; fix the file.")
        for name in self.EPISODE_FIELDS:
            if len(getattr(self, name)) != self.episodes:
                raise OffrlError(f"{where}: {name} has {len(getattr(self, name))} rows for {self.episodes} episodes.")
        one_each = self.terminations.ndim == self.tail_rewards.ndim == self.has_tail.ndim == self.complete.ndim == 1
        if not one_each or self.tail_actions.shape[1:] != self.actions.shape[1:]:
            raise OffrlError(
                f"{where}: terminations or last steps of episodes have another shape than the rows; fix the file."
            )
        if self.observations.shape != self.next_observations.shape:
            raise OffrlError(f"{where}: observations and next_observations differ in shape; fix the file.")
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != n or bool((self.offsets.diff() < 1).any()):
            raise OffrlError(f"{where}: episode offsets must rise from 0 to {n} with at least one row each.")

    # ---- sizes ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def episodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def obs_dim(self) -> int:
        return self.observations.shape[-1]

    @property
    def action_dim(self) -> int:
        return self.info.discrete or self.actions.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.rewards.device

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.ROW_FIELDS)

    # ---- per episode ------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> Tensor:
        """`[E]` int64: transitions in each episode."""
        return self.offsets.diff()

    @property
    def steps(self) -> Tensor:
        """`[E]` int64: steps of the environment in each episode; a tail is one, though it is no transition."""
        return self.lengths + self.has_tail

    @cached_property
    def episode_of_row(self) -> Tensor:
        """`[N]` int64: the episode that a row belongs to."""
        return torch.repeat_interleave(torch.arange(self.episodes, device=self.device), self.lengths)

    @cached_property
    def returns(self) -> Tensor:
        """`[E]` float64: undiscounted return of each episode, the reward of a tail included."""
        total = torch.zeros(self.episodes, dtype=torch.float64, device=self.device)
        total.index_add_(0, self.episode_of_row, self.rewards.double())
        return total + self.tail_rewards.double()

    @property
    def best_return(self) -> float:
        """The best return among the episodes that ended; among all where the file cut every one off.

        Of a recording that stopped by its number of steps the last episode may be marked as truncated, though it neither
        terminated nor reached the time limit: with negative rewards the few steps of it would be the best.
        """
        returns, ended, limit = self.returns, self.complete.clone(), self.info.max_episode_steps
        if limit and not self.terminations[-1] and int(self.lengths[-1] + self.has_tail[-1]) < limit:
            ended[-1] = False
        return float((returns[ended] if bool(ended.any()) else returns).max())

    @property
    def constant_rewards(self) -> bool:
        """Whether all rewards are the same up to float32 rounding, so that a scale of them would be that of noise."""
        return bool(is_constant(self.rewards))

    @cached_property
    def initial_observations(self) -> Tensor:
        """`[E, O]`: the first observation of each episode."""
        return self.observations[self.offsets[:-1]]

    # ---- fields on demand -------------------------------------------------------------------------------------

    @cached_property
    def timesteps(self) -> Tensor:
        """`[N]` int64: position of a row in its episode."""
        return torch.arange(len(self), device=self.device) - self.offsets[self.episode_of_row]

    @cached_property
    def return_to_go(self) -> Tensor:
        """`[N]` float32: sum of the episode's rewards from a row to its end (undiscounted, tail included)."""
        before = self.rewards.double().cumsum(0) - self.rewards.double()
        before_episode = before[self.offsets[:-1]]
        spent = before - before_episode[self.episode_of_row]
        return (self.returns[self.episode_of_row] - spent).to(self.rewards.dtype)

    @cached_property
    def next_actions(self) -> tuple[Tensor, Tensor]:
        """`[N, A]` a' of the same episode, `[N]` whether it is known; an unknown one repeats the own action."""
        nxt, known = self.actions.roll(-1, 0), torch.ones(len(self), dtype=torch.bool, device=self.device)
        last = self.offsets[1:] - 1
        tail = self.has_tail if self.actions.ndim == 1 else self.has_tail[:, None]
        nxt[last] = torch.where(tail, self.tail_actions, self.actions[last])
        known[last] = self.has_tail
        return nxt, known

    @property
    def known_successors(self) -> Tensor | None:
        """`[n]` int64: the rows whose successor was recorded; None: all of them.

        A source without them says nothing of the state in which an episode terminates. What stands there is made up, and only
        the mask keeps it from bootstrapping: a model of the environment must not learn it.
        """
        if not self.info.provenance.get(MADE_UP):
            return None
        last = self.offsets[1:] - 1
        known = torch.ones(len(self), dtype=torch.bool, device=self.device)
        known[last] = (self.terminations[last] == 0) | self.has_tail
        return known.nonzero()[:, 0]

    # ---- gathers ----------------------------------------------------------------------------------------------

    def transitions(self, index: Tensor, fields: tuple[str, ...] = ()) -> Batch:
        """Gather single transitions.

        Args:
            index: int64 rows of any shape `[...]`; usually `[lanes, batch]` or `[updates, lanes, batch]`.
            extra: any of `next_action`, `return_to_go`, `timestep`.
        """
        flat = index.reshape(-1)

        def rows(source: Tensor) -> Tensor:
            return source.index_select(0, flat).view(*index.shape, *source.shape[1:])

        batch = Batch(
            obs=rows(self.observations),
            action=rows(self.actions),
            reward=rows(self.rewards),
            next_obs=rows(self.next_observations),
            mask=rows(self.terminations).neg_().add_(1.0),
            index=index,
        )
        if "next_action" in fields:
            action, known = self.next_actions
            batch.next_action, batch.has_next_action = rows(action), rows(known)
        if "return_to_go" in fields:
            batch.return_to_go = rows(self.return_to_go)
        if "timestep" in fields:
            batch.timestep = rows(self.timesteps)
        return batch

    def windows(self, index: Tensor, length: int, fields: tuple[str, ...] = ()) -> WindowBatch:
        """Gather windows of `length` steps that start at `index` and stop at the episode's end.

        Steps behind the end are padding: zeros everywhere, `valid = 0` (and `mask = 0`).

        Args:
            index: `[...]` int64 first rows. Returns tensors `[..., length, *]`.
        """
        steps = index.unsqueeze(-1) + torch.arange(length, device=index.device)
        end = self.offsets[1:][self.episode_of_row[index]].unsqueeze(-1)
        valid = steps < end
        batch = self.transitions(torch.minimum(steps, end - 1), tuple({*fields, "timestep"}))

        def padded(tensor: Tensor) -> Tensor:
            keep = valid.view(*valid.shape, *[1] * (tensor.ndim - valid.ndim))
            return torch.where(keep, tensor, torch.zeros_like(tensor))

        steps_of = vars(batch.map(padded))
        return WindowBatch.of(
            {**steps_of, "index": index, "valid": valid.to(self.rewards.dtype), "cut": torch.zeros_like(index)}
        )

    # ---- whole-store operations -------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the dataset by name; with `info` enough to build it again."""
        return {name: getattr(self, name) for name in (*self.ROW_FIELDS, *self.EPISODE_FIELDS, "offsets")}

    def to(self, device: torch.device | str) -> OfflineDataset:
        """The same dataset on another device (itself when it is there already)."""
        if torch.device(device) == self.device:
            return self
        return OfflineDataset(**{k: v.to(device) for k, v in self.tensors().items()}, info=self.info)

    def with_info(self, **changes: Any) -> OfflineDataset:
        """The same tensors under a changed `info`."""
        changed = OfflineDataset(**self.tensors(), info=replace(self.info, **changes))
        if "fingerprint" in self.__dict__:  # of the numbers alone
            changed.__dict__["fingerprint"] = self.fingerprint
        return changed

    def with_rewards(self, scale: float = 1.0, shift: float = 0.0) -> OfflineDataset:
        """Rewards `scale * r + shift` in training rows; tails move along so that returns stay consistent."""
        tensors = self.tensors()
        tensors["rewards"] = self.rewards * scale + shift
        tensors["tail_rewards"] = torch.where(self.has_tail, self.tail_rewards * scale + shift, self.tail_rewards)
        return OfflineDataset(**tensors, info=self.info)

    def select_episodes(self, episodes: Tensor) -> OfflineDataset:
        """A dataset of the given episodes, in the given order; an episode may stand in it more than once."""
        episodes = episodes.to(self.device)
        lengths = self.lengths[episodes]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        inside = torch.arange(int(offsets[-1]), device=self.device) - torch.repeat_interleave(offsets[:-1], lengths)
        rows = torch.repeat_interleave(self.offsets[:-1][episodes], lengths) + inside
        tensors = {name: getattr(self, name)[rows] for name in self.ROW_FIELDS}
        tensors |= {name: getattr(self, name)[episodes] for name in self.EPISODE_FIELDS}
        return OfflineDataset(**tensors, offsets=offsets, info=self.info)

    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """`[O]`, `[O]`: mean and population standard deviation of the observations (float64 sums)."""
        mean = torch.zeros(self.obs_dim, dtype=torch.float64, device=self.device)
        square = torch.zeros_like(mean)
        chunks = self.observations.split(262_144)  # bounds the float64 copy's memory
        for chunk in chunks:
            mean += chunk.double().sum(0)
        mean /= len(self)
        for chunk in chunks:
            square += (chunk.double() - mean).square().sum(0)
        dtype = self.observations.dtype
        return mean.to(dtype), (square / len(self)).sqrt().to(dtype)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change when any number of the dataset does; kept with runs and checked at resume."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors().items()):
            digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()


def concatenate(datasets: list[OfflineDataset], info: DatasetInfo | None = None) -> OfflineDataset:
    """One dataset of several with the same shapes, in order; episodes stay apart.

    Its action bounds are the least box that holds those of all.
    """
    for dataset in datasets[1:]:
        same = all(
            getattr(dataset, name).shape[1:] == getattr(datasets[0], name).shape[1:]
            for name in OfflineDataset.ROW_FIELDS
        )
        if not same or dataset.info.discrete != datasets[0].info.discrete:
            raise OffrlError(
                f"{datasets[0].info.id} and {dataset.info.id} differ in observations or actions; leave one out."
            )
    tensors = {}
    for name in (*OfflineDataset.ROW_FIELDS, *OfflineDataset.EPISODE_FIELDS):
        tensors[name] = torch.cat([getattr(dataset, name) for dataset in datasets])
    lengths = torch.cat([dataset.lengths for dataset in datasets])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    info = info or datasets[0].info
    if any((d.info.action_low, d.info.action_high) != (info.action_low, info.action_high) for d in datasets):
        low = np.minimum.reduce(np.broadcast_arrays(*(d.info.action_low for d in datasets)))
        high = np.maximum.reduce(np.broadcast_arrays(*(d.info.action_high for d in datasets)))
        info = replace(info, action_low=_bound(low), action_high=_bound(high))
    if any(dataset.info.provenance.get(MADE_UP) for dataset in datasets):
        info = replace(info, provenance=info.provenance | {MADE_UP: True})
    return OfflineDataset(**tensors, offsets=offsets, info=info)
