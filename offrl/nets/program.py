"""Programs: stretches of a tape that the kernels run by one call.

Between the networks of an update stand some dozens of small operations: a clipped sum, a mask, a mean. Through PyTorch each
costs 5 to 50 microseconds, of which its numbers take less than one. Those that compute each number by a single operation
become instructions for `program.h`, which gives PyTorch's numbers to the bit; a tape compares them before it is played. So
do sums of rows, moving averages and Adam, where PyTorch on this machine computes them in the order that the source has. All
others (exponentials, sums of columns) stay calls of PyTorch, between the programs.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offrl.nets.tape import Call, Operation

# As in the source.
COPY, ADD, SUB, MUL, DIV, MINIMUM, MAXIMUM, ABS, GE, GT, LE, LT, WHERE, LERP, SUM, ADAM, NETWORK, GRADIENT = range(18)
_AXES, _POINTERS = 4, 5
_MOST_TERMS = 16  # of a minimum that is taken one after the other

Operand = Tensor | float


class Instruction(NamedTuple):
    """Numbers of the source's `Instruction`, and the tensors whose memory it names."""

    numbers: list[int]
    tensors: tuple[Tensor, ...] = ()


def of_kernel(code: int, addresses: Sequence[int | None]) -> Instruction:
    """A network's pass, `NETWORK` or `GRADIENT`, with its arguments; None: a null pointer."""
    pointers = [address or 0 for address in addresses]
    return Instruction([code, *[0] * (5 * _AXES), *pointers, *[0] * (_POINTERS - len(pointers))])


def joined(operations: Sequence[Operation], library: ctypes.CDLL) -> list[Call]:
    """The operations' calls, where every stretch of those that have instructions is one."""
    calls: list[Call] = []
    unlike = _unlike_pytorch(library)
    pairs = [(operation, instructions_of(operation, unlike)) for operation in operations]
    for known, stretch in groupby(pairs, lambda pair: pair[1] is not None):
        if known:
            calls.append(_program([i for _, found in stretch for i in found or ()], [o for o, _ in stretch], library))
        else:
            calls += [operation.call for operation, _ in stretch]
    return calls


def _program(instructions: list[Instruction], operations: list[Operation], library: ctypes.CDLL) -> Call:
    numbers = array("q", [number for instruction in instructions for number in instruction.numbers])
    address, count = numbers.buffer_info()[0], len(instructions)
    kept = (numbers, instructions, operations)  # as long as the program may run
    return lambda: library.run_program(address, count) if kept else None


@cache
def _unlike_pytorch(library: ctypes.CDLL) -> frozenset[int]:
    """Instructions that PyTorch computes in another order on this machine, as with other vectors or another compiler."""
    generator = torch.Generator().manual_seed(0)
    unlike = set()
    for n in (3, 6, 31, 256, 1536, 5000, 70_001):
        rows = torch.randn(3, n, generator=generator)
        for code, compute in ((SUM, _summed), (LERP, _averaged), (ADAM, _stepped)):
            pairs = compute(rows, lambda *found: _program(list(found), [], library)())
            if not all(torch.equal(mine, theirs) for mine, theirs in pairs):
                unlike.add(code)
    return frozenset(unlike)


Run = Callable[..., Any]
Pairs = list[tuple[Tensor, Tensor]]


def _summed(rows: Tensor, run: Run) -> Pairs:
    out = torch.empty(3)
    run(_row_sums(out, rows))
    return [(out, rows.sum(-1))]


def _averaged(rows: Tensor, run: Run) -> Pairs:
    mine, theirs = rows[0].clone(), [rows[0].clone()]
    run(*_moved(None, [mine], [rows[1]], 0.005))
    torch._foreach_lerp_(theirs, [rows[1]], 0.005)
    return [(mine, theirs[0])]


