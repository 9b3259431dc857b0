"""Where a model's rollouts terminate: the limits, against the simulators' own flags on rows that they made."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offrl import datasets
from offrl.augment.termination import disagreement, termination, warn_of_disagreement
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.partial import KEY
from offrl.utils.errors import OffrlError

ROBOTS = {"hopper": 1500, "walker2d": 1500, "halfcheetah": 300}


def said(env_id: str, *states: list[float], name: str = "x") -> list[bool]:
    return termination(DatasetInfo(id=name, env_id=env_id))(torch.tensor(states)).tolist()


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5"])
def test_terminations_are_gymnasiums(env_id: str) -> None:
    """Of states at, around and beyond the limits."""
    pytest.importorskip("mujoco")
    import gymnasium

    robot: Any = gymnasium.make(env_id, disable_env_checker=True).unwrapped
    robot.reset(seed=0)
    generator = np.random.default_rng(0)
    nq, nv = robot.model.nq, robot.model.nv
    states, wanted = [], []
    for _ in range(300):
        height, angle = generator.uniform(0.1, 2.3), generator.uniform(-1.2, 1.2) * generator.choice([0.1, 1.0])
        rest = generator.normal(size=nq - 3) * 0.1
        qpos = np.concatenate([[0, 0, height], rest] if env_id == "Ant-v5" else [[0, height, angle], rest])
        qvel = generator.normal(size=nv) * 2
        robot.set_state(qpos, qvel)
        ant = env_id == "Ant-v5"  # its observation leaves out two positions, the others' one
        states.append(np.concatenate([qpos[2 if ant else 1 :], np.clip(qvel, -10, 10)]))
        wanted.append(not getattr(robot, "is_healthy", True))
    got: Tensor = termination(DatasetInfo(env_id=env_id))(torch.tensor(np.array(states)))
    assert got.tolist() == wanted
    assert env_id == "HalfCheetah-v5" or 30 < sum(wanted) < 290


@pytest.mark.parametrize("env_id", ["Humanoid-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5"])
def test_terminations_are_those_of_episodes(env_id: str) -> None:
    """Of robots whose flag is no function of the state alone that one could set: by steps of uniform actions."""
    pytest.importorskip("mujoco")
    store = steps_of(env_id, 400)
    assert disagreement(store) == 0
    assert store.terminations.sum() > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_disagreement(store)


def steps_of(env_id: str, count: int) -> OfflineDataset:
    """Steps of uniform actions in an environment of Gymnasium's, as a dataset."""
    import gymnasium

    env = gymnasium.make(env_id)
    env.action_space.seed(0)
    rows: list[tuple[Any, Any, bool]] = []
    offsets, obs = [0], env.reset(seed=0)[0]
    while len(rows) < count or not rows[-1][2]:
        following, _, terminated, _, _ = env.step(env.action_space.sample())
        rows.append((obs, following, bool(terminated)))
        obs = following
        if terminated:
            offsets.append(len(rows))
            obs = env.reset(seed=len(rows))[0]
    before, after, flags = (torch.tensor(np.array(part), dtype=torch.float32) for part in zip(*rows))
    zeros = torch.zeros(len(rows))
    return OfflineDataset(
        before, zeros[:, None], zeros, after, flags, torch.tensor(offsets), DatasetInfo(id="x", env_id=env_id)
    )


def test_rows_that_end_elsewhere_are_told() -> None:
    """Episodes of Hopper that end at a healthy state, and ones that go on from a state beyond the limits."""
    obs = torch.zeros(400, 11)
    obs[:, 0] = 1.2
    flags = torch.zeros(400)
    flags[-1] = 1
    fields = obs, torch.zeros(400, 3), torch.zeros(400)
    info, offsets = DatasetInfo(id="x", env_id="Hopper-v5"), torch.tensor([0, 400])
    with pytest.warns(UserWarning, match=r"don't end where its episodes terminate: 1 of 1 terminal rows"):
        warn_of_disagreement(OfflineDataset(*fields, obs, flags, offsets, info))
    after = obs.clone()
    after[-2:, 0] = 0.6
    with pytest.warns(UserWarning, match=r"end at states from which its episodes go on: 1 of 400 rows"):
        warn_of_disagreement(OfflineDataset(*fields, after, flags, offsets, info))


