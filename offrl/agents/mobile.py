"""MOBILE: MOPO's scheme, with the disagreement of the ensemble's Bellman targets as the penalty.

Sun, Zhang, Jia, Lin, Ye & Yu, "Model-Bellman Inconsistency for Model-based Offline Reinforcement Learning", ICML 2023; the
update is that of yihaosun1124/OfflineRL-Kit `mobile.py`, by the paper's first author. The model's rewards stay as they are.
Instead the critics' target of a synthetic row is lowered by c times the std, over the models, of the next state's value: where
models disagree about states that are worth the same, nothing is lost.

Deviations from OfflineRL-Kit: that of `mopo.py` in the log-density and the actor's learning rate; the models' next states are
clipped to the dataset's range where the rollouts' are; no maximum over next actions in the target, which only its Adroit
settings have. Kept from it: the target is clamped at 0 from below (`target_min`), which is wrong wherever the rewards to come
may sum below 0, and the penalty is not discounted. Without synthetic rows there is no penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.mopo import MOPO, MOPOConfig
from offrl.nets import per_lane


@dataclass
class MOBILEConfig(MOPOConfig):
    penalty: float = 0.5  # c, weight of the deviation of the models' next values
    draws: int = 10  # number of next states drawn from each model
    target_min: float | None = 0.0  # lower clamp of the critics' target, synthetic and real rows alike; None: no clamp
    backup_entropy: bool = False  # subtract alpha log pi(a'|s') from the target value
    least: ClassVar[dict[str, int]] = {"members": 1, "draws": 1}
    tiny: ClassVar[dict[str, Any]] = {"draws": 2}  # settings of the contract tests
    toy: ClassVar[dict[str, Any]] = {"target_min": None}  # their toy task has negative rewards


class MOBILE(MOPO):
    """y = max(0, r - c std_k E_{s' ~ model k} V(s') + gamma (1 - d) V(s')), the penalty in synthetic rows alone."""

    Config = MOBILEConfig
    cfg: MOBILEConfig
    needs_dynamics = True

    @torch.no_grad()
    def inconsistency(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: std over the models (ddof 1) of the mean over draws of min_i Q'_i(s', a'), a' ~ pi(.|s').

        0 in rows of the dataset, and for an ensemble of one.
        """
        if self.dynamics is None:
            return torch.zeros_like(batch.reward)
        raw_obs = batch.obs / self.obs_scale + self.obs_mean
        mean, std = (part.movedim(0, 1) for part in self.dynamics.next_gaussians(raw_obs, batch.action))
        if (models := mean.shape[1]) < 2:
            return torch.zeros_like(batch.reward)
        shape = (self.cfg.draws, models, batch.reward.shape[1])
        noise = self.random.normal("model", mean.new_empty(len(mean), *shape, mean.shape[-1]))
        drawn = self.dynamics.clip(mean.unsqueeze(1) + std.unsqueeze(1) * noise)  # [lanes, draws, models, batch, O]
        next_obs = self.normalize(drawn.flatten(1, 3))
        policy = self.actor(next_obs)
        action, _ = policy.sample(self.random.normal("model_action", policy.mean))
        value = self.critics_target(next_obs, action).amin(1).unflatten(-1, shape)
        return value.mean(1).std(1, correction=1) * (batch.index < 0)

    @torch.no_grad()
    def target_value(self, batch: Batch, alpha: Tensor) -> Tensor:
        """`[lanes, batch]`: r - c pen(s, a) + gamma (1 - d) min_i Q'_i(s', a'), clamped from below."""
        action, log_pi = self.actor(batch.next_obs).sample(self.random.normal("target", batch.action))
        next_value = self.critics_target(batch.next_obs, action).amin(1)
        if self.cfg.backup_entropy:
            next_value = next_value - per_lane(alpha) * log_pi
        reward = batch.reward - per_lane(self.cfg.penalty) * self.inconsistency(batch)
        target = reward + batch.mask * per_lane(self.cfg.discount) * next_value
        return target if self.cfg.target_min is None else target.clamp(min=per_lane(self.cfg.target_min))

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: squared error, averaged over batch and critics."""
        loss, metrics = super().critic_loss(batch, target)
        synthetic = (batch.index < 0).to(target.dtype)
        of_model = (target * synthetic).sum(-1) / synthetic.sum(-1).clamp(min=1)
        return loss / self.cfg.members, {**metrics, "target_synthetic": of_model}
