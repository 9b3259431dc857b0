"""Reader of Minari datasets: a folder with `data/metadata.json` and one HDF5 group an episode (Younis et al. 2024).

The usual HDF5 format is read with h5py's low-level calls straight into flat float32 memory, without the `minari`
package and without its cost of about 1.4 ms an episode; other formats (arrow, parquet, JPEG images) go through it.

Dict observations become one vector: AntMaze `achieved_goal, observation` (29 numbers as in D4RL) and PointMaze
`observation` (4 numbers), both without the goal, which D4RL holds fixed (`goals=True` keeps it); every other
environment all its keys in alphabetical order, nested ones too, as `gymnasium.spaces.flatten` does. Discrete
observations become one-hot; text is left out. `info.provenance["observation_keys"]` lists what was taken.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from h5py import h5d, h5g, h5s, h5t
from torch import Tensor

from offrl.data.actions import check_actions, whole
from offrl.data.catalogue import environment_references, family_of
from offrl.data.catalogue import minari as minari_catalogue
from offrl.data.checks import ReadOptions, check_dtype, check_finite, empty, flags
from offrl.data.dataset import FIRST_ACTION, RECORDED_MAZE, DatasetInfo, OfflineDataset
from offrl.data.hdf5 import DENSEST, check_file, check_inside, keys, open_hdf5, reading, unreadable
from offrl.data.memory import check_memory
from offrl.data.schema import Box, EnvSpec, MinariMetadata, from_json, minari_metadata, own_info
from offrl.data.spaces import Leaf, action_info, observation_leaves
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.files import MOST_BYTES, read_bytes

SCALAR_KEYS = ("rewards", "terminations", "truncations")


def minari_root() -> Path:
    """Folder of local Minari datasets: `MINARI_DATASETS_PATH`, else `~/.minari/datasets`."""
    return Path(os.path.expanduser(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets"))


def local_folder(name: str) -> Path:
    """Where a Minari id lies locally; of a remote id (`hf://owner/dataset-v0`) the part behind the owner."""
    return minari_root() / re.sub(r"^\w+://[^/]+/", "", name)


def data_folder(path: Path) -> Path | None:
    """The folder of a Minari dataset that holds its files: `path/data` or `path` itself; None when there are none.

    Since Minari 0.5 there is a `metadata.json`; before, `main_data.hdf5` told everything.
    """
    folders = [(folder, name) for name in ("metadata.json", "main_data.hdf5") for folder in (path / "data", path)]
    return next((folder for folder, name in folders if (folder / name).is_file()), None)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a Minari dataset folder tells of itself: `metadata.json`, or the data file's attributes (Minari 0.4)."""
    folder = data_folder(path)
    if folder is None:
        raise OffrlError(
            f"{path}: this folder is no dataset (no data/metadata.json in it); give a file or a Minari folder."
        )
    if not (folder / "metadata.json").is_file():
        return _attributes(folder / "main_data.hdf5")
    text = read_bytes(folder / "metadata.json", "fetch the dataset again", MOST_BYTES)
    return from_json(text, str(folder / "metadata.json"))


def _attributes(path: Path) -> dict[str, Any]:
    """The metadata of Minari up to 0.4: the attributes of its data file."""
    with open_hdf5(path) as file, reading(path, "its attributes"):
        attributes = {key: file.attrs[key] for key in file.attrs}
        values = {key: value.item() if isinstance(value, np.generic) else value for key, value in attributes.items()}
        metadata = {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}
    if missing := [key for key in ("total_steps", "observation_space", "action_space") if key not in metadata]:
        raise OffrlError(
            f"{path}: no metadata.json lies beside it and, as a file of Minari 0.4, it lacks {', '.join(missing)}; fetch "
            "the dataset again with a newer Minari."
        )
    return metadata | {"data_format": "hdf5", "jpeg_encoding": False}


# ---- what is known besides the numbers -----------------------------------------------------------------------------


