"""Statistics of scores: means with t intervals for one cell, IQM and stratified bootstrap for several tasks.

Scores of several tasks are a sequence of arrays, one per task, `[..., S_m]` with the runs (seeds) of task m in the last
dimension; tasks may have different numbers of runs. Leading dimensions, where there are any, are kept.

Aggregates follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Tasks = Sequence[Array]

# Resamples per block, so that comparing all pairs of runs needs tens of megabytes only.
_BLOCK = 256


# ---- one cell: the runs of a method on one task --------------------------------------------------------------


def mean_std(scores: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof 1; NaN for a single score) over all entries."""
    x = np.asarray(scores, dtype=np.float64).ravel()
    return float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else math.nan


def t_interval(scores: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent scores; (NaN, NaN) for fewer than two."""
    x = np.asarray(scores, dtype=np.float64).ravel()
    mean, std = mean_std(x)
    half = float(t_half_width(std, x.size, confidence))
    return mean - half, mean + half


def t_half_width(std: ArrayLike, count: ArrayLike, confidence: float = 0.95) -> Array:
    """Half the width of the t interval of a mean of `count` scores with sample standard deviation `std`.

    Both `[...]`; NaN where `count` is below two.
    """
    n = np.asarray(count, dtype=np.float64)
    quantile = scipy.stats.t.ppf(0.5 + confidence / 2, np.maximum(n - 1, 1))
    return np.where(n > 1, quantile * np.asarray(std, dtype=np.float64) / np.sqrt(n), np.nan)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22): shares in [0, 1]; (NaN, NaN) without a trial.

    The p at which |share - p| is z standard errors sqrt(p (1 - p) / trials); it is right near 0 and 1 as well.
    """
    if trials == 0:
        return math.nan, math.nan
    z, share = float(scipy.stats.norm.ppf(0.5 + confidence / 2)), successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


# ---- aggregates over tasks -----------------------------------------------------------------------------------


def iqm(tasks: Tasks) -> Array:
    """Interquartile mean of the pooled runs of all tasks: `[...]`.

    Sorts the n values, drops `floor(n / 4)` from each end and averages the rest, as `scipy.stats.trim_mean(x, 0.25)`.
    Runs are pooled, so a task with more runs weighs more. NaN where a run has no score: sorted last, it would be the best.
    """
    pooled = np.sort(np.concatenate([np.asarray(x, dtype=np.float64) for x in tasks], axis=-1), axis=-1)
    n = pooled.shape[-1]
    return np.where(np.isnan(pooled[..., -1]), np.nan, pooled[..., n // 4 : n - n // 4].mean(-1))


def task_mean(tasks: Tasks) -> Array:
    """Mean over tasks of the mean over runs: `[...]`; every task weighs the same."""
    return np.mean([np.asarray(x, dtype=np.float64).mean(-1) for x in tasks], axis=0)


def optimality_gap(tasks: Tasks, gamma: float = 100.0) -> Array:
    """Mean shortfall of the runs below `gamma`: gamma - mean(min(score, gamma)); every task weighs the same."""
    return gamma - task_mean([np.minimum(np.asarray(x, dtype=np.float64), gamma) for x in tasks])


def performance_profile(tasks: Tasks, thresholds: ArrayLike) -> Array:
    """Share of runs with a score strictly greater than each threshold `[T]`, mean over tasks: `[T]`."""
    tau = np.asarray(thresholds, dtype=np.float64)
    return np.mean([(np.asarray(x)[:, None] > tau).mean(0) for x in tasks], axis=0)


def profile_band(
    tasks: Tasks, thresholds: ArrayLike, resamples: int = 500, confidence: float = 0.95, seed: int = 0
) -> tuple[Array, Array]:
    """Pointwise percentile interval `[T]`, `[T]` of the performance profile, runs resampled within each task."""
    rng, tau = np.random.default_rng(seed), np.asarray(thresholds, dtype=np.float64)
    profiles = np.zeros((resamples, len(tau)))
    for x in tasks:
        drawn = np.sort(_resample(np.asarray(x, dtype=np.float64), resamples, rng), axis=-1)
        above = [len(runs) - np.searchsorted(runs, tau, side="right") for runs in drawn]
        profiles += np.array(above) / (drawn.shape[-1] * len(tasks))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(profiles, [tail, 100.0 - tail], axis=0)
    return low, high


def probability_of_improvement(x: Tasks, y: Tasks) -> Array:
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs of a task, averaged over tasks: `[...]`.

    Per task this is the Mann-Whitney U divided by S_x S_y. It says nothing about the size of the improvement.
    """
    if len(x) != len(y):
        raise ValueError(f"both methods need the same tasks, got {len(x)} and {len(y)}")
    per_task = []
    for ours, theirs in zip(x, y):
        a, b = np.asarray(ours)[..., :, None], np.asarray(theirs)[..., None, :]
        pairs = a.shape[-2] * b.shape[-1]
        wins = np.count_nonzero(a > b, axis=(-2, -1)) + np.count_nonzero(a >= b, axis=(-2, -1))
        per_task.append(wins / (2 * pairs))
    return np.mean(per_task, axis=0)


def stratified_bootstrap(
    statistic: Callable[..., Array],
    *methods: Tasks,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic when runs are resampled with replacement within each task.

    Args:
        statistic: called as `statistic(*resampled)`; reduces the last dimension of every task, keeps the leading one.
        methods: for each argument of the statistic its tasks, arrays `[S_m]`; methods are resampled independently.
        seed: the same seed gives the same interval; the process's global generators are not touched.

    With few runs it is too narrow (nominal 95 % covers about 89 % at 4 runs, 93 % at 10, for the IQM of 9 tasks);
    with one run per task its width is zero.
    """
    rng = np.random.default_rng(seed)
    values = []
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn = [[_resample(np.asarray(x, dtype=np.float64), block, rng) for x in tasks] for tasks in methods]
        values.append(statistic(*drawn))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(np.concatenate(values), [tail, 100.0 - tail])
    return float(low), float(high)


def _resample(runs: Array, count: int, rng: np.random.Generator) -> Array:
    return runs[rng.integers(len(runs), size=(count, len(runs)))]
