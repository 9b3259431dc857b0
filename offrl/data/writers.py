"""Writing a dataset in the formats that `offrl data convert` knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offrl.data.arrays import info_json, to_arrays, write_npz
from offrl.data.cache import write_flat
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.hdf5 import create_hdf5
from offrl.data.minari_write import box, discrete, episodes_of, write_minari
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing


def writer(dest: Path) -> Callable[[OfflineDataset], None]:
    """The function that writes a dataset to `dest`, in the format that its suffix names.

    Raises:
        OffrlError: no such format; when the function is called, a destination that can't be written.
    """
    writers = {".npz": write_npz, ".hdf5": write_hdf5, ".h5": write_hdf5, ".safetensors": write_flat}
    if dest.suffix and dest.suffix not in writers:
        raise OffrlError(f"{dest}: unknown format; use {', '.join(writers)} or a folder NAME-v0 for Minari.")
    write = writers[dest.suffix] if dest.suffix else write_minari_folder

    def run(store: OfflineDataset) -> None:
        try:
            write(store, dest)
        except OSError as error:
            raise OffrlError(f"{dest}: cannot be written ({error.strerror or error}).") from error

    return run


def write_hdf5(store: OfflineDataset, path: Path) -> None:
    """Write a dataset in D4RL's layout (gzip), with its metadata in the attribute `offrl_info`."""
    with replacing(path) as temporary, create_hdf5(temporary) as file:
        file.attrs["offrl_info"] = info_json(store.info)
        for key, array in to_arrays(store).items():
            file.create_dataset(key, data=array, compression="gzip")


def write_minari_folder(store: OfflineDataset, folder: Path) -> None:
    """Write a dataset as a Minari dataset whose id is the folder's name; a tail (no successor known) is left out."""
    if folder.exists():
        raise OffrlError(f"{folder}: exists already; remove it or choose another name.")
    if not re.fullmatch(r"[\w-]+-v\d+", folder.name):
        raise OffrlError(f"{folder}: a Minari dataset's name must end in -v0, -v1, ...; choose such a name.")
    info = replace(store.info, source="offrl")  # not a path on this machine
    episodes = list(episodes_of(store))
    write_minari(
        folder,
        episodes,
        info,
        folder.name,
        env_spec=None,
        action_space=space_of_actions(info, store.action_dim),
        description=info.id,
    )


def space_of_actions(info: DatasetInfo, action_dim: int) -> dict[str, Any]:
    """Minari's JSON form of the actions' space."""
    if info.discrete:
        return discrete(info.discrete)
    low, high = (
        np.broadcast_to(np.array(b, np.float32), action_dim).tolist() for b in (info.action_low, info.action_high)
    )
    return box(low, high)
