"""Runs with an online phase from one command to the next: what is taken over, what is removed, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from conftest import make_toy
from test_online import ENVIRONMENT, EVAL, Killed, dying, options, rows, same, world  # noqa: F401 - a fixture

from offrl.augment.termination import termination
from offrl.cli import main as cli
from offrl.data.arrays import write_npz
from offrl.envs.lanes import LaneEnvs
from offrl.results.rows import folders
from offrl.training.finetune import finetune
from offrl.training.online import OnlinePhase
from offrl.training.run_config import resolve_config
from offrl.training.trainer import Trainer, resume, train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError
from offrl.utils.settings import set_dotted


def offline(**changes: Any) -> Path:
    return train({**options(**changes), "online": {}}).folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ---- files of an earlier online phase ----------------------------------------------------------------------------------


def test_rows_without_a_checkpoint_do_not_stand_in_the_way_of_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the first file of rows and its checkpoint; then the run stops at another step, and goes on."""
    values = {**options(), "out": "killed"}
    quiet = train({**values, "out": "quiet"})
    folder = resolve_config(values).folder()
    for every, saves, expected in (
        (25, 2, ["00000000-00000010.safetensors"]),
        (30, 2, ["00000000-00000020.safetensors", "00000020-00000050.safetensors"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", dying(checkpoint.save, saves))
            with pytest.raises(Killed):
                train({**values, "checkpoint_every": every})
        assert names(folder / "replay") == expected
    assert resume(folder).status == "finished"
    assert same(quiet.folder, folder)


@pytest.mark.parametrize(("changes", "kept"), [({}, 4), ({"eval.max_episode_steps": 3}, 0)], ids=str)
def test_scores_before_are_of_the_task_of_those_after(changes: dict[str, Any], kept: int) -> None:
    """An offline half of six final episodes, fine-tuned with two: four more of the same task stay, and none of another."""
    run = offline(eval={**EVAL, "every": 20, "final_episodes": 6})
    tuned = finetune(run, {"online.steps": 60, "out": "tuned", "eval.final_episodes": 2, **changes}).folder
    switch = max(row["step"] for row in rows(run, "episodes"))
    before = [row for row in rows(tuned, "episodes") if row["step"] == switch]
    lanes = len({row["lane"] for row in before})
    assert len(before) == lanes * (kept + 2)
    assert all(row["length"] <= changes.get("eval.max_episode_steps", 7) for row in before)
    earlier = {row["step"] for row in rows(tuned, "episodes")} - {row["step"] for row in before}
    assert (min(earlier) < switch) is bool(kept)  # of the offline half's curve, too


def test_an_online_phase_goes_on_under_the_same_references(monkeypatch: pytest.MonkeyPatch) -> None:
    run = offline(eval={**EVAL, "final_episodes": 2})
    with monkeypatch.context() as patch:
        patch.setattr(LaneEnvs, "step", dying(LaneEnvs.step, 31))
        with pytest.raises(Killed):
            finetune(run, {"online.steps": 60, "out": "tuned"})
    (folder,) = folders([Path("tuned")])
    with pytest.raises(OffrlError, match=r"the run was scored with eval\.ref_min=None, not 0\.0"):
        resume(folder, {"eval.ref_min": 0.0, "eval.ref_max": 1.0})
    assert resume(folder).status == "finished"


TUNE = {"online.steps": 60, "online.eval_every": 30, "out": "tuned", "keep_checkpoints": True}


def test_a_fine_tuning_that_starts_over_leaves_nothing_of_the_one_before() -> None:
    """Neither rows nor kept checkpoints, which end at other steps; the numbers are those of the first time."""
    run = offline()
    quiet = finetune(run, {**TUNE, "out": "quiet"})
    finetune(run, TUNE)
    again = finetune(run, {**TUNE, "fresh": True, "checkpoint_every": 30})
    assert again.status == "finished"
    assert names(again.folder / "replay") == [
        f"{first:08d}-{end:08d}.safetensors" for first, end in ((0, 20), (20, 50), (50, 60))
    ]
    assert names(again.folder / "checkpoints") == [f"{step:08d}.safetensors" for step in (40, 60, 90, 100)]
    assert same(quiet.folder, again.folder)


def test_a_kill_while_a_fine_tuning_starts_over_does_not_bring_back_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = offline()
    first = finetune(run, TUNE)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", dying(checkpoint.write, 0))
        with pytest.raises(Killed):
            finetune(run, {**TUNE, "fresh": True})
    left = {path.name for path in first.folder.rglob("*") if path.suffix in (".safetensors", ".json", ".jsonl")}
    assert left <= {"config.json", "manifest.json", "episodes.jsonl", "metrics.jsonl"}
    assert {row["step"] for row in rows(first.folder, "episodes")} == {40}
    again = finetune(run, TUNE)
    assert again.status == "finished"
    assert same(finetune(run, {**TUNE, "out": "quiet"}).folder, again.folder)


def test_a_fine_tuning_that_is_refused_leaves_the_one_before_as_it_is() -> None:
    run = offline()
    tuned = finetune(run, TUNE).folder
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"[1]\n" + metrics.read_bytes())
    before = contents(tuned)
    with pytest.raises(OffrlError, match="is no row of results"):
        finetune(run, {**TUNE, "fresh": True})
    assert contents(tuned) == before


def test_a_fine_tuning_finds_the_datasets_of_its_run_from_another_folder(
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the sampler, too; the configuration names them as before, so that the folder is the same one."""
    write_npz(make_toy(64, seed=1).with_info(env_id="Drift-v0"), world / "more.npz")
    sampler = {"_target_": "offrl.sampling.Mixture", "datasets": ["more.npz"], "shares": [0.5]}
    run = offline(sampler=sampler).resolve()
    here = finetune(run, {"online.steps": 5, "out": str(world / "here")}).folder
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    there = finetune(run, {"online.steps": 5, "out": "there"}).folder.resolve()
    assert there.relative_to(world / "elsewhere" / "there") == here.relative_to(world / "here")
    assert same(here, there)
    assert resume(there, {"eval.final_episodes": 3}).status == "finished"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device": "cuda"}, "sees no GPU"),
        ({"tracker": "wandb"}, "wandb"),
        ({"eval.env": "Nowhere-v0"}, "Nowhere"),
        ({"missing": True}, "no such file"),
        ({"replaced": True}, "made on other data"),
    ],
    ids=str,
)
def test_a_fine_tuning_that_is_refused_leaves_no_run(
    changes: dict[str, Any],
    sentence: str,
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A report would show what it leaves as a finished run of both halves."""
    run, data = offline(), world / "toy.npz"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    kept = data.read_bytes()
    if changes.pop("missing", False):
        data.unlink()
    elif changes.pop("replaced", False):
        write_npz(make_toy(40, seed=1).with_info(env_id="Drift-v0"), data)
    with pytest.raises(OffrlError, match=sentence):
        finetune(run, {**TUNE, **changes})
    assert folders(["tuned"]) == []
    data.write_bytes(kept)
    assert finetune(run, TUNE).status == "finished"


# ---- an online phase that comes or goes ----------------------------------------------------------------------------------


def test_a_named_run_neither_loses_its_online_phase_nor_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    both, half = {**options(), "name": "both"}, {**options(), "online": {}, "name": "half"}
    cut = {**options(), "name": "cut"}
    train(both)
    train(half)
    with monkeypatch.context() as patch:
        patch.setattr(LaneEnvs, "step", dying(LaneEnvs.step, 31))
        with pytest.raises(Killed):
            train(cut)
    for values, sentence in (
        ({**both, "online": {}}, "other settings \\(online True, now False\\)"),
        ({**cut, "online": {}}, "other settings \\(online True, now False\\)"),
        ({**half, "online": both["online"]}, "other settings \\(online False, now True\\)"),
    ):
        before = contents(Path("runs", values["name"]))
        with pytest.raises(OffrlError, match=sentence):
            train(values)
        assert contents(Path("runs", values["name"])) == before
    assert train(both).status == train(half).status == "already finished"
    assert train(cut).status == "finished"
    other = offline(name="other", agent={"alpha": 2.5})
    with pytest.raises(OffrlError, match="online False, now True"):
        finetune(Path("runs/half"), {"name": other.name, "online.steps": 5})


# ---- the environment of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("env", "Other-v0"), ("env_kwargs", {"x": 1}), ("max_episode_steps", 5)], ids=str
)
def test_the_environment_of_an_online_phase_is_one_of_its_settings(key: str, value: Any) -> None:
    """Without such a phase it is played in between updates alone, and nothing of the training depends on it."""
    gymnasium.register("Other-v0", entry_point=gymnasium.spec("Drift-v0").entry_point, max_episode_steps=7)
    try:
        for online, same_run in (({}, True), (options()["online"], False)):
            values = {**options(), "online": online}
            usual, other = (resolve_config({**values, "eval": {**EVAL, **new}}) for new in ({}, {key: value}))
            assert (usual.config_hash() == other.config_hash()) is same_run
    finally:
        del gymnasium.registry["Other-v0"]
    for name, new in (("workers", 2), ("episodes", 3), ("ref_min", 0.0)):  # no number of the training depends on these
        assert (
            resolve_config(options()).config_hash() == resolve_config(options(eval={**EVAL, name: new})).config_hash()
        )


def test_the_time_limit_of_an_online_phase_does_not_change_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    values = options(eval={**EVAL, "max_episode_steps": 6})
    folder = resolve_config(values).folder()
    with monkeypatch.context() as patch:
        patch.setattr(LaneEnvs, "step", dying(LaneEnvs.step, 31))
        with pytest.raises(Killed):
            train(values)
    for changes in ({"eval.max_episode_steps": 5}, {"eval.max_episode_steps": None}, {"eval.env": "Drift-v0"}):
        with pytest.raises(OffrlError, match=f"other settings \\({next(iter(changes))}"):
            resume(folder, changes)
    assert resume(folder, {"eval.max_episode_steps": 6, "eval.final_episodes": 1}).status == "finished"
    run = offline(out="offline")
    assert resume(run, {"eval.max_episode_steps": None, "updates": 45}).status == "finished"


def test_an_evaluation_elsewhere_leaves_the_environment_of_an_online_phase_as_it_is() -> None:
    """A run without an episode so far keeps those of `offrl evaluate`, and it can still be resumed."""
    folder = train(options(eval={**EVAL, "episodes": 0, "final_episodes": 0})).folder
    assert cli.main(["evaluate", str(folder), "--env", "Drift-v0", "--episodes", "1", "--workers", "1"]) == 0
    assert len(rows(folder, "episodes")) == 2
    assert json.loads((folder / "config.json").read_text())["eval"]["env"] is None
    assert resume(folder).status == "already finished"


def test_rollouts_of_a_model_end_as_in_the_environment_of_the_dataset(world: Path) -> None:  # noqa: F811
    """A run may be evaluated elsewhere; where the dataset names no environment, the one that the user gives counts."""
    model = {"_target_": "offrl.augment.world_model.WorldModel"}
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [8, 8]}
    fallen = torch.tensor([[0.5, 0.0, 0.0]])
    for recorded, chosen, ends in (
        ("Hopper-v5", "Drift-v0", True),
        (None, "Hopper-v5", True),
        (None, "Drift-v0", False),
    ):
        write_npz(make_toy(400).with_info(env_id=recorded), world / "recorded.npz")
        values = {**options(), "agent": agent, "dataset": "recorded.npz", "online": {}, "augment": model}
        job = resolve_config({**values, "eval": {**EVAL, "env": chosen}})
        trainer = Trainer(job, world / "run")
        assert trainer.synthetic is not None
        assert bool(termination(trainer.synthetic.augmentation.store.info)(fallen)) is ends
        assert trainer.store.info.env_id == chosen


def test_the_environment_of_a_models_rollouts_is_one_of_its_settings(world: Path) -> None:  # noqa: F811
    """Where the dataset's id names one it is that of evaluation alone, and so it is for models without an environment."""
    model = {"_target_": "offrl.augment.world_model.WorldModel"}
    diffusion = {"_target_": "offrl.augment.diffusion.Diffusion"}
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [8, 8]}
    for dataset, augment, same_run in (
        ("toy.npz", model, False),
        ("given/0123456789ab/mine", model, False),
        ("toy.npz", diffusion, True),
        ("toy.npz", {}, True),
        *((name, model, True) for name in ("forge/hopper/medium-v0", "hopper-medium-v2", "D4RL/pen/human-v2")),
    ):
        values = {**options(), "agent": agent, "dataset": dataset, "online": {}, "augment": augment}
        jobs = [resolve_config({**values, "eval": {**EVAL, "env": env}}) for env in (None, "Hopper-v5", "Walker2d-v5")]
        assert len({job.config_hash() for job in jobs}) == (1 if same_run else 3), dataset


