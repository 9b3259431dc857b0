"""Cells: a method on a dataset, built from the rows that runs leave behind.

A cell holds the scores of its lanes (training seeds) at the last evaluation, each a mean over episodes. The last checkpoint is
known without online information; the best one is not, so it is never the reported one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offrl import results
from offrl.results import stats
from offrl.results.labels import OWN, SUCCESS, _method, given_task, is_usual, label_lanes, scale_of
from offrl.results.published import Published, lookup
from offrl.results.rows import ConfigRecord
from offrl.results.stats import Array

if TYPE_CHECKING:
    import polars as pl

METRICS = ("score", "return", "length")
OGBENCH_K = 3  # evaluations that OGBench's protocol averages: at 800k, 900k and 1M updates
BOLD_SEEDS = 5  # seeds below which an interval is too wide to mark a cell by


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
        method: label with the settings that tell variants of a method apart; `base`: label without them.
        family: family of the dataset. scale: unit of all scores.
        last, average: `[S]` score at the last evaluation and mean over the last `k` evaluations, one per lane.
        spans: smallest and largest number of updates, over lanes, from the first to the last of the last k evaluations.
        best: `[S]` best evaluation of each lane. It is selected by online scores, so it is no final number.
        online: episodes of a lane over all its evaluations, the price of that selection.
        episodes, steps: smallest and largest number over lanes, at the last evaluation.
        budget: configured updates, 0 when unknown. short: number of lanes that have made fewer.
        critic: whether the agent learns a critic.
        comparable: whether the scores are of the dataset's own task and references, as published ones are.
        enough_evaluations: whether the last k evaluations are at most half of all, so that they describe the end of training.
        successes, trials: successful episodes, and all, of all lanes at their last evaluation; successes is None where scores
            are no success rates, or one is not finite.
        bold: whether the interval overlaps that of the dataset's best mean.
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
    spans: tuple[int, int]
    budget: int
    short: int
    critic: bool
    comparable: bool
    enough_evaluations: bool
    curve: Curve
    published: list[Published]
    successes: int | None = None
    trials: int = 0
    bold: bool = False

    @property
    def normalized(self) -> bool:
        return self.scale.endswith("score") or self.scale == SUCCESS

    @property
    def reported(self) -> Array:
        """`[S]` the scores that stand beside published ones: OGBench's protocol takes the mean of the last evaluations."""
        return self.average if self.scale == SUCCESS else self.last

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
        """Our mean minus the published one, in points and in standard errors of the difference (NaN where unknown).

        The standard error combines ours and theirs where they give std and seeds; otherwise it is ours alone.
        """
        if not self.published:
            return math.nan, math.nan
        theirs = self.published[0]
        mean, std = stats.mean_std(self.reported)
        points = mean - theirs.mean
        error = math.hypot(std / math.sqrt(len(self.last)), theirs.standard_error)
        return points, points / error if error else math.nan

    @property
    def unstable(self) -> bool:
        """Whether the last evaluation is untypical: more than two standard deviations from the mean of the last k."""
        return self.enough_evaluations and abs(self.mean - stats.mean_std(self.average)[0]) > 2 * self.std

    @property
    def marks(self) -> str:
        return ("†" if self.short else "") + ("‡" if self.unstable else "")


def count(number: float) -> str:
    """1000000 -> 1M, 20000 -> 20k, 500 -> 500."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:.0f}"


# ---- from rows to cells ----------------------------------------------------------------------------------------


def build(
    rows: pl.DataFrame, runs: list[results.Run], last_k: int = 10, metric: str = "score"
) -> tuple[list[Cell], pl.DataFrame, list[str]]:
    """All cells of the given rows and runs, the rows behind them, and notes on what was left out.

    Args:
        last_k: number of evaluations that the second score averages.
        metric: one of `METRICS`.

    Runs of a method that differ in a setting are different methods, labelled by that setting. The same seed of the same
    settings counts once.
    """
    notes = []
    seen = set(rows["folder"].unique())
    if empty := [run.folder.name for run in runs if str(run.folder) not in seen]:
        notes.append(f"Left out, no evaluation yet: {_enumerate(empty)}.")
    rows, elsewhere = _in_one_environment(rows)
    if elsewhere:
        notes.append(f"Left out, evaluations in another environment than a run's last: {_enumerate(elsewhere)}.")
    rows, repeated = _without_repeated_seeds(scored(rows, runs, metric))
    if repeated:
        notes.append(
            f"Left out, same settings and seed as another run that got at least as far: {_enumerate(repeated)}."
        )
    notes += _different_data(rows, runs)
    cells = _cells(rows, runs, last_k)
    _mark_best(cells)
    return cells, rows, [*notes, *_not_finite(cells), *_different_spans(cells)]


def scored(rows: pl.DataFrame, runs: list[results.Run], metric: str = "score") -> pl.DataFrame:
    """The rows with their `label`, `base`, `value` and `scale`.

    A dataset has normalised scores only if all of its rows have them; otherwise its values are returns. The scores of a run
    that was given references are its own, whatever its dataset.
    """
    import polars as pl

    rows = rows.join(label_lanes(rows, runs), on=["folder", "lane", "dataset"], how="left")
    if metric != "score":
        column = "return_raw" if metric == "return" else "length"
        return rows.with_columns(value=pl.col(column).cast(pl.Float64), scale=pl.lit(metric))
    unscored = rows.filter(pl.col("normalized").is_null() & pl.col("return_raw").is_not_nan())["dataset"].unique()
    scales = {name: "return" if name in unscored else scale_of(name) for name in rows["dataset"].unique()}
    score = pl.col("normalized").fill_null(math.nan)
    own = [str(run.folder) for run in runs if not {"ref_min", "ref_max"}.isdisjoint(given_task(run))]
    scale = pl.col("dataset").replace_strict(scales, return_dtype=pl.String)
    scale = pl.when(pl.col("folder").is_in(own), ~scale.is_in(["return", SUCCESS])).then(pl.lit(OWN)).otherwise(scale)
    return rows.with_columns(scale=scale).with_columns(
        value=pl.when(pl.col("scale") == "return").then("return_raw").otherwise(score)
    )


def _in_one_environment(rows: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Rows without those of a run that went on in another environment: its last k and its curve are of one alone."""
    import polars as pl

    ends = rows.filter(pl.col("env_id").is_not_null()).sort("step", maintain_order=True)
    last = ends.group_by("folder", "lane", "dataset").agg(pl.col("env_id").last().alias("last_env"))
    joined = rows.join(last, on=["folder", "lane", "dataset"], how="left", maintain_order="left")
    other = pl.col("env_id").is_not_null() & (pl.col("env_id") != pl.col("last_env"))
    names = sorted(
        f"{Path(folder).name} ({env})" for folder, env in joined.filter(other)["folder", "env_id"].unique().iter_rows()
    )
    return (joined.filter(~other) if names else joined).drop("last_env"), names


