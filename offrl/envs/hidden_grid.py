"""A maze whose observation is not its state: the cells around the agent, which look alike in many places.

The maze is a room below a corridor with a door at each end, A and B; one door pays 100, the other costs 100, both end the
episode, and each step costs 1. Actions 0 to 3 are left, down, right, up; a step into a wall stays. In the variant `cue` the
paying door is drawn at the start and told once, before the agent stands in the maze: later observations do not say it, so that
a policy has to remember. In the variant `place` A pays and the start is one of three places of the room's last row, which look
alike, so that a policy has to find out where it is.

States: 0, before the draw; then a lobby for each outcome of the draw, where a cue is shown; then the cells. `modes = 3` is for
behaviour data: the draw then also chooses how an episode's behaviour goes about (offrl.forge.hidden_grid), and the third way
starts at the waypoint between room and corridor. Neither is observed, and a mode changes no transition.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from offrl.envs.tabular_solver import Tabular
from offrl.utils.errors import OffrlError

MAZE = (
    "###########",
    "#A.......B#",
    "#####.#####",
    "#####W#####",
    "#####.#####",
    "#.........#",
    "#.........#",
    "#.........#",
    "#.1..0..2.#",
    "###########",
)
CELLS = [(r, c) for r, row in enumerate(MAZE) for c, mark in enumerate(row) if mark != "#"]
NUMBER = {cell: number for number, cell in enumerate(CELLS)}
MARK = {mark: cell for cell in CELLS for mark in [MAZE[cell[0]][cell[1]]] if mark != "."}
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
DOOR, STEP, LIMIT = 100, -1, 40
OUTCOMES = {"cue": 2, "place": 3}  # of the draw: the paying door, or the start


def hidden_grid(variant: str = "cue", modes: int = 1) -> Tabular:
    """The task; its states are numbered as by `state_of`.

    Raises:
        OffrlError: an unknown variant.
    """
    if variant not in OUTCOMES or modes not in (1, 3):
        raise OffrlError(
            f"{variant} with {modes} modes: the hidden grid has the variants cue and place, and 1 mode or 3."
        )
    draws = OUTCOMES[variant] * modes
    states = 1 + draws * (1 + len(CELLS))
    successor = np.zeros((states, 4, draws), np.int64)
    reward, terminal = np.full(successor.shape, STEP), np.zeros(successor.shape, bool)
    features = np.zeros((states, 12), np.float32)
    for draw in range(draws):
        outcome, mode = divmod(draw, modes)
        lobby = 1 + draw
        successor[0, :, draw] = lobby
        successor[lobby] = state_of(draws, draw, start_cell(variant, outcome, mode))
        if variant == "cue":
            features[lobby, 9 + outcome] = 1
        for cell in CELLS:
            here = state_of(draws, draw, cell)
            features[here, :9], features[here, 11] = _patch(cell), 1
            for action in range(4):
                there = moved(cell, action)
                successor[here, action] = state_of(draws, draw, there)
                if there in (MARK["A"], MARK["B"]):
                    reward[here, action] += DOOR if there == paying_door(variant, outcome) else -DOOR
                    terminal[here, action] = True
    return Tabular(np.full(draws, 1 / draws), successor, reward, terminal, LIMIT, features)


def state_of(draws: int, draw: int, cell: tuple[int, int]) -> int:
    """Number of the state of a cell after a draw."""
    return 1 + draws + draw * len(CELLS) + NUMBER[cell]


def start_cell(variant: str, outcome: int, mode: int = 0) -> tuple[int, int]:
    return MARK["W"] if mode == 2 else MARK["0" if variant == "cue" else str(outcome)]


def paying_door(variant: str, outcome: int) -> tuple[int, int]:
    return MARK["B" if variant == "cue" and outcome else "A"]


def moved(cell: tuple[int, int], action: int) -> tuple[int, int]:
    """The cell after an action."""
    there = (cell[0] + MOVES[action][0], cell[1] + MOVES[action][1])
    return there if there in NUMBER else cell


def steps_to(goal: tuple[int, int]) -> NDArray[np.int64]:
    """`[cells]`: number of steps from each cell to a goal."""
    distance, queue = np.full(len(CELLS), -1, np.int64), deque([goal])
    distance[NUMBER[goal]] = 0
    while queue:
        cell = queue.popleft()
        for action in range(4):
            near = moved(cell, action)  # moves can be undone
            if distance[NUMBER[near]] < 0:
                distance[NUMBER[near]] = distance[NUMBER[cell]] + 1
                queue.append(near)
    return distance


def _patch(cell: tuple[int, int]) -> list[float]:
    """The 3 x 3 cells around one: 1 a wall, 0.5 a door (both look alike), 0 free."""
    looks = {"#": 1.0, "A": 0.5, "B": 0.5}
    return [looks.get(MAZE[cell[0] + down][cell[1] + right], 0.0) for down in (-1, 0, 1) for right in (-1, 0, 1)]
