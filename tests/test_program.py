"""Programs of the kernels against PyTorch's operations, to the bit: shapes, strides, broadcasting, NaNs and signed zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import KERNELS_CC
from torch import Tensor

from offrl.nets import Adam, kernels, make_target, polyak, program
from offrl.nets.tape import Tape

Function = Callable[..., Any]
ODD = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e38]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, each seventh of which is one of those that arithmetic treats apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    flat[::7] = torch.tensor(ODD)[torch.arange(len(flat[::7])) % len(ODD)]
    return x


def played(function: Function, *inputs: Tensor) -> tuple[list[Tensor], Tape]:
    """What a tape of the function gives for inputs that were written after it was recorded, and the tape."""
    tape, places = Tape(), [torch.zeros_like(x, memory_format=torch.preserve_format) for x in inputs]
    with torch.no_grad(), kernels.in_use():
        with tape.recording():
            made = function(*places)
        kernels.join(tape)
    for place, x in zip(places, inputs):
        place.copy_(x)
    tape.play()
    return (list(made) if isinstance(made, tuple) else [made]), tape


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, but for what a NaN carries."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype == torch.bool:
        return torch.equal(a, b)
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


X, Y = numbers(3, 4, 35), numbers(3, 4, 35, seed=1)
CASES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "add": (torch.add, (X, Y)),
    "sub of a row": (torch.sub, (X, Y[:1, :, :1])),
    "mul of columns": (torch.mul, (X, Y[:, :1])),
    "div": (torch.div, (X, Y)),
    "div of a number": (lambda x: 0.3 / x, (X,)),
    "div by a number": (lambda x: x / 0.3, (X,)),
    "rsub": (lambda x: 1 - x, (X,)),
    "scalars": (lambda x: (x + 0.1) * 0.99 - 3, (X,)),
    "a scalar tensor": (lambda x, y: x * y, (X, Y[0, 0, 1])),
    "transposed": (lambda x, y: x.mT + y.mT, (X, Y)),
    "one transposed": (lambda x, y: x[..., :4].mT * y[..., :4], (X, Y)),
    "a part": (lambda x, y: x[:, 1:3, ::2] - y[:, 1:3, ::2], (X, Y)),
    "five axes": (lambda x, y: x.view(3, 2, 2, 5, 7) + y.view(3, 2, 2, 5, 7), (X, Y)),
    "neg, abs, reciprocal": (lambda x: (-x, x.abs(), x.reciprocal()), (X,)),
    "squares": (lambda x: (x.square(), x.pow(1), x**2), (X,)),
    "clamp": (lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0.0), x.clamp(max=-0.25)), (X,)),
    "least and largest": (lambda x, y: (torch.minimum(x, y).abs(), torch.maximum(x, y).abs()), (X, Y)),
    "amin": (lambda x: (x.amin(1).abs(), x.amin(1, keepdim=True).abs(), x.amax(0).abs()), (X,)),
    "comparisons": (lambda x, y: (x >= y, x > 0, x <= y, x < 0.5), (X, Y)),
    "where": (lambda x, y: (torch.where(x > 0, x, y), torch.where(y < 0, 0.7, x)), (X, Y)),
    "a sum of two": (lambda x: (x[:, :2].sum(1), x[:, :1].sum(1), x[0, 0, :1].sum()), (X.abs(),)),
    "cat": (lambda x, y: (torch.cat([x, y], -1), torch.cat([x, y[:1]], 0)), (X, Y)),
    "copies": (lambda x: (x.mT.clone(), x[:, :1].expand(3, 5, 35).contiguous(), x.mT.contiguous()), (X,)),
    "fills": (lambda x: (torch.ones_like(x), torch.zeros_like(x), torch.full_like(x, 2.5), x.new_ones(2, 3)), (X,)),
}


@pytest.mark.parametrize("case", CASES)
def test_programs_give_pytorchs_numbers(compiled: None, case: str) -> None:
    function, inputs = CASES[case]
    mine, tape = played(function, *inputs)
    exact = function(*inputs)
    for a, b in zip(mine, exact if isinstance(exact, tuple) else [exact], strict=True):
        assert same(a, b)
    assert len(tape.calls) == 1  # all of it is one program


@pytest.mark.parametrize("shape", [(5,), (3, 31), (2, 3, 256), (4, 1000), (1, 256, 6), (1, 70_001)])
def test_sums_and_means_of_rows(compiled: None, shape: tuple[int, ...]) -> None:
    """In PyTorch's order, which its source says and the program asks on this machine; else they are calls."""

    def sums(x: Tensor) -> tuple[Tensor, ...]:
        return x.sum(-1), x.mean(-1, keepdim=True), x.sum(), x.mean(), x.flatten(1).mean(1) if x.ndim > 1 else x.mean(0)

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mine, tape = played(sums, x)
    for a, b in zip(mine, sums(x), strict=True):
        assert torch.equal(a, b)
    library = kernels._library()
    assert library is not None
    assert len(tape.calls) == (5 if program.SUM in program._unlike_pytorch(library) else 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("rate", [1e-3, [1e-3, 1e-4], "tensor"])
def test_optimisers_and_moving_averages(compiled: None, rate: Any, weight_decay: float) -> None:
    """Five steps of Adam, whose rate may differ by lane or fall, and a target behind: as a tape plays them and as they are."""
    options = (
        {"lr": 1e-3, "decay": 10}
        if rate == "tensor"
        else {"lr": torch.tensor(rate) if isinstance(rate, list) else rate}
    )
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 2, 7, 35, generator=generator)

    def made() -> tuple[torch.nn.Module, Adam, torch.nn.Module]:
        net = torch.nn.Module()
        net.weight = torch.nn.Parameter(torch.ones(2, 7, 35))
        return net, Adam(net.parameters(), weight_decay=weight_decay, **options), make_target(net)

    (one, adam, slow), (other, recorded, behind) = made(), made()
    tape, gradient = Tape(), torch.zeros(2, 7, 35)
    with kernels.in_use():
        with tape.recording():
            recorded.apply_gradients([gradient])
            polyak(behind, other, 0.05)
        kernels.join(tape)
    other.load_state_dict(one.state_dict())
    behind.load_state_dict(slow.state_dict())
    recorded.load_state_dict(adam.state_dict())
    for given in gradients:
        adam.apply_gradients([given])
        polyak(slow, one, 0.05)
        gradient.copy_(given)
        tape.play()
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(slow.weight, behind.weight)
    library = kernels._library()
    assert library is not None
    assert rate == "tensor" or len(tape.calls) == 1 or program._unlike_pytorch(library) & {program.ADAM, program.LERP}


