"""What every agent must do.

Agents are found from conf/agent/, and from the configuration folder that OFFRL_CONFIG_DIR names: a new yaml there is tested
without another edit. `make contract AGENT=NAME CONFIG_DIR=DIR` tests one.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import best_action, best_choice, make_discrete_toy, make_toy, tiny, write_toy
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from offrl.agents.base import Agent, Spec
from offrl.augment.base import Synthetic, check_agent, make_augmentation
from offrl.data.dataset import OfflineDataset
from offrl.nets import Adam, TanhGaussianActor, kernels
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import CudaGraph, Eager, Native, Taped, make_engine
from offrl.training.runs import load_agent, make_agent
from offrl.training.trainer import train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir, use_config_dir

FOLDERS = [conf_dir(), *map(use_config_dir, filter(None, [os.environ.get("OFFRL_CONFIG_DIR")]))]
SETTINGS = {p.stem: OmegaConf.load(p) for folder in FOLDERS for p in sorted((folder / "agent").glob("*.yaml"))}
# Agents that see encodings, as docs/observation_histories.md lists them.
ENCODED = ["iql", "cql", "discrete_cql", "td3_bc", "a2pr", "awac", "rebrac", "sac_n", "edac", "rlpd", "dql"]
ENCODED += ["mopo", "combo", "mobile"]
BURSTS = (1, 2, 17, 2)  # updates of one call of an engine: odd starts, and rests that fill no graph


@pytest.fixture(scope="module", params=SETTINGS)
def name(request: pytest.FixtureRequest) -> str:
    """The agents, one after another: what is made for one of them serves all its tests."""
    return request.param


@pytest.fixture(scope="module")
def trained(name: str) -> Trained:
    """An agent of two lanes after an undisturbed run; tests read it and change nothing."""
    agent = make(name, toy_of(name), seeds=(0, 9))
    before = copy.deepcopy(agent.state_dict())
    return Trained(agent, before, advance(agent, toy_of(name), agent.pretrain_updates + sum(BURSTS)))


@pytest.fixture
def toy(name: str) -> OfflineDataset:
    return toy_of(name)


def toy_of(name: str, rows: int = 4096, dtype: torch.dtype = torch.float32, seed: int = 0) -> OfflineDataset:
    """The toy task, with integer actions for an agent that takes no others."""
    make = make_toy if agent_class(name).takes_continuous else make_discrete_toy
    return make(rows, dtype=dtype, seed=seed)


class Trained(NamedTuple):
    agent: Agent
    before: dict[str, torch.Tensor]
    metrics: dict[str, torch.Tensor]


def make(name: str, store: OfflineDataset, seeds: Sequence[int] = (0,), **settings: Any) -> Agent:
    target = SETTINGS[name]._target_
    discrete = store.info.discrete is not None
    spec = Spec(store.obs_dim, store.action_dim, tuple(seeds), *store.observation_statistics(), discrete=discrete)
    agent = make_agent({"_target_": target, **small(name), **settings}, spec).to(store.rewards.dtype)
    agent.setup(store)
    return agent


def agent_class(name: str) -> Any:
    return get_class(SETTINGS[name]._target_)


def small(name: str) -> dict[str, Any]:
    return tiny(agent_class(name))


def loader(agent: Agent, store: OfflineDataset, batch: int = 32) -> BatchLoader:
    return BatchLoader([(store, Uniform(store), 1.0)], batch, agent.window, agent.batch_fields, agent.window_before)


def advance(
    agent: Agent, store: OfflineDataset, updates: int, start: int = 0, batch: int = 32
) -> dict[str, torch.Tensor]:
    return Eager(agent, loader(agent, store, batch)).run(start, updates)


def distance(a: Agent, b: Agent) -> float:
    """Largest difference of any tensor of the two agents' states."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    return max((mine[k] - theirs[k]).abs().max().item() for k in mine)


def finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors.values())


