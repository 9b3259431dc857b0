"""Exported policies: the same actions without offrl, metadata, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny
from hydra.utils import get_class
from omegaconf import OmegaConf

from offrl.agents.base import Agent, Spec
from offrl.agents.bc import BC, BCConfig
from offrl.agents.iql import IQL, IQLConfig
from offrl.agents.recurrent import RecurrentAgent
from offrl.cli.main import main
from offrl.data.dataset import DatasetInfo
from offrl.evaluation import export as module
from offrl.evaluation.export import METADATA, check_exportable, compare, export
from offrl.training.trainer import train
from offrl.utils.errors import OffrlError
from offrl.utils.paths import conf_dir

INFO = DatasetInfo(id="mine", env_id="Pendulum-v1")
AGENTS = {p.stem: get_class(OmegaConf.load(p)._target_) for p in sorted((conf_dir() / "agent").glob("*.yaml"))}
SEQUENCES = {"dt", "doc", "esper", "rvs", "vae_bc"}
SAMPLING = {"dql", "flow_bc", "fql", "idql", "ifql"}
OBS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def spec(**options: Any) -> Spec:
    statistics = {"obs_mean": torch.tensor([3.0, -1.0, 0.0]), "obs_std": torch.tensor([0.1, 10.0, 1.0])}
    return Spec(3, 2, (0, 1), **({"action_low": (-1.0, -2.0), "action_high": (1.0, 3.0)} | statistics | options))


@pytest.fixture
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tracer of the graph, which takes seconds, where TorchScript is written and the graph is not the question."""
    monkeypatch.setattr(module, "_program", lambda one: None)


def test_what_can_be_exported() -> None:
    """Every method but those with a history or random numbers, which say so."""
    for name, cls in AGENTS.items():
        agent = cls(spec(discrete=not cls.takes_continuous), cls.Config(**{**tiny(cls, 8)}))
        if name in SEQUENCES | SAMPLING:
            with pytest.raises(OffrlError, match="episode so far" if name in SEQUENCES else "sample_actions=false"):
                check_exportable(agent)
        else:
            check_exportable(agent)


@pytest.mark.usefixtures("_untraced")
def test_torchscript_acts_alike_with_numpy_alone(tmp_path: Path) -> None:
    """Restated by hand for BC, from the file's input to its bounds; float32."""
    agent = BC(spec(), BCConfig(hidden=(8,)))
    agent.lane_scores = [1.0, 42.0]
    made = export(agent, 1, INFO, tmp_path / "policy.pt", "torchscript", {"updates": 7})
    extra = {METADATA: ""}
    action = torch.jit.load(str(made.path), _extra_files=extra)(torch.from_numpy(OBS)).numpy()
    w1, w2 = (w[1].double().detach().numpy() for w in agent.actor.mlp.weights)
    b1, b2 = (b[1].double().detach().numpy() for b in agent.actor.mlp.biases)
    z = (OBS - [3.0, -1.0, 0.0]) / (np.array([0.1, 10.0, 1.0]) + 1e-3)
    wanted = np.tanh(np.maximum(z @ w1.T + b1, 0) @ w2.T + b2) * [1.0, 2.5] + [0.0, 0.5]
    np.testing.assert_allclose(action, wanted, rtol=0, atol=2e-5)
    facts = json.loads(extra[METADATA])
    assert (facts["dataset"], facts["agent"], facts["score"], facts["seed"], facts["updates"]) == (
        "mine",
        "BC",
        42.0,
        1,
        7,
    )
    assert made.path.stat().st_size < 40_000  # no optimiser, no second lane


@pytest.mark.slow
def test_onnx_acts_alike(tmp_path: Path) -> None:
    """A Gaussian method: its mean, by ONNX Runtime; the critics stay out of the file."""
    onnxruntime = pytest.importorskip("onnxruntime")
    agent = IQL(spec(), IQLConfig(hidden=(64, 64)))
    made = export(agent, 0, INFO, tmp_path / "policy.onnx", "onnx", {})
    session = onnxruntime.InferenceSession(str(made.path))
    action = session.run(None, {"obs": OBS})[0]
    np.testing.assert_allclose(action, agent.predict(OBS, lane=0)[0], rtol=0, atol=2e-6)
    facts = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert (facts["dataset"], facts["score"], facts["action_high"]) == ("mine", None, [1.0, 3.0])
    onnx = pytest.importorskip("onnx")
    numbers = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(made.path).graph.initializer)
    own = sum(p.numel() for p in agent.actor.mlp.parameters()) // 2
    assert own <= numbers < own + 50  # with mean, scale and bounds; no critic is in it
    assert str(Path(__file__).parent.parent).encode() not in made.path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", sorted(set(AGENTS) - SEQUENCES - {"iql"}))
