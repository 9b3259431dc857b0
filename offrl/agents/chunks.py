"""Chunks of actions: a policy decides on K actions at once, and carries them out before it looks again.

Li, Zhou & Levine, "Reinforcement Learning with Action Chunking", NeurIPS 2025 (arXiv 2507.07969); authors' code
ColinQiyangLi/qc. A chunk is one action of K A numbers. Its critic is backed up over K steps, without the bias that n-step
returns have off policy, since it sees all actions on the way.

Deviation: rewards behind the first mask of 0 in a chunk do not count. The authors add them up, which matters where a dataset's
trajectories run on behind a success.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from offrl.agents.base import Batch, Spec, WindowBatch
from offrl.agents.recurrent import ActingState


@dataclass(kw_only=True)
class ChunkState(ActingState):
    """What is carried through a batch of episodes.

    Attributes:
        chunk: `[lanes, envs, K, A]` the actions that are being carried out; None before the first timestep.
    """

    chunk: Tensor | None = None


@dataclass(eq=False, repr=False)
class ChunkBatch(Batch):
    """Transitions whose actions `[lanes, batch, K A]` are chunks.

    Attributes:
        valid: `[lanes, batch, K A]` float, 0 where the episode was over; complete: `[lanes, batch]` float, 0 where it was
            over within the chunk.
    """

    valid: Tensor = field(init=False)
    complete: Tensor = field(init=False)


def chunk_spec(spec: Spec, length: int) -> Spec:
    """The Spec of an agent whose action is `length` actions, one behind the other."""
    low, high = (bound * length if isinstance(bound, tuple) else bound for bound in (spec.action_low, spec.action_high))
    return replace(spec, action_dim=spec.action_dim * length, action_low=low, action_high=high)


def chunked(batch: WindowBatch, discount: Tensor | float) -> ChunkBatch:
    """One transition for each window of K timesteps `[lanes, batch, K, ...]`.

    Its observation is that of the first timestep, its next one what follows the last; the reward is the sum of gamma^i r_i
    up to the first mask of 0, the mask the product of all.

    Args:
        discount: gamma, broadcast against `[lanes, batch]`.
    """
    length, width = batch.action.shape[2:]
    total, alive = torch.zeros_like(batch.reward[:, :, 0]), torch.ones_like(batch.mask[:, :, 0])
    for i in range(length):
        total = total + discount**i * alive * batch.reward[:, :, i]
        alive = alive * batch.mask[:, :, i]
    return ChunkBatch.of(
        {
            "obs": batch.obs[:, :, 0],
            "next_obs": batch.next_obs[:, :, -1],
            "action": batch.action.flatten(2),
            "reward": total,
            "mask": alive,
            "index": batch.index,
            "valid": batch.valid.repeat_interleave(width, -1),
            "complete": batch.valid[:, :, -1],
        }
    )
