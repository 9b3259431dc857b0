"""Base of augmentations: settings, the synthetic part of batches, and its storage for an exact resume.

An augmentation gets the dataset once and the current policy every `refresh_every` updates. It generates trajectories for each
lane, from that lane's policy and seed. They make up a fixed share of the lane's batches: the real part is sampled by the run's
sampler, the synthetic part uniformly. The trajectories in use are saved beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from offrl.agents.base import Agent, Dynamics
from offrl.data.cache import read_flat, write_flat
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Sampler, Uniform
from offrl.utils.errors import OffrlError
from offrl.utils.paths import remove_torn
from offrl.utils.random import LaneRandom
from offrl.utils.settings import check_lane_lists, from_target, lane_lists

FOLDER = "synthetic"  # below a run's folder


@dataclass
class SyntheticConfig:
    share: float = 0.5  # synthetic share of every batch
    refresh_every: int = 20_000  # updates between generations; 0: only the first one
    transitions: int = 32_768  # transitions per lane and generation; fewer where trajectories terminate
    length: int = 31  # transitions per trajectory
    keep: int = 1  # number of generations in use; the oldest is replaced

    def __post_init__(self) -> None:
        for name, least in (("refresh_every", 0), ("transitions", 1), ("length", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise OffrlError(f"augment.{name}={getattr(self, name)} should be at least {least}.")
        if isinstance(self.share, float) and not 0 < self.share <= 1:
            raise OffrlError(f"augment.share={self.share:g} should be above 0 and at most 1.")

    @property
    def trajectories(self) -> int:
        """Number of trajectories per lane and generation."""
        return max(1, self.transitions // self.length)


class Augmentation:
    """Base of all; a subclass has a dataclass `Config` and implements `prepare` and `generate`.

    Args:
        store: the dataset, rewards as recorded.
        cfg: settings; floats named in `per_lane` may be lists with one value per lane.
        seeds: seeds of the lanes.

    Attributes:
        name: label in reports, after those of agent and sampler.
        has_dynamics: whether `prepare` sets `dynamics`.
        dynamics: a model of the environment that the agent's updates may ask; None: there is none.
    """

    Config: ClassVar[type] = SyntheticConfig
    per_lane: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""
    has_dynamics: ClassVar[bool] = False
    dynamics: Dynamics | None = None

    def __init__(self, store: OfflineDataset, cfg: Any = None, seeds: Sequence[int] = (0,)) -> None:
        self.store, self.seeds = store, tuple(seeds)
        given = cfg or self.Config()
        lists = lane_lists(given)
        self.cfg: Any = replace(given, **{k: torch.tensor(v, device=store.device) for k, v in lists.items()})
        if store.info.discrete is not None:
            raise OffrlError(
                f"{store.info.id}: synthetic trajectories need continuous actions; set augment=none for discrete ones."
            )

    def prepare(self, progress: bool = False) -> None:
        """Train the model, or load it from the cache."""

    def generate(self, policy: Agent | None, step: int) -> OfflineDataset:
        """Trajectories under the policy (None: without guidance): lane after lane, `trajectories` episodes each.

        They are a function of the policy, the seeds, the number `step` of the update and the dataset; a lane does not depend on
        the others.
        """
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Metadata for the run's manifest."""
        return {}

    def random(self, step: int) -> LaneRandom:
        """Random numbers of the generation at update `step`."""
        random = LaneRandom(self.seeds, self.store.device)
        random.step.fill_(step)
        return random


