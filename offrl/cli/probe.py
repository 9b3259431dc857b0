"""`offrl probe`: predicted against achieved return, and label leakage."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from offrl.datasets import exogenous_noise
from offrl.evaluation.evaluator import Evaluator
from offrl.evaluation.probes import Probe, label_leakage, noise_features, reward_and_state
from offrl.results import style, tables
from offrl.results.writer import plain
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_data, read_config
from offrl.training.schema import EvalConfig
from offrl.training.scoring import policy_of
from offrl.utils.errors import OffrlError
from offrl.utils.process import tune_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_parser(subparsers: Any) -> None:
    """Add `offrl probe`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("probe", help="predicted against achieved return, and label leakage")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--episodes", type=int, default=100, help="episodes per lane (default 100; 0: none)")
    parser.add_argument(
        "--updates", type=int, default=1000, help="updates of the contrastive networks (default 1000; 0: no leakage)"
    )
    parser.add_argument(
        "--sampled", action="store_true", help="sample discrete actions instead of taking the likeliest"
    )
    parser.add_argument(
        "--env", metavar="ID", help="environment: ID or MODULE:ID (default: the run's or the dataset's)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="achieved against predicted returns as PNG")
    parser.add_argument("--json", action="store_true", help="print JSON with every lane")
    parser.set_defaults(run=_command)


def probe(
    folder: Path | str,
    episodes: int = 100,
    updates: int = 1000,
    sampled: bool = False,
    seed: int = 1_000_000,
    env: str | None = None,
) -> Probe:
    """Probe the policy of a run.

    Args:
        episodes: episodes per lane, from environment seed `seed` on; 0: no returns.
        updates: updates of the contrastive networks; 0: no leakage.
        sampled: whether to sample discrete actions instead of taking the likeliest.
        env: environment of the episodes, as for `offrl evaluate`; a `MODULE:ID` is imported.
    """
    tune_process(1)
    agent, info = policy_of(Path(folder), EvalConfig(env=env))
    job = resolve_config(read_config(Path(folder)), trusted=False)
    if sampled:
        if not (agent.spec.discrete and hasattr(agent.cfg, "sample_actions")):
            raise OffrlError(f"{folder}: its policy does not sample discrete actions; leave --sampled out.")
        agent.cfg.sample_actions = True
    if updates and job.train.data.tasks:
        raise OffrlError(
            f"{folder}: its lanes have rewards of their own (data.tasks), for which leakage can't be measured; give "
            "--updates 0, or probe a run of one task (data.task)."
        )
    store = load_data(job.train, agent.spec.device, Path(folder))
    predicted = achieved = outcome = noise = None
    if episodes:
        with Evaluator(info, agent.spec.lanes) as evaluator:
            played = evaluator.run(agent, episodes, seed)
        achieved = played.returns.mean(1).tolist()
        predicted = None if played.predicted is None else played.predicted.mean(1).tolist()
    if updates:
        outcome = label_leakage(agent, store, reward_and_state(store), updates)
        with contextlib.suppress(OffrlError):  # most datasets record no noise
            noise = label_leakage(agent, store, noise_features(exogenous_noise(store)), updates)
    method = job.train.label or job.method
    return Probe(str(folder), method, store.info.id, bool(sampled), predicted, achieved, outcome, noise)


def show(found: Sequence[Probe]) -> None:
    """Print a table, one line per run."""
    columns = ["dataset", "method", "predicted", "achieved", "gap", "leakage: reward, state", "leakage: noise"]
    title = "Returns, and leakage in nats (in brackets that of shuffled labels); means over lanes"
    Console(soft_wrap=True).print(tables.layout(tables.Table(title, columns, [_row(one) for one in found])))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pairs(one: Probe) -> list[tuple[float, float]]:
    """Predicted and achieved return of each lane."""
    return list(zip(one.predicted or [], one.achieved or []))


def _row(one: Probe) -> list[str]:
    gap = [abs(a - b) for a, b in _pairs(one)] or None
    returns = ["–" if x is None else f"{_mean(x):.3f}" for x in (one.predicted, one.achieved, gap)]
    leakage = [
        "–" if x is None else f"{_mean(x.label):.3f} ({_mean(x.shuffled_label):.3f})" for x in (one.outcome, one.noise)
    ]
    return [one.dataset, one.method + (" sampled" if one.sampled else ""), *returns, *leakage]


def draw(found: Sequence[Probe]) -> Figure:
    """A panel per dataset: achieved against predicted return of every lane, with the line where they are equal."""
    shown = [one for one in found if one.predicted and one.achieved]
    if not shown:
        raise OffrlError("none of these runs predicts a return; there is nothing to plot.")
    datasets = list(dict.fromkeys(one.dataset for one in shown))
    looks = style.looks_of(sorted({one.method for one in shown}))
    width = max(2.9, 0.09 * max(map(len, datasets)))  # wide enough for the titles
    with style.sheet(1, len(datasets), (width * len(datasets), 2.7)) as (figure, panels):
        for panel, dataset in zip(panels[0], datasets):
            here = [one for one in shown if one.dataset == dataset]
            for method in dict.fromkeys(one.method for one in here):  # a method may have several runs
                lanes = [pair for one in here if one.method == method for pair in _pairs(one)]
                panel.scatter(*zip(*lanes), s=14, color=looks[method][0], label=method, alpha=0.8)
            ends = [x for one in here for pair in _pairs(one) for x in pair]
            panel.plot([min(ends), max(ends)], [min(ends), max(ends)], color=style.GREY, linewidth=0.7, zorder=0)
            panel.set(title=dataset, xlabel="predicted return")
            style.tidy(panel)
        panels[0, 0].set_ylabel("achieved return")
        panels[0, 0].legend(frameon=False)
    return figure


def _command(arguments: argparse.Namespace) -> int:
    if min(arguments.episodes, arguments.updates) < 0:
        raise OffrlError("--episodes and --updates should be at least 0.")
    options = (arguments.episodes, arguments.updates, arguments.sampled)
    found = [probe(run, *options, env=arguments.env) for run in arguments.runs]
    if arguments.json:
        print(json.dumps([plain(asdict(one)) for one in found], allow_nan=False))
    else:
        show(found)
    if arguments.plot:
        try:
            style.save(draw(found), arguments.plot)
        except OSError as error:
            raise OffrlError(f"{arguments.plot} could not be written ({error.strerror or error}).") from error
    return 0
