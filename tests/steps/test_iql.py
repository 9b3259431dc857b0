"""IQL's update against a plain restatement of CORL's, in float64, and what its losses are known to have as optima."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import make_discrete_toy, make_toy
from plain import BOXES, Bounds, Box, batches, boxed, difference, sequential, spec_of
from torch import Tensor, nn
from torch.distributions import Normal

from offrl.agents.base import Spec
from offrl.agents.iql import IQL, IQLConfig, expectile_loss, exponential_loss, sparse_loss
from offrl.data.batch import Batch
from offrl.nets import dropout
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

BATCH = 64


class Plain:
    """One seed of IQL in CORL's order, with ordinary modules, optimisers and schedule."""

    def __init__(self, agent: IQL, random: LaneRandom) -> None:
        self.cfg, self.random, self.box = agent.cfg, random, Box(agent.spec)
        self.actor, self.value = sequential(agent.actor.mlp, 0), sequential(agent.value, 0)
        self.critics = [sequential(agent.critics.mlp, 0, member) for member in (0, 1)]
        self.critics_target = copy.deepcopy(self.critics)
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        of_actor = [*self.actor.parameters(), *([] if self.cfg.deterministic else [self.log_std])]
        both = [p for critic in self.critics for p in critic.parameters()]
        self.actor_adam = torch.optim.Adam(of_actor, lr=self.cfg.actor_lr)
        self.value_adam = torch.optim.Adam(self.value.parameters(), lr=self.cfg.value_lr)
        self.critic_adam = torch.optim.Adam(both, lr=self.cfg.critic_lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_adam, self.cfg.actor_decay)

    def mean(self, s: Tensor) -> Tensor:
        """tanh of the actor's network in the box of actions, with a share of its hidden units dropped."""
        uniforms = iter(("actor/0", "actor/1"))
        for layer in self.actor:
            s = layer(s)
            if isinstance(layer, nn.ReLU) and self.cfg.dropout:
                s = s * dropout(torch.ones_like(s).unsqueeze(0), self.cfg.dropout, self.random, next(uniforms))[0]
        return self.box.squash(s)

    def q(self, critics: list[nn.Sequential], s: Tensor, a: Tensor) -> list[Tensor]:
        return [critic(torch.cat([s, a], 1)).squeeze(1) for critic in critics]

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor) -> None:
        cfg = self.cfg
        next_v = self.value(s2).squeeze(1).detach()
        u = torch.minimum(*self.q(self.critics_target, s, a)).detach() - self.value(s).squeeze(1)
        weight = torch.abs(cfg.expectile - (u < 0).double())
        self.minimise(self.value_adam, torch.mean(weight * u**2))

        y = r + cfg.discount * not_done * next_v
        self.minimise(self.critic_adam, sum(nn.functional.mse_loss(q, y) for q in self.q(self.critics, s, a)) / 2)
        for online, target in zip(self.critics, self.critics_target):
            for p, p2 in zip(online.parameters(), target.parameters()):
                p2.data = (1 - cfg.tau) * p2.data + cfg.tau * p.data

        weight = torch.exp(cfg.beta * u.detach()).clamp(max=100.0)
        mean = self.mean(s)
        if cfg.deterministic:
            error = ((mean - a) ** 2).sum(1)
        else:
            error = -Normal(mean, self.log_std.clamp(-20, 2).exp() * self.box.half).log_prob(a).sum(1)
        self.minimise(self.actor_adam, torch.mean(weight * error))
        self.schedule.step()

    def distance(self, agent: IQL) -> float:
        """Largest difference of any parameter from lane 0 of the agent."""
        largest = max(
            difference(sequential(agent.actor.mlp, 0), self.actor), difference(sequential(agent.value, 0), self.value)
        )
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            for member, mine in enumerate(mines):
                largest = max(largest, difference(sequential(network.mlp, 0, member), mine))
        if not self.cfg.deterministic:
            largest = max(largest, (agent.actor.log_std[0] - self.log_std).abs().max().item())
        return largest


def pair(box: Bounds = (-1, 1), **settings: Any) -> tuple[IQL, Plain, LaneRandom, Any]:
    dataset = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    agent, random = IQL(spec_of(dataset, (11,)), IQLConfig(hidden=(24, 16), **settings)).double(), LaneRandom((11,))
    return agent, Plain(agent, random), random, dataset


