"""What every agent must do. Agents are found from conf/agent/: a new yaml there is tested without another edit."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import best_action, make_toy
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from offrl.agents.base import Agent, Spec
from offrl.augment.base import Synthetic, check_agent, make_augmentation
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import CudaGraph, Eager, make_engine
from offrl.training.runs import load_agent, make_agent
from offrl.training.trainer import train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir

SETTINGS = {p.stem: OmegaConf.load(p) for p in sorted((conf_dir() / "agent").glob("*.yaml"))}
every_agent = pytest.mark.parametrize("name", SETTINGS)
# Compiling takes about a minute an agent, so the quick suite compiles one and `make test-slow` all.
compiled_agents = pytest.mark.parametrize(
    "name", [n if n == "td3_bc" else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS]
)
# Settings of sequence models, of ensembles and of methods that sample many actions.
SMALL: dict[str, Any] = {"context": 3, "embed": 16, "layers": 1, "warmup": 20, "members": 3, "actions": 2, "suffix": 3}
SMALL |= {"cluster_updates": 3, "return_updates": 2, "groups": 2, "kinds": 4}  # all of ESPER's stages in a few updates
# What finds the toy task's optimum, where a default is meant for larger rewards: these terms pull the policy away from it.
TOY: dict[str, dict[str, Any]] = {"cql": {"cql_alpha": 1.0}, "edac": {"eta": 0.1}, "doc": {"posterior_kl_weight": 1.0}}
TOY["esper"] = {"cluster_updates": 150, "return_updates": 250}


def make(name: str, store: OfflineDataset, seeds: Sequence[int] = (0,), **settings: Any) -> Agent:
    target = SETTINGS[name]._target_
    spec = Spec(store.obs_dim, store.action_dim, tuple(seeds), *store.observation_statistics())
    agent = make_agent({"_target_": target, **small(name), **settings}, spec).to(store.rewards.dtype)
    agent.setup(store)
    return agent


def small(name: str) -> dict[str, Any]:
    """Small networks: every setting that is called `hidden` or `..._hidden`, and what `SMALL` names."""
    from hydra.utils import get_class

    cls: Any = get_class(SETTINGS[name]._target_)
    names = [f.name for f in fields(cls.Config)]
    return {n: [32, 32] for n in names if n.endswith("hidden")} | {n: SMALL[n] for n in names if n in SMALL}


def loader(agent: Agent, store: OfflineDataset, batch: int = 32) -> BatchLoader:
    return BatchLoader([(store, Uniform(store), 1.0)], batch, agent.window, agent.batch_fields)


def advance(
    agent: Agent, store: OfflineDataset, updates: int, start: int = 0, batch: int = 32
) -> dict[str, torch.Tensor]:
    return Eager(agent, loader(agent, store, batch)).run(start, updates)


def distance(a: Agent, b: Agent) -> float:
    """Largest difference of any tensor of the two agents' states."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    return max((mine[k] - theirs[k]).abs().max().item() for k in mine)


@every_agent
def test_runs_and_stays_finite(name: str, toy: OfflineDataset) -> None:
    agent = make(name, toy, seeds=(3, 4))
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    metrics = advance(agent, toy, 50)
    assert metrics
    assert all(m.shape == (2,) and m.isfinite().all() for m in metrics.values())
    assert all(v.isfinite().all() for v in agent.state_dict().values())
    assert any(not torch.equal(before[k], v) for k, v in agent.state_dict().items())
    action = agent.select_action(toy.observations[:7].expand(2, 7, -1))
    assert action.shape == (2, 7, toy.action_dim)
    assert action.abs().max() <= 1


@every_agent
def test_discrete_actions_are_taken_or_refused(name: str) -> None:
    from hydra.utils import get_class

    cls: Any = get_class(SETTINGS[name]._target_)
    settings, spec = {"_target_": SETTINGS[name]._target_, **small(name)}, Spec(3, 4, (0, 1), discrete=True)
    if cls.takes_discrete:
        action = make_agent(settings, spec).select_action(torch.randn(2, 7, 3))
        assert action.dtype == torch.int64
        assert action.shape == (2, 7)
    else:
        with pytest.raises(
            OffrlError,
            match=r"needs continuous actions; for integer ones choose agent=bc, doc, dt, esper, rvs, vae_bc\.",
        ):
            make_agent(settings, spec)


