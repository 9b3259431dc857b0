"""What evaluation costs a training: none, in turn, beside it (`eval.asynchronous`), in alternating turns.

    python benchmarks/speed/beside.py                     # TD3+BC on HalfCheetah's sizes, three turns of 2,000 updates
    python benchmarks/speed/beside.py --lanes 5 --updates 1000

CORL's protocol plays 10 episodes every 5,000 updates; here it is one every 500, as many environment steps an update. Rates are
updates per second of wall time behind the first interval, in which processes and environments start; for them the machine has
to be quiet, with two free cores. The CPU time of the training process alone (weights copied, rows written) can also be read on
a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from startup import write_dataset

from offrl.training.compose import compose
from offrl.training.hooks import Hooks
from offrl.training.trainer import train

MODES: dict[str, dict[str, Any]] = {
    "none": {"eval.every": 0, "eval.final_episodes": 0},
    "in turn": {"eval.final_episodes": 0},
    "beside": {"eval.final_episodes": 0, "eval.asynchronous": True},
}


def rate(options: dict[str, Any], every: int) -> tuple[float, float]:
    """Updates per second of wall time and of the training process's CPU time, as many evaluations as intervals."""
    marks: list[tuple[int, float, float]] = []

    def mark(step: int, _: Path) -> None:
        marks.append((step, time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as out:
        values = compose({**options, "out": out, "checkpoint_every": every, "progress": False})
        train(values, Hooks(on_checkpoint=mark))
    (first, *began), (last, *ended) = marks[0], marks[-2]  # the last one is the run's end, an update later
    wall, cpu = ((last - first) / (b - a) for a, b in zip(began, ended))
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", default="td3_bc")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--updates", type=int, default=2000, help="of every turn")
    parser.add_argument("--every", type=int, default=500, help="updates between evaluations of one episode a lane")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    rates: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        os.environ["OFFRL_HOME"] = name
        data = Path(name) / "random.npz"
        write_dataset(data, 100_000)
        shared = {
            "agent": arguments.agent,
            "dataset": str(data),
            "lanes": arguments.lanes,
            "updates": arguments.updates + 1,
        }
        shared |= {"eval.every": arguments.every, "eval.episodes": 1}
        for _ in range(arguments.turns):
            for mode, changes in MODES.items():
                rates[mode].append(rate({**shared, **changes}, arguments.every))
                wall, cpu = rates[mode][-1]
                print(
                    f"{mode:8} {wall:7.1f} updates/s, {cpu:7.1f} per second of the training process's CPU time",
                    flush=True,
                )
    for kind, name in enumerate(("updates a second", "updates per CPU second of the training process")):
        middle = {mode: statistics.median(both[kind] for both in values) for mode, values in rates.items()}
        for mode in ("in turn", "beside"):
            print(f"{mode}: {1 - middle[mode] / middle['none']:.1%} of the {name} are lost (medians)")
    if arguments.out:
        about = {k: v for k, v in vars(arguments).items() if k != "out"}
        about |= {"torch": torch.__version__, "machine": platform.platform(), "cores": len(os.sched_getaffinity(0))}
        arguments.out.write_text(json.dumps({**about, "rates_wall_and_cpu": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
