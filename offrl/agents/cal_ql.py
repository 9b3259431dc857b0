"""Cal-QL: CQL whose values may not be lowered below the return of the dataset's own behaviour.

Nakamoto et al., "Cal-QL: Calibrated Offline RL Pre-Training for Efficient Online Fine-Tuning", NeurIPS 2023 (arXiv
2303.05479), equation 5.1. CQL's values lie far below true returns, so that the first online returns look good and the policy
unlearns what it knew. Here the conservative term sees max(Q(s, a), G) at the policy's actions, G the discounted return of the
dataset's trajectory from that row on; so values below G are not lowered further. The update is that of corl-team/CORL
`finetune/cal_ql.py`, whose scores are the ones to compare with.

As in CORL, and unlike the authors' code, calibration ends at the switch to environment steps (conf/agent/cal_ql.yaml sets
`online.agent.calibrate=false`). With `calibrate=true` it goes on for the dataset's rows; rows of the replay are never
calibrated, since their returns are not known when they enter it (the authors' replay takes whole trajectories). The returns G
are computed once, so `discount` and `sparse_rewards` can't change then.

A trajectory ends with a termination, also where the dataset's episode goes on behind it (AntMaze's stays at its goal), since
no value of the rows before counts what follows.

Deviations: those of `cql.py`, but for the critics' depth, which is the same for both in CORL's fine-tuning. CORL's
`finetune/cal_ql.py` starts every layer of policy and critics, the output layers too, orthogonal with gain sqrt(2) and zero
biases; here the networks start as CQL's (critics' output layers with gain 0.01, the policy as `cql.Policy`). Trajectories are
the dataset's episodes, where the authors cut where successors don't match; the return of an episode that was cut off is the
truncated sum, as theirs, with the reward of its tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.cql import CQL, CQLConfig
from offrl.utils.errors import OffrlError

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class CalQLConfig(CQLConfig):
    calibrate: bool = True  # bound the policy's values in the conservative term by the dataset's returns
    sparse_rewards: bool = False  # a trajectory without success (all its rewards the least) returns r_min / (1 - gamma)


class CalQL(CQL):
    """CQL with max(Q(s, a), G(s)) in place of Q(s, a) at the policy's actions in the conservative term."""

    Config = CalQLConfig
    cfg: CalQLConfig

    def build(self) -> None:
        cfg = self.cfg
        # On the CPU whatever the default device: sizes are checked on one that has no numbers.
        largest = float(torch.as_tensor(cfg.discount, dtype=torch.float64, device="cpu").max())
        if cfg.calibrate and cfg.sparse_rewards and largest >= 1:
            raise ValueError(
                f"discount={largest:g} should be below 1 with agent.sparse_rewards=true, since a trajectory without success "
                "returns r_min / (1 - discount)."
            )
        super().build()

    def setup(self, dataset: OfflineDataset) -> None:
        """Compute G, `[lanes, N]` (`[1, N]` where lanes share gamma and rewards)."""
        gamma = torch.as_tensor(self.cfg.discount, dtype=torch.float64, device=dataset.device).reshape(-1, 1)
        returns = discounted_returns(dataset, gamma)
        if self.cfg.sparse_rewards:
            failed, least = failures(dataset)
            returns = torch.where(failed, least / (1 - gamma), returns)
        self.dataset_index = returns.to(dataset.rewards.dtype)

    @classmethod
    def check_online(cls, before: Any, after: Any, online: Any) -> None:
        for key in ("discount", "sparse_rewards"):
            annealed = key in online.anneal
            if after.calibrate and (annealed or getattr(before, key) != getattr(after, key)):
                raise OffrlError(
                    f"online.{'anneal' if annealed else 'agent'}.{key}: the returns that calibrate {cls.__name__} are those of "
                    "the offline half's settings; leave it out, or set online.agent.calibrate=false."
                )

    def lower_bounded(self, q_proposed: Tensor, batch: Batch) -> Tensor:
        """max(Q, G) at the 2 n actions of the policy; the n uniform ones stay. Rows of no dataset have no bound."""
        if not self.cfg.calibrate:
            return q_proposed
        if self.dataset_index is None:
            raise RuntimeError(
                "Cal-QL looks returns up in the dataset; call agent.setup(dataset) before the first update"
            )
        table = self.dataset_index.expand(len(batch.index), -1)
        known = table.gather(1, batch.index.clamp(min=0))
        bound = torch.where(batch.index >= 0, known, -torch.inf).to(q_proposed.dtype)
        n = self.cfg.actions
        of_policy = torch.maximum(q_proposed[..., n:], bound[:, None, :, None])
        return torch.cat([q_proposed[..., :n], of_policy], -1)


def rewards_of(dataset: OfflineDataset) -> Tensor:
    """`[L, N]` float64: rewards; L is 1, or the number of lanes where each has a task (`data.tasks`)."""
    return torch.atleast_2d(getattr(dataset, "lane_rewards", dataset.rewards)).double()


def trajectory_ends(dataset: OfflineDataset) -> tuple[Tensor, Tensor]:
    """The rows that end a trajectory, `[L, N]` bool: terminations and the episodes' last; and tails that count, `[L, E]` bool.

    A tail counts where the episode's last transition is no termination.
    """
    ends = torch.atleast_2d(getattr(dataset, "lane_terminations", dataset.terminations)) > 0
    last = dataset.offsets[1:] - 1
    tails = dataset.has_tail & ~ends[:, last]
    ends[:, last] = True
    return ends, tails


def discounted_returns(dataset: OfflineDataset, gamma: Tensor) -> Tensor:
    """`[max(K, L), N]` float64: sum of gamma^k r over the rest of each row's trajectory, for gammas `[K, 1]`.

    A trajectory ends with a termination or with its episode, whose tail's reward counts behind the last row. L is as in
    `rewards_of`. After j doublings a row has the sum over its next 2^j timesteps.
    """
    reward, (ends, tails), last = rewards_of(dataset), trajectory_ends(dataset), dataset.offsets[1:] - 1
    total = reward.expand(max(len(gamma), len(reward)), -1).clone()
    total[:, last] += gamma * (dataset.tail_rewards.double() * tails)
    row = torch.arange(len(dataset), device=dataset.device)
    end = torch.where(ends, row, len(dataset)).flip(-1).cummin(-1).values.flip(-1)
    left = end - row + 1  # rows to the trajectory's end, its own included
    span, longest = 1, int(left.max())
    while span < longest:
        ahead = total.roll(-span, 1)
        total = total + torch.where(left > span, gamma**span * ahead, 0.0)
        span *= 2
    return total


def failures(dataset: OfflineDataset) -> tuple[Tensor, Tensor]:
    """Whether a row's trajectory has no success, `[L, N]` bool, and the least reward `[L, 1]` float64, which is no success."""
    reward, (ends, tails), last = rewards_of(dataset), trajectory_ends(dataset), dataset.offsets[1:] - 1
    least = reward.amin(-1, keepdim=True)
    success = reward > least
    success[:, last] |= tails & (dataset.tail_rewards > least)
    trajectory = ends.long().cumsum(-1) - ends.long()  # number of ends before the row
    successes = torch.zeros_like(reward).scatter_add_(-1, trajectory, success.to(reward.dtype))
    return successes.gather(-1, trajectory) == 0, least
