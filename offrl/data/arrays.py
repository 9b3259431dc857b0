"""Plain arrays, in memory or in an NPZ file, as a dataset; and a dataset as plain arrays."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.data.checks import ReadOptions, check_dtype, check_length, file_kind, flags, own_info
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.episodes import Rows, to_store
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing

ALIASES = {"terminals": "terminations", "timeouts": "truncations"}


def from_arrays(
    arrays: Mapping[str, Any], info: DatasetInfo | None = None, options: ReadOptions | None = None
) -> OfflineDataset:
    """A dataset of flat arrays, one row a step, copied.

    Args:
        arrays: `observations [N, ...]`, `actions [N, ...]` (integers `[N]` are discrete), `rewards [N]`, `terminals`
            (or `terminations`) `[N]`; optional `timeouts` (or `truncations`) `[N]` and `next_observations`. Numpy
            arrays, tensors or nested lists; other keys are ignored.
        info: what is known besides the numbers; its `max_episode_steps` cuts episodes when there are no timeouts,
            its bounds hold for the actions.
        options: see `ReadOptions`; the rules are those of `offrl.data.episodes`.

    Raises:
        OffrlError: a missing key, lengths that differ, NaN, actions out of bounds, no episode end, no transition.
    """
    info = info or DatasetInfo()
    where = info.source if info.source != "arrays" else "arrays"
    rows = _rows(arrays, where, copy=True)
    return to_store(rows, info, options or ReadOptions(), where)


def read_npz(path: Path, info: DatasetInfo | None = None, options: ReadOptions | None = None) -> OfflineDataset:
    """Read the keys of `from_arrays` from an NPZ file; pickled arrays in it are refused, never opened."""
    if file_kind(path) != "npz":
        raise OffrlError(f"{path}: this is no NPZ file; write it with numpy.savez.")
    info = replace(info or DatasetInfo(id=path.stem), source=str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(name.endswith("data.pkl") for name in file.files):
                raise OffrlError(f"{path}: this is a pickled PyTorch file, never read; save with numpy.savez instead.")
            if "offrl_info" in file.files:
                info = own_info(str(file["offrl_info"]), info, str(path))
            rows = _rows(file, str(path), copy=False)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise OffrlError(f"{path}: the file is cut off or damaged ({error}); write or fetch it again.") from error
    return to_store(rows, info, options or ReadOptions(), str(path))


def _rows(arrays: Mapping[str, Any], where: str, copy: bool) -> Rows:
    names = {key: _name(arrays, key) for key in (*Rows.__dataclass_fields__,)}
    optional = ("timeouts", "next_observations")
    missing = [key for key, name in names.items() if name is None and key not in optional]
    if missing:
        hint = "; give terminals of zeros if no episode ever terminates" if missing == ["terminals"] else ""
        there = ", ".join(sorted(str(key) for key in arrays)) or "none"
        raise OffrlError(f"{where}: missing {' and '.join(missing)} (its keys: {there}){hint}.")
    columns = {key: _array(arrays, name, where) for key, name in names.items() if name is not None}
    length = len(columns["observations"])
    for key, array in columns.items():
        check_length(key, len(array), length, where)
    nxt = columns.get("next_observations")
    if nxt is not None and nxt.shape != columns["observations"].shape:
        shapes = f"{nxt.shape} and {columns['observations'].shape}"
        raise OffrlError(f"{where}: next_observations and observations have shapes {shapes}; they must agree.")
    timeouts = columns.get("timeouts")
    return Rows(
        observations=_matrix(columns["observations"], copy),
        actions=_actions(columns["actions"], copy),
        rewards=_vector("rewards", columns["rewards"], copy, where),
        terminals=flags("terminals", columns["terminals"], where).copy(),
        timeouts=None if timeouts is None else flags("timeouts", timeouts, where).copy(),
        next_observations=None if nxt is None else _matrix(nxt, copy),
    )


def _name(arrays: Mapping[str, Any], key: str) -> str | None:
    """The name under which `arrays` holds a column."""
    return next((name for name in (key, ALIASES.get(key, key)) if name in arrays), None)


def _array(arrays: Mapping[str, Any], name: str, where: str) -> np.ndarray:
    try:
        value = arrays[name]
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except ValueError as error:
        # numpy refuses to load pickled (object) arrays, and to make an array of rows with different lengths.
        if not any(word in str(error) for word in ("pickle", "inhomogeneous")):
            raise
        message = f"{where}: {name} has dtype object; store it as plain numbers (float32, int64 or bool)."
        raise OffrlError(message) from error
    check_dtype(name, array.dtype, where)
    if array.ndim == 0:
        raise OffrlError(f"{where}: {name} is a single number; it must have one row a step.")
    return array


def _float32(array: np.ndarray, copy: bool) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C", copy=True if copy else None))


def _matrix(array: np.ndarray, copy: bool) -> Tensor:
    return _float32(array.reshape(len(array), -1) if len(array) else array.reshape(0, 1), copy)


def _vector(key: str, array: np.ndarray, copy: bool, where: str) -> Tensor:
    if array.size != len(array):
        raise OffrlError(f"{where}: {key} has shape {array.shape}; it must be one number a row.")
    return _float32(array.reshape(-1), copy)


def _actions(array: np.ndarray, copy: bool) -> Tensor:
    """Integers, one a row, are discrete actions; everything else is a box."""
    if array.dtype.kind in "iu" and array.size == len(array):
        return torch.from_numpy(array.reshape(-1).astype(np.int64))
    return _matrix(array, copy)


def to_arrays(store: OfflineDataset) -> dict[str, np.ndarray]:
    """The dataset as flat columns of D4RL's layout; reading them back (`exact`) gives the same Store.

    Tails need the layout without `next_observations` (each tail is one more row, a timeout). That layout cannot hold
    an episode that is cut without a tail, nor a stored successor other than the next row; where a dataset has both kinds
    of episodes tails are left out. An unfinished episode that is not the last is marked by a timeout.
    """
    numbers = {name: tensor.cpu().numpy() for name, tensor in store.tensors().items()}
    ends = numbers["offsets"][1:] - 1
    terminated = numbers["terminations"][ends] > 0
    cut = numbers["complete"].copy()
    cut[:-1] = True
    if not numbers["has_tail"].any() or (~terminated & ~numbers["has_tail"]).any():
        timeouts = np.zeros(len(store), dtype=bool)
        # AntMaze's terminals end no episode, so that every end needs a timeout.
        timeouts[ends] = cut if store.info.family == "antmaze" else cut & ~terminated
        columns = {key: numbers[key] for key in ("observations", "actions", "rewards", "next_observations")}
        return columns | {"terminals": numbers["terminations"] > 0, "timeouts": timeouts}
    tails = np.flatnonzero(numbers["has_tail"])
    after = ends[tails] + 1
    timeouts = np.zeros(len(store), dtype=bool)
    timeouts[ends] = (store.info.family == "antmaze") & cut & ~numbers["has_tail"]
    return {
        "observations": np.insert(numbers["observations"], after, numbers["next_observations"][ends[tails]], axis=0),
        "actions": np.insert(numbers["actions"], after, numbers["tail_actions"][tails], axis=0),
        "rewards": np.insert(numbers["rewards"], after, numbers["tail_rewards"][tails]),
        "terminals": np.insert(numbers["terminations"] > 0, after, False),
        "timeouts": np.insert(timeouts, after, cut[tails]),
    }


def info_json(info: DatasetInfo) -> str:
    """`info` as the JSON that files carry under `offrl_info`."""
    fields = asdict(info)
    del fields["source"]  # a path on the machine that wrote the file
    return json.dumps(fields, default=str)


def write_npz(store: OfflineDataset, path: Path) -> None:
    """Write a dataset as an NPZ file that `read_npz` reads back; whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        arrays: dict[str, Any] = {"offrl_info": np.array(info_json(store.info)), **to_arrays(store)}
        np.savez(file, **arrays)
