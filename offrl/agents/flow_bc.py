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

from offrl.agents.base import Batch, WindowBatch
from offrl.agents.chunks import ChunkBatch, ChunkState, chunk_spec, chunked
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import Adam, FlowPolicy
from offrl.nets.box import ActionBox


@dataclass
class FlowBCConfig:
    flow_steps: int = 10  # M, number of Euler steps
    lr: float = 3e-4  # learning rate
    hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the hidden layers
    sample_actions: bool = True  # act by a sample; false: by the action of the noise z = 0
    action_chunk: int = 1  # K, actions that the policy decides on at once and carries out (offrl/agents/chunks.py)
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"flow_steps": 3}  # settings of the contract tests
    least: ClassVar[dict[str, int]] = {"action_chunk": 1}


class FlowBC(RecurrentAgent[FlowBCConfig]):
    """v <- argmin E |v(s, (1 - t) x_0 + t a, t) - (a - x_0)|^2; the action is the flow's end.

    With `action_chunk` K above 1, a stands for K actions in a row.
    """

    Config = FlowBCConfig
    stream = "flow_bc"
    uses_history = False
    uses_reward = False
    samples_continuous = True

    def build(self) -> None:
        cfg = self.cfg
        self.chunk = chunk_spec(self.spec, cfg.action_chunk)
        if cfg.action_chunk > 1:
            self.window, self.uses_history = cfg.action_chunk, True
            self.wide_box = ActionBox(self.chunk.action_low, self.chunk.action_high)
        self.flow = FlowPolicy.of(self.chunk, cfg.hidden, cfg.flow_steps, activation="gelu", glorot=True)
        self.optimizer = Adam(self.flow.parameters(), cfg.lr)

    @property
    def chunk_box(self) -> ActionBox:
        """The box of chunks."""
        return self.wide_box if self.cfg.action_chunk > 1 else self.box

    # ---- acting -----------------------------------------------------------------------------------------------

    def act(self, obs: Tensor, state: ActingState | None = None) -> Tensor:
        """The action `[lanes, n, A]`; with chunks the next one of the last chunk, if it holds one."""
        if self.cfg.action_chunk == 1:
            return self.decide(obs, state)
        place = state.timestep % self.cfg.action_chunk if state else 0
        chunk = state.chunk if isinstance(state, ChunkState) and place else None
        if chunk is None:
            chunk = self.decide(obs, state).unflatten(-1, (self.cfg.action_chunk, self.spec.action_dim))
        if isinstance(state, ChunkState):
            state.chunk = chunk
        return chunk[:, :, place]

    def decide(self, obs: Tensor, state: ActingState | None) -> Tensor:
        """The policy's actions `[lanes, n, K A]` for what it sees now, of noise z, which is zero without a state."""
        return self.of_noise(obs, self.noise(obs, state))

    def of_noise(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The actions `[lanes, n, K A]` that z `[lanes, n, K A]` makes."""
        return self.chunk_box.from_unit(self.flow.sample(obs, noise))

    @property
    def sample_width(self) -> int:
        return self.chunk.action_dim

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The action that z makes; of a chunk the first one."""
        return self.of_noise(obs, noise)[..., : self.spec.action_dim]

    def noise(self, obs: Tensor, state: ActingState | None) -> Tensor:
        """z `[lanes, n, K A]`."""
        noise = self.acting_noise(obs, state, self.chunk.action_dim)
        return torch.zeros_like(obs[..., :1]).expand(-1, -1, self.chunk.action_dim) if noise is None else noise

    def init(self, envs: int) -> ActingState:
        return ChunkState() if self.cfg.action_chunk > 1 else super().init(envs)

    # ---- learning ---------------------------------------------------------------------------------------------

    def flow_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: squared error of flow matching, averaged over batch and action dimensions."""
        error = self.flow.error(batch.obs, self.chunk_box.to_unit(batch.action), self.random)
        return (error * batch.valid if isinstance(batch, ChunkBatch) else error).mean((-2, -1))

    def transitions(self, batch: Batch, discount: Tensor | float = 1.0) -> Batch:
        """The batch that the losses take: chunks for actions, if there are any; `discount` is that of their rewards."""
        return chunked(batch, discount) if isinstance(batch, WindowBatch) else batch

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.flow_loss(self.transitions(batch))
        self.optimizer.step(loss)
        return {"flow_loss": loss}
