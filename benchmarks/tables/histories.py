"""Memoryless, recurrent, and recurrent with the bisimulation loss, where observations hide the state: scores, loss, encodings.

    python benchmarks/tables/histories.py                                     # claim I of docs/claims.md, the hidden grid
    python benchmarks/tables/histories.py --agents iql --datasets forge/hopper/medium-replay-v1        # velocities masked
    python benchmarks/tables/histories.py [key=value ...] [--updates N] [--lanes 5] [--out DIR]

Each row is one run of all lanes; a command that was stopped goes on. On the grid scores are 0 for uniform actions and 100 for
the best policy of observations. The loss J is that of the first and of the last logged update, averaged over lanes, in units of
squared standardised rewards. "State" is the share of timesteps of uniform actions whose state (cell and draw) a linear probe
reads from the encoding, in brackets from the observation alone; "within" the share of the encodings' variance within states
(offrl/evaluation/linear_probe.py). The numbers of each lane go to DIR/histories_AGENT_DATASET.json, with the lengths of the
gradients of the critics' losses and of J by a batch's encodings, averaged over the logged updates.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import offrl
from offrl.agents.history import HistoryAgent
from offrl.cli.finetune import value_of
from offrl.envs.hidden_grid import hidden_grid
from offrl.evaluation.linear_probe import probe_states

sys.path.append(str(Path(__file__).parent))
from collect import write_json

METHODS: dict[str, dict[str, Any]] = {
    "k = 1": {"history": "window", "history.context": 1},
    "GRU": {"history": "gru"},
    "GRU, loss 0.5": {"history": "gru", "history.bisimulation": 0.5, "history.warmup": 200},
    "GRU, loss 0.001": {"history": "gru", "history.bisimulation": 0.001, "history.warmup": 200},
}
OF_THE_GRID = ("GRU, loss 0.001",)  # a weight at which the loss's gradient is as long as that of the critics there
GRID: dict[str, Any] = {
    "history.length": 16,
    "history.burn_in": 8,
    "history.latent": 32,
    "history.hidden": 64,
    "history.lr": 1e-3,
    "history.pairs": "same_action",
    "history.events": 0.25,  # for all: J is then of the same pairs
    "batch_size": 16,
    "data.reward_scale": 0.01,
    "agent.hidden": [64, 64],
    "eval.final_episodes": 100,
}
ON_GRID: dict[str, dict[str, Any]] = {
    "discrete_cql": {"agent.cql_alpha": 0.05, "agent.critic_lr": 1e-3},
    "iql": {
        "agent.expectile": 0.9,
        "agent.beta": 10.0,
        "agent.actor_lr": 1e-3,
        "agent.critic_lr": 1e-3,
        "agent.value_lr": 1e-3,
    },
}
# A robot without its velocities: the agents' own settings and the papers' networks, 32 windows of 8 timesteps to learn from.
MASKED: dict[str, Any] = {
    "data.mask": "velocity",
    "data.size": 200_000,
    "batch_size": 32,
    "eval.final_episodes": 100,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--lanes", type=int, default=5)
    parser.add_argument(
        "--agents", nargs="+", default=list(ON_GRID), help="discrete_cql (on the grid), cql (not there), iql"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="(default: those of the claim)")
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
            for method in arguments.methods or planned(dataset):
                options = {
                    **options_of(agent, dataset, method, arguments.updates),
                    "lanes": arguments.lanes,
                    "out": str(arguments.out),
                    **further,
                }
                result = offrl.fit(agent=agent, dataset=dataset, **options)
                if result.status == "interrupted":
                    raise SystemExit(f"stopped at update {result.step}; the same command goes on.")
                cell = measured(result, dataset, arguments.probe_episodes)
                keep(arguments.out / f"histories_{agent}_{dataset.replace('/', '_')}.json", method, cell)
                print(f"| {dataset} | {agent} | {method} | {' | '.join(text_of(cell))} |", flush=True)


def planned(dataset: str) -> list[str]:
    """The claim's methods on a dataset."""
    return [method for method in METHODS if method not in OF_THE_GRID or dataset.startswith("forge/grid/")]


def options_of(agent: str, dataset: str, method: str, updates: int) -> dict[str, Any]:
    """Options of one run, without its lanes and its folder."""
    grid = dataset.startswith("forge/grid/")
    if grid and agent not in ON_GRID:
        raise SystemExit(f"--agents {agent}: there are no settings for the grid; choose of {', '.join(ON_GRID)}.")
    return {
        **(GRID | ON_GRID[agent] if grid else MASKED),
        **METHODS[method],
        "label": f"{agent}, {method}",
        "updates": updates,
        "eval.every": max(1, updates // 10),
        "eval.episodes": 20 if grid else 10,
        "log_every": max(1, updates // 100),
        "progress": False,
    }


def measured(result: Any, dataset: str, episodes: int) -> dict[str, Any]:
    """What a row is made of, with a number per lane each."""
    losses = logged(result.folder, "bisimulation")
    cell = {"scores": [float(score) for score in result.scores], "first": losses[0], "last": losses[-1]}
    for name in ("critics_gradient", "bisimulation_gradient"):
        cell[name] = np.mean(logged(result.folder, name), 0).tolist()
    if dataset.startswith("forge/grid/"):
        agent = offrl.load_agent(result.folder)
        assert isinstance(agent, HistoryAgent)
        variant = dataset.split("/")[-1].split("-")[0]
        found = probe_states(agent, hidden_grid(variant), episodes)
        cell |= {"state": found.accuracy, "within": found.within, "observation": [found.observation]}
    return cell


def text_of(cell: dict[str, Any]) -> tuple[str, ...]:
    """The columns from `score` on: means over lanes."""
    scores, mean = np.array(cell["scores"]), {key: float(np.mean(values)) for key, values in cell.items()}
    spread = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
    probe = ("", "")
    if "state" in cell:
        probe = (f"{mean['state']:.2f} ({mean['observation']:.2f})", f"{mean['within']:.2f}")
    return f"{mean['scores']:.1f}{spread}", f"{mean['first']:.3g}", f"{mean['last']:.3g}", *probe


def keep(path: Path, key: str, cell: dict[str, Any]) -> None:
    """Put a method's row into the JSON file of its agent and dataset."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, rows | {key: cell})


def logged(folder: Path, name: str) -> list[list[float]]:
    """A metric of every lane, for each logged update."""
    by_step: dict[int, list[float]] = {}
    for row in offrl.results.read_metrics([folder]).sort("lane").iter_rows(named=True):
        if row["metric"] == name:
            by_step.setdefault(row["step"], []).append(row["value"])
    return [by_step[step] for step in sorted(by_step)]


if __name__ == "__main__":
    main()
