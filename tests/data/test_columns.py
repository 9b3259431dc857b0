"""Keys that change what rows mean, each in the convention of the library that writes it, as NPZ and as HDF5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from made import trajectories, without, write_hdf5, write_npz

from offrl.data import DatasetInfo, OfflineDataset, from_arrays
from offrl.data.columns import FLAGS
from offrl.data.dataset import FIRST_ACTION
from offrl.datasets import load
from offrl.utils.errors import OffrlError

LENGTHS = [10, 10, 1, 12]
ENDS = [True, False, False, False]
LAST = np.cumsum(LENGTHS) - 1
Writer = Callable[[dict[str, Any]], OfflineDataset]


@pytest.fixture(params=["npz", "hdf5", "arrays"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Writer:
    """Reads columns as a file of each kind, or from memory."""
    if request.param == "arrays":
        return from_arrays
    write = write_npz if request.param == "npz" else write_hdf5
    return lambda data: load(write(tmp_path / f"a.{request.param}", data), cache=False)


def data(**changes: Any) -> dict[str, Any]:
    return trajectories(LENGTHS, ENDS) | changes


def terminated(store: OfflineDataset) -> list[int]:
    return store.terminations.nonzero().flatten().tolist()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [alias for names in FLAGS.values() for alias in names])
def test_no_flag_is_ignored(name: str) -> None:
    """Random flags under any name change the dataset, or are refused."""
    rows = data()
    plain = from_arrays(rows)
    flag = np.zeros(len(rows["rewards"]))
    flag[[3, 4, 17]] = 1
    flag = 1 - flag if name in ("masks", "valids") else flag
    refusal, changed = "", None
    try:
        changed = from_arrays(rows | {name: flag})
    except OffrlError as error:
        refusal = str(error)
    assert name in refusal or (changed is not None and changed.fingerprint != plain.fingerprint)


@pytest.mark.parametrize(("terminals", "timeouts"), [("terminations", "truncations"), ("terminated", "truncated")])
def test_gymnasiums_names(read: Writer, terminals: str, timeouts: str) -> None:
    rows = data()
    renamed = without(rows, "terminals", "timeouts")
    renamed |= {terminals: rows["terminals"], timeouts: rows["timeouts"]}
    assert read(renamed).fingerprint == from_arrays(rows).fingerprint
    with pytest.raises(OffrlError, match=f"terminals and {terminals} mean the same but differ in row 3"):
        read(renamed | {"terminals": np.isin(np.arange(33), [3, 9])})


def test_masks_tell_terminations_and_terminals_ends_as_in_ogbench(read: Writer) -> None:
    """At rows 4, 5 and 27 the task is solved (mask 0) while the trajectory goes on to its end."""
    rows = without(data(), "timeouts")
    masks = np.ones(33, "f4")
    masks[[4, 5, 27]] = 0
    store = read(rows | {"masks": masks, "terminals": np.isin(np.arange(33), LAST)})
    assert store.lengths.tolist() == LENGTHS
    assert terminated(store) == [4, 5, 27]
    np.testing.assert_array_equal(store.next_observations, rows["next_observations"])
    np.testing.assert_array_equal(store.transitions(torch.arange(33)).mask, masks)


def test_masks_alone_are_one_minus_terminals(read: Writer) -> None:
    rows = data()
    masks = 1.0 - rows["terminals"]
    assert read(without(rows, "terminals") | {"masks": masks}).fingerprint == from_arrays(rows).fingerprint
    floats = without(rows, "terminals", "timeouts") | {"masks": masks, "dones_float": np.isin(np.arange(33), LAST)}
    assert read(floats).fingerprint == from_arrays(rows).fingerprint


def test_dones_beside_timeouts_as_in_stable_baselines(read: Writer) -> None:
    """Their `dones` are 1 at time limits too, which `timeouts` mark."""
    rows = data()
    dones = rows["terminals"] | rows["timeouts"]
    store = read(without(rows, "terminals") | {"dones": dones.astype("f4")[:, None]})
    assert store.fingerprint == from_arrays(rows).fingerprint
    assert terminated(store) == [9]


@pytest.mark.parametrize("name", ["dones", "episode_terminals", "dones_float"])
def test_dones_beside_terminals_mark_ends(read: Writer, name: str) -> None:
    rows = data()
    dones = rows["terminals"] | rows["timeouts"]
    assert read(without(rows, "timeouts") | {name: dones}).fingerprint == from_arrays(rows).fingerprint


def test_dones_alone_may_mix_two_things(read: Writer) -> None:
    rows = data()
    alone = without(rows, "terminals", "timeouts") | {"dones": rows["terminals"]}
    with pytest.raises(OffrlError, match=r"missing terminals .*dones may mix .*add timeouts.*rename it to terminals"):
        read(alone)


def test_files_of_d3rlpy_1(read: Writer) -> None:
    """Their last row of a truncated episode has no successor."""
    rows = without(data(), "timeouts", "next_observations")
    rows["episode_terminals"] = np.isin(np.arange(33), LAST).astype("f4")
    store = read(rows | {"discrete_action": np.bool_(False), "version": np.bytes_(b"1.0")})
    assert store.lengths.tolist() == [10, 9, 11]
    assert terminated(store) == [9]
    assert store.has_tail.tolist() == [False, True, True]
    float_indices = np.tile([0.0, 1.0, 2.0], 11).astype("f4")
    discrete = read(rows | {"discrete_action": np.bool_(True), "actions": float_indices})
    assert (discrete.info.discrete, discrete.actions.dtype) == (3, torch.int64)


INDICES = np.tile([0, 1, 1], 11)


@pytest.mark.parametrize("actions", [INDICES, INDICES.astype("f4"), INDICES.astype("u8"), INDICES[:, None]])
def test_actions_that_never_occur_are_declared(read: Writer, actions: np.ndarray) -> None:
    store = read(data(actions=actions, action_count=np.int64(3)))
    assert (store.info.discrete, store.action_dim, store.actions.dtype) == (3, 3, torch.int64)
    assert store.actions.tolist() == INDICES.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_count": 1}, "actions holds 1 in row 1; it must lie between 0 and 0: correct it, or .*action_count"),
        ({"action_count": 0}, "action_count is 0; it must be one integer from 1 to 65536"),
        ({"action_count": 2.0}, r"action_count is 2\.0; it must be one integer"),
        ({"action_count": [2, 2]}, r"action_count is \[2 2\]; it must be one integer"),
        ({"action_start": 0.5}, r"action_start is 0\.5; it must be one integer from -65536 to 65536"),
        ({"action_start": 1}, "actions holds 0 in row 0; integers are read as discrete actions 1, 2, 3, .* from 1"),
        ({"action_start": -1, "action_count": 2}, "actions holds 1 in row 1; it must lie between -1 and 0"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(read: Writer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        read(data(actions=INDICES, **changes))


def test_a_number_of_actions_that_contradicts_the_description_is_refused() -> None:
    rows = data(actions=INDICES, action_count=3)
    assert from_arrays(rows, DatasetInfo(discrete=3)).info.discrete == 3
    with pytest.raises(OffrlError, match=r"action_count is 3, but its description .* says 4 discrete actions"):
        from_arrays(rows, DatasetInfo(discrete=4))


@pytest.mark.parametrize("dtype", ["i8", "f4", "i1"])
def test_actions_are_counted_from_the_first_one(read: Writer, dtype: str) -> None:
    store = read(data(actions=(INDICES - 1).astype(dtype), action_start=-1))
    assert store.actions.tolist() == INDICES.tolist()
    assert (store.info.discrete, store.info.provenance[FIRST_ACTION]) == (2, -1)


def test_valids_hold_the_state_behind_an_episode(read: Writer) -> None:
    """OGBench's compact layout: one row more an episode, with a state and an action that means nothing."""
    rows = data()
    at = LAST + 1
    compact = {
        "observations": np.insert(rows["observations"], at, rows["next_observations"][LAST], axis=0),
        "actions": np.insert(rows["actions"], at, 0.9, axis=0),
        "rewards": np.insert(rows["rewards"], at, 7.0),
        "masks": np.insert(1.0 - rows["terminals"], at, 1.0),
        "terminals": np.insert(np.isin(np.arange(33), LAST), at, True),
        "valids": np.insert(np.ones(33), at, 0.0),
    }
    assert read(compact).fingerprint == from_arrays(rows).fingerprint
    with pytest.raises(OffrlError, match="valids without masks"):
        read(without(compact, "masks"))
    with pytest.raises(OffrlError, match="both valids and next_observations"):
        read(compact | {"next_observations": compact["observations"]})


