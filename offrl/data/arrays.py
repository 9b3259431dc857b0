"""Plain arrays, in memory or in an NPZ file, as a dataset; and a dataset as plain arrays."""

from __future__ import annotations

import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.data.checks import ReadOptions, as_array, file_kind, warn_of
from offrl.data.columns import read_rows, shortened
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.episodes import to_store
from offrl.data.memory import check_memory, too_large
from offrl.data.schema import own_info
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing

# What zipfile and numpy raise of a damaged NPZ file: RuntimeError of an encrypted member (NotImplementedError of a version to
# come is one, too), TokenError of a header, which numpy reads by Python's tokenizer.
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, tokenize.TokenError)


def from_arrays(
    arrays: Mapping[str, Any], info: DatasetInfo | None = None, options: ReadOptions | None = None
) -> OfflineDataset:
    """A dataset of flat arrays, one row a step, copied.

    Args:
        arrays: `observations [N, ...]`, `actions [N, ...]` (integers `[N]`, bools and one-hot integers are discrete),
            `rewards [N]`, `terminals [N]`; optional `timeouts [N]`, `next_observations` and what
            `offrl.data.columns` lists. Numpy arrays, tensors or nested lists; other keys are ignored.
        info: what is known besides the numbers; its `max_episode_steps` cuts episodes when neither timeouts nor
            successors show their ends, its bounds hold for the actions. `discrete` is the number of discrete actions
            (`action_count` of the arrays says the same), which is else the largest one that occurs plus 1.
        options: see `ReadOptions`; the rules are those of `offrl.data.episodes`.

    Raises:
        OffrlError: a missing key, lengths that differ, NaN, actions out of bounds, no episode end, no transition.
    """
    for name, given, wanted in (("info", info, DatasetInfo), ("options", options, ReadOptions)):
        if not isinstance(given, wanted | None):
            example = f'such as DatasetInfo(id="{given}")' if isinstance(given, str) else "or leave it out"
            raise OffrlError(
                f"{name} is of type {type(given).__name__}; give an offrl.data.{wanted.__name__}, {example}."
            )
    if not hasattr(arrays, "keys"):
        raise OffrlError(
            f"arrays is of type {type(arrays).__name__}; give a dictionary of observations, actions, rewards and terminals."
        )
    info, options = info or DatasetInfo(), options or ReadOptions()
    store = _to_dataset(Arrays(arrays, info.source, copy=True), info, options)
    warn_of(store.info)
    return store


