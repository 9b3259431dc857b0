"""Rows of results: one per evaluation episode and one per logged metric, in files that survive a kill.

A run is a folder that holds

    config.json       the full resolved configuration
    manifest.json     run id, versions, git state, data fingerprint, dataset and machine
    episodes.jsonl    one line per evaluation episode
    metrics.jsonl     one line per logged metric, lane and step
    episodes.parquet, metrics.parquet    the same rows, written when the run is closed; a copy for fast reading

The JSON lines are authoritative: they are only appended to, and every line is complete in itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offrl.utils.errors import OffrlError

if TYPE_CHECKING:
    import polars as pl

# Columns and their polars types. `wall_clock` is Unix time in seconds; `seed` is the lane's. Lanes that differ in a
# coefficient may share a seed; `lane` distinguishes them.
EPISODE_COLUMNS = {
    "run_id": "String",
    "method": "String",
    "dataset": "String",
    "env_id": "String",
    "lane": "Int64",
    "seed": "Int64",
    "step": "Int64",
    "checkpoint": "String",
    "episode": "Int64",
    "eval_seed": "Int64",
    "return_raw": "Float64",
    "length": "Int64",
    "normalized": "Float64",
    "policy_mode": "String",
    "wall_clock": "Float64",
}
METRIC_COLUMNS = {
    "run_id": "String",
    "lane": "Int64",
    "seed": "Int64",
    "step": "Int64",
    "metric": "String",
    "value": "Float64",
    "wall_clock": "Float64",
}
# Files of a sweep in a run's folder: the run's output, and the reason why its last try failed.
LOG, FAILURE = "log.txt", "failed.json"
# Keys of rows: of two rows with one key (a repeated evaluation of a checkpoint) the later counts.
_EPISODE_KEY = ["folder", "lane", "step", "episode", "eval_seed", "policy_mode"]
_METRIC_KEY = ["folder", "lane", "step", "metric"]


def _damaged(path: Path, number: int) -> OffrlError:
    return OffrlError(f"{path}: line {number} is no row of results; delete that line, or the run's folder.")


# ---- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run's folder with its configuration and manifest (empty where the file is missing)."""

    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]


def runs(paths: Iterable[Path | str]) -> list[Run]:
    """All runs in or below the given folders, sorted by path, each once."""
    return [Run(f, _read_json(f / "config.json"), _read_json(f / "manifest.json")) for f in _folders(paths)]


def read(paths: Iterable[Path | str]) -> pl.DataFrame:
    """Episode rows of all runs in or below the given folders: `EPISODE_COLUMNS` and `folder`, the folder of the run.

    An evaluation that occurs twice in a run (same step, episode and evaluation seed) counts once.

    Raises:
        OffrlError: a path is no folder, or a file in it is damaged.
    """
    return _read_rows(paths, "episodes", EPISODE_COLUMNS, _EPISODE_KEY)


def read_metrics(paths: Iterable[Path | str]) -> pl.DataFrame:
    """Metric rows of all runs in or below the given folders: `METRIC_COLUMNS` and `folder`."""
    return _read_rows(paths, "metrics", METRIC_COLUMNS, _METRIC_KEY)


def has_critic(run: Run) -> bool:
    """Whether the run's agent learns a critic: as its manifest says, or by its metrics where that is older."""
    if isinstance(stated := run.manifest.get("critic"), bool):
        return stated
    with contextlib.suppress(OffrlError):
        return bool((read_metrics([run.folder])["metric"] == "critic_loss").any())
    return False


@dataclass(frozen=True)
class Progress:
    """Progress of a run: updates made and configured (0: unknown), and updates per second (None: not logged yet)."""

    step: int
    updates: int
    rate: float | None

    def __str__(self) -> str:
        """`4000/20000 updates, 310/s, 52 s left`."""
        text = f"{self.step}/{self.updates or '?'} updates"
        if self.rate:
            left = max(0, self.updates - self.step) / self.rate
            time_left = (
                f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
            )
            text += f", {self.rate:.0f}/s, {time_left} left"
        return text


