"""The forge: D4RL-like datasets made on the spot from policies that ship with the package, as Minari datasets.

Same id, size and seed give the same bytes on the same machine with the same versions of MuJoCo, NumPy and PyTorch
(another processor may round the policies' matrix products differently).

Robots (`forge/hopper/medium-v0`): Gymnasium's v5 Hopper, Walker2d and HalfCheetah with a time limit of 1000.
`random` takes uniform actions; `medium` and `expert` are our own SAC policies with their own exploration noise;
`medium-expert` is half and half; `medium-replay` replays the training up to `medium`, its `-v1` (Hopper and Walker2d)
up to a later policy. Scores use D4RL's reference returns. Mixtures (`forge/hopper/random-expert-0.1-v0`) hold a small
share of good trajectories among random ones.
Mazes (`forge/pointmaze/umaze-v0`, `...-dense-v0`): see `offrl.forge.mazes`.
Robots with unseen noise (`forge/noisy-hopper/medium-replay-s0.2-v0`): see `offrl.forge.noisy`.
Finite stochastic tasks (`forge/bandit/p0.1-v0`, `forge/lake/p0.7-eps0.4-n1000-v0`): see `offrl.forge.tabular`.
"""

from __future__ import annotations

import difflib
import glob
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import gymnasium
import numpy as np
import torch

from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.minari import read_metadata, read_minari
from offrl.data.minari_write import Episode, box, discrete, write_minari
from offrl.data.mixtures import build_mixture
from offrl.envs import TABULAR_IDS
from offrl.forge import mazes as pointmaze
from offrl.forge import noisy
from offrl.forge import tabular as stochastic
from offrl.forge.rollout import (
    TIME_LIMIT,
    Part,
    Robots,
    behavior_levels,
    behavior_policy,
    one_thread,
    rollout,
    uniform_policy,
)
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir, one_at_a_time, remove_torn

DEFAULT_SIZE = 100_000  # a tenth of D4RL's sets: seconds to build, and enough to tell methods apart
PREFIX, SUFFIX = "forge/", "-v0"
REPLAY_WARMUP = 5_000  # steps of uniform actions with which the policies' training began
SHARES = ("0.01", "0.05", "0.1", "0.5")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Robot:
    """A robot: environment, levels (training steps) of its medium and expert policies, D4RL's reference returns.

    `replay` is the level at which `medium-replay-v1` ends; None where `-v0` has the spread of D4RL's returns.
    """

    env_id: str
    medium: int
    expert: int
    ref_min: float
    ref_max: float
    replay: int | None = None
    note: str = ""


ROBOTS = {
    "hopper": Robot("Hopper-v5", 180_000, 360_000, -20.272305, 3234.3, replay=260_000),
    "walker2d": Robot("Walker2d-v5", 200_000, 360_000, 1.629008, 4592.3, replay=260_000),
    "halfcheetah": Robot(
        *("HalfCheetah-v5", 160_000, 280_000, -280.178953, 12135.0),
        note="The expert reaches about 6,900 (a score of 59), far below D4RL's reference of 12,135.",
    ),
}
LEVELS = ("random", "medium", "expert", "medium-expert", "medium-replay")
REPLAY_V1 = "medium-replay-v1"
MIXTURES = tuple(f"random-{good}-{share}" for good in ("medium", "expert") for share in SHARES)


def names() -> list[str]:
    """The ids that `ensure` can build; finite tasks and noisy robots can have other numbers in theirs."""
    robots = [f"{robot}/{level}" for robot in ROBOTS for level in (*LEVELS, *MIXTURES)]
    replays = [f"{PREFIX}{robot}/{REPLAY_V1}" for robot, spec in ROBOTS.items() if spec.replay]
    mazes = [f"pointmaze/{maze}{kind}" for maze in pointmaze.MAZES for kind in ("", "-dense")]
    first = [f"{PREFIX}{name}{SUFFIX}" for name in (*robots, *mazes, *noisy.names(), *stochastic.names())]
    return first + replays


def family(name: str) -> str:
    """Family of a forge dataset."""
    subject = name.removeprefix(PREFIX).split("/")[0]
    if subject in TABULAR_IDS:
        return "tabular"
    if subject.startswith("noisy-"):
        return "noisy-mujoco"
    return "maze2d" if subject == "pointmaze" else "gym-mujoco"


def folder_of(name: str, size: int | None = None, seed: int = 0) -> Path:
    """Where a dataset lies; a size or seed other than the default is part of the folder's name."""
    return cache_dir() / _minari_id(_known(name), size, seed)


