"""Configuration: what is refused and how it is said, per-dataset settings, a run's name, and composing from Python."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from offrl.agents.base import Spec
from offrl.agents.td3_bc import TD3BC as TD3BC_CLASS
from offrl.data import catalogue, ogbench_names
from offrl.forge import registry as forge
from offrl.results import published
from offrl.training.compose import (
    choices,
    compose,
    compose_words,
    groups,
    let_recipes_add,
    named,
    plain,
    register,
    to_hydra_overrides,
)
from offrl.training.schema import TrainConfig
from offrl.training.sweep import _jobs_of
from offrl.training.trainer import RunConfig, make_agent, resolve_config
from offrl.utils.dataset_names import D4RL_MIXTURE
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.settings import build, check_ranges, chosen_settings

TD3BC = "offrl.agents.td3_bc.TD3BC"


@dataclass
class Inner:
    size: int = 3


@dataclass
class Outer:
    count: int = 1
    rate: float = 0.5
    name: str | None = None
    wide: tuple[int, ...] = (8, 8)
    seeds: list[int] | None = None
    on: bool = False
    mode: Literal["fast", "exact"] = "exact"
    tags: str | list[str] | None = None
    inner: Inner = field(default_factory=Inner)


def planned(**values: Any) -> RunConfig:
    agent = {"_target_": TD3BC, **values.pop("agent", {})}
    return resolve_config({"agent": agent, "dataset": "toy.npz", **values})


# ---- values ---------------------------------------------------------------------------------------------------


@dataclass
class Bounded:
    """Settings whose names would say other bounds."""

    tau: float = 7.0  # a temperature
    rate: float = 0.5
    least: ClassVar[dict[str, float]] = {"tau": 1, "rate": 0.1}
    most: ClassVar[dict[str, float]] = {"tau": 9}


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (Bounded(), None),
        (Bounded(tau=9.5), "x.tau=9.5 should be at least 1 and at most 9."),
        (Bounded(tau=0.5), "x.tau=0.5 should be at least 1 and at most 9."),
        (Bounded(rate=0.0), "x.rate=0.0 should be at least 0.1."),
    ],
    ids=str,
)
def test_a_dataclass_says_its_own_bounds(cfg: Bounded, sentence: str | None) -> None:
    with pytest.raises(OffrlError, match=re.escape(sentence)) if sentence else nullcontext():
        check_ranges(cfg, "x")


def test_values_become_the_types_of_the_dataclass() -> None:
    given = {
        "count": 4.0,
        "rate": 2,
        "name": "x",
        "wide": [16],
        "seeds": [1, 2],
        "on": True,
        "mode": "fast",
        "tags": ["a", "b"],
        "inner": {"size": 5},
    }
    made = build(Outer, given)
    assert made == Outer(4, 2.0, "x", (16,), [1, 2], True, "fast", ["a", "b"], Inner(5))
    assert type(made.count) is int
    assert type(made.rate) is float
    assert build(Outer, {}) == Outer()
    assert build(Outer, {"name": None, "seeds": None, "tags": "a"}) == Outer(tags="a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 1}, "x.cuont is no option; did you mean x.count?"),
        ({"zzz": 1}, "x.zzz is no option; known keys: count, rate,"),
        ({"inner": {"sise": 1}}, "x.inner.sise is no option; did you mean x.inner.size?"),
        ({"inner": 5}, "x.inner=5 should be a table of settings, not a single value."),
        ({"count": 1.5}, "x.count=1.5 should be a whole number."),
        ({"count": float("inf")}, "x.count=inf should be a whole number."),
        ({"count": True}, "x.count=True should be a whole number."),
        ({"count": "3"}, "x.count='3' should be a whole number."),
        ({"count": None}, "x.count=None should be a whole number."),
        ({"rate": "fast"}, "x.rate='fast' should be a number."),
        ({"rate": [0.1, 0.2]}, "x.rate=[0.1, 0.2] should be a number."),
        ({"on": 1}, "x.on=1 should be true or false."),
        ({"name": 3}, "x.name=3 should be text or null."),
        ({"wide": 64}, "x.wide=64 should be a list of whole numbers."),
        ({"wide": [64, "b"]}, "x.wide='b' should be a whole number."),
        ({"seeds": "12"}, "x.seeds='12' should be a list of whole numbers or null."),
        ({"mode": "slow"}, "x.mode=slow should be one of fast, exact."),
    ],
    ids=str,
)
def test_bad_values_get_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError) as caught:
        build(Outer, values, "x.")
    assert str(caught.value).startswith(message)


def test_only_numbers_can_differ_between_lanes() -> None:
    assert build(Outer, {"rate": [1, 0.2]}, per_lane=True).rate == [1.0, 0.2]
    with pytest.raises(OffrlError, match=r"count=\[1, 2\] should be a whole number."):
        build(Outer, {"count": [1, 2]}, per_lane=True)
    with pytest.raises(OffrlError, match=r"rate='b' should be a number."):
        build(Outer, {"rate": [1.0, "b"]}, per_lane=True)
    with pytest.raises(OffrlError, match=r"rate='b' should be a number, or a list with one per lane."):
        build(Outer, {"rate": "b"}, per_lane=True)


def test_a_list_per_lane_needs_as_many_values_as_lanes() -> None:
    settings = {"_target_": TD3BC, "alpha": [1.0, 2.0]}
    assert torch.equal(make_agent(settings, Spec(3, 2, (0, 1))).cfg.alpha, torch.tensor([1.0, 2.0]))
    with pytest.raises(OffrlError, match=r"agent.alpha has 2 values for 3 lanes; give one per lane."):
        make_agent(settings, Spec(3, 2, (0, 1, 2)))


# ---- plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": [0, 1]}, "seed=[0,1] has several values; give seeds=[0,1]."),
        ({"seeds": 3}, "seeds=3 is a single value; give seed=3."),
        ({"batchsize": 3}, "batchsize is no option; did you mean batch_size?"),
        ({"agentt": "bc"}, "agentt is no option; did you mean agent?"),
        ({"eval": {"evry": 3}}, "eval.evry is no option; did you mean eval.every?"),
        ({"env": "Hopper-v5"}, "env is no option; did you mean eval.env?"),
        ({"eval": 5}, "eval=5 should be a table of settings"),
        ({"data": {"reward_scale": float("inf")}}, "data.reward_scale=inf should be finite as float32."),
        ({"data": {"reward_shift": -1e39}}, "data.reward_shift=-1e+39 should be finite as float32."),
        ({"agent": {"alph": 3}}, "agent.alph is no option; did you mean agent.alpha?"),
        ({"agent": {"_target_": "offrl.agents.dt.DT", "layers": 0}}, "agent.layers=0 should be at least 1."),
        ({"agent": {"_target_": "offrl.agents.doc.DoC", "suffix": 0}}, "agent.suffix=0 should be at least 1."),
        ({"agent": {"_target_": "offrl.agents.doc.DoC", "hold": -1}}, "agent.hold=-1 should be at least 1."),
        (
            {"agent": {"_target_": "offrl.agents.iql.IQL", "actor_decay": -3}},
            "agent.actor_decay=-3 should be at least 0.",
        ),
        ({"agent": {"actor_lr": -1e-3}}, "agent.actor_lr=-0.001 should be at least 0."),
        ({"agent": {"tau": 5}}, "agent.tau=5.0 should be at least 0 and at most 1."),
        ({"agent": {"discount": [0.9, 1.5]}, "lanes": 2}, "agent.discount=1.5 should be at least 0 and at most 1."),
        ({"agent": {"_target_": "offrl.agents.prdc.PRDC", "beta": -2.0}}, "agent.beta=-2.0 should be at least 0."),
        ({"agent": {"alpha": [1, 2, 3]}, "lanes": 2}, "agent.alpha has 3 values for 2 lanes; give one per lane."),
        (
            {"agent": {"_target_": "offrl.agents.iql.IQL"}, "history": {"encoder": "gru", "bisimulation": -1.0}},
            "history.bisimulation=-1.0 should be at least 0.",
        ),
        ({"agent": {"hidden": 64}}, "agent.hidden=64 should be a list of whole numbers."),
        (
            {"agent": {"_target_": "offrl.agents.td3_bc.TD4"}},
            "agent._target_=offrl.agents.td3_bc.TD4 can't be imported",
        ),
        ({"agent": {"_target_": "TD3BC"}}, "agent._target_=TD3BC can't be imported"),
        ({"agent": {"_target_": "offrl.nets.MLP"}}, "agent._target_=offrl.nets.MLP is no offrl.agents.base.Agent"),
        ({"data": "d4rl"}, "data=d4rl should be a table of settings"),
        ({"sampler": "uniform"}, "sampler=uniform should be a table of settings"),
        ({"dataset": ""}, "dataset is empty; name one with dataset=ID"),
        ({"updates": 0}, "updates=0 should be at least 1."),
        ({"updates_per_launch": 0}, "updates_per_launch=0 should be at least 1."),
        ({"lanes": 0}, "lanes=0 should be at least 1."),
        ({"eval": {"every": -1}}, "eval.every=-1 should be at least 0."),
        ({"eval": {"workers": 0}}, "eval.workers=0 should be at least 1."),
        ({"eval": {"slots": 0}}, "eval.slots=0 should be at least 1."),
        ({"seed": 2**63}, "seed=9223372036854775808 should have at most 63 bits."),
        ({"seeds": [1, 2, 3], "lanes": 2}, "seeds has 3 values for lanes=2; give one per lane."),
        ({"engine": "jit"}, "engine=jit should be one of auto, eager, taped, native, compile, cudagraph."),
        ({"precision": "float16"}, "precision=float16 should be one of float32, bfloat16."),
    ],
    ids=str,
)
def test_bad_plans_are_refused_before_any_data_is_read(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OffrlError) as caught:
        planned(**values)
    assert str(caught.value).startswith(message)


def test_an_agent_is_needed() -> None:
    for agent in ({}, {"agent": None}, {"agent": {"alpha": 1.0}}):
        with pytest.raises(OffrlError, match="agent needs a _target_; choose one with agent=NAME"):
            resolve_config({**agent, "dataset": "x"})
    with pytest.raises(OffrlError, match="agent=td3_bc should be a table of settings"):
        resolve_config({"agent": "td3_bc", "dataset": "x"})


def test_lanes_and_their_seeds() -> None:
    assert planned(seed=4, lanes=3).train.lane_seeds() == [4, 5, 6]
    assert planned(seeds=[9, 7, 8]).train.lane_seeds() == [9, 7, 8]
    assert planned(seeds=[9, 7, 8]).train.lanes == 3
    assert planned(seed=-3).train.lane_seeds() == [-3]


def test_lanes_of_one_seed_need_a_setting_that_tells_them_apart() -> None:
    assert planned(seeds=[3, 3], agent={"alpha": [1.0, 2.5]}).train.lane_seeds() == [3, 3]
    for given in ({"seeds": [3, 3]}, {"seeds": [3, 5, 3], "agent": {"alpha": [1.0, 2.5, 1.0]}}):
        with pytest.raises(OffrlError, match=r"seeds: lanes 0 and \d have seed 3 and the same settings.*another seed"):
            planned(**given)
    kept = planned().to_dict()  # a run of an earlier version goes on
    assert resolve_config({**kept, "seeds": [3, 3], "lanes": 2}, trusted=False).train.lane_seeds() == [3, 3]


# ---- settings by dataset --------------------------------------------------------------------------------------

TABLE = {
    "*": {"alpha": 1.0},
    "*antmaze*": {"alpha": 2.0, "data.reward_shift": -1.0},
    "antmaze-large-*": {"alpha": 3.0},
    "hopper-medium-v2": {"tau": 0.1},
}


def test_settings_are_chosen_by_pattern_and_later_ones_win() -> None:
    assert chosen_settings(TABLE, "hopper-random-v2", None) == {"alpha": 1.0}
    assert chosen_settings(TABLE, "hopper-medium-v2", None) == {"alpha": 1.0, "tau": 0.1}
    assert chosen_settings(TABLE, "antmaze-umaze-v2", None) == {"alpha": 2.0, "data.reward_shift": -1.0}
    assert chosen_settings(TABLE, "antmaze-large-play-v2", None) == {"alpha": 3.0, "data.reward_shift": -1.0}
    assert chosen_settings(None, "x", None) == {}


def changed(made: RunConfig) -> dict[str, Any]:
    """The agent's settings that differ from its dataclass."""
    keys = [key.removeprefix("agent.") for key in made.non_default() if key.startswith("agent.")]
    return {key: made.agent[key] for key in keys}


