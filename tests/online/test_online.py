"""Fine-tuning with environment steps: one seam for all agents with a critic, and its exact continuation."""

from __future__ import annotations

import json
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import make_toy
from processes import Fork
from torch import Tensor

import offrl
from offrl.agents.base import Agent, Spec
from offrl.agents.cql import CQL, CQLConfig
from offrl.agents.dql import DQL, DQLConfig
from offrl.agents.fql import FQL, FQLConfig
from offrl.agents.ifql import IDQL, IFQL, IDQLConfig, IFQLConfig
from offrl.agents.iql import IQL, IQLConfig
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.cli import main as cli
from offrl.data.arrays import write_npz
from offrl.data.batch import Batch
from offrl.data.dataset import OfflineDataset
from offrl.data.replay import Replay
from offrl.envs.lanes import LaneEnvs
from offrl.sampling import BatchLoader, Uniform
from offrl.sampling.replay import ReplayUniform, Union, UnionDraw
from offrl.training.online import OnlinePhase
from offrl.training.online_config import annealed
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_agent
from offrl.training.trainer import resume, train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.random import LaneRandom

# A point that drifts with the actions. Episodes end at a wall, or after seven steps.
ENVIRONMENT = """
import gymnasium, numpy as np

class Drift(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1.5, 1.5, 3)
        return self.state, {}

    def step(self, action):
        x, y, _ = self.state
        best = 0.5 * np.array([np.sin(x), np.tanh(x * y)])
        push = np.append(np.asarray(action), 0.0)
        self.state = 0.9 * self.state + 0.3 * push + self.np_random.normal(0, 0.3, 3)
        return self.state, -4 * float(np.square(action - best).sum()), bool(abs(self.state[0]) > 1.6), False, {}

if "Drift-v0" not in gymnasium.registry:
    gymnasium.register("Drift-v0", entry_point=Drift, max_episode_steps=7)
"""
SMALL = {"batch_size": 16, "lanes": 2, "log_every": 20, "checkpoint_every": 25, "progress": False, "updates": 40}
EVAL = {"every": 0, "episodes": 1, "final_episodes": 2, "workers": 1}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy task as a file that names its environment, in the working directory of the test."""
    (tmp_path / "sitecustomize.py").write_text(ENVIRONMENT)  # for processes of their own
    exec(ENVIRONMENT, {"__name__": "drift_world"})
    monkeypatch.chdir(tmp_path)
    write_npz(make_toy(400).with_info(env_id="Drift-v0"), tmp_path / "toy.npz")
    return tmp_path


def options(target: str = "td3_bc.TD3BC", online: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    agent = {"_target_": f"offrl.agents.{target}", "hidden": [8, 8], **changes.pop("agent", {})}
    online = {"steps": 60, "eval_every": 30, **(online or {})}
    return {"agent": agent, "dataset": "toy.npz", **SMALL, "eval": EVAL, "online": online, **changes}


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """All rows, without what a clock says or a run is called."""
    lines = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    named = ("wall_clock", "run_id", "method")
    return [{k: v for k, v in r.items() if k not in named} for r in lines if r.get("metric") != "updates_per_second"]


def replay_of(folder: Path) -> dict[str, Tensor]:
    parts = [checkpoint.load(path)[0] for path in sorted((folder / "replay").glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def same(a: Path, b: Path) -> bool:
    """Bitwise the same parameters and replay, and the same rows."""
    mine, theirs = (checkpoint.load(f / checkpoint.NAME)[0] | replay_of(f) for f in (a, b))
    assert mine.keys() == theirs.keys()
    for kind in ("metrics", "episodes", "online"):
        assert rows(a, kind) == rows(b, kind), kind
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- exploring ---------------------------------------------------------------------------------------------------------


def agents(seeds: tuple[int, ...] = (0, 9)) -> list[Agent]:
    spec = Spec(3, 2, seeds, torch.ones(3), torch.full((3,), 2.0), -0.5, 0.7)
    hidden = (8, 8)
    return [
        TD3BC(spec, TD3BCConfig(hidden=hidden)),
        IQL(spec, IQLConfig(hidden=hidden)),
        CQL(spec, CQLConfig(hidden=hidden)),
        *generative(spec),
    ]


def generative(spec: Spec) -> list[Agent]:
    """Agents whose policies turn noise into actions, and have no Gaussian."""
    few: dict[str, Any] = {"hidden": (8, 8), "candidates": 3}
    return [
        FQL(spec, FQLConfig(hidden=(8, 8))),
        IFQL(spec, IFQLConfig(flow_steps=3, **few)),
        IDQL(spec, IDQLConfig(denoising_steps=3, **few)),
        DQL(spec, DQLConfig(denoising_steps=3, **few)),
    ]


def test_exploration_stays_in_the_box_and_is_the_policy_without_its_noise() -> None:
    obs = 3 * torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    for agent in agents():
        random = LaneRandom(agent.spec.seeds)
        action = agent.explore(obs, random)
        assert action.min() >= -0.5
        assert action.max() <= 0.7
        assert not torch.equal(action, agent.select_action(obs))
        random.step.add_(1)
        assert not torch.equal(action, agent.explore(obs, random))  # another step, another action
    deterministic = agents()[0]
    policy, random = deterministic.select_action(obs), LaneRandom((0, 9))
    assert (deterministic.explore(obs, random) - policy).abs().max() <= 0.5 * 0.6 + 1e-6  # the noise is clipped
    deterministic.explore_noise = 0.0
    assert torch.equal(deterministic.explore(obs, random), policy)


def test_a_samples_moments_are_the_policys() -> None:
    """IQL's Gaussian far from the bounds: mean and std of 20,000 samples, within four standard errors."""
    spec = Spec(3, 2, (4,), action_low=-50.0, action_high=50.0)
    agent = IQL(spec, IQLConfig(hidden=(8, 8)))
    with torch.no_grad():
        agent.actor.log_std.fill_(-3.0)
    obs = torch.ones(1, 20_000, 3)
    action, (mean, std) = agent.explore(obs, LaneRandom((4,))), agent.policy_gaussian(agent.normalize(obs[:, :1]))
    assert ((action.mean(1) - mean[:, 0]).abs() < 4 * std[:, 0] / 20_000**0.5).all()
    assert ((action.std(1) / std[:, 0] - 1).abs() < 4 / (2 * 20_000) ** 0.5).all()


