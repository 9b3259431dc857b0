"""Samplers in runs: weighted cloning, names and metadata, resuming, every agent under every sampler, several datasets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weighted import P_VALUE, fits, probabilities, random_episodes, rw

from offrl.data.dataset import OfflineDataset
from offrl.sampling import (
    AdvantageWeighted,
    ReturnWeighted,
    RowWeighted,
    TopPercent,
    Uniform,
    make_sampler,
)
from offrl.training.compose import compose, compose_words
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_agent
from offrl.training.trainer import Trainer, train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.random import LaneRandom


@pytest.fixture
def mixed_file(tmp_path: Any) -> Any:
    """60 episodes of 5 steps whose action is their return: one in ten is good."""
    rng = np.random.default_rng(0)
    good = np.arange(60) % 10 == 0
    action = np.where(good, 0.8, rng.uniform(-0.8, 0.2, 60)).repeat(5)[:, None]
    obs = rng.normal(size=(300, 2))
    path = tmp_path / "mixed.npz"
    np.savez(
        path,
        observations=obs,
        actions=action,
        rewards=action[:, 0],
        next_observations=np.roll(obs, -1, 0),
        terminals=np.arange(300) % 5 == 4,
        timeouts=np.zeros(300, bool),
    )
    return path


def options(file: Any, sampler: dict[str, Any], **changes: Any) -> dict[str, Any]:
    agent = {"_target_": "offrl.agents.bc.BC", "hidden": [16], "lr": 3e-3}
    values = {"agent": agent, "sampler": sampler, "dataset": str(file), "lanes": 2, "updates": 300, "batch_size": 32}
    values |= {"log_every": 100, "checkpoint_every": 100, "progress": False, "device": "cpu"}
    values |= {"eval": {"every": 0, "final_episodes": 0}, "out": str(file.parent / "runs")}
    return values | changes


def test_weighted_cloning_clones_the_good(mixed_file: Any) -> None:
    actions = {}
    for name in ("Uniform", "ReturnWeighted", "AdvantageWeighted", "TopPercent"):
        run = train(options(mixed_file, {"_target_": f"offrl.sampling.{name}"})).folder
        actions[name] = float(load_agent(run).select_action(torch.zeros(2, 1, 2)).mean())
    # Behaviour: a tenth at 0.8, the rest -0.3 on average. alpha = 0.1 leaves about 3% of the draws to the rest.
    assert actions["Uniform"] < 0
    for name in ("ReturnWeighted", "AdvantageWeighted", "TopPercent"):
        assert actions[name] == pytest.approx(0.8, abs=0.2)  # 300 updates don't converge


def test_runs_name_their_sampler_and_keep_its_metadata(mixed_file: Any) -> None:
    settings = {"_target_": "offrl.sampling.AdvantageWeighted", "temperature": [0.1, 0.5]}
    run = train(options(mixed_file, settings, updates=2)).folder
    assert run.parts[-3] == "bc+AW"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["method"] == "bc+AW"
    metadata = manifest["sampler"]
    assert metadata["fallback"] is None
    assert metadata["baseline"] == "ols"
    assert metadata["effective_share"][0] < metadata["effective_share"][1] < 1
    assert metadata["positive_sided_variance"] > 0
    other = train(options(mixed_file, {"_target_": "offrl.sampling.TopPercent"}, updates=2)).folder
    assert other.parts[-3] == "bc+Top-10"


def test_returns_are_of_rewards_as_recorded(mixed_file: Any, tmp_path: Any) -> None:
    """data.reward_* changes what the agent sees, and no weight: AntMaze's -1 would make short episodes good ones."""
    values = options(mixed_file, {"_target_": "offrl.sampling.ReturnWeighted"})
    plain = Trainer(resolve_config(values), tmp_path / "a")
    shifted = Trainer(resolve_config({**values, "data": {"reward_shift": -1.0, "reward_scale": 3.0}}), tmp_path / "b")
    assert not torch.equal(plain.store.rewards, shifted.store.rewards)
    assert torch.equal(plain.sampler.weights, shifted.sampler.weights)  # type: ignore[attr-defined]


