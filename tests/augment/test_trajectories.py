"""Coding of trajectories, windows of a dataset, and datasets of what was generated."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from offrl.augment.trajectories import Codec, Rows, Windows, split_episodes, synthetic_store
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.utils.errors import OffrlError


def dataset(*episodes: tuple[int, bool], low: float = -1.0, high: float = 1.0) -> OfflineDataset:
    """Episodes of (length, terminates); the first observation of row n is n, the second is constant."""
    lengths = torch.tensor([length for length, _ in episodes])
    n = int(lengths.sum())
    generator = torch.Generator().manual_seed(0)
    obs = torch.stack([torch.arange(n), torch.full((n,), 5)], 1).float()
    actions = low + (high - low) * torch.rand(n, 2, generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    terminations = torch.zeros(n)
    terminations[offsets[1:] - 1] = torch.tensor([float(ends) for _, ends in episodes])
    info = DatasetInfo(id="made", action_low=low, action_high=high)
    rewards = torch.randn(n, generator=generator)
    return OfflineDataset(obs, actions, rewards, obs + torch.tensor([1.0, 0.0]), terminations, offsets, info)


def windows(store: OfflineDataset, length: int = 4, stride: int = 1, padding: bool = False, **codec: Any) -> Windows:
    coding = Codec(store.obs_dim, store.actions.shape[1], store.info.action_low, store.info.action_high, **codec)
    made = Windows(store, coding, length, stride, padding, torch.arange(store.episodes))
    made.fit()
    return made


def rows(made: Windows) -> list[list[int]]:
    """The rows of the dataset in each window, by their first observation."""
    return made.codec.decode(made.gather(torch.arange(len(made)))).observations[..., 0].round().long().tolist()


# ---- coding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminals", ["sign", "zscore"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.4, 0.4), (0.0, 3.0)])
def test_decoding_undoes_encoding(terminals: Literal["sign", "zscore"], low: float, high: float) -> None:
    store = dataset((30, True), (25, False), low=low, high=high)
    codec = windows(store, terminals=terminals).codec.double()
    inside = store.actions.double()
    x = codec.encode(store.observations.double(), inside, store.rewards.double(), store.terminations.double())
    back = codec.decode(x)
    torch.testing.assert_close(back.observations, store.observations.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(back.rewards, store.rewards.double(), rtol=0, atol=1e-9)
    assert torch.equal(back.terminations, store.terminations > 0)
    half_width, centre = (high - low) / 2, (high + low) / 2
    unit = (inside - centre) / half_width
    ordinary = unit.abs() <= 0.999
    torch.testing.assert_close(back.actions[ordinary], inside[ordinary], rtol=0, atol=1e-9)
    assert (back.actions > low).all()
    assert (back.actions < high).all()
    torch.testing.assert_close(codec.observations(x), back.observations)
    torch.testing.assert_close(codec.unit_actions(x) * half_width + centre, back.actions)


def test_windows_are_standardised_as_often_as_rows_occur_in_them() -> None:
    made = windows(dataset((40, True), (9, False)), terminals="zscore")
    x = made.gather(torch.arange(len(made))).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), rtol=0, atol=1e-4)
    deviation = x.std(0, correction=0)
    varying = torch.tensor([True, False, True, True, True, True])  # the second observation never changes
    torch.testing.assert_close(deviation[varying], torch.ones(5), rtol=0, atol=1e-4)
    assert deviation[1] == 0
    assert made.codec.std[1] == 1


def test_flags_keep_their_signs() -> None:
    made = windows(dataset((40, True), (9, False)))
    flags = made.gather(torch.arange(len(made)))[..., -1]
    assert set(flags.unique().tolist()) == {-1.0, 1.0}


def test_whatever_is_decoded_has_actions_inside_their_box() -> None:
    codec = windows(dataset((30, True), low=-2.0, high=2.0)).codec
    wild = 50 * torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    decoded = codec.decode(wild)
    assert decoded.actions.abs().max() <= 2
    assert decoded.terminations.dtype == torch.bool


# ---- windows -----------------------------------------------------------------------------------------------------------


def test_windows_of_the_authors() -> None:
    """Episodes: 6 rows and a termination, 6 rows and a time limit, 4 rows of each, 2 rows and a termination."""
    made = windows(dataset((6, True), (6, False), (4, True), (4, False), (2, True)))
    assert rows(made) == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],  # ends on the termination
        [6, 7, 8, 9],
        [7, 8, 9, 10],  # and none that ends on the time limit, row 11
        [12, 13, 14, 15],
    ]
    flags = made.codec.decode(made.gather(torch.arange(6))).terminations
    assert not flags[:, :-1].any()
    assert flags[:, -1].tolist() == [False, False, True, False, False, True]


def test_strides_keep_starts_and_terminations() -> None:
    made = windows(dataset((20, True), (20, False)), stride=8)
    # Valid starts 0 ... 16 and 20 ... 35; every eighth of them, and those at a start or on a termination.
    assert [window[0] for window in rows(made)] == [0, 8, 16, 20, 27, 35]
    some = windows(dataset((20, True), (20, True)), stride=5)
    assert [window[0] for window in rows(some)] == [0, 5, 10, 15, 16, 20, 23, 28, 33, 36]


def test_windows_run_past_a_termination() -> None:
    store = dataset((6, True), (6, False), (2, True))
    made = windows(store, padding=True)
    assert rows(made) == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
        [3, 4, 5, 6],  # 6 is the state that was reached, and stays
        [4, 5, 6, 6],
        [5, 6, 6, 6],
        [6, 7, 8, 9],
        [7, 8, 9, 10],
        [12, 13, 14, 14],  # the short episode counts
        [13, 14, 14, 14],
    ]
    decoded = made.codec.decode(made.gather(torch.arange(10)))
    after = torch.tensor([False, False, True, True])  # in the window [4, 5, 6, 6]
    assert torch.equal(decoded.terminations[4], torch.tensor([False, True, True, True]))
    torch.testing.assert_close(decoded.rewards[4][after], torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded.actions[4][after], torch.zeros(2, 2), rtol=0, atol=1e-5)


def test_windows_do_not_cross_episodes_whatever_their_lengths() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (60,), generator=generator).tolist()
    ends = (torch.rand(60, generator=generator) < 0.5).tolist()
    store = dataset(*zip(lengths, ends))
    last = set((store.offsets[1:] - 1).tolist())
    for padding in (False, True):
        made = windows(store, length=8, stride=3, padding=padding)
        seen = set()
        for window in rows(made):
            own = [
                row
                for row in window
                if store.episode_of_row[window[0]] == store.episode_of_row[min(row, len(store) - 1)]
            ]
            inside = [a + 1 == b or (padding and a == b) for a, b in zip(window, window[1:])]
            assert all(inside)
            if not padding:
                assert len(own) == 8
            ends_episode = window[-1] in last and store.terminations[window[-1]] == 0
            assert padding or not ends_episode
            seen.add(window[-1])
        whole = [e for e in range(60) if ends[e] and lengths[e] >= 8]
        assert {int(store.offsets[e + 1]) - 1 for e in whole} <= seen


def test_episodes_that_are_all_too_short() -> None:
    with pytest.raises(OffrlError, match="no episode has a window of 4 steps"):
        windows(dataset((3, True), (4, False)))


def test_held_out_episodes() -> None:
    store = dataset(*[(5, True)] * 40)
    learn, held = split_episodes(store, 0.05, seed=0)
    assert len(held) == 2
    assert sorted([*learn.tolist(), *held.tolist()]) == list(range(40))
    assert not torch.equal(held, split_episodes(store, 0.05, seed=1)[1])
    one, none = split_episodes(dataset((5, True)), 0.05, seed=0)
    assert (one.tolist(), none.tolist()) == ([0], [])


# ---- datasets ------------------------------------------------------------------------------------------------------------


def generated(flags: list[list[bool]]) -> Rows:
    n, steps = len(flags), len(flags[0])
    numbers = torch.arange(n * steps).view(n, steps).float()
    return Rows(numbers.unsqueeze(-1), torch.zeros(n, steps, 1), -numbers, torch.tensor(flags))


def test_trajectories_become_transitions() -> None:
    """One row more than transitions; what follows a termination is left out, and the last row's flag too."""
    off, on = False, True
    made = synthetic_store(
        generated([[off, off, off, off], [off, on, on, off], [off, off, off, on]]), dataset((5, True)), "x"
    )
    assert made.offsets.tolist() == [0, 3, 5, 8]
    assert made.observations[:, 0].tolist() == [0, 1, 2, 4, 5, 8, 9, 10]
    assert made.next_observations[:, 0].tolist() == [1, 2, 3, 5, 6, 9, 10, 11]
    assert made.rewards.tolist() == [-0.0, -1, -2, -4, -5, -8, -9, -10]
    assert made.terminations.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    same = made.episode_of_row[1:] == made.episode_of_row[:-1]
    assert torch.equal(made.next_observations[:-1][same], made.observations[1:][same])
    assert made.info.id == "made (x)"


def test_what_is_not_finite_is_refused() -> None:
    broken = generated([[False, False]])
    bad: Tensor = broken.rewards.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(OffrlError, match="not finite; guide less"):
        synthetic_store(Rows(broken.observations, broken.actions, bad, broken.terminations), dataset((5, True)), "x")
