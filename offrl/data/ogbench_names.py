"""Ids of OGBench's datasets (Park et al. 2025, arXiv 2410.20092), and what is known of their environments and tasks.

`<environment>-<kind>-v0` is a file of trajectories without any reward; `...-singletask-taskN-v0` is that file with the rewards
of task N, and `...-singletask-v0` of the environment's default task. So one file serves six ids.

`assets/ogbench/tasks.json` has, per environment, the widths of observation, action and `qpos`, the time limit, the default
task and every task's goal; the numbers are those of the package `ogbench` 1.2.2.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from offrl.utils.dataset_names import FORGE_OGBENCH, OGBENCH
from offrl.utils.errors import OffrlError
from offrl.utils.paths import PACKAGE, cache_dir

FAMILY = "ogbench"
BASE = "https://rail.eecs.berkeley.edu/datasets/ogbench/"
FORGE = FORGE_OGBENCH
KINDS = {
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "humanoidmaze": ("navigate", "stitch"),
    "antsoccer": ("navigate", "stitch"),
    **dict.fromkeys(("cube", "scene", "puzzle"), ("play", "noisy")),
}


@dataclass(frozen=True)
class Task:
    """A task's goal; None where it has no such part.

    Attributes:
        xy: place of the agent (or the ball) in a maze. cubes: `[n][3]` places of the cubes. buttons: `[n]` states.
        drawer, window: positions of their joints.
    """

    xy: list[float] | None = None
    cubes: list[list[float]] | None = None
    buttons: list[int] | None = None
    drawer: float | None = None
    window: float | None = None


@dataclass(frozen=True)
class Environment:
    """What is known of an environment.

    Attributes:
        observation, action, qpos: widths. limit: steps of an evaluation episode. default: number of the default task.
        tolerance: radius of a maze's goal, in metres. tasks: goals of tasks 1, 2, ...
    """

    observation: int
    action: int
    qpos: int
    limit: int
    default: int
    tasks: list[Task]
    tolerance: float | None = None


@cache
def environments() -> dict[str, Environment]:
    """Every environment by its name, e.g. `cube-single`."""
    table: dict[str, dict[str, Any]] = json.loads((PACKAGE / "assets" / "ogbench" / "tasks.json").read_text())
    return {
        name: Environment(**{**entry, "tasks": [Task(**goal) for goal in entry["tasks"]]})
        for name, entry in table.items()
    }


@dataclass(frozen=True)
class Name:
    """A dataset id taken apart.

    Attributes:
        environment: e.g. `cube-single`. kind: `play`, `noisy`, `navigate`, ... task: its number; None: no single task.
        validation: whether it is the file of held-out trajectories. prefix: `forge/ogbench/` of a set that was built here.
    """

    environment: str
    kind: str
    task: int | None = None
    validation: bool = False
    prefix: str = ""

    @property
    def file(self) -> str:
        """Name of the file, without its suffix."""
        return f"{self.environment}-{self.kind}-v0{'-val' if self.validation else ''}"

    @property
    def id(self) -> str:
        """The id with the task's number, which reports and tables show."""
        task = "" if self.task is None else f"-singletask-task{self.task}"
        return f"{self.prefix}{self.environment}-{self.kind}{task}-v0{'-val' if self.validation else ''}"

    @property
    def env_id(self) -> str:
        """Gymnasium id of the environment that scores policies, as the package `ogbench` registers it."""
        return f"{self.environment}-singletask-task{self.task}-v0"

    @property
    def goal(self) -> Task:
        assert self.task is not None
        return environments()[self.environment].tasks[self.task - 1]

    def with_task(self, number: int | None) -> Name:
        """The single task `number` (0: the default one); None leaves the id's own.

        Raises:
            OffrlError: no such task, another one than the id names, or none at all.
        """
        known = environments()[self.environment]
        if number is None:
            if self.task is not None:
                return self
            raise OffrlError(
                f"{self.id}: the file has no rewards, and learning for any goal is out of scope; choose a task, as in "
                f"{replace(self, task=known.default).id} or data.task={known.default} (1 to {len(known.tasks)})."
            )
        number = known.default if number == 0 else number
        if not 1 <= number <= len(known.tasks):
            raise OffrlError(f"{self.id}: {self.environment} has tasks 1 to {len(known.tasks)}, not {number}.")
        if self.task not in (None, number):
            raise OffrlError(f"{self.id}: data.task={number} contradicts the id; leave out one of them.")
        return replace(self, task=number)

    def files(self) -> list[Path]:
        """Where the file may lie, first choice first: `OGBENCH_DATASET_DIR`, our cache, the package's own folder."""
        folders = [cache_dir() / "ogbench", Path(os.path.expanduser("~/.ogbench/data"))]
        if folder := os.environ.get("OGBENCH_DATASET_DIR"):
            folders.insert(0, Path(folder).expanduser())
        return [folder / f"{self.file}.npz" for folder in folders]


def parse(text: str) -> Name | None:
    """An id taken apart; None of text that is no id of OGBench's form.

    Raises:
        OffrlError: a dataset of OGBench that is out of scope, or a task that there is not.
    """
    prefix = FORGE if text.startswith(FORGE) else ""
    match = OGBENCH.fullmatch(text.removeprefix(prefix))
    if match is None:
        return None
    environment, kind = match["environment"], match["kind"]
    if environment.startswith("visual-"):
        raise OffrlError(f"{text}: pictures as observations are out of scope; take {text.replace('visual-', '', 1)}.")
    if environment.startswith("powderworld"):
        raise OffrlError(f"{text}: powderworld has pictures as observations, which are out of scope; take another set.")
    if environment not in environments() or kind not in _kinds(environment):
        return None
    name = Name(environment, kind, validation=bool(match["validation"]), prefix=prefix)
    if match["oracle"]:
        raise OffrlError(f"{text}: learning for any goal is out of scope; take {name.with_task(0).id}.")
    return name.with_task(int(match["task"] or 0)) if match["single"] else name


def of_file(path: Path) -> Name | None:
    """What a file's name tells; None where it is no name of OGBench's."""
    return parse(path.name.removesuffix(".npz"))


def _kinds(environment: str) -> tuple[str, ...]:
    kinds = KINDS[environment.partition("-")[0]]
    return kinds[:2] if environment == "antmaze-giant" else kinds


@cache
def names() -> tuple[str, ...]:
    """Every id with the default task; `-singletask-taskN-` in place of `-singletask-` names another."""
    return tuple(f"{name}-{kind}-singletask-v0" for name in environments() for kind in _kinds(name))
