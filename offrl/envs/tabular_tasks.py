"""The finite tasks of docs/stochastic_benchmarks.md as tables of transitions and rewards.

Sources: the bandit and the slippery lake of the dichotomy of control (Yang et al., ICLR 2023; google-research/dice_rl), the
cliff of ACT (Gao et al., AAAI 2024; LAMDA-RL/ACT), gambling of ESPER (Paster et al., NeurIPS 2022) and the two toys of ARDT
(Tang et al., NeurIPS 2024). The rules were read in their code; the code is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from offrl.envs.hidden_grid import hidden_grid
from offrl.envs.tabular_solver import Tabular
from offrl.utils.errors import OffrlError

LAKE = ("SFFF", "FHFH", "FFFH", "HFFG")  # start, frozen, hole, goal


def bernoulli_bandit(p: float = 0.1) -> Tabular:
    """Two arms, one pull. The noise is 1 with probability p: arm 0 pays 1 if it is, arm 1 if it is not.

    So P(reward 1) is p for arm 0 and 1 - p for arm 1.
    """
    _share("p", p)
    pays = np.array([[[0, 1], [1, 0]]])
    return Tabular(np.array([1 - p, p]), np.zeros_like(pays), pays, np.ones_like(pays, dtype=bool), limit=1)


def slippery_lake(no_slip_prob: float = 1 / 3) -> Tabular:
    """FrozenLake's 4 x 4 map: 1 for reaching the goal, holes and the goal end, 100 steps.

    Actions 0 to 3 are left, down, right, up. The step goes where it was meant to with probability `no_slip_prob`, else to one
    of the two sides (noise 1 and 2), half each; at a wall it stays.
    """
    _share("no_slip_prob", no_slip_prob)
    rows, columns = len(LAKE), len(LAKE[0])
    moves = ((0, -1), (1, 0), (0, 1), (-1, 0))
    successor = np.zeros((rows * columns, 4, 3), np.int64)
    for state, action, slip in np.ndindex(successor.shape):
        down, right = moves[(action + (0, -1, 1)[slip]) % 4]
        row, column = divmod(state, columns)
        row, column = np.clip(row + down, 0, rows - 1), np.clip(column + right, 0, columns - 1)
        successor[state, action, slip] = row * columns + column
    cell = np.array(list("".join(LAKE)))[successor]
    side = (1 - no_slip_prob) / 2
    noise = np.array([no_slip_prob, side, side])
    return Tabular(noise, successor, (cell == "G").astype(np.int64), np.isin(cell, ["G", "H"]), limit=100)


def cliff_walk(epsilon: float = 0.3) -> Tabular:
    """A ledge of 5 x 3 cells from (0, 0) to the goal (4, 0): -1 a step, +15 at the goal, -25 for leaving the grid.

    Actions 0 to 3 are left, right, up, down. Left and right turn into up or down (noise 1 and 2) with probability
    epsilon / 2 each; up and down never slip. Goal and fall end; 30 steps. Observations are the coordinates, after a fall those
    of the last cell.
    """
    _share("epsilon", epsilon)
    width, height = 5, 3
    moves = ((-1, 0), (1, 0), (0, 1), (0, -1))
    successor = np.zeros((width * height, 4, 3), np.int64)
    reward, terminal = np.full_like(successor, -1), np.zeros(successor.shape, bool)
    for state, action, noise in np.ndindex(successor.shape):
        right, up = moves[action if action >= 2 or noise == 0 else noise + 1]
        row, column = divmod(state, width)
        fell = not (0 <= row + up < height and 0 <= column + right < width)
        successor[state, action, noise] = state if fell else (row + up) * width + column + right
        goal = not fell and (row + up, column + right) == (0, width - 1)
        reward[state, action, noise] += 15 * goal - 25 * fell
        terminal[state, action, noise] = goal or fell
    probabilities = np.array([1 - epsilon, epsilon / 2, epsilon / 2])
    places = np.array([[x, y] for y in range(height) for x in range(width)], np.float32)
    return Tabular(probabilities, successor, reward, terminal, 30, places)


def gambling() -> Tabular:
    """Three machines and a fair bit: the first two may pay 5 or 1 and lose far more, the third pays 1 for certain.

    Step 1 in state 0 pays nothing: action a leads to state 1 + 2 a or, if the bit is 1, 2 + 2 a. Step 2 ends, whatever the
    action: states 1 to 6 pay 5, -15, 1, -6, 1, 1. The means of the actions are -5, -2.5 and 1.
    """
    return _two_steps([[5, -15], [1, -6], [1, 1]], actions=3)


def toy() -> Tabular:
    """Two actions, three outcomes each, paid after a second, idle step: 0, 4, 6 and 6, 1, 2 (ARDT)."""
    return _two_steps([[0, 4, 6], [6, 1, 2]], actions=2)


def ms_toy() -> Tabular:
    """Two decisions and one fair bit (ARDT): first actions 1 and 2 pay 10 or 4 by the bit.

    After action 0 the bit chooses the payment of the second action: 5, 5, 0 or 6, 1, 2.
    """
    successor = np.zeros((3, 3, 2), np.int64)
    reward, terminal = np.zeros_like(successor), np.ones(successor.shape, bool)
    successor[0, 0], terminal[0, 0] = [1, 2], False
    reward[0, 1:] = [10, 4]
    reward[1], reward[2] = [[5], [5], [0]], [[6], [1], [2]]
    return Tabular(np.array([0.5, 0.5]), successor, reward, terminal, limit=2)


TASKS: dict[str, Callable[..., Tabular]] = {
    "bandit": bernoulli_bandit,
    "lake": slippery_lake,
    "cliff": cliff_walk,
    "gambling": gambling,
    "toy": toy,
    "mstoy": ms_toy,
    "grid": hidden_grid,
}


def make_task(name: str, **parameters: Any) -> Tabular:
    """A task by its name in `TASKS`, with its parameters."""
    if name not in TASKS:
        raise OffrlError(f"{name}: no such finite task; there are {', '.join(TASKS)}.")
    return TASKS[name](**parameters)


def _two_steps(payments: list[list[int]], actions: int) -> Tabular:
    """Tasks of two steps: action and noise of the first choose one of `payments`, the second pays it whatever the action."""
    outcomes = len(payments[0])
    successor = np.zeros((1 + actions * outcomes, actions, outcomes), np.int64)
    reward, terminal = np.zeros_like(successor), np.ones(successor.shape, bool)
    successor[0], terminal[0] = 1 + np.arange(actions * outcomes).reshape(actions, outcomes), False
    reward[1:] = np.ravel(payments)[:, None, None]
    return Tabular(np.full(outcomes, 1 / outcomes), successor, reward, terminal, limit=2)


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OffrlError(f"{name}={value} is a probability; it should lie between 0 and 1.")
