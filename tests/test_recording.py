"""Videos and recorded episodes: the evaluator's episodes, step by step."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from offrl.agents.acting import lane_named
from offrl.agents.base import Agent, Spec
from offrl.agents.bc import BC, BCConfig
from offrl.cli.main import main
from offrl.data.catalogue import d4rl
from offrl.data.dataset import DatasetInfo
from offrl.data.partial import Partial, partial_of
from offrl.datasets import load
from offrl.envs import make_env
from offrl.evaluation import recording
from offrl.evaluation.evaluator import Evaluator
from offrl.training.runs import dataset_info
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError

PENDULUM = DatasetInfo(id="mine", env_id="Pendulum-v1", max_episode_steps=30, action_low=-2.0, action_high=2.0)


def policy(lanes: int = 1) -> Agent:
    return BC(Spec(3, 1, tuple(range(7, 7 + lanes)), action_low=-2.0, action_high=2.0), BCConfig(hidden=(8,)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return trained(tmp_path, {"_target_": "offrl.agents.bc.BC", "hidden": [8]})


def trained(tmp_path: Path, agent: dict[str, Any], **more: Any) -> Path:
    """A run of two lanes on episodes of the pendulum under random torques."""
    rng, steps = np.random.default_rng(0), 200
    ends = np.zeros(steps, dtype=bool)
    ends[49::50] = True
    np.savez(
        tmp_path / "mine.npz",
        observations=rng.normal(size=(steps, 3)),
        actions=rng.uniform(-2, 2, (steps, 1)),
        rewards=rng.normal(size=steps),
        terminals=np.zeros(steps, dtype=bool),
        timeouts=ends,
        offrl_info=json.dumps({"env_id": "Pendulum-v1", "max_episode_steps": 30, "action_low": -2, "action_high": 2}),
    )
    options = {"updates": 3, "batch_size": 8, "lanes": 2, "progress": False, "out": str(tmp_path / "runs")}
    quiet = {"every": 0, "final_episodes": 0}
    return train({"agent": agent, "dataset": str(tmp_path / "mine.npz"), "eval": quiet, **options, **more}).folder


def test_episodes_are_the_evaluators() -> None:
    """Lane 1 of two, alone and step by step: same returns and lengths, and the arrays fit together."""
    agent = policy(2)
    with Evaluator(PENDULUM, 2, workers=1) as evaluator:
        wanted = evaluator.run(agent, 3, seed=11)
    episodes = list(recording.play(agent.lane(1), make_env(PENDULUM), [11, 12, 13]))
    assert [len(e) for e in episodes] == wanted.lengths[1].tolist() == [30, 30, 30]
    # Rewards are kept in float32.
    np.testing.assert_allclose([e.rewards.sum(dtype=float) for e in episodes], wanted.returns[1], rtol=1e-6)
    env = make_env(PENDULUM)
    observation, _ = env.reset(seed=12)
    for t in range(30):
        np.testing.assert_allclose(episodes[1].observations[t], observation, rtol=0, atol=1e-5)
        observation, *_ = env.step(episodes[1].actions[t])
    assert episodes[1].observations.shape == (31, 3)


def test_recorded_episodes_are_a_dataset_of_minaris(run: Path, tmp_path: Path) -> None:
    minari = pytest.importorskip("minari")
    folder = tmp_path / "mine-v0"
    assert main(["evaluate", str(run), "--episodes", "2", "--workers", "1", "--record", str(folder)]) == 0
    theirs = minari.MinariDataset(str(folder / "data"))
    assert (theirs.total_episodes, theirs.total_steps) == (2, 60)
    assert theirs.recover_environment().spec.id == "Pendulum-v1"
    first = next(theirs.iterate_episodes())
    ours = load(folder)
    np.testing.assert_array_equal(first.observations[:-1], ours.observations[:30].numpy())
    np.testing.assert_array_equal(first.actions, ours.actions[:30].numpy())
    assert first.truncations[-1]
    assert not first.terminations.any()
    assert theirs.action_space.high == 2
    assert ours.info.env_id == "Pendulum-v1"
    assert main(["evaluate", str(run), "--record", str(folder)]) == 2  # nothing is written over


@pytest.mark.parametrize("name", ["pen-human-v1", "maze2d-umaze-v1"])
def test_a_recording_has_the_task_of_its_d4rl_set(name: str, tmp_path: Path) -> None:
    """Minari would make Gymnasium's environment, whose pen may lie on the floor, or none: it is told nothing."""
    pytest.importorskip("gymnasium_robotics")
    info = d4rl()[name].info()
    with closing(make_env(info)) as env:
        obs, actions = (space.shape[0] for space in (env.observation_space, env.action_space))
        agent = BC(Spec(obs, actions, (7,)), BCConfig(hidden=(8,)))
        episodes = list(recording.play(agent, env, [11, 12]))
    folder = tmp_path / "mine-v0"
    recording.record(folder, episodes, info, agent, "a policy")
    again = load(folder)
    assert again.info.id == "mine-v0"
    assert again.lengths.tolist() == [len(episode) for episode in episodes]
    with closing(make_env(again.info)) as env:
        replayed = list(recording.play(agent, env, [11, 12]))
    for one, other in zip(episodes, replayed):
        np.testing.assert_array_equal(one.observations, other.observations)
        assert one.terminated == other.terminated
    assert "env_spec" not in json.loads((folder / "data" / "metadata.json").read_text())


