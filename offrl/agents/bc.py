"""BC: behaviour cloning, regression of the dataset's actions.

The deterministic variant of the offline RL tables: pi(s) is an MLP with a tanh output, and the loss is the squared error,
averaged over batch and action dimensions, as in corl-team/CORL `any_percent_bc.py` at 100 percent. Discrete actions are
cloned by cross-entropy.

Deviations: none for continuous actions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import MLP, Adam, DeterministicActor, categorical_log_prob


@dataclass
class BCConfig:
    lr: float = 3e-4  # learning rate
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    sample_actions: bool = False  # discrete actions: sample from the policy instead of taking the most likely one
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class BC(RecurrentAgent[BCConfig]):
    """pi <- argmin E_D (pi(s) - a)^2."""

    Config = BCConfig
    takes_discrete = True
    stream = "bc"
    uses_history = False

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.actor: MLP | DeterministicActor
        if spec.discrete:
            self.actor = MLP(spec.seeds, [spec.obs_dim, *cfg.hidden, spec.action_dim], name="actor")
        else:
            self.actor = DeterministicActor.of(spec, cfg.hidden)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.lr)

    def act(self, obs: Tensor, state: ActingState | None = None) -> Tensor:
        out = self.actor(obs)
        return self.discrete_action(out, state) if self.spec.discrete else out

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-probability of discrete actions `[lanes, n]`; the continuous policy has no density."""
        return categorical_log_prob(self.actor(obs), action) if self.spec.discrete else super().log_prob(obs, action)

    def bc_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: squared error averaged over batch and action dimensions, or cross-entropy."""
        if self.spec.discrete:
            return -self.log_prob(batch.obs, batch.action).mean(-1)
        return (self.act(batch.obs) - batch.action).square().mean((-2, -1))

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.bc_loss(batch)
        self.actor_optimizer.step(loss)
        return {"bc_loss": loss}
