"""From mappings to checked dataclasses."""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from offrl.utils.errors import OffrlError, one_line


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
    types_of = types_in(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            tables = {name: kind for name, kind in types_of.items() if is_dataclass(kind)}
            inside = [f"{name}.{key}" for name, kind in tables.items() if key in types_in(kind)]
            near = inside or difflib.get_close_matches(key, [*known, *others], 1)
            keys = (
                f"known keys: {', '.join(known)}."
                if known
                else f"this {where.rstrip('.')} has no settings, choose another."
            )
            hint = f"did you mean {where}{near[0]}?" if near else keys
            raise OffrlError(f"{where}{key} is no option; {hint}")
        wanted = types_of[key]
        if is_dataclass(wanted) and isinstance(wanted, type):
            if not isinstance(value, Mapping):
                raise OffrlError(f"{where}{key}={value} should be a table of settings, not a single value.")
            kwargs[key] = build(wanted, value, f"{where}{key}.")
        else:
            _check_number_of_values(key, value, known, where)
            kwargs[key] = _convert(value, wanted, where + key, per_lane)
    lacking = [f.name for f in fields(cls) if f.init and f.default is f.default_factory is MISSING]
    if lacking := [f"{where}{name}" for name in lacking if name not in kwargs]:
        raise OffrlError(f"{lacking[0]} has no default; give {lacking[0]}=...")
    return cls(**kwargs)


def _check_number_of_values(key: str, value: Any, known: Iterable[str], where: str) -> None:
    """Name `seeds` where `seed` was given a list, and the other way round."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    if several and key + "s" in known:
        values = one_line(f"[{','.join(map(str, value))}]")
        raise OffrlError(f"{where}{key}={values} has several values; give {where}{key}s={values}.")
    single = isinstance(value, (int, str)) and not isinstance(value, bool)
    if single and key.endswith("s") and key[:-1] in known:
        raise OffrlError(f"{where}{key}={one_line(value)} is a single value; give {where}{key[:-1]}={one_line(value)}.")


def types_in(cls: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; a module may or may not postpone its annotations. Reading them takes most of a check."""
    if cls not in _types:
        _types[cls] = typing.get_type_hints(cls)
    return _types[cls]


_types: dict[Any, dict[str, Any]] = {}


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
        if origin is int and number and (isinstance(value, int) or value.is_integer()):
            if abs(value) >= 2**63:
                raise OffrlError(f"{key}={one_line(value, 40)} should have at most 63 bits.")
            return int(value)
        if origin is float and number:
            return _float(value, key)
        if origin is str and isinstance(value, str):
            return value
        if origin in (tuple, list) and sequence:
            inner = typing.get_args(option)[0]
            values = origin(_convert(v, inner, key, False) for v in value)
            if per_lane and inner is int and any(v < 1 for v in values):  # a method's are sizes of layers
                raise OffrlError(f"{key}={list(values)} should be a list of whole numbers of at least 1.")
            return values
        if origin is float and per_lane and sequence:
            return [_convert(v, float, key, False) for v in value]
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
    names = " or ".join(_name(option, per_lane) for option in options)
    raise OffrlError(f"{key}={one_line(repr(value))} should be {names}.")


def _float(value: float, key: str) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise OffrlError(f"{key}={one_line(value, 40)} is too large for a number.") from error
    if number != number:
        raise OffrlError(f"{key}=nan should be a number.")
    return number


def _name(option: Any, per_lane: bool) -> str:
    """What a type asks for, in words."""
    if typing.get_origin(option) in (tuple, list):
        return f"a list of {_name(typing.get_args(option)[0], False).removeprefix('a ')}s"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(option, str(option)) + (", or a list with one per lane" if option is float and per_lane else "")


_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)

# Classes that have moved: run folders of before name them by their old place.
_MOVED = {"offrl.density.DensityWeighted": "offrl.sampling.density.DensityWeighted"}


@contextmanager
def trusting(trusted: bool = True) -> Iterator[None]:
    """Within it, the module that a `_target_` names may be imported; only where the user has named it himself.

    `trusted=False` leaves it as it was: what was allowed outside stays allowed.
    """
    token = _TRUSTED.set(trusted or _TRUSTED.get())
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Whether the names at hand are the user's own, so that modules that they name may be imported."""
    return _TRUSTED.get()


