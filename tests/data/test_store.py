"""The dataset against brute force: no gather crosses an episode's end, and fields on demand equal plain loops."""

from __future__ import annotations

import pytest
import torch

from offrl.data.dataset import DatasetInfo, OfflineDataset, concatenate
from offrl.utils.errors import OffrlError

LENGTHS = (3, 1, 7, 2, 5)
TERMINATED = (True, False, True, False, False)
TAILS = (False, True, False, True, False)


def make_store(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, **info: object) -> OfflineDataset:
    generator = torch.Generator().manual_seed(seed)
    n, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    terminations = torch.zeros(n)
    terminations[offsets[1:][torch.tensor(TERMINATED)] - 1] = 1
    has_tail = torch.tensor(TAILS)
    return OfflineDataset(
        observations=torch.randn(n, 4, generator=generator),
        actions=torch.randn(n, 2, generator=generator),
        rewards=torch.randn(n, generator=generator),
        next_observations=torch.randn(n, 4, generator=generator),
        terminations=terminations,
        offsets=offsets,
        info=DatasetInfo(**info),
        complete=torch.tensor([True, True, True, True, False]),
        tail_rewards=torch.randn(len(lengths), generator=generator) * has_tail,
        tail_actions=torch.randn(len(lengths), 2, generator=generator) * has_tail[:, None],
        has_tail=has_tail,
    )


def rows(store: OfflineDataset) -> list[tuple[int, int, int]]:
    """(row, first row of its episode, row behind its episode) of every row, by a plain loop."""
    bounds = [(int(a), int(b)) for a, b in zip(store.offsets[:-1], store.offsets[1:])]
    return [(row, start, stop) for start, stop in bounds for row in range(start, stop)]


def test_transitions_gather_the_rows_asked_for_and_mask_only_terminations() -> None:
    store = make_store()
    index = torch.tensor([[0, 2, 3], [17, 10, 2]])
    batch = store.transitions(index)
    for lane in range(2):
        for position in range(3):
            row = int(index[lane, position])
            torch.testing.assert_close(batch.obs[lane, position], store.observations[row], rtol=0, atol=0)
            torch.testing.assert_close(batch.action[lane, position], store.actions[row], rtol=0, atol=0)
            torch.testing.assert_close(batch.next_obs[lane, position], store.next_observations[row], rtol=0, atol=0)
            assert batch.reward[lane, position] == store.rewards[row]
    # Rows 2 and 10 end terminated episodes; row 3 is a whole episode that a time limit cut, row 17 is unfinished.
    assert batch.mask.tolist() == [[1, 0, 1], [1, 0, 0]]


def test_return_to_go_and_returns_equal_a_loop_with_tails() -> None:
    store = make_store()
    episode_of = [e for e, length in enumerate(LENGTHS) for _ in range(length)]
    for row, _, stop in rows(store):
        expected = sum(float(r) for r in store.rewards[row:stop].double()) + float(store.tail_rewards[episode_of[row]])
        # float32 holds the sum of at most eight numbers near 1
        assert float(store.return_to_go[row]) == pytest.approx(expected, abs=1e-6)
    first = store.return_to_go[store.offsets[:-1]].double()
    torch.testing.assert_close(first, store.returns, rtol=0, atol=1e-6)


def test_next_action_stays_in_the_episode() -> None:
    store = make_store()
    actions, known = store.next_actions
    episode = 0
    for row, start, stop in rows(store):
        if row == start and row > 0:
            episode += 1
        if row + 1 < stop:
            expected, exists = store.actions[row + 1], True
        elif TAILS[episode]:
            expected, exists = store.tail_actions[episode], True
        else:
            expected, exists = store.actions[row], False
        torch.testing.assert_close(actions[row], expected, rtol=0, atol=0)
        assert bool(known[row]) is exists


@pytest.mark.parametrize("length", [1, 3, 10])
def test_windows_never_cross_an_episodes_end(length: int) -> None:
    store = make_store()
    batch = store.windows(torch.arange(len(store)), length, ("next_action", "return_to_go"))
    assert batch.obs.shape == (len(store), length, 4)
    assert batch.valid is not None
    assert batch.timestep is not None
    assert batch.return_to_go is not None
    for row, start, stop in rows(store):
        for step in range(length):
            inside = row + step < stop
            assert bool(batch.valid[row, step]) is inside
            if inside:
                torch.testing.assert_close(batch.obs[row, step], store.observations[row + step], rtol=0, atol=0)
                assert int(batch.timestep[row, step]) == row + step - start
                assert batch.return_to_go[row, step] == store.return_to_go[row + step]
            else:
                padding = batch.obs[row, step].abs().sum() + batch.reward[row, step].abs() + batch.mask[row, step]
                assert float(padding) == 0


