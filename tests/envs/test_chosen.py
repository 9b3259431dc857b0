"""Environments that a user gives as functions, and processes that begin with a fresh interpreter, as with a GPU in use."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import offrl
from offrl.agents.base import Spec
from offrl.agents.bc import BC, BCConfig
from offrl.data.dataset import DatasetInfo
from offrl.envs import chosen
from offrl.evaluation.beside import EvaluationProcess
from offrl.evaluation.evaluator import Evaluator
from offrl.utils.errors import OffrlError

INFO = DatasetInfo(id="mine", max_episode_steps=5, action_low=-2.0, action_high=2.0)
AGENT = BC(Spec(3, 1, (0,), action_low=-2.0, action_high=2.0), BCConfig(hidden=(8,)))
REFUSED = r"can't be sent .*; define it at the top of a module .*eval.workers=1 eval.asynchronous=false"


def make_pendulum(**options: Any) -> gymnasium.Env:
    return gymnasium.make("Pendulum-v1", **options)


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """`give_function`, which this test forgets, with a GPU in use."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(chosen, "_functions", {})
    monkeypatch.setattr(chosen, "_modules", [])
    monkeypatch.setattr(gymnasium.envs.registration, "registry", registry := dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", registry)
    return chosen.give_function


def test_a_function_that_cannot_be_sent_gets_a_sentence(give: Callable[[Any], str]) -> None:
    info = replace(INFO, env_id=give(lambda **options: make_pendulum(**options)))
    with Evaluator(info, 1, workers=2) as evaluator:
        with pytest.raises(OffrlError, match=REFUSED):
            evaluator.run(AGENT, 2)
        with pytest.raises(OffrlError, match=REFUSED):
            EvaluationProcess(evaluator, AGENT)
    with (
        Evaluator(INFO, 1, workers=2, make_env=lambda: make_pendulum()) as evaluator,
        pytest.raises(OffrlError, match=REFUSED),
    ):
        evaluator.run(AGENT, 2)
    assert not multiprocessing.active_children()
    with Evaluator(info, 1, workers=1) as evaluator:
        assert evaluator.run(AGENT, 2).lengths.tolist() == [[5, 5]]


@pytest.mark.parametrize("how", [{"workers": 2}, {"workers": 1, "asynchronous": True}], ids=str)
def test_it_does_so_before_the_training(
    how: dict[str, Any], give: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = np.zeros((10, 3), np.float32)
    ends = np.arange(10) == 9
    arrays = {"observations": rows, "actions": rows[:, :1], "rewards": rows[:, 0], "terminals": ends & False}
    make = lambda **options: gymnasium.wrappers.RescaleAction(make_pendulum(**options), -1.0, 1.0)  # noqa: E731
    env = {"env": make, "max_episode_steps": 5, "every": 1, "episodes": 2}
    seen: list[Any] = []
    with pytest.raises(OffrlError, match=REFUSED):
        offrl.fit(dataset=arrays | {"timeouts": ends}, agent="bc", updates=2, eval=env | how, on_checkpoint=seen.append)
    assert seen == []


def test_what_the_main_program_defines_can_be_sent_where_it_is_a_file(
    give: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh interpreter reads the main program's file again; a notebook and a prompt have none."""
    main = ModuleType("__main__")
    exec("def make_mine(**options): ...", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    name = give(main.make_mine)
    with pytest.raises(OffrlError, match="defined at a prompt or in a notebook"):
        chosen.given_to("spawn", [name])
    assert chosen.given_to("fork", [name]) == ([], {})
    main.__file__ = "mine.py"
    assert chosen.given_to("spawn", [name]) == ([], {name: main.make_mine})


def test_only_what_is_needed_is_sent_and_can_be_sent_on(give: Callable[[Any], str]) -> None:
    give(lambda: None)  # of an earlier training
    name = give(make_pendulum)
    sent = chosen.given_to("spawn", [name, None, "Pendulum-v1"])
    assert sent == ([], {name: make_pendulum})
    chosen._functions.clear()
    del gymnasium.registry[name]
    chosen.give(["json"], sent[1])
    assert name in gymnasium.registry
    assert chosen.given_to("spawn", [name]) == (["json"], {name: make_pendulum})


# ---- mistakes ------------------------------------------------------------------------------------------------------


class Right(gymnasium.Env):
    """What the environments below do wrong, done right."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action: Any) -> Any:
        return np.zeros(2), 0.0, False, False, {}


def but(**methods: Any) -> type[Right]:
    return type("Mine", (Right,), methods)


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (but(reset=lambda self, **_: np.zeros(2)), r"reset has to give \(observation, info\)"),  # Gym before 0.26
        (
            but(step=lambda self, _: (np.zeros(2), 0.0, False, {})),
            r"not enough values.*; it has to follow gymnasium.Env",
        ),
        (but(step=lambda self, _: (np.zeros(2), 0.0, False, False, None)), r"step has to give \(observation, reward"),
        (but(reset=lambda self: (np.zeros(2), {})), r"first step fails \(TypeError: .*'seed'; \w+.py, line \d+\)"),
        (but(reset=lambda self, **_: (np.zeros(3), {})), r"observation of shape \[3\], and its .* has shape \[2\]"),
        (but(step=lambda self, _: (np.zeros((2, 1)), 0.0, False, False, {})), r"observation of shape \[2, 1\]"),
        (but(step=lambda self, _: (np.zeros(2), np.zeros(1), False, False, {})), "a single number as reward"),
        (but(step=lambda self, _: (np.zeros(2), None, False, False, {})), "a single number as reward"),
        (
            but(step=lambda self, _: 1 / 0),
            r"first step fails \(ZeroDivisionError: division by zero; test_chosen.py, line",
        ),
        (but(action_space=None), "it has no action_space; set one of gymnasium.spaces"),
    ],
)
def test_an_environment_that_breaks_gymnasiums_interface(env: Any, sentence: str, give: Callable[[Any], str]) -> None:
    """Some of these would be played: an observation of one number fills every place of a vector."""
    info = DatasetInfo(id="mine", max_episode_steps=5)
    with Evaluator(replace(info, env_id=give(Right)), 1, workers=1) as evaluator:
        assert evaluator.run(BC(Spec(2, 1, (0,)), BCConfig(hidden=(8,))), 1).lengths.tolist() == [[5]]
    with pytest.raises(OffrlError, match=sentence):
        Evaluator(replace(info, env_id=give(env)), 1, workers=1)


def test_arguments_that_fail_at_the_first_step() -> None:
    """Gymnasium's pendulum takes any gravity, and divides by it."""
    info = DatasetInfo(id="mine", env_id="Pendulum-v1", env_kwargs={"g": 9.0}, max_episode_steps=3)
    Evaluator(info, 1, workers=1).close()
    with pytest.raises(OffrlError, match=r"Pendulum-v1: its first step fails \(TypeError: .*check env_kwargs=.*'a b'"):
        Evaluator(replace(info, env_kwargs={"g": "a b"}), 1, workers=1)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("own_cart.py", "env=own_cart:ID"),
        ("envs/own_cart.py:Cart-v0", "env=envs.own_cart:ID"),
        ("envs.own_cart.Cart", "env=envs.own_cart:ID"),
        ("own_envs.cart", "env=own_envs.cart:ID"),
        ("json:", "env=json:ID"),
        ("own_pendulum:Own", "unversioned.*; name the environment by the id that is registered"),
    ],
)
def test_names_that_are_no_ids(
    name: str, sentence: str, give: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("own_pendulum")
    module.Own = make_pendulum  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_pendulum", module)
    gymnasium.register("Own-v0", entry_point=make_pendulum)
    with pytest.raises(OffrlError, match=sentence):
        chosen.import_environment(name)


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_of_fresh_processes_make_the_same_environment(
    give: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    info = replace(INFO, env_id=give(make_pendulum))
    with Evaluator(info, 1, workers=1) as evaluator:
        wanted = evaluator.run(AGENT, 3, seed=5)
    process = EvaluationProcess(Evaluator(info, 1, workers=2), AGENT)
    process.start(AGENT, 0, 3, 5)
    played = process.result()
    process.close()
    np.testing.assert_array_equal(played.returns, wanted.returns)
