"""DoC: dichotomy of control; cloning conditioned on a latent of the future that may not tell the environment's luck.

Yang, Schuurmans, Abbeel & Nachum, "Dichotomy of Control: Separating What You Can Control from What You Cannot", ICLR 2023
(arXiv 2210.13435). Conditioning on a return, or on any label of the future, takes luck for skill where the label tells what the
environment drew. So z is to predict the actions and, given state and action, to carry no information on the next reward and
state: I((r, s'); z | s, a) = 0. What is left describes how the trajectory was played; the average return of trajectories with
the same z is what playing so earns, and the best z may be asked for.

The constraint is a min-max game: an energy f ascends a contrastive estimate of that information, the posterior q descends it
with weight beta.

Deviations. The authors' released code does not run, and where it differs from the paper (energy and posterior *share* the
loss, the prior never learns, the value shapes z, the latent is not chosen) this is the paper's. Networks are those of
`offrl.agents.vae_bc`. The estimate is bounded (the positive is among the batch's negatives, one step of every window), and f
is a sum f0(r, s' | s, a) + f1(r, s' | s, a, z) of inner products: f0 learns on its own, so that f1, which alone the posterior
plays against, has only the part of z to find, and their difference in loss is the information that is left (`information`).
beta grows over the first updates, lest a posterior that plays against an ignorant energy forget the actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch
from offrl.agents.vae_bc import VAEBC, VAEBCConfig, at_step
from offrl.nets import MLP, Adam, per_lane


@dataclass
class DoCConfig(VAEBCConfig):
    beta: float = 2.0  # weight of the constraint
    beta_warmup: int = 1000  # updates over which it grows, so that the energy knows actions and states before it plays
    squeeze: float = 0.0  # weight of KL(q || p) in the posterior's own loss; 0: the paper's
    energy_steps: int = 1  # updates of the energy for one of everything else
    energy_lr: float = 3e-4
    energy_size: int = 64  # width of the vectors whose inner product the energy is


class Energy(nn.Module):
    """f_ij = <phi(context_i), psi(outcome_j)> / sqrt(size) for all pairs of a batch."""

    def __init__(
        self, name: str, seeds: Sequence[int], context: int, outcome: int, hidden: Sequence[int], size: int
    ) -> None:
        super().__init__()
        self.phi = MLP(seeds, [context, *hidden, size], name=f"doc/{name}/phi")
        self.psi = MLP(seeds, [outcome, *hidden, size], name=f"doc/{name}/psi")

    def forward(self, context: Tensor, outcome: Tensor) -> Tensor:
        """`[lanes, batch, batch]`."""
        phi, psi = self.phi(context), self.psi(outcome)
        return phi @ psi.transpose(1, 2) / math.sqrt(phi.shape[-1])


class DoC(VAEBC):
    """min_{pi, q} E [-log pi(a_t | s_t, z)] subject to I((r_t, s_{t+1}); z | s_t, a_t) = 0."""

    Config = DoCConfig

    def build(self) -> None:
        super().build()
        spec, cfg = self.spec, self.cfg
        known, outcome = spec.obs_dim + 1 + spec.action_dim, spec.obs_dim + 1
        shape = cfg.hidden, cfg.energy_size
        self.energy_base = Energy("base", spec.seeds, known, outcome, *shape)
        self.energy = Energy("energy", spec.seeds, known + cfg.latent_size, outcome, *shape)
        self.energy_learnt = [*self.energy_base.parameters(), *self.energy.parameters()]
        self.squeezed = isinstance(cfg.squeeze, Tensor) or cfg.squeeze > 0
        self.energy_optimizer = Adam(self.energy_learnt, cfg.energy_lr)

    def seen(self, x: Tensor) -> Tensor:
        """Value and prior learn what z means and what it is worth; they don't shape it."""
        return x.detach()

    def one_step(self, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """(s_t, a_t) and (r_t, s_{t+1}), `[lanes, batch, ...]`, of one step of every window, each as likely as the others."""
        assert batch.valid is not None
        steps = batch.valid.sum(-1)
        step = (self.random.uniform(name, steps.shape[1:]).to(steps.dtype) * steps).long()
        step = torch.minimum(step, steps.long() - 1)
        context = torch.cat([self.states(batch), self.encoded(batch.action)], -1)
        outcome = torch.cat([(batch.reward * self.reward_scale).unsqueeze(-1), batch.next_obs], -1)
        return at_step(context, step), at_step(outcome, step)

    def contrastive_losses(self, batch: Batch, z: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Losses `[lanes]` of f0 and of f0 + f1, the latter without a gradient to f0."""
        context, outcome = self.one_step(batch, name)
        base = self.energy_base(context, outcome)
        return contrast(base), contrast(base.detach() + self.energy(torch.cat([context, z], -1), outcome))

    def losses(self, batch: Batch, q: Tensor, z: Tensor) -> dict[str, Tensor]:
        losses = super().losses(batch, q, z)
        if self.squeezed:
            losses["squeeze"] = self.cfg.squeeze * self.divergence(
                batch, q, self.prior(self.states(batch)[:, :, 0]).detach()
            )
        return losses

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        q = self.posterior(batch)
        z = self.latent.sample(q, self.random, "doc/posterior")
        for i in range(self.cfg.energy_steps - 1):
            base, constraint = self.contrastive_losses(batch, z.detach(), f"doc/step/{i}")
            self.energy_optimizer.step(base + constraint)
        beta = self.cfg.beta * (self.optimizer.count / self.cfg.beta_warmup).clamp(max=1)
        base, constraint = self.contrastive_losses(batch, reversed_gradient(z, beta), "doc/step")
        losses = self.losses(batch, q, z)
        total = torch.stack([*losses.values(), base, constraint]).sum()
        gradients = torch.autograd.grad(total, self.learnt + self.energy_learnt)
        self.optimizer.apply_gradients(gradients[: len(self.learnt)])
        self.energy_optimizer.apply_gradients(gradients[len(self.learnt) :])
        metrics = losses | {"contrastive_loss": constraint, "information": base - constraint}
        return {name: value.detach() for name, value in metrics.items()}


def contrast(energy: Tensor) -> Tensor:
    """mean_i [log mean_j exp f_ij - f_ii], `[lanes]`; minus it is a bound, at most log(batch), on the information in f."""
    partition = energy.logsumexp(-1) - math.log(energy.shape[-1])
    return (partition - energy.diagonal(dim1=1, dim2=2)).mean(-1)


def reversed_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """`x` itself, whose gradient comes back times -weight."""
    return x.detach() - (per_lane(weight, x.ndim - 1) if weight.ndim else weight) * (x - x.detach())
