"""What the comparisons with authors' code share: random data, equal weights, batches and noise, and the report.

A file beside this one describes a `Comparison` (how to make both sides, which of their parameters correspond, which
noise the authors draw) and hands it to `run`. Nothing of the authors' is copied: their code is imported from the
checkout that the user names.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offrl.agents.base import Agent, Spec
from offrl.data.dataset import OfflineDataset
from offrl.nets import MLP
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Eager
from offrl.utils.random import LaneRandom

OBS, ACTION, BATCH, SEED, ROWS = 17, 6, 256, 0, 20_000
Pair = tuple[Tensor, Tensor]
Draw = tuple[str, int]  # name and width of random numbers


@dataclass
class Comparison:
    """One method beside its authors' class.

    Attributes:
        ours: builds our agent.
        theirs: builds the authors' object from our agent and the data; its `train(buffer, batch_size)` is one update.
        pairs: our parameters beside theirs, by network; see `td3_pairs` and `network_pairs`.
        draws: names and widths of our agent's standard normals in the order in which the authors draw theirs.
        uniforms: the same of our uniform numbers, which the authors draw on [-1, 1].
        synthetic: share of every batch that stands for a model's rollouts; these rows come last.
    order: what their buffer's `sample` returns; rewards and masks come as columns.
    """

    ours: Callable[[Spec, OfflineDataset], Any]
    theirs: Callable[[Any, OfflineDataset], Any]
    pairs: Callable[[Any, Any], dict[str, list[Pair]]]
    draws: Sequence[Draw] = (("target_action", ACTION),)
    uniforms: Sequence[Draw] = ()
    synthetic: float = 0.0
    order: tuple[str, ...] = ("obs", "action", "reward", "next_obs", "mask")


def authors_module(checkout: Path, name: str, repository: str) -> Any:
    """Module `name` of the checkout, imported with the checkout first on the path."""
    file = f"{name.replace('.', '/')}.py"
    if not (checkout / file).exists():
        raise SystemExit(f"{checkout}: there is no {file}; name a checkout of {repository}.")
    sys.path.insert(0, str(checkout))
    return importlib.import_module(name)


def network_pairs(mlp: MLP, linears: Iterable[nn.Linear], member: int | None = None) -> list[Pair]:
    """Weights and biases of a network (or one of an ensemble) beside the authors' layers, as views.

    Units that pad a hidden width of ours (see `MLP`) are left out.
    """
    result: list[Pair] = []
    for weight, bias, linear in zip(mlp.weights, mlp.biases, linears):
        index = (0,) if member is None else (0, member)
        out, into = linear.weight.shape
        result += [(weight[index][:out, :into], linear.weight), (bias[index][:out], linear.bias)]
    return result


def linears(network: nn.Module) -> list[nn.Linear]:
    """The network's layers, in order."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def layers(network: nn.Module, names: str) -> list[nn.Linear]:
    """The authors' layers, named with spaces between."""
    return [getattr(network, name) for name in names.split()]


def td3_pairs(agent: Any, theirs: Any, actor: str, critics: Sequence[str]) -> dict[str, list[Pair]]:
    """Actor, critics and their targets, for authors who keep TD3's names.

    Args:
        actor: names of the authors' layers of the actor.
        critics: the same of each critic.
    """
    result = {}
    for suffix in ("", "_target"):
        mine = getattr(agent, f"actor{suffix}"), getattr(agent, f"critics{suffix}")
        others = getattr(theirs, f"actor{suffix}"), getattr(theirs, f"critic{suffix}")
        result[f"actor{suffix}"] = network_pairs(mine[0].mlp, layers(others[0], actor))
        twins = [network_pairs(mine[1].mlp, layers(others[1], names), i) for i, names in enumerate(critics)]
        result[f"critics{suffix}"] = [pair for twin in twins for pair in twin]
    return result


def flax_layers(name: str, mlp: MLP) -> dict[str, Tensor]:
    """Our parameters of a network, as views under Flax's names and with its kernels' `[in, out]`."""
    result = {}
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
        result |= {f"{name}/Dense_{i}/kernel": weight[0].transpose(-2, -1), f"{name}/Dense_{i}/bias": bias[0]}
    for i, (gain, offset) in enumerate(zip(mlp.gains, mlp.offsets)):
        result |= {f"{name}/LayerNorm_{i}/scale": gain[0], f"{name}/LayerNorm_{i}/bias": offset[0]}
    return result


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = root
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def random_store(dtype: torch.dtype, seed: int = 1) -> OfflineDataset:
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(ROWS + 1, OBS, generator=generator, dtype=torch.float64)
    action = torch.rand(ROWS, ACTION, generator=generator, dtype=torch.float64) * 2 - 1
    reward = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    done = (torch.rand(ROWS, generator=generator) < 0.01).double()
    tensors = [t.to(dtype) for t in (obs[:-1], action, reward, obs[1:], done)]
    offsets = torch.arange(0, ROWS + 1, 1000)
    # A tail behind every episode, so that each row has a next action.
    tails = {"tail_actions": action[offsets[:-1]].to(dtype), "has_tail": torch.ones(len(offsets) - 1, dtype=torch.bool)}
    return OfflineDataset(*tensors, offsets, **tails)


