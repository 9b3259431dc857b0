"""The flat cache: same dataset, told apart by source and options, never trusted when stale or damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from offrl.data import OfflineDataset
from offrl.data import cache as cache_module
from offrl.data.cache import read_flat, write_flat
from offrl.data.checks import ReadOptions
from offrl.data.dataset import DatasetInfo
from offrl.datasets import load
from offrl.utils.errors import OffrlError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "set.npz", 0)
    return tmp_path / "set.npz"


def write(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    np.savez(
        path,
        observations=rng.standard_normal((100, 3)),
        actions=rng.uniform(-1, 1, (100, 2)),
        rewards=rng.standard_normal(100),
        terminals=np.arange(100) % 20 == 19,
        timeouts=np.arange(100) % 20 == 5,
    )


def flat_files(home: Path) -> list[Path]:
    return sorted((home / "flat").glob("*.safetensors"))


def assert_same(one: OfflineDataset, other: OfflineDataset) -> None:
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])
        assert tensor.dtype == other.tensors()[name].dtype
    assert one.info == other.info


def test_second_load_comes_from_the_cache_and_is_the_same(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(source)
    assert len(flat_files(home)) == 1
    monkeypatch.setattr("offrl.datasets.read_npz", lambda *_: pytest.fail("the source was read again"))
    second = load(source)
    assert_same(first, second)
    assert second.__dict__["fingerprint"] == OfflineDataset(**second.tensors()).fingerprint


def test_no_cache_writes_nothing(source: Path, home: Path) -> None:
    load(source, cache=False)
    assert not home.exists()


def test_a_changed_source_replaces_its_cache(source: Path, home: Path) -> None:
    first = load(source)
    time = source.stat().st_mtime_ns
    write(source, 1)
    os.utime(source, ns=(time + 1, time + 1))  # as big as before, a nanosecond later
    second = load(source)
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == load(source, cache=False).fingerprint
    assert len(flat_files(home)) == 1


@pytest.mark.parametrize("how", ["overwritten", "replaced"])
def test_a_source_of_the_same_size_and_time_is_seen(source: Path, tmp_path: Path, how: str) -> None:
    first, before = load(source), source.stat()
    other = source if how == "overwritten" else tmp_path / "other.npz"
    write(other, 1)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, source)
    assert (source.stat().st_size, source.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load(source)
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == load(source, cache=False).fingerprint


def test_a_file_of_a_folder_that_is_replaced_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "set-v0/data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("one")
    before, stat = cache_module.identity(tmp_path / "set-v0", "set-v0", ReadOptions()), folder.stat()
    (tmp_path / "new").write_text("two")
    os.utime(tmp_path / "new", ns=(0, (folder / "metadata.json").stat().st_mtime_ns))
    os.replace(tmp_path / "new", folder / "metadata.json")
    os.utime(folder, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache_module.identity(tmp_path / "set-v0", "set-v0", ReadOptions()) != before


def test_options_and_loader_versions_do_not_mix(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, d4rl = load(source), load(source, semantics="d4rl")
    assert len(exact) != len(d4rl)
    assert_same(load(source, semantics="d4rl"), d4rl)
    assert len(flat_files(home)) == 2
    monkeypatch.setattr(cache_module, "LOADER_VERSION", 99)
    calls = []
    real = cache_module.write_flat
    monkeypatch.setattr(cache_module, "write_flat", lambda *args: (calls.append(1), real(*args)))
    load(source)
    assert calls == [1]


@pytest.mark.parametrize("damage", ["flip", "cut", "header", "text", "empty", "pipe"])
def test_a_damaged_cache_is_rebuilt(source: Path, home: Path, damage: str) -> None:
    first = load(source)
    file = flat_files(home)[0]
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1  # one bit of one number
    elif damage == "cut":
        del content[-100:]
    elif damage == "header":
        content[:8] = (2**60).to_bytes(8, "little")
    else:
        content = bytearray(b"" if damage == "empty" else b"hello, this is no cache")
    file.write_bytes(content)
    if damage == "pipe":
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(OffrlError):
        read_flat(file)
    assert_same(load(source), first)
    assert_same(read_flat(file), first)


def test_a_cache_that_cannot_be_written_is_a_warning(source: Path, home: Path) -> None:
    home.mkdir()
    (home / "flat").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cache cannot be written"):
        store = load(source)
    assert len(store) > 0


def test_a_full_disk_stops_nothing(source: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"the first bytes")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match="No space left on device.*read anew") as caught:
        store = load(source)
    assert str(caught[0].message).isprintable()
    assert store.fingerprint == load(source, cache=False).fingerprint
    assert list((home / "flat").iterdir()) == []  # no half-written file
    with pytest.raises(OSError, match="No space left"):  # where the file itself was asked for
        write_flat(store, home / "asked.safetensors")


def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OFFRL_HOME", "XDG_CACHE_HOME", "MINARI_DATASETS_PATH", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a KeyError, as for a user without an entry
    with pytest.warns(UserWarning, match="no home folder; set OFFRL_HOME"):
        assert len(load(source)) > 0
    for name in ("hopper-medium-v2", "D4RL/pen/human-v2", "~nobody-of-this-name/set.npz"):
        with pytest.raises(OffrlError, match=r"set OFFRL_HOME|offrl data fetch|no such file"):
            load(name)


def test_the_file_is_plain_safetensors(source: Path, home: Path) -> None:
    from safetensors.torch import load_file

    store = load(source)
    tensors = load_file(flat_files(home)[0])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in store.tensors().items())


def test_a_flat_file_is_a_dataset_of_its_own(source: Path, tmp_path: Path) -> None:
    store = load(source)
    path = tmp_path / "copy.safetensors"
    write_flat(store, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load(path), store)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(OffrlError, match="no flat dataset"):
        load(tmp_path / "other.safetensors")


def test_a_flat_file_refuses_options_of_a_reading_that_is_over(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    write_flat(load(source), path)
    sentence = r"copy.safetensors: this dataset has been read already; leave out semantics and action_bound here, .*preset=d4rl"
    with pytest.raises(OffrlError, match=sentence):
        load(path, semantics="d4rl", action_bound=2.0)
    with pytest.raises(OffrlError, match="leave out action_low and action_high here"):
        load(path, action_low=(-1.0, -1.0), action_high=1.0)
    assert_same(load(path, semantics="exact", cache=False, seed=3, progress=False), load(path))


def test_a_size_is_of_the_forge_alone(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    write_flat(load(source), path)
    for name in (source, str(source), path):
        with pytest.raises(
            OffrlError, match=r"data\.size=20 chooses how many .* no dataset of the forge; leave it out"
        ):
            load(name, size=20)
    with pytest.raises(OffrlError, match=r"did you mean"):  # what is wrong with a name goes first
        load("frge/bandit/p0.3-v0", size=20)
    assert len(load("forge/bandit/p0.3-v0", size=20, progress=False)) == 20


@pytest.mark.parametrize(
    "change",
    [
        {"ref_max": {}},
        {"ref_min": 1.0, "ref_max": 1.0},
        {"id": 5},
        {"more": 1},
        {"action_low": "low"},
        {"provenance": {"notices": 5}},
    ],
)
def test_a_flat_file_tells_nothing_of_other_types(source: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "copy.safetensors"
    write_flat(load(source), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["offrl"])
    facts["info"] |= change
    header["__metadata__"]["offrl"] = json.dumps(facts)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(OffrlError, match=r"copy\.safetensors"):
        load(path)


def test_every_field_of_info_survives(tmp_path: Path) -> None:
    info = DatasetInfo(
        id="a",
        source="b",
        env_id="Hopper-v5",
        env_kwargs={"x": [1, 2]},
        family="f",
        ref_min=-1.5,
        ref_max=2.5,
        max_episode_steps=7,
        action_low=-0.4,
        action_high=0.4,
        discrete=None,
        provenance={"seed": 3},
    )
    default = DatasetInfo()
    unset = [f.name for f in dataclasses.fields(info) if getattr(info, f.name) == getattr(default, f.name)]
    assert unset == ["discrete"]  # a new field must be added above
    store = OfflineDataset(
        torch.zeros(2, 3),
        torch.zeros(2, 1),
        torch.zeros(2),
        torch.zeros(2, 3),
        torch.ones(2),
        torch.tensor([0, 1, 2]),
        info,
    )
    write_flat(store, tmp_path / "a.safetensors")
    assert read_flat(tmp_path / "a.safetensors").info == info
