"""Bounds of actions: what every agent for continuous actions makes of a box whose dimensions differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from conftest import make_toy
from gymnasium import spaces
from hydra.utils import get_class
from test_agents import SETTINGS, advance, small
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from offrl.agents.base import Agent, Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.data.dataset import Bound, OfflineDataset
from offrl.nets import ActionBox, DeterministicActor, GaussianActor, TanhGaussian
from offrl.training.runs import load_agent, make_agent
from offrl.training.trainer import train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError

BOX: tuple[Bound, Bound] = ((0.0, -0.78), (5.0, 0.78))
CONTINUOUS = [name for name in sorted(SETTINGS) if get_class(SETTINGS[name]._target_).takes_continuous]
every_agent = pytest.mark.parametrize("name", CONTINUOUS)
boxes = pytest.mark.parametrize(("low", "high"), [BOX, (0.0, 100.0), (-1.0, (1.0, 3.0))], ids=str)


def boxed(low: Bound, high: Bound) -> OfflineDataset:
    """The toy task with its actions stretched to another box."""
    toy = make_toy(512)
    actions = torch.tensor(low) + (toy.actions + 1) / 2 * (torch.tensor(high) - torch.tensor(low))
    return OfflineDataset(
        **{**toy.tensors(), "actions": actions}, info=replace(toy.info, action_low=low, action_high=high)
    )


def agent_of(name: str, store: OfflineDataset) -> Agent:
    box = store.info.action_low, store.info.action_high
    spec = Spec(store.obs_dim, store.action_dim, (0, 1), *store.observation_statistics(), *box)
    agent = make_agent({"_target_": SETTINGS[name]._target_, **small(name)}, spec)
    agent.setup(store)
    return agent


def randomized(agent: Agent, seed: int) -> Agent:
    """The agent with standard normal parameters, with which networks have large outputs, of another sign by seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return agent


@boxes
@every_agent
def test_actions_stay_in_their_box_and_reach_both_ends(name: str, low: Bound, high: Bound) -> None:
    """After some updates; then with random weights so large that every squashing saturates."""
    store = boxed(low, high)
    agent = agent_of(name, store)
    metrics = advance(agent, store, 8)
    assert all(m.isfinite().all() for m in metrics.values())
    assert not [key for key in agent.state_dict() if "box" in key]  # checkpoints stay as they were
    obs = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0)) * 20
    learnt = agent.select_action(obs)
    wild = torch.cat([randomized(agent, seed).select_action(obs) for seed in range(6)])
    least, most = (torch.tensor(b).expand(2) for b in (low, high))
    for action in (learnt, wild):
        assert (action >= least).all()
        assert (action <= most).all()
    width = most - least
    assert (wild.amin((0, 1)) < least + 0.01 * width).all()
    assert (wild.amax((0, 1)) > most - 0.01 * width).all()


@boxes
def test_squashed_densities_equal_pytorchs(low: Bound, high: Bound) -> None:
    """Of the environment's actions; of samples in units of half the box. And the moments, against a large sample's."""
    box = ActionBox(low, high).double()
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(3, 2, generator=generator, dtype=torch.float64) * 0.5 for _ in range(2))
    pi = TanhGaussian(mean, log_std, box.low, box.high)
    least, most = (torch.tensor(b, dtype=torch.float64) for b in (low, high))
    squashed = [TanhTransform(cache_size=1)]
    stretched = [*squashed, AffineTransform((most + least) / 2, (most - least) / 2)]
    laws = [TransformedDistribution(Normal(mean, log_std.exp()), parts) for parts in (squashed, stretched)]
    noise = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    action, unit_density = pi.sample(noise)
    u = mean + log_std.exp() * noise
    torch.testing.assert_close(action, (most + least) / 2 + (most - least) / 2 * u.tanh(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unit_density, laws[0].log_prob(u.tanh()).sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pi.log_prob(action), laws[1].log_prob(action).sum(-1), rtol=1e-9, atol=1e-9)
    many = pi.repeated().sample(torch.randn(3, 200_000, 2, generator=generator, dtype=torch.float64))[0]
    middle, std = pi.moments()
    error = (many.mean(1) - middle).abs() / (std / 200_000**0.5)  # in standard errors
    assert error.max() < 4.5
    torch.testing.assert_close(many.std(1), std, rtol=0.02, atol=0)


def test_gaussian_policies_have_stds_in_units_of_each_half_width() -> None:
    actor, x = GaussianActor((0,), 3, 2, (8,), *BOX), torch.randn(1, 7, 3)
    mean, std = actor(x)
    torch.testing.assert_close(mean, DeterministicActor((0,), 3, 2, (8,), *BOX)(x))
    torch.testing.assert_close(std, torch.tensor([2.5, 0.78]).expand(1, 7, 2))


def test_target_noise_has_its_std_and_its_bound_per_dimension() -> None:
    """policy_noise = 0.2 and noise_clip = 0.5 half widths; where the target action is the centre, the box cuts nothing."""
    agent = TD3BC(Spec(3, 2, (0,), action_low=BOX[0], action_high=BOX[1]), TD3BCConfig(hidden=(8,)))
    for p in agent.actor_target.parameters():
        p.data.zero_()
    batch = boxed(*BOX).transitions(torch.zeros(1, 100_000, dtype=torch.int64))
    noise = agent.target_action(batch) - torch.tensor([2.5, 0.0])
    half_width = torch.tensor([2.5, 0.78])
    assert (noise.abs().amax((0, 1)) <= 0.5 * half_width * (1 + 1e-5)).all()
    assert (noise.abs().amax((0, 1)) > 0.4999 * half_width).all()
    # The std of a normal clipped at 2.5 of its own is 0.98867: E min(z^2, 6.25) = 0.97747.
    torch.testing.assert_close(noise.std((0, 1)) / half_width, torch.full((2,), 0.2 * 0.98867), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ((0.0, 0.0, 0.0), 1.0, "action_low has 3 numbers for 2 dimensions"),
        ((0.0, 1.0), (1.0, 1.0), "action_low 1 is not below action_high 1 in dimension 1"),
        (float("nan"), 1.0, "is not below"),
    ],
)
def test_bounds_that_are_no_box_are_refused(low: Bound, high: Bound, message: str) -> None:
    with pytest.raises(OffrlError, match=message):
        Spec(3, 2, action_low=low, action_high=high)


