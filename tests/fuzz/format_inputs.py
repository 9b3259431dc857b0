"""Mutated datasets in other libraries' formats: d3rlpy's two, OGBench's, and honest but unusual arrays in NPZ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from data_inputs import _claim, _columns, _command, _elsewhere, _odd_item, _zip_flags
from judge import Case
from material import TRAIN, Material
from mutate import Rng, bytes_of

Columns = dict[str, Any]


# ---- d3rlpy ----------------------------------------------------------------------------------------------------------


def _d3rlpy_2(data: Columns) -> Columns:
    """Arrays of each episode, as `ReplayBuffer.dump` names them."""
    made: Columns = {
        "columns": ["observations", "actions", "rewards", "terminated"],
        "num_episodes": 4,
        "version": "2.1",
    }
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    for number, (start, stop) in enumerate(zip([0, *ends[:-1]], ends)):
        for key in ("observations", "actions", "rewards"):
            part = data[key][start:stop]
            made[f"{key}_{number}"] = part[:, None] if part.ndim == 1 else part
        made[f"terminated_{number}"] = bool(data["terminals"][stop - 1])
    return made


def _d3rlpy_1(data: Columns) -> Columns:
    return {key: data[key] for key in ("observations", "actions", "rewards", "terminals")} | {
        "episode_terminals": (data["terminals"] | data["timeouts"]).astype("f4"),
        "discrete_action": np.bool_(False),
        "version": np.bytes_(b"1.0"),
    }


def d3rlpy(material: Material, folder: Path, rng: Rng) -> Case:
    """Changed columns, names, items, claims and bytes of either version's file."""
    path = folder / rng.choice(["x.h5", "x.hdf5"])
    data = rng.choice([_d3rlpy_2, _d3rlpy_2, _d3rlpy_1])(material.columns)
    numeric = {key: value for key, value in data.items() if np.asarray(value).dtype.kind in "fb"}
    kind = rng.choice(["columns", "columns", "columns", "name", "name", "item", "bytes"])
    what = ""
    if kind == "columns":
        changed, what = _columns(numeric, rng)
        data = {key: value for key, value in data.items() if key not in numeric} | changed
    elif kind == "name":
        key = rng.choice(sorted(data))
        new = rng.choice(
            ["rewards_x", "rewards_7", "observations_0_0", "rewards_-1", "terminated_9", "rewards_00", "masks"]
        )
        data[new] = data[key] if rng.random() < 0.5 else data.pop(key)
        what = f"{key} is {new}"
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            text = np.asarray(value).dtype.kind == "U"
            file.create_dataset(key, data=np.asarray(value).astype("S16") if text else value)
        if kind == "item":
            key = rng.choice(sorted(key for key in numeric if np.ndim(data[key])))
            change = rng.choice([_odd_item, _claim, lambda f, k, r: _elsewhere(f, k, material.outside, r)])
            what = f"{key} {change(file, key, rng)}"
    if kind == "bytes":
        damaged, what = bytes_of(path.read_bytes(), rng)
        path.write_bytes(damaged)
    return Case(_command(path, rng), f"{kind}: {what}")


# ---- OGBench ---------------------------------------------------------------------------------------------------------


OGBENCH = {
    "pointmaze-medium-navigate-v0": (2, 2, 2, 0),
    "cube-single-play-v0": (28, 5, 21, 0),
    "puzzle-3x3-play-v0": (55, 5, 23, 9),
}


def _trajectories(name: str) -> Columns:
    """Two trajectories of twenty rows, in the widths of an environment."""
    observation, action, qpos, buttons = OGBENCH[name]
    rng = np.random.default_rng(0)
    made: Columns = {
        "observations": rng.standard_normal((40, observation)).astype("f4"),
        "actions": rng.uniform(-1, 1, (40, action)).astype("f4"),
        "terminals": np.arange(40) % 20 == 19,
        "qpos": rng.standard_normal((40, qpos)).astype("f4"),
        "qvel": rng.standard_normal((40, qpos)).astype("f4"),
    }
    if buttons:
        made["button_states"] = rng.integers(0, 2, (40, buttons))
    return made


