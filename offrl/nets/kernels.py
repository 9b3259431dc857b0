"""Hand-written kernels for multilayer perceptrons in float32 on a CPU, compiled on first use by the system's compiler.

`kernels.c` computes networks of ReLUs or GELUs (in their tanh form), with or without layer normalisation, and their gradients.
Other activations and dropout stay layer by layer, of which the kernels compute each one's product. `multiply` and `call` lend
the products and the normalisation to networks of another kind (`convolution.py`, `recurrent.py`).

The plain path, and what the numbers are checked against, is `mlp.py`; the two agree up to rounding. Kernels are off unless an
engine switches them on for its updates, or an augmentation for its fits and its samples (`in_use`), so evaluation and all
else compute as they do without them.

Why by hand: of an update's time a CPU spends most in products of some hundred rows and columns. The matrix library behind
PyTorch runs these at half to four fifths of an AMD core's multiply-add rate, and each of bias, activation, normalisation,
mask and sum is another pass over memory and another call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offrl.nets import program, tape
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir, one_at_a_time, replacing

SOURCE = Path(__file__).with_name("kernels.c")
_INCLUDED = [Path(__file__).with_name(name) for name in ("products.h", "rows.h", "recurrent.h", "program.h", "codes.h")]
# No -ffast-math: infinities and NaNs keep their meaning. Roots need set no error code.
FLAGS = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
# The first of these that the compiler knows. Products may be fused into sums, but not where the source asks clang: its plain
# `fast` does not listen, and gcc knows no other. Some clangs have no `native` on ARM, where every processor has vectors.
_CHOICES = (
    ("-march=native", "-ffp-contract=fast-honor-pragmas"),
    ("-march=native", "-ffp-contract=fast"),
    ("-ffp-contract=fast-honor-pragmas",),
)
_NONE = "no C compiler built them (gcc or clang, as cc on the path or named by CC), or others may write to their file"
# The source's functions and what they take.
_N, _P = ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, list[Any]] = {
    "mlp_forward": [_P],
    "mlp_backward": [_P] * 5,
    "run_program": [_P, _N],
    "multiply": [*[_N] * 3, *[_P, _N, _N] * 2, _P, _P],
    "norm_forward": [*[_N] * 3, *[_P] * 5],
    "norm_backward": [*[_N] * 3, *[_P] * 7],
    "gru_forward": [*[_N] * 4, *[_P] * 6],
    "gru_backward": [*[_N] * 4, *[_P] * 8],
    "close_rows": [_P, _P, _N, _N, *[_P] * 4, _N, _P],
}
_MOST_LAYERS, _ROWS = 16, 256  # layers, and rows in a block, as in the source


class _Switch(threading.local):
    on = False
    scratch = torch.empty(0)  # memory for a call, which needs no more once the call is over


_switch = _Switch()


@contextmanager
def in_use() -> Iterator[None]:
    """Compute networks by the kernels while this thread is inside, where `library` has them."""
    before, _switch.on = _switch.on, _library() is not None
    try:
        yield
    finally:
        _switch.on = before


def join(played: tape.Tape) -> None:
    """Let the kernels run what they can of a tape, if they are in use."""
    library = _library() if _switch.on else None
    if library is not None:
        played.calls = program.joined(played.operations, library)


def problem() -> str:
    """Why the kernels can't be used in this process; empty if they can. The first call compiles them, for a second or two."""
    if torch.get_num_threads() != 1:
        return "they run on one thread (threads=1)"
    return "" if _library() else _NONE


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they can't be compiled, or don't compute what they should."""
    try:
        path = _built()
        if not _ours_alone(path):
            return None
        library = ctypes.CDLL(str(path))
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except (OSError, AttributeError, OffrlError, subprocess.SubprocessError):
        return None
    return library if _computes_right(library) else None


def compiler() -> tuple[str, list[str]]:
    """The C compiler that `CC` names, or cc, and its options there, which belong behind ours: `CC="cc -march=x86-64-v3"`.

    Raises:
        OSError: it is not on the path.
    """
    words = (os.environ.get("CC") or "cc").split()
    path = shutil.which(words[0]) if words else None
    if path is None:
        raise OSError("no compiler")
    return path, words[1:]


def _built() -> Path:
    """The compiled file, one for each source, compiler and kind of processor, beside the cached datasets."""
    path_to_cc, own = compiler()
    key = hashlib.sha256(b"".join(file.read_bytes() for file in (SOURCE, *_INCLUDED)))
    for word in (path_to_cc, *FLAGS, *sum(_CHOICES, ()), *own, platform.machine(), _processor()):
        key.update(b"\0" + word.encode())
    path = cache_dir() / "kernels" / f"{key.hexdigest()[:32]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    if not path.exists():
        with one_at_a_time(path.with_suffix(".lock")):
            if not path.exists():
                with replacing(path) as temporary:
                    _compile([path_to_cc, *FLAGS], [*own, str(SOURCE), "-o", str(temporary), "-lm"])
                    temporary.chmod(0o600)
    return path


def _compile(begin: list[str], end: list[str]) -> None:
    """Run the compiler with the first of `_CHOICES` that it takes; raises CalledProcessError if it takes none."""
    for choice in _CHOICES:
        done = subprocess.run([*begin, *choice, *end], capture_output=True, timeout=120)
        if done.returncode == 0:
            return
    done.check_returncode()


def _ours_alone(path: Path) -> bool:
    """Whether nobody else can have written the file: it is code, which runs as soon as it is loaded."""
    if not hasattr(os, "getuid"):
        return True
    facts = [place.lstat() for place in (path, path.parent)]
    return all(fact.st_uid == os.getuid() and not fact.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for fact in facts)


def _processor() -> str:
    """What -march=native depends on: homes are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.split("\t")[0].rstrip(": ") in wanted))


