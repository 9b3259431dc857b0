"""From a composed Hydra configuration to plain dataclasses, checked before anything runs."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from offrl.errors import OffrlError


@dataclass
class DataConfig:
    semantics: Literal["exact", "d4rl"] = "exact"  # rows of D4RL files; d4rl: those of its qlearning_dataset
    clip_actions: bool = False  # clip actions that lie outside their bounds instead of refusing the file
    action_bound: float | None = None  # the bounds are +- this; None: what the dataset's family has
    unfinished: bool = False  # accept a file that marks no episode's end, as one episode
    goals: bool = False  # keep a maze's goal in the observation (Minari)
    cache: bool = True  # keep a flat copy that loads in a fraction of a second
    size: int | None = None  # transitions of a forge dataset that has to be built; None: its default
    seed: int = 0  # of a forge dataset that has to be built
    reward_scale: float = 1.0  # r <- scale * r + shift
    reward_shift: float = 0.0  # of the same formula
    reward_normalize: bool = False  # first r <- 1000 r / (largest - smallest episode return), as IQL does


@dataclass
class EvalConfig:
    every: int = 5000  # updates between evaluations; 0: only at the end
    episodes: int = 10  # per lane, at each of them
    final_episodes: int = 100  # per lane, after the last update
    seed: int = 1_000_000  # environment seed of the first episode, apart from training's seeds
    workers: int | None = None  # processes that step environments; None: one per usable core
    slots: int | None = None  # environments at once; None: 100, or 1000 where one call steps them all


TABLED = ("batch_size",)  # options of training, besides those of `data`, that a method's table may set for a dataset


@dataclass
class TrainConfig:
    dataset: str = ""  # an id, a file or a folder; `offrl data list` names the known ones
    seed: int = 0  # lane l has seed + l
    lanes: int = 1  # seeds that train side by side
    seeds: list[int] | None = None  # the lanes' seeds, when they are not seed, seed + 1, ...
    updates: int = 1_000_000  # gradient steps of every lane
    batch_size: int = 256  # rows per lane and update
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    engine: Literal["auto", "eager", "compile", "cudagraph"] = "auto"  # auto, eager, compile, cudagraph
    updates_per_launch: int = 16  # updates in one captured graph
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products: float32 or bfloat16
    threads: int = 1  # of this process
    log_every: int = 1000  # updates between rows of metrics
    checkpoint_every: int = 10_000  # updates between checkpoints
    keep_checkpoints: bool = False  # keep each one under checkpoints/ for later selection
    out: str = "runs"  # folder of all runs
    name: str | None = None  # folder of this run below `out`; None: method, dataset and settings make it
    label: str | None = None  # the method's name in reports
    fresh: bool = False  # start over where a run of the same settings stands
    progress: bool = True  # a bar with rate and time left, or a line now and then where nobody watches
    tracker: str | list[str] | None = None  # tensorboard, wandb, or [tensorboard,wandb]
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def lane_seeds(self) -> list[int]:
        return list(self.seeds) if self.seeds else [self.seed + lane for lane in range(self.lanes)]


# What may change when a run is continued: none of it changes a number of the training.
FREE = {"updates", "device", "engine", "updates_per_launch", "threads", "log_every", "checkpoint_every"}
FREE |= {"keep_checkpoints", "out", "name", "label", "fresh", "progress", "tracker", "eval", "lanes", "seed", "seeds"}


def build(
    cls: type[Any], values: Mapping[str, Any], where: str = "", per_lane: bool = False, others: Iterable[str] = ()
) -> Any:
    """An instance of dataclass `cls` from a mapping; nested dataclasses from nested mappings.

    Args:
        where: prefix of keys in messages, such as `agent.`.
        per_lane: a float may also be a list of floats, one per lane.
        others: names that stand beside the dataclass's, for hints at a misspelt one.

    Raises:
        OffrlError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    known = {f.name: f for f in fields(cls)}
    types_of = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *others], 1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(known)}."
            raise OffrlError(f"{where}{key} is no option; {hint}")
        wanted = types_of[key]
        if is_dataclass(wanted) and isinstance(wanted, type):
            if not isinstance(value, Mapping):
                raise OffrlError(f"{where}{key}={value} should be a table of settings, not a single value.")
            kwargs[key] = build(wanted, value, f"{where}{key}.")
        else:
            kwargs[key] = _convert(value, wanted, where + key, per_lane)
    return cls(**kwargs)


