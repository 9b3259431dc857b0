"""Fitted Q evaluation (FQE): values of policies, estimated from the dataset alone, all policies at once.

Le, Voloshin and Yue, "Batch Policy Learning under Constraints", ICML 2019; as a criterion to choose among trained policies:
Paine et al., "Hyperparameter Selection for Offline Reinforcement Learning", 2020. Learning rate, discount and target copies are
d3rlpy's defaults.

Each policy is a lane: one batched network evaluates all of them, on the same batches and from the same initial weights, so
that estimates differ by the policies only.

Deviations from d3rlpy: rewards are divided by their standard deviation and estimates multiplied by it (one learning rate then
suits all tasks); a share of the episodes is held out, and the estimates are computed on it; the value of the initial state is
computed at starts of episodes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from offrl.agents.base import Agent
from offrl.data.dataset import OfflineDataset
from offrl.nets import Adam, Critics, make_target

# Memory for the policies' actions at all next states; lanes that need more are evaluated in groups.
_ACTION_BYTES = 1 << 30


@dataclass
class FQEConfig:
    updates: int = 100_000  # gradient steps
    batch_size: int = 256  # rows, the same for all policies
    lr: float = 1e-4  # of Adam
    discount: float = 0.99  # gamma
    target_every: int = 100  # updates between hard copies to the target, of which the first is after update 1
    hidden: tuple[int, ...] = (256, 256)  # widths of the network's hidden layers
    held_out: float = 0.1  # share of held-out episodes, for the estimates; below ten episodes, all are used for both
    seed: int = 0  # seed of the network, the batches and the held-out episodes


@dataclass(frozen=True)
class Estimates:
    """One number per policy, `[lanes]`, in units of the dataset's rewards.

    Attributes:
        value: mean of Q(s_0, pi(s_0)) over the starts of held-out episodes; the larger, the better.
        soft_opc: mean Q(s, a) over held-out transitions of good episodes (the upper fifth by return) minus the mean over all
            (Irpan et al. 2019, for returns instead of successes); the larger, the better.
        td_error: root of the mean squared TD error on held-out transitions; a diagnostic, no criterion.
    """

    value: Tensor
    soft_opc: Tensor
    td_error: Tensor


def fitted_q(
    store: OfflineDataset,
    agents: Sequence[Agent],
    cfg: FQEConfig | None = None,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Estimates:
    """Evaluate the deterministic policies of all agents' lanes on a dataset.

    Args:
        store: the dataset, with the rewards to evaluate.
        agents: agents without memory on the dataset's device; the estimates have their lanes in order.
        track: wrapper of the iteration over updates that shows progress.

    Raises:
        ValueError: the policy of an agent depends on the history, or samples.
        OffrlError: a dataset with a task for each lane, which has no returns.
    """
    cfg = cfg or FQEConfig()
    store.returns  # noqa: B018 - refused now and not after the training
    if any(agent.initial_state(1) is not None for agent in agents):
        raise ValueError("fitted Q evaluation needs policies of the observation alone")
    width = store.action_dim if store.info.discrete is None else store.info.discrete
    at_once = max(1, _ACTION_BYTES // (4 * width * len(store)))
    groups: list[list[Agent]] = [[]]
    for agent in agents:
        if groups[-1] and sum(a.spec.lanes for a in groups[-1]) + agent.spec.lanes > at_once:
            groups.append([])
        groups[-1].append(agent)
    parts = [_fit(store, group, cfg, track) for group in groups]
    return Estimates(*(torch.cat([getattr(p, name) for p in parts]) for name in ("value", "soft_opc", "td_error")))


def _fit(store: OfflineDataset, agents: list[Agent], cfg: FQEConfig, track: Callable[..., Iterable[int]]) -> Estimates:
    generator = torch.Generator().manual_seed(cfg.seed)
    lanes = sum(agent.spec.lanes for agent in agents)
    train, held = _split(store, cfg.held_out, generator)
    mean, std = store.observation_statistics()
    scale = 1.0 if store.constant_rewards else float(store.rewards.std())  # networks see rewards of std 1

    def normalize(obs: Tensor) -> Tensor:
        """`[n, O]` to the networks' `[lanes, n, O]`."""
        return ((obs - mean) / (std + 1e-3)).expand(lanes, *obs.shape)

    actions = _features(store, store.actions)
    next_actions = _act(store, agents, store.next_observations)  # [lanes, N, A]
    rewards, mask = store.rewards / scale, cfg.discount * (1 - store.terminations)
    critic = Critics([cfg.seed] * lanes, store.obs_dim, actions.shape[-1], cfg.hidden, members=1).to(store.device)
    target, optimizer = make_target(critic), Adam(critic.parameters(), cfg.lr).to(store.device)

    def td_error(rows: Tensor) -> Tensor:
        """`[lanes, n]`: Q(s, a) - r - gamma (1 - d) Q'(s', pi(s'))."""
        with torch.no_grad():
            after = target(normalize(store.next_observations[rows]), next_actions[:, rows])[:, 0]
            backup = rewards[rows] + mask[rows] * after
        action = actions[rows].expand(lanes, -1, -1)
        return critic(normalize(store.observations[rows]), action)[:, 0] - backup

    for update in track(range(cfg.updates)):
        rows = train[torch.randint(len(train), (cfg.batch_size,), generator=generator).to(store.device)]
        optimizer.step(td_error(rows).square().mean(-1))
        if update % cfg.target_every == 0:  # as in d3rlpy, whose first copy is that of the first update
            target.load_state_dict(critic.state_dict())

    with torch.no_grad():
        starts = store.initial_observations[held]
        value = critic(normalize(starts), _act(store, agents, starts))[:, 0].mean(-1)
        rows = _rows_of(store, held)
        blocks = rows.split(4096)
        error = torch.cat([td_error(block) for block in blocks], 1).square().mean(-1).sqrt()
        q = torch.cat(
            [critic(normalize(store.observations[b]), actions[b].expand(lanes, -1, -1))[:, 0] for b in blocks], 1
        )
        good = (store.returns >= store.returns[held].quantile(0.8))[store.episode_of_row[rows]]
    return Estimates(value * scale, (q[:, good].mean(-1) - q.mean(-1)) * scale, error * scale)


def _split(store: OfflineDataset, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to train on, and episodes for the estimates."""
    order = torch.randperm(store.episodes, generator=generator).to(store.device)
    if store.episodes < 10 or share <= 0:
        return torch.arange(len(store), device=store.device), order
    count = max(1, round(share * store.episodes))
    return _rows_of(store, order[count:]), order[:count]


def _rows_of(store: OfflineDataset, episodes: Tensor) -> Tensor:
    """`[n]`: the rows of the given episodes, in the dataset's order."""
    wanted = torch.zeros(store.episodes, dtype=torch.bool, device=store.device)
    wanted[episodes] = True
    return wanted[store.episode_of_row].nonzero()[:, 0]


@torch.no_grad()
def _act(store: OfflineDataset, agents: Sequence[Agent], obs: Tensor) -> Tensor:
    """`[lanes, n, A]`: every policy's actions at raw observations `[n, O]`."""
    made = []
    for agent in agents:
        blocks = [agent.select_action(block.expand(agent.spec.lanes, *block.shape)) for block in obs.split(65_536)]
        made.append(_features(store, torch.cat(blocks, 1)))
    return torch.cat(made)


def _features(store: OfflineDataset, actions: Tensor) -> Tensor:
    """Actions as inputs of a network; discrete ones are one-hot."""
    return actions if store.info.discrete is None else one_hot(actions, store.info.discrete).to(store.rewards.dtype)
