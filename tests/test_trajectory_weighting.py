"""Trajectory weighting against closed forms: laws, degenerate data, what the weights mean, and drawing by them.

Toy numbers were worked out by hand (or with plain numpy); draws are fixed by seeds, so P_VALUE is no flake rate.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from offrl.data.dataset import OfflineDataset
from offrl.data.statistics import positive_sided_variance
from offrl.sampling import (
    AdvantageWeighted,
    AdvantageWeightedConfig,
    BatchLoader,
    EpisodeWeighted,
    ReturnWeighted,
    ReturnWeightedConfig,
    RowWeighted,
    TopPercent,
    TopPercentConfig,
    Uniform,
    alias_table,
    make_sampler,
)
from offrl.sampling.weights import baseline, boltzmann, effective_rows, top
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.random import LaneRandom

P_VALUE = 1e-4


def episodes(
    returns: list[float] | np.ndarray, lengths: list[int] | np.ndarray, starts: np.ndarray | None = None
) -> OfflineDataset:
    """Episodes of given returns (all of it in the first reward), lengths and initial observations."""
    lengths, n = np.asarray(lengths), int(np.sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rewards = np.zeros(n)
    rewards[offsets[:-1]] = returns
    starts = np.zeros((len(lengths), 1)) if starts is None else starts
    obs = np.zeros((n, starts.shape[1]))
    obs[offsets[:-1]] = starts
    terminations = np.zeros(n)
    terminations[offsets[1:] - 1] = 1
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (obs, np.zeros((n, 1)), rewards, obs, terminations)]
    return OfflineDataset(*tensors, torch.tensor(offsets))


def law(sampler: EpisodeWeighted) -> Tensor:
    """`[lanes?, N]` probability of every transition."""
    rows = torch.repeat_interleave(sampler.weights, sampler.lengths, dim=-1)
    return rows / rows.sum(-1, keepdim=True)


def rw(store: OfflineDataset, **settings: Any) -> Tensor:
    return law(ReturnWeighted(store, ReturnWeightedConfig(**settings)))


def aw(store: OfflineDataset, **settings: Any) -> Tensor:
    return law(AdvantageWeighted(store, AdvantageWeightedConfig(**settings)))


def random_episodes(count: int = 60, starts: int = 3, seed: int = 0) -> OfflineDataset:
    rng = np.random.default_rng(seed)
    return episodes(rng.normal(size=count) * 20, rng.integers(1, 30, count), rng.normal(size=(count, starts)))


def draw(sampler: Any, count: int, seeds: tuple[int, ...] = (0,)) -> Tensor:
    return sampler.draw(LaneRandom(seeds), torch.tensor([1]), count, "s")[0]


def fits(index: Tensor, probability: Tensor) -> float:
    """p-value of chi-square; cells in which fewer than five draws are expected are pooled."""
    seen = torch.bincount(index.flatten(), minlength=len(probability)).double().numpy()
    expected = (probability / probability.sum()).numpy() * seen.sum()
    few = expected < 5
    if few.any():
        seen = np.append(seen[~few], seen[few].sum())
        expected = np.append(expected[~few], expected[few].sum())
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    return float(stats.chisquare(seen, expected).pvalue)


# ---- the laws --------------------------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    sampler = ReturnWeighted(episodes([0, 1, 2], [2, 1, 1]), ReturnWeightedConfig(temperature=0.5))
    p = law(sampler)
    expected = torch.tensor([0.0825945, 0.0825945, 0.2245152, 0.6102957], dtype=torch.float64)
    torch.testing.assert_close(p, expected, atol=5e-8, rtol=0)
    metadata = sampler.metadata()
    assert metadata["effective_rows"] == pytest.approx(2.29089, abs=5e-6)
    assert metadata["effective_share"] == pytest.approx(2.29089 / 4, abs=5e-6)
    assert metadata["fallback"] is None


@pytest.mark.parametrize("weighted", [rw, aw])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.2, 0.5, 2.0])
def test_probabilities(weighted: Any, temperature: float) -> None:
    store = random_episodes()
    p = weighted(store, temperature=temperature)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    for first, last in zip(store.offsets[:-1], store.offsets[1:]):
        assert len(set(p[first:last].tolist())) == 1  # constant inside a trajectory
    assert float(p.max() / p.min()) == pytest.approx(np.exp(1 / temperature), rel=1e-9)


@pytest.mark.parametrize("weighted", [rw, aw])
def test_temperature_at_its_ends(weighted: Any) -> None:
    store = random_episodes()
    for hot in (1e9, float("inf")):
        assert float((weighted(store, temperature=hot) - 1 / len(store)).abs().max()) < 1e-9
    cold = weighted(store, temperature=1e-3)
    assert float(cold[cold == cold.max()].sum()) > 1 - 1e-9
    assert len(store.episode_of_row[cold == cold.max()].unique()) == 1
    best = law(EpisodeWeighted(store, (store.returns == store.returns.max()).double()))
    torch.testing.assert_close(rw(store, temperature=1e-5), best)


def test_ties_at_temperature_zero_share_by_length() -> None:
    p = rw(episodes([1, 5, 5], [4, 3, 1]), temperature=1e-4)
    torch.testing.assert_close(p, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64) / 4)


def test_what_leaves_the_weights_alone() -> None:
    """RW: positive scale and shift of the returns. AW: moreover anything affine in the initial observation."""
    store = random_episodes()
    g, s = store.returns.numpy(), store.initial_observations.double().numpy()
    moved = episodes(7 * g - 300, store.lengths.numpy(), s)
    # Rewards are float32, hence 1e-5 and not rounding of float64.
    torch.testing.assert_close(rw(moved), rw(store), rtol=1e-5, atol=0)
    tilted = episodes(3 * g + s @ [2.0, -1.0, 5.0] + 4, store.lengths.numpy(), s)
    torch.testing.assert_close(aw(tilted), aw(store), rtol=1e-5, atol=0)
    assert float((rw(tilted) - rw(store)).abs().max()) > 1e-3
    same_start = episodes(g, store.lengths.numpy())
    torch.testing.assert_close(aw(same_start), rw(same_start), rtol=1e-12, atol=0)
    torch.testing.assert_close(aw(store, baseline="mean"), rw(store), rtol=1e-12, atol=0)


def test_a_shift_of_every_reward_does_change_the_weights() -> None:
    """Trajectories of unequal length gain unequally: that is why returns come from rewards as recorded."""
    store = random_episodes()
    assert float((rw(store.with_rewards(1.0, 1.0)) - rw(store)).abs().max()) > 1e-3
    torch.testing.assert_close(rw(store.with_rewards(5.0)), rw(store), rtol=1e-5, atol=0)


def test_permuting_trajectories_permutes_the_weights() -> None:
    store = random_episodes()
    order = torch.from_numpy(np.random.default_rng(1).permutation(store.episodes))
    for cls in (ReturnWeighted, AdvantageWeighted):
        straight, permuted = cls(store).weights, cls(store.select_episodes(order)).weights
        torch.testing.assert_close(permuted, straight[order], rtol=1e-9, atol=0)


def test_negative_returns_and_tails_count() -> None:
    p = rw(episodes([-3, -1, -2], [1, 1, 1]), temperature=0.5)
    torch.testing.assert_close(p, torch.softmax(torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64), 0))
    store = episodes([0, 1], [2, 2])
    tail = OfflineDataset(
        **{**store.tensors(), "tail_rewards": torch.tensor([3.0, 0.0]), "has_tail": torch.tensor([True, False])}
    )
    assert float(rw(tail)[0]) > float(rw(tail)[-1])  # the first one's last reward is known, if not its successor


def test_cut_trajectories_count_with_what_they_have() -> None:
    store = episodes([1, 2, 4], [2, 4, 8])
    cut = OfflineDataset(**{**store.tensors(), "complete": torch.tensor([False, True, False])})
    assert torch.equal(rw(cut), rw(store))


def test_reward_per_step_is_another_ranking() -> None:
    store = episodes([1, 2, 3], [1, 4, 8])
    assert ReturnWeighted(store).weights.argmax() == 2
    assert ReturnWeighted(store, ReturnWeightedConfig(per_step=True)).weights.argmax() == 0


def test_lanes_with_temperatures_of_their_own() -> None:
    store = random_episodes()
    lanes = rw(store, temperature=[0.1, 0.2, 0.5])
    for lane, temperature in enumerate((0.1, 0.2, 0.5)):
        torch.testing.assert_close(lanes[lane], rw(store, temperature=temperature))
    drawn = draw(ReturnWeighted(store, ReturnWeightedConfig(temperature=[0.1, 0.2, 0.5])), 100_000, (0, 1, 2))
    for lane in range(3):
        assert fits(drawn[lane], lanes[lane]) > P_VALUE
    assert fits(drawn[0], lanes[2]) < 1e-12
    alone = draw(ReturnWeighted(store, ReturnWeightedConfig(temperature=0.2)), 100_000, (1,))
    assert torch.equal(drawn[1], alone[0])  # a lane doesn't depend on the lanes beside it


# ---- the best ones ---------------------------------------------------------------------------------------------------


def test_top_percent_is_of_trajectories_and_earlier_ones_win_ties() -> None:
    returns = torch.tensor([1.0, 9.0, 5.0, 5.0, 5.0, 0.0, 7.0, 1.0, 1.0, 1.0])
    for percent, kept in ((10, [1]), (20, [1, 6]), (30, [1, 2, 6]), (40, [1, 2, 3, 6]), (9, [1]), (39.9, [1, 2, 6])):
        assert top(returns, percent).nonzero().squeeze(-1).tolist() == kept
    assert top(returns, 100).tolist() == [1.0] * 10
    assert int(top(torch.arange(100.0), 29).sum()) == 29  # 0.29 * 100 is below 29 in floating point


def test_top_percent_never_draws_the_others() -> None:
    store = random_episodes()
    sampler = TopPercent(store)
    drawn = draw(sampler, 1_000_000)[0]
    best = set(store.returns.argsort(descending=True)[:6].tolist())
    assert set(store.episode_of_row[drawn].unique().tolist()) == best
    assert fits(drawn, law(sampler)) > P_VALUE
    lanes = TopPercent(store, TopPercentConfig(percent=[10.0, 100.0]))
    drawn = draw(lanes, 100_000, (0, 1))
    assert set(store.episode_of_row[drawn[0]].unique().tolist()) == best
    assert fits(drawn[1], torch.ones(len(store), dtype=torch.float64)) > P_VALUE


def test_labels() -> None:
    assert Uniform.label(None) == ""
    assert TopPercent.label(TopPercentConfig()) == "Top-10%"
    assert TopPercent.label(TopPercentConfig([5.0, 10.0])) == "Top-%"
    assert (ReturnWeighted.label(None), AdvantageWeighted.label(None)) == ("RW", "AW")


# ---- degenerate data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ReturnWeighted, AdvantageWeighted])
@pytest.mark.parametrize("returns", [[3.0, 3, 3, 3], [0.0, 0, 0, 0], [1e6, 1e6 + 1e-3, 1e6, 1e6], [-2.0]], ids=str)
def test_equal_returns_are_uniform_with_one_warning(cls: Any, returns: list[float]) -> None:
    store = episodes(returns, [3, 1, 2, 5][: len(returns)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = cls(store)
    assert len([w for w in caught if "equally good" in str(w.message)]) == 1
    assert float((law(sampler) - 1 / len(store)).abs().max()) < 1e-15
    assert "uniform" in sampler.metadata()["fallback"]


def test_two_trajectories() -> None:
    store = episodes([0.0, 1.0], [10, 1], np.array([[0.0], [1.0]]))
    with pytest.warns(UserWarning, match="2 trajectories are too few for 2 coefficients, so V"):
        sampler = AdvantageWeighted(store)
    # A line through two points leaves no advantage; the fallback ranks them by return.
    torch.testing.assert_close(sampler.weights, ReturnWeighted(store).weights)
    assert float(law(sampler)[-1]) == pytest.approx(np.exp(10) / (np.exp(10) + 10))


@pytest.mark.parametrize(("count", "dims"), [(25, 45), (25, 24), (20, 10), (3, 2)])
def test_too_few_trajectories_for_least_squares_never_give_random_weights(count: int, dims: int) -> None:
    """Adroit's 25 demonstrations with 45 observations: least squares would interpolate, and the rest is rounding."""
    rng = np.random.default_rng(0)
    starts, returns = rng.normal(size=(count, dims)), np.sort(rng.normal(size=count))
    store = episodes(returns, [10] * count, starts)
    with pytest.warns(UserWarning, match="too few"):
        sampler = AdvantageWeighted(store)
    # Returns have nothing to do with the starts: the best must stay near the best, whichever fallback was taken.
    ranks = stats.spearmanr(sampler.weights.numpy(), returns).statistic
    assert ranks > 0.8
    metadata = sampler.metadata()
    assert metadata["baseline"] in ("ridge", "mean")
    assert "too few" in metadata["fallback"]


