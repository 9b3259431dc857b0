"""HDF5 files that point elsewhere, claim more than they hold, or are damaged: one sentence each, and nothing is read."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from offrl.data.d4rl import read_d4rl
from offrl.data.hdf5 import column
from offrl.data.minari import read_minari
from offrl.utils.errors import OffrlError

ROWS, WIDTH = 40, 3


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> None:
    """Files that a dataset has no business to read: numbers that would fit, and a secret."""
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.ones((ROWS, WIDTH))
    (tmp_path / "secret.txt").write_bytes(b"secret! " * (ROWS * WIDTH))


def d4rl_file(path: Path, add: Callable[[h5py.Group, str], None] | None = None) -> Path:
    """A small D4RL file whose observations are what `add` makes of them."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        fill(file, rng, ROWS, add)
        file["terminals"] = np.arange(ROWS) % 10 == 9
        file["timeouts"] = np.zeros(ROWS, bool)
    return path


def fill(
    group: h5py.Group, rng: np.random.Generator, rows: int, add: Callable[[h5py.Group, str], None] | None = None
) -> None:
    if add is None:
        group.create_dataset("observations", data=rng.standard_normal((rows, WIDTH)), chunks=True, compression="gzip")
    else:
        add(group, "observations")
    group["actions"] = rng.uniform(-1, 1, (ROWS, 2))
    group["rewards"] = rng.standard_normal(ROWS)