@pytest.mark.parametrize("robot", ROBOTS)
def test_no_row_of_the_simulators_is_contradicted(robot: str) -> None:
    """Every terminal next state is dead by the function, and every other one alive."""
    pytest.importorskip("mujoco")
    store = datasets.load(f"forge/{robot}/medium-replay-v0", size=ROBOTS[robot])
    assert disagreement(store) == 0
    assert robot == "halfcheetah" or store.terminations.sum() > 2


@pytest.mark.parametrize("robot", ["Hopper", "Walker2d"])
def test_a_noisy_robot_ends_as_the_robot_does(robot: str) -> None:
    states = [[1.2, 0.0, *[0.0] * 9], [0.3, 0.0, *[0.0] * 9], [1.2, 1.5, *[0.0] * 9]]
    assert said(f"offrl/Noisy{robot}-v0", *states) == said(f"{robot}-v5", *states) == [False, True, True]


def test_a_mask_leaves_terminations_as_they_are_or_is_refused() -> None:
    """Hopper ends by its height and angle, dimensions 0 and 1, wherever the mask has moved them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.tensor([1.2, 0.0]).repeat(200, 1) + torch.randn(200, 2, generator=generator) * torch.tensor(
        [0.5, 0.2]
    )
    states = torch.cat([states, torch.randn(200, 9, generator=generator)], -1)
    whole = termination(DatasetInfo(id="x", env_id="Hopper-v5"))(states)
    assert 20 < whole.sum() < 180
    masked = DatasetInfo(id="x", env_id="Hopper-v5", provenance={KEY: {"kept": [1, 0, 4], "flicker": 0.0}})
    assert torch.equal(termination(masked)(states[:, [1, 0, 4]]), whole)
    for kept, flicker, message in (([0, 2], 0.0, "dimensions 0, 1 of an observation"), (None, 0.3, "data.flicker=0.3")):
        partial = {KEY: {"kept": kept, "flicker": flicker}}
        with pytest.raises(OffrlError, match=message):
            termination(DatasetInfo(id="x", env_id="Hopper-v5", provenance=partial))
        termination(DatasetInfo(id="x", env_id="HalfCheetah-v5", provenance=partial))  # never ends


def test_the_pen_of_d4rl_ends_when_it_is_dropped() -> None:
    """The height is that of the simulator's pen; Gymnasium-Robotics' own environment never ends, nor do its datasets."""
    pytest.importorskip("gymnasium_robotics")
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    env = gymnasium.make("AdroitHandPen-v1", disable_env_checker=True)
    hand: Any = env.unwrapped
    generator, states, dropped = np.random.default_rng(0), [], []
    for seed in range(2):
        env.reset(seed=seed)
        for _ in range(80):
            observation, _, terminated, _, _ = env.step(generator.uniform(-1, 1, 24))
            states.append(observation)
            dropped.append(bool(hand.data.xpos[hand.obj_body_id].ravel()[2] < 0.075))
            assert not terminated
    assert 10 < sum(dropped) < 150
    table = np.array(states).tolist()
    assert said("AdroitHandPen-v1", *table, name="pen-human-v1") == dropped
    assert not any(said("AdroitHandPen-v1", *table, name="D4RL/pen/human-v2"))


def test_states_off_every_scale() -> None:
    """Not finite, or beyond 100 on either side, where OfflineRL-Kit's Hopper looks at one side only."""
    hopper = [1.2, 0.0, *[0.0] * 9]
    for value in (-200.0, 200.0, math.nan, math.inf):
        assert said("Hopper-v5", hopper, [*hopper[:5], value, *hopper[6:]]) == [False, True]
    assert said("Ant-v5", [0.5, *[0.0] * 26], [0.5, math.nan, *[0.0] * 25]) == [False, True]
    assert said("Walker2d-v5", [1.2, math.nan, *[0.0] * 15]) == [True]


@pytest.mark.parametrize(
    "env_id",
    ["AntMaze_UMaze-v4", "AdroitHandDoor-v1", "AdroitHandHammer-v1", "AdroitHandRelocate-v1", "HalfCheetah-v5"],
)
def test_what_never_terminates(env_id: str) -> None:
    assert not any(said(env_id, [0.0] * 60, [1e3] * 60))


def test_a_module_before_the_id_changes_nothing() -> None:
    assert said("some_module:Ant-v5", [5.0] * 27) == [True]
