"""Datasets of finite stochastic tasks: who acted, what luck did, and that nobody but a probe sees it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import offrl
from offrl import data
from offrl.agents.base import Spec
from offrl.agents.bc import BC, BCConfig
from offrl.data.minari import read_metadata
from offrl.datasets import exogenous_noise, load
from offrl.envs import make_env
from offrl.envs import tabular_solver as tabular
from offrl.evaluation.evaluator import Evaluator
from offrl.forge import registry as forge
from offrl.forge import tabular as stochastic
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir

NAMES = ("bandit/p0.3", "lake/p0.7-eps0.4-n100", "cliff/uniform", "gambling/uniform", "toy/uniform", "mstoy/uniform")


def build(name: str, **options: Any) -> data.OfflineDataset:
    return load(forge.ensure(f"forge/{name}-v0", progress=False, **options))


@pytest.mark.parametrize("name", NAMES)
def test_episodes_are_those_of_the_environment(name: str) -> None:
    """Seed and commanded actions give back every observation, reward, end and noise."""
    folder = forge.ensure(f"forge/{name}-v0", size=300, progress=False)
    store = load(folder)
    noise = exogenous_noise(store)
    env = make_env(store.info)
    import h5py

    with h5py.File(folder / "data" / "main_data.hdf5") as file:
        seeds = [int(file[f"episode_{e}"].attrs["seed"]) for e in range(store.episodes)]
    for episode, seed in enumerate(seeds):
        obs, info = env.reset(seed=seed)
        assert (info["noise"], info["intended_action"]) == (-1, -1)
        rows = range(store.offsets[episode], store.offsets[episode + 1])
        for row in rows:
            np.testing.assert_array_equal(store.observations[row], obs)
            obs, reward, terminated, truncated, info = env.step(int(store.actions[row]))
            assert (reward, terminated) == (store.rewards[row], bool(store.terminations[row]))
            assert (info["noise"], info["intended_action"]) == (noise[row], store.actions[row])
            assert (terminated or truncated) == (row == rows[-1]) or episode == store.episodes - 1
        np.testing.assert_array_equal(store.next_observations[rows[-1]], obs)
    assert len(store) == 300
    assert not hasattr(store.transitions(torch.arange(3)), "noise")


@pytest.mark.parametrize(
    ("name", "episodes"),
    [("bandit/p0.1", 1000), ("bandit/skewed", 1000), ("lake/p0.33-eps0.4-n1000", 1000), ("lake/p0.7-eps1-n100", 100)],
)
def test_data_follow_their_recipe(name: str, episodes: int) -> None:
    """Counts, the behaviour's action shares and the mean return, within 4 standard errors of the exact ones."""
    recipe, store = stochastic.recipe(name), build(name)
    assert recipe is not None
    assert store.episodes == episodes
    info, exact = store.info, store.info.provenance["exact"]
    assert (info.family, info.discrete, info.env_id) == ("tabular", recipe.table.actions, recipe.env_id)
    assert info.env_kwargs == recipe.parameters
    returns = store.returns.numpy()
    assert abs(returns.mean() - exact["behaviour"]) < 4 * np.sqrt(exact["behaviour"] / episodes)
    assert info.provenance["mean_return"] == pytest.approx(returns.mean())
    assert info.provenance["successes"] == returns.sum()
    assert exact["optimal"] == pytest.approx(tabular.optimum(recipe.table))
    assert exact["behaviour"] == pytest.approx(tabular.value(recipe.table, recipe.behaviour))
    assert (info.ref_min, info.ref_max) == (exact["uniform"], exact["optimal"])
    assert info.normalized(exact["optimal"]) == pytest.approx(100)
    state = store.observations.argmax(-1)
    assert torch.equal(store.observations, torch.eye(recipe.table.states)[state])
    counts = np.zeros((recipe.table.states, recipe.table.actions))
    np.add.at(counts, (state.numpy(), store.actions.numpy()), 1)
    expected = recipe.behaviour * counts.sum(-1, keepdims=True)
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected) + 1e-9).all()


def test_the_cliff_is_seen_in_coordinates() -> None:
    store = build("cliff/uniform", size=500)
    assert store.obs_dim == 2
    assert store.observations.amax(0).tolist() == [4, 2]
    assert store.next_observations.amin() == 0


def test_noise_tells_nothing_of_the_action() -> None:
    """Chi-square of (action, noise) at 4 standard deviations, and the noise's own law."""
    name = "lake/p0.7-eps0.4-n1000"
    store = build(name)
    noise = exogenous_noise(store)
    counts = np.zeros((4, 3))
    np.add.at(counts, (store.actions.numpy(), noise.numpy()), 1)
    law = np.array([0.7, 0.15, 0.15])
    expected = counts.sum(1, keepdims=True) * law
    assert ((counts - expected) ** 2 / expected).sum() < 8 + 4 * 4


def test_noise_is_for_whole_datasets_that_recorded_it(toy_file: Path) -> None:
    store = build("bandit/p0.3", size=300)
    assert exogenous_noise(store).dtype == torch.int64
    with pytest.raises(OffrlError, match="the noise of 300 rows is known, this dataset has 3"):
        exogenous_noise(store.select_episodes(torch.arange(3)))
    with pytest.raises(OffrlError, match="no Minari dataset"):
        exogenous_noise(load(toy_file))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_request_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "forge/lake/p0.5-eps0.7-n100-v0"
    first = contents(forge.ensure(name, progress=False))
    time.sleep(1.1)  # HDF5's time stamps count seconds
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path / "elsewhere"))
    assert contents(forge.ensure(name, progress=False)) == first
    other = contents(forge.ensure(name, seed=1, progress=False))
    assert other["main_data.hdf5"] != first["main_data.hdf5"]


