"""Ends that the flags of a file lose and its successors prove, against data whose ends are known."""

from __future__ import annotations

import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch
from made import trajectories, without, write_hdf5, write_npz

from offrl.data import DatasetInfo, OfflineDataset, ReadOptions, from_arrays, from_episodes, from_frame
from offrl.datasets import load
from offrl.utils.errors import OffrlError

LENGTHS = [30, 12, 1, 40, 17]
ENDS = [True, False, False, True, False]
LAST = np.cumsum(LENGTHS) - 1


def qlearning(data: dict[str, Any]) -> dict[str, Any]:
    """What D4RL's `qlearning_dataset` makes of a file: rows with a timeout are gone, and so are the timeouts."""
    keep = ~data["timeouts"]
    keep[-1] = False
    after = np.roll(data["observations"], -1, axis=0)
    rows = {key: data[key][keep] for key in ("observations", "actions", "rewards", "terminals")}
    return rows | {"next_observations": after[keep]}


def test_qlearning_arrays_under_a_d4rl_id_keep_their_trajectories(tmp_path: Path) -> None:
    """999 rows are left of each trajectory that met the limit of 1000, which must not be counted anew."""
    data = trajectories([1000, 1000, 437, 1000, 1000], [False, False, True, False, False])
    rows = qlearning(data)
    path = write_npz(tmp_path / "hopper-medium-v2.npz", rows)
    with pytest.warns(UserWarning, match=r"no flag marks 3 of the episode ends.*first: row 998.*truncations"):
        store = load(path)
    assert store.lengths.tolist() == [999, 999, 437, 999, 999]
    assert store.terminations.nonzero().flatten().tolist() == [999 + 999 + 436]
    ends = store.offsets[1:] - 1
    assert not store.next_actions[1][ends].any()
    returns = [part.sum() for part in np.split(rows["rewards"].astype("f8"), store.offsets[1:-1].numpy())]
    np.testing.assert_allclose(store.returns, returns, rtol=0, atol=1e-4)  # sums of 999 float32 numbers near 1
    np.testing.assert_array_equal(store.next_observations, rows["next_observations"])
    with pytest.warns(UserWarning, match="no flag marks 3"):  # also when the cache answers
        load(path)


def test_the_limit_of_a_name_counts_only_where_nothing_is_stored(tmp_path: Path) -> None:
    """An own limit of 1500 in a file under D4RL's name: the successors show no other end than the terminals."""
    data = without(trajectories([1500, 1400], [True, True]), "timeouts")
    assert load(write_npz(tmp_path / "hopper-medium-v2.npz", data)).lengths.tolist() == [1500, 1400]
    shifted = data | {"next_observations": np.roll(data["observations"], -1, axis=0)}
    shifted["terminals"] = np.zeros(2900, bool)
    shifted["next_observations"][-1] += 1
    with pytest.warns(UserWarning, match="next episode's first observation at 2 of"):
        store = load(write_npz(tmp_path / "halfcheetah-medium-v2.npz", shifted))
    assert store.lengths.tolist() == [999, 999, 900]


@pytest.mark.parametrize("write", [write_npz, write_hdf5])
def test_without_timeouts_the_jumps_of_successors_are_the_ends(tmp_path: Path, write: Any) -> None:
    data = trajectories(LENGTHS, ENDS)
    path = write(tmp_path / ("a.npz" if write is write_npz else "a.hdf5"), without(data, "timeouts"))
    with pytest.warns(UserWarning, match="no flag marks 2"):
        store = load(path)
    whole = from_arrays(data)
    assert store.lengths.tolist() == LENGTHS
    assert store.complete.tolist() == [True] * 4 + [False]  # nothing shows that the last one was whole
    for name, tensor in store.tensors().items():
        if name != "complete":
            assert torch.equal(tensor, whole.tensors()[name]), name
    windows = store.windows(torch.tensor([LAST[1]]), 5)
    assert windows.valid is not None
    assert windows.valid.tolist() == [[1, 0, 0, 0, 0]]


