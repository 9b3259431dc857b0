"""Metadata of forge datasets: `DatasetInfo`, provenance, seeds, and writing them beside the episodes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from offrl.data.dataset import DatasetInfo
from offrl.data.minari_write import Episode, write_minari
from offrl.forge.names import family, minari_id


def dataset_info(
    name: str,
    env_id: str,
    env_kwargs: Mapping[str, Any],
    references: tuple[float, float],
    limit: int | None,
    provenance: dict[str, Any],
) -> DatasetInfo:
    """Metadata of the dataset `name`.

    Args:
        env_id, env_kwargs: environment in which policies are scored.
        references: returns of scores 0 and 100.
        limit: steps of the longest episode.
        provenance: as of `provenance_of`.
    """
    return DatasetInfo(
        id=name,
        source="forge",
        env_id=env_id,
        env_kwargs=dict(env_kwargs),
        family=family(name),
        ref_min=references[0],
        ref_max=references[1],
        max_episode_steps=limit,
        provenance=provenance,
    )


def write_dataset(
    folder: Path, episodes: Sequence[Episode], info: DatasetInfo, *, env_spec: str | None = None, **more: Any
) -> None:
    """Write a dataset in Minari's format.

    Args:
        env_spec: JSON of the Gymnasium spec of the environment that made the data; None: of `info.env_id`.
        more: further arguments of `write_minari`.
    """
    made = info.provenance
    dataset_id = minari_id(info.id, made["size"], made["seed"])
    write_minari(folder, episodes, info, dataset_id=dataset_id, env_spec=env_spec or _env_spec(info), **more)


def seed_sequence(name: str, seed: int) -> np.random.SeedSequence:
    """Seeds of everything that is drawn for a dataset; datasets of one seed differ by their names."""
    return np.random.SeedSequence([zlib.crc32(name.encode()), seed])


def _env_spec(info: DatasetInfo) -> str:
    """JSON of the Gymnasium spec of the environment that made the data."""
    assert info.env_id is not None
    spec = gymnasium.spec(info.env_id)
    return replace(spec, kwargs={**spec.kwargs, **info.env_kwargs}).to_json()


def provenance_of(size: int | None, seed: int, also: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """How a dataset was made: size, seed, versions of the packages that its numbers depend on (and `also`), and `more`."""
    packages = {}
    for name in ("gymnasium", "mujoco", "numpy", "torch", *also):
        with suppress(PackageNotFoundError):  # finite tasks need no simulator
            packages[name] = version(name)
    return {"made_by": "offrl forge", "size": size, "seed": seed, "versions": packages} | more
