"""Multilayer perceptrons with a lane axis, and what may stand between their layers.

Parameters are `[lanes, ...]`, or `[lanes, members, ...]` for an ensemble: one batched matrix product serves all lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offrl.nets import kernels
from offrl.nets.lanes import lane_generators, per_lane
from offrl.utils.random import LaneRandom

Drop = Callable[[str, Tensor], Tensor]  # (name, x) -> x after dropout
Activation = Literal["relu", "gelu", "mish"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation's value; GELU in its tanh form, which is Flax's default and not PyTorch's."""
    if activation == "gelu":
        return nn.functional.gelu(x, approximate="tanh")
    return nn.functional.mish(x) if activation == "mish" else x.relu()


class _ReluMLP(torch.autograd.Function):
    """Batched Linear-ReLU-...-Linear as one autograd node.

    The gradient is written by hand for speed: on a CPU, products with a narrow side run at a tenth of the matrix library's
    rate in the order that autograd chooses, and autograd's bookkeeping adds to that. Here each product has the order that
    runs fast: a narrow output is computed transposed, a weight gradient as g^T h.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parameters]
        *hidden, out = _relu_layers(x, parameters)
        ctx.save_for_backward(*hidden, *(w.flatten(0, -3) for w in parameters[0::2]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers = len(ctx.saved_tensors) // 2
        hidden, weights = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        needed, grad = ctx.needs_input_grad, grads[0]
        result: list[Tensor | None] = [None] * len(needed)
        for layer in reversed(range(layers)):
            if needed[1 + 2 * layer]:
                result[1 + 2 * layer] = _weight_gradient(grad, hidden[layer])
            if needed[2 + 2 * layer]:
                result[2 + 2 * layer] = grad.sum(1)
            if layer == 0 and not needed[0]:
                break
            # An outer product, for a single output, is not worth a call of the matrix library.
            outer = grad.shape[-1] == 1
            grad = grad * weights[layer] if outer else torch.bmm(grad, weights[layer])
            if layer > 0:
                torch.ops.aten.threshold_backward.grad_input(grad, hidden[layer], 0, grad_input=grad)
        result[0] = grad if needed[0] else None
        shapes = ctx.shapes
        return result[0], *(None if g is None else g.view(s) for g, s in zip(result[1:], shapes))


def _relu_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    """Linear-ReLU-...-Linear; without a gradient to come there is no node, which also is what `torch.compile` can trace."""
    if (by_kernels := kernels.mlp(x, parameters)) is not None:
        return by_kernels
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        out: Tensor = _ReluMLP.apply(x, *parameters)
        return out
    return _relu_layers(x, parameters)[-1]


def _relu_layers(x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The input, each hidden layer, and the output."""
    weights = [w.flatten(0, -3) for w in parameters[0::2]]
    biases = [b.flatten(0, -2) for b in parameters[1::2]]
    layers = [x]
    for weight, bias in zip(weights[:-1], biases[:-1]):
        layers.append(torch.baddbmm(bias.unsqueeze(1), layers[-1], weight.transpose(1, 2)).relu_())
    return [*layers, _narrow_product(layers[-1], weights[-1], biases[-1])]


def _narrow_product(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h W^T + b, `[n, batch, out]`; for few outputs as (W h^T)^T, which the CPU's library runs four times faster."""
    if weight.shape[1] > 16:
        return torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(2), weight, h.transpose(1, 2)).transpose(1, 2)


def _weight_gradient(grad: Tensor, h: Tensor) -> Tensor:
    """g^T h, `[n, out, in]`; for few inputs as (h^T g)^T, for the same reason."""
    if h.shape[-1] < 64 <= grad.shape[-1]:
        return torch.bmm(h.transpose(1, 2), grad).transpose(1, 2).contiguous()
    return torch.bmm(grad.transpose(1, 2), h)


