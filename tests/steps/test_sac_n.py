"""SAC-N's update against a plain restatement of CORL's, in float64, and what its parts are known to be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, batches, boxed, difference, sequential, spec_of
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from offrl.agents.base import Spec
from offrl.agents.sac_n import SACN, SACNConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class Plain:
    """One seed in CORL's order, with ordinary modules, optimisers and distributions."""

    def __init__(self, agent: SACN, random: LaneRandom) -> None:
        self.cfg, self.random, self.box = agent.cfg, random, Box(agent.spec)
        self.actor = sequential(agent.actor.mlp, 0)
        self.critics = [sequential(agent.critics.mlp, 0, i) for i in range(self.cfg.members)]
        self.critics_target = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=self.cfg.actor_lr)
        every = [p for critic in self.critics for p in critic.parameters()]
        self.critic_adam = torch.optim.Adam(every, lr=self.cfg.critic_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.cfg.alpha_lr)

    def sample(self, s: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """An action of the policy, and its log-density in units of half the box, with the noise of that name."""
        mean, log_sigma = self.actor(s).split(2, 1)
        log_sigma = log_sigma.clip(-5, 2)
        law = TransformedDistribution(Normal(mean, log_sigma.exp()), TanhTransform(cache_size=1))
        inside = law.transforms[0](mean + log_sigma.exp() * self.random.normal(name, mean.unsqueeze(0))[0])
        return self.box.centre + self.box.half * inside, law.log_prob(inside).sum(1)

    def q(self, critics: list[nn.Sequential], s: Tensor, a: Tensor) -> Tensor:
        return torch.stack([critic(torch.cat([s, a], 1)).squeeze(1) for critic in critics])

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor) -> None:
        action, log_pi = self.sample(s, "policy")
        self.minimise(self.alpha_adam, (-self.log_alpha * (log_pi.detach() - 2)).mean())
        alpha = self.log_alpha.exp().detach()
        self.minimise(self.actor_adam, (alpha * log_pi - self.q(self.critics, s, action).min(0).values).mean())
        with torch.no_grad():
            a2, log_pi2 = self.sample(s2, "target")
            y = r + self.cfg.discount * not_done * (self.q(self.critics_target, s2, a2).min(0).values - alpha * log_pi2)
        self.minimise(self.critic_adam, self.critic_loss(s, a, y))
        for online, target in zip(self.critics, self.critics_target):
            for p, p2 in zip(online.parameters(), target.parameters()):
                p2.data = self.cfg.tau * p.data + (1 - self.cfg.tau) * p2.data

    def critic_loss(self, s: Tensor, a: Tensor, y: Tensor) -> Tensor:
        """EDAC adds to it."""
        return ((self.q(self.critics, s, a) - y) ** 2).mean(1).sum()

    def distance(self, agent: SACN) -> float:
        """Largest difference of any parameter from lane 0 of the agent."""
        largest = [difference(sequential(agent.actor.mlp, 0), self.actor)]
        largest.append((self.log_alpha - agent.log_alpha[0]).abs().item())
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            largest += [difference(sequential(network.mlp, 0, i), mine) for i, mine in enumerate(mines)]
        return max(largest)


def toy(box: Bounds = (-1, 1)) -> OfflineDataset:
    return boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)


def compare(agent: SACN, plain_class: Any, updates: int, box: Bounds = (-1, 1)) -> tuple[float, float]:
    """Distance from the restatement before and after the agent makes the updates that the restatement made."""
    store = toy(box)
    plain = plain_class(agent, random := LaneRandom((11,)))
    for _, rows in batches(store, random, updates, 64):
        s, a, r, s2, not_done = rows
        if not agent.cfg.normalize_obs:
            mean, std = store.observations.mean(0), store.observations.std(0, correction=0)
            s, s2 = (x * (std + 1e-3) + mean for x in (s, s2))
        plain.step(s, a, r, s2, not_done)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 64)).run(0, updates)
    return before, plain.distance(agent)


PLAIN = [(1, 1, 1e-10), (1, 2, 1e-10), (4, 1, 1e-10), (4, 2, 1e-10), (4, 50, 1e-8)]


@pytest.mark.parametrize(
    ("members", "updates", "tolerance", "box"),
    [*((*case, (-1, 1)) for case in PLAIN), *((4, 3, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_corls(members: int, updates: int, tolerance: float, box: Bounds) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the second tolerance."""
    config = SACNConfig(members=members, hidden=(24, 16), critic_lr=1e-3)
    agent = SACN(spec_of(toy(box), (11,)), config).double()
    before, after = compare(agent, Plain, updates, box)
    assert after < tolerance < before


def test_one_member_is_soft_actor_critic_and_more_are_more_pessimistic() -> None:
    """The target of N critics is the least of those that each makes alone."""
    store = make_toy(512, dtype=torch.float64)
    agent = SACN(Spec(3, 2, (0,)), SACNConfig(members=5, hidden=(8,))).double()
    batch = store.transitions(torch.arange(64).unsqueeze(0))
    alpha = torch.ones(1, dtype=torch.float64)
    least = agent.target_value(batch, alpha)
    alone = []
    for member in range(5):
        one = SACN(Spec(3, 2, (0,)), SACNConfig(members=1, hidden=(8,))).double()
        one.actor.load_state_dict(agent.actor.state_dict())
        for p, many in zip(one.critics_target.parameters(), agent.critics_target.parameters()):
            p.data = many[:, member : member + 1]
        alone.append(one.target_value(batch, alpha))
    torch.testing.assert_close(least, torch.stack(alone).amin(0), rtol=1e-12, atol=1e-12)
    assert not torch.equal(least, alone[0])


def test_the_temperature_holds_the_entropy_at_its_target() -> None:
    """alpha grows while the entropy is below the target, falls while it is above, and rests at it."""
    agent = SACN(Spec(3, 2, (0, 1, 2)), SACNConfig(target_entropy=-1.5)).double()
    entropy = torch.tensor([-3.0, -1.5, 2.0], dtype=torch.float64)
    assert agent.alpha_gradient(-entropy.unsqueeze(-1)).tolist() == [-1.5, 0, 3.5]  # descent raises the first


class Quadratic(nn.Module):
    """Q(s, a) = -|a - 0.3|^2 / (2 v) with v = 0.05, for every state."""

    def forward(self, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        return -(action - 0.3).square().sum(-1).unsqueeze(1) / (2 * 0.05)


def test_the_actor_finds_the_soft_optimum_of_a_known_critic() -> None:
    """The best density is proportional to exp(Q / alpha): a normal one of variance alpha v, which tanh hardly bends here."""
    agent = SACN(Spec(3, 2, (0, 1)), SACNConfig(hidden=(8,), actor_lr=1e-2))
    agent.critics = Quadratic()
    batch = make_toy(256).transitions(torch.arange(256).expand(2, -1))
    alpha = torch.tensor([0.1, 0.4])
    for t in range(1, 601):
        agent.random.step.fill_(t)
        action, log_pi = agent.actor(batch.obs).sample(agent.random.normal("policy", batch.action))
        agent.actor_optimizer.step(agent.actor_loss(batch, action, log_pi, alpha)[0])
    mean, std = agent.policy_gaussian(batch.obs)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.3), rtol=0, atol=0.03)
    torch.testing.assert_close(std.mean((1, 2)), (alpha * 0.05).sqrt(), rtol=0.05, atol=0)


def test_no_critic_is_refused() -> None:
    with pytest.raises(OffrlError, match=r"agent.members=0 should be at least 1"):
        make_agent({"_target_": "offrl.agents.sac_n.SACN", "members": 0}, Spec(3, 2))