def progress(folder: Path) -> Progress:
    """Progress of a run from its files; cheap, and never an error, because the run may be writing them."""
    step, rate, config = 0, None, {}
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_bytes())
    with contextlib.suppress(OSError, ValueError, KeyError), open(folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        last = json.loads(file.read().split(b"\n")[-2:][0])
        step = int(last["step"])
        rate = last["value"] if last["metric"] == "updates_per_second" else None
    return Progress(step, int(config.get("updates") or 0), rate)


def _folders(paths: Iterable[Path | str]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        if not Path(path).is_dir():
            raise OffrlError(f"{path} is no folder: give a run's folder, or one with runs below it.")
        for folder in _below(Path(path)):
            found.setdefault(folder.resolve())
    return sorted(found)


def _below(top: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(top):
        if not {"manifest.json", "episodes.jsonl", FAILURE}.isdisjoint(files):
            children.clear()  # checkpoints and reports inside a run are no runs
            yield Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OffrlError(f"{path} is not readable as JSON ({error}); restore it or leave the run out.") from error
    return value if isinstance(value, dict) else {}


def _read_rows(paths: Iterable[Path | str], kind: str, columns: dict[str, str], key: list[str]) -> pl.DataFrame:
    import polars as pl

    compacted, frames = [], [_empty(columns).with_columns(folder=pl.lit("", dtype=pl.String))]
    for folder in _folders(paths):
        lines, parquet = folder / f"{kind}.jsonl", folder / f"{kind}.parquet"
        if _is_newer(parquet, lines):
            compacted.append(parquet)
        elif lines.exists():
            frames.append(_read_lines(lines, columns).with_columns(folder=pl.lit(str(folder))))
    if compacted:
        frames.append(_read_parquet(compacted, columns))
    return pl.concat(frames).unique(subset=key, keep="last", maintain_order=True)


def _is_newer(parquet: Path, lines: Path) -> bool:
    if not parquet.exists():
        return False
    return not lines.exists() or parquet.stat().st_mtime_ns >= lines.stat().st_mtime_ns


def _read_parquet(files: list[Path], columns: dict[str, str]) -> pl.DataFrame:
    """Rows of all files at once; the JSON lines replace a copy that is damaged or has other columns."""
    import polars as pl

    try:
        # Sweeps make folders such as `agent=bc,seed=[0,1]`: neither a pattern nor a partition.
        scan = pl.scan_parquet(files, glob=False, hive_partitioning=False, include_file_paths="folder")
        frame = scan.select(*columns, "folder").collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        if len(files) > 1:
            return pl.concat([_read_parquet([file], columns) for file in files])
        lines = files[0].with_suffix(".jsonl")
        if not lines.exists():
            raise OffrlError(f"{files[0]} is damaged and {lines.name} is gone; leave the run out.") from error
        return _read_lines(lines, columns).with_columns(folder=pl.lit(str(lines.parent)))
    names = {str(file): str(file.parent) for file in files}
    return frame.with_columns(pl.col("folder").replace(names))


def _read_lines(path: Path, columns: dict[str, str]) -> pl.DataFrame:
    """Rows of a JSON-lines file; text after the last newline, of a running or killed process, is ignored."""
    import polars as pl

    data = path.read_bytes()
    data = data[: data.rfind(b"\n") + 1]
    if not data:
        return _empty(columns)
    schema = {name: getattr(pl, kind) for name, kind in columns.items()}
    try:
        frame = pl.read_ndjson(io.BytesIO(data), schema=schema)
    except pl.exceptions.PolarsError as error:
        raise _damaged(path, _first_damaged(data)) from error
    measured = "return_raw" if "return_raw" in columns else "value"
    return frame.with_columns(pl.col(measured).fill_null(math.nan))


def _first_damaged(data: bytes) -> int:
    """Number of the first line that is not JSON, from 1 (of the last line if all are)."""
    lines = data.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
        except ValueError:
            return number
    return len(lines)


def _empty(columns: dict[str, str]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(schema={name: getattr(pl, kind) for name, kind in columns.items()})
