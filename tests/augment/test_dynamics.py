"""Measures of synthetic trajectories, and the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offrl.augment import metrics
from offrl.augment.metrics import Simulator, along_horizon, coverage, dynamics_error, real_pieces
from offrl.cli.augment import _job, draw
from offrl.cli.main import main
from offrl.data.dataset import MADE_UP, DatasetInfo, OfflineDataset
from offrl.data.partial import partially_observed
from offrl.datasets import load as load_dataset
from offrl.envs.adapters import make_env
from offrl.forge import registry as forge
from offrl.training.runs import load_agent
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError

pytest.importorskip("mujoco")


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> OfflineDataset:
    """A little of the hopper."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("OFFRL_HOME", str(home))
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        path = forge.ensure("forge/hopper/medium-replay-v0", size=2000, seed=0, progress=False)
        return load_dataset(path)


def changed(store: OfflineDataset, **tensors: torch.Tensor) -> OfflineDataset:
    return OfflineDataset(**{**store.tensors(), **tensors}, info=store.info)


def test_real_transitions_have_no_dynamics_error(hopper: OfflineDataset) -> None:
    """But for rounding; with other next states or actions it is of the order of one."""
    some = real_pieces(hopper, 30, 10)
    simulator = Simulator(hopper.info)
    floor = dynamics_error(simulator, some, hopper)
    assert float(floor.states.median()) < 1e-8
    assert float(floor.states.mean()) < 1e-3
    assert float(floor.rewards.mean()) < 1e-3
    assert float(floor.flags.double().mean()) == 1
    shuffled = some.next_observations[torch.randperm(len(some), generator=torch.Generator().manual_seed(0))]
    assert float(dynamics_error(simulator, changed(some, next_observations=shuffled), hopper).states.mean()) > 0.5
    other = dynamics_error(simulator, changed(some, actions=-some.actions), hopper)
    assert float(other.states.mean()) > 100 * float(floor.states.mean())
    simulator.close()


@pytest.mark.parametrize("name", ["forge/pointmaze/umaze-dense-v0", "maze2d-umaze-dense-v1"])
def test_a_mazes_point_is_put_where_an_observation_says(name: str, tmp_path: Path) -> None:
    """Rows that its own environment made are made again, in both packages' coordinates, walls and rewards too."""
    if name.startswith("forge"):
        info = load_dataset(forge.ensure(name, size=300, seed=0, progress=False)).info
    else:
        info = DatasetInfo(id=name, env_id="PointMaze_UMaze-v3", family="maze2d", max_episode_steps=300)
    env = make_env(info)
    obs, _ = env.reset(seed=0)  # as the simulator's: Gymnasium's goal moves a little with every reset
    rows, random = [], np.random.default_rng(0)
    push = np.zeros(2)
    for step in range(400):
        if step % 40 == 0:  # long pushes, which end at walls
            push = random.uniform(-1, 1, 2)
        following, reward, *_ = env.step(push)
        rows.append((obs, push, reward, following))
        obs = following
    env.close()
    obs, action, reward, following = (torch.as_tensor(np.array(part)).float() for part in zip(*rows))
    store = OfflineDataset(obs, action, reward, following, torch.zeros(400), torch.tensor([0, 400]), info=info)
    simulator = Simulator(info)
    floor = dynamics_error(simulator, store, store)
    assert not floor.left_out
    assert float(reward.std()) > 0.01  # by the distance to the goal
    assert float(floor.states.mean()) < 1e-8  # float32 rows
    assert float(floor.rewards.max()) < 1e-8
    other = dynamics_error(simulator, changed(store, actions=-store.actions), store)
    assert float(other.states.mean()) > 1e-3
    simulator.close()


