"""Sweeps: each job once, failures told and isolated, nothing repeated; and `offrl status`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import start
from test_cli import main
from test_train import options, same_tensors, step_of, wait_for, words

import offrl.training.trainer
from hydra_plugins.offrl_launchers import LocalLauncher
from offrl.training import sweep
from offrl.training.run_config import resolve_config
from offrl.training.runs import finished


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(folder: Path, step: int, **files: Any) -> None:
    """What a run leaves in its folder, without running it."""
    folder.mkdir(parents=True)
    config = {"method": "bc", "dataset": "toy", "updates": 100}
    rows = [{"step": s, "metric": m, "value": 5.0} for s in (10, step) for m in ("bc_loss", "updates_per_second")]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


# ---- in this process ------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Configurations of the jobs whose training process would have been started; each ends by its seed as status."""
    begun: list[dict[str, Any]] = []

    def instead(values: dict[str, Any], log: Path, started: Any, env: Any) -> int:
        started(0)
        begun.append(values)
        log.write_text("loading\nTraceback\nOSError: no such sector\n")
        if values["seed"] == 0:
            for name in ("config.json", "manifest.json", "episodes.jsonl", "metrics.jsonl"):
                (log.parent / name).write_text("{}" if name.endswith("json") else "")
            (log.parent / "result.json").write_text(json.dumps({"step": 9, "returns": [1.5], "scores": None}))
        return int(values["seed"])

    monkeypatch.setattr(sweep, "_train_in_child", instead)
    return begun


