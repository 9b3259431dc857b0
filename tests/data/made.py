"""Columns with coherent successors, and files of them, for tests that need data as an environment would have made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Columns = dict[str, Any]


def trajectories(lengths: list[int], terminated: list[bool], seed: int = 0, width: int = 3) -> Columns:
    """Random walks: the successor of a row is the next row, that of an episode's last row is its final state.

    Rows whose episode is not terminated end by a timeout.
    """
    rng = np.random.default_rng(seed)
    data: dict[str, list[np.ndarray]] = {"observations": [], "next_observations": []}
    terminals, timeouts = np.zeros(sum(lengths), bool), np.zeros(sum(lengths), bool)
    for length, end, last in zip(lengths, terminated, np.cumsum(lengths) - 1):
        states = (rng.standard_normal((1, width)) + 0.1 * rng.standard_normal((length + 1, width)).cumsum(0)).astype(
            "f4"
        )
        data["observations"].append(states[:-1])
        data["next_observations"].append(states[1:])
        terminals[last], timeouts[last] = end, not end
    n = sum(lengths)
    return {key: np.concatenate(parts) for key, parts in data.items()} | {
        "actions": rng.uniform(-1, 1, (n, 2)).astype("f4"),
        "rewards": rng.standard_normal(n).astype("f4"),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def without(data: Columns, *keys: str) -> Columns:
    return {key: value for key, value in data.items() if key not in keys}


def write_hdf5(path: Path, data: Columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file[key] = value
    return path


def write_npz(path: Path, data: Columns) -> Path:
    np.savez(path, **data)
    return path


def box(*shape: int, low: Any = -1.0, high: Any = 1.0, dtype: str = "float32") -> dict[str, Any]:
    """Minari's JSON of a box."""
    low, high = (np.broadcast_to(bound, shape).tolist() for bound in (low, high))
    return {"type": "Box", "dtype": dtype, "shape": list(shape), "low": low, "high": high}


def write_minari(
    folder: Path, episodes: list[Columns], observation: dict[str, Any], action: dict[str, Any], **metadata: Any
) -> Path:
    """A Minari folder; each episode has `observations` (one row more; nested dicts), `actions`, `rewards` and flags."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data/main_data.hdf5", "w", track_order=True) as file:
        for number, episode in enumerate(episodes):
            _tree(file.create_group(f"episode_{number}"), episode)
    described = {
        "total_episodes": len(episodes),
        "total_steps": sum(len(episode["rewards"]) for episode in episodes),
        "data_format": "hdf5",
        "observation_space": json.dumps(observation),
        "action_space": json.dumps(action),
        "dataset_id": folder.name,
        "minari_version": "0.5.4",
    }
    (folder / "data/metadata.json").write_text(json.dumps(described | metadata))
    return folder


def _tree(group: h5py.Group, tree: Columns) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _tree(group.create_group(key), value)
        else:
            group[key] = value


def split(data: Columns) -> list[Columns]:
    """The episodes of flat columns in Minari's form."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    episodes = []
    for start, stop in zip([0, *ends[:-1]], ends):
        rows = slice(start, stop)
        observations = np.concatenate([data["observations"][rows], data["next_observations"][stop - 1 : stop]])
        episodes.append(
            {
                "observations": observations,
                "actions": data["actions"][rows],
                "rewards": data["rewards"][rows],
                "terminations": data["terminals"][rows],
                "truncations": data["timeouts"][rows],
            }
        )
    return episodes