def test_resume_is_exact(mixed_file: Any) -> None:
    """Of one weighted sampler; none of them has a state, and what they draw is a function of the update's number."""
    for cls in (ReturnWeighted, AdvantageWeighted, TopPercent):
        assert cls(random_episodes()).tensors() == {}
    sampler = {"_target_": "offrl.sampling.AdvantageWeighted"}
    whole = train(options(mixed_file, sampler, name="whole")).folder
    train(options(mixed_file, sampler, name="parts", updates=130))
    parts = train(options(mixed_file, sampler, name="parts")).folder
    a, b = (checkpoint.load(folder / checkpoint.NAME)[0] for folder in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_sweep_over_samplers_gives_runs_of_their_own(mixed_file: Any) -> None:
    names = ("uniform", "return_weighted", "advantage_weighted", "top_percent")
    plans = [
        resolve_config(compose({"agent": "td3_bc", "sampler": name, "dataset": str(mixed_file)})) for name in names
    ]
    assert [p.method for p in plans] == ["td3_bc", "td3_bc+RW", "td3_bc+AW", "td3_bc+Top-10%"]
    assert len({p.folder() for p in plans}) == len({p.config_hash() for p in plans}) == 4
    warm = resolve_config(
        compose({"sampler": "return_weighted", "sampler.temperature": 0.5, "dataset": str(mixed_file)})
    )
    assert warm.folder() != plans[1].folder()


AGENTS = sorted(path.stem for path in (conf_dir() / "agent").glob("*.yaml"))
SAMPLERS: dict[str, dict[str, Any]] = {
    "return_weighted": {"temperature": [0.1, 0.5]},
    "advantage_weighted": {},
    "top_percent": {"percent": [10, 50]},
    "density_weighted": {"steps": 2, "hidden": [4], "batch_size": 8, "refresh_every": 3, "refresh_steps": 2},
    "mixture": {"shares": [0.5], "samplers": ["top_percent", "uniform"]},
}


# An agent sees batches and no sampler, so the quick suite has an agent of transitions and one of windows under each.
PAIRS = [
    pytest.param(agent, sampler, marks=() if agent in ("td3_bc", "dt") else pytest.mark.slow)
    for agent in AGENTS
    for sampler in SAMPLERS
]


@pytest.mark.parametrize(("agent", "sampler"), PAIRS)
def test_every_agent_trains_under_every_sampler(mixed_file: Any, agent: str, sampler: str) -> None:
    values = compose({"agent": agent, "sampler": sampler, "dataset": str(mixed_file)})
    settings = SAMPLERS[sampler] | ({"datasets": [str(mixed_file)]} if sampler == "mixture" else {})
    sizes = {"hidden": [8], "vae_hidden": [8], "context": 3, "embed": 8, "layers": 1}  # for agents that have them
    sizes |= {"suffix": 4, "label_hidden": [8], "cluster_updates": 2, "return_updates": 1}
    small = {"sizes": sizes, "sampler": values["sampler"] | settings}
    small |= {"lanes": 2, "updates": 5, "batch_size": 16, "eval": {"every": 0, "final_episodes": 0}, "progress": False}
    result = Trainer(resolve_config({**values, **small}), mixed_file.parent / "run").run()
    assert result.status == "finished"  # the trainer itself refuses numbers that are not finite


@pytest.mark.cuda
def test_draws_on_a_gpu_are_those_of_the_cpu() -> None:
    store = random_episodes()
    there = store.to("cuda")
    steps = torch.arange(1, 101)
    for cls in (Uniform, ReturnWeighted, AdvantageWeighted, TopPercent):
        here = cls(store).draw(LaneRandom((0, 1)), steps, 64)
        drawn = cls(there).draw(LaneRandom((0, 1), "cuda"), steps.cuda(), 64).cpu()
        # Sums of another order may move an edge of the table by a rounding, and so a draw in ten million.
        assert float((here == drawn).double().mean()) > 0.999
    rows = torch.rand(2, len(store), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = RowWeighted(rows).draw(LaneRandom((0, 1)), steps, 64)
    drawn = RowWeighted(rows.cuda()).draw(LaneRandom((0, 1), "cuda"), steps.cuda(), 64).cpu()
    assert float((here == drawn).double().mean()) > 0.999


# ---- several datasets ------------------------------------------------------------------------------------------------


HALF: dict[str, Any] = {"datasets": ["b"], "shares": [0.5]}
MIXTURE = {"_target_": "offrl.sampling.Mixture"}
RETURNS = {"_target_": "offrl.sampling.ReturnWeighted"}


def mixture(stores: list[OfflineDataset], **settings: Any) -> Any:
    return make_sampler({"_target_": "offrl.sampling.Mixture", **settings}, stores, (0,))


def test_a_mixture_draws_fixed_shares_each_by_its_own_sampler() -> None:
    a, b, c = random_episodes(30, seed=1), random_episodes(40, seed=2), random_episodes(20, seed=3)
    samplers = ["uniform", {"_target_": "offrl.sampling.ReturnWeighted", "temperature": 0.5}, "top_percent"]
    made = mixture([a, b, c], datasets=["b", "c"], shares=[0.25, 0.125], samplers=samplers)
    drawn = made.draw(LaneRandom((0,)), torch.arange(1, 2001), 64)
    first = [0, len(a), len(a) + len(b), len(a) + len(b) + len(c)]
    part = torch.bucketize(drawn, torch.tensor(first[1:-1]), right=True)
    assert torch.equal(part, torch.tensor([0] * 40 + [1] * 16 + [2] * 8).expand_as(part))
    expectations = [
        torch.ones(len(a), dtype=torch.float64) / len(a),
        rw(b, temperature=0.5),
        probabilities(TopPercent(c)),
    ]
    for i, expected in enumerate(expectations):
        assert fits(drawn[part == i] - first[i], expected) > P_VALUE
    assert made.metadata()["parts"][0]["effective_share"] == 1.0
    plain = mixture([a, b], datasets=["b"], shares=[0.5]).draw(LaneRandom((0,)), torch.arange(1, 2001), 64)
    assert fits(plain[..., 32:] - len(a), torch.ones(len(b), dtype=torch.float64)) > P_VALUE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"sampler\.shares has 0 values for 0 sampler\.datasets"),
        ({"datasets": ["b"], "shares": [0.5, 0.1]}, r"sampler\.shares has 2 values for 1 sampler\.datasets"),
        ({"datasets": ["b"], "shares": [1.5]}, "add up to at most 1"),
        ({"datasets": ["b"], "shares": [0.5], "samplers": ["uniform"]}, r"sampler\.samplers has 1 entries for 2"),
        (
            {"datasets": ["b"], "shares": [0.5], "samplers": ["uniform", "unifrom"]},
            "unifrom is no sampler; choose among",
        ),
        ({"dataset": ["b"]}, r"did you mean sampler\.datasets"),
        (
            {**HALF, "samplers": ["uniform", {"temperature": 0.2}]},
            r"sampler\.samplers\[1\] has no _target_; name a sampler",
        ),
        ({**HALF, "samplers": ["mixture", "uniform"]}, r"sampler\.samplers\[0\] draws from several datasets itself"),
        (
            {**HALF, "samplers": [MIXTURE | HALF, "uniform"]},
            r"sampler\.samplers\[0\] draws from several datasets itself",
        ),
        ({**HALF, "samplers": [RETURNS | {"temp": 1.0}, "uniform"]}, r"sampler\.samplers\[0\]\.temp is no option"),
    ],
)
def test_mixtures_that_cant_be(settings: dict[str, Any], message: str) -> None:
    store = random_episodes()
    with pytest.raises(OffrlError, match=message):
        mixture([store, store], **settings)
    if settings:  # what is given is checked before any data is read, too
        with pytest.raises(OffrlError, match=message):
            resolve_config(options(Path("x"), MIXTURE | settings))


