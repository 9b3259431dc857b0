"""CQL: soft actor-critic whose critics are lowered at uniform and policy actions and raised at the dataset's.

Kumar, Zhou, Tucker & Levine, "Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020 (arXiv
2006.04779), CQL(H) of equation 4 with the importance sampling of appendix F; the update is that of corl-team/CORL `cql.py`
(which follows young-geng/CQL), whose scores are the ones to compare with.

Deviations from CORL, of which only the first two change a number: both critics have the configured depth (there the second
keeps three hidden layers, which matters in AntMaze); `bc_steps` clones the dataset's actions (there the log-density is that of
fresh samples, so that nothing is cloned; no published setting uses it); the policy's network runs once per state and not once
per sampled action; all actions of a state go through both critics in one batch; the upper clip of the difference, infinite in
every published setting, is left out.

Kept from CORL, where a reader may expect otherwise: actions of pi(.|s') are evaluated in s; the target has no entropy; all
losses use the parameters from before the update, log alpha included; the multiplier alpha' starts at e and multiplies the
difference together with `cql_alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.squashed import SquashedAgent
from offrl.nets import Adam, Bound, Critics, TanhGaussian, TanhGaussianActor, make_target, orthogonal_, per_lane, polyak


@dataclass
class CQLConfig:
    cql_alpha: float = 10.0  # weight of the conservative term
    actions: int = 10  # number of actions sampled per state from each of uniform, pi(.|s) and pi(.|s')
    temperature: float = 1.0  # temperature of the log-sum-exp over those actions
    diff_min: float = -math.inf  # lower clip of the conservative difference
    lagrange: bool = False  # multiply the term by alpha', which is learnt to keep the difference at `gap`
    gap: float = 5.0  # difference that alpha' aims at (the paper's tau)
    max_backup: bool = False  # use the best of `actions` next actions in the target value
    backup_entropy: bool = False  # subtract alpha log pi(a'|s') from the target value
    bc_steps: int = (
        0  # number of first updates in which the policy clones the dataset's actions instead of maximising Q
    )
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    actor_lr: float = 3e-5  # learning rate of the policy and of log alpha
    critic_lr: float = 3e-4  # learning rate of the critics and of log alpha'
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers
    critic_hidden: tuple[int, ...] | None = None  # widths of the critics' hidden layers; None: `hidden`
    normalize_obs: bool = True  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"actions": 2}  # settings of the contract tests
    toy: ClassVar[dict[str, Any]] = {"cql_alpha": 1.0}  # with these it learns their toy task


class Policy(TanhGaussianActor):
    """A tanh-Gaussian with log std = m x + c of the network's output x, m and c learnt; it starts near tanh(N(0, 1/e^2))."""

    def __init__(
        self, seeds: Sequence[int], obs_dim: int, action_dim: int, hidden: Sequence[int], low: Bound, high: Bound
    ) -> None:
        fan_in = [obs_dim, *hidden][-1]
        xavier = 0.01 * math.sqrt(6 / (fan_in + 2 * action_dim))  # uniform with gain 0.01, on the last layer
        super().__init__(seeds, obs_dim, action_dim, hidden, low, high, last=xavier)
        nn.init.zeros_(self.mlp.biases[-1])
        self.factor, self.offset = (nn.Parameter(torch.full((len(seeds),), x)) for x in (1.0, -1.0))

    def rescale(self, log_std: Tensor) -> Tensor:
        return per_lane(self.factor, 2) * log_std + per_lane(self.offset, 2)