def canonical(target: str) -> str:
    """Where a class lives now."""
    return _MOVED.get(target, target)


def target_class(settings: Mapping[str, Any], base: type[Any], group: str) -> Any:
    """The class that `_target_` names.

    Args:
        base: what the class has to descend from.
        group: the settings' name in the configuration, for messages.

    Raises:
        OffrlError: no such class, one of another kind, or one that a file names and nothing has imported yet.
    """
    target = canonical(str(settings["_target_"]))
    module = target.rpartition(".")[0]
    if not (target.startswith("offrl.") or module in sys.modules or _TRUSTED.get()):
        raise OffrlError(
            f"{group}._target_={target} comes from a file, and nothing that a file names is imported; import {module} first, "
            "or give --trust (and --config-dir DIR, beside which it lies) on the command line."
        )
    try:
        cls: Any = getattr(importlib.import_module(module), target.rpartition(".")[2])
    except Exception as error:  # the module is the user's own: anything may happen
        raise OffrlError(
            f"{group}._target_={target} can't be imported ({one_line(error)}); check its spelling."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        wanted = f"{base.__module__}.{base.__qualname__}"
        raise OffrlError(f"{group}._target_={target} is no {wanted}; name a class that is.")
    return cls


def class_in(path: Path, base: type[Any]) -> Any:
    """The class that the file of a choice names, `GROUP/NAME.yaml`; None where it names none. Errors are `target_class`'s."""
    from omegaconf import OmegaConf  # a tenth of a second, which `offrl --help` does not need

    target = OmegaConf.select(OmegaConf.load(path), "_target_")
    return target_class({"_target_": target}, base, path.parent.name) if target else None


def from_target(settings: Mapping[str, Any], base: type[Any], group: str) -> tuple[Any, Any]:
    """The class that `_target_` names and its configuration with the other settings, both checked.

    Args:
        base: what the class has to descend from.
        group: the settings' name in the configuration, for messages.

    Raises:
        OffrlError: no such class, an unknown key, a wrong value.
    """
    cls = target_class(settings, base, group)
    renamed = getattr(cls, "renamed_settings", {})  # names of earlier versions
    given = {renamed.get(k, k): v for k, v in settings.items() if k != "_target_"}
    cfg = build(cls.Config, given, f"{group}.", per_lane=True)
    check_ranges(cfg, group)
    return cls, cfg


# Settings by the last word of their name, and the numbers between which they make sense (a dataclass may say others).
_RANGES = {"lr": (0.0, math.inf), "tau": (0.0, 1.0), "discount": (0.0, 1.0)}


def check_ranges(cfg: Any, group: str) -> None:
    """Raise OffrlError for a setting outside of the numbers that make sense.

    Counts are at least 0, learning rates too, step sizes of targets (`tau`) and discounts between 0 and 1, unless the
    dataclass's `least` and `most`, each a `ClassVar[dict[str, float]]`, say otherwise.
    """
    least, most = getattr(cfg, "least", {}), getattr(cfg, "most", {})
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        counts = isinstance(value, int) and f.name != "seed"
        low, high = _RANGES.get(f.name.rpartition("_")[2], (0 if counts else -math.inf, math.inf))
        low, high = least.get(f.name, low), most.get(f.name, high)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not low <= number <= high:
                above = "" if high == math.inf else f" and at most {high:g}"
                raise OffrlError(f"{group}.{f.name}={number} should be at least {low:g}{above}.")


def lane_lists(cfg: Any) -> dict[str, list[float]]:
    """The settings that hold one number per lane where a single one would do."""
    types_of = types_in(type(cfg))  # a module may or may not postpone its annotations
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg) if _is_number(types_of[f.name])}
    return {name: value for name, value in values.items() if isinstance(value, list)}


