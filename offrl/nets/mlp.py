"""Networks with a lane axis, their optimiser, and the moving average of targets.

Parameters are `[lanes, ...]`, or `[lanes, members, ...]` for an ensemble: one batched matrix product serves all lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offrl.nets.lanes import lane_generators, per_lane
from offrl.utils.random import LaneRandom

Drop = Callable[[str, Tensor], Tensor]  # (name, x) -> x with some of it dropped


class _ReluMLP(torch.autograd.Function):
    """Batched Linear-ReLU-...-Linear as one autograd node.

    Why by hand: on a CPU products with a narrow side run at a tenth of the matrix library's rate in the order in
    which autograd makes them, and its bookkeeping adds to that. Here each product has the
    order that runs fast (a narrow output is computed transposed, weight gradients as g^T h).
    `relu_mlp_reference` says the same in one line per layer; the tests compare the two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parameters]
        weights = [w.flatten(0, -3) for w in parameters[0::2]]
        biases = [b.flatten(0, -2) for b in parameters[1::2]]
        hidden = [x]
        for weight, bias in zip(weights[:-1], biases[:-1]):
            hidden.append(torch.baddbmm(bias.unsqueeze(1), hidden[-1], weight.transpose(1, 2)).relu_())
        out = _narrow_product(hidden[-1], weights[-1], biases[-1])
        ctx.save_for_backward(*hidden, *weights)
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