def test_names() -> None:
    names = forge.names()
    for name in ("bandit/p0.1", "bandit/skewed", "lake/p0.33-eps0.4-n100", "lake/p1-eps1-n10000", "cliff/uniform"):
        assert f"forge/{name}-v0" in names
    assert all(stochastic.recipe(name) for name in stochastic.names())
    made = stochastic.recipe("lake/p0.33-eps0.25-n17")
    assert made is not None
    assert made.parameters == {"no_slip_prob": 1 / 3}
    folders = {
        forge.folder_of(f"forge/{name}-v0", size, seed) for name in NAMES for size in (None, 5) for seed in (0, 1)
    }
    assert len(folders) == 4 * len(NAMES)
    assert forge.folder_of("forge/lake/p0.7-eps0.4-n100-v0") == cache_dir() / "forge/lake/p0_7-eps0_4-n100-v0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forge/lake/p0.70-eps0.4-n100-v0", "did you mean forge/lake/p0.7-eps0.4-n100"),
        ("forge/bandit/p0.7-v0", "p should lie between 0 and 0.5"),
        ("forge/lake/p2-eps0.4-n100-v0", "can't build that"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        forge.ensure(name, progress=False)


def test_minari_reads_them_with_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(cache_dir()))
    folder = forge.ensure("forge/lake/p0.7-eps0.4-n100-v0", progress=False)
    dataset = minari.load_dataset(read_metadata(folder)["dataset_id"])
    store = load(folder)
    noise = exogenous_noise(store)
    assert (dataset.total_steps, dataset.total_episodes) == (len(store), store.episodes)
    assert dataset.observation_space == gymnasium.spaces.Discrete(16)
    assert dataset.action_space == gymnasium.spaces.Discrete(4)
    assert dataset.recover_environment().unwrapped.task.noise[0] == pytest.approx(0.7)
    for episode in dataset.iterate_episodes():
        rows = slice(store.offsets[episode.id], store.offsets[episode.id + 1])
        np.testing.assert_array_equal(episode.actions, store.actions[rows])
        np.testing.assert_array_equal(episode.rewards, store.rewards[rows])
        np.testing.assert_array_equal(episode.terminations, store.terminations[rows].bool())
        np.testing.assert_array_equal(episode.observations[:-1], store.observations[rows].argmax(-1))
        np.testing.assert_array_equal(episode.infos["noise"], np.append(-1, noise[rows]))


# ---- evaluation and training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lake/p0.7-eps0.4-n100", "cliff/uniform", "bandit/p0.3"])
def test_vectorised_evaluation_plays_the_same_episodes(name: str) -> None:
    info = build(name, size=300).info
    store = build(name, size=300)
    agent = BC(Spec(store.obs_dim, store.action_dim, seeds=(0, 1, 2), discrete=True), BCConfig(hidden=(8,)))
    with Evaluator(info, 3) as fast, Evaluator(info, 3, workers=1, make_env=lambda: make_env(info)) as slow:
        assert fast.vector
        assert not slow.vector
        ours, theirs = fast.run(agent, 50, seed=11), slow.run(agent, 50, seed=11)
        again = fast.run(agent, 20, seed=11)  # fewer than there are rows
    np.testing.assert_array_equal(ours.returns, theirs.returns)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_array_equal(again.returns, ours.returns[:, :20])
    assert len(np.unique(ours.lengths)) > 1 or name != "lake/p0.7-eps0.4-n100"


def test_cloning_the_lake_finds_the_greedy_policy(tmp_path: Path) -> None:
    """Arg-max of the cloned behaviour is the policy of value iteration: 0.754 in the exact table."""
    name = "lake/p0.7-eps0.4-n1000"
    result = offrl.fit(
        agent="bc",
        dataset=f"forge/{name}-v0",
        updates=300,
        batch_size=128,
        out=str(tmp_path),
        progress=False,
        **{"eval.every": 0, "eval.final_episodes": 1000},
    )
    expected = 0.754
    assert abs(result.returns[0] - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000)
    assert result.scores is not None
    info = json.loads((result.folder / "manifest.json").read_text())["dataset_info"]
    assert info["env_id"] == "offrl/SlipperyLake-v0"


def test_a_sequence_model_samples_its_actions(tmp_path: Path) -> None:
    """DT on the mirrored bandit is undecided: drawn actions earn 0.5, as exact RCSL does."""
    result = offrl.fit(
        agent="dt",
        dataset="forge/bandit/p0.1-v0",
        updates=200,
        batch_size=64,
        out=str(tmp_path),
        progress=False,
        **{"eval.every": 0, "eval.final_episodes": 1000, "agent.sample_actions": True, "agent.embed": 16},
        **{"agent.layers": 1, "agent.lr": 1e-2, "agent.warmup": 1, "agent.dropout": 0.0},
    )
    # About 180 of the 1000 episodes earned 1, so that even the exact conditional is known to 0.04 only.
    assert abs(result.returns[0] - 0.5) < 0.8 * 4 * 0.5 / np.sqrt(180)
