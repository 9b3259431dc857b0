"""Our statistics beside rliable's, where that is installed (`pip install rliable==1.2.0 "pandas<3" "arch<8"`)."""

from __future__ import annotations

import numpy as np
import pytest

from offrl.results import stats

metrics = pytest.importorskip(
    "rliable.metrics", reason='rliable 1.2.0 is not installed; it needs "pandas<3" and "arch<8"'
)
from rliable import library  # noqa: E402 - there when metrics are

RNG = np.random.default_rng(0)
X, Y = RNG.normal(RNG.uniform(20, 90, 9), 12, (2, 10, 9))  # 10 runs of 9 tasks, as rliable has them: [runs, tasks]


def tasks(matrix: np.ndarray) -> list[np.ndarray]:
    return list(matrix.T)


def test_point_estimates_are_equal() -> None:
    assert float(stats.iqm(tasks(X))) == pytest.approx(metrics.aggregate_iqm(X), rel=1e-12)
    assert float(stats.task_mean(tasks(X))) == pytest.approx(metrics.aggregate_mean(X), rel=1e-12)
    assert float(stats.optimality_gap(tasks(X), 100)) == pytest.approx(
        metrics.aggregate_optimality_gap(X, 100), rel=1e-12
    )
    ours = float(stats.probability_of_improvement(tasks(X), tasks(Y)))
    assert ours == pytest.approx(float(metrics.probability_of_improvement(X, Y)), rel=1e-12)


def test_profiles_are_equal() -> None:
    tau = np.linspace(-5, 150, 31)
    theirs, bands = library.create_performance_profile({"x": X}, tau, reps=2000)
    np.testing.assert_allclose(stats.performance_profile(tasks(X), tau), theirs["x"], atol=1e-12)
    # Two bootstraps of 2,000 resamples: percentiles of shares that move in steps of 1/90.
    np.testing.assert_allclose(stats.profile_band(tasks(X), tau, resamples=2000), bands["x"], atol=0.025)


def test_intervals_agree() -> None:
    """Both resample runs within each task; the ends differ by the resampling's own noise, 3 % of the width."""
    np.random.seed(0)  # noqa: NPY002 - rliable draws from the process's generator
    _, theirs = library.get_interval_estimates({"x": X}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=20_000)
    low, high = stats.stratified_bootstrap(stats.iqm, tasks(X), resamples=20_000)
    width = high - low
    np.testing.assert_allclose([low, high], theirs["x"][:, 0], atol=0.05 * width)
