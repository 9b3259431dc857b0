"""Building a forge dataset: a function for each family, which rolls out its behaviour and writes the episodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from offrl.data.dataset import DatasetInfo
from offrl.data.minari import read_metadata, read_minari
from offrl.data.minari_write import box, discrete, episodes_of
from offrl.data.mixtures import build_mixture
from offrl.forge import mazes, noisy, ogbench, tabular
from offrl.forge.metadata import dataset_info, provenance_of, seed_sequence, write_dataset
from offrl.forge.names import DEFAULT_SIZE, PREFIX, SUFFIX, recipe_of, subject_and_level
from offrl.forge.robots import ROBOTS, Robot, segments
from offrl.forge.rollout import TIME_LIMIT, Part, Robots, behavior_policy, one_thread, rollout, uniform_policy
from offrl.utils.progress import Bar

Progress = Callable[[int], None]


def build(folder: Path, name: str, size: int | None, seed: int, progress: bool, sources: Sequence[Path] = ()) -> None:
    """Build the dataset `name` in `folder` (an OGBench set: as that file).

    Args:
        size, seed, progress: as of `offrl.forge.registry.ensure`.
        sources: folders of the datasets that a mixture is drawn from, the good one first.
    """
    recipe = recipe_of(name)
    if isinstance(recipe, tabular.Recipe):
        with Bar(progress, name, 0, size, "steps") as bar:
            _build_tabular(folder, name, recipe, size, seed, bar.update)
        return
    size = DEFAULT_SIZE if size is None else size
    subject, level = subject_and_level(name)
    if sources:
        _build_mixture(folder, name, sources, float(level.rsplit("-", 1)[1]), size, seed)
        return
    with Bar(progress, name, 0, size, "steps") as bar, one_thread():
        if subject == "ogbench":
            made_by = provenance_of(size, seed, also=("ogbench", "dm_control"))
            ogbench.build_file(folder, level, size, seed, made_by, bar.update)
        elif subject == "pointmaze":
            _build_maze(folder, name, level, size, seed, bar.update)
        elif recipe is None:
            _build_robot(folder, name, subject, level, size, seed, bar.update)
        elif recipe.robot == "reacher":
            _build_reacher(folder, name, recipe, size, seed, bar.update)
        else:
            _build_robot(folder, name, recipe.robot, recipe.level, size, seed, bar.update, recipe)


# ---- robots --------------------------------------------------------------------------------------------------------


def _build_robot(
    folder: Path,
    name: str,
    robot: str,
    level: str,
    size: int,
    seed: int,
    advance: Progress,
    recipe: noisy.Recipe | None = None,
) -> None:
    spec, plan = ROBOTS[robot], segments(robot, level, size)
    robots = Robots(spec.env_id, noise=recipe.noise if recipe else None)
    parts = [
        Part(uniform_policy(robots.action_dim) if step is None else behavior_policy(robot, step), length, seeds)
        for (step, length), seeds in zip(plan, seed_sequence(name, seed).spawn(len(plan)))
    ]
    episodes = rollout(robots, parts, advance)
    policies = [["uniform actions" if step is None else f"SAC after {step} steps", length] for step, length in plan]
    provenance, trained = provenance_of(size, seed, policies=policies), ""
    if recipe:
        provenance |= {"noise": recipe.strengths, "policies_trained": "without noise"}
        trained = f" under noise {recipe.strengths}, without which they were trained"
    space = robots.env.action_space
    write_dataset(
        folder,
        episodes,
        _robot_info(name, spec, provenance, recipe),
        action_space=box(space.low.tolist(), space.high.tolist()),
        description=f"{spec.env_id}, {level}: rollouts of offrl's behaviour policies with their exploration noise{trained}.",
    )


def _build_reacher(folder: Path, name: str, recipe: noisy.Recipe, size: int, seed: int, advance: Progress) -> None:
    std = noisy.REACHER_NOISE[recipe.level]
    episodes = noisy.drive(recipe.noise, std, size, seed_sequence(name, seed), advance)
    driver = "uniform actions" if std is None else f"inverse kinematics and PD control, noise {std}"
    source = noisy.REACHER_REFERENCES_SOURCE
    provenance = provenance_of(size, seed, behaviour=driver, noise=recipe.strengths, references=source)
    write_dataset(
        folder,
        episodes,
        dataset_info(name, recipe.env_id, recipe.strengths, noisy.REACHER_REFERENCES, noisy.REACHER_LIMIT, provenance),
        action_space=box([-1.0, -1.0], [1.0, 1.0]),
        description=f"{recipe.env_id}, {recipe.level}: {driver}, under noise {recipe.strengths}.",
    )


def _robot_info(name: str, spec: Robot, provenance: dict[str, Any], recipe: noisy.Recipe | None = None) -> DatasetInfo:
    references = "D4RL (infos.py), measured on gym's v2 environments" + (" without noise" if recipe else "")
    env_id, strengths = (recipe.env_id, recipe.strengths) if recipe else (spec.env_id, {})
    provenance = provenance | {"references": references} | ({"note": spec.note} if spec.note else {})
    return dataset_info(name, env_id, strengths, (spec.ref_min, spec.ref_max), TIME_LIMIT, provenance)


def _build_mixture(folder: Path, name: str, sources: Sequence[Path], share: float, size: int, seed: int) -> None:
    """Draw whole trajectories from two datasets of the same size and seed; see `offrl.data.mixtures`."""
    good, bad = (read_minari(source) for source in sources)
    mixture, manifest = build_mixture(good, bad, share, size, seed)
    summary = {key: value for key, value in manifest.items() if key != "episodes"}
    metadata = read_metadata(sources[0])
    robot, _ = subject_and_level(name)
    write_dataset(
        folder,
        list(episodes_of(mixture)),
        _robot_info(name, ROBOTS[robot], provenance_of(size, seed, mixture=summary)),
        env_spec=metadata["env_spec"],
        action_space=json.loads(metadata["action_space"]),
        description=f"Whole trajectories of {good.info.id} ({share:.0%} of the transitions) and {bad.info.id}.",
        manifest=manifest,
    )


# ---- mazes ---------------------------------------------------------------------------------------------------------


def _build_maze(folder: Path, name: str, level: str, size: int, seed: int, advance: Progress) -> None:
    maze, dense = level.removesuffix("-dense"), level.endswith("-dense")
    # Sparse and dense sets of one size and seed are the same journeys.
    seeds = seed_sequence(f"{PREFIX}pointmaze/{maze}{SUFFIX}", seed)
    episodes = mazes.drive(maze, dense, size, seeds, advance)
    spec = mazes.make_maze(maze, dense).spec
    references = mazes.REFERENCES[maze][dense]
    provenance = provenance_of(size, seed, references=mazes.REFERENCES_SOURCE)
    write_dataset(
        folder,
        episodes,
        dataset_info(name, spec.id, spec.kwargs, references, spec.max_episode_steps, provenance),
        env_spec=spec.to_json(),
        action_space=box([-1.0, -1.0], [1.0, 1.0]),
        description=f"{spec.id}, one fixed goal: a noisy waypoint controller walks between random places.",
    )


# ---- finite stochastic tasks ---------------------------------------------------------------------------------------


def _build_tabular(
    folder: Path, name: str, recipe: tabular.Recipe, size: int | None, seed: int, advance: Progress
) -> None:
    episodes = tabular.rollout(recipe, size, seed_sequence(name, seed), advance)
    task, exact = recipe.table, recipe.exact()
    returns = [float(episode.rewards.sum()) for episode in episodes]
    metadata: dict[str, Any] = {"behaviour": recipe.described, "mean_return": float(np.mean(returns)), "exact": exact}
    if recipe.success is not None:
        metadata["successes"] = sum(total >= recipe.success for total in returns)
    metadata["references"] = "exact returns of uniform actions and of the best policy"
    references, provenance = (exact["uniform"], exact["optimal"]), provenance_of(size, seed, **metadata)
    info = dataset_info(name, recipe.env_id, dict(recipe.parameters), references, task.limit, provenance)
    places = task.coordinates
    write_dataset(
        folder,
        episodes,
        replace(info, discrete=task.actions),
        action_space=discrete(task.actions),
        description=f"{recipe.env_id}: {recipe.described}.",
        observation_space=discrete(task.states)
        if places is None
        else box(places.min(0).tolist(), places.max(0).tolist()),
    )
