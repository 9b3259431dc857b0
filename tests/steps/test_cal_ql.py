"""Cal-QL's update against the plain restatement of CQL's with CORL's bound in it, in float64, and its returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, batches, boxed, drawn, make_store, spec_of
from test_cql import ANTMAZE, Plain
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.agents.cal_ql import CalQL, CalQLConfig, discounted_returns
from offrl.agents.cql import CQL, CQLConfig
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.data.lane_tasks import LaneTasks
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.training.runs import make_agent
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom


class Bounded(Plain):
    """CORL's: values of the policy's actions, in the conservative term alone, are at least the rows' returns."""

    returns: Tensor

    def q(self, critic: nn.Sequential, s: Tensor, a: Tensor) -> Tensor:
        value = super().q(critic, s, a)
        if a.ndim == 2 or critic not in self.critics:
            return value
        chance = self.random.uniform("cql/uniform", (len(s), self.cfg.actions, 2))[0] * 2 - 1
        return value if torch.equal(a, chance) else torch.maximum(value, self.returns.unsqueeze(1))


def toy(box: Bounds = (-1, 1)) -> OfflineDataset:
    """With rewards around 5, so that returns exceed the values of fresh critics."""
    return boxed(make_toy(512, bias=0.2, dtype=torch.float64), box).with_rewards(1.0, 5.0)


def plain_returns(store: OfflineDataset, gamma: float) -> Tensor:
    """By hand, from each episode's end, with a new start at terminations."""
    total = torch.zeros(len(store), dtype=torch.float64)
    for e in range(store.episodes):
        after = float(store.tail_rewards[e])
        for row in reversed(range(int(store.offsets[e]), int(store.offsets[e + 1]))):
            after = float(store.rewards[row]) + gamma * after * (1 - float(store.terminations[row]))
            total[row] = after
    return total


def corls_returns(store: OfflineDataset, gamma: float, failure: float) -> list[float]:
    """CORL's `get_return_to_go` for sparse rewards, whose failures are known by the last row's reward; without tails."""
    total: list[float] = []
    rewards: list[float] = []
    last = set((store.offsets[1:] - 1).tolist())
    for row, (r, d) in enumerate(zip(store.rewards.tolist(), store.terminations.tolist())):
        rewards.append(r)
        if d or row in last:
            returns, after = [failure / (1 - gamma)] * len(rewards), 0.0
            for i in reversed(range(len(rewards))):
                after = rewards[i] + gamma * after
                returns[i] = returns[i] if r == failure else after
            total += returns
            rewards = []
    return total


