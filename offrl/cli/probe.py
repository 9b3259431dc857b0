"""`offrl probe`: predicted against achieved return, and what a policy's label leaks of the environment's noise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from offrl.datasets import exogenous_noise
from offrl.evaluation.evaluator import Evaluator
from offrl.evaluation.probes import Probe, draws, leak, reward_and_state
from offrl.results.figures import STYLE, looks_of
from offrl.training.run_config import resolve_config
from offrl.training.runs import load_agent, load_data, read_config
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing
from offrl.utils.process import tune_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_parser(subparsers: Any) -> None:
    """Add `offrl probe`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("probe", help="predicted against achieved return, and label leakage")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run")
    parser.add_argument("--episodes", type=int, default=100, help="per lane (default 100; 0: play none)")
    parser.add_argument(
        "--updates", type=int, default=1000, help="of the probing networks (default 1000; 0: no leakage)"
    )
    parser.add_argument("--sampled", action="store_true", help="draw discrete actions instead of taking the likeliest")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="achieved against predicted returns as PNG")
    parser.add_argument("--json", action="store_true", help="print JSON with every lane")
    parser.set_defaults(run=_command)


def probe(
    folder: Path | str, episodes: int = 100, updates: int = 1000, sampled: bool = False, seed: int = 1_000_000
) -> Probe:
    """Probe the policy of a run.

    Args:
        episodes: per lane, from environment seed `seed` on; 0: none are played, and no promise is checked.
        updates: of the networks that look for luck in the labels; 0: they are not trained.
        sampled: draw discrete actions from the policy instead of taking the likeliest.
    """
    tune_process(1)
    agent, job = load_agent(folder), resolve_config(read_config(Path(folder)), trusted=False)
    if sampled:
        if not (agent.spec.discrete and hasattr(agent.cfg, "sample_actions")):
            raise OffrlError(f"{folder}: its policy draws no discrete actions; leave --sampled away.")
        agent.cfg.sample_actions = True
    store = load_data(job.train, agent.spec.device)
    promised = obtained = outcome = noise = None
    if episodes:
        with Evaluator(store.info, agent.spec.lanes) as evaluator:
            played = evaluator.run(agent, episodes, seed)
        obtained = played.returns.mean(1).tolist()
        promised = None if played.promised is None else played.promised.mean(1).tolist()
    if updates:
        outcome = leak(agent, store, reward_and_state(agent, store), updates)
        try:
            recorded = exogenous_noise(store)
        except OffrlError:
            recorded = None
        noise = None if recorded is None else leak(agent, store, draws(recorded), updates)
    method = job.train.label or job.method
    return Probe(str(folder), method, store.info.id, bool(sampled), promised, obtained, outcome, noise)


def show(found: Sequence[Probe]) -> None:
    """Print a table, one line a run."""
    table = Table(title="Means over lanes; leaks in nats, in brackets a dealt label's")
    for heading in ("dataset", "method", "promised", "obtained", "gap", "leak of reward, state", "leak of noise"):
        table.add_column(heading, justify="left" if heading in ("dataset", "method") else "right")
    for one in found:
        table.add_row(*_row(one))
    Console().print(table)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(one: Probe) -> list[str]:
    gap = None
    if one.promised and one.obtained:
        gap = [abs(a - b) for a, b in zip(one.promised, one.obtained)]
    returns = ["-" if x is None else f"{_mean(x):.3f}" for x in (one.promised, one.obtained, gap)]
    leaks = ["-" if x is None else f"{_mean(x.gain):.3f} ({_mean(x.control):.3f})" for x in (one.outcome, one.noise)]
    return [one.dataset, one.method + (" sampled" if one.sampled else ""), *returns, *leaks]


def draw(found: Sequence[Probe]) -> Figure:
    """A panel per dataset: every lane's obtained against its promised return, and the line of kept promises."""
    import matplotlib
    from matplotlib.figure import Figure

    kept = [one for one in found if one.promised and one.obtained]
    if not kept:
        raise OffrlError("none of these runs promises a return; there is nothing to plot.")
    datasets = list(dict.fromkeys(one.dataset for one in kept))
    looks = looks_of(sorted({one.method for one in kept}))
    with matplotlib.rc_context(STYLE):
        wide = max(2.9, 0.09 * max(map(len, datasets)))  # so that titles don't run into each other
        figure = Figure(figsize=(wide * len(datasets), 2.7), layout="constrained")
        for panel, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets):
            here = [one for one in kept if one.dataset == dataset]
            for one in here:
                panel.scatter(one.promised, one.obtained, s=14, color=looks[one.method][0], label=one.method, alpha=0.8)
            ends = [x for one in here for x in (*(one.promised or []), *(one.obtained or []))]
            panel.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", linewidth=0.7, zorder=0)
            panel.set_title(dataset)
            panel.set_xlabel("promised return")
            panel.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("obtained return")
        figure.axes[0].legend(frameon=False)
    return figure


def _command(arguments: argparse.Namespace) -> int:
    if min(arguments.episodes, arguments.updates) < 0:
        raise OffrlError("--episodes and --updates should be at least 0.")
    found = [probe(run, arguments.episodes, arguments.updates, arguments.sampled) for run in arguments.runs]
    if arguments.plot:
        try:
            with replacing(arguments.plot) as path:
                draw(found).savefig(path, format="png", dpi=200, bbox_inches="tight")
        except OSError as error:
            raise OffrlError(f"{arguments.plot} could not be written ({error.strerror or error}).") from error
    if arguments.json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        show(found)
    return 0
