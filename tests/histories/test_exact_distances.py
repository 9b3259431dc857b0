"""The hidden grid's exact bisimulation distances (benchmarks/tables/exact_distances.py), under uniform actions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from offrl.envs.hidden_grid import MARK, hidden_grid, moved, state_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "tables"))
from exact_distances import DRAWS, exact_distances, states_of

GAMMA = 0.9


def test_exact_distances_bound_differences_of_values() -> None:
    """Both agents of a pair take the same uniform actions, so that |V - V'| <= d; equality where the paying door alone differs.

    Each state takes each action once, so that the behaviour is uniform, and rewards have a std of 0.01: their unit is a step.
    """
    task = hidden_grid("cue")
    states = np.repeat(np.arange(1, task.states), 4)
    actions = np.tile(np.arange(4), task.states - 1)
    rewards = torch.tensor([0.0, 0.02]).double()
    rewards = 0.01 * (rewards - rewards.mean()) / rewards.std()
    dataset = SimpleNamespace(actions=torch.from_numpy(actions), rewards=rewards)
    distance = exact_distances(dataset, torch.from_numpy(states), GAMMA).double().numpy()[:-1, :-1]

    value = np.zeros(task.states)
    for _ in range(400):
        ahead = task.reward[:, :, 0] + GAMMA * np.where(task.terminal[:, :, 0], 0, value[task.successor[:, :, 0]])
        value = np.where(np.arange(task.states) > 0, ahead.mean(1), 0)
    apart = np.abs(value[:, None] - value[None])[1:, 1:]
    assert (apart <= distance[1:, 1:] + 1e-3).all()  # float32 of sums up to 200 / (1 - 0.9)
    assert np.abs(np.diag(distance)).max() == 0
    np.testing.assert_allclose(distance, distance.T, atol=1e-4)
    # Beside door A one action ends both episodes, 200 apart; the next states of the others differ by the paying door, too.
    left = state_of(DRAWS, 0, (1, 2)), state_of(DRAWS, 1, (1, 2))
    others = [[state_of(DRAWS, draw, moved((1, 2), action)) for draw in (0, 1)] for action in (1, 2, 3)]
    expected = (200 + GAMMA * sum(distance[a, b] for a, b in others)) / 4
    np.testing.assert_allclose(distance[left], expected, rtol=1e-5)


def test_rows_have_the_states_of_their_episodes() -> None:
    """Two episodes that are made up: down from the waypoint, and a first step in the room."""
    task = hidden_grid("cue")
    assert task.coordinates is not None
    below = moved(MARK["W"], 1)
    episodes = [
        [(0, 0), (2, 3), (state_of(DRAWS, 1, MARK["W"]), 1), (state_of(DRAWS, 1, below), 2)],
        [(0, 1), (1, 2), (state_of(DRAWS, 0, MARK["0"]), 0)],
        [(0, 1), (1, 2)],
    ]
    rows = [row for episode in episodes for row in episode]
    dataset = SimpleNamespace(
        observations=torch.from_numpy(task.coordinates[[state for state, _ in rows]]),
        actions=torch.tensor([[action] for _, action in rows]),
        offsets=torch.tensor([0, 4, 7, 9]),
    )
    assert states_of(dataset).tolist() == [state if state else -1 for state, _ in rows]
