"""`offrl.fit`: a run from Python objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offrl.data.checks import ReadOptions
from offrl.data.given import name_of
from offrl.envs.chosen import give_function
from offrl.training.compose import compose, dotted
from offrl.training.hooks import Hooks
from offrl.training.runs import Result
from offrl.training.schema import DataConfig
from offrl.training.trainer import train
from offrl.utils.advice import advising
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.settings import build

READ = (
    "semantics",
    "clip_actions",
    "action_bound",
    "action_low",
    "action_high",
    "family",
    "unfinished",
    "goals",
)  # options of `data` that say how arrays are read


def fit(dataset: Any, options: Mapping[str, Any], config_dir: Path | str | None, hooks: Hooks) -> Result:
    """See `offrl.fit`."""
    if config_dir is not None and not (isinstance(config_dir, (str, Path)) and Path(config_dir).expanduser().is_dir()):
        given = one_line(config_dir) if isinstance(config_dir, (str, Path)) else f"of type {type(config_dir).__name__}"
        raise OffrlError(
            f"fit: config_dir, its first argument, is {given} and no folder with configurations of your own; give all else by "
            "name: fit(dataset=..., agent=...)."
        )
    with advising("fit"):
        flat = dotted(options)
        if "eval.env" in flat:
            flat["eval.env"] = _environment(flat["eval.env"])
        if dataset is None or isinstance(dataset, (str, Path)):
            named = {} if dataset is None else {"dataset": str(dataset)}
            return train(compose(named | flat, config_dir), hooks)
        values = compose({"dataset": "given", **flat}, config_dir)
        data = build(DataConfig, values.get("data") or {}, "data.")
        values["dataset"] = name_of(dataset, ReadOptions(**{key: getattr(data, key) for key in READ}))
        return train(values, hooks)


def _environment(env: Any) -> Any:
    """An id, also of a function or class that makes environments."""
    if env is None or isinstance(env, str):
        return env
    if not callable(env) or (hasattr(env, "unwrapped") and not isinstance(env, type)):
        raise OffrlError(
            f"eval.env is of type {type(env).__name__}; give an id, or a function that makes one environment at each call "
            "(several are stepped side by side)."
        )
    return give_function(env)
