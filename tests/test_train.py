"""Training runs: killed, stopped, repeated, continued and refused ones, and what they leave in their folder."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from conftest import make_toy, tiny
from processes import fork
from torch import Tensor

import offrl
from offrl.agents.base import Spec
from offrl.agents.esper import ESPER
from offrl.agents.spot import SPOT
from offrl.agents.td3_bc import TD3BC
from offrl.cli import main as cli
from offrl.data.arrays import write_npz
from offrl.data.batch import Batch
from offrl.results import read, read_metrics
from offrl.training.run_config import resolve_config
from offrl.training.runs import Result, dataset_info, load_agent, load_data, make_agent
from offrl.training.trainer import Trainer, resume, train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing

ENVIRONMENT = """
import gymnasium, numpy as np

class Toy(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-2, 2, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.state = 4, self.np_random.uniform(-1.5, 1.5, 3)
        return self.state, {}

    def step(self, action):
        x, y, _ = self.state
        best = 0.5 * np.array([np.sin(x), np.tanh(x * y)])
        self.left, self.state = self.left - 1, self.np_random.uniform(-1.5, 1.5, 3)
        return self.state, -4 * float(np.square(action - best).sum()), self.left == 0, False, {}

if "Toy-v0" not in gymnasium.registry:
    gymnasium.register("Toy-v0", entry_point=Toy)
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy task as a file that names its environment, in the working directory of the test."""
    (tmp_path / "sitecustomize.py").write_text(
        ENVIRONMENT
    )  # processes of their own register the environment as they start
    exec(ENVIRONMENT, {"__name__": "toy_world"})
    monkeypatch.chdir(tmp_path)
    write_npz(make_toy().with_info(env_id="Toy-v0"), tmp_path / "toy.npz")
    return tmp_path


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SMALL = {"batch_size": 16, "lanes": 2, "log_every": 50, "checkpoint_every": 50, "progress": False}
UNSEEN = {"every": 0, "final_episodes": 0}


def options(dataset: Path | str, updates: int = 200, **changes: Any) -> dict[str, Any]:
    """A quick run without evaluation; `changes` replace or add keys, also of the agent."""
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [8, 8], **changes.pop("agent", {})}
    base = {"agent": agent, "dataset": str(dataset), "updates": updates, **SMALL, "eval": UNSEEN}
    return {**base, **changes}


def words(values: dict[str, Any]) -> list[str]:
    """The same options as the command line has them."""
    flat = {"agent.hidden": "[8,8]", **{k: v for k, v in values.items() if k not in ("agent", "eval")}}
    flat |= {f"eval.{k}": v for k, v in values["eval"].items()}
    return ["agent=td3_bc", *(f"{key}={value}" for key, value in flat.items())]


def tensors(folder: Path) -> dict[str, Tensor]:
    return checkpoint.load(folder / checkpoint.NAME)[0]


def step_of(folder: Path) -> int:
    """Update of the last checkpoint; 0 when there is none."""
    path = folder / checkpoint.NAME
    return int(checkpoint.metadata(path)["step"]) if path.exists() else 0


def same_tensors(a: Path, b: Path) -> bool:
    mine, theirs = tensors(a), tensors(b)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def raw_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows as they stand in the file, without what no two runs share."""
    rows = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("metric") != "updates_per_second"]
    return [{k: v for k, v in row.items() if k not in ("wall_clock", "run_id")} for row in rows]


