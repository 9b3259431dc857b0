"""Masked and flickering observations: dataset and environment are changed alike, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import make_toy, tiny

from offrl.agents.bc import BC
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.partial import VELOCITIES, partially_observed, title
from offrl.envs import make_env
from offrl.training.run_config import resolve_config
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError


def pendulum(rows: int = 400) -> OfflineDataset:
    """Episodes of 20 random steps of Gymnasium's pendulum."""
    env, rng = gymnasium.make("Pendulum-v1"), np.random.default_rng(0)
    obs, action, reward, after = [], [], [], []
    for start in range(rows):
        if start % 20 == 0:
            now, _ = env.reset(seed=start)
        action.append(rng.uniform(-2, 2, 1).astype(np.float32))
        then, r, *_ = env.step(action[-1])
        obs.append(now), reward.append(float(r)), after.append(then)  # type: ignore[func-returns-value]
        now = then
    columns = [torch.from_numpy(np.stack(x)).float() for x in (obs, action, reward, after)]
    info = DatasetInfo(id="pendulum", env_id="Pendulum-v1", action_low=-2.0, action_high=2.0)
    return OfflineDataset(*columns, torch.zeros(rows), torch.arange(0, rows + 1, 20), info)


def test_a_masked_dataset_and_its_environment_lack_the_same_dimensions() -> None:
    full = pendulum()
    masked = partially_observed(full, "velocity")
    assert torch.equal(masked.observations, full.observations[:, :2])
    assert torch.equal(masked.next_observations, full.next_observations[:, :2])
    assert torch.equal(masked.rewards, full.rewards)
    assert torch.equal(partially_observed(full, [2]).observations, masked.observations)
    env, whole = make_env(masked.info), make_env(full.info)
    assert env.observation_space.shape == (2,)
    one, two = env.reset(seed=3)[0], whole.reset(seed=3)[0]
    for action in np.linspace(-2, 2, 10):
        assert np.array_equal(one, two[:2])
        (one, reward, *_), (two, other, *_) = env.step(np.array([action])), whole.step(np.array([action]))
        assert reward == other
    assert title(masked.info) == "pendulum+mask=velocity"


def test_flicker_loses_the_same_observations_as_row_and_as_successor() -> None:
    full = pendulum(4000)
    lossy = partially_observed(full, flicker=0.3, seed=1)
    lost = (lossy.observations == 0).all(-1)
    assert torch.equal(lossy.observations[~lost], full.observations[~lost])
    inside = torch.ones(4000, dtype=torch.bool)
    inside[lossy.offsets[1:] - 1] = False
    rows = inside.nonzero()[:, 0]
    assert torch.equal(lossy.next_observations[rows], lossy.observations[rows + 1])
    share, four_sigma = lost.double().mean().item(), 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert abs(share - 0.3) < four_sigma
    last = (lossy.next_observations[~inside] == 0).all(-1)
    assert abs(last.double().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 200) ** 0.5
    assert torch.equal(partially_observed(full, flicker=0.3, seed=1).observations, lossy.observations)
    assert not torch.equal(partially_observed(full, flicker=0.3, seed=2).observations, lossy.observations)


def test_the_environment_flickers_as_often_and_by_its_seed() -> None:
    info = partially_observed(pendulum(20), flicker=0.3).info
    env, whole = make_env(info), make_env(pendulum(20).info)

    def shown(seed: int) -> np.ndarray:
        first, _ = env.reset(seed=seed)
        return np.stack([first, *(env.step(np.zeros(1))[0] for _ in range(199))])

    episodes = [shown(seed) for seed in range(10)]
    lost = np.stack([(episode == 0).all(-1) for episode in episodes])
    assert abs(lost.mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert np.array_equal(shown(4), episodes[4])
    first, _ = whole.reset(seed=4)
    true = np.stack([first, *(whole.step(np.zeros(1))[0] for _ in range(199))])
    assert np.array_equal(episodes[4][~lost[4]], true[~lost[4]])


@pytest.mark.parametrize("name", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Reacher-v5", "Swimmer-v5"])
def test_the_documented_velocities_are_those_of_the_simulator(name: str) -> None:
    """Exactly these numbers of the observation change with the joints' velocities alone."""
    env = gymnasium.make(name).unwrapped
    env.reset(seed=0)
    shown = []
    for velocity in (0.1, 0.7):
        env.set_state(env.data.qpos.copy(), np.full(env.model.nv, velocity))  # type: ignore[attr-defined]
        shown.append(env._get_obs())  # type: ignore[attr-defined]
    changed = tuple(np.flatnonzero(shown[0] != shown[1]).tolist())
    assert any(len(shown[0]) == width and changed == tuple(dims) for width, dims in VELOCITIES.values()), changed


def test_wrong_options_get_a_sentence() -> None:
    for options, words in (
        ({"mask": "speed"}, "data.mask=speed"),
        ({"mask": [3]}, "dimensions 0 to 2"),
        ({"mask": [0, 1, 2]}, "not all"),
        ({"flicker": 1.0}, "below 1"),
    ):
        with pytest.raises(OffrlError, match=words):
            partially_observed(pendulum(20), **options)  # type: ignore[arg-type]
    with pytest.raises(OffrlError, match="not known"):
        partially_observed(make_toy(64), "velocity")
    twice = partially_observed(pendulum(20), flicker=0.1)
    with pytest.raises(OffrlError, match="already"):
        partially_observed(twice, flicker=0.1)


def test_a_run_has_them_in_its_configuration_and_resumes(toy_file: Path, tmp_path: Path) -> None:
    agent = {"_target_": "offrl.agents.bc.BC", **tiny(BC)}
    common = {"agent": agent, "dataset": str(toy_file), "batch_size": 16, "progress": False}
    common |= {"out": str(tmp_path), "eval": {"every": 0, "final_episodes": 0}, "checkpoint_every": 10}
    plain, masked = (resolve_config({**common, "data": data}) for data in ({}, {"mask": [1], "flicker": 0.2}))
    assert "mask" not in plain.to_dict()["data"]  # runs of before keep their hash
    assert masked.to_dict()["data"]["flicker"] == 0.2
    assert masked.config_hash() != plain.config_hash()
    data = {"mask": [1], "flicker": 0.2}
    whole = train({**common, "data": data, "updates": 20, "name": "whole"})
    train({**common, "data": data, "updates": 10, "name": "parts"})
    parts = train({**common, "data": data, "updates": 20, "name": "parts"})
    a, b = ((r.folder / "checkpoint.safetensors").read_bytes() for r in (whole, parts))
    assert a[-2000:] == b[-2000:]
