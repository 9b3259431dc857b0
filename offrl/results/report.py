"""Tables, statistics and figures as a function of the rows that runs leave behind.

A cell is a method on a dataset: the scores of its lanes (training seeds) at the last evaluation, each a mean over episodes.
The last checkpoint needs no online information to be chosen; the best one would, and is never reported.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from offrl import results
from offrl.results import budget, figures, stats, tables
from offrl.results import html as page
from offrl.results.cells import FIGURES, FILES, METRICS, Aggregate, Cell, Comparison, Curve, Report, Tuning
from offrl.results.labels import _method, label_lanes, scale_of
from offrl.results.published import Published, lookup, lookup_tuned
from offrl.results.stats import Array
from offrl.utils.errors import OffrlError
from offrl.utils.paths import replacing

if TYPE_CHECKING:
    import polars as pl

# ---- what a report holds -------------------------------------------------------------------------------------


def report(
    paths: Iterable[Path | str], out: Path | str, last_k: int = 10, metric: str = "score", show: bool = True
) -> Report:
    """Make tables and figures of all runs in or below the given folders.

    Args:
        paths: folders of runs, or folders with runs below them (a sweep).
        out: folder for the files named by `FILES`.
        last_k: how many of the last evaluations the second score averages.
        metric: "score" (normalised where the dataset has reference returns, else the return), "return" or "length".
        show: print the tables.

    Runs of a method that differ in a setting are shown apart, labelled by what differs. The same seed of the same settings
    counts once.

    Raises:
        OffrlError: no run with evaluations, a damaged file, or `out` can't be written.
    """
    if metric not in METRICS:
        raise OffrlError(f"metric={metric} is unknown: use one of {', '.join(METRICS)}.")
    if last_k < 1:
        raise OffrlError(f"last_k={last_k} must be at least 1.")
    paths = [Path(path) for path in paths]
    runs = results.runs(paths)
    rows = results.read(paths)
    if rows.is_empty():
        where = ", ".join(map(str, paths)) or "no folder"
        raise OffrlError(f"no run with an evaluation in {where}: give the folder of a run that has evaluated a policy.")
    rows, notes = _prepare(rows, runs, metric)
    cells = _cells(rows, runs, last_k)
    _mark_best(cells)
    made = Report(Path(out), cells, _aggregates(cells), _comparisons(cells), _tunings(cells, rows), notes)
    try:
        _write(made, rows)
    except OSError as error:
        raise OffrlError(f"{out} could not be written ({error.strerror or error}): choose another --out.") from error
    if show:
        show_tables(made)
    return made


def show_tables(made: Report) -> None:
    """Print the tables."""
    console = Console()
    for table in tables.all_tables(made):
        console.print(tables.layout(table), soft_wrap=True)
    for line in [*tables.legend(made), *made.notes]:
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(f"Written to {made.folder}: {', '.join(FILES)}", markup=False, highlight=False, soft_wrap=True)


# ---- rows to cells -------------------------------------------------------------------------------------------


def _prepare(rows: pl.DataFrame, runs: list[results.Run], metric: str) -> tuple[pl.DataFrame, list[str]]:
    """Rows with `label`, `value` and `scale`, repeated seeds left out; and what a reader should know of it."""
    import polars as pl

    notes = []
    seen = set(rows["folder"].unique())
    empty = [run.folder.name for run in runs if str(run.folder) not in seen]
    if empty:
        notes.append(f"Left out, no evaluation yet: {_enumerate(empty)}.")
    rows = rows.join(label_lanes(rows, runs), on=["folder", "lane"], how="left")
    if metric == "score":
        # A dataset is on the normalised scale only when all of its rows are.
        unscored = rows.filter(pl.col("normalized").is_null() & pl.col("return_raw").is_not_nan())["dataset"].unique()
        scales = {name: "return" if name in unscored else scale_of(name) for name in rows["dataset"].unique()}
        score = pl.col("normalized").fill_null(math.nan)
        rows = rows.with_columns(scale=pl.col("dataset").replace_strict(scales)).with_columns(
            value=pl.when(pl.col("scale") == "return").then("return_raw").otherwise(score)
        )
    else:
        column = "return_raw" if metric == "return" else "length"
        rows = rows.with_columns(value=pl.col(column).cast(pl.Float64), scale=pl.lit(metric))
    rows, repeated = _without_repeated_seeds(rows)
    if repeated:
        notes.append(
            f"Left out, same settings and seed as another run that got at least as far: {_enumerate(repeated)}."
        )
    return rows, notes


def _without_repeated_seeds(rows: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """A seed that was run twice is no second sample: keep the run that got further (else the later folder)."""
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


def _cells(rows: pl.DataFrame, runs: list[results.Run], last_k: int) -> list[Cell]:
    import polars as pl

    by_folder = {str(run.folder): run for run in runs}
    evaluations = (
        rows.group_by("label", "dataset", "folder", "lane", "seed", "step")
        .agg(pl.col("value").mean(), pl.col("scale", "base").first(), episodes=pl.len())
        .sort("seed", "folder", "lane", "step")
    )
    cells = []
    for (label, dataset), group in sorted(evaluations.partition_by(["label", "dataset"], as_dict=True).items()):
        lanes = group.group_by("folder", "lane", "seed", maintain_order=True).agg(
            pl.col("scale", "value", "step", "episodes").last(),
            average=pl.col("value").tail(last_k).mean(),
            best=pl.col("value").max(),
            online=pl.col("episodes").sum(),
            k=pl.col("value").tail(last_k).len(),
            evaluations=pl.len(),
        )
        here = [by_folder[folder] for folder in lanes["folder"]]
        budgets = [int(run.config.get("updates") or 0) for run in here]
        k, average = int(lanes["k"].to_numpy().min()), lanes["average"].to_numpy()
        normalized = lanes["scale"][0].endswith("score")
        cells.append(
            Cell(
                method=label,
                dataset=dataset,
                family=str(dict(here[0].manifest.get("dataset_info") or {}).get("family", "other")),
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
                budget=max(budgets),
                short=sum(step < budget for step, budget in zip(lanes["step"], budgets)),
                enough_evaluations=int(lanes["evaluations"].to_numpy().min()) >= 2 * k,
                curve=_curve(group),
                published=lookup(_method(here[0]) or label, dataset) if normalized else [],
            )
        )
    # Without the version, so that hopper-medium stands before hopper-medium-replay.
    return sorted(cells, key=lambda cell: (cell.family, re.sub(r"-v\d+$", "", cell.dataset), cell.dataset, cell.method))


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
    """Bold: entries whose interval overlaps that of the dataset's best mean; none where it has nothing to overlap."""
    for dataset in {cell.dataset for cell in cells}:
        rivals = [cell for cell in cells if cell.dataset == dataset and not math.isnan(cell.mean)]
        if len(rivals) < 2 or rivals[0].scale == "length":
            continue
        best = max(rivals, key=lambda cell: cell.mean)
        for cell in rivals:
            cell.bold = cell.interval[1] >= best.interval[0]  # False when either is NaN


