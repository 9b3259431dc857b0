"""Engines: what they refuse, how they cut the work, and the option of half precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import best_action, make_toy
from torch import Tensor

from offrl.agents.base import Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.data.batch import Batch
from offrl.data.dataset import OfflineDataset
from offrl.nets import tape
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Compiled, CudaGraph, Eager, Native, Taped, in_one_stage, make_engine, noted_engine
from offrl.utils.errors import OffrlError


def agent_of(store: OfflineDataset, seeds: Sequence[int] = (0, 1), **settings: Any) -> TD3BC:
    spec = Spec(store.obs_dim, store.action_dim, tuple(seeds), *store.observation_statistics())
    return TD3BC(spec, TD3BCConfig(**{"hidden": (32, 32), **settings}))


def replay_of(store: OfflineDataset, batch: int = 32) -> BatchLoader:
    return BatchLoader([(store, Uniform(store), 1.0)], batch)


class Recorder(TD3BC):
    """Notes what each update was given instead of learning; `value` is the update's number."""

    def build(self) -> None:
        super().build()
        self.seen: list[tuple[int, int, Tensor]] = []

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        self.seen.append((int(self.random.step), phase, batch.index.clone()))
        noise = self.random.normal("noise", batch.reward)
        return {f"phase{phase}": noise.sum(-1), "value": self.random.step.expand(2).double()}


def recorder(store: OfflineDataset) -> Recorder:
    spec = Spec(store.obs_dim, store.action_dim, (0, 1))
    return Recorder(spec, TD3BCConfig(hidden=(4,)))


# ---- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jit", "", "Eager"])
def test_unknown_engines_are_refused(name: str, toy: OfflineDataset) -> None:
    with pytest.raises(
        OffrlError, match=f"engine={name} is unknown; choose auto, eager, taped, native, compile or cudagraph"
    ):
        make_engine(name, agent_of(toy), replay_of(toy))


def test_a_graph_needs_a_gpu(toy: OfflineDataset) -> None:
    with pytest.raises(OffrlError, match="engine=cudagraph needs device=cuda"):
        make_engine("cudagraph", agent_of(toy), replay_of(toy))


def test_automatic_choice_on_a_cpu_compiles_no_update(toy: OfflineDataset) -> None:
    assert type(make_engine("auto", agent_of(toy), replay_of(toy))) in (Taped, Native)
    assert type(make_engine("compile", agent_of(toy), replay_of(toy))) is Compiled


def test_unknown_precisions_are_refused(toy: OfflineDataset) -> None:
    with pytest.raises(OffrlError, match="precision=float16 is unknown; choose float32 or bfloat16"):
        make_engine("eager", agent_of(toy), replay_of(toy), precision="float16").run(0, 1)


def test_a_run_that_goes_on_with_another_engine_says_so(
    toy: OfflineDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.json"
    taped = make_engine("taped", agent_of(toy), replay_of(toy))
    deep = '{"table_rows": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for written in (
        None,
        "{",
        "[]",
        deep,
        '{"engine": "taped"}',
        '{"engine": "eager"}',
    ):  # eager's numbers are the same
        if written is not None:
            manifest.write_text(written)
        assert noted_engine(taped, manifest) == "taped"
    assert capsys.readouterr().err == ""
    manifest.write_text('{"engine": "native"}')
    assert noted_engine(taped, manifest) == "taped"
    assert "began with engine=native and goes on with engine=taped" in capsys.readouterr().err


# ---- tapes ----------------------------------------------------------------------------------------------------


