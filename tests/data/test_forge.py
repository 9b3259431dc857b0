"""The forge: the environments' own numbers, honest accounting of episodes, same bytes, true Minari files."""

from __future__ import annotations

import errno
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")

from offrl.data import minari_write
from offrl.data.minari import read_metadata, read_minari
from offrl.forge import noisy
from offrl.forge import registry as forge
from offrl.forge import tabular as stochastic
from offrl.forge.rollout import TIME_LIMIT, Part, Robots, behavior_levels, behavior_policy, rollout, uniform_policy
from offrl.utils.errors import OffrlError
from offrl.utils.paths import PACKAGE, cache_dir
from offrl.utils.progress import Bar

ROBOTS = [("hopper", None), ("hopper", 180_000), ("walker2d", 200_000), ("halfcheetah", 280_000)]


# ---- rollouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("robot", "level"), ROBOTS)
def test_episodes_are_those_of_the_wrapped_environment(robot: str, level: int | None) -> None:
    env_id = forge.ROBOTS[robot].env_id
    robots = Robots(env_id)
    policy = uniform_policy(robots.action_dim) if level is None else behavior_policy(robot, level)
    episodes = rollout(robots, [Part(policy, 1300, np.random.SeedSequence(3))])
    env = gymnasium.make(env_id)
    ends = {
        len(e) == TIME_LIMIT for e in episodes
    }  # whether the walker ever gets there depends on the processor's rounding
    assert ends == {False, True} if robot == "halfcheetah" else False in ends
    for episode in episodes:
        obs, _ = env.reset(seed=episode.seed)
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(episode.observations[t], obs.astype(np.float32))
            obs, reward, terminated, truncated, _ = env.step(action)
            assert episode.rewards[t] == np.float32(reward)
            assert terminated == (episode.terminated and t == len(episode) - 1)
            assert truncated == (t == TIME_LIMIT - 1)
        np.testing.assert_array_equal(episode.observations[-1], obs.astype(np.float32))


def test_velocities_are_clipped_as_the_environment_does() -> None:
    robots, env = Robots("Hopper-v5", 2), gymnasium.make("Hopper-v5").unwrapped
    qpos, qvel = robots.env.init_qpos, np.array([11.0, -12.0, 0.1, 13.0, -14.0, 9.0])
    robots.reset(1, 0)
    robots.data[1].qpos[:], robots.data[1].qvel[:] = qpos, qvel
    robots.qpos[1] = qpos
    env.reset(seed=0)
    env.data.qpos[:], env.data.qvel[:] = qpos, qvel
    action = np.array([0.3, -0.7, 1.0], np.float32)
    obs, reward, terminated = robots.step(np.array([1]), action[None])
    expected = env.step(action)
    assert np.abs(obs[0]).max() == 10
    np.testing.assert_array_equal(obs[0], expected[0])
    assert (reward[0], terminated[0]) == expected[1:3]


