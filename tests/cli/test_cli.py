"""The command line: what it prints, what it refuses, sweeps, a user's own agents, and that Python does the same."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import fork, start
from test_train import options, same_tensors, step_of, tensors, words, world  # noqa: F401 - a fixture

import offrl
from offrl.cli import main as cli
from offrl.training.compose import compose
from offrl.training.run_config import resolve_config
from offrl.training.schema import DataConfig, EvalConfig, OnlineConfig, TrainConfig
from offrl.training.trainer import Trainer
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def offrl_command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the command in a process of its own."""
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def main(*arguments: str) -> int:
    """The command in this process; Hydra leaves by SystemExit."""
    try:
        return cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


# ---- words ----------------------------------------------------------------------------------------------------


def test_without_words_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    shown = capsys.readouterr().out
    for command in ("train", "evaluate", "data", "report", "agents"):
        assert f"offrl {command}" in shown


def test_the_version() -> None:
    assert offrl_command("--version") == (0, f"offrl {offrl.__version__}\n", "")


def test_help_of_train_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", "--help") == 0
    shown = capsys.readouterr().out
    sections = {"data": DataConfig, "eval": EvalConfig, "online": OnlineConfig}
    for prefix, cls in {"": TrainConfig, **{f"{name}.": section for name, section in sections.items()}}.items():
        for name in cls.__dataclass_fields__:
            if name in sections:
                continue
            (line,) = [line for line in shown.splitlines() if line.startswith(f"  {prefix}{name}=")]
            assert len(line.split(maxsplit=1)) == 2, f"{prefix}{name} is not explained"
    (agents,) = [line for line in shown.splitlines() if line.startswith("agent=  ")]
    assert {"bc", "td3_bc"} <= set(agents.removeprefix("agent=  ").split(", "))
    assert "sampler=  advantage_weighted, density_weighted, mixture, return_weighted, top_percent, uniform" in shown
    assert "preset=  d4rl, demo, laptop, ogbench, paper" in shown


