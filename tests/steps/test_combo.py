"""COMBO's update against a plain restatement of OfflineRL-Kit's, in float64, and its two means against CQL's term."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from mixed import PlainActor, Rows, minimise, mixed_loader, mixed_rows, q_of, stores
from plain import BOXES, Bounds, Box, sequential, spec_of
from test_mopo import compare
from torch import Tensor, nn

from offrl.agents.combo import COMBO, COMBOConfig
from offrl.agents.cql import CQL, CQLConfig
from offrl.utils.random import LaneRandom


class Plain:
    """One seed in the kit's order; each kind of action goes through each critic by itself."""

    def __init__(self, agent: COMBO, random: LaneRandom) -> None:
        self.cfg, self.random, self.box = agent.cfg, random, Box(agent.spec)
        self.actor = PlainActor(agent, random, self.box)
        self.critics = [sequential(agent.critics.mlp, 0, i) for i in (0, 1)]
        self.targets = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(agent.log_alpha[0].detach().clone())
        self.critic_adams = [torch.optim.Adam(critic.parameters(), lr=self.cfg.critic_lr) for critic in self.critics]
        self.actor_adam = torch.optim.Adam(self.actor.network.parameters(), lr=self.cfg.actor_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.cfg.actor_lr)
        # Annealed after every step; so long a decay is none.
        length = self.cfg.actor_decay or 10**12
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_adam, length)

    def many(self, s: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """n actions of the policy in each state `[batch, n, A]`, and their log-densities."""
        shape = (len(s), self.cfg.actions, 2)
        return self.actor.from_noise(
            s.unsqueeze(1).expand(*shape[:2], -1), self.random.normal(name, torch.zeros(1, *shape).double())[0]
        )

    def step(self, rows: Rows, s: Tensor, s2: Tensor) -> None:
        cfg, n = self.cfg, self.cfg.actions
        alpha = self.log_alpha.detach().exp()
        action, log_pi = self.actor.sample(s, "policy")
        minimise(self.actor_adam, (alpha * log_pi - q_of(self.critics, s, action).min(0).values).mean())
        self.schedule.step()
        minimise(self.alpha_adam, -(self.log_alpha * (log_pi.detach() - 2)).mean())
        with torch.no_grad():
            noise = self.random.normal("target", torch.zeros(1, len(s), 1, 2).double())[0, :, 0]
            a2, _ = self.actor.from_noise(s2, noise)
            y = rows.r + cfg.discount * rows.not_done * q_of(self.targets, s2, a2).min(0).values
            uniform = (
                self.box.low + (self.box.high - self.box.low) * self.random.uniform("cql/uniform", (len(s), n, 2))[0]
            )
            kinds = [
                self.many(s, "cql/current"),
                self.many(s2, "cql/next"),
                (uniform, torch.full((len(s), n), -2 * math.log(2))),
            ]
        losses = []
        for critic in self.critics:
            repeated = s.unsqueeze(1).expand(-1, n, -1)
            values = [q_of([critic], repeated, a)[0] - density for a, density in kinds]  # three of [batch, n]
            if cfg.pooled:
                soft = torch.logsumexp(torch.cat(values, 1) / cfg.temperature, 1) * cfg.temperature
            else:
                columns = torch.stack(
                    [value.reshape(-1) for value in values], 1
                )  # [batch n, 3], as it happens in the kit
                soft = (torch.logsumexp(columns / cfg.temperature, 1) * cfg.temperature).view(len(s), n).mean(1)
            down = soft if cfg.lowered == "mix" else soft[~rows.real]
            real = q_of([critic], s[rows.real], rows.a[rows.real])[0]
            bellman = ((q_of([critic], s, rows.a)[0] - y) ** 2).mean()
            losses.append(bellman + cfg.cql_alpha * (down.mean() - real.mean()))
        for adam, loss in zip(self.critic_adams, losses):
            minimise(adam, loss)
        for online, slow in zip(self.critics, self.targets):
            for p, p2 in zip(online.parameters(), slow.parameters()):
                p2.data.copy_(p2.data * (1 - cfg.tau) + p.data * cfg.tau)


def make(box: Bounds = (-1, 1), **settings: Any) -> COMBO:
    config = COMBOConfig(hidden=(24, 16), actions=4, critic_lr=1e-3, actor_lr=1e-3, **settings)
    return COMBO(spec_of(stores(box)[0], (11,)), config).double()


@pytest.mark.parametrize(
    ("settings", "updates", "box", "tolerance"),
    [
        ({}, 1, (-1, 1), 1e-10),
        ({"cql_alpha": 5.0, "normalize_obs": True, "temperature": 0.8}, 1, (-1, 1), 1e-10),
        ({"pooled": False, "temperature": 0.7}, 3, (-1, 1), 1e-10),
        ({"actor_decay": 4}, 3, (-1, 1), 1e-10),
        ({"pooled": False, "lowered": "model"}, 3, (-1, 1), 1e-10),
        ({"lowered": "model"}, 10, (-1, 1), 1e-8),  # rounding differences grow with the updates
        *(({"cql_alpha": 2.0}, 3, box, 1e-10) for box in BOXES),
    ],
)
def test_updates_equal_the_kits(settings: dict[str, Any], updates: int, box: Bounds, tolerance: float) -> None:
    before, after = compare(make(box, **settings), Plain, updates, box)
    assert after < tolerance < before


def test_the_restatement_tells_the_variants_apart() -> None:
    """An update with another log-sum-exp, or other lowered states, is another one."""
    real, synthetic = stores()
    made = []
    for settings in ({}, {"pooled": False}, {"lowered": "model"}):
        plain = Plain(make(**settings), random := LaneRandom((11,)))
        for rows in mixed_rows(mixed_loader(real, synthetic), random, 1):
            plain.step(rows, rows.s, rows.s2)
        made.append(torch.cat([p.detach().flatten() for critic in plain.critics for p in critic.parameters()]))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (made[first] - made[second]).abs().max() > 1e-6


def terms(agent: COMBO, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The term for random values of 6 rows, some of which are the dataset's; and its gradients by both kinds of values."""
    generator = torch.Generator().manual_seed(0)
    q_data = torch.randn(1, 2, 6, generator=generator).double().requires_grad_()
    q_proposed = torch.randn(1, 2, 6, 12, generator=generator).double().requires_grad_()
    batch: Any = type("Rows", (), {"index": torch.where(real, 1, -1).unsqueeze(0)})
    term = agent.conservative_term(batch, q_data, q_proposed, torch.zeros(1, 6, 12).double())
    return (term, *torch.autograd.grad(term.sum(), (q_data, q_proposed)))


def test_without_synthetic_rows_the_term_is_cqls() -> None:
    combo = make()
    cql = CQL(combo.spec, CQLConfig(hidden=(24, 16), actions=4)).double()
    generator = torch.Generator().manual_seed(0)
    q_data = torch.randn(1, 2, 6, generator=generator).double()
    q_proposed = torch.randn(1, 2, 6, 12, generator=generator).double()
    term = terms(combo, torch.ones(6, dtype=torch.bool))[0]
    wanted = cql.conservative_difference(q_data, q_proposed, torch.zeros(1, 6, 12).double())
    torch.testing.assert_close(term, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lowered", ["mix", "model"])
@pytest.mark.parametrize("pooled", [True, False])
def test_what_the_term_raises_and_lowers(lowered: Any, pooled: bool) -> None:
    """-1 / n_real on each pair of the dataset and nothing on synthetic ones; a softmax of weight 1 over lowered states."""
    real = torch.tensor([True, False, True, False, False, False])
    _, up, down = terms(make(lowered=lowered, pooled=pooled), real)
    torch.testing.assert_close(up[0, 0], -real.double() / 2, rtol=0, atol=1e-12)
    wanted = torch.full((6,), 1 / 6, dtype=torch.float64) if lowered == "mix" else (~real).double() / 4
    torch.testing.assert_close(down[0, 0].sum(-1), wanted.double(), rtol=0, atol=1e-12)


def test_over_one_action_of_each_kind_the_maximum_is_softer() -> None:
    """For equal values: log of 3 n against log of 3; and it is never larger, since log-sum-exp of a mean is below."""
    over_all, over_kinds = make(), make(pooled=False)
    flat, density = torch.zeros(1, 2, 5, 12).double(), torch.zeros(1, 5, 12).double()
    assert float(over_all.soft_maximum(flat, density).mean()) == pytest.approx(math.log(12))
    assert float(over_kinds.soft_maximum(flat, density).mean()) == pytest.approx(math.log(3))
    q = torch.randn(1, 2, 5, 12, generator=torch.Generator().manual_seed(1)).double()
    assert (over_kinds.soft_maximum(q, density) < over_all.soft_maximum(q, density)).all()
