"""Runs with an online phase: scores before and after it, regret, and their curves over environment steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from offrl import results
from offrl.results.cells import Cell, _curve
from offrl.results.labels import ONLINE
from offrl.results.online import NAME
from offrl.results.published import OnlinePublished, lookup_online
from offrl.results.rows import MOST_BYTES, ConfigRecord
from offrl.results.stats import Array
from offrl.utils.files import parse_json, read_bytes

if TYPE_CHECKING:
    import polars as pl


class OnlineRow(BaseModel):
    """A line of `online.jsonl`."""

    lane: int
    step: int
    return_raw: float | None
    normalized: float | None = None
    success: bool | None = None


@dataclass(frozen=True)
class FineTuning:
    """A method that was fine-tuned on a dataset.

    Attributes:
        seeds: one per lane, in the order of the scores.
        before, after: `[S]` scores of the deterministic policy at the switch and at the last evaluation (NaN: none yet).
        regret: `[S]` 1 minus the mean success of the exploring policy's episodes; NaN where nothing measures success.
        by_success: whether the environment tells success; otherwise a score clipped to [0, 100] stands for it.
        steps: environment steps, the fewest of a seed.
        cell: the method's cell, whose curve is over environment steps.
        published: what somebody published; None: nothing.
    """

    method: str
    dataset: str
    seeds: list[int]
    before: Array
    after: Array
    regret: Array
    by_success: bool
    steps: int
    cell: Cell
    published: OnlinePublished | None


def fine_tunings(
    cells: Sequence[Cell],
    rows: pl.DataFrame,
    runs: Sequence[results.Run],
    episodes: Mapping[Path, Sequence[OnlineRow]],
) -> list[FineTuning]:
    """What the runs with an online phase say.

    Args:
        cells, rows: as `cells.build` gives them.
        episodes: the episodes of each such run's online phase, by folder.
    """
    import polars as pl

    online = {str(run.folder): run for run in runs if run.config.get("online")}
    rows = rows.filter(pl.col("folder").is_in(list(online)))
    found = []
    for cell in cells:
        here = rows.filter((pl.col("label") == cell.method) & (pl.col("dataset") == cell.dataset))
        if not here.is_empty():
            found.append(_fine_tuning(cell, here, online, episodes))
    return found


def _fine_tuning(
    cell: Cell, rows: pl.DataFrame, runs: Mapping[str, results.Run], episodes: Mapping[Path, Sequence[OnlineRow]]
) -> FineTuning:
    import polars as pl

    evaluations = (
        rows.group_by("folder", "lane", "seed", "step")
        .agg(pl.col("value").mean())
        .sort("seed", "folder", "lane", "step")
    )
    steps = [
        _environment_step(runs[folder].config, step)
        for folder, step in evaluations.select("folder", "step").iter_rows()
    ]
    evaluations = evaluations.with_columns(step=pl.Series(steps, dtype=pl.Int64))
    before, after, regret, seeds, ends, told = [], [], [], [], [], []
    for (folder, lane, seed), group in evaluations.group_by("folder", "lane", "seed", maintain_order=True):
        score = dict(group.filter(pl.col("step") >= 0).select("step", "value").iter_rows())
        last = max(score, default=0)
        before.append(score.get(0, math.nan))
        after.append(score[last] if last else math.nan)
        value, by_success = regret_of(episodes[Path(str(folder))], int(str(lane)))
        regret.append(value)
        told.append(by_success)
        seeds.append(int(str(seed)))
        ends.append(last)
    base = cell.base.removesuffix(ONLINE)
    curve = _curve(evaluations.filter(pl.col("step") >= 0))
    return FineTuning(
        cell.method,
        cell.dataset,
        seeds,
        np.array(before),
        np.array(after),
        np.array(regret),
        all(told),
        min(ends),
        replace(cell, curve=curve, published=[]),
        lookup_online(base, cell.dataset) if cell.comparable else None,
    )


def _environment_step(config: dict[str, Any], update: int) -> int:
    """The environment step after which an update was made; negative for the offline half, 0 at the switch."""
    record = ConfigRecord.model_validate(config)
    made, online = update - (record.updates or 0), record.online
    return made if made <= 0 or online is None else online.random_steps + made // online.updates_per_step


def read_online(folder: Path) -> list[OnlineRow]:
    """The episodes of a run's online phase; a line torn by a kill is left out.

    Raises:
        OffrlError: the file can't be read, or a line is no row.
    """
    path = folder / NAME
    try:
        data = read_bytes(path, "restore it or leave the run out", MOST_BYTES)
    except FileNotFoundError:
        return []
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return [
        parse_json(line, OnlineRow, f"{path}: line {i}", "delete that line") for i, line in enumerate(lines, start=1)
    ]


def regret_of(episodes: Sequence[OnlineRow], lane: int) -> tuple[float, bool]:
    """1 minus the mean success of a lane's episodes, and whether the environment told it; NaN where nothing does.

    It is a mean over episodes, as in corl-team/CORL, and not over steps: a short success weighs as much as a long failure.
    """
    mine = [row for row in episodes if row.lane == lane]
    if mine and all(row.success is not None for row in mine):
        return 1 - float(np.mean([bool(row.success) for row in mine])), True
    scores = [row.normalized for row in mine if row.normalized is not None]
    if not mine or len(scores) < len(mine):
        return math.nan, False
    return 1 - float(np.clip(scores, 0, 100).mean()) / 100, False


def collapsed(tuned: Sequence[FineTuning]) -> str | None:
    """A sentence where a mean hides seeds that collapsed: after the phase below half of what they had before it, above 0."""
    hidden = [
        f"{t.method} on {t.dataset} (seeds {', '.join(map(str, seeds))})"
        for t in tuned
        if t.cell.normalized and (seeds := [s for s, b, a in zip(t.seeds, t.before, t.after) if b > 0 and 2 * a < b])
    ]
    return f"Collapsed while fine-tuned, below half of the score before: {'; '.join(hidden)}." if hidden else None
