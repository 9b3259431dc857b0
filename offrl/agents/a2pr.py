"""A2PR: TD3+BC with a better target of regularisation: the dataset's action or a generative model's, whichever has higher Q.

Liu et al., "Adaptive Advantage-Guided Policy Regularization for Offline Reinforcement Learning", ICML 2024 (arXiv
2405.19909); authors' code ltlhuuu/A2PR, whose update this is step for step. A value network V estimates what a state is worth.
A conditional VAE learns to reconstruct the dataset's actions with Q_1(s, a) > V(s). The policy is regularised towards the VAE's
reconstruction g of its own action, or towards a, whichever Q_1 prefers, and not at all where both are worth less than V(s).

Deviations, none of which changes the mathematics: the target's unused V(s') is not computed; Q_1(s, a) after the critics'
step is computed once for both gates; gates carry no gradient, and each loss computes the gradients of its own networks
alone (the authors' actor step also fills the critics' and the VAE's, and erases them); the twin critics, and the two heads
of the encoder, are one network each; g and a are compared by Q_1 and not by Q_1 - V, in which V cancels.

Kept from the authors' code, where a reader may expect otherwise: the encoder sees the policy's action, not a sample of the
prior; the gradient also runs through g (`detach_reference` stops it); V is fitted to a minimum of four Q, but gates compare
it with Q_1; V(s) is that before V's own step; the VAE learns from the first update on, without pre-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch, Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.nets import MLP, ActionBox, Adam, Critics, DeterministicActor, make_target, pad_hidden_, per_lane, polyak


@dataclass
class A2PRConfig(TD3BCConfig):
    bc_weight: float = 1.0  # weight of the regulariser where its gate is open (the authors' `mask`; 0 = TD3)
    vae_weight: float = 1.0  # omega, weight of the VAE's reconstruction error against half its KL divergence
    vae_adv_eps: float = 0.0  # advantage that an action must exceed for the VAE to learn it (0 in the authors' code)
    detach_reference: bool = False  # stop the gradient at the VAE's proposal (the authors' code does not)
    value_lr: float = 3e-4  # learning rate of V
    vae_lr: float = 1e-3  # learning rate of the VAE
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the actor's hidden layers; critics and V repeat the last one
    vae_hidden: tuple[int, ...] = (750, 750)  # widths of the hidden layers of the VAE's encoder and of its decoder


class VAE(nn.Module):
    """Encoder (s, a) -> mean and log std of z, and decoder (s, z) -> action; z has twice the action's width."""

    def __init__(self, spec: Spec, hidden: Sequence[int]) -> None:
        super().__init__()
        obs_dim, action_dim, latent = spec.obs_dim, spec.action_dim, 2 * spec.action_dim
        self.encoder = MLP(spec.seeds, [obs_dim + action_dim, *hidden, 2 * latent], name="vae/encoder")
        self.decoder = MLP(spec.seeds, [obs_dim + latent, *hidden, action_dim], name="vae/decoder")
        for mlp in (self.encoder, self.decoder):
            pad_hidden_(mlp, 16)  # for speed: width 750 becomes 752
        self.box = ActionBox(spec.action_low, spec.action_high)

    def encode(self, obs: Tensor, action: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log std of z, `[lanes, batch, 2 A]` each."""
        mean, log_std = self.encoder(torch.cat([obs, action], -1), frozen=frozen).chunk(2, -1)
        return mean, log_std.clamp(-4, 15)

    def decode(self, obs: Tensor, z: Tensor, frozen: bool = False) -> Tensor:
        """Actions `[lanes, batch, A]`, within their bounds."""
        return self.box.from_unit(self.decoder(torch.cat([obs, z], -1), frozen=frozen).tanh())


class A2PR(TD3BC):
    """max_pi E [lambda Q(s, pi(s)) - h (pi(s) - c)^2] with c the better of a and g(s, pi(s)), and h its gate.

    The policy, the smoothed target action and the delayed actor are those of TD3+BC.
    """

    Config = A2PRConfig
    cfg: A2PRConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        deep = (*cfg.hidden, *cfg.hidden[-1:])
        self.actor = DeterministicActor.of(spec, cfg.hidden)
        self.critics = Critics.of(spec, deep, members=2)
        self.actor_target, self.critics_target = make_target(self.actor), make_target(self.critics)
        self.value = MLP(spec.seeds, [spec.obs_dim, *deep, 1], name="value")
        self.vae = VAE(spec, cfg.vae_hidden)
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.value_optimizer = Adam(self.value.parameters(), cfg.value_lr)
        self.vae_optimizer = Adam(self.vae.parameters(), cfg.vae_lr)

    def backup(self, batch: Batch, critics: Critics, next_action: Tensor) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i Q_i(s', a~) of the given critics, without a gradient."""
        next_q = critics(batch.next_obs, next_action, frozen=True).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def reconstruct(
        self, obs: Tensor, action: Tensor, stream: str, frozen: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The VAE's g(s, mean + std eps) for a state and an action, with mean and log std; `stream` names eps."""
        mean, log_std = self.vae.encode(obs, action, frozen)
        z = mean + log_std.exp() * self.random.normal(stream, mean)
        return self.vae.decode(obs, z, frozen), mean, log_std

    def vae_loss(self, batch: Batch, value: Tensor, q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: omega (reconstruction error of actions with Q_1(s, a) > V(s)) + KL / 2; the KL is not gated."""
        action, mean, log_std = self.reconstruct(batch.obs, batch.action, "vae/data")
        gate = (q > value + per_lane(self.cfg.vae_adv_eps)).to(q.dtype)
        reconstruction = (gate * (action - batch.action).square().mean(-1)).mean(-1)
        kl = -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp()).mean((-2, -1))
        loss = self.cfg.vae_weight * reconstruction + 0.5 * kl
        return loss, {"vae_loss": loss, "reconstruction": reconstruction, "kl": kl, "vae_gate": gate.mean(-1)}

    def reference(self, batch: Batch, action: Tensor, value: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The target of the policy's regularisation, and whether it applies.

        Returns:
            c `[lanes, batch, A]`, the better of the VAE's reconstruction of `action` and the dataset's action; and two
            booleans `[lanes, batch]`: c is the reconstruction, and one of the two is worth as much as the state.
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
        return loss, {"actor_loss": loss, "q": q_policy.mean(-1), "lambda": lam, "bc_loss": regularizer, **shares}

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
        value = value.detach()  # V before its step; both gates use it
        q = self.critics(batch.obs, batch.action, member=0, frozen=True)

        vae_loss, metrics = self.vae_loss(batch, value, q)
        self.vae_optimizer.step(vae_loss)
        metrics |= {"critic_loss": critic_loss, "value_loss": value_loss, "value": value.mean(-1)}
        if phase == self.actor_turn:
            actor_loss, more = self.policy_loss(batch, value, q)
            self.actor_optimizer.step(actor_loss)
            polyak(self.critics_target, self.critics, self.cfg.tau)
            polyak(self.actor_target, self.actor, self.cfg.tau)
            metrics |= more
        return metrics