class MLP(nn.Module):
    """Multilayer perceptron for every lane, and every member of an ensemble, at once.

    Args:
        seeds: one seed per lane; it fixes the initial weights, which by default are PyTorch's of `nn.Linear`
            (weights and biases uniform on +-1/sqrt(fan_in)).
        sizes: widths from input to output.
        members: size of the ensemble; None for a single network.
        name: name of the initial weights' random stream, so that a lane's networks differ.
        bias: initial value of all hidden biases; None: PyTorch's default.
        last: bound of the last layer's uniform initial weights and biases; None: PyTorch's default.
        norm: layer normalisation after every hidden activation.
        norm_first: before them instead.
        activation: of the hidden layers; `gelu` is its tanh form.
        glorot: weights uniform on +-sqrt(6 / (fan_in + fan_out)) and biases 0, in every layer; `bias` and `last` are unused.

    Weights are `[lanes, (members,) out, in]`, biases `[lanes, (members,) out]`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sizes: Sequence[int],
        members: int | None = None,
        name: str = "",
        bias: float | None = None,
        last: float | None = None,
        norm: bool = False,
        norm_first: bool = False,
        activation: Activation = "relu",
        glorot: bool = False,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        generators = lane_generators(seeds, name)
        self.name, self.members, self.activation = name, members, activation
        bias = 0.0 if glorot else bias
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.layers: list[nn.Parameter] = []  # weights and biases in turn: a look-up by name would cost microseconds
        self.gains, self.offsets = nn.ParameterList(), nn.ParameterList()  # scale and shift of the layer normalisation
        lead = () if members is None else (members,)
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            final = i == len(sizes) - 2
            bound = last if final and last is not None else 1 / math.sqrt(fan_in)
            if glorot:
                bound = math.sqrt(6 / (fan_in + fan_out))
            for shape, where in (((*lead, fan_out, fan_in), self.weights), ((*lead, fan_out), self.biases)):
                lanes = torch.empty(len(generators), *shape)
                for lane, generator in enumerate(generators):
                    lanes[lane].uniform_(-bound, bound, generator=generator)
                if where is self.biases and bias is not None and (glorot or not final):
                    lanes.fill_(bias)
                where.append(nn.Parameter(lanes))
                self.layers.append(where[-1])
            if norm and not final:
                shape = (len(generators), *lead, fan_out)
                self.gains.append(nn.Parameter(torch.ones(shape)))
                self.offsets.append(nn.Parameter(torch.zeros(shape)))
        self.norms: list[nn.Parameter] = [p for pair in zip(self.gains, self.offsets) for p in pair]

    def forward(self, x: Tensor, member: int | None = None, frozen: bool = False, drop: Drop | None = None) -> Tensor:
        """`[lanes, batch, in]` to `[lanes, batch, out]`; an ensemble to `[lanes, members, batch, out]`.

        Args:
            member: index of the one member of an ensemble to evaluate (then `[lanes, batch, out]`).
            frozen: treat the weights as constants: the gradient passes to `x`, and that of the weights is not computed.
            drop: function applied to each hidden layer's output, such as dropout; single networks only.
        """
        layers, norms = self._of(self.layers, member, frozen), self._of(self.norms, member, frozen)
        run = self._layer_by_layer if norms or drop or self.activation != "relu" else _fused
        if self.members is None or member is not None:
            return run(x, layers, norms, drop)
        return run(self._for_each_member(x), layers, norms, drop).unflatten(0, (len(x), self.members))

    def _for_each_member(self, x: Tensor) -> Tensor:
        """`[lanes, batch, in]` to `[lanes * members, batch, in]`."""
        assert self.members is not None
        return x.unsqueeze(1).expand(-1, self.members, -1, -1).flatten(0, 1)

    def _of(self, parameters: Sequence[Tensor], member: int | None, frozen: bool) -> Sequence[Tensor]:
        """Parameters of one member, as constants when frozen."""
        if frozen:
            parameters = [p.detach() for p in parameters]
        return parameters if member is None or self.members is None else [p[:, member] for p in parameters]

    def _layer_by_layer(
        self, x: Tensor, layers: Sequence[Tensor], norms: Sequence[Tensor], drop: Drop | None
    ) -> Tensor:
        if drop is None:
            out = kernels.mlp(x, layers, norms, "relu" if self.norm_first else self.activation, self.norm_first)
            if out is not None:
                return out
        for i in range(0, len(layers) - 2, 2):
            x = _relu_mlp(x, *layers[i : i + 2])
            x = x if self.norm_first else activate(x, self.activation)
            if norms:
                gain, offset = (p.flatten(0, -2) for p in norms[i : i + 2])
                x = layer_norm(x, gain, offset, eps=1e-6)  # Flax's default: the authors' networks are Flax's
            x = x.relu() if self.norm_first else x
            if drop is not None:
                x = drop(f"{self.name}/{i // 2}", x)
        return _relu_mlp(x, *layers[-2:])

    def with_input_gradient(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Outputs of a ReLU ensemble without norms, and the gradient of their sum by columns `first`, `first + 1`, ... of `x`.

        The gradient is written out as W_1^T (m_1 * W_2^T (m_2 * ...)) with m = [h > 0]. That costs as much as
        differentiating twice and, unlike it, can be compiled.

        Returns:
            `[lanes, members, batch, out]` and `[lanes, members, batch, in - first]`, both differentiable by the weights;
            the outputs also by `x`, of which the gradient is a piecewise constant function, without a gradient of its own.
        """
        weights, biases = [w.flatten(0, 1) for w in self.weights], [b.flatten(0, 1) for b in self.biases]
        h, open_units = self._for_each_member(x), []
        for weight, bias in zip(weights[:-1], biases[:-1]):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2)).relu()
            open_units.append(h.detach().sign())
        out = _narrow_product(h, weights[-1], biases[-1])
        slope = weights[-1].sum(1, keepdim=True)
        if not open_units:  # a linear function, whose gradient is the same at every x
            slope = slope[..., first:].expand(-1, x.shape[1], -1)
        for weight, mask in zip(weights[-2::-1], open_units[::-1]):
            weight = weight if weight is not weights[0] else weight[..., first:]
            slope = torch.bmm(slope * mask, weight)
        shape = (len(x), self.members or 1)
        return out.unflatten(0, shape), slope.unflatten(0, shape)


