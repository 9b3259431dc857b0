"""Ids of forge datasets: which there are, what their parts mean, and where a dataset lies."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from offrl.envs import TABULAR_IDS
from offrl.forge import mazes, noisy, ogbench, tabular
from offrl.forge.robots import LEVELS, MIXTURES, REPLAY_V1, ROBOTS
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

DEFAULT_SIZE = 100_000  # a tenth of D4RL's sets: seconds to build, and enough to tell methods apart
PREFIX, SUFFIX = "forge/", "-v0"


def names() -> list[str]:
    """The ids that `ensure` can build; finite tasks and noisy robots can have other numbers in theirs."""
    robots = [f"{robot}/{level}" for robot in ROBOTS for level in (*LEVELS, *MIXTURES)]
    replays = [f"{PREFIX}{robot}/{REPLAY_V1}" for robot, spec in ROBOTS.items() if spec.replay]
    pointmaze = [f"pointmaze/{maze}{kind}" for maze in mazes.MAZES for kind in ("", "-dense")]
    first = [
        f"{PREFIX}{name}{SUFFIX}" for name in (*robots, *pointmaze, *noisy.names(), *tabular.names(), *ogbench.names())
    ]
    return first + replays


def family(name: str) -> str:
    """Family of a forge dataset."""
    subject = name.removeprefix(PREFIX).split("/")[0]
    if subject in TABULAR_IDS:
        return "tabular"
    if subject.startswith("noisy-"):
        return "noisy-mujoco"
    return {"pointmaze": "maze2d", "ogbench": "ogbench"}.get(subject, "gym-mujoco")


def folder_of(name: str, size: int | None = None, seed: int = 0) -> Path:
    """Where a dataset lies; a size or seed other than the default is part of the name. OGBench's sets are NPZ files."""
    folder = cache_dir() / minari_id(known(name), size, seed)
    return folder.with_name(f"{folder.name}.npz") if family(name) == "ogbench" else folder


def known(name: str) -> str:
    """The name itself, if the forge can build it.

    Raises:
        OffrlError: it cannot; with the nearest names that it can.
    """
    if name in names() or recipe_of(name):
        return name
    close = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`offrl data list` shows the known ones."
    raise OffrlError(f"{name}: the forge can't build that; {hint}")


def subject_and_level(name: str) -> tuple[str, str]:
    """The two parts of `forge/subject/level-v0`; the level of `medium-replay-v1` keeps its version."""
    subject, _, level = name.removeprefix(PREFIX).removesuffix(SUFFIX).partition("/")
    return subject, level


def sources_of(name: str) -> list[str]:
    """The good and the bad dataset that a mixture such as `forge/hopper/random-expert-0.1-v0` is drawn from, else none."""
    subject, level = subject_and_level(name)
    match = re.fullmatch(r"random-(medium|expert)-[\d.]+", level)
    return [f"{PREFIX}{subject}/{source}{SUFFIX}" for source in (match[1], "random")] if match else []


def recipe_of(name: str) -> tabular.Recipe | noisy.Recipe | None:
    """The recipe of a finite task or a noisy robot, whose ids hold numbers; None of any other dataset."""
    if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
        return None
    inner = "/".join(subject_and_level(name))
    return tabular.recipe(inner) or noisy.recipe(inner)


def minari_id(name: str, size: int | None, seed: int) -> str:
    """The id under which Minari knows the set (it allows no dot), with a size or seed that is not the default."""
    usual = size is None or (size == DEFAULT_SIZE and not isinstance(recipe_of(name), tabular.Recipe))
    options = ("" if usual else f"-n{size}") + (f"-s{seed}" if seed else "")
    stem, number = name.rsplit("-v", 1)
    return f"{stem.replace('.', '_')}{options}-v{number}"
