"""Reader of D4RL's HDF5 files: flat columns, one row a step (Fu et al. 2020, arXiv 2004.07219).

    observations [N, O], actions [N, A], rewards [N], terminals [N], and where the family has them timeouts [N] and
    next_observations [N, O]; further keys (metadata/, infos/, a plain `infos` array) are ignored.

Rewards and terminals may be `(N, 1)` and flags may be floats. No simulator and no `d4rl` package is needed. A file
that was written here carries what is known of it in the root attribute `offrl_info` (JSON of DatasetInfo's fields).
"""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from offrl.data.arrays import from_arrays
from offrl.data.checks import ReadOptions, check_dtype, check_length, empty, file_kind, flags, own_info
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.episodes import Rows, to_store
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

REQUIRED = ("observations", "actions", "rewards", "terminals")


def read_d4rl(path: Path, info: DatasetInfo | None = None, options: ReadOptions | None = None) -> OfflineDataset:
    """Read one D4RL-style HDF5 file (`.hdf5`, `.h5`, or either compressed as `.gz`).

    Args:
        path: the file.
        info: id, family, time limit, references; the file's own `offrl_info` replaces them field by field.

    Raises:
        OffrlError: the file is cut off, no HDF5, lacks a key, or holds what `offrl.data.episodes.to_store` refuses.
    """
    options = options or ReadOptions()
    info = info or DatasetInfo(id=path.name.split(".")[0])
    info = replace(info, source=str(path))
    if file_kind(path) == "gzip":
        return _read_compressed(path, info, options)
    with open_hdf5(path) as file:
        if "offrl_info" in file.attrs:
            info = own_info(file.attrs["offrl_info"], info, str(path))
        rows = _read_rows(file, options, str(path))
    return to_store(rows, info, options, str(path))


def _read_compressed(path: Path, info: DatasetInfo, options: ReadOptions) -> OfflineDataset:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        unpacked = Path(folder) / path.name.removesuffix(".gz")
        try:
            with gzip.open(path) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise OffrlError(f"{path}: the gzip file is cut off or damaged ({error}); fetch it again.") from error
        try:
            store = read_d4rl(unpacked, info, options)
        except OffrlError as error:
            raise OffrlError(str(error).replace(str(unpacked), str(path))) from error
    store.info = replace(store.info, source=str(path))
    return store


def open_hdf5(path: Path) -> h5py.File:
    """Open for reading; a file that is cut off, damaged or no HDF5 gets its own sentence."""
    try:
        # Without a chunk cache, since every chunk is read once: it would cost 8 MB an array.
        return h5py.File(path, "r", rdcc_nbytes=0)
    except OSError as error:
        text = str(error)
        if "truncated file" in text:
            have, want = re.search(r"eof = (\d+)", text), re.search(r"stored_eof = (\d+)", text)
            sizes = f" after {have[1]} of {want[1]} bytes" if have and want else ""
            raise OffrlError(f"{path}: the file is cut off{sizes}; fetch or copy it again.") from error
        if "signature not found" in text:
            raise OffrlError(f"{path}: this is no HDF5 file; fetch or write it again.") from error
        raise OffrlError(f"{path}: HDF5 cannot open it ({text.splitlines()[0]}); fetch or write it again.") from error


def _column(file: h5py.File, key: str, where: str) -> h5py.Dataset:
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise OffrlError(f"{where}: {key} is a group, not an array; this is no D4RL file.")
    if dataset.ndim == 0:
        raise OffrlError(f"{where}: {key} is a single number, not one row a step; this is no D4RL file.")
    check_dtype(key, dataset.dtype, where)
    return dataset


