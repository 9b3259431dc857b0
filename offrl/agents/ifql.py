"""IFQL and IDQL: IQL's critics, a generative policy that clones the data, and the best of N of its actions.

IFQL: Park, Li & Levine, "Flow Q-Learning", ICML 2025 (arXiv 2502.02538), authors' code seohongpark/fql, whose update this is
step for step. It is the counterpart with a flow of IDQL: Hansen-Estruch, Kostrikov, Janner, Kuba & Levine, "IDQL: Implicit
Q-Learning as an Actor-Critic Method with Diffusion Policies", 2023 (arXiv 2304.10573), authors' code philippe-eecs/IDQL.
V regresses to an upper expectile of Q over the dataset's actions and Q to r + gamma V(s'); the policy knows neither. Acting
draws N actions and takes the one with the largest min_i Q_i; in an environment it explores so, without further noise.

As in the authors' code of IFQL: all losses are of the parameters before the step, the target critics average the critics from
before their step, and the online critics choose the action.

Deviations. `IDQL` is IFQL with IDQL's chain as its policy: its schedule, sampler, T = 5 and N = 64, and its loss over the
action's dimensions averaged, not summed. The rest of IDQL's code is left out: the residual network with dropout, AdamW and the
cosine decay, the moving average of the policy, critics that step after V and target critics that choose the action.
Without a state (`offrl select`) the same N draws serve every observation. The dataset's actions are not moved to a distance of
1e-5 from their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.iql import expectile_loss
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import MLP, Adam, Critics, DenoisingPolicy, FlowPolicy, make_target, per_lane, polyak
from offrl.utils.random import LaneRandom


@dataclass
class IFQLConfig:
    policy: Literal["flow", "denoising"] = "flow"  # flow: IFQL; denoising: IDQL's chain
    candidates: int = 32  # N, number of actions that acting draws
    expectile: float = 0.9  # expectile of Q that V regresses to (0.5 = mean, towards 1 = maximum)
    flow_steps: int = 10  # M, number of the flow's Euler steps
    denoising_steps: int = 5  # T, number of the chain's steps
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    lr: float = 3e-4  # learning rate of all networks
    hidden: tuple[int, ...] = (512, 512, 512, 512)  # widths of the hidden layers
    norm: bool = True  # layer normalisation after the activations of the critics and of V
    sample_actions: bool = True  # draw new candidates at every timestep; false: the same ones for every observation
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {"flow_steps": 3, "candidates": 4}  # settings of the contract tests
    toy: ClassVar[dict[str, Any]] = {"candidates": 64}  # with these it learns their toy task


class IFQL(RecurrentAgent[IFQLConfig]):
    """V <- expectile of Q, Q <- r + gamma V(s'), action <- argmax_i Q(s, a_i) of a_1, ..., a_N ~ clone of the data."""

    Config = IFQLConfig
    stream = "ifql"
    uses_history = False
    samples_continuous = True

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        if cfg.candidates < 1:
            raise ValueError(f"candidates={cfg.candidates} should be at least 1.")
        smooth: dict[str, Any] = {"activation": "gelu", "glorot": True}
        self.policy: FlowPolicy | DenoisingPolicy
        if cfg.policy == "flow":
            self.policy = FlowPolicy.of(spec, cfg.hidden, cfg.flow_steps, **smooth)
        else:
            self.policy = DenoisingPolicy.of(spec, cfg.hidden, cfg.denoising_steps, sampler="direct", **smooth)
        self.critics = Critics.of(spec, cfg.hidden, members=2, norm=cfg.norm, **smooth)
        self.critics_target = make_target(self.critics)
        self.value = MLP(spec.seeds, [spec.obs_dim, *cfg.hidden, 1], name="value", norm=cfg.norm, **smooth)
        networks = (self.policy, self.critics, self.value)
        self.optimizer = Adam([p for network in networks for p in network.parameters()], cfg.lr)

    # ---- learning ---------------------------------------------------------------------------------------------

    def value_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[lanes]`: expectile loss of V to the smallest target critic at the dataset's action; and V `[lanes, batch]`."""
        with torch.no_grad():
            q = self.critics_target(batch.obs, batch.action).amin(1)
        value = self.value(batch.obs).squeeze(-1)
        return expectile_loss(q - value, self.cfg.expectile), value

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean squared error to r + gamma (1 - d) V(s'), summed over the two critics."""
        with torch.no_grad():
            next_value = self.value(batch.next_obs).squeeze(-1)
            target = batch.reward + batch.mask * per_lane(self.cfg.discount) * next_value
        return (self.critics(batch.obs, batch.action) - target.unsqueeze(1)).square().mean(-1).sum(-1)

    def policy_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: squared error of the velocity or of the noise, averaged over batch and action dimensions."""
        return self.policy.error(batch.obs, self.box.to_unit(batch.action), self.random).mean((-2, -1))

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        value_loss, value = self.value_loss(batch)
        critic_loss, policy_loss = self.critic_loss(batch), self.policy_loss(batch)
        polyak(self.critics_target, self.critics, self.cfg.tau)  # the authors average before the step
        self.optimizer.step(value_loss + critic_loss + policy_loss)
        losses = {"value_loss": value_loss, "critic_loss": critic_loss, "policy_loss": policy_loss}
        return {**losses, "value": value.mean(-1)}

    # ---- acting -----------------------------------------------------------------------------------------------

    def act(self, obs: Tensor, state: ActingState | None = None) -> Tensor:
        """The best of N samples `[lanes, envs, A]`, by the smaller of the two critics."""
        return self.best_of(obs, self.candidate_noise(obs, state, self.cfg.candidates, self.policy.noise_dim))

    @property
    def sample_width(self) -> int:
        return self.cfg.candidates * self.policy.noise_dim

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The best of N samples, each state's of its own noise `[lanes, n, N width]`."""
        return self.best_of(obs, noise.unflatten(-1, (self.cfg.candidates, self.policy.noise_dim)))

    @torch.no_grad()
    def explore(self, obs: Tensor, random: LaneRandom) -> Tensor:
        """The best of N new samples at every environment step."""
        noise = random.normal("explore", obs.new_empty(*obs.shape[:2], self.cfg.candidates, self.policy.noise_dim))
        return self.within_bounds(self.best_of(self.normalize(obs), noise))

    def best_of(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The best action `[lanes, envs, A]` of those that noise `[lanes, envs, N, width]` makes."""
        lanes, envs, n, _ = noise.shape
        many = obs.unsqueeze(2).expand(lanes, envs, n, -1)
        actions = self.box.from_unit(self.policy.sample(many.flatten(1, 2), noise.flatten(1, 2))).unflatten(
            1, (envs, n)
        )
        best = self.critics.q_of_actions(obs, actions).amin(1).argmax(-1)  # [lanes, envs]
        return actions.gather(2, best[..., None, None].expand(-1, -1, 1, actions.shape[-1])).squeeze(2)


@dataclass
class IDQLConfig(IFQLConfig):
    policy: Literal["flow", "denoising"] = "denoising"  # flow: IFQL; denoising: IDQL's chain
    candidates: int = 64  # N, number of actions that acting draws


class IDQL(IFQL):
    """IFQL whose policy is a denoising chain."""

    Config = IDQLConfig
    cfg: IDQLConfig
    stream = "idql"