def _enumerate(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- methods and settings -----------------------------------------------------------------------------

# ---- several datasets ----------------------------------------------------------------------------------------


def _groups(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Normalised cells by family, and all of one scale together where it has several families."""
    families: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        if cell.normalized:
            families.setdefault(cell.scale, {}).setdefault(cell.family, []).append(cell)
    groups: dict[str, list[Cell]] = {}
    for scale, found in families.items():
        collection = scale.partition("-")[0]
        groups |= {name if len(families) == 1 else f"{collection} {name}": group for name, group in found.items()}
        if len(found) > 1:
            groups[f"all {collection}"] = [cell for group in found.values() for cell in group]
    return groups


def _by_method(cells: list[Cell]) -> dict[str, dict[str, Array]]:
    scores: dict[str, dict[str, Array]] = {}
    for cell in cells:
        scores.setdefault(cell.method, {})[cell.dataset] = cell.last
    return scores


def _fewest_seeds(*methods: Sequence[Array]) -> int:
    return min(len(runs) for tasks in methods for runs in tasks)


def _aggregates(cells: list[Cell]) -> list[Aggregate]:
    made = []
    for family, group in _groups(cells).items():
        for method, scores in sorted(_by_method(group).items()):
            if len(scores) < 2:
                continue
            tasks = list(scores.values())
            seeds = _fewest_seeds(tasks)
            interval = stats.stratified_bootstrap(stats.iqm, tasks) if seeds > 1 else (math.nan, math.nan)
            mean, middle, gap = (float(f(tasks)) for f in (stats.task_mean, stats.iqm, stats.optimality_gap))
            made.append(Aggregate(family, method, sorted(scores), seeds, mean, middle, interval, gap))
    return made


def _comparisons(cells: list[Cell]) -> list[Comparison]:
    """The method with the highest IQM of a family against every other, on the datasets that all of them have."""
    made = []
    for family, group in _groups(cells).items():
        methods = {method: scores for method, scores in _by_method(group).items() if len(scores) > 1}
        common = sorted(set.intersection(*(set(scores) for scores in methods.values()))) if methods else []
        tasks = {method: [scores[dataset] for dataset in common] for method, scores in methods.items()}
        if len(methods) < 2 or len(common) < 2 or _fewest_seeds(*tasks.values()) < 2:
            continue
        best = max(tasks, key=lambda method: float(stats.iqm(tasks[method])))
        made += [_compare(family, best, other, tasks[best], tasks[other]) for other in sorted(tasks.keys() - {best})]
    return made


def _compare(family: str, better: str, other: str, x: list[Array], y: list[Array]) -> Comparison:
    def difference(x: stats.Tasks, y: stats.Tasks) -> Array:
        return stats.iqm(x) - stats.iqm(y)

    return Comparison(
        family=family,
        better=better,
        other=other,
        datasets=len(x),
        seeds=_fewest_seeds(x, y),
        probability=float(stats.probability_of_improvement(x, y)),
        probability_interval=stats.stratified_bootstrap(stats.probability_of_improvement, x, y),
        difference=float(difference(x, y)),
        difference_interval=stats.stratified_bootstrap(difference, x, y),
    )


def _tunings(cells: list[Cell], rows: pl.DataFrame) -> list[Tuning]:
    """Of every method that has several settings: per dataset, and per family on the settings that all its datasets have."""
    made = []
    variants: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if not math.isnan(cell.mean) and cell.scale != "length":
            variants.setdefault((cell.dataset, cell.base), []).append(cell)
    for (dataset, base), here in variants.items():
        if len(here) > 1:
            episodes = _last_episodes(rows, dataset, [cell.method for cell in here])
            made.append(_tuning(dataset, base, [cell.mean for cell in here], budget.bandit_curve(episodes)))
    for family, group in _groups(cells).items():
        for base in sorted({cell.base for cell in group}):
            scores = _by_method([cell for cell in group if cell.base == base])
            datasets = {dataset for found in scores.values() for dataset in found}
            means = [
                np.mean([s.mean() for s in found.values()]) for found in scores.values() if found.keys() == datasets
            ]
            if len(means) > 1 and len(datasets) > 1:
                plain = {cell.family for cell in group if cell.scale.startswith("D4RL")}
                published = lookup_tuned(base, plain.pop()) if len(plain) == 1 else {}
                made.append(_tuning(family, base, means, None, published))
    return made


def _tuning(
    where: str,
    method: str,
    means: Sequence[Any],
    bandit: budget.BanditCurve | None,
    published: Mapping[int, Published] | None = None,
) -> Tuning:
    ks = [k for k in budget.KS if k <= len(means)]
    best = {k: (float(mean), float(std)) for k, mean, std in zip(ks, *budget.expected_best(means, ks))}
    return Tuning(where, method, len(means), best, bandit, dict(published or {}))


def _last_episodes(rows: pl.DataFrame, dataset: str, methods: Sequence[str]) -> list[Array]:
    """Scores of each lane's last evaluation, one array a lane."""
    import polars as pl

    mine = rows.filter(pl.col("dataset") == dataset, pl.col("label").is_in(methods), pl.col("value").is_not_nan())
    last = mine.filter(pl.col("step") == pl.col("step").max().over("folder", "lane"))
    return [group["value"].to_numpy() for _, group in last.group_by("folder", "lane", maintain_order=True)]


# ---- files ---------------------------------------------------------------------------------------------------


def _write(report: Report, rows: pl.DataFrame) -> None:
    report.folder.mkdir(parents=True, exist_ok=True)
    with replacing(report.folder / "report.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        records = [_record(cell) for cell in report.cells]
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    with replacing(report.folder / "report.md") as path:
        path.write_text(tables.markdown(report), encoding="utf-8")
    with replacing(report.folder / "report.tex") as path:
        path.write_text(tables.latex(report), encoding="utf-8")
    with replacing(report.folder / "episodes.parquet") as path:
        _portable(rows).write_parquet(path, compression="zstd")
    drawn = [
        figures.draw_curves(report.cells),
        figures.draw_scores(report.cells),
        figures.draw_profiles(_profiles(report.cells)),
    ]
    for name, figure in zip(FIGURES, drawn):
        with replacing(report.folder / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=200)
        figure.set_layout_engine("none")  # as it lies now; finding that again for the page would take as long
    titles = ("Learning curves", "Last scores", "Performance profiles")
    notes = [*tables.legend(report), *report.notes, *tables.sources(report)]
    with replacing(report.folder / "report.html") as path:
        text = page.page("Report", tables.full_tables(report), list(zip(titles, drawn)), notes)
        path.write_text(text, encoding="utf-8")


def _profiles(cells: list[Cell]) -> dict[str, dict[str, list[Array]]]:
    """Scores by family and method, on the datasets that all methods of the family have."""
    made = {}
    for family, group in _groups(cells).items():
        methods = _by_method(group)
        common = set.intersection(*(set(scores) for scores in methods.values()))
        if common:
            made[family] = {m: [scores[dataset] for dataset in sorted(common)] for m, scores in methods.items()}
    return made


def _portable(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows behind the report, with folders relative to what they have in common: it may be handed on."""
    import polars as pl

    folders = [Path(folder) for folder in rows["folder"].unique()]
    top = os.path.commonpath([folder.parent for folder in folders])
    names = {str(folder): folder.relative_to(top).as_posix() for folder in folders}
    return rows.with_columns(pl.col("folder").replace(names)).drop("value", "scale")


def _record(cell: Cell) -> dict[str, Any]:
    """A line of report.csv: the cell with all that makes it comparable."""
    first = cell.published[0] if cell.published else None
    average_mean, average_std = stats.mean_std(cell.average)
    record = {
        "dataset": cell.dataset,
        "method": cell.method,
        "family": cell.family,
        "scale": cell.scale,
        "checkpoint": "last",
        "mean": cell.mean,
        "std_ddof1": cell.std,
        "t95_low": cell.interval[0],
        "t95_high": cell.interval[1],
        "mean_last_k": average_mean,
        "std_last_k": average_std,
        "best_mean": float(cell.best.mean()),
        "best_online_selected": True,
        "best_online_episodes": cell.online,
        "k": cell.k,
        "seeds": len(cell.seeds),
        "seed_list": " ".join(map(str, cell.seeds)),
        "episodes_min": cell.episodes[0],
        "episodes_max": cell.episodes[1],
        "updates_min": cell.steps[0],
        "updates_max": cell.steps[1],
        "budget": cell.budget,
        "seeds_short_of_budget": cell.short,
        "unstable": cell.unstable,
        "overlaps_best": cell.bold,
        "published_mean": first and first.mean,
        "published_std": first and first.std,
        "published_seeds": first and first.seeds,
        "published_difference": cell.difference[0],
        "published_difference_se": cell.difference[1],
        "published_protocol": first and first.protocol,
        "published_source": first and first.source,
    }
    return {k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v for k, v in record.items()}


# ---- command -------------------------------------------------------------------------------------------------
