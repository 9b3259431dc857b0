"""Engines: turn "draw a batch, update the agent" into many updates per call.

All engines give the numbers of `Eager`, the reference: random draws depend on the update's number alone, so an engine may draw
for many updates at once. `Native`, `Compiled` and `CudaGraph` may differ from it by rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from offrl.agents.base import Agent, Metrics
from offrl.data.batch import Batch
from offrl.nets import apply_no_compile, kernels
from offrl.nets.take import Take
from offrl.sampling import BatchLoader
from offrl.training.records import ManifestRecord
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json

# Size of a chunk of batches that stays in the processor's cache until it is used.
_CHUNK_BYTES = 1 << 20
_MAX_CHUNK = 64


class Engine(Protocol):
    """Runs updates."""

    def run(self, step: int, updates: int) -> dict[str, Tensor]:
        """Make updates number `step + 1 ... step + updates`; the last value of each metric, `[lanes]`, detached."""

    def invalidate(self) -> None:
        """Take notice that a source of the loader was replaced."""


class Eager:
    """Draws a chunk of batches at once, then updates one by one."""

    def __init__(self, agent: Agent, loader: BatchLoader, precision: str = "float32") -> None:
        self.agent, self.loader, self.precision = agent, loader, precision
        self.device = torch.device(agent.spec.device)
        self.update: Callable[[Batch, int], Metrics] = self._update
        self.chunk = 0

    def run(self, step: int, updates: int) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        end = step + updates
        while step < end:
            count = min(end - step, self.chunk or 1)
            batches = self._draw(step, count)
            self._announce(step + 1, count)
            for i in range(count):
                with _autocast(self.device, self.precision):
                    metrics |= self.update(batches[i], self.agent.phase(step + i))
                self.agent.random.advance()
            step += count
        self.agent.random.look_ahead(end, 0)
        return metrics

    def invalidate(self) -> None:
        """Nothing to do: every draw reads the loader's sources."""

    def _update(self, batch: Batch, phase: int) -> Metrics:
        """One update. Its metrics are detached here, so that agents need not and no graph of gradients is kept."""
        return {name: value.detach() for name, value in self.agent.update(batch, phase).items()}

    def _announce(self, first: int, count: int) -> None:
        self.agent.random.look_ahead(first, count)

    def _draw(self, step: int, count: int) -> Batch:
        steps = torch.arange(step + 1, step + 1 + count, device=self.device)
        batches = self.agent.prepare(self.loader.draw(self.agent.random, steps))
        if not self.chunk:
            size = sum(tensor.nbytes for tensor in vars(batches).values())
            self.chunk = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // size))
        return batches


class Compiled(Eager):
    """`Eager` with the update through `torch.compile`; one graph per phase of the update."""

    def __init__(self, agent: Agent, loader: BatchLoader, precision: str = "float32") -> None:
        super().__init__(agent, loader, precision)
        apply_no_compile()
        self.update = torch.compile(self._update, dynamic=False)

    def _announce(self, first: int, count: int) -> None:
        self.agent.random.look_ahead(first, 0)  # compiled code makes one update's numbers in place

    def run(self, step: int, updates: int) -> dict[str, Tensor]:
        try:
            return super().run(step, updates)
        except Exception as error:
            if "compiler" not in type(error).__name__.lower() and "compiler" not in str(error).lower():
                raise
            raise OffrlError("engine=compile needs a C++ compiler; install gcc or use engine=eager.") from error


class Taped(Eager):
    """`Eager` without Python between an update's operations, which are played from a tape (`offrl.nets.tape`).

    The second update of each phase is recorded. The third is made twice, from the tape and as `Eager` makes it, and if all
    numbers agree to the bit, the tape is played from then on. An update that no tape can hold, because it works outside
    PyTorch for example, is made as by `Eager`.
    """

    def __init__(self, agent: Agent, loader: BatchLoader, precision: str = "float32") -> None:
        super().__init__(agent, loader, precision)
        self.update = self._update_by_tape
        # Our agents are tested on what a tape asks for; another's Python may do what is left out when it is played.
        ours = all(cls.__module__.startswith("offrl.") for m in agent.modules() for cls in _agent_classes(m))
        self.tapes = ours and precision == "float32"
        self.takes: dict[int, Take] = {}
        self.met: set[int] = set()

    def run(self, step: int, updates: int) -> dict[str, Tensor]:
        return {
            name: value.clone() for name, value in super().run(step, updates).items()
        }  # tapes write theirs in place

    def invalidate(self) -> None:
        """Record again: the tapes read what the agent had when they were recorded."""
        self.takes, self.met = {}, set()

    def _update_by_tape(self, batch: Batch, phase: int) -> Metrics:
        if not self.tapes or phase not in self.met:
            self.met.add(phase)
            return self._update(batch, phase)
        if phase not in self.takes:
            self.takes[phase] = Take(self.agent, batch)
        return self.takes[phase].make(batch, partial(self._update, phase=phase))


def _agent_classes(module: torch.nn.Module) -> list[type]:
    return [cls for cls in type(module).__mro__ if issubclass(cls, Agent)]


class Native(Taped):
    """`Taped` with hand-written kernels for networks (`offrl.nets.kernels`), which round differently."""

    def run(self, step: int, updates: int) -> dict[str, Tensor]:
        with kernels.in_use():
            return super().run(step, updates)


