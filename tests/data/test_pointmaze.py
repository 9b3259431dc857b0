"""The waypoint driver: shortest paths, goals reached, coverage, and data that the environment repeats."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics")

from offrl.envs.mazes import LAYOUTS, free_cells, goal_cell, steps_toward
from offrl.forge import mazes as pointmaze


@pytest.mark.parametrize("maze", LAYOUTS)
def test_steps_follow_shortest_paths(maze: str) -> None:
    cells = free_cells(maze)
    distance = np.full((len(cells), len(cells)), np.inf)
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            if abs(a[0] - b[0]) + abs(a[1] - b[1]) <= 1:
                distance[i, j] = float(i != j)
    for k in range(len(cells)):  # Floyd and Warshall
        distance = np.minimum(distance, distance[:, k : k + 1] + distance[k : k + 1])
    assert np.isfinite(distance).all()
    target = goal_cell(maze)
    following, column = steps_toward(maze, target), distance[:, cells.index(target)]
    assert set(following) == set(cells)
    for i, cell in enumerate(cells):
        step = column[i] - column[cells.index(following[cell])]
        assert step == (0 if cell == target else 1)


def test_goals_are_d4rls() -> None:
    """`G` in the mazes of D4RL's d4rl/pointmaze/maze_model.py, as (row, column); the forge's medium sets have their own."""
    d4rl = {"open": (2, 3), "umaze": (1, 1), "eval-umaze": (1, 3), "medium": (6, 6), "eval-medium": (1, 6)}
    d4rl |= {"large": (7, 9), "eval-large": (1, 9)}
    assert {maze: goal_cell(maze) for maze in LAYOUTS} == d4rl
    assert pointmaze.GOALS == {"medium": (6, 5)}
    assert pointmaze.make_maze("medium", dense=False).unwrapped.maze.maze_map[6][5:7] == ["g", 0]


@pytest.mark.parametrize("maze", pointmaze.MAZES)
def test_driver_reaches_the_goal_and_stays(maze: str) -> None:
    env, driver = pointmaze.make_maze(maze, dense=False), pointmaze.Driver(maze)
    spent = []
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        path, cell = 0, driver.cell(*obs["achieved_goal"])
        goal = driver.cell(*obs["desired_goal"])
        assert goal == pointmaze.GOALS.get(maze, goal_cell(maze))
        while cell != goal:
            path, cell = path + 1, driver.following[goal][cell]
        rewards, truncated = [], False
        while not truncated:
            action = driver.action(obs["observation"].tolist(), obs["desired_goal"].tolist())
            obs, reward, terminated, truncated, _ = env.step(np.array(action))
            assert not terminated
            rewards.append(reward)
        first = rewards.index(1.0)
        assert all(rewards[first:])
        spent.append(first / max(path, 1))
    # A cell is 1 wide, the speed at most 5 and a step 0.01: no faster than 20 steps a cell but for the goal's radius.
    assert max(spent) < 40
    env.close()


@pytest.mark.parametrize("maze", pointmaze.MAZES)
def test_data_cover_the_maze_and_repeat_in_the_environment(
    maze: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the environment leaves its XML there
    limit = pointmaze.MAZES[maze][1]
    size = 4 * limit + 10
    sparse, dense = (pointmaze.drive(maze, kind, size, np.random.SeedSequence(7)) for kind in (False, True))
    assert [len(episode) for episode in sparse] == [limit] * 4 + [10]
    driver = pointmaze.Driver(maze)
    states = np.concatenate([episode.observations["observation"] for episode in sparse])
    visited = {driver.cell(x, y) for x, y, _, _ in states.tolist()}
    assert visited <= set(driver.cells)
    assert len(visited) > len(driver.cells) / 2
    for a, b in zip(sparse, dense):  # the same journeys under both rewards
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.observations["observation"], b.observations["observation"])
        distance = np.linalg.norm(b.observations["achieved_goal"] - b.observations["desired_goal"], axis=1)[1:]
        np.testing.assert_allclose(b.rewards, np.exp(-distance), rtol=1e-5)
        np.testing.assert_array_equal(
            a.rewards[np.abs(distance - 0.45) > 1e-5], distance[np.abs(distance - 0.45) > 1e-5] <= 0.45
        )

    spec = pointmaze.make_maze(maze, dense=True).spec
    env = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()))
    episode = dense[1]
    obs, _ = env.reset(seed=episode.seed)
    for t, action in enumerate(episode.actions):
        for key, value in obs.items():
            np.testing.assert_array_equal(episode.observations[key][t], value.astype(np.float32))
        obs, reward, terminated, truncated, _ = env.step(action)
        assert np.float32(reward) == episode.rewards[t]
        assert (terminated, truncated) == (False, t == limit - 1)
    env.close()


def reference_returns(maze: str, expert: bool, seed: int) -> tuple[float, float]:
    """Sparse and dense return of one episode: the noiseless driver going to the goal to stay, or uniform actions."""
    env, driver, rng = pointmaze.make_maze(maze, dense=False), pointmaze.Driver(maze), np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    sparse, dense, truncated = 0.0, 0.0, False
    while not truncated:
        goal = obs["desired_goal"].tolist()
        action = driver.action(obs["observation"].tolist(), goal) if expert else rng.uniform(-1, 1, 2)
        obs, reward, _, truncated, _ = env.step(np.asarray(action))
        sparse += float(reward)
        dense += float(np.exp(-np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"])))
    env.close()
    return sparse, dense


@pytest.mark.parametrize("maze", pointmaze.MAZES)
def test_references_are_what_they_say(maze: str) -> None:
    # Deviations of single expert episodes (500 of them): at most 34, 54 and 78.
    returns = np.array([reference_returns(maze, True, seed) for seed in range(5)])
    for kind in (0, 1):
        low, high = pointmaze.REFERENCES[maze][kind]
        assert abs(returns[:, kind].mean() - high) < 4 * 78 / np.sqrt(5)
        assert low < high / 4
