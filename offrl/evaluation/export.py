"""A policy as a file that needs no offrl: ONNX or TorchScript, one lane, raw observations in and actions within bounds out.

The graph is that of `Agent.select_action` for one lane: normalisation, network, bounds. Its input `obs` is `[n, O]` float32 and
its output `action` is `[n, A]` float32, or `[n]` int64 where actions are discrete; n is free.

What is written is run before it takes its place, and has to agree with `Agent.predict`. Both are float32, whose results depend
on the order of additions: the tolerance is 1e-6 of half the actions' range, or where PyTorch's own float32 is further than that
from float64, twice that distance (the other engine may err as much to the other side).
"""

from __future__ import annotations

import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offrl.agents.base import Agent
from offrl.agents.recurrent import RecurrentAgent
from offrl.data.dataset import DatasetInfo
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import replacing
from offrl.utils.provenance import version_of

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt"}
METADATA = "offrl.json"  # name of the metadata in either format
ROWS = 1000  # observations that the check compares
Run = Callable[[NDArray[np.float32]], NDArray[Any]]


class Policy(nn.Module):
    """One lane's action `[n, A]` for raw observations `[n, O]`, as the module that is exported."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent
        self.requires_grad_(False).eval()

    def forward(self, obs: Tensor) -> Tensor:
        agent = self.agent
        action = agent.within_bounds(agent.act(agent.normalize(obs.unsqueeze(0))))
        return action.squeeze(0)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        difference: largest difference from `Agent.predict` over `ROWS` observations; for discrete actions the share of
            observations with another action.
        tolerance: what it had to stay below.
    """

    path: Path
    metadata: dict[str, Any]
    difference: float
    tolerance: float


def export(agent: Agent, lane: int, info: DatasetInfo, path: Path, form: str, facts: dict[str, Any]) -> Exported:
    """Write one lane's policy to `path`, whole or not at all, after checking it against `Agent.predict`.

    Args:
        form: `onnx` or `torchscript`.
        facts: more to write down of the policy, such as its run.

    Raises:
        OffrlError: the method can't be exported, a package is missing, the file can't be written, or its actions differ.
    """
    check_exportable(agent)
    _check_path(path, form)
    one = agent.lane(lane).cpu().float()
    metadata = {**_metadata(one, info), "lane": lane, **facts}
    write, read = {"onnx": (_write_onnx, _read_onnx), "torchscript": (_write_torchscript, _read_torchscript)}[form]
    try:
        with replacing(path) as temporary:
            with _quiet(), torch.no_grad(), _explained(one, form):
                program = _program(one)
                write(temporary, program, one, metadata)
                difference, tolerance = compare(one, read(temporary))
            if difference > tolerance:
                raise OffrlError(
                    f"{path}: the exported policy differs from the agent by {difference:.1e}, more than {tolerance:.1e}; "
                    "nothing was written. Export with the versions of constraints.txt."
                )
    except OSError as error:
        raise OffrlError(
            f"{path}: cannot be written ({error.strerror or one_line(error)}); name another file."
        ) from error
    return Exported(path, metadata, difference, tolerance)


def check_exportable(agent: Agent) -> None:
    """Raise OffrlError for a policy whose action is no function of the observation."""
    if not isinstance(agent, RecurrentAgent):
        return
    name = type(agent).__name__
    if agent.uses_history:
        raise OffrlError(
            f"{name}'s action depends on the episode so far, which a file of one graph can't hold; use agent.predict."
        )
    if agent.samples_actions:
        raise OffrlError(
            f"{name} samples its actions, and an exported graph has no random numbers; train it with "
            "agent.sample_actions=false, or use agent.predict."
        )


def _check_path(path: Path, form: str) -> None:
    """Raise OffrlError for a folder, and for a file whose ending is another format's."""
    if path.is_dir() or not path.name:
        raise OffrlError(f"{path} is a folder; name a file in it, such as {path / f'policy{SUFFIXES[form]}'}.")
    if other := next((name for name, suffix in SUFFIXES.items() if name != form and path.suffix == suffix), None):
        raise OffrlError(
            f"{path}: the ending is that of {other}; give --format {other}, or end it in {SUFFIXES[form]}."
        )