def test_runs_and_stays_finite(trained: Trained, toy: OfflineDataset) -> None:
    agent, before, metrics = trained
    assert metrics
    assert all(m.shape == (2,) for m in metrics.values())
    assert finite(metrics)
    assert finite(agent.state_dict())
    assert any(not torch.equal(before[k], v) for k, v in agent.state_dict().items())
    action = agent.select_action(toy.observations[:7].expand(2, 7, -1))
    assert action.shape == (2, 7, *toy.actions.shape[1:])
    assert action.abs().max() <= (toy.info.discrete or 2) - 1


@pytest.mark.parametrize("box", [(-0.01, 0.02), (-0.5, 2.0)], ids=str)
def test_actions_stay_in_their_box(name: str, toy: OfflineDataset, box: tuple[float, float]) -> None:
    """Also where states are far from the data's; and the narrow box is filled."""
    if not agent_class(name).takes_continuous:
        return
    spec = Spec(3, 2, (0, 1), *toy.observation_statistics(), *box)
    agent = make_agent({"_target_": SETTINGS[name]._target_, **small(name)}, spec)
    agent.setup(toy)
    action = agent.select_action(1e3 * toy.observations[:500].expand(2, 500, -1))
    assert action.min() >= box[0]
    assert action.max() <= box[1]
    assert action.max() - action.min() > 0.5 * (box[1] - box[0]) or box[1] > 1


def test_discrete_actions_are_taken_or_refused(name: str) -> None:
    cls = agent_class(name)
    settings, spec = {"_target_": SETTINGS[name]._target_, **small(name)}, Spec(3, 4, (0, 1), discrete=True)
    if cls.takes_discrete:
        action = make_agent(settings, spec).select_action(torch.randn(2, 7, 3))
        assert action.dtype == torch.int64
        assert action.shape == (2, 7)
    else:
        names = "bc, discrete_cql, doc, dt, esper, iql, rvs, vae_bc"
        with pytest.raises(OffrlError, match=rf"needs continuous actions; for integer ones choose agent={names}\."):
            make_agent(settings, spec)
    if not cls.takes_continuous:
        with pytest.raises(OffrlError, match="needs integer actions; for continuous ones choose agent="):
            make_agent(settings, replace(spec, discrete=False))


@pytest.mark.parametrize("rate", [1.0, 1.5, -0.5, 0.999999, [1.0, 0.1]], ids=str)
def test_a_dropout_that_leaves_nothing_is_refused(name: str, rate: Any) -> None:
    """Of one lane or of all; 1 - 2^-16 is the largest rate that the sixteen random bits of an element can tell from 1."""
    store, first = toy_of(name, 64), rate[0] if isinstance(rate, list) else rate
    if not hasattr(agent_class(name).Config(), "dropout"):
        return
    with pytest.raises(OffrlError, match=rf"^agent\.dropout={first:g} should be at least 0 and below 1"):
        make(name, store, (0, 1), dropout=rate)


def test_an_empty_list_of_widths_is_a_network_without_hidden_layers_or_refused(name: str) -> None:
    store = toy_of(name, 256)
    for width in (key for key in small(name) if key.endswith("hidden")):
        if (name, width) in (("vae_bc", "hidden"), ("doc", "hidden"), ("esper", "label_hidden")):
            with pytest.raises(OffrlError, match=rf"^agent\.{width}=\[\] should name the width of one hidden layer"):
                make(name, store, (0, 1), **{width: []})
            continue
        agent = make(name, store, (0, 1), **{width: []})
        advance(agent, store, agent.pretrain_updates + 2 * agent.period)
        assert finite(agent.state_dict())
        assert agent.select_action(store.observations[:7].expand(2, 7, -1)).shape[:2] == (2, 7)


