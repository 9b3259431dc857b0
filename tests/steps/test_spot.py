"""SPOT's two stages against a plain restatement of CORL's, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, boxed, difference, drawn, sequential, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.spot import SPOT, SPOTConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class Plain:
    """One seed with ordinary modules and optimisers."""

    def __init__(self, agent: SPOT, random: LaneRandom) -> None:
        self.cfg, self.random, self.box = agent.cfg, random, Box(agent.spec)
        self.actor = sequential(agent.actor.mlp, 0)
        self.critics = nn.ModuleList(sequential(agent.critics.mlp, 0, member) for member in (0, 1))
        self.actor_target, self.critics_target = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.encoder, self.decoder = sequential(agent.vae.encoder, 0), sequential(agent.vae.decoder, 0)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=self.cfg.actor_lr)
        self.critic_adam = torch.optim.Adam(self.critics.parameters(), lr=self.cfg.critic_lr)
        self.vae_adam = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=self.cfg.vae_lr)

    def elbo_loss(self, s: Tensor, a: Tensor, name: str) -> Tensor:
        mean, log_std = self.encoder(torch.cat([s, a], 1)).chunk(2, 1)
        std = log_std.clamp(-4, 15).exp()
        z = mean + std * self.random.normal(name, mean.unsqueeze(0))[0]
        u = self.box.squash(self.decoder(torch.cat([s, z], 1)))
        kl = -0.5 * (1 + torch.log(std.pow(2)) - mean.pow(2) - std.pow(2)).mean(-1)
        return (((u - a) ** 2).mean(1) + self.cfg.kl_weight * kl).mean()

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def q(self, critic: nn.Module, s: Tensor, a: Tensor) -> Tensor:
        return critic(torch.cat([s, a], 1)).squeeze(1)

    def step(self, number: int, rows: Tensor, store: OfflineDataset) -> None:
        cfg, s, a = self.cfg, store.observations[rows], store.actions[rows]
        if number <= cfg.vae_updates:
            self.minimise(self.vae_adam, self.elbo_loss(s, a, "spot/vae"))
            return
        with torch.no_grad():
            s2 = store.next_observations[rows]
            noise = self.random.normal("target_action", a.unsqueeze(0))[0] * cfg.policy_noise
            noise = noise.clamp(-cfg.noise_clip, cfg.noise_clip) * self.box.half
            a2 = self.box.clip(self.box.squash(self.actor_target(s2)) + noise)
            smaller = torch.min(*(self.q(critic, s2, a2) for critic in self.critics_target))
            y = store.rewards[rows] + (1 - store.terminations[rows]) * cfg.discount * smaller
        self.minimise(self.critic_adam, sum(((self.q(critic, s, a) - y) ** 2).mean() for critic in self.critics))
        if (number - cfg.vae_updates) % 2:
            return
        pi = self.box.squash(self.actor(s))
        q = self.q(self.critics[0], s, pi)
        density = self.elbo_loss(s, pi, "spot/policy")
        self.minimise(self.actor_adam, -q.mean() / q.abs().mean().detach() + cfg.weight * density)
        for target, online in ((self.actor_target, self.actor), (self.critics_target, self.critics)):
            for p2, p in zip(target.parameters(), online.parameters()):
                p2.data = (1 - cfg.tau) * p2.data + cfg.tau * p.data

    def distance(self, agent: SPOT) -> float:
        """Largest difference of any parameter from lane 0 of the agent."""
        pairs = [(agent.actor.mlp, self.actor), (agent.actor_target.mlp, self.actor_target)]
        pairs += [(agent.vae.encoder, self.encoder), (agent.vae.decoder, self.decoder)]
        found = [difference(sequential(mlp, 0), mine) for mlp, mine in pairs]
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            found += [difference(sequential(network.mlp, 0, i), mine) for i, mine in enumerate(mines)]
        return max(found)


@pytest.mark.parametrize(("updates", "box"), [(2, (-1, 1)), (4, (-1, 1)), (9, (-1, 1)), *((6, box) for box in BOXES)])
def test_updates_equal_corls(updates: int, box: Bounds) -> None:
    """Same weights, batches and noise: two updates of the density, then two of the critics for one of the actor."""
    store = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    config = SPOTConfig(vae_updates=2, weight=0.3, hidden=(24, 16), vae_hidden=(16, 16), actor_lr=1e-3)
    agent = SPOT(spec_of(store, (11,)), config).double()
    plain = Plain(agent, random := LaneRandom((11,)))
    for t, rows in drawn(store, random, updates, 64):
        plain.step(t, rows, store)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 64)).run(0, updates)
    assert plain.distance(agent) < 1e-10 < before


def test_the_density_is_fixed_after_its_stage() -> None:
    store = make_toy(512)
    agent = SPOT(spec_of(store), SPOTConfig(vae_updates=3, hidden=(8,), vae_hidden=(8,)))
    engine = Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 32))
    actor, vae = copy.deepcopy(agent.actor.state_dict()), copy.deepcopy(agent.vae.state_dict())
    engine.run(0, 3)
    assert all(torch.equal(actor[k], v) for k, v in agent.actor.state_dict().items())
    assert any(not torch.equal(vae[k], v) for k, v in agent.vae.state_dict().items())
    vae = copy.deepcopy(agent.vae.state_dict())
    engine.run(3, 4)
    assert any(not torch.equal(actor[k], v) for k, v in agent.actor.state_dict().items())
    assert all(torch.equal(vae[k], v) for k, v in agent.vae.state_dict().items())


def test_a_density_of_encodings_is_refused() -> None:
    """It would stay fitted to the first encoder, which the critics go on to change."""
    settings = {"_target_": "offrl.agents.spot.SPOT", "hidden": [8], "vae_hidden": [8], "vae_updates": 3}
    with pytest.raises(OffrlError, match=r"^SPOT first fits a model to encodings .*; set history=none"):
        make_agent(settings, Spec(3, 2), {"encoder": "gru"})