def _convert(value: Any, wanted: Any, key: str, per_lane: bool) -> Any:
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Literal:
            if value in typing.get_args(option):
                return value
            raise OffrlError(f"{key}={value} should be one of {', '.join(map(str, typing.get_args(option)))}.")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        sequence = isinstance(value, Sequence) and not isinstance(value, str)
        if origin is bool and isinstance(value, bool):
            return value
        if origin is int and number and float(value).is_integer():
            return int(value)
        if origin is float and number:
            return float(value)
        if origin is str and isinstance(value, str):
            return value
        if origin in (tuple, list) and sequence:
            inner = typing.get_args(option)[0]
            return origin(_convert(v, inner, key, False) for v in value)
        if origin is float and per_lane and sequence:
            return [_convert(v, float, key, False) for v in value]
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
    names = " or ".join(_name(option, per_lane) for option in options)
    raise OffrlError(f"{key}={value!r} should be {names}.")


def _name(option: Any, per_lane: bool) -> str:
    """What a type asks for, in words."""
    if typing.get_origin(option) in (tuple, list):
        return f"a list of {_name(typing.get_args(option)[0], False).removeprefix('a ')}s"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(option, str(option)) + (", or a list with one per lane" if option is float and per_lane else "")


def from_target(settings: Mapping[str, Any], base: type[Any], group: str) -> tuple[Any, Any]:
    """The class that `_target_` names and its configuration with the other settings, both checked.

    Args:
        base: what the class has to descend from.
        group: the settings' name in the configuration, for messages.

    Raises:
        OffrlError: no such class, an unknown key, a wrong value.
    """
    from hydra.utils import get_class

    target = settings["_target_"]
    try:
        cls: Any = get_class(target)
    except Exception as error:
        raise OffrlError(f"{group}._target_={target} can't be imported ({error}); check its spelling.") from error
    if not issubclass(cls, base):
        wanted = f"{base.__module__}.{base.__qualname__}"
        raise OffrlError(f"{group}._target_={target} is no {wanted}; name a class that is.")
    given = {k: v for k, v in settings.items() if k != "_target_"}
    return cls, build(cls.Config, given, f"{group}.", per_lane=True)


def lane_lists(cfg: Any) -> dict[str, list[float]]:
    """The settings that hold one number per lane where a single one would do."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg) if str(f.type) == "float"}
    return {name: value for name, value in values.items() if isinstance(value, list)}


def check_lane_lists(cfg: Any, group: str, lanes: int) -> None:
    """Raise OffrlError for a list whose length is not the number of lanes."""
    for name, value in lane_lists(cfg).items():
        if len(value) != lanes:
            raise OffrlError(f"{group}.{name} has {len(value)} values for {lanes} lanes; give one per lane.")


def chosen_settings(
    tables: Mapping[str, Mapping[str, Any]] | None, dataset: str, namesake: str | None = None
) -> dict[str, Any]:
    """The settings that a method's table has for a dataset.

    Args:
        tables: pattern of dataset ids -> settings.
        namesake: id of the D4RL set whose values the dataset takes as well (`catalogue.namesake`).

    Rows are taken in the table's order, later ones winning: first those that match the namesake, then those that match
    the dataset's own name alone.
    """
    rows = tables or {}
    shared = [pattern for pattern in rows if namesake and fnmatch(namesake, pattern)]
    own = [pattern for pattern in rows if fnmatch(dataset, pattern) and pattern not in shared]
    chosen: dict[str, Any] = {}
    for pattern in (*shared, *own):
        chosen |= rows[pattern]
    return chosen


def check_tables(tables: Mapping[str, Mapping[str, Any]] | None, cls: type[Any]) -> None:
    """Raise OffrlError for a wrong key or value in any row of a method's table, whether or not a dataset matches it.

    Args:
        cls: the method's dataclass of settings.
    """
    for pattern, row in (tables or {}).items():
        try:
            if not isinstance(row, Mapping):
                raise OffrlError(f"{row} should be a table of settings, not a single value.")
            data = {key.removeprefix("data."): value for key, value in row.items() if key.startswith("data.")}
            training = {key: value for key, value in row.items() if key in TABLED}
            build(DataConfig, data, "data.")
            build(TrainConfig, training)
            own = {key: value for key, value in row.items() if key not in TABLED and not key.startswith("data.")}
            build(cls, own, "agent.", per_lane=True)
        except OffrlError as error:
            raise OffrlError(f"agent.settings, row {pattern}: {error}") from error