def ensure(name: str, *, size: int | None = None, seed: int = 0, force: bool = False, progress: bool = True) -> Path:
    """Folder of a forge dataset in Minari's format (it holds `data/`), built when it is missing.

    With `MINARI_DATASETS_PATH` set to the cache folder, `minari.load_dataset` finds it as well.

    Args:
        name: one of `names()`, or a finite task or noisy robot with other numbers.
        size: transitions; default 100,000 (D4RL's sets have 1,000,000), of a finite task its number of episodes.
        seed: of resets, action noise and draws.
        force: build it again.
        progress: show a progress bar.

    Raises:
        OffrlError: an unknown name, a bad size, a missing package, or an unwritable folder.
    """
    name = _known(name)
    if (size is not None and size < 1) or seed < 0:
        raise OffrlError(f"{name}: size={size} must be at least 1 and seed={seed} at least 0.")
    folder = folder_of(name, size, seed)
    if not force and (folder / "data" / "metadata.json").is_file():
        return folder
    with one_at_a_time(folder.with_name(f".{folder.name}.lock")):  # the jobs of a sweep often want the same one
        remove_torn(folder.parent, glob.escape(folder.name))  # of builds that were killed
        if force or not (folder / "data" / "metadata.json").is_file():
            _build(folder, name, size, seed, progress)
    return folder


def _build(folder: Path, name: str, size: int | None, seed: int, progress: bool) -> None:
    recipe = _recipe(name)
    if isinstance(recipe, stochastic.Recipe):
        with _progress(name, size, progress) as advance:
            _build_tabular(folder, name, recipe, size, seed, advance)
        return
    size = DEFAULT_SIZE if size is None else size
    subject, level = _parts(name)
    if match := re.fullmatch(r"random-(medium|expert)-([\d.]+)", level):
        good, bad = (f"{PREFIX}{subject}/{source}{SUFFIX}" for source in (match[1], "random"))
        sources = [ensure(source, size=size, seed=seed, progress=progress) for source in (good, bad)]
        _build_mixture(folder, name, sources, float(match[2]), size, seed)
        return
    with _progress(name, size, progress) as advance, one_thread():
        if subject == "pointmaze":
            _build_maze(folder, name, level, size, seed, advance)
        elif recipe is None:
            _build_robot(folder, name, subject, level, size, seed, advance)
        elif recipe.robot == "reacher":
            _build_reacher(folder, name, recipe, size, seed, advance)
        else:
            _build_robot(folder, name, recipe.robot, recipe.level, size, seed, advance, recipe)


# ---- names ---------------------------------------------------------------------------------------------------------


def _known(name: str) -> str:
    if name in names() or _recipe(name):
        return name
    close = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`offrl data list` shows the known ones."
    raise OffrlError(f"{name}: the forge can't build that; {hint}")


def _parts(name: str) -> tuple[str, str]:
    """`forge/subject/level-v0` taken apart; the level of `medium-replay-v1` keeps its version."""
    subject, _, level = name.removeprefix(PREFIX).removesuffix(SUFFIX).partition("/")
    return subject, level


def _recipe(name: str) -> stochastic.Recipe | noisy.Recipe | None:
    """The recipe of a finite task or a noisy robot, whose ids hold numbers; None of any other dataset."""
    if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
        return None
    inner = "/".join(_parts(name))
    return stochastic.recipe(inner) or noisy.recipe(inner)


def _minari_id(name: str, size: int | None, seed: int) -> str:
    """The id under which Minari knows the set (it allows no dot), with a size or seed that is not the default."""
    usual = size is None or (size == DEFAULT_SIZE and not isinstance(_recipe(name), stochastic.Recipe))
    options = ("" if usual else f"-n{size}") + (f"-s{seed}" if seed else "")
    stem, number = name.rsplit("-v", 1)
    return f"{stem.replace('.', '_')}{options}-v{number}"


# ---- robots --------------------------------------------------------------------------------------------------------