def minari_folder(folder: Path, add: Callable[[h5py.Group, str], None] | None = None, **metadata: object) -> Path:
    """A small Minari dataset; `add` makes the observations of the last of its three episodes."""
    (folder / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with h5py.File(folder / "data/main_data.hdf5", "w") as file:
        for number in range(3):
            group = file.create_group(f"episode_{number}")
            fill(group, rng, ROWS + 1, add if number == 2 else None)
            for key in ("terminations", "truncations"):
                group[key] = np.arange(ROWS) == ROWS - 1
    described = {"total_steps": 3 * ROWS, "data_format": "hdf5", "dataset_id": folder.name}
    for name, width, bound in (("observation_space", WIDTH, 1e9), ("action_space", 2, 1.0)):
        box = {"type": "Box", "dtype": "float64", "shape": [width], "low": [-bound] * width, "high": [bound] * width}
        described[name] = json.dumps(box)
    (folder / "data/metadata.json").write_text(json.dumps(described | metadata))
    return folder


def folder_of(group: h5py.Group) -> Path:
    return next(folder for folder in Path(group.file.filename).parents if (folder / "secret.txt").exists())


def external_link(group: h5py.Group, key: str) -> None:
    group[key] = h5py.ExternalLink(str(folder_of(group) / "other.hdf5"), "/x")


def link_to_nowhere(group: h5py.Group, key: str) -> None:
    group[key] = h5py.ExternalLink("nowhere.hdf5", "/x")


def link_to_a_link(group: h5py.Group, key: str) -> None:
    external_link(group.create_group("infos"), "hidden")
    group[key] = h5py.SoftLink(f"{group.name}/infos/hidden")


def raw_storage(group: h5py.Group, key: str) -> None:
    secret = str(folder_of(group) / "secret.txt")
    group.create_dataset(key, (ROWS, WIDTH), "f8", external=[(secret, 0, ROWS * WIDTH * 8)])


def virtual(group: h5py.Group, key: str, source: str | None = None) -> None:
    layout = h5py.VirtualLayout((ROWS, WIDTH), "f8")
    layout[:] = h5py.VirtualSource(source or str(folder_of(group) / "other.hdf5"), "x", (ROWS, WIDTH))
    group.create_virtual_dataset(key, layout)


def virtual_without_source(group: h5py.Group, key: str) -> None:
    virtual(group, key, "nowhere.hdf5")  # HDF5 itself would read zeros


def claim(group: h5py.Group, key: str) -> None:
    group.create_dataset(key, (10**12, WIDTH), "f8", chunks=(1000, WIDTH), compression="gzip")


def claim_in_one_chunk(group: h5py.Group, key: str) -> None:
    """One written chunk of 2 GB that is packed into a few bytes."""
    data = group.create_dataset(key, (10**8, WIDTH), "f8", chunks=(10**8, WIDTH), compression="gzip")
    data.id.write_direct_chunk((0, 0), b"few bytes")


ELSEWHERE = (external_link, link_to_nowhere, link_to_a_link, raw_storage, virtual, virtual_without_source)
TOO_LARGE = (claim, claim_in_one_chunk)


def refused(read: Callable[[], object], *parts: str) -> None:
    with pytest.raises(OffrlError) as caught:
        read()
    text = str(caught.value)
    assert text.isprintable()  # so it is one line
    assert text.endswith(".")
    assert len(text) < 600
    for part in parts:
        assert part in text


@pytest.mark.parametrize("add", [*ELSEWHERE, *TOO_LARGE])
def test_numbers_elsewhere_and_claims_are_refused(tmp_path: Path, add: Callable[[h5py.Group, str], None]) -> None:
    key = "infos/hidden" if add is link_to_a_link else "observations"
    what = "cannot hold" if add in TOO_LARGE else "link to another file" if "link" in add.__name__ else "virtual array"
    path = d4rl_file(tmp_path / "set.hdf5", add)
    refused(lambda: read_d4rl(path), str(path), key, what)
    folder = minari_folder(tmp_path / "set-v0", add)
    refused(lambda: read_minari(folder), str(folder), key, "episode_2", what)


def test_a_link_to_another_file_is_not_followed_even_where_it_is_not_needed(tmp_path: Path) -> None:
    path = d4rl_file(tmp_path / "set.hdf5")
    with h5py.File(path, "a") as file:
        external_link(file.create_group("infos"), "qpos")
    refused(lambda: read_d4rl(path), "infos/qpos is a link to another file")


def test_a_link_within_the_file_is_followed_and_a_loop_is_not(tmp_path: Path) -> None:
    plain, linked = d4rl_file(tmp_path / "plain.hdf5"), d4rl_file(tmp_path / "linked.hdf5")
    with h5py.File(linked, "a") as file:
        file.move("observations", "infos/elsewhere")
        file["observations"] = h5py.SoftLink("/infos/elsewhere")
    assert read_d4rl(linked).fingerprint == read_d4rl(plain).fingerprint
    for target in ("/nothing", "/observations"):
        with h5py.File(linked, "a") as file:
            del file["observations"]
            file["observations"] = h5py.SoftLink(target)
        refused(lambda: read_d4rl(linked), str(linked), "observations")


@pytest.mark.parametrize("chunks", [None, True])
def test_flags_that_were_never_written_are_zeros(tmp_path: Path, chunks: bool | None) -> None:
    plain, unwritten = d4rl_file(tmp_path / "plain.hdf5"), d4rl_file(tmp_path / "unwritten.hdf5")
    with h5py.File(unwritten, "a") as file:
        del file["timeouts"]
        file.create_dataset("timeouts", (ROWS,), bool, chunks=chunks)
        assert file["timeouts"].id.get_storage_size() == 0
    assert read_d4rl(unwritten).fingerprint == read_d4rl(plain).fingerprint


def test_what_packs_well_is_taken(tmp_path: Path) -> None:
    path, shape = tmp_path / "zeros.hdf5", (300_000, 8)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.zeros(shape), compression="gzip", compression_opts=9, chunks=(100_000, 8))
    with h5py.File(path) as file:
        assert np.prod(shape) * 8 > 500 * path.stat().st_size  # or the test would prove nothing
        column(file, "x", path)


