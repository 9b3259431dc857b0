"""A tail, an episode's last step whose successor is unknown, is no row to learn from; but it counts where steps are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from plain import make_store

from offrl.agents.base import Spec
from offrl.agents.doc import DoC
from offrl.agents.dt import DT
from offrl.agents.esper import ESPER
from offrl.agents.rvs import RvS
from offrl.agents.vae_bc import VAEBC
from offrl.data import ReadOptions, from_arrays
from offrl.data.dataset import OfflineDataset

SMALL: dict[Any, dict[str, Any]] = {
    RvS: {"hidden": (8,)},
    VAEBC: {"hidden": (8,), "suffix": 4},
    DoC: {"hidden": (8,), "suffix": 4},
    ESPER: {"label_hidden": (8,), "suffix": 4, "context": 2, "embed": 8, "layers": 1},
    DT: {"context": 2, "embed": 8, "layers": 1},
}


def cut_by_the_limit(semantics: Any, stored: bool) -> OfflineDataset:
    """Four episodes of twelve steps that pay 1 each and end by the time limit."""
    n = 48
    data = {
        "observations": np.arange(n, dtype=np.float32).reshape(n, 1),
        "actions": np.zeros((n, 1), np.float32),
        "rewards": np.ones(n, np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(1, n + 1) % 12 == 0,
    }
    if stored:
        ends = data["timeouts"][:, None]  # the true successor there is not the next episode's first observation
        data["next_observations"] = data["observations"] + np.where(ends, 0.5, 1).astype(np.float32)
    return from_arrays(data, options=ReadOptions(semantics))


def dataset_index(cls: Any, store: OfflineDataset, **settings: Any) -> Any:
    agent = cls(Spec(store.obs_dim, store.action_dim), cls.Config(**SMALL[cls], **settings))
    agent.setup(store)
    return agent


READINGS = [("exact", True), ("exact", False), ("d4rl", True), ("d4rl", False)]


@pytest.mark.parametrize(("semantics", "stored"), READINGS)
def test_a_reward_of_one_at_every_step_is_the_label_one_throughout(semantics: str, stored: bool) -> None:
    """RvS: R_t / (H - t) = (12 - t) / (12 - t), whether the last step of an episode is a row or a tail; so asks acting."""
    store = cut_by_the_limit(semantics, stored)
    tails = not stored or semantics == "d4rl"
    assert len(store) == (44 if tails else 48)
    agent = dataset_index(RvS, store)
    batch = store.transitions(torch.arange(len(store)).unsqueeze(0), agent.batch_fields)
    assert torch.equal(agent.label(batch), torch.ones(1, len(store), 1))
    assert torch.equal(agent.goal(agent.target.view(1, 1), 0), torch.ones(1, 1, 1))


@pytest.mark.parametrize("cls", [VAEBC, DoC, ESPER], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(("semantics", "stored"), READINGS)
def test_time_is_a_share_of_the_longest_episode_with_its_tail(cls: Any, semantics: str, stored: bool) -> None:
    assert dataset_index(cls, cut_by_the_limit(semantics, stored)).horizon == 12


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("cls", [RvS, VAEBC, DoC, ESPER], ids=lambda cls: cls.__name__)
def test_the_longest_episode_may_be_one_with_or_without_a_tail(cls: Any, lengths: tuple[int, int]) -> None:
    """The second of two episodes has a tail."""
    assert dataset_index(cls, make_store(lengths=lengths)).horizon == max(lengths[0], lengths[1] + 1)


@pytest.mark.parametrize(("semantics", "stored"), READINGS)
def test_what_is_asked_for_and_what_windows_are_told_count_the_tails_reward(semantics: str, stored: bool) -> None:
    """DT: the best return is 12; the k-th step's return to go is 12 - k, and its place in the episode k."""
    store = cut_by_the_limit(semantics, stored)
    agent = dataset_index(DT, store)
    assert agent.target == 12
    batch = store.windows(torch.arange(10).unsqueeze(0), 2, agent.batch_fields)
    k = torch.arange(10).unsqueeze(-1) + torch.arange(2)
    assert torch.equal(batch.timestep[0], k)
    assert torch.equal(batch.return_to_go[0], 12.0 - k)
