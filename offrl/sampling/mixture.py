"""Batches from several datasets with fixed shares, each drawn by a sampler of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.sampling.base import Sampler, make_sampler
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.random import LaneRandom
from offrl.utils.settings import from_target


@dataclass
class MixtureConfig:
    datasets: list[str] = field(default_factory=list)  # datasets besides the run's own, which is the first
    # Share of every batch, one for each of `datasets`; the rest comes from the run's own.
    shares: list[float] = field(default_factory=list)
    # Samplers of the datasets, the run's own first: names as in sampler=NAME, or tables with `_target_` and settings.
    # Default: uniform.
    samplers: list[str | dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.datasets or self.shares or self.samplers:  # the defaults are no mixture yet; `Mixture` refuses them
            self.check()

    def check(self) -> None:
        """Raise OffrlError unless datasets, shares and samplers fit together, and each sampler's settings are right."""
        if len(self.shares) != len(self.datasets) or not self.datasets:
            raise OffrlError(
                f"sampler.shares has {len(self.shares)} values for {len(self.datasets)} sampler.datasets; name one dataset "
                "at least besides dataset=, and a share for each."
            )
        if min(self.shares) <= 0 or sum(self.shares) > 1:
            raise OffrlError(f"sampler.shares={self.shares} should be above 0 and add up to at most 1.")
        if self.samplers and len(self.samplers) != len(self.datasets) + 1:
            raise OffrlError(
                f"sampler.samplers has {len(self.samplers)} entries for {len(self.datasets) + 1} datasets, the run's own "
                "included; give one for each."
            )
        for number, sampler in enumerate(self.samplers):
            _check_part(f"sampler.samplers[{number}]", _named(sampler))


class Mixture(Sampler):
    """Fixed shares of every batch from several datasets, each with a sampler of its own.

    The agent trains on one dataset, the concatenation of all: rows are numbered through, and observation statistics are those
    of all.

    Args:
        stores: the parts in that order.
    """

    Config = MixtureConfig
    mixes = True

    def __init__(self, stores: Sequence[OfflineDataset], cfg: MixtureConfig, seeds: Sequence[int] = (0,)) -> None:
        cfg.check()
        settings = [_named(sampler) for sampler in cfg.samplers or ["uniform"] * (len(cfg.datasets) + 1)]
        self.parts = [make_sampler(each, [store], seeds) for each, store in zip(settings, stores, strict=True)]
        if any(part.refresh_every for part in self.parts):
            raise OffrlError("sampler.samplers: a part of a mixture can't be refreshed; set its refresh_every=0.")
        self.shares = cfg.shares
        lengths = torch.tensor([len(store) for store in stores])
        self.first = [0, *lengths.cumsum(0).tolist()[:-1]]
        self.ids = [store.info.id for store in stores]

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        counts = shared_out(self.shares, batch)
        for name, share, count in zip(self.ids[1:], self.shares, counts[1:]):
            if share > 0 and not count:
                raise OffrlError(
                    f"batch_size={batch} holds no row of {name}, whose share is {share:g}; raise one of the two."
                )
        parts = enumerate(zip(self.parts, counts, self.first, strict=True))
        drawn = [part.draw(random, steps, n, f"{stream}/{i}") + first for i, (part, n, first) in parts if n]
        return torch.cat(drawn, -1)

    def metadata(self) -> dict[str, Any]:
        return {"parts": [{"dataset": name, **part.metadata()} for name, part in zip(self.ids, self.parts)]}

    def start(self) -> None:
        for part in self.parts:
            part.start()

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}/{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            part.restore({k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{i}/")})


def shared_out(shares: Sequence[float], batch: int) -> list[int]:
    """Numbers of rows of a batch: of the first part, which takes the rest, and of the others.

    What is rounded is where each part ends, so that together they have their share however many they are.
    """
    ends = [0, *(round(end * batch) for end in accumulate(shares))]
    return [batch - ends[-1], *(end - start for start, end in pairwise(ends))]


def _check_part(where: str, settings: Mapping[str, Any]) -> None:
    """Raise OffrlError for a table that names no sampler of one dataset, or gives one wrong settings."""
    if "_target_" not in settings:
        raise OffrlError(
            f"{where} has no _target_; name a sampler, such as uniform, or say `_target_: offrl.sampling.ReturnWeighted`."
        )
    cls, _ = from_target(settings, Sampler, where)
    if cls.mixes:
        raise OffrlError(
            f"{where} draws from several datasets itself; name these in sampler.datasets, with a share and a sampler for each."
        )


def _named(sampler: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in the file of a name such as `uniform`; settings themselves as they are."""
    if not isinstance(sampler, str):
        return sampler
    from omegaconf import OmegaConf

    path = conf_dir() / "sampler" / f"{sampler}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise OffrlError(f"sampler.samplers: {sampler} is no sampler; choose among {known}, or give a table.")
    return {str(key): value for key, value in OmegaConf.to_container(OmegaConf.load(path)).items()}  # type: ignore[union-attr]
