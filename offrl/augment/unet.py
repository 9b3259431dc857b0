"""The denoiser's network: a 1-D U-Net over the steps of a trajectory.

The architecture of the authors of policy-guided diffusion (EmptyJackson/policy-guided-diffusion). For speed activations stay
`[batch, time, channels]`, and a convolution runs as a 2-D one of height 1, for which that is PyTorch's channels-last layout.
Group normalisation acts on each time step separately, as theirs does (their networks see one trajectory at a time, and their
library takes its time axis for the batch), so no statistic depends on the length of a trajectory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from offrl.nets.convolution import convolve, norm_relu
from offrl.utils.errors import OffrlError


class Conv(nn.Module):
    """Convolution over time of `[B, L, C]`, LeCun-normal weights (flax's truncated normal) and no initial bias.

    Args:
        size: size of the kernel, K; padding: zeros before and after the sequence.

    Attributes:
        weight: `[outputs, K, inputs]`.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, padding: tuple[int, int], generator: torch.Generator
    ) -> None:
        super().__init__()
        weight = lecun_normal((outputs, inputs, size), inputs * size, generator)
        self.weight = nn.Parameter(weight.transpose(1, 2).contiguous())
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        before, behind = self.padding
        if (by_kernels := convolve(x, self.weight, self.bias, before)) is not None:
            return by_kernels
        if before != behind:
            x, before = F.pad(x, (0, 0, before, behind)), 0
        weight = self.weight.transpose(1, 2).unsqueeze(2)
        y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight, self.bias, padding=(0, before))
        return y.squeeze(2).transpose(1, 2)


class Linear(nn.Module):
    """Linear layer with LeCun-normal weights and no initial bias."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(lecun_normal((outputs, inputs), inputs, generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class StepNorm(nn.Module):
    """Group normalisation of each time step separately, then ReLU; `[B, L, C]`."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if (by_kernels := norm_relu(x, self.weight, self.bias, self.groups)) is not None:
            return by_kernels
        # As layer normalisation of each group: twice the speed of `group_norm` here.
        groups = x.unflatten(-1, (self.groups, -1))
        normed = F.layer_norm(groups, groups.shape[-1:], eps=1e-6).flatten(-2)
        return torch.addcmul(self.bias, normed, self.weight).relu()


class Down(nn.Module):
    """One level of the encoder."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = (Conv(n, outputs, 3, (1, 1), generator) for n in (inputs, outputs))
        self.time = Linear(time, outputs, generator)
        self.first_norm, self.second_norm = (StepNorm(outputs, groups) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.first_norm(self.first(x) + self.time(time).unsqueeze(1))
        return self.second_norm(self.second(x))


class Up(nn.Module):
    """One level of the decoder: upsampling to the length of the skip connection, then concatenation with it."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int, generator: torch.Generator) -> None:
        super().__init__()
        self.grow = Conv(inputs, outputs, 2, (0, 1), generator)
        self.time = Linear(time, outputs, generator)
        self.first, self.second = (Conv(n, outputs, 3, (1, 1), generator) for n in (2 * outputs, outputs))
        self.grow_norm, self.first_norm, self.second_norm = (StepNorm(outputs, groups) for _ in range(3))

    def forward(self, x: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        x = self.grow_norm(self.grow(stretch(x, skip.shape[1])) + self.time(time).unsqueeze(1))
        x = self.first_norm(self.first(torch.cat([x, skip], -1)))
        return self.second_norm(self.second(x))


class UNet(nn.Module):
    """F_theta: `[B, L, D]` and a noise level to `[B, L, D]`, for any length of at least 2^(blocks - 1).

    Args:
        width: D, numbers per step.
        features: F, channels of the first level; each further level has twice as many. A multiple of 8, at least 16.
        blocks: number of levels.
        groups: number of groups in the normalisation, on every level; must divide `features`. Groups of few channels lose
            information: of four channels, without mean and scale, two numbers are left.
        seed: seed of the initial weights.
    """

    def __init__(self, width: int, features: int = 1024, blocks: int = 3, groups: int = 8, seed: int = 0) -> None:
        super().__init__()
        if features < 16 or features % 8 or blocks < 1:
            raise OffrlError(
                f"augment.denoiser: features={features} should be a multiple of 8 and at least 16, blocks={blocks} at least 1."
            )
        if groups < 1 or features % groups or features // groups < 2:
            raise OffrlError(
                f"augment.denoiser: groups={groups} should divide features={features} into groups of at least 2 channels."
            )
        generator = torch.Generator().manual_seed(seed)
        self.features, self.blocks = features, blocks
        self.embed_first = Linear(2 * (features // 8), features, generator)
        self.embed_second = Linear(features, features, generator)
        widths = [features * 2**i for i in range(blocks)]
        self.down = nn.ModuleList(Down(a, b, features, groups, generator) for a, b in zip([width, *widths], widths))
        self.up = nn.ModuleList(Up(a, b, features, groups, generator) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.out = Conv(features, width, 1, (0, 0), generator)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """`level`: c_noise, `[B]`, or `[1]` for all samples."""
        if x.shape[1] < 2 ** (self.blocks - 1):
            raise OffrlError(
                f"trajectories of {x.shape[1]} steps are too short for {self.blocks} blocks; lengthen them."
            )
        time = F.silu(self.embed_second(F.silu(self.embed_first(self.frequencies(level)))))
        skips = []
        for i, level_down in enumerate(self.down):
            x = level_down(x if i == 0 else halve(x), time)
            skips.append(x)
        for level_up, skip in zip(self.up, skips[-2::-1]):
            x = level_up(x, skip, time)
        return self.out(x)

    def frequencies(self, level: Tensor) -> Tensor:
        """`[B, F / 4]`: sines, then cosines, of the level at log-spaced frequencies 1 ... 1e-4."""
        half = self.features // 8
        scale = torch.arange(half, dtype=level.dtype, device=level.device) / (half - 1)
        angles = level.unsqueeze(1) * (-math.log(1e4) * scale).exp()
        return torch.cat([angles.sin(), angles.cos()], 1)


def halve(x: Tensor) -> Tensor:
    """Maximum over pairs of steps, the first of equals; an odd last step is dropped."""
    pairs = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2))
    first, second = pairs.unbind(2)
    return _Larger.apply(first, second)


class _Larger(torch.autograd.Function):
    """`torch.maximum`, whose own gradient looks for equals and halves theirs; behind a ReLU those are zeros, and have none."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first >= second)
        return torch.maximum(first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        by_first = grad * ctx.saved_tensors[0]
        return by_first, grad - by_first


def stretch(x: Tensor, length: int) -> Tensor:
    """Nearest-neighbour resampling to `length` steps (by the midpoints of the steps)."""
    old = x.shape[1]
    nearest = ((torch.arange(length, device=x.device) + 0.5) * old / length).long()
    return x.index_select(1, nearest)


def lecun_normal(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Normal truncated at two standard deviations, scaled to variance 1 / fan_in."""
    std = 1 / math.sqrt(fan_in) / 0.87962566103423978  # std of the truncated standard normal
    weight = torch.empty(shape)
    if weight.is_meta:  # only counted
        return weight
    return nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)
