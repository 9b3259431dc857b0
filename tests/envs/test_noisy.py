"""Robots with unseen noise: its distribution, the robot underneath, and datasets that store what was commanded."""

from __future__ import annotations

from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

pytest.importorskip("mujoco")

from offrl.data.minari import read_metadata
from offrl.datasets import exogenous_noise, load
from offrl.envs import NOISY_IDS, make_env
from offrl.envs.noisy import ROBOTS, NoiseModel
from offrl.forge import noisy
from offrl.forge import registry as forge
from offrl.utils.errors import OffrlError


def test_the_std_of_acts_noise() -> None:
    model = NoiseModel(sigma=0.4)
    std = np.array([model.std(t) for t in range(1000)])
    t = np.arange(1000)
    np.testing.assert_allclose(std, np.abs((1 - np.exp(-0.01 * t)) * np.sin(t) * 0.4), atol=1e-15)
    assert std[0] == 0
    # Root mean squares over an episode and over its beginning, in units of sigma.
    assert np.sqrt(np.mean(std**2)) / 0.4 == pytest.approx(0.65, abs=5e-3)
    assert np.sqrt(np.mean(std[:100] ** 2)) / 0.4 == pytest.approx(0.29, abs=5e-3)


def test_draws_have_their_distributions() -> None:
    rng, many = np.random.default_rng(0), 20_000
    ramp = np.array([NoiseModel(sigma=0.3).draw(rng, 11, 2) for _ in range(many)])
    assert ramp[:, :2].std(0) == pytest.approx(NoiseModel(sigma=0.3).std(11), rel=0.03)
    assert not ramp[:, 2:].any()
    other = np.array([NoiseModel(iid=0.2, sticky=0.25, reward_sigma=2.0).draw(rng, 1, 2) for _ in range(many)])
    assert other[:, :2].std(0) == pytest.approx(0.2, rel=0.03)
    assert other[:, 2].mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / many))
    assert other[:, 3].std() == pytest.approx(2.0, rel=0.03)
    assert np.abs(np.corrcoef(other.T) - np.eye(4)).max() < 4 / np.sqrt(many)
    assert not NoiseModel(sticky=0.999).draw(rng, 0, 2).any()  # there is no action before the first


@pytest.mark.parametrize("robot", ROBOTS)
def test_without_noise_it_is_the_robot_itself(robot: str) -> None:
    ours, base = gymnasium.make(NOISY_IDS[robot]), gymnasium.make(ROBOTS[robot])
    rng = np.random.default_rng(0)
    for seed in (3, None, None):  # later episodes go on with the environment's own generator
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], base.reset(seed=seed)[0])
        over = False
        while not over:
            action = (1.5 * rng.uniform(-1, 1, base.action_space.shape)).astype(np.float32)
            (*got, info), (*expected, _) = ours.step(action), base.step(action)
            np.testing.assert_array_equal(got[0], expected[0])
            assert got[1:] == expected[1:]
            assert not info["noise"].any()
            over = got[2] or got[3]


STRENGTHS = [{"sigma": 0.5}, {"iid": 0.3}, {"sticky": 0.5}, {"sigma": 0.3, "sticky": 0.3, "reward_sigma": 1.0}]


@pytest.mark.parametrize("strengths", STRENGTHS)
def test_the_robot_gets_the_disturbed_action(strengths: dict[str, float]) -> None:
    ours, base = gymnasium.make(NOISY_IDS["Hopper"], **strengths), gymnasium.make(ROBOTS["Hopper"])
    rng, runs = np.random.default_rng(0), []
    for seed in (3, 4, 3):
        (obs, info), (start, _) = ours.reset(seed=seed), base.reset(seed=seed)
        np.testing.assert_array_equal(obs, start)
        assert not info["noise"].any()
        before, draws = np.zeros(3), []
        for _ in range(20):
            action = rng.uniform(-1, 1, 3).astype(np.float32)
            (obs, reward, terminated, _, info) = ours.step(action)
            np.testing.assert_array_equal(info["intended_action"], action)
            noise = info["noise"]
            before = before if noise[3] else action
            expected = base.step(np.clip(before + noise[:3], -1, 1))
            np.testing.assert_array_equal(obs, expected[0])
            assert reward == pytest.approx(expected[1] + noise[4], abs=1e-12)
            assert terminated == expected[2]
            draws.append(noise)
            if terminated:
                break
        runs.append(np.array(draws))
    length = min(map(len, runs))
    np.testing.assert_array_equal(runs[0][:length], runs[2][:length])  # the noise starts anew with its seed
    assert (runs[0][:length] != runs[1][:length]).any()
    if strengths == {"sigma": 0.5}:
        assert not runs[0][0].any()


