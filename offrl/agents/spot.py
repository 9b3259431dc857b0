"""SPOT: TD3 whose actor is regularised by the behaviour's density, which a variational autoencoder estimates.

Wu, Wu, Qiu, Wang & Long, "Supported Policy Optimization for Offline Reinforcement Learning", NeurIPS 2022 (arXiv 2202.06239).
The policy is kept where the behaviour's log-density is high, by the autoencoder's evidence lower bound at its own actions; the
density is fitted first and then fixed. The update is that of corl-team/CORL `finetune/spot.py`, as the authors'.

Training has two stages: `vae_updates` updates of the autoencoder, which count among the run's updates, then TD3's critics and
delayed actor. In an online phase lambda falls linearly and the optimisers begin anew (conf/agent/spot.yaml).

Deviations: those of `td3_bc.py`; one latent sample per action, as in every published setting (the importance-weighted bound is
left out); no dropout in the actor, of which the authors' locomotion runs have a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from offrl.agents.a2pr import VAE
from offrl.agents.base import Batch
from offrl.agents.td3_bc import TD3BC
from offrl.nets import Adam, Critics, DeterministicActor, make_target

DENSITY = 0  # phase of the first stage; those of the second are 1 and 2


@dataclass
class SPOTConfig:
    weight: float = 1.0  # lambda, weight of the negative log-density in the actor's loss
    kl_weight: float = 0.5  # weight of the KL divergence in the bound
    vae_updates: int = 100_000  # updates of the autoencoder before the first ones of critics and policy
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target networks
    policy_noise: float = 0.2  # std of the noise on target actions, in units of half the box
    noise_clip: float = 0.5  # bound of that noise, in the same units
    actor_lr: float = 1e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    vae_lr: float = 1e-3  # learning rate of the autoencoder
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    vae_hidden: tuple[int, ...] = (
        750,
        750,
    )  # widths of the hidden layers of the autoencoder's encoder and of its decoder
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"vae_updates": 3}  # settings of the contract tests
    toy: ClassVar[dict[str, Any]] = {"vae_updates": 300}  # with these it learns their toy task


class SPOT(TD3BC):
    """max_pi E [Q(s, pi(s)) / E|Q| - lambda (|g - pi(s)|^2 + kl_weight KL)], g the autoencoder's reconstruction of pi(s)."""

    Config = SPOTConfig
    cfg: SPOTConfig  # type: ignore[assignment]  # TD3+BC's settings without alpha
    actor_turn = 2

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.pretrain_updates = cfg.vae_updates
        self.actor = DeterministicActor.of(spec, cfg.hidden, last=1e-3)
        self.critics = Critics.of(spec, cfg.hidden, members=2, last=3e-3)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.vae = VAE(spec, cfg.vae_hidden)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.vae_optimizer = Adam(self.vae.parameters(), cfg.vae_lr)

    def phase(self, step: int) -> int:
        return DENSITY if step < self.cfg.vae_updates else 1 + (step - self.cfg.vae_updates) % self.period

    def negative_bound(self, obs: Tensor, action: Tensor, stream: str, frozen: bool = False) -> Tensor:
        """`[lanes]`: mean squared reconstruction error plus kl_weight KL(q(z | s, a) || N(0, 1)), over dimensions.

        Up to scale and a constant it is minus the evidence lower bound of log pi_behaviour(a | s). `stream` names the noise.
        """
        mean, log_std = self.vae.encode(obs, action, frozen)
        z = mean + log_std.exp() * self.random.normal(stream, mean)
        reconstruction = (self.vae.decode(obs, z, frozen) - action).square().mean((-2, -1))
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean((-2, -1))
        return reconstruction + self.cfg.kl_weight * kl

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: -mean Q_1(s, pi(s)) / mean |Q_1| + lambda negative bound, and metrics."""
        action = self.act(batch.obs)
        q = self.critics(batch.obs, action, member=0, frozen=True)
        bound = self.negative_bound(batch.obs, action, "spot/policy", frozen=True)
        loss = self.cfg.weight * bound - q.mean(-1) / q.detach().abs().mean(-1)
        return loss, {"actor_loss": loss, "q": q.mean(-1), "density_loss": bound}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        if phase != DENSITY:
            return super().update(batch, phase)
        loss = self.negative_bound(batch.obs, batch.action, "spot/vae")
        self.vae_optimizer.step(loss)
        return {"vae_loss": loss}
