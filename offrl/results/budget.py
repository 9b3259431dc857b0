"""The value of online evaluations, and the quality of a ranking made without any; functions of scores.

- Expected online performance: the best of k policies, each evaluated accurately (Kurenkov & Kolesnikov, "Showing Your Offline
  Reinforcement Learning Work: Online Evaluation Budget Matters", ICML 2022, arXiv 2110.04156).
- Bandit tuning: a budget of single episodes, spent by UCB on a few trained policies (Jackson et al., "A Clean Slate for Offline
  Reinforcement Learning", 2025, arXiv 2504.11453).

Deviations from the released code of the second: an arm that was not pulled is never recommended (there it counts as 0, which
wins when scores are negative), and the interval is over resampled pools of policies, not over repeated simulations of one
pool, whose width depends only on the number of simulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from offrl.results.stats import Array

# Numbers of policies evaluated exactly, and of episodes spent by a bandit, in tables.
KS, PULLS = (1, 2, 3, 5, 10), (1, 8, 16, 64, 200)


# ---- the best of k -------------------------------------------------------------------------------------------


def expected_best(scores: ArrayLike, ks: Sequence[int], replace: bool = True) -> tuple[Array, Array]:
    """EOP(k) and SD(k), each `[len(ks)]`: mean and standard deviation of the best of k policies drawn from N.

    Args:
        scores: `[N]` online score of each configuration, averaged over its seeds.
        ks: each between 1 and N.
        replace: draw with replacement, as published; without, EOP(N) is the largest score.

    With the scores sorted, P(best = v_(i)) is (i/N)^k - ((i-1)/N)^k, or C(i-1, k-1) / C(N, k) without replacement. SD is the
    standard deviation of one practitioner's outcome, not an interval of the mean.
    """
    v = np.sort(np.asarray(scores, dtype=np.float64).ravel())
    n = len(v)
    if not all(1 <= k <= n for k in ks):
        raise ValueError(f"k must lie between 1 and the number of policies, {n}; got {list(ks)}")
    i = np.arange(1, n + 1)
    if replace:
        k = np.asarray(ks, dtype=np.float64)[:, None]
        p = (i / n) ** k - ((i - 1) / n) ** k
    else:
        p = np.array([[math.comb(int(j) - 1, k - 1) / math.comb(n, k) for j in i] for k in ks])
    best = p @ v
    return best, np.sqrt((p * (v - best[:, None]) ** 2).sum(-1))


# ---- single episodes spent by a bandit -----------------------------------------------------------------------


@dataclass(frozen=True)
class BanditCurve:
    """True mean score of the recommended policy against the number of episodes spent.

    Attributes:
        pulls: `[T]` 1 ... T.
        mean: `[T]` over trials.
        low, high: `[T]` 95 % percentile interval over resampled pools; NaN with `pools=0`.
        limit: limit of the curve, the expected largest true mean of K policies.
        k: number of policies in a trial.
    """

    pulls: Array
    mean: Array
    low: Array
    high: Array
    limit: float
    k: int


def bandit_curve(
    episodes: Sequence[ArrayLike],
    k: int = 8,
    pulls: int = 200,
    trials: int = 1000,
    pools: int = 100,
    alpha: float = 2.0,
    seed: int = 0,
) -> BanditCurve:
    """Simulated tuning: K of the policies, one episode at a time by UCB, the best mean so far recommended.

    Args:
        episodes: for each trained policy its normalised scores, one per evaluation episode.
        k: number of policies in a trial, drawn without replacement (at most all).
        trials: number of simulations for the mean.
        pools: number of resampled sets of policies (and of episodes within each) for the interval; 0: no interval.
        alpha: factor in the bonus sqrt(alpha ln t / n). The released value 2 goes with scores around 100: after every policy
            was tried once the bandit is nearly greedy. On UCB's scale of scores in [0, 1] the equivalent is 2e4.
    """
    rng = np.random.default_rng(seed)
    rows = [np.asarray(row, dtype=np.float64).ravel() for row in episodes]
    k = min(k, len(rows))
    lengths = np.array([len(row) for row in rows])
    table = np.zeros((1, len(rows), lengths.max()))
    for row, scores in enumerate(rows):
        table[0, row, : len(scores)] = scores
    rule = (k, pulls, alpha)
    (mean,) = _simulate(table, lengths[None], trials, *rule, rng)
    low = high = np.full(pulls, np.nan)
    if pools:
        drawn = rng.integers(len(rows), size=(pools, len(rows)))
        inside = (rng.random((pools, *table.shape[1:])) * lengths[drawn][..., None]).astype(np.int64)
        curves = _simulate(table[0][drawn[..., None], inside], lengths[drawn], 50, *rule, rng)
        low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    limit = expected_best([row.mean() for row in rows], [k], replace=False)[0][0]
    return BanditCurve(np.arange(1.0, pulls + 1), mean, low, high, float(limit), k)


def _simulate(
    table: Array, lengths: np.ndarray, trials: int, k: int, pulls: int, alpha: float, rng: np.random.Generator
) -> Array:
    """`[pools, T]`: mean curves of `trials` simulations on each pool of policies.

    Args:
        table: `[pools, P, R]` scores; lengths: `[pools, P]` number of valid scores in each row.
    """
    pools, policies, _ = table.shape
    valid = np.arange(table.shape[-1]) < lengths[..., None]
    means = (table * valid).sum(-1) / lengths
    pool = np.repeat(np.arange(pools), trials)[:, None]
    arms = rng.random((pools * trials, policies)).argsort(-1)[:, :k]
    truth, length = means[pool, arms], lengths[pool, arms]
    count, total = np.zeros((2, *arms.shape))
    each = np.arange(len(arms))
    curve = np.empty((pulls, pools))
    for t in range(1, pulls + 1):
        bonus = np.sqrt(alpha * math.log(t) / np.maximum(count, 1))
        bound = np.where(count > 0, total / np.maximum(count, 1) + bonus, np.inf)  # each arm once before others again
        j = ((bound == bound.max(-1, keepdims=True)) * (1 + rng.random(bound.shape))).argmax(-1)  # ties at random
        episode = (rng.random(len(arms)) * length[each, j]).astype(np.int64)
        total[each, j] += table[pool[:, 0], arms[each, j], episode]
        count[each, j] += 1
        best = np.where(count > 0, total / np.maximum(count, 1), -np.inf).argmax(-1)
        curve[t - 1] = truth[each, best].reshape(pools, trials).mean(-1)
    return curve.T


# ---- judging a ranking ---------------------------------------------------------------------------------------


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; ties get their mean rank. NaN for fewer than two values or when one side is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return math.nan
    return float(scipy.stats.spearmanr(x, y).statistic)


def regret_at(offline: ArrayLike, online: ArrayLike, k: int) -> float:
    """The loss from evaluating only the k policies with the highest offline scores.

    (max v - max of the top k's v) / (max v - min v), with v the online scores: 0 is perfect, 1 the worst.
    """
    v = np.asarray(online, dtype=np.float64)
    spread = v.max() - v.min()
    return float((v.max() - offline_best(offline, v)[min(k, len(v)) - 1]) / spread) if spread else 0.0


def offline_best(offline: ArrayLike, online: ArrayLike) -> Array:
    """`[N]`: the best online score among the first k policies by their offline scores, k = 1 ... N."""
    order = np.argsort(-np.asarray(offline, dtype=np.float64), kind="stable")
    return np.maximum.accumulate(np.asarray(online, dtype=np.float64)[order])
