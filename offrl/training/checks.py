"""What is refused of a run's options before any data is loaded, whatever the method."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import gymnasium

from offrl.agents.base import Agent
from offrl.data.checks import float32
from offrl.envs.chosen import import_environment
from offrl.envs.registered import make_gymnasium
from offrl.training.schema import DataConfig, TrainConfig
from offrl.utils.errors import OffrlError
from offrl.utils.memory import require_bytes

MOST_LANES = 65_536  # each has random generators of its own, which are made one by one


def check_train(train: TrainConfig) -> None:
    """Raise OffrlError for numbers that are out of range, alone or beside each other."""
    if not train.dataset:
        raise OffrlError("dataset is empty; name one with dataset=ID, `offrl data list` shows the known ones.")
    positive = ("batch_size", "lanes", "updates_per_launch", "log_every", "checkpoint_every", "threads")
    least = dict.fromkeys(positive, 1) | {"eval.workers": 1, "eval.slots": 1}
    least["updates"] = 0 if train.online.steps else 1
    least["eval.max_episode_steps"] = 1
    least |= dict.fromkeys(("eval.every", "eval.episodes", "eval.final_episodes", "eval.seed"), 0)
    for key, smallest in least.items():
        value = attrgetter(key)(train)
        if value is not None and value < smallest:
            raise OffrlError(f"{key}={value} should be at least {smallest}.")
    for key in ("reward_scale", "reward_shift"):
        if not math.isfinite(float32(value := getattr(train.data, key))):
            raise OffrlError(f"data.{key}={value:g} should be finite as float32.")
    _check_sizes(train)
    if train.eval.asynchronous and train.online.steps:
        raise OffrlError(
            "eval.asynchronous=true goes with offline updates alone, since an online phase steps environments itself; give "
            "eval.asynchronous=false."
        )
    if any(not -(2**63) <= seed < 2**63 for seed in train.lane_seeds()):
        raise OffrlError("a seed should be a number of at most 63 bits.")
    if train.seeds and len(train.seeds) != train.lanes:
        if train.lanes != 1:
            raise OffrlError(f"seeds has {len(train.seeds)} values for lanes={train.lanes}; give one per lane.")
        train.lanes = len(train.seeds)


def check_tasks(train: TrainConfig, sampler: Mapping[str, Any], augmented: bool) -> None:
    """Raise OffrlError where a task for each lane does not go with the other settings."""
    tasks = train.data.tasks
    if tasks is None:
        return
    if train.data.task is not None:
        raise OffrlError("data.task is one task for all lanes, data.tasks one for each; leave out one of them.")
    if train.data.flicker:
        raise OffrlError(
            f"data.flicker={train.data.flicker:g} loses other observations in each task, and data.tasks has one copy of them "
            "for all lanes; train one task at a time with data.task."
        )
    if train.eval.env:
        raise OffrlError("data.tasks has an environment for each lane; leave out eval.env.")
    if train.online.steps:
        raise OffrlError(
            "data.tasks has an environment for each lane, and an online phase steps one environment in all of them; train one "
            "task at a time with data.task."
        )
    if len(tasks) != train.lanes:
        raise OffrlError(f"data.tasks={tasks} has {len(tasks)} tasks for lanes={train.lanes}; give one per lane.")
    if augmented or not str(sampler["_target_"]).endswith(".Uniform"):
        raise OffrlError(
            "data.tasks goes with sampler=uniform and without an augmentation, since each lane has rewards of its own; train "
            "one task at a time with data.task."
        )


def check_rewards(data: DataConfig, cls: type[Agent[Any]], name: str) -> None:
    """Raise OffrlError where an agent would compare returns of transformed rewards with the environment's own rewards."""
    usual = DataConfig()
    for key in ("reward_scale", "reward_shift", "reward_normalize"):
        value = getattr(data, key)
        if cls.predicted_return is not Agent.predicted_return and value != getattr(usual, key):
            raise OffrlError(
                f"data.{key}={value}: {name} is conditioned on returns, or predicts them, in units of the environment's "
                "rewards, which it meets when it acts; leave the option out."
            )


def _check_sizes(train: TrainConfig) -> None:
    """Raise OffrlError for numbers that no machine can serve, before anything of that size is made."""
    most = max(256, 4 * (os.cpu_count() or 1))
    for key in ("threads", "eval.workers"):
        if (value := attrgetter(key)(train) or 1) > most:
            raise OffrlError(f"{key}={value} is more than {most}; this machine has {os.cpu_count()} cores.")
    if train.updates_per_launch > 10_000:
        raise OffrlError(f"updates_per_launch={train.updates_per_launch} should be at most 10000.")
    lanes = len(train.seeds) if train.seeds else train.lanes
    # Of a row its number, reward, end, and a number each of observation, action and successor; of an episode as much.
    require_bytes(32 * lanes * train.batch_size, f"lanes={lanes} with batch_size={train.batch_size}")
    if lanes > MOST_LANES:
        raise OffrlError(f"lanes={lanes} should be at most {MOST_LANES}; share the seeds out among several runs.")
    for key in ("eval.episodes", "eval.final_episodes", "eval.slots"):
        if value := attrgetter(key)(train):
            require_bytes(32 * value * (1 if key == "eval.slots" else lanes), f"{key}={value}")


def check_environment(train: TrainConfig) -> None:
    """Import the module that `eval.env` names, and refuse an id that nobody knows.

    Where episodes are played, the environment is made soon, and says so itself.

    Raises:
        OffrlError: the module can't be imported, or nothing registers the id.
    """
    options = train.eval
    if not options.env:
        return
    import_environment(options.env)
    played = options.final_episodes or (options.episodes and options.every) or train.online.steps
    if played or options.env.rpartition(":")[2] in gymnasium.registry:
        return
    try:
        make_gymnasium(options.env, **(options.env_kwargs or {})).close()
    except OffrlError as error:
        if isinstance(error.__cause__, gymnasium.error.UnregisteredEnv):
            raise  # any other error is one of playing, which nobody does