def segments(robot: str, level: str, size: int) -> list[tuple[int | None, int]]:
    """Which policies play how many transitions, in order: pairs (level, transitions), level None for uniform actions.

    `medium-replay` stretches the training up to the medium policy (`medium-replay-v1`: up to `Robot.replay`) over `size`
    transitions: the first 5,000 training steps are uniform actions, every later one is played by the first policy kept
    at or after it.
    """
    spec = ROBOTS[robot]
    single = {"random": None, "medium": spec.medium, "expert": spec.expert}
    if level in single:
        return [(single[level], size)]
    if level == "medium-expert":
        steps: list[int | None] = [spec.medium, spec.expert]
        ends = [size // 2, size]
    else:
        last = spec.replay if level == REPLAY_V1 and spec.replay else spec.medium
        ladder = [step for step in behavior_levels(robot) if step <= last]
        steps, ends = [None, *ladder], [round(end * size / last) for end in (REPLAY_WARMUP, *ladder)]
    return [(step, end - start) for step, start, end in zip(steps, [0, *ends], ends) if end > start]


def _build_robot(
    folder: Path,
    name: str,
    robot: str,
    level: str,
    size: int,
    seed: int,
    advance: Progress,
    noise: noisy.Recipe | None = None,
) -> None:
    spec, plan = ROBOTS[robot], segments(robot, level, size)
    robots = Robots(spec.env_id, law=noise.law if noise else None)
    parts = [
        Part(uniform_policy(robots.action_dim) if step is None else behavior_policy(robot, step), length, seeds)
        for (step, length), seeds in zip(plan, _seeds(name, seed).spawn(len(plan)))
    ]
    episodes = rollout(robots, parts, advance)
    policies = [["uniform actions" if step is None else f"SAC after {step} steps", length] for step, length in plan]
    provenance, trained = _provenance(size, seed, policies=policies), ""
    if noise:
        provenance |= {"noise": noise.strengths, "policies_trained": "without noise"}
        trained = f" under noise {noise.strengths}, without which they were trained"
    space = robots.env.action_space
    _write(
        folder,
        episodes,
        _robot_info(name, spec, provenance, noise),
        action_space=box(space.low.tolist(), space.high.tolist()),
        description=f"{spec.env_id}, {level}: rollouts of offrl's behaviour policies with their exploration noise{trained}.",
    )


def _build_reacher(folder: Path, name: str, recipe: noisy.Recipe, size: int, seed: int, advance: Progress) -> None:
    deviation = noisy.REACHER_NOISE[recipe.level]
    episodes = noisy.drive(recipe.law, deviation, size, _seeds(name, seed), advance)
    driver = "uniform actions" if deviation is None else f"inverse kinematics and PD control, noise {deviation}"
    source = noisy.REACHER_REFERENCES_SOURCE
    provenance = _provenance(size, seed, behaviour=driver, noise=recipe.strengths, references=source)
    _write(
        folder,
        episodes,
        _info(name, recipe.env_id, recipe.strengths, noisy.REACHER_REFERENCES, noisy.REACHER_LIMIT, provenance),
        action_space=box([-1.0, -1.0], [1.0, 1.0]),
        description=f"{recipe.env_id}, {recipe.level}: {driver}, under noise {recipe.strengths}.",
    )


def _robot_info(name: str, spec: Robot, provenance: dict[str, Any], noise: noisy.Recipe | None = None) -> DatasetInfo:
    references = "D4RL (infos.py), measured on gym's v2 environments" + (" without noise" if noise else "")
    env_id, strengths = (noise.env_id, noise.strengths) if noise else (spec.env_id, {})
    provenance = provenance | {"references": references} | ({"note": spec.note} if spec.note else {})
    return _info(name, env_id, strengths, (spec.ref_min, spec.ref_max), TIME_LIMIT, provenance)


def _build_mixture(folder: Path, name: str, sources: list[Path], sigma: float, size: int, seed: int) -> None:
    """A mixture of two sets of the same size and seed; see `offrl.data.mixtures`."""
    good, bad = (read_minari(source) for source in sources)
    mixture, manifest = build_mixture(good, bad, sigma, size, seed)
    summary = {key: value for key, value in manifest.items() if key != "episodes"}
    metadata = read_metadata(sources[0])
    robot = name.removeprefix(PREFIX).split("/")[0]
    _write(
        folder,
        list(_episodes(mixture)),
        _robot_info(name, ROBOTS[robot], _provenance(size, seed, mixture=summary)),
        env_spec=metadata["env_spec"],
        action_space=json.loads(metadata["action_space"]),
        description=f"Whole trajectories of {good.info.id} ({sigma:.0%} of the transitions) and {bad.info.id}.",
        manifest=manifest,
    )


def _episodes(store: OfflineDataset) -> Iterator[Episode]:
    """The episodes of a dataset, whose arrays they share."""
    bounds = store.offsets.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:]):
        observations = torch.cat((store.observations[start:stop], store.next_observations[stop - 1 : stop]))
        arrays = observations.numpy(), store.actions[start:stop].numpy(), store.rewards[start:stop].numpy()
        yield Episode(*arrays, terminated=bool(store.terminations[stop - 1]))


# ---- mazes ---------------------------------------------------------------------------------------------------------


