"""AWAC's update against a plain restatement of CORL's, in float64, and what must hold of its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, batches, boxed, difference, sequential, spec_of
from torch import Tensor, nn
from torch.distributions import Normal

from offrl.agents.awac import AWAC, AWACConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

BATCH = 64


class Plain:
    """One seed of AWAC with ordinary modules, distributions and optimisers."""

    def __init__(self, agent: AWAC) -> None:
        self.cfg, self.box = agent.cfg, Box(agent.spec)
        self.actor = sequential(agent.actor.mlp, 0)
        self.log_std = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.critics = [sequential(agent.critics.mlp, 0, member) for member in (0, 1)]
        self.critics_target = copy.deepcopy(self.critics)
        both = [p for critic in self.critics for p in critic.parameters()]
        self.actor_adam = torch.optim.Adam([*self.actor.parameters(), self.log_std], lr=self.cfg.actor_lr)
        self.critic_adam = torch.optim.Adam(both, lr=self.cfg.critic_lr)

    def policy(self, s: Tensor) -> Normal:
        return Normal(self.actor(s), self.log_std.clamp(-20, 2).exp())

    def sample(self, s: Tensor, noise: Tensor) -> Tensor:
        policy = self.policy(s)
        return self.box.clip(policy.loc + noise * policy.scale).detach()

    def smaller_q(self, critics: list[nn.Sequential], s: Tensor, a: Tensor) -> Tensor:
        return torch.minimum(*(critic(torch.cat([s, a], 1)).squeeze(1) for critic in critics)).detach()

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor, noise: dict[str, Tensor]) -> None:
        cfg = self.cfg
        a2 = self.sample(s2, noise["next_action"])
        y = r + cfg.discount * not_done * self.smaller_q(self.critics_target, s2, a2)
        errors = [nn.functional.mse_loss(c(torch.cat([s, a], 1)).squeeze(1), y) for c in self.critics]
        self.minimise(self.critic_adam, sum(errors))

        v = self.smaller_q(self.critics, s, self.sample(s, noise["action"]))
        weight = torch.exp((self.smaller_q(self.critics, s, a) - v) / cfg.temperature).clamp(max=100.0)
        self.minimise(self.actor_adam, torch.mean(-self.policy(s).log_prob(a).sum(1) * weight))
        for online, target in zip(self.critics, self.critics_target):
            for p, p2 in zip(online.parameters(), target.parameters()):
                p2.data = (1 - cfg.tau) * p2.data + cfg.tau * p.data

    def distance(self, agent: AWAC) -> float:
        """Largest difference of any parameter from lane 0 of the agent."""
        largest = (agent.actor.log_std[0] - self.log_std).abs().max().item()
        largest = max(largest, difference(sequential(agent.actor.mlp, 0), self.actor))
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            for member, mine in enumerate(mines):
                largest = max(largest, difference(sequential(network.mlp, 0, member), mine))
        return largest


def make(store: OfflineDataset, **settings: Any) -> AWAC:
    return AWAC(spec_of(store, (11,)), AWACConfig(hidden=(24, 16), **settings)).to(store.rewards.dtype)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.01, "tau": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("updates", "tolerance", "box"),
    [(1, 1e-10, (-1, 1)), (3, 1e-10, (-1, 1)), (100, 1e-8, (-1, 1)), *((3, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_the_reference(updates: int, tolerance: float, box: Bounds, settings: dict[str, Any]) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the second tolerance."""
    store = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    agent = make(store, **settings)
    plain, random = Plain(agent), LaneRandom((11,))
    for _, rows in batches(store, random, updates, BATCH):
        noise = {name: random.normal(name, rows[1].unsqueeze(0))[0] for name in ("next_action", "action")}
        plain.step(*rows, noise)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def test_weights_are_exponential_up_to_their_bound() -> None:
    """Advantages known by construction: both critics are Q(s, a) = c a_1 and the policy always takes a_1 = -1."""
    store = make_toy(512, dtype=torch.float64)
    agent = make(store, temperature=0.5)
    slope = 2.0
    with torch.no_grad():
        for p in (*agent.critics.parameters(), *agent.actor.mlp.parameters()):
            p.zero_()
        # a_1 + 1 >= 0 passes through the ReLUs.
        for layer, (row, column) in enumerate(((0, 3), (0, 0), (0, 0))):
            agent.critics.mlp.weights[layer][..., row, column] = 1.0
        agent.critics.mlp.biases[0][..., 0] = 1.0
        agent.critics.mlp.weights[-1].mul_(slope)
        agent.actor.mlp.biases[-1].fill_(-1e3)  # clipped to -1
    batch = agent.prepare(store.transitions(torch.arange(256).unsqueeze(0)))
    weight, q = agent.weights(batch)
    advantage = slope * (batch.action[..., 0] + 1)
    torch.testing.assert_close(q, advantage)
    torch.testing.assert_close(weight, (advantage / 0.5).exp().clamp(max=100.0))
    assert 0 < (weight == 100.0).double().mean() < 1


def test_an_infinite_temperature_clones() -> None:
    """All weights are 1: the loss is the data's mean negative log-likelihood, and its optimum the data's moments."""
    store = make_toy(512, dtype=torch.float64)
    agent = make(store, temperature=1e12)
    batch = agent.prepare(store.transitions(torch.arange(256).unsqueeze(0)))
    weight, _ = agent.weights(batch)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    before = agent.log_prob(batch.obs, batch.action).mean()
    for _ in range(100):
        agent.update(batch, 0)
    assert agent.log_prob(batch.obs, batch.action).mean() > before


def test_the_value_of_a_state_comes_from_a_clipped_action() -> None:
    """Deviation e^2 around a mean outside the box: no sample leaves it, and those inside are the mean plus noise."""
    store = make_toy(512, dtype=torch.float64)
    agent = make(store)
    with torch.no_grad():
        agent.actor.log_std.fill_(5.0)  # bounded by 2
    obs = store.observations[:500].unsqueeze(0)
    action = agent.sample(obs, "action")
    mean, std = agent.policy_gaussian(obs)
    assert torch.equal(std, torch.full_like(std, 2.0).exp())
    noise = agent.random.normal("action", mean)
    assert torch.equal(action, (mean + std * noise).clamp(-1, 1))
    assert action.abs().max() == 1
    torch.testing.assert_close(agent.log_prob(obs, action), Normal(mean, std).log_prob(action).sum(-1))
