"""OGBench's tasks in training, evaluation and reports: seeds of episodes, success rates, a task for each lane."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch

import offrl
from offrl import results
from offrl.agents.base import Agent, Spec
from offrl.cli.probe import probe
from offrl.cli.select import select
from offrl.data import ogbench_names
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.lane_tasks import LaneTasks, with_tasks
from offrl.datasets import load
from offrl.envs import make_env
from offrl.evaluation.evaluator import Evaluator
from offrl.evaluation.fqe import FQEConfig, fitted_q
from offrl.results import report as reporting
from offrl.results import tables
from offrl.results.stats import wilson_interval
from offrl.sampling import BatchLoader, make_sampler
from offrl.training.compose import compose
from offrl.training.run_config import resolve_config
from offrl.training.runs import summary
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

pytest.importorskip("ogbench")
FORGE = {"dataset": "forge/ogbench/pointmaze-medium-navigate-v0", "data.size": 2000, "preset": "ogbench"}
QUICK = {"progress": False, "eval.workers": 1, "agent.hidden": [16, 16], "batch_size": 16, "engine": "eager"}


def info_of(environment: str, task: int = 1, **kwargs: Any) -> DatasetInfo:
    name = ogbench_names.Name(environment, "navigate", task)
    limit = ogbench_names.environments()[environment].limit
    return DatasetInfo(
        id=name.id, family="ogbench", env_id=name.env_id, max_episode_steps=limit, env_kwargs=kwargs, source="test"
    )


def played(env: Any, seed: int, actions: np.ndarray) -> np.ndarray:
    rows = [env.reset(seed=seed)[0]]
    rows += [env.step(action)[0] for action in actions]
    return np.array(rows)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", ["pointmaze-teleport", "antmaze-medium", "cube-single"])
def test_an_episode_depends_on_its_seed_alone(environment: str) -> None:
    first, second = make_env(info_of(environment)), make_env(info_of(environment))
    actions = np.random.default_rng(0).uniform(-1, 1, (40, *(first.action_space.shape or ())))
    alone = played(first, 7, actions)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    played(second, 3, actions[::-1])
    second.reset(seed=7)
    first.reset(seed=9)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002 - nobody else's draws have moved
    np.random.rand(5)  # noqa: NPY002
    rows = [second.reset(seed=7)[0]]
    for action in actions:  # in turns with another episode
        rows.append(second.step(action)[0])
        first.step(action)
    assert np.array_equal(np.array(rows), alone)
    assert not np.array_equal(played(first, 8, actions), alone)


@dataclass
class NoConfig:
    pass


class ToGoal(Agent):
    """Lane 0 walks to the goal of task 3 by the package's shortest way, lane 1 stays where it is."""

    Config = NoConfig

    def build(self) -> None:
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.tensor(np.array([way(place) for place in obs[0].numpy()])), 0 * obs[1]])


@cache
def maze() -> Any:
    return make_env(info_of("pointmaze-medium", 3)).unwrapped


