"""Rows of results: one per evaluation episode and one per logged metric, in files that survive a kill.

A run is a folder that holds

    config.json       the full resolved configuration
    manifest.json     run id, versions, git state, data fingerprint, dataset and machine
    episodes.jsonl    one line per evaluation episode
    metrics.jsonl     one line per logged metric, lane and step
    episodes.parquet, metrics.parquet    the same rows, written when the run is closed; a copy for fast reading

The JSON lines are the truth: they are only ever appended to, and every line stands for itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

import offrl
from offrl.utils.errors import OffrlError
from offrl.utils.paths import PACKAGE, replacing

if TYPE_CHECKING:
    import polars as pl

# Columns and their polars types. `wall_clock` is Unix time in seconds; `seed` is the seed of the lane. Lanes that differ
# in a coefficient may share a seed, so `lane` tells them apart.
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
# What a sweep leaves in a run's folder: everything the run printed, and why its last try failed.
LOG, FAILURE = "log.txt", "failed.json"
# What makes a row: written twice (a repeated evaluation of one checkpoint), the later one counts.
_EPISODE_KEY = ["folder", "lane", "step", "episode", "eval_seed", "policy_mode"]
_METRIC_KEY = ["folder", "lane", "step", "metric"]


# ---- writing -------------------------------------------------------------------------------------------------


class RunWriter:
    """Appends the rows of one run.

    Args:
        folder: the run's folder, made if need be.
        run: what all rows share. Needs `method` (or `agent`) and `dataset`; also read: `run_id` (else the folder's
            name), `env_id`, `policy_mode` (else "deterministic") and `updates`, the budget: rows at that step carry
            the checkpoint "last", others their step.
        resume_step: the update from which training goes on. Rows past it, and a line torn by a kill, are dropped, so
            that nothing is counted twice; -1 drops all rows. None is a new run: rows that a killed run left behind are
            dropped, but a folder whose run was closed is refused.

    Every call writes at once; `flush` also brings the rows to the disk and belongs before a checkpoint is saved.

    Raises:
        OffrlError: the folder can't be written, the disk is full (the rows written before stay intact), a row in the
            middle of a file is damaged, or a closed run would be overwritten.
    """

    def __init__(self, folder: Path | str, run: Mapping[str, Any], resume_step: int | None = None) -> None:
        self.folder = Path(folder)
        compacted = [self.folder / f"{kind}.parquet" for kind in ("episodes", "metrics")]
        if resume_step is None and compacted[0].exists():
            raise OffrlError(
                f"{self.folder} already holds the rows of a run: resume that run or choose another folder."
            )
        self._budget = run.get("updates")
        self._shared = {
            "run_id": str(run.get("run_id") or self.folder.name),
            "method": str(run.get("method") or run["agent"]),
            "dataset": str(run["dataset"]),
            "env_id": run.get("env_id"),
            "policy_mode": str(run.get("policy_mode") or "deterministic"),
        }
        for path in compacted:
            if path.exists() and not path.with_suffix(".jsonl").exists():
                raise OffrlError(f"{path.with_suffix('.jsonl')} is missing: restore it before the run is resumed.")
        keep_until = -1 if resume_step is None else resume_step
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._episodes = _Log(self.folder / "episodes.jsonl", keep_until)
            self._metrics = _Log(self.folder / "metrics.jsonl", keep_until)
            for path in compacted:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def episodes(
        self,
        step: int,
        lane_seeds: Sequence[int],
        returns: ArrayLike,
        lengths: ArrayLike,
        normalized: ArrayLike | None,
        eval_seeds: Sequence[int],
    ) -> None:
        """Add one evaluation: `returns`, `lengths`, `normalized` are `[lanes, E]`, `eval_seeds` has E entries."""
        shape = (len(lane_seeds), len(eval_seeds))
        scores = np.full(shape, np.nan) if normalized is None else np.asarray(normalized, dtype=np.float64)
        total, length = np.asarray(returns, dtype=np.float64), np.asarray(lengths, dtype=np.int64)
        for name, array in (("returns", total), ("lengths", length), ("normalized", scores)):
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected [lanes, episodes] = {shape}")
        now = round(time.time(), 3)
        checkpoint = "last" if step == self._budget else str(step)
        self._episodes.append(
            {
                **self._shared,
                "lane": lane,
                "seed": int(seed),
                "step": int(step),
                "checkpoint": checkpoint,
                "episode": episode,
                "eval_seed": int(eval_seed),
                "return_raw": _finite(total[lane, episode]),
                "length": int(length[lane, episode]),
                "normalized": _finite(scores[lane, episode]),
                "wall_clock": now,
            }
            for lane, seed in enumerate(lane_seeds)
            for episode, eval_seed in enumerate(eval_seeds)
        )

    def metrics(
        self,
        step: int,
        lane_seeds: Sequence[int],
        values: Mapping[str, Sequence[float] | np.ndarray],
        updates_per_second: float | None = None,
    ) -> None:
        """Add the metrics of one step, each `[lanes]`; the rate belongs to all lanes: its row has no lane."""
        shared = {"run_id": self._shared["run_id"], "step": int(step), "wall_clock": round(time.time(), 3)}
        rows = [
            {**shared, "lane": lane, "seed": int(seed), "metric": name, "value": _finite(value)}
            for name, lanes in values.items()
            for lane, (seed, value) in enumerate(zip(lane_seeds, lanes, strict=True))
        ]
        if updates_per_second is not None:
            rate = {"metric": "updates_per_second", "value": _finite(updates_per_second)}
            rows.append({**shared, "lane": None, "seed": None, **rate})
        self._metrics.append(rows)

    def flush(self) -> None:
        """Bring all rows to the disk."""
        self._episodes.flush()
        self._metrics.flush()

    def close(self) -> None:
        """Flush, close, and write the Parquet copies. Closing twice does no harm."""
        if self._episodes.closed:
            return
        self._episodes.close()
        self._metrics.close()
        _compact(self.folder)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Log:
    """An append-only file of JSON lines that holds whole lines only, whatever happens."""

    def __init__(self, path: Path, keep_until: int) -> None:
        self.path = path
        try:
            if path.exists():
                data = path.read_bytes()
                kept = _rows_until(data, keep_until, path)
                if kept != data:
                    with replacing(path) as temporary:
                        temporary.write_bytes(kept)
            self._file = io.FileIO(path, "ab")  # unbuffered: what was appended outlives the process
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise _unwritable(path, error) from error

    @property
    def closed(self) -> bool:
        return self._file.closed

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        data = "".join(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows).encode()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._size)  # never leave half a line, or half an evaluation
            raise _unwritable(self.path, error) from error
        self._size += len(data)

    def flush(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _rows_until(data: bytes, step: int, path: Path) -> bytes:
    """The whole lines of `data` whose step is at most `step`."""
    lines = data.split(b"\n")[:-1]  # behind the last newline stands nothing, or a torn line
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError) as error:
            # A power failure may leave a last line of zeros; damage further up is somebody else's.
            if number < len(lines) and step >= 0:
                raise _damaged(path, number) from error
    return b"".join(kept)


def _finite(value: Any) -> float | None:
    """JSON knows no NaN and no infinity: they become null, and NaN when read back."""
    number = float(value)
    return number if math.isfinite(number) else None


def _unwritable(path: Path, error: OSError) -> OffrlError:
    return OffrlError(
        f"{path} could not be written ({error.strerror or error}): free space or choose a writable folder, then "
        "resume the run; what was written before is intact."
    )


def _damaged(path: Path, number: int) -> OffrlError:
    return OffrlError(f"{path}: line {number} is no row of results; delete that line, or the run's folder.")


def _compact(folder: Path) -> None:
    """Write the Parquet copies; without them nothing is lost, so a failure is only a warning."""
    import polars as pl

    for kind, columns in (("episodes", EPISODE_COLUMNS), ("metrics", METRIC_COLUMNS)):
        try:
            with replacing(folder / f"{kind}.parquet") as temporary:
                _read_lines(folder / f"{kind}.jsonl", columns).write_parquet(temporary, compression="zstd")
        except (OSError, pl.exceptions.PolarsError) as error:
            warnings.warn(f"{folder}/{kind}.parquet was not written ({error}); {kind}.jsonl is complete.", stacklevel=2)


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
    """Episode rows of all runs in or below the given folders: `EPISODE_COLUMNS` and `folder`, the run they are from.

    An evaluation that stands twice in a run (same step, episode and evaluation seed) counts once.

    Raises:
        OffrlError: a path is no folder, or a file in it is damaged.
    """
    return _read_rows(paths, "episodes", EPISODE_COLUMNS, _EPISODE_KEY)


def read_metrics(paths: Iterable[Path | str]) -> pl.DataFrame:
    """Metric rows of all runs in or below the given folders: `METRIC_COLUMNS` and `folder`."""
    return _read_rows(paths, "metrics", METRIC_COLUMNS, _METRIC_KEY)


@dataclass(frozen=True)
class Progress:
    """How far a run is: updates made and wanted (0: unknown), and updates per second where it has told."""

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
    """What a run's files say of its progress; cheap, and never an error: the run may be writing them."""
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
    """Rows of all files at once; a copy that is damaged or has other columns gives way to its JSON lines."""
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
    """Rows of a JSON-lines file; what a running or killed process left behind the last newline is ignored."""
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
    """Number of the first line that is no JSON, counted from 1 (the last line when all are)."""
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


# ---- where a run ran -----------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a run depends on besides its configuration: versions, git state and machine, fit for JSON.

    `git` is None unless offrl runs from a checkout of its own repository; a missing package has version None.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "python": platform.python_version(),
            "offrl": offrl.__version__,
            **{
                name: _version(name)
                for name in ("torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics", "minari")
            },
            "cuda": torch.version.cuda if cuda else None,
        },
        "git": _git_state(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    # An installed copy may lie inside a checkout of something else: only a tracked package counts.
    if not _git("ls-files", "__init__.py"):
        return None
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
