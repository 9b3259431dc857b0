"""VAE-BC: cloning conditioned on a latent of the trajectory's future; the best latent is asked for when acting.

The baseline "future VAE" of Yang, Schuurmans, Abbeel & Nachum, "Dichotomy of Control: Separating What You Can Control from What
You Cannot", ICLR 2023 (arXiv 2210.13435), which is their method without its constraint: a posterior q(z | future) and a policy
pi(a | s, z) as in a variational autoencoder of actions, a prior p(z | s), and a value V(s, z) that regresses the return. Acting
takes the candidate of the prior with the highest value. Nothing keeps z from telling what the environment's luck was;
dichotomy of control (`offrl.agents.doc`), which this file is the base of, forbids just that.

Deviations: the authors' code for it does not run and its text leaves the networks open, so these are ours. The policy is
Markov (state and latent, no history), the future is a set of steps (s, a, r, t) whose embeddings are averaged, and it ends
after `suffix` steps. The value's loss reaches the posterior, and the divergence is that of a bound on the likelihood: sums over
steps, divided by the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from offrl.agents.base import Batch, RememberingAgent
from offrl.nets import MLP, Adam, GaussianActor, categorical_log_prob, normal_log_prob, one_hot
from offrl.nets.latents import Categorical, Gaussian

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class VAEBCConfig:
    latent: Literal["categorical", "gaussian"] = "categorical"  # kind of z
    latent_size: int = 16  # dimensions, or number of kinds
    suffix: int = 64  # steps of the future that the posterior sees
    candidates: int = 100  # N, draws of the prior among which the value chooses; categorical: all kinds are candidates
    least_mass: float = 0.01  # categorical: kinds of less prior probability are no candidates
    hold: int | None = None  # steps that a latent is kept when acting; None: the whole episode
    kl_weight: float = 1.0  # weight of KL(q || p)
    lr: float = 3e-4
    weight_decay: float = 1e-4
    grad_clip: float = 0.25  # largest norm of the gradient
    hidden: tuple[int, ...] = (256, 256)  # widths of all hidden layers
    sample_actions: bool = False  # discrete actions: draw from the policy instead of taking the likeliest
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


@dataclass
class Memory:
    """What acting carries through an episode.

    Attributes:
        latent: `[lanes, envs, size]` the latents in use; None: to be chosen at the next observation.
        value: `[lanes, envs]` what they promise, standardised.
        time: steps behind us.
        name: of the draws of this wave of episodes; empty for an agent that is asked without a memory.
    """

    latent: Tensor | None = None
    value: Tensor | None = None
    time: int = 0
    name: str = ""


class VAEBC(RememberingAgent):
    """min E [-log pi(a_t | s_t, z)] + KL(q || p) + (V(s, z) - R)^2, z ~ q(z | future)."""

    Config = VAEBCConfig
    batch_fields = ("return_to_go", "timestep")
    takes_discrete = True
    stream = "doc"
    horizon: Tensor
    reward_scale: Tensor
    return_mean: Tensor
    return_std: Tensor

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.window = cfg.suffix
        self.latent = (Gaussian if cfg.latent == "gaussian" else Categorical)(cfg.latent_size)
        for name in ("horizon", "reward_scale", "return_mean", "return_std"):
            self.register_buffer(name, torch.tensor(0.0 if name == "return_mean" else 1.0))

        def mlp(name: str, fan_in: int, fan_out: int) -> MLP:
            return MLP(spec.seeds, [fan_in, *cfg.hidden, fan_out], name=f"doc/{name}")

        state = spec.obs_dim + 1
        known = state + cfg.latent_size
        self.embed = mlp("embed", state + spec.action_dim + 1, cfg.hidden[-1])
        self.posterior_head = mlp("posterior", cfg.hidden[-1], self.latent.outputs)
        self.prior = mlp("prior", state, self.latent.outputs)
        self.value = mlp("value", known, 1)
        box = spec.action_low, spec.action_high
        self.policy: MLP | GaussianActor = (
            mlp("policy", known, spec.action_dim)
            if spec.discrete
            else GaussianActor(spec.seeds, known, spec.action_dim, cfg.hidden, *box, log_std=(-5.0, 2.0))
        )
        nets = (self.embed, self.posterior_head, self.prior, self.value, self.policy)
        self.learnt = [p for net in nets for p in net.parameters()]
        self.optimizer = Adam(self.learnt, cfg.lr, weight_decay=cfg.weight_decay, clip=cfg.grad_clip)

    def setup(self, store: OfflineDataset) -> None:
        """Learn the longest episode, and the spread of rewards and returns, which networks see and predict standardised."""
        self.horizon.fill_(store.steps.max())
        self.reward_scale.fill_(1 / (store.rewards.double().std(correction=0) + 1e-6))
        returns = store.return_to_go.double()
        self.return_mean.fill_(returns.mean())
        self.return_std.fill_(returns.std(correction=0) + 1e-6)

    # ---- losses, `[lanes]` each -------------------------------------------------------------------------------

    def state(self, obs: Tensor, timestep: Tensor | int) -> Tensor:
        """Normalised observations and the share of the longest episode that is behind: what is left is part of a state."""
        time = torch.zeros_like(obs[..., :1]) + (timestep.unsqueeze(-1) if isinstance(timestep, Tensor) else timestep)
        return torch.cat([obs, time / self.horizon], -1)

    def states(self, batch: Batch) -> Tensor:
        """`[lanes, batch, time, O + 1]` of the windows."""
        assert batch.timestep is not None
        return self.state(batch.obs, batch.timestep)

    def encoded(self, action: Tensor) -> Tensor:
        """Actions as networks want them: discrete ones as one-hot vectors."""
        return one_hot(action, self.spec.action_dim, self.return_std.dtype) if self.spec.discrete else action

    def posterior(self, batch: Batch) -> Tensor:
        """Outputs of q(z | future) `[lanes, batch, outputs]`; the future is the whole window."""
        assert batch.valid is not None
        reward = (batch.reward * self.reward_scale).unsqueeze(-1)
        steps = [self.states(batch), self.encoded(batch.action), reward]
        embedded = self.embed(torch.cat(steps, -1).flatten(1, 2)).relu().unflatten(1, batch.reward.shape[1:])
        valid = batch.valid.unsqueeze(-1)
        return self.posterior_head((embedded * valid).sum(2) / valid.sum(2))

    def action_loss(self, batch: Batch, z: Tensor) -> Tensor:
        """-log pi(a_t | s_t, z), averaged over the steps that exist."""
        assert batch.valid is not None
        z = z.unsqueeze(2).expand(-1, -1, batch.obs.shape[2], -1)
        out = self.policy(torch.cat([self.states(batch), z], -1).flatten(1, 2))
        action, valid = batch.action.flatten(1, 2), batch.valid.flatten(1)
        if self.spec.discrete:
            likelihood = categorical_log_prob(out, action)
        else:
            mean, std = out
            likelihood = normal_log_prob(mean, std, action)
        return -(likelihood * valid).sum(1) / valid.sum(1)

    def divergence(self, batch: Batch, q: Tensor, p: Tensor) -> Tensor:
        """KL(q || p) per step of the windows."""
        assert batch.valid is not None
        return self.latent.divergence(q, p).sum(1) / batch.valid.sum((1, 2))

    def prior_loss(self, batch: Batch, q: Tensor) -> Tensor:
        """KL(q(z | future) || p(z | s)), s the windows' first state."""
        return self.divergence(batch, q, self.prior(self.states(batch)[:, :, 0]))

    def value_loss(self, batch: Batch, z: Tensor) -> Tensor:
        """(V(s, z) - R)^2 at the windows' first steps, where latents are chosen; returns standardised."""
        assert batch.return_to_go is not None
        target = (batch.return_to_go[:, :, 0] - self.return_mean) / self.return_std
        return (self.values(self.states(batch)[:, :, 0], z) - target).square().mean(1)

    def values(self, state: Tensor, z: Tensor) -> Tensor:
        """V(s, z) `[lanes, n]`, standardised."""
        return self.value(torch.cat([state, z], -1)).squeeze(-1)

    def seen(self, x: Tensor) -> Tensor:
        """The posterior, or its latents, as value and prior see it; here their losses shape it."""
        return x

    def losses(self, batch: Batch, q: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {
            "action_loss": self.action_loss(batch, z),
            "value_loss": self.value_loss(batch, self.seen(z)),
            "prior_loss": self.cfg.kl_weight * self.prior_loss(batch, self.seen(q)),
        }

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        q = self.posterior(batch)
        losses = self.losses(batch, q, self.latent.sample(q, self.random, "doc/posterior"))
        self.optimizer.step(torch.stack(list(losses.values())).sum(0))
        return {name: loss.detach() for name, loss in losses.items()}

    def label(self, batch: Batch) -> Tensor:
        """z, drawn from the posterior."""
        return self.latent.sample(self.posterior(batch), self.random, "doc/label")

    # ---- acting -----------------------------------------------------------------------------------------------

    def choose_latent(self, state: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """argmax_i V(s, z_i) over candidates of p(z | s), `[lanes, n, size]`, and its value `[lanes, n]`."""
        cfg = self.cfg
        z, admitted = self.latent.candidates(self.prior(state), cfg.candidates, cfg.least_mass, self.random, name)
        repeated = state.unsqueeze(2).expand(*z.shape[:3], -1)
        value = self.values(repeated.flatten(1, 2), z.flatten(1, 2)).unflatten(1, z.shape[1:3])
        best, index = value.masked_fill(~admitted, -torch.inf).max(-1)
        return at_step(z, index), best

    def decide(self, obs: Tensor, memory: Memory) -> Tensor:
        """The action for normalised observations `[lanes, envs, O]`; chooses the latent where there is none."""
        state = self.state(obs, memory.time)
        if memory.latent is None:
            memory.latent, memory.value = self.choose_latent(state, f"{memory.name}/latent/{memory.time}")
        out = self.policy(torch.cat([state, memory.latent], -1))
        if not self.spec.discrete:
            return out[0]
        return self.choose_action(out, memory)

    def start(self, envs: int, name: str = "") -> Memory:
        return Memory(name=name)

    def observe(self, memory: Memory, action: Tensor, reward: Tensor) -> Memory:
        """The same latent, until it has been held for as long as it should."""
        time = memory.time + 1
        if self.cfg.hold and time % self.cfg.hold == 0:
            return Memory(time=time, name=memory.name)
        return Memory(memory.latent, memory.value, time, memory.name)

    @torch.no_grad()
    def promise(self, obs: Tensor, memory: Memory) -> Tensor:
        """V(s, z*), the return that the chosen latent is worth."""
        self.decide(self.normalize(obs), memory)
        assert memory.value is not None
        return memory.value * self.return_std + self.return_mean


def at_step(x: Tensor, step: Tensor) -> Tensor:
    """`[lanes, batch, steps, n]` to `[lanes, batch, n]`, at each sample's own step (or candidate)."""
    return x.gather(2, step.view(*step.shape, 1, 1).expand(-1, -1, 1, x.shape[-1])).squeeze(2)
