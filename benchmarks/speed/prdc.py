"""What PRDC costs beside TD3+BC over a real run, and beside the authors' code in the same states of training.

    python benchmarks/speed/prdc.py                          # a forge dataset, 1,000,000 transitions, alpha 2.5 and 40
    python benchmarks/speed/prdc.py --official PATH          # PATH: a checkout of LAMDA-RL/PRDC
    python benchmarks/speed/prdc.py --updates 5000 --size 200000

PRDC trains from random weights; after every burst TD3+BC trains for a while in the same process, so that both see the same
machine, and the ratio of a burst compares neighbours in time. Where the policy has strayed far from the data a query costs
more than where it stays close, hence a real run and not one state of it. At some numbers of updates the authors' object
gets our networks and trains for a few seconds on the same data.
"""

from __future__ import annotations

import offrl  # noqa: F401 - before torch: it sets how long OpenMP's idle threads spin

# isort: split
import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.agents.base import Agent, Spec
from offrl.agents.prdc import PRDC, PRDCConfig
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.data.dataset import OfflineDataset
from offrl.datasets import load
from offrl.forge import registry as forge
from offrl.nets.neighbors import Neighbors
from offrl.sampling import BatchLoader, Uniform
from offrl.training.engine import Engine, make_engine
from offrl.utils.process import tune_process

BATCH = 256


def engine_of(agent: Agent, store: OfflineDataset) -> Engine:
    return make_engine("auto", agent, BatchLoader([(store, Uniform(store), 1.0)], BATCH))


def timed(engine: Engine, step: int, updates: int, device: str) -> tuple[float, dict[str, Any]]:
    """Seconds of these updates, and the last metrics."""
    began = time.perf_counter()
    metrics = engine.run(step, updates)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, metrics


class Official:
    """The authors' class over the same data, with our networks put in."""

    def __init__(self, checkout: Path, store: OfflineDataset, agent: PRDC, alpha: float) -> None:
        sys.path.insert(0, str(checkout))
        self.states = agent.normalize(store.observations)
        self.next_states = agent.normalize(store.next_observations)
        self.store, self.agent, self.rng = store, agent, np.random.default_rng(0)
        pairs = np.hstack([2.0 * self.states.numpy(), store.actions.numpy()])
        began = time.perf_counter()
        module = importlib.import_module("prdc")
        self.theirs = module.PRDC(pairs, store.obs_dim, store.action_dim, 1.0, "cpu", alpha=alpha, beta=2.0)
        self.build_seconds = time.perf_counter() - began

    def sample(self, size: int) -> tuple[torch.Tensor, ...]:
        rows = torch.from_numpy(self.rng.integers(0, len(self.store), size=size))
        reward, done = self.store.rewards[rows], self.store.terminations[rows]
        return self.states[rows], self.store.actions[rows], reward[:, None], self.next_states[rows], 1 - done[:, None]

    @torch.no_grad()
    def rate(self, seconds: float) -> float:
        """Updates per second from where our agent stands."""
        for suffix in ("", "_target"):
            actor, critic = getattr(self.theirs, f"actor{suffix}"), getattr(self.theirs, f"critic{suffix}")
            mine, twins = getattr(self.agent, f"actor{suffix}").mlp, getattr(self.agent, f"critics{suffix}").mlp
            for i in range(3):
                getattr(actor, f"l{i + 1}").weight.copy_(mine.weights[i][0])
                getattr(actor, f"l{i + 1}").bias.copy_(mine.biases[i][0])
                for member in range(2):
                    layer = getattr(critic, f"l{3 * member + i + 1}")
                    layer.weight.copy_(twins.weights[i][0, member])
                    layer.bias.copy_(twins.biases[i][0, member])
        done, began = 0, time.perf_counter()
        while done < 2 or time.perf_counter() - began < seconds:
            with torch.enable_grad():
                self.theirs.train(self, BATCH)
                self.theirs.train(self, BATCH)
            done += 2
        return done / (time.perf_counter() - began)


