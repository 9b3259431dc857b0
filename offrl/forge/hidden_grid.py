"""Behaviour in the hidden grid: no episode is good from start to end, but parts of episodes are.

Each episode goes about in one of three ways, drawn at its start: it walks at random; it walks to the waypoint and behind it at
random; or it starts at the waypoint and walks to the paying door. Purposeful steps are random with probability 0.1. So a policy
that succeeds from the start has to join the second way's first half to the third way's.
"""

from __future__ import annotations

import numpy as np

from offrl.envs.hidden_grid import CELLS, MARK, NUMBER, OUTCOMES, moved, paying_door, state_of, steps_to
from offrl.envs.tabular_solver import Array

EPSILON = 0.1
MODES = 3


def behaviour(variant: str) -> Array:
    """`[S, 4]`: action probabilities in the states of the task with three modes."""
    draws = OUTCOMES[variant] * MODES
    table = np.full((1 + draws * (1 + len(CELLS)), 4), 0.25)
    for draw in range(draws):
        outcome, mode = divmod(draw, MODES)
        if mode == 0:
            continue
        goal = MARK["W"] if mode == 1 else paying_door(variant, outcome)
        distance = steps_to(goal)
        for cell in CELLS:
            if mode == 1 and cell[0] <= goal[0]:  # the waypoint, and what lies behind it
                continue
            nearer = np.array([distance[NUMBER[moved(cell, action)]] < distance[NUMBER[cell]] for action in range(4)])
            if nearer.any():
                table[state_of(draws, draw, cell)] = EPSILON / 4 + (1 - EPSILON) * nearer / nearer.sum()
    return table
