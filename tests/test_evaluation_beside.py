"""Evaluation beside training (`eval.asynchronous`): the rows of evaluation in turn, whatever is killed and whenever."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import fork
from test_evaluate import INFO, Toy, agent_of, is_alive, played
from test_train import options, raw_rows, same_tensors, step_of, tensors, wait_for, words, world

from offrl.agents.base import Agent
from offrl.evaluation.beside import EvaluationProcess
from offrl.evaluation.evaluator import Evaluator
from offrl.training.compose import compose
from offrl.training.hooks import Evaluation, Hooks
from offrl.training.run_config import resolve_config
from offrl.training.trainer import train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError

__all__ = ["world"]  # a fixture
SEEN = {"every": 20, "episodes": 2, "final_episodes": 3, "workers": 1}
BESIDE = {**SEEN, "asynchronous": True}
FLOW = {"_target_": "offrl.agents.flow_bc.FlowBC", "flow_steps": 2}  # samples its actions in evaluations
DT = {"_target_": "offrl.agents.dt.DT", "embed": 8, "layers": 1, "context": 4, "target_return": -1.0, "warmup": 5}


def same_rows(mine: Path, theirs: Path) -> bool:
    return all(raw_rows(mine, kind) == raw_rows(theirs, kind) for kind in ("episodes", "metrics"))


# ---- the rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [{}, pytest.param(FLOW, marks=pytest.mark.slow)], ids=["deterministic", "sampling"])
def test_rows_and_weights_are_those_of_evaluation_in_turn(agent: dict[str, Any], world: Path) -> None:
    values = options("toy.npz", 90, agent=agent)
    in_turn = train({**values, "eval": SEEN, "out": "in_turn"})
    beside = train({**values, "eval": BESIDE, "out": "beside"})
    assert same_rows(beside.folder, in_turn.folder)
    assert same_tensors(beside.folder, in_turn.folder)
    assert (beside.scores, beside.returns) == (in_turn.scores, in_turn.returns)
    assert len(raw_rows(beside.folder, "episodes")) == 2 * (4 * 2 + 3)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_callbacks_get_the_agent_that_played(world: Path) -> None:
    """They are called late; the weights are those of the update that they name."""
    seen: list[Evaluation] = []
    values = options("toy.npz", 100, eval=BESIDE, checkpoint_every=20, keep_checkpoints=True)
    folder = train(values, Hooks(on_evaluation=seen.append)).folder
    assert [evaluation.step for evaluation in seen] == [20, 40, 60, 80, 100]
    for evaluation in seen:
        kept = checkpoint.load(folder / "checkpoints" / f"{evaluation.step:08d}.safetensors")[0]
        assert all(torch.equal(value, kept[name]) for name, value in evaluation.agent.state_dict().items())


# ---- killed and continued -------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def die_at(step: int) -> Any:
    def saved(now: int, path: Path) -> None:
        if now == step:
            raise Killed

    return saved


@pytest.mark.parametrize("resumed", [BESIDE, pytest.param(SEEN, marks=pytest.mark.slow)], ids=["beside", "in turn"])
def test_an_evaluation_that_a_checkpoint_lacks_is_played_again(
    resumed: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slowest evaluation there is: its episodes are there only when somebody waits for them."""
    values = options("toy.npz", 100, checkpoint_every=40, agent=FLOW)
    quiet = train({**values, "eval": SEEN, "out": "quiet"}).folder
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationProcess, "is_done", lambda _: False)
        with pytest.raises(Killed):
            train({**values, "eval": BESIDE}, Hooks(on_checkpoint=die_at(80)))
    folder = resolve_config(values).folder()
    assert checkpoint.metadata(folder / checkpoint.NAME)["unplayed"]
    assert {row["step"] for row in raw_rows(folder, "episodes")} == {20, 40, 60}
    assert train({**values, "eval": resumed}).status == "finished"
    assert same_rows(folder, quiet)
    assert same_tensors(folder, quiet)