@every_agent
def test_lanes_equal_separate_runs(name: str) -> None:
    """In float64 the lanes of one run differ from runs of one lane by rounding alone."""
    store = make_toy(512, dtype=torch.float64)
    together = make(name, store, seeds=(5, 6, 7))
    advance(together, store, 20)
    for lane, seed in enumerate((5, 6, 7)):
        alone = make(name, store, seeds=(seed,))
        advance(alone, store, 20)
        for (key, many), one in zip(together.state_dict().items(), alone.state_dict().values()):
            if many.shape != one.shape:  # shared between lanes: statistics, step counts
                torch.testing.assert_close(many[lane], one[0], rtol=0, atol=1e-10, msg=key)


@every_agent
def test_lanes_may_differ_in_a_coefficient(name: str) -> None:
    """Every float of the configuration can be a list; a lane then equals a run with its value."""
    store = make_toy(512, dtype=torch.float64)
    config = inspect.signature(make(name, store).Config).parameters
    for key, parameter in config.items():
        if not isinstance(parameter.default, float) or parameter.default <= 0:
            continue
        # A list of coefficients becomes a float32 tensor, a single one stays a Python float: take numbers that are both.
        values = torch.tensor([parameter.default, parameter.default * 0.7]).tolist()
        both = make(name, store, seeds=(1, 1), **{key: values})
        advance(both, store, 6)
        for lane, value in enumerate(values):
            one = make(name, store, seeds=(1,), **{key: value})
            advance(one, store, 6)
            for (path, many), single in zip(both.state_dict().items(), one.state_dict().values()):
                if many.ndim and many.shape[0] == 2 and single.ndim == many.ndim:
                    torch.testing.assert_close(many[lane], single[0], rtol=1e-10, atol=1e-10, msg=f"{key} {path}")


@every_agent
def test_resume_is_exact(name: str, toy: OfflineDataset, tmp_path: Path) -> None:
    through, first, second = (make(name, toy, seeds=(0, 9)) for _ in range(3))
    advance(through, toy, 25)
    advance(first, toy, 11)
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, first, {"step": 11})
    tensors, metadata = checkpoint.load(path)
    checkpoint.restore(second, tensors, path)
    advance(second, toy, 14, start=metadata["step"])
    assert distance(through, second) == 0


@every_agent
def test_bursts_of_any_size_give_the_same_numbers(name: str, toy: OfflineDataset) -> None:
    one, many = make(name, toy), make(name, toy)
    advance(one, toy, 30)
    engine, step = Eager(many, loader(many, toy)), 0
    for updates in (1, 2, 3, 24):
        engine.run(step, updates)
        step += updates
    assert distance(one, many) == 0


class _Recorded(CudaGraph):
    """`CudaGraph` whose graph is the very function that would be captured, run anew at each replay."""

    def _capture(self) -> None:
        this = self

        class Graph:
            def replay(self) -> None:
                with _NoHostCopy():
                    this.metrics = this._updates()

        self.graph = Graph()  # type: ignore[assignment]


class _NoHostCopy(TorchDispatchMode):
    """Refuses what a captured graph can't hold: values read by the host and shapes that depend on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in self.FORBIDDEN), f"{func} in an update: the graph can't hold it"
        return func(*args, **(kwargs or {}))


@every_agent
def test_captured_updates_equal_eager_ones(name: str, toy: OfflineDataset) -> None:
    """The graph's body, replayed without a GPU: same numbers, no host copy, odd starts and rests included."""
    eager, captured = make(name, toy), make(name, toy)
    advance(eager, toy, 43)
    engine = _Recorded(captured, loader(captured, toy), updates_per_launch=5)
    step = 0
    for updates in (1, 2, 37, 3):
        metrics = engine.run(step, updates)
        step += updates
    assert metrics
    # One batch at a time instead of a chunk changes no draw, and the arithmetic is the same.
    assert distance(eager, captured) == 0


@pytest.mark.cuda
@every_agent
def test_cuda_graph_equals_eager_on_the_gpu(name: str) -> None:
    store = make_toy().to("cuda")
    pair = []
    for engine in ("eager", "cudagraph"):
        spec = Spec(store.obs_dim, store.action_dim, (0, 1), *store.observation_statistics(), device="cuda")
        agent = make_agent({"_target_": SETTINGS[name]._target_, **small(name)}, spec)
        agent.setup(store)
        make_engine(engine, agent, loader(agent, store), updates_per_launch=8).run(0, 101)
        pair.append(agent)
    assert distance(*pair) == 0


