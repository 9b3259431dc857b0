"""One style for all figures: colours, fonts, sheets of panels, legends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offrl.utils.paths import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart; after eight methods line style and marker change.
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY, BLACK = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#000000",
)
MARKS = {"-": "o", "--": "s", ":": "^", "-.": "v"}  # marker of a mean, by line style
DOTTED = (0, (1, 2))  # line style of references
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def looks_of(methods: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Colour and line style of each method."""
    return {m: (COLOURS[i % 8], tuple(MARKS)[i // 8 % 4]) for i, m in enumerate(methods)}


@contextmanager
def sheet(
    down: int, across: int, size: tuple[float, float], rc: dict[Any, Any] = RC, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A new figure of `size` inches and its panels, an array `[down, across]`; draw inside the `with`.

    Args:
        rc: settings of Matplotlib.
        options: options of `Figure.subplots`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(rc):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(down, across, squeeze=False, **options)


@contextmanager
def grid(count: int, widest: int = 3) -> Iterator[tuple[Figure, Any, int]]:
    """A new figure, `count` panels of one size as a flat array, and how many stand in a row (at most `widest`)."""
    across = min(max(count, 1), widest)
    down = max(1, math.ceil(count / across))
    with sheet(down, across, (max(3.1 * across, 4.2), 2.35 * down)) as (figure, panels):
        for panel in panels.ravel()[count:]:
            panel.set_visible(False)
        yield figure, panels.ravel()[:count], across


def tidy(panel: Axes, grid: str = "y") -> None:
    """No frame at the top and right; pale grid lines of the axis `grid` behind the data."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=grid, color="0.9", linewidth=0.6)  # type: ignore[arg-type]
    panel.set_axisbelow(True)


def label(panel: Axes, title: str, x: str, y: str) -> None:
    """A bold title at the left, and the names of the axes."""
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    panel.set(xlabel=x, ylabel=y)
    tidy(panel, grid="both")


def band(panel: Axes, x: Any, low: Any, high: Any, colour: str) -> None:
    """Shade the interval between two curves."""
    panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def legend_above(figure: Figure, handles: Sequence[Any], names: Sequence[str], across: int) -> None:
    """A legend over a figure that is `across` panels wide; the figure grows by the legend's further rows."""
    longest = max(map(len, names))
    columns = max(1, min(len(names), int(across * 42 / (longest + 8))))
    width, height = figure.get_size_inches()
    rows = math.ceil(len(names) / columns)
    figure.set_size_inches(width, height + 0.17 * max(0, rows - 1))  # the panels keep their height
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)


def save(figure: Figure, path: Path, dpi: float = 200) -> None:
    """Write a PNG; a file that stands at `path` is only replaced by a complete one."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