@pytest.mark.slow
def test_rows_behind_their_checkpoint_appear_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the rows of a checkpoint's own evaluation were written, and before the next checkpoint."""
    values = options("toy.npz", 100, checkpoint_every=40)
    quiet = train({**values, "eval": SEEN, "out": "quiet"}).folder

    def die(evaluation: Evaluation) -> None:
        if evaluation.step == 60:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationProcess, "is_done", lambda _: False)
        with pytest.raises(Killed):
            train({**values, "eval": BESIDE}, Hooks(on_evaluation=die))
    folder = resolve_config(values).folder()
    assert step_of(folder) == 40
    assert {row["step"] for row in raw_rows(folder, "episodes")} == {20, 40, 60}
    train({**values, "eval": BESIDE})
    assert same_rows(folder, quiet)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_in_turn(world: Path) -> None:
    """SIGKILL at random moments, the same command again; no process of it is left."""
    values = options("toy.npz", 800, log_every=70, checkpoint_every=20)
    quiet = train({**values, "eval": {**SEEN, "every": 50}, "out": "quiet"})
    values |= {"eval": {**BESIDE, "every": 50, "workers": 2}, "out": "killed"}
    folder = Path("killed") / quiet.folder.relative_to("quiet")
    moments, reached = random.Random(5), [0]
    for _ in range(4):
        process = fork("train", *words(values))
        wait_for(lambda: step_of(folder) > reached[-1], process)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        reached.append(step_of(folder))
    process = fork("train", *words(values))
    assert process.wait(timeout=120) == 0
    assert same_tensors(folder, quiet.folder)
    assert same_rows(folder, quiet.folder)
    assert json.loads((folder / "result.json").read_text()) == json.loads((quiet.folder / "result.json").read_text())


# ---- the process ----------------------------------------------------------------------------------------------------


class Sleeping(Toy):
    def step(self, action: Any) -> Any:
        time.sleep(60)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_ends_when_its_owner_is_killed(workers: int) -> None:
    """In the middle of an evaluation, and with processes of its own."""
    ours, theirs = multiprocessing.Pipe()

    def own() -> None:
        agent = agent_of()
        process = EvaluationProcess(Evaluator(INFO, 2, workers, make_env=Sleeping), agent)
        process.start(agent, 0, 2, 100)
        time.sleep(0.3)
        theirs.send(process.process.pid)
        time.sleep(60)

    owner = multiprocessing.get_context("fork").Process(target=own)
    owner.start()
    child = ours.recv()
    family = [child, *map(int, Path(f"/proc/{child}/task/{child}/children").read_text().split())]
    assert len(family) == (1 if workers == 1 else 3)
    owner.kill()
    owner.join()
    deadline = time.monotonic() + 20
    while any(map(is_alive, family[:1])) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = list(filter(is_alive, family[:1]))
    for pid in filter(is_alive, family):  # the environments' own processes look up after their step, which sleeps here
        os.kill(pid, signal.SIGKILL)
    assert not left


class Failing(Toy):
    def __init__(self, home: int, how: str) -> None:
        super().__init__()
        self.home, self.how = home, how

    def reset(self, **options: Any) -> Any:
        if self.how == "kill" and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the robot fell apart")