class LaneSegments(Sampler):
    """Uniform sampling of a lane's own rows; the dataset holds equally many episodes of each lane, lane after lane."""

    def __init__(self, store: OfflineDataset, lanes: int) -> None:
        bounds = store.offsets[:: store.episodes // lanes]
        self.first, self.rows = bounds[:-1].unsqueeze(-1), bounds.diff().unsqueeze(-1)  # [lanes, 1]

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        u = random.uniform(stream, (batch,), steps)  # [updates, lanes, batch]
        return self.first + torch.minimum((u * self.rows).to(torch.int64), self.rows - 1)


class Synthetic:
    """The synthetic part of a run's batches: `keep` generations, replaced one after the other.

    The first generation fills all places. A generation is identified by the update at which it was generated; those in use
    are a function of the number of updates.

    Args:
        augmentation: generator of the trajectories.
        real: dataset and sampler of the rest of a batch.
        rewards: scale and shift of rewards in the configuration.
        folder: folder of the run.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        real: tuple[OfflineDataset, Sampler],
        rewards: tuple[float, float],
        folder: Path,
    ) -> None:
        self.augmentation, self.rewards, self.folder = augmentation, rewards, folder / FOLDER
        self.cfg = augmentation.cfg
        self.every: int = self.cfg.refresh_every
        # Placeholders until `begin` fills the places.
        stand_in, part = (real[0], Uniform(real[0])), self.cfg.share / self.cfg.keep
        self.sources = [(*real, 1.0), *((*stand_in, part) for _ in range(self.cfg.keep))]
        self.stores: dict[int, OfflineDataset] = {}  # by the update at which they were generated

    def begin(
        self, loader: BatchLoader, policy: Agent, step: int, progress: bool = False, last: int | None = None
    ) -> None:
        """Fill the places of a loader made with `sources`: the first generation, or those in use after update `step`.

        Args:
            last: number of the last update, after which nothing is drawn and no place is filled; None: not known.
        """
        self.loader = loader
        self.augmentation.prepare(progress)
        if self.augmentation.dynamics is not None:
            policy.dynamics = self.augmentation.dynamics
        if last is not None and step >= last:
            return
        if step:
            self.restore(policy, step)
        else:  # no policy to guide yet
            self.stores = {0: self._make(None, 0)}
            self._fill(0)

    def due(self, step: int) -> bool:
        """Whether a new generation follows update `step`."""
        return bool(self.every and step and step % self.every == 0)

    def places(self, step: int) -> list[int]:
        """The generation in each place after update `step`, by the update at which it was generated."""
        made = step // self.every if self.every else 0
        latest = [made - (made - 1 - place) % self.cfg.keep for place in range(self.cfg.keep)]
        return [max(0, number) * self.every for number in latest]

    def refresh(self, policy: Agent, step: int) -> None:
        """Replace the oldest generation by a new one under the policy."""
        self.stores[step] = self._make(policy, step)
        self._fill(step)

    def restore(self, policy: Agent, step: int) -> None:
        """Restore the generations in use after update `step`; `policy` is the agent at that update."""
        for made in sorted(set(self.places(step))):
            path = self._path(made)
            if path.exists():
                self.stores[made] = read_flat(path).to(self.augmentation.store.device)
            elif made in (0, step):  # can be generated again: without a policy, or with the given one
                self.stores[made] = self._make(policy if made else None, made)
            else:
                raise OffrlError(f"{path} is missing: the run can't go on exactly; start over with fresh=true.")
        self._fill(step)

    def save(self) -> None:
        """Write the generations in use that are not on disk yet; call it before the checkpoint that needs them."""
        for made, store in self.stores.items():
            if not self._path(made).exists():
                try:
                    write_flat(store, self._path(made))
                except (OSError, SafetensorError) as error:
                    raise OffrlError(
                        f"{self._path(made)}: the synthetic trajectories could not be written ({error}); free some space or "
                        "choose another folder with out=DIR."
                    ) from error

    def sweep(self) -> None:
        """Remove the generations that no checkpoint needs; call it after a checkpoint. Without any in use, all stay."""
        needed = {self._path(made) for made in self.stores}
        for path in self.folder.glob("*.safetensors"):
            if needed and path not in needed:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the generations of an earlier run in the folder."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
        remove_torn(self.folder)

    def _make(self, policy: Agent | None, step: int) -> OfflineDataset:
        store = self.augmentation.generate(policy, step)
        scale, shift = self.rewards
        return store if (scale, shift) == (1.0, 0.0) else store.with_rewards(scale, shift)

    def _fill(self, step: int) -> None:
        places = self.places(step)
        for place, made in enumerate(places):
            store = self.stores[made]
            self.loader.replace(1 + place, store, LaneSegments(store, len(self.augmentation.seeds)))
        self.stores = {made: self.stores[made] for made in set(places)}

    def _path(self, made: int) -> Path:
        return self.folder / f"{made:08d}.safetensors"


# ---- from a configuration --------------------------------------------------------------------------------------------


def augmentation_config(settings: Mapping[str, Any], lanes: int) -> tuple[type[Augmentation], Any]:
    """The class that `_target_` names and its configuration with the given settings, both checked.

    Raises:
        OffrlError: no such class, an unknown key, a wrong value, a list where lanes can't differ or of another length.
    """
    cls, cfg = from_target(settings, Augmentation, "augment")
    for name, value in lane_lists(cfg).items():
        if name not in cls.per_lane:
            raise OffrlError(f"augment.{name}={value}: lanes share this setting; give a single number.")
    check_lane_lists(cfg, "augment", lanes)
    return cls, cfg


def make_augmentation(settings: Mapping[str, Any], store: OfflineDataset, seeds: Sequence[int]) -> Augmentation:
    """An augmentation from its `_target_` and the settings that differ from its dataclass."""
    cls, cfg = augmentation_config(settings, len(seeds))
    return cls(store, cfg, seeds)


def check_agent(agent: Agent, augmentation: type[Augmentation] | None = None, length: int | None = None) -> None:
    """Raise OffrlError for an agent that cannot learn from pieces of trajectories, or needs a model that there is not.

    Args:
        length: transitions of a piece, at most.
    """
    name = type(agent).__name__
    if agent.window and length is not None and length < agent.window:
        raise OffrlError(
            f"{name} learns from {agent.window} timesteps in a row, and augment.length={length}; raise augment.length."
        )
    if augmentation is not None and augmentation.has_dynamics and getattr(agent, "uses_history", False):
        raise OffrlError(
            f"{name} acts on the episode so far, and the model's rollouts ask for each action anew; leave out what makes it so "
            "(such as agent.action_chunk), or set augment=none."
        )
    if agent.needs_dynamics and augmentation is not None and not augmentation.has_dynamics:
        raise OffrlError(
            f"{name} asks a model of the environment in its updates, which {augmentation.__name__} doesn't "
            "have; set augment=world_model."
        )
    if "return_to_go" in agent.batch_fields:
        raise OffrlError(
            f"{name} needs the return from each step to an episode's end, which synthetic pieces of episodes "
            "don't have; set augment=none."
        )