@pytest.mark.parametrize("hidden", [{"flicker": 0.5}, {"mask": [2]}], ids=str)
def test_what_a_partially_observed_run_records_is_so_too(hidden: dict[str, Any], tmp_path: Path) -> None:
    run = trained(tmp_path, {"_target_": "offrl.agents.bc.BC", "hidden": [8]}, data=hidden)
    folder = tmp_path / "mine-v0"
    assert main(["evaluate", str(run), "--episodes", "2", "--workers", "1", "--record", str(folder)]) == 0
    store = load(folder)
    assert partial_of(store.info) == partial_of(dataset_info(run)) != Partial()
    lost = (store.observations == 0).all(1).float().mean()
    assert (0.3 < lost < 0.7) if "flicker" in hidden else lost == 0  # 60 draws
    assert make_env(store.info).observation_space.shape == (store.obs_dim,)
    assert "env_spec" not in json.loads(
        (folder / "data" / "metadata.json").read_text()
    )  # Minari's environment loses nothing


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_video_has_the_episodes_pictures(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one grey each, which grows by the step: as many as the rate asks for, in order."""
    pytest.importorskip("PIL" if suffix == ".gif" else "imageio_ffmpeg")

    class Env:
        metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012
        t = 0
        unwrapped: Any = None

        def reset(self, seed: int) -> Any:
            self.t = 0
            return np.zeros(3), {}

        def step(self, action: Any) -> Any:
            self.t += 1
            return np.zeros(3), 1.0, False, self.t == 20, {}

        def render(self) -> Any:
            return np.full((64, 96, 3), 10 * self.t, dtype=np.uint8)

        def close(self) -> None:
            pass

    monkeypatch.setattr(recording, "make_env", lambda info, render=False: Env())
    path = tmp_path / f"film{suffix}"
    episodes = recording.film(policy(), PENDULUM, [1, 2], path)
    assert [e.rewards.sum() for e in episodes] == [20, 20]
    shown = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200] * 2  # every second step, two episodes
    for picture, grey in zip(frames(path), shown, strict=True):
        assert picture.shape == (64, 96, 3)
        assert abs(float(picture.mean()) - grey) < 4  # MP4 rounds colours
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("env_id", "options", "follows"),
    [
        ("Hopper-v5", {}, True),
        ("offrl/NoisyHopper-v0", {"sigma": 0.1}, True),
        ("Hopper-v5", {"camera_id": -1}, False),
        ("Hopper-v5", {"default_camera_config": {"distance": 2.0}}, False),
        ("InvertedPendulum-v5", {}, False),  # its model has no camera
        ("Pendulum-v1", {}, False),
    ],
)
def test_a_robot_is_filmed_by_the_camera_that_moves_with_it(
    env_id: str, options: dict[str, Any], follows: bool
) -> None:
    """The camera of the film is one of the model, of the mode that tracks a body's centre of mass; else none of the model."""
    mujoco = pytest.importorskip("mujoco")
    env = make_env(DatasetInfo(id="mine", env_id=env_id, env_kwargs=options), render=True)
    recording.follow_body(env)
    robot = env.unwrapped
    renderer = getattr(robot, "mujoco_renderer", None)
    camera = renderer.camera_id if renderer else -1
    assert (camera >= 0) == follows
    if follows:
        assert robot.model.cam_mode[camera] == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
        assert robot.model.cam_bodyid[camera] == robot.model.body("torso").id


def frames(path: Path) -> list[np.ndarray]:
    if path.suffix == ".gif":
        from PIL import Image, ImageSequence

        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(path))]
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(frame, dtype=np.uint8).reshape(height, width, 3) for frame in reader]