def read_npz(path: Path, info: DatasetInfo | None = None, options: ReadOptions | None = None) -> OfflineDataset:
    """Read the keys of `from_arrays` from an NPZ file; pickled arrays in it are refused, never opened."""
    if file_kind(path) != "npz":
        raise OffrlError(f"{path}: this is no NPZ file; write it with numpy.savez.")
    info = replace(info or DatasetInfo(id=path.stem), source=str(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            _check_members(file.zip.namelist(), path)
            written = "offrl_info" in file.files
            if written:
                info = own_info(str(file["offrl_info"]), info, str(path))
            return _to_dataset(NpzFile(file, path), info, options or ReadOptions(), written)
    except UNREADABLE as error:
        raise OffrlError(f"{path}: the file is cut off or damaged ({error}); write or fetch it again.") from error


def _check_members(names: list[str], path: Path) -> None:
    if any(name.endswith("data.pkl") for name in names):
        raise OffrlError(f"{path}: this is a pickled PyTorch file, never read; save with numpy.savez instead.")
    if names and not any(name.endswith(".npy") for name in names):
        raise OffrlError(f"{path}: this is a zip archive of {shortened(names)}, no NPZ file; unpack it first.")


def _to_dataset(source: Arrays, info: DatasetInfo, options: ReadOptions, written: bool = False) -> OfflineDataset:
    info = replace(info, family=options.family or info.family)
    rows, info = read_rows(source, info, options.semantics == "exact")
    rows.checked = written
    return to_store(rows, info, options, source.where)


class Arrays:
    """Arrays of a caller as a source of columns."""

    def __init__(self, arrays: Mapping[str, Any], where: str, copy: bool) -> None:
        self.arrays, self.where, self.copy = arrays, where, copy
        self.read: dict[str, np.ndarray] = {}

    def keys(self) -> list[str]:
        return [str(key) for key in self.arrays]

    def described(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        array = self.array(key)
        self.read[key] = array
        return array.shape, array.dtype

    def array(self, key: str) -> np.ndarray:
        if key in self.read:
            return self.read.pop(key)
        try:
            value = self.arrays[key]
        except ValueError as error:
            if "pickle" not in str(error):  # numpy refuses to load arrays of objects
                raise
            message = f"{self.where}: {key} has dtype object; store it as plain numbers (float32, int64 or bool)."
            raise OffrlError(message) from error
        return as_array(key, value, self.where)

    def floats(self, key: str) -> Tensor:
        array = self.array(key)
        try:
            copied = np.array(array, dtype=np.float32, order="C", copy=True if self.copy else None)
        except MemoryError as error:
            raise too_large(4 * array.size, f"{self.where}: {key}") from error
        return torch.from_numpy(copied)


class NpzFile(Arrays):
    """Arrays of an NPZ file as a source of columns; shapes are looked up without reading the numbers."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, str(path), copy=False)
        self.file = file

    def described(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        with self.file.zip.open(f"{key}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
        return shape, dtype

    def array(self, key: str) -> np.ndarray:
        shape, dtype = self.described(key)
        if dtype.kind in "fiub":
            check_memory(math.prod(shape) * dtype.itemsize, f"{self.where}: {key}")
        return super().array(key)


def to_arrays(store: OfflineDataset) -> dict[str, np.ndarray]:
    """The dataset as flat columns of D4RL's layout; reading them back (`exact`) gives the same Store.

    Tails need the layout without `next_observations` (each tail is one more row, a timeout). That layout cannot hold
    an episode that is cut without a tail, nor a stored successor other than the next row; where a dataset has both kinds
    of episodes tails are left out. An unfinished episode that is not the last is marked by a timeout. Where episodes go on
    behind terminations, `dones` mark their ends.
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
        columns |= {"terminals": numbers["terminations"] > 0, "timeouts": timeouts}
        if store.info.family != "antmaze" and terminated.sum() < columns["terminals"].sum():
            columns["dones"] = np.zeros(len(store), dtype=bool)
            columns["dones"][ends] = cut | terminated
        return columns
    tails = np.flatnonzero(numbers["has_tail"])
    after = ends[tails] + 1
    timeouts = np.zeros(len(store), dtype=bool)
    timeouts[ends] = (store.info.family == "antmaze") & cut & ~numbers["has_tail"]
    columns = {
        "observations": np.insert(numbers["observations"], after, numbers["next_observations"][ends[tails]], axis=0),
        "actions": np.insert(numbers["actions"], after, numbers["tail_actions"][tails], axis=0),
        "rewards": np.insert(numbers["rewards"], after, numbers["tail_rewards"][tails]),
        "terminals": np.insert(numbers["terminations"] > 0, after, False),
        "timeouts": np.insert(timeouts, after, cut[tails]),
    }
    if store.info.family != "antmaze" and terminated.sum() < columns["terminals"].sum():
        dones = np.zeros(len(store), dtype=bool)
        dones[ends] = terminated
        columns["dones"] = np.insert(dones, after, cut[tails])
    return columns


def info_json(info: DatasetInfo) -> str:
    """`info` as the JSON that files carry under `offrl_info`."""
    fields = asdict(info)
    del fields["source"]  # a path on the machine that wrote the file
    return json.dumps(fields, default=str)


def write_npz(store: OfflineDataset, path: Path | str) -> None:
    """Write a dataset as an NPZ file that `read_npz` reads back; whole or not at all."""
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        arrays: dict[str, Any] = {"offrl_info": np.array(info_json(store.info)), **to_arrays(store)}
        np.savez(file, **arrays)