def test_valids_without_a_last_state(read: Writer) -> None:
    rows = data()
    valids = np.ones(33)
    valids[LAST[:-1]] = 0
    columns = {key: rows[key] for key in ("observations", "actions", "rewards", "terminals")}
    store = read(columns | {"valids": valids, "masks": np.ones(33)})
    assert store.lengths.tolist() == [9, 9, 11]
    assert store.has_tail.tolist() == [False, False, True]
    assert store.complete.tolist() == [True, True, False]


def test_a_mask_is_0_where_a_termination_meets_the_limit(read: Writer) -> None:
    rows = data()
    assert terminated(read(rows | {"timeouts": rows["timeouts"] | rows["terminals"]})) == [9]


@pytest.mark.parametrize("key", ["masks", "valids", "dones"])
def test_flags_are_0_or_1(read: Writer, key: str) -> None:
    with pytest.raises(OffrlError, match=f"{key} holds 0.99 in row 0"):
        read(data(masks=np.ones(33)) | {key: np.full(33, 0.99)})


def test_long_lists_of_keys_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for number in range(1000):
            file[f"array_{number}"] = np.zeros(3)
    with pytest.raises(OffrlError, match="and 990 more") as caught:
        load(path)
    assert len(str(caught.value)) < 600


def write_d3rlpy_2(path: Path, rows: dict[str, Any]) -> Path:
    """A file as d3rlpy 2.1 dumps it, with the column (N, 1) of rewards that it has."""
    with h5py.File(path, "w") as file:
        file["columns"] = ["observations", "actions", "rewards", "terminated"]
        file["num_episodes"], file["version"] = len(LENGTHS), "2.1"
        for number, (start, stop) in enumerate(zip([0, *LAST[:-1] + 1], LAST + 1)):
            for key in ("observations", "actions", "rewards"):
                part = rows[key][start:stop]
                file[f"{key}_{number}"] = part[:, None] if part.ndim == 1 else part
            file[f"terminated_{number}"] = bool(rows["terminals"][stop - 1])
    return path