def test_agents_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("agents") == 0
    listed = capsys.readouterr().out
    assert "td3_bc       TD3+BC: TD3 with a behaviour-cloning term in the actor's loss." in listed
    assert main("agents", "td3_bc") == 0
    shown = capsys.readouterr().out
    assert "Fujimoto" in shown
    assert "agent.alpha=2.5  weight of Q against the behaviour-cloning term" in shown
    assert "agent.hidden=[256,256]" in shown
    assert main("agents", "td3bc") == 2
    assert capsys.readouterr().err == "offrl: error: agent td3bc is unknown; did you mean td3_bc?\n"


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "agent").glob("*.yaml")))
def test_every_setting_of_an_agent_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Inherited ones, too, and those that the formatter has spread over several lines."""
    config = resolve_config(compose({"agent": name, "dataset": "x"}))
    assert main("agents", name) == 0
    shown = re.findall(r"^  agent\.(\w+)=(\S+)", capsys.readouterr().out, re.M)
    assert {key for key, _ in shown} == config.agent.keys() - {"_target_"}
    assert all(default and not default.startswith("(") for _, default in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batchsize=3"], "batchsize is no option; did you mean batch_size?"),
        (["agent.alph=3"], "agent.alph is no option; did you mean agent.alpha?"),
        (["eval.evry=3"], "eval.evry is no option; did you mean eval.every?"),
        (["agent.hidden.x=3"], "agent.hidden={'x': 3} should be a list of whole numbers."),
        (["updates=many"], "updates='many' should be a whole number."),
        (["updates=0"], "updates=0 should be at least 1."),
        (["dataset=nothing-like-it"], "nothing-like-it: no such dataset or file"),
        (["dataset=gone.npz"], "gone.npz: there is no such file or folder"),
        (["--config-dir", "gone", "agent=mine"], "--config-dir gone: there is no such folder"),
        (["resume=gone"], "resume=gone: there is no config.json; name the folder of a run."),
        (["-m", "experiment=bc/gym,td3_bc/gym"], "experiment= takes one name: each brings a sweep of its own"),
        (["suite=[gym9,antmaze]"], "suite= takes one name: each brings a sweep of its own"),
        (["experiment=td3_bc/gmy"], "experiment=td3_bc/gmy is unknown; did you mean experiment=td3_bc/gym?"),
        (["-m", "suite=gim9"], "suite=gim9 is unknown; did you mean suite=gym9?"),
        (["agent=td3bc"], "agent=td3bc is unknown; did you mean agent=td3_bc?"),
        (["preset=big"], "preset=big is unknown; there are d4rl, demo, laptop, ogbench, paper."),
        (["resume=gone", "resume=other"], "resume=other is one run too many; continue one after the other."),
        (["resume=gone", "-m"], "-m can't stand beside resume=RUN"),
        (["resume=gone", "fresh"], "fresh can't stand beside resume=RUN"),
        (["resume=gone", "updates=["], "[ can't be read as a value"),
        (["agent=xyzzy"], "agent=xyzzy is unknown; there are a2pr, awac, bc,"),
        (["agent="], "agent= is unknown; there are"),
        (["agent=../../x"], "agent=../../x is unknown; there are"),
        (["updates="], "updates='' should be a whole number."),
        (["updates==5"], "updates==5 can't be read; put a value with odd letters in two pairs of quotes"),
        (["~updates"], "~updates: an option can't be removed; leave the word out"),
        (["+"], "+ can't be read; give key=value"),
        (["[]"], "[] can't be read; give key=value"),
        (["updates=${nope}"], "the configuration can't be resolved (Interpolation key 'nope' not found"),
        (["updates=choice(1,2)"], "updates=choice(1,2) has several values; sweep over them with -m."),
        (["seed=0,1"], "seed=0,1 has several values; sweep over them with -m, or give lanes: seeds=[0,1]."),
        (["hydra/launcher=nope"], "In 'hydra/config': Could not find 'hydra/launcher/nope'"),
        (["--config-name=zz"], "Cannot find primary config 'zz'"),
        (["updates=１０x"], "updates=１０x can't be read; put a value"),
        (["updates=1e30"], "updates=1e+30 should have at most 63 bits."),
        (["agent.hidden=[-1]"], "agent.hidden=[-1] should be a list of whole numbers of at least 1."),
        (["agent=[-1]"], "argument of type 'int' is not iterable"),
        (["--package"], "--package needs a value behind it"),
        (["--config-name", "updates=3"], "--config-name needs a value behind it"),
        (["--resolve"], "The --resolve flag can only be used in conjunction with --cfg"),
        (["two\nlines"], "two lines can't be read; give key=value"),
        (["agent.hidden=[0]"], "agent.hidden=[0] should be a list of whole numbers of at least 1."),
    ],
    ids=str,
)
def test_bad_words_for_train(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"offrl: error: {message}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["run=3,step=10.npz", "data (1).npz", "données.npz", "a b.npz", "x[1].npz", "it's.npz"]
)
def test_datasets_under_any_name(name: str, toy_file: Path) -> None:
    toy_file.rename(name)
    values = options(name, 4, lanes=1, out="runs (ä)")
    assert main("train", *words(values)) == 0
    (config,) = Path("runs (ä)").rglob("config.json")
    assert json.loads(config.read_text())["dataset"] == name


@pytest.mark.parametrize("arguments", [["--workers", "-3"], ["--workers", "0"], ["--seed", "-1"], ["--episodes", "-2"]])
def test_evaluate_refuses_what_would_hang(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("evaluate", "nothing", *arguments) == 2
    assert re.search(rf"{arguments[0]} {arguments[1]} should be between \d+ and \d+\.", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["agent=dt", "agent.layers=1e9"],
            "the agent would have more than 2,000 tensors of parameters; make it smaller.",
        ),
        (["agent=dt", "agent.context=1e12"], "batch_size=64 windows of 1000000000000 timesteps needs at least"),
        (["agent=dt", "agent.heads=3"], "agent.embed=128 should be a multiple of heads=3."),
        (["agent=sac_n", "agent.members=1e9"], "the agent with 1 lanes and hidden=[256, 256, 256] needs at least"),
        (["agent=doc", "agent.energy_steps=1e9"], "agent.energy_steps=1000000000 should be at most 1000."),
    ],
    ids=str,
)
def test_counts_that_no_machine_serves(
    arguments: list[str], message: str, toy_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a loop of that length is begun."""
    assert main("train", f"dataset={toy_file}", "batch_size=64", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"offrl: error: {message}")
    assert not list(Path().rglob("checkpoint*"))