@pytest.mark.parametrize("recorded", [None, "Drift-v0"])
def test_a_models_rollouts_do_not_end_otherwise_on_the_way(
    recorded: str | None,
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a file that names an environment they end as there, and the run may go on under another evaluation."""
    monkeypatch.setitem(gymnasium.registry, "Other-v0", gymnasium.spec("Drift-v0"))
    write_npz(make_toy(400).with_info(env_id=recorded), world / "own.npz")
    model = {"_target_": "offrl.augment.world_model.WorldModel", "transitions": 20}
    model["model"] = {"members": 2, "elites": 1, "hidden": [4], "updates": 2}
    values = {**options(), "dataset": "own.npz", "online": {}, "augment": model, "name": "mine", "updates": 10}
    first, other = ({**values, "eval": {**EVAL, "env": env}} for env in ("Other-v0", "Drift-v0"))
    run = train(first).folder
    if recorded:
        assert resume(run, {"eval.env": "Drift-v0", "updates": 20}).status == "finished"
        return
    sentence = r"other settings \(eval.env Other-v0, now Drift-v0\)"
    for updates in (10, 20):
        with pytest.raises(OffrlError, match=sentence):
            train({**other, "updates": updates})
    with pytest.raises(OffrlError, match=sentence):
        resume(run, {"eval.env": "Drift-v0", "updates": 20})


# ---- what is refused before the first update -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": [9, 8]}, "online.agent=.* changes the agent's networks"),
        ({"alpha": [1.0, 2.0, 3.0]}, "online.agent.alpha has 3 values for 2 lanes"),
    ],
    ids=str,
)
def test_a_setting_that_can_not_change_is_refused_before_the_first_update(
    changes: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = offline(out="offline")
    monkeypatch.setattr(OnlinePhase, "begin", None)
    with pytest.raises(OffrlError, match=sentence):
        train(options(online={"agent": changes}))
    assert not list(Path("runs").rglob("*.safetensors"))
    with pytest.raises(OffrlError, match=sentence):
        finetune(run, {f"online.agent.{key}": value for key, value in changes.items()} | {"online.steps": 60})


def test_a_run_that_was_stopped_at_the_switch_can_be_fine_tuned_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration has an online phase, and its checkpoint nothing of one."""
    with monkeypatch.context() as patch:
        patch.setattr(OnlinePhase, "begin", dying(OnlinePhase.begin, 0))
        with pytest.raises(Killed):
            train(options())
    (folder,) = (path.parent for path in Path("runs").rglob(checkpoint.NAME))
    words = {"online.steps": 30, "online.eval_every": 30, "out": "tuned"}
    tuned = finetune(folder, words)
    quiet = train(options(online={"steps": 30, "anneal": {"alpha": 5.0}}, out="quiet"))  # with the method's table
    assert same(quiet.folder, tuned.folder)
    with pytest.raises(OffrlError, match="has been fine-tuned already"):
        finetune(tuned.folder, {"online.steps": 5})
    config = tuned.folder / "config.json"  # as an earlier version left it, which was told to train without the phase
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "online"}))
    with pytest.raises(OffrlError, match="has been fine-tuned already"):
        finetune(tuned.folder, {"online.steps": 5})


