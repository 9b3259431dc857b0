"""Evaluation environments: each adapter against the simulator's state or an independent model."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

pytest.importorskip("mujoco")

from offrl.data.catalogue import TASK_OF, d4rl, d4rl_task, flat_keys
from offrl.data.dataset import DatasetInfo
from offrl.data.minari import read_minari
from offrl.envs import TABULAR_IDS, make_env, make_gymnasium
from offrl.envs.adapters import D4RLKitchen, Maze2D
from offrl.envs.chosen import with_environment
from offrl.envs.mazes import LAYOUTS
from offrl.evaluation.evaluator import Evaluator
from offrl.forge import registry as forge
from offrl.utils.errors import OffrlError

robotics = pytest.mark.skipif(not importlib.util.find_spec("gymnasium_robotics"), reason="needs gymnasium-robotics")


def play(env: gymnasium.Env, seed: int = 0, scale: float = 1.0) -> tuple[list[Any], int, bool, bool]:
    """Random actions to the episode's end: rewards, length, terminated, truncated."""
    obs, _ = env.reset(seed=seed)
    rng, rewards = np.random.default_rng(seed), []
    while True:
        assert obs.shape == env.observation_space.shape
        obs, reward, terminated, truncated, _ = env.step(scale * rng.uniform(-1, 1, env.action_space.shape))
        rewards.append(reward)
        if terminated or truncated:
            return rewards, len(rewards), terminated, truncated


SIZES = {
    "hopper-medium-v2": (11, 3, 1000),
    "walker2d-random-v2": (17, 6, 1000),
    "halfcheetah-expert-v2": (17, 6, 1000),
    "ant-medium-replay-v2": (111, 8, 1000),
    "pen-human-v1": (45, 24, 100),
    "door-cloned-v1": (39, 28, 200),
    "hammer-expert-v1": (46, 26, 200),
    "relocate-human-longhorizon-v1": (39, 30, 500),
    "maze2d-umaze-v1": (4, 2, 300),
    "maze2d-large-dense-v1": (4, 2, 800),
    "maze2d-eval-medium-v1": (4, 2, 600),
    "maze2d-open-dense-v0": (4, 2, 150),
    "kitchen-mixed-v0": (60, 9, 280),
}
ENDLESS = ("halfcheetah", "door", "hammer", "relocate", "maze2d")


@robotics
@pytest.mark.parametrize("name", SIZES)
def test_spaces_and_time_limits_are_d4rls(name: str) -> None:
    obs_dim, action_dim, limit = SIZES[name]
    env = make_env(d4rl()[name].info())
    assert env.observation_space.shape == (obs_dim,)
    assert env.action_space.shape == (action_dim,)
    assert np.all(env.action_space.low == -1)
    assert np.all(env.action_space.high == 1)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (obs_dim,)
    wrapper = env
    while not isinstance(wrapper, gymnasium.wrappers.TimeLimit):
        wrapper = wrapper.env
    assert wrapper._max_episode_steps == limit
    if name.startswith(ENDLESS):
        assert play(env)[1:] == (limit, False, True)
    again, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, again)
    env.close()


@robotics
@pytest.mark.parametrize("name", ["hopper-medium-v2", "maze2d-umaze-v1", "door-human-v1"])
def test_actions_are_clipped_into_the_box(name: str) -> None:
    info = d4rl()[name].info()
    inside, outside = make_env(info), make_env(info)
    inside.reset(seed=1)
    outside.reset(seed=1)
    action = np.random.default_rng(0).normal(0, 3, inside.action_space.shape)
    a, b = inside.step(np.clip(action, -1, 1)), outside.step(action)
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1] == b[1]


# ---- locomotion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2", "ant-medium-v2"])
def test_locomotion_is_v4_and_ant_feels_no_contacts(name: str) -> None:
    info = d4rl()[name].info()
    env, plain = make_env(info), make_gymnasium(info.env_id or "")
    obs, _ = env.reset(seed=3)
    expected, _ = plain.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(15):
        size = len(expected)
        np.testing.assert_array_equal(obs[:size], expected)
        assert not obs[size:].any()
        action = rng.uniform(-1, 1, env.action_space.shape)
        obs, reward, *_ = env.step(action)
        expected, plain_reward, *_ = plain.step(action)
        assert reward == plain_reward
    if name.startswith("ant"):
        # With its own contact forces, v4 shows them and charges for them.
        forces = gymnasium.make("Ant-v4", use_contact_forces=True)
        assert forces.observation_space.shape == env.observation_space.shape