def test_what_is_given_wins_over_the_table() -> None:
    chosen = planned(dataset="antmaze-umaze-v2", agent={"settings": TABLE})
    assert changed(chosen) == {"alpha": 2.0}
    assert chosen.table_rows == {key: TABLE[key] for key in ("*", "*antmaze*")}
    assert chosen.train.data.reward_shift == -1.0
    given = planned(
        dataset="antmaze-umaze-v2", agent={"settings": TABLE, "alpha": 9.0}, data={"reward_shift": 0.0, "cache": False}
    )
    assert given.agent["alpha"] == 9.0
    assert given.train.data.reward_shift == 0.0
    assert not given.train.data.cache


def test_a_wrong_name_in_a_table_is_found() -> None:
    with pytest.raises(OffrlError, match=r"agent.alhpa is no option; did you mean agent.alpha?"):
        planned(agent={"settings": {"*": {"alhpa": 1.0}}})


# ---- identity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"out": "elsewhere"},
        {"threads": 4},
        {"updates": 7},
        {"eval": {"every": 1, "episodes": 2}},
        {"engine": "eager"},
        {"device": "cpu"},
        {"log_every": 3},
        {"checkpoint_every": 3},
        {"keep_checkpoints": True},
        {"progress": False},
        {"tracker": "tensorboard"},
        {"label": "mine"},
        {"fresh": True},
        {"seed": 5},
        {"lanes": 4},
    ],
    ids=str,
)
def test_what_changes_no_number_keeps_a_runs_identity(change: dict[str, Any]) -> None:
    assert planned(**change).config_hash() == planned().config_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"agent": {"alpha": 1.0}},
        {"agent": {"hidden": [8, 8]}},
        {"agent": {"_target_": "offrl.agents.bc.BC"}},
        {"batch_size": 8},
        {"dataset": "other.npz"},
        {"precision": "bfloat16"},
        {"data": {"reward_scale": 2.0}},
        {"sampler": {"_target_": "offrl.sampling.EpisodeWeighted"}},
    ],
    ids=str,
)
def test_what_changes_numbers_changes_the_identity(change: dict[str, Any]) -> None:
    assert planned(**change).config_hash() != planned().config_hash()


