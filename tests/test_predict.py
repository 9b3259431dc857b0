"""`Agent.predict` on arrays, its state over episodes, the choice of a lane, and `Agent.lane`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_toy

from offrl.agents.base import Agent, Spec
from offrl.agents.bc import BC, BCConfig
from offrl.agents.dt import DT, DTConfig
from offrl.agents.flow_bc import FlowBC, FlowBCConfig
from offrl.agents.rvs import RvS, RvSConfig
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.training.runs import load_agent
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError

OBS = np.random.default_rng(0).normal(size=(4, 3))


def bc(lanes: int = 2, **spec: Any) -> BC:
    statistics = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.1, 1.0])
    return BC(Spec(3, 2, tuple(range(lanes)), *statistics, **spec), BCConfig(hidden=(8,)))


def dt(lanes: int = 2) -> DT:
    return DT(Spec(3, 2, tuple(range(lanes))), DTConfig(context=3, embed=8, layers=1, target_return=5.0)).eval()


def test_one_observation_and_a_batch() -> None:
    """By hand: pi(s) = tanh(W2 relu(W1 z + b1) + b2), z = (s - mean) / (std + 1e-3), in float64."""
    agent = bc()
    batch, state = agent.predict(OBS, lane=1)
    w1, w2 = (w[1].double().detach().numpy() for w in agent.actor.mlp.weights)
    b1, b2 = (b[1].double().detach().numpy() for b in agent.actor.mlp.biases)
    z = (OBS - [1.0, -2.0, 0.5]) / (np.array([2.0, 0.1, 1.0]) + 1e-3)
    wanted = np.tanh(np.maximum(z @ w1.T + b1, 0) @ w2.T + b2)
    np.testing.assert_allclose(batch, wanted, rtol=0, atol=1e-5)  # float32
    assert state is None
    assert batch.shape == (4, 2)
    single, _ = agent.predict(list(OBS[2]), lane=1)
    assert single.shape == (2,)
    tensor, _ = agent.predict(torch.tensor(OBS, requires_grad=True), lane=1)
    np.testing.assert_array_equal(tensor, batch)
    np.testing.assert_allclose(single, wanted[2], rtol=0, atol=1e-5)


def test_integers_are_returned_where_actions_are_discrete() -> None:
    agent = BC(Spec(3, 4, (0,), discrete=True), BCConfig(hidden=(8,)))
    batch, _ = agent.predict(OBS)
    single, _ = agent.predict(OBS[1])
    assert batch.dtype == np.int64
    assert batch.shape == (4,)
    assert single == batch[1]


def test_episodes_of_a_batch_restart_apart() -> None:
    """Three episodes side by side, of which one restarts, equal each of them alone; the history and the target matter."""
    agent = dt()
    rewards = np.random.default_rng(1).normal(size=(6, 3))
    obs = np.random.default_rng(2).normal(size=(6, 3, 3))
    starts = np.zeros((6, 3), dtype=bool)
    starts[4, 1] = True
    together, state = [], None
    for t in range(6):
        action, state = agent.predict(obs[t], state, starts[t], lane=0, reward=rewards[t - 1] if t else None)
        together.append(action)
    for row in range(3):
        state = None
        for t in range(6):
            state = None if starts[t, row] else state
            alone, state = agent.predict(obs[t, row], state, lane=0, reward=rewards[t - 1, row] if state else None)
            np.testing.assert_allclose(together[t][row], alone, rtol=0, atol=1e-6)
    fresh, _ = agent.predict(obs[5, 0], lane=0)
    assert np.abs(fresh - together[5][0]).max() > 1e-4


def test_a_state_can_be_used_twice() -> None:
    agent = dt(1)
    _, state = agent.predict(OBS[0])
    first, _ = agent.predict(OBS[1], state, reward=1.0)
    second, _ = agent.predict(OBS[1], state, reward=1.0)
    assert np.array_equal(first, second)
    other, _ = agent.predict(OBS[1], state, reward=-50.0)
    assert not np.array_equal(first, other)


def test_an_average_return_needs_no_rewards_and_a_return_to_go_does() -> None:
    for average in (True, False):
        agent = RvS(Spec(3, 2), RvSConfig(hidden=(8,), average=average, target_return=5.0))
        first, state = agent.predict(OBS)
        if average:
            again, _ = agent.predict(OBS, state)
            assert np.array_equal(first, again)
        else:
            with pytest.raises(OffrlError, match="RvS conditions on the rewards so far"):
                agent.predict(OBS, state)


def test_sampling_methods_sample_unless_asked_not_to() -> None:
    agent = FlowBC(Spec(3, 2), FlowBCConfig(flow_steps=2, hidden=(8,)))
    sampled, state = agent.predict(np.repeat(OBS[:1], 500, 0))
    assert np.unique(sampled[:, 0]).size > 300  # some are clipped to the bounds
    again, _ = agent.predict(np.repeat(OBS[:1], 500, 0), state)
    assert not np.array_equal(sampled, again)
    fixed, _ = agent.predict(np.repeat(OBS[:1], 500, 0), deterministic=True)
    assert np.ptp(fixed, axis=0).max() < 1e-6


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: bc().predict(np.zeros(4), lane=0), r"one observation \[3\] or a batch \[n, 3\], not \[4\]"),
        (lambda: bc().predict(np.zeros((2, 2, 3)), lane=0), r"not \[2, 2, 3\]; flatten"),
        (lambda: bc().predict({"x": 1}, lane=0), "of numbers"),
        (lambda: bc().predict(np.zeros((0, 3)), lane=0), r"not \[0, 3\]"),
        (lambda: bc().predict((OBS, {}), lane=0), r"obs, info = env.reset\(\)"),
        (lambda: bc().predict([[0.0, np.nan, 1.0]], lane=0), "holds nan; repair it"),
        (lambda: bc().predict(OBS, lane=2), "lanes 0 to 1"),
        (lambda: bc().predict(OBS, lane="best"), "lane best: the agent has lanes 0 to 1"),
        (lambda: load_agent(bc()), "the folder of a run, such as result.folder"),
        (lambda: bc().predict(OBS), "2 lanes and no score of them; name one: lane=0 to lane=1"),
        (lambda: bc().lane(-1), "lanes 0 to 1"),
        (lambda: bc().select_action(torch.zeros(3)), r"\[lanes, n, obs\] = \[2, n, 3\], not shape \[3\]"),
        (lambda: bc().select_action(torch.zeros(1, 5, 3)), r"not shape \[1, 5, 3\]"),
        (lambda: bc().select_action(np.zeros((2, 5, 3))), "not ndarray; agent.predict"),
        (lambda: dt().select_action(torch.zeros(5, 3)), r"not shape \[5, 3\]"),
        (lambda: dt(1).predict(OBS, dt(1).predict(OBS)[1]), "reward of the action before"),
        (lambda: dt(1).predict(OBS[:2], dt(1).predict(OBS)[1], reward=0.0), "2 observations and a state of 4"),
        (lambda: dt(1).predict(OBS, dt(1).predict(OBS)[1], reward=np.zeros(3)), r"reward has shape \[3\] for 4"),
        (lambda: dt().predict(OBS, dt().predict(OBS, lane=1)[1], lane=0, reward=0.0), "of lane 1, not of lane 0"),
    ],
)
def test_bad_input_gets_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(OffrlError, match=sentence):
        call()


def test_the_best_lane_is_that_of_the_result(toy_file: Path, tmp_path: Path) -> None:
    quiet = {"progress": False, "eval": {"every": 0, "final_episodes": 0}, "out": str(tmp_path), "lanes": 3}
    agent = {"_target_": "offrl.agents.bc.BC", "hidden": [8]}
    folder = train({"agent": agent, "dataset": str(toy_file), "updates": 4, "batch_size": 8, **quiet}).folder
    assert load_agent(folder).lane_scores is None
    result = folder / "result.json"
    for scores, best in (("[1.0, null, 7.0]", 2), ("[3.0, 2.0, null]", 0)):
        result.write_text(f'{{"step": 4, "returns": [5.0, 9.0, 1.0], "scores": {scores}}}')
        loaded = load_agent(folder)
        assert np.array_equal(loaded.predict(OBS)[0], loaded.predict(OBS, lane=best)[0])
        assert not np.array_equal(loaded.predict(OBS)[0], loaded.predict(OBS, lane=1)[0])
    result.write_text('{"step": 3, "returns": [5.0, 9.0, 1.0]}')  # of an earlier update: no score of these policies
    assert load_agent(folder).lane_scores is None


def test_one_lane_learns_on_as_it_did() -> None:
    """With a coefficient of its own, from the same seed and update number, in float64: only rounding differs."""
    store = make_toy(512, dtype=torch.float64)
    spec = Spec(3, 2, (4, 5), *store.observation_statistics())
    both: Agent = TD3BC(spec, TD3BCConfig(hidden=(16,), alpha=[0.5, 2.5])).double()  # type: ignore[arg-type]

    def learn(agent: Agent, start: int) -> None:
        Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 32)).run(start, 6)

    learn(both, 0)
    one = both.lane(1)
    learn(both, 6)
    learn(one, 6)
    assert one.spec.seeds == (5,)
    for (name, many), mine in zip(both.state_dict().items(), one.state_dict().values()):
        wanted = many if many.shape == mine.shape else many[1:]
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10, msg=name)
