"""Bounds of actions, one a dimension: through readers, options, writers, the cache and mixtures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import box, split, trajectories, write_hdf5, write_minari, write_npz

from offrl.data import DatasetInfo, OfflineDataset, ReadOptions, concatenate, from_arrays
from offrl.data.writers import writer
from offrl.datasets import load
from offrl.training.run_config import resolve_config
from offrl.training.runs import read_data
from offrl.utils.errors import OffrlError

LENGTHS, ENDS = [20, 11], [True, False]


def scaled(low: Any, high: Any) -> dict[str, Any]:
    """Data whose actions fill the box."""
    data = trajectories(LENGTHS, ENDS)
    low, high = np.asarray(low), np.asarray(high)
    data["actions"] = (low + (high - low) * (data["actions"] + 1) / 2).astype("f4")
    return data


def box_of(store: OfflineDataset) -> tuple[Any, Any]:
    return store.info.action_low, store.info.action_high


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [
        ([0, -0.78], [5, 0.78], ((0.0, -0.78), (5.0, 0.78))),
        ([-1, -1], [1, 1], (-1.0, 1.0)),
        (0.0, 1.0, (0.0, 1.0)),
        ([0, 0], [100, 100], (0.0, 100.0)),
        (-3.0, [1, 2], (-3.0, (1.0, 2.0))),
    ],
)
def test_every_source_keeps_each_dimensions_bounds(tmp_path: Path, low: Any, high: Any, kept: Any) -> None:
    data = scaled(low, high)
    keys = data | {"action_low": np.array(low, "f8"), "action_high": np.array(high, "f8")}
    narrow = box(2, low=low, high=high)
    stores = [
        from_arrays(keys),
        from_arrays(data, DatasetInfo(action_low=low, action_high=high)),
        from_arrays(data, None, ReadOptions(action_low=low, action_high=high)),
        load(write_npz(tmp_path / "a.npz", keys)),
        load(write_hdf5(tmp_path / "a.hdf5", keys)),
        load(write_npz(tmp_path / "b.npz", data), action_low=low, action_high=high),
        load(write_minari(tmp_path / "a-v0", split(data), box(3, low=-np.inf, high=np.inf), narrow)),
    ]
    for store in stores:
        assert box_of(store) == kept
        np.testing.assert_array_equal(store.actions, data["actions"])


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".safetensors", "-v0"])
@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_written_files_keep_them(tmp_path: Path, suffix: str) -> None:
    if suffix == "-v0":
        pytest.importorskip("minari")
    low, high = (0.0, -0.5), (5.0, 0.5)
    store = from_arrays(scaled(low, high), DatasetInfo(action_low=low, action_high=high))
    path = tmp_path / f"a{suffix}"
    writer(path)(store)
    assert box_of(load(path)) == (low, high)
    assert box_of(load(path)) == (low, high)  # from the cache


def test_info_travels_as_json_and_old_info_stays_readable() -> None:
    info = DatasetInfo(action_low=(0.0, -0.5), action_high=(5.0, 0.5))
    assert DatasetInfo(**json.loads(json.dumps(asdict(info)))) == info
    assert DatasetInfo(**{"action_low": -2.0, "action_high": 2.0}).action_range == (-2.0, 2.0)
    assert info.action_range == (-0.5, 5.0)


def test_each_dimension_is_checked_and_clipped_by_its_own_bounds() -> None:
    info = DatasetInfo(action_low=(0.0, -0.5), action_high=(5.0, 0.5))
    data = scaled(info.action_low, info.action_high)
    data["actions"][7] = [0.5, 0.7]
    with pytest.raises(OffrlError, match=r"0.7 in row 7, column 1, outside \[-0.5, 0.5\]"):
        from_arrays(data, info)
    clipped = from_arrays(data, info, ReadOptions(clip_actions=True))
    np.testing.assert_array_equal(clipped.actions[7], np.array([0.5, 0.5], "f4"))
    assert clipped.info.provenance["clipped_actions"] == 1
    data["actions"][7] = [-0.004, 0.5]  # less than a thousandth of the first dimension's 5
    rounded = from_arrays(data, info)
    assert float(rounded.actions[7, 0]) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([0, 0, -1], [1, 1, 1], "the actions have 2 dimensions but their bounds 3"),
        ([-1, -1, -1], 1, "the actions have 2 dimensions but their bounds 3"),  # also where they are all the same
        (-1e300, 1e300, "must be finite as float32"),
        (0, 1e-50, "low must be below high"),  # as float32
        ([0, 1], [1, 1], "action_low is 1 and action_high 1 in dimension 1; low must be below high"),
        ([0, -np.inf], [1, 1], "must be finite"),
        (0, np.nan, "must be finite"),
        (None, 1, "belong together"),
        ("low", 1, "must be numbers"),
        ([[0, 1], [2]], 1, "must be numbers|dtype object"),
    ],
)
def test_bounds_that_are_none(low: Any, high: Any, message: str) -> None:
    data = trajectories(LENGTHS, ENDS)
    with pytest.raises(OffrlError, match=message):
        from_arrays(data, None, ReadOptions(action_low=low, action_high=high))
    keys = {key: value for key, value in {"action_low": low, "action_high": high}.items() if value is not None}
    with pytest.raises(OffrlError, match=message):
        from_arrays(data | keys)


def test_a_run_takes_a_box_by_options(tmp_path: Path) -> None:
    """They stand in the run's configuration only where they are given, so that other runs keep their names."""
    path = write_npz(tmp_path / "a.npz", scaled([0, -0.78], [5, 0.78]))
    plain = {"agent": {"_target_": "offrl.agents.bc.BC"}, "dataset": str(path)}
    job = resolve_config({**plain, "data": {"action_low": [0, -0.78], "action_high": [5, 0.78]}})
    assert box_of(read_data(job.train, "cpu")) == ((0.0, -0.78), (5.0, 0.78))
    assert job.to_dict()["data"]["action_low"] == [0, -0.78]
    assert "action_low" not in resolve_config(plain).to_dict()["data"]


def test_an_unbounded_box_needs_bounds_from_the_user(tmp_path: Path) -> None:
    data = scaled([0, -1], [5, 1])
    unbounded = box(2, low=[0, -1], high=[np.inf, 1])
    folder = write_minari(tmp_path / "a-v0", split(data), box(3, low=-np.inf, high=np.inf), unbounded)
    with pytest.raises(OffrlError, match="has no bounds; give them"):
        load(folder)
    assert box_of(load(folder, action_low=(0, -1), action_high=(5, 1))) == ((0.0, -1.0), (5.0, 1.0))
    assert box_of(load(folder, action_bound=5)) == (-5.0, 5.0)


def test_the_box_of_several_datasets_holds_them_all() -> None:
    one = from_arrays(scaled([0, -1], [5, 1]), DatasetInfo(action_low=(0, -1), action_high=(5, 1)))
    other = from_arrays(scaled(-2, 2), DatasetInfo(action_low=-2.0, action_high=2.0))
    assert box_of(concatenate([one, other])) == (-2.0, (5.0, 2.0))
    assert box_of(concatenate([one, one])) == box_of(one)


@pytest.mark.parametrize("bound", [np.inf, 1e39, 1e-50, 0.0, -1.0], ids=str)
def test_a_bound_is_a_positive_number_of_float32(bound: float) -> None:
    with pytest.raises(OffrlError, match=r"^action_bound=.* must be positive and finite as float32"):
        ReadOptions(action_bound=bound)


def test_an_option_is_given_once() -> None:
    with pytest.raises(OffrlError, match="one or the other"):
        ReadOptions(action_bound=1.0, action_low=0.0)
