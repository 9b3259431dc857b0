"""OGBench's files: ids, goals, rewards and masks against the package `ogbench`, masks within episodes, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl.data import ogbench_names
from offrl.data.arrays import read_npz
from offrl.data.dataset import OfflineDataset
from offrl.data.ogbench import relabel
from offrl.data.writers import writer
from offrl.datasets import load
from offrl.forge.ogbench import build_file
from offrl.utils.errors import OffrlError

package = pytest.importorskip("ogbench")
SETS = ("pointmaze-medium-navigate", "cube-single-play", "scene-play", "puzzle-3x3-play")
ROWS = {"pointmaze-medium-navigate": 1300}  # of the others: 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of each kind under its published name, and the same as its validation file."""
    folder = tmp_path_factory.mktemp("ogbench")
    for name in SETS:
        build_file(folder / f"{name}-v0.npz", name, ROWS.get(name, 60), 0, {}, lambda steps: None)
        shutil.copy(folder / f"{name}-v0.npz", folder / f"{name}-v0-val.npz")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    """Environment and training set of each set's default task, by the package."""
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SETS:
            path = str(folder / f"{name}-v0.npz")
            env, data, _ = package.make_env_and_datasets(f"{name}-singletask-v0", dataset_path=path, add_info=True)
            made[name] = (env, data)
    return made


def of(name: str, task: int) -> ogbench_names.Name:
    parsed = ogbench_names.parse(f"{name}-v0")
    assert parsed
    return parsed.with_task(task)


