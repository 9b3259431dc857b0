"""Data that Python hands over, as a dataset with an id of its own: `given/DIGEST/NAME`.

A run names its dataset, so that it can be resumed, ranked and probed later, by other processes too. So what is in memory is
kept as a flat file in the cache folder, once for the same numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offrl.data.arrays import from_arrays, info_json
from offrl.data.cache import read_flat, write_flat
from offrl.data.checks import ReadOptions
from offrl.data.dataset import MADE_UP, OfflineDataset
from offrl.data.lane_tasks import LaneTasks
from offrl.data.minari import data_folder, local_folder, read_minari
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import cache_dir

READ_WITH = "read_with"  # of provenance: options other than the default that the data were read with
GIVEN = re.compile(r"given/[0-9a-f]{12}/[\w./+-]+")


def name_of(data: Any, options: ReadOptions) -> str:
    """The name under which `offrl.datasets.load` finds data that Python hands over.

    Args:
        data: an `OfflineDataset`, a dictionary of the arrays that `from_arrays` takes, or a dataset of the minari package,
            with `filter_episodes` or without.
        options: how arrays are read.

    Raises:
        OffrlError: it is none of these, does not hold what a dataset needs, or can't be kept.
    """
    if isinstance(data, OfflineDataset):
        if options != ReadOptions():
            raise OffrlError(
                "dataset is a dataset that has been read already; give semantics, action_bound and the like to what read it."
            )
        return _keep(data)
    if isinstance(data, Mapping):
        return _keep(from_arrays(data, options=options), options)
    if hasattr(data, "iterate_episodes") and hasattr(data, "storage"):
        return _of_minari(data, options)
    raise OffrlError(
        f"dataset is of type {type(data).__name__}; give an id, a path, an offrl dataset, a Minari dataset or a dictionary of "
        "arrays. offrl.data.from_frame and from_episodes make one of a frame and of a list of episodes."
    )


def path_of(name: str) -> Path:
    """Where the file of such a name lies."""
    return cache_dir() / f"{name}.safetensors"


def plain_name(name: str) -> str:
    """The name behind `given/DIGEST/`, by which methods' tables know a dataset."""
    return name.split("/", 2)[2] if GIVEN.fullmatch(name) else name


def _keep(store: OfflineDataset, options: ReadOptions | None = None) -> str:
    """Keep a dataset and the options that it was read with; returns its name."""
    if isinstance(store, LaneTasks):
        raise OffrlError("dataset has a task for each lane; give its id with data.tasks instead.")
    if options is not None and (changed := options.changed()):
        store = store.with_info(provenance=store.info.provenance | {READ_WITH: changed})
    facts = {
        key: value for key, value in store.info.provenance.items() if key != MADE_UP
    }  # earlier versions noted none
    text = f"{store.fingerprint}{info_json(replace(store.info, provenance=facts))}"
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    if store.info.id == "arrays":
        store = store.with_info(id=f"arrays-{digest[:8]}")  # two of them are two datasets in a report
    parts = (re.sub(r"[^\w.+-]+", "_", part).strip(".") for part in store.info.id.split("/"))
    name = f"given/{digest}/{'/'.join(filter(None, parts)) or 'data'}"
    path = path_of(name)
    if not path.exists() or (MADE_UP in store.info.provenance and not _notes_made_up(path)):
        try:
            write_flat(store, path)
        except OSError as error:
            reason = one_line(error.strerror or error)
            raise OffrlError(
                f"{path} can't be written ({reason}), where data of a run is kept; set OFFRL_HOME to a folder with room."
            ) from error
    return name


def _notes_made_up(path: Path) -> bool:
    """Whether a kept file says that its terminal successors are made up; False also where it can't be read."""
    try:
        return MADE_UP in read_flat(path).info.provenance
    except OffrlError:
        return False


def _of_minari(dataset: Any, options: ReadOptions) -> str:
    """The id or folder of a Minari dataset; one with some of its episodes is kept as data of its own."""
    folder, name = Path(dataset.storage.data_path).resolve(), str(dataset.id)
    total, chosen = int(dataset.storage.total_episodes), [int(index) for index in dataset.episode_indices]
    if chosen == list(range(total)):
        known = data_folder(local_folder(name))
        return name if known and known.resolve() == folder else str(folder)
    store = read_minari(folder, name, options)
    if store.episodes != total:
        raise OffrlError(f"{name}: {total - store.episodes} of its episodes are empty; filter a dataset without them.")
    if not chosen:
        raise OffrlError(f"{name}: the filter leaves no episode.")
    return _keep(store.select_episodes(torch.tensor(chosen)), options)