@pytest.mark.parametrize(
    "settings",
    [
        {"actor_decay": 100},
        {"deterministic": True, "tau": 0.001, "actor_decay": 1000},
        {"expectile": 0.9, "beta": 10.0, "dropout": 0.25, "actor_decay": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("updates", "tolerance", "box"),
    [(1, 1e-10, (-1, 1)), (3, 1e-10, (-1, 1)), (100, 1e-8, (-1, 1)), *((3, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_the_reference(updates: int, tolerance: float, box: Bounds, settings: dict[str, Any]) -> None:
    """Same weights, batches and coins; rounding differences grow with the updates, hence the second tolerance."""
    agent, plain, random, dataset = pair(box, **settings)
    for _, rows in batches(dataset, random, updates, BATCH):
        plain.step(*rows)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def test_the_value_loss_is_least_at_the_expectile() -> None:
    """Q is 1 with probability p, else 0: V = t p / (t p + (1 - t) (1 - p)) has no gradient, and neighbours are worse."""
    t, p = torch.tensor([0.5, 0.7, 0.9, 0.99]).double(), 0.3
    agent = IQL(Spec(3, 2, (0, 1, 2, 3)), IQLConfig(hidden=(8, 8)))
    agent.cfg.expectile = t
    q = (torch.arange(1000) < 1000 * p).double().expand(4, -1)
    best = t * p / (t * p + (1 - t) * (1 - p))
    value = best.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(expectile_loss(q - value.unsqueeze(1), agent.cfg.expectile).sum(), value)
    torch.testing.assert_close(gradient, torch.zeros(4).double(), rtol=0, atol=1e-12)
    least = expectile_loss(q - best.unsqueeze(1), agent.cfg.expectile)
    for other in (best - 0.01, best + 0.01):
        assert (expectile_loss(q - other.unsqueeze(1), agent.cfg.expectile) > least).all()
    torch.testing.assert_close(best[0].item(), p)  # t = 0.5: the mean


def one_state(actions: int) -> Batch:
    """Actions of one state that is all zeros."""
    generator = torch.Generator().manual_seed(0)
    action = torch.rand(1, actions, 2, generator=generator, dtype=torch.float64) - 0.3
    obs = torch.zeros(1, actions, 3, dtype=torch.float64)
    row = torch.zeros(1, actions, dtype=torch.float64)
    return Batch(obs, action, row, obs, row, row.long())


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_policy_loss_is_least_at_the_weighted_moments(deterministic: bool) -> None:
    """In one state the optimum is known: mean and deviation of the actions under the weights."""
    batch, generator = one_state(1000), torch.Generator().manual_seed(1)
    weight = torch.rand(1, 1000, generator=generator, dtype=torch.float64) * 5
    agent = IQL(Spec(3, 2), IQLConfig(hidden=(8, 8), deterministic=deterministic)).double()
    share = (weight / weight.sum()).unsqueeze(-1)
    mean = (share * batch.action).sum(1)
    std = (share * (batch.action - mean.unsqueeze(1)).square()).sum(1).sqrt()
    with torch.no_grad():
        agent.actor.mlp.weights[-1].zero_()
        agent.actor.mlp.biases[-1].copy_(mean.atanh())
        if not deterministic:
            agent.actor.log_std.copy_(std.log())
    parameters = list(agent.actor.parameters())
    at_best = torch.autograd.grad(agent.policy_loss(batch, weight).sum(), parameters, allow_unused=True)
    assert max(g.abs().max() for g in at_best if g is not None) < 1e-12
    elsewhere = torch.autograd.grad(
        agent.policy_loss(batch, torch.ones_like(weight)).sum(), parameters, allow_unused=True
    )
    assert max(g.abs().max() for g in elsewhere if g is not None) > 1e-3


def test_weights_are_bounded_and_one_without_beta() -> None:
    for beta, bound, expected in ((0.0, 100.0, 1.0), (1e6, 7.0, 7.0)):
        agent, _, _, dataset = pair(beta=beta, max_weight=bound)
        with torch.no_grad():
            agent.value.biases[-1].sub_(1e3)  # Q above V everywhere
        metrics = Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH)).run(0, 1)
        assert metrics["weight"].item() == pytest.approx(expected)
        assert metrics["clipped"].item() == float(beta > 0)


def test_the_actor_rests_when_its_rate_has_fallen_to_zero() -> None:
    agent, _, _, dataset = pair(actor_decay=5)
    engine = Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH))
    engine.run(0, 6)
    before = copy.deepcopy(agent.state_dict())
    engine.run(6, 3)
    moved = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(before[name], value)}
    assert {"critics", "critics_target", "value"} <= moved
    assert "actor" not in moved


def test_acting_drops_nothing_and_the_density_is_that_of_the_policy() -> None:
    agent, _, _, dataset = pair(dropout=0.5, actor_decay=100)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH)).run(0, 5)
    obs, action = dataset.observations[:9].unsqueeze(0), dataset.actions[:9].unsqueeze(0)
    normalised = agent.normalize(obs)
    mean, std = agent.policy_gaussian(normalised)
    assert torch.equal(agent.select_action(obs), mean.clamp(-1, 1))
    torch.testing.assert_close(mean[0], torch.tanh(sequential(agent.actor.mlp, 0)(normalised[0])))
    torch.testing.assert_close(std, agent.actor.log_std.exp().unsqueeze(1).expand(1, 9, 2))
    expected = Normal(mean, std).log_prob(action).sum(-1)
    torch.testing.assert_close(agent.log_prob(normalised, action), expected)
    assert torch.equal(agent.log_prob(normalised, action), agent.log_prob(normalised, action))
    silent, *_ = pair(deterministic=True)
    assert silent.policy_gaussian(normalised) is None
    with pytest.raises(NotImplementedError, match="IQL: the policy has no density"):
        silent.log_prob(normalised, action)


