"""`offrl export`: a policy as an ONNX or TorchScript file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offrl.agents.acting import best_lane, lane_named
from offrl.evaluation.export import SUFFIXES, export
from offrl.training.runs import dataset_info, load_agent
from offrl.training.scoring import run_folder


def add_parser(subparsers: Any) -> None:
    """Add `offrl export`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser("export", help="a policy as an ONNX or TorchScript file (docs/policies.md)")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument("--format", choices=sorted(SUFFIXES), default="onnx", help="default onnx")
    parser.add_argument("--lane", metavar="N|best", help="the lane's number; without it the best of the run's result")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default RUN/policy.onnx or RUN/policy.pt")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    agent, info = load_agent(arguments.run_folder), dataset_info(arguments.run_folder)
    lane = best_lane(agent) if arguments.lane is None else lane_named(agent, arguments.lane)
    folder = run_folder(arguments.run_folder)
    path = arguments.out or folder / f"policy{SUFFIXES[arguments.format]}"
    facts = {"run": folder.resolve().name, "updates": int(agent.random.step)}
    made = export(agent, lane, info, path, arguments.format, facts)
    score = made.metadata["score"]
    print(
        f"{path}: {type(agent).__name__} on {info.id}, lane {lane}" + ("" if score is None else f", score {score:.1f}")
    )
    print(
        f"checked: actions differ by at most {made.difference:.1e} from agent.predict's (allowed {made.tolerance:.1e})"
    )
    return 0