def test_bad_strengths() -> None:
    with pytest.raises(OffrlError, match="deviations should be at least 0"):
        gymnasium.make(NOISY_IDS["Hopper"], sigma=-0.1)
    with pytest.raises(OffrlError, match="probability to stick"):
        gymnasium.make(NOISY_IDS["Hopper"], sticky=1.0)


# ---- datasets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("noisy-hopper/medium-replay-s0.2", {"sigma": 0.2}),
        ("noisy-walker2d/medium-sticky0.25", {"sticky": 0.25}),
        ("noisy-halfcheetah/medium-reward2", {"reward_sigma": 2.0}),
        ("noisy-reacher/medium-iid0.1", {"iid": 0.1}),
    ],
)
def test_episodes_are_those_of_the_noisy_environment(name: str, kwargs: dict[str, float]) -> None:
    """Seeds and commanded actions give back observations, rewards, ends and noise."""
    folder = forge.ensure(f"forge/{name}-v0", size=700, progress=False)
    store = load(folder)
    noise = exogenous_noise(store).numpy()
    assert store.info.env_kwargs == kwargs
    assert (store.info.family, len(store)) == ("noisy-mujoco", 700)
    with h5py.File(folder / "data" / "main_data.hdf5") as file:
        seeds = [int(file[f"episode_{e}"].attrs["seed"]) for e in range(store.episodes)]
    env = make_env(store.info)
    for seed, start, stop in zip(seeds[:3], store.offsets[:-1].tolist(), store.offsets[1:].tolist()):
        obs, _ = env.reset(seed=seed)
        for row in range(start, stop):
            np.testing.assert_array_equal(store.observations[row], obs.astype(np.float32))
            obs, reward, terminated, _, info = env.step(store.actions[row].numpy())
            assert store.rewards[row].item() == pytest.approx(reward, rel=1e-6, abs=1e-6)
            assert terminated == bool(store.terminations[row])
            np.testing.assert_array_equal(noise[row], info["noise"].astype(np.float32))


def test_the_plain_robots_record_no_noise() -> None:
    plain = load(forge.ensure("forge/hopper/random-v0", size=200, progress=False))
    with pytest.raises(OffrlError, match="noise was not recorded"):
        exogenous_noise(plain)


def test_building_leaves_the_registered_environment_alone() -> None:
    folder = forge.ensure("forge/noisy-hopper/medium-replay-s0.2-v0", size=700, progress=False)
    env: Any = gymnasium.make(NOISY_IDS["Hopper"])
    assert env.get_wrapper_attr("noise") == NoiseModel()
    spec = gymnasium.envs.registration.EnvSpec.from_json(read_metadata(folder)["env_spec"])
    assert gymnasium.make(spec).get_wrapper_attr("noise") == NoiseModel(sigma=0.2)


def test_names_of_noisy_sets() -> None:
    names = forge.names()
    for robot in ("hopper", "halfcheetah", "walker2d"):
        for level in ("medium", "medium-replay"):
            for sigma in ("0", "0.1", "0.2", "0.3"):
                assert f"forge/noisy-{robot}/{level}-s{sigma}-v0" in names
    assert all(noisy.recipe(name) for name in noisy.names())
    for wrong in ("noisy-hopper/medium-s0.20", "noisy-hopper/best-s0.2", "noisy-reacher/medium-replay-s0.1"):
        assert noisy.recipe(wrong) is None
    with pytest.raises(OffrlError, match=r"did you mean forge/noisy-hopper/medium-s0.2"):
        forge.ensure("forge/noisy-hopper/medium-s0.20-v0", progress=False)


def reference_return(expert: bool, seed: int) -> float:
    """Return of one noise-free episode of Reacher: the controller, or uniform actions."""
    env, rng = gymnasium.make("Reacher-v5"), np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    total, truncated = 0.0, False
    while not truncated:
        obs, reward, _, truncated, _ = env.step(noisy.reach(obs) if expert else rng.uniform(-1, 1, 2))
        total += float(reward)
    env.close()
    return total


def test_the_reaching_controller_reaches() -> None:
    """The mean of 30 noise-free episodes lies within 4 standard errors (1.4 a single one) of the reference of 500."""
    returns = [reference_return(expert=True, seed=seed) for seed in range(500, 530)]
    assert abs(np.mean(returns) - noisy.REACHER_REFERENCES[1]) < 4 * 1.4 / np.sqrt(30)
