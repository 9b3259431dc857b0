"""Samplers draw by their stated probabilities, exactly and at any size; BatchLoader mixes sources with fixed shares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_toy
from torch import Tensor
from weighted import P_VALUE, draw, fits

from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, EpisodeWeighted, RowWeighted, Uniform, alias_table, shared_out
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


def lengths_only(lengths: Tensor) -> Any:
    """Stands for a dataset of any size: samplers read nothing but the episodes' places."""
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return SimpleNamespace(lengths=lengths, offsets=offsets, episodes=len(lengths), device=torch.device("cpu"))


class Rows:
    """A dataset that has a length only."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows


def episodes(*lengths: int) -> OfflineDataset:
    """A dataset of the given episode lengths whose observation is the row's number."""
    n = sum(lengths)
    row = torch.arange(n, dtype=torch.float32).unsqueeze(-1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return OfflineDataset(row, row.clone(), row[:, 0].clone(), row + 0.5, torch.zeros(n), offsets)


# ---- uniform --------------------------------------------------------------------------------------------------


def test_uniform_draws_every_row_alike() -> None:
    drawn = draw(Uniform(make_toy(400)), 200_000, (0, 5))
    assert drawn.shape == (2, 200_000)
    for lane in drawn:
        assert fits(lane, torch.ones(400, dtype=torch.float64)) > P_VALUE


def test_uniform_reaches_both_ends_of_any_size() -> None:
    """More rows than float32 can count (2^24): the last ones must be reachable, and every row, not every second."""
    rows = 2**24 + 3
    drawn = draw(Uniform(Rows(rows)), 2_000_000)  # type: ignore[arg-type]
    assert drawn.min() >= 0
    assert drawn.max() < rows
    # Of 2 million draws about 12 fall into the first, and into the last, hundred rows: neither is ever empty.
    assert drawn.min() < 100
    assert drawn.max() >= rows - 100
    assert fits(drawn % 2, torch.ones(2, dtype=torch.float64)) > P_VALUE
    assert fits(drawn * 500 // rows, torch.ones(500, dtype=torch.float64)) > P_VALUE


# ---- weighted episodes ----------------------------------------------------------------------------------------


def test_weights_count_per_transition() -> None:
    """200,000 draws over 40 episodes fit weight x length, and clearly not the weight alone."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (40,), generator=generator)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
    store = lengths_only(lengths)
    drawn = draw(EpisodeWeighted(store, weights), 200_000)[0]
    episode = torch.searchsorted(store.offsets, drawn, right=True) - 1
    assert fits(episode, weights * lengths) > P_VALUE
    assert fits(episode, weights) < 1e-12


def test_rows_of_an_episode_are_alike() -> None:
    lengths, weights = torch.tensor([7, 1, 30, 12]), torch.tensor([0.5, 2.0, 0.1, 1.0], dtype=torch.float64)
    drawn = draw(EpisodeWeighted(lengths_only(lengths), weights), 300_000)
    assert fits(drawn, torch.repeat_interleave(weights, lengths)) > P_VALUE


def test_lanes_may_have_weights_of_their_own() -> None:
    lengths = torch.tensor([3, 5, 2])
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 4.0]], dtype=torch.float64)
    sampler = EpisodeWeighted(lengths_only(lengths), weights)
    drawn = draw(sampler, 100_000, (0, 1))
    for lane in range(2):
        assert fits_where_possible(drawn[lane], torch.repeat_interleave(weights[lane], lengths))
    # A lane draws the same rows when it is alone with its weights.
    alone = draw(EpisodeWeighted(lengths_only(lengths), weights[1]), 100_000, (1,))
    assert torch.equal(drawn[1], alone[0])


def fits_where_possible(index: Tensor, probability: Tensor) -> bool:
    """Chi-square over the rows that can be drawn; none of the others was."""
    possible = probability > 0
    assert possible[index].all()
    renamed = possible.cumsum(0)[index] - 1
    return fits(renamed, probability[possible]) > P_VALUE


def test_no_precision_is_lost_over_millions_of_transitions() -> None:
    """Two million transitions in 40,000 episodes of steep weights: each of the light ones keeps its share.

    A table in float32 would leave a third of them without any.
    """
    count, length, alpha = 40_000, 50, 0.1
    z = torch.linspace(0, 1, count, dtype=torch.float64)
    weights = ((z - 1) / alpha).exp()
    sampler = EpisodeWeighted(lengths_only(torch.full((count,), length)), weights)
    widths = torch.diff(sampler.table[0], prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(widths, weights / weights.sum(), rtol=1e-6, atol=0)
    drawn = draw(sampler, 1_000_000)
    groups = torch.arange(count * length) // (count * length // 100)  # one episode in four hundred each
    share = torch.zeros(100, dtype=torch.float64).index_add_(0, groups, torch.repeat_interleave(weights, length))
    assert fits(drawn // (count * length // 100), share) > P_VALUE


def test_more_rows_than_float32_can_count() -> None:
    """Long episodes: offset and place add up exactly behind row 2^24, and the very last rows are reachable."""
    lengths = torch.tensor([2**24 + 1, 2**25 + 7, 3])
    rows = int(lengths.sum())
    weights = torch.tensor([1e-6, 1e-6, 10.0])
    drawn = draw(EpisodeWeighted(lengths_only(lengths), weights), 400_000)
    tail = drawn[drawn >= rows - 3]
    assert fits(tail - (rows - 3), torch.ones(3, dtype=torch.float64)) > P_VALUE
    body = drawn[drawn < rows - 3]
    assert len(body) > 100_000
    assert fits(body % 2, torch.ones(2, dtype=torch.float64)) > P_VALUE
    assert body.max() > 2**25


@pytest.mark.parametrize("zeros", [(0,), (3,), (0, 1), (2, 3), (1, 2), (0, 3)], ids=str)
def test_episodes_without_weight_are_never_drawn(zeros: tuple[int, ...]) -> None:
    """Wherever they stand: before, between and behind the others."""
    store = episodes(4, 3, 5, 2)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.7])  # float32: the shares are no round numbers
    weights[list(zeros)] = 0.0
    drawn = draw(EpisodeWeighted(store, weights), 200_000)
    seen = set(store.episode_of_row[drawn[0].unique()].tolist())
    assert seen == set(range(4)) - set(zeros)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_the_extreme_random_numbers_are_safe(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest number that can be drawn lead to an episode with weight, however the sums round."""
    lengths = torch.full((1000,), 3)
    monkeypatch.setattr(LaneRandom, "uniform", lambda *_: torch.full((1, 1, 2, 8), u, dtype=torch.float64))
    for seed in range(10):
        weights = torch.rand(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weights[[0, -1]] = 0.0
        drawn = draw(EpisodeWeighted(lengths_only(lengths), weights), 8)
        assert set(drawn.flatten().tolist()) == {3 if u == 0 else 3 * 998 + 2}


def test_the_scale_of_weights_does_not_matter() -> None:
    store, weights = episodes(4, 3, 2), torch.tensor([1.0, 0.0, 3.0])
    one, steps = EpisodeWeighted(store, weights), torch.arange(1, 9)
    for scale in (1e-9, 1e9):
        drawn = EpisodeWeighted(store, scale * weights).draw(LaneRandom((0,)), steps, 50)
        assert torch.equal(drawn, one.draw(LaneRandom((0,)), steps, 50))


@pytest.mark.parametrize(
    "weights",
    [[0.0, 0.0, 0.0], [1.0, -0.1, 1.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0], [[1, 1, 1], [0, 0, 0]]],
    ids=["zero", "negative", "nan", "infinite", "one lane zero"],
)
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        EpisodeWeighted(episodes(2, 2, 2), torch.tensor(weights))


def test_weights_for_another_number_of_episodes_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        EpisodeWeighted(episodes(2, 2, 2), torch.ones(4))


SAMPLERS = {
    "uniform": lambda store: Uniform(store),
    "episodes": lambda store: EpisodeWeighted(store, torch.arange(1.0, 5.0)),
    "episodes by lane": lambda store: EpisodeWeighted(store, torch.arange(1.0, 9.0).view(2, 4)),
    "rows": lambda store: RowWeighted(torch.arange(1.0, 15.0)),
    "rows by lane": lambda store: RowWeighted(torch.arange(1.0, 29.0).view(2, 14)),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_many_updates_at_once_equal_one_by_one(kind: str) -> None:
    store = episodes(4, 3, 5, 2)
    sampler = SAMPLERS[kind](store)
    random, steps = LaneRandom((3, 4)), torch.arange(1, 9)
    at_once = sampler.draw(random, steps, 6, "s")
    assert at_once.shape == (8, 2, 6)
    for i in range(8):
        assert torch.equal(at_once[i], sampler.draw(random, steps[i : i + 1], 6, "s")[0])
    assert at_once.flatten(1).unique(dim=0).shape[0] == 8


# ---- weighted rows ---------------------------------------------------------------------------------------------


def probability(keep: Tensor, alias: Tensor) -> Tensor:
    """What an alias table draws, exactly: `[N]`."""
    return (keep + torch.zeros_like(keep).index_add_(0, alias.long(), 1 - keep)) / len(keep)


@pytest.mark.parametrize("kind", ["equal", "one", "zeros", "two levels", "wide", "few", "random"])
def test_alias_tables_hold_the_probabilities(kind: str) -> None:
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
def test_one_bad_weight_among_good_ones_is_refused(bad: float) -> None:
    """And weights of any size are good: they count by their ratios."""
    with pytest.raises(ValueError, match="finite and non-negative with a positive sum"):
        alias_table(torch.tensor([1e-3, bad, 2e-3]))
    with pytest.raises(ValueError, match="positive sum"):
        alias_table(torch.zeros(3))
    torch.testing.assert_close(
        probability(*alias_table(torch.tensor([1e-3, 3e-3, 0.0]))), torch.tensor([0.25, 0.75, 0.0]).double()
    )


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


# ---- batches --------------------------------------------------------------------------------------------------


def sources(*shares: float) -> list[tuple[OfflineDataset, Uniform, float]]:
    """datasets whose rewards tell which one a row came from."""
    stores = []
    for i in range(len(shares)):
        store = episodes(6, 6)
        stores.append(store.with_rewards(0.0, float(i)))
    return [(store, Uniform(store), share) for store, share in zip(stores, shares)]


@pytest.mark.parametrize(
    ("shares", "batch", "expected"),
    [
        ((1.0,), 10, [10]),
        ((0.5, 0.5), 10, [5, 5]),
        ((0.7, 0.3), 256, [179, 77]),
        ((0.5, 0.25, 0.25), 9, [5, 2, 2]),
        ((0.5, *[0.1] * 5), 256, [128, 26, 25, 26, 25, 26]),
    ],
)
def test_every_batch_holds_the_stated_shares(shares: tuple[float, ...], batch: int, expected: list[int]) -> None:
    loader = BatchLoader(sources(*shares), batch)
    reward = loader.draw(LaneRandom((0, 1)), torch.arange(1, 6)).reward
    assert reward.shape == (5, 2, batch)
    for part in reward.flatten(0, 1):
        assert torch.bincount(part.long(), minlength=len(shares)).tolist() == expected


def test_a_share_of_nothing_draws_nothing() -> None:
    assert not BatchLoader(sources(1.0, 0.0), 8).draw(LaneRandom((0,)), torch.tensor([1])).reward.any()


def test_many_small_shares_add_up() -> None:
    """Each of 300 parts has less than half a row of the batch, and together they have half of it."""
    counts = shared_out([0.5 / 300] * 300, 256)
    assert (counts[0], sum(counts), set(counts[1:])) == (128, 256, {0, 1})


def test_a_share_that_is_no_row_is_refused() -> None:
    with pytest.raises(OffrlError, match=r"batch_size=8 holds no row of the data whose share is 0.05"):
        BatchLoader(sources(0.95, 0.05), 8)


def test_shares_beyond_the_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        BatchLoader(sources(0.0, 0.8, 0.8), 10)


def test_a_source_can_be_replaced_while_training_runs() -> None:
    loader, random, step = BatchLoader(sources(0.5, 0.5), 8), LaneRandom((0,)), torch.tensor([3])
    before = loader.draw(random, step)
    fresh = episodes(40).with_rewards(0.0, 7.0)
    loader.replace(1, fresh, Uniform(fresh))
    after = loader.draw(random, step)
    assert torch.equal(after.index[..., :4], before.index[..., :4])  # the other source goes on as it was
    assert (after.reward[..., 4:] == 7).all()
    assert after.reward.shape == before.reward.shape


def test_sources_do_not_share_random_numbers() -> None:
    """Two samplers over stores of one size must not draw the same rows."""
    rows = BatchLoader(sources(0.5, 0.5), 4000).draw(LaneRandom((0,)), torch.tensor([1])).obs[0, 0, :, 0]
    agree = (rows[:2000] == rows[2000:]).double().mean().item()
    assert agree == pytest.approx(1 / 12, abs=5 * (1 / 12 / 2000) ** 0.5)


def test_only_rows_of_the_first_source_have_a_number() -> None:
    batch = BatchLoader(sources(0.5, 0.25, 0.25), 8).draw(LaneRandom((0, 1)), torch.arange(1, 4))
    assert torch.equal(batch.index >= 0, batch.reward == 0)
    assert (batch.index[..., 4:] == -1).all()


def test_extra_fields_of_mixed_sources_line_up() -> None:
    loader = BatchLoader(sources(0.5, 0.5), 10, fields=("next_action", "return_to_go", "timestep"))
    batch = loader.draw(LaneRandom((0, 1)), torch.arange(1, 4))
    assert batch.timestep is not None
    assert batch.return_to_go is not None
    row = batch.obs[..., 0].long()
    assert torch.equal(batch.timestep, row % 6)
    assert torch.equal(batch.return_to_go, batch.reward * (6 - row % 6))
    assert torch.equal(batch.index[..., :5], row[..., :5])
    assert (batch.index[..., 5:] == -1).all()  # rows of another dataset than the agent was given


def test_windows_start_by_the_weights_and_never_cross_an_episodes_end() -> None:
    store, weights = episodes(3, 1, 7, 4), torch.tensor([1.0, 5.0, 2.0, 0.5])
    loader = BatchLoader([(store, EpisodeWeighted(store, weights), 1.0)], 2000, window=5)
    batch = loader.draw(LaneRandom((0, 1)), torch.arange(1, 4))
    assert batch.valid is not None
    assert batch.obs.shape == (3, 2, 2000, 5, 1)
    assert fits(batch.index, torch.repeat_interleave(weights, store.lengths).double()) > P_VALUE
    valid = batch.valid.bool()
    rows = batch.obs[..., 0].long()
    start = batch.index.unsqueeze(-1)
    assert torch.equal(store.episode_of_row[rows][valid], store.episode_of_row[start].expand_as(rows)[valid])
    # A window holds all the steps that its episode still has, up to five, and padding is empty.
    left = store.offsets[1:][store.episode_of_row[batch.index]] - batch.index
    assert torch.equal(valid.sum(-1), left.clamp(max=5))
    assert not batch.obs[~valid].any()
    assert np.array_equal(rows[valid], (start + torch.arange(5)).expand_as(rows)[valid])
