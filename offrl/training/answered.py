"""Whether a finished run has the evaluation that a command asks for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from offrl import results
from offrl.training.schema import EvalConfig
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json
from offrl.utils.settings import TASK


class _Config(BaseModel):
    """The part of `config.json` that says how the run was evaluated."""

    model_config = ConfigDict(strict=True, extra="ignore")
    eval: dict[str, Any] = {}


def is_answered(folder: Path, step: int, wanted: EvalConfig) -> bool:
    """Whether the rows of a run's last update hold all the episodes that are asked for.

    Args:
        step: updates that the run has made.

    Raises:
        OffrlError: the run was scored in another environment, or with other references.
    """
    defaults = asdict(EvalConfig())
    try:
        kept = read_json(folder / "config.json", _Config, "repeat the command that started the run").eval
    except FileNotFoundError:
        return True
    kept = defaults | {key: value for key, value in kept.items() if key in {f.name for f in fields(EvalConfig)}}
    now = asdict(wanted)
    if _lacks_evaluations(kept["every"], wanted.every, step):
        had = f" and was evaluated every {kept['every']} updates" if kept["every"] else ""
        warnings.warn(
            f"{folder}: the run is finished{had}, so that it can't be evaluated every {wanted.every} updates any more; "
            "fresh=true trains it again.",
            stacklevel=2,
        )
    same = all(kept[key] == now[key] for key in TASK)
    if wanted.final_episodes < 1 or (same and _covers(kept, wanted)):
        return True
    import polars as pl  # only a finished run is asked

    rows = results.read([folder]).filter(pl.col("step") == step)
    if not rows.height:
        return False
    if not same:
        raise _scored_otherwise(folder, kept, now)
    seeds = set(range(wanted.seed, wanted.seed + wanted.final_episodes))
    return all(seeds <= set(lane["eval_seed"]) for lane in rows.partition_by("lane"))


def _lacks_evaluations(kept: int, wanted: int, step: int) -> bool:
    """Whether a run of `step` updates, evaluated every `kept` ones, was not evaluated at each multiple of `wanted` below."""
    return 0 < wanted < step and (kept == 0 or wanted % kept != 0)


def check_task(folder: Path, kept: Mapping[str, Any], wanted: EvalConfig) -> None:
    """Raise OffrlError where a run that goes on would have scores of two scales in one curve.

    Of another environment rows say so themselves, and a report keeps them apart.

    Args:
        kept: the options of evaluation under which the run got as far as it is.
    """
    before, now = asdict(EvalConfig()) | dict(kept), asdict(wanted)
    for options in (before, now):
        options["env_kwargs"] = options["env_kwargs"] or None  # none given
    same = before["env"] != now["env"] or all(before[key] == now[key] for key in TASK)
    rows = folder / "episodes.jsonl"
    if not same and rows.is_file() and rows.stat().st_size:
        raise _scored_otherwise(folder, before, now)


def _scored_otherwise(folder: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> OffrlError:
    changed = next(key for key in TASK if kept[key] != now[key])
    return OffrlError(
        f"{folder}: the run was scored with eval.{changed}={kept[changed]}, not {now[changed]}; play elsewhere with "
        f"offrl evaluate RUN --env ID, or train again under another name=."
    )


def _covers(kept: dict[str, Any], wanted: EvalConfig) -> bool:
    """Whether the episodes that a run was configured with are those that are wanted, and more."""
    return bool(kept["seed"] == wanted.seed and kept["final_episodes"] >= wanted.final_episodes)
