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
from offrl.training.runs import dataset_info, load_agent
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


def test_every_flipped_bit_is_found(saved: Path) -> None:
    """One bit at a time, spread over header, facts and tensors."""
    data = saved.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 300)):
        saved.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(OffrlError, match=r"no offrl checkpoint, or it is damaged"):
            checkpoint.load(saved)


def test_checkpoints_of_earlier_versions_have_no_checksum(saved: Path) -> None:
    tensors = load_file(saved)
    save_file(tensors, saved, metadata={"offrl": json.dumps(FACTS)})
    kept, metadata = checkpoint.load(saved)
    assert metadata == FACTS
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.half(), "does not fit this agent's configuration .at actor"),
        (lambda t: t.double(), "does not fit this agent's configuration .at actor"),
        (lambda t: t.long(), "does not fit this agent's configuration .at actor"),
        (lambda t: t * float("nan"), "numbers that are not finite .in actor"),
        (lambda t: t + float("inf"), "numbers that are not finite .in actor"),
    ],
    ids=["half", "double", "integers", "nan", "inf"],
)
def test_tensors_of_another_kind(spoil: Any, message: str, saved: Path) -> None:
    """In a file whose checksum is right, too; the agent keeps what it had."""
    tensors, metadata = checkpoint.load(saved)
    name = next(name for name in tensors if name.startswith("actor"))
    checkpoint.write(saved, {**tensors, name: spoil(tensors[name])}, metadata)
    agent = agent_of(seed=9)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    with pytest.raises(OffrlError, match=message):
        checkpoint.restore(agent, checkpoint.load(saved)[0], saved)
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())


@pytest.mark.parametrize("offsets", [[0, 8], [4, 12], [8, 4], [-8, 0], [8, 10**18]], ids=str)
def test_offsets_that_overlap_or_lie_outside(offsets: list[int], tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2]}
    header = {"a": {**entry, "data_offsets": [0, 8]}, "b": {**entry, "data_offsets": offsets}}
    text = json.dumps({**header, "__metadata__": {"offrl": "{}"}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(OffrlError, match=r"x.safetensors: this is no offrl checkpoint, or it is damaged"):
        checkpoint.load(path)


RUN = {
    "step": 7,
    "fingerprint": "abc",
    "config": {"agent": {"_target_": "offrl.agents.td3_bc.TD3BC", "hidden": [8, 8]}},
    "spec": {"obs_dim": 3, "action_dim": 2, "seeds": [0, 1], "action_low": -1.0, "action_high": 1.0, "discrete": False},
    "info": {"id": "toy"},
}
MISSING = object()
ODD = [MISSING, None, "text", [1], -1, 1e30, 10**30]


@pytest.mark.parametrize("value", ODD, ids=lambda value: "missing" if value is MISSING else str(value))
@pytest.mark.parametrize(
    "key", [*RUN, "spec.obs_dim", "spec.seeds", "spec.action_low", "info.ref_min", "info.env_kwargs"]
)
def test_facts_of_another_kind(key: str, value: Any, tmp_path: Path) -> None:
    """One sentence that names file and key, wherever a run's checkpoint is opened."""
    allowed = {"spec.action_low", "info.ref_min"} if isinstance(value, (int, float)) else set()
    allowed |= {"spec.action_low", "info.ref_min", "info.env_kwargs"} if value is MISSING else set()
    allowed |= {"spec.seeds"} if value == [1] else set()
    allowed |= {"info.ref_min"} if value is None else {"fingerprint"} if value == "text" else set()
    if key in allowed:
        pytest.skip("that may stand there")
    facts = json.loads(json.dumps(RUN))
    inner = facts
    *groups, name = key.split(".")
    for group in groups:
        inner = inner[group]
    if value is MISSING:
        del inner[name]
    else:
        inner[name] = value
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, agent_of().state_dict(), facts)
    for opened in (load_agent, dataset_info):
        with pytest.raises(OffrlError, match=rf"{checkpoint.NAME}: .*{key}.*; remove it") as raised:
            opened(path)
        assert len(str(raised.value)) < 400
        assert "\n" not in str(raised.value)


def test_facts_without_end(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.NAME
    for text in ('{"step":' + "[" * 50_000, '{"step":' + "1" * 5000 + "}", '{"a":' * 500 + "1" + "}" * 500):
        save_file(agent_of().state_dict(), path, metadata={"offrl": text})
        with pytest.raises(OffrlError, match=r"it is damaged \(.*\); remove it"):
            load_agent(path)


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


def test_a_file_that_was_named_by_mistake_need_not_be_removed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        OffrlError, match=r"config.json: this is no offrl checkpoint.*; name the folder of a run, or its ch"
    ):
        checkpoint.load(tmp_path / "config.json")