def dataset_info(metadata: MinariMetadata, asked: str | None, path: Path, where: str) -> DatasetInfo:
    """What metadata, our catalogue and the dataset's own `offrl_info` tell (each replacing the one before)."""
    name = asked or metadata.dataset_id or path.name
    specs = [spec for spec in (metadata.eval_env_spec, metadata.env_spec) if spec]
    spec = specs[0] if specs else EnvSpec()
    entry = minari_catalogue().get(name)
    env_id = spec.id or (entry.env_id if entry else None) or None
    provenance = {
        key: value
        for key in ("algorithm_name", "author", "code_permalink", "minari_version", "requirements")
        if (value := getattr(metadata, key))
    }
    if isinstance(spec.entry_point, str) and not entry:
        provenance["entry_point"] = one_line(spec.entry_point)
    if entry and entry.note:
        provenance["note"] = entry.note
    if len(specs) == 2 and (maze := (specs[1].kwargs or {}).get("maze_map")) is not None:
        provenance[RECORDED_MAZE] = maze
    ref_min, ref_max = metadata.ref_min_score, metadata.ref_max_score
    if ref_min is not None and ref_max is not None and ref_min < ref_max:
        provenance["references"] = "the dataset's metadata"
    elif env_id and (references := environment_references(env_id)):
        ref_min, ref_max, provenance["references"] = references
    else:
        ref_min = ref_max = None
    limit = (entry.max_episode_steps if entry else None) or spec.max_episode_steps
    info = DatasetInfo(
        id=name,
        source=str(path),
        env_id=env_id,
        env_kwargs=spec.kwargs or {},
        family=family_of(env_id),
        ref_min=None if ref_min is None else float(ref_min),
        ref_max=None if ref_max is None else float(ref_max),
        max_episode_steps=limit,
        provenance=provenance,
    )
    if metadata.offrl_info is not None:
        info = own_info(metadata.offrl_info, info, where)
        info = replace(info, source=str(path), provenance=provenance | info.provenance)
        if asked is not None:
            info = replace(info, id=asked)
    return info


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Memory:
    """Flat memory of the whole dataset and the position up to which it is filled."""

    observations: np.ndarray
    next_observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    lengths: list[int] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)
    filled: int = 0


def read_minari(path: Path, name: str | None = None, options: ReadOptions | None = None) -> OfflineDataset:
    """Read a local Minari dataset.

    Args:
        path: its folder (the one that holds `data/`, or `data/` itself).
        name: id by which the user asked for it; default: the dataset's own.
        options: `semantics` makes no difference here (every successor is stored and nothing is dropped).

    Raises:
        OffrlError: no Minari dataset, spaces that are no numbers, an episode whose lengths do not fit together
            (`len(observations) == T + 1`), NaN, flags other than 0 and 1, actions out of bounds, no episode.
    """
    options, where = options or ReadOptions(), str(path)
    metadata = minari_metadata(read_metadata(path), where)
    info, leaves, width, first = _described(metadata, name, path, options)
    n, size = metadata.total_steps, sum(leaf.size for leaf in leaves)
    folder = data_folder(path) or path
    jpeg = metadata.jpeg_encoding and any(leaf.image for leaf in leaves)
    in_hdf5 = metadata.data_format == "hdf5" and not jpeg
    if in_hdf5:
        _check_steps(n, folder / "main_data.hdf5")
    check_memory(4 * n * (2 * size + max(width, 2) + 2), where)
    with reading(path, f"total_steps={n} in metadata.json"):
        actions = empty(n, width) if width else torch.empty(n, dtype=torch.int64)
        observations, successors, rewards, terminations = empty(n, size), empty(n, size), empty(n), empty(n)
    memory = _Memory(
        observations=observations.numpy(),
        next_observations=successors.numpy(),
        actions=actions.numpy(),
        rewards=rewards.numpy(),
        terminations=terminations.numpy(),
    )
    if in_hdf5:
        _read_hdf5(folder / "main_data.hdf5", leaves, memory)
    else:
        if (folder / "main_data.hdf5").is_file():
            check_file(folder / "main_data.hdf5")
        _read_with_minari(folder, leaves, memory, where)
    if memory.filled == 0:
        raise OffrlError(f"{where}: it holds no transition ({len(memory.lengths)} episodes); check the dataset.")
    if memory.filled != n:
        raise OffrlError(
            f"{where}: metadata.json promises {n} steps but the episodes hold {memory.filled}; fetch it again."
        )
    for key, tensor in (("observations", observations), ("next_observations", successors), ("rewards", rewards)):
        check_finite(key, tensor, where)
    if width:
        check_finite("actions", actions, where)
    else:
        actions -= first
    info = check_actions(actions, info, options, where)
    return OfflineDataset(
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=successors,
        terminations=terminations,
        offsets=torch.from_numpy(np.append(0, np.cumsum(memory.lengths))),
        complete=torch.tensor(memory.complete),
        info=info,
    )


