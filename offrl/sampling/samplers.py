"""Samplers: which rows of a dataset make the next batch.

A sampler knows the dataset's episodes and nothing of agents. Draws come from `LaneRandom`, so they depend on the lane's seed
and the update's number alone: most samplers have no state to save.

Returns are read off the data as they were loaded, before `data.reward_*` transforms them: shifting rewards would make long
trajectories look better, or worse, than they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.sampling import weights
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
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
        refresh_every: updates between calls of `refresh`; 0 for a sampler that stays as it was made.
    """

    Config: ClassVar[type] = NoSettings
    refresh_every: int = 0

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        """`[updates, lanes, batch]` int64 rows for the updates numbered `steps` (`[updates]` int64).

        `stream` names the random numbers; samplers that draw for one batch must not share them. No copy to the host: a
        captured graph draws too.
        """
        raise NotImplementedError

    @classmethod
    def label(cls, cfg: Any) -> str:
        """What reports put behind the agent's name."""
        return cls.__name__

    def metadata(self) -> dict[str, Any]:
        """Numbers worth keeping with a run; what differs between lanes is a list."""
        return {}

    def start(self) -> None:
        """Learn what has to be learnt before the first update; a run that goes on calls `restore` instead."""

    def refresh(self) -> None:
        """Change the law, in place (a captured graph goes on reading the same tensors)."""

    def tensors(self) -> dict[str, Tensor]:
        """State that training changes and a checkpoint has to hold."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""


class Uniform(Sampler):
    """Every transition equally likely, with replacement."""

    def __init__(self, store: OfflineDataset, cfg: NoSettings | None = None, seeds: Sequence[int] = ()) -> None:
        self.rows = len(store)

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        return random.integers(stream, self.rows, (batch,), steps)

    @classmethod
    def label(cls, cfg: Any) -> str:
        return ""

    def metadata(self) -> dict[str, Any]:
        return {"effective_rows": self.rows, "effective_share": 1.0}


# ---- weights per trajectory ------------------------------------------------------------------------------------------


class EpisodeWeighted(Sampler):
    """Transitions weighted by a weight of their episode: P(row) is proportional to `weights[episode of row]`.

    Drawn in two stages, exactly: an episode with probability proportional to weight x length, then one of its rows
    uniformly. The table has one float64 entry per episode, so neither 2^24 categories nor float32 sums limit it.

    Args:
        store: the dataset.
        weights: `[episodes]`, or `[lanes, episodes]` when lanes differ; non-negative, any scale.
    """

    def __init__(self, store: OfflineDataset, weights: Tensor) -> None:
        self.weights = weights.double().to(store.device)
        mass = self.weights.reshape(-1, store.episodes) * store.lengths
        if bool((~mass.isfinite()).any() or (mass < 0).any() or (mass.sum(-1) <= 0).any()):
            raise ValueError("episode weights must be finite and non-negative with a positive sum")
        self.table = (mass.cumsum(-1) / mass.sum(-1, keepdim=True)).contiguous()
        # Rounding may leave the last entry below 1; a zero-weight episode behind the last positive one must stay out.
        self.last = (mass > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)
        self.first, self.lengths = store.offsets[:-1], store.lengths

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        u = random.uniform(stream, (2, batch), steps)  # [updates, lanes, 2, batch]
        episode = self._episodes(u[:, :, 0])
        length = self.lengths[episode]
        return self.first[episode] + torch.minimum((u[:, :, 1] * length).to(torch.int64), length - 1)

    def _episodes(self, u: Tensor) -> Tensor:
        """`[updates, lanes, batch]` episodes, by inverting the cumulative distribution at `u`."""
        if len(self.table) == 1:  # all lanes share it
            return torch.searchsorted(self.table[0], u.contiguous(), right=True).minimum(self.last[0])
        by_lane = u.transpose(0, 1).flatten(1)
        episode = torch.searchsorted(self.table, by_lane.contiguous(), right=True).minimum(self.last)
        return episode.unflatten(1, (len(u), -1)).transpose(0, 1)

    def metadata(self) -> dict[str, Any]:
        rows = weights.effective_rows(self.weights, self.lengths)
        return {"effective_rows": rows.tolist(), "effective_share": (rows / self.lengths.sum()).tolist()}


@dataclass
class ReturnWeightedConfig:
    # alpha: a transition of the best trajectory is exp(1 / alpha) times as likely as one of the worst. The authors use
    # 0.1, with CQL 0.2; `inf` is uniform sampling.
    temperature: float = 0.1
    per_step: bool = (
        False  # rank by reward per step instead of return (for ablations: cut trajectories then count in full)
    )

    def __post_init__(self) -> None:
        check_above_zero("temperature", self.temperature)


class ReturnWeighted(EpisodeWeighted):
    """RW: the weight exp(g / alpha), with g the trajectory's return brought to [0, 1]."""

    Config = ReturnWeightedConfig

    def __init__(self, store: OfflineDataset, cfg: Any = None, seeds: Sequence[int] = ()) -> None:
        self.cfg: Any = cfg or self.Config()
        returns = weights.checked_returns(store.returns)
        self.returns = returns / store.steps if self.cfg.per_step else returns
        self.about: dict[str, Any] = {}
        law, reason = weights.boltzmann(self.scores(store), lane_values(self.cfg.temperature, store.device))
        if reason:
            warn(reason)
        self.about["fallback"] = "; ".join(filter(None, (self.about.get("fallback"), reason))) or None
        super().__init__(store, law)

    def scores(self, store: OfflineDataset) -> Tensor:
        """`[E]`: what ranks the trajectories."""
        return self.returns

    @classmethod
    def label(cls, cfg: Any) -> str:
        return "RW"

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | self.about