def test_a_box_keeps_its_digits_in_wider_types() -> None:
    """A module that becomes float64 has the float64 bounds, not float32 ones; uniform bounds stay numbers."""
    box = ActionBox(*BOX)
    assert torch.equal(box.double().low, torch.tensor([0.0, -0.78], dtype=torch.float64))
    assert torch.equal(box.float().high, torch.tensor([5.0, 0.78]))
    assert isinstance(ActionBox(-2.0, 3.0).half_width, float)
    assert Spec(3, 2, action_low=(-2.0, -2.0)).action_low == -2.0


# ---- a run --------------------------------------------------------------------------------------------------------


class Narrow(gymnasium.Env[np.ndarray, np.ndarray]):
    """One state after another; keeps every action."""

    observation_space = spaces.Box(-2, 2, (3,))
    action_space = spaces.Box(np.array(BOX[0], np.float32), np.array(BOX[1], np.float32))
    taken: ClassVar[list[np.ndarray]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 4
        return self.np_random.uniform(-1.5, 1.5, 3).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        Narrow.taken.append(np.array(action))
        self.left -= 1
        return self.np_random.uniform(-1.5, 1.5, 3).astype(np.float32), 0.0, self.left == 0, False, {}


@pytest.mark.parametrize("name", ["td3_bc", "cql", "awac", "dt"])
def test_a_run_keeps_the_box_of_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the file, trained in, evaluated in, saved and loaded."""
    if "offrl-test/Narrow-v0" not in gymnasium.registry:
        gymnasium.register("offrl-test/Narrow-v0", entry_point=Narrow)
    monkeypatch.setattr(Narrow, "taken", [])
    store = boxed(*BOX)
    columns = {"observations": store.observations, "actions": store.actions, "rewards": store.rewards}
    columns |= {"next_observations": store.next_observations, "terminals": store.terminations.bool()}
    about = {"action_low": BOX[0], "action_high": BOX[1], "offrl_info": json.dumps({"env_id": "offrl-test/Narrow-v0"})}
    np.savez(tmp_path / "narrow.npz", **{k: v.numpy() for k, v in columns.items()}, **about)
    result = train(
        {
            "agent": {"_target_": SETTINGS[name]._target_, **small(name)},
            "dataset": str(tmp_path / "narrow.npz"),
            "out": str(tmp_path / "runs"),
            "updates": 10,
            "batch_size": 16,
            "lanes": 2,
            "progress": False,
            "eval": {"every": 0, "final_episodes": 3, "workers": 1},
        }
    )
    assert result.returns == [0.0, 0.0]
    assert len(Narrow.taken) > 1  # one of them is of the check before training
    space, taken = Narrow.action_space, np.stack(Narrow.taken)
    assert (space.low <= taken).all()
    assert (taken <= space.high).all()
    agent = load_agent(result.folder)
    assert (agent.spec.action_low, agent.spec.action_high) == BOX
    obs = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0)) * 20
    action = torch.cat([randomized(agent, seed).select_action(obs) for seed in range(6)])
    torch.testing.assert_close(action.amin((0, 1)), torch.tensor(BOX[0]), rtol=0, atol=0.02)
    torch.testing.assert_close(action.amax((0, 1)), torch.tensor(BOX[1]), rtol=0, atol=0.02)
    _, record = checkpoint.load(result.folder / checkpoint.NAME)
    record["spec"]["action_low"] = [0.0, 0.0, 0.0]
    path = tmp_path / "broken.safetensors"
    checkpoint.save(path, load_agent(result.folder), record)
    with pytest.raises(OffrlError, match=r"broken.safetensors.*3 numbers for 2 dimensions"):
        load_agent(path)
