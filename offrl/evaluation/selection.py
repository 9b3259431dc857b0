"""Rankings of trained policies by fitted Q evaluation, and their quality where true scores are known.

A ranking is compared with true scores, and with what the same number of online evaluations would have bought
(`offrl.results.budget`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offrl.results import budget
from offrl.results.stats import Array


@dataclass
class Policy:
    """A lane of a checkpoint.

    Attributes:
        lane: number of the lane in its run; lanes may share a seed.
        value, soft_opc, td_error: estimates of fitted Q evaluation, discounted, in units of rewards.
        episodes: scores of the evaluation at this checkpoint's update; empty when there was none.
    """

    method: str
    seed: int
    step: int
    folder: Path
    lane: int
    value: float
    soft_opc: float
    td_error: float
    episodes: Array

    @property
    def score(self) -> float:
        return float(self.episodes.mean()) if len(self.episodes) else math.nan

    @property
    def merit(self) -> float:
        """The estimate by which policies are ranked: one that is not finite (the evaluation diverged) is the worst."""
        return self.value if math.isfinite(self.value) else -math.inf


@dataclass
class Selection:
    """The policies of a dataset, best estimate first, and the quality of their ranking.

    Attributes:
        known: policies with a true score, in the same order.
        spearman: rank correlation of estimates and true scores. regret: k -> regret@k (0 perfect, 1 worst).
        ks: 1 ... number of configurations.
        uniform, spread: `[len(ks)]` expected best of k configurations that are drawn uniformly, and its std.
        selected: `[len(ks)]` best of the k configurations with the highest estimates.
        bandit: result of a UCB bandit that spends single episodes on these policies.
    """

    dataset: str
    scale: str
    policies: list[Policy]
    known: list[Policy]
    spearman: float
    regret: dict[int, float]
    ks: list[int]
    uniform: Array
    spread: Array
    selected: Array
    bandit: budget.BanditCurve | None


def judge(dataset: str, scale: str, policies: Sequence[Policy], seed: int = 0) -> Selection:
    """Order policies by their estimates, and compare with true scores where there are some.

    A configuration of the best-of-k curves is a method with its settings at a checkpoint. Its estimate and its score are
    averages over seeds. Policies whose estimate is not finite come last.
    """
    ranked = sorted(policies, key=lambda p: -p.merit)
    known = [p for p in ranked if not math.isnan(p.score)]
    nothing = np.empty(0)
    made = Selection(dataset, scale, ranked, known, math.nan, {}, [], nothing, nothing, nothing, None)
    if len(known) < 2:
        return made
    value, score = np.array([p.merit for p in known]), np.array([p.score for p in known])
    made.spearman = budget.spearman(value, score)
    made.regret = {k: budget.regret_at(value, score, k) for k in budget.KS if k <= len(known)}
    groups: dict[tuple[str, int], list[Policy]] = {}
    for policy in known:
        groups.setdefault((policy.method, policy.step), []).append(policy)
    values, scores = np.array([np.mean([(p.merit, p.score) for p in g], axis=0) for g in groups.values()]).T
    made.ks = list(range(1, len(scores) + 1))
    made.uniform, made.spread = budget.expected_best(scores, made.ks)
    made.selected = budget.offline_best(values, scores)
    made.bandit = budget.bandit_curve([p.episodes for p in known], seed=seed)
    return made
