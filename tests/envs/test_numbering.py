"""Environments whose discrete actions begin at another number than 0: the action of the data is the action that is played."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import polars as pl
import pytest
from gymnasium import spaces

from offrl.agents.base import Spec
from offrl.agents.bc import BC, BCConfig
from offrl.cli.main import main
from offrl.data import DatasetInfo, OfflineDataset, from_arrays, from_episodes, from_frame
from offrl.data.dataset import FIRST_ACTION
from offrl.data.minari_write import Episode, write_minari
from offrl.datasets import load
from offrl.envs import make_env
from offrl.envs.chosen import with_environment
from offrl.evaluation.evaluator import Evaluator
from offrl.evaluation.recording import play, record
from offrl.utils.errors import OffrlError

NAME = "offrl-test/Line-v0"
STEPS = 6
SEEDS = range(4)
UNKNOWN = r"numbers its actions from 1 to 3, and nothing says .* declare action_start=1 .* else renumber its actions"


class Line(gymnasium.Env):
    """Actions 1, 2, 3 move left, not at all and right; every other one is a mistake, and each has a reward of its own."""

    observation_space = spaces.Box(-10, 10, (1,), np.float32)
    action_space = spaces.Discrete(3, start=1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-3, 3))
        return np.array([self.x], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (1, 2, 3), action
        self.x += {1: -0.5, 2: 0.0, 3: 0.5}[int(action)]
        return np.array([self.x], np.float32), self.x + 10.0 * int(action), False, False, {}


@pytest.fixture(autouse=True)
def _registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "home"))
    gymnasium.register(NAME, entry_point=Line, max_episode_steps=STEPS)
    yield
    del gymnasium.registry[NAME]


def recorded(actions: tuple[int, ...]) -> list[dict[str, Any]]:
    """Episodes of a plain loop, with the environment's own numbers."""
    env, rng, episodes = gymnasium.make(NAME), np.random.default_rng(0), []
    for seed in SEEDS:
        observations, taken, rewards = [env.reset(seed=seed)[0]], rng.choice(actions, STEPS), []
        for action in taken:
            obs, reward, *_ = env.step(int(action))
            observations.append(obs)
            rewards.append(reward)
        episodes.append({"observations": np.array(observations), "actions": taken, "rewards": np.array(rewards)})
    return episodes


def columns(episodes: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    rows = {key: np.concatenate([episode[key] for episode in episodes]) for key in ("actions", "rewards")}
    rows["observations"] = np.concatenate([episode["observations"][:-1] for episode in episodes])
    rows["next_observations"] = np.concatenate([episode["observations"][1:] for episode in episodes])
    rows["terminals"] = np.zeros(len(rows["rewards"]), bool)
    rows["timeouts"] = np.arange(len(rows["rewards"])) % STEPS == STEPS - 1
    return rows


def minari_folder(folder: Path, episodes: list[dict[str, Any]]) -> Path:
    """As Minari's collector writes it, whose space tells the first action."""
    written = [
        Episode(e["observations"], e["actions"].astype(np.int64), e["rewards"].astype(np.float32), terminated=False)
        for e in episodes
    ]
    space = {"type": "Discrete", "dtype": "int64", "start": 1, "n": 3}
    write_minari(folder, written, DatasetInfo(env_id=NAME), folder.name, None, space, "")
    path = folder / "data/metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["offrl_info"]
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps({"id": NAME, "max_episode_steps": STEPS})}))
    return folder


def assert_replays(store: OfflineDataset) -> None:
    """Every action of the data has the reward and the successor that it had when it was recorded."""
    info = with_environment(store.info, env=NAME)
    assert info.discrete == 3
    env = make_env(info)
    assert env.action_space == spaces.Discrete(3)
    for episode, seed in enumerate(SEEDS):
        env.reset(seed=seed)
        for row in range(*store.offsets[episode : episode + 2].tolist()):
            obs, reward, *_ = env.step(int(store.actions[row]))
            np.testing.assert_array_equal(obs, store.next_observations[row])
            assert store.rewards[row] == np.float32(reward)