def test_a_deterministic_iql_explores_with_the_published_noise() -> None:
    """Std 0.03 of half the box, within four standard errors of 40,000 numbers; the policy lies far from the bounds."""
    spec = Spec(3, 2, (4,), action_low=-0.5, action_high=0.7)
    agent = IQL(spec, IQLConfig(hidden=(8, 8), deterministic=True))
    obs = torch.ones(1, 20_000, 3)
    noise = agent.explore(obs, LaneRandom((4,))) - agent.select_action(obs)
    assert abs(noise.std() / (0.03 * 0.6) - 1) < 4 / (2 * 40_000) ** 0.5


def test_a_generative_policy_explores_by_the_samples_that_it_is_evaluated_by() -> None:
    """In one state, over 4,000 samples: mean and std are those of evaluation, within five standard errors of a difference."""
    spec, n = Spec(3, 2, (4,), action_low=-50.0, action_high=50.0), 4_000
    obs = torch.ones(1, n, 3)
    for agent in generative(spec):
        explored = agent.explore(obs, LaneRandom((4,)))
        played = agent.select_action(obs, agent.initial_state(n))
        std = played.std(1)
        assert (std > 0).all()
        assert ((explored.mean(1) - played.mean(1)).abs() < 5 * std * (2 / n) ** 0.5).all(), type(agent)
        # The std of a std is sqrt((kurtosis - 1) / 4n) of it.
        kurtosis = ((played - played.mean(1, keepdim=True)) / std.unsqueeze(1)).pow(4).mean(1)
        assert ((explored.std(1) / std - 1).abs() < 5 * (2 * (kurtosis - 1) / (4 * n)).sqrt()).all(), type(agent)


def test_a_lanes_exploration_does_not_depend_on_its_neighbours() -> None:
    obs = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
    together, alone = agents((5, 6, 7)), agents((6,))
    for many, one in zip(together, alone):
        a = many.double().explore(obs.double(), LaneRandom((5, 6, 7)))
        b = one.double().explore(obs[1:2].double(), LaneRandom((6,)))
        torch.testing.assert_close(a[1:2], b, rtol=0, atol=1e-12)


# ---- the replay and its shares ---------------------------------------------------------------------------------------


def filled(rows: int, capacity: int = 50) -> Replay:
    """Lane l's row i has observation (l, i, i), and an episode of three steps begins at every third row."""
    replay = Replay(2, capacity, 3, 2, False, "cpu")
    for i in range(rows):
        lane = torch.arange(2.0)
        obs = torch.stack([lane, torch.full((2,), float(i)), torch.full((2,), float(i))], -1)
        replay.add(
            observations=obs,
            actions=obs[:, :2],
            rewards=obs[:, 1],
            next_observations=obs + 1,
            terminations=torch.full((2,), float(i % 6 == 5)),
            timesteps=torch.full((2,), i % 3),
        )
    return replay


def draw(source: list[Any], updates: int = 200, batch: int = 16, fields: tuple[str, ...] = ()) -> Batch:
    return BatchLoader(source, batch, None, fields).draw(LaneRandom((0, 9)), torch.arange(1, updates + 1))