def test_marks_that_are_forgotten_now_and_then() -> None:
    data = trajectories(LENGTHS, ENDS)
    data["timeouts"][LAST[1]] = False
    with pytest.warns(UserWarning, match="no flag marks 1"):
        store = from_arrays(data)
    assert store.lengths.tolist() == LENGTHS


def test_rounding_is_no_end() -> None:
    data = trajectories([50, 50], [True, True])
    data["next_observations"] = (data["next_observations"].astype("f8") * (1 + 1e-7)).astype("f4")
    assert from_arrays(data).lengths.tolist() == [50, 50]


def test_rows_in_no_order_are_episodes_of_their_own() -> None:
    data = trajectories([50, 50], [True, False])
    order = np.random.default_rng(0).permutation(100)
    shuffled = {key: value[order] for key, value in data.items()}
    with pytest.warns(UserWarning, match="Most rows do not follow the row before"):
        store = from_arrays(shuffled)
    assert store.episodes > 95
    np.testing.assert_array_equal(store.next_observations, shuffled["next_observations"])
    assert store.terminations.nonzero().flatten().tolist() == np.flatnonzero(order == 49).tolist()


def test_marks_on_the_row_behind_are_refused() -> None:
    data = trajectories(LENGTHS, ENDS)
    for key in ("terminals", "timeouts"):
        data[key] = np.append(False, data[key][:-1])
    with pytest.raises(OffrlError, match=r"mark the row behind each end .*\(row 30 instead of 29\)"):
        from_arrays(data)


def automatic_resets() -> dict[str, Any]:
    """At a limit, the stored successor is the observation after the reset (the last row's is unknown)."""
    data = trajectories(LENGTHS, ENDS)
    for row in LAST[[1, 2]]:
        data["next_observations"][row] = data["observations"][row + 1]
    return data


def test_the_successor_of_an_automatic_reset_is_unknown() -> None:
    data = automatic_resets()
    with pytest.warns(UserWarning, match="next episode's first observation at 2 of"):
        store = from_arrays(data)
    kept = np.delete(np.arange(100), LAST[[1, 2]])
    np.testing.assert_array_equal(store.observations, data["observations"][kept])
    np.testing.assert_array_equal(store.next_observations, data["next_observations"][kept])
    assert store.lengths.tolist() == [30, 11, 40, 17]  # the episode of one step has no transition
    assert store.has_tail.tolist() == [False, True, False, False]
    actions, known = store.next_actions
    np.testing.assert_array_equal(actions[40], data["actions"][LAST[1]])
    assert bool(known[40])
    expected = data["rewards"][30:42].astype("f8").sum()
    assert float(store.returns[1]) == pytest.approx(expected, abs=1e-5)


def test_a_state_that_stays_proves_no_reset() -> None:
    data = {
        "observations": np.zeros((10, 1)),
        "next_observations": np.zeros((10, 1)),
        "actions": np.zeros((10, 1)),
        "rewards": np.ones(10),
        "terminals": np.zeros(10),
        "timeouts": np.arange(10) % 5 == 4,
    }
    assert len(from_arrays(data)) == 10


def same(one: OfflineDataset, other: OfflineDataset) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_options_keep_their_meaning() -> None:
    """`d4rl` ignores stored successors; `unfinished` takes data without any end as one episode."""
    data = trajectories(LENGTHS, ENDS)
    rows = without(data, "timeouts")
    with pytest.warns(UserWarning, match="semantics=d4rl ignores next_observations"):
        restated = from_arrays(rows, None, ReadOptions(semantics="d4rl"))
    assert same(restated, from_arrays(without(rows, "next_observations"), None, ReadOptions(semantics="d4rl")))
    endless = trajectories([40], [False]) | {"timeouts": np.zeros(40, bool)}
    with pytest.raises(OffrlError, match=r"no episode ends \(terminals and timeouts are never 1\)"):
        from_arrays(endless)
    assert from_arrays(endless, None, ReadOptions(unfinished=True)).complete.tolist() == [False]


