"""Diffusion-QL: a denoising diffusion policy that clones the data and maximises Q through its whole chain.

Wang, Hunt & Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning", ICLR 2023
(arXiv 2208.06193); authors' code Zhendong-Wang/Diffusion-Policies-for-Offline-RL, whose update this is step for step. The
policy makes an action in T steps from noise. Its loss is that of denoising plus `eta` times -Q of an action that it makes,
whose gradient passes through all T steps. A moving average of the policy gives the target's actions. Acting makes
`candidates` actions and draws one of them with probabilities softmax(min_i Q'_i); in an environment it explores so, without
further noise.

As in the authors' code: the policy's step uses the critics after theirs; one critic is maximised, the other's mean |Q|
divides it, and a coin says which; the chain of the policy itself acts, not that of its average; no gradient passes where
the predicted action is clipped. Their scheduler, meant as a cosine to zero, is stepped once in 50 epochs (50,000 updates)
and not once in each, so a run of 2,000 epochs ends at 0.999 of its rate: `lr_decay` is the length of that cosine in updates.

Deviations. The cosine falls at every update and not in stairs of 50,000, which changes a rate by less than 1e-4 of it.
Actions are in units of half the box, the authors' in those of the largest action. Without a state (`offrl select`) the
candidate with the largest min_i Q'_i acts, of the same noise for every observation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from offrl.agents.base import Batch
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import Adam, Critics, DenoisingPolicy, choose, make_target, per_lane, polyak
from offrl.utils.random import LaneRandom


@dataclass
class DQLConfig:
    eta: float = 1.0  # weight of Q against the denoising loss
    denoising_steps: int = 5  # T, number of the chain's steps
    candidates: int = 50  # number of actions that acting chooses from
    max_backup: bool = False  # the target is the largest of `backup_actions` actions' values
    backup_actions: int = 10  # number of these actions
    ema_tau: float = 0.005  # step size of the policy's moving average
    ema_every: int = 5  # updates between its steps
    ema_start: int = 1000  # updates before its first step; until then it is the policy's initial state
    discount: float = 0.99  # gamma
    tau: float = 0.005  # step size of the target critics
    actor_lr: float = 3e-4  # learning rate of the policy
    critic_lr: float = 3e-4  # learning rate of the critics
    lr_decay: int = 100_000_000  # updates of the cosine decay of both rates to zero; 0: none
    grad_clip: float = 1.0  # largest norm of the policy's gradient, and of the critics'; inf: no clipping
    hidden: tuple[int, ...] = (256, 256, 256)  # widths of the hidden layers
    sample_actions: bool = True  # draw from the candidates; false: the best of one noise for all observations
    normalize_obs: bool = False  # standardise observations with the dataset's statistics
    tiny: ClassVar[dict[str, Any]] = {  # settings of the contract tests
        "candidates": 4,
        "denoising_steps": 3,
        "ema_start": 0,
        "ema_every": 2,
    }
    toy: ClassVar[dict[str, Any]] = {
        "eta": 3.0,
        "ema_every": 1,
        "ema_tau": 0.02,
        "hidden": [128, 128],
    }  # learns their task


class DQL(RecurrentAgent[DQLConfig]):
    """eps <- argmin E [|eps(s, x_t, t) - noise|^2 - eta Q(s, a_0) / E|Q|], a_0 from the chain of eps."""

    Config = DQLConfig
    stream = "dql"
    uses_history = False
    samples_continuous = True

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        for name in ("candidates", "backup_actions", "ema_every"):
            if getattr(cfg, name) < 1:
                raise ValueError(f"{name}={getattr(cfg, name)} should be at least 1.")
        self.period = cfg.ema_every
        self.policy = DenoisingPolicy.of(spec, cfg.hidden, cfg.denoising_steps, sampler="posterior", activation="mish")
        self.critics = Critics.of(spec, cfg.hidden, members=2, activation="mish")
        self.policy_average, self.critics_target = make_target(self.policy), make_target(self.critics)
        steps: dict[str, Any] = {"clip": cfg.grad_clip, "decay": cfg.lr_decay}
        self.actor_optimizer = Adam(self.policy.parameters(), cfg.actor_lr, **steps)
        self.critic_optimizer = Adam(self.critics.parameters(), cfg.critic_lr, **steps)

    def phase(self, step: int) -> int:
        """1 if the moving average moves after this update."""
        return int(step >= self.cfg.ema_start and step % self.cfg.ema_every == 0)

    # ---- learning ---------------------------------------------------------------------------------------------

    def sample(self, policy: DenoisingPolicy, obs: Tensor, noise: Tensor) -> Tensor:
        """Actions `[lanes, batch, n, A]` in each state `[lanes, batch, O]`, from noise `[lanes, batch, n, T A]`."""
        lanes, rows, n, _ = noise.shape
        many = obs.unsqueeze(2).expand(lanes, rows, n, -1).flatten(1, 2)
        return self.box.from_unit(policy.sample(many, noise.flatten(1, 2))).unflatten(1, (rows, n))

    def noise(self, name: str, obs: Tensor, n: int) -> Tensor:
        """`[lanes, batch, n, T A]`: of n chains in each state."""
        return self.random.normal(name, obs.new_empty(*obs.shape[:2], n, self.policy.noise_dim))

    @torch.no_grad()
    def target_value(self, batch: Batch) -> Tensor:
        """`[lanes, batch]`: r + gamma (1 - d) min_i max_j Q'_i(s', a'_j); without max-backup there is one a'."""
        n = self.cfg.backup_actions if self.cfg.max_backup else 1
        action = self.sample(self.policy_average, batch.next_obs, self.noise("target_action", batch.next_obs, n))
        next_q = self.critics_target.q_of_actions(batch.next_obs, action).amax(-1).amin(1)
        return batch.reward + batch.mask * per_lane(self.cfg.discount) * next_q

    def critic_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: mean squared error to the target value, summed over the two critics."""
        q = self.critics(batch.obs, batch.action)
        return (q - self.target_value(batch).unsqueeze(1)).square().mean(-1).sum(-1)

    def q_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[lanes]`: -mean Q_i(s, a_0) / mean |Q_j(s, a_0)| with (i, j) = (1, 2) or (2, 1) by a coin; and the mean Q."""
        action = self.sample(self.policy, batch.obs, self.noise("new_action", batch.obs, 1)).squeeze(2)
        q = self.critics(batch.obs, action, frozen=True)  # [lanes, 2, batch]
        ratio = q.mean(-1) / q.detach().abs().mean(-1).flip(1)  # Q_1 / |Q_2| and Q_2 / |Q_1|
        first = self.random.uniform("coin", (1,))[:, 0] > 0.5
        return -torch.where(first, ratio[:, 0], ratio[:, 1]), q.mean((-2, -1))

    def policy_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`[lanes]`: squared error of the noise, averaged over batch and action dimensions, + eta q_loss; and metrics."""
        bc_loss = self.policy.error(batch.obs, self.box.to_unit(batch.action), self.random).mean((-2, -1))
        q_loss, q = self.q_loss(batch)
        loss = bc_loss + self.cfg.eta * q_loss
        return loss, {"actor_loss": loss, "bc_loss": bc_loss, "q_loss": q_loss, "q": q}

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        critic_loss = self.critic_loss(batch)
        self.critic_optimizer.step(critic_loss)
        policy_loss, metrics = self.policy_loss(batch)
        self.actor_optimizer.step(policy_loss)
        if phase:
            polyak(self.policy_average, self.policy, self.cfg.ema_tau)
        polyak(self.critics_target, self.critics, self.cfg.tau)
        return {"critic_loss": critic_loss, **metrics}

    # ---- acting -----------------------------------------------------------------------------------------------

    def act(self, obs: Tensor, state: ActingState | None = None) -> Tensor:
        """One of the candidates `[lanes, envs, A]`: a draw of softmax(min_i Q'_i), or without a state the best one."""
        noise = self.candidate_noise(obs, state, self.cfg.candidates, self.policy.noise_dim)
        draw = None
        if state is not None and state.stream:
            draw = self.random.uniform(f"{state.stream}/{state.timestep}/choice", obs.shape[1:2])
        return self.one_of(obs, noise, draw)

    @property
    def sample_width(self) -> int:
        return self.cfg.candidates * self.policy.noise_dim + 1

    def sample_action(self, obs: Tensor, noise: Tensor) -> Tensor:
        """One of the candidates that all but the last column of `noise` make, by that one's place in its distribution."""
        chains = noise[..., :-1].unflatten(-1, (self.cfg.candidates, self.policy.noise_dim))
        return self.one_of(obs, chains, torch.special.ndtr(noise[..., -1]))

    @torch.no_grad()
    def explore(self, obs: Tensor, random: LaneRandom) -> Tensor:
        """One of new candidates at every environment step, drawn as in evaluation."""
        noise = random.normal("explore", obs.new_empty(*obs.shape[:2], self.cfg.candidates, self.policy.noise_dim))
        draw = random.uniform("explore/choice", obs.shape[1:2])
        return self.within_bounds(self.one_of(self.normalize(obs), noise, draw))

    def one_of(self, obs: Tensor, noise: Tensor, draw: Tensor | None) -> Tensor:
        """One of the candidates that noise `[lanes, envs, n, T A]` makes, by a uniform `[lanes, envs]`; None: the best one."""
        actions = self.sample(self.policy, obs, noise)
        q = self.critics_target.q_of_actions(obs, actions).amin(1)  # [lanes, envs, candidates]
        chosen = choose(q, draw)[..., None, None].expand(-1, -1, 1, actions.shape[-1])
        return actions.gather(2, chosen).squeeze(2)