@pytest.mark.parametrize("steps", [10**12, 10**30, -1, -(10**12)])
def test_steps_that_metadata_promises(tmp_path: Path, steps: int) -> None:
    folder = minari_folder(tmp_path / "set-v0", total_steps=steps)
    refused(lambda: read_minari(folder), str(folder), str(steps), "cannot hold")


def test_an_array_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*shape: int) -> None:
        raise MemoryError(f"Unable to allocate 210. GiB for an array with shape {shape}")

    path = d4rl_file(tmp_path / "set.hdf5")
    monkeypatch.setattr("offrl.data.d4rl.empty", no_memory)
    refused(lambda: read_d4rl(path), str(path), "observations is larger than this machine's memory", "210. GiB")
    folder = minari_folder(tmp_path / "set-v0")
    monkeypatch.setattr("offrl.data.minari.empty", no_memory)
    refused(lambda: read_minari(folder), str(folder), "total_steps=120", "memory")


def test_a_filter_that_is_missing(tmp_path: Path) -> None:
    def packed(group: h5py.Group, key: str) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((ROWS, WIDTH))
        plist.set_filter(31_999, h5py.h5z.FLAG_OPTIONAL)  # a number that nobody has taken
        space = h5py.h5s.create_simple((ROWS, WIDTH))
        dataset = h5py.h5d.create(group.id, key.encode(), h5py.h5t.NATIVE_DOUBLE, space, plist)
        dataset.write_direct_chunk((0, 0), b"packed")

    path = d4rl_file(tmp_path / "set.hdf5", packed)
    refused(lambda: read_d4rl(path), str(path), "observations is packed with an HDF5 filter that is not here")


def test_a_file_that_another_process_writes(tmp_path: Path) -> None:
    path = d4rl_file(tmp_path / "set.hdf5")
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does while it writes
        refused(lambda: read_d4rl(path), str(path), "another process is writing it")
    read_d4rl(path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = d4rl_file(tmp_path / "set.hdf5")
    with h5py.File(path, "a") as file:
        h5py.h5g.create(file.id, b"\xff\xfe\x1b[31m")
    read_d4rl(path)
    with h5py.File(path, "a") as file:
        del file["actions"]
    refused(lambda: read_d4rl(path), "missing actions")


def outcomes(path: Path, content: bytes, places: list[tuple[int, int]], read: Callable[[], object]) -> list[str]:
    """What `read` says of `content` with a byte changed, once for each (place, XOR mask); "" where it says nothing."""
    out = []
    for place, mask in places:
        damaged = bytearray(content)
        damaged[place] ^= mask
        path.write_bytes(damaged)
        try:
            read()
            out.append("")
        except OffrlError as error:
            out.append(str(error))
    return out


@pytest.mark.parametrize("layout", ["d4rl", "minari"])
def test_changed_bytes_give_a_sentence_or_a_dataset(tmp_path: Path, layout: str) -> None:
    if layout == "d4rl":
        path = d4rl_file(tmp_path / "set.hdf5")
        read: Callable[[], object] = lambda: read_d4rl(path)  # noqa: E731
    else:
        folder = minari_folder(tmp_path / "set-v0")
        path, read = folder / "data/main_data.hdf5", lambda: read_minari(folder)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    # Structure, not numbers: bytes next to a signature of HDF5's, or of a name.
    marks = [b"TREE", b"HEAP", b"SNOD", b"observations", b"rewards", b"\x89HDF"]
    starts = [i for mark in marks for i in range(len(content)) if content.startswith(mark, i)]
    places = [
        (min(int(rng.choice(starts)) + int(rng.integers(0, 96)), len(content) - 1), int(rng.integers(1, 256)))
        for _ in range(150)
    ]
    said = outcomes(path, content, places, read)
    assert [text for text in said if text and not (text.isprintable() and str(tmp_path) in text)] == []
    assert sum(text != "" for text in said) > 20  # the damage does reach what is read


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    path = d4rl_file(tmp_path / "set.hdf5")
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        refused(lambda: read_d4rl(path), str(path))
