"""The hidden grid: its optimum in closed form, what can be seen of it, and that its episodes have to be joined."""

from __future__ import annotations

import numpy as np
import pytest

from offrl.envs import tabular_solver as exact
from offrl.envs.hidden_grid import CELLS, OUTCOMES, hidden_grid, start_cell, state_of, steps_to
from offrl.envs.tabular_solver import Tabular
from offrl.forge import hidden_grid as behaviours
from offrl.forge.tabular import recipe


def guess(told: bool) -> Tabular:
    """A fair coin falls, and the second action should name it; `told`: the coin can be seen."""
    successor = np.array([[[1, 2]] * 2, [[1, 1]] * 2, [[2, 2]] * 2])
    reward = np.zeros((3, 2, 2), np.int64)
    reward[1, 0], reward[2, 1] = 1, 1
    terminal = np.ones((3, 2, 2), bool)
    terminal[0] = False
    looks = np.array([[0], [1], [2 if told else 1]], np.float32)
    return Tabular(np.array([0.5, 0.5]), successor, reward, terminal, 2, looks)


def test_beliefs_are_worth_what_can_be_seen() -> None:
    assert exact.optimum(guess(told=False)) == 1
    assert exact.belief_optimum(guess(told=False)) == pytest.approx(0.5)
    assert exact.belief_optimum(guess(told=True)) == pytest.approx(1)


def test_the_cues_optimum_is_the_shortest_path() -> None:
    """Two steps to the start, eleven to the door: 100 - 13, whichever door; a policy that remembers loses nothing."""
    task = hidden_grid("cue")
    assert exact.optimum(task) == pytest.approx(87)
    assert exact.belief_optimum(task) == pytest.approx(87)


def test_who_does_not_know_the_place_loses_steps_and_not_the_door() -> None:
    task = hidden_grid("place")
    state = exact.optimum(task)
    assert state == pytest.approx(100 - 2 - np.mean([11, 14, 14]))
    # Under the room's upper wall two places of three look alike; who guesses wrong sees a side wall after one step, and is back
    # after two.
    assert state - exact.belief_optimum(task) == pytest.approx(2 / 3)


@pytest.mark.parametrize("variant", OUTCOMES)
def test_cells_look_the_same_whatever_was_drawn(variant: str) -> None:
    task, outcomes = hidden_grid(variant, modes=3), OUTCOMES[variant]
    draws = 3 * outcomes
    assert task.coordinates is not None
    looks = [[task.coordinates[state_of(draws, draw, cell)] for cell in CELLS] for draw in range(draws)]
    assert all(np.array_equal(looks[0], other) for other in looks)
    assert len(np.unique(looks[0], axis=0)) < len(CELLS) / 2
    lobbies = task.coordinates[1 : 1 + draws]
    assert len(np.unique(lobbies, axis=0)) == (2 if variant == "cue" else 1)


def test_modes_change_no_transition_but_the_start() -> None:
    one, three = hidden_grid("cue"), hidden_grid("cue", modes=3)
    for draw in range(6):
        for cell in CELLS:
            a, b = state_of(2, draw // 3, cell), state_of(6, draw, cell)
            np.testing.assert_array_equal(one.reward[a, :, 0], three.reward[b, :, 0])
            np.testing.assert_array_equal(one.terminal[a, :, 0], three.terminal[b, :, 0])
    assert start_cell("cue", 0, 2) != start_cell("cue", 0, 1) == start_cell("cue", 0)


def test_a_behaviour_from_the_start_rarely_succeeds_and_the_one_from_the_waypoint_does() -> None:
    """Exact values by mode: from a state's own value, 61 and more are a success however late."""
    task, table = hidden_grid("cue", modes=3), behaviours.behaviour("cue")
    np.testing.assert_allclose(table.sum(-1), 1)
    values = (table * exact.action_values(task, table)[1]).sum(-1)[1:7]  # of the lobbies, by outcome and mode
    assert (values.reshape(2, 3)[:, 0] < -30).all()  # a random walk
    assert (values.reshape(2, 3)[:, 1] < 0).all()  # to the waypoint, and then at random
    assert (values.reshape(2, 3)[:, 2] > 85).all()  # from the waypoint
    best = exact.optimum(hidden_grid("cue"))
    made = recipe("grid/cue-n500")
    assert made is not None
    assert exact.value(made.recorded_table, made.behaviour) < best - 50
    assert steps_to(start_cell("cue", 0)).max() == 11
