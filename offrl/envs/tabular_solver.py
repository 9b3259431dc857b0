"""Finite tasks with exogenous noise as tables, and their exact solutions: optimum, value of a policy, RCSL.

Every step draws a noise index k from a fixed distribution that depends on neither state nor action; state, action and k
determine reward and next state. So a dataset can record the noise, and no policy can influence it.

All values are undiscounted expected returns of one episode from its start, with the task's time limit. A policy is a table
of probabilities `[S, A]`, or `[T, S, A]` when it depends on the step.

Return-conditioned supervised learning (RCSL: decision transformer, RvS, upside-down RL) with unlimited data and capacity is
pi(a | s, t, g) = P(a | s, t, G_t = g) under the behaviour, where G_t is the return to go and g the rest of the target. `rcsl`
computes that policy by Bayes' rule from the behaviour's exact distribution of returns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Tabular:
    """A task of S states, A actions and K values of the noise, which starts in state 0.

    Attributes:
        noise: `[K]` probabilities of the noise.
        successor: `[S, A, K]` next state.
        reward: `[S, A, K]` whole numbers.
        terminal: `[S, A, K]` whether the task ends.
        limit: steps after which an episode is truncated.
        coordinates: `[S, O]` observation of each state; None: the state's number.
    """

    noise: Array
    successor: Integers
    reward: Integers
    terminal: NDArray[np.bool_]
    limit: int
    coordinates: NDArray[np.float32] | None = None

    @property
    def states(self) -> int:
        return self.successor.shape[0]

    @property
    def actions(self) -> int:
        return self.successor.shape[1]

    def transitions(self) -> Array:
        """`[S, A, S]`: probability of each next state (in which the task may have ended)."""
        table = np.zeros((self.states, self.actions, self.states))
        state, action = np.indices((self.states, self.actions))
        for k, probability in enumerate(self.noise):
            np.add.at(table, (state, action, self.successor[:, :, k]), probability)
        return table

    def after(self, ahead: Array) -> Array:
        """`[S, A]`: expectation of the reward plus the value `ahead` `[S]` of the next state, which is 0 after an end."""
        return (self.reward + np.where(self.terminal, 0.0, ahead[self.successor])) @ self.noise


# ---- policies and their values -------------------------------------------------------------------------------------


def uniform(task: Tabular) -> Array:
    """`[S, A]`: the policy of uniform actions."""
    return np.full((task.states, task.actions), 1 / task.actions)


def epsilon_greedy(best: Array, epsilon: float) -> Array:
    """The policy `best` with probability 1 - epsilon, else a uniform action."""
    return (1 - epsilon) * best + epsilon / best.shape[-1]


def greedy(values: Array) -> Array:
    """One-hot of the largest value `[..., A]`; of equal ones (up to rounding) the first."""
    return np.eye(values.shape[-1])[np.isclose(values, values.max(-1, keepdims=True), 1e-9, 1e-12).argmax(-1)]


def action_values(task: Tabular, policy: Array | None = None) -> Array:
    """`[T, S, A]`: expected return to go after an action at step t, if `policy` acts from then on.

    Args:
        policy: None: the optimal policy.
    """
    values, ahead = np.zeros((task.limit, task.states, task.actions)), np.zeros(task.states)
    for t in reversed(range(task.limit)):
        values[t] = task.after(ahead)
        ahead = values[t].max(-1) if policy is None else (_at(policy, t) * values[t]).sum(-1)
    return values


def value(task: Tabular, policy: Array) -> float:
    """Expected return of a policy."""
    return float(_at(policy, 0)[0] @ action_values(task, policy)[0, 0])


def optimum(task: Tabular) -> float:
    """The largest expected return of any policy."""
    return float(action_values(task)[0, 0].max())


def belief_optimum(task: Tabular) -> float:
    """The largest expected return of any policy that sees the observations and its own actions, and not the state.

    It is computed over the beliefs that can be reached, with probabilities rounded to 12 digits; where they are many, this
    takes long. Rewards are not seen before the end.
    """
    looks = np.arange(task.states) if task.coordinates is None else _labels(task.coordinates)
    known: dict[tuple[int, tuple[tuple[int, float], ...]], float] = {}

    def best(t: int, belief: tuple[tuple[int, float], ...]) -> float:
        if t == task.limit or not belief:
            return 0.0
        if (t, belief) not in known:
            known[t, belief] = max(value_of(t, belief, action) for action in range(task.actions))
        return known[t, belief]

    def value_of(t: int, belief: tuple[tuple[int, float], ...], action: int) -> float:
        total, after = 0.0, dict[int, dict[int, float]]()
        for state, chance in belief:
            total += chance * float(task.reward[state, action] @ task.noise)
            for k, probability in enumerate(task.noise):
                there = int(task.successor[state, action, k])
                if not task.terminal[state, action, k]:
                    seen = after.setdefault(int(looks[there]), {})
                    seen[there] = seen.get(there, 0.0) + chance * float(probability)
        for states in after.values():
            mass = sum(states.values())
            total += mass * best(t + 1, tuple(sorted((s, round(p / mass, 12)) for s, p in states.items())))
        return total

    return best(0, ((0, 1.0),))


def _labels(coordinates: NDArray[np.float32]) -> Integers:
    """`[S]`: the same number for states that look the same."""
    return np.unique(coordinates, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def improved(task: Tabular, policy: Array) -> Array:
    """`[T, S, A]`: one step of policy improvement, greedy on the policy's own action values."""
    return greedy(action_values(task, policy))


