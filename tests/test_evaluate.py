"""Evaluation: every episode counted once, with the numbers of a plain loop over one environment."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from offrl.agents.base import Agent, Spec
from offrl.agents.bc import BC, BCConfig
from offrl.agents.flow_bc import FlowBC
from offrl.agents.ifql import IDQL
from offrl.data.dataset import DatasetInfo
from offrl.envs.adapters import plain_robot
from offrl.evaluation.evaluator import Episodes, Evaluator
from offrl.utils.errors import OffrlError

INFO = DatasetInfo(id="toy", env_id="Toy-v0", ref_min=-1.0, ref_max=3.0)


class Toy(gymnasium.Env):
    """Episode lengths, ends (even seeds terminate, odd ones hit a time limit) and rewards depend on the seed.

    `started` and `stepped` count what happened to each seed in this process.
    """

    started: ClassVar[Counter[int]] = Counter()
    stepped: ClassVar[Counter[int]] = Counter()

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = spaces.Box(-10, 10, (3,))
        self.action_space = spaces.Discrete(4) if discrete else spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert seed is not None
        super().reset(seed=seed)
        self.seed, self.left = seed, 2 + int(self.np_random.integers(20))
        self.state = self.np_random.normal(size=3)
        Toy.started[seed] += 1
        return self.state.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.left > 0, "stepped behind the end of an episode"
        Toy.stepped[self.seed] += 1
        self.left -= 1
        push = np.full(3, 0.1 * action) if isinstance(action, int) else 0.3 * np.resize(action, 3)
        self.state = np.sin(self.state + push + 0.1 * self.np_random.normal(size=3))
        reward = float(self.state.sum() + np.sum(np.square(action)))
        over = self.left == 0
        return self.state.copy(), reward, over and self.seed % 2 == 0, over and self.seed % 2 == 1, {}


@dataclass
class LinearConfig:
    gain: float = 1.0


class Linear(Agent):
    """a = tanh(gain W s), another W in each lane."""

    Config = LinearConfig
    takes_discrete = True

    def build(self) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in self.spec.seeds]
        weight = [torch.randn(self.spec.action_dim, self.spec.obs_dim, generator=g) for g in generators]
        self.weight = torch.nn.Parameter(torch.stack(weight))

    def act(self, obs: Tensor) -> Tensor:
        out = obs @ self.weight.transpose(1, 2) * self.cfg.gain
        return out.argmax(-1) if self.spec.discrete else out.tanh()


class Remembering(Linear):
    """Acts by the rewards that it has seen in the episode, and counts them."""

    def initial_state(self, envs: int) -> Any:
        return torch.zeros(self.spec.lanes, envs, 2, dtype=self.weight.dtype)

    def update_state(self, state: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        return state + torch.stack([reward + action.sum(-1), torch.ones_like(reward)], -1)

    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        return (self.act(obs) + state.sin()).clamp(-1, 1)


def agent_of(kind: type[Agent] = Linear, lanes: int = 2, discrete: bool = False) -> Agent:
    return kind(Spec(3, 4 if discrete else 2, tuple(range(5, 5 + lanes)), discrete=discrete))


@torch.no_grad()
def plain_loop(agent: Agent, make_env: Any, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths, one environment and one lane after the other."""
    policy = agent.double()
    lanes = agent.spec.lanes
    returns, lengths = np.zeros((lanes, episodes)), np.zeros((lanes, episodes), dtype=int)
    for lane in range(lanes):
        for k in range(episodes):
            env, over = make_env(), False
            obs, state = env.reset(seed=seed + k)[0], policy.initial_state(1)
            while not over:
                raw = torch.as_tensor(np.asarray(obs, dtype=np.float64)).expand(lanes, 1, -1)
                action = policy.select_action(raw, state)
                chosen = action[lane, 0].numpy()
                obs, reward, terminated, truncated, _ = env.step(int(chosen) if chosen.ndim == 0 else chosen)
                state = policy.update_state(state, action, torch.full((lanes, 1), float(reward), dtype=torch.float64))
                returns[lane, k] += reward
                lengths[lane, k] += 1
                over = terminated or truncated
            env.close()
    return returns, lengths


def played(agent: Agent, episodes: int, make_env: Any = Toy, seed: int = 100, **options: Any) -> Episodes:
    with Evaluator(INFO, agent.spec.lanes, make_env=make_env, **{"workers": 1, **options}) as evaluator:
        return evaluator.run(agent, episodes, seed)


