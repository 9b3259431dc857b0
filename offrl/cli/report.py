"""`offrl report`: tables, statistics and figures of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offrl.results.cells import METRICS
from offrl.results.report import report
from offrl.utils.errors import OffrlError


def add_parser(subparsers: Any) -> None:
    """Add `offrl report`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser(
        "report",
        help="tables, statistics and curves of runs",
        description="Print tables of all runs in or below the given folders; write HTML, Markdown, LaTeX, CSV, Parquet, PNG.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or folders above them")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: `report` in the folder, or here for several)"
    )
    parser.add_argument(
        "--last-k", type=int, default=10, metavar="K", help="number of evaluations that the second score averages"
    )
    parser.add_argument("--metric", choices=METRICS, default="score", help="what to report (default: %(default)s)")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if out is None:
        out = arguments.runs[0] / "report" if len(arguments.runs) == 1 else Path("report")
    made = report(arguments.runs, out, arguments.last_k, arguments.metric)
    if made.damage:
        more = f" ({len(made.damage)} such runs; the report's notes name all)" if len(made.damage) > 1 else ""
        raise OffrlError(f"left out of the report: {made.damage[0].rstrip('.')}{more}.")
    return 0