def test_critics_teach_an_encoder_of_histories(name: str) -> None:
    """Without a bisimulation loss, in every agent that histories take; the others are refused in a sentence."""
    store = toy_of(name, 256)
    spec = Spec(store.obs_dim, store.action_dim, (0, 1), discrete=store.info.discrete is not None)
    history = {"encoder": "gru", "length": 2, "burn_in": 1, "latent": 4, "hidden": 8, "models": False}
    settings = {"_target_": SETTINGS[name]._target_, **small(name)}
    try:
        agent: Any = make_agent(settings, spec, history)
    except OffrlError as error:
        if name in ENCODED or "; set history=none" not in str(error):
            raise
        return
    agent.setup(store)
    before = copy.deepcopy(agent.encoder.state_dict())
    advance(agent, store, 2 * agent.period + 2, batch=8)
    after = agent.encoder.state_dict()
    changes = {key: float((after[key] - before[key]).detach().abs().flatten(1).amax(1).min()) for key in before}
    assert max(changes.values()) > 1e-5, changes  # of each lane; Adam's steps are 3e-4


def test_lanes_equal_separate_runs(name: str) -> None:
    """In float64 the lanes of one run differ from runs of one lane by rounding alone."""
    store = toy_of(name, 512, dtype=torch.float64)
    together = make(name, store, seeds=(5, 6, 7))
    updates = together.pretrain_updates + 8
    advance(together, store, updates)
    for lane, seed in enumerate((5, 6, 7)):
        alone = make(name, store, seeds=(seed,))
        advance(alone, store, updates)
        for (key, many), one in zip(together.state_dict().items(), alone.state_dict().values()):
            if many.shape != one.shape:  # shared between lanes: statistics, step counts
                torch.testing.assert_close(many[lane], one[0], rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("which", ["all", "even", "odd"])
def test_lanes_may_differ_in_coefficients(name: str, which: str) -> None:
    """Floats of the configuration can be lists, next to single ones and to other lists; a lane then equals a run of its own."""
    store = toy_of(name, 512, dtype=torch.float64)
    config = agent_class(name).Config()
    floats = [f.name for f in fields(config) if isinstance(f.default, float) and f.default > 0]
    floats = {"all": floats, "even": floats[0::2], "odd": floats[1::2]}[which]
    # A list of coefficients becomes a float32 tensor, a single one stays a Python float: take numbers that are both.
    values = {key: torch.tensor([x := getattr(config, key), 0.7 * x]).tolist() for key in floats}
    both = make(name, store, seeds=(1, 1), **values)
    updates = both.pretrain_updates + 4
    advance(both, store, updates)
    for lane in range(2):
        one = make(name, store, seeds=(1,), **{key: value[lane] for key, value in values.items()})
        advance(one, store, updates)
        for (path, many), single in zip(both.state_dict().items(), one.state_dict().values()):
            if many.ndim and many.shape[0] == 2 and single.ndim == many.ndim:
                torch.testing.assert_close(many[lane], single[0], rtol=1e-10, atol=1e-10, msg=f"{floats}: {path}")


def test_resume_is_exact(name: str, trained: Trained, toy: OfflineDataset, tmp_path: Path) -> None:
    first, second = (make(name, toy, seeds=(0, 9)) for _ in range(2))
    whole = trained.agent.pretrain_updates + sum(BURSTS)
    part = whole // 2 | 1  # within a period, if the agent has one
    advance(first, toy, part)
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, first, {"step": part})
    tensors, metadata = checkpoint.load(path)
    checkpoint.restore(second, tensors, path)
    advance(second, toy, whole - part, start=metadata["step"])
    assert distance(trained.agent, second) == 0


def bursts(agent: Agent) -> tuple[int, ...]:
    """As many updates as those of `trained`: a stage before the policy's begins with the first burst and ends within one."""
    first, second, third, last = BURSTS
    return first, second, agent.pretrain_updates + third, last


def test_bursts_of_any_size_give_the_same_numbers(name: str, trained: Trained, toy: OfflineDataset) -> None:
    agent = make(name, toy, seeds=(0, 9))
    engine, step = Eager(agent, loader(agent, toy)), 0
    for updates in bursts(agent):
        engine.run(step, updates)
        step += updates
    assert distance(trained.agent, agent) == 0


