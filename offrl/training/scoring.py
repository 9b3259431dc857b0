"""Episodes that are played after training, and kept among the run's rows, which reports read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offrl import results
from offrl.agents.acting import lane_named
from offrl.agents.base import Agent
from offrl.data.dataset import DatasetInfo
from offrl.data.lane_tasks import lane_infos
from offrl.data.partial import title
from offrl.envs.chosen import import_environment
from offrl.evaluation.evaluator import Episodes, Evaluator
from offrl.training.records import ResultRecord, RunRecord
from offrl.training.runs import dataset_info, evaluation_info, load_agent, read_config
from offrl.training.schema import EvalConfig
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json
from offrl.utils.paths import write_json
from offrl.utils.process import _locked
from offrl.utils.settings import TASK

EVERYTHING = 2**62  # later than any update: a writer of rows that goes on there drops none


def policy_of(run: Path, options: EvalConfig, lane: str | None = None) -> tuple[Agent, DatasetInfo]:
    """A run's policy and what it is played in.

    Args:
        run: the run's folder, or a checkpoint.
        options: as a run's, `env` and what belongs to it included; a `MODULE:ID` is imported.
        lane: the number of one lane, or `best`; all of them without it.

    Raises:
        OffrlError: there is no run, no environment or no such lane.
    """
    agent = load_agent(run)
    if options.env:
        import_environment(options.env)
    info = evaluation_info(dataset_info(run), with_task_of(run, options))
    return (agent if lane is None else agent.lane(lane_named(agent, lane))), info


def evaluate(agent: Agent, info: DatasetInfo, options: EvalConfig) -> Episodes:
    """`options.episodes` episodes of every lane of a policy."""
    with Evaluator(info, agent.spec.lanes, options.workers, options.slots) as evaluator:
        return evaluator.run(agent, options.episodes, options.seed)


def with_task_of(run: Path, options: EvalConfig) -> EvalConfig:
    """The options with what a run took for its task, unless another environment is given; nothing is imported."""
    try:
        kept = _task_of(read_config(run_folder(run)))
    except OffrlError:
        return options
    if options.env and options.env != kept.get("env"):
        return options
    given = {key: value for key in TASK if (value := getattr(options, key)) is not None}
    together = {**(kept.get("env_kwargs") or {}), **(options.env_kwargs or {})}
    return replace(options, **{**kept, **given, "env_kwargs": together or None})


def _task_of(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a run's `eval` that say what its episodes and their scores are, as far as they are of their type; with
    `data.tasks` the lanes have environments of their own."""
    kept, data = config.get("eval"), config.get("data")
    if not isinstance(kept, dict) or (isinstance(data, dict) and data.get("tasks")):
        return {}
    number = int | float
    types: dict[str, Any] = {
        "env": str,
        "env_kwargs": dict,
        "max_episode_steps": int,
        "ref_min": number,
        "ref_max": number,
    }
    return {key: kept[key] for key in TASK if isinstance(kept.get(key), types[key])}


def run_folder(run: Path) -> Path:
    """The run's folder of a checkpoint's file."""
    if not run.is_file():
        return run
    return run.parent.parent if run.parent.name == "checkpoints" else run.parent


