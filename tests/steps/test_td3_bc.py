"""TD3+BC's update against a plain restatement of the authors', in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import best_action, make_toy
from plain import BOXES, Bounds, Box, batches, boxed, difference, sequential, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.bc import BC, BCConfig
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, Taped
from offrl.utils.random import LaneRandom


class Plain:
    """One seed of TD3+BC as the paper's algorithm box says it, with ordinary modules and optimisers."""

    def __init__(self, agent: TD3BC) -> None:
        self.cfg, self.box = agent.cfg, Box(agent.spec)
        self.actor = sequential(agent.actor.mlp, 0)
        self.critics = [sequential(agent.critics.mlp, 0, member) for member in (0, 1)]
        self.actor_target, self.critics_target = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=self.cfg.actor_lr)
        both = [p for critic in self.critics for p in critic.parameters()]
        self.critic_adam = torch.optim.Adam(both, lr=self.cfg.critic_lr)

    def q(self, critic: nn.Module, s: Tensor, a: Tensor) -> Tensor:
        return critic(torch.cat([s, a], 1)).squeeze(1)

    def step(self, t: int, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor, noise: Tensor) -> None:
        """One update from the batch (s, a, r, s', 1 - d)."""
        self.critic_step(s, a, r, s2, not_done, noise)
        if t % 2 == 0:
            self.actor_step(s, self.pulled_to(s, a))

    def pulled_to(self, s: Tensor, a: Tensor) -> Tensor:
        """The action that the actor is regressed to; relatives replace it."""
        return a

    def critic_step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor, noise: Tensor) -> None:
        cfg = self.cfg
        with torch.no_grad():
            eps = torch.clip(noise * cfg.policy_noise, -cfg.noise_clip, cfg.noise_clip)
            a2 = self.box.clip(self.box.squash(self.actor_target(s2)) + eps * self.box.half)
            smaller = torch.minimum(*(self.q(c, s2, a2) for c in self.critics_target))
            y = r + cfg.discount * not_done * smaller
        loss = sum(nn.functional.mse_loss(self.q(c, s, a), y) for c in self.critics)
        self.critic_adam.zero_grad()
        loss.backward()
        self.critic_adam.step()

    def actor_step(self, s: Tensor, a: Tensor) -> None:
        cfg = self.cfg
        pi = self.box.squash(self.actor(s))
        q = self.q(self.critics[0], s, pi)
        lam = cfg.alpha / q.abs().mean().item()
        loss = -lam * q.mean() + nn.functional.mse_loss(pi, a)
        self.actor_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
        pairs = [(self.actor, self.actor_target), *zip(self.critics, self.critics_target)]
        for online, target in pairs:
            for p, p2 in zip(online.parameters(), target.parameters()):
                p2.data = cfg.tau * p.data + (1 - cfg.tau) * p2.data

    def distance(self, agent: TD3BC) -> float:
        """Largest difference of any network's parameter from lane 0 of the agent."""
        largest = 0.0
        for network, mine in ((agent.actor, self.actor), (agent.actor_target, self.actor_target)):
            largest = max(largest, difference(sequential(network.mlp, 0), mine))
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            for member, mine in enumerate(mines):
                largest = max(largest, difference(sequential(network.mlp, 0, member), mine))
        return largest


@pytest.mark.parametrize(
    ("updates", "tolerance", "box"),
    [(1, 1e-10, (-1, 1)), (2, 1e-10, (-1, 1)), (100, 1e-8, (-1, 1)), *((4, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_the_authors(updates: int, tolerance: float, box: Bounds) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the second tolerance."""
    dataset = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    agent = TD3BC(spec_of(dataset, (11,)), TD3BCConfig(hidden=(24, 16))).double()
    plain = Plain(agent)
    random = LaneRandom((11,))
    for t, rows in batches(dataset, random, updates, 64):
        noise = random.normal("target_action", rows[1].unsqueeze(0))[0]
        plain.step(t, *rows, noise)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 64)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def test_actor_and_targets_move_on_every_second_update_only() -> None:
    dataset = make_toy(512)
    agent = TD3BC(Spec(3, 2), TD3BCConfig(hidden=(8, 8)))
    engine = Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 16))
    watched = [agent.actor, agent.actor_target, agent.critics_target]
    for step in range(6):
        before = [copy.deepcopy(n.state_dict()) for n in watched]
        engine.run(step, 1)
        moved = [any(not torch.equal(b[k], v) for k, v in n.state_dict().items()) for b, n in zip(before, watched)]
        assert moved == [step % 2 == 1] * 3


def test_the_actors_gradient_is_blind_to_the_scale_of_q() -> None:
    """lambda = alpha / mean|Q| carries no gradient: multiplying the critics by c > 0 changes nothing."""
    dataset = make_toy(512, dtype=torch.float64)
    agent = TD3BC(Spec(3, 2), TD3BCConfig(hidden=(8, 8))).double()
    batch = dataset.transitions(torch.arange(64).unsqueeze(0))

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(agent.actor_loss(batch)[0].sum(), list(agent.actor.parameters())))

    before = gradient()
    with torch.no_grad():
        agent.critics.mlp.weights[-1].mul_(50.0)
        agent.critics.mlp.biases[-1].mul_(50.0)
    for a, b in zip(before, gradient()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_beats_cloning_where_the_behaviour_is_biased() -> None:
    """The behaviour misses the optimum by 0.3 in each dimension; Q knows better, the pull alone can't."""
    dataset = make_toy(8192, bias=0.3)
    spec = Spec(3, 2, (0, 1), *dataset.observation_statistics())
    test = make_toy(2048, seed=1).observations.expand(2, -1, -1)
    error = {}
    bc = BCConfig(hidden=(64, 64), lr=2e-3)
    td3_bc = TD3BCConfig(hidden=(64, 64), actor_lr=2e-3, critic_lr=2e-3, discount=0.5)
    for cls, config in ((BC, bc), (TD3BC, td3_bc)):
        agent = cls(spec, config)
        Taped(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 128)).run(0, 1000)
        error[cls] = (agent.select_action(test) - best_action(test)).square().mean((-2, -1)).sqrt()
    assert error[BC].min() > 0.25
    assert error[TD3BC].max() < 0.1
