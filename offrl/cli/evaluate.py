"""`offrl evaluate`: play episodes with the policy of a run, and add them to its rows."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offrl.cli.finetune import value_of
from offrl.training.schema import EvalConfig
from offrl.training.scoring import evaluate, keep
from offrl.utils.errors import OffrlError
from offrl.utils.process import tune_process


def add_parser(subparsers: Any) -> None:
    """Add `offrl evaluate`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("evaluate", help="play episodes with a run's policy")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument("--episodes", type=int, default=10, help="per lane (default 10)")
    parser.add_argument("--seed", type=int, default=1_000_000, help="environment seed of the first episode")
    parser.add_argument("--workers", type=int, help="processes that step environments (default: one per core)")
    parser.add_argument(
        "--env", metavar="ID", help="environment: ID or MODULE:ID (default: the run's or the dataset's)"
    )
    parser.add_argument("--env-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the environment")
    parser.add_argument("--max-episode-steps", type=int, metavar="N", help="time limit of an episode")
    parser.add_argument("--ref-min", type=float, metavar="R", help="return that scores 0")
    parser.add_argument("--ref-max", type=float, metavar="R", help="return that scores 100")
    parser.add_argument("--no-save", action="store_true", help="print only; add no rows to the run")
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
    options = _options(arguments)
    seeds, info, played = evaluate(arguments.run_folder, options)
    kept = "" if arguments.no_save else keep(arguments.run_folder, options, seeds, info, played)
    scores = played.returns if played.normalized is None else played.normalized
    if arguments.json:
        print(
            json.dumps(
                {
                    "dataset": info.id,
                    "env_id": info.env_id,
                    "lane_seeds": seeds,
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
    for lane, seed in enumerate(seeds):
        numbers = (scores[lane].mean(), scores[lane].std(), played.returns[lane].mean(), played.lengths[lane].mean())
        table.add_row(str(seed), *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    if kept:
        print(kept)
    return 0


def _options(arguments: argparse.Namespace) -> EvalConfig:
    if odd := [word for word in arguments.env_kwargs if "=" not in word]:
        raise OffrlError(f"--env-kwargs {odd[0]}: give KEY=VALUE.")
    kwargs = dict(word.split("=", 1) for word in arguments.env_kwargs)
    if (arguments.max_episode_steps or 1) < 1:
        raise OffrlError(f"--max-episode-steps {arguments.max_episode_steps} should be at least 1.")
    return EvalConfig(
        episodes=arguments.episodes,
        seed=arguments.seed,
        workers=arguments.workers,
        env=arguments.env,
        env_kwargs={key: value_of(text) for key, text in kwargs.items()} or None,
        max_episode_steps=arguments.max_episode_steps,
        ref_min=arguments.ref_min,
        ref_max=arguments.ref_max,
    )
