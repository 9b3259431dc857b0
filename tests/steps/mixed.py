"""What the restatements of model-based updates share: batches of real and synthetic rows, and a small ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from conftest import make_toy
from plain import Bounds, boxed, difference, sequential
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from offrl.augment.world_model import EliteDynamics, Ensemble, EnsembleConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import BatchLoader, Uniform
from offrl.utils.random import LaneRandom

BATCH = 32


class Rows(NamedTuple):
    """One lane's batch: raw states, and whether a row is the dataset's."""

    s: Tensor
    a: Tensor
    r: Tensor
    s2: Tensor
    not_done: Tensor
    real: Tensor


def stores(box: Bounds = (-1, 1)) -> tuple[OfflineDataset, OfflineDataset]:
    """A dataset, and another that stands for a model's rollouts."""
    return boxed(make_toy(512, 0.2, torch.float64), box), boxed(make_toy(256, -0.1, torch.float64, seed=3), box)


def mixed_loader(real: OfflineDataset, synthetic: OfflineDataset, share: float = 0.6) -> BatchLoader:
    return BatchLoader([(real, Uniform(real), 1.0), (synthetic, Uniform(synthetic), share)], BATCH)


def mixed_rows(loader: BatchLoader, random: LaneRandom, updates: int) -> Iterator[Rows]:
    """The rows of each update of a run of one lane; `random` is put to the update under way."""
    for t in range(1, updates + 1):
        batch = loader.draw(random, torch.tensor([t]))[0]
        random.step.fill_(t)
        parts = (batch.obs, batch.action, batch.reward, batch.next_obs, batch.mask, batch.index >= 0)
        yield Rows(*(part[0] for part in parts))


def ensemble(store: OfflineDataset, clip: bool = False) -> EliteDynamics:
    """Four members with random weights, three in use; what they predict has scales of its own."""
    model = Ensemble(store.obs_dim, store.action_dim, EnsembleConfig(members=4, elites=3, hidden=(8,), seed=5)).double()
    model.fit_scales(store)
    model.elites.copy_(torch.tensor([3, 0, 2]))
    return EliteDynamics(model.requires_grad_(False), clip)


class PlainActor:
    """A tanh-Gaussian in ordinary layers; the noise is the agent's, by name."""

    def __init__(self, agent: Any, random: LaneRandom, box: Any) -> None:
        self.network, self.random, self.box = sequential(agent.actor.mlp, 0), random, box

    def from_noise(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `[n, A]` in the box, and log-densities in units of half of it."""
        mean, log_sigma = self.network(s).split(2, -1)
        law = TransformedDistribution(Normal(mean, log_sigma.clip(-5, 2).exp()), TanhTransform(cache_size=1))
        inside = law.transforms[0](mean + log_sigma.clip(-5, 2).exp() * noise)
        return self.box.centre + self.box.half * inside, law.log_prob(inside).sum(-1)

    def sample(self, s: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return self.from_noise(s, self.random.normal(name, torch.zeros(1, len(s), 2).double())[0])


def q_of(critics: list[nn.Sequential], s: Tensor, a: Tensor) -> Tensor:
    return torch.stack([critic(torch.cat([s, a], -1)).squeeze(-1) for critic in critics])


def minimise(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step of the optimiser's parameters alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    optimizer.step()


def distance(agent: Any, plain: Any) -> float:
    """Largest difference of any parameter from lane 0 of the agent."""
    largest = [difference(sequential(agent.actor.mlp, 0), plain.actor.network)]
    largest.append((plain.log_alpha - agent.log_alpha[0]).abs().item())
    for network, mines in ((agent.critics, plain.critics), (agent.critics_target, plain.targets)):
        largest += [difference(sequential(network.mlp, 0, i), mine) for i, mine in enumerate(mines)]
    return max(largest)
