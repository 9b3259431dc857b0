"""Samplers of one dataset: uniform, and with weights of whole trajectories.

Returns are those of the data as they were loaded, before `data.reward_*` transforms them: shifted rewards would make long
trajectories look better, or worse, than they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.sampling import weights
from offrl.sampling.base import NoSettings, Sampler, as_list, check_above_zero, lane_values, warn
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


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

    A draw has two stages: an episode with probability proportional to weight x length, then one of its rows uniformly. The
    table has one float64 entry per episode, so neither 2^24 categories nor float32 sums limit it.

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
    per_step: bool = False  # rank by reward per step, not by return (an ablation: cut trajectories then count in full)

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
        episode_weights, reason = weights.boltzmann(self.scores(store), lane_values(self.cfg.temperature, store.device))
        if reason:
            warn(reason)
        self.about["fallback"] = "; ".join(filter(None, (self.about.get("fallback"), reason))) or None
        super().__init__(store, episode_weights)

    def scores(self, store: OfflineDataset) -> Tensor:
        """`[E]`: score of each trajectory, here its return."""
        return self.returns

    @classmethod
    def label(cls, cfg: Any) -> str:
        return "RW"

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | self.about


@dataclass
class AdvantageWeightedConfig(ReturnWeightedConfig):
    baseline: weights.BaselineName = "ols"  # estimate of V(s_0): ols (the authors'), ridge, kfold, network or mean


class AdvantageWeighted(ReturnWeighted):
    """AW: RW by the advantage G - V(s_0), so that a lucky start doesn't count as good behaviour."""

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
    percent: float = 10.0  # share of the trajectories (not of the transitions), at least one; earlier ones win ties

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
        lanes = [weights.top(returns, value) for value in as_list(percent)]
        super().__init__(store, torch.stack(lanes) if isinstance(percent, list) else lanes[0])

    @classmethod
    def label(cls, cfg: Any) -> str:
        return "Top-%" if isinstance(cfg.percent, list) else f"Top-{cfg.percent:g}%"
