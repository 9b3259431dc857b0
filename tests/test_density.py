"""Density weighting: what the loss says, what it prefers, that it is drawn as learnt, and exact resume."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_toy
from scipy import stats
from torch import Tensor

from offrl.data.dataset import DatasetInfo, OfflineDataset
from offrl.sampling.density import DensityRatio, DensityWeighted, DensityWeightedConfig
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

SMALL = DensityWeightedConfig(steps=200, hidden=(16,), batch_size=64, lr=3e-3)


def started(
    store: OfflineDataset, cfg: DensityWeightedConfig = SMALL, seeds: tuple[int, ...] = (0,)
) -> DensityWeighted:
    sampler = DensityWeighted(store, cfg, seeds)
    sampler.start()
    return sampler


def law(sampler: DensityWeighted) -> Tensor:
    """`[lanes, N]`: what the alias table draws, exactly."""
    keep, alias = sampler.keep, sampler.alias.long()
    return (keep + torch.zeros_like(keep).scatter_add_(1, alias, 1 - keep)) / keep.shape[1]


def test_the_loss_is_the_papers() -> None:
    """Against a plain restatement in numpy, float64."""
    rng = np.random.default_rng(0)
    cfg = DensityWeightedConfig(
        hidden=(8,), clip=0.2, temperature=0.7, flow_weight=1.5, entropy_weight=0.3, discount=0.9
    )
    ratio = DensityRatio(3, 2, cfg, (0, 1)).double()
    with torch.no_grad():  # so that some logits leave the clip
        for network in (ratio.g, ratio.f):
            network.weights[-1].mul_(6)
    obs, action, next_obs, reward = (torch.tensor(rng.normal(size=(2, 50, n))) for n in (3, 2, 3, 1))
    loss = ratio.loss(obs, action, next_obs, reward.squeeze(-1))

    def mlp(network: Any, x: np.ndarray, lane: int) -> np.ndarray:
        first, last = (w[lane].detach().numpy() for w in network.weights)
        a, b = (w[lane].detach().numpy() for w in network.biases)
        return (np.maximum(x @ first.T + a, 0) @ last.T + b)[:, 0]

    for lane in range(2):
        s, a, s2, r = (x[lane].numpy() for x in (obs, action, next_obs, reward))
        g, f, f2 = mlp(ratio.g, np.hstack([s, a]), lane), mlp(ratio.f, s, lane), mlp(ratio.f, s2, lane)
        assert (np.abs(g) > 1.2).any()
        e = np.exp((np.clip(g, -1.2, 1.2) + np.clip(f, -1.2, 1.2)) / 0.7)
        omega = e / e.sum()
        flow = (0.9 * np.exp((g + f) / 0.7) - np.exp(f2 / 0.7)) ** 2
        expected = -(omega @ r[:, 0]) + 1.5 * flow.mean() + 0.3 * (omega @ np.log(omega))
        assert float(loss[lane].detach()) == pytest.approx(expected, rel=1e-12)


def test_weights_sum_to_one_and_a_hot_ratio_is_uniform() -> None:
    toy = make_toy(400)
    ratio = DensityRatio(3, 2, SMALL, (0,))
    g, f = ratio.logits(toy.observations.unsqueeze(0), toy.actions.unsqueeze(0))
    omega = ratio.bounded(g, f).softmax(-1)
    assert float(omega.detach().sum()) == pytest.approx(1, abs=1e-6)
    ratio.cfg = replace(SMALL, temperature=1e9)
    torch.testing.assert_close(ratio.bounded(g, f).softmax(-1), torch.full_like(omega, 1 / 400), rtol=1e-6, atol=0)


def test_good_transitions_are_drawn_more_often() -> None:
    """Rewards that follow from (s, a), no trajectories: DW finds them; a heavy divergence term keeps it near uniform."""
    toy = make_toy(2000)
    near = started(toy, replace(SMALL, steps=500, entropy_weight=0.05, flow_weight=0.01))
    p, reward = law(near)[0], toy.rewards.double()
    assert float(p @ reward) > float(reward.mean()) + 0.2 * float(reward.std())
    assert stats.spearmanr(p, reward).statistic > 0.5
    far = started(toy, replace(SMALL, entropy_weight=50.0, flow_weight=0.01))
    assert far.metadata()["effective_share"][0] > 0.98 > near.metadata()["effective_share"][0]
    assert float(p.max() / p.min()) <= np.exp(4.8) * 1.001  # both logits are bounded by 1.2
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)


def test_what_is_drawn_is_what_was_learnt() -> None:
    sampler = started(make_toy(400))
    drawn = sampler.draw(LaneRandom((0,)), torch.arange(1, 401), 500)
    seen = torch.bincount(drawn.flatten(), minlength=400).numpy()
    assert stats.chisquare(seen, law(sampler)[0].numpy() * seen.sum()).pvalue > 1e-4
    assert stats.chisquare(seen).pvalue < 1e-12  # and not uniform


def test_lanes_are_independent_and_may_differ_in_settings() -> None:
    toy = make_toy(400)
    both = started(toy, replace(SMALL, entropy_weight=[0.1, 5.0]), (3, 4))  # type: ignore[arg-type]
    for lane, (seed, weight) in enumerate(((3, 0.1), (4, 5.0))):
        alone = started(toy, replace(SMALL, entropy_weight=weight), (seed,))
        # float32 products of other shapes round differently, and Adam carries that on.
        torch.testing.assert_close(law(both)[lane], law(alone)[0], rtol=2e-3, atol=0)
    assert both.metadata()["effective_share"][0] < both.metadata()["effective_share"][1]


def test_refreshing_goes_on_where_it_stood_and_in_place() -> None:
    toy = make_toy(400)
    once = started(toy, replace(SMALL, steps=300))
    twice = started(toy, replace(SMALL, steps=200, refresh_every=10, refresh_steps=100))
    before, where = law(twice), twice.keep.data_ptr()
    twice.refresh()
    assert twice.keep.data_ptr() == where
    assert not torch.equal(law(twice), before)
    assert torch.equal(law(twice), law(once))
    assert twice.metadata()["density_updates"] == 300


def test_state_restores_the_law() -> None:
    toy = make_toy(400)
    first, second = started(toy), DensityWeighted(toy, SMALL, (0,))
    second.restore({name: tensor.clone() for name, tensor in first.tensors().items()})
    assert torch.equal(law(first), law(second))
    first.refresh()
    second.refresh()
    assert torch.equal(law(first), law(second))


def test_the_manifest_tells_the_mean_of_the_flow() -> None:
    toy = make_toy(400)
    sampler = started(toy)
    _, f = sampler.ratio.logits(sampler._observed(toy.observations).unsqueeze(0), toy.actions.unsqueeze(0))
    assert sampler.metadata()["density_f"] == pytest.approx([float(f.detach().mean())], rel=1e-5)  # float32


def test_no_gradient_reaches_the_ratio_through_what_is_drawn() -> None:
    sampler = started(make_toy(400))
    assert not sampler.keep.requires_grad
    assert all(p.grad is None for p in sampler.ratio.parameters())


def test_discrete_actions() -> None:
    rng = np.random.default_rng(0)
    obs = torch.tensor(rng.normal(size=(200, 2)), dtype=torch.float32)
    action = torch.tensor(rng.integers(0, 3, 200))
    reward = (action == 1).float()
    info = DatasetInfo(discrete=3)
    store = OfflineDataset(obs, action, reward, obs, torch.ones(200), torch.arange(0, 201, 2), info)
    p = law(started(store, replace(SMALL, steps=500, flow_weight=0.0)))[0]
    assert float(p[action == 1].mean() / p[action != 1].mean()) > 2


@pytest.mark.parametrize("reward", ["minmax", "std"])
def test_rewards_of_any_scale_give_the_same_weights(reward: Any) -> None:
    toy = make_toy(400)
    cfg = replace(SMALL, reward=reward, steps=20)
    torch.testing.assert_close(law(started(toy, cfg)), law(started(toy.with_rewards(1000.0), cfg)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("reward", ["minmax", "std"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -100.0])
def test_constant_rewards_prefer_no_row(reward: Any, constant: float) -> None:
    """Also where they differ by float32 rounding: the weights are those of rewards of zero."""
    toy = make_toy(400).with_rewards(0.0, constant)
    toy.rewards[::2] *= 1 + 2e-7
    cfg = replace(SMALL, reward=reward, steps=50)
    assert torch.equal(law(started(toy, cfg)), law(started(make_toy(400).with_rewards(0.0), cfg)))


def test_bad_settings() -> None:
    with pytest.raises(OffrlError, match=r"sampler\.steps=0 should be at least 1"):
        DensityWeightedConfig(steps=0)
    with pytest.raises(OffrlError, match=r"sampler\.temperature=0 should be above 0"):
        DensityWeightedConfig(temperature=0)


@pytest.mark.parametrize("refresh", [0, 40])
def test_resume_is_exact_between_refreshes(toy_file: Any, refresh: int) -> None:
    from offrl.training.runs import load_agent
    from offrl.training.trainer import train
    from offrl.utils import checkpoint

    sampler = {
        "_target_": "offrl.sampling.density.DensityWeighted",
        "steps": 50,
        "hidden": [8],
        "batch_size": 32,
        "lr": 0.01,
    }
    sampler |= {"refresh_every": refresh, "refresh_steps": 20}
    values = {"agent": {"_target_": "offrl.agents.bc.BC", "hidden": [8]}, "sampler": sampler, "dataset": str(toy_file)}
    values |= {
        "lanes": 2,
        "batch_size": 16,
        "log_every": 50,
        "checkpoint_every": 70,
        "progress": False,
        "device": "cpu",
    }
    values |= {"eval": {"every": 0, "final_episodes": 0}, "out": str(toy_file.parent / "runs")}
    whole = train({**values, "updates": 200, "name": "whole"}).folder
    train({**values, "updates": 130, "name": "parts"})
    parts = train({**values, "updates": 200, "name": "parts"}).folder
    a, b = (checkpoint.load(folder / checkpoint.NAME)[0] for folder in (whole, parts))
    assert a.keys() == b.keys()
    assert any(key.startswith("sampler/") for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert int(a["sampler/count"]) == 50 + (200 // refresh * 20 if refresh else 0)
    assert load_agent(whole).select_action(torch.zeros(2, 1, 3)).shape == (2, 1, 2)