def goal_reaching(episodes: int = 6, length: int = 20, seed: int = 0) -> OfflineDataset:
    """As AntMaze with rewards 10 r - 5: at the goal a row has 5 and mask 0, and the episode goes on, now and then elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    n = episodes * length
    row = torch.arange(n)
    goal = (row % length >= 8) & (torch.rand(n, generator=generator) < 0.5) & (row // length != 1)
    obs, action = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    reward = torch.where(goal, 5.0, -5.0).double()
    tail = torch.arange(episodes) < 3
    return OfflineDataset(
        obs, action.tanh(), reward, obs.roll(-1, 0), goal.double(), torch.arange(0, n + 1, length),
        tail_rewards=torch.where(tail, -5.0, 0.0).double(), has_tail=tail,
    )  # fmt: skip


def run(agent: CQL, store: OfflineDataset, updates: int) -> None:
    agent.setup(store)
    Eager(agent, BatchLoader([(store, Uniform(store), 1.0)], 32)).run(0, updates)


@pytest.mark.parametrize("settings", [{}, ANTMAZE], ids=["locomotion", "antmaze"])
@pytest.mark.parametrize(("updates", "box"), [(1, (-1, 1)), (3, (-1, 1)), *((2, box) for box in BOXES)])
def test_updates_equal_corls(updates: int, box: Bounds, settings: dict[str, Any]) -> None:
    """Same weights, batches and noise; the bound matters, since the unbounded update is elsewhere."""
    store = toy(box)
    config = CalQLConfig(**{"hidden": (24, 16), "actions": 3, **settings})
    agent = CalQL(spec_of(store, (11,)), config).double()
    free = CalQL(spec_of(store, (11,)), replace(config, calibrate=False)).double()
    returns, random = plain_returns(store, 0.99), LaneRandom((11,))
    plain = Bounded(agent, random)
    rows = [index for _, index in drawn(store, LaneRandom((11,)), updates, 32)]
    for index, (_, batch) in zip(rows, batches(store, random, updates, 32)):
        plain.returns = returns[index]
        plain.step(*batch)
    before = plain.distance(agent)
    run(agent, store, updates)
    run(free, store, updates)
    assert plain.distance(agent) < 1e-10 < before
    assert plain.distance(free) > 1e-6


def test_returns_are_discounted_sums_to_the_episodes_end() -> None:
    store = make_store()
    both = discounted_returns(store, torch.tensor([[0.9], [0.5]], dtype=torch.float64))
    for mine, gamma in zip(both, (0.9, 0.5)):
        torch.testing.assert_close(mine, plain_returns(store, gamma), rtol=1e-12, atol=1e-12)


def test_returns_end_at_terminations_within_an_episode() -> None:
    """Behind a goal the episode goes on, and nothing of that counts: also no tail behind a last row that terminates."""
    store = goal_reaching()
    last = store.offsets[1:] - 1
    inside = store.terminations > 0
    inside[last] = False
    assert inside.any()
    assert (store.has_tail & (store.terminations[last] > 0)).any()
    assert (store.has_tail & (store.terminations[last] == 0)).any()
    both = discounted_returns(store, torch.tensor([[0.9], [1.0]], dtype=torch.float64))
    for mine, gamma in zip(both, (0.9, 1.0)):
        torch.testing.assert_close(mine, plain_returns(store, gamma), rtol=1e-12, atol=1e-12)
    assert both.max() == 5.0  # the most that any value can be: the goal's own reward


def test_sparse_returns_are_corls_for_each_trajectory_between_ends() -> None:
    """Rows behind an episode's last success are a failure for ever; those up to it have their sum."""
    store = goal_reaching()
    agent = CalQL(spec_of(store, (0,)), CalQLConfig(hidden=(8,), sparse_rewards=True)).double()
    store.has_tail[:], store.tail_rewards[:] = False, 0.0  # CORL's reader drops them
    agent.setup(store)
    expected = torch.tensor(corls_returns(store, 0.99, -5.0), dtype=torch.float64)
    torch.testing.assert_close(agent.dataset_index[0], expected, rtol=1e-12, atol=1e-12)
    first = store.rewards[:20]
    assert first.max() == 5.0
    assert (expected[:20] > -499).any()
    assert (expected[20:40] < -499).all()


def test_a_tail_s_success_is_the_trajectory_s() -> None:
    store = goal_reaching()
    store.terminations[:], store.rewards[:], store.tail_rewards[:] = 0.0, -5.0, -5.0
    store.tail_rewards[0] = 5.0
    agent = CalQL(spec_of(store, (0,)), CalQLConfig(hidden=(8,), sparse_rewards=True)).double()
    agent.setup(store)
    torch.testing.assert_close(agent.dataset_index[0, :20], plain_returns(store, 0.99)[:20], rtol=1e-12, atol=1e-12)
    assert (agent.dataset_index[0, 20:] < -499).all()


