"""Label leakage against closed forms in a bandit; predicted and achieved returns of runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_doc import BANDIT, learn, make_agent
from test_rvs import make_agent as make_rvs
from test_rvs import make_bandit

from offrl.agents.doc import DoC
from offrl.agents.vae_bc import VAEBC
from offrl.cli.main import main
from offrl.cli.probe import probe
from offrl.data.dataset import OfflineDataset
from offrl.evaluation.probes import Leakage, Probe, label_leakage, noise_features, reward_and_state
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Taped
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError


def entropy(p: float) -> float:
    x = torch.tensor([p, 1 - p])
    return float(-(x * x.log()).sum())


def in_bandit(agent: Any, store: OfflineDataset, updates: int = 250) -> Leakage:
    found = label_leakage(agent, store, reward_and_state(store), updates, hidden=(32,))
    assert found is not None
    return found


def test_a_return_leaks_all_noise_of_a_bandit() -> None:
    """I(r; R | a) = H(r | a) as R = r; I(r; a) is the arm's information."""
    store = make_bandit(0.3, 0.7, 4000)
    found = in_bandit(make_rvs(store, (0, 1), hidden=(8,)), store)
    information = entropy(0.42) - entropy(0.3)
    assert all(abs(x - information) < 0.02 for x in found.without_label)
    assert all(abs(x - entropy(0.3)) < 0.03 for x in found.label)
    assert all(abs(x) < 0.005 for x in found.shuffled_label)


def test_the_constraint_removes_noise_from_a_latent_that_has_it() -> None:
    """VAE-BC's latent encodes the noise. Trained on under the constraint it loses that, and keeps the arm.

    Three seeds without and with the constraint: without it the noise fades from some latents too, but not from all.
    """
    store, seeds = make_bandit(0.3, 0.7, 1000), (0, 1, 2, 0, 1, 2)
    vae = learn(VAEBC, store, seeds, updates=600, kl_weight=0.1)
    before = in_bandit(vae, store)
    assert min(before.label) > 0.1
    assert max(map(abs, before.shuffled_label)) < 0.01
    agent = make_agent(DoC, store, seeds, **{**BANDIT, "energy_lr": 3e-3, "beta": [0.0] * 3 + [2.0] * 3})
    missing, unexpected = agent.load_state_dict(vae.state_dict(), strict=False)
    assert all(name.startswith("energy") for name in missing)
    assert not unexpected
    agent.optimizer.count.zero_()
    engine = Taped(agent, BatchLoader([(store, Uniform(store), 1.0)], 64, agent.window, agent.batch_fields))
    metrics = engine.run(0, 500)
    labels = in_bandit(agent, store).label
    assert max(labels[:3]) > 0.1
    assert max(labels[3:]) < 0.02
    assert metrics["action_loss"][3:].max() < 0.1  # of H(a) = 0.61


