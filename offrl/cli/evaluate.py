"""`offrl evaluate`: play episodes with the policy of a run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offrl.evaluation.evaluator import Evaluator
from offrl.training.runs import dataset_info, load_agent
from offrl.utils.errors import OffrlError
from offrl.utils.process import tune_process


def add_parser(subparsers: Any) -> None:
    """Add `offrl evaluate`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("evaluate", help="play episodes with a run's policy")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument("--episodes", type=int, default=10, help="per lane (default 10)")
    parser.add_argument("--seed", type=int, default=1_000_000, help="environment seed of the first episode")
    parser.add_argument("--workers", type=int, help="processes that step environments (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON with every episode")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    for name, value, most in (
        ("episodes", arguments.episodes, 10_000_000),
        ("workers", arguments.workers, max(256, 4 * (os.cpu_count() or 1))),
        ("seed", arguments.seed, 2**32 - 1),
    ):
        least = 0 if name == "seed" else 1
        if value is not None and not least <= value <= most:
            raise OffrlError(f"--{name} {value} should be between {least} and {most}.")
    tune_process(1)
    agent, info = load_agent(arguments.run_folder), dataset_info(arguments.run_folder)
    with Evaluator(info, agent.spec.lanes, arguments.workers) as evaluator:
        played = evaluator.run(agent, arguments.episodes, arguments.seed)
    scores = played.returns if played.normalized is None else played.normalized
    if arguments.json:
        print(
            json.dumps(
                {
                    "dataset": info.id,
                    "env_id": info.env_id,
                    "lane_seeds": list(agent.spec.seeds),
                    "episode_seeds": played.seeds,
                    "returns": played.returns.tolist(),
                    "lengths": played.lengths.tolist(),
                    "normalized": None if played.normalized is None else played.normalized.tolist(),
                }
            )
        )
        return 0
    table = Table(title=f"{arguments.run_folder} on {info.env_id}, {arguments.episodes} episodes a lane")
    for heading in (
        "lane seed",
        "score" if played.normalized is not None else "return",
        "std of episodes",
        "return",
        "length",
    ):
        table.add_column(heading, justify="right")
    for lane, seed in enumerate(agent.spec.seeds):
        numbers = (scores[lane].mean(), scores[lane].std(), played.returns[lane].mean(), played.lengths[lane].mean())
        table.add_row(str(seed), *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    return 0
