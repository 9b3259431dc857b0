"""Honest inputs that the mutations start from: a small dataset in every format, finished and stopped runs on it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from judge import CANARY, Case, Judge

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from made import split, trajectories, write_minari

INFO = {
    "id": "fuzz/pendulum",
    "env_id": "Pendulum-v1",
    "family": "fuzz",
    "max_episode_steps": 200,
    "ref_min": -1500.0,
    "ref_max": 0.0,
    "action_low": -2.0,
    "action_high": 2.0,
}
TRAIN = [
    "train",
    "updates=6",
    "batch_size=8",
    "agent.hidden=[8]",
    "checkpoint_every=2",
    "log_every=2",
    "eval.every=3",
    "eval.episodes=1",
    "eval.final_episodes=1",
    "eval.workers=1",
    "progress=false",
    "engine=eager",
]
MODEL = [  # a world model of some bytes
    "augment=world_model",
    "augment.model.members=2",
    "augment.model.elites=1",
    "augment.model.hidden=[8]",
    "augment.model.updates=50",
    "augment.transitions=64",
]
TUNE = [
    "online.steps=4",
    "online.eval_every=0",
    "eval.final_episodes=1",
    "eval.workers=1",
    "progress=false",
    "out=tuned",
]


@dataclass(frozen=True)
class Material:
    """Paths of honest inputs, which are copied and never changed.

    Attributes:
        stopped: a run whose last two updates and result are still to come.
        outside: files that nothing may open: text, JSON, HDF5.
    """

    place: Path
    judge: Judge
    columns: dict[str, Any]
    hdf5: Path
    npz: Path
    minari: Path
    flat: Path
    finished: Path
    stopped: Path
    outside: tuple[Path, ...]

    def made(self, name: str, *commands: list[str], env: dict[str, str] | None = None) -> Path:
        """A folder below `place` in which commands have been run, when it was first asked for."""
        folder = self.place / "made" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            for words in commands:
                _succeed(self.judge, words, folder, env or {})
        return folder


def _succeed(judge: Judge, words: list[str], folder: Path, env: dict[str, str]) -> None:
    verdict = judge.judge(Case(words, "nothing", env=env), folder)
    if verdict.name != "success":
        raise AssertionError(f"offrl {' '.join(words)}: {verdict}")


def columns() -> dict[str, Any]:
    """Four short trajectories of three numbers and one action."""
    data = trajectories([30, 20, 50, 40], [True, False, True, False])
    return {**data, "actions": data["actions"][:, :1]}


def outside(place: Path) -> tuple[Path, ...]:
    """Files beside the honest inputs which nothing may open; before a `Judge` is made, which watches them."""
    folder = place / "canaries"
    folder.mkdir(parents=True)
    text, described, numbers = (folder / f"{CANARY}{suffix}" for suffix in (".txt", ".json", ".hdf5"))
    text.write_text("secret\n" * 1000)
    described.write_text(json.dumps({"step": 6, "message": "secret"}))
    with h5py.File(numbers, "w") as file:
        for key, value in columns().items():
            file[key] = value
    return text, described, numbers


def write_hdf5(path: Path, data: dict[str, Any], **options: Any) -> None:
    """D4RL's layout; `options` of h5py hold for the larger arrays."""
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file.create_dataset(key, data=value, **(options if np.ndim(value) else {}))
        file.attrs["offrl_info"] = json.dumps(INFO)


def make(place: Path, judge: Judge, canaries: tuple[Path, ...]) -> Material:
    """Everything, in the folder `place`; the runs are trained in processes of their own."""
    data = columns()
    made = Material(
        place,
        judge,
        data,
        place / "base.hdf5",
        place / "base.npz",
        place / "base-v0",
        place / "base.safetensors",
        place / "runs/td3_bc/base.npz/finished",
        place / "runs/td3_bc/base.npz/stopped",
        canaries,
    )
    write_hdf5(made.hdf5, data, chunks=True, compression="gzip")
    np.savez_compressed(made.npz, **data, offrl_info=json.dumps(INFO))
    box = {"type": "Box", "dtype": "float32"}
    observation = {**box, "shape": [3], "low": [-9.0] * 3, "high": [9.0] * 3}
    action = {**box, "shape": [1], "low": [-2.0], "high": [2.0]}
    spec = json.dumps({"id": "Pendulum-v1", "max_episode_steps": 200, "kwargs": {}})
    write_minari(made.minari, split(data), observation, action, env_spec=spec, total_episodes=4)
    formats = (made.npz, made.hdf5, made.minari)
    for words in (
        *(["data", "info", str(path), "--no-cache"] for path in formats),
        ["data", "convert", str(made.npz), str(made.flat)],
        [
            *TRAIN,
            "agent=td3_bc",
            f"dataset={made.npz}",
            f"out={place / 'runs'}",
            "name=td3_bc/base.npz/finished",
            "keep_checkpoints=true",
        ],
    ):
        _succeed(judge, words, place, {})
    found = next((place / "runs").rglob("result.json")).parent
    if found != made.finished:
        made.finished.parent.mkdir(parents=True, exist_ok=True)
        found.rename(made.finished)
    shutil.copytree(made.finished, made.stopped)
    shutil.copy(made.stopped / "checkpoints/00000004.safetensors", made.stopped / "checkpoint.safetensors")
    (made.stopped / "result.json").unlink()
    return made