def row_blocks(dataset: h5py.Dataset) -> Iterator[tuple[int, int]]:
    """(first row, rows) of blocks of some 16k rows that cut no chunk, so that each chunk is unpacked once."""
    chunk = dataset.chunks[0] if dataset.chunks else 1
    step = chunk * -(-16_384 // chunk)
    for start in range(0, dataset.shape[0], step):
        yield start, min(step, dataset.shape[0] - start)


def _read(dataset: h5py.Dataset, out: np.ndarray, where: str) -> None:
    """Read a whole dataset into `out` in blocks, converting the type on the way: no float64 copy is ever held.

    The low-level calls skip a selection that costs `read_direct` a third more time.
    """
    space, rest = dataset.id.get_space(), dataset.shape[1:]
    try:
        for start, rows in row_blocks(dataset):
            space.select_hyperslab((start, *[0] * len(rest)), (rows, *rest))
            dataset.id.read(h5py.h5s.create_simple((rows, *rest)), space, out[start : start + rows])
    except OSError as error:
        key = str(dataset.name).lstrip("/")
        raise OffrlError(f"{where}: {key} cannot be read, the file is damaged ({error}); fetch it again.") from error


def _floats(dataset: h5py.Dataset, columns: bool, where: str) -> Tensor:
    """`[N, C]` (images and the like flattened) or, without `columns`, `[N]` from (N,) or (N, 1)."""
    n = dataset.shape[0]
    width = int(np.prod(dataset.shape[1:], dtype=np.int64))
    if not columns and width != 1:
        key = str(dataset.name).lstrip("/")
        raise OffrlError(f"{where}: {key} has shape {dataset.shape}; it must be one number a row.")
    tensor = empty(n, width) if columns else empty(n)
    if tensor.numel():
        _read(dataset, tensor.numpy().reshape(dataset.shape), where)
    return tensor


def _flags(dataset: h5py.Dataset, where: str) -> np.ndarray:
    array = np.empty(dataset.shape, dataset.dtype)
    if array.size:
        _read(dataset, array, where)
    return flags(str(dataset.name).lstrip("/"), array, where)


def _read_rows(file: h5py.File, options: ReadOptions, where: str) -> Rows:
    missing = [key for key in REQUIRED if key not in file]
    if missing and "episode_0" in file:
        raise OffrlError(f"{where}: this is the data file of a Minari dataset; give its folder instead.")
    if missing:
        there = ", ".join(sorted(file)) or "none"
        raise OffrlError(f"{where}: missing {' and '.join(missing)} (its keys: {there}); this is no D4RL file.")
    wanted = [*REQUIRED, "timeouts"] + (["next_observations"] if options.semantics == "exact" else [])
    columns = {key: _column(file, key, where) for key in wanted if key in file}
    for key, dataset in columns.items():
        check_length(key, dataset.shape[0], columns["observations"].shape[0], where)
    if "next_observations" in columns and columns["next_observations"].shape != columns["observations"].shape:
        shapes = f"{columns['next_observations'].shape} and {columns['observations'].shape}"
        raise OffrlError(f"{where}: next_observations and observations have shapes {shapes}; they must agree.")
    return Rows(
        observations=_floats(columns["observations"], True, where),
        actions=_actions(columns["actions"], where),
        rewards=_floats(columns["rewards"], False, where),
        terminals=_flags(columns["terminals"], where),
        timeouts=_flags(columns["timeouts"], where) if "timeouts" in columns else None,
        next_observations=_floats(columns["next_observations"], True, where)
        if "next_observations" in columns
        else None,
    )


def _actions(dataset: h5py.Dataset, where: str) -> Tensor:
    """Integers, one a row, are discrete actions; everything else is a box."""
    if dataset.dtype.kind not in "iu" or np.prod(dataset.shape[1:]) != 1:
        return _floats(dataset, True, where)
    array = np.empty(dataset.shape, np.int64)
    if array.size:
        _read(dataset, array, where)
    return torch.from_numpy(array.reshape(-1))


def read_d4rl_package(name: str, info: DatasetInfo | None, options: ReadOptions) -> OfflineDataset | None:
    """The dataset of an environment that the `d4rl` package registers; None without the package or the environment.

    Args:
        info: what the catalogue knows of it; without, the environment's own references and time limit are used.
    """
    try:
        # d4rl is never required, and where mujoco_py is missing its import raises a plain Exception.
        import d4rl  # noqa: F401
        import gym  # type: ignore[import-not-found]

        env = gym.make(name)
        data = env.get_dataset()
    except Exception:
        return None
    known = info or DatasetInfo(
        id=name,
        ref_min=getattr(env, "ref_min_score", None),
        ref_max=getattr(env, "ref_max_score", None),
        max_episode_steps=getattr(env, "_max_episode_steps", None),
    )
    return from_arrays(data, replace(known, source="d4rl package"), options)