def ogbench(material: Material, folder: Path, rng: Rng) -> Case:
    """Changed columns, foreign names, damaged zips; asked for by path, by id, with a task or several."""
    name = rng.choice(list(OGBENCH))
    data, what = _trajectories(name), ""
    kind = rng.choice(["columns", "columns", "columns", "name", "flags", "bytes", "words", "words"])
    path = folder / f"{name}.npz"
    if kind == "columns":
        data, what = _columns(data, rng)
    elif kind == "name":
        what = rng.choice(
            [
                "x",
                "pointmaze-nope-navigate-v0",
                "cube-single-play-v0-val",
                "cube-double-play-v0",
                "visual-cube-single-play-v0",
                "a=1",
            ]
        )
        path = folder / f"{what}.npz"
    np.savez(path, **{key.replace("/", "."): value for key, value in data.items()})
    if kind == "bytes":
        damaged, what = bytes_of(path.read_bytes(), rng)
        path.write_bytes(damaged)
    elif kind == "flags":
        what = _zip_flags(path.read_bytes(), path, rng)
    task = rng.choice([0, 1, 2, 5, 6, -1, "x", "null", 10**30, "[1,2]", ""])
    single = name.replace("-v0", f"-singletask-task{rng.choice([1, 2, 2, 2, 9])}-v0")
    chosen = rng.choice([single, single, single, single, str(path), name])
    words = _command(Path(chosen), rng)
    if kind == "words":
        key = rng.choice(["data.task", "data.tasks", "data.success_timing", "data.semantics"])
        words = [
            *TRAIN,
            "agent=bc",
            f"dataset='{chosen}'",
            "out=runs",
            "eval.final_episodes=0",
            "eval.every=0",
            f"{key}={task}",
        ]
    return Case(words, f"{kind}: {what}", env={"OGBENCH_DATASET_DIR": str(folder)})


# ---- honest, but unusual ---------------------------------------------------------------------------------------------


def _unusual(data: Columns, rng: Rng) -> tuple[Columns, str]:
    """Observations and actions of a kind that other libraries write."""
    n, draw = len(data["rewards"]), np.random.default_rng(rng.randrange(1000))
    actions = {
        "integers": draw.integers(0, 3, n), "integers from -1": draw.integers(-1, 2, n),
        "one integer": np.zeros(n, int), "column of integers": draw.integers(0, 3, (n, 1)),
        "indices as floats": draw.integers(0, 3, n).astype("f4"), "one-hot": np.eye(3)[draw.integers(0, 3, n)],
        "one-hot integers": np.eye(3, dtype=int)[draw.integers(0, 3, n)], "bool": draw.random(n) < 0.5,
        "bool of two": draw.random((n, 2)) < 0.5, "many integers": draw.integers(0, 10**9, n),
        "wide": draw.uniform(-50, 50, (n, 2)),
        "as they are": data["actions"],
    }  # fmt: skip
    observations = {
        "images": draw.integers(0, 256, (n, 8, 8, 3)).astype("u1"), "images of floats": draw.random((n, 8, 8, 1)),
        "integers": draw.integers(0, 5, n), "bool": draw.random((n, 3)) < 0.5, "float16": data["observations"].astype("f2"),
        "one number": data["observations"][:, 0], "constant": np.zeros((n, 3)), "large": data["observations"] * 1e30,
        "as they are": data["observations"],
    }  # fmt: skip
    a, o = rng.choice(list(actions)), rng.choice(list(observations))
    return {**data, "actions": actions[a], "observations": observations[o]}, f"actions {a}, observations {o}"


def unusual(material: Material, folder: Path, rng: Rng) -> Case:
    """Discrete, boolean, one-hot and image data, with or without successors; read, converted or trained on."""
    path = folder / "x.npz"
    data, what = _unusual(material.columns, rng)
    ends = rng.choice(["timeouts", "dones", "masks", "truncations", "none"])
    out = {key: data[key] for key in ("observations", "actions", "rewards", "terminals")}
    if ends == "masks":
        out["masks"] = 1.0 - data["terminals"]
    elif ends == "dones":
        out = {**{k: v for k, v in out.items() if k != "terminals"}, "dones": data["terminals"] | data["timeouts"]}
    elif ends != "none":
        out[ends] = data["timeouts"]
    if rng.random() < 0.4 and "as they are" in what.split("observations ")[1]:
        out["next_observations"] = data["next_observations"]
    np.savez(path, **out)
    agent = rng.choice(["bc", "discrete_cql", "td3_bc", "iql", "dt", "rvs"])
    settings = "agent.embed=8" if agent == "dt" else "agent.hidden=[8]"
    train = [
        "train",
        "updates=3",
        "batch_size=8",
        f"agent={agent}",
        settings,
        f"dataset={path}",
        "out=runs",
        "progress=false",
    ]
    words = rng.choice([_command(path, rng), [*train, "eval.every=0", "eval.final_episodes=0", "engine=eager"]])
    return Case(words, f"{what}, ends {ends}, {agent}")