@dataclass
class AdvantageWeightedConfig(ReturnWeightedConfig):
    baseline: weights.BaselineName = "ols"  # V(s_0): ols (the authors'), ridge, kfold, network or mean


class AdvantageWeighted(ReturnWeighted):
    """AW: the same with the advantage G - V(s_0), so that a lucky start doesn't count as a good behaviour."""

    Config = AdvantageWeightedConfig

    def scores(self, store: OfflineDataset) -> Tensor:
        fit = weights.baseline(store.initial_observations, self.returns, self.cfg.baseline)
        if fit.fallback:
            warn(fit.fallback)
        self.about |= {"baseline": fit.used, "baseline_r2": fit.r2, "fallback": fit.fallback}
        return self.returns - fit.values

    @classmethod
    def label(cls, cfg: Any) -> str:
        return "AW"


@dataclass
class TopPercentConfig:
    percent: float = 10.0  # of the trajectories (not of the transitions), at least one; earlier ones win ties

    def __post_init__(self) -> None:
        for value in as_list(self.percent):
            if not 0 < value <= 100:
                raise OffrlError(f"sampler.percent={value:g} should be above 0 and at most 100.")


class TopPercent(EpisodeWeighted):
    """Uniform over the transitions of the trajectories with the highest returns."""

    Config = TopPercentConfig

    def __init__(self, store: OfflineDataset, cfg: Any = None, seeds: Sequence[int] = ()) -> None:
        percent = (cfg or self.Config()).percent
        returns = weights.checked_returns(store.returns)
        laws = [weights.top(returns, value) for value in as_list(percent)]
        super().__init__(store, torch.stack(laws) if isinstance(percent, list) else laws[0])

    @classmethod
    def label(cls, cfg: Any) -> str:
        return "Top-%" if isinstance(cfg.percent, list) else f"Top-{cfg.percent:g}%"


# ---- weights per transition ------------------------------------------------------------------------------------------


