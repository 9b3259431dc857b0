"""Minari datasets: files as Minari writes them, read without the package, against Minari's own iteration."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from offrl.data.minari import observation_leaves, read_minari
from offrl.datasets import load
from offrl.envs.chosen import warn_of_other_maze
from offrl.forge import registry
from offrl.utils.errors import OffrlError

INFINITY = float("inf")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def box(*shape: int, bound: float = INFINITY, dtype: str = "float64") -> dict[str, Any]:
    return {
        "type": "Box",
        "dtype": dtype,
        "shape": list(shape),
        "low": np.full(shape, -bound).tolist(),
        "high": np.full(shape, bound).tolist(),
    }


def spaces(kind: str, **subspaces: Any) -> dict[str, Any]:
    return {"type": kind, "subspaces": subspaces}


def values(space: dict[str, Any], steps: int, rng: np.random.Generator) -> Any:
    if space["type"] == "Dict":
        return {key: values(subspace, steps, rng) for key, subspace in space["subspaces"].items()}
    if space["type"] == "Discrete":
        return rng.integers(0, space["n"], steps) + space.get("start", 0)
    if space["type"] == "Text":
        return np.array([b"go to the door"] * steps)
    scale = space["high"] if np.isfinite(space["high"]).all() else 1.0
    return (rng.uniform(-1, 1, (steps, *space["shape"])) * scale).astype(space["dtype"])


def episodes(observation: dict[str, Any], action: dict[str, Any], lengths: tuple[int, ...] = (5, 1, 9)) -> list[dict]:
    rng = np.random.default_rng(0)
    out = []
    for number, length in enumerate(lengths):
        flags = np.zeros((2, length), bool)
        if number < len(lengths) - 1:  # the last one is cut off
            flags[number % 2, -1] = True
        out.append(
            {
                "observations": values(observation, length + 1, rng),
                "actions": values(action, length, rng),
                "rewards": rng.standard_normal(length),
                "terminations": flags[0],
                "truncations": flags[1],
            }
        )
    return out


def store_tree(group: h5py.Group, tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            store_tree(group.create_group(key), value)
        else:
            group.create_dataset(key, data=value, chunks=True, maxshape=(None, *value.shape[1:]))


def write(folder: Path, observation: dict[str, Any], action: dict[str, Any], data: list[dict], **metadata: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data/main_data.hdf5", "w", track_order=True) as file:
        for number, episode in enumerate(data):
            store_tree(file.create_group(f"episode_{number}"), episode)
    described = {
        "total_episodes": len(data),
        "total_steps": sum(len(episode["terminations"]) for episode in data),
        "data_format": "hdf5",
        "observation_space": json.dumps(observation),
        "action_space": json.dumps(action),
        "dataset_id": folder.name,
        "minari_version": "0.5.4",
    }
    (folder / "data/metadata.json").write_text(json.dumps(described | metadata))
    return folder


def spec(env_id: str, limit: int | None = None, **kwargs: Any) -> str:
    return json.dumps({"id": env_id, "max_episode_steps": limit, "kwargs": kwargs, "additional_wrappers": []})


def test_box_dataset_equals_its_episodes_one_by_one(tmp_path: Path) -> None:
    observation, action = box(4), box(2, bound=1.0, dtype="float32")
    data = episodes(observation, action, (5, 1, 9, *[3] * 12))  # episode_10 must not come before episode_2
    store = load(write(tmp_path / "set-v0", observation, action, data))
    assert store.lengths.tolist() == [len(episode["rewards"]) for episode in data]
    start = 0
    for episode in data:
        stop = start + len(episode["rewards"])
        seen = episode["observations"].astype("f4")
        np.testing.assert_array_equal(store.observations[start:stop], seen[:-1])
        np.testing.assert_array_equal(store.next_observations[start:stop], seen[1:])
        np.testing.assert_array_equal(store.actions[start:stop], episode["actions"])
        np.testing.assert_array_equal(store.rewards[start:stop], episode["rewards"].astype("f4"))
        np.testing.assert_array_equal(store.terminations[start:stop], episode["terminations"].astype("f4"))
        start = stop
    assert store.complete.tolist() == [True] * 14 + [False]
    assert (store.info.id, store.info.action_low, store.info.action_high) == ("set-v0", -1.0, 1.0)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_reads_what_minari_writes(root: Path) -> None:
    minari = pytest.importorskip("minari")
    from gymnasium import spaces as gym_spaces
    from minari.data_collector import EpisodeBuffer

    data = episodes(box(3), box(2, bound=1.0))
    for data_format in ("hdf5", "arrow"):
        name = f"test/{data_format}set-v0"
        minari.create_dataset_from_buffers(
            name,
            [EpisodeBuffer(id=number, **episode) for number, episode in enumerate(data)],
            observation_space=gym_spaces.Box(-np.inf, np.inf, (3,), np.float64),
            action_space=gym_spaces.Box(-1, 1, (2,), np.float64),
            data_format=data_format,
        )
        store = load(name)
        theirs = list(minari.load_dataset(name).iterate_episodes())
        seen = np.concatenate([episode.observations[:-1] for episode in theirs]).astype("f4")
        np.testing.assert_array_equal(store.observations, seen)
        rewards = np.concatenate([episode.rewards for episode in theirs]).astype("f4")
        np.testing.assert_array_equal(store.rewards, rewards)
        assert store.info.id == name
    with pytest.raises(OffrlError, match="did you mean test/hdf5set-v0"):
        load("test/hdf5ste-v0")


@pytest.mark.parametrize(
    ("env_id", "goals", "keys", "size"),
    [
        ("AntMaze_UMaze-v4", False, ["achieved_goal", "observation"], 29),
        ("AntMaze_UMaze-v4", True, ["achieved_goal", "desired_goal", "observation"], 31),
        ("PointMaze_Large-v3", False, ["observation"], 27),
        ("Other-v0", False, ["achieved_goal", "desired_goal", "observation"], 31),
    ],
)
def test_mazes_are_flattened_as_d4rl_does(tmp_path: Path, env_id: str, goals: bool, keys: list[str], size: int) -> None:
    observation = spaces("Dict", observation=box(27), achieved_goal=box(2), desired_goal=box(2))
    data = episodes(observation, box(8, bound=1.0))
    folder = write(tmp_path / "maze-v0", observation, box(8, bound=1.0), data, env_spec=spec(env_id))
    store = load(folder, goals=goals)
    assert store.obs_dim == size
    assert store.info.provenance["observation_keys"] == keys
    expected = np.concatenate([episode["observations"][key][1:] for key in keys for episode in data[:1]], axis=1)
    np.testing.assert_array_equal(store.next_observations[:5], expected.astype("f4"))


def test_nested_dicts_are_flattened_as_gymnasium_does(tmp_path: Path) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    goal = spaces("Dict", kettle=box(7), **{"light switch": box(2)})
    observation = spaces("Dict", observation=box(59), achieved_goal=goal, desired_goal=goal)
    data = episodes(observation, box(9, bound=1.0))
    folder = write(tmp_path / "k-v0", observation, box(9, bound=1.0), data, env_spec=spec("FrankaKitchen-v1", 280))
    store = load(folder)
    boxes = {"kettle": gymnasium.spaces.Box(-np.inf, np.inf, (7,)), "light switch": gymnasium.spaces.Box(-1, 1, (2,))}
    goals = {key: gymnasium.spaces.Dict(boxes) for key in ("achieved_goal", "desired_goal")}
    space = gymnasium.spaces.Dict({"observation": gymnasium.spaces.Box(-np.inf, np.inf, (59,))} | goals)
    first = data[0]["observations"]
    row = {"observation": first["observation"][2]}
    row |= {key: {k: v[2] for k, v in first[key].items()} for key in ("achieved_goal", "desired_goal")}
    np.testing.assert_array_equal(store.observations[2], gymnasium.spaces.flatten(space, row).astype("f4"))
    assert (store.info.family, store.info.ref_max, store.info.max_episode_steps) == ("kitchen", 4.0, 280)


def test_discrete_spaces_and_text(tmp_path: Path) -> None:
    observation = spaces(
        "Dict",
        direction={"type": "Discrete", "n": 4, "start": 1},
        image=box(2, 2, 3, bound=9, dtype="float32"),
        mission={"type": "Text"},
    )
    action = {"type": "Discrete", "n": 3, "start": 2}
    data = episodes(observation, action)
    store = load(write(tmp_path / "grid-v0", observation, action, data, env_spec=spec("MiniGrid-Empty-v0")))
    seen = data[0]["observations"]
    one_hot = np.eye(4)[seen["direction"] - 1]
    expected = np.concatenate([one_hot, seen["image"].reshape(6, -1)], axis=1).astype("f4")
    np.testing.assert_array_equal(store.observations[:5], expected[:-1])
    np.testing.assert_array_equal(store.actions[:5], data[0]["actions"] - 2)
    assert (store.info.discrete, store.actions.dtype) == (3, torch.int64)
    assert store.info.provenance["observation_keys"] == ["direction", "image"]


@pytest.mark.parametrize("in_first", [True, False])
def test_float_actions_of_a_discrete_space_are_whole_numbers(tmp_path: Path, in_first: bool) -> None:
    """HDF5 would cut their fractions off, also where only a later episode holds floats."""
    observation, action = box(4), {"type": "Discrete", "n": 3, "start": 0}
    data = episodes(observation, action)
    plain = read_minari(write(tmp_path / "plain-v0", observation, action, data))
    for episode in data if in_first else data[2:]:
        episode["actions"] = episode["actions"].astype("f4")
    assert read_minari(write(tmp_path / "floats-v0", observation, action, data)).fingerprint == plain.fingerprint
    for row, value in ((1, 1.7), (4, np.nan)):
        data[2]["actions"][:] = [0, 1, 2, 0, 1, 2, 0, 1, 2]
        data[2]["actions"][row] = value
        folder = write(tmp_path / f"broken{row}-v0", observation, action, data)
        with pytest.raises(
            OffrlError, match=rf"actions of episode_2 holds {value}\d* in row {row}, which is no discrete"
        ):
            read_minari(folder)


def test_environment_and_references_come_from_the_metadata_then_from_our_table(tmp_path: Path) -> None:
    observation, action = box(4), box(2, bound=0.4)
    data = episodes(observation, action)
    given = {"env_spec": spec("Hopper-v5", 1000, exclude=True), "eval_env_spec": spec("Hopper-v5", 500)}
    own = write(tmp_path / "a-v0", observation, action, data, **given, ref_min_score=1, ref_max_score=2)
    info = load(own).info
    assert (info.ref_min, info.ref_max, info.env_id, info.max_episode_steps) == (1.0, 2.0, "Hopper-v5", 500)
    assert (info.family, info.action_high) == ("gym-mujoco", 0.4)
    table = write(tmp_path / "b-v0", observation, action, data, env_spec=given["env_spec"])
    info = load(table).info
    assert (info.ref_min, info.ref_max, info.env_kwargs) == (-20.272305, 3234.3, {"exclude": True})
    assert "measured on gym v2" in info.provenance["references"]
    unknown = write(tmp_path / "c-v0", observation, action, data)
    assert load(unknown).info.normalized(1.0) is None


def test_a_maze_of_the_dataset_with_other_walls_than_the_one_that_scores_is_told(tmp_path: Path) -> None:
    """As of AntMaze umaze; marks of goals and resets are no walls. An online phase would learn there."""
    observation, action = box(4), box(2, bound=1.0)
    data = episodes(observation, action)
    maze, mirrored = [[1, 1, 1], [1, 0, 0], [1, 1, 1]], [[1, 1, 1], [0, "g", 1], [1, 1, 1]]
    for name, scored, words in (
        ("other", mirrored, r"\[\[1,1,1\],\[1,0,0\],\[1,1,1\]\]"),
        ("same", [[1, 1, 1], [1, "r", "g"], [1, 1, 1]], None),
    ):
        given = {
            "env_spec": spec("PointMaze_UMaze-v3", 9, maze_map=maze),
            "eval_env_spec": spec("PointMaze_UMaze-v3", 9, maze_map=scored),
        }
        info = load(write(tmp_path / f"{name}-v0", observation, action, data, **given)).info
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warn_of_other_maze(info)
            warn_of_other_maze(replace(info, env_kwargs={"maze_map": maze}))  # given, as the sentence says
        assert len(said) == (words is not None)
        assert words is None or re.search(f"maze_map={words}", str(said[0].message))


def test_a_datasets_own_info_is_honoured(root: Path) -> None:
    own = {
        "id": "forge/hopper/medium-v0",
        "family": "forge",
        "ref_min": 0.0,
        "ref_max": 10.0,
        "provenance": {"seed": 7},
    }
    observation, action = box(4), box(2, bound=1.0)
    data = episodes(observation, action)
    folder = write(root / "mine/set-v0", observation, action, data, offrl_info=json.dumps(own), author="A")
    info = load(folder).info
    assert (info.id, info.family, info.ref_max) == ("forge/hopper/medium-v0", "forge", 10.0)
    assert info.provenance["seed"] == 7
    assert info.provenance["author"] == "A"
    assert load("mine/set-v0").info.id == "mine/set-v0"


def test_forge_ids_are_built_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = json.dumps({"id": "forge/hopper/medium-v0", "family": "gym-mujoco"})
    asked = []

    def ensure(name: str) -> Path:
        asked.append(name)
        data = episodes(box(4), box(2, bound=1.0))
        return write(tmp_path / "home" / name, box(4), box(2, bound=1.0), data, offrl_info=own)

    monkeypatch.setattr(registry, "ensure", lambda name, **_: ensure(name))
    first = load("forge/hopper/medium-v0")
    assert load("forge/hopper/medium-v0").fingerprint == first.fingerprint
    assert asked == ["forge/hopper/medium-v0"]
    assert (first.info.id, first.info.family) == ("forge/hopper/medium-v0", "gym-mujoco")


def test_limits_of_pointmaze_come_from_the_catalogue(root: Path) -> None:
    observation = spaces("Dict", observation=box(4), achieved_goal=box(2), desired_goal=box(2))
    data = episodes(observation, box(2, bound=1.0))
    folder = root / "D4RL/pointmaze/medium-v2"
    write(folder, observation, box(2, bound=1.0), data, env_spec=spec("PointMaze_Medium-v3", 1_000_000))
    info = load("D4RL/pointmaze/medium-v2").info
    assert (info.max_episode_steps, info.family) == (600, "maze2d")


def wrong_lengths(key: str) -> list[dict]:
    data = episodes(box(4), box(2, bound=1.0))
    data[1][key] = np.concatenate([data[1][key], data[1][key][:1]])
    return data


def without(key: str) -> list[dict]:
    data = episodes(box(4), box(2, bound=1.0))
    del data[2][key]
    return data


def with_nan() -> list[dict]:
    data = episodes(box(4), box(2, bound=1.0))
    data[2]["observations"][3, 1] = np.nan
    return data


def changed(key: str, row: int, value: Any) -> list[dict]:
    """The last episode's numbers as floats with another one in a row."""
    data = episodes(box(4), box(2, bound=1.0))
    data[2][key] = data[2][key].astype(float)
    data[2][key][row] = value
    return data


