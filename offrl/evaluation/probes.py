"""`offrl probe`: is a policy's promise kept, and how much of the environment's luck is in what the policy is told?

Consistency. A policy that is asked for a return, or that values what it is about to do, promises a return; obtained is what it
gets. Where luck passes for skill the first is above the second (Yang et al., "Dichotomy of Control", ICLR 2023).

Leak. What training tells the policy of the future (a return, a cluster's label, a latent) may say what the environment was
going to do. How much, beyond what state and action say, is measured by networks that tell which outcomes belong to which
samples, on episodes that they have not seen: the contrastive bound on the conditional information, in nats, at most
log(batch). Two outcomes: the next reward and state, and the environment's own draw where the dataset recorded it. A label
dealt out again among the samples is the control: what it appears to say is the error of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.data.dataset import OfflineDataset
from offrl.nets import Adam, one_hot
from offrl.nets.contrastive import PairCritic, info_nce
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

BATCH, HELD_OUT, SHOWN = 256, 0.25, 50  # rows of a batch, share of episodes kept for the measurement, batches of it
WIDEST = 10.0  # standard deviations that a standardised input may lie from the mean


@dataclass
class Leak:
    """Nats about an outcome, one number a lane: in state and action, what the label adds, and a dealt label seems to add."""

    known: list[float]
    gain: list[float]
    control: list[float]


@dataclass
class Probe:
    """What was found of a run, one number a lane; None where it promises, or tells, nothing.

    Attributes:
        promised, obtained: mean returns over the episodes. sampled: whether discrete actions were drawn.
        outcome: leak of the next reward and state. noise: leak of the environment's own draw, where it was recorded.
    """

    run: str
    method: str
    dataset: str
    sampled: bool
    promised: list[float] | None
    obtained: list[float] | None
    outcome: Leak | None
    noise: Leak | None


# ---- leak ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def labels(agent: Agent, store: OfflineDataset, rows: Tensor) -> Tensor | None:
    """What training would tell the policy of the given rows `[lanes, n]`, `[lanes, n, width]`."""
    if agent.window is None:
        batch = store.transitions(rows, agent.batch_fields)
    else:
        batch = store.windows(rows, agent.window, agent.batch_fields)
    return agent.label(agent.prepare(batch))


def reward_and_state(agent: Agent, store: OfflineDataset) -> Tensor:
    """`[N, O + 1]`: the outcome of every row, standardised."""
    reward = store.rewards / (store.rewards.std(correction=0) + 1e-6)
    return torch.cat([reward.unsqueeze(1), agent.normalize(store.next_observations)], 1)


def draws(noise: Tensor) -> Tensor:
    """`[N, n]`: what the environment drew; whole numbers as one-hot vectors, others standardised."""
    if not noise.is_floating_point():
        return one_hot(noise.long(), int(noise.max()) + 1, torch.float32).flatten(1)
    noise = noise.view(len(noise), -1).float()
    return (noise - noise.mean(0)) / (noise.std(0, correction=0) + 1e-6)


def leak(
    agent: Agent, store: OfflineDataset, outcome: Tensor, updates: int = 1000, hidden: Sequence[int] = (64, 64)
) -> Leak | None:
    """How much the agent's labels say of `outcome` `[N, n]` beyond states and actions; None: it has no labels.

    Args:
        updates: of the networks that tell outcomes apart.
        hidden: their widths.

    Raises:
        OffrlError: too few episodes to keep some for the measurement.
    """
    seeds, device = agent.spec.seeds, store.device
    random = LaneRandom(seeds, device)
    if labels(agent, store, torch.zeros(len(seeds), 1, dtype=torch.int64, device=device)) is None:
        return None
    if store.episodes < 4:
        raise OffrlError(f"{store.info.id} has {store.episodes} episodes; a probe needs at least four.")
    mixed = torch.randperm(store.episodes, generator=torch.Generator().manual_seed(0)).to(device)
    kept = torch.zeros(store.episodes, dtype=torch.bool, device=device)
    kept[mixed[: max(1, int(store.episodes * HELD_OUT))]] = True
    seen, unseen = ((kept[store.episode_of_row] == flag).nonzero().squeeze(1) for flag in (False, True))
    action = one_hot(store.actions, store.action_dim, store.rewards.dtype) if store.info.discrete else store.actions
    time = (store.timesteps / store.steps.max()).to(store.rewards.dtype).unsqueeze(1)
    context = torch.cat([agent.normalize(store.observations), action, time], 1).clamp(-WIDEST, WIDEST)
    outcome = outcome.to(context).clamp(-WIDEST, WIDEST)
    agent.random.step.fill_(0)
    some = labels(agent, store, _draw(random, seen, 0, 4096))
    assert some is not None
    centre, spread = some.mean(1, keepdim=True), some.std(1, keepdim=True) + 1e-6
    sizes = context.shape[1], context.shape[1] + some.shape[2]
    nets = [
        PairCritic(seeds, size, outcome.shape[1], hidden, 32, name=f"doc/probe/{name}").to(context)
        for name, size in zip(("base", "told", "dealt"), (sizes[0], sizes[1], sizes[1]))
    ]
    optimizer = Adam([p for net in nets for p in net.parameters()], 1e-3, weight_decay=1e-2)

    def losses(rows: Tensor, step: int) -> Tensor:
        """`[3, lanes]`: contrastive losses without the label, with it, and with one dealt out again."""
        agent.random.step.fill_(step)
        told = labels(agent, store, rows)
        assert told is not None
        told = ((told - centre) / spread).clamp(-WIDEST, WIDEST)
        here, there = context[rows], outcome[rows]
        base = nets[0](here, there)
        more = [
            base.detach() + net(torch.cat([here, x], -1), there) for net, x in zip(nets[1:], (told, told.roll(1, 1)))
        ]
        return torch.stack([info_nce(base), *(info_nce(x) for x in more)])

    for step in range(1, updates + 1):
        optimizer.step(losses(_draw(random, seen, step, BATCH), step).sum(0))
    with torch.no_grad():
        last = updates + 1
        measured = torch.stack([losses(_draw(random, unseen, last + i, BATCH), last + i) for i in range(SHOWN)]).mean(0)
    base, with_label, with_dealt = measured
    return Leak((-base).tolist(), (base - with_label).tolist(), (base - with_dealt).tolist())


def _draw(random: LaneRandom, rows: Tensor, step: int, count: int) -> Tensor:
    """`[lanes, count]` of the given rows, with replacement."""
    return rows[random.integers("probe", len(rows), (count,), torch.tensor(step, device=rows.device))]
