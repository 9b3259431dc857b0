"""What augmentations share: their settings, how batches draw from what they make, and keeping it for an exact resume.

An augmentation is given the dataset once and, every so many updates, the policy as it is; it yields trajectories for each lane,
from that lane's policy and seed. They make up a fixed share of the lane's batches; the real part is drawn as the run's
sampler says, the synthetic part uniformly. What was made is kept beside the checkpoint that draws from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from offrl.agents.base import Agent
from offrl.data.cache import read_flat, write_flat
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Sampler, Uniform
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom
from offrl.utils.settings import check_lane_lists, from_target, lane_lists

FOLDER = "synthetic"  # below a run's folder


@dataclass
class SyntheticConfig:
    share: float = 0.5  # of every batch that is synthetic
    refresh_every: int = (
        20_000  # updates between new trajectories under the policy as it then is; 0: only the first ones
    )
    transitions: int = 32_768  # of each lane and generation; fewer where trajectories terminate
    length: int = 31  # transitions of a trajectory
    keep: int = 1  # generations that are mixed, the oldest of which is replaced

    def __post_init__(self) -> None:
        for name, least in (("refresh_every", 0), ("transitions", 1), ("length", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise OffrlError(f"augment.{name}={getattr(self, name)} should be at least {least}.")
        if isinstance(self.share, float) and not 0 < self.share <= 1:
            raise OffrlError(f"augment.share={self.share:g} should be above 0 and at most 1.")

    @property
    def trajectories(self) -> int:
        """How many trajectories make up the transitions."""
        return max(1, self.transitions // self.length)


class Augmentation:
    """Base of all; a subclass has a dataclass `Config` and implements `prepare` and `generate`.

    Args:
        store: the dataset, rewards as recorded.
        cfg: settings; floats named in `per_lane` may be lists with one value per lane.
        seeds: the lanes'.

    Attributes:
        name: what reports put behind the agent's and the sampler's names.
    """

    Config: ClassVar[type] = SyntheticConfig
    per_lane: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""

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
        """Train the model, or read the one that was trained before."""

    def generate(self, policy: Agent | None, step: int) -> OfflineDataset:
        """Trajectories under the policy (None: none to be guided by): lane after lane, `trajectories` episodes each.

        A function of the policy, the seeds, the update's number `step` and the dataset alone; a lane's do not depend on the
        lanes beside it.
        """
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """What is worth keeping with a run."""
        return {}

    def random(self, step: int) -> LaneRandom:
        """Random numbers of the generation that is made at update `step`."""
        random = LaneRandom(self.seeds, self.store.device)
        random.step.fill_(step)
        return random


class LaneSegments(Sampler):
    """Uniform over a lane's own rows of a dataset that holds all lanes' episodes, equally many each, lane after lane."""

    def __init__(self, store: OfflineDataset, lanes: int) -> None:
        bounds = store.offsets[:: store.episodes // lanes]
        self.first, self.rows = bounds[:-1].unsqueeze(-1), bounds.diff().unsqueeze(-1)  # [lanes, 1]

    def draw(self, random: LaneRandom, steps: Tensor, batch: int, stream: str = "sampler") -> Tensor:
        u = random.uniform(stream, (batch,), steps)  # [updates, lanes, batch]
        return self.first + torch.minimum((u * self.rows).to(torch.int64), self.rows - 1)


class Synthetic:
    """The synthetic part of a run's batches: `keep` generations, replaced one after the other.

    The first generation fills all places. A generation is known by the update at which it was made; which ones a run
    draws from follows from its update's number alone.

    Args:
        augmentation: what makes them.
        real: what the rest of a batch is drawn from.
        rewards: scale and shift of rewards, as the configuration has them for the dataset.
        folder: of the run.
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
        # Until `begin` puts trajectories there, the dataset stands in the places.
        stand_in, part = (real[0], Uniform(real[0])), self.cfg.share / self.cfg.keep
        self.sources = [(*real, 1.0), *((*stand_in, part) for _ in range(self.cfg.keep))]
        self.stores: dict[int, OfflineDataset] = {}  # by the update at which they were made

    def begin(self, loader: BatchLoader, policy: Agent, step: int, progress: bool = False) -> None:
        """Put the first generation, or what a run draws from after update `step`, into batches made with `sources`."""
        self.loader = loader
        self.augmentation.prepare(progress)
        if step:
            self.restore(policy, step)
        else:  # nothing to be guided by yet
            self.stores = {0: self._make(None, 0)}
            self._fill(0)

    def due(self, step: int) -> bool:
        """Whether update `step` is followed by a new generation."""
        return bool(self.every and step and step % self.every == 0)

    def places(self, step: int) -> list[int]:
        """For each place the update at which the generation was made that a run draws from after update `step`."""
        made = step // self.every if self.every else 0
        latest = [made - (made - 1 - place) % self.cfg.keep for place in range(self.cfg.keep)]
        return [max(0, number) * self.every for number in latest]

    def refresh(self, policy: Agent, step: int) -> None:
        """Replace the oldest generation by one under the policy."""
        self.stores[step] = self._make(policy, step)
        self._fill(step)

    def restore(self, policy: Agent, step: int) -> None:
        """Take up what a run draws from after update `step`; `policy` is the agent as it then was."""
        for made in sorted(set(self.places(step))):
            path = self._path(made)
            if path.exists():
                self.stores[made] = read_flat(path).to(self.augmentation.store.device)
            elif made in (0, step):  # it can be made again: without a policy, or with the one at hand
                self.stores[made] = self._make(policy if made else None, made)
            else:
                raise OffrlError(f"{path} is missing: the run can't go on exactly; start over with fresh=true.")
        self._fill(step)

    def save(self) -> None:
        """Write what is drawn from and not yet on the disk; before the checkpoint that needs it."""
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
        """Remove what no checkpoint needs; after one was written."""
        needed = {self._path(made) for made in self.stores}
        for path in self.folder.glob("*.safetensors"):
            if path not in needed:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget an earlier run in the folder."""
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob(".*.part")):
            path.unlink(missing_ok=True)

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


def check_agent(agent: Agent) -> None:
    """Raise OffrlError for an agent that can't learn from pieces of trajectories."""
    if "return_to_go" in agent.batch_fields:
        raise OffrlError(
            f"{type(agent).__name__} needs the return from each step to an episode's end, which synthetic pieces of episodes "
            "don't have; set augment=none."
        )
