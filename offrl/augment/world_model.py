"""An ensemble of one-step models, rolled out by the policy: the baseline of policy-guided diffusion.

Chua, Calandra, McAllister & Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models"
(PETS), NeurIPS 2018, used as in MOPO (Yu et al., NeurIPS 2020): with `penalty` c, a synthetic row's reward is r - c u(s, a), u
the ensemble's uncertainty. The authors of policy-guided diffusion did not publish their model; the settings are those of
EmptyJackson/unifloral: seven Gaussian members, the best five by validation error, a random one of these at every step.
`dynamics` offers the elites to the agent's updates (MOBILE).

Deviations: inputs and targets are standardised (the uncertainty is in raw units of states and reward all the same, so that
published penalties carry over), and states are clipped to the range of the dataset's states (off the data the model would
diverge within a long rollout), unless `clip_states` is false; whether a state is terminal is asked before it is clipped. The
penalty on the width of the variance's bounds ends where the bounds meet: nothing but the penalty moves the upper one below the
lower one, and u would then be the same everywhere. AdamW's eps is 1e-8 (unifloral: 1e-5). A terminal row whose successor the
file does not have is left out (`known_successors`), with its reward. Where rollouts terminate: `termination.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from offrl.agents.base import Agent
from offrl.augment.base import Augmentation, SyntheticConfig
from offrl.augment.fitting import Drawn, FitLoop, fit_or_load, model_path
from offrl.augment.termination import disagreement, termination, warn_of_disagreement
from offrl.augment.trajectories import Rows, synthetic_store
from offrl.data.dataset import OfflineDataset
from offrl.nets import MLP, Adam, kernels, per_lane
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

_VERSION = 3  # raise it when the same settings give other weights
_CHUNK = 65_536  # rows that go through the ensemble at once
_SAMPLE = 2_000  # rows of the dataset whose uncertainty the manifest summarises

Uncertainty = Literal["aleatoric", "aleatoric_elites", "pairwise", "ensemble_std"]


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
        self.most = nn.Parameter(torch.full((1, 1, 1, outputs), 0.5))  # bounds of the log-variance, of all members
        self.least = nn.Parameter(torch.full((1, 1, 1, outputs), -10.0))
        for name, width in (("in", inputs), ("out", outputs)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.register_buffer("low", torch.zeros(obs_dim))
        self.register_buffer("high", torch.zeros(obs_dim))
        self.register_buffer("elites", torch.zeros(cfg.elites, dtype=torch.int64))

    def fit_scales(self, store: OfflineDataset) -> None:
        """Set the standardisation and the range of states by a dataset's rows with known successors."""
        known = store.known_successors
        for name, rows in (("in", torch.cat([store.observations, store.actions], -1)), ("out", targets(store))):
            rows = rows if known is None else rows[known]
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

    def draw(
        self, obs: Tensor, action: Tensor, member: Tensor, noise: Tensor, clip: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Next states `[n, O]` and rewards `[n]`.

        Args:
            member: `[n]` int64, the elite that predicts; noise: `[n, O + 1]` standard normals.
            clip: whether states are clipped to the range of the dataset's.
        """
        return self.draw_from(self(obs, action), obs, member, noise, clip)

    def draw_from(
        self, predicted: tuple[Tensor, Tensor], obs: Tensor, member: Tensor, noise: Tensor, clip: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The same with what `forward` predicted."""
        mean, log_variance = predicted
        chosen = self.elites[member].view(1, -1, 1).expand(1, -1, mean.shape[-1])
        change = mean.gather(0, chosen)[0] + (0.5 * log_variance.gather(0, chosen)[0]).exp() * noise
        change = change * self.out_std + self.out_mean
        following = obs + change[:, :-1]
        return self.clip(following) if clip else following, change[:, -1]

    def clip(self, obs: Tensor) -> Tensor:
        """States `[..., O]` clipped to the range of the dataset's."""
        return obs.minimum(self.high).maximum(self.low)

    def uncertainty(self, predicted: tuple[Tensor, Tensor], kind: Uncertainty) -> Tensor:
        """u(s, a) `[n]` in raw units of states and reward, from what `forward` predicted.

        `aleatoric` (MOPO): largest length of a member's std, over states and reward; `aleatoric_elites`: of the elites' alone.
        `pairwise`: largest distance of a member's mean state from the mean of all. `ensemble_std`: root of the variance over
        members of the mean state, averaged over dimensions. All but the second look at all members.
        """
        mean, log_variance = predicted
        if kind in ("aleatoric", "aleatoric_elites"):
            if kind == "aleatoric_elites":
                log_variance = log_variance[self.elites]
            return torch.linalg.vector_norm((0.5 * log_variance).exp() * self.out_std, dim=-1).amax(0)
        state = mean[..., :-1] * self.out_std[:-1]
        if kind == "pairwise":
            return torch.linalg.vector_norm(state - state.mean(0), dim=-1).amax(0)
        return state.var(0, correction=0).mean(-1).sqrt()

    @torch.no_grad()
    def aleatoric_range(self) -> tuple[float, float]:
        """What the bounds leave of `uncertainty`'s lengths of a std: the smallest and the largest that there can be."""
        highest = self.least + nn.functional.softplus(self.most - self.least)
        low, high = (torch.linalg.vector_norm((0.5 * x[0, 0, 0]).exp() * self.out_std) for x in (self.least, highest))
        return float(low), float(high)


class EliteDynamics:
    """The elites of an ensemble as what an agent's updates may ask: `offrl.agents.base.Dynamics`."""

    def __init__(self, model: Ensemble, clip_states: bool) -> None:
        self.model, self.clip_states = model, clip_states

    def next_gaussians(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std `[elites, ..., O]` of the next state, for raw `[..., O]` and `[..., A]`."""
        model, shape = self.model, obs.shape[:-1]
        mean, log_variance = model(obs.flatten(0, -2), action.flatten(0, -2))
        change = mean[model.elites] * model.out_std + model.out_mean
        std = (0.5 * log_variance[model.elites]).exp() * model.out_std
        return obs + change[..., :-1].unflatten(1, shape), std[..., :-1].unflatten(1, shape)

    def clip(self, obs: Tensor) -> Tensor:
        """States as the rollouts have them: in the range of the dataset's, if the augmentation clips."""
        return self.model.clip(obs) if self.clip_states else obs


def targets(store: OfflineDataset) -> Tensor:
    """`[N, O + 1]`: change of the state, and reward."""
    return torch.cat([store.next_observations - store.observations, store.rewards.unsqueeze(-1)], -1)


class EnsembleFit(FitLoop):
    """Fitting an ensemble by maximum likelihood."""

    def __init__(self, store: OfflineDataset, cfg: EnsembleConfig) -> None:
        self.store, self.cfg, self.updates = store, cfg, cfg.updates
        known = store.known_successors
        rows = len(store) if known is None else len(known)
        if known is not None and rows < 2:
            raise OffrlError(
                f"{store.info.id}: its episodes terminate at once, and no next_observations tell where they go, so that a "
                "world model has nothing to learn; give next_observations, or set augment=none."
            )
        self.model = Ensemble(store.obs_dim, store.actions.shape[-1], cfg).to(store.device)
        self.model.fit_scales(store)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(cfg.seed)).to(store.device)
        order = order if known is None else known[order]
        held = min(max(1, round(cfg.holdout * rows)), rows - 1)
        self.held, self.learned = order[:held], order[held:]
        self.optimizer = Adam(self.model.parameters(), cfg.lr, weight_decay=cfg.weight_decay).to(store.device)
        self.random = LaneRandom((cfg.seed,), store.device)

    def draw(self) -> Drawn:
        """A batch of rows."""
        self.random.go_to(self.step)
        at = self.random.integers("rows", len(self.learned), (self.cfg.batch_size,), self.random.step[None])[0, 0]
        return Drawn(rows=self.learned[at])

    def learn(self, drawn: Drawn) -> Tensor:
        loss = self.loss(drawn.rows)
        self.optimizer.step(loss)
        return loss.detach()

    def loss(self, rows: Tensor) -> Tensor:
        """Negative log-likelihood without constants, summed over members, plus the penalty on the width of the bounds."""
        mean, log_variance = self.model(self.store.observations[rows], self.store.actions[rows])
        error = (mean - self._wanted(rows)).square()
        likelihood = (error * (-log_variance).exp() + log_variance).mean((-2, -1)).sum()
        return likelihood + self.cfg.bound_weight * (self.model.most - self.model.least).relu().sum()

    def _wanted(self, rows: Tensor) -> Tensor:
        store = self.store
        change = store.next_observations[rows] - store.observations[rows]
        raw = torch.cat([change, store.rewards[rows].unsqueeze(-1)], -1)
        return (raw - self.model.out_mean) / self.model.out_std

    def state_dict(self) -> dict[str, Tensor]:
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


# ---- the augmentation ----------------------------------------------------------------------------------------------------


@dataclass
class WorldModelConfig(SyntheticConfig):
    length: int = 5  # transitions of a rollout from a state of the dataset
    penalty: float = 0.0  # c; a synthetic row's reward is r - c u(s, a), in raw units
    uncertainty: Uncertainty = "aleatoric"  # u: aleatoric, aleatoric_elites, pairwise or ensemble_std
    clip_states: bool = True  # clip states to the range of the dataset's
    model: EnsembleConfig = field(default_factory=EnsembleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if torch.as_tensor(self.penalty).min() < 0:
            raise OffrlError(f"augment.penalty={self.penalty} should be at least 0; it is subtracted from rewards.")


class WorldModel(Augmentation):
    """Rollouts of the policy from states of the dataset; without a policy, of the recorded actions."""

    Config: ClassVar[type] = WorldModelConfig
    per_lane = ("penalty",)
    name = "WM"
    has_dynamics = True

    def prepare(self, progress: bool = False) -> None:
        left_out = () if self.store.known_successors is None else ("known successors",)
        self.path = model_path("world_model", _VERSION, self.store, self.cfg.model, *left_out)
        title = f"world model of {self.store.info.id}"
        tensors, self.about = fit_or_load(self.path, lambda: EnsembleFit(self.store, self.cfg.model), progress, title)
        self.model = Ensemble(self.store.obs_dim, self.store.actions.shape[-1], self.cfg.model)
        self.model.load_state_dict(tensors)
        self.model.to(self.store.device).requires_grad_(False)
        self.terminates = termination(self.store.info)
        warn_of_disagreement(self.store)
        self.dynamics = EliteDynamics(self.model, self.cfg.clip_states)

    @torch.no_grad()
    @kernels.in_use()
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
            flat = tuple(part.flatten(0, 1) for part in (obs, action, member, noise))
            chunks = zip(*(part.split(_CHUNK) for part in flat))
            following, reward, unsure = map(torch.cat, zip(*(self.step(*chunk) for chunk in chunks)))
            reward = reward - (per_lane(cfg.penalty) * unsure.unflatten(0, (lanes, -1))).flatten()
            done = self.terminates(following)  # before states are clipped: data may hold none that terminates
            following = self.model.clip(following) if cfg.clip_states else following
            kept_rows.append((*flat[:2], reward, done))
            obs = following.unflatten(0, (lanes, cfg.trajectories))
        end = obs.flatten(0, 1)
        kept_rows.append((end, torch.zeros_like(kept_rows[0][1]), torch.zeros_like(reward), torch.zeros_like(done)))
        return synthetic_store(Rows(*(torch.stack(parts, 1) for parts in zip(*kept_rows))), store, self.name)

    def step(self, obs: Tensor, action: Tensor, member: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next states `[n, O]` before they are clipped, rewards `[n]` before the penalty, and uncertainties `[n]`.

        Arguments as in `Ensemble.draw`.
        """
        predicted = self.model(obs, action)
        following, reward = self.model.draw_from(predicted, obs, member, noise, clip=False)
        return following, reward, self.model.uncertainty(predicted, self.cfg.uncertainty)

    def act(self, policy: Agent, obs: Tensor, random: LaneRandom, t: int) -> Tensor:
        """`[lanes, n, A]`: actions inside the box, sampled where the policy is not deterministic."""
        noise = random.normal(f"action/{t}", obs.new_empty(*obs.shape[:-1], policy.sample_width))
        return policy.within_bounds(policy.sample_action(policy.normalize(obs), noise))

    @torch.no_grad()
    def uncertainty_of_data(self) -> dict[str, float]:
        """Mean and upper quantiles of u over rows of the dataset, evenly spaced: the scale that `penalty` multiplies.

        Of an aleatoric u also what it can be anywhere: a penalty tells the model's ignorance only as far as that leaves room.
        """
        rows = torch.linspace(0, len(self.store) - 1, min(_SAMPLE, len(self.store)), device=self.store.device).long()
        u = self.model.uncertainty(
            self.model(self.store.observations[rows], self.store.actions[rows]), self.cfg.uncertainty
        )
        quantiles = {f"q{percent}": float(u.quantile(percent / 100)) for percent in (50, 95, 100)}
        summary = {"mean": float(u.mean()), **quantiles}
        if self.cfg.uncertainty.startswith("aleatoric"):
            summary["least"], summary["most"] = self.model.aleatoric_range()
        return summary

    def metadata(self) -> dict[str, Any]:
        """The model, the uncertainty of the dataset's rows, and the share of them whose flag `termination` gets wrong."""
        return {
            "model": {"file": self.path.name, **self.about},
            "uncertainty": self.uncertainty_of_data(),
            "termination_disagreement": disagreement(self.store),
        }