def test_select_episodes_keeps_whole_episodes_in_the_given_order() -> None:
    store = make_store()
    chosen = store.select_episodes(torch.tensor([4, 1, 1, 2]))
    assert chosen.lengths.tolist() == [5, 1, 1, 7]
    expected = torch.cat([store.observations[13:18], store.observations[3:4], store.observations[3:4]])
    torch.testing.assert_close(chosen.observations[:7], expected, rtol=0, atol=0)
    torch.testing.assert_close(chosen.returns, store.returns[[4, 1, 1, 2]])
    assert chosen.complete.tolist() == [False, True, True, True]
    assert chosen.has_tail.tolist() == [False, True, True, False]
    alone = store.select_episodes(torch.tensor([2]))
    torch.testing.assert_close(concatenate([alone, store]).lengths, torch.tensor([7, *LENGTHS]))


@pytest.mark.parametrize(("limit", "steps", "terminal", "counts"), [(5, 4, 0, False), (4, 4, 0, True), (5, 4, 1, True)])
@pytest.mark.parametrize("tail", [False, True])
def test_a_last_episode_that_stopped_midway_is_not_the_best(
    limit: int, steps: int, terminal: int, counts: bool, tail: bool
) -> None:
    """Every step costs 1; the last episode, the shortest, is as long as the limit, terminal, or neither."""
    if tail:
        limit, terminal = limit + 1, 0
        counts = limit == steps + 1
    n = 10 + steps
    obs = torch.zeros(n, 1)
    terminations = torch.zeros(n)
    terminations[-1] = terminal
    store = OfflineDataset(
        obs,
        obs,
        -torch.ones(n),
        obs,
        terminations,
        torch.tensor([0, 5, 10, n]),
        DatasetInfo(max_episode_steps=limit),
        tail_rewards=torch.tensor([0.0, 0.0, -float(tail)]),
        tail_actions=torch.zeros(3, 1),
        has_tail=torch.tensor([False, False, tail]),
    )
    assert store.best_return == (-steps - tail if counts else -5)


def test_with_rewards_moves_tails_along() -> None:
    store = make_store()
    moved = store.with_rewards(scale=2.0, shift=-1.0)
    steps = store.lengths + store.has_tail
    torch.testing.assert_close(moved.returns, 2 * store.returns - steps, rtol=0, atol=1e-5)


def test_observation_statistics_match_numpy() -> None:
    store = make_store()
    mean, std = store.observation_statistics()
    data = store.observations.double().numpy()
    torch.testing.assert_close(mean.double(), torch.from_numpy(data.mean(0)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std.double(), torch.from_numpy(data.std(0)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*OfflineDataset.ROW_FIELDS, *OfflineDataset.EPISODE_FIELDS])
def test_fingerprint_changes_with_any_number(name: str) -> None:
    store = make_store()
    tensors = store.tensors()
    changed = tensors[name].clone().reshape(-1)
    changed[-1] = ~changed[-1] if changed.dtype == torch.bool else changed[-1] + 1
    tensors[name] = changed.reshape(tensors[name].shape)
    assert OfflineDataset(**tensors).fingerprint != store.fingerprint
    assert OfflineDataset(**store.tensors()).fingerprint == store.fingerprint


def test_fingerprint_changes_with_episode_boundaries() -> None:
    assert make_store(lengths=(3, 1, 7, 3, 4)).fingerprint != make_store().fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(0)}, "no transition"),
        ({"actions": torch.zeros(17, 2)}, "actions has 17 rows but rewards has 18"),
        ({"next_observations": torch.zeros(18, 5)}, "differ in shape"),
        ({"offsets": torch.tensor([0, 3, 3, 11, 13, 18])}, "at least one row"),
        (
            {"actions": torch.zeros(18)},
            r"actions has shape \(18,\) and type float32, where \[rows, width\] floats belong",
        ),
        (
            {"rewards": torch.zeros(18, 1)},
            r"rewards has shape \(18, 1\) and type float32, where \[rows\] floats belong",
        ),
        ({"tail_actions": torch.zeros(5, 9)}, "last steps of episodes have another shape"),
        ({"complete": torch.ones(4, dtype=torch.bool)}, "complete has 4 rows for 5 episodes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        OfflineDataset(**(make_store().tensors() | change))
