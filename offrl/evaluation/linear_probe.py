"""How much of a finite task's state an encoding of the history tells, along episodes of uniform actions.

The probe is multinomial logistic regression from encodings to the number of the state, fitted on half of the episodes and
scored on the others. The share of the encodings' variance that lies within states is 0 where an encoding is a function of the
state, and about 1 where it tells nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offrl.agents.history import HistoryAgent
from offrl.envs.tabular_env import features
from offrl.envs.tabular_solver import Tabular
from offrl.nets.history import memories

RIDGE = 1e-4  # weight of the probe's squared weights


@dataclass(frozen=True)
class Walks:
    """Episodes of uniform actions, padded to the task's limit.

    Attributes:
        obs: `[episodes, T, O]`. action: `[episodes, T]`. state: `[episodes, T]`. valid: `[episodes, T]` bool.
    """

    obs: Tensor
    action: Tensor
    state: Tensor
    valid: Tensor


@dataclass(frozen=True)
class StateProbe:
    """One number per lane each; `observation` is the accuracy of a probe that sees observations alone."""

    accuracy: list[float]
    within: list[float]
    observation: float


def walk(task: Tabular, episodes: int, seed: int = 0) -> Walks:
    """Walk with uniform actions until the episode's end or the limit."""
    rng = np.random.default_rng(seed)
    state = np.zeros((episodes, task.limit), np.int64)
    action = rng.integers(task.actions, size=state.shape)
    noise = rng.choice(len(task.noise), size=state.shape, p=task.noise)
    valid = np.ones(state.shape, bool)
    for t in range(task.limit - 1):
        place = state[:, t], action[:, t], noise[:, t]
        state[:, t + 1] = task.successor[place]
        valid[:, t + 1] = valid[:, t] & ~task.terminal[place]
    obs = torch.from_numpy(features(task)[state]).float()
    return Walks(obs, *map(torch.from_numpy, (action, state, valid)))


def encodings(agent: HistoryAgent, walks: Walks) -> Tensor:
    """z_t `[lanes, episodes, T, Z]`."""
    lanes = agent.spec.lanes
    obs = agent.normalize(walks.obs.flatten(0, 1).expand(lanes, -1, -1)).unflatten(1, walks.action.shape)
    previous = agent.as_input(walks.action.expand(lanes, -1, -1)).roll(1, 2)
    exists = torch.ones_like(previous[..., :1])
    exists[:, :, 0] = 0
    with torch.no_grad():
        found = memories(agent.encoder, obs, previous, exists)
        return agent.encoder.read(found.flatten(1, 2)).unflatten(1, walks.action.shape)


def probe_states(agent: HistoryAgent, task: Tabular, episodes: int = 400, seed: int = 0) -> StateProbe:
    """Probe an agent that learnt a finite task of which it sees observations alone."""
    walks = walk(task, episodes, seed)
    kept = walks.valid.flatten()
    state = walks.state.flatten()[kept]
    train = fitted_on(walks, kept)
    z = encodings(agent, walks).flatten(1, 2)[:, kept]
    return StateProbe(
        accuracy=[accuracy(one, state, train) for one in z],
        within=[within(one, state) for one in z],
        observation=accuracy(walks.obs.flatten(0, 1)[kept], state, train),
    )


def fitted_on(walks: Walks, kept: Tensor) -> Tensor:
    """`[n]` bool: which of the `kept` timesteps (`[episodes * T]` bool) a probe is fitted on, those of every other episode."""
    even = torch.arange(len(walks.valid)) % 2 == 0
    return even.unsqueeze(1).expand_as(walks.valid).flatten()[kept]


def accuracy(x: Tensor, label: Tensor, train: Tensor, steps: int = 200) -> float:
    """Share of right labels among the rows that are not `train`, by logistic regression on those that are.

    Args:
        x: `[n, X]`. label: `[n]` integers. train: `[n]` bool. steps: most iterations of L-BFGS.
    """
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    names, number = label.unique(return_inverse=True)
    probe = nn.Linear(x.shape[1], len(names))
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(probe(x[train]), number[train]) + RIDGE * probe.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return float((probe(x[~train]).argmax(-1) == number[~train]).float().mean())


def within(z: Tensor, label: Tensor) -> float:
    """The share of z's variance `[n, Z]` that lies within labels."""
    names, number = label.unique(return_inverse=True)
    count = torch.bincount(number, minlength=len(names)).unsqueeze(1)
    means = torch.zeros(len(names), z.shape[1], dtype=z.dtype).index_add_(0, number, z) / count
    return float((z - means[number]).square().sum() / (z - z.mean(0)).square().sum())
