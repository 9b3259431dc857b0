"""A gated recurrent unit over whole sequences by the kernels, as one node.

Autograd would keep a dozen small operations for each timestep; the node is one call (`recurrent.h`), and the gradient by the
weights one product over all timesteps.

The plain path, and what the numbers are checked against, is `offrl.nets.history.GRUEncoder.advance`, timestep by timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from offrl.nets import kernels

_TILE = 32  # columns of a panel of the packed weights, at most


def gru(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """The states `[lanes, T, n, H]` after each timestep, from a state of zeros; None: kernels are off or don't apply here.

    Args:
        x: `[lanes, T, n, 3 H]` the inputs' part of the gates reset, update and new, as in PyTorch's GRU.
        weight, bias: `[lanes, 3 H, H]` and `[lanes, 3 H]` of the state's part.
    """
    if not kernels.apply_to(x) or not (weight.is_contiguous() and bias.is_contiguous()):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        out: Tensor = _GRU.apply(x, weight, bias)
        return out
    return _forward(x.contiguous(), weight, bias, None)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, gates: Tensor | None) -> Tensor:
    lanes, steps, n, width = *x.shape[:3], weight.shape[-1]
    memory = x.new_empty(lanes, steps, n, width)
    scratch = kernels.scratch(3 * width * (width + _TILE) + 3 * n * width)
    written = (memory,) if gates is None else (memory, gates)
    kernels.call("gru_forward", lanes, steps, n, width, x, weight, bias, gates, memory, scratch, written=written)
    return memory


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gates = x.new_empty(*x.shape[:-1], 4 * weight.shape[-1])
        memory = _forward(x.contiguous(), weight, bias, gates)
        ctx.save_for_backward(weight, bias, gates, memory)
        return memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        weight, bias, gates, memory = ctx.saved_tensors
        lanes, steps, n, width = memory.shape
        by_memory = torch.empty_like(memory).copy_(grad)  # the kernel writes over it
        results = (memory.new_empty(lanes, steps, n, 3 * width), torch.empty_like(weight), torch.empty_like(bias))
        scratch = kernels.scratch(3 * width * (width + _TILE) + 3 * steps * n * width)
        given = (weight, gates, memory, by_memory)
        kernels.call("gru_backward", lanes, steps, n, width, *given, *results, scratch, written=results)
        return results