@pytest.mark.parametrize("discrete", [False, True])
def test_files_of_d3rlpy_2(tmp_path: Path, discrete: bool) -> None:
    rows = without(data(), "next_observations")
    if discrete:
        rows["actions"] = np.arange(33) % 3
    path = write_d3rlpy_2(tmp_path / "a.h5", rows)
    assert load(path).fingerprint == from_arrays(rows).fingerprint
    with h5py.File(path, "a") as file:
        del file["actions_2"]
    with pytest.raises(OffrlError, match="lacks actions_2"):
        load(path, cache=False)
    with h5py.File(path, "a") as file:
        file["actions_2"] = np.zeros((5, 2))
    with pytest.raises(OffrlError, match=r"actions_2 has shape \(5, 2\)"):
        load(path, cache=False)


@pytest.mark.parametrize("where", [0, 1, 3])
def test_episodes_without_a_step_in_d3rlpy_2_are_left_out(tmp_path: Path, where: int) -> None:
    """The ends of the others stay where they are: no termination moves, none is lost."""
    rows = without(data(), "next_observations")
    plain = load(write_d3rlpy_2(tmp_path / "plain.h5", rows))
    path = write_d3rlpy_2(tmp_path / "a.h5", rows)
    with h5py.File(path, "a") as file:
        for number in range(len(LENGTHS) - 1, where - 1, -1):
            for key in ("observations", "actions", "rewards", "terminated"):
                file.move(f"{key}_{number}", f"{key}_{number + 1}")
        for key, width in (("observations", 3), ("actions", 2), ("rewards", 1)):
            file[f"{key}_{where}"] = np.zeros((0, width), "f4")
        file[f"terminated_{where}"] = False
    assert load(path).fingerprint == plain.fingerprint


def test_observations_of_several_parts_in_d3rlpy_2(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("observations_0_0", "observations_0_1", "actions_0", "rewards_0", "terminated_0"):
            file[name] = np.zeros((3, 1))
    with pytest.raises(OffrlError, match="observations of several parts"):
        load(tmp_path / "a.h5")
