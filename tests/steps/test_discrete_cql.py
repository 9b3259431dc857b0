"""Discrete CQL's update against a plain restatement in float64, and what is known of its optimum."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import make_discrete_toy
from plain import batches, difference, sequential
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.discrete_cql import DiscreteCQL, DiscreteCQLConfig
from offrl.data.batch import Batch
from offrl.envs.tabular_solver import action_values
from offrl.envs.tabular_tasks import gambling
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

BATCH = 64


class Plain:
    """One seed of double DQN with twin critics and CQL(H)'s term, row by row as the paper writes it."""

    def __init__(self, agent: DiscreteCQL) -> None:
        self.cfg = agent.cfg
        self.critics = [sequential(agent.critics.mlp, 0, member) for member in (0, 1)]
        self.targets = copy.deepcopy(self.critics)
        both = [p for critic in self.critics for p in critic.parameters()]
        self.adam = torch.optim.Adam(both, lr=self.cfg.critic_lr)

    def step(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, not_done: Tensor) -> None:
        rows = range(len(s))
        with torch.no_grad():
            best = torch.minimum(*(critic(s2) for critic in self.critics)).argmax(1)
            next_q = torch.stack([min(target(s2[i])[best[i]] for target in self.targets) for i in rows])
            y = r + self.cfg.discount * not_done * next_q
        loss = torch.zeros(())
        for critic in self.critics:
            q = critic(s)
            at_data = torch.stack([q[i, a[i]] for i in rows])
            loss = loss + 0.5 * ((at_data - y) ** 2).mean()
            loss = loss + self.cfg.cql_alpha * (q.exp().sum(1).log() - at_data).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        for online, target in zip(self.critics, self.targets):
            for p, p2 in zip(online.parameters(), target.parameters()):
                p2.data = (1 - self.cfg.tau) * p2.data + self.cfg.tau * p.data

    def distance(self, agent: DiscreteCQL) -> float:
        pairs: list[tuple[nn.Module, list[nn.Sequential]]] = [
            (agent.critics, self.critics),
            (agent.critics_target, self.targets),
        ]
        return max(difference(sequential(net.mlp, 0, i), mine[i]) for net, mine in pairs for i in (0, 1))


@pytest.mark.parametrize(("alpha", "updates", "tolerance"), [(1.0, 1, 1e-10), (0.0, 3, 1e-10), (4.0, 30, 1e-9)])
def test_updates_equal_the_restatement(alpha: float, updates: int, tolerance: float) -> None:
    dataset = make_discrete_toy(512, dtype=torch.float64)
    spec = Spec(3, 3, (11,), *dataset.observation_statistics(), discrete=True)
    agent = DiscreteCQL(spec, DiscreteCQLConfig(cql_alpha=alpha, hidden=(24, 16))).double()
    plain = Plain(agent)
    for _, rows in batches(dataset, LaneRandom((11,)), updates, BATCH):
        plain.step(*rows)
    before = plain.distance(agent)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], BATCH)).run(0, updates)
    assert plain.distance(agent) < tolerance < before


def test_metrics_are_means_over_rows_and_critics() -> None:
    dataset = make_discrete_toy(64, dtype=torch.float64)
    agent = DiscreteCQL(Spec(3, 3, (11,), discrete=True), DiscreteCQLConfig(hidden=(8,), normalize_obs=False)).double()
    metrics = agent.critic_loss(dataset.transitions(torch.arange(64).unsqueeze(0)))[1]
    critics = [sequential(agent.critics.mlp, 0, member) for member in (0, 1)]
    q = torch.stack([critic(dataset.observations) for critic in critics])
    at_data = [float(q[member, i, dataset.actions[i]].detach()) for member in (0, 1) for i in range(64)]
    best = [float(q[:, i].min(0).values.max().detach()) for i in range(64)]
    assert metrics["q_data"].tolist() == pytest.approx([np.mean(at_data)])
    assert metrics["q_best"].tolist() == pytest.approx([np.mean(best)])


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_the_loss_is_least_where_the_bandits_gradient_vanishes(alpha: float) -> None:
    """One state, actions of share p and reward r: p (Q - r) + alpha (softmax(Q) - p) = 0, by Newton's method."""
    p, r = np.array([0.5, 0.3, 0.2]), np.array([1.0, -1.0, 2.0])
    q = r.copy()
    for _ in range(50):
        soft = np.exp(q) / np.exp(q).sum()
        hessian = np.diag(p) + alpha * (np.diag(soft) - np.outer(soft, soft))
        q -= np.linalg.solve(hessian, p * (q - r) + alpha * (soft - p))
    agent = DiscreteCQL(Spec(2, 3, discrete=True), DiscreteCQLConfig(cql_alpha=alpha, hidden=(8,))).double()
    with torch.no_grad():
        agent.critics.mlp.weights[-1].zero_()
        agent.critics.mlp.biases[-1].copy_(torch.from_numpy(q))
    action = torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])
    obs, reward = torch.zeros(1, 10, 2).double(), torch.from_numpy(r)[action]
    batch = Batch(obs, action, reward, obs, torch.zeros(1, 10).double(), action)
    (gradient,) = torch.autograd.grad(agent.critic_loss(batch)[0].sum(), agent.critics.mlp.biases[-1])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_without_the_term_it_finds_the_exact_values_of_a_finite_task() -> None:
    """Every (state, action, noise) of gambling once: linear Q of one-hot states converges to the solver's values."""
    task = gambling()
    state, action, noise = (torch.from_numpy(x.ravel()) for x in np.indices(task.successor.shape))
    place = (state.numpy(), action.numpy(), noise.numpy())
    obs = torch.eye(task.states).double()
    reward, done = torch.from_numpy(task.reward[place]).double(), torch.from_numpy(task.terminal[place]).double()
    rows = (obs[state], action, reward, obs[torch.from_numpy(task.successor[place])], 1 - done, action)
    batch = Batch(*(tensor.unsqueeze(0) for tensor in rows))
    cfg = DiscreteCQLConfig(cql_alpha=0.0, discount=1.0, tau=0.05, critic_lr=0.1, hidden=(), normalize_obs=False)
    agent = DiscreteCQL(Spec(task.states, task.actions, discrete=True), cfg).double()
    for _ in range(600):
        agent.update(batch, 0)
    q = agent.critics.q_of_all(obs.unsqueeze(0))[0]
    exact = torch.from_numpy(action_values(task)[0])
    torch.testing.assert_close(q[:, 0], exact[0].expand(2, -1), rtol=0, atol=0.05)
    assert agent.act(obs.unsqueeze(0))[0, 0] == 2  # the certain 1, not the lucky 5
