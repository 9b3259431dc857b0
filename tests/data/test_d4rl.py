"""D4RL files in their true layout, against plain loops that restate what each reading means, and bad files."""

from __future__ import annotations

import errno
import gzip
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from offrl.data import OfflineDataset, ReadOptions
from offrl.data.d4rl import SPARE_DISK, read_d4rl
from offrl.data.dataset import DatasetInfo
from offrl.data.ends import horizon_timeouts
from offrl.datasets import load
from offrl.utils.errors import OffrlError

Columns = dict[str, Any]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)


def columns(n: int = 200, seed: int = 0, p_terminal: float = 0.03, p_timeout: float | None = 0.03) -> Columns:
    """Columns as D4RL has them; `p_timeout` None leaves `timeouts` out."""
    rng = np.random.default_rng(seed)
    data: Columns = {
        "observations": rng.standard_normal((n, 3)).astype("f4"),
        "actions": rng.uniform(-1, 1, (n, 2)).astype("f4"),
        "rewards": rng.standard_normal(n).astype("f4"),
        "terminals": rng.random(n) < p_terminal,
    }
    if p_timeout is not None:
        data["timeouts"] = (rng.random(n) < p_timeout) & ~data["terminals"]
    return data


def write(path: Path, data: Columns) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file.create_dataset(key, data=value, compression="gzip" if np.ndim(value) else None)
    return path


def successors(data: Columns) -> np.ndarray:
    """The next row within an episode, a state of its own at an episode's end."""
    after = np.roll(data["observations"], -1, axis=0)
    ends = data["terminals"] | data["timeouts"]
    ends[-1] = True
    after[ends] = np.random.default_rng(1).standard_normal((int(ends.sum()), 3))
    return after


def restated_qlearning_dataset(data: Columns, horizon: int | None) -> dict[str, list[Any]]:
    """What D4RL's qlearning_dataset returns, step by step."""
    out: dict[str, list[Any]] = {key: [] for key in ("observations", "next", "actions", "rewards", "terminals")}
    steps = 0
    for row in range(len(data["rewards"]) - 1):
        limit = bool(data["timeouts"][row]) if "timeouts" in data else steps == (horizon or 0) - 1
        if limit:
            steps = 0
            continue
        if data["terminals"][row]:
            steps = 0
        out["observations"].append(data["observations"][row])
        out["next"].append(data["observations"][row + 1])
        out["actions"].append(data["actions"][row])
        out["rewards"].append(data["rewards"][row])
        out["terminals"].append(float(data["terminals"][row]))
        steps += 1
    return out


def check_returns(store: OfflineDataset, data: Columns, ends: list[int], left_out: np.ndarray) -> None:
    """Returns are the file's sums up to each last row, but for episodes whose only row is left out."""
    starts = [0, *[end + 1 for end in ends[:-1]]]
    sums = [data["rewards"][a : b + 1].astype("f8").sum() for a, b in zip(starts, ends)]
    kept = [total for total, a, b in zip(sums, starts, ends) if b > a or not left_out[b]]
    np.testing.assert_allclose(store.returns.numpy(), kept, rtol=0, atol=1e-5)  # sums of float32 rewards


@pytest.mark.parametrize("p_timeout", [0.03, None])
@pytest.mark.parametrize("seed", range(4))
def test_d4rl_semantics_are_the_rows_of_qlearning_dataset(tmp_path: Path, seed: int, p_timeout: float | None) -> None:
    data = columns(seed=seed, p_timeout=p_timeout)
    data["next_observations"] = data["observations"] + 1  # must be ignored
    info = DatasetInfo(max_episode_steps=17)
    store = read_d4rl(write(tmp_path / "a.hdf5", data), info, ReadOptions(semantics="d4rl"))
    expected = restated_qlearning_dataset(data, 17)
    np.testing.assert_array_equal(store.observations, expected["observations"])
    np.testing.assert_array_equal(store.next_observations, expected["next"])
    np.testing.assert_array_equal(store.actions, expected["actions"])
    np.testing.assert_array_equal(store.rewards, expected["rewards"])
    np.testing.assert_array_equal(store.terminations, expected["terminals"])