def near_goals(name: ogbench_names.Name, rng: np.random.Generator, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Simulator states of which each subgoal is fulfilled about half of the time, some by a hair."""
    goal, qpos = name.goal, rng.normal(size=(rows, ogbench_names.environments()[name.environment].qpos))
    if goal.xy is not None:
        qpos[:, :2] = np.array(goal.xy) + rng.normal(size=(rows, 2)) * 0.8
    for i, cube in enumerate(goal.cubes or []):
        qpos[:, 14 + 7 * i : 17 + 7 * i] = np.array(cube) + rng.normal(size=(rows, 3)) * 0.025
    if goal.drawer is not None:
        qpos[:, -2:] = [goal.drawer, goal.window] + rng.uniform(-0.07, 0.07, (rows, 2))
    wanted = np.array(goal.buttons or [0])
    return qpos.astype(np.float32), np.where(rng.uniform(size=(rows, len(wanted))) < 0.85, wanted, 1 - wanted)


# ---- goals, rewards, masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_what_the_package_makes_of_it(name: str, folder: Path, theirs: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small sets may hold no success
        ours = load(folder / f"{name}-v0.npz", task=0, cache=False)
    _, data = theirs[name]
    for key in ("observations", "actions", "rewards", "next_observations"):
        assert np.array_equal(getattr(ours, key).numpy(), data[key]), key
    assert np.array_equal(1 - ours.terminations.numpy(), data["masks"])
    ends = np.zeros(len(ours))
    ends[ours.offsets[1:].numpy() - 1] = 1
    assert np.array_equal(ends, data["terminals"])
    assert bool(ours.complete.all())
    assert not bool(ours.has_tail.any())


@pytest.mark.parametrize("name", SETS)
def test_rewards_of_all_tasks_are_those_of_the_package_and_of_its_environment(
    name: str, theirs: dict[str, Any]
) -> None:
    env, _ = theirs[name]
    inner, rng = env.unwrapped, np.random.default_rng(0)
    velocity = np.zeros((inner.model if name.startswith("point") else inner._model).nv)
    before = inner._reward_task_id
    for task in range(1, 6):
        inner._reward_task_id = task
        qpos, buttons = near_goals(of(name, task), rng)
        data: dict[str, Any] = {"qpos": qpos, "button_states": buttons}
        package.relabel_utils.relabel_dataset(f"{of(name, task).environment}-v0", env, data)
        rewards, masks = relabel(qpos, buttons, of(name, task))
        assert np.array_equal(rewards, data["rewards"])
        assert np.array_equal(masks, data["masks"].astype(bool))
        assert 0 < masks.sum() < len(masks)
        for row in range(25):
            states = (buttons[row],) if "scene" in name or "puzzle" in name else ()
            inner.set_state(qpos[row].astype(np.float64), velocity, *states)
            there = float(inner.compute_success()) - 1 if name.startswith("point") else inner.compute_reward()
            assert rewards[row] == there
    inner._reward_task_id = before


def test_the_table_of_goals_is_the_installed_package_s(theirs: dict[str, Any]) -> None:
    for name, (env, _) in theirs.items():
        known, inner = ogbench_names.environments()[of(name, 1).environment], env.unwrapped
        model = inner.model if name.startswith("point") else inner._model
        assert (known.observation, known.action, known.qpos) == (
            *env.observation_space.shape,
            *env.action_space.shape,
            model.nq,
        )
        env.reset()
        assert known.limit == env.spec.max_episode_steps
        assert known.default == inner.cur_task_id
        for task, there in zip(known.tasks, inner.task_infos, strict=True):
            goal = there.get("goal", there)
            pairs = [(task.xy, goal.get("goal_xy")), (task.cubes, goal.get("goal_xyzs", goal.get("block_xyzs")))]
            pairs.append((task.buttons, goal.get("goal_button_states", goal.get("button_states"))))
            pairs += [(task.drawer, goal.get("drawer_pos")), (task.window, goal.get("window_pos"))]
            for ours, theirs_ in pairs:
                assert (ours is None) == (theirs_ is None)
                assert ours is None or np.array_equal(ours, theirs_)


@pytest.mark.parametrize("name", ["pointmaze-giant", "antmaze-large", "humanoidmaze-medium", "antsoccer-medium"])
def test_goals_of_other_mazes(name: str) -> None:
    import gymnasium

    inner: Any = gymnasium.make(f"{name}-singletask-v0").unwrapped
    known = ogbench_names.environments()[name]
    assert [task.xy for task in known.tasks] == [list(there["goal_xy"]) for there in inner.task_infos]
    inner.reset()
    assert (known.qpos, known.tolerance, known.default) == (inner.model.nq, inner._goal_tol, inner.cur_task_id)


# ---- episodes ------------------------------------------------------------------------------------------------------


def toy(path: Path, reached: dict[int, int] | None = None, lengths: tuple[int, ...] = (5, 1, 3)) -> Path:
    """Point trajectories with that many transitions; `reached`: rows (of the file) at the goal of a task."""
    rng = np.random.default_rng(0)
    n = sum(lengths) + len(lengths)
    places = rng.uniform(-3.5, -2.5, (n, 2)).astype("f4")
    for row, task in (reached or {}).items():
        places[row] = ogbench_names.environments()["pointmaze-medium"].tasks[task - 1].xy
    ends = np.isin(np.arange(n), np.cumsum(np.array(lengths) + 1) - 1)
    actions = rng.uniform(-1, 1, (n, 2)).astype("f4")
    np.savez(path, observations=places, actions=actions, terminals=ends, qpos=places, qvel=0 * places)
    return path


@pytest.fixture
def maze(tmp_path: Path) -> OfflineDataset:
    """Task 1 is reached in rows 1, 2 (then left) and 4 of the first trajectory, whose last row holds a state only."""
    return load(toy(tmp_path / "pointmaze-medium-navigate-v0.npz", {1: 1, 2: 1, 4: 1}), task=1, cache=False)


def test_masks_within_a_trajectory_do_not_split_it(maze: OfflineDataset) -> None:
    assert maze.lengths.tolist() == [5, 1, 3]
    assert maze.terminations.tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0]
    assert maze.returns.tolist() == [-2, -1, -3]
    assert maze.return_to_go[:5].tolist() == [-2, -1, -1, -1, 0]
    window = maze.windows(torch.tensor([[0]]), 6)
    assert window.valid.flatten().tolist() == [1, 1, 1, 1, 1, 0]
    assert window.mask.flatten().tolist() == [1, 0, 0, 1, 0, 0]
    inside = maze.timesteps[1:] > 0  # rows that follow another of their trajectory
    assert torch.equal(maze.next_observations[:-1][inside], maze.observations[1:][inside])


def test_two_tasks_of_a_file_differ_in_rewards_and_masks_only(tmp_path: Path, maze: OfflineDataset) -> None:
    path = toy(tmp_path / "pointmaze-medium-stitch-v0.npz", {1: 1, 2: 1, 4: 2})
    first, second = (load(path, task=task).tensors() for task in (1, 2))  # each has a cache of its own
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == ["rewards", "terminations"]
    assert load(path, task=2).fingerprint == load(path, task=2, cache=False).fingerprint


@pytest.mark.parametrize("form", [".npz", ".hdf5", ".safetensors", "-v0"])
def test_converted_files_keep_masks_and_ends(tmp_path: Path, maze: OfflineDataset, form: str) -> None:
    dest = tmp_path / f"copy{form}"
    writer(dest)(maze)
    assert load(dest, cache=False).fingerprint == maze.fingerprint


@pytest.mark.parametrize("layout", ["compact", "regular"])
def test_the_package_s_layouts_in_memory_are_read(tmp_path: Path, maze: OfflineDataset, layout: str) -> None:
    source = toy(tmp_path / "source.npz", {1: 1, 2: 1, 4: 1})
    data = package.utils.load_dataset(str(source), compact_dataset=layout == "compact", add_info=True)
    np.savez(tmp_path / "pointmaze-medium-stitch-v0.npz", **data)
    assert load(tmp_path / "pointmaze-medium-stitch-v0.npz", task=1, cache=False).fingerprint == maze.fingerprint
    _, masks = relabel(data["qpos"], None, of("pointmaze-medium-stitch", 1))
    np.savez(tmp_path / "any.npz", **data, rewards=0.0 - masks, masks=masks)  # with rewards it is a file like others
    assert read_npz(tmp_path / "any.npz").fingerprint == maze.fingerprint


def test_a_set_without_a_success_loads_with_one_sentence(tmp_path: Path) -> None:
    path = toy(tmp_path / "pointmaze-medium-navigate-v0.npz", {1: 1})
    with pytest.warns(UserWarning, match="no row is a success of task 3"):
        assert float(load(path, task=3).terminations.sum()) == 0
    with pytest.warns(UserWarning, match="no row is a success of task 3"):  # from the cache
        load(path, task=3)


# ---- ids and errors --------------------------------------------------------------------------------------------------


def test_every_id_has_its_file_and_environment() -> None:
    import gymnasium

    assert len(ogbench_names.names()) == 47
    for text in ogbench_names.names():
        name = ogbench_names.parse(text)
        assert name
        assert gymnasium.spec(name.env_id)
        assert ogbench_names.parse(name.id) == name
        assert replace(name, task=None).id == name.file
    assert of("cube-single-play", 0).id == "cube-single-play-singletask-task2-v0"


def test_data_lists_the_ids_and_loads_what_lies_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maze: OfflineDataset
) -> None:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    found = load("pointmaze-medium-navigate-singletask-v0")
    assert found.fingerprint == maze.fingerprint
    assert found.info.id == "pointmaze-medium-navigate-singletask-task1-v0"
    assert (found.info.env_id, found.info.max_episode_steps) == ("pointmaze-medium-singletask-task1-v0", 1000)
    late = load("pointmaze-medium-navigate-v0", task=1, success_timing="post")
    assert late.info.env_kwargs == {"success_timing": "post"}


def broken(folder: Path, **changes: Any) -> Path:
    path = toy(folder / "pointmaze-medium-navigate-v0.npz", {1: 1})
    data = {**np.load(path), **changes}
    np.savez(path, **{key: value for key, value in data.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((12, 29), "f4")}, "observations has shape .* another environment's file"),
        ({"qpos": np.zeros((12, 15), "f4")}, "qpos has shape .* another environment's file"),
        ({"qpos": np.zeros((11, 2), "f4")}, "qpos has 11 rows"),
        ({"qpos": None, "rewards": None}, "missing rewards"),
        ({"actions": np.full((12, 2), np.nan, "f4")}, "actions holds nan"),
        ({"terminals": np.float32(0)}, "terminals is a single value; it must be one flag a row"),
        ({"qpos": np.float32(0)}, "qpos"),
        ({"rewards": np.float32(0)}, "rewards"),
        ({"observations": np.float32(0)}, "observations"),
        ({"actions": np.float32(0)}, "actions"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        load(broken(tmp_path, **changes), task=None if "rewards" in changes else 1, cache=False)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("cube-single-play-v0", None, "out of scope; choose a task"),
        ("cube-single-play-oraclerep-v0", None, "any goal is out of scope"),
        ("cube-single-play-singletask-task6-v0", None, "tasks 1 to 5, not 6"),
        ("cube-single-play-v0", 7, "tasks 1 to 5, not 7"),
        ("cube-single-play-singletask-task1-v0", 2, "contradicts the id"),
        ("visual-cube-single-play-singletask-v0", None, "pictures .* take cube-single-play-singletask-v0"),
        ("powderworld-easy-play-singletask-v0", None, "powderworld"),
        ("cube-single-play-singletask-v0", None, "offrl data fetch cube-single-play-singletask-task2-v0"),
        ("cube-singel-play-singletask-v0", None, "did you mean cube-single-play-singletask-v0"),
        ("hopper-medium-v2", 1, "data.task=1 chooses a task of an OGBench set"),
    ],
)
def test_names_that_are_refused(name: str, task: int | None, message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        load(name, task=task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"success_timing": "post"}, "data.success_timing=post is of OGBench's environments"),
        ({"goals": True}, "data.goals=true keeps the goals of Minari's mazes"),
    ],
)
def test_options_of_other_sources_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    names = ("observations", "actions", "rewards", "terminals")
    np.savez(path, **dict(zip(names, (np.zeros((4, 2)), np.zeros((4, 1)), np.zeros(4), np.array([0, 0, 0, 1])))))
    assert len(load(path)) == 4
    for name in (path, "hopper-medium-v2"):
        with pytest.raises(OffrlError, match=message):
            load(name, **options)


def test_a_file_whose_name_tells_nothing_and_one_without_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OffrlError, match="its name does not tell"):
        load(toy(tmp_path / "mine.npz"), task=1)
    broken(tmp_path, qpos=None)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    with pytest.raises(OffrlError, match="lacks qpos, from which the rewards of a single task"):
        load("pointmaze-medium-navigate-singletask-v0")
