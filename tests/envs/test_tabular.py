"""Finite stochastic tasks: the published rules, exact values against tables and brute force, and the two ways of stepping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from offrl.envs import TABULAR_IDS
from offrl.envs import tabular_solver as tabular
from offrl.envs.tabular_env import TabularVectorEnv
from offrl.envs.tabular_solver import Array, Tabular
from offrl.envs.tabular_tasks import TASKS, make_task
from offrl.utils.errors import OffrlError

# (slip, epsilon): behaviour, RCSL sampled, one-step improvement; and RCSL by the likeliest action, all published to 3 digits
# in the method's notes and computed there by another program.
LAKE = {
    1 / 3: (
        0.744,
        {0.1: (0.406, 0.483, 0.737), 0.4: (0.099, 0.158, 0.730), 1.0: (0.014, 0.031, 0.730)},
        (0.740, 0.730),
    ),
    0.5: (0.794, {0.1: (0.405, 0.499, 0.770), 0.4: (0.094, 0.169, 0.437), 1.0: (0.014, 0.043, 0.255)}, (0.766, 0.255)),
    0.7: (0.851, {0.1: (0.519, 0.627, 0.738), 0.4: (0.182, 0.373, 0.569), 1.0: (0.014, 0.132, 0.563)}, (0.754, 0.563)),
    0.9: (0.942, {0.1: (0.776, 0.866, 0.885), 0.4: (0.407, 0.779, 0.885), 1.0: (0.014, 0.536, 0.883)}, (0.889, 0.883)),
    1.0: (1.000, {0.1: (0.896, 1.000, 1.000), 0.4: (0.542, 1.000, 1.000), 1.0: (0.014, 1.000, 1.000)}, (1.000, 1.000)),
}
LAKE_LENGTHS = {1 / 3: 15.5, 0.7: 10.55, 1.0: 6.8}  # at epsilon 0.4


def rounded(value: float, expected: float, digits: int = 3) -> bool:
    return abs(value - expected) <= 0.5 * 10**-digits + 1e-9


def random_policy(task: Tabular, seed: int = 0) -> Array:
    return np.random.default_rng(seed).dirichlet(np.ones(task.actions), (task.limit, task.states))


def mean_length(task: Tabular, policy: Array) -> float:
    """Expected number of steps of an episode: its value if every step pays 1."""
    return tabular.value(replace(task, reward=np.ones_like(task.reward)), policy)


def cliff_walker(row: int | None = None) -> Array:
    """`[S, A]`: the scripted walkers of the cliff.

    Args:
        row: the blind walker of that row, which takes it in the first column, goes right whatever happens, and down in the
            last; None: the careful one, which keeps to the middle row.
    """
    right, up, down = 1, 2, 3
    aim = 1 if row is None else row
    best = np.full(15, right)
    for state in range(15):
        y, x = divmod(state, 5)
        if x == 4:
            best[state] = down
        elif y != aim and (row is None or x == 0):
            best[state] = up if y < aim else down
    return np.eye(4)[best]


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_transition_tables_are_what_the_environment_does(name: str) -> None:
    task = make_task(name)
    assert task.noise.sum() == pytest.approx(1, abs=1e-12)
    table = task.transitions()
    np.testing.assert_allclose(table.sum(-1), 1, atol=1e-12)
    draws = 100_000
    env, rng = TabularVectorEnv(draws, name), np.random.default_rng(0)
    env.reset(seed=None)
    env.generators = [rng] * draws  # one generator for all: seeding a hundred thousand takes a second
    state, action = rng.integers(task.states, size=draws), rng.integers(task.actions, size=draws)
    env.state = state
    *_, info = env.step(action)
    counts = np.zeros_like(table)
    np.add.at(counts, (state, action, env.state), 1)
    tried = counts.sum(-1, keepdims=True)
    error = np.sqrt(table * (1 - table) * tried)
    assert (np.abs(counts - table * tried) <= 4.5 * error).all()  # at most 300 cells
    # The noise knows nothing of the action: chi-square of the table (action, noise), at 4 standard deviations.
    seen = np.zeros((task.actions, len(task.noise)))
    np.add.at(seen, (action, info["noise"]), 1)
    expected = seen.sum(1, keepdims=True) * task.noise
    possible = expected > 0
    statistic = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = max(1, possible.sum() - task.actions)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("slippery", [True, False])
def test_the_lake_at_its_two_stock_levels_is_frozen_lake(slippery: bool) -> None:
    stock: Any = gymnasium.make("FrozenLake-v1", is_slippery=slippery).unwrapped
    task = make_task("lake", no_slip_prob=1 / 3 if slippery else 1.0)
    table, reward, ends = task.transitions(), task.after(np.zeros(16)), (task.terminal * task.noise).sum(-1)
    for state in (s for s in range(16) if stock.desc.ravel()[s] not in (b"H", b"G")):
        for action in range(4):
            outcomes = stock.P[state][action]
            expected = np.zeros(16)
            for probability, successor, _, _ in outcomes:
                expected[successor] += probability
            np.testing.assert_allclose(table[state, action], expected, atol=1e-12)
            assert reward[state, action] == pytest.approx(sum(p * r for p, _, r, _ in outcomes))
            assert ends[state, action] == pytest.approx(sum(p for p, _, _, done in outcomes if done))


def test_bad_parameters() -> None:
    with pytest.raises(OffrlError, match=r"no_slip_prob=1.5 is a probability"):
        gymnasium.make(TABULAR_IDS["lake"], no_slip_prob=1.5)
    with pytest.raises(OffrlError, match="no such finite task"):
        make_task("lakes")


# ---- stepping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_gymnasium_accepts_them(name: str) -> None:
    env = gymnasium.make(TABULAR_IDS[name])
    check_env(env.unwrapped, skip_render_check=True)
    assert env.spec is not None
    assert env.spec.max_episode_steps == make_task(name).limit
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    np.testing.assert_array_equal(again.unwrapped.task.successor, make_task(name).successor)


@pytest.mark.parametrize("name", TASKS)
def test_the_vector_plays_the_episodes_of_the_single_environment(name: str) -> None:
    env_id, rows, rng = TABULAR_IDS[name], 5, np.random.default_rng(1)
    ours = gymnasium.make_vec(env_id, rows)
    single = SyncVectorEnv([lambda: gymnasium.make(env_id)] * rows)
    assert isinstance(ours.unwrapped, TabularVectorEnv)
    assert (ours.observation_space, ours.action_space) == (single.observation_space, single.action_space)
    for seed in (7, [3, 1, 4, 1, 5], None):  # several episodes each, the last ones go on drawing
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], single.reset(seed=seed)[0])
        for _ in range(150):
            action = rng.integers(ours.single_action_space.n, size=rows)
            (*got, info), (*expected, metadata) = ours.step(action), single.step(action)
            for a, b in zip(got, expected):
                np.testing.assert_array_equal(a, b)
            for key in ("noise", "intended_action"):
                np.testing.assert_array_equal(info[key], metadata[key])


def test_a_time_limit_truncates() -> None:
    for env in (gymnasium.make(TABULAR_IDS["lake"], max_episode_steps=3), gymnasium.make(TABULAR_IDS["lake"])):
        env.reset(seed=0)
        steps, over = 0, False
        while not over:  # from the left border up into the wall
            env.unwrapped.state = 0
            _, _, terminated, truncated, _ = env.step(0)
            over, steps = terminated or truncated, steps + 1
        assert (steps, terminated, truncated) == (env.spec.max_episode_steps, False, True)
    env = gymnasium.make_vec(TABULAR_IDS["lake"], 2, max_episode_steps=3)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, int))[2:4] for _ in range(3)]
    assert [truncated.tolist() for _, truncated in ends] == [[False, False], [False, False], [True, True]]


# ---- exact values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.2, 0.3, 0.4])
def test_bandit_values(p: float) -> None:
    task = make_task("bandit", p=p)
    mirrored = np.array([[1 - p, p]])
    rcsl = tabular.rcsl(task, mirrored)
    assert tabular.optimum(task) == pytest.approx(1 - p)
    assert tabular.value(task, mirrored) == pytest.approx(2 * p * (1 - p))
    assert rcsl.value(1) == pytest.approx(0.5)
    np.testing.assert_allclose(rcsl.policy()[0, 0, :, 1], [0.5, 0.5])
    skewed = tabular.rcsl(make_task("bandit", p=0.3), np.array([[0.95, 0.05]]))
    assert rounded(skewed.value(1), 0.344)
    assert rounded(skewed.policy()[0, 0, 1, 1], 0.109)
    assert rounded(skewed.probability(1), 0.32, 12)


@pytest.mark.parametrize("slip", LAKE)
def test_lake_values(slip: float) -> None:
    task = make_task("lake", no_slip_prob=slip)
    best, rows, likeliest = LAKE[slip]
    greedy = tabular.value_iteration(task, 0.99)
    assert rounded(tabular.optimum(task), best)
    for epsilon, (behaviour, sampled, improved) in rows.items():
        policy = tabular.epsilon_greedy(greedy, epsilon)
        rcsl = tabular.rcsl(task, policy)
        assert rounded(tabular.value(task, policy), behaviour)
        assert rcsl.probability(1) == pytest.approx(tabular.value(task, policy))
        assert rounded(rcsl.value(1), sampled)
        assert rounded(rcsl.value(1, likeliest=True), likeliest[epsilon == 1])
        assert rounded(tabular.value(task, tabular.improved(task, policy)), improved)
    if slip in LAKE_LENGTHS:
        length = mean_length(task, tabular.epsilon_greedy(greedy, 0.4))
        assert abs(length - LAKE_LENGTHS[slip]) < 0.06


def test_cliff_values() -> None:
    task = make_task("cliff")
    uniform = tabular.uniform(task)
    rcsl = tabular.rcsl(task, uniform)
    assert rounded(tabular.optimum(task), 5.571)
    assert rounded(tabular.value(task, cliff_walker()), 5.571)
    assert rounded(tabular.value(task, cliff_walker(1)), -0.17, 2)
    assert rounded(tabular.value(task, cliff_walker(0)), -8.52, 2)
    assert rounded(tabular.value(task, uniform), -27.61, 2)
    assert rounded(rcsl.value(11), -18.83, 2)
    assert rounded(rcsl.probability(11), 9.4e-4, 5)
    assert rounded(mean_length(task, uniform), 2.9, 1)


def test_gambling_and_toy_values() -> None:
    task = make_task("gambling")
    np.testing.assert_allclose(tabular.action_values(task)[0, 0], [-5, -2.5, 1])
    rcsl = tabular.rcsl(task, tabular.uniform(task))
    assert rcsl.value(5) == pytest.approx(-5)
    assert rcsl.value(1) == pytest.approx(-1 / 6)
    np.testing.assert_allclose(rcsl.policy()[0, 0, :, 1 - rcsl.lowest], [0, 1 / 3, 2 / 3])
    toy = make_task("toy")
    np.testing.assert_allclose(tabular.action_values(toy)[0, 0], [10 / 3, 3])
    np.testing.assert_allclose(tabular.rcsl(toy, tabular.uniform(toy)).policy()[0, 0, :, 6], [0.5, 0.5])
    two = make_task("mstoy")
    np.testing.assert_allclose(tabular.action_values(two)[0, 0], [5.5, 7, 7])
    np.testing.assert_allclose(tabular.action_values(two)[1, 1:], [[5, 5, 0], [6, 1, 2]])


def trajectories(task: Tabular, policy: Array) -> Iterator[tuple[float, list[tuple[int, int, int, int]]]]:
    """Every episode that can happen: its probability and steps (time, state, action, reward)."""
    stack: list[Any] = [(1.0, 0, [])]
    while stack:
        chance, state, steps = stack.pop()
        for action, noise in np.ndindex(task.actions, len(task.noise)):
            place, t = (state, action, noise), len(steps)
            probability = chance * policy[t, state, action] * task.noise[noise]
            done = [*steps, (t, state, action, int(task.reward[place]))]
            if task.terminal[place] or t + 1 == task.limit:
                yield probability, done
            else:
                stack.append((probability, int(task.successor[place]), done))


def shortened(name: str, start: int, limit: int) -> Tabular:
    """A task that begins in another state and ends after so many steps."""
    task, order = make_task(name), np.arange(make_task(name).states)
    order[[0, start]] = order[[start, 0]]  # its own inverse
    return Tabular(task.noise, order[task.successor[order]], task.reward[order], task.terminal[order], limit)


@pytest.mark.parametrize(
    ("name", "start", "limit", "target"),
    [("gambling", 0, 2, 1), ("mstoy", 0, 2, 6), ("lake", 10, 4, 1), ("cliff", 1, 4, 12)],
)
def test_exact_values_by_enumeration(name: str, start: int, limit: int, target: int) -> None:
    """Values, lengths and RCSL against sums over all episodes of a task that was made short enough."""
    task = shortened(name, start, limit)
    policy = random_policy(task)
    chances, episodes = zip(*trajectories(task, policy))
    returns = np.array([sum(step[3] for step in steps) for steps in episodes])
    assert sum(chances) == pytest.approx(1)
    assert tabular.value(task, policy) == pytest.approx(np.dot(chances, returns))
    assert mean_length(task, policy) == pytest.approx(np.dot(chances, [len(steps) for steps in episodes]))
    rcsl = tabular.rcsl(task, policy)
    assert rcsl.probability(target) == pytest.approx(np.sum(chances, where=returns == target))
    assert rcsl.probability(target) > 0
    # P(a | s, t, return to come) is what counting the episodes' steps gives.
    counts: dict[tuple[int, int, int], Array] = {}
    for chance, steps in zip(chances, episodes):
        togo = sum(step[3] for step in steps)
        for t, state, action, reward in steps:
            counts.setdefault((t, state, togo), np.zeros(task.actions))[action] += chance
            togo -= reward
    for (t, state, togo), weights in counts.items():
        expected = rcsl.policy()[t, state, :, togo - rcsl.lowest]
        np.testing.assert_allclose(weights / weights.sum(), expected, atol=1e-9)


@pytest.mark.parametrize(("name", "target"), [("lake", 1), ("cliff", 11), ("gambling", 1)])
def test_rcsl_values_by_simulation(name: str, target: int) -> None:
    """Playing the conditioned policy with its running target earns its exact value, within 4 standard errors."""
    task, count, rng = make_task(name), 10_000, np.random.default_rng(5)
    rcsl = tabular.rcsl(task, tabular.uniform(task))
    env, policy = TabularVectorEnv(count, name), rcsl.policy()
    env.generators = [rng] * count
    left, returns, running = np.full(count, target), np.zeros(count), np.ones(count, bool)
    for t in range(task.limit):
        index = left - rcsl.lowest
        inside = (index >= 0) & (index < policy.shape[-1])
        probabilities = np.full((count, task.actions), 1 / task.actions)
        probabilities[inside] = policy[t, env.state[inside], :, index[inside]]
        action = (probabilities.cumsum(-1)[:, :-1] <= rng.random((count, 1))).sum(-1)
        _, reward, terminated, truncated, _ = env.step(action)
        returns[running] += reward[running]
        left = left - reward.astype(int)
        running &= ~(terminated | truncated)
    assert not running.any()
    assert abs(returns.mean() - rcsl.value(target)) < 4 * returns.std() / np.sqrt(count)