def in_two_columns(key: str) -> list[dict]:
    data = episodes(box(4), box(2, bound=1.0))
    for episode in data:
        episode[key] = np.stack([episode[key]] * 2, axis=1)
    return data


def bad_cases() -> Iterator[tuple[list[dict], dict[str, Any], str]]:
    good = episodes(box(4), box(2, bound=1.0))
    yield wrong_lengths("observations"), {}, "observations of episode_1 has 3 rows; 1 steps need 2"
    yield wrong_lengths("actions"), {}, "actions of episode_1 has 2 rows but rewards has 1"
    yield without("rewards"), {}, "episode_2 lacks rewards"
    yield with_nan(), {}, "observations holds nan in row 9, column 1"
    for key, value in (("terminations", 2.0), ("terminations", np.nan), ("truncations", -1.0)):
        data = changed(key, 3, value)
        for episode in data[:2]:
            episode[key] = episode[key].astype(float)
        yield data, {}, f"{key} of episode_2 holds {value} in row 3; it must hold only 0 and 1"
    yield in_two_columns("rewards"), {}, r"rewards of episode_0 has shape \(5, 2\); it must be one number a step"
    yield in_two_columns("terminations"), {}, "terminations of episode_0 has 2 columns; it must be one flag a row"
    yield good, {"total_steps": 99}, "promises 99 steps but the episodes hold 15"
    yield good, {"total_steps": 3}, "promises 3 steps but the episodes hold 15"
    yield good, {"observation_space": "{"}, "observation_space in metadata.json is not valid JSON"
    yield good, {"action_space": json.dumps({"low": 3})}, "metadata.json is not what Minari writes"
    yield good, {"offrl_info": json.dumps({"colour": "red"})}, "unknown fields .'colour'."
    yield good, {"observation_space": json.dumps(box(5))}, "episode_0 does not fit the spaces"
    yield good, {"observation_space": json.dumps({"type": "Text"})}, "holds no numbers"
    yield good, {"observation_space": json.dumps({"type": "Graph"})}, "type Graph are not supported"
    yield good, {"action_space": json.dumps(box(2))}, "has no bounds"
    yield good, {"action_space": json.dumps(box(2, bound=0.1))}, "actions holds .* outside"
    yield good, {"action_space": json.dumps({"type": "Text"})}, "actions of type Text"
    yield [], {}, "no transition"


