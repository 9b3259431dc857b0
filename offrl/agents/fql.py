"""FQL: flow Q-learning, a one-step policy that maximises Q and stays close to a flow that clones the data.

Park, Li & Levine, "Flow Q-Learning", ICML 2025 (arXiv 2502.02538); authors' code seohongpark/fql, whose update this is step for
step. A flow, trained by cloning alone, maps noise z to an action in M Euler steps. The policy mu(s, z) makes the action in one
step; it is pulled towards the flow's action of the same z and pushed to larger Q. It acts, and gives the target's actions; in
an environment it explores by its own samples, without further noise.

As in the authors' code: all losses are of the parameters before the step; the target critics average the critics from before
their step; the distance is of mu before it is clipped to the box, Q sees it after; evaluation draws z at every timestep.

Deviations. By default alpha = 1 and Q is normalised, as the authors advise for new tasks; their tables have an alpha for each
task and don't normalise (conf/agent/fql.yaml). Distances are in units of half the box. Beside the mean and the minimum of two
critics, the target can be mean - `pessimism` std of many, as in ColinQiyangLi/qam. The dataset's actions are not moved to a
distance of 1e-5 from their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.chunks import ChunkBatch
from offrl.agents.flow_bc import FlowBC, FlowBCConfig
from offrl.nets import MLP, Adam, Critics, Pooling, make_target, per_lane, polyak, pool
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class FQLConfig(FlowBCConfig):
    alpha: float = 1.0  # weight of the distance from the flow's action
    normalize_q: bool = True  # divide Q by its mean absolute value in the policy's loss
    target: Pooling = "mean"  # the target's value of the critics: mean, min, or lcb, mean - pessimism std
    pessimism: float = 0.5  # weight of the std in lcb
    members: int = 2  # number of critics
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    critic_norm: bool = True  # layer normalisation after the critics' activations


class FQL(FlowBC):
    """mu <- argmin E [alpha |mu(s, z) - flow(s, z)|^2 - Q(s, mu(s, z))], flow cloned, Q backed up with mu."""

    Config = FQLConfig
    cfg: FQLConfig
    stream = "fql"

    def build(self) -> None:
        super().build()
        spec, cfg = self.chunk, self.cfg
        sizes = [spec.obs_dim + spec.action_dim, *cfg.hidden, spec.action_dim]
        self.actor = MLP(spec.seeds, sizes, name="actor", activation="gelu", glorot=True)
        options = {"norm": cfg.critic_norm, "activation": "gelu", "glorot": True}
        self.critics = Critics.of(spec, cfg.hidden, cfg.members, **options)
        self.critics_target = make_target(self.critics)
        self.optimizer = Adam([*self.flow.parameters(), *self.actor.parameters(), *self.critics.parameters()], cfg.lr)

    def setup(self, dataset: OfflineDataset) -> None:
        """Refuse chunks that no episode holds, of which the critics would learn nothing."""
        longest = int(dataset.lengths.max())
        if longest < self.cfg.action_chunk:
            raise OffrlError(
                f"agent.action_chunk={self.cfg.action_chunk} is longer than the dataset's longest episode, of {longest} "
                "transitions, so that the critics would learn nothing; make it shorter."
            )

    def of_noise(self, obs: Tensor, noise: Tensor) -> Tensor:
        """mu(s, z) clipped to the box."""
        return self.chunk_box.from_unit(self.one_step(obs, noise).clamp(-1, 1))

    @torch.no_grad()
    def explore(self, obs: Tensor, random: LaneRandom) -> Tensor:
        """mu(s, z) of a new z at every environment step."""
        noise = random.normal("explore", obs.new_empty(*obs.shape[:2], self.spec.action_dim))
        return self.within_bounds(self.box.from_unit(self.one_step(self.normalize(obs), noise).clamp(-1, 1)))

    def one_step(self, obs: Tensor, noise: Tensor) -> Tensor:
        """mu(s, z) `[lanes, n, A]` in units of half the box, not clipped."""
        return self.actor(torch.cat([obs, noise], -1))

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma^K (1 - d) Q'(s', mu(s', z)), with K = 1 without chunks."""
        noise = self.random.normal("target_action", batch.action)
        action = self.of_noise(batch.next_obs, noise)
        next_q = pool(self.critics_target(batch.next_obs, action), self.cfg.target, self.cfg.pessimism)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) ** self.cfg.action_chunk * next_q

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: squared error to the target value, averaged over batch and critics; 0 of chunks that are cut short."""
        squares = (self.critics(batch.obs, batch.action) - self.target_value(batch).unsqueeze(1)).square()
        return (squares * batch.complete.unsqueeze(1) if isinstance(batch, ChunkBatch) else squares).mean((-2, -1))

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: alpha mean (mu(s, z) - flow(s, z))^2 - mean Q(s, mu(s, z)), and metrics."""
        noise = self.random.normal("distill", batch.action)
        with torch.no_grad():
            cloned = self.flow.sample(batch.obs, noise)
        action = self.one_step(batch.obs, noise)
        distance = (action - cloned).square().mean((-2, -1))
        q = self.critics(batch.obs, self.chunk_box.from_unit(action.clamp(-1, 1)), frozen=True).mean(
            1
        )  # [lanes, batch]
        scale = 1 / q.detach().abs().mean(-1) if self.cfg.normalize_q else 1.0
        loss = self.cfg.alpha * distance - scale * q.mean(-1)
        return loss, {"actor_loss": loss, "distill_loss": distance, "q": q.mean(-1)}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        batch = self.transitions(batch, per_lane(self.cfg.discount))
        critic_loss, flow_loss = self.critic_loss(batch), self.flow_loss(batch)
        policy_loss, metrics = self.policy_loss(batch)
        polyak(self.critics_target, self.critics, self.cfg.tau)  # the authors average before the step
        self.optimizer.step(critic_loss + flow_loss + policy_loss)
        return {"critic_loss": critic_loss, "flow_loss": flow_loss, **metrics}
