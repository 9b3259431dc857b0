"""What datasets tell of themselves: each wrong value is one sentence, and nothing that they name is imported or opened."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from made import box, split, trajectories, write_hdf5, write_minari, write_npz

from offrl.data import DatasetInfo
from offrl.data.schema import own_info
from offrl.datasets import load
from offrl.utils.errors import OffrlError

BAD_INFO: list[tuple[dict[str, Any], str]] = [
    ({"action_low": "-1"}, "action_low is '-1'"),
    ({"action_high": float("nan")}, "action_high is nan"),
    ({"action_low": None}, "action_low is None"),
    ({"action_low": float("-inf")}, "action_low is -inf"),
    ({"action_low": [0.0, "a"]}, "must be finite numbers"),
    ({"action_low": 2.0}, "action_low is 2 and action_high 1"),
    ({"action_low": True}, "action_low is True"),
    ({"id": 7}, "id is 7"),
    ({"id": "[red]x[/red]"}, "must be plain text on one line"),
    ({"id": "a\nb"}, "must be plain text on one line"),
    ({"id": ""}, "must be plain text on one line"),
    ({"id": "x" * 1000}, "at most 300 characters"),
    ({"env_id": 5}, "env_id is 5"),
    ({"env_id": ["Hopper-v5"]}, "env_id is"),
    ({"env_kwargs": "x"}, "env_kwargs is 'x'"),
    ({"family": None}, "family is None"),
    ({"max_episode_steps": 0}, "max_episode_steps is 0"),
    ({"max_episode_steps": "1000"}, "max_episode_steps is '1000'"),
    ({"max_episode_steps": 10**30}, "max_episode_steps is 1000"),
    ({"max_episode_steps": 1.5}, "max_episode_steps is 1.5"),
    ({"ref_min": "low"}, "ref_min is 'low'"),
    ({"ref_min": float("nan")}, "ref_min is nan"),
    ({"ref_min": 1.0, "ref_max": 1.0}, "ref_min=1.0 should be below ref_max=1.0"),
    ({"discrete": -1}, "discrete is -1"),
    ({"discrete": 0}, "discrete is 0"),
    ({"provenance": []}, r"provenance is \[\]"),
    ({"colour": "red"}, "unknown fields"),
]
DEEP = '{"provenance": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001


def files(folder: Path, written: str) -> list[Path]:
    """The same data with the same `offrl_info` in each format."""
    data = trajectories([10, 5], [True, False])
    h5 = write_hdf5(folder / "a.hdf5", data)
    with h5py.File(h5, "a") as file:
        file.attrs.create("offrl_info", written, dtype=h5py.string_dtype())
    npz = write_npz(folder / "a.npz", data | {"offrl_info": np.array(written)})
    space = box(3, low=-np.inf, high=np.inf)
    return [h5, npz, write_minari(folder / "a-v0", split(data), space, box(2), offrl_info=written)]


@pytest.mark.parametrize(("info", "message"), BAD_INFO)
def test_each_wrong_value_of_offrl_info_is_one_sentence(tmp_path: Path, info: dict[str, Any], message: str) -> None:
    for path in files(tmp_path, json.dumps(info)):
        with pytest.raises(OffrlError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("written", ["{", "3", "null", '"text"', DEEP, "\x00", '{"id": NaN}'])
def test_offrl_info_that_is_no_object(written: str) -> None:
    with pytest.raises(OffrlError) as caught:
        own_info(written, DatasetInfo(), "a.npz")
    assert "\n" not in str(caught.value)


def test_good_info_is_taken_field_by_field(tmp_path: Path) -> None:
    info = {
        "id": "größe/x-v0",
        "ref_min": 0,
        "ref_max": 3.5,
        "max_episode_steps": 7,
        "provenance": {"seed": 7, "notices": ["old"]},
    }
    for path in files(tmp_path, json.dumps(info)):
        read = load(path).info
        assert (read.id, read.ref_min, read.ref_max, read.max_episode_steps) == ("größe/x-v0", 0.0, 3.5, 7)
        assert read.provenance["seed"] == 7
        assert "notices" not in read.provenance
        assert (read.env_id, read.action_low) == (None, -1.0)


BAD_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"total_steps": "15"}, "total_steps is '15'"),
    ({"total_steps": -1}, "promises -1 steps, which .* cannot hold"),
    ({"total_steps": 10**30}, "cannot hold"),
    ({"total_steps": None}, "total_steps is None"),
    ({"observation_space": "{}"}, "observation_space"),
    ({"observation_space": json.dumps({"type": "Box", "shape": [-1]})}, "observation_space.*is -1"),
    ({"observation_space": json.dumps({"type": "Box", "shape": "3"})}, "observation_space"),
    ({"observation_space": json.dumps({"type": "Box", "shape": [3], "dtype": "colour"})}, "a dtype of numpy"),
    ({"observation_space": json.dumps({"type": "Dict", "subspaces": {"a": 3}})}, "observation_space"),
    ({"observation_space": json.dumps({"type": "Dict", "subspaces": [3]})}, "observation_space"),
    ({"observation_space": json.dumps({"type": "Discrete", "n": 0})}, "observation_space.*is 0"),
    ({"observation_space": json.dumps({"type": "MultiDiscrete", "nvec": [2, 0]})}, "positive integers"),
    (
        {"observation_space": json.dumps({"type": "MultiDiscrete", "nvec": [2, 3], "start": [0, 1, 2]})},
        "3 starts for 2",
    ),
    ({"observation_space": '{"type": "Tuple", "subspaces": [' * 2000 + "]}" * 2000}, "valid JSON|nested|space"),
    ({"action_space": json.dumps({"type": "Box", "shape": [2], "low": "a", "high": 1})}, "no bounds"),
    ({"action_space": json.dumps({"type": "Box", "shape": [2], "low": [0, 0], "high": [1, 0]})}, "below high"),
    ({"action_space": json.dumps(box(2, dtype="int64"))}, "a box of int64"),
    ({"env_spec": "{"}, "env_spec in metadata.json is not valid JSON"),
    ({"env_spec": json.dumps({"id": 3})}, "env_spec.id is 3"),
    ({"env_spec": json.dumps({"id": "X-v0", "max_episode_steps": "9"})}, "max_episode_steps is '9'"),
    ({"env_spec": json.dumps({"id": "X-v0", "kwargs": [1]})}, "env_spec.kwargs"),
    ({"env_spec": "[]"}, "env_spec"),
    ({"ref_min_score": "a"}, "ref_min_score is 'a'"),
    ({"dataset_id": 3}, "dataset_id is 3"),
    ({"data_format": 3}, "data_format is 3"),
]


@pytest.mark.parametrize(("metadata", "message"), BAD_METADATA)
def test_each_wrong_value_of_minaris_metadata_is_one_sentence(tmp_path: Path, metadata: dict, message: str) -> None:
    space = box(3, low=-np.inf, high=np.inf)
    folder = write_minari(tmp_path / "a-v0", split(trajectories([10, 5], [True, False])), space, box(2), **metadata)
    with pytest.raises(OffrlError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "\udcff", "[" * 100_000])
def test_metadata_that_is_no_object(tmp_path: Path, text: str) -> None:
    folder = write_minari(tmp_path / "a-v0", split(trajectories([10], [True])), box(3), box(2))
    (folder / "data/metadata.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OffrlError, match=r"metadata\.json"):
        load(folder)


def test_reading_imports_nothing_that_a_dataset_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for path in files(tmp_path, json.dumps({"env_id": "evil_module:Evil-v0"})):
        assert load(path).info.env_id == "evil_module:Evil-v0"
    spec = json.dumps({"id": "Evil-v0", "entry_point": "evil_module:Evil", "kwargs": {}})
    space = box(3, low=-np.inf, high=np.inf)
    folder = write_minari(tmp_path / "b-v0", split(trajectories([10], [True])), space, box(2), env_spec=spec)
    assert load(folder).info.env_id == "Evil-v0"
    assert "evil_module" not in sys.modules