@pytest.mark.parametrize("size", [1, 7, 50])
def test_half_of_each_batch_is_the_datasets(size: int, toy: OfflineDataset) -> None:
    """Exactly, for any number of online rows; these are uniform over the lane's own."""
    replay = filled(size)
    batch = draw([(toy, Uniform(toy), 1.0), (replay, ReplayUniform(replay), 0.5)])
    assert ((batch.index >= 0).sum(-1) == 8).all()
    online = batch.obs[..., 8:, :]
    assert (online[..., 0] == torch.arange(2.0).view(1, 2, 1)).all()  # no lane sees another's
    counts = torch.stack([torch.bincount(online[:, lane, :, 1].reshape(-1).long(), minlength=size) for lane in (0, 1)])
    expected = 200 * 8 / size
    chi_square = ((counts - expected) ** 2 / expected).sum(-1)
    assert (chi_square < size - 1 + 5 * (2 * size) ** 0.5).all()


def test_online_rows_alone(toy: OfflineDataset) -> None:
    replay = filled(7)
    assert (draw([(toy, Uniform(toy), 1.0), (replay, ReplayUniform(replay), 1.0)]).index == -1).all()


def test_the_unions_share_is_that_of_its_rows() -> None:
    """k / (n + k) of 80,000 draws, within four standard errors; and what is gathered is what was drawn."""
    store, replay = make_toy(60), filled(20)
    batch = draw(
        [(Union(store, replay), UnionDraw(store, Uniform(store), replay), 1.0)], updates=2500, fields=("next_action",)
    )
    online = batch.index < 0
    assert abs(online.double().mean() - 0.25) < 4 * (0.25 * 0.75 / 80_000) ** 0.5
    assert torch.equal(batch.obs[~online], store.observations[batch.index[~online]])
    assert torch.equal(batch.obs[online][:, 1:] + 1, batch.next_obs[online][:, 1:])


def test_next_actions_end_with_their_episode_and_with_the_newest_row() -> None:
    replay = filled(8)
    batch = replay.transitions(torch.arange(8).expand(2, 8) + torch.tensor([[0], [50]]), ("next_action", "timestep"))
    known = torch.tensor([i % 3 != 2 for i in range(8)])
    known[7] = False  # nothing is known behind the newest row
    assert torch.equal(batch.has_next_action, known.expand(2, 8))
    assert torch.equal(batch.next_action[:, known], batch.action[:, torch.arange(8)[known] + 1])
    assert torch.equal(batch.next_action[:, ~known], batch.action[:, ~known])
    assert torch.equal(batch.mask, 1 - (torch.arange(8) % 6 == 5).float().expand(2, 8))


# ---- environments ----------------------------------------------------------------------------------------------------


def test_environments_are_restored_from_seeds_and_actions() -> None:
    info = make_toy(40).with_info(env_id="Drift-v0").info
    first, second = (LaneEnvs(info, (3, 4), 3, 2) for _ in range(2))
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 2, 2))
    first.reset()
    taken: list[list[Any]] = [[], []]
    for action in actions[:23]:
        step = first.step(action)
        for lane in (0, 1):
            taken[lane] = [*taken[lane], action[lane]] if first.length[lane] else []
            if first.length[lane]:
                assert (step.next_obs[lane] == first.obs[lane]).all()
    second.restore(first.episode, [np.array(part) for part in taken])
    for action in actions[23:]:
        mine, theirs = first.step(action), second.step(action)
        assert (mine.next_obs == theirs.next_obs).all()
        assert mine.ended == theirs.ended


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_replay_is_what_the_environment_did() -> None:
    """Successors, terminations and time limits row by row against the environment played anew; rewards by the same map."""
    result = train(options(data={"reward_scale": 3.0, "reward_shift": -1.0}))
    replay, info = replay_of(result.folder), make_toy(40).with_info(env_id="Drift-v0").info
    assert replay["rewards"].shape == (2, 60)
    envs = LaneEnvs(info, (0, 1), 3, 2)
    envs.reset()
    for i in range(60):
        step = envs.step(replay["actions"][:, i].numpy())
        assert torch.equal(replay["observations"][:, i], torch.from_numpy(step.obs).float())
        assert torch.equal(replay["next_observations"][:, i], torch.from_numpy(step.next_obs).float())
        assert torch.equal(replay["rewards"][:, i], torch.from_numpy(step.reward).float() * 3.0 - 1.0)
        assert torch.equal(replay["terminations"][:, i], torch.from_numpy(step.terminated).float())
    cut = replay["timesteps"] == 6  # the time limit's steps; at some of them the wall is hit as well
    assert (replay["terminations"][cut] == 0).sum() > 0
    assert replay["terminations"].sum() > 0
    ends = [(r["step"], r["lane"]) for r in rows(result.folder, "online")]
    assert ends == sorted((int(i) + 1, lane) for lane in (0, 1) for i in ends_of(replay, lane))