class _Recorded(CudaGraph):
    """`CudaGraph` whose graph is the very function that would be captured, run anew at each replay."""

    replays = 0

    def _capture(self) -> None:
        this = self

        class Graph:
            def replay(self) -> None:
                this.replays += 1
                with _NoHostCopy():
                    this.metrics = this._updates()

        self.graph = Graph()  # type: ignore[assignment]


class _NoHostCopy(TorchDispatchMode):
    """Refuses what a captured graph can't hold: values read by the host and shapes that depend on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in self.FORBIDDEN), f"{func} in an update: the graph can't hold it"
        return func(*args, **(kwargs or {}))


def test_captured_updates_equal_eager_ones(name: str, trained: Trained, toy: OfflineDataset) -> None:
    """The graph's body, replayed without a GPU: same numbers, no host copy, odd starts and rests included."""
    agent = make(name, toy, seeds=(0, 9))
    engine = _Recorded(agent, loader(agent, toy), updates_per_launch=5)
    step = 0
    for updates in bursts(agent):
        metrics = engine.run(step, updates)
        step += updates
    assert metrics
    assert engine.replays >= 2
    # One batch at a time instead of a chunk changes no draw, and the arithmetic is the same.
    assert distance(trained.agent, agent) == 0


@pytest.mark.slow
def test_taped_updates_equal_eager_ones(name: str, trained: Trained, toy: OfflineDataset) -> None:
    """To the bit, with odd starts and changing phases; PRDC looks neighbours up outside PyTorch."""
    agent = make(name, toy, seeds=(0, 9))
    engine, step, metrics = Taped(agent, loader(agent, toy)), 0, {}
    for updates in bursts(agent):
        metrics |= engine.run(step, updates)
        step += updates
    assert distance(trained.agent, agent) == 0
    assert metrics.keys() == trained.metrics.keys()
    assert all(torch.equal(metrics[key], value) for key, value in trained.metrics.items())
    takes = {phase: take.faithful for phase, take in engine.takes.items() if take.faithful is not None}
    assert takes
    assert all(takes.values()), takes


@pytest.mark.slow
def test_programs_equal_what_they_stand_for(compiled: None, name: str, toy: OfflineDataset) -> None:
    """`Native` joins a tape's operations to programs; beside the agent's own update with the same kernels, to the bit."""
    eager, native = make(name, toy, seeds=(0, 9)), make(name, toy, seeds=(0, 9))
    updates = eager.pretrain_updates + 4 * eager.period
    with kernels.in_use():
        advance(eager, toy, updates)
    engine = Native(native, loader(native, toy))
    engine.run(0, updates)
    assert distance(eager, native) == 0
    takes = {phase: take.faithful for phase, take in engine.takes.items() if take.faithful is not None}
    assert takes
    assert all(takes.values()), takes


@pytest.mark.cuda
def test_cuda_graph_equals_eager_on_the_gpu(name: str) -> None:
    store = toy_of(name).to("cuda")
    pair = []
    for engine in ("eager", "cudagraph"):
        numbers, discrete = store.observation_statistics(), store.info.discrete is not None
        spec = Spec(store.obs_dim, store.action_dim, (0, 1), *numbers, discrete=discrete, device="cuda")
        agent = make_agent({"_target_": SETTINGS[name]._target_, **small(name)}, spec)
        agent.setup(store)
        make_engine(engine, agent, loader(agent, store), updates_per_launch=8).run(0, 101)
        pair.append(agent)
    assert distance(*pair) == 0


def compiled_equals_eager(name: str, toy: OfflineDataset) -> None:
    """Fused kernels round differently: 1e-7 an update, and Adam's first steps can turn that into a learning rate, 3e-4."""
    eager, compiled = make(name, toy), make(name, toy)
    updates = eager.pretrain_updates + 4
    metrics = advance(eager, toy, updates)
    others = make_engine("compile", compiled, loader(compiled, toy)).run(0, updates)
    for key, value in metrics.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-5)
    assert distance(eager, compiled) < 3e-4


