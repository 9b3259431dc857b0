"""`offrl evaluate`: play episodes with the policy of a run."""

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

from offrl.agents.acting import lane_named
from offrl.agents.base import Agent
from offrl.data.dataset import DatasetInfo
from offrl.envs import make_env
from offrl.evaluation.evaluator import Evaluator
from offrl.evaluation.recording import check_record, check_video, film, play, record
from offrl.training.runs import dataset_info, load_agent
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
    agent, info = load_agent(arguments.run_folder), dataset_info(arguments.run_folder)
    if arguments.lane is not None:
        agent = agent.lane(lane_named(agent, arguments.lane))
    if arguments.video:
        check_video(arguments.video, info)
    if arguments.record:
        check_record(arguments.record)
    with Evaluator(info, agent.spec.lanes, arguments.workers) as evaluator:
        played = evaluator.run(agent, arguments.episodes, arguments.seed)
    scores = played.returns if played.normalized is None else played.normalized
    noted = _keep(arguments, agent, info, np.asarray(scores))
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
    print(*noted, sep="\n", end="\n" * bool(noted))
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
        record(arguments.record, episodes, info, one, f"{type(one).__name__} of {arguments.run_folder.name}")
        noted.append(
            f"dataset: {arguments.record} ({sum(map(len, episodes)):,} steps; offrl train dataset={arguments.record})"
        )
    return noted
