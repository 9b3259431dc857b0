"""Probes of a trained policy: predicted against achieved return, and label leakage.

*Predicted return.* A policy that is asked for a return, or that values what it is about to do, predicts a return; achieved is
the mean return of its episodes. Where noise of the environment passes for skill the prediction is above it (Yang et al.,
"Dichotomy of Control", ICLR 2023).

*Label leakage.* The label of a sample in training (a return, a cluster, a latent) may contain the noise of the environment.
Leakage is I(label; outcome | s, a) in nats. Contrastive networks estimate it on held-out episodes by InfoNCE, a lower bound of
at most log(batch). There are two outcomes: the next reward and state, and the environment's own draw where the dataset
recorded it. Shuffled labels are the control: their leakage is zero, so what is estimated for them is the error of the estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.data.dataset import OfflineDataset
from offrl.nets import Adam, one_hot
from offrl.nets.contrastive import PairCritic, info_nce
from offrl.utils.errors import OffrlError
from offrl.utils.random import LaneRandom

BATCH, BATCHES = 256, 50  # rows of a batch, batches of an estimate
HELD_OUT = 0.25  # share of held-out episodes
CLIP = 10.0  # largest absolute value of a standardised input

# Names of fields in JSON that earlier versions wrote: they are still read.
_FORMER = {
    "promised": "predicted",
    "obtained": "achieved",
    "known": "without_label",
    "gain": "label",
    "control": "shuffled_label",
}


@dataclass
class Leakage:
    """Information about an outcome in nats, one number per lane.

    Attributes:
        without_label: I(s, a; outcome).
        label: I(label; outcome | s, a), the leakage.
        shuffled_label: the same estimate for shuffled labels, whose true value is zero.
    """

    without_label: list[float]
    label: list[float]
    shuffled_label: list[float]


@dataclass
class Probe:
    """Results for a run, one number per lane; None where the policy predicts no return, or training has no label.

    Attributes:
        sampled: whether discrete actions were sampled.
        predicted, achieved: mean returns over the episodes.
        outcome: leakage about the next reward and state.
        noise: leakage about the environment's own draw, where the dataset recorded it.
    """

    run: str
    method: str
    dataset: str
    sampled: bool
    predicted: list[float] | None
    achieved: list[float] | None
    outcome: Leakage | None
    noise: Leakage | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Probe:
        """A probe from what `dataclasses.asdict` made of it, with the present or the former names of its fields."""
        fields = {_FORMER.get(name, name): value for name, value in values.items()}
        for name in ("outcome", "noise"):
            if fields[name] is not None:
                fields[name] = Leakage(**{_FORMER.get(key, key): value for key, value in fields[name].items()})
        return cls(**fields)


# ---- label leakage ---------------------------------------------------------------------------------------------


@torch.no_grad()
def labels(agent: Agent, store: OfflineDataset, rows: Tensor) -> Tensor | None:
    """Labels `[lanes, n, width]` that training attaches to the rows `[lanes, n]`; None: the method has none."""
    if agent.window is None:
        batch = store.transitions(rows, agent.batch_fields)
    else:
        batch = store.windows(rows, agent.window, agent.batch_fields)
    return agent.label(agent.prepare(batch))


def reward_and_state(store: OfflineDataset) -> Tensor:
    """`[N, O + 1]`: reward and next state of every row, standardised by the dataset; what is constant is 0."""
    reward = torch.zeros_like(store.rewards) if store.constant_rewards else store.rewards
    return _standardised(torch.cat([reward.unsqueeze(1), store.next_observations], 1))


def _standardised(values: Tensor) -> Tensor:
    """`[N, n]`: columns of mean 0 and standard deviation 1 (float64 sums), so that clipping cuts tails alone."""
    made = torch.empty_like(values)
    for column, target in zip(values.unbind(1), made.unbind(1)):
        centred = column.double() - column.double().mean()
        target.copy_(centred / (centred.square().mean().sqrt() + 1e-6))
    return made


def noise_features(noise: Tensor) -> Tensor:
    """`[N, n]`: the environment's draws; integers one-hot, others standardised."""
    if not noise.is_floating_point():
        return one_hot(noise.long(), int(noise.max()) + 1, torch.float32).flatten(1)
    noise = noise.view(len(noise), -1).float()
    return (noise - noise.mean(0)) / (noise.std(0, correction=0) + 1e-6)