class Scripted:
    """Stands for `Robots`: the n-th episode lasts as long as the script says; its observation is its number."""

    obs_dim = action_dim = 1
    drawn = None

    def __init__(self, envs: int, lengths: list[int]) -> None:
        self.envs = envs
        self.script, self.steps = itertools.cycle(lengths), 0
        self.length, self.clock, self.number, self.started = [0] * envs, [0] * envs, [0] * envs, 0

    def reset(self, env: int, seed: int) -> np.ndarray:
        self.number[env], self.length[env], self.clock[env] = self.started, next(self.script), 0
        self.started += 1
        return np.array([float(self.number[env])])

    def step(self, envs: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.steps += len(envs)
        for env in envs:
            self.clock[env] += 1
        ended = np.array([self.clock[env] == self.length[env] for env in envs])
        numbers = np.array([[float(self.number[env])] for env in envs])
        return numbers, np.ones(len(envs)), ended


def idle(obs: torch.Tensor, rng: np.random.Generator) -> np.ndarray:
    return np.zeros((len(obs), 1), np.float32)


@pytest.mark.parametrize("envs", [1, 3, 32])
@pytest.mark.parametrize("size", [1, 99, 100, 101, 5000])
def test_episodes_count_in_the_order_they_start(envs: int, size: int) -> None:
    lengths = [100, 3, 1500, 7, 1, 60]  # 1500 is cut by the time limit
    done: list[int] = []
    part = Part(idle, size, np.random.SeedSequence(0))
    episodes = rollout(Scripted(envs, lengths), [part], done.append)  # type: ignore[arg-type]
    left, expected = size, []
    for length in itertools.cycle(lengths):
        if left <= 0:
            break
        kept = min(length, TIME_LIMIT, left)
        expected.append((kept, kept == length))
        left -= kept
    assert [(len(e), e.terminated) for e in episodes] == expected
    assert [float(e.observations[-1, 0]) for e in episodes] == list(range(len(expected)))
    assert done[-1] == size


def test_parts_keep_apart_and_little_is_simulated_in_vain() -> None:
    robots, sizes = Scripted(32, [60]), [1000, 2000, 10, 5000]

    def playing(value: int) -> Any:
        return lambda obs, rng: np.full((len(obs), 1), value, np.float32)

    parts = [Part(playing(i), size, np.random.SeedSequence(i)) for i, size in enumerate(sizes)]
    episodes = rollout(robots, parts)  # type: ignore[arg-type]
    players = np.concatenate([e.actions[:, 0] for e in episodes])
    np.testing.assert_array_equal(players, np.repeat(range(4), sizes))
    assert all(len(np.unique(e.actions)) == 1 for e in episodes)
    assert sum(sizes) <= robots.steps <= sum(sizes) + 4 * 60


@pytest.mark.parametrize("robot", forge.ROBOTS)
def test_policies_are_the_networks_of_their_files(robot: str) -> None:
    from safetensors.numpy import load_file

    levels = behavior_levels(robot)
    assert {forge.ROBOTS[robot].medium, forge.ROBOTS[robot].expert} <= set(levels)
    file = PACKAGE / "assets" / "behavior" / robot / f"{levels[0]:07d}.safetensors"
    w = {key: value.astype(np.float64) for key, value in load_file(file).items()}
    obs = 2 * np.random.default_rng(0).standard_normal((6, w["net.0.weight"].shape[1]))
    x = obs
    for layer in (0, 2):
        x = np.maximum(x @ w[f"net.{layer}.weight"].T + w[f"net.{layer}.bias"], 0)
    mean, log_std = np.split(x @ w["net.4.weight"].T + w["net.4.bias"], 2, axis=1)
    noise = np.random.default_rng(1).standard_normal(mean.shape, dtype=np.float32)
    expected = np.tanh(mean + np.exp(np.clip(log_std, -20, 2)) * noise)
    action = behavior_policy(robot, levels[0])(torch.from_numpy(obs).float(), np.random.default_rng(1))
    np.testing.assert_allclose(action, expected, atol=1e-4)  # float32 through two layers of 256


@pytest.mark.parametrize(("robot", "level"), [("hopper", "expert"), ("halfcheetah", "expert")])
def test_behaviour_returns_are_the_measured_ones(robot: str, level: str) -> None:
    spec = forge.ROBOTS[robot]
    step = getattr(spec, level)
    returns = json.loads((PACKAGE / "assets" / "behavior" / robot / "returns.json").read_text())
    measured = returns["levels"][str(step)]["stochastic"]
    episodes = rollout(Robots(spec.env_id), [Part(behavior_policy(robot, step), 4000, np.random.SeedSequence(0))])
    ours = [float(e.rewards.sum(dtype=np.float64)) for e in episodes if len(e) == TIME_LIMIT]
    assert len(ours) >= 3
    # Means of 3 or 4 and of 10 episodes; four standard errors and one percent for the deviation's own uncertainty.
    assert (
        abs(np.mean(ours) - measured["mean"]) < 4 * measured["std"] * (1 / 3 + 1 / 10) ** 0.5 + 0.01 * measured["mean"]
    )


# ---- plans and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robot", forge.ROBOTS)
@pytest.mark.parametrize("size", [1, 7, 4321, 100_000, 1_000_000])
def test_plans_share_the_size(robot: str, size: int) -> None:
    spec = forge.ROBOTS[robot]
    for level in forge.LEVELS:
        plan = forge.segments(robot, level, size)
        assert sum(length for _, length in plan) == size
        assert all(length > 0 for _, length in plan)
    steps, lengths = zip(*forge.segments(robot, "medium-replay", 1_000_000))
    assert steps == (None, *range(20_000, spec.medium + 1, 20_000))
    share = np.array(lengths) * spec.medium / 1_000_000  # back in steps of the training
    np.testing.assert_allclose(share, [5_000, 15_000, *[20_000] * (len(steps) - 2)], atol=1)
    assert forge.segments(robot, "medium-expert", 10) == [(spec.medium, 5), (spec.expert, 5)]


@pytest.mark.parametrize("robot", ["hopper", "walker2d"])
def test_second_replay_goes_on_to_a_later_policy(robot: str) -> None:
    """`-v1` is `-v0`'s recipe with a longer ladder; `-v0`'s own is pinned above."""
    steps, lengths = zip(*forge.segments(robot, "medium-replay-v1", 1_000_000))
    assert steps == (None, *range(20_000, 260_001, 20_000))
    share = np.array(lengths) * 260_000 / 1_000_000
    np.testing.assert_allclose(share, [5_000, 15_000, *[20_000] * 12], atol=1)
    name = f"forge/{robot}/medium-replay-v1"
    policies = read_minari(forge.ensure(name, size=400, progress=False)).info.provenance["policies"]
    assert policies[0] == ["uniform actions", round(5_000 * 400 / 260_000)]
    assert policies[-1][0] == "SAC after 260000 steps"
    assert forge.folder_of(name, 400) == cache_dir() / f"forge/{robot}/medium-replay-n400-v1"


def test_halfcheetah_has_one_replay() -> None:
    with pytest.raises(OffrlError, match="forge/halfcheetah/medium-replay-v0"):
        forge.ensure("forge/halfcheetah/medium-replay-v1", size=50, progress=False)


def test_names_and_folders_are_distinct() -> None:
    names = forge.names()
    assert len(names) == len(set(names)) == 3 * (5 + 8) + 2 + 6 + 6 + len(noisy.names()) + len(stochastic.names())
    assert "forge/hopper/random-expert-0.1-v0" in names
    folders = [forge.folder_of(n, size, seed) for n in names for size in (None, 5000) for seed in (0, 1)]
    assert len(set(folders)) == len(folders)
    assert forge.folder_of(names[0], forge.DEFAULT_SIZE, 0) == cache_dir() / names[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forge/hoper/medium-v0", {}, "did you mean forge/hopper/medium-v0"),
        ("forge/hopper/random-expert-0.2-v0", {}, "random-expert"),
        ("forge/hopper/medium-v0", {"size": 0}, "size=0"),
        ("forge/hopper/medium-v0", {"size": 10, "seed": -1}, "seed=-1"),
    ],
)
def test_bad_requests(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        forge.ensure(name, progress=False, **options)


# ---- files ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["forge/hopper/medium-replay-v0", "forge/hopper/random-medium-0.5-v0", "forge/pointmaze/umaze-dense-v0"]
)
def test_same_request_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "pointmaze" in name:
        pytest.importorskip("gymnasium_robotics")
    first = contents(forge.ensure(name, size=1000, progress=False))
    time.sleep(1.1)  # HDF5's time stamps count seconds
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "elsewhere"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    again = contents(forge.ensure(name, size=1000, progress=False))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    assert first == again
    other = contents(forge.ensure(name, size=1000, seed=1, progress=False))
    assert first["data/main_data.hdf5"] != other["data/main_data.hdf5"]
    everything = b"".join(again.values())
    assert str(tmp_path).encode() not in everything


