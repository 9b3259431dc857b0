"""Policy-guided diffusion: trajectories of a diffusion model of the dataset, guided towards the policy's actions.

Jackson, Matthews, Lu, Ellis, Whiteson & Foerster, "Policy-Guided Diffusion", RLC 2024 (arXiv 2404.06356); authors' code
EmptyJackson/policy-guided-diffusion. Samples approximate p_data(tau) prod_t pi(a_t | s_t)^lambda: actions near the policy,
everything else near the data. No gradient flows through states, the policy or the denoiser, and only actions are moved.

Two kinds of guidance:

- `per_step` (the authors'): at the start of step i the encoded actions u move by w ((1 - i/N) + c sin(pi (i+1)/N)) g, where g
  is the gradient of sum log pi(a) in u, normalised per trajectory. Neither the noise level nor the length of the step enters,
  so more steps guide more, and the samples have no limit as N grows.
- `product` (ours): the clean action given the noised sample is taken to be N(D_a, V), V = sigma^2 v / (sigma^2 + v) with v the
  behaviour's variance, and multiplied by the policy's density to the power lambda. It is exact for Gaussians, bounded, and
  independent of N.

Deviations: the norm is g / (|g| + 1e-8), where the authors' code divides first and adds after (0 / 0 when all actions are
saturated); the gradient is written in closed form; those of `offrl.augment.diffusion`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.augment import edm
from offrl.augment.diffusion import Denoiser, Diffusion, DiffusionConfig
from offrl.nets import per_lane


@dataclass
class PolicyGuidedConfig(DiffusionConfig):
    coefficient: float = 1.0  # w of per_step, lambda of product; 0: unguided
    guidance: Literal["per_step", "product"] = "per_step"
    cosine: float = 0.3  # c, extra guidance in the middle of the steps (per_step)
    normalize: bool = True  # whether the gradient of a trajectory has length 1 (per_step)
    at_denoised: bool = False  # gradient at D(x) instead of x, for one more call of the network per step (per_step)
    policy_std: float = 1.0  # std for a policy that is no Gaussian, around its action, in units of the actions


class PolicyGuidedDiffusion(Diffusion):
    """Diffusion guided by each lane's own policy, from the second generation on."""

    Config: ClassVar[type] = PolicyGuidedConfig
    per_lane = ("coefficient", "cosine", "policy_std")
    name = "PGD"

    def guide(self, policy: Agent | None) -> edm.Guide | None:
        if policy is None or not torch.as_tensor(self.cfg.coefficient).any():
            return None
        kind = PerStep if self.cfg.guidance == "per_step" else Product
        return kind(policy, self.denoiser, self.cfg)


class PolicyGuide(edm.Guide):
    """The policy's density as a function of encoded samples `[lanes, n, L, D]`."""

    def __init__(self, policy: Agent, denoiser: Denoiser, cfg: Any) -> None:
        self.policy, self.codec, self.cfg, self.denoiser = policy, denoiser.codec, cfg, denoiser
        self.std = self.codec.std[self.codec.act]  # std of the encoding of actions

    def gaussian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the policy `[lanes, n, L, A]` at the states in `x`, in units of the action box."""
        mean, std = policy_gaussian(self.policy, self.codec.observations(x).flatten(1, 2), self.cfg.policy_std)
        mean, std = (part.unflatten(1, x.shape[1:3]) for part in (mean, std))
        return self.codec.box.to_unit(mean), (std / self.codec.box.half_width).square()

    def gradient(self, x: Tensor) -> Tensor:
        """`[lanes, n, L, A]`: gradient of sum log pi(a) in the encoded actions, (m - a) / v (1 - a^2) std."""
        mean, variance = self.gaussian(x)
        action = self.codec.unit_actions(x)
        g = (mean - action) / variance * (1 - action.square()) * self.std
        return g / (torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True) + 1e-8) if self.cfg.normalize else g

    def with_actions(self, x: Tensor, actions: Tensor) -> Tensor:
        """`x` with these encoded actions."""
        return torch.cat([x[..., self.codec.obs], actions, x[..., self.codec.act.stop :]], -1)


class PerStep(PolicyGuide):
    def strength(self, step: int) -> Any:
        """lambda_i = w ((1 - i/N) + c sin(pi (i+1)/N)), a number or one per lane."""
        cfg, n = self.cfg, self.cfg.sampling.steps
        return cfg.coefficient * ((1 - step / n) + cfg.cosine * math.sin(math.pi * (step + 1) / n))

    def move(self, x: Tensor, step: int, sigma: float, denoise: edm.Denoise) -> Tensor:
        if step == self.cfg.sampling.steps - 1:  # the last one is left alone
            return x
        g = self.gradient(denoise(x, sigma) if self.cfg.at_denoised else x)
        return self.with_actions(x, x[..., self.codec.act] + per_lane(self.strength(step), 3) * g)


class Product(PolicyGuide):
    def denoised(self, clean: Tensor, noised: Tensor, sigma: float) -> Tensor:
        mean, variance = self.gaussian(clean)
        mean = mean.clamp(-0.999, 0.999)
        target = (mean.atanh() - self.codec.mean[self.codec.act]) / self.std
        spread = variance / ((1 - mean.square()) * self.std).square()  # the policy's variance, in encoded actions
        behaviour = self.denoiser.action_variance
        own = sigma**2 * behaviour / (sigma**2 + behaviour)
        weight = per_lane(self.cfg.coefficient, 3) * own
        share = weight / (spread + weight)
        return self.with_actions(clean, torch.lerp(clean[..., self.codec.act], target, share))


def policy_gaussian(policy: Agent, obs: Tensor, std: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std `[lanes, n, A]` of a policy at raw observations `[lanes, n, O]`.

    Args:
        std: std for a policy that is no Gaussian, around its action.
    """
    normalized = policy.normalize(obs)
    gaussian = policy.policy_gaussian(normalized)
    if gaussian is not None:
        return gaussian
    mean = policy.act(normalized)
    return mean, torch.ones_like(mean) * per_lane(std, 2)