def test_few_trajectories_whose_starts_matter_keep_a_baseline() -> None:
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(20, 9))
    returns = 10 * starts[:, 0] + rng.normal(size=20)
    fit = baseline(torch.tensor(starts), torch.tensor(returns))
    assert fit.used == "ridge"
    assert fit.r2 > 0.9
    assert fit.fallback is not None


def test_returns_that_the_start_explains_exactly() -> None:
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(50, 2))
    fit = baseline(torch.tensor(starts), torch.tensor(starts @ [3.0, -1.0] + 2))
    assert fit.used == "mean"
    assert "exactly" in str(fit.fallback)


@pytest.mark.parametrize("method", ["ols", "ridge", "kfold", "network"])
def test_every_baseline_finds_what_is_there(method: Any) -> None:
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(400, 4)) * [1, 100, 1e-3, 0] + [0, 5, 2, 7]  # of all scales, one constant
    signal = starts[:, 0] + starts[:, 1] / 100 + 500 * (starts[:, 2] - 2)
    returns = signal + rng.normal(size=400)
    fit = baseline(torch.tensor(starts), torch.tensor(returns), method)
    assert (fit.used, fit.fallback) == (method, None)
    # Variances 1 + 1 + 0.25 of the signal, 1 of the noise: 0.69 can be explained.
    assert 0.5 < fit.r2 < 0.78
    assert np.corrcoef(fit.values.numpy(), signal)[0, 1] > 0.9