def test_memorised_labels_leak_nothing() -> None:
    """Labels and outcomes are independent: networks that memorise the pairs are evaluated on held-out episodes."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(60, generator=generator) for _ in range(3)]
    obs, offsets = torch.zeros(60, 1), torch.arange(61)
    store = OfflineDataset(obs, rows[0].unsqueeze(1).tanh(), rows[1], obs, torch.ones(60), offsets)
    outcome = rows[2].unsqueeze(1)
    found = label_leakage(make_rvs(store, (0,), hidden=(8,)), store, outcome, 100, hidden=(64,))
    assert found is not None
    assert found.label[0] < 0.05  # on the training episodes the estimate is above 0.2


def test_whole_numbers_are_kinds_and_others_are_standardised() -> None:
    assert noise_features(torch.tensor([0, 2, 1])).tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    numbers = noise_features(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    torch.testing.assert_close(numbers, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


def test_estimates_depend_on_no_origin_of_rewards_and_states() -> None:
    """The noise of a reward of 0 or 1 leaks whole, wherever rewards and states lie; float32 keeps 1e-4 of a state at 1000."""
    generator = torch.Generator().manual_seed(0)
    store = make_bandit(0.5, 0.5, 1000)
    states = torch.randn(len(store), 2, generator=generator)
    found = []
    for reward, state in ((0.0, 0.0), (100.0, 0.0), (0.0, 1000.0)):
        moved = {"rewards": store.rewards + reward, "observations": states + state}
        moved["next_observations"] = moved["observations"].roll(-1, 0)
        there = OfflineDataset(**{**store.tensors(), **moved}, info=store.info)
        agent = make_rvs(there, hidden=(8,))
        agent.obs_mean.zero_()  # normalize_obs=false
        agent.obs_scale.fill_(1)
        found.append(in_bandit(agent, there, updates=100).label[0])
    assert abs(found[0] - entropy(0.5)) < 0.1
    assert found == pytest.approx(found[:1] * 3, abs=0.01)


def test_columns_that_are_constant_are_zero() -> None:
    store = make_bandit(0.3, 0.7, 100)
    moved = {**store.tensors(), "next_observations": torch.full_like(store.observations, 7.3)}
    store = OfflineDataset(**moved, info=store.info)
    torch.testing.assert_close(reward_and_state(store)[:, 1:], torch.zeros_like(store.observations), rtol=0, atol=1e-6)


def test_too_few_episodes_are_refused() -> None:
    store = make_bandit(0.3, 0.7, 100).select_episodes(torch.arange(3))
    with pytest.raises(OffrlError, match="3 episodes"):
        in_bandit(make_rvs(store, hidden=(8,)), store)


def test_probe_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RvS predicts 1 in a bandit and achieves what its arm pays; its label leaks the noise."""
    folders = []
    for agent, lanes in (("rvs.RvS", 2), ("bc.BC", 1)):
        settings = {"_target_": f"offrl.agents.{agent}", "hidden": [16], "lr": 1e-2}
        if agent == "rvs.RvS":
            settings |= {"average": False}
        values = {
            "agent": settings,
            "dataset": "forge/bandit/skewed-v0",
            "lanes": lanes,
            "updates": 300,
            "batch_size": 64,
        }
        values |= {"out": str(tmp_path), "progress": False, "eval": {"every": 0, "final_episodes": 0}}
        folders.append(train(values).folder)
    found = probe(folders[0], episodes=2000, updates=150, sampled=True)
    assert found.predicted == [1, 1]
    assert found.achieved is not None
    assert all(abs(x - 0.344) < 0.1 for x in found.achieved)  # the exact value of sampled return conditioning
    assert found.outcome is not None
    assert found.noise is not None
    assert min(found.outcome.label) > 0.5
    assert min(found.noise.label) > 0.5  # the coin is known from arm and reward
    assert (
        max(map(abs, (*found.noise.without_label, *found.noise.shuffled_label))) < 0.02
    )  # the arm alone says nothing of it
    assert probe(folders[1], episodes=0, updates=1).outcome is None
    plot = tmp_path / "p.png"
    words = ["probe", *map(str, folders), "--episodes", "10", "--updates", "0", "--plot", str(plot), "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["predicted"] for one in printed] == [[1, 1], None]
    assert plot.stat().st_size > 1000
    assert main(words[:-1]) == 0
    assert "rvs" in capsys.readouterr().out
    plot.unlink()
    words = ["probe", str(folders[1]), "--episodes", "10", "--plot", str(plot), "--updates", "0"]
    assert main(words) == 2  # what was played is shown all the same
    shown = capsys.readouterr()
    assert "forge/bandit/skewed-v0" in shown.out
    assert "nothing to plot" in shown.err
    assert main([*words, "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)[0]["achieved"]) == 1
    assert not plot.exists()


def test_json_of_earlier_versions_is_still_read() -> None:
    named = {"run": "r", "method": "rvs", "dataset": "d", "sampled": True}
    former = {**named, "promised": [1.0], "obtained": [0.3], "noise": None}
    former["outcome"] = {"known": [0.1], "gain": [0.6], "control": [0.0]}
    present = Probe("r", "rvs", "d", True, [1.0], [0.3], Leakage([0.1], [0.6], [0.0]), None)
    assert Probe.from_dict(former) == present
    assert Probe.from_dict(asdict(present)) == present