def test_folders_tell_method_dataset_and_seeds_apart() -> None:
    code = planned().config_hash()
    assert planned().folder() == Path(f"runs/td3_bc/toy.npz/seed0-{code}")
    assert planned(lanes=5, seed=2).folder().name == f"seed2-6-{code}"
    assert planned(seeds=[4, 1]).folder().name == f"seed4_1-{code}"
    assert planned(seeds=[4, 5]).folder().name == f"seed4-5-{code}"
    assert planned(out="o", name="mine").folder() == Path("o/mine")
    folder = planned(dataset="forge/hopper/medium-v0").folder()
    assert folder.parts[:3] == ("runs", "td3_bc", "forge_hopper_medium-v0")
    assert planned(dataset="/tmp/my data/../x.npz").folder().parts[2] == "tmp_my_data_.._x.npz"
    assert planned(dataset="../mine-v0").folder().parts[2] == "mine-v0"


def test_many_seeds_of_their_own_have_folders_of_their_own() -> None:
    """A long name is cut, and must still tell all seeds apart."""
    many = [*range(0, 200, 2)]
    folders = {planned(seeds=seeds).folder() for seeds in (many, [*many, 5], [*many, 7], [3, *many])}
    assert len(folders) == 4
    assert max(len(folder.name) for folder in folders) < 64


