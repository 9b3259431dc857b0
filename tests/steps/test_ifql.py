"""IFQL's and IDQL's updates against a plain restatement, in float64; their samplers; the best of N."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from plain import BOXES, Bounds, Box, SmoothMLP, boxed, difference, drawn, make_store, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.ifql import IDQL, IFQL, IFQLConfig
from offrl.nets import DenoisingPolicy
from offrl.nets.denoising import schedule
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

BATCH = 16


def denoising_error(policy: Any, s: Tensor, a: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """(eps^ - eps)^2 of the timesteps t = 1 ... T `[batch]`; the network sees t - 1 as the authors' does."""
    beta, steps = [], policy.steps
    for i in range(1, steps + 1):
        beta.append(1 - math.exp(-0.1 / steps - 0.5 * 9.9 * (2 * i - 1) / steps**2))
    abar = torch.tensor([math.prod(1 - b for b in beta[: int(i)]) for i in t]).double().unsqueeze(1)
    x = abar.sqrt() * a + (1 - abar).sqrt() * eps
    half = policy.time_dim // 2
    angle = (t - 1).double().unsqueeze(1) * torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1))).double()
    time = SmoothMLP(policy.time)(torch.cat([angle.sin(), angle.cos()], 1))
    return (SmoothMLP(policy.mlp)(torch.cat([x, time, s], 1)) - eps) ** 2


class Plain:
    """V, critics and a flow of one seed: all losses of the old parameters, one Adam, target critics a step behind."""

    def __init__(self, agent: IFQL) -> None:
        self.cfg, self.box = agent.cfg, Box(agent.spec)
        self.flow, self.value = SmoothMLP(agent.policy.mlp), SmoothMLP(agent.value)
        self.critics = nn.ModuleList(SmoothMLP(agent.critics.mlp, 0, i) for i in (0, 1))
        self.critics_target = copy.deepcopy(self.critics)
        self.adam = torch.optim.Adam(nn.ModuleList([self.flow, self.value, self.critics]).parameters(), self.cfg.lr)

    def step(self, rows: dict[str, Tensor], x0: Tensor, t: Tensor) -> None:
        cfg, s, a = self.cfg, rows["s"], rows["a"]
        unit, sa = (a - self.box.centre) / self.box.half, torch.cat([s, a], 1)
        q = torch.stack([critic(sa)[:, 0].detach() for critic in self.critics_target]).min(0).values
        u = q - self.value(s)[:, 0]
        value_loss = (torch.where(u >= 0, cfg.expectile, 1 - cfg.expectile) * u**2).mean()
        y = rows["r"] + cfg.discount * (1 - rows["d"]) * self.value(rows["s2"])[:, 0].detach()
        critic_loss = sum(((critic(sa)[:, 0] - y) ** 2).mean() for critic in self.critics)
        velocity = self.flow(torch.cat([s, (1 - t) * x0 + t * unit, t], 1))
        loss = value_loss + critic_loss + ((velocity - (unit - x0)) ** 2).mean()
        for target, online in zip(self.critics_target.parameters(), self.critics.parameters()):
            target.data = (1 - cfg.tau) * target.data + cfg.tau * online.data
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def distance(self, agent: IFQL) -> float:
        pairs = [(SmoothMLP(agent.policy.mlp), self.flow), (SmoothMLP(agent.value), self.value)]
        for theirs, mine in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            pairs += [(SmoothMLP(theirs.mlp, 0, i), mine[i]) for i in (0, 1)]
        return max(difference(*pair) for pair in pairs)


@pytest.mark.parametrize("settings", [{"lr": 1e-3}, {"expectile": 0.7, "norm": False, "discount": 0.9}], ids=str)
@pytest.mark.parametrize(("updates", "box"), [(10, (-1.0, 1.0)), (3, BOXES[-1])])
def test_updates_equal_the_authors(updates: int, box: Bounds, settings: dict[str, Any]) -> None:
    store = boxed(make_store(), box)
    agent = IFQL(spec_of(store, (11,)), IFQL.Config(hidden=(24, 16), **settings)).double()
    plain = Plain(agent)
    for _, rows in drawn(store, random := LaneRandom((11,)), updates, BATCH):
        names = {"s": "observations", "a": "actions", "r": "rewards", "s2": "next_observations", "d": "terminations"}
        batch = {short: getattr(store, name)[rows].double() for short, name in names.items()}
        x0 = random.normal("flow/x0", batch["a"].unsqueeze(0))[0]
        plain.step(batch, x0, random.uniform("flow/t", (BATCH, 1))[0])
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH)).run(0, updates)
    assert plain.distance(agent) < 1e-10 < before


def test_the_denoising_loss_equals_its_definition() -> None:
    store = make_store()
    agent = IDQL(spec_of(store, (3,)), IDQL.Config(hidden=(24, 16))).double()
    batch = agent.prepare(store.transitions(torch.arange(20).unsqueeze(0)))
    eps = agent.random.normal("denoising/eps", batch.action)[0]
    t = agent.random.integers("denoising/t", 5, (20, 1))[0, :, 0] + 1
    assert set(t.tolist()) == {1, 2, 3, 4, 5}
    expected = denoising_error(agent.policy, batch.obs[0], batch.action[0], eps, t).mean()
    torch.testing.assert_close(agent.policy_loss(batch)[0], expected, rtol=1e-6, atol=0)  # frequencies are float32