def keep(run: Path, options: EvalConfig, seeds: list[int], info: DatasetInfo, played: Episodes) -> str:
    """Append what `evaluate` returned to the run's rows; returns what was done, in a sentence.

    Episodes that are there already (same update, lane and environment seed) are not added twice. Those of another task than
    the run's rows are of (another environment, other arguments of it, time limit or references) are never added: a report
    would mix them.
    """
    import polars as pl

    folder = run_folder(run)
    try:
        config = read_config(folder)
        record: RunRecord = checkpoint.metadata(run if run.is_file() else run / checkpoint.NAME, RunRecord)
        with _locked(folder):
            there = results.read([folder])
            known = set(there["env_id"].drop_nulls().to_list()) if there.height else set()
            envs = {one.env_id for one in lane_infos(info, len(seeds))}
            if known and not envs <= known:
                return f"not kept: the run's rows are of {', '.join(sorted(known))}"
            if known and (other := _other_task(record.info, config, info)):
                return f"not kept: {other}"
            old = there.filter(pl.col("step") == record.step)
            lanes = old.partition_by("lane")
            done = set.intersection(*(set(lane["eval_seed"]) for lane in lanes)) if lanes else set()
            new = [column for column, seed in enumerate(played.seeds) if seed not in done]
            if new:
                _append(folder, config, record, seeds, info, played, new)
                _sum_up(folder, record.step, len(seeds))
            given = any(getattr(options, key) is not None for key in TASK)
            if not known and given and not config.get("online"):  # the next evaluation is of this task, too
                whole = with_task_of(run, options)
                chosen = {key: getattr(whole, key) for key in TASK}
                write_json(folder / "config.json", {**config, "eval": {**(config.get("eval") or {}), **chosen}})
    except OffrlError as error:
        return f"not kept: {error}"
    before = f" ({len(played.seeds) - len(new)} were there)" if len(new) < len(played.seeds) else ""
    return f"{len(new)} new episodes a lane kept in {folder}{before}, where `offrl report` reads them"


def _other_task(recorded: DatasetInfo, config: dict[str, Any], played: DatasetInfo) -> str:
    """What differs between the task of a run's rows and the one that was played; nothing where they are the same.

    Args:
        recorded: the dataset's info in the run's checkpoint.
        config: of the run.
    """
    scored = evaluation_info(recorded, EvalConfig(**_task_of(config)))
    for key in ("env_kwargs", "max_episode_steps", "ref_min", "ref_max"):
        theirs, ours = (json.loads(json.dumps(getattr(one, key), default=str)) for one in (scored, played))
        if theirs != ours:
            return f"the run's rows were scored with {key}={theirs}, these episodes with {ours}"
    return ""


def _append(
    folder: Path,
    config: dict[str, Any],
    record: RunRecord,
    seeds: list[int],
    info: DatasetInfo,
    played: Episodes,
    columns: list[int],
) -> None:
    budget = results.progress(folder).updates
    by_lane = [{"dataset": title(one), "env_id": one.env_id} for one in lane_infos(info, len(seeds))]
    shared = {"run_id": folder.name, "method": config.get("method") or "unknown", "dataset": title(info)}
    run = {**shared, "env_id": info.env_id, "by_lane": by_lane, "updates": budget}
    normalized = None if played.normalized is None else played.normalized[:, columns]
    with results.RunWriter(folder, run, EVERYTHING) as writer:
        writer.episodes(
            record.step,
            seeds,
            played.returns[:, columns],
            played.lengths[:, columns],
            normalized,
            [played.seeds[column] for column in columns],
        )


def _sum_up(folder: Path, step: int, lanes: int) -> None:
    """Make `result.json` the mean of all episodes after the last update."""
    path = folder / "result.json"
    if not path.exists() or step < results.progress(folder).updates:
        return
    if means := lane_means(folder, step, lanes):
        kept = read_json(path, ResultRecord, "remove it, and the same command makes it again")
        write_json(path, {**kept.model_dump(), "step": step, "returns": means[0], "scores": means[1]})


def lane_means(folder: Path, step: int, lanes: int) -> tuple[list[float], list[float] | None] | None:
    """Each lane's mean return and score over a run's episodes at an update; None where a lane has none.

    The scores are None where an episode has none.
    """
    import polars as pl

    rows = results.read([folder]).filter(pl.col("step") == step)
    by_lane = [rows.filter(pl.col("lane") == number) for number in range(lanes)]
    if not all(lane.height for lane in by_lane):
        return None
    returns, scores = (
        [float(np.mean(lane[column].to_numpy())) for lane in by_lane] for column in ("return_raw", "normalized")
    )
    return returns, None if np.isnan(scores).any() else scores