def test_built_once_and_rebuilt_by_force() -> None:
    name = "forge/hopper/random-v0"
    folder = forge.ensure(name, size=300, progress=False)
    good = contents(folder)
    (folder / "mark").write_text("")
    assert forge.ensure(name, size=300, progress=False) == folder
    assert (folder / "mark").exists()
    assert forge.ensure(name, size=301, progress=False) != folder
    forge.ensure(name, size=300, progress=False, force=True)
    assert contents(folder) == good


def test_failed_build_leaves_nothing_and_keeps_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "forge/hopper/random-v0"
    folder = forge.ensure(name, size=200, progress=False)
    good = contents(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(minari_write, "_write_hdf5", full)
    with pytest.raises(OffrlError, match=r"cannot be written \(No space left on device\)"):
        forge.ensure(name, size=200, progress=False, force=True)
    with pytest.raises(OffrlError, match="cannot be written"):
        forge.ensure(name, size=201, progress=False)
    assert contents(folder) == good
    assert not forge.folder_of(name, 201).exists()
    left = [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    # Locks stay, empty, for the next to lock.
    assert all(path.suffix == ".lock" and not path.stat().st_size for path in left)


def test_who_builds_second_keeps_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with minari_write.replacing_folder(folder) as temporary:
        (temporary / "mine").write_text("")
        folder.mkdir()
        (folder / "theirs").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "theirs"]
    with minari_write.replacing_folder(folder) as temporary:
        (temporary / "mine").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine"]


def test_jobs_that_want_the_same_set_build_it_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second waits for the first and takes what it built."""
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path))
    built = []

    def build(folder: Path, *_: Any) -> None:
        built.append(folder)
        time.sleep(0.3)
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "metadata.json").write_text("{}")

    monkeypatch.setattr(forge, "build", build)
    both = [threading.Thread(target=forge.ensure, args=["forge/hopper/medium-v0"]) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert built == [forge.folder_of("forge/hopper/medium-v0", None, 0)]


def test_unwritable_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "file"))
    with pytest.raises(OffrlError, match="set OFFRL_HOME elsewhere"):
        forge.ensure("forge/hopper/random-v0", size=50, progress=False)


@pytest.mark.parametrize("name", ["forge/hopper/medium-expert-v0", "forge/hopper/random-medium-0.1-v0"])
def test_our_reader_finds_everything(name: str) -> None:
    folder = forge.ensure(name, size=3001, progress=False)
    store = read_minari(folder)
    spec = forge.ROBOTS["hopper"]
    assert store.info.family == "gym-mujoco"
    assert (store.info.env_id, store.info.max_episode_steps) == ("Hopper-v5", 1000)
    assert (store.info.ref_min, store.info.ref_max) == (spec.ref_min, spec.ref_max)
    assert (store.info.action_low, store.info.action_high) == (-1.0, 1.0)
    assert store.info.provenance["size"] == 3001
    assert bool(store.complete.all())
    # Whoever fell is outside the healthy range, whoever did not is inside.
    fell, z, angle = store.terminations.bool(), store.next_observations[:, 0], store.next_observations[:, 1]
    assert torch.equal(fell, (z <= 0.7) | (angle.abs() >= 0.2))
    assert int(store.terminations.sum()) >= store.episodes - 5
    inside = torch.ones(len(store), dtype=torch.bool)
    inside[store.offsets[1:] - 1] = False
    assert torch.equal(store.observations[1:][inside[:-1]], store.next_observations[:-1][inside[:-1]])
    if "random" in name:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert len(store) == manifest["transitions"]
        assert 0.1 < manifest["realised_sigma"] < 0.1 + 1000 / 3001
        assert store.info.provenance["mixture"]["share"] == manifest["share"]
    else:
        assert len(store) == 3001
        assert store.returns.max() > 2000  # the expert's half
        assert store.info.provenance["policies"] == [
            ["SAC after 180000 steps", 1500],
            ["SAC after 360000 steps", 1501],
        ]


@pytest.mark.parametrize("name", ["forge/walker2d/random-expert-0.05-v0", "forge/pointmaze/medium-v0"])
def test_minari_itself_reads_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    if "pointmaze" in name:
        pytest.importorskip("gymnasium_robotics")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(cache_dir()))
    folder = forge.ensure(name, size=1500, progress=False)
    dataset = minari.load_dataset(read_metadata(folder)["dataset_id"])
    store = read_minari(folder)
    assert (dataset.total_steps, dataset.total_episodes) == (len(store), store.episodes)
    assert dataset.env_spec.id == store.info.env_id
    assert dataset.env_spec.max_episode_steps == store.info.max_episode_steps
    assert dataset.storage.metadata["ref_max_score"] == store.info.ref_max
    for episode in dataset.iterate_episodes():
        a, b = store.offsets[episode.id], store.offsets[episode.id + 1]
        obs = episode.observations
        if isinstance(obs, dict):
            assert set(obs) == {"achieved_goal", "desired_goal", "observation"}
            assert len(np.unique(obs["desired_goal"], axis=0)) == 1  # the goal stays
            obs = obs["observation"]
        assert dataset.observation_space.contains(
            {k: v[0] for k, v in episode.observations.items()} if "pointmaze" in name else obs[0]
        )
        assert dataset.action_space.contains(episode.actions[0])
        np.testing.assert_array_equal(obs[:-1], store.observations[a:b])
        np.testing.assert_array_equal(obs[1:], store.next_observations[a:b])
        np.testing.assert_array_equal(episode.actions, store.actions[a:b])
        np.testing.assert_array_equal(episode.rewards, store.rewards[a:b])
        np.testing.assert_array_equal(episode.terminations, store.terminations[a:b])
        assert (episode.terminations | episode.truncations).nonzero()[0].tolist() == [len(episode.rewards) - 1]
        assert not (episode.terminations & episode.truncations).any()


def test_missing_simulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mujoco", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(OffrlError, match=r"\.\[mujoco\]"):
        forge.ensure("forge/hopper/random-v0", size=50, seed=99, progress=False)


def test_progress_ends_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int | None]] = []
    monkeypatch.setattr(Bar, "update", lambda bar, step: shown.append((step, bar.total)))
    forge.ensure("forge/hopper/random-v0", size=400, seed=5)
    assert shown[-1] == (400, 400)
    assert sorted(shown) == shown