@pytest.fixture(autouse=True)
def _forget() -> None:
    Toy.started.clear()
    Toy.stepped.clear()


# ---- the numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4, 7, 100])
@pytest.mark.parametrize("kind", [Linear, Remembering])
def test_episodes_equal_a_plain_loop(kind: type[Agent], slots: int) -> None:
    """However many environments stand side by side, in one wave or many: the same returns and lengths, exactly."""
    agent = agent_of(kind, lanes=2)
    result = played(agent, 9, slots=slots)
    returns, lengths = plain_loop(agent, Toy, 9, 100)
    assert len(set(lengths[0])) > 4
    assert np.array_equal(result.lengths, lengths)
    # The products of the policy may round differently for one row and for many.
    np.testing.assert_allclose(result.returns, returns, rtol=1e-12, atol=1e-12)
    assert not np.allclose(returns[0], returns[1])


def test_discrete_actions() -> None:
    agent = agent_of(discrete=True)
    result = played(agent, 6, lambda: Toy(discrete=True), slots=5)
    returns, lengths = plain_loop(agent, lambda: Toy(discrete=True), 6, 100)
    assert np.array_equal(result.lengths, lengths)
    np.testing.assert_allclose(result.returns, returns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("episodes", "slots"), [(7, 6), (3, 100), (10, 3)])
def test_every_episode_is_played_once_and_no_step_is_wasted(episodes: int, slots: int) -> None:
    """Each lane plays each seed once, from its reset to its end; finished environments are left alone."""
    result = played(agent_of(lanes=3), episodes, slots=slots)
    assert result.seeds == list(range(100, 100 + episodes))
    assert Toy.started == dict.fromkeys(result.seeds, 3)
    assert Toy.stepped == {seed: int(result.lengths[:, k].sum()) for k, seed in enumerate(result.seeds)}
    assert result.returns.shape == result.lengths.shape == (3, episodes)


class Counting(Linear):
    """Counts its actions of all environments together."""

    calls = 0

    def select_action(self, obs: Tensor, state: Any = None) -> Tensor:
        type(self).calls += 1
        return super().select_action(obs, state)


@pytest.mark.parametrize(("episodes", "width"), [(7, 3), (5, 5), (6, 1)])
def test_an_environment_that_is_free_plays_its_next_episode(episodes: int, width: int) -> None:
    """Episode k in environment k mod width: there are as many steps as the busiest environment has."""
    Counting.calls = 0
    result = played(agent_of(Counting), episodes, slots=2 * width)
    steps = [result.lengths[:, place::width].sum(1).max() for place in range(width)]
    assert Counting.calls == max(steps)
    assert np.array_equal(result.lengths, played(agent_of(), episodes, slots=2 * episodes).lengths)


def test_seeds_choose_the_episodes() -> None:
    agent = agent_of()
    first, shifted = played(agent, 6, seed=100), played(agent, 6, seed=103)
    assert np.array_equal(first.returns[:, 3:], shifted.returns[:, :3])
    assert not np.isin(first.returns, played(agent, 6, seed=200).returns).any()


def test_scores_are_normalised_by_the_references() -> None:
    result = played(agent_of(), 4)
    np.testing.assert_allclose(result.normalized, 100 * (result.returns + 1) / 4)
    with Evaluator(DatasetInfo(), 2, 1, make_env=Toy) as evaluator:
        assert evaluator.run(agent_of(), 2).normalized is None


@pytest.mark.parametrize("kind", [Linear, Remembering])
def test_processes_change_nothing(kind: type[Agent]) -> None:
    agent = agent_of(kind)
    alone, shared = played(agent, 8, slots=6), played(agent, 8, slots=6, workers=2)
    assert np.array_equal(alone.returns, shared.returns)
    assert np.array_equal(alone.lengths, shared.lengths)
    assert not multiprocessing.active_children()


def test_one_evaluator_serves_many_evaluations() -> None:
    """A few episodes now and then, many at the end, few again: as if each had an Evaluator of its own."""
    agent = agent_of()
    expected = played(agent, 12)
    for workers in (1, 2):
        with Evaluator(INFO, 2, workers, make_env=Toy) as evaluator:
            for episodes in (2, 2, 12, 5):
                result = evaluator.run(agent, episodes, 100)
                assert np.array_equal(result.returns, expected.returns[:, :episodes])


def test_the_agent_that_trains_is_left_alone() -> None:
    agent = agent_of()
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    played(agent, 3)
    for key, value in agent.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])


