"""Reader of D4RL's HDF5 files: flat columns, one row a step (Fu et al. 2020, arXiv 2004.07219).

    observations [N, O], actions [N, A], rewards [N], terminals [N], and where the family has them timeouts [N] and
    next_observations [N, O]; further keys (metadata/, infos/, a plain `infos` array) are ignored.

Rewards and terminals may be `(N, 1)` and flags may be floats. No simulator and no `d4rl` package is needed. A file
that was written here carries what is known of it in the root attribute `offrl_info` (JSON of DatasetInfo's fields).
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
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
from offrl.data.hdf5 import attribute, column, keys, open_hdf5, read_into, reading, row_blocks
from offrl.utils.errors import OffrlError, one_line
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
        if (written := attribute(file, "offrl_info", path)) is not None:
            info = own_info(written, info, str(path))
        rows = _read_rows(file, options, path)
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


def _floats(dataset: h5py.Dataset, columns: bool, path: Path) -> Tensor:
    """`[N, C]` (images and the like flattened) or, without `columns`, `[N]` from (N,) or (N, 1)."""
    n, key = dataset.shape[0], str(dataset.name).lstrip("/")
    width = int(np.prod(dataset.shape[1:], dtype=np.int64))
    if not columns and width != 1:
        raise OffrlError(f"{path}: {key} has shape {dataset.shape}; it must be one number a row.")
    with reading(path, key):
        tensor = empty(n, width) if columns else empty(n)
        if tensor.numel():
            read_into(dataset, tensor.numpy().reshape(dataset.shape), path)
    return tensor


def _flags(dataset: h5py.Dataset, path: Path) -> np.ndarray:
    key = str(dataset.name).lstrip("/")
    with reading(path, key):
        array = np.empty(dataset.shape, dataset.dtype)
        if array.size:
            read_into(dataset, array, path)
    return flags(key, array, str(path))


def _read_rows(file: h5py.File, options: ReadOptions, path: Path) -> Rows:
    where, present = str(path), keys(file, path)
    missing = [key for key in REQUIRED if key not in present]
    if missing and "episode_0" in present:
        raise OffrlError(f"{where}: this is the data file of a Minari dataset; give its folder instead.")
    if missing:
        there = one_line(", ".join(present) or "none")
        raise OffrlError(f"{where}: missing {' and '.join(missing)} (its keys: {there}); this is no D4RL file.")
    wanted = [*REQUIRED, "timeouts"] + (["next_observations"] if options.semantics == "exact" else [])
    columns = {key: column(file, key, path) for key in wanted if key in present}
    for key, dataset in columns.items():
        check_dtype(key, dataset.dtype, where)
        check_length(key, dataset.shape[0], columns["observations"].shape[0], where)
    if "next_observations" in columns and columns["next_observations"].shape != columns["observations"].shape:
        shapes = f"{columns['next_observations'].shape} and {columns['observations'].shape}"
        raise OffrlError(f"{where}: next_observations and observations have shapes {shapes}; they must agree.")
    return Rows(
        observations=_floats(columns["observations"], True, path),
        actions=_actions(columns["actions"], path),
        rewards=_floats(columns["rewards"], False, path),
        terminals=_flags(columns["terminals"], path),
        timeouts=_flags(columns["timeouts"], path) if "timeouts" in columns else None,
        next_observations=_floats(columns["next_observations"], True, path) if "next_observations" in columns else None,
    )


def _actions(dataset: h5py.Dataset, path: Path) -> Tensor:
    """Integers, one a row, are discrete actions; everything else is a box."""
    if dataset.dtype.kind not in "iu" or np.prod(dataset.shape[1:]) != 1:
        return _floats(dataset, True, path)
    with reading(path, "actions"):
        array = np.empty(dataset.shape, np.int64)
        if array.size:
            read_into(dataset, array, path)
    return torch.from_numpy(array.reshape(-1))


def check_complete(path: Path) -> None:
    """Read every required column of a D4RL file once, so that each compressed block proves its own checksum.

    Raises:
        OffrlError: no HDF5 file, cut off, a missing key, or a block that cannot be read.
    """
    with open(path, "rb") as content:
        head = content.read(16)  # tells what an error page is better than HDF5 does
    if not head.startswith(b"\x89HDF"):
        raise OffrlError(f"{path}: this is no HDF5 file (it begins with {head!r}); fetch it from another place.")
    with open_hdf5(path) as file:
        present = keys(file, path)
        if missing := [key for key in REQUIRED if key not in present]:
            raise OffrlError(f"{path}: missing {' and '.join(missing)}; fetch it from another place.")
        for key in sorted({*REQUIRED, "timeouts", "next_observations"}.intersection(present)):
            dataset = column(file, key, path)
            for start, rows in row_blocks(dataset):
                with reading(path, key):
                    dataset[start : start + rows]


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