@pytest.mark.parametrize("seed", range(4))
def test_d4rl_semantics_keep_tails_so_that_returns_are_whole(tmp_path: Path, seed: int) -> None:
    data = columns(seed=seed)
    store = read_d4rl(write(tmp_path / "a.hdf5", data), None, ReadOptions(semantics="d4rl"))
    ends = sorted({*np.flatnonzero(data["terminals"] | data["timeouts"]).tolist(), 199})
    check_returns(store, data, ends, data["timeouts"])


@pytest.mark.parametrize("seed", range(4))
def test_exact_without_next_observations(tmp_path: Path, seed: int) -> None:
    data = columns(seed=seed)
    data["timeouts"][50], data["terminals"][50] = True, False
    data["timeouts"][51], data["terminals"][51] = True, False  # an episode of one step, which has no transition
    store = read_d4rl(write(tmp_path / "a.hdf5", data))
    observations, tails, row, episode = data["observations"], [], 0, []
    expected: dict[str, list[Any]] = {"obs": [], "next": [], "term": [], "lengths": [], "complete": []}
    for row in range(200):
        episode.append(row)
        terminal, limit, last = data["terminals"][row], data["timeouts"][row], row == 199
        if not (terminal or limit or last):
            continue
        transitions = episode if terminal else episode[:-1]
        for step in transitions:
            expected["obs"].append(observations[step])
            expected["next"].append(observations[step] if terminal and step == row else observations[step + 1])
            expected["term"].append(float(terminal and step == row))
        if transitions:
            expected["lengths"].append(len(transitions))
            expected["complete"].append(bool(terminal or limit))
            tails.append(None if terminal else row)
        episode = []
    np.testing.assert_array_equal(store.observations, expected["obs"])
    np.testing.assert_array_equal(store.next_observations, expected["next"])
    np.testing.assert_array_equal(store.terminations, expected["term"])
    assert store.lengths.tolist() == expected["lengths"]
    assert store.complete.tolist() == expected["complete"]
    assert store.has_tail.tolist() == [tail is not None for tail in tails]
    for e, tail in enumerate(tails):
        assert float(store.tail_rewards[e]) == (0 if tail is None else float(data["rewards"][tail]))
        np.testing.assert_array_equal(store.tail_actions[e], np.zeros(2) if tail is None else data["actions"][tail])
    assert store.info.provenance["episodes_without_transition"] >= 1


def test_exact_uses_stored_successors_and_keeps_every_row(tmp_path: Path) -> None:
    data = columns()
    data["terminals"][-1] = data["timeouts"][-1] = False
    data["next_observations"] = successors(data)
    store = read_d4rl(write(tmp_path / "a.hdf5", data))
    for key in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(getattr(store, key), data[key])
    np.testing.assert_array_equal(store.terminations, data["terminals"].astype("f4"))  # no timeout among them
    ends = sorted({*np.flatnonzero(data["terminals"] | data["timeouts"]).tolist(), 199})
    assert (store.offsets[1:] - 1).tolist() == ends
    assert store.complete.tolist() == [True] * (len(ends) - 1) + [False]
    assert not store.has_tail.any()
    check_returns(store, data, ends, np.zeros(200, bool))


@pytest.mark.parametrize("with_next", [False, True])
def test_a_terminal_at_the_time_limit_stays_a_termination(tmp_path: Path, with_next: bool) -> None:
    data = columns(30, p_terminal=0, p_timeout=0)
    data["terminals"][9] = data["timeouts"][9] = data["timeouts"][29] = True
    if with_next:
        data["next_observations"] = successors(data)
    store = read_d4rl(write(tmp_path / "a.hdf5", data))
    assert store.terminations.nonzero().flatten().tolist() == [9]
    assert store.lengths.tolist() == ([10, 20] if with_next else [10, 19])


