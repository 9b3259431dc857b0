"""Writing episodes as a Minari 0.5.4 dataset without Minari: `FOLDER/data/{metadata.json, main_data.hdf5}`.

Minari's own writers need a millisecond an episode, which is more than the simulation of a short one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5p, h5s, h5t

from offrl.data.rollout import Episode
from offrl.data.store import DatasetInfo
from offrl.errors import OffrlError

MINARI_VERSION = "0.5.4"


def write_minari(
    folder: Path,
    episodes: Sequence[Episode],
    info: DatasetInfo,
    dataset_id: str,
    env_spec: str,
    action_bounds: tuple[Sequence[float], Sequence[float]],
    description: str,
    manifest: dict[str, Any] | None = None,
) -> None:
    """Write `folder` whole or not at all; an older one is replaced.

    Same arguments, same bytes: nothing in the files depends on the time or on the machine.

    Args:
        dataset_id: id under which Minari knows the set.
        env_spec: JSON of the Gymnasium spec of the environment that made the data.
        action_bounds: lower and upper bounds `[A]`.
        manifest: what the data were drawn from, kept as `manifest.json` beside `data/`.

    Raises:
        OffrlError: the folder cannot be written.
    """
    with replacing_folder(folder) as temporary:
        data = temporary / "data"
        data.mkdir()
        _write_hdf5(data / "main_data.hdf5", episodes)
        low, high = action_bounds
        metadata = {
            "total_episodes": len(episodes),
            "total_steps": sum(map(len, episodes)),
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "observation_space": json.dumps(_space(episodes[0].observations)),
            "action_space": json.dumps(_box(len(low), low, high)),
            "env_spec": env_spec,
            "dataset_id": dataset_id,
            "minari_version": MINARI_VERSION,
            "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1),
            "description": description,
            "ref_min_score": info.ref_min,
            "ref_max_score": info.ref_max,
            "offrl_info": json.dumps(asdict(info)),
        }
        (data / "metadata.json").write_text(json.dumps(metadata, indent=1))
        if manifest is not None:
            (temporary / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `folder` that takes its place on success.

    A folder that another process put there meanwhile stays (it was asked for the same).
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        existed = folder.exists()
        temporary.mkdir(parents=True)
        yield temporary
        if existed:
            os.replace(folder, old)
        elif folder.exists():
            return
        os.replace(temporary, folder)
    except OSError as error:
        reason = error.strerror or error
        raise OffrlError(f"{folder} cannot be written ({reason}); free space or set OFFRL_HOME elsewhere.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _space(observations: Any) -> dict[str, Any]:
    """Minari's JSON form of an unbounded float32 space for `[T + 1, O]` observations or a dict of them."""
    if isinstance(observations, Mapping):
        return {"type": "Dict", "subspaces": {key: _space(observations[key]) for key in sorted(observations)}}
    size = observations.shape[-1]
    return _box(size, [-np.inf] * size, [np.inf] * size)


def _box(size: int, low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    return {"type": "Box", "dtype": "float32", "shape": [size], "low": list(low), "high": list(high)}


def _write_hdf5(path: Path, episodes: Sequence[Episode]) -> None:
    """One group an episode, as Minari lays them out.

    A short episode costs HDF5's calls and not its bytes, so h5py's low level is used with every description made
    once, small arrays stand inside their object headers, and each distinct pair of end flags is stored once and linked.
    """
    scalar, integer = h5s.create(h5s.SCALAR), h5t.py_create(np.dtype(np.int64))
    flags: dict[tuple[int, bool], Any] = {}
    with h5py.File(path, "w", track_order=True) as file:
        for number, episode in enumerate(episodes):
            group = h5g.create(file.id, f"episode_{number}".encode())
            attributes = {"id": number, "seed": episode.seed, "total_steps": len(episode)}
            for key, value in attributes.items():
                if value is not None:
                    h5a.create(group, key.encode(), integer, scalar).write(np.array(value, np.int64))
            _write(group, "observations", episode.observations)
            _write(group, "actions", episode.actions)
            _write(group, "rewards", episode.rewards)
            shared = flags.setdefault((len(episode), episode.terminated), group)
            for key, ended in (("terminations", episode.terminated), ("truncations", not episode.terminated)):
                if shared is group:
                    flag = np.zeros(len(episode), np.bool_)
                    flag[-1] = ended
                    _write(group, key, flag)
                else:
                    group.links.create_hard(key.encode(), shared, key.encode())


def _write(group: Any, key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        subgroup = h5g.create(group, key.encode())
        for name in sorted(value):
            _write(subgroup, name, value[name])
        return
    dataset = h5d.create(group, key.encode(), _kind(value.dtype), _shape(value.shape), _layout(value.nbytes < 8192))
    dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(value))


@cache
def _kind(dtype: np.dtype) -> Any:
    return h5t.py_create(dtype, logical=True)


@cache
def _shape(shape: tuple[int, ...]) -> Any:
    return h5s.create_simple(shape)


@cache
def _layout(compact: bool) -> Any:
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)  # no time in the file
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    if compact:
        properties.set_layout(h5d.COMPACT)
    return properties
