"""The configuration of a run: checked, and resolved to the last default."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from offrl.agents.base import Agent
from offrl.agents.history import HistoryConfig
from offrl.augment.base import Augmentation, augmentation_config
from offrl.data.catalogue import d4rl, names_environment, namesake
from offrl.data.given import plain_name
from offrl.data.ogbench_names import of_file, parse
from offrl.sampling import sampler_config
from offrl.training.checks import check_environment, check_rewards, check_tasks, check_train
from offrl.training.online_config import add_all, add_table, check_online, check_row
from offrl.training.schema import TABLED, DataConfig, TrainConfig
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.settings import (
    FREE,
    NAMES,
    Tables,
    build,
    canonical,
    check_lane_lists,
    check_ranges,
    check_repeated_seeds,
    chosen_settings,
    class_in,
    from_target,
    is_trusted,
    lane_lists,
    matching_rows,
    target_class,
    training_environment,
    trusting,
)

RARE = ("mask", "flicker", "action_low", "action_high", "family")  # of `data`: written down only where they are set


@dataclass
class RunConfig:
    """A checked and resolved configuration: what to run, before any data is loaded.

    Attributes:
        agent, sampler, augment: `_target_` and every setting, defaults included; `augment` is empty without augmentation.
        history: every setting of the encoder of histories; empty where the agent sees single observations.
        agent_name: the choice `agent=NAME`; where there was none, the class's name in snake case.
        table_rows: rows of the method's table that the dataset matched: pattern -> settings.
    """

    train: TrainConfig
    agent: dict[str, Any]
    sampler: dict[str, Any]
    augment: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    agent_name: str = ""
    table_rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The agent's name, the encoder's, the sampler's unless it is the uniform one, the augmentation's: `td3_bc+AW+PGD`."""
        lanes = len(self.train.lane_seeds())
        cls, cfg = sampler_config(self.sampler, lanes)
        augmentation = augmentation_config(self.augment, lanes)[0].name if self.augment else ""
        if own := agent_config(self.agent)[0].augmentation:  # it is part of the method: its absence is worth a word
            augmentation = {own: "", "": f"no{own}"}.get(augmentation, augmentation)
        online = "online" if self.train.online.steps else ""
        history = history_config(self.history, lanes).label if self.history else ""
        return "+".join(filter(None, (self.agent_name, history, cls.label(cfg), augmentation, online)))

    @property
    def ends_rollouts(self) -> bool:
        """Whether a model's rollouts terminate as in the environment of `eval.env`: the dataset's name tells of none."""
        modelled = bool(self.augment) and target_class(self.augment, Augmentation, "augment").has_dynamics
        return modelled and not names_environment(self.train.dataset)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is kept with the run; `resolve_config` reads it back."""
        train = asdict(self.train)
        if not self.train.online.steps:
            del train["online"]
        usual = asdict(DataConfig())  # options of few runs: the others keep their hash
        train["data"] = {k: v for k, v in train["data"].items() if k not in RARE or v != usual[k]}
        groups = {"augment": self.augment, "history": self.history}
        chosen = {name: settings for name, settings in groups.items() if settings}
        names = {"method": self.train.label or self.method, "agent_name": self.agent_name}
        return {**names, "agent": self.agent, "sampler": self.sampler, **chosen, **train}

    def non_default(self) -> list[str]:
        """Settings of agent, sampler and augmentation that differ from their dataclass, as dotted keys."""
        found = []
        for group in ("agent", "sampler", "augment"):
            settings = getattr(self, group)
            if settings:
                defaults = _defaults_of(target_class(settings, object, group).Config)
                own = {key: value for key, value in settings.items() if key != "_target_"}
                found += [
                    f"{group}.{key}" for key, value in own.items() if key not in defaults or value != defaults[key]
                ]
        return found

    def lane_lists(self) -> dict[str, list[float]]:
        """The settings that are lists with one number per lane, by dotted key."""
        lanes = len(self.train.lane_seeds())
        groups = {"agent": agent_config(self.agent)[1], "sampler": sampler_config(self.sampler, lanes)[1]}
        if self.augment:
            groups["augment"] = augmentation_config(self.augment, lanes)[1]
        if self.history:
            groups["history"] = history_config(self.history, lanes)
        found = {f"{group}.{name}": values for group, cfg in groups.items() for name, values in lane_lists(cfg).items()}
        changed = self.train.online.agent
        after = lane_lists(agent_config({**self.agent, **changed})[1]) if changed else {}
        return found | {f"online.agent.{name}": values for name, values in after.items() if name in changed}

    def facts(self) -> dict[str, Any]:
        """What `manifest.json` says of the settings; reports name methods by it."""
        return {
            "table_rows": self.table_rows,
            "non_default": self.non_default(),
            "lane_lists": sorted(self.lane_lists()),
        }

    def config_hash(self) -> str:
        """8 hex digits of every setting that changes the training's numbers, seeds apart.

        Defaults count: an edited default, or one that a later release changes, makes another run.
        """
        whole = self.to_dict()
        settings = {k: v for k, v in whole.items() if k not in FREE | NAMES}
        if self.train.online.steps:
            settings["updates"] = self.train.updates  # they say where the online phase begins
        environment = training_environment(whole, self.ends_rollouts)
        settings |= {k: v for k, v in environment.items() if v}  # usual ones: runs keep their hash
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()

    def folder(self) -> Path:
        if self.train.name:
            return Path(self.train.out) / self.train.name
        seeds = self.train.lane_seeds()
        run = seeds == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 1
        text = f"{seeds[0]}-{seeds[-1]}" if run else "_".join(map(str, seeds))
        if len(text) > 40:
            text = f"{text[:30]}...{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        dataset = re.sub(r"[^\w.-]+", "_", plain_name(self.train.dataset)).strip("._")
        method = re.sub(r"[^\w.+-]+", "", self.method)
        return Path(self.train.out) / method / dataset / f"seed{text}-{self.config_hash()}"


def resolve_config(values: Mapping[str, Any], trusted: bool = True) -> RunConfig:
    """Check a composed configuration and fill in every default.

    What wins: settings of the command line or a recipe, then `common`, then the rows of the method's table that match the
    dataset, then the dataclasses' defaults.

    Args:
        trusted: whether a `_target_` may be imported; False for what was read from a run's folder.

    Raises:
        OffrlError: an unknown key or a wrong value.
    """
    with trusting(trusted):
        return _resolve({k: v for k, v in values.items() if k not in ("method", "hydra")})


def _resolve(values: dict[str, Any]) -> RunConfig:
    groups = ("agent", "sampler", "augment", "history", "preset", "experiment", "suite", "common")
    if "sizes" in values:
        warnings.warn("`sizes` is now called `common`; the old name will go.", DeprecationWarning, stacklevel=4)
        values["common"] = _table(values, "common") | _table(values, "sizes")
    agent, sampler, augment, history, given_data, common, online = (
        _table(values, name) for name in ("agent", "sampler", "augment", "history", "data", "common", "online")
    )
    if "_target_" not in agent:
        raise OffrlError("agent needs a _target_; choose one with agent=NAME, `offrl agents` lists them.")
    tables, dataset = agent.pop("settings", None), plain_name(str(values.get("dataset", "")))
    always_online, always_augment = agent.pop("online", None), _table(agent, "augment")
    cls, _ = agent_config(agent)  # a typing error should not wait for the data
    own = _own_augmentation(cls, augment)
    check_tables(tables, cls.Config, agent, own)
    tables = _rows_for(tables, dataset)
    rows = matching_rows(tables, dataset, namesake(dataset))
    name = str(values.pop("agent_name", "") or _name_of(str(agent["_target_"])))
    _take_common(agent, cls.Config, common)
    for key, value in chosen_settings(tables, dataset, namesake(dataset)).items():
        if key.startswith("data."):
            given_data.setdefault(key.removeprefix("data."), value)
        elif key.startswith("online."):
            add_table(online, key.removeprefix("online."), value)
        elif key.startswith("augment."):
            always_augment[key.removeprefix("augment.")] = value
        elif key in TABLED:
            values.setdefault(key, value)
        else:
            agent.setdefault(key, value)
    add_all(online, always_online, cls.Config, agent)
    train = build(TrainConfig, {**values, "data": given_data, "online": online}, others=groups)
    check_train(train)
    lanes = len(train.lane_seeds())
    settings = agent_config(agent)[1]
    check_lane_lists(settings, "agent", lanes)
    agent = resolved(agent, settings)
    sampler.setdefault("_target_", "offrl.sampling.Uniform")
    sampler = resolved(sampler, sampler_config(sampler, lanes)[1])
    if augment and "_target_" not in augment:
        raise OffrlError(
            f"augment.{next(iter(augment))}: there is no augmentation to set; choose one with augment=NAME."
        )
    if own:
        augment = always_augment | augment
    if augment:
        _take_common(augment, target_class(augment, Augmentation, "augment").Config, common)
        augment = resolved(augment, augmentation_config(augment, lanes)[1])
    if history:
        history = _resolved_history(history, train, augment)
    _check_common(common)
    check_online(train, cls.Config, agent, augment)
    check_tasks(train, sampler, bool(augment))
    check_rewards(train.data, cls, name)
    job = RunConfig(train, agent, sampler, augment, history, name, rows)
    if is_trusted():  # a run that stands in a file may go on, and the environment that it names is not imported
        _check_lanes_differ(job)
        check_environment(train)
    return job


def _check_lanes_differ(job: RunConfig) -> None:
    """Raise OffrlError where two lanes would train the same policy."""
    seeds = job.train.lane_seeds()
    lists: list[Any] = [*job.lane_lists().values(), job.train.data.tasks or [0] * len(seeds)]
    for part in job.sampler.get("samplers") or []:  # of a mixture
        if isinstance(part, Mapping):
            lists += lane_lists(sampler_config(part, len(seeds))[1]).values()
    check_repeated_seeds(seeds, lists)


def _resolved_history(history: dict[str, Any], train: TrainConfig, augment: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the encoder of histories, defaults included.

    Raises:
        OffrlError: none was chosen, or it does not go with the other settings.
    """
    if "encoder" not in history:
        raise OffrlError(
            f"history.{next(iter(history))}: there is no encoder to set; choose history=gru or history=window."
        )
    if augment or train.online.steps:
        other = "augment" if augment else "online.steps"
        raise OffrlError(
            f"{other} makes single transitions, and history={history['encoder']} learns from histories; set one of them."
        )
    if train.engine == "compile":  # PyTorch's compiler loses the shape of a view where critics pass their gradient on
        raise OffrlError(f"engine=compile can't compile history={history['encoder']}; use engine=auto or engine=eager.")
    settings: dict[str, Any] = json.loads(json.dumps(asdict(history_config(history, train.lanes))))
    return settings


