"""Memoryless, recurrent, and recurrent with the bisimulation loss, on the hidden grid: scores, loss, and what encodings tell.

    python benchmarks/tables/histories.py [--updates 2000] [--lanes 5] [--agents discrete_cql iql] [--out DIR] [key=value ...]

Each row is one run of all lanes. Scores are 0 for uniform actions and 100 for the best policy of observations. The loss J is
that of the first and of the last logged update, averaged over lanes, in units of squared standardised rewards. "State" is the
share of timesteps of uniform actions whose state (cell and draw) a linear probe reads from the encoding, in brackets from the
observation alone; "within" the share of the encodings' variance within states (offrl/evaluation/linear_probe.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import offrl
from offrl.agents.history import HistoryAgent
from offrl.cli.finetune import value_of
from offrl.envs.hidden_grid import hidden_grid
from offrl.evaluation.linear_probe import probe_states

METHODS: dict[str, dict[str, Any]] = {
    "k = 1": {"history": "window", "history.context": 1},
    "GRU": {"history": "gru"},
    "GRU, loss 0.5": {
        "history": "gru",
        "history.bisimulation": 0.5,
        "history.warmup": 200,
    },
}
COMMON = {"history.length": 16, "history.burn_in": 8, "history.latent": 32, "history.hidden": 64, "history.lr": 1e-3}
COMMON |= {"history.pairs": "same_action", "history.events": 0.25}  # for all: J is then of the same pairs
COMMON |= {
    "batch_size": 16,
    "data.reward_scale": 0.01,
    "agent.hidden": [64, 64],
    "eval.every": 0,
    "eval.final_episodes": 100,
}
AGENTS: dict[str, dict[str, Any]] = {
    "discrete_cql": {"agent.cql_alpha": 0.05, "agent.critic_lr": 1e-3},
    "iql": {
        "agent.expectile": 0.9,
        "agent.beta": 10.0,
        "agent.actor_lr": 1e-3,
        "agent.critic_lr": 1e-3,
        "agent.value_lr": 1e-3,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--lanes", type=int, default=5)
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--datasets", nargs="+", default=["forge/grid/cue-n2000-v0", "forge/grid/place-n2000-v0"])
    parser.add_argument(
        "--probe-episodes", type=int, default=400, help="episodes of uniform actions for the linear probe"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/histories"))
    parser.add_argument("options", nargs="*", metavar="key=value", help="further options of every run")
    arguments = parser.parse_args()
    further = {key: value_of(text) for key, text in (word.split("=", 1) for word in arguments.options)}
    columns = ("dataset", "agent", "method", "score", "J first", "J last", "state", "within")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for dataset in arguments.datasets:
        for agent in arguments.agents:
            for method, settings in METHODS.items():
                options = {
                    **COMMON,
                    **AGENTS[agent],
                    **settings,
                    "updates": arguments.updates,
                    "lanes": arguments.lanes,
                }
                options |= {
                    "log_every": max(1, arguments.updates // 20),
                    "out": str(arguments.out),
                    "progress": False,
                    **further,
                }
                result = offrl.fit(agent=agent, dataset=dataset, **options)
                scores, losses = np.array(result.scores), logged(result.folder, "bisimulation")
                spread = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
                cells = (
                    dataset,
                    agent,
                    method,
                    f"{scores.mean():.1f}{spread}",
                    f"{losses[0]:.3g}",
                    f"{losses[-1]:.3g}",
                    *probed(result.folder, dataset, arguments.probe_episodes),
                )
                print(f"| {' | '.join(cells)} |", flush=True)


def probed(folder: Path, dataset: str, episodes: int) -> tuple[str, str]:
    """The columns `state` and `within`: means over lanes."""
    agent = offrl.load_agent(folder)
    assert isinstance(agent, HistoryAgent)
    variant = dataset.split("/")[-1].split("-")[0]
    found = probe_states(agent, hidden_grid(variant), episodes)
    return f"{np.mean(found.accuracy):.2f} ({found.observation:.2f})", f"{np.mean(found.within):.2f}"


def logged(folder: Path, name: str) -> list[float]:
    """A metric's means over lanes, one for each logged update."""
    by_step: dict[int, list[float]] = {}
    for row in offrl.results.read_metrics([folder]).iter_rows(named=True):
        if row["metric"] == name:
            by_step.setdefault(row["step"], []).append(row["value"])
    return [float(np.mean(by_step[step])) for step in sorted(by_step)]


if __name__ == "__main__":
    main()
