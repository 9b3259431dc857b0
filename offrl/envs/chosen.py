"""The environment that a user chooses for evaluation: `eval.env=ID`, `eval.env=MODULE:ID`, or a function in Python.

What the user types may be imported; what a file names never is. A function gets an id of its own in Gymnasium's registry, so
that everything behind it knows environments by their ids alone.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from offrl.data.catalogue import d4rl_task, environment_references
from offrl.data.dataset import RECORDED_MAZE, DatasetInfo
from offrl.utils.advice import option
from offrl.utils.errors import OffrlError, one_line

PYTHON = "python/"  # namespace of the ids of functions
CHOSEN = "environment"  # key of a dataset's provenance: how its environment was chosen
BY_USER = "chosen for evaluation"
TESTED = ("gymnasium", "gymnasium_robotics", "offrl", "ogbench")  # their environments keep Gymnasium's interface
NO_ID = re.compile(r"\.py$|^[\w/\\]+(\.\w+)+$")  # a file, or a dotted name; ids end in -v0 and the like

# What this process was told to import, and the functions that it was given: evaluation processes that begin with a fresh
# interpreter need them, too.
_modules: list[str] = []
_functions: dict[str, Callable[..., Any]] = {}


def import_environment(name: str) -> None:
    """Import the module of `MODULE:ID`, which registers the environment; nothing of a plain id.

    ID may also name a class or function of the module, which then makes the environment.

    Raises:
        OffrlError: the module can't be imported, or neither registers nor holds ID.
    """
    module, _, plain = name.rpartition(":")
    if not plain or module.endswith(".py") or (not module and name not in gymnasium.registry and NO_ID.search(name)):
        advice = option("eval.env", f"{_module_in(module or plain)}:ID")
        raise OffrlError(f"{name}: name the environment behind its module and a colon: {advice}.")
    if not module:
        return
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last, so that a user's `random.py` replaces nobody's `random`
    before = set(gymnasium.registry)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # the module is the user's own: anything may happen
        reason = one_line(f"{type(error).__name__}: {error}")
        raise OffrlError(
            f"{name}: the module {module} can't be imported ({reason}); check its name and folder."
        ) from error
    if module not in _modules:
        _modules.append(module)
    if plain in gymnasium.registry:
        return
    if callable(getattr(loaded, plain, None)):
        try:
            gymnasium.register(plain, entry_point=f"{module}:{plain}")
        except gymnasium.error.Error as error:
            raise OffrlError(
                f"{name}: {one_line(error)}; name the environment by the id that is registered."
            ) from error
        return
    new = sorted(set(gymnasium.registry) - before)
    there = f"it registers {', '.join(new)}" if new else "call gymnasium.register in it"
    raise OffrlError(f"{name}: the module {module} has no environment {one_line(plain)}; {there}.")


def _module_in(name: str) -> str:
    """The module that a path or a dotted name tells: `my_envs.cart` of `my_envs/cart.py` and of `my_envs.cart.Cart`."""
    dotted = re.sub(r"[/\\]+", ".", name.removesuffix(".py")).strip(".")
    return re.sub(r"\.[A-Z]\w*$", "", dotted)


def give_function(make: Callable[..., Any]) -> str:
    """The id in Gymnasium's registry under which a function's environments are made from now on."""
    text = f"{getattr(make, '__module__', '')}.{getattr(make, '__qualname__', type(make).__qualname__)}"
    name = PYTHON + re.sub(r"[^\w.-]+", "", text.removeprefix("__main__."))
    _functions[name] = make
    gymnasium.registry.pop(name, None)  # an earlier function of this name
    gymnasium.register(name, entry_point=make)
    return name


def given_to(method: str, env_ids: Iterable[str | None]) -> tuple[list[str], dict[str, Callable[..., Any]]]:
    """What `give` needs in another process, which makes environments of these ids.

    Args:
        method: how the process starts: fork, forkserver or spawn.

    Raises:
        OffrlError: the function behind one of the ids can't be sent to a fresh interpreter.
    """
    if method == "fork":  # it has them already, and can have functions that can't be sent
        return [], {}
    functions = {name: _functions[name] for name in env_ids if name in _functions}
    for name, make in functions.items():
        check_sendable(name, make)
    return list(_modules), functions


def check_sendable(name: str, make: Callable[..., Any]) -> None:
    """Raise OffrlError unless a process with a fresh interpreter can have a function that makes environments."""
    try:
        reason = "" if b"__main__" not in bytes(ForkingPickler.dumps(make)) else _no_main()
    except Exception as error:  # an object of the user's may raise anything
        reason = one_line(error)
    if reason:
        raise OffrlError(
            f"{name}: with a GPU in use environments are made in a fresh process, to which this function can't be sent "
            f"({reason}); define it at the top of a module that can be imported, or name its environment "
            f"({option('eval.env', 'MODULE:ID')}), or evaluate in this process: eval.workers=1 eval.asynchronous=false."
        )


def _no_main() -> str:
    """Why a fresh interpreter lacks what the main program defines; nothing where it reads the same file."""
    main = sys.modules["__main__"]
    has_source = getattr(main, "__file__", None) or getattr(main, "__spec__", None)
    return "" if has_source else "it is defined at a prompt or in a notebook"


def give(modules: list[str], functions: dict[str, Callable[..., Any]]) -> None:
    """Import and register in this process what another one has; nothing where it was forked."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            # The module itself is gone; whoever needs an environment of it says so.
    _modules.extend(module for module in modules if module not in _modules)
    _functions.update(functions)
    for name, make in functions.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=make)


