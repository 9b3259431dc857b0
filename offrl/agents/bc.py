"""Behaviour cloning: regress the dataset's actions.

The deterministic variant of the offline RL tables: pi(s) = tanh MLP, loss the mean squared error over batch and action
dimensions, as in corl-team/CORL `any_percent_bc.py` at 100 percent. Discrete actions are cloned by cross-entropy.

Deviations: none for continuous actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offrl.agent import Agent, Batch
from offrl.nets import MLP, Adam, DeterministicActor, choose


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


class BC(Agent):
    """pi <- argmin E_D (pi(s) - a)^2."""

    Config = BCConfig
    takes_discrete = True

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.waves = 0
        if spec.discrete:
            self.actor: MLP | DeterministicActor = MLP(
                spec.seeds, [spec.obs_dim, *cfg.hidden, spec.action_dim], name="actor"
            )
        else:
            box = (spec.action_low, spec.action_high)
            self.actor = DeterministicActor(spec.seeds, spec.obs_dim, spec.action_dim, cfg.hidden, *box)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.lr)

    def act(self, obs: Tensor) -> Tensor:
        out = self.actor(obs)
        return out.argmax(-1) if self.spec.discrete else out

    def memory(self, envs: int) -> Memory:
        self.waves += 1
        return Memory(f"bc/act/{self.waves}")

    def observe(self, memory: Memory, action: Tensor, reward: Tensor) -> Memory:
        return Memory(memory.name, memory.time + 1)

    @torch.no_grad()
    def select_action(self, obs: Tensor, memory: Memory | None = None) -> Tensor:
        if not (self.spec.discrete and self.cfg.sample_actions and memory):
            return super().select_action(obs, memory)
        coin = self.random.uniform(f"{memory.name}/{memory.time}", obs.shape[1:2])
        return choose(self.actor(self.normalize(obs)), coin)

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
        return self.actor(obs).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
