"""Checkpoints: what is written comes back, damage gets a sentence, and a failed write leaves the old file."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_toy
from safetensors.torch import load_file, save_file

from offrl.agents.base import Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils import checkpoint
from offrl.utils.errors import OffrlError

FACTS = {"step": 7, "config": {"agent": {"hidden": [8, 8]}, "name": None}, "text": "ü"}


def agent_of(seed: int = 0, hidden: tuple[int, ...] = (8, 8)) -> TD3BC:
    return TD3BC(Spec(3, 2, (seed, seed + 1)), TD3BCConfig(hidden=hidden))


def trained() -> TD3BC:
    agent, dataset = agent_of(), make_toy(64)
    Eager(agent, BatchLoader([(dataset, Uniform(dataset), 1.0)], 8)).run(0, 5)
    return agent


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / checkpoint.NAME
    checkpoint.save(path, trained(), FACTS)
    return path


def test_everything_comes_back(saved: Path) -> None:
    """Networks, targets, moments and counts, bit for bit, into an agent that was made elsewhere."""
    agent, other = trained(), agent_of(seed=50)
    tensors, metadata = checkpoint.load(saved)
    assert metadata == FACTS
    checkpoint.restore(other, tensors, saved)
    assert agent.state_dict().keys() == other.state_dict().keys()
    for key, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert float(other.actor_optimizer.count) == 2  # the delayed actor's own count
    assert float(other.critic_optimizer.count) == 5


def test_the_file_is_plain_safetensors_with_json(saved: Path) -> None:
    """Other tools can read it, and nothing in it is executed."""
    assert set(load_file(saved)) == set(trained().state_dict())
    raw = saved.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["offrl"]) == FACTS


def test_a_loaded_checkpoint_outlives_its_file(saved: Path) -> None:
    """Tensors that were read stay what they were when the next checkpoint replaces the file."""
    tensors, _ = checkpoint.load(saved)
    copies = {k: v.clone() for k, v in tensors.items()}
    checkpoint.save(saved, agent_of(seed=9), {})
    assert all(torch.equal(tensors[k], copies[k]) for k in copies)


# ---- damage ---------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OffrlError, match=r"checkpoint.safetensors: there is no checkpoint; train first"):
        checkpoint.load(tmp_path / checkpoint.NAME)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(OffrlError, match=r"no offrl checkpoint, or it is damaged"):
        checkpoint.load(saved)


@pytest.mark.parametrize("kind", ["another tool's", "broken facts", "facts of another kind", "pickle", "folder"])
def test_a_foreign_file(tmp_path: Path, kind: str) -> None:
    path, tensors = tmp_path / "x.safetensors", {"weight": torch.ones(3)}
    if kind == "another tool's":
        save_file(tensors, path)
    elif kind == "broken facts":
        save_file(tensors, path, metadata={"offrl": "{"})
    elif kind == "facts of another kind":
        save_file(tensors, path, metadata={"offrl": "[1, 2]"})
    elif kind == "pickle":
        torch.save(tensors, path)
    else:
        path.mkdir()
    with pytest.raises(OffrlError, match=r"x.safetensors: this is no offrl checkpoint, or it is damaged"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_shape(saved: Path) -> None:
    tensors, _ = checkpoint.load(saved)
    with pytest.raises(OffrlError, match=r"does not fit this agent's configuration .at actor"):
        checkpoint.restore(agent_of(hidden=(8, 9)), tensors, saved)
    with pytest.raises(OffrlError, match=r"does not fit this agent's configuration"):
        checkpoint.restore(agent_of(hidden=(8, 8, 8)), tensors, saved)
    with pytest.raises(OffrlError, match=r"does not fit this agent's configuration .at odd"):
        checkpoint.restore(agent_of(), {**tensors, "odd": torch.ones(1)}, saved)


# ---- a full disk ----------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(tensors: Any, path: Path, metadata: Any = None) -> None:
    """What a full disk leaves of a file."""
    save_file(tensors, path, metadata)
    path.write_bytes(path.read_bytes()[:1000])
    full()


@pytest.mark.parametrize("where", ["writing", "half written", "flushing", "renaming"])
def test_a_full_disk_leaves_the_last_checkpoint(saved: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    target, replacement = {
        "writing": ("offrl.utils.checkpoint.save_file", full),
        "half written": ("offrl.utils.checkpoint.save_file", half_written),
        "flushing": ("os.fsync", full),
        "renaming": ("os.replace", full),
    }[where]
    monkeypatch.setattr(target, replacement)
    with pytest.raises(OffrlError, match=r"could not be written .*No space left.*last good checkpoint is untouched"):
        checkpoint.save(saved, agent_of(seed=9), FACTS)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [child.name for child in saved.parent.iterdir()] == [checkpoint.NAME]


def test_a_write_that_the_system_stops(saved: Path) -> None:
    """For real: the system lets the file grow to half its size."""
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OffrlError, match="could not be written"):
            checkpoint.save(saved, agent_of(seed=9), FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [child.name for child in saved.parent.iterdir()] == [checkpoint.NAME]


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OffrlError, match=r"could not be written .*out=DIR"):
        checkpoint.save(tmp_path / "file" / "run" / checkpoint.NAME, agent_of(), FACTS)
