"""An ensemble of one-step models, rolled out by the policy: the baseline of policy-guided diffusion.

Chua, Calandra, McAllister & Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models"
(PETS), NeurIPS 2018, used as in MOPO (Yu et al., NeurIPS 2020), without its penalty. The authors of policy-guided diffusion
did not publish theirs; the settings are those of EmptyJackson/unifloral: seven Gaussian members, the best five by
validation error, a random one of these at every step.

Deviations: inputs and targets are standardised, and states are clipped to the range of the dataset's states (off the
data the model would diverge within a long rollout). Each member has bounds of the variance of its own, where
unifloral's share theirs, so the penalty on the bounds' width counts once per member; AdamW's eps is 1e-8 (unifloral:
1e-5). A terminal row is learnt with the successor that the dataset has: where the file has none, that is the state
itself or the next episode's first one. Hopper, Walker2d and Ant terminate by Gymnasium's rules; other tasks never
terminate.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offrl.agents.base import Agent
from offrl.augment.base import Augmentation, SyntheticConfig
from offrl.augment.fitting import FitLoop, fit_or_load, model_path
from offrl.augment.trajectories import Rows, synthetic_store
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.nets import MLP, Adam
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

_VERSION = 1  # raise it when the same settings give other weights


@dataclass
class EnsembleConfig:
    members: int = 7
    elites: int = 5  # number of members in use: the best on held-out transitions
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    updates: int = 20_000  # (unifloral: 400 passes over the dataset)
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 2.5e-5
    bound_weight: float = 0.01  # weight of the width between the learnt bounds of the variance
    holdout: float = 0.2  # share of held-out transitions
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.elites <= self.members:
            raise OffrlError(f"augment.model.elites={self.elites} should be from 1 to members={self.members}.")
        if self.updates < 1 or self.batch_size < 1 or self.lr <= 0 or not 0 < self.holdout < 1:
            raise OffrlError(
                "augment.model: updates and batch_size should be at least 1, lr above 0, holdout in (0, 1)."
            )


class Ensemble(nn.Module):
    """p(s' - s, r | s, a): for each member a normal distribution, in standardised units.

    Attributes:
        low, high: `[O]`, range of the dataset's states.
        elites: `[E]` int64, indices of the members in use.
    """

    low: Tensor
    high: Tensor
    elites: Tensor
    in_mean: Tensor
    in_std: Tensor
    out_mean: Tensor
    out_std: Tensor

    def __init__(self, obs_dim: int, action_dim: int, cfg: EnsembleConfig) -> None:
        super().__init__()
        inputs, outputs = obs_dim + action_dim, obs_dim + 1
        self.mlp = MLP((cfg.seed,), [inputs, *cfg.hidden, 2 * outputs], cfg.members, name="world_model")
        self.most = nn.Parameter(torch.full((1, cfg.members, 1, outputs), 0.5))  # bounds of the log-variance
        self.least = nn.Parameter(torch.full((1, cfg.members, 1, outputs), -10.0))
        for name, width in (("in", inputs), ("out", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.register_buffer("low", torch.zeros(obs_dim))
        self.register_buffer("high", torch.zeros(obs_dim))
        self.register_buffer("elites", torch.zeros(cfg.elites, dtype=torch.int64))

    def fit_scales(self, store: OfflineDataset) -> None:
        """Set the standardisation and the range of states by a dataset."""
        for name, rows in (("in", torch.cat([store.observations, store.actions], -1)), ("out", targets(store))):
            mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))
        self.low.copy_(store.next_observations.amin(0).minimum(store.observations.amin(0)))
        self.high.copy_(store.next_observations.amax(0).maximum(store.observations.amax(0)))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `[members, n, O + 1]` for `[n, O]` and `[n, A]`, standardised."""
        x = (torch.cat([obs, action], -1) - self.in_mean) / self.in_std
        mean, log_variance = self.mlp(x.unsqueeze(0)).chunk(2, -1)
        log_variance = self.most - nn.functional.softplus(self.most - log_variance)
        log_variance = self.least + nn.functional.softplus(log_variance - self.least)
        return mean[0], log_variance[0]

    def draw(self, obs: Tensor, action: Tensor, member: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Next states `[n, O]` and rewards `[n]`.

        Args:
            member: `[n]` int64, the elite that predicts; noise: `[n, O + 1]` standard normals.
        """
        mean, log_variance = self(obs, action)
        chosen = self.elites[member].view(1, -1, 1).expand(1, -1, mean.shape[-1])
        change = mean.gather(0, chosen)[0] + (0.5 * log_variance.gather(0, chosen)[0]).exp() * noise
        change = change * self.out_std + self.out_mean
        following = (obs + change[:, :-1]).minimum(self.high).maximum(self.low)
        return following, change[:, -1]


def targets(store: OfflineDataset) -> Tensor:
    """`[N, O + 1]`: change of the state, and reward."""
    return torch.cat([store.next_observations - store.observations, store.rewards.unsqueeze(-1)], -1)


class EnsembleFit(FitLoop):
    """Fitting an ensemble by maximum likelihood."""

    def __init__(self, store: OfflineDataset, cfg: EnsembleConfig) -> None:
        self.store, self.cfg, self.updates = store, cfg, cfg.updates
        self.model = Ensemble(store.obs_dim, store.actions.shape[-1], cfg).to(store.device)
        self.model.fit_scales(store)
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(cfg.seed)).to(store.device)
        held = min(max(1, round(cfg.holdout * len(store))), len(store) - 1)
        self.held, self.learn = order[:held], order[held:]
        self.optimizer = Adam(self.model.parameters(), cfg.lr, weight_decay=cfg.weight_decay).to(store.device)
        self.random = LaneRandom((cfg.seed,), store.device)

    def update(self) -> Tensor:
        self.random.step.fill_(self.step)
        rows = self.learn[self.random.integers("rows", len(self.learn), (self.cfg.batch_size,))[0]]
        loss = self.loss(rows)
        self.optimizer.step(loss)
        return loss.detach()

    def loss(self, rows: Tensor) -> Tensor:
        """Negative log-likelihood without constants, summed over members, plus the penalty on the width of the bounds."""
        mean, log_variance = self.model(self.store.observations[rows], self.store.actions[rows])
        error = (mean - self._wanted(rows)).square()
        likelihood = (error * (-log_variance).exp() + log_variance).mean((-2, -1)).sum()
        return likelihood + self.cfg.bound_weight * (self.model.most.sum() - self.model.least.sum())

    def _wanted(self, rows: Tensor) -> Tensor:
        store = self.store
        change = store.next_observations[rows] - store.observations[rows]
        raw = torch.cat([change, store.rewards[rows].unsqueeze(-1)], -1)
        return (raw - self.model.out_mean) / self.model.out_std

    def state(self) -> dict[str, Tensor]:
        modules = {"model": self.model, "optimizer": self.optimizer}
        return {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}

    @torch.no_grad()
    def validation_errors(self) -> Tensor:
        """`[members]`: mean squared error on the held-out transitions, in standardised units."""
        total = torch.zeros(self.cfg.members, dtype=torch.float64, device=self.held.device)
        for rows in self.held.split(8192):
            mean, _ = self.model(self.store.observations[rows], self.store.actions[rows])
            total += (mean - self._wanted(rows)).square().mean(-1).sum(-1).double()
        return total / len(self.held)

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        errors = self.validation_errors()
        self.model.elites.copy_(errors.argsort()[: self.cfg.elites])
        metadata = {
            "dataset": self.store.info.id,
            "fingerprint": self.store.fingerprint,
            "settings": asdict(self.cfg),
            "validation_errors": errors.tolist(),
        }
        return self.model.state_dict(), metadata


# ---- termination -------------------------------------------------------------------------------------------------------


def _hopper(obs: Tensor) -> Tensor:
    return (obs[:, 0] <= 0.7) | (obs[:, 1].abs() >= 0.2) | (obs[:, 1:].abs() >= 100).any(-1)


def _walker2d(obs: Tensor) -> Tensor:
    return (obs[:, 0] <= 0.8) | (obs[:, 0] >= 2.0) | (obs[:, 1].abs() >= 1.0)


def _ant(obs: Tensor) -> Tensor:
    return (obs[:, 0] < 0.2) | (obs[:, 0] > 1.0)


def _never(obs: Tensor) -> Tensor:
    return torch.zeros(len(obs), dtype=torch.bool, device=obs.device)


def termination(info: DatasetInfo) -> Callable[[Tensor], Tensor]:
    """The function that says whether states `[n, O]` are terminal in a dataset's environment, as in Gymnasium."""
    name = re.match(r"(Hopper|Walker2d|Ant)-", info.env_id or "")
    return {"Hopper": _hopper, "Walker2d": _walker2d, "Ant": _ant}[name[1]] if name else _never


# ---- the augmentation ----------------------------------------------------------------------------------------------------


@dataclass
class WorldModelConfig(SyntheticConfig):
    length: int = 5  # transitions of a rollout from a state of the dataset
    model: EnsembleConfig = field(default_factory=EnsembleConfig)


class WorldModel(Augmentation):
    """Rollouts of the policy from states of the dataset; without a policy, of the recorded actions."""

    Config: ClassVar[type] = WorldModelConfig
    name = "WM"

    def prepare(self, progress: bool = False) -> None:
        self.path = model_path("world_model", _VERSION, self.store, self.cfg.model)
        title = f"world model of {self.store.info.id}"
        tensors, self.about = fit_or_load(self.path, lambda: EnsembleFit(self.store, self.cfg.model), progress, title)
        self.model = Ensemble(self.store.obs_dim, self.store.actions.shape[-1], self.cfg.model)
        self.model.load_state_dict(tensors)
        self.model.to(self.store.device).requires_grad_(False)
        self.terminates = termination(self.store.info)

    @torch.no_grad()
    def generate(self, policy: Agent | None, step: int) -> OfflineDataset:
        store, cfg, random = self.store, self.cfg, self.random(step)
        lanes = len(self.seeds)
        start = random.integers("start", len(store), (cfg.trajectories,))  # [lanes, n]
        last = store.offsets[1:][store.episode_of_row[start]] - 1
        obs = store.observations[start]
        kept_rows: list[tuple[Tensor, ...]] = []
        for t in range(cfg.length):
            if policy is None:
                action = store.actions[torch.minimum(start + t, last)]
            else:
                action = self.act(policy, obs, random, t)
            member = random.integers(f"member/{t}", len(self.model.elites), (cfg.trajectories,))
            noise = random.normal(f"noise/{t}", obs.new_empty(lanes, cfg.trajectories, store.obs_dim + 1))
            flat = (part.flatten(0, 1) for part in (obs, action, member, noise))
            following, reward = self.model.draw(*flat)
            done = self.terminates(following)
            kept_rows.append((obs.flatten(0, 1), action.flatten(0, 1), reward, done))
            obs = following.unflatten(0, (lanes, cfg.trajectories))
        end = obs.flatten(0, 1)
        kept_rows.append((end, torch.zeros_like(kept_rows[0][1]), torch.zeros_like(reward), torch.zeros_like(done)))
        return synthetic_store(Rows(*(torch.stack(parts, 1) for parts in zip(*kept_rows))), store, self.name)

    def act(self, policy: Agent, obs: Tensor, random: LaneRandom, t: int) -> Tensor:
        """`[lanes, n, A]`: actions inside the box; sampled where the policy is Gaussian."""
        normalized = policy.normalize(obs)
        gaussian = policy.policy_gaussian(normalized)
        if gaussian is None:
            action = policy.act(normalized)
        else:
            action = gaussian[0] + gaussian[1] * random.normal(f"action/{t}", gaussian[0])
        return policy.within_bounds(action)

    def metadata(self) -> dict[str, Any]:
        return {"model": {"file": self.path.name, **self.about}}
