"""MOPO's update against a plain restatement of OfflineRL-Kit's SAC on mixed batches, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mixed import PlainActor, Rows, distance, minimise, mixed_loader, mixed_rows, q_of, stores
from plain import BOXES, Bounds, Box, sequential, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.mopo import MOPO, MOPOConfig
from offrl.training.engine import Eager
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class Plain:
    """One seed in the kit's order: critics one by one, actor, temperature, targets; alpha is that of before the update."""

    def __init__(self, agent: Any, random: LaneRandom) -> None:
        self.cfg, self.random = agent.cfg, random
        self.actor = PlainActor(agent, random, Box(agent.spec))
        self.critics = [sequential(agent.critics.mlp, 0, i) for i in range(self.cfg.members)]
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(agent.log_alpha[0].detach().clone())
        fixed = self.cfg.alpha if self.cfg.alpha is not None else min(1.0, self.log_alpha.exp().item())
        self.alpha = torch.tensor(fixed, dtype=torch.float64)
        self.critic_adams = [torch.optim.Adam(critic.parameters(), lr=self.cfg.critic_lr) for critic in self.critics]
        self.actor_adam = torch.optim.Adam(self.actor.network.parameters(), lr=self.cfg.actor_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.cfg.alpha_lr)
        # Annealed after every step; so long a decay is none.
        length = self.cfg.actor_decay or 10**12
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_adam, length)

    def target(self, rows: Rows, s2: Tensor) -> Tensor:
        a2, log_pi2 = self.actor.sample(s2, "target")
        next_q = q_of(self.targets, s2, a2).min(0).values - self.alpha * log_pi2
        return rows.r + self.cfg.discount * rows.not_done * next_q

    def step(self, rows: Rows, s: Tensor, s2: Tensor) -> None:
        with torch.no_grad():
            y = self.target(rows, s2)
        for critic, adam in zip(self.critics, self.critic_adams):
            minimise(adam, ((q_of([critic], s, rows.a)[0] - y) ** 2).mean())
        action, log_pi = self.actor.sample(s, "policy")
        minimise(self.actor_adam, -q_of(self.critics, s, action).min(0).values.mean() + self.alpha * log_pi.mean())
        self.schedule.step()
        if self.cfg.alpha is None:
            minimise(self.alpha_adam, -(self.log_alpha * (log_pi.detach() - 2)).mean())
            self.alpha = torch.clamp(self.log_alpha.detach().exp(), 0.0, 1.0)
        for online, slow in zip(self.critics, self.targets):
            for p, p2 in zip(online.parameters(), slow.parameters()):
                p2.data.copy_(p2.data * (1 - self.cfg.tau) + p.data * self.cfg.tau)


def compare(agent: Any, plain_class: Any, updates: int, box: Bounds, log_alpha: float = 0.0) -> tuple[float, float]:
    """Distance from the restatement before and after the agent makes the updates that the restatement made."""
    real, synthetic = stores(box)
    agent.log_alpha.data.fill_(log_alpha)
    plain, loader = plain_class(agent, random := LaneRandom((11,))), mixed_loader(real, synthetic)
    mean, std = real.observations.mean(0), real.observations.std(0, correction=0)
    for rows in mixed_rows(loader, random, updates):
        s, s2 = ((x - mean) / (std + 1e-3) if agent.cfg.normalize_obs else x for x in (rows.s, rows.s2))
        plain.step(rows, s, s2)
    before = distance(agent, plain)
    Eager(agent, loader).run(0, updates)
    return before, distance(agent, plain)


@pytest.mark.parametrize(
    ("settings", "updates", "box", "tolerance"),
    [
        ({}, 1, (-1, 1), 1e-10),
        ({}, 3, (-1, 1), 1e-10),
        ({"alpha": 0.2, "normalize_obs": True}, 3, (-1, 1), 1e-10),
        ({"actor_decay": 4}, 3, (-1, 1), 1e-10),
        ({"members": 3}, 10, (-1, 1), 1e-8),  # rounding differences grow with the updates
        *(({}, 3, box, 1e-10) for box in BOXES),
    ],
)
def test_updates_equal_the_kits(settings: dict[str, Any], updates: int, box: Bounds, tolerance: float) -> None:
    """Same weights, batches and noise; alpha begins above its bound of 1."""
    config = MOPOConfig(hidden=(24, 16), critic_lr=1e-3, actor_lr=1e-3, alpha_lr=1e-2, **settings)
    agent = MOPO(spec_of(stores(box)[0], (11,)), config).double()
    before, after = compare(agent, Plain, updates, box, log_alpha=0.3)
    assert after < tolerance < before


def test_the_temperature_is_at_most_one_or_fixed() -> None:
    learnt, fixed = (MOPO(Spec(3, 2, (0, 1)), MOPOConfig(hidden=(8,), alpha=alpha)) for alpha in (None, 0.2))
    learnt.log_alpha.data.copy_(torch.tensor([2.0, -1.0]))
    assert learnt.temperature().tolist() == pytest.approx([1.0, 0.36787944])
    assert fixed.temperature().tolist() == pytest.approx([0.2, 0.2])


def test_no_critic_is_refused() -> None:
    with pytest.raises(OffrlError, match=r"agent.members=0 should be at least 1"):
        make_agent({"_target_": "offrl.agents.mopo.MOPO", "members": 0}, Spec(3, 2))
