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

Deviations: those of `cql.py`. Trajectories are the dataset's episodes, where the authors cut where successors don't match; the
return of an episode that was cut off is the truncated sum, as theirs.
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
    sparse_rewards: bool = False  # an episode without success (all its rewards the least) returns r_min / (1 - gamma)


class CalQL(CQL):
    """CQL with max(Q(s, a), G(s)) in place of Q(s, a) at the policy's actions in the conservative term."""

    Config = CalQLConfig
    cfg: CalQLConfig

    def setup(self, dataset: OfflineDataset) -> None:
        """Compute G, `[lanes, N]` (`[1, N]` where lanes share gamma)."""
        gamma = torch.as_tensor(self.cfg.discount, dtype=torch.float64, device=dataset.device).reshape(-1, 1)
        returns = discounted_returns(dataset, gamma)
        if self.cfg.sparse_rewards:
            least = dataset.rewards.min()
            successes = torch.zeros(dataset.episodes, device=dataset.device)
            successes.index_add_(0, dataset.episode_of_row, (dataset.rewards > least).float())
            failed = (successes == 0)[dataset.episode_of_row]
            returns = torch.where(failed, least.double() / (1 - gamma), returns)
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


def discounted_returns(dataset: OfflineDataset, gamma: Tensor) -> Tensor:
    """`[K, N]` float64: sum of gamma^k r over the rest of each row's episode, a tail's reward included, for gammas `[K, 1]`.

    After j doublings a row has the sum over its next 2^j timesteps.
    """
    reward, last = dataset.rewards.double(), dataset.offsets[1:] - 1
    total = reward.expand(len(gamma), -1).clone()
    total[:, last] += gamma * dataset.tail_rewards.double()  # zero where there is no tail
    left = dataset.lengths[dataset.episode_of_row] - dataset.timesteps  # rows to the episode's end, its own included
    span = 1
    while span < int(dataset.lengths.max()):
        ahead = total.roll(-span, 1)
        total = total + torch.where(left > span, gamma**span * ahead, 0.0)
        span *= 2
    return total