def test_every_method_in_either_form(name: str, form: str, tmp_path: Path) -> None:
    cls = AGENTS[name]
    sample = {"sample_actions": False} if name in SAMPLING else {}
    agent: Agent = cls(spec(discrete=not cls.takes_continuous), cls.Config(**tiny(cls, 16), **sample))
    made = export(agent, 1, INFO, tmp_path / f"policy.{form}", form, {})
    assert made.difference <= made.tolerance < 1e-4  # batches of 1, 7 and 992 observations among them


@pytest.mark.slow
def test_integers(tmp_path: Path) -> None:
    agent = BC(spec(discrete=True), BCConfig(hidden=(8,)))
    made = export(agent, 1, INFO, tmp_path / "policy.onnx", "onnx", {})
    assert made.difference == 0


def test_the_check_can_fail() -> None:
    one = BC(spec(), BCConfig(hidden=(8,))).lane(0)
    close, limit = compare(one, lambda obs: one.predict(obs, lane=0)[0])
    assert close <= 1e-6  # some roundings: batches of another size may be summed in another order
    assert 1e-6 <= limit < 1e-4
    off, limit = compare(one, lambda obs: one.predict(obs, lane=0)[0] + np.float32(2e-4))
    assert off > limit
    raw, limit = compare(one, lambda obs: one.predict(obs * np.float32(0.999), lane=0)[0])
    assert raw > limit
    assert compare(one, lambda obs: np.full((len(obs), 2), np.nan))[0] == np.inf


@pytest.mark.usefixtures("_untraced")
def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read_torchscript", lambda path: lambda obs: np.zeros((len(obs), 2), np.float32))
    with pytest.raises(OffrlError, match="differs from the agent by"):
        export(BC(spec(), BCConfig(hidden=(8,))), 0, INFO, tmp_path / "policy.pt", "torchscript", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_untraced")
def test_what_fails_to_run_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_read_torchscript", lambda path: lambda obs: torch.ones(2).expand(3, 3).numpy())
    with pytest.raises(OffrlError, match=r"BC can't be exported as torchscript \(RuntimeError: .* try --format onnx"):
        export(BC(spec(), BCConfig(hidden=(8,))), 0, INFO, tmp_path / "policy.pt", "torchscript", {})
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from offrl.agents.bc import BC, BCConfig
from offrl.data.dataset import DatasetInfo
from offrl.evaluation.export import export
from offrl.nets import Spec

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
export(BC(Spec(3, 2, (0,)), BCConfig(hidden=(8,))), 0, DatasetInfo(), Path(sys.argv[1]), "torchscript", {})
"""


@pytest.mark.slow  # a process of its own
@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path / "policy.pt")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "OffrlError" in ended.stderr
    assert "cannot be written (File too large)" in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_users_agent_that_is_no_graph(tmp_path: Path) -> None:
    class Odd(BC):
        def act(self, obs: torch.Tensor, state: Any = None) -> torch.Tensor:
            return super().act(obs) * float(obs.sum())

    with pytest.raises(OffrlError, match="no fixed graph of tensors"):
        export(Odd(spec(), BCConfig(hidden=(8,))), 0, INFO, tmp_path / "policy.pt", "torchscript", {})
    assert issubclass(Odd, RecurrentAgent)


@pytest.mark.usefixtures("_untraced")
def test_the_command(toy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = {"progress": False, "eval": {"every": 0, "final_episodes": 0}, "out": str(tmp_path), "lanes": 2}
    settings = {"_target_": "offrl.agents.bc.BC", "hidden": [8]}
    folder = train({"agent": settings, "dataset": str(toy_file), "updates": 4, "batch_size": 8, **quiet}).folder
    assert main(["export", str(folder), "--format", "torchscript"]) == 2
    assert "name one: lane=0 to lane=1" in capsys.readouterr().err
    one = ["export", str(folder), "--format", "torchscript", "--lane", "1"]
    for out, words in (
        (str(tmp_path), "is a folder; name a file in it"),
        ("p.onnx", "that of onnx; give --format onnx"),
    ):
        assert main([*one, "--out", out]) == 2
        assert words in capsys.readouterr().err
    assert main(one) == 0
    assert "actions differ by at most" in capsys.readouterr().out
    assert (folder / "policy.pt").is_file()


@pytest.mark.usefixtures("_untraced")
def test_a_kept_checkpoint_is_exported_to_its_runs_folder(toy_file: Path, tmp_path: Path) -> None:
    quiet = {
        "progress": False,
        "eval": {"every": 0, "final_episodes": 0},
        "out": str(tmp_path),
        "keep_checkpoints": True,
    }
    settings = {"_target_": "offrl.agents.bc.BC", "hidden": [8]}
    folder = train({"agent": settings, "dataset": str(toy_file), "updates": 4, "batch_size": 8, **quiet}).folder
    kept = folder / "checkpoints" / "00000004.safetensors"
    assert main(["export", str(kept), "--format", "torchscript"]) == 0
    assert not (folder / "checkpoints" / "policy.pt").exists()
    extra = {METADATA: ""}
    torch.jit.load(str(folder / "policy.pt"), _extra_files=extra)
    assert json.loads(extra[METADATA])["run"] == folder.name
