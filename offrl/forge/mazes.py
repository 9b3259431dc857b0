"""Point mass in a maze, driven from place to place: D4RL's Maze2D protocol on Gymnasium-Robotics' PointMaze.

The task's goal stays in one cell, D4RL's but for the medium maze (`GOALS`), and never ends an episode: the sparse reward is 1
within 0.45 of it, the dense one exp(-distance). (In every episode the environment moves the goal up to 0.25 off the cell's
centre; a ball in the centre is always within reach.) The driver does not know the goal. It goes from one random place to the
next, so the data cover the maze, and a good policy must be stitched from pieces of trajectories (Fu et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from offrl.data.minari_write import Episode
from offrl.envs.adapters import make_gymnasium
from offrl.envs.mazes import Cell, free_cells, maze_map, steps_toward

# Gymnasium's name and time limit.
MAZES = {"umaze": ("UMaze", 300), "medium": ("Medium", 600), "large": ("Large", 800)}
# (0 and 100) of the sparse and of the dense reward: means of 500 episodes, whose seeds are 0 to 499.
REFERENCES = {
    "umaze": ((9.53, 229.74), (49.81, 240.02)),
    "medium": ((8.50, 452.19), (52.40, 471.69)),
    "large": ((5.64, 620.73), (34.68, 636.81)),
}
REFERENCES_SOURCE = "ours: uniform actions and a noiseless waypoint controller, 500 episodes each"
# Goals of sets whose cell is not D4RL's: version 0 of medium was made with the cell beside it, and keeps its numbers.
GOALS: dict[str, Cell] = {"medium": (6, 5)}
NOISE = 0.5  # standard deviation of the Gaussian on each action of the data
REACHED = 0.45  # the environment's own radius
STIFFNESS, DAMPING = 10.0, 1.0  # about critical for the ball's 4.2 kg and 100 N
OFFSET = 0.25  # a place lies up to this far off its cell's centre


class Driver:
    """Drives the ball along a shortest path of cells: PD control towards the next cell's centre.

    Two neighbouring cells form a convex room, so the straight way to the next centre meets no wall.
    """

    def __init__(self, maze: str) -> None:
        self.cells = free_cells(maze)
        layout = maze_map(maze)
        self.rows, self.columns = len(layout), len(layout[0])
        self.following = {cell: steps_toward(maze, cell) for cell in self.cells}

    def centre(self, cell: Cell) -> tuple[float, float]:
        """(x, y) of a cell in Gymnasium-Robotics' coordinates."""
        return cell[1] + 0.5 - self.columns / 2, self.rows / 2 - cell[0] - 0.5

    def cell(self, x: float, y: float) -> Cell:
        """The cell that a point lies in."""
        return int(self.rows / 2 - y), int(x + self.columns / 2)

    def action(self, state: Any, target: Any) -> tuple[float, float]:
        """Force in [-1, 1] for state (x, y, vx, vy) on the way to the point `target`."""
        x, y, vx, vy = state
        here, there = self.cell(x, y), self.cell(*target)
        aim = target if here == there else self.centre(self.following[there].get(here, there))
        force = (STIFFNESS * (aim[0] - x) - DAMPING * vx, STIFFNESS * (aim[1] - y) - DAMPING * vy)
        return min(1.0, max(-1.0, force[0])), min(1.0, max(-1.0, force[1]))

    def place(self, rng: np.random.Generator) -> tuple[float, float]:
        """A random place: any free cell, up to `OFFSET` off its centre."""
        x, y = self.centre(self.cells[rng.integers(len(self.cells))])
        return x + rng.uniform(-OFFSET, OFFSET), y + rng.uniform(-OFFSET, OFFSET)


def make_maze(maze: str, dense: bool) -> Any:
    """PointMaze with the goal in its fixed cell; its keyword arguments are plain JSON."""
    return make_gymnasium(
        f"PointMaze_{MAZES[maze][0]}-v3",
        maze_map=maze_map(maze, GOALS.get(maze)),
        reward_type="dense" if dense else "sparse",
        continuing_task=True,
        reset_target=False,
    )


def drive(
    maze: str,
    dense: bool,
    size: int,
    seeds: np.random.SeedSequence,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[Episode]:
    """Exactly `size` steps in episodes of the maze's time limit, the last one cut."""
    resets, rng = (np.random.default_rng(s) for s in seeds.spawn(2))
    env, driver, limit = make_maze(maze, dense).unwrapped, Driver(maze), MAZES[maze][1]
    episodes = []
    for start in range(0, size, limit):
        steps, seed = min(limit, size - start), int(resets.integers(2**31))
        obs, _ = env.reset(seed=seed)
        observations = {key: np.empty((steps + 1, len(obs[key])), np.float32) for key in sorted(obs)}
        actions, rewards = np.empty((steps, 2), np.float32), np.empty(steps, np.float32)
        noise = NOISE * rng.standard_normal((steps, 2))
        target = driver.place(rng)
        for t in range(steps + 1):
            for key, value in obs.items():
                observations[key][t] = value
            if t == steps:
                break
            state = obs["observation"].tolist()
            if (state[0] - target[0]) ** 2 + (state[1] - target[1]) ** 2 <= REACHED**2:
                target = driver.place(rng)
            actions[t] = np.clip(driver.action(state, target) + noise[t], -1.0, 1.0)
            obs, rewards[t], _, _, _ = env.step(actions[t])
        episodes.append(Episode(observations, actions, rewards, terminated=False, seed=seed))
        progress(start + steps)
    env.close()
    return episodes
