"""ReBRAC's update against a plain restatement of the authors', in float64, and what must hold of its two penalties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, boxed, difference, drawn, pool, sequential, spec_of
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.rebrac import ReBRAC, ReBRACConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

BATCH = 64


def normalised(mlp: nn.Module, member: int | None) -> nn.Sequential:
    """One critic, or V, of lane 0 with its layer normalisation, as ordinary layers."""
    layers: list[nn.Module] = []
    at = (0,) if member is None else (0, member)
    for i, layer in enumerate(sequential(mlp, 0, member)):
        layers.append(layer)
        if isinstance(layer, nn.ReLU) and len(mlp.gains):
            norm = nn.LayerNorm(layers[-2].out_features, eps=1e-6).double()
            norm.weight.data = mlp.gains[i // 2][at].detach().clone()
            norm.bias.data = mlp.offsets[i // 2][at].detach().clone()
            layers.append(norm)
    return nn.Sequential(*layers)


class Plain:
    """One seed of ReBRAC with ordinary modules and optimisers."""

    def __init__(self, agent: ReBRAC) -> None:
        self.cfg, self.box = agent.cfg, Box(agent.spec)
        self.actor = sequential(agent.actor.mlp, 0)
        self.critics = [normalised(agent.critics.mlp, member) for member in range(self.cfg.members)]
        self.actor_target, self.critics_target = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        both = [p for critic in self.critics for p in critic.parameters()]
        if self.cfg.awr:
            self.value = normalised(agent.value, None)
            self.value_adam = torch.optim.Adam(self.value.parameters(), lr=self.cfg.critic_lr)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=self.cfg.actor_lr)
        self.critic_adam = torch.optim.Adam(both, lr=self.cfg.critic_lr)

    def pool(self, q: Tensor) -> Tensor:
        return pool(q, self.cfg.pooling, self.cfg.pessimism)

    def q(self, critics: list[nn.Sequential], s: Tensor, a: Tensor) -> Tensor:
        return torch.stack([critic(torch.cat([s, a], 1)).squeeze(1) for critic in critics])

    def minimise(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def follow(self, target: nn.Module, online: nn.Module) -> None:
        for p2, p in zip(target.parameters(), online.parameters()):
            p2.data = (1 - self.cfg.tau) * p2.data + self.cfg.tau * p.data

    def step(self, i: int, rows: dict[str, Tensor], noise: Tensor) -> None:
        """Update number i = 0, 1, 2, ..."""
        cfg, s, a = self.cfg, rows["s"], rows["a"]
        with torch.no_grad():
            eps = torch.clip(noise * cfg.policy_noise, -cfg.noise_clip, cfg.noise_clip)
            a2 = self.box.clip(self.box.squash(self.actor_target(rows["s2"])) + eps * self.box.half)
            penalty = ((a2 - rows["a2"]) ** 2).sum(1) * rows["known"]
            next_q = self.pool(self.q(self.critics_target, rows["s2"], a2)) - cfg.critic_bc * penalty
            y = rows["r"] + (1 - rows["d"]) * cfg.discount * next_q
        self.minimise(self.critic_adam, ((self.q(self.critics, s, a) - y) ** 2).mean(1).sum(0))
        if i % 2 == 0:
            pi = self.box.squash(self.actor(s))
            q = self.pool(self.q(self.critics, s, pi))
            lam = 1 / q.abs().mean().item()
            before = copy.deepcopy(self.actor)
            weight = self.weight(s, a) if cfg.awr else 1.0
            self.minimise(self.actor_adam, (cfg.actor_bc * weight * ((pi - a) ** 2).sum(1) - lam * q).mean())
            self.follow(self.actor_target, before)
            for target, online in zip(self.critics_target, self.critics):
                self.follow(target, online)

        if cfg.awr:
            u = self.advantage(s, a)
            self.minimise(self.value_adam, (torch.where(u > 0, cfg.expectile, 1 - cfg.expectile) * u**2).mean())

    def advantage(self, s: Tensor, a: Tensor) -> Tensor:
        return self.q(self.critics, s, a).min(0).values.detach() - self.value(s).squeeze(1)

    def weight(self, s: Tensor, a: Tensor) -> Tensor:
        return torch.clip(torch.exp(self.cfg.awr_beta * self.advantage(s, a).detach()), max=100)

    def distance(self, agent: ReBRAC) -> float:
        """Largest difference of any parameter from lane 0 of the agent."""
        largest = 0.0
        for network, mine in ((agent.actor, self.actor), (agent.actor_target, self.actor_target)):
            largest = max(largest, difference(sequential(network.mlp, 0), mine))
        for network, mines in ((agent.critics, self.critics), (agent.critics_target, self.critics_target)):
            for member, mine in enumerate(mines):
                largest = max(largest, difference(normalised(network.mlp, member), mine))
        if self.cfg.awr:
            largest = max(largest, difference(normalised(agent.value, None), self.value))
        return largest


def cut_store(box: Bounds = (-1, 1)) -> OfflineDataset:
    """The toy task where every second episode is cut off, and not ended; a' of its last row is unknown, or that of a tail."""
    store = make_toy(512, bias=0.2, dtype=torch.float64)
    store.terminations[3::8] = 0
    store.has_tail[2::4] = True
    store.tail_actions[2::4] = store.actions[:32].flip(0)
    return boxed(store, box)


