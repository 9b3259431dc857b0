"""The figures of a report: learning curves, last scores, performance profiles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from offrl.results import stats
from offrl.results.cells import BOLD_SEEDS, Cell, count
from offrl.results.style import DOTTED, MARKS, band, grid, legend_above, looks_of, sheet, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE = 36  # letters above a panel; a longer id goes on below


def _looks(cells: list[Cell]) -> dict[str, tuple[str, Any]]:
    return looks_of(sorted({cell.method for cell in cells}))


def _legend_lines(looks: Mapping[str, tuple[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=colour, linestyle=style, linewidth=1.5) for colour, style in looks.values()]


def draw_curves(cells: list[Cell], of: str = "updates") -> Figure:
    """A panel per dataset: mean over seeds against updates (or what `of` says), with a band that the figure explains."""
    from matplotlib.lines import Line2D

    datasets = list(dict.fromkeys(cell.dataset for cell in cells))
    looks, scales = _looks(cells), {cell.scale for cell in cells}
    with grid(len(datasets), 3 if len(datasets) < 10 else 4) as (figure, panels, across):
        for dataset, panel in zip(datasets, panels):
            here = [cell for cell in cells if cell.dataset == dataset]
            for cell in here:
                _draw_curve(panel, cell, *looks[cell.method])
            published = [(c.published[0].mean, looks[c.method][0]) for c in here if c.published]
            for mean, colour in published:
                panel.axhline(mean, color=colour, linewidth=0.8, linestyle=DOTTED)
            _fit(panel, here, [mean for mean, _ in published])
            panel.set_title(textwrap.fill(dataset, _TITLE))
            tidy(panel)
            panel.xaxis.set_major_formatter(lambda x, _: count(x))
            if len(scales) > 1:
                panel.set_ylabel(", ".join(sorted({cell.scale for cell in here})))
        figure.supxlabel(f"{of}\n{_explained(cells)}", fontsize=8)
        if len(scales) == 1:
            figure.supylabel(scales.pop(), fontsize=8)
        lines, names = _legend_lines(looks), list(looks)
        if any(cell.published for cell in cells):
            lines.append(Line2D([], [], color="0.4", linewidth=0.8, linestyle=DOTTED))
            names.append("published")
        legend_above(figure, lines, names, across)
    return figure


def _draw_curve(panel: Axes, cell: Cell, colour: str, style: str) -> None:
    curve = cell.curve
    alone = MARKS[style] if len(curve.steps) == 1 else None
    panel.plot(curve.steps, curve.mean, color=colour, linestyle=style, linewidth=1.4, marker=alone, markersize=3)
    band(panel, curve.steps, *_band(cell), colour)


def _band(cell: Cell) -> tuple[Any, Any]:
    """The 95 % t interval of the mean; below five seeds, where that is wider than the figure, the seeds' range."""
    curve = cell.curve
    if len(cell.last) < BOLD_SEEDS:
        return curve.low, curve.high
    return curve.mean - curve.half_width, curve.mean + curve.half_width


def _explained(cells: list[Cell]) -> str:
    """What lines and bands are."""
    small = [len(cell.last) < BOLD_SEEDS for cell in cells]
    spread = "lowest to highest seed" if all(small) else "95 % interval of the mean"
    if any(small) and not all(small):
        spread += f"; with fewer than {BOLD_SEEDS} seeds the lowest to the highest"
    return f"Line: mean over seeds. Band: {spread}." if any(len(cell.last) > 1 for cell in cells) else "One seed each."


def _fit(panel: Axes, cells: list[Cell], lines: Sequence[float]) -> None:
    """Set the limits by the curves, their bands and the published numbers: nothing is cut off."""
    drawn = [array for cell in cells for array in (cell.curve.mean, *_band(cell))]
    values = np.concatenate([*drawn, np.asarray(lines)])
    values = values[np.isfinite(values)]
    if values.size:
        margin = 0.06 * (values.max() - values.min()) or 1.0  # all the same: not a scale of rounding errors
        panel.set_ylim(values.min() - margin, values.max() + margin)