def test_a_kept_configuration_makes_the_same_plan() -> None:
    first = planned(agent={"alpha": [1.0, 2.0], "hidden": [8, 8]}, lanes=2, data={"reward_scale": 2.0}, label="x")
    again = resolve_config(first.to_dict())
    assert again == first
    assert again.config_hash() == first.config_hash()


# ---- composing ------------------------------------------------------------------------------------------------


def test_composed_options_are_those_of_the_command_line() -> None:
    values = compose({"agent": "bc", "preset": "laptop", "dataset": "x", "eval.every": 7, "agent.hidden": [4, 4]})
    made = resolve_config(values)
    assert made.agent["_target_"] == "offrl.agents.bc.BC"
    assert changed(made) == {"hidden": [4, 4]}
    assert (made.train.updates, made.train.eval.every, made.train.eval.episodes) == (20_000, 7, 10)


@pytest.mark.parametrize("text", ["10", "null", "true", "1e5", "a b", "it's", "a\\", "b\\'c", "[x]", "a,b", "a=b", "ü"])
def test_text_from_python_stays_text(text: str) -> None:
    assert compose({"name": text})["name"] == text
    assert compose({"tracker": [text, "x"]})["tracker"] == [text, "x"]


@pytest.mark.parametrize("value", [None, True, False, 3, -2, 0.5, 1e-12, 1e30, [1, 2], [0.5, None]])
def test_values_from_python_arrive_unchanged(value: Any) -> None:
    assert compose({"anything": value})["anything"] == value


