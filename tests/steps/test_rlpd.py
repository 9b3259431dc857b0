"""RLPD's update against a plain restatement of the authors', in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, boxed, difference, drawn, sequential, spec_of
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from offrl.agents.rlpd import RLPD, RLPDConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


def normalised(mlp: nn.Module, member: int) -> nn.Sequential:
    """One critic of lane 0: linear, layer normalisation, ReLU."""
    layers: list[nn.Module] = []
    for i, layer in enumerate(sequential(mlp, 0, member)):
        layers.append(layer)
        if isinstance(layer, nn.Linear) and i // 2 < len(mlp.gains):
            norm = nn.LayerNorm(layer.out_features, eps=1e-6).double()
            norm.weight.data = mlp.gains[i // 2][0, member].detach().clone()
            norm.bias.data = mlp.offsets[i // 2][0, member].detach().clone()
            layers.append(norm)
    return nn.Sequential(*layers)


class Plain:
    """One seed with ordinary modules, optimisers and distributions."""

    def __init__(self, agent: RLPD, random: LaneRandom) -> None:
        self.cfg, self.random, self.box = agent.cfg, random, Box(agent.spec)
        self.actor = sequential(agent.actor.mlp, 0)
        self.critics = [normalised(agent.critics.mlp, i) for i in range(self.cfg.members)]
        self.critics_target = copy.deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=self.cfg.actor_lr)
        self.critic_adam = torch.optim.Adam([p for c in self.critics for p in c.parameters()], lr=self.cfg.critic_lr)
        self.alpha_adam = torch.optim.Adam([self.log_alpha], lr=self.cfg.alpha_lr)

    def sample(self, s: Tensor, name: str) -> tuple[Tensor, Tensor]:
        mean, log_sigma = self.actor(s).split(2, 1)
        sigma = log_sigma.clip(-5, 2).exp()
        law = TransformedDistribution(Normal(mean, sigma), TanhTransform(cache_size=1))
        inside = law.transforms[0](mean + sigma * self.random.normal(name, mean.unsqueeze(0))[0])
        return self.box.centre + self.box.half * inside, law.log_prob(inside).sum(1)

    def q(self, critics: list[nn.Sequential], s: Tensor, a: Tensor) -> Tensor:
        return torch.stack([critic(torch.cat([s, a], 1)).squeeze(1) for critic in critics])

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step(self, number: int, rows: Tensor, store: OfflineDataset) -> None:
        s, a, r = store.observations[rows], store.actions[rows], store.rewards[rows]
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            s2 = store.next_observations[rows]
            a2, log_pi2 = self.sample(s2, "target")
            chances = self.random.uniform("subset", (self.cfg.members,))[0]
            chosen = sorted(range(self.cfg.members), key=lambda i: float(chances[i]))[: self.cfg.subset]
            value = self.q([self.critics_target[i] for i in chosen], s2, a2).min(0).values
            if self.cfg.backup_entropy:
                value = value - alpha * log_pi2
            y = r + (1 - store.terminations[rows]) * self.cfg.discount * value
        self.minimise(self.critic_adam, ((self.q(self.critics, s, a) - y) ** 2).mean())
        for online, target in zip(self.critics, self.critics_target):
            for p, p2 in zip(online.parameters(), target.parameters()):
                p2.data = self.cfg.tau * p.data + (1 - self.cfg.tau) * p2.data
        if number % self.cfg.critic_updates:
            return
        action, log_pi = self.sample(s, "policy")
        self.minimise(self.actor_adam, (alpha * log_pi - self.q(self.critics, s, action).mean(0)).mean())
        entropy = -log_pi.mean().detach()
        self.minimise(self.alpha_adam, self.log_alpha.exp() * (entropy - (-2 / 2)))

    def distance(self, agent: RLPD) -> float:
        largest = [difference(sequential(agent.actor.mlp, 0), self.actor)]
        largest.append((self.log_alpha - agent.log_alpha[0]).abs().item())
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            largest += [difference(normalised(network.mlp, i), mine) for i, mine in enumerate(mines)]
        return max(largest)


@pytest.mark.parametrize(("subset", "entropy"), [(2, True), (1, False), (4, True)])
@pytest.mark.parametrize(("updates", "box"), [(1, (-1, 1)), (6, (-1, 1)), *((3, box) for box in BOXES)])
def test_updates_equal_the_authors(updates: int, box: Bounds, subset: int, entropy: bool) -> None:
    """Same weights, batches and noise: three updates of the critics, then one of actor and temperature."""
    store = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    settings = RLPDConfig(members=4, subset=subset, critic_updates=3, backup_entropy=entropy, hidden=(24, 16))
    agent = RLPD(spec_of(store, (11,)), settings).double()
    plain = Plain(agent, random := LaneRandom((11,)))
    for t, rows in drawn(store, random, updates, 64):
        plain.step(t, rows, store)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 64)).run(0, updates)
    assert plain.distance(agent) < 1e-10 < before


def test_subsets_are_uniform() -> None:
    """Each pair of 5 critics equally often in 4,000 draws: chi-square (9 degrees of freedom) below its 0.1 % point."""
    agent = RLPD(spec_of(make_toy(8)), RLPDConfig(members=5, hidden=(8,)))
    counts = torch.zeros(5, 5)
    values = torch.eye(5).unsqueeze(
        0
    )  # critic i is 1 in state i and 0 elsewhere: the minimum is 0 but for a subset of one
    for step in range(4000):
        agent.random.step.fill_(step)
        chosen = (agent.subset_minimum(1 - values) == 0)[0].nonzero().flatten()  # where a chosen critic is 0
        counts[chosen[0], chosen[1]] += 1
    pairs = counts[*torch.triu_indices(5, 5, 1)]
    assert pairs.sum() == 4000
    assert ((pairs - 400) ** 2 / 400).sum() < 27.9


def test_impossible_sizes_are_refused() -> None:
    for settings, sentence in (({"subset": 11}, "subset=11"), ({"critic_updates": 0}, "critic_updates=0")):
        with pytest.raises(OffrlError, match=sentence):
            make_agent({"_target_": "offrl.agents.rlpd.RLPD", **settings}, spec_of(make_toy(8)))