@compiled_agents
def test_compiled_equals_eager(name: str, toy: OfflineDataset) -> None:
    """Fused kernels round differently: 1e-7 an update, and Adam's first steps can turn that into a learning rate, 3e-4."""
    eager, compiled = make(name, toy), make(name, toy)
    updates = eager.pretrain_updates + 4
    metrics = advance(eager, toy, updates)
    others = make_engine("compile", compiled, loader(compiled, toy)).run(0, updates)
    for key, value in metrics.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-5)
    assert distance(eager, compiled) < 3e-4


@every_agent
def test_learns_from_synthetic_rows_too(name: str, toy: OfflineDataset, tmp_path: Path) -> None:
    """Half of each batch from trajectories guided by the agent, made anew on the way; no row of the dataset (index -1)."""
    agent = make(name, toy, seeds=(0, 1))
    if "return_to_go" in agent.batch_fields:  # pieces of episodes have none
        with pytest.raises(OffrlError, match="set augment=none"):
            check_agent(agent)
        return
    guided = "offrl.augment.policy_guided.PolicyGuidedDiffusion"
    denoiser = {"features": 16, "blocks": 2, "window": 4, "updates": 5}
    settings = {"_target_": guided, "transitions": 24, "length": 3, "denoiser": denoiser, "sampling": {"steps": 4}}
    source = (toy, Uniform(toy))
    synthetic = Synthetic(make_augmentation(settings, toy, (0, 1)), source, (1.0, 0.0), tmp_path)
    data = BatchLoader(synthetic.sources, 32, agent.window, agent.batch_fields)
    synthetic.begin(data, agent, 0)
    engine = Eager(agent, data)
    engine.run(0, 5)
    synthetic.refresh(agent, synthetic.every)
    metrics = engine.run(5, 5)
    assert metrics
    assert all(m.isfinite().all() for m in metrics.values())
    assert all(v.isfinite().all() for v in agent.state_dict().values())


@every_agent
def test_no_gradient_is_left_behind(name: str, toy: OfflineDataset) -> None:
    """Gradients are taken of what is optimised and nothing accumulates."""
    agent = make(name, toy)
    advance(agent, toy, agent.pretrain_updates + agent.period)
    assert all(p.grad is None for p in agent.parameters())


@every_agent
def test_learns_the_toy_task(name: str) -> None:
    """The behaviour is the optimum plus noise of standard deviation 0.46; every method should find its middle."""
    store = make_toy(8192)
    rates = {f.name: 1e-3 for f in fields(make(name, store).Config) if f.name.endswith("lr")}
    wide = {key: [64, 64] for key in small(name) if key.endswith("hidden")}
    agent = make(name, store, seeds=(0, 1), **rates, **wide, **TOY.get(name, {}))
    advance(agent, store, 1000, batch=128)
    test = make_toy(2048, seed=1).observations.expand(2, -1, -1)
    error = (agent.select_action(test) - best_action(test)).square().mean((-2, -1)).sqrt()
    assert error.max() < 0.1, error


@every_agent
def test_a_copy_acts_alike_and_carries_no_dataset(name: str, toy: OfflineDataset) -> None:
    """Evaluation copies the policy, between processes too; the dataset stays where it is."""
    agent = make(name, toy, seeds=(0, 1))
    advance(agent, toy, 10)
    for twin in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        obs = toy.observations[:32].expand(2, -1, -1)
        assert torch.equal(twin.select_action(obs), agent.select_action(obs))
        assert twin.dataset_index is None


@every_agent
def test_saved_and_loaded_acts_alike(name: str, toy_file: Path, tmp_path: Path) -> None:
    settings = {"_target_": SETTINGS[name]._target_, **small(name)}
    result = train(
        {
            "agent": settings,
            "dataset": str(toy_file),
            "out": str(tmp_path / "runs"),
            "updates": 20,
            "batch_size": 16,
            "lanes": 2,
            "progress": False,
            "eval": {"every": 0, "final_episodes": 0},
        }
    )
    once, twice = load_agent(result.folder), load_agent(result.folder / checkpoint.NAME)
    obs = make_toy(64).observations.expand(2, -1, -1)
    assert torch.equal(once.select_action(obs), twice.select_action(obs))
    fresh = make(name, make_toy(), seeds=(0, 1))
    advance(fresh, make_toy(), 20, batch=16)
    # float32 statistics of the file's observations equal those in memory, so the runs are the same.
    assert torch.equal(once.select_action(obs), fresh.select_action(obs))
