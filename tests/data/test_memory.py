"""Datasets larger than memory: the bytes needed and free are said before anything is allocated."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from made import box, split, trajectories, write_minari, write_npz

from offrl.data import from_arrays, memory
from offrl.datasets import load
from offrl.utils.errors import OffrlError


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * 2**20)


def test_available_memory_is_less_than_the_machine_has() -> None:
    free = memory.available_memory()
    assert free is None or 0 < free < 2**50


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("kind", ["npz", "hdf5", "arrays"])
def test_images_too_large(tmp_path: Path, kind: str) -> None:
    """1000 images of 20 x 20 as bytes are 0.4 MB, as observations and successors in float32 3.2 MB."""
    data = trajectories([1000], [True]) | {"observations": np.zeros((1000, 20, 20), np.uint8)}
    del data["next_observations"]
    message = r"as float32 it takes 3\.1 MiB of memory, of which 3\.0 MiB is free; take fewer rows"
    if kind == "arrays":
        with pytest.raises(OffrlError, match=message):
            from_arrays(data)
        return
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **data)
    else:
        with h5py.File(path, "w") as file:
            for key, value in data.items():
                file.create_dataset(key, data=value, compression="gzip")
    with pytest.raises(OffrlError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("little")
def test_a_flag_of_many_numbers_is_not_unpacked(tmp_path: Path) -> None:
    """A column in itself too large, which is no part of the tensors."""
    path = write_npz(
        tmp_path / "a.npz", trajectories([10], [True]) | {"action_low": np.zeros(10**6), "action_high": 1.0}
    )
    with pytest.raises(OffrlError, match=r"action_low: as float32 it takes 7\.6 MiB"):
        load(path)


def test_a_header_that_claims_any_shape(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", trajectories([10], [True]))
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**13, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        for name in whole.namelist():
            file.writestr(name, header.getvalue() if name == "observations.npy" else whole.read(name))
    with pytest.raises(OffrlError, match="actions has 10 rows but observations has 10000000000000"):
        load(tmp_path / "b.npz")


@pytest.mark.usefixtures("little")
def test_minari_promises_more_steps_than_memory_holds(tmp_path: Path) -> None:
    space = box(3, low=-np.inf, high=np.inf)
    folder = write_minari(tmp_path / "a-v0", split(trajectories([10], [True])), space, box(2), total_steps=10**6)
    with pytest.raises(OffrlError, match=r"as float32 it takes 38\.1 MiB"):
        load(folder)
    metadata = json.loads((folder / "data/metadata.json").read_text())
    wide = json.dumps({"type": "Discrete", "n": 10**12})
    (folder / "data/metadata.json").write_text(json.dumps(metadata | {"observation_space": wide, "total_steps": 10}))
    with pytest.raises(OffrlError, match="as float32 it takes"):
        load(folder)