def test_arrays_and_ranges_from_python_are_lists() -> None:
    given = {
        "agent.alpha": np.array([1.0, 2.5]),
        "batch_size": np.int64(7),
        "seeds": range(3, 5),
        "agent.tau": torch.tensor(0.5),
    }
    made = compose({"agent": "td3_bc", "dataset": "x", **given})
    assert (made["agent"]["alpha"], made["batch_size"], made["seeds"]) == ([1.0, 2.5], 7, [3, 4])
    assert made["agent"]["tau"] == 0.5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("agent=td3bc", "agent=td3bc is unknown; did you mean agent=td3_bc?"),
        ("agent=bc,td3bc", "agent=td3bc is unknown; did you mean agent=td3_bc?"),
        ("experiment=td3_bc/gmy", "experiment=td3_bc/gmy is unknown; did you mean experiment=td3_bc/gym?"),
        ("+experiment=awac/gim", "experiment=awac/gim is unknown; did you mean experiment=awac/gym?"),
        ("experiment=", "experiment= is unknown"),
        ("suite=gym_9", "suite=gym_9 is unknown; did you mean suite=gym9?"),
        (
            "preset=xyzzy",
            "preset=xyzzy is unknown; there are d4rl, demo, laptop, ogbench, paper. Of a folder of your own: --config-",
        ),
    ],
)
def test_unknown_choices_are_refused_with_the_nearest_name(word: str, message: str) -> None:
    with pytest.raises(OffrlError) as caught:
        to_hydra_overrides([word])
    assert str(caught.value).startswith(message)


def test_choices_that_are_more_than_names_are_left_to_hydra(tmp_path: Path) -> None:
    for words in (["agent=glob(*)"], ["agent='td3bc'"], ["agent=mine", "hydra.searchpath=[file://mine]"]):
        assert set(to_hydra_overrides(words)) == set(words)
    assert to_hydra_overrides(["experiment=null", "agent=td3_bc.yaml"]) == ["experiment=null", "agent=td3_bc.yaml"]
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "mine.yaml").touch()
    assert to_hydra_overrides(["--config-dir", str(tmp_path), "agent=bc,mine"])[-1] == "agent=bc,mine"


def test_a_recipe_with_datasets_of_its_own_takes_no_suite() -> None:
    with pytest.raises(OffrlError, match="experiment=prdc/control brings datasets of its own"):
        to_hydra_overrides(["experiment=prdc/control", "suite=gym9"])
    assert len(to_hydra_overrides(["experiment=awac/gym", "suite=gym12"])) == 2


def test_a_sweep_is_no_single_run() -> None:
    """From Python every key that a recipe or suite sweeps over needs a value, lest a default is trained in silence."""
    with pytest.raises(OffrlError, match=r"sweeps over dataset, .* give dataset=\.\.\. too"):
        compose({"experiment": "awac/gym"})
    with pytest.raises(OffrlError, match=r"sweeps over dataset, "):
        compose({"suite": "gym9"})
    with pytest.raises(OffrlError, match=r"sweeps over dataset and agent, .* give agent=\.\.\. too"):
        compose({"experiment": "zoo/forge", "dataset": "x"})
    assert compose({"experiment": "zoo/forge", "dataset": "x", "agent": "bc"})["dataset"] == "x"


