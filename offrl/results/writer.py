"""Writer of a run's rows; they survive a kill."""

from __future__ import annotations

import io
import json
import math
import os
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from offrl.results.rows import (
    EPISODE_COLUMNS,
    METRIC_COLUMNS,
    MOST_BYTES,
    _damaged,
    _read_lines,
    rows_of,
    write_parquet,
)
from offrl.utils.errors import OffrlError
from offrl.utils.files import read_bytes
from offrl.utils.paths import replacing


class RunWriter:
    """Appends the rows of one run.

    Args:
        folder: folder of the run, created if necessary.
        run: values that all rows share. Required: `method` (or `agent`) and `dataset`; optional: `run_id` (default: the
            folder's name), `env_id`, `policy_mode` (default "deterministic"), `updates`, the budget: rows at that step
            have the checkpoint "last", others their step; and `by_lane`, for each lane what differs from the shared values.
        resume_step: update from which training continues. Rows after it, and a line torn by a kill, are dropped, so that
            nothing counts twice; -1 drops all rows. None is a new run: rows of a killed run are dropped, but a folder whose
            run was closed is refused.
        played_again: environment seeds of the episodes that are played again at `resume_step`: their rows are dropped, too.
            Those of other episodes, such as `offrl evaluate` adds, stay.

    Every call writes at once. `flush` also syncs the rows to disk; call it before a checkpoint is saved.

    Raises:
        OffrlError: the folder cannot be written, the disk is full (rows written before stay intact), a row in the
            middle of a file is damaged, or a closed run would be overwritten.
    """

    def __init__(
        self,
        folder: Path | str,
        run: Mapping[str, Any],
        resume_step: int | None = None,
        played_again: Collection[int] = (),
    ) -> None:
        self.folder = Path(folder)
        compacted = [self.folder / f"{kind}.parquet" for kind in ("episodes", "metrics")]
        if resume_step is None and compacted[0].exists():
            raise OffrlError(
                f"{self.folder} already holds the rows of a run: resume that run or choose another folder."
            )
        self._budget, self._by_lane = run.get("updates"), run.get("by_lane")
        self._shared = {
            "run_id": str(run.get("run_id") or self.folder.name),
            "method": str(run.get("method") or run["agent"]),
            "dataset": str(run["dataset"]),
            "env_id": run.get("env_id"),
            "policy_mode": str(run.get("policy_mode") or "deterministic"),
        }
        keep_until = -1 if resume_step is None else resume_step
        check_rows(self.folder, keep_until)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._episodes = _Log(self.folder / "episodes.jsonl", keep_until, played_again, self._budget)
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
                **(self._by_lane[lane] if self._by_lane else {}),
                "lane": lane,
                "seed": int(seed),
                "step": int(step),
                "checkpoint": checkpoint,
                "episode": episode,
                "eval_seed": int(eval_seed),
                "return_raw": finite(total[lane, episode]),
                "length": int(length[lane, episode]),
                "normalized": finite(scores[lane, episode]),
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
        """Add the metrics of one step, each `[lanes]`; the row of the rate has no lane, because all lanes share it."""
        shared = {"run_id": self._shared["run_id"], "step": int(step), "wall_clock": round(time.time(), 3)}
        rows = [
            {**shared, "lane": lane, "seed": int(seed), "metric": name, "value": finite(value)}
            for name, lanes in values.items()
            for lane, (seed, value) in enumerate(zip(lane_seeds, lanes, strict=True))
        ]
        if updates_per_second is not None:
            rate = {"metric": "updates_per_second", "value": finite(updates_per_second)}
            rows.append({**shared, "lane": None, "seed": None, **rate})
        self._metrics.append(rows)

    def flush(self) -> None:
        """Sync all rows to disk."""
        self._episodes.flush()
        self._metrics.flush()

    def close(self) -> None:
        """Flush, close, and write the Parquet copies. A second call does nothing."""
        if self._episodes.closed:
            return
        try:
            self._episodes.close()
        finally:
            self._metrics.close()
        _compact(self.folder)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_rows(folder: Path, resume_step: int, needed: bool = False) -> None:
    """Raise OffrlError where a run's rows are damaged, so that it could not go on; nothing is written.

    Args:
        needed: whether a run that has no rows at all is refused as well.
    """
    for kind, columns in (("episodes", EPISODE_COLUMNS), ("metrics", METRIC_COLUMNS)):
        path = folder / f"{kind}.jsonl"
        if path.exists():
            data = read_bytes(path, "restore it, or start the run over with fresh=true", MOST_BYTES)
            rows_of(_rows_until(data, resume_step, path), columns, path)
        elif needed or (resume_step >= 0 and path.with_suffix(".parquet").exists()):
            raise OffrlError(f"{path} is missing; restore it, or start the run over with fresh=true.")


