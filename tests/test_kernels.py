"""Hand-written kernels against float64, and what keeps them off."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_toy, tiny
from test_nets import SHAPES, random_net, relu_mlp_reference
from torch import Tensor

from offrl.agents.base import Agent, Spec
from offrl.agents.fql import FQL
from offrl.agents.ifql import IFQL
from offrl.agents.rebrac import ReBRAC
from offrl.agents.rlpd import RLPD
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.nets import MLP, Critics, kernels
from offrl.nets.tape import Tape
from offrl.nets.transformer import Block
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager, Native, Taped, make_engine
from offrl.utils.errors import OffrlError

# Blocks of 256 terms and 264 rows, and tiles of 12 x 32, 6 x 16 or 6 x 8, are crossed by one, met, and not filled.
SHAPES = [*SHAPES, (1, 265, (257, 33, 1)), (1, 264, (256, 32, 6)), (2, 513, (23, 31, 1)), (1, 11, (300, 17, 300))]
# Rows that fill no vector, widths of one vector and a tile, a batch of one, more than one block, no hidden layer.
FEW_SHAPES = [(1, 1, (3, 8, 1)), (2, 5, (3, 17, 9, 1)), (1, 265, (257, 33, 70, 6)), (2, 6, (4, 64, 3)), (2, 6, (4, 3))]
FEW_SHAPES += [(2, 513, (5, 23, 12, 2))]  # three blocks of two networks
KINDS: list[dict[str, Any]] = [
    {"activation": "gelu"},
    {"norm": True},
    {"norm": True, "norm_first": True},
    {"norm": True, "activation": "gelu"},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
RTOL = 1e-5  # some hundred float32 roundings of 6e-8 in a sum, relative to the largest number


def assert_near(mine: Tensor, exact: Tensor) -> None:
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), exact, rtol=0, atol=RTOL * exact.abs().max().item())


def net32(n: int, batch: int, sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """A random network in float32, and the same numbers in float64; weights are of a usual size."""
    x, parameters = random_net(n, batch, sizes)
    parameters = [p / p.shape[-1] ** 0.5 if p.ndim == 3 else p for p in parameters]
    small = [t.detach().float().requires_grad_() for t in (x, *parameters)]
    exact = [t.detach().double().requires_grad_() for t in small]
    return small[0], small[1:], exact[0], exact[1:]


@pytest.mark.parametrize(("n", "batch", "sizes"), SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64(compiled: None, n: int, batch: int, sizes: tuple[int, ...]) -> None:
    x, parameters, x64, exact = net32(n, batch, sizes)
    with kernels.in_use():
        out = kernels.mlp(x, parameters)
        assert out is not None
        with torch.no_grad():
            torch.testing.assert_close(kernels.mlp(x, parameters), out, rtol=0, atol=0)
    expected = relu_mlp_reference(x64, exact)
    assert_near(out.detach(), expected.detach())
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(out, [x, *parameters], direction)
    for gradient, right in zip(mine, torch.autograd.grad(expected, [x64, *exact], direction.double())):
        assert_near(gradient, right)


def smooth(x: Tensor) -> Tensor:
    """GELU in its tanh form; 1 + tanh u is written as 2 / (1 + e^-2u), whose digits don't cancel."""
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def normalised(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return gain.unsqueeze(1) * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + offset.unsqueeze(1)


def reference(
    x: Tensor,
    layers: list[Tensor],
    norms: list[Tensor],
    norm: bool = False,
    norm_first: bool = False,
    activation: str = "relu",
) -> Tensor:
    """What a network of this kind computes, in plain operations."""
    for i in range(0, len(layers), 2):
        x = x @ layers[i].mT + layers[i + 1].unsqueeze(1)
        if i == len(layers) - 2:
            break
        if norm_first:
            x = normalised(x, *norms[i : i + 2])
        x = smooth(x) if activation == "gelu" else x.relu()
        if norm and not norm_first:
            x = normalised(x, *norms[i : i + 2])
    return x


def norms32(n: int, sizes: tuple[int, ...], kind: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Gains of either sign and offsets, in float32 and the same in float64."""
    generator = torch.Generator().manual_seed(2)
    widths = [w for w in sizes[1:-1] for _ in range(2)] if "norm" in kind else []
    small = [torch.randn(n, width, generator=generator).requires_grad_() for width in widths]
    return small, [p.detach().double().requires_grad_() for p in small]


def options_of(kind: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `kernels.mlp`, which sees a norm by its parameters."""
    return {key: value for key, value in kind.items() if key != "norm"}


@kinds
@pytest.mark.parametrize(("n", "batch", "sizes"), FEW_SHAPES, ids=str)
def test_activations_and_norms_between_layers(
    compiled: None, kind: dict[str, Any], n: int, batch: int, sizes: tuple[int, ...]
) -> None:
    """Values and the gradients of x, weights, biases, gains and offsets, against plain operations in float64."""
    x, layers, x64, layers64 = net32(n, batch, sizes)
    norms, norms64 = norms32(n, sizes, kind)
    with kernels.in_use():
        out = kernels.mlp(x, layers, norms, **options_of(kind))
        assert out is not None
        with torch.no_grad():
            torch.testing.assert_close(kernels.mlp(x, layers, norms, **options_of(kind)), out, rtol=0, atol=0)
    expected = reference(x64, layers64, norms64, **kind)
    assert_near(out.detach(), expected.detach())
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(out, [x, *layers, *norms], direction)
    right = torch.autograd.grad(expected, [x64, *layers64, *norms64], direction.double())
    for gradient, exact in zip(mine, right):
        assert_near(gradient, exact)


def test_gelu_is_accurate_over_the_whole_range(compiled: None) -> None:
    """Through layers of one unit with weight 1, which change no number.

    A rounding is 2^-24 of the number. The value has some five, each of the order of |x| at most; the derivative, which lies
    between -0.13 and 1.13, as many.
    """
    sizes = torch.logspace(-37, 38.5, 5000, dtype=torch.float64)
    x = torch.cat([torch.linspace(-12, 12, 40001, dtype=torch.float64), sizes, -sizes]).float().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out, slope = _gelu(x)
    expected = smooth(x64)
    assert ((out - expected).abs() <= 5 * 2**-24 * x64.abs()).all()
    (slope64,) = torch.autograd.grad(expected.sum(), x64)
    assert ((slope - slope64).abs() <= 5 * 2**-24).all()


def test_gelu_of_infinities_and_nan(compiled: None) -> None:
    """As PyTorch's, which has a NaN at minus infinity; the derivatives are the limits."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]).requires_grad_()
    out, slope = _gelu(x)
    plain = torch.nn.functional.gelu(x, approximate="tanh").detach()
    torch.testing.assert_close(out, plain, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(slope, torch.tensor([1, 0, torch.nan, 0.5]), rtol=0, atol=0, equal_nan=True)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of numbers `[n]` and its derivatives."""
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    with kernels.in_use():
        out = kernels.mlp(x.view(1, -1, 1), [one, zero, one, zero], activation="gelu")
    assert out is not None
    return out.detach().flatten(), torch.autograd.grad(out.sum(), x)[0]


@pytest.mark.parametrize("kind", [{}, *KINDS], ids=str)
def test_one_member_of_each_lanes_ensemble_is_read_where_it_lies(compiled: None, kind: dict[str, Any]) -> None:
    critics = Critics((0, 1, 2), 5, 2, (40, 40), members=2, **kind)
    for p in critics.mlp.norms:
        p.data += torch.linspace(-0.5, 0.5, p.numel()).view(p.shape)  # of its own for each lane and member
    obs, action = torch.randn(3, 9, 5), torch.randn(3, 9, 2, requires_grad=True)
    results = []
    for switch in (False, True):
        q = _q(critics, obs, action, switch)
        results.append((q, *torch.autograd.grad(q.sum(), action)))
    assert not torch.equal(results[0][0], results[1][0])  # they round differently, so the kernels did run
    for plain, mine in zip(*results):
        assert_near(mine.detach(), plain.detach().double())


def _q(critics: Critics, obs: Tensor, action: Tensor, by_kernels: bool) -> Tensor:
    if not by_kernels:
        return critics(obs, action, member=1, frozen=True)
    with kernels.in_use():
        return critics(obs, action, member=1, frozen=True)


@kinds
def test_an_ensemble_is_one_node_with_the_plain_paths_gradients(compiled: None, kind: dict[str, Any]) -> None:
    mlp, exact = (MLP((0, 1), [5, 20, 33, 2], members=3, **kind).to(dtype) for dtype in (torch.float32, torch.float64))
    exact.load_state_dict(mlp.state_dict())
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    with kernels.in_use():
        out = mlp(x)
    assert out.grad_fn is not None
    assert "_MLP" in str(out.grad_fn.next_functions[0][0])  # behind the view by members
    expected = exact(x.double())
    assert_near(out.detach(), expected.detach())
    mine = torch.autograd.grad(out.square().sum(), list(mlp.parameters()))
    for gradient, right in zip(mine, torch.autograd.grad(expected.square().sum(), list(exact.parameters()))):
        assert_near(gradient, right)


@pytest.mark.parametrize("kind", [{}, *KINDS], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(compiled: None, kind: dict[str, Any]) -> None:
    sizes = (20, 70, 70, 3)
    (x, layers, *_), (norms, _) = net32(1, 300, sizes), norms32(1, sizes, kind)
    with kernels.in_use(), torch.no_grad():
        together = kernels.mlp(x, layers, norms, **options_of(kind))
        assert together is not None
        for rows in (1, 2, 3, 5, 13):
            part = x[:, :rows].contiguous()
            assert torch.equal(kernels.mlp(part, layers, norms, **options_of(kind)), together[:, :rows])


@pytest.mark.parametrize("kind", [{}, *KINDS], ids=str)
def test_a_nan_is_not_hidden(compiled: None, kind: dict[str, Any]) -> None:
    (x, parameters, *_), (norms, _) = net32(1, 8, (3, 20, 1)), norms32(1, (3, 20, 1), kind)
    x = x.detach().clone()
    x[0, 4, 1] = torch.nan
    with kernels.in_use(), torch.no_grad():
        out = kernels.mlp(x, parameters, norms, **options_of(kind))
    assert out is not None
    assert out[0, :, 0].isnan().tolist() == [row == 4 for row in range(8)]


def test_kernels_are_off_unless_switched_on_and_for_what_they_do_not_cover(compiled: None) -> None:
    x, parameters, x64, exact = net32(1, 4, (3, 8, 1))
    assert kernels.mlp(x, parameters) is None
    with kernels.in_use():
        assert kernels.mlp(x64, exact) is None
        assert kernels.mlp(x, parameters, activation="mish") is None
        assert kernels.mlp(x, parameters, activation="gelu", norm_first=True) is None
        assert kernels.mlp(x, [p.transpose(-1, -2).contiguous().transpose(-1, -2) for p in parameters]) is None
    assert kernels.mlp(x, parameters) is None


@pytest.mark.parametrize(
    ("unknown", "last"),
    [
        ("nothing", "-march=native -ffp-contract=fast-honor-pragmas"),
        ("*-honor-pragmas*", "-march=native -ffp-contract=fast"),
        ("*-march=native*", "-ffp-contract=fast-honor-pragmas"),
        ("*", None),
    ],
)
def test_a_compiler_gets_options_that_it_knows(tmp_path: Path, unknown: str, last: str | None) -> None:
    """What a compiler refuses here, gcc, or a clang on ARM refuses; where none is left the error is the compiler's."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in {unknown}) exit 1;; esac\n')
    compiler.chmod(0o700)
    if last is None:
        with pytest.raises(subprocess.CalledProcessError):
            kernels._compile([str(compiler), "-O3"], ["-own"])
    else:
        kernels._compile([str(compiler), "-O3"], ["-own"])
        assert log.read_text().splitlines()[-1] == f"-O3 {last} -own"


# ---- engines --------------------------------------------------------------------------------------------------


def made(seeds: tuple[int, ...] = (0, 1), **settings: Any) -> tuple[TD3BC, BatchLoader]:
    store = make_toy(2048)
    spec = Spec(store.obs_dim, store.action_dim, seeds, *store.observation_statistics())
    agent = TD3BC(spec, TD3BCConfig(**{"hidden": (32, 32), **settings}))
    return agent, BatchLoader([(store, Uniform(store), 1.0)], 32)


def test_the_native_engine_trains_as_eager_does(compiled: None) -> None:
    """Roundings of 1e-7 grow in eight updates to far less than Adam's steps of 3e-4."""
    (one, rows), (other, _) = made(), made()
    metrics, others = Eager(one, rows).run(0, 8), make_engine("native", other, rows).run(0, 8)
    for name, value in metrics.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)
    distances = [(a - b).abs().max() for a, b in zip(one.state_dict().values(), other.state_dict().values())]
    assert 0 < max(distances) < 3e-5


# Layer normalisation after ReLUs; GELU without and with it; normalisation before ReLUs, and a phase of two.
@pytest.mark.parametrize("cls", [ReBRAC, FQL, IFQL, RLPD], ids=lambda cls: cls.__name__)
def test_the_tape_replays_the_kernels_to_the_bit(compiled: None, cls: Any) -> None:
    store = make_toy(512)

    def made() -> tuple[Agent, BatchLoader]:
        agent = cls(Spec(store.obs_dim, store.action_dim, (0, 1)), cls.Config(**tiny(cls, 24)))
        agent.setup(store)
        return agent, BatchLoader([(store, Uniform(store), 1.0)], 16, agent.window, agent.batch_fields)

    (one, rows), (other, _) = made(), made()
    with kernels.in_use():
        Eager(one, rows).run(0, 4 * one.period)
    native = Native(other, rows)
    native.run(0, 4 * other.period)
    assert [take.faithful for take in native.takes.values()] == [True] * other.period
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_native_runs_repeat_and_continue_to_the_bit(compiled: None) -> None:
    """However the updates are cut, and with an engine made anew on the way, as after a resume."""
    (one, rows), (other, _) = made(), made()
    Native(one, rows).run(0, 30)
    Native(other, rows).run(0, 7)
    fresh, _ = made()
    fresh.load_state_dict(other.state_dict())
    engine = Native(fresh, rows)
    engine.run(7, 5)
    engine.run(12, 18)
    assert [take.faithful for take in engine.takes.values()] == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), fresh.state_dict().values()))