def test_words_for_hydra(tmp_path: Path) -> None:
    """A key that no file has is added; all others stay as they are, and flags go first."""
    words = [
        "agent.alpha=1",
        "evl.every=1",
        "updates=5",
        "eval.every=5",
        "agent=bc",
        "preset@x=1",
        "hydra.verbose=true",
        "+a=1",
        "~b",
        "-m",
        "sampler=uniform",
    ]
    assert to_hydra_overrides(words) == [
        "-m",
        "++agent.alpha=1",
        "++evl.every=1",
        *(word for word in words[2:] if word != "-m"),
    ]
    (tmp_path / "mygroup").mkdir()
    (tmp_path / "mygroup" / "x.yaml").touch()
    for flag in (["--config-dir", str(tmp_path)], ["-cd", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert to_hydra_overrides([*flag, "mygroup=x"])[-1] == "mygroup=x"
    assert to_hydra_overrides(["mygroup=x"]) == ["++mygroup=x"]
    with pytest.raises(OffrlError, match="there is no such folder"):
        to_hydra_overrides(["--config-dir", str(tmp_path / "no")])


def test_a_methods_table_for_a_dataset_works_when_composed() -> None:
    """AntMaze's rewards are shifted for TD3+BC; defaults that nobody typed don't undo it, what was typed does."""
    antmaze = {"agent": "td3_bc", "dataset": "antmaze-umaze-v2"}
    assert resolve_config(compose(antmaze)).train.data.reward_shift == -1.0
    assert resolve_config(compose({**antmaze, "data.cache": False})).train.data.reward_shift == -1.0
    assert resolve_config(compose({**antmaze, "data.reward_shift": 0.0})).train.data.reward_shift == 0.0
    assert resolve_config(compose({**antmaze, "dataset": "hopper-medium-v2"})).train.data.reward_shift == 0.0


def test_a_methods_table_may_set_the_batch_size() -> None:
    """ReBRAC's batches on locomotion have 1024 rows, unless the user or a preset says otherwise."""
    hopper = {"agent": "rebrac", "dataset": "hopper-medium-v2"}
    assert resolve_config(compose(hopper)).train.batch_size == 1024
    assert resolve_config(compose({**hopper, "batch_size": 64})).train.batch_size == 64
    assert resolve_config(compose({**hopper, "preset": "laptop"})).train.batch_size == 128
    assert resolve_config(compose({**hopper, "dataset": "pen-human-v1"})).train.batch_size == 256
    assert resolve_config(compose({**hopper, "agent": "td3_bc"})).train.batch_size == 256


def test_iqls_schedule_spans_the_run() -> None:
    iql = {"agent": "iql", "dataset": "walker2d-medium-v2"}
    assert resolve_config(compose({**iql, "updates": 1234})).agent["actor_decay"] == 1234
    assert resolve_config(compose({**iql, "updates": 1234, "agent.actor_decay": 0})).agent["actor_decay"] == 0


def test_published_settings_of_the_baselines() -> None:
    """One set of each kind, against the configurations in corl-team/CORL."""

    def settings(agent: str, dataset: str) -> tuple[dict[str, Any], RunConfig]:
        made = resolve_config(compose({"agent": agent, "dataset": dataset}))
        return {k: v for k, v in changed(made).items() if k != "actor_decay"}, made

    for dataset in ("hopper-medium-replay-v2", "forge/hopper/medium-replay-v0"):
        given, made = settings("iql", dataset)
        assert given == {"tau": 0.001, "deterministic": True}
        assert made.train.data.reward_normalize
    assert settings("iql", "hopper-medium-expert-v2")[0] == {"expectile": 0.5, "beta": 6.0}
    assert settings("iql", "halfcheetah-medium-v2")[0] == {}
    assert settings("iql", "door-cloned-v1")[0] == {"expectile": 0.8, "dropout": 0.1}
    given, made = settings("iql", "antmaze-large-play-v2")
    assert (given, made.train.data.reward_shift) == ({"expectile": 0.9, "beta": 10.0}, -1.0)
    assert settings("awac", "walker2d-medium-v2")[0] == {}
    assert settings("awac", "maze2d-large-v1")[0] == {"temperature": 0.1}
    given, made = settings("rebrac", "D4RL/antmaze/umaze-diverse-v1")
    assert given == {"actor_bc": 0.003, "critic_bc": 0.001, "critic_lr": 5e-5, "discount": 0.999}
    assert made.train.data.reward_scale == 100.0
    given, made = settings("rebrac", "walker2d-medium-replay-v2")
    assert given == {"actor_bc": 0.05, "actor_lr": 1e-3, "critic_lr": 1e-3}
    assert made.agent["critic_bc"] == 0.01  # the default is the same


def test_percentile_bc_is_bc_under_a_sampler() -> None:
    """Recipe and label: the tenth of the trajectories, and the name under which its published scores are found."""
    made = resolve_config(compose({"experiment": "percentile_bc/gym", "dataset": "hopper-medium-v2"}))
    assert (made.agent["_target_"], changed(made)) == ("offrl.agents.bc.BC", {})
    assert made.method == "bc+Top-10%"
    assert {row.mean for row in published.lookup(made.to_dict()["method"], "hopper-medium-v2")} == {55.48}


def test_every_preset_composes() -> None:
    for preset in ("paper", "d4rl", "laptop", "demo", "ogbench"):
        for agent in ("bc", "td3_bc"):
            assert isinstance(resolve_config(compose({"preset": preset, "agent": agent})).train, TrainConfig)


def test_a_presets_sizes_go_to_agents_that_have_them() -> None:
    sizes = [resolve_config(compose({"preset": "laptop", "agent": agent})).agent for agent in ("bc", "dt", "a2pr")]
    assert [(s.get("hidden"), s.get("embed")) for s in sizes] == [([64, 64], None), (None, 64), ([64, 64], None)]
    given = resolve_config(compose({"preset": "laptop", "agent": "bc", "agent.hidden": [8]}))
    assert given.agent["hidden"] == [8]


EXPERIMENTS = choices("experiment")


def swept(*words: str) -> dict[str, list[Any]]:
    """Values that a recipe or suite sweeps over, by key."""
    return composition(*words)[1]


def composition(*words: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The configuration of a recipe or suite without what it sweeps over, and the values of that, by key."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra_compose("train", overrides=[*words], return_hydra_config=True)
    assert str(cfg.hydra.mode) == "RunMode.MULTIRUN"
    assert not any(
        " " in str(value) for value in cfg.hydra.sweeper.params.values()
    )  # a line's end that lacks its backslash
    given = {key: str(value).split(",") for key, value in cfg.hydra.sweeper.params.items()}
    ours = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return named(plain(ours), cfg.hydra.runtime.choices, words), {
        key: values if key in groups() else [yaml.safe_load(value) for value in values] for key, values in given.items()
    }


def test_jobs_of_recipes_that_sweep_over_keys_of_no_file_compose() -> None:
    """As their sweeps do, and with a value from the command line in the place of the recipe's."""
    checked = 0
    register()
    for recipe in EXPERIMENTS:
        if not any("." in key for key in swept(f"experiment={recipe}")):
            continue
        for more in ([], to_hydra_overrides(["agent.alpha=3", "augment.share=0.25"])):
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                words = [f"experiment={recipe}", *more]
                config = hydra_compose("train", overrides=words, return_hydra_config=True)
                let_recipes_add(config)
                for job in _jobs_of(config):
                    composed = hydra_compose("train", overrides=job)
                    for word in job:
                        key, _, text = word.lstrip("+").partition("=")
                        if "." in key:
                            assert OmegaConf.select(composed, key) == yaml.safe_load(text), (recipe, word)
                    checked += 1
    assert checked > 10


# Recipes whose authors cut windows from whole trajectories, and not from the rows of qlearning_dataset; and those whose models
# need the successors as recorded.
WINDOWS = {
    "combo/gym",
    "mobile/gym",
    "mobrac/gym",
    "mopo/gym",
    "dt/gym",
    "policy_guided_diffusion/gym",
    "policy_guided_diffusion/maze2d",
}


def with_value(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """What Hydra makes of a further `key=value`, far cheaper; the key is no group, and no other depends on it."""
    first, dot, rest = key.partition(".")
    return values | {first: with_value(values.get(first) or {}, rest, value) if dot else value}


def test_a_value_is_put_in_as_hydra_does() -> None:
    """Of what is there, of what is there in depth, and of what is not there yet."""
    words = {"experiment": "iql/gym", "dataset": "hopper-medium-v2", "seed": 0}
    for key, value in (("batch_size", 7), ("eval.every", 3), ("agent.beta", 0.5)):
        assert with_value(compose(words), key, value) == compose(words | {key: value})


@pytest.mark.parametrize("most", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["first", "all"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_recipe_composes_to_plans(name: str, most: int | None) -> None:
    """Each value that a recipe sweeps over gives a checked configuration: no key is unknown, no group is missing.

    And published numbers on D4RL are compared with what was learnt from the same rows. Of groups (agents, samplers), which
    are dear to compose, the first of each in the quick suite.
    """
    values, params = composition(f"experiment={name}")
    first = {key: found[0] for key, found in params.items()}
    known = groups()
    assert all(value in choices(key) for key, found in params.items() if key in known for value in found)
    chosen = [(key, value) for key, found in params.items() if key in known for value in found[:most]]
    composed = [compose({"experiment": name, **first, key: value}) for key, value in chosen] or [values]
    for key, value in first.items():
        composed = [with_value(each, key, value) if key not in known else each for each in composed]
    for each in composed:
        for dataset in params["dataset"]:
            made = resolve_config({**each, "dataset": dataset}).train
            on_d4rl = dataset in catalogue.d4rl() or D4RL_MIXTURE.fullmatch(dataset)
            assert made.data.semantics == ("d4rl" if on_d4rl and name not in WINDOWS else "exact")
    assert "updates" not in params  # other keys depend on it, which `with_value` does not see
    others = {key: found[1:] for key, found in params.items() if key not in {"dataset", "seed", *known}}
    for key, value in ((key, value) for key, found in others.items() for value in found):
        resolve_config(with_value(composed[0], key, value))


@pytest.mark.parametrize("name", choices("suite"))
def test_every_suite_names_datasets_that_there_are(name: str) -> None:
    params = swept(f"suite={name}")
    assert list(params) == ["dataset"]
    assert set(params["dataset"]) <= {*catalogue.d4rl(), *forge.names(), *ogbench_names.names()}
    assert len(set(params["dataset"])) == len(params["dataset"])


def test_a_recipes_suite_agent_and_sweep_are_its_own() -> None:
    """What a recipe says wins over the recipe that it builds on, and the command line over both."""
    assert [len(swept("experiment=awac/gym", *more)["dataset"]) for more in ([], ["suite=gym12"])] == [9, 12]
    assert len(swept("experiment=a2pr/gym")["dataset"]) == 12
    assert len(swept("experiment=rebrac/gym")["dataset"]) == 18
    assert swept("experiment=a2pr/forge")["agent"] == ["a2pr"]
    made = resolve_config(compose({"experiment": "rebrac/antmaze", "dataset": "antmaze-umaze-v2"}))
    assert (made.agent_name, made.train.lanes, made.train.eval.every) == ("rebrac", 10, 50_000)


# ---- a user's own -----------------------------------------------------------------------------------------------


@dataclass
class Needy:
    strength: float
    hidden: tuple[int, ...] = (8,)


class NeedyAgent(TD3BC_CLASS):
    Config = Needy


def test_a_field_without_a_default_is_one_that_differs_from_it() -> None:
    target = f"{__name__}.NeedyAgent"
    made = planned(agent={"_target_": target, "strength": 2.0})
    assert made.non_default() == ["agent.strength"]
    assert planned(agent={"_target_": target, "strength": 2.0, "hidden": [4]}).non_default() == [
        "agent.strength",
        "agent.hidden",
    ]
    with pytest.raises(OffrlError, match=r"agent\.strength has no default; give agent\.strength="):
        planned(agent={"_target_": target})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "is no YAML of settings"),
        (b"a: 1\na: 2\n", "is no YAML of settings"),
        (b"a: \xff\xfe", "is no YAML of settings"),
        (b"a: " + b"[" * 5000, "is no YAML of settings"),
        (b"- 1\n- 2\n", "should hold settings, a name and a value each"),
        (b"1: 2\n", "should hold settings, a name and a value each"),
        (b"# @package\na: 1\n", "should be `# @package NAME`"),
        (None, "is no regular file"),
    ],
    ids=["torn", "twice", "no text", "deep", "list", "number", "header", "pipe"],
)
def test_a_users_file_that_cant_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine" / "sampler" / "x.yaml"
    path.parent.mkdir(parents=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    with pytest.raises(OffrlError, match=message) as caught:
        to_hydra_overrides(["sampler=x"], tmp_path / "mine")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("word", ["agent=[-1]", "threads=${nope}"])
def test_what_hydra_fails_at_is_a_sentence(word: str) -> None:
    with pytest.raises(OffrlError):
        compose_words(["dataset=x.npz", word])