def test_pytorchs_orders_are_the_sources(compiled: None) -> None:
    """Of the PyTorch that `make` installs, with vectors of eight or sixteen numbers. Another order costs time alone."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or KERNELS_CC.endswith("-march=x86-64"):
        pytest.skip("another kind of vectors")
    library = kernels._library()
    assert library is not None
    assert program._unlike_pytorch(library) == frozenset()


def test_an_optimiser_in_float64_stays_a_call(compiled: None) -> None:
    net = torch.nn.Module()
    net.weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    adam, tape = Adam(net.parameters(), lr=1e-3).double(), Tape()
    with kernels.in_use():
        with tape.recording():
            adam.apply_gradients([torch.full((2, 3), 0.5, dtype=torch.float64)])
        kernels.join(tape)
    before = net.weight.detach().clone()
    tape.play()
    # Adam's second step along the same gradient is as long as the first: lr, up to eps.
    torch.testing.assert_close(before - net.weight.detach(), torch.full_like(before, 1e-3), rtol=1e-6, atol=0)
    assert any(call in [o.call for o in tape.operations] for call in tape.calls)


def test_gradients_of_parts_are_put_back(compiled: None) -> None:
    def gradients(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = (x[:, 1] * y[:, 1]).sum() + (x[..., 3:20] * y[..., 3:20]).sum()
            return torch.autograd.grad(loss, x)[0]

    (mine,), tape = played(gradients, X, Y)
    assert same(mine, gradients(X, Y))
    assert len(tape.calls) < len(tape.operations)


def test_in_place_operations_write_where_they_did(compiled: None) -> None:
    """A counter and a buffer that outlive the update, changed by each playing."""
    count, buffer = torch.zeros(()), torch.ones(3)

    def update(x: Tensor) -> Tensor:
        count.add_(1)
        buffer.mul_(0.5).sub_(x)
        return buffer * count

    (made,), tape = played(update, torch.tensor([1.0, 2.0, 3.0]))
    assert len(tape.calls) == 1
    # Recorded with zeros, then played with the numbers.
    assert count == 2
    assert buffer.tolist() == [0.25 - 1, 0.25 - 2, 0.25 - 3]
    assert made.tolist() == (2 * buffer).tolist()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.double() + 1,
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.sum(0),
        lambda x: x[:, :9].sum(-1),
        lambda x: x**3,
        lambda x: x.exp(),
        lambda x: torch.div(x, 0.5, rounding_mode="floor"),
        lambda x: x.clamp(x * 0, x * 0 + 1),
        lambda x: (x > 0) & (x < 1),
        lambda x: x[:, ::2].long() + 1,
    ],
)
def test_what_has_no_instruction_stays_a_call(compiled: None, function: Function) -> None:
    x = torch.linspace(-2, 2, 64).view(4, 16)
    (mine,), tape = played(function, x)
    assert torch.equal(mine, function(x))
    assert any(call in [o.call for o in tape.operations] for call in tape.calls)


def test_a_program_keeps_the_order_of_operations(compiled: None) -> None:
    """Exponentials, and sums over columns, through PyTorch between its instructions."""

    def update(x: Tensor, y: Tensor) -> Tensor:
        z = (x * y + 1).exp()
        w = (z - z.mean(-1, keepdim=True)).clamp(-1, 1)
        return w.mT.sum(0) / (1 + x[0, 0, :4].square())

    x, y = torch.randn(3, 4, 35), torch.randn(3, 4, 35)
    (mine,), tape = played(update, x, y)
    assert torch.equal(mine, update(x, y))
    assert len(tape.calls) == 5  # a program, exp, a program, the sum, a program


def test_off_the_kernels_a_tape_is_as_it_was() -> None:
    tape = Tape()
    with tape.recording():
        torch.ones(3) * 2
    kernels.join(tape)
    assert tape.calls == [operation.call for operation in tape.operations]