def _described(
    metadata: MinariMetadata, name: str | None, path: Path, options: ReadOptions
) -> tuple[DatasetInfo, list[Leaf], int, int]:
    """What metadata tells: info, the parts of an observation, an action's width (0: discrete), the first action."""
    info = dataset_info(metadata, name, path, str(path))
    info, space = replace(info, family=options.family or info.family), metadata.action_space
    if isinstance(space, Box) and options.action_bound is not None:
        space = space.model_copy(update={"low": -options.action_bound, "high": options.action_bound})
    elif isinstance(space, Box) and options.action_low is not None:
        space = space.model_copy(update={"low": options.action_low, "high": options.action_high})
    info, width, first = action_info(space, info, str(path))
    if first:
        info = replace(info, provenance=info.provenance | {FIRST_ACTION: first})
    leaves = observation_leaves(metadata.observation_space, info.env_id or "", options.goals, str(path))
    if names := [leaf.name for leaf in leaves if leaf.path]:
        info = replace(info, provenance=info.provenance | {"observation_keys": names})
    return info, leaves, width, first


def _add_episode(
    memory: _Memory,
    episode: str,
    observations: list[np.ndarray],
    leaves: list[Leaf],
    steps: dict[str, np.ndarray],
    where: str,
) -> None:
    """Check one episode and copy it behind what is filled; an episode without a step is skipped."""
    for key, array in steps.items():
        if array.ndim == 0:
            raise OffrlError(f"{where}: {key} of {episode} is a single number; it must have one row a step.")
    length = len(steps["rewards"])
    for key, array in steps.items():
        if len(array) != length:
            raise OffrlError(
                f"{where}: {key} of {episode} has {len(array)} rows but rewards has {length}; fetch it again."
            )
    for leaf, array in zip(leaves, observations):
        if len(array) != length + 1:
            key = "/".join(("observations", *leaf.path))
            raise OffrlError(
                f"{where}: {key} of {episode} has {len(array)} rows; {length} steps need {length + 1}. "
                "Fetch a newer version of the dataset."
            )
    start, stop = memory.filled, memory.filled + length
    memory.filled = stop
    if length == 0 or stop > len(memory.rewards):
        return  # too many steps are reported once everything is counted
    if steps["rewards"].size != length:
        shape = steps["rewards"].shape
        raise OffrlError(f"{where}: rewards of {episode} has shape {shape}; it must be one number a step.")
    ends = {key: flags(f"{key} of {episode}", steps[key], where) for key in ("terminations", "truncations")}
    actions = steps["actions"]
    if memory.actions.dtype == np.int64:
        actions = whole(actions.reshape(-1), f"actions of {episode}", where)
    column = 0
    try:
        for leaf, array in zip(leaves, observations):
            array = leaf.flat(array)
            memory.observations[start:stop, column : column + leaf.size] = array[:-1]
            memory.next_observations[start:stop, column : column + leaf.size] = array[1:]
            column += leaf.size
        memory.actions[start:stop] = actions.reshape(length, *memory.actions.shape[1:])
    except (ValueError, IndexError) as error:
        raise OffrlError(f"{where}: {episode} does not fit the spaces in metadata.json ({error}).") from error
    memory.rewards[start:stop] = steps["rewards"].reshape(length)
    memory.terminations[start:stop] = ends["terminations"]
    memory.lengths.append(length)
    memory.complete.append(bool(ends["terminations"][-1] or ends["truncations"][-1]))


def _episode_names(file: h5py.File, path: Path) -> list[str]:
    """The groups of an open HDF5 file that are episodes, by number."""
    names = [key for key in keys(file, path) if re.fullmatch("episode_[0-9]{1,18}", key)]
    return sorted(names, key=lambda key: int(key[8:]))


def _episode(file: h5py.File, name: str, path: Path) -> h5g.GroupID:
    with reading(path, name):
        return h5g.open(file.id, name.encode())


def _check_steps(steps: int, path: Path) -> None:
    """Refuse a promise of more steps than the data file can hold, each of which takes at least a byte of it."""
    if not path.is_file():
        raise OffrlError(f"{path}: the dataset's data file is missing; fetch the dataset again.")
    room = path.stat().st_size
    if not 0 <= steps <= DENSEST * room:
        raise OffrlError(
            f"{path}: metadata.json promises {steps} steps, which {room:,} bytes cannot hold; fetch the dataset again."
        )


def _read_hdf5(path: Path, leaves: list[Leaf], memory: _Memory) -> None:
    names = ["/".join(("observations", *leaf.path)) for leaf in leaves]
    with open_hdf5(path) as file:
        episodes = _episode_names(file, path)
        if not episodes:
            return
        first = h5py.Group(_episode(file, episodes[0], path))
        columns = {name: _Column(first, name, np.dtype(np.float32), path) for name in [*names, *SCALAR_KEYS]}
        # Class indices are read as float64, since HDF5 would cut the fraction off floats that are none.
        kind = np.dtype(np.float64 if memory.actions.dtype == np.int64 else np.float32)
        columns["actions"] = _Column(first, "actions", kind, path)
        for episode in episodes:
            group = _episode(file, episode, path)
            arrays = {name: column.read(group, episode) for name, column in columns.items()}
            observations = [arrays.pop(name) for name in names]
            _add_episode(memory, episode, observations, leaves, arrays, str(path))


