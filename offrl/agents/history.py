"""Histories: any transition agent with a critic, learning from and acting on encodings of the episode so far.

After Hong, Dragan & Levine, "Offline RL with Observation Histories: Analyzing and Improving Sample Complexity", ICLR 2024
(arXiv 2310.20663). Of the paper only the abstract and the reviews were available to us: this is a re-design that keeps to
what they say, not a reproduction, and nobody's numbers are comparable (docs/observation_histories.md).

The agent is not changed: it is built for observations z_t = phi(o_0, a_0, ..., o_t), and its update gets transitions
(z_t, a_t, r_t, z'_{t+1}) whose z_t has a gradient. What its critics' and values' optimisers differentiate also gives the
gradient by z_t, which goes on into phi; the actor's does not. z'_{t+1} comes from a target encoder, a moving average. phi may
be regularised by a bisimulation loss (`offrl.nets.bisimulation`), whose value is logged in any case.

Windows begin with `burn_in` timesteps from which nothing is learnt but the state of the encoder (as in R2D2, Kapturowski et
al., ICLR 2019), as far as their episode has them: at its start the empty state is the true one. The sampler draws a row that
is learnt from, and the window around it, so that rows are learnt from as often as the sampler chooses them, wherever in an
episode they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from offrl.agents.acting import lane_settings
from offrl.agents.base import Agent, Batch, Spec, WindowBatch
from offrl.agents.recurrent import ActingState, RecurrentAgent
from offrl.nets import Adam, Critics, make_target, one_hot, per_lane, polyak
from offrl.nets.bisimulation import EncodingModels, Metric, Step, bisimulation_loss, pairs, with_events
from offrl.nets.history import Encoder, GRUEncoder, WindowEncoder, memories
from offrl.utils.errors import OffrlError


@dataclass
class HistoryConfig:
    encoder: Literal["gru", "window"] = "gru"  # a recurrent network, or an MLP of the last `context` timesteps
    length: int = 8  # timesteps of a window that the agent learns from; the agent's batch is batch_size * length
    burn_in: int = 8  # timesteps before them, for the state of a GRU alone (a window has context - 1)
    context: int = 4  # timesteps that encoder=window sees; 1: no memory
    latent: int = 32  # width of the encoding; 0 (of a window): the window itself
    hidden: int = 128  # width of the encoder's state and hidden layers
    lr: float = 3e-4  # learning rate of the encoder
    tau: float = 0.005  # step size of the target encoder
    bisimulation: float = 0.0  # weight of the bisimulation loss in the encoder's; 0: it is logged
    models: bool = True  # train the models of the bisimulation loss; without them it is neither used nor logged
    metric: Metric = "vector"  # distance of encodings: of vectors, or of each coordinate
    pairs: Literal["any", "same_action"] = "any"  # timesteps that are compared; same_action: of discrete actions
    events: float = 0.0  # share of pairs with a reward far from the batch's median, for sparse rewards; 0: as they come
    slope: float = 0.5  # weight of pairs that are too close, against 1 - slope; 0.5: alike
    warmup: int = 0  # updates before the loss has its weight
    model_hidden: int = 256  # width of the models' hidden layer
    model_lr: float = 1e-3  # learning rate of the models

    least: ClassVar[dict[str, int]] = {"length": 1, "context": 1, "hidden": 1, "model_hidden": 1, "bisimulation": 0}

    @property
    def label(self) -> str:
        """The name in reports."""
        return "GRU" if self.encoder == "gru" else f"window{self.context}"


@dataclass(kw_only=True)
class HistoryState(ActingState):
    """What is carried through an episode.

    Attributes:
        memory: `[lanes, envs, M]` the encoder's before the present observation; latest: the one after it.
        previous: `[lanes, envs, A]` the last action, as the encoder sees it.
        inner: state of the agent itself.
    """

    memory: Tensor
    latest: Tensor
    previous: Tensor
    inner: Any = None

    def without_samples(self) -> Self:
        inner = None if self.inner is None else self.inner.without_samples()
        return replace(super().without_samples(), inner=inner)


class HistoryAgent(RecurrentAgent[HistoryConfig]):
    """An agent that sees z_t = phi(o_0, a_0, ..., o_t) where it saw o_t.

    Args:
        spec: of the dataset.
        config: of the encoder and its losses.
        make: builds the agent from a Spec; it is called with one whose observations are encodings.

    Raises:
        OffrlError: an agent that cannot see encodings.
    """

    Config = HistoryConfig
    takes_discrete = True
    stream = "history"
    reward_scale: Tensor

    def __init__(self, spec: Spec, config: HistoryConfig, make: Callable[[Spec], Agent]) -> None:
        self._make: Any = make
        super().__init__(spec, config)
        self._make = None  # copies go to other processes

    def build(self) -> None:
        spec, cfg = self.spec, self.cfg
        self.encoder = make_encoder(spec, cfg)
        self.encoder_target = make_target(self.encoder)
        self.latent_dim = cfg.latent or self.encoder.memory_dim
        inner = replace(spec, obs_dim=self.latent_dim, obs_mean=None, obs_std=None)
        self.agent: Agent[Any] = self._make(inner)
        check_agent(self.agent)
        self.agent.random = self.random  # its `step` is the engine's
        self.period, self.batch_fields = self.agent.period, self.agent.batch_fields
        self.uses_reward = getattr(self.agent, "uses_history", False) and getattr(self.agent, "uses_reward", False)
        self.burn_in = cfg.burn_in if cfg.encoder == "gru" else cfg.context - 1
        self.window = self.burn_in + cfg.length
        self.window_before = (self.burn_in, self.window - 1)
        if not getattr(self.agent.cfg, "normalize_obs", True):
            self.obs_mean.zero_()
            self.obs_scale.fill_(1)
        self.register_buffer("reward_scale", torch.ones(spec.lanes))
        parameters = list(self.encoder.parameters())
        self.encoder_optimizer = Adam(parameters, cfg.lr) if parameters else None
        if cfg.models:
            self.models = EncodingModels(spec.seeds, self.latent_dim, spec.action_dim, cfg.model_hidden)
            self.model_optimizer = Adam(self.models.parameters(), cfg.model_lr)

    def setup(self, dataset: Any) -> None:
        """Keep 1 / std of the dataset's rewards, in which the bisimulation loss measures them; 1 where they are constant."""
        std = getattr(dataset, "lane_rewards", dataset.rewards).std(-1)
        constant = torch.as_tensor(
            getattr(dataset, "constant_lane_rewards", dataset.constant_rewards), device=std.device
        )
        # Divided by a std of rounding errors alone, constant rewards would drown all else in the loss.
        self.reward_scale.copy_(torch.where(constant, 1.0, 1 / std))

    def phase(self, step: int) -> int:
        return self.agent.phase(step)

    def untrained_lane(self, lane: int) -> Self:
        return type(self)(*lane_settings(self, lane), lambda _: self.agent.untrained_lane(lane))

    # ---- acting -----------------------------------------------------------------------------------------------

    def init(self, envs: int) -> HistoryState:
        memory, previous = self._empty(envs)
        return HistoryState(memory=memory, latest=memory, previous=previous, inner=self.agent.initial_state(envs))

    def _empty(self, envs: int) -> tuple[Tensor, Tensor]:
        like = self.obs_mean.new_zeros(self.spec.lanes, envs, 1)
        return like.expand(-1, -1, self.encoder.memory_dim), like.expand(-1, -1, self.spec.action_dim)

    def act(self, obs: Tensor, state: Any = None) -> Tensor:
        memory, previous = self._empty(obs.shape[1]) if state is None else (state.memory, state.previous)
        exists = torch.full_like(previous[..., :1], float(state is not None and state.timestep > 0))
        latest = self.encoder.advance(self.encoder.features(obs, previous, exists), memory)
        if state is not None:
            state.latest = latest
        return self.agent.select_action(self.encoder.read(latest), state and state.inner)

    def update_state(self, state: Any, action: Tensor, reward: Tensor) -> Any:
        inner = self.agent.update_state(state.inner, action, reward)
        previous = self.as_input(action)
        return replace(state, timestep=state.timestep + 1, memory=state.latest, previous=previous, inner=inner)

    def as_input(self, action: Tensor) -> Tensor:
        """Actions as the encoder and the models see them: one-hot, or in units of half their box."""
        if self.spec.discrete:
            return one_hot(action, self.spec.action_dim, self.obs_mean.dtype)
        return self.box.to_unit(action).to(self.obs_mean.dtype)

    # ---- learning ---------------------------------------------------------------------------------------------

    def learnable(self, batch: WindowBatch) -> tuple[Tensor, Tensor]:
        """First timestep to learn from in each window, and how many there are, `[lanes, batch]` int64.

        They are those behind the burn-in. A window that its episode's start cuts short has as much less of a burn-in, and
        then of these, as is missing: the others are learnt from in windows that begin at the same place.
        """
        first = (self.burn_in - batch.cut).clamp(min=0)
        end = torch.minimum(self.burn_in + self.cfg.length - batch.cut, batch.valid.sum(-1).long())
        return first, end - first

    def chosen(self, batch: WindowBatch) -> Tensor:
        """`[lanes, batch * length]` int64: the timesteps to learn from, as places in the flattened windows.

        `length` of each window: those to learn from in turn, from a random one on, and over again where there are fewer. So
        a row is learnt from as often as the sampler chooses it, on average and if its neighbours are as likely as it is.
        """
        first, count = self.learnable(batch)
        turn = (self.random.uniform("history/turn", count.shape[1:]) * count).long()
        steps = torch.arange(self.cfg.length, device=count.device)
        position = first.unsqueeze(-1) + (turn.unsqueeze(-1) + steps) % count.unsqueeze(-1)
        window = torch.arange(count.shape[1], device=count.device).unsqueeze(-1)
        return (window * batch.valid.shape[2] + position).flatten(1)

    def encodings(self, batch: WindowBatch, at: Tensor) -> tuple[Tensor, Tensor]:
        """z_t, with its gradient, and z'_{t+1} of the target encoder, at places `at` `[lanes, n]` of the windows."""
        action = self.as_input(batch.action)
        previous = action.roll(1, 2)
        exists = torch.ones_like(previous[..., :1])
        exists[:, :, 0] = 0
        found = memories(self.encoder, batch.obs, previous, exists)
        with torch.no_grad():
            target = self.encoder_target
            before = rows(memories(target, batch.obs, previous, exists), at)
            one = torch.ones_like(before[..., :1])
            step = target.features(rows(batch.next_obs, at), rows(action, at), one)
            next_z = target.read(target.advance(step, before))
        return self.encoder.read(rows(found, at)), next_z

    def transitions(self, batch: WindowBatch, at: Tensor, z: Tensor, next_z: Tensor) -> Batch:
        """The batch that the agent learns from, with encodings for observations."""
        position = at % batch.valid.shape[2]
        start = batch.index.gather(1, at // batch.valid.shape[2])
        names = ("action", "reward", "mask", "timestep", *(n for n in vars(batch) if n in self._fields))
        parts = {name: rows(getattr(batch, name), at) for name in names}
        index = torch.where(start < 0, start, start + position)
        return Batch.of({**parts, "obs": z, "next_obs": next_z, "index": index})

    @property
    def _fields(self) -> tuple[str, ...]:
        return (*self.batch_fields, "has_next_action")

    def update(self, batch: WindowBatch, phase: int) -> dict[str, Tensor]:
        at = self.chosen(batch)
        z, next_z = self.encodings(batch, at)
        seen = z.detach().requires_grad_()
        transitions = self.transitions(batch, at, seen, next_z)
        with self.critics_differentiate(seen):
            metrics = self.agent.update(transitions, phase)
            gradient = sum(self.of_critics(), torch.zeros_like(z))
        metrics = metrics | {"encoding_std": std(z.detach()).mean(-1), "critics_gradient": gradient.norm(dim=(1, 2))}
        if self.cfg.models:
            distance, more = self.bisimulation(seen, transitions)
            (of_distance,) = torch.autograd.grad(distance.sum(), seen)
            weight = torch.where(self.random.step > self.cfg.warmup, per_lane(self.cfg.bisimulation, 0), 0.0)
            gradient = gradient + per_lane(weight, 2) * of_distance
            metrics |= more | {"bisimulation_gradient": of_distance.norm(dim=(1, 2))}
        if self.encoder_optimizer is not None:
            self.encoder_optimizer.step((z * gradient).sum((1, 2)))  # whose gradient by phi is that of all these losses
            polyak(self.encoder_target, self.encoder, self.cfg.tau)
        return metrics

    @contextmanager
    def critics_differentiate(self, z: Tensor) -> Iterator[None]:
        """Within it the optimisers of critics and values also keep the gradient of their losses by z."""
        optimizers = critic_optimizers(self.agent)
        for optimizer in optimizers:
            optimizer.watch(z)
        try:
            yield
        finally:
            for optimizer in optimizers:
                optimizer.watch(None)

    def of_critics(self) -> list[Tensor]:
        """The gradients that were kept, one for each step of an optimiser that depends on z."""
        return [gradient for optimizer in critic_optimizers(self.agent) for gradient in optimizer.watched_gradients]

    def bisimulation(self, z: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The bisimulation loss `[lanes]` with its gradient by z, after a step of its models on the same batch."""
        cfg, action, reward = self.cfg, self.as_input(batch.action), batch.reward * per_lane(self.reward_scale)
        losses = self.models.loss(z.detach(), action, reward, batch.next_obs, batch.mask)
        self.model_optimizer.step(losses["transition_loss"] + losses["reward_loss"])
        with torch.no_grad():
            mean, std = self.models.next_encoding(z, action)
        step = Step(z, reward, batch.mask, mean, std)
        group = batch.action if cfg.pairs == "same_action" and self.spec.discrete else None
        if isinstance(cfg.events, Tensor) or cfg.events > 0:
            compared = self.compared(reward)
            step, group = step.at(compared), None if group is None else group.gather(1, compared)
        pair, valid = pairs(self.random.uniform("history/pairs", z.shape[1:2]), group)
        discount = getattr(self.agent.cfg, "discount", 0.99)
        loss = bisimulation_loss(step, pair, valid.to(z.dtype), discount, cfg.metric, cfg.slope)
        return loss, {"bisimulation": loss, **losses}

    def compared(self, reward: Tensor) -> Tensor:
        """`[lanes, n]`: the rows that are paired, with their share of rewards far from the median `[lanes, n]`."""
        median = reward.sort(-1).values[:, reward.shape[1] // 2, None]
        event = (reward - median).abs() > 1  # in standard deviations of the dataset's rewards
        return with_events(self.random.uniform("history/events", reward.shape[1:]), event, self.cfg.events)


def std(x: Tensor) -> Tensor:
    """`[lanes, Z]`: standard deviation over a batch `[lanes, n, Z]`, in an eighth of the time of `torch.std`."""
    centred = x - x.mean(1, keepdim=True)
    return (centred.square().sum(1) / (x.shape[1] - 1)).sqrt()


def rows(x: Tensor, at: Tensor) -> Tensor:
    """Timesteps `[lanes, n, ...]` of windows `[lanes, batch, T, ...]`, at places `[lanes, n]` of the flattened ones."""
    lane, length = torch.arange(len(x), device=x.device).unsqueeze(1), x.shape[2]
    return x[lane, at // length, at % length]  # without a copy of x, whose timesteps may lie apart


def make_encoder(spec: Spec, cfg: HistoryConfig) -> Encoder:
    sizes = (spec.seeds, spec.obs_dim, spec.action_dim, cfg.latent, cfg.hidden)
    if cfg.encoder == "window":
        return WindowEncoder(*sizes, cfg.context)
    if not cfg.latent:
        raise OffrlError("history.latent=0 stacks the timesteps of a window; a GRU needs the width of its encoding.")
    return GRUEncoder(*sizes)


def critic_optimizers(agent: Agent[Any]) -> list[Adam]:
    """The optimisers whose losses shape the encoder: those that `Agent.critic_optimizers` names."""
    return [getattr(agent, name) for name in agent.critic_optimizers if hasattr(agent, name)]


def check_agent(agent: Agent[Any]) -> None:
    """Raise OffrlError for an agent that cannot see encodings."""
    name = type(agent).__name__
    if agent.window is not None:
        raise OffrlError(f"{name} learns from windows by itself; set history=none.")
    if not any(isinstance(module, Critics) for module in agent.modules()):
        raise OffrlError(
            f"{name} learns no critic, which would train the encoder; set history=none, or choose agent=iql."
        )
    if not critic_optimizers(agent):
        raise OffrlError(
            f"{name} has one optimiser for critics and policy, and only the critics' gradient should reach the encoder; set "
            "history=none, or choose agent=iql."
        )
    if agent.pretrain_updates:
        raise OffrlError(
            f"{name} first fits a model to encodings and then keeps it while the encoder learns on, so that it would be "
            "fitted to another encoder; set history=none, or choose agent=iql."
        )
    if type(agent).setup is not Agent.setup:
        raise OffrlError(
            f"{name} looks up the dataset's observations themselves; set history=none, or choose agent=iql."
        )