class OutsidePyTorch(TD3BC):
    """Its actor's loss goes through NumPy, which no tape sees."""

    def policy_regularizer(self, batch: Batch, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        nearest = torch.from_numpy(np.sign(batch.action.numpy()))
        return (action - nearest).square().mean((-2, -1)), {}


class ReadsAValue(TD3BC):
    def critic_loss(self, batch: Batch) -> Tensor:
        return super().critic_loss(batch) * (2.0 if float(batch.reward.mean()) > 0 else 1.0)


@pytest.mark.parametrize(
    ("cls", "faithful"), [(TD3BC, [True, True]), (OutsidePyTorch, [False, True]), (ReadsAValue, [False] * 2)]
)
def test_only_faithful_tapes_are_played(cls: type[TD3BC], faithful: list[bool], toy: OfflineDataset) -> None:
    """The numbers are eager's to the bit whether an update can be played or not."""
    agents = []
    for engine_class in (Eager, Taped):
        spec = Spec(toy.obs_dim, toy.action_dim, (0, 1), *toy.observation_statistics())
        agents.append(cls(spec, TD3BCConfig(hidden=(16, 16))))
        engine = engine_class(agents[-1], replay_of(toy))
        if isinstance(engine, Taped):
            assert engine.tapes == (cls is TD3BC)  # another's agent is not played unasked
            engine.tapes = True
        metrics = [engine.run(0, 9), engine.run(9, 3)]
        kept = metrics[0]["critic_loss"].clone()
        engine.run(12, 4)
        assert torch.equal(metrics[0]["critic_loss"], kept)  # later updates do not write into what was returned
    assert sorted(bool(take.faithful) for take in engine.takes.values()) == faithful
    assert all(torch.equal(a, b) for a, b in zip(agents[0].state_dict().values(), agents[1].state_dict().values()))


def test_a_tape_that_would_hold_much_memory_is_given_up(toy: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_MOST_BYTES", 10_000)
    engine = Taped(agent_of(toy), replay_of(toy))
    engine.run(0, 6)
    assert [take.faithful for take in engine.takes.values()] == [False, False]
    assert not any(take.tape.calls for take in engine.takes.values())


def test_what_is_invalid_is_recorded_again(toy: OfflineDataset) -> None:
    """A setting that changed in Python is on no old tape."""
    one, two = agent_of(toy), agent_of(toy)
    for agent, engine in ((one, Eager(one, replay_of(toy))), (two, Taped(two, replay_of(toy)))):
        engine.run(0, 10)
        agent.cfg.tau = 0.5
        engine.invalidate()
        engine.run(10, 10)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


# ---- how the work is cut --------------------------------------------------------------------------------------


def test_each_update_is_made_once_with_its_own_number_phase_and_rows(toy: OfflineDataset) -> None:
    """Whatever the chunks: update n sees number n, phase (n - 1) mod period, and the rows that the sampler gives n."""
    agent = recorder(toy)
    engine = Eager(agent, replay_of(toy, 16))
    step = 0
    for updates in (1, 5, 100, 2):
        metrics = engine.run(step, updates)
        step += updates
        assert (metrics["value"] == step).all()
    assert [number for number, _, _ in agent.seen] == list(range(1, 109))
    assert [phase for _, phase, _ in agent.seen] == [n % 2 for n in range(108)]
    for number, _, index in agent.seen:
        expected = Uniform(toy).draw(agent.random, torch.tensor([number]), 16, "sampler/0")[0]
        assert torch.equal(index, expected)


def test_chunks_are_bounded_and_keep_their_numbers(toy: OfflineDataset) -> None:
    """Small batches are drawn many at once, large ones one by one; both train alike."""
    small = Eager(agent_of(toy), replay_of(toy, 4))
    small.run(0, 3)
    large = Eager(agent_of(toy), replay_of(toy, 20_000))
    large.run(0, 1)
    assert large.chunk == 1 < small.chunk <= 64
    one, many = agent_of(toy), agent_of(toy)
    single, chunked = Eager(one, replay_of(toy)), Eager(many, replay_of(toy))
    single.chunk = 1
    first, second = single.run(0, 70), chunked.run(0, 70)
    assert chunked.chunk > 1
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values()))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_metrics_are_the_last_of_each_kind(toy: OfflineDataset) -> None:
    """Those of the delayed actor stay from its last update."""
    agent = recorder(toy)
    engine = Eager(agent, replay_of(toy, 8))
    metrics = engine.run(0, 7)
    noise = {}
    for step in (6, 7):
        agent.random.look_ahead(step, 0)
        noise[(step - 1) % 2] = agent.random.normal("noise", torch.empty(2, 8)).sum(-1)
    assert torch.equal(metrics["phase0"], noise[0])
    assert torch.equal(metrics["phase1"], noise[1])


