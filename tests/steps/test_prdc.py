"""PRDC's update against a plain restatement of the authors', in float64, and what must hold of its pull."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, batches, boxed, spec_of
from test_td3_bc import Plain as PlainTD3BC
from torch import Tensor

from offrl.agents.base import Spec
from offrl.agents.prdc import PRDC, PRDCConfig
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.data.dataset import OfflineDataset
from offrl.nets.neighbors import brute_force
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

SMALL: dict[str, Any] = {"hidden": (24, 16)}


class Plain(PlainTD3BC):
    """One seed of PRDC: TD3+BC that regresses to the nearest pair's action, found by comparing with every pair."""

    def __init__(self, agent: PRDC, states: Tensor, actions: Tensor) -> None:
        super().__init__(agent)
        self.states, self.actions = states, actions

    def pulled_to(self, s: Tensor, a: Tensor) -> Tensor:
        pi = self.box.squash(self.actor(s)).detach()
        key = torch.cat([self.cfg.beta * s, pi], 1)
        table = torch.cat([self.cfg.beta * self.states, self.actions], 1)
        distance = (key.unsqueeze(1) - table.unsqueeze(0)).square().sum(-1)
        return self.actions[distance.topk(self.cfg.k, largest=False).indices[:, -1]]


def agent_on(store: OfflineDataset, seed: int = 11, **settings: Any) -> PRDC:
    agent = PRDC(spec_of(store, (seed,)), PRDCConfig(**{**SMALL, **settings})).to(store.rewards.dtype)
    agent.setup(store)
    return agent


def train(agent: TD3BC, store: OfflineDataset, updates: int) -> None:
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 64)).run(0, updates)


@pytest.mark.parametrize("settings", [{}, {"alpha": 40.0, "beta": 0.3}, {"beta": 0.5, "k": 3}])
@pytest.mark.parametrize(
    ("updates", "tolerance", "box"),
    [(1, 1e-10, (-1, 1)), (2, 1e-10, (-1, 1)), (100, 1e-8, (-1, 1)), *((4, 1e-10, box) for box in BOXES)],
)
def test_updates_equal_the_authors(updates: int, tolerance: float, box: Bounds, settings: dict[str, Any]) -> None:
    """Same weights, batches and noise; rounding differences grow with the updates, hence the second tolerance."""
    store = boxed(make_toy(512, bias=0.2, dtype=torch.float64), box)
    agent = agent_on(store, **settings)
    plain = Plain(agent, agent.normalize(store.observations), store.actions)
    random = LaneRandom((11,))
    for t, rows in batches(store, random, updates, 64):
        plain.step(t, *rows, random.normal("target_action", rows[1].unsqueeze(0))[0])
    before = plain.distance(agent)
    train(agent, store, updates)
    assert plain.distance(agent) < tolerance < before


def test_a_huge_beta_is_td3_bc_to_the_bit() -> None:
    store = make_toy(512)
    prdc = agent_on(store, beta=1e6)
    td3_bc = TD3BC(prdc.spec, TD3BCConfig(**SMALL))
    for agent in (prdc, td3_bc):
        train(agent, store, 20)
    for (name, a), b in zip(prdc.state_dict().items(), td3_bc.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_small_beta_is_not() -> None:
    """The control of the test above: with beta = 0.1 neighbours differ, and so do the weights."""
    store = make_toy(512)
    prdc = agent_on(store, beta=0.1)
    td3_bc = TD3BC(prdc.spec, TD3BCConfig(**SMALL))
    for agent in (prdc, td3_bc):
        train(agent, store, 20)
    assert not torch.equal(prdc.actor.mlp.weights[0], td3_bc.actor.mlp.weights[0])


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_the_pull_is_no_stronger_than_td3_bcs(beta: float) -> None:
    """L_DC <= L_BC on any batch, since the row's own pair is among the candidates."""
    store = make_toy(2048, bias=0.3)
    agent = agent_on(store, beta=beta)
    for first in range(0, 2048, 256):
        batch = agent.prepare(store.transitions(torch.arange(first, first + 256).unsqueeze(0)))
        _, metrics = agent.policy_regularizer(batch, agent.act(batch.obs))
        assert metrics["dc_loss"] <= metrics["bc_loss"] * (1 + 1e-6)


def test_without_states_the_nearest_action_pulls() -> None:
    """beta = 0: the loss is the distance to the nearest action of the dataset, whatever its state."""
    store = make_toy(512, dtype=torch.float64)
    agent = agent_on(store, beta=0.0)
    batch = agent.prepare(store.transitions(torch.arange(128).unsqueeze(0)))
    action = agent.act(batch.obs)
    loss, _ = agent.policy_regularizer(batch, action)
    nearest = torch.cdist(action[0].detach(), store.actions).min(1).values
    torch.testing.assert_close(loss.detach(), (nearest.square().sum() / (128 * 2)).reshape(1), rtol=1e-6, atol=0)


def test_the_gradient_is_that_of_a_constant_target() -> None:
    """dL_DC / dpi = 2 (pi - a*) / (B A), and the dataset gets none."""
    store = make_toy(512, dtype=torch.float64)
    agent = agent_on(store)
    batch = agent.prepare(store.transitions(torch.arange(64).unsqueeze(0)))
    action = agent.act(batch.obs).detach().requires_grad_()
    loss, _ = agent.policy_regularizer(batch, action)
    (gradient,) = torch.autograd.grad(loss.sum(), action)
    states = agent.normalize(store.observations)
    rows, _ = brute_force(states, store.actions, batch.obs[0], action[0].detach(), 2.0)
    expected = 2 * (action.detach() - store.actions[rows]) / action.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_alpha_zero_regresses_to_the_nearest_pair() -> None:
    store = make_toy(512, dtype=torch.float64)
    agent = agent_on(store, alpha=0.0)
    batch = agent.prepare(store.transitions(torch.arange(64).unsqueeze(0)))
    loss, metrics = agent.actor_loss(batch)
    torch.testing.assert_close(loss.detach(), metrics["dc_loss"], rtol=1e-12, atol=0)


def test_a_dataset_is_needed() -> None:
    store = make_toy(64)
    agent = PRDC(Spec(3, 2), PRDCConfig(**SMALL))
    with pytest.raises(RuntimeError, match="setup"):
        train(agent, store, 2)