@robotics
def test_antmaze_is_refused_and_minaris_is_flat() -> None:
    for name in ("antmaze-umaze-v2", "antmaze-eval-large-play-v0"):
        with pytest.raises(OffrlError, match=r"train on Minari's D4RL/antmaze/\*-v2"):
            make_env(d4rl()[name].info())
    with pytest.raises(OffrlError, match="Minari"):
        make_env(DatasetInfo(id="some-file", family="antmaze"))
    info = DatasetInfo(id="D4RL/antmaze/umaze-v2", env_id="AntMaze_UMaze-v4", family="antmaze", max_episode_steps=7)
    env = make_env(info)
    obs, _ = env.reset(seed=0)
    state = env.unwrapped.data.qpos
    assert obs.shape == (29,)
    np.testing.assert_array_equal(obs[:2], state[:2])
    np.testing.assert_array_equal(obs[2:15], state[2:15])
    assert play(env)[1:] == (7, False, True)


# ---- Adroit --------------------------------------------------------------------------------------------------------


@robotics
@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("door-human-v1", ("S_grasp", "S_handle")),
        ("hammer-human-v1", ("S_grasp", None)),
        ("relocate-human-v1", ("S_grasp", None)),
    ],
)
def test_adroit_reaching_is_punished(name: str, near: tuple[str, str | None]) -> None:
    """Gymnasium's reward has +0.1 d where d is the distance between palm and object in the simulator; D4RL -0.1 d."""
    info = d4rl()[name].info()
    env, plain = make_env(info), make_gymnasium(info.env_id or "")
    env.reset(seed=0)
    plain.reset(seed=0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        action = rng.uniform(-1, 1, env.action_space.shape)
        reward, raw = env.step(action)[1], plain.step(action)[1]
        data = plain.unwrapped.data
        palm = data.site(near[0]).xpos
        thing = data.site(near[1]).xpos if near[1] else data.body("Object").xpos
        distance = np.linalg.norm(palm - thing)
        assert distance > 0.01
        assert reward == pytest.approx(raw - 0.2 * distance, rel=1e-9)
    sparse = DatasetInfo(id="x/y-v0", env_id="AdroitHandDoor-v1", env_kwargs={"reward_type": "sparse"})
    assert set(play(make_env(sparse))[0]) == {-0.1}


@robotics
def test_pen_ends_when_it_drops() -> None:
    env = make_env(d4rl()["pen-human-v1"].info())
    lengths = []
    for seed in range(12):
        env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        done = False
        steps = 0
        while not done:
            _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            steps += 1
            height = env.unwrapped.data.body("Object").xpos[2]
            assert terminated == (height < 0.075)
            done = terminated or truncated
        lengths.append(steps)
    assert min(lengths) < 100  # some fell
    other = make_env(DatasetInfo(id="D4RL/pen/human-v2", env_id="AdroitHandPen-v1", family="adroit"))
    assert play(other, seed=int(np.argmin(lengths)))[1:] == (200, False, True)


@robotics
@pytest.mark.parametrize("name", ["pen-human-v1", "ant-medium-v2", "maze2d-umaze-v1", "kitchen-mixed-v0"])
def test_a_dataset_of_another_id_keeps_its_task(name: str) -> None:
    """Of a mixture, a recording, a copy: the environment's wrappers and numbers are those of the D4RL set."""
    info = d4rl()[name].info()
    theirs, ours = make_env(info), make_env(replace(info, id="mine-v0"))
    assert str(ours) == str(theirs)
    assert play(ours, seed=3) == play(theirs, seed=3)
    chosen = with_environment(replace(info, id="mine-v0"), env="Pendulum-v1")
    assert make_env(chosen).unwrapped.spec.id == "Pendulum-v1"


@pytest.mark.parametrize("recorded", ["hopper-medium-v2", "nothing-v0", 3, ["pen-human-v1"], None])
def test_a_task_that_is_none_is_ignored(recorded: Any) -> None:
    info = DatasetInfo(id="mine", env_id="Pendulum-v1", provenance={TASK_OF: recorded})
    assert d4rl_task(info) is None
    assert str(make_env(info)) == str(make_env(replace(info, provenance={})))


# ---- Maze2D --------------------------------------------------------------------------------------------------------


def d4rl_model(layout: str) -> Any:
    """D4RL's model written out: wall (r, c) at (r + 1, c + 1), the ball's joints counted from (1.2, 1.2)."""
    import mujoco

    walls = "".join(
        f'<geom conaffinity="1" type="box" pos="{r + 1.0} {c + 1.0} 0" size="0.5 0.5 0.2"/>'
        for r, row in enumerate(LAYOUTS[layout])
        for c, tile in enumerate(row)
        if tile == "#"
    )
    return mujoco.MjModel.from_xml_string(f"""
    <mujoco>
      <compiler inertiafromgeom="true" angle="radian"/>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default><joint damping="1" limited="false"/>
        <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/></default>
      <worldbody>
        <geom size="40 40 0.25" pos="0 0 -0.1" type="plane" contype="1" conaffinity="0"/>
        <body pos="1.2 1.2 0">
          <geom type="sphere" size="0.1" contype="1"/>
          <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/>
        </body>{walls}
      </worldbody>
      <actuator><motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
        <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/></actuator>
    </mujoco>""")


@robotics
@pytest.mark.parametrize("name", ["maze2d-umaze-v1", "maze2d-large-dense-v1", "maze2d-eval-medium-v1"])
def test_maze2d_moves_like_d4rls_model(name: str) -> None:
    import mujoco

    env = Maze2D(name)
    model = d4rl_model(name.removeprefix("maze2d-").replace("-dense", "").removesuffix("-v1"))
    data = mujoco.MjData(model)
    touched = 0
    for seed in range(4):
        obs, _ = env.reset(seed=seed)
        data.qpos[:], data.qvel[:] = obs[:2], obs[2:]
        mujoco.mj_forward(model, data)
        rng = np.random.default_rng(seed)
        for t in range(250):
            if t % 25 == 0:
                action = rng.uniform(-1.3, 1.3, 2)
            obs, reward, terminated, truncated, _ = env.step(action)
            data.qvel[:] = np.clip(data.qvel, -5, 5)
            mujoco.mj_forward(model, data)
            data.ctrl[:] = np.clip(action, -1, 1)
            mujoco.mj_step(model, data)
            touched += data.ncon > 0
            # Contacts are solved in rotated coordinates, which costs the last digits.
            np.testing.assert_allclose(obs, np.concatenate((data.qpos, data.qvel)), atol=1e-6)
            distance = np.linalg.norm(obs[:2] - env.goal)
            assert reward == pytest.approx(np.exp(-distance) if "dense" in name else float(distance <= 0.5))
            assert not terminated
            assert not truncated
    assert touched > 100  # walls were met, so they stand where D4RL's do


@robotics
def test_maze2d_starts_anywhere_free() -> None:
    env = Maze2D("maze2d-umaze-v1")
    starts = np.array([env.reset(seed=seed)[0] for seed in range(200)])
    cells = np.rint(starts[:, :2]).astype(int)
    assert np.abs(starts[:, :2] - cells).max() <= 0.1
    assert {tuple(cell) for cell in cells} == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    # Velocities are 0.1 N(0, 1): 400 of them give the deviation to 0.1 sqrt(1/800).
    assert abs(starts[:, 2:].std() - 0.1) < 4 * 0.1 * np.sqrt(1 / 800)
    with pytest.raises(OffrlError, match="known are"):
        Maze2D("maze2d-huge-v1")


# ---- kitchen and other dictionaries --------------------------------------------------------------------------------


@robotics
def test_kitchen_observes_as_d4rl() -> None:
    goals = {
        "bottom burner": (11, -0.88),
        "light switch": (17, -0.69),
        "slide cabinet": (19, 0.37),
        "microwave": (22, -0.75),
    }
    for name, tasks in (
        ("kitchen-complete-v0", {"light switch", "slide cabinet", "microwave"}),
        ("kitchen-mixed-v0", {"light switch", "bottom burner", "microwave"}),
    ):
        env = D4RLKitchen(name)
        obs, _ = env.reset(seed=0)
        for task, (index, value) in goals.items():
            assert obs[30 + index] == (value if task in tasks else 0)
        np.testing.assert_array_equal(obs[53:], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06])  # the kettle's
        assert np.count_nonzero(obs[30:]) == {"kitchen-complete-v0": 9, "kitchen-mixed-v0": 10}[name]
    errors = []
    for _ in range(60):
        obs, *_ = env.step(np.zeros(9))
        errors.append(obs[:30] - env.unwrapped.data.qpos)
    largest = np.abs(errors).max(0)
    # Sensor noise is uniform in +- 0.1 of each joint's amplitude; the largest of 60 comes within 20 % of that.
    amplitude = 0.1 * np.concatenate((np.full(9, 0.1), D4RLKitchen.AMPLITUDE))
    assert np.all(largest <= amplitude)
    assert np.all(largest > 0.8 * amplitude)
    assert len(np.unique(obs)) > 30