def wait_for(condition: Any, process: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- kill and resume ------------------------------------------------------------------------------------------


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(world: Path) -> None:
    """SIGKILL at random moments, the same command again: bitwise the same parameters, the same rows, the same result."""
    values = options("toy.npz", 800, log_every=70, checkpoint_every=20)
    values["eval"] = {"every": 200, "episodes": 2, "final_episodes": 3, "workers": 2}
    quiet = train({**values, "out": "quiet"})
    folder = Path("killed") / quiet.folder.relative_to("quiet")
    moments, reached = random.Random(3), [0]
    for _ in range(3):
        process = fork("train", *words({**values, "out": "killed"}))
        wait_for(lambda: step_of(folder) > reached[-1], process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        reached.append(step_of(folder))
    assert not (folder / "result.json").exists()
    assert 0 < reached[1] < reached[2] < reached[3] < 800
    process = fork("train", *words({**values, "out": "killed"}))
    assert "finished: normalised score" in process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert same_tensors(folder, quiet.folder)
    for kind in ("metrics", "episodes"):
        assert raw_rows(folder, kind) == raw_rows(quiet.folder, kind)
    assert json.loads((folder / "result.json").read_text()) == json.loads((quiet.folder / "result.json").read_text())
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_signals_save_and_the_rest_follows(number: signal.Signals, toy_file: Path) -> None:
    """Stopped between checkpoints, it leaves one of that very update, with status 130; meanwhile nobody else may train."""
    values = options(toy_file, 1_000_000, checkpoint_every=100, log_every=7)
    folder = resolve_config(values).folder()
    process = fork("train", *words(values))
    wait_for(lambda: step_of(folder) > 0, process)
    with pytest.raises(OffrlError, match="another process is training this run"):
        train(values)
    time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 130
    step = step_of(folder)
    assert f"stopped at update {step}; go on with: offrl train resume={folder}" in output
    assert step > 100
    total = step + 101
    assert cli.main(["train", f"resume={folder}", f"updates={total}"]) == 0
    through = train({**values, "updates": total, "out": "through"})
    assert same_tensors(folder, through.folder)
    assert raw_rows(folder, "metrics") == raw_rows(through.folder, "metrics")


def test_a_signal_in_between_is_harmless_here_too(toy_file: Path) -> None:
    """From Python: the call returns, and the caller's handlers are back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    values = options(toy_file, 1_000_000)

    def stop_after_a_checkpoint() -> None:
        while step_of(resolve_config(values).folder()) == 0:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_a_checkpoint)
    watcher.start()
    result = train(values)
    watcher.join()
    assert result.status == "interrupted"
    assert 0 < result.step == step_of(result.folder)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_runs_outside_the_main_thread(toy_file: Path) -> None:
    """Where no signal handler can be set, as in notebooks' workers."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(train(options(toy_file))))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


@pytest.mark.parametrize("log_every", [1, 7, 64])
def test_rows_do_not_depend_on_how_fast_the_machine_is(
    log_every: int, toy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts of any size log the same metrics at the same updates, though the actor's exist at every second only."""
    rows, next_burst = [], Trainer._next_burst
    for wanted in (1, 3, 10_000):
        monkeypatch.setattr(Trainer, "_next_burst", lambda self, _, w=wanted: next_burst(self, w))
        result = train(options(toy_file, 101, log_every=log_every, checkpoint_every=13, out=f"burst{wanted}"))
        rows.append(raw_rows(result.folder, "metrics"))
    assert rows[0] == rows[1] == rows[2]
    assert sorted({row["step"] for row in rows[0]}) == sorted({*range(log_every, 102, log_every), 101})


@pytest.mark.parametrize(
    "agent",
    [
        {"_target_": "offrl.agents.esper.ESPER", **tiny(ESPER), "cluster_updates": 5, "return_updates": 8},
        {"_target_": "offrl.agents.spot.SPOT", **tiny(SPOT), "vae_updates": 5},
    ],
    ids=["esper", "spot"],
)
def test_an_ended_stages_metrics_end_with_it(
    agent: dict[str, Any], toy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a burst crosses the end of a stage depends on the machine, what is logged does not."""
    rows, next_burst = [], Trainer._next_burst
    for wanted in (1, 3, 10_000):
        monkeypatch.setattr(Trainer, "_next_burst", lambda self, _, w=wanted: next_burst(self, w))
        values = options(toy_file, 30, log_every=10, out=f"burst{wanted}") | {"agent": agent}
        rows.append(raw_rows(train(values).folder, "metrics"))
    assert rows[0] == rows[1] == rows[2]


def test_a_failure_to_save_can_be_repaired(toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the third checkpoint; with space again, the run ends as if nothing had happened."""
    calls, save_file = [], checkpoint.save_file

    def filling_up(*arguments: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments, **more)

    values = options(toy_file)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", filling_up)
        with pytest.raises(OffrlError, match=r"could not be written .*No space left.*free some space"):
            train(values)
    folder = resolve_config(values).folder()
    assert step_of(folder) == 100
    assert train(values).status == "finished"
    assert same_tensors(folder, train({**values, "out": "undisturbed"}).folder)


def test_remains_of_a_kill_are_swept_away(toy_file: Path) -> None:
    values = options(toy_file)
    folder = resolve_config(values).folder()
    files = [place / f".{checkpoint.NAME}.123.part/.tmpAbCdEf" for place in (folder, folder / "checkpoints")]
    for torn in (*files, folder / ".metrics.parquet.123.part"):
        torn.parent.mkdir(parents=True, exist_ok=True)
        torn.write_bytes(b"half")
    train(values)
    assert not [path for path in folder.rglob("*") if path.suffix == ".part" or path.name.startswith(".tmp")]


def test_what_a_writer_leaves_beside_its_file_goes_too(tmp_path: Path) -> None:
    """safetensors has temporary files of its own, under names that nobody could clear away after a kill."""
    path = tmp_path / "a.safetensors"
    with suppress(KeyboardInterrupt), replacing(path, own_folder=True) as temporary:
        temporary.with_name(".tmpAbCdEf").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    checkpoint.write(path, {"x": torch.ones(3)}, {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_copy_is_kept_of_every_checkpoint_whenever_it_is_killed(
    toy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the writing of one file and the next, at each of the run's writes in turn."""
    values = options(toy_file, 40, checkpoint_every=10, log_every=10, keep_checkpoints=True)
    undisturbed = train({**values, "out": "undisturbed"}).folder
    save = checkpoint.save
    for last in range(1, 8):
        calls: list[int] = []

        def killed_after(*arguments: Any, calls: list[int] = calls, last: int = last) -> None:
            if len(calls) == last:
                raise RuntimeError("killed")
            calls.append(1)
            save(*arguments)

        job = {**values, "out": f"killed{last}"}
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", killed_after)
            with pytest.raises(RuntimeError, match="killed"):
                train(job)
        folder = train(job).folder
        kept = sorted((folder / "checkpoints").iterdir())
        assert [path.stem for path in kept] == ["00000010", "00000020", "00000030", "00000040"]
        for path in kept:
            theirs = checkpoint.load(undisturbed / "checkpoints" / path.name)[0]
            assert all(torch.equal(value, theirs[name]) for name, value in checkpoint.load(path)[0].items())


@pytest.mark.parametrize("agent", [{}, {"_target_": "offrl.agents.flow_bc.FlowBC", "flow_steps": 2}])
def test_the_last_evaluation_is_written_once(
    agent: dict[str, Any], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, three times, after its rows and before the result; a sampling policy draws the same actions again."""
    values = options("toy.npz", 40, agent=agent)
    values["eval"] = {"every": 20, "episodes": 2, "final_episodes": 3, "workers": 1}
    undisturbed = train({**values, "out": "undisturbed"}).folder
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", lambda _: (_ for _ in ()).throw(RuntimeError("killed")))
        for _ in range(3):
            with pytest.raises(RuntimeError, match="killed"):
                train(values)
    folder = train(values).folder
    for kind in ("episodes", "metrics"):
        assert raw_rows(folder, kind) == raw_rows(undisturbed, kind)
    assert len(raw_rows(folder, "episodes")) == 2 * (2 + 3)


def test_a_longer_run_has_one_last_evaluation(world: Path) -> None:
    """What was the last one is an evaluation on the way as soon as there are more updates, and nothing else changes."""
    values = options("toy.npz", 40)
    values["eval"] = {"every": 20, "episodes": 2, "final_episodes": 3, "workers": 1}
    folder = train(values).folder
    before = raw_rows(folder, "episodes")
    assert {(row["step"], row["checkpoint"]) for row in before} == {(20, "20"), (40, "last")}
    assert train({**values, "updates": 60}).folder == folder
    after = raw_rows(folder, "episodes")
    assert {(row["step"], row["checkpoint"]) for row in after} == {(20, "20"), (40, "40"), (60, "last")}
    for row in before:
        row["checkpoint"] = str(row["step"])
    assert after[: len(before)] == before


def test_a_lane_leaves_the_rows_that_its_seed_leaves_alone(world: Path) -> None:
    """All fields but those that name the run and the lane, and the clock."""
    values = options("toy.npz", 60, seed=4)
    values["eval"] = {"every": 30, "episodes": 2, "final_episodes": 3, "workers": 1}
    together = train(values).folder
    for lane in (0, 1):
        alone = train({**values, "lanes": 1, "seed": 4 + lane, "out": "alone"}).folder
        for kind in ("episodes", "metrics"):
            here, there = (
                [
                    {k: v for k, v in row.items() if k != "lane"}
                    for row in raw_rows(folder, kind)
                    if row["seed"] == 4 + lane
                ]
                for folder in (together, alone)
            )
            assert here == there
            assert len(here) >= 5


@pytest.mark.parametrize("gone", ["folder", "episodes.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("moment", ["before a checkpoint", "at the last evaluation"])
def test_rows_that_vanish_under_a_run_are_missed(
    gone: str, moment: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rm -r` in the middle: the run does not end as finished, neither now nor the next time, and puts nothing back."""
    values = options("toy.npz", 40, checkpoint_every=20, log_every=20)
    values["eval"] = {"every": 0, "final_episodes": 2, "workers": 1}
    folder = resolve_config(values).folder()

    def remove() -> None:
        shutil.rmtree(folder) if gone == "folder" else (folder / gone).unlink()

    name = "_log" if moment == "before a checkpoint" else "_evaluate"
    before = getattr(Trainer, name)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, name, lambda *given, **named: (before(*given, **named), remove())[0])
        with pytest.raises(OffrlError, match=r"jsonl was removed or replaced while the run wrote to it"):
            train(values)
    assert not (folder / "result.json").exists()
    if gone == "folder":
        assert not (folder / checkpoint.NAME).exists()
        assert train(values).status == "finished"
    elif moment == "at the last evaluation":
        with pytest.raises(OffrlError, match=rf"{gone} is missing; restore it, or start the run over with fresh=true"):
            train(values)
        assert train({**values, "fresh": True}).status == "finished"


def test_finished_is_a_run_with_all_its_files(toy_file: Path) -> None:
    values = options(toy_file, 20)
    folder = train(values).folder
    for name in ("config.json", "manifest.json"):
        before = json.loads((folder / name).read_text())
        (folder / name).unlink()
        assert train(values).status == "finished"  # not "already": it has made the file again
        assert json.loads((folder / name).read_text()) == before
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(OffrlError, match=r"metrics.jsonl is missing; restore it, or start over with fresh=true"):
        train(values)
    assert train({**values, "fresh": True}).status == "finished"


# ---- repeat, continue, start over -----------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(toy_file: Path) -> None:
    values = options(toy_file)
    first = train(values)
    files = {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.name != ".lock"}
    again = train(values)
    assert (first.status, again.status) == ("finished", "already finished")
    assert (again.folder, again.step, again.returns, again.scores) == (first.folder, 200, first.returns, first.scores)
    assert files == {path: path.stat().st_mtime_ns for path in first.folder.iterdir() if path.name != ".lock"}
    with pytest.warns(UserWarning, match=r"the finished run has 200 updates, more than the 120 that are asked for"):
        assert train({**values, "updates": 120}).step == 200


def test_a_label_is_given_to_a_finished_run_as_well(toy_file: Path) -> None:
    values = options(toy_file, 10)
    folder = train(values).folder
    before = json.loads((folder / "config.json").read_text())
    assert train({**values, "label": "mine"}).status == "already finished"
    assert json.loads((folder / "config.json").read_text()) == before | {"label": "mine", "method": "mine"}
    assert train(values).folder == folder  # without one it keeps its own
    assert json.loads((folder / "config.json").read_text())["label"] == "mine"


def test_a_finished_run_says_that_it_was_evaluated_at_other_updates(world: Path) -> None:
    values = options("toy.npz", 12)
    made = {"every": 4, "episodes": 1, "final_episodes": 1}
    train({**values, "eval": made})
    with pytest.warns(
        UserWarning, match=r"evaluated every 4 updates, so that it can't be evaluated every 6 updates any"
    ):
        assert train({**values, "eval": {**made, "every": 6}}).status == "already finished"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for every in (0, 4, 8, 5000):  # whose evaluations it has
            assert train({**values, "eval": {**made, "every": every}}).status == "already finished"


def test_more_updates_continue_a_finished_run(toy_file: Path) -> None:
    longer = train({**options(toy_file, 350), "out": "longer"})
    train(options(toy_file, 200))
    continued = train(options(toy_file, 350))
    assert (continued.status, continued.step) == ("finished", 350)
    assert same_tensors(continued.folder, longer.folder)
    assert raw_rows(continued.folder, "metrics") == raw_rows(longer.folder, "metrics")


def test_fresh_starts_over(toy_file: Path) -> None:
    values = options(toy_file, keep_checkpoints=True)
    first = train(values)
    rows, kept = raw_rows(first.folder, "metrics"), tensors(first.folder)
    over = train({**values, "fresh": True})
    assert over.status == "finished"
    assert over.folder == first.folder
    assert raw_rows(first.folder, "metrics") == rows
    assert all(torch.equal(value, kept[key]) for key, value in tensors(over.folder).items())
    shorter = train({**values, "fresh": True, "updates": 60, "checkpoint_every": 20})
    assert step_of(shorter.folder) == shorter.step == 60
    assert sorted(path.stem for path in (shorter.folder / "checkpoints").iterdir()) == [
        "00000020",
        "00000040",
        "00000060",
    ]


def test_fresh_forgets_the_old_run_at_once(toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its first checkpoint, a run that started over does not bring the old parameters back."""
    values = options(toy_file, lanes=1)
    folder = train(values).folder
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loop", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            train({**values, "fresh": True})
    assert step_of(folder) == 0
    assert train(values).status == "finished"
    assert len(raw_rows(folder, "metrics")) == len(raw_rows(train({**values, "out": "x"}).folder, "metrics"))


def test_resume_takes_options_that_change_no_number(toy_file: Path) -> None:
    folder = train(options(toy_file, 100)).folder
    result = resume(folder, {"updates": 150, "log_every": 30, "eval.every": 0, "keep_checkpoints": True})
    assert (result.step, result.status) == (150, "finished")
    assert (folder / "checkpoints" / "00000150.safetensors").exists()
    assert same_tensors(folder, train(options(toy_file, 150, out="straight")).folder)
    assert json.loads((folder / "config.json").read_text())["updates"] == 150


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ({"eval.ref_max": 30.0}, "the run was scored with eval.ref_max=20.0, not 30.0"),
        ({"eval.ref_min": None, "eval.ref_max": None}, "the run was scored with eval.ref_min=0.0, not None"),
        ({"eval.max_episode_steps": 7}, "the run was scored with eval.max_episode_steps=None, not 7"),
        ({}, None),
    ],
    ids=str,
)
def test_one_curve_has_scores_of_one_scale(world: Path, now: dict[str, Any], sentence: str | None) -> None:
    """A run with evaluations does not go on under another task; one without any may."""
    values = options("toy.npz", 40, lanes=1)
    values["eval"] = {"every": 20, "episodes": 1, "final_episodes": 1, "workers": 1, "ref_min": 0.0, "ref_max": 20.0}
    folder = train(values).folder
    changes = {"updates": 60, **now}
    if sentence:
        with pytest.raises(OffrlError, match=re.escape(sentence)):
            resume(folder, changes)
        (folder / "episodes.jsonl").write_text("")
    assert resume(folder, changes).step == 60


def test_a_run_behind_its_policys_schedule_says_so(toy_file: Path) -> None:
    agent = {"_target_": "offrl.agents.iql.IQL", "actor_decay": 20}
    folder = train(options(toy_file, 20, agent=agent)).folder
    with pytest.warns(
        UserWarning, match=r"learning rate is 0 from update 20 on.*updates up to 40 train the critics alone"
    ):
        resume(folder, {"updates": 40})


@pytest.mark.parametrize(
    "change", ["agent.alpha", "batch_size", "data.reward_scale", "sampler._target_", "seed", "lanes", "out", "dataset"]
)
def test_resume_refuses_options_that_change_numbers(change: str, toy_file: Path) -> None:
    folder = train(options(toy_file, 20)).folder
    with pytest.raises(OffrlError, match=f"{change} can't be changed when a run is resumed"):
        resume(folder, {change: 3})


def test_resume_in_the_runs_own_folder(toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(options(toy_file.resolve(), 20, name="mine")).folder
    monkeypatch.chdir(folder)
    result = resume(".", {"updates": 40})
    assert result.step == 40
    assert result.folder.name == "mine"
    assert {row["run_id"] for row in map(json.loads, Path("metrics.jsonl").read_text().splitlines())} == {"mine"}


# ---- refused --------------------------------------------------------------------------------------------------


def test_resume_of_what_is_no_run(tmp_path: Path, toy_file: Path) -> None:
    with pytest.raises(OffrlError, match=r"there is no config.json; name the folder of a run"):
        resume(tmp_path)
    folder = train(options(toy_file, 20)).folder
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(OffrlError, match=r"config.json: .*; repeat the command that started the run"):
            resume(folder)


@pytest.mark.parametrize("status", ["finished", "unfinished"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"agent": {"alpha": 1.0}}, "agent"),
        ({"batch_size": 8}, "batch_size 16, now 8"),
        ({"seed": 3}, r"seeds \[0, 1\], now \[3, 4\]"),
        ({"lanes": 3}, r"seeds \[0, 1\], now \[0, 1, 2\]"),
        ({"precision": "bfloat16"}, "precision"),
        ({"data": {"reward_scale": 2.0}}, "data"),
    ],
    ids=["agent", "batch", "seed", "lanes", "precision", "data"],
)
def test_other_settings_under_one_name_are_refused(
    change: dict[str, Any], named: str, status: str, toy_file: Path
) -> None:
    """Neither continued with other numbers, nor passed off as done."""
    folder = train(options(toy_file, 20, name="mine")).folder
    before = tensors(folder)
    changed = options(toy_file, 20 if status == "finished" else 40, name="mine", **change)
    with pytest.raises(OffrlError, match=f"made with other settings .{named}.*another name=, or start over with fresh"):
        train(changed)
    assert all(torch.equal(value, before[key]) for key, value in tensors(folder).items())
    assert train({**changed, "fresh": True}).status == "finished"


def test_other_data_under_the_same_name_are_refused(toy_file: Path) -> None:
    train(options(toy_file, 20))
    toy_file.unlink()
    write_npz(make_toy(seed=1), toy_file)
    with pytest.raises(OffrlError, match=r"made on other data than .*toy.npz holds now.*fresh=true"):
        train(options(toy_file, 40))


BOX = {"action_low": -1.5, "action_high": 1.5}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mask": [0]}, "mask"),
        ({"flicker": 0.1}, "flicker"),
        ({"family": "gym-mujoco"}, "family"),
        (BOX, "action_high"),
    ],
    ids=str,
)
@pytest.mark.parametrize("given_first", [True, False])
def test_options_that_are_written_down_only_where_they_are_given_are_compared_too(
    given: dict[str, Any], named: str, given_first: bool, toy_file: Path
) -> None:
    """A configuration without them says that they had their default."""
    first, second = (given, {}) if given_first else ({}, given)
    train(options(toy_file, 20, name="mine", data=first))
    for updates in (20, 40):  # finished and unfinished
        with pytest.raises(OffrlError, match=rf"made with other settings \(data\.{named} .*another name="):
            train(options(toy_file, updates, name="mine", data=second))


def test_either_bound_of_a_box_is_compared(toy_file: Path) -> None:
    train(options(toy_file, 20, name="mine", data=BOX))
    for key, value in (("action_low", -2.0), ("action_high", 2.0)):
        with pytest.raises(OffrlError, match=rf"made with other settings \(data\.{key} "):
            train(options(toy_file, 20, name="mine", data={**BOX, key: value}))


def test_a_flat_copy_is_no_setting_of_a_run(toy_file: Path) -> None:
    """With a name of its own; the folders of others are by a hash, in which it stands since ever."""
    train(options(toy_file, 20, name="mine"))
    assert train(options(toy_file, 20, name="mine", data={"cache": False})).status == "already finished"
    assert train(options(toy_file, 40, name="mine", data={"cache": False})).status == "finished"


@pytest.mark.parametrize("bounds", [{"action_low": -2.0}, {"action_high": 2.0}, {"action_high": (2.0, 1.0)}], ids=str)
def test_the_same_numbers_in_another_box_are_other_data(bounds: dict[str, Any], toy_file: Path) -> None:
    """The box scales what the policy learns, and no number of the dataset tells of it."""
    folder = train(options(toy_file, 20)).folder
    before = tensors(folder)
    toy_file.unlink()
    write_npz(make_toy().with_info(**bounds), toy_file)
    with pytest.raises(OffrlError, match=rf"made on other data .*\({next(iter(bounds))} .*, now .*fresh=true"):
        train(options(toy_file, 40))
    assert all(torch.equal(value, before[key]) for key, value in tensors(folder).items())
    toy_file.unlink()
    write_npz(make_toy().with_info(action_low=(-1.0, -1.0), action_high=1.0), toy_file)  # the same box in other words
    assert train(options(toy_file, 40)).step == 40


def test_folders_that_cant_be_written(toy_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nothing")):
        with pytest.raises(OffrlError, match=r"can't be written .*choose another folder with out=DIR"):
            train(options(toy_file, out=str(out)))


def test_devices_that_are_not_there(toy_file: Path) -> None:
    with pytest.raises(OffrlError, match="device=gpu is unknown; choose auto, cpu, cuda"):
        train(options(toy_file, device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(OffrlError, match="device=cuda: this PyTorch sees no GPU; use device=cpu"):
            train(options(toy_file, device="cuda"))
        with pytest.raises(OffrlError, match="engine=cudagraph needs device=cuda"):
            train(options(toy_file, engine="cudagraph"))


def test_samplers_that_cant_be_made(toy_file: Path) -> None:
    for sampler, message in (
        ({"_target_": "offrl.sampling.Unknown"}, r"sampler\._target_=offrl\.sampling\.Unknown can't be imported"),
        ({"_target_": "offrl.agents.bc.BC"}, r"is no offrl\.sampling\.base\.Sampler"),
        ({"_target_": "offrl.sampling.EpisodeWeighted"}, "sampler: "),  # it needs weights
        ({"_target_": "offrl.sampling.Uniform", "x": 1}, r"sampler\.x is no option"),
        ({"_target_": "offrl.sampling.ReturnWeighted", "temprature": 1}, r"did you mean sampler\.temperature"),
        ({"_target_": "offrl.sampling.ReturnWeighted", "temperature": 0}, "temperature=0 should be above 0"),
        ({"_target_": "offrl.sampling.ReturnWeighted", "temperature": [0.1, 1, 2]}, "3 values for 2 lanes"),
        ({"_target_": "offrl.sampling.TopPercent", "percent": 101}, "percent=101 should be above 0 and at most 100"),
        ({"_target_": "offrl.sampling.AdvantageWeighted", "baseline": "lasso"}, "baseline=lasso should be one of ols"),
    ):
        with pytest.raises(OffrlError, match=message):
            train(options(toy_file, sampler=sampler))


def test_a_missing_environment_shows_before_training(toy_file: Path) -> None:
    values = options(toy_file, eval={"every": 0, "final_episodes": 1})
    with pytest.raises(OffrlError, match=r"no environment"):
        train(values)
    assert not (resolve_config(values).folder() / checkpoint.NAME).exists()


def test_an_environment_that_nobody_knows_is_refused_without_evaluation_too(toy_file: Path) -> None:
    for env in ("Nope-v0", "AntMaze_Nope-v0"):
        with pytest.raises(OffrlError, match=f"{env}: Gymnasium doesn't know this environment"):
            resolve_config(options(toy_file, eval={**UNSEEN, "env": env}))
    resolve_config(options(toy_file, eval={**UNSEEN, "env": "Pendulum-v1"}))
    folder = train(options(toy_file, 5)).folder
    with pytest.raises(OffrlError, match="Nope-v0: Gymnasium doesn't know this environment"):
        resume(folder, {"eval.env": "Nope-v0"})


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def spoil_rows(folder: Path, kind: str, line: str) -> None:
    rows = (folder / f"{kind}.jsonl").read_text().splitlines(keepends=True)
    (folder / f"{kind}.jsonl").write_text("".join([rows[0], line + "\n", *rows[1:]]))


REFUSALS = {
    "metrics": (lambda folder: spoil_rows(folder, "metrics", "garbage"), "metrics.jsonl: line 2 is no row of results"),
    "episodes": (lambda folder: spoil_rows(folder, "episodes", '{"step": "x"}'), "episodes.jsonl: line 2 is no row"),
    "deep": (lambda folder: spoil_rows(folder, "metrics", "[" * 100_000), "metrics.jsonl: line 2 is no row"),
    "missing rows": (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    "checkpoint": (lambda folder: (folder / checkpoint.NAME).write_bytes(b"x" * 99), "no offrl checkpoint"),
    "agent": (lambda folder: shrink(folder), "does not fit this agent's configuration"),
    "data": (
        lambda _: write_npz(make_toy(seed=1).with_info(env_id="Toy-v0"), Path("toy.npz")),
        "made on other data",
    ),
    "environment": (lambda _: Path("toy_world.py").write_text("x = 1"), "Toy-v0"),
}


def shrink(folder: Path) -> None:
    kept, metadata = checkpoint.load(folder / checkpoint.NAME)
    checkpoint.write(folder / checkpoint.NAME, dict(list(kept.items())[1:]), metadata)


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refused_run_leaves_its_folder_alone(kind: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same command, with more updates, and by resume: a sentence, and every byte stays."""
    values = options("toy.npz", 40, log_every=10)
    values["eval"] = {"every": 10, "episodes": 1, "final_episodes": 1, "workers": 1}
    folder = train(values).folder
    spoil, message = REFUSALS[kind]
    if kind == "environment":
        gymnasium.registry.pop("Toy-v0")
        monkeypatch.delitem(sys.modules, "toy_world", raising=False)
    spoil(folder)
    before = contents(folder)
    for again in (lambda: train({**values, "updates": 80}), lambda: resume(folder, {"updates": 80})):
        with pytest.raises(OffrlError, match=message):
            again()
        assert contents(folder) == before


@pytest.mark.parametrize("change", [{"tracker": "tensorbord"}, {"device": "gpu"}, {"eval.workers": -3}], ids=str)
def test_refused_options_leave_the_folder_alone(change: dict[str, Any], toy_file: Path) -> None:
    folder = train(options(toy_file, 20)).folder
    before = contents(folder)
    with pytest.raises(OffrlError, match=next(iter(change))):
        resume(folder, {**change, "updates": 40})
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lanes": 10**8},
            r"lanes=100000000 with batch_size=16 needs at least 51,200,000,000 bytes of memory, and [\d,]+ are",
        ),
        ({"batch_size": 10**12}, r"batch_size=1000000000000 needs at least [\d,]+ bytes"),
        ({"lanes": 10**6}, "lanes=1000000 should be at most 65536"),
        (
            {"lanes": 60_000, "agent": {"hidden": [512, 512]}},
            r"the agent with 60000 lanes and hidden=\[512, 512\] needs at least [\d,]+ bytes",
        ),
        (
            {"agent": {"hidden": [10**8]}},
            r"hidden=\[100000000\] needs at least [\d,]+ bytes of memory, and [\d,]+ are free",
        ),
        ({"agent": {"hidden": [10**8, 10**8]}}, r"hidden=\[100000000, 100000000\] needs at least"),
        ({"agent": {"hidden": [10**12, 10**12]}}, "needs more memory than any machine has"),
        ({"agent": {"hidden": [10**30]}}, "agent.hidden=10+ should have at most 63 bits"),
        ({"agent": {"hidden": [-1]}}, r"agent.hidden=\[-1\] should be a list of whole numbers of at least 1"),
        ({"agent": {"hidden": [8, 0]}}, r"agent.hidden=\[8, 0\] should be"),
        ({"agent": {"tau": float("nan")}}, "agent.tau=nan should be a number"),
        ({"agent": {"tau": 10**400}}, "agent.tau=10+... is too large for a number"),
        ({"threads": 10**9}, r"threads=1000000000 is more than \d+; this machine has \d+ cores"),
        ({"updates": 1e30}, "updates=1e.30 should have at most 63 bits"),
        ({"updates_per_launch": 10**9}, "updates_per_launch=1000000000 should be at most 10000"),
        ({"eval": {"workers": 10**9}}, "eval.workers=1000000000 is more than"),
        ({"eval": {"final_episodes": 10**12}}, "eval.final_episodes=1000000000000 needs at least"),
        ({"device": "meta"}, "device=meta is not supported; choose auto, cpu, cuda or cuda:N"),
    ],
    ids=str,
)
def test_sizes_beyond_the_machine(change: dict[str, Any], message: str, toy_file: Path) -> None:
    """Refused in moments, from the command and from a run's folder, with the memory hardly touched."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OffrlError, match=message):
        train(options(toy_file, **{"updates": 20, **json.loads(json.dumps(change))}))
    folder = train(options(toy_file, 20, name="mine")).folder
    config = json.loads((folder / "config.json").read_text())
    agent = {**config["agent"], **change.pop("agent", {})}
    (folder / "config.json").write_text(json.dumps({**config, "agent": agent, **change}))
    (folder / checkpoint.NAME).unlink()
    (folder / "result.json").unlink()
    with pytest.raises(OffrlError):
        resume(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes


@pytest.mark.parametrize(
    ("target", "key", "value"),
    [
        ("flow_bc.FlowBC", "flow_steps", 0),
        ("flow_bc.FlowBC", "flow_steps", 10**9),
        ("fql.FQL", "members", 0),
        ("ifql.IFQL", "denoising_steps", 0),
        ("rebrac.ReBRAC", "members", 0),
        ("prdc.PRDC", "k", 0),
    ],
)
def test_counts_that_would_leave_noise_for_actions_or_no_value(target: str, key: str, value: int) -> None:
    """Without Euler steps a flow's action is its noise; a training would not notice."""
    settings = {"_target_": f"offrl.agents.{target}", "hidden": [8], key: value}
    settings |= {"policy": "denoising"} if key == "denoising_steps" else {}
    with pytest.raises(OffrlError, match=f"agent.{key}={value} should be "):
        make_agent(settings, Spec(3, 2, (0,)))


def test_sizes_in_a_checkpoint(toy_file: Path) -> None:
    path = train(options(toy_file, 20)).folder / checkpoint.NAME
    kept, metadata = checkpoint.load(path)
    for change in ({"hidden": [10**8, 10**8]}, {"hidden": [0]}):
        config = {**metadata["config"], "agent": {**metadata["config"]["agent"], **change}}
        checkpoint.write(path, kept, {**metadata, "config": config})
        with pytest.raises(OffrlError, match=r"hidden=.*(needs at least|should be a list)"):
            load_agent(path)


# ---- what stands in a run's files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[1]", r"\[1\] should be an object"),
        ('{"returns": [], "scores": null}', "the key step is missing"),
        ('{"step": "20", "returns": []}', "step='20' should be a valid integer"),
        ('{"step": -1, "returns": []}', "step=-1 should be greater than or equal to 0"),
        ('{"step": 1e30, "returns": []}', r"step=1e\+30 should be a valid integer"),
        ('{"step": 20, "returns": 3.0}', "returns=3.0 should be a valid array"),
        ('{"step": 20, "returns": [{}]}', r"returns.0=\{\} should be a valid number"),
        ("[" * 100_000, "damaged"),
        ('{"step": 20, "returns": [], "x": ' + "1" * 5000 + "}", "damaged"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damage_to_a_result(text: str, message: str, toy_file: Path) -> None:
    values = options(toy_file, 20)
    folder = train(values).folder
    (folder / "result.json").write_text(text)
    with pytest.raises(
        OffrlError, match=rf"result.json: .*{message}.*; remove it, and the same command makes it again"
    ):
        train(values)
    (folder / "result.json").unlink()
    assert train(values).status == "finished"


def test_files_that_are_no_files_do_not_hang(toy_file: Path) -> None:
    values = options(toy_file, 20)
    folder = train(values).folder
    for name in ("result.json", "config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(OffrlError, match=f"{name} is no regular file"):
            resume(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    with open(folder / "config.json", "ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(
        OffrlError, match=r"config.json has 1,073,741,824 bytes, more than 16,777,216; repeat the command"
    ):
        resume(folder)


# ---- numbers that break ---------------------------------------------------------------------------------------


class Diverging(TD3BC):
    """TD3+BC whose actor breaks at update 130; `report` tells whether its metrics show it."""

    report = True

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        metrics = super().update(batch, phase)
        if int(self.random.step) == 130:
            with torch.no_grad():
                self.actor.mlp.weights[0].fill_(float("nan"))
        return {key: value if self.report else torch.zeros(2) for key, value in metrics.items()}


@pytest.mark.parametrize("report", [True, False])
def test_numbers_that_break_stop_the_run_and_are_never_saved(
    report: bool, toy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the metrics or, at the latest, before a checkpoint; the last good one stays, however often one tries."""
    monkeypatch.setattr(Diverging, "report", report)
    values = options(toy_file, agent={"_target_": "test_train.Diverging"})
    broken = "(critic|actor)_loss" if report else r"actor.mlp.weights.0"
    for _ in range(2):
        with pytest.raises(OffrlError, match=f"{broken} is no longer finite at update 150; lower the learning rates"):
            train(values)
        assert step_of(resolve_config(values).folder()) == 100
    assert all(value.isfinite().all() for value in tensors(resolve_config(values).folder()).values())
    assert {row["step"] for row in raw_rows(resolve_config(values).folder(), "metrics")} == {50, 100, 150}


def test_learning_rates_out_of_this_world(toy_file: Path) -> None:
    with pytest.raises(OffrlError, match="is no longer finite at update 50"):
        train(options(toy_file, agent={"critic_lr": 1e30}))


# ---- what a run leaves ----------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(world: Path) -> Result:
    values = options("toy.npz", 300, lanes=2, seed=4)
    values["eval"] = {"every": 100, "episodes": 2, "final_episodes": 5, "workers": 1}
    return train(values)


def test_evaluations_leave_a_row_an_episode(evaluated: Result) -> None:
    rows = read([evaluated.folder])
    assert rows["step"].to_list() == [100] * 4 + [200] * 4 + [300] * 10
    last = rows.filter(step=300)
    assert set(last["checkpoint"]) == {"last"}
    assert last["seed"].to_list() == [4] * 5 + [5] * 5
    assert last["eval_seed"].to_list() == [*range(1_000_000, 1_000_005)] * 2
    assert set(last["length"]) == {4}
    returns = last["return_raw"].to_numpy().reshape(2, 5)
    assert evaluated.returns == pytest.approx(returns.mean(-1))
    assert evaluated.scores == pytest.approx(10 * (returns.mean(-1) + 10))  # references -10 and 0
    assert json.loads((evaluated.folder / "result.json").read_text())["returns"] == evaluated.returns


def test_the_agent_of_a_run_scores_what_the_run_says(evaluated: Result) -> None:
    from offrl.evaluation.evaluator import Evaluator

    agent, info = load_agent(evaluated.folder), dataset_info(evaluated.folder)
    assert info.env_id == "Toy-v0"
    assert agent.spec.seeds == (4, 5)
    assert not agent.training
    with Evaluator(info, 2, 1) as evaluator:
        assert evaluator.run(agent, 5).returns.mean(-1).tolist() == evaluated.returns


def test_metrics_stand_at_their_updates(toy_file: Path) -> None:
    result = train(options(toy_file, 120))
    rows = read_metrics([result.folder])
    assert set(rows["step"]) == {50, 100, 120}
    losses = rows.filter(metric="critic_loss")
    assert losses["lane"].to_list() == [0, 1] * 3
    assert losses["value"].is_finite().all()
    assert rows.filter(metric="updates_per_second")["value"].min() > 0


def test_a_folder_says_how_it_was_made(toy_file: Path) -> None:
    values = options(toy_file, 20, label="ours")
    result = train(values)
    config = json.loads((result.folder / "config.json").read_text())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert config["method"] == "ours"
    assert values["agent"].items() <= config["agent"].items()
    assert config["eval"]["seed"] == 1_000_000  # defaults are there, too
    store = load_data(resolve_config(values).train, "cpu")
    assert manifest["fingerprint"] == store.fingerprint
    assert (manifest["transitions"], manifest["episodes"]) == (4096, 1024)
    # Actor 3-8-8-2, two critics 5-8-8-1.
    assert manifest["parameters_per_lane"] == (32 + 72 + 18) + 2 * (48 + 72 + 9)
    assert manifest["environment"]["versions"]["offrl"] == offrl.__version__


def test_kept_checkpoints_are_the_runs_of_their_length(toy_file: Path) -> None:
    result = train(options(toy_file, 120, keep_checkpoints=True))
    kept = sorted((result.folder / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["00000050.safetensors", "00000100.safetensors", "00000120.safetensors"]
    for path, updates in zip(kept, (50, 100, 120)):
        alone = train(options(toy_file, updates, out=f"alone{updates}"))
        assert all(torch.equal(v, tensors(alone.folder)[k]) for k, v in checkpoint.load(path)[0].items())
        obs = make_toy(16).observations.expand(2, -1, -1)
        assert torch.equal(load_agent(path).select_action(obs), load_agent(alone.folder).select_action(obs))


def test_tensorboard_shows_the_rows(world: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = options("toy.npz", 150, tracker="tensorboard")
    values["eval"] = {"every": 100, "episodes": 2, "final_episodes": 2, "workers": 1}
    result = train(values)
    events = reading.EventAccumulator(str(result.folder / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/critic_loss")}
    rows = read_metrics([result.folder]).filter(metric="critic_loss")
    for step in (50, 100, 150):
        assert shown[step] == pytest.approx(rows.filter(step=step)["value"].mean(), rel=1e-6)
    for lane, score in enumerate(result.scores):
        shown = events.Scalars(f"eval_lanes/score/lane{lane}_seed{lane}")
        assert shown[-1].value == pytest.approx(score, rel=1e-6)
    scores = {event.step: event.value for event in events.Scalars("eval/score")}
    assert scores == pytest.approx({100: scores[100], 150: np.mean(result.scores)}, rel=1e-6)


def test_unknown_trackers_are_refused(toy_file: Path) -> None:
    with pytest.raises(OffrlError, match="tracker=tensorbord is unknown"):
        train(options(toy_file, tracker=["tensorbord"]))


# ---- data -----------------------------------------------------------------------------------------------------


def rewards(toy_file: Path, **data: Any) -> Tensor:
    return load_data(resolve_config(options(toy_file, data=data)).train, "cpu").rewards


def test_rewards_are_scaled_then_shifted(toy_file: Path) -> None:
    plain = rewards(toy_file)
    torch.testing.assert_close(rewards(toy_file, reward_scale=2.0, reward_shift=-1.0), 2 * plain - 1)


def test_rewards_by_the_range_of_returns(toy_file: Path) -> None:
    """r <- 1000 r / (largest - smallest return), then scale and shift."""
    toy = make_toy()
    returns = toy.rewards.view(-1, 4).double().sum(-1)
    expected = toy.rewards * 1000 / (returns.max() - returns.min())
    torch.testing.assert_close(rewards(toy_file, reward_normalize=True).double(), expected.double(), rtol=1e-5, atol=0)
    both = rewards(toy_file, reward_normalize=True, reward_scale=0.5, reward_shift=3.0)
    torch.testing.assert_close(both.double(), 0.5 * expected.double() + 3, rtol=1e-5, atol=1e-5)


def test_equal_returns_have_no_range(tmp_path: Path) -> None:
    path = tmp_path / "flat.npz"
    write_npz(make_toy(16).with_rewards(0.0, 1.0), path)
    with pytest.raises(OffrlError, match=r"data.reward_normalize=true needs episodes of different return"):
        rewards(path, reward_normalize=True)


@pytest.mark.parametrize(("given", "expected"), [(None, "10000"), ("7", "7")])
def test_openmps_idle_threads_spin_shortly_unless_the_user_says(given: str | None, expected: str) -> None:
    """Set before PyTorch reads it: importing offrl alone must not have imported PyTorch."""
    env = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    if given is not None:
        env["GOMP_SPINCOUNT"] = given
    code = "import offrl, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True)
    assert told.stdout.split() == [expected, "False"]
