"""Discrete actions in every form that people store, or a sentence that says how they are read; names change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import trajectories, write_hdf5, write_npz

from offrl.data import DatasetInfo, ReadOptions, catalogue, from_arrays
from offrl.datasets import load
from offrl.forge import registry
from offrl.utils.errors import OffrlError

CLASSES = np.random.default_rng(0).integers(0, 3, 40)


def data(actions: Any) -> dict[str, Any]:
    return trajectories([25, 15], [True, False]) | {"actions": actions}


@pytest.mark.parametrize("kind", ["npz", "hdf5", "arrays"])
@pytest.mark.parametrize(
    ("actions", "classes", "indices"),
    [
        (CLASSES, 3, CLASSES),
        (CLASSES.astype("u1")[:, None], 3, CLASSES),
        (CLASSES > 0, 2, CLASSES > 0),
        (CLASSES[:, None] > 0, 2, CLASSES > 0),
        (np.zeros(40, bool), 2, np.zeros(40)),
        (np.eye(4, dtype=int)[CLASSES], 4, CLASSES),
        (np.eye(4, dtype=bool)[CLASSES], 4, CLASSES),
    ],
)
def test_discrete_actions_are_recognised(
    tmp_path: Path, kind: str, actions: np.ndarray, classes: int, indices: np.ndarray
) -> None:
    rows = data(actions)
    write = write_npz if kind == "npz" else write_hdf5
    store = from_arrays(rows) if kind == "arrays" else load(write(tmp_path / f"a.{kind}", rows))
    assert (store.info.discrete, store.actions.dtype) == (classes, torch.int64)
    np.testing.assert_array_equal(store.actions, indices)


def test_floats_are_class_indices_where_the_source_says_so() -> None:
    store = from_arrays(data(CLASSES.astype("f4")), DatasetInfo(discrete=4))
    np.testing.assert_array_equal(store.actions, CLASSES)
    with pytest.raises(OffrlError, match=r"actions holds 0\.5 in row 0, which is no discrete action"):
        from_arrays(data(np.full(40, 0.5)), DatasetInfo(discrete=4))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (
            CLASSES - 1,
            r"actions holds -1 in row \d+; integers are read as discrete actions 0, 1, 2, .*number them from 0",
        ),
        (
            CLASSES.astype("u8") + np.uint64(2**63),
            r"actions holds 9223372036854775810 in row \d+; integers are read as discrete",
        ),
        (CLASSES * 10**9, r"actions holds 2000000000 in row \d+; integers are read as discrete"),
        (np.stack([CLASSES, CLASSES], 1), "int64 in 2 columns; integers are read as .* one-hot; store float32"),
        (CLASSES.astype("f4"), r"outside \[-1, 1\].*store integers if they are class indices"),
        (np.stack([CLASSES > 0, CLASSES > 1], 1), "bool in 2 columns"),
    ],
)
def test_other_numbers_are_explained(actions: np.ndarray, message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        from_arrays(data(actions))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ((CLASSES > 0).astype("f4"), "look like class indices"),
        (np.eye(3)[CLASSES], "look like one-hot rows"),
        (np.sign(CLASSES - 1.0), None),  # bang-bang control
        (np.zeros(40), None),
        (np.linspace(0, 1, 40), None),
        (np.random.default_rng(0).uniform(-1, 1, (40, 2)), None),
    ],
)
def test_floats_that_look_discrete_are_read_as_a_box_with_a_word(
    actions: np.ndarray, message: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    assert from_arrays(data(actions)).info.discrete is None
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (message is not None)
    assert message is None or message in told[0]


NAMES = [
    "my-antmaze-copy",
    "Ant_maze_u",
    "kitchen-like",
    "hopper-medium-v2-relabelled",
    "ogbench-antmaze-v0",
    "plain",
    "halfcheetah",
]


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
def test_a_files_name_changes_nothing_of_how_it_is_read(tmp_path: Path, kind: str) -> None:
    """Terminals within a trajectory and an action out of bounds, which families treat differently."""
    rows = trajectories([60, 40], [False, False])
    rows["terminals"] = np.isin(np.arange(100), [10, 11, 39])
    del rows["next_observations"]
    write = write_npz if kind == "npz" else write_hdf5
    prints = {load(write(tmp_path / f"{name}.{kind}", rows)).fingerprint for name in NAMES}
    assert len(prints) == 1
    path = tmp_path / f"plain.{kind}"
    assert load(path).lengths.tolist() == [11, 1, 28, 19, 39]
    assert load(path, family="antmaze").lengths.tolist() == [59, 39]
    assert load(path, family="antmaze").info.family == "antmaze"
    rows["actions"][3] = 1.4
    write(path, rows)
    with pytest.raises(OffrlError, match=r"actions holds 1.4 in row 3"):
        load(path)
    assert load(path, family="kitchen").info.provenance["clipped_actions"] == 2


@pytest.mark.parametrize(
    ("family", "hint"),
    [
        ("AntMaze", "did you mean antmaze?"),
        ("ant-maze", "did you mean antmaze?"),
        ("kichen", "did you mean kitchen?"),
        ("x", "known are adroit, antmaze, .*unknown"),
        ("", "known are"),
    ],
)
def test_a_family_that_has_no_rules_is_refused(family: str, hint: str, tmp_path: Path) -> None:
    """A misspelt one would be read by the rules of none."""
    path = write_npz(tmp_path / "a.npz", data(CLASSES))
    with pytest.raises(OffrlError, match=rf"^family={family} is no family of datasets; {hint}"):
        load(path, family=family)


def test_every_family_of_a_dataset_can_be_named() -> None:
    mine = {entry.family for entry in catalogue.d4rl().values()} | {registry.family(name) for name in registry.names()}
    mine |= {catalogue.family_of(entry.env_id) for entry in catalogue.minari().values()} | {
        DatasetInfo().family,
        "ogbench",
    }
    assert {ReadOptions(family=family).family for family in mine} == mine


@pytest.mark.parametrize("name", ["a.pkl", "a.npz", "a.h5", "a", "données.npz", "run=3,step=10.npz", "data (1).npz"])
def test_the_first_bytes_tell_the_format(tmp_path: Path, name: str) -> None:
    plain = load(write_hdf5(tmp_path / "plain.hdf5", data(CLASSES)))
    assert load(write_hdf5(tmp_path / name, data(CLASSES))).fingerprint == plain.fingerprint