def _is_number(kind: Any) -> bool:
    """Whether a type is a float's, maybe optional; one that a tuple is of as well holds lists of its own."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return float in options and not any(typing.get_origin(option) is tuple for option in options)


def check_lane_lists(cfg: Any, group: str, lanes: int) -> None:
    """Raise OffrlError for a list whose length is not the number of lanes."""
    for name, value in lane_lists(cfg).items():
        if len(value) != lanes:
            raise OffrlError(f"{group}.{name} has {len(value)} values for {lanes} lanes; give one per lane.")


def check_repeated_seeds(seeds: Sequence[int], lists: Sequence[Sequence[float]]) -> None:
    """Raise OffrlError where two lanes have the same seed and no list that tells them apart: they would be one run twice.

    Args:
        lists: settings with one number per lane.
    """
    lanes: dict[str, int] = {}
    for lane, seed in enumerate(seeds):
        first = lanes.setdefault(repr([seed, *(values[lane] for values in lists)]), lane)
        if first != lane:
            raise OffrlError(
                f"seeds: lanes {first} and {lane} have seed {seed} and the same settings, so that they would train the same "
                "policy; give each lane another seed, or a list of settings with one per lane."
            )


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `values["eval"]["every"]` for the key `eval.every`; tables on the way are copied, and made where there is none.

    Raises:
        OffrlError: a single value stands where the key wants a table.
    """
    *path, last = key.split(".")
    table = values
    for depth, name in enumerate(path, start=1):
        inner = table.get(name)
        if not isinstance(inner, Mapping | None):
            above = ".".join(path[:depth])
            raise OffrlError(f"{key}: {above}={one_line(inner)} is a single value; give {above}=VALUE.")
        copied: dict[str, Any] = dict(inner or {})
        table[name] = copied
        table = copied
    table[last] = value


Tables = Mapping[str, Mapping[str, Any]]


def matching_rows(tables: Tables | None, dataset: str, namesake: str | None = None) -> dict[str, dict[str, Any]]:
    """The rows that a method's table has for a dataset, in the order in which later ones win.

    Args:
        tables: pattern of dataset ids -> settings.
        namesake: id of the D4RL set whose values the dataset takes as well (`catalogue.namesake`).

    First come the rows that match the namesake, then those that match the dataset's own name alone; each in the table's order.
    """
    rows = tables or {}
    shared = [pattern for pattern in rows if namesake and fnmatch(namesake, pattern)]
    own = [pattern for pattern in rows if fnmatch(dataset, pattern) and pattern not in shared]
    return {pattern: dict(rows[pattern]) for pattern in (*shared, *own)}


def chosen_settings(tables: Tables | None, dataset: str, namesake: str | None = None) -> dict[str, Any]:
    """The settings that a method's table has for a dataset: those of `matching_rows`, later ones winning."""
    chosen: dict[str, Any] = {}
    for row in matching_rows(tables, dataset, namesake).values():
        chosen |= row
    return chosen


# What may change when a run is continued: none of it changes a number of the training.
FREE = {"updates", "device", "engine", "updates_per_launch", "threads", "log_every", "checkpoint_every"}
FREE |= {"keep_checkpoints", "out", "name", "label", "fresh", "progress", "tracker", "eval", "lanes", "seed", "seeds"}
# Options of `eval` that say what an episode is. An online phase learns in the same environment, where they are not free.
ENVIRONMENT = ("env", "env_kwargs", "max_episode_steps")
TASK = (*ENVIRONMENT, "ref_min", "ref_max")  # and those that say what scores 0 and 100
# What names a run's method in reports; no setting.
NAMES = {"method", "agent_name"}


def training_environment(config: Mapping[str, Any], ends_rollouts: bool = False) -> dict[str, Any]:
    """The options `ENVIRONMENT` of a run's kept configuration that change its training, by dotted key; None: not given.

    Empty without an online phase: the environment is then one of evaluation alone.

    Args:
        ends_rollouts: whether a model's rollouts terminate as in the environment that `eval.env` names.
    """
    options = config.get("eval")
    given = options if isinstance(options, Mapping) else {}
    keys = ENVIRONMENT if config.get("online") else ENVIRONMENT[:1] if ends_rollouts else ()
    return {f"eval.{key}": given.get(key) or None for key in keys}
