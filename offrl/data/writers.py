"""Writing a dataset in the formats that `offrl data convert` knows."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from offrl.data.arrays import info_json, to_arrays, write_npz
from offrl.data.cache import write_flat
from offrl.data.dataset import OfflineDataset
from offrl.data.hdf5 import create_hdf5
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing


def writer(dest: Path) -> Callable[[OfflineDataset], None]:
    """What writes a dataset to a destination, in the format that its suffix names.

    Raises:
        OffrlError: no such format; later, when it is called, the destination can't be written.
    """
    writers = {".npz": write_npz, ".hdf5": write_hdf5, ".h5": write_hdf5, ".safetensors": write_flat}
    if dest.suffix and dest.suffix not in writers:
        raise OffrlError(f"{dest}: unknown format; use {', '.join(writers)} or a folder NAME-v0 for Minari.")
    write = writers[dest.suffix] if dest.suffix else write_minari

    def run(store: OfflineDataset) -> None:
        try:
            write(store, dest)
        except OSError as error:
            raise OffrlError(f"{dest}: cannot be written ({error.strerror or error}).") from error

    return run


def write_hdf5(store: OfflineDataset, path: Path) -> None:
    """Write a dataset in D4RL's layout (gzip), with what is known of it in the attribute `offrl_info`."""
    with replacing(path) as temporary, create_hdf5(temporary) as file:
        file.attrs["offrl_info"] = info_json(store.info)
        for key, array in to_arrays(store).items():
            file.create_dataset(key, data=array, compression="gzip")


def write_minari(store: OfflineDataset, folder: Path) -> None:
    """Write a dataset as a Minari dataset whose id is the folder's name; a tail (no successor known) is left out."""
    try:
        import minari
        from gymnasium import spaces
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise OffrlError(f'{folder}: a Minari folder needs its package; pip install "offrl[minari]".') from error
    if folder.exists():
        raise OffrlError(f"{folder}: exists already; remove it or choose another name.")
    if not re.fullmatch(r"[\w-]+-v\d+", folder.name):
        raise OffrlError(f"{folder}: a Minari dataset's name must end in -v0, -v1, ...; choose such a name.")
    info, width = store.info, store.action_dim
    low, high = (np.broadcast_to(np.array(bound, np.float32), width) for bound in (info.action_low, info.action_high))
    numbers = {name: tensor.cpu().numpy() for name, tensor in store.tensors().items()}
    episodes = []
    for index, (start, stop) in enumerate(zip(numbers["offsets"][:-1], numbers["offsets"][1:])):
        terminations = numbers["terminations"][start:stop] > 0
        truncations = terminations & False
        truncations[-1] = numbers["complete"][index] and not terminations[-1]
        observations = [*numbers["observations"][start:stop], numbers["next_observations"][stop - 1]]
        episodes.append(
            EpisodeBuffer(
                id=index,
                observations=observations,
                actions=numbers["actions"][start:stop],
                rewards=numbers["rewards"][start:stop],
                terminations=terminations,
                truncations=truncations,
            )
        )
    actions: Any = spaces.Discrete(info.discrete) if info.discrete else spaces.Box(low, high)
    with _environment("MINARI_DATASETS_PATH", str(folder.parent)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari asks for an author, a description, ...
        dataset = minari.create_dataset_from_buffers(
            folder.name,
            episodes,
            observation_space=spaces.Box(-float("inf"), float("inf"), (store.obs_dim,)),
            action_space=actions,
            ref_min_score=info.ref_min,
            ref_max_score=info.ref_max,
        )
        dataset.storage.update_metadata({"offrl_info": info_json(info)})


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
