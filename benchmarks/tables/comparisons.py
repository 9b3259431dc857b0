"""Differences of two methods' seeds, their verdicts, and rows of finished runs; `verdicts.py` applies them to the claims."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from offrl import results

Scores = NDArray[np.float64]
NOT_YET = "not run yet"
UNDECIDED = "undecided"


# ---- statistics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Mean of one method's seeds minus the mean of another's, with Welch's interval."""

    mean: float
    low: float
    high: float

    def verdict(self, margin: float) -> str:
        if self.mean >= margin and self.low > 0:
            return "shown"
        return "not shown at this budget" if self.high < margin else UNDECIDED

    def shown(self, margin: float) -> bool | str:
        """Whether it is shown, or `UNDECIDED`."""
        verdict = self.verdict(margin)
        return verdict if verdict == UNDECIDED else verdict == "shown"

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def difference(ours: Scores, other: Scores, level: float = 0.95) -> Difference | None:
    """Welch's t interval of mean(ours) - mean(other); None below two seeds a side."""
    if min(len(ours), len(other)) < 2:
        return None
    points = float(ours.mean() - other.mean())
    if ours.std() == other.std() == 0:
        return Difference(points, points, points)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss")  # where all seeds of a side score the same
        interval = stats.ttest_ind(ours, other, equal_var=False).confidence_interval(level)
    return Difference(points, float(interval.low), float(interval.high))


def paired(ours: Scores, other: Scores, level: float = 0.95) -> Difference | None:
    """Student's t interval of the mean difference of pairs; None below two pairs."""
    if len(ours) < 2:
        return None
    apart = ours - other
    points, error = float(apart.mean()), float(stats.sem(apart))
    half = error * float(stats.t.ppf((1 + level) / 2, len(apart) - 1))
    return Difference(points, points - half, points + half)


def equality(wide: Difference, narrow: Difference, margin: float) -> str:
    """Equal, unequal or undecided; `wide` is the 95 % interval, `narrow` the 90 % one (two one-sided tests)."""
    if -margin < narrow.low and narrow.high < margin:
        return "equal"
    apart = abs(wide.mean) >= margin and (wide.low > 0 or wide.high < 0)
    return "unequal" if apart else UNDECIDED


# ---- rows ----------------------------------------------------------------------------------------------------------------


class Rows:
    """Evaluations of the finished runs in or below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        runs = (
            [run for run in results.runs([folder]) if (run.folder / "result.json").exists()] if folder.is_dir() else []
        )
        self.runs = runs
        self.labels = {str(run.folder): str(run.config.get("label") or run.manifest.get("method")) for run in runs}
        rows = results.read([run.folder for run in runs])
        self.evaluations = (
            rows.with_columns(method=pl.col("folder").replace(self.labels))
            .group_by("method", "dataset", "folder", "lane", "seed", "step")
            .agg(score=pl.col("normalized").fill_null(np.nan).mean())  # one episode without a score leaves none
            .sort("seed", "step")
        )

    def curves(self, method: str, dataset: str) -> pl.DataFrame:
        return self.evaluations.filter((pl.col("method") == method) & (pl.col("dataset") == dataset))

    def scores(
        self,
        method: str,
        dataset: str,
        seeds: Iterable[int] | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Scores:
        """Last score of each seed, `[S]`; `settings`: only of runs that have these, as `{"agent.alpha": 2.5}`.

        Raises:
            SystemExit: two lanes of one seed, or runs of different budgets, which are no sample of one thing.
        """
        found = self.curves(method, dataset)
        if seeds is not None:
            found = found.filter(pl.col("seed").is_in(list(seeds)))
        if settings:
            having = [str(run.folder) for run in self.runs if has_settings(run.config, settings)]
            found = found.filter(pl.col("folder").is_in(having))
        last = found.group_by("folder", "lane", "seed", maintain_order=True).last().sort("seed")
        check_alike(last, f"{method} on {dataset}")
        return last["score"].to_numpy()

    def means(self, method: str, dataset: str) -> dict[int, float]:
        """Mean score over seeds by update."""
        curves = self.curves(method, dataset)
        check_alike(curves.group_by("folder", "lane", "seed", maintain_order=True).last(), f"{method} on {dataset}")
        found = curves.group_by("step").agg(pl.col("score").mean()).sort("step")
        return dict(found.select("step", "score").iter_rows())


def check_alike(last: pl.DataFrame, cell: str) -> None:
    """Raise SystemExit unless the last evaluations of a cell are of different seeds after as many updates."""
    twice = last.filter(pl.col("seed").is_duplicated())
    if len(twice):
        seeds = ", ".join(map(str, twice["seed"].unique().sort()))
        folders = " and ".join(twice["folder"].unique().sort())
        raise SystemExit(f"{cell}: seeds {seeds} stand in {folders}; keep one of each seed.")
    if last["step"].n_unique() > 1:
        steps = ", ".join(
            f"{step} ({folder})" for step, folder in last.select("step", "folder").unique().sort("step").rows()
        )
        raise SystemExit(
            f"{cell}: last evaluations after different numbers of updates, {steps}; keep runs of one budget."
        )


def has_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a run's configuration has these values, whose keys are paths with points."""

    def value(key: str) -> Any:
        inner: Any = config
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        return inner

    return all(value(key) == wanted for key, wanted in settings.items())


# ---- lines of the page ----------------------------------------------------------------------


@dataclass
class Line:
    """What is known of a comparison."""

    name: str
    what: str
    found: str = ""
    verdict: str = NOT_YET

    def __str__(self) -> str:
        return f"| {self.name} | {self.what} | {self.found} | {self.verdict} |"


def compared(name: str, what: str, ours: Scores, other: Scores, margin: float, seeds: int) -> Line:
    """The line of a difference; `seeds` are planned for each side."""
    found = difference(ours, other)
    if found is None:
        return Line(name, what)
    text = f"{found}; {len(ours)} and {len(other)} seeds"
    early = "so far: " if min(len(ours), len(other)) < seeds else ""
    return Line(name, what, text, early + found.verdict(margin))


def counted(name: str, what: str, verdicts: Sequence[bool | str | None], needed: int) -> Line:
    """A claim on several cells: shown when enough of them are, not shown when too few can be, whatever the others say.

    Args:
        verdicts: of each cell, whether it is shown; `UNDECIDED`; None as long as it is not run.
    """
    done = [verdict for verdict in verdicts if verdict is not None]
    if not done:
        return Line(name, what)
    open_, doubtful, shown = len(verdicts) - len(done), done.count(UNDECIDED), done.count(True)
    text = f"{shown} of {len(verdicts)}"
    text += f", {doubtful} undecided" if doubtful else ""
    text += f", {open_} not run yet" if open_ else ""
    if shown >= needed:
        return Line(name, what, text, "shown")
    if shown + doubtful + open_ < needed:
        return Line(name, what, text, "not shown at this budget")
    return Line(name, what, text, NOT_YET if shown + open_ >= needed else UNDECIDED)


def is_shown(ours: Scores, other: Scores, margin: float, seeds: int) -> bool | str | None:
    """Whether two cells' difference is shown, `UNDECIDED`, or None as long as seeds are missing: as `counted` takes it."""
    found = difference(ours, other)
    return None if found is None or min(len(ours), len(other)) < seeds else found.shown(margin)