class RowWeighted(Sampler):
    """Transitions with weights of their own, drawn in constant time from an alias table (Walker 1977).

    Args:
        weights: `[N]`, or `[lanes, N]` when lanes differ; non-negative, any scale.
    """

    def __init__(self, weights: Tensor) -> None:
        self.keep, self.alias = alias_table(weights)

    def change(self, weights: Tensor) -> None:
        """Other weights of the same shape, in place."""
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

    The usual construction walks once through the rows below and once through those above the mean, topping up each of the
    former from the current one of the latter. Where that walk is at any time follows from two running sums, so
    it is done for all rows at once.
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


# ---- several datasets ------------------------------------------------------------------------------------------------


@dataclass
class MixtureConfig:
    datasets: list[str] = field(default_factory=list)  # further datasets; the first one is the run's own
    shares: list[float] = field(
        default_factory=list
    )  # of every batch, one for each of them; the first one has the rest
    # How each is drawn from, the first one's first: names as in sampler=NAME, or tables with `_target_` and settings. Without,
    # uniformly.
    samplers: list[str | dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
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


class Mixture(Sampler):
    """Fixed shares of every batch from several datasets, each with a sampler of its own.

    The agent trains on one dataset that holds them all, one behind the other: so rows are numbered through, and observation
    statistics are those of all.

    Args:
        stores: the parts in that order.
    """

    Config = MixtureConfig

    def __init__(self, stores: Sequence[OfflineDataset], cfg: MixtureConfig, seeds: Sequence[int] = (0,)) -> None:
        settings = [_named(sampler) for sampler in cfg.samplers or ["uniform"] * len(stores)]
        self.parts = [make_sampler(each, [store], seeds) for each, store in zip(settings, stores)]
        if any(part.refresh_every for part in self.parts):
            raise OffrlError("sampler.samplers: a part of a mixture can't be refreshed; set its refresh_every=0.")
        self.shares = cfg.shares
        lengths = torch.tensor([len(store) for store in stores])
        self.first = [0, *lengths.cumsum(0).tolist()[:-1]]
        self.ids = [store.info.id for store in stores]

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        counts = shared_out(self.shares, batch)
        parts = enumerate(zip(self.parts, counts, self.first))
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
    """Whole rows for the first part, which takes the rest, and for the others."""
    others = [round(share * batch) for share in shares]
    return [batch - sum(others), *others]


def _named(sampler: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings behind a name such as `uniform`: what stands in its file."""
    if not isinstance(sampler, str):
        return sampler
    from omegaconf import OmegaConf

    path = conf_dir() / "sampler" / f"{sampler}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise OffrlError(f"sampler.samplers: {sampler} is no sampler; choose among {known}, or give a table.")
    return {str(key): value for key, value in OmegaConf.to_container(OmegaConf.load(path)).items()}  # type: ignore[union-attr]


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
        stores: the dataset, and those that `further_datasets` names.
    """
    cls, cfg = sampler_config(settings, len(seeds))
    try:
        sampler: Sampler = cls(stores if issubclass(cls, Mixture) else stores[0], cfg, seeds)
    except (TypeError, ValueError) as error:
        raise OffrlError(f"sampler: {error}") from error
    return sampler


def further_datasets(settings: Mapping[str, Any]) -> list[str]:
    """Datasets that a sampler draws from besides the run's own."""
    return list(settings.get("datasets") or [])


def lane_values(value: Any, device: torch.device) -> Any:
    """A list as a tensor `[lanes]`, a number as it is."""
    return torch.tensor(value, dtype=torch.float64, device=device) if isinstance(value, list) else value


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_above_zero(name: str, value: Any) -> None:
    """Raise OffrlError unless a setting, or every lane's value of it, is above zero."""
    for number in as_list(value):
        if not number > 0:
            raise OffrlError(f"sampler.{name}={number:g} should be above 0.")


def warn(reason: str) -> None:
    warnings.warn(f"sampler: {reason}.", stacklevel=3)


# ---- batches ---------------------------------------------------------------------------------------------------------