def test_why_no_end_is_known(tmp_path: Path) -> None:
    data = without(trajectories([500], [False]), "timeouts")
    with pytest.raises(OffrlError, match="500 rows do not reach the time limit of 1000"):
        load(write_npz(tmp_path / "halfcheetah-medium-v2.npz", data))
    with pytest.raises(OffrlError, match="no timeouts and no time limit is known"):
        load(write_npz(tmp_path / "mine.npz", data))
    assert from_arrays(data, DatasetInfo(max_episode_steps=100)).lengths.tolist() == [99, 99, 99, 99, 100]


@pytest.mark.parametrize("seed", range(5))
def test_ends_of_random_files_are_found_again(seed: int) -> None:
    """Whatever marks are lost, every end but the file's last is where the trajectories were."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, 15).tolist()
    data = trajectories(lengths, (rng.random(15) < 0.5).tolist(), seed)
    data["timeouts"] &= rng.random(len(data["timeouts"])) < 0.5
    with pytest.warns(UserWarning, match="no flag marks"):
        store = from_arrays(data)
    assert store.lengths.tolist() == lengths
    np.testing.assert_array_equal(store.terminations, data["terminals"].astype("f4"))


# ---- marks of both kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["timeouts", "dones", "both", "episodes", "frame", "d3rlpy"])
def test_terminated_episodes_of_antmaze_stay_apart_where_their_ends_are_told(way: str, tmp_path: Path) -> None:
    """Its terminals end no episode by themselves; ends told by the source do, whichever way it tells them."""
    data = trajectories([5, 5, 5], [True, True, False])
    ends = np.isin(np.arange(15), [4, 9, 14])
    base = {key: data[key] for key in ("observations", "actions", "rewards", "terminals")}
    options = ReadOptions(family="antmaze")
    if way == "episodes":
        parts = [{key: value[i : i + 5] for key, value in base.items()} for i in (0, 5, 10)]
        store = from_episodes(parts, options=options)
    elif way == "frame":
        states = {f"s{i}": column for i, column in enumerate(base["observations"].T)}
        pushes = {f"a{i}": column for i, column in enumerate(base["actions"].T)}
        others = {"reward": base["rewards"], "terminal": base["terminals"], "episode": np.repeat([0, 1, 2], 5)}
        frame = pl.DataFrame({**states, **pushes, **others})
        store = from_frame(frame, [*states], [*pushes], episode="episode", options=options)
    elif way == "d3rlpy":
        path = tmp_path / "antmaze-umaze-v2.h5"
        with h5py.File(path, "w") as file:
            for number, i in enumerate((0, 5, 10)):
                for key in ("observations", "actions", "rewards"):
                    file[f"{key}_{number}"] = base[key][i : i + 5]
                file[f"terminated_{number}"] = bool(base["terminals"][i + 4])
        store = load(path)
    else:
        marks = {"timeouts": {"timeouts": ends}, "dones": {"dones": ends}, "both": {"timeouts": ends, "dones": ends}}
        store = from_arrays(base | marks[way], options=options)
    assert (store.lengths + store.has_tail).tolist() == [5, 5, 5]
    assert store.terminations.nonzero().flatten().tolist() == [4, 9]


# ---- episodes of a frame -------------------------------------------------------------------------------------


def frame_of(lengths: list[int], ends: list[bool], **labels: Any) -> pl.DataFrame:
    """The trajectories' first number of states and actions, rewards and terminals, and `labels`, one an episode."""
    data = trajectories(lengths, ends)
    columns = {"x": data["observations"][:, 0], "a": data["actions"][:, 0], "reward": data["rewards"]}
    rows = {
        key: [label for label, n in zip(value, lengths, strict=True) for _ in range(n)] for key, value in labels.items()
    }
    return pl.DataFrame(columns | {"terminal": data["terminals"]} | rows)


def whole_lengths(store: OfflineDataset) -> list[int]:
    return (store.lengths + store.has_tail).tolist()


