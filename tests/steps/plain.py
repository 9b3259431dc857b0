"""What restatements of authors' updates share: one seed's networks as ordinary layers, and one seed's batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from offrl.agents.base import Spec
from offrl.data.dataset import Bound, DatasetInfo, OfflineDataset
from offrl.sampling import Uniform
from offrl.utils.random import LaneRandom

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
LENGTHS = (7, 1, 3, 11)
Bounds = tuple[Bound, Bound]
# A box that is not [-1, 1], one whose middle is not 0, one whose dimensions differ: an update that forgets half its width
# or its middle, or takes one dimension's for another's, is off.
BOXES: list[Bounds] = [(-2.0, 2.0), (-0.5, 2.0), ((0.0, -0.78), (5.0, 0.78))]


def make_store(discrete: int | None = None, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> OfflineDataset:
    """Episodes of random numbers: the first and every third after it end, of the others the last step is a tail."""
    generator = torch.Generator().manual_seed(seed)
    rows, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    obs, nxt = (torch.randn(rows, 3, generator=generator).double() for _ in range(2))
    action = torch.rand(rows, 2, generator=generator).double() * 2 - 1
    if discrete:
        action = torch.randint(discrete, (rows,), generator=generator)
    reward = torch.randn(rows, generator=generator).double()
    has_tail = torch.arange(len(lengths)) % 3 > 0
    termination = torch.zeros(rows)
    termination[offsets[1:][~has_tail] - 1] = 1
    tails = torch.randn(len(lengths), generator=generator).double() * has_tail
    info = DatasetInfo(discrete=discrete)
    return OfflineDataset(obs, action, reward, nxt, termination, offsets, info, tail_rewards=tails, has_tail=has_tail)


def to_go(store: OfflineDataset, row: int) -> Tensor:
    """Sum of the rewards from a row to its episode's end, a tail's reward included."""
    episode = int(store.episode_of_row[row])
    return store.rewards[row : store.offsets[episode + 1]].sum() + store.tail_rewards[episode]


def boxed(store: OfflineDataset, box: Bounds) -> OfflineDataset:
    """The same with actions stretched from [-1, 1] to another box."""
    low, high = (torch.tensor(bound, dtype=store.actions.dtype) for bound in box)
    half, centre = (high - low) / 2, (high + low) / 2
    tensors = store.tensors()
    tensors |= {name: tensors[name] * half + centre for name in ("actions", "tail_actions")}
    return OfflineDataset(**tensors, info=store.info).with_info(action_low=box[0], action_high=box[1])


def spec_of(store: OfflineDataset, seeds: tuple[int, ...] = (0,)) -> Spec:
    """What an agent for a dataset of continuous actions is built from."""
    sizes, box = (store.obs_dim, store.action_dim), (store.info.action_low, store.info.action_high)
    return Spec(*sizes, seeds, *store.observation_statistics(), *box)


class Box:
    """What restatements compute with an agent's box of actions."""

    def __init__(self, spec: Spec) -> None:
        self.low, self.high = (torch.tensor(b, dtype=torch.float64) for b in (spec.action_low, spec.action_high))
        self.half, self.centre = (self.high - self.low) / 2, (self.high + self.low) / 2

    def squash(self, x: Tensor) -> Tensor:
        """tanh, stretched to the box."""
        return self.centre + self.half * torch.tanh(x)

    def clip(self, action: Tensor) -> Tensor:
        return torch.clip(action, self.low, self.high)


def sequential(mlp: nn.Module, lane: int, member: int | None = None) -> nn.Sequential:
    """One lane (and member) of a lane-batched MLP as ordinary layers."""
    layers: list[nn.Module] = []
    for w, b in zip(mlp.weights, mlp.biases):
        weight, bias = (w[lane], b[lane]) if member is None else (w[lane, member], b[lane, member])
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def difference(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))


def drawn(store: OfflineDataset, random: LaneRandom, updates: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """Number of each update of a run of one lane, and the dataset's rows that it learns from.

    `random`, a lane's numbers, is put to the update under way.
    """
    sampler = Uniform(store)
    for t in range(1, updates + 1):
        rows = sampler.draw(random, torch.tensor([t]), size, "sampler/0")[0, 0]
        random.step.fill_(t)
        yield t, rows


def batches(store: OfflineDataset, random: LaneRandom, updates: int, size: int) -> Iterator[tuple[int, Rows]]:
    """The same with (s, a, r, s', 1 - d) of these rows; states are standardised."""
    mean, std = store.observations.mean(0), store.observations.std(0, correction=0)
    for t, rows in drawn(store, random, updates, size):
        s, s2 = ((x[rows] - mean) / (std + 1e-3) for x in (store.observations, store.next_observations))
        yield t, (s, store.actions[rows], store.rewards[rows], s2, 1 - store.terminations[rows])


class SmoothMLP(nn.Module):
    """One lane (and member) of an MLP with tanh-GELU, or Mish, and layer normalisation after it, from its definition."""

    def __init__(self, mlp: nn.Module, lane: int = 0, member: int | None = None) -> None:
        super().__init__()
        at = (lane,) if member is None else (lane, member)
        for name in ("weights", "biases", "gains", "offsets"):
            parameters = [nn.Parameter(p[at].detach().clone()) for p in getattr(mlp, name)]
            setattr(self, name, nn.ParameterList(parameters))
        self.activation = mlp.activation

    def forward(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = x @ weight.T + bias
            if i == len(self.weights) - 1:
                return x
            if self.activation == "gelu":
                x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
            else:
                x = x * torch.tanh(torch.log1p(torch.exp(x)))
            if len(self.gains):
                mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
                x = (x - mean) / torch.sqrt(variance + 1e-6) * self.gains[i] + self.offsets[i]
        raise AssertionError("an MLP has a last layer")


def pool(q: Tensor, how: str, pessimism: float) -> Tensor:
    """`[members, batch]` to `[batch]`."""
    if how == "lcb":
        mean = q.sum(0) / len(q)
        return mean - pessimism * ((q - mean) ** 2).mean(0).sqrt()
    return q.min(0).values if how == "min" else q.mean(0)
