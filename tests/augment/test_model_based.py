"""Agents that live in the world model, as runs: what reaches their batches, and an exact resume across generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offrl.results.published import lookup
from offrl.training.runs import Result
from offrl.training.trainer import Trainer, train
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError

MODEL = {"hidden": [16], "updates": 20, "members": 3, "elites": 2, "batch_size": 32}
WORLD = {"_target_": "offrl.augment.world_model.WorldModel", "share": 0.75, "refresh_every": 10, "keep": 2}
WORLD |= {"transitions": 30, "length": 3, "model": MODEL}
AGENTS: dict[str, dict[str, Any]] = {
    "mopo.MOPO": {"hidden": [16, 16]},
    "combo.COMBO": {"hidden": [16, 16], "actions": 2},
    "mobile.MOBILE": {"hidden": [16, 16], "draws": 2, "target_min": None},
}


def values(file: Path, out: Path, agent: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "agent": {"_target_": f"offrl.agents.{agent}", **AGENTS[agent]},
        "augment": {**WORLD, "penalty": 0.5 if agent == "mopo.MOPO" else 0.0},
        "dataset": str(file),
        "out": str(out),
        "updates": 25,
        "batch_size": 16,
        "lanes": 2,
        "checkpoint_every": 7,
        "progress": False,
        "eval": {"every": 0, "final_episodes": 0},
    }
    return given | changes


def tensors(result: Result) -> dict[str, torch.Tensor]:
    return checkpoint.load(result.folder / checkpoint.NAME)[0]


@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_that_was_cut_short_ends_as_an_undisturbed_one(
    agent: str, toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two generations, behind a checkpoint; MOBILE asks the same model again."""
    whole = train(values(toy_file, tmp_path / "whole", agent))
    given = values(toy_file, tmp_path / "parts", agent)
    original = Trainer._save

    def stop(self: Trainer) -> None:
        original(self)
        self.stop = self.step == 14

    monkeypatch.setattr(Trainer, "_save", stop)
    assert train(given).status == "interrupted"
    monkeypatch.setattr(Trainer, "_save", original)
    mine, theirs = tensors(train(given)), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_penalty_changes_the_agent(toy_file: Path, tmp_path: Path) -> None:
    """MOPO's by its rewards, MOBILE's by its own weight: another c is another agent."""
    plain = tensors(train(values(toy_file, tmp_path, "mopo.MOPO")))
    more = tensors(train(values(toy_file, tmp_path, "mopo.MOPO", augment={**WORLD, "penalty": 5.0})))
    assert not torch.equal(plain["critics.mlp.weights.0"], more["critics.mlp.weights.0"])
    settings = values(toy_file, tmp_path, "mobile.MOBILE")
    first, second = (tensors(train({**settings, "agent": {**settings["agent"], "penalty": c}})) for c in (0.0, 5.0))
    assert not torch.equal(first["critics.mlp.weights.0"], second["critics.mlp.weights.0"])


def test_an_augmentation_without_a_model_is_refused(toy_file: Path, tmp_path: Path) -> None:
    diffusion = {"_target_": "offrl.augment.diffusion.Diffusion"}
    with pytest.raises(OffrlError, match="MOBILE asks a model of the environment"):
        train(values(toy_file, tmp_path, "mobile.MOBILE", augment=diffusion))


def test_published_scores_stand_beside_ours() -> None:
    """OfflineRL-Kit's table; the points read off -v0 curves are of no last checkpoint."""
    found = lookup("mobile", "hopper-medium-v2")
    assert [(number.mean, number.std, number.seeds) for number in found] == [(103.6, 1.0, 4)]
    assert lookup("combo", "halfcheetah-medium-replay-v2")[0].mean == 66.5
    assert lookup("mopo", "halfcheetah-medium-replay-v0") == []
    assert lookup("mopo+noWM", "hopper-medium-v2") == []
