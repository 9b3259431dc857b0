"""The hidden grid as a toy of stitching: what a policy of the true state reaches, and what the loss does beside a GRU.

That histories fail to stitch, or do, is a question for `benchmarks/tables/histories.py`; what has to hold is asserted here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offrl.agents.base import Spec
from offrl.agents.discrete_cql import DiscreteCQL, DiscreteCQLConfig
from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.datasets import load
from offrl.envs import tabular_solver as exact
from offrl.envs.hidden_grid import CELLS, hidden_grid
from offrl.forge import hidden_grid as behaviours
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.training.runs import make_agent


def seen_by_an_oracle(episodes: int = 300) -> OfflineDataset:
    """Episodes of the cue's behaviour with the state for an observation: what was drawn (without the mode), and the cell."""
    task, behaviour, rng = hidden_grid("cue", modes=3), behaviours.behaviour("cue"), np.random.default_rng(0)
    rows, ends = [], [0]
    for _ in range(episodes):
        state, noise = 0, int(rng.integers(6))
        for _ in range(task.limit):
            action = int(rng.choice(4, p=behaviour[state]))
            place = (state, action, noise)
            after = int(task.successor[place])
            rows.append((state, action, float(task.reward[place]), after, float(task.terminal[place])))
            state = after
            if rows[-1][-1]:
                break
        ends.append(len(rows))
    columns = [torch.tensor(column) for column in zip(*rows)]
    number = torch.tensor([modeless(state) for state in range(task.states)])
    looks = torch.eye(int(number.max()) + 1)[number]
    obs, after = looks[columns[0]], looks[columns[3]]
    info = DatasetInfo(id="oracle", discrete=4)
    return OfflineDataset(obs, columns[1], 0.01 * columns[2], after, columns[4], torch.tensor(ends), info)


def modeless(state: int) -> int:
    """Number of a state of the task with three modes in the task with one."""
    if state < 7:
        return 0 if state == 0 else 1 + (state - 1) // 3
    draw, cell = divmod(state - 7, len(CELLS))
    return 3 + draw // 3 * len(CELLS) + cell


@pytest.mark.slow
def test_a_policy_of_the_state_joins_what_no_episode_has() -> None:
    dataset, task = seen_by_an_oracle(), hidden_grid("cue")
    cfg = DiscreteCQLConfig(cql_alpha=0.005, critic_lr=0.02, tau=0.05, hidden=(), normalize_obs=False)
    agent = DiscreteCQL(Spec(dataset.obs_dim, 4, discrete=True), cfg)
    engine = Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 256))
    engine.run(0, 2000)
    agent.critic_optimizer.lr = 2e-3  # neighbouring cells differ by 0.01, less than what the first rate makes of noise
    engine.run(2000, 1000)
    policy = np.eye(4)[agent.act(torch.eye(task.states).unsqueeze(0))[0].numpy()]
    assert exact.value(task, policy) > 0.9 * exact.optimum(task)


def distances(weight: float, updates: int = 400) -> list[float]:
    """The bisimulation loss of a GRU's encodings over the updates, minimised with a weight or only measured."""
    dataset = load("forge/grid/cue-n500-v0", size=2000, progress=False).with_rewards(0.01)
    history = {
        "encoder": "gru",
        "length": 6,
        "burn_in": 2,
        "hidden": 32,
        "latent": 8,
        "lr": 1e-3,
        "pairs": "same_action",
    }
    spec = Spec(dataset.obs_dim, 4, (0,), *dataset.observation_statistics(), discrete=True)
    settings = {"_target_": "offrl.agents.discrete_cql.DiscreteCQL", "hidden": [32]}
    agent = make_agent(settings, spec, history | {"bisimulation": weight, "warmup": 50, "model_hidden": 32})
    agent.setup(dataset)
    engine = Eager(
        agent,
        BatchLoader([(dataset, Uniform(dataset), 1.0)], 16, agent.window, agent.batch_fields, agent.window_before),
    )
    return [engine.run(step, 10)["bisimulation"].item() for step in range(0, updates, 10)]


@pytest.mark.slow
def test_the_loss_ends_lower_where_it_is_minimised() -> None:
    measured, minimised = distances(0.0), distances(1.0)
    assert np.isfinite([*measured, *minimised]).all()
    assert np.mean(minimised[-10:]) < 0.5 * np.mean(measured[-10:])
