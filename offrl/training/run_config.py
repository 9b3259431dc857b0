"""A checked configuration of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from offrl.agents.base import Agent
from offrl.augment.base import augmentation_config
from offrl.sampling import sampler_config
from offrl.training import schema as config
from offrl.training.schema import TrainConfig
from offrl.utils.errors import OffrlError
from offrl.utils.settings import FREE, build, chosen_settings, from_target


@dataclass
class RunConfig:
    """A checked configuration: what to run, before any data is loaded."""

    train: TrainConfig
    agent: dict[str, Any]  # `_target_` and the settings that differ from the dataclass
    sampler: dict[str, Any]
    augment: dict[str, Any] = field(default_factory=dict)  # empty: no augmentation

    @property
    def agent_name(self) -> str:
        return self.agent["_target_"].split(".")[-2]

    @property
    def method(self) -> str:
        """The agent's name, the sampler's where it is not the uniform one, the augmentation's: `td3_bc+AW+PGD`."""
        lanes = len(self.train.lane_seeds())
        cls, cfg = sampler_config(self.sampler, lanes)
        augmentation = augmentation_config(self.augment, lanes)[0].name if self.augment else ""
        return "+".join(filter(None, (self.agent_name, cls.label(cfg), augmentation)))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is kept with the run; `plan` reads it back."""
        train = asdict(self.train)
        augment = {"augment": self.augment} if self.augment else {}
        method = self.train.label or self.method
        return {"method": method, "agent": self.agent, "sampler": self.sampler, **augment, **train}

    def config_hash(self) -> str:
        """8 hex digits of everything that changes the training's numbers, seeds apart."""
        what = {k: v for k, v in self.to_dict().items() if k not in FREE | {"method"}}
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=4).hexdigest()

    def folder(self) -> Path:
        if self.train.name:
            return Path(self.train.out) / self.train.name
        seeds = self.train.lane_seeds()
        run = seeds == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 1
        text = f"{seeds[0]}-{seeds[-1]}" if run else "_".join(map(str, seeds))
        if len(text) > 40:
            text = f"{text[:30]}...{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        dataset = re.sub(r"[^\w.-]+", "_", self.train.dataset).strip("._")
        method = re.sub(r"[^\w.+-]+", "", self.method)
        return Path(self.train.out) / method / dataset / f"seed{text}-{self.config_hash()}"


def resolve_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration.

    The settings that a method's table has for the dataset are filled in where nothing was given.

    Raises:
        OffrlError: an unknown key or a wrong value.
    """
    values = {k: v for k, v in values.items() if k not in ("method", "hydra")}
    tables = ("agent", "sampler", "augment", "data", "sizes")
    agent, sampler, augment, given_data, sizes = (_table(values, name) for name in tables)
    if "_target_" not in agent:
        raise OffrlError("agent needs a _target_; choose one with agent=NAME, `offrl agents` lists them.")
    chosen = chosen_settings(agent.pop("settings", None), str(values.get("dataset", "")))
    for key, value in chosen.items():
        if key.startswith("data."):
            given_data.setdefault(key.removeprefix("data."), value)
        elif key in config.TABLED:
            values.setdefault(key, value)
        else:
            agent.setdefault(key, value)
    groups = ("agent", "sampler", "augment", "preset", "experiment")
    train = build(TrainConfig, {**values, "data": given_data}, others=groups)
    if not train.dataset:
        raise OffrlError("dataset is empty; name one with dataset=ID, `offrl data list` shows the known ones.")
    _check_ranges(train)
    if train.seeds and len(train.seeds) != train.lanes:
        if train.lanes != 1:
            raise OffrlError(f"seeds has {len(train.seeds)} values for lanes={train.lanes}; give one per lane.")
        train.lanes = len(train.seeds)
    cls, _ = agent_config(agent)  # a typing error should not wait for the data
    _take_sizes(agent, cls.Config, sizes)
    sampler.setdefault("_target_", "offrl.sampling.Uniform")
    sampler_config(sampler, len(train.lane_seeds()))
    if augment and "_target_" not in augment:
        raise OffrlError(
            f"augment.{next(iter(augment))}: there is no augmentation to set; choose one with augment=NAME."
        )
    if augment:
        augmentation, _ = augmentation_config(augment, len(train.lane_seeds()))
        _take_sizes(augment, augmentation.Config, sizes)
    return RunConfig(train, agent, sampler, augment)


def _take_sizes(settings: dict[str, Any], cls: type[Any], sizes: Mapping[str, Any]) -> None:
    """A preset's sizes, where a method has them and nothing else was given."""
    for f in fields(cls):
        if f.name in sizes:
            settings.setdefault(f.name, sizes[f.name])


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings under a name, taken out of `values`."""
    settings = values.pop(name, None)
    if not isinstance(settings, Mapping | None):
        raise OffrlError(f"{name}={settings} should be a table of settings, not a single value.")
    return dict(settings or {})


def _check_ranges(train: TrainConfig) -> None:
    positive = ("updates", "batch_size", "lanes", "updates_per_launch", "log_every", "checkpoint_every", "threads")
    least = dict.fromkeys(positive, 1) | {"eval.workers": 1, "eval.slots": 1}
    least |= dict.fromkeys(("eval.every", "eval.episodes", "eval.final_episodes", "eval.seed"), 0)
    for key, smallest in least.items():
        value = attrgetter(key)(train)
        if value is not None and value < smallest:
            raise OffrlError(f"{key}={value} should be at least {smallest}.")
    if any(not -(2**63) <= seed < 2**63 for seed in train.lane_seeds()):
        raise OffrlError("a seed should be a number of at most 63 bits.")


def agent_config(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that `_target_` names and its configuration with the given settings, both checked."""
    return from_target(settings, Agent, "agent")