def _stepped(rows: Tensor, run: Run) -> Pairs:
    options: Any = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    options |= {"amsgrad": False, "maximize": False}
    found = []
    for step in (lambda *given: run(*_adamw(None, *given, **options)), partial(torch._fused_adamw_, **options)):
        parameter, mean, square = rows[0].clone(), rows[2].clone(), rows[0].square()
        step([parameter], [rows[1]], [mean], [square], [], [torch.tensor(7.0)])
        found.append((parameter, mean, square))
    return list(zip(*found))


def instructions_of(operation: Operation, unlike: frozenset[int] = frozenset()) -> list[Instruction] | None:
    """What a program has in an operation's place; None: it stays a call.

    Args:
        unlike: codes that PyTorch computes in another way.
    """
    if operation.entry is not None:
        return [operation.entry]
    if operation.func is None:
        return None
    name = operation.func._schema.name.removeprefix("aten::")
    in_place = operation.func._schema.is_mutable
    find = _KNOWN.get(name.removesuffix("_") if in_place else name)
    out = operation.args[0] if in_place else operation.out
    # An operation into given memory (out=) is none of the agents'.
    if find is None or not isinstance(out, Tensor | list) or in_place != name.endswith("_"):
        return None
    try:
        found = find(out, *operation.args, **operation.kwargs)
    except (_Other, TypeError):  # an argument that the instruction does not know
        return None
    return None if any(instruction.numbers[0] in unlike for instruction in found) else found


class _Other(Exception):
    """The operation has no instruction: another type, more axes, an option."""


# ---- one instruction ------------------------------------------------------------------------------------------------


def _instruction(code: int, out: Tensor, x: Operand, y: Operand = 0.0, third: Tensor | None = None) -> Instruction:
    """out <- x op y, broadcast to its shape.

    Args:
        third: the condition of `WHERE`, the weight of `LERP`.
    """
    operands = [out, *(v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float32) for v in (x, y))]
    types = [torch.bool if GE <= code <= LT else torch.float32, torch.float32, torch.float32]
    if third is not None:
        operands, types = [*operands, third], [*types, torch.bool if code == WHERE else torch.float32]
    if any(t.dtype != wanted or not t.is_cpu for t, wanted in zip(operands, types)):
        raise _Other
    try:
        views = [operand.expand(out.shape) for operand in operands]
    except RuntimeError as error:  # the result has another shape: it was broadcast, too
        raise _Other from error
    sizes, strides = _few_axes(out.shape, [view.stride() for view in views])
    strides += [[0] * _AXES] * (4 - len(strides))
    pointers = [operand.data_ptr() for operand in operands]
    numbers = [code, *sizes, *(n for axes in strides for n in axes), *pointers, *[0] * (_POINTERS - len(pointers))]
    return Instruction(numbers, tuple(operands))


