"""Writing episodes as a Minari 0.5.4 dataset without Minari: `FOLDER/data/{metadata.json, main_data.hdf5}`.

Minari's own writers need a millisecond an episode, which is more than the simulation of a short one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from h5py import h5a, h5d, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.hdf5 import create_hdf5
from offrl.utils.errors import OffrlError
from offrl.utils.paths import beside

MINARI_VERSION = "0.5.4"
Space = dict[str, Any]


def write_minari(
    folder: Path,
    episodes: Sequence[Episode],
    info: DatasetInfo,
    dataset_id: str,
    env_spec: str | None,
    action_space: Space,
    description: str,
    manifest: dict[str, Any] | None = None,
    observation_space: Space | None = None,
) -> None:
    """Write `folder` whole or not at all; an older one is replaced.

    Same arguments, same bytes: nothing in the files depends on the time or on the machine.

    Args:
        dataset_id: id under which Minari knows the set.
        env_spec: JSON of the Gymnasium spec of the environment that made the data; None where nobody knows it.
        action_space: `box` or `discrete`.
        manifest: record of what the data were drawn from, written to `manifest.json` beside `data/`.
        observation_space: `box` or `discrete`; None: unbounded numbers.

    Raises:
        OffrlError: the folder cannot be written.
    """
    with replacing_folder(folder) as temporary:
        data = temporary / "data"
        data.mkdir()
        _write_hdf5(data / "main_data.hdf5", episodes)
        metadata = {
            "total_episodes": len(episodes),
            "total_steps": sum(map(len, episodes)),
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "observation_space": json.dumps(observation_space or _unbounded(episodes[0].observations)),
            "action_space": json.dumps(action_space),
            **({} if env_spec is None else {"env_spec": env_spec}),
            "dataset_id": dataset_id,
            "minari_version": MINARI_VERSION,
            "dataset_size": round((data / "main_data.hdf5").stat().st_size / 1e6, 1),
            "description": description,
            "ref_min_score": info.ref_min,
            "ref_max_score": info.ref_max,
            "offrl_info": json.dumps(asdict(info), default=str),
        }
        (data / "metadata.json").write_text(json.dumps(metadata, indent=1))
        if manifest is not None:
            (temporary / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `folder` that takes its place on success.

    If another process has created `folder` meanwhile, that one stays.
    """
    temporary = beside(folder)
    old = temporary.with_suffix(".old")
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


def box(low: Sequence[float], high: Sequence[float]) -> Space:
    """Minari's JSON form of a box of float32 numbers."""
    return {"type": "Box", "dtype": "float32", "shape": [len(low)], "low": list(low), "high": list(high)}


def discrete(n: int) -> Space:
    """Minari's JSON form of the numbers 0 to n - 1."""
    return {"type": "Discrete", "dtype": "int64", "start": 0, "n": n}


def _unbounded(observations: Any) -> Space:
    """The space of `[T + 1, O]` observations or a dict of them."""
    if isinstance(observations, Mapping):
        return {"type": "Dict", "subspaces": {key: _unbounded(observations[key]) for key in sorted(observations)}}
    size = observations.shape[-1]
    return box([-np.inf] * size, [np.inf] * size)


def _write_hdf5(path: Path, episodes: Sequence[Episode]) -> None:
    """One group an episode, as Minari lays them out.

    The cost of a short episode is the number of HDF5's calls and not its bytes. So this uses h5py's low level and makes
    every type and shape once; small arrays lie inside their object headers; and short arrays that repeat (end flags above
    all) are stored once and linked from every other episode.
    """
    scalar, integer = h5s.create(h5s.SCALAR), h5t.py_create(np.dtype(np.int64))
    stored: dict[Any, Any] = {}
    with create_hdf5(path, track_order=True) as file:
        for number, episode in enumerate(episodes):
            group = h5g.create(file.id, f"episode_{number}".encode())
            attributes = {"id": number, "seed": episode.seed, "total_steps": len(episode)}
            for key, value in attributes.items():
                if value is not None:
                    h5a.create(group, key.encode(), integer, scalar).write(np.array(value, np.int64))
            ends = np.zeros((2, len(episode)), np.bool_)
            if episode.complete:
                ends[0 if episode.terminated else 1, -1] = True
            if episode.terminations is not None:
                ends[0, :-1] = episode.terminations[:-1]
            arrays = {"observations": episode.observations, "actions": episode.actions, "rewards": episode.rewards}
            arrays |= {"terminations": ends[0], "truncations": ends[1]}
            if episode.noise is not None:
                arrays["infos"] = {"noise": _behind_reset(episode.noise)}
            for key, value in arrays.items():
                content = _content(value)
                first = group if content is None else stored.setdefault((key, content), group)
                if first is group:
                    _write(group, key, value)
                else:
                    group.links.create_hard(key.encode(), first, key.encode())


def _content(value: Any) -> Any:
    """A key that is equal for equal short arrays, or dicts of them; None for long ones."""
    if isinstance(value, Mapping):
        contents = [(key, _content(value[key])) for key in sorted(value)]
        return None if any(content is None for _, content in contents) else tuple(contents)
    return None if value.nbytes > 1024 else (value.dtype.str, value.shape, value.tobytes())


def _behind_reset(noise: Any) -> Any:
    """`[T + 1, ...]`: Minari's infos begin with the reset's, which draws nothing (-1 where noise is an index, else 0)."""
    nothing = np.full_like(noise[:1], -1 if noise.dtype.kind == "i" else 0)
    return np.concatenate((nothing, noise))


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


@dataclass
class Episode:
    """One episode of `T` steps.

    Attributes:
        observations: `[T + 1, O]` float32, or a dict of such arrays; discrete ones are `[T + 1]` int64. The last row
            follows the last action.
        actions: `[T, A]` float32, or `[T]` int64: the commanded actions, before any noise.
        rewards: `[T]` float32.
        terminated: whether the environment ended the episode; otherwise it was truncated (time limit, or `cut`).
        seed: seed of the environment's reset; None where the episode is a copy.
        noise: `[T, ...]` draws of the environment's noise at each step; None where nobody recorded it.
        complete: whether the episode ended with its last step; False: the recording stopped in the middle of it, and no
            end is written.
        terminations: `[T]` bool where terminations stand within an episode, which goes on behind them; None: nowhere.
    """

    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: bool
    seed: int | None = None
    noise: NDArray[Any] | None = None
    complete: bool = True
    terminations: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.rewards)

    def cut(self, steps: int) -> Episode:
        """The first `steps` steps as a truncated episode."""
        if steps >= len(self):
            return self
        noise = None if self.noise is None else self.noise[:steps]
        arrays = self.observations[: steps + 1], self.actions[:steps], self.rewards[:steps]
        return Episode(*arrays, terminated=False, seed=self.seed, noise=noise)


def episodes_of(dataset: OfflineDataset) -> Iterator[Episode]:
    """The episodes of a dataset, whose arrays they share; a last step without a known successor is left out."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in dataset.tensors().items()}
    bounds = arrays["offsets"].tolist()
    for complete, start, stop in zip(arrays["complete"].tolist(), bounds[:-1], bounds[1:]):
        last = arrays["next_observations"][stop - 1 : stop]
        terminations = arrays["terminations"][start:stop] > 0
        terminated = bool(terminations[-1])
        yield Episode(
            observations=np.concatenate((arrays["observations"][start:stop], last)),
            actions=arrays["actions"][start:stop],
            rewards=arrays["rewards"][start:stop],
            terminated=terminated,
            complete=terminated or complete,
            terminations=terminations if terminations[:-1].any() else None,
        )