class CQL(SquashedAgent[CQLConfig]):
    """min_Q alpha (E_s logsumexp_a Q(s, a) - E_D Q(s, a)) + squared Bellman errors, under soft actor-critic's policy."""

    Config = CQLConfig

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        if cfg.actions < 1:
            raise ValueError(f"actions={cfg.actions} should be at least 1.")
        self.actor = Policy.of(spec, cfg.hidden)
        self.critics = Critics.of(spec, cfg.hidden if cfg.critic_hidden is None else cfg.critic_hidden, members=2)
        orthogonal_(self.critics.mlp, spec.seeds, gain=math.sqrt(2), last=0.01)
        self.critics_target = make_target(self.critics)
        self.log_alpha, self.log_alpha_prime = (nn.Parameter(torch.full((spec.lanes,), x)) for x in (0.0, 1.0))
        self.actor_optimizer = Adam(self.actor.parameters(), cfg.actor_lr)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], cfg.actor_lr)
        self.alpha_prime_optimizer = Adam([self.log_alpha_prime], cfg.critic_lr)

    def sample_many(self, policy: TanhGaussian, stream: str, n: int) -> tuple[Tensor, Tensor]:
        """n actions `[lanes, batch, n, A]` per state and their log-densities `[lanes, batch, n]`; `stream` names the noise."""
        like = policy.mean.unsqueeze(2).expand(-1, -1, n, -1)
        return policy.repeated().sample(self.random.normal(stream, like))

    def alpha_gradient(self, log_pi: Tensor) -> Tensor:
        """`[lanes]`: gradient by log alpha of -log alpha (log pi(a|s) - A).

        alpha rises while the policy's entropy is below -A.
        """
        return -(log_pi.detach().mean(-1) - self.spec.action_dim)

    def actor_loss(
        self, batch: Batch, policy: TanhGaussian, action: Tensor, log_pi: Tensor, alpha: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: mean of alpha log pi(a|s) - min_i Q_i(s, a); in the first `bc_steps`, log pi(a_data|s) replaces Q."""
        value = self.critics(batch.obs, action, frozen=True).amin(1)
        if self.cfg.bc_steps:
            value = torch.where(self.random.step <= self.cfg.bc_steps, policy.log_prob(batch.action), value)
        loss = (per_lane(alpha) * log_pi - value).mean(-1)
        return loss, {"actor_loss": loss, "alpha": alpha, "entropy": -log_pi.mean(-1)}

    @torch.no_grad()
    def target_value(self, batch: Batch, next_policy: TanhGaussian, alpha: Tensor) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) max_a' min_i Q'_i(s', a') over one or several sampled actions."""
        actions, log_pi = self.sample_many(next_policy, "target", self.cfg.actions if self.cfg.max_backup else 1)
        value, best = self.critics_target.q_of_actions(batch.next_obs, actions).amin(1).max(-1, keepdim=True)
        if self.cfg.backup_entropy:
            value = value - per_lane(alpha, 2) * log_pi.gather(-1, best)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * value.squeeze(-1)

    @torch.no_grad()
    def proposals(self, policy: TanhGaussian, next_policy: TanhGaussian) -> tuple[Tensor, Tensor]:
        """Actions `[lanes, batch, 3 n, A]`: n uniform ones, n of pi(.|s) and n of pi(.|s'), and their log-densities."""
        n, low, high = self.cfg.actions, self.box.low, self.box.high
        current, log_pi = self.sample_many(policy, "cql/current", n)
        following, log_pi_next = self.sample_many(next_policy, "cql/next", n)
        uniform = self.random.uniform("cql/uniform", current.shape[1:]).to(current.dtype)
        log_uniform = torch.full_like(log_pi, -math.log(2) * current.shape[-1])  # in units of half the box, as log_pi
        actions = torch.cat([low + (high - low) * uniform, current, following], 2)
        return actions, torch.cat([log_uniform, log_pi, log_pi_next], 2)

    def conservative_difference(self, q_data: Tensor, q_proposed: Tensor, log_density: Tensor) -> Tensor:
        """`[lanes, 2]`: mean over states of logsumexp_a Q(s, a) - Q(s, a_data), clipped from below.

        Args:
            q_data: Q `[lanes, 2, batch]` at the dataset's actions.
            q_proposed: Q `[lanes, 2, batch, 3 n]` at actions sampled with `log_density` `[lanes, batch, 3 n]`. Subtracting
                the log-density makes the sum over the actions an estimate of 3 n times the integral (importance sampling).
        """
        difference = self.soft_maximum(q_proposed, log_density) - q_data
        return difference.clamp(min=per_lane(self.cfg.diff_min, 2)).mean(-1)

    def soft_maximum(self, q_proposed: Tensor, log_density: Tensor) -> Tensor:
        """`[lanes, 2, batch]`: temperature times logsumexp of (Q - log density) / temperature over the sampled actions."""
        temperature = per_lane(self.cfg.temperature, 3)
        return per_lane(self.cfg.temperature, 2) * ((q_proposed - log_density.unsqueeze(1)) / temperature).logsumexp(-1)

    def conservative_term(self, batch: Batch, q_data: Tensor, q_proposed: Tensor, log_density: Tensor) -> Tensor:
        """`[lanes, 2]`: the difference whose weight is `cql_alpha`; COMBO takes its two means over different rows."""
        return self.conservative_difference(q_data, q_proposed, log_density)

    def lower_bounded(self, q_proposed: Tensor, batch: Batch) -> Tensor:
        """The values `[lanes, 2, batch, 3 n]` that the conservative term lowers; Cal-QL bounds them from below."""
        return q_proposed

    def multiplier(self, difference: Tensor) -> Tensor:
        """alpha' `[lanes]` before its step; the step raises it where the difference exceeds the gap."""
        alpha_prime = self.log_alpha_prime.detach().exp().clamp(max=1e6)
        excess = (difference.detach() - per_lane(self.cfg.gap)).mean(-1)
        gradient = -alpha_prime * self.cfg.cql_alpha * excess
        self.alpha_prime_optimizer.apply_gradients([torch.where(alpha_prime < 1e6, gradient, 0.0)])
        return alpha_prime

    def critic_loss(
        self, batch: Batch, policy: TanhGaussian, next_policy: TanhGaussian, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: squared Bellman error plus weighted conservative difference, summed over the two critics."""
        actions, log_density = self.proposals(policy, next_policy)
        q = self.critics.q_of_actions(batch.obs, torch.cat([batch.action.unsqueeze(2), actions], 2))
        q_data, q_proposed = q[..., 0], q[..., 1:]
        error = (q_data - target.unsqueeze(1)).square().mean(-1).sum(-1)
        bounded = self.lower_bounded(q_proposed, batch)
        difference = self.conservative_term(batch, q_data, bounded, log_density)
        metrics = {"bellman_error": error, "cql_diff": difference.mean(-1)}
        penalty = difference
        if self.cfg.lagrange:
            metrics["alpha_prime"] = self.multiplier(difference)
            penalty = per_lane(metrics["alpha_prime"]) * (difference - per_lane(self.cfg.gap))
        loss = error + self.cfg.cql_alpha * penalty.sum(-1)
        n = self.cfg.actions
        metrics |= {
            "critic_loss": loss,
            "q_data": q_data.mean((1, 2)),
            "q_policy": q_proposed[..., n : 2 * n].mean((1, 2, 3)),
            "q_uniform": q_proposed[..., :n].mean((1, 2, 3)),
        }
        return loss, metrics

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        policy = self.actor(batch.obs)
        with torch.no_grad():
            next_policy = self.actor(batch.next_obs)
        action, log_pi = policy.sample(self.random.normal("policy", batch.action))
        alpha = self.log_alpha.detach().exp()
        actor_loss, metrics = self.actor_loss(batch, policy, action, log_pi, alpha)
        self.actor_optimizer.step(actor_loss)
        self.alpha_optimizer.apply_gradients([self.alpha_gradient(log_pi)])

        # With the policies and the alpha from before these steps.
        target = self.target_value(batch, next_policy, alpha)
        critic_loss, more = self.critic_loss(batch, policy.detach(), next_policy, target)
        self.critic_optimizer.step(critic_loss)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return metrics | more
