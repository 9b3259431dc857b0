"""What `--json` prints is JSON: it has no NaN and no infinity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from test_cli import main
from test_train import options, world  # noqa: F401 - a fixture

from offrl.cli import probe as probing
from offrl.evaluation.probes import Leakage, Probe
from offrl.training.trainer import train


class Broken(gymnasium.Env):
    """The toy's spaces, three steps an episode, and a reward that is not finite at the last."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, last: float) -> None:
        self.last = last

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 3
        return np.zeros(3), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return np.zeros(3), 1.0 if self.left else self.last, self.left == 0, False, {}


def strict(text: str) -> Any:
    """The JSON of a text, in which NaN, Infinity and -Infinity are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.filterwarnings("ignore:.*is not finite:UserWarning")
@pytest.mark.parametrize("last", [math.nan, math.inf, 0.0])
def test_evaluate(
    last: float,
    world: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = EnvSpec("Broken-v0", entry_point=lambda: Broken(last))
    monkeypatch.setitem(gymnasium.registry, "Broken-v0", spec)
    folder = train(options("toy.npz", 4)).folder
    words = [
        "evaluate",
        str(folder),
        "--env",
        "Broken-v0",
        "--ref-min",
        "0",
        "--ref-max",
        "4",
        "--max-episode-steps",
        "5",
    ]
    capsys.readouterr()
    assert main(*words, "--episodes", "2", "--workers", "1", "--no-save", "--json") == 0
    shown = strict(capsys.readouterr().out)
    whole = math.isfinite(last)
    assert shown["returns"] == [[2.0 if whole else None] * 2] * 2
    assert shown["normalized"] == [[50.0 if whole else None] * 2] * 2
    assert shown["lengths"] == [[3, 3], [3, 3]]


def test_probe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    leakage = Leakage([0.1], [-math.inf], [0.0])
    found = Probe("r", "rvs", "d", True, [1.0, math.nan], [math.inf, 2.0], leakage, None)
    monkeypatch.setattr(probing, "probe", lambda *_, **__: found)
    assert main("probe", "r", "--json") == 0
    (shown,) = strict(capsys.readouterr().out)
    assert (shown["predicted"], shown["achieved"]) == ([1.0, None], [None, 2.0])
    assert shown["outcome"] == {"without_label": [0.1], "label": [None], "shuffled_label": [0.0]}
    assert shown["noise"] is None
    assert shown["sampled"] is True
