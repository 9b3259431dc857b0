"""The U-Net's layers by kernels against float64, and fits that are played from a tape."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_toy
from torch import Tensor, nn

from offrl.augment.diffusion import DenoiserConfig, Training
from offrl.augment.fitting import FitLoop
from offrl.augment.unet import Conv, StepNorm, UNet, halve
from offrl.augment.world_model import EnsembleConfig, EnsembleFit
from offrl.nets import kernels
from offrl.nets.take import Take

RTOL = 1e-5  # some hundred float32 roundings of 6e-8 in a sum, relative to the largest number


def compare(module: nn.Module, *x: Tensor) -> None:
    """Output and all gradients of a module by kernels, and in float64 by PyTorch."""
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        for p, q in zip(module.parameters(), exact.parameters()):
            q.copy_(p.normal_())
    found = []
    assert kernels.problem() == ""  # else both sides would be PyTorch's
    for net, given in (
        (module, [t.clone().requires_grad_() for t in x]),
        (exact, [t.double().requires_grad_() for t in x]),
    ):
        with kernels.in_use():
            out = net(*given)
            by = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
            found.append([out, *torch.autograd.grad(out, [*given, *net.parameters()], by)])
    for mine, theirs in zip(*found):
        assert mine.dtype == torch.float32
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=RTOL * theirs.abs().max().item())


@pytest.mark.parametrize(("size", "padding"), [(3, (1, 1)), (2, (0, 1)), (1, (0, 0)), (4, (2, 1))])
@pytest.mark.parametrize(("count", "length", "inputs", "outputs"), [(3, 7, 5, 4), (1, 1, 2, 1), (40, 8, 70, 33)])
def test_convolutions(
    compiled: None, size: int, padding: tuple[int, int], count: int, length: int, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, length, inputs, generator=generator)
    compare(Conv(inputs, outputs, size, padding, generator), x)


@pytest.mark.parametrize(
    ("groups", "width"), [(1, 51), (3, 17), (2, 4), (5, 4), (3, 8), (8, 8), (2, 16), (3, 32), (1, 64)]
)
def test_norms_of_steps(compiled: None, groups: int, width: int) -> None:
    """Groups that fill no vector, one, more, and those of a width that the compiler knows."""
    channels = groups * width
    compare(StepNorm(channels, groups), torch.randn(4, 9, channels, generator=torch.Generator().manual_seed(2)))


def test_the_whole_network(compiled: None) -> None:
    generator = torch.Generator().manual_seed(3)
    network = UNet(5, features=16, blocks=3, groups=2)
    compare(network, torch.randn(6, 11, 5, generator=generator), torch.randn(6, generator=generator))


def test_the_larger_of_two_steps_has_the_gradient() -> None:
    x = torch.tensor([[[1.0], [3.0], [2.0], [2.0], [9.0]]], requires_grad=True)
    halved = halve(x)
    assert halved.flatten().tolist() == [3, 2]
    (by_x,) = torch.autograd.grad(halved, x, torch.tensor([[[5.0], [7.0]]]))
    assert by_x.flatten().tolist() == [0, 5, 7, 0, 0]


def make_denoiser() -> FitLoop:
    cfg = DenoiserConfig(features=16, blocks=2, window=4, updates=40, batch_size=8, ema_every=3)
    return Training(make_toy(512, seed=7), cfg)


def make_ensemble() -> FitLoop:
    return EnsembleFit(
        make_toy(300, seed=5), EnsembleConfig(members=3, elites=2, hidden=(16, 16), updates=40, batch_size=32)
    )


@pytest.mark.parametrize("make", [make_denoiser, make_ensemble])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_fit_from_a_tape_has_the_same_numbers(
    compiled: None, monkeypatch: pytest.MonkeyPatch, make: Any, by_kernels: bool
) -> None:
    """To the bit: learning rates, moving averages and draws change from update to update."""
    if not by_kernels:
        monkeypatch.setattr(kernels, "apply_to", lambda x: False)
    taped, plain = make(), make()
    losses = []
    with kernels.in_use():
        for fit in (taped, plain):
            if fit is plain:
                monkeypatch.setattr(Take, "make", lambda self, drawn, update: update(drawn))
            for fit.step in range(1, 11):
                losses.append(fit.update().clone())
    assert taped.take.faithful
    assert torch.equal(torch.stack(losses[:10]), torch.stack(losses[10:]))
    assert all(torch.equal(a, b) for a, b in zip(taped.state_dict().values(), plain.state_dict().values()))