def test_errors_are_in_units_of_the_datasets_variance(hopper: OfflineDataset) -> None:
    some = real_pieces(hopper, 5, 4)
    simulator = Simulator(hopper.info)
    _, std = hopper.observation_statistics()
    moved = changed(
        some, next_observations=some.next_observations + 3 * std, rewards=some.rewards + 2 * hopper.rewards.std()
    )
    error = dynamics_error(simulator, moved, hopper)
    torch.testing.assert_close(error.states.median(), torch.tensor(9.0).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(error.rewards.median(), torch.tensor(4.0).double(), rtol=0.01, atol=0)
    simulator.close()


def test_states_that_cannot_be_told_are_counted(hopper: OfflineDataset) -> None:
    some = real_pieces(hopper, 5, 4)
    obs = some.observations.clone()
    obs[[0, 3], -1] = 10.0  # a velocity at its cut-off
    simulator = Simulator(hopper.info)
    error = dynamics_error(simulator, changed(some, observations=obs), hopper)
    assert error.left_out == 2 + int((some.observations[:, 5:].abs() >= 10).any(-1).sum())
    assert not {0, 3} & set(error.rows.tolist())
    simulator.close()


def test_a_robot_with_noise_is_stepped_without_it() -> None:
    info = DatasetInfo(
        id="x", env_id="offrl/NoisyHopper-v0", env_kwargs={"iid": 0.3, "sticky": 0.5, "reward_sigma": 1.0}
    )
    obs, action = np.zeros(11), np.array([0.3, -0.2, 0.1])
    obs[0] = 1.25
    noisy, plain = Simulator(info), Simulator(DatasetInfo(id="x", env_id="Hopper-v5"))
    wanted, reward, _ = plain.step(obs, action)
    for _ in range(3):
        following, got, _ = noisy.step(obs, action)
        np.testing.assert_array_equal(following, wanted)
        assert got == reward
    obs[5] = 10.0  # a velocity at its cut-off
    assert not noisy.determines(obs[None])
    noisy.close()
    plain.close()


def test_robots_that_cannot_be_set_are_refused() -> None:
    with pytest.raises(OffrlError, match=r"can't be read from its observation"):
        Simulator(DatasetInfo(id="x", env_id="Humanoid-v5"))
    with pytest.raises(OffrlError, match=r"can't be read from its observation"):
        Simulator(DatasetInfo(id="x", env_id="Pendulum-v1"))


@pytest.mark.parametrize("options", [{"mask": [3]}, {"mask": "velocity"}, {"flicker": 0.3}], ids=str)
def test_partial_observations_are_refused(hopper: OfflineDataset, options: dict[str, Any]) -> None:
    """A dimension that was left out would pass for a hidden position, and a lost observation for a state."""
    with pytest.raises(OffrlError, match=r"data\.mask or data\.flicker hides a part"):
        Simulator(partially_observed(hopper, **options).info)


def test_successors_that_were_made_up_are_left_out(hopper: OfflineDataset) -> None:
    """They stand where an episode terminates and its source has no next observations."""
    some = real_pieces(hopper, 30, 10)
    last = some.offsets[1:] - 1
    ended = last[some.terminations[last] > 0]
    assert len(ended) > 0
    following = some.next_observations.clone()
    following[ended] = 0
    made_up = changed(some, next_observations=following).with_info(provenance={MADE_UP: True})
    simulator = Simulator(hopper.info)
    found, whole = (dynamics_error(simulator, store, hopper) for store in (made_up, some))
    simulator.close()
    assert found.left_out == whole.left_out + len(ended)
    assert not torch.isin(ended, found.rows).any()
    assert float(found.states.mean()) < 1e-3


def test_a_runs_environment_ends_its_rollouts(tmp_path: Path) -> None:
    """`--policy RUN` takes what an episode is from the run, unless the words say so; nothing is imported."""
    kept = {"dataset": "mine.npz", "data": {}, "eval": {"env": "gone_module:Hopper-v5", "max_episode_steps": 7}}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    options = _job(["augment=world_model"], tmp_path).train.eval
    assert (options.env, options.max_episode_steps) == ("gone_module:Hopper-v5", 7)
    options = _job(["augment=world_model", "eval.env=Walker2d-v5"], tmp_path).train.eval
    assert (options.env, options.max_episode_steps) == ("Walker2d-v5", None)
    assert _job(["augment=world_model", "dataset=mine.npz"]).train.eval.env is None


def pieces(*lengths: int) -> OfflineDataset:
    n = sum(lengths)
    obs = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return OfflineDataset(obs, torch.zeros(n, 1), torch.zeros(n), obs + 1, torch.zeros(n), offsets)


def test_means_along_the_horizon() -> None:
    store = pieces(3, 1, 2)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert along_horizon(store, torch.arange(6), values) == pytest.approx([(1 + 4 + 5) / 3, 4.0, 3.0])
    assert along_horizon(store, torch.tensor([0, 5]), values[[0, 5]])[2] is None


def test_real_pieces_stay_in_their_episodes() -> None:
    store = pieces(3, 9, 1, 12)
    made = real_pieces(store, 200, 5)
    assert made.episodes == 200
    for first, last in zip(made.offsets[:-1], made.offsets[1:]):
        rows = [int((store.observations == obs).all(-1).nonzero()[0]) for obs in made.observations[first:last]]
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        end = int(store.offsets[1:][store.episode_of_row[rows[0]]])
        assert len(rows) == min(5, end - rows[0])


def test_coverage() -> None:
    """Itself: all of it; half of it: about half; elsewhere: none, and all of it new."""
    real = pieces(*[10] * 100)
    same = coverage(real, real)
    assert same["coverage"] == 1
    assert same["novelty"] == 0
    assert same["std_ratio_min"] == pytest.approx(1)
    left = OfflineDataset(**{**real.tensors(), "observations": -real.observations[:, :1].abs() * torch.tensor([[1.0, 0.0]])
                    + real.observations * torch.tensor([[0.0, 1.0]])})  # fmt: skip
    assert 0.4 < coverage(left, real)["coverage"] < 0.75
    far = OfflineDataset(**{**real.tensors(), "observations": real.observations + 50})
    assert coverage(far, real)["coverage"] == 0
    assert coverage(far, real)["novelty"] == 1


def test_likelihoods(toy_file: Path, tmp_path: Path) -> None:
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [8]}
    quiet = {"progress": False, "eval": {"every": 0, "final_episodes": 0}, "out": str(tmp_path), "lanes": 2}
    run = train({"agent": agent, "dataset": str(toy_file), "updates": 4, "batch_size": 8, **quiet})
    both = load_agent(run.folder)
    store = load_dataset(str(toy_file))
    mean = both.act(both.normalize(store.observations.expand(2, -1, -1)))
    for lane in range(2):
        got = metrics.log_likelihood(both.lane(lane), store, 0.5)
        square = (store.actions - mean[lane]).square().sum(-1) / 0.25
        wanted = -0.5 * square - 2 * math.log(0.5 * math.sqrt(2 * math.pi))
        torch.testing.assert_close(got, wanted.double(), rtol=0, atol=1e-5)
    with pytest.raises(OffrlError, match="lanes 0 to 1"):
        both.lane(2)