# A C++ compiler takes half a minute to two an agent, in `make test-slow`. In the quick suite an update of two kinds is
# traced as for the compiler and goes no further.
def test_traced_updates_of_two_kinds_equal_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled_equals_eager("td3_bc", make_toy())


@pytest.mark.slow
def test_compiled_equals_eager(name: str, toy: OfflineDataset) -> None:
    compiled_equals_eager(name, toy)


def test_learns_from_synthetic_rows_too(name: str, toy: OfflineDataset, tmp_path: Path) -> None:
    """Half of each batch from trajectories guided by the agent, made anew on the way; no row of the dataset (index -1)."""
    if toy.info.discrete:  # refused: synthetic actions are continuous
        return
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
    data = BatchLoader(synthetic.sources, 32, agent.window, agent.batch_fields, agent.window_before)
    synthetic.begin(data, agent, 0)
    engine = Eager(agent, data)
    engine.run(0, 5)
    synthetic.refresh(agent, synthetic.every)
    metrics = engine.run(5, 5)
    assert metrics
    assert finite(metrics)
    assert finite(agent.state_dict())


def test_metrics_do_not_grow_with_the_batch(name: str, toy: OfflineDataset) -> None:
    """They are means over rows: a sum over eight times as many would be eight times as large.

    Means of different rows differ, those of contrastive losses by the log of the batch's size; none by half of eight times.
    """
    agents = [make(name, toy, seeds=(0, 9)) for _ in range(2)]
    updates = agents[0].pretrain_updates + 2  # those of delayed actors, too
    few, many = (advance(agent, toy, updates, batch=batch) for agent, batch in zip(agents, (32, 256)))
    for key, value in few.items():
        assert value.shape == (2,)
        small, large = float(value.double().mean()), float(many[key].double().mean())
        assert abs(large - small) < 0.75 * max(abs(large), abs(small)) + 0.05, (key, small, large)


def test_a_temperature_starts_at_one(trained: Trained) -> None:
    """As SAC's authors have it; the step tests copy what is there."""
    assert not trained.before.get("log_alpha", torch.zeros(2)).any()


def test_entropy_is_that_of_the_policy(name: str, toy: OfflineDataset) -> None:
    """Of a squashed Gaussian so narrow that squashing changes next to nothing: log(std sqrt(2 pi e)) for each dimension."""
    agent: Any = make(name, toy)
    if not isinstance(getattr(agent, "actor", None), TanhGaussianActor):
        return
    with torch.no_grad():
        agent.actor.mlp.weights[-1].zero_()
        agent.actor.mlp.biases[-1][..., : toy.action_dim] = 0.0
        agent.actor.mlp.biases[-1][..., toy.action_dim :] = -3.0
    law = agent.actor(agent.normalize(toy.observations[:1].unsqueeze(0)))
    assert law.log_std.max() < -2
    expected = float((law.log_std + 0.5 * np.log(2 * np.pi * np.e)).sum().detach())
    entropy = float(Taped(agent, loader(agent, toy, 256)).run(agent.pretrain_updates, agent.period)["entropy"])
    assert entropy == pytest.approx(expected, abs=0.35)  # five standard errors of 256 samples in two dimensions


def test_no_gradient_is_left_behind(trained: Trained) -> None:
    """Gradients are taken of what is optimised and nothing accumulates."""
    assert all(p.grad is None for p in trained.agent.parameters())


def test_learns_the_toy_task(name: str) -> None:
    """The behaviour is the optimum plus noise of standard deviation 0.46; every method should find its middle.

    Of integer actions the behaviour is uniform, and at most a tenth of the policy's may be wrong.
    """
    store, config = toy_of(name, 8192), agent_class(name).Config
    rates = {f.name: 3e-3 for f in fields(config) if f.name.endswith("lr")}
    wide = {key: [64, 64] for key in small(name) if key.endswith("hidden")}
    agent = make(name, store, **(rates | wide | getattr(config, "toy", {})))
    updates = agent.pretrain_updates + 300
    Taped(agent, loader(agent, store, 64)).run(0, updates)  # eager's numbers, in less time
    for optimizer in (module for module in agent.modules() if isinstance(module, Adam)):
        optimizer.lr = 6e-4  # so that what is left is not the last batches' noise
    metrics = advance(agent, store, 60, start=updates, batch=64)
    assert finite(metrics)
    assert finite(agent.state_dict())
    test = make_toy(2048, seed=1).observations.unsqueeze(0)
    action = agent.select_action(test)
    if store.info.discrete:
        assert (action != best_choice(test)).float().mean() < 0.1
        return
    error = (action - best_action(test)).square().mean().sqrt()
    assert error < 0.1, error