def way(place: np.ndarray) -> np.ndarray:
    return np.clip(maze().get_oracle_subgoal(place, (4.0, 12.0))[0] - place, -1, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_scores_are_successes_at_the_last_step_of_every_lane(workers: int) -> None:
    agent = ToGoal(Spec(2, 2, (0, 1)))
    with Evaluator(info_of("pointmaze-medium", 3), 2, workers=workers) as evaluator:
        found = evaluator.run(agent, 3)
    assert found.normalized is not None
    assert found.normalized.tolist() == [[100.0] * 3, [0.0] * 3]
    assert found.lengths[1].tolist() == [1000] * 3
    env = make_env(info_of("pointmaze-medium", 3))
    for k, seed in enumerate(found.seeds):  # restated, one episode after another
        observation, over, steps = env.reset(seed=seed)[0], False, 0
        while not over:
            observation, _, over, _, told = env.step(way(observation))
            steps += 1
        assert told["success"] == 1.0
        assert found.lengths[0, k] == steps


def test_success_before_or_behind_the_step() -> None:
    """`post` sees a success one step earlier."""
    lengths = []
    for timing in ("pre", "post"):
        env = make_env(info_of("pointmaze-medium", 3, **({} if timing == "pre" else {"success_timing": timing})))
        inner: Any = env.unwrapped
        env.reset(seed=0)
        inner.set_xy(np.array([4.0, 12.0 - 1.1]))
        over, steps = False, 0
        while not over:
            _, reward, over, _, told = env.step(np.array([0.0, 1.0]))
            steps += 1
            assert reward == told["success"] - 1
        lengths.append(steps)
    assert lengths[0] == lengths[1] + 1


# ---- a task for each lane --------------------------------------------------------------------------------------------


def tasks_of(numbers: list[int]) -> LaneTasks:
    return with_tasks(lambda task: load(FORGE["dataset"], task=task, size=2000, progress=False), numbers)


@pytest.mark.filterwarnings("ignore:.*no row is a success")
@pytest.mark.parametrize("window", [None, 5])
def test_each_lane_has_the_batches_of_its_task_alone(window: int | None) -> None:
    numbers = [4, 1, 4]
    shared = tasks_of(numbers)
    uniform = {"_target_": "offrl.sampling.Uniform"}

    def drawn(dataset: Any) -> Any:
        sampler = make_sampler(uniform, [dataset], [5, 6, 7])
        random = LaneRandom((5, 6, 7), torch.device("cpu"))
        return BatchLoader([(dataset, sampler, 1.0)], 64, window).draw(random, torch.arange(3))

    together = drawn(shared)
    for lane, task in enumerate(numbers):
        alone = drawn(load(FORGE["dataset"], task=task, size=2000, progress=False))
        for key, value in vars(alone).items():
            assert torch.equal(getattr(together, key)[:, lane], value[:, lane]), key
    assert not torch.equal(shared.lane_rewards[0], shared.lane_rewards[1])
    assert shared.fingerprint != tasks_of([1, 1, 4]).fingerprint
    assert torch.equal(shared.with_rewards(2.0, 1.0).lane_rewards, 2 * shared.lane_rewards + 1)
    for refused in (lambda: shared.returns, lambda: shared.best_return, lambda: shared.return_to_go):
        with pytest.raises(OffrlError, match=r"train one task at a time with data\.task"):
            refused()


@pytest.mark.filterwarnings("ignore:.*no row is a success")
def test_a_run_with_a_task_for_each_lane(tmp_path: Path) -> None:
    """Its lanes learn the numbers of runs of one task, are scored in their own environments, and are datasets in the report."""
    budget = {"updates": 40, "eval.every": 0, "eval.final_episodes": 1, "log_every": 40}
    both = offrl.fit(
        agent="td3_bc", out=str(tmp_path / "runs"), seeds=[3, 3], **{"data.tasks": [4, 1]}, **FORGE | QUICK | budget
    )
    alone = offrl.fit(agent="td3_bc", out=str(tmp_path / "one"), seed=3, **{"data.task": 1}, **FORGE | QUICK | budget)
    rows, single = results.read([both.folder]), results.read([alone.folder])
    ids = [f"forge/ogbench/pointmaze-medium-navigate-singletask-task{k}-v0" for k in (4, 1)]
    assert rows.sort("lane").unique("lane", maintain_order=True)["dataset"].to_list() == ids
    columns = ["step", "eval_seed", "return_raw", "length", "normalized"]
    mine = rows.filter(pl.col("lane") == 1).select(columns).sort(columns)
    assert mine.equals(single.select(columns).sort(columns))
    made, _ = reporting.summary([tmp_path / "runs"], tmp_path / "out")
    assert {(cell.dataset, cell.scale, cell.trials) for cell in made.cells} == {(i, "success rate, %", 1) for i in ids}
    again = offrl.fit(
        agent="td3_bc", out=str(tmp_path / "runs"), seeds=[3, 3], **{"data.tasks": [4, 1]}, **FORGE | QUICK | budget
    )
    assert again.status == "already finished"
    for result in (both, again):
        assert re.search(r"finished: success rate \(%\) \d", summary(result))
    # What would need one reward a row says so; without it, the same works.
    with pytest.raises(
        OffrlError, match=r"lanes have rewards of their own \(data.tasks; train with data.task to rank\)"
    ):
        select([both.folder], tmp_path / "ranked", show=False)
    with pytest.raises(
        OffrlError, match=r"rewards of their own \(data.tasks\).*--updates 0, or probe a run of one task"
    ):
        probe(both.folder, episodes=0)
    assert len(probe(both.folder, episodes=1, updates=0).achieved or []) == 2
    (made_of_one,) = select([alone.folder], tmp_path / "ranked", FQEConfig(updates=3, hidden=(8,)), show=False)
    assert made_of_one.scale == "success rate, %"
    assert all(math.isfinite(policy.value) for policy in made_of_one.policies)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 2}, "one per lane"),
        ({"lanes": 3, "data.task": 1}, "leave out one of them"),
        ({"lanes": 3, "sampler": "top_percent"}, "sampler=uniform"),
        ({"lanes": 3, "augment": "diffusion"}, "without an augmentation"),
        ({"lanes": 3, "data.flicker": 0.5}, "other observations in each task"),
    ],
)
def test_what_does_not_go_with_tasks_per_lane(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        resolve_config(compose({"agent": "td3_bc", "data.tasks": [1, 2, 3], **FORGE, **changes}))


@pytest.mark.filterwarnings("ignore:.*no row is a success")
def test_tasks_per_lane_refuse_steps_that_are_no_rows() -> None:
    """Such a step's reward would be the first task's in every lane's returns."""
    one = load(FORGE["dataset"], task=1, size=2000, progress=False)
    some = torch.arange(one.episodes) == 1
    cut = OfflineDataset(**one.tensors() | {"has_tail": some, "tail_rewards": some.float()}, info=one.info)
    with pytest.raises(OffrlError, match=r"last step has no successor.*train one task at a time with data\.task\.$"):
        with_tasks(lambda task: cut, [1, 2])


@pytest.mark.filterwarnings("ignore:.*no row is a success")
def test_fitted_q_refuses_tasks_per_lane_before_it_trains() -> None:
    with pytest.raises(OffrlError, match=r"train one task at a time with data\.task"):
        fitted_q(tasks_of([1, 2]), [], FQEConfig(updates=10**9))


def test_rows_of_tables_for_d4rl_s_antmaze_are_not_for_ogbench_s() -> None:
    rows = {
        dataset: resolve_config(compose({"agent": "iql", "dataset": dataset})).train.data.reward_shift
        for dataset in ("antmaze-large-play-v2", "antmaze-large-navigate-singletask-v0")
    }
    assert rows == {"antmaze-large-play-v2": -1.0, "antmaze-large-navigate-singletask-v0": 0.0}


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_wilson_s_interval_solves_its_equation() -> None:
    z = scipy.stats.norm.ppf(0.975)
    for successes, trials in ((0, 50), (1, 50), (25, 50), (50, 50), (333, 400)):
        share = successes / trials
        for bound in wilson_interval(successes, trials):
            assert abs(share - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / trials), abs=1e-12)
    assert np.isnan(wilson_interval(0, 0)).all()


