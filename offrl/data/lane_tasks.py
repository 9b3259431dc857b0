"""Several tasks of one dataset: a lane each, over one copy of states and actions.

OGBench's single tasks share a file's trajectories and differ in rewards and masks, so that five tasks train side by side
without five copies of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offrl.data import partial
from offrl.data.batch import Batch
from offrl.data.dataset import DatasetInfo, OfflineDataset, is_constant
from offrl.data.ogbench_names import parse
from offrl.utils.errors import OffrlError

KEY = "lane_tasks"  # of provenance: the task of each lane


class LaneTasks(OfflineDataset):
    """A dataset with rewards and terminations of its own in each lane.

    What is one number a row in other datasets does not exist here: `rewards` and `terminations` are NaN, and returns are
    refused, so that nothing takes the numbers of one lane for those of all.

    Args:
        shared: the dataset under any of its tasks.
        lane_rewards, lane_terminations: `[lanes, N]`.
        info: `provenance["lane_tasks"]` has the lanes' tasks, and `id` is the dataset's without a task.

    Raises:
        OffrlError: `returns` and all that follows from them were asked for.
    """

    def __init__(
        self, shared: OfflineDataset, lane_rewards: Tensor, lane_terminations: Tensor, info: DatasetInfo
    ) -> None:
        nothing = torch.full_like(shared.rewards, torch.nan)
        super().__init__(
            **{**OfflineDataset.tensors(shared), "rewards": nothing, "terminations": nothing.clone()}, info=info
        )
        self.lane_rewards, self.lane_terminations = lane_rewards.contiguous(), lane_terminations.contiguous()

    @property
    def lanes(self) -> int:
        return len(self.lane_rewards)

    @property
    def returns(self) -> Tensor:
        raise OffrlError(
            f"{self.info.id}: with data.tasks each lane has rewards of its own, so that samplers, methods and options that "
            "look at returns can't be used; train one task at a time with data.task."
        )

    @property
    def constant_lane_rewards(self) -> Tensor:
        """`[lanes]` bool: `constant_rewards` of each lane's task."""
        return is_constant(self.lane_rewards)

    def transitions(self, index: Tensor, fields: tuple[str, ...] = ()) -> Batch:
        """As of any dataset, with the rewards and masks of each lane's task.

        Args:
            index: `[updates, lanes, batch]`, or of windows `[updates, lanes, batch, time]`.
        """
        if index.ndim < 3 or index.shape[1] != self.lanes:
            raise OffrlError(
                f"{self.info.id}: data.tasks has {self.lanes} tasks, one per lane; rows were asked without."
            )
        batch = super().transitions(index, fields)
        lane = torch.arange(self.lanes, device=self.device).view(1, -1, *[1] * (index.ndim - 2))
        flat = (lane * len(self) + index).reshape(-1)
        batch.reward = self.lane_rewards.view(-1).index_select(0, flat).view(index.shape)
        batch.mask = 1.0 - self.lane_terminations.view(-1).index_select(0, flat).view(index.shape)
        return batch

    def tensors(self) -> dict[str, Tensor]:
        lanes = {"lane_rewards": self.lane_rewards, "lane_terminations": self.lane_terminations}
        return {name: t for name, t in super().tensors().items() if name not in ("rewards", "terminations")} | lanes

    def to(self, device: torch.device | str) -> LaneTasks:
        if torch.device(device) == self.device:
            return self
        shared = OfflineDataset(**{k: v.to(device) for k, v in OfflineDataset.tensors(self).items()}, info=self.info)
        return LaneTasks(shared, self.lane_rewards.to(device), self.lane_terminations.to(device), self.info)

    def with_info(self, **changes: Any) -> LaneTasks:
        return LaneTasks(self, self.lane_rewards, self.lane_terminations, replace(self.info, **changes))

    def with_rewards(self, scale: float = 1.0, shift: float = 0.0) -> LaneTasks:
        return LaneTasks(self, self.lane_rewards * scale + shift, self.lane_terminations, self.info)

    def select_episodes(self, episodes: Tensor) -> OfflineDataset:
        raise OffrlError(f"{self.info.id}: episodes can't be chosen with data.tasks; train one task at a time.")


def with_tasks(read: Callable[[int], OfflineDataset], tasks: Sequence[int]) -> LaneTasks:
    """The dataset whose lane l has task `tasks[l]`.

    Args:
        read: the dataset under a task.
    """
    rewards: dict[int, Tensor] = {}
    terminations: dict[int, Tensor] = {}
    shared: OfflineDataset | None = None
    for task in dict.fromkeys(tasks):
        dataset = read(task)
        shared = shared or dataset
        rewards[task], terminations[task] = dataset.rewards, dataset.terminations
    assert shared is not None
    if shared.has_tail.any():  # one reward an episode, which would be the first task's
        raise OffrlError(
            f"{shared.info.id}: an episode's last step has no successor, so its reward belongs to no row; with data.tasks that "
            "can't be; train one task at a time with data.task."
        )
    name = parse(shared.info.id)
    assert name is not None
    info = replace(
        shared.info,
        id=replace(name, task=None).id,
        env_id=None,
        provenance={
            "rows_in_file": shared.info.provenance.get("rows_in_file"),
            KEY: list(tasks),
            **{key: value for key, value in shared.info.provenance.items() if key == partial.KEY},
        },
    )
    lane_rewards, lane_terminations = (
        torch.stack([column[task] for task in tasks]) for column in (rewards, terminations)
    )
    return LaneTasks(shared, lane_rewards, lane_terminations, info)


def lane_infos(info: DatasetInfo, lanes: int) -> list[DatasetInfo]:
    """What is known of each lane's dataset: the same for all, or under `data.tasks` id and environment of its task."""
    tasks = info.provenance.get(KEY) or []
    name = parse(info.id) if tasks else None
    if name is None:
        return [info] * lanes
    if len(tasks) != lanes:
        raise OffrlError(f"{info.id}: data.tasks has {len(tasks)} tasks for {lanes} lanes; give one per lane.")
    named = [name.with_task(task) for task in tasks]
    return [replace(info, id=one.id, env_id=one.env_id) for one in named]
