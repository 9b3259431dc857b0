"""BC's update against a plain restatement, in float64, for continuous and discrete actions."""

from __future__ import annotations

import pytest
import torch
from conftest import make_toy
from plain import BOXES, Bounds, Box, boxed, difference, sequential
from torch import nn

from offrl.agents.base import Spec
from offrl.agents.bc import BC, BCConfig
from offrl.data.batch import Batch


@pytest.mark.parametrize("box", [(-1, 1), *BOXES])
def test_updates_equal_plain_regression(box: Bounds) -> None:
    dataset = boxed(make_toy(256, dtype=torch.float64), box)
    agent = BC(Spec(3, 2, (4,), action_low=box[0], action_high=box[1]), BCConfig(hidden=(16, 16))).double()
    squash = Box(agent.spec).squash
    plain = sequential(agent.actor.mlp, 0)
    adam = torch.optim.Adam(plain.parameters(), lr=3e-4)
    for step in range(100):
        batch = dataset.transitions(torch.arange(step, step + 64).unsqueeze(0))
        loss = nn.functional.mse_loss(squash(plain(batch.obs[0])), batch.action[0])
        adam.zero_grad()
        loss.backward()
        adam.step()
        metrics = agent.update(batch, 0)
        torch.testing.assert_close(metrics["bc_loss"][0], loss.detach(), rtol=1e-10, atol=0)
        assert difference(sequential(agent.actor.mlp, 0), plain) < 1e-10


def test_discrete_actions_by_cross_entropy() -> None:
    """Cloned probabilities approach the data's frequencies 0.7, 0.2, 0.1."""
    action = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 4096, True, generator=torch.Generator().manual_seed(0))
    obs = torch.ones(1, 4096, 2)
    batch = Batch(
        obs, action.unsqueeze(0), torch.zeros(1, 4096), obs, torch.ones(1, 4096), torch.arange(4096).unsqueeze(0)
    )
    two = BC(Spec(2, 3, (0, 1), discrete=True), BCConfig(hidden=(16,)))
    twice = batch.map(lambda tensor: tensor.expand(2, *tensor.shape[1:]))
    each = [-float(two.log_prob(twice.obs, twice.action)[lane].detach().mean()) for lane in (0, 1)]
    assert two.bc_loss(twice).tolist() == pytest.approx(each)
    agent = BC(Spec(2, 3, (0,), discrete=True), BCConfig(hidden=(16,), lr=1e-2))
    for _ in range(300):
        agent.update(batch, 0)
    every = torch.arange(3).unsqueeze(0)
    probability = agent.log_prob(obs[:, :3], every).exp()[0]
    frequency = torch.bincount(action).double() / 4096
    torch.testing.assert_close(probability.double(), frequency, rtol=0, atol=5e-3)
    assert agent.select_action(obs[:, :1]).item() == 0


def test_cloning_remembers_nothing_unless_it_tosses_coins() -> None:
    """So that it can be asked state by state, as fitted Q evaluation does."""
    spec, discrete = Spec(3, 2, (0, 1)), Spec(3, 2, (0, 1), discrete=True)
    assert BC(spec).initial_state(4) is None
    assert BC(discrete).initial_state(4) is None
    drawn = BC(discrete, BCConfig(sample_actions=True))
    obs, first = torch.randn(2, 64, 3), drawn.initial_state(64)
    second = drawn.update_state(first, drawn.select_action(obs, first), torch.zeros(2, 64))
    assert not torch.equal(drawn.select_action(obs, first), drawn.select_action(obs, second))