def test_jobs_end_as_their_processes_do(toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Finished, killed, broken: each has its line, the failures their reason and log; the next time two are left."""
    given = ["train", "-m", *words(options(toy_file, 9, lanes=1)), "seed=0,-9,1"]
    assert main(*given) == 1
    output, errors = capfd.readouterr()
    assert re.search(r"^\[0\] seed=0: finished: return 1\.5 after 9 updates; runs/td3_bc/", output, re.M)
    assert re.search(r"^\[1\] seed=-9: failed: its process was ended by SIGKILL \(out of memory\?\)$", output, re.M)
    assert "3 jobs: 1 finished, 2 failed" in errors
    assert "job 2 failed: seed=1: OSError: no such sector\n  log: " in errors
    assert "  | loading\n  | Traceback\n" in errors
    folder = resolve_config(options(toy_file, 9, lanes=1, seed=1)).folder()
    assert json.loads((folder / "failed.json").read_text())["message"] == "OSError: no such sector"
    assert not Path("runs/.sweep").exists()
    assert main(*given) == 1
    assert [values["seed"] for values in jobs] == [0, -9, 1, -9, 1]
    assert re.search(r"^\[0\] seed=0: already finished", capfd.readouterr().out, re.M)


def test_an_interrupt_ends_the_whole_sweep(toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert main("train", "-m", *words(options(toy_file, 9, lanes=1)), "seed=130,1") == 130
    assert len(jobs) == 1
    assert "2 jobs: 1 waiting, 1 stopped\nthe same command goes on" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("swept", "refusal"),
    [
        (["updates=9,5"], r"updates can't be swept, since updates=9 and updates=5 would .*keep_checkpoints=true"),
        (["updates=9,5", "hydra/launcher=local"], r"updates can't be swept"),
        (
            ["seed=0,1", "threads=1,2"],
            r"threads can't be swept, since threads=1 and threads=2 would have one run folder",
        ),
        (["seed=3,4", "name=mine"], r"seed=3 and seed=4 would have one run folder, runs/mine; give each job a name="),
        (["seed=3,3"], r"two jobs of the sweep have the same words, .*; give each value once"),
    ],
)
def test_a_sweep_whose_jobs_would_share_a_folder_is_refused(
    toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str], swept: list[str], refusal: str
) -> None:
    given = [word for word in words(options(toy_file, 9, lanes=1)) if not word.startswith("updates=")]
    assert main("train", "-m", *given, *swept) == 2
    assert re.search(f"^offrl: error: {refusal}", capfd.readouterr().err, re.M)
    assert not jobs
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "swept",
    [
        ["updates=9,5", "name=run${updates}"],
        ["updates=9,5", "out=run${updates}"],
        ["updates=9,5", "online.steps=20", "eval.env=Pendulum-v1"],  # they say where the online phase begins
        ["lanes=1,2"],
    ],
)
def test_jobs_that_differ_by_their_folder_are_swept(toy_file: Path, jobs: list[Any], swept: list[str]) -> None:
    given = [word for word in words(options(toy_file, 9)) if not word.startswith(("updates=", "lanes="))]
    main("train", "-m", *given, "seed=0", *swept)
    assert len(jobs) == 2


def test_a_refused_job_has_its_own_sentence_as_reason(tmp_path: Path) -> None:
    """Another process may have written to its log since."""
    log = tmp_path / "log.txt"
    log.write_text("offrl: error: x=1 should be 2.\n" + "finished: return 1 after 9 updates\n" * 20)
    assert sweep._reason(2, log) == "x=1 should be 2."
    assert sweep._reason(1, log) == "finished: return 1 after 9 updates"


def test_bad_words_fail_their_job_alone(toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert main("train", "-m", *words(options(toy_file, 9, lanes=1)), "seed=0", "agent.tau=x,0.01") == 1
    assert len(jobs) == 1
    assert "job 0 failed: agent.tau=x: agent.tau='x' should be a number" in capfd.readouterr().err


def test_a_word_replaces_what_an_experiment_sweeps(toy_file: Path, jobs: list[Any]) -> None:
    """The experiment asks for two seeds, the command line for one other: one run."""
    folder = Path("mine/experiment")
    folder.mkdir(parents=True)
    params = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n"
    (folder / "two.yaml").write_text("# @package _global_\n" + params)
    given = [*words(options(toy_file, 9)), "--config-dir", "mine", "experiment=two"]
    main("train", *given)
    main("train", *given, "seed=7")
    assert [values["seed"] for values in jobs] == [0, 1, 7]


def test_a_suite_is_swept_by_itself(toy_file: Path, jobs: list[Any]) -> None:
    """One of ours, and one in the user's folder; a word replaces its datasets, and more words multiply them."""
    main("train", "suite=kitchen", "agent=bc", "seed=0")
    assert [values["dataset"] for values in jobs] == [f"kitchen-{name}-v0" for name in ("complete", "partial", "mixed")]
    jobs.clear()
    Path("mine/suite").mkdir(parents=True)
    params = f"mode: MULTIRUN\nsweeper:\n  params:\n    dataset: {toy_file},other.npz\n"
    Path("mine/suite/two.yaml").write_text("# @package hydra\n" + params)
    given = [word for word in words(options(toy_file, 9)) if not word.startswith("dataset=")]
    main("train", *given, "--config-dir", "mine", "suite=two", "seed=3,4")
    assert [(values["dataset"], values["seed"]) for values in jobs] == [
        (dataset, seed) for dataset in (str(toy_file), "other.npz") for seed in (3, 4)
    ]
    jobs.clear()
    main("train", *given, "--config-dir", "mine", "suite=two", "seed=3", f"dataset={toy_file}")
    assert [values["dataset"] for values in jobs] == [str(toy_file)]


# ---- launchers, in this process --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "joblib"])
def test_two_jobs_at_once(toy_file: Path, jobs: list[Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each waits until another one runs, so one after another they would wait for ever."""
    both, alone = threading.Barrier(2), sweep._train_in_child

    def together(values: dict[str, Any], *others: Any) -> int:
        both.wait(60)
        return alone(values, *others)

    monkeypatch.setattr(sweep, "_train_in_child", together)
    launcher = [f"hydra/launcher={name}", "hydra.launcher.n_jobs=2"]
    main("train", "-m", *words(options(toy_file, 9, lanes=1)), *launcher, "seed=3,4,5,6")
    assert sorted(values["seed"] for values in jobs) == [3, 4, 5, 6]


@pytest.mark.parametrize("cores", [1, 4])
def test_how_many_jobs_run_at_once(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr("offrl.evaluation.evaluator.usable_cores", lambda: cores)
    counts = {n_jobs: LocalLauncher(n_jobs).at_once(10) for n_jobs in (-9, -2, -1, 0, 3, 99)}
    assert counts == {-9: 1, -2: max(1, cores - 1), -1: cores, 0: 1, 3: 3, 99: 10}


def test_a_job_that_cannot_be_composed_fails_alone(
    toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    given = [
        *words(options(toy_file, 9, lanes=1)),
        "hydra/launcher=local",
        "agent.tau=${oc.env:NO_SUCH},0.1,0.2",
        "seed=0",
    ]
    assert main("train", "-m", *given) == 1
    assert len(jobs) == 2
    errors = capfd.readouterr().err
    assert "3 jobs: 2 finished, 1 failed" in errors
    assert "Environment variable 'NO_SUCH' not found" in errors
    assert "Traceback" not in errors


def test_an_interrupted_job_lets_no_further_one_begin(
    toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = ["hydra/launcher=local", "hydra.launcher.n_jobs=1"]
    assert main("train", "-m", *words(options(toy_file, 9, lanes=1)), *launcher, "seed=0,130,1") == 130
    assert [values["seed"] for values in jobs] == [0, 130]
    assert "3 jobs: 1 finished, 1 waiting, 1 stopped" in capfd.readouterr().err


def test_variables_of_a_jobs_environment(toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hydra.job.env_set` may differ from job to job, such as to give each its GPU."""
    seen: list[str] = []

    def instead(values: dict[str, Any], log: Path, started: Any, env: dict[str, str]) -> int:
        seen.append(env["CUDA_VISIBLE_DEVICES"])
        return 1

    monkeypatch.setattr(sweep, "_train_in_child", instead)
    given = ["hydra/launcher=local", "+hydra.job.env_set.CUDA_VISIBLE_DEVICES=${hydra:job.num}", "seed=0,1,2"]
    main("train", "-m", *words(options(toy_file, 9, lanes=1)), *given)
    assert sorted(seen) == ["0", "1", "2"]


def test_notes_of_a_killed_sweep_are_cleared_by_the_next(toy_file: Path, jobs: list[Any]) -> None:
    """Those of a sweep that still runs, which holds its lock, stay."""
    running, killed = Path("runs/.sweep/a"), Path("runs/.sweep/b")
    for notes in (running, killed):
        notes.mkdir(parents=True)
        (notes / "0.json").write_text("{}")
        (notes / sweep.LOCK).touch()
    with open(running / sweep.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main("train", "-m", *words(options(toy_file, 9, lanes=1)), "seed=0,1")
        assert [path.name for path in Path("runs/.sweep").iterdir()] == ["a"]
        assert (running / "0.json").exists()
    main("train", "-m", *words(options(toy_file, 9, lanes=1)), "seed=0,1")
    assert not Path("runs/.sweep").exists()


def test_every_agent_is_swept_by_the_zoos_recipe(jobs: list[Any]) -> None:
    main("train", "experiment=zoo/forge", "dataset=forge/hopper/medium-v0")
    targets = [values["agent"]["_target_"] for values in jobs]
    assert len(targets) == len(set(targets)) >= 5
    assert {"offrl.agents.bc.BC", "offrl.agents.td3_bc.TD3BC"} <= set(targets)


def test_status_tells_the_states_apart(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"step": 100, "returns": [7.0], "scores": [40.0, 42.0]}
    make_run(Path("runs/bc/toy/a"), 100, result=result)
    make_run(Path("runs/bc/toy/b"), 40)
    make_run(Path("runs/bc/toy/c"), 40, failed={"message": "the disk is full"})
    make_run(Path("runs/bc/toy/d"), 40, result={**result, "step": 50})  # its budget was raised
    Path("runs/bc/gone/e").mkdir(parents=True)
    Path("runs/bc/gone/e/failed.json").write_text('{"message": "no such dataset"}')
    make_run(Path("runs/bc/toy/f"), 40)
    with offrl.utils.process._locked(Path("runs/bc/toy/f")):
        assert main("status", "runs", "--json") == 0
    shown = {Path(s["folder"]).name: s for s in map(json.loads, capsys.readouterr().out.splitlines())}
    states = {name: s["state"] for name, s in shown.items()}
    expected = {"a": "finished", "b": "stopped", "c": "failed", "d": "stopped", "e": "failed", "f": "running"}
    assert states == expected
    assert shown["a"]["message"] == "normalised score 41.0"
    assert (shown["b"]["step"], shown["b"]["updates"], shown["b"]["updates_per_second"]) == (40, 100, 5.0)
    assert shown["e"]["dataset"] == "gone"
    assert main("status", "runs") == 0
    text = capsys.readouterr().out
    assert "6 runs: 3 stopped, 2 failed, 1 finished" in text
    assert "the disk is full" in text


@pytest.mark.parametrize("out", ["file/runs", "/proc/nothing"])
def test_a_sweep_into_a_folder_that_cant_be_written(
    out: str, toy_file: Path, jobs: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert main("train", "-m", *words(options(toy_file, 9, lanes=1, out=out)), "seed=0,1") == 2
    assert not jobs
    errors = capfd.readouterr().err
    assert errors.startswith(f"offrl: error: out={out} can't be written")
    assert errors.count("\n") == 1


WRONG = {
    "result": '{"step": "x"}',
    "failed": '{"message": 3}',
    "config": '{"updates": "x"}',
    "manifest": '{"critic": 1}',
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, None])
def test_status_shows_damage_in_its_row(name: str, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The other runs are shown as ever."""
    make_run(Path("runs/bc/toy/a"), 100, result={"step": 100, "returns": [7.0], "scores": None})
    make_run(Path("runs/bc/toy/b"), 40)
    Path(f"runs/bc/toy/b/{name}.json").write_text(text or WRONG[name])
    assert main("status", "runs") == 0
    shown = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 damaged" in shown
    assert re.search(rf"^damaged .*b/{name}\.json: .*; (remove it|restore it or leave the run out)\.$", shown, re.M)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_odd_lock_keeps_neither_status_nor_a_training_waiting(
    make: Callable[[Path], None], toy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(Path("runs/a"), 40)
    make(Path("runs/a/.lock"))
    assert main("status", "runs") == 0
    assert "1 runs: 1 stopped" in capsys.readouterr().out
    assert main("train", *words(options(toy_file, 60, lanes=1)), "name=a") == 2
    assert "a/.lock can't be written" in capsys.readouterr().err


# ---- with processes -------------------------------------------------------------------------------------------


def test_a_sweep_makes_the_runs_that_single_commands_make(toy_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One job diverges; the other's parameters are bitwise those of the same run outside a sweep.

    A file of the user's that is named like one of Python's modules is not imported.
    """
    Path("random.py").write_text("raise RuntimeError")
    values = options(toy_file, 60, lanes=1)
    assert main("train", "-m", *words(values), "agent.critic_lr=1.0e30,3.0e-4") == 1
    output, errors = capfd.readouterr()
    assert "job 0 failed: agent.critic_lr=1e+30" in errors
    assert "is no longer finite" in errors
    assert "Traceback" not in output + errors
    good = options(toy_file, 60, lanes=1, agent={"critic_lr": 3e-4})
    assert same_tensors(resolve_config(good).folder(), offrl.training.trainer.train({**good, "out": "alone"}).folder)


def processes_of(folder: Path) -> list[int]:
    """Training processes whose output goes to the log of a run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            log = (entry / "fd" / "1").readlink()
            if log == (folder / sweep.LOG).resolve() and b"offrl.training.child" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("launcher", "seeds"), [("basic", "0"), pytest.param("local", "0,1", marks=pytest.mark.slow)])
def test_a_job_imports_what_the_sweep_can_import(
    toy_file: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, seeds: str
) -> None:
    """A user's agent, from a folder that the sweep's own process has on its path by more than the environment."""
    Path("mine/agent").mkdir(parents=True)
    Path("mine/own_agent.py").write_text("from offrl.agents.td3_bc import TD3BC\n\nclass Own(TD3BC): pass\n")
    Path("mine/agent/own.yaml").write_text("_target_: own_agent.Own\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path("mine").resolve())])
    given = [*words(options(toy_file, 10, lanes=1))[1:], "agent=own", "--config-dir", "mine", f"seed={seeds}"]
    assert main("train", "-m", *given, f"hydra/launcher={launcher}") == 0
    assert len(list(Path("runs").rglob("result.json"))) == len(seeds.split(","))


LAUNCHERS = {
    "local": ["hydra/launcher=local", "hydra.launcher.n_jobs=2"],
    "ray": [
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false",
    ],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
}
NEEDED = {"ray": ("ray", "ray"), "submitit": ("hydra_plugins.hydra_submitit_launcher", "slurm")}


def launched_by(name: str) -> list[str]:
    """The words that choose a launcher; the test is skipped where it isn't installed."""
    if name in NEEDED:
        module, extra = NEEDED[name]
        pytest.importorskip(module, reason=f"offrl[{extra}] is not installed")
    return LAUNCHERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_an_interrupt_saves_what_a_launcher_runs(toy_file: Path, launcher: str) -> None:
    """Both jobs save at the update they had reached, and the third does not begin."""
    values = options(toy_file, 1_000_000, lanes=1, checkpoint_every=50)
    folders = [resolve_config({**values, "seed": seed}).folder() for seed in (0, 1)]
    given = [*words(values), *launched_by(launcher), "seed=0,1,2"]
    process = start("train", "-m", *given, stderr=subprocess.PIPE)
    wait_for(lambda: all(step_of(folder) for folder in folders), process, 400)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 130
    assert "3 jobs: 1 waiting, 2 stopped" in errors
    for folder in folders:
        assert f"stopped at update {step_of(folder)}; go on with" in (folder / sweep.LOG).read_text()


def marked(mark: str) -> set[int]:
    """Processes, other than this one, whose environment holds the mark."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
    return found - {os.getpid()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_nothing_outlives_a_killed_sweep(toy_file: Path, monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    """Its jobs save and stop, and every other process that it started ends; Ray leaves its jobs no time to save."""
    mark = f"OFFRL_TEST_MARK={toy_file}"
    monkeypatch.setenv(*mark.split("="))
    values = options(toy_file, 1_000_000, lanes=1, checkpoint_every=50)
    folders = [resolve_config({**values, "seed": seed}).folder() for seed in (0, 1)]
    process = start("train", "-m", *words(values), *launched_by(launcher), "seed=0,1,2", stdout=subprocess.DEVNULL)
    wait_for(lambda: all(step_of(folder) for folder in folders), process, 400)
    assert len(marked(mark)) >= 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    for folder in folders if launcher != "ray" else ():
        assert f"stopped at update {step_of(folder)}; go on with" in (folder / sweep.LOG).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "ray", "submitit"])
def test_four_jobs_with_one_killed_and_one_failing(toy_file: Path, launcher: str) -> None:
    """The others end well; the same command then makes the killed one whole, and repeats nothing."""
    values = options(toy_file, 1200, lanes=1, checkpoint_every=100)
    sweep_of = ["train", "-m", *words(values), *launched_by(launcher)]
    sweep_of += ["seed=0,1", "agent.critic_lr=3.0e-4,3.1e-4"]
    victim = resolve_config(options(toy_file, 1200, lanes=1, seed=1, agent={"critic_lr": 3e-4})).folder()
    broken = resolve_config(options(toy_file, 1200, lanes=1, seed=0, agent={"critic_lr": 3e-4})).folder()
    broken.mkdir(parents=True)
    (broken / "checkpoint.safetensors").write_text("no checkpoint")  # it can't go on from that
    process = start(*sweep_of, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline, killed = time.monotonic() + 400, 0
    while not killed and time.monotonic() < deadline:
        for pid in processes_of(victim) if step_of(victim) else []:
            os.kill(pid, signal.SIGKILL)
            killed = pid
        time.sleep(0.02)
    output, errors = process.communicate(timeout=900)
    assert killed, errors
    assert process.returncode == 1
    assert "4 jobs: 2 finished, 2 failed" in errors
    assert "its process was ended by SIGKILL" in errors
    assert "this is no offrl checkpoint, or it is damaged" in errors
    assert 0 < step_of(victim) < 1200
    results = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}
    assert len(results) == 2
    (broken / "checkpoint.safetensors").unlink()
    again = start(*sweep_of, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = again.communicate(timeout=900)
    assert again.returncode == 0, errors
    assert len(re.findall("already finished", output)) == 2
    assert {p: p.stat().st_mtime_ns for p in results} == results
    assert finished(broken, 1200)
    alone = offrl.training.trainer.train(
        {**options(toy_file, 1200, lanes=1, seed=1, agent={"critic_lr": 3e-4}), "out": "alone"}
    )
    assert same_tensors(victim, alone.folder)