class CudaGraph:
    """Captures whole periods of "draw + update" in one CUDA graph and replays it, without launch costs or work of the host.

    This works because an update has no copy to the host, and every random draw reads the update's number from a device
    tensor, which the graph itself advances. Updates that don't fill a whole graph run eagerly, and so do the first ones of
    every phase. When an agent's phases change for good (a training stage is over), another graph is captured.

    Args:
        updates_per_launch: updates in one graph, rounded up to whole periods.
    """

    def __init__(
        self, agent: Agent, loader: BatchLoader, precision: str = "float32", updates_per_launch: int = 16
    ) -> None:
        self.eager = Eager(agent, loader, precision)
        self.agent = agent
        self.size = -(-updates_per_launch // agent.period) * agent.period
        self.graph: torch.cuda.CUDAGraph | None = None
        self.phases: list[int] = []  # phases of the captured updates
        self.met: Counter[int] = Counter()  # number of eager updates of each phase, which fill lazily made buffers
        self.metrics: dict[str, Tensor] = {}

    def run(self, step: int, updates: int) -> dict[str, Tensor]:
        end = step + updates
        metrics: dict[str, Tensor] = {}
        while step < end:
            phases = [self.agent.phase(step + i) for i in range(self.size)]
            eager = self._eager_first(step, phases)
            if eager or end - step < self.size:
                count = min(eager or end - step, end - step)
                metrics |= self.eager.run(step, count)
                self.met.update(self.agent.phase(step + i) for i in range(count))
                step += count
                continue
            if self.graph is None or self.phases != phases:
                self.phases = phases
                self._capture()
            assert self.graph is not None
            self.agent.random.step.fill_(step)
            while end - step >= self.size and phases == self.phases:
                self.graph.replay()
                step += self.size
                phases = [self.agent.phase(step + i) for i in range(self.size)]
            metrics |= {name: value.clone() for name, value in self.metrics.items()}
        return metrics

    def _eager_first(self, step: int, phases: list[int]) -> int:
        """Number of updates to make eagerly: to the start of a period, and two periods more if a phase is new."""
        new = 0 if all(self.met[phase] > 1 for phase in phases) else 2 * self.agent.period
        return -step % self.agent.period + new

    def invalidate(self) -> None:
        """Capture again: the graph reads the datasets of its capture."""
        self.graph, self.met = None, Counter()

    def _capture(self) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.metrics = self._updates()

    def _updates(self) -> dict[str, Tensor]:
        """The captured work: `size` updates that follow update number `agent.random.step`."""
        agent = self.agent
        metrics: dict[str, Tensor] = {}
        # All batches are drawn at once: the cost here is launches of small kernels, and a weighted draw has some twenty.
        steps = agent.random.step + torch.arange(1, self.size + 1, device=self.eager.device)
        batches = agent.prepare(self.eager.loader.draw(agent.random, steps))
        for i in range(self.size):
            agent.random.step.add_(1)
            with _autocast(self.eager.device, self.eager.precision):
                metrics |= self.eager.update(batches[i], self.phases[i])
        return metrics


def in_one_stage(agent: Agent, step: int, updates: int) -> int:
    """So many updates from `step` on, or those whole periods of them that end with the phases of the first.

    What an ended stage has measured is then in no metrics of the next one.
    """
    period = agent.period

    def phases(first: int) -> list[int]:
        return [agent.phase(first + i) for i in range(period)]

    stage = phases(step)
    within, beyond = 1, updates // period  # numbers of periods: the last one of the stage, and one that is not
    if within >= beyond or phases(step + (beyond - 1) * period) == stage:
        return updates
    while beyond - within > 1:
        middle = (within + beyond) // 2
        same = phases(step + (middle - 1) * period) == stage
        within, beyond = (middle, beyond) if same else (within, middle)
    return within * period


def make_engine(
    name: str, agent: Agent, loader: BatchLoader, precision: str = "float32", updates_per_launch: int = 16
) -> Engine:
    """`eager`, `taped`, `native`, `compile`, `cudagraph`, or `auto`.

    `auto` is the graph on a GPU. On a CPU it is native where there are kernels (one thread, float32, a C compiler), else
    taped, which gives eager's numbers. Compiling the update would take a minute, and an update is bound by arithmetic.
    """
    cuda = torch.device(agent.spec.device).type == "cuda"
    if name == "auto":
        name = "cudagraph" if cuda else "taped" if precision != "float32" or kernels.problem() else "native"
    if name == "cudagraph" and not cuda:
        raise OffrlError("engine=cudagraph needs device=cuda; use engine=eager or engine=compile on a CPU.")
    if name == "native" and (cuda or precision != "float32"):
        raise OffrlError("engine=native computes in float32 on a CPU; use engine=auto.")
    if name == "native" and (reason := kernels.problem()):
        raise OffrlError(f"engine=native has no kernels here: {reason}; use engine=auto.")
    if name == "cudagraph":
        return CudaGraph(agent, loader, precision, updates_per_launch)
    engines = {"eager": Eager, "taped": Taped, "native": Native, "compile": Compiled}
    if name not in engines:
        raise OffrlError(f"engine={name} is unknown; choose auto, eager, taped, native, compile or cudagraph.")
    return engines[name](agent, loader, precision)


def noted_engine(engine: Engine, manifest: Path) -> str:
    """An engine's name, for a run's manifest. Where that names another one, whose numbers differ by rounding, say so."""
    names = {Eager: "eager", Taped: "taped", Native: "native", Compiled: "compile", CudaGraph: "cudagraph"}
    name = names.get(type(engine), type(engine).__name__)
    try:
        before = read_json(manifest, ManifestRecord, "restore it").engine or name
    except (FileNotFoundError, OffrlError):  # a damaged one is replaced
        before = name
    if before != name and {before, name} != {"eager", "taped"}:
        text = (
            f"{manifest.parent}: began with engine={before} and goes on with engine={name}, which rounds differently."
        )
        print(text, file=sys.stderr, flush=True)
    return name


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bfloat16 if `precision` says so; parameters, targets and optimisers stay float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    if precision != "bfloat16":
        raise OffrlError(f"precision={precision} is unknown; choose float32 or bfloat16.")
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