def _own_augmentation(cls: type[Agent[Any]], augment: Mapping[str, Any]) -> type[Any] | None:
    """The settings' dataclass of the chosen augmentation if it is part of the method; None: there is no such thing to set."""
    if "_target_" not in augment:
        return None
    chosen: type[Augmentation] = target_class(augment, Augmentation, "augment")
    return chosen.Config if chosen.name == cls.augmentation else None


def _rows_for(tables: Tables | None, dataset: str) -> Tables | None:
    """The rows of a method's table that may match a dataset: those for D4RL's AntMaze don't mean OGBench's mazes."""
    if not (parse(dataset) or of_file(Path(dataset))):
        return tables
    return {
        pattern: row
        for pattern, row in (tables or {}).items()
        if pattern == "*" or not any(fnmatch(name, pattern) for name in d4rl())
    }


def _name_of(target: str) -> str:
    """A method's name where no choice named it: our own agents' modules are named by their choice, others by their class."""
    module, _, cls = target.rpartition(".")
    if module.startswith("offrl.agents."):
        return module.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls).lower()


def resolved(settings: Mapping[str, Any], cfg: Any) -> dict[str, Any]:
    """`_target_` and every field of a checked configuration, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(cfg)))
    return {"_target_": canonical(str(settings["_target_"])), **values}


def _defaults_of(cls: type[Any]) -> dict[str, Any]:
    """The defaults of a dataclass, as JSON has them; a field without one, which a user has to give, is left out."""
    found: dict[str, Any] = {}
    for f in fields(cls):
        value = f.default_factory() if f.default_factory is not MISSING else f.default
        if value is not MISSING:
            found[f.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    defaults: dict[str, Any] = json.loads(json.dumps(found))
    return defaults


def _take_common(settings: dict[str, Any], cls: type[Any], common: Mapping[str, Any]) -> None:
    """Settings of `common`, where a method has them and was not given its own."""
    for f in fields(cls):
        if f.name in common:
            settings.setdefault(f.name, common[f.name])


def _check_common(common: Mapping[str, Any]) -> None:
    """Raise OffrlError for a key of `common` that no agent and no augmentation in the configuration folder has."""
    if not common:
        return
    known: set[str] = set()
    for path in (path for group in ("agent", "augment") for path in sorted((conf_dir() / group).glob("*.yaml"))):
        known |= _settings_in(path, path.stat().st_mtime_ns)
        if known.issuperset(common):
            return
    for key in common:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean common.{near[0]}?" if near else "`offrl agents NAME` lists settings."
            raise OffrlError(f"common.{key}: no agent and no augmentation has this setting; {hint}")


@lru_cache(maxsize=256)
def _settings_in(path: Path, modified: int) -> frozenset[str]:
    """Names of the settings of a choice's class; `modified` only tells versions of the file apart."""
    cls = class_in(path, object)
    return frozenset(f.name for f in fields(cls.Config)) if cls else frozenset()