@pytest.mark.parametrize(("data", "metadata", "message"), bad_cases())
def test_each_bad_dataset_gets_its_own_sentence(tmp_path: Path, data: list, metadata: dict, message: str) -> None:
    folder = write(tmp_path / "bad-v0", box(4), box(2, bound=1.0), data, **metadata)
    with pytest.raises(OffrlError, match=message) as caught:
        read_minari(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("key", ["rewards", "truncations", "actions"])
def test_a_single_number_is_no_column(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "a-v0", box(4), box(2, bound=1.0), episodes(box(4), box(2, bound=1.0)))
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        dtype = file[f"episode_1/{key}"].dtype
        del file[f"episode_1/{key}"]
        file[f"episode_1/{key}"] = np.ones((), dtype)
    with pytest.raises(OffrlError, match=f"{key} of episode_1 is a single number; it must have one row a step"):
        read_minari(folder)


def test_broken_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "a-v0", box(4), box(2, bound=1.0), episodes(box(4), box(2, bound=1.0)))
    with pytest.raises(OffrlError, match="give its folder instead"):
        load(folder / "data/main_data.hdf5")
    (folder / "data/main_data.hdf5").unlink()
    with pytest.raises(OffrlError, match="data file is missing"):
        load(folder)
    (folder / "data/metadata.json").write_text("{")
    with pytest.raises(OffrlError, match="not valid JSON"):
        load(folder)
    with pytest.raises(OffrlError, match="offrl data fetch D4RL/pen/human-v2"):
        load("D4RL/pen/human-v2")