def test_a_report_has_the_protocol_s_mean_beside_the_published_one(tmp_path: Path) -> None:
    dataset, seeds, rng = "cube-single-play-singletask-task2-v0", (0, 1, 2), np.random.default_rng(0)
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"updates": 1_000_000}))
    (folder / "manifest.json").write_text(json.dumps({"method": "iql", "dataset_info": {"family": "ogbench"}}))
    wins = {}
    with results.RunWriter(folder, {"method": "iql", "dataset": dataset, "updates": 1_000_000}) as writer:
        for step in range(100_000, 1_000_001, 100_000):
            wins[step] = 100.0 * (rng.random((3, 50)) < step / 2e6)
            writer.episodes(step, seeds, wins[step] * 0 - 5, wins[step] * 0 + 9, wins[step], range(50))
    made, _ = reporting.summary([tmp_path / "runs"], tmp_path / "out")
    (cell,) = made.cells
    per_seed = np.mean([wins[step].mean(1) for step in (800_000, 900_000, 1_000_000)], axis=0)
    assert cell.average == pytest.approx(per_seed)
    assert cell.published[0].method == "IQL"
    assert cell.difference[0] == pytest.approx(per_seed.mean() - cell.published[0].mean)
    assert (cell.successes, cell.trials) == (int(wins[1_000_000].sum() / 100), 150)
    text = tables.markdown(made, {})
    low, high = (100 * bound for bound in wilson_interval(cell.successes or 0, 150))
    assert f"| {cell.successes} of 150 | {low:.1f} to {high:.1f} |" in text
    assert "Scores (success rate, %)" in text
