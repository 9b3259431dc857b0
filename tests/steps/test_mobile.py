"""MOBILE's update against a plain restatement of OfflineRL-Kit's, its ensemble's included, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed import Rows, ensemble, minimise, mixed_loader, q_of, stores
from plain import BOXES, Bounds, sequential, spec_of
from test_mopo import Plain as PlainMOPO
from test_mopo import compare
from torch import Tensor, nn

from offrl.agents.mobile import MOBILE, MOBILEConfig
from offrl.augment.base import check_agent
from offrl.augment.diffusion import Diffusion
from offrl.augment.world_model import EliteDynamics, WorldModel
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class PlainModel:
    """The elites as ordinary networks: a normal law of (s' - s, r) for raw s and a, of which s' is taken."""

    def __init__(self, dynamics: EliteDynamics) -> None:
        self.model = dynamics.model
        self.networks = [sequential(self.model.mlp, 0, int(elite)) for elite in self.model.elites]

    def law(self, k: int, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x = (torch.cat([s, a], 1) - model.in_mean) / model.in_std
        mean, log_variance = self.networks[k](x).chunk(2, 1)
        most, least = model.most[0, 0], model.least[0, 0]
        log_variance = most - torch.log1p((most - log_variance).exp())
        log_variance = least + torch.log1p((log_variance - least).exp())
        std = log_variance.exp().sqrt() * model.out_std
        return s + (mean * model.out_std + model.out_mean)[:, :-1], std[:, :-1]


class Plain(PlainMOPO):
    def __init__(self, agent: MOBILE, random: LaneRandom) -> None:
        super().__init__(agent, random)
        self.agent, self.model = agent, PlainModel(agent.dynamics)  # type: ignore[arg-type]
        every = [p for critic in self.critics for p in critic.parameters()]
        self.critic_adam = torch.optim.Adam(every, lr=self.cfg.critic_lr)

    def penalty(self, rows: Rows) -> Tensor:
        """Model by model and draw by draw; rows of the dataset have none."""
        n, draws, models = len(rows.s), self.cfg.draws, 3
        noise = self.random.normal("model", torch.zeros(1, draws, models, n, 3).double())[0]
        of_action = self.random.normal("model_action", torch.zeros(1, draws * models * n, 2).double())[0]
        of_action = of_action.view(draws, models, n, 2)
        values = torch.zeros(models, n).double()
        for k in range(models):
            mean, std = self.model.law(k, rows.s, rows.a)
            for j in range(draws):
                s2 = mean + std * noise[j, k]
                if self.agent.dynamics.clip_states:
                    s2 = torch.clip(s2, self.model.model.low, self.model.model.high)
                s2 = self.scaled(s2)
                a2, _ = self.actor.from_noise(s2, of_action[j, k])
                values[k] += q_of(self.targets, s2, a2).min(0).values / draws
        deviation = ((values - values.mean(0)) ** 2).sum(0) / (models - 1)
        return deviation.sqrt() * ~rows.real

    def scaled(self, s: Tensor) -> Tensor:
        if not self.cfg.normalize_obs:
            return s
        store = stores()[0]
        return (s - store.observations.mean(0)) / (store.observations.std(0, correction=0) + 1e-3)

    def target(self, rows: Rows, s2: Tensor) -> Tensor:
        a2, log_pi2 = self.actor.sample(s2, "target")
        next_q = q_of(self.targets, s2, a2).min(0).values
        if self.cfg.backup_entropy:
            next_q = next_q - self.alpha * log_pi2
        y = (rows.r - self.cfg.penalty * self.penalty(rows)) + self.cfg.discount * rows.not_done * next_q
        return y if self.cfg.target_min is None else torch.clamp(y, self.cfg.target_min, None)

    def step(self, rows: Rows, s: Tensor, s2: Tensor) -> None:
        """One optimiser for all critics, and the mean over them; the rest is MOPO's."""
        with torch.no_grad():
            y = self.target(rows, s2)
        minimise(self.critic_adam, ((q_of(self.critics, s, rows.a) - y) ** 2).mean())
        action, log_pi = self.actor.sample(s, "policy")
        minimise(self.actor_adam, -q_of(self.critics, s, action).min(0).values.mean() + self.alpha * log_pi.mean())
        if self.cfg.alpha is None:
            minimise(self.alpha_adam, -(self.log_alpha * (log_pi.detach() - 2)).mean())
            self.alpha = torch.clamp(self.log_alpha.detach().exp(), 0.0, 1.0)
        for online, slow in zip(self.critics, self.targets):
            for p, p2 in zip(online.parameters(), slow.parameters()):
                p2.data.copy_(p2.data * (1 - self.cfg.tau) + p.data * self.cfg.tau)


def make(box: Bounds = (-1, 1), clip: bool = False, **settings: Any) -> MOBILE:
    store = stores(box)[0]
    config = MOBILEConfig(hidden=(16, 12), critic_lr=1e-3, actor_lr=1e-3, alpha_lr=1e-2, **{"draws": 2, **settings})
    agent = MOBILE(spec_of(store, (11,)), config).double()
    agent.dynamics = ensemble(store, clip)
    return agent


@pytest.mark.parametrize(
    ("settings", "updates", "box"),
    [
        ({"target_min": None}, 1, (-1, 1)),
        ({"target_min": None, "penalty": 3.0, "draws": 3, "normalize_obs": True}, 3, (-1, 1)),
        ({"target_min": -1.0, "alpha": 0.2, "members": 3}, 3, (-1, 1)),
        ({"target_min": None, "backup_entropy": True}, 3, (-1, 1)),
        ({"target_min": None, "clip": True}, 3, (-1, 1)),
        *(({"target_min": None}, 2, box) for box in BOXES),
    ],
)
def test_updates_equal_the_kits(settings: dict[str, Any], updates: int, box: Bounds) -> None:
    """Same weights, batches and noise, of the ensemble's draws too."""
    before, after = compare(make(box, **settings), Plain, updates, box)
    assert after < 1e-10 < before


def a_batch(agent: MOBILE) -> Any:
    loader = mixed_loader(*stores())
    agent.random.step.fill_(1)
    return agent.prepare(loader.draw(agent.random, torch.tensor([1]))[0])


def test_rows_of_the_dataset_have_no_penalty() -> None:
    agent = make()
    batch = a_batch(agent)
    penalty, real = agent.inconsistency(batch), batch.index >= 0
    assert (penalty[real] == 0).all()
    assert (penalty[~real] > 0).all()
    assert 0 < real.sum() < real.numel()


def test_models_that_agree_have_no_penalty_in_the_limit_of_many_draws() -> None:
    """Of identical models the means over draws differ by chance alone: the penalty falls with the root of the draws."""
    means = []
    for draws in (4, 400):
        agent = make(draws=draws)
        model = agent.dynamics.model  # type: ignore[union-attr]
        model.elites.fill_(1)
        means.append(float(agent.inconsistency(a_batch(agent)).sum()))
    assert 0 < means[1] < 0.2 * means[0]  # a tenth, within chance


def test_targets_are_clamped() -> None:
    """At 0 by default: rewards of the toy are negative, so without the clamp all targets are."""
    agent, free = make(), make(target_min=None)
    alpha = torch.ones(1).double()
    clamped, target = agent.target_value(a_batch(agent), alpha), free.target_value(a_batch(free), alpha)
    assert target.min() < -0.1
    assert torch.equal(clamped, target.clamp(min=0))


def test_states_of_the_models_are_clipped_where_rollouts_are() -> None:
    """Where it makes a difference: the restatement above would not notice otherwise."""
    agents = make(), make(clip=True)
    free, clipped = (agent.inconsistency(a_batch(agent)) for agent in agents)
    assert (free - clipped).abs().max() > 1e-3


def test_an_augmentation_without_a_model_is_refused() -> None:
    agent = make()
    check_agent(agent, WorldModel)
    with pytest.raises(
        OffrlError, match=r"MOBILE asks a model .* which Diffusion doesn't have; set augment=world_model"
    ):
        check_agent(agent, Diffusion)


def test_the_model_is_no_part_of_the_agent() -> None:
    """Neither its checkpoint nor its copies hold it."""
    agent = make()
    assert not any("model" in key or "dynamics" in key for key in agent.state_dict())
    assert isinstance(agent, nn.Module)
    assert agent.__getstate__()["dynamics"] is None


def test_two_models_are_enough_to_disagree() -> None:
    agent = make()
    model = agent.dynamics.model  # type: ignore[union-attr]
    agent.dynamics.model.elites = model.elites[:2]  # type: ignore[union-attr]
    assert agent.inconsistency(a_batch(agent)).max() > 0
    agent.dynamics.model.elites = model.elites[:1]  # type: ignore[union-attr]
    assert agent.inconsistency(a_batch(agent)).max() == 0
