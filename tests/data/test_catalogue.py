"""The catalogue: complete, consistent, and of the values that D4RL registers."""

from __future__ import annotations

from pathlib import Path

import pytest

from offrl.data import catalogue
from offrl.data.fetch import D4RL_BASE


def test_every_d4rl_id_has_what_fetching_and_scoring_need() -> None:
    entries = catalogue.d4rl()
    assert len(entries) == 183
    for name, entry in entries.items():
        assert entry.url.startswith(D4RL_BASE)
        assert entry.url.endswith(".hdf5")
        assert entry.max_episode_steps > 0
        if name != "carla-town-render-v0":  # D4RL itself has no reference for it
            assert entry.ref_min is not None
            assert entry.ref_max is not None
            assert entry.ref_max > entry.ref_min


@pytest.mark.parametrize(
    ("name", "family", "env_id", "steps", "references"),
    [
        ("hopper-medium-v2", "gym-mujoco", "Hopper-v4", 1000, (-20.272305, 3234.3)),
        ("antmaze-umaze-v2", "antmaze", "AntMaze_UMaze-v4", 700, (0.0, 1.0)),
        ("antmaze-large-play-v2", "antmaze", "AntMaze_Large-v4", 1000, (0.0, 1.0)),
        ("maze2d-large-v1", "maze2d", "PointMaze_Large-v3", 800, (6.7, 273.99)),
        ("maze2d-umaze-v0", "maze2d", "PointMaze_UMaze-v3", 150, (0.94, 62.6)),
        ("pen-human-v1", "adroit", "AdroitHandPen-v1", 100, (96.262799, 3076.8331017826877)),
        ("relocate-human-longhorizon-v1", "adroit", "AdroitHandRelocate-v1", 500, (-6.425911, 4233.877797728884)),
        ("kitchen-mixed-v0", "kitchen", "FrankaKitchen-v1", 280, (0.0, 4.0)),
    ],
)
def test_known_entries(name: str, family: str, env_id: str, steps: int, references: tuple[float, float]) -> None:
    info = catalogue.d4rl()[name].info()
    assert (info.family, info.env_id, info.max_episode_steps) == (family, env_id, steps)
    assert (info.ref_min, info.ref_max) == references
    assert catalogue.reference_scores(name) == references


def test_references_by_dataset_and_environment() -> None:
    assert catalogue.reference_scores("Hopper-v4") == (-20.272305, 3234.3)
    assert catalogue.reference_scores("mujoco/hopper/expert-v0") == (-20.272305, 3234.3)
    assert catalogue.reference_scores("gymnasium_robotics:AdroitHandDoor-v1") == (-56.512833, 2880.5693087298737)
    assert catalogue.reference_scores("mujoco/humanoid/expert-v0") is None
    assert catalogue.reference_scores("nothing") is None
    for env_id in ("Hopper-v5", "Walker2d-v5", "Ant-v5"):
        found = catalogue.environment_references(env_id)
        assert found is not None
        assert "v5 differs" in found[2]  # its references were measured elsewhere, and say so


def test_minari_ids() -> None:
    entries = catalogue.minari()
    assert len(entries) == 398
    assert entries["D4RL/antmaze/umaze-v2"].max_episode_steps == 700
    assert entries["D4RL/pointmaze/medium-v2"].max_episode_steps == 600
    assert "sign of the reach term" in entries["D4RL/door/human-v2"].note


def test_families_of_environments() -> None:
    families = {
        "Hopper-v5": "gym-mujoco",
        "AntMaze_Large-v4": "antmaze",
        "Ant-v5": "gym-mujoco",
        "gymnasium_robotics:PointMaze_UMaze-v3": "maze2d",
        "ALE/Pong-v5": "atari",
        "Other-v0": "unknown",
    }
    assert {env_id: catalogue.family_of(env_id) for env_id in families} == families
    assert catalogue.family_of(None) == "unknown"


def test_files_are_known_by_our_and_d4rls_names() -> None:
    names = {
        "hopper-medium-v2.hdf5": "hopper-medium-v2",
        "hopper_medium-v2.hdf5": "hopper-medium-v2",
        "hopper_medium-v2.hdf5.gz": "hopper-medium-v2",
        "walker_mixed.hdf5": "walker2d-medium-replay-v0",
    }
    for file, name in names.items():
        entry = catalogue.entry_of_file(Path("anywhere") / file)
        assert entry is not None
        assert entry.id == name
    assert catalogue.entry_of_file(Path("carla_town_flat-v0.hdf5")) is None  # two ids share it
    assert catalogue.info_of_file(Path("my_ant_maze_run.hdf5")).family == "unknown"


def test_near_names() -> None:
    assert catalogue.near("hoper-medium-v2")[0] == "hopper-medium-v2"
    assert catalogue.near("forge/hoper/medium-v0", ["forge/hopper/medium-v0"])[0] == "forge/hopper/medium-v0"
    assert catalogue.near("xyz") == []
