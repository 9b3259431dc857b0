"""A flow policy: an ordinary differential equation that carries noise to actions, with a learnt velocity.

Lipman, Chen, Ben-Hamu, Nickel & Le, "Flow Matching for Generative Modeling", ICLR 2023 (arXiv 2210.02747); Liu, Gong & Liu,
"Flow Straight and Fast", ICLR 2023 (arXiv 2209.03003): straight paths from noise x_0 at t = 0 to data x_1 at t = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from offrl.nets.mlp import MLP
from offrl.nets.spec import Spec
from offrl.utils.random import LaneRandom


class FlowPolicy(nn.Module):
    """dx/dt = v(s, x, t) from x(0) = z ~ N(0, I) to the action x(1), in units of half the box; `options` are those of `MLP`.

    Args:
        steps: number of Euler steps from t = 0 to 1.
    """

    def __init__(
        self, seeds: Sequence[int], obs_dim: int, action_dim: int, hidden: Sequence[int], steps: int, **options: Any
    ) -> None:
        super().__init__()
        if not 1 <= steps <= 1000:
            raise ValueError(f"flow_steps={steps} should be between 1 and 1000.")
        self.mlp = MLP(seeds, [obs_dim + action_dim + 1, *hidden, action_dim], name="flow", **options)
        self.steps, self.noise_dim = steps, action_dim

    @classmethod
    def of(cls, spec: Spec, hidden: Sequence[int], steps: int, **options: Any) -> Self:
        """A flow policy of a Spec's observations and actions."""
        return cls(spec.seeds, spec.obs_dim, spec.action_dim, hidden, steps, **options)

    def velocity(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v(s, x, t) `[lanes, n, A]`, with t `[lanes, n, 1]` as a plain number."""
        return self.mlp(torch.cat([obs, x, t], -1))

    def error(self, obs: Tensor, action: Tensor, random: LaneRandom) -> Tensor:
        """Squared error of flow matching `[lanes, n, A]`: (v(s, x_t, t) - (a - x_0))^2, x_t = (1 - t) x_0 + t a.

        Args:
            action: `[lanes, n, A]` in units of half the box.
            random: source of the draws "flow/x0", normal, and "flow/t", uniform on [0, 1), one number a sample.
        """
        x0 = random.normal("flow/x0", action)
        t = random.uniform("flow/t", (action.shape[1], 1)).to(action.dtype)
        return (self.velocity(obs, (1 - t) * x0 + t * action, t) - (action - x0)).square()

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions of noise z, `[lanes, n, A]` both: Euler steps at t = 0, 1/M, ..., (M - 1)/M, clipped at the end."""
        x = noise
        for i in range(self.steps):
            x = x + self.velocity(obs, x, torch.full_like(x[..., :1], i / self.steps)) / self.steps
        return x.clamp(-1, 1)
