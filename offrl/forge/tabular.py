"""Datasets of the finite stochastic tasks: behaviour, number of episodes, and exact returns.

`forge/bandit/p0.1-v0`, `forge/bandit/skewed-v0`, `forge/lake/p0.7-eps0.4-n1000-v0` (slip, exploration, episodes),
`forge/cliff/uniform-v0`, `forge/gambling/uniform-v0`, `forge/toy/uniform-v0`, `forge/mstoy/uniform-v0`, and the hidden grid,
`forge/grid/cue-n2000-v0` and `forge/grid/place-n2000-v0` (episodes). Sizes, behaviours and
sources: docs/stochastic_benchmarks.md. Score 0 is the exact return of uniform actions, 100 that of the best policy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from offrl.data.minari_write import Episode
from offrl.envs import TABULAR_IDS
from offrl.envs import tabular_solver as exact
from offrl.envs.hidden_grid import OUTCOMES
from offrl.envs.tabular_env import TabularVectorEnv
from offrl.envs.tabular_solver import Array, Tabular
from offrl.envs.tabular_tasks import make_task
from offrl.forge import hidden_grid
from offrl.utils.errors import OffrlError

BANDITS = ("p0.1", "p0.2", "p0.3", "p0.4", "skewed")
SLIPS, EPSILONS, EPISODES = ("0.33", "0.5", "0.7", "0.9", "1"), ("0.1", "0.4", "0.7", "1"), (100, 1000, 10_000)
SHARE = r"(0\.\d*[1-9]|1)"  # one way to write a number: no two ids of one dataset
GRIDS = (500, 2000, 10_000)  # episodes
BATCH = 10_000  # episodes of a rollout


@dataclass(frozen=True)
class Recipe:
    """How a dataset of a finite task is made.

    Attributes:
        task: name in `offrl.envs.tabular_tasks.TASKS`.
        parameters: parameters of the task.
        behaviour: `[S, A]` action probabilities of the behaviour policy.
        described: the behaviour policy in words.
        episodes: number of episodes; each runs to its end.
        targets: target returns for which the metadata give RCSL's exact return.
        success: least return of a successful episode; None where the task knows no success.
        recorded: parameters of the task that the behaviour acts in, where they are others than those that policies are scored
            in.
    """

    task: str
    parameters: dict[str, Any]
    behaviour: Array
    described: str
    episodes: int
    targets: tuple[int, ...]
    success: int | None = None
    recorded: dict[str, Any] | None = None

    @cached_property
    def table(self) -> Tabular:
        return make_task(self.task, **self.parameters)

    @cached_property
    def recorded_table(self) -> Tabular:
        return self.table if self.recorded is None else make_task(self.task, **self.recorded)

    @property
    def env_id(self) -> str:
        return TABULAR_IDS[self.task]

    def exact(self) -> dict[str, Any]:
        """Expected returns: of the best policy, uniform actions, the behaviour, one step of improvement, and RCSL.

        Where states look alike, `optimal` is that of the best policy of observations and actions so far, and `state_optimal`
        that of the best policy that sees the state; the others are left out.
        """
        task, behaviour = self.table, self.behaviour
        if self.task == "grid":
            return {
                "optimal": exact.belief_optimum(task),
                "state_optimal": exact.optimum(task),
                "uniform": exact.value(task, exact.uniform(task)),
                "behaviour": exact.value(self.recorded_table, behaviour),
            }
        rcsl = exact.rcsl(task, behaviour)
        return {
            "optimal": exact.optimum(task),
            "uniform": exact.value(task, exact.uniform(task)),
            "behaviour": exact.value(task, behaviour),
            "one_step_improvement": exact.value(task, exact.improved(task, behaviour)),
            "rcsl": [
                {
                    "target": target,
                    "probability": rcsl.probability(target),
                    "sampled": rcsl.value(target),
                    "likeliest": rcsl.value(target, likeliest=True),
                }
                for target in self.targets
            ],
        }


def names() -> list[str]:
    """Subject and level of the listed datasets (others of the same form can be built too)."""
    lakes = [f"lake/p{p}-eps{eps}-n{n}" for p in SLIPS for eps in EPSILONS for n in EPISODES]
    uniform = [f"{task}/uniform" for task in ("cliff", "gambling", "toy", "mstoy")]
    grids = [f"grid/{variant}-n{n}" for variant in OUTCOMES for n in GRIDS]
    return [*(f"bandit/{level}" for level in BANDITS), *lakes, *uniform, *grids]


def recipe(name: str) -> Recipe | None:
    """The recipe of `subject/level`; None when the name is none of ours."""
    for pattern, make in _PATTERNS.items():
        if match := re.fullmatch(pattern, name):
            return make(*match.groups())
    return None


def rollout(
    recipe: Recipe, size: int | None, seeds: np.random.SeedSequence, progress: Callable[[int], None]
) -> list[Episode]:
    """The recipe's episodes, or exactly `size` steps of which the last episode is cut.

    Each is, number by number, the episode of `gymnasium.make` from its seed and actions.
    """
    resets, rng = (np.random.default_rng(s) for s in seeds.spawn(2))
    episodes: list[Episode] = []
    steps = 0
    while len(episodes) < recipe.episodes if size is None else steps < size:
        count = min(BATCH, recipe.episodes - len(episodes) if size is None else size - steps)
        batch = _rollout_batch(recipe, resets.integers(2**31, size=count).tolist(), rng)
        for episode in batch:
            if size is not None and steps >= size:
                break
            episodes.append(episode if size is None else episode.cut(size - steps))
            steps += len(episodes[-1])
        progress(steps)
    return episodes


def _rollout_batch(recipe: Recipe, seeds: list[int], rng: np.random.Generator) -> list[Episode]:
    """One episode from each seed, all in step."""
    task, count = recipe.recorded_table, len(seeds)
    env = TabularVectorEnv(count, recipe.task, **(recipe.recorded or recipe.parameters))
    observations = np.empty(
        (task.limit + 1, count, *(env.single_observation_space.shape or ())), env.observation_space.dtype
    )
    actions, noise = np.empty((2, task.limit, count), np.int64)
    rewards, running = np.empty((task.limit, count), np.float32), np.ones(count, bool)
    lengths, ended, thresholds = np.zeros(count, np.int64), np.zeros(count, bool), recipe.behaviour.cumsum(-1)[:, :-1]
    observations[0], _ = env.reset(seed=seeds)
    for t in range(task.limit):
        actions[t] = (thresholds[env.state] <= rng.random(count)[:, None]).sum(-1)
        observations[t + 1], rewards[t], terminated, truncated, info = env.step(actions[t])
        noise[t] = info["noise"]
        lengths += running
        ended |= running & terminated
        running &= ~(terminated | truncated)
        if not running.any():
            break
    return [
        Episode(observations[: n + 1, i], actions[:n, i], rewards[:n, i], bool(ended[i]), seeds[i], noise[:n, i])
        for i, n in enumerate(lengths.tolist())
    ]


# ---- recipes -------------------------------------------------------------------------------------------------------


def _bandit(text: str | None) -> Recipe:
    """1000 pulls of a behaviour that prefers the worse arm: with probability 1 - p, in the skewed set 0.95 at p = 0.3."""
    p = 0.3 if text is None else float(text)
    if not 0 < p < 0.5:
        raise OffrlError(f"bandit/p{text}: p should lie between 0 and 0.5; arm 1 is the better one then.")
    worse = 0.95 if text is None else 1 - p
    behaviour = np.array([[worse, 1 - worse]])
    return Recipe("bandit", {"p": p}, behaviour, f"arm 0 with probability {worse:g}", 1000, (1,), success=1)


def _lake(slip: str, epsilon: str, episodes: str) -> Recipe:
    """Epsilon-greedy around the value-iteration policy (discount 0.99) of the same slip."""
    p, eps = 1 / 3 if slip == "0.33" else float(slip), float(epsilon)
    task = make_task("lake", no_slip_prob=p)
    behaviour = exact.epsilon_greedy(exact.value_iteration(task, 0.99), eps)
    described = f"{epsilon}-greedy around the policy of value iteration, discount 0.99"
    return Recipe("lake", {"no_slip_prob": p}, behaviour, described, int(episodes), (1,), success=1)


def _grid(variant: str, episodes: str) -> Recipe:
    """Thirds of random walks, walks to the waypoint, and walks from the waypoint to the paying door."""
    described = "a third each of random walks, walks to the waypoint and walks from it to the paying door"
    task, recorded = {"variant": variant}, {"variant": variant, "modes": hidden_grid.MODES}
    behaviour = hidden_grid.behaviour(variant)
    return Recipe("grid", task, behaviour, described, int(episodes), (), success=1, recorded=recorded)


def _uniform(task: str, episodes: int, targets: tuple[int, ...], success: int | None = None) -> Callable[[], Recipe]:
    return lambda: Recipe(task, {}, exact.uniform(make_task(task)), "uniform actions", episodes, targets, success)


_PATTERNS: dict[str, Callable[..., Recipe]] = {
    rf"bandit/(?:p{SHARE}|skewed)": _bandit,
    rf"lake/p{SHARE}-eps{SHARE}-n([1-9]\d*)": _lake,
    rf"grid/({'|'.join(OUTCOMES)})-n([1-9]\d*)": _grid,
    "cliff/uniform": _uniform("cliff", 10_000, (11,), success=-15),
    "gambling/uniform": _uniform("gambling", 50_000, (5, 1)),
    "toy/uniform": _uniform("toy", 1000, (6,)),
    "mstoy/uniform": _uniform("mstoy", 1000, (10,)),
}
