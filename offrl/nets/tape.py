"""A tape of one update's tensor operations, which is played again without Python between them.

An update of small networks spends much of its time on what lies around the arithmetic: the agent's Python, autograd's
bookkeeping, views, allocations. All of that comes out the same for every update of one phase, because an update has no
branch on a value and no shape that depends on data. So it is recorded once: each operation with its tensors, whose memory
stays where it is. Playing the tape runs the operations that write memory, into the same places; views and allocations are
left out. This is what a CUDA graph does, on a CPU. Numbers are the update's own to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], Any]
TensorsT = TypeVar("TensorsT", bound=tuple[Tensor, ...])

_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
# An update's intermediate results all stay. Where they are large, what lies between operations costs little anyway.
_MOST_BYTES = 1 << 29
_REFUSED = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class Operation(NamedTuple):
    """One operation of a tape.

    Attributes:
        call: runs it again, into the same memory.
        func, args, kwargs, out: PyTorch's operator, what it was given and what it gave; None of a call outside PyTorch.
        entry: of a call outside PyTorch, what a program has in its place (`offrl.nets.program`), if anything.
    """

    call: Call
    func: Any = None
    args: Any = ()
    kwargs: Any = None
    out: Any = None
    entry: Any = None


class _Current(threading.local):
    tape: Tape | None = None


_current = _Current()


def note(call: Call, *written: Tensor, entry: Any = None) -> None:
    """Put on the tape that this thread records, if there is one, a call that writes tensors outside PyTorch."""
    if _current.tape is not None:
        _current.tape.add(Operation(call, entry=entry), written)


def outside(compute: Callable[[], TensorsT]) -> TensorsT:
    """What `compute` gives without PyTorch from tensors whose memory stays; a tape has it as one call."""
    tape = _current.tape
    if tape is None:
        return compute()
    tape.paused = True
    found = compute()
    tape.paused = False

    def again() -> None:
        for old, new in zip(found, compute()):
            old.copy_(new)

    note(again, *found)
    return found


class Tape:
    """Operations in the order in which they ran; `play` runs them again.

    Attributes:
        operations: what was recorded.
        calls: what `play` runs: the operations' calls, or fewer that do the same.
        inputs: random numbers of the update by name, shape and type, which whoever plays fills anew.
        problem: what keeps the tape from being played: an operation whose course or shapes depend on values or that draws
            from a generator with a state of its own, or the memory that it holds; empty: nothing does.
    """

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.inputs: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        self.problem = ""
        self.paused = False
        self.bytes = 0

    def add(self, operation: Operation, written: Sequence[Tensor]) -> None:
        """Put an operation on the tape, and the memory that it writes on the account."""
        self.operations.append(operation)
        self.bytes += sum(tensor.nbytes for tensor in written)
        if self.bytes > _MOST_BYTES:
            self.problem = f"more than {_MOST_BYTES >> 20} MiB"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread computes inside, backward passes included."""
        _current.tape = self
        try:
            with _Recorder(self):
                yield
        finally:
            _current.tape = None
        self.calls = [operation.call for operation in self.operations]

    def input(self, name: str, like: Tensor, draw: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Random numbers `draw(name, like)`, in memory of their own that every update reads."""
        key = (name, like.shape, like.dtype)
        if key not in self.inputs:
            self.paused = True  # the draw isn't part of the tape
            self.inputs[key] = draw(name, like).clone()
            self.paused = False
        return self.inputs[key]

    @torch.no_grad()
    def play(self) -> None:
        for call in self.calls:
            call()


class _Recorder(TorchDispatchMode):
    """Puts operations on a tape while they run."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler, for a second, to say that it does not compile this class."""
        return False

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tape, schema = self.tape, func._schema
        if tape.paused or schema.name in _ALLOCATIONS:
            return out
        if any(tag in func.tags for tag in _REFUSED) and not _indexes_by_numbers(func, args):
            tape.problem = schema.name
        if schema.is_mutable:
            tape.add(Operation(lambda: func(*args, **kwargs), func, args, kwargs, out), ())
            return out
        outputs, inputs = tensors_of(out), tensors_of((args, kwargs))
        if not any(_memory(a) == _memory(b) for a in outputs for b in inputs):  # else it is a view
            tape.add(Operation(_again(func, args, kwargs, out, outputs), func, args, kwargs, out), outputs)
        return out


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _indexes_by_numbers(func: Any, args: Any) -> bool:
    """x[i] with integers, whose shape, unlike that of x[mask], is known beforehand."""
    return func is torch.ops.aten.index.Tensor and all(i.dtype != torch.bool for i in tensors_of(args[1]))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> Call:
    """The same operation into the memory of its recorded result."""
    if func is torch.ops.aten._to_copy.default:
        return lambda: out.copy_(args[0])
    variant = _out_variant(func)
    results = (out,) if isinstance(out, Tensor) else out
    if variant is not None and len(outputs) == len(results) and all(isinstance(r, Tensor) for r in results):
        overload, names = variant
        into = dict(zip(names, results))
        return lambda: overload(*args, **kwargs, **into)

    def copy() -> None:
        for old, new in zip(outputs, tensors_of(func(*args, **kwargs))):
            old.copy_(new)

    return copy


def _out_variant(func: Any) -> tuple[Any, list[str]] | None:
    """The overload of an operation that writes into given tensors, and the names of these arguments."""
    packet, own = func.overloadpacket, func._schema.arguments
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        if not written or not all(a.kwarg_only for a in written) or len(written) != len(func._schema.returns):
            continue
        others = [a for a in arguments if a not in written]
        if [(a.name, str(a.type)) for a in others] == [(a.name, str(a.type)) for a in own]:
            return overload, [a.name for a in written]
    return None
