"""Observations that do not tell the state: dimensions left out (`data.mask`), observations lost at random (`data.flicker`).

A dataset is changed here, and the environment that its policies are scored in is changed alike by `offrl.envs.partial`, which
reads what was done from the dataset's info. Without velocities: after Ni, Eysenbach & Salakhutdinov, "Recurrent Model-Free RL
Can Be a Strong Baseline for Many POMDPs", ICML 2022. Flicker: Hausknecht & Stone, "Deep Recurrent Q-Learning for Partially
Observable MDPs", 2015; an observation that is lost is all zeros.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.utils.errors import OffrlError

KEY = "partially_observed"  # of provenance

# Pattern of an environment's id -> width of its observation, dimensions that are velocities (Gymnasium's documentation).
VELOCITIES: dict[str, tuple[int, range | tuple[int, ...]]] = {
    r"ant-[\w-]+-v\d": (111, range(13, 27)),
    r"(offrl/Noisy)?Hopper-v\d": (11, range(5, 11)),
    r"(offrl/Noisy)?(HalfCheetah|Walker2d)-v\d": (17, range(8, 17)),
    r"(offrl/Noisy)?Reacher-v\d": (10, (6, 7)),
    r"Swimmer-v\d": (8, range(3, 8)),
    r"Ant-v[2-4]": (27, range(13, 27)),
    r"InvertedPendulum-v\d": (4, (2, 3)),
    r"InvertedDoublePendulum-v[2-4]": (11, (5, 6, 7)),
    r"InvertedDoublePendulum-v5": (9, (5, 6, 7)),
    r"PointMaze_\w+-v\d": (4, (2, 3)),
    r"maze2d-[\w-]+": (4, (2, 3)),
    r"CartPole-v\d": (4, (1, 3)),
    r"Pendulum-v\d": (3, (2,)),
    r"MountainCar(Continuous)?-v\d": (2, (1,)),
    r"Acrobot-v\d": (6, (4, 5)),
}


@dataclass(frozen=True)
class Partial:
    """How an observation differs from the full one.

    Attributes:
        kept: dimensions that are left, in order; None: all.
        flicker: probability that an observation is lost, of each timestep on its own.
    """

    kept: tuple[int, ...] | None = None
    flicker: float = 0.0


def partial_of(info: DatasetInfo) -> Partial:
    """What was done to a dataset's observations; nothing, for most.

    Raises:
        OffrlError: the dataset's file tells nonsense.
    """
    recorded = info.provenance.get(KEY)
    if recorded is None:
        return Partial()
    try:
        kept, flicker = recorded["kept"], float(recorded["flicker"])
        kept = None if kept is None else tuple(int(dimension) for dimension in kept)
    except (TypeError, KeyError, ValueError) as error:
        raise OffrlError(f"{info.id}: provenance has no usable {KEY}; write the dataset again.") from error
    if not 0 <= flicker < 1 or (kept is not None and (not kept or min(kept) < 0)):
        raise OffrlError(f"{info.id}: {KEY} in its provenance is out of range; write the dataset again.")
    return Partial(kept, flicker)


def title(info: DatasetInfo) -> str:
    """A dataset's id in reports: partially observed, it is another task."""
    recorded = info.provenance.get(KEY) or {}
    mask = f"+mask={recorded['mask']}" if recorded.get("mask") else ""
    return f"{info.id}{mask}" + (f"+flicker={recorded['flicker']:g}" if recorded.get("flicker") else "")


def partially_observed(
    store: OfflineDataset, mask: str | Sequence[int] | None = None, flicker: float = 0.0, seed: int = 0
) -> OfflineDataset:
    """The dataset with some of its observations' dimensions left out, and some observations lost.

    Within an episode the observation that follows a row is the next row's: it is lost in both places or in none.

    Args:
        mask: `velocity`, or the dimensions to leave out.
        flicker: probability that an observation is lost.
        seed: of the draws, which also depend on the dataset's id.

    Raises:
        OffrlError: an unknown mask, no dimension left, a probability outside [0, 1).
    """
    if mask is None and flicker == 0:
        return store
    if not 0 <= flicker < 1:
        raise OffrlError(f"data.flicker={flicker} is a probability; it should be at least 0 and below 1.")
    if KEY in store.info.provenance:
        raise OffrlError(f"{store.info.id} is partially observed already; leave out data.mask and data.flicker.")
    tensors: dict[str, Any] = store.tensors()
    kept = None if mask is None else _kept(store, mask)
    for name in ("observations", "next_observations") if kept else ():
        tensors[name] = tensors[name][:, list(kept or ())]
    if flicker:
        now, after = (lost.to(store.device) for lost in _lost(store, flicker, seed))
        tensors["observations"] = torch.where(now, 0.0, tensors["observations"])
        tensors["next_observations"] = torch.where(after, 0.0, tensors["next_observations"])
    named = mask if isinstance(mask, str) or mask is None else ",".join(map(str, mask))
    done = {"mask": named, "kept": None if kept is None else list(kept), "flicker": flicker}
    info = replace(store.info, provenance={**store.info.provenance, KEY: done})
    return OfflineDataset(**tensors, info=info)


def _kept(store: OfflineDataset, mask: str | Sequence[int]) -> tuple[int, ...]:
    width = store.obs_dim
    if isinstance(mask, str) and mask != "velocity":
        raise OffrlError(f"data.mask={mask} is unknown; give velocity, or a list of dimensions such as [5,6].")
    gone = _velocities(store.info, width) if isinstance(mask, str) else tuple(mask)
    if not gone or min(gone) < 0 or max(gone) >= width or len(set(gone)) >= width:
        raise OffrlError(
            f"data.mask={list(gone)}: name some, and not all, of the dimensions 0 to {width - 1} of {store.info.id}."
        )
    return tuple(dimension for dimension in range(width) if dimension not in gone)


def _velocities(info: DatasetInfo, width: int) -> tuple[int, ...]:
    names = [name for name in (info.id, info.env_id) if name]
    rows = (row for pattern, row in VELOCITIES.items() if any(re.fullmatch(pattern, name) for name in names))
    found = next((row for row in rows if row[0] == width), None)
    if found is None:
        raise OffrlError(
            f"data.mask=velocity: which of the {width} numbers that {info.id} observes are velocities is not known; give their "
            "dimensions, such as data.mask=[5,6]."
        )
    return tuple(found[1])


def _lost(store: OfflineDataset, flicker: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, 1]` bool each: whether a row's observation is lost, and whether its successor's is."""
    draws = np.random.default_rng([seed, zlib.crc32(store.info.id.encode())])
    now, last = (torch.from_numpy(draws.random(count) < flicker) for count in (len(store), store.episodes))
    after = now.roll(-1)
    after[store.offsets[1:].cpu() - 1] = last
    return now.unsqueeze(1), after.unsqueeze(1)