def _without_repeated_seeds(rows: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Rows without repeated seeds, which are no second samples: the run that got further stays (else the later folder)."""
    import polars as pl

    lane = ["folder", "lane"]
    cell = ["label", "dataset", "seed"]
    lanes = rows.group_by(*lane, *cell).agg(pl.col("step").max(), pl.len())
    lanes = lanes.sort("step", "len", "folder", "lane", descending=True)
    kept = lanes.unique(cell, keep="first", maintain_order=True)
    if len(kept) == len(lanes):
        return rows, []
    dropped = lanes.join(kept, on=[*lane, *cell], how="anti").group_by("folder").agg(pl.col("seed").sort())
    names = [f"{Path(folder).name} (seeds {', '.join(map(str, seeds))})" for folder, seeds in dropped.iter_rows()]
    return rows.join(kept, on=[*lane, *cell], how="semi"), sorted(names)


def _different_data(rows: pl.DataFrame, runs: list[results.Run]) -> list[str]:
    """A sentence for each dataset of which the same name and settings stood for different numbers."""
    by_folder = {str(run.folder): run for run in runs}
    methods: dict[tuple[str, str], dict[str, set[str]]] = {}
    for dataset, folder, label in rows.select("dataset", "folder", "label").unique().iter_rows():
        run = by_folder[folder]
        if isinstance(fingerprint := run.manifest.get("fingerprint"), str):
            options = (run.config.get("data") or {}).items()
            settings = {key: value for key, value in options if not is_usual(f"data.{key}", value) and key != "cache"}
            key = (dataset, json.dumps(settings, sort_keys=True))
            methods.setdefault(key, {}).setdefault(fingerprint, set()).add(label)
    return [
        f"{dataset}: these runs were not trained on the same numbers, though the dataset has the same name in all: "
        + "; ".join(
            f"{', '.join(sorted(found))} (fingerprint {fingerprint[:8]})" for fingerprint, found in sorted(sets.items())
        )
        + ". Files of that name differ, or it was built on machines that round differently."
        for (dataset, _), sets in sorted(methods.items())
        if len(sets) > 1
    ]


def _not_finite(cells: Sequence[Cell]) -> list[str]:
    """A sentence where cells have no mean, since an episode's return was not finite."""
    found = []
    for cell in cells:
        if seeds := [str(seed) for seed, score in zip(cell.seeds, cell.last) if math.isnan(score)]:
            found.append(f"{cell.method} on {cell.dataset} (seeds {', '.join(seeds)})")
    if not found:
        return []
    return [
        f"Not finite: the last score of {_enumerate(found)}. Such a cell has no mean, and comparisons and profiles leave out "
        "its method."
    ]


def _different_spans(cells: Sequence[Cell]) -> list[str]:
    """A sentence where the means of the last evaluations are of different stretches of training, by lane."""
    found = [
        f"{cell.method} on {cell.dataset} ({count(low)} to {count(high)} updates)"
        for cell in cells
        for low, high in [cell.spans]
        if low < high
    ]
    if not found:
        return []
    return [
        "By seed, the last evaluations lie over stretches of different length, since the runs were evaluated at other "
        f"intervals or have not all got as far: {_enumerate(found)}. Means of them are no means of one thing."
    ]


def _cells(rows: pl.DataFrame, runs: list[results.Run], last_k: int) -> list[Cell]:
    import polars as pl

    by_folder = {str(run.folder): run for run in runs}
    learns_critic = {folder: results.has_critic(by_folder[folder]) for folder in rows["folder"].unique()}
    evaluations = (
        rows.group_by("label", "dataset", "folder", "lane", "seed", "step")
        .agg(pl.col("value").mean(), pl.col("scale", "base").first(), episodes=pl.len())
        .sort("seed", "folder", "lane", "step")
    )
    families = {
        dataset: family
        for dataset, folder in rows.select("dataset", "folder").unique().sort("folder").iter_rows()
        if (family := _family(by_folder[folder]))
    }
    cells = []
    for (label, dataset), group in sorted(evaluations.partition_by(["label", "dataset"], as_dict=True).items()):
        success = group["scale"][0] == SUCCESS
        last = min(last_k, OGBENCH_K) if success else last_k
        lanes = group.group_by("folder", "lane", "seed", maintain_order=True).agg(
            pl.col("scale", "value", "step", "episodes").last(),
            average=pl.col("value").tail(last).mean(),
            best=pl.col("value").max(),
            online=pl.col("episodes").sum(),
            k=pl.col("value").tail(last).len(),
            span=pl.col("step").last() - pl.col("step").tail(last).first(),
            evaluations=pl.len(),
        )
        here = [by_folder[folder] for folder in lanes["folder"]]
        budgets = [ConfigRecord.model_validate(run.config).budget for run in here]
        k, average = int(lanes["k"].to_numpy().min()), lanes["average"].to_numpy()
        of_dataset = not any(given_task(run) for run in here)  # no published score is of another task
        comparable = of_dataset and (success or (lanes["scale"][0].endswith("score") and lanes["scale"][0] != OWN))
        finite = not np.isnan(lanes["value"].to_numpy()).any()
        cells.append(
            Cell(
                method=label,
                dataset=dataset,
                family=_family(here[0]) or families.get(dataset, "other"),
                base=group["base"][0],
                scale=lanes["scale"][0],
                best=lanes["best"].to_numpy(),
                online=int(lanes["online"].to_numpy().max()),
                last=lanes["value"].to_numpy(),
                average=average,
                k=k,
                seeds=lanes["seed"].to_list(),
                episodes=_range(lanes["episodes"]),
                steps=_range(lanes["step"]),
                spans=_range(lanes["span"]),
                budget=max(budgets),
                short=sum(step < budget for step, budget in zip(lanes["step"], budgets)),
                critic=any(learns_critic[str(run.folder)] for run in here),
                enough_evaluations=int(lanes["evaluations"].to_numpy().min()) >= 2 * k,
                curve=_curve(group),
                comparable=comparable,
                published=lookup(_method(here[0]) or label, dataset) if comparable else [],
                successes=round(float((lanes["value"] * lanes["episodes"]).sum()) / 100)
                if success and finite
                else None,
                trials=int(lanes["episodes"].sum()),
            )
        )
    # Without the version, so that hopper-medium stands before hopper-medium-replay.
    return sorted(cells, key=lambda cell: (cell.family, re.sub(r"-v\d+$", "", cell.dataset), cell.dataset, cell.method))


def _family(run: results.Run) -> str | None:
    """The family of a run's dataset; None of a run of an earlier version."""
    family: str | None = (run.manifest.get("dataset_info") or {}).get("family")
    return family


def _curve(evaluations: pl.DataFrame) -> Curve:
    import polars as pl

    steps = (
        evaluations.group_by("step")
        .agg(
            pl.len(),
            mean=pl.col("value").mean(),
            std=pl.col("value").std(ddof=1),
            low=pl.col("value").min(),
            high=pl.col("value").max(),
        )
        .sort("step")
    )
    # Where most lanes have no evaluation (one of them got further than the rest) a mean would be another curve's.
    steps = steps.filter(2 * pl.col("len") >= pl.col("len").max())
    half = stats.t_half_width(steps["std"].cast(pl.Float64).to_numpy(), steps["len"].to_numpy())
    column = {name: steps[name].cast(pl.Float64).to_numpy() for name in ("step", "mean", "low", "high")}
    return Curve(column["step"], column["mean"], half, column["low"], column["high"])


def _range(column: pl.Series) -> tuple[int, int]:
    values = column.to_numpy()
    return int(values.min()), int(values.max())


def _mark_best(cells: list[Cell]) -> None:
    """Set `bold` where the interval overlaps that of the dataset's best mean, both of at least `BOLD_SEEDS` seeds."""
    for dataset, scale in {(cell.dataset, cell.scale) for cell in cells}:
        rivals = [c for c in cells if (c.dataset, c.scale) == (dataset, scale) and not math.isnan(c.mean)]
        if len(rivals) < 2 or scale == "length":
            continue
        best = max(rivals, key=lambda cell: cell.mean)
        if len(best.last) < BOLD_SEEDS:
            continue
        for cell in rivals:
            cell.bold = len(cell.last) >= BOLD_SEEDS and cell.interval[1] >= best.interval[0]


def _enumerate(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