def test_a_copy_acts_alike_and_carries_no_dataset(trained: Trained, toy: OfflineDataset) -> None:
    """Evaluation copies the policy, between processes too; the dataset stays where it is."""
    agent, obs = trained.agent, toy.observations[:32].expand(2, -1, -1)
    for twin in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        assert torch.equal(twin.select_action(obs), agent.select_action(obs))
        assert twin.dataset_index is None


def test_predict_is_the_evaluation_of_one_lane(trained: Trained, toy: OfflineDataset) -> None:
    """Arrays of two episodes over three timesteps, by `predict` and by `select_action` and `update_state`; and one lane alone.

    The tolerance is that of float32: a matrix product of another batch size rounds differently.
    """
    obs, rewards = toy.observations[:6].view(3, 2, 3), torch.tensor([0.5, -1.0])
    agent = copy.deepcopy(trained.agent)
    one = agent.lane(1)
    own = trained.agent.state_dict()
    assert all(torch.equal(t, own[k] if own[k].shape == t.shape else own[k][1:]) for k, t in one.state_dict().items())
    state, lone, wanted = None, None, agent.initial_state(2)
    wanted = wanted and replace(wanted, stream="")
    for step in range(3):
        action, state = agent.predict(
            obs[step].numpy(), state, None, True, lane=1, reward=rewards.numpy() if step else None
        )
        alone, lone = one.predict(obs[step, 0].numpy(), lone, None, True, reward=rewards[:1].numpy() if step else None)
        chosen = agent.select_action(obs[step].expand(2, -1, -1), wanted)
        wanted = agent.update_state(wanted, chosen, rewards.expand(2, -1))
        assert np.abs(action - chosen[1].numpy()).max() < 1e-5
        assert np.abs(alone - action[0]).max() < 1e-5


def test_rollouts_in_a_model_sample_as_acting_does(trained: Trained, toy: OfflineDataset) -> None:
    """In one state: actions of `sample_action` have the mean and the spread of those that the agent draws when it acts."""
    agent, count = copy.deepcopy(trained.agent), 4000
    if not (getattr(agent, "samples_continuous", False) and agent.samples_actions):
        pytest.skip("it draws no continuous actions")
    obs = toy.observations[:1].expand(2, count, -1)
    noise = torch.randn(2, count, agent.sample_width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = agent.within_bounds(agent.sample_action(agent.normalize(obs), noise))
    acted = agent.select_action(obs, agent.initial_state(count))
    assert drawn.shape == acted.shape == (2, count, 2)
    spread = acted.std(1)
    assert spread.min() > 0.01
    # Six standard errors: of the difference of two means, and of two stds of a law whose kurtosis is at most 5 or so.
    assert ((drawn.mean(1) - acted.mean(1)).abs() < 6 * spread * (2 / count) ** 0.5).all()
    torch.testing.assert_close(drawn.std(1), spread, rtol=0.15, atol=0)


def test_saved_and_loaded_acts_alike(name: str, tmp_path: Path) -> None:
    toy_file = write_toy(tmp_path / "toy.npz", toy_of(name))
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
    fresh = make(name, toy_of(name), seeds=(0, 1))
    advance(fresh, toy_of(name), 20, batch=16)
    # float32 statistics of the file's observations equal those in memory, so the runs are the same.
    assert torch.equal(once.select_action(obs), fresh.select_action(obs))