def test_lanes_may_drop_different_shares() -> None:
    dataset = make_toy(512, dtype=torch.float64)
    both, none = (
        IQL(Spec(3, 2, seeds), IQLConfig(hidden=(8, 8), dropout=rate)).double()
        for seeds, rate in (((5, 6), [0.0, 0.3]), ((5,), 0.0))
    )
    for agent in (both, none):
        Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH)).run(0, 5)
    for many, one in zip(both.actor.parameters(), none.actor.parameters()):
        torch.testing.assert_close(many[0], one[0], rtol=0, atol=1e-10)
    assert not torch.equal(both.actor.mlp.weights[0][0], both.actor.mlp.weights[0][1])


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_sql_and_eql_have_their_minima(alpha: float) -> None:
    """SQL's V solves E max(1 + (Q - V) / (2 alpha), 0) = 1; EQL's is alpha log E exp(Q / alpha) where no exponent is cut."""
    q = torch.randn(1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for loss, kind in ((sparse_loss, "sparse"), (exponential_loss, "exponential")):
        low, high = q.min().item() - 1, q.max().item() + 1
        for _ in range(60):  # the loss is convex in V: bisection by its slope
            v = torch.full((1, 1), (low + high) / 2, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(loss(q - v, v.expand_as(q), alpha).sum(), v)
            low, high = (low, v.item()) if slope > 0 else (v.item(), high)
        if kind == "sparse":
            assert abs((1 + (q - low) / (2 * alpha)).clamp(min=0).mean().item() - 1) < 1e-9
        elif ((q - low) / alpha).max() < 5:
            assert abs(low - alpha * ((q / alpha).exp().mean().log()).item()) < 1e-9
    assert ((q - low) / alpha).max() < 5 or alpha < 1  # EQL's closed form was looked at


@pytest.mark.parametrize("kind", ["sparse", "exponential"])
def test_sql_and_eql_weigh_their_policies(kind: Any) -> None:
    agent = IQL(Spec(3, 2), IQLConfig(hidden=(8,), value_fit=kind, regularization=2.0))
    u = torch.tensor([[-1.0, 0.0, 0.5, 300.0]], dtype=torch.float64)
    expected = {"sparse": [0, 0, 0.5, 100], "exponential": [math.exp(-5), 1, math.exp(2.5), 100]}[kind]
    torch.testing.assert_close(agent.policy_weight(u)[0], torch.tensor(expected, dtype=torch.float64))
    plain = IQL(Spec(3, 2), IQLConfig(hidden=(8,), regularization=7.0))  # off: IQL's, whatever alpha is
    torch.testing.assert_close(plain.policy_weight(u)[0], (3 * u[0]).exp().clamp(max=100))
    value, q = torch.randn(2, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.value_loss(q - value, value), expectile_loss(q - value, 0.7))
    loss = sparse_loss if kind == "sparse" else exponential_loss
    assert torch.equal(agent.value_loss(q - value, value), loss(q - value, value, 2.0))


@pytest.mark.parametrize(("largest", "factor"), [(-3.0, math.exp(1)), (0.5, math.exp(-0.5)), (4.0, math.exp(-4))])
def test_eql_is_scaled_by_its_largest_exponent_or_minus_one(largest: float, factor: float) -> None:
    """As XQL's and SQL's authors scale it, which sets the step and not the minimum."""
    value = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
    z = torch.tensor([[largest, largest - 1, largest - 2]], dtype=torch.float64)
    expected = factor * (z.exp() + value / 0.5).mean()
    assert exponential_loss(z * 0.5, value, 0.5).item() == pytest.approx(expected.item(), rel=1e-12)


def test_eql_stays_finite_where_exponentials_do_not() -> None:
    value = torch.zeros(1, 3, requires_grad=True)
    loss = exponential_loss(torch.tensor([[1e4, -1e4, 0.0]]) - value, value, 0.1)
    (slope,) = torch.autograd.grad(loss.sum(), value)
    assert loss.isfinite().all()
    assert slope.isfinite().all()


# ---- integer actions ------------------------------------------------------------------------------------------


class PlainDiscrete(Plain):
    """The same with Q(s, .) for each action and a softmax policy."""

    def __init__(self, agent: IQL) -> None:
        self.cfg = agent.cfg
        self.actor, self.value = sequential(agent.actor, 0), sequential(agent.value, 0)
        self.critics = [sequential(agent.critics.mlp, 0, member) for member in (0, 1)]
        self.critics_target = copy.deepcopy(self.critics)
        both = [p for critic in self.critics for p in critic.parameters()]
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=self.cfg.actor_lr)
        self.value_adam = torch.optim.Adam(self.value.parameters(), lr=self.cfg.value_lr)
        self.critic_adam = torch.optim.Adam(both, lr=self.cfg.critic_lr)

    def q(self, critics: list[nn.Sequential], s: Tensor, a: Tensor) -> list[Tensor]:
        return [torch.stack([critic(s)[i, a[i]] for i in range(len(s))]) for critic in critics]

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor) -> None:
        cfg = self.cfg
        next_v = self.value(s2).squeeze(1).detach()
        u = torch.minimum(*self.q(self.critics_target, s, a)).detach() - self.value(s).squeeze(1)
        self.minimise(self.value_adam, torch.mean(torch.abs(cfg.expectile - (u < 0).double()) * u**2))
        y = r + cfg.discount * not_done * next_v
        self.minimise(self.critic_adam, sum(nn.functional.mse_loss(q, y) for q in self.q(self.critics, s, a)) / 2)
        weight = torch.exp(cfg.beta * u.detach()).clamp(max=100.0)
        self.minimise(
            self.actor_adam, (weight * nn.functional.cross_entropy(self.actor(s), a, reduction="none")).mean()
        )


def test_updates_for_integer_actions_equal_the_restatement() -> None:
    dataset = make_discrete_toy(512, dtype=torch.float64)
    spec = Spec(3, 3, (11,), *dataset.observation_statistics(), discrete=True)
    agent = IQL(spec, IQLConfig(hidden=(24, 16), actor_decay=0, tau=0.0)).double()
    plain = PlainDiscrete(agent)
    for _, rows in batches(dataset, LaneRandom((11,)), 3, BATCH):
        plain.step(*rows)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH)).run(0, 3)
    for ours, theirs in ((agent.actor, plain.actor), (agent.value, plain.value)):
        assert difference(sequential(ours, 0), theirs) < 1e-10
    assert max(difference(sequential(agent.critics.mlp, 0, i), plain.critics[i]) for i in (0, 1)) < 1e-10
    obs = torch.randn(1, 5, 3).double()
    assert torch.equal(agent.select_action(obs)[0], plain.actor(agent.normalize(obs)[0]).argmax(-1))
    every = torch.arange(3).expand(1, 5, 3).flatten(1)
    total = agent.log_prob(obs.repeat_interleave(3, 1), every).exp().view(5, 3).sum(-1)
    torch.testing.assert_close(total, torch.ones(5).double())
