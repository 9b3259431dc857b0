"""Trackers: what was logged is in the files that their own readers open."""

from __future__ import annotations

import sys

import pytest

from offrl.training.trackers import make_tracker
from offrl.utils.errors import OffrlError

CONFIG = {"agent": {"_target_": "offrl.agents.bc.BC"}, "lanes": 2}


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("kind", [None, "none", []])
def test_none_leaves_nothing_behind(kind, tmp_path):
    tracker = make_tracker(kind, tmp_path, CONFIG, "run")
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = make_tracker("tensorboard", tmp_path, CONFIG, "run")
    tracker.log(1000, {"train/loss": 0.5, "eval/score": 12.25})
    tracker.log(2000, {"train/loss": 0.25})
    tracker.close()
    assert scalars(tmp_path) == {"train/loss": [(1000, 0.5), (2000, 0.25)], "eval/score": [(1000, 12.25)]}


def test_resumed_run_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = make_tracker(["none", "tensorboard"], tmp_path, CONFIG, "run")
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
    tracker.close()
    tracker = make_tracker("tensorboard", tmp_path, CONFIG, "run", resume_step=2)
    tracker.log(3, {"loss": 30.0})
    tracker.close()
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}


def test_unknown_tracker_is_named():
    with pytest.raises(OffrlError, match="tracker=neptune is unknown"):
        make_tracker(["none", "neptune"], ".", CONFIG, "run")


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_extra_is_named(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(OffrlError, match=rf'pip install "\.\[{kind}\]"'):
        make_tracker(kind, tmp_path, CONFIG, "run")


def test_wandb_offline_keeps_all_in_the_run_and_resumes_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    folder = tmp_path / "run"
    for resume_step in (None, 1):
        tracker = make_tracker("wandb", folder, CONFIG, "bc on hopper", resume_step)
        tracker.log(resume_step or 0, {"zebra_loss": 0.5})
        tracker.close()
    identity = (folder / "wandb" / "run_id").read_text()
    logs = sorted((folder / "wandb").glob(f"offline-run-*-{identity}/*.wandb"))
    assert len({log.name for log in logs}) == 1
    content = b"".join(log.read_bytes() for log in logs)
    assert all(text in content for text in (b"bc on hopper", b"zebra_loss", b"updates", b"offrl.agents.bc.BC"))
