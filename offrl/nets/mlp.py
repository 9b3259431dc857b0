"""Networks with a lane axis, their optimiser, and the moving average of targets.

Parameters are `[lanes, ...]`, or `[lanes, members, ...]` for an ensemble: one batched matrix product serves all lanes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offrl.utils.random import LaneRandom

Drop = Callable[[str, Tensor], Tensor]  # (name, x) -> x with some of it dropped


def lane_generators(seeds: Sequence[int], name: str) -> list[torch.Generator]:
    """One CPU generator per lane, for initialisation; `name` keeps networks of one lane apart."""
    start = LaneRandom(seeds).bits(f"init/{name}", 1)[:, 0]
    return [torch.Generator().manual_seed(int(s) & (2**63 - 1)) for s in start]


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
        dropped: Any = column((rate.double() * 2**16).round(), x.ndim - 1)
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


class DeterministicActor(nn.Module):
    """pi(s) = centre + scale * tanh(MLP(s)); the box of actions is [low, high] in every dimension; `options` are `MLP`'s."""

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: float,
        high: float,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, action_dim], name="actor", **options)
        self.scale, self.centre = (high - low) / 2, (high + low) / 2

    def forward(self, obs: Tensor, drop: Drop | None = None) -> Tensor:
        """`[lanes, batch, obs]` to `[lanes, batch, action]`; `drop` as in `MLP`."""
        action = self.mlp(obs, drop=drop).tanh()
        return action if self.scale == 1 and self.centre == 0 else action * self.scale + self.centre


class GaussianActor(nn.Module):
    """pi(. | s) = N(mean(s), diag(sigma^2)) with deviations that no state changes.

    Args:
        squash: mean(s) = centre + scale * tanh(MLP(s)), inside the box of actions, which the deviation is measured in as
            well; otherwise the mean is the MLP's output.
        log_std: bounds of log sigma, which begins at 0.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: float,
        high: float,
        squash: bool = True,
        log_std: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, action_dim], name="actor")
        self.log_std = nn.Parameter(torch.zeros(len(seeds), action_dim))
        self.scale, self.centre = ((high - low) / 2, (high + low) / 2) if squash else (1.0, 0.0)
        self.squash, self.bounds = squash, log_std

    def forward(self, obs: Tensor, drop: Drop | None = None) -> tuple[Tensor, Tensor]:
        """Mean and deviation, `[lanes, batch, action]` each; `drop` as in `MLP`."""
        mean = self.mlp(obs, drop=drop)
        mean = mean.tanh() if self.squash else mean
        std = self.log_std.clamp(*self.bounds).exp().unsqueeze(1) * self.scale
        return mean * self.scale + self.centre, std.expand_as(mean)


def normal_log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """log N(x; mean, diag(std^2)), `[..., A]` to `[...]`."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def categorical_log_prob(logits: Tensor, index: Tensor) -> Tensor:
    """log softmax(logits)[index], `[..., kinds]` and `[...]` to `[...]`."""
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