def test_least_squares_is_plain_least_squares() -> None:
    rng = np.random.default_rng(0)
    starts, returns = rng.normal(size=(200, 5)) * 1e-3 + 1, rng.normal(size=200)
    design = np.column_stack([starts, np.ones(200)])
    expected = design @ np.linalg.lstsq(design, returns, rcond=None)[0]
    fit = baseline(torch.tensor(starts), torch.tensor(returns))
    np.testing.assert_allclose(fit.values.numpy(), expected, atol=1e-9)
    assert fit.r2 == pytest.approx(1 - (returns - expected).var() / returns.var())


def test_kfold_of_noise_explains_nothing() -> None:
    rng = np.random.default_rng(0)
    starts, returns = torch.tensor(rng.normal(size=(200, 20))), torch.tensor(rng.normal(size=200))
    assert baseline(starts, returns, "kfold").r2 < 0 < baseline(starts, returns, "ols").r2


def test_rewards_that_are_no_numbers_are_refused() -> None:
    store = episodes([1.0, float("nan")], [2, 2])
    for cls in (ReturnWeighted, AdvantageWeighted, TopPercent):
        with pytest.raises(OffrlError, match="rewards that are not finite"):
            cls(store)


def test_sparse_returns_are_two_levels() -> None:
    p = rw(episodes([0, 1, 0, 0], [5, 5, 5, 5]), temperature=0.5)
    assert float(p[5] / p[0]) == pytest.approx(np.exp(2))
    assert len(p.unique()) == 2