def compare(one: Agent, run: Run) -> tuple[float, float]:
    """The largest difference of an exported policy's actions from `predict`'s, and the tolerance.

    The observations are normal with the data's statistics, every tenth far outside. Discrete actions have to be the same where
    float32 and float64 agree in PyTorch.
    """
    rng = np.random.default_rng(0)
    mean = one.obs_mean.double().flatten().numpy()
    std = 1 / one.obs_scale.double().flatten().numpy()
    spread = np.where(np.arange(ROWS)[:, None] % 10 == 0, 100.0, 1.5)
    obs = (mean + spread * std * rng.normal(size=(ROWS, one.spec.obs_dim))).astype(np.float32)
    ours, _ = one.predict(obs, lane=0)
    exact, _ = one.lane(0).double().predict(obs, lane=0)
    theirs = np.concatenate([run(part) for part in (obs[:1], obs[1:8], obs[8:])])  # batches of any size
    if theirs.shape != ours.shape or not np.isfinite(theirs).all():
        return math.inf, 0.0
    if one.spec.discrete:
        return float(((ours != theirs) & (ours == exact)).mean()), 0.0
    half = float(np.min(np.asarray(one.spec.action_high) - np.asarray(one.spec.action_low))) / 2
    return float(np.abs(ours - theirs).max()), max(1e-6 * half, 2 * float(np.abs(ours - exact).max()))


def _metadata(one: Agent, info: DatasetInfo) -> dict[str, Any]:
    spec = one.spec
    return {
        "offrl": version_of("offrl"),
        "agent": type(one).__name__,
        "dataset": info.id,
        "environment": info.env_id,
        "seed": spec.seeds[0],
        "score": None if one.lane_scores is None else one.lane_scores[0],
        "obs_dim": spec.obs_dim,
        "action_dim": spec.action_dim,
        "discrete": spec.discrete,
        **({} if spec.discrete else {"action_low": spec.action_low, "action_high": spec.action_high}),
    }


def _program(one: Agent) -> Any:
    """The policy's graph of PyTorch's operators, with a free number of rows."""
    example = torch.zeros(2, one.spec.obs_dim)
    try:
        rows = torch.export.Dim("n")
        return torch.export.export(Policy(one), (example,), dynamic_shapes=({0: rows},)).run_decompositions({})
    except Exception as error:  # whatever the tracer raises at a user's agent
        raise OffrlError(
            f"{type(one).__name__} can't be exported: its `act` is no fixed graph of tensors ({one_line(error)})."
        ) from error


def _write_onnx(path: Path, program: Any, one: Agent, metadata: dict[str, Any]) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401 - for the check that follows
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise OffrlError(
            f'--format onnx needs a package ({error.name}); install it with `pip install ".[export]"` in the checkout of offrl.'
        ) from error
    exported = torch.onnx.export(
        program, (), dynamo=True, input_names=["obs"], output_names=["action"], verbose=False, optimize=True
    )
    assert exported is not None
    model = exported.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # where in this machine's files each operation came from
    onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata)})
    path.write_bytes(model.SerializeToString())


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda obs: cast(NDArray[Any], session.run(["action"], {"obs": obs})[0])


def _write_torchscript(path: Path, program: Any, one: Agent, metadata: dict[str, Any]) -> None:
    # The policy and not `program`, in which a trace would fix the number of rows.
    traced = torch.jit.trace(Policy(one), (torch.zeros(2, one.spec.obs_dim),))
    traced = torch.jit.freeze(traced.eval())  # constants inside, what is unused left out
    memory = io.BytesIO()  # at a full disk PyTorch's own writer takes the process down
    torch.jit.save(traced, memory, _extra_files={METADATA: json.dumps(metadata)})
    path.write_bytes(memory.getvalue())


def _read_torchscript(path: Path) -> Run:
    module = torch.jit.load(str(path))
    return lambda obs: cast(NDArray[Any], module(torch.from_numpy(obs)).numpy())


@contextmanager
def _explained(one: Agent, form: str) -> Iterator[None]:
    """Any error of the exporters, or of the engine that runs what they wrote, as a sentence."""
    try:
        yield
    except (OffrlError, OSError):
        raise
    except Exception as error:
        other = next(name for name in SUFFIXES if name != form)
        raise OffrlError(
            f"{type(one).__name__} can't be exported as {form} ({type(error).__name__}: {one_line(error)}); "
            f"try --format {other}, or use agent.predict."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notices on packages and on PyTorch's own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