@pytest.mark.parametrize("actions", [(1, 2, 3), (1, 2)])
@pytest.mark.parametrize("how", ["arrays", "npz", "hdf5", "episodes", "frame", "minari"])
def test_a_log_with_the_environments_own_numbers_plays_them(tmp_path: Path, how: str, actions: tuple[int, ...]) -> None:
    episodes = recorded(actions)
    rows = columns(episodes)
    declared: dict[str, Any] = {"action_start": 1, "action_count": 3}
    if how == "arrays":
        store = from_arrays(rows | declared)
    elif how == "episodes":
        store = from_episodes(episodes, DatasetInfo(discrete=3), action_start=1)
    elif how == "frame":
        frame = pl.DataFrame(
            {key: rows[key] for key in ("actions", "rewards", "timeouts")} | {"x": rows["observations"][:, 0]}
        )
        names = {"rewards": "rewards", "terminals": None, "timeouts": "timeouts"}
        store = from_frame(frame, "x", "actions", **names, info=DatasetInfo(discrete=3), action_start=1)
    elif how == "minari":
        store = load(minari_folder(tmp_path / "log-v0", episodes))
    else:
        store = load(_file(tmp_path / f"log.{how}", rows | declared))
    assert store.info.provenance[FIRST_ACTION] == 1
    assert_replays(store)


def _file(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


@pytest.mark.parametrize("actions", [(1, 2, 3), (1, 2)])
def test_numbers_that_nobody_declared_are_refused(actions: tuple[int, ...]) -> None:
    """{1, 2} of three actions looks like 0, 1, 2, each of which was played one too high."""
    store = from_arrays(columns(recorded(actions)))
    with pytest.raises(OffrlError, match=UNKNOWN):
        make_env(with_environment(store.info, env=NAME))


def test_an_environment_that_counts_from_another_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    info = with_environment(from_arrays(columns(recorded((1, 2, 3))) | {"action_start": 1}).info, env=NAME)
    for start in (0, 2):
        monkeypatch.setattr(Line, "action_space", spaces.Discrete(3, start=start))
        with pytest.raises(OffrlError, match=f"numbers its actions from {start}, but those of the dataset .* from 1;"):
            make_env(info)


@pytest.mark.parametrize("source", ["npz", "minari"])
def test_conversions_keep_the_first_action_and_the_number(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = recorded((1, 2))
    if source == "npz":
        start = _file(tmp_path / "log.npz", columns(episodes) | {"action_start": 1, "action_count": 3})
    else:
        start = minari_folder(tmp_path / "log-v0", episodes)
    for name in ("a.npz", "b-v0", "c.hdf5", "d.safetensors", "e-v0", "f.npz"):
        assert main(["data", "convert", str(start), str(tmp_path / name)]) == 0, capsys.readouterr()
        start = tmp_path / name
        assert_replays(load(start))


def test_scores_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    store = from_arrays(columns(recorded((1, 2))) | {"action_start": 1, "action_count": 3})
    info = with_environment(store.info, env=NAME)
    agent = BC(Spec(1, 3, (0,), discrete=True), BCConfig(hidden=(8,)))
    with Evaluator(info, 1, workers=1) as evaluator:
        scored = evaluator.run(agent, 5, seed=20).returns[0]
    env, returns, taken = gymnasium.make(NAME), [], set()
    for seed in range(20, 25):
        obs, ended, total = env.reset(seed=seed)[0], False, 0.0
        while not ended:
            action = int(agent.predict(obs)[0]) + 1
            obs, reward, terminated, truncated, _ = env.step(action)
            taken, total, ended = taken | {action}, total + float(reward), terminated or truncated
        returns.append(total)
    np.testing.assert_allclose(scored, returns, rtol=1e-12)  # sums of the same numbers
    assert taken <= {1, 2, 3}


def test_a_recorded_policy_is_scored_as_it_was_played(tmp_path: Path) -> None:
    info = with_environment(load(minari_folder(tmp_path / "log-v0", recorded((1, 2, 3)))).info, env=NAME)
    agent = BC(Spec(1, 3, (0,), discrete=True), BCConfig(hidden=(8,)))
    record(tmp_path / "played-v0", list(play(agent, make_env(info), SEEDS)), info, agent, "BC")
    assert_replays(load(tmp_path / "played-v0"))


def test_what_earlier_versions_kept_of_minari_is_played_as_before(tmp_path: Path) -> None:
    """Flat caches and runs' records have no first action, but were renumbered."""
    store = load(minari_folder(tmp_path / "log-v0", recorded((1, 2, 3))))
    facts = {key: value for key, value in store.info.provenance.items() if key != FIRST_ACTION}
    assert_replays(store.with_info(provenance=facts))


def test_a_number_of_actions_that_is_too_small_says_how_to_declare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "action_space", spaces.Discrete(3))
    info = with_environment(DatasetInfo(id="mine", discrete=2), env=NAME)
    advice = r"Discrete\(3\), but the dataset has 2 discrete actions; .*action_count=3 .*DatasetInfo\(discrete=3\)"
    with pytest.raises(OffrlError, match=advice):
        make_env(info)
    assert make_env(replace(info, discrete=3)).action_space == spaces.Discrete(3)
    with pytest.raises(OffrlError, match="has 4 discrete actions; it is another task"):
        make_env(replace(info, discrete=4))