def test_a_mixture_of_other_datasets_than_its_settings_name_is_refused() -> None:
    with pytest.raises(OffrlError, match="shorter"):
        mixture([random_episodes()], **HALF)


def test_a_part_of_a_mixture_may_be_a_table(mixed_file: Path) -> None:
    """In Python as on the command line."""
    tables = [{"_target_": "offrl.sampling.ReturnWeighted", "temperature": 0.25}, "uniform"]
    choice = {"agent": "bc", "dataset": str(mixed_file), "sampler": "mixture"}
    choice |= {"sampler.datasets": [str(mixed_file)], "sampler.shares": [0.5]}
    inner = "[{_target_: offrl.sampling.ReturnWeighted, temperature: 0.25},uniform]"
    words = ["agent=bc", f"dataset='{mixed_file}'", "sampler=mixture", f"sampler.datasets=['{mixed_file}']"]
    words += ["sampler.shares=[0.5]", f"sampler.samplers={inner}"]
    given = compose({**choice, "sampler.samplers": tables})
    assert given == compose_words(words)
    assert resolve_config(given).sampler["samplers"] == tables


def test_training_on_a_mixture(mixed_file: Any) -> None:
    other = mixed_file.parent / "other.npz"
    shutil.copy(mixed_file, other)
    sampler = {"_target_": "offrl.sampling.Mixture", "datasets": [str(other)], "shares": [0.5]}
    sampler |= {"samplers": ["uniform", "advantage_weighted"]}
    values = options(mixed_file, sampler)
    trainer = Trainer(resolve_config(values), mixed_file.parent / "x")
    assert (len(trainer.store), trainer.store.episodes) == (600, 120)
    batch = trainer.loader.draw(LaneRandom((0, 1)), torch.arange(1, 200))
    assert torch.equal(batch.obs, trainer.store.observations[batch.index])
    good = batch.action[..., 0] > 0.7
    assert float(good[..., :16].double().mean()) == pytest.approx(0.1, abs=0.03)
    assert float(good[..., 16:].double().mean()) > 0.9
    folder = train({**values, "updates": 20}).folder
    assert folder.parts[-3] == "bc+Mixture"
    wide = mixed_file.parent / "wide.npz"
    with np.load(mixed_file) as data:
        arrays = dict(data)
    np.savez(wide, **{**arrays, "actions": np.repeat(arrays["actions"], 2, 1)})
    with pytest.raises(OffrlError, match="differ in observations or actions"):
        Trainer(resolve_config(options(mixed_file, {**sampler, "datasets": [str(wide)]})), mixed_file.parent / "y")
