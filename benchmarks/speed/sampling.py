"""What samplers cost: updates per second of weighted against uniform training, and microseconds to draw a batch.

    python benchmarks/speed/sampling.py                       # TD3+BC, 2 million transitions, on this machine
    python benchmarks/speed/sampling.py --rows 1000000 --lanes 5
    python benchmarks/speed/sampling.py --device cuda --engine cudagraph

All samplers live in one process and take turns in short bursts, in an order that is shuffled every round; a ratio compares
neighbours in time. So a machine that is shared, warms up or throttles does so for all. "expected" is the ratio that follows
from the cost of drawing alone, which is less noisy. Rows are random with HalfCheetah's sizes, in trajectories of 1 to 1000
steps whose returns have a long upper tail.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.agents.base import Spec
from offrl.agents.td3_bc import TD3BC, TD3BCConfig
from offrl.data.dataset import OfflineDataset
from offrl.sampling import (
    AdvantageWeighted,
    AdvantageWeightedConfig,
    BatchLoader,
    ReturnWeighted,
    RowWeighted,
    Sampler,
    TopPercent,
    Uniform,
)
from offrl.training.engine import make_engine
from offrl.utils.process import tune_process
from offrl.utils.random import LaneRandom

OBS, ACTION = 17, 6


def make_store(rows: int) -> OfflineDataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1001, rows // 250)
    lengths = lengths[lengths.cumsum() <= rows]
    offsets = torch.tensor(np.unique([0, *lengths.cumsum(), rows]))
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(rows, OBS, generator=generator)
    action = torch.rand(rows, ACTION, generator=generator) * 2 - 1
    quality = torch.tensor(rng.exponential(size=len(offsets) - 1), dtype=torch.float32)
    reward = torch.repeat_interleave(quality, offsets.diff())
    return OfflineDataset(obs, action, reward, obs.roll(-1, 0), torch.zeros(rows), offsets)


def make_samplers(store: OfflineDataset, lanes: int) -> dict[str, Sampler]:
    """Each kind of draw: none, one table for all lanes, a table for each lane, and a weight for each transition."""
    per_row = torch.rand(lanes, len(store), generator=torch.Generator().manual_seed(1)).to(store.device)
    temperatures: Any = [0.1 + 0.1 * lane for lane in range(lanes)]
    return {
        "uniform": Uniform(store),
        "uniform again": Uniform(store),  # what two runs of the same differ by: the noise of this measurement
        "return_weighted": ReturnWeighted(store),
        "advantage_weighted": AdvantageWeighted(store),
        "advantage_weighted, per lane": AdvantageWeighted(store, AdvantageWeightedConfig(temperature=temperatures)),
        "top_percent": TopPercent(store),
        "per transition (DW)": RowWeighted(per_row),
    }


def trainer(store: OfflineDataset, sampler: Sampler, arguments: argparse.Namespace) -> Callable[[int], None]:
    """`burst(n)` makes n updates of TD3+BC as `offrl train` does."""
    seeds = tuple(range(arguments.lanes))
    spec = Spec(OBS, ACTION, seeds, *store.observation_statistics(), device=arguments.device)
    agent = TD3BC(spec, TD3BCConfig(hidden=(arguments.hidden, arguments.hidden)))
    engine = make_engine(arguments.engine, agent, BatchLoader([(store, sampler, 1.0)], arguments.batch))
    step = 0

    def burst(updates: int) -> None:
        nonlocal step
        engine.run(step, updates)
        step += updates
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    return burst


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def drawing(samplers: dict[str, Sampler], arguments: argparse.Namespace) -> dict[str, float]:
    """Microseconds per batch of one lane, drawn 64 updates at once as the eager engine does; best of the rounds."""
    draws = LaneRandom(tuple(range(arguments.lanes)), arguments.device)
    steps = torch.arange(1, 65, device=arguments.device)

    def work(sampler: Sampler) -> None:
        sampler.draw(draws, steps, arguments.batch)
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    best = dict.fromkeys(samplers, float("inf"))
    for _ in range(20):
        for name, sampler in samplers.items():
            best[name] = min(best[name], timed(lambda chosen=sampler: work(chosen)))
    return {name: seconds * 1e6 / len(steps) / arguments.lanes for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--updates", type=int, default=16, help="of each sampler in each round")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    tune_process(arguments.threads)
    store = make_store(arguments.rows).to(arguments.device)
    samplers = make_samplers(store, arguments.lanes)
    cost = drawing(samplers, arguments)
    bursts = {name: trainer(store, sampler, arguments) for name, sampler in samplers.items()}
    for burst in bursts.values():
        burst(arguments.updates)
        burst(arguments.updates)
    seconds: dict[str, list[float]] = {name: [] for name in bursts}
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for name in order.sample(list(bursts), len(bursts)):
            seconds[name].append(timed(lambda name=name: bursts[name](arguments.updates)))
    print(
        f"{platform.machine()}, torch {torch.__version__}, {arguments.device}, {arguments.lanes} lanes, {arguments.rows:,} rows"
    )
    print(f"\n{'sampler':30} {'us/batch':>9} {'updates/s':>10} {'/ uniform':>10} {'95 % interval':>16} {'expected':>9}")
    rows = []
    for name, times in seconds.items():
        ratios = [u / t for u, t in zip(seconds["uniform"], times)]
        middle, (low, high) = statistics.median(ratios), interval(ratios)
        rate = arguments.updates / statistics.median(times)
        expected = 1 / (1 + (cost[name] - cost["uniform"]) * arguments.lanes * rate / 1e6)
        print(
            f"{name:30} {cost[name]:9.1f} {rate:10.1f} {middle:10.3f} {f'{low:.3f} - {high:.3f}':>16} {expected:9.3f}"
        )
        rows.append(
            {
                "sampler": name,
                "us_per_batch": cost[name],
                "updates_per_second": rate,
                "ratio": middle,
                "interval": [low, high],
            }
        )
    if arguments.out:
        metadata = {k: v for k, v in vars(arguments).items() if k != "out"}
        arguments.out.write_text(
            json.dumps({**metadata, "machine": platform.platform(), "torch": torch.__version__, "rows": rows}, indent=1)
            + "\n"
        )


def interval(ratios: list[float]) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    chosen = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(chosen, 1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