def test_what_cannot_be_drawn_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffrlError, match=r"ends in \.mp4 or \.gif"):
        recording.check_video(tmp_path / "film.avi", PENDULUM)
    lake = DatasetInfo(id="lake", env_id="offrl/SlipperyLake-v0", discrete=4)
    with pytest.raises(OffrlError, match="draws no pictures"):
        recording.check_video(tmp_path / "film.gif", lake)
    with pytest.raises(OffrlError, match=r"ends in -v0"):
        recording.check_record(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(OffrlError, match=r"\.\[video\]"):
        recording.check_video(tmp_path / "film.mp4", PENDULUM)


@pytest.mark.parametrize(
    ("pictures", "sentence"),
    [
        ([None], "gave NoneType, and a film needs an array uint8"),  # an __init__ that forgets its render_mode
        ([[np.zeros((8, 8, 3), np.uint8)]], "gave list"),
        ([np.zeros((8, 8), np.uint8)], r"gave uint8 \[8, 8\]"),
        ([np.zeros((8, 8, 3))], r"gave float64 \[8, 8, 3\]"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "change their size"),
        ([], r"render\(\) of Pendulum-v1 failed \(IndexError: pop from empty list\); leave --video out"),
    ],
)
def test_an_environment_whose_pictures_are_none(
    pictures: list[Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(PendulumEnv, "render", lambda env: pictures.pop(0))
    with pytest.raises(OffrlError, match=sentence):
        recording.film(policy(), PENDULUM, [1], tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("libraries", "display", "found"),
    [(("EGL", "OSMesa"), "", "egl"), (("OSMesa",), "", "osmesa"), ((), ":0", None), ((), "", OffrlError)],
)
def test_the_renderer_of_a_machine_without_a_display(
    libraries: tuple[str, ...], display: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording.sys, "platform", "linux")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("MUJOCO_GL", "")
    if found is OffrlError:
        with pytest.raises(OffrlError, match="neither EGL nor OSMesa"):
            recording.choose_renderer()
        return
    recording.choose_renderer()
    assert (os.environ["MUJOCO_GL"] or None) == found


def test_a_lane_is_named_by_number_or_as_the_best() -> None:
    agent = policy(3)
    agent.lane_scores = [1.0, 5.0, float("nan")]
    assert (lane_named(agent, "2"), lane_named(agent, "best")) == (2, 1)
    for word in ("3", "-1", "second"):
        with pytest.raises(OffrlError, match="lane"):
            lane_named(agent, word)


def test_a_lane_is_evaluated_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run), "--episodes", "2", "--workers", "1", "--json"]
    assert main(words) == 0
    both = json.loads(capsys.readouterr().out)
    assert main([*words, "--lane", "1"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["lane_seeds"] == both["lane_seeds"][1:]
    np.testing.assert_allclose(one["returns"][0], both["returns"][1], rtol=1e-9)
    assert torch.tensor(one["returns"]).shape == (1, 2)


def test_a_lane_that_sees_histories_is_evaluated_and_recorded_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings of the agent and of the encoder have a value per lane."""
    history = {"encoder": "gru", "hidden": 8, "latent": 4, "length": 3, "bisimulation": [0.0, 0.5]}
    run = trained(
        tmp_path,
        {"_target_": "offrl.agents.dql.DQL", "hidden": [8], "candidates": 4, "eta": [0.1, 1.0]},
        history=history,
    )
    words = ["evaluate", str(run), "--episodes", "2", "--workers", "1", "--json"]
    assert main(words) == 0
    both = json.loads(capsys.readouterr().out)
    assert main([*words, "--lane", "1"]) == 0
    one = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(one["returns"][0], both["returns"][1], rtol=1e-6)  # acting is in float32
    folder = tmp_path / "mine-v0"
    assert main([*words[:-1], "--record", str(folder)]) == 0
    assert load(str(folder)).episodes == 2


def test_a_run_whose_name_has_brackets_is_named_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run.rename("r[a]")
    assert main(["evaluate", "r[a]", "--episodes", "1", "--workers", "1"]) == 0
    assert "r[a] on Pendulum-v1" in capsys.readouterr().out
