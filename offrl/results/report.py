"""`report`: rows -> cells -> statistics -> files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from offrl import results
from offrl.results import figures, html, stats, tables
from offrl.results.aggregates import Report, profiles, summarise
from offrl.results.cells import METRICS, Cell, build
from offrl.results.finetuning import OnlineRow, collapsed, fine_tunings, read_online
from offrl.results.rows import folders, run_of, write_parquet
from offrl.results.style import save
from offrl.utils.errors import OffrlError, one_line
from offrl.utils.paths import replacing

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

T = TypeVar("T")

# Figure file (without .png): title. The profiles are drawn where a family has several datasets.
FIGURES = {
    "curves": "Learning curves",
    "online": "Fine-tuning",
    "scores": "Last scores",
    "profiles": "Performance profiles",
}
FILES = ("report.html", "report.md", "report.tex", "report.csv", "episodes.parquet", *(f"{f}.png" for f in FIGURES))


def report(
    paths: Iterable[Path | str], out: Path | str, last_k: int = 10, metric: str = "score", show: bool = True
) -> Report:
    """Make tables and figures of all runs in or below the given folders; damaged ones are left out and stand in `damage`.

    Args:
        paths: folders of runs, or folders with runs below them (a sweep).
        out: folder for the files (`FILES`).
        last_k: number of evaluations that the second score averages.
        metric: "score" (normalised where the dataset has reference returns, else the return), "return" or "length".
        show: whether to print the tables.

    Raises:
        OffrlError: no run with evaluations, or `out` cannot be written.
    """
    made, rows = summary(paths, out, last_k, metric)
    try:
        written = _write(made, rows)
    except OSError as error:
        raise OffrlError(f"{out} could not be written ({error.strerror or error}): choose another --out.") from error
    if show:
        show_tables(made)
        console = Console(markup=False, highlight=False, soft_wrap=True)
        console.print(f"Written to {made.folder}: {', '.join(written)}")
    return made


def summary(
    paths: Iterable[Path | str], out: Path | str, last_k: int = 10, metric: str = "score"
) -> tuple[Report, pl.DataFrame]:
    """Everything that `report` computes, and the rows behind it, without a file."""
    if metric not in METRICS:
        raise OffrlError(f"metric={metric} is unknown: use one of {', '.join(METRICS)}.")
    if last_k < 1:
        raise OffrlError(f"last_k={last_k} must be at least 1.")
    paths = [Path(path) for path in paths]
    runs, rows, online, damage = _readable(paths)
    if rows.is_empty() and damage:
        raise OffrlError(damage[0])
    if rows.is_empty():
        where = ", ".join(map(str, paths)) or "no folder"
        raise OffrlError(f"no run with an evaluation in {where}: give the folder of a run that has evaluated a policy.")
    cells, rows, notes = build(rows, runs, last_k, metric)
    notes += [f"Left out, damaged: {sentence}" for sentence in damage]
    tuned = fine_tunings(cells, rows, runs, online)
    made = summarise(Path(out), cells, rows, [*notes, *filter(None, [collapsed(tuned)])])
    return replace(made, fine_tunings=tuned, damage=damage), rows


def _readable(
    paths: Iterable[Path | str],
) -> tuple[list[results.Run], pl.DataFrame, dict[Path, list[OnlineRow]], list[str]]:
    """The runs whose files can be read, their rows, their online episodes by folder, and a sentence for each of the others."""
    import polars as pl

    found = [run_of(folder) for folder in folders(paths)]
    damage = [run.damage for run in found if run.damage]
    runs = [run for run in found if not run.damage]
    online = _unless_damaged(read_online, [run for run in runs if run.config.get("online")], damage)
    runs = [run for run in runs if run.folder in online or not run.config.get("online")]
    try:
        return runs, results.read([run.folder for run in runs]), online, damage  # all at once is much faster
    except OffrlError:
        rows = _unless_damaged(lambda folder: results.read([folder]), runs, damage)
    runs = [run for run in runs if run.folder in rows]
    return runs, pl.concat([results.read([]), *rows.values()]), online, damage


def _unless_damaged(reading: Callable[[Path], T], runs: Iterable[results.Run], damage: list[str]) -> dict[Path, T]:
    """What can be read of the runs, by folder; `damage` gets a sentence for each of the others."""
    found = {}
    for run in runs:
        try:
            found[run.folder] = reading(run.folder)
        except OffrlError as error:
            damage.append(str(error))
    return found


def show_tables(made: Report) -> None:
    """Print the tables, what their columns mean, and the notes."""
    console = Console()
    console.print(tables.introduction(made), markup=False, highlight=False)
    for table in tables.all_tables(made):
        console.print(tables.layout(table), soft_wrap=True)
    for line in tables.legend(made):
        console.print(line, style="dim", markup=False, highlight=False)
    for line in made.notes:
        console.print(line, markup=False, highlight=False)


# ---- files ---------------------------------------------------------------------------------------------------


def _write_rows(rows: pl.DataFrame, path: Path) -> None:
    import polars as pl

    try:
        write_parquet(rows, path)
    except pl.exceptions.PolarsError as error:  # a full disk, too
        raise OffrlError(
            f"{path} could not be written ({one_line(error)}); free some space or choose another --out."
        ) from error


def _write(made: Report, rows: pl.DataFrame) -> list[str]:
    """Write all files; their names. A figure of an earlier report that this one does not have is removed."""
    folder = made.folder
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "report.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        records = [_record(cell) for cell in made.cells]
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    _write_rows(_portable(rows), folder / "episodes.parquet")
    drawn = draw(made)
    for name in FIGURES:
        if name not in drawn:
            (folder / f"{name}.png").unlink(missing_ok=True)
            continue
        save(drawn[name], folder / f"{name}.png")
        drawn[name].set_layout_engine("none")  # the layout stands; computing it again for the page takes as long
    titled = {name: FIGURES[name] for name in drawn}
    notes = [*tables.legend(made), *made.notes, *tables.sources(made)]
    texts = {
        "report.md": tables.markdown(made, titled),
        "report.tex": tables.latex(made),
        "report.html": html.page(
            "Report",
            tables.full_tables(made),
            [(FIGURES[name], figure) for name, figure in drawn.items()],
            notes,
            tables.introduction(made),
        ),
    }
    for name, text in texts.items():
        with replacing(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    return [name for name in FILES if not name.endswith(".png") or name.removesuffix(".png") in drawn]


def draw(made: Report) -> dict[str, Figure]:
    """The figures of a report, by the names in `FIGURES`."""
    drawn = {"curves": figures.draw_curves(made.cells), "scores": figures.draw_scores(made.cells)}
    if made.fine_tunings:
        cells = [tuned.cell for tuned in made.fine_tunings]
        drawn["online"] = figures.draw_curves(cells, "environment steps (0: the switch from offline training)")
    if groups := profiles(made.cells):
        drawn["profiles"] = figures.draw_profiles(groups)
    return drawn


def _portable(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows behind the report, with folders relative to their common parent, so that the file can be handed on."""
    import polars as pl

    folders = [Path(folder) for folder in rows["folder"].unique()]
    top = os.path.commonpath([folder.parent for folder in folders])
    names = {str(folder): folder.relative_to(top).as_posix() for folder in folders}
    return rows.with_columns(pl.col("folder").replace(names)).drop("value", "scale")


def _record(cell: Cell) -> dict[str, Any]:
    """A line of report.csv: the cell with everything that makes it comparable."""
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