# ---- commands ----------------------------------------------------------------------------------------------------------

TINY = [
    "augment.denoiser.features=16",
    "augment.denoiser.updates=20",
    "augment.denoiser.batch_size=8",
    "augment.sampling.steps=4",
    "augment.length=7",
]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["dataset=forge/hopper/random-v0", "data.size=1500"]
    assert main(["augment", "train", *data, *TINY]) == 0
    printed = capsys.readouterr().out
    metadata = json.loads(printed[printed.index("{") :])
    assert metadata["denoiser"]["settings"]["features"] == 16
    small = ["agent.hidden=[8]", "updates=4", "batch_size=8", "progress=false", "eval.every=0", "eval.final_episodes=0"]
    assert main(["train", *data, *small, f"out={tmp_path}", "name=run"]) == 0
    run = str(tmp_path / "run")

    made = tmp_path / "made.npz"
    assert main(["augment", "sample", str(made), "--policy", run, *TINY, "augment.transitions=35"]) == 0
    store = load_dataset(str(made))
    assert store.episodes == 5
    assert len(store) <= 35

    words = [
        "augment.policy_std=[0.5]",
        "--transitions",
        "42",
        "--coefficients",
        "0,2",
        "--behaviour",
        run,
        "world_model.model.updates=5",
    ]
    assert main(["augment", "metrics", run, *words, "world_model.model.hidden=[8]", *TINY]) == 0
    capsys.readouterr()
    assert main(["augment", "sample", str(made), "--policy", run, "dataset=forge/halfcheetah/random-v0", *TINY]) == 2
    assert "has 11 observation numbers and 3 action numbers" in capsys.readouterr().err
    conditioned = ["agent=rvs", "agent.hidden=[8]", *small[1:], f"out={tmp_path}", "name=rvs"]
    assert main(["train", *data, *conditioned]) == 0
    assert main(["augment", "sample", str(made), "--policy", str(tmp_path / "rvs"), *TINY]) == 2
    assert "RvS acts on the episode so far" in capsys.readouterr().err
    out = tmp_path / "run" / "augment"
    kinds = json.loads((out / "metrics.json").read_text())["kinds"]
    assert list(kinds) == ["real", "unguided", "guided, 2", "world model"]
    assert kinds["real"]["dynamics_error"] < 1e-3 < kinds["unguided"]["dynamics_error"]
    assert kinds["real"]["coverage"] <= 1
    curve = np.array(kinds["unguided"]["curves"]["dynamics_error"], dtype=float)
    assert len(curve) <= 7
    table = (out / "metrics.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("|")]) == 2 + len(kinds)
    assert (out / "metrics.png").stat().st_size > 10_000
    capsys.readouterr()


def test_the_figure_shows_synthetic_errors_and_tells_the_rounding_of_real_ones() -> None:
    def kind(error: float) -> dict[str, Any]:
        curves = {"dynamics_error": [error, error], "log_likelihood_policy": [-1.0, -2.0]}
        return {"dynamics_error": error, "log_likelihood_policy": -1.5, "curves": curves}

    panel = draw({"real": kind(1e-14), "unguided": kind(0.02), "world model": kind(0.003)}).axes[0]
    assert panel.get_ylim()[0] == pytest.approx(1e-3)
    assert [text.get_text() for text in panel.texts] == ["real: 1e-14"]
    panel = draw({"real": kind(0.01), "unguided": kind(0.02)}).axes[0]  # as of another version of the simulator
    assert panel.get_ylim()[0] < 0.01
    assert not panel.texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nonsense"], "nonsense is no option"),
        (["train", "augment=none"], "augment=none makes no trajectories"),
        (["train", "augment.shape=3"], "augment.shape is no option; did you mean augment.share?"),
        (["sample", "made.xyz"], "made.xyz: unknown format"),
        (["metrics", "gone"], "gone: there is no config.json"),
        (["metrics", "gone", "--coefficients", "a"], "--coefficients a should be numbers"),
    ],
    ids=str,
)
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["augment", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_usage_is_shown(capsys: pytest.CaptureFixture[Any]) -> None:
    assert main(["augment"]) == 2
    assert "offrl augment" in capsys.readouterr().out