def with_environment(
    info: DatasetInfo,
    env: str | None = None,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    references: tuple[float | None, float | None] = (None, None),
) -> DatasetInfo:
    """`info` with the environment, time limit and reference returns that a user gives; what is None stays as it is.

    Args:
        env: an id of Gymnasium's, `MODULE:ID` included; its own time limit goes before the dataset's.
        env_kwargs: arguments of the environment; without `env` they are added to the dataset's.

    Raises:
        OffrlError: arguments or a limit without an environment, one reference without the other, two of which the first is
            not below the second, or that are not finite.
    """
    ref_min, ref_max = references
    if (ref_min, ref_max) != (None, None) and not _spans(ref_min, ref_max):
        raise OffrlError(
            f"eval.ref_min={ref_min} and eval.ref_max={ref_max} are the returns that score 0 and 100; give two numbers, the "
            "larger one for 100."
        )
    if not env and info.env_id is None and (env_kwargs or max_episode_steps):
        key = "env_kwargs" if env_kwargs else "max_episode_steps"
        raise OffrlError(f"eval.{key}: the dataset {info.id} names no environment; give eval.env=ID as well.")
    changes: dict[str, Any] = {}
    if env:
        same = env == info.env_id
        kwargs = (info.env_kwargs if same else {}) | (env_kwargs or {})
        limit = max_episode_steps or (None if _own_limit(env) and not same else info.max_episode_steps)
        provenance = info.provenance | {CHOSEN: BY_USER}
        changes = {"env_id": env, "env_kwargs": kwargs, "max_episode_steps": limit, "provenance": provenance}
        if ref_min is None and info.ref_min is None and (known := environment_references(env.rpartition(":")[2])):
            changes |= {"ref_min": known[0], "ref_max": known[1]}
    elif env_kwargs:
        changes["env_kwargs"] = info.env_kwargs | env_kwargs
    if max_episode_steps:
        changes["max_episode_steps"] = max_episode_steps
    if ref_min is not None:
        changes |= {"ref_min": ref_min, "ref_max": ref_max}
    return replace(info, **changes) if changes else info


def _spans(ref_min: float | None, ref_max: float | None) -> bool:
    """Whether two references are a scale."""
    if ref_min is None or ref_max is None:
        return False
    return math.isfinite(ref_min) and math.isfinite(ref_max) and ref_min < ref_max


def is_chosen(info: DatasetInfo) -> bool:
    """Whether a user chose the environment, so that no adapter of the dataset's own family belongs to it."""
    return info.provenance.get(CHOSEN) == BY_USER


def adapted_task(info: DatasetInfo) -> str | None:
    """The D4RL set whose own task is played with a dataset; None where a plain environment has it, or a user chose another."""
    return None if is_chosen(info) else d4rl_task(info)


