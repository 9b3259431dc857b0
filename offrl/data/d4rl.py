"""Reader of D4RL's HDF5 files: flat columns, one row a step (Fu et al. 2020, arXiv 2004.07219).

    observations [N, O], actions [N, A], rewards [N], terminals [N], and where the family has them timeouts [N] and
    next_observations [N, O]; `offrl.data.columns` has further keys; others (metadata/, infos/, a plain `infos` array) are
    ignored.

Rewards and terminals may be `(N, 1)` and flags may be floats. No simulator and no `d4rl` package is needed. A file
that was written here carries what is known of it in the root attribute `offrl_info` (JSON of DatasetInfo's fields).
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from offrl.data.arrays import from_arrays, read_npz
from offrl.data.checks import ReadOptions, empty, file_kind
from offrl.data.columns import Source, read_rows
from offrl.data.d3rlpy import D3rlpyFile, is_d3rlpy
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.episodes import to_store
from offrl.data.hdf5 import attribute, column, keys, open_hdf5, read_into, reading, row_blocks
from offrl.data.schema import own_info
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

# Bytes of disk that unpacking leaves free.
SPARE_DISK = 1 << 28
# What every file of D4RL itself has.
REQUIRED = ("observations", "actions", "rewards", "terminals")


def read_d4rl(path: Path, info: DatasetInfo | None = None, options: ReadOptions | None = None) -> OfflineDataset:
    """Read one D4RL-style HDF5 file (`.hdf5`, `.h5`), or such a file or an NPZ file packed with gzip.

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
        written = attribute(file, "offrl_info", path)
        if written is not None:
            info = own_info(written, info, str(path))
        info = replace(info, family=options.family or info.family)
        rows, info = read_rows(_source(file, path), info, options.semantics == "exact")
        rows.checked = written is not None
    return to_store(rows, info, options, str(path))


def _read_compressed(path: Path, info: DatasetInfo, options: ReadOptions) -> OfflineDataset:
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            unpacked = Path(folder) / path.name.removesuffix(".gz")
            _unpack(path, unpacked)
            kind = file_kind(unpacked)
            if kind not in ("hdf5", "npz"):
                raise OffrlError(f"{path}: it holds a file of the kind {kind}; only HDF5 and NPZ are read packed.")
            store = (read_npz if kind == "npz" else read_d4rl)(unpacked, info, options)
    except OffrlError as error:
        raise OffrlError(str(error).replace(str(unpacked), str(path))) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OffrlError(f"{path}: the gzip file is cut off or damaged ({error}); fetch it again.") from error
    except OSError as error:
        raise _no_room(path, error.strerror) from error
    store.info = replace(store.info, source=str(path))
    return store


def _unpack(path: Path, target: Path) -> None:
    """Unpack a gzip file, as long as the disk has room; a few bytes may unpack to a thousand times as many."""
    room = shutil.disk_usage(target.parent).free - SPARE_DISK
    with gzip.open(path) as source, open(target, "wb") as file:
        while block := source.read(1 << 20):
            room -= len(block)
            if room < 0:
                raise _no_room(path, "it is larger than the free space")
            file.write(block)


def _no_room(path: Path, reason: object) -> OffrlError:
    way_out = "free some space, set OFFRL_HOME elsewhere, or unpack it yourself"
    return OffrlError(f"{path}: it cannot be unpacked in {cache_dir()} ({reason}); {way_out}.")


class Hdf5File:
    """Arrays of an HDF5 file as a source of columns."""

    def __init__(self, file: h5py.File, names: list[str], path: Path) -> None:
        self.file, self.names, self.path, self.where = file, names, path, str(path)

    def keys(self) -> list[str]:
        return self.names

    def described(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        dataset = column(self.file, key, self.path)
        return dataset.shape, dataset.dtype

    def floats(self, key: str) -> Tensor:
        dataset = column(self.file, key, self.path)
        if dataset.dtype.kind == "b":  # HDF5 has no conversion from its enumerations (which bool is) to numbers
            return torch.from_numpy(self.array(key)).float()
        with reading(self.path, key):
            tensor = empty(*dataset.shape)
            if tensor.numel():
                read_into(dataset, tensor.numpy(), self.path)
        return tensor

    def array(self, key: str) -> np.ndarray:
        with reading(self.path, key):
            if isinstance(self.file[key], h5py.Dataset) and self.file[key].shape == ():
                return np.asarray(self.file[key][()])
        dataset = column(self.file, key, self.path)
        with reading(self.path, key):
            array = np.empty(dataset.shape, dataset.dtype)
            if array.size:
                read_into(dataset, array, self.path)
        return array


def _source(file: h5py.File, path: Path) -> Source:
    """What reads the file, by the names of its arrays."""
    names = keys(file, path)
    if is_d3rlpy(names):
        return D3rlpyFile(file, names, path)
    if "episode_0" in names and "observations" not in names:
        raise OffrlError(f"{path}: this is the data file of a Minari dataset; give its folder instead.")
    return Hdf5File(file, names, path)


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
