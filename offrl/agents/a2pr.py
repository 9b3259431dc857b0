"""A2PR: TD3+BC that is pulled to the better of the dataset's action and one that a generative model proposes.

Liu et al., "Adaptive Advantage-Guided Policy Regularization for Offline Reinforcement Learning", ICML 2024 (arXiv
2405.19909); authors' code ltlhuuu/A2PR, whose update this is step for step. A value network V says what a state is worth;
a conditional VAE learns to reproduce the dataset's actions with Q_1(s, a) > V(s); the policy is pulled to the VAE's
rendering g of its own action, or to a, whichever Q_1 prefers, and to neither where both are worth less than V(s).

Deviations, none of which changes the mathematics: the target's unused V(s') is not computed; Q_1(s, a) after the critics'
step is computed once for both gates; gates carry no gradient, and each loss asks for the gradients of its own networks
alone (the authors' actor step also fills the critics' and the VAE's, and erases them); the twin critics, and the two heads
of the encoder, are one network each; g and a are compared by Q_1 and not by Q_1 - V, in which V cancels.

Kept from the authors' code, where a reader may expect otherwise: the encoder sees the policy's action, not a sample of the
prior; the gradient also runs through g (`detach_reference` stops it); V is fitted to a minimum of four Q but gates compare
it with Q_1; V(s) is that before V's own step; the VAE learns from the first update on, without pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.nets import MLP, Adam, Critics, DeterministicActor, make_target, per_lane, polyak


@dataclass
class A2PRConfig(TD3BCConfig):
    alpha: float = 2.5  # weight of Q against the pull
    bc_weight: float = 1.0  # weight of the pull where its gate is open (the authors' `mask`; 0 leaves TD3, not TD3+BC)
    vae_weight: float = 1.0  # omega, weight of the VAE's reconstruction against half its KL divergence
    vae_adv_eps: float = 0.0  # advantage that an action must exceed for the VAE to learn it (0 in the authors' code)
    detach_reference: bool = False  # stop the gradient at the VAE's proposal (the authors' code lets it through)
    discount: float = 0.99  # gamma
    tau: float = 0.005  # rate of the targets, which move on actor updates
    policy_noise: float = 0.2  # deviation of the target action's noise, in units of half the box
    noise_clip: float = 0.5  # bound of that noise, same units
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    vae_lr: float = 1e-3
    hidden: tuple[int, ...] = (256, 256, 256)  # of the actor; critics and V have the last width once more
    vae_hidden: tuple[int, ...] = (750, 750)  # of the VAE's encoder and of its decoder
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class VAE(nn.Module):
    """Encoder (s, a) -> mean and log sigma of z, and decoder (s, z) -> action; z has twice the action's width."""

    def __init__(
        self, seeds: Sequence[int], obs_dim: int, action_dim: int, hidden: Sequence[int], low: float, high: float
    ) -> None:
        super().__init__()
        latent = 2 * action_dim
        # `multiple`: rows of 752 numbers instead of 750, which matrix products take a quarter slower.
        self.encoder = MLP(seeds, [obs_dim + action_dim, *hidden, 2 * latent], name="vae/encoder", multiple=16)
        self.decoder = MLP(seeds, [obs_dim + latent, *hidden, action_dim], name="vae/decoder", multiple=16)
        self.scale, self.centre = (high - low) / 2, (high + low) / 2

    def encode(self, obs: Tensor, action: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log sigma, `[lanes, batch, 2 A]` each."""
        mean, log_sigma = self.encoder(torch.cat([obs, action], -1), frozen=frozen).chunk(2, -1)
        return mean, log_sigma.clamp(-4, 15)

    def decode(self, obs: Tensor, z: Tensor, frozen: bool = False) -> Tensor:
        """`[lanes, batch, A]`, within the box of actions."""
        return self.decoder(torch.cat([obs, z], -1), frozen=frozen).tanh() * self.scale + self.centre


class A2PR(TD3BC):
    """max_pi E [lambda Q(s, pi(s)) - h (pi(s) - c)^2] with c the better of a and g(s, pi(s)), and h its gate.

    Of TD3+BC it keeps the policy, the smoothed target action and the delay; its losses are below.
    """

    Config = A2PRConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        sizes, box = (spec.obs_dim, spec.action_dim), (spec.action_low, spec.action_high)
        deep = (*cfg.hidden, *cfg.hidden[-1:])
        self.actor = DeterministicActor(spec.seeds, *sizes, cfg.hidden, *box)
        self.critics = Critics(spec.seeds, *sizes, deep, members=2)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.value = MLP(spec.seeds, [spec.obs_dim, *deep, 1], name="value")
        self.vae = VAE(spec.seeds, *sizes, cfg.vae_hidden, *box)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.value_optimizer = Adam(self.value.parameters(), cfg.value_lr)
        self.vae_optimizer = Adam(self.vae.parameters(), cfg.vae_lr)

    def backup(self, batch: Batch, critics: Critics, next_action: Tensor) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q_i(s', a~) of the given critics, without a gradient."""
        next_q = critics(batch.next_obs, next_action, frozen=True).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def reconstruct(
        self, obs: Tensor, action: Tensor, draw: str, frozen: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The VAE's g(s, mean + sigma eps) for a state and an action, with mean and log sigma; `draw` names eps."""
        mean, log_sigma = self.vae.encode(obs, action, frozen)
        z = mean + log_sigma.exp() * self.random.normal(draw, mean)
        return self.vae.decode(obs, z, frozen), mean, log_sigma

    def vae_loss(self, batch: Batch, value: Tensor, q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: omega (reconstruction of the actions with Q_1(s, a) > V(s)) + KL / 2; the KL is not gated."""
        action, mean, log_sigma = self.reconstruct(batch.obs, batch.action, "vae/data")
        gate = (q > value + per_lane(self.cfg.vae_adv_eps)).to(q.dtype)
        reconstruction = (gate * (action - batch.action).square().mean(-1)).mean(-1)
        kl = -0.5 * (1 + 2 * log_sigma - mean.square() - (2 * log_sigma).exp()).mean((-2, -1))
        loss = self.cfg.vae_weight * reconstruction + 0.5 * kl
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach(), "vae_gate": gate.mean(-1)}
        return loss, {"vae_loss": loss.detach(), **metrics}

    def reference(self, batch: Batch, action: Tensor, value: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the policy is pulled to, and whether it is.

        Returns:
            c `[lanes, batch, A]`, the better of the VAE's rendering of `action` and the dataset's action; booleans
            `[lanes, batch]`: c is the rendering, and one of the two is worth as much as the state.
        """
        action = action.detach() if self.cfg.detach_reference else action
        proposal, _, _ = self.reconstruct(batch.obs, action, "vae/policy", frozen=True)
        q_proposal = self.critics(batch.obs, proposal.detach(), member=0, frozen=True)
        generated = q_proposal >= q
        gate = (q_proposal >= value) | (q > value)
        return torch.where(generated.unsqueeze(-1), proposal, batch.action), generated, gate

    def policy_loss(self, batch: Batch, value: Tensor, q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: -lambda Q_1(s, pi(s)) + h (pi(s) - c)^2; `value` and `q` are V(s) and Q_1(s, a)."""
        action = self.act(batch.obs)
        q_policy = self.critics(batch.obs, action, member=0, frozen=True)
        lam = self.cfg.alpha / q_policy.detach().abs().mean(-1)
        reference, generated, gate = self.reference(batch, action, value, q)
        regularizer = (gate * (action - reference).square().mean(-1)).mean(-1) * self.cfg.bc_weight
        loss = regularizer - lam * q_policy.mean(-1)
        shares = {"generated": generated.to(q.dtype).mean(-1), "bc_gate": gate.to(q.dtype).mean(-1)}
        metrics = {"q": q_policy.detach().mean(-1), "lambda": lam, "bc_loss": regularizer.detach(), **shares}
        return loss, {"actor_loss": loss.detach(), **metrics}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        next_action = self.target_action(batch)
        target = self.backup(batch, self.critics_target, next_action)
        critic_loss = (self.critics(batch.obs, batch.action) - target.unsqueeze(1)).square().mean(-1).sum(-1)
        self.critic_optimizer.step(critic_loss)

        # From here on with the critics after their step, at the same a~.
        value_target = torch.minimum(target, self.backup(batch, self.critics, next_action))
        value = self.value(batch.obs).squeeze(-1)
        value_loss = (value - value_target).square().mean(-1)
        self.value_optimizer.step(value_loss)
        value = value.detach()  # V before its step: both gates use it
        q = self.critics(batch.obs, batch.action, member=0, frozen=True)

        vae_loss, metrics = self.vae_loss(batch, value, q)
        self.vae_optimizer.step(vae_loss)
        metrics |= {"critic_loss": critic_loss.detach(), "value_loss": value_loss.detach(), "value": value.mean(-1)}
        if phase == self.period - 1:
            actor_loss, more = self.policy_loss(batch, value, q)
            self.actor_optimizer.step(actor_loss)
            polyak(self.critics_target, self.critics, self.cfg.tau)
            polyak(self.actor_target, self.actor, self.cfg.tau)
            metrics |= more
        return metrics
