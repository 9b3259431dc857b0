"""Datasets: `load` turns a name or a file into a dataset.

store = load("forge/hopper/medium-replay-v0")   # built on the spot from shipped policies
store = load("hopper-medium-v2")                # D4RL, after `offrl data fetch hopper-medium-v2`
store = load("hopper-random-expert-0.1-v2")     # a mixture of two D4RL sets, drawn on the spot
store = load("D4RL/pen/human-v2")               # Minari, after `offrl data fetch D4RL/pen/human-v2`
store = load("cube-single-play-singletask-task2-v0")  # OGBench, after `offrl data fetch` of it
store = load("my.hdf5")                         # a file in D4RL's layout, .npz, or a Minari folder
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from offrl.data import catalogue, ogbench_names
from offrl.data.arrays import read_npz
from offrl.data.cache import cached, read_flat
from offrl.data.catalogue import MINARI_ID, unknown
from offrl.data.checks import ReadOptions, Semantics, check_read_already, file_kind, warn_of
from offrl.data.d4rl import read_d4rl, read_d4rl_package
from offrl.data.dataset import Bound, OfflineDataset
from offrl.data.given import GIVEN, READ_WITH, path_of
from offrl.data.minari import data_folder, local_datasets, local_folder, read_minari, read_noise
from offrl.data.mixtures import d4rl_mixture
from offrl.data.ogbench import holds_trajectories, read_ogbench, with_success_timing
from offrl.forge import registry
from offrl.utils.dataset_names import D4RL_MIXTURE
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir
from offrl.utils.process import pick_device

__all__ = ["exogenous_noise", "load"]

FILE_SUFFIXES = (".hdf5", ".h5", ".gz", ".npz", ".npy", ".safetensors", ".pkl", ".pickle", ".pt")


def load(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    semantics: Semantics = "exact",
    cache: bool = True,
    clip_actions: bool = False,
    action_bound: float | None = None,
    unfinished: bool = False,
    goals: bool = False,
    action_low: Bound | None = None,
    action_high: Bound | None = None,
    family: str | None = None,
    task: int | None = None,
    success_timing: Literal["pre", "post"] = "pre",
    size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> OfflineDataset:
    """Load a dataset as float32 tensors on `device`.

    Args:
        name: a D4RL id, a Minari id, an OGBench id, a `forge/...` id, or the path of an HDF5 (also `.gz`), NPZ or flat
            safetensors file or of a Minari folder. An id of the catalogue goes before a path of the same name.
        semantics: `exact` (stored successors, time-limit rows kept where their successor is known) or `d4rl` (the
            rows of D4RL's `qlearning_dataset`); `offrl.data.episodes` tells the difference.
        cache: keep a flat copy in the cache folder, which loads a million steps in a fraction of a second.
        clip_actions, action_bound, unfinished, goals, action_low, action_high, family: see `ReadOptions`. They and
            `semantics` are refused for a flat file, which was read when it was written.
        task: number of an OGBench set's single task, 0 the default one; None: as the id says.
        success_timing: whether OGBench's environment looks at the state before a step, as the data, or behind it.
        size, seed, progress: of a forge dataset that has to be built: transitions, seed, and whether a bar is shown.
            `size` is refused for any other dataset.

    Raises:
        OffrlError: an unknown name (with the nearest known ones), a dataset that is not there yet (with the command
            that gets it), an option that this one cannot have, or a bad file.
    """
    if not isinstance(name, (str, Path)):
        raise OffrlError(
            f"a dataset's name is of type {type(name).__name__}; give an id, or the path of a file or folder."
        )
    device = pick_device(str(device))
    options = ReadOptions(semantics, clip_actions, action_bound, unfinished, goals, action_low, action_high, family)
    built = False
    ogbench, path = _ogbench(name)
    if ogbench is not None:
        built = not path and bool(ogbench.prefix)
        ogbench = ogbench.with_task(task)
        _check_goals(options, ogbench.id)
        path = path or _ogbench_file(ogbench, size, seed, progress)
        read = partial(read_ogbench, path, ogbench, options)
        store = with_success_timing(_cached(path, ogbench.id, options, cache, read), success_timing)
    elif task is not None:
        raise OffrlError(f"{name}: data.task={task} chooses a task of an OGBench set, which this is not; leave it out.")
    elif success_timing != "pre":
        raise OffrlError(
            f"{name}: data.success_timing={success_timing} is of OGBench's environments, and this is no set of theirs; leave "
            "it out."
        )
    elif isinstance(name, str) and GIVEN.fullmatch(name):
        store = _given(name, options)
    elif isinstance(name, str) and name.startswith("forge/"):
        built, usual = True, cache_dir() / name  # what was built with another size or seed lies under an id of its own
        there = size is None and not seed and data_folder(usual)
        folder = usual if there else registry.ensure(name, size=size, seed=seed, progress=progress)
        store = _read_path(folder, None, options, cache)
    else:
        store = _load(name, options, cache)
    if size is not None and not built:
        raise OffrlError(
            f"{name}: data.size={size} chooses how many transitions the forge builds, and this is no dataset of the forge; "
            "leave it out."
        )
    warn_of(store.info)
    moved = store.to(device)
    if moved is not store and "fingerprint" in store.__dict__:
        moved.__dict__["fingerprint"] = store.fingerprint
    return moved


def _given(name: str, options: ReadOptions) -> OfflineDataset:
    """What Python handed over, as it was kept; how it is read was decided then, and a run's options say it again."""
    if not path_of(name).is_file():
        raise OffrlError(f"{name}: the data that Python handed over is no longer kept; hand it to offrl.fit again.")
    store = read_flat(path_of(name))
    check_read_already(options, name, store.info.provenance.get(READ_WITH))
    return store


def _load(name: str | Path, options: ReadOptions, cache: bool) -> OfflineDataset:
    text = str(name)
    if isinstance(name, str):
        if text in catalogue.d4rl():
            return _load_d4rl(text, options, cache)
        if D4RL_MIXTURE.fullmatch(text):
            return d4rl_mixture(text, partial(_load_d4rl, options=options, cache=cache))
        if MINARI_ID.fullmatch(text) and data_folder(local_folder(text)) is not None:
            return _read_path(local_folder(text), text, options, cache)
        if text in catalogue.minari():
            raise OffrlError(f"{text}: not on this machine yet; get it with `offrl data fetch {text}`.")
    path = Path(os.path.expanduser(name))  # stays as it is without a home
    if os.path.exists(path):
        return _read_path(path, None, options, cache)
    if isinstance(name, Path) or path.suffix.lower() in FILE_SUFFIXES or text.startswith((".", "/", "~")):
        raise OffrlError(f"{text}: there is no such file or folder; check the path.")
    store = read_d4rl_package(text, None, options)
    if store is None:
        raise unknown(text, [*registry.names(), *local_datasets()])
    return store


def _ogbench(name: str | Path) -> tuple[ogbench_names.Name | None, Path | None]:
    """The parts of an OGBench id, or of the name of an OGBench file, and that file; None of everything else.

    Raises:
        OffrlError: a file of OGBench whose name does not tell which.
    """
    if isinstance(name, str) and (found := ogbench_names.parse(name)):
        return found, None
    path = Path(os.path.expanduser(name))
    if path.suffix != ".npz" or not os.path.isfile(path) or not holds_trajectories(path):
        return None, None
    if found := ogbench_names.of_file(path):
        return found, path
    raise OffrlError(
        f"{path}: it holds trajectories of OGBench's form, but its name does not tell of which environment; call it as they "
        "are published, cube-single-play-v0.npz, say."
    )


def _ogbench_file(name: ogbench_names.Name, size: int | None, seed: int, progress: bool) -> Path:
    """Where the file of an OGBench id lies; one of the forge's is built."""
    if name.prefix:
        return registry.ensure(f"{name.prefix}{name.file}", size=size, seed=seed, progress=progress)
    for path in name.files():
        if path.is_file():
            return path
    raise OffrlError(
        f"{name.id}: not on this machine yet; get it with `offrl data fetch {name.id}`, or put {name.file}.npz into the folder "
        "that OGBENCH_DATASET_DIR names."
    )


def exogenous_noise(store: OfflineDataset) -> torch.Tensor:
    """`[N, ...]`: what the environment drew at each row of a forge dataset, for probes of what a method has learnt.

    It is read from the dataset's files anew and is neither in the dataset nor in any batch, so that no learner sees it.

    Raises:
        OffrlError: the dataset recorded none, or the dataset is not the whole of one.
    """
    noise = read_noise(Path(store.info.source))
    if len(noise) != len(store):
        raise OffrlError(f"{store.info.id}: the noise of {len(noise)} rows is known, this dataset has {len(store)}.")
    return noise


def _load_d4rl(name: str, options: ReadOptions, cache: bool) -> OfflineDataset:
    _check_goals(options, name)
    entry = catalogue.d4rl()[name]
    for path in entry.files():
        if path.is_file():
            return _cached(path, name, options, cache, partial(read_d4rl, path, entry.info(), options))
    store = read_d4rl_package(name, entry.info(), options)
    if store is None:
        raise OffrlError(
            f"{name}: not on this machine yet; get it with `offrl data fetch {name}`, or put "
            f"{entry.filename} into the folder that D4RL_DATASET_DIR names."
        )
    return store


def _read_path(path: Path, name: str | None, options: ReadOptions, cache: bool) -> OfflineDataset:
    """Read a file or folder by what it holds."""
    if path.is_dir():
        return _cached(path, name or str(path), options, cache, partial(read_minari, path, name, options))
    _check_goals(options, str(path))
    kind, info = file_kind(path), catalogue.info_of_file(path)
    if kind == "safetensors":
        check_read_already(options, str(path))
        return read_flat(path)
    if kind == "npz":
        return _cached(path, str(path), options, cache, partial(read_npz, path, info, options))
    return _cached(path, str(path), options, cache, partial(read_d4rl, path, info, options))


def _check_goals(options: ReadOptions, name: str) -> None:
    """Refuse `goals` for a source that has none apart from its observations."""
    if options.goals:
        raise OffrlError(f"{name}: data.goals=true keeps the goals of Minari's mazes, and this is none; leave it out.")


def _cached(
    path: Path, name: str, options: ReadOptions, cache: bool, read: Callable[[], OfflineDataset]
) -> OfflineDataset:
    return cached(path, name, options, read) if cache else read()
