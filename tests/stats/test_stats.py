"""Statistics against closed forms, invariants and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from offrl.data.dataset import DatasetInfo
from offrl.results import stats

RNG = np.random.default_rng(0)
TASKS = [RNG.normal(50 + 10 * m, 5, size=10) for m in range(4)]


# ---- normalisation -------------------------------------------------------------------------------------------


def test_normalisation_maps_the_references_to_0_and_100_and_commutes_with_averaging():
    info = DatasetInfo(ref_min=-20.272305, ref_max=3234.3)
    returns = RNG.normal(1000, 500, size=50)
    assert info.normalized(info.ref_min) == 0.0
    assert info.normalized(info.ref_max) == 100.0
    assert info.normalized(returns.mean()) == pytest.approx(info.normalized(returns).mean(), rel=1e-12)
    recovered = info.normalized(returns) / 100 * (info.ref_max - info.ref_min) + info.ref_min
    np.testing.assert_allclose(recovered, returns, rtol=1e-12)
    assert info.normalized(5000.0) > 100  # never clipped


# ---- one cell ------------------------------------------------------------------------------------------------


def test_t_interval_in_closed_form():
    """Student's t with 1 degree of freedom is Cauchy's distribution; with 2 its quantile is (2p-1) sqrt(2 / (1 - (2p-1)^2))."""
    cauchy = math.tan(math.pi * 0.475)
    np.testing.assert_allclose(stats.t_interval([1.0, 3.0]), [2 - cauchy, 2 + cauchy], rtol=1e-12)  # std / sqrt(2) = 1
    two = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    np.testing.assert_allclose(
        stats.t_interval([-1.0, 0.0, 1.0]), [-two / math.sqrt(3), two / math.sqrt(3)], rtol=1e-12
    )


def test_half_widths_of_a_curve_are_those_of_its_points():
    half = stats.t_half_width([2.0, math.nan, 3.0], [2, 1, 5])
    assert half[0] == stats.t_half_width(2.0, 2)
    assert half[2] == stats.t_half_width(3.0, 5)
    assert math.isnan(half[1])


def test_mean_std_and_interval_equal_numpy_and_scipy():
    x = TASKS[0][:5]
    mean, std = stats.mean_std(x)
    assert mean == x.mean()
    assert std == x.std(ddof=1)
    expected = scipy.stats.t.interval(0.9, 4, loc=mean, scale=scipy.stats.sem(x))
    np.testing.assert_allclose(stats.t_interval(x, 0.9), expected, rtol=1e-9)


def test_a_single_score_has_no_spread():
    assert stats.mean_std([3.0])[0] == 3.0
    assert math.isnan(stats.mean_std([3.0])[1])
    assert all(math.isnan(bound) for bound in stats.t_interval([3.0]))


def test_t_interval_covers_at_its_nominal_rate():
    x = np.random.default_rng(1).normal(size=(4000, 4))
    half = stats.t_half_width(x.std(1, ddof=1), 4)
    covered = (np.abs(x.mean(1)) < half).mean()
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors of 4000 draws


# ---- aggregates ----------------------------------------------------------------------------------------------


def test_constant_scores():
    c = [np.full(6, 42.0), np.full(6, 42.0)]
    assert stats.iqm(c) == stats.task_mean(c) == 42.0
    assert stats.stratified_bootstrap(stats.iqm, c) == (42.0, 42.0)
    below, at, above = stats.performance_profile(c, [41.9999, 42.0, 42.0001])
    assert (below, at, above) == (1.0, 0.0, 0.0)  # strictly greater


def test_iqm_by_hand_and_under_outliers():
    x = np.arange(1.0, 9.0)
    assert stats.iqm([x]) == 4.5
    assert stats.iqm([np.where(x > 6, 1000 * x, x)]) == 4.5
    mixed = RNG.permutation(x)
    assert stats.iqm([mixed[:3], mixed[3:]]) == 4.5


@pytest.mark.parametrize("n", range(1, 24))
def test_iqm_equals_scipys_trimmed_mean(n):
    x = RNG.normal(size=n)
    assert stats.iqm([x]) == pytest.approx(scipy.stats.trim_mean(x, 0.25), rel=1e-12)


def test_optimality_gap():
    assert stats.optimality_gap([np.array([50.0, 150.0])]) == 25.0  # scores above gamma do not make up for others
    assert stats.optimality_gap([np.array([0.5])], gamma=1.0) == 0.5


def test_profile_falls_from_1_to_0_and_integrates_to_the_mean():
    scores = [np.abs(x) for x in TASKS]
    tau = np.linspace(0, 200, 200_001)
    profile = stats.performance_profile(scores, tau)
    assert profile[0] == 1.0
    assert profile[-1] == 0.0
    assert (np.diff(profile) <= 0).all()
    # A step function, summed over a grid of 0.001: off by at most that.
    assert profile.sum() * 0.001 == pytest.approx(stats.task_mean(scores), abs=2e-3)


def test_tasks_weigh_the_same_in_the_mean_and_runs_in_the_iqm():
    uneven = [np.zeros(2), np.full(6, 8.0)]
    assert stats.task_mean(uneven) == 4.0
    assert stats.iqm(uneven) == 8.0
    assert stats.performance_profile(uneven, [1.0])[0] == 0.5


# ---- probability of improvement ------------------------------------------------------------------------------


def test_probability_of_improvement_invariants():
    x = [np.round(t) for t in TASKS]  # ties
    y = [np.round(t + 2) for t in TASKS[::-1]]
    poi = stats.probability_of_improvement
    assert poi(x, x) == 0.5
    assert poi(x, y) + poi(y, x) == pytest.approx(1.0, abs=1e-15)
    assert poi([t + 1000 for t in x], x) == 1.0
    assert poi([np.exp(t / 50) for t in x], [np.exp(t / 50) for t in y]) == poi(x, y)


def test_probability_of_improvement_is_mann_whitney():
    x, y = np.round(RNG.normal(1, 2, 7)), np.round(RNG.normal(0, 2, 12))
    u = scipy.stats.mannwhitneyu(x, y).statistic
    assert stats.probability_of_improvement([x], [y]) == pytest.approx(u / (7 * 12), rel=1e-12)


def test_probability_of_improvement_needs_the_same_tasks():
    with pytest.raises(ValueError, match="same tasks"):
        stats.probability_of_improvement(TASKS, TASKS[:2])


# ---- bootstrap -----------------------------------------------------------------------------------------------


def test_bootstrap_of_single_runs_has_no_width():
    singles = [np.array([m]) for m in (1.0, 5.0, 7.0)]
    low, high = stats.stratified_bootstrap(stats.iqm, singles)
    assert low == high == stats.iqm(singles)


def test_bootstrap_resamples_within_each_task():
    tasks, seen = [np.arange(4.0), np.arange(10.0, 14.0)], []

    def watch(resampled):
        seen.append([np.sort(task, axis=-1) for task in resampled])
        return stats.iqm(resampled)

    stats.stratified_bootstrap(watch, tasks, resamples=4000)
    for m, original in enumerate(tasks):
        drawn = {tuple(row) for block in seen for row in block[m]}
        # All multisets of 4 out of 4, C(7, 4) = 35; the rarest has probability 1/256, so 4000 draws see it.
        assert drawn == set(itertools.combinations_with_replacement(original, 4))
    independent = np.corrcoef(*(np.concatenate([block[m].mean(-1) for block in seen]) for m in (0, 1)))[0, 1]
    assert abs(independent) < 0.06  # 3.8 standard errors of 4000 pairs


def test_bootstrap_is_reproducible_and_leaves_global_generators_alone():
    np.random.seed(3)  # noqa: NPY002 - the very state that must not move
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = stats.stratified_bootstrap(stats.iqm, TASKS, seed=7)
    assert stats.stratified_bootstrap(stats.iqm, TASKS, seed=7) == first
    assert stats.stratified_bootstrap(stats.iqm, TASKS, seed=8) != first
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_bootstrap_interval_of_a_mean_has_the_width_of_its_standard_error():
    x = np.random.default_rng(5).normal(size=200)
    low, high = stats.stratified_bootstrap(stats.task_mean, [x], resamples=20_000)
    expected = 2 * scipy.stats.norm.ppf(0.975) * x.std() / math.sqrt(200)
    assert high - low == pytest.approx(expected, rel=0.03)  # Monte Carlo error of two percentiles


def test_bootstrap_resamples_methods_independently():
    low, high = stats.stratified_bootstrap(stats.probability_of_improvement, TASKS, TASKS)
    assert 0.3 < low < 0.5 < high < 0.7
