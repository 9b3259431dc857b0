"""The flat cache: a dataset as one safetensors file, read back at memory speed.

A file's header holds `info`, the fingerprint, a checksum of every tensor, and the identity of the source it was made
from. A cache that is stale, cut off or damaged is not used; the caller reads the source again and replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offrl.data.arrays import info_json
from offrl.data.checks import ReadOptions
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.schema import own_info
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.locks import READ_ONLY
from offrl.utils.paths import cache_dir, replacing

# Raise it when a reader gives other numbers or other `info` for the same file.
LOADER_VERSION = 4
MOST_HEADER = 64 << 20  # bytes of a flat file's header, which holds the dataset's `info`
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64), "BOOL": np.dtype(np.bool_)}


def identity(path: Path, name: str, options: ReadOptions) -> dict[str, Any]:
    """What a cached dataset was made from: the files, the name, the options, the loader.

    Whoever writes a file, or puts another in its place, may choose its size and its time of modification; the time of
    the last change to its inode is the kernel's.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files]
    return {
        "path": str(path.resolve()),
        "files": [
            [file.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            for file, stat in stats
        ],
        "name": name,
        "options": asdict(options),
        "loader": LOADER_VERSION,
    }


def cache_path(source: dict[str, Any]) -> Path:
    """One file per source, name and options, so that a changed source replaces its old cache."""
    key = json.dumps([source["path"], source["name"], source["options"]], sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    stem = re.sub(r"[^\w.-]+", "_", Path(source["name"]).stem or "dataset")[-60:]
    return cache_dir() / "flat" / f"{stem}-{digest}.safetensors"


def cached(path: Path, name: str, options: ReadOptions, read: Callable[[], OfflineDataset]) -> OfflineDataset:
    """The dataset that `read` makes of `path`, from the cache when it holds the same source, else made and kept.

    A cache that cannot be written is no error: the dataset is returned with a warning.
    """
    source = identity(path, name, options)
    try:
        return read_flat(cache_path(source), source)
    except OffrlError:
        pass  # none, stale or damaged: made again below
    store = read()
    try:
        write_flat(store, cache_path(source), source)
    except (OSError, RuntimeError, OffrlError) as error:  # OffrlError: no folder for caches is known
        reason = one_line(getattr(error, "strerror", None) or error).rstrip(".")
        warnings.warn(
            f"{path}: its flat cache cannot be written ({reason}); the dataset is read anew each time unless OFFRL_HOME "
            "names a folder with room.",
            stacklevel=3,
        )
    return store


def write_flat(store: OfflineDataset, path: Path, source: dict[str, Any] | None = None) -> None:
    """Write a dataset as one safetensors file, whole or not at all.

    Args:
        source: identity of what it was made from; `read_flat` compares it.

    Raises:
        OSError: the disk is full, or the file can't be written for another reason.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu() for name, tensor in store.tensors().items()}
    header = {
        "info": json.loads(info_json(store.info)) | {"source": store.info.source},
        "fingerprint": store.fingerprint,
        "crc32": {name: _checksum(tensor) for name, tensor in tensors.items()},
        "source": source,
    }
    with replacing(path, own_folder=True) as temporary:
        try:
            save_file(tensors, temporary, metadata={"offrl": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_flat(path: Path, source: dict[str, Any] | None = None) -> OfflineDataset:
    """Read what `write_flat` wrote.

    The file is copied into memory rather than mapped: gathers then never wait for the disk, and a file that is
    replaced or lost later does no harm.

    Raises:
        OffrlError: the file is no flat dataset, is cut off or damaged, or was made from something else than `source`.
    """
    try:
        with open(os.open(path, READ_ONLY), "rb") as file:
            if not path.is_file():  # a pipe or a device, from which nothing may ever come
                raise ValueError("it is no regular file")
            length = int.from_bytes(file.read(8), "little")
            if length > min(path.stat().st_size, MOST_HEADER):
                raise ValueError("its header is too long")
            entries = json.loads(file.read(length))  # safetensors' own layout; what is wrong in it shows below
            header = json.loads(entries.pop("__metadata__")["offrl"])
            if source is not None and header["source"] != json.loads(json.dumps(source)):
                raise OffrlError(f"{path}: made from another version of its source; it is built again.")
            tensors = {}
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                array: np.ndarray = np.empty(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                file.seek(8 + length + entry["data_offsets"][0])
                if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                    raise ValueError(f"{name} is cut off")
                tensors[name] = torch.from_numpy(array)
        broken = [name for name, tensor in tensors.items() if _checksum(tensor) != header["crc32"][name]]
        if broken:
            raise ValueError(f"{broken[0]} differs from its checksum")
        store = OfflineDataset(**tensors, info=_info(header["info"], path))
        if not isinstance(header["fingerprint"], str):
            raise ValueError("its fingerprint is no text")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        OSError,
        MemoryError,
    ) as error:
        raise OffrlError(
            f"{path}: no flat dataset, or a damaged one ({one_line(error)}); delete it and load its source."
        ) from error
    store.__dict__["fingerprint"] = header["fingerprint"]  # the cached property, so that it is not computed again
    return store


def _info(written: Any, path: Path) -> DatasetInfo:
    """What the header tells of the dataset, with the notices that its source gave."""
    info = own_info(written, DatasetInfo(), str(path))
    notices = written.get("provenance", {}).get("notices")
    if notices is None:
        return info
    if not isinstance(notices, list) or not all(isinstance(notice, str) for notice in notices):
        raise ValueError("its notices are no texts")
    return replace(info, provenance={**info.provenance, "notices": notices})


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy().reshape(-1).view(np.uint8).data)