def test_true_layout_of_gym_mujoco_v2(tmp_path: Path) -> None:
    """(N, 1) rewards and terminals as replay buffers have them, float64, groups infos/ and metadata/, scalar entries."""
    data = columns(60)
    data["terminals"][-1] = True
    data["next_observations"] = successors(data).astype("f8")
    data["observations"] = data["observations"].astype("f8")
    changed = {"rewards": data["rewards"][:, None], "terminals": data["terminals"][:, None].astype("f4")}
    path = write(tmp_path / "hopper-medium-replay-v2.hdf5", data | changed)
    with h5py.File(path, "a") as file:
        file["infos/qpos"] = np.zeros((60, 6))
        file["metadata/algorithm"] = np.bytes_(b"SAC")
        file["metadata/iteration"] = 7
    store = load(path)
    np.testing.assert_array_equal(store.rewards, data["rewards"])
    np.testing.assert_array_equal(store.terminations, data["terminals"].astype("f4"))
    assert store.observations.dtype == torch.float32
    assert (store.info.id, store.info.env_id, store.info.ref_max) == ("hopper-medium-replay-v2", "Hopper-v4", 3234.3)


def test_antmaze_is_split_by_timeouts_only(tmp_path: Path) -> None:
    data = columns(100, p_terminal=0, p_timeout=0)
    data["timeouts"][[39, 99]] = True
    terminals = np.zeros(100, "f4")
    terminals[[10, 11, 12, 39, 60]] = 1  # "at the goal" while the trajectory goes on, once also at its last step
    path = write(
        tmp_path / "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
        data | {"terminals": terminals, "infos/goal": np.zeros((100, 2))},
    )
    store = load(path)
    assert store.info.id == "antmaze-umaze-v2"
    assert store.lengths.tolist() == [40, 59]
    assert store.terminations.nonzero().flatten().tolist() == [10, 11, 12, 39, 60]
    np.testing.assert_array_equal(store.next_observations[10], data["observations"][11])
    restated = load(path, semantics="d4rl")
    assert restated.lengths.tolist() == [39, 59]
    expected = restated_qlearning_dataset(data | {"terminals": terminals}, None)
    np.testing.assert_array_equal(restated.next_observations, expected["next"])
    np.testing.assert_array_equal(restated.terminations, expected["terminals"])


def test_maze2d_segments_end_at_timeouts_and_may_have_one_step(tmp_path: Path) -> None:
    data = columns(100, p_terminal=0, p_timeout=0)
    data["timeouts"][[20, 21, 22, 70]] = True
    store = load(write(tmp_path / "maze2d-umaze-v1.hdf5", data))
    assert store.lengths.tolist() == [20, 47, 28]
    assert store.complete.tolist() == [True, True, False]
    assert store.info.provenance["episodes_without_transition"] == 2
    assert store.info.provenance["rows_in_file"] == 100


def test_kitchen_ends_at_its_demonstrations_ends(tmp_path: Path) -> None:
    data = columns(700, p_terminal=0, p_timeout=None)
    terminals = np.zeros(700, "f4")
    terminals[[299, 699]] = 1  # both demonstrations are longer than the horizon of 280
    changed = {"terminals": terminals, "infos": np.repeat([0, 1], [300, 400])}
    path = write(tmp_path / "mini_kitchen_microwave_kettle_light_slider-v0.hdf5", data | changed)
    assert load(path).lengths.tolist() == [300, 400]
    assert load(path, semantics="d4rl").lengths.tolist()[:2] == [279, 20]
    expected = restated_qlearning_dataset(data | changed, 280)
    np.testing.assert_array_equal(load(path, semantics="d4rl").rewards, expected["rewards"])


