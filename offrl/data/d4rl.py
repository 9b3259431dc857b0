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

from offrl.data.arrays import from_arrays
from offrl.data.checks import ReadOptions, empty, file_kind, own_info
from offrl.data.columns import Source, read_rows
from offrl.data.d3rlpy import D3rlpyFile, is_d3rlpy
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.episodes import to_store
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

# What every file of D4RL itself has.
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
        written = "offrl_info" in file.attrs
        if written:
            info = own_info(file.attrs["offrl_info"], info, str(path))
        info = replace(info, family=options.family or info.family)
        rows, info = read_rows(_source(file, path), info, options.semantics == "exact")
        rows.checked = written
    return to_store(rows, info, options, str(path))


def _read_compressed(path: Path, info: DatasetInfo, options: ReadOptions) -> OfflineDataset:
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            unpacked = Path(folder) / path.name.removesuffix(".gz")
            with gzip.open(path) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            store = read_d4rl(unpacked, info, options)
    except OffrlError as error:
        raise OffrlError(str(error).replace(str(unpacked), str(path))) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OffrlError(f"{path}: the gzip file is cut off or damaged ({error}); fetch it again.") from error
    except OSError as error:
        way_out = "free some space, set OFFRL_HOME elsewhere, or unpack it yourself"
        raise OffrlError(f"{path}: it cannot be unpacked in {cache_dir()} ({error.strerror}); {way_out}.") from error
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


class Hdf5File:
    """Arrays of an HDF5 file as a source of columns."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self.file, self.where = file, str(path)

    def keys(self) -> list[str]:
        return sorted(self.file)

    def described(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        dataset = self.file[key]
        if not isinstance(dataset, h5py.Dataset):
            raise OffrlError(f"{self.where}: {key} is a group, not an array; this is no D4RL file.")
        return dataset.shape, dataset.dtype

    def floats(self, key: str) -> Tensor:
        dataset = self.file[key]
        tensor = empty(*dataset.shape)
        # HDF5 has no conversion from its enumerations (which bool is) to numbers.
        if dataset.dtype.kind == "b":
            tensor.copy_(torch.from_numpy(self.array(key)))
        elif tensor.numel():
            _read(dataset, tensor.numpy(), self.where)
        return tensor

    def array(self, key: str) -> np.ndarray:
        dataset = self.file[key]
        array = np.empty(dataset.shape, dataset.dtype)
        if array.ndim == 0:
            return dataset[()]
        if array.size:
            _read(dataset, array, self.where)
        return array


def _source(file: h5py.File, path: Path) -> Source:
    """What reads the file, by the names of its arrays."""
    names = sorted(file)
    if is_d3rlpy(names):
        return D3rlpyFile(file, names, path)
    if "episode_0" in names and "observations" not in names:
        raise OffrlError(f"{path}: this is the data file of a Minari dataset; give its folder instead.")
    return Hdf5File(file, path)


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