def test_bad_words_in_a_process_of_their_own() -> None:
    process = fork("train", "agent.alph=3")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, "")
    assert errors == "offrl: error: agent.alph is no option; did you mean agent.alpha?\n"


@pytest.mark.parametrize("arguments", [["agent='td3bc'"], ["--unknown"], ["word"]], ids=str)
def test_unknown_choices_are_readable(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main("train", *arguments) in (1, 2)
    errors = capfd.readouterr().err
    assert arguments[0].split("=")[-1].strip("'") in errors
    assert "Traceback" not in errors
    if arguments == ["agent='td3bc'"]:
        assert " bc " in errors  # those that there are, in one line
        assert " td3_bc " in errors
        assert len(errors.strip().splitlines()) == 1


def test_the_configuration_can_be_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert main("train", "--cfg", "job", "agent=bc", "preset=laptop") == 0
    shown = capfd.readouterr().out
    assert "_target_: offrl.agents.bc.BC" in shown
    assert "updates: 20000" in shown


# ---- runs -----------------------------------------------------------------------------------------------------


def test_the_command_does_what_python_does(toy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same options, same folder name, same parameters."""
    values = options(toy_file, 100)
    assert main("train", *words({**values, "out": "command"})) == 0
    flat = {k: v for k, v in values.items() if k not in ("agent", "eval")}
    dotted = {"agent.hidden": [8, 8], "eval.every": 0, "eval.final_episodes": 0}
    result = offrl.fit(agent="td3_bc", out="python", **flat, **dotted)
    folder = Path("command") / result.folder.relative_to("python")
    assert same_tensors(folder, result.folder)
    assert capsys.readouterr().out == f"finished: not evaluated after 100 updates; {folder}\n"
    assert main("train", *words({**values, "out": "command"})) == 0
    assert capsys.readouterr().out.startswith("already finished: ")


def test_presets_and_command_line_have_their_order(toy_file: Path) -> None:
    """A preset wins over the defaults, and a word over the preset, wherever it stands."""
    arguments = ["updates=10", "eval.final_episodes=0", "eval.every=0", f"dataset={toy_file}", "progress=false"]
    assert main("train", *arguments, "preset=laptop", "name=mine") == 0
    config = json.loads(Path("runs/mine/config.json").read_text())
    assert (config["updates"], config["batch_size"], config["agent"]["hidden"]) == (10, 128, [64, 64])


def test_resume_by_command(toy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = options(toy_file, 60)
    assert main("train", *words(values)) == 0
    folder = resolve_config(values).folder()
    assert main("train", f"resume={folder}", "agent.alpha=1.0") == 2
    assert "agent.alpha can't be changed when a run is resumed" in capsys.readouterr().err
    assert main("train", f"resume={folder}", "updates=1.0e2", "progress=false", "tracker=null") == 0
    assert step_of(folder) == 100
    assert f"after 100 updates; {folder}" in capsys.readouterr().out


def test_one_value_per_lane(toy_file: Path) -> None:
    values = options(toy_file, 20, name="both")
    assert main("train", *words(values), "agent.alpha=[0.5,5.0]") == 0
    assert json.loads(Path("runs/both/config.json").read_text())["agent"]["alpha"] == [0.5, 5.0]
    actor = tensors(Path("runs/both"))["actor.mlp.weights.0"]
    assert actor.shape[0] == 2


def test_unwritable_folders_by_command(toy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main("train", *words(options(toy_file, out="file/runs"))) == 2
    assert "can't be written" in capsys.readouterr().err


def test_evaluate(world: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    values = options("toy.npz", 100, name="mine", seed=6)
    values["eval"] = {"every": 0, "final_episodes": 4, "workers": 1}
    assert main("train", *words(values)) == 0
    said = capsys.readouterr().out
    assert "finished: normalised score" in said
    assert "std over 2 lanes" in said
    assert main("evaluate", "runs/mine", "--episodes", "4", "--workers", "1", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    result = json.loads(Path("runs/mine/result.json").read_text())
    assert shown["lane_seeds"] == [6, 7]
    assert shown["episode_seeds"] == [1_000_000 + k for k in range(4)]
    assert [sum(row) / 4 for row in shown["normalized"]] == pytest.approx(result["scores"])
    assert shown["lengths"] == [[4] * 4] * 2
    assert main("evaluate", "runs/mine/checkpoint.safetensors", "--episodes", "4", "--workers", "1") == 0
    table = capsys.readouterr().out
    assert all(f"{score:.1f}" in table for score in result["scores"])
    assert main("evaluate", "runs", "--episodes", "1") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main("evaluate", "runs/mine", "--episodes", "0") == 2


# ---- a machine that has run out of something ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("closed", marks=pytest.mark.slow), "full", "left"])
def test_a_run_is_finished_though_nobody_can_hear_of_it(kind: str, toy_file: Path) -> None:
    """Standard output closed, on a full disk, or a pipe whose reader has left."""
    given = ["train", *words(options(toy_file, 4, lanes=1, name="mine"))]
    if kind == "left":
        process = start(*given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(120)
    else:
        where = ">&-" if kind == "closed" else ">/dev/full"
        command = f"exec {sys.executable} -m offrl {shlex.join(given)} {where}"
        env = {**os.environ, "PYTHONPATH": str(Path(offrl.__file__).parents[1])}
        process = subprocess.run(["sh", "-c", command], env=env, text=True, capture_output=True, timeout=120)
        errors = process.stderr
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert process.returncode == (2 if kind == "full" else 0)
    assert errors.endswith("No space left on device; free some space, then repeat the command.\n") or kind != "full"
    assert json.loads(Path("runs/mine/result.json").read_text())["step"] == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; free some space"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; allow more open files (ulimit -n)"),
        (MemoryError("Unable to allocate 9 TiB"), "the memory is not enough (Unable to allocate 9 TiB); use smaller"),
        (
            type("FatalError", (Exception,), {"__module__": "mujoco"})("Could not allocate memory"),
            "the simulator failed",
        ),
    ],
    ids=["disk", "files", "memory", "simulator"],
)
def test_a_machine_that_has_run_out_of_something(
    error: Exception, message: str, toy_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a run: a sentence, and the same command goes on."""
    given = words(options(toy_file, 100, lanes=1))
    run = Trainer._log

    def fail(trainer: Trainer, *arguments: Any) -> None:
        run(trainer, *arguments)
        if trainer.step == 100:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", fail)
        assert main("train", *given) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"offrl: error: {message}")
    assert errors.count("\n") == 1
    folder = resolve_config(options(toy_file, 100, lanes=1)).folder()
    assert step_of(folder) == 50
    assert main("train", *given) == 0
    assert same_tensors(folder, offrl.training.trainer.train(options(toy_file, 100, lanes=1, out="alone")).folder)


def test_a_terminal_without_our_letters(toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    name = "mine-\u2713"
    assert start("train", *words(options(toy_file, 4, lanes=1, name=name)), stdout=subprocess.DEVNULL).wait(120) == 0
    assert Path("runs", name, "result.json").exists()


# ---- a user's own agent ---------------------------------------------------------------------------------------

OWN_AGENT = '''
"""Mean: act by the dataset's mean action."""
from dataclasses import dataclass
import torch
from offrl.agent import Agent

@dataclass
class MeanConfig:
    rate: float = 0.1  # of the moving average

class Mean(Agent):
    Config = MeanConfig

    def build(self):
        self.register_buffer("mean", torch.zeros(self.spec.lanes, 1, self.spec.action_dim))

    def update(self, batch, phase):
        rate = self.cfg.rate if isinstance(self.cfg.rate, float) else self.cfg.rate.view(-1, 1, 1)
        error = batch.action.mean(1, keepdim=True) - self.mean
        self.mean += rate * error
        return {"error": error.abs().mean((-2, -1))}

    def act(self, obs):
        return self.mean.to(obs).expand(*obs.shape[:-1], -1)
'''


def test_a_new_agent_is_one_python_file_and_one_yaml(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Trained by name from a folder of the user's own, with lanes, a value per lane, evaluation and checkpoints."""
    (world / "mine.py").write_text(OWN_AGENT)
    (world / "own" / "agent").mkdir(parents=True)
    settings = '_target_: mine.Mean\nsettings:\n  "*toy*":\n    rate: 0.25\n'
    (world / "own" / "agent" / "mean.yaml").write_text(settings)
    values = options("toy.npz", 200)
    values["eval"] = {"every": 0, "final_episodes": 2, "workers": 1}
    arguments = [word for word in words(values) if not word.startswith("agent")]
    process = fork("train", "--config-dir", "own", "agent=mean", *arguments)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert "finished: normalised score" in output
    (folder,) = Path("runs/mean/toy.npz").iterdir()
    assert json.loads((folder / "config.json").read_text())["agent"] == {"_target_": "mine.Mean", "rate": 0.25}
    with pytest.raises(
        OffrlError, match=r"agent._target_=mine.Mean comes from a file, .*; import mine first, or give --trust"
    ):
        offrl.load_agent(folder)
    monkeypatch.syspath_prepend(str(world))
    agent = offrl.load_agent(folder, trust=True)
    expected = offrl.load_data("toy.npz").actions.mean(0)
    action = agent.select_action(torch.zeros(2, 1, 3))
    torch.testing.assert_close(action[:, 0], expected.expand(2, -1), atol=0.15, rtol=0)
    assert main("train", "--config-dir=own", "agent=mean", "agent.rate=[0.1,0.5]", *arguments) == 0
    assert main("train", "--config-dir=own", "agent=mean", "agent.rat=1", *arguments) == 2
    model = ["augment=world_model", "augment.transitions=20", "augment.model.updates=2", "augment.model.hidden=[8]"]
    assert main("augment", "sample", "more.npz", "--policy", str(folder), "--config-dir", "own", *model) == 0
    assert len(offrl.load_data("more.npz")) == 20


# ---- from Python ----------------------------------------------------------------------------------------------


def test_python_gets_exceptions_instead_of_exits(toy_file: Path) -> None:
    with pytest.raises(OffrlError, match=r"agent.alph is no option; did you mean agent.alpha?"):
        offrl.fit(agent="td3_bc", dataset=str(toy_file), **{"agent.alph": 1})
    with pytest.raises(OffrlError, match=r"agent=td3bc is unknown; did you mean agent=td3_bc"):
        offrl.fit(agent="td3bc", dataset=str(toy_file))
    with pytest.raises(OffrlError, match="no such dataset"):
        offrl.fit(dataset="nothing-like-it")


def test_data_and_agents_from_python(toy_file: Path) -> None:
    flat = {"updates": 10, "batch_size": 8, "progress": False, "eval.every": 0, "eval.final_episodes": 0}
    result = offrl.fit(agent="bc", dataset=toy_file, **flat, **{"agent.hidden": [8]})
    assert result.status == "finished"
    store = offrl.load_data(toy_file)
    action = offrl.load_agent(result.folder).select_action(store.observations[:5].unsqueeze(0))
    assert action.shape == (1, 5, 2)
