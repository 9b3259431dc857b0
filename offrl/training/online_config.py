"""The options of the online phase: what a method's table adds to them, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from offrl.agents.base import Agent
from offrl.training.schema import OnlineConfig, TrainConfig
from offrl.utils.errors import OffrlError
from offrl.utils.memory import require_bytes
from offrl.utils.settings import build, target_class, types_in

OF_OPTIMIZERS = ("lr", "weight_decay", "grad_clip")  # last words of settings that an optimiser reads once


def add_table(online: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` (`updates_per_step`, `agent.discount`, `anneal.actor_bc`) unless the user has given it.

    Nothing is added for a run without an online phase.
    """
    if not online.get("steps"):
        return
    group, _, name = key.partition(".")
    if name:
        online[group] = {name: value, **(online.get(group) or {})}
    else:
        online.setdefault(key, value)


def add_all(online: dict[str, Any], always: Any, settings: type[Any], agent: Mapping[str, Any]) -> None:
    """Set what the method's yaml says under `online:`, for all datasets, where nobody has said otherwise.

    Args:
        settings: the method's dataclass of settings. agent: the settings that are given so far.
    """
    try:
        if not isinstance(always, Mapping | None):
            raise OffrlError(f"{always} should be a table of settings, not a single value.")
        flat: dict[str, Any] = {}
        for key, value in (always or {}).items():
            group = isinstance(value, Mapping)
            flat |= (
                {f"online.{key}.{name}": each for name, each in value.items()} if group else {f"online.{key}": value}
            )
        check_row(flat, settings, agent)
    except OffrlError as error:
        raise OffrlError(f"agent.online: {error}") from error
    for key, value in flat.items():
        add_table(online, key.removeprefix("online."), value)


def check_row(row: Mapping[str, Any], settings: type[Any], agent: Mapping[str, Any]) -> None:
    """Raise OffrlError for a wrong `online.` key or value in a row of a method's table.

    Args:
        settings: the method's dataclass of settings. agent: those that are given so far.
    """
    online: dict[str, Any] = {"steps": 1}
    for key, value in row.items():
        add_table(online, key.removeprefix("online."), value)
    checked = build(OnlineConfig, online, "online.")
    if checked.agent or checked.anneal:
        _check_agent(checked, settings, agent)


def check_online(train: TrainConfig, settings: type[Any], agent: Mapping[str, Any], augment: Mapping[str, Any]) -> None:
    """Raise OffrlError unless the options of the online phase make sense together.

    Args:
        settings: the agent's dataclass. agent: resolved settings, with `_target_`. augment: empty without an augmentation.
    """
    online = train.online
    least: dict[str, float] = {"steps": 0, "updates_per_step": 1, "burst": 1}
    least |= dict.fromkeys(("random_steps", "recompute_every", "eval_every", "noise"), 0)
    for key, smallest in least.items():
        if (value := getattr(online, key)) is not None and value < smallest:
            raise OffrlError(f"online.{key}={value} should be at least {smallest}.")
    if not online.steps:
        if online != OnlineConfig():
            raise OffrlError("online.* has no effect without an online phase; give online.steps=N too.")
        return
    if online.random_steps >= online.steps:
        raise OffrlError(f"online.random_steps={online.random_steps} should be below online.steps={online.steps}.")
    if online.offline_share is not None and not 0 <= online.offline_share < 1:
        raise OffrlError(
            f"online.offline_share={online.offline_share:g} should be at least 0 and below 1; null draws from the union."
        )
    cls: type[Agent[Any]] = target_class(agent, Agent, "agent")
    if cls.augmentation:  # it takes rows that the dataset does not hold for a model's, those of the replay too
        raise OffrlError(
            f"online.steps={online.steps}: {cls.__name__} learns from a model's rollouts, which can't be mixed with an online "
            "phase; choose another agent."
        )
    if augment:
        raise OffrlError("augment: synthetic trajectories can't be mixed with an online phase; set augment=none.")
    before, after = _check_agent(online, settings, agent)
    _check_effect(online, cls, after)
    cls.check_online(before, after, online)
    require_bytes(16 * train.lanes * online.steps, f"a replay of online.steps={online.steps} for {train.lanes} lanes")


def _check_agent(online: OnlineConfig, settings: type[Any], agent: Mapping[str, Any]) -> tuple[Any, Any]:
    """The settings before and after the switch: those that change must be the agent's, those that are annealed weights."""
    own = {key: value for key, value in agent.items() if key != "_target_"}
    after = build(settings, {**own, **online.agent}, "online.agent.", per_lane=True)
    types_of = types_in(settings)
    if "normalize_obs" in online.agent:
        raise OffrlError(
            "online.agent.normalize_obs has no effect, since networks go on with the inputs that they know; leave it out, or "
            "set agent.normalize_obs."
        )
    for key, factor in online.anneal.items():
        if types_of.get(key) is not float:
            raise OffrlError(
                f"online.anneal.{key}: {settings.__name__} has no number of this name; see `offrl agents`."
            )
        if key.endswith(OF_OPTIMIZERS):
            raise OffrlError(
                f"online.anneal.{key}: an optimiser keeps the number that it was made with; online.agent.{key}=NUMBER changes "
                "it at the switch."
            )
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise OffrlError(f"online.anneal.{key}={factor} should be a number of at least 0.")
    return build(settings, own, "agent.", per_lane=True), after


def _check_effect(online: OnlineConfig, cls: type[Agent[Any]], after: Any) -> None:
    """Refuse options that an agent with the settings `after` would ignore."""
    if online.noise is not None and not cls.explores_by_noise(after):
        hint = ", or set agent.deterministic=true" if hasattr(after, "deterministic") else ""
        raise OffrlError(
            f"online.noise={online.noise:g} has no effect, since {cls.__name__} explores by samples of its policy; leave it "
            f"out{hint}."
        )
    if online.recompute_every and not getattr(after, "normalize_obs", True):
        raise OffrlError(
            f"online.recompute_every={online.recompute_every} has no effect where {cls.__name__} does not normalise "
            "observations; leave it out, or set agent.normalize_obs=true."
        )


def annealed(factor: float, progress: float) -> float:
    """The multiple of a weight when a share `progress` of the online phase is over.

    max(factor, 1 - progress) for factors up to 1: linear, and constant from where the factor is reached (SPOT, ReBRAC).
    Above 1 it is the reciprocal of that of 1 / factor, so that the weight of what stands against the term falls linearly.
    """
    return max(factor, 1 - progress) if factor <= 1 else 1 / max(1 / factor, 1 - progress)