def value_iteration(task: Tabular, discount: float = 0.99) -> Array:
    """`[S, A]`: the greedy policy of the discounted task without a time limit; of equal actions the first."""
    ahead = np.zeros(task.states)
    while True:
        values = (task.reward + discount * np.where(task.terminal, 0.0, ahead[task.successor])) @ task.noise
        if np.abs(values.max(-1) - ahead).max() < 1e-12:
            return greedy(values)
        ahead = values.max(-1)


def _at(policy: Array, t: int) -> Array:
    return policy[t] if policy.ndim == 3 else policy


# ---- return-conditioned supervised learning ------------------------------------------------------------------------


@dataclass(frozen=True)
class Rcsl:
    """The exact return-conditioned policy of a behaviour.

    Attributes:
        chance: `[T, S, A, G]` joint probability, under the behaviour, of the action and the return to go.
        lowest: return at index 0 of the last axis; the others follow in steps of 1.
    """

    task: Tabular
    chance: Array
    lowest: int

    def probability(self, target: int) -> float:
        """Probability of the return `target` in an episode of the behaviour."""
        index = target - self.lowest
        return float(self.chance[0, 0, :, index].sum()) if 0 <= index < self.chance.shape[-1] else 0.0

    def policy(self, likeliest: bool = False) -> Array:
        """`[T, S, A, G]`: P(a | s, t, return to go), uniform where that return is impossible.

        Args:
            likeliest: the most probable action instead of a draw; of equal ones the first.
        """
        total = self.chance.sum(2, keepdims=True)
        policy = np.where(total > 0, self.chance / np.where(total > 0, total, 1.0), 1 / self.task.actions)
        return np.moveaxis(greedy(np.moveaxis(policy, 2, -1)), -1, 2) if likeliest else policy

    def value(self, target: int, likeliest: bool = False) -> float:
        """Expected return of the policy with target `target` at the start, from which every reward is subtracted."""
        task, policy = self.task, self.policy(likeliest)
        # All rests of the target after any rewards, possible or not.
        left = np.arange(
            target - task.limit * max(0, task.reward.max()), target - task.limit * min(0, task.reward.min()) + 1
        )
        index, top = left - self.lowest, policy.shape[-1] - 1
        possible = (index >= 0) & (index <= top)
        ahead = np.zeros((task.states, len(left)))
        for t in reversed(range(task.limit)):
            values = np.zeros((task.states, task.actions, len(left)))
            for k, probability in enumerate(task.noise):
                reward, ends = task.reward[:, :, k, None], task.terminal[:, :, k, None]
                rest = np.clip(left - reward - left[0], 0, len(left) - 1)
                then = ahead[task.successor[:, :, k, None], rest]
                values += probability * (reward + np.where(ends, 0.0, then))
            chosen = np.where(possible, policy[t][..., np.clip(index, 0, top)], 1 / task.actions)
            ahead = (chosen * values).sum(1)
        return float(ahead[0, target - left[0]])


def rcsl(task: Tabular, behaviour: Array) -> Rcsl:
    """The return-conditioned policy of a behaviour's data, by backward induction over (state, return to go)."""
    low, high = _range_of_returns(task)
    returns = np.arange(low, high + 1)
    chance = np.zeros((task.limit, task.states, task.actions, len(returns)))
    ahead = np.tile(returns == 0, (task.states, 1)).astype(np.float64)  # [S, G]: probability of the return to go
    for t in reversed(range(task.limit)):
        for k, probability in enumerate(task.noise):
            reward, ends = task.reward[:, :, k, None], task.terminal[:, :, k, None]
            rest = np.clip(returns - reward, low, high)
            then = np.where(ends, rest == 0, ahead[task.successor[:, :, k, None], rest - low])
            inside = rest == returns - reward  # a rest beyond the range can't be
            chance[t] += probability * np.where(inside, then, 0.0)
        chance[t] *= _at(behaviour, t)[..., None]
        ahead = chance[t].sum(1)
    return Rcsl(task, chance, low)


def _range_of_returns(task: Tabular) -> tuple[int, int]:
    """The lowest and the highest possible return to go of any step, 0 included."""
    lowest, highest = np.zeros(task.states, np.int64), np.zeros(task.states, np.int64)
    low = high = 0
    for _ in range(task.limit):
        least = task.reward + np.where(task.terminal, 0, lowest[task.successor])
        most = task.reward + np.where(task.terminal, 0, highest[task.successor])
        lowest, highest = least.min((1, 2)), most.max((1, 2))
        low, high = min(low, int(lowest.min())), max(high, int(highest.max()))
    return low, high