def test_positive_sided_variance() -> None:
    assert positive_sided_variance(torch.tensor([0.0, 0, 0, 0, 10])) == pytest.approx(12.8)
    assert positive_sided_variance(torch.tensor([0.0, 1, 2])) == pytest.approx(1 / 3)


def test_effective_rows() -> None:
    lengths = torch.tensor([3, 5])
    assert float(effective_rows(torch.tensor([1.0, 1.0]), lengths)) == pytest.approx(8)
    assert float(effective_rows(torch.tensor([0.0, 1.0]), lengths)) == pytest.approx(5)
    both = effective_rows(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), lengths)
    torch.testing.assert_close(both, torch.tensor([8.0, 5.0], dtype=torch.float64))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_draws_see_the_lengths() -> None:
    """200,000 draws over 40 trajectories against T_i w_i, and against the wrong law that forgets T_i."""
    rng = np.random.default_rng(0)
    store = episodes(rng.normal(size=40), rng.integers(1, 60, 40))
    sampler = ReturnWeighted(store, ReturnWeightedConfig(temperature=0.5))
    drawn = draw(sampler, 200_000)[0]
    episode = store.episode_of_row[drawn]
    assert fits(episode, sampler.weights * store.lengths) > P_VALUE
    assert fits(episode, sampler.weights) < 1e-12
    assert fits(drawn, law(sampler)) > P_VALUE  # rows of a trajectory are alike