def _computes_right(library: ctypes.CDLL) -> bool:
    """Whether small networks' outputs are those of plain operations: a library for another processor has no second chance."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 7, 5), (1, 40, 5), (1, 40), (1, 3, 40), (1, 3), (1, 40), (1, 40))
    x, w, b, last, end, gain, offset = (torch.randn(shape, generator=generator) for shape in shapes)
    sums, functional = x @ w.mT + b, torch.nn.functional
    smooth = functional.layer_norm(functional.gelu(sums, approximate="tanh"), (40,), gain[0], offset[0], 1e-6)
    for h, norms, kind in ((sums.relu(), (), _RELU), (smooth, (gain, offset), _Kind(gelu=True, norm=_AFTER))):
        call, out, _ = _forward(library, x, (w, b, last, end, *norms), kind, 1)
        assert call
        if not torch.allclose(out, h @ last.mT + end, rtol=1e-4, atol=1e-4):
            return False
    return True


# ---- a product ------------------------------------------------------------------------------------------------------


def apply_to(x: Tensor) -> bool:
    """Whether kernels are on, and apply to a tensor of this kind."""
    return _switch.on and x.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and torch.get_num_threads() == 1


def multiply(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out <- a b + bias, of matrices `[m, k]` and `[k, n]` with any strides; `out` is dense, `bias` `[n]`.

    Only where `apply_to` says yes.
    """
    (m, k), n = a.shape, b.shape[1]
    assert out.is_contiguous()
    assert (len(b), *out.shape) == (k, m, n)
    call("multiply", m, n, k, a, *a.stride(), b, *b.stride(), out, bias, written=(out,))


def call(name: str, *arguments: int | Tensor | None, written: Sequence[Tensor]) -> None:
    """Call one of the kernels' functions: numbers, and tensors by their memory; None is a null pointer."""
    function = getattr(_library(), name)
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    function(*plain)
    tape.note(lambda: function(*plain) if arguments else None, *written)


def address(name: str) -> int:
    """Where one of the functions stands in memory, for code that Numba compiles; 0 where there are no kernels."""
    library = _library()
    return 0 if library is None else ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


# ---- a network ------------------------------------------------------------------------------------------------------

_NO_NORM, _FIRST, _AFTER = range(3)  # as in the source


class _Kind(NamedTuple):
    """What stands between a network's layers."""

    gelu: bool = False  # GELU instead of ReLU
    norm: int = _NO_NORM  # layer normalisation before the ReLU, or after the activation


_RELU = _Kind()


def mlp(
    x: Tensor,
    layers: Sequence[Tensor],
    norms: Sequence[Tensor] = (),
    activation: str = "relu",
    norm_first: bool = False,
) -> Tensor | None:
    """A network of x `[n, batch, in]`, as one node; None: kernels are off or don't apply here.

    Args:
        layers: weight `[n, out, in]` and bias `[n, out]` of each layer in turn; n may be two axes, lanes and members.
        norms: gain and offset `[n, width]` of each hidden layer's normalisation in turn, if there is one.
        activation: of the hidden layers, `relu` or `gelu`; there are no kernels for another.
        norm_first: normalise before a ReLU, not after the activation.
    """
    if not apply_to(x) or x.ndim != 3:
        return None
    parameters, kind = (*layers, *norms), _kind(bool(norms), activation, norm_first)
    step = _distance(parameters)
    if not step or kind is None or len(layers) > 2 * _MOST_LAYERS:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        out: Tensor = _MLP.apply(x, kind, step, *parameters)
        return out
    library = _library()
    assert library is not None
    return _forward(library, x.contiguous(), parameters, kind, step)[1]


def _kind(norm: bool, activation: str, norm_first: bool) -> _Kind | None:
    """None: there are no kernels for it."""
    if activation not in ("relu", "gelu") or (norm_first and activation != "relu"):
        return None
    return _Kind(activation == "gelu", (_FIRST if norm_first else _AFTER) if norm else _NO_NORM)


