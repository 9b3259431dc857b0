"""`offrl evaluate`: play episodes with the policy of a run, and add them to its rows."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from offrl.agents.base import Agent
from offrl.cli.finetune import value_of
from offrl.data.dataset import DatasetInfo
from offrl.envs import make_env
from offrl.evaluation.recording import check_record, check_video, film, play, record
from offrl.results.writer import plain
from offrl.training.schema import EvalConfig
from offrl.training.scoring import evaluate, keep, policy_of, run_folder
from offrl.utils.errors import OffrlError
from offrl.utils.process import tune_process
from offrl.utils.progress import Bar


def add_parser(subparsers: Any) -> None:
    """Add `offrl evaluate`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("evaluate", help="play episodes with a run's policy")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument("--episodes", type=int, help="per lane (default 10; with a video 3)")
    parser.add_argument(
        "--lane", metavar="N|best", help="play one lane alone: its number, or the best of the run's result"
    )
    parser.add_argument(
        "--video", metavar="FILE", type=Path, help="write the best lane's episodes as FILE.mp4 or FILE.gif"
    )
    parser.add_argument(
        "--record", metavar="DIR", type=Path, help="write the best lane's episodes as a Minari dataset NAME-v0"
    )
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
    if arguments.episodes is None:
        arguments.episodes = 3 if arguments.video else 10
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
    agent, info = policy_of(arguments.run_folder, options, arguments.lane)
    if arguments.video:
        check_video(arguments.video, info)
    if arguments.record:
        check_record(arguments.record)
    seeds, played = list(agent.spec.seeds), evaluate(agent, info, options)
    whole = arguments.lane is None and not arguments.no_save
    kept = keep(arguments.run_folder, options, seeds, info, played) if whole else ""
    scores = played.returns if played.normalized is None else played.normalized
    noted = _keep(arguments, agent, info, np.asarray(scores))
    if arguments.json:
        print(
            json.dumps(
                {
                    "dataset": info.id,
                    "env_id": info.env_id,
                    "lane_seeds": seeds,
                    "episode_seeds": played.seeds,
                    "returns": plain(played.returns.tolist()),
                    "lengths": played.lengths.tolist(),
                    "normalized": None if played.normalized is None else plain(played.normalized.tolist()),
                },
                allow_nan=False,
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
    Console(markup=False).print(table)  # a name may have brackets
    print(*filter(None, [kept, *noted]), sep="\n", end="\n" * bool(kept or noted))
    return 0


def _keep(arguments: argparse.Namespace, agent: Agent, info: DatasetInfo, scores: NDArray[Any]) -> list[str]:
    """Play the best lane's episodes again for the video and the dataset that were asked for; a line on each."""
    if not (arguments.video or arguments.record):
        return []
    one = agent.lane(int(scores.mean(1).argmax()))
    seeds = [arguments.seed + k for k in range(arguments.episodes)]
    with Bar(True, "recording", unit="steps") as bar:
        if arguments.video:
            episodes = film(one, info, seeds, arguments.video, bar.update)
        else:
            with closing(make_env(info)) as env:
                episodes = list(play(one, env, seeds))
    returns = ", ".join(f"{episode.rewards.sum():.1f}" for episode in episodes)
    noted = [f"lane seed {one.spec.seeds[0]}, returns {returns}"]
    if arguments.video:
        noted.append(f"video: {arguments.video}")
    if arguments.record:
        name = run_folder(arguments.run_folder).resolve().name
        record(arguments.record, episodes, info, one, f"{type(one).__name__} of {name}")
        noted.append(
            f"dataset: {arguments.record} ({sum(map(len, episodes)):,} steps; offrl train dataset={arguments.record})"
        )
    return noted


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