@pytest.mark.parametrize("discount", [1.0, [0.99, 1.0]])
def test_failures_for_ever_need_a_discount(discount: Any) -> None:
    settings = {"_target_": "offrl.agents.cal_ql.CalQL", "hidden": [8], "discount": discount}
    with pytest.raises(OffrlError, match=r"agent\.discount=1 should be below 1 with agent\.sparse_rewards=true"):
        make_agent({**settings, "sparse_rewards": True}, Spec(3, 2, (0, 1)))
    make_agent(settings, Spec(3, 2, (0, 1)))
    make_agent({**settings, "sparse_rewards": True, "calibrate": False}, Spec(3, 2, (0, 1)))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_task_for_each_lane_is_an_agent_of_each_task(sparse: bool) -> None:
    """Returns and updates of lanes with rewards and terminations of their own are those of separate agents."""
    one, two = goal_reaching(seed=0), goal_reaching(seed=1)
    two = OfflineDataset(**{**one.tensors(), "rewards": two.rewards, "terminations": two.terminations})
    columns = (torch.stack([getattr(one, name), getattr(two, name)]) for name in ("rewards", "terminations"))
    shared = LaneTasks(one, *columns, DatasetInfo(id="cube-single-play-v0", provenance={"lane_tasks": [1, 2]}))
    config = CalQLConfig(hidden=(8,), actions=2, sparse_rewards=sparse)
    together = CalQL(spec_of(one, (3, 4)), config).double()
    run(together, shared, 4)
    assert together.dataset_index.shape == (2, len(one))
    assert not torch.equal(*together.dataset_index)
    for lane, (store, seed) in enumerate(((one, 3), (two, 4))):
        alone = CalQL(spec_of(one, (seed,)), config).double()
        run(alone, store, 4)
        assert torch.equal(together.dataset_index[lane], alone.dataset_index[0])
        for (key, many), single in zip(together.state_dict().items(), alone.state_dict().values()):
            if many.shape != single.shape:
                torch.testing.assert_close(many[lane], single[0], rtol=0, atol=1e-10, msg=key)


def test_an_episode_without_success_returns_the_constant() -> None:
    """Rewards -5 and 5 of AntMaze: a failure is worth -500 for ever, a success its own sum."""
    store = toy()
    store.rewards[:] = -5.0
    store.rewards[7] = 5.0  # the second episode's last row
    agent = CalQL(spec_of(store), CalQLConfig(hidden=(8,), sparse_rewards=True)).double()
    agent.setup(store)
    table = agent.dataset_index[0]
    assert torch.allclose(table[:4], torch.full((4,), -500.0, dtype=torch.float64))
    torch.testing.assert_close(table[4:8], plain_returns(store, 0.99)[4:8])


def test_bounded_values_are_at_least_the_returns_and_uniform_ones_are_free() -> None:
    store = toy()
    agent = CalQL(spec_of(store, (0, 1)), CalQLConfig(hidden=(8,), actions=3)).double()
    agent.setup(store)
    index = torch.arange(40).expand(2, 40).clone()
    index[:, 30:] = -1  # rows of no dataset
    batch = store.transitions(index.clamp(min=0)).replace(index=index)
    q = 50 * torch.randn(2, 2, 40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounded = agent.lower_bounded(q, batch)
    bound = plain_returns(store, 0.99)[:30].view(1, 1, 30, 1)
    torch.testing.assert_close(bounded[..., :30, 3:], torch.maximum(q[..., :30, 3:], bound), rtol=1e-12, atol=1e-12)
    assert torch.equal(bounded[..., :3], q[..., :3])
    assert torch.equal(bounded[..., 30:, :], q[..., 30:, :])


def test_without_a_bound_it_is_cql() -> None:
    """Bitwise: with calibration off, and with returns of minus infinity."""
    store, settings = toy(), {"hidden": (24, 16), "actions": 3}
    cql = CQL(spec_of(store), CQLConfig(**settings)).double()  # type: ignore[arg-type]
    off = CalQL(spec_of(store), CalQLConfig(**settings, calibrate=False)).double()  # type: ignore[arg-type]
    low = CalQL(spec_of(store), CalQLConfig(**settings)).double()  # type: ignore[arg-type]
    low.setup = lambda dataset: None  # type: ignore[method-assign]
    low.dataset_index = torch.full((1, len(store)), -torch.inf, dtype=torch.float64)
    for agent in (cql, off, low):
        run(agent, store, 5)
    for agent in (off, low):
        assert all(torch.equal(a, b) for a, b in zip(cql.state_dict().values(), agent.state_dict().values()))
