"""The denoiser's network: shapes, size, what it must not depend on, and each piece against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offrl.augment.unet import Conv, StepNorm, UNet, halve, lecun_normal, stretch
from offrl.utils.errors import OffrlError


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("length", [8, 31, 32, 33, 129])
def test_shapes(length: int, generator: torch.Generator) -> None:
    network = UNet(9, features=16).double()
    x = torch.randn(2, length, 9, dtype=torch.float64, generator=generator)
    levels = torch.tensor([0.1, 0.1, -0.4], dtype=torch.float64)
    assert network(x, levels[1:]).shape == x.shape
    shared = network(x, levels[:1])  # one level for all equals the same for each
    torch.testing.assert_close(shared, network(x, levels[:2]))


def test_sizes() -> None:
    """Counted without being made."""
    with torch.device("meta"):
        full, small = UNet(25, features=1024), UNet(4, features=32)
    assert sum(p.numel() for p in full.parameters()) == 177_656_857
    assert sum(p.numel() for p in small.parameters()) == 176_420


@pytest.mark.parametrize(
    "sizes",
    [
        {"features": 20},
        {"features": 8},
        {"features": 32, "blocks": 0},
        {"features": 16, "groups": 3},
        {"features": 16, "groups": 16},
        {"features": 16, "groups": 0},
    ],
)
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(OffrlError, match=r"augment.denoiser"):
        UNet(4, **sizes)


def test_too_short_trajectories() -> None:
    with pytest.raises(OffrlError, match="too short"):
        UNet(4, features=16)(torch.zeros(1, 3, 4), torch.zeros(1))


@pytest.mark.parametrize(("size", "padding"), [(3, (1, 1)), (2, (0, 1)), (1, (0, 0))])
def test_convolutions(size: int, padding: tuple[int, int], generator: torch.Generator) -> None:
    conv = Conv(6, 4, size, padding, generator).double()
    with torch.no_grad():
        conv.bias.normal_(generator=generator)
    x = torch.randn(3, 7, 6, dtype=torch.float64, generator=generator)
    plain = F.conv1d(F.pad(x.transpose(1, 2), padding), conv.weight.transpose(1, 2), conv.bias).transpose(1, 2)
    torch.testing.assert_close(conv(x), plain)


@pytest.mark.parametrize("groups", [1, 8])
def test_norms_act_on_each_step_alone(groups: int, generator: torch.Generator) -> None:
    norm = StepNorm(24, groups).double()
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    x = 3 * torch.randn(4, 9, 24, dtype=torch.float64, generator=generator) + 1
    plain = F.group_norm(x.reshape(-1, 24), groups, norm.weight, norm.bias, eps=1e-6).view(x.shape).relu()
    torch.testing.assert_close(norm(x), plain)
    order = torch.randperm(9, generator=generator)
    torch.testing.assert_close(norm(x[:, order]), norm(x)[:, order])  # not so for statistics over time


@pytest.mark.parametrize(("old", "new"), [(2, 4), (7, 15), (32, 64), (64, 129), (16, 33)])
def test_resampling(old: int, new: int, generator: torch.Generator) -> None:
    x = torch.randn(2, old, 3, generator=generator)
    nearest = F.interpolate(x.transpose(1, 2), size=new, mode="nearest-exact").transpose(1, 2)
    assert torch.equal(stretch(x, new), nearest)
    y = torch.randn(2, new, 3, generator=generator)
    assert torch.equal(halve(y), F.max_pool1d(y.transpose(1, 2), 2).transpose(1, 2))


def test_a_step_sees_its_surroundings_and_no_more() -> None:
    """The receptive field: about 23 steps to each side, so a long trajectory's ends don't meet."""
    network = UNet(5, features=16).double()
    x = torch.zeros(1, 129, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(network(x, torch.zeros(1, dtype=torch.float64))[0, 64].square().sum(), x)[0]
    reached = (gradient.abs().sum(-1)[0] > 0).nonzero()
    assert len(reached) > 10
    assert (reached - 64).abs().max() <= 26


def test_initial_weights(generator: torch.Generator) -> None:
    weight = lecun_normal((400, 200, 1, 3), 600, generator)
    assert float(weight.var()) == pytest.approx(1 / 600, rel=4 * math.sqrt(2 / weight.numel()))
    assert float(weight.abs().max()) <= 2 / math.sqrt(600) / 0.8796 + 1e-6
    network = UNet(9, features=16)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), UNet(9, features=16).parameters()))
    assert not torch.equal(network.out.weight, UNet(9, features=16, seed=1).out.weight)


def test_time_embedding() -> None:
    """sin and cos of the level at frequencies from 1 down to 1e-4."""
    got = UNet(4, features=32).frequencies(torch.tensor([0.5]))
    scales = torch.tensor([1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])
    torch.testing.assert_close(got, torch.cat([(0.5 * scales).sin(), (0.5 * scales).cos()]).unsqueeze(0))


def test_gradients_reach_every_weight(generator: torch.Generator) -> None:
    network = UNet(6, features=16)
    out = network(torch.randn(4, 16, 6, generator=generator), torch.randn(4, generator=generator))
    gradients = torch.autograd.grad(out.square().sum(), list(network.parameters()))
    assert all(bool(g.any()) for g in gradients)


def test_group_norm_over_time_would_be_another_network(generator: torch.Generator) -> None:
    x = torch.randn(2, 9, 16, generator=generator)
    over_time = nn.GroupNorm(8, 16, eps=1e-6)(x.transpose(1, 2)).transpose(1, 2).relu()
    assert not torch.allclose(over_time, StepNorm(16, 8)(x), atol=0.1)