def run(store: OfflineDataset, alpha: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One real run of PRDC with TD3+BC, and at marks the authors' code, beside it."""
    mean, std = store.observation_statistics()
    spec = Spec(store.obs_dim, store.action_dim, (0,), mean, std, device=arguments.device)
    prdc, td3_bc = PRDC(spec, PRDCConfig(alpha=alpha)), TD3BC(spec, TD3BCConfig(alpha=alpha))
    prdc.setup(store)
    official = Official(arguments.official, store, prdc, alpha) if arguments.official else None
    ours, theirs = engine_of(prdc, store), engine_of(td3_bc, store)
    burst, beside = 500, 100
    timed(theirs, 0, beside, arguments.device)
    bursts, marks = [], []
    for step in range(0, arguments.updates, burst):
        if official and step in arguments.marks:
            marks.append({"step": step, "official_rate": official.rate(arguments.seconds)})
        seconds, metrics = timed(ours, step, burst, arguments.device)
        other, _ = timed(theirs, step, beside, arguments.device)
        row = {"step": step, "prdc": burst / seconds, "td3_bc": beside / other}
        row |= {name: float(metrics[name][0]) for name in ("other_row", "list_hit_rate", "bc_loss", "pair_distance")}
        bursts.append(row)
        if marks and marks[-1]["step"] == step:
            marks[-1] |= {"prdc_rate": row["prdc"]}
        if step % 5000 == 0:
            print(json.dumps(row), flush=True)
    return {
        "alpha": alpha,
        "bursts": bursts,
        "prdc_seconds": sum(burst / row["prdc"] for row in bursts),
        "td3_bc_seconds": sum(burst / row["td3_bc"] for row in bursts),
        "median_ratio": statistics.median(row["td3_bc"] / row["prdc"] for row in bursts),
        "official": marks,
        "official_build_seconds": official.build_seconds if official else None,
    }


def index_facts(store: OfflineDataset) -> dict[str, float]:
    """Seconds to build the index anew, and its memory against the dataset's."""
    mean, std = store.observation_statistics()
    states = (store.observations - mean) / (std + 1e-3)
    tiny = Neighbors(states[:5000], store.actions[:5000], keep=False)  # compiles the kernels where they aren't yet
    tiny.query(torch.arange(10).unsqueeze(0), store.actions[:10].unsqueeze(0), 2.0)
    began = time.perf_counter()
    index = Neighbors(states, store.actions, keep=False)
    seconds = time.perf_counter() - began
    return {"build_seconds": seconds, "memory_ratio": index.backend.nbytes / store.nbytes if index.backend else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="checkout of LAMDA-RL/PRDC")
    parser.add_argument("--dataset", default="forge/halfcheetah/medium-replay-v0")
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--alphas", default="2.5,40")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--marks", default="0,500,5000,20000,49500", help="updates at which the authors' code runs too")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the authors' code at each of them")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--skip-build", action="store_true", help="don't time the building of the index")
    arguments = parser.parse_args()
    arguments.marks = [int(mark) for mark in arguments.marks.split(",") if mark]
    tune_process(arguments.threads)
    store = load(forge.ensure(arguments.dataset, size=arguments.size, seed=0), device=arguments.device)
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    metadata: dict[str, Any] = {"dataset": arguments.dataset, "transitions": len(store), "threads": arguments.threads}
    metadata["index"] = index_facts(store) if arguments.device == "cpu" and not arguments.skip_build else {}
    print(f"{len(store):,} transitions; index: {metadata['index']}")
    metadata["runs"] = [run(store, float(alpha), arguments) for alpha in arguments.alphas.split(",")]
    for result in metadata["runs"]:
        ratio = result["prdc_seconds"] / result["td3_bc_seconds"]
        print(
            f"\nalpha {result['alpha']}: {arguments.updates} updates of PRDC {result['prdc_seconds']:.0f} s,", end=" "
        )
        print(
            f"of TD3+BC {result['td3_bc_seconds']:.0f} s: {ratio:.2f} x (median burst {result['median_ratio']:.2f} x)"
        )
        for mark in result["official"]:
            gain = mark["prdc_rate"] / mark["official_rate"]
            print(
                f"  at {mark['step']:6}: ours {mark['prdc_rate']:.1f}/s, authors' {mark['official_rate']:.2f}/s: {gain:.1f} x"
            )
    if arguments.out:
        metadata |= {"torch": torch.__version__, "machine": platform.platform()}
        arguments.out.write_text(json.dumps(metadata, indent=1) + "\n")


if __name__ == "__main__":
    main()