def test_alias_flat_and_two_stage_draws_agree() -> None:
    store = random_episodes()
    two_stage = ReturnWeighted(store, ReturnWeightedConfig(temperature=0.3))
    p = law(two_stage)
    cdf = p.cumsum(0) / p.sum()
    u = torch.rand(300_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    flat = torch.searchsorted(cdf, u, right=True).clamp(max=len(p) - 1)
    samples = [draw(two_stage, 300_000)[0], draw(RowWeighted(p), 300_000)[0], flat]
    for sample in samples:
        assert fits(sample, p) > P_VALUE
    table = np.stack([torch.bincount(sample, minlength=len(p)).numpy() for sample in samples])
    often = table[:, table.sum(0) >= 20]
    assert stats.chi2_contingency(often).pvalue > P_VALUE


def probability(keep: Tensor, alias: Tensor) -> Tensor:
    """What an alias table draws, exactly: `[N]`."""
    return (keep + torch.zeros_like(keep).index_add_(0, alias.long(), 1 - keep)) / len(keep)


@pytest.mark.parametrize("kind", ["equal", "one", "zeros", "two levels", "wide", "few", "random"])
def test_alias_tables_hold_the_law(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "equal": np.full(1000, 0.1),
        "one": np.array([3.0]),
        "zeros": np.where(rng.random(1000) < 0.9, 0.0, rng.random(1000)),
        "two levels": np.where(np.arange(1000) % 100 == 99, np.exp(10), 1.0),
        "wide": np.exp(rng.normal(size=5000) * 8),
        "few": np.array([0.0, 5.0, 0.0, 1.0]),
        "random": rng.random(5000),
    }[kind]
    weights = torch.tensor(values)
    keep, alias = alias_table(weights)
    assert bool(((keep >= 0) & (keep <= 1)).all())
    # Running sums of N terms of size one: their rounding is about 1e-16 N relative to a mean row.
    error = (probability(keep, alias) - weights / weights.sum()).abs().max()
    assert float(error) * len(weights) < 1e-12 * len(weights)
    assert not probability(keep, alias)[weights == 0].any()


def test_rare_rows_of_two_million_can_be_drawn() -> None:
    """In float32 a third of the bins of such a table have no width at all (alpha = 0.1; here 0.05)."""
    n = 2_000_000
    g = np.random.default_rng(0).beta(1, 5, size=2000).repeat(1000)
    weights = torch.tensor(np.exp((g - g.max()) / (g.max() - g.min()) / 0.05))
    keep, alias = alias_table(weights)
    p = weights / weights.sum()
    assert (
        float((keep[p * n < 1] / (p[p * n < 1] * n) - 1).abs().max()) < 1e-12
    )  # each has its own bin, of its own width
    assert float((probability(keep, alias) / p - 1).abs().max()) < 1e-6
    sampler = EpisodeWeighted(episodes(g[::1000] * 0, [1000] * 2000), weights[::1000])
    assert float(sampler.table[0].diff().min()) > 0
    float32 = weights.float().cumsum(0) / weights.float().sum()
    assert float((float32.diff() == 0).double().mean()) > 0.1  # the trap is real


def test_row_weights_per_lane_and_in_place() -> None:
    rng = np.random.default_rng(0)
    weights = torch.tensor(rng.random((2, 300)))
    sampler = RowWeighted(weights)
    drawn = sampler.draw(LaneRandom((0, 1)), torch.arange(1, 401), 500)
    assert drawn.shape == (400, 2, 500)
    for lane in range(2):
        assert fits(drawn[:, lane], weights[lane]) > P_VALUE
    assert fits(drawn[:, 0], weights[1]) < 1e-12
    where = sampler.keep.data_ptr()
    sampler.change(weights.flip(0))
    assert sampler.keep.data_ptr() == where
    assert fits(sampler.draw(LaneRandom((0, 1)), torch.arange(1, 401), 500)[:, 0], weights[1]) > P_VALUE
    with pytest.raises(ValueError, match="finite and non-negative"):
        RowWeighted(torch.tensor([1.0, -1.0]))


def test_many_updates_at_once_are_the_same_draws() -> None:
    store = random_episodes()
    for sampler in (
        ReturnWeighted(store, ReturnWeightedConfig(temperature=[0.1, 1.0])),
        AdvantageWeighted(store),
        TopPercent(store),
        RowWeighted(torch.rand(len(store), generator=torch.Generator().manual_seed(0))),
    ):
        random = LaneRandom((4, 9))
        together = sampler.draw(random, torch.arange(5, 25), 32)
        single = torch.cat([sampler.draw(random, torch.tensor([step]), 32) for step in range(5, 25)])
        assert torch.equal(together, single)


def test_windows_start_by_the_weights_and_stop_at_the_trajectorys_end() -> None:
    store = random_episodes()
    sampler = ReturnWeighted(store, ReturnWeightedConfig(temperature=0.3))
    batch = BatchLoader([(store, sampler, 1.0)], 50_000, window=4).draw(LaneRandom((0,)), torch.tensor([1]))
    assert batch.valid is not None
    assert fits(batch.index, law(sampler)) > P_VALUE
    left = store.offsets[1:][store.episode_of_row[batch.index]] - batch.index
    assert torch.equal(batch.valid.sum(-1).long(), left.clamp(max=4))


def test_uniform_and_infinite_temperature_are_one_law() -> None:
    store = random_episodes()
    table = np.stack(
        [
            torch.bincount(draw(sampler, 200_000)[0], minlength=len(store)).numpy()
            for sampler in (Uniform(store), ReturnWeighted(store, ReturnWeightedConfig(temperature=float("inf"))))
        ]
    )
    assert stats.chi2_contingency(table).pvalue > P_VALUE


def test_no_loss_knows_of_weights() -> None:
    """Weights are in the draws alone: a batch has no field for them, so no loss can apply them twice."""
    from offrl.agents.base import Agent
    from offrl.data.batch import Batch

    assert not any("weight" in name for name in inspect.get_annotations(Batch))
    assert list(inspect.signature(Agent.update).parameters) == ["self", "batch", "phase"]


def test_samplers_from_settings() -> None:
    store = random_episodes()
    made = make_sampler({"_target_": "offrl.sampling.AdvantageWeighted", "temperature": [0.1, 0.5]}, [store], (3, 4))
    torch.testing.assert_close(law(made), aw(store, temperature=[0.1, 0.5]))  # type: ignore[arg-type]
    metadata = made.metadata()
    assert len(metadata["effective_rows"]) == 2
    assert metadata["baseline"] == "ols"
    assert 0 < metadata["baseline_r2"] < 0.3
    settings = {"_target_": "offrl.sampling.TopPercent", "percent": 20}
    assert make_sampler(settings, [store], (0,)).metadata()["effective_rows"] == float(
        store.lengths[store.returns.argsort(descending=True)[:12]].sum()
    )


# ---- what weights mean: the tabular identity -------------------------------------------------------------------------


class Tabular:
    """A random finite-horizon MDP and trajectories of uniform actions in it."""

    def __init__(self, seed: int, noise: float, states: int = 6, actions: int = 3, horizon: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.horizon, self.gamma = horizon, 0.9
        self.rewards = rng.random((states, actions))
        certain = np.eye(states)[rng.integers(states, size=(states, actions))]
        self.transition = (1 - noise) * certain + noise * rng.dirichlet(np.ones(states), (states, actions))
        self.visits, self.returns, self.lengths = [], [], []
        for _ in range(300):
            state, total, visits = 0, 0.0, []
            for t in range(horizon):
                action = int(rng.integers(actions))
                total += self.gamma**t * self.rewards[state, action]
                visits.append((t, state, action))
                state = int(rng.choice(states, p=self.transition[state, action]))
            self.visits.append(visits)
            self.returns.append(total)

    def policy(self, weights: np.ndarray) -> np.ndarray:
        """`[T, S, A]`: the weighted empirical policy. Time is part of the state, since episodes end at the horizon.

        Counts carry gamma^t; with time in the state it cancels, as it must.
        """
        counts = np.zeros((self.horizon, *self.rewards.shape))
        for w, visits in zip(weights, self.visits):
            for t, state, action in visits:
                counts[t, state, action] += w * self.gamma**t
        total = counts.sum(-1, keepdims=True)
        return np.where(total > 0, counts / np.where(total > 0, total, 1), 1 / counts.shape[-1])

    def value(self, policy: np.ndarray) -> float:
        """Of the policy from state 0, by backward induction."""
        value = np.zeros(len(self.rewards))
        for t in reversed(range(self.horizon)):
            value = (policy[t] * (self.rewards + self.gamma * self.transition @ value)).sum(-1)
        return float(value[0])


@pytest.mark.parametrize("seed", range(5))
def test_deterministic_dynamics_weighted_data_are_a_better_policys_data(seed: int) -> None:
    """J(weighted behaviour) = sum w_i G_i / sum w_i, exactly, for any weights."""
    mdp = Tabular(seed, noise=0.0)
    returns = torch.tensor(mdp.returns)
    for weights in (boltzmann(returns, 0.1)[0], boltzmann(returns, 1.0)[0], top(returns, 10), torch.ones(300)):
        w = weights.double().numpy()
        promised = float(w @ mdp.returns / w.sum())
        assert mdp.value(mdp.policy(w)) == pytest.approx(promised, abs=1e-9)
    assert mdp.value(mdp.policy(boltzmann(returns, 0.1)[0].numpy())) > np.mean(mdp.returns) + 0.1


def test_stochastic_dynamics_weights_reward_luck() -> None:
    """The counterexample: with noise the weighted return promises more than the weighted behaviour can keep."""
    gaps = []
    for seed in range(5):
        mdp = Tabular(seed, noise=0.5)
        w = boltzmann(torch.tensor(mdp.returns), 0.1)[0].numpy()
        gaps.append(float(w @ mdp.returns / w.sum()) - mdp.value(mdp.policy(w)))
    assert min(gaps) > 0
    assert np.mean(gaps) > 0.1


def test_the_identity_when_time_is_not_in_the_state() -> None:
    """A stationary policy on trajectories that never end: counts must be discounted, as the theory has them."""
    rng = np.random.default_rng(0)
    states, actions, gamma, steps = 5, 2, 0.9, 400  # gamma^400 = 5e-19: as good as endless
    step, rewards = rng.integers(states, size=(states, actions)), rng.random((states, actions))
    counts, returns = [], []
    for _ in range(60):  # deterministic policies of their own, so that states repeat
        policy, state, count, total = rng.integers(actions, size=states), 0, np.zeros((states, actions)), 0.0
        for t in range(steps):
            action = policy[state]
            count[state, action] += gamma**t
            total += gamma**t * rewards[state, action]
            state = step[state, action]
        counts.append(count)
        returns.append(total)
    w = boltzmann(torch.tensor(returns), 0.1)[0].numpy()
    weighted = np.tensordot(w, np.array(counts), 1)
    seen = weighted.sum(-1, keepdims=True)
    policy = np.where(seen > 0, weighted / np.where(seen > 0, seen, 1), 0.5)
    transition = np.zeros((states, states))
    for s in range(states):
        for a in range(actions):
            transition[s, step[s, a]] += policy[s, a]
    value = np.linalg.solve(np.eye(states) - gamma * transition, (policy * rewards).sum(-1))[0]
    assert value == pytest.approx(w @ returns / w.sum(), abs=1e-9)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_file(tmp_path: Any) -> Any:
    """60 episodes of 5 steps whose action is their return: one in ten is good."""
    rng = np.random.default_rng(0)
    good = np.arange(60) % 10 == 0
    action = np.where(good, 0.8, rng.uniform(-0.8, 0.2, 60)).repeat(5)[:, None]
    obs = rng.normal(size=(300, 2))
    path = tmp_path / "mixed.npz"
    np.savez(
        path,
        observations=obs,
        actions=action,
        rewards=action[:, 0],
        next_observations=np.roll(obs, -1, 0),
        terminals=np.arange(300) % 5 == 4,
        timeouts=np.zeros(300, bool),
    )
    return path


def options(file: Any, sampler: dict[str, Any], **changes: Any) -> dict[str, Any]:
    agent = {"_target_": "offrl.agents.bc.BC", "hidden": [16], "lr": 3e-3}
    values = {"agent": agent, "sampler": sampler, "dataset": str(file), "lanes": 2, "updates": 300, "batch_size": 32}
    values |= {"log_every": 100, "checkpoint_every": 100, "progress": False, "device": "cpu"}
    values |= {"eval": {"every": 0, "final_episodes": 0}, "out": str(file.parent / "runs")}
    return values | changes


def test_weighted_cloning_clones_the_good(mixed_file: Any) -> None:
    from offrl.training.runs import load_agent
    from offrl.training.trainer import train

    actions = {}
    for name in ("Uniform", "ReturnWeighted", "AdvantageWeighted", "TopPercent"):
        run = train(options(mixed_file, {"_target_": f"offrl.sampling.{name}"})).folder
        actions[name] = float(load_agent(run).select_action(torch.zeros(2, 1, 2)).mean())
    # Behaviour: a tenth at 0.8, the rest -0.3 on average. alpha = 0.1 leaves about 3% of the draws to the rest.
    assert actions["Uniform"] < 0
    for name in ("ReturnWeighted", "AdvantageWeighted", "TopPercent"):
        assert actions[name] == pytest.approx(0.8, abs=0.2)  # 300 updates don't converge


def test_runs_name_their_sampler_and_keep_its_facts(mixed_file: Any) -> None:
    import json

    from offrl.training.trainer import train

    settings = {"_target_": "offrl.sampling.AdvantageWeighted", "temperature": [0.1, 0.5]}
    run = train(options(mixed_file, settings, updates=2)).folder
    assert run.parts[-3] == "bc+AW"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["method"] == "bc+AW"
    metadata = manifest["sampler"]
    assert metadata["fallback"] is None
    assert metadata["baseline"] == "ols"
    assert metadata["effective_share"][0] < metadata["effective_share"][1] < 1
    assert metadata["positive_sided_variance"] > 0
    other = train(options(mixed_file, {"_target_": "offrl.sampling.TopPercent"}, updates=2)).folder
    assert other.parts[-3] == "bc+Top-10"


def test_returns_are_of_rewards_as_recorded(mixed_file: Any, tmp_path: Any) -> None:
    """data.reward_* changes what the agent sees, and no weight: AntMaze's -1 would make short episodes good ones."""
    from offrl.training.run_config import resolve_config
    from offrl.training.trainer import Trainer

    values = options(mixed_file, {"_target_": "offrl.sampling.ReturnWeighted"})
    plain = Trainer(resolve_config(values), tmp_path / "a")
    shifted = Trainer(resolve_config({**values, "data": {"reward_shift": -1.0, "reward_scale": 3.0}}), tmp_path / "b")
    assert not torch.equal(plain.store.rewards, shifted.store.rewards)
    assert torch.equal(plain.sampler.weights, shifted.sampler.weights)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["ReturnWeighted", "AdvantageWeighted", "TopPercent"])
def test_resume_is_exact(mixed_file: Any, name: str) -> None:
    from offrl.training.trainer import train
    from offrl.utils import checkpoint

    sampler = {"_target_": f"offrl.sampling.{name}"}
    whole = train(options(mixed_file, sampler, name="whole")).folder
    train(options(mixed_file, sampler, name="parts", updates=130))
    parts = train(options(mixed_file, sampler, name="parts")).folder
    a, b = (checkpoint.load(folder / checkpoint.NAME)[0] for folder in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_sweep_over_samplers_gives_runs_of_their_own(mixed_file: Any) -> None:
    from offrl.training.compose import compose
    from offrl.training.run_config import resolve_config

    names = ("uniform", "return_weighted", "advantage_weighted", "top_percent")
    plans = [
        resolve_config(compose({"agent": "td3_bc", "sampler": name, "dataset": str(mixed_file)})) for name in names
    ]
    assert [p.method for p in plans] == ["td3_bc", "td3_bc+RW", "td3_bc+AW", "td3_bc+Top-10%"]
    assert len({p.folder() for p in plans}) == len({p.config_hash() for p in plans}) == 4
    warm = resolve_config(
        compose({"sampler": "return_weighted", "sampler.temperature": 0.5, "dataset": str(mixed_file)})
    )
    assert warm.folder() != plans[1].folder()


AGENTS = sorted(path.stem for path in (conf_dir() / "agent").glob("*.yaml"))
SAMPLERS: dict[str, dict[str, Any]] = {
    "return_weighted": {"temperature": [0.1, 0.5]},
    "advantage_weighted": {},
    "top_percent": {"percent": [10, 50]},
    "density_weighted": {"steps": 2, "hidden": [4], "batch_size": 8, "refresh_every": 3, "refresh_steps": 2},
    "mixture": {"shares": [0.5], "samplers": ["top_percent", "uniform"]},
}


# All pairs take minutes: the quick suite has every agent under one weighting, and two agents under every sampler.
PAIRS = [
    pytest.param(a, s, marks=() if s == "advantage_weighted" or a in ("td3_bc", "dt") else pytest.mark.slow)
    for a in AGENTS
    for s in SAMPLERS
]


@pytest.mark.parametrize(("agent", "sampler"), PAIRS)
def test_every_agent_trains_under_every_sampler(mixed_file: Any, agent: str, sampler: str) -> None:
    from offrl.training.compose import compose
    from offrl.training.run_config import resolve_config
    from offrl.training.trainer import Trainer

    values = compose({"agent": agent, "sampler": sampler, "dataset": str(mixed_file)})
    settings = SAMPLERS[sampler] | ({"datasets": [str(mixed_file)]} if sampler == "mixture" else {})
    sizes = {"hidden": [8], "vae_hidden": [8], "context": 3, "embed": 8, "layers": 1}  # for agents that have them
    sizes |= {"suffix": 4, "label_hidden": [8], "cluster_updates": 2, "return_updates": 1}
    small = {"sizes": sizes, "sampler": values["sampler"] | settings}
    small |= {"lanes": 2, "updates": 5, "batch_size": 16, "eval": {"every": 0, "final_episodes": 0}, "progress": False}
    result = Trainer(resolve_config({**values, **small}), mixed_file.parent / "run").run()
    assert result.status == "finished"  # the trainer itself refuses numbers that are not finite


@pytest.mark.cuda
def test_draws_on_a_gpu_are_those_of_the_cpu() -> None:
    store = random_episodes()
    there = store.to("cuda")
    steps = torch.arange(1, 101)
    for cls in (Uniform, ReturnWeighted, AdvantageWeighted, TopPercent):
        here = cls(store).draw(LaneRandom((0, 1)), steps, 64)
        drawn = cls(there).draw(LaneRandom((0, 1), "cuda"), steps.cuda(), 64).cpu()
        # Sums of another order may move an edge of the table by a rounding, and so a draw in ten million.
        assert float((here == drawn).double().mean()) > 0.999
    rows = torch.rand(2, len(store), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = RowWeighted(rows).draw(LaneRandom((0, 1)), steps, 64)
    drawn = RowWeighted(rows.cuda()).draw(LaneRandom((0, 1), "cuda"), steps.cuda(), 64).cpu()
    assert float((here == drawn).double().mean()) > 0.999


# ---- several datasets ------------------------------------------------------------------------------------------------


def mixture(stores: list[OfflineDataset], **settings: Any) -> Any:
    return make_sampler({"_target_": "offrl.sampling.Mixture", **settings}, stores, (0,))


def test_a_mixture_draws_fixed_shares_each_by_its_own_sampler() -> None:
    a, b, c = random_episodes(30, seed=1), random_episodes(40, seed=2), random_episodes(20, seed=3)
    samplers = ["uniform", {"_target_": "offrl.sampling.ReturnWeighted", "temperature": 0.5}, "top_percent"]
    made = mixture([a, b, c], datasets=["b", "c"], shares=[0.25, 0.125], samplers=samplers)
    drawn = made.draw(LaneRandom((0,)), torch.arange(1, 2001), 64)
    first = [0, len(a), len(a) + len(b), len(a) + len(b) + len(c)]
    part = torch.bucketize(drawn, torch.tensor(first[1:-1]), right=True)
    assert torch.equal(part, torch.tensor([0] * 40 + [1] * 16 + [2] * 8).expand_as(part))
    laws = [torch.ones(len(a), dtype=torch.float64) / len(a), rw(b, temperature=0.5), law(TopPercent(c))]
    for i, expected in enumerate(laws):
        assert fits(drawn[part == i] - first[i], expected) > P_VALUE
    assert made.metadata()["parts"][0]["effective_share"] == 1.0
    plain = mixture([a, b], datasets=["b"], shares=[0.5]).draw(LaneRandom((0,)), torch.arange(1, 2001), 64)
    assert fits(plain[..., 32:] - len(a), torch.ones(len(b), dtype=torch.float64)) > P_VALUE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"sampler\.shares has 0 values for 0 sampler\.datasets"),
        ({"datasets": ["b"], "shares": [0.5, 0.1]}, r"sampler\.shares has 2 values for 1 sampler\.datasets"),
        ({"datasets": ["b"], "shares": [1.5]}, "add up to at most 1"),
        ({"datasets": ["b"], "shares": [0.5], "samplers": ["uniform"]}, r"sampler\.samplers has 1 entries for 2"),
        (
            {"datasets": ["b"], "shares": [0.5], "samplers": ["uniform", "unifrom"]},
            "unifrom is no sampler; choose among",
        ),
        ({"dataset": ["b"]}, r"did you mean sampler\.datasets"),
    ],
)
def test_mixtures_that_cant_be(settings: dict[str, Any], message: str) -> None:
    store = random_episodes()
    with pytest.raises(OffrlError, match=message):
        mixture([store, store], **settings)