@pytest.mark.parametrize(
    ("how", "workers", "message"),
    [
        ("raise", 1, r"beside training failed \(RuntimeError: the robot fell apart\); eval.asynchronous=false"),
        ("raise", 2, r"The evaluation environment failed \(RuntimeError: the robot fell apart\); eval.workers=1"),
        ("kill", 1, r"beside training failed \(its process was killed\)"),
    ],
)
def test_failures_are_one_sentence(how: str, workers: int, message: str) -> None:
    agent, home = agent_of(), os.getpid()
    process = EvaluationProcess(Evaluator(INFO, 2, workers, make_env=lambda: Failing(home, how)), agent)
    process.start(agent, 0, 2, 100)
    with pytest.raises(OffrlError, match=message):
        process.result()
    process.start(agent, 0, 2, 100)  # nobody listens any more
    with pytest.raises(OffrlError, match="its process was killed"):
        process.result()
    process.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_failure_stops_the_run_at_its_last_checkpoint(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = options("toy.npz", 100, checkpoint_every=30, eval=BESIDE)
    quiet = train({**values, "eval": SEEN, "out": "quiet"}).folder
    run = Evaluator.run

    def fail(self: Evaluator, agent: Agent[Any], *arguments: Any) -> Any:
        if int(agent.random.step) == 60:
            raise OffrlError("the robot fell apart.")
        return run(self, agent, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "run", fail)
        with pytest.raises(OffrlError, match="fell apart"):
            train(values)
    assert not multiprocessing.active_children()
    folder = resolve_config(values).folder()
    assert step_of(folder) in (30, 60)
    train(values)
    assert same_rows(folder, quiet)


def test_an_online_phase_is_evaluated_in_turn() -> None:
    values = options("toy.npz", online={"steps": 10}, eval=BESIDE)
    with pytest.raises(OffrlError, match=r"^eval.asynchronous=true goes with offline updates alone.*nous=false"):
        resolve_config(values)


@pytest.mark.slow
def test_a_fresh_interpreter_serves_as_well(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU in use the process can't be forked."""
    values = options("toy.npz", 50, eval=SEEN)
    in_turn = train({**values, "out": "in_turn"}).folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(world)]))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert same_rows(train({**values, "eval": BESIDE, "out": "beside"}).folder, in_turn)


@pytest.mark.cuda
def test_on_a_gpu(world: Path) -> None:
    values = options("toy.npz", 50, device="cuda", eval=SEEN)
    in_turn = train({**values, "out": "in_turn"}).folder
    assert same_rows(train({**values, "eval": BESIDE, "out": "beside"}).folder, in_turn)


@pytest.mark.slow
@pytest.mark.parametrize("history", [{}, {"encoder": "gru", "hidden": 4}, {"encoder": "window"}], ids=str)
def test_policies_with_a_history(history: dict[str, Any], world: Path) -> None:
    values = options("toy.npz", 60, history=history)
    values["agent"] = values["agent"] if history else DT
    in_turn = train({**values, "eval": SEEN, "out": "in_turn"}).folder
    assert same_rows(train({**values, "eval": BESIDE, "out": "beside"}).folder, in_turn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [{"data.task": 1}, {"data.tasks": [1, 3], "lanes": 2, "agent": "iql"}], ids=["fql", "a task a lane"]
)
def test_ogbench(extra: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ogbench")
    values = {"dataset": "forge/ogbench/pointmaze-medium-navigate-v0", "data.size": 2000, "agent": "fql", "updates": 20}
    values |= {"progress": False, "agent.hidden": [16, 16], "batch_size": 16, "eval.workers": 1, "eval.every": 10}
    values |= {"eval.episodes": 1, "eval.final_episodes": 1, **extra}
    in_turn, beside = (
        train(compose({**values, "eval.asynchronous": asynchronous, "out": str(tmp_path / str(asynchronous))})).folder
        for asynchronous in (False, True)
    )
    assert same_rows(beside, in_turn)
    assert np.array_equal(list(tensors(beside)), list(tensors(in_turn)))


def test_it_plays_what_an_evaluator_plays() -> None:
    """Twice, with other weights and other episodes."""
    agent, evaluator = agent_of(), Evaluator(INFO, 2, 1, make_env=Toy)
    process = EvaluationProcess(evaluator, agent)
    for seed in (100, 200):
        with torch.no_grad():
            agent.weight.mul_(-1)
        process.start(agent, 0, 3, seed)
        expected, found = played(agent, 3, seed=seed), process.result()
        assert np.array_equal(found.returns, expected.returns)
        assert found.seeds == expected.seeds
    process.close()
