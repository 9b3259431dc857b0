"""Rows of results: one per evaluation episode and one per logged metric, in files that survive a kill.

A run is a folder that holds

    config.json       the full resolved configuration
    manifest.json     run id, versions, git state, data fingerprint, dataset and machine
    episodes.jsonl    one line per evaluation episode
    metrics.jsonl     one line per logged metric, lane and step
    episodes.parquet, metrics.parquet    the same rows, written when the run is closed, for other programs

Everything here reads the JSON lines: they are only appended to, and every line is complete in itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from offrl.utils.errors import OffrlError
from offrl.utils.files import parse_json, read_bytes, read_json
from offrl.utils.locks import READ_ONLY
from offrl.utils.paths import replacing

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
# Columns that every row of a kind has; others may be null, or were not written by earlier versions.
_NEEDED = {"episodes": ("method", "dataset", "lane", "seed", "step", "policy_mode"), "metrics": ("step", "metric")}
MOST_BYTES = 4 << 30  # of a file of rows
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
    """A run's folder with its configuration and manifest (empty where a file is missing); `damage`: what is wrong with them."""

    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    damage: str = ""


class _OnlineRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    steps: Annotated[int, Field(ge=0, lt=2**63)]
    updates_per_step: Annotated[int, Field(ge=1, lt=2**63)]
    random_steps: Annotated[int, Field(ge=0, lt=2**63)]


class ConfigRecord(BaseModel):
    """What reports and `offrl status` read of `config.json`; a run that goes on checks the rest."""

    model_config = ConfigDict(strict=True, extra="allow")
    updates: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    online: _OnlineRecord | None = None
    label: str | None = None
    method: str | None = None
    dataset: str | None = None

    @property
    def budget(self) -> int:
        """Updates, those of an online phase included; 0 where the configuration does not say."""
        online = self.online
        later = online.updates_per_step * max(0, online.steps - online.random_steps) if online else 0
        return (self.updates or 0) + later


class _DatasetRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    family: str | None = None


class ManifestRecord(BaseModel):
    """What reports read of `manifest.json`."""

    model_config = ConfigDict(strict=True, extra="allow")
    method: str | None = None
    critic: bool | None = None
    non_default: list[str] | None = None
    lane_lists: list[str] | None = None  # settings that are lists with one number per lane, by dotted key
    dataset_info: _DatasetRecord | None = None


def runs(paths: Iterable[Path | str]) -> list[Run]:
    """All runs in or below the given folders, sorted by path, each once."""
    found = list(map(run_of, folders(paths)))
    for run in found:
        if run.damage:
            raise OffrlError(run.damage)
    return found


def run_of(folder: Path) -> Run:
    """The run in a folder; where a file is damaged it has `damage`, and the file's part is empty."""
    parts: dict[str, dict[str, Any]] = {}
    damage = ""
    for name, schema in (("config", ConfigRecord), ("manifest", ManifestRecord)):
        try:
            record = read_json(folder / f"{name}.json", schema, "restore it or leave the run out")
            parts[name] = record.model_dump(exclude_unset=True)
        except FileNotFoundError:
            parts[name] = {}
        except OffrlError as error:
            parts[name], damage = {}, damage or str(error)
    return Run(folder, parts["config"], parts["manifest"], damage)


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
    step, rate, updates = 0, None, 0
    with contextlib.suppress(OSError, OffrlError):
        updates = read_json(folder / "config.json", ConfigRecord, "restore it").budget
    with contextlib.suppress(OSError, OffrlError):
        last = parse_json(_last_line(folder / "metrics.jsonl"), _Rate, "metrics.jsonl", "restore it")
        step = last.step
        rate = last.value if last.metric == "updates_per_second" else None
    return Progress(step, updates, rate)


class _Rate(BaseModel):
    """A row of metrics."""

    step: Annotated[int, Field(ge=0, lt=2**63, strict=True)]
    metric: str
    value: FiniteFloat | None


def _last_line(path: Path) -> bytes:
    """The last whole line of a file of rows, which a process may be writing; empty where there is none."""
    with open(os.open(path, READ_ONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 4096))
        return b"".join(file.read(4096).split(b"\n")[-2:-1])


