"""DT: decision transformer; a causal transformer predicts the action from past (return-to-go, state, action) tokens.

Chen et al., "Decision Transformer: Reinforcement Learning via Sequence Modeling", NeurIPS 2021 (arXiv 2106.01345); authors'
code kzl/decision-transformer, folder `gym/`, whose model and update these are: GPT-2 blocks (layer norm first, ReLU) without
position embedding; the three tokens of a timestep share a learned embedding of its place in the episode; layer norm and dropout
before the first block. When acting, the first return-to-go is the target return, and rewards are subtracted from it.

The windows have the authors' distribution: an episode in proportion to its length, and a start uniform over its timesteps. A
uniformly sampled row gives exactly that.

Deviations, none of which changes the distribution of an update: padding stands after the window's timesteps, not before them,
where causality hides it without an attention mask; the last block and the head are computed at the tokens that are asked for,
and the heads for states and returns, which the authors never train, are left out; dropout uses the lane's random numbers, at
a rate of 0.100006. A row whose successor the dataset lacks (a D4RL file's last timestep before a time limit) is no token here,
though its reward is in the returns.

Discrete actions, which the authors' `gym/` lacks: one-hot tokens, cross-entropy, and the most likely action (or a sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from offrl.agents.base import Spec, WindowBatch
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import Adam, Drop, categorical_log_prob, check_dropout, dropout, lane_generators, one_hot, per_lane
from offrl.nets.lanes import normal_
from offrl.nets.transformer import Block, LayerNorm, Linear

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset

EVERY, STATES, LAST = slice(None), slice(1, None, 3), slice(-1, None)  # tokens whose outputs are computed


@dataclass
class DTConfig:
    context: int = 20  # K, number of timesteps that the policy sees
    target_return: float | None = None  # return to condition on when acting; None: the dataset's best return
    return_scale: float = 1.0  # factor of the returns-to-go that enter the network (1e-3 for MuJoCo)
    embed: int = 128  # width of the tokens; the blocks' hidden layers are four times as wide
    layers: int = 3  # number of blocks
    heads: int = 1  # number of attention heads
    dropout: float = 0.1  # dropout rate of embeddings, attention and the blocks' outputs
    lr: float = 1e-4  # learning rate
    warmup: int = 10_000  # updates of linear warm-up
    weight_decay: float = 1e-4  # weight decay of all parameters
    grad_clip: float = 0.25  # maximum norm of the gradient
    max_length: int = 1000  # number of timesteps with an embedding of their own; later ones share the last one's
    count_padding: bool = False  # average the loss over padding too, so that short windows weigh less (as in CORL)
    sample_actions: bool = False  # discrete actions: sample from the policy instead of taking the most likely one
    normalize_obs: bool = True  # standardise observations with the dataset's statistics
    least: ClassVar[dict[str, int]] = {"context": 1, "embed": 1, "layers": 1, "heads": 1, "max_length": 1}
    # settings of the contract tests
    tiny: ClassVar[dict[str, Any]] = {"context": 3, "embed": 16, "layers": 1, "warmup": 20}


class Transformer(nn.Module):
    """Embeddings of returns, states and actions, the blocks, and the head that predicts actions."""

    def __init__(self, spec: Spec, cfg: DTConfig) -> None:
        super().__init__()
        seeds, d, self.max_length = spec.seeds, cfg.embed, cfg.max_length
        check_dropout(cfg.dropout)
        if d % cfg.heads:
            raise ValueError(f"embed={d} should be a multiple of heads={cfg.heads}.")
        self.embed_return = Linear(seeds, 1, d, "dt/return")
        self.embed_state = Linear(seeds, spec.obs_dim, d, "dt/state")
        self.embed_action = Linear(seeds, spec.action_dim, d, "dt/action")
        times = torch.empty(len(seeds), self.max_length, d)
        for lane, generator in enumerate(lane_generators(seeds, "dt/time")):
            normal_(times[lane], generator)
        self.embed_time = nn.Parameter(times)
        self.norm_in, self.norm_out = LayerNorm(len(seeds), d), LayerNorm(len(seeds), d)
        self.blocks = nn.ModuleList(Block(seeds, d, cfg.heads, f"dt/{i}") for i in range(cfg.layers))
        self.head = Linear(seeds, d, spec.action_dim, "dt/head")

    def tokens(self, embedded: Sequence[Tensor], timestep: Tensor) -> Tensor:
        """The embedded values of each timestep in turn, as tokens `[lanes, batch, time * len(embedded), embed]`.

        Args:
            embedded: `[lanes, batch, time, embed]` each: some of return, state and action, in this order.
            timestep: `[lanes, batch, time]` positions in the episode.
        """
        first_row = torch.arange(len(timestep), device=timestep.device) * self.max_length  # of each lane's table
        rows = timestep.clamp(max=self.max_length - 1) + per_lane(first_row, 2)
        time = nn.functional.embedding(rows, self.embed_time.flatten(0, 1))
        return self.norm_in(torch.stack([x + time for x in embedded], 3).flatten(2, 3))

    def forward(self, tokens: Tensor, wanted: slice, drop: Drop | None = None) -> Tensor:
        """The head's outputs at the `wanted` tokens, `[lanes, batch, wanted, A]`."""
        count = tokens.shape[2]
        visible = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        x = drop("dt/embed", tokens) if drop else tokens
        for block in self.blocks[:-1]:
            x = block(x, visible, EVERY, drop)
        x = self.blocks[-1](x, visible, wanted, drop)
        return self.head(self.norm_out(x))