def _distance(parameters: Sequence[Tensor]) -> int:
    """How many networks apart two networks lie in the parameters' memory: 1, or an ensemble's size for one member of each.

    0: their memory has another order.
    """
    if all(p.is_contiguous() for p in parameters):
        return 1
    steps = {p.stride(0) // p[0].numel() if p[0].is_contiguous() else 0 for p in parameters}
    exact = len(steps) == 1 and all(p.stride(0) % p[0].numel() == 0 for p in parameters)
    return steps.pop() if exact and parameters[0].ndim == 3 else 0


def scratch(numbers: int) -> Tensor:
    """Memory that every call of this thread writes over: it stays in the processor's cache."""
    if _switch.scratch.numel() < numbers:
        _switch.scratch = torch.empty(numbers)
    return _switch.scratch


def _sizes(x: Tensor, parameters: Sequence[Tensor], kind: _Kind) -> list[int]:
    """Widths of x and of what each layer puts out."""
    layers = (len(parameters) + 2) // 4 if kind.norm else len(parameters) // 2
    return [x.shape[-1], *[b.shape[-1] for b in parameters[1 : 2 * layers : 2]]]


def _block(sizes: Sequence[int]) -> int:
    """Numbers that the hidden layers put out for one block of rows."""
    return _ROWS * sum(sizes[1:-1])


def _forward(
    library: ctypes.CDLL, x: Tensor, parameters: Sequence[Tensor], kind: _Kind, step: int, keep: bool = False
) -> tuple[array[int], Tensor, Tensor]:
    """The call's arguments, the output `[n, batch, out]`, and what else it writes, in one piece; x is dense.

    Args:
        parameters: those of the layers, then those of the norms.
        keep: write what a backward pass needs. Otherwise it is the hidden layers' outputs of one block of rows, and the next
            block writes over them.
    """
    n, batch, _ = x.shape
    sizes = _sizes(x, parameters, kind)
    layers = len(sizes) - 1
    numbers = n * batch * sum(sizes[1:-1])
    block = _block(sizes)
    # `hidden`, `unnormed`, `slopes` and `moments` of the source's `Network`; `hidden` alone of one block.
    parts = [numbers, numbers * (kind.norm > 0), numbers * kind.gelu, 2 * n * batch * (layers - 1) * (kind.norm > 0)]
    parts = parts if keep else [block, 0, 0, 0]
    written, out = x.new_empty(sum(parts)) if keep else scratch(block), x.new_empty((n, batch, sizes[-1]))
    kept = [written.data_ptr() + 4 * sum(parts[:i]) if part else 0 for i, part in enumerate(parts)]
    pointers = [x.data_ptr(), int(keep), *kept, out.data_ptr(), *[p.data_ptr() for p in parameters]]
    unused = [0] * (_MOST_LAYERS + 1 - len(sizes))
    # `Network`, whose numbers and pointers all have eight bytes; what it has behind the last one is not read.
    call = array("q", [n, batch, layers, step, *kind, *sizes, *unused, *pointers])
    address = call.buffer_info()[0]
    library.mlp_forward(address)
    used = (call, x, parameters, written, out)
    _note(library.mlp_forward, program.NETWORK, (address,), used, (written, out) if keep else (out,))
    return call, out, written


def _note(
    function: Any, code: int, addresses: Sequence[int | None], used: tuple[Any, ...], written: Sequence[Tensor]
) -> None:
    """Put a pass on the tape that is recorded, if one is; `used` stays as long as the tape may call it."""
    entry = program.of_kernel(code, addresses)
    tape.note(lambda: function(*addresses) if used else None, *written, entry=entry)


class _MLP(torch.autograd.Function):
    """The network as one node, as `mlp._ReluMLP` is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: _Kind, step: int, *parameters: Tensor) -> Tensor:
        library = _library()
        assert library is not None
        x = x.contiguous()
        ctx.call, out, written = _forward(library, x, parameters, kind, step, keep=True)
        ctx.kind = kind
        ctx.save_for_backward(x, written, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        library = _library()
        assert library is not None
        x, written, *parameters = ctx.saved_tensors
        by_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        by_parameters: list[Tensor] = []
        if any(ctx.needs_input_grad[3:]):
            by_parameters = [x.new_empty(p.shape) for p in parameters]
        pointers = array("q", [g.data_ptr() for g in by_parameters])
        grad, by_hidden = grad.contiguous(), scratch(_block(_sizes(x, parameters, ctx.kind)))
        addresses = (
            ctx.call.buffer_info()[0],
            grad.data_ptr(),
            by_hidden.data_ptr(),
            None if by_x is None else by_x.data_ptr(),
            pointers.buffer_info()[0] if pointers else None,
        )
        library.mlp_backward(*addresses)
        used = (ctx.call, x, written, parameters, grad, by_hidden, by_x, by_parameters, pointers)
        _note(library.mlp_backward, program.GRADIENT, addresses, used, by_parameters)
        return by_x, None, None, *(by_parameters if by_parameters else (None for _ in parameters))
