"""DoC: dichotomy of control; cloning conditioned on a latent of the future that carries no information about luck.

Yang, Schuurmans, Abbeel & Nachum, "Dichotomy of Control: Separating What You Can Control from What You Cannot", ICLR 2023
(arXiv 2210.13435). A policy that is conditioned on a return, or on any label of the future, takes luck for skill where the
label depends on the environment's noise. So z should predict the actions and, given state and action, carry no information
about the next reward and state: I((r, s'); z | s, a) = 0. Then z describes how a trajectory was played, the average return of
trajectories with the same z is what playing so earns, and acting may choose the best z.

The constraint is a min-max game. An energy function f maximises a contrastive estimate of that information (it minimises the
InfoNCE loss); the posterior q minimises it with weight beta (by gradient reversal).

Deviations. The authors' released code does not run. Where it differs from the paper (energy and posterior *share* the
loss, the prior never learns, the value shapes z, the latent is not chosen) this file follows the paper. The networks
are those of `offrl.agents.vae_bc`. The estimate is bounded, because the positive is among the batch's negatives, one
timestep of every window. f is a sum f0(r, s' | s, a) + f1(r, s' | s, a, z) of inner products: f0 learns by itself, so
that f1, the only part the posterior plays against, need only model what z adds; the difference of their losses is the
remaining information (`information`). The outcome of a terminal timestep has whatever successor the dataset has: where
the file has none, that is the state itself or the next episode's first one, and the reward alone tells of luck there.
beta is warmed up, so that an untrained energy function does not drive the posterior to ignore the actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import WindowBatch
from offrl.agents.vae_bc import VAEBC, VAEBCConfig, at_step
from offrl.nets import Adam
from offrl.nets.contrastive import PairCritic, gradient_reversal, info_nce


@dataclass
class DoCConfig(VAEBCConfig):
    beta: float = 2.0  # weight of the constraint
    beta_warmup: int = 1000  # updates over which beta grows linearly to its value; 0: no warm-up
    posterior_kl_weight: float = 0.0  # weight of KL(q || p) in the posterior's own loss (0 = the paper's)
    energy_steps: int = 1  # updates of the energy function per update of the other networks
    energy_lr: float = 3e-4  # learning rate of the energy function
    energy_size: int = 64  # width of the vectors whose inner product the energy function is
    least: ClassVar[dict[str, int]] = {**VAEBCConfig.least, "energy_steps": 1, "energy_size": 1}
    toy: ClassVar[dict[str, Any]] = {"posterior_kl_weight": 1.0}  # with these it learns their toy task


class DoC(VAEBC):
    """min_{pi, q} E [-log pi(a_t | s_t, z)] subject to I((r_t, s_{t+1}); z | s_t, a_t) = 0."""

    Config = DoCConfig
    renamed_settings: ClassVar[dict[str, str]] = {"squeeze": "posterior_kl_weight"}
    cfg: DoCConfig
    value_shapes_latent = False

    def build(self) -> None:
        super().build()
        spec, cfg = self.spec, self.cfg
        if cfg.energy_steps > 1000:  # a loop in every update
            raise ValueError(f"energy_steps={cfg.energy_steps} should be at most 1000.")
        context, outcome = spec.obs_dim + 1 + spec.action_dim, spec.obs_dim + 1  # (s, time, a) and (r, s')
        sizes = cfg.hidden, cfg.energy_size
        self.energy_base = PairCritic(spec.seeds, context, outcome, *sizes, name="doc/base")
        self.energy = PairCritic(spec.seeds, context + cfg.latent_size, outcome, *sizes, name="doc/energy")
        self.energy_learnt = [*self.energy_base.parameters(), *self.energy.parameters()]
        self.energy_optimizer = Adam(self.energy_learnt, cfg.energy_lr)
        self.has_posterior_kl = isinstance(cfg.posterior_kl_weight, Tensor) or cfg.posterior_kl_weight > 0

    def sample_steps(self, batch: WindowBatch, stream: str) -> tuple[Tensor, Tensor]:
        """Context (s_t, a_t) and outcome (r_t, s_{t+1}), `[lanes, batch, ...]`, of one random valid timestep per window."""
        steps = batch.valid.sum(-1)
        step = (self.random.uniform(stream, steps.shape[1:]).to(steps.dtype) * steps).long()
        step = torch.minimum(step, steps.long() - 1)
        context = torch.cat([self.states(batch), self.encode_action(batch.action)], -1)
        outcome = torch.cat([(batch.reward * self.reward_scale).unsqueeze(-1), batch.next_obs], -1)
        return at_step(context, step), at_step(outcome, step)

    def contrastive_losses(self, batch: WindowBatch, z: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        """InfoNCE losses `[lanes]` of f0 and of f0 + f1, the latter without a gradient of f0."""
        context, outcome = self.sample_steps(batch, stream)
        base = self.energy_base(context, outcome)
        return info_nce(base), info_nce(base.detach() + self.energy(torch.cat([context, z], -1), outcome))

    def losses(self, batch: WindowBatch, q: Tensor, z: Tensor) -> dict[str, Tensor]:
        losses = super().losses(batch, q, z)
        if self.has_posterior_kl:
            prior = self.prior(self.states(batch)[:, :, 0]).detach()
            losses["posterior_kl"] = self.cfg.posterior_kl_weight * self.divergence(batch, q, prior)
        return losses

    def update(self, batch: WindowBatch, phase: int) -> dict[str, Tensor]:
        q = self.posterior(batch)
        z = self.latent.sample(q, self.random, "doc/posterior")
        for i in range(self.cfg.energy_steps - 1):
            base, constraint = self.contrastive_losses(batch, z.detach(), f"doc/step/{i}")
            self.energy_optimizer.step(base + constraint)
        count, warmup = self.optimizer.count, self.cfg.beta_warmup
        beta = self.cfg.beta * ((count / warmup).clamp(max=1) if warmup else torch.ones_like(count))
        base, constraint = self.contrastive_losses(batch, gradient_reversal(z, beta), "doc/step")
        losses = self.losses(batch, q, z)
        total = torch.stack([*losses.values(), base, constraint]).sum()
        gradients = torch.autograd.grad(total, self.learnt + self.energy_learnt)
        self.optimizer.apply_gradients(gradients[: len(self.learnt)])
        self.energy_optimizer.apply_gradients(gradients[len(self.learnt) :])
        return losses | {"contrastive_loss": constraint, "information": base - constraint}
