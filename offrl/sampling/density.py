"""DW: transitions weighted by a learnt ratio of densities, drawn by a sampler.

Hong, Kumar, Karnik, Bhandwaldar, Srivastava, Pajarinen, Laroche, Gupta & Agrawal, "Beyond Uniform Sampling: Offline
Reinforcement Learning with Imbalanced Datasets", NeurIPS 2023 (arXiv 2310.04413). Two networks g(s, a) and f(s) shape a
distribution over transitions that has a high reward, little divergence from the data, and as much flow into a state as out of
it. It needs no trajectories, and good stretches of poor trajectories count.

Deviations: the authors multiply each agent's losses with weights that sum to 1 within a batch, and train g and f along
with the agent. Here rows are *drawn* by weights that sum to 1 over the dataset, which has the same expected losses up
to the bias of normalising within a batch; so any agent can have it without a line of its own, and agents see no
weights. Only the weight of (s, a) is used: the authors' TD3+BC weighs its Q term with f(s) alone. The flow of a
terminal row leads to the successor that the dataset has: where the file has none, that is the state itself or the next
episode's first one. `refresh_every` trains g and f on while the agent learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offrl.data.dataset import OfflineDataset
from offrl.nets import MLP, Adam, per_lane
from offrl.sampling import RowWeighted, check_above_zero, warn
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

_CHUNK = 65_536  # rows whose logits are computed at once


@dataclass
class DensityWeightedConfig:
    steps: int = 20_000  # updates of g and f before the agent's first one
    refresh_every: int = 0  # updates of the agent between further ones of g and f; 0: the weights never change
    refresh_steps: int = 1000  # updates of g and f each time
    batch_size: int = 256  # rows of an update of g and f
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers of g and f
    lr: float = 1e-4
    temperature: float = 1.0  # T: the ratio is exp((g + f) / T)
    clip: float = 0.2  # c: g and f each count up to +-(1 + c)
    flow_weight: float = 1.0  # lambda_F, weight of the flow constraint; the authors try 0.1, 1 and 5
    entropy_weight: float = (
        0.2  # lambda_K, weight of the divergence from the data; the authors try 0.2 and 1 (with CQL 0)
    )
    discount: float = 1.0  # gamma_F, discount of the flow
    reward: Literal["minmax", "std"] = (
        "minmax"  # rewards scaled to [0, 1], or divided by their std (IQL); constant ones: 0
    )

    def __post_init__(self) -> None:
        for name in ("steps", "refresh_every", "refresh_steps", "batch_size"):
            least = 0 if name == "refresh_every" else 1
            if getattr(self, name) < least:
                raise OffrlError(f"sampler.{name}={getattr(self, name)} should be at least {least}.")
        for name in ("temperature", "lr"):
            if not isinstance(getattr(self, name), Tensor):
                check_above_zero(name, getattr(self, name))


class DensityRatio(nn.Module):
    """The networks g and f of all lanes, and their optimiser."""

    count: Tensor

    def __init__(self, obs_dim: int, action_dim: int, cfg: DensityWeightedConfig, seeds: Sequence[int]) -> None:
        super().__init__()
        self.cfg = cfg
        self.g = MLP(seeds, [obs_dim + action_dim, *cfg.hidden, 1], name="density/g")
        self.f = MLP(seeds, [obs_dim, *cfg.hidden, 1], name="density/f")
        self.optimizer = Adam([*self.g.parameters(), *self.f.parameters()], cfg.lr)
        self.register_buffer(
            "count", torch.zeros((), dtype=torch.int64)
        )  # number of updates made, which numbers the random draws

    def logits(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """g(s, a) and f(s), `[lanes, n]` each."""
        return self.g(torch.cat([obs, action], -1)).squeeze(-1), self.f(obs).squeeze(-1)

    def bounded(self, g: Tensor, f: Tensor) -> Tensor:
        """`[lanes, n]`: the logarithm of the weights, (clip(g) + clip(f)) / T."""
        bound = per_lane(1 + self.cfg.clip)
        return (g.clamp(-bound, bound) + f.clamp(-bound, bound)) / per_lane(self.cfg.temperature)

    def loss(self, obs: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor) -> Tensor:
        """`[lanes]`: minus the weighted reward, plus flow and divergence."""
        cfg = self.cfg
        g, f = self.logits(obs, action)
        next_f = self.f(next_obs).squeeze(-1)
        omega = self.bounded(g, f).softmax(-1)  # sums to 1 over the batch
        temperature = per_lane(cfg.temperature)
        flow = per_lane(cfg.discount) * ((g + f) / temperature).exp() - (next_f / temperature).exp()
        gain = (omega * reward).sum(-1)
        divergence = (omega * omega.clamp(min=1e-12).log()).sum(-1)
        return -gain + cfg.flow_weight * flow.square().mean(-1) + cfg.entropy_weight * divergence


class DensityWeighted(RowWeighted):
    """DW: each lane has its own ratio, from its own seed; a checkpoint holds the networks."""

    Config = DensityWeightedConfig

    def __init__(self, store: OfflineDataset, cfg: Any = None, seeds: Sequence[int] = (0,)) -> None:
        super().__init__(torch.ones(len(seeds), len(store), device=store.device))
        given: DensityWeightedConfig = cfg or self.Config()
        self.refresh_every = given.refresh_every
        self.store, self.random = store, LaneRandom(seeds, store.device)
        mean, std = store.observation_statistics()
        self.mean, self.scale = mean, 1 / (std + 1e-3)
        self.reward_low, self.reward_scale = _reward_range(store, given.reward)
        values = {f.name: getattr(given, f.name) for f in fields(given)}
        lanes: dict[str, Any] = {
            k: torch.tensor(v, device=store.device) for k, v in values.items() if isinstance(v, list)
        }
        self.cfg: Any = replace(given, **lanes)
        self.ratio = DensityRatio(store.obs_dim, store.action_dim, self.cfg, seeds).to(store.device)
        self.about: dict[str, Any] = {}

    def start(self) -> None:
        self._train(self.cfg.steps)

    def refresh(self) -> None:
        self._train(self.cfg.refresh_steps)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.ratio.state_dict())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.ratio.load_state_dict(dict(tensors))
        self._reweigh()

    @classmethod
    def label(cls, cfg: Any) -> str:
        return "DW"

    def metadata(self) -> dict[str, Any]:
        return self.about

    def _train(self, updates: int) -> None:
        done = int(self.ratio.count)
        for first in range(done, done + updates, 64):  # draws come in blocks, whose size changes no number
            steps = torch.arange(first + 1, min(first + 64, done + updates) + 1, device=self.store.device)
            for index in self.random.integers("density", len(self.store), (self.cfg.batch_size,), steps):
                batch = self.store.transitions(index)
                obs, next_obs = self._observed(batch.obs), self._observed(batch.next_obs)
                reward = (batch.reward - self.reward_low) * self.reward_scale
                self.ratio.optimizer.step(self.ratio.loss(obs, self._acted(batch.action), next_obs, reward))
        self.ratio.count += updates
        if not all(bool(p.isfinite().all()) for p in self.ratio.parameters()):
            raise OffrlError("sampler: the density ratio is no longer finite; lower sampler.lr or sampler.flow_weight.")
        self._reweigh()

    @torch.no_grad()
    def _reweigh(self) -> None:
        """Weights of all rows from the networks as they are."""
        logs, clipped, level = [], [], []
        lanes = len(self.random.seeds)
        for rows in torch.arange(len(self.store), device=self.store.device).split(_CHUNK):
            obs = self._observed(self.store.observations[rows]).expand(lanes, -1, -1)
            g, f = self.ratio.logits(obs, self._acted(self.store.actions[rows]).expand(lanes, -1, -1))
            logs.append(self.ratio.bounded(g, f).double())
            bound = per_lane(1 + self.cfg.clip)
            clipped.append(((g.abs() > bound) | (f.abs() > bound)).double().sum(-1))
            level.append(f.double().sum(-1))
        log = torch.cat(logs, -1)
        weights = (log - log.amax(-1, keepdim=True)).exp()
        self.change(weights)
        rows_in_effect = weights.sum(-1).square() / weights.square().sum(-1)
        share = torch.stack(clipped).sum(0) / len(self.store)
        self.about = {
            "effective_rows": rows_in_effect.tolist(),
            "effective_share": (rows_in_effect / len(self.store)).tolist(),
            "density_updates": int(self.ratio.count),
            "density_clipped": share.tolist(),  # rows on which only the flow still has a gradient
            "density_f": (
                torch.stack(level).sum(0) / len(self.store)
            ).tolist(),  # far below 0 the flow counts for nothing
        }
        if float(share.max()) > 0.5:
            warn(
                f"the clip of the density ratio binds on {float(share.max()):.0%} of the transitions; see sampler.clip"
            )

    def _observed(self, obs: Tensor) -> Tensor:
        return (obs - self.mean) * self.scale

    def _acted(self, action: Tensor) -> Tensor:
        if self.store.info.discrete is None:
            return action
        return nn.functional.one_hot(action, self.store.action_dim).to(self.store.observations.dtype)


def _reward_range(store: OfflineDataset, kind: str) -> tuple[float, float]:
    """Offset to subtract from rewards, and factor for the difference: 0 where they are constant and prefer no row."""
    rewards = store.rewards.double()
    if store.constant_rewards:
        return 0.0, 0.0
    if kind == "std":
        return 0.0, 1 / max(float(rewards.std(correction=0)), 1e-8)
    return float(rewards.min()), 1 / float(rewards.max() - rewards.min())