class _Log:
    """An append-only file of JSON lines that never holds a partial line after an error."""

    def __init__(
        self, path: Path, keep_until: int, played_again: Collection[int] = (), budget: int | None = None
    ) -> None:
        self.path = path
        try:
            if path.exists():
                data = path.read_bytes()
                kept = _relabelled(_rows_until(data, keep_until, path, played_again), budget)
                if kept != data:
                    with replacing(path) as temporary:
                        temporary.write_bytes(kept)
            self._file = io.FileIO(path, "ab")  # unbuffered: appended rows outlive the process
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
            there = self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if not there:
            raise OffrlError(
                f"{self.path} was removed or replaced while the run wrote to it; restore it, or start over with fresh=true."
            )

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _rows_until(data: bytes, step: int, path: Path, played_again: Collection[int] = ()) -> bytes:
    """The whole lines of `data` whose step is at most `step`, without the episodes of `step` that are played again."""
    lines = data.split(b"\n")[:-1]  # after the last newline there is nothing, or a torn line
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)  # lines of bounded files; `rows_of` checks the rest at once
            again = row["step"] == step and row.get("eval_seed") in played_again
            if row["step"] <= step and not again:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # A power failure may leave a last line of zeros; damage before it has another cause.
            if number < len(lines) and step >= 0:
                raise _damaged(path, number) from error
    return b"".join(kept)


def _relabelled(data: bytes, budget: int | None) -> bytes:
    """Whole lines in which a step before the budget is no longer the "last": it was, until the run was given more updates."""
    if budget is None:
        return data
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if b'"last"' in line and (row := json.loads(line)).get("checkpoint") == "last" and row["step"] < budget:
            row["checkpoint"] = str(row["step"])
            lines[number] = json.dumps(row, separators=(",", ":")).encode() + b"\n"
    return b"".join(lines)


def plain(value: Any) -> Any:
    """Dictionaries, lists and numbers as JSON has them: null for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return finite(value) if isinstance(value, float) else value


def finite(value: Any) -> float | None:
    """JSON has no NaN and no infinity: they are written as null and read as NaN."""
    number = float(value)
    return number if math.isfinite(number) else None


def _unwritable(path: Path, error: OSError) -> OffrlError:
    return OffrlError(
        f"{path} could not be written ({error.strerror or error}): free space or choose a writable folder, then "
        "resume the run; what was written before is intact."
    )


def _compact(folder: Path) -> None:
    """Write the Parquet copies; a failure is only a warning, because nothing is lost without them."""
    import polars as pl

    for kind, columns in (("episodes", EPISODE_COLUMNS), ("metrics", METRIC_COLUMNS)):
        try:
            write_parquet(_read_lines(folder / f"{kind}.jsonl", columns), folder / f"{kind}.parquet")
        except (OSError, pl.exceptions.PolarsError) as error:
            warnings.warn(f"{folder}/{kind}.parquet was not written ({error}); {kind}.jsonl is complete.", stacklevel=2)