def test_lanes_do_not_change_each_other(compiled: None) -> None:
    (together, rows), (alone, _) = made(seeds=(3, 4)), made(seeds=(4,))
    Native(together, rows).run(0, 10)
    Native(alone, rows).run(0, 10)
    assert torch.equal(together.critics.mlp.weights[1][1], alone.critics.mlp.weights[1][0])


def test_a_block_of_the_transformer(compiled: None) -> None:
    """Its outputs and gradients by the kernels, which have its projections and its layers, beside float64."""
    block = Block((0, 1), 16, 2, "block")
    x, visible = torch.randn(2, 3, 6, 16, requires_grad=True), torch.ones(6, 6).tril().bool()
    exact, x64 = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
    with kernels.in_use():
        tape = Tape()
        with tape.recording():
            out = block(x, visible, slice(None), None)
            gradients = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    assert len([o for o in tape.operations if o.entry is not None]) == 8  # query, key and value, mix, MLP: and back
    wanted = exact(x64, visible, slice(None), None)
    assert_near(out.detach(), wanted.detach())
    for mine, other in zip(
        gradients, torch.autograd.grad(wanted.square().sum(), [x64, *exact.parameters()]), strict=True
    ):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-4 * other.abs().max().item())  # float32's sums


def test_without_a_compiler_the_numbers_are_eagers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    kernels._library.cache_clear()
    agent, rows = made()
    assert type(make_engine("auto", agent, rows)) is Taped
    with pytest.raises(
        OffrlError, match=r"engine=native has no kernels here: no C compiler built them .*; use engine=auto"
    ):
        make_engine("native", agent, rows)
    with kernels.in_use():
        assert kernels.mlp(torch.ones(1, 2, 3), [torch.ones(1, 1, 3), torch.ones(1, 1)]) is None


def test_the_compiled_file_is_made_once_and_beside_the_other_caches(compiled: None) -> None:
    path = kernels._built()  # in the session's own folder
    made_at = path.stat().st_mtime_ns
    assert path.parent == Path(os.environ["OFFRL_HOME"]) / "kernels"
    assert kernels._built() == path
    assert path.stat().st_mtime_ns == made_at


def test_a_file_that_others_may_write_is_not_loaded(compiled: None) -> None:
    """It is code. A usual mask of a group that may write does not matter, since the file is made for its owner alone."""
    path = kernels._built()
    assert kernels._ours_alone(path)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o620)
    assert kernels._library.__wrapped__() is None
    path.chmod(0o600)
    assert kernels._library.__wrapped__() is not None


def test_half_precision_and_several_threads_keep_away_from_kernels(compiled: None) -> None:
    agent, rows = made()
    assert type(make_engine("auto", agent, rows, precision="bfloat16")) is Taped
    with pytest.raises(OffrlError, match="engine=native computes in float32 on a CPU"):
        make_engine("native", agent, rows, precision="bfloat16")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(OffrlError, match=r"they run on one thread \(threads=1\)"):
            make_engine("native", agent, rows)
    finally:
        torch.set_num_threads(threads)
