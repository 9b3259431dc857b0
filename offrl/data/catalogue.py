"""Dataset ids, where they lie, which environment evaluates them, and the returns that score 0 and 100.

`tables/d4rl.csv` holds every id that D4RL registers, `tables/minari.csv` Minari's public ids, `tables/references.csv`
reference returns per Gymnasium environment and where they come from.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from offrl.data.dataset import DatasetInfo
from offrl.data.ogbench_names import names as ogbench_ids
from offrl.data.ogbench_names import parse
from offrl.utils.dataset_names import D4RL_MIXTURE
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import cache_dir

TABLES = Path(__file__).parent / "tables"
MINARI_ID = re.compile(r"(hf://)?\w[\w.-]*(/\w[\w.-]*)*-v\d+")  # no part begins with a dot: no way out of the folder
GYM_MUJOCO = (
    *("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid", "HumanoidStandup", "Swimmer", "Reacher", "Pusher"),
    *("InvertedPendulum", "InvertedDoublePendulum"),
)

# How the names of environments begin: their family.
FAMILIES = {
    "AntMaze": "antmaze",
    "PointMaze": "maze2d",
    "AdroitHand": "adroit",
    "FrankaKitchen": "kitchen",
    "MiniGrid": "minigrid",
    "BabyAI": "minigrid",
    "ALE/": "atari",
}

# How the ids of D4RL's tasks begin that are no environment of Gymnasium's (`offrl/envs/adapters.py` makes most of one).
OWN_TASKS = ("pen-", "ant-", "antmaze-", "maze2d-", "kitchen-")
TASK_OF = "task_of"  # key of provenance: the D4RL set of whose task a dataset of another id is

# Ids with the task's and the level's name in them, and the version of the D4RL sets that have both.
NAMESAKES = {
    r"forge/(hopper|halfcheetah|walker2d)/([\w.-]+)-v\d+": "v2",
    r"D4RL/(antmaze)/([\w-]+)-v\d+": "v2",
    r"D4RL/(pen|door|hammer|relocate)/([\w-]+)-v\d+": "v1",
    r"D4RL/(kitchen)/([\w-]+)-v\d+": "v0",
}


@dataclass(frozen=True)
class D4RLEntry:
    """One D4RL id.

    Attributes:
        url: where its file is published. env_id: Gymnasium id nearest to its environment; None when there is none.
        ref_min, ref_max: returns of a random and an expert policy (D4RL's infos.py); None when unknown.
        max_episode_steps: the time limit with which D4RL registers it.
    """

    id: str
    family: str
    url: str
    ref_min: float | None
    ref_max: float | None
    env_id: str | None
    max_episode_steps: int

    @property
    def filename(self) -> str:
        """Name under which D4RL itself stores the file."""
        return PurePosixPath(self.url).name

    def files(self) -> list[Path]:
        """Where the file may lie, first choice first: `D4RL_DATASET_DIR`, our cache, D4RL's own folder."""
        own = cache_dir() / "d4rl" / f"{self.id}.hdf5"
        default = Path(os.path.expanduser("~/.d4rl/datasets")) / self.filename  # stays as it is without a home
        if folder := os.environ.get("D4RL_DATASET_DIR"):
            base = Path(folder).expanduser()
            return [base / f"{self.id}.hdf5", base / self.filename, own, default]
        return [own, default]

    def info(self) -> DatasetInfo:
        """What the catalogue knows, as a dataset carries it."""
        return DatasetInfo(
            id=self.id,
            source="d4rl",
            env_id=self.env_id,
            family=self.family,
            ref_min=self.ref_min,
            ref_max=self.ref_max,
            max_episode_steps=self.max_episode_steps,
            provenance={
                **({} if self.ref_min is None else {"references": "D4RL (infos.py)"}),
                **({TASK_OF: self.id} if self.id.startswith(OWN_TASKS) else {}),
            },
        )


@dataclass(frozen=True)
class MinariEntry:
    """One Minari id: its environment, size, time limit for evaluation, spaces in words, and what to mind."""

    id: str
    env_id: str | None
    steps: int
    episodes: int
    max_episode_steps: int | None
    observation: str
    action: str
    note: str


def _table(name: str) -> list[dict[str, str]]:
    with open(TABLES / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def d4rl() -> dict[str, D4RLEntry]:
    """Every D4RL id with its entry."""
    return {
        row["id"]: D4RLEntry(
            id=row["id"],
            family=row["family"],
            url=row["url"],
            ref_min=float(row["ref_min"]) if row["ref_min"] else None,
            ref_max=float(row["ref_max"]) if row["ref_max"] else None,
            env_id=row["env_id"] or None,
            max_episode_steps=int(row["max_episode_steps"]),
        )
        for row in _table("d4rl.csv")
    }


@cache
def minari() -> dict[str, MinariEntry]:
    """Minari's public ids with their entries."""
    return {
        row["id"]: MinariEntry(
            id=row["id"],
            env_id=row["env_id"] or None,
            steps=int(row["steps"] or 0),
            episodes=int(row["episodes"] or 0),
            max_episode_steps=int(row["max_episode_steps"]) if row["max_episode_steps"] else None,
            observation=row["observation"],
            action=row["action"],
            note=row["note"],
        )
        for row in _table("minari.csv")
    }


@cache
def _references() -> dict[str, tuple[float, float, str]]:
    return {
        row["env_id"]: (float(row["ref_min"]), float(row["ref_max"]), row["source"]) for row in _table("references.csv")
    }


def environment_references(env_id: str) -> tuple[float, float, str] | None:
    """Returns of a random and an expert policy in a Gymnasium environment, and where they come from."""
    return _references().get(env_id.rsplit(":", 1)[-1])


def reference_scores(dataset_or_env: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100 for a D4RL id, a Minari id or a Gymnasium environment id; None when unknown."""
    if entry := d4rl().get(dataset_or_env):
        return None if entry.ref_min is None or entry.ref_max is None else (entry.ref_min, entry.ref_max)
    listed = minari().get(dataset_or_env)
    references = environment_references((listed.env_id or "") if listed else dataset_or_env)
    return references[:2] if references else None


def family_of(env_id: str | None) -> str:
    """Family of a Gymnasium environment, for per-family settings; `unknown` when it is none of ours."""
    name = (env_id or "").rsplit(":", 1)[-1]
    base = name.rsplit("-v", 1)[0]
    if base in GYM_MUJOCO:
        return "gym-mujoco"
    return next((family for start, family in FAMILIES.items() if name.startswith(start)), "unknown")


def check_family(family: str) -> None:
    """Raise OffrlError, with the nearest known one, for a family that no dataset of the catalogue or the forge has."""
    known = {entry.family for entry in d4rl().values()} | set(FAMILIES.values())
    known |= {"gym-mujoco", "noisy-mujoco", "ogbench", "tabular", "unknown"}
    if family not in known:
        close = difflib.get_close_matches(family.lower(), known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
        raise OffrlError(f"family={one_line(family)} is no family of datasets; {hint}")


def names_environment(dataset: str) -> bool:
    """Whether a dataset's id tells of an environment; a file, a folder, and data in memory may name none."""
    if entry := d4rl().get(dataset) or minari().get(dataset):
        return entry.env_id is not None
    return dataset.startswith("forge/") or bool(parse(dataset) or D4RL_MIXTURE.fullmatch(dataset))


def entry_of_file(path: Path) -> D4RLEntry | None:
    """The D4RL id that a file holds, by its name (`hopper-medium-v2.hdf5` or D4RL's `hopper_medium-v2.hdf5`)."""
    name = path.name.removesuffix(".gz")
    stem = name.rsplit(".", 1)[0]
    if stem in d4rl():
        return d4rl()[stem]
    same = [entry for entry in d4rl().values() if entry.filename == name]
    return same[0] if len(same) == 1 else None


def d4rl_task(info: DatasetInfo) -> str | None:
    """The D4RL set of whose task a dataset is, by its id or its provenance; None where a plain environment has the task."""
    named = [str(name) for name in (info.id, info.provenance.get(TASK_OF))]
    return next((name for name in named if name.startswith(OWN_TASKS) and name in d4rl()), None)


def namesake(dataset: str) -> str | None:
    """The D4RL set whose published settings a dataset takes: `hopper-medium-v2` for `forge/hopper/medium-v0`.

    The forge's robots, and Minari's AntMaze, Adroit and kitchen sets (`D4RL/pen/human-v2`), of any version, have one where D4RL
    has such a set. Minari's point mazes have none: their episodes end at the goal, D4RL's go on.
    """
    for pattern, version in NAMESAKES.items():
        if match := re.fullmatch(pattern, dataset):
            name = f"{match[1]}-{match[2]}-{version}"
            return name if name in d4rl() else None
    return None


def info_of_file(path: Path) -> DatasetInfo:
    """What a file's name tells: the catalogue's entry of exactly that id or file name, else an id and nothing more."""
    entry = entry_of_file(path)
    return entry.info() if entry else DatasetInfo(id=path.name.split(".")[0])


def near(name: str, more: Iterable[str] = ()) -> list[str]:
    """Up to three known ids that look like `name`."""
    known = [*d4rl(), *minari(), *ogbench_ids(), *more]
    return difflib.get_close_matches(name, known, n=3, cutoff=0.6)


def unknown(name: str, more: Iterable[str] = ()) -> OffrlError:
    """The error for a name that is no dataset, with the nearest known ones; `more`: ids beside the catalogue's."""
    close = near(name, more)
    if not close and MINARI_ID.fullmatch(name) and "/" in name:
        return OffrlError(f"{name}: not on this machine; if Minari has it, get it with `offrl data fetch {name}`.")
    hint = f"did you mean {' or '.join(close)}?" if close else "`offrl data list` shows the known ones."
    return OffrlError(f"{name}: no such dataset or file; {hint}")


def flat_keys(env_id: str, keys: Iterable[str]) -> list[str]:
    """Keys of a Dict observation that are concatenated into the flat vector, in order.

    D4RL's mazes have a fixed goal that is no part of the observation. AntMaze's position stands under
    `achieved_goal` and not in `observation`; PointMaze repeats its position there. Every other environment is
    concatenated in alphabetical order of its keys.

    Args:
        env_id: Gymnasium id, e.g. `AntMaze_UMaze-v5`; only its name is looked at.
        keys: keys of the observation space.
    """
    available, name = set(keys), env_id.rsplit("/", 1)[-1].lower()
    if name.startswith("antmaze"):
        wanted = ["achieved_goal", "observation"]
    elif name.startswith("pointmaze"):
        wanted = ["observation"]
    else:
        return sorted(available)
    return wanted if available.issuperset(wanted) else sorted(available)
