"""What every sampler has in common, and how one is made from its settings.

A sampler chooses the rows of the next batch. It knows the dataset's episodes and nothing of agents. Draws come from
`LaneRandom`, so they depend on the lane's seed and the update's number alone: most samplers have no state to save.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom
from offrl.utils.settings import check_lane_lists, from_target


@dataclass
class NoSettings:
    """A sampler without settings."""


class Sampler:
    """Base of all samplers; a subclass has a dataclass `Config` and implements `draw`.

    A float in the configuration may be a list with one value per lane. Samplers are made as `cls(store, config, seeds)`, with
    the lanes' seeds.

    Attributes:
        refresh_every: updates between calls of `refresh`; 0: the distribution never changes.
        mixes: whether it draws from several datasets, and is made with a list of them.
    """

    Config: ClassVar[type] = NoSettings
    refresh_every: int = 0
    mixes: ClassVar[bool] = False

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        """`[updates, lanes, batch]` int64 rows for the updates numbered `steps` (`[updates]` int64).

        `stream` names the random numbers; samplers that draw for one batch must not share them. No copy to the host: a
        captured graph draws too.
        """
        raise NotImplementedError

    @classmethod
    def label(cls, cfg: Any) -> str:
        """Suffix of the method's name in reports."""
        return cls.__name__

    def metadata(self) -> dict[str, Any]:
        """Numbers for the run's manifest; a list where lanes differ."""
        return {}

    def start(self) -> None:
        """Learn the distribution before the first update; a resumed run calls `restore` instead."""

    def refresh(self) -> None:
        """Change the distribution, in place (a captured graph goes on reading the same tensors)."""

    def tensors(self) -> dict[str, Tensor]:
        """State that training changes; checkpoints hold it."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the state that `tensors` returned."""


# ---- from a configuration --------------------------------------------------------------------------------------------


def sampler_config(settings: Mapping[str, Any], lanes: int) -> tuple[type[Any], Any]:
    """The class that `_target_` names and its configuration with the given settings, both checked.

    Raises:
        OffrlError: no such class, an unknown key, a wrong value, or a list whose length is not the number of lanes.
    """
    cls, cfg = from_target(settings, Sampler, "sampler")
    check_lane_lists(cfg, "sampler", lanes)
    return cls, cfg


def make_sampler(settings: Mapping[str, Any], stores: Sequence[OfflineDataset], seeds: Sequence[int]) -> Sampler:
    """A sampler from its `_target_` and the settings that differ from its dataclass.

    Args:
        stores: the run's dataset, then those that `further_datasets` names.
    """
    cls, cfg = sampler_config(settings, len(seeds))
    try:
        sampler: Sampler = cls(stores if cls.mixes else stores[0], cfg, seeds)
    except (TypeError, ValueError) as error:
        raise OffrlError(f"sampler: {error}") from error
    return sampler


def further_datasets(settings: Mapping[str, Any]) -> list[str]:
    """Names of the datasets that a sampler draws from besides the run's own."""
    return list(settings.get("datasets") or [])


def lane_values(value: Any, device: torch.device) -> Any:
    """A list as a tensor `[lanes]`, a number as it is."""
    return torch.tensor(value, dtype=torch.float64, device=device) if isinstance(value, list) else value


def as_list(value: Any) -> list[Any]:
    """The values of a setting: one, or one per lane."""
    return value if isinstance(value, list) else [value]


def check_above_zero(name: str, value: Any) -> None:
    """Raise OffrlError unless a setting, or every lane's value of it, is above zero."""
    for number in as_list(value):
        if not number > 0:
            raise OffrlError(f"sampler.{name}={number:g} should be above 0.")


def warn(reason: str) -> None:
    """Warn the user of a sampler's fallback."""
    warnings.warn(f"sampler: {reason}.", stacklevel=3)