def test_a_fresh_interpreter_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU in use processes can't be forked; what is sent to a fresh one must be picklable."""
    info = DatasetInfo(id="pendulum", env_id="Pendulum-v1", max_episode_steps=20)
    agent = BC(Spec(3, 1, (0, 1), action_low=-2.0, action_high=2.0), BCConfig(hidden=(8,)))
    results = []
    for workers in (1, 2):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        with Evaluator(info, 2, workers) as evaluator:
            results.append(evaluator.run(agent, 2))
    assert (results[0].lengths == 20).all()
    assert np.array_equal(results[0].returns, results[1].returns)


def test_hopper_equals_a_plain_loop() -> None:
    """Real physics: the same float64 policy in one plain Gymnasium environment."""
    pytest.importorskip("mujoco")
    info = DatasetInfo(id="hopper", env_id="Hopper-v5", ref_min=-20.27, ref_max=3234.3)
    agent = BC(Spec(11, 3, (0, 1, 2)), BCConfig(hidden=(16, 16)))
    with Evaluator(info, 3, workers=2, slots=6) as evaluator:
        result = evaluator.run(agent, 4, seed=1000)
    returns, lengths = plain_loop(agent, lambda: gymnasium.make("Hopper-v5"), 4, 1000)
    assert np.array_equal(result.lengths, lengths)
    np.testing.assert_allclose(result.returns, returns, rtol=1e-9)
    np.testing.assert_allclose(result.normalized, 100 * (returns + 20.27) / 3254.57, rtol=1e-9)


@pytest.mark.parametrize(
    ("robot", "limit"),
    [("Hopper-v5", None), ("HalfCheetah-v5", 20), pytest.param("Walker2d-v5", 50, marks=pytest.mark.slow)],
)
def test_robots_that_step_together_play_the_same_episodes(robot: str, limit: int | None) -> None:
    """To the bit, in one process or two, the falls and the time limits of Gymnasium's own environments."""
    pytest.importorskip("mujoco")
    info = DatasetInfo(id="robot", env_id=robot, max_episode_steps=limit)
    assert plain_robot(info) == (robot, limit or 1000)
    obs, action = (11, 3) if robot == "Hopper-v5" else (17, 6)
    agent = BC(Spec(obs, action, (0, 1)), BCConfig(hidden=(16,)))
    found = []
    for workers, together in ((1, False), (1, True), (2, True)):
        with Evaluator(info, 2, workers, slots=4) as evaluator:
            evaluator.robot = evaluator.robot if together else None
            found.append(evaluator.run(agent, 3, seed=9))
    for result in found[1:]:
        assert np.array_equal(result.returns, found[0].returns)
        assert np.array_equal(result.lengths, found[0].lengths)


def test_only_gymnasiums_own_robots_step_together() -> None:
    info = DatasetInfo(id="robot", env_id="Hopper-v5")
    changes = [{"env_kwargs": {"ctrl_cost_weight": 1.0}}, {"env_id": "Hopper-v4"}, {"env_id": None}]
    assert [plain_robot(dataclasses.replace(info, **change)) for change in changes] == [None, None, None]
    masked = {"partially_observed": {"kept": [0, 1], "flicker": 0.0}}
    assert plain_robot(dataclasses.replace(info, provenance=masked)) is None


def test_time_limits_end_episodes() -> None:
    """An environment without an end of its own, cut by the dataset's limit."""
    info = DatasetInfo(id="pendulum", env_id="Pendulum-v1", max_episode_steps=7)
    agent = BC(Spec(3, 1, (0,), action_low=-2.0, action_high=2.0), BCConfig(hidden=(8,)))
    with Evaluator(info, 1, 1) as evaluator:
        assert (evaluator.run(agent, 3).lengths == 7).all()


# ---- what goes wrong ------------------------------------------------------------------------------------------


class Failing(Toy):
    """Breaks in the first step, or already in its making, but not in the process that tries it out."""

    def __init__(self, home: int, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "init" and os.getpid() != home:
            raise RuntimeError("no licence for this robot")

    def step(self, action: Any) -> Any:
        if self.where == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the robot fell apart")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("step", "environment failed .RuntimeError: the robot fell apart.*eval.workers=1"),
        ("init", "environment failed .RuntimeError: no licence"),
        ("kill", "its process was killed"),
    ],
)
def test_a_broken_environment_is_named_and_leaves_no_process(where: str, message: str) -> None:
    home = os.getpid()
    with (
        Evaluator(INFO, 2, 2, make_env=lambda: Failing(home, where)) as evaluator,
        pytest.raises(OffrlError, match=message),
    ):
        evaluator.run(agent_of(), 4)
    assert not multiprocessing.active_children()