def read_noise(path: Path) -> Tensor:
    """`[N, ...]`: what the environment drew at each step (`info["noise"]`), row for row as `read_minari` has them.

    Raises:
        OffrlError: the dataset has none.
    """
    file_path = (data_folder(path) or path) / "main_data.hdf5"
    if not file_path.is_file():
        raise OffrlError(f"{path}: this is no Minari dataset in HDF5, so it tells no noise.")
    parts = []
    with open_hdf5(file_path) as file:
        episodes = _episode_names(file, file_path)
        first = h5py.Group(_episode(file, episodes[0], file_path)) if episodes else {}
        if "infos/noise" not in first:
            raise OffrlError(f"{path}: its environment's noise was not recorded.")
        column = _Column(first, "infos/noise", None, file_path)
        for episode in episodes:
            parts.append(column.read(_episode(file, episode, file_path), episode)[1:])  # the first is the reset's
    return torch.from_numpy(np.concatenate(parts))


class _Column:
    """Reads one array of every episode. What an episode has in common with the first is looked up once: opening an
    HDF5 object costs more here than its bytes."""

    def __init__(self, episode: h5py.Group, name: str, dtype: np.dtype | None, path: Path) -> None:
        """`dtype`: what the numbers are converted to; None: they stay as they are stored."""
        self.name, self.path, self.key, self.room = name, path, name.encode(), path.stat().st_size
        with reading(path, f"{name} of {episode.name}"):
            array = episode.get(name)
            if not isinstance(array, h5py.Dataset):
                raise OffrlError(f"{path}: {episode.name} lacks {name}; fetch the dataset again.")
            check_dtype(f"{name} of {episode.name}", array.dtype, str(path))
            # HDF5 has no conversion from its enumerations (which bool is) to numbers.
            self.dtype = array.dtype if array.dtype.kind == "b" or dtype is None else dtype
            self.type = h5t.py_create(self.dtype)

    def read(self, group: h5g.GroupID, episode: str) -> np.ndarray:
        try:
            dataset = h5d.open(group, self.key)
            shape = dataset.shape
            claimed = math.prod(shape) * self.dtype.itemsize
            check_inside(dataset, claimed, self.room, self.path, f"{self.name} of {episode}")
            out = np.empty(shape, self.dtype)
            if out.size:
                dataset.read(h5s.ALL, h5s.ALL, out, self.type)
        except OffrlError:
            raise
        except KeyError as error:
            raise OffrlError(f"{self.path}: {episode} lacks {self.name}; fetch the dataset again.") from error
        except Exception as error:  # `reading` would cost as much as the array
            raise unreadable(self.path, f"{self.name} of {episode}", error) from error
        return out


def _read_with_minari(folder: Path, leaves: list[Leaf], memory: _Memory, where: str) -> None:
    """Formats other than plain HDF5, through the minari package."""
    try:
        from minari import MinariDataset
    except ImportError as error:
        raise OffrlError(
            f'{where}: this format needs the minari package; pip install ".[minari]" in the checkout of offrl.'
        ) from error
    try:
        dataset = MinariDataset(folder)
        for episode in dataset.iterate_episodes():
            observations = []
            for leaf in leaves:
                value: Any = episode.observations
                for key in leaf.path:
                    value = value[int(key[7:])] if key.startswith("_index_") else value[key]
                observations.append(np.asarray(value))
            steps = {key: np.asarray(getattr(episode, key)) for key in ("actions", *SCALAR_KEYS)}
            _add_episode(memory, f"episode_{episode.id}", observations, leaves, steps, where)
    except OffrlError:
        raise
    except Exception as error:  # minari raises whatever its storage does
        raise OffrlError(f"{where}: minari cannot read it ({error}); fetch the dataset again.") from error


def local_datasets(root: Path | None = None) -> list[str]:
    """Ids of the Minari datasets under `root` (default: `minari_root()`)."""
    root = root or minari_root()
    names = ("metadata.json", "main_data.hdf5") if root.is_dir() else ()
    found = {file.parent.parent for name in names for file in root.glob(f"**/data/{name}")}
    return sorted(folder.relative_to(root).as_posix() for folder in found)