def ends_of(replay: dict[str, Tensor], lane: int) -> Tensor:
    return torch.nonzero((replay["terminations"][lane] == 1) | (replay["timesteps"][lane] == 6)).flatten()


def test_the_offline_half_is_the_offline_run_and_finetune_continues_it() -> None:
    """`finetune` of a finished run gives bitwise what one run of both halves gives, the method's table included."""
    both = train(options(online={"anneal": {"alpha": 5.0}}))
    offline = train({**options(out="offline"), "online": {}})
    assert "online" not in json.loads((offline.folder / "config.json").read_text())
    words = ["online.steps=60", "online.eval_every=30", "out=tuned"]
    assert cli.main(["finetune", str(offline.folder), *words]) == 0
    tuned = Path("tuned") / both.folder.relative_to("runs")
    assert same(both.folder, tuned)
    assert (tuned / "result.json").exists()
    switch = [r for r in rows(tuned, "episodes") if r["step"] == 40]
    assert [r["return_raw"] for r in switch] == [r["return_raw"] for r in rows(offline.folder, "episodes")]
    kept, started = (checkpoint.load(f / checkpoint.NAME)[0] for f in (tuned, offline.folder))
    for name in ("obs_mean", "obs_scale"):  # frozen
        assert torch.equal(kept[name], started[name])
    assert load_agent(tuned).select_action(torch.zeros(2, 1, 3)).shape == (2, 1, 2)
    assert cli.main(["finetune", str(offline.folder), *words]) == 0  # already finished


def test_finetune_reads_the_table_of_a_choice_whose_settings_refer_to_the_commands() -> None:
    """`conf/agent/iql.yaml` has `actor_decay: ${updates}`, the length of the offline half; and its table's `online:` holds."""
    flat = {
        **SMALL,
        **{f"eval.{key}": value for key, value in EVAL.items()},
        "dataset": "toy.npz",
        "agent.hidden": "[8,8]",
    }
    words = ["train", "agent=iql", *(f"{key}={value}" for key, value in flat.items())]
    online = ["online.steps=20", "online.eval_every=10"]
    assert cli.main([*words, "out=both", *online]) == 0
    assert cli.main([*words, "out=offline"]) == 0
    (offline,) = Path("offline").glob("*/*/*")
    assert cli.main(["finetune", str(offline), "out=tuned", *online]) == 0
    (both,), (tuned,) = Path("both").glob("*/*/*"), Path("tuned").glob("*/*/*")
    assert same(both, tuned)


class Killed(BaseException):
    """The process dies here."""


SYMMETRIC: dict[str, Any] = {"agent": {"discount": 0.9}}
UNION = {"updates_per_step": 2, "burst": 4, "random_steps": 9, "offline_share": None, "recompute_every": 10}


@pytest.mark.parametrize(
    ("target", "online"),
    [
        ("td3_bc.TD3BC", UNION),
        ("iql.IQL", SYMMETRIC),
        ("rebrac.ReBRAC", {**SYMMETRIC, "noise": 0.2}),
        ("dql.DQL", {"burst": 2}),
    ],
    ids=["td3_bc", "iql", "rebrac", "dql"],
)
def test_killed_anywhere_it_ends_as_an_undisturbed_run(
    target: str, online: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step of the environment, in an update, between replay and checkpoint: bitwise the same parameters and rows."""
    weight = {"td3_bc.TD3BC": "alpha", "rebrac.ReBRAC": "actor_bc", "iql.IQL": "beta", "dql.DQL": "eta"}[target]
    few = {"candidates": 3, "denoising_steps": 2} if target == "dql.DQL" else {}
    values = options(target, {**online, "anneal": {weight: 0.5}}, agent=few)
    quiet = train({**values, "out": "quiet"})
    places: list[tuple[Any, str, int]] = [
        (LaneEnvs, "step", 31),
        (BatchLoader, "draw", 3),
        (checkpoint, "save", 1),
        (LaneEnvs, "step", 10),
    ]
    for owner, name, calls in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying(getattr(owner, name), calls))
            with pytest.raises(Killed):
                train({**values, "out": "killed"})
    assert train({**values, "out": "killed"}).status == "finished"
    assert same(quiet.folder, Path("killed") / quiet.folder.relative_to("quiet"))


def dying(function: Any, calls: int) -> Any:
    """The function, in whose call number `calls` the process dies."""
    made = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        if made > calls:
            raise Killed
        return function(*arguments, **named)

    return call


def test_a_sigkill_in_the_online_phase(world: Path) -> None:
    values = options(online={"steps": 200, "eval_every": 0}, updates=30, checkpoint_every=10)
    quiet = train({**values, "out": "quiet"})
    folder = Path("killed") / quiet.folder.relative_to("quiet")
    process = Fork(train, {**values, "out": "killed"})
    deadline = time.monotonic() + 120
    while (
        not list((folder / "replay").glob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    assert resume(folder).status == "finished"
    assert same(quiet.folder, folder)


def test_a_damaged_replay_is_refused_and_the_run_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign files in the folder don't matter; other rows, numbers that are none, or another place of the phase do."""
    values = options(updates=4, checkpoint_every=2, online={"steps": 12, "eval_every": 0}, out="killed")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying(checkpoint.save, 5))
        with pytest.raises(Killed):
            train(values)
    (folder,) = Path("killed").glob("*/*/*")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")  # to be seen if it is written anew
    main, first = folder / checkpoint.NAME, sorted((folder / "replay").iterdir())[0]
    (tensors, facts), (row, row_facts) = checkpoint.load(main), checkpoint.load(first)
    damages: list[tuple[Path, dict[str, Tensor], dict[str, Any], str]] = [
        (first, {**row, "rewards": row["rewards"] / 0}, row_facts, "not finite"),
        (first, {**row, "terminations": row["terminations"].double()}, row_facts, "does not fit this replay"),
        (main, tensors, {**facts, "online": {**facts["online"], "lengths": [1, 2, 3]}}, "none of this run's"),
        (main, tensors, {**facts, "online": {**facts["online"], "lengths": [10**6, 0]}}, "none of this run's"),
    ]
    for path, changed, told, sentence in damages:
        honest = path.read_bytes()
        checkpoint.write(path, changed, told)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
        with pytest.raises(OffrlError, match=sentence):
            resume(folder)
        assert before == {
            file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"
        }
        path.write_bytes(honest)
    for name in ("x.safetensors", "1-2-3.safetensors"):
        (folder / "replay" / name).write_bytes(first.read_bytes())
    assert resume(folder).status == "finished"


