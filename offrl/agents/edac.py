"""EDAC: SAC-N with diversified critics, so that few of them are as pessimistic as many.

An, Moon, Kim & Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble", NeurIPS 2021 (arXiv
2110.01548), section 4 and algorithm 1. Outside the data, critics whose gradients by the action are aligned agree, which the
policy can exploit. The added term makes the directions of dQ_i/da at the dataset's actions differ.

Deviations: those of `sac_n.py`. The term is the paper's, over all pairs of critics, as in CORL's `edac.py` and the authors'
present version; their first public version took a random subset of min(N, action dimensions) critics at each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.sac_n import SACN, SACNConfig


@dataclass
class EDACConfig(SACNConfig):
    eta: float = 1.0  # weight of the similarity of the critics' gradients
    toy: ClassVar[dict[str, Any]] = {"eta": 0.1}  # with these it learns their toy task


class EDAC(SACN):
    """SAC-N whose critics also minimise the cosine similarity of their gradients by the action."""

    Config = EDACConfig
    cfg: EDACConfig

    def build(self) -> None:
        if self.cfg.members < 2:
            raise ValueError(f"members={self.cfg.members} should be at least 2: one critic can't differ from itself.")
        super().build()

    def similarity(self, slope: Tensor) -> Tensor:
        """`[lanes]`: mean over the batch of sum_{i != j} <g_i, g_j> / (N - 1), g_i the direction of dQ_i/da (equation 4).

        Args:
            slope: dQ_i/da, `[lanes, members, batch, A]`.
        """
        direction = slope / (torch.linalg.vector_norm(slope, dim=-1, keepdim=True) + 1e-10)
        # |sum_i g_i|^2 - sum_i |g_i|^2 is the sum over ordered pairs i != j, from N products instead of N^2.
        pairs = direction.sum(1).square().sum(-1) - direction.square().sum((1, 3))
        return pairs.mean(-1) / (self.cfg.members - 1)

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: SAC-N's squared errors plus eta times the critics' similarity at the dataset's actions."""
        q, slope = self.critics.q_and_grad(batch.obs, batch.action)
        error = (q - target.unsqueeze(1)).square().mean(-1).sum(-1)
        similarity = self.similarity(slope)
        cosine = similarity / self.cfg.members  # the mean over pairs
        metrics = {"critic_loss": error, "q_data": q.mean((1, 2)), "cosine": cosine}
        return error + self.cfg.eta * similarity, metrics