class Fed:
    """What the authors' `train` calls a replay buffer: hands out prepared batches."""

    def __init__(self) -> None:
        self.batch: tuple[Tensor, ...] = ()

    def sample(self, size: int) -> tuple[Tensor, ...]:
        return self.batch


@dataclass
class Trains:
    """An object of CORL's as `compare` wants it.

    Attributes:
        trainer: its method `name` takes a list (s, a, r, s', d).
    """

    trainer: Any
    name: str = "train"

    def train(self, buffer: Fed, size: int) -> None:
        *rest, mask = buffer.sample(size)
        getattr(self.trainer, self.name)([*rest, 1 - mask])


@contextlib.contextmanager
def dictated_noise(normals: Iterable[Tensor], uniforms: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `torch.randn_like` and samples of `torch.distributions.Normal` are these normals, one tensor a call.

    What `Tensor.uniform_` fills in are the uniforms.
    """
    waiting, filling, normal = iter(normals), iter(uniforms), torch.distributions.normal
    originals = torch.randn_like, normal._standard_normal, Tensor.uniform_
    torch.randn_like = lambda like, **_: next(waiting).reshape(like.shape)  # type: ignore[assignment]
    normal._standard_normal = lambda shape, **_: next(waiting).reshape(shape)  # type: ignore[assignment]
    Tensor.uniform_ = lambda x, *_, **__: x.copy_(next(filling).reshape(x.shape))  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.randn_like, normal._standard_normal, Tensor.uniform_ = originals  # type: ignore[method-assign,assignment]


def compare(comparison: Comparison, dtype: torch.dtype, marks: Sequence[int]) -> None:
    """Print the largest difference of a parameter, by network, after each number of updates in `marks`."""
    torch.set_default_dtype(dtype)
    store = random_store(dtype)
    agent = comparison.ours(Spec(OBS, ACTION, (SEED,), *store.observation_statistics()), store).to(dtype)
    theirs = comparison.theirs(agent, store)
    pairs = comparison.pairs(agent, theirs)
    start_alike(agent, pairs)
    sources = [(store, Uniform(store), 1.0)]
    if comparison.synthetic:
        other = random_store(dtype, seed=2)
        sources.append((other, Uniform(other), comparison.synthetic))
    loader = BatchLoader(sources, BATCH, fields=agent.batch_fields)
    engine, random, fed, done = Eager(agent, loader), LaneRandom((SEED,)), Fed(), 0
    for mark in marks:
        for t in range(done + 1, mark + 1):
            batch = agent.prepare(loader.draw(random, torch.tensor([t])))[0][0]
            random.step.fill_(t)
            fed.batch = tuple(getattr(batch, name).reshape(BATCH, -1) for name in comparison.order)
            noise = (random.normal(name, torch.empty(1, BATCH, width)) for name, width in comparison.draws)
            chance = (random.uniform(name, (BATCH, width)).to(dtype) * 2 - 1 for name, width in comparison.uniforms)
            with dictated_noise(noise, chance):
                theirs.train(fed, BATCH)
        engine.run(done, mark - done)
        done = mark
        gaps = {name: max((a - b).abs().max().item() for a, b in rows) for name, rows in pairs.items()}
        worst = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
        print(f"{dtype!s:13} {mark:5} updates: largest difference {max(gaps.values()):.2e} ({worst})", flush=True)


def start_alike(agent: Agent, pairs: dict[str, list[Pair]]) -> None:
    """Give the authors' networks our initial weights."""
    before = copy.deepcopy(agent.state_dict())
    with torch.no_grad():
        for mine, other in (pair for rows in pairs.values() for pair in rows):
            other.copy_(mine)
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())


def run(description: str, repository: str, comparison: Callable[[Path], Comparison]) -> None:
    """The command line that all comparisons have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"checkout of {repository}")
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--updates", default="1,10,100,1000", help="after which to compare, ascending")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = comparison(arguments.checkout)
    for name in arguments.dtypes.split(","):
        compare(chosen, getattr(torch, name), [int(n) for n in arguments.updates.split(",")])