def _build_maze(folder: Path, name: str, level: str, size: int, seed: int, advance: Progress) -> None:
    maze, dense = level.removesuffix("-dense"), level.endswith("-dense")
    # Sparse and dense sets of one size and seed are the same journeys.
    seeds = _seeds(f"{PREFIX}pointmaze/{maze}{SUFFIX}", seed)
    episodes = pointmaze.drive(maze, dense, size, seeds, advance)
    spec = pointmaze.make_maze(maze, dense).spec
    references = pointmaze.REFERENCES[maze][dense]
    provenance = _provenance(size, seed, references=pointmaze.REFERENCES_SOURCE)
    _write(
        folder,
        episodes,
        _info(name, spec.id, spec.kwargs, references, spec.max_episode_steps, provenance),
        env_spec=spec.to_json(),
        action_space=box([-1.0, -1.0], [1.0, 1.0]),
        description=f"{spec.id}, goal fixed as in D4RL: a noisy waypoint controller walks between random places.",
    )


# ---- finite stochastic tasks ---------------------------------------------------------------------------------------


def _build_tabular(
    folder: Path, name: str, recipe: stochastic.Recipe, size: int | None, seed: int, advance: Progress
) -> None:
    episodes = stochastic.play(recipe, size, _seeds(name, seed), advance)
    task, exact = recipe.table, recipe.exact()
    returns = [float(episode.rewards.sum()) for episode in episodes]
    metadata: dict[str, Any] = {"behaviour": recipe.described, "mean_return": float(np.mean(returns)), "exact": exact}
    if recipe.success is not None:
        metadata["successes"] = sum(total >= recipe.success for total in returns)
    metadata["references"] = "exact returns of uniform actions and of the best policy"
    references, provenance = (exact["uniform"], exact["optimal"]), _provenance(size, seed, **metadata)
    info = _info(name, recipe.env_id, dict(recipe.parameters), references, task.limit, provenance)
    places = task.coordinates
    _write(
        folder,
        episodes,
        replace(info, discrete=task.actions),
        action_space=discrete(task.actions),
        description=f"{recipe.env_id}: {recipe.described}.",
        observation_space=discrete(task.states)
        if places is None
        else box(places.min(0).tolist(), places.max(0).tolist()),
    )


# ---- what all have in common ---------------------------------------------------------------------------------------


def _info(
    name: str,
    env_id: str,
    env_kwargs: Mapping[str, Any],
    references: tuple[float, float],
    limit: int | None,
    provenance: dict[str, Any],
) -> DatasetInfo:
    """What a dataset of the set tells; `references` are the returns of scores 0 and 100, `limit` the longest episode."""
    return DatasetInfo(
        id=name,
        source="forge",
        env_id=env_id,
        env_kwargs=dict(env_kwargs),
        family=family(name),
        ref_min=references[0],
        ref_max=references[1],
        max_episode_steps=limit,
        provenance=provenance,
    )


def _write(
    folder: Path, episodes: Sequence[Episode], info: DatasetInfo, *, env_spec: str | None = None, **more: Any
) -> None:
    """Write a set; `env_spec` is that of its environment unless it is given, `more` as in `write_minari`."""
    made = info.provenance
    dataset_id = _minari_id(info.id, made["size"], made["seed"])
    write_minari(folder, episodes, info, dataset_id=dataset_id, env_spec=env_spec or _env_spec(info), **more)


def _seeds(name: str, seed: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([zlib.crc32(name.encode()), seed])


def _env_spec(info: DatasetInfo) -> str:
    """JSON of the Gymnasium spec of the environment that made the data."""
    assert info.env_id is not None
    spec = gymnasium.spec(info.env_id)
    return replace(spec, kwargs={**spec.kwargs, **info.env_kwargs}).to_json()


def _provenance(size: int | None, seed: int, **more: Any) -> dict[str, Any]:
    packages = {}
    for name in ("gymnasium", "mujoco", "numpy", "torch"):
        with suppress(PackageNotFoundError):  # finite tasks need no simulator
            packages[name] = version(name)
    return {"made_by": "offrl forge", "size": size, "seed": seed, "versions": packages} | more


@contextmanager
def _progress(name: str, size: int | None, show: bool) -> Iterator[Progress]:
    """A bar with rate and time left; yields the function that takes the number of steps done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:>6,.0f} steps/s, left")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(name, total=size, rate=0.0)
        begin = last = perf_counter()

        def advance(done: int) -> None:
            nonlocal last
            if (now := perf_counter()) - last > 0.1 or done == size:
                last = now
                bar.update(task, completed=done, rate=done / (now - begin))

        yield advance