def test_several_columns_tell_episodes_apart_together() -> None:
    """Each run counts its episodes from 0, so that only both columns show where one run's last episode ends."""
    runs, numbers = ["a", "a", "b", "b", "c"], [0, 1, 1, 2, 2]
    frame = frame_of([6, 4, 5, 3, 7], [False] * 5, run=runs, episode=numbers)
    assert whole_lengths(from_frame(frame, "x", "a", episode="episode")) == [6, 9, 10]
    assert whole_lengths(from_frame(frame, "x", "a", episode="run")) == [10, 8, 7]
    both = from_frame(frame, "x", "a", episode=["run", "episode"])
    assert whole_lengths(both) == [6, 4, 5, 3, 7]
    for names in (["episode", "run"], ("run", "episode"), pl.Series(["run", "episode"])):
        assert same(from_frame(frame, "x", "a", episode=names), both)
    named = frame.with_columns(key=pl.format("{}/{}", "run", "episode"))
    for names in ("key", ["key"]):
        assert same(from_frame(named, "x", "a", episode=names), both)
    # A termination where only one of the columns changes stays one.
    terminated = frame_of([6, 4, 5, 3, 7], [False, True, False, True, False], run=runs, episode=numbers)
    store = from_frame(terminated, "x", "a", episode=["run", "episode"])
    assert whole_lengths(store) == [6, 4, 5, 3, 7]
    assert store.terminations.sum() == 2


def test_rows_of_an_episode_stand_together_by_all_its_columns() -> None:
    """Of two runs that wrote their steps in turn."""
    lengths = [6, 6, 6, 6]
    frame = frame_of(lengths, [False] * 4, run=["a", "a", "b", "b"], episode=[0, 1, 0, 1])
    turns = frame[np.arange(24).reshape(2, 12).T.flatten()]  # of run a, of run b, of run a, ...
    assert whole_lengths(from_frame(turns, "x", "a", episode="episode")) == [12, 12]  # what one column cannot tell
    with pytest.raises(
        OffrlError, match=r"stand together: run changes 23 times between 2 values; sort .* by run and step"
    ):
        from_frame(turns, "x", "a", episode="run")
    both = "stand together: run and episode together change 23 times between 4 values; sort .* by run, episode and step"
    with pytest.raises(OffrlError, match=both):
        from_frame(turns, "x", "a", episode=["run", "episode"])
    again = turns.sort("run", "episode", maintain_order=True)
    assert same(
        from_frame(again, "x", "a", episode=["run", "episode"]), from_frame(frame, "x", "a", episode=["run", "episode"])
    )


@pytest.mark.parametrize("labels", [[7, 8, 9], [0.5, 1.5, 2.5], ["a", "b", "c"], [True, False, True], None], ids=str)
def test_a_row_without_an_episode_is_refused(labels: list[Any] | None) -> None:
    """Polars gives NaN, which differs from itself, or None; each such row would be an episode of one step."""
    labels = labels or [datetime(2024, 1, day) for day in (1, 2, 3)]
    frame = frame_of([4, 5, 6], [False] * 3, run=["r"] * 3, episode=labels)
    assert whole_lengths(from_frame(frame, "x", "a", episode="episode")) == [4, 5, 6]
    row = pl.int_range(pl.len())
    holes = frame.with_columns(episode=pl.when((row == 2) | (row == 9)).then(None).otherwise("episode"))
    sentence = (
        r"^column episode, which episode= names, has no value in 2 of 15 rows \(first: row 2\); fill in the episode"
    )
    for names in ("episode", ["run", "episode"]):
        with pytest.raises(OffrlError, match=sentence):
            from_frame(holes, "x", "a", episode=names)
    nothing = frame.with_columns(episode=pl.lit(None))
    with pytest.raises(OffrlError, match="no value in 15 of 15 rows"):
        from_frame(nothing, "x", "a", episode="episode")


