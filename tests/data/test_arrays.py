"""Plain arrays and NPZ files, and the way back: what is written reads as the same Store."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl.data import OfflineDataset, ReadOptions, from_arrays
from offrl.data.arrays import read_npz, to_arrays, write_npz
from offrl.data.cache import write_flat
from offrl.data.d4rl import read_d4rl
from offrl.data.dataset import DatasetInfo, concatenate
from offrl.data.writers import write_hdf5, writer
from offrl.datasets import load
from offrl.utils.errors import OffrlError


def arrays(n: int = 60, with_next: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ends = rng.random((2, n)) < 0.08
    data = {
        "observations": rng.standard_normal((n, 3)),
        "actions": rng.uniform(-1, 1, (n, 2)),
        "rewards": rng.standard_normal(n),
        "terminals": ends[0],
        "timeouts": ends[1] & ~ends[0],
    }
    if with_next:
        data["next_observations"] = np.roll(data["observations"], -1, axis=0)
        ends = data["terminals"] | data["timeouts"]
        ends[-1] = True
        data["next_observations"][ends] = rng.standard_normal((int(ends.sum()), 3))
    return data


def same(one: OfflineDataset, other: OfflineDataset) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_gymnasiums_names_mean_the_same() -> None:
    data = arrays()
    renamed = dict(data)
    renamed["terminations"], renamed["truncations"] = renamed.pop("terminals"), renamed.pop("timeouts")
    assert same(from_arrays(data), from_arrays(renamed))


def test_tensors_and_lists_are_arrays_too() -> None:
    data = arrays()
    tensors = {key: torch.from_numpy(value) for key, value in data.items()}
    lists = {key: value.tolist() for key, value in data.items()}
    assert same(from_arrays(data), from_arrays(tensors))
    assert same(from_arrays(data), from_arrays(lists))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_callers_arrays_are_neither_changed_nor_shared(dtype: type) -> None:
    data = {key: value.astype(dtype) if value.dtype.kind == "f" else value for key, value in arrays().items()}
    data["actions"][3, 1] = 1.0005  # is clipped in the dataset
    before = {key: value.copy() for key, value in data.items()}
    store = from_arrays(data)
    store.rewards.zero_()
    store.observations.zero_()
    for key, value in data.items():
        np.testing.assert_array_equal(value, before[key])


def test_time_limit_of_info_cuts_when_there_are_no_timeouts() -> None:
    data = arrays(25)
    del data["timeouts"]
    data["terminals"] = np.zeros(25)
    store = from_arrays(data, DatasetInfo(max_episode_steps=10))
    assert store.lengths.tolist() == [9, 9, 4]
    assert store.complete.tolist() == [True, True, False]


def test_images_and_single_numbers_become_vectors() -> None:
    data = arrays() | {"observations": np.zeros((60, 4, 5, 3), np.uint8), "actions": np.zeros(60)}
    store = from_arrays(data)
    assert (store.obs_dim, store.action_dim) == (60, 1)
    assert from_arrays(arrays() | {"observations": np.arange(60.0)}).obs_dim == 1


def test_discrete_actions() -> None:
    data = arrays() | {"actions": np.tile([0, 1, 2], 20)}
    store = from_arrays(data, DatasetInfo(discrete=4))
    assert (store.action_dim, store.actions.dtype) == (4, torch.int64)
    with pytest.raises(OffrlError, match="actions holds 2 in row 2; it must lie between 0 and 1"):
        from_arrays(data, DatasetInfo(discrete=2))


@pytest.mark.filterwarnings("ignore:.*no flag marks")  # AntMaze's terminals are no marks, but these successors jump
@pytest.mark.parametrize("with_next", [False, True])
@pytest.mark.parametrize("semantics", ["exact", "d4rl"])
@pytest.mark.parametrize("family", ["unknown", "antmaze"])
@pytest.mark.parametrize("seed", range(3))
def test_files_written_from_a_store_read_back_the_same(
    tmp_path: Path, seed: int, family: str, semantics: Any, with_next: bool
) -> None:
    info = DatasetInfo(id="mine", env_id="Hopper-v5", family=family, ref_min=1.0, ref_max=2.0)
    store = from_arrays(arrays(seed=seed, with_next=with_next), info, ReadOptions(semantics=semantics))
    write_npz(store, tmp_path / "a.npz")
    write_hdf5(store, tmp_path / "a.hdf5")
    for other in (read_npz(tmp_path / "a.npz"), read_d4rl(tmp_path / "a.hdf5")):
        assert (other.info.id, other.info.env_id, other.info.ref_max) == ("mine", "Hopper-v5", 2.0)
        inside = store.terminations == 0  # D4RL's successors behind a termination are another episode's
        assert torch.equal(other.next_observations[inside], store.next_observations[inside])
        if semantics == "d4rl":
            other.next_observations = store.next_observations
        assert same(store, other)


def test_made_up_successors_are_noted_wherever_the_dataset_goes(tmp_path: Path) -> None:
    """Those behind a termination, where the source has none."""
    options = [ReadOptions(semantics=semantics) for semantics in ("exact", "d4rl")]
    stored = arrays(with_next=True)
    assert from_arrays(stored).known_successors is None
    assert (
        from_arrays(arrays() | {"terminals": np.zeros(60), "timeouts": np.arange(60) % 20 == 19}).known_successors
        is None
    )
    for made, has in ((arrays(), options), (stored, options[1:])):
        for each in has:
            store = from_arrays(made, options=each)
            known = store.known_successors
            assert known is not None
            ends = torch.zeros(len(store), dtype=torch.bool)
            ends[store.offsets[1:] - 1] = True
            left_out = ends & (store.terminations > 0) & ~store.has_tail[store.episode_of_row]
            assert left_out.any()
            assert known.tolist() == (~left_out).nonzero()[:, 0].tolist()
    write_flat(store, tmp_path / "a.safetensors")
    write_npz(store, tmp_path / "a.npz")
    write_hdf5(store, tmp_path / "a.hdf5")
    writer(tmp_path / "a-v0")(store)
    for name in ("a.safetensors", "a.npz", "a.hdf5", "a-v0"):
        for _ in range(2):  # from its source and from its cache
            found = load(tmp_path / name).known_successors
            assert found is not None, name
            assert found.tolist() == known.tolist()
    other = from_arrays(stored)
    assert store.select_episodes(torch.tensor([0])).known_successors is not None
    for pair in ([store, other], [other, store]):
        assert concatenate(pair).known_successors is not None


@pytest.mark.parametrize("write", [write_npz, write_hdf5])
def test_terminations_within_an_episode_are_written_with_their_ends(tmp_path: Path, write: Any) -> None:
    data = arrays(with_next=True)
    for key in ("terminals", "timeouts"):
        data[key] = np.zeros(60, bool)
    data["next_observations"] = np.roll(data["observations"], -1, axis=0)
    masks, dones = np.ones(60), np.isin(np.arange(60), [19, 39, 59])
    masks[[4, 5, 27, 39]] = 0
    data["next_observations"][dones] += 1
    store = from_arrays(data | {"masks": masks, "dones": dones})
    assert store.lengths.tolist() == [20, 20, 20]
    path = tmp_path / ("a.npz" if write is write_npz else "a.hdf5")
    write(store, path)
    assert same(load(path), store)


def test_tails_leave_where_a_layout_cannot_hold_them() -> None:
    whole = from_arrays(arrays(with_next=True))
    tailed = from_arrays(arrays(seed=1))
    assert "next_observations" in to_arrays(whole)
    assert "next_observations" not in to_arrays(tailed)
    from offrl.data import concatenate

    mixed = concatenate([whole, tailed])
    back = from_arrays(to_arrays(mixed))
    assert torch.equal(back.next_observations, mixed.next_observations)
    assert not back.has_tail.any()


def test_npz_is_read_with_float32_and_its_own_info(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **arrays())
    store = load(tmp_path / "a.npz")
    assert store.observations.dtype == torch.float32
    assert same(store, from_arrays(arrays()))
    assert store.info.id == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "missing rewards"),
        ({"terminals": None}, "missing terminals .*zeros if no episode ever terminates"),
        ({"rewards": np.zeros(3)}, "rewards has 3 rows but observations has 60"),
        ({"terminals": np.float32(0)}, "terminals"),
        ({"timeouts": np.float32(0)}, "timeouts"),
        ({"rewards": np.float32(0)}, "rewards"),
        ({"observations": np.float32(0)}, "observations"),
        ({"observations": np.array([[1], [2, 3]] * 30, dtype=object)}, "observations has dtype object"),
        ({"rewards": np.array(["a"] * 60)}, "rewards has dtype"),
        ({"rewards": np.zeros((60, 2))}, "rewards has shape"),
        ({"actions": np.zeros((60, 0))}, "actions has no columns"),
        ({"rewards": np.float64(3)}, "rewards is a single number"),
        ({"next_observations": np.zeros((60, 2))}, "must agree"),
        ({"terminals": np.zeros(60), "timeouts": np.zeros(60)}, "no episode ends"),
        ({"actions": np.full((60, 2), 3.0)}, "actions holds 3 in row 0"),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in (arrays() | changes).items() if value is not None}
    with pytest.raises(OffrlError, match=message):
        from_arrays(data)
    path = tmp_path / "bad.npz"
    np.savez(path, **data)
    with pytest.raises(OffrlError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_masked_numbers_are_no_data() -> None:
    """Numpy would read what stands below the mask; a masked array that masks nothing is an array."""
    data = arrays()
    data["rewards"] = np.ma.masked_array(data["rewards"], mask=np.zeros(60, bool))
    assert same(from_arrays(data), from_arrays(arrays()))
    data["rewards"][7] = np.ma.masked
    with pytest.raises(OffrlError, match=r"rewards is masked in row 7; fill in or leave out what is missing\.$"):
        from_arrays(data)


def test_zero_transitions() -> None:
    with pytest.raises(OffrlError, match="no transition"):
        from_arrays({key: value[:0] for key, value in arrays().items()})


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(tmp_path / "whole.npz", **arrays())
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OffrlError, match="cut off or damaged"):
        load(path)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[400:440] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(OffrlError, match="cut off or damaged"):
        load(path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(OffrlError, match="not a format"):
        load(tmp_path / "b.npy")
    torch.save(arrays()["rewards"], tmp_path / "c.pt")
    with pytest.raises(OffrlError, match="pickled PyTorch file"):
        load(tmp_path / "c.pt")


def test_npz_files_with_damaged_members(tmp_path: Path) -> None:
    """A member whose header ends within brackets, and ones that say they are encrypted or of a version to come."""
    whole = tmp_path / "x.npz"
    np.savez(whole, **arrays())
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as file:
        text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (((\n"
        for key in arrays():
            file.writestr(f"{key}.npy", b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text)
    data = bytearray(whole.read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "encrypted.npz").write_bytes(data)
    data = bytearray(whole.read_bytes())
    data[data.find(b"PK\x01\x02") + 6] = 99
    (tmp_path / "version.npz").write_bytes(data)
    for name in ("header.npz", "encrypted.npz", "version.npz"):
        for read in (read_npz, load):
            with pytest.raises(OffrlError, match=rf"{name}: the file is cut off or damaged"):
                read(tmp_path / name)
