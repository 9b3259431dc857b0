"""PRDC: TD3+BC whose actor is regularised towards the nearest state-action pair of the whole dataset.

Ran et al., "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning", ICML 2023 (arXiv 2306.06569);
authors' code LAMDA-RL/PRDC, whose update this is step for step. TD3+BC regresses pi(s) to the action stored with s, good or
bad. PRDC finds the pair (s_j, a_j) nearest to (s, pi(s)), with states weighted by beta, and regresses pi(s) to a_j: an action
that was taken in a similar state. beta -> infinity is TD3+BC; with beta = 0 the action need only occur somewhere.

Deviations, none of which changes a number: the neighbours come from our own exact index (`offrl.nets.neighbors`) instead of a
KD-tree; and those of `td3_bc.py`. As in the authors' code, and unlike the paper's distance, the regulariser is the squared
distance of the actions alone, averaged over their dimensions; `k` uses the k-th neighbour alone, not the mean of k; lambda
uses Q_1 at the policy's action.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.nets.neighbors import Neighbors
from offrl.utils.errors import OffrlError

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class PRDCConfig(TD3BCConfig):
    beta: float = 2.0  # weight of states against actions in the distance of pairs
    k: int = 1  # rank of the neighbour (1 = the nearest)
    least: ClassVar[dict[str, int]] = {"k": 1, "beta": 0}


class PRDC(TD3BC):
    """max_pi E [lambda Q(s, pi(s)) - (pi(s) - a*)^2], a* the action of the pair nearest to (beta s, pi(s))."""

    Config = PRDCConfig
    cfg: PRDCConfig

    def setup(self, dataset: OfflineDataset) -> None:
        self.dataset_index = Neighbors(self.normalize(dataset.observations), dataset.actions), dataset.actions

    @classmethod
    def check_online(cls, before: Any, after: Any, online: Any) -> None:
        if online.recompute_every:
            raise OffrlError(
                f"online.recompute_every={online.recompute_every} can't go with {cls.__name__}, whose index holds the "
                "dataset's states as the offline half normalised them; leave it out."
            )

    def policy_regularizer(self, batch: Batch, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_DC `[lanes]`: mean squared distance to the nearest pair's action, which has no gradient."""
        if self.dataset_index is None:
            raise RuntimeError(
                "PRDC looks neighbours up in the dataset; call agent.setup(dataset) before the first update"
            )
        neighbors, dataset_action = self.dataset_index
        # Synthetic rows (index -1) are looked up by their observation.
        nearest = neighbors.query(batch.index, action.detach(), self.cfg.beta, self.cfg.k, batch.obs)
        loss = (action - dataset_action[nearest.rows]).square().mean((-2, -1))
        metrics = {
            "dc_loss": loss,
            "bc_loss": (action.detach() - batch.action).square().mean((-2, -1)),
            "other_row": (nearest.rows != batch.index).to(loss.dtype).mean(-1),
            "pair_distance": nearest.distance.mean(-1).to(loss.dtype),
            "list_hit_rate": nearest.from_list.to(loss.dtype).mean(-1),
        }
        return loss, metrics