def draw_scores(cells: list[Cell]) -> Figure:
    """Last scores: mean with its 95 % t interval, seeds as faint dots below, published numbers as hollow diamonds."""
    from matplotlib.lines import Line2D

    looks = _looks(cells)
    # One axis per scale; raw returns of different datasets have nothing in common.
    axes: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        axes.setdefault((cell.scale, "" if cell.normalized else cell.dataset), []).append(cell)
    heights = [0.35 + 0.17 * len(group) + 0.12 * len({c.dataset for c in group}) for group in axes.values()]
    size = 5.6, sum(heights) + 0.35 * len(heights) + 0.3
    with sheet(len(axes), 1, size, gridspec_kw={"height_ratios": heights}) as (figure, panels):
        for ((scale, _), group), panel in zip(axes.items(), panels.ravel()):
            _draw_points(panel, group, looks)
            panel.set_xlabel(scale)
            tidy(panel, grid="x")
        figure.supxlabel("Mark: mean over seeds. Line: its 95 % interval. Faint dots: the seeds.", fontsize=7)
        marks, names = _legend_lines(looks), list(looks)
        for mark, (_, style) in zip(marks, looks.values()):
            mark.set(linestyle="-", marker=MARKS[style], markersize=4)
        if any(cell.published for cell in cells):
            marks.append(Line2D([], [], color="0.4", marker="D", markersize=4, markerfacecolor="white", linestyle=""))
            names.append("published")
        legend_above(figure, marks, names, 2)
    return figure


def _draw_points(panel: Axes, cells: list[Cell], looks: Mapping[str, tuple[str, str]]) -> None:
    position, ticks, names = 0.0, [], []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        here = [cell for cell in cells if cell.dataset == dataset]
        ticks.append(position + (len(here) - 1) / 2)
        names.append(dataset)
        for cell in here:
            colour, line = looks[cell.method]
            below = np.full(len(cell.last), position + 0.3)
            panel.plot(cell.last, below, "o", color=colour, markersize=2.5, alpha=0.35, mew=0)
            if not math.isnan(cell.interval[0]):
                panel.plot(cell.interval, [position, position], color=colour, linewidth=1.5, solid_capstyle="butt")
            panel.plot(cell.mean, position, MARKS[line], color=colour, markersize=4.5)
            if cell.published:
                style: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": colour, "markersize": 4.5}
                panel.plot(cell.published[0].mean, position, "D", **style)
            position += 1
        position += 0.7
    panel.set_yticks(ticks, names)
    panel.set_ylim(position - 0.9, -0.8)  # the first on top
    panel.tick_params(axis="y", length=0)


def draw_profiles(groups: Mapping[str, Mapping[str, Sequence[Any]]]) -> Figure:
    """A panel per family: share of runs with a score above tau, mean over datasets, with a stratified bootstrap band.

    Args:
        groups: family -> method -> scores `[S]` per dataset.
    """
    methods = sorted({method for group in groups.values() for method in group})
    looks = looks_of(methods)
    with grid(len(groups)) as (figure, panels, across):
        for (family, group), panel in zip(groups.items(), panels):
            pooled = np.concatenate([scores for tasks in group.values() for scores in tasks])
            margin = 0.05 * (pooled.max() - pooled.min()) + 1e-9
            tau = np.linspace(pooled.min() - margin, pooled.max() + margin, 101)
            for method, tasks in group.items():
                colour, style = looks[method]
                panel.plot(tau, stats.performance_profile(tasks, tau), color=colour, linestyle=style, linewidth=1.4)
                if min(map(len, tasks)) > 1:
                    band(panel, tau, *stats.profile_band(tasks, tau), colour)
            panel.set(title=family, xlabel="score tau", ylabel="share of runs above tau", ylim=(-0.02, 1.02))
            tidy(panel)
        legend_above(figure, _legend_lines(looks), methods, across)
    return figure
