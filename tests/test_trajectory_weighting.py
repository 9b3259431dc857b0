"""Trajectory weighting against closed forms: weights, degenerate data, baselines, and what weighted data mean.

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
from weighted import P_VALUE, aw, draw, episodes, fits, probabilities, random_episodes, rw

from offrl.agents.base import Agent
from offrl.data.batch import Batch
from offrl.data.dataset import OfflineDataset
from offrl.data.statistics import positive_sided_variance
from offrl.sampling import (
    AdvantageWeighted,
    EpisodeWeighted,
    ReturnWeighted,
    ReturnWeightedConfig,
    TopPercent,
    TopPercentConfig,
    Uniform,
    make_sampler,
)
from offrl.sampling.weights import baseline, boltzmann, effective_rows, top
from offrl.utils.errors import OffrlError

# ---- the weights -----------------------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    sampler = ReturnWeighted(episodes([0, 1, 2], [2, 1, 1]), ReturnWeightedConfig(temperature=0.5))
    p = probabilities(sampler)
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
    best = probabilities(EpisodeWeighted(store, (store.returns == store.returns.max()).double()))
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
    drawn = draw(sampler, 100_000)[0]
    best = set(store.returns.argsort(descending=True)[:6].tolist())
    assert set(store.episode_of_row[drawn].unique().tolist()) == best
    assert fits(drawn, probabilities(sampler)) > P_VALUE
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
    assert float((probabilities(sampler) - 1 / len(store)).abs().max()) < 1e-15
    assert "uniform" in sampler.metadata()["fallback"]


def test_two_trajectories() -> None:
    store = episodes([0.0, 1.0], [10, 1], np.array([[0.0], [1.0]]))
    with pytest.warns(UserWarning, match="2 trajectories are too few for 2 coefficients, so V"):
        sampler = AdvantageWeighted(store)
    # A line through two points leaves no advantage; the fallback ranks them by return.
    torch.testing.assert_close(sampler.weights, ReturnWeighted(store).weights)
    assert float(probabilities(sampler)[-1]) == pytest.approx(np.exp(10) / (np.exp(10) + 10))


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


@pytest.mark.parametrize("slope", [0.0, 0.4, 0.7, 5.0])
def test_ridge_has_the_least_error_on_trajectories_left_out(slope: float) -> None:
    """Beside a loop that fits each penalty, and the mean, without each trajectory in turn."""
    rng = np.random.default_rng(1)
    starts = rng.normal(size=(12, 3))
    returns = slope * starts[:, 0] + rng.normal(size=12)
    x = (starts - starts.mean(0)) / starts.std(0)

    def left_out(penalty: float) -> float:
        errors = []
        for i in range(12):
            rows = np.arange(12) != i
            mean, design = returns[rows].mean(), x[rows] - x[rows].mean(0)
            # The intercept has no penalty, and centring the other eleven is fitting it.
            inverse = np.linalg.inv(design.T @ design + penalty * np.eye(3))
            value = mean + (x[i] - x[rows].mean(0)) @ inverse @ design.T @ (returns[rows] - mean)
            errors.append((returns[i] - value) ** 2)
        return float(np.mean(errors))

    penalties = [*(12 * np.logspace(-4, 3, 22)), 1e15]  # the last is the mean
    best = min(penalties, key=left_out)
    expected = returns.mean() + x @ np.linalg.solve(x.T @ x + best * np.eye(3), x.T @ (returns - returns.mean()))
    fit = baseline(torch.tensor(starts), torch.tensor(returns), "ridge")
    np.testing.assert_allclose(fit.values.numpy(), expected, rtol=0, atol=1e-9)
    assert fit.used == ("mean" if best == 1e15 else "ridge")


def test_the_network_baseline_is_five_networks_of_the_other_folds() -> None:
    """Each by itself, layer by layer, from the same initial weights."""
    rng = np.random.default_rng(0)
    starts = rng.normal(size=(40, 3))
    returns = np.abs(starts[:, 0]) * 5 + rng.normal(size=40)
    x = torch.from_numpy((starts - starts.mean(0)) / starts.std(0)).float()
    target = torch.from_numpy((returns - returns.mean()) / returns.std()).float()
    generator, sizes = torch.Generator().manual_seed(0), ((3, 32), (32, 32), (32, 1))
    first = [torch.empty(5, i, o).uniform_(-(i**-0.5), i**-0.5, generator=generator) for i, o in sizes]
    expected = np.empty(40)
    for fold in range(5):
        own = np.arange(40) % 5 == fold
        weights = [w[fold].clone().requires_grad_() for w in first]
        biases = [torch.zeros(o, requires_grad=True) for _, o in sizes]

        def predict(rows: torch.Tensor, weights: Any = weights, biases: Any = biases) -> torch.Tensor:
            for w, b in zip(weights[:2], biases[:2]):
                rows = (rows @ w + b).relu()
            return (rows @ weights[2] + biases[2])[:, 0]

        optimizer = torch.optim.AdamW([*weights, *biases], lr=3e-3, weight_decay=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            (predict(x[~own]) - target[~own]).square().mean().backward()
            optimizer.step()
        expected[own] = predict(x[own]).detach().double().numpy() * returns.std() + returns.mean()
    fit = baseline(torch.tensor(starts), torch.tensor(returns), "network")
    apart = np.abs(fit.values.numpy() - expected) / returns.std()
    assert np.median(apart) < 1e-4
    assert apart.max() < 0.05  # where rounding decides on which side of zero a ReLU's sum is


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


# ---- from settings, into batches --------------------------------------------------------------------------------------


def test_no_loss_knows_of_weights() -> None:
    """Weights are in the draws alone: a batch has no field for them, so no loss can apply them twice."""
    assert not any("weight" in name for name in inspect.get_annotations(Batch))
    assert list(inspect.signature(Agent.update).parameters) == ["self", "batch", "phase"]


def test_samplers_from_settings() -> None:
    store = random_episodes()
    made = make_sampler({"_target_": "offrl.sampling.AdvantageWeighted", "temperature": [0.1, 0.5]}, [store], (3, 4))
    torch.testing.assert_close(probabilities(made), aw(store, temperature=[0.1, 0.5]))  # type: ignore[arg-type]
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