def test_action_bound_and_clipping(tmp_path: Path) -> None:
    data = episodes(box(4), box(2, bound=1.0))
    narrow = json.dumps(box(2, bound=0.5))
    folder = write(tmp_path / "a-v0", box(4), box(2, bound=1.0), data, action_space=narrow)
    assert float(load(folder, clip_actions=True).actions.abs().max()) == 0.5
    assert load(folder, action_bound=1.0).info.action_high == 1.0


def test_leaves_of_tuples_keep_their_order() -> None:
    space = {"type": "Tuple", "subspaces": [box(2), {"type": "MultiBinary", "n": 3}]}
    leaves = observation_leaves(space, "", False, "here")
    assert [(leaf.path, leaf.size) for leaf in leaves] == [(("_index_0",), 2), (("_index_1",), 3)]


def test_folders_of_minari_0_4_have_their_metadata_in_the_data_file(root: Path) -> None:
    observation, action = box(4), box(2, bound=1.0)
    new = write(root / "new-v0", observation, action, episodes(observation, action), env_spec=spec("Hopper-v5", 7))
    old = write(root / "old-v0", observation, action, episodes(observation, action))
    (old / "data/metadata.json").unlink()
    with h5py.File(old / "data/main_data.hdf5", "a") as file:
        file.attrs["total_steps"] = 15
    with pytest.raises(OffrlError, match=r"as a file of Minari 0.4, it lacks observation_space, action_space"):
        load(old)
    with h5py.File(old / "data/main_data.hdf5", "a") as file:
        file.attrs["dataset_id"], file.attrs["env_spec"] = "old-v0", spec("Hopper-v5", 7)
        file.attrs["observation_space"], file.attrs["action_space"] = json.dumps(observation), json.dumps(action)
    store = load("old-v0")
    assert store.fingerprint == load(new).fingerprint
    assert (store.info.env_id, store.info.max_episode_steps) == ("Hopper-v5", 7)
    with pytest.raises(OffrlError, match="give its folder instead"):
        load(old / "data/main_data.hdf5")