def _few_axes(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Sizes and strides of four axes: those of one number are left out, and those that run on in every tensor are one."""
    axes: list[tuple[int, list[int]]] = []
    for size, steps in zip(shape, zip(*strides)):
        if size == 1:
            continue
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], steps)):
            axes[-1] = (axes[-1][0] * size, list(steps))
        else:
            axes.append((size, list(steps)))
    if len(axes) > _AXES:
        raise _Other
    axes = [(1, [0] * len(strides))] * (_AXES - len(axes)) + axes
    return [size for size, _ in axes], [[steps[t] for _, steps in axes] for t in range(len(strides))]


# ---- PyTorch's operations ---------------------------------------------------------------------------------------------

Find = Callable[..., list[Instruction]]


def _binary(code: int) -> Find:
    def find(out: Tensor, x: Operand, y: Operand, alpha: float = 1) -> list[Instruction]:
        if alpha != 1:
            raise _Other
        return [_instruction(code, out, x, y)]

    return find


def _subtracted_from(out: Tensor, x: Operand, y: Operand, alpha: float = 1) -> list[Instruction]:
    return _binary(SUB)(out, y, x, alpha)


def _copy(out: Tensor, *args: Any, memory_format: Any = None) -> list[Instruction]:
    """clone(x) or out.copy_(x)."""
    return [_instruction(COPY, out, args[1] if len(args) > 1 else args[0])]


def _converted(out: Tensor, x: Tensor, **options: Any) -> list[Instruction]:
    return [_instruction(COPY, out, x)]


def _joined_along(out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> list[Instruction]:
    parts = [part for part in parts if part.shape != (0,)]  # PyTorch takes an empty vector for nothing
    ends = torch.tensor([part.shape[dim] for part in parts]).cumsum(0).tolist()
    return [
        _instruction(COPY, out.narrow(dim, end - part.shape[dim], part.shape[dim]), part)
        for part, end in zip(parts, ends)
    ]


def _filled(value: float) -> Find:
    return lambda out, *args, **options: [_instruction(COPY, out, value)]


def _filled_by(place: int) -> Find:
    return lambda out, *args, **options: [_instruction(COPY, out, args[place])]


def _clamp(out: Tensor, x: Tensor, low: float | None = None, high: float | None = None) -> list[Instruction]:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise _Other
    lower = _instruction(MAXIMUM, out, x, -inf if low is None else low)
    return [lower] if high is None else [lower, _instruction(MINIMUM, out, out, high)]


def _power(out: Tensor, x: Tensor, exponent: Operand) -> list[Instruction]:
    if isinstance(exponent, Tensor) or exponent not in (1, 2):
        raise _Other
    return [_instruction(COPY, out, x) if exponent == 1 else _instruction(MUL, out, x, x)]


def _extreme(code: int) -> Find:
    def find(out: Tensor, x: Tensor, dims: Sequence[int] = (), keepdim: bool = False) -> list[Instruction]:
        return _one_by_one(code, out, x, dims, keepdim, _MOST_TERMS)

    return find


def _sum(out: Tensor, x: Tensor, dims: Sequence[int] | None = (), keepdim: bool = False) -> list[Instruction]:
    """Of two numbers, or of all numbers of dense rows."""
    try:
        return _one_by_one(ADD, out, x, dims or (), keepdim, 2)
    except _Other:
        axes = sorted(dim % x.ndim for dim in dims or range(x.ndim))
        if axes != list(range(x.ndim - len(axes), x.ndim)):
            raise
        return [_row_sums(out, x.flatten(x.ndim - len(axes)) if x.is_contiguous() else x)]


def _mean(out: Tensor, x: Tensor, dims: Sequence[int] | None = (), keepdim: bool = False) -> list[Instruction]:
    return [*_sum(out, x, dims, keepdim), _instruction(DIV, out, out, float(x.numel() // out.numel()))]


def _row_sums(out: Tensor, x: Tensor) -> Instruction:
    """out[...] <- the sum of x[..., :], both dense."""
    if not (out.is_contiguous() and x.is_contiguous() and out.dtype == x.dtype == torch.float32 and out.is_cpu):
        raise _Other
    sizes = [1, 1, out.numel(), x.numel() // out.numel()]
    pointers = [out.data_ptr(), x.data_ptr(), 0, 0, 0]
    return Instruction([SUM, *sizes, *[0] * (4 * _AXES), *pointers], (out, x))


def _one_by_one(code: int, out: Tensor, x: Tensor, dims: Sequence[int], keepdim: bool, most: int) -> list[Instruction]:
    """A reduction of a few numbers, one instruction for each."""
    reduced = sorted({dim % x.ndim for dim in dims} or set(range(x.ndim)))
    terms = prod(x.shape[dim] for dim in reduced)
    if not 0 < terms <= most or sum(x.shape[dim] > 1 for dim in reduced) > 1:
        raise _Other
    long = next((dim for dim in reduced if x.shape[dim] > 1), None)
    first, *others = [x] if long is None else [x.narrow(long, i, 1) for i in range(terms)]
    shape = [1 if dim in reduced else size for dim, size in enumerate(x.shape)]
    out = out.view(shape) if x.ndim else out
    return [_instruction(COPY, out, first), *[_instruction(code, out, out, other) for other in others]]


def _where(out: Tensor, condition: Tensor, x: Operand, y: Operand) -> list[Instruction]:
    return [_instruction(WHERE, out, x, y, condition)]


def _selected_back(out: Tensor, grad: Tensor, sizes: Any, dim: int, index: int) -> list[Instruction]:
    return [_instruction(COPY, out, 0.0), _instruction(COPY, out.select(dim, index), grad)]


def _sliced_back(out: Tensor, grad: Tensor, sizes: Any, dim: int, start: int, end: int, step: int) -> list[Instruction]:
    length = out.shape[dim]
    kept = out.transpose(dim, 0)[slice(start, min(end, length), step)].transpose(dim, 0)
    return [_instruction(COPY, out, 0.0), _instruction(COPY, kept, grad)]


def _moved(out: Any, targets: list[Tensor], ends: list[Tensor], weight: float) -> list[Instruction]:
    """target <- target + weight (end - target), each; PyTorch turns the formula round for other weights."""
    if not isinstance(weight, float) or not 0 <= weight < 0.5:
        raise _Other
    return [_instruction(LERP, target, target, end, torch.tensor(weight)) for target, end in zip(targets, ends)]


def _adamw(
    out: Any, parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor],
    largest: list[Tensor], counts: list[Tensor], *, lr: Operand, beta1: float, beta2: float, weight_decay: float, eps: float,
    amsgrad: bool, maximize: bool,
) -> list[Instruction]:  # fmt: skip
    if amsgrad or maximize or beta1 <= 0.5:
        raise _Other
    rate = lr if isinstance(lr, Tensor) else None
    settings = array("d", [0.0 if isinstance(lr, Tensor) else lr, beta1, beta2, weight_decay, eps])
    found = []
    for tensors in zip(parameters, gradients, means, squares, counts):
        each = [*tensors, *([] if rate is None else [rate])]
        if any(t.dtype != torch.float32 or not t.is_cpu or not t.is_contiguous() for t in each):
            raise _Other
        place = 0 if rate is None else rate.data_ptr()
        numbers = [ADAM, tensors[0].numel(), *array("q", settings.tobytes()), place, *[0] * 13]
        found.append(Instruction([*numbers, *[t.data_ptr() for t in tensors]], tuple(each)))
    return found


_KNOWN: dict[str, Find] = {
    "add": _binary(ADD),
    "sub": _binary(SUB),
    "rsub": _subtracted_from,
    "mul": _binary(MUL),
    "div": _binary(DIV),
    "minimum": _binary(MINIMUM),
    "maximum": _binary(MAXIMUM),
    "ge": _binary(GE),
    "gt": _binary(GT),
    "le": _binary(LE),
    "lt": _binary(LT),
    "neg": lambda out, x: [_instruction(MUL, out, x, -1.0)],
    "reciprocal": lambda out, x: [_instruction(DIV, out, 1.0, x)],
    "abs": lambda out, x: [_instruction(ABS, out, x)],
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "amin": _extreme(MINIMUM),
    "amax": _extreme(MAXIMUM),
    "_foreach_lerp": _moved,
    "_fused_adamw": _adamw,
    "sum": _sum,
    "mean": _mean,
    "where": _where,
    "clone": _copy,
    "copy": _copy,
    "_to_copy": _converted,
    "cat": _joined_along,
    "zeros": _filled(0.0),
    "zeros_like": _filled(0.0),
    "new_zeros": _filled(0.0),
    "zero": _filled(0.0),
    "ones": _filled(1.0),
    "ones_like": _filled(1.0),
    "new_ones": _filled(1.0),
    "full_like": _filled_by(1),
    "full": _filled_by(1),
    "fill": _filled_by(1),
    "scalar_tensor": _filled_by(0),
    "select_backward": _selected_back,
    "slice_backward": _sliced_back,
}