def _fused(x: Tensor, layers: Sequence[Tensor], *_: Any) -> Tensor:
    return _relu_mlp(x, *layers)


def layer_norm(x: Tensor, gain: Tensor, offset: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of `[n, ..., width]` over its last axis; gain and offset are `[n, width]`."""
    shape = (len(gain), *[1] * (x.ndim - 2), gain.shape[-1])
    return torch.addcmul(offset.view(shape), nn.functional.layer_norm(x, x.shape[-1:], eps=eps), gain.view(shape))


LARGEST_DROPOUT = 1 - 2**-16  # rates are multiples of 2^-16, and one of 1 would leave nothing to scale


def check_dropout(rate: float | Tensor) -> None:
    """Raise ValueError where a dropout rate, or one of several lanes' rates, isn't between 0 and `LARGEST_DROPOUT`."""
    # On the CPU whatever the default device: sizes are checked on one that has no numbers.
    for value in torch.as_tensor(rate, device="cpu").reshape(-1).tolist():
        if not 0 <= value <= LARGEST_DROPOUT:
            raise ValueError(f"dropout={value:g} should be at least 0 and below 1 (at most 1 - 2^-16).")


def dropout(x: Tensor, rate: float | Tensor, random: LaneRandom, name: str) -> Tensor:
    """Dropout of `x` `[lanes, ...]`: a share `rate` of the elements becomes zero, the others are scaled by 1 / (1 - rate).

    Sixteen random bits decide on each element, so rates are rounded to multiples of 2^-16 (0.1 becomes 0.100006); the scale
    uses the rounded rate. `rate` is one that passes `check_dropout`, or one per lane; `name` names the random stream.
    """
    bits = random.bits(name, -(-x[0].numel() // 4)).view(torch.int16)[:, : x[0].numel()].view(x.shape)
    if isinstance(rate, Tensor):
        dropped: Any = per_lane((rate.double() * 2**16).round(), x.ndim - 1)
        scale: Any = (2**16 / (2**16 - dropped)).to(x.dtype)
        kept = bits >= (dropped - 2**15).to(torch.int16)
    else:
        dropped = round(rate * 2**16)
        scale = 2**16 / (2**16 - dropped)
        kept = bits >= dropped - 2**15
    return x * (kept.to(x.dtype) * scale)


@torch.no_grad()
def orthogonal_(mlp: MLP, seeds: Sequence[int], gain: float, last: float) -> None:
    """Set every layer's weights to a (semi-)orthogonal matrix times `gain`, the last layer's times `last`; biases to 0."""
    for lane, generator in enumerate(lane_generators(seeds, "orthogonal")):
        for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
            for matrix in weight[lane].reshape(-1, *weight.shape[-2:]):
                nn.init.orthogonal_(matrix, gain if i < len(mlp.weights) - 1 else last, generator)
            bias.zero_()


@torch.no_grad()
def pad_hidden_(mlp: MLP, multiple: int) -> None:
    """Widen the hidden layers of a network without norms to a multiple of `multiple`, by units whose weights are zero.

    These units output zero, get no gradient and stay zero, so the function and its training are unchanged. Only the speed
    differs: on a CPU with AVX2, matrix products of width 750 run at three quarters of the rate of width 752.
    """
    fan_in = 0  # units added to the layer's input
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
        fan_out = -bias.shape[-1] % multiple if i < len(mlp.weights) - 1 else 0
        mlp.weights[i] = nn.Parameter(nn.functional.pad(weight, (0, fan_in, 0, fan_out)))
        mlp.biases[i] = nn.Parameter(nn.functional.pad(bias, (0, fan_out)))
        fan_in = fan_out
    mlp.layers = [p for pair in zip(mlp.weights, mlp.biases) for p in pair]
