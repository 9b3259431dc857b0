"""The probe of states against cases whose answer is known, and its encodings against those of acting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offrl.agents.base import Spec
from offrl.envs.hidden_grid import hidden_grid
from offrl.evaluation.linear_probe import accuracy, encodings, probe_states, walk, within
from offrl.training.runs import make_agent

GRU = {"encoder": "gru", "length": 2, "hidden": 8, "latent": 3, "model_hidden": 8}
SETTINGS = {"_target_": "offrl.agents.discrete_cql.DiscreteCQL", "hidden": [8]}


@pytest.mark.slow
def test_the_probe_reads_what_is_there_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.randint(5, (2000,), generator=g)
    train = torch.arange(2000) % 2 == 0
    noise = torch.randn(2000, 6, generator=g)
    told = torch.cat([nn.functional.one_hot(label, 5), noise], -1)
    assert accuracy(told, label, train) == 1
    assert accuracy(label.float().unsqueeze(1) + 0.05 * noise[:, :1], label, train) > 0.98  # in order along a line
    assert abs(accuracy(noise, label, train) - 0.2) < 0.05  # 1000 rows: a standard error of 0.013


def test_the_variance_within_states() -> None:
    g = torch.Generator().manual_seed(1)
    label = torch.arange(4).repeat(5000)
    means = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])  # of variance 5
    assert within(means[label], label) == 0
    assert abs(within(means[label] + torch.randn(20_000, 1, generator=g), label) - 1 / 6) < 0.005
    assert within(torch.randn(20_000, 1, generator=g), label) > 0.99


@pytest.mark.slow
def test_encodings_are_those_of_acting() -> None:
    task = hidden_grid("cue")
    walks = walk(task, 3)
    spec = Spec(12, 4, (0, 1), torch.full((12,), 0.2), torch.full((12,), 0.5), discrete=True)
    agent = make_agent(SETTINGS, spec, GRU)
    found = encodings(agent, walks)
    state = agent.init(3)
    for t in range(5):
        obs = walks.obs[:, t].expand(2, -1, -1)
        agent.select_action(obs, state)
        torch.testing.assert_close(agent.encoder.read(state.latest), found[:, :, t], rtol=0, atol=1e-5)
        state = agent.update_state(state, walks.action[:, t].expand(2, -1), torch.zeros(2, 3))
    assert (walks.state[:, 0] == 0).all()
    assert set(walks.state[:, 1].tolist()) <= {1, 2}  # the lobbies
    assert (task.successor[walks.state[:, 3], walks.action[:, 3], 0] == walks.state[:, 4].numpy())[
        walks.valid[:, 4]
    ].all()
    probed = probe_states(agent, task, 20)
    assert len(probed.accuracy) == len(probed.within) == 2
    assert probed.observation < 0.5  # cells look alike, and the cue is told once
