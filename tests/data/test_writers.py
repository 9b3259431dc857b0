"""Minari folders of any dataset: flags of the ends, spaces, and a disk that fills up."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.writers import writer
from offrl.datasets import load

ENDS = ("terminations", "truncations")


def dataset(**info: object) -> OfflineDataset:
    """Episodes of 3, 2 and 4 steps: one terminates, one is truncated, one is cut in the middle by the recording."""
    rows = torch.arange(9.0)
    actions = torch.tensor([0, 1, 2] * 3) if info.get("discrete") else torch.linspace(-1, 1, 18).reshape(9, 2)
    terminations = torch.zeros(9)
    terminations[2] = 1
    return OfflineDataset(
        observations=rows[:, None].repeat(1, 2),
        actions=actions,
        rewards=rows / 7,
        next_observations=rows[:, None].repeat(1, 2) + 1,
        terminations=terminations,
        offsets=torch.tensor([0, 3, 5, 9]),
        complete=torch.tensor([True, True, False]),
        info=DatasetInfo(id="mine", source="/home/me/secret.npz", **info),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("info", [{}, {"discrete": 3}, {"action_low": -2.0, "action_high": 2.0, "ref_max": 5.0}])
def test_a_minari_folder_holds_the_dataset(tmp_path: Path, info: dict[str, float]) -> None:
    original = dataset(**info)
    writer(tmp_path / "set-v0")(original)
    copy = load(tmp_path / "set-v0")
    assert copy.tensors().keys() == original.tensors().keys()
    for name, tensor in original.tensors().items():
        assert torch.equal(copy.tensors()[name], tensor), name
    for name in ("discrete", "action_low", "action_high", "ref_max"):
        assert getattr(copy.info, name) == getattr(original.info, name)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_episode_that_was_cut_has_no_end(tmp_path: Path) -> None:
    writer(tmp_path / "set-v0")(dataset())
    with h5py.File(tmp_path / "set-v0/data/main_data.hdf5") as file:
        flags = {key: [file[f"episode_{e}/{key}"][:].nonzero()[0].tolist() for e in range(3)] for key in ENDS}
    assert flags == {"terminations": [[2], [], []], "truncations": [[], [1], []]}


@pytest.mark.parametrize("info", [{}, {"discrete": 3}])
def test_minari_reads_what_was_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: dict[str, float]
) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    original = dataset(**info)
    writer(tmp_path / "set-v0")(original)
    read = minari.load_dataset("set-v0")
    assert (read.total_steps, read.total_episodes) == (9, 3)
    for episode, start, stop in zip(read.iterate_episodes(), (0, 3, 5), (3, 5, 9)):
        np.testing.assert_array_equal(episode.observations[:-1], original.observations[start:stop])
        np.testing.assert_array_equal(episode.observations[1:], original.next_observations[start:stop])
        np.testing.assert_array_equal(episode.actions, original.actions[start:stop])
        np.testing.assert_array_equal(episode.rewards, original.rewards[start:stop])
        assert read.action_space.contains(episode.actions[0])
        assert read.observation_space.contains(episode.observations[0])


FULL_DISK = """
import resource, signal, sys
from offrl.cli.main import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # the kernel refuses what lies behind
sys.exit(main(["data", "convert", "--no-cache", *sys.argv[1:]]))
"""


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """Left to itself, HDF5 crashes at exit (status 139)."""
    rng = np.random.default_rng(0)
    done = np.arange(40_000) % 100 == 99
    arrays = {
        "observations": rng.random((40_000, 4)),
        "actions": rng.random((40_000, 1)),
        "rewards": rng.random(40_000),
    }
    source, folder = tmp_path / "set.npz", tmp_path / "out" / "set-v0"
    np.savez(source, **arrays, terminals=done)
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2, ended.stderr
    assert f"{folder} cannot be written (File too large)" in ended.stderr
    assert list(folder.parent.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Of dead processes of this machine alone: another one may be writing the same."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [
        f".mine-v0.{platform.node()}-{gone.pid}.part",
        f".mine-v0.elsewhere-{gone.pid}.part",
        f".mine-v0.{platform.node()}-1.part",
    ]
    for name in names:
        (tmp_path / name / "data").mkdir(parents=True)
    writer(tmp_path / "mine-v0")(dataset())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "mine-v0"])
