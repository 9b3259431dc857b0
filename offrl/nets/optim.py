"""The optimiser and the moving average of targets, with a lane axis."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from offrl.nets.lanes import no_compile, per_lane

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def make_target(network: NetworkT) -> NetworkT:
    """A copy without gradients, for a target network."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float | Tensor) -> None:
    """target <- (1 - tau) target + tau online; tau may be one number per lane."""
    if isinstance(tau, Tensor):
        for slow, fast in zip(target.parameters(), online.parameters()):
            slow.lerp_(fast, per_lane(tau, slow.ndim - 1).to(slow.dtype))
    else:
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015), or AdamW, as PyTorch computes them, with the moments as buffers of the agent.

    So a checkpoint of the agent holds its optimisers, and the step count lives on the device, where a captured graph
    can advance it.

    Args:
        parameters: tensors `[lanes, ...]`.
        lr: learning rate, one number or one per lane.
        weight_decay: coefficient of decoupled weight decay, as in AdamW (Loshchilov & Hutter 2019); may differ by lane.
        clip: maximum norm of a lane's gradient over all parameters; None: no clipping.
        warmup: steps of linear warm-up; step n uses n / warmup of the learning rate.
        decay: steps of cosine decay of the learning rate to zero; 0: none.
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
        self.lane_rates = _lane_pairs(lr, weight_decay)  # read once: a captured graph has no copies to the host
        self.targets = [list(parameters)]  # inside a list, so that they are not registered as this module's
        for i, p in enumerate(self.targets[0]):
            for name in ("mean", "square"):
                self.register_buffer(f"{name}_{i}", torch.zeros(p.shape, dtype=p.dtype, device=p.device))
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))
        self._cached: list[list[Tensor]] = []
        self.watch(None)

    def watch(self, tensor: Tensor | None) -> None:
        """From now on, `step` also keeps the gradient of each loss by this tensor, in `watched_gradients`; None: of nothing."""
        self.watched: list[Tensor] = [] if tensor is None else [tensor]
        self.watched_gradients: list[Tensor] = []

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
        """One descent step on `loss` `[lanes]`; lanes are independent, so the gradient of their sum is that of each."""
        if not self.watched:
            self.apply_gradients(torch.autograd.grad(loss.sum(), self.targets[0]))
            return
        *gradients, by_watched = torch.autograd.grad(
            loss.sum(), [*self.targets[0], *self.watched], allow_unused=True, materialize_grads=True
        )
        self.watched_gradients.append(by_watched)
        self.apply_gradients(gradients)

    @torch.no_grad()
    def apply_gradients(self, gradients: Sequence[Tensor]) -> None:
        """One step along given gradients, in the order of the parameters."""
        if self.clip is not None:
            gradients = clip_by_lane(gradients, self.clip)
        # The fused operator ignores strides: a transposed gradient would be paired with the wrong weights.
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


no_compile(Adam, "_adam")  # one operator: nothing to fuse


def _lane_pairs(*values: float | Tensor) -> list[tuple[float, ...]]:
    """Each lane's values; empty if all lanes share them."""
    lanes = next((len(value) for value in values if isinstance(value, Tensor)), 0)
    return list(zip(*(v.tolist() if isinstance(v, Tensor) else [v] * lanes for v in values)))


def clip_by_lane(gradients: Sequence[Tensor], largest: float | Tensor) -> list[Tensor]:
    """Gradients `[lanes, ...]`, scaled so that the norm of each lane's gradient over all tensors is at most `largest`."""
    norm = torch.stack([g.flatten(1).square().sum(-1) for g in gradients]).sum(0).sqrt()  # [lanes]
    scale = (largest / (norm + 1e-6)).clamp(max=1)  # the 1e-6 of torch.nn.utils.clip_grad_norm_
    return [g * per_lane(scale, g.ndim - 1) for g in gradients]
