"""Files of every kind read to the bit as before: the fingerprint covers every number of a dataset.

A change here means that runs made before can't be resumed; it needs a reason and a line in the changelog.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import box, split, trajectories, without, write_hdf5, write_minari, write_npz

from offrl.datasets import load

LENGTHS = [30, 12, 1, 40, 17]
ENDS = [True, False, False, True, False]


def kitchen() -> dict[str, Any]:
    """Demonstrations longer than the horizon, ends marked by terminals, no timeouts."""
    data = without(trajectories([300, 290], [True, True]), "timeouts", "next_observations")
    return data | {"terminals": data["terminals"].astype("f4"), "infos": np.repeat([0, 1], [300, 290])}


def antmaze() -> dict[str, Any]:
    """Terminals say "at the goal" while the trajectory goes on."""
    data = without(trajectories([40, 60], [False, False]), "next_observations")
    data["terminals"] = np.isin(np.arange(100), [10, 11, 12, 39]).astype("f4")
    return data


def replay() -> dict[str, Any]:
    """Columns of shape (N, 1), float64 observations, an unfinished last episode."""
    data = trajectories(LENGTHS, ENDS)
    data["timeouts"][-1] = False
    columns = {"rewards": data["rewards"][:, None], "terminals": data["terminals"][:, None].astype("f4")}
    return data | columns | {"observations": data["observations"].astype("f8")}


def limited() -> dict[str, Any]:
    """No timeouts: the catalogue's limit of 1000 cuts."""
    return without(trajectories([1000, 1000, 300, 450], [False, False, True, False]), "timeouts", "next_observations")


def maze() -> dict[str, Any]:
    return without(trajectories([20, 1, 1, 50], [False] * 4), "next_observations")


def discrete() -> dict[str, Any]:
    return trajectories(LENGTHS, ENDS) | {"actions": np.arange(100) % 4}


def both() -> dict[str, Any]:
    """Rows where terminals and timeouts are both 1."""
    data = trajectories(LENGTHS, ENDS)
    return data | {"timeouts": data["timeouts"] | data["terminals"]}


def images() -> dict[str, Any]:
    data = trajectories(LENGTHS, ENDS)
    pixels = {key: (data[key] * 100 + 128).astype("u1")[:, :, None] for key in ("observations", "next_observations")}
    return data | pixels


KINDS = {
    "hopper-medium-v2.hdf5": lambda: trajectories(LENGTHS, ENDS),
    "hopper-medium-replay-v2.hdf5": replay,
    "halfcheetah_medium.hdf5": limited,
    "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5": antmaze,
    "maze2d-umaze-v1.hdf5": maze,
    "mini_kitchen_microwave_kettle_light_slider-v0.hdf5": kitchen,
    "pen-human-v1.hdf5": lambda: without(trajectories(LENGTHS, ENDS), "next_observations"),
    "mine.hdf5": both,
    "mine.npz": lambda: trajectories(LENGTHS, ENDS),
    "discrete.npz": discrete,
    "images.npz": images,
}
PINNED: dict[str, tuple[str, str]] = {
    "hopper-medium-v2.hdf5": ("530511f7076afacb48e7f04aefcecee9", "e43d5d47fba51b25ee93c35dbf13b936"),
    "hopper-medium-replay-v2.hdf5": ("ac8a6a8febe553f8a10af23986361379", "731e71e4275a52b25d6854d2219eee6c"),
    "halfcheetah_medium.hdf5": ("ff0ab99f53ba73fab238d7d55ae887f1", "f423d137afc91ab55e36b8d68b92c7c6"),
    "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5": (
        "fb50458f1c13f823165c14e85277cd4c",
        "53cd77534f462d240f7be3f3181cd5c6",
    ),
    "maze2d-umaze-v1.hdf5": ("0d799f05a1c42141d7da411304dedad1", "0d799f05a1c42141d7da411304dedad1"),
    "mini_kitchen_microwave_kettle_light_slider-v0.hdf5": (
        "83800adf688e45294eacd34cd14036da",
        "a02fb059e6d1c8d8fb5d604212b09f1a",
    ),
    "pen-human-v1.hdf5": ("caf14e8a78cce66d0054734f71317c2e", "e43d5d47fba51b25ee93c35dbf13b936"),
    "mine.hdf5": ("530511f7076afacb48e7f04aefcecee9", "e90fe833a17f13b2808746acf6853ed0"),
    "mine.npz": ("530511f7076afacb48e7f04aefcecee9", "e43d5d47fba51b25ee93c35dbf13b936"),
    "discrete.npz": ("6f54fe564ec173c3b21cdcbf7551101e", "85b2365d19d0fe24228af6a5f8d3f55a"),
    "images.npz": ("90fcd1b71a558bb40157f00e1c75ab31", "240f1e46b0bd8b3d662d591ab995f7bc"),
}


@pytest.mark.parametrize("name", KINDS)
def test_flat_files(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    write = write_npz if name.endswith("npz") else write_hdf5
    path = write(tmp_path / name, KINDS[name]())
    found = tuple(load(path, semantics=semantics, cache=False).fingerprint for semantics in ("exact", "d4rl"))
    assert found == PINNED[name]
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_compressed_is_the_same(tmp_path: Path) -> None:
    plain = write_hdf5(tmp_path / "hopper-medium-v2.hdf5", trajectories(LENGTHS, ENDS))
    packed = tmp_path / "hopper-medium-v2.hdf5.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load(packed).fingerprint == PINNED["hopper-medium-v2.hdf5"][0]


def nested(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Episodes with Dict observations: a position, one of three discrete modes, a text."""
    episodes = split(data)
    for episode in episodes:
        n = len(episode["observations"])
        parts = {"position": episode["observations"], "mode": np.arange(n) % 3 + 1, "mission": np.array([b"go"] * n)}
        episode["observations"] = parts
    return episodes


def test_minari_folders(tmp_path: Path) -> None:
    data = trajectories(LENGTHS, ENDS)
    space = {
        "type": "Dict",
        "subspaces": {
            "position": box(3, low=-np.inf, high=np.inf),
            "mode": {"type": "Discrete", "n": 3, "start": 1},
            "mission": {"type": "Text"},
        },
    }
    folders = [
        write_minari(tmp_path / "box-v0", split(data), box(3, low=-np.inf, high=np.inf), box(2)),
        write_minari(tmp_path / "dict-v0", nested(data), space, box(2)),
        write_minari(
            tmp_path / "discrete-v0",
            split(data | {"actions": np.arange(100) % 4 + 2}),
            box(3, low=-np.inf, high=np.inf),
            {"type": "Discrete", "n": 4, "start": 2},
        ),
    ]
    assert [load(folder, cache=False).fingerprint for folder in folders] == PINNED_MINARI


PINNED_MINARI = [
    "530511f7076afacb48e7f04aefcecee9",
    "820aba018c59f1b6a0f07d4b1e548ea4",
    "6f54fe564ec173c3b21cdcbf7551101e",
]