def test_an_environment_that_raises_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = options(online={"burst": 3})
    quiet = train({**values, "out": "quiet"})
    folder = resolve_config({**values, "out": "raised"}).folder()

    def broken(self: Any, action: Any, step: Any = gymnasium.wrappers.TimeLimit.step) -> Any:
        broken.calls += 1  # type: ignore[attr-defined]
        if broken.calls == 80:  # type: ignore[attr-defined]
            raise FloatingPointError("the simulator is unstable")
        return step(self, action)

    broken.calls = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(gymnasium.wrappers.TimeLimit, "step", broken)
        with pytest.raises(
            OffrlError, match=r"environment failed at step \d+ .*unstable.*on with: offrl train resume="
        ):
            train({**values, "out": "raised"})
    kept = checkpoint.metadata(folder / checkpoint.NAME)
    assert 0 < kept["online"]["step"] < 60
    assert kept["step"] == 40 + kept["online"]["step"]
    assert resume(folder).status == "finished"
    assert same(quiet.folder, folder)


@pytest.mark.parametrize("what", ["an observation", "a reward"])
def test_numbers_that_are_not_finite_never_enter_the_replay(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops before they are saved, and goes on exactly once the environment is repaired."""
    values = options(checkpoint_every=5)
    quiet = train({**values, "out": "quiet"})
    folder = resolve_config({**values, "out": "broken"}).folder()
    calls = 0

    def broken(self: Any, action: Any, step: Any = gymnasium.wrappers.TimeLimit.step) -> Any:
        nonlocal calls
        calls += 1
        obs, reward, *rest = step(self, action)
        if calls < 80:
            return obs, reward, *rest
        return (obs / 0, reward, *rest) if what == "an observation" else (obs, float("nan"), *rest)

    with monkeypatch.context() as patch, np.errstate(divide="ignore"):
        patch.setattr(gymnasium.wrappers.TimeLimit, "step", broken)
        with pytest.raises(OffrlError, match=rf"environment failed at step \d+ .*Drift-v0 gave {what} of .*resume="):
            train({**values, "out": "broken"})
    assert all(torch.isfinite(tensor).all() for tensor in replay_of(folder).values())
    assert resume(folder).status == "finished"
    assert same(quiet.folder, folder)


def test_a_first_observation_that_is_not_finite_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = LaneEnvs(make_toy(40).with_info(env_id="Drift-v0").info, (3,), 3, 2)
    monkeypatch.setattr(type(envs.envs[0]), "reset", lambda self, seed: (np.array([0.0, 1e39, 0.0]), {}))
    with pytest.raises(OffrlError, match=r"gave an observation of 1e\+39 at timestep 0 .* repair the environment"):
        envs.reset()


def test_an_environment_that_does_not_repeat_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = options()
    with monkeypatch.context() as patch:
        patch.setattr(LaneEnvs, "step", dying(LaneEnvs.step, 31))
        with pytest.raises(Killed):
            train(values)
    seed = LaneEnvs.episode_seed
    monkeypatch.setattr(LaneEnvs, "episode_seed", lambda self, lane: seed(self, lane) + 1)

    def contents() -> dict[Path, bytes]:
        return {
            path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file() and path.suffix != ".lock"
        }

    before = contents()
    with pytest.raises(OffrlError, match="does not repeat itself from the same seed"):
        train(values)
    assert len(before) > 4
    assert contents() == before


def test_updates_and_weights_follow_the_environment_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """UTD 3 after 10 random steps: 3 (60 - 10) updates; the weight falls linearly and stays at its floor."""
    seen: list[tuple[int, float, float]] = []
    collect = OnlinePhase.collect

    def watched(self: OnlinePhase) -> int:
        before, updates = self.step, collect(self)
        seen.append((before, float(self.agent.cfg.alpha[0]), float(self.agent.cfg.discount)))
        return updates

    monkeypatch.setattr(OnlinePhase, "collect", watched)
    online = {"updates_per_step": 3, "random_steps": 10, "agent": {"discount": 0.5}, "anneal": {"alpha": 0.4}}
    result = train(options(online=online))
    assert result.step == 40 + 150
    assert [step for step, _, _ in seen] == list(range(60))
    for step, alpha, discount in seen:
        assert alpha == pytest.approx(2.5 * max(0.4, 1 - step / 60), rel=1e-6)
        assert discount == 0.5
    replay = replay_of(result.folder)
    assert replay["actions"][:, :10].abs().max() <= 1
    assert [r["step"] for r in rows(result.folder, "episodes") if r["lane"] == 0] == [40] * 2 + [40 + 60] + [190] * 2


def test_schedules_have_the_ends_that_are_asked_for() -> None:
    assert [annealed(0.5, p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.75, 0.5, 0.5]  # ReBRAC's
    assert [annealed(0.0, p) for p in (0.0, 1.0)] == [1.0, 0.0]
    assert annealed(5.0, 0.0) == 1.0
    assert annealed(5.0, 0.5) == pytest.approx(2.0)  # the term against it has half its weight
    assert annealed(5.0, 1.0) == 5.0


def test_recomputed_statistics_are_those_of_both() -> None:
    result = train(options(online={"recompute_every": 60}))
    kept, _ = checkpoint.load(result.folder / checkpoint.NAME)
    replay, store = replay_of(result.folder), offrl.load_data("toy.npz")
    for lane in (0, 1):
        together = torch.cat([store.observations, replay["observations"][lane]]).double()
        torch.testing.assert_close(kept["obs_mean"][lane, 0].double(), together.mean(0), rtol=1e-5, atol=1e-6)
        scale = 1 / (together.std(0, correction=0) + 1e-3)
        torch.testing.assert_close(kept["obs_scale"][lane, 0].double(), scale, rtol=1e-5, atol=1e-6)
    assert load_agent(result.folder).select_action(torch.zeros(2, 1, 3)).shape == (2, 1, 2)


def test_a_lane_equals_a_run_of_its_own() -> None:
    """To rounding, which 60 updates of 8 x 8 networks in float32 carry to less than 1e-3 of an action."""
    together = replay_of(train(options(out="both")).folder)
    alone = replay_of(train(options(out="one", lanes=1, seed=1)).folder)
    assert torch.equal(together["observations"][1, 0], alone["observations"][0, 0])
    assert (together["actions"][1, :60] - alone["actions"][0, :60]).abs().max() < 1e-3


def test_evaluations_of_the_online_phase_need_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    """With `eval.every=0 eval.final_episodes=0` those of `online.eval_every` are played, and told by environment steps."""
    quiet = {**EVAL, "every": 0, "episodes": 2, "final_episodes": 0}
    cfg = options(eval=quiet, lanes=1, seed=0, progress=True)
    played = [(row["step"], row["eval_seed"]) for row in rows(train(cfg).folder, "episodes")]
    seeds = [EVAL.get("seed", 1_000_000) + number for number in range(2)]
    middle = cfg["updates"] + 30
    assert {step for step, _ in played} >= {middle}
    assert [seed for step, seed in played if step == middle] == seeds
    assert ": 30 of 60 environment steps: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"agent": {"_target_": "offrl.agents.bc.BC"}},
            "BC learns no critic, so it can't improve by environment steps",
        ),
        (
            {"dataset": "elsewhere.npz"},
            r"Pendulum-v1: its observations \(3,\) and 1 actions are not the dataset's 3 and 2",
        ),
        ({"dataset": "nowhere.npz"}, "names no environment"),
        ({"online": {"steps": 0, "noise": 0.3}}, "no effect without an online phase"),
        ({"online": {"steps": 5, "random_steps": 5}}, "random_steps=5 should be below online.steps=5"),
        ({"online": {"steps": 5, "offline_share": 1.0}}, "offline_share=1 should be at least 0 and below 1"),
        (
            {"online": {"steps": 5, "agent": {"alhpa": 1.0}}},
            "online.agent.alhpa is no option; did you mean online.agent.alpha",
        ),
        (
            {"online": {"steps": 5, "anneal": {"hidden": 0.5}}},
            "online.anneal.hidden: TD3BCConfig has no number of this name",
        ),
        (
            {"online": {"steps": 5, "anneal": {"alpha": -1.0}}},
            "online.anneal.alpha=-1.0 should be a number of at least 0",
        ),
        ({"online": {"steps": 5, "agent": {"hidden": [9, 8]}}}, "changes the agent's networks"),
        (
            {"online": {"steps": 5, "anneal": {"actor_lr": 0.1}}},
            "online.anneal.actor_lr: an optimiser keeps the number .*; online.agent.actor_lr=NUMBER changes it",
        ),
        (
            {"agent": {"_target_": "offrl.agents.iql.IQL"}, "online": {"steps": 5, "noise": 0.3}},
            "online.noise=0.3 has no effect, since IQL explores by samples .*deterministic=true",
        ),
        (
            {"agent": {"_target_": "offrl.agents.sac_n.SACN"}, "online": {"steps": 5, "noise": 0.3}},
            "online.noise=0.3 has no effect, since SACN explores by samples of its policy; leave it out",
        ),
        (
            {"agent": {"_target_": "offrl.agents.fql.FQL"}, "online": {"steps": 5, "noise": 0.3}},
            "online.noise=0.3 has no effect, since FQL explores",
        ),
        (
            {
                "agent": {"_target_": "offrl.agents.td3_bc.TD3BC"},
                "online": {"steps": 5, "agent": {"normalize_obs": False}},
            },
            r"online.agent.normalize_obs has no effect.*set agent.normalize_obs\.$",
        ),
        (
            {"agent": {"_target_": "offrl.agents.spot.SPOT"}, "online": {"steps": 5, "recompute_every": 2}},
            "online.recompute_every=2 has no effect where SPOT does not normalise observations; leave it out",
        ),
        (
            {"agent": {"_target_": "offrl.agents.prdc.PRDC"}, "online": {"steps": 5, "recompute_every": 2}},
            "online.recompute_every=2 can't go with PRDC, whose index",
        ),
        (
            {"agent": {"_target_": "offrl.agents.cal_ql.CalQL"}, "online": {"steps": 5, "agent": {"discount": 0.9}}},
            "online.agent.discount: the returns that calibrate CalQL .*online.agent.calibrate=false",
        ),
        (
            {
                "agent": {"_target_": "offrl.agents.iql.IQL", "dropout": [0.0, 0.5]},
                "lanes": 2,
                "online": {"steps": 5, "anneal": {"dropout": 2.0}},
            },
            "online.anneal.dropout=2: at the end of the online phase dropout=1 should be at least 0 and below 1",
        ),
        (
            {"agent": {"_target_": "offrl.agents.cal_ql.CalQL"}, "online": {"steps": 5, "anneal": {"discount": 0.9}}},
            "online.anneal.discount: the returns that calibrate CalQL",
        ),
        (
            {"agent": {"_target_": "offrl.agents.combo.COMBO"}, "online": {"steps": 5}},
            "COMBO learns from a model's rollouts, which can't be mixed with an online phase; choose another agent",
        ),
        ({"online": {"stepps": 5}}, "online.stepps is no option; did you mean online.steps"),
        ({"online": {"steps": -1}}, "online.steps=-1 should be at least 0"),
        ({"updates": 0, "online": {}}, "updates=0 should be at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_gets_a_sentence(changes: dict[str, Any], sentence: str, world: Path) -> None:
    write_npz(make_toy(40).with_info(env_id="Pendulum-v1"), world / "elsewhere.npz")
    write_npz(make_toy(40), world / "nowhere.npz")
    values = options(eval={"every": 0, "episodes": 0, "final_episodes": 0})
    agent = {**values["agent"], **changes.get("agent", {})}
    with pytest.raises(OffrlError, match=sentence):
        train({**values, **changes, "agent": agent})


def test_finetune_says_what_it_can_not_continue(capsys: pytest.CaptureFixture[str]) -> None:
    offline = train({**options(), "online": {}}).folder
    for words, sentence in (
        (["agent.alpha=1"], "agent.alpha belongs to the offline half; online.agent.alpha=1 changes it at the switch"),
        (["data.seed=1"], "data.seed can't be changed when a run is fine-tuned"),
        (["online.steps=0"], "online.steps=0"),
        (["name=" + offline.name, "out=" + str(offline.parent), "online.steps=5"], "needs a folder of its own"),
    ):
        assert cli.main(["finetune", str(offline), *words]) == 2
        assert sentence in capsys.readouterr().err
    tuned = train(options()).folder
    assert cli.main(["finetune", str(tuned)]) == 2
    assert "has been fine-tuned already" in capsys.readouterr().err
    with pytest.raises(OffrlError, match="made with other settings"):
        train({**options(updates=50), "name": str(tuned.relative_to("runs"))})


def test_finetune_takes_over_whole_rows_of_a_finished_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is refused leaves the offline run as it is, and nothing in the new run that could be continued."""
    offline = train({**options(), "online": {}}).folder
    words = ["finetune", str(offline), "online.steps=5", "out=tuned"]
    returns = [r["return_raw"] for r in rows(offline, "episodes")]
    for kind in ("episodes", "metrics"):
        path, whole = offline / f"{kind}.jsonl", (offline / f"{kind}.jsonl").read_bytes()
        for text, sentence in (
            (None, f"{kind}.jsonl is missing"),
            (b"[1]\n" + whole, f"{kind}.jsonl: line 1 is no row of results"),
            (b'{"step": "x"}\n' + whole, f"{kind}.jsonl: line 1 is no row of results"),
        ):
            path.unlink() if text is None else path.write_bytes(text)
            assert cli.main(words) == 2
            assert sentence in capsys.readouterr().err
            assert not list(Path("tuned").rglob("*.safetensors"))
        path.write_bytes(whole + b'{"step": 40, "torn')  # what a power failure leaves
    assert cli.main(words) == 0
    (tuned,) = {path.parent for path in Path("tuned").rglob("result.json")}
    assert [r["return_raw"] for r in rows(tuned, "episodes") if r["step"] == 40] == returns
    config, text = offline / "config.json", (offline / "config.json").read_text()
    for value, sentence in (({}, "agent needs a _target_"), ({**json.loads(text), "eval": 3}, "eval")):
        config.write_text(json.dumps(value))
        assert cli.main([*words, "eval.episodes=1"]) == 2
        assert sentence in capsys.readouterr().err
        with pytest.raises(OffrlError, match=sentence):
            resume(offline, {"eval.episodes": 1})
    config.write_text(text)
    unfinished = train({**options(updates=50, out="other"), "online": {}}).folder
    (unfinished / checkpoint.NAME).write_bytes((offline / checkpoint.NAME).read_bytes())
    assert cli.main(["finetune", str(unfinished), "online.steps=5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_score_before_is_the_same_policys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch changes no action: the policy before the first online update is that of the offline half."""
    begun: list[tuple[Tensor, Tensor]] = []
    begin = OnlinePhase.begin
    obs = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))

    def watched(self: OnlinePhase, agent: Agent, kept: Any) -> Agent:
        before = agent.select_action(obs)
        changed = begin(self, agent, kept)
        begun.append((before, changed.select_action(obs)))
        return changed

    monkeypatch.setattr(OnlinePhase, "begin", watched)
    train(options(online={"agent": {"discount": 0.9}, "reset_optimizers": True}))
    assert len(begun) == 1
    assert torch.equal(*begun[0])


def test_options_that_a_method_follows_are_taken() -> None:
    """What `test_bad_input_gets_a_sentence` refuses, beside the settings with which it has an effect."""
    for target, agent, online in (
        ("iql.IQL", {"deterministic": True}, {"noise": 0.3}),
        ("spot.SPOT", {"normalize_obs": True}, {"recompute_every": 2}),
        ("cal_ql.CalQL", {}, {"agent": {"discount": 0.9, "calibrate": False}}),
        ("cal_ql.CalQL", {}, {"agent": {"discount": 0.99}}),
    ):
        assert resolve_config(options(target, online, agent=agent)).train.online.steps == 60


def test_rlpds_actor_learns_at_every_environment_step() -> None:
    """Wherever a command lowers the updates of a step, it lowers those of the critics too; whoever forgets it is told."""
    root = Path(__file__).parents[2]
    texts = [*(root / "docs").glob("*.md"), *(root / "benchmarks").rglob("*.sh"), *conf_dir().rglob("*.yaml")]
    commands = [line for path in texts for line in path.read_text().splitlines() if "agent=rlpd" in line]
    lowered = [line for line in commands if "updates_per_step=" in line]
    assert len(lowered) >= 3
    for line in lowered:
        (updates,), found = re.findall(r"updates_per_step=(\d+)", line), re.findall(r"critic_updates=(\d+)", line)
        assert found == [updates], line
    online = {"updates_per_step": 4}
    with pytest.warns(UserWarning, match="one update in 20 of the critics, which get 4 per environment step"):
        resolve_config(options("rlpd.RLPD", online))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_config(options("rlpd.RLPD", online, agent={"critic_updates": 4}))
