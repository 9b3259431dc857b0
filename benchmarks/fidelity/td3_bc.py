"""TD3+BC against the authors' class on the same weights, batches and noise.

    python benchmarks/fidelity/td3_bc.py PATH       # PATH: a checkout of sfujim/TD3_BC

Prints the largest difference of any parameter after 1, 10, 100 and 1000 updates, in float32 and in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offrl.agent import Spec
from offrl.agents.td3_bc import TD3BC
from offrl.data.store import Store
from offrl.engine import Eager
from offrl.random import LaneRandom
from offrl.sampling import Replay, Uniform

OBS, ACTION, BATCH, SEED = 17, 6, 256, 0
LAYERS = ("l1", "l2", "l3", "l4", "l5", "l6")


def authors_module(checkout: Path) -> Any:
    location = importlib.util.spec_from_file_location("td3_bc_authors", checkout / "TD3_BC.py")
    if location is None or location.loader is None or not (checkout / "TD3_BC.py").exists():
        raise SystemExit(f"{checkout}: there is no TD3_BC.py; name a checkout of sfujim/TD3_BC.")
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def random_store(dtype: torch.dtype) -> Store:
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(20_001, OBS, generator=generator, dtype=torch.float64)
    action = torch.rand(20_000, ACTION, generator=generator, dtype=torch.float64) * 2 - 1
    reward = torch.randn(20_000, generator=generator, dtype=torch.float64)
    done = (torch.rand(20_000, generator=generator) < 0.01).double()
    tensors = [t.to(dtype) for t in (obs[:-1], action, reward, obs[1:], done)]
    return Store(*tensors, torch.arange(0, 20_001, 1000))


def pairs(agent: TD3BC, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Each of our parameters beside the authors'."""
    result = []
    for ours, net in ((agent.actor, theirs.actor), (agent.actor_target, theirs.actor_target)):
        for i, layer in enumerate(LAYERS[:3]):
            linear: nn.Linear = getattr(net, layer)
            result += [(ours.mlp.weights[i][0], linear.weight), (ours.mlp.biases[i][0], linear.bias)]
    for ours, net in ((agent.critics, theirs.critic), (agent.critics_target, theirs.critic_target)):
        for i, layer in enumerate(LAYERS):
            linear = getattr(net, layer)
            member, depth = divmod(i, 3)
            result += [
                (ours.mlp.weights[depth][0, member], linear.weight),
                (ours.mlp.biases[depth][0, member], linear.bias),
            ]
    return result


class Fed:
    """What the authors' `train` calls a replay buffer: hands out prepared batches."""

    def __init__(self) -> None:
        self.batch: tuple[Tensor, ...] = ()

    def sample(self, size: int) -> tuple[Tensor, ...]:
        return self.batch


def compare(module: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    module.device = torch.device("cpu")
    store = random_store(dtype)
    spec = Spec(OBS, ACTION, (SEED,), *store.observation_statistics())
    agent = TD3BC(spec).to(dtype)
    theirs = module.TD3_BC(OBS, ACTION, 1.0)
    for mine, other in pairs(agent, theirs):
        other.data.copy_(mine.detach())
    engine = Eager(agent, Replay([(store, Uniform(store), 1.0)], BATCH))
    random, sampler, fed = LaneRandom((SEED,)), Uniform(store), Fed()
    original = torch.randn_like
    done = 0
    for target in (1, 10, 100, 1000):
        for t in range(done + 1, target + 1):
            rows = sampler.draw(random, torch.tensor([t]), BATCH, "sampler/0")[0]
            batch = agent.prepare(store.transitions(rows))[0]
            random.step.fill_(t)
            noise = random.normal("target_action", batch.action.unsqueeze(0))[0]
            fed.batch = (batch.obs, batch.action, batch.next_obs, batch.reward[:, None], batch.mask[:, None])
            torch.randn_like = lambda *_, noise=noise, **__: noise  # the same noise for both
            theirs.train(fed, BATCH)
            torch.randn_like = original
        engine.run(done, target - done)
        done = target
        gap = max((mine - other).abs().max().item() for mine, other in pairs(agent, theirs))
        print(f"{dtype!s:15} after {target:5} updates: largest difference of a parameter {gap:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of sfujim/TD3_BC")
    module = authors_module(parser.parse_args().checkout)
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        compare(module, dtype)


if __name__ == "__main__":
    main()