def test_without_timeouts_the_horizon_is_counted_from_each_end(tmp_path: Path) -> None:
    data = columns(2600, p_terminal=0, p_timeout=None)
    data["terminals"][300] = True
    store = load(write(tmp_path / "halfcheetah_medium.hdf5", data))
    assert store.info.id == "halfcheetah-medium-v0"
    # 301 steps to the terminal; 1000 and 1000 to the limit, whose last steps are tails; 299 to the file's end
    assert store.lengths.tolist() == [301, 999, 999, 298]
    assert store.complete.tolist() == [True, True, True, False]


def test_horizon_counter_with_and_without_d4rls_off_by_one() -> None:
    terminals = np.zeros(12, bool)
    terminals[2] = True
    assert np.flatnonzero(horizon_timeouts(terminals, 4)).tolist() == [6, 10]
    assert np.flatnonzero(horizon_timeouts(terminals, 4, count_after_terminal=1)).tolist() == [5, 9]


def test_gz_of_a_file(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.hdf5", columns())
    packed = tmp_path / "a.hdf5.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    store = load(packed)
    assert store.fingerprint == load(plain).fingerprint
    assert store.info.source == str(packed)
    bad = tmp_path / "b.hdf5.gz"
    bad.write_bytes(gzip.compress(write(tmp_path / "b.hdf5", with_value("rewards", 7, np.nan)).read_bytes()))
    with pytest.raises(OffrlError, match="rewards holds nan") as caught:
        load(bad)
    assert str(caught.value).startswith(str(bad))  # not the temporary file
    packed.write_bytes(packed.read_bytes()[:-500])
    with pytest.raises(OffrlError, match="cut off or damaged"):
        load(packed)


def test_packed_files_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", **columns())
    (tmp_path / "a.npz.gz").write_bytes(gzip.compress((tmp_path / "a.npz").read_bytes()))
    assert load(tmp_path / "a.npz.gz").fingerprint == load(tmp_path / "a.npz").fingerprint
    twice = tmp_path / "a.hdf5.gz"
    twice.write_bytes(gzip.compress((tmp_path / "a.npz.gz").read_bytes()))
    with pytest.raises(OffrlError, match=f"{twice}: it holds a file of the kind gzip; only HDF5 and NPZ are read"):
        load(twice)
    with zipfile.ZipFile(tmp_path / "b.hdf5.zip", "w") as file:
        file.write(write(tmp_path / "b.hdf5", columns()), "b.hdf5")
    with pytest.raises(OffrlError, match=r"a zip archive of b\.hdf5, no NPZ file; unpack it first"):
        load(tmp_path / "b.hdf5.zip")
    free = type("Usage", (), {"free": SPARE_DISK + 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OffrlError, match=r"it cannot be unpacked in .*larger than the free space.*set OFFRL_HOME"):
        load(tmp_path / "a.npz.gz", cache=False)


def test_integers_are_discrete_actions(tmp_path: Path) -> None:
    data = columns() | {"actions": np.random.default_rng(0).integers(0, 5, (200, 1))}
    store = load(write(tmp_path / "a.hdf5", data))
    assert (store.info.discrete, store.action_dim, store.actions.dtype) == (5, 5, torch.int64)
    assert store.actions.shape == store.rewards.shape


def test_ids_are_looked_up_where_d4rl_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffrlError, match="offrl data fetch hopper-medium-v2"):
        load("hopper-medium-v2")
    folder = tmp_path / "d4rl"
    folder.mkdir()
    write(folder / "hopper_medium-v2.hdf5", columns(seed=1))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    from_folder = load("hopper-medium-v2")
    assert from_folder.info.env_id == "Hopper-v4"
    monkeypatch.delenv("D4RL_DATASET_DIR")
    own = tmp_path / "home/d4rl"
    own.mkdir(parents=True)
    write(own / "hopper-medium-v2.hdf5", columns(seed=2))
    assert load("hopper-medium-v2").fingerprint != from_folder.fingerprint


def test_environments_that_the_d4rl_package_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    data = columns() | {"infos/qpos": np.zeros((200, 2))}

    class Environment:
        ref_min_score, ref_max_score, _max_episode_steps = 1.0, 3.0, 50

        def get_dataset(self) -> Columns:
            return data

    gym = types.ModuleType("gym")
    made = {"mine-v0": Environment, "hopper-medium-v2": Environment}
    gym.make = lambda name: made[name]()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gym", gym)
    monkeypatch.setitem(sys.modules, "d4rl", types.ModuleType("d4rl"))
    store = load("mine-v0")
    assert (store.info.ref_min, store.info.ref_max, store.info.max_episode_steps) == (1.0, 3.0, 50)
    np.testing.assert_array_equal(store.rewards.sum() + store.tail_rewards.sum(), np.float32(store.returns.sum()))
    assert load("hopper-medium-v2").info.ref_max == 3234.3  # the catalogue knows this one
    with pytest.raises(OffrlError, match="no such dataset"):
        load("nobodys-v0")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc")
def test_peak_memory_is_at_most_1_3_times_the_tensors(tmp_path: Path) -> None:
    """The high-water mark of a process of its own, with float64 in the file, rows leaving and successors made."""
    n = 400_000
    data = columns(n, p_terminal=0.001, p_timeout=0.001)
    data["observations"] = np.tile(np.random.default_rng(0).standard_normal((100, 17)), (n // 100, 1))
    path = write(tmp_path / "a.hdf5", data)
    code = f"""
import re, torch
from pathlib import Path
from offrl.datasets import load
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.aminmax(torch.ones(9))
before = peak()
store = load({str(path)!r}, cache=False)
print((peak() - before) / store.nbytes)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.3


# ---- bad files ---------------------------------------------------------------------------------------------------


def bad(**changes: Any) -> Columns:
    """Good columns with changes; None leaves a key out."""
    return {key: value for key, value in (columns() | changes).items() if value is not None}


def with_value(key: str, row: int, value: float) -> Columns:
    data = columns()
    data[key] = data[key].copy()
    data[key][row] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bad(rewards=None), "missing rewards"),
        (bad(observations=None, terminals=None), "missing observations and terminals"),
        (bad(rewards=np.zeros(199)), "rewards has 199 rows but observations has 200"),
        (bad(timeouts=np.zeros(100, bool)), "timeouts has 100 rows"),
        (bad(next_observations=np.zeros((200, 4))), "must agree"),
        (with_value("observations", 123, np.nan), "observations holds nan in row 123, column 0"),
        (with_value("rewards", 7, -np.inf), "rewards holds -inf in row 7"),
        (bad(observations=np.full((200, 3), 1e300)), "observations holds inf in row 0"),
        (with_value("actions", 42, 1.5), r"actions holds 1.5 in row 42, column 0, outside \[-1, 1\]"),
        (bad(terminals=np.zeros(200), timeouts=np.zeros(200)), "no episode ends"),
        (bad(terminals=np.zeros(200), timeouts=None), "no episode ends"),
        (with_value("terminals", 3, 1) | {"terminals": np.full(200, 0.5)}, "terminals holds 0.5 in row 0"),
        (bad(terminals=np.zeros((200, 3))), "terminals has 3 columns"),
        (bad(rewards=np.zeros((200, 2))), "rewards has shape"),
        (bad(rewards=1.0), "rewards is a single number"),
        (bad(observations=np.array([b"x"] * 200)), "observations has dtype"),
        ({key: value[:0] for key, value in columns().items()}, "no transition"),
        (
            {key: value[:1] for key, value in bad(terminals=None).items()} | {"terminals": np.zeros(1)},
            "no episode ends",
        ),
    ],
)
def test_each_bad_column_gets_its_own_sentence(tmp_path: Path, data: Columns, message: str) -> None:
    path = write(tmp_path / "bad.hdf5", data)
    with pytest.raises(OffrlError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_object_dtype_and_groups_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.hdf5", bad(observations=None))
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", data=["text"] * 200, dtype=h5py.string_dtype())
    with pytest.raises(OffrlError, match="observations has dtype object"):
        load(path)
    path = write(tmp_path / "group.hdf5", bad(observations=None))
    with h5py.File(path, "a") as file:
        file["observations/image"] = np.zeros((200, 3))
    with pytest.raises(OffrlError, match="observations is a group"):
        load(path)


def test_own_info_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", columns())
    for text, message in (
        ("[", "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"colour": 1}', "unknown fields"),
        ('{"family": "mine"}', None),
    ):
        with h5py.File(path, "a") as file:
            file.attrs["offrl_info"] = text
        if message is None:
            assert load(path).info.family == "mine"
        else:
            with pytest.raises(OffrlError, match=message):
                load(path)


def test_files_that_are_no_dataset(tmp_path: Path) -> None:
    good = write(tmp_path / "good.hdf5", columns(5000)).read_bytes()
    cases = {
        "cut.hdf5": (good[: len(good) // 2], "cut off after"),
        "empty.hdf5": (b"", "file is empty"),
        "page.hdf5": (b"<html>404</html>", "no HDF5 file"),
        "other.txt": (b"hello", "not a format"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OffrlError, match=message):
            load(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OffrlError, match="no dataset"):
        load(tmp_path / "folder")
    with pytest.raises(OffrlError, match="no such file"):
        load(tmp_path / "nowhere.hdf5")
    with pytest.raises(OffrlError, match="did you mean hopper-medium-v2"):
        load("hoper-medium-v2")


def test_a_packed_file_that_cannot_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gzip.compress(write(tmp_path / "good.hdf5", columns(5000)).read_bytes())
    path = tmp_path / "set.hdf5.gz"
    path.write_bytes(content[:500] + bytes(200) + content[700:])
    with pytest.raises(OffrlError, match="cut off or damaged"):
        load(path)
    path.write_bytes(content)
    load(path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("offrl.data.d4rl._unpack", full)
    with pytest.raises(OffrlError, match=r"cannot be unpacked in .*No space left on device.*OFFRL_HOME"):
        load(path, cache=False)
    monkeypatch.setenv("OFFRL_HOME", str(path / "below"))
    with pytest.raises(OffrlError, match=r"cannot be unpacked in .*Not a directory"):
        load(path, cache=False)


def test_a_damaged_block_names_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.hdf5", columns(5000))
    with h5py.File(path) as file:
        start, size = file["actions"].id.get_chunk_info(0).byte_offset, file["actions"].id.get_chunk_info(0).size
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(OffrlError, match="actions cannot be read"):
        load(path)


@pytest.mark.parametrize("name", ["data.pkl", "data.hdf5", "data.npz"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    witness = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OffrlError, match="pickle"):
        load(tmp_path / name)
    assert not witness.exists()


def test_what_a_user_may_allow(tmp_path: Path) -> None:
    data = with_value("actions", 42, 1.5)
    path = write(tmp_path / "a.hdf5", data | {"next_observations": successors(data)})
    assert float(load(path, clip_actions=True).actions.max()) == 1.0
    wide = load(path, action_bound=2.0)
    assert (float(wide.actions.max()), wide.info.action_low, wide.info.action_high) == (1.5, -2.0, 2.0)
    endless = write(tmp_path / "b.hdf5", columns(p_terminal=0, p_timeout=0))
    store = load(endless, unfinished=True)
    assert (len(store), store.episodes, store.complete.tolist()) == (199, 1, [False])


def test_rounding_beyond_the_bound_is_clipped_and_counted(tmp_path: Path) -> None:
    store = load(write(tmp_path / "a.hdf5", with_value("actions", 42, 1.0005)))
    assert float(store.actions.abs().max()) <= 1.0
    assert store.info.provenance["clipped_actions"] == 2  # both columns of the row


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", columns())
    with pytest.raises(OffrlError, match="semantics='fast'"):
        load(path, semantics="fast")  # type: ignore[arg-type]
    with pytest.raises(OffrlError, match="action_bound"):
        load(path, action_bound=-1.0)
