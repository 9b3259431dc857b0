"""What a report holds: cells (a method on a dataset), curves, aggregates, comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from offrl.results import budget, stats
from offrl.results.published import Published
from offrl.results.stats import Array

METRICS = ("score", "return", "length")


FIGURES = ("curves", "scores", "profiles")


FILES = (
    "report.html",
    "report.md",
    "report.tex",
    "report.csv",
    "episodes.parquet",
    *(f"{name}.png" for name in FIGURES),
)


# Seeds below which a difference between methods is not called one.
ENOUGH_SEEDS = 10


@dataclass(frozen=True)
class Curve:
    """Scores against updates: mean over lanes, half width of its 95 % t interval (NaN for one lane), extremes; all `[T]`."""

    steps: Array
    mean: Array
    half_width: Array
    low: Array
    high: Array


@dataclass
class Cell:
    """A method on a dataset.

    Attributes:
        method: the label; `base` is the same without the settings that tell variants apart.
        last, average: `[S]` score at the last evaluation and mean over the last `k` evaluations, one per lane.
        best: `[S]` the best evaluation of each lane: chosen by online scores, so no final number.
        online: episodes of a lane over all its evaluations, which that choice costs.
        episodes, steps: fewest and most over lanes, at the last evaluation.
        budget: updates the runs were meant to do, 0 when unknown. `short`: lanes that have not got there.
        settled: the last k evaluations are at most half of all, so that they say something of the end of training.
    """

    method: str
    base: str
    dataset: str
    family: str
    scale: str
    last: Array
    average: Array
    best: Array
    online: int
    k: int
    seeds: list[int]
    episodes: tuple[int, int]
    steps: tuple[int, int]
    budget: int
    short: int
    enough_evaluations: bool
    curve: Curve
    published: list[Published]
    bold: bool = False

    @property
    def normalized(self) -> bool:
        return self.scale.endswith("score")

    @property
    def mean(self) -> float:
        return stats.mean_std(self.last)[0]

    @property
    def std(self) -> float:
        return stats.mean_std(self.last)[1]

    @property
    def interval(self) -> tuple[float, float]:
        return stats.t_interval(self.last)

    @property
    def difference(self) -> tuple[float, float]:
        """Ours minus the published mean, in points and in standard errors of the difference (NaN where unknown).

        The error is ours and theirs together where they gave deviation and seeds, else ours alone.
        """
        if not self.published:
            return math.nan, math.nan
        theirs = self.published[0]
        points = self.mean - theirs.mean
        error = math.hypot(self.std / math.sqrt(len(self.last)), theirs.standard_error)
        return points, points / error if error else math.nan

    @property
    def unstable(self) -> bool:
        """The last evaluation is no typical one: more than two standard deviations from the mean of the last k."""
        return self.enough_evaluations and abs(self.mean - stats.mean_std(self.average)[0]) > 2 * self.std

    @property
    def marks(self) -> str:
        return ("†" if self.short else "") + ("‡" if self.unstable else "")


@dataclass(frozen=True)
class Aggregate:
    """A method over the datasets of a family; `interval` is NaN when a dataset has a single seed."""

    family: str
    method: str
    datasets: list[str]
    seeds: int
    mean: float
    iqm: float
    interval: tuple[float, float]
    gap: float  # optimality gap: by how much runs fall short of 100


@dataclass(frozen=True)
class Tuning:
    """A method that was run with several settings: what choosing among them by online evaluations is worth.

    Attributes:
        where: a dataset, or a family: then each configuration was averaged over its datasets first.
        configurations: how many; a score of one is the mean over its seeds.
        best: k -> expected best of k configurations, and its deviation.
        bandit: single episodes spent on the policies of a dataset by UCB; None for a family.
        published: k -> what somebody published for a D4RL family, over a range of settings of their own.
    """

    where: str
    method: str
    configurations: int
    best: dict[int, tuple[float, float]]
    bandit: budget.BanditCurve | None
    published: dict[int, Published]


@dataclass(frozen=True)
class Comparison:
    """Method `better` (the higher IQM) against `other`, on the datasets that all methods of the family have."""

    family: str
    better: str
    other: str
    datasets: int
    seeds: int
    probability: float
    probability_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]

    @property
    def verdict(self) -> str:
        low, _ = self.difference_interval
        if not low > 0:
            return "no difference detected"
        return "higher" if self.seeds >= ENOUGH_SEEDS else f"higher, but fewer than {ENOUGH_SEEDS} seeds"


@dataclass
class Report:
    """What `report` found; `folder` holds the files named by `FILES`."""

    folder: Path
    cells: list[Cell]
    aggregates: list[Aggregate]
    comparisons: list[Comparison]
    tunings: list[Tuning]
    notes: list[str]


def count(number: float) -> str:
    """1000000 -> 1M, 20000 -> 20k, 500 -> 500."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:.0f}"
