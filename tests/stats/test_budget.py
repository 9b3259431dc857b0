"""Budgets of online evaluations: against brute force and the closed forms that the definitions imply."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from offrl.results.budget import bandit_curve, expected_best, offline_best, regret_at, spearman

SCORES = np.array([31.0, 7.5, -4.0, 88.0, 52.0, 52.0])
KS = range(1, 7)


# ---- the best of k -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replace", [True, False])
def test_expected_best_is_the_mean_over_all_draws(replace):
    draws = (
        (lambda k: itertools.product(SCORES, repeat=k)) if replace else (lambda k: itertools.permutations(SCORES, k))
    )
    best, spread = expected_best(SCORES, KS, replace)
    for k in KS:
        all_best = np.array([max(draw) for draw in draws(k)])
        assert best[k - 1] == pytest.approx(all_best.mean(), abs=1e-10)
        assert spread[k - 1] == pytest.approx(all_best.std(), abs=1e-10)


def test_expected_best_has_the_properties_of_its_definition():
    best, spread = expected_best(SCORES, KS)
    without = expected_best(SCORES, KS, replace=False)[0]
    assert best[0] == pytest.approx(SCORES.mean())
    assert spread[0] == pytest.approx(SCORES.std(ddof=0))
    assert (np.diff(best) > 0).all()
    assert (without >= best - 1e-12).all()
    assert without[-1] == SCORES.max() > best[-1]
    moved = expected_best(3 * np.random.default_rng(0).permutation(SCORES) - 5, KS)[0]
    np.testing.assert_allclose(moved, 3 * best - 5, atol=1e-12)
    for k in (0, 7):
        with pytest.raises(ValueError, match="between 1 and the number of policies, 6"):
            expected_best(SCORES, [k])


# ---- bandit --------------------------------------------------------------------------------------------------


def plain_bandit(x, k, pulls, rng, alpha=2.0):
    """The procedure as it is written down, one trial and one pull at a time."""
    rows = rng.choice(len(x), k, replace=False)
    n, s, curve = np.zeros(k), np.zeros(k), []
    for t in range(1, pulls + 1):
        u = [s[j] / max(n[j], 1) + math.sqrt(alpha * math.log(t) / (n[j] + 1e-9)) for j in range(k)]
        j = rng.choice([j for j in range(k) if u[j] == max(u)])
        s[j] += rng.choice(x[rows[j]])
        n[j] += 1
        best = max((j for j in range(k) if n[j]), key=lambda j: s[j] / n[j])
        curve.append(np.mean(x[rows[best]]))
    return curve


def noisy(policies, episodes, spread=20.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(20, 90, policies)[:, None] + rng.normal(0, spread, (policies, episodes))


def test_curve_is_that_of_the_plain_procedure():
    x = noisy(10, 30)
    rng = np.random.default_rng(1)
    plain = np.array([plain_bandit(x, 4, 12, rng) for _ in range(600)])
    ours = bandit_curve(x, k=4, pulls=12, trials=20_000, pools=0).mean
    error = plain.std(0) / math.sqrt(600)
    assert (np.abs(ours - plain.mean(0)) < 4.5 * error).all()  # 12 correlated comparisons, 4.5 standard errors


def test_first_pull_is_the_mean_and_the_kth_the_best_when_episodes_are_exact():
    """Enumeration takes each policy once; without noise the best of K is then known: the hypergeometric mean."""
    x = noisy(12, 1)
    curve = bandit_curve(x, k=5, pulls=30, trials=20_000, pools=0)
    assert curve.mean[0] == pytest.approx(x.mean(), abs=4.5 * x.std() / math.sqrt(20_000))
    spread = expected_best(x[:, 0], [5], replace=False)[1][0] / math.sqrt(20_000)
    assert curve.mean[4] == pytest.approx(curve.limit, abs=4.5 * spread)
    assert (np.diff(curve.mean[:5]) > 0).all()
    np.testing.assert_array_equal(curve.mean[4:], curve.mean[4])
    assert curve.limit == pytest.approx(expected_best(x[:, 0], [5], replace=False)[0][0])


def test_each_policy_is_tried_before_any_is_tried_again():
    """However large the returns are: a bonus of fixed size would leave policies untried."""
    x = np.array([[1e5], [2e5], [3e5], [4e5]]) * np.ones((1, 3))
    curve = bandit_curve(x, k=4, pulls=6, trials=50, pools=0)
    assert curve.mean[3:].tolist() == [4e5] * 3


def test_limit_is_that_of_all_subsets():
    x = noisy(6, 3)
    brute = np.mean([max(x[list(rows)].mean(1)) for rows in itertools.combinations(range(6), 3)])
    assert bandit_curve(x, k=3, pulls=2, trials=2, pools=0).limit == pytest.approx(brute)


def test_identical_policies_make_a_flat_curve():
    noisy = bandit_curve(np.tile([1.0, 5.0], (4, 1)), trials=50, pools=0)
    np.testing.assert_allclose(noisy.mean, 3.0)
    assert noisy.k == 4
    exact = bandit_curve(np.full((4, 2), 3.0), trials=50, pools=5)
    for line in (exact.mean, exact.low, exact.high):
        np.testing.assert_allclose(line, 3.0)


def test_a_constant_moves_the_curve_even_below_zero():
    """The released procedure recommends a policy that was never tried when all scores are negative."""
    x = noisy(8, 20)
    np.testing.assert_allclose(
        bandit_curve(x - 500, trials=200, pools=0).mean, bandit_curve(x, trials=200, pools=0).mean - 500, atol=1e-9
    )


def test_rows_of_different_lengths():
    rows = [[10.0], [20.0, 20.0, 20.0], [0.0, 60.0]]
    curve = bandit_curve(rows, k=3, pulls=400, trials=300, pools=0, alpha=2e4)
    assert curve.limit == 30.0
    assert curve.mean[-1] > 27
    assert curve.mean[0] == pytest.approx(20.0, abs=2)


def test_interval_is_of_the_pool_and_the_same_seed_repeats_it():
    x = noisy(12, 40)
    one, again, other = (bandit_curve(x, trials=300, pulls=20, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.mean, again.mean)
    np.testing.assert_array_equal(one.low, again.low)
    assert not np.array_equal(one.mean, other.mean)
    assert (one.low <= one.mean).all()
    assert (one.mean <= one.high).all()
    # At one pull the curve is the mean over the pool's policies: their bootstrap has this width.
    means = x.mean(1)
    width = 2 * 1.96 * means.std() / math.sqrt(len(means))
    assert one.high[0] - one.low[0] == pytest.approx(width, rel=0.35)


# ---- rankings ------------------------------------------------------------------------------------------------


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    for a, b in [(rng.normal(size=20), rng.normal(size=20)), (rng.integers(0, 4, 30), rng.integers(0, 4, 30))]:
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(SCORES, np.exp(SCORES / 10)) == pytest.approx(1)
    assert math.isnan(spearman([1, 2], [3, 3]))
    assert math.isnan(spearman([1], [2]))


def test_regret():
    offline = np.array([3.0, 2.0, 1.0, 0.0])
    online = np.array([10.0, 0.0, 60.0, 110.0])
    assert [regret_at(offline, online, k) for k in (1, 2, 3, 4, 9)] == pytest.approx(
        [100 / 110, 100 / 110, 50 / 110, 0, 0]
    )
    assert regret_at(online, online, 1) == 0
    assert regret_at(-online, online, 1) == 1
    assert regret_at(offline, [5.0] * 4, 1) == 0
    assert offline_best(offline, online).tolist() == [10, 10, 60, 110]


def test_random_ranking_is_as_good_as_uniform_choice():
    best = np.mean([offline_best(order, SCORES) for order in itertools.permutations(range(6))], axis=0)
    np.testing.assert_allclose(best, expected_best(SCORES, KS, replace=False)[0], atol=1e-10)