def test_no_updates_change_nothing(toy: OfflineDataset) -> None:
    agent = agent_of(toy)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    assert Eager(agent, replay_of(toy)).run(5, 0) == {}
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())


@pytest.mark.parametrize(("per_launch", "size"), [(1, 2), (5, 6), (16, 16)])
def test_a_graph_holds_whole_periods_and_replays_as_often_as_it_fits(
    per_launch: int, size: int, toy: OfflineDataset
) -> None:
    agent = recorder(toy)
    engine = CountedGraph(agent, replay_of(toy, 8), updates_per_launch=per_launch)
    assert engine.size == size
    step = 0
    for updates in (1, 2, 101, 3):
        engine.run(step, updates)
        step += updates
    # One update to an even number, two periods outside the graph before it is captured, then whole graphs.
    warm_up = 1 + 2 + 1 + 4
    whole = (104 - warm_up) // size
    assert engine.replays == whole + (3 // size)
    assert [number for number, _, _ in agent.seen] == list(range(1, 108))
    assert [phase for _, phase, _ in agent.seen] == [n % 2 for n in range(107)]


class CountedGraph(CudaGraph):
    """`CudaGraph` without a GPU: its graph is the function that would be captured, called at each replay."""

    replays = 0

    def _capture(self) -> None:
        this = self

        class Graph:
            def replay(self) -> None:
                this.replays += 1
                this.metrics = this._updates()

        self.graph = Graph()  # type: ignore[assignment]


# ---- half precision -------------------------------------------------------------------------------------------


def test_bfloat16_products_stay_close_to_float32(toy: OfflineDataset) -> None:
    """Products carry 8 bits: after a few updates losses agree to a percent or so, and all that is kept is float32."""
    full, half = agent_of(toy), agent_of(toy)
    metrics = make_engine("eager", full, replay_of(toy, 256)).run(0, 6)
    others = make_engine("eager", half, replay_of(toy, 256), precision="bfloat16").run(0, 6)
    assert all(v.dtype == torch.float32 for v in half.state_dict().values())
    for name in ("critic_loss", "bc_loss"):
        torch.testing.assert_close(others[name].float(), metrics[name], rtol=0.03, atol=0)
        assert not torch.equal(others[name].float(), metrics[name])
    # Adam's first steps are about a learning rate long whatever the gradient's size: six of them bound the distance.
    for key, value in full.state_dict().items():
        if "actor.mlp" in key or "critics.mlp" in key:
            assert (half.state_dict()[key] - value).abs().max() < 12 * 3e-4
    moved = agent_of(toy)
    key = "actor.mlp.weights.0"
    drift = (full.state_dict()[key] - moved.state_dict()[key]).norm()
    assert (half.state_dict()[key] - full.state_dict()[key]).norm() < 0.2 * drift


def test_bfloat16_learns_the_toy_task_as_float32_does() -> None:
    """The distance from the optimum after 400 updates, 0.36 at the start, agrees to a few percent."""
    store = make_toy(4096)
    test = make_toy(2048, seed=1).observations.expand(2, -1, -1)
    errors = []
    for precision in ("float32", "bfloat16"):
        agent = agent_of(store, actor_lr=1e-3, critic_lr=1e-3)
        make_engine("eager", agent, replay_of(store, 64), precision=precision).run(0, 400)
        errors.append((agent.select_action(test) - best_action(test)).square().mean((-2, -1)).sqrt())
    assert errors[0].max() < 0.2
    torch.testing.assert_close(errors[1], errors[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("period", [1, 2, 5])
def test_a_burst_ends_with_its_stage(period: int) -> None:
    """Beside a search period by period, for every start and end of a stage."""

    class Staged(SimpleNamespace):
        def phase(self, step: int) -> int:
            return 100 * sum(step >= end for end in (13, 30)) + step % self.period

    agent: Any = Staged(period=period)
    for step in range(0, 40, period):
        kinds = [tuple(agent.phase(first + i) for i in range(period)) for first in range(step, step + 60, period)]
        same = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
        for updates in (period, 3 * period, 10 * period, 60):
            assert in_one_stage(agent, step, updates) == min(updates, same * period)