def test_a_task_for_each_lane_has_no_online_phase() -> None:
    values = options(dataset="cube-single-play-singletask-v0", data={"tasks": [1, 2]})
    with pytest.raises(OffrlError, match=r"data\.tasks has an environment for each lane.*with data\.task"):
        resolve_config(values)


# ---- words ---------------------------------------------------------------------------------------------------------------


def test_a_key_below_a_single_value_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(offline())
    for words, sentence in (
        (["device.x=1"], "device.x: device=auto is a single value; give device=VALUE"),
        (["online.steps.x=1"], "online.steps.x: online.steps=250000 is a single value"),
        (["eval.workers.x=1"], "eval.workers.x: eval.workers=1 is a single value"),
        (["online.agent=3", "online.agent.alpha=1"], "online.agent.alpha: online.agent=3 is a single value"),
        (["eval.wrkers=1"], "eval.wrkers is no option"),
    ):
        for command in (["finetune", run], ["train", f"resume={run}"]):
            if words[0].startswith("online") and command[0] == "train":
                continue
            assert cli.main([*command, *words]) == 2
            error = capsys.readouterr().err
            assert sentence in error
            assert error.count("\n") == 1


def test_dotted_keys_leave_the_tables_that_they_were_given_alone() -> None:
    table = {"eval": {"env_kwargs": None, "every": 3}}
    values = dict(table)
    set_dotted(values, "eval.env_kwargs.a", 1)
    set_dotted(values, "eval.env_kwargs.b", 2)
    set_dotted(values, "device", "cpu")
    assert values == {"eval": {"env_kwargs": {"a": 1, "b": 2}, "every": 3}, "device": "cpu"}
    assert table == {"eval": {"env_kwargs": None, "every": 3}}