@pytest.mark.parametrize("label", [[1, 2], {"a": 1}, np.zeros(2)], ids=str)
def test_an_episode_is_one_value_a_row(label: Any) -> None:
    frame = frame_of([4, 5], [False] * 2, episode=[label, label])
    with pytest.raises(OffrlError, match=r"^column episode, which episode= names, holds more than one value a row"):
        from_frame(frame, "x", "a", episode="episode")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"observations": []}, "^observations names no column; give the name of a column"),
        ({"actions": []}, "^actions names no column"),
        ({"rewards": []}, "^rewards names no column"),
        ({"terminals": []}, "^terminals names no column"),
        ({"timeouts": ()}, "^timeouts names no column"),
        ({"episode": []}, "^episode names no column"),
        (
            {"observations": 3},
            "^observations holds a value of type int as a column's name; give a name as text, or a list",
        ),
        ({"observations": ["x", 3]}, "^observations holds a value of type int"),
        ({"observations": pl.col("x")}, "^observations holds a value of type Expr"),
        ({"rewards": None}, "^rewards holds a value of type NoneType"),
        ({"episode": True}, "^episode holds a value of type bool"),
        ({"rewards": ["reward", "x"]}, r"^rewards names 2 columns \(reward, x\); give the name of one column"),
        ({"terminals": ["terminal", "x"]}, "^terminals names 2 columns"),
        ({"timeouts": ("terminal", "x")}, "^timeouts names 2 columns"),
        ({"episode": ["number", "z"]}, "^the frame has no column z, which episode= names"),
        ({"observations": ["x", "time"]}, "^frame: column time of observations has dtype datetime64.*plain numbers"),
        ({"observations": "time"}, "^frame: column time of observations has dtype datetime64"),
        ({"actions": ["a", "text"]}, "^frame: column text of actions has dtype object"),
        ({"rewards": "time"}, "^frame: column time of rewards has dtype datetime64"),
        ({"terminals": "text", "episode": "number"}, "^frame: column text of terminals has dtype object"),
        ({"observations": ["x", "pair"]}, "^observations: columns x and pair have cells of different shapes"),
    ],
)
def test_what_names_no_columns_of_numbers_gets_a_sentence(given: dict[str, Any], sentence: str) -> None:
    frame = frame_of([4, 5], [True, True], number=[0, 1], text=["p", "q"], time=[datetime(2024, 1, 1)] * 2)
    frame = frame.with_columns(pair=pl.Series(np.zeros((9, 2))))
    with pytest.raises(OffrlError, match=sentence):
        from_frame(frame, **{"observations": "x", "actions": "a"} | given)


def test_a_list_of_one_name_and_cells_of_arrays_are_read() -> None:
    frame = frame_of([4, 5], [True, False], number=[0, 1]).with_columns(pair=pl.Series(np.ones((9, 2))))
    lists = {"rewards": ["reward"], "terminals": ["terminal"], "episode": ["number"]}
    assert same(from_frame(frame, ["x"], ["a"], **lists), from_frame(frame, "x", "a", episode="number"))
    assert from_frame(frame, ["pair"], "a", episode="number").obs_dim == 2


# ---- steps of resets -----------------------------------------------------------------------------------------


def test_steps_of_resets_are_told() -> None:
    """Gymnasium's vector environments reset in the step after an end: its action is ignored and its reward is 0."""
    data = trajectories([6, 4, 7, 5], [True, True, False, True])
    data["rewards"] += 5  # none is 0 by itself
    parts = np.split(np.arange(22), [6, 10, 17])
    for logged in (True, False):
        columns: dict[str, list[np.ndarray]] = {key: [] for key in data}
        for rows in parts:
            for key in data:
                columns[key].append(data[key][rows])
            if logged and rows[-1] < 21:  # from the last state to the next episode's first
                last, first = data["next_observations"][rows[-1]], data["observations"][rows[-1] + 1]
                step = {"observations": last, "next_observations": first, "actions": data["actions"][0]}
                for key in data:
                    columns[key].append(np.asarray(step.get(key, 0))[None].astype(data[key].dtype))
        arrays = {key: np.concatenate(value) for key, value in columns.items()}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            from_arrays(arrays)
        assert any("each of the 3 ends is followed by a step with reward 0" in str(w.message) for w in said) is logged
