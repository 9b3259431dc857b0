"""The tables in conf/agent: which settings a dataset gets, and that every row could be used."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import cache
from typing import Any

import pytest
from omegaconf import OmegaConf

from offrl.data import catalogue, ogbench_names
from offrl.data.catalogue import namesake
from offrl.forge import registry as forge
from offrl.training.run_config import agent_config, check_tables, resolve_config
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir
from offrl.utils.settings import chosen_settings

AGENTS = {path.stem: path for path in sorted((conf_dir() / "agent").glob("*.yaml"))}
OGBENCH_IDS = [*ogbench_names.names(), *(name for name in forge.names() if name.startswith(ogbench_names.FORGE))]
IDS = [*catalogue.d4rl(), *catalogue.minari(), *forge.names(), *ogbench_names.names()]
# Patterns for data that no list names: a user's own, called like Gymnasium's environments.
UNLISTED = {"*HalfCheetah*", "forge/toy/*", "forge/mstoy/*"}


@cache
def table(agent: str) -> dict[str, dict[str, Any]]:
    return OmegaConf.to_container(OmegaConf.load(AGENTS[agent]).get("settings") or OmegaConf.create())  # type: ignore[return-value]


def settings(agent: str, dataset: str) -> dict[str, Any]:
    return chosen_settings(table(agent), dataset, namesake(dataset))


# ---- namesakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("forge/hopper/medium-replay-v0", "hopper-medium-replay-v2"),
        ("forge/hopper/medium-replay-v1", "hopper-medium-replay-v2"),
        ("forge/walker2d/expert-v12", "walker2d-expert-v2"),
        ("D4RL/antmaze/umaze-v1", "antmaze-umaze-v2"),
        ("D4RL/antmaze/large-diverse-v2", "antmaze-large-diverse-v2"),
        ("D4RL/pen/human-v2", "pen-human-v1"),
        ("D4RL/kitchen/mixed-v1", "kitchen-mixed-v0"),
        ("hopper-medium-v2", None),
        ("forge/hopper/random-expert-0.1-v0", None),  # a mixture: D4RL has none
        ("forge/noisy-hopper/medium-replay-s0-v0", None),
        ("forge/pointmaze/umaze-v0", None),
        ("D4RL/pointmaze/umaze-v2", None),
        ("mujoco/hopper/medium-v0", None),  # Minari's own policies
        ("/data/D4RL/pen/human-v2", None),
        ("", None),
    ],
)
def test_namesakes(dataset: str, expected: str | None) -> None:
    assert namesake(dataset) == expected


def test_every_namesake_is_a_set_of_d4rl_and_every_robot_has_one() -> None:
    found = {dataset: name for dataset in IDS if (name := namesake(dataset))}
    assert set(found.values()) <= set(catalogue.d4rl())
    robots = {f"forge/{robot}/{level}-v0" for robot in forge.ROBOTS for level in forge.LEVELS}
    robots |= {name for name in forge.names() if name.endswith("/medium-replay-v1")}
    tasks = [f"D4RL/{task}/" for task in ("antmaze", "pen", "door", "hammer", "relocate", "kitchen")]
    assert set(found) == robots | {name for name in catalogue.minari() if name.startswith(tuple(tasks))}


def test_rows_of_the_own_name_win_over_the_namesakes() -> None:
    rows: dict[str, dict[str, Any]] = {"forge/*": {"a": 1}, "hopper-medium-*": {"a": 2, "b": 2}, "*hopper*": {"c": 3}}
    assert chosen_settings(rows, "forge/hopper/medium-v0", "hopper-medium-v2") == {"a": 1, "b": 2, "c": 3}
    assert chosen_settings(rows, "forge/hopper/medium-v0", None) == {"a": 1, "c": 3}
    assert chosen_settings(rows, "hopper-medium-v2", None) == {"a": 2, "b": 2, "c": 3}


def test_a_row_for_both_names_keeps_its_place_in_the_table() -> None:
    """A later row for the namesake wins over an earlier one that is for many, the dataset among them."""
    rows: dict[str, dict[str, Any]] = {"*hopper*": {"a": 1}, "hopper-medium-v2": {"a": 2}}
    assert chosen_settings(rows, "forge/hopper/medium-v0", "hopper-medium-v2") == {"a": 2}


# ---- what is chosen -------------------------------------------------------------------------------------------

MAZE = {"data.reward_shift": -1.0}
DQL_MAZE = {"lr_decay": 50_000_000, "data.reward_scale": 4.0, "data.reward_shift": -2.0}
DQL_BACKUP = {"max_backup": True, **DQL_MAZE}
OGBENCH = {"activation": "gelu", "hidden": [512, 512, 512, 512]}
REBRAC = {"actor_lr": 0.001, "critic_lr": 0.001, "batch_size": 1024}


@pytest.mark.parametrize(
    ("agent", "dataset", "expected"),
    [
        ("td3_bc", "D4RL/antmaze/umaze-v2", MAZE),
        ("td3_bc", "forge/hopper/medium-v0", {}),
        ("a2pr", "forge/halfcheetah/medium-expert-v0", {"alpha": 40.0, "bc_weight": 15.0}),
        ("a2pr", "forge/halfcheetah/expert-v0", {}),
        ("a2pr", "forge/hopper/random-v1", {"bc_weight": 1.5, "vae_weight": 1.5, "discount": 0.995}),
        ("awac", "D4RL/door/cloned-v2", {"temperature": 0.1}),
        ("awac", "forge/pointmaze/large-dense-v0", {"temperature": 0.1}),
        ("awac", "D4RL/antmaze/large-play-v1", {"temperature": 0.1, **MAZE}),
        ("cql", "forge/hopper/medium-v0", {"data.reward_normalize": True}),
        ("cql", "forge/hopper/medium-expert-v0", {}),
        ("cql", "D4RL/pointmaze/umaze-v2", {}),
        ("cql", "D4RL/relocate/human-v2", {"cql_alpha": 1.0, "actor_lr": 1e-4}),
        ("dt", "D4RL/hammer/expert-v2", {"target_return": 12800.0}),
        ("dt", "forge/hopper/medium-v0", {"target_return": 3600.0, "return_scale": 0.001}),
        ("edac", "forge/hopper/medium-replay-v0", {"members": 50}),
        ("edac", "forge/hopper/random-v0", {}),
        ("edac", "forge/walker2d/medium-expert-v0", {"eta": 5.0}),
        ("edac", "D4RL/pen/human-v2", {"members": 20, "eta": 1000.0}),
        ("edac", "D4RL/pen/cloned-v2", {"members": 20, "eta": 10.0}),
        ("iql", "D4RL/kitchen/partial-v2", {"beta": 0.5, "dropout": 0.1}),
        ("iql", "forge/hopper/medium-expert-v0", {"expectile": 0.5, "beta": 6.0}),
        ("prdc", "forge/halfcheetah/random-v0", {"alpha": 40.0}),
        ("rebrac", "forge/hopper/medium-replay-v0", {**REBRAC, "actor_bc": 0.05, "critic_bc": 0.5}),
        ("rebrac", "forge/noisy-hopper/medium-replay-s0-v0", REBRAC),
        ("rebrac", "D4RL/pen/cloned-v2", {"actor_bc": 0.05, "critic_bc": 0.5}),
        ("sac_n", "forge/hopper/medium-v0", {"members": 10}),
        ("sac_n", "hopper-medium-v2", {"members": 500}),
        ("sac_n", "forge/walker2d/medium-replay-v0", {"members": 20}),
        ("sac_n", "D4RL/hammer/human-v2", {"members": 100}),
        ("bc", "forge/hopper/medium-v0", {}),
        ("fql", "D4RL/antmaze/umaze-v1", {"alpha": 10.0, "normalize_q": False, **MAZE}),
        ("fql", "antmaze-large-play-v2", {"alpha": 3.0, "normalize_q": False, **MAZE}),
        ("fql", "D4RL/pen/expert-v2", {"alpha": 3000.0, "normalize_q": False, "target": "min"}),
        ("fql", "D4RL/hammer/cloned-v2", {"alpha": 10000.0, "normalize_q": False, "target": "min"}),
        ("fql", "relocate-human-v1", {"alpha": 10000.0, "normalize_q": False, "target": "min"}),
        ("fql", "cube-single-play-singletask-v0", {"alpha": 300.0, "normalize_q": False}),
        ("fql", "forge/hopper/medium-v0", {}),
        (
            "fql",
            "antmaze-giant-navigate-singletask-task1-v0",
            {"alpha": 10.0, "normalize_q": False, "target": "min", "discount": 0.995},
        ),
        ("fql", "antmaze-medium-diverse-v2", {"alpha": 10.0, "normalize_q": False, **MAZE}),
        ("fql", "forge/ogbench/cube-single-play-v0", {"alpha": 300.0, "normalize_q": False}),
        ("td3_bc", "antmaze-medium-explore-singletask-v0", {}),
        ("td3_bc", "antmaze-eval-umaze-v0", MAZE),
        ("td3_bc", "/data/antmaze-large-play-v2.hdf5", MAZE),
        (
            "iql",
            "antmaze-giant-navigate-singletask-v0",
            {"expectile": 0.9, "beta": 10.0, "discount": 0.995, "deterministic": True, "normalize_obs": False}
            | {"hidden": [512, 512, 512, 512]},
        ),
        ("dql", "forge/hopper/medium-replay-v0", {"grad_clip": 4.0}),
        ("dql", "antmaze-umaze-v2", {"eta": 0.5, "grad_clip": 2.0, "max_backup": False, **DQL_MAZE}),
        ("dql", "D4RL/antmaze/medium-play-v1", {"eta": 2.0, "grad_clip": 2.0, "actor_lr": 1e-3, **DQL_BACKUP}),
        ("dql", "antmaze-large-diverse-v0", {"eta": 3.5, "grad_clip": 7.0, **DQL_BACKUP}),
        ("dql", "D4RL/kitchen/complete-v2", {"eta": 0.005, "grad_clip": 9.0, "lr_decay": 12_500_000}),
        ("dql", "cube-single-play-singletask-v0", {}),
        ("ifql", "antsoccer-arena-navigate-singletask-v0", {"discount": 0.995, "candidates": 64}),
        (
            "rebrac",
            "antmaze-giant-navigate-singletask-v0",
            {**OGBENCH, "actor_bc": 0.003, "critic_bc": 0.01, "discount": 0.995},
        ),
        ("rebrac", "cube-double-play-singletask-v0", {**OGBENCH, "actor_bc": 0.1, "critic_bc": 0.0}),
    ],
)
def test_chosen_settings(agent: str, dataset: str, expected: dict[str, Any]) -> None:
    assert settings(agent, dataset) == expected


@pytest.mark.parametrize("agent", AGENTS)
def test_a_dataset_takes_its_namesakes_values(agent: str) -> None:
    """But where the table has rows for the dataset alone; a forge dataset's version makes no difference."""
    rows = table(agent)
    for dataset in IDS:
        if not (name := namesake(dataset)):
            continue
        own = [pattern for pattern in rows if fnmatch(dataset, pattern) and not fnmatch(name, pattern)]
        theirs = settings(agent, name)
        assert own == (["forge/hopper/*"] if agent == "sac_n" and dataset.startswith("forge/hopper/") else [])
        assert settings(agent, dataset) == theirs | (rows[own[0]] if own else {})
        if dataset.startswith("forge/"):
            assert settings(agent, dataset.removesuffix("0") + "1") == settings(agent, dataset)