def test_schedule() -> None:
    """T = 5: the values of the authors' five coarse steps."""
    beta, abar = schedule(5)
    torch.testing.assert_close(beta, torch.tensor([0.196, 0.459, 0.636, 0.755, 0.835]).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(abar, torch.tensor([0.8041, 0.4352, 0.1585, 0.0389, 0.0064]).double(), rtol=0, atol=1e-4)


class Exact(DenoisingPolicy):
    """The noise of data that are one point: eps = (x_t - sqrt(abar_t) a) / sqrt(1 - abar_t)."""

    point = torch.tensor([0.3, -0.6], dtype=torch.float64)

    def predict(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        abar = torch.tensor(self.abar, dtype=torch.float64)[t.long()]
        return (x - abar.sqrt() * self.point) / (1 - abar).sqrt()


@pytest.mark.parametrize("sampler", ["posterior", "direct"])
def test_both_samplers_land_on_a_point_mass(sampler: Any) -> None:
    """At t = 1 both give the point exactly: 1 - abar_1 = beta_1."""
    policy = Exact((0,), 3, 2, (8,), 5, sampler).double()
    noise = torch.randn(1, 100, 10, generator=torch.Generator().manual_seed(0)).double()
    sample = policy.sample(torch.zeros(1, 100, 3).double(), noise)
    torch.testing.assert_close(sample, policy.point.expand_as(sample), rtol=0, atol=1e-12)


class Normal(DenoisingPolicy):
    """The optimal prediction for data N(0, v): eps = sqrt(1 - abar) x / (abar v + 1 - abar)."""

    variance = 0.01

    def predict(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        abar = torch.tensor(self.abar, dtype=torch.float64)[t.long()]
        return (1 - abar).sqrt() * x / (abar * self.variance + 1 - abar)


def test_the_posterior_sampler_is_ancestral_sampling() -> None:
    """For Gaussian data so narrow that nothing is clipped, each step is linear, and the variance follows by recursion."""
    policy = Normal((0,), 3, 1, (8,), 5, "posterior").double()
    beta, abar = (x.tolist() for x in schedule(5))
    variance = 1.0
    for t in reversed(range(5)):
        before = abar[t - 1] if t else 1.0
        x0 = math.sqrt(abar[t]) * 0.01 / (abar[t] * 0.01 + 1 - abar[t])  # E[x_0 | x_t] / x_t
        slope = (math.sqrt(before) * beta[t] * x0 + math.sqrt(1 - beta[t]) * (1 - before)) / (1 - abar[t])
        variance = slope**2 * variance + (beta[t] * (1 - before) / (1 - abar[t]) if t else 0)
    noise = torch.randn(1, 200_000, 5, generator=torch.Generator().manual_seed(0)).double()
    sample = policy.sample(torch.zeros(1, 200_000, 3).double(), noise)
    assert abs(sample.var().item() / variance - 1) < 0.02  # six standard errors


@pytest.mark.parametrize("cls", [IFQL, IDQL])
def test_acting_takes_the_best_of_n(cls: Any) -> None:
    """Of N = 200 samples the one with the largest smaller critic; other lanes and places change nothing."""
    agent = cls(Spec(3, 2, (4, 9)), cls.Config(hidden=(16,), flow_steps=3, candidates=200)).double()
    obs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    state = agent.initial_state(5)
    noise, action = agent.candidate_noise(obs, state, 200, agent.policy.noise_dim), agent.act(obs, state)
    for lane in range(2):
        for env in range(5):
            s = torch.zeros(2, 200, 3).double() + obs[lane, env]
            many = agent.policy.sample(s, noise[lane, env].expand(2, -1, -1))
            best = agent.critics(s, many)[lane].min(0).values.argmax()
            torch.testing.assert_close(action[lane, env], many[lane, best], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(agent.act(obs[:, :2], state), action[:, :2], rtol=1e-9, atol=1e-9)
    still = agent.act(obs[:, :1].expand(-1, 4, -1))  # without a state: the same candidates for every observation
    torch.testing.assert_close(still, still[:, :1].expand_as(still))


def test_the_policy_knows_neither_critics_nor_v() -> None:
    store = make_store()
    agent = IFQL(spec_of(store, (3,)), IFQL.Config(hidden=(16,))).double()
    batch = agent.prepare(store.transitions(torch.arange(20).unsqueeze(0)))
    others = [*agent.critics.parameters(), *agent.value.parameters()]
    gradients = torch.autograd.grad(agent.policy_loss(batch).sum(), others, allow_unused=True)
    assert all(g is None for g in gradients)


@pytest.mark.parametrize("policy", ["flow", "denoising"])
def test_initial_weights_are_glorots(policy: Any) -> None:
    agent = IFQL(Spec(6, 3), IFQLConfig(policy=policy, hidden=(64, 64)))
    for mlp in (agent.policy.mlp, agent.critics.mlp, agent.value):
        assert all((b == 0).all() for b in mlp.biases)
        for weight in mlp.weights[:2]:
            bound = (6 / sum(weight.shape[-2:])) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound


def test_one_candidate_is_the_least() -> None:
    agent = IFQL(Spec(6, 3), IFQLConfig(candidates=1, hidden=(8,)))
    assert agent.select_action(torch.zeros(1, 2, 6), agent.initial_state(2)).shape == (1, 2, 3)
    with pytest.raises((OffrlError, ValueError), match="candidates=0 should be at least 1"):
        IFQL(Spec(6, 3), IFQLConfig(candidates=0))