def test_an_environment_that_is_typed_is_imported_and_gets_its_arguments(
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `finetune` and by `resume`; with a distant wall every episode has the seven steps of the time limit."""
    text = ENVIRONMENT.replace("Drift-v0", "Typed-v0").replace("class Drift(gymnasium.Env):", CLASS)
    text = text.replace("> 1.6", "> self.wall")
    (world / "typed_world.py").write_text(text)
    monkeypatch.syspath_prepend(str(world))
    run = offline()
    words = ["eval.env=typed_world:Typed-v0", "eval.env_kwargs.wall=5.0"]
    try:
        tuned = ["finetune", str(run), "online.steps=20", "out=tuned"]
        assert cli.main([*tuned, *words]) == 0
        (folder,) = (path.parent for path in Path("tuned").rglob("result.json"))
        assert all(row["length"] == 7 for row in rows(folder, "online"))  # no episode ends at the wall
        sys.modules.pop("typed_world")
        gymnasium.registry.pop("Typed-v0")
        assert cli.main(["train", f"resume={run}", "updates=45", *words]) == 0
        assert json.loads((run / "config.json").read_text())["eval"]["env_kwargs"] == {"wall": 5.0}
        assert all(row["length"] == 7 for row in rows(run, "episodes") if row["step"] == 45)
    finally:
        sys.modules.pop("typed_world", None)
        gymnasium.registry.pop("Typed-v0", None)


CLASS = """class Drift(gymnasium.Env):
    def __init__(self, wall=1.6):
        self.wall = wall
"""
