"""`hydra/sweeper=optuna`: the study in the sweep's folder holds what its runs scored, and the same command continues it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from offrl.cli import main as cli
from offrl.data.arrays import write_npz
from offrl.training import objective
from offrl.training.objective import value_of_run

optuna: Any = pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

BANDIT = """
import gymnasium, numpy as np

class Bandit(gymnasium.Env):
    '''One step; its reward is minus the distance of the action from its optimum in this state, a number of the observation.'''
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 1)
        return self.state, {}

    def step(self, action):
        return self.state, -float(np.abs(action - self.state).sum()), True, False, {}
"""


@pytest.fixture(autouse=True)
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from offrl.data import from_arrays

    rng = np.random.default_rng(0)
    states, actions = rng.uniform(-1, 1, (200, 1)), rng.uniform(-1, 1, (200, 1)).astype(np.float32)
    rewards = -np.abs(states - actions)[:, 0]
    arrays = {"observations": states, "actions": actions, "rewards": rewards, "terminals": np.ones(200, bool)}
    write_npz(from_arrays(arrays), tmp_path / "bandit.npz")
    (tmp_path / "my_bandit.py").write_text(BANDIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


WORDS = ["train", "-m", "hydra/sweeper=optuna", "dataset=bandit.npz", "agent=td3_bc", "updates=20", "batch_size=16"]
WORDS += ["agent.hidden=[8]", "eval.every=0", "eval.final_episodes=4", "eval.workers=1", "eval.env=my_bandit:Bandit"]
WORDS += ["eval.max_episode_steps=1", "progress=false", "agent.alpha=interval(0.5,5)", "out=search"]


def trials(folder: str = "search") -> list[Any]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{folder}/optuna.log"))
    study = optuna.load_study(study_name="offrl", storage=storage)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    return list(study.trials)


def test_a_study_holds_the_scores_of_its_runs_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "hydra.sweeper.n_trials=2"]) == 0
    assert "best of 2 trials: score" in capsys.readouterr().out
    assert cli.main([*WORDS, "hydra.sweeper.n_trials=3", "hydra/launcher=local", "hydra.sweeper.n_jobs=2"]) == 0
    found = trials()
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 3
    scores = {}
    for path in Path("search").rglob("result.json"):
        config = json.loads((path.parent / "config.json").read_text())
        scores[config["agent"]["alpha"]] = json.loads(path.read_text())["returns"][0]
    assert len(scores) == 3  # nothing was trained twice
    for trial in found:
        (alpha,) = trial.params.values()
        assert trial.value == pytest.approx(scores[alpha], abs=0)


def test_a_failed_trial_is_told_and_does_not_end_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 0 and 16 rows a batch one is impossible: the failed job has no folder, and `offrl status` shows it."""
    words = [word for word in WORDS if not word.startswith(("batch_size", "agent.alpha", "out="))]
    words += ["batch_size=choice(0,16)", "out=odd", "hydra.sweeper.n_trials=4", "hydra.sweeper.seed=1"]
    assert cli.main(words) == 1
    states = [trial.state.name for trial in trials("odd")]
    assert set(states) == {"COMPLETE", "FAIL"}
    capsys.readouterr()
    assert cli.main(["status", "odd"]) == 0
    shown = capsys.readouterr().out
    assert "before it had a folder: batch_size=0 should be at least 1." in shown


def test_fitted_q_evaluation_needs_no_environment() -> None:
    words = [word for word in WORDS if not word.startswith(("eval.", "out="))]
    words += ["eval.every=0", "eval.final_episodes=0", "out=fqe", "hydra.sweeper.n_trials=1"]
    assert cli.main([*words, "hydra.sweeper.objective=fqe", "hydra.sweeper.fqe_updates=30"]) == 0
    (run,) = (path.parent for path in Path("fqe").rglob("result.json"))
    (trial,) = trials("fqe")
    assert math.isfinite(trial.value)
    assert trial.value == value_of_run(run, "fqe", 30)
    every = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            objective,
            "fitted_q",
            lambda *given: every.append(given[2].target_every) or SimpleNamespace(value=np.ones(1)),
        )
        for updates in (30, 20_000, 100_000):
            value_of_run(run, "fqe", updates)
    assert every == [1, 50, 100]  # 400 copies of 20,000 updates, else the horizon would be short
    assert cli.main([*words, "out=none"]) == 2  # a score of what was not evaluated


@pytest.mark.parametrize("text", ["garbage\n", '{"op_code": 0}\n', "[]\n", "\0\0\n"])
def test_a_damaged_study_is_a_sentence(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("search").mkdir()
    Path("search/optuna.log").write_text(text)
    assert cli.main([*WORDS, "hydra.sweeper.n_trials=1"]) == 2
    error = capsys.readouterr().err
    assert "optuna.log: the study can't be read" in error
    assert error.count("\n") == 1