def check_tables(
    tables: Tables | None, cls: type[Any], agent: Mapping[str, Any], augment: type[Any] | None = None
) -> None:
    """Raise OffrlError for a wrong key or value in any row of a method's table, whether or not a dataset matches it.

    Args:
        cls: the method's dataclass of settings. agent: the settings that are given beside the table.
        augment: the dataclass of the augmentation that is part of the method; None: keys `augment.` are not looked at.
    """
    beside = {key: value for key, value in agent.items() if key != "_target_"}
    for pattern, row in (tables or {}).items():
        try:
            if not isinstance(row, Mapping):
                raise OffrlError(f"{row} should be a table of settings, not a single value.")
            data = {key.removeprefix("data."): value for key, value in row.items() if key.startswith("data.")}
            training = {key: value for key, value in row.items() if key in TABLED}
            build(DataConfig, data, "data.")
            build(TrainConfig, training)
            if augment:
                keys = {key: value for key, value in row.items() if key.startswith("augment.")}
                build(augment, {key.removeprefix("augment."): value for key, value in keys.items()}, "augment.")
            check_row({key: value for key, value in row.items() if key.startswith("online.")}, cls, agent)
            own = {
                key: value
                for key, value in row.items()
                if key not in TABLED and not key.startswith(("data.", "online.", "augment."))
            }
            build(cls, {**beside, **own}, "agent.", per_lane=True)
        except OffrlError as error:
            raise OffrlError(f"agent.settings, row {pattern}: {error}") from error


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings under a name, taken out of `values`."""
    settings = values.pop(name, None)
    if not isinstance(settings, Mapping | None):
        raise OffrlError(f"{name}={settings} should be a table of settings, not a single value.")
    return dict(settings or {})


def history_config(settings: Mapping[str, Any], lanes: int) -> HistoryConfig:
    """The settings of an encoder of histories, checked."""
    cfg: HistoryConfig = build(HistoryConfig, settings, "history.", per_lane=True)
    check_ranges(cfg, "history")
    check_lane_lists(cfg, "history", lanes)
    shares = cfg.events if isinstance(cfg.events, list) else [cfg.events]
    if odd := [share for share in shares if not 0 <= share <= 1]:
        raise OffrlError(f"history.events={odd[0]} should be a share of pairs, between 0 and 1.")
    return cfg


def agent_config(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that `_target_` names and its configuration with the given settings, both checked."""
    return from_target(settings, Agent, "agent")
