"""Flow BC: behaviour cloning by flow matching, which clones actions with many modes too.

The behaviour half of FQL: Park, Li & Levine, "Flow Q-Learning", ICML 2025 (arXiv 2502.02538), authors' code seohongpark/fql. A
network learns the velocity of a flow from noise to the dataset's actions; acting draws noise and follows the flow.

Deviations: the authors have no such agent, and take the flow of their IFQL with N = 1; the dataset's actions are not moved
to a distance of 1e-5 from their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import ActingState, Batch, RecurrentAgent
from offrl.nets import Adam, FlowPolicy


@dataclass
class FlowBCConfig:
    flow_steps: int = 10  # M, number of Euler steps
    lr: float = 3e-4  # learning rate
    hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the hidden layers
    sample_actions: bool = True  # act by a sample; false: by the action of the noise z = 0
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"flow_steps": 3}  # settings of the contract tests


class FlowBC(RecurrentAgent[FlowBCConfig]):
    """v <- argmin E |v(s, (1 - t) x_0 + t a, t) - (a - x_0)|^2; the action is the flow's end."""

    Config = FlowBCConfig
    stream = "flow_bc"
    uses_history = False
    samples_continuous = True

    def build(self) -> None:
        cfg = self.cfg
        self.flow = FlowPolicy.of(self.spec, cfg.hidden, cfg.flow_steps, activation="gelu", glorot=True)
        self.optimizer = Adam(self.flow.parameters(), cfg.lr)

    def act(self, obs: Tensor, state: ActingState | None = None) -> Tensor:
        """The flow's action of noise z, which is zero without a state."""
        return self.box.from_unit(self.flow.sample(obs, self.noise(obs, state)))

    def noise(self, obs: Tensor, state: ActingState | None) -> Tensor:
        """z `[lanes, n, A]`."""
        noise = self.acting_noise(obs, state, self.spec.action_dim)
        return torch.zeros_like(obs[..., :1]).expand(-1, -1, self.spec.action_dim) if noise is None else noise

    def flow_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: squared error of flow matching, averaged over batch and action dimensions."""
        return self.flow.error(batch.obs, self.box.to_unit(batch.action), self.random).mean((-2, -1))

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.flow_loss(batch)
        self.optimizer.step(loss)
        return {"flow_loss": loss}