def label_leakage(
    agent: Agent, store: OfflineDataset, outcome: Tensor, updates: int = 1000, hidden: Sequence[int] = (64, 64)
) -> Leakage | None:
    """Leakage of the agent's labels about `outcome` `[N, n]`; None: the method has no labels.

    Args:
        updates: number of updates of the contrastive networks.
        hidden: widths of their hidden layers.

    Raises:
        OffrlError: the dataset has too few episodes to hold some out.
    """
    seeds, device = agent.spec.seeds, store.device
    random = LaneRandom(seeds, device)
    if labels(agent, store, torch.zeros(len(seeds), 1, dtype=torch.int64, device=device)) is None:
        return None
    train, held = _split(store)
    context = _context(store).to(agent.obs_mean)
    outcome = outcome.to(context).clamp(-CLIP, CLIP)
    standardised = _standardised_labels(agent, store, _draw(random, train, 0, 4096))
    width = standardised(_draw(random, train, 0, 1), 0).shape[-1]
    extra = {"without_label": 0, "label": width, "shuffled_label": width}
    nets = [
        PairCritic(seeds, context.shape[1] + more, outcome.shape[1], hidden, 32, name=f"doc/probe/{name}").to(context)
        for name, more in extra.items()
    ]
    optimizer = Adam([p for net in nets for p in net.parameters()], 1e-3, weight_decay=1e-2)

    def losses(rows: Tensor, step: int) -> Tensor:
        """`[3, lanes]`: contrastive losses without label, with label, with shuffled label.

        The networks with a label correct the one without, so that they only have to learn what a label adds.
        """
        label = standardised(rows, step)
        here, there = context[rows], outcome[rows]
        base = nets[0](here, there)
        with_label, with_shuffled = (
            base.detach() + net(torch.cat([here, x], -1), there) for net, x in zip(nets[1:], (label, label.roll(1, 1)))
        )
        return torch.stack([info_nce(base), info_nce(with_label), info_nce(with_shuffled)])

    for step in range(1, updates + 1):
        optimizer.step(losses(_draw(random, train, step, BATCH), step).sum(0))
    with torch.no_grad():
        steps = range(updates + 1, updates + 1 + BATCHES)
        measured = torch.stack([losses(_draw(random, held, step, BATCH), step) for step in steps]).mean(0)
    base, with_label, with_shuffled = measured
    return Leakage((-base).tolist(), (base - with_label).tolist(), (base - with_shuffled).tolist())


def _split(store: OfflineDataset) -> tuple[Tensor, Tensor]:
    """Rows of the episodes to train on, and of the held-out ones."""
    if store.episodes < 4:
        raise OffrlError(f"{store.info.id} has {store.episodes} episodes; a probe needs at least four.")
    order = torch.randperm(store.episodes, generator=torch.Generator().manual_seed(0)).to(store.device)
    held = torch.zeros(store.episodes, dtype=torch.bool, device=store.device)
    held[order[: max(1, int(store.episodes * HELD_OUT))]] = True
    of_row = held[store.episode_of_row]
    return (~of_row).nonzero().squeeze(1), of_row.nonzero().squeeze(1)


def _context(store: OfflineDataset) -> Tensor:
    """`[N, O + A + 1]`: standardised state, action, and timestep as a share of the longest episode."""
    action = one_hot(store.actions, store.action_dim, store.rewards.dtype) if store.info.discrete else store.actions
    time = (store.timesteps / store.steps.max()).to(store.rewards.dtype).unsqueeze(1)
    return torch.cat([_standardised(store.observations).clamp(-CLIP, CLIP), action, time], 1)


def _standardised_labels(agent: Agent, store: OfflineDataset, some: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The function (rows, step) -> labels `[lanes, n, width]`, standardised by those of the rows `some`."""

    def raw(rows: Tensor, step: int) -> Tensor:
        agent.random.step.fill_(step)  # a label may be sampled, such as a latent
        found = labels(agent, store, rows)
        assert found is not None
        return found

    sample = raw(some, 0)
    mean, std = sample.mean(1, keepdim=True), sample.std(1, keepdim=True) + 1e-6
    return lambda rows, step: ((raw(rows, step) - mean) / std).clamp(-CLIP, CLIP)


def _draw(random: LaneRandom, rows: Tensor, step: int, count: int) -> Tensor:
    """`[lanes, count]`: random ones of the given rows, with replacement."""
    return rows[random.integers("probe", len(rows), (count,), torch.tensor(step, device=rows.device))]
