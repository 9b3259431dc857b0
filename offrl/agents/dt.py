"""DT: offline RL as sequence modelling; a causal transformer continues (return-to-go, state, action) with the next action.

Chen et al., "Decision Transformer: Reinforcement Learning via Sequence Modeling", NeurIPS 2021 (arXiv 2106.01345); authors'
code kzl/decision-transformer, folder `gym/`, whose model and update these are: GPT-2 blocks (layer norm first, ReLU) without
position embedding; the three tokens of a step share a learned embedding of its place in the episode; layer norm and dropout
before the first block. The policy is prompted with the return that it should get and told how much of it is left.

Windows are sampled by the authors' law: an episode in proportion to its length, a start uniform over its steps. That is what a
uniformly drawn row gives.

Deviations, none of which changes the law of an update: steps that a window lacks stand behind it, not before it, where
causality hides them without an attention mask; the last block and the head are computed at the tokens that are asked for,
and the heads for states and returns, which the authors never train, are gone; dropout's coins come from the lane's counter, at
a rate of 0.100006. A row whose successor the dataset lacks (a D4RL file's last step before a time limit) is no token here,
though its reward is in the returns.

Discrete actions, which the authors' `gym/` has not: one-hot tokens, cross-entropy, the likeliest action (or a sampled one).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from offrl.agents.base import Batch, RememberingAgent, Spec
from offrl.nets import Adam, Drop, categorical_log_prob, dropout, lane_generators, one_hot, per_lane
from offrl.nets.transformer import Block, KeysValues, LayerNorm, Linear

if TYPE_CHECKING:
    from offrl.data.dataset import OfflineDataset

EVERY, STATES, LAST = slice(None), slice(1, None, 3), slice(-1, None)  # the tokens whose outputs are asked for


@dataclass
class DTConfig:
    context: int = 20  # K, steps that the policy sees
    target_return: float | None = None  # return to ask for when acting; None: the dataset's best
    return_scale: float = 1.0  # multiplies returns-to-go where they enter the network (1e-3 for MuJoCo)
    embed: int = 128  # width of tokens; the blocks' hidden layers have four times as much
    layers: int = 3  # blocks
    heads: int = 1  # of attention
    dropout: float = 0.1  # of embeddings, attention and the blocks' outputs
    lr: float = 1e-4
    warmup: int = 10_000  # updates over which the rate grows
    weight_decay: float = 1e-4  # of all parameters
    grad_clip: float = 0.25  # largest norm of the gradient
    max_length: int = 1000  # steps with an embedding of their own; later ones share the last one's
    count_padding: bool = False  # average the loss over padding too, so that short windows weigh less (as in CORL)
    sample_actions: bool = False  # discrete actions: draw from the policy instead of taking the likeliest
    normalize_obs: bool = True  # standardise observations with the dataset's statistics


class Transformer(nn.Module):
    """Tokens of returns, states and actions, and what follows from them."""

    def __init__(self, spec: Spec, cfg: DTConfig) -> None:
        super().__init__()
        seeds, d, self.max_length = spec.seeds, cfg.embed, cfg.max_length
        self.embed_return = Linear(seeds, 1, d, "dt/return")
        self.embed_state = Linear(seeds, spec.obs_dim, d, "dt/state")
        self.embed_action = Linear(seeds, spec.action_dim, d, "dt/action")
        times = [torch.randn(self.max_length, d, generator=g) for g in lane_generators(seeds, "dt/time")]
        self.embed_time = nn.Parameter(torch.stack(times))
        self.norm_in, self.norm_out = LayerNorm(len(seeds), d), LayerNorm(len(seeds), d)
        self.blocks = nn.ModuleList(Block(seeds, d, cfg.heads, f"dt/{i}") for i in range(cfg.layers))
        self.head = Linear(seeds, d, spec.action_dim, "dt/head")

    def tokens(self, values: dict[Linear, Tensor], timestep: Tensor) -> Tensor:
        """`[lanes, batch, time * kinds, embed]`: the kinds of values, `[lanes, batch, time, ...]`, of each step in turn.

        Args:
            values: by the layer that embeds them.
            timestep: `[lanes, batch, time]` places in the episode.
        """
        first_row = torch.arange(len(timestep), device=timestep.device) * self.max_length  # of a lane's table
        rows = timestep.clamp(max=self.max_length - 1) + per_lane(first_row, 2)
        time = nn.functional.embedding(rows, self.embed_time.flatten(0, 1))
        return self.norm_in(torch.stack([embed(x) + time for embed, x in values.items()], 3).flatten(2, 3))

    def forward(
        self, tokens: Tensor, wanted: slice, past: list[KeysValues] | None = None, drop: Drop | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """The head's outputs `[lanes, batch, wanted, A]`, and each block's keys and values of all tokens so far."""
        seen = past[0][0].shape[2] if past else 0
        count, now = seen + tokens.shape[2], []
        visible = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()[seen:]
        x = drop("dt/embed", tokens) if drop else tokens
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            x, keys_values = block(x, visible, wanted if last else EVERY, past[i] if past else None, drop)
            now.append(keys_values)
        return self.head(self.norm_out(x)), now


@dataclass
class Memory:
    """What acting carries through an episode, of all environments at once.

    Attributes:
        return_to_go: `[lanes, envs]` return that is still to be got.
        tokens: `[lanes, envs, n, embed]` of the last K - 1 steps.
        past: each block's keys and values of `tokens` but the last action; empty once a step has left the window.
        time: steps behind us.
        seen: `tokens` and `past` with the present return and state, when `select_action` has seen them.
        name: of the coins that sampled actions toss.
    """

    return_to_go: Tensor
    tokens: Tensor
    past: list[KeysValues] = field(default_factory=list)
    time: int = 0
    seen: tuple[Tensor, list[KeysValues]] | None = None
    name: str = ""


class DT(RememberingAgent):
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
        target = torch.zeros(spec.lanes, device=spec.device)
        self.register_buffer("target", target if cfg.target_return is None else target + cfg.target_return)
        self.net = Transformer(spec, cfg)
        rates = {"weight_decay": cfg.weight_decay, "clip": cfg.grad_clip, "warmup": cfg.warmup}
        self.optimizer = Adam(self.net.parameters(), cfg.lr, **rates)

    def setup(self, store: OfflineDataset) -> None:
        """Ask for the best return among the episodes that ended, unless the configuration names one."""
        if self.cfg.target_return is None:
            self.target.fill_(store.best_return)

    # ---- learning ---------------------------------------------------------------------------------------------

    def prompt(self, return_to_go: Tensor, obs: Tensor) -> dict[Linear, Tensor]:
        """Return-to-go `[lanes, batch, time]` and normalised observations as the network's tokens want them."""
        scaled = return_to_go * per_lane(self.cfg.return_scale, 2)
        return {self.net.embed_return: scaled.unsqueeze(-1), self.net.embed_state: obs}

    def taken(self, action: Tensor) -> dict[Linear, Tensor]:
        """Actions likewise; discrete ones as one-hot vectors."""
        if self.spec.discrete:
            action = one_hot(action, self.spec.action_dim, self.target.dtype)
        return {self.net.embed_action: action}

    def drop(self, name: str, x: Tensor) -> Tensor:
        return dropout(x, self.cfg.dropout, self.random, name)

    def predictions(self, batch: Batch) -> Tensor:
        """The head's outputs at the windows' states, `[lanes, batch, time, A]`, with dropout."""
        assert batch.return_to_go is not None
        assert batch.timestep is not None
        values = self.prompt(batch.return_to_go, batch.obs) | self.taken(batch.action)
        tokens = self.net.tokens(values, batch.timestep)
        never = isinstance(self.cfg.dropout, float) and self.cfg.dropout == 0
        return self.net(tokens, STATES, drop=None if never else self.drop)[0]

    def action_loss(self, batch: Batch) -> Tensor:
        """`[lanes]`: squared error, or cross-entropy, averaged over the steps that exist and the actions' dimensions."""
        out, valid = self.predictions(batch), batch.valid
        assert valid is not None
        if self.spec.discrete:
            error = -categorical_log_prob(out, batch.action)
        else:
            error = (self.squash(out) - batch.action).square().mean(-1)
        steps = valid[0].numel() if self.cfg.count_padding else valid.sum((1, 2))
        return (error * valid).sum((1, 2)) / steps

    def update(self, batch: Batch, phase: int) -> dict[str, Tensor]:
        loss = self.action_loss(batch)
        self.optimizer.step(loss)
        return {"action_loss": loss.detach()}

    # ---- acting -----------------------------------------------------------------------------------------------

    def squash(self, out: Tensor) -> Tensor:
        """The head's outputs as continuous actions, within their box."""
        low, high = self.spec.action_low, self.spec.action_high
        return out.tanh() * ((high - low) / 2) + (high + low) / 2

    def start(self, envs: int, name: str = "") -> Memory:
        """The memory of episodes that begin."""
        goal = self.target.unsqueeze(1).expand(-1, envs)
        return Memory(goal, goal.new_zeros(*goal.shape, 0, self.cfg.embed), name=name)

    def label(self, batch: Batch) -> Tensor:
        """The return to go."""
        assert batch.return_to_go is not None
        return batch.return_to_go[:, :, :1]

    def promise(self, obs: Tensor, memory: Memory) -> Tensor:
        """The return that was asked for."""
        return memory.return_to_go

    def decide(self, obs: Tensor, memory: Memory) -> Tensor:
        """The action for normalised observations `[lanes, envs, O]`.

        Exactly what full attention over the last K steps gives. While no step has left the window, the keys and values of
        its tokens stay as they were and new tokens alone are computed; later every key would have to forget the step that
        left, so the whole window is.
        """
        step = torch.full_like(memory.return_to_go, memory.time, dtype=torch.int64).unsqueeze(2)
        prompt = self.prompt(memory.return_to_go.unsqueeze(2), obs.unsqueeze(2))
        tokens = torch.cat([memory.tokens, self.net.tokens(prompt, step)], 2)
        known = memory.past[0][0].shape[2] if memory.past else 0
        out, past = self.net(tokens[:, :, known:], LAST, memory.past)
        memory.seen = tokens, past
        out = out.squeeze(2)
        if not self.spec.discrete:
            return self.squash(out)
        return self.choose_action(out, memory)

    @torch.no_grad()
    def observe(self, memory: Memory, action: Tensor, reward: Tensor) -> Memory:
        """What the reward took off the return to go, and the action as a token; the oldest step leaves a full window."""
        assert memory.seen is not None, "observe without select_action before it"
        tokens, past = memory.seen
        step = torch.full_like(memory.return_to_go, memory.time, dtype=torch.int64).unsqueeze(2)
        tokens = torch.cat([tokens, self.net.tokens(self.taken(action.unsqueeze(2)), step)], 2)
        if tokens.shape[2] == 3 * self.cfg.context:
            tokens, past = tokens[:, :, 3:], []
        return Memory(memory.return_to_go - reward, tokens, past, memory.time + 1, name=memory.name)
