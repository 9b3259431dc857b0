"""Contrastive estimates of mutual information: critics of pairs, the InfoNCE loss, and gradient reversal.

van den Oord, Li & Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018 (arXiv 1807.03748).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from offrl.nets.lanes import per_lane
from offrl.nets.mlp import MLP


class PairCritic(nn.Module):
    """f_ij = <phi(context_i), psi(outcome_j)> / sqrt(size) for all pairs of a batch.

    Args:
        context, outcome: widths of the two inputs.
        hidden: widths of the hidden layers of phi and psi.
        size: width of the vectors whose inner product f is.
        name: name of the initial weights' random stream.
    """

    def __init__(
        self, seeds: Sequence[int], context: int, outcome: int, hidden: Sequence[int], size: int, name: str
    ) -> None:
        super().__init__()
        self.phi = MLP(seeds, [context, *hidden, size], name=f"{name}/phi")
        self.psi = MLP(seeds, [outcome, *hidden, size], name=f"{name}/psi")

    def forward(self, context: Tensor, outcome: Tensor) -> Tensor:
        """`[lanes, batch, context]` and `[lanes, batch, outcome]` to `[lanes, batch, batch]`."""
        phi, psi = self.phi(context), self.psi(outcome)
        return phi @ psi.transpose(1, 2) / math.sqrt(phi.shape[-1])


def info_nce(scores: Tensor) -> Tensor:
    """InfoNCE loss `[lanes]` of scores f_ij `[lanes, batch, batch]`: mean_i [log mean_j exp f_ij - f_ii].

    Its negative is a lower bound of the mutual information of the pairs, in nats, and at most log(batch).
    """
    log_mean = scores.logsumexp(-1) - math.log(scores.shape[-1])
    return (log_mean - scores.diagonal(dim1=1, dim2=2)).mean(-1)


def gradient_reversal(x: Tensor, weight: Tensor) -> Tensor:
    """The value of `x`, with a gradient that is multiplied by -weight (Ganin & Lempitsky 2015).

    Args:
        weight: a scalar, or `[lanes]`.
    """
    return x.detach() - (per_lane(weight, x.ndim - 1) if weight.ndim else weight) * (x - x.detach())
