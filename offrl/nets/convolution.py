"""A U-Net's layers by the kernels: convolutions over time, without copies of shifted inputs, and normalisations of steps.

The rows of each sequence lie one behind the other, and zeros between two sequences. What an output sees are K rows in a row,
so it is one row of K C numbers of a matrix whose rows overlap, and the convolution of all sequences is one product with that
matrix. The product also computes what would lie between two sequences, which nobody reads. The gradients are products with the
same matrices.

The plain path, and what the numbers are checked against, is that of `offrl.augment.unet`, by PyTorch's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offrl.nets import kernels


def convolve(x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor | None:
    """`[B, L, O]`; None: kernels are off or don't apply here.

    Args:
        x: `[B, L, C]`; weight: `[O, K, C]`; bias: `[O]`.
        before: rows of zeros before each sequence; K - 1 - before follow it, so that the output is as long as x.
    """
    if not kernels.apply_to(x):
        return None
    out: Tensor = _Convolution.apply(x, weight, bias, before)
    return out


def _apart(x: Tensor, before: int, size: int) -> Tensor:
    """The rows of x `[B, L, C]` with zeros between sequences: `[B (L + gap) + size - 1, C]`, and `before` of zeros first."""
    count, length, channels = x.shape
    step = length + max(before, size - 1 - before)
    rows = x.new_zeros(count * step + size - 1, channels)
    _of_sequences(rows[before:], count, length, step).copy_(x)
    return rows


def _of_sequences(rows: Tensor, count: int, length: int, step: int) -> Tensor:
    """`[B, L, C]` of rows in which a sequence begins every `step` rows."""
    return rows.as_strided(
        (count, length, rows.shape[1]), (step * rows.shape[1], rows.shape[1], 1), rows.storage_offset()
    )


def _windows(rows: Tensor, size: int) -> Tensor:
    """`[R - size + 1, size C]`: each row of the result is `size` rows, and overlaps the next one."""
    count, channels = rows.shape
    return rows.as_strided((count - size + 1, size * channels), (channels, 1))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor:
        count, length, _ = x.shape
        outputs, size, _ = weight.shape
        rows = _apart(x, before, size)
        step = (len(rows) - size + 1) // count
        out = x.new_empty(count * step, outputs)
        kernels.multiply(_windows(rows, size), weight.view(outputs, -1).T, out, bias)
        ctx.save_for_backward(rows, weight)
        ctx.sizes = (count, length, step, before)
        return _of_sequences(out, count, length, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        count, length, step, before = ctx.sizes
        outputs, size, channels = weight.shape
        behind = size - 1 - before
        apart = _apart(grad, behind, size)
        by_x = None
        if ctx.needs_input_grad[0]:
            # x at t meets tap k in the output at t + before - k: a convolution with the taps in reverse.
            reverse, by_rows = weight.new_empty(size, outputs, channels), grad.new_empty(count * step, channels)
            for i in range(size):
                reverse[i].copy_(weight[:, size - 1 - i])
            kernels.multiply(_windows(apart, size), reverse.view(-1, channels), by_rows)
            by_x = _of_sequences(by_rows, count, length, step)
        by_weight = torch.empty_like(weight)
        by_output = apart[behind : behind + count * step]  # zero between sequences
        kernels.multiply(by_output.T, _windows(rows, size), by_weight.view(outputs, -1))
        return by_x, by_weight, grad.sum((0, 1)), None


def norm_relu(x: Tensor, gain: Tensor, offset: Tensor, groups: int) -> Tensor | None:
    """Group normalisation of every row of x `[..., C]` by itself (epsilon 1e-6), then ReLU; None: kernels don't apply here."""
    if not kernels.apply_to(x):
        return None
    out: Tensor = _NormRelu.apply(x, gain, offset, groups)
    return out


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, groups: int) -> Tensor:
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1] // groups
        ctx.sizes = (x.numel() // x.shape[-1], groups, width)
        moments = x.new_empty(2 * x.numel() // width)
        kernels.call("norm_forward", *ctx.sizes, x, gain, offset, out, moments, written=(out, moments))
        ctx.save_for_backward(x, out, moments, gain)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out, moments, gain = ctx.saved_tensors
        by_x, by_gain, by_offset = x.new_empty(x.shape).copy_(grad), torch.empty_like(gain), torch.empty_like(gain)
        results = (by_x, by_gain, by_offset)
        kernels.call("norm_backward", *ctx.sizes, x, out, moments, gain, *results, written=results)
        return *results, None
