"""VAE-BC: cloning conditioned on a latent of the trajectory's future; acting uses the latent with the highest value.

The baseline "future VAE" of Yang, Schuurmans, Abbeel & Nachum, "Dichotomy of Control: Separating What You Can Control from What
You Cannot", ICLR 2023 (arXiv 2210.13435), which is their method without its constraint: a posterior q(z | future) and a policy
pi(a | s, z) as in a variational autoencoder of actions, a prior p(z | s), and a value V(s, z) that regresses the return. Acting
samples candidates from the prior and takes the one with the highest value. Nothing keeps environment noise out of z; the
constraint of dichotomy of control (`offrl.agents.doc`, which builds on this file) does.

Deviations: the authors' code of this baseline does not run, and their text leaves the networks open, so these are ours. The
policy is Markov (state and latent, no history). The future is a set of timesteps (s, a, r, t) whose embeddings are averaged;
it ends after `suffix` timesteps. The value's loss reaches the posterior. The KL divergence is that of a likelihood bound: sums
over timesteps, divided by their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from offrl.agents.base import WindowBatch
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import MLP, Adam, GaussianActor, categorical_log_prob, normal_log_prob, one_hot
from offrl.nets.latents import Categorical, Gaussian

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset


@dataclass
class VAEBCConfig:
    latent: Literal["categorical", "gaussian"] = "categorical"  # distribution of z
    latent_size: int = 16  # number of dimensions, or of categories
    suffix: int = 64  # number of timesteps of the future that the posterior sees
    candidates: int = 100  # N, samples of the prior among which acting chooses; categorical: all categories
    least_mass: float = 0.01  # categorical: smallest prior probability of a candidate
    hold: int | None = None  # timesteps for which acting keeps a latent; None: the whole episode
    kl_weight: float = 1.0  # weight of KL(q || p)
    lr: float = 3e-4  # learning rate
    weight_decay: float = 1e-4  # weight decay of all parameters
    grad_clip: float = 0.25  # maximum norm of the gradient
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    sample_actions: bool = False  # discrete actions: sample from the policy instead of taking the most likely one
    normalize_obs: bool = True  # standardise observations with the dataset's statistics
    least: ClassVar[dict[str, int]] = {"latent_size": 1, "suffix": 1, "candidates": 1, "hold": 1}
    tiny: ClassVar[dict[str, Any]] = {"suffix": 3}  # settings of the contract tests


@dataclass(kw_only=True)
class VAEBCState(ActingState):
    """What acting carries through a batch of episodes.

    Attributes:
        latent: `[lanes, envs, size]` latents in use; None: `act` chooses them at the next observation.
        value: `[lanes, envs]` standardised values of these latents.
    """

    latent: Tensor | None = None
    value: Tensor | None = None


class VAEBC(RecurrentAgent[VAEBCConfig]):
    """min E [-log pi(a_t | s_t, z)] + KL(q || p) + (V(s, z) - R)^2, z ~ q(z | future)."""

    Config: ClassVar[type] = VAEBCConfig
    batch_fields = ("return_to_go", "timestep")
    takes_discrete = True
    uses_reward = False
    stream = "doc"  # the names of random numbers, which DoC shares, begin with it
    value_shapes_latent: ClassVar[bool] = True  # the losses of value and prior reach the posterior
    horizon: Tensor
    reward_scale: Tensor
    return_mean: Tensor
    return_std: Tensor

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        if not cfg.hidden:
            raise ValueError("hidden=[] should name the width of one hidden layer at least.")
        self.window = cfg.suffix
        self.latent: Categorical | Gaussian = (Gaussian if cfg.latent == "gaussian" else Categorical)(cfg.latent_size)
        for name in ("horizon", "reward_scale", "return_mean", "return_std"):
            self.register_buffer(name, torch.tensor(0.0 if name == "return_mean" else 1.0))

        def mlp(name: str, fan_in: int, fan_out: int) -> MLP:
            return MLP(spec.seeds, [fan_in, *cfg.hidden, fan_out], name=f"doc/{name}")

        state = spec.obs_dim + 1  # observation and time
        self.embed = mlp("embed", state + spec.action_dim + 1, cfg.hidden[-1])
        self.posterior_head = mlp("posterior", cfg.hidden[-1], self.latent.outputs)
        self.prior = mlp("prior", state, self.latent.outputs)
        self.value = mlp("value", state + cfg.latent_size, 1)
        self.policy: MLP | GaussianActor
        if spec.discrete:
            self.policy = mlp("policy", state + cfg.latent_size, spec.action_dim)
        else:
            self.policy = GaussianActor.of(spec, cfg.hidden, extra_inputs=1 + cfg.latent_size, log_std=(-5.0, 2.0))
        nets = (self.embed, self.posterior_head, self.prior, self.value, self.policy)
        self.learnt = [p for net in nets for p in net.parameters()]
        self.optimizer = Adam(self.learnt, cfg.lr, weight_decay=cfg.weight_decay, clip=cfg.grad_clip)

    def setup(self, dataset: OfflineDataset) -> None:
        """Read the longest episode's length, the std of rewards, and mean and std of returns: networks see these scaled.

        Constant rewards are 0 to the networks.
        """
        self.horizon.fill_(dataset.steps.max())
        std = dataset.rewards.double().std(correction=0)
        # Constant rewards tell nothing; divided by a std of about 0 they would drown the networks' other inputs.
        self.reward_scale.fill_(0.0 if dataset.constant_rewards else 1 / (std + 1e-6))
        returns = dataset.return_to_go.double()
        self.return_mean.fill_(returns.mean())
        self.return_std.fill_(returns.std(correction=0) + 1e-6)

    # ---- losses, `[lanes]` each -------------------------------------------------------------------------------

    def state(self, obs: Tensor, timestep: Tensor | int) -> Tensor:
        """`[..., O + 1]`: normalised observation and timestep / horizon, since the time left is part of the state."""
        time = torch.zeros_like(obs[..., :1]) + (timestep.unsqueeze(-1) if isinstance(timestep, Tensor) else timestep)
        return torch.cat([obs, time / self.horizon], -1)

    def states(self, batch: WindowBatch) -> Tensor:
        """`[lanes, batch, time, O + 1]`: the states of the windows."""
        return self.state(batch.obs, batch.timestep)

    def encode_action(self, action: Tensor) -> Tensor:
        """Actions as inputs of a network: discrete ones as one-hot vectors."""
        return one_hot(action, self.spec.action_dim, self.return_std.dtype) if self.spec.discrete else action

    def posterior(self, batch: WindowBatch) -> Tensor:
        """Outputs of q(z | future) `[lanes, batch, outputs]`; the future is the whole window."""
        reward = (batch.reward * self.reward_scale).unsqueeze(-1)
        steps = [self.states(batch), self.encode_action(batch.action), reward]
        embedded = self.embed(torch.cat(steps, -1).flatten(1, 2)).relu().unflatten(1, batch.reward.shape[1:])
        valid = batch.valid.unsqueeze(-1)
        return self.posterior_head((embedded * valid).sum(2) / valid.sum(2))

    def action_loss(self, batch: WindowBatch, z: Tensor) -> Tensor:
        """-log pi(a_t | s_t, z), averaged over the valid timesteps."""
        z = z.unsqueeze(2).expand(-1, -1, batch.obs.shape[2], -1)
        out = self.policy(torch.cat([self.states(batch), z], -1).flatten(1, 2))
        action, valid = batch.action.flatten(1, 2), batch.valid.flatten(1)
        if self.spec.discrete:
            log_prob = categorical_log_prob(out, action)
        else:
            mean, std = out
            log_prob = normal_log_prob(mean, std, action)
        return -(log_prob * valid).sum(1) / valid.sum(1)

    def divergence(self, batch: WindowBatch, q: Tensor, p: Tensor) -> Tensor:
        """KL(q || p) per valid timestep."""
        return self.latent.divergence(q, p).sum(1) / batch.valid.sum((1, 2))

    def prior_loss(self, batch: WindowBatch, q: Tensor) -> Tensor:
        """KL(q(z | future) || p(z | s)), s the windows' first state."""
        return self.divergence(batch, q, self.prior(self.states(batch)[:, :, 0]))

    def value_loss(self, batch: WindowBatch, z: Tensor) -> Tensor:
        """(V(s, z) - R)^2 with standardised R, at the windows' first timestep, where latents are chosen."""
        target = (batch.return_to_go[:, :, 0] - self.return_mean) / self.return_std
        return (self.values(self.states(batch)[:, :, 0], z) - target).square().mean(1)

    def values(self, state: Tensor, z: Tensor) -> Tensor:
        """V(s, z) `[lanes, n]`, standardised."""
        return self.value(torch.cat([state, z], -1)).squeeze(-1)

    def losses(self, batch: WindowBatch, q: Tensor, z: Tensor) -> dict[str, Tensor]:
        """The losses by name, of posterior outputs `q` and their sample `z`."""
        shaped_z, shaped_q = (z, q) if self.value_shapes_latent else (z.detach(), q.detach())
        return {
            "action_loss": self.action_loss(batch, z),
            "value_loss": self.value_loss(batch, shaped_z),
            "prior_loss": self.cfg.kl_weight * self.prior_loss(batch, shaped_q),
        }

    def update(self, batch: WindowBatch, phase: int) -> dict[str, Tensor]:
        q = self.posterior(batch)
        losses = self.losses(batch, q, self.latent.sample(q, self.random, "doc/posterior"))
        self.optimizer.step(torch.stack(list(losses.values())).sum(0))
        return losses

    def label(self, batch: WindowBatch) -> Tensor:
        """z, sampled from the posterior."""
        return self.latent.sample(self.posterior(batch), self.random, "doc/label")

    # ---- acting -----------------------------------------------------------------------------------------------

    def choose_latent(self, state: Tensor, stream: str) -> tuple[Tensor, Tensor]:
        """argmax_i V(s, z_i) over candidates of p(z | s), `[lanes, n, size]`, and its value `[lanes, n]`."""
        cfg = self.cfg
        z, admitted = self.latent.candidates(self.prior(state), cfg.candidates, cfg.least_mass, self.random, stream)
        repeated = state.unsqueeze(2).expand(*z.shape[:3], -1)
        value = self.values(repeated.flatten(1, 2), z.flatten(1, 2)).unflatten(1, z.shape[1:3])
        best, index = value.masked_fill(~admitted, -torch.inf).max(-1)
        return at_step(z, index), best

    def init(self, envs: int) -> VAEBCState:
        return VAEBCState()

    def act(self, obs: Tensor, state: VAEBCState | None = None) -> Tensor:
        state = state or self.init(obs.shape[1])
        s = self.state(obs, state.timestep)
        if state.latent is None:
            state.latent, state.value = self.choose_latent(s, f"{state.stream}/latent/{state.timestep}")
        out = self.policy(torch.cat([s, state.latent], -1))
        return self.discrete_action(out, state) if self.spec.discrete else out[0]

    def update_state(self, state: VAEBCState, action: Tensor, reward: Tensor) -> VAEBCState:
        """The next timestep with the same latent, until `hold` timesteps are over."""
        state = replace(state, timestep=state.timestep + 1)
        over = self.cfg.hold and state.timestep % self.cfg.hold == 0
        return replace(state, latent=None, value=None) if over else state

    @torch.no_grad()
    def predicted_return(self, obs: Tensor, state: VAEBCState) -> Tensor | None:
        """V(s, z*), the value of the chosen latent."""
        self.act(self.normalize(obs), state)
        return None if state.value is None else state.value * self.return_std + self.return_mean


def at_step(x: Tensor, step: Tensor) -> Tensor:
    """`[lanes, batch, steps, n]` to `[lanes, batch, n]`: each sample's vector at its own step (or candidate) `step`."""
    return x.gather(2, step.view(*step.shape, 1, 1).expand(-1, -1, 1, x.shape[-1])).squeeze(2)