def folders(paths: Iterable[Path | str]) -> list[Path]:
    """The folders of all runs in or below the given ones, sorted, each once."""
    found: dict[Path, None] = {}
    for path in paths:
        if not os.path.isdir(path):  # of a name that is too long, Path.is_dir raises
            raise OffrlError(f"{path} is no folder: give a run's folder, or one with runs below it.")
        for folder in _below(Path(path)):
            found.setdefault(folder.resolve())
    return sorted(found)


def _below(top: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(top):
        if not {"manifest.json", "episodes.jsonl", FAILURE}.isdisjoint(files):
            children.clear()  # checkpoints and reports inside a run are no runs
            yield Path(folder)
        if ".sweep" in children:  # a sweep's own notes, its failed jobs among them
            children.remove(".sweep")


def _read_rows(paths: Iterable[Path | str], kind: str, columns: dict[str, str], key: list[str]) -> pl.DataFrame:
    """Rows of the JSON lines alone: a damaged Parquet file, even one with a single flipped bit, may end the process."""
    import polars as pl

    frames = [_empty(columns).with_columns(folder=pl.lit("", dtype=pl.String))]
    for folder in folders(paths):
        lines = folder / f"{kind}.jsonl"
        if lines.exists():
            frames.append(_read_lines(lines, columns).with_columns(folder=pl.lit(str(folder))))
        elif lines.with_suffix(".parquet").exists():
            raise OffrlError(f"{lines} is missing (the Parquet file is a copy of it); restore it or leave the run out.")
    return pl.concat(frames).unique(subset=key, keep="last", maintain_order=True)


def _read_lines(path: Path, columns: dict[str, str]) -> pl.DataFrame:
    """Rows of a JSON-lines file; text after the last newline, of a running or killed process, is ignored."""
    data = read_bytes(path, "restore it or leave the run out", MOST_BYTES)
    return rows_of(data[: data.rfind(b"\n") + 1], columns, path)


def rows_of(data: bytes, columns: dict[str, str], path: Path) -> pl.DataFrame:
    """Whole lines of a file as rows.

    Raises:
        OffrlError: one of them is no row.
    """
    import polars as pl

    if not data:
        return _empty(columns)
    schema = {name: getattr(pl, kind) for name, kind in columns.items()}
    needed = _NEEDED["metrics" if "metric" in columns else "episodes"]
    try:
        with without_panic(path):
            frame = pl.read_ndjson(io.BytesIO(data), schema=schema)
        if frame.select(pl.any_horizontal(pl.col(*needed).is_null()).any()).item():
            raise ValueError("a row without its step, say")
    except (ValueError, pl.exceptions.PolarsError) as error:
        raise _damaged(path, _first_damaged(data, schema, needed)) from error
    measured = "return_raw" if "return_raw" in columns else "value"
    return frame.with_columns(pl.col(measured).fill_null(math.nan))


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """The file is written whole or not at all; a full disk is polars' own error or the system's."""
    with without_panic(path), replacing(path) as temporary:
        frame.write_parquet(temporary, compression="zstd")


@contextlib.contextmanager
def without_panic(path: Path) -> Iterator[None]:
    """OSError of `path` where the system refuses polars a file or a thread: it panics, and a panic is no Exception."""
    import polars as pl

    try:
        yield
    except pl.exceptions.PanicException as error:
        code = re.search(r"\bOs { code: (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _first_damaged(data: bytes, schema: dict[str, Any], needed: Sequence[str]) -> int:
    """Number of the first line that is no row, from 1 (of the last line if all are)."""
    kinds = {"Int64": int, "Float64": int | float, "String": str}
    lines = data.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)  # only to find the line: pydantic would be ten times slower, and all is checked here
            values = [(row.get(name), kinds[str(kind)]) for name, kind in schema.items()]
        except (ValueError, AttributeError, RecursionError):
            return number
        if any(value is not None and not isinstance(value, kind) for value, kind in values):
            return number
        if any(row.get(name) is None for name in needed):
            return number
    return len(lines)


def _empty(columns: dict[str, str]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(schema={name: getattr(pl, kind) for name, kind in columns.items()})