@dataclass(kw_only=True)
class DTState(ActingState):
    """What acting carries through a batch of episodes.

    Attributes:
        return_to_go: `[lanes, envs]` target return minus the rewards so far.
        history: tokens `[lanes, envs, 3 n, embed]` of the last n < K timesteps.
        prompt: tokens `[lanes, envs, 2, embed]` of the present return-to-go and observation, which `act` writes.
    """

    return_to_go: Tensor
    history: Tensor
    prompt: Tensor | None = None


class DT(RecurrentAgent[DTConfig]):
    """pi(. | the last K returns-to-go, states and actions) <- argmin E_D (pi - a)^2."""

    Config = DTConfig
    takes_discrete = True
    stream = "dt"
    batch_fields = ("return_to_go", "timestep")
    obs_eps = 1e-6
    target: Tensor

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.window = cfg.context
        self.register_buffer("target", torch.zeros(spec.lanes, device=spec.device))
        if cfg.target_return is not None:
            self.target.copy_(torch.as_tensor(cfg.target_return))
        self.net = Transformer(spec, cfg)
        self.optimizer = Adam(
            self.net.parameters(), cfg.lr, weight_decay=cfg.weight_decay, clip=cfg.grad_clip, warmup=cfg.warmup
        )

    def setup(self, dataset: OfflineDataset) -> None:
        """Read the best return of a complete episode if the settings name no target."""
        if self.cfg.target_return is None:
            self.target.fill_(dataset.best_return)

    # ---- learning ---------------------------------------------------------------------------------------------

    def embed_prompt(self, return_to_go: Tensor, obs: Tensor) -> list[Tensor]:
        """Embeddings of returns-to-go `[lanes, batch, time]` and of normalised observations."""
        scaled = return_to_go * per_lane(self.cfg.return_scale, 2)
        return [self.net.embed_return(scaled.unsqueeze(-1)), self.net.embed_state(obs)]

    def embed_action(self, action: Tensor) -> Tensor:
        """Embeddings of actions; discrete ones are one-hot vectors first."""
        if self.spec.discrete:
            action = one_hot(action, self.spec.action_dim, self.target.dtype)
        return self.net.embed_action(action)

    def drop(self, name: str, x: Tensor) -> Tensor:
        return dropout(x, self.cfg.dropout, self.random, name)

    def predictions(self, batch: WindowBatch) -> Tensor:
        """The head's outputs at the windows' states, `[lanes, batch, time, A]`, with dropout."""
        embedded = [*self.embed_prompt(batch.return_to_go, batch.obs), self.embed_action(batch.action)]
        tokens = self.net.tokens(embedded, batch.timestep)
        never = isinstance(self.cfg.dropout, float) and self.cfg.dropout == 0
        return self.net(tokens, STATES, None if never else self.drop)

    def action_loss(self, batch: WindowBatch) -> Tensor:
        """`[lanes]`: squared error averaged over action dimensions, or cross-entropy, averaged over the valid timesteps."""
        out = self.predictions(batch)
        if self.spec.discrete:
            error = -categorical_log_prob(out, batch.action)
        else:
            error = (self.squash(out) - batch.action).square().mean(-1)
        steps = batch.valid[0].numel() if self.cfg.count_padding else batch.valid.sum((1, 2))
        return (error * batch.valid).sum((1, 2)) / steps

    def update(self, batch: WindowBatch, phase: int) -> dict[str, Tensor]:
        loss = self.action_loss(batch)
        self.optimizer.step(loss)
        return {"action_loss": loss}

    def label(self, batch: WindowBatch) -> Tensor:
        """The return to go."""
        return batch.return_to_go[:, :, :1]

    # ---- acting -----------------------------------------------------------------------------------------------

    def squash(self, out: Tensor) -> Tensor:
        """The head's outputs as continuous actions within their bounds."""
        return self.box.from_unit(out.tanh())

    def init(self, envs: int) -> DTState:
        target = self.target.unsqueeze(1).expand(-1, envs)
        return DTState(return_to_go=target, history=target.new_zeros(*target.shape, 0, self.cfg.embed))

    def predicted_return(self, obs: Tensor, state: DTState) -> Tensor:
        """The target return."""
        return state.return_to_go

    def act(self, obs: Tensor, state: DTState | None = None) -> Tensor:
        state = state or self.init(obs.shape[1])
        prompt = self.embed_prompt(state.return_to_go.unsqueeze(2), obs.unsqueeze(2))
        state.prompt = self.net.tokens(prompt, self._timestep(state))
        out = self.net(torch.cat([state.history, state.prompt], 2), LAST).squeeze(2)
        return self.discrete_action(out, state) if self.spec.discrete else self.squash(out)

    @torch.no_grad()
    def update_state(self, state: DTState, action: Tensor, reward: Tensor) -> DTState:
        """Append the timestep's tokens to the history, and forget the oldest timestep when K - 1 follow it."""
        if state.prompt is None:
            raise RuntimeError("DT: call select_action before update_state")
        taken = self.net.tokens([self.embed_action(action.unsqueeze(2))], self._timestep(state))
        history = torch.cat([state.history, state.prompt, taken], 2)
        return replace(
            state,
            timestep=state.timestep + 1,
            return_to_go=state.return_to_go - reward,
            history=history[:, :, 3:] if history.shape[2] == 3 * self.cfg.context else history,
            prompt=None,
        )

    def _timestep(self, state: DTState) -> Tensor:
        """`[lanes, envs, 1]`."""
        return torch.full_like(state.return_to_go, state.timestep, dtype=torch.int64).unsqueeze(2)
