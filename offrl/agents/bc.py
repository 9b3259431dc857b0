"""Behaviour cloning: regress the dataset's actions.

The deterministic variant of the offline RL tables: pi(s) = tanh MLP, loss the mean squared error over batch and action
dimensions, as in corl-team/CORL `any_percent_bc.py` at 100 percent. Discrete actions are cloned by cross-entropy.

Deviations: none for continuous actions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offrl.agents.base import Batch, RememberingAgent
from offrl.nets import MLP, Adam, DeterministicActor, categorical_log_prob


@dataclass
class BCConfig:
    lr: float = 3e-4  # of the actor
    hidden: tuple[int, ...] = (256, 256)  # widths of the actor's hidden layers
    sample_actions: bool = False  # discrete actions: draw from the policy instead of taking the likeliest
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


@dataclass
class Memory:
    """Steps behind us, and the name of the coins that discrete actions toss."""

    name: str
    time: int = 0


class BC(RememberingAgent):
    """pi <- argmin E_D (pi(s) - a)^2."""

    Config = BCConfig
    takes_discrete = True
    stream = "bc"

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        if spec.discrete:
            self.actor: MLP | DeterministicActor = MLP(
                spec.seeds, [spec.obs_dim, *cfg.hidden, spec.action_dim], name="actor"
            )
        else:
            box = (spec.action_low, spec.action_high)
            self.actor = DeterministicActor(spec.seeds, spec.obs_dim, spec.action_dim, cfg.hidden, *box)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.lr)

    def decide(self, obs: Tensor, memory: Memory) -> Tensor:
        out = self.actor(obs)
        return self.choose_action(out, memory) if self.spec.discrete else out

    def start(self, envs: int, name: str = "") -> Memory:
        return Memory(name)

    def memory(self, envs: int) -> Memory | None:
        """None, unless actions are drawn: then their coins have to differ from step to step."""
        return super().memory(envs) if self.spec.discrete and self.cfg.sample_actions else None

    def observe(self, memory: Memory | None, action: Tensor, reward: Tensor) -> Memory | None:
        return memory and Memory(memory.name, memory.time + 1)

    def bc_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean over batch and action dimensions."""
        if self.spec.discrete:
            return -self.log_prob(batch.obs, batch.action).mean(-1)
        return (self.act(batch.obs) - batch.action).square().mean((-2, -1))

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.bc_loss(batch)
        self.actor_optimizer.step(loss)
        return {"bc_loss": loss.detach()}

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """Log-probability of discrete actions `[lanes, n]`; a deterministic continuous policy has none."""
        if not self.spec.discrete:
            return super().log_prob(obs, action)
        return categorical_log_prob(self.actor(obs), action)