@robotics
def test_dict_observations_are_flat_in_the_readers_order() -> None:
    kwargs = {"tasks_to_complete": ["microwave", "kettle"]}
    info = DatasetInfo(id="D4RL/kitchen/complete-v2", env_id="FrankaKitchen-v1", env_kwargs=kwargs, family="kitchen")
    env = make_env(info)
    obs, _ = env.reset(seed=0)
    inner = make_gymnasium("FrankaKitchen-v1", **kwargs)
    nested, _ = inner.reset(seed=0)
    np.testing.assert_array_equal(obs, gymnasium.spaces.flatten(inner.observation_space, nested))

    maze = DatasetInfo(id="D4RL/pointmaze/umaze-v2", env_id="PointMaze_UMaze-v3", max_episode_steps=5)
    assert make_env(maze).reset(seed=0)[0].shape == (4,)
    keys = ["achieved_goal", "desired_goal", "observation"]
    wide = DatasetInfo(id="x", env_id="PointMaze_UMaze-v3", provenance={"observation_keys": keys})
    obs, _ = make_env(wide).reset(seed=0)
    nested, _ = make_gymnasium("PointMaze_UMaze-v3").reset(seed=0)
    np.testing.assert_array_equal(obs, np.concatenate([nested[key] for key in keys]))


