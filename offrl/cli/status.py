"""`offrl status`: progress and failures of the runs of a folder, from their files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from offrl import results
from offrl.results.records import FailureRecord, ResultRecord, score_name
from offrl.results.rows import FAILURE, folders, run_of
from offrl.training.failed_jobs import read_failures
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_json
from offrl.utils.locks import READ_ONLY, is_locked

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """A run: `finished`, `running` (a process holds its lock), `failed` (last try in a sweep), `stopped` or `damaged`."""

    folder: Path
    method: str
    dataset: str
    state: str
    progress: results.Progress
    message: str


def states(paths: Iterable[Path | str]) -> list[State]:
    """The state of every run in or below the given folders.

    Raises:
        OffrlError: a path is no folder.
    """
    paths = list(paths)
    runs = [_state(run_of(folder)) for folder in folders(paths)]
    return runs + [state for path in dict.fromkeys(map(Path, paths)) for state in _homeless(path)]


def _homeless(out: Path) -> list[State]:
    """The jobs of sweeps into a folder that failed before they had one of their own."""
    found = []
    for words, message in read_failures(out).items():
        given = dict(word.split("=", 1) for word in words.split() if "=" in word)
        names = given.get("agent", "?"), given.get("dataset", "?")
        nothing = results.Progress(0, 0, None)
        found.append(State(out, *names, "failed", nothing, f"before it had a folder: {message} ({words})"))
    return found


def _state(run: results.Run) -> State:
    now = results.progress(run.folder)
    try:
        if run.damage:
            raise OffrlError(run.damage)
        state, message = _stands(run.folder, now)
    except OffrlError as error:
        state, message = "damaged", str(error)
    method = run.config.get("label") or run.config.get("method") or run.folder.parent.parent.name
    dataset = run.config.get("dataset") or run.folder.parent.name
    return State(run.folder, str(method), str(dataset), state, now, message)


def _stands(folder: Path, now: results.Progress) -> tuple[str, str]:
    """State and message of a run; raises OffrlError where its files are damaged."""
    if _held(folder / ".lock"):
        return "running", str(now)
    if (kept := _read(folder / "result.json", ResultRecord)) and kept.step >= now.updates:
        values = np.array(kept.scores or kept.returns, dtype=float)
        name = score_name(kept.success) if kept.scores else "return"
        return "finished", f"{name} {values.mean():.1f}" if len(values) else "not evaluated"
    if failure := _read(folder / FAILURE, FailureRecord):
        return "failed", failure.message
    return "stopped", f"{now.step}/{now.updates} updates; offrl train resume={folder}"


def _read(path: Path, schema: type[T]) -> T | None:
    """None where there is no such file."""
    try:
        return read_json(path, schema, "remove it")
    except FileNotFoundError:
        return None


def _held(lock: Path) -> bool:
    """Whether a process trains the run; a shared lock is tried and released at once."""
    try:
        descriptor = os.open(lock, READ_ONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OffrlError(f"{lock} can't be read ({error.strerror}); remove it.") from error
    try:
        return is_locked(descriptor)
    finally:
        os.close(descriptor)


def add_parser(subparsers: Any) -> None:
    """Add `offrl status`; the parsed arguments carry `run`, which returns the exit status."""
    parser = subparsers.add_parser(
        "status",
        help="progress and failures of runs",
        description="Show the state of all runs in or below the given folders.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or folders above them")
    parser.add_argument("--json", action="store_true", help="one JSON object per run")
    parser.set_defaults(run=_command)


def _command(arguments: argparse.Namespace) -> int:
    found = states(arguments.runs)
    if arguments.json:
        for s in found:
            numbers = {"step": s.progress.step, "updates": s.progress.updates, "updates_per_second": s.progress.rate}
            words = {"folder": str(s.folder), "method": s.method, "dataset": s.dataset, "state": s.state}
            print(json.dumps({**words, **numbers, "message": s.message}))
        return 0
    counts = Counter(s.state for s in found)
    total = f"{len(found)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.most_common())
    if not sys.stdout.isatty():
        for s in found:
            print(f"{s.state:9} {s.method:20} {s.dataset:40} {s.folder.name}  {s.message}")
        print(total)
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"finished": "green", "running": "cyan", "failed": "red", "stopped": "yellow", "damaged": "red"}
    table = Table("state", "method", "dataset", "run", "", box=None)
    for s in found:
        table.add_row(Text(s.state, styles[s.state]), *map(Text, (s.method, s.dataset, s.folder.name, s.message)))
    Console().print(table, total)
    return 0