def test_training_on_a_mixture(mixed_file: Any) -> None:
    import shutil

    from offrl.training.run_config import resolve_config
    from offrl.training.trainer import Trainer, train

    other = mixed_file.parent / "other.npz"
    shutil.copy(mixed_file, other)
    sampler = {"_target_": "offrl.sampling.Mixture", "datasets": [str(other)], "shares": [0.5]}
    sampler |= {"samplers": ["uniform", "advantage_weighted"]}
    values = options(mixed_file, sampler)
    trainer = Trainer(resolve_config(values), mixed_file.parent / "x")
    assert (len(trainer.store), trainer.store.episodes) == (600, 120)
    batch = trainer.loader.draw(LaneRandom((0, 1)), torch.arange(1, 200))
    assert torch.equal(batch.obs, trainer.store.observations[batch.index])
    good = batch.action[..., 0] > 0.7
    assert float(good[..., :16].double().mean()) == pytest.approx(0.1, abs=0.03)
    assert float(good[..., 16:].double().mean()) > 0.9
    folder = train({**values, "updates": 20}).folder
    assert folder.parts[-3] == "bc+Mixture"
    wide = mixed_file.parent / "wide.npz"
    with np.load(mixed_file) as data:
        arrays = dict(data)
    np.savez(wide, **{**arrays, "actions": np.repeat(arrays["actions"], 2, 1)})
    with pytest.raises(OffrlError, match="differ in observations or actions"):
        Trainer(resolve_config(options(mixed_file, {**sampler, "datasets": [str(wide)]})), mixed_file.parent / "y")