class Undefined(Toy):
    """Its reward, or an observation, is not a number."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part = part

    def step(self, action: Any) -> Any:
        found = list(super().step(action))
        found[self.part] = found[self.part] * np.nan
        return tuple(found)


@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_is_warned_of(part: int) -> None:
    with (
        Evaluator(INFO, 2, 1, make_env=lambda: Undefined(part)) as evaluator,
        pytest.warns(UserWarning, match="not finite"),
    ):
        evaluator.run(agent_of(), 2)


def started(evaluator: Evaluator, agent: Agent) -> list[Any]:
    """The processes of an Evaluator after a first run."""
    evaluator.run(agent, 4, 100)
    return multiprocessing.active_children()


def test_an_interrupted_evaluation_can_be_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between a request and its answer, the next evaluation must not read the old answer."""
    agent = agent_of()
    expected = played(agent, 4)
    with Evaluator(INFO, 2, 2, make_env=Toy) as evaluator:
        first = {child.pid for child in started(evaluator, agent)}
        with monkeypatch.context() as patch:
            patch.setattr(
                "offrl.evaluation.evaluator.EnvProcess.wait", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                evaluator.run(agent, 4, 100)
        assert not first & {child.pid for child in multiprocessing.active_children()}
        assert np.array_equal(evaluator.run(agent, 4, 100).returns, expected.returns)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("change", "said"), [({"obs_dim": 9}, "observations of 9"), ({"action_dim": 5}, "5 action numbers")]
)
def test_an_environment_of_another_robot_is_refused(change: dict[str, int], said: str) -> None:
    agent = agent_of()
    other = dataclasses.replace(agent.spec, obs_mean=None, obs_std=None, **change)
    with Evaluator(INFO, 2, 1, make_env=Toy) as evaluator:
        evaluator.check(agent.spec)
        with pytest.raises(OffrlError, match=said):
            evaluator.check(other)


def test_a_dataset_without_environment_is_refused_at_once() -> None:
    with pytest.raises(OffrlError, match=r"mine: .*environment.*eval"):
        Evaluator(DatasetInfo(id="mine"), 1)


def test_signals_to_the_group_leave_the_environments_running() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach all processes; only the training one decides what follows."""
    agent = agent_of()
    with Evaluator(INFO, 2, 2, make_env=Toy) as evaluator:
        children = started(evaluator, agent)
        expected = evaluator.run(agent, 4, 100)
        assert len(children) == 2
        for child in children:
            assert child.pid is not None
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(child.pid, number)
        time.sleep(0.2)
        assert np.array_equal(evaluator.run(agent, 4, 100).returns, expected.returns)


def test_processes_end_when_their_owner_is_killed() -> None:
    """No orphans, which would also keep the killed run's files open."""
    ours, theirs = multiprocessing.Pipe()

    def own() -> None:
        evaluator = Evaluator(INFO, 2, 2, make_env=Toy)
        evaluator.run(agent_of(), 4)
        theirs.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(60)

    owner = multiprocessing.get_context("fork").Process(target=own)
    owner.start()
    children = ours.recv()
    assert len(children) == 2
    assert all(map(is_alive, children))
    owner.kill()
    owner.join()
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    orphans = list(filter(is_alive, children))
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    assert not orphans


def test_an_evaluator_that_nobody_closed_does_not_keep_python_from_ending() -> None:
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
from test_evaluate import *
evaluator = Evaluator(INFO, 2, 2, make_env=Toy)
evaluator.run(agent_of(), 4)
print(*[child.pid for child in multiprocessing.active_children()])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    children = list(map(int, done.stdout.split()))
    assert len(children) == 2
    assert not any(map(is_alive, children))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("cls", [FlowBC, IDQL])
def test_policies_that_sample_repeat_their_episodes(cls: Any) -> None:
    """Also beside other lanes and among more environments: what is drawn depends on lane, episode and timestep alone."""
    info, found = DatasetInfo(id="x", action_low=-2.0, action_high=2.0), []
    for seeds, slots in (((4, 9), 4), ((9,), 3), ((4, 9), 20)):
        agent = cls(Spec(3, 1, seeds, action_low=-2.0, action_high=2.0), cls.Config(hidden=(8,)))
        with Evaluator(
            info, len(seeds), 1, slots, lambda: gymnasium.make("Pendulum-v1", max_episode_steps=20)
        ) as evaluator:
            found.append(evaluator.run(agent, 2, 5).returns[-1])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-9)