class Critics(nn.Module):
    """An ensemble Q_1 ... Q_n(s, a); `options` are those of `MLP`."""

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        members: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim + action_dim, *hidden, 1], members, name="critics", **options)

    def forward(self, obs: Tensor, action: Tensor, member: int | None = None, frozen: bool = False) -> Tensor:
        """`[lanes, members, batch]`, or `[lanes, batch]` of one member; `frozen` as in `MLP`."""
        return self.mlp(torch.cat([obs, action], -1), member, frozen).squeeze(-1)

    def of_many(self, obs: Tensor, actions: Tensor) -> Tensor:
        """`[lanes, members, batch, n]`: n actions `[lanes, batch, n, A]` judged in each state `[lanes, batch, obs]`."""
        lanes, batch, n, _ = actions.shape
        obs = obs.unsqueeze(2).expand(lanes, batch, n, -1)
        return self(obs.flatten(1, 2), actions.flatten(1, 2)).unflatten(-1, (batch, n))

    def with_action_gradient(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[lanes, members, batch]` and dQ_i/da `[lanes, members, batch, A]`, both differentiable by the weights."""
        q, slope = self.mlp.with_input_gradient(torch.cat([obs, action], -1), first=obs.shape[-1])
        return q.squeeze(-1), slope


@dataclass(frozen=True)
class TanhGaussian:
    """The distribution of a = centre + scale tanh(u), u ~ N(mean, exp(log_std)^2), for each dimension of an action.

    Attributes:
        mean, log_std: of u, `[..., A]`.
        low, high: the box of actions.
    """

    mean: Tensor
    log_std: Tensor
    low: float = -1.0
    high: float = 1.0

    def detach(self) -> TanhGaussian:
        return replace(self, mean=self.mean.detach(), log_std=self.log_std.detach())

    def repeated(self) -> TanhGaussian:
        """With an axis before the action's, along which many actions can be drawn or judged."""
        return replace(self, mean=self.mean.unsqueeze(-2), log_std=self.log_std.unsqueeze(-2))

    def median(self) -> Tensor:
        """The action of the mean u, `[..., A]`, which evaluation takes."""
        return self._to_box(self.mean.tanh())

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `[..., A]` from standard normals of that shape, and the log-density `[...]` of tanh(u).

        That density is of actions in units of half the box, so that entropies don't depend on the box.
        """
        u = self.mean + self.log_std.exp() * noise
        return self._to_box(u.tanh()), self._log_density(noise, u)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density `[...]` of actions `[..., A]`; those nearer than 1e-6 to the box's edge count as so near."""
        inside = (2 * action - (self.high + self.low)) / (self.high - self.low)
        u = inside.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
        density = self._log_density((u - self.mean) * (-self.log_std).exp(), u)
        return density - action.shape[-1] * math.log((self.high - self.low) / 2)

    def _to_box(self, x: Tensor) -> Tensor:
        return x * ((self.high - self.low) / 2) + (self.high + self.low) / 2

    def _log_density(self, noise: Tensor, u: Tensor) -> Tensor:
        """log N(noise) - log std - log(1 - tanh^2 u), the last as 2 (log 2 - u - softplus(-2 u)), which can't overflow."""
        normal = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return (normal - 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))).sum(-1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the actions, `[..., A]` each, by Gauss and Hermite's rule with 32 nodes."""
        nodes, weights = (torch.as_tensor(x).to(self.mean) for x in np.polynomial.hermite_e.hermegauss(32))
        weights = weights / weights.sum()
        values = (self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes).tanh()
        mean = (values * weights).sum(-1)
        variance = ((values - mean.unsqueeze(-1)).square() * weights).sum(-1)
        return self._to_box(mean), variance.sqrt() * ((self.high - self.low) / 2)


class TanhGaussianActor(nn.Module):
    """pi(.|s), a `TanhGaussian` whose mean and log deviation are the two halves of an MLP's output.

    Args:
        log_std: bounds of the log deviation.
        options: further arguments of `MLP`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        low: float,
        high: float,
        log_std: tuple[float, float] = (-20.0, 2.0),
        **options: Any,
    ) -> None:
        super().__init__()
        self.mlp = MLP(seeds, [obs_dim, *hidden, 2 * action_dim], name="actor", **options)
        self.bounds, self.box = log_std, (low, high)

    def forward(self, obs: Tensor) -> TanhGaussian:
        """The distribution at `[lanes, batch, obs]`."""
        mean, log_std = self.mlp(obs).chunk(2, -1)
        return TanhGaussian(mean, self.rescale(log_std).clamp(*self.bounds), *self.box)

    def rescale(self, log_std: Tensor) -> Tensor:
        """What is done to the network's log deviation before it is clipped; relatives replace it."""
        return log_std


_UNCOMPILED: list[tuple[type, str]] = []


def keep_uncompiled(cls: type, name: str) -> None:
    """Declare a method that a compiler of tensor code has nothing to gain from, or can't read."""
    _UNCOMPILED.append((cls, name))


def leave_uncompiled() -> None:
    """Keep the compiler out of what was declared so; for an engine that compiles.

    Not done where the methods stand, since that imports the compiler, which would cost every process a second.
    """
    while _UNCOMPILED:
        cls, name = _UNCOMPILED.pop()
        setattr(cls, name, torch.compiler.disable(getattr(cls, name)))


def column(value: float | Tensor, axes: int = 1) -> Any:
    """A coefficient ready to multiply `[lanes, ...]` with `axes` further axes: a number stays, `[lanes]` gets axes."""
    return value.view(-1, *[1] * axes) if isinstance(value, Tensor) else value


def one_hot(index: Tensor, kinds: int, dtype: torch.dtype) -> Tensor:
    """`[..., kinds]` of zeros and, at the index, one; without the look at the values that PyTorch's function takes."""
    return (index.unsqueeze(-1) == torch.arange(kinds, device=index.device)).to(dtype)


def choose(logits: Tensor, coin: Tensor | None = None) -> Tensor:
    """Index of the likeliest kind; with a coin, uniform on [0, 1), a draw from softmax(logits). `[..., kinds]` to `[...]`."""
    if coin is None:
        return logits.argmax(-1)
    return (logits.double().softmax(-1).cumsum(-1)[..., :-1] <= coin.unsqueeze(-1)).sum(-1)


def target_of(network: nn.Module) -> Any:
    """A copy that no gradient reaches."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float | Tensor) -> None:
    """target <- (1 - tau) target + tau online; the rate may differ between lanes."""
    if isinstance(tau, Tensor):
        for slow, fast in zip(target.parameters(), online.parameters()):
            slow.lerp_(fast, column(tau, slow.ndim - 1).to(slow.dtype))
    else:
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015), or AdamW, as PyTorch computes them, with the moments as buffers of the agent.

    So a checkpoint of the agent holds its optimisers, and the step counts live on the device, where a captured graph
    can advance them. The rates may differ between lanes.

    Args:
        parameters: tensors `[lanes, ...]`.
        lr: one rate, or one per lane.
        weight_decay: decoupled from the gradient, as in AdamW (Loshchilov & Hutter 2019).
        clip: largest norm of a lane's gradient over all parameters; None: any.
        warmup: steps over which the rate grows linearly; the n-th has n / warmup of it.
        decay: steps over which the rate falls to zero along half a cosine; 0: it does not.
    """

    count: Tensor

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        clip: float | Tensor | None = None,
        warmup: int = 0,
        decay: int = 0,
    ) -> None:
        super().__init__()
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.clip, self.warmup, self.decay = weight_decay, clip, warmup, decay
        self.lane_rates = _lane_pairs(lr, weight_decay)  # read once: a graph can't wait for the host
        self.targets = [list(parameters)]  # inside a list: they belong to the networks, not to this module
        for i, p in enumerate(self.targets[0]):
            self.register_buffer(f"mean_{i}", torch.zeros_like(p))
            self.register_buffer(f"square_{i}", torch.zeros_like(p))
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))
        self._cached: list[list[Tensor]] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Adam:
        self._cached = []  # a change of device or type makes new buffers
        super()._apply(fn, recurse)
        return self

    def _moments(self) -> list[list[Tensor]]:
        if not self._cached:
            names = range(len(self.targets[0]))
            self._cached = [[getattr(self, f"{kind}_{i}") for i in names] for kind in ("mean", "square")]
        return self._cached

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss` (one number per lane: lanes are independent, so their sum serves)."""
        self.apply_gradients(torch.autograd.grad(loss.sum(), self.targets[0]))

    @torch.no_grad()
    def apply_gradients(self, gradients: Sequence[Tensor]) -> None:
        """One step along given gradients, in the order of the parameters."""
        if self.clip is not None:
            gradients = clip_by_lane(gradients, self.clip)
        # The operator goes through memory in order, whatever the strides: a transposed gradient would meet other weights.
        rows: list[list[Tensor]] = [list(self.targets[0]), [g.contiguous() for g in gradients], *self._moments()]
        self.count.add_(1)
        if not self.lane_rates:
            self._adam(rows, self.lr, self.weight_decay)
        for lane, (lr, weight_decay) in enumerate(self.lane_rates):
            self._adam([[tensor[lane] for tensor in row] for row in rows], lr, weight_decay)

    def _adam(self, rows: list[list[Tensor]], lr: Any, weight_decay: Any) -> None:
        parameters, gradients, means, squares = rows
        if self.warmup:  # a tensor: the host need not know the count
            lr = lr * (self.count / self.warmup).clamp(max=1)
        if self.decay:
            lr = lr * (0.5 + 0.5 * torch.cos(math.pi * ((self.count - 1) / self.decay).clamp(max=1)))
        # The operator behind torch.optim.AdamW(fused=True), called directly: it can be captured and compiled.
        torch._fused_adamw_(
            parameters,
            gradients,
            means,
            squares,
            [],
            [self.count] * len(parameters),
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )


keep_uncompiled(Adam, "_adam")  # one operator: nothing to fuse


def _lane_pairs(*values: float | Tensor) -> list[tuple[float, ...]]:
    """The values of each lane; empty where lanes share them all."""
    lanes = next((len(value) for value in values if isinstance(value, Tensor)), 0)
    return list(zip(*(v.tolist() if isinstance(v, Tensor) else [v] * lanes for v in values)))


def clip_by_lane(gradients: Sequence[Tensor], largest: float | Tensor) -> list[Tensor]:
    """Gradients `[lanes, ...]`, each lane's scaled down to norm `largest` over them all if it is longer."""
    norm = torch.stack([g.flatten(1).square().sum(-1) for g in gradients]).sum(0).sqrt()  # [lanes]
    scale = (largest / (norm + 1e-6)).clamp(max=1)  # the 1e-6 of torch.nn.utils.clip_grad_norm_
    return [g * column(scale, g.ndim - 1) for g in gradients]
