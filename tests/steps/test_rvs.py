"""RvS-R's update against a plain restatement in float64; what acting conditions on; luck taken for skill in a bandit."""

from __future__ import annotations

import pytest
import torch
from plain import boxed, difference, make_store, sequential, to_go
from torch import nn

from offrl.agents.base import Batch, Spec
from offrl.agents.rvs import RvS, RvSConfig
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Taped


def make_agent(store: OfflineDataset, seeds: tuple[int, ...] = (0,), **settings: object) -> RvS:
    box = {"action_low": store.info.action_low, "action_high": store.info.action_high}
    spec = Spec(store.obs_dim, store.action_dim, seeds, discrete=bool(store.info.discrete), **box)
    agent = RvS(spec, RvSConfig(**{"hidden": (16, 16), **settings})).double()
    agent.setup(store)
    return agent


def rows(store: OfflineDataset, agent: RvS, index: list[int]) -> Batch:
    return agent.prepare(store.transitions(torch.tensor(index).expand(agent.spec.lanes, -1), agent.batch_fields))


@pytest.mark.parametrize("discrete", [None, 3])
@pytest.mark.parametrize("average", [True, False])
def test_updates_equal_a_plain_restatement(discrete: int | None, average: bool) -> None:
    store = make_store(discrete)
    agent = make_agent(store, average=average, return_scale=0.5, lr=1e-2)
    mlp = agent.actor if discrete else agent.actor.mlp
    net, log_std = sequential(mlp, 0), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    adam = torch.optim.Adam([*net.parameters(), log_std], lr=1e-2)
    for index in ([0, 6, 7, 12], [21, 3, 8, 9], [1, 2, 4, 20]):
        losses = []
        for row in index:
            episode = int(store.episode_of_row[row])
            t = row - int(store.offsets[episode])
            rest = to_go(store, row)
            goal = 0.5 * (rest / (11 - t) if average else rest)
            out = net(torch.cat([store.observations[row], goal.view(1)]))
            if discrete:
                losses.append(nn.functional.cross_entropy(out, store.actions[row]))
            else:
                losses.append(-torch.distributions.Normal(out, log_std.exp()).log_prob(store.actions[row]).sum())
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
        metrics = agent.update(rows(store, agent, index), 0)
        torch.testing.assert_close(metrics["action_loss"][0], torch.stack(losses).mean().detach(), rtol=0, atol=1e-10)
        assert difference(net, sequential(mlp, 0)) < 1e-10
        assert discrete or (log_std - agent.actor.log_std[0]).abs().max() < 1e-10
    assert discrete or log_std.abs().max() > 1e-2


@pytest.mark.parametrize("box", [(-1, 1), (-0.02, 0.03)], ids=str)
@pytest.mark.parametrize("average", [True, False])
def test_acting_asks_for_the_same_average_or_for_what_is_left(average: bool, box: tuple[float, float]) -> None:
    """Of actions, the narrower box cuts some off."""
    store = boxed(make_store(), box)
    agent = make_agent(store, seeds=(0, 1), average=average, target_return=[22.0, 33.0])
    state, obs = agent.initial_state(2), store.observations[:2].expand(2, -1, -1)
    assert agent.predicted_return(obs, state).tolist() == [[22, 22], [33, 33]]
    for t in range(3):
        goal = torch.tensor([2.0, 3.0]) if average else torch.tensor([22.0, 33.0]) - 5 * t
        expected = agent.actor(torch.cat([obs, goal.double().view(2, 1, 1).expand(2, 2, 1)], -1))[0].clamp(*box)
        assert (box == (-1, 1)) == (expected.abs() > 0.03).any()
        torch.testing.assert_close(agent.select_action(obs, state), expected)
        state = agent.update_state(state, expected, torch.full((2, 2), 5.0).double())


def test_the_default_target_is_the_best_return() -> None:
    store = make_store()
    agent = make_agent(store)
    assert agent.target == store.returns.max()
    assert agent.horizon == 11


def make_bandit(p: float, first: float, rows: int = 4000) -> OfflineDataset:
    """One step, two arms that pay 1 with probability p and 1 - p; the first is pulled with probability `first`.

    Counts are the expected ones, so that the data has no luck of its own.
    """
    shares = [first * p, first * (1 - p), (1 - first) * (1 - p), (1 - first) * p]
    counts = torch.tensor([round(rows * share) for share in shares])
    kind = torch.arange(4).repeat_interleave(counts)
    n = len(kind)
    obs = torch.ones(n, 1)
    info = DatasetInfo(discrete=2)
    return OfflineDataset(obs, kind // 2, (kind % 2 == 0).float(), obs, torch.ones(n), torch.arange(n + 1), info)


def test_luck_passes_for_skill_in_a_bandit() -> None:
    """The policy learns P(a | R = 1): 1/2 where the behaviour mirrors the arms, and a preference for the worse one if not."""
    for p, first, wanted in ((0.1, 0.9, 0.5), (0.3, 0.7, 0.5), (0.3, 0.95, 0.1094)):
        store = make_bandit(p, first)
        spec = Spec(1, 2, (0, 1, 2), discrete=True)
        agent = RvS(spec, RvSConfig(hidden=(16,), lr=1e-2))
        agent.setup(store)
        Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 256, None, agent.batch_fields)).run(0, 300)
        goal = agent.target.view(3, 1, 1)
        share = agent.actor(torch.cat([torch.ones(3, 1, 1), goal], -1)).softmax(-1)[:, 0, 1]
        assert (share - wanted).abs().max() < 0.06  # a batch holds some 50 rewarded rows; Adam averages a few batches


@pytest.mark.parametrize("discrete", [None, 3])
def test_the_authors_initial_weights(discrete: int | None) -> None:
    """Rows (or columns) of sqrt(2) times an orthogonal matrix, 0.01 times one in the last layer, and no biases."""
    agent = make_agent(make_store(discrete), seeds=(0, 1), orthogonal_init=True)
    mlp = agent.actor if discrete else agent.actor.mlp
    for weight, gain in zip(mlp.weights, (2**0.5, 2**0.5, 0.01)):
        flat = weight if weight.shape[1] <= weight.shape[2] else weight.mT
        expected = gain**2 * torch.eye(flat.shape[1], dtype=weight.dtype).expand(2, -1, -1)
        # Made in float32.
        torch.testing.assert_close(flat @ flat.mT, expected, rtol=0, atol=1e-5 * gain**2)
    assert not any(bias.any() for bias in mlp.biases)