def relu_mlp_reference(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """What `_ReluMLP` computes, in plain operations: x `[n, batch, in]`, weights `[n, out, in]`, biases `[n, out]`."""
    for i in range(0, len(parameters), 2):
        x = x @ parameters[i].transpose(1, 2) + parameters[i + 1].unsqueeze(1)
        x = x.relu() if i < len(parameters) - 2 else x
    return x


class MLP(nn.Module):
    """ReLU multilayer perceptron for every lane, and every member of an ensemble, at once.

    Args:
        seeds: one per lane; they fix the initial weights, which are PyTorch's default of `nn.Linear`
            (weights and biases uniform on +-1/sqrt(fan_in)).
        sizes: widths from input to output.
        members: size of the ensemble; None for a single network.
        name: keeps the initial weights of a lane's networks apart.
        bias: initial value of all hidden biases; None: PyTorch's default.
        last: bound of the last layer's uniform initial weights and biases; None: PyTorch's default.
        norm: layer normalisation behind every hidden ReLU; `multiple` must be 1 then.
        multiple: hidden widths are rounded up to a multiple of this by units whose weights are zero. They put out
            zero, get no gradient and stay so: the same function of the same weights, in sizes that a matrix library
            likes (on a CPU with AVX2, products of width 750 run at three quarters of the rate of 752).

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
        multiple: int = 1,
    ) -> None:
        super().__init__()
        assert multiple == 1 or not norm, "units that pad a layer would count in its normalisation"
        generators = lane_generators(seeds, name)
        self.name, self.members = name, members
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.layers: list[nn.Parameter] = []  # the same, alternating; looking them up by name costs microseconds
        self.gains, self.offsets = nn.ParameterList(), nn.ParameterList()  # of the normalisation
        lead = () if members is None else (members,)
        spare = [0, *(-width % multiple for width in sizes[1:-1]), 0]
        for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            final = i == len(sizes) - 2
            bound = last if final and last is not None else 1 / math.sqrt(fan_in)
            for shape, where in (((*lead, fan_out, fan_in), self.weights), ((*lead, fan_out), self.biases)):
                lanes = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
                if where is self.biases and bias is not None and not final:
                    lanes = [torch.full(shape, bias) for _ in generators]
                padding = (0, spare[i], 0, spare[i + 1]) if where is self.weights else (0, spare[i + 1])
                where.append(nn.Parameter(nn.functional.pad(torch.stack(lanes), padding)))
                self.layers.append(where[-1])
            if norm and not final:
                shape = (len(generators), *lead, fan_out + spare[i + 1])
                self.gains.append(nn.Parameter(torch.ones(shape)))
                self.offsets.append(nn.Parameter(torch.zeros(shape)))
        self.norms: list[nn.Parameter] = [p for pair in zip(self.gains, self.offsets) for p in pair]

    def forward(self, x: Tensor, member: int | None = None, frozen: bool = False, drop: Drop | None = None) -> Tensor:
        """`[lanes, batch, in]` to `[lanes, batch, out]`; an ensemble to `[lanes, members, batch, out]`.

        Args:
            member: picks one member of an ensemble (then `[lanes, batch, out]`).
            frozen: the weights are constants here: a gradient passes through to `x` and none of theirs is computed.
            drop: what becomes of each hidden layer's output, such as dropout; for a single network.
        """
        layers, norms = self._of(self.layers, member, frozen), self._of(self.norms, member, frozen)
        run = self._layer_by_layer if norms or drop else _fused
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
        for i in range(0, len(layers) - 2, 2):
            x = _ReluMLP.apply(x, *layers[i : i + 2]).relu()
            if norms:
                gain, offset = (p.flatten(0, -2) for p in norms[i : i + 2])
                x = layer_norm(x, gain, offset, eps=1e-6)  # Flax's, whose networks these are
            if drop is not None:
                x = drop(f"{self.name}/{i // 2}", x)
        return _ReluMLP.apply(x, *layers[-2:])

    def with_input_gradient(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Outputs of an ensemble without norms, and the gradient of their sum by the input's columns from `first` on.

        Returns:
            `[lanes, members, batch, out]` and `[lanes, members, batch, in - first]`, both differentiable by the weights
            and not by `x`. The gradient is written out, W_1^T (m_1 * W_2^T (m_2 * ...)) with m = [h > 0], which costs what
            differentiating twice would, and can be compiled.
        """
        weights, biases = [w.flatten(0, 1) for w in self.weights], [b.flatten(0, 1) for b in self.biases]
        h, open_units = self._for_each_member(x.detach()), []
        for weight, bias in zip(weights[:-1], biases[:-1]):
            h = torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2)).relu()
            open_units.append(h.detach().sign())
        out = _narrow_product(h, weights[-1], biases[-1])
        slope = weights[-1].sum(1, keepdim=True)
        for weight, mask in zip(weights[-2::-1], open_units[::-1]):
            weight = weight if weight is not weights[0] else weight[..., first:]
            slope = torch.bmm(slope * mask, weight)
        shape = (len(x), self.members or 1)
        return out.unflatten(0, shape), slope.unflatten(0, shape)


def _fused(x: Tensor, layers: Sequence[Tensor], *_: Any) -> Tensor:
    out: Tensor = _ReluMLP.apply(x, *layers)
    return out


def layer_norm(x: Tensor, gain: Tensor, offset: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of `[n, ..., width]` over its last axis; gain and offset are `[n, width]`."""
    shape = (len(gain), *[1] * (x.ndim - 2), gain.shape[-1])
    return torch.addcmul(offset.view(shape), nn.functional.layer_norm(x, x.shape[-1:], eps=eps), gain.view(shape))


def dropout(x: Tensor, rate: float | Tensor, random: LaneRandom, name: str) -> Tensor:
    """`x` `[lanes, ...]` with a share `rate` of elements zero and the rest grown to the same mean; lanes may differ.

    Sixteen bits decide on an element, four elements to a draw: rates are multiples of 2^-16 (0.1 becomes 0.100006), and the
    growth is of the rate as it is then.
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
    """Start each layer of each member with a (semi-)orthogonal matrix times `gain`, the last one times `last`, and no bias."""
    for lane, generator in enumerate(lane_generators(seeds, "orthogonal")):
        for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
            for matrix in weight[lane].reshape(-1, *weight.shape[-2:]):
                nn.init.orthogonal_(matrix, gain if i < len(mlp.weights) - 1 else last, generator)
            bias.zero_()