# ---- every row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_every_row_could_be_used(agent: str) -> None:
    """Its keys and values are settings, and its pattern matches some dataset that there is."""
    rows = table(agent)
    cls, _ = agent_config({"_target_": OmegaConf.load(AGENTS[agent])["_target_"]})
    check_tables(rows, cls.Config, {})
    idle = {pattern for pattern in rows if not any(fnmatch(dataset, pattern) for dataset in IDS)}
    assert idle <= UNLISTED


@pytest.mark.parametrize("agent", AGENTS)
def test_rows_for_ogbench_are_apart_from_all_others(agent: str) -> None:
    """OGBench's AntMaze is not D4RL's, whose rewards are shifted: no row holds for sets of both."""
    others = set(IDS) - set(OGBENCH_IDS)
    for pattern in table(agent):
        matched = {dataset for dataset in OGBENCH_IDS if fnmatch(dataset, pattern)}
        assert not matched or not any(fnmatch(dataset, pattern) for dataset in others), pattern


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"alhpa": 1.0}, "agent.settings, row never-*: agent.alhpa is no option; did you mean agent.alpha?"),
        ({"alpha": "big"}, "agent.settings, row never-*: agent.alpha='big' should be a number"),
        (
            {"data.reward_shfit": 1.0},
            "agent.settings, row never-*: data.reward_shfit is no option; did you mean data.rew",
        ),
        ({"data.reward_shift": "x"}, "agent.settings, row never-*: data.reward_shift='x' should be a number."),
        ({"batch_size": 0.5}, "agent.settings, row never-*: batch_size=0.5 should be a whole number."),
        (3, "agent.settings, row never-*: 3 should be a table of settings"),
    ],
    ids=str,
)
def test_a_wrong_row_is_found_though_no_dataset_matches_it(row: Any, message: str) -> None:
    agent = {"_target_": "offrl.agents.td3_bc.TD3BC", "settings": {"never-*": row}}
    with pytest.raises(OffrlError) as caught:
        resolve_config({"agent": agent, "dataset": "toy.npz"})
    assert str(caught.value).startswith(message)


def test_a_setting_that_training_has_is_none_of_a_methods_table() -> None:
    """Of training's options a table may set the batch size alone."""
    cls, _ = agent_config({"_target_": "offrl.agents.td3_bc.TD3BC"})
    check_tables({"*": {"batch_size": 8}}, cls.Config, {})
    with pytest.raises(OffrlError, match=r"agent\.updates is no option"):
        check_tables({"*": {"updates": 8}}, cls.Config, {})