@robotics
@pytest.mark.parametrize("name", ["forge/walker2d/random-v0", "forge/pointmaze/medium-v0"])
def test_forge_data_repeat_in_their_evaluation_environment(name: str) -> None:
    folder = forge.ensure(name, size=700, progress=False)
    store = read_minari(folder)
    env = make_env(store.info)
    with h5py.File(folder / "data" / "main_data.hdf5") as file:
        seeds = [int(file[f"episode_{i}"].attrs["seed"]) for i in range(store.episodes)]
    for episode in range(min(3, store.episodes)):
        start, stop = store.offsets[episode : episode + 2].tolist()
        obs, _ = env.reset(seed=seeds[episode])
        for row in range(start, stop):
            np.testing.assert_array_equal(store.observations[row], obs.astype(np.float32))
            obs, reward, terminated, truncated, _ = env.step(store.actions[row].numpy())
            np.testing.assert_array_equal(store.next_observations[row], obs.astype(np.float32))
            assert store.rewards[row] == np.float32(reward)
            assert bool(store.terminations[row]) == terminated
            assert truncated == (row - start + 1 == store.info.max_episode_steps)


def test_flat_keys() -> None:
    goal = ["observation", "desired_goal", "achieved_goal"]
    assert flat_keys("AntMaze_UMaze-v5", goal) == ["achieved_goal", "observation"]
    assert flat_keys("gymnasium_robotics/PointMaze_Large-v3", goal) == ["observation"]
    assert flat_keys("FetchReach-v4", goal) == sorted(goal)
    assert flat_keys("AntMaze_UMaze-v5", ["b", "a"]) == ["a", "b"]


@robotics
def test_mazes_leave_no_files_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_gymnasium("PointMaze_UMaze-v3").reset(seed=0)
    assert not list(tmp_path.iterdir())
    assert tempfile.tempdir == str(tmp_path)


# ---- what cannot be made -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (DatasetInfo(id="mine"), "mine: this dataset names no environment"),
        (DatasetInfo(id="mine", env_id="NoSuchThing-v9"), "NoSuchThing-v9: Gymnasium doesn't know"),
        (d4rl()["bullet-ant-medium-v0"].info(), "bullet-ant-medium-v0: this dataset names no"),
    ],
)
def test_clear_refusals(info: DatasetInfo, message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        make_env(info)


FAMILIES = [
    *(DatasetInfo(id="mine", env_id=name) for name in TABULAR_IDS.values()),
    *(DatasetInfo(id="mine", env_id=name) for name in ("offrl/NoisyHopper-v0", "Hopper-v5", "Pendulum-v1")),
    *(d4rl()[name].info() for name in ("hopper-medium-v2", "maze2d-umaze-v1", "kitchen-complete-v0", "pen-human-v1")),
    DatasetInfo(id="mine", env_id="PointMaze_UMaze-v3"),
]


@robotics
@pytest.mark.parametrize("info", FAMILIES, ids=lambda info: f"{info.id} {info.env_id}")
@pytest.mark.parametrize("kwargs", [{"nonsense": 1}, {"sigma": "abc", "p": "abc", "frame_skip": "abc"}], ids=str)
def test_unknown_arguments_of_an_environment_are_refused(info: DatasetInfo, kwargs: dict[str, Any]) -> None:
    with pytest.raises(OffrlError, match="env_kwargs="):
        Evaluator(with_environment(info, env_kwargs=kwargs), 1, workers=1)


def test_an_id_of_ours_that_there_is_not() -> None:
    with pytest.raises(OffrlError, match="Gymnasium doesn't know"):
        Evaluator(DatasetInfo(id="mine", env_id="offrl/Nothing-v0"), 1, workers=1)


@pytest.mark.parametrize(
    ("env_id", "module", "extra"),
    [("Hopper-v4", "mujoco", "mujoco"), ("AdroitHandPen-v1", "gymnasium_robotics", "robotics")],
)
def test_missing_packages_are_named(env_id: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(OffrlError, match=rf'pip install "\.\[{extra}\]"'):
        make_env(DatasetInfo(id="x", env_id=env_id))
