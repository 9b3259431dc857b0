"""Maze layouts of D4RL's Maze2D (`#` wall, `.` free, `G` free and the fixed goal), rows from the top."""

from __future__ import annotations

from collections import deque

LAYOUTS = {
    "open": ("#######", "#.....#", "#..G..#", "#.....#", "#######"),
    "umaze": ("#####", "#G..#", "###.#", "#...#", "#####"),
    "eval-umaze": ("#####", "#..G#", "#.###", "#...#", "#####"),
    "medium": ("########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.G#", "########"),
    "eval-medium": ("########", "#.....G#", "#.#.##.#", "#....#.#", "###..###", "#......#", "#..##..#", "########"),
    "large": (
        *("############", "#....#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#"),
        *("#..#.#.....#", "##.#.#.#.###", "#..#...#.G.#", "############"),
    ),
    "eval-large": (
        *("############", "#..#...#.G.#", "##.###.#.#.#", "#..#.#.....#", "#.##.#..##.#"),
        *("#......#...#", "#.##.#.#.###", "#....#.....#", "############"),
    ),
}
Cell = tuple[int, int]


def maze_map(name: str, goal: Cell | None = None) -> list[list[int | str]]:
    """The layout as Gymnasium-Robotics takes it: 1 wall, 0 free, "g" the goal, D4RL's or the given cell."""
    made: list[list[int | str]] = [[int(tile == "#") for tile in row] for row in LAYOUTS[name]]
    row, column = goal or goal_cell(name)
    made[row][column] = "g"
    return made


def free_cells(name: str) -> list[Cell]:
    """Cells (row, column) without a wall, in reading order."""
    return [(r, c) for r, row in enumerate(LAYOUTS[name]) for c, tile in enumerate(row) if tile != "#"]


def goal_cell(name: str) -> Cell:
    """The cell of the fixed goal."""
    return next((r, c) for r, c in free_cells(name) if LAYOUTS[name][r][c] == "G")


def steps_toward(name: str, target: Cell) -> dict[Cell, Cell]:
    """For every free cell the neighbour that comes next on a shortest path to `target` (breadth first)."""
    free, following, queue = set(free_cells(name)), {target: target}, deque([target])
    while queue:
        row, column = cell = queue.popleft()
        for neighbour in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if neighbour in free and neighbour not in following:
                following[neighbour] = cell
                queue.append(neighbour)
    return following