def check_interface(info: DatasetInfo, env: Any) -> None:
    """Play the first step of a user's environment: what is wrong with it would end a training at its first evaluation, or
    make false scores.

    Raises:
        OffrlError: `reset` or `step` fails, or what they give isn't what Gymnasium's interface says.
    """
    known = type(env.unwrapped).__module__.partition(".")[0] in TESTED
    if known and not info.env_kwargs:  # arguments it may take without a word, and fail by
        return
    name = info.env_id or "the environment"
    try:
        begun = env.reset(seed=0)
        if not (isinstance(begun, tuple) and len(begun) == 2 and isinstance(begun[1], dict)):
            raise OffrlError(f"{name}: its reset has to give (observation, info), where info is a dictionary.")
        env.action_space.seed(0)
        action = env.action_space.sample()
        done = env.step(action if np.ndim(action) else int(action))
        if not (isinstance(done, tuple) and len(done) == 5 and isinstance(done[4], dict)):
            raise OffrlError(f"{name}: its step has to give (observation, reward, terminated, truncated, info).")
        shapes = [np.shape(begun[0]), np.shape(done[0])]
        if wrong := [shape for shape in shapes if shape != env.observation_space.shape]:
            raise OffrlError(
                f"{name}: it gives an observation of shape {list(wrong[0])}, and its observation_space has shape "
                f"{list(env.observation_space.shape)}; correct one of them."
            )
        if any(np.ndim(value) or value is None for value in done[1:4]):
            raise OffrlError(f"{name}: its step has to give a single number as reward, and True or False as ends.")
    except OffrlError:
        raise
    except Exception as error:  # the environment is the user's own: anything may happen
        place = traceback.extract_tb(error.__traceback__)[-1]
        advice = "it has to follow gymnasium.Env: reset(seed=None, options=None), step(action)"
        if known:
            advice = f"check env_kwargs={one_line(info.env_kwargs)}"
        raise OffrlError(
            f"{name}: its first step fails ({one_line(f'{type(error).__name__}: {error}')}; {Path(place.filename).name}, line "
            f"{place.lineno}); {advice}."
        ) from error


def warn_of_no_limit(info: DatasetInfo, env: Any) -> None:
    """Warn where nothing ends an episode but the environment itself: an evaluation might never end."""
    limit = info.max_episode_steps or (env.spec.max_episode_steps if env.spec else None)
    if is_chosen(info) and limit is None:
        warnings.warn(
            f"{info.env_id} has no time limit; if its episodes may go on for ever, give eval.max_episode_steps=N.",
            stacklevel=4,
        )


def warn_of_other_maze(info: DatasetInfo) -> None:
    """Warn where an online phase learns in a maze whose walls are not those of the dataset's, as in Minari's AntMaze umaze."""

    def walls(maze: Any) -> list[list[bool]] | None:
        rows = maze if isinstance(maze, list) and all(isinstance(row, list) for row in maze) else None
        return None if rows is None else [[cell == 1 for cell in row] for row in rows]

    recorded, here = (walls(maze) for maze in (info.provenance.get(RECORDED_MAZE), info.env_kwargs.get("maze_map")))
    if None not in (recorded, here) and recorded != here:
        choice = option("eval.env_kwargs.maze_map", re.sub("[' ]", "", str(info.provenance[RECORDED_MAZE])))
        warnings.warn(
            f"{info.id}: its episodes are of a maze with other walls than the one that scores policies, in which the online "
            f"phase learns; to learn and score in the dataset's, give {choice}.",
            stacklevel=4,
        )


def warn_of_other_bounds(info: DatasetInfo, env: Any) -> None:
    """Warn where a chosen environment's actions have another range than the dataset's, within which a policy acts."""
    space = env.action_space
    if not is_chosen(info) or not isinstance(space, gymnasium.spaces.Box) or not space.is_bounded():
        return
    ours, theirs = (info.action_low, info.action_high), (space.low, space.high)
    if not all(np.allclose(a, b) for a, b in zip(ours, theirs)):
        bounds = f"{option('data.action_low', 'LOW')}, {option('data.action_high', 'HIGH')}"
        warnings.warn(
            f"{info.env_id} takes actions from {space.low.min():g} to {space.high.max():g}, and the policy acts from "
            f"{np.min(info.action_low):g} to {np.max(info.action_high):g}, as the dataset. If the data has the environment's "
            f"own actions, give their bounds ({bounds}); if it has scaled ones, choose an environment that takes those "
            "(gymnasium.wrappers.RescaleAction).",
            stacklevel=4,
        )


def _own_limit(env: str) -> int | None:
    spec = gymnasium.registry.get(env.rpartition(":")[2])
    return spec.max_episode_steps if spec else None
