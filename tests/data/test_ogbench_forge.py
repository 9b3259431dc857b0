"""Sets of OGBench's form that are built here: the rules of the walks, seeds, and builds that were killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offrl.datasets import load
from offrl.envs.generators import global_generator, seeded
from offrl.forge import ogbench as forge
from offrl.forge import registry

pytest.importorskip("ogbench")


def build(path: Path, name: str, size: int, seed: int = 0) -> dict[str, Any]:
    forge.build_file(path, name, size, seed, {"made_by": "a test"}, lambda steps: None)
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def test_stitch_trajectories_stay_within_four_cells(tmp_path: Path) -> None:
    data = build(tmp_path / "a.npz", "pointmaze-medium-stitch", 2000)
    ends = np.flatnonzero(data["terminals"])
    assert np.array_equal(np.diff(ends), np.full(9, 201))
    for end in ends:
        way = data["qpos"][end - 200 : end + 1] - data["qpos"][end - 200]
        assert (
            np.abs(way).max() <= 4 * 4 + 3
        )  # four cells of 4 m, the start and the goal within 1 m of a centre each, noise


@pytest.mark.parametrize("goal", [(6, 6), (1, 6)])
def test_without_noise_a_walk_takes_the_shortest_way(goal: tuple[int, int]) -> None:
    walker = forge.Walker("pointmaze-medium", "path", noise=0.0)
    walker.away = lambda start: [goal]  # type: ignore[method-assign]
    walker.cells = [(1, 1)]
    with global_generator(seeded(1)):  # the package draws the places in start and goal cell from it
        walker.reset(3, np.random.default_rng(0))
    _, distance = walker.env.get_oracle_subgoal(walker.env.get_xy(), walker.env.cur_goal_xy)
    # 4 m a cell at 0.2 m a step, and a cell of slack for corners and for places off the centre
    allowed = int((distance[1, 1] + 1) * 4 / 0.2)
    assert any(walker.step(walker.act())[1]["success"] for _ in range(allowed))


def test_cells_four_moves_away_and_corridors() -> None:
    walker = forge.Walker("pointmaze-medium", "stitch")
    maze = walker.env.maze_map
    for start in walker.cells:
        _, distance = walker.env.get_oracle_subgoal(walker.env.ij_to_xy(start), walker.env.ij_to_xy(start))
        assert walker.away(start) == [tuple(cell) for cell in np.argwhere(distance == 4).tolist()]
    for i, j in walker.cells:
        upright = maze[i - 1, j] == maze[i + 1, j] == 0 and maze[i, j - 1] == maze[i, j + 1] == 1
        level = maze[i, j - 1] == maze[i, j + 1] == 0 and maze[i - 1, j] == maze[i + 1, j] == 1
        assert ((i, j) in walker.corners) != (upright or level)


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge, "PIECE", 2)
    whole = build(tmp_path / "whole.npz", "pointmaze-medium-stitch", 900)
    done: list[int] = []

    def kill(steps: int) -> None:
        done.append(steps)
        if len(done) == 4:
            raise KeyboardInterrupt

    path = tmp_path / "killed.npz"
    with pytest.raises(KeyboardInterrupt):
        forge.build_file(path, "pointmaze-medium-stitch", 900, 0, {"made_by": "a test"}, kill)
    assert not path.exists()
    again: list[int] = []
    forge.build_file(path, "pointmaze-medium-stitch", 900, 0, {"made_by": "a test"}, again.append)
    assert again == [600, 800, 900]  # the first two trajectories were on the disk
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []
    assert len(whole["terminals"]) == 900 + 5
    other = build(tmp_path / "other.npz", "pointmaze-medium-stitch", 900, seed=1)
    assert not np.array_equal(other["actions"], whole["actions"])


@pytest.mark.parametrize("name", ["scene-play", "cube-single-noisy"])
def test_a_trajectory_of_the_arm_depends_on_its_own_seeds_alone(name: str) -> None:
    record, seeds = forge._recorder(name), [np.random.SeedSequence([1, k]) for k in range(2)]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (record(30, seed) for seed in seeds)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.rand(3)  # noqa: NPY002
    again = record(30, np.random.SeedSequence([1, 0]))  # behind another trajectory in the same environment
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["actions"], second["actions"])
    assert np.abs(first["actions"]).max() <= 1


def test_unhealthy_scenes() -> None:
    qpos = np.zeros((2, 25), np.float32)
    assert forge._in_sight(qpos)
    for y, z, healthy in ((0.3, 0.02, False), (-0.31, 0.02, False), (-0.31, 0.066, True), (0.28, 0.02, True)):
        qpos[1, 15:17] = y, z
        assert forge._in_sight(qpos) == healthy


def test_the_forge_builds_lists_and_loads_a_set_under_its_own_name() -> None:
    data = load("forge/ogbench/pointmaze-medium-stitch-v0", task=3, size=450, seed=2, progress=False)
    assert data.info.id == "forge/ogbench/pointmaze-medium-stitch-singletask-task3-v0"
    assert data.lengths.tolist() == [200, 200, 50]
    assert data.info.provenance["size"] == 450
    assert "ogbench" in data.info.provenance["versions"]
    path = registry.ensure("forge/ogbench/pointmaze-medium-stitch-v0", size=450, seed=2)
    assert path.name == "pointmaze-medium-stitch-n450-s2-v0.npz"
    assert "forge/ogbench/cube-single-play-v0" in registry.names()