def make(store: OfflineDataset, **settings: Any) -> ReBRAC:
    return ReBRAC(spec_of(store, (11,)), ReBRACConfig(**{"hidden": (24, 16), **settings})).double()


@pytest.mark.parametrize(
    "settings",
    [
        {"actor_lr": 1e-3, "critic_lr": 1e-3},
        {"actor_bc": 0.1, "critic_bc": 0.5, "discount": 0.999},
        {"critic_norm": False, "critic_bc": 0.0},
        {"members": 10, "pooling": "lcb", "pessimism": 0.5},
        {"awr": True, "awr_beta": 20.0, "expectile": 0.9, "actor_bc": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("updates", "tolerance", "box"),
    [(1, 1e-10, (-1, 1)), (3, 1e-10, (-1, 1)), (100, 1e-8, (-1, 1)), *((3, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_the_authors(updates: int, tolerance: float, box: Bounds, settings: dict[str, Any]) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the second tolerance."""
    store = cut_store(box)
    agent = make(store, **settings)
    plain, random = Plain(agent), LaneRandom((11,))
    for t, rows in drawn(store, random, updates, BATCH):
        # a' is the next row's action; at an episode's end that of its tail, if there is one.
        last, episode = rows % 4 == 3, rows // 4
        known = ~last | store.has_tail[episode]
        batch = {
            "s": store.observations[rows],
            "a": store.actions[rows],
            "r": store.rewards[rows],
            "s2": store.next_observations[rows],
            "d": store.terminations[rows],
            "a2": torch.where(last.unsqueeze(1), store.tail_actions[episode], store.actions[(rows + 1) % len(store)]),
            "known": known.double(),
        }
        plain.step(t - 1, batch, random.normal("target_action", batch["a"].unsqueeze(0))[0])
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH, fields=agent.batch_fields)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def test_the_targets_penalty_is_the_distance_from_the_next_action() -> None:
    """y(beta_2 = 0) - y(beta_2) = gamma (1 - d) beta_2 |a~ - a'|^2, and nothing where a' is unknown."""
    store = cut_store()
    free, bound = (make(store, critic_bc=beta) for beta in (0.0, 0.7))
    batch = free.prepare(store.transitions(torch.arange(128).unsqueeze(0), free.batch_fields))
    gap = free.target_value(batch) - bound.target_value(batch)
    action = free.target_action(batch)
    distance = (action - batch.next_action).square().sum(-1)
    expected = 0.99 * 0.7 * batch.mask * distance * batch.has_next_action
    torch.testing.assert_close(gap, expected, rtol=1e-12, atol=1e-14)
    assert gap[0, 3] == 0  # cut off
    assert gap[0, 7] == 0  # ended
    assert (gap[0, :3] > 0).all()


def test_the_actors_penalty_is_summed_over_dimensions() -> None:
    """With critics that are constant, the gradient in the action is that of the penalty alone: 2 beta_1 (pi - a) / B."""
    store = cut_store()
    agent = make(store, actor_bc=0.3)
    with torch.no_grad():
        agent.critics.mlp.weights[-1].zero_()
    batch = agent.prepare(store.transitions(torch.arange(64).unsqueeze(0), agent.batch_fields))
    action = agent.act(batch.obs).detach().requires_grad_()
    agent.act = lambda obs: action  # type: ignore[method-assign]
    loss, metrics = agent.actor_loss(batch)
    (gradient,) = torch.autograd.grad(loss.sum(), action)
    torch.testing.assert_close(gradient, 2 * 0.3 * (action.detach() - batch.action) / 64, rtol=1e-12, atol=1e-15)
    expected = (action.detach() - batch.action).square().sum(-1).mean()
    torch.testing.assert_close(metrics["bc_loss"][0], expected)


def test_the_actor_moves_first_and_its_target_a_step_behind() -> None:
    store = cut_store()
    agent = make(store)
    engine = Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH, fields=agent.batch_fields))
    start, actors = copy.deepcopy(agent.actor_target.state_dict()), []
    for step in range(4):
        before = [copy.deepcopy(n.state_dict()) for n in (agent.actor, agent.critics_target)]
        engine.run(step, 1)
        for old, new in zip(before, (agent.actor, agent.critics_target)):
            moved = any(not torch.equal(old[k], v) for k, v in new.state_dict().items())
            assert moved == (step % 2 == 0)
        actors.append(before[0])
    for key, now in agent.actor_target.state_dict().items():
        # The first average is of the initial actor with itself; the second takes in the actor of the first step.
        torch.testing.assert_close(now, 0.995 * start[key] + 0.005 * actors[2][key], rtol=1e-12, atol=1e-15)


def test_normalised_critics_are_bounded_everywhere() -> None:
    """The last hidden layer has norm at most sqrt(width), so |Q| <= |w| sqrt(width) + |b|, however far the input."""
    store = cut_store()
    far = torch.randn(1, 256, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e6
    action = torch.zeros(1, 256, 2, dtype=torch.float64)
    for norm in (True, False):
        agent = make(store, critic_norm=norm)
        weight, bias = (p.detach() for p in agent.critics.mlp.layers[-2:])
        bound = weight[0].norm(dim=-1) * weight.shape[-1] ** 0.5 + bias[0].abs()
        q = agent.critics(far, action)[0].abs()
        assert bool((q <= bound).all()) == norm


def test_initial_weights_are_the_authors() -> None:
    agent = ReBRAC(Spec(3, 2), ReBRACConfig(hidden=(64, 64, 64)))
    for mlp, bound in ((agent.actor.mlp, 1e-3), (agent.critics.mlp, 3e-3)):
        assert all((bias == 0.1).all() for bias in mlp.biases[:-1])
        assert bound / 2 < mlp.weights[-1].abs().max() <= bound
        assert mlp.biases[-1].abs().max() <= bound
        assert 0.9 / 8 < mlp.weights[1].abs().max() <= 1 / 8
    assert torch.equal(agent.obs_scale, torch.ones(3))


def test_options_that_are_off_change_nothing() -> None:
    """Their numbers are unused while `pooling` is min and `awr` false; and there is no V."""
    store, agents = cut_store(), []
    for settings in ({}, {"pessimism": 3.0, "awr_beta": 9.0, "expectile": 0.9}):
        agent = make(store, **settings)
        Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH, fields=agent.batch_fields)).run(0, 4)
        agents.append(agent.state_dict())
    assert all(torch.equal(tensor, agents[1][key]) for key, tensor in agents[0].items())
    assert not any("value" in key for key in agents[0])


def test_awr_weights_have_an_upper_bound_and_grow_with_the_advantage() -> None:
    store = cut_store()
    agent = make(store, awr=True, awr_beta=50.0)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH, fields=agent.batch_fields)).run(0, 50)
    batch = agent.prepare(store.transitions(torch.arange(64).unsqueeze(0), agent.batch_fields))
    weight, order = agent.awr_weight(batch)[0], agent.advantage(batch)[0].argsort()
    assert weight.max() <= 100
    assert (weight[order].diff() >= 0).all()
    assert weight.max() > weight.min()


def test_gelu_networks_start_from_glorots_weights() -> None:
    agent = ReBRAC(Spec(3, 2), ReBRACConfig(hidden=(64, 64), activation="gelu"))
    for mlp in (agent.actor.mlp, agent.critics.mlp):
        assert mlp.activation == "gelu"
        assert all((bias == 0).all() for bias in mlp.biases)
        assert 0.97 < mlp.weights[1].abs().max() / (6 / 128) ** 0.5 <= 1
